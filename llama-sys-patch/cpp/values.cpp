#include "values.h"

#include "boundary.h"

#include <cmath>
#include <cstring>

namespace dim {

// Plain loops, which the compiler turns into vector code.
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

static size_t count_not_logits(const float * x, size_t n) {
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

dim_fault find_bad_rows(const crossing & layout, dim_dtype type, const uint8_t * rows, size_t n_rows) {
    dim_fault fault = no_fault;
    for (size_t row = 0; row < n_rows; row++) {
        size_t bad = 0;
        for (const auto & part : layout.parts) {
            if (part.type == GGML_TYPE_F32) {
                bad += type == DIM_F16 ? count_not_finite(reinterpret_cast<const uint16_t *>(rows), part.n_values())
                                       : count_not_finite(reinterpret_cast<const float *>(rows), part.n_values());
            }
            rows += part.bytes(type);
        }
        if (bad > 0 && fault.row < 0) fault.row = (int64_t) row;
        fault.got += (int64_t) bad;
    }
    return fault;
}

dim_fault find_bad_logits(const float * logits, size_t n_rows, size_t n_vocab) {
    dim_fault fault = no_fault;
    for (size_t row = 0; row < n_rows; row++) {
        const size_t bad = count_not_logits(logits + row * n_vocab, n_vocab);
        if (bad > 0 && fault.row < 0) fault.row = (int64_t) row;
        fault.got += (int64_t) bad;
    }
    return fault;
}

}   // namespace dim
