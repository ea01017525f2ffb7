//! The handshake, PROTOCOL.md section 3: a fresh nonce and versions in clear, then
//! `Noise_NNpsk0_25519_ChaChaPoly_SHA256`.
//!
//! ```text
//!     host                                    worker
//!      |<------------------------- greeting 32 |  versions, a nonce
//!      | preamble 32 | 2 | Noise 1: 48  ------>|  version? whose key? tag under it?   (no curve arithmetic yet)
//!      |<------ answer 24 | 2 | Noise 2: 72    |
//! ```
//!
//! The nonce is in everything that follows: what was overheard of one handshake opens no other, and a key is named
//! otherwise in each ([`Named`]).
//!
//! [`HostHandshake`] and [`WorkerHandshake`] take bytes however they are split and never more than theirs, so
//! what follows the handshake stays in the caller's hands. `snow` runs the Noise pattern over `ring`'s cipher
//! and hash; its curve is wrapped here to refuse the all-zero result. The two transport keys then go to
//! [`super::frame`], which seals and opens in place.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

mod clear;
mod curve;
mod named;

use zeroize::Zeroizing;

use crate::error::HandshakeError;
use crate::frame::{Opener, Sealer};
use crate::keys::{Key, KeyId};
use clear::{
    Partial, Preamble, check_answer, check_greeting, check_magic, check_noise_length, check_versions,
    nonce_of, random,
};
use curve::Resolver;
pub use named::Named;

/// Both sides' first bytes: not text, and damaged by anything that takes it for text.
pub const MAGIC: [u8; 8] = [0xD1, b'D', b'I', b'M', b'\r', b'\n', 0x1A, b'\n'];
/// Bytes of the worker's nonce.
pub const NONCE: usize = 16;
/// Bytes of the host's salt.
pub const SALT: usize = 8;
/// Bytes of the worker's greeting.
pub const GREETING: usize = 8 + 2 + 2 + 4 + NONCE;
/// Bytes of the host's preamble.
pub const PREAMBLE: usize = 8 + 2 + 2 + 1 + 3 + SALT + 8;
/// Bytes of the clear part of the worker's answer.
pub const ANSWER: usize = 8 + 2 + 2 + 1 + 1 + 2 + 8;
/// Bytes of the host's first flight: preamble, length, Noise message 1 (key, tag).
pub const FIRST_FLIGHT: usize = PREAMBLE + 2 + MESSAGE_1;
/// Bytes of the worker's answer when it goes on: answer, length, Noise message 2 (key, the answer again,
/// tag).
pub const SECOND_FLIGHT: usize = ANSWER + 2 + MESSAGE_2;

const MESSAGE_1: usize = 32 + 16;
const MESSAGE_2: usize = 32 + ANSWER + 16;
const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_SHA256";
const PROLOGUE: &[u8] = b"dim wire: host initiates, worker responds";

const _: () = assert!(GREETING == 32 && PREAMBLE == 32 && ANSWER == 24, "PROTOCOL.md, section 3");
const _: () = assert!(FIRST_FLIGHT == 82 && SECOND_FLIGHT == 98, "PROTOCOL.md, section 3");

/// What the key of a handshake is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Purpose {
    /// The long-term key of this pair.
    Key = 0,
    /// The key made from a one-time code.
    Pairing = 1,
}

/// The worker's status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
enum Answer {
    Go = 0,
    Version = 1,
    Key = 2,
    NoPairing = 3,
    Crowded = 4,
}

/// What a handshake leaves.
pub struct Established {
    /// Seals what this side sends.
    pub sealer: Sealer,
    /// Opens what the peer sends.
    pub opener: Opener,
    /// The version chosen.
    pub version: u16,
    /// What the key was.
    pub purpose: Purpose,
    /// The key's id; zeros when pairing.
    pub key_id: KeyId,
    /// The same on both sides and on no other connection.
    pub hash: [u8; 32],
}

impl Established {
    /// This connection's name in logs, the same on both sides.
    pub fn label(&self) -> String {
        self.hash[..8].iter().map(|b| format!("{b:02x}")).collect()
    }
}

impl std::fmt::Debug for Established {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Established")
            .field("label", &self.label())
            .field("version", &self.version)
            .field("purpose", &self.purpose)
            .field("key_id", &self.key_id)
            .finish_non_exhaustive()
    }
}

/// The host's side of a handshake.
pub struct HostHandshake {
    key: Key,
    versions: RangeInclusive<u16>,
    purpose: Purpose,
    /// for vectors: the salt and the ephemeral key
    secrets: Option<([u8; SALT], [u8; 32])>,
    greeting: Partial<GREETING>,
    /// once the worker has greeted
    noise: Option<snow::HandshakeState>,
    /// the versions that it speaks
    theirs: RangeInclusive<u16>,
    answer: Partial<SECOND_FLIGHT>,
}

