//! Bringing a worker that was lost to where it was.
//!
//! ```text
//!        lost                  connected                checked                 replayed
//!  Up ---------> Waiting --> Dialling ----> [Checking] ----------> Replaying -------------> Up
//!                   ^____________|______________|_____________________|  failed: the pause grows
//!                   |
//!                   `--> Down: given up or useless; begun anew by the next step that needs it
//! ```
//!
//! Where a stage [has something in its worker's place](RemoteStage::fall_back), it is Dialling when that is given up, once
//! more: what is connected then is not the worker.
//!
//! None of it blocks: [`Pipeline::hear`] takes each worker as far as it gets. Its own thread dials
//! ([`RemoteStage::begin_reconnect`]); everything else waits for answers as any step does.
//!
//! Losses count until a *new* answer has come. A worker that is found, takes its replay, and fails at the same step each
//! time is dialled at growing pauses, and given up by that step's sessions when patience is over.

use std::time::Duration;

use super::remote::{Connection, Remote};
use super::{Event, Kind, Pipeline, PipelineError, Work};
use crate::ids::{JobId, StageId};
use crate::patience::Losses;
use crate::replay::{LoggedOp, ReplayOp, Standing};
use crate::rows::Rows;
use crate::stage::{Answer, StageError, Traffic};
use crate::trace::Happened;
use crate::window::{LEAST_WINDOW, RoundTrips};

impl Pipeline {
    pub(super) fn stage_error(&self, i: usize, source: StageError) -> PipelineError {
        PipelineError::Stage { stage: self.slots[i].name.clone(), source }
    }

    /// The connection of a stage that was up is over.
    pub(super) fn failed(&mut self, i: usize, error: StageError) {
        self.n_heard += 1;
        let at = StageId(i);
        if error.may_pass() {
            return self.lost(i, error);
        }
        let front = self.schedule.front(at);
        if self.check_failed(i, front, &error) {
            return;
        }
        let is_of_step = error.is_of_step();
        let failure = self.stage_error(i, error.clone());
        let Some(id) = front.filter(|_| is_of_step) else { return self.useless(i, failure) };
        // its sessions only; everybody else's steps go to the next connection
        self.fail_members(id, at, &failure);
        if self.schedule.sessions_up_to(at).is_empty() {
            self.put_down(i);
        } else {
            self.lost(i, error);
        }
    }

    /// Whether what failed was a check's: then the stage is of no use.
    pub(super) fn check_failed(&mut self, i: usize, id: Option<JobId>, error: &StageError) -> bool {
        let is_check = id.is_some_and(|id| matches!(self.work.get(id), Some(Work::Check(_))));
        let Some(guard) = self.remote(i).stage.guard().filter(|_| is_check) else { return false };
        let wrong = guard.in_check(error.clone());
        let error = self.stage_error(i, wrong);
        self.useless(i, error);
        true
    }

    /// A stage is of no use: everybody with a step before it or in it hears why.
    pub(super) fn useless(&mut self, i: usize, error: PipelineError) {
        self.n_heard += 1;
        self.fail_all(i, &error);
        self.put_down(i);
    }

    /// Nobody looks for a stage any more, until a step needs it.
    fn put_down(&mut self, i: usize) {
        self.take_back(i);
        let remote = self.remote(i);
        remote.losses = None;
        remote.lost_at = None;
        remote.connection = Connection::Down;
        self.schedule.found(StageId(i));
    }

    /// What a stage has not answered goes back to the schedule, and waits for it again.
    fn take_back(&mut self, i: usize) {
        let Kind::Remote(remote) = &mut self.slots[i].kind else { return };
        for op in remote.log.take_unanswered() {
            if let LoggedOp::Step(step) = op
                && let Some(Work::Step(work)) = self.work.get_mut(step.job)
            {
                work.hidden = Some(step.rows);
            }
        }
        remote.sent_at.clear();
        (remote.again, remote.check) = (None, None);
        for id in self.schedule.lost(StageId(i)) {
            self.forget(id);
        }
        // whoever comes back is checked before anything else
        self.release_held();
    }

    /// A worker is lost: what it has not answered goes back to the schedule, and it is looked for.
    pub(super) fn lost(&mut self, i: usize, reason: StageError) {
        self.n_heard += 1;
        let at = StageId(i);
        self.note(Happened::Lost(at));
        let (now, patience) = (self.clock.now(), self.patience);
        let since = now.saturating_duration_since(self.start);
        let limit = patience.limit(&reason);
        self.tell_away(i, &reason, limit);
        let remote = self.remote(i);
        let next = match &mut remote.losses {
            None => Some(since),
            Some(losses) => {
                losses.count += 1;
                losses.give_up_after = losses.give_up_after.max(limit);
                losses.again(since, &patience)
            }
        };
        let next = next.or_else(|| self.falls_back(i, since).then_some(since));
        if next.is_none() && !self.blame_front(i, since, reason) {
            return;
        }
        self.take_back(i);
        let due = self.start + next.unwrap_or(since);
        let remote = self.remote(i);
        remote.losses.get_or_insert_with(|| Losses::first(since, limit, &patience));
        remote.lost_at.get_or_insert(now);
        remote.connection = Connection::Waiting(due);
        self.bring_back(i);
    }

