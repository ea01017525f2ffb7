//! A stage: a loaded slice with its KV cache, in this process or behind a connection.
//!
//! What goes in and out are *steps*: rows of one or more sessions, each session's rows consecutive and going
//! on where that session stands. The rows are tokens (only into the head), hidden rows, or logits (only out
//! of the tail).

use std::time::Duration;

use half::f16;

/// Consecutive rows of one session in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The session's number.
    pub session: u32,
    /// The position of the first row: the length the session has before it.
    pub position: u32,
    /// How many rows, at least 1.
    pub count: u32,
}

/// The number format of hidden rows between stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 2 bytes a value: the default.
    F16,
    /// 4 bytes a value: for runs that are to be bit-exact.
    F32,
}

impl Dtype {
    /// `f16` or `f32`.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F16 => "f16",
            Dtype::F32 => "f32",
        }
    }
}

/// Hidden rows, row-major (n_rows, n_embd).
#[derive(Clone, Debug, PartialEq)]
pub enum Hidden {
    /// As [`Dtype::F16`].
    F16(Vec<f16>),
    /// As [`Dtype::F32`].
    F32(Vec<f32>),
}

impl Hidden {
    /// No rows.
    pub fn empty(dtype: Dtype) -> Hidden {
        match dtype {
            Dtype::F16 => Hidden::F16(Vec::new()),
            Dtype::F32 => Hidden::F32(Vec::new()),
        }
    }

    /// The rows as a stage takes them.
    pub fn as_input(&self) -> StageInput<'_> {
        match self {
            Hidden::F16(v) => StageInput::F16(v),
            Hidden::F32(v) => StageInput::F32(v),
        }
    }

    /// Their number format.
    pub fn dtype(&self) -> Dtype {
        match self {
            Hidden::F16(_) => Dtype::F16,
            Hidden::F32(_) => Dtype::F32,
        }
    }

    /// The size of the rows in memory and on the wire.
    pub fn bytes(&self) -> usize {
        match self {
            Hidden::F16(v) => v.len() * 2,
            Hidden::F32(v) => v.len() * 4,
        }
    }

    /// Makes room for `n` values; what they are is up to who writes them next.
    pub fn resize(&mut self, n: usize) {
        match self {
            Hidden::F16(v) => v.resize(n, f16::ZERO),
            Hidden::F32(v) => v.resize(n, 0.0),
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

/// What goes into a stage.
#[derive(Clone, Copy, Debug)]
pub enum StageInput<'a> {
    /// Token ids, one a row: into the head.
    Tokens(&'a [i32]),
    /// Hidden rows (n_rows, n_embd).
    F16(&'a [f16]),
    /// Hidden rows (n_rows, n_embd).
    F32(&'a [f32]),
}

/// What comes out of a stage.
#[derive(Debug)]
pub enum StageOutput<'a> {
    /// Hidden rows (n_rows, n_embd), one for each row that went in; resized by the stage.
    Hidden(&'a mut Hidden),
    /// Logits (n_wanted, n_vocab) of the rows whose entry in `rows` is true: out of the tail; resized by it.
    Logits {
        /// An entry for every row that went in.
        rows: &'a [bool],
        /// Where they go.
        out: &'a mut Vec<f32>,
    },
}

/// Why a stage could not do its step.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// The connection or the worker behind it is gone; another connection may do.
    #[error("{0}")]
    Lost(String),
    /// The worker has said that it is away for a while, a locked or a hot phone: another connection will do when
    /// somebody has seen to it.
    #[error("{0}")]
    Paused(String),
    /// The worker refuses this host, for a reason that waiting does not change.
    #[error("{0}")]
    Refused(String),
    /// The worker computes something else than its blocks.
    #[error("{0}")]
    Wrong(String),
    /// The step itself failed: numbers out of range, a full context, a bug.
    #[error("{0}")]
    Failed(String),
}

impl StageError {
    /// Whether dialling again makes sense.
    pub fn may_pass(&self) -> bool {
        matches!(self, StageError::Lost(_) | StageError::Paused(_))
    }
}

/// A stage of this process.
pub trait LocalStage {
    /// What people call it: `head`, `middle`, `tail`.
    fn name(&self) -> String;
    /// Its blocks, first to last inclusive; `None` when it has none.
    fn blocks(&self) -> Option<(u32, u32)>;
    /// Runs one step and says how long it computed.
    fn evaluate(
        &mut self,
        spans: &[Span],
        input: StageInput<'_>,
        output: StageOutput<'_>,
    ) -> Result<Duration, StageError>;
    /// Forgets the rows of `session` from `position` on.
    fn rewind(&mut self, session: u32, position: u32) -> Result<(), StageError>;
}

/// A stage of another process. Steps are answered in the order in which they were submitted.
pub trait RemoteStage {
    /// What people call it: `middle` and where it is.
    fn name(&self) -> String;
    /// Its blocks, first to last inclusive.
    fn blocks(&self) -> Option<(u32, u32)>;
    /// Sends a step. Returns once it is on its way; `rows` are lent only for the call.
    fn submit(&mut self, id: u64, spans: &[Span], rows: &Hidden) -> Result<(), StageError>;
    /// Waits for the answer to the oldest step that was submitted, and says how long the worker computed.
    fn collect(&mut self, rows: &mut Hidden) -> Result<(u64, Duration), StageError>;
    /// Forgets the rows of `session` from `position` on.
    fn rewind(&mut self, session: u32, position: u32) -> Result<(), StageError>;
    /// Dials again: one attempt. The worker has forgotten everything afterwards.
    fn reconnect(&mut self) -> Result<(), StageError>;
    /// Bytes sent, bytes received and steps answered since the start, over all connections.
    fn traffic(&self) -> Traffic;
    /// Time that collecting and submitting took for checks of the worker, which no step asked for.
    fn time_aside(&self) -> Duration {
        Duration::ZERO
    }
}

/// What crossed a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes this side sent.
    pub bytes_sent: u64,
    /// Bytes this side received.
    pub bytes_received: u64,
    /// Steps sent and answered.
    pub round_trips: u64,
}
