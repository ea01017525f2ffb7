//! How many steps a worker is sent ahead: (round trip / compute) + 1, up to what was agreed on.
//!
//! While a worker computes one step, the next has to lie in its socket when it is done. An answer takes half a round
//! trip to come here and the next step another half to go there, so `round trip / compute` steps have to be on the way
//! besides the one that is computed. More would only wait at the worker: behind a step that is to be taken back, or
//! before one that is in a hurry.

use std::time::Duration;

/// What the last steps of one worker took.
#[derive(Clone, Debug, Default)]
pub struct RoundTrips {
    /// (time on the way, time computed) of the last steps in ns, in no order
    samples: [(u64, u64); SAMPLES],
    /// how many there have been
    count: usize,
}

impl RoundTrips {
    /// A step's answer was seen `elapsed` after the step was sent; the worker computed for `compute` of it, and the
    /// step waited there for `wait` before.
    pub fn measured(&mut self, elapsed: Duration, compute: Duration, wait: Duration) {
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / SAMPLES as u64);
        self.samples[self.count % SAMPLES] = (ns(elapsed.saturating_sub(compute + wait)), ns(compute));
        self.count += 1;
    }

    /// How long a message and its answer are under way, by the last steps.
    pub fn round_trip(&self) -> Duration {
        // an answer that lay here while this host computed looks late, so the least of them is the network's
        let samples = &self.samples[..self.count.min(SAMPLES)];
        Duration::from_nanos(samples.iter().map(|s| s.0).min().unwrap_or_default())
    }

    /// The window that keeps such a worker busy; at most `agreed`, and two where that allows it: this host is not
    /// always there to take an answer at once.
    pub fn window(&self, agreed: usize) -> usize {
        let samples = &self.samples[..self.count.min(SAMPLES)];
        let round_trip = u64::try_from(self.round_trip().as_nanos()).unwrap_or(u64::MAX);
        let compute = samples.iter().map(|s| s.1).sum::<u64>() / samples.len().max(1) as u64;
        let ahead = round_trip.div_ceil(compute.max(1));
        let window = usize::try_from(ahead).unwrap_or(usize::MAX).saturating_add(1);
        window.max(LEAST_WINDOW).min(agreed.max(1))
    }
}

/// The window before anything is measured: the step that is computed, and the next one already in the socket.
pub const LEAST_WINDOW: usize = 2;

/// Steps that are remembered: few enough to follow a change, enough that one late answer says nothing.
const SAMPLES: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_window_follows_round_trip_over_compute_up_to_what_was_agreed() {
        let mut trips = RoundTrips::default();
        assert_eq!(trips.window(8), 2);
        trips.measured(70 * MS, 60 * MS, Duration::ZERO);
        assert_eq!(trips.window(8), 2);
        for _ in 0..SAMPLES {
            trips.measured(14 * MS, 4 * MS, Duration::ZERO);
        }
        assert_eq!(trips.window(8), 4);
        assert_eq!((trips.window(3), trips.window(1)), (3, 1));
        // what a step waited at the worker is not the network's, and one late answer changes nothing
        trips.measured(30 * MS, 4 * MS, 16 * MS);
        trips.measured(300 * MS, 4 * MS, Duration::ZERO);
        assert_eq!(trips.window(8), 4);
    }
}
