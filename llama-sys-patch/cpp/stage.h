// A stage: a range of a model's blocks, evaluated in a llama_context of its own. stage.cpp tells how.
#pragma once

#include "context.h"
#include "crossing.h"
#include "cut.h"
#include "model.h"
#include "session.h"
#include "whole_graph.h"

#include <memory>
#include <unordered_map>
#include <vector>

namespace dim {

// Refuses (DIM_UNSUPPORTED) what is no text decoder.
void check_decoder(const llama_model & model);

// What dim_stage_crossing() does.
void give_crossing(const crossing & layout, dim_crossing * out, size_t capacity, size_t * n);

}   // namespace dim

struct dim_stage {
    dim_stage(dim::stage_context made, dim_model & model, const dim_stage_params & params);
    ~dim_stage();
    dim_stage(const dim_stage &) = delete;

    // A call's rows in, and its rows or logits out: what dim_stage_evaluate() takes.
    struct rows_of_call {
        const dim_row * rows;
        size_t n_rows;
        const int32_t * tokens;   // NULL where nobody reads them
        dim_dtype input_type;
        const void * input;
        size_t input_len;
        dim_dtype output_type;
        void * output;
        size_t output_len;
    };

    void evaluate(const rows_of_call & call, size_t * n_written);
    // What dim_stage_restore() does, of rows that are checked: `bytes` for each of them (saved.cpp).
    void put_back(const rows_of_call & call, const uint8_t * bytes);
    void prepare();
    void watch(bool on);

    dim::stage_context made;
    dim_model & owner;
    llama_model & model;
    const dim::block_range range;
    const bool f32_products;
    const size_t n_vocab;
    dim::crossing in, out;   // what crosses the range's ends
    bool reads_tokens = false;
    dim::sessions session;
    uint64_t n_reused = 0, n_built = 0;
    std::vector<dim_block_stats> stats;   // of blocks first .. last - 1, then of the lm_head if there is one

private:
    // What distinguishes two calls' graphs beyond what llama.cpp compares itself.
    struct graph_kind {
        dim_dtype input, output;
        bool operator==(const graph_kind & other) const { return input == other.input && output == other.output; }
    };

    void check_call(const rows_of_call & call) const;
    void compute(const rows_of_call & call);
    void split(const rows_of_call & call);
    void run_chunk(const rows_of_call & call, const llama_ubatch & ubatch, const llama_memory_context_i * cells,
                   const std::vector<int32_t> & output_row);
    void fill_input(const llama_ubatch & ubatch, const uint8_t * rows);
    void take_output(const llama_ubatch & ubatch, const std::vector<int32_t> & output_row, uint8_t * rows);
    void take_rows(const std::vector<int32_t> & to, uint8_t * rows);
    void check_output(const uint8_t * rows, size_t n_rows, const std::vector<int32_t> & batch_row);

    dim::range_cut analyse(const llm_graph_params & params);
    void build(const llm_graph_params & params, graph_kind kind);
    void assemble(const dim::range_cut & cut);
    void place_inputs(const dim::range_cut & cut);
    void place_outputs();

    size_t room_for_products(const dim::range_cut & cut, size_t max_nodes, int64_t & part_bytes) const;
    size_t n_parts(const dim::range_cut & cut, int64_t part_bytes) const;
    void replace_rounding_products(const dim::range_cut & cut, int64_t part_bytes);

    void watch_cut(const dim::dependencies & nodes);
    bool observe(ggml_tensor * tensor, bool ask);
    static bool on_node(ggml_tensor * tensor, bool ask, void * stage) {
        return static_cast<dim_stage *>(stage)->observe(tensor, ask);
    }

    llama_context & context() const { return *made.context; }

    llama_batch_ext batch;
    llama_batch_allocr splitter;

    // The graph of the last chunk.
    dim::whole_graph whole;          // llama.cpp's: owns every tensor but ours, and the inputs
    std::vector<uint8_t> room;       // of `ours`
    ggml_context_ptr ours;           // our own tensors and the cut graph
    ggml_cgraph * graph = nullptr;   // NULL: must be built
    graph_kind kind{};
    std::vector<ggml_tensor *> inputs;    // what a call's rows are written to, part by part
    std::vector<ggml_tensor *> outputs;   // what they are read from
    std::vector<ggml_tensor *> results;   // the same before a conversion to F16

    bool watching = false;
    std::unordered_map<const ggml_tensor *, size_t> watched;
    std::vector<float> watched_values;
    int64_t watch_since_ns = 0;
};
