//! The stages, driven by the [schedule](crate::schedule): steps of tokens go in, logits come out.
//!
//! ```text
//! submit, rewind, cancel -> [schedule] -- Run  -> a local stage computes, in the caller's thread
//!                                      -- Send -> a remote stage is sent it
//!                                      -- Wait -> whichever remote stage answers first
//! ```
//!
//! Order of calls: [`submit`](Pipeline::submit), [`rewind`](Pipeline::rewind) and [`cancel`](Pipeline::cancel) at any
//! time; [`advance`](Pipeline::advance) until it is [idle](Advance::Idle), or until its deadline. A session's steps and
//! rewinds take effect in the order in which they were given; sessions take turns.
//!
//! How it waits: where a single answer can end the wait, it is read in this thread, with nothing between the socket and
//! here. Where several can, each worker's link reads for itself and rings a [bell](crate::bell). Nothing waits longer
//! than it was told to; a local stage's step is the longest thing that is not interrupted.
//!
//! A worker that is lost is found again, and brought to where it was, between the steps of the others
//! (`pipeline/remote.rs`); the caller notices only through the [observer](Pipeline::observe).

mod company;
mod recover;
mod remote;
mod results;
mod saved;
mod table;
mod types;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::bell::{Bell, Interrupt};
use crate::blocks::BlockRange;
pub use crate::error::PipelineError;
use crate::history::History;
pub use crate::patience::Patience;
use crate::rows::{RowType, Rows, retain};
use crate::saved::SavedStep;
use crate::schedule::{AfterStage, JobId, Next, Placement, Schedule, SessionId, StageId};
use crate::stage::{LocalStage, Span, StageInput, StageOutput, TakeBack, Traffic};
use crate::trace::{Happened, Traced};
use crate::window::LEAST_WINDOW;
use company::Company;
use remote::{Connection, Remote};
use table::Table;
use types::SystemClock;
pub use types::{Advance, Clock, Event, Finished, Snapshot, StageSlot, StageSnapshot, StageStats, Step};

/// What goes with a job's number.
enum Work {
    Step(StepWork),
    Rewind(SessionId, u32),
    /// a step of a stage's check, by its place among them
    Check(usize),
    /// the end of a stage's check
    CheckEnd,
}

struct StepWork {
    /// whose rows they are; several in a batch
    spans: Vec<Span>,
    tokens: Vec<i32>,
    want_logits: Vec<bool>,
    /// of a batch: each job, its session, and how many rows of logits are its own
    parts: Vec<(JobId, SessionId, usize)>,
    /// the rows before the stage it waits for; none before stage 0
    hidden: Option<Rows>,
    /// its session begins anew to take rows back: nobody waits for it
    is_again: bool,
    /// it was computed once, in another process: what came of it is put back
    saved: Option<Box<SavedStep>>,
}

impl StepWork {
    fn new(span: Span, tokens: Vec<i32>, want_logits: Vec<bool>) -> StepWork {
        let (spans, parts) = (vec![span], Vec::new());
        StepWork { spans, tokens, want_logits, parts, hidden: None, is_again: false, saved: None }
    }

    fn part(&self, job: JobId) -> (JobId, SessionId, usize) {
        (job, self.spans[0].session(), self.want_logits.iter().filter(|wanted| **wanted).count())
    }
}

struct Slot {
    name: String,
    stats: StageStats,
    kind: Kind,
}

enum Kind {
    Local(Box<dyn LocalStage>),
    Remote(Box<Remote>),
}

