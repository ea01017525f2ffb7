//! Keys: what they are, the codes that pair two devices, and the directory where they are kept.
//!
//! A [`Key`] is 32 random bytes that one host and one worker share. `--key-file` names a file with one (one
//! line, 64 hexadecimal digits); pairing makes one and leaves it in a [`KeyStore`] on both sides:
//!
//! ```text
//!     $XDG_CONFIG_HOME/dim/keys/  or  ~/.config/dim/keys/      0700
//!         3f9a0c1122334455.key     64 hexadecimal digits       0600
//!         3f9a0c1122334455.json    whom it is shared with      0600
//! ```
//!
//! File names come from the key's id, which this side computed: nothing that a peer said becomes part of a
//! path.

mod code;
mod store;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::{fmt, fs, io};

use sha2::{Digest, Sha256};
use zeroize::Zeroize;

pub use code::{BadCode, PairingCode, PairingWindow};
pub use store::{FoundKey, KeyError, KeyStore, Peer};

/// A secret that one host and one worker share. Not shown by `Debug`, wiped when dropped.
#[derive(Clone)]
pub struct Key([u8; 32]);

impl Key {
    /// A new random key.
    ///
    /// # Errors
    /// [`KeyError::NoRandomness`] if the system has no random numbers.
    pub fn random() -> Result<Key, KeyError> {
        let mut key = Key([0; 32]);
        getrandom::fill(&mut key.0).map_err(KeyError::no_randomness)?;
        Ok(key)
    }

    /// The key with these bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Key {
        Key(bytes)
    }

    /// The secret itself.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// What the key is called on this side, in file names and logs: the first 8 bytes of a hash of it. It never crosses
    /// the wire, where a key is [named](crate::handshake::Named) otherwise each time.
    pub fn id(&self) -> KeyId {
        let digest: [u8; 32] =
            Sha256::new().chain_update(b"dim key id v1").chain_update(self.0).finalize().into();
        let mut id = [0; 8];
        id.copy_from_slice(&digest[..8]);
        KeyId(id)
    }

    /// Reads 64 hexadecimal digits, with nothing around them but white space.
    ///
    /// # Errors
    /// [`BadKey`], without showing any of the text.
    pub fn from_hex(text: &str) -> Result<Key, BadKey> {
        let digits = text.trim().as_bytes();
        if digits.len() != 64 {
            return Err(BadKey::Length { digits: digits.len() });
        }
        let mut key = Key([0; 32]);
        for (at, (byte, pair)) in key.0.iter_mut().zip(digits.chunks_exact(2)).enumerate() {
            let digit = |i: usize| (pair[i] as char).to_digit(16).ok_or(BadKey::Digit { at: 2 * at + i });
            *byte = (digit(0)? * 16 + digit(1)?) as u8;
        }
        Ok(key)
    }

    /// The key as 64 hexadecimal digits.
    pub fn to_hex(&self) -> String {
        self.0.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Reads a `--key-file`.
    ///
    /// # Errors
    /// [`KeyError::Io`] or [`KeyError::BadFile`], naming the file.
    pub fn from_file(path: &Path) -> Result<Key, KeyError> {
        let io = |source| KeyError::Io { path: path.to_owned(), source };
        let mut bytes = Vec::with_capacity(4096);
        // a key file has 65 bytes; one that was confused with a model has gigabytes
        io::Read::read_to_end(&mut io::Read::take(fs::File::open(path).map_err(io)?, 4096), &mut bytes)
            .map_err(io)?;
        let text = std::str::from_utf8(&bytes).map_err(|_| BadKey::NotText);
        let key = text.and_then(Key::from_hex);
        bytes.zeroize();
        key.map_err(|problem| KeyError::BadFile { path: path.to_owned(), problem })
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Looks at every byte, whatever they are.
impl PartialEq for Key {
    fn eq(&self, other: &Key) -> bool {
        self.0.iter().zip(&other.0).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
    }
}

impl Eq for Key {}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.id())
    }
}

/// What a key is called in file names and logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(pub [u8; 8]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// Text that is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadKey {
    /// A file of something else.
    #[error("a key is 64 hexadecimal digits, this is no text")]
    NotText,
    /// Not 64 digits.
    #[error("a key is 64 hexadecimal digits, this has {digits} characters")]
    Length {
        /// Characters found.
        digits: usize,
    },
    /// Not a hexadecimal digit.
    #[error("a key is 64 hexadecimal digits, character {at} (from 0) is none")]
    Digit {
        /// Where.
        at: usize,
    },
}
