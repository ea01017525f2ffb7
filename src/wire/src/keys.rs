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

use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zeroize::Zeroize;

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

    /// What the key is called in clear: the first 8 bytes of a hash of it.
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
        let mut text = String::new();
        // a key file has 65 bytes; one that was confused with a model has gigabytes
        io::Read::read_to_string(&mut io::Read::take(fs::File::open(path).map_err(io)?, 4096), &mut text)
            .map_err(io)?;
        let key =
            Key::from_hex(&text).map_err(|problem| KeyError::BadFile { path: path.to_owned(), problem });
        text.zeroize();
        key
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.id())
    }
}

/// What a key is called in clear.
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

/// Crockford's base 32: no I, L, O, U.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// Characters of a code that are random: 5 bits each.
const CODE: usize = 20;

/// A one-time code of 100 random bits that a person carries from the worker's screen to the host.
#[derive(Clone, PartialEq, Eq)]
pub struct PairingCode {
    /// of the alphabet
    characters: [u8; CODE],
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
#[derive(Debug)]
pub struct PairingWindow {
    key: Key,
    closes_ms: u64,
    tries_left: u32,
}

impl PairingWindow {
    /// How long a code is good for.
    pub const OPEN_MS: u64 = 5 * 60 * 1000;
    /// How many wrong tries close the window.
    pub const TRIES: u32 = 5;

    /// Opens now.
    pub fn open(code: &PairingCode, now_ms: u64) -> PairingWindow {
        PairingWindow {
            key: code.key(),
            closes_ms: now_ms.saturating_add(PairingWindow::OPEN_MS),
            tries_left: PairingWindow::TRIES,
        }
    }

    /// The key to try a handshake with; it counts as a wrong try until [`refund`](Self::refund)ed, so
    /// handshakes side by side get no extra tries.
    pub fn begin_try(&mut self, now_ms: u64) -> Option<Key> {
        if !self.is_open(now_ms) {
            return None;
        }
        self.tries_left -= 1;
        Some(self.key.clone())
    }

    /// The peer left before it could be told right or wrong.
    pub fn refund(&mut self) {
        self.tries_left = (self.tries_left + 1).min(PairingWindow::TRIES);
    }

    /// Takes the code's one use. `false`: another host has had it.
    pub fn use_up(&mut self, now_ms: u64) -> bool {
        let first = self.closes_ms > now_ms;
        self.closes_ms = 0;
        first
    }

    /// Whether a host may still try.
    pub fn is_open(&self, now_ms: u64) -> bool {
        self.tries_left > 0 && now_ms < self.closes_ms
    }
}

/// Whom a key is shared with, for people to read and for a host to find the key for an address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// What the peer calls itself.
    pub name: String,
    /// Where it was when it was paired or last reached, `host:port`; empty if it dialled us.
    #[serde(default)]
    pub address: String,
    /// When it was paired, seconds since 1970.
    #[serde(default)]
    pub paired_at: u64,
}

/// The directory of this user's keys.
#[derive(Clone, Debug)]
pub struct KeyStore {
    directory: PathBuf,
}

impl KeyStore {
    /// The user's own: `$XDG_CONFIG_HOME/dim/keys` or `~/.config/dim/keys`. Nothing is created yet.
    ///
    /// # Errors
    /// [`KeyError::NoHome`] if neither variable is set.
    pub fn of_user() -> Result<KeyStore, KeyError> {
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let config =
            absolute("XDG_CONFIG_HOME").or_else(|| absolute("HOME").map(|home| home.join(".config")));
        Ok(KeyStore::at(config.ok_or(KeyError::NoHome)?.join("dim").join("keys")))
    }

