//! Sizes and limits of the wire that more than one module needs. PROTOCOL.md, sections 5 and 12.

/// The size of the header that every message begins with: kind + a + b + length.
pub const HEADER: usize = 1 + 1 + 2 + 4;
/// The size of a [`Span`](dim_core::stage::Span) on the wire: session + position + count + zero.
pub const SPAN: usize = 4 + 4 + 4 + 4;
/// The size of a STEP up to its spans: header + step id + n_rows.
pub const STEP: usize = HEADER + 4 + 4;
/// The size of a STEP_DONE up to its rows: header + step id + n_rows + compute time + waiting time + when it began.
pub const STEP_DONE: usize = HEADER + 4 + 4 + 4 + 4 + 8;
/// The size of a part of a layout in terms: type + flags + zero + values.
pub const PART: usize = 1 + 1 + 2 + 4;
/// The most parts of a layout: of one way, in or out.
pub const MAX_PARTS: usize = 128;
/// The most bytes a string naming a device, a person's choice or a program has.
pub const MAX_NAME: usize = 64;
/// The most bytes the name of an architecture has.
pub const MAX_ARCH: usize = 32;
/// The most bytes a sentence for the user has.
pub const MAX_TEXT: usize = 1000;
/// The most files a push has.
pub const MAX_ITEMS: usize = 64;
/// The most bytes of a file in one PUSH_DATA.
pub const MAX_PUSH_DATA: usize = 262_144;
/// "None" in a field that holds a session or a block.
pub const NONE: u32 = u32::MAX;
/// The longest message before anything is agreed on, and the least limit after.
pub const OPENING_LIMIT: usize = 4096;
/// The longest message to a worker that is being pushed to.
pub const PUSH_LIMIT: usize = HEADER + 8 + MAX_PUSH_DATA;

/// The bytes of the token ids of so many rows, with what fills them up to a multiple of 8.
pub const fn token_bytes(n_rows: usize) -> usize {
    (4 * n_rows).next_multiple_of(8)
}

const _: () = assert!(STEP == 16 && STEP_DONE == 32 && SPAN == 16, "PROTOCOL.md, sections 5.3 and 5.4");
// terms, their two layouts, their strings, and REFUSE's text
const _: () =
    assert!(HEADER + 232 + 2 * MAX_PARTS * PART + 4 * (2 + MAX_NAME) + 2 + MAX_TEXT <= OPENING_LIMIT);
const _: () = assert!((STEP | SPAN | STEP_DONE).is_multiple_of(8), "rows begin at a multiple of 8");
const _: () = assert!(OPENING_LIMIT > HEADER && PUSH_LIMIT == 262_160, "PROTOCOL.md, section 12");
