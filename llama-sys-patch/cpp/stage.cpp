// A stage: blocks [first, last) of a model, evaluated in a llama_context of their own.
//
// What it is: llama.cpp's own graph of the whole model, with what is not wanted cut off. Per chunk of at most n_ubatch
// rows:
//
//   1. llama.cpp's batch splitter and memory say which rows come next and where their keys, values and states go;
//   2. llama.cpp builds the whole graph from tokens, unless the last one still fits (one decode step like the one
//      before);
//   3. what depends on the range's blocks is cut out of it (cut.cpp). What comes from the blocks before becomes an
//      input where it stands, so that its readers, views among them, need not change; rows that come in F16 are
//      converted there;
//   4. llama.cpp's scheduler places and allocates it, its input setters fill positions, masks and cell numbers, and its
//      backends compute it.
//
// What it is not: a change to llama.cpp or a copy of it. Nothing here knows what is inside a block, or any
// architecture.
//
// Why it is exact: the kernels, their operands and their order within the range are those of llama_decode() for the
// same chunks. Tested for every architecture that llama.cpp has (tests/architectures.rs): max |logit difference| = 0.
#include "stage.h"

#include "values.h"

#include <algorithm>
#include <chrono>
#include <cstring>

using namespace dim;

static int64_t now_ns() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

static bool is_rows(dim_dtype type) { return type == DIM_F16 || type == DIM_F32; }
static size_t element_bytes(dim_dtype type) { return type == DIM_F16 ? 2 : 4; }

static uint32_t n_snapshots(const stage_context & made) { return made.memory->n_snapshots(); }

dim_stage::dim_stage(stage_context made_context, dim_model & owner, const dim_stage_params & p)
    : made(std::move(made_context)), owner(owner), model(*owner.llama),
      range{ p.first, p.last, p.takes_tokens, p.has_lm_head }, f32_products(p.context.f32_products),
      n_vocab(model.vocab.n_tokens()), session(p.context.max_sessions, p.context.n_ctx, n_snapshots(made)),
      batch(made.context.get()), splitter(model.hparams.n_pos_per_embd()), whole(model, *made.context, p.first) {}

dim_stage::~dim_stage() {
    const no_allocation nothing(model);
    made.memory.reset();
    made.context.reset();
}

// ---- evaluate

void dim_stage::check_call(const rows_of_call & call) const {
    check_n_rows(context(), call.n_rows);
    if ((call.input_type == DIM_TOKENS) != range.takes_tokens ||
        (call.input_type != DIM_TOKENS && !is_rows(call.input_type))) {
        fail(DIM_WRONG_INPUT, range.takes_tokens ? "this stage starts the model: it takes tokens"
                                                 : "this stage does not start the model: it takes hidden rows");
    }
    if ((call.output_type == DIM_LOGITS) != range.has_lm_head ||
        (call.output_type != DIM_LOGITS && !is_rows(call.output_type))) {
        fail(DIM_WRONG_OUTPUT, range.has_lm_head ? "this stage ends the model: it gives logits"
                                                 : "this stage does not end the model: it gives hidden rows");
    }
    if (!call.tokens && reads_tokens && !range.takes_tokens) {
        fail(DIM_WRONG_INPUT, "blocks %u..%u of a %s model read token ids, too", range.first, range.last - 1,
             model.arch_name().c_str());
    }
    session.check(call.rows, call.n_rows);

    const size_t n_out = call.output_type != DIM_LOGITS
                             ? call.n_rows
                             : (size_t) std::count_if(call.rows, call.rows + call.n_rows,
                                                      [](const dim_row & row) { return row.want_output; });
    const size_t in_width =
        call.input_type == DIM_TOKENS ? 1 : in.bytes_per_token(call.input_type) / element_bytes(call.input_type);
    const size_t out_width = call.output_type == DIM_LOGITS
                                 ? n_vocab
                                 : out.bytes_per_token(call.output_type) / element_bytes(call.output_type);
    dim_fault size = no_fault;
    size.got = (int64_t) call.input_len, size.expected = (int64_t) (call.n_rows * in_width);
    if (size.got != size.expected) {
        fail_with(DIM_WRONG_SIZE, size, "input: %zu values for %zu rows of %zu", call.input_len, call.n_rows, in_width);
    }
    size.got = (int64_t) call.output_len, size.expected = (int64_t) (n_out * out_width);
    if (size.got < size.expected) {
        fail_with(DIM_WRONG_SIZE, size, "output: room for %zu values, %zu rows of %zu come", call.output_len, n_out,
                  out_width);
    }
    if (call.input_type == DIM_TOKENS) {
        check_tokens(model, static_cast<const int32_t *>(call.input), call.n_rows);
        return;
    }
    if (reads_tokens) check_tokens(model, call.tokens, call.n_rows);
    const dim_fault bad = find_bad_rows(in, call.input_type, static_cast<const uint8_t *>(call.input), call.n_rows);
    if (bad.row >= 0) {
        fail_with(DIM_INPUT_NOT_FINITE, bad, "input row %lld: %lld values of the call are not finite",
                  (long long) bad.row, (long long) bad.got);
    }
}

