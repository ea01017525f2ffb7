// How a range is cut:
//
//   1. The block of a node is the highest N of the "blk.N." weights that it depends on (graph.h). By dependency and
//      not by position: recurrent blocks write their states before the block before them has ended.
//   2. Between block b - 1 and block b there is what nodes of b and later ones read of nodes before b. For most
//      models that is one tensor, the hidden rows; for some a few more.
//   3. Kept is what the outputs need, and what writes to the states of the range's own blocks needs.
//   4. Checked is what is kept: it must read no weight of another block and no state that it does not write.
#include "cut.h"

#include "boundary.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <typeinfo>

namespace dim {

dim_refusal refusal_of(const llama_model & model, const block_range & range, dim_reason reason, const char * name) {
    dim_refusal why{};
    why.reason = reason;
    why.first = range.first, why.last = range.last;
    why.block = -1;
    std::snprintf(why.name, sizeof why.name, "%s", name);
    std::snprintf(why.arch, sizeof why.arch, "%s", model.arch_name().c_str());
    return why;
}

void name_state(dim_refusal & why, const ggml_tensor * state) {
    static const struct {
        const char * prefix;
        dim_state_kind kind;
    } kinds[] = {
        { "cache_k_l", DIM_STATE_KEYS },
        { "cache_v_l", DIM_STATE_VALUES },
        { "cache_r_l", DIM_STATE_RECURRENT },
        { "cache_s_l", DIM_STATE_RECURRENT },
    };
    for (const auto & [prefix, kind] : kinds) {
        int block = -1;
        if (std::strncmp(state->name, prefix, std::strlen(prefix)) ||
            std::sscanf(state->name + std::strlen(prefix), "%d", &block) != 1)
            continue;
        why.state = kind, why.block = block;
    }
}

namespace {

// Marks what the marked nodes need. Backwards once, because nodes stand in the order they are computed in.
void close_over(const dependencies & nodes, const std::vector<char> & is_input, std::vector<char> & kept) {
    const auto mark = [&](int at) {
        if (at >= 0 && !is_input[(size_t) at]) kept[(size_t) at] = 1;
    };
    for (int i = nodes.n_nodes() - 1; i >= 0; i--) {
        if (!kept[(size_t) i]) continue;
        for (const auto * s = nodes.begin(i); s != nodes.end(i); s++) mark(s->place);
        mark(nodes.viewed(i));
    }
}

bool is_computed(const ggml_tensor * node) { return node->flags & GGML_TENSOR_FLAG_COMPUTE; }

// llama.cpp's own inputs that do not look at token ids. Of any other kind it is not known.
bool ignores_tokens(const llm_graph_input_i & input) {
    const std::type_info * known[] = {
        &typeid(llm_graph_input_embd),
        &typeid(llm_graph_input_pos),
        &typeid(llm_graph_input_attn_temp),
        &typeid(llm_graph_input_pos_bucket),
        &typeid(llm_graph_input_pos_bucket_kv),
        &typeid(llm_graph_input_out_ids),
        &typeid(llm_graph_input_rs),
        &typeid(llm_graph_input_attn_kv),
        &typeid(llm_graph_input_attn_k),
        &typeid(llm_graph_input_attn_k_dsa),
        &typeid(llm_graph_input_attn_k_dsa_iswa),
        &typeid(llm_graph_input_attn_kv_msa),
        &typeid(llm_graph_input_attn_kv_iswa),
        &typeid(llm_graph_input_attn_k_iswa),
        &typeid(llm_graph_input_dsv4),
        &typeid(llm_graph_input_mem_hybrid),
        &typeid(llm_graph_input_mem_hybrid_k),
        &typeid(llm_graph_input_mem_hybrid_iswa),
    };
    const auto & kind = typeid(input);
    return std::any_of(std::begin(known), std::end(known), [&](const std::type_info * k) { return *k == kind; });
}

void check_crossing(const llama_model & model, const block_range & range,
                    const std::vector<crossing_tensor> & crossing) {
    for (const auto & [tensor, first, last] : crossing) {
        if (tensor->view_src || !ggml_is_contiguous(tensor))
            refuse(refusal_of(model, range, DIM_CROSSES_VIEW, tensor->name));
        if (tensor->type != GGML_TYPE_F32 && tensor->type != GGML_TYPE_I32)
            refuse(refusal_of(model, range, DIM_CROSSES_TYPE, tensor->name));
    }
}

// By place: what comes from the blocks before.
std::vector<char> marked(const dependencies & nodes, const std::vector<crossing_tensor> & crossing) {
    std::vector<char> places((size_t) nodes.n_nodes(), 0);
    for (const auto & each : crossing) places[(size_t) nodes.place(each.tensor)] = 1;
    return places;
}

// Fills in what the kept nodes read and write.
void collect(const llm_graph_result & whole, const dependencies & nodes, range_cut & cut) {
    std::unordered_set<const ggml_tensor *> weights, read, written;
    const auto look = [&](const ggml_tensor * tensor, bool is_written) {
        const auto * base = base_of(tensor);
        if (base->op != GGML_OP_NONE) return;   // computed
        if (nodes.weights.has(base)) {
            if (weights.insert(base).second) cut.weights.push_back(base);
        } else if (base == whole.t_inp_tokens) {
            cut.reads_tokens = true;
        } else if (base->buffer && !(base->flags & GGML_TENSOR_FLAG_INPUT)) {
            auto & seen = is_written ? written : read;
            if (seen.insert(base).second) (is_written ? cut.states_written : cut.states_read).push_back(base);
        }
    };
    for (const int i : cut.nodes) {
        const auto * node = nodes.node(i);
        if (nodes.is_write(i)) look(node->view_src, true);
        for (int s = 0; s < GGML_MAX_SRC; s++) {
            if (!node->src[s]) continue;
            // the destination of a copy is not read
            if (node->op == GGML_OP_CPY && s == 1) continue;
            if (node->op == GGML_OP_SET_ROWS && s == 2) continue;
            look(node->src[s], false);
        }
    }
    for (const auto & input : whole.inputs) cut.reads_tokens |= !ignores_tokens(*input);
}

// A state of no block, made of inputs alone, is kept by every range that reads it.
void keep_common_states(const dependencies & nodes, const std::vector<char> & is_input, std::vector<char> & kept,
                        range_cut & cut) {
    std::vector<int> writes;
    for (int i = 0; i < nodes.n_nodes(); i++) {
        if (nodes.is_write(i) && is_computed(nodes.node(i)) && !nodes.weighted(i) &&
            nodes.owner(base_of(nodes.node(i))) < 0)
            writes.push_back(i);
    }
    if (writes.empty()) return;
    std::unordered_set<const ggml_tensor *> read;
    for (int i = 0; i < nodes.n_nodes(); i++) {
        if (!kept[(size_t) i]) continue;
        for (const auto * s = nodes.begin(i); s != nodes.end(i); s++) read.insert(base_of(s->tensor));
    }
    for (const int i : writes) {
        const auto * state = base_of(nodes.node(i));
        if (!read.count(state)) continue;
        kept[(size_t) i] = 1;
        cut.common.insert(state);
    }
    close_over(nodes, is_input, kept);
}

void check(const llama_model & model, const block_range & range, const dependencies & nodes, const range_cut & cut,
           const std::unordered_set<const ggml_tensor *> & absent) {
    for (const auto * weight : cut.weights) {
        const int block = nodes.weights.block(weight);
        if (block >= 0 && !range.own(block)) {
            auto why = refusal_of(model, range, DIM_READS_WEIGHT, weight->name);
            why.block = block;
            refuse(why);
        }
        if (absent.count(weight)) refuse(refusal_of(model, range, DIM_LACKS_WEIGHT, weight->name));
    }
    for (const auto * state : cut.states_read) {
        if (std::find(cut.states_written.begin(), cut.states_written.end(), state) != cut.states_written.end())
            continue;
        auto why = refusal_of(model, range, DIM_READS_STATE, state->name);
        name_state(why, state);
        refuse(why);
    }
}

}   // namespace

range_cut cut_range(const llama_model & model, const llm_graph_result & whole, const dependencies & nodes,
                    const block_range & range, const std::unordered_set<const ggml_tensor *> & absent) {
    range_cut cut;
    if (!range.takes_tokens) cut.inputs = nodes.boundary((int) range.first);
    if (!range.has_lm_head)
        cut.outputs = nodes.boundary((int) range.last);
    else if (whole.t_logits)
        cut.outputs = { crossing_tensor(whole.t_logits) };
    if (cut.outputs.empty()) refuse(refusal_of(model, range, range.has_lm_head ? DIM_NO_LOGITS : DIM_NOTHING_GOES));
    if (cut.inputs.empty() && !range.takes_tokens) refuse(refusal_of(model, range, DIM_NOTHING_COMES));
    check_crossing(model, range, cut.inputs);
    check_crossing(model, range, cut.outputs);

    const auto is_input = marked(nodes, cut.inputs);
    std::vector<char> kept((size_t) nodes.n_nodes(), 0);
    for (const auto & output : cut.outputs) {
        const auto at = (size_t) nodes.place(output.tensor);
        kept[at] = !is_input[at];
    }
    for (int i = 0; i < nodes.n_nodes(); i++) {
        if (!nodes.is_write(i) || !is_computed(nodes.node(i))) continue;
        if (range.own(nodes.latest(i) >= 0 ? nodes.latest(i) : nodes.owner(base_of(nodes.node(i)))))
            kept[(size_t) i] = 1;
    }
    close_over(nodes, is_input, kept);
    keep_common_states(nodes, is_input, kept, cut);

    for (int i = 0; i < nodes.n_nodes(); i++)
        if (kept[(size_t) i]) cut.nodes.push_back(i);
    collect(whole, nodes, cut);
    check(model, range, nodes, cut, absent);
    return cut;
}

}   // namespace dim