    /// The store in this directory, which need not exist.
    pub fn at(directory: impl Into<PathBuf>) -> KeyStore {
        KeyStore { directory: directory.into() }
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Keeps a key, replacing what was known of the same key. When this returns, it is on the disk.
    ///
    /// # Errors
    /// [`KeyError::Io`], naming the file.
    pub fn add(&self, key: &Key, peer: &Peer) -> Result<(), KeyError> {
        let io = |source| KeyError::Io { path: self.directory.clone(), source };
        private_directory(&self.directory).map_err(io)?;
        let id = key.id();
        let description = serde_json::to_vec_pretty(peer).unwrap_or_default();
        self.write(&self.path(id, "json"), &description)?;
        let mut line = key.to_hex() + "\n";
        let written = self.write(&self.path(id, "key"), line.as_bytes());
        line.zeroize();
        written
    }

    /// The key with this id.
    ///
    /// # Errors
    /// As of [`Key::from_file`]; [`KeyError::Permissions`] if others can read it. A key that is not there is
    /// `None`.
    pub fn find(&self, id: KeyId) -> Result<Option<Key>, KeyError> {
        let path = self.path(id, "key");
        match fs::metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(KeyError::Io { path, source }),
            Ok(metadata) if others_can_read(&metadata) => return Err(KeyError::Permissions { path }),
            Ok(_) => {}
        }
        let key = Key::from_file(&path)?;
        // a file that was renamed by hand holds another key than its name says
        Ok((key.id() == id).then_some(key))
    }

    /// Every key's id and peer, sorted by id. Files that are none of ours are passed over.
    ///
    /// # Errors
    /// [`KeyError::Io`] if the directory is there and cannot be read.
    pub fn list(&self) -> Result<Vec<(KeyId, Peer)>, KeyError> {
        let io = |source| KeyError::Io { path: self.directory.clone(), source };
        let entries = match fs::read_dir(&self.directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(io)?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry.map_err(io)?.file_name();
            let Some(id) = name.to_str().and_then(|n| n.strip_suffix(".key")).and_then(parse_id) else {
                continue;
            };
            let description = fs::read(self.path(id, "json")).unwrap_or_default();
            found.push((id, serde_json::from_slice(&description).unwrap_or_default()));
        }
        found.sort_by_key(|(id, _)| *id);
        Ok(found)
    }

    /// The key for a worker at `address`: the one last used there, or the only one there is.
    ///
    /// # Errors
    /// [`KeyError::NotPaired`] if there is none or it is not clear which; those of [`find`](Self::find).
    pub fn for_address(&self, address: &str) -> Result<Key, KeyError> {
        let known = self.list()?;
        let here: Vec<_> = known.iter().filter(|(_, peer)| peer.address == address).collect();
        let newest = here.iter().max_by_key(|(_, peer)| peer.paired_at).map(|(id, _)| *id);
        let only = if known.len() == 1 { Some(known[0].0) } else { None };
        let not_paired = || KeyError::NotPaired { address: address.to_owned(), keys: known.len() };
        let id = newest.or(only).ok_or_else(not_paired)?;
        self.find(id)?.ok_or_else(not_paired)
    }

    /// Forgets a key: the peer is a stranger from now on. Whether there was one.
    ///
    /// # Errors
    /// [`KeyError::Io`], naming the file.
    pub fn remove(&self, id: KeyId) -> Result<bool, KeyError> {
        let mut there = false;
        for extension in ["key", "json"] {
            let path = self.path(id, extension);
            match fs::remove_file(&path) {
                Ok(()) => there = true,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(KeyError::Io { path, source }),
            }
        }
        Ok(there)
    }

    fn path(&self, id: KeyId, extension: &str) -> PathBuf {
        self.directory.join(format!("{id}.{extension}"))
    }

    /// Writes beside, then renames: a crash leaves the old file or the new one.
    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), KeyError> {
        let temporary = path.with_extension(format!("new-{}", std::process::id()));
        let done = (|| {
            let _ = fs::remove_file(&temporary);
            let mut options = fs::OpenOptions::new();
            options.write(true).create_new(true);
            #[cfg(unix)]
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
            let mut file = options.open(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, path)
        })();
        done.map_err(|source| {
            let _ = fs::remove_file(&temporary);
            KeyError::Io { path: path.to_owned(), source }
        })
    }
}

