//! A link: a connection on which host and worker have agreed, shared by the threads that use it.
//!
//! ```text
//!     owner's thread              Sender.send_step ---> seal ---> write        (one call a frame)
//!     owner's thread              Receiver.receive <--- open <--- read         (one call, mostly)
//!     the link's own thread       heartbeats; reads ahead while the owner is busy elsewhere
//! ```
//!
//! The [`Receiver`] reads in the thread of whoever calls [`receive`](Receiver::receive), so a token wakes no
//! other thread. While the owner computes a prompt's chunk, though, the next one should arrive, a peer that
//! is sending must not be kept waiting, and a dead peer should be noticed: so the link's thread reads ahead
//! as soon as rows of a prompt are under way, and in any case when nobody has read for a quarter of a second.
//! What it finds waits, opened, for the owner. That is also why a host with one thread may have several steps
//! under way: its link reads while it sends.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dim_core::bell::Bell;

use super::{LinkError, Timing, tcp};
use crate::connection::{Connection, Heartbeats, Silence};
use crate::error::{Misbehaved, ReceiveError};
use crate::frame::{Inbox, MAX_BODY, Outgoing, Sealer, Store};
use crate::message::{Farewell, Fault, Kind, Message, Span, Status, encode_step_done_head, encode_step_head};
use crate::rows::{Rows, RowsRef};
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
        &self.sender.shared.agreed
    }

    /// What the peer said it is, holds or needs.
    pub fn peer_terms(&self) -> &Terms {
        &self.sender.shared.peer_terms
    }

    /// The peer's name and address, for messages.
    pub fn peer(&self) -> &str {
        &self.sender.shared.peer
    }

    /// Where the peer is.
    pub fn peer_address(&self) -> Option<SocketAddr> {
        self.sender.shared.stream.peer_addr().ok()
    }

    /// This connection's name in the logs of both sides.
    pub fn label(&self) -> &str {
        &self.sender.shared.label
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
    pub fn send_step(&self, spans: &[Span], rows: Rows<'_>) -> Result<u32, LinkError> {
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
        rows: Rows<'a>,
        /// When its last byte was read.
        arrived: Instant,
    },
    /// To a host: the rows of the oldest step without an answer.
    Done {
        /// The step.
        step: u32,
        /// `(n_rows, n_embd)`, every value finite.
        rows: Rows<'a>,
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

/// Bytes and messages since the connection began, the handshake's included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Written to the socket.
    pub bytes_sent: u64,
    /// Read from the socket.
    pub bytes_received: u64,
    /// Steps that have their answer.
    pub round_trips: u64,
}

/// What both halves and the link's own thread share.
struct Shared {
    stream: TcpStream,
    peer: String,
    label: String,
    agreed: Agreed,
    peer_terms: Terms,
    timing: Timing,
    begun: Instant,

    /// Held while a message is entered into the books and put on the wire, so both orders are the same. Locks
    /// are taken in this order: `out`, `books`, `intake`; only `out` is held for long, while a write is
    /// blocked.
    out: Mutex<Out>,
    books: Mutex<Connection>,
    intake: Mutex<Intake>,
    /// the intake has changed
    changed: Condvar,

    stopped: AtomicBool,
    /// ERROR or GOODBYE has been sent
    said_last: AtomicBool,
    last_sent_ms: AtomicU64,
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
    round_trips: AtomicU64,
    /// the number of a PING that we owe a PONG
    pong: Mutex<Option<u64>>,
    own_status: Mutex<Status>,
    peer_status: Mutex<Option<Status>>,
    /// when our PING left
    pinged: Mutex<Option<Instant>>,
    round_trip_time: Mutex<Option<Duration>>,
}

struct Out {
    sealer: Sealer,
    /// what comes before a message's rows
    head: Vec<u8>,
    frame: Vec<u8>,
    /// a sealed frame of the link's own business that the socket has not taken yet: goes before anything else
    unsent: Vec<u8>,
    /// a frame was not written whole: nothing can follow it
    failure: Option<LinkError>,
}

/// The receiving side, handed between the owner and the link's thread: whoever has the inbox reads.
struct Intake {
    inbox: Option<Inbox>,
    /// read ahead, the oldest first, with the time of its last byte
    ready: VecDeque<(Store, Instant)>,
    /// memory of messages that have been used
    spare: Vec<Store>,
    failure: Option<LinkError>,
    owner_waits: bool,
    owner_left: Instant,
    read_ahead: bool,
    /// rung for every message and at the end; while there is one, the link's thread does all reading
    bell: Option<Bell>,
}

impl Intake {
    fn ring(&self) {
        if let Some(bell) = &self.bell {
            bell.ring();
        }
    }
}

/// The half of a link that sends.
#[derive(Clone)]
pub struct Sender {
    shared: Arc<Shared>,
}

impl Sender {
    /// What was agreed on.
    pub fn agreed(&self) -> &Agreed {
        &self.shared.agreed
    }

    /// Host: sends rows to be evaluated; the step's number. `spans` say whose rows they are, in order.
    ///
    /// # Errors
    /// [`LinkError::Misuse`] if the rows do not fit the agreement or the sessions, or are not finite: nothing
    /// was sent. Otherwise the link is lost.
    pub fn send_step(&self, spans: &[Span], rows: Rows<'_>) -> Result<u32, LinkError> {
        let shared = &*self.shared;
        let mut out = lock(&shared.out);
        let mut books = lock(&shared.books);
        let step = books.send_step(spans, &rows).map_err(LinkError::Misuse)?;
        let others_under_way = books.books().is_some_and(|b| b.in_flight() > 1);
        drop(books);
        if others_under_way && rows.values.as_bytes().len() > MAX_BODY {
            // the answer to an earlier step may come while this one is being written
            lock(&shared.intake).read_ahead = true;
            shared.changed.notify_all();
        }
        out.head.clear();
        encode_step_head(&mut out.head, step, spans, rows.exponents, &rows.values);
        shared.write(&mut out, rows.values.as_bytes())?;
        Ok(step)
    }

    /// Worker: answers the oldest step without an answer.
    ///
    /// # Errors
    /// As of [`send_step`](Self::send_step).
    pub fn send_done(
        &self,
        step: u32,
        n_rows: u32,
        rows: Rows<'_>,
        compute: Duration,
        wait: Duration,
    ) -> Result<(), LinkError> {
        let shared = &*self.shared;
        let mut out = lock(&shared.out);
        lock(&shared.books).send_step_done(step, n_rows, &rows).map_err(LinkError::Misuse)?;
        out.head.clear();
        let (compute_us, wait_us) = (micros(compute), micros(wait));
        encode_step_done_head(&mut out.head, step, n_rows, compute_us, wait_us, rows.exponents, &rows.values);
        shared.write(&mut out, rows.values.as_bytes())?;
        shared.round_trips.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Host: makes the worker forget a session's rows at `position` and after it. Takes effect among the
    /// steps in order.
    ///
    /// # Errors
    /// As of [`send_step`](Self::send_step).
    pub fn rewind(&self, session: u32, position: u32) -> Result<(), LinkError> {
        self.shared.send(&Message::Rewind { session, position })
    }

    /// Host: makes the worker forget a session.
    ///
    /// # Errors
    /// As of [`send_step`](Self::send_step).
    pub fn end_session(&self, session: u32) -> Result<(), LinkError> {
        self.shared.send(&Message::EndSession { session })
    }

    /// Either side: the length of a session in the books.
    pub fn session_length(&self, session: u32) -> Option<u32> {
        lock(&self.shared.books).books()?.length(session)
    }

    /// Either side: asks the peer for an answer; [`round_trip_time`](Self::round_trip_time) tells how long it
    /// took. Does nothing while another PING is under way.
    ///
    /// # Errors
    /// The link is lost.
    pub fn ping(&self) -> Result<(), LinkError> {
        let now = self.shared.now_ms();
        if lock(&self.shared.books).is_pinging() {
            return Ok(());
        }
        *lock(&self.shared.pinged) = Some(Instant::now());
        self.shared.send(&Message::Ping(now))
    }

    /// How long the last PING took.
    pub fn round_trip_time(&self) -> Option<Duration> {
        *lock(&self.shared.round_trip_time)
    }

    /// Reports a fault and ends the link. Returns within a second, whether or not the peer could be told.
    pub fn fail(&self, fault: Fault) {
        self.shared.say_last(&Message::Error(fault));
    }

    /// Ends the link in order. Returns within a second, whether or not the peer could be told.
    pub fn goodbye(&self, why: Farewell) {
        self.shared.say_last(&Message::Goodbye(why));
    }

    /// Ends the link at once, from any thread: a blocked send or receive returns [`LinkError::Stopped`].
    pub fn stop(&self) {
        self.shared.stop();
    }

    /// Whether the link is known to be lost or stopped: a worker may then leave off computing.
    pub fn is_lost(&self) -> bool {
        self.shared.stopped.load(Ordering::Acquire) || lock(&self.shared.intake).failure.is_some()
    }

    /// What heartbeats say about this side from now on.
    pub fn set_status(&self, status: Status) {
        *lock(&self.shared.own_status) = status;
    }

    /// What the peer's last heartbeat said.
    pub fn peer_status(&self) -> Option<Status> {
        *lock(&self.shared.peer_status)
    }

    /// Bytes and messages so far.
    pub fn counters(&self) -> Counters {
        Counters {
            bytes_sent: self.shared.bytes_sent.load(Ordering::Relaxed),
            bytes_received: self.shared.bytes_received.load(Ordering::Relaxed),
            round_trips: self.shared.round_trips.load(Ordering::Relaxed),
        }
    }
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender").field("peer", &self.shared.peer).field("label", &self.shared.label).finish()
    }
}

/// The half of a link that receives. Dropping it ends the link.
pub struct Receiver {
    shared: Arc<Shared>,
    /// the message that the last event lends
    current: Store,
    spans: Vec<Span>,
    /// of a worker: frees the place of the host that is served, after everything else
    _place: Option<Box<dyn Send>>,
}

impl Receiver {
    /// The next event, waiting for it until `deadline` (for ever without one). Heartbeats and pings are dealt
    /// with inside.
    ///
    /// # Errors
    /// [`LinkError::Deadline`] leaves the link usable; every other error is its end. If the peer broke a
    /// rule, it has been told.
    pub fn receive(&mut self, deadline: Option<Instant>) -> Result<Event<'_>, LinkError> {
        let arrived = self.shared.next_message(&mut self.current, deadline)?;
        self.read(arrived)
    }

    /// The next event if this process has read it already; never blocks. To be used with a bell: without one it finds
    /// only what the link's thread has happened to read ahead.
    ///
    /// # Errors
    /// As of [`receive`](Self::receive), without its deadline.
    pub fn try_receive(&mut self) -> Result<Option<Event<'_>>, LinkError> {
        match self.shared.message_read_ahead(&mut self.current)? {
            Some(arrived) => self.read(arrived).map(Some),
            None => Ok(None),
        }
    }

    /// From now on the link's own thread reads everything, and rings the bell for every complete message and at the
    /// end of the link; with `None` whoever calls [`receive`](Self::receive) reads again. What is there already is
    /// rung for at once.
    pub fn notify(&mut self, bell: Option<Bell>) {
        let mut intake = lock(&self.shared.intake);
        if let Some(bell) = &bell
            && (!intake.ready.is_empty() || intake.failure.is_some())
        {
            bell.ring();
        }
        intake.bell = bell;
        drop(intake);
        self.shared.changed.notify_all();
    }

    /// The event of the message in `current`.
    fn read(&mut self, arrived: Instant) -> Result<Event<'_>, LinkError> {
        let shared = &*self.shared;
        let received = lock(&shared.books).receive(self.current.message());
        let message = received.map_err(|error| shared.broke(error))?;
        match message {
            Message::Step(s) => {
                self.spans.clear();
                self.spans.extend(s.spans());
                if s.hidden.len() > MAX_BODY {
                    // a prompt: let its next chunk arrive while this one is computed
                    lock(&shared.intake).read_ahead = true;
                    shared.changed.notify_all();
                }
                let rows = Rows { values: aligned(s.format.dtype, s.hidden), exponents: s.exponents };
                Ok(Event::Step { step: s.step, spans: &self.spans, rows, arrived })
            }
            Message::StepDone(s) => {
                shared.round_trips.fetch_add(1, Ordering::Relaxed);
                Ok(Event::Done {
                    step: s.step,
                    rows: Rows { values: aligned(s.format.dtype, s.hidden), exponents: s.exponents },
                    compute: Duration::from_micros(s.compute_us.into()),
                    wait: Duration::from_micros(s.wait_us.into()),
                })
            }
            Message::Rewind { session, position } => Ok(Event::Rewind { session, position }),
            Message::EndSession { session } => Ok(Event::EndSession { session }),
            Message::Error(fault) => Err(shared.over(LinkError::Fault { peer: shared.peer.clone(), fault })),
            Message::Goodbye(why) => Err(shared.over(LinkError::Goodbye { peer: shared.peer.clone(), why })),
            Message::Refuse { reason, text, .. } => Err(shared.over(LinkError::Refused {
                peer: shared.peer.clone(),
                reason,
                mismatches: Vec::new(),
                text,
            })),
            other => {
                let kind = other.kind() as u8;
                Err(shared.broke(Misbehaved::Unexpected { kind }.into()))
            }
        }
    }

    /// Why a send failed, if the peer has said so before it closed or was not heard; otherwise `error` as it
    /// is. What else it sent is thrown away: to be called when the link is given up.
    pub fn explain(&mut self, error: LinkError) -> LinkError {
        if !matches!(error, LinkError::Broken { .. } | LinkError::Closed { .. }) {
            return error;
        }
        let deadline = Instant::now() + Duration::from_millis(300);
        loop {
            match self.receive(Some(deadline)) {
                Ok(_) => {}
                Err(LinkError::Broken { .. } | LinkError::Closed { .. } | LinkError::Deadline { .. }) => {
                    return error;
                }
                Err(said) => return said,
            }
        }
    }

    /// A sender of the same link.
    pub fn sender(&self) -> Sender {
        Sender { shared: self.shared.clone() }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // what this side said last must not be lost with what the peer said meanwhile
        if self.shared.said_last.load(Ordering::Acquire) && !self.shared.stopped.load(Ordering::Acquire) {
            tcp::close_gently(&self.shared.stream);
        }
        self.shared.stop();
    }
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").field("peer", &self.shared.peer).finish_non_exhaustive()
    }
}

