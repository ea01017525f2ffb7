//! The handshake, PROTOCOL.md section 3: versions in clear, then `Noise_NNpsk0_25519_ChaChaPoly_SHA256`.
//!
//! ```text
//!     host                                    worker
//!      | preamble 24 | 2 | Noise 1: 48  ------>|  version? key id? tag under the key?   (no curve arithmetic yet)
//!      |<------ answer 24 | 2 | Noise 2: 72    |
//! ```
//!
//! [`HostHandshake`] and [`WorkerHandshake`] take bytes however they are split and never more than theirs, so
//! what follows the handshake stays in the caller's hands. `snow` runs the Noise pattern over `ring`'s cipher
//! and hash; its curve is wrapped here to refuse the all-zero result. The two transport keys then go to
//! [`super::frame`], which seals and opens in place.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use snow::params::{CipherChoice, DHChoice, HashChoice};
use snow::resolvers::{CryptoResolver, DefaultResolver, RingResolver};
use snow::types::{Cipher, Dh, Hash, Random};
use zeroize::Zeroizing;

use crate::error::HandshakeError;
use crate::frame::{Opener, Sealer};
use crate::keys::{Key, KeyId};

/// Both sides' first bytes: not text, and damaged by anything that takes it for text.
pub const MAGIC: [u8; 8] = [0xD1, b'D', b'I', b'M', b'\r', b'\n', 0x1A, b'\n'];
/// Bytes of the host's preamble and of the worker's answer.
pub const PREAMBLE: usize = 8 + 2 + 2 + 1 + 3 + 8;
/// Bytes of the host's first flight: preamble, length, Noise message 1 (key, tag).
pub const FIRST_FLIGHT: usize = PREAMBLE + 2 + MESSAGE_1;
/// Bytes of the worker's answer when it goes on: answer, length, Noise message 2 (key, the answer again,
/// tag).
pub const SECOND_FLIGHT: usize = PREAMBLE + 2 + MESSAGE_2;

const MESSAGE_1: usize = 32 + 16;
const MESSAGE_2: usize = 32 + PREAMBLE + 16;
const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_SHA256";
const PROLOGUE: &[u8] = b"dim wire: host initiates, worker responds";

const _: () = assert!(PREAMBLE == 24 && FIRST_FLIGHT == 74 && SECOND_FLIGHT == 98, "PROTOCOL.md, section 3");

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
    noise: snow::HandshakeState,
    versions: RangeInclusive<u16>,
    purpose: Purpose,
    key_id: KeyId,
    first_flight: [u8; FIRST_FLIGHT],
    answer: Partial<SECOND_FLIGHT>,
}

impl HostHandshake {
    /// Begins a handshake under `key`, offering `versions`.
    ///
    /// # Errors
    /// [`HandshakeError::Crypto`] if the system has no random numbers.
    pub fn new(
        key: &Key,
        purpose: Purpose,
        versions: RangeInclusive<u16>,
    ) -> Result<HostHandshake, HandshakeError> {
        HostHandshake::with_ephemeral(key, purpose, versions, None)
    }

    /// For vectors: with a chosen ephemeral key, which makes the connection's keys known.
    #[doc(hidden)]
    pub fn with_ephemeral(
        key: &Key,
        purpose: Purpose,
        versions: RangeInclusive<u16>,
        ephemeral: Option<&[u8; 32]>,
    ) -> Result<HostHandshake, HandshakeError> {
        let key_id = match purpose {
            Purpose::Key => key.id(),
            Purpose::Pairing => KeyId([0; 8]),
        };
        let preamble = Preamble { versions: versions.clone(), purpose, key_id }.to_bytes();
        let mut noise = build(key, &preamble, ephemeral, Side::Host, Arc::default())?;
        let mut first_flight = [0; FIRST_FLIGHT];
        first_flight[..PREAMBLE].copy_from_slice(&preamble);
        first_flight[PREAMBLE..PREAMBLE + 2].copy_from_slice(&(MESSAGE_1 as u16).to_le_bytes());
        noise.write_message(&[], &mut first_flight[PREAMBLE + 2..]).map_err(crypto)?;
        Ok(HostHandshake { noise, versions, purpose, key_id, first_flight, answer: Partial::new(PREAMBLE) })
    }

