// The one place where C++ errors become C statuses. Every function of layer_eval.h is `return guarded(...)`.
#pragma once

#include "layer_eval.h"

#include <new>
#include <stdexcept>

#if defined(__GNUC__)
#    define DIM_FORMAT(fmt, first) __attribute__((format(printf, fmt, first)))
#else
#    define DIM_FORMAT(fmt, first)
#endif

namespace dim {

// No fault has all fields at their "none" values but those that a status names.
constexpr dim_fault no_fault = { -1, -1, -1, 0, 0, 0.0f };

// What our own code throws. The sentence is in the thread's message buffer already, so that throwing it needs no memory
// beyond the exception object itself.
struct failure {
    dim_status status;
    dim_fault fault;
};

// Formats the sentence and throws.
[[noreturn]] void fail(dim_status status, const char * format, ...) DIM_FORMAT(2, 3);
[[noreturn]] void fail_with(dim_status status, const dim_fault & fault, const char * format, ...) DIM_FORMAT(3, 4);

// Throws DIM_NOT_APART, with what dim_last_refusal() then gives.
[[noreturn]] void refuse(const dim_refusal & why);

// Sets the thread's sentence. Cut at 1023 bytes; never allocates.
void set_message(const char * format, ...) noexcept DIM_FORMAT(1, 2);

// llama.cpp's first line at level ERROR on this thread since forget_log(), without its newline; "" if there is none.
const char * log_error_line() noexcept;
void forget_log() noexcept;

// Installs our log callback and initialises llama.cpp, once per process. Called by everything that makes objects.
void initialize();

// Gives back to the system what was freed and malloc() would keep. After what frees much, and is done rarely.
void give_memory_back() noexcept;

// `thrown`: what an exception of llama.cpp means.
template <class Body> dim_status guarded(dim_fault * fault, Body && body, dim_status thrown = DIM_INTERNAL) noexcept {
    // The catch clauses below are all there are in this crate.
    try {
        body();
        return DIM_OK;
    } catch (const failure & e) {
        if (fault) *fault = e.fault;
        return e.status;
    } catch (const std::bad_alloc &) {
        set_message("out of memory");
        if (fault) *fault = no_fault;
        return DIM_OUT_OF_MEMORY;
    } catch (const std::exception & e) {
        set_message(thrown == DIM_INTERNAL ? "llama.cpp: %s" : "%s", e.what());
        if (fault) *fault = no_fault;
        return thrown;
    } catch (...) {
        set_message("llama.cpp threw something that is not an exception");
        if (fault) *fault = no_fault;
        return DIM_INTERNAL;
    }
}

template <class Body> dim_status guarded(Body && body) noexcept { return guarded(nullptr, static_cast<Body &&>(body)); }

// Where exceptions are how llama.cpp says that what it was given is wrong.
template <class Body> dim_status guarded_as(dim_status thrown, Body && body) noexcept {
    return guarded(nullptr, static_cast<Body &&>(body), thrown);
}

}   // namespace dim
