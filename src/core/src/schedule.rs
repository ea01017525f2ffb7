//! Which stage runs what next. Sans-I/O: no model, no socket, no clock, no payload.
//!
//! A pipeline is an ordered list of stages. A *job* is what its caller pushed: a step's rows (a chunk of a prompt, one
//! token of a reply, a few guessed ones), or a rewind. It enters at stage 0 and leaves after the last stage. Whoever
//! drives it asks [`Schedule::next`] what to do, does it, tells [`Schedule::finished`] when a stage is done with a job,
//! and [`Schedule::lost`] and [`Schedule::found`] when a worker is. Everything else (buffers, positions, what time it is)
//! belongs to the driver: the [pipeline](crate::pipeline) and the [simulator](crate::simulator) are two loops over this.
//!
//! The rules:
//!
//! 1. At stage 0 each session has a *lane*. Lanes take turns; a step of a reply (decode) goes before a chunk of a prompt
//!    (prefill), but when every lane with a reply has had its turn, a waiting prompt has one. While another session is
//!    in its reply, at most one chunk is in the first worker's window, because the reply's next token has to wait for
//!    what is there.
//! 2. Steps of replies that wait when stage 0 becomes free go on as one batch, if batches are on: so many at most that
//!    all replies go in as many batches as keep the devices busy ([`crate::groups`]), those side by side together, and no
//!    more batches than that are under way. A batch goes by the number of its first job.
//! 3. From stage 0 on everything is first in, first out, rewinds included. A KV cache is written in order, so this is
//!    what makes two chunks of one prompt safe to overlap, and a rewind safe behind a step that is still computed.
//! 4. The local stages share this process's one compute device: at most one of them runs at a time. One that a worker
//!    with nothing to do waits for goes first; then the one nearest to a token. (A chunk of a prompt goes first only where
//!    nobody's reply waits for what it would pass.)
//! 5. A remote stage computes elsewhere and may hold several steps (its window): while it computes one, the next is
//!    already on the wire. A rewind takes no place in the window.
//! 6. A remote stage that loses its jobs (a dead worker) gets them again, in the same order, when it is found.
//! 7. A job that is cancelled, or whose session failed, vanishes where it waits; where it runs it becomes void: it keeps
//!    its place in the order and its result is dropped. A batch is void when all its jobs are; until then it goes on
//!    without the rows of those that are, from the next stage on.

mod lanes;

use std::collections::VecDeque;
use std::time::Duration;

use crate::groups::Groups;
use lanes::{Lane, LaneItem};

pub use crate::ids::{JobId, SessionId, StageId};

/// Where a stage computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// In this process, on its one compute device.
    Local,
    /// Behind a connection; holds at most `window` steps at once (at least 1).
    Remote {
        /// How many steps may be under way at once: the one it computes and the ones on the wire.
        window: usize,
    },
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Run this job on this local stage; it counts as running until it has [finished](Schedule::finished).
    Run(JobId, StageId),
    /// Send this job to this remote stage.
    Send(JobId, StageId),
    /// Nothing can start: wait for whichever stage answers first.
    Wait,
}

/// What kind of step it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepKind {
    /// A chunk of a prompt.
    Prefill,
    /// The next token of a reply, or a few guessed ones.
    Decode,
}

/// What became of a job that a stage has finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterStage {
    /// It waits for this stage now.
    Next(StageId),
    /// It has left the last stage.
    Complete,
    /// Nobody wants it any more: it has left.
    Void,
}

/// What became of a session's steps that were given up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// The oldest of them.
    pub first: Option<JobId>,
    /// What waited and is gone; a batch by the number of its first job.
    pub vanished: Vec<JobId>,
    /// Those that run, or are part of a batch with others: their results are dropped.
    pub voided: Vec<JobId>,
}

/// A stage reported a job out of turn: a bug of the caller or a lie of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{stage} finished {got}, but {} is the one it has to finish next", .expected.map_or("none".to_owned(), |job| job.to_string()))]
pub struct OutOfTurn {
    /// The stage that reported.
    pub stage: StageId,
    /// The job it reported.
    pub got: JobId,
    /// The job it should have reported; `None` when it had none.
    pub expected: Option<JobId>,
}

/// A caller's job as part of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// The job.
    pub job: JobId,
    /// Its session; `None`: it belongs to a stage and not to a caller.
    pub session: Option<SessionId>,
    /// Nobody wants its result.
    pub is_void: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Step(StepKind),
    Rewind,
    /// a step of a stage's own, to see whether it computes right
    Check,
}

