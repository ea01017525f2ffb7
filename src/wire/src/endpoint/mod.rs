//! One side of a connection from its first byte to its last, without socket, clock or thread.
//!
//! ```text
//!     bytes from the peer -> receive ->  Endpoint  -> poll_transmit -> bytes for the peer
//!                    time -> handle_timeout  |  ^
//!                                 poll_event v  | send_step, accept, goodbye, ...
//!                                      whoever uses the connection
//! ```
//!
//! The shape is quinn-proto's: whoever drives it passes bytes and times in and takes bytes, events and times out, and
//! the same calls give the same results, so tests run on simulated time. Handshake, terms, steps, pushes, heartbeats
//! and goodbyes are all here, and so are the timers. Kinds of methods:
//!
//! * **A connection begins** with [`Endpoint::host`] or [`Endpoint::worker`].
//! * **Bytes in**: [`receive`](Endpoint::receive), or without a copy [`space`](Endpoint::space) and
//!   [`received`](Endpoint::received). A reader that must not hold a lock while it waits takes the inbox itself along:
//!   [`lend_inbox`](Endpoint::lend_inbox), [`file`](Endpoint::file), [`return_inbox`](Endpoint::return_inbox). The
//!   end: [`closed`](Endpoint::closed), [`broken`](Endpoint::broken).
//! * **Bytes out**: [`poll_transmit`](Endpoint::poll_transmit), then [`sent`](Endpoint::sent) as the peer's system takes
//!   them.
//! * **Time**: [`poll_timeout`](Endpoint::poll_timeout) says until when nothing happens by itself,
//!   [`handle_timeout`](Endpoint::handle_timeout) is to be called then.
//! * **What happened**: [`poll_event`](Endpoint::poll_event); [`end`](Endpoint::end) once it is over.
//! * **A worker answers** with [`offer`](Endpoint::offer), [`accept`](Endpoint::accept), [`refuse`](Endpoint::refuse),
//!   [`busy`](Endpoint::busy), [`grant`](Endpoint::grant), [`send_step_done`](Endpoint::send_step_done).
//! * **A host goes on** with [`send_step`](Endpoint::send_step), [`send`](Endpoint::send),
//!   [`send_file`](Endpoint::send_file).
//! * **Both end it** with [`fail`](Endpoint::fail) or [`goodbye`](Endpoint::goodbye).

mod opening;
mod outbox;
mod reading;
mod serving;
mod timers;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use dim_core::stage::Traffic;

use crate::books::Books;
use crate::connection::{Connection, Role};
use crate::error::{FrameError, HandshakeError, Misbehaved, ReceiveError};
use crate::fault::Fault;
use crate::frame::{Inbox, Store};
use crate::handshake::{Lookup, Named, Purpose};
use crate::keys::{Key, KeyId};
use crate::link_error::{Awaited, LinkErrorKind};
use crate::message::{Kind, Message, PushOffer, Status};
use crate::terms::{Agreed, Terms};
use opening::Handshake;
use outbox::Outbox;
use timers::{Timer, Timers};

pub use opening::Ask;
pub use serving::{ClockOffset, ComputeTime};
pub use timers::{HEARTBEAT_EVERY, Timing};

/// How a worker finds the key that a host names.
pub type LookUp = Box<dyn FnMut(&Named) -> Lookup + Send>;

/// A message for whoever uses the connection, with the time of its last byte.
#[derive(Debug)]
pub struct Received<'a> {
    /// What the peer said, checked against the state and the books.
    pub message: Message<'a>,
    /// When its last byte was read.
    pub arrived: Instant,
}

/// What became of a complete message: see [`Endpoint::file`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filed {
    /// It was the connection's own business: a heartbeat, a ping, a pong.
    Own,
    /// It waits for [`Endpoint::poll_event`].
    Event,
    /// The connection is over: see [`Endpoint::end`].
    Over,
}

