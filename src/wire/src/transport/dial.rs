//! A host's way to a worker: dial, handshake, compare terms.

use std::io::ErrorKind;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::link::{self, Link, Parts};
use super::{LinkError, Timing, described, no_way, refusal_text, tcp};
use crate::VERSIONS;
use crate::connection::{Connection, Role};
use crate::error::{HandshakeError, Misbehaved, ReceiveError};
use crate::frame::{Inbox, Outgoing, Sealer};
use crate::handshake::{Established, HostHandshake, Purpose};
use crate::keys::{Key, PairingCode};
use crate::message::{Message, PushOffer};
use crate::terms::{self, OPENING_LIMIT, Reason, Terms};

/// Connects to the worker at `address` (`host:port`) and agrees on `need`; its `version` is filled in.
///
/// # Errors
/// [`LinkError`]; [`LinkError::may_pass`] tells which are worth trying again.
pub fn dial(address: &str, key: &Key, need: &Terms, timing: &Timing) -> Result<Link, LinkError> {
    let mut opening = Opening::dial(address, key, Purpose::Key, timing)?;
    let hello = Terms { version: opening.version, ..need.clone() };
    opening.send(&Message::Hello(hello.clone()))?;
    let held = match opening.answer(Some(&hello))? {
        Message::Accept(terms) => terms,
        other => {
            let kind = other.kind() as u8;
            return Err(opening.broke(Misbehaved::Unexpected { kind }.into()));
        }
    };
    let peer = described(&held, address);
    match terms::agree(&hello, &held) {
        Ok(agreed) => link::start(opening.into_parts(peer, agreed, held), None),
        Err(mismatches) => {
            // a worker that accepts what it should refuse
            let reason = mismatches.first().map_or(Reason::Version, |m| m.reason);
            let text = refusal_text(&mismatches);
            opening.refuse(reason, hello, text.clone());
            Err(LinkError::Refused { peer, reason, mismatches, text })
        }
    }
}

/// Offers files to the worker at `address`: the connection, and how many bytes of each it has already.
///
/// # Errors
/// As of [`dial`].
pub(super) fn offer(
    address: &str,
    key: &Key,
    offer: &PushOffer,
    timing: &Timing,
) -> Result<(Opening, Vec<u64>), LinkError> {
    let mut opening = Opening::dial(address, key, Purpose::Key, timing)?;
    opening.send(&Message::PushOffer(offer.clone()))?;
    let have = match opening.answer(None)? {
        Message::PushNeed(have) => have,
        other => {
            let kind = other.kind() as u8;
            return Err(opening.broke(Misbehaved::Unexpected { kind }.into()));
        }
    };
    match opening.connection.begin_push(offer, &have) {
        Ok(()) => Ok((opening, have)),
        Err(error) => Err(opening.broke(error.into())),
    }
}

/// Asks the worker at `address` what it holds, without being served, and also while it serves another host.
///
/// # Errors
/// As of [`dial`].
pub fn inquire(address: &str, key: &Key, timing: &Timing) -> Result<Terms, LinkError> {
    let mut opening = Opening::dial(address, key, Purpose::Key, timing)?;
    opening.send(&Message::Inquire)?;
    loop {
        match opening.receive("answer")? {
            Message::Offer(terms) => {
                let _ = opening.send(&Message::Goodbye(crate::message::Farewell::Finished));
                return Ok(terms);
            }
            Message::Heartbeat(_) => {}
            other => {
                let kind = other.kind() as u8;
                return Err(opening.broke(Misbehaved::Unexpected { kind }.into()));
            }
        }
    }
}

/// Pairs with the worker at `address`, which shows `code`. `store` is given the new key and the worker's
/// name, and the worker is told only after it has returned; both are also the result.
///
/// # Errors
/// As of [`dial`], and what `store` returns.
pub fn pair(
    address: &str,
    code: &PairingCode,
    name: &str,
    software: &str,
    timing: &Timing,
    store: impl FnOnce(&Key, &str) -> Result<(), LinkError>,
) -> Result<(Key, String), LinkError> {
    let mut opening = Opening::dial(address, &code.key(), Purpose::Pairing, timing)?;
    opening.send(&Message::PairRequest { name: name.to_owned(), software: software.to_owned() })?;
    let (key, worker) = loop {
        match opening.receive("hand over a key")? {
            Message::PairGrant { key, name, .. } => break (Key::from_bytes(key), name),
            Message::Heartbeat(_) => {}
            other => {
                let kind = other.kind() as u8;
                return Err(opening.broke(Misbehaved::Unexpected { kind }.into()));
            }
        }
    };
    store(&key, &worker)?;
    opening.send(&Message::PairStored)?;
    tcp::close_gently(&opening.stream);
    Ok((key, worker))
}