/// What is queued at a stage: a job, or a batch of them.
#[derive(Debug)]
struct Entry {
    first: Member,
    /// the other jobs of a batch
    others: Vec<Member>,
    what: What,
    /// the stage after which it leaves
    last: usize,
}

impl Entry {
    fn members(&self) -> impl Iterator<Item = &Member> {
        std::iter::once(&self.first).chain(&self.others)
    }

    fn members_mut(&mut self) -> impl Iterator<Item = &mut Member> {
        std::iter::once(&mut self.first).chain(&mut self.others)
    }

    fn is_void(&self) -> bool {
        self.members().all(|member| member.is_void)
    }
}

#[derive(Debug)]
struct StageQueue {
    placement: Placement,
    /// whether it takes jobs: a worker that is lost does not
    is_open: bool,
    waiting: VecDeque<Entry>,
    running: VecDeque<Entry>,
    /// of the running ones, those that are no rewinds
    n_steps: usize,
}

impl StageQueue {
    fn is_remote(&self) -> bool {
        self.placement != Placement::Local
    }

    /// Whether an entry may start here; what would be first in line is `front`.
    fn takes(&self, front: What) -> bool {
        match self.placement {
            _ if !self.is_open => false,
            Placement::Local => self.running.is_empty(),
            Placement::Remote { window } => front == What::Rewind || self.n_steps < window.max(1),
        }
    }

    /// Whether it is a worker that has nothing to do.
    fn is_hungry(&self) -> bool {
        self.is_remote() && self.is_open && self.waiting.is_empty() && self.n_steps == 0
    }

    fn start(&mut self, entry: Entry) {
        self.n_steps += usize::from(entry.what != What::Rewind);
        self.running.push_back(entry);
    }

    fn holds_prefill(&self) -> bool {
        self.waiting.iter().chain(&self.running).any(|entry| entry.what == What::Step(StepKind::Prefill))
    }
}

/// The queues of one pipeline. Kinds of methods:
///
/// * what callers want: [`push`](Self::push), [`push_rewind`](Self::push_rewind), [`cancel`](Self::cancel),
///   [`fail`](Self::fail);
/// * the driver's loop: [`next`](Self::next), then [`finished`](Self::finished) for whatever has finished, and again;
/// * what befalls stages: [`lost`](Self::lost) and [`found`](Self::found), [`set_window`](Self::set_window),
///   [`computed`](Self::computed), [`set_round_trip`](Self::set_round_trip), [`push_check`](Self::push_check),
///   [`withdraw`](Self::withdraw).
#[derive(Debug)]
pub struct Schedule {
    stages: Vec<StageQueue>,
    lanes: Vec<Lane>,
    /// how much waits in all of them
    n_in_lanes: usize,
    /// the lane whose turn it is
    turn: usize,
    next_id: u64,
    /// steps that have left their lane and not yet the pipeline
    under_way: usize,
    /// of these, chunks of prompts
    prefills_under_way: usize,
    limit: usize,
    /// most rows of a batch; at 1 every step goes alone
    batch_rows: u32,
    /// in how many batches replies go
    groups: Groups,
    /// steps of replies that started since a chunk of a prompt did
    decodes_in_a_row: usize,
}

impl Schedule {
    /// A schedule over these stages. At most `limit` steps (at least 1) are between the start of stage 0 and
    /// the end of the last stage: each holds a buffer of hidden rows. Batches are off.
    pub fn new(placements: &[Placement], limit: usize) -> Schedule {
        let stage = |&placement| StageQueue {
            placement,
            is_open: true,
            waiting: VecDeque::new(),
            running: VecDeque::new(),
            n_steps: 0,
        };
        Schedule {
            stages: placements.iter().map(stage).collect(),
            lanes: Vec::new(),
            n_in_lanes: 0,
            turn: 0,
            next_id: 0,
            under_way: 0,
            prefills_under_way: 0,
            limit: limit.max(1),
            batch_rows: 1,
            groups: Groups::new(placements.iter().map(|placement| *placement != Placement::Local)),
            decodes_in_a_row: 0,
        }
    }

    /// Most rows of a batch of several sessions' replies; 1 (as at first): no batches.
    pub fn set_batch_rows(&mut self, rows: u32) {
        self.batch_rows = rows.max(1);
    }

    /// Adds a step of `rows` rows behind all others of its session.
    pub fn push(&mut self, session: SessionId, kind: StepKind, rows: u32) -> JobId {
        self.push_item(session, What::Step(kind), rows)
    }

    /// Adds a rewind behind everything else of its session.
    pub fn push_rewind(&mut self, session: SessionId) -> JobId {
        self.push_item(session, What::Rewind, 0)
    }