/// What a link is made of once both sides have agreed.
pub(super) struct Parts {
    pub stream: TcpStream,
    pub peer: String,
    pub label: String,
    pub agreed: Agreed,
    pub peer_terms: Terms,
    pub timing: Timing,
    pub connection: Connection,
    pub sealer: Sealer,
    pub inbox: Inbox,
    pub bytes_sent: u64,
    pub bytes_received: u64,
}

/// Takes a connection over at the moment of agreement. `place` is dropped when the receiver is.
pub(super) fn start(parts: Parts, place: Option<Box<dyn Send>>) -> Result<Link, LinkError> {
    let Parts { stream, peer, label, agreed, peer_terms, timing, mut connection, sealer, mut inbox, .. } =
        parts;
    let broken = |e: std::io::Error| LinkError::Broken { peer: peer.clone(), text: e.to_string() };
    tcp::tick(&stream).map_err(broken)?;
    connection.begin_serving(agreed.clone());
    inbox.set_limit(connection.limit());
    let now = Instant::now();
    let shared = Arc::new(Shared {
        stream,
        label,
        agreed,
        peer_terms,
        timing,
        begun: now,
        books: Mutex::new(connection),
        out: Mutex::new(Out {
            sealer,
            head: Vec::with_capacity(4096),
            frame: Vec::new(),
            unsent: Vec::new(),
            failure: None,
        }),
        intake: Mutex::new(Intake {
            inbox: Some(inbox),
            ready: VecDeque::new(),
            spare: Vec::new(),
            failure: None,
            owner_waits: false,
            owner_left: now,
            read_ahead: false,
            bell: None,
        }),
        changed: Condvar::new(),
        stopped: AtomicBool::new(false),
        said_last: AtomicBool::new(false),
        last_sent_ms: AtomicU64::new(0),
        bytes_sent: AtomicU64::new(parts.bytes_sent),
        bytes_received: AtomicU64::new(parts.bytes_received),
        round_trips: AtomicU64::new(0),
        pong: Mutex::default(),
        own_status: Mutex::default(),
        peer_status: Mutex::default(),
        pinged: Mutex::default(),
        round_trip_time: Mutex::default(),
        peer: peer.clone(),
    });
    let attendant = shared.clone();
    std::thread::Builder::new().name("dim-link".into()).spawn(move || attendant.attend()).map_err(broken)?;
    Ok(Link {
        sender: Sender { shared: shared.clone() },
        receiver: Receiver { shared, current: Store::default(), spans: Vec::new(), _place: place },
    })
}

