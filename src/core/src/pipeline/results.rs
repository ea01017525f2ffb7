//! What callers ask for, and what they get: results are handed out in order, or an error takes their place.
//!
//! A worker's answers are believed between two checks ([`crate::guard`]). So a result that comes out while a worker that
//! had part in it is being checked is held back until that is over; and when a check fails, every session hears of it that
//! has been given anything by that worker since its last right answer to a known input, with its next step at the latest.

use std::collections::BTreeSet;

use super::{Finished, Kind, Pipeline, PipelineError, Step, StepWork, Work};
use crate::error::StageError;
use crate::history::Chunk;
use crate::ids::{JobId, SessionId, StageId};
use crate::schedule::{Dropped, StepKind};
use crate::trace::Happened;

impl Pipeline {
    /// Adds a step behind all others of its session.
    pub fn submit(&mut self, step: Step) -> JobId {
        let session = step.session;
        self.history.gave(session, step.position, &step.tokens);
        self.has_come(step.kind);
        let job = self.give(step, false);
        self.given(session, job);
        job
    }

    /// A session that was given a step hears with it what it has not heard yet.
    pub(super) fn given(&mut self, session: SessionId, job: JobId) {
        if let Some(at) = self.untold.iter().position(|(to, _)| *to == session) {
            let (_, error) = self.untold.swap_remove(at);
            self.fail(session, job, &error);
        } else if self.finished.iter().any(|f| f.session == session && f.outcome.is_err()) {
            // its caller has yet to hear that the session has failed
            self.schedule.cancel(session, job);
            self.work.remove(job);
        }
    }

    /// Forgets the rows of `session` from `position` on, in every stage, when the steps it was given before are done;
    /// with position 0 the session is over. Takes effect in [`advance`](Self::advance). It has a result only if it
    /// fails, and that is the session's.
    ///
    /// Where a stage [cannot take that back](crate::stage::TakeBack) every stage forgets the session, and what stays of
    /// it is evaluated anew: that takes as long as it took before.
    pub fn rewind(&mut self, session: SessionId, position: u32) -> JobId {
        if position == 0 {
            // what comes next stands on nothing that was wrong
            self.untold.retain(|(to, _)| *to != session);
        }
        let again = self.history.rewind(session, position);
        let job = self.schedule.push_rewind(session);
        let position = if again.is_some() { 0 } else { position };
        self.work.insert(job, Work::Rewind(session, position));
        for chunk in again.into_iter().flatten() {
            let want_logits = vec![false; chunk.tokens.len()];
            let (end, is_whole) = (chunk.end(), chunk.is_whole());
            let Chunk { position, tokens, .. } = chunk;
            self.give(Step { session, position, tokens, want_logits, kind: StepKind::Prefill }, true);
            if !is_whole {
                let cut = self.schedule.push_rewind(session);
                self.work.insert(cut, Work::Rewind(session, end));
            }
        }
        job
    }

    /// Gives the first stage a step: `is_again`, for what its session has been given before.
    fn give(&mut self, step: Step, is_again: bool) -> JobId {
        let span = step.span();
        let job = self.schedule.push(step.session, step.kind, span.count);
        let work = StepWork { is_again, ..StepWork::new(span, step.tokens, step.want_logits) };
        self.work.insert(job, Work::Step(work));
        job
    }

    /// Nobody wants this step's logits any more, nor those of its session's steps behind it, up to its next rewind: those
    /// that have not come out will not. The session has to be rewound to the step's position, or before it, before it
    /// goes on.
    pub fn cancel(&mut self, session: SessionId, job: JobId) {
        self.history.broke(session);
        let end = self.schedule.next_rewind(session, job);
        let dropped = self.schedule.cancel(session, job);
        self.let_go(dropped);
        let is_meant = |id: JobId| id >= job && end.is_none_or(|end| id < end);
        self.drop_results(session, |f| f.outcome.is_ok() && is_meant(f.job));
    }

    /// Nobody wants anything of this session any more: neither logits nor an error will come of what it was given so far.
    /// Its rewinds take effect. It has to be rewound to where its caller knows it before it goes on.
    pub fn give_up(&mut self, session: SessionId) {
        self.history.broke(session);
        let dropped = self.schedule.fail(session);
        self.let_go(dropped);
        self.drop_results(session, |_| true);
    }

    fn drop_results(&mut self, session: SessionId, is_meant: impl Fn(&Finished) -> bool) {
        let stays = |f: &Finished| f.session != session || !is_meant(f);
        self.finished.retain(stays);
        self.held.retain(stays);
    }

    /// Gives a buffer of logits back, for one that is needed next.
    pub fn reuse(&mut self, logits: Vec<f32>) {
        self.spare_logits.push(logits);
    }

