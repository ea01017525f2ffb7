// What depends on what in one of llama.cpp's graphs, told in blocks. Nothing here knows an architecture: the only names
// read are those of the weights, "blk.N.", which the file format gives.
#pragma once

#include "upstream.h"

#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace dim {

// N of "blk.N.attn_q.weight"; -1 for a tensor of no block.
int block_of(const char * name);

// The tensor whose bytes a view shows.
const ggml_tensor * base_of(const ggml_tensor * tensor);

// The node writes to a state: into the destination of a copy or of rows set, or in place. ggml has both as a view that
// is computed.
bool writes(const ggml_tensor * node);

// The node computes nothing.
bool is_view(const ggml_tensor * node);

// The tensors of a model that come from its file. One per stage or plan, for all graphs of its life.
class weight_map {
public:
    explicit weight_map(const llama_model & model);

    bool has(const ggml_tensor * tensor) const { return block_by_tensor.count(tensor) > 0; }

    // The block a weight belongs to; -1: none.
    int block(const ggml_tensor * weight) const { return block_by_tensor.at(weight); }
    int block_or(const ggml_tensor * tensor, int other) const {
        const auto found = block_by_tensor.find(tensor);
        return found == block_by_tensor.end() ? other : found->second;
    }

    // A weight of no block that blocks before the last one read is not the output's. Learned from the first graph.
    std::unordered_set<const ggml_tensor *> read_midway;
    bool learned = false;

private:
    std::unordered_map<const ggml_tensor *, int> block_by_tensor;
};

// A tensor that goes from the blocks before a cut to those behind it, and what of it is read there: whole, or slices
// [first, last) of its third dimension, where every reader takes views of such. (Inputs of each block, made for all at the
// start and stacked: blocks behind a cut do not want those of the blocks before it.)
struct crossing_tensor {
    ggml_tensor * tensor;
    int64_t first, last;

    explicit crossing_tensor(ggml_tensor * tensor) : tensor(tensor), first(0), last(tensor->ne[2]) {}
};

// The dependencies among the nodes of `graph`, by a node's place in it. Valid as long as the graph is not changed.
class dependencies {
public:
    dependencies(const ggml_cgraph & graph, weight_map & weights, int n_blocks);

    int n_nodes() const { return graph.n_nodes; }
    ggml_tensor * node(int i) const { return graph.nodes[i]; }

    // What a node reads. One for each src that is not NULL, in their order.
    struct source {
        ggml_tensor * tensor;
        int place;   // of a node; -1: a leaf
        int block;   // of a weight; -1: a weight of no block; no_weight
    };
    static constexpr int no_weight = -2;
    const source * begin(int i) const { return sources.data() + first_source[(size_t) i]; }
    const source * end(int i) const { return sources.data() + first_source[(size_t) i + 1]; }

    // The node that node i is a view of; -1: none, or a leaf.
    int viewed(int i) const { return viewed_place[(size_t) i]; }

    // Node i writes to a state.
    bool is_write(int i) const { return writes_state[(size_t) i] != 0; }

    // The highest block whose weights node i depends on; -1: none; n_blocks: the output after the last block, too.
    int latest(int i) const { return latest_block[(size_t) i]; }

    // A node's place; -1: a leaf.
    int place(const ggml_tensor * tensor) const;

    // Node i depends on a weight.
    bool weighted(int i) const { return is_weighted[(size_t) i] != 0; }

    // The highest block that a write to a state comes from; -1: none.
    int owner(const ggml_tensor * state) const;

    // What goes from the blocks before `block` to it and those after it, in the graph's order. `block` may be n_blocks:
    // what the output reads of the last block.
    std::vector<crossing_tensor> boundary(int block) const;

    const weight_map & weights;

private:
    void link();
    void trace(bool with_output);
    void learn(weight_map & weights);
    int parent(int node) const;
    std::vector<int> chain(int node) const;
    void merge(std::vector<int> & found) const;
    void narrow(crossing_tensor & crossing, int at, const std::vector<int> & read) const;

    const ggml_cgraph & graph;
    const int n_blocks;
    // By a tensor's place in the graph's own hash set, which has all of them: every node, else -1. A graph has tens of
    // thousands of edges, and this is built for every chunk: each edge is looked up once.
    std::vector<int> place_by_slot;
    std::vector<source> sources;
    std::vector<size_t> first_source;   // n_nodes + 1
    std::vector<int> viewed_place, latest_block;
    std::vector<char> is_weighted, writes_state;
    std::unordered_map<const ggml_tensor *, int> owner_of;
};

}   // namespace dim
