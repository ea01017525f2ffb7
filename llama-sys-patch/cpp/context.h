// What a stage and a stock context have in common: the llama_context, and which positions its sessions hold.
#pragma once

#include "boundary.h"
#include "upstream.h"

#include "llama-cpp.h"

#include <vector>

namespace dim {

// A llama_context made from checked parameters. n_outputs_max: 0 for llama.cpp's default, which is n_batch.
llama_context_ptr make_context(llama_model * model, const dim_context_params & params, uint32_t n_outputs_max);

// What is allocated, and what `auto` came to.
dim_context_info describe(const llama_context & ctx);

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

    // Takes the rows out of the context's memory again, whether or not they had got into it. Does not throw.
    void roll_back(llama_context & ctx, const dim_row * rows, size_t n_rows) const noexcept;

    // Forgets a session's positions from `position` on.
    void rewind(llama_context & ctx, uint32_t session, uint32_t position);

private:
    uint32_t              n_ctx;
    std::vector<uint32_t> lengths;
};

// Checks the rows' number against the context's n_batch.
void check_n_rows(const llama_context & ctx, size_t n_rows);

// Checks that every token is in the vocabulary.
void check_tokens(const llama_model & model, const int32_t * tokens, size_t n_tokens);

} // namespace dim