    /// A session's logits are there.
    pub(super) fn hand_out(&mut self, job: JobId, session: SessionId, logits: Vec<f32>) {
        self.note(Happened::Out(job));
        let finished = Finished { job, session, outcome: Ok(logits) };
        match self.is_in_doubt(session) {
            true => self.held.push_back(finished),
            false => self.finished.push_back(finished),
        }
    }

    /// Whether a check is under way that says something of what this session was given.
    fn is_in_doubt(&self, session: SessionId) -> bool {
        let of_worker = |slot: &super::Slot| match &slot.kind {
            Kind::Remote(remote) => remote.check.is_some() && remote.doubt.is_of(session),
            Kind::Local(_) => false,
        };
        self.slots.iter().any(of_worker)
    }

    /// A check is over: what nothing else holds back is handed out.
    pub(super) fn release_held(&mut self) {
        for finished in std::mem::take(&mut self.held) {
            match self.is_in_doubt(finished.session) {
                true => self.held.push_back(finished),
                false => self.finished.push_back(finished),
            }
        }
    }

    /// What nobody wants any more is forgotten where it waited, and called off where it runs.
    fn let_go(&mut self, dropped: Dropped) {
        dropped.vanished.into_iter().for_each(|job| self.forget(job));
        if !dropped.voided.is_empty() {
            self.call_off();
        }
    }

    /// Forgets what goes with a job that has left.
    pub(super) fn forget(&mut self, id: JobId) {
        if let Some(Work::Step(StepWork { hidden: Some(rows), .. })) = self.work.remove(id) {
            self.spare.push(rows);
        }
    }

    /// A session ends in an error, at this job at the latest.
    pub(super) fn fail(&mut self, session: SessionId, job: JobId, error: &PipelineError) {
        self.history.broke(session);
        let gone = self.schedule.fail(session);
        let held = self.held.iter().find(|f| f.session == session).map(|f| f.job);
        let job = held.or(gone.first).unwrap_or(job);
        self.held.retain(|f| f.session != session);
        self.let_go(gone);
        self.finished.push_back(Finished { job, session, outcome: Err(error.clone()) });
    }

    /// The sessions of a job that a stage runs end in an error, those that have not already.
    pub(super) fn fail_members(&mut self, id: JobId, at: StageId, error: &PipelineError) {
        let members: Vec<_> = self.schedule.members(at, id).filter(|member| !member.is_void).collect();
        for member in members {
            if let Some(session) = member.session {
                self.fail(session, member.job, error);
            }
        }
    }

    /// A stage is of no use: who has a step before it or in it hears why; and if it computes wrongly, everybody who was
    /// given something by it since it was last known not to, with the next step where there is none.
    pub(super) fn fail_all(&mut self, i: usize, error: &PipelineError) {
        let mut sessions = self.schedule.sessions_up_to(StageId(i));
        let is_wrong = matches!(error, PipelineError::Stage { source: StageError::Wrong { .. }, .. });
        let misled = if is_wrong { self.remote(i).doubt.take() } else { BTreeSet::new() };
        if sessions.is_empty() && misled.is_empty() {
            self.remote(i).untold = Some(error.clone());
        }
        let last = StageId(self.slots.len() - 1);
        let mut expecting = self.schedule.sessions_up_to(last);
        expecting.extend(self.held.iter().map(|f| f.session));
        for session in misled.into_iter().filter(|session| !sessions.contains(session)).collect::<Vec<_>>() {
            match expecting.contains(&session) {
                true => sessions.push(session),
                // whoever waits to hear of one hears of that one
                false if self.untold.iter().any(|(to, _)| *to == session) => {}
                false => self.untold.push((session, error.clone())),
            }
        }
        for session in sessions {
            // it has a step, which is the one that is named
            self.fail(session, JobId(u64::MAX), error);
        }
    }
}

/// Whom a worker has given something since it was last known to compute right.
#[derive(Debug, Default)]
pub(super) struct Doubt {
    /// before the check that is under way
    before: BTreeSet<SessionId>,
    since: BTreeSet<SessionId>,
}

impl Doubt {
    /// It is given rows of this session.
    pub(super) fn add(&mut self, session: SessionId) {
        self.since.insert(session);
    }

    pub(super) fn check_begins(&mut self) {
        self.before.append(&mut self.since);
    }

    pub(super) fn check_passed(&mut self) {
        self.before.clear();
    }

    pub(super) fn is_of(&self, session: SessionId) -> bool {
        self.before.contains(&session) || self.since.contains(&session)
    }

    /// The session begins anew.
    pub(super) fn forget(&mut self, session: SessionId) {
        self.before.remove(&session);
        self.since.remove(&session);
    }

    /// All of them, each once, who are forgotten.
    pub(super) fn take(&mut self) -> BTreeSet<SessionId> {
        self.check_begins();
        std::mem::take(&mut self.before)
    }
}
