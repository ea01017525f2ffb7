//! Trying again while somebody is away: `try, wait, tell, give up`, once for everything that dials.

use std::time::{Duration, Instant};

use dim_core::pipeline::Patience;
use dim_core::stage::StageError;
use dim_wire::transport::LinkError;
use dim_wire::transport::push::PushError;

pub use dim_core::retry::{Absence, Next, Retry};

/// An error of something that may be there later.
pub trait Absent {
    /// How the other side is away; `None` where another attempt would meet the same.
    fn absence(&self) -> Option<Absence>;
}

impl Absent for LinkError {
    fn absence(&self) -> Option<Absence> {
        match self {
            _ if self.is_pause() => Some(Absence::Paused),
            _ if self.may_pass() => Some(Absence::Lost),
            _ => None,
        }
    }
}

impl Absent for StageError {
    fn absence(&self) -> Option<Absence> {
        match self {
            StageError::Paused(_) => Some(Absence::Paused),
            _ if self.may_pass() => Some(Absence::Lost),
            _ => None,
        }
    }
}

impl Absent for PushError {
    fn absence(&self) -> Option<Absence> {
        match self {
            PushError::Link(link) => link.absence(),
            _ => None,
        }
    }
}

/// Makes attempts until one succeeds, or one fails in a way that does not pass, or `patience` is at its end. `tell`
/// hears why it has to wait and for how long it will be tried, once, and again when that becomes longer.
///
/// # Errors
/// What the last attempt failed with.
pub fn retry<T, E: Absent>(
    patience: Patience,
    mut tell: impl FnMut(&E, Duration),
    mut attempt: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let mut state = Retry::new(patience, Instant::now());
    loop {
        match attempt() {
            Ok(done) => return Ok(done),
            Err(error) => wait(&mut state, error, &mut tell)?,
        }
    }
}

/// One turn of [`retry`], for who has to do something between the attempts: sleeps until the next one is due.
///
/// # Errors
/// There is none: `error` again.
pub fn wait<E: Absent>(state: &mut Retry, error: E, tell: &mut impl FnMut(&E, Duration)) -> Result<(), E> {
    let Some(absence) = error.absence() else { return Err(error) };
    match state.failed(absence, Instant::now()) {
        Next::GiveUp { .. } => Err(error),
        Next::Wait { pause, tell: limit } => {
            if let Some(limit) = limit {
                tell(&error, limit);
            }
            std::thread::sleep(pause);
            Ok(())
        }
    }
}
