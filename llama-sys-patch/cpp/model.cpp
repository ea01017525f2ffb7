// Models: loading and describing. Only llama.cpp's public API, but for where the weights lie; slices are loader.cpp's.
#include "boundary.h"
#include "model.h"
#include "room.h"
#include "upstream.h"

#include "gguf.h"
#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

using namespace dim;

// ---- load

namespace {

struct load_watch {
    dim_progress progress;
    void * user;
    bool cancelled;
};

bool on_progress(float fraction, void * data) {
    auto & watch = *static_cast<load_watch *>(data);
    if (!watch.progress || watch.progress(fraction, watch.user)) return true;
    watch.cancelled = true;
    return false;
}

// Host memory in the file's own layout, for matrices that no multiplication will read. The CPU's own buffer type would
// let the loader choose a repacking one for the output matrix, which is a second copy of it (upstream.h, point 7). It
// has a name of its own, because the loader tells buffer types apart by name, and only what is in the CPU's own can be
// mapped.
ggml_backend_buffer_type_t plain_host_memory() {
    static ggml_backend_buffer_type type = [] {
        auto copy = *ggml_backend_cpu_buffer_type();
        copy.iface.get_name = [](ggml_backend_buffer_type_t) { return "CPU_Plain"; };
        return copy;
    }();
    return &type;
}

// Says that the model has no tokenizer, but a vocabulary of as many tokens: what a slice without one says of itself.
// Nothing where the file has no list of tokens anyway. Two overrides and the empty one that ends the list.
std::vector<llama_model_kv_override> no_tokenizer(const gguf_context & file) {
    const int64_t arch = gguf_find_key(&file, "general.architecture");
    const int64_t tokens = gguf_find_key(&file, "tokenizer.ggml.tokens");
    if (arch < 0 || gguf_get_kv_type(&file, arch) != GGUF_TYPE_STRING) return {};
    if (tokens < 0 || gguf_get_kv_type(&file, tokens) != GGUF_TYPE_ARRAY) return {};
    std::vector<llama_model_kv_override> overrides(3);
    overrides[0].tag = LLAMA_KV_OVERRIDE_TYPE_STR;
    std::snprintf(overrides[0].key, sizeof overrides[0].key, "tokenizer.ggml.model");
    std::snprintf(overrides[0].val_str, sizeof overrides[0].val_str, "none");
    overrides[1].tag = LLAMA_KV_OVERRIDE_TYPE_INT;
    overrides[1].val_i64 = (int64_t) gguf_get_arr_n(&file, tokens);
    std::snprintf(overrides[1].key, sizeof overrides[1].key, "%s.vocab_size", gguf_get_val_str(&file, arch));
    return overrides;
}

}   // namespace

static void check_params(size_t n_paths, const dim_model_params & params) {
    if (n_paths == 0) fail(DIM_INVALID_ARGUMENT, "no model file given");
    if (params.gpu_blocks < -1 || params.gpu_blocks > LLAMA_MAX_LAYERS) {
        fail(DIM_INVALID_ARGUMENT, "%d GPU blocks: must be 0 to %d, or -1 for all", params.gpu_blocks,
             LLAMA_MAX_LAYERS);
    }
}

// A whole file, or a slice that is a model of its own: llama.cpp's own front door.
static std::unique_ptr<dim_model> load_whole(const char * const * paths, size_t n_paths, llama_model_params load,
                                             int32_t gpu_blocks) {
    // llama.cpp counts the output as one more layer after the last block, and takes them from the end
    load.n_gpu_layers = gpu_blocks <= 0 ? gpu_blocks : gpu_blocks + 1;
    auto made = std::make_unique<dim_model>();
    if (n_paths == 1) {
        made->llama.reset(llama_model_load_from_file(paths[0], load));
    } else {
        std::vector<const char *> list(paths, paths + n_paths);
        made->llama.reset(llama_model_load_from_splits(list.data(), list.size(), load));
    }
    if (!made->llama) {
        const char * why = log_error_line();
        fail(DIM_LOAD_FAILED, "%s: %s", paths[0], *why ? why : "llama.cpp could not load it");
    }
    made->last = made->llama->hparams.n_layer();
    return made;
}

