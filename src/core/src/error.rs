//! Why a stage could not do its step: one variant per rule, data in fields, and what a person can do about it.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::blocks::BlockRange;
use crate::canary::{LEAST_MEAN_COSINE, Wrong};
use crate::rows::RowType;
use crate::schedule::OutOfTurn;

/// What lies beneath an error of a stage: an error of the link or of the engine.
pub type Cause = Arc<dyn Error + Send + Sync>;

/// Why a stage could not do its step.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StageError {
    /// The connection or the worker behind it is gone; another connection may do.
    #[error("{0}")]
    Lost(#[source] Cause),
    /// The worker has said that it is away for a while, a locked or a hot phone: another connection will do when
    /// somebody has seen to it.
    #[error("{0}")]
    Paused(#[source] Cause),
    /// The worker refuses this host, for a reason that waiting does not change.
    #[error("{0}")]
    Refused(#[source] Cause),
    /// The worker computes something else than its blocks.
    #[error("{}", wrong(.blocks, .answer))]
    Wrong {
        /// Its blocks.
        blocks: Option<BlockRange>,
        /// How that was found.
        #[source]
        answer: WrongAnswer,
    },
    /// A step gave values that are not finite.
    #[error("{}", not_finite(.block, *.count, .said))]
    NotFinite {
        /// The block that gave them, numbered as in the model; `None`: they were given to the stage.
        block: Option<u32>,
        /// How many.
        count: u64,
        /// The sentence of the worker that found them, if it was one.
        said: Option<Cause>,
    },
    /// A step gave values that F16, the number format between the stages, cannot hold.
    #[error("{}", too_large(.block, *.count, .max_abs, .said))]
    TooLargeForF16 {
        /// The block that gave them, numbered as in the model.
        block: Option<u32>,
        /// How many.
        count: u64,
        /// The largest |value|, if it is known.
        max_abs: Option<f32>,
        /// The sentence of the worker that found them, if it was one.
        said: Option<Cause>,
    },
    /// The worker answered in another number format than agreed.
    #[error("the worker answered in another row format than {}", .expected.name())]
    OtherRowType {
        /// What was agreed.
        expected: RowType,
    },
    /// The worker sent what only a host sends.
    #[error("the worker sent something that only a host sends")]
    NoAnswer,
    /// The worker answered something it was not asked.
    #[error("the worker answered a step it was not sent")]
    Unasked,
    /// The step was called off before it began, or stands on one that was or that failed.
    #[error("the step was called off")]
    Void,
    /// The step itself failed: a full context, an engine's error, a bug.
    #[error("{0}")]
    Failed(#[source] Cause),
}

/// How it was found that a worker computes something else than its blocks.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WrongAnswer {
    /// Its answer to a known input is not the right one.
    #[error("of its answer to a known input, {0}")]
    Canary(#[source] Wrong),
    /// It could not answer a known input.
    #[error("a known input could not be answered ({0})")]
    Unanswered(#[source] Box<StageError>),
    /// It answered the same row in two ways.
    #[error(
        "asked the same row again it answered with a cosine of {cosine:.4} to its first answer (right is at least \
         {LEAST_MEAN_COSINE})"
    )]
    Unsteady {
        /// Of the angle between both updates.
        cosine: f64,
    },
}

impl StageError {
    /// A connection that is lost.
    pub fn lost(why: impl Into<Box<dyn Error + Send + Sync>>) -> StageError {
        StageError::Lost(why.into().into())
    }

    /// A worker that pauses.
    pub fn paused(why: impl Into<Box<dyn Error + Send + Sync>>) -> StageError {
        StageError::Paused(why.into().into())
    }

    /// A worker that refuses this host.
    pub fn refused(why: impl Into<Box<dyn Error + Send + Sync>>) -> StageError {
        StageError::Refused(why.into().into())
    }

    /// A step that failed.
    pub fn failed(why: impl Into<Box<dyn Error + Send + Sync>>) -> StageError {
        StageError::Failed(why.into().into())
    }

    /// Whether dialling again makes sense.
    pub fn may_pass(&self) -> bool {
        matches!(self, StageError::Lost(_) | StageError::Paused(_))
    }

    /// Whether it is about one step, and the stage is as good as before for everybody else's.
    pub fn is_of_step(&self) -> bool {
        use StageError::{Failed, NotFinite, TooLargeForF16, Void};
        matches!(self, NotFinite { .. } | TooLargeForF16 { .. } | Void | Failed(_))
    }

    /// What a person can do about it, if anything.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            StageError::Refused(_) => Some("the sentence above names the side to fix"),
            StageError::Wrong { .. } => Some(WRONG_WORKER),
            StageError::NotFinite { .. } | StageError::TooLargeForF16 { .. } => {
                Some("repeat with F32 rows, or give these blocks to the host")
            }
            StageError::OtherRowType { .. } | StageError::NoAnswer | StageError::Unasked => {
                Some(OTHER_VERSION)
            }
            StageError::Lost(_) | StageError::Paused(_) | StageError::Void | StageError::Failed(_) => None,
        }
    }
}

