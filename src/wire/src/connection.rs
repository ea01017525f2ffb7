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
//!   with rows;
//! * [`Heartbeats`] and [`Silence`] say when to speak and when to give up, for times the caller passes.

use std::collections::VecDeque;

use super::error::{Malformed, Misbehaved, ReceiveError};
use super::handshake::Purpose;
use super::message::{Kind, MAX_PUSH_DATA, Message, PushOffer, RowFormat, Span};
use super::rows::{Rows, RowsRef};
use super::terms::{Agreed, OPENING_LIMIT};

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
            (State::Serving(books), Role::Worker) => books.agreed.host_limit(),
            (State::Serving(books), Role::Host) => books.agreed.worker_limit(),
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
    pub fn send_step(&mut self, spans: &[Span], rows: &Rows<'_>) -> Result<u32, Misbehaved> {
        let State::Serving(books) = &mut self.state else {
            return Err(Misbehaved::Unexpected { kind: Kind::Step as u8 });
        };
        let step = books.last_step.wrapping_add(1);
        let n_rows = spans.iter().fold(0u32, |n, s| n.saturating_add(s.count));
        books.check_rows(rows, n_rows)?;
        books.step(step, n_rows, format_of(rows), spans.iter().copied())?;
        Ok(step)
    }

    /// Notes a STEP_DONE that this side is about to send.
    ///
    /// # Errors
    /// The rule that this side would break; nothing has changed then.
    pub fn send_step_done(&mut self, step: u32, n_rows: u32, rows: &Rows<'_>) -> Result<(), Misbehaved> {
        let State::Serving(books) = &mut self.state else {
            return Err(Misbehaved::Unexpected { kind: Kind::StepDone as u8 });
        };
        books.check_rows(rows, n_rows)?;
        books.step_done(step, n_rows, format_of(rows))
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

    fn read<'a>(&mut self, bytes: &'a [u8]) -> Result<Message<'a>, ReceiveError> {
        // whether it may come is known from its number: nothing else of a message out of place is looked at
        let kind = Kind::from_u8(*bytes.first().ok_or(Malformed::Truncated { missing: 1 })?)?;
        if !self.allows(self.role.peer(), kind) {
            return Err(Misbehaved::Unexpected { kind: kind as u8 }.into());
        }
        let n_embd = self.books().map_or(0, |b| b.agreed.n_embd);
        let message = Message::decode(bytes, n_embd)?;
        self.note(self.role.peer(), &message)?;
        if let Message::Pong(number) = message
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
            (State::Serving(_), Step | Rewind | EndSession) => from_host,
            (State::Serving(books), Refuse) => from_host && books.untouched,
            (State::Serving(_), StepDone) => !from_host,
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
            (_, Message::Heartbeat(_) | Message::Ping(_) | Message::Pong(_)) => {}
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
                        books.step(s.step, s.n_rows, s.format, s.spans())?;
                        finite(s.format, s.hidden)?;
                    }
                    Message::StepDone(s) => {
                        books.step_done(s.step, s.n_rows, s.format)?;
                        finite(s.format, s.hidden)?;
                    }
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

const PUSH_LIMIT: usize = super::message::HEADER + 8 + MAX_PUSH_DATA;
const _: () = assert!(PUSH_LIMIT == 262_160, "PROTOCOL.md, section 12");

fn format_of(rows: &Rows<'_>) -> RowFormat {
    RowFormat { dtype: rows.values.dtype(), scaled: !rows.exponents.is_empty() }
}

/// Every value received is finite. Bytes that do not lie aligned (only tests have such) are looked at all the
/// same.
fn finite(format: RowFormat, hidden: &[u8]) -> Result<(), Misbehaved> {
    let count = match RowsRef::from_bytes(format.dtype, hidden) {
        Some(rows) => rows.non_finite(),
        None => {
            let mut aligned = vec![0f32; hidden.len().div_ceil(4)];
            let copy: &mut [u8] = bytemuck::cast_slice_mut(&mut aligned);
            copy[..hidden.len()].copy_from_slice(hidden);
            RowsRef::from_bytes(format.dtype, &copy[..hidden.len()])
                .map_or(u32::MAX, |rows| rows.non_finite())
        }
    };
    if count == 0 { Ok(()) } else { Err(Misbehaved::NonFinite { count }) }
}

