//! The remote half of the pipeline: sending, hearing, and bringing a worker that was lost to where it was.
//!
//! ```text
//!        lost                  connected                checked                 replayed
//!  Up ---------> Waiting --> Dialling ----> [Checking] ----------> Replaying -------------> Up
//!                   ^____________|______________|_____________________|  failed: the pause grows
//!                   |
//!                   `--> Down: given up or useless; begun anew by the next step that needs it
//! ```
//!
//! None of it blocks: [`Pipeline::hear`] takes each worker as far as it gets. Its own thread dials
//! ([`RemoteStage::begin_reconnect`]); everything else waits for answers as any step does.
//!
//! Losses count until a *new* answer has come. A worker that is found, takes its replay, and fails at the same step each
//! time is dialled at growing pauses, and given up by that step's sessions when patience is over.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{Event, Kind, Pipeline, PipelineError, Work};
use crate::bell::Bell;
use crate::guard::Check;
use crate::ids::{JobId, StageId};
use crate::patience::Losses;
use crate::replay::{LoggedOp, ReplayLog, ReplayOp, Standing};
use crate::rows::Rows;
use crate::schedule::{OutOfTurn, Progress};
use crate::stage::{Answer, RemoteStage, Span, StageError, Traffic, n_rows};
use crate::trace::Happened;
use crate::window::{LEAST_WINDOW, RoundTrips};

/// Where a worker stands.
pub(super) enum Connection {
    /// It is where it has to be.
    Up,
    /// Nobody looks for it.
    Down,
    /// It will be dialled then.
    Waiting(Instant),
    /// It is being dialled.
    Dialling,
    /// It is held against its canary: the next of its steps, and whether that was sent.
    Checking { check: Check, next: usize, is_sent: bool },
    /// Its cache is filled: the next step of the log, and how many have no answer yet.
    Replaying { next: usize, ahead: usize, standing: Standing },
}

/// A row that is asked twice.
struct Again {
    job: JobId,
    span: Span,
    before: Rows,
    /// its first answer, with how long that took to compute; then it is asked the second time
    first: Option<(Rows, Traffic, Instant)>,
}

/// A remote stage and what is known of it.
pub(super) struct Remote {
    pub(super) stage: Box<dyn RemoteStage>,
    pub(super) connection: Connection,
    /// steps it may hold, as agreed on
    pub(super) agreed: usize,
    log: ReplayLog,
    losses: Option<Losses>,
    lost_at: Option<Instant>,
    trips: RoundTrips,
    /// when each step without an answer was sent
    sent_at: VecDeque<Instant>,
    listens: bool,
    again: Option<Again>,
    /// a check whose steps are jobs
    check: Option<Check>,
    /// an error that nobody was there to hear
    untold: Option<PipelineError>,
}

impl Remote {
    pub(super) fn new(stage: Box<dyn RemoteStage>) -> Remote {
        Remote {
            agreed: stage.max_in_flight().max(1),
            stage,
            connection: Connection::Up,
            log: ReplayLog::default(),
            losses: None,
            lost_at: None,
            trips: RoundTrips::default(),
            sent_at: VecDeque::new(),
            listens: false,
            again: None,
            check: None,
            untold: None,
        }
    }

    /// When it has to be looked at even if nothing rings.
    pub(super) fn poll_at(&self) -> Option<Instant> {
        match self.connection {
            Connection::Down => None,
            Connection::Waiting(at) => Some(at),
            _ => self.stage.poll_at(),
        }
    }

    /// Has the stage ring the bell, or lets it off.
    pub(super) fn listen(&mut self, bell: Option<&Bell>) {
        if self.listens != bell.is_some() {
            self.listens = bell.is_some();
            self.stage.notify(bell.cloned());
        }
    }

    fn is_up(&self) -> bool {
        matches!(self.connection, Connection::Up)
    }
}

impl Pipeline {
    fn remote(&mut self, i: usize) -> &mut Remote {
        match &mut self.slots[i].kind {
            Kind::Remote(remote) => remote,
            Kind::Local(_) => unreachable!("stage {i} is a local one"),
        }
    }