void dim_stage::evaluate(const rows_of_call & call, size_t * n_written) {
    check_call(call);
    struct undo {
        dim_stage & stage;
        const rows_of_call & call;
        bool done;
        ~undo() {
            if (done) return;
            stage.graph = nullptr;   // its allocation may be half made
            stage.session.roll_back(stage.made.memory->module(), call.rows, call.n_rows);
        }
    } undo{ *this, call, false };
    compute(call);
    undo.done = true;
    session.extend(call.rows, call.n_rows);
    *n_written = call.output_type != DIM_LOGITS
                     ? call.n_rows
                     : (size_t) std::count_if(call.rows, call.rows + call.n_rows,
                                              [](const dim_row & row) { return row.want_output; });
}

void dim_stage::compute(const rows_of_call & call) {
    split(call);
    // where a batch row's output goes; -1: nowhere
    std::vector<int32_t> output_row(call.n_rows, -1);
    int32_t n_out = 0;
    for (size_t i = 0; i < call.n_rows; i++) {
        if (call.output_type != DIM_LOGITS || call.rows[i].want_output) output_row[i] = n_out++;
    }

    const auto cells = made.memory->module().init_batch(splitter, context().n_ubatch(), false);
    if (!cells || cells->get_status() != LLAMA_MEMORY_STATUS_SUCCESS) {
        fail(DIM_COMPUTE_FAILED, "no room in the KV cache for %zu rows", call.n_rows);
    }
    do {
        const auto & ubatch = cells->get_ubatch();
        if (!cells->apply()) fail(DIM_COMPUTE_FAILED, "the KV cache refused %u rows", ubatch.n_tokens);
        run_chunk(call, ubatch, cells.get(), output_row);
    } while (cells->next());
}

void dim_stage::run_chunk(const rows_of_call & call, const llama_ubatch & ubatch, const llama_memory_context_i * cells,
                          const std::vector<int32_t> & output_row) {
    auto * sched = context().get_sched();
    uint32_t n_outputs = 0;
    for (uint32_t i = 0; i < ubatch.n_tokens; i++) n_outputs += ubatch.output[i] != 0;

    const graph_kind wanted{ call.input_type, call.output_type };
    const auto params = whole.params(ubatch, cells, n_outputs);
    if (graph && kind == wanted && whole.result().can_reuse(params)) {
        n_reused++;
    } else {
        build(params, wanted);
        if (!ggml_backend_sched_alloc_graph(sched, graph))
            fail(DIM_OUT_OF_MEMORY, "no memory for the graph of %u rows", ubatch.n_tokens);
    }
    whole.result().set_inputs(&ubatch);
    if (!range.takes_tokens) fill_input(ubatch, static_cast<const uint8_t *>(call.input));

    watch_since_ns = now_ns();
    const auto status = context().graph_compute(graph, ubatch.n_tokens > 1);
    if (status != GGML_STATUS_SUCCESS) {
        graph = nullptr;
        fail(DIM_COMPUTE_FAILED, "the backend could not compute blocks %u..%u: %s", range.first, range.last - 1,
             ggml_status_to_string(status));
    }
    if (n_outputs > 0) take_output(ubatch, output_row, static_cast<uint8_t *>(call.output));
    if (!watching) return;
    ggml_backend_sched_synchronize(sched);
    if (range.has_lm_head) {
        auto & head = stats.back();
        head.calls++, head.rows += n_outputs, head.nanoseconds += (uint64_t) (now_ns() - watch_since_ns);
    }
}

