//! Two endpoints and a network between them, on simulated time: latency, a limited rate, full buffers, a pulled cable,
//! a peer that leaves. Nothing sleeps, and the same script gives the same trace.
//!
//! What [`dim_wire::transport`] does with threads is done here by hand: a side that reads has its endpoint's inbox lent,
//! a side that is away has not, and what its peer sends then stays in the network until the buffers are full.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use dim_core::stage::Span;
use dim_wire::endpoint::{Ask, ComputeTime, Endpoint, Filed, Timing};
use dim_wire::frame::{Inbox, Store};
use dim_wire::handshake::{Lookup, Named};
use dim_wire::keys::Key;
use dim_wire::link_error::LinkErrorKind;
use dim_wire::message::Message;
use dim_wire::rows::{self, RowTypes, RowsRef, Shape};
use dim_wire::terms::{SliceRole, Terms, agree};
use half::f16;

pub(crate) const N_EMBD: u32 = 64;

pub(crate) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

pub(crate) fn key() -> Key {
    Key::from_bytes([7; 32])
}

pub(crate) fn terms(name: &str) -> Terms {
    Terms {
        row_types: RowTypes::F16,
        role: SliceRole::Middle,
        shape: Shape::hidden(N_EMBD),
        n_blocks: 12,
        blocks: BlockRange { first: 4, last: 7 },
        n_ctx: 1 << 20,
        max_rows: 512,
        max_sessions: 4,
        max_in_flight: 4,
        model: Some(Sha([1; 32])),
        arch: "qwen2".into(),
        ..Terms::blank(2, "test 0", name)
    }
}

/// One direction of the network, with the buffers at both of its ends.
pub(crate) struct Pipe {
    pub latency: Duration,
    pub bytes_per_s: Option<u64>,
    /// how many bytes may lie in it unread
    pub capacity: usize,
    /// the cable is pulled: what is in it stays there
    pub frozen: bool,
    queue: VecDeque<(Instant, Vec<u8>)>,
    held: usize,
    last_arrival: Option<Instant>,
    closed: bool,
}

impl Pipe {
    fn new() -> Pipe {
        Pipe {
            latency: Duration::ZERO,
            bytes_per_s: None,
            capacity: 1 << 20,
            frozen: false,
            queue: VecDeque::new(),
            held: 0,
            last_arrival: None,
            closed: false,
        }
    }

    /// Takes what fits; how much.
    fn push(&mut self, bytes: &[u8], now: Instant) -> usize {
        let n = bytes.len().min(self.capacity - self.held.min(self.capacity));
        // in pieces of a packet, so that a slow pipe gives its bytes little by little
        for piece in bytes[..n].chunks(1448) {
            let time = self.bytes_per_s.map_or(Duration::ZERO, |rate| {
                Duration::from_nanos(piece.len() as u64 * 1_000_000_000 / rate)
            });
            let begins = self.last_arrival.map_or(now, |last| last.max(now));
            self.last_arrival = Some(begins + time);
            self.queue.push_back((begins + time + self.latency, piece.to_vec()));
        }
        self.held += n;
        n
    }

    fn next_arrival(&self) -> Option<Instant> {
        self.queue.front().filter(|_| !self.frozen).map(|(at, _)| *at)
    }

    fn pop(&mut self, now: Instant) -> Option<Vec<u8>> {
        self.next_arrival().filter(|&at| at <= now)?;
        let (_, bytes) = self.queue.pop_front()?;
        self.held -= bytes.len();
        Some(bytes)
    }

    fn unpop(&mut self, bytes: Vec<u8>, now: Instant) {
        self.held += bytes.len();
        self.queue.push_front((now, bytes));
    }
}

/// One end: an endpoint and who uses it.
pub(crate) struct Side {
    pub endpoint: Endpoint,
    pub current: Store,
    inbox: Option<Inbox>,
    /// its owner, or its line's thread, reads
    pub reads: bool,
    /// its owner leaves off reading and goes on at once, each time that it looks
    pub looks_up: bool,
    /// rows of the message that is being sent
    payload: Vec<u8>,
    /// taken from the endpoint, not yet by the network
    pending: Vec<u8>,
    /// steps that wait for the one before them to be taken
    outgoing: VecDeque<(u32, Vec<f16>)>,
    pub position: u32,
}

