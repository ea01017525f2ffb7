#include "session.h"

#include "boundary.h"

#include <algorithm>

namespace dim {

const sessions::state & sessions::at(uint32_t session) const {
    if (session >= held.size()) {
        dim_fault fault = no_fault;
        fault.session = session;
        fault.got = session;
        fault.expected = (int64_t) held.size();
        fail_with(DIM_UNKNOWN_SESSION, fault, "session %u: there are %zu", session, held.size());
    }
    return held[session];
}

[[noreturn]] static void lost(int64_t row, uint32_t session) {
    dim_fault fault = no_fault;
    fault.row = row;
    fault.session = session;
    fail_with(DIM_SESSION_LOST, fault,
              "session %u was lost in a call that failed: clear it and evaluate it again from its beginning", session);
}

void sessions::check(const dim_row * rows, size_t n_rows) const {
    std::vector<uint32_t> next;
    for (const auto & session : held) next.push_back(session.length);
    for (size_t i = 0; i < n_rows; i++) {
        const auto & row = rows[i];
        dim_fault fault = no_fault;
        fault.row = (int64_t) i;
        fault.session = row.session;
        if (row.session >= next.size()) {
            fault.got = row.session;
            fault.expected = (int64_t) next.size();
            fail_with(DIM_UNKNOWN_SESSION, fault, "row %zu: session %u, but there are %zu", i, row.session,
                      next.size());
        }
        if (held[row.session].lost) lost((int64_t) i, row.session);
        auto & expected = next[row.session];
        fault.got = row.position;
        if (row.position != expected) {
            fault.expected = expected;
            fail_with(DIM_WRONG_POSITION, fault, "row %zu: position %u of session %u, expected %u", i, row.position,
                      row.session, expected);
        }
        if (row.position >= n_ctx) {
            fault.expected = n_ctx;
            fail_with(DIM_CONTEXT_FULL, fault, "row %zu: position %u of session %u: the context holds %u", i,
                      row.position, row.session, n_ctx);
        }
        expected++;
    }
}

uint32_t sessions::lowest(uint32_t session) const {
    const auto & s = at(session);
    if (!limited()) return 0;
    if (s.lost || s.last_rows == 0) return s.length;
    // Before the first row of the last call there is no snapshot of that call's.
    return s.length - std::min(n_snapshots, s.last_rows - 1);
}

void sessions::extend(const dim_row * rows, size_t n_rows) {
    // a chunk moves other sessions' states, and does not move their snapshots along
    for (auto & session : held) session.last_rows = 0;
    for (size_t i = 0; i < n_rows; i++) {
        held[rows[i].session].length++;
        held[rows[i].session].last_rows++;
    }
}

void sessions::roll_back(llama_memory_i & memory, const dim_row * rows, size_t n_rows) noexcept {
    for (auto & session : held) session.last_rows = 0;
    for (size_t i = 0; i < n_rows; i++) {
        auto & session = held[rows[i].session];
        if (limited() && session.length > 0) {
            session.lost = true;
            continue;
        }
        bool done = false;
        guarded([&] { done = memory.seq_rm((llama_seq_id) rows[i].session, (llama_pos) session.length, -1); });
        if (!done) session.lost = true;
    }
}

void sessions::rewind(llama_memory_i & memory, uint32_t session, uint32_t position) {
    const auto & s = at(session);
    dim_fault fault = no_fault;
    fault.session = session;
    fault.got = position;
    if (position > s.length) {
        fault.expected = s.length;
        fail_with(DIM_WRONG_POSITION, fault, "session %u holds %u positions: cannot rewind it to %u", session, s.length,
                  position);
    }
    if (position > 0) {
        if (s.lost) lost(-1, session);
        if (position == s.length) return;
        fault.expected = lowest(session);
        if (position < lowest(session)) {
            fail_with(DIM_CANNOT_REWIND, fault,
                      "session %u holds %u positions and cannot be taken back to %u (to %u at the least, or to "
                      "nothing): evaluate it again",
                      session, s.length, position, lowest(session));
        }
    }
    if (!memory.seq_rm((llama_seq_id) session, (llama_pos) position, -1)) {
        fault.expected = s.length;
        fail_with(DIM_CANNOT_REWIND, fault,
                  "this model's memory cannot be rewound to position %u: evaluate the session again", position);
    }
    held[session] = { position, 0, false };
}

}   // namespace dim