    fn push_item(&mut self, session: SessionId, what: What, rows: u32) -> JobId {
        let job = self.new_id();
        let at = self.lane_of(session);
        self.n_in_lanes += 1;
        self.lanes[at].items.push_back(LaneItem { job, what, rows });
        self.lanes[at].passed = 0;
        job
    }

    fn new_id(&mut self) -> JobId {
        let id = JobId(self.next_id);
        self.next_id += 1;
        id
    }

    fn lane_of(&mut self, session: SessionId) -> usize {
        self.lanes.iter().position(|lane| lane.session == session).unwrap_or_else(|| {
            self.forget_idle_lanes();
            let items = VecDeque::new();
            self.lanes.push(Lane { session, items, decodes_under_way: 0, has_replied: false, passed: 0 });
            self.lanes.len() - 1
        })
    }

    /// Adds `n_steps` steps of a stage's own and then a rewind, before everything that waits for this stage. They leave
    /// after it. Their numbers, in order.
    pub fn push_check(&mut self, stage: StageId, n_steps: usize) -> Vec<JobId> {
        let ids: Vec<JobId> = (0..=n_steps).map(|_| self.new_id()).collect();
        for (i, &job) in ids.iter().enumerate().rev() {
            let what = if i == n_steps { What::Rewind } else { What::Check };
            let first = Member { job, session: None, is_void: false };
            let entry = Entry { first, others: Vec::new(), what, last: stage.0 };
            self.stages[stage.0].waiting.push_front(entry);
        }
        ids
    }

