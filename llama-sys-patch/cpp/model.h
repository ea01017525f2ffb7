// A model as this crate holds it: llama.cpp's, and what of it has no bytes.
#pragma once

#include "layer_eval.h"
#include "upstream.h"

#include "ggml-cpp.h"
#include "llama-cpp.h"
#include "llama-mmap.h"

#include "gguf.h"

#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

// A whole file, or a slice cut in the old way, whose blocks count from 0, is llama.cpp's model and nothing else. A
// slice is the whole model too, with bytes for the tensors that its file holds: then these bytes are here.
struct dim_model {
    std::vector<ggml_backend_buffer_ptr> buffers;   // of the tensors that are there; freed after the model
    llama_mmaps mappings;
    llama_model_ptr llama;
    std::unordered_set<const ggml_tensor *> absent;   // tensors of the model that have no bytes
    uint32_t first = 0, last = 0;                     // blocks [first, last) have them
    bool planned = false;                             // no tensor has: for plans
    std::vector<float> tensor_split;                  // that llama.cpp was given, which keeps the pointer

    dim_model() = default;
    dim_model(const dim_model &) = delete;
    ~dim_model() { llama.reset(); }
};

namespace dim {

bool is_gpu(ggml_backend_dev_t device);

// The GPU called `name`; fails with DIM_INVALID_ARGUMENT where there is none.
ggml_backend_dev_t find_gpu(const char * name);

using gguf_file = std::unique_ptr<gguf_context, decltype(&gguf_free)>;

// The header of a file; NULL if it is not a GGUF.
gguf_file open_header(const char * path);

// Blocks of the model, by <arch>.block_count; 0 if the file does not say.
uint32_t block_count(const gguf_context & file);

// A tensor that the model has and a slice's file does not.
struct absent_tensor {
    std::string name;
    ggml_type type;
    int64_t ne[4];
};

// The file says which tensors it lacks: it is a slice.
bool is_slice(const gguf_context & file);

// Reads dim.absent.names, .types and .shapes, and checks every field before ggml, which asserts, sees it. Fails with
// DIM_BAD_SLICE; the fault's `row` is the entry's number, or -1 where it is about all of them.
std::vector<absent_tensor> read_absent(const gguf_context & file, const char * path);

// The whole model by llama.cpp's own loader, without allocating anything; then, where `with_bytes`, the tensors that
// the file holds are filled, by the loader's own functions. `paths` may be several only where the first lacks nothing.
// `gpu_blocks`: of those the file holds, from its last; -1: all.
std::unique_ptr<dim_model> plan_then_fill(const char * const * paths, size_t n_paths, const gguf_context & header,
                                          llama_model_params params, int32_t gpu_blocks, bool with_bytes);

}   // namespace dim
