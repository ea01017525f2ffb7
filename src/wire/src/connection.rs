//! What may be said when, and the books that both sides keep alike.
//!
//! A [`Connection`] is one side's view of a connection after the handshake (PROTOCOL.md, section 10). It is
//! told of every message that this side sends and given every message that arrives; it refuses what the state
//! does not allow, and what the [`Books`] of sessions, positions and steps do not allow. It holds no bytes
//! and no time.
//!
//! Kinds of methods, in the order in which they are called:
//!
//! * [`receive`](Connection::receive) reads a peer's message and [`send`](Connection::send) notes one of
//!   ours;
//! * [`begin_serving`](Connection::begin_serving) / [`begin_push`](Connection::begin_push) after both have
//!   agreed;
//! * [`send_step`](Connection::send_step), [`send_step_done`](Connection::send_step_done) for the messages
//!   with rows.

use dim_core::rows::{RowType, RowsRef};
use dim_core::stage::Span;

pub use crate::books::Books;

use crate::books::{Format, PushBooks};
use crate::error::{Malformed, Misbehaved, ReceiveError};
use crate::handshake::Purpose;
use crate::layout::{OPENING_LIMIT, PUSH_LIMIT};
use crate::message::{Kind, Message, PushOffer};
use crate::rows::{self, Layout, Shape};
use crate::terms::Agreed;

/// Which side of a connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Dials, drives the pipeline.
    Host,
    /// Listens, serves a stage.
    Worker,
}

impl Role {
    /// The other side.
    pub fn peer(self) -> Role {
        match self {
            Role::Host => Role::Worker,
            Role::Worker => Role::Host,
        }
    }
}

/// How often a worker answers INQUIRE on one connection.
pub const MAX_INQUIRIES: u32 = 4;

#[derive(Debug)]
enum State {
    /// The host has asked `asked` and has no answer yet.
    Opening {
        asked: Option<Kind>,
        inquiries: u32,
    },
    /// The host has asked, then been granted, a key.
    Pairing {
        last: Option<Kind>,
    },
    Serving(Books),
    Pushing(PushBooks),
    Closed,
}

/// One side of a connection.
#[derive(Debug)]
pub struct Connection {
    role: Role,
    state: State,
    /// the number of our PING that has no PONG yet
    ping: Option<u64>,
}

impl Connection {
    /// A connection whose handshake has just ended.
    pub fn new(role: Role, purpose: Purpose) -> Connection {
        let state = match purpose {
            Purpose::Key => State::Opening { asked: None, inquiries: 0 },
            Purpose::Pairing => State::Pairing { last: None },
        };
        Connection { role, state, ping: None }
    }

    /// The longest message that may arrive now.
    pub fn limit(&self) -> usize {
        match (&self.state, self.role) {
            (State::Serving(books), Role::Worker) => books.agreed().host_limit(),
            (State::Serving(books), Role::Host) => books.agreed().worker_limit(),
            (State::Pushing(_), Role::Worker) => PUSH_LIMIT,
            _ => OPENING_LIMIT,
        }
    }