impl HostHandshake {
    /// Waits for a worker's greeting, to begin a handshake under `key`, speaking `versions`.
    pub fn new(key: &Key, purpose: Purpose, versions: RangeInclusive<u16>) -> HostHandshake {
        HostHandshake {
            key: key.clone(),
            theirs: versions.clone(),
            versions,
            purpose,
            secrets: None,
            greeting: Partial::new(GREETING),
            noise: None,
            answer: Partial::new(ANSWER),
        }
    }

    /// For vectors: with a chosen salt and ephemeral key, which makes the connection's keys known.
    #[doc(hidden)]
    pub fn with_secrets(
        key: &Key,
        purpose: Purpose,
        versions: RangeInclusive<u16>,
        salt: [u8; SALT],
        ephemeral: [u8; 32],
    ) -> HostHandshake {
        HostHandshake { secrets: Some((salt, ephemeral)), ..HostHandshake::new(key, purpose, versions) }
    }

    /// How many bytes of the worker are due at least before anything happens.
    pub fn wants(&self) -> usize {
        if self.noise.is_none() { self.greeting.missing() } else { self.answer.missing() }
    }

    /// Takes bytes off the front of `input`, as many as it needs and no more; what is to be sent is appended to `out`.
    /// `None`: more are needed.
    ///
    /// # Errors
    /// The rule that the worker broke, or why it does not let this host in; [`HandshakeError::Crypto`] if the system has
    /// no random numbers.
    pub fn receive(
        &mut self,
        input: &mut &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Established>, HandshakeError> {
        if self.noise.is_none() {
            // who is none of ours is known by its first bytes
            let is_whole = self.greeting.take(input);
            check_magic(self.greeting.bytes())?;
            if !is_whole {
                return Ok(None);
            }
            self.greeted(out)?;
        }
        if !self.answer.take(input) {
            return Ok(None);
        }
        if self.answer.due == ANSWER {
            check_answer(self.answer.bytes(), &self.versions, &self.theirs)?;
            self.answer.due = ANSWER + 2;
        }
        if !self.answer.take(input) {
            return Ok(None);
        }
        if self.answer.due == ANSWER + 2 {
            check_noise_length(&self.answer.bytes()[ANSWER..], MESSAGE_2)?;
            self.answer.due = SECOND_FLIGHT;
        }
        if !self.answer.take(input) {
            return Ok(None);
        }
        self.finish().map(Some)
    }

    /// The worker has greeted: the first flight.
    fn greeted(&mut self, out: &mut Vec<u8>) -> Result<(), HandshakeError> {
        let greeting = self.greeting.bytes;
        self.theirs = check_greeting(&greeting)?;
        check_versions(&self.theirs, &self.versions)?;
        let salt = match (self.purpose, self.secrets) {
            (Purpose::Pairing, _) => [0; SALT],
            (Purpose::Key, Some((salt, _))) => salt,
            (Purpose::Key, None) => random()?,
        };
        let mut named = Named { purpose: self.purpose, salt, mark: [0; 8], nonce: nonce_of(&greeting) };
        if self.purpose == Purpose::Key {
            named.mark = named.mark_of(&self.key);
        }
        let preamble =
            Preamble { versions: self.versions.clone(), purpose: self.purpose, salt, mark: named.mark };
        let preamble = preamble.to_bytes();
        let ephemeral = self.secrets.as_ref().map(|(_, ephemeral)| ephemeral);
        let mut noise = build(&self.key, &greeting, &preamble, ephemeral, Side::Host, Arc::default())?;
        let mut flight = [0; FIRST_FLIGHT];
        flight[..PREAMBLE].copy_from_slice(&preamble);
        flight[PREAMBLE..PREAMBLE + 2].copy_from_slice(&(MESSAGE_1 as u16).to_le_bytes());
        noise.write_message(&[], &mut flight[PREAMBLE + 2..]).map_err(crypto)?;
        out.extend_from_slice(&flight);
        self.noise = Some(noise);
        Ok(())
    }

    fn finish(&mut self) -> Result<Established, HandshakeError> {
        let mut noise = self.noise.take().ok_or(HandshakeError::BadAnswer)?;
        let (answer, message) = self.answer.bytes().split_at(ANSWER);
        let mut sealed_answer = [0; ANSWER];
        read_noise(&mut noise, &message[2..], &mut sealed_answer)?;
        if answer != sealed_answer {
            return Err(HandshakeError::AnswerChanged);
        }
        let version = u16::from_le_bytes([answer[14], answer[15]]);
        Ok(established(&mut noise, Side::Host, version, self.purpose, &self.key))
    }
}

/// What a worker knows about the key that a host names.
#[derive(Clone, Debug)]
pub enum Lookup {
    /// This is it.
    Found(Key),
    /// No key has this id.
    Unknown,
    /// No pairing is open.
    NoPairing,
    /// Too many handshakes are under way.
    Crowded,
}

/// What a worker sends to a peer, if anything, and what became of the handshake.
#[derive(Debug)]
pub struct Verdict {
    /// Bytes to send; empty: close without a word.
    pub answer: Vec<u8>,
    /// The connection, or why there is none.
    pub outcome: Result<Established, HandshakeError>,
}

/// The worker's side of a handshake.
pub struct WorkerHandshake {
    versions: RangeInclusive<u16>,
    ephemeral: Option<[u8; 32]>,
    nonce: [u8; NONCE],
    flight: Partial<FIRST_FLIGHT>,
    curve_work: Arc<AtomicU32>,
}

impl WorkerHandshake {
    /// Greets a host and waits for it, speaking `versions`.
    ///
    /// # Errors
    /// [`HandshakeError::Crypto`] if the system has no random numbers.
    pub fn new(versions: RangeInclusive<u16>) -> Result<WorkerHandshake, HandshakeError> {
        Ok(WorkerHandshake::with_nonce(versions, random()?))
    }

