//! Trying again while somebody is away, a worker that is being restarted or a phone that is locked: `try, wait, tell,
//! give up`, once for everything that dials.
//!
//! [`Retry`] neither sleeps nor looks at a clock; [`retry`] and [`wait`] do.

use std::time::{Duration, Instant};

use dim_core::patience::{Losses, Patience};
use dim_core::stage::StageError;
use dim_wire::transport::push::PushError;
use dim_wire::transport::{CallOff, LinkError};

/// How somebody is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absence {
    /// Gone without a word, or busy, or loading: another attempt may do.
    Lost,
    /// It has said that it pauses or is too hot: somebody has to see to it first, which takes longer.
    Paused,
}

/// What to do after an attempt that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Wait this long, then try again.
    Wait {
        /// How long.
        pause: Duration,
        /// The time in all for which it will be tried, where that has not been said yet.
        tell: Option<Duration>,
    },
    /// It was tried for long enough.
    GiveUp {
        /// For how long.
        after: Duration,
    },
}

/// Attempts at one thing, from the first one that failed to the one that succeeds.
#[derive(Clone, Debug)]
pub struct Retry {
    patience: Patience,
    begun: Instant,
    /// as the pipeline keeps them, in time since `begun`
    losses: Losses,
    told: bool,
}

impl Retry {
    /// The time runs from `now` on.
    pub fn new(patience: Patience, now: Instant) -> Retry {
        let losses = Losses::first(Duration::ZERO, patience.give_up_after, &patience);
        Retry { patience, begun: now, losses, told: false }
    }

    /// Something moved: the time runs anew.
    pub fn moved(&mut self, now: Instant) {
        *self = Retry::new(self.patience, now);
    }

    /// How long it is tried in all, as far as is known.
    pub fn limit(&self) -> Duration {
        self.losses.give_up_after
    }

    /// Whether that time is over.
    pub fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.begun) >= self.limit()
    }

    /// One that has said that it pauses is waited for longer.
    pub fn learn(&mut self, absence: Absence) {
        if absence == Absence::Paused && self.patience.paused_for > self.limit() {
            self.losses.give_up_after = self.patience.paused_for;
            self.told = false;
        }
    }

    /// An attempt has failed.
    pub fn failed(&mut self, absence: Absence, now: Instant) -> Next {
        self.learn(absence);
        let waited = now.saturating_duration_since(self.begun);
        let Some(due) = self.losses.again(waited, &self.patience) else {
            return Next::GiveUp { after: waited };
        };
        let tell = (!self.told).then_some(self.limit());
        self.told = true;
        Next::Wait { pause: due - waited, tell }
    }
}

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
/// hears why it has to wait and for how long it will be tried, once, and again when that becomes longer. `off` ends it.
///
/// # Errors
/// What the last attempt failed with.
pub fn retry<T, E: Absent>(
    patience: Patience,
    off: &CallOff,
    mut tell: impl FnMut(&E, Duration),
    mut attempt: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let mut state = Retry::new(patience, Instant::now());
    loop {
        match attempt() {
            Ok(done) => return Ok(done),
            Err(error) => wait(&mut state, error, off, &mut tell)?,
        }
    }
}

/// One turn of [`retry`], for who has to do something between the attempts: sleeps until the next one is due or `off`
/// ends that.
///
/// # Errors
/// There is none: `error` again.
pub fn wait<E: Absent>(
    state: &mut Retry,
    error: E,
    off: &CallOff,
    tell: &mut impl FnMut(&E, Duration),
) -> Result<(), E> {
    match error.absence() {
        None => Err(error),
        Some(absence) => wait_as(state, error, absence, off, tell),
    }
}

/// The same for an error that is known to be an `absence`.
///
/// # Errors
/// There is none: `error` again.
pub fn wait_as<E>(
    state: &mut Retry,
    error: E,
    absence: Absence,
    off: &CallOff,
    tell: &mut impl FnMut(&E, Duration),
) -> Result<(), E> {
    match state.failed(absence, Instant::now()) {
        Next::GiveUp { .. } => Err(error),
        Next::Wait { pause, tell: limit } => {
            if let Some(limit) = limit {
                tell(&error, limit);
            }
            match off.sleep(pause) {
                true => Err(error),
                false => Ok(()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    const PATIENCE: Patience = Patience {
        give_up_after: ms(1000),
        paused_for: ms(5000),
        first_pause: ms(200),
        longest_pause: ms(500),
    };

    fn wait(pause: u64, tell: Option<u64>) -> Next {
        Next::Wait { pause: ms(pause), tell: tell.map(ms) }
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_end_at_the_limit() {
        let begin = Instant::now();
        let mut retry = Retry::new(PATIENCE, begin);
        assert_eq!(retry.failed(Absence::Lost, begin), wait(200, Some(1000)));
        assert_eq!(retry.failed(Absence::Lost, begin + ms(200)), wait(400, None));
        assert_eq!(
            retry.failed(Absence::Lost, begin + ms(600)),
            wait(400, None),
            "no longer than what is left"
        );
        assert!(!retry.is_over(begin + ms(999)) && retry.is_over(begin + ms(1000)));
        assert_eq!(retry.failed(Absence::Lost, begin + ms(1001)), Next::GiveUp { after: ms(1001) });
    }

    #[test]
    fn one_that_pauses_is_waited_for_longer_and_that_is_told_once() {
        let begin = Instant::now();
        let mut retry = Retry::new(PATIENCE, begin);
        assert_eq!(retry.failed(Absence::Lost, begin), wait(200, Some(1000)));
        assert_eq!(retry.failed(Absence::Paused, begin + ms(900)), wait(400, Some(5000)));
        // the limit stays, though it is only silent now
        assert_eq!(retry.failed(Absence::Lost, begin + ms(1200)), wait(500, None));
        assert_eq!(retry.limit(), ms(5000));
    }

    #[test]
    fn what_moves_begins_anew() {
        let begin = Instant::now();
        let mut retry = Retry::new(PATIENCE, begin);
        retry.failed(Absence::Paused, begin);
        retry.moved(begin + ms(4000));
        assert_eq!(retry.failed(Absence::Lost, begin + ms(4100)), wait(200, Some(1000)));
        assert!(retry.is_over(begin + ms(5000)));
    }

    #[test]
    fn no_patience_is_one_attempt() {
        let now = Instant::now();
        let none = Patience { give_up_after: ms(0), ..PATIENCE };
        assert_eq!(Retry::new(none, now).failed(Absence::Lost, now), Next::GiveUp { after: ms(0) });
    }
}