/// One side of a connection. See the [module](self).
pub struct Endpoint {
    role: Role,
    timing: Timing,
    begun: Instant,
    timers: Timers,
    /// how long nothing was heard before the inbox was lent, of the times in which it was
    quiet: Duration,
    /// until the keys are there
    handshake: Option<Handshake>,
    label: String,
    version: u16,
    key_id: KeyId,
    connection: Connection,
    /// none: not there yet, or lent
    inbox: Option<Inbox>,
    /// complete messages, the oldest first, with the time of their last byte
    ready: VecDeque<(Store, Instant)>,
    /// memory of messages that have been used
    spare: Vec<Store>,
    outbox: Outbox,
    /// taken by poll_transmit, not yet by the peer's system
    untaken: usize,
    /// host: what the handshake is followed by, then what it needs of the worker
    ask: Option<Ask>,
    hello: Option<Terms>,
    push: Option<PushOffer>,
    preparing_ends: Option<Instant>,
    /// since when a step or a file may be sent
    agreed: Option<Agreed>,
    peer_terms: Option<Terms>,
    /// why it is over
    end: Option<LinkErrorKind>,
    /// ERROR, GOODBYE, REFUSE or BUSY has been said
    said_last: bool,
    traffic: Traffic,
    last_sent: Instant,
    own_status: Status,
    peer_status: Option<Status>,
    /// the number of a PING that we owe a PONG, and our clock when it came
    pong: Option<(u64, u64)>,
    /// when our PING left
    pinged: Option<Instant>,
    round_trip_time: Option<Duration>,
    clock_offset: Option<ClockOffset>,
    /// worker: steps that were called off and not answered yet
    called_off: Vec<u32>,
}

impl Endpoint {
    /// A host's side: waits for the worker's greeting, then the handshake under `key`, and then `ask`. All times count
    /// from `now`.
    pub fn host(key: &Key, ask: Ask, timing: &Timing, now: Instant) -> Endpoint {
        let purpose = ask.purpose();
        let mut endpoint = Endpoint::new(Role::Host, purpose, Handshake::host(key, purpose), timing, now);
        endpoint.ask = Some(ask);
        endpoint.timers.set(Timer::Opening, now + timing.opening);
        endpoint
    }

    /// A worker's side, which greets whoever has just connected. All times count from `now`.
    ///
    /// # Errors
    /// [`HandshakeError::Crypto`] if the system has no random numbers.
    pub fn worker(look_up: LookUp, timing: &Timing, now: Instant) -> Result<Endpoint, HandshakeError> {
        let (handshake, greeting) = Handshake::worker(look_up)?;
        let mut endpoint = Endpoint::new(Role::Worker, Purpose::Key, handshake, timing, now);
        endpoint.outbox.push_bytes(&greeting);
        endpoint.timers.set(Timer::Opening, now + timing.stranger);
        Ok(endpoint)
    }

    fn new(role: Role, purpose: Purpose, handshake: Handshake, timing: &Timing, now: Instant) -> Endpoint {
        Endpoint {
            role,
            timing: timing.clone(),
            begun: now,
            timers: Timers::default(),
            quiet: Duration::ZERO,
            handshake: Some(handshake),
            label: String::new(),
            version: 0,
            key_id: KeyId([0; 8]),
            connection: Connection::new(role, purpose),
            inbox: None,
            ready: VecDeque::new(),
            spare: Vec::new(),
            outbox: Outbox::default(),
            untaken: 0,
            ask: None,
            hello: None,
            push: None,
            preparing_ends: None,
            agreed: None,
            peer_terms: None,
            end: None,
            said_last: false,
            traffic: Traffic::default(),
            last_sent: now,
            own_status: Status::default(),
            peer_status: None,
            pong: None,
            pinged: None,
            round_trip_time: None,
            clock_offset: None,
            called_off: Vec::new(),
        }
    }

    // --- bytes in

    /// Room for bytes from the peer, where they will be read; how many of it were filled is told to
    /// [`received`](Self::received). Empty while the inbox is lent, while an event of the opening waits, or at the end.
    pub fn space(&mut self) -> &mut [u8] {
        match (&mut self.handshake, &mut self.inbox) {
            _ if self.end.is_some() => &mut [],
            (Some(handshake), _) => handshake.space(),
            (None, Some(inbox)) => inbox.space(),
            (None, None) => &mut [],
        }
    }