impl Side {
    fn new(endpoint: Endpoint) -> Side {
        Side {
            endpoint,
            current: Store::default(),
            inbox: None,
            reads: true,
            looks_up: false,
            payload: Vec::new(),
            pending: Vec::new(),
            outgoing: VecDeque::new(),
            position: 0,
        }
    }

    /// Whether it takes bytes from the network now; lends and returns the inbox accordingly.
    fn attend(&mut self, now: Instant) -> bool {
        if self.endpoint.is_established() || self.inbox.is_some() {
            match (self.reads, self.inbox.take()) {
                (true, None) => self.inbox = self.endpoint.lend_inbox(now),
                (true, Some(inbox)) if self.looks_up && self.endpoint.end().is_none() => {
                    self.endpoint.return_inbox(inbox, now);
                    self.inbox = self.endpoint.lend_inbox(now);
                }
                (true, inbox) => self.inbox = inbox,
                (false, Some(inbox)) => self.endpoint.return_inbox(inbox, now),
                // it was never lent: also then silence does not count
                (false, None) => {
                    if let Some(inbox) = self.endpoint.lend_inbox(now) {
                        self.endpoint.return_inbox(inbox, now);
                    }
                }
            }
        }
        self.reads && self.endpoint.end().is_none()
    }

    /// How many of the bytes it takes.
    pub(crate) fn receive(&mut self, bytes: &[u8], now: Instant) -> usize {
        let Some(inbox) = &mut self.inbox else { return self.endpoint.receive(bytes, now) };
        let mut taken = 0;
        loop {
            let found = match inbox.poll() {
                Ok(false) if taken == bytes.len() => return taken,
                Ok(false) => {
                    let n = inbox.fill(&bytes[taken..]);
                    assert!(n > 0, "no room though no message waits");
                    self.endpoint.heard(n, now);
                    taken += n;
                    continue;
                }
                Ok(true) => Ok(()),
                Err(error) => Err(error),
            };
            if self.endpoint.file(inbox, found, now) == Filed::Over {
                return bytes.len();
            }
        }
    }

    /// Sends rows of `value`, going on where session 0 stands, as soon as what is before them has gone.
    pub(crate) fn send_rows(&mut self, count: u32, value: f32) {
        self.outgoing.push_back((count, vec![f16::from_f32(value); (count * N_EMBD) as usize]));
    }

    fn transmit(&mut self, pipe: &mut Pipe, now: Instant) -> bool {
        let mut progress = false;
        loop {
            if self.pending.is_empty() {
                if !self.endpoint.is_halfway()
                    && self.endpoint.end().is_none()
                    && self.endpoint.books().is_some_and(|b| b.in_flight() < 4)
                    && let Some((count, values)) = self.outgoing.pop_front()
                {
                    let span = [Span { session: 0, position: self.position, count }];
                    self.endpoint.send_step(&span, &[], RowsRef::F16(&values)).unwrap();
                    self.position += count;
                    self.payload = rows::as_bytes(RowsRef::F16(&values)).to_vec();
                }
                if !self.endpoint.poll_transmit(&self.payload, &mut self.pending, now) {
                    // what is over is closed once it has been said
                    pipe.closed |= self.endpoint.end().is_some();
                    return progress;
                }
            }
            let n = pipe.push(&self.pending, now);
            self.pending.drain(..n);
            self.endpoint.sent(n, now);
            if n == 0 {
                return progress;
            }
            progress = true;
        }
    }

    /// The next message may begin.
    fn is_free(&self) -> bool {
        !self.endpoint.is_halfway() && self.pending.is_empty()
    }

    /// What it still has to give to the network.
    pub(crate) fn unsent(&self) -> usize {
        self.pending.len() + self.outgoing.iter().map(|(_, v)| v.len() * 2).sum::<usize>()
    }
}