fn is_comparison(reason: Reason) -> bool {
    reason <= Reason::TooLarge
}

/// An encrypted connection on which nothing has been agreed yet, of either side. Everything on it has one
/// deadline.
pub(super) struct Opening {
    pub stream: TcpStream,
    pub peer: String,
    pub connection: Connection,
    pub deadline: Instant,
    pub version: u16,
    label: String,
    begun: Instant,
    pub sealer: Sealer,
    pub inbox: Inbox,
    out: Vec<u8>,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub timing: Timing,
}

impl Opening {
    fn dial(address: &str, key: &Key, purpose: Purpose, timing: &Timing) -> Result<Opening, LinkError> {
        let begun = Instant::now();
        let deadline = begun + timing.opening;
        let unreachable =
            |e: std::io::Error| LinkError::Unreachable { address: address.to_owned(), text: no_way(&e) };
        let stream = tcp::connect(address, deadline).map_err(unreachable)?;
        tcp::configure(&stream, timing.stalled_write).map_err(unreachable)?;

        let failed = |error| LinkError::Handshake { peer: address.to_owned(), error };
        let mut handshake = HostHandshake::new(key, purpose, VERSIONS).map_err(failed)?;
        let lost = |e: std::io::Error| match e.kind() {
            ErrorKind::TimedOut => LinkError::Deadline {
                peer: address.to_owned(),
                what: "answer the handshake",
                ms: timing.opening.as_millis() as u64,
            },
            _ => LinkError::Broken { peer: address.to_owned(), text: e.to_string() },
        };
        tcp::write_until(&stream, handshake.first_flight(), deadline).map_err(lost)?;
        let mut received = 0;
        let established = loop {
            let mut buffer = [0; crate::handshake::SECOND_FLIGHT];
            // never more than the handshake's own bytes: what follows belongs to the inbox
            let n = tcp::read_until(&stream, &mut buffer[..handshake.wants()], deadline).map_err(lost)?;
            if n == 0 {
                return Err(LinkError::Closed { peer: address.to_owned() });
            }
            received += n as u64;
            let mut input = &buffer[..n];
            if let Some(established) = handshake.receive(&mut input).map_err(failed)? {
                break established;
            }
        };
        let sent = handshake.first_flight().len() as u64;
        Ok(Opening::new(stream, address.to_owned(), Role::Host, established, begun, timing, (sent, received)))
    }

    /// What a handshake has established; `bytes` were sent and received for it.
    pub fn new(
        stream: TcpStream,
        peer: String,
        role: Role,
        established: Established,
        begun: Instant,
        timing: &Timing,
        bytes: (u64, u64),
    ) -> Opening {
        Opening {
            stream,
            peer,
            connection: Connection::new(role, established.purpose),
            deadline: begun + timing.opening,
            version: established.version,
            label: established.label(),
            begun,
            sealer: established.sealer,
            inbox: Inbox::new(established.opener, OPENING_LIMIT),
            out: Vec::new(),
            bytes_sent: bytes.0,
            bytes_received: bytes.1,
            timing: timing.clone(),
        }
    }

    /// Sends one message.
    pub fn send(&mut self, message: &Message<'_>) -> Result<(), LinkError> {
        self.connection.send(message).map_err(LinkError::Misuse)?;
        self.write(message)
    }

    fn write(&mut self, message: &Message<'_>) -> Result<(), LinkError> {
        let mut plain = Vec::new();
        message.encode(&mut plain);
        self.out.clear();
        let mut outgoing = Outgoing::new(&plain, &[]);
        let broken = |peer: &str, text: String| LinkError::Broken { peer: peer.to_owned(), text };
        while self.sealer.seal(&mut outgoing, &mut self.out).map_err(|e| broken(&self.peer, e.to_string()))? {
        }
        zeroize::Zeroize::zeroize(&mut plain);
        tcp::write_until(&self.stream, &self.out, self.deadline.max(Instant::now() + LAST_WORDS))
            .map_err(|e| broken(&self.peer, e.to_string()))?;
        self.bytes_sent += self.out.len() as u64;
        Ok(())
    }