    /// The first `n` bytes of [`space`](Self::space) hold bytes from the peer.
    pub fn received(&mut self, n: usize, now: Instant) {
        self.heard(n, now);
        match &mut self.handshake {
            Some(_) => self.handshake_received(n, now),
            None => {
                if let Some(inbox) = &mut self.inbox {
                    inbox.filled(n);
                }
                self.pump(now);
            }
        }
    }

    /// Takes bytes from the peer; how many of them. Less than all of them: an event has to be polled first, or it is
    /// over.
    pub fn receive(&mut self, bytes: &[u8], now: Instant) -> usize {
        let mut taken = 0;
        while taken < bytes.len() {
            let space = self.space();
            let n = space.len().min(bytes.len() - taken);
            if n == 0 {
                break;
            }
            space[..n].copy_from_slice(&bytes[taken..taken + n]);
            taken += n;
            self.received(n, now);
        }
        taken
    }

    /// Deals with what [`Inbox::poll`] found in the inbox: a complete message, which is taken out of it, or an error.
    pub fn file(&mut self, inbox: &mut Inbox, found: Result<(), FrameError>, now: Instant) -> Filed {
        if let Err(error) = found {
            self.broke(error.into());
            return Filed::Over;
        }
        if self.said_last || self.end.is_some() {
            // what the peer says to somebody who has left
            inbox.release();
            return if self.end.is_some() { Filed::Over } else { Filed::Own };
        }
        let kind = inbox.message().first().copied().unwrap_or(0);
        // the connection's own business; a step is called off before its turn comes
        let own = [Kind::Heartbeat as u8, Kind::Ping as u8, Kind::Pong as u8, Kind::Cancel as u8];
        if own.contains(&kind) {
            let received = self.connection.receive(inbox.message());
            let filed = match received {
                Ok(message) => {
                    // none of the four borrows
                    match message {
                        Message::Heartbeat(status) => self.heartbeat_came(status, now),
                        Message::Ping(number) => self.pong = Some((number, self.clock_us(now))),
                        Message::Pong { clock_us, .. } => self.pong_came(clock_us, now),
                        Message::Cancel { step } => self.call_off(step),
                        _ => {}
                    }
                    Filed::Own
                }
                Err(error) => {
                    self.broke(error);
                    Filed::Over
                }
            };
            inbox.release();
            return filed;
        }
        let mut store = self.spare.pop().unwrap_or_default();
        inbox.take(&mut store);
        self.ready.push_back((store, now));
        Filed::Event
    }

    /// Opens what has arrived. Before anything is agreed on, one message at a time: what the next may be depends on it.
    fn pump(&mut self, now: Instant) {
        let Some(mut inbox) = self.inbox.take() else { return };
        while self.end.is_none() && (self.is_established() || self.ready.is_empty()) {
            let found = match inbox.poll() {
                Ok(false) => break,
                Ok(true) => Ok(()),
                Err(error) => Err(error),
            };
            if self.file(&mut inbox, found, now) == Filed::Over {
                break;
            }
        }
        self.inbox = Some(inbox);
    }

    /// The peer has closed.
    pub fn closed(&mut self) {
        self.finish(LinkErrorKind::Closed);
    }

    /// The connection broke, or this side's user broke it off.
    pub fn broken(&mut self, why: LinkErrorKind) {
        self.finish(why);
    }

    // --- bytes out