/// What happened, and when: milliseconds since the world began.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Seen {
    Accepted,
    /// step, first value
    Answer(u32, f32),
    Rewind(u32),
    Host(LinkErrorKind),
    Worker(LinkErrorKind),
    Other(String),
}

/// A host, a worker that adds one to every value, and the network between them.
pub(crate) struct World {
    pub begun: Instant,
    pub now: Instant,
    pub host: Side,
    pub worker: Side,
    pub to_worker: Pipe,
    pub to_host: Pipe,
    /// how long the worker computes a step
    pub compute: Duration,
    /// what it reads while it does
    pub reads_while_computing: bool,
    /// whether it answers HELLO
    pub accepts: bool,
    answers: VecDeque<(Instant, u32, Vec<f16>)>,
    pub trace: Vec<(u64, Seen)>,
    ends_told: [bool; 2],
}

impl World {
    pub(crate) fn new(timing: &Timing, ask: Ask) -> World {
        let now = Instant::now();
        let host_key = match &ask {
            Ask::Pair { .. } => panic!("pairing has a code"),
            _ => key(),
        };
        let host = Endpoint::host(&host_key, ask, timing, now);
        let look_up = Box::new(|named: &Named| match named.is(&key()) {
            true => Lookup::Found(key()),
            false => Lookup::Unknown,
        });
        World {
            begun: now,
            now,
            host: Side::new(host),
            worker: Side::new(Endpoint::worker(look_up, timing, now).unwrap()),
            to_worker: Pipe::new(),
            to_host: Pipe::new(),
            compute: Duration::ZERO,
            reads_while_computing: true,
            accepts: true,
            answers: VecDeque::new(),
            trace: Vec::new(),
            ends_told: [false; 2],
        }
    }

    /// A host that is served already.
    pub(crate) fn serving() -> World {
        World::serving_with(&Timing::default())
    }

    pub(crate) fn serving_with(timing: &Timing) -> World {
        let mut world = World::new(timing, Ask::Serve(Box::new(terms("host"))));
        world.run_for(Duration::ZERO);
        assert_eq!(world.trace, [(0, Seen::Accepted)]);
        world.trace.clear();
        world
    }

    pub(crate) fn with_latency(mut self, latency: Duration) -> World {
        (self.to_worker.latency, self.to_host.latency) = (latency, latency);
        self
    }

    /// The cable is pulled, or back.
    pub(crate) fn freeze(&mut self, frozen: bool) {
        (self.to_worker.frozen, self.to_host.frozen) = (frozen, frozen);
    }

    pub(crate) fn elapsed_ms(&self) -> u64 {
        (self.now - self.begun).as_millis() as u64
    }

    /// What was seen since the last time this was asked, without the times.
    pub(crate) fn seen(&mut self) -> Vec<Seen> {
        self.trace.drain(..).map(|(_, seen)| seen).collect()
    }

    /// Lets time pass.
    pub(crate) fn run_for(&mut self, time: Duration) {
        let until = self.now + time;
        loop {
            self.settle();
            match self.next_time().filter(|&next| next <= until) {
                Some(next) => {
                    self.now = self.now.max(next);
                    // everything that arrives now is received first
                    self.settle();
                    for side in [&mut self.host, &mut self.worker] {
                        if side.endpoint.poll_timeout().is_some_and(|at| at <= self.now) {
                            side.endpoint.handle_timeout(self.now);
                        }
                    }
                }
                None => break,
            }
        }
        self.now = until;
    }

