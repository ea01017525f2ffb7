// The keys: every one that any loader asks for, at a size that makes a model of some hundred kilobytes, and what single
// architectures insist on.
#include "tiny_model.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace dim {

// a model with fewer blocks than this is another variant
static uint32_t least_blocks(llm_arch arch, uint32_t n_blocks) {
    return arch == LLM_ARCH_GEMMA3N ? std::max(n_blocks, 24u) : n_blocks;
}

tiny_keys::tiny_keys(llm_arch arch, uint32_t n_blocks)
    : arch(arch), n_layer(least_blocks(arch, n_blocks)), file(gguf_init_empty(), gguf_free), key(arch) {
    if (arch == LLM_ARCH_CHAMELEON) n_vocab = 10240;
    if (is({ LLM_ARCH_GPT2, LLM_ARCH_BLOOM, LLM_ARCH_MPT, LLM_ARCH_BAICHUAN, LLM_ARCH_PHI2, LLM_ARCH_QWEN,
             LLM_ARCH_GPTNEOX, LLM_ARCH_OPENELM, LLM_ARCH_JAIS, LLM_ARCH_PLM, LLM_ARCH_MINICPM3, LLM_ARCH_MINIMAX_01,
             LLM_ARCH_HRM_TEXT })) {
        n_head_kv = n_head;
    }
    const bool latent =
        is({ LLM_ARCH_DEEPSEEK2, LLM_ARCH_DEEPSEEK32, LLM_ARCH_GLM_DSA, LLM_ARCH_KIMI_LINEAR, LLM_ARCH_MISTRAL4,
             LLM_ARCH_KIMI_K3, LLM_ARCH_GLM5_NEXT, LLM_ARCH_BAILINGMOE3, LLM_ARCH_HY_V4, LLM_ARCH_DOTS3NOTE });
    if (latent) n_head_kv = 1;
    sizes();
    attention();
    if (latent) latent_attention();
    windows();
    experts();
    recurrent();
    others();
}

bool tiny_keys::is(std::initializer_list<llm_arch> list) const {
    return std::find(list.begin(), list.end(), arch) != list.end();
}

void tiny_keys::u32(llm_kv k, uint32_t v) { gguf_set_val_u32(file.get(), key(k).c_str(), v); }
void tiny_keys::f32(llm_kv k, float v) { gguf_set_val_f32(file.get(), key(k).c_str(), v); }
void tiny_keys::str(llm_kv k, const char * v) { gguf_set_val_str(file.get(), key(k).c_str(), v); }
void tiny_keys::yes(llm_kv k, bool v) { gguf_set_val_bool(file.get(), key(k).c_str(), v); }

void tiny_keys::arr(llm_kv k, const std::vector<uint32_t> & v) {
    gguf_set_arr_data(file.get(), key(k).c_str(), GGUF_TYPE_UINT32, v.data(), v.size());
}

void tiny_keys::arr(llm_kv k, const std::vector<float> & v) {
    gguf_set_arr_data(file.get(), key(k).c_str(), GGUF_TYPE_FLOAT32, v.data(), v.size());
}

std::vector<uint32_t> tiny_keys::per_block(uint32_t (*value)(uint32_t, uint32_t), uint32_t n) const {
    std::vector<uint32_t> v;
    for (uint32_t block = 0; block < n_layer; block++) v.push_back(value(block, n));
    return v;
}

void tiny_keys::sizes() {
    str(LLM_KV_GENERAL_ARCHITECTURE, llm_arch_name(arch));
    str(LLM_KV_TOKENIZER_MODEL, "none");
    u32(LLM_KV_VOCAB_SIZE, n_vocab);
    u32(LLM_KV_CONTEXT_LENGTH, n_ctx);
    u32(LLM_KV_EMBEDDING_LENGTH, n_embd);
    u32(LLM_KV_FEATURES_LENGTH, n_embd);
    u32(LLM_KV_BLOCK_COUNT, n_layer);
    u32(LLM_KV_DECODER_BLOCK_COUNT, n_layer);
    u32(LLM_KV_LEADING_DENSE_BLOCK_COUNT, 2);
    u32(LLM_KV_FEED_FORWARD_LENGTH, n_ff);
    yes(LLM_KV_USE_PARALLEL_RESIDUAL, false);
    f32(LLM_KV_LOGIT_SCALE, 0.7f);
    f32(LLM_KV_RESIDUAL_SCALE, 0.8f);
    f32(LLM_KV_EMBEDDING_SCALE, 2.0f);
    f32(LLM_KV_ATTN_LOGIT_SOFTCAPPING, 30.0f);
    f32(LLM_KV_FINAL_LOGIT_SOFTCAPPING, 20.0f);
}

