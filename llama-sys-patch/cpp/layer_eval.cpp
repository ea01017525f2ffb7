// A stage: the blocks [first, last) of a model, evaluated in a llama_context of their own.
//
// What it is: llama.cpp's own graph of the model, with what is not wanted cut off. Per chunk of at most n_ubatch rows:
//
//   1. llama.cpp's batch splitter and KV cache say which rows come next and where their keys and values go;
//   2. llama.cpp builds the whole graph, unless the last one still fits (one decode step like the one before);
//   3. cut(): the graph from the input of block `first` to the output of block `last - 1` is copied out of it, node by
//      node and in order; a leaf of ours takes the place of the first block's input, with a conversion to F32 behind it
//      where the rows come in F16; likewise at the end;
//   4. llama.cpp's scheduler places and allocates it, its input setters fill positions, masks and cell numbers, and its
//      backends compute it.
//
// What it is not: a change to llama.cpp or a copy of it. Nothing here knows what is inside a block. All it needs is that
// an architecture names each block's output "l_out", and that nothing but that output goes from block to block; both are
// checked when a stage is made, on the graph itself, and a model that fails is refused by name.
//
// Why it is exact: the kernels, their operands and their order within the range are those of llama_decode() for the same
// chunks. Measured, and tested in tests/exact.rs: max |logit difference| = 0.
#include "context.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>

using namespace dim;

namespace {

// What distinguishes two calls' graphs beyond what llama.cpp compares itself.
struct graph_kind {
    dim_dtype input, output;
    bool operator==(const graph_kind & other) const { return input == other.input && output == other.output; }
};

bool is_hidden(dim_dtype type) { return type == DIM_F16 || type == DIM_F32; }
size_t bytes_of(dim_dtype type) { return type == DIM_F16 ? 2 : 4; }

// ---- values that are not numbers

// F16 and F32 say "not finite" by an exponent of ones. Plain loops, which the compiler turns into vector code.
size_t count_not_finite(const uint16_t * x, size_t n) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += (x[i] & 0x7c00u) == 0x7c00u;
    return count;
}

size_t count_not_finite(const float * x, size_t n) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        count += (bits & 0x7f800000u) == 0x7f800000u;
    }
    return count;
}

// Logits may be -inf, which some models use for tokens that must not come.
size_t count_not_logits(const float * x, size_t n) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += !(x[i] < INFINITY);
    return count;
}

float max_abs_finite(const float * x, size_t n) {
    float max = 0.0f;
    for (size_t i = 0; i < n; i++) {
        const float a = std::fabs(x[i]);
        if (a > max && a < INFINITY) max = a;
    }
    return max;
}

size_t count_bad(dim_dtype type, const void * values, size_t n) {
    switch (type) {
        case DIM_F16:    return count_not_finite(static_cast<const uint16_t *>(values), n);
        case DIM_F32:    return count_not_finite(static_cast<const float *>(values), n);
        case DIM_LOGITS: return count_not_logits(static_cast<const float *>(values), n);
        case DIM_TOKENS: break;
    }
    return 0;
}

// A fault with the first bad row and the number of bad values; row is -1 if all are good.
dim_fault find_bad(dim_dtype type, const void * values, size_t n_rows, size_t width) {
    dim_fault fault = no_fault;
    for (size_t row = 0; row < n_rows; row++) {
        const auto * at = static_cast<const char *>(values) + row * width * bytes_of(type);
        const size_t bad = count_bad(type, at, width);
        if (bad > 0 && fault.row < 0) fault.row = (int64_t) row;
        fault.got += (int64_t) bad;
    }
    return fault;
}

int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

} // namespace

// ---- the stage

struct dim_stage {
    llama_context_ptr   context;
    llama_memory_ptr    memory;           // the KV cache in use; the context's own one is empty
    llama_model &       model;
    const uint32_t      first, last;      // blocks [first, last)
    const bool          takes_tokens, has_lm_head, f32_products;
    const size_t        n_embd, n_vocab;
    sessions            session;

    // The batch, its splitter, and what a graph refers to but a stage does not use.
    llama_batch_ext     batch;
    llama_batch_allocr  splitter;
    llama_adapter_cvec  no_cvec;
    llama_adapter_loras no_loras;
    llama_cross         no_cross;

