#include "state.h"

#include "boundary.h"
#include "room.h"

#include "ggml-alloc.h"

#include <algorithm>
#include <map>
#include <typeinfo>

#if defined(__unix__) || defined(__APPLE__)
#    include <sys/mman.h>
#    include <unistd.h>
#endif

namespace dim {

// The recurrent part of a memory, if it has one that is a module of its own.
static llama_memory_recurrent * recurrent_part(llama_memory_i & memory) {
    if (auto * all = dynamic_cast<llama_memory_recurrent *>(&memory)) return all;
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(&memory)) return hybrid->get_mem_recr();
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(&memory)) return hybrid->get_mem_recr();
    return nullptr;
}

// Lets the system have the pages of host memory that nobody will read. What a device holds stays allocated.
static void give_back(const ggml_tensor * tensor) {
#if defined(__unix__) || defined(__APPLE__)
    if (!ggml_backend_buffer_is_host(tensor->buffer)) return;
    const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE);
    const uintptr_t start = ((uintptr_t) tensor->data + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t) tensor->data + ggml_nbytes(tensor)) / page * page;
    if (start < end) madvise((void *) start, end - start, MADV_DONTNEED);
#else
    (void) tensor;
#endif
}

uint32_t snapshots_of(const llama_context & context) {
    auto & memory = *context.get_memory();
    const bool has_states = recurrent_part(memory) || dynamic_cast<llama_kv_cache_dsv4 *>(&memory);
    return has_states ? context.get_cparams().n_rs_seq : UINT32_MAX;
}

stage_memory::stage_memory(llama_model & model, llama_context & context, const block_range & range,
                           const llama_memory_params & params)
    : of_context(context.get_memory()) {
    make_again(model, context, range, params);
    snapshots = snapshots_of(context);
    if (auto * compressed = dynamic_cast<llama_kv_cache_dsv4 *>(of_context)) share_room(*compressed, range);
    auto * states = recurrent_part(*of_context);
    if (!states) return;
    if (!own) {   // made by llama.cpp for all blocks, whatever no_alloc says
        for (const auto & [type, bytes] : states->memory_breakdown()) n_bytes += bytes;
        return;
    }
    // the context asks its own memory in llama_decode() only: its states are never touched again
    for (const auto * list : { &states->r_l, &states->s_l, &states->p_l }) {
        for (const auto * tensor : *list)
            if (tensor) give_back(tensor);
    }
    show_placeholders(*recurrent_part(*own), *states, range);
}

