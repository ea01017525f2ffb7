//! How a connection begins: the handshake, what the host asks, what the worker answers.

use std::time::Instant;

use super::timers::Timer;
use super::{Endpoint, LookUp, Timing};
use crate::VERSIONS;
use crate::connection::Role;
use crate::error::{HandshakeError, Misbehaved};
use crate::frame::Inbox;
use crate::handshake::{
    Established, FIRST_FLIGHT, GREETING, HostHandshake, Purpose, SECOND_FLIGHT, WorkerHandshake,
};
use crate::keys::Key;
use crate::layout::OPENING_LIMIT;
use crate::link_error::{LinkErrorKind, refusal_text};
use crate::message::{Message, PushOffer, Status};
use crate::terms::{self, Agreed, Mismatch, Reason, Terms};

/// What a host connects for.
#[derive(Clone, Debug)]
pub enum Ask {
    /// What does the worker hold? Answered by OFFER.
    Inquire,
    /// Rows are to be evaluated on these terms, whose version is filled in. Answered by ACCEPT.
    Serve(Box<Terms>),
    /// Files are to be stored. Answered by PUSH_NEED.
    Push(PushOffer),
    /// A key is wanted; the endpoint's key is that of a pairing code. Answered by PAIR_GRANT.
    Pair {
        /// What this host calls itself.
        name: String,
        /// Its program and version.
        software: String,
    },
}

impl Ask {
    pub(super) fn purpose(&self) -> Purpose {
        match self {
            Ask::Pair { .. } => Purpose::Pairing,
            _ => Purpose::Key,
        }
    }
}

/// Either side's handshake, with the bytes that are being received for it.
pub(super) struct Handshake {
    side: Side,
    buffer: [u8; SECOND_FLIGHT],
}

enum Side {
    Host(Box<HostHandshake>),
    Worker(Box<WorkerHandshake>, LookUp),
}

const _: () = assert!(FIRST_FLIGHT <= SECOND_FLIGHT && GREETING <= SECOND_FLIGHT, "one buffer is for all");

impl Handshake {
    pub(super) fn host(key: &Key, purpose: Purpose) -> Handshake {
        let handshake = HostHandshake::new(key, purpose, VERSIONS);
        Handshake { side: Side::Host(Box::new(handshake)), buffer: [0; SECOND_FLIGHT] }
    }

    /// The worker's side, and what it says first.
    pub(super) fn worker(look_up: LookUp) -> Result<(Handshake, [u8; GREETING]), HandshakeError> {
        let handshake = Box::new(WorkerHandshake::new(VERSIONS)?);
        let greeting = handshake.greeting();
        Ok((Handshake { side: Side::Worker(handshake, look_up), buffer: [0; SECOND_FLIGHT] }, greeting))
    }

    /// Never more than the handshake's own bytes: what follows belongs to the inbox.
    pub(super) fn space(&mut self) -> &mut [u8] {
        let wants = match &self.side {
            Side::Host(handshake) => handshake.wants(),
            Side::Worker(handshake, _) => handshake.wants(),
        };
        &mut self.buffer[..wants]
    }

    /// Takes `n` bytes of the buffer: what is to be answered, and what came of it.
    fn received(&mut self, n: usize) -> (Vec<u8>, Result<Option<Established>, HandshakeError>) {
        let mut input = &self.buffer[..n];
        match &mut self.side {
            Side::Host(handshake) => {
                let mut flight = Vec::new();
                let outcome = handshake.receive(&mut input, &mut flight);
                (flight, outcome)
            }
            Side::Worker(handshake, look_up) => match handshake.receive(&mut input, look_up) {
                Some(verdict) => (verdict.answer, verdict.outcome.map(Some)),
                None => (Vec::new(), Ok(None)),
            },
        }
    }
}

impl Endpoint {
    pub(super) fn handshake_received(&mut self, n: usize, now: Instant) {
        let Some(handshake) = &mut self.handshake else { return };
        let (answer, outcome) = handshake.received(n);
        self.outbox.push_bytes(&answer);
        self.said_last = outcome.is_err() && !answer.is_empty();
        match outcome {
            Ok(None) => {}
            Ok(Some(established)) => self.begin_opening(established, now),
            Err(error) => {
                self.finish(LinkErrorKind::Handshake(error));
            }
        }
    }

    fn begin_opening(&mut self, established: Established, now: Instant) {
        self.label = established.label();
        self.version = established.version;
        self.key_id = established.key_id;
        self.connection = crate::connection::Connection::new(self.role, established.purpose);
        self.inbox = Some(Inbox::new(established.opener, OPENING_LIMIT));
        self.outbox.open(established.sealer);
        self.handshake = None;
        self.timers.set(Timer::Opening, self.begun + self.timing.opening);
        self.preparing_ends = Some(now + self.timing.preparing);
        match self.ask.take() {
            None => {}
            Some(Ask::Inquire) => self.say(&Message::Inquire),
            Some(Ask::Serve(need)) => {
                let hello = Terms { version: self.version, ..*need };
                self.say(&Message::Hello(hello.clone()));
                self.hello = Some(hello);
            }
            Some(Ask::Push(offer)) => {
                self.say(&Message::PushOffer(offer.clone()));
                self.push = Some(offer);
            }
            Some(Ask::Pair { name, software }) => self.say(&Message::PairRequest { name, software }),
        }
    }

    /// One message without rows; one that breaks a rule ends the connection, for the answer to it will never come.
    fn say(&mut self, message: &Message<'_>) {
        match self.connection.send(message) {
            Ok(()) => self.outbox.push(message),
            Err(rule) => {
                self.finish(LinkErrorKind::Misuse(rule));
            }
        }
    }

