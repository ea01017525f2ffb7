//! Which stage runs what next. Sans-I/O: no model, no socket, no clock, no payload.
//!
//! A pipeline is an ordered list of stages. A *job* is one step's rows (a chunk of a prompt, one token of a
//! reply, a few tokens of several sessions): it enters at stage 0 and leaves after the last stage. The
//! caller asks [`Schedule::start`] what to run, tells [`Schedule::finished`] when a stage is done with a job,
//! and asks [`Schedule::wait_for`] whom to wait for when there is nothing to run. Everything else (buffers,
//! sessions, positions) belongs to the caller, so prompt chunks that overlap, rows that are verified
//! together and sessions side by side are only more jobs.
//!
//! The rules:
//!
//! 1. Each stage takes its jobs in the order in which they were pushed. A KV cache is written in order, so
//!    this is what makes two chunks of one prompt safe to overlap.
//! 2. The local stages share this process's one compute device: at most one of them runs at a time.
//! 3. A remote stage computes elsewhere and may hold several jobs (its window): while it computes one, the
//!    next is already on the wire.
//! 4. What is nearest to a token goes first: of the local stages the last one that has work.
//! 5. A remote stage that loses its jobs (a dead worker) gets them again, in the same order.

use std::collections::VecDeque;

/// Where a stage computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// In this process, on its one compute device.
    Local,
    /// Behind a connection; holds at most `window` jobs at once (at least 1).
    Remote {
        /// How many jobs may be under way at once: the one it computes and the ones on the wire.
        window: usize,
    },
}

/// A job's number: 0, 1, 2, ... in the order of [`Schedule::push`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u64);

/// Run `job` on stage `stage` now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// The job to run.
    pub job: JobId,
    /// The stage to run it on, counted from 0 in pipeline order.
    pub stage: usize,
}

/// What became of a job that a stage has finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It waits for this stage now.
    Next(usize),
    /// It has left the last stage.
    Complete,
}

/// A stage reported a job out of turn: a bug of the caller or a lie of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stage {stage} finished job {got:?}, but {expected:?} is the one it has to finish next")]
pub struct OutOfTurn {
    /// The stage that reported.
    pub stage: usize,
    /// The job it reported.
    pub got: JobId,
    /// The job it should have reported; `None` when it had none.
    pub expected: Option<JobId>,
}

#[derive(Debug)]
struct StageQueue {
    placement: Placement,
    waiting: VecDeque<JobId>,
    running: VecDeque<JobId>,
}

impl StageQueue {
    fn has_room(&self) -> bool {
        match self.placement {
            Placement::Local => self.running.is_empty(),
            Placement::Remote { window } => self.running.len() < window.max(1),
        }
    }
}

/// The queues of one pipeline. Order of calls: any number of [`push`](Self::push), then
/// [`start`](Self::start) until it says `None`, then [`finished`](Self::finished) for whatever has finished,
/// and again.
#[derive(Debug)]
pub struct Schedule {
    stages: Vec<StageQueue>,
    next_id: u64,
    /// jobs that have left stage 0's queue and not yet the pipeline
    under_way: usize,
    limit: usize,
}

impl Schedule {
    /// A schedule over these stages. At most `limit` jobs (at least 1) are between the start of stage 0 and
    /// the end of the last stage: each holds a buffer of hidden rows.
    pub fn new(placements: &[Placement], limit: usize) -> Schedule {
        let stages = placements
            .iter()
            .map(|&placement| StageQueue { placement, waiting: VecDeque::new(), running: VecDeque::new() })
            .collect();
        Schedule { stages, next_id: 0, under_way: 0, limit: limit.max(1) }
    }

    /// Adds a job behind all others.
    pub fn push(&mut self) -> JobId {
        let id = JobId(self.next_id);
        self.next_id += 1;
        if let Some(first) = self.stages.first_mut() {
            first.waiting.push_back(id);
        }
        id
    }

