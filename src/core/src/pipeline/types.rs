//! What goes into a pipeline, what comes out, and whom it tells.

use std::time::{Duration, Instant};

use crate::bell::Bell;
use crate::blocks::BlockRange;
use crate::error::PipelineError;
use crate::schedule::{JobId, SessionId, StepKind};
use crate::stage::{LocalStage, RemoteStage, Span, Traffic};

/// Rows of one session to evaluate together.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Whose they are.
    pub session: SessionId,
    /// The position of the first: the length the session has then.
    pub position: u32,
    /// The tokens, at least one.
    pub tokens: Vec<i32>,
    /// For each, whether its logits are wanted.
    pub want_logits: Vec<bool>,
    /// Whether a reply waits for it.
    pub kind: StepKind,
}

impl Step {
    /// One token of a reply, with its logits.
    pub fn decode(session: SessionId, position: u32, token: i32) -> Step {
        Step { session, position, tokens: vec![token], want_logits: vec![true], kind: StepKind::Decode }
    }

    pub(super) fn span(&self) -> Span {
        // no step has more rows than a context has positions
        let count = u32::try_from(self.tokens.len()).unwrap_or(u32::MAX);
        Span { session: self.session.0, position: self.position, count }
    }
}

/// A step that has left the pipeline.
#[derive(Debug)]
pub struct Finished {
    /// Which one.
    pub job: JobId,
    /// Whose.
    pub session: SessionId,
    /// Logits of the rows that were wanted, (n_wanted, n_vocab); or why there are none. After an error none of the
    /// steps that the session was given before it came out is under way any more, and it has to be rewound to where its
    /// caller knows it, at most the end of the last step that came out.
    pub outcome: Result<Vec<f32>, PipelineError>,
}

/// What [`Pipeline::advance`](super::Pipeline::advance) has come to.
#[derive(Debug)]
pub enum Advance {
    /// A step is through, or a session has failed.
    Finished(Finished),
    /// There is nothing under way.
    Idle,
    /// The deadline has come, or another thread has [interrupted](super::Pipeline::interrupt).
    Later,
}

/// One stage of a pipeline, wherever it runs.
pub enum StageSlot {
    /// In this process.
    Local(Box<dyn LocalStage>),
    /// In another one.
    Remote(Box<dyn RemoteStage>),
}

/// What a stage did.
#[derive(Clone, Copy, Debug, Default)]
pub struct StageStats {
    /// Time it computed.
    pub compute: Duration,
    /// Time this host stood still for it beyond that.
    pub wait: Duration,
    /// How often its worker was lost and found again.
    pub reconnects: u32,
}

/// What a pipeline has done up to a moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Its stages, in order.
    pub stages: Vec<StageSnapshot>,
    /// What crossed all sockets.
    pub traffic: Traffic,
}

/// What a stage has done up to a moment.
#[derive(Clone, Debug)]
pub struct StageSnapshot {
    /// Its name and place.
    pub name: String,
    /// Its blocks; `None` when it has none.
    pub blocks: Option<BlockRange>,
    /// What it did.
    pub stats: StageStats,
}

/// What the observer is told.
#[derive(Debug)]
pub enum Event<'a> {
    /// A worker was lost; the pipeline dials it again.
    Lost {
        /// The stage's name.
        stage: &'a str,
        /// Why.
        reason: &'a str,
        /// How long it will be looked for.
        give_up_after: Duration,
    },
    /// A worker has said that it pauses or is too hot; the pipeline waits for it.
    Paused {
        /// The stage's name.
        stage: &'a str,
        /// What it said, and what to do.
        reason: &'a str,
        /// How long it will be waited for.
        give_up_after: Duration,
    },
    /// A worker is back, and its cache is being filled again.
    Replaying {
        /// The stage's name.
        stage: &'a str,
        /// How many steps.
        steps: usize,
    },
    /// A worker is given up, and something else has taken its place: its cache is being filled.
    Replaced {
        /// The stage's name.
        stage: &'a str,
        /// What it is called from now on.
        by: &'a str,
        /// How many steps.
        steps: usize,
    },
    /// A worker is back where it was.
    Back {
        /// The stage's name.
        stage: &'a str,
        /// How long it was away.
        after: Duration,
    },
}

/// The time, and how it is waited for. Tests have one that goes as they say.
pub trait Clock: Send {
    /// Now.
    fn now(&self) -> Instant;
    /// Waits until the bell was rung, or until then.
    fn wait(&self, bell: &Bell, until: Option<Instant>);
}

/// The time of day.
pub(super) struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn wait(&self, bell: &Bell, until: Option<Instant>) {
        bell.wait(until);
    }
}