    /// Sends a job to a remote stage.
    pub(super) fn send(&mut self, id: JobId, at: StageId) {
        let remote = self.remote(at.0);
        if let (Some(error), false) = (remote.untold.take(), remote.is_up()) {
            self.fail_members(id, at, &error);
            self.schedule.withdraw(at, id);
            return self.forget(id);
        }
        match self.work.get(&id) {
            Some(&Work::Rewind(session, position)) => {
                let remote = self.remote(at.0);
                remote.log.rewind(session, position);
                // one that nobody looks for needs no word: the log knows
                let result = if remote.is_up() { remote.stage.rewind(session, position) } else { Ok(()) };
                match result {
                    Ok(()) if position == 0 => self.session_began_anew(at, session),
                    Ok(()) => {}
                    Err(lost) if lost.may_pass() => self.lost(at.0, lost),
                    Err(source) => {
                        let error = self.stage_error(at.0, source);
                        self.fail(session, id, &error);
                    }
                }
            }
            Some(&Work::Check(piece)) => self.send_piece(id, at, piece),
            Some(Work::CheckEnd) => {
                self.work.remove(&id);
                let stage = &mut self.remote(at.0).stage;
                let session = stage.guard().map(|guard| guard.session());
                if let Some(Err(lost)) = session.map(|session| stage.rewind(session, 0)) {
                    self.failed(at.0, lost);
                }
            }
            Some(Work::Step(_)) => {
                self.shed_void(id, at);
                self.send_step(id, at);
            }
            None => unreachable!("every job of the schedule is in the table"),
        }
    }

    fn send_step(&mut self, id: JobId, at: StageId) {
        let Kind::Remote(remote) = &mut self.slots[at.0].kind else { return };
        let Some(Work::Step(step)) = self.work.get_mut(&id) else { return };
        if !remote.is_up() {
            // it was given up, and is needed again
            return self.lost(at.0, StageError::lost("there is no connection to it"));
        }
        let rows = step.hidden.take().expect("the first stage is local, so rows come before a remote one");
        let mut begins_check = false;
        if let Some(guard) = remote.stage.guard() {
            // where there is no session to spare, a row that nothing stands behind is asked again
            if let [span] = step.spans[..]
                && guard.is_due()
                && !guard.has_spare_session()
                && span.count == 1
                && self.schedule.n_running(at) == 1
            {
                remote.again = Some(Again { job: id, span, before: rows.clone(), first: None });
            }
            guard.count(n_rows(&step.spans));
            begins_check = guard.is_due() && guard.has_spare_session() && remote.check.is_none();
        }
        remote.log.push(id, step.spans.clone(), rows);
        remote.sent_at.push_back(self.clock.now());
        let sent = remote.log.last().expect("just pushed");
        match remote.stage.submit(id, &sent.spans, &sent.rows) {
            Ok(()) if begins_check => self.begin_check(at),
            Ok(()) => {}
            Err(lost) if lost.may_pass() => self.lost(at.0, lost),
            Err(source) => {
                remote.sent_at.pop_back();
                self.spare.extend(remote.log.unsent());
                let error = self.stage_error(at.0, source);
                self.fail_members(id, at, &error);
                self.schedule.withdraw(at, id);
                self.forget(id);
            }
        }
    }

    /// Where a worker has one session only, it is checked when that is empty.
    fn session_began_anew(&mut self, at: StageId, session: crate::ids::SessionId) {
        let remote = self.remote(at.0);
        let is_up = remote.is_up() && remote.check.is_none();
        let due = remote
            .stage
            .guard()
            .is_some_and(|guard| guard.is_due() && !guard.has_spare_session() && guard.session() == session);
        if is_up && due {
            self.begin_check(at);
        }
    }