    /// A worker's time is over: whether something else takes its place.
    fn falls_back(&mut self, i: usize, since: Duration) -> bool {
        let remote = self.remote(i);
        let falls_back = remote.stage.fall_back();
        if falls_back {
            let began = remote.losses.as_ref().map_or(since, |losses| losses.since);
            remote.given_up = Some(since.saturating_sub(began));
        }
        falls_back
    }

    /// A worker has come back again and again and given no new answer for too long: the oldest step that it was given
    /// each time is what it fails at, and that step's sessions end. Whether there are others to look for it for.
    fn blame_front(&mut self, i: usize, since: Duration, reason: StageError) -> bool {
        let at = StageId(i);
        let front = self.schedule.front(at);
        let stage = self.slots[i].name.clone();
        let Some(losses) = self.remote(i).losses.take() else { return true };
        let after = since.saturating_sub(losses.since);
        let error = PipelineError::WorkerKeepsFailing { stage, after, losses: losses.count, reason };
        match front.filter(|id| matches!(self.work.get(*id), Some(Work::Step(_)))) {
            Some(id) => self.fail_members(id, at, &error),
            None => {
                self.useless(i, error);
                return false;
            }
        }
        let has_others = !self.schedule.sessions_up_to(at).is_empty();
        if !has_others {
            self.put_down(i);
        }
        has_others
    }

    fn tell_away(&mut self, i: usize, why: &StageError, give_up_after: Duration) {
        let (stage, reason) = (self.slots[i].name.as_str(), why.to_string());
        let reason = reason.as_str();
        (self.observer)(match why {
            StageError::Paused(_) => Event::Paused { stage, reason, give_up_after },
            _ => Event::Lost { stage, reason, give_up_after },
        });
    }

    /// Takes a worker that is away as far as it gets without waiting.
    pub(super) fn bring_back(&mut self, i: usize) {
        loop {
            let now = self.clock.now();
            let Kind::Remote(remote) = &mut self.slots[i].kind else { return };
            let moved = match remote.connection {
                Connection::Up | Connection::Down => return,
                Connection::Waiting(at) if now < at => return,
                Connection::Waiting(_) => {
                    remote.stage.begin_reconnect(&self.bell);
                    remote.connection = Connection::Dialling;
                    Ok(true)
                }
                Connection::Dialling => match remote.stage.poll_connected() {
                    Ok(true) => {
                        self.connected(i);
                        Ok(true)
                    }
                    other => other,
                },
                Connection::Checking { .. } => self.check_on(i),
                Connection::Replaying { .. } => self.replay_on(i),
            };
            match moved {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => self.attempt_failed(i, error),
            }
        }
    }

    /// An attempt to bring a worker back has failed: another is due after a pause, or it is given up.
    fn attempt_failed(&mut self, i: usize, error: StageError) {
        self.n_heard += 1;
        if !error.may_pass() {
            let error = match self.remote(i).given_up.take() {
                // the worker is what was missed first
                Some(after) => {
                    PipelineError::WorkerGone { stage: self.slots[i].name.clone(), after, reason: error }
                }
                None => self.stage_error(i, error),
            };
            return self.useless(i, error);
        }
        let since = self.clock.now().saturating_duration_since(self.start);
        let patience = self.patience;
        let limit = patience.limit(&error);
        let losses = self.remote(i).losses.get_or_insert_with(|| Losses::first(since, limit, &patience));
        // it may say only now why it is away
        let is_news = limit > losses.give_up_after;
        losses.give_up_after = losses.give_up_after.max(limit);
        let (next, began) = (losses.again(since, &patience), losses.since);
        if is_news {
            self.tell_away(i, &error, limit);
        }
        match next.or_else(|| self.falls_back(i, since).then_some(since)) {
            Some(next) => self.remote(i).connection = Connection::Waiting(self.start + next),
            None => {
                let (stage, after) = (self.slots[i].name.clone(), since.saturating_sub(began));
                self.useless(i, PipelineError::WorkerGone { stage, after, reason: error });
            }
        }
    }

    /// A worker is there again, with an empty memory.
    fn connected(&mut self, i: usize) {
        let bell = self.bell.clone();
        let remote = self.remote(i);
        remote.listens = false;
        remote.listen(Some(&bell));
        remote.agreed = remote.stage.max_in_flight().max(1);
        remote.trips = RoundTrips::default();
        let window = LEAST_WINDOW.min(remote.agreed);
        remote.connection = match remote.stage.guard().and_then(|guard| guard.begin()) {
            Some(check) => {
                remote.doubt.check_begins();
                Connection::Checking { check, next: 0, is_sent: false }
            }
            None => REPLAY,
        };
        let is_checked = matches!(remote.connection, Connection::Checking { .. });
        self.schedule.set_window(StageId(i), window);
        if !is_checked {
            self.tell_replay(i);
        }
    }

