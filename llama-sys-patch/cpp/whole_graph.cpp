#include "whole_graph.h"

#include "boundary.h"

#include <algorithm>
#include <cstring>

namespace dim {

whole_graph::whole_graph(const llama_model & model, llama_context & context, uint32_t first)
    : weights(model), model(model), context(context), first(first),
      whole(new llm_graph_result(context.graph_max_nodes(std::min(context.n_ctx(), context.n_ubatch())))) {}

llm_graph_params whole_graph::params(const llama_ubatch & ubatch, const llama_memory_context_i * cells,
                                     uint32_t n_outputs) {
    auto * sched = context.get_sched();
    llm_graph_params params = { model.arch,
                                model.hparams,
                                context.get_cparams(),
                                ubatch,
                                LLM_GRAPH_TYPE_DEFAULT,
                                sched,
                                ggml_backend_sched_get_backend(sched, ggml_backend_sched_get_n_backends(sched) -
                                                                          1),   // the CPU is the last
                                &no_cvec,
                                &no_loras,
                                cells,
                                &no_cross,
                                &model.prec_policy,
                                {},
                                n_outputs,
                                nullptr,
                                whole.get() };
    params.cb = [this](const llama_ubatch & u, ggml_tensor * tensor, const char * name, int block) {
        place(u, tensor, name, block);
    };
    return params;
}

void whole_graph::build(const llm_graph_params & params) {
    whole->reset();
    ggml_backend_sched_reset(context.get_sched());
    if (!model.build_graph(params)) fail(DIM_INTERNAL, "llama.cpp could not build its graph");
}

// Called for every tensor that llama.cpp names while it builds a graph: names it and pins it.
void whole_graph::place(const llama_ubatch & ubatch, ggml_tensor * tensor, const char * name, int block) {
    if (block >= 0)
        ggml_format_name(tensor, "%s-%d", name, block);
    else
        ggml_set_name(tensor, name);

    // As llama.cpp's own callback: without this the scheduler may run a norm on the backend of the block before, and
    // carry the rows across twice. It holds back where only part of the model is on the GPU; here, of the blocks from
    // `first` on. The output, which llama.cpp counts as one more layer, need not be.
    const bool all_blocks_offloaded = model.n_gpu_layers() + first >= model.hparams.n_layer_all;
    if (block < 0 || (ubatch.n_tokens >= 32 && !all_blocks_offloaded)) return;
    if (std::strcmp(name, "norm") != 0 && std::strcmp(name, "l_last") != 0) return;
    auto * sched = context.get_sched();
    auto device = model.dev_layer(block);
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); i++) {
        auto * backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(backend) == device && ggml_backend_supports_op(backend, tensor)) {
            ggml_backend_sched_set_tensor_backend(sched, tensor, backend);
        }
    }
}

llama_ubatch chunk_for_reserve(llama_batch_allocr & from, uint32_t rows_per_session, uint32_t n_sessions) {
    llama_ubatch chunk = from.ubatch_reserve(rows_per_session, n_sessions);
    for (uint32_t s = 0; s < n_sessions; s++) {
        for (uint32_t i = s * rows_per_session; i < (s + 1) * rows_per_session; i++) {
            chunk.n_seq_id[i] = 1;
            chunk.seq_id[i] = &chunk.seq_id_unq[s];
        }
    }
    return chunk;
}

}   // namespace dim