    /// Puts a check's steps before everything that waits for the stage.
    fn begin_check(&mut self, at: StageId) {
        let Some(check) = self.remote(at.0).stage.guard().and_then(|guard| guard.begin()) else { return };
        let ids = self.schedule.push_check(at, check.len());
        for (piece, &id) in ids.iter().enumerate() {
            self.work.insert(id, if piece < check.len() { Work::Check(piece) } else { Work::CheckEnd });
        }
        self.remote(at.0).check = Some(check);
    }

    fn send_piece(&mut self, id: JobId, at: StageId, piece: usize) {
        let now = self.clock.now();
        let remote = self.remote(at.0);
        let Some((span, rows)) = remote.check.as_ref().and_then(|check| check.piece(piece)) else { return };
        remote.sent_at.push_back(now);
        if let Err(error) = remote.stage.submit(id, &[span], rows) {
            self.failed(at.0, error);
        }
    }

    /// Takes in whatever remote stages have to tell, without waiting; the last stage's first.
    pub(super) fn hear(&mut self) {
        for i in (0..self.slots.len()).rev() {
            let Kind::Remote(remote) = &self.slots[i].kind else { continue };
            match remote.connection {
                Connection::Up => while self.schedule.n_running(StageId(i)) > 0 && self.poll(i) {},
                Connection::Down => {}
                _ => self.bring_back(i),
            }
        }
    }

    /// Takes in an answer that is there. Whether there may be another.
    fn poll(&mut self, i: usize) -> bool {
        let mut rows = self.spare.pop().unwrap_or_else(|| Rows::empty(self.dtype));
        match self.remote(i).stage.poll(&mut rows) {
            Ok(Some(answer)) => {
                self.take_in(i, answer, rows);
                self.remote(i).is_up()
            }
            Ok(None) => {
                self.spare.push(rows);
                false
            }
            Err(error) => {
                self.spare.push(rows);
                self.failed(i, error);
                false
            }
        }
    }

    /// Waits for the one stage that can answer. Whether there may be something to do now.
    pub(super) fn collect(&mut self, i: usize, deadline: Option<Instant>) -> bool {
        let mut rows = self.spare.pop().unwrap_or_else(|| Rows::empty(self.dtype));
        let began = self.clock.now();
        let remote = self.remote(i);
        remote.listen(None);
        let result = remote.stage.collect_until(&mut rows, deadline);
        let waited = self.clock.now().saturating_duration_since(began);
        match result {
            Ok(Some(answer)) => {
                self.waited = Some(waited);
                self.take_in(i, answer, rows);
                self.waited = None;
                true
            }
            Ok(None) => {
                self.spare.push(rows);
                deadline.is_none_or(|deadline| self.clock.now() < deadline)
            }
            Err(error) => {
                self.spare.push(rows);
                self.slots[i].stats.wait += waited;
                self.failed(i, error);
                true
            }
        }
    }

    /// An answer has come.
    fn take_in(&mut self, i: usize, answer: Answer, rows: Rows) {
        self.n_heard += 1;
        let at = StageId(i);
        let expected = self.schedule.front(at);
        if expected != Some(answer.job) {
            self.spare.push(rows);
            let error = OutOfTurn { stage: at, got: answer.job, expected }.into();
            return self.useless(i, error);
        }
        let now = self.clock.now();
        let rows = match self.asked_again(i, answer, rows, now) {
            Some(rows) => rows,
            None => return,
        };
        let slot = &mut self.slots[i];
        let Kind::Remote(remote) = &mut slot.kind else { return };
        if let Some(sent) = remote.sent_at.pop_front()
            && remote.agreed > LEAST_WINDOW
        {
            remote.trips.measured(now.saturating_duration_since(sent), answer.compute, answer.wait);
            self.schedule.set_window(at, remote.trips.window(remote.agreed));
        }
        self.note(Happened::Done(answer.job, at));
        if let Some(Work::Check(_)) = self.work.get(&answer.job) {
            return self.piece_answered(at, answer.job, rows);
        }
        let slot = &mut self.slots[i];
        let Kind::Remote(remote) = &mut slot.kind else { return };
        remote.losses = None;
        remote.log.answered();
        slot.stats.compute += answer.compute;
        if let Some(waited) = self.waited.take() {
            slot.stats.wait += waited.saturating_sub(answer.compute);
        }
        match (self.schedule.finished(at, answer.job), self.work.get_mut(&answer.job)) {
            (Ok(Progress::Next(_)), Some(Work::Step(step))) => step.hidden = Some(rows),
            (Ok(_), _) => {
                self.spare.push(rows);
                self.forget(answer.job);
            }
            (Err(error), _) => self.useless(i, error.into()),
        }
    }

