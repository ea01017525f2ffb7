// One architecture on a GPU: a tiny random model, cut in three files, all blocks offloaded, the three one after another
// against llama_decode() of the whole on the same GPU. A prompt in chunks and 32 steps, the logits of every row.
//
// usage: sweep            lists the architectures
//        sweep ARCH DIR   compares one; its files go to DIR
//
// Exit code 0: the same bits; 1: other ones, with how much; 2: it cannot be cut, or no model is made of it, and why.
// tests/cuda/sweep.sh builds it and runs all. llama-sys-patch/tests/architectures.rs is the same comparison on the CPU.
#include "layer_eval.h"

#include "ggml-cpp.h"
#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <vector>

namespace {

constexpr uint32_t n_blocks = 8, cuts[] = { 3, 6 };
constexpr size_t n_prompt = 40, n_steps = 32;

void check(dim_status status, const char * what) {
    if (status == DIM_OK) return;
    std::printf("%s: %s\n", what, dim_last_error());
    std::exit(2);
}

struct range {
    uint32_t first, last;
    std::set<std::string> tensors;
    std::string file;
};

// What each range needs.
std::vector<range> plan(const std::string & model, uint32_t & n_all) {
    dim_plan * plan = nullptr;
    const char * path = model.c_str();
    check(dim_plan_open(&path, 1, &plan, nullptr), "plan");
    dim_model_info info{};
    check(dim_model_describe(dim_plan_model(plan), &info), "model");
    n_all = info.n_blocks;
    std::vector<range> ranges{ { 0, cuts[0], {}, "" }, { cuts[0], cuts[1], {}, "" }, { cuts[1], n_all, {}, "" } };
    for (auto & range : ranges) {
        if (range.first > 0) check(dim_plan_cut(plan, range.first), "cut");
        dim_range_plan needs{};
        check(dim_plan_range(plan, range.first, range.last, &needs), "range");
        for (size_t i = 0; i < needs.n_tensors; i++) {
            char name[GGML_MAX_NAME] = {};
            int64_t length = 0;
            check(dim_plan_tensor(plan, i, name, sizeof name - 1, &length), "tensor");
            range.tensors.insert(name);
        }
    }
    dim_plan_free(plan);
    return ranges;
}

// Writes the model's keys, the range's tensors, and what the others are called and how large they are.
void write_slice(const std::string & model, const range & range) {
    ggml_context * data = nullptr;
    const gguf_context_ptr from(gguf_init_from_file(model.c_str(), { /*no_alloc =*/false, &data }));
    const ggml_context_ptr owner(data);
    const gguf_context_ptr to(gguf_init_empty());
    gguf_set_kv(to.get(), from.get());
    std::vector<const char *> names;
    std::vector<uint32_t> types;
    std::vector<uint64_t> shapes;
    for (auto * tensor = ggml_get_first_tensor(data); tensor; tensor = ggml_get_next_tensor(data, tensor)) {
        if (gguf_find_tensor(from.get(), tensor->name) < 0) continue;   // the one that holds all bytes
        if (range.tensors.count(tensor->name)) {
            gguf_add_tensor(to.get(), tensor);
            continue;
        }
        names.push_back(tensor->name);
        types.push_back((uint32_t) tensor->type);
        for (const int64_t n : tensor->ne) shapes.push_back((uint64_t) n);
    }
    gguf_set_arr_str(to.get(), "dim.absent.names", names.data(), names.size());
    gguf_set_arr_data(to.get(), "dim.absent.types", GGUF_TYPE_UINT32, types.data(), types.size());
    gguf_set_arr_data(to.get(), "dim.absent.shapes", GGUF_TYPE_UINT64, shapes.data(), shapes.size());
    if (!gguf_write_to_file(to.get(), range.file.c_str(), false)) std::exit(2);
}

dim_model * load(const std::string & file, bool has_lm_head) {
    dim_model_params params{};
    params.gpu_blocks = -1;
    params.lm_head = has_lm_head;
    params.repack = true;
    dim_model * model = nullptr;
    const char * path = file.c_str();
    check(dim_model_load(&path, 1, &params, &model, nullptr), "load");
    return model;
}

dim_context_params context(const char * arch) {
    dim_context_params params{};
    params.n_ctx = 128;
    params.n_batch = n_prompt;
    params.n_ubatch = 16;
    params.n_threads = 1;
    params.max_sessions = 1;
    // llama.cpp asserts on a tiny model of it with fused attention
    params.flash_attn = std::strcmp(arch, "plm") ? DIM_FLASH_ATTN_AUTO : DIM_FLASH_ATTN_OFF;
    return params;
}

size_t width(const dim_stage * stage) {
    size_t n = 0, values = 0;
    check(dim_stage_crossing(stage, DIM_END_OUT, nullptr, 0, &n), "crossing");
    std::vector<dim_crossing> parts(n);
    check(dim_stage_crossing(stage, DIM_END_OUT, parts.data(), n, &n), "crossing");
    for (const auto & part : parts) values += part.n_values;
    return values;
}

// (n_rows, n_vocab)
std::vector<float> evaluate(const std::vector<dim_stage *> & stages, const std::vector<dim_row> & rows,
                            const int32_t * tokens, size_t n_vocab) {
    std::vector<float> between, next;
    for (size_t i = 0; i < stages.size(); i++) {
        const bool is_first = i == 0, is_last = i + 1 == stages.size();
        next.resize(rows.size() * (is_last ? n_vocab : width(stages[i])));
        size_t n = 0;
        check(dim_stage_evaluate(stages[i], rows.data(), rows.size(), tokens, is_first ? DIM_TOKENS : DIM_F32,
                                 is_first ? (const void *) tokens : between.data(),
                                 is_first ? rows.size() : between.size(), is_last ? DIM_LOGITS : DIM_F32, next.data(),
                                 next.size(), &n, nullptr),
              "evaluate");
        std::swap(between, next);
    }
    return between;
}

}   // namespace