    pub(crate) fn with_nonce(versions: RangeInclusive<u16>, nonce: [u8; NONCE]) -> WorkerHandshake {
        let (flight, curve_work) = (Partial::new(PREAMBLE), Arc::default());
        WorkerHandshake { versions, ephemeral: None, nonce, flight, curve_work }
    }

    /// For vectors: with a chosen nonce and ephemeral key, which make the connection's keys known.
    #[doc(hidden)]
    pub fn with_secrets(
        versions: RangeInclusive<u16>,
        nonce: [u8; NONCE],
        ephemeral: [u8; 32],
    ) -> WorkerHandshake {
        WorkerHandshake { ephemeral: Some(ephemeral), ..WorkerHandshake::with_nonce(versions, nonce) }
    }

    /// What to send first, before anything has come.
    pub fn greeting(&self) -> [u8; GREETING] {
        let mut bytes = [0; GREETING];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.versions.start().to_le_bytes());
        bytes[10..12].copy_from_slice(&self.versions.end().to_le_bytes());
        bytes[GREETING - NONCE..].copy_from_slice(&self.nonce);
        bytes
    }

    /// How many bytes of the host's first flight are due at least before anything happens.
    pub fn wants(&self) -> usize {
        self.flight.missing()
    }

    /// How many operations on the curve this handshake has cost so far.
    pub fn curve_work(&self) -> u32 {
        self.curve_work.load(Ordering::Relaxed)
    }

    /// Takes bytes off the front of `input`, as many as it needs and no more; asks `lookup` once for the key.
    /// `None`: more bytes are needed. Not to be called again after a verdict.
    pub fn receive(&mut self, input: &mut &[u8], lookup: impl FnOnce(&Named) -> Lookup) -> Option<Verdict> {
        // a stranger is known by its first bytes: don't wait for 24
        self.flight.take(input);
        if let Err(error) = check_magic(self.flight.bytes()) {
            return Some(silent(error));
        }
        if self.flight.due == PREAMBLE {
            if !self.flight.is_whole() {
                return None;
            }
            if let Err(error) = self.check_preamble() {
                return Some(match error {
                    HandshakeError::Version { .. } => self.refuse(Answer::Version, error),
                    error => silent(error),
                });
            }
            self.flight.due = PREAMBLE + 2;
        }
        if !self.flight.take(input) {
            return None;
        }
        if self.flight.due == PREAMBLE + 2 {
            if let Err(error) = check_noise_length(&self.flight.bytes()[PREAMBLE..], MESSAGE_1) {
                return Some(silent(error));
            }
            self.flight.due = FIRST_FLIGHT;
        }
        if !self.flight.take(input) {
            return None;
        }
        Some(match self.respond(lookup) {
            Ok(verdict) => verdict,
            Err(HandshakeError::Key) => self.refuse(Answer::Key, HandshakeError::Key),
            Err(HandshakeError::NoPairing) => self.refuse(Answer::NoPairing, HandshakeError::NoPairing),
            Err(HandshakeError::Crowded) => self.refuse(Answer::Crowded, HandshakeError::Crowded),
            Err(error) => silent(error),
        })
    }

    fn check_preamble(&self) -> Result<(), HandshakeError> {
        check_versions(&Preamble::read(&self.flight.bytes()[..PREAMBLE])?.versions, &self.versions)
    }

