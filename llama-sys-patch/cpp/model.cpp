// Models and devices: loading, describing, the tokenizer. Only llama.cpp's public API, but for where the weights lie.
#include "boundary.h"
#include "upstream.h"

#include "gguf.h"
#include "llama-vocab.h"
#include "llama.h"

#include <climits>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

using namespace dim;

// ---- devices

static bool is_gpu(ggml_backend_dev_t device) {
    const auto type = ggml_backend_dev_type(device);
    return type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
}

size_t dim_device_count(void) {
    size_t count = 0;
    guarded([&] {
        initialize();
        count = ggml_backend_dev_count();
    });
    return count;
}

dim_status dim_device_describe(size_t index, dim_device * out) {
    return guarded([&] {
        initialize();
        if (index >= ggml_backend_dev_count()) fail(DIM_INVALID_ARGUMENT, "there is no device number %zu", index);
        const auto device = ggml_backend_dev_get(index);
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(device, &free, &total);
        *out = { ggml_backend_dev_name(device), ggml_backend_dev_description(device), is_gpu(device), free, total };
    });
}

// The GPU called `name`.
static ggml_backend_dev_t find_gpu(const char * name) {
    std::string known;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        const auto device = ggml_backend_dev_get(i);
        if (!is_gpu(device)) continue;
        if (!std::strcmp(ggml_backend_dev_name(device), name)) return device;
        known += known.empty() ? "" : ", ";
        known += ggml_backend_dev_name(device);
    }
    fail(DIM_INVALID_ARGUMENT, "there is no GPU called \"%s\"; there is: %s", name, known.empty() ? "none" : known.c_str());
}

// ---- load

namespace {

struct load_watch {
    dim_progress progress;
    void *       user;
    bool         cancelled;
};

bool on_progress(float fraction, void * data) {
    auto & watch = *static_cast<load_watch *>(data);
    if (!watch.progress || watch.progress(fraction, watch.user)) return true;
    watch.cancelled = true;
    return false;
}

// Host memory in the file's own layout, for matrices that no multiplication will read. The CPU's own buffer type would
// let the loader choose a repacking one for the output matrix, which is a second copy of it (upstream.h, point 7). It has a
// name of its own, because the loader tells buffer types apart by name, and only what is in the CPU's own can be mapped.
ggml_backend_buffer_type_t plain_host_memory() {
    static ggml_backend_buffer_type type = [] {
        auto copy = *ggml_backend_cpu_buffer_type();
        copy.iface.get_name = [](ggml_backend_buffer_type_t) { return "CPU_Plain"; };
        return copy;
    }();
    return &type;
}

// Says that the model has no tokenizer, but a vocabulary of as many tokens: what a slice without one says of itself. Nothing
// where the file has no list of tokens anyway. Two overrides and the empty one that ends the list.
std::vector<llama_model_kv_override> no_tokenizer(const char * path) {
    std::unique_ptr<gguf_context, decltype(&gguf_free)> file(gguf_init_from_file(path, { /*no_alloc =*/ true, nullptr }), gguf_free);
    if (!file) return {};   // the loader will say why
    const int64_t arch   = gguf_find_key(file.get(), "general.architecture");
    const int64_t tokens = gguf_find_key(file.get(), "tokenizer.ggml.tokens");
    if (arch < 0 || gguf_get_kv_type(file.get(), arch) != GGUF_TYPE_STRING) return {};
    if (tokens < 0 || gguf_get_kv_type(file.get(), tokens) != GGUF_TYPE_ARRAY) return {};
    std::vector<llama_model_kv_override> overrides(3);
    overrides[0].tag = LLAMA_KV_OVERRIDE_TYPE_STR;
    std::snprintf(overrides[0].key,     sizeof overrides[0].key,     "tokenizer.ggml.model");
    std::snprintf(overrides[0].val_str, sizeof overrides[0].val_str, "none");
    overrides[1].tag     = LLAMA_KV_OVERRIDE_TYPE_INT;
    overrides[1].val_i64 = (int64_t) gguf_get_arr_n(file.get(), tokens);
    std::snprintf(overrides[1].key, sizeof overrides[1].key, "%s.vocab_size", gguf_get_val_str(file.get(), arch));
    return overrides;
}

} // namespace

