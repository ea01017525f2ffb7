//! Who reads, and the silence that counts meanwhile.

use std::time::{Duration, Instant};

use super::Endpoint;
use super::timers::Timer;
use crate::frame::Inbox;

impl Endpoint {
    /// Lends the inbox to a reader that waits for the peer without holding this endpoint. Only then does silence count.
    /// `None`: it is lent already, or there is none yet. The reader passes what comes to [`heard`](Self::heard) and
    /// [`file`](Self::file).
    pub fn lend_inbox(&mut self, now: Instant) -> Option<Inbox> {
        let inbox = self.inbox.take()?;
        self.timers.set(Timer::Silence, now + self.timing.silence.saturating_sub(self.quiet));
        Some(inbox)
    }

    /// The reader has left off; the silence that it has heard counts for the next one.
    pub fn return_inbox(&mut self, inbox: Inbox, now: Instant) {
        let left = self
            .timers
            .at(Timer::Silence)
            .map_or(self.timing.silence, |at| at.saturating_duration_since(now));
        self.quiet = self.timing.silence.saturating_sub(left);
        self.timers.clear(Timer::Silence);
        self.inbox = Some(inbox);
    }

    /// When the silence will have lasted too long, unless something is heard. A reader that looks up from its waiting then,
    /// and not at its next regular look, notices it at once.
    pub fn silent_at(&self) -> Option<Instant> {
        self.timers.at(Timer::Silence)
    }

    /// `n` bytes came.
    pub fn heard(&mut self, n: usize, now: Instant) {
        self.traffic.bytes_received += n as u64;
        if n > 0 && self.timers.at(Timer::Silence).is_some() {
            self.quiet = Duration::ZERO;
            self.timers.set(Timer::Silence, now + self.timing.silence);
        }
    }
}