/// The handle by which a listener ends a link that it has given away.
pub(super) fn stopper(link: &Link) -> Sender {
    link.sender.clone()
}

/// After how long without its owner reading the link's thread reads.
const OWNER_AWAY: Duration = Duration::from_millis(250);

impl Shared {
    fn now_ms(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64
    }

    /// A message without rows.
    fn send(&self, message: &Message<'_>) -> Result<(), LinkError> {
        let mut out = lock(&self.out);
        lock(&self.books).send(message).map_err(LinkError::Misuse)?;
        out.head.clear();
        message.encode(&mut out.head);
        self.write(&mut out, &[])
    }

    /// ERROR or GOODBYE, unless another thread is blocked in a write: then the peer takes no bytes anyway.
    fn say_last(&self, message: &Message<'_>) {
        let give_up = Instant::now() + Duration::from_millis(500);
        while !self.send_unless_busy(message) && Instant::now() < give_up && !self.is_closed() {
            std::thread::sleep(Duration::from_millis(2));
        }
        while !self.flush_unless_busy() && Instant::now() < give_up {}
        self.finish_sending();
    }

    /// Whether nothing may be sent any more.
    fn is_closed(&self) -> bool {
        lock(&self.books).books().is_none()
    }

    /// Seals and writes what is in `out.head` and then the rows, frame by frame.
    ///
    /// A failure is not yet the link's end: what the peer said before it closed may still be there to be
    /// read.
    fn write(&self, out: &mut Out, rows: &[u8]) -> Result<(), LinkError> {
        let Out { sealer, head, frame, unsent, failure } = out;
        if let Some(failure) = failure {
            return Err(failure.clone());
        }
        let mut message = Outgoing::new(head, rows);
        let mut write_frames = || {
            if !unsent.is_empty() {
                tcp::write_all(&self.stream, unsent, self.timing.stalled_write).map_err(|e| e.to_string())?;
                self.bytes_sent.fetch_add(unsent.len() as u64, Ordering::Relaxed);
                unsent.clear();
            }
            loop {
                frame.clear();
                if !sealer.seal(&mut message, frame).map_err(|e| e.to_string())? {
                    return Ok(());
                }
                tcp::write_all(&self.stream, frame, self.timing.stalled_write).map_err(|e| e.to_string())?;
                self.bytes_sent.fetch_add(frame.len() as u64, Ordering::Relaxed);
            }
        };
        write_frames().map_err(|text: String| {
            let error = match self.stopped.load(Ordering::Acquire) {
                true => LinkError::Stopped,
                false => LinkError::Broken { peer: self.peer.clone(), text },
            };
            failure.insert(error).clone()
        })?;
        self.last_sent_ms.store(self.now_ms(), Ordering::Relaxed);
        Ok(())
    }