dim_status dim_model_load(const char * const * paths, size_t n_paths, const dim_model_params * params, llama_model ** out) {
    return guarded([&] {
        initialize();
        if (n_paths == 0) fail(DIM_INVALID_ARGUMENT, "no model file given");
        if (params->gpu_blocks < -1 || params->gpu_blocks > LLAMA_MAX_LAYERS) {
            fail(DIM_INVALID_ARGUMENT, "%d GPU blocks: must be 0 to %d, or -1 for all", params->gpu_blocks, LLAMA_MAX_LAYERS);
        }

        load_watch watch { params->progress, params->progress_user, false };
        auto load = llama_model_default_params();
        load.load_mode = params->use_mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
        load.lazy_mode = LLAMA_LAZY_MODE_OFF;
        load.use_extra_bufts = params->repack;
        load.vocab_only      = params->part == DIM_MODEL_TOKENIZER;
        std::vector<llama_model_kv_override> overrides;
        if (params->part == DIM_MODEL_WEIGHTS) overrides = no_tokenizer(paths[0]);
        if (!overrides.empty()) load.kv_overrides = overrides.data();
        load.progress_callback           = on_progress;
        load.progress_callback_user_data = &watch;

        // llama.cpp counts the output as one more layer after the last block, and takes them from the end
        load.n_gpu_layers = params->gpu_blocks <= 0 ? params->gpu_blocks : params->gpu_blocks + 1;
        ggml_backend_dev_t devices[2] = { nullptr, nullptr };
        if (params->gpu_blocks == 0) {
            load.devices = devices;                 // none: not even for the large products of a prompt
        } else if (params->device) {
            devices[0]   = find_gpu(params->device);
            load.devices = devices;
        }

        const llama_model_tensor_buft_override vocabulary_stays[] = {
            { "^token_embd\\.weight$", plain_host_memory() },
            { "^output\\.(weight|bias)$", plain_host_memory() },
            { nullptr, nullptr },
        };
        if (!params->lm_head && params->repack) load.tensor_buft_overrides = vocabulary_stays;

        forget_log();
        llama_model * model = nullptr;
        if (n_paths == 1) {
            model = llama_model_load_from_file(paths[0], load);
        } else {
            std::vector<const char *> list(paths, paths + n_paths);
            model = llama_model_load_from_splits(list.data(), list.size(), load);
        }
        if (!model) {
            if (watch.cancelled) fail(DIM_CANCELLED, "%s: loading was stopped", paths[0]);
            const char * why = log_error_line();
            fail(DIM_LOAD_FAILED, "%s: %s", paths[0], *why ? why : "llama.cpp could not load it");
        }
        give_memory_back();   // a file's keys are a few hundred thousand small pieces, freed by now
        *out = model;
    });
}

void dim_model_free(llama_model * model) {
    guarded([&] { llama_model_free(model); });
}

// ---- describe

// llama.cpp's vocabulary asserts (and aborts) where there is none.
static const llama_vocab * tokenizer(const llama_model * model) {
    const auto * vocab = llama_model_get_vocab(model);
    return llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE ? nullptr : vocab;
}

static const llama_vocab & need_tokenizer(const llama_model * model) {
    const auto * vocab = tokenizer(model);
    if (!vocab) fail(DIM_NO_TOKENIZER, "this file carries no tokenizer: text goes in and out at the head");
    return *vocab;
}

dim_status dim_model_describe(const llama_model * model, dim_model_info * out) {
    return guarded([&] {
        const auto * all_vocab = llama_model_get_vocab(model);
        const auto * vocab     = tokenizer(model);
        dim_model_info info {};
        info.n_blocks      = (uint32_t) llama_model_n_layer(model);
        info.n_embd        = (uint32_t) llama_model_n_embd(model);
        info.n_vocab       = (uint32_t) llama_vocab_n_tokens(all_vocab);
        info.n_ctx_train   = (uint32_t) llama_model_n_ctx_train(model);
        info.weights_bytes = llama_model_size(model);
        info.has_tokenizer = vocab != nullptr;
        info.bos           = vocab ? llama_vocab_bos(vocab) : LLAMA_TOKEN_NULL;
        info.eos           = vocab ? llama_vocab_eos(vocab) : LLAMA_TOKEN_NULL;
        info.add_bos       = vocab && llama_vocab_get_add_bos(vocab);
        *out = info;
    });
}

static bool on_device(const ggml_tensor * tensor) {
    if (!tensor || !tensor->buffer || ggml_backend_buffer_is_host(tensor->buffer)) return false;
    const auto device = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(tensor->buffer));
    return device && is_gpu(device);
}

