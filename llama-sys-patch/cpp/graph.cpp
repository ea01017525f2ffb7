#include "graph.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace dim {

int block_of(const char * name) {
    int block = -1;
    return std::sscanf(name, "blk.%d.", &block) == 1 ? block : -1;
}

const ggml_tensor * base_of(const ggml_tensor * tensor) {
    while (tensor->view_src) tensor = tensor->view_src;
    return tensor;
}

bool is_view(const ggml_tensor * node) {
    return node->op == GGML_OP_VIEW || node->op == GGML_OP_RESHAPE || node->op == GGML_OP_PERMUTE ||
           node->op == GGML_OP_TRANSPOSE;
}

bool writes(const ggml_tensor * node) {
    return node->view_src && node->op != GGML_OP_NONE && !is_view(node) && base_of(node)->op == GGML_OP_NONE;
}

weight_map::weight_map(const llama_model & model) {
    for (const auto & [name, tensor] : model.tensors_by_name) block_by_tensor[tensor] = block_of(name.c_str());
}

dependencies::dependencies(const ggml_cgraph & graph, weight_map & weights, int n_blocks)
    : weights(weights), graph(graph), n_blocks(n_blocks), place_by_slot(graph.visited_hash_set.size, -1),
      viewed_place((size_t) graph.n_nodes, -1), latest_block((size_t) graph.n_nodes, -1),
      is_weighted((size_t) graph.n_nodes, 0), writes_state((size_t) graph.n_nodes, 0) {
    link();
    if (!weights.learned) learn(weights);
    trace(true);
}

// Nodes stand in the order they are computed in: what a node reads stands before it.
void dependencies::link() {
    first_source.reserve((size_t) graph.n_nodes + 1);
    sources.reserve(3 * (size_t) graph.n_nodes);
    for (int i = 0; i < graph.n_nodes; i++) {
        auto * node = graph.nodes[i];
        first_source.push_back(sources.size());
        for (auto * src : node->src) {
            if (!src) continue;
            const int at = place(src);
            sources.push_back({ src, at, at >= 0 ? no_weight : weights.block_or(src, no_weight) });
        }
        if (node->view_src) viewed_place[(size_t) i] = place(node->view_src);
        writes_state[(size_t) i] = writes(node);
        const size_t slot = ggml_hash_find(&graph.visited_hash_set, node);
        if (slot < place_by_slot.size()) place_by_slot[slot] = i;
    }
    first_source.push_back(sources.size());
}

void dependencies::learn(weight_map & weights) {
    trace(false);
    for (int i = 0; i < graph.n_nodes; i++) {
        if (latest(i) < 0 || latest(i) >= n_blocks - 1) continue;
        for (const auto * s = begin(i); s != end(i); s++)
            if (s->block == -1) weights.read_midway.insert(s->tensor);
    }
    weights.learned = true;
}

// One pass, because nodes stand in the order they are computed in.
void dependencies::trace(bool with_output) {
    for (int i = 0; i < graph.n_nodes; i++) {
        int highest = -1;
        bool depends = false, reads_common = false;
        for (const auto * s = begin(i); s != end(i); s++) {
            if (s->block != no_weight) {
                highest = std::max(highest, s->block);
                depends = true;
                // "rope_": factors of the rotation, which belong to the blocks however few of them read them
                reads_common |= s->block < 0 && !weights.read_midway.count(s->tensor) &&
                                std::strncmp(s->tensor->name, "rope_", 5) != 0;
            } else if (s->place >= 0) {
                highest = std::max(highest, latest(s->place));
                depends |= weighted(s->place);
            }
        }
        // what stands behind the last block and reads a weight of no block is the output
        if (with_output && reads_common && highest >= n_blocks - 1) highest = n_blocks;
        latest_block[(size_t) i] = highest;
        is_weighted[(size_t) i] = depends;
        if (is_write(i)) {
            auto & of = owner_of.emplace(base_of(node(i)), -1).first->second;
            of = std::max(of, highest);
        }
    }
}

