//! In how many batches the replies of several sessions go through the stages: in as many as make a round of all of them
//! shortest, by what steps of so many rows have taken on each stage.
//!
//! All in one batch leaves every device idle while another computes; each alone pays for every row what a step costs. A
//! round in `g` batches takes as long as the busiest device computes its `g`, or as one batch takes through all stages
//! and over all ways between, whichever is longer. Where replies are as many as devices or more, and the cut is even,
//! that is one batch for each device; over a long way it is more, where a row costs little beside another it is fewer.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::ids::StageId;

/// What steps took on the stages of a pipeline.
#[derive(Clone, Debug, Default)]
pub struct Groups {
    stages: Vec<StageCosts>,
    /// the last choice, and for how many replies
    chosen: (usize, usize),
    /// seconds that a round takes with it
    takes: Option<f64>,
    /// nothing was measured since
    is_settled: bool,
}

/// What steps took on a stage, by their rows.
#[derive(Clone, Debug)]
struct StageCosts {
    is_remote: bool,
    round_trip: Duration,
    /// how slow the stage is now, beside what the costs say: it gets hot, others want its cores
    pace: f64,
    /// of each number of rows, at a pace of 1
    by_rows: BTreeMap<usize, Costs>,
    n_steps: u64,
}

/// What the last steps of as many rows took.
#[derive(Clone, Debug, Default)]
struct Costs {
    /// seconds
    last: VecDeque<f64>,
    median: f64,
    /// the step of the stage that was the last of them
    at: u64,
}

impl Groups {
    /// For these stages, remote or local, in order.
    pub fn new(is_remote: impl IntoIterator<Item = bool>) -> Groups {
        let stage = |is_remote| StageCosts {
            is_remote,
            round_trip: Duration::ZERO,
            pace: 1.0,
            by_rows: BTreeMap::new(),
            n_steps: 0,
        };
        Groups { stages: is_remote.into_iter().map(stage).collect(), ..Groups::default() }
    }

    /// A step of so many rows has computed for so long on a stage.
    pub fn computed(&mut self, stage: StageId, rows: usize, compute: Duration) {
        self.is_settled = false;
        if (1..=MOST_ROWS).contains(&rows)
            && let Some(stage) = self.stages.get_mut(stage.0)
            && stage.computed(rows, compute.as_secs_f64())
        {
            // what is not known any more is found out again, from where it was begun
            self.chosen = (0, 0);
        }
    }

    /// How long a message to a remote stage and its answer are under way.
    pub fn under_way(&mut self, stage: StageId, round_trip: Duration) {
        if let Some(stage) = self.stages.get_mut(stage.0) {
            self.is_settled &= stage.round_trip == round_trip;
            stage.round_trip = round_trip;
        }
    }

    /// The last choice; 0 before the first one.
    pub fn chosen(&self) -> usize {
        self.chosen.0
    }

    /// How long a round of all replies takes with the last choice, by what was measured.
    pub fn round_takes(&self) -> Option<Duration> {
        self.takes.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
    }

    /// In how many batches this many replies go on: at least 1, and not more than there are replies.
    pub fn of(&mut self, replies: usize) -> usize {
        let replies = replies.max(1);
        if self.is_settled && self.chosen.1 == replies {
            return self.chosen.0;
        }
        self.is_settled = true;
        let n_devices = 1 + self.stages.iter().filter(|stage| stage.is_remote).count();
        let now = match self.chosen {
            (groups, of) if of == replies => groups,
            _ => n_devices.min(replies),
        };
        self.chosen = (now, replies);
        // one that has just begun says little
        let rows = replies.div_ceil(now);
        let is_known = |stage: &StageCosts| stage.by_rows.get(&rows).is_some_and(|c| c.last.len() >= ENOUGH);
        if !self.stages.iter().all(is_known) {
            return now;
        }
        let Some(now_takes) = self.round(now, replies) else { return now };
        let rounds = (1..=replies).filter_map(|groups| Some((groups, self.round(groups, replies)?)));
        let shorter = rounds.filter(|round| round.1 < now_takes * WORTH_A_CHANGE);
        let best = shorter.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((now, now_takes));
        (self.chosen, self.takes) = ((best.0, replies), Some(best.1));
        best.0
    }

    /// Seconds that a round of all replies takes in so many batches, if it is known.
    fn round(&self, groups: usize, replies: usize) -> Option<f64> {
        let rows = replies.div_ceil(groups);
        let (mut local, mut busiest, mut through) = (0.0, 0.0_f64, 0.0);
        for stage in &self.stages {
            let cost = stage.of(rows)?;
            through += cost + stage.round_trip.as_secs_f64();
            match stage.is_remote {
                true => busiest = busiest.max(cost),
                false => local += cost,
            }
        }
        Some(through.max(busiest.max(local) * groups as f64))
    }
}

impl StageCosts {
    /// A step took so many seconds. Whether another number of rows was forgotten, of which there was none for long.
    fn computed(&mut self, rows: usize, took: f64) -> bool {
        self.n_steps += 1;
        let costs = self.by_rows.entry(rows).or_default();
        if costs.last.len() >= ENOUGH && costs.median > 0.0 {
            self.pace += (took / costs.median - self.pace) * NEWEST;
        }
        costs.last.truncate(SAMPLES - 1);
        costs.last.push_front(took / self.pace);
        let mut sorted: Vec<f64> = costs.last.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        (costs.median, costs.at) = (sorted[sorted.len() / 2], self.n_steps);
        let (n_known, newest) = (self.by_rows.len(), self.n_steps);
        self.by_rows.retain(|_, costs| newest - costs.at < REMEMBERED);
        self.by_rows.len() < n_known
    }

