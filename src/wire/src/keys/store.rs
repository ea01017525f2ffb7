//! The directory where a user's keys are kept, a file for each and one that says whose it is.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

use super::{BadKey, Key, KeyId};

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

/// Keys that are tried at one worker; each costs a connection.
const MOST_TRIED: usize = 32;

/// The directory of this user's keys.
#[derive(Clone, Debug)]
pub struct KeyStore {
    directory: PathBuf,
    /// what [`find_named`](KeyStore::find_named) has read
    known: Arc<Mutex<Option<Known>>>,
}

/// A key that a host has named.
#[derive(Debug)]
pub struct FoundKey {
    /// The key.
    pub key: Key,
    /// Why it is not to be used.
    pub unusable: Option<KeyError>,
}

impl FoundKey {
    /// One that opens this worker.
    pub fn good(key: Key) -> FoundKey {
        FoundKey { key, unusable: None }
    }
}

/// The keys of the directory as they were when it was last looked at.
#[derive(Debug)]
struct Known {
    changed: SystemTime,
    read: SystemTime,
    keys: Vec<Key>,
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
        KeyStore { directory: directory.into(), known: Arc::default() }
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
        if written.is_err() && !self.path(id, "key").exists() {
            let _ = fs::remove_file(self.path(id, "json"));
        }
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

    /// The key that a host [names](crate::handshake::Named::is), if it is one of these. Keys that cannot be read are none,
    /// for now; one that others can read, or that cannot be read any more, is found, and not to be used. The directory is
    /// read anew only when it has changed: anybody may ask.
    pub fn find_named(&self, is_named: impl Fn(&Key) -> bool) -> Option<FoundKey> {
        let now = SystemTime::now();
        let changed = fs::metadata(&self.directory).and_then(|m| m.modified()).ok()?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        // a change in the same moment as the last look may not show in the time
        let is_current = known.as_ref().is_some_and(|known| {
            let settled = known.read.duration_since(known.changed).is_ok_and(|since| since > SETTLED);
            known.changed == changed && settled
        });
        if !is_current {
            let ids = self.list().ok()?.into_iter().map(|(id, _)| id);
            let mut keys = Vec::new();
            let mut is_whole = true;
            for id in ids {
                match Key::from_file(&self.path(id, "key")) {
                    Ok(key) if key.id() == id => keys.push(key),
                    // for a moment, perhaps: the next who asks is not to find it missing
                    Err(KeyError::Io { .. }) => is_whole = false,
                    Ok(_) | Err(_) => {}
                }
            }
            // nothing that was read for as long ago is believed
            let read = if is_whole { now } else { changed };
            *known = Some(Known { changed, read, keys });
        }
        let key = known.as_ref()?.keys.iter().find(|key| is_named(key))?.clone();
        drop(known);
        // who may read it can change without the directory
        match self.find(key.id()) {
            Ok(found) => found.map(FoundKey::good),
            Err(why) => Some(FoundKey { key, unusable: Some(why) }),
        }
    }

    /// Whether the file of this key is there.
    pub fn holds(&self, id: KeyId) -> bool {
        !matches!(fs::metadata(self.path(id, "key")), Err(e) if e.kind() == io::ErrorKind::NotFound)
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

    /// The keys that a worker at `address` may know, the likeliest first: those last used there, then the others from new
    /// to old. A key belongs to a worker, and a worker may have got another address.
    ///
    /// # Errors
    /// [`KeyError::NotPaired`] if there is none; those of [`find`](Self::find).
    pub fn for_address(&self, address: &str) -> Result<Vec<Key>, KeyError> {
        let mut known = self.list()?;
        known.sort_by_key(|(_, peer)| (peer.address != address, std::cmp::Reverse(peer.paired_at)));
        let keys = known.iter().filter_map(|(id, _)| self.find(*id).transpose());
        let keys = keys.take(MOST_TRIED).collect::<Result<Vec<Key>, KeyError>>()?;
        match keys.is_empty() {
            true => Err(KeyError::NotPaired { address: address.to_owned() }),
            false => Ok(keys),
        }
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

    pub(super) fn path(&self, id: KeyId, extension: &str) -> PathBuf {
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

/// How long ago a directory has to have changed for its time to be believed: file systems count in steps.
const SETTLED: Duration = Duration::from_secs(2);

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
    #[error("no key for the worker at {address}: pair with it first, or give it its key")]
    NotPaired {
        /// The worker's address.
        address: String,
    },
    /// Neither HOME nor XDG_CONFIG_HOME.
    #[error("neither HOME nor XDG_CONFIG_HOME is set, so there is no place for keys")]
    NoHome,
    /// No random numbers.
    #[error("the system gives no random numbers: {0}")]
    NoRandomness(String),
}

impl KeyError {
    /// What a host hears that has such a key, of the worker's: the worker's user hears the error itself.
    pub fn at_the_worker(&self) -> &'static str {
        match self {
            KeyError::Permissions { .. } => {
                "its key file there can be read by others, which its user has been told"
            }
            KeyError::BadFile { .. } => {
                "its key file there is damaged, which its user has been told: pair again"
            }
            _ => "its key file there cannot be read, which its user has been told",
        }
    }

    /// What to do about it, where the error does not say so itself.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            KeyError::BadFile { .. } => Some(
                "a key file is one line of 64 hexadecimal digits, the same on both sides (`openssl rand -hex 32` makes one); \
                 devices that are paired need none",
            ),
            _ => None,
        }
    }

    pub(super) fn no_randomness(error: getrandom::Error) -> KeyError {
        KeyError::NoRandomness(error.to_string())
    }
}