static std::unique_ptr<dim_model> load_slice(const char * const * paths, size_t n_paths, const gguf_context & header,
                                             llama_model_params load, int32_t gpu_blocks) {
    std::unique_ptr<dim_model> made;
    std::string why;
    dim_fault fault = no_fault;
    const auto status = guarded(&fault, [&] {
        made = plan_then_fill(paths, n_paths, header, load, gpu_blocks,
                              /*with_bytes =*/true);
    });
    if (status == DIM_INTERNAL) {   // what llama.cpp's loader throws; its own front door says the same in the log
        why = dim_last_error();
        fail(DIM_LOAD_FAILED, "%s: %s", paths[0], why.c_str());
    }
    if (status != DIM_OK) {
        why = dim_last_error();
        fail_with(status, fault, "%s", why.c_str());
    }
    return made;
}

// Refuses what cannot be had, while nothing has been. Weights that go to a device pass through little memory here.
static void check_weights_fit(const char * const * paths, size_t n_paths, const dim_model_params & params) {
    uint64_t bytes = 0;
    std::error_code unknown;
    for (size_t i = 0; i < n_paths && params.part != DIM_MODEL_TOKENIZER; i++) {
        const auto size = std::filesystem::file_size(std::filesystem::u8path(paths[i]), unknown);
        if (!unknown) bytes += size;
    }
    const bool on_device = params.gpu_blocks != 0 && ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU);
    check_room(on_device ? 0 : bytes, params.use_mmap, paths[0]);
}

dim_status dim_model_load(const char * const * paths, size_t n_paths, const dim_model_params * params, dim_model ** out,
                          dim_fault * fault) {
    return guarded(fault, [&] {
        initialize();
        check_params(n_paths, *params);
        check_weights_fit(paths, n_paths, *params);
        load_watch watch{ params->progress, params->progress_user, false };
        auto load = llama_model_default_params();
        load.load_mode = params->use_mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
        load.lazy_mode = LLAMA_LAZY_MODE_OFF;
        load.use_extra_bufts = params->repack;
        load.vocab_only = params->part == DIM_MODEL_TOKENIZER;
        gguf_file header = open_header(paths[0]);   // NULL: the loader will say why
        std::vector<llama_model_kv_override> overrides;
        if (header && params->part == DIM_MODEL_WEIGHTS) overrides = no_tokenizer(*header);
        if (!overrides.empty()) load.kv_overrides = overrides.data();
        load.progress_callback = on_progress;
        load.progress_callback_user_data = &watch;

        ggml_backend_dev_t devices[2] = { nullptr, nullptr };
        if (params->gpu_blocks == 0) {
            load.devices = devices;   // none: not even for the large products of a prompt
        } else if (params->device) {
            devices[0] = find_gpu(params->device);
            load.devices = devices;
        }
        const llama_model_tensor_buft_override vocabulary_stays[] = {
            { "^token_embd\\.weight$", plain_host_memory() },
            { "^output\\.(weight|bias)$", plain_host_memory() },
            { nullptr, nullptr },
        };
        if (!params->lm_head && params->repack) load.tensor_buft_overrides = vocabulary_stays;

        forget_log();
        std::unique_ptr<dim_model> made;
        dim_fault why = no_fault;
        const bool slice = header && !load.vocab_only && is_slice(*header);
        if (!slice) header.reset();   // the loader reads it again: 10 MB where a vocabulary has 150,000 tokens
        const auto status = guarded(&why, [&] {
            made = slice ? load_slice(paths, n_paths, *header, load, params->gpu_blocks)
                         : load_whole(paths, n_paths, load, params->gpu_blocks);
        });
        if (status != DIM_OK) {
            if (watch.cancelled) fail(DIM_CANCELLED, "%s: loading was stopped", paths[0]);
            throw failure{ status, why };   // its sentence is there already
        }
        give_memory_back();   // a file's keys are a few hundred thousand small pieces, freed by now
        *out = made.release();
    });
}