    /// Appends what is to be sent next to `out`; `false`: nothing now. `payload` are the rows of the message that
    /// [`send_step`](Self::send_step) or [`send_step_done`](Self::send_step_done) began, or the bytes of
    /// [`send_file`](Self::send_file): they are not copied before they are sealed, so they are passed until it returns
    /// `false`. One frame of such a message is given at a time.
    pub fn poll_transmit(&mut self, payload: &[u8], out: &mut Vec<u8>, now: Instant) -> bool {
        if self.end.is_some() && self.outbox.is_halfway() {
            return false;
        }
        if !self.outbox.is_halfway() && self.is_established() && self.end.is_none() && !self.said_last {
            self.say_what_is_due(now);
        }
        let before = out.len();
        match self.outbox.take(payload, out) {
            Ok(false) => return false,
            Ok(true) => {}
            Err(error) => {
                self.finish(LinkErrorKind::Broken { text: error.to_string() });
                return false;
            }
        }
        self.untaken += out.len() - before;
        if self.timers.at(Timer::StalledWrite).is_none() {
            self.timers.set(Timer::StalledWrite, now + self.timing.stalled_write);
        }
        self.spoke(now);
        true
    }

    /// The peer's system has taken `n` of the bytes that were to be sent; 0: it has just been tried in vain.
    pub fn sent(&mut self, n: usize, now: Instant) {
        if n > 0 {
            self.traffic.bytes_sent += n as u64;
            self.untaken = self.untaken.saturating_sub(n);
            self.timers.set(Timer::StalledWrite, now + self.timing.stalled_write);
            self.spoke(now);
        }
        if self.untaken == 0 {
            self.timers.clear(Timer::StalledWrite);
        } else if self.timers.is_due(Timer::StalledWrite, now) {
            self.finish(LinkErrorKind::Stalled { ms: millis(self.timing.stalled_write) });
        }
    }