    /// Puts the next message that is not the link's own business into `store`; when its last byte came.
    fn next_message(&self, store: &mut Store, deadline: Option<Instant>) -> Result<Instant, LinkError> {
        let begun = Instant::now();
        let mut intake = lock(&self.intake);
        let inbox = loop {
            if let Some(arrived) = self.pop_ready(&mut intake, store) {
                return Ok(arrived);
            }
            if let Some(failure) = &intake.failure {
                return Err(failure.clone());
            }
            if intake.bell.is_none()
                && let Some(inbox) = intake.inbox.take()
            {
                break inbox;
            }
            // the link's thread is reading: what it finds is for us
            intake.owner_waits = true;
            let left =
                deadline.map_or(Duration::from_secs(3600), |d| d.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                intake.owner_waits = false;
                return Err(self.too_late(begun));
            }
            (intake, _) = self.changed.wait_timeout(intake, left).unwrap_or_else(PoisonError::into_inner);
            intake.owner_waits = false;
        };
        intake.read_ahead = false;
        drop(intake);

        let (inbox, read) = self.read_message(inbox, deadline, false);
        let mut intake = lock(&self.intake);
        intake.owner_left = Instant::now();
        let inbox = intake.inbox.insert(inbox);
        match read {
            Ok(true) => {
                inbox.take(store);
                Ok(intake.owner_left)
            }
            Ok(false) => Err(self.too_late(begun)),
            Err(error) => {
                drop(intake);
                Err(self.over(error))
            }
        }
    }