dim_status dim_model_offload(const llama_model * model, dim_offload * out) {
    return guarded([&] {
        const uint32_t n_blocks = model->hparams.n_layer();
        std::vector<uint32_t> on(n_blocks), off(n_blocks);
        dim_offload offload {};
        for (const auto & [name, tensor] : model->tensors_by_name) {
            const bool device = on_device(tensor);
            (device ? offload.device_bytes : offload.host_bytes) += ggml_nbytes(tensor);
            unsigned block = 0;
            if (std::sscanf(name.c_str(), "blk.%u.", &block) == 1 && block < n_blocks) (device ? on : off)[block]++;
        }
        for (uint32_t block = 0; block < n_blocks; block++) offload.blocks_on_device += on[block] > 0 && off[block] == 0;
        offload.lm_head_on_device = on_device(model->output);
        *out = offload;
    });
}

static void give_text(const char * from, size_t size, char * text, size_t capacity, int64_t * length) {
    if (capacity > 0 && size > 0) std::memcpy(text, from, std::min(size, capacity));
    *length = (int64_t) size;
}

dim_status dim_model_arch(const llama_model * model, char * text, size_t capacity, int64_t * length) {
    return guarded([&] {
        const std::string name = model->arch_name();
        give_text(name.data(), name.size(), text, capacity, length);
    });
}

dim_status dim_model_meta(const llama_model * model, const char * key, char * text, size_t capacity, int64_t * length) {
    return guarded([&] {
        const auto found = model->gguf_kv.find(key);
        if (found == model->gguf_kv.end()) { *length = -1; return; }
        give_text(found->second.data(), found->second.size(), text, capacity, length);
    });
}

dim_status dim_model_chat_template(const llama_model * model, const char * name, char * text, size_t capacity, int64_t * length) {
    return guarded([&] {
        const char * found = llama_model_chat_template(model, name);
        if (!found) { *length = -1; return; }
        give_text(found, std::strlen(found), text, capacity, length);
    });
}

// ---- text

// What tokenize() asserts on: a model that wants a special token added and does not have it.
static void check_special(const llama_vocab & vocab) {
    const bool bert = llama_vocab_type(&vocab) == LLAMA_VOCAB_TYPE_WPM;
    const auto need = [&](bool wanted, llama_token token, const char * name) {
        if (wanted && token == LLAMA_TOKEN_NULL) {
            fail(DIM_NO_TOKENIZER, "the tokenizer adds a %s token to every text, but names none", name);
        }
    };
    need(bert || llama_vocab_get_add_bos(&vocab), llama_vocab_bos(&vocab), "begin-of-text");
    need(        llama_vocab_get_add_eos(&vocab), llama_vocab_eos(&vocab), "end-of-text");
    need(bert || llama_vocab_get_add_sep(&vocab), llama_vocab_sep(&vocab), "separator");
}

dim_status dim_model_tokenize(const llama_model * model, const char * text, size_t length, bool add_special, bool parse_special,
                              int32_t * tokens, size_t capacity, int64_t * n_tokens) {
    return guarded([&] {
        const auto & vocab = need_tokenizer(model);
        if (length > INT32_MAX / 2) fail(DIM_INVALID_ARGUMENT, "a text of %zu bytes: at most %d", length, INT32_MAX / 2);
        if (add_special) check_special(vocab);
        const int32_t room = (int32_t) std::min<size_t>(capacity, INT32_MAX);
        const int32_t n = llama_tokenize(&vocab, text, (int32_t) length, tokens, room, add_special, parse_special);
        if (n == INT32_MIN) fail(DIM_INVALID_ARGUMENT, "the text has more tokens than can be counted");
        *n_tokens = n < 0 ? -(int64_t) n : n;
    });
}

dim_status dim_model_token_bytes(const llama_model * model, int32_t token, bool special, char * bytes, size_t capacity, int64_t * length) {
    return guarded([&] {
        const auto & vocab = need_tokenizer(model);
        const int32_t n_vocab = llama_vocab_n_tokens(&vocab);
        if (token < 0 || token >= n_vocab) {
            fail(DIM_UNKNOWN_TOKEN, "token %d is not in the vocabulary of %d", token, n_vocab);
        }
        const int32_t room = (int32_t) std::min<size_t>(capacity, INT32_MAX);
        const int32_t n = llama_token_to_piece(&vocab, token, bytes, room, 0, special);
        *length = n < 0 ? -(int64_t) n : n;
    });
}

dim_status dim_model_is_eog(const llama_model * model, int32_t token, bool * is_eog) {
    return guarded([&] {
        const auto * vocab = tokenizer(model);
        *is_eog = vocab && token >= 0 && token < llama_vocab_n_tokens(vocab) && llama_vocab_is_eog(vocab, token);
    });
}