// Hands the rows to llama.cpp's batch splitter, as tokens: 0 where nobody reads them.
void dim_stage::split(const rows_of_call & call) {
    const auto * ids = call.input_type == DIM_TOKENS ? static_cast<const int32_t *>(call.input)
                       : reads_tokens                ? call.tokens
                                                     : nullptr;
    batch.clear();
    for (size_t i = 0; i < call.n_rows; i++) {
        const auto & row = call.rows[i];
        const int32_t at = batch.add_token((llama_seq_id) row.session);
        // models whose positions have several parts take this for text: one position, thrice
        const auto p = (llama_pos) row.position;
        const llama_pos position[GGML_MROPE_SECTIONS] = { p, p, p, 0 };
        if (at < 0 || !batch.set_token_id(at, ids ? ids[i] : 0) || !batch.set_token_pos(at, position) ||
            !batch.set_output(at, !range.has_lm_head || row.want_output)) {
            fail(DIM_INTERNAL, "llama.cpp refused row %zu of a batch", i);
        }
    }
    forget_log();
    if (!splitter.init(batch, model.vocab, false))
        fail(DIM_INTERNAL, "llama.cpp refused a batch: %s", log_error_line());
}

void dim_stage::fill_input(const llama_ubatch & ubatch, const uint8_t * rows) {
    const size_t row_bytes = in.bytes_per_token(kind.input);
    size_t offset = 0;
    for (size_t p = 0; p < in.parts.size(); p++) {
        rows_in(inputs[p], in.parts[p], ubatch.data->batch_idxs, rows, row_bytes, offset);
        offset += in.parts[p].bytes(kind.input);
    }
}

void dim_stage::take_output(const llama_ubatch & ubatch, const std::vector<int32_t> & output_row, uint8_t * rows) {
    // the chunk's output rows: where they go, and which rows of the batch they are
    std::vector<int32_t> to, batch_row;
    for (uint32_t i = 0; i < ubatch.n_tokens; i++) {
        if (!ubatch.output[i]) continue;
        batch_row.push_back(ubatch.data->batch_idxs[i]);
        to.push_back(output_row[(size_t) batch_row.back()]);
    }
    ggml_backend_sched_synchronize(context().get_sched());
    take_rows(to, rows);
    const size_t row_bytes = kind.output == DIM_LOGITS ? n_vocab * sizeof(float) : out.bytes_per_token(kind.output);
    const bool together = std::is_sorted(to.begin(), to.end()) && to.back() - to.front() + 1 == (int32_t) to.size();
    if (together) {
        check_output(rows + (size_t) to[0] * row_bytes, to.size(), batch_row);
        return;
    }
    for (size_t i = 0; i < to.size(); i++) check_output(rows + (size_t) to[i] * row_bytes, 1, { batch_row[i] });
}