/// An ordered list of stages and what is under way in them.
pub struct Pipeline {
    slots: Vec<Slot>,
    schedule: Schedule,
    history: History,
    work: Table<Work>,
    finished: VecDeque<Finished>,
    /// came out while a worker that had part in them is being checked
    held: VecDeque<Finished>,
    /// sessions that have to hear, with their next step, that what they were given is not to be believed
    untold: Vec<(SessionId, PipelineError)>,
    /// buffers of hidden rows that are free
    spare: Vec<Rows>,
    /// buffers of logits that were given back
    spare_logits: Vec<Vec<f32>>,
    dtype: RowType,
    patience: Patience,
    observer: Box<dyn FnMut(Event<'_>) + Send>,
    tracer: Option<Box<dyn FnMut(Traced) + Send>>,
    clock: Box<dyn Clock>,
    start: Instant,
    bell: Bell,
    interrupt: Interrupt,
    /// other threads interrupt, so every wait has to hear the bell
    is_shared: bool,
    company: Company,
    /// how much has been heard of remote stages
    n_heard: u64,
    /// the time as it was read last, while nothing has happened since that takes any
    moment: Option<Instant>,
    /// how long the last wait was, if nothing has been answered since
    waited: Option<Duration>,
}

impl Pipeline {
    /// A pipeline over `stages` with hidden rows of `dtype` between them. The first and the last stage have to
    /// be local: tokens and logits do not leave this machine.
    pub fn new(stages: Vec<StageSlot>, dtype: RowType, patience: Patience) -> Pipeline {
        Pipeline::with_clock(stages, dtype, patience, Box::new(SystemClock))
    }

    /// The same with another clock.
    pub fn with_clock(
        stages: Vec<StageSlot>,
        dtype: RowType,
        patience: Patience,
        clock: Box<dyn Clock>,
    ) -> Pipeline {
        let slots: Vec<Slot> = stages
            .into_iter()
            .map(|stage| {
                let (name, kind) = match stage {
                    StageSlot::Local(stage) => (stage.name(), Kind::Local(stage)),
                    StageSlot::Remote(stage) => (stage.name(), Kind::Remote(Box::new(Remote::new(stage)))),
                };
                Slot { name, stats: StageStats::default(), kind }
            })
            .collect();
        let placements: Vec<Placement> = slots
            .iter()
            .map(|slot| match &slot.kind {
                Kind::Local(_) => Placement::Local,
                Kind::Remote(remote) => Placement::Remote { window: LEAST_WINDOW.min(remote.agreed) },
            })
            .collect();
        let bell = Bell::new();
        Pipeline {
            schedule: Schedule::new(&placements, steps_under_way(&slots)),
            history: History::new(take_back(&slots)),
            slots,
            work: Table::default(),
            finished: VecDeque::new(),
            held: VecDeque::new(),
            untold: Vec::new(),
            spare: Vec::new(),
            spare_logits: Vec::new(),
            dtype,
            patience,
            observer: Box::new(|_| {}),
            tracer: None,
            start: clock.now(),
            clock,
            interrupt: Interrupt::new(bell.clone()),
            bell,
            is_shared: false,
            company: Company::default(),
            n_heard: 0,
            moment: None,
            waited: None,
        }
    }