    /// What to send first.
    pub fn first_flight(&self) -> &[u8; FIRST_FLIGHT] {
        &self.first_flight
    }

    /// How many bytes of the worker's answer are due at least before anything happens.
    pub fn wants(&self) -> usize {
        self.answer.missing()
    }

    /// Takes bytes off the front of `input`, as many as it needs and no more. `None`: more are needed.
    pub fn receive(&mut self, input: &mut &[u8]) -> Result<Option<Established>, HandshakeError> {
        if !self.answer.take(input) {
            return Ok(None);
        }
        if self.answer.due == PREAMBLE {
            check_answer(self.answer.bytes(), &self.versions)?;
            self.answer.due = PREAMBLE + 2;
        }
        if !self.answer.take(input) {
            return Ok(None);
        }
        if self.answer.due == PREAMBLE + 2 {
            check_noise_length(&self.answer.bytes()[PREAMBLE..], MESSAGE_2)?;
            self.answer.due = SECOND_FLIGHT;
        }
        if !self.answer.take(input) {
            return Ok(None);
        }
        let (answer, message) = self.answer.bytes().split_at(PREAMBLE);
        let mut sealed_answer = [0; PREAMBLE];
        read_noise(&mut self.noise, &message[2..], &mut sealed_answer)?;
        if answer != sealed_answer {
            return Err(HandshakeError::AnswerChanged);
        }
        let version = u16::from_le_bytes([answer[14], answer[15]]);
        Ok(Some(established(&mut self.noise, Side::Host, version, self.purpose, self.key_id)))
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
    flight: Partial<FIRST_FLIGHT>,
    /// once the preamble was read
    preamble: Option<(Preamble, Key)>,
    curve_work: Arc<AtomicU32>,
}

impl WorkerHandshake {
    /// Waits for a host, speaking `versions`.
    pub fn new(versions: RangeInclusive<u16>) -> WorkerHandshake {
        WorkerHandshake {
            versions,
            ephemeral: None,
            flight: Partial::new(PREAMBLE),
            preamble: None,
            curve_work: Arc::default(),
        }
    }