void dim_stage::take_rows(const std::vector<int32_t> & to, uint8_t * rows) {
    if (kind.output == DIM_LOGITS) {
        const crossing_part logits{ GGML_TYPE_F32, 1, { (int64_t) n_vocab, 1, 1, 1 }, "" };
        rows_out(outputs[0], logits, to, rows, n_vocab * sizeof(float), 0);
        return;
    }
    const size_t row_bytes = out.bytes_per_token(kind.output);
    size_t offset = 0;
    for (size_t p = 0; p < out.parts.size(); p++) {
        rows_out(outputs[p], out.parts[p], to, rows, row_bytes, offset);
        offset += out.parts[p].bytes(kind.output);
    }
}

// Nothing that is not a number leaves a stage: the next one would compute on it, and the answer would be wrong in
// silence.
void dim_stage::check_output(const uint8_t * rows, size_t n_rows, const std::vector<int32_t> & batch_row) {
    dim_fault bad = kind.output == DIM_LOGITS ? find_bad_logits(reinterpret_cast<const float *>(rows), n_rows, n_vocab)
                                              : find_bad_rows(out, kind.output, rows, n_rows);
    if (bad.row < 0) return;
    bad.row = batch_row[(size_t) bad.row];
    bad.block = (int64_t) range.last - 1;

    // what it was before the conversion tells an overflow from a NaN
    size_t not_finite = 0;
    for (size_t p = 0; p < results.size(); p++) {
        const auto * result = results[p];
        if (result->type != GGML_TYPE_F32) continue;
        // what does not cross may hold anything
        const size_t begin = kind.output == DIM_LOGITS ? 0 : (size_t) out.parts[p].first * result->nb[2];
        std::vector<float> exact((ggml_nbytes(result) - begin) / sizeof(float));
        ggml_backend_tensor_get(result, exact.data(), begin, exact.size() * sizeof(float));
        bad.max_abs = std::max(bad.max_abs, max_abs_finite(exact.data(), exact.size()));
        not_finite += count_not_finite(exact.data(), exact.size());
    }
    if (kind.output == DIM_F16 && not_finite == 0) {
        fail_with(DIM_OUTPUT_OVERFLOWS, bad,
                  "block %lld gave %lld values too large for F16 (up to %g, the limit is 65504), first in row %lld",
                  (long long) bad.block, (long long) bad.got, bad.max_abs, (long long) bad.row);
    }
    fail_with(DIM_OUTPUT_NOT_FINITE, bad, "%s %lld gave %lld values that are not finite, first in row %lld",
              range.has_lm_head ? "the output after block" : "block", (long long) bad.block, (long long) bad.got,
              (long long) bad.row);
}

// ---- watch

void dim_stage::watch(bool on) {
    graph = nullptr;   // the callback is set when a graph is built
    watching = on;
    stats.assign(range.last - range.first + (range.has_lm_head ? 1 : 0), dim_block_stats{});
}

// A block's output is what goes on from it; of several tensors the last.
void dim_stage::watch_cut(const dependencies & nodes) {
    watched.clear();
    for (uint32_t block = range.first; block < range.last; block++) {
        const auto crossing = nodes.boundary((int) block + 1);
        if (!crossing.empty()) watched[crossing.back().tensor] = block - range.first;
    }
}

bool dim_stage::observe(ggml_tensor * tensor, bool ask) {
    const auto found = watched.find(tensor);
    if (ask || found == watched.end()) return found != watched.end();
    const int64_t computed_ns = now_ns();
    auto & block = stats[found->second];
    block.calls++;
    block.rows += (uint64_t) tensor->ne[1];
    block.nanoseconds += (uint64_t) (computed_ns - watch_since_ns);
    if (ggml_is_contiguous(tensor) && tensor->type == GGML_TYPE_F32) {
        watched_values.resize((size_t) ggml_nelements(tensor));
        ggml_backend_tensor_get(tensor, watched_values.data(), 0, watched_values.size() * sizeof(float));
        block.max_abs = std::max(block.max_abs, max_abs_finite(watched_values.data(), watched_values.size()));
        block.not_finite += count_not_finite(watched_values.data(), watched_values.size());
    }
    watch_since_ns = now_ns();   // looking is not the next block's time
    return true;
}
