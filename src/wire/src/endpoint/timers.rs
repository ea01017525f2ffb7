//! The times of a connection, and which of them is due next.

use std::time::{Duration, Instant};

/// The times of PROTOCOL.md, section 12. The defaults are its values; tests make some shorter.
#[derive(Clone, Debug)]
pub struct Timing {
    /// Host: from dialling to the worker's answer to HELLO. Worker: from accepting to HELLO.
    pub opening: Duration,
    /// Worker: from accepting to Noise message 1.
    pub stranger: Duration,
    /// Host: the longest a worker may prepare, sending heartbeats, before it answers HELLO.
    pub preparing: Duration,
    /// How long a side waits without hearing a byte before it gives its peer up.
    pub silence: Duration,
    /// How long a message may wait without the peer taking a byte of it. A peer that is not heard meanwhile
    /// is lost earlier, by its silence.
    pub stalled_write: Duration,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            opening: Duration::from_secs(5),
            stranger: Duration::from_secs(2),
            preparing: Duration::from_secs(60),
            silence: Duration::from_secs(3),
            stalled_write: Duration::from_secs(30),
        }
    }
}

/// After how long without sending anything a HEARTBEAT is due.
pub const HEARTBEAT_EVERY: Duration = Duration::from_millis(500);

/// What may become due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timer {
    /// The peer has not done its part of the opening: absolute, a byte does not extend it.
    Opening,
    /// Nothing was heard while somebody read.
    Silence,
    /// The peer takes no bytes.
    StalledWrite,
    /// Nothing was sent.
    Heartbeat,
}

/// When each is due.
#[derive(Clone, Debug, Default)]
pub(super) struct Timers([Option<Instant>; 4]);

impl Timers {
    pub(super) fn set(&mut self, timer: Timer, at: Instant) {
        self.0[timer as usize] = Some(at);
    }

    pub(super) fn clear(&mut self, timer: Timer) {
        self.0[timer as usize] = None;
    }

    pub(super) fn clear_all(&mut self) {
        self.0 = [None; 4];
    }

    pub(super) fn at(&self, timer: Timer) -> Option<Instant> {
        self.0[timer as usize]
    }

    pub(super) fn is_due(&self, timer: Timer, now: Instant) -> bool {
        self.at(timer).is_some_and(|at| at <= now)
    }
}