    // The graph of the last chunk.
    std::unique_ptr<llm_graph_result> whole;   // llama.cpp's: owns every tensor but ours, and the inputs
    std::vector<uint8_t>              room;    // of `ours`
    ggml_context_ptr                  ours;    // our own tensors and the cut graph
    ggml_cgraph *                     graph = nullptr;   // NULL: must be built
    graph_kind                        kind {};
    ggml_tensor *                     input  = nullptr;  // our leaf (n_embd, rows), or NULL for tokens
    ggml_tensor *                     output = nullptr;  // (n_embd, rows) F16 or F32, or (n_vocab, wanted rows) F32
    ggml_tensor *                     result = nullptr;  // `output` before its conversion to F16
    std::vector<ggml_tensor *>        block_output;      // l_out of every block of the file, by number
    ggml_tensor *                     embedding = nullptr;
    bool                              labelling = false; // collect `labels` while building
    std::unordered_map<const ggml_tensor *, int> labels; // which block a tensor was labelled with
    uint64_t                          n_reused = 0, n_built = 0;

    // The watch over every block's output.
    bool                         watching = false;
    std::vector<dim_block_stats> stats;          // of blocks first .. last - 1, then of the lm_head if there is one
    std::unordered_map<const ggml_tensor *, size_t> watched;
    std::vector<float>           watched_values;
    int64_t                      watch_since_ns = 0;

    dim_stage(stage_context made, llama_model & model, const dim_stage_params & p)
        : context(std::move(made.context)), memory(std::move(made.memory)), model(model), first(p.first), last(p.last), takes_tokens(p.takes_tokens), has_lm_head(p.has_lm_head),
          f32_products(p.context.f32_products),
          n_embd(model.hparams.n_embd), n_vocab(model.vocab.n_tokens()),
          session(p.context.max_sessions, p.context.n_ctx), batch(context.get()), splitter(model.hparams.n_pos_per_embd()) {}

    ~dim_stage() {
        const no_allocation nothing(model);
        context.reset();
    }

    void evaluate(const dim_row * rows, size_t n_rows, dim_dtype input_type, const void * input_rows, size_t input_len,
                  dim_dtype output_type, void * output_rows, size_t output_len, size_t * n_written);
    void prepare();
    void watch(bool on);

private:
    void compute(const dim_row * rows, size_t n_rows, dim_dtype input_type, const void * in, dim_dtype output_type, void * out);
    void split(const dim_row * rows, size_t n_rows, dim_dtype input_type, const int32_t * tokens);
    void fill_input(const llama_ubatch & ubatch, const void * rows);
    void take_output(const llama_ubatch & ubatch, const std::vector<int32_t> & output_row, void * rows);
    void check_output(const void * values, size_t n_rows, const std::vector<int32_t> & batch_row);

    llm_graph_params graph_params(const llama_ubatch & ubatch, const llama_memory_context_i * cells, uint32_t n_outputs);
    void build(const llm_graph_params & params, graph_kind kind);
    void cut();
    size_t n_parts(int begin, int end, int64_t part_bytes) const;
    void replace_rounding_products(int begin, int end, int64_t part_bytes);
    void check_inputs() const;
    void check_link(const ggml_tensor * tensor, int block) const;
    void place(const llama_ubatch & ubatch, ggml_tensor * tensor, const char * name, int block);

    bool observe(ggml_tensor * tensor, bool ask);
    static bool on_node(ggml_tensor * tensor, bool ask, void * stage) { return static_cast<dim_stage *>(stage)->observe(tensor, ask); }

    [[noreturn]] void unsupported(const char * why) const {
        fail(DIM_UNSUPPORTED, "the blocks of a %s model cannot be evaluated apart: %s", model.arch_name().c_str(), why);
    }
};

// ---- evaluate

void dim_stage::evaluate(const dim_row * rows, size_t n_rows, dim_dtype input_type, const void * in, size_t input_len,
                         dim_dtype output_type, void * out, size_t output_len, size_t * n_written) {
    check_n_rows(*context, n_rows);
    if ((input_type == DIM_TOKENS) != takes_tokens || (input_type != DIM_TOKENS && !is_hidden(input_type))) {
        fail(DIM_WRONG_INPUT, takes_tokens ? "this stage starts the model: it takes tokens"
                                           : "this stage does not start the model: it takes hidden rows");
    }
    if ((output_type == DIM_LOGITS) != has_lm_head || (output_type != DIM_LOGITS && !is_hidden(output_type))) {
        fail(DIM_WRONG_OUTPUT, has_lm_head ? "this stage ends the model: it gives logits"
                                           : "this stage does not end the model: it gives hidden rows");
    }
    session.check(rows, n_rows);

    size_t n_out = n_rows;
    if (output_type == DIM_LOGITS) n_out = (size_t) std::count_if(rows, rows + n_rows, [](const dim_row & row) { return row.want_output; });
    const size_t in_width  = input_type  == DIM_TOKENS ? 1 : n_embd;
    const size_t out_width = output_type == DIM_LOGITS ? n_vocab : n_embd;
    dim_fault size = no_fault;
    size.got = (int64_t) input_len, size.expected = (int64_t) (n_rows * in_width);
    if (size.got != size.expected) fail_with(DIM_WRONG_SIZE, size, "input: %zu values for %zu rows of %zu", input_len, n_rows, in_width);
    size.got = (int64_t) output_len, size.expected = (int64_t) (n_out * out_width);
    if (size.got < size.expected) fail_with(DIM_WRONG_SIZE, size, "output: room for %zu values, %zu rows of %zu come", output_len, n_out, out_width);

    if (input_type == DIM_TOKENS) {
        check_tokens(model, static_cast<const int32_t *>(in), n_rows);
    } else {
        const dim_fault bad = find_bad(input_type, in, n_rows, n_embd);
        if (bad.row >= 0) {
            fail_with(DIM_INPUT_NOT_FINITE, bad, "input row %lld: %lld values of the call are not finite", (long long) bad.row, (long long) bad.got);
        }
    }

    struct undo {
        dim_stage & stage; const dim_row * rows; size_t n_rows; bool done;
        ~undo() {
            if (done) return;
            stage.graph = nullptr;   // its allocation may be half made
            stage.session.roll_back(*stage.memory, rows, n_rows);
        }
    } undo { *this, rows, n_rows, false };
    compute(rows, n_rows, input_type, in, output_type, out);
    undo.done = true;
    session.extend(rows, n_rows);
    *n_written = n_out;
}

