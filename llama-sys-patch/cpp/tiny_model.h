// Tiny random models of any architecture that llama.cpp has, for tests/architectures.rs. Compiled with the `test-
// support` feature only. llama.cpp itself says which tensors an architecture wants, and of which shapes: a model is
// made from keys alone, filled, and written as a GGUF.
#pragma once

#include "boundary.h"

#include "llama-arch.h"

#include "gguf.h"

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

namespace dim {

// The keys of a tiny model being made.
struct tiny_keys {
    tiny_keys(llm_arch arch, uint32_t n_blocks);

    // Sets "KEY=VALUE"; a KEY that starts with a dot gets the architecture's name before it. VALUE: 3, 3.5, true, text,
    // [1,2,3], or none (no key).
    void set(const std::string & key, const std::string & value);

    const llm_arch arch;
    const uint32_t n_layer;
    std::unique_ptr<gguf_context, decltype(&gguf_free)> file;

private:
    void sizes();
    void attention();
    void latent_attention();
    void windows();
    void experts();
    void recurrent();
    void others();

    bool is(std::initializer_list<llm_arch> list) const;
    void u32(llm_kv k, uint32_t v);
    void f32(llm_kv k, float v);
    void str(llm_kv k, const char * v);
    void yes(llm_kv k, bool v);
    void arr(llm_kv k, const std::vector<uint32_t> & v);
    void arr(llm_kv k, const std::vector<float> & v);
    std::vector<uint32_t> per_block(uint32_t (*value)(uint32_t block, uint32_t n), uint32_t n = 0) const;

    const LLM_KV key;
    uint32_t n_embd = 256, n_head = 4, n_head_kv = 2, n_ff = 256, n_vocab = 160, n_ctx = 128, head = 64;
};

}   // namespace dim