    /// A row that is to be asked twice has an answer: after the first it is asked again, after the second its first
    /// answer is returned. Every other answer is as it was.
    fn asked_again(&mut self, i: usize, answer: Answer, rows: Rows, now: Instant) -> Option<Rows> {
        let is_alone = self.schedule.n_running(StageId(i)) == 1;
        let Kind::Remote(remote) = &mut self.slots[i].kind else { return Some(rows) };
        let Some(mut again) = remote.again.take_if(|again| again.job == answer.job) else {
            return Some(rows);
        };
        let Some((first, before, asked_at)) = again.first.take() else {
            // with another step behind it the row cannot be taken back; a later one can
            if !is_alone {
                return Some(rows);
            }
            let before = remote.stage.traffic();
            let result = remote
                .stage
                .rewind(again.span.session(), again.span.position)
                .and_then(|()| remote.stage.submit(again.job, &[again.span], &again.before));
            again.first = Some((rows, before, now));
            remote.again = Some(again);
            if let Err(error) = result {
                self.failed(i, error);
            }
            return None;
        };
        let after = remote.stage.traffic();
        let guard = remote.stage.guard()?;
        guard.put_aside(Traffic {
            bytes_sent: after.bytes_sent - before.bytes_sent,
            bytes_received: after.bytes_received - before.bytes_received,
            round_trips: after.round_trips - before.round_trips,
        });
        let verdict = guard.compare_again(&again.before, &first, &rows);
        // the step was under way for as long as its first answer took
        if let Some(sent) = remote.sent_at.front_mut() {
            *sent += now.saturating_duration_since(asked_at);
        }
        self.waited = None;
        self.spare.push(rows);
        match verdict {
            Ok(()) => Some(first),
            Err(wrong) => {
                let error = self.stage_error(i, wrong);
                self.useless(i, error);
                None
            }
        }
    }

    /// A step of a check has its answer.
    fn piece_answered(&mut self, at: StageId, id: JobId, rows: Rows) {
        self.work.remove(&id);
        self.waited = None;
        if let Err(error) = self.schedule.finished(at, id) {
            return self.useless(at.0, error.into());
        }
        let remote = self.remote(at.0);
        let bytes = rows.bytes() as u64;
        let is_last = remote.check.as_mut().is_some_and(|check| check.answered(&rows));
        let check = remote.check.take_if(|_| is_last);
        let verdict = remote.stage.guard().map(|guard| {
            guard.put_aside(Traffic { bytes_sent: bytes, bytes_received: bytes, round_trips: 1 });
            check.map_or(Ok(()), |check| guard.verdict(&check).map(drop))
        });
        self.spare.push(rows);
        if let Some(Err(wrong)) = verdict {
            let error = self.stage_error(at.0, wrong);
            self.useless(at.0, error);
        }
    }

    fn stage_error(&self, i: usize, source: StageError) -> PipelineError {
        PipelineError::Stage { stage: self.slots[i].name.clone(), source }
    }