    fn tell_replay(&mut self, i: usize) {
        let slot = &mut self.slots[i];
        let Kind::Remote(remote) = &slot.kind else { return };
        let (by, steps) = (remote.stage.name(), remote.log.n_steps());
        if by == slot.name {
            return (self.observer)(Event::Replaying { stage: &slot.name, steps });
        }
        (self.observer)(Event::Replaced { stage: &slot.name, by: &by, steps });
        slot.name = by;
    }

    /// Holds a worker that is back against its canary. Whether that got on.
    fn check_on(&mut self, i: usize) -> Result<bool, StageError> {
        let mut rows = self.spare.pop().unwrap_or_else(|| Rows::empty(self.dtype));
        let Remote { stage, connection, doubt, .. } = self.remote(i);
        let Connection::Checking { check, next, is_sent } = connection else { return Ok(true) };
        let mut step = || match (*is_sent, check.piece(*next)) {
            (true, _) => rows_of(stage.poll(&mut rows)?),
            (false, Some((span, piece))) => {
                stage.submit(JobId(*next as u64), &[span], &[], piece)?;
                Ok(true)
            }
            (false, None) => {
                let session = stage.guard().map(|guard| guard.session());
                session.map_or(Ok(()), |session| stage.rewind(session, 0))?;
                Ok(true)
            }
        };
        let moved = step();
        let Some(guard) = stage.guard() else { return moved };
        let result = match moved {
            Ok(true) if *is_sent => {
                guard.count_check_traffic(Traffic::of_step(rows.bytes()));
                check.answered(&rows);
                (*next, *is_sent) = (*next + 1, false);
                Ok(true)
            }
            Ok(true) if *next < check.len() => {
                *is_sent = true;
                Ok(true)
            }
            Ok(true) => guard.verdict(check).map(|_| {
                *connection = REPLAY;
                doubt.check_passed();
                true
            }),
            Ok(false) => Ok(false),
            Err(error) => Err(guard.in_check(error)),
        };
        let is_right = matches!(connection, Connection::Replaying { .. });
        self.spare.push(rows);
        if is_right {
            self.tell_replay(i);
        }
        result
    }

    /// Sends a worker that is back what it has forgotten, a few steps ahead of the answers, which are dropped. Whether
    /// that got on.
    fn replay_on(&mut self, i: usize) -> Result<bool, StageError> {
        let mut dropped = self.spare.pop().unwrap_or_else(|| Rows::empty(self.dtype));
        let Remote { stage, connection, log, agreed, .. } = self.remote(i);
        let Connection::Replaying { next, ahead, standing } = connection else { return Ok(true) };
        let mut step = || {
            if *ahead < LEAST_WINDOW.min(*agreed)
                && let Some(ops) = log.ops_of(*next, standing)
            {
                *next += 1;
                *ahead += 1;
                for op in ops {
                    match op {
                        ReplayOp::Step { job, spans, tokens, rows } => {
                            stage.submit(job, &spans, tokens, rows)?;
                        }
                        ReplayOp::Rewind { session, position } => stage.rewind(session, position)?,
                    }
                }
                return Ok(true);
            }
            let is_answered = *ahead > 0 && rows_of(stage.poll(&mut dropped)?)?;
            *ahead -= usize::from(is_answered);
            Ok(is_answered)
        };
        let moved = step();
        let is_replayed = *ahead == 0 && *next == log.n_steps();
        self.spare.push(dropped);
        match moved {
            Ok(_) if is_replayed => {
                self.back(i);
                Ok(true)
            }
            other => other,
        }
    }

    /// A worker is where it was.
    fn back(&mut self, i: usize) {
        self.n_heard += 1;
        self.note(Happened::Found(StageId(i)));
        let now = self.clock.now();
        let slot = &mut self.slots[i];
        let Kind::Remote(remote) = &mut slot.kind else { return };
        remote.connection = Connection::Up;
        remote.given_up = None;
        let after = remote.lost_at.take().map_or(Duration::ZERO, |lost| now.saturating_duration_since(lost));
        slot.stats.reconnects += 1;
        slot.stats.wait += after;
        (self.observer)(Event::Back { stage: &slot.name, after });
        self.schedule.found(StageId(i));
    }
}

/// Whether an answer has come, and rows with it: what was answered once cannot fail.
fn rows_of(answer: Option<Answer>) -> Result<bool, StageError> {
    match answer.map(|answer| answer.failed) {
        Some(Some(failed)) => Err(failed),
        answer => Ok(answer.is_some()),
    }
}

/// A replay that has yet to begin.
const REPLAY: Connection = Connection::Replaying { next: 0, ahead: 0, standing: Standing::NOWHERE };
