//! A stage: a loaded slice with its KV cache, in this process or behind a connection.
//!
//! What goes in and out are *steps*: rows of one or more sessions, each session's rows consecutive and going
//! on where that session stands. The rows are tokens (only into the head), hidden rows, or logits (only out
//! of the tail).

use std::time::Duration;

use crate::rows::{Rows, RowsRef};

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

/// What goes into a stage.
#[derive(Clone, Copy, Debug)]
pub enum StageInput<'a> {
    /// Token ids, one a row: into the head.
    Tokens(&'a [i32]),
    /// Rows rows (n_rows, n_embd).
    Rows(RowsRef<'a>),
}

/// What comes out of a stage.
#[derive(Debug)]
pub enum StageOutput<'a> {
    /// Rows rows (n_rows, n_embd), one for each row that went in; resized by the stage.
    Rows(&'a mut Rows),
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
    fn submit(&mut self, id: u64, spans: &[Span], rows: &Rows) -> Result<(), StageError>;
    /// Waits for the answer to the oldest step that was submitted, and says how long the worker computed.
    fn collect(&mut self, rows: &mut Rows) -> Result<(u64, Duration), StageError>;
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