// By the exact kind and not by dynamic_cast: modules derive from each other and have more to them.
void stage_memory::make_again(llama_model & model, const llama_context & context, const block_range & range,
                              const llama_memory_params & params) {
    const auto & c = context.get_cparams();
    const auto & h = model.hparams;
    const auto & kind = typeid(*of_context);
    const uint32_t n_states = std::max(1u, c.n_seq_max);
    const auto kept_by = [](const std::vector<uint32_t> & list) {
        return [list](int32_t block) { return std::find(list.begin(), list.end(), (uint32_t) block) != list.end(); };
    };
    const auto own_of = [range](const llama_memory_recurrent * all) {
        return [range, all](int32_t block) { return range.own(block) && all->r_l[(size_t) block]; };
    };
    if (kind == typeid(llama_memory_recurrent)) {
        own.reset(new llama_memory_recurrent(model, GGML_TYPE_F32, GGML_TYPE_F32, c.offload_kqv, n_states, c.n_seq_max,
                                             c.n_rs_seq, own_of(static_cast<llama_memory_recurrent *>(of_context))));
    } else if (kind == typeid(llama_memory_hybrid)) {
        auto & all = *static_cast<llama_memory_hybrid *>(of_context);
        own.reset(new llama_memory_hybrid(model, params.type_k, params.type_v, !c.flash_attn, c.n_ctx_seq, 1, h.n_swa,
                                          h.swa_type, GGML_TYPE_F32, GGML_TYPE_F32, n_states, c.n_seq_max, c.n_rs_seq,
                                          c.offload_kqv, c.kv_unified, kept_by(all.get_mem_attn()->get_layer_ids()),
                                          own_of(all.get_mem_recr())));
    } else if (kind == typeid(llama_memory_hybrid_iswa)) {
        auto & all = *static_cast<llama_memory_hybrid_iswa *>(of_context);
        auto attending = all.get_mem_attn()->get_base()->get_layer_ids();
        for (const auto block : all.get_mem_attn()->get_swa()->get_layer_ids()) attending.push_back(block);
        own.reset(new llama_memory_hybrid_iswa(model, params.type_k, params.type_v, !c.flash_attn, params.swa_full,
                                               c.n_ctx_seq, c.n_ubatch, 1, GGML_TYPE_F32, GGML_TYPE_F32, n_states,
                                               c.n_seq_max, c.n_rs_seq, c.offload_kqv, c.kv_unified, kept_by(attending),
                                               own_of(all.get_mem_recr())));
    } else if (kind == typeid(llama_memory_hybrid_idx)) {
        auto & all = *static_cast<llama_memory_hybrid_idx *>(of_context);
        llama_memory_i::layer_filter_cb indexed;   // none: the model has no indexer
        if (const auto * index = all.get_mem_idx()) indexed = kept_by(index->get_layer_ids());
        own.reset(new llama_memory_hybrid_idx(
            model, params.type_k, params.type_v, !c.flash_attn, c.n_ctx_seq, 1, h.n_swa, h.swa_type, GGML_TYPE_F32,
            GGML_TYPE_F32, n_states, c.n_seq_max, c.n_rs_seq, c.offload_kqv, c.kv_unified,
            kept_by(all.get_mem_attn()->get_layer_ids()), own_of(all.get_mem_recr()), indexed));
    }
}

// The compressed keys of `cache` and the states of its compressors, by block.
static std::vector<std::pair<uint32_t, ggml_tensor *>> cleared_by(const llama_kv_cache_dsv4 & cache) {
    const ggml_context_ptr views(ggml_init({ 16 * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true }));
    std::vector<std::pair<uint32_t, ggml_tensor *>> found;
    const auto add = [&](const llama_kv_cache * keys, const llama_dsv4_comp_state * state) {
        for (const auto block : keys->get_layer_ids()) {
            ggml_reset(views.get());
            found.emplace_back(block, keys->get_k_storage((int) block));
            found.emplace_back(block, state->get_kv_all(views.get(), (int) block)->view_src);
            found.emplace_back(block, state->get_score_all(views.get(), (int) block)->view_src);
        }
    };
    add(cache.get_csa(), cache.get_csa_state());
    add(cache.get_hca(), cache.get_hca_state());
    add(cache.get_lid(), cache.get_lid_state());
    return found;
}

// This module writes zeros to the bytes of all blocks when it clears a session, and its compressors' states are
// allocated for all of them. Those outside the range get the same bytes, as many as the largest has.
void stage_memory::share_room(const llama_kv_cache_dsv4 & cache, const block_range & range) {
    std::map<ggml_backend_buffer_type_t, std::vector<ggml_tensor *>> by_type;
    for (const auto & [block, tensor] : cleared_by(cache)) {
        if (!range.own((int) block)) {
            by_type[ggml_backend_buffer_get_type(tensor->buffer)].push_back(tensor);
        } else if (tensor->data) {   // the others are counted when they are allocated
            n_bytes += ggml_nbytes(tensor);
        }
    }
    for (const auto & [type, tensors] : by_type) {
        size_t size = 0;
        for (const auto * tensor : tensors) size = std::max(size, ggml_backend_buft_get_alloc_size(type, tensor));
        auto * buffer = ggml_backend_buft_alloc_buffer(type, size);
        if (!buffer) fail(DIM_OUT_OF_MEMORY, "no memory for a cache of %.1f MiB", (double) size / (1 << 20));
        buffers.emplace_back(buffer);
        n_bytes += size;
        for (auto * tensor : tensors) {
            if (tensor->data) give_back(tensor);
            tensor->data = nullptr, tensor->buffer = nullptr;
            if (ggml_backend_tensor_alloc(buffer, tensor, ggml_backend_buffer_get_base(buffer)) != GGML_STATUS_SUCCESS)
                fail(DIM_OUT_OF_MEMORY, "no memory for %s", tensor->name);
        }
    }
}