    /// The next message; after an error the peer has been told, if it is to be.
    pub fn receive(&mut self, what: &'static str) -> Result<Message<'static>, LinkError> {
        self.inbox.release();
        loop {
            match self.inbox.poll() {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => return Err(self.broke(error.into())),
            }
            match tcp::read_until(&self.stream, self.inbox.space(), self.deadline) {
                Ok(0) => return Err(LinkError::Closed { peer: self.peer.clone() }),
                Ok(n) => {
                    self.inbox.filled(n);
                    self.bytes_received += n as u64;
                }
                Err(e) if e.kind() == ErrorKind::TimedOut => {
                    let ms = self.deadline.saturating_duration_since(self.begun).as_millis() as u64;
                    return Err(LinkError::Deadline { peer: self.peer.clone(), what, ms });
                }
                Err(e) => return Err(LinkError::Broken { peer: self.peer.clone(), text: e.to_string() }),
            }
        }
        let received = self.connection.receive(self.inbox.message()).map(|m| (m.kind(), m.into_owned()));
        match received {
            Ok((_, Some(Message::Error(fault)))) => Err(LinkError::Fault { peer: self.peer.clone(), fault }),
            Ok((_, Some(Message::Goodbye(why)))) => Err(LinkError::Goodbye { peer: self.peer.clone(), why }),
            Ok((_, Some(message))) => Ok(message),
            Ok((kind, None)) => Err(self.broke(Misbehaved::Unexpected { kind: kind as u8 }.into())),
            Err(error) => Err(self.broke(error)),
        }
    }

    /// The worker's answer to HELLO or PUSH_OFFER. A worker that prepares has as long as it is heard, and
    /// [`Timing::preparing`] at most. `hello` is what a REFUSE is compared with.
    fn answer(&mut self, hello: Option<&Terms>) -> Result<Message<'static>, LinkError> {
        let preparing_ends = Instant::now() + self.timing.preparing;
        loop {
            match self.receive("answer")? {
                Message::Heartbeat(_) => {
                    self.deadline = preparing_ends.min(Instant::now() + self.timing.silence);
                }
                Message::Refuse { reason, terms, text } => {
                    let differences = hello.and_then(|hello| terms::agree(hello, &terms).err());
                    let mismatches = differences.filter(|_| is_comparison(reason)).unwrap_or_default();
                    let peer = described(&terms, &self.peer);
                    return Err(LinkError::Refused { peer, reason, mismatches, text });
                }
                Message::Busy { since_ms, name } => {
                    return Err(LinkError::Busy { peer: self.peer.clone(), host: name, since_ms });
                }
                other => return Ok(other),
            }
        }
    }

    /// Tells the peer which rule it broke, if it is to be told, and closes.
    pub fn broke(&mut self, error: ReceiveError) -> LinkError {
        if let Some(code) = error.code() {
            let fault = crate::message::Fault::new(code, format!("{error} ({})", error.rule()));
            let _ = self.write(&Message::Error(fault));
        }
        tcp::close_gently(&self.stream);
        LinkError::Broke { peer: self.peer.clone(), error }
    }

    /// Refuses and closes.
    pub fn refuse(&mut self, reason: Reason, terms: Terms, text: String) {
        let _ = self.write(&Message::Refuse { reason, terms, text });
        self.connection.close();
        tcp::close_gently(&self.stream);
    }

    /// What a link is made of.
    pub fn into_parts(self, peer: String, agreed: terms::Agreed, peer_terms: Terms) -> Parts {
        let mut inbox = self.inbox;
        inbox.release();
        Parts {
            stream: self.stream,
            peer,
            label: self.label,
            agreed,
            peer_terms,
            timing: self.timing,
            connection: self.connection,
            sealer: self.sealer,
            inbox,
            bytes_sent: self.bytes_sent,
            bytes_received: self.bytes_received,
        }
    }
}

/// How long a last message may take to be written after the deadline has passed.
const LAST_WORDS: Duration = Duration::from_millis(200);

impl From<HandshakeError> for LinkError {
    fn from(error: HandshakeError) -> LinkError {
        LinkError::Handshake { peer: "the peer".to_owned(), error }
    }
}
