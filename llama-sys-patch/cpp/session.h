// The sessions of a context: which positions each holds, and how far it can be taken back.
#pragma once

#include "layer_eval.h"
#include "upstream.h"

#include <vector>

namespace dim {

// Every session holds the positions 0 .. length(session).
//
// Keys and values can be forgotten one by one. A recurrent state cannot be taken back, but for the few rows that
// llama.cpp keeps snapshots of (`n_snapshots`), and only those of the last call. A call that fails half-way leaves such
// a session lost: it has to be cleared and evaluated again from its beginning.
class sessions {
public:
    // n_snapshots: rows that can be taken back; UINT32_MAX: all.
    sessions(uint32_t n_sessions, uint32_t n_ctx, uint32_t n_snapshots)
        : n_ctx(n_ctx), n_snapshots(n_snapshots), held(n_sessions) {}

    uint32_t count() const { return (uint32_t) held.size(); }

    // Checks that `rows` go on where their sessions end; throws the fault of the first that does not.
    void check(const dim_row * rows, size_t n_rows) const;

    // Checks the session and gives its length; of a lost one, the positions it had.
    uint32_t length(uint32_t session) const { return at(session).length; }

    // The lowest position, beside 0, that the session can be taken back to.
    uint32_t lowest(uint32_t session) const;

    // True: it has to be cleared first.
    bool is_lost(uint32_t session) const { return at(session).lost; }

    // After the rows were computed.
    void extend(const dim_row * rows, size_t n_rows);

    // Takes the rows of a failed call out of the memory again, or marks their sessions lost. Does not throw.
    void roll_back(llama_memory_i & memory, const dim_row * rows, size_t n_rows) noexcept;

    // Forgets a session's positions from `position` on.
    void rewind(llama_memory_i & memory, uint32_t session, uint32_t position);

private:
    struct state {
        uint32_t length = 0;
        uint32_t last_rows = 0;   // of the last call, in this session; 0: none, or already taken back
        bool lost = false;
    };
    const state & at(uint32_t session) const;
    bool limited() const { return n_snapshots != UINT32_MAX; }

    uint32_t n_ctx, n_snapshots;
    std::vector<state> held;
};

}   // namespace dim
