// What goes from range to range, token by token: for most models one hidden row, for some a few tensors side by side.
//
// A token's row is the tensors' values for that token, one tensor after the other in the graph's order, each in its own
// order. As F32 every value takes four bytes; as F16 those of F32 tensors take two, rounded to the nearest, and I32
// ones stay as they are.
#pragma once

#include "cut.h"

#include <array>
#include <string>
#include <vector>

namespace dim {

// One of the tensors that cross.
struct crossing_part {
    ggml_type type;              // F32 or I32
    int token_dim;               // which dimension counts the tokens
    std::array<int64_t, 4> ne;   // of what crosses, with 1 in place of the tokens
    std::string name;            // for people
    int64_t first = 0;           // where that begins in the tensor's third dimension: nobody reads what is before

    size_t n_values() const { return (size_t) (ne[0] * ne[1] * ne[2] * ne[3]); }
    size_t value_bytes(dim_dtype as) const { return as == DIM_F16 && type == GGML_TYPE_F32 ? 2 : 4; }
    size_t bytes(dim_dtype as) const { return n_values() * value_bytes(as); }
};

struct crossing {
    std::vector<crossing_part> parts;

    size_t bytes_per_token(dim_dtype as) const;
};

// Reads the layout off the same tensors in two graphs, of n_tokens and n_others tokens. Refuses (DIM_NOT_APART) the
// range where a tensor is not so much per token. `shapes`: of the graph with n_others, which need not exist any more.
using tensor_shapes = std::vector<std::array<int64_t, 4>>;
tensor_shapes shapes_of(const std::vector<crossing_tensor> & tensors);
crossing layout_of(const llama_model & model, const block_range & range, const std::vector<crossing_tensor> & tensors,
                   int64_t n_tokens, const tensor_shapes & shapes, int64_t n_others);

// Checks that tensors of a graph of n_tokens tokens are laid out so, or are shorter than their places in a row.
// Refuses (DIM_NOT_APART) the range.
void check_layout(const llama_model & model, const block_range & range, const crossing & layout,
                  const std::vector<crossing_tensor> & tensors, int64_t n_tokens);

// Moves a chunk's rows of one part between `tensor` (of the part's own type, or F16) and the rows of a call.
//   rows:      (rows of the call, row_bytes); this part stands at `offset` of each
//   call_row:  which of them each token of the chunk is
void rows_in(ggml_tensor * tensor, const crossing_part & part, const std::vector<int32_t> & call_row,
             const uint8_t * rows, size_t row_bytes, size_t offset);
void rows_out(const ggml_tensor * tensor, const crossing_part & part, const std::vector<int32_t> & call_row,
              uint8_t * rows, size_t row_bytes, size_t offset);

}   // namespace dim