void tiny_keys::attention() {
    u32(LLM_KV_ATTENTION_HEAD_COUNT, n_head);
    u32(LLM_KV_ATTENTION_HEAD_COUNT_KV, n_head_kv);
    u32(LLM_KV_ATTENTION_KEY_LENGTH, head);
    u32(LLM_KV_ATTENTION_VALUE_LENGTH, head);
    u32(LLM_KV_ROPE_DIMENSION_COUNT, head);
    arr(LLM_KV_ROPE_DIMENSION_SECTIONS, std::vector<uint32_t>(4, head / 8));
    f32(LLM_KV_ATTENTION_MAX_ALIBI_BIAS, 8.0f);
    f32(LLM_KV_ATTENTION_CLAMP_KQV, 4.0f);
    f32(LLM_KV_ATTENTION_SCALE, 0.1f);
    f32(LLM_KV_ATTENTION_LAYERNORM_EPS, 1e-5f);
    f32(LLM_KV_ATTENTION_LAYERNORM_RMS_EPS, 1e-5f);
    f32(LLM_KV_ATTENTION_GROUPNORM_EPS, 1e-5f);
    u32(LLM_KV_ATTENTION_GROUPNORM_GROUPS, 8);
    u32(LLM_KV_ATTENTION_Q_LORA_RANK, 96);
    u32(LLM_KV_ATTENTION_KV_LORA_RANK, 64);
    u32(LLM_KV_ATTENTION_DECAY_LORA_RANK, 32);
    u32(LLM_KV_ATTENTION_ICLR_LORA_RANK, 32);
    u32(LLM_KV_ATTENTION_VALUE_RESIDUAL_MIX_LORA_RANK, 32);
    u32(LLM_KV_ATTENTION_GATE_LORA_RANK, 32);
    u32(LLM_KV_ATTENTION_RELATIVE_BUCKETS_COUNT, 8);
    u32(LLM_KV_ATTENTION_INDEXER_HEAD_COUNT, 2);
    u32(LLM_KV_ATTENTION_INDEXER_KEY_LENGTH, 64);
    u32(LLM_KV_ATTENTION_INDEXER_TOP_K, 16);
    u32(LLM_KV_ATTENTION_INDEXER_BLOCK_SIZE, 8);
    u32(LLM_KV_ATTENTION_INDEXER_LOCAL_BLOCKS, 1);
    u32(LLM_KV_ATTENTION_OUTPUT_GROUP_COUNT, 2);
    u32(LLM_KV_ATTENTION_OUTPUT_LORA_RANK, 32);
    f32(LLM_KV_ATTENTION_COMPRESS_ROPE_FREQ_BASE, 10000.0f);
}

// A key is the latent and the rotated part.
void tiny_keys::latent_attention() {
    u32(LLM_KV_ATTENTION_KEY_LENGTH, 96);
    u32(LLM_KV_ATTENTION_VALUE_LENGTH, 64);
    u32(LLM_KV_ROPE_DIMENSION_COUNT, 32);
    u32(LLM_KV_ATTENTION_KEY_LENGTH_MLA, 96);
    u32(LLM_KV_ATTENTION_VALUE_LENGTH_MLA, 64);
}

