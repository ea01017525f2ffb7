// llama.cpp's graph of the whole model, from tokens, as it builds it for a context: what ranges are cut out of.
#pragma once

#include "graph.h"
#include "upstream.h"

#include <memory>

namespace dim {

class whole_graph {
public:
    // `first`: of the range that will be cut out.
    whole_graph(const llama_model & model, llama_context & context, uint32_t first);

    llm_graph_params params(const llama_ubatch & ubatch, const llama_memory_context_i * cells, uint32_t n_outputs);

    // Builds it; what was built before is gone.
    void build(const llm_graph_params & params);

    llm_graph_result & result() const { return *whole; }
    ggml_cgraph & nodes() const { return *whole->get_gf(); }

    weight_map weights;

private:
    void place(const llama_ubatch & ubatch, ggml_tensor * tensor, const char * name, int block);

    const llama_model & model;
    llama_context & context;
    const uint32_t first;

    // what a graph refers to but nothing here uses
    llama_adapter_cvec no_cvec;
    llama_adapter_loras no_loras;
    llama_cross no_cross;
    std::unique_ptr<llm_graph_result> whole;
};

// The largest chunk of a context, or one of another number of rows, with rows of each session.
llama_ubatch chunk_for_reserve(llama_batch_allocr & from, uint32_t rows_per_session, uint32_t n_sessions);

}   // namespace dim
