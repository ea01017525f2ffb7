// The three keys by which a slice says what it lacks. They come from a file, and ggml ends the process on most things
// that could be wrong with them: every field is checked here first.
#include "boundary.h"
#include "model.h"

#include <cstring>
#include <limits>
#include <unordered_set>

namespace dim {

constexpr const char * key_names = "dim.absent.names";
constexpr const char * key_types = "dim.absent.types";     // ggml's numbers
constexpr const char * key_shapes = "dim.absent.shapes";   // four per tensor
constexpr size_t max_absent = 1u << 20;

bool is_slice(const gguf_context & file) {
    return gguf_find_key(&file, key_names) >= 0 || gguf_find_key(&file, key_types) >= 0 ||
           gguf_find_key(&file, key_shapes) >= 0;
}

gguf_file open_header(const char * path) {
    return gguf_file(gguf_init_from_file(path, { /*no_alloc =*/true, nullptr }), gguf_free);
}

uint32_t block_count(const gguf_context & file) {
    const int64_t arch = gguf_find_key(&file, "general.architecture");
    if (arch < 0 || gguf_get_kv_type(&file, arch) != GGUF_TYPE_STRING) return 0;
    const int64_t count = gguf_find_key(&file, (std::string(gguf_get_val_str(&file, arch)) + ".block_count").c_str());
    return count >= 0 && gguf_get_kv_type(&file, count) == GGUF_TYPE_UINT32 ? gguf_get_val_u32(&file, count) : 0;
}

namespace {

// The place of an array of `type`.
int64_t find_array(const gguf_context & file, const char * path, const char * key, gguf_type type) {
    const int64_t at = gguf_find_key(&file, key);
    if (at < 0) fail(DIM_BAD_SLICE, "%s: %s is missing: split the model again", path, key);
    if (gguf_get_kv_type(&file, at) != GGUF_TYPE_ARRAY || gguf_get_arr_type(&file, at) != type) {
        fail(DIM_BAD_SLICE, "%s: %s is not a list of %s: split the model again", path, key, gguf_type_name(type));
    }
    return at;
}

[[noreturn]] void bad(const char * path, size_t entry, const std::string & name, const char * why) {
    dim_fault fault = no_fault;
    fault.row = (int64_t) entry;
    std::string shown;
    for (const char c : name.substr(0, 64)) shown += c >= 32 && c < 127 ? c : '?';
    fail_with(DIM_BAD_SLICE, fault, "%s: absent tensor %zu (\"%s\") %s: split the model again", path, entry,
              shown.c_str(), why);
}

const char * why_bad_type(uint32_t type) {
    if (type >= GGML_TYPE_COUNT) return "has a type that ggml does not know";
    const auto * traits = ggml_get_type_traits((ggml_type) type);
    return !traits->type_name || traits->blck_size <= 0 || traits->type_size == 0
               ? "has a type that ggml no longer knows"
               : nullptr;
}

const char * why_bad_shape(ggml_type type, const uint64_t * shape) {
    const auto * traits = ggml_get_type_traits(type);
    uint64_t n = 1;
    for (int d = 0; d < 4; d++) {
        if (shape[d] < 1) return "has a dimension of 0";
        if (shape[d] > (uint64_t) std::numeric_limits<int64_t>::max()) return "has a dimension that is too large";
        if (n > (uint64_t) std::numeric_limits<int64_t>::max() / shape[d]) return "has more values than can be counted";
        n *= shape[d];
    }
    const uint64_t block = (uint64_t) traits->blck_size;
    if (shape[0] % block != 0) return "has rows that are not a whole number of its type's blocks";
    // ggml pads what it allocates, too
    if (n / block > (uint64_t) std::numeric_limits<int64_t>::max() / 2 / traits->type_size)
        return "has more bytes than can be counted";
    return nullptr;
}

// Where a name of a block's tensor has its block; false for one of no block, or that only looks like one.
bool parse_block(const std::string & name, uint64_t & block) {
    if (name.compare(0, 4, "blk.") != 0) return false;
    const size_t end = name.find_first_not_of("0123456789", 4);
    if (end == 4 || end == std::string::npos || name[end] != '.' || end > 4 + 9) return false;
    block = std::stoull(name.substr(4, end - 4));
    return true;
}

}   // namespace

std::vector<absent_tensor> read_absent(const gguf_context & file, const char * path) {
    const int64_t at_names = find_array(file, path, key_names, GGUF_TYPE_STRING);
    const int64_t at_types = find_array(file, path, key_types, GGUF_TYPE_UINT32);
    const int64_t at_shapes = find_array(file, path, key_shapes, GGUF_TYPE_UINT64);
    const size_t n = gguf_get_arr_n(&file, at_names);
    if (n > max_absent) fail(DIM_BAD_SLICE, "%s: %s has %zu entries: split the model again", path, key_names, n);
    if (gguf_get_arr_n(&file, at_types) != n) {
        fail(DIM_BAD_SLICE, "%s: %zu names of absent tensors, but %zu types: split the model again", path, n,
             gguf_get_arr_n(&file, at_types));
    }
    if (gguf_get_arr_n(&file, at_shapes) != 4 * n) {
        fail(DIM_BAD_SLICE, "%s: %zu names of absent tensors, but %zu dimensions (four each): split the model again",
             path, n, gguf_get_arr_n(&file, at_shapes));
    }
    const auto * types = n ? static_cast<const uint32_t *>(gguf_get_arr_data(&file, at_types)) : nullptr;
    const auto * shapes = n ? static_cast<const uint64_t *>(gguf_get_arr_data(&file, at_shapes)) : nullptr;
    const uint32_t n_blocks = block_count(file);
    std::vector<absent_tensor> absent;
    std::unordered_set<std::string> seen;
    for (size_t i = 0; i < n; i++) {
        const std::string name = gguf_get_arr_str(&file, at_names, i);
        const char * why = nullptr;
        uint64_t block = 0;
        if (name.empty())
            why = "has no name";
        else if (name.size() >= GGML_MAX_NAME)
            why = "has a name that is too long";
        else if (!seen.insert(name).second)
            why = "is named twice";
        else if (gguf_find_tensor(&file, name.c_str()) >= 0)
            why = "is in the file as well";
        else if (!name.compare(0, 4, "blk.") && !parse_block(name, block))
            why = "has a name without a block's number";
        else if (parse_block(name, block) && block >= n_blocks)
            why = "is of a block that the model does not have";
        if (!why) why = why_bad_type(types[i]);
        if (!why) why = why_bad_shape((ggml_type) types[i], shapes + 4 * i);
        if (why) bad(path, i, name, why);
        absent_tensor tensor{ name, (ggml_type) types[i], {} };
        for (size_t d = 0; d < 4; d++) tensor.ne[d] = (int64_t) shapes[4 * i + d];
        absent.push_back(std::move(tensor));
    }
    return absent;
}

}   // namespace dim