void tiny_keys::windows() {
    u32(LLM_KV_ATTENTION_SLIDING_WINDOW, 12);
    if (arch == LLM_ARCH_GEMMA4) {
        u32(LLM_KV_EMBEDDING_LENGTH_PER_LAYER, 0);
        u32(LLM_KV_ATTENTION_SHARED_KV_LAYERS, 0);
        u32(LLM_KV_ATTENTION_KEY_LENGTH, 2 * head);
        u32(LLM_KV_ATTENTION_VALUE_LENGTH, 2 * head);
        u32(LLM_KV_ROPE_DIMENSION_COUNT, 2 * head);
        u32(LLM_KV_ROPE_DIMENSION_COUNT_SWA, head);
        u32(LLM_KV_ATTENTION_KEY_LENGTH_SWA, head);
        u32(LLM_KV_ATTENTION_VALUE_LENGTH_SWA, head);
        f32(LLM_KV_ROPE_FREQ_BASE_SWA, 5000.0f);
    }
    // one flag per block; for others a period, which is theirs
    if (is({ LLM_ARCH_GEMMA4, LLM_ARCH_MAPLE, LLM_ARCH_MIMO2, LLM_ARCH_STEP35, LLM_ARCH_COHERE2MOE,
             LLM_ARCH_GRANITE_SWA, LLM_ARCH_DOTS3NOTE, LLM_ARCH_MUSE_GLIMMER, LLM_ARCH_SPARK2_5 })) {
        arr(LLM_KV_ATTENTION_SLIDING_WINDOW_PATTERN,
            per_block([](uint32_t block, uint32_t) { return (uint32_t) (block % 3 != 2); }));
    }
}

void tiny_keys::experts() {
    if (is({ LLM_ARCH_LLAMA, LLM_ARCH_REFACT, LLM_ARCH_MINICPM, LLM_ARCH_GRANITE, LLM_ARCH_MISTRAL3,
             LLM_ARCH_NEMOTRON_H, LLM_ARCH_HUNYUAN_DENSE, LLM_ARCH_HUNYUAN_VL, LLM_ARCH_ERNIE4_5, LLM_ARCH_QWEN35,
             LLM_ARCH_LFM2, LLM_ARCH_GEMMA4, LLM_ARCH_PADDLEOCR, LLM_ARCH_FALCON, LLM_ARCH_JAIS, LLM_ARCH_GEMMA3 })) {
        return;
    }
    u32(LLM_KV_EXPERT_FEED_FORWARD_LENGTH, 64);
    u32(LLM_KV_EXPERT_SHARED_FEED_FORWARD_LENGTH, 64);
    u32(LLM_KV_EXPERT_CHUNK_FEED_FORWARD_LENGTH, 64);
    u32(LLM_KV_INTERLEAVE_MOE_LAYER_STEP, 2);
    u32(LLM_KV_EXPERT_COUNT, 8);
    u32(LLM_KV_EXPERT_USED_COUNT, 2);
    u32(LLM_KV_EXPERT_SHARED_COUNT, 1);
    u32(LLM_KV_EXPERT_GATING_FUNC, 2);
    f32(LLM_KV_EXPERT_WEIGHTS_SCALE, 1.5f);
    yes(LLM_KV_EXPERT_WEIGHTS_NORM, true);
    f32(LLM_KV_EXPERT_GROUP_SCALE, 1.0f);
    u32(LLM_KV_EXPERTS_PER_GROUP, 1);
    u32(LLM_KV_MOE_EVERY_N_LAYERS, 2);
}

