//! A pipeline that several threads share, each for a session of its own.
//!
//! ```text
//! Client::run --steps--> [requests] --> whoever drives: Pipeline::advance --> [mailboxes] --logits--> Client::run
//! ```
//!
//! There is no thread for it. Whoever waits for a result while nobody drives the pipeline drives it, for everybody: takes
//! requests in, advances, puts results into the mailboxes, until its own is there. Then it leaves the pipeline and wakes
//! one of those that still wait, who goes on. So a step of a session that is alone changes no thread: it costs a lock that
//! nobody else wants, twice.
//!
//! While there is one client, the driver reads a worker's answer itself; with more of them it waits for the
//! [bell](crate::bell), which a request rings too. A second client that comes while the first one reads is therefore taken
//! in behind the answer that is being read, within [`LOOKS`] where that does not come, and from then on at once.
//!
//! One lock, held for moments: nothing of the pipeline runs under it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{ThreadId, current};
use std::time::Instant;

use crate::bell::{Interrupt, LOOKS};
use crate::error::PipelineError;
use crate::ids::SessionId;
use crate::pipeline::{Advance, Finished, Pipeline, Snapshot, Step};
use crate::saved::SavedStep;

/// A pipeline and the sessions that it has room for; clones are the same one.
#[derive(Clone)]
pub struct SharedPipeline(Arc<Shared>);

/// Every session has its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} in use", match .sessions { 1 => "the one session is".to_owned(), n => format!("all {n} sessions are") })]
pub struct NoSession {
    /// How many there are.
    pub sessions: u32,
}

impl SharedPipeline {
    /// Sessions 0 to `sessions` (exclusive) of a pipeline whose stages have a cache for each.
    pub fn new(pipeline: Pipeline, sessions: u32) -> SharedPipeline {
        let interrupt = pipeline.interrupt();
        let state = State {
            driven: Some(Box::new(Driven { pipeline, requests: Vec::new() })),
            requests: Vec::new(),
            mailboxes: (0..sessions).map(|_| Mailbox::default()).collect(),
            n_clients: 0,
            driver: None,
            is_abandoned: false,
        };
        let ready = (0..sessions).map(|_| Condvar::new()).collect();
        SharedPipeline(Arc::new(Shared { state: Mutex::new(state), ready, interrupt }))
    }

    /// A client for a session that nobody has. The session is empty, and is free again when the client is dropped.
    ///
    /// # Errors
    /// There is none.
    pub fn client(&self) -> Result<Client, NoSession> {
        let mut state = self.0.lock();
        let mut free = (0..).zip(&mut state.mailboxes).filter(|(_, mailbox)| !mailbox.is_taken);
        let Some((session, mailbox)) = free.next() else {
            return Err(NoSession { sessions: self.sessions() });
        };
        mailbox.is_taken = true;
        state.n_clients += 1;
        let session = SessionId(session);
        // whoever had it may have left in the middle of a step
        state.requests.push(Request::Rewind(session, 0));
        Ok(Client { shared: Arc::clone(&self.0), session, spare: Vec::new() })
    }

    /// How many clients there can be.
    pub fn sessions(&self) -> u32 {
        u32::try_from(self.0.ready.len()).unwrap_or(u32::MAX)
    }
}

/// A session of a shared pipeline, for the thread that it is.
pub struct Client {
    shared: Arc<Shared>,
    session: SessionId,
    /// buffers of logits to be given back
    spare: Vec<Vec<f32>>,
}

impl Client {
    /// Its session.
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// Forgets the rows from `position` on, before the next step; what goes wrong with that is the step's error.
    pub fn rewind(&mut self, position: u32) {
        self.shared.lock().requests.push(Request::Rewind(self.session, position));
    }

    /// Evaluates steps, whatever session they name in this one, and gives each one's logits, (n_wanted, n_vocab), to
    /// `on_logits`, in order and as they come out; it gives back a buffer that is not needed any more. Where it panics,
    /// the steps behind are given up; so are those that have not come out when another thread sets `stop`, which is looked
    /// at after every step of a stage here and every [`LOOKS`]. How many have come out: all of them, unless it was set.
    ///
    /// # Errors
    /// A step has failed, and those behind it came to nothing: the session has to be rewound to where its caller knows
    /// it.
    pub fn run(
        &mut self,
        steps: impl IntoIterator<Item = Step>,
        stop: Option<&AtomicBool>,
        on_logits: impl FnMut(Vec<f32>) -> Option<Vec<f32>>,
    ) -> Result<usize, PipelineError> {
        let session = self.session;
        let steps = steps.into_iter().map(|step| Request::Submit(Step { session, ..step }));
        self.run_all(steps, stop, on_logits)
    }

