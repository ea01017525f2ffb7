// A session's keys and values, taken out of a stage and put into the same stage of another process.
//
// What is taken and put are positions: for each block of the range, in llama.cpp's order, their keys and then their values,
// as the cache has them. Where a position's cell is llama.cpp's memory says when rows are put, as it does when they are
// evaluated; that it is the one with the position's number, as long as a session only grows and shrinks, is checked both
// times. So what is put lies where evaluation would have put it, and what is computed with it has the same bits.
//
// Only of memories that are keys and values and nothing else: llama_kv_cache, and two of them for models with windows (whose
// small one is as large as the other here: context.cpp). A recurrent state knows only where it is.
#include "stage.h"

#include <typeinfo>

using namespace dim;

namespace {

// A tensor that keys or values lie in: of each cell `n_pieces` times `bytes`, one piece for all cells after the other.
struct kept {
    ggml_tensor * tensor;
    size_t begin;   // of the session's cell 0
    size_t bytes;   // of a cell in a piece
    size_t n_pieces;
    size_t stride;   // from piece to piece
};

std::vector<llama_kv_cache *> caches_of(llama_memory_i & memory) {
    // by the exact kind: others derive from these and have more to them
    const auto & kind = typeid(memory);
    if (kind == typeid(llama_kv_cache)) return { static_cast<llama_kv_cache *>(&memory) };
    if (kind == typeid(llama_kv_cache_iswa)) {
        const auto & both = static_cast<llama_kv_cache_iswa &>(memory);
        return { both.get_base(), both.get_swa() };
    }
    return {};
}

// llama.cpp lends its values only as views.
ggml_tensor * values_of(const llama_kv_cache & cache, int32_t block) {
    const ggml_context_ptr room(ggml_init({ 2 * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true }));
    if (!room) throw std::bad_alloc();
    llama_kv_cache::slot_info first;
    first.s0 = first.s1 = 0;
    return cache.get_v(room.get(), block, 1, first)->view_src;
}

// What has bytes: the blocks of the range, and no others.
std::vector<kept> kept_of(const dim_stage & stage, const llama_kv_cache & cache, uint32_t session) {
    const uint32_t stream = cache.get_stream((llama_seq_id) session);
    const bool is_transposed = !stage.made.context->get_cparams().flash_attn;
    std::vector<kept> all;
    for (const auto block : cache.get_layer_ids()) {
        auto * keys = cache.get_k_storage((int32_t) block);
        if (!keys->data) continue;
        all.push_back({ keys, stream * keys->nb[2], keys->nb[1], 1, 0 });
        if (stage.model.hparams.is_mla()) continue;   // its values are a part of its keys
        auto * values = values_of(cache, (int32_t) block);
        const size_t begin = stream * values->nb[2], bytes = ggml_type_size(values->type);
        if (is_transposed) {
            all.push_back({ values, begin, bytes, (size_t) values->ne[0], (size_t) values->ne[1] * bytes });
        } else {
            all.push_back({ values, begin, values->nb[1], 1, 0 });
        }
    }
    return all;
}

void check_in_place(const llama_kv_cache & cache, uint32_t session, uint32_t from, uint32_t to) {
    const auto & cells = cache.get_cells((llama_seq_id) session);
    for (uint32_t i = from; i < to; i++) {
        if (i < cells.size() && !cells.is_empty(i) && cells.seq_has(i, (llama_seq_id) session) &&
            cells.pos_get(i) == (llama_pos) i) {
            continue;
        }
        fail(DIM_UNSUPPORTED, "position %u of session %u is not in cell %u", i, session, i);
    }
}

// Hands every piece of the positions to `copy`, with its place in `bytes`.
template <typename Copy>
void each_piece(const dim_stage & stage, uint32_t session, uint32_t from, uint32_t to, uint8_t * bytes, Copy copy) {
    for (const auto * cache : caches_of(stage.made.memory->module())) {
        for (const auto & kept : kept_of(stage, *cache, session)) {
            const size_t size = (to - from) * kept.bytes;
            for (size_t piece = 0; piece < kept.n_pieces; piece++, bytes += size)
                copy(kept.tensor, bytes, kept.begin + piece * kept.stride + from * kept.bytes, size);
        }
    }
}

void check_size(const dim_stage & stage, uint64_t n_positions, size_t got) {
    const uint64_t expected = n_positions * dim_stage_saved_bytes(&stage);
    if (got == expected) return;
    dim_fault fault = no_fault;
    fault.got = (int64_t) got, fault.expected = (int64_t) expected;
    fail_with(DIM_WRONG_SIZE, fault, "%zu bytes for the keys and values of %llu positions, which are %llu", got,
              (unsigned long long) n_positions, (unsigned long long) expected);
}

void check_can(const dim_stage & stage) {
    if (dim_stage_saved_bytes(&stage) == UINT64_MAX)
        fail(DIM_UNSUPPORTED, "the memory of a %s model is more than keys and values", stage.model.arch_name().c_str());
}

}   // namespace