    /// The connection of a stage that was up is over.
    fn failed(&mut self, i: usize, error: StageError) {
        self.n_heard += 1;
        let at = StageId(i);
        if error.may_pass() {
            return self.lost(i, error);
        }
        let front = self.schedule.front(at);
        let is_check = front.is_some_and(|id| matches!(self.work.get(&id), Some(Work::Check(_))));
        if is_check && let Some(guard) = self.remote(i).stage.guard() {
            let wrong = guard.in_check(error);
            let error = self.stage_error(i, wrong);
            return self.useless(i, error);
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

    /// A stage is of no use: everybody with a step before it or in it hears why.
    fn useless(&mut self, i: usize, error: PipelineError) {
        self.n_heard += 1;
        let sessions = self.schedule.sessions_up_to(StageId(i));
        if sessions.is_empty() {
            self.remote(i).untold = Some(error.clone());
        }
        for session in sessions {
            // it has a step, which is the one that is named
            self.fail(session, JobId(u64::MAX), &error);
        }
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
                && let Some(Work::Step(work)) = self.work.get_mut(&step.job)
            {
                work.hidden = Some(step.rows);
            }
        }
        remote.sent_at.clear();
        (remote.again, remote.check) = (None, None);
        for id in self.schedule.lost(StageId(i)) {
            self.forget(id);
        }
    }

    /// A worker is lost: what it has not answered goes back to the schedule, and it is looked for.
    fn lost(&mut self, i: usize, reason: StageError) {
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

    /// A worker has come back again and again and given no new answer for too long: the oldest step that it was given
    /// each time is what it fails at, and that step's sessions end. Whether there are others to look for it for.
    fn blame_front(&mut self, i: usize, since: Duration, reason: StageError) -> bool {
        let at = StageId(i);
        let front = self.schedule.front(at);
        let stage = self.slots[i].name.clone();
        let Some(losses) = self.remote(i).losses.take() else { return true };
        let after = since.saturating_sub(losses.since);
        let error = PipelineError::WorkerKeepsFailing { stage, after, losses: losses.count, reason };
        match front.filter(|id| matches!(self.work.get(id), Some(Work::Step(_)))) {
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
    fn bring_back(&mut self, i: usize) {
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
            let error = self.stage_error(i, error);
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
        match next {
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
            Some(check) => Connection::Checking { check, next: 0, is_sent: false },
            None => REPLAY,
        };
        let is_checked = matches!(remote.connection, Connection::Checking { .. });
        self.schedule.set_window(StageId(i), window);
        if !is_checked {
            self.tell_replay(i);
        }
    }

    fn tell_replay(&mut self, i: usize) {
        let slot = &self.slots[i];
        if let Kind::Remote(remote) = &slot.kind {
            (self.observer)(Event::Replaying { stage: &slot.name, steps: remote.log.n_steps() });
        }
    }

    /// Holds a worker that is back against its canary. Whether that got on.
    fn check_on(&mut self, i: usize) -> Result<bool, StageError> {
        let mut rows = self.spare.pop().unwrap_or_else(|| Rows::empty(self.dtype));
        let Remote { stage, connection, .. } = self.remote(i);
        let Connection::Checking { check, next, is_sent } = connection else { return Ok(true) };
        let mut step = || match (*is_sent, check.piece(*next)) {
            (true, _) => Ok(stage.poll(&mut rows)?.is_some()),
            (false, Some((span, piece))) => {
                stage.submit(JobId(*next as u64), &[span], piece)?;
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
                let bytes = rows.bytes() as u64;
                guard.put_aside(Traffic { bytes_sent: bytes, bytes_received: bytes, round_trips: 1 });
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
                        ReplayOp::Step { job, spans, rows } => stage.submit(job, &spans, rows)?,
                        ReplayOp::Rewind { session, position } => stage.rewind(session, position)?,
                    }
                }
                return Ok(true);
            }
            let is_answered = *ahead > 0 && stage.poll(&mut dropped)?.is_some();
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
        let after = remote.lost_at.take().map_or(Duration::ZERO, |lost| now.saturating_duration_since(lost));
        slot.stats.reconnects += 1;
        slot.stats.wait += after;
        (self.observer)(Event::Back { stage: &slot.name, after });
        self.schedule.found(StageId(i));
    }
}

/// A replay that has yet to begin.
const REPLAY: Connection = Connection::Replaying { next: 0, ahead: 0, standing: Standing::NOWHERE };