    /// Something is left to be sent.
    pub fn is_sending(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// A message with a payload has begun and has not been taken whole.
    pub fn is_halfway(&self) -> bool {
        self.outbox.is_halfway()
    }

    fn spoke(&mut self, now: Instant) {
        self.last_sent = now;
        if self.is_established() && self.end.is_none() {
            self.timers.set(Timer::Heartbeat, now + HEARTBEAT_EVERY);
        }
    }

    // --- time

    /// When [`handle_timeout`](Self::handle_timeout) is to be called, if nothing else happens before.
    pub fn poll_timeout(&self) -> Option<Instant> {
        // nothing can be said behind what nobody takes
        let is_free = !self.outbox.is_halfway() && self.untaken == 0;
        let heartbeat = self.timers.at(Timer::Heartbeat).filter(|_| is_free);
        [Timer::Opening, Timer::Silence, Timer::StalledWrite]
            .into_iter()
            .filter_map(|timer| self.timers.at(timer))
            .chain(heartbeat)
            .min()
    }

    /// Time has passed. To be called only when everything that had arrived by `now` has been received: what lies in the
    /// system's buffers counts as heard.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.end.is_some() {
            return;
        }
        if let Some(at) = self.timers.at(Timer::Opening)
            && at <= now
        {
            let ms = millis(at.saturating_duration_since(self.begun));
            self.finish(LinkErrorKind::Deadline { awaited: self.awaited(), ms });
        } else if self.timers.is_due(Timer::Silence, now) {
            self.finish(LinkErrorKind::Silent { ms: millis(self.timing.silence) });
        } else if self.timers.is_due(Timer::StalledWrite, now) {
            self.finish(LinkErrorKind::Stalled { ms: millis(self.timing.stalled_write) });
        }
        // a heartbeat that is due is said by poll_transmit
    }

    fn awaited(&self) -> Awaited {
        match (self.handshake.is_some(), self.role, self.connection.purpose()) {
            (true, ..) => Awaited::Handshake,
            (_, Role::Host, Some(Purpose::Pairing)) => Awaited::Key,
            (_, Role::Host, _) => Awaited::Answer,
            (_, Role::Worker, Some(Purpose::Pairing)) if self.connection.has_granted() => Awaited::Stored,
            (_, Role::Worker, Some(Purpose::Pairing)) => Awaited::Name,
            (_, Role::Worker, _) => Awaited::Need,
        }
    }

    // --- what happened

    /// Whether [`poll_event`](Self::poll_event) has something: an event or the end.
    pub fn has_event(&self) -> bool {
        !self.ready.is_empty() || self.end.is_some()
    }

    /// How many events wait.
    pub fn events(&self) -> usize {
        self.ready.len()
    }

    /// The next event, whose bytes are moved to `current` and lent from there. What has arrived before the end comes
    /// before it.
    ///
    /// # Errors
    /// Why the connection is over.
    pub fn poll_event<'a>(
        &mut self,
        current: &'a mut Store,
        now: Instant,
    ) -> Result<Option<Received<'a>>, LinkErrorKind> {
        let Some((store, arrived)) = self.ready.pop_front() else {
            return match &self.end {
                Some(end) => Err(end.clone()),
                None => Ok(None),
            };
        };
        self.spare.push(std::mem::replace(current, store));
        let received = match self.connection.receive(current.message()) {
            Ok(message) => self.understood(message, now),
            Err(error) => Err(self.broke(error)),
        };
        if received.is_ok() {
            // the next message waited for this one
            self.pump(now);
        }
        received.map(|message| Some(Received { message, arrived }))
    }

    /// Why the connection is over, if it is. Events that arrived before can still be polled.
    pub fn end(&self) -> Option<&LinkErrorKind> {
        self.end.as_ref()
    }

    /// The peer broke a rule that only this side's user could see: as if the endpoint had.
    pub fn misbehaved(&mut self, rule: Misbehaved) -> LinkErrorKind {
        self.connection.close();
        self.broke(rule.into())
    }

    /// The peer broke a rule: it is told, if it is to be, and the connection is over.
    fn broke(&mut self, error: ReceiveError) -> LinkErrorKind {
        if let Some(code) = error.code()
            && !self.said_last
            && !self.outbox.is_halfway()
        {
            let fault = Fault::new(code, format!("{error} ({})", error.rule()));
            self.outbox.push(&Message::Error(fault));
        }
        self.said_last = true;
        self.finish(LinkErrorKind::Broke(error))
    }

    /// Remembers why it is over; the first reason stays, unless it is a bare loss: what the peer said before it closed
    /// is understood later and says more.
    fn finish(&mut self, why: LinkErrorKind) -> LinkErrorKind {
        self.timers.clear_all();
        match &mut self.end {
            Some(end) if end.is_bare_loss() && !why.is_bare_loss() && why != LinkErrorKind::Stopped => {
                *end = why
            }
            Some(_) => {}
            none => *none = Some(why),
        }
        self.end.clone().unwrap_or(LinkErrorKind::Stopped)
    }

    // --- what is known

    /// What was agreed on, once it was.
    pub fn agreed(&self) -> Option<&Agreed> {
        self.agreed.as_ref()
    }

    /// What the peer said it is, holds or needs.
    pub fn peer_terms(&self) -> Option<&Terms> {
        self.peer_terms.as_ref()
    }

    /// The version of the protocol; 0 before the handshake has ended.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// This connection's name in the logs of both sides; empty before the handshake has ended.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The id of the key; zeros when pairing, and before the handshake has ended.
    pub fn key_id(&self) -> KeyId {
        self.key_id
    }

    /// Whether the handshake has ended: the peer has the key.
    pub fn is_authenticated(&self) -> bool {
        self.handshake.is_none()
    }

    /// The sessions' books, while serving.
    pub fn books(&self) -> Option<&Books> {
        self.connection.books()
    }

    /// Bytes and messages so far.
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// What heartbeats say about this side from now on.
    pub fn set_status(&mut self, status: Status) {
        self.own_status = status;
    }

    /// What the peer's last heartbeat said.
    pub fn peer_status(&self) -> Option<Status> {
        self.peer_status
    }

    /// How long the last PING took.
    pub fn round_trip_time(&self) -> Option<Duration> {
        self.round_trip_time
    }

    /// How the peer's clock goes, by the quickest PING so far.
    pub fn clock_offset(&self) -> Option<ClockOffset> {
        self.clock_offset
    }

    /// A time on this side's clock.
    pub fn clock_us(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.begun).as_micros()).unwrap_or(u64::MAX)
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint")
            .field("role", &self.role)
            .field("label", &self.label)
            .field("connection", &self.connection)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
