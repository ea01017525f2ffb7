//! A link: a connection on which host and worker have agreed. Its two halves, [`Sender`] and [`Receiver`], may be used
//! from two threads; how threads and socket go together is told in `line.rs`, what is said when in [`crate::endpoint`].

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use dim_core::bell::Bell;
use dim_core::rows::{RowType, RowsRef};
use dim_core::stage::{Span, Traffic};

use super::LinkError;
use super::line::{Line, State};
use super::opening::Opening;
use crate::endpoint::{ClockOffset, ComputeTime};
use crate::error::Misbehaved;
use crate::fault::{Farewell, Fault};
use crate::frame::{MAX_BODY, Store};
use crate::link_error::LinkErrorKind;
use crate::message::{Message, Status};
use crate::rows::{self, Shape};
use crate::terms::{Agreed, Terms};

/// An authenticated connection on which both sides have agreed.
#[derive(Debug)]
pub struct Link {
    sender: Sender,
    receiver: Receiver,
}

impl Link {
    /// What was agreed on.
    pub fn agreed(&self) -> &Agreed {
        &self.sender.said.agreed
    }

    /// What the peer said it is, holds or needs.
    pub fn peer_terms(&self) -> &Terms {
        &self.sender.said.peer_terms
    }

    /// The peer's name and address, for messages.
    pub fn peer(&self) -> &str {
        &self.sender.line.peer
    }

    /// Where the peer is.
    pub fn peer_address(&self) -> Option<SocketAddr> {
        self.sender.line.stream.peer_addr().ok()
    }

    /// This connection's name in the logs of both sides.
    pub fn label(&self) -> &str {
        &self.sender.said.label
    }

    /// The half that sends; clones of it may be used from any thread.
    pub fn sender(&self) -> &Sender {
        &self.sender
    }

    /// The half that receives.
    pub fn receiver(&mut self) -> &mut Receiver {
        &mut self.receiver
    }

    /// Both halves, for two threads.
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }

    /// See [`Sender::send_step`].
    pub fn send_step(&self, spans: &[Span], tokens: &[i32], rows: RowsRef<'_>) -> Result<u32, LinkError> {
        self.sender.send_step(spans, tokens, rows)
    }

    /// See [`Receiver::receive`].
    pub fn receive(&mut self, deadline: Option<Instant>) -> Result<Event<'_>, LinkError> {
        self.receiver.receive(deadline)
    }

    /// Says goodbye and closes.
    pub fn close(self, why: Farewell) {
        self.sender.goodbye(why);
    }
}

/// What happened on a link.
#[derive(Debug)]
pub enum Event<'a> {
    /// To a worker: evaluate these rows. The books have been checked: every span goes on where its session
    /// stands.
    Step {
        /// To be named in the answer.
        step: u32,
        /// Which rows are whose.
        spans: &'a [Span],
        /// `(n_rows)` token ids, where the agreement has them; else none.
        tokens: &'a [i32],
        /// `(n_rows, width)`, every number finite.
        rows: RowsRef<'a>,
        /// When its last byte was read.
        arrived: Instant,
    },
    /// To a host: the rows of the oldest step without an answer.
    Done {
        /// The step.
        step: u32,
        /// `(n_rows, width)`, every number finite.
        rows: RowsRef<'a>,
        /// How long the worker computed.
        compute: Duration,
        /// How long the complete step lay at the worker before.
        wait: Duration,
        /// When it began to compute, on its own clock: see [`Sender::clock_offset`].
        began_us: u64,
    },
    /// To a host: the oldest step without an answer was not evaluated. Its sessions are to be rewound to where they stood
    /// before it.
    Failed {
        /// The step.
        step: u32,
        /// Why; `None`: it was called off, or stands on one that was or that failed.
        fault: Option<Fault>,
    },
    /// To a worker: forget this session's rows at `position` and after it.
    Rewind {
        /// The session.
        session: u32,
        /// Its new length.
        position: u32,
    },
    /// To a worker: forget this session.
    EndSession {
        /// The session.
        session: u32,
    },
}

/// What both sides said before they agreed.
struct Said {
    agreed: Agreed,
    peer_terms: Terms,
    label: String,
}

/// The half of a link that sends.
#[derive(Clone)]
pub struct Sender {
    line: Arc<Line>,
    said: Arc<Said>,
}

impl Sender {
    /// What was agreed on.
    pub fn agreed(&self) -> &Agreed {
        &self.said.agreed
    }

