//! The remote half of the pipeline: sending and hearing. What happens when a worker is lost stands in
//! [`recover`](super::recover).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::results::Doubt;
use super::{Kind, Pipeline, PipelineError, Work};
use crate::bell::Bell;
use crate::guard::Check;
use crate::ids::{JobId, StageId};
use crate::patience::Losses;
use crate::replay::{ReplayLog, Standing};
use crate::rows::Rows;
use crate::schedule::{AfterStage, OutOfTurn};
use crate::stage::{Answer, RemoteStage, Span, StageError, TakeBack, Traffic, n_rows};
use crate::trace::Happened;
use crate::window::RoundTrips;

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
pub(super) struct Again {
    job: JobId,
    span: Span,
    tokens: Vec<i32>,
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
    pub(super) log: ReplayLog,
    pub(super) losses: Option<Losses>,
    pub(super) lost_at: Option<Instant>,
    /// it was looked for so long, and something else is to take its place
    pub(super) given_up: Option<Duration>,
    pub(super) trips: RoundTrips,
    /// when each step without an answer was sent
    pub(super) sent_at: VecDeque<Instant>,
    pub(super) listens: bool,
    pub(super) again: Option<Again>,
    /// a check whose steps are jobs
    pub(super) check: Option<Check>,
    /// who has to hear if a check fails
    pub(super) doubt: Doubt,
    /// an error that nobody was there to hear
    pub(super) untold: Option<PipelineError>,
}

