// The memory of a stage: llama.cpp's own module for the whole model, with bytes for what the range uses and for nothing
// else.
#pragma once

#include "cut.h"
#include "upstream.h"

#include "ggml-cpp.h"
#include "llama-cpp.h"

#include <memory>
#include <vector>

namespace dim {

// Rows that the context's memory can take back from a recurrent session; UINT32_MAX: it has no recurrent states.
uint32_t snapshots_of(const llama_context & context);

class stage_memory {
public:
    // `context` was made while nothing was allocated (no_allocation). Recurrent states are allocated whatever that
    // says: their module is made again for the range's blocks, and what the context's own holds is given back.
    stage_memory(llama_model & model, llama_context & context, const block_range & range,
                 const llama_memory_params & params);

    llama_memory_i & module() const { return own ? *own : *of_context; }

    // Gives memory, all zeros, to the states that a cut uses and that have none yet. True if there were any: views of
    // them in a graph that is already built do not know. Fails with DIM_OUT_OF_MEMORY.
    bool allocate(const range_cut & cut);

    uint64_t bytes() const { return n_bytes; }

    // As snapshots_of() its context.
    uint32_t n_snapshots() const { return snapshots; }

private:
    void make_again(llama_model & model, const llama_context & context, const block_range & range,
                    const llama_memory_params & params);
    void share_room(const llama_kv_cache_dsv4 & cache, const block_range & range);
    void show_placeholders(llama_memory_recurrent & states, const llama_memory_recurrent & like,
                           const block_range & range);
    ggml_tensor * placeholder(const ggml_tensor * like);

    llama_memory_i * of_context;
    uint32_t snapshots = UINT32_MAX;
    uint64_t n_bytes = 0;
    // in the order they are freed in, last first
    std::vector<ggml_backend_buffer_ptr> buffers;
    std::vector<ggml_context_ptr> placeholders;
    llama_memory_ptr own;
};

}   // namespace dim
