// Slices: "plan, then fill".
//
//   plan   llama.cpp's loader runs over the slice as over the whole model, with `no_alloc`. What the file lacks is put
//          into the loader's index first, by name, type and shape. Every tensor gets the buffer type that it would have
//          in the whole model, and no memory. All that an architecture derives from its blocks' numbers, or from how
//          many there are, or from tensors of other blocks, is then right by construction.
//   fill   the tensors that are there get theirs from the loader's own functions: mapped, read, repacked or uploaded as
//          in any other model.
#include "boundary.h"
#include "graph.h"
#include "model.h"

#include "llama-model-loader.h"

#include <algorithm>
#include <map>

#if defined(__linux__)
#    include <sys/mman.h>
#    include <unistd.h>
#endif

namespace dim {

namespace {

// Puts the tensors that the file lacks into the loader's index: only their names, types and shapes are ever looked at.
ggml_context_ptr index_absent(llama_model_loader & loader, const std::vector<absent_tensor> & absent,
                              const char * path) {
    if (loader.weights_map.empty()) fail(DIM_BAD_SLICE, "%s: it holds no tensor at all: split the model again", path);
    ggml_context_ptr shapes(ggml_init({ (absent.size() + 1) * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true }));
    if (!shapes) throw std::bad_alloc();
    for (const auto & entry : absent) {
        auto * tensor = ggml_new_tensor(shapes.get(), entry.type, 4, entry.ne);
        ggml_set_name(tensor, entry.name.c_str());
        auto weight = loader.weights_map.begin()->second;   // its constructor wants a file that has it
        weight.tensor = tensor, weight.idx = 0, weight.offs = 0;
        loader.weights_map.emplace(entry.name, weight);
    }
    loader.n_tensors += (int) absent.size();
    return shapes;
}

// The blocks that the file holds, [first, last); last is 0 where it holds none.
void present_blocks(const llama_model_loader & loader, dim_model & made) {
    made.first = UINT32_MAX;
    for (const auto & [name, weight] : loader.weights_map) {
        const int block = block_of(name.c_str());
        if (block < 0) continue;
        made.first = std::min(made.first, (uint32_t) block);
        made.last = std::max(made.last, (uint32_t) block + 1);
    }
    if (made.last == 0) made.first = 0;
}

// llama.cpp's own choice of devices, from a look at the file that loads nothing but its keys.
std::vector<llama_device> choose_devices(const llama_model_params & params, const char * path) {
    std::vector<llama_device> devices;
    if (params.devices) {
        for (auto * device = params.devices; *device; device++) devices.push_back({ false, *device });
        return devices;
    }
    bool any = false;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) any |= is_gpu(ggml_backend_dev_get(i));
    if (!any) return devices;
    auto look = params;
    look.vocab_only = true;
    look.no_alloc = false;
    const llama_model_ptr other(llama_model_load_from_file(path, look));
    return other ? other->devices : devices;
}

// llama.cpp counts blocks on the GPU from the last of the whole model; asked for are `on_gpu` of those in the file.
int32_t gpu_layers_of_whole(const dim_model & made, uint32_t n_blocks, int32_t on_gpu) {
    return on_gpu == 0 ? 0 : (int32_t) n_blocks + 1 - ((int32_t) made.last - on_gpu);
}

// With several GPUs: divides the blocks that are there by the GPUs' free memory, and leaves all others to the last.
std::vector<float> split_of_present(const std::vector<llama_device> & devices, int32_t gpu_layers, int32_t on_gpu) {
    std::vector<float> split(std::max(llama_max_devices(), devices.size()), 0.0f);
    double all_free = 0;
    std::vector<double> free_bytes;
    for (const auto & device : devices) {
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(device.dev, &free, &total);
        free_bytes.push_back((double) std::max<size_t>(free, 1));
        all_free += free_bytes.back();
    }
    for (size_t i = 0; i < free_bytes.size(); i++) split[i] = (float) (free_bytes[i] / all_free * on_gpu);
    if (!free_bytes.empty()) split[free_bytes.size() - 1] += (float) (gpu_layers - on_gpu);
    return split;
}

// Weights that are read, and not mapped, lie on pages as large as the system has: every token reads all of them, and looks
// up a page for each piece. Where it does not know this advice, nothing happens.
void prefer_large_pages(ggml_backend_buffer_t buffer) {
#if defined(__linux__)
    if (!ggml_backend_buffer_is_host(buffer)) return;
    const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE);
    const auto begin = (uintptr_t) ggml_backend_buffer_get_base(buffer);
    const uintptr_t end = (begin + ggml_backend_buffer_get_size(buffer)) / page * page;
    const uintptr_t first = (begin + page - 1) / page * page;
    if (first < end) madvise((void *) first, end - first, MADV_HUGEPAGE);
#else
    (void) buffer;
#endif
}

