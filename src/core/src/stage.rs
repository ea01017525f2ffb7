//! A stage: a loaded slice with its KV cache, in this process or behind a connection.
//!
//! What goes in and out are *steps*: rows of one or more sessions, each session's rows consecutive and going
//! on where that session stands. The rows are tokens (only into the head), rows of some [layout](crate::rows::Layout), or
//! logits (only out of the tail).

use std::iter::Sum;
use std::ops::{Add, AddAssign};
use std::time::{Duration, Instant};

use crate::bell::Bell;
use crate::blocks::BlockRange;
use crate::guard::Guard;
use crate::ids::{JobId, SessionId};
use crate::rows::{Rows, RowsRef};

pub use crate::error::{Cause, StageError, WrongAnswer};

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

impl Span {
    /// Whose rows they are.
    pub fn session(&self) -> SessionId {
        SessionId(self.session)
    }

    /// The position behind its last row.
    pub fn end(&self) -> u32 {
        self.position + self.count
    }
}

/// How many rows these spans have.
pub fn n_rows(spans: &[Span]) -> u32 {
    spans.iter().map(|span| span.count).sum()
}

/// What goes into a stage.
#[derive(Clone, Copy, Debug)]
pub enum StageInput<'a> {
    /// Token ids, one a row: into the head.
    Tokens(&'a [i32]),
    /// Rows of the stage's layout, one a token.
    Rows {
        /// (n_rows, width).
        rows: RowsRef<'a>,
        /// (n_rows) token ids, for stages that read them beside the rows; empty where nobody does.
        tokens: &'a [i32],
    },
}

/// What comes out of a stage.
#[derive(Debug)]
pub enum StageOutput<'a> {
    /// (n_rows, width of the stage's layout), one for each row that went in; resized by the stage.
    Rows(&'a mut Rows),
    /// Logits (n_wanted, n_vocab) of the rows whose entry in `rows` is true: out of the tail; resized by it.
    Logits {
        /// An entry for every row that went in.
        rows: &'a [bool],
        /// Where they go.
        out: &'a mut Vec<f32>,
    },
}

/// How many rows of its last step a session can be taken back by, other than to its beginning, which it always can: once,
/// and by fewer rows than that step had. A stage that can take back some and not all has one session, for another one's
/// step would end that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TakeBack(pub u32);

impl TakeBack {
    /// Any number: keys and values are forgotten one by one.
    pub const ALL: TakeBack = TakeBack(u32::MAX);
    /// None: a recurrent state without snapshots.
    pub const NOTHING: TakeBack = TakeBack(0);

    /// Whether of a step of `n` rows the first `keep` can be kept.
    pub(crate) fn reaches(self, n: usize, keep: usize) -> bool {
        0 < keep && keep < n && n - keep <= self.0 as usize
    }
}

/// A stage of this process.
pub trait LocalStage: Send {
    /// What people call it: `head`, `middle`, `tail`.
    fn name(&self) -> String;
    /// Its blocks; `None` when it has none.
    fn blocks(&self) -> Option<BlockRange>;
    /// Runs one step and says how long it computed.
    ///
    /// # Errors
    /// The step failed. Its sessions are the only ones that suffer from it.
    fn evaluate(
        &mut self,
        spans: &[Span],
        input: StageInput<'_>,
        output: StageOutput<'_>,
    ) -> Result<Duration, StageError>;
    /// Forgets the rows of `session` from `position` on; nothing, where it has none.
    ///
    /// # Errors
    /// The session is in a state that nobody knows.
    fn rewind(&mut self, session: SessionId, position: u32) -> Result<(), StageError>;
    /// How far it can take a session back. A [pipeline](crate::pipeline) evaluates a session anew where that is not far
    /// enough.
    fn take_back(&self) -> TakeBack {
        TakeBack::ALL
    }
    /// Bytes that [`save`](Self::save) gives of each row; `None`: it cannot save.
    fn saved_bytes(&self) -> Option<usize> {
        None
    }
    /// What it keeps of a session's rows `from` to `to` (exclusive), for [`restore`](Self::restore).
    ///
    /// # Errors
    /// It cannot, or the session does not hold them.
    fn save(&mut self, _session: SessionId, _from: u32, _to: u32) -> Result<Vec<u8>, StageError> {
        Err(StageError::failed("this stage cannot save what it keeps"))
    }
    /// Takes rows as evaluated, with what was [saved](Self::save) of them by such a stage; `tokens`: (n_rows).
    ///
    /// # Errors
    /// It cannot, or what was saved is of another stage. The session is as it was.
    fn restore(&mut self, _span: Span, _tokens: &[i32], _state: &[u8]) -> Result<Duration, StageError> {
        Err(StageError::failed("this stage cannot take what was saved"))
    }
}

/// An answer of a remote stage; its rows are where the caller asked for them.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The step it answers.
    pub job: JobId,
    /// How long the worker computed.
    pub compute: Duration,
    /// How long the complete step lay at the worker before.
    pub wait: Duration,
    /// The step failed, or was [called off](RemoteStage::cancel): there are no rows, and its sessions have to be rewound
    /// to where they stood before it. Everybody else's steps go on.
    pub failed: Option<StageError>,
}

impl Answer {
    /// An answer with rows.
    pub fn done(job: JobId, compute: Duration, wait: Duration) -> Answer {
        Answer { job, compute, wait, failed: None }
    }
}