    /// Host: sends rows to be evaluated; the step's number. `spans` say whose rows they are, in order; `tokens` are their
    /// token ids, where the agreement has them. Never waits for the worker: what the socket has no room for is copied and
    /// sent as it takes it, and if it takes nothing for too long, the [`Receiver`] tells of the end.
    ///
    /// # Errors
    /// [`LinkErrorKind::Misuse`] if the rows do not fit the agreement or the sessions, or are not finite, or as many steps
    /// are under way as were agreed on: nothing was sent. Otherwise the link is lost.
    pub fn send_step(&self, spans: &[Span], tokens: &[i32], rows: RowsRef<'_>) -> Result<u32, LinkError> {
        let payload = rows::as_bytes(rows);
        self.line.queue(payload, |state| {
            let step = state.endpoint.send_step(spans, tokens, rows)?;
            if payload.len() > MAX_BODY && state.endpoint.books().is_some_and(|b| b.in_flight() > 1) {
                // the answer to an earlier step may come while this one is being written
                state.read_ahead = true;
            }
            Ok(step)
        })
    }

    /// Worker: answers the oldest step without an answer. Waits until the host has room for it.
    ///
    /// # Errors
    /// As of [`send_step`](Self::send_step).
    pub fn send_done(
        &self,
        step: u32,
        n_rows: u32,
        rows: RowsRef<'_>,
        time: ComputeTime,
    ) -> Result<(), LinkError> {
        let begin = |state: &mut State| state.endpoint.send_step_done(step, n_rows, rows, time);
        self.line.send(rows::as_bytes(rows), begin)
    }

    /// Host: does not want the answer to a step any more, nor to those of its sessions that stand on it. One that has not
    /// begun is answered [`Event::Failed`] without being evaluated.
    ///
    /// # Errors
    /// As of [`send_step`](Self::send_step).
    pub fn cancel(&self, step: u32) -> Result<(), LinkError> {
        self.send(&Message::Cancel { step })
    }

    /// Host: makes the worker forget a session's rows at `position` and after it. Takes effect among the
    /// steps in order.
    ///
    /// # Errors
    /// As of [`send_step`](Self::send_step).
    pub fn rewind(&self, session: u32, position: u32) -> Result<(), LinkError> {
        self.send(&Message::Rewind { session, position })
    }

    /// Host: makes the worker forget a session.
    ///
    /// # Errors
    /// As of [`send_step`](Self::send_step).
    pub fn end_session(&self, session: u32) -> Result<(), LinkError> {
        self.send(&Message::EndSession { session })
    }

    fn send(&self, message: &Message<'_>) -> Result<(), LinkError> {
        self.line.queue(&[], |state| state.endpoint.send(message))
    }

    /// Either side: the length of a session in the books.
    pub fn session_length(&self, session: u32) -> Option<u32> {
        self.line.state().endpoint.books()?.length(session)
    }

    /// Either side: asks the peer for an answer; [`round_trip_time`](Self::round_trip_time) tells how long it
    /// took. Does nothing while another PING is under way.
    ///
    /// # Errors
    /// The link is lost.
    pub fn ping(&self) -> Result<(), LinkError> {
        self.line.queue(&[], |state| state.endpoint.ping(Instant::now()))
    }

    /// How long the last PING took.
    pub fn round_trip_time(&self) -> Option<Duration> {
        self.line.state().endpoint.round_trip_time()
    }

    /// How the peer's clock goes, as far as PINGs have told.
    pub fn clock_offset(&self) -> Option<ClockOffset> {
        self.line.state().endpoint.clock_offset()
    }

    /// Reports a fault and ends the link. Returns within a second, whether or not the peer could be told.
    pub fn fail(&self, fault: Fault) {
        self.line.say_last(|endpoint| endpoint.fail(fault));
    }

    /// Ends the link in order. Returns within a second, whether or not the peer could be told.
    pub fn goodbye(&self, why: Farewell) {
        self.line.say_last(|endpoint| endpoint.goodbye(why));
    }

    /// Ends the link at once, from any thread: a blocked send or receive returns [`LinkErrorKind::Stopped`].
    pub fn stop(&self) {
        self.line.stop();
    }

    /// Whether the link is known to be lost or stopped: a worker may then leave off computing.
    pub fn is_lost(&self) -> bool {
        self.line.state().endpoint.end().is_some()
    }

    /// What heartbeats say about this side from now on.
    pub fn set_status(&self, status: Status) {
        self.line.state().endpoint.set_status(status);
    }

    /// What the peer's last heartbeat said.
    pub fn peer_status(&self) -> Option<Status> {
        self.line.state().endpoint.peer_status()
    }

