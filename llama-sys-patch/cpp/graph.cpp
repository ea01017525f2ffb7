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
    : weights(weights), graph(graph), n_blocks(n_blocks), latest_block((size_t) graph.n_nodes, -1),
      is_weighted((size_t) graph.n_nodes, 0) {
    place_of.reserve((size_t) graph.n_nodes);
    for (int i = 0; i < graph.n_nodes; i++) place_of[graph.nodes[i]] = i;
    if (!weights.learned) {
        trace(false);
        for (int i = 0; i < graph.n_nodes; i++) {
            if (latest(i) < 0 || latest(i) >= n_blocks - 1) continue;
            for (const auto * src : graph.nodes[i]->src) {
                if (src && weights.has(src) && weights.block(src) < 0) weights.read_midway.insert(src);
            }
        }
        weights.learned = true;
    }
    trace(true);
}

// One pass, because nodes stand in the order they are computed in.
void dependencies::trace(bool with_output) {
    for (int i = 0; i < graph.n_nodes; i++) {
        const auto * node = graph.nodes[i];
        int highest = -1;
        bool depends = false, reads_common = false;
        for (const auto * src : node->src) {
            if (!src) continue;
            if (weights.has(src)) {
                highest = std::max(highest, weights.block(src));
                depends = true;
                // "rope_": factors of the rotation, which belong to the blocks however few of them read them
                reads_common |= weights.block(src) < 0 && !weights.read_midway.count(src) &&
                                std::strncmp(src->name, "rope_", 5) != 0;
            } else if (const auto at = place_of.find(src); at != place_of.end()) {
                highest = std::max(highest, latest_block[(size_t) at->second]);
                depends |= is_weighted[(size_t) at->second] != 0;
            }
        }
        // what stands behind the last block and reads a weight of no block is the output
        if (with_output && reads_common && highest >= n_blocks - 1) highest = n_blocks;
        latest_block[(size_t) i] = highest;
        is_weighted[(size_t) i] = depends;
        if (writes(node)) {
            auto & of = owner_of.emplace(base_of(node), -1).first->second;
            of = std::max(of, highest);
        }
    }
}

int dependencies::place(const ggml_tensor * tensor) const {
    const auto found = place_of.find(tensor);
    return found == place_of.end() ? -1 : found->second;
}

bool dependencies::weighted(const ggml_tensor * tensor) const {
    const int at = place(tensor);
    return at >= 0 && is_weighted[(size_t) at];
}

int dependencies::owner(const ggml_tensor * state) const {
    const auto found = owner_of.find(state);
    return found == owner_of.end() ? -1 : found->second;
}

// The only tensor that `node` follows from without a weight: a norm of it, rows of it, a view. NULL if there is none.
ggml_tensor * dependencies::parent(const ggml_tensor * node) const {
    ggml_tensor * only = nullptr;
    for (auto * src : node->src) {
        if (!src || src == node) continue;
        if (weights.has(src)) return nullptr;
        if (!weighted(src) || src == only) continue;
        if (only) return nullptr;
        only = src;
    }
    return only;
}

std::vector<ggml_tensor *> dependencies::chain(ggml_tensor * node) const {
    std::vector<ggml_tensor *> steps;
    for (; node; node = parent(node)) steps.push_back(node);
    return steps;
}

// Two that follow from one tensor without weights become that one: it is computed from again on the other side.
void dependencies::merge(std::vector<ggml_tensor *> & found) const {
    for (bool again = true; again;) {
        again = false;
        for (size_t a = 0; a < found.size() && !again; a++) {
            const auto of_a = chain(found[a]);
            for (size_t b = a + 1; b < found.size() && !again; b++) {
                const auto of_b = chain(found[b]);
                const auto common = std::find_if(of_a.begin(), of_a.end(), [&](const ggml_tensor * step) {
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

// `read`: what of the tensors before the cut is read behind it.
void dependencies::narrow(crossing_tensor & crossing, const std::vector<ggml_tensor *> & read) const {
    const auto * whole = crossing.tensor;
    if (whole->ne[2] < 2 || whole->ne[3] > 1 || !ggml_is_contiguous(whole)) return;
    size_t begin = ggml_nbytes(whole), end = 0;
    for (auto * tensor : read) {
        const auto steps = chain(tensor);
        const auto at = std::find(steps.begin(), steps.end(), whole);
        if (at == steps.end()) continue;   // follows from another one
        if (at == steps.begin()) return;
        const auto * reader = *(at - 1);
        if (reader->op != GGML_OP_VIEW || reader->view_src != whole) return;
        begin = std::min(begin, reader->view_offs);
        end = std::max(end, reader->view_offs + ggml_nbytes(reader));
    }
    if (begin >= end) return;
    crossing.first = (int64_t) (begin / whole->nb[2]);
    crossing.last = (int64_t) ((end + whole->nb[2] - 1) / whole->nb[2]);
}

std::vector<crossing_tensor> dependencies::boundary(int block) const {
    std::vector<ggml_tensor *> found;
    std::unordered_set<const ggml_tensor *> seen;
    for (int i = 0; i < graph.n_nodes; i++) {
        if (latest(i) < block) continue;
        for (auto * src : graph.nodes[i]->src) {
            const int at = src ? place(src) : -1;
            if (at < 0 || !is_weighted[(size_t) at] || latest(at) >= block || !seen.insert(src).second) continue;
            found.push_back(src);
        }
    }
    const auto read = found;
    merge(found);
    for (auto *& tensor : found) {
        // the output reads a norm of the last block's rows: what crosses is the rows
        if (block == n_blocks)
            while (auto * before = parent(tensor)) tensor = before;
        while (is_view(tensor) && parent(tensor)) tensor = parent(tensor);
    }
    std::sort(found.begin(), found.end(),
              [&](const ggml_tensor * a, const ggml_tensor * b) { return place(a) < place(b); });
    found.erase(std::unique(found.begin(), found.end()), found.end());
    std::vector<crossing_tensor> crossing(found.begin(), found.end());
    for (auto & tensor : crossing) narrow(tensor, read);
    return crossing;
}

}   // namespace dim