fn parse_id(text: &str) -> Option<KeyId> {
    let digit = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    if text.len() != 16 || !text.bytes().all(digit) {
        return None;
    }
    u64::from_str_radix(text, 16).ok().map(|id| KeyId(id.to_be_bytes()))
}

#[cfg(unix)]
fn private_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))
}

#[cfg(not(unix))]
fn private_directory(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)
}

#[cfg(unix)]
fn others_can_read(metadata: &fs::Metadata) -> bool {
    std::os::unix::fs::MetadataExt::mode(metadata) & 0o077 != 0
}

#[cfg(not(unix))]
fn others_can_read(_: &fs::Metadata) -> bool {
    false
}

/// What can be wrong with keys and the files they are in.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A file or the directory cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file holds no key.
    #[error("{}: {problem}", path.display())]
    BadFile {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: BadKey,
    },
    /// Other users can read a key.
    #[error("{0}: other users can read this key; if it is still good, run: chmod 600 {0}", path.display())]
    Permissions {
        /// Which.
        path: PathBuf,
    },
    /// No key for a worker.
    #[error(
        "no key for the worker at {address} ({keys} keys are kept): pair with it first, or name a --key-file"
    )]
    NotPaired {
        /// The worker's address.
        address: String,
        /// How many keys there are for others.
        keys: usize,
    },
    /// Neither HOME nor XDG_CONFIG_HOME.
    #[error("neither HOME nor XDG_CONFIG_HOME is set, so there is no place for keys: name a --key-file")]
    NoHome,
    /// No random numbers.
    #[error("the system gives no random numbers: {0}")]
    NoRandomness(String),
}