/// Why a step did not come out of the pipeline.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PipelineError {
    /// A worker stayed away.
    #[error("{stage} is gone: no connection for {} s ({reason})", .after.as_secs())]
    WorkerGone {
        /// The stage's name.
        stage: String,
        /// How long it was looked for.
        after: Duration,
        /// What the last attempt met.
        #[source]
        reason: StageError,
    },
    /// A worker is there, but has given no new answer since it was first lost.
    #[error("{stage} is lost again and again: {losses} times in {} s without a new answer ({reason})", .after.as_secs())]
    WorkerKeepsFailing {
        /// The stage's name.
        stage: String,
        /// How long that went on.
        after: Duration,
        /// How often it was lost.
        losses: u32,
        /// What the last loss was.
        #[source]
        reason: StageError,
    },
    /// A stage could not do its step, or a worker refused this host.
    #[error("{stage}: {source}")]
    Stage {
        /// The stage's name.
        stage: String,
        /// Why.
        source: StageError,
    },
    /// A worker answered something it was not asked.
    #[error(transparent)]
    OutOfTurn(#[from] OutOfTurn),
    /// Whoever drives a [shared](crate::shared) pipeline was told of an event, and asked for something of it that it would
    /// have to wait for: for itself.
    #[error("whoever is told of an event cannot wait for a session there: the session waits for him")]
    FromWithin,
    /// Nobody knows where the pipeline stands: it was [shared](crate::shared), and a thread that drove it has panicked.
    #[error("the thread that drove the pipeline has panicked")]
    Abandoned,
}

impl PipelineError {
    /// What a person can do about it, if anything.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            PipelineError::WorkerGone { .. } | PipelineError::WorkerKeepsFailing { .. } => Some(
                "start the worker again; what came out so far stays, and its session can go on from there",
            ),
            PipelineError::Stage { source, .. } => source.hint(),
            PipelineError::OutOfTurn(_) => Some(OTHER_VERSION),
            PipelineError::FromWithin => Some("do it in another thread, or once the event is over"),
            PipelineError::Abandoned => Some("this is a bug: what the panic said stands above"),
        }
    }
}

/// What to do about a worker that computes wrongly.
pub const WRONG_WORKER: &str = "don't use that worker as it is: have its slice compared with its digests at every start, and if it is whole, \
     evaluated without a GPU; a phone: push its blocks again";

/// What to do about a worker that speaks otherwise.
const OTHER_VERSION: &str = "the worker is not the same version as this host: update both";

fn wrong(blocks: &Option<BlockRange>, answer: &WrongAnswer) -> String {
    match blocks {
        Some(blocks) => format!("blocks {blocks} come out wrong there: {answer}"),
        None => format!("its blocks come out wrong there: {answer}"),
    }
}

/// The block that gave values, as a sentence's beginning.
struct Giver<'a>(&'a Option<u32>);

impl fmt::Display for Giver<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(block) => write!(f, "block {block} gave"),
            None => f.write_str("the rows given hold"),
        }
    }
}

fn not_finite(block: &Option<u32>, count: u64, said: &Option<Cause>) -> String {
    match said {
        Some(said) => said.to_string(),
        None => format!("{} {count} values that are not finite", Giver(block)),
    }
}

fn too_large(block: &Option<u32>, count: u64, max_abs: &Option<f32>, said: &Option<Cause>) -> String {
    if let Some(said) = said {
        return said.to_string();
    }
    let most = max_abs.map(|most| format!(" (up to {most:.0})")).unwrap_or_default();
    format!("{} {count} values beyond 65504, the largest F16 number{most}", Giver(block))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_in_fields_and_the_hint_goes_by_the_variant() {
        let error = StageError::NotFinite { block: Some(7), count: 3, said: None };
        assert_eq!(error.to_string(), "block 7 gave 3 values that are not finite");
        assert!(error.is_of_step() && error.hint().is_some_and(|hint| hint.contains("F32 rows")));
        let error = StageError::TooLargeForF16 { block: Some(2), count: 1, max_abs: Some(7e4), said: None };
        assert_eq!(
            error.to_string(),
            "block 2 gave 1 values beyond 65504, the largest F16 number (up to 70000)"
        );
        // the text alone decides nothing
        assert_eq!(StageError::failed("not finite, 65504").hint(), None);
        let kept = StageError::lost("gone");
        assert!(kept.may_pass() && kept.source().is_some_and(|source| source.to_string() == "gone"));
    }
}
