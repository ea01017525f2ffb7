// Messages, llama.cpp's log, initialisation.
#include "boundary.h"

#include "llama.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>

#if defined(__GLIBC__)
#    include <malloc.h>
#endif

namespace dim {

static thread_local char message[1024] = "";
static thread_local char log_error[1024] = "";
static thread_local dim_refusal refusal = {};

static std::atomic<int> log_shown{ DIM_LOG_SILENT };

static void format_message(const char * format, va_list args) noexcept {
    std::vsnprintf(message, sizeof message, format, args);
}

void set_message(const char * format, ...) noexcept {
    va_list args;
    va_start(args, format);
    format_message(format, args);
    va_end(args);
}

void fail(dim_status status, const char * format, ...) {
    va_list args;
    va_start(args, format);
    format_message(format, args);
    va_end(args);
    throw failure{ status, no_fault };
}

void fail_with(dim_status status, const dim_fault & fault, const char * format, ...) {
    va_list args;
    va_start(args, format);
    format_message(format, args);
    va_end(args);
    throw failure{ status, fault };
}

void refuse(const dim_refusal & why) {
    refusal = why;
    fail(DIM_NOT_APART, "blocks %u..%u of a %s model cannot be evaluated apart (reason %d%s%s)", why.first,
         why.last - 1, why.arch, (int) why.reason, *why.name ? ": " : "", why.name);
}

const char * log_error_line() noexcept { return log_error; }
void forget_log() noexcept { log_error[0] = '\0'; }

// Bytes at `at` that a terminal obeys, or that turn the text around them: controls, in UTF-8 those of Latin-1 too, and marks of
// direction and of lines. 0: it only shows what stands there.
static size_t hidden(const char * at) {
    const auto byte = [at](size_t i) { return (unsigned char) at[i]; };
    if (byte(0) < 0x20 || byte(0) == 0x7f) return byte(0) != '\n' && byte(0) != '\t';
    if (byte(0) == 0xc2) return byte(1) >= 0x80 && byte(1) < 0xa0 ? 2 : 0;
    if (byte(0) == 0xd8) return byte(1) == 0x9c ? 2 : 0;
    if (byte(0) != 0xe2) return 0;
    const unsigned char last = byte(1) ? byte(2) : 0;
    if (byte(1) == 0x80) return last == 0x8e || last == 0x8f || (last >= 0xa8 && last <= 0xae) ? 3 : 0;
    return byte(1) == 0x81 && last >= 0xa6 && last <= 0xa9 ? 3 : 0;
}

// To stderr, with what is hidden as \xHH: much of the log is text out of a file.
static void show(const char * text) {
    char safe[256];
    size_t n = 0;
    while (*text) {
        size_t rest = hidden(text);
        const bool is_hidden = rest > 0;
        for (rest = is_hidden ? rest : 1; rest > 0; --rest, ++text) {
            n += (size_t) std::snprintf(safe + n, 5, is_hidden ? "\\x%02x" : "%c", (unsigned char) *text);
            if (n + 5 <= sizeof safe) continue;
            std::fputs(safe, stderr);
            n = 0;
        }
    }
    if (n > 0) std::fputs(safe, stderr);
}

// Called by llama.cpp and ggml on whatever thread they are on. Must not throw: it is called from C.
static void on_log(ggml_log_level level, const char * text, void *) {
    static thread_local ggml_log_level continued = GGML_LOG_LEVEL_NONE;
    if (level != GGML_LOG_LEVEL_CONT) continued = level;

    // the first of several: the later ones say only that what called it failed too
    if (level == GGML_LOG_LEVEL_ERROR && log_error[0] == '\0') {
        std::snprintf(log_error, sizeof log_error, "%s", text);
        size_t n = std::strlen(log_error);
        while (n > 0 && (log_error[n - 1] == '\n' || log_error[n - 1] == ' ')) log_error[--n] = '\0';
    }

    const int shown = log_shown.load(std::memory_order_relaxed);
    const bool grave = continued == GGML_LOG_LEVEL_WARN || continued == GGML_LOG_LEVEL_ERROR;
    if (shown == DIM_LOG_EVERYTHING || (shown == DIM_LOG_WARNINGS && grave)) show(text);
}

// What ggml says last, before it ends the process. Its own way starts a debugger on the process to print a stack.
static void on_abort(const char * text) { std::fprintf(stderr, "%s\n", text); }

void initialize() {
    static std::once_flag once;
    std::call_once(once, [] {
        llama_log_set(on_log, nullptr);
        ggml_set_abort_callback(on_abort);
        llama_backend_init();
    });
}

void give_memory_back() noexcept {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}

}   // namespace dim

extern "C" const char * dim_last_error(void) { return dim::message; }

extern "C" void dim_last_refusal(dim_refusal * out) { *out = dim::refusal; }

extern "C" void dim_log_set(dim_log_level level) { dim::log_shown.store(level, std::memory_order_relaxed); }