    fn next_time(&self) -> Option<Instant> {
        let arrival =
            |pipe: &Pipe, to: &Side| pipe.next_arrival().filter(|_| to.reads && to.endpoint.end().is_none());
        [
            arrival(&self.to_worker, &self.worker),
            arrival(&self.to_host, &self.host),
            self.host.endpoint.poll_timeout(),
            self.worker.endpoint.poll_timeout(),
            self.answers.front().map(|(at, ..)| *at).filter(|_| self.worker.is_free()),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Does everything that needs no time.
    fn settle(&mut self) {
        loop {
            let now = self.now;
            let mut progress = self.host.transmit(&mut self.to_worker, now);
            progress |= self.worker.transmit(&mut self.to_host, now);
            progress |= deliver(&mut self.to_worker, &mut self.worker, now);
            progress |= deliver(&mut self.to_host, &mut self.host, now);
            progress |= self.worker_works();
            progress |= self.host_sees();
            if !progress {
                return;
            }
        }
    }

    fn see(&mut self, seen: Seen) {
        self.trace.push((self.elapsed_ms(), seen));
    }

    fn worker_works(&mut self) -> bool {
        let now = self.now;
        let mut progress = false;
        if self.answers.front().is_some_and(|(at, ..)| *at <= now)
            && self.worker.is_free()
            && let Some((_, step, values)) = self.answers.pop_front()
        {
            if self.worker.endpoint.end().is_none() {
                let n_rows = values.len() as u32 / N_EMBD;
                let rows = RowsRef::F16(&values);
                let time =
                    ComputeTime { began: now - self.compute, compute: self.compute, wait: Duration::ZERO };
                self.worker.endpoint.send_step_done(step, n_rows, rows, time).unwrap();
                self.worker.payload = rows::as_bytes(rows).to_vec();
            }
            self.worker.reads = true;
            progress = true;
        }
        if !self.reads_while_computing && !self.answers.is_empty() {
            self.worker.reads = false;
            return progress;
        }
        let end = match self.worker.endpoint.poll_event(&mut self.worker.current, now) {
            Ok(None) => return progress,
            Err(end) => Some(end),
            Ok(Some(received)) => {
                match received.message {
                    Message::Step(s) => {
                        let values: &[f16] = bytemuck::cast_slice(s.rows);
                        let answer = values.iter().map(|v| f16::from_f32(v.to_f32() + 1.0)).collect();
                        let begins = self.answers.back().map_or(now, |(at, ..)| *at).max(now);
                        self.answers.push_back((begins + self.compute, s.step, answer));
                    }
                    Message::Hello(hello) if self.accepts => {
                        let held = terms("worker");
                        let agreed = agree(&hello, &held).unwrap();
                        self.worker.endpoint.accept(held, agreed, now);
                    }
                    Message::Inquire => self.worker.endpoint.offer(terms("worker")),
                    Message::Rewind { position, .. } => self.trace.push((0, Seen::Rewind(position))),
                    _ => {}
                }
                None
            }
        };
        match end {
            Some(_) if self.ends_told[1] => progress,
            Some(end) => {
                self.ends_told[1] = true;
                self.see(Seen::Worker(end));
                true
            }
            None => true,
        }
    }

    fn host_sees(&mut self) -> bool {
        let seen = match self.host.endpoint.poll_event(&mut self.host.current, self.now) {
            Ok(None) => return false,
            Err(_) if self.ends_told[0] => return false,
            Err(end) => {
                self.ends_told[0] = true;
                Seen::Host(end)
            }
            Ok(Some(received)) => match received.message {
                Message::Accept(_) => Seen::Accepted,
                Message::StepDone(s) => {
                    let values: &[f16] = bytemuck::cast_slice(s.rows);
                    assert!(values.iter().all(|v| v == &values[0]), "rows of another step");
                    Seen::Answer(s.step, values[0].to_f32())
                }
                other => Seen::Other(format!("{:?}", other.kind())),
            },
        };
        self.see(seen);
        true
    }
}

fn deliver(pipe: &mut Pipe, to: &mut Side, now: Instant) -> bool {
    if !to.attend(now) {
        return false;
    }
    match pipe.pop(now) {
        Some(bytes) => {
            let taken = to.receive(&bytes, now);
            if taken < bytes.len() {
                pipe.unpop(bytes[taken..].to_vec(), now);
            }
            taken > 0
        }
        None if pipe.closed && !pipe.frozen && pipe.queue.is_empty() && to.endpoint.end().is_none() => {
            to.endpoint.closed();
            true
        }
        None => false,
    }
}