impl Remote {
    pub(super) fn new(stage: Box<dyn RemoteStage>) -> Remote {
        Remote {
            agreed: stage.max_in_flight().max(1),
            log: ReplayLog::of(stage.take_back()),
            stage,
            connection: Connection::Up,
            losses: None,
            lost_at: None,
            given_up: None,
            trips: RoundTrips::default(),
            sent_at: VecDeque::new(),
            listens: false,
            again: None,
            check: None,
            doubt: Doubt::default(),
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

    pub(super) fn is_up(&self) -> bool {
        matches!(self.connection, Connection::Up)
    }
}

impl Pipeline {
    pub(super) fn remote(&mut self, i: usize) -> &mut Remote {
        match &mut self.slots[i].kind {
            Kind::Remote(remote) => remote,
            Kind::Local(_) => unreachable!("stage {i} is a local one"),
        }
    }

    /// Sends a job to a remote stage.
    pub(super) fn send(&mut self, id: JobId, at: StageId) {
        // a rewind comes through whatever is wrong: who hears of it is the step behind
        let is_step = matches!(self.work.get(id), Some(Work::Step(_)));
        let remote = self.remote(at.0);
        if is_step && let (Some(error), false) = (remote.untold.take(), remote.is_up()) {
            self.fail_members(id, at, &error);
            self.schedule.withdraw(at, id);
            return self.forget(id);
        }
        match self.work.get(id) {
            Some(&Work::Rewind(session, position)) => {
                let is_settled = self.held.iter().all(|f| f.session != session);
                let remote = self.remote(at.0);
                remote.log.rewind(session, position);
                if position == 0 && is_settled {
                    remote.doubt.forget(session);
                }
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
                self.work.remove(id);
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
        let Some(Work::Step(step)) = self.work.get_mut(id) else { return };
        if !remote.is_up() {
            // it was given up, and is needed again
            return self.lost(at.0, StageError::lost("there is no connection to it"));
        }
        let rows = step.hidden.take().expect("the first stage is local, so rows come before a remote one");
        let tokens = if remote.stage.reads_tokens() { step.tokens.clone() } else { Vec::new() };
        let can_take_back = remote.stage.take_back() == TakeBack::ALL;
        let mut begins_check = false;
        if let Some(guard) = remote.stage.guard() {
            // where there is no session to spare, a row that nothing stands behind is asked again
            if let [span] = step.spans[..]
                && guard.is_due()
                && !guard.has_spare_session()
                && span.count == 1
                && self.schedule.n_running(at) == 1
                && can_take_back
            {
                let (tokens, before) = (tokens.clone(), rows.clone());
                remote.again = Some(Again { job: id, span, tokens, before, first: None });
            }
            guard.count(n_rows(&step.spans));
            step.spans.iter().for_each(|span| remote.doubt.add(span.session()));
            begins_check = guard.is_due() && guard.has_spare_session() && remote.check.is_none();
        }
        remote.log.push(id, step.spans.clone(), tokens, rows);
        let now = self.clock.now();
        remote.sent_at.push_back(now);
        let sent = remote.log.last().expect("just pushed");
        match remote.stage.submit(id, &sent.spans, &sent.tokens, &sent.rows) {
            Ok(()) if begins_check => self.begin_check(at),
            Ok(()) => self.moment = Some(now),
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
        let remote = self.remote(at.0);
        remote.check = Some(check);
        remote.doubt.check_begins();
    }

    fn send_piece(&mut self, id: JobId, at: StageId, piece: usize) {
        let now = self.clock.now();
        let remote = self.remote(at.0);
        let Some((span, rows)) = remote.check.as_ref().and_then(|check| check.piece(piece)) else { return };
        remote.sent_at.push_back(now);
        if let Err(error) = remote.stage.submit(id, &[span], &[], rows) {
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
                let now = self.clock.now();
                self.take_in(i, answer, rows, now);
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
        // a step that was just sent is waited for from then on
        let began = self.moment.take().unwrap_or_else(|| self.clock.now());
        let remote = self.remote(i);
        remote.listen(None);
        let result = remote.stage.collect_until(&mut rows, deadline);
        let now = self.clock.now();
        let waited = now.saturating_duration_since(began);
        match result {
            Ok(Some(answer)) => {
                self.waited = Some(waited);
                self.take_in(i, answer, rows, now);
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

    /// An answer has come, and is seen now.
    fn take_in(&mut self, i: usize, answer: Answer, rows: Rows, now: Instant) {
        self.n_heard += 1;
        let at = StageId(i);
        let expected = self.schedule.front(at);
        if expected != Some(answer.job) {
            self.spare.push(rows);
            let error = OutOfTurn { stage: at, got: answer.job, expected }.into();
            return self.useless(i, error);
        }
        if let Some(error) = answer.failed {
            self.spare.push(rows);
            return self.step_failed(i, answer.job, error);
        }
        let rows = match self.asked_again(i, &answer, rows, now) {
            Some(rows) => rows,
            None => return,
        };
        let slot = &mut self.slots[i];
        let Kind::Remote(remote) = &mut slot.kind else { return };
        if let Some(sent) = remote.sent_at.pop_front() {
            remote.trips.measured(now.saturating_duration_since(sent), answer.compute, answer.wait);
            self.schedule.set_window(at, remote.trips.window(remote.agreed));
            self.schedule.set_round_trip(at, remote.trips.round_trip());
        }
        if let Some(Work::Step(step)) = self.work.get(answer.job) {
            self.schedule.computed(at, step.tokens.len(), answer.compute);
        }
        self.note(Happened::Done(answer.job, at));
        if let Some(Work::Check(_)) = self.work.get(answer.job) {
            return self.piece_answered(at, answer.job, rows);
        }
        let worker = self.worker(i + 1);
        let slot = &mut self.slots[i];
        let Kind::Remote(remote) = &mut slot.kind else { return };
        remote.losses = None;
        remote.log.answered();
        slot.stats.compute += answer.compute;
        if let Some(waited) = self.waited.take() {
            slot.stats.wait += waited.saturating_sub(answer.compute);
        }
        match (self.schedule.finished(at, answer.job), self.work.get_mut(answer.job)) {
            (Ok(AfterStage::Next(_)), Some(Work::Step(step))) => {
                // of a step that was saved the next worker is given what it was given then
                let worker = worker.filter(|_| step.saved.is_some());
                let saved = worker.and_then(|worker| step.take_rows(worker).ok());
                step.hidden = Some(saved.unwrap_or(rows));
            }
            (Ok(_), _) => {
                self.spare.push(rows);
                self.forget(answer.job);
            }
            (Err(error), _) => self.useless(i, error.into()),
        }
    }

    /// The oldest step of a worker failed, and the worker is as good as before for everybody else's.
    fn step_failed(&mut self, i: usize, id: JobId, error: StageError) {
        let at = StageId(i);
        self.waited = None;
        self.note(Happened::Done(id, at));
        if self.check_failed(i, Some(id), &error) {
            return;
        }
        let failure = self.stage_error(i, error);
        self.fail_members(id, at, &failure);
        let remote = self.remote(i);
        remote.sent_at.pop_front();
        if remote.again.as_ref().is_some_and(|again| again.job == id) {
            remote.again = None;
        }
        // it has answered something new
        remote.losses = None;
        remote.log.failed();
        match self.schedule.finished(at, id) {
            Ok(_) => self.forget(id),
            Err(error) => self.useless(i, error.into()),
        }
    }

    /// Workers need not compute what nobody wants any more.
    pub(super) fn call_off(&mut self) {
        for (i, slot) in self.slots.iter_mut().enumerate() {
            if let Kind::Remote(remote) = &mut slot.kind
                && remote.is_up()
            {
                self.schedule.void_steps(StageId(i)).for_each(|job| remote.stage.cancel(job));
            }
        }
    }

    /// A row that is to be asked twice has an answer: after the first it is asked again, after the second its first
    /// answer is returned. Every other answer is as it was.
    fn asked_again(&mut self, i: usize, answer: &Answer, rows: Rows, now: Instant) -> Option<Rows> {
        let is_alone = self.schedule.runs_one(StageId(i));
        let Kind::Remote(remote) = &mut self.slots[i].kind else { return Some(rows) };
        let Some(mut again) = remote.again.take_if(|again| again.job == answer.job) else {
            return Some(rows);
        };
        let Some((first, before, asked_at)) = again.first.take() else {
            // with another step or a rewind behind it the row cannot be taken back; a later one can
            if !is_alone {
                return Some(rows);
            }
            let before = remote.stage.traffic();
            let result = remote
                .stage
                .rewind(again.span.session(), again.span.position)
                .and_then(|()| remote.stage.submit(again.job, &[again.span], &again.tokens, &again.before));
            again.first = Some((rows, before, now));
            remote.again = Some(again);
            if let Err(error) = result {
                self.failed(i, error);
            }
            return None;
        };
        let after = remote.stage.traffic();
        let guard = remote.stage.guard()?;
        guard.count_check_traffic(after.since(before));
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
        self.work.remove(id);
        self.waited = None;
        if let Err(error) = self.schedule.finished(at, id) {
            return self.useless(at.0, error.into());
        }
        let remote = self.remote(at.0);
        let cost = Traffic::of_step(rows.bytes());
        let is_last = remote.check.as_mut().is_some_and(|check| check.answered(&rows));
        let check = remote.check.take_if(|_| is_last);
        let verdict = remote.stage.guard().map(|guard| {
            guard.count_check_traffic(cost);
            check.map_or(Ok(()), |check| guard.verdict(&check).map(drop))
        });
        self.spare.push(rows);
        if !is_last {
            return;
        }
        match verdict {
            Some(Err(wrong)) => {
                let error = self.stage_error(at.0, wrong);
                self.useless(at.0, error);
            }
            _ => {
                self.remote(at.0).doubt.check_passed();
                self.release_held();
            }
        }
    }
}