    /// The session's steps from `position` on, of the `length` rows that it holds, as [`Pipeline::save_steps`] gives them: not
    /// all of them at once. Nothing of the session may be under way but rewinds.
    ///
    /// # Errors
    /// As of [`snapshot`](Self::snapshot); or a stage cannot save one.
    pub fn save_steps(&self, position: u32, length: u32, most: u32) -> Result<Vec<SavedStep>, PipelineError> {
        let request = Request::Save { session: self.session, position, length, most };
        self.ask(request, |mailbox| mailbox.saved.take())?.unwrap_or_else(|| Ok(Vec::new()))
    }

    /// Gives the session steps that were saved, one behind the other, as [`run`](Self::run) evaluates some. How many have
    /// come out.
    ///
    /// # Errors
    /// As of [`run`](Self::run).
    pub fn restore(
        &mut self,
        steps: impl IntoIterator<Item = SavedStep>,
        stop: Option<&AtomicBool>,
    ) -> Result<usize, PipelineError> {
        let session = self.session;
        let steps = steps.into_iter().map(|step| Request::Restore(session, Box::new(step)));
        self.run_all(steps, stop, |_| None)
    }

    fn run_all(
        &mut self,
        steps: impl Iterator<Item = Request>,
        stop: Option<&AtomicBool>,
        mut on_logits: impl FnMut(Vec<f32>) -> Option<Vec<f32>>,
    ) -> Result<usize, PipelineError> {
        let Client { shared, session, spare } = self;
        let mut steps = steps;
        let Some(mut step) = steps.next() else { return Ok(0) };
        let mut under_way = UnderWay { shared, session: *session, is_over: false };
        let (mut n_out, mut n_left) = (0, 0);
        let mut state = loop {
            // the caller's code runs without the lock, and what it leaves behind if it panics is given up
            let after = steps.next();
            let mut state = shared.lock();
            state.requests.push(step);
            n_left += 1;
            match after {
                Some(after) => step = after,
                None => break state,
            }
        };
        loop {
            state.requests.extend(spare.drain(..).map(Request::Reuse));
            let (unlocked, result) =
                shared.wait(state, *session, stop, |mailbox| mailbox.results.pop_front());
            drop(unlocked);
            let Some(outcome) = result? else { return Ok(n_out) };
            (n_out, n_left) = (n_out + 1, n_left - 1);
            // whatever an error leaves of this session is given up too
            under_way.is_over = n_left == 0 && outcome.is_ok();
            spare.extend(on_logits(outcome?));
            if n_left == 0 {
                return Ok(n_out);
            }
            state = shared.lock();
        }
    }

    /// What the stages have done so far, for all sessions, and what has crossed sockets. Waits for whoever drives the
    /// pipeline to be reached: a local stage's step, or, for the second client there is, [`LOOKS`].
    ///
    /// # Errors
    /// The pipeline was abandoned, or asked from within.
    pub fn snapshot(&self) -> Result<Snapshot, PipelineError> {
        let snapshot = self.ask(Request::Look(self.session), |mailbox| mailbox.snapshot.take());
        snapshot.map(Option::unwrap_or_default)
    }

    /// Asks whoever drives the pipeline, and waits for the answer; nothing stops that, so there is one.
    fn ask<T>(
        &self,
        request: Request,
        pick: impl FnMut(&mut Mailbox) -> Option<T>,
    ) -> Result<Option<T>, PipelineError> {
        let mut state = self.shared.lock();
        state.requests.push(request);
        let (mut state, answer) = self.shared.wait(state, self.session, None, pick);
        if answer.is_err() {
            // it would be answered when nobody waits for it any more
            state.requests.retain(|request| request.asked_by() != Some(self.session));
        }
        answer
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.give_up(self.session);
        state.requests.push(Request::Rewind(self.session, 0));
        state.n_clients -= 1;
        let mailbox = state.mailbox(self.session);
        mailbox.is_taken = false;
        (mailbox.snapshot, mailbox.saved) = (None, None);
        let is_driven = state.driven.is_none();
        drop(state);
        if is_driven {
            self.shared.interrupt.ask();
        }
    }
}

