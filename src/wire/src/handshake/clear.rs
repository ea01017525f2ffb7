//! What is said in clear before the Noise messages: fields read and written, no state.

use std::ops::RangeInclusive;

use super::{Answer, GREETING, MAGIC, NONCE, PREAMBLE, Purpose, SALT};
use crate::error::HandshakeError;

/// The host's first bytes.
#[derive(Clone, Debug)]
pub(super) struct Preamble {
    pub(super) versions: RangeInclusive<u16>,
    pub(super) purpose: Purpose,
    pub(super) salt: [u8; SALT],
    /// names the key: see [`Named`](super::Named)
    pub(super) mark: [u8; 8],
}

impl Preamble {
    pub(super) fn to_bytes(&self) -> [u8; PREAMBLE] {
        let mut bytes = [0; PREAMBLE];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.versions.start().to_le_bytes());
        bytes[10..12].copy_from_slice(&self.versions.end().to_le_bytes());
        bytes[12] = self.purpose as u8;
        bytes[16..16 + SALT].copy_from_slice(&self.salt);
        bytes[16 + SALT..].copy_from_slice(&self.mark);
        bytes
    }

    pub(super) fn read(bytes: &[u8]) -> Result<Preamble, HandshakeError> {
        let purpose = match bytes[12] {
            0 => Purpose::Key,
            1 => Purpose::Pairing,
            _ => return Err(HandshakeError::BadPreamble),
        };
        let versions = u16::from_le_bytes([bytes[8], bytes[9]])..=u16::from_le_bytes([bytes[10], bytes[11]]);
        let (mut salt, mut mark) = ([0; SALT], [0; 8]);
        salt.copy_from_slice(&bytes[16..16 + SALT]);
        mark.copy_from_slice(&bytes[16 + SALT..PREAMBLE]);
        let preamble = Preamble { versions, purpose, salt, mark };
        let mark_without_key = purpose == Purpose::Pairing && (salt, mark) != ([0; SALT], [0; 8]);
        // written again it is the same: the reserved bytes were zero
        if preamble.versions.is_empty() || mark_without_key || preamble.to_bytes() != bytes {
            return Err(HandshakeError::BadPreamble);
        }
        Ok(preamble)
    }
}

/// The versions that a worker greets with.
pub(super) fn check_greeting(bytes: &[u8; GREETING]) -> Result<RangeInclusive<u16>, HandshakeError> {
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let versions = word(8)..=word(10);
    match versions.is_empty() || bytes[12..16] != [0; 4] {
        true => Err(HandshakeError::BadGreeting),
        false => Ok(versions),
    }
}

/// The nonce of a greeting.
pub(super) fn nonce_of(greeting: &[u8; GREETING]) -> [u8; NONCE] {
    let mut nonce = [0; NONCE];
    nonce.copy_from_slice(&greeting[GREETING - NONCE..]);
    nonce
}

/// Whether there is a version in common.
pub(super) fn check_versions(
    theirs: &RangeInclusive<u16>,
    ours: &RangeInclusive<u16>,
) -> Result<(), HandshakeError> {
    match theirs.end().min(ours.end()) < theirs.start().max(ours.start()) {
        true => Err(HandshakeError::Version { theirs: theirs.clone(), ours: ours.clone() }),
        false => Ok(()),
    }
}

/// As many bytes as there are of it.
pub(super) fn check_magic(bytes: &[u8]) -> Result<(), HandshakeError> {
    let seen = bytes.len().min(MAGIC.len());
    if bytes[..seen] == MAGIC[..seen] { Ok(()) } else { Err(HandshakeError::BadMagic) }
}

pub(super) fn random<const N: usize>() -> Result<[u8; N], HandshakeError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| HandshakeError::Crypto(e.to_string()))?;
    Ok(bytes)
}

/// As many bytes as there are of it.; `Ok` if it goes on. It greeted with the versions `greeted`.
pub(super) fn check_answer(
    bytes: &[u8],
    ours: &RangeInclusive<u16>,
    greeted: &RangeInclusive<u16>,
) -> Result<(), HandshakeError> {
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    check_magic(bytes)?;
    let (theirs, version) = (word(8)..=word(10), word(14));
    let best = *ours.end().min(theirs.end());
    if theirs != *greeted || bytes[13] != 0 || bytes[16..24] != [0; 8] {
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

pub(super) fn check_noise_length(bytes: &[u8], expected: usize) -> Result<(), HandshakeError> {
    let length = usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
    if length == expected { Ok(()) } else { Err(HandshakeError::NoiseLength { length, expected }) }
}

/// Bytes of a fixed-length exchange, as they come in.
#[derive(Debug)]
pub(super) struct Partial<const N: usize> {
    pub(super) bytes: [u8; N],
    pub(super) filled: usize,
    pub(super) due: usize,
}

impl<const N: usize> Partial<N> {
    pub(super) fn new(due: usize) -> Partial<N> {
        Partial { bytes: [0; N], filled: 0, due }
    }

    pub(super) fn missing(&self) -> usize {
        self.due - self.filled
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }

    pub(super) fn is_whole(&self) -> bool {
        self.filled == self.due
    }

    /// Takes what is due; whether all of it is there.
    pub(super) fn take(&mut self, input: &mut &[u8]) -> bool {
        let (now, later) = input.split_at(self.missing().min(input.len()));
        self.bytes[self.filled..self.filled + now.len()].copy_from_slice(now);
        self.filled += now.len();
        *input = later;
        self.is_whole()
    }
}