void tiny_keys::recurrent() {
    // some blocks recur, some attend
    if (is({ LLM_ARCH_PLAMO2, LLM_ARCH_JAMBA, LLM_ARCH_NEMOTRON_H, LLM_ARCH_NEMOTRON_H_MOE, LLM_ARCH_GRANITE_HYBRID,
             LLM_ARCH_LFM2, LLM_ARCH_LFM2MOE, LLM_ARCH_KIMI_LINEAR, LLM_ARCH_KIMI_K3, LLM_ARCH_BAILINGMOE3,
             LLM_ARCH_GLM5_NEXT })) {
        arr(LLM_KV_ATTENTION_HEAD_COUNT_KV,
            per_block([](uint32_t block, uint32_t n) { return block % 3 == 1 ? n : 0; }, n_head_kv));
    }
    if (is({ LLM_ARCH_PLAMO2, LLM_ARCH_JAMBA }))
        arr(LLM_KV_ATTENTION_HEAD_COUNT, std::vector<uint32_t>(n_layer, n_head));
    if (is({ LLM_ARCH_NEMOTRON_H, LLM_ARCH_NEMOTRON_H_MOE })) {
        arr(LLM_KV_FEED_FORWARD_LENGTH,
            per_block([](uint32_t block, uint32_t n) { return block % 3 == 2 ? n : 0; }, n_ff));
        u32(LLM_KV_MOE_LATENT_SIZE, 0);
    }
    const bool delta_net = is({ LLM_ARCH_QWEN3NEXT, LLM_ARCH_QWEN35, LLM_ARCH_QWEN35MOE, LLM_ARCH_QWEN4EXP });
    const bool mamba2 = is(
        { LLM_ARCH_MAMBA2, LLM_ARCH_NEMOTRON_H, LLM_ARCH_NEMOTRON_H_MOE, LLM_ARCH_GRANITE_HYBRID, LLM_ARCH_FALCON_H1 });
    u32(LLM_KV_FULL_ATTENTION_INTERVAL, 4);
    u32(LLM_KV_SSM_INNER_SIZE, delta_net ? 4 * 32 : 2 * n_embd);
    u32(LLM_KV_SSM_CONV_KERNEL, 4);
    u32(LLM_KV_SSM_STATE_SIZE, delta_net ? 32 : arch == LLM_ARCH_PLAMO2 ? 64 : 16);
    u32(LLM_KV_SSM_TIME_STEP_RANK, delta_net ? 4 : mamba2 || arch == LLM_ARCH_PLAMO2 ? 8 : 16);
    u32(LLM_KV_SSM_GROUP_COUNT, arch == LLM_ARCH_PLAMO2 ? 0 : 2);
    u32(LLM_KV_TIME_MIX_EXTRA_DIM, 32);
    u32(LLM_KV_TIME_DECAY_EXTRA_DIM, 64);
    u32(LLM_KV_KDA_HEAD_DIM, 64);
    yes(LLM_KV_KDA_SAFE_GATE, true);
    f32(LLM_KV_KDA_GATE_LOWER_BOUND, -5.0f);
    u32(LLM_KV_WKV_HEAD_SIZE, 64);
    u32(LLM_KV_SHORTCONV_L_CACHE, 3);
}

void tiny_keys::others() {
    if (arch == LLM_ARCH_APERTUS) {
        for (const auto k : { LLM_KV_XIELU_ALPHA_N, LLM_KV_XIELU_ALPHA_P, LLM_KV_XIELU_BETA, LLM_KV_XIELU_EPS }) {
            std::vector<float> v;
            for (uint32_t block = 0; block < n_layer; block++)
                v.push_back(k == LLM_KV_XIELU_EPS ? 1e-7f : 0.5f + 0.1f * (float) block);
            arr(k, v);
        }
    }
    f32(LLM_KV_ACTIVATION_SITU_BETA, 1.0f);
    f32(LLM_KV_ACTIVATION_SITU_LINEAR_BETA, 1.0f);
    u32(LLM_KV_ATTN_RES_BLOCK_SIZE, 2);
    if (is({ LLM_ARCH_MAPLE, LLM_ARCH_DEEPSEEK4, LLM_ARCH_HY_V4, LLM_ARCH_STEP35 }))
        arr(LLM_KV_SWIGLU_CLAMP_EXP, std::vector<float>(n_layer, 7.0f));
    if (is({ LLM_ARCH_DEEPSEEK4, LLM_ARCH_STEP35 })) arr(LLM_KV_SWIGLU_CLAMP_SHEXP, std::vector<float>(n_layer, 7.0f));
    u32(LLM_KV_HRM_LAYERS_PER_STACK, 1);
    u32(LLM_KV_HRM_H_CYCLES, 1);
    u32(LLM_KV_HRM_L_CYCLES, 1);
    u32(LLM_KV_HYPER_CONNECTION_COUNT, 2);
    u32(LLM_KV_HYPER_CONNECTION_SINKHORN_ITERATIONS, 3);
    f32(LLM_KV_HYPER_CONNECTION_EPSILON, 1e-5f);
    f32(LLM_KV_HYPER_CONNECTION_MAGNITUDE, 2.0f);
    u32(LLM_KV_HYPER_CONNECTION_LOW_RANK, 16);
    u32(LLM_KV_HASH_LAYER_COUNT, 0);
}