    /// A worker that prepares has as long as it is heard, and [`Timing::preparing`] at most.
    pub(super) fn heartbeat_came(&mut self, status: Status, now: Instant) {
        self.peer_status = Some(status);
        if let (Role::Host, Some(ends), true) =
            (self.role, self.preparing_ends, self.timers.at(Timer::Opening).is_some())
        {
            self.timers.set(Timer::Opening, ends.min(now + self.timing.silence));
        }
    }

    /// What a message that the state allows means for the connection.
    pub(super) fn understood<'a>(
        &mut self,
        message: Message<'a>,
        now: Instant,
    ) -> Result<Message<'a>, LinkErrorKind> {
        match message {
            Message::Error(fault) => Err(self.finish(LinkErrorKind::Fault(fault))),
            Message::Goodbye(why) => Err(self.finish(LinkErrorKind::Goodbye(why))),
            Message::Busy { since_ms, name } => {
                Err(self.finish(LinkErrorKind::Busy { host: name, since_ms }))
            }
            Message::Refuse { reason, terms, text } => {
                let differences = self
                    .hello
                    .as_ref()
                    .filter(|_| reason.is_compared())
                    .map(|hello| terms::agree(hello, &terms).err().unwrap_or_default());
                self.peer_terms.get_or_insert(terms);
                let mismatches = differences.unwrap_or_default();
                Err(self.finish(LinkErrorKind::Refused { reason, mismatches, text }))
            }
            Message::Accept(held) => {
                self.accepted(&held, now)?;
                Ok(Message::Accept(held))
            }
            Message::PushNeed(have) => {
                let offer = self.push.take();
                if let Some(offer) = offer
                    && let Err(rule) = self.connection.begin_push(&offer, &have)
                {
                    return Err(self.broke(rule.into()));
                }
                self.established(now);
                Ok(Message::PushNeed(have))
            }
            Message::Hello(terms) => {
                // it has said what it needs: the rest is this side's to answer
                self.timers.clear(Timer::Opening);
                self.peer_terms = Some(terms.clone());
                Ok(Message::Hello(terms))
            }
            Message::PushOffer(offer) => {
                self.timers.clear(Timer::Opening);
                Ok(Message::PushOffer(offer))
            }
            Message::StepDone(done) => {
                self.traffic.round_trips += 1;
                Ok(Message::StepDone(done))
            }
            Message::StepFailed(failed) => {
                self.traffic.round_trips += 1;
                Ok(Message::StepFailed(failed))
            }
            other => Ok(other),
        }
    }

    /// The worker accepts: does this side?
    fn accepted(&mut self, held: &Terms, now: Instant) -> Result<(), LinkErrorKind> {
        self.peer_terms = Some(held.clone());
        let Some(hello) = self.hello.clone() else {
            let kind = crate::message::Kind::Accept as u8;
            return Err(self.broke(Misbehaved::Unexpected { kind }.into()));
        };
        match terms::agree(&hello, held) {
            Ok(agreed) => {
                self.begin_serving(agreed, now);
                Ok(())
            }
            // a worker that accepts what it should refuse
            Err(mismatches) => Err(self.refuse_for(mismatches, hello)),
        }
    }

    fn begin_serving(&mut self, agreed: Agreed, now: Instant) {
        self.connection.begin_serving(agreed.clone());
        self.agreed = Some(agreed);
        self.established(now);
    }

    /// From here on both sides say that they live.
    fn established(&mut self, now: Instant) {
        if let Some(inbox) = &mut self.inbox {
            inbox.set_limit(self.connection.limit());
        }
        self.timers.clear(Timer::Opening);
        self.timers.set(Timer::Silence, now + self.timing.silence);
        self.timers.set(Timer::Heartbeat, now + super::HEARTBEAT_EVERY);
    }

    // --- a worker's answers

    /// Worker: answers INQUIRE; the version is filled in.
    pub fn offer(&mut self, held: Terms) {
        let version = self.version;
        self.say(&Message::Offer(Terms { version, ..held }));
    }

    /// Worker: answers HELLO. Steps may follow.
    pub fn accept(&mut self, held: Terms, agreed: Agreed, now: Instant) {
        self.say(&Message::Accept(held));
        if self.end.is_none() {
            self.begin_serving(agreed, now);
        }
    }

    /// Either side: does not agree, and leaves. `terms` are its own.
    pub fn refuse(&mut self, reason: Reason, terms: Terms, text: String) {
        self.outbox.push(&Message::Refuse { reason, terms, text });
        self.connection.close();
        self.said_last = true;
        self.timers.clear_all();
    }

    /// Refuses for these differences; `terms` are this side's own.
    pub(crate) fn refuse_for(&mut self, mismatches: Vec<Mismatch>, terms: Terms) -> LinkErrorKind {
        let reason = mismatches.first().map_or(Reason::Version, |m| m.reason);
        let text = refusal_text(&mismatches);
        self.refuse(reason, terms, text.clone());
        self.finish(LinkErrorKind::Refused { reason, mismatches, text })
    }

    /// Worker: serves another host, whose name is `host`, for so long already; and leaves.
    pub fn busy(&mut self, since_ms: u64, host: String) {
        self.say(&Message::Busy { since_ms, name: host });
        self.said_last = true;
        self.timers.clear_all();
    }

    /// Worker: answers PAIR_REQUEST.
    pub fn grant(&mut self, key: &Key, name: String, software: String) {
        self.say(&Message::PairGrant { key: key.clone(), name, software });
    }

    /// Host: has stored the key that it was granted.
    pub fn stored(&mut self) {
        self.say(&Message::PairStored);
    }

    /// The times that hold here.
    pub fn timing(&self) -> &Timing {
        &self.timing
    }
}
