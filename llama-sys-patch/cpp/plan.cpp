// What ranges of a model need, from its graph and without its weights. Ranges and cuts are looked at one by one; the
// model's graph is built afresh for each, because that is simple and takes milliseconds.
#include "context.h"
#include "crossing.h"
#include "cut.h"
#include "model.h"
#include "operands.h"
#include "room.h"
#include "stage.h"
#include "whole_graph.h"

#include "llama-kv-cache-dsa-iswa.h"
#include "llama-kv-cache-dsa.h"
#include "llama-kv-cache-msa.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <typeindex>

using namespace dim;

namespace {

constexpr uint32_t plan_rows = 16, plan_ctx = 512;   // the second context has twice as many positions

dim_context_params plan_params(uint32_t n_ctx) {
    dim_context_params params{};
    params.n_ctx = n_ctx;
    params.n_batch = plan_rows;
    params.n_ubatch = plan_rows;
    params.n_threads = 1;
    params.max_sessions = 1;
    params.flash_attn = DIM_FLASH_ATTN_OFF;   // changes nothing that is asked of a plan
    params.kv_type = DIM_KV_F16;
    return params;
}

// A range, cut out of graphs of two sizes.
struct look {
    range_cut cut;   // its tensors live as long as `graph`
    crossing in, out;
};

// A context of the model, its memory and its graph.
struct view {
    stage_context made;
    whole_graph graph;
    llama_memory_context_ptr cells;
    llama_batch_allocr fewer, more;
    llama_ubatch few, many;

    view(llama_model & model, uint32_t n_ctx)
        // of no blocks: no recurrent state is kept
        : made(make_stage_context(model, plan_params(n_ctx), { 0, 0, true, true })), graph(model, *made.context, 0),
          cells(made.memory->module().init_full()), fewer(model.hparams.n_pos_per_embd()),
          more(model.hparams.n_pos_per_embd()), few(chunk_for_reserve(fewer, plan_rows - 1, 1)),
          many(chunk_for_reserve(more, plan_rows, 1)) {}

    range_cut cut(const llama_model & model, const llama_ubatch & rows, const block_range & range) {
        graph.build(graph.params(rows, cells.get(), rows.n_tokens));
        const dependencies nodes(graph.nodes(), graph.weights, (int) model.hparams.n_layer());
        return cut_range(model, graph.result(), nodes, range, {});
    }

    // Whether the whole model can be computed.
    void check(const llama_model & model) {
        graph.build(graph.params(many, cells.get(), many.n_tokens));
        check_operands(dependencies(graph.nodes(), graph.weights, (int) model.hparams.n_layer()));
    }
};

}   // namespace

struct dim_plan {
    std::unique_ptr<dim_model> model;
    std::unique_ptr<view> one, twice;   // freed first
    std::vector<std::string> tensors;   // of the range last looked at
    crossing in, out;

    ~dim_plan() {
        if (!model) return;
        const no_allocation nothing(*model->llama);
        one.reset(), twice.reset();
    }

    block_range range(uint32_t first, uint32_t last) const {
        return { first, last, first == 0, last == model->llama->hparams.n_layer() };
    }

    look look_at(const block_range & range) {
        const auto & llama = *model->llama;
        look seen;
        const auto few = one->cut(llama, one->few, range);
        const auto in_shapes = shapes_of(few.inputs), out_shapes = shapes_of(few.outputs);
        seen.cut = one->cut(llama, one->many, range);
        seen.in = layout_of(llama, range, seen.cut.inputs, one->many.n_tokens, in_shapes, one->few.n_tokens);
        if (!range.has_lm_head)
            seen.out = layout_of(llama, range, seen.cut.outputs, one->many.n_tokens, out_shapes, one->few.n_tokens);
        return seen;
    }

    void list_tensors(const block_range & range, const range_cut & cut, dim_range_plan & plan);
    void count_states(const block_range & range, const range_cut & cut, dim_range_plan & plan);
    void look_at_range(uint32_t first, uint32_t last, dim_range_plan & plan);
    void check_cut(uint32_t block);
};

// Everything of its own blocks, too: what of them no graph reads today is small, and of them.
void dim_plan::list_tensors(const block_range & range, const range_cut & cut, dim_range_plan & plan) {
    std::set<std::string> names;
    for (const auto * weight : cut.weights) names.insert(weight->name);
    std::map<std::string, uint64_t> bytes;
    for (const auto & [name, tensor] : model->llama->tensors_by_name) {
        bytes[name] = ggml_nbytes(tensor);
        if (range.own(block_of(name.c_str()))) names.insert(name);
        // long or short factors, by the context's length
        if (!name.compare(0, 5, "rope_")) names.insert(name);
    }
    tensors.assign(names.begin(), names.end());
    plan.n_tensors = tensors.size();
    for (const auto & name : tensors) plan.weights_bytes += bytes[name];
}

// What grows with positions is told from what does not by a context of twice as many.
void dim_plan::count_states(const block_range & range, const range_cut & cut, dim_range_plan & plan) {
    const auto by_name = [](const range_cut & c) {
        std::map<std::string, uint64_t> bytes;
        for (const auto * list : { &c.states_read, &c.states_written })
            for (const auto * s : *list) bytes[s->name] = ggml_nbytes(s);
        return bytes;
    };
    const auto small = by_name(cut);
    const auto large = by_name(twice->cut(*model->llama, twice->many, range));
    for (const auto & [name, bytes] : small) {
        const auto found = large.find(name);
        const uint64_t grown = found != large.end() && found->second > bytes ? found->second - bytes : 0;
        plan.cache_bytes_per_position += grown / plan_ctx;
        plan.state_bytes_per_session += bytes > grown ? bytes - grown : 0;
    }
}

