#include "context.h"

#include "room.h"

#include "llama.h"

#include <string>

namespace dim {

// Most positions of all sessions together: llama.cpp keeps some 60 bytes of bookkeeping for each.
constexpr uint64_t max_positions = 1u << 22;

static ggml_type kv_type(const dim_context_params & params) {
    return params.kv_type == DIM_KV_F32 ? GGML_TYPE_F32 : GGML_TYPE_F16;
}

// Refuses what is larger than the machine: the allocation would succeed, and writing to it would end the process.
static void check_fits(uint64_t bytes, const dim_context_params & params, const char * what) {
    const uint64_t total = memory_limit();
    if (total > 0 && bytes > total) {
        fail(DIM_OUT_OF_MEMORY, "a context of %llu positions needs %.1f GiB for %s; this machine has %.1f GiB",
             (unsigned long long) params.n_ctx * params.max_sessions, (double) bytes / (1 << 30), what,
             (double) total / (1 << 30));
    }
}

// Recurrent states of all blocks: llama.cpp allocates these whatever it is told.
static void check_states_fit(const llama_model & model, const dim_context_params & params) {
    uint64_t bytes = 0;
    for (uint32_t block = 0; block < model.hparams.n_layer(); block++) {
        if (!model.hparams.is_recr(block)) continue;
        const uint64_t per_state = (uint64_t) model.hparams.n_embd_r() + model.hparams.n_embd_s();
        bytes += per_state * sizeof(float) * params.max_sessions * (1 + params.n_snapshots);
    }
    check_fits(bytes, params, "recurrent states");
}

// Keys and values of all blocks, for stock contexts; a stage counts its own (state.cpp).
static void check_kv_fits(const llama_model & model, const dim_context_params & params) {
    const uint64_t n_positions = (uint64_t) params.n_ctx * params.max_sessions;
    const auto * cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    uint64_t bytes = 0;
    for (uint32_t block = 0; block < model.hparams.n_layer(); block++) {
        if (model.dev_layer((int) block) != cpu || !model.hparams.has_kv(block)) continue;
        const uint64_t width = model.hparams.n_embd_k_gqa(block) + model.hparams.n_embd_v_gqa(block);
        bytes += n_positions * width * ggml_type_size(kv_type(params));
    }
    check_fits(bytes, params, "keys and values");
}

// The caller holds allocation_lock().
static llama_context_ptr new_context(llama_model * model, const dim_context_params & params, uint32_t n_outputs_max) {
    const auto range = [](const char * name, uint64_t value, uint64_t least, uint64_t most) {
        if (value < least || value > most) {
            fail(DIM_INVALID_ARGUMENT, "%s is %llu: must be %llu to %llu", name, (unsigned long long) value,
                 (unsigned long long) least, (unsigned long long) most);
        }
    };
    range("max_sessions", params.max_sessions, 1, LLAMA_MAX_SEQ);
    range("n_ctx", params.n_ctx, 1, max_positions / params.max_sessions);
    range("n_batch", params.n_batch, 1, 1u << 20);
    range("n_ubatch", params.n_ubatch, 1, params.n_batch);
    // a chunk has a row of each session
    range("n_ubatch", params.n_ubatch, params.max_sessions, params.n_batch);
    range("n_threads", params.n_threads, 1, GGML_MAX_N_THREADS);
    range("n_snapshots", params.n_snapshots, 0, params.n_ubatch - 1);   // the rows they are of stand in one chunk

    auto p = llama_context_default_params();
    // Without one session more than asked for, and each with its own cells: the arithmetic of one session then is
    // llama.cpp's for one session. llama.cpp divides n_ctx among the sessions.
    p.n_ctx = params.n_ctx * params.max_sessions;
    p.n_seq_max = params.max_sessions;
    p.kv_unified = false;
    p.n_batch = params.n_batch;
    p.n_ubatch = params.n_ubatch;
    p.n_threads = (int32_t) params.n_threads;
    p.n_threads_batch = (int32_t) params.n_threads;
    p.n_outputs_max = n_outputs_max;
    p.n_rs_seq = params.n_snapshots;
    p.swa_full = true;   // with a window-sized cache a session could not be rewound
    p.no_perf = true;
    p.flash_attn_type = params.flash_attn == DIM_FLASH_ATTN_AUTO ? LLAMA_FLASH_ATTN_TYPE_AUTO
                        : params.flash_attn == DIM_FLASH_ATTN_ON ? LLAMA_FLASH_ATTN_TYPE_ENABLED
                                                                 : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    p.type_k = p.type_v = kv_type(params);
    const std::string what = "a context of " + std::to_string(p.n_ctx) + " positions";
    // each thread has a stack
    check_room((uint64_t) params.n_threads << 20, false, what.c_str());
    forget_log();
    llama_context_ptr ctx(llama_init_from_model(model, p));
    if (!ctx) {
        const char * why = log_error_line();
        fail(DIM_OUT_OF_MEMORY, "no context of %u positions x %u sessions: %s", params.n_ctx, params.max_sessions,
             *why ? why : "llama.cpp does not say why");
    }
    // what is computed with is made while it is
    check_room(0, false, what.c_str());
    if (!ctx->get_memory())
        fail(DIM_UNSUPPORTED, "a %s model keeps no memory: it does not generate token by token",
             model->arch_name().c_str());
    return ctx;
}

llama_context_ptr make_context(llama_model * model, const dim_context_params & params, uint32_t n_outputs_max) {
    const std::lock_guard<std::mutex> lock(allocation_lock());
    check_kv_fits(*model, params);
    check_states_fit(*model, params);
    return new_context(model, params, n_outputs_max);
}

stage_context make_stage_context(llama_model & model, const dim_context_params & params, const block_range & range) {
    const auto type = kv_type(params);
    check_states_fit(model, params);
    const no_allocation nothing(model);
    stage_context made;
    // one row of output per session is reserved: the logits of a prompt's last row; more are allocated when asked for
    made.context = new_context(&model, params, params.max_sessions);
    // llama.cpp throws what is no bad_alloc where a device has no room
    const auto status = guarded([&] {
        const llama_memory_params memory{ type, type, /*swa_full =*/true, made.context->get_cparams().ctx_type,
                                          nullptr };
        made.memory = std::make_unique<stage_memory>(model, *made.context, range, memory);
    });
    if (status != DIM_OK) {
        const std::string why = dim_last_error();
        fail(DIM_OUT_OF_MEMORY, "no cache of %u positions x %u sessions: %s", params.n_ctx, params.max_sessions,
             why.c_str());
    }
    return made;
}

std::mutex & allocation_lock() {
    static std::mutex lock;
    return lock;
}

no_allocation::no_allocation(llama_model & model)
    : lock(allocation_lock()), model(model), before(model.hparams.no_alloc) {
    model.hparams.no_alloc = true;
}

no_allocation::~no_allocation() { model.hparams.no_alloc = before; }

dim_context_info describe(const llama_context & ctx) {
    const std::lock_guard<std::mutex> lock(allocation_lock());
    dim_context_info info{};
    info.n_batch = ctx.n_batch();
    info.n_ubatch = ctx.n_ubatch();
    info.flash_attn = ctx.get_cparams().flash_attn;
    for (const auto & [type, bytes] : ctx.memory_breakdown()) {
        info.output_bytes += bytes.context;
        info.compute_bytes += bytes.compute;
    }
    // llama.cpp counts the context's own cache among `context`
    for (const auto & [type, bytes] : ctx.get_memory()->memory_breakdown()) info.kv_bytes += bytes;
    info.output_bytes -= info.kv_bytes;
    return info;
}

void check_n_rows(const llama_context & ctx, size_t n_rows) {
    dim_fault fault = no_fault;
    fault.got = (int64_t) n_rows;
    fault.expected = ctx.n_batch();
    if (n_rows == 0) fail_with(DIM_INVALID_ARGUMENT, fault, "no rows given");
    if (n_rows > ctx.n_batch())
        fail_with(DIM_TOO_MANY_ROWS, fault, "%zu rows at once: at most %u", n_rows, ctx.n_batch());
}

void check_tokens(const llama_model & model, const int32_t * tokens, size_t n_tokens) {
    const int64_t n_vocab = model.vocab.n_tokens();
    for (size_t i = 0; i < n_tokens; i++) {
        if (tokens[i] >= 0 && tokens[i] < n_vocab) continue;
        dim_fault fault = no_fault;
        fault.row = (int64_t) i;
        fault.got = tokens[i];
        fault.expected = n_vocab;
        fail_with(DIM_UNKNOWN_TOKEN, fault, "row %zu: token %d is not in the vocabulary of %lld", i, tokens[i],
                  (long long) n_vocab);
    }
}

}   // namespace dim