    /// Puts the oldest message that was read ahead into `store`; when its last byte came.
    fn message_read_ahead(&self, store: &mut Store) -> Result<Option<Instant>, LinkError> {
        let mut intake = lock(&self.intake);
        match (self.pop_ready(&mut intake, store), &intake.failure) {
            (None, Some(failure)) => Err(failure.clone()),
            (message, _) => Ok(message),
        }
    }

    fn pop_ready(&self, intake: &mut Intake, store: &mut Store) -> Option<Instant> {
        let was_full = intake.ready.len() >= self.most_ready();
        let (message, arrived) = intake.ready.pop_front()?;
        intake.spare.push(std::mem::replace(store, message));
        intake.owner_left = Instant::now();
        if was_full && intake.bell.is_some() {
            self.changed.notify_all();
        }
        Some(arrived)
    }

    fn too_late(&self, begun: Instant) -> LinkError {
        let ms = begun.elapsed().as_millis() as u64;
        LinkError::Deadline { peer: self.peer.clone(), what: "answer", ms }
    }

    /// Reads until a message is there that is not the link's own business. `false`: `deadline` came first.
    /// The link's thread is `attending` meanwhile: it sends heartbeats.
    fn read_message(
        &self,
        mut inbox: Inbox,
        deadline: Option<Instant>,
        attending: bool,
    ) -> (Inbox, Result<bool, LinkError>) {
        let mut silence = Silence::begin(self.now_ms(), self.timing.silence.as_millis() as u64);
        let read = loop {
            match inbox.poll() {
                Ok(true) => match self.own_business(inbox.message()) {
                    Ok(false) => break Ok(true),
                    Ok(true) => {
                        inbox.release();
                        continue;
                    }
                    Err(error) => break Err(error),
                },
                Ok(false) => {}
                Err(error) => break Err(self.broke(error.into())),
            }
            match (&mut { &self.stream }).read(inbox.space()) {
                Ok(0) => break Err(self.closed()),
                Ok(n) => {
                    inbox.filled(n);
                    self.bytes_received.fetch_add(n as u64, Ordering::Relaxed);
                    silence.heard(self.now_ms());
                }
                Err(e) if tcp::is_tick(&e) => {
                    if self.stopped.load(Ordering::Acquire) {
                        break Err(LinkError::Stopped);
                    }
                    if silence.is_over(self.now_ms()) {
                        // whoever is blocked in a write to this peer comes back too
                        let _ = self.stream.shutdown(Shutdown::Both);
                        let ms = self.timing.silence.as_millis() as u64;
                        break Err(LinkError::Silent { peer: self.peer.clone(), ms });
                    }
                }
                Err(_) if self.stopped.load(Ordering::Acquire) => break Err(LinkError::Stopped),
                Err(e) => break Err(LinkError::Broken { peer: self.peer.clone(), text: e.to_string() }),
            }
            if attending {
                self.heartbeat();
            }
            // a message that has just become complete comes before the deadline
            if deadline.is_some_and(|d| Instant::now() >= d) && matches!(inbox.poll(), Ok(false)) {
                break Ok(false);
            }
        };
        (inbox, read)
    }

