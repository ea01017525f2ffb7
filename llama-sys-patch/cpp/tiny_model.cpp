// The weights, and the file. All optional tensors are there, but for separate scales.
#include "tiny_model.h"

#include "layer_eval.h"

#include "ggml-cpp.h"
#include "llama-cpp.h"
#include "llama-model.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <set>

using namespace dim;

static bool ends(const std::string & name, const char * suffix) {
    const size_t n = std::strlen(suffix);
    return name.size() >= n && name.compare(name.size() - n, n, suffix) == 0;
}

static bool has(const std::string & name, const char * part) { return name.find(part) != std::string::npos; }

// One random value of a tensor: of a size that lets activations stay about 1, and every weight tell.
static float scaled(const std::string & name, const ggml_tensor * tensor, float r) {
    if (has(name, "norm") && ends(name, ".weight")) return 1.0f + 0.2f * r;
    if (has(name, "rope_f")) return 1.0f + 0.3f * std::fabs(r);
    if (ends(name, "ssm_a") || ends(name, "ssm_a.weight")) return -(0.2f + std::fabs(r));
    if (ends(name, "scale")) return 1.0f + 0.1f * r;
    if (ends(name, "bias")) return 0.1f * r;
    if (has(name, "token_embd") || has(name, "position_embd")) return r;
    if (ggml_n_dims(tensor) <= 1) return 0.5f * r;
    return 1.5f / std::sqrt((float) tensor->ne[0]) * r;
}

// llama.cpp calls it for every tensor it wants.
static void fill(ggml_tensor * tensor, void *) {
    const std::string name = tensor->name;
    std::mt19937 random((unsigned) (std::hash<std::string>()(name) + 1));
    std::normal_distribution<float> normal(0.0f, 1.0f);
    const auto n = (size_t) ggml_nelements(tensor);
    std::vector<float> values(n);
    for (auto & value : values) value = scaled(name, tensor, normal(random));
    if (tensor->type == GGML_TYPE_F32) {
        ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
    } else if (tensor->type == GGML_TYPE_I32) {
        std::vector<int32_t> numbers(n);
        for (auto & number : numbers) number = (int32_t) (random() % 2);
        ggml_backend_tensor_set(tensor, numbers.data(), 0, ggml_nbytes(tensor));
    } else if (tensor->type == GGML_TYPE_F16) {
        std::vector<ggml_fp16_t> half(n);
        ggml_fp32_to_fp16_row(values.data(), half.data(), (int64_t) n);
        ggml_backend_tensor_set(tensor, half.data(), 0, ggml_nbytes(tensor));
    }
}

// Without a file llama.cpp takes a tensor's type from an empty one of its name; F32 where there is none.
static gguf_context * keys_with_types(const tiny_keys & keys) {
    gguf_context * meta = gguf_init_empty();
    gguf_set_kv(meta, keys.file.get());
    for (uint32_t block = 0; block < keys.n_layer + 1; block++) {
        ggml_tensor tensor{};
        tensor.type = GGML_TYPE_I32;
        std::snprintf(tensor.name, sizeof tensor.name, "blk.%u.ffn_gate_tid2eid.weight", block);
        gguf_add_tensor(meta, &tensor);
    }
    return meta;
}

// Makes the model and adds its tensors to the keys; `bytes` keeps what they point to.
static void add_tensors(const tiny_keys & keys, const std::vector<std::string> & drop, bool tied,
                        std::vector<std::vector<uint8_t>> & bytes) {
    auto params = llama_model_default_params();
    ggml_backend_dev_t no_devices[] = { nullptr };
    params.devices = no_devices;
    params.load_mtp = true;
    const std::unique_ptr<gguf_context, decltype(&gguf_free)> meta(keys_with_types(keys), gguf_free);
    forget_log();
    const llama_model_ptr model(llama_model_init_from_user(meta.get(), fill, nullptr, params));
    if (!model) fail(DIM_LOAD_FAILED, "%s: no model of these keys: %s", llm_arch_name(keys.arch), log_error_line());
    std::set<std::string> done;
    for (const auto & [name, tensor] : model->tensors_by_name) {
        if (!done.insert(name).second || ends(name, ".input_scale")) continue;
        if (ends(name, ".scale") && !has(name, "ffn_gate_inp")) continue;
        if (tied && name == "output.weight") continue;
        bool dropped = false;
        for (const auto & part : drop) dropped |= has(name, part.c_str());
        if (dropped) continue;
        bytes.emplace_back(ggml_nbytes(tensor));
        ggml_backend_tensor_get(tensor, bytes.back().data(), 0, bytes.back().size());
        const ggml_context_ptr context(ggml_init({ ggml_tensor_overhead(), nullptr, /*no_alloc =*/true }));
        auto * copy = ggml_new_tensor(context.get(), tensor->type, 4, tensor->ne);
        ggml_set_name(copy, name.c_str());
        gguf_add_tensor(keys.file.get(), copy);
        gguf_set_tensor_data(keys.file.get(), name.c_str(), bytes.back().data());
    }
}

size_t dim_test_architectures(void) { return LLM_ARCH_UNKNOWN; }

const char * dim_test_architecture(size_t index) {
    return index < LLM_ARCH_UNKNOWN ? llm_arch_name((llm_arch) index) : "";
}

dim_status dim_test_write_model(const char * arch_name, uint32_t n_blocks, const char * const * options,
                                size_t n_options, const char * path) {
    return guarded([&] {
        initialize();
        const llm_arch arch = llm_arch_from_string(arch_name);
        if (arch == LLM_ARCH_UNKNOWN) fail(DIM_INVALID_ARGUMENT, "llama.cpp knows no architecture %s", arch_name);
        tiny_keys keys(arch, n_blocks);
        std::vector<std::string> drop;
        bool tied = false;
        for (size_t i = 0; i < n_options; i++) {
            const std::string option = options[i];
            const size_t at = option.find('=');
            if (option == "tied")
                tied = true;
            else if (at != std::string::npos)
                keys.set(option.substr(0, at), option.substr(at + 1));
            else if (!option.compare(0, 8, "without "))
                drop.push_back(option.substr(8));
            else
                fail(DIM_INVALID_ARGUMENT, "%s: an option of no kind", option.c_str());
        }
        std::vector<std::vector<uint8_t>> bytes;
        add_tensors(keys, drop, tied, bytes);
        if (!gguf_write_to_file(keys.file.get(), path, false)) fail(DIM_LOAD_FAILED, "%s: could not be written", path);
    });
}
