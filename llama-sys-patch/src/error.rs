//! What can go wrong, one variant per rule. Everything is caught before llama.cpp could abort on it.

use std::ffi::CStr;

use crate::ffi;
use crate::refusal::{self, Refusal};

/// Why llama.cpp, or a check before it, refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A parameter that no model would accept.
    #[error("{0}")]
    InvalidArgument(String),

    /// llama.cpp refused the file. The text names the file and has llama.cpp's own error line.
    #[error("{0}")]
    LoadFailed(String),

    /// The progress callback stopped the load.
    #[error("{0}")]
    Cancelled(String),

    /// A slice whose description of what it lacks (`dim.absent.*`) is wrong.
    #[error("{text}")]
    BadSlice {
        /// Which entry; `None` where it is about all of them.
        entry: Option<usize>,
        /// The file, the tensor and what is wrong with it.
        text: String,
    },

    /// A kind of model, or a way of computing, that there is none of here. The text says why.
    #[error("{0}")]
    Unsupported(String),

    /// A range of blocks that cannot be evaluated apart, and what keeps it from that.
    #[error("{0}")]
    NotApart(Refusal),

    /// The KV cache or the graph's buffers could not be allocated.
    #[error("{0}")]
    OutOfMemory(String),

    /// More rows in one call than the stage takes, or more logits than a stock context gives.
    #[error("{rows} rows at once: at most {limit}")]
    TooManyRows {
        /// Rows given.
        rows: usize,
        /// Rows there may be.
        limit: usize,
    },

    /// A session number beyond `max_sessions`.
    #[error("session {session}: there are {sessions}")]
    UnknownSession {
        /// The session given.
        session: u32,
        /// How many there are.
        sessions: u32,
    },

    /// A row that does not go on where its session ends, or a rewind beyond its end.
    #[error("position {position} of session {session}: expected {expected}")]
    WrongPosition {
        /// The session.
        session: u32,
        /// The position given.
        position: u32,
        /// The position that would have been right (for a rewind: the session's length).
        expected: u32,
    },

    /// A position the context has no room for.
    #[error("session {session} is full: the context holds {n_ctx} positions")]
    ContextFull {
        /// The session.
        session: u32,
        /// Positions of one session.
        n_ctx: u32,
    },

    /// A call that failed left the session's recurrent state half-way: nothing but clearing it is possible. Its rows have
    /// to be evaluated again from the first on.
    #[error(
        "session {session} was lost in a call that failed: clear it and evaluate it again from its beginning"
    )]
    SessionLost {
        /// The session.
        session: u32,
    },

    /// A recurrent state cannot be taken back so far: clear the session, and evaluate again what should stay.
    #[error(
        "session {session} cannot be taken back to position {position}: to {lowest} at the least, or to nothing"
    )]
    CannotRewind {
        /// The session.
        session: u32,
        /// The position given.
        position: u32,
        /// The lowest position, beside 0, that it can be taken back to.
        lowest: u32,
    },

    /// Tokens for a stage that takes hidden rows, or the other way round; or no token ids for one that reads them beside the
    /// rows.
    #[error("{0}")]
    WrongInput(String),

    /// Logits asked of a stage without an lm_head, or hidden rows of one with it.
    #[error("{0}")]
    WrongOutput(String),

    /// A token outside the vocabulary.
    #[error("token {token} is not in the vocabulary of {n_vocab}")]
    UnknownToken {
        /// The token given.
        token: i64,
        /// The vocabulary's size.
        n_vocab: i64,
    },

    /// A buffer of the wrong length.
    #[error("{text}")]
    WrongSize {
        /// Elements given.
        got: usize,
        /// Elements needed.
        expected: usize,
        /// What the buffer is for.
        text: String,
    },

    /// Hidden rows that hold NaN or infinities.
    #[error("{count} values of the rows given are not finite, first in row {row}")]
    InputNotFinite {
        /// First row with such a value.
        row: usize,
        /// How many values, in all rows.
        count: u64,
    },

    /// A block gave NaN or infinities.
    #[error("block {block} gave {count} values that are not finite, first in row {row}")]
    OutputNotFinite {
        /// The last block of the stage, as numbered in its file; for logits the model's last.
        block: u32,
        /// First row with such a value.
        row: usize,
        /// How many values.
        count: u64,
        /// The largest finite |x| beside them.
        max_abs: f32,
    },

    /// A block's output does not fit F16: use F32.
    #[error(
        "block {block} gave {count} values too large for F16 (up to {max_abs}, the limit is 65504), first in row {row}"
    )]
    OutputOverflows {
        /// The last block of the stage, as numbered in its file.
        block: u32,
        /// First row with such a value.
        row: usize,
        /// How many values.
        count: u64,
        /// The largest |x|.
        max_abs: f32,
    },

    /// The backend could not compute.
    #[error("{0}")]
    ComputeFailed(String),

    /// Text in or out of a model without a vocabulary.
    #[error("{0}")]
    NoTokenizer(String),

    /// A chat template, a grammar or a model's answer that is not as it should be: how.
    #[error("{0}")]
    Refused(String),

    /// An exception from llama.cpp that no other variant names.
    #[error("{0}")]
    Internal(String),
}

