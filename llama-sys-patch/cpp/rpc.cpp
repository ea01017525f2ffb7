// llama.cpp's own RPC backend, the peer in comparisons. Compiled with the `rpc` feature only, and only into a llama.cpp
// that was built with GGML_RPC=ON. Public API throughout.
#include "boundary.h"
#include "model.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-rpc.h"
#include "llama.h"

#include <vector>

using namespace dim;

dim_status dim_rpc_serve(const char * endpoint, uint32_t n_threads) {
    return guarded([&] {
        initialize();
        if (n_threads < 1 || n_threads > 512) fail(DIM_INVALID_ARGUMENT, "%u threads: must be 1 to 512", n_threads);
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        if (!cpu) fail(DIM_INTERNAL, "llama.cpp has no CPU device");
        ggml_backend_rpc_start_server(endpoint, nullptr, n_threads, 1, &cpu);
        fail(DIM_COMPUTE_FAILED, "llama.cpp's RPC server does not serve %s", endpoint);
    });
}

dim_status dim_rpc_model_load(const char * const * paths, size_t n_paths, const char * endpoint, uint32_t n_blocks,
                              bool use_mmap, dim_model ** out) {
    return guarded([&] {
        initialize();
        if (n_paths == 0) fail(DIM_INVALID_ARGUMENT, "no model file given");
        if (n_blocks == 0 || n_blocks > 512) fail(DIM_INVALID_ARGUMENT, "%u blocks: must be 1 to 512", n_blocks);
        const auto reg = ggml_backend_rpc_add_server(endpoint);
        if (!reg || ggml_backend_reg_dev_count(reg) == 0) {
            fail(DIM_LOAD_FAILED, "the RPC server at %s has no device", endpoint);
        }
        ggml_backend_dev_t devices[] = { ggml_backend_reg_dev_get(reg, 0), nullptr };

        auto load = llama_model_default_params();
        load.load_mode = use_mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
        load.lazy_mode = LLAMA_LAZY_MODE_OFF;
        load.devices = devices;
        // llama.cpp counts the output as one more layer after the last block, and takes them from the end; the output
        // matrix itself stays here, or it would be shipped at every start
        load.n_gpu_layers = (int32_t) n_blocks + 1;
        const llama_model_tensor_buft_override output_stays[] = {
            { "^output\\.(weight|bias)$", ggml_backend_cpu_buffer_type() },
            { "^output_norm\\.(weight|bias)$", ggml_backend_cpu_buffer_type() },
            { "^token_embd\\.weight$", ggml_backend_cpu_buffer_type() },
            { nullptr, nullptr },
        };
        load.tensor_buft_overrides = output_stays;

        forget_log();
        std::vector<const char *> list(paths, paths + n_paths);
        llama_model * model = n_paths == 1 ? llama_model_load_from_file(paths[0], load)
                                           : llama_model_load_from_splits(list.data(), list.size(), load);
        if (!model) {
            const char * why = log_error_line();
            fail(DIM_LOAD_FAILED, "%s: %s", paths[0], *why ? why : "llama.cpp could not load it");
        }
        auto made = std::make_unique<dim_model>();
        made->llama.reset(model);
        made->last = model->hparams.n_layer();
        *out = made.release();
    });
}
