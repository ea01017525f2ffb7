//! How long and how often a lost worker is looked for. Pure: times are given.

use std::time::Duration;

use crate::stage::StageError;

/// How long and how often a lost worker is looked for.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long until it counts as gone.
    pub give_up_after: Duration,
    /// How long instead, if it has said that it pauses or is too hot: somebody has to unlock it first.
    pub paused_for: Duration,
    /// The pause before the second attempt; it doubles each time ...
    pub first_pause: Duration,
    /// ... up to this.
    pub longest_pause: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            give_up_after: Duration::from_secs(30),
            paused_for: Duration::from_secs(600),
            first_pause: Duration::from_millis(200),
            longest_pause: Duration::from_secs(5),
        }
    }
}

impl Patience {
    /// How long a worker is looked for that was lost like this.
    pub fn limit(&self, lost: &StageError) -> Duration {
        match lost {
            StageError::Paused(_) => self.paused_for.max(self.give_up_after),
            _ => self.give_up_after,
        }
    }
}

/// A worker's losses and failed attempts since its last *new* answer. One that comes back, takes what it is told and
/// fails at the same step again has not come back: its pauses grow and its time runs on, over all of it.
#[derive(Clone, Debug)]
pub struct Losses {
    /// When the first was noticed.
    pub since: Duration,
    /// How often a connection that stood was lost.
    pub count: u32,
    /// How long it is looked for, from `since` on.
    pub give_up_after: Duration,
    pause: Duration,
}

impl Losses {
    /// The first loss, at `now`: the next attempt is due at once.
    pub fn first(now: Duration, give_up_after: Duration, patience: &Patience) -> Losses {
        Losses { since: now, count: 1, give_up_after, pause: patience.first_pause }
    }

    /// Another loss or failed attempt at `now`: when the next attempt is due, or `None` where it is time to give up.
    pub fn again(&mut self, now: Duration, patience: &Patience) -> Option<Duration> {
        let away = now.saturating_sub(self.since);
        if away >= self.give_up_after {
            return None;
        }
        let pause = self.pause.clamp(LEAST_PAUSE, MOST_PAUSE).min(self.give_up_after - away);
        self.pause = self.pause.saturating_mul(2).min(patience.longest_pause);
        Some(now + pause)
    }
}

/// Whatever patience says, a worker that refuses at once is not dialled as fast as this machine can.
const LEAST_PAUSE: Duration = Duration::from_millis(5);
/// And whatever it says, some time it is tried again: times that no clock shows are for who wants to wait for ever.
const MOST_PAUSE: Duration = Duration::from_secs(24 * 3600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_end_where_patience_does() {
        let ms = Duration::from_millis;
        let patience = Patience { give_up_after: ms(2000), longest_pause: ms(500), ..Patience::default() };
        let mut losses = Losses::first(ms(1000), patience.give_up_after, &patience);
        let mut now = ms(1000);
        let mut at = Vec::new();
        while let Some(next) = losses.again(now, &patience) {
            at.push(next.as_millis());
            now = next;
        }
        assert_eq!(at, [1200, 1600, 2100, 2600, 3000]);
    }

    #[test]
    fn patience_without_an_end_is_no_time_that_a_clock_cannot_show() {
        let (day, ever) = (Duration::from_secs(24 * 3600), Duration::MAX);
        let patience =
            Patience { give_up_after: ever, paused_for: ever, first_pause: ever, longest_pause: ever };
        let mut losses = Losses::first(day, patience.give_up_after, &patience);
        assert_eq!(losses.again(day, &patience), Some(2 * day));
        assert_eq!(losses.again(2 * day, &patience), Some(3 * day));
    }

    #[test]
    fn without_pauses_nobody_spins() {
        let ms = Duration::from_millis;
        let (first_pause, longest_pause) = (Duration::ZERO, Duration::ZERO);
        let patience = Patience { give_up_after: ms(100), first_pause, longest_pause, ..Patience::default() };
        let mut losses = Losses::first(ms(0), patience.give_up_after, &patience);
        let (mut now, mut n) = (ms(0), 0);
        while let Some(next) = losses.again(now, &patience) {
            (now, n) = (next, n + 1);
        }
        assert_eq!(n, 20);
    }
}