/// Sessions, positions and steps of a connection. Host and worker keep the same: the host writes when it
/// sends, the worker when it receives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Books {
    agreed: Agreed,
    /// positions accepted, by session
    lengths: Vec<u32>,
    /// the attempt in which a session was last seen, to find one that stands twice in a step
    seen: Vec<u64>,
    attempt: u64,
    last_step: u32,
    /// (step, n_rows), the oldest first
    unanswered: VecDeque<(u32, u32)>,
    /// nothing was said since ACCEPT
    untouched: bool,
}

impl Books {
    /// Every session has length 0, no step was sent.
    pub fn new(agreed: Agreed) -> Books {
        let sessions = agreed.max_sessions as usize;
        Books {
            lengths: vec![0; sessions],
            seen: vec![0; sessions],
            attempt: 0,
            last_step: 0,
            unanswered: VecDeque::with_capacity(agreed.max_in_flight.min(64) as usize),
            untouched: true,
            agreed,
        }
    }

    /// What the books are kept for.
    pub fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    /// The length of a session: where it goes on.
    pub fn length(&self, session: u32) -> Option<u32> {
        self.lengths.get(session as usize).copied()
    }

    /// How many steps have no answer.
    pub fn in_flight(&self) -> usize {
        self.unanswered.len()
    }

    /// The number of the last STEP; 0: none yet.
    pub fn last_step(&self) -> u32 {
        self.last_step
    }

    /// A STEP goes from host to worker. On an error nothing has changed.
    pub fn step(
        &mut self,
        step: u32,
        n_rows: u32,
        format: RowFormat,
        spans: impl ExactSizeIterator<Item = Span> + Clone,
    ) -> Result<(), Misbehaved> {
        let a = &self.agreed;
        let expected = self.last_step.wrapping_add(1);
        if step != expected || expected == 0 {
            return Err(Misbehaved::StepId { step, expected });
        }
        let steps = self.unanswered.len() as u32 + 1;
        if steps > a.max_in_flight {
            return Err(Misbehaved::InFlight { steps, max_in_flight: a.max_in_flight });
        }
        self.check_format(format)?;
        let n_spans = spans.len() as u32;
        if n_spans == 0 || n_spans > a.max_sessions {
            return Err(Misbehaved::SpanCount { spans: n_spans, max_sessions: a.max_sessions });
        }
        if n_rows == 0 || n_rows > a.max_rows {
            return Err(Misbehaved::RowCount { rows: n_rows, expected: a.max_rows });
        }
        self.attempt += 1;
        let mut sum = 0u64;
        for span in spans.clone() {
            if span.count == 0 {
                return Err(Misbehaved::SpanCount { spans: n_spans, max_sessions: a.max_sessions });
            }
            let expected = session(&self.lengths, span.session)?;
            let seen = &mut self.seen[span.session as usize];
            if *seen == self.attempt {
                return Err(Misbehaved::SessionTwice { session: span.session });
            }
            *seen = self.attempt;
            if span.position != expected {
                return Err(Misbehaved::Position {
                    session: span.session,
                    position: span.position,
                    expected,
                });
            }
            let end = u64::from(span.position) + u64::from(span.count);
            if end > u64::from(a.n_ctx) {
                return Err(Misbehaved::Context { session: span.session, end, n_ctx: a.n_ctx });
            }
            sum += u64::from(span.count);
        }
        if sum != u64::from(n_rows) {
            return Err(Misbehaved::RowCount { rows: n_rows, expected: sum.min(u64::from(u32::MAX)) as u32 });
        }

        for span in spans {
            self.lengths[span.session as usize] += span.count;
        }
        self.last_step = step;
        self.unanswered.push_back((step, n_rows));
        self.untouched = false;
        Ok(())
    }

    /// A STEP_DONE goes from worker to host. On an error nothing has changed.
    pub fn step_done(&mut self, step: u32, n_rows: u32, format: RowFormat) -> Result<(), Misbehaved> {
        let (expected, rows) = self.unanswered.front().copied().unwrap_or((0, 0));
        if step != expected || expected == 0 {
            return Err(Misbehaved::StepId { step, expected });
        }
        if n_rows != rows {
            return Err(Misbehaved::RowCount { rows: n_rows, expected: rows });
        }
        self.check_format(format)?;
        self.unanswered.pop_front();
        Ok(())
    }

    /// A REWIND goes from host to worker. On an error nothing has changed.
    pub fn rewind(&mut self, number: u32, position: u32) -> Result<(), Misbehaved> {
        let length = session(&self.lengths, number)?;
        if position > length {
            return Err(Misbehaved::Position { session: number, position, expected: length });
        }
        self.lengths[number as usize] = position;
        Ok(())
    }