    fn closed(&self) -> LinkError {
        match self.stopped.load(Ordering::Acquire) {
            true => LinkError::Stopped,
            false => LinkError::Closed { peer: self.peer.clone() },
        }
    }

    /// Deals with heartbeats, pings and pongs, whoever reads them. `false`: the message is the owner's.
    fn own_business(&self, message: &[u8]) -> Result<bool, LinkError> {
        let kind = message.first().copied().unwrap_or(0);
        if ![Kind::Heartbeat as u8, Kind::Ping as u8, Kind::Pong as u8].contains(&kind) {
            return Ok(false);
        }
        let received = lock(&self.books).receive(message);
        match received.map_err(|error| self.broke(error))? {
            Message::Heartbeat(status) => *lock(&self.peer_status) = Some(status),
            Message::Ping(number) => {
                *lock(&self.pong) = Some(number);
                self.answer_ping();
            }
            // a PONG that nobody waits for changes nothing
            Message::Pong(_) if !lock(&self.books).is_pinging() => {
                if let Some(sent) = lock(&self.pinged).take() {
                    *lock(&self.round_trip_time) = Some(sent.elapsed());
                }
            }
            _ => {}
        }
        Ok(true)
    }

    /// The peer broke a rule: it is told, if it is to be, and the link is over.
    fn broke(&self, error: ReceiveError) -> LinkError {
        // not if something is being written: that may be blocked until this very thread reads on
        if let (Some(code), Ok(mut out)) = (error.code(), self.out.try_lock()) {
            let fault = Fault::new(code, format!("{error} ({})", error.rule()));
            self.seal_own(&mut out, &Message::Error(fault));
        }
        self.finish_sending();
        self.over(LinkError::Broke { peer: self.peer.clone(), error })
    }