    /// Seconds that a step of so many rows takes: as measured, on the line between two numbers of rows that were, or on
    /// that through the first and the last beyond them. Where one number was measured, each row costs the same.
    fn of(&self, rows: usize) -> Option<f64> {
        let at = |(rows, costs): (&usize, &Costs)| (*rows as f64, costs.median * self.pace);
        let (first, last) = (self.by_rows.first_key_value().map(at)?, self.by_rows.last_key_value().map(at)?);
        let below = self.by_rows.range(..=rows).next_back().map(at);
        let above = self.by_rows.range(rows..).next().map(at);
        let rows = rows as f64;
        let ((n0, c0), (n1, c1)) = match (below, above) {
            (Some(below), Some(above)) if below.0 == above.0 => return Some(below.1),
            (Some(below), Some(above)) => (below, above),
            _ if first.0 == last.0 => return Some(first.1 * rows / first.0),
            _ => (first, last),
        };
        let slope = ((c1 - c0) / (n1 - n0)).max(0.0);
        Some((c0 + slope * (rows - n0)).max(0.0))
    }
}

/// More rows are a prompt's.
const MOST_ROWS: usize = 64;
/// Steps of one number of rows whose median counts, and without which none of them does for a change.
const SAMPLES: usize = 8;
const ENOUGH: usize = 3;
/// What the newest step counts for the pace: it has to be there before the samples are all of another one.
const NEWEST: f64 = 0.5;
/// Steps of a stage after which it is not known any more what another number of rows took.
const REMEMBERED: u64 = 4096;
/// A change that shortens a round by less changes back soon.
const WORTH_A_CHANGE: f64 = 0.97;

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Head, worker and tail; how long one row and each further one take on host (both its stages together) and worker.
    fn measured(host: (u32, u32), worker: (u32, u32), round_trip: Duration) -> Groups {
        let mut groups = Groups::new([false, true, false]);
        groups.under_way(StageId(1), round_trip);
        for rows in [1, 4, 8, 1, 4, 8, 1, 4, 8] {
            let of = |(one, more): (u32, u32)| MS * (one + more * (rows - 1));
            for (stage, cost) in [(0, of(host) / 2), (1, of(worker)), (2, of(host) / 2)] {
                groups.computed(StageId(stage), rows as usize, cost);
            }
        }
        groups
    }

    #[test]
    fn an_even_cut_has_a_batch_for_each_device_before_and_after_anything_is_measured() {
        assert_eq!(Groups::new([false, true, false]).of(8), 2);
        assert_eq!(Groups::new([false, true, true, false]).of(2), 2);
        assert_eq!(Groups::new([false, true, false]).of(1), 1);
        assert_eq!(Groups::new([false, true, false]).of(0), 1);
        let mut even = measured((20, 7), (20, 7), 10 * MS);
        assert_eq!((even.of(8), even.of(4), even.of(1)), (2, 2, 1));
        assert_eq!(even.round_takes(), Some(50 * MS), "of one: through all stages");
    }

    #[test]
    fn rows_that_cost_nothing_on_a_device_that_is_busy_go_together_and_long_ways_are_filled() {
        // the host has nearly all: whatever the worker waits, a second batch costs the host as much again
        assert_eq!(measured((30, 0), (2, 0), Duration::ZERO).of(8), 1);
        // 100 ms under way: each row for itself, while its costs fit in there
        assert_eq!(measured((4, 4), (4, 4), 100 * MS).of(8), 8);
    }

    #[test]
    fn what_is_measured_is_followed_and_what_is_not_lies_on_a_line() {
        let near = |cost: Option<f64>, ms: f64| (cost.unwrap() * 1e3 - ms).abs() < 1e-9;
        let mut costs = Groups::new([true]).stages.remove(0);
        assert_eq!(costs.of(3), None);
        costs.computed(1, 0.010);
        assert!(near(costs.of(1), 10.0) && near(costs.of(3), 30.0));
        (0..3).for_each(|_| assert!(!costs.computed(5, 0.018)));
        assert!(near(costs.of(3), 14.0) && near(costs.of(10), 28.0));
        // a stage that slows down slows down for all numbers of rows
        (0..100).for_each(|_| assert!(!costs.computed(5, 0.036)));
        let of = |rows| costs.of(rows).unwrap() * 1e3;
        assert!((of(5) - 36.0).abs() < 0.1 && (of(1) - 19.5).abs() < 1.5, "{} {}", of(5), of(1));
    }

    #[test]
    fn one_slow_step_changes_nothing_and_what_was_long_ago_is_found_out_again() {
        let mut even = measured((20, 7), (20, 7), 10 * MS);
        assert_eq!(even.of(8), 2);
        (0..3).for_each(|stage| even.computed(StageId(stage), 4, 400 * MS));
        assert_eq!(even.of(8), 2);
        // a prompt's chunk is none of it
        even.computed(StageId(0), 512, MS);
        assert!(!even.stages[0].by_rows.contains_key(&512));
        for _ in 0..REMEMBERED {
            (0..3).for_each(|stage| even.computed(StageId(stage), 4, 41 * MS));
        }
        assert_eq!(even.stages[1].by_rows.keys().collect::<Vec<_>>(), [&4]);
        assert_eq!((even.chosen(), even.of(8)), (0, 2));
    }
}