void dim_stage::compute(const dim_row * rows, size_t n_rows, dim_dtype input_type, const void * in, dim_dtype output_type, void * out) {
    auto & ctx = *context;
    auto * sched = ctx.get_sched();
    split(rows, n_rows, input_type, static_cast<const int32_t *>(in));

    // where a batch row's output goes; -1: nowhere
    std::vector<int32_t> output_row(n_rows, -1);
    int32_t n_out = 0;
    for (size_t i = 0; i < n_rows; i++) if (output_type != DIM_LOGITS || rows[i].want_output) output_row[i] = n_out++;

    const auto cells = memory->init_batch(splitter, ctx.n_ubatch(), false);
    if (!cells || cells->get_status() != LLAMA_MEMORY_STATUS_SUCCESS) fail(DIM_COMPUTE_FAILED, "no room in the KV cache for %zu rows", n_rows);
    do {
        const auto & ubatch = cells->get_ubatch();
        if (!cells->apply()) fail(DIM_COMPUTE_FAILED, "the KV cache refused %u rows", ubatch.n_tokens);

        uint32_t n_outputs = 0;
        for (uint32_t i = 0; i < ubatch.n_tokens; i++) n_outputs += ubatch.output[i] != 0;

        const graph_kind wanted { input_type, output_type };
        const auto params = graph_params(ubatch, cells.get(), n_outputs);
        if (graph && kind == wanted && whole->can_reuse(params)) {
            n_reused++;
        } else {
            build(params, wanted);
            if (!ggml_backend_sched_alloc_graph(sched, graph)) fail(DIM_OUT_OF_MEMORY, "no memory for the graph of %u rows", ubatch.n_tokens);
        }

        llama_ubatch set = ubatch;
        if (input_type != DIM_TOKENS) set.token = nullptr;   // with no embeddings either: fill_input() does that
        whole->set_inputs(&set);
        if (input_type != DIM_TOKENS) fill_input(ubatch, in);

        watch_since_ns = now_ns();
        const auto status = ctx.graph_compute(graph, ubatch.n_tokens > 1);
        if (status != GGML_STATUS_SUCCESS) {
            graph = nullptr;
            fail(DIM_COMPUTE_FAILED, "the backend could not compute blocks %u..%u: %s", first, last - 1, ggml_status_to_string(status));
        }
        if (n_outputs > 0) take_output(ubatch, output_row, out);
        if (watching) {
            ggml_backend_sched_synchronize(sched);
            if (has_lm_head) {
                auto & head = stats.back();
                head.calls++, head.rows += n_outputs, head.nanoseconds += (uint64_t) (now_ns() - watch_since_ns);
            }
        }
    } while (cells->next());
}

// Hands the rows to llama.cpp's batch splitter. Hidden rows go as token 0: the splitter looks at sessions and positions
// only, and this spares it three copies of the rows.
void dim_stage::split(const dim_row * rows, size_t n_rows, dim_dtype input_type, const int32_t * tokens) {
    batch.clear();
    for (size_t i = 0; i < n_rows; i++) {
        const int32_t at = batch.add_token((llama_seq_id) rows[i].session);
        const llama_pos position = (llama_pos) rows[i].position;
        if (at < 0
            || !batch.set_token_id(at, input_type == DIM_TOKENS ? tokens[i] : 0)
            || !batch.set_token_pos(at, &position)
            || !batch.set_output(at, !has_lm_head || rows[i].want_output)) {
            fail(DIM_INTERNAL, "llama.cpp refused row %zu of a batch", i);
        }
    }
    forget_log();
    if (!splitter.init(batch, model.vocab, false)) fail(DIM_INTERNAL, "llama.cpp refused a batch: %s", log_error_line());
}

