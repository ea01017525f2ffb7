// A stage's graph: cut out of llama.cpp's, with our inputs and outputs at its ends.
#include "operands.h"
#include "stage.h"

#include <algorithm>

using namespace dim;

range_cut dim_stage::analyse(const llm_graph_params & params) {
    whole.build(params);
    const dependencies nodes(whole.nodes(), whole.weights, (int) model.hparams.n_layer());
    if (watching) watch_cut(nodes);
    check_operands(nodes);
    return cut_range(model, whole.result(), nodes, range, owner.absent);
}

void dim_stage::build(const llm_graph_params & params, graph_kind wanted) {
    graph = nullptr;
    kind = wanted;
    ggml_backend_sched_set_eval_callback(context().get_sched(), watching ? on_node : nullptr, this);
    auto cut = analyse(params);
    if (made.memory->allocate(cut)) cut = analyse(params);   // views of the new states now know where these are
    check_layout(model, range, in, cut.inputs, params.ubatch.n_tokens);
    if (!range.has_lm_head) check_layout(model, range, out, cut.outputs, params.ubatch.n_tokens);
    assemble(cut);
    n_built++;
}

void dim_stage::assemble(const range_cut & cut) {
    auto & from = whole.nodes();
    const size_t max_nodes = (size_t) whole.result().get_max_nodes();
    int64_t part_bytes = 4 << 20;
    const size_t n_products = f32_products ? room_for_products(cut, max_nodes, part_bytes) : 0;
    const size_t n_ends = cut.inputs.size() + cut.outputs.size();
    room.resize((n_ends + 4 * n_products) * ggml_tensor_overhead() + ggml_graph_overhead_custom(max_nodes, false));
    ours.reset(ggml_init({ room.size(), room.data(), /*no_alloc =*/true }));
    graph = ggml_new_graph_custom(ours.get(), max_nodes, false);
    results.clear();
    for (const auto & output : cut.outputs) results.push_back(output.tensor);

    place_inputs(cut);
    if (f32_products) replace_rounding_products(cut, part_bytes);
    // expanding a node adds what it reads first, if it is not there yet
    for (const int i : cut.nodes) {
        // llama.cpp builds all kinds of input and marks the nodes of the one that was chosen
        if (from.nodes[i]->flags & GGML_TENSOR_FLAG_COMPUTE) ggml_build_forward_expand(graph, from.nodes[i]);
    }
    place_outputs();
    // set_inputs() writes to every input of the whole graph: also those that no kept node reads need memory
    for (int i = 0; i < from.n_leafs; i++) {
        if (from.leafs[i]->flags & GGML_TENSOR_FLAG_INPUT) ggml_build_forward_expand(graph, from.leafs[i]);
    }
}

// What comes from the blocks before becomes an input where it stands: a leaf, or a conversion of one.
void dim_stage::place_inputs(const range_cut & cut) {
    inputs.clear();
    for (const auto & [tensor, first, last] : cut.inputs) {
        std::fill(std::begin(tensor->src), std::end(tensor->src), nullptr);
        if (kind.input == DIM_F16 && tensor->type == GGML_TYPE_F32) {
            auto * leaf = ggml_new_tensor(ours.get(), GGML_TYPE_F16, GGML_MAX_DIMS, tensor->ne);
            ggml_set_name(leaf, "stage_input");
            ggml_set_input(leaf);
            // as ggml_cast() makes it
            tensor->op = GGML_OP_CPY;
            tensor->src[0] = leaf;
            tensor->src[1] = tensor;
            inputs.push_back(leaf);
        } else {
            tensor->op = GGML_OP_NONE;
            ggml_set_input(tensor);
            inputs.push_back(tensor);
        }
        ggml_build_forward_expand(graph, tensor);   // written to, or passed on, whether or not a block reads it
    }
}

void dim_stage::place_outputs() {
    // may be a product that was replaced
    if (f32_products)
        for (auto * result : results) ggml_build_forward_expand(graph, result);
    outputs.clear();
    for (auto * result : results) {
        ggml_set_output(result);   // kept for check_output(), also where it is converted
        auto * output = result;
        if (kind.output == DIM_F16 && result->type == GGML_TYPE_F32) {
            output = ggml_cast(ours.get(), result, GGML_TYPE_F16);
            ggml_set_name(output, "stage_output");
            ggml_set_output(output);
            ggml_build_forward_expand(graph, output);
        }
        outputs.push_back(output);
    }
}

// ---- products in F32

