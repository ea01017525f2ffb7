#include "context.h"

#include "llama.h"

#include <string>
#include <typeinfo>

namespace dim {

// Most positions of all sessions together: llama.cpp keeps some 60 bytes of bookkeeping for each.
constexpr uint64_t max_positions = 1u << 22;

static ggml_type kv_type(const dim_context_params & params) {
    return params.kv_type == DIM_KV_F32 ? GGML_TYPE_F32 : GGML_TYPE_F16;
}

// Refuses a KV cache of blocks [first, last) that is larger than the machine: the allocation would succeed, and writing to
// it would end the process.
static void check_kv_fits(const llama_model & model, const dim_context_params & params, uint32_t first, uint32_t last) {
    const uint64_t n_positions = (uint64_t) params.n_ctx * params.max_sessions;
    auto * cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!cpu) return;
    size_t free = 0, total = 0;
    ggml_backend_dev_memory(cpu, &free, &total);
    uint64_t bytes = 0;
    for (uint32_t block = first; block < last; block++) {
        if (model.dev_layer((int) block) != cpu || !model.hparams.has_kv(block)) continue;
        bytes += n_positions * (model.hparams.n_embd_k_gqa(block) + model.hparams.n_embd_v_gqa(block)) * ggml_type_size(kv_type(params));
    }
    if (total > 0 && bytes > total) {
        fail(DIM_OUT_OF_MEMORY, "a context of %llu positions needs %.1f GiB for keys and values; this machine has %.1f GiB",
             (unsigned long long) n_positions, (double) bytes / (1 << 30), (double) total / (1 << 30));
    }
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
    range("n_ctx",        params.n_ctx,        1, max_positions / params.max_sessions);
    range("n_batch",      params.n_batch,      1, 1u << 20);
    range("n_ubatch",     params.n_ubatch,     1, params.n_batch);
    range("n_ubatch",     params.n_ubatch,     params.max_sessions, params.n_batch);   // a chunk has a row of each session
    range("n_threads",    params.n_threads,    1, GGML_MAX_N_THREADS);

    auto p = llama_context_default_params();
    // Without one session more than asked for, and each with its own cells: the arithmetic of one session then is
    // llama.cpp's for one session. llama.cpp divides n_ctx among the sessions.
    p.n_ctx           = params.n_ctx * params.max_sessions;
    p.n_seq_max       = params.max_sessions;
    p.kv_unified      = false;
    p.n_batch         = params.n_batch;
    p.n_ubatch        = params.n_ubatch;
    p.n_threads       = (int32_t) params.n_threads;
    p.n_threads_batch = (int32_t) params.n_threads;
    p.n_outputs_max   = n_outputs_max;
    p.swa_full        = true;   // with a window-sized cache a session could not be rewound
    p.no_perf         = true;
    p.flash_attn_type = params.flash_attn == DIM_FLASH_ATTN_AUTO ? LLAMA_FLASH_ATTN_TYPE_AUTO
                      : params.flash_attn == DIM_FLASH_ATTN_ON   ? LLAMA_FLASH_ATTN_TYPE_ENABLED
                                                                 : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    p.type_k = p.type_v = kv_type(params);
    forget_log();
    llama_context_ptr ctx(llama_init_from_model(model, p));
    if (!ctx) {
        const char * why = log_error_line();
        fail(DIM_OUT_OF_MEMORY, "no context of %u positions x %u sessions: %s", params.n_ctx, params.max_sessions,
             *why ? why : "llama.cpp does not say why");
    }
    if (!ctx->get_memory()) fail(DIM_UNSUPPORTED, "%s keeps no KV cache", model->arch_name().c_str());
    return ctx;
}

llama_context_ptr make_context(llama_model * model, const dim_context_params & params, uint32_t n_outputs_max) {
    const std::lock_guard<std::mutex> lock(allocation_lock());
    check_kv_fits(*model, params, 0, model->hparams.n_layer());
    return new_context(model, params, n_outputs_max);
}

// The graph is built for all blocks before it is cut, and each block asks the cache for its keys and values. Those outside
// [first, last), which are cut away, are shown the ones of `first` instead: right for the shapes, and never computed.
static llama_memory_ptr own_cache(const llama_model & model, const llama_cparams & cparams, ggml_type type, uint32_t first, uint32_t last) {
    const auto & hparams = model.hparams;
    const auto own = [=](int32_t block) { return (uint32_t) block >= first && (uint32_t) block < last; };
    // llama.cpp asks `filter` for every block while it makes the caches; then, per block, `reuse` whose cache to take, and
    // `filter` once more whether to (upstream.h, point 10)
    bool made = false;
    const llama_memory_i::layer_filter_cb filter = [&](int32_t block) { return made || own(block); };
    const llama_memory_i::layer_reuse_cb  reuse  = [&](int32_t block) { made = true; return own(block) ? -1 : (int32_t) first; };
    return llama_memory_ptr(new llama_kv_cache(model, hparams, type, type, !cparams.flash_attn, cparams.offload_kqv, cparams.kv_unified,
            cparams.n_ctx_seq, cparams.n_seq_max, 1, hparams.n_swa, hparams.swa_type, nullptr, filter, reuse, nullptr));
}