/// A stage of another process. Steps are answered in the order in which they were submitted.
///
/// Nothing here blocks but [`collect_until`](Self::collect_until), and that as long as it is told to. What the way to the
/// worker has no room for is kept and sent as room comes; a worker that takes nothing for as long as the link's own limit
/// says is lost. A connection that is lost is told of by [`poll`](Self::poll) and
/// [`collect_until`](Self::collect_until), and so is what a worker has said of a step before it closed: the step meant is
/// the oldest without an answer.
pub trait RemoteStage: Send {
    /// What people call it: `middle` and where it is.
    fn name(&self) -> String;
    /// Its blocks.
    fn blocks(&self) -> Option<BlockRange>;
    /// How many steps it may hold at once, as agreed on with its worker.
    fn max_in_flight(&self) -> usize;
    /// How many sessions its worker has, as agreed on; a new connection may have another number.
    fn n_sessions(&self) -> u32 {
        1
    }
    /// Whether it reads token ids beside the rows.
    fn reads_tokens(&self) -> bool {
        false
    }
    /// How far it can take a session back.
    fn take_back(&self) -> TakeBack {
        TakeBack::ALL
    }
    /// Sends a step, without waiting until it has gone; `rows` and `tokens` are lent only for the call. `tokens`: (n_rows)
    /// ids where it [reads them](Self::reads_tokens), else none.
    ///
    /// # Errors
    /// The step was refused and not sent, and the connection is as it was; or the stage is [lost](StageError::may_pass).
    fn submit(&mut self, job: JobId, spans: &[Span], tokens: &[i32], rows: &Rows) -> Result<(), StageError>;
    /// Nobody wants the answer to this step any more: a worker that has not begun it need not. It is answered all the
    /// same, and until a rewind to where its sessions stood before it, so are their steps behind it.
    fn cancel(&mut self, _job: JobId) {}
    /// The answer to the oldest step, if this process has it already. Never blocks; finds everything that has come only
    /// while there is a [bell](Self::notify).
    ///
    /// # Errors
    /// The connection is over. It has to be [begun anew](Self::begin_reconnect) before anything else.
    fn poll(&mut self, rows: &mut Rows) -> Result<Option<Answer>, StageError>;
    /// Waits for the answer to the oldest step, until `deadline` (for ever without one).
    ///
    /// # Errors
    /// As of [`poll`](Self::poll).
    fn collect_until(
        &mut self,
        rows: &mut Rows,
        deadline: Option<Instant>,
    ) -> Result<Option<Answer>, StageError>;
    /// Rings this bell from now on whenever [`poll`](Self::poll) has something new to tell; for what it could tell now
    /// at once. Without one [`collect_until`](Self::collect_until) is the quickest way to an answer.
    fn notify(&mut self, bell: Option<Bell>);
    /// When it has to be polled even if nothing rang: a worker may be taking too long.
    fn poll_at(&self) -> Option<Instant> {
        None
    }
    /// Forgets the rows of `session` from `position` on, in order with the steps.
    ///
    /// # Errors
    /// As of [`submit`](Self::submit).
    fn rewind(&mut self, session: SessionId, position: u32) -> Result<(), StageError>;
    /// Begins one attempt to connect anew, and gives up what was. `bell` is rung when
    /// [`poll_connected`](Self::poll_connected) has its outcome. The worker has forgotten everything afterwards.
    fn begin_reconnect(&mut self, bell: &Bell);
    /// Whether the attempt has succeeded; `false` while it is under way.
    ///
    /// # Errors
    /// It has failed.
    fn poll_connected(&mut self) -> Result<bool, StageError>;
    /// The worker is given up: whether there is something else in its place, which the next
    /// [attempt to connect](Self::begin_reconnect) is one to get.
    fn fall_back(&mut self) -> bool {
        false
    }
    /// Bytes sent, bytes received and steps answered since the start, over all connections.
    fn traffic(&self) -> Traffic;
    /// What its worker is held against, if anything.
    fn guard(&mut self) -> Option<&mut Guard> {
        None
    }
}

/// What crossed a socket, the handshake included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes this side sent.
    pub bytes_sent: u64,
    /// Bytes this side received.
    pub bytes_received: u64,
    /// Steps sent and answered.
    pub round_trips: u64,
}

impl Traffic {
    /// What has crossed since there was as much as `then`.
    pub fn since(self, then: Traffic) -> Traffic {
        Traffic {
            bytes_sent: self.bytes_sent.saturating_sub(then.bytes_sent),
            bytes_received: self.bytes_received.saturating_sub(then.bytes_received),
            round_trips: self.round_trips.saturating_sub(then.round_trips),
        }
    }

    /// Of one step that is as large as its answer.
    pub fn of_step(bytes: usize) -> Traffic {
        let bytes = bytes as u64;
        Traffic { bytes_sent: bytes, bytes_received: bytes, round_trips: 1 }
    }
}

impl Add for Traffic {
    type Output = Traffic;

    fn add(self, more: Traffic) -> Traffic {
        Traffic {
            bytes_sent: self.bytes_sent + more.bytes_sent,
            bytes_received: self.bytes_received + more.bytes_received,
            round_trips: self.round_trips + more.round_trips,
        }
    }
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, more: Traffic) {
        *self = *self + more;
    }
}

impl Sum for Traffic {
    fn sum<I: Iterator<Item = Traffic>>(all: I) -> Traffic {
        all.fold(Traffic::default(), Traffic::add)
    }
}