    /// The next thing to do; `None` when there is no job anywhere.
    ///
    /// Remote stages come first: to send costs this device nothing and gives another one work. Then the
    /// local stage nearest to the end.
    // not an Iterator: what comes next depends on what the caller reports between two calls
    #[expect(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Option<Next> {
        for stage in (0..self.stages.len()).rev() {
            if self.stages[stage].is_remote()
                && let Some(entry) = self.take(stage)
            {
                let job = entry.first.job;
                self.stages[stage].start(entry);
                self.settle(stage);
                return Some(Next::Send(job, StageId(stage)));
            }
        }
        if !self.is_computing() {
            let n = self.stages.len();
            let by_urgency = (0..=LEAST_URGENT).flat_map(|urgency| (0..n).rev().map(move |i| (urgency, i)));
            for (urgency, stage) in by_urgency {
                if !self.stages[stage].is_remote()
                    && self.urgency(stage) == urgency
                    && let Some(entry) = self.take(stage)
                {
                    let job = entry.first.job;
                    self.stages[stage].start(entry);
                    return Some(Next::Run(job, StageId(stage)));
                }
            }
        }
        (!self.is_idle()).then_some(Next::Wait)
    }

    /// `stage` is done with `job`, which must be the oldest it was given. (A rewind that was sent needs no word: it is
    /// done when the steps before it are.)
    ///
    /// # Errors
    /// It is not; nothing has changed then.
    pub fn finished(&mut self, stage: StageId, job: JobId) -> Result<AfterStage, OutOfTurn> {
        let expected = self.front(stage);
        if expected != Some(job) {
            return Err(OutOfTurn { stage, got: job, expected });
        }
        let Some(entry) = self.stages[stage.0].running.pop_front() else {
            return Err(OutOfTurn { stage, got: job, expected: None });
        };
        self.stages[stage.0].n_steps -= usize::from(entry.what != What::Rewind);
        let progress = self.move_on(stage.0, entry);
        self.settle(stage.0);
        Ok(progress)
    }

    /// The stage lost what it was given: those jobs wait for it again, in the same order, but it takes none until it is
    /// [found](Self::found). What was void, and its own checks, are gone: their numbers.
    pub fn lost(&mut self, stage: StageId) -> Vec<JobId> {
        let queue = &mut self.stages[stage.0];
        queue.is_open = false;
        queue.n_steps = 0;
        let mut entries = std::mem::take(&mut queue.running);
        entries.append(&mut queue.waiting);
        let mut gone = Vec::new();
        for entry in entries {
            if entry.is_void() || entry.first.session.is_none() {
                gone.push(entry.first.job);
                self.leave(&entry, false);
            } else {
                self.stages[stage.0].waiting.push_back(entry);
            }
        }
        gone
    }

    /// The stage takes jobs again.
    pub fn found(&mut self, stage: StageId) {
        self.stages[stage.0].is_open = true;
    }

    /// A remote stage holds at most this many steps from now on.
    pub fn set_window(&mut self, stage: StageId, steps: usize) {
        if let Placement::Remote { window } = &mut self.stages[stage.0].placement {
            *window = steps;
        }
    }

    /// A step of so many rows has computed for so long on a stage.
    pub fn computed(&mut self, stage: StageId, rows: usize, compute: Duration) {
        self.groups.computed(stage, rows, compute);
    }

    /// How long a message to this remote stage and its answer are under way.
    pub fn set_round_trip(&mut self, stage: StageId, round_trip: Duration) {
        self.groups.under_way(stage, round_trip);
    }

    /// How long a round of all replies takes, by what was measured.
    pub fn round(&self) -> Option<Duration> {
        self.groups.round_takes()
    }

    /// A job that this remote stage was given last was not sent after all, and is given up. Whether it was the last.
    pub fn withdraw(&mut self, stage: StageId, job: JobId) -> bool {
        let queue = &mut self.stages[stage.0];
        if queue.running.back().is_none_or(|entry| entry.first.job != job) {
            return false;
        }
        if let Some(entry) = queue.running.pop_back() {
            queue.n_steps -= usize::from(entry.what != What::Rewind);
            self.leave(&entry, false);
        }
        true
    }

    /// Nobody wants this step's result any more, nor those of its session's steps behind it, which stand on it, up to
    /// its next rewind. What became of those that have not left yet.
    pub fn cancel(&mut self, session: SessionId, job: JobId) -> Dropped {
        let end = self.next_rewind(session, job);
        self.drop_steps(session, |id| id >= job && end.is_none_or(|end| id < end))
    }

    /// The next rewind of a session behind this step, of those that have yet to pass all stages.
    pub fn next_rewind(&self, session: SessionId, job: JobId) -> Option<JobId> {
        let entries = self.stages.iter().flat_map(|stage| stage.running.iter().chain(&stage.waiting));
        let own = entries.filter(|e| e.what == What::Rewind && e.first.session == Some(session));
        let lanes = self.lanes.iter().filter(|lane| lane.session == session);
        let items = lanes.flat_map(|lane| &lane.items).filter(|item| item.what == What::Rewind);
        own.map(|e| e.first.job).chain(items.map(|item| item.job)).filter(|&rewind| rewind > job).min()
    }

    /// Gives up every step of a session, as after an error; its rewinds stay. What became of the steps.
    pub fn fail(&mut self, session: SessionId) -> Dropped {
        self.lanes.iter_mut().filter(|l| l.session == session).for_each(|lane| lane.has_replied = false);
        self.drop_steps(session, |_| true)
    }

    /// Makes a session's steps vanish where they wait, and void where they run or are part of a batch.
    fn drop_steps(&mut self, session: SessionId, is_meant: impl Fn(JobId) -> bool) -> Dropped {
        let mut gone = Dropped::default();
        for stage in 0..self.stages.len() {
            let queue = &mut self.stages[stage];
            let steps = queue.running.iter_mut().chain(&mut queue.waiting).filter(|e| e.what != What::Rewind);
            for member in steps.flat_map(Entry::members_mut) {
                if member.session == Some(session) && is_meant(member.job) && !member.is_void {
                    member.is_void = true;
                    gone.first = gone.first.into_iter().chain([member.job]).min();
                    gone.voided.push(member.job);
                }
            }
            let vanishes = |e: &Entry| e.what != What::Rewind && e.is_void();
            let mut at = 0;
            while at < self.stages[stage].waiting.len() {
                if !vanishes(&self.stages[stage].waiting[at]) {
                    at += 1;
                } else if let Some(entry) = self.stages[stage].waiting.remove(at) {
                    self.leave(&entry, false);
                    gone.voided.retain(|job| entry.members().all(|member| member.job != *job));
                    gone.vanished.push(entry.first.job);
                }
            }
        }
        for lane in self.lanes.iter_mut().filter(|lane| lane.session == session) {
            lane.items.retain(|item| {
                let stays = item.what == What::Rewind || !is_meant(item.job);
                if !stays {
                    self.n_in_lanes -= 1;
                    gone.first = gone.first.into_iter().chain([item.job]).min();
                    gone.vanished.push(item.job);
                }
                stays
            });
        }
        gone
    }

    /// The oldest job that `stage` runs.
    pub fn front(&self, stage: StageId) -> Option<JobId> {
        self.stages.get(stage.0)?.running.front().map(|entry| entry.first.job)
    }

    /// How many steps `stage` runs.
    pub fn n_running(&self, stage: StageId) -> usize {
        self.stages[stage.0].n_steps
    }

    /// Whether `stage` runs one thing and nothing else was sent behind it, no rewind either.
    pub fn runs_one(&self, stage: StageId) -> bool {
        self.stages[stage.0].running.len() == 1
    }

    /// The steps that `stage` runs and nobody wants any more, oldest first; a batch by the number of its first job.
    pub fn void_steps(&self, stage: StageId) -> impl Iterator<Item = JobId> {
        let is_meant = |entry: &&Entry| matches!(entry.what, What::Step(_)) && entry.is_void();
        self.stages[stage.0].running.iter().filter(is_meant).map(|entry| entry.first.job)
    }

    /// The jobs of what `stage` runs under this number: one, or those of a batch.
    pub fn members(&self, stage: StageId, job: JobId) -> impl Iterator<Item = Member> {
        let entry = self.stages[stage.0].running.iter().rev().find(|entry| entry.first.job == job);
        entry.into_iter().flat_map(Entry::members).copied()
    }

    /// Sessions with steps that have not passed `stage` yet, in the order of their first one.
    pub fn sessions_up_to(&self, stage: StageId) -> Vec<SessionId> {
        let mut sessions = Vec::new();
        let queues = self.stages[..=stage.0].iter().rev();
        let entries = queues.flat_map(|q| q.running.iter().chain(&q.waiting));
        let members = entries.filter(|e| e.what != What::Rewind).flat_map(Entry::members);
        let under_way = members.filter(|m| !m.is_void).filter_map(|m| m.session);
        let has_step = |lane: &&Lane| lane.items.iter().any(|item| item.what != What::Rewind);
        let in_lanes = self.lanes.iter().filter(has_step).map(|lane| lane.session);
        for session in under_way.chain(in_lanes) {
            if !sessions.contains(&session) {
                sessions.push(session);
            }
        }
        sessions
    }

    /// No job anywhere.
    pub fn is_idle(&self) -> bool {
        self.n_in_lanes == 0 && self.stages.iter().all(|s| s.running.is_empty() && s.waiting.is_empty())
    }

    /// Takes what may start on `stage` now out of its queue.
    fn take(&mut self, stage: usize) -> Option<Entry> {
        let queue = &mut self.stages[stage];
        match queue.waiting.front() {
            Some(front) if queue.takes(front.what) => queue.waiting.pop_front(),
            None if stage == 0 && self.n_in_lanes > 0 => self.enter(),
            _ => None,
        }
    }

    /// Whether a local stage runs.
    fn is_computing(&self) -> bool {
        self.stages.iter().any(|stage| !stage.is_remote() && !stage.running.is_empty())
    }

    /// Which local stage goes first, the lowest: a rewind costs nothing; one that a worker with nothing to do waits for,
    /// where nobody's reply is the worse for it; the others.
    fn urgency(&mut self, stage: usize) -> u8 {
        if self.stages[stage].waiting.front().is_some_and(|entry| entry.what == What::Rewind) {
            return 0;
        }
        let feeds = self.stages.get(stage + 1).is_some_and(StageQueue::is_hungry);
        if feeds && (stage > 0 || self.enters_without_harm()) { 1 } else { LEAST_URGENT }
    }

    /// An entry that `stage` is done with.
    fn move_on(&mut self, stage: usize, entry: Entry) -> AfterStage {
        if entry.is_void() {
            self.leave(&entry, false);
            return AfterStage::Void;
        }
        if stage == entry.last {
            self.leave(&entry, true);
            return AfterStage::Complete;
        }
        self.stages[stage + 1].waiting.push_back(entry);
        AfterStage::Next(StageId(stage + 1))
    }

    /// Rewinds that were sent to a remote stage and have no unanswered step before them move on.
    fn settle(&mut self, stage: usize) {
        let is_done = |entry: &Entry| entry.what == What::Rewind;
        while self.stages[stage].is_remote() && self.stages[stage].running.front().is_some_and(is_done) {
            if let Some(entry) = self.stages[stage].running.pop_front() {
                self.move_on(stage, entry);
            }
        }
    }

    /// An entry is no longer in the pipeline.
    fn leave(&mut self, entry: &Entry, is_complete: bool) {
        let What::Step(kind) = entry.what else { return };
        self.under_way -= 1;
        match kind {
            StepKind::Prefill => self.prefills_under_way -= 1,
            StepKind::Decode => {
                for member in entry.members() {
                    if let Some(lane) = self.lanes.iter_mut().find(|l| Some(l.session) == member.session) {
                        lane.decodes_under_way -= 1;
                        lane.has_replied |= is_complete && !member.is_void;
                    }
                }
            }
        }
    }
}

/// Of a local stage that nothing speaks for.
const LEAST_URGENT: u8 = 2;

#[cfg(test)]
mod tests;