// A tensor of the same shape and device, without bytes.
ggml_tensor * stage_memory::placeholder(const ggml_tensor * like) {
    placeholders.emplace_back(ggml_init({ ggml_tensor_overhead(), nullptr, /*no_alloc =*/true }));
    auto * tensor = ggml_dup_tensor(placeholders.back().get(), like);
    auto * buffer = ggml_backend_buft_alloc_buffer(ggml_backend_buffer_get_type(like->buffer), 0);
    if (!buffer) throw std::bad_alloc();
    buffers.emplace_back(buffer);
    tensor->buffer = buffer;
    ggml_set_name(tensor, like->name);
    return tensor;
}

// Every block asks for its states while the graph is built; those outside the range are shown tensors without bytes.
void stage_memory::show_placeholders(llama_memory_recurrent & states, const llama_memory_recurrent & like,
                                     const block_range & range) {
    for (size_t block = 0; block < like.r_l.size(); block++) {
        const auto show = [&](ggml_tensor *& mine, const ggml_tensor * theirs) {
            if (theirs && !mine) mine = placeholder(theirs);
            if (mine && range.own((int) block)) n_bytes += ggml_nbytes(mine);
        };
        show(states.r_l[block], like.r_l[block]);
        show(states.s_l[block], like.s_l[block]);
        show(states.p_l[block], like.p_l[block]);
    }
}

// Refuses what is larger than the machine: the allocation would succeed, and writing to it would end the process.
static void check_fits(ggml_backend_buffer_type_t type, uint64_t bytes) {
    if (!ggml_backend_buft_is_host(type)) return;
    const uint64_t total = memory_limit();
    if (total > 0 && bytes > total) {
        fail(DIM_OUT_OF_MEMORY, "the context needs %.1f GiB for its cache; this machine has %.1f GiB",
             (double) bytes / (1 << 30), (double) total / (1 << 30));
    }
}

bool stage_memory::allocate(const range_cut & cut) {
    std::map<ggml_backend_buffer_type_t, std::vector<ggml_tensor *>> by_type;
    for (const auto * list : { &cut.states_read, &cut.states_written }) {
        for (const auto * state : *list) {
            if (state->data) continue;
            auto & missing = by_type[ggml_backend_buffer_get_type(state->buffer)];
            if (std::find(missing.begin(), missing.end(), state) == missing.end())
                missing.push_back(const_cast<ggml_tensor *>(state));
        }
    }
    for (auto & [type, tensors] : by_type) {
        const size_t align = ggml_backend_buft_get_alignment(type);
        uint64_t size = 0;
        for (const auto * tensor : tensors)
            size += GGML_PAD((uint64_t) ggml_backend_buft_get_alloc_size(type, tensor), align);
        check_fits(type, size);
        auto * buffer = ggml_backend_buft_alloc_buffer(type, size);
        if (!buffer) fail(DIM_OUT_OF_MEMORY, "no memory for a cache of %.1f MiB", (double) size / (1 << 20));
        buffers.emplace_back(buffer);
        ggml_backend_buffer_clear(buffer, 0);
        auto room = ggml_tallocr_new(buffer);
        for (auto * tensor : tensors) {
            tensor->buffer = nullptr;
            if (ggml_tallocr_alloc(&room, tensor) != GGML_STATUS_SUCCESS)
                fail(DIM_OUT_OF_MEMORY, "no memory for %s", tensor->name);
            n_bytes += ggml_nbytes(tensor);
        }
    }
    return !by_type.empty();
}

}   // namespace dim