// The rows of a chunk as [from, from + n) of the batch, if they are; else n is 0.
static bool in_order(const std::vector<int32_t> & batch_row) {
    for (size_t i = 1; i < batch_row.size(); i++) if (batch_row[i] != batch_row[0] + (int32_t) i) return false;
    return true;
}

void dim_stage::fill_input(const llama_ubatch & ubatch, const void * rows) {
    const auto & batch_row = ubatch.data->batch_idxs;
    const size_t row_bytes = n_embd * bytes_of(kind.input);
    const auto * from = static_cast<const char *>(rows);
    if (in_order(batch_row)) {
        ggml_backend_tensor_set(input, from + (size_t) batch_row[0] * row_bytes, 0, ubatch.n_tokens * row_bytes);
        return;
    }
    for (uint32_t i = 0; i < ubatch.n_tokens; i++) {
        ggml_backend_tensor_set(input, from + (size_t) batch_row[i] * row_bytes, i * row_bytes, row_bytes);
    }
}

void dim_stage::take_output(const llama_ubatch & ubatch, const std::vector<int32_t> & output_row, void * rows) {
    // the chunk's output rows: where they go, and which rows of the batch they are
    std::vector<int32_t> to, batch_row;
    for (uint32_t i = 0; i < ubatch.n_tokens; i++) {
        if (!ubatch.output[i]) continue;
        batch_row.push_back(ubatch.data->batch_idxs[i]);
        to.push_back(output_row[(size_t) batch_row.back()]);
    }
    auto * sched = context->get_sched();
    auto * backend = ggml_backend_sched_get_tensor_backend(sched, output);
    const size_t row_bytes = (size_t) output->ne[0] * bytes_of(kind.output);
    auto * out = static_cast<char *>(rows);
    if (in_order(to)) {
        auto * at = out + (size_t) to[0] * row_bytes;
        ggml_backend_tensor_get_async(backend, output, at, 0, to.size() * row_bytes);
        ggml_backend_sched_synchronize(sched);
        check_output(at, to.size(), batch_row);
        return;
    }
    ggml_backend_sched_synchronize(sched);
    for (size_t i = 0; i < to.size(); i++) {
        auto * at = out + (size_t) to[i] * row_bytes;
        ggml_backend_tensor_get(output, at, i * row_bytes, row_bytes);
        check_output(at, 1, { batch_row[i] });
    }
}

// Nothing that is not a number leaves a stage: the next one would compute on it, and the answer would be wrong in silence.
void dim_stage::check_output(const void * values, size_t n_rows, const std::vector<int32_t> & batch_row) {
    dim_fault bad = find_bad(kind.output, values, n_rows, (size_t) output->ne[0]);
    if (bad.row < 0) return;
    bad.row   = batch_row[(size_t) bad.row];
    bad.block = (int64_t) last - 1;

    // what it was before the conversion tells an overflow from a NaN
    std::vector<float> exact((size_t) ggml_nelements(result));
    ggml_backend_tensor_get(result, exact.data(), 0, exact.size() * sizeof(float));
    bad.max_abs = max_abs_finite(exact.data(), exact.size());
    if (kind.output == DIM_F16 && count_not_finite(exact.data(), exact.size()) == 0) {
        fail_with(DIM_OUTPUT_OVERFLOWS, bad, "block %lld gave %lld values too large for F16 (up to %g, the limit is 65504), first in row %lld",
                  (long long) bad.block, (long long) bad.got, bad.max_abs, (long long) bad.row);
    }
    fail_with(DIM_OUTPUT_NOT_FINITE, bad, "%s %lld gave %lld values that are not finite, first in row %lld",
              has_lm_head ? "the output after block" : "block", (long long) bad.block, (long long) bad.got, (long long) bad.row);
}

// ---- the graph

llm_graph_params dim_stage::graph_params(const llama_ubatch & ubatch, const llama_memory_context_i * cells, uint32_t n_outputs) {
    auto & ctx = *context;
    auto * sched = ctx.get_sched();
    if (!whole) whole.reset(new llm_graph_result(ctx.graph_max_nodes(std::min(ctx.n_ctx(), ctx.n_ubatch()))));

    llm_graph_params params = {
        model.arch, model.hparams, ctx.get_cparams(), ubatch, LLM_GRAPH_TYPE_DEFAULT, sched,
        ggml_backend_sched_get_backend(sched, ggml_backend_sched_get_n_backends(sched) - 1),   // the CPU is the last
        &no_cvec, &no_loras, cells, &no_cross, &model.prec_policy, {}, n_outputs, nullptr, whole.get() };
    if (!takes_tokens) {
        // makes llama.cpp choose its embedding input, which cut() then takes the place of; never read through
        static float never_read = 0.0f;
        params.ubatch.token = nullptr;
        params.ubatch.embd  = &never_read;
    }
    params.cb = [this](const llama_ubatch & u, ggml_tensor * tensor, const char * name, int block) { place(u, tensor, name, block); };
    return params;
}

