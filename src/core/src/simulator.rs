//! The [schedule](crate::schedule) over stages that only take time: what a pipeline would do, without one.
//!
//! Discrete events, no threads, no clock: a run of hours takes milliseconds and is the same every time. It is the same
//! loop as the [pipeline](crate::pipeline)'s, and a test holds the trace of one against the other's, event by event.
//!
//! What is modelled: a local stage holds this process's compute device for as long as it computes, and nothing is heard
//! meanwhile; a remote one computes its steps one after the other, each of which is `one_way` on the way there and
//! again on the way back. What is not: bytes (a chunk takes as long on the way as a row), and what a replay costs: a
//! worker that is lost is away for as long as is said.

use std::collections::VecDeque;
use std::time::Duration;

use crate::ids::{JobId, SessionId, StageId};
use crate::patience::{Losses, Patience};
use crate::schedule::{AfterStage, Next, Placement, Schedule, StepKind};
use crate::trace::{Happened, Traced};
use crate::window::{LEAST_WINDOW, RoundTrips};

/// How long a stage takes.
#[derive(Clone, Debug)]
pub enum StageModel {
    /// In this process.
    Local(Cost),
    /// In another one.
    Remote {
        /// What it computes.
        cost: Cost,
        /// How long a message is on its way, in each direction.
        one_way: Duration,
        /// How many steps it may be sent at most.
        agreed: usize,
        /// When it is lost with everything it holds, and for how long it is away each time; in order. What falls into
        /// a time when it is away is nothing.
        losses: VecDeque<(Duration, Duration)>,
    },
}

/// How long a step computes.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// For being a step.
    pub step: Duration,
    /// For each row.
    pub row: Duration,
}

impl Cost {
    /// Of a step with so many rows.
    pub fn of(self, rows: u32) -> Duration {
        self.step + self.row * rows
    }
}

#[derive(Debug)]
struct Worker {
    cost: Cost,
    one_way: Duration,
    agreed: usize,
    losses: VecDeque<(Duration, Duration)>,
    /// when it has computed everything it was sent
    free_at: Duration,
    /// what it was sent, oldest first
    answers: VecDeque<Sent>,
    since_answer: Option<Losses>,
    /// while it is lost and a pause goes by: when it is dialled, and for how long in vain
    dial_at: Option<(Duration, Duration)>,
    /// while it is dialled: when it is back
    back_at: Option<Duration>,
    trips: RoundTrips,
}

/// A step that a worker was sent.
#[derive(Clone, Copy, Debug)]
struct Sent {
    job: JobId,
    rows: u32,
    at: Duration,
    /// when its answer is here
    here: Duration,
    compute: Duration,
}

#[derive(Debug)]
enum SimulatedStage {
    Local(Cost),
    Remote(Box<Worker>),
}

/// A simulated pipeline.
#[derive(Debug)]
pub struct Simulator {
    stages: Vec<SimulatedStage>,
    schedule: Schedule,
    patience: Patience,
    now: Duration,
    /// rows of each job
    rows: Vec<u32>,
    /// what has come out, and whose it is
    out: VecDeque<(JobId, SessionId)>,
    trace: Vec<Traced>,
}

impl Simulator {
    /// A pipeline of these stages, in order.
    pub fn new(stages: Vec<StageModel>, patience: Patience) -> Simulator {
        let stages: Vec<SimulatedStage> = stages
            .into_iter()
            .map(|stage| match stage {
                StageModel::Local(cost) => SimulatedStage::Local(cost),
                StageModel::Remote { cost, one_way, agreed, losses } => {
                    SimulatedStage::Remote(Box::new(Worker {
                        cost,
                        one_way,
                        agreed: agreed.max(1),
                        losses,
                        free_at: Duration::ZERO,
                        answers: VecDeque::new(),
                        since_answer: None,
                        dial_at: None,
                        back_at: None,
                        trips: RoundTrips::default(),
                    }))
                }
            })
            .collect();
        let agreed = |stage: &SimulatedStage| match stage {
            SimulatedStage::Local(_) => 0,
            SimulatedStage::Remote(worker) => worker.agreed,
        };
        let limit = 2 + stages.iter().map(agreed).sum::<usize>();
        let placement = |stage: &SimulatedStage| match stage {
            SimulatedStage::Local(_) => Placement::Local,
            SimulatedStage::Remote(worker) => Placement::Remote { window: LEAST_WINDOW.min(worker.agreed) },
        };
        let placements: Vec<Placement> = stages.iter().map(placement).collect();
        Simulator {
            schedule: Schedule::new(&placements, limit),
            stages,
            patience,
            now: Duration::ZERO,
            rows: Vec::new(),
            out: VecDeque::new(),
            trace: Vec::new(),
        }
    }