int dependencies::place(const ggml_tensor * tensor) const {
    const size_t slot = ggml_hash_find(&graph.visited_hash_set, tensor);
    const bool is_there = slot != GGML_HASHSET_FULL && ggml_bitset_get(graph.visited_hash_set.used, slot);
    return is_there ? place_by_slot[slot] : -1;
}

int dependencies::owner(const ggml_tensor * state) const {
    const auto found = owner_of.find(state);
    return found == owner_of.end() ? -1 : found->second;
}

// The only node that this one follows from without a weight: a norm of it, rows of it, a view. -1: there is none.
int dependencies::parent(int node) const {
    int only = -1;
    for (const auto * s = begin(node); s != end(node); s++) {
        if (s->place == node) continue;
        if (s->block != no_weight) return -1;
        if (s->place < 0 || !weighted(s->place) || s->place == only) continue;
        if (only >= 0) return -1;
        only = s->place;
    }
    return only;
}

std::vector<int> dependencies::chain(int node) const {
    std::vector<int> steps;
    for (; node >= 0; node = parent(node)) steps.push_back(node);
    return steps;
}

// Two that follow from one tensor without weights become that one: it is computed from again on the other side.
void dependencies::merge(std::vector<int> & found) const {
    for (bool again = true; again;) {
        again = false;
        for (size_t a = 0; a < found.size() && !again; a++) {
            const auto of_a = chain(found[a]);
            for (size_t b = a + 1; b < found.size() && !again; b++) {
                const auto of_b = chain(found[b]);
                const auto common = std::find_if(of_a.begin(), of_a.end(), [&](int step) {
                    return std::find(of_b.begin(), of_b.end(), step) != of_b.end();
                });
                if (common == of_a.end()) continue;
                found[a] = *common;
                found.erase(found.begin() + (std::ptrdiff_t) b);
                again = true;
            }
        }
    }
}

// `at`: the crossing tensor's place; `read`: places of what before the cut is read behind it.
void dependencies::narrow(crossing_tensor & crossing, int at, const std::vector<int> & read) const {
    const auto * whole = crossing.tensor;
    if (whole->ne[2] < 2 || whole->ne[3] > 1 || !ggml_is_contiguous(whole)) return;
    size_t begin = ggml_nbytes(whole), end = 0;
    for (const int one : read) {
        const auto steps = chain(one);
        const auto step = std::find(steps.begin(), steps.end(), at);
        if (step == steps.end()) continue;   // follows from another one
        if (step == steps.begin()) return;
        const auto * reader = node(*(step - 1));
        if (reader->op != GGML_OP_VIEW || reader->view_src != whole) return;
        begin = std::min(begin, reader->view_offs);
        end = std::max(end, reader->view_offs + ggml_nbytes(reader));
    }
    if (begin >= end) return;
    crossing.first = (int64_t) (begin / whole->nb[2]);
    crossing.last = (int64_t) ((end + whole->nb[2] - 1) / whole->nb[2]);
}

std::vector<crossing_tensor> dependencies::boundary(int block) const {
    std::vector<int> found;
    std::vector<char> seen((size_t) graph.n_nodes, 0);
    for (int i = 0; i < graph.n_nodes; i++) {
        if (latest(i) < block) continue;
        for (const auto * s = begin(i); s != end(i); s++) {
            const int at = s->place;
            if (at < 0 || !weighted(at) || latest(at) >= block || seen[(size_t) at]) continue;
            seen[(size_t) at] = 1;
            found.push_back(at);
        }
    }
    const auto read = found;
    merge(found);
    for (auto & at : found) {
        // the output reads a norm of the last block's rows: what crosses is the rows
        if (block == n_blocks)
            for (int before; (before = parent(at)) >= 0;) at = before;
        for (int before; is_view(node(at)) && (before = parent(at)) >= 0;) at = before;
    }
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    std::vector<crossing_tensor> crossing;
    for (const int at : found) {
        crossing.emplace_back(node(at));
        narrow(crossing.back(), at, read);
    }
    return crossing;
}

}   // namespace dim