    /// Reads a message from the peer. After an error the connection is closed.
    ///
    /// # Errors
    /// The rule that the peer broke.
    pub fn receive<'a>(&mut self, bytes: &'a [u8]) -> Result<Message<'a>, ReceiveError> {
        let read = self.read(bytes);
        if read.is_err() {
            self.state = State::Closed;
        }
        read
    }

    /// Notes a message that this side is about to send; all but STEP and STEP_DONE.
    ///
    /// # Errors
    /// The rule that this side would break; nothing has changed then.
    pub fn send(&mut self, message: &Message<'_>) -> Result<(), Misbehaved> {
        if matches!(message, Message::Step(_) | Message::StepDone(_)) {
            return Err(Misbehaved::Unexpected { kind: message.kind() as u8 });
        }
        self.note(self.role, message)?;
        if let Message::Ping(number) = message {
            self.ping = Some(*number);
        }
        Ok(())
    }

    /// Notes a STEP that this side is about to send; its number.
    ///
    /// # Errors
    /// The rule that this side would break; nothing has changed then.
    pub fn send_step(
        &mut self,
        spans: &[Span],
        tokens: &[i32],
        rows: RowsRef<'_>,
    ) -> Result<u32, Misbehaved> {
        let State::Serving(books) = &mut self.state else {
            return Err(Misbehaved::Unexpected { kind: Kind::Step as u8 });
        };
        let step = books.last_step().wrapping_add(1);
        let n_rows = spans.iter().fold(0u32, |n, s| n.saturating_add(s.count));
        books.check_input(tokens, rows, n_rows)?;
        books.step(step, n_rows, rows.row_type().into(), spans.iter().copied())?;
        Ok(step)
    }

    /// Notes a STEP_DONE that this side is about to send.
    ///
    /// # Errors
    /// The rule that this side would break; nothing has changed then.
    pub fn send_step_done(&mut self, step: u32, n_rows: u32, rows: RowsRef<'_>) -> Result<(), Misbehaved> {
        let State::Serving(books) = &mut self.state else {
            return Err(Misbehaved::Unexpected { kind: Kind::StepDone as u8 });
        };
        books.check_output(rows, n_rows)?;
        books.step_done(step, n_rows, rows.row_type())
    }

    /// Both sides have agreed: STEPs may follow. The worker calls it when it sends ACCEPT, the host when it
    /// has compared the ACCEPT.
    pub fn begin_serving(&mut self, agreed: Agreed) {
        self.state = State::Serving(Books::new(agreed));
    }

    /// The worker takes the files that it lacks: PUSH_DATA may follow. `have` is what PUSH_NEED says.
    ///
    /// # Errors
    /// [`Misbehaved::PushItems`] if `have` does not fit the offer.
    pub fn begin_push(&mut self, offer: &PushOffer, have: &[u64]) -> Result<(), Misbehaved> {
        self.state = State::Pushing(PushBooks::new(offer, have)?);
        Ok(())
    }

    /// Nothing more may be sent or received.
    pub fn close(&mut self) {
        self.state = State::Closed;
    }

    /// The sessions' books, while serving.
    pub fn books(&self) -> Option<&Books> {
        match &self.state {
            State::Serving(books) => Some(books),
            _ => None,
        }
    }

    /// Whether this side has a PING without its PONG.
    pub fn is_pinging(&self) -> bool {
        self.ping.is_some()
    }

    /// Steps or files go.
    pub fn is_established(&self) -> bool {
        matches!(self.state, State::Serving(_) | State::Pushing(_))
    }

    /// What the key of the handshake was, until both sides have agreed.
    pub fn purpose(&self) -> Option<Purpose> {
        match self.state {
            State::Opening { .. } => Some(Purpose::Key),
            State::Pairing { .. } => Some(Purpose::Pairing),
            _ => None,
        }
    }

    /// In pairing: the key has been handed over.
    pub fn has_granted(&self) -> bool {
        matches!(self.state, State::Pairing { last: Some(Kind::PairGrant) })
    }

    fn read<'a>(&mut self, bytes: &'a [u8]) -> Result<Message<'a>, ReceiveError> {
        // whether it may come is known from its number: nothing else of a message out of place is looked at
        let kind = Kind::from_u8(*bytes.first().ok_or(Malformed::Truncated { missing: 1 })?)?;
        if !self.allows(self.role.peer(), kind) {
            return Err(Misbehaved::Unexpected { kind: kind as u8 }.into());
        }
        let unknown = Shape::default();
        let message = Message::decode(bytes, self.books().map_or(&unknown, |b| &b.agreed().shape))?;
        self.note(self.role.peer(), &message)?;
        if let Message::Pong { number, .. } = message
            && self.ping == Some(number)
        {
            self.ping = None;
        }
        Ok(message)
    }

    /// The table of PROTOCOL.md, section 10.
    fn allows(&self, sender: Role, kind: Kind) -> bool {
        use Kind::*;
        let from_host = sender == Role::Host;
        match (&self.state, kind) {
            (State::Closed, _) => false,
            (_, Error | Goodbye) => true,
            (State::Opening { asked: None, inquiries }, Inquire) => from_host && *inquiries < MAX_INQUIRIES,
            (State::Opening { asked: None, .. }, Hello | PushOffer) => from_host,
            (State::Opening { asked: Some(Inquire), .. }, Offer) => !from_host,
            (State::Opening { asked: Some(Hello), .. }, Accept | Refuse | Busy) => !from_host,
            (State::Opening { asked: Some(PushOffer), .. }, PushNeed | Refuse | Busy) => !from_host,
            // the host has read the ACCEPT and does not agree
            (State::Opening { asked: Some(Accept), .. }, Refuse) => from_host,
            (State::Opening { .. } | State::Pairing { .. }, Heartbeat) => !from_host,
            (State::Pairing { last: None }, PairRequest) => from_host,
            (State::Pairing { last: Some(PairRequest) }, PairGrant) => !from_host,
            (State::Pairing { last: Some(PairGrant) }, PairStored) => from_host,
            (State::Serving(_), Step | Rewind | EndSession | Cancel) => from_host,
            (State::Serving(books), Refuse) => from_host && books.untouched,
            (State::Serving(_), StepDone | StepFailed) => !from_host,
            (State::Pushing(_), PushData) => from_host,
            (State::Pushing(_), PushStored | PushResult) => !from_host,
            (State::Serving(_) | State::Pushing(_), Heartbeat | Ping | Pong) => true,
            _ => false,
        }
    }

    /// What a message that is allowed changes.
    fn note(&mut self, sender: Role, message: &Message<'_>) -> Result<(), Misbehaved> {
        let kind = message.kind();
        if !self.allows(sender, kind) {
            return Err(Misbehaved::Unexpected { kind: kind as u8 });
        }
        match (&mut self.state, message) {
            (_, Message::Error(_) | Message::Goodbye(_) | Message::Refuse { .. } | Message::Busy { .. }) => {
                self.state = State::Closed;
            }
            (_, Message::PairStored) => self.state = State::Closed,
            (_, Message::Heartbeat(_) | Message::Ping(_) | Message::Pong { .. }) => {}
            (State::Opening { asked, inquiries }, message) => {
                match message {
                    Message::Inquire => *inquiries += 1,
                    Message::PushOffer(offer) if !offer.is_valid() => return Err(Misbehaved::PushItems),
                    _ => {}
                }
                *asked = if kind == Kind::Offer { None } else { Some(kind) };
            }
            (State::Pairing { last }, _) => *last = Some(kind),
            (State::Serving(books), message) => {
                match message {
                    Message::Step(s) => {
                        let format = Format { row_type: s.row_type, is_exact: s.is_exact };
                        books.step(s.step, s.n_rows, format, s.spans())?;
                        finite(&books.agreed().shape.input, s.row_type, s.rows)?;
                    }
                    Message::StepDone(s) => {
                        books.step_done(s.step, s.n_rows, s.row_type)?;
                        finite(&books.agreed().shape.output, s.row_type, s.rows)?;
                    }
                    Message::StepFailed(s) => books.step_failed(s.step)?,
                    Message::Rewind { session, position } => books.rewind(*session, *position)?,
                    Message::EndSession { session } => books.end(*session)?,
                    _ => {}
                }
                books.untouched = false;
            }
            (State::Pushing(books), Message::PushData { item, offset, bytes }) => {
                books.data(*item, *offset, bytes.len())?;
            }
            (State::Pushing(_) | State::Closed, _) => {}
        }
        Ok(())
    }
}

/// Every value received is finite. Bytes that do not lie aligned (only tests have such) are looked at all the
/// same.
fn finite(layout: &Layout, row_type: RowType, bytes: &[u8]) -> Result<(), Misbehaved> {
    let non_finite = |values| rows::non_finite(layout, values);
    let count = match rows::from_bytes(row_type, bytes) {
        Some(values) => non_finite(values),
        None => {
            let mut aligned = vec![0f32; bytes.len().div_ceil(4)];
            let copy: &mut [u8] = bytemuck::cast_slice_mut(&mut aligned);
            copy[..bytes.len()].copy_from_slice(bytes);
            rows::from_bytes(row_type, &copy[..bytes.len()]).map_or(u32::MAX, non_finite)
        }
    };
    if count == 0 { Ok(()) } else { Err(Misbehaved::NonFinite { count }) }
}