// Called for every tensor that llama.cpp names while it builds a graph: names it, pins it, notes what cut() needs.
void dim_stage::place(const llama_ubatch & ubatch, ggml_tensor * tensor, const char * name, int block) {
    if (block >= 0) ggml_format_name(tensor, "%s-%d", name, block); else ggml_set_name(tensor, name);

    if (block >= 0 && !std::strcmp(name, "l_out") && (size_t) block < block_output.size()) block_output[(size_t) block] = tensor;
    if (block <  0 && !std::strcmp(name, "embd")) embedding = tensor;
    if (labelling) labels[tensor] = block;

    // As llama.cpp's own callback: without this the scheduler may run a norm on the backend of the block before, and
    // carry the rows across twice. It holds back where only part of the model is on the GPU; the output, which llama.cpp
    // counts as one more layer, need not be.
    const bool all_blocks_offloaded = model.n_gpu_layers() >= model.hparams.n_layer_all;
    if (block < 0 || (ubatch.n_tokens >= 32 && !all_blocks_offloaded)) return;
    if (std::strcmp(name, "norm") != 0 && std::strcmp(name, "l_last") != 0) return;
    auto * sched  = context->get_sched();
    auto   device = model.dev_layer(block);
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); i++) {
        auto * backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(backend) == device && ggml_backend_supports_op(backend, tensor)) {
            ggml_backend_sched_set_tensor_backend(sched, tensor, backend);
        }
    }
}

void dim_stage::build(const llm_graph_params & params, graph_kind wanted) {
    auto * sched = context->get_sched();
    graph = nullptr;
    kind  = wanted;
    input = output = result = embedding = nullptr;
    block_output.assign(model.hparams.n_layer_all, nullptr);
    labels.clear();

    whole->reset();
    ggml_backend_sched_reset(sched);
    ggml_backend_sched_set_eval_callback(sched, watching ? on_node : nullptr, this);
    if (!model.build_graph(params)) fail(DIM_INTERNAL, "llama.cpp could not build its graph");
    cut();
    n_built++;
}

