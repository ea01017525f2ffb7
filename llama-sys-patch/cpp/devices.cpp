// The devices that llama.cpp was built for and found.
#include "boundary.h"
#include "model.h"

#include "llama.h"

#include <cstdlib>
#include <cstring>
#include <string>

using namespace dim;

bool dim::is_gpu(ggml_backend_dev_t device) {
    const auto type = ggml_backend_dev_type(device);
    return type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
}

size_t dim_device_count(void) {
    size_t count = 0;
    guarded([&] {
        initialize();
        count = ggml_backend_dev_count();
    });
    return count;
}

dim_status dim_device_describe(size_t index, dim_device * out) {
    return guarded([&] {
        initialize();
        if (index >= ggml_backend_dev_count()) fail(DIM_INVALID_ARGUMENT, "there is no device number %zu", index);
        const auto device = ggml_backend_dev_get(index);
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(device, &free, &total);
        *out = { ggml_backend_dev_name(device), ggml_backend_dev_description(device), is_gpu(device), free, total };
    });
}

void dim_end_process(int code) { std::_Exit(code); }

ggml_backend_dev_t dim::find_gpu(const char * name) {
    std::string known;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        const auto device = ggml_backend_dev_get(i);
        if (!is_gpu(device)) continue;
        if (!std::strcmp(ggml_backend_dev_name(device), name)) return device;
        known += known.empty() ? "" : ", ";
        known += ggml_backend_dev_name(device);
    }
    fail(DIM_INVALID_ARGUMENT, "there is no GPU called \"%s\"; there is: %s", name,
         known.empty() ? "none" : known.c_str());
}