// A product of rows with a weight matrix for which llama.cpp rounds the rows to the matrix's type.
static bool is_rounding_product(const ggml_tensor * node) {
    if (node->op != GGML_OP_MUL_MAT) return false;
    const auto * matrix = node->src[0];
    return matrix->op == GGML_OP_NONE && matrix->type != GGML_TYPE_F32 && ggml_n_dims(matrix) <= 2 && matrix->buffer &&
           ggml_backend_buffer_get_usage(matrix->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
}

// Rows of a matrix that are turned into F32 at once, for parts of so many bytes.
static int64_t rows_of_a_part(const ggml_tensor * matrix, int64_t part_bytes) {
    return std::clamp<int64_t>(part_bytes / (matrix->ne[0] * (int64_t) sizeof(float)), 1, matrix->ne[1]);
}

// Parts of all the matrices of such products in the cut.
size_t dim_stage::n_parts(const range_cut & cut, int64_t part_bytes) const {
    size_t n = 0;
    for (const int i : cut.nodes) {
        const auto * node = whole.nodes().nodes[i];
        if (node->op == GGML_OP_MUL_MAT_ID)
            fail(DIM_UNSUPPORTED, "a %s model has experts, for which there are no f32_products",
                 model.arch_name().c_str());
        if (!is_rounding_product(node)) continue;
        const int64_t n_rows = rows_of_a_part(node->src[0], part_bytes);
        n += (size_t) ((node->src[0]->ne[1] + n_rows - 1) / n_rows);
    }
    return n;
}

// Parts there will be, of four nodes each; larger ones where the graph, or the scheduler, which is made for as many
// nodes, has no room.
size_t dim_stage::room_for_products(const range_cut & cut, size_t max_nodes, int64_t & part_bytes) const {
    const size_t n_others = cut.nodes.size() + (size_t) whole.nodes().n_leafs + 8;
    size_t n = n_parts(cut, part_bytes);
    while (n_others + 4 * n > max_nodes && part_bytes < INT64_MAX / 2) n = n_parts(cut, part_bytes *= 2);
    if (n_others + 4 * n > max_nodes)
        fail(DIM_UNSUPPORTED, "the graph of a %s model has no room for f32_products", model.arch_name().c_str());
    return n;
}

// Puts, in the place of every such product, products with parts of its matrix that are F32, joined.
void dim_stage::replace_rounding_products(const range_cut & cut, int64_t part_bytes) {
    std::unordered_map<const ggml_tensor *, ggml_tensor *> joined;
    const auto redirect = [&](ggml_tensor *& tensor) {
        const auto found = joined.find(tensor);
        if (found != joined.end()) tensor = found->second;
    };
    for (const int i : cut.nodes) {
        auto * node = whole.nodes().nodes[i];
        for (auto & src : node->src) redirect(src);
        redirect(node->view_src);
        if (!is_rounding_product(node)) continue;
        auto * matrix = node->src[0];
        const int64_t n_rows = rows_of_a_part(matrix, part_bytes);
        std::vector<ggml_tensor *> parts;
        for (int64_t row = 0; row < matrix->ne[1]; row += n_rows) {
            const int64_t n = std::min(n_rows, matrix->ne[1] - row);
            auto * rows =
                ggml_view_2d(ours.get(), matrix, matrix->ne[0], n, matrix->nb[1], (size_t) row * matrix->nb[1]);
            parts.push_back(ggml_mul_mat(ours.get(), ggml_cast(ours.get(), rows, GGML_TYPE_F32), node->src[1]));
        }
        // two by two, so that no value is copied often
        while (parts.size() > 1) {
            std::vector<ggml_tensor *> pairs;
            for (size_t k = 0; k < parts.size(); k += 2) {
                pairs.push_back(k + 1 < parts.size() ? ggml_concat(ours.get(), parts[k], parts[k + 1], 0) : parts[k]);
            }
            parts = std::move(pairs);
        }
        joined[node] = parts[0];
        node->flags &= ~GGML_TENSOR_FLAG_COMPUTE;   // nobody reads it any more
    }
    for (auto *& result : results) redirect(result);
}

// ---- prepare

// Builds and reserves the largest graph, so that a range is refused, and memory found missing, before the first row.
// What crosses is read off it and off one of another number of rows.
void dim_stage::prepare() {
    auto & ctx = context();
    const uint32_t n_sessions = session.count();
    const uint32_t per_session = std::max(1u, std::min(ctx.n_ctx(), ctx.n_ubatch()) / n_sessions);
    const auto cells = made.memory->module().init_full();
    if (!cells) fail(DIM_OUT_OF_MEMORY, "llama.cpp could not prepare the KV cache");
    const uint32_t n_pos = model.hparams.n_pos_per_embd();
    llama_batch_allocr of_others(n_pos), of_largest(n_pos);
    const auto others = chunk_for_reserve(of_others, per_session > 1 ? per_session - 1 : 2, n_sessions);
    const auto largest = chunk_for_reserve(of_largest, per_session, n_sessions);
    {
        const auto before = analyse(whole.params(others, cells.get(), others.n_tokens));
        const auto in_shapes = shapes_of(before.inputs), out_shapes = shapes_of(before.outputs);
        const auto cut = analyse(whole.params(largest, cells.get(), largest.n_tokens));
        in = layout_of(model, range, cut.inputs, largest.n_tokens, in_shapes, others.n_tokens);
        if (!range.has_lm_head)
            out = layout_of(model, range, cut.outputs, largest.n_tokens, out_shapes, others.n_tokens);
        reads_tokens = cut.reads_tokens;
    }
    const uint32_t n_outputs = range.has_lm_head ? n_sessions : largest.n_tokens;
    build(whole.params(largest, cells.get(), n_outputs),
          { range.takes_tokens ? DIM_TOKENS : DIM_F16, range.has_lm_head ? DIM_LOGITS : DIM_F16 });
    const bool reserved = ggml_backend_sched_reserve(ctx.get_sched(), graph);
    graph = nullptr;   // of no batch
    if (!reserved) fail(DIM_OUT_OF_MEMORY, "no memory for the graph of %u rows", largest.n_tokens);
    n_built = 0;
}
