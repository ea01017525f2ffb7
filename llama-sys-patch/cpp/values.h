// Values that are not numbers, in rows of a call.
#pragma once

#include "crossing.h"
#include "layer_eval.h"

namespace dim {

float max_abs_finite(const float * x, size_t n);

// F16 and F32 say "not finite" by an exponent of ones.
size_t count_not_finite(const uint16_t * x, size_t n);
size_t count_not_finite(const float * x, size_t n);

// A fault with the first bad row and the number of bad values; row is -1 if all are good. Of rows that cross; I32
// values are always good.
dim_fault find_bad_rows(const crossing & layout, dim_dtype type, const uint8_t * rows, size_t n_rows);

// The same of logits, which may be -inf: some models say so of tokens that must not come.
dim_fault find_bad_logits(const float * logits, size_t n_rows, size_t n_vocab);

}   // namespace dim