    /// Remembers why the link is over; the first reason stays. What has been read before can still be
    /// received.
    fn over(&self, error: LinkError) -> LinkError {
        let mut intake = lock(&self.intake);
        // what the peer said before it closed was read before the end, and is understood after it
        let says_more = !matches!(error, LinkError::Broken { .. } | LinkError::Closed { .. });
        match &mut intake.failure {
            Some(first @ (LinkError::Broken { .. } | LinkError::Closed { .. })) if says_more => {
                *first = error
            }
            Some(_) => {}
            none => *none = Some(error),
        }
        let first = intake.failure.clone().unwrap_or(LinkError::Stopped);
        intake.ring();
        drop(intake);
        self.changed.notify_all();
        first
    }

    /// Nothing more is sent; what was sent arrives.
    fn finish_sending(&self) {
        self.said_last.store(true, Ordering::Release);
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        let _ = self.stream.shutdown(Shutdown::Both);
        self.over(LinkError::Stopped);
    }

    /// The link's own thread.
    fn attend(&self) {
        while !self.stopped.load(Ordering::Acquire) {
            self.heartbeat();
            let mut intake = lock(&self.intake);
            if intake.failure.is_some() {
                return;
            }
            let away = !intake.owner_waits && intake.owner_left.elapsed() >= OWNER_AWAY;
            let wanted = (intake.read_ahead || away || intake.bell.is_some())
                && intake.ready.len() < self.most_ready();
            match intake.inbox.take_if(|_| wanted) {
                Some(inbox) => {
                    drop(intake);
                    self.read_ahead(inbox);
                }
                None => {
                    let pause = Duration::from_millis(Heartbeats::EVERY_MS / 2).min(self.heartbeat_due());
                    let pause = pause.max(Duration::from_millis(10));
                    drop(self.changed.wait_timeout(intake, pause));
                }
            }
        }
    }