struct fill_watch {
    llama_progress_callback progress;
    void * user;
};

// Fills the tensors of one buffer type, and copies where they are to the model's.
void fill(llama_model_loader & loader, dim_model & made, ggml_backend_buffer_type_t type,
          const std::vector<ggml_tensor *> & tensors, const fill_watch & watch) {
    const ggml_context_ptr copies(ggml_init({ tensors.size() * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true }));
    if (!copies) throw std::bad_alloc();
    for (const auto * tensor : tensors) ggml_set_name(ggml_dup_tensor(copies.get(), tensor), tensor->name);
    auto * device = ggml_backend_buft_get_device(type);
    if (!device) device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(device, &props);
    llama_buf_map buffers;
    if (loader.use_mmap && props.caps.buffer_from_host_ptr && type == ggml_backend_dev_buffer_type(device)) {
        for (uint32_t i = 0; i < loader.files.size(); i++) {
            size_t first = 0, last = 0;
            void * at = nullptr;
            loader.get_mapping_range(&first, &last, &at, (int) i, copies.get());
            if (first >= last) continue;
            auto * buffer = ggml_backend_dev_buffer_from_host_ptr(device, (char *) at + first, last - first,
                                                                  ggml_get_max_tensor_size(copies.get()));
            if (!buffer)
                fail(DIM_OUT_OF_MEMORY, "%.1f MiB of the file cannot be mapped", (double) (last - first) / (1 << 20));
            made.buffers.emplace_back(buffer);
            buffers.emplace(i, buffer);
        }
    } else {
        auto * buffer = ggml_backend_alloc_ctx_tensors_from_buft(copies.get(), type);
        if (!buffer) fail(DIM_OUT_OF_MEMORY, "no memory for weights on %s", ggml_backend_buft_name(type));
        made.buffers.emplace_back(buffer);
        prefer_large_pages(buffer);
        for (uint32_t i = 0; i < loader.files.size(); i++) buffers.emplace(i, buffer);
    }
    for (const auto & [file, buffer] : buffers)
        ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    if (!loader.load_all_data(copies.get(), buffers, nullptr, watch.progress, watch.user))
        fail(DIM_CANCELLED, "loading was stopped");
    auto * filled = ggml_get_first_tensor(copies.get());
    for (auto * tensor : tensors) {
        tensor->buffer = filled->buffer, tensor->data = filled->data, tensor->extra = filled->extra;
        filled = ggml_get_next_tensor(copies.get(), filled);
    }
}

void fill_all(llama_model_loader & loader, dim_model & made, bool use_mmap, const fill_watch & watch) {
    loader.no_alloc = false;
    loader.use_mmap = use_mmap;
    loader.init_mappings();
    std::map<ggml_backend_buffer_type_t, std::vector<ggml_tensor *>> by_type;
    loader.size_data = 0;   // of what is there, for the progress
    for (const auto & [name, tensor] : made.llama->tensors_by_name) {
        if (made.absent.count(tensor)) continue;
        auto * type = ggml_backend_buffer_get_type(tensor->buffer);
        auto * device = ggml_backend_buft_get_device(type);
        // pinned host memory, where the loader would have mapped
        if (use_mmap && device && type == ggml_backend_dev_host_buffer_type(device))
            type = ggml_backend_cpu_buffer_type();
        by_type[type].push_back(tensor);
        loader.size_data += ggml_nbytes(tensor);
    }
    // devices first: their tensors go through a staging buffer, which is cheapest while little is resident
    for (const bool host : { false, true }) {
        for (const auto & [type, tensors] : by_type) {
            if (ggml_backend_buft_is_host(type) == host) fill(loader, made, type, tensors, watch);
        }
    }
    made.mappings = std::move(loader.mappings);
}

}   // namespace

