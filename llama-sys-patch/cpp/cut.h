// A range of blocks, cut out of llama.cpp's graph of the whole model by what depends on what.
#pragma once

#include "graph.h"
#include "layer_eval.h"

#include <unordered_set>
#include <vector>

namespace dim {

// Blocks [first, last). takes_tokens: it starts the model; has_lm_head: it ends it.
struct block_range {
    uint32_t first, last;
    bool takes_tokens, has_lm_head;

    bool own(int block) const { return block >= (int) first && block < (int) last; }
};

struct range_cut {
    std::vector<crossing_tensor> inputs;        // what comes from the blocks before; empty if tokens do
    std::vector<crossing_tensor> outputs;       // what goes to the blocks after; or the logits, alone
    std::vector<int> nodes;                     // of the whole graph: what is computed, in order; without the inputs
    std::vector<const ggml_tensor *> weights;   // that these nodes read
    std::vector<const ggml_tensor *> states_read;   // caches and recurrent states
    std::vector<const ggml_tensor *> states_written;
    // states that no block owns: every range that reads them keeps them
    std::unordered_set<const ggml_tensor *> common;
    bool reads_tokens = false;   // ids of tokens, beside the rows or instead of them
};

// Finds the range in the graph, which stays as it is. Refuses (DIM_NOT_APART) one that reads a weight that another
// block's is, or that is `absent`, or a state that others write.
range_cut cut_range(const llama_model & model, const llm_graph_result & whole, const dependencies & nodes,
                    const block_range & range, const std::unordered_set<const ggml_tensor *> & absent);

// Of a range, with no block and no state.
dim_refusal refusal_of(const llama_model & model, const block_range & range, dim_reason reason, const char * name = "");

// Puts in what `state` is: the keys of block 21, for cache_k_l21.
void name_state(dim_refusal & why, const ggml_tensor * state);

}   // namespace dim
