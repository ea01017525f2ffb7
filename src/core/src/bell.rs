//! A bell: who waits for any of several things waits for it, and each of them rings it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A bell that any thread can ring; clones are the same bell. A ring that nobody waits for is remembered, several are
/// one.
#[derive(Clone, Debug, Default)]
pub struct Bell {
    inner: Arc<(Mutex<bool>, Condvar)>,
}

impl Bell {
    /// A bell that has not been rung.
    pub fn new() -> Bell {
        Bell::default()
    }

    /// Wakes whoever waits, or whoever waits next.
    pub fn ring(&self) {
        let (rung, changed) = &*self.inner;
        *rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        changed.notify_one();
    }

    /// Waits until it was rung since the last wait, or until `deadline` (for ever without one). Whether it was rung.
    pub fn wait(&self, deadline: Option<Instant>) -> bool {
        let (rung, changed) = &*self.inner;
        let mut rung = rung.lock().unwrap_or_else(PoisonError::into_inner);
        while !*rung {
            rung = match deadline {
                None => changed.wait(rung).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    changed.wait_timeout(rung, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        std::mem::take(&mut *rung)
    }
}

/// A bell with a word beside it: somebody wants whoever waits to come back. That the same bell is rung for other reasons,
/// or was answered already, takes nothing from the word.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    bell: Bell,
    is_wanted: Arc<AtomicBool>,
}

impl Interrupt {
    /// One that wakes who waits for this bell.
    pub fn new(bell: Bell) -> Interrupt {
        Interrupt { bell, is_wanted: Arc::default() }
    }

    /// Asks for it, from any thread.
    pub fn ask(&self) {
        self.is_wanted.store(true, Ordering::Release);
        self.bell.ring();
    }

    /// Whether it was asked for and not taken yet.
    pub fn is_wanted(&self) -> bool {
        self.is_wanted.load(Ordering::Acquire)
    }

    /// Takes it: whether it was asked for.
    pub fn take(&self) -> bool {
        self.is_wanted() && self.is_wanted.swap(false, Ordering::AcqRel)
    }
}

/// How long somebody who has said that it is enough waits at most where no bell is rung for that, beside a local stage's step.
pub const LOOKS: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_before_the_wait_is_not_lost_and_counts_once() {
        let bell = Bell::new();
        bell.ring();
        bell.ring();
        assert!(bell.wait(None));
        assert!(!bell.wait(Some(Instant::now())));
    }

    #[test]
    fn a_ring_from_another_thread_ends_the_wait() {
        let bell = Bell::new();
        let other = bell.clone();
        let thread = std::thread::spawn(move || other.ring());
        assert!(bell.wait(Some(Instant::now() + Duration::from_secs(60))));
        thread.join().unwrap();
    }

    #[test]
    fn an_interrupt_outlives_the_ring_that_came_with_it() {
        let bell = Bell::new();
        let interrupt = Interrupt::new(bell.clone());
        interrupt.clone().ask();
        // somebody else's ring, or the same one, is answered
        assert!(bell.wait(None));
        assert!(interrupt.is_wanted() && interrupt.take());
        assert!(!interrupt.take());
    }
}
