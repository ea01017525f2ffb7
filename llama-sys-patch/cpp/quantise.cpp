// Whole models in another type, by llama.cpp's own quantiser: what the comparison "would a quantised model not do?"
// runs.
#include "boundary.h"

#include "llama.h"

#include <cstring>

using namespace dim;

dim_status dim_model_quantise(const char * from, const char * to, const char * type, uint32_t n_threads) {
    return guarded([&] {
        initialize();
        auto params = llama_model_quantize_default_params();
        if (!std::strcmp(type, "q8_0")) {
            params.ftype = LLAMA_FTYPE_MOSTLY_Q8_0;
        } else if (!std::strcmp(type, "q4_k_m")) {
            params.ftype = LLAMA_FTYPE_MOSTLY_Q4_K_M;
        } else {
            fail(DIM_INVALID_ARGUMENT, "a model cannot be made %s here: q8_0 or q4_k_m", type);
        }
        if (n_threads < 1 || n_threads > 512) fail(DIM_INVALID_ARGUMENT, "%u threads: must be 1 to 512", n_threads);
        params.nthread = (int32_t) n_threads;
        forget_log();
        // catches what it throws itself, and says so in the log
        if (llama_model_quantize(from, to, &params) != 0) {
            const char * why = log_error_line();
            fail(DIM_LOAD_FAILED, "%s: %s", from, *why ? why : "llama.cpp could not quantise it");
        }
    });
}