void dim_stage::put_back(const rows_of_call & call, const uint8_t * bytes) {
    const uint32_t id = call.rows[0].session, from = call.rows[0].position, to = from + (uint32_t) call.n_rows;
    auto & memory = made.memory->module();
    struct undo {
        dim_stage & stage;
        const rows_of_call & call;
        bool done;
        ~undo() {
            if (!done) stage.session.roll_back(stage.made.memory->module(), call.rows, call.n_rows);
        }
    } undo{ *this, call, false };
    // as compute() does, without computing
    split(call);
    const auto cells = memory.init_batch(splitter, context().n_ubatch(), false);
    if (!cells || cells->get_status() != LLAMA_MEMORY_STATUS_SUCCESS)
        fail(DIM_COMPUTE_FAILED, "no room in the KV cache for %zu rows", call.n_rows);
    do {
        if (!cells->apply()) fail(DIM_COMPUTE_FAILED, "the KV cache refused %zu rows", call.n_rows);
    } while (cells->next());
    for (const auto * cache : caches_of(memory)) check_in_place(*cache, id, from, to);
    ggml_backend_sched_synchronize(context().get_sched());
    each_piece(*this, id, from, to, const_cast<uint8_t *>(bytes), ggml_backend_tensor_set);
    undo.done = true;
    session.extend(call.rows, call.n_rows);
}

uint64_t dim_stage_saved_bytes(const dim_stage * stage) {
    uint64_t bytes = UINT64_MAX;
    guarded([&] {
        const auto caches = caches_of(stage->made.memory->module());
        if (caches.empty()) return;
        uint64_t sum = 0;
        for (const auto * cache : caches)
            for (const auto & kept : kept_of(*stage, *cache, 0)) sum += kept.bytes * kept.n_pieces;
        bytes = sum;
    });
    return bytes;
}

dim_status dim_stage_save(dim_stage * stage, uint32_t session, uint32_t from, uint32_t to, uint8_t * out, size_t size,
                          dim_fault * fault) {
    return guarded(fault, [&] {
        check_can(*stage);
        const uint32_t length = stage->session.length(session);
        if (from > to || to > length || stage->session.is_lost(session)) {
            dim_fault wrong = no_fault;
            wrong.session = session;
            wrong.got = to, wrong.expected = length;
            fail_with(DIM_WRONG_POSITION, wrong, "positions %u to %u of session %u, which holds %u", from, to, session,
                      length);
        }
        check_size(*stage, to - from, size);
        for (const auto * cache : caches_of(stage->made.memory->module())) check_in_place(*cache, session, from, to);
        ggml_backend_sched_synchronize(stage->made.context->get_sched());
        each_piece(*stage, session, from, to, out,
                   [](const ggml_tensor * tensor, uint8_t * bytes, size_t at, size_t n) {
                       ggml_backend_tensor_get(tensor, bytes, at, n);
                   });
    });
}

dim_status dim_stage_restore(dim_stage * stage, const dim_row * rows, size_t n_rows, const int32_t * tokens,
                             const uint8_t * bytes, size_t size, dim_fault * fault) {
    return guarded(fault, [&] {
        check_can(*stage);
        check_n_rows(*stage->made.context, n_rows);
        for (size_t i = 0; i < n_rows; i++)
            if (rows[i].session != rows[0].session) fail(DIM_INVALID_ARGUMENT, "rows of more than one session");
        stage->session.check(rows, n_rows);
        check_tokens(stage->model, tokens, n_rows);
        check_size(*stage, n_rows, size);
        const bool takes_tokens = stage->range.takes_tokens;
        dim_stage::rows_of_call call{};
        call.rows = rows, call.n_rows = n_rows, call.tokens = tokens;
        call.input_type = takes_tokens ? DIM_TOKENS : DIM_F32;
        call.input = takes_tokens ? tokens : nullptr;
        stage->put_back(call, bytes);
    });
}