    /// Who is told when a worker is lost and found.
    pub fn observe(&mut self, observer: impl FnMut(Event<'_>) + Send + 'static) {
        self.observer = Box::new(observer);
    }

    /// Who is told of every single thing that is done.
    pub fn trace(&mut self, tracer: impl FnMut(Traced) + Send + 'static) {
        self.tracer = Some(Box::new(tracer));
    }

    /// Evaluates steps of several sessions' replies together, up to so many rows; at 1, as at first, every step alone.
    /// Rows that go together through the kernels give other last bits than rows that go alone.
    pub fn set_batch_rows(&mut self, rows: u32) {
        self.schedule.set_batch_rows(rows);
    }

    /// What ends [`advance`](Self::advance) early, for a thread that has something to submit: while the pipeline is
    /// [shared](Self::set_shared) at once, otherwise behind the answer that is being waited for.
    pub fn interrupt(&self) -> Interrupt {
        self.interrupt.clone()
    }

    /// Whether other threads may interrupt: every wait is one for the bell then. Otherwise, as at first, a single answer
    /// is read in the caller's thread, which is the quickest way to it.
    pub fn set_shared(&mut self, yes: bool) {
        self.is_shared = yes;
    }

    /// Names, blocks and statistics of the stages, in order.
    pub fn stages(&self) -> impl Iterator<Item = (&str, Option<BlockRange>, StageStats)> {
        self.slots.iter().map(|slot| {
            let blocks = match &slot.kind {
                Kind::Local(stage) => stage.blocks(),
                Kind::Remote(remote) => remote.stage.blocks(),
            };
            (slot.name.as_str(), blocks, slot.stats)
        })
    }

    /// What crossed all sockets so far.
    pub fn traffic(&self) -> Traffic {
        let remote = self.slots.iter().filter_map(|slot| match &slot.kind {
            Kind::Local(_) => None,
            Kind::Remote(remote) => Some(remote.stage.traffic()),
        });
        remote.sum()
    }

    /// What the stages have done so far, and what has crossed sockets.
    pub fn snapshot(&self) -> Snapshot {
        let stages =
            self.stages().map(|(name, blocks, stats)| StageSnapshot { name: name.to_owned(), blocks, stats });
        Snapshot { stages: stages.collect(), traffic: self.traffic() }
    }

    /// Whether any stage is behind a connection.
    pub fn has_remote_stages(&self) -> bool {
        self.slots.iter().any(|slot| matches!(slot.kind, Kind::Remote(_)))
    }

    /// The number format between the stages.
    pub fn dtype(&self) -> RowType {
        self.dtype
    }

    /// Runs until a step has left the last stage or a session has failed; not beyond `deadline`, except for a local
    /// stage's step that has begun.
    pub fn advance(&mut self, deadline: Option<Instant>) -> Advance {
        self.moment = None;
        self.hear();
        loop {
            if let Some(finished) = self.finished.pop_front() {
                return Advance::Finished(finished);
            }
            if self.waits_for_company(deadline) {
                let is_late = deadline.is_some_and(|deadline| self.clock.now() >= deadline);
                if self.interrupt.take() || is_late {
                    return Advance::Later;
                }
                continue;
            }
            match self.schedule.next() {
                Some(Next::Run(job, stage)) => {
                    self.note(Happened::Run(job, stage));
                    self.moment = None;
                    self.run(job, stage);
                    self.hear();
                    let is_late = || deadline.is_some_and(|d| self.clock.now() >= d);
                    if self.finished.is_empty() && (self.interrupt.take() || is_late()) {
                        return Advance::Later;
                    }
                }
                Some(Next::Send(job, stage)) => {
                    self.note(Happened::Sent(job, stage));
                    self.send(job, stage);
                }
                Some(Next::Wait) => {
                    self.note(Happened::Waits);
                    if self.interrupt.take() || !self.wait(deadline) {
                        return Advance::Later;
                    }
                }
                None => return Advance::Idle,
            }
        }
    }

    fn note(&mut self, what: Happened) {
        if let Some(tracer) = &mut self.tracer {
            tracer(Traced { at: self.clock.now().saturating_duration_since(self.start), what });
        }
    }

    /// Runs a job on a local stage to its end.
    fn run(&mut self, id: JobId, at: StageId) {
        if at.0 == 0 {
            self.form_batch(id, at);
        }
        self.shed_void(id, at);
        self.company.stage_runs();
        if matches!(self.work.get(id), Some(Work::Step(step)) if step.saved.is_some()) {
            return self.put_back(id, at);
        }
        let is_last = at.0 + 1 == self.slots.len();
        let slot = &mut self.slots[at.0];
        let Kind::Local(stage) = &mut slot.kind else { unreachable!("the schedule runs local stages only") };
        let step = match self.work.get_mut(id) {
            Some(Work::Step(step)) => step,
            Some(&mut Work::Rewind(session, position)) => {
                if let Err(source) = stage.rewind(session, position) {
                    let error = PipelineError::Stage { stage: slot.name.clone(), source };
                    self.fail(session, id, &error);
                }
                return self.done(id, at);
            }
            Some(Work::Check(_) | Work::CheckEnd) | None => unreachable!("checks are of remote stages"),
        };
        // tokens or hidden rows -> hidden rows or logits
        let before = step.hidden.take();
        let input = match &before {
            Some(hidden) => StageInput::Rows { rows: hidden.as_ref(), tokens: &step.tokens },
            None => StageInput::Tokens(&step.tokens),
        };
        let mut logits = Vec::new();
        let mut after = None;
        let output = if is_last {
            logits = self.spare_logits.pop().unwrap_or_default();
            StageOutput::Logits { rows: &step.want_logits, out: &mut logits }
        } else {
            StageOutput::Rows(after.insert(self.spare.pop().unwrap_or_else(|| Rows::empty(self.dtype))))
        };
        let result = stage.evaluate(&step.spans, input, output);
        self.spare.extend(before);
        match result {
            Ok(spent) => {
                slot.stats.compute += spent;
                self.schedule.computed(at, step.tokens.len(), spent);
                step.hidden = after;
                if is_last {
                    return self.came_out(id, at, logits);
                }
            }
            Err(source) => {
                self.spare.extend(after);
                let error = PipelineError::Stage { stage: slot.name.clone(), source };
                self.fail_members(id, at, &error);
            }
        }
        self.done(id, at);
    }

    /// A local stage is done with a job.
    fn done(&mut self, id: JobId, at: StageId) {
        self.note(Happened::Done(id, at));
        match self.schedule.finished(at, id) {
            Ok(AfterStage::Next(_)) => {}
            Ok(AfterStage::Complete | AfterStage::Void) => self.forget(id),
            Err(error) => unreachable!("a local stage runs one job: {error}"),
        }
    }

    /// Puts what the schedule has put together at stage 0 under its first job's number.
    fn form_batch(&mut self, id: JobId, at: StageId) {
        let others: Vec<JobId> = self.schedule.members(at, id).skip(1).map(|member| member.job).collect();
        for other in others {
            let Some(Work::Step(more)) = self.work.remove(other) else { continue };
            let Some(Work::Step(step)) = self.work.get_mut(id) else { continue };
            if step.parts.is_empty() {
                step.parts.push(step.part(id));
            }
            step.parts.push(more.part(other));
            step.spans.extend(more.spans);
            step.tokens.extend(more.tokens);
            step.want_logits.extend(more.want_logits);
        }
    }

    /// Takes the rows of jobs that nobody wants any more out of a batch, before its next stage: what they stand on may
    /// have been given up before it came here.
    fn shed_void(&mut self, id: JobId, at: StageId) {
        let Some(Work::Step(step)) = self.work.get_mut(id) else { return };
        if step.parts.is_empty() {
            return;
        }
        let void: Vec<JobId> = self.schedule.members(at, id).filter(|m| m.is_void).map(|m| m.job).collect();
        let keep: Vec<bool> = step.parts.iter().map(|part| !void.contains(&part.0)).collect();
        if keep.iter().all(|keep| *keep) {
            return;
        }
        // each part is one span
        let counts = step.spans.iter().map(|span| span.count as usize);
        let rows: Vec<bool> =
            keep.iter().zip(counts).flat_map(|(&keep, n)| std::iter::repeat_n(keep, n)).collect();
        retain(&mut step.tokens, &rows);
        retain(&mut step.want_logits, &rows);
        retain(&mut step.spans, &keep);
        retain(&mut step.parts, &keep);
        if let Some(hidden) = &mut step.hidden {
            hidden.retain_rows(&rows);
        }
    }

    /// A step's logits are there: they go to its session, or, of a batch, to each of its sessions.
    fn came_out(&mut self, id: JobId, at: StageId, logits: Vec<f32>) {
        self.note(Happened::Done(id, at));
        let Some(Work::Step(step)) = self.work.remove(id) else { return };
        let void: Vec<JobId> = self.schedule.members(at, id).filter(|m| m.is_void).map(|m| m.job).collect();
        if let Err(error) = self.schedule.finished(at, id) {
            unreachable!("a local stage runs one job: {error}");
        }
        self.company.came_out(self.clock.now());
        if step.parts.is_empty() {
            if void.is_empty() && !step.is_again {
                self.hand_out(id, step.spans[0].session(), logits);
            } else {
                self.reuse(logits);
            }
            return;
        }
        let parts = step.parts;
        let n_wanted: usize = parts.iter().map(|part| part.2).sum();
        let n_vocab = logits.len() / n_wanted.max(1);
        let mut begin = 0;
        for (job, session, n_wanted) in parts {
            let end = begin + n_wanted * n_vocab;
            if !void.contains(&job) {
                let mut own = self.spare_logits.pop().unwrap_or_default();
                own.clear();
                own.extend_from_slice(&logits[begin..end]);
                self.hand_out(job, session, own);
            }
            begin = end;
        }
        self.reuse(logits);
    }

    /// Waits for whichever remote stage has something to tell first. Whether there may be something to do now.
    fn wait(&mut self, deadline: Option<Instant>) -> bool {
        let mut only = None;
        let mut n_awaited = 0;
        for (i, slot) in self.slots.iter().enumerate() {
            let Kind::Remote(remote) = &slot.kind else { continue };
            match remote.connection {
                Connection::Up if self.schedule.n_running(StageId(i)) > 0 => only = Some(i),
                Connection::Up | Connection::Down => continue,
                _ => only = None,
            }
            n_awaited += 1;
        }
        if let Some(i) = only.filter(|_| n_awaited == 1 && !self.is_shared) {
            let goes_on = self.collect(i, deadline);
            self.hear();
            return goes_on;
        }
        self.listen();
        let (began, heard) = (self.clock.now(), self.n_heard);
        loop {
            self.clock.wait(&self.bell, deadline.into_iter().chain(self.poll_at()).min());
            let now = self.clock.now();
            self.waited = Some(now.saturating_duration_since(began));
            self.hear();
            self.waited = None;
            // otherwise it was rung for what a poll had found already
            if self.n_heard > heard || self.interrupt.is_wanted() {
                return true;
            }
            if deadline.is_some_and(|deadline| now >= deadline) {
                return false;
            }
        }
    }

    /// From now on every worker's answer rings the bell.
    fn listen(&mut self) {
        for slot in &mut self.slots {
            if let Kind::Remote(remote) = &mut slot.kind {
                remote.listen(Some(&self.bell));
            }
        }
    }

    /// When a remote stage that something is expected of has to be looked at even if nothing rings.
    fn poll_at(&self) -> Option<Instant> {
        let remotes = self.slots.iter().enumerate().filter_map(|(i, slot)| match &slot.kind {
            Kind::Remote(remote) if remote.is_up() && self.schedule.n_running(StageId(i)) == 0 => None,
            Kind::Remote(remote) => remote.poll_at(),
            Kind::Local(_) => None,
        });
        remotes.min()
    }
}

/// Steps between the start of stage 0 and the end of the last stage: what every worker may hold, one that waits for the
/// local stages' turn, one that runs there.
fn steps_under_way(slots: &[Slot]) -> usize {
    let agreed = slots.iter().map(|slot| match &slot.kind {
        Kind::Local(_) => 0,
        Kind::Remote(remote) => remote.agreed,
    });
    2 + agreed.sum::<usize>()
}

/// How much every stage can take back of a session.
fn take_back(slots: &[Slot]) -> TakeBack {
    let all = slots.iter().map(|slot| match &slot.kind {
        Kind::Local(stage) => stage.take_back(),
        Kind::Remote(remote) => remote.stage.take_back(),
    });
    all.min().unwrap_or(TakeBack::ALL)
}

/// A pipeline may be driven by another thread than the one that made it.
const _: fn() = || {
    fn is_send<T: Send>() {}
    is_send::<Pipeline>();
};

/// Steps a worker may hold at most: what a host asks for. How many it is sent follows what is measured
/// ([`crate::window`]).
pub const MAX_IN_FLIGHT: u32 = 8;

#[cfg(test)]
pub(crate) mod fakes;
#[cfg(test)]
mod randomised;
#[cfg(test)]
mod tests;
