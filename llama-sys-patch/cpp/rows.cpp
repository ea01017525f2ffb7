// Rows of ggml types: sizes, and ggml's own conversions, with everything checked that they assert or trust.
#include "boundary.h"

#include "ggml.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

using namespace dim;

// The traits of a type that exists today. Numbers of removed types have a name and no size.
static const ggml_type_traits & traits(uint32_t type) {
    const auto * found = type < GGML_TYPE_COUNT ? ggml_get_type_traits((ggml_type) type) : nullptr;
    if (!found || !found->type_name || found->blck_size <= 0 || found->type_size == 0) {
        fail(DIM_INVALID_ARGUMENT, "%u is not the number of a ggml type", type);
    }
    return *found;
}

// ggml_quantize_chunk() asserts (or, built without assertions, does nothing) for any other.
static bool can_quantize(uint32_t type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q2_K:
        case GGML_TYPE_Q3_K:
        case GGML_TYPE_Q4_K:
        case GGML_TYPE_Q5_K:
        case GGML_TYPE_Q6_K:
        case GGML_TYPE_IQ4_NL:
        case GGML_TYPE_IQ4_XS:
        case GGML_TYPE_MXFP4:
        case GGML_TYPE_TQ1_0:
        case GGML_TYPE_TQ2_0:  return true;
        default:               return false;
    }
}

static bool can_dequantize(uint32_t type) { return type == GGML_TYPE_F32 || traits(type).to_float != nullptr; }

// The bytes of n_rows rows, with every product checked.
static size_t size_of_rows(uint32_t type, size_t n_rows, size_t n_per_row) {
    const auto & t = traits(type);
    const size_t block = (size_t) t.blck_size;
    if (n_rows == 0 || n_per_row == 0) fail(DIM_INVALID_ARGUMENT, "%zu rows of %zu values", n_rows, n_per_row);
    if (n_per_row % block != 0) {
        fail(DIM_INVALID_ARGUMENT, "a row of %zu values is not a whole number of %s blocks (%zu values)", n_per_row,
             t.type_name, block);
    }
    const size_t limit = (size_t) std::numeric_limits<int64_t>::max() / sizeof(float);
    if (n_per_row > limit / n_rows || n_per_row / block > limit / t.type_size / n_rows) {
        fail(DIM_INVALID_ARGUMENT, "%zu rows of %zu values are too many", n_rows, n_per_row);
    }
    return n_per_row / block * t.type_size * n_rows;
}

static void check_size(size_t got, size_t expected) {
    if (got == expected) return;
    dim_fault fault = no_fault;
    fault.got = (int64_t) got, fault.expected = (int64_t) expected;
    fail_with(DIM_WRONG_SIZE, fault, "%zu bytes given, the rows take %zu", got, expected);
}

dim_status dim_type_describe(uint32_t type, dim_type_info * out) {
    return guarded([&] {
        initialize();
        const auto & t = traits(type);
        *out = { t.type_name, (uint32_t) t.blck_size, (uint32_t) t.type_size, can_dequantize(type),
                 can_quantize(type) };
    });
}

dim_status dim_quantize_rows(uint32_t type, const float * values, size_t n_rows, size_t n_per_row, uint8_t * out,
                             size_t out_len, dim_fault * fault) {
    return guarded(fault, [&] {
        initialize();
        check_size(out_len, size_of_rows(type, n_rows, n_per_row));
        if (!can_quantize(type))
            fail(DIM_INVALID_ARGUMENT, "%s cannot be made without an importance matrix", traits(type).type_name);
        for (size_t row = 0; row < n_rows; row++) {
            size_t bad = 0;
            for (size_t i = 0; i < n_per_row; i++) bad += !std::isfinite(values[row * n_per_row + i]);
            if (bad == 0) continue;
            dim_fault f = no_fault;
            f.row = (int64_t) row, f.got = (int64_t) bad;
            fail_with(DIM_INPUT_NOT_FINITE, f, "row %zu has %zu values that are not finite", row, bad);
        }
        const size_t written =
            ggml_quantize_chunk((ggml_type) type, values, out, 0, (int64_t) n_rows, (int64_t) n_per_row, nullptr);
        if (written != out_len) fail(DIM_INTERNAL, "ggml wrote %zu bytes of %zu", written, out_len);
    });
}

dim_status dim_dequantize_rows(uint32_t type, const uint8_t * rows, size_t rows_len, size_t n_rows, size_t n_per_row,
                               float * out, dim_fault * fault) {
    return guarded(fault, [&] {
        initialize();
        check_size(rows_len, size_of_rows(type, n_rows, n_per_row));
        if (!can_dequantize(type)) fail(DIM_INVALID_ARGUMENT, "%s cannot be turned into F32", traits(type).type_name);
        if (type == GGML_TYPE_F32) {
            std::memcpy(out, rows, rows_len);
            return;
        }
        const auto & t = traits(type);
        const size_t row_bytes = rows_len / n_rows;
        // ggml reads blocks as structs: a row that does not stand on their alignment is moved first
        std::vector<uint64_t> aligned(
            reinterpret_cast<uintptr_t>(rows) % alignof(uint64_t) || row_bytes % alignof(uint64_t) ? (row_bytes + 7) / 8
                                                                                                   : 0);
        for (size_t row = 0; row < n_rows; row++) {
            const void * from = rows + row * row_bytes;
            if (!aligned.empty()) from = std::memcpy(aligned.data(), from, row_bytes);
            t.to_float(from, out + row * n_per_row, (int64_t) n_per_row);
        }
    });
}