/// Steps of a session whose results are waited for. Where they no longer are, because of a panic, they are given up.
struct UnderWay<'a> {
    shared: &'a Shared,
    session: SessionId,
    is_over: bool,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            self.shared.lock().give_up(self.session);
            self.shared.interrupt.ask();
        }
    }
}

struct Shared {
    state: Mutex<State>,
    /// of each session: its mailbox is no longer empty, or nobody drives
    ready: Vec<Condvar>,
    interrupt: Interrupt,
}

struct State {
    /// while nobody drives it
    driven: Option<Box<Driven>>,
    /// not yet taken in
    requests: Vec<Request>,
    /// by the sessions' numbers
    mailboxes: Vec<Mailbox>,
    n_clients: usize,
    /// who drives it now
    driver: Option<ThreadId>,
    /// the thread that drove it has panicked
    is_abandoned: bool,
}

/// What whoever drives has for itself.
struct Driven {
    pipeline: Pipeline,
    /// taken in: an empty list, but for the moment between two locks
    requests: Vec<Request>,
}

enum Request {
    Submit(Step),
    Rewind(SessionId, u32),
    GiveUp(SessionId),
    Reuse(Vec<f32>),
    Look(SessionId),
    Save { session: SessionId, position: u32, length: u32, most: u32 },
    Restore(SessionId, Box<SavedStep>),
}

impl Request {
    /// Who waits for an answer to it.
    fn asked_by(&self) -> Option<SessionId> {
        match *self {
            Request::Look(session) | Request::Save { session, .. } => Some(session),
            _ => None,
        }
    }
}

/// What was asked for.
enum Answer {
    Snapshot(Snapshot),
    Saved(Result<Vec<SavedStep>, PipelineError>),
}

#[derive(Default)]
struct Mailbox {
    is_taken: bool,
    /// somebody sleeps until it is not empty
    is_awaited: bool,
    /// its steps are given up, and whoever drives has yet to hear of it: what comes is of no use
    is_given_up: bool,
    results: VecDeque<Result<Vec<f32>, PipelineError>>,
    snapshot: Option<Snapshot>,
    saved: Option<Result<Vec<SavedStep>, PipelineError>>,
}

impl Mailbox {
    fn is_empty(&self) -> bool {
        self.results.is_empty() && self.snapshot.is_none() && self.saved.is_none()
    }

    fn take_in(&mut self, answer: Answer) {
        match answer {
            Answer::Snapshot(snapshot) => self.snapshot = Some(snapshot),
            Answer::Saved(saved) => self.saved = Some(saved),
        }
    }
}

impl State {
    fn mailbox(&mut self, session: SessionId) -> &mut Mailbox {
        &mut self.mailboxes[session.0 as usize]
    }

    fn give_up(&mut self, session: SessionId) {
        self.requests.push(Request::GiveUp(session));
        let mailbox = self.mailbox(session);
        mailbox.results.clear();
        mailbox.is_given_up = true;
    }
}