    /// The next thing to run, if anything can run now; it counts as running from here on.
    ///
    /// Remote stages come first: to send costs this device nothing and gives another one work. Then the
    /// local stage nearest to the end.
    pub fn start(&mut self) -> Option<Start> {
        let local_busy = self.stages.iter().any(|s| s.placement == Placement::Local && !s.running.is_empty());
        let room_at_entry = self.under_way < self.limit;
        let can_start = |&i: &usize| {
            let s = &self.stages[i];
            !s.waiting.is_empty()
                && s.has_room()
                && (i > 0 || room_at_entry)
                && !(s.placement == Placement::Local && local_busy)
        };
        let is_remote = |i: &usize| self.stages[*i].placement != Placement::Local;
        let candidates = || (0..self.stages.len()).rev().filter(can_start);
        let stage = candidates().find(is_remote).or_else(|| candidates().next())?;

        let queue = &mut self.stages[stage];
        let job = queue.waiting.pop_front()?;
        queue.running.push_back(job);
        if stage == 0 {
            self.under_way += 1;
        }
        Some(Start { job, stage })
    }

    /// `stage` is done with `job`, which must be the oldest it was given.
    pub fn finished(&mut self, stage: usize, job: JobId) -> Result<Progress, OutOfTurn> {
        let expected = self.stages.get(stage).and_then(|s| s.running.front().copied());
        if expected != Some(job) {
            return Err(OutOfTurn { stage, got: job, expected });
        }
        self.stages[stage].running.pop_front();
        if stage + 1 < self.stages.len() {
            self.stages[stage + 1].waiting.push_back(job);
            Ok(Progress::Next(stage + 1))
        } else {
            self.under_way -= 1;
            Ok(Progress::Complete)
        }
    }

    /// The stage lost what it was given: those jobs wait for it again, in the same order.
    pub fn lost(&mut self, stage: usize) {
        let queue = &mut self.stages[stage];
        while let Some(job) = queue.running.pop_back() {
            queue.waiting.push_front(job);
            if stage == 0 {
                self.under_way -= 1;
            }
        }
    }

    /// The remote stage to wait for when nothing can start: the last one that has a job, because its answer
    /// is nearest to a token. Answers of the stages before it lie in their sockets meanwhile.
    pub fn wait_for(&self) -> Option<usize> {
        (0..self.stages.len())
            .rev()
            .find(|&i| self.stages[i].placement != Placement::Local && !self.stages[i].running.is_empty())
    }

    /// The oldest job that `stage` runs.
    pub fn running(&self, stage: usize) -> Option<JobId> {
        self.stages.get(stage)?.running.front().copied()
    }

    /// Whether `stage` was given `job` and has not finished it.
    pub fn is_running(&self, stage: usize, job: JobId) -> bool {
        self.stages.get(stage).is_some_and(|s| s.running.contains(&job))
    }

    /// No job anywhere.
    pub fn is_idle(&self) -> bool {
        self.stages.iter().all(|s| s.waiting.is_empty() && s.running.is_empty())
    }