void dim_plan::look_at_range(uint32_t first, uint32_t last, dim_range_plan & plan) {
    const uint32_t n_blocks = model->llama->hparams.n_layer();
    if (first >= last || last > n_blocks)
        fail(DIM_INVALID_ARGUMENT, "blocks %u..%u: the model has the blocks 0..%u", first, last, n_blocks);
    const auto whole = range(first, last);
    plan = {};
    auto seen = look_at(whole);
    list_tensors(whole, seen.cut, plan);
    count_states(whole, seen.cut, plan);
    plan.reads_tokens = seen.cut.reads_tokens;
    in = std::move(seen.in), out = std::move(seen.out);
    plan.n_in = in.parts.size(), plan.n_out = out.parts.size();
}

void dim_plan::check_cut(uint32_t block) {
    const uint32_t n_blocks = model->llama->hparams.n_layer();
    if (block == 0 || block >= n_blocks)
        fail(DIM_INVALID_ARGUMENT, "a cut before block %u: the model has the blocks 0..%u", block, n_blocks - 1);
    std::set<std::string> written;
    {
        const auto head = look_at(range(0, block));
        for (const auto * state : head.cut.states_written)
            if (!head.cut.common.count(state)) written.insert(state->name);
    }
    auto tail = look_at(range(block, n_blocks));
    for (const auto * state : tail.cut.states_written) {
        if (tail.cut.common.count(state) || !written.count(state->name)) continue;
        auto why = refusal_of(*model->llama, range(block, n_blocks), DIM_BOTH_WRITE, state->name);
        name_state(why, state);
        refuse(why);
    }
    in = std::move(tail.in), out = {};
}

dim_status dim_plan_open(const char * const * paths, size_t n_paths, dim_plan ** out, dim_fault * fault) {
    return guarded(fault, [&] {
        initialize();
        if (n_paths == 0) fail(DIM_INVALID_ARGUMENT, "no model file given");
        forget_log();
        check_room(0, false, paths[0]);
        const gguf_file header = open_header(paths[0]);
        if (!header) {
            const char * why = log_error_line();
            fail(DIM_LOAD_FAILED, "%s: %s", paths[0], *why ? why : "not a GGUF file");
        }
        auto load = llama_model_default_params();
        load.lazy_mode = LLAMA_LAZY_MODE_OFF;
        ggml_backend_dev_t no_devices[] = { nullptr };
        load.devices = no_devices;
        forget_log();
        auto plan = std::make_unique<dim_plan>();
        dim_fault why = no_fault;
        const auto status = guarded(
            &why, [&] { plan->model = plan_then_fill(paths, n_paths, *header, load, 0, /*with_bytes =*/false); });
        if (status == DIM_INTERNAL) {
            const std::string text = dim_last_error();
            fail(DIM_LOAD_FAILED, "%s: %s", paths[0], text.c_str());
        }
        if (status != DIM_OK) throw failure{ status, why };
        auto & llama = *plan->model->llama;
        check_decoder(llama);
        plan->one = std::make_unique<view>(llama, plan_ctx);
        plan->one->check(llama);
        plan->twice = std::make_unique<view>(llama, 2 * plan_ctx);
        *out = plan.release();
    });
}

void dim_plan_free(dim_plan * plan) {
    guarded([&] {
        delete plan;
        give_memory_back();
    });
}

const dim_model * dim_plan_model(const dim_plan * plan) { return plan->model.get(); }

// A kind that is not listed is still planned and cut: it only has no name.
const char * dim_plan_memory(const dim_plan * plan) {
    static const std::map<std::type_index, const char *> names = {
        { typeid(llama_kv_cache), "KV cache" },
        { typeid(llama_kv_cache_iswa), "KV cache with sliding windows" },
        { typeid(llama_kv_cache_dsa), "KV cache with an indexer" },
        { typeid(llama_kv_cache_dsa_iswa), "KV cache with an indexer and sliding windows" },
        { typeid(llama_kv_cache_msa), "KV cache with an indexer" },
        { typeid(llama_kv_cache_dsv4), "compressed KV cache" },
        { typeid(llama_memory_recurrent), "recurrent state" },
        { typeid(llama_memory_hybrid), "KV cache and recurrent state" },
        { typeid(llama_memory_hybrid_iswa), "KV cache with sliding windows, and recurrent state" },
        { typeid(llama_memory_hybrid_idx), "KV cache with an indexer, and recurrent state" },
    };
    const auto & memory = *plan->one->made.context->get_memory();
    const auto found = names.find(typeid(memory));
    return found != names.end() ? found->second : "memory of another kind";
}

dim_status dim_plan_range(dim_plan * plan, uint32_t first, uint32_t last, dim_range_plan * out) {
    return guarded([&] {
        dim_range_plan seen{};
        plan->look_at_range(first, last, seen);
        *out = seen;
    });
}

dim_status dim_plan_tensor(const dim_plan * plan, size_t index, char * text, size_t capacity, int64_t * length) {
    return guarded([&] {
        if (index >= plan->tensors.size()) fail(DIM_INVALID_ARGUMENT, "tensor %zu of %zu", index, plan->tensors.size());
        const auto & name = plan->tensors[index];
        if (capacity > 0) std::memcpy(text, name.data(), std::min(name.size(), capacity));
        *length = (int64_t) name.size();
    });
}

dim_status dim_plan_crossing(const dim_plan * plan, dim_end end, dim_crossing * out, size_t capacity, size_t * n) {
    return guarded([&] { give_crossing(end == DIM_END_IN ? plan->in : plan->out, out, capacity, n); });
}

dim_status dim_plan_cut(dim_plan * plan, uint32_t block) {
    return guarded([&] { plan->check_cut(block); });
}