int main(int argc, char ** argv) {
    if (argc == 1) {
        for (size_t i = 0; i < dim_test_architectures(); i++) std::printf("%s\n", dim_test_architecture(i));
        return 0;
    }
    if (argc != 3) return std::fprintf(stderr, "usage: sweep [ARCH DIR]\n"), 2;
    const char * arch = argv[1];
    const std::string folder = argv[2], model = folder + "/model.gguf";
    std::vector<const char *> options;
    for (size_t i = 0; *dim_test_option(arch, i); i++) options.push_back(dim_test_option(arch, i));
    check(dim_test_write_model(arch, n_blocks, options.data(), options.size(), model.c_str()), "no model");

    uint32_t n_all = 0;
    auto ranges = plan(model, n_all);
    std::vector<dim_stage *> stages;
    uint32_t on_device = 0;
    for (auto & range : ranges) {
        range.file = folder + "/" + std::to_string(range.first) + ".gguf";
        write_slice(model, range);
        auto * slice = load(range.file, range.last == n_all);
        dim_offload offload{};
        check(dim_model_offload(slice, &offload), "offload");
        on_device += offload.blocks_on_device;
        const dim_stage_params params{ context(arch), range.first, range.last, range.first == 0, range.last == n_all };
        dim_stage * stage = nullptr;
        check(dim_stage_create(slice, &params, &stage), "stage");
        stages.push_back(stage);
    }
    auto * whole = load(model, true);
    dim_model_info info{};
    check(dim_model_describe(whole, &info), "model");
    dim_stock * stock = nullptr;
    const auto params = context(arch);
    check(dim_stock_create(whole, &params, &stock), "stock");

    std::vector<int32_t> tokens(n_prompt + n_steps);
    for (size_t i = 0; i < tokens.size(); i++) tokens[i] = (int32_t) ((i * 7919 + 13) % info.n_vocab);
    double difference = 0, largest = 0;
    size_t n_other = 0;
    for (size_t at = 0; at < tokens.size();) {
        const size_t n = at == 0 ? n_prompt : 1;
        std::vector<dim_row> rows;
        for (size_t i = 0; i < n; i++) rows.push_back({ 0, (uint32_t) (at + i), true });
        const auto ours = evaluate(stages, rows, &tokens[at], info.n_vocab);
        std::vector<float> expected(ours.size());
        size_t written = 0;
        check(dim_stock_decode(stock, rows.data(), n, &tokens[at], n, expected.data(), expected.size(), &written,
                               nullptr),
              "decode");
        for (size_t i = 0; i < ours.size(); i++) {
            difference = std::max(difference, std::fabs((double) ours[i] - expected[i]));
            largest = std::max(largest, std::fabs((double) expected[i]));
            n_other += std::memcmp(&ours[i], &expected[i], sizeof(float)) != 0;
        }
        at += n;
    }
    std::printf("%u of %u blocks on a GPU, max |difference| %g of %g, %zu other values\n", on_device, n_all, difference,
                largest, n_other);
    std::fflush(stdout);
    dim_end_process(n_other != 0);
}
