// Every fact about llama.cpp's inside that this crate leans on, as far as a compiler can check it: a bump of
// llama-cpp-sys-2 that changes one fails here, with the line saying what to look at again.
//
// What no compiler can check, to be read again on a bump. tests/architectures.rs, which holds every architecture
// against llama_decode(), is the test of most of it.
//   1. llama-context.cpp, graph_get_cb(): which tensors are pinned to their layer's device ("norm", "l_last"), and
//      when. whole_graph.cpp, place(), does the same.
//   2. llama-context.cpp, process_ubatch() and graph_params(): the order of the steps and what a graph is built from.
//      stage.cpp, compute(), does the same. decode(): rollback after a failed ubatch.
//   3. ggml.h: how a node says what it reads and writes (src, view_src). graph.cpp, writes(), lists the operations
//      that write to a view; cut.cpp, collect(), those whose destination is not read.
//   4. llama-kv-cache*.cpp, llama-memory-*.cpp: states are tensors "cache_k_l<block>" and so on (names for people,
//      only); llama-graph.cpp: which inputs look at token ids (cut.cpp, ignores_tokens()).
//   5. ggml-backend.cpp: leafs of a graph are allocated even if no node reads them (set_inputs() writes to all).
//   6. llama-model.cpp, load_tensors(): n_gpu_layers counts from the last block, and the output is one more after it
//      (i_gpu_start = n_layer_all + 1 - n_gpu_layers). model.cpp asks for blocks + 1, loader.cpp for those of a slice.
//   7. llama-model-loader.cpp, create_tensor(): an override naming the CPU's own buffer type may still pick a repacking
//      one; model.cpp therefore passes a copy of it, under another address. llama-model-loader.h, ctx_key: tensors are
//      put together by the *name* of their buffer type; load_tensors() maps those of the CPU's own type only.
//   8. GGML_ASSERTs between evaluate() and the kernels: llama-batch.cpp, llama-kv-cache.cpp (seq ids, empty ubatches,
//      n_tokens % n_seqs), llama-context.cpp (n_outputs_max, n_batch), llama-vocab.cpp (type NONE; bos/eos/sep null).
//   9. llama-kv-cache.cpp, prepare() and find_slot(): where a token's cell goes. Replay with the same chunks finds the
//      same cells, which is why it is bit-identical. A stage's sessions only grow and shrink: no cell is shifted or
//      copied, so llama_context::memory_update() would find nothing to do.
//  10. llama-model.cpp, create_memory(): which module a model gets, and from what (state.cpp, make_again()). Which
//      of them look at the bytes of states when a session is cleared (llama-kv-cache-dsv4.cpp does).
//  11. hparams.no_alloc: read when a context is made (its cache and graph buffers then take no memory), described
//      and freed, and nowhere else after loading (context.h, no_allocation). llama-memory-recurrent.cpp does not look
//      at it.
//  12. llama.cpp, llama_model_load(): the steps that loader.cpp takes one by one. llama-model-loader.cpp,
//      load_all_data() and init_mappings(): what they read of the loader (weights_map, size_data, use_mmap, no_alloc).
//  13. llama-memory-recurrent.cpp, seq_rm() and s_copy(): rows are taken back by snapshots of the last call
//  (session.cpp).
//  14. ggml-cpu/ops.cpp, binary-ops.cpp, unary-ops.cpp: which types an operation takes (operands.cpp). llama_context:
//      the graph that was reserved is whole and alive when a context has been made (stock.cpp, check_graph()).
//  15. llama-kv-cache.cpp: keys are (n_embd, cells, streams), values the same, or with cells first in each stream where
//      attention is not fused; models with is_mla() have no values (saved.cpp).
#pragma once

#include "llama-adapter.h"
#include "llama-batch.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-kv-cache-dsv4.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-idx.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"
#include "llama-memory.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include <type_traits>
#include <utility>