std::unique_ptr<dim_model> plan_then_fill(const char * const * paths, size_t n_paths, const gguf_context & header,
                                          llama_model_params params, int32_t gpu_blocks, bool with_bytes) {
    auto made = std::make_unique<dim_model>();
    const bool use_mmap = params.load_mode == LLAMA_LOAD_MODE_MMAP;
    const fill_watch watch{ params.progress_callback, params.progress_callback_user_data };
    params.load_mode = LLAMA_LOAD_MODE_NONE;   // with no_alloc nothing is mapped yet
    params.no_alloc = true;
    params.progress_callback = nullptr;

    std::vector<absent_tensor> absent;
    if (is_slice(header)) {
        if (n_paths != 1) fail(DIM_BAD_SLICE, "%s: a slice is one file, not %zu", paths[0], n_paths);
        absent = read_absent(header, paths[0]);
    }
    std::vector<std::string> parts;
    if (n_paths > 1) parts.assign(paths, paths + n_paths);
    llama_model_loader loader(nullptr, nullptr, nullptr, paths[0], parts, nullptr, params.load_mode,
                              params.check_tensors,
                              /*no_alloc =*/true, params.load_mtp, params.kv_overrides, params.tensor_buft_overrides);
    loader.lazy.mode = LLAMA_LAZY_MODE_OFF;
    present_blocks(loader, *made);
    const ggml_context_ptr shapes = index_absent(loader, absent, paths[0]);

    const uint32_t n_blocks = block_count(header);   // with those of MTP, which stand behind the last one
    if (made->last > n_blocks)
        fail(DIM_BAD_SLICE, "%s: it holds block %u of a model of %u", paths[0], made->last - 1, n_blocks);
    const auto devices = choose_devices(params, paths[0]);
    const auto held = (int32_t) (made->last - made->first);
    const int32_t on_gpu = gpu_blocks < 0 ? held : std::min(gpu_blocks, held);
    params.n_gpu_layers = devices.empty() ? 0 : gpu_layers_of_whole(*made, n_blocks, on_gpu);
    if (devices.size() > 1 && params.n_gpu_layers > 0) {
        made->tensor_split = split_of_present(devices, params.n_gpu_layers, on_gpu);
        params.tensor_split = made->tensor_split.data();
    }

    made->llama.reset(llama_model_create(loader, params));
    auto * model = dynamic_cast<llama_model_base *>(made->llama.get());
    if (!model) fail(DIM_UNSUPPORTED, "%s: llama.cpp makes no ordinary model of it", paths[0]);
    model->devices = devices;
    model->hparams.vocab_only = false;
    model->hparams.no_alloc = true;
    model->load_hparams(loader);
    made->last = std::min(made->last, model->hparams.n_layer());
    made->first = std::min(made->first, made->last);
    model->load_vocab(loader);
    model->load_stats(loader);
    if (!model->load_tensors(loader)) fail(DIM_CANCELLED, "%s: loading was stopped", paths[0]);

    for (const auto & entry : absent) loader.weights_map.erase(entry.name);
    for (const auto & [name, tensor] : made->llama->tensors_by_name) {
        if (!loader.get_weight(name.c_str())) made->absent.insert(tensor);
    }
    made->planned = !with_bytes;
    if (!with_bytes) return made;
    fill_all(loader, *made, use_mmap, watch);
    model->hparams.no_alloc = false;
    return made;
}

}   // namespace dim