    /// Reads messages until the owner has one to go on with, or enough wait for it.
    fn read_ahead(&self, mut inbox: Inbox) {
        loop {
            let (back, read) = self.read_message(inbox, None, true);
            inbox = back;
            let mut intake = lock(&self.intake);
            let go_on = match read {
                Ok(true) => {
                    let mut store = intake.spare.pop().unwrap_or_default();
                    inbox.take(&mut store);
                    intake.ready.push_back((store, Instant::now()));
                    intake.ring();
                    if intake.owner_waits {
                        self.changed.notify_all();
                    }
                    let for_the_bell = intake.bell.is_some();
                    (for_the_bell || !intake.owner_waits) && intake.ready.len() < self.most_ready()
                }
                Ok(false) => true,
                Err(error) => {
                    intake.failure.get_or_insert(error);
                    intake.ring();
                    false
                }
            };
            if !go_on {
                intake.inbox = Some(inbox);
                intake.read_ahead = false;
                drop(intake);
                self.changed.notify_all();
                return;
            }
        }
    }

    fn heartbeat_due(&self) -> Duration {
        let beats = Heartbeats::new(self.last_sent_ms.load(Ordering::Relaxed));
        Duration::from_millis(beats.due_in_ms(self.now_ms()))
    }

    /// Sends a heartbeat if one is due, and the PONG that could not be sent before.
    fn heartbeat(&self) {
        self.answer_ping();
        if self.heartbeat_due().is_zero() {
            let status = *lock(&self.own_status);
            self.send_unless_busy(&Message::Heartbeat(status));
        }
    }

    fn answer_ping(&self) {
        let mut pong = lock(&self.pong);
        if let Some(number) = *pong
            && self.send_unless_busy(&Message::Pong(number))
        {
            *pong = None;
        }
    }

    /// Sends a message of the link's own, unless something is being sent or the socket is full: a write may
    /// be blocked until the peer reads, and the peer until this thread does. Whether it is on its way.
    fn send_unless_busy(&self, message: &Message<'_>) -> bool {
        let Ok(mut out) = self.out.try_lock() else { return false };
        if !self.flush(&mut out) || lock(&self.books).send(message).is_err() {
            return false;
        }
        self.seal_own(&mut out, message);
        true
    }

    fn flush_unless_busy(&self) -> bool {
        self.out.try_lock().is_ok_and(|mut out| self.flush(&mut out))
    }

    fn seal_own(&self, out: &mut Out, message: &Message<'_>) {
        out.head.clear();
        message.encode(&mut out.head);
        let Out { sealer, head, unsent, .. } = out;
        let mut outgoing = Outgoing::new(head, &[]);
        while sealer.seal(&mut outgoing, unsent).unwrap_or(false) {}
        self.flush(out);
    }

    /// Writes once what is unsent, waiting for the socket a tenth of a second at most. Whether nothing is
    /// left.
    fn flush(&self, out: &mut Out) -> bool {
        if out.unsent.is_empty() {
            return true;
        }
        if let Ok(n) = (&mut { &self.stream }).write(&out.unsent) {
            out.unsent.drain(..n);
            self.bytes_sent.fetch_add(n as u64, Ordering::Relaxed);
            self.last_sent_ms.store(self.now_ms(), Ordering::Relaxed);
        }
        out.unsent.is_empty()
    }

    fn most_ready(&self) -> usize {
        (self.agreed.max_in_flight as usize).clamp(8, 64)
    }
}

/// Rows of a message from an [`Inbox`], which lie aligned by its construction.
fn aligned(dtype: crate::DType, hidden: &[u8]) -> RowsRef<'_> {
    RowsRef::from_bytes(dtype, hidden)
        .expect("an inbox's messages begin at a multiple of 64, their rows at one of 8")
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

/// A lock whose data every critical section leaves whole, so a panic elsewhere does not take the link down.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
