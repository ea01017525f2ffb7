// Whether the CPU's kernels take the types and numbers that a graph's operations are given.
#pragma once

#include "graph.h"

namespace dim {

// ggml takes any type of operand when a graph is built, and ends the process when a kernel meets one that it does not
// compute: a norm that is BF16, say, or a rotation of seven values. Fails (DIM_LOAD_FAILED) with the tensor of the file that is
// of such a type, or with the number.
void check_operands(const dependencies & nodes);

}   // namespace dim
