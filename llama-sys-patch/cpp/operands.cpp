// The operations whose kernels look at the type of an operand, or at a number that comes out of the file, as ggml-cpu does:
// ops.cpp, binary-ops.cpp, unary-ops.cpp.
// Whatever runs on another device is run by the CPU where that device does not take it, so that these are the limits.
#include "operands.h"

#include "boundary.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cctype>
#include <cinttypes>
#include <cstring>
#include <string>

namespace dim {

static bool is_half(ggml_type type) { return type == GGML_TYPE_F16 || type == GGML_TYPE_BF16; }
static bool is_float(ggml_type type) { return type == GGML_TYPE_F32 || is_half(type); }
static bool is_index(ggml_type type) { return type == GGML_TYPE_I32 || type == GGML_TYPE_I64; }
static bool is_number(ggml_type type) { return is_float(type) || ggml_is_quantized(type); }

// ggml-cpu's binary_op()
static bool takes_pair(ggml_type a, ggml_type b, ggml_type result) {
    if (b == GGML_TYPE_F32 && is_float(a)) return result == a || result == GGML_TYPE_F32;
    return is_half(a) && b == a && result == a;
}

static bool takes_product(ggml_type matrix, ggml_type rows) {
    const auto * traits = ggml_get_type_traits_cpu(matrix);
    if (!traits->vec_dot || !is_number(matrix)) return false;
    return rows == GGML_TYPE_F32 || rows == traits->vec_dot_type ||
           (is_half(rows) && traits->vec_dot_type == GGML_TYPE_F32);
}

static bool takes_copy(ggml_type from, ggml_type to) {
    if (from == to) return true;
    if (from == GGML_TYPE_I32) return to == GGML_TYPE_F32;
    if (ggml_is_quantized(from)) return to == GGML_TYPE_F32;
    if (!is_float(from)) return false;
    return is_float(to) || (from == GGML_TYPE_F32 && to == GGML_TYPE_I32) || ggml_get_type_traits_cpu(to)->from_float;
}

// The first operands are F32, those from `first_other` on may be masks and tables.
static bool takes_f32(const ggml_tensor * node, int first_other = GGML_MAX_SRC) {
    for (int s = 0; s < GGML_MAX_SRC; s++) {
        if (!node->src[s]) continue;
        const auto type = node->src[s]->type;
        const bool other = s >= first_other && type == GGML_TYPE_F16;
        if (type != GGML_TYPE_F32 && !is_index(type) && !other) return false;
    }
    return true;
}

static bool is_taken(const ggml_tensor * node) {
    const auto type_of = [&](int s) { return node->src[s] ? node->src[s]->type : GGML_TYPE_F32; };
    const ggml_type a = type_of(0), b = type_of(1), result = node->type;
    switch (node->op) {
        case GGML_OP_NONE:
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:  return true;
        case GGML_OP_ADD:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV:        return takes_pair(a, b, result);
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID: return takes_product(a, b);
        case GGML_OP_GET_ROWS:   return (is_number(a) || a == GGML_TYPE_I32) && is_index(b);
        case GGML_OP_SET_ROWS:   return a == GGML_TYPE_F32 || a == GGML_TYPE_F16;
        case GGML_OP_DUP:
        case GGML_OP_CPY:
        case GGML_OP_CONT:       return takes_copy(a, result);
        case GGML_OP_CONCAT:     return a == b && (is_float(a) || a == GGML_TYPE_I32);
        case GGML_OP_REPEAT:     return is_float(a) || is_index(a);
        case GGML_OP_SET:
        case GGML_OP_ACC:        return a == b && (a == GGML_TYPE_F32 || a == GGML_TYPE_I32);
        case GGML_OP_SCALE:      return a == GGML_TYPE_F32 || a == GGML_TYPE_BF16;
        case GGML_OP_FILL:
        case GGML_OP_CLAMP:
        case GGML_OP_LEAKY_RELU:
        case GGML_OP_ROPE:
            // factors of the rotation are F32
            return (a == GGML_TYPE_F32 || a == GGML_TYPE_F16) && type_of(2) == GGML_TYPE_F32;
        case GGML_OP_UNARY:
        case GGML_OP_SQR:
        case GGML_OP_SQRT:
        case GGML_OP_LOG:
        case GGML_OP_SIN:
        case GGML_OP_COS:               return is_float(a) && (result == a || result == GGML_TYPE_F32);
        case GGML_OP_GLU:               return (a == GGML_TYPE_F32 || a == GGML_TYPE_F16) && result == a && (!node->src[1] || b == a);
        case GGML_OP_SOFT_MAX:          return a == GGML_TYPE_F32 && takes_f32(node, 1);
        case GGML_OP_FLASH_ATTN_EXT:    return a == GGML_TYPE_F32 && type_of(4) == GGML_TYPE_F32;
        case GGML_OP_LIGHTNING_INDEXER: return a == GGML_TYPE_F32 && type_of(2) == GGML_TYPE_F32;
        default:                        return takes_f32(node);
    }
}

static std::string type_name(const ggml_tensor * tensor) {
    std::string name = ggml_type_name(tensor->type);
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return (char) std::toupper(c); });
    return name;
}

