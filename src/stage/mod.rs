//! A stage: a loaded slice with its KV cache, here ([`local`]) or behind a connection ([`remote`]).
//!
//! What goes in and out are *steps*: rows of one or more sessions, each session's rows consecutive and going
//! on where that session stands. The rows are tokens (only into the head), hidden rows, or logits (only out
//! of the tail).

pub mod replay;

use half::f16;

/// Consecutive rows of one session in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The session's number.
    pub session: u32,
    /// The position of the first row: how many tokens this session has before it.
    pub position: u32,
    /// How many rows.
    pub count: u32,
}

/// Hidden rows in the number format of the wire, row-major (n_rows, n_embd).
#[derive(Clone, Debug, PartialEq)]
pub enum Hidden {
    /// 2 bytes a value: the default.
    F16(Vec<f16>),
    /// 4 bytes a value: for runs that are to be bit-exact.
    F32(Vec<f32>),
}

impl Hidden {
    /// The size of the rows in memory and on the wire.
    pub fn bytes(&self) -> usize {
        match self {
            Hidden::F16(v) => v.len() * 2,
            Hidden::F32(v) => v.len() * 4,
        }
    }

    /// Keeps the rows whose entry in `keep` is true; `keep` has an entry for every row.
    pub fn retain_rows(&mut self, keep: &[bool]) {
        fn retain<T>(values: &mut Vec<T>, keep: &[bool]) {
            let n_embd = values.len() / keep.len().max(1);
            let mut i = 0;
            values.retain(|_| {
                i += 1;
                keep[(i - 1) / n_embd]
            });
        }
        match self {
            Hidden::F16(v) => retain(v, keep),
            Hidden::F32(v) => retain(v, keep),
        }
    }
}