    /// As [`Pipeline::set_batch_rows`](crate::pipeline::Pipeline::set_batch_rows).
    pub fn set_batch_rows(&mut self, rows: u32) {
        self.schedule.set_batch_rows(rows);
    }

    /// Adds a step of `rows` rows behind all others of its session.
    pub fn submit(&mut self, session: SessionId, kind: StepKind, rows: u32) -> JobId {
        self.rows.push(rows);
        self.schedule.push(session, kind, rows)
    }

    /// Adds a rewind behind everything else of its session.
    pub fn rewind(&mut self, session: SessionId) -> JobId {
        self.rows.push(0);
        self.schedule.push_rewind(session)
    }

    /// Nobody wants this step any more, nor its session's behind it, up to its next rewind.
    pub fn cancel(&mut self, session: SessionId, job: JobId) {
        let end = self.schedule.next_rewind(session, job);
        self.schedule.cancel(session, job);
        let is_meant = |id: JobId| id >= job && end.is_none_or(|end| id < end);
        self.out.retain(|&(id, of)| of != session || !is_meant(id));
    }

    /// The time that has gone by.
    pub fn now(&self) -> Duration {
        self.now
    }

    /// What happened so far.
    pub fn trace(&self) -> &[Traced] {
        &self.trace
    }

    /// Lets time go by until a job has left the last stage; `None`: there is none, or a worker stays away for ever.
    pub fn advance(&mut self) -> Option<JobId> {
        self.hear();
        loop {
            if let Some((job, _)) = self.out.pop_front() {
                return Some(job);
            }
            match self.schedule.next()? {
                Next::Run(job, at) => {
                    self.note(Happened::Run(job, at));
                    self.run(job, at);
                    self.hear();
                }
                Next::Send(job, at) => {
                    self.note(Happened::Sent(job, at));
                    self.send(job, at);
                }
                Next::Wait => {
                    self.note(Happened::Waits);
                    let heard = self.trace.len();
                    while self.trace.len() == heard {
                        self.now = self.next_event()?.max(self.now);
                        self.hear();
                    }
                }
            }
        }
    }

    fn note(&mut self, what: Happened) {
        self.trace.push(Traced { at: self.now, what });
    }

    /// Rows of what was just started: of a batch, those that somebody wants.
    fn rows_of(&self, at: StageId, job: JobId) -> u32 {
        let wanted = self.schedule.members(at, job).filter(|member| !member.is_void);
        wanted.map(|member| self.rows[member.job.0 as usize]).sum()
    }

    fn run(&mut self, job: JobId, at: StageId) {
        let rows = self.rows_of(at, job);
        if let (SimulatedStage::Local(cost), true) = (&self.stages[at.0], rows > 0) {
            self.now += cost.of(rows);
            self.schedule.computed(at, rows as usize, cost.of(rows));
        }
        self.note(Happened::Done(job, at));
        let members: Vec<_> = self.schedule.members(at, job).collect();
        if self.schedule.finished(at, job) == Ok(AfterStage::Complete) && rows > 0 {
            for member in members.into_iter().filter(|member| !member.is_void) {
                self.note(Happened::Out(member.job));
                self.out.extend(member.session.map(|session| (member.job, session)));
            }
        }
    }