impl KeyError {
    fn no_randomness(error: getrandom::Error) -> KeyError {
        KeyError::NoRandomness(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> Key {
        Key::from_bytes([n; 32])
    }

    #[test]
    fn a_key_file_is_one_line_of_64_digits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k");
        fs::write(&path, "0f".repeat(32) + "\n").unwrap();
        assert_eq!(Key::from_file(&path).unwrap().bytes(), &[0x0F; 32]);
        for (text, problem) in [
            ("", BadKey::Length { digits: 0 }),
            (&"0".repeat(63), BadKey::Length { digits: 63 }),
            (&("0".repeat(64) + "\n00"), BadKey::Length { digits: 67 }),
            (&("0".repeat(40) + "g" + &"0".repeat(23)), BadKey::Digit { at: 40 }),
        ] {
            fs::write(&path, text).unwrap();
            match Key::from_file(&path) {
                Err(KeyError::BadFile { problem: found, .. }) => assert_eq!(found, problem),
                other => panic!("{text:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn debug_output_does_not_show_secrets() {
        let code = PairingCode::random().unwrap();
        assert!(!format!("{:?}", key(0xAB)).contains("abab"));
        assert!(!format!("{code:?}").contains(&code.to_string()[..5]));
        assert!(!format!("{:?}", PairingWindow::open(&code, 0)).contains(&code.key().to_hex()));
    }

    #[test]
    fn a_code_survives_how_people_type() {
        for _ in 0..100 {
            let code = PairingCode::random().unwrap();
            let shown = code.to_string();
            assert_eq!(shown.len(), 24);
            let typed = [
                shown.to_lowercase(),
                shown.replace('-', ""),
                shown.replace('-', " "),
                format!("  {}\n", shown.replace('0', "o").replace('1', "l")),
                shown.replace('0', "O").replace('1', "I"),
            ];
            for t in typed {
                assert_eq!(PairingCode::parse(&t).unwrap(), code, "{t}");
            }
        }
    }

    #[test]
    fn every_single_typing_error_is_found_before_it_costs_a_try() {
        let code = PairingCode::random().unwrap().to_string().replace('-', "");
        for at in 0..code.len() {
            for &wrong in ALPHABET {
                let mut typed = code.clone().into_bytes();
                if typed[at] == wrong {
                    continue;
                }
                typed[at] = wrong;
                let typed = String::from_utf8(typed).unwrap();
                assert_eq!(PairingCode::parse(&typed), Err(BadCode::Check), "{typed}");
            }
        }
        assert_eq!(PairingCode::parse(&code[1..]), Err(BadCode::Length { length: 20 }));
        assert_eq!(PairingCode::parse(""), Err(BadCode::Length { length: 0 }));
        assert_eq!(PairingCode::parse("U"), Err(BadCode::Character { character: 'U' }));
    }

    #[test]
    fn a_window_closes_after_five_tries_five_minutes_or_one_use() {
        let code = PairingCode::random().unwrap();
        let mut w = PairingWindow::open(&code, 1000);
        for _ in 0..5 {
            assert!(w.begin_try(2000).is_some());
        }
        assert!(w.begin_try(2000).is_none(), "the sixth");

        let mut w = PairingWindow::open(&code, 1000);
        assert!(w.begin_try(300_999).is_some());
        assert!(w.begin_try(301_000).is_none(), "5 minutes");

        let mut w = PairingWindow::open(&code, 1000);
        assert!(w.begin_try(1001).is_some() && w.begin_try(1001).is_some(), "two hosts with the code");
        assert!(w.use_up(1002) && !w.use_up(1002), "one of them gets the key");
        assert!(w.begin_try(1003).is_none(), "used");

        let mut w = PairingWindow::open(&code, 1000);
        for _ in 0..100 {
            assert!(w.begin_try(2000).is_some(), "a peer that leaves costs no try");
            w.refund();
        }
    }

    #[test]
    fn a_million_guesses_open_nothing() {
        // guesses that pass the check character, against the window that allows five of them
        let code = PairingCode::random().unwrap();
        let mut w = PairingWindow::open(&code, 0);
        let mut opened = 0;
        for n in 0..1_000_000u32 {
            let mut characters = [b'0'; CODE];
            for (i, c) in characters.iter_mut().enumerate().take(6) {
                *c = ALPHABET[(n >> (5 * i)) as usize % 32];
            }
            if w.begin_try(1).is_some_and(|k| *k.bytes() == *PairingCode { characters }.key().bytes()) {
                opened += 1;
            }
        }
        assert_eq!(opened, 0);
        assert_eq!(w.tries_left, 0);
    }

    #[cfg(unix)]
    #[test]
    fn keys_are_kept_where_only_the_user_can_read_them() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let store = KeyStore::at(dir.path().join("dim/keys"));
        assert!(store.list().unwrap().is_empty());
        assert!(matches!(store.for_address("a:1"), Err(KeyError::NotPaired { keys: 0, .. })));

        let peer = |address: &str, paired_at| Peer { name: "x".into(), address: address.into(), paired_at };
        store.add(&key(1), &peer("phone:4646", 1)).unwrap();
        assert_eq!(store.for_address("elsewhere:1").unwrap().id(), key(1).id(), "the only key");
        store.add(&key(2), &peer("phone:4646", 2)).unwrap();
        store.add(&key(3), &peer("pad:4646", 3)).unwrap();
        assert_eq!(store.for_address("phone:4646").unwrap().id(), key(2).id(), "the newer of two");
        assert!(matches!(store.for_address("elsewhere:1"), Err(KeyError::NotPaired { keys: 3, .. })));
        assert_eq!(store.list().unwrap().len(), 3);

        let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(store.directory()), 0o700);
        for entry in fs::read_dir(store.directory()).unwrap() {
            assert_eq!(mode(&entry.unwrap().path()), 0o600);
        }
        let path = store.path(key(1).id(), "key");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(store.find(key(1).id()), Err(KeyError::Permissions { .. })));

        assert!(store.remove(key(2).id()).unwrap());
        assert!(store.find(key(2).id()).unwrap().is_none());
    }

    #[test]
    fn a_peers_name_never_becomes_a_file_name() {
        let dir = tempfile::tempdir().unwrap();
        let store = KeyStore::at(dir.path().join("keys"));
        let name = "../../../etc/passwd\0\n".to_owned();
        store.add(&key(7), &Peer { name: name.clone(), ..Peer::default() }).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(fs::read_dir(store.directory()).unwrap().count(), 2);
        assert_eq!(store.list().unwrap()[0].1.name, name);
    }
}
