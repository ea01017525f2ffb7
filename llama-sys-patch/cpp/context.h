// What a stage and a stock context have in common: the llama_context.
#pragma once

#include "boundary.h"
#include "state.h"
#include "upstream.h"

#include "llama-cpp.h"

#include <memory>
#include <mutex>

namespace dim {

// A llama_context made from checked parameters. n_outputs_max: 0 for llama.cpp's default, which is n_batch.
llama_context_ptr make_context(llama_model * model, const dim_context_params & params, uint32_t n_outputs_max);

// A context for a range: nothing in it is allocated but the logits. `memory` is the one to use.
struct stage_context {
    llama_context_ptr context;
    std::unique_ptr<stage_memory> memory;   // freed first
};
stage_context make_stage_context(llama_model & model, const dim_context_params & params, const block_range & range);

// While one lives, llama.cpp allocates no cache and no room for graphs for contexts of `model`, and does not compare
// what they have with what it meant to allocate when they go. The switch is the model's: whoever lets llama.cpp look at
// it holds allocation_lock().
class no_allocation {
public:
    explicit no_allocation(llama_model & model);
    ~no_allocation();
    no_allocation(const no_allocation &) = delete;
    no_allocation & operator=(const no_allocation &) = delete;

private:
    std::lock_guard<std::mutex> lock;
    llama_model & model;
    const bool before;   // true: the model of a plan, which never allocates anything
};
std::mutex & allocation_lock();

// What is allocated, and what `auto` came to. kv_bytes: of the context's own memory.
dim_context_info describe(const llama_context & ctx);

// Checks the rows' number against the context's n_batch.
void check_n_rows(const llama_context & ctx, size_t n_rows);

// Checks that every token is in the vocabulary.
void check_tokens(const llama_model & model, const int32_t * tokens, size_t n_tokens);

}   // namespace dim