// ggml_compute_forward_rope_flt(): of every row, pairs of the values from a first one on. Of none it does not come to an end.
static void check_rotation(const ggml_tensor * node) {
    const int32_t * params = node->op_params;
    const int64_t n_values = node->src[0]->ne[0], n_rotated = params[1], first = params[15];
    if (n_rotated <= 0 || n_rotated % 2 != 0 || first < 0 || first % 2 != 0 || first + n_rotated > n_values) {
        fail(DIM_LOAD_FAILED, "%s: llama.cpp cannot rotate %" PRId64 " of %" PRId64 " values (rope.dimension_count)",
             node->name, n_rotated, n_values);
    }
    const auto * factors = node->src[2];
    if (factors && factors->ne[0] < n_rotated / 2) {
        fail(DIM_LOAD_FAILED, "%s has %" PRId64 " factors for the rotation of %" PRId64 " values", factors->name,
             factors->ne[0], n_rotated);
    }
    const int mode = params[2];
    if (!(mode & GGML_ROPE_TYPE_MROPE)) return;
    // how many pairs follow the position in time, in height, in width, and another one
    const int32_t * sections = params + 11;
    const int64_t n_pairs = (int64_t) sections[0] + sections[1] + sections[2] + sections[3];
    const bool any = sections[0] > 0 || sections[1] > 0 || sections[2] > 0;
    const bool vision = mode == GGML_ROPE_TYPE_VISION;
    if (!any || n_pairs <= 0 || n_pairs > n_values || (vision && (n_rotated != n_values / 2 || first != 0))) {
        fail(DIM_LOAD_FAILED,
             "%s: llama.cpp cannot rotate %d, %d, %d and %d pairs of %" PRId64 " values "
             "(rope.dimension_sections)",
             node->name, sections[0], sections[1], sections[2], sections[3], n_values);
    }
}

static void check_epsilon(const ggml_tensor * node) {
    float epsilon;
    std::memcpy(&epsilon, node->op_params, sizeof(epsilon));
    if (!(epsilon >= 0.0f)) fail(DIM_LOAD_FAILED, "%s: llama.cpp has no norm with the epsilon %g", node->name, epsilon);
}

// Of operations whose operands are taken.
static void check_numbers(const ggml_tensor * node) {
    switch (node->op) {
        case GGML_OP_ROPE:     return check_rotation(node);
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM:
        case GGML_OP_L2_NORM:  return check_epsilon(node);
        default:               return;
    }
}

[[noreturn]] static void refuse(const dependencies & nodes, const ggml_tensor * node) {
    const ggml_tensor * weight = nullptr;
    std::string operands;
    for (const auto * src : node->src) {
        if (!src) continue;
        operands += (operands.empty() ? "" : " and ") + type_name(src);
        if (nodes.weights.has(base_of(src)) && (!weight || src->type != GGML_TYPE_F32)) weight = base_of(src);
    }
    if (weight) {
        fail(DIM_LOAD_FAILED, "%s is %s, for which llama.cpp has no %s (of %s)", weight->name,
             type_name(weight).c_str(), ggml_op_name(node->op), operands.c_str());
    }
    fail(DIM_LOAD_FAILED, "%s: llama.cpp has no %s of %s", node->name, ggml_op_name(node->op), operands.c_str());
}

void check_operands(const dependencies & nodes) {
    for (int i = 0; i < nodes.n_nodes(); i++) {
        const auto * node = nodes.node(i);
        // llama.cpp builds all kinds of input and marks the nodes of the one that was chosen
        if (!(node->flags & GGML_TENSOR_FLAG_COMPUTE)) continue;
        if (!is_taken(node)) refuse(nodes, node);
        check_numbers(node);
    }
}

}   // namespace dim
