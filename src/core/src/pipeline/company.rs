//! Replies whose token has just come out will have their next one soon: what is worth waiting for that long waits.
//!
//! Several threads sample, and whoever drives is back here first. A batch that starts at once starts with one row of
//! four, and the next one with the other three; and a tail that runs at once keeps the head, which the worker waits for,
//! from running. The wait is twice what the last replies took to come back, and never more than a part of a round.

use std::time::{Duration, Instant};

use super::Pipeline;
use crate::schedule::StepKind;

/// How long replies take from a token to the step with it.
#[derive(Debug, Default)]
pub(super) struct Company {
    /// when the last step of a reply came out, if no stage has run here since: a step that comes while one does is not
    /// taken in before it is done, and says nothing
    out_at: Option<Instant>,
    /// a moving mean
    takes: Option<Duration>,
}

impl Company {
    /// A step of a reply has come out.
    pub(super) fn came_out(&mut self, now: Instant) {
        self.out_at = Some(now);
    }

    /// A stage runs here.
    pub(super) fn stage_runs(&mut self) {
        self.out_at = None;
    }

    /// A step of a reply was given.
    pub(super) fn came_back(&mut self, now: Instant) {
        let Some(out_at) = self.out_at else { return };
        let took = now.saturating_duration_since(out_at);
        if took < NOT_SAMPLING {
            let mean = self.takes.unwrap_or(took);
            self.takes = Some((mean * 7 + took) / 8);
        }
    }

    /// Until when the next one is waited for, where a round of all replies takes `round`.
    fn until(&self, round: Option<Duration>) -> Option<Instant> {
        // a worker's word for how long it computes makes no wait longer
        let wait = self.takes.map_or(BEFORE_ANY, |takes| takes * 2);
        Some(self.out_at? + round.map_or(wait, |round| wait.min(round / PART_OF_A_ROUND)))
    }
}

impl Pipeline {
    /// A step was given: of a reply it is company for others.
    pub(super) fn has_come(&mut self, kind: StepKind) {
        if self.is_shared && kind == StepKind::Decode {
            self.company.came_back(self.clock.now());
        }
    }

    /// Where it is worth it, waits a moment for replies that are about to go on, or until `deadline`. Whether it has:
    /// something else may be next then.
    pub(super) fn waits_for_company(&mut self, deadline: Option<Instant>) -> bool {
        if !self.is_shared || !self.schedule.awaits_company() {
            return false;
        }
        let Some(until) = self.company.until(self.schedule.round()) else { return false };
        if self.clock.now() >= until {
            return false;
        }
        self.listen();
        self.clock.wait(&self.bell, deadline.into_iter().chain([until]).min());
        self.hear();
        true
    }
}

/// Longer than that, and somebody reads a reply before he goes on.
const NOT_SAMPLING: Duration = Duration::from_millis(50);
/// What a wait is of a round at most.
const PART_OF_A_ROUND: u32 = 10;
/// A wait before it is known how long replies take.
const BEFORE_ANY: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use super::super::fakes::{models, timed};
    use super::super::{Advance, Patience, Pipeline, Step};
    use super::*;
    use crate::schedule::SessionId;

    const SAMPLING: Duration = Duration::from_micros(400);

    /// The rows of a round of two replies, and how much later than nothing it began, where so many of them are there.
    fn begins_with(there: u32) -> (usize, Duration) {
        let (mut pipeline, world) = timed(&models(&[10, 10], 0, 2), Patience::default());
        pipeline.set_batch_rows(8);
        pipeline.set_shared(true);
        let give = |pipeline: &mut Pipeline, position: u32, sessions: u32| {
            for i in 0..sessions {
                pipeline.submit(Step::decode(SessionId(i), position, 1));
            }
        };
        let come_out = |pipeline: &mut Pipeline| match pipeline.advance(None) {
            Advance::Finished(finished) => finished.session,
            other => panic!("{other:?}"),
        };
        give(&mut pipeline, 0, 2);
        assert_eq!((come_out(&mut pipeline), come_out(&mut pipeline)), (SessionId(0), SessionId(1)));
        world.pass(SAMPLING);
        let began = world.elapsed();
        give(&mut pipeline, 1, there);
        come_out(&mut pipeline);
        let took = world.elapsed() - began - Duration::from_millis(20);
        let rows = 1 + usize::from(matches!(pipeline.advance(None), Advance::Finished(_)));
        (rows, took)
    }

    #[test]
    fn no_wait_is_longer_for_a_worker_that_says_it_computed_for_ages() {
        let now = Instant::now();
        let mut company = Company::default();
        company.came_out(now);
        let wait = |company: &Company, round| company.until(round).unwrap() - now;
        assert_eq!(wait(&company, Some(Duration::MAX)), BEFORE_ANY);
        assert_eq!(wait(&company, Some(Duration::from_millis(5))), Duration::from_micros(500));
        company.came_back(now + SAMPLING);
        assert_eq!((wait(&company, None), wait(&company, Some(Duration::MAX))), (2 * SAMPLING, 2 * SAMPLING));
        company.came_back(now + NOT_SAMPLING);
        assert_eq!(wait(&company, None), 2 * SAMPLING, "whoever comes so late has read it first");
    }

    #[test]
    fn a_batch_waits_a_moment_for_whose_token_came_out_with_the_others() {
        assert_eq!(begins_with(2), (2, Duration::ZERO));
        assert_eq!(begins_with(1), (1, SAMPLING), "twice as long as this one took");
    }
}