void dim_model_free(dim_model * model) {
    guarded([&] { delete model; });
}

llama_model * dim_model_llama(const dim_model * model) { return model->llama.get(); }

// ---- describe

// llama.cpp's vocabulary asserts (and aborts) where there is none.
static const llama_vocab * tokenizer(const dim_model * model) {
    const auto * vocab = llama_model_get_vocab(model->llama.get());
    return llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE ? nullptr : vocab;
}

dim_status dim_model_describe(const dim_model * model, dim_model_info * out) {
    return guarded([&] {
        const auto * all_vocab = llama_model_get_vocab(model->llama.get());
        const auto * vocab = tokenizer(model);
        dim_model_info info{};
        info.n_blocks = (uint32_t) llama_model_n_layer(model->llama.get());
        info.n_embd = (uint32_t) llama_model_n_embd(model->llama.get());
        info.n_vocab = (uint32_t) llama_vocab_n_tokens(all_vocab);
        info.n_ctx_train = (uint32_t) llama_model_n_ctx_train(model->llama.get());
        info.weights_bytes = llama_model_size(model->llama.get());
        info.first_block = model->first;
        info.last_block = model->last;
        info.is_slice = !model->absent.empty();
        info.has_tokenizer = vocab != nullptr;
        info.bos = vocab ? llama_vocab_bos(vocab) : LLAMA_TOKEN_NULL;
        info.eos = vocab ? llama_vocab_eos(vocab) : LLAMA_TOKEN_NULL;
        info.add_bos = vocab && llama_vocab_get_add_bos(vocab);
        info.add_eos = vocab && llama_vocab_get_add_eos(vocab);
        *out = info;
    });
}

static bool on_device(const ggml_tensor * tensor) {
    if (!tensor || !tensor->buffer || ggml_backend_buffer_is_host(tensor->buffer)) return false;
    const auto device = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(tensor->buffer));
    return device && is_gpu(device);
}

dim_status dim_model_offload(const dim_model * model, dim_offload * out) {
    return guarded([&] {
        const uint32_t n_blocks = model->llama->hparams.n_layer();
        std::vector<uint32_t> on(n_blocks), off(n_blocks);
        dim_offload offload{};
        for (const auto & [name, tensor] : model->llama->tensors_by_name) {
            if (model->absent.count(tensor)) continue;
            const bool device = on_device(tensor);
            (device ? offload.device_bytes : offload.host_bytes) += ggml_nbytes(tensor);
            unsigned block = 0;
            if (std::sscanf(name.c_str(), "blk.%u.", &block) == 1 && block < n_blocks) (device ? on : off)[block]++;
        }
        for (uint32_t block = 0; block < n_blocks; block++)
            offload.blocks_on_device += on[block] > 0 && off[block] == 0;
        offload.lm_head_on_device = on_device(model->llama->output);
        *out = offload;
    });
}

static void give_text(const char * from, size_t size, char * text, size_t capacity, int64_t * length) {
    if (capacity > 0 && size > 0) std::memcpy(text, from, std::min(size, capacity));
    *length = (int64_t) size;
}

dim_status dim_model_arch(const dim_model * model, char * text, size_t capacity, int64_t * length) {
    return guarded([&] {
        const std::string name = model->llama->arch_name();
        give_text(name.data(), name.size(), text, capacity, length);
    });
}

dim_status dim_model_meta(const dim_model * model, const char * key, char * text, size_t capacity, int64_t * length) {
    return guarded([&] {
        const auto found = model->llama->gguf_kv.find(key);
        if (found == model->llama->gguf_kv.end()) {
            *length = -1;
            return;
        }
        give_text(found->second.data(), found->second.size(), text, capacity, length);
    });
}

dim_status dim_model_chat_template(const dim_model * model, const char * name, char * text, size_t capacity,
                                   int64_t * length) {
    return guarded([&] {
        const char * found = llama_model_chat_template(model->llama.get(), name);
        if (!found) {
            *length = -1;
            return;
        }
        give_text(found, std::strlen(found), text, capacity, length);
    });
}