    fn send(&mut self, job: JobId, at: StageId) {
        // of a rewind the schedule has heard all there is
        let rows = self.rows_of(at, job);
        if let (SimulatedStage::Remote(worker), true) = (&mut self.stages[at.0], rows > 0) {
            let compute = worker.cost.of(rows);
            worker.free_at = worker.free_at.max(self.now + worker.one_way) + compute;
            let here = worker.free_at + worker.one_way;
            worker.answers.push_back(Sent { job, rows, at: self.now, here, compute });
        }
    }

    /// Takes in everything that has come by now; the last stage's first.
    fn hear(&mut self) {
        for i in (0..self.stages.len()).rev() {
            while self.hear_one(i) {}
        }
    }

    fn hear_one(&mut self, i: usize) -> bool {
        let (at, now) = (StageId(i), self.now);
        let SimulatedStage::Remote(worker) = &mut self.stages[i] else { return false };
        if let Some((dial, away)) = worker.dial_at {
            worker.dial_at.take_if(|_| dial <= now);
            worker.back_at = (dial <= now).then_some(now + away);
            return dial <= now;
        }
        if let Some(back) = worker.back_at {
            if back > now {
                return false;
            }
            worker.back_at = None;
            worker.free_at = now;
            // it cannot be lost while it is away
            worker.losses.retain(|loss| loss.0 > now);
            worker.trips = RoundTrips::default();
            let window = LEAST_WINDOW.min(worker.agreed);
            self.schedule.set_window(at, window);
            self.schedule.found(at);
            self.note(Happened::Found(at));
            return true;
        }
        // a worker that nothing is expected of is lost unnoticed, until something is
        if self.schedule.n_running(at) == 0 {
            return false;
        }
        let lost_at = worker.losses.front().map(|loss| loss.0);
        match worker.answers.front().copied() {
            Some(Sent { job, rows, at: sent, here, compute })
                if here <= now && lost_at.is_none_or(|lost| here <= lost) =>
            {
                worker.answers.pop_front();
                worker.since_answer = None;
                // it computes from when it has it and has done what came before
                let wait = (here - sent).saturating_sub(compute + worker.one_way * 2);
                worker.trips.measured(now - sent, compute, wait);
                self.schedule.set_window(at, worker.trips.window(worker.agreed));
                self.schedule.set_round_trip(at, worker.trips.round_trip());
                self.schedule.computed(at, rows as usize, compute);
                self.note(Happened::Done(job, at));
                // what it was sent, in the order in which it was
                self.schedule.finished(at, job).is_ok()
            }
            _ if lost_at.is_some_and(|lost| lost <= now) => {
                let away = worker.losses.pop_front().map_or(Duration::ZERO, |loss| loss.1);
                worker.answers.clear();
                let again = match &mut worker.since_answer {
                    Some(losses) => losses.again(now, &self.patience).unwrap_or(now),
                    none => {
                        *none = Some(Losses::first(now, self.patience.give_up_after, &self.patience));
                        now
                    }
                };
                worker.dial_at = Some((again, away));
                self.note(Happened::Lost(at));
                self.schedule.lost(at);
                true
            }
            _ => false,
        }
    }

    /// When the next thing is there to be heard.
    fn next_event(&self) -> Option<Duration> {
        let workers = self.stages.iter().enumerate().filter_map(|(i, stage)| match stage {
            SimulatedStage::Remote(worker) => Some((i, worker)),
            SimulatedStage::Local(_) => None,
        });
        let events = workers.flat_map(|(i, worker)| {
            let is_away = worker.dial_at.is_some() || worker.back_at.is_some();
            let busy = !is_away && self.schedule.n_running(StageId(i)) > 0;
            let answer = worker.answers.front().filter(|_| busy).map(|answer| answer.here);
            let loss = worker.losses.front().filter(|_| busy).map(|loss| loss.0);
            [worker.dial_at.map(|dial| dial.0), worker.back_at, answer, loss]
        });
        events.flatten().min()
    }
}

#[cfg(test)]
mod tests;