    fn respond(&self, lookup: impl FnOnce(&Named) -> Lookup) -> Result<Verdict, HandshakeError> {
        let flight = &self.flight.bytes;
        let preamble = Preamble::read(&flight[..PREAMBLE])?;
        let Preamble { purpose, salt, mark, .. } = preamble;
        let named = Named { purpose, salt, mark, nonce: self.nonce };
        let key = match lookup(&named) {
            Lookup::Found(key) => key,
            Lookup::Unknown => return Err(HandshakeError::Key),
            Lookup::NoPairing => return Err(HandshakeError::NoPairing),
            Lookup::Crowded => return Err(HandshakeError::Crowded),
        };
        let curve_work = self.curve_work.clone();
        let (greeting, bytes) = (self.greeting(), preamble.to_bytes());
        let mut noise = build(&key, &greeting, &bytes, self.ephemeral.as_ref(), Side::Worker, curve_work)?;
        read_noise(&mut noise, &flight[PREAMBLE + 2..], &mut [])?;
        let version = *self.versions.end().min(preamble.versions.end());
        let clear = self.answer(Answer::Go, version);
        let mut answer = vec![0; SECOND_FLIGHT];
        answer[..ANSWER].copy_from_slice(&clear);
        answer[ANSWER..ANSWER + 2].copy_from_slice(&(MESSAGE_2 as u16).to_le_bytes());
        noise.write_message(&clear, &mut answer[ANSWER + 2..]).map_err(noise_error)?;
        let outcome = Ok(established(&mut noise, Side::Worker, version, preamble.purpose, &key));
        Ok(Verdict { answer, outcome })
    }

    fn refuse(&self, status: Answer, error: HandshakeError) -> Verdict {
        Verdict { answer: self.answer(status, 0).to_vec(), outcome: Err(error) }
    }

    fn answer(&self, status: Answer, version: u16) -> [u8; ANSWER] {
        let mut bytes = [0; ANSWER];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.versions.start().to_le_bytes());
        bytes[10..12].copy_from_slice(&self.versions.end().to_le_bytes());
        bytes[12] = status as u8;
        bytes[14..16].copy_from_slice(&version.to_le_bytes());
        bytes
    }
}

fn silent(error: HandshakeError) -> Verdict {
    Verdict { answer: Vec::new(), outcome: Err(error) }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Host,
    Worker,
}

fn build(
    key: &Key,
    greeting: &[u8; GREETING],
    preamble: &[u8; PREAMBLE],
    ephemeral: Option<&[u8; 32]>,
    side: Side,
    curve_work: Arc<AtomicU32>,
) -> Result<snow::HandshakeState, HandshakeError> {
    let prologue = [PROLOGUE, greeting, preamble].concat();
    let pattern = PATTERN.parse().map_err(crypto)?;
    let builder = snow::Builder::with_resolver(pattern, Box::new(Resolver { curve_work }));
    let builder = builder.prologue(&prologue).map_err(crypto)?.psk(0, key.bytes()).map_err(crypto)?;
    let builder = match ephemeral {
        Some(e) => builder.fixed_ephemeral_key_for_testing_only(e),
        None => builder,
    };
    match side {
        Side::Host => builder.build_initiator(),
        Side::Worker => builder.build_responder(),
    }
    .map_err(crypto)
}

fn read_noise(
    noise: &mut snow::HandshakeState,
    message: &[u8],
    payload: &mut [u8],
) -> Result<(), HandshakeError> {
    noise.read_message(message, payload).map(|_| ()).map_err(noise_error)
}

fn noise_error(error: snow::Error) -> HandshakeError {
    match error {
        snow::Error::Decrypt => HandshakeError::Key,
        snow::Error::Dh => HandshakeError::ZeroDh,
        other => crypto(other),
    }
}

fn crypto(error: snow::Error) -> HandshakeError {
    HandshakeError::Crypto(error.to_string())
}

fn established(
    noise: &mut snow::HandshakeState,
    side: Side,
    version: u16,
    purpose: Purpose,
    key: &Key,
) -> Established {
    let key_id = match purpose {
        Purpose::Key => key.id(),
        Purpose::Pairing => KeyId([0; 8]),
    };
    let mut hash = [0; 32];
    hash.copy_from_slice(noise.get_handshake_hash());
    let (host, worker) = noise.dangerously_get_raw_split();
    let (host, worker) = (Zeroizing::new(host), Zeroizing::new(worker));
    let (seal, open) = match side {
        Side::Host => (&host, &worker),
        Side::Worker => (&worker, &host),
    };
    Established { sealer: Sealer::new(seal), opener: Opener::new(open), version, purpose, key_id, hash }
}