    /// Bytes and messages so far.
    pub fn traffic(&self) -> Traffic {
        self.line.state().endpoint.traffic()
    }
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender").field("peer", &self.line.peer).field("label", &self.said.label).finish()
    }
}

/// The half of a link that receives. Dropping it ends the link.
pub struct Receiver {
    line: Arc<Line>,
    said: Arc<Said>,
    current: Current,
    /// of a worker: frees the place of the host that is served, after everything else
    _served: Option<Box<dyn Send>>,
}

impl Receiver {
    /// The next event, waiting for it until `deadline` (for ever without one). Heartbeats and pings are dealt
    /// with inside.
    ///
    /// # Errors
    /// [`LinkErrorKind::Deadline`] leaves the link usable; every other error is its end. If the peer broke a
    /// rule, it has been told.
    pub fn receive(&mut self, deadline: Option<Instant>) -> Result<Event<'_>, LinkError> {
        loop {
            let state = self.line.wait_for_event(deadline)?;
            match self.current.take(&self.line, state)? {
                Taken::Event(arrived) => return self.lend(arrived),
                Taken::Void(step) => self.call_off(step)?,
                Taken::Nothing => return Err(LinkErrorKind::Stopped.with(&self.line.peer)),
            }
        }
    }

    /// The next event if this process has read it already; never blocks. To be used with a bell: without one it finds
    /// only what the link's thread has happened to read ahead.
    ///
    /// # Errors
    /// As of [`receive`](Self::receive), without its deadline.
    pub fn try_receive(&mut self) -> Result<Option<Event<'_>>, LinkError> {
        loop {
            let state = self.line.look_for_event();
            match self.current.take(&self.line, state)? {
                Taken::Event(arrived) => return self.lend(arrived).map(Some),
                Taken::Void(step) => self.call_off(step)?,
                Taken::Nothing => return Ok(None),
            }
        }
    }

    /// Worker: the step that was handed out last could not be evaluated. Its sessions' steps behind it are answered alike
    /// until the host has rewound them; everybody else's go on.
    ///
    /// # Errors
    /// As of [`Sender::send_step`].
    pub fn step_failed(&mut self, fault: Fault) -> Result<(), LinkError> {
        self.current.break_sessions();
        let step = self.current.step;
        self.line.send(&[], |state| state.endpoint.send_step_failed(step, Some(fault)))
    }

    /// Answers a step that need not be evaluated.
    fn call_off(&mut self, step: u32) -> Result<(), LinkError> {
        self.current.break_sessions();
        self.line.send(&[], |state| state.endpoint.send_step_failed(step, None))
    }

    /// The event that was taken.
    fn lend(&self, arrived: Instant) -> Result<Event<'_>, LinkError> {
        let event = self.current.event(&self.said.agreed.shape, arrived);
        event.ok_or_else(|| LinkErrorKind::Stopped.with(&self.line.peer))
    }

    /// From now on the link's own thread reads everything, and rings the bell for every complete message and at the
    /// end of the link; with `None` whoever calls [`receive`](Self::receive) reads again. What is there already is
    /// rung for at once.
    pub fn notify(&mut self, bell: Option<Bell>) {
        self.line.notify(bell);
    }

    /// Why a send failed, if the peer has said so before it closed or was not heard; otherwise `error` as it
    /// is. What else it sent is thrown away: to be called when the link is given up.
    pub fn explain(&mut self, error: LinkError) -> LinkError {
        if !error.kind.is_bare_loss() {
            return error;
        }
        let deadline = Instant::now() + Duration::from_millis(300);
        loop {
            match self.receive(Some(deadline)) {
                Ok(_) => {}
                Err(said) if said.kind.is_bare_loss() => return error,
                Err(LinkError { kind: LinkErrorKind::Deadline { .. }, .. }) => return error,
                Err(said) => return said,
            }
        }
    }

    /// A sender of the same link.
    pub fn sender(&self) -> Sender {
        Sender { line: self.line.clone(), said: self.said.clone() }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.line.leave();
    }
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").field("peer", &self.line.peer).finish_non_exhaustive()
    }
}

/// Takes a connection over on which both sides have agreed. `served` is dropped when the receiver is.
pub(super) fn start(opening: Opening, served: Option<Box<dyn Send>>) -> Result<Link, LinkError> {
    let peer = opening.peer();
    let Opening { stream, endpoint, .. } = opening;
    let (Some(agreed), Some(peer_terms)) = (endpoint.agreed().cloned(), endpoint.peer_terms().cloned())
    else {
        return Err(LinkErrorKind::Stopped.with(&peer));
    };
    let said = Arc::new(Said { agreed, peer_terms, label: endpoint.label().to_owned() });
    let line = Line::start(stream, peer, endpoint)?;
    let sender = Sender { line: line.clone(), said: said.clone() };
    let receiver = Receiver { line, said, current: Current::default(), _served: served };
    Ok(Link { sender, receiver })
}