// Copies the range out of the whole graph, in order, into `graph`.
//
// Nodes stand in the order they are executed in, and a block's writes to the KV cache stand after its input and before
// its output: so the range is what stands after the input of block `first`, up to the output of block `last - 1`, and
// whatever of the nodes before these read (masks, rope factors).
void dim_stage::cut() {
    auto * from = whole->get_gf();

    result = has_lm_head ? whole->t_logits : block_output[last - 1];
    if (!result) unsupported(has_lm_head ? "it has no logits" : "its graph does not name the blocks' outputs (l_out)");
    if (result->type != GGML_TYPE_F32) unsupported("its hidden state is not F32");
    ggml_tensor * const start = takes_tokens ? nullptr : first > 0 ? block_output[first - 1] : embedding;
    if (!takes_tokens && !start) unsupported("its graph does not name the blocks' outputs (l_out)");

    int i_start = -1, i_end = -1;   // an embedding that is a leaf is no node, and then everything stands after it
    for (int i = 0; i < from->n_nodes; i++) {
        if (from->nodes[i] == start)  i_start = i;
        if (from->nodes[i] == result) i_end   = i;
    }
    if (i_end < 0 || (first > 0 && !takes_tokens && i_start < 0) || i_start >= i_end) unsupported("its blocks do not stand one after another");

    if (labelling) {
        for (uint32_t block = first; block < last; block++) {
            if (!block_output[block]) unsupported("its graph does not name the blocks' outputs (l_out)");
        }
        if (start) check_link(start, (int) first);
        for (uint32_t block = first; block + 1 < last; block++) check_link(block_output[block], (int) block + 1);
    }

    const size_t max_nodes = (size_t) whole->get_max_nodes();
    // four nodes a part; larger parts where the graph, or the scheduler, which is made for as many nodes, has no room
    size_t  n_parts = 0;
    int64_t part_bytes = 4 << 20;
    if (f32_products) {
        const size_t n_others = (size_t) (i_end - i_start + from->n_leafs + 8);
        while (n_others + 4 * (n_parts = this->n_parts(i_start + 1, i_end + 1, part_bytes)) > max_nodes && part_bytes < INT64_MAX / 2) part_bytes *= 2;
        if (n_others + 4 * n_parts > max_nodes) unsupported("its graph has no room for f32_products");
    }
    room.resize((8 + 4 * n_parts) * ggml_tensor_overhead() + ggml_graph_overhead_custom(max_nodes, false));
    ours.reset(ggml_init({ room.size(), room.data(), /*no_alloc =*/ true }));
    graph = ggml_new_graph_custom(ours.get(), max_nodes, false);

    if (start) {
        if (start->type != GGML_TYPE_F32 || start->ne[0] != (int64_t) n_embd || start->ne[2] != 1 || start->ne[3] != 1) {
            unsupported("its hidden state is not one F32 row per token");
        }
        input = ggml_new_tensor_2d(ours.get(), kind.input == DIM_F16 ? GGML_TYPE_F16 : GGML_TYPE_F32, start->ne[0], start->ne[1]);
        ggml_set_name(input, "stage_input");
        ggml_set_input(input);
        ggml_tensor * const rows = kind.input == DIM_F16 ? ggml_cast(ours.get(), input, GGML_TYPE_F32) : input;
        for (int i = 0; i < from->n_nodes; i++) {
            if (from->nodes[i]->view_src == start) unsupported("a block reads its input through a view");
            for (auto & src : from->nodes[i]->src) if (src == start) src = rows;
        }
    }

    if (f32_products) replace_rounding_products(i_start + 1, i_end + 1, part_bytes);

    // expanding a node adds what it reads first, if it is not there yet
    for (int i = i_start + 1; i <= i_end; i++) {
        // llama.cpp builds both kinds of input and marks the nodes of the one that was chosen
        if (from->nodes[i]->flags & GGML_TENSOR_FLAG_COMPUTE) ggml_build_forward_expand(graph, from->nodes[i]);
    }
    if (f32_products) ggml_build_forward_expand(graph, result);   // logits are a product, which was replaced
    output = result;
    ggml_set_output(result);   // kept for check_output(), also where it is converted
    if (kind.output == DIM_F16) {
        output = ggml_cast(ours.get(), result, GGML_TYPE_F16);
        ggml_set_name(output, "stage_output");
        ggml_set_output(output);
        ggml_build_forward_expand(graph, output);
    }
    check_inputs();
    // set_inputs() writes to every input of the whole graph: also those that no kept node reads need memory
    for (int i = 0; i < from->n_leafs; i++) {
        if (from->leafs[i]->flags & GGML_TENSOR_FLAG_INPUT) ggml_build_forward_expand(graph, from->leafs[i]);
    }
    if (watching) {
        watched.clear();
        for (uint32_t block = first; block < last; block++) if (block_output[block]) watched[block_output[block]] = block - first;
    }
}

// ---- products in F32