void tiny_keys::set(const std::string & short_key, const std::string & value) {
    const std::string name = short_key[0] == '.' ? llm_arch_name(arch) + short_key : short_key;
    const char first = value.empty() ? ' ' : value[0];
    if (value == "none") {
        gguf_remove_key(file.get(), name.c_str());
    } else if (value == "true" || value == "false") {
        gguf_set_val_bool(file.get(), name.c_str(), value == "true");
    } else if (first == '[') {
        std::vector<uint32_t> list;
        for (const char * p = value.c_str() + 1; *p && *p != ']';) {
            char * end = nullptr;
            list.push_back((uint32_t) std::strtoul(p, &end, 10));
            if (end == p) fail(DIM_INVALID_ARGUMENT, "%s=%s: not a list of numbers", name.c_str(), value.c_str());
            p = *end == ',' ? end + 1 : end;
        }
        gguf_set_arr_data(file.get(), name.c_str(), GGUF_TYPE_UINT32, list.data(), list.size());
    } else if (first == '-' || (first >= '0' && first <= '9')) {
        if (value.find('.') != std::string::npos)
            gguf_set_val_f32(file.get(), name.c_str(), (float) std::atof(value.c_str()));
        else
            gguf_set_val_u32(file.get(), name.c_str(), (uint32_t) std::atoi(value.c_str()));
    } else {
        gguf_set_val_str(file.get(), name.c_str(), value.c_str());
    }
}

}   // namespace dim

// What an architecture wants beyond the usual keys.
static const struct {
    const char * arch;
    std::vector<const char *> options;
} special_options[] = {
    { "olmoe", { ".attention.head_count_kv=4" } },
    { "dots1", { ".attention.head_count_kv=4" } },
    { "deepseek2-ocr", { ".attention.head_count_kv=4" } },
    { "plm", { ".attention.key_length=96", ".rope.dimension_count=32", ".attention.head_count_kv=4" } },
    { "rwkv6", { ".attention.head_count_kv=4", "without time_mix_lerp_fused" } },
    { "rwkv6qwen2", { ".token_shift_count=1", ".attention.head_count_kv=4", "without time_mix_first" } },
    { "arwkv7", { ".token_shift_count=1", ".attention.head_count_kv=4" } },
    { "deepseek4",
      { ".attention.compress_ratios=[0,0,4,128,4,128,4,128]", ".attention.head_count_kv=1", ".attention.key_length=128",
        ".attention.value_length=128", ".rope.dimension_count=32", ".hash_layer_count=2", ".expert_gating_func=4",
        ".hyper_connection.count=4" } },
    { "hy_v4", { ".attention.indexer.types=[1,0,0,1,0,1,0,0]", ".hyper_connection.count=4" } },
    { "glm5-next",
      { ".attention.indexer.kpool=4", ".hyper_connection.count=4", ".rope.dimension_count=0",
        ".attention.key_length=64", ".attention.key_length_mla=64" } },
    { "hrm_text", { ".hrm.layers_per_stack=2", ".hrm.h_cycles=2", ".hrm.l_cycles=1" } },
    { "graniteswitch",
      { ".adapters.count=2", ".adapters.lora_rank=8", ".adapters.token_ids_activate=[3,4]",
        ".adapters.token_ids_substitute=[5,6]" } },
};

const char * dim_test_option(const char * arch, size_t index) {
    for (const auto & special : special_options) {
        if (!std::strcmp(special.arch, arch)) return index < special.options.size() ? special.options[index] : "";
    }
    return "";
}
