// The whole model by llama_decode(): the oracle of every exactness test and the A arm of every comparison. Uses
// llama.cpp's public API only, with the settings of make_context().
#include "context.h"
#include "model.h"
#include "operands.h"
#include "session.h"

#include "llama.h"

#include <algorithm>
#include <cstring>

using namespace dim;

struct dim_stock {
    llama_context_ptr context;
    const llama_model & model;
    const size_t n_vocab;
    sessions session;

    void decode(const dim_row * rows, size_t n_rows, const int32_t * tokens, size_t tokens_len, float * logits,
                size_t logits_len, size_t * n_written);
};

void dim_stock::decode(const dim_row * rows, size_t n_rows, const int32_t * tokens, size_t tokens_len, float * logits,
                       size_t logits_len, size_t * n_written) {
    check_n_rows(*context, n_rows);
    session.check(rows, n_rows);
    const size_t n_out =
        (size_t) std::count_if(rows, rows + n_rows, [](const dim_row & row) { return row.want_output; });
    dim_fault size = no_fault;
    size.got = (int64_t) tokens_len, size.expected = (int64_t) n_rows;
    if (size.got != size.expected) fail_with(DIM_WRONG_SIZE, size, "%zu tokens for %zu rows", tokens_len, n_rows);
    size.got = (int64_t) logits_len, size.expected = (int64_t) (n_out * n_vocab);
    if (size.got < size.expected)
        fail_with(DIM_WRONG_SIZE, size, "logits: room for %zu values, %zu rows of %zu come", logits_len, n_out,
                  n_vocab);
    size.got = (int64_t) n_out, size.expected = context->get_cparams().n_outputs_max;   // llama.cpp asserts this
    if (size.got > size.expected)
        fail_with(DIM_TOO_MANY_ROWS, size, "logits of %zu rows at once: at most %lld", n_out,
                  (long long) size.expected);
    check_tokens(model, tokens, n_rows);

    std::vector<llama_pos> positions(n_rows);
    std::vector<int32_t> n_seq_id(n_rows, 1);
    std::vector<llama_seq_id> seq_id(n_rows);
    std::vector<llama_seq_id *> seq_ids(n_rows + 1, nullptr);
    std::vector<int8_t> wanted(n_rows);
    for (size_t i = 0; i < n_rows; i++) {
        positions[i] = (llama_pos) rows[i].position;
        seq_id[i] = (llama_seq_id) rows[i].session;
        seq_ids[i] = &seq_id[i];
        wanted[i] = rows[i].want_output;
    }
    llama_batch batch{};
    batch.n_tokens = (int32_t) n_rows;
    batch.token = const_cast<llama_token *>(tokens);
    batch.pos = positions.data();
    batch.n_seq_id = n_seq_id.data();
    batch.seq_id = seq_ids.data();
    batch.logits = wanted.data();

    forget_log();
    const int32_t status = llama_decode(context.get(), batch);
    if (status != 0) {
        session.roll_back(*context->get_memory(), rows, n_rows);
        fail(DIM_COMPUTE_FAILED, "llama_decode: %d: %s", status, log_error_line());
    }
    session.extend(rows, n_rows);
    llama_synchronize(context.get());
    for (size_t i = 0; i < n_rows; i++) {
        if (!rows[i].want_output) continue;
        const float * row = llama_get_logits_ith(context.get(), (int32_t) i);
        if (!row) fail(DIM_INTERNAL, "llama.cpp gives no logits for row %zu", i);
        std::memcpy(logits, row, n_vocab * sizeof(float));
        logits += n_vocab;
    }
    *n_written = n_out;
}

// The graph that llama.cpp has reserved for the context.
static void check_graph(const llama_model & model, const llama_context & context) {
    const auto & graph = *context.get_gf_res_reserve()->get_gf();
    weight_map weights(model);
    check_operands(dependencies(graph, weights, (int) model.hparams.n_layer()));
}

dim_status dim_stock_create(dim_model * owner, const dim_context_params * params, dim_stock ** out) {
    return guarded([&] {
        initialize();
        auto * model = owner->llama.get();
        if (owner->planned || !owner->absent.empty()) {
            fail(DIM_UNSUPPORTED, "llama_decode() wants a whole model, and this is a slice of one");
        }
        if (model->hparams.vocab_only || model->vocab.n_tokens() == 0)
            fail(DIM_UNSUPPORTED, "the file gives no vocabulary size");
        if (llama_model_has_encoder(model)) fail(DIM_UNSUPPORTED, "%s has an encoder", model->arch_name().c_str());
        if (params->f32_products) fail(DIM_INVALID_ARGUMENT, "llama_decode() knows no f32_products: a stage does");
        const uint32_t least = params->max_outputs == 0 ? 0 : std::max(params->max_outputs, params->max_sessions);
        auto ctx = make_context(model, *params, least);
        check_graph(*model, *ctx);
        const uint32_t n_snapshots = snapshots_of(*ctx);
        *out = new dim_stock{ std::move(ctx), *model, (size_t) model->vocab.n_tokens(),
                              sessions(params->max_sessions, params->n_ctx, n_snapshots) };
    });
}

void dim_stock_free(dim_stock * stock) {
    guarded([&] {
        const std::lock_guard<std::mutex> lock(allocation_lock());
        delete stock;
    });
}

dim_status dim_stock_describe(const dim_stock * stock, dim_context_info * out) {
    return guarded([&] { *out = describe(*stock->context); });
}

dim_status dim_stock_decode(dim_stock * stock, const dim_row * rows, size_t n_rows, const int32_t * tokens,
                            size_t tokens_len, float * logits, size_t logits_len, size_t * n_written,
                            dim_fault * fault) {
    return guarded(fault, [&] { stock->decode(rows, n_rows, tokens, tokens_len, logits, logits_len, n_written); });
}

dim_status dim_stock_rewind(dim_stock * stock, uint32_t session, uint32_t position, dim_fault * fault) {
    return guarded(fault, [&] { stock->session.rewind(*stock->context->get_memory(), session, position); });
}

dim_status dim_stock_length(const dim_stock * stock, uint32_t session, uint32_t * length, dim_fault * fault) {
    return guarded(fault, [&] { *length = stock->session.length(session); });
}

dim_status dim_stock_lowest(const dim_stock * stock, uint32_t session, uint32_t * position, bool * lost,
                            dim_fault * fault) {
    return guarded(fault, [&] {
        *position = stock->session.lowest(session);
        *lost = stock->session.is_lost(session);
    });
}