    /// For vectors: with a chosen ephemeral key, which makes the connection's keys known.
    #[doc(hidden)]
    pub fn with_ephemeral(versions: RangeInclusive<u16>, ephemeral: [u8; 32]) -> WorkerHandshake {
        WorkerHandshake { ephemeral: Some(ephemeral), ..WorkerHandshake::new(versions) }
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
    pub fn receive(
        &mut self,
        input: &mut &[u8],
        lookup: impl FnOnce(Purpose, KeyId) -> Lookup,
    ) -> Option<Verdict> {
        // a stranger is known by its first bytes: don't wait for 24
        self.flight.take(input);
        let seen = self.flight.filled.min(MAGIC.len());
        if self.flight.bytes()[..seen] != MAGIC[..seen] {
            return Some(silent(HandshakeError::BadMagic));
        }
        if !self.flight.take(input) {
            return None;
        }
        if self.preamble.is_none() {
            let preamble = match Preamble::read(self.flight.bytes()) {
                Ok(preamble) => preamble,
                Err(error) => return Some(silent(error)),
            };
            let (ours, theirs) = (self.versions.clone(), preamble.versions.clone());
            if theirs.end().min(ours.end()) < theirs.start().max(ours.start()) {
                return Some(self.refuse(Answer::Version, HandshakeError::Version { theirs, ours }));
            }
            let key = match lookup(preamble.purpose, preamble.key_id) {
                Lookup::Found(key) => key,
                Lookup::Unknown => return Some(self.refuse(Answer::Key, HandshakeError::Key)),
                Lookup::NoPairing => return Some(self.refuse(Answer::NoPairing, HandshakeError::NoPairing)),
                Lookup::Crowded => return Some(self.refuse(Answer::Crowded, HandshakeError::Crowded)),
            };
            self.preamble = Some((preamble, key));
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
        let (preamble, key) = self.preamble.take()?;
        Some(match self.respond(&preamble, &key) {
            Ok(verdict) => verdict,
            Err(HandshakeError::Key) => self.refuse(Answer::Key, HandshakeError::Key),
            Err(error) => silent(error),
        })
    }

    fn respond(&self, preamble: &Preamble, key: &Key) -> Result<Verdict, HandshakeError> {
        let preamble_bytes = preamble.to_bytes();
        let curve_work = self.curve_work.clone();
        let mut noise = build(key, &preamble_bytes, self.ephemeral.as_ref(), Side::Worker, curve_work)?;
        read_noise(&mut noise, &self.flight.bytes()[PREAMBLE + 2..], &mut [])?;
        let version = *self.versions.end().min(preamble.versions.end());
        let clear = self.answer(Answer::Go, version);
        let mut answer = vec![0; SECOND_FLIGHT];
        answer[..PREAMBLE].copy_from_slice(&clear);
        answer[PREAMBLE..PREAMBLE + 2].copy_from_slice(&(MESSAGE_2 as u16).to_le_bytes());
        noise.write_message(&clear, &mut answer[PREAMBLE + 2..]).map_err(noise_error)?;
        let outcome = Ok(established(&mut noise, Side::Worker, version, preamble.purpose, preamble.key_id));
        Ok(Verdict { answer, outcome })
    }

    fn refuse(&self, status: Answer, error: HandshakeError) -> Verdict {
        Verdict { answer: self.answer(status, 0).to_vec(), outcome: Err(error) }
    }

    fn answer(&self, status: Answer, version: u16) -> [u8; PREAMBLE] {
        let mut bytes = [0; PREAMBLE];
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

/// The host's first 24 bytes.
#[derive(Clone, Debug)]
struct Preamble {
    versions: RangeInclusive<u16>,
    purpose: Purpose,
    key_id: KeyId,
}

impl Preamble {
    fn to_bytes(&self) -> [u8; PREAMBLE] {
        let mut bytes = [0; PREAMBLE];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.versions.start().to_le_bytes());
        bytes[10..12].copy_from_slice(&self.versions.end().to_le_bytes());
        bytes[12] = self.purpose as u8;
        bytes[16..].copy_from_slice(&self.key_id.0);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Preamble, HandshakeError> {
        let purpose = match bytes[12] {
            0 => Purpose::Key,
            1 => Purpose::Pairing,
            _ => return Err(HandshakeError::BadPreamble),
        };
        let versions = u16::from_le_bytes([bytes[8], bytes[9]])..=u16::from_le_bytes([bytes[10], bytes[11]]);
        let mut key_id = KeyId([0; 8]);
        key_id.0.copy_from_slice(&bytes[16..24]);
        let preamble = Preamble { versions, purpose, key_id };
        let id_without_key = purpose == Purpose::Pairing && key_id.0 != [0; 8];
        // written again it is the same: the reserved bytes were zero
        if preamble.versions.is_empty() || id_without_key || preamble.to_bytes() != bytes {
            return Err(HandshakeError::BadPreamble);
        }
        Ok(preamble)
    }
}

/// Reads the clear part of a worker's answer; `Ok` if it goes on.
fn check_answer(bytes: &[u8], ours: &RangeInclusive<u16>) -> Result<(), HandshakeError> {
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    if bytes[..8] != MAGIC {
        return Err(HandshakeError::BadMagic);
    }
    let (theirs, version) = (word(8)..=word(10), word(14));
    let best = *ours.end().min(theirs.end());
    if theirs.is_empty() || bytes[13] != 0 || bytes[16..24] != [0; 8] {
        return Err(HandshakeError::BadAnswer);
    }
    match bytes[12] {
        s if s == Answer::Go as u8 => match best == version && ours.contains(&best) && theirs.contains(&best)
        {
            true => Ok(()),
            false => Err(HandshakeError::BadAnswer),
        },
        _ if version != 0 => Err(HandshakeError::BadAnswer),
        s if s == Answer::Version as u8 => Err(HandshakeError::Version { theirs, ours: ours.clone() }),
        s if s == Answer::Key as u8 => Err(HandshakeError::Key),
        s if s == Answer::NoPairing as u8 => Err(HandshakeError::NoPairing),
        s if s == Answer::Crowded as u8 => Err(HandshakeError::Crowded),
        _ => Err(HandshakeError::BadAnswer),
    }
}

fn check_noise_length(bytes: &[u8], expected: usize) -> Result<(), HandshakeError> {
    let length = usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
    if length == expected { Ok(()) } else { Err(HandshakeError::NoiseLength { length, expected }) }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Host,
    Worker,
}

fn build(
    key: &Key,
    preamble: &[u8; PREAMBLE],
    ephemeral: Option<&[u8; 32]>,
    side: Side,
    curve_work: Arc<AtomicU32>,
) -> Result<snow::HandshakeState, HandshakeError> {
    let prologue = [PROLOGUE, preamble].concat();
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
    key_id: KeyId,
) -> Established {
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

/// Bytes of a fixed-length exchange, as they come in.
#[derive(Debug)]
struct Partial<const N: usize> {
    bytes: [u8; N],
    filled: usize,
    due: usize,
}

impl<const N: usize> Partial<N> {
    fn new(due: usize) -> Partial<N> {
        Partial { bytes: [0; N], filled: 0, due }
    }

    fn missing(&self) -> usize {
        self.due - self.filled
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }

    /// Takes what is due; whether all of it is there.
    fn take(&mut self, input: &mut &[u8]) -> bool {
        let (now, later) = input.split_at(self.missing().min(input.len()));
        self.bytes[self.filled..self.filled + now.len()].copy_from_slice(now);
        self.filled += now.len();
        *input = later;
        self.filled == self.due
    }
}

/// ring's cipher, hash and random numbers; snow's default curve (ring's cannot be used with a key that is
/// kept), wrapped.
struct Resolver {
    curve_work: Arc<AtomicU32>,
}

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        RingResolver.resolve_rng()
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        let curve = DefaultResolver.resolve_dh(choice)?;
        Some(Box::new(Contributory { curve, curve_work: self.curve_work.clone() }))
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        RingResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        RingResolver.resolve_cipher(choice)
    }
}

/// A curve that refuses a shared secret of zeros: then the peer's key was one of the few points that make the
/// secret independent of ours.
struct Contributory {
    curve: Box<dyn Dh>,
    curve_work: Arc<AtomicU32>,
}

impl Contributory {
    fn worked(&self) {
        self.curve_work.fetch_add(1, Ordering::Relaxed);
    }
}

impl Dh for Contributory {
    fn name(&self) -> &'static str {
        self.curve.name()
    }

    fn pub_len(&self) -> usize {
        self.curve.pub_len()
    }

    fn priv_len(&self) -> usize {
        self.curve.priv_len()
    }

    fn set(&mut self, privkey: &[u8]) {
        self.worked();
        self.curve.set(privkey);
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), snow::Error> {
        self.worked();
        self.curve.generate(rng)
    }

    fn pubkey(&self) -> &[u8] {
        self.curve.pubkey()
    }

    fn privkey(&self) -> &[u8] {
        self.curve.privkey()
    }

    fn dh(&self, pubkey: &[u8], out: &mut [u8]) -> Result<(), snow::Error> {
        self.worked();
        self.curve.dh(pubkey, out)?;
        let shared = &out[..self.curve.pub_len().min(out.len())];
        // every byte is looked at, whatever they are
        match shared.iter().fold(0, |all, b| all | b) {
            0 => Err(snow::Error::Dh),
            _ => Ok(()),
        }
    }
}