    /// An END_SESSION goes from host to worker. On an error nothing has changed.
    pub fn end(&mut self, number: u32) -> Result<(), Misbehaved> {
        session(&self.lengths, number)?;
        self.lengths[number as usize] = 0;
        Ok(())
    }

    /// Rows that are about to be sent: as many as said, and finite.
    fn check_rows(&self, rows: &Rows<'_>, n_rows: u32) -> Result<(), Misbehaved> {
        let expected = u128::from(n_rows) * u128::from(self.agreed.n_embd);
        let exponents = rows.exponents.len();
        if rows.values.len() as u128 != expected || (exponents != 0 && exponents != n_rows as usize) {
            let rows = rows.values.len() / (self.agreed.n_embd as usize).max(1);
            return Err(Misbehaved::RowCount { rows: rows as u32, expected: n_rows });
        }
        match rows.values.non_finite() {
            0 => Ok(()),
            count => Err(Misbehaved::NonFinite { count }),
        }
    }

    fn check_format(&self, format: RowFormat) -> Result<(), Misbehaved> {
        if format.dtype != self.agreed.dtype || (format.scaled && !self.agreed.scaled_rows) {
            return Err(Misbehaved::RowFormat { format: format.to_u8() });
        }
        Ok(())
    }
}

fn session(lengths: &[u32], session: u32) -> Result<u32, Misbehaved> {
    let unknown = Misbehaved::Session { session, max_sessions: lengths.len() as u32 };
    lengths.get(session as usize).copied().ok_or(unknown)
}

/// Which bytes of a push come next.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PushBooks {
    sizes: Vec<u64>,
    have: Vec<u64>,
    item: usize,
}

impl PushBooks {
    fn new(offer: &PushOffer, have: &[u64]) -> Result<PushBooks, Misbehaved> {
        let sizes: Vec<u64> = offer.items.iter().map(|i| i.size).collect();
        if !offer.is_valid() || have.len() != sizes.len() || have.iter().zip(&sizes).any(|(h, s)| h > s) {
            return Err(Misbehaved::PushItems);
        }
        Ok(PushBooks { sizes, have: have.to_vec(), item: 0 })
    }

    fn data(&mut self, item: u16, offset: u64, length: usize) -> Result<(), Misbehaved> {
        while self.item < self.sizes.len() && self.have[self.item] == self.sizes[self.item] {
            self.item += 1;
        }
        let expected = self.have.get(self.item).copied().unwrap_or(u64::MAX);
        let fits = usize::from(item) == self.item
            && offset == expected
            && length as u64 <= self.sizes.get(self.item).map_or(0, |size| size - expected);
        if !fits {
            return Err(Misbehaved::PushOrder { item, offset, expected });
        }
        self.have[self.item] += length as u64;
        Ok(())
    }
}

/// When to send a HEARTBEAT: after half a second in which nothing was sent.
#[derive(Clone, Copy, Debug)]
pub struct Heartbeats {
    last_sent_ms: u64,
}

impl Heartbeats {
    /// After how long without sending anything.
    pub const EVERY_MS: u64 = 500;

    /// Something was just sent.
    pub fn new(now_ms: u64) -> Heartbeats {
        Heartbeats { last_sent_ms: now_ms }
    }

    /// Something was sent.
    pub fn sent(&mut self, now_ms: u64) {
        self.last_sent_ms = now_ms;
    }

    /// In how many milliseconds one is due, if nothing else is sent; 0: now.
    pub fn due_in_ms(&self, now_ms: u64) -> u64 {
        (self.last_sent_ms + Heartbeats::EVERY_MS).saturating_sub(now_ms)
    }
}

/// When to give a peer up: after three seconds of waiting without a byte.
#[derive(Clone, Copy, Debug)]
pub struct Silence {
    since_ms: u64,
    limit_ms: u64,
}

impl Silence {
    /// After how long without a byte.
    pub const LIMIT_MS: u64 = 3000;

    /// Waiting begins.
    pub fn begin(now_ms: u64, limit_ms: u64) -> Silence {
        Silence { since_ms: now_ms, limit_ms }
    }

    /// Bytes came.
    pub fn heard(&mut self, now_ms: u64) {
        self.since_ms = now_ms;
    }

    /// Whether the peer is lost.
    pub fn is_over(&self, now_ms: u64) -> bool {
        now_ms.saturating_sub(self.since_ms) >= self.limit_ms
    }
}
