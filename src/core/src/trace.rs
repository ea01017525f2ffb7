//! What a driver of the [schedule](crate::schedule) did, event by event: the trace of a pipeline can be held against
//! that of the simulator.

use std::time::Duration;

use crate::ids::{JobId, StageId};

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traced {
    /// When, since the driver began.
    pub at: Duration,
    /// What.
    pub what: Happened,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happened {
    /// A local stage was given a job.
    Run(JobId, StageId),
    /// A job was sent to a remote stage.
    Sent(JobId, StageId),
    /// A stage is done with a job, and the driver knows.
    Done(JobId, StageId),
    /// Nothing could start.
    Waits,
    /// A remote stage was lost with what it held.
    Lost(StageId),
    /// It takes jobs again.
    Found(StageId),
    /// A job's result left the last stage.
    Out(JobId),
}