impl Shared {
    /// The lock is left whole by whoever panics with it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for something in a session's mailbox, or drives the pipeline until it is there; `None`: `stop` was set before.
    fn wait<'a, T>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        session: SessionId,
        stop: Option<&AtomicBool>,
        mut pick: impl FnMut(&mut Mailbox) -> Option<T>,
    ) -> (MutexGuard<'a, State>, Result<Option<T>, PipelineError>) {
        let mut has_asked = false;
        loop {
            if let Some(picked) = pick(state.mailbox(session)) {
                self.pass_on(&state);
                return (state, Ok(Some(picked)));
            }
            if is_set(stop) {
                self.pass_on(&state);
                return (state, Ok(None));
            }
            if state.is_abandoned {
                state.requests.clear();
                return (state, Err(PipelineError::Abandoned));
            }
            state = match state.driven.take() {
                Some(driven) => {
                    state.driver = Some(current().id());
                    self.drive(state, driven, session, stop)
                }
                None if state.driver == Some(current().id()) => {
                    return (state, Err(PipelineError::FromWithin));
                }
                None => {
                    if !std::mem::replace(&mut has_asked, true) {
                        self.interrupt.ask();
                    }
                    state.mailbox(session).is_awaited = true;
                    let ready = &self.ready[session.0 as usize];
                    let mut state = match stop {
                        None => ready.wait(state).unwrap_or_else(PoisonError::into_inner),
                        Some(_) => ready.wait_timeout(state, LOOKS).unwrap_or_else(PoisonError::into_inner).0,
                    };
                    state.mailbox(session).is_awaited = false;
                    state
                }
            };
        }
    }

    /// If nobody drives, one of those that wait does from now on.
    fn pass_on(&self, state: &State) {
        if state.driven.is_some()
            && let Some(next) = state.mailboxes.iter().position(|mailbox| mailbox.is_awaited)
        {
            self.ready[next].notify_one();
        }
    }

    /// Drives the pipeline until there is something in this session's mailbox, or `stop` is set.
    fn drive<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        driven: Box<Driven>,
        session: SessionId,
        stop: Option<&AtomicBool>,
    ) -> MutexGuard<'a, State> {
        let mut driver = Driver { shared: self, driven: Some(driven) };
        loop {
            let Some(driven) = &mut driver.driven else { return state };
            std::mem::swap(&mut driven.requests, &mut state.requests);
            if driven.requests.is_empty() && (!state.mailbox(session).is_empty() || is_set(stop)) {
                state.driven = driver.driven.take();
                state.driver = None;
                return state;
            }
            for request in &driven.requests {
                if let Request::GiveUp(session) = request {
                    state.mailbox(*session).is_given_up = false;
                }
            }
            let is_shared = state.n_clients > 1;
            drop(state);
            driven.pipeline.set_shared(is_shared);
            let answers = driven.take_in();
            // one that reads an answer itself hears no bell: somebody may have come, and the answer may be long in coming
            let until = (stop.is_some() || !is_shared).then(|| Instant::now() + LOOKS);
            let advanced = if answers.is_empty() { driven.pipeline.advance(until) } else { Advance::Later };
            state = self.lock();
            for (by, answer) in answers {
                state.mailbox(by).take_in(answer);
                self.ready[by.0 as usize].notify_one();
            }
            match advanced {
                Advance::Finished(Finished { session, outcome, .. }) => {
                    let mailbox = state.mailbox(session);
                    if !mailbox.is_given_up {
                        mailbox.results.push_back(outcome);
                    }
                    if mailbox.is_awaited {
                        self.ready[session.0 as usize].notify_one();
                    }
                }
                Advance::Later => {}
                Advance::Idle if !state.requests.is_empty() => {}
                // it had come out before, and what was asked for meanwhile was no step: a rewind
                Advance::Idle if !state.mailbox(session).is_empty() => {}
                Advance::Idle => {
                    drop(state);
                    unreachable!("a step has neither come out nor failed");
                }
            }
        }
    }
}

impl Driven {
    /// Does what was asked for; what there is to answer, and to whom.
    fn take_in(&mut self) -> Vec<(SessionId, Answer)> {
        let mut answers = Vec::new();
        for request in self.requests.drain(..) {
            match request {
                Request::Submit(step) => drop(self.pipeline.submit(step)),
                Request::Rewind(session, position) => drop(self.pipeline.rewind(session, position)),
                Request::GiveUp(session) => self.pipeline.give_up(session),
                Request::Reuse(logits) => self.pipeline.reuse(logits),
                Request::Restore(session, step) => drop(self.pipeline.restore(session, *step)),
                Request::Look(by) => answers.push((by, Answer::Snapshot(self.pipeline.snapshot()))),
                Request::Save { session, position, length, most } => {
                    let saved = self.pipeline.save_steps(session, position, length, most);
                    answers.push((session, Answer::Saved(saved)));
                }
            }
        }
        answers
    }
}

/// Whoever drives: where it panics, nobody knows where the pipeline stands, and nobody waits for it for ever.
struct Driver<'a> {
    shared: &'a Shared,
    driven: Option<Box<Driven>>,
}

impl Drop for Driver<'_> {
    fn drop(&mut self) {
        if self.driven.is_some() {
            self.shared.lock().is_abandoned = true;
            self.shared.ready.iter().for_each(Condvar::notify_all);
        }
    }
}

fn is_set(stop: Option<&AtomicBool>) -> bool {
    stop.is_some_and(|stop| stop.load(Ordering::Relaxed))
}

#[cfg(test)]
mod tests;
