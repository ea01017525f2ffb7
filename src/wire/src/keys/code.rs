//! Pairing codes: 100 random bits that a person carries from the worker's screen to the host, and the time during which
//! one is good.

use std::fmt;

use sha2::{Digest, Sha256};

use super::{Key, KeyError};

/// Crockford's base 32: no I, L, O, U.
pub(super) const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// Characters of a code that are random: 5 bits each.
pub(super) const CODE: usize = 20;

/// A one-time code of 100 random bits that a person carries from the worker's screen to the host.
#[derive(Clone, PartialEq, Eq)]
pub struct PairingCode {
    /// of the alphabet
    pub(super) characters: [u8; CODE],
}

impl PairingCode {
    /// A new random code.
    ///
    /// # Errors
    /// [`KeyError::NoRandomness`] if the system has no random numbers.
    pub fn random() -> Result<PairingCode, KeyError> {
        let mut bytes = [0; CODE];
        getrandom::fill(&mut bytes).map_err(KeyError::no_randomness)?;
        Ok(PairingCode { characters: bytes.map(|b| ALPHABET[usize::from(b % 32)]) })
    }

    /// Reads a code as a person typed it: in any case, with spaces and hyphens, with O for 0 and I or L for
    /// 1.
    ///
    /// # Errors
    /// [`BadCode`], which says what to look at again.
    pub fn parse(text: &str) -> Result<PairingCode, BadCode> {
        let mut characters = Vec::with_capacity(CODE + 1);
        for c in text.trim().chars().filter(|c| !matches!(c, ' ' | '-')) {
            let normal = match c.to_ascii_uppercase() {
                'O' => '0',
                'I' | 'L' => '1',
                other => other,
            };
            let known = ALPHABET.iter().copied().find(|&a| char::from(a) == normal);
            characters.push(known.ok_or(BadCode::Character { character: c })?);
        }
        let length = characters.len();
        let (&check, characters) = characters.split_last().ok_or(BadCode::Length { length })?;
        let characters = characters.try_into().map_err(|_| BadCode::Length { length })?;
        let code = PairingCode { characters };
        if code.check_character() == check { Ok(code) } else { Err(BadCode::Check) }
    }

    /// The key for the one handshake in which the long-term key is handed over.
    pub fn key(&self) -> Key {
        Key(Sha256::new().chain_update(b"dim pairing v1").chain_update(self.characters).finalize().into())
    }

    /// Luhn's check, modulo 32: finds every single wrong character and nearly every swap of two neighbours.
    fn check_character(&self) -> u8 {
        let value = |c: u8| ALPHABET.iter().position(|&a| a == c).unwrap_or(0);
        let mut factor = 2;
        let mut sum = 0;
        for &c in self.characters.iter().rev() {
            let a = factor * value(c);
            sum += a / 32 + a % 32;
            factor = 3 - factor;
        }
        ALPHABET[(32 - sum % 32) % 32]
    }
}

impl fmt::Display for PairingCode {
    /// `ABCDE-FGHJK-MNPQR-STVWXY`, the check character last.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, &c) in self.characters.iter().enumerate() {
            if i > 0 && i % 5 == 0 {
                f.write_str("-")?;
            }
            write!(f, "{}", char::from(c))?;
        }
        write!(f, "{}", char::from(self.check_character()))
    }
}

impl fmt::Debug for PairingCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PairingCode(..)")
    }
}

/// A typed code that cannot be right; nothing has been sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadCode {
    /// Too short or too long.
    #[error("a pairing code has 21 letters and digits, this has {length}")]
    Length {
        /// Characters found, without spaces and hyphens.
        length: usize,
    },
    /// A character no code has.
    #[error("a pairing code has no {character:?}: look at the worker's screen again")]
    Character {
        /// The character.
        character: char,
    },
    /// The last character does not fit the others.
    #[error("the code has a typing error: look at the worker's screen again")]
    Check,
}

/// The time during which a worker accepts one host that knows the code. Time comes from the caller, in
/// milliseconds of any clock.
///
/// Wrong codes are not counted. At a million tries a second for the whole time, one of 2^72 windows would be opened; a
/// count would only let whoever sends five of them take the code from the person who is typing it.
#[derive(Debug)]
pub struct PairingWindow {
    key: Key,
    closes_ms: u64,
}

impl PairingWindow {
    /// How long a code is good for.
    pub const OPEN_MS: u64 = 5 * 60 * 1000;

    /// Opens now.
    pub fn open(code: &PairingCode, now_ms: u64) -> PairingWindow {
        PairingWindow { key: code.key(), closes_ms: now_ms.saturating_add(PairingWindow::OPEN_MS) }
    }

    /// The key to try a handshake with, while it is open.
    pub fn key(&self, now_ms: u64) -> Option<Key> {
        self.is_open(now_ms).then(|| self.key.clone())
    }

    /// The code has had its one use.
    pub fn close(&mut self) {
        self.closes_ms = 0;
    }

    /// Whether a host may still try.
    pub fn is_open(&self, now_ms: u64) -> bool {
        now_ms < self.closes_ms
    }
}