namespace dim::upstream {

// New operations or types: does cut() still see every way a node can depend on another (src, view_src)?
static_assert(GGML_OP_COUNT == 101, "ggml has other operations: read graph.cpp, writes(), and operands.cpp");
static_assert(GGML_TYPE_COUNT == 43, "ggml has other types: read rows.cpp and gguf-tools' table");
static_assert(GGML_MAX_SRC == 10 && GGML_MAX_NAME == 64, "ggml_tensor changed: read graph.cpp and whole_graph.cpp");
static_assert(LLAMA_MAX_SEQ == 256, "llama.cpp allows another number of sequences: read StageParams::max_sessions");
static_assert(GGML_MAX_N_THREADS == 512, "llama.cpp allows another number of threads");

// A graph can be cut: its nodes and leafs are arrays of tensors in execution order.
static_assert(std::is_same_v<decltype(ggml_cgraph::nodes), ggml_tensor **>, "ggml_cgraph: nodes");
static_assert(std::is_same_v<decltype(ggml_cgraph::leafs), ggml_tensor **>, "ggml_cgraph: leafs");
static_assert(std::is_same_v<decltype(ggml_cgraph::n_nodes), int>, "ggml_cgraph: n_nodes");
static_assert(std::is_same_v<decltype(ggml_cgraph::n_leafs), int>, "ggml_cgraph: n_leafs");
static_assert(std::is_same_v<decltype(ggml_tensor::view_src), ggml_tensor *>, "ggml_tensor: view_src");

// A context lets itself be driven from outside.
static_assert(std::is_same_v<decltype(&llama_context::get_sched), ggml_backend_sched_t (llama_context::*)() const>,
              "get_sched");
static_assert(std::is_same_v<decltype(&llama_context::get_memory), llama_memory_t (llama_context::*)() const>,
              "get_memory");
static_assert(
    std::is_same_v<decltype(&llama_context::graph_compute), ggml_status (llama_context::*)(ggml_cgraph *, bool)>,
    "graph_compute");
static_assert(std::is_same_v<decltype(&llama_context::graph_max_nodes), uint32_t (llama_context::*)(uint32_t) const>,
              "graph_max_nodes");
static_assert(
    std::is_same_v<decltype(&llama_model::create_memory),
                   llama_memory_i * (llama_model::*) (const llama_memory_params &, const llama_cparams &) const>,
    "create_memory");
static_assert(std::is_same_v<decltype(llama_hparams::no_alloc), bool>, "llama_hparams: no_alloc: point 11 above");
static_assert(std::is_same_v<decltype(&llama_model::build_graph),
                             ggml_cgraph * (llama_model::*) (const llm_graph_params &) const>,
              "build_graph");
static_assert(std::is_same_v<decltype(&llama_model::dev_layer), ggml_backend_dev_t (llama_model::*)(int) const>,
              "dev_layer");
static_assert(std::is_same_v<decltype(&llama_model::n_gpu_layers), uint32_t (llama_model::*)() const>,
              "n_gpu_layers: point 6 above");

// What a graph is built from. The initialiser in whole_graph.cpp names the fields in this order; a field more or less
// fails to compile here, before it can be left out there.
template <class T> constexpr bool params_shape() {
    return std::is_aggregate_v<T> && std::is_same_v<decltype(T::arch), llm_arch> &&
           std::is_same_v<decltype(T::hparams), llama_hparams> && std::is_same_v<decltype(T::cparams), llama_cparams> &&
           std::is_same_v<decltype(T::ubatch), llama_ubatch> && std::is_same_v<decltype(T::gtype), llm_graph_type> &&
           std::is_same_v<decltype(T::sched), ggml_backend_sched_t> &&
           std::is_same_v<decltype(T::backend_cpu), ggml_backend_t> &&
           std::is_same_v<decltype(T::cvec), const llama_adapter_cvec *> &&
           std::is_same_v<decltype(T::loras), const llama_adapter_loras *> &&
           std::is_same_v<decltype(T::mctx), const llama_memory_context_i *> &&
           std::is_same_v<decltype(T::cross), const llama_cross *> &&
           std::is_same_v<decltype(T::prec_policy), const llama_prec_policy *> &&
           std::is_same_v<decltype(T::n_outputs), uint32_t> && std::is_same_v<decltype(T::cb), llm_graph_cb> &&
           std::is_same_v<decltype(T::res), llm_graph_result *>;
}
static_assert(params_shape<llm_graph_params>(), "llm_graph_params: read whole_graph.cpp, point 2 above");
struct params_size {
    llm_arch arch;
    llama_hparams hparams;
    llama_cparams cparams;
    llama_ubatch ubatch;
    llm_graph_type gtype;
    ggml_backend_sched_t sched;
    ggml_backend_t backend_cpu;
    const void *cvec, *loras, *mctx, *cross, *prec_policy;
    std::map<llama_seq_id, llama_sampler *> samplers;
    uint32_t n_outputs;
    llm_graph_cb cb;
    llm_graph_result * res;
};
static_assert(sizeof(llm_graph_params) == sizeof(params_size),
              "llm_graph_params has a field more or less: read whole_graph.cpp, point 2 above");

// A batch is split by the model's own memory; its rows know where in the batch they came from.
static_assert(std::is_same_v<decltype(llama_ubatch::data_t::batch_idxs), std::vector<int32_t>>,
              "llama_ubatch: batch_idxs");
static_assert(std::is_same_v<decltype(llama_ubatch::token), llama_token *> &&
                  std::is_same_v<decltype(llama_ubatch::embd), float *>,
              "llama_ubatch: token and embd decide which input a graph reads");
static_assert(std::is_base_of_v<llama_memory_i, llama_kv_cache> &&
                  std::is_base_of_v<llama_memory_i, llama_kv_cache_iswa>,
              "the two memories a stage can rewind");
static_assert(LLAMA_MEMORY_STATUS_FAILED_COMPUTE == 3, "llama_memory_status: read compute()");

// The loader lets itself be driven step by step.
static_assert(
    std::is_constructible_v<llama_model_loader, gguf_context *, llama_model_set_tensor_data_t, void *,
                            const std::string &, std::vector<std::string> &, FILE *, llama_load_mode, bool, bool, bool,
                            const llama_model_kv_override *, const llama_model_tensor_buft_override *>,
    "llama_model_loader: read loader.cpp, point 12 above");
static_assert(
    std::is_same_v<decltype(llama_model_loader::weights_map)::mapped_type, llama_model_loader::llama_tensor_weight>,
    "weights_map");
static_assert(std::is_same_v<decltype(llama_model_loader::llama_tensor_weight::tensor), ggml_tensor *>,
              "llama_tensor_weight");
static_assert(std::is_same_v<decltype(&llama_model_loader::load_all_data),
                             bool (llama_model_loader::*)(ggml_context *, llama_buf_map &, llama_mlocks *,
                                                          llama_progress_callback, void *)>,
              "load_all_data");
static_assert(std::is_same_v<decltype(&llama_model_loader::get_mapping_range),
                             void (llama_model_loader::*)(size_t *, size_t *, void **, int, ggml_context *) const>,
              "get_mapping_range");
static_assert(
    std::is_same_v<decltype(llama_model::tensors_by_name), std::vector<std::pair<std::string, ggml_tensor *>>>,
    "tensors_by_name");

// Recurrent states by block, which a module made again shows.
static_assert(std::is_same_v<decltype(llama_memory_recurrent::r_l), std::vector<ggml_tensor *>> &&
                  std::is_same_v<decltype(llama_memory_recurrent::s_l), std::vector<ggml_tensor *>> &&
                  std::is_same_v<decltype(llama_memory_recurrent::p_l), std::vector<ggml_tensor *>>,
              "llama_memory_recurrent: read state.cpp");

// A buffer type is a plain struct that can be copied (point 7 above).
static_assert(std::is_trivially_copyable_v<ggml_backend_buffer_type>, "ggml_backend_buffer_type: read model.cpp");

}   // namespace dim::upstream