/// Turns a status into a result. `fault` is what the call wrote on failure.
pub(crate) fn check(status: ffi::dim_status, fault: &ffi::dim_fault) -> Result<(), Error> {
    if status == ffi::DIM_OK {
        return Ok(());
    }
    let text = last_message();
    let row = usize::try_from(fault.row).unwrap_or(0);
    let block = u32::try_from(fault.block).unwrap_or(0);
    let count = u64::try_from(fault.got).unwrap_or(0);
    let got = u32::try_from(fault.got).unwrap_or(u32::MAX);
    let expected = u32::try_from(fault.expected).unwrap_or(0);
    let session = u32::try_from(fault.session).unwrap_or(0);
    Err(match status {
        ffi::DIM_INVALID_ARGUMENT => Error::InvalidArgument(text),
        ffi::DIM_LOAD_FAILED => Error::LoadFailed(text),
        ffi::DIM_CANCELLED => Error::Cancelled(text),
        ffi::DIM_UNSUPPORTED => Error::Unsupported(text),
        ffi::DIM_NOT_APART => Error::NotApart(refusal::last()),
        ffi::DIM_OUT_OF_MEMORY => Error::OutOfMemory(text),
        ffi::DIM_TOO_MANY_ROWS => Error::TooManyRows { rows: got as usize, limit: expected as usize },
        ffi::DIM_UNKNOWN_SESSION => Error::UnknownSession { session: got, sessions: expected },
        ffi::DIM_WRONG_POSITION => Error::WrongPosition { session, position: got, expected },
        ffi::DIM_CONTEXT_FULL => Error::ContextFull { session, n_ctx: expected },
        ffi::DIM_SESSION_LOST => Error::SessionLost { session },
        ffi::DIM_CANNOT_REWIND => Error::CannotRewind { session, position: got, lowest: expected },
        ffi::DIM_BAD_SLICE => Error::BadSlice { entry: usize::try_from(fault.row).ok(), text },
        ffi::DIM_WRONG_INPUT => Error::WrongInput(text),
        ffi::DIM_WRONG_OUTPUT => Error::WrongOutput(text),
        ffi::DIM_UNKNOWN_TOKEN => Error::UnknownToken { token: fault.got, n_vocab: fault.expected },
        ffi::DIM_WRONG_SIZE => Error::WrongSize {
            got: usize::try_from(fault.got).unwrap_or(0),
            expected: usize::try_from(fault.expected).unwrap_or(0),
            text,
        },
        ffi::DIM_INPUT_NOT_FINITE => Error::InputNotFinite { row, count },
        ffi::DIM_OUTPUT_NOT_FINITE => Error::OutputNotFinite { block, row, count, max_abs: fault.max_abs },
        ffi::DIM_OUTPUT_OVERFLOWS => Error::OutputOverflows { block, row, count, max_abs: fault.max_abs },
        ffi::DIM_COMPUTE_FAILED => Error::ComputeFailed(text),
        ffi::DIM_NO_TOKENIZER => Error::NoTokenizer(text),
        ffi::DIM_REFUSED => Error::Refused(text),
        _ => Error::Internal(text),
    })
}

/// For calls that take no fault.
pub(crate) fn check_status(status: ffi::dim_status) -> Result<(), Error> {
    check(status, &ffi::dim_fault::default())
}

fn last_message() -> String {
    // SAFETY: dim_last_error() gives a NUL-terminated string of this thread, valid until this thread's next call; it is
    // copied at once.
    let text = unsafe { CStr::from_ptr(ffi::dim_last_error()) };
    text.to_string_lossy().into_owned()
}
