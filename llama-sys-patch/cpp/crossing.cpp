#include "crossing.h"

#include "boundary.h"

#include <cstring>

namespace dim {

size_t crossing::bytes_per_token(dim_dtype as) const {
    size_t bytes = 0;
    for (const auto & part : parts) bytes += part.bytes(as);
    return bytes;
}

tensor_shapes shapes_of(const std::vector<crossing_tensor> & tensors) {
    tensor_shapes shapes;
    for (const auto & [t, first, last] : tensors) shapes.push_back({ t->ne[0], t->ne[1], t->ne[2], t->ne[3] });
    return shapes;
}

// ggml numbers what has no name, by its place in this or that graph.
static std::string name_for_people(const ggml_tensor * tensor) {
    return std::strncmp(tensor->name, "node_", 5) ? tensor->name : "unnamed";
}

crossing layout_of(const llama_model & model, const block_range & range, const std::vector<crossing_tensor> & tensors,
                   int64_t n_tokens, const tensor_shapes & shapes, int64_t n_others) {
    if (tensors.size() != shapes.size()) refuse(refusal_of(model, range, DIM_CROSSES_OTHERS));
    crossing layout;
    for (size_t t = 0; t < tensors.size(); t++) {
        const auto & [tensor, first, last] = tensors[t];
        int token_dim = -1;
        for (int d = 0; d < 4; d++) {
            if (tensor->ne[d] == shapes[t][(size_t) d]) continue;
            if (token_dim >= 0 || tensor->ne[d] != n_tokens || shapes[t][(size_t) d] != n_others) {
                refuse(refusal_of(model, range, DIM_CROSSES_UNEVEN, tensor->name));
            }
            token_dim = d;
        }
        if (token_dim < 0) refuse(refusal_of(model, range, DIM_CROSSES_FIXED, tensor->name));
        crossing_part part{ tensor->type,
                            token_dim,
                            { tensor->ne[0], tensor->ne[1], tensor->ne[2], tensor->ne[3] },
                            name_for_people(tensor) };
        if (token_dim < 2) part.first = first, part.ne[2] = last - first;
        part.ne[(size_t) token_dim] = 1;
        layout.parts.push_back(std::move(part));
    }
    return layout;
}

// The best few of a context's positions are fewer while the context is shorter than that. They take the front of their
// place.
static bool may_be_shorter(const crossing_part & part, int dim) { return part.token_dim == 1 && dim == 0; }

void check_layout(const llama_model & model, const block_range & range, const crossing & layout,
                  const std::vector<crossing_tensor> & tensors, int64_t n_tokens) {
    bool same = tensors.size() == layout.parts.size();
    for (size_t t = 0; same && t < tensors.size(); t++) {
        const auto & part = layout.parts[t];
        const auto & [tensor, first, last] = tensors[t];
        const bool is_sliced = part.token_dim < 2;
        same = tensor->type == part.type && (!is_sliced || first == part.first);
        for (int d = 0; d < 4; d++) {
            const int64_t n = d == 2 && is_sliced ? last - first : tensor->ne[d];
            const int64_t expected = d == part.token_dim ? n_tokens : part.ne[(size_t) d];
            same &= n == expected || (may_be_shorter(part, d) && n < expected);
        }
    }
    if (!same) refuse(refusal_of(model, range, DIM_CROSSES_OTHERS));
}

// The bytes of a part in runs: the values before the token's dimension are one run of memory, and there is one for each
// value of the dimensions after it.
struct runs {
    size_t bytes;   // in the tensor
    size_t place;   // in the row: as many, or more
    size_t n_outer;
    size_t begin;   // in the tensor: what is before does not cross

    runs(const ggml_tensor * tensor, const crossing_part & part)
        : bytes(ggml_type_size(tensor->type)), place(bytes), n_outer(1), begin((size_t) part.first * tensor->nb[2]) {
        for (int d = 0; d < part.token_dim; d++) {
            bytes *= (size_t) tensor->ne[d];
            place *= (size_t) part.ne[(size_t) d];
        }
        for (int d = part.token_dim + 1; d < 4; d++) n_outer *= (size_t) part.ne[(size_t) d];
    }
};

static bool in_order(const std::vector<int32_t> & rows) {
    for (size_t i = 1; i < rows.size(); i++)
        if (rows[i] != rows[0] + (int32_t) i) return false;
    return true;
}

void rows_in(ggml_tensor * tensor, const crossing_part & part, const std::vector<int32_t> & call_row,
             const uint8_t * rows, size_t row_bytes, size_t offset) {
    const runs run(tensor, part);
    const size_t n = call_row.size();
    if (run.n_outer == 1 && run.bytes == row_bytes && in_order(call_row)) {
        ggml_backend_tensor_set(tensor, rows + (size_t) call_row[0] * row_bytes, run.begin, n * row_bytes);
        return;
    }
    std::vector<uint8_t> bytes(n * run.n_outer * run.bytes);
    for (size_t outer = 0; outer < run.n_outer; outer++) {
        for (size_t i = 0; i < n; i++) {
            std::memcpy(bytes.data() + (outer * n + i) * run.bytes,
                        rows + (size_t) call_row[i] * row_bytes + offset + outer * run.place, run.bytes);
        }
    }
    ggml_backend_tensor_set(tensor, bytes.data(), run.begin, bytes.size());
}

void rows_out(const ggml_tensor * tensor, const crossing_part & part, const std::vector<int32_t> & call_row,
              uint8_t * rows, size_t row_bytes, size_t offset) {
    const runs run(tensor, part);
    const size_t n = call_row.size();
    if (run.n_outer == 1 && run.bytes == row_bytes && in_order(call_row)) {
        ggml_backend_tensor_get(tensor, rows + (size_t) call_row[0] * row_bytes, run.begin, n * row_bytes);
        return;
    }
    std::vector<uint8_t> bytes(n * run.n_outer * run.bytes);
    ggml_backend_tensor_get(tensor, bytes.data(), run.begin, bytes.size());
    for (size_t outer = 0; outer < run.n_outer; outer++) {
        for (size_t i = 0; i < n; i++) {
            auto * at = rows + (size_t) call_row[i] * row_bytes + offset + outer * run.place;
            std::memcpy(at, bytes.data() + (outer * n + i) * run.bytes, run.bytes);
            std::memset(at + run.bytes, 0, run.place - run.bytes);
        }
    }
}

}   // namespace dim