/// What the last event lends, and what a worker has to remember of steps.
#[derive(Default)]
struct Current {
    store: Store,
    spans: Vec<Span>,
    tokens: Vec<i32>,
    /// worker: the number of the step that came last
    step: u32,
    /// worker: sessions that stand on a step that failed or was called off, and from which position on
    broken: BTreeMap<u32, u32>,
}

impl Current {
    /// The sessions of the step that came last are not where the host's books have them.
    fn break_sessions(&mut self) {
        for span in &self.spans {
            let from = self.broken.entry(span.session).or_insert(span.position);
            *from = span.position.min(*from);
        }
    }

    /// A session that is rewound to what it was before is whole again.
    fn mend(&mut self, session: u32, position: u32) {
        if self.broken.get(&session).is_some_and(|&from| position <= from) {
            self.broken.remove(&session);
        }
    }

    /// Moves the endpoint's next event to where it is lent from.
    fn take(&mut self, line: &Line, mut state: MutexGuard<'_, State>) -> Result<Taken, LinkError> {
        let failed = |state: MutexGuard<'_, State>, kind: LinkErrorKind| {
            drop(state);
            line.wake();
            if matches!(kind, LinkErrorKind::Broke(_)) {
                line.tell_broken_rule();
            }
            Err(kind.with(&line.peer))
        };
        let now = state.owner_left;
        let received = match state.endpoint.poll_event(&mut self.store, now) {
            Ok(Some(received)) => received,
            Ok(None) => return Ok(Taken::Nothing),
            Err(kind) => return failed(state, kind),
        };
        let arrived = received.arrived;
        let void = match received.message {
            Message::Step(step) => {
                self.spans.clear();
                self.spans.extend(step.spans());
                self.tokens.clear();
                self.tokens.extend(step.tokens());
                self.step = step.step;
                if step.rows.len() > MAX_BODY {
                    // a prompt: let its next chunk arrive while this one is computed
                    state.read_ahead = true;
                    line.wake();
                }
                let stands_on_void = self.spans.iter().any(|span| self.broken.contains_key(&span.session));
                (stands_on_void || state.endpoint.is_called_off(self.step)).then_some(self.step)
            }
            Message::Rewind { session, position } => {
                self.mend(session, position);
                None
            }
            Message::EndSession { session } => {
                self.mend(session, 0);
                None
            }
            Message::StepDone(_) | Message::StepFailed(_) => None,
            other => {
                let kind = other.kind() as u8;
                let broke = state.endpoint.misbehaved(Misbehaved::Unexpected { kind });
                return failed(state, broke);
            }
        };
        Ok(void.map_or(Taken::Event(arrived), Taken::Void))
    }

    /// The event that was taken, lent; `None`: there is none.
    fn event(&self, shape: &Shape, arrived: Instant) -> Option<Event<'_>> {
        // it has been read once, with all its rules: this time for what it lends
        Some(match Message::decode(self.store.message(), shape).ok()? {
            Message::Step(s) => Event::Step {
                step: s.step,
                spans: &self.spans,
                tokens: &self.tokens,
                rows: aligned(s.row_type, s.rows),
                arrived,
            },
            Message::StepDone(s) => Event::Done {
                step: s.step,
                rows: aligned(s.row_type, s.rows),
                compute: Duration::from_micros(s.compute_us.into()),
                wait: Duration::from_micros(s.wait_us.into()),
                began_us: s.began_us,
            },
            Message::StepFailed(s) => Event::Failed { step: s.step, fault: s.fault },
            Message::Rewind { session, position } => Event::Rewind { session, position },
            Message::EndSession { session } => Event::EndSession { session },
            _ => return None,
        })
    }
}

/// What a look for the next event came to.
enum Taken {
    /// One is there, and arrived then.
    Event(Instant),
    /// A step that need not be evaluated.
    Void(u32),
    Nothing,
}

/// Rows of a message from an inbox, which lie aligned by its construction.
fn aligned(row_type: RowType, bytes: &[u8]) -> RowsRef<'_> {
    rows::from_bytes(row_type, bytes)
        .expect("an inbox's messages begin at a multiple of 64, their rows at one of 8")
}