stage_context make_stage_context(llama_model * model, const dim_context_params & params, uint32_t first, uint32_t last) {
    const auto & hparams = model->hparams;
    stage_context stage;
    {
        const no_allocation nothing(*model);
        // one row of output per session is reserved: the logits of a prompt's last row; more are allocated when asked for
        stage.context = new_context(model, params, params.max_sessions);
    }
    const llama_memory_i & kind = *stage.context->get_memory();
    const bool alike = typeid(kind) == typeid(llama_kv_cache)
                    && !hparams.is_n_embd_k_gqa_variable() && !hparams.is_n_embd_v_gqa_variable();
    check_kv_fits(*model, params, alike ? first : 0, alike ? last : hparams.n_layer());
    const std::lock_guard<std::mutex> lock(allocation_lock());
    const ggml_type type = kv_type(params);
    const auto & cparams = stage.context->get_cparams();
    // llama.cpp throws what is no bad_alloc where a device has no room
    const auto status = guarded([&] {
        if (alike) stage.memory = own_cache(*model, cparams, type, first, last);
        else       stage.memory.reset(model->create_memory({ type, type, /*swa_full =*/ true, cparams.ctx_type, nullptr }, cparams));
    });
    if (status != DIM_OK) {
        const std::string why = dim_last_error();
        fail(DIM_OUT_OF_MEMORY, "no KV cache of %u positions x %u sessions: %s", params.n_ctx, params.max_sessions, why.c_str());
    }
    return stage;
}

std::mutex & allocation_lock() {
    static std::mutex lock;
    return lock;
}

no_allocation::no_allocation(llama_model & model) : lock(allocation_lock()), model(model) {
    model.hparams.no_alloc = true;
}

no_allocation::~no_allocation() {
    model.hparams.no_alloc = false;
}

dim_context_info describe(const llama_context & ctx, const llama_memory_i & memory) {
    const std::lock_guard<std::mutex> lock(allocation_lock());
    dim_context_info info {};
    info.n_batch    = ctx.n_batch();
    info.n_ubatch   = ctx.n_ubatch();
    info.flash_attn = ctx.get_cparams().flash_attn;
    for (const auto & [type, bytes] : ctx.memory_breakdown()) {
        info.output_bytes  += bytes.context;
        info.compute_bytes += bytes.compute;
    }
    // llama.cpp counts the context's own cache among `context`
    for (const auto & [type, bytes] : ctx.get_memory()->memory_breakdown()) info.output_bytes -= bytes;
    for (const auto & [type, bytes] : memory.memory_breakdown())            info.kv_bytes     += bytes;
    return info;
}

uint32_t sessions::length(uint32_t session) const {
    if (session >= lengths.size()) {
        dim_fault fault = no_fault;
        fault.session  = session;
        fault.got      = session;
        fault.expected = (int64_t) lengths.size();
        fail_with(DIM_UNKNOWN_SESSION, fault, "session %u: there are %zu", session, lengths.size());
    }
    return lengths[session];
}

void sessions::check(const dim_row * rows, size_t n_rows) const {
    auto next = lengths;
    for (size_t i = 0; i < n_rows; i++) {
        const auto & row = rows[i];
        dim_fault fault = no_fault;
        fault.row     = (int64_t) i;
        fault.session = row.session;
        if (row.session >= next.size()) {
            fault.got      = row.session;
            fault.expected = (int64_t) next.size();
            fail_with(DIM_UNKNOWN_SESSION, fault, "row %zu: session %u, but there are %zu", i, row.session, next.size());
        }
        auto & expected = next[row.session];
        fault.got = row.position;
        if (row.position != expected) {
            fault.expected = expected;
            fail_with(DIM_WRONG_POSITION, fault, "row %zu: position %u of session %u, expected %u", i, row.position, row.session, expected);
        }
        if (row.position >= n_ctx) {
            fault.expected = n_ctx;
            fail_with(DIM_CONTEXT_FULL, fault, "row %zu: position %u of session %u: the context holds %u", i, row.position, row.session, n_ctx);
        }
        expected++;
    }
}

void sessions::extend(const dim_row * rows, size_t n_rows) {
    for (size_t i = 0; i < n_rows; i++) lengths[rows[i].session]++;
}

void sessions::roll_back(llama_memory_i & memory, const dim_row * rows, size_t n_rows) const noexcept {
    for (size_t i = 0; i < n_rows; i++) {
        const auto session = rows[i].session;
        guarded([&] { memory.seq_rm((llama_seq_id) session, (llama_pos) lengths[session], -1); });
    }
}

void sessions::rewind(llama_memory_i & memory, uint32_t session, uint32_t position) {
    const uint32_t held = length(session);
    if (position > held) {
        dim_fault fault = no_fault;
        fault.session  = session;
        fault.got      = position;
        fault.expected = held;
        fail_with(DIM_WRONG_POSITION, fault, "session %u holds %u positions: cannot rewind it to %u", session, held, position);
    }
    if (!memory.seq_rm((llama_seq_id) session, (llama_pos) position, -1)) {
        fail(DIM_UNSUPPORTED, "this model's memory cannot be rewound to position %u", position);
    }
    lengths[session] = position;
}

void check_n_rows(const llama_context & ctx, size_t n_rows) {
    dim_fault fault = no_fault;
    fault.got      = (int64_t) n_rows;
    fault.expected = ctx.n_batch();
    if (n_rows == 0)            fail_with(DIM_INVALID_ARGUMENT, fault, "no rows given");
    if (n_rows > ctx.n_batch()) fail_with(DIM_TOO_MANY_ROWS, fault, "%zu rows at once: at most %u", n_rows, ctx.n_batch());
}

void check_tokens(const llama_model & model, const int32_t * tokens, size_t n_tokens) {
    const int64_t n_vocab = model.vocab.n_tokens();
    for (size_t i = 0; i < n_tokens; i++) {
        if (tokens[i] >= 0 && tokens[i] < n_vocab) continue;
        dim_fault fault = no_fault;
        fault.row      = (int64_t) i;
        fault.got      = tokens[i];
        fault.expected = n_vocab;
        fail_with(DIM_UNKNOWN_TOKEN, fault, "row %zu: token %d is not in the vocabulary of %lld", i, tokens[i], (long long) n_vocab);
    }
}

} // namespace dim