// A product of rows with a weight matrix for which llama.cpp rounds the rows to the matrix's type.
static bool is_rounding_product(const ggml_tensor * node) {
    if (node->op != GGML_OP_MUL_MAT) return false;
    const auto * matrix = node->src[0];
    return matrix->op == GGML_OP_NONE && matrix->type != GGML_TYPE_F32 && ggml_n_dims(matrix) <= 2
        && matrix->buffer && ggml_backend_buffer_get_usage(matrix->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
}

// Rows of a matrix that are turned into F32 at once, for parts of so many bytes.
static int64_t rows_of_a_part(const ggml_tensor * matrix, int64_t part_bytes) {
    return std::clamp<int64_t>(part_bytes / (matrix->ne[0] * (int64_t) sizeof(float)), 1, matrix->ne[1]);
}

// Parts of all the matrices of such products among the nodes [begin, end).
size_t dim_stage::n_parts(int begin, int end, int64_t part_bytes) const {
    size_t n = 0;
    for (int i = begin; i < end; i++) {
        const auto * node = whole->get_gf()->nodes[i];
        if (node->op == GGML_OP_MUL_MAT_ID) unsupported("it has experts, for which there are no f32_products");
        if (!is_rounding_product(node)) continue;
        const int64_t n_rows = rows_of_a_part(node->src[0], part_bytes);
        n += (size_t) ((node->src[0]->ne[1] + n_rows - 1) / n_rows);
    }
    return n;
}

// Puts, in the place of every such product among the nodes [begin, end), products with parts of its matrix that are F32,
// joined.
void dim_stage::replace_rounding_products(int begin, int end, int64_t part_bytes) {
    auto * from = whole->get_gf();
    std::unordered_map<const ggml_tensor *, ggml_tensor *> joined;
    const auto redirect = [&](ggml_tensor *& tensor) {
        const auto found = joined.find(tensor);
        if (found != joined.end()) tensor = found->second;
    };
    for (int i = begin; i < end; i++) {
        auto * node = from->nodes[i];
        for (auto & src : node->src) redirect(src);
        redirect(node->view_src);
        if (!is_rounding_product(node)) continue;
        auto * matrix = node->src[0];
        const int64_t n_rows = rows_of_a_part(matrix, part_bytes);
        std::vector<ggml_tensor *> parts;
        for (int64_t row = 0; row < matrix->ne[1]; row += n_rows) {
            auto * rows = ggml_view_2d(ours.get(), matrix, matrix->ne[0], std::min(n_rows, matrix->ne[1] - row), matrix->nb[1], (size_t) row * matrix->nb[1]);
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
    redirect(result);
}

// Refuses graphs that read more of the batch than its positions, or that get the tokens past our input.
void dim_stage::check_inputs() const {
    for (const auto & in : whole->inputs) {
        auto * any = in.get();
        if (const auto * embd = dynamic_cast<llm_graph_input_embd *>(any)) {
            if (takes_tokens) continue;
            for (int i = 0; i < graph->n_leafs; i++) {
                const auto * leaf = graph->leafs[i];
                if (leaf == embd->tokens || leaf == embd->embd || (leaf == embd->mixed_embd && leaf)) {
                    unsupported("a later block reads the embedding, or an earlier block's output, past the one before it");
                }
            }
        } else if (!dynamic_cast<llm_graph_input_pos *>(any) && !dynamic_cast<llm_graph_input_out_ids *>(any)
                && !dynamic_cast<llm_graph_input_attn_kv *>(any) && !dynamic_cast<llm_graph_input_attn_kv_iswa *>(any)
                && !dynamic_cast<llm_graph_input_attn_k *>(any) && !dynamic_cast<llm_graph_input_attn_temp *>(any)) {
            unsupported("its blocks read an input other than positions and masks");
        }
    }
}

// Refuses graphs in which `tensor` is not all that block `block` starts from, or is read by later ones: a slice that
// starts there would miss a step between the two blocks, or a shortcut past them. A block reads its input through a norm,
// which llama.cpp labels with the block, and for its residual sum, which it may not label; picking the wanted rows, in the
// last block, is no reading.
void dim_stage::check_link(const ggml_tensor * tensor, int block) const {
    const auto * from = whole->get_gf();
    int  n_readers = 0, n_labelled = 0;
    bool ended = false;
    for (int i = 0; i < from->n_nodes; i++) {
        const auto * node = from->nodes[i];
        const bool reads = std::any_of(std::begin(node->src), std::end(node->src), [&](const ggml_tensor * src) { return src == tensor; });
        if (reads && node->op != GGML_OP_GET_ROWS) {
            if (ended) unsupported("a later block reads the embedding, or an earlier block's output, past the one before it");
            const auto label = labels.find(node);
            n_readers++;
            n_labelled += label != labels.end() && label->second == block;
        }
        ended |= node == block_output[(size_t) block];
    }
    if (n_labelled == 0 || (n_readers == 1 && n_labelled != 1)) {
        unsupported(("there is a step between blocks before block " + std::to_string(block)).c_str());
    }
}

// Builds and reserves the largest graph, so that a model is refused, and memory found missing, before the first row.
void dim_stage::prepare() {
    auto & ctx = *context;
    const uint32_t n_sessions = session.count();
    const uint32_t per_session = std::max(1u, std::min(ctx.n_ctx(), ctx.n_ubatch()) / n_sessions);
    const auto cells = memory->init_full();
    if (!cells) fail(DIM_OUT_OF_MEMORY, "llama.cpp could not prepare the KV cache");
    llama_batch_allocr reserve(model.hparams.n_pos_per_embd());
    llama_ubatch ubatch = reserve.ubatch_reserve(per_session, n_sessions);
    for (uint32_t s = 0; s < n_sessions; s++) {
        for (uint32_t i = s * per_session; i < (s + 1) * per_session; i++) {
            ubatch.n_seq_id[i] = 1;
            ubatch.seq_id[i]   = &ubatch.seq_id_unq[s];
        }
    }
    const uint32_t n_outputs = has_lm_head ? n_sessions : ubatch.n_tokens;
    labelling = true;
    build(graph_params(ubatch, cells.get(), n_outputs),
          { takes_tokens ? DIM_TOKENS : DIM_F16, has_lm_head ? DIM_LOGITS : DIM_F16 });
    labelling = false;
    labels.clear();
    const bool reserved = ggml_backend_sched_reserve(ctx.get_sched(), graph);
    graph = nullptr;   // of no batch
    if (!reserved) fail(DIM_OUT_OF_MEMORY, "no memory for the graph of %u rows", ubatch.n_tokens);
    n_built = 0;
}

// ---- watch

void dim_stage::watch(bool on) {
    graph    = nullptr;   // the callback is set when a graph is built
    watching = on;
    stats.assign(last - first + (has_lm_head ? 1 : 0), dim_block_stats {});
}

bool dim_stage::observe(ggml_tensor * tensor, bool ask) {
    const auto found = watched.find(tensor);
    if (ask || found == watched.end()) return found != watched.end();
    const int64_t computed_ns = now_ns();
    auto & block = stats[found->second];
    block.calls++;
    block.rows        += (uint64_t) tensor->ne[1];
    block.nanoseconds += (uint64_t) (computed_ns - watch_since_ns);
    if (ggml_is_contiguous(tensor) && tensor->type == GGML_TYPE_F32) {
        watched_values.resize((size_t) ggml_nelements(tensor));
        ggml_backend_tensor_get(tensor, watched_values.data(), 0, watched_values.size() * sizeof(float));
        block.max_abs     = std::max(block.max_abs, max_abs_finite(watched_values.data(), watched_values.size()));
        block.not_finite += count_not_finite(watched_values.data(), watched_values.size());
    }
    watch_since_ns = now_ns();   // looking is not the next block's time
    return true;
}

// ---- the C functions

dim_status dim_stage_create(llama_model * model, const dim_stage_params * params, dim_stage ** out) {
    return guarded([&] {
        initialize();
        const auto & hparams = model->hparams;
        const uint32_t n_blocks = hparams.n_layer();
        if (params->first >= params->last || params->last > n_blocks) {
            fail(DIM_INVALID_ARGUMENT, "blocks %u..%u: the file has the blocks 0..%u", params->first, params->last, n_blocks);
        }
        if (params->takes_tokens && params->first != 0) {
            fail(DIM_INVALID_ARGUMENT, "a stage that takes tokens starts with block 0, not with %u", params->first);
        }
        if (params->has_lm_head && params->last != n_blocks) {
            fail(DIM_INVALID_ARGUMENT, "a stage with an lm_head ends with the last of %u blocks, not with block %u", n_blocks, params->last - 1);
        }
        const auto refuse = [&](const char * why) {
            fail(DIM_UNSUPPORTED, "the blocks of a %s model cannot be evaluated apart: %s", model->arch_name().c_str(), why);
        };
        if (hparams.vocab_only || model->vocab.n_tokens() == 0) refuse("the file gives no vocabulary size");
        if (llama_model_has_encoder(model)) refuse("it has an encoder");
        if (!hparams.causal_attn)           refuse("its attention is not causal");
        if (hparams.n_embd_inp() != hparams.n_embd || hparams.n_embd_out() != hparams.n_embd) refuse("its rows change their width");
        for (uint32_t block = params->first; block < params->last; block++) {
            if (!hparams.has_kv(block)) refuse("a block uses the keys and values of another");
        }

        auto made = make_stage_context(model, params->context, params->first, params->last);
        auto * kv = made.memory.get();
        if (!dynamic_cast<llama_kv_cache *>(kv) && !dynamic_cast<llama_kv_cache_iswa *>(kv)) {
            refuse("it keeps a state that is not a KV cache, and cannot be rewound");
        }
        std::unique_ptr<dim_stage> stage(new dim_stage(std::move(made), *model, *params));
        stage->prepare();
        *out = stage.release();
    });
}

void dim_stage_free(dim_stage * stage) {
    guarded([&] {
        delete stage;
        give_memory_back();
    });
}

dim_status dim_stage_describe(const dim_stage * stage, dim_context_info * out) {
    return guarded([&] { *out = describe(*stage->context, *stage->memory); });
}

dim_status dim_stage_evaluate(dim_stage * stage, const dim_row * rows, size_t n_rows,
                              dim_dtype input_type, const void * input, size_t input_len,
                              dim_dtype output_type, void * output, size_t output_len, size_t * n_written, dim_fault * fault) {
    return guarded(fault, [&] {
        stage->evaluate(rows, n_rows, input_type, input, input_len, output_type, output, output_len, n_written);
    });
}

dim_status dim_stage_rewind(dim_stage * stage, uint32_t session, uint32_t position, dim_fault * fault) {
    return guarded(fault, [&] { stage->session.rewind(*stage->memory, session, position); });
}

dim_status dim_stage_length(const dim_stage * stage, uint32_t session, uint32_t * length, dim_fault * fault) {
    return guarded(fault, [&] { *length = stage->session.length(session); });
}

void dim_stage_graphs(const dim_stage * stage, uint64_t * reused, uint64_t * built) {
    *reused = stage->n_reused;
    *built  = stage->n_built;
}

dim_status dim_stage_watch(dim_stage * stage, bool on) {
    return guarded([&] { stage->watch(on); });
}

dim_status dim_stage_block_stats(const dim_stage * stage, dim_block_stats * out, size_t capacity, size_t * n) {
    return guarded([&] {
        if (capacity < stage->stats.size()) fail(DIM_WRONG_SIZE, "room for %zu blocks of %zu", capacity, stage->stats.size());
        std::copy(stage->stats.begin(), stage->stats.end(), out);
        *n = stage->stats.size();
    });
}