    /// Forgets every job: after an error that ends the step, nothing of it may run on.
    pub fn clear(&mut self) {
        for stage in &mut self.stages {
            stage.waiting.clear();
            stage.running.clear();
        }
        self.under_way = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEAD_REMOTE_TAIL: [Placement; 3] =
        [Placement::Local, Placement::Remote { window: 2 }, Placement::Local];

    /// Simulated stages: the time of each step in ticks, devices that run one job at a time, no wall clock.
    /// Returns (ticks until everything was complete, the order in which each stage took its jobs).
    fn simulate(
        placements: &[Placement],
        ticks: &[u64],
        n_jobs: usize,
        limit: usize,
    ) -> (u64, Vec<Vec<u64>>) {
        let mut schedule = Schedule::new(placements, limit);
        for _ in 0..n_jobs {
            schedule.push();
        }
        let mut now = 0u64;
        let mut order = vec![Vec::new(); placements.len()];
        // (ends at, stage, job) of what runs; a remote stage works its jobs off one after the other
        let mut running: Vec<(u64, usize, JobId)> = Vec::new();
        let mut complete = 0;
        while complete < n_jobs {
            while let Some(Start { job, stage }) = schedule.start() {
                order[stage].push(job.0);
                let free_at = running.iter().filter(|r| r.1 == stage).map(|r| r.0).max().unwrap_or(now);
                running.push((free_at.max(now) + ticks[stage], stage, job));
            }
            let next = running.iter().enumerate().min_by_key(|(_, r)| r.0).map(|(i, _)| i);
            let (ends, stage, job) =
                running.swap_remove(next.expect("nothing runs, yet jobs are left: stuck"));
            now = ends;
            if schedule.finished(stage, job).unwrap() == Progress::Complete {
                complete += 1;
            }
        }
        assert!(schedule.is_idle());
        (now, order)
    }

    #[test]
    fn one_job_passes_every_stage_in_order() {
        let (ticks, order) = simulate(&HEAD_REMOTE_TAIL, &[5, 7, 3], 1, 4);
        assert_eq!(ticks, 15);
        assert_eq!(order, vec![vec![0]; 3]);
    }

    #[test]
    fn prompt_chunks_overlap_so_the_slower_device_sets_the_pace() {
        // host 4 + 4 per chunk, worker 8: in turn it would be 10 * 16; overlapped both are always busy
        let (ticks, _) = simulate(&HEAD_REMOTE_TAIL, &[4, 8, 4], 10, 4);
        assert!(ticks <= 10 * 8 + 8, "{ticks} ticks: chunks do not overlap");
    }

    #[test]
    fn without_overlap_a_window_of_one_job_takes_the_sum() {
        let (ticks, _) = simulate(&HEAD_REMOTE_TAIL, &[4, 8, 4], 10, 1);
        assert_eq!(ticks, 160);
    }

    #[test]
    fn two_workers_need_no_new_code() {
        let remote = Placement::Remote { window: 2 };
        let (ticks, order) =
            simulate(&[Placement::Local, remote, remote, Placement::Local], &[1, 6, 6, 1], 8, 8);
        assert!(ticks <= 8 * 6 + 2 * 6 + 2, "{ticks}");
        assert!(order.iter().all(|o| o.windows(2).all(|w| w[0] < w[1])));
    }

    #[test]
    fn a_lost_worker_gets_its_jobs_again_in_the_same_order() {
        let mut s = Schedule::new(&HEAD_REMOTE_TAIL, 4);
        let (a, b) = (s.push(), s.push());
        for job in [a, b] {
            assert_eq!(s.start(), Some(Start { job, stage: 0 }));
            s.finished(0, job).unwrap();
            assert_eq!(s.start(), Some(Start { job, stage: 1 }));
        }
        assert_eq!(s.wait_for(), Some(1));
        s.lost(1);
        assert_eq!(s.wait_for(), None);
        assert_eq!(s.start(), Some(Start { job: a, stage: 1 }));
        assert_eq!(s.start(), Some(Start { job: b, stage: 1 }));
    }

    #[test]
    fn refuses_a_job_out_of_turn() {
        let mut s = Schedule::new(&HEAD_REMOTE_TAIL, 4);
        let (a, b) = (s.push(), s.push());
        s.start();
        assert_eq!(s.finished(0, b), Err(OutOfTurn { stage: 0, got: b, expected: Some(a) }));
        assert_eq!(s.finished(2, a), Err(OutOfTurn { stage: 2, got: a, expected: None }));
    }

    proptest! {
        #[test]
        fn every_stage_sees_every_job_once_and_in_order(
            kinds in proptest::collection::vec(0usize..4, 1..6),
            seed_ticks in proptest::collection::vec(1u64..9, 6),
            n_jobs in 1usize..20,
            limit in 1usize..6,
        ) {
            let placements: Vec<Placement> = kinds
                .iter()
                .map(|&k| if k == 0 { Placement::Local } else { Placement::Remote { window: k } })
                .collect();
            let (_, order) = simulate(&placements, &seed_ticks, n_jobs, limit);
            let expected: Vec<u64> = (0..n_jobs as u64).collect();
            for stage in order {
                prop_assert_eq!(&stage, &expected);
            }
        }
    }
}
