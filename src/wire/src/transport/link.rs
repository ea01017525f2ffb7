//! A link: a connection on which host and worker have agreed. Its two halves, [`Sender`] and [`Receiver`], may be used
//! from two threads; how threads and socket go together is told in `line.rs`, what is said when in [`crate::endpoint`].

use std::net::SocketAddr;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use dim_core::bell::Bell;
use dim_core::rows::{RowType, RowsRef};
use dim_core::stage::Span;

use super::LinkError;
use super::line::{Line, State};
use super::opening::Opening;
use crate::endpoint::{Counters, Received};
use crate::error::Misbehaved;
use crate::fault::{Farewell, Fault};
use crate::frame::{MAX_BODY, Store};
use crate::link_error::LinkErrorKind;
use crate::message::{Message, Status};
use crate::rows;
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
    pub fn send_step(&self, spans: &[Span], rows: RowsRef<'_>) -> Result<u32, LinkError> {
        self.sender.send_step(spans, rows)
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
        /// `(n_rows, n_embd)`, every value finite.
        rows: RowsRef<'a>,
        /// When its last byte was read.
        arrived: Instant,
    },
    /// To a host: the rows of the oldest step without an answer.
    Done {
        /// The step.
        step: u32,
        /// `(n_rows, n_embd)`, every value finite.
        rows: RowsRef<'a>,
        /// How long the worker computed.
        compute: Duration,
        /// How long the complete step lay at the worker before.
        wait: Duration,
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

    /// Host: sends rows to be evaluated; the step's number. `spans` say whose rows they are, in order.
    ///
    /// # Errors
    /// [`LinkErrorKind::Misuse`] if the rows do not fit the agreement or the sessions, or are not finite: nothing
    /// was sent. Otherwise the link is lost.
    pub fn send_step(&self, spans: &[Span], rows: RowsRef<'_>) -> Result<u32, LinkError> {
        let payload = rows::as_bytes(rows);
        self.line.send(payload, |state| {
            let step = state.endpoint.send_step(spans, rows)?;
            if payload.len() > MAX_BODY && state.endpoint.books().is_some_and(|b| b.in_flight() > 1) {
                // the answer to an earlier step may come while this one is being written
                state.read_ahead = true;
            }
            Ok(step)
        })
    }

    /// Worker: answers the oldest step without an answer.
    ///
    /// # Errors
    /// As of [`send_step`](Self::send_step).
    pub fn send_done(
        &self,
        step: u32,
        n_rows: u32,
        rows: RowsRef<'_>,
        compute: Duration,
        wait: Duration,
    ) -> Result<(), LinkError> {
        let begin = |state: &mut State| state.endpoint.send_step_done(step, n_rows, rows, compute, wait);
        self.line.send(rows::as_bytes(rows), begin)
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
        self.line.send(&[], |state| state.endpoint.send(message))
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
        self.line.send(&[], |state| state.endpoint.ping(Instant::now()))
    }

    /// How long the last PING took.
    pub fn round_trip_time(&self) -> Option<Duration> {
        self.line.state().endpoint.round_trip_time()
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
    pub fn counters(&self) -> Counters {
        self.line.state().endpoint.counters()
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
    /// the message that the last event lends
    current: Store,
    spans: Vec<Span>,
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
        let state = self.line.wait_for_event(deadline)?;
        let event = next(&self.line, state, &mut self.current, &mut self.spans)?;
        event.ok_or_else(|| LinkErrorKind::Stopped.with(&self.line.peer))
    }

    /// The next event if this process has read it already; never blocks. To be used with a bell: without one it finds
    /// only what the link's thread has happened to read ahead.
    ///
    /// # Errors
    /// As of [`receive`](Self::receive), without its deadline.
    pub fn try_receive(&mut self) -> Result<Option<Event<'_>>, LinkError> {
        next(&self.line, self.line.look_for_event(), &mut self.current, &mut self.spans)
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
    let receiver = Receiver { line, said, current: Store::default(), spans: Vec::new(), _served: served };
    Ok(Link { sender, receiver })
}

/// The endpoint's next event as the link's, lent from `current` and `spans`.
fn next<'a>(
    line: &Line,
    mut state: MutexGuard<'_, State>,
    current: &'a mut Store,
    spans: &'a mut Vec<Span>,
) -> Result<Option<Event<'a>>, LinkError> {
    let failed = |state: MutexGuard<'_, State>, kind: LinkErrorKind| {
        drop(state);
        line.wake();
        if matches!(kind, LinkErrorKind::Broke(_)) {
            line.tell_broken_rule();
        }
        Err(kind.with(&line.peer))
    };
    let now = state.owner_left;
    let Received { message, arrived } = match state.endpoint.poll_event(current, now) {
        Ok(Some(received)) => received,
        Ok(None) => return Ok(None),
        Err(kind) => return failed(state, kind),
    };
    Ok(Some(match message {
        Message::Step(s) => {
            spans.clear();
            spans.extend(s.spans());
            if s.hidden.len() > MAX_BODY {
                // a prompt: let its next chunk arrive while this one is computed
                state.read_ahead = true;
                line.wake();
            }
            Event::Step { step: s.step, spans, rows: aligned(s.row_type, s.hidden), arrived }
        }
        Message::StepDone(s) => Event::Done {
            step: s.step,
            rows: aligned(s.row_type, s.hidden),
            compute: Duration::from_micros(s.compute_us.into()),
            wait: Duration::from_micros(s.wait_us.into()),
        },
        Message::Rewind { session, position } => Event::Rewind { session, position },
        Message::EndSession { session } => Event::EndSession { session },
        other => {
            let kind = other.kind() as u8;
            let broke = state.endpoint.misbehaved(Misbehaved::Unexpected { kind });
            return failed(state, broke);
        }
    }))
}

/// Rows of a message from an inbox, which lie aligned by its construction.
fn aligned(row_type: RowType, hidden: &[u8]) -> RowsRef<'_> {
    rows::from_bytes(row_type, hidden)
        .expect("an inbox's messages begin at a multiple of 64, their rows at one of 8")
}
