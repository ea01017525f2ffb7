// What a stage and a stock context have in common: the llama_context, and which positions its sessions hold.
#pragma once

#include "boundary.h"
#include "upstream.h"

#include "llama-cpp.h"

#include <mutex>
#include <vector>

namespace dim {

// A llama_context made from checked parameters. n_outputs_max: 0 for llama.cpp's default, which is n_batch.
llama_context_ptr make_context(llama_model * model, const dim_context_params & params, uint32_t n_outputs_max);

// A context for the blocks [first, last): nothing in it is allocated but the logits, and the cache that llama.cpp gave it
// is empty. `memory` is the one to use: it holds keys and values of these blocks only.
struct stage_context {
    llama_context_ptr context;
    llama_memory_ptr  memory;
};
stage_context make_stage_context(llama_model * model, const dim_context_params & params, uint32_t first, uint32_t last);

// While one lives, llama.cpp allocates no cache and no room for graphs for contexts of `model`, and does not compare what
// they have with what it meant to allocate when they go. The switch is the model's: whoever lets llama.cpp look at it
// holds allocation_lock().
class no_allocation {
public:
    explicit no_allocation(llama_model & model);
    ~no_allocation();
    no_allocation(const no_allocation &) = delete;
    no_allocation & operator=(const no_allocation &) = delete;

private:
    std::lock_guard<std::mutex> lock;
    llama_model &               model;
};
std::mutex & allocation_lock();

// What is allocated, and what `auto` came to. `memory`: the cache in use.
dim_context_info describe(const llama_context & ctx, const llama_memory_i & memory);

// The sessions of a context. Every session holds the positions 0 .. length(session).
class sessions {
public:
    sessions(uint32_t n_sessions, uint32_t n_ctx) : n_ctx(n_ctx), lengths(n_sessions, 0) {}

    uint32_t count() const { return (uint32_t) lengths.size(); }

    // Checks that `rows` go on where their sessions end; throws the fault of the first that does not.
    void check(const dim_row * rows, size_t n_rows) const;

    // Checks the session and gives its length.
    uint32_t length(uint32_t session) const;

    // After the rows were computed.
    void extend(const dim_row * rows, size_t n_rows);

    // Takes the rows out of the cache again, whether or not they had got into it. Does not throw.
    void roll_back(llama_memory_i & memory, const dim_row * rows, size_t n_rows) const noexcept;

    // Forgets a session's positions from `position` on.
    void rewind(llama_memory_i & memory, uint32_t session, uint32_t position);

private:
    uint32_t              n_ctx;
    std::vector<uint32_t> lengths;
};

// Checks the rows' number against the context's n_batch.
void check_n_rows(const llama_context & ctx, size_t n_rows);

// Checks that every token is in the vocabulary.
void check_tokens(const llama_model & model, const int32_t * tokens, size_t n_tokens);

} // namespace dim
