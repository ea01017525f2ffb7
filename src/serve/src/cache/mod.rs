//! Prompts that slots have let go of: in memory within a budget, and in a folder across restarts.
//!
//! ```text
//! slot --another prompt comes--> memory --the oldest, and all at the end--> folder --the oldest--> gone
//! prompt --who has the longest beginning of it?--> the slot itself, memory, or folder
//! ```
//!
//! What is kept of one is what [`Session::save`] writes; here is only where it lies, and for how long. The index, all tokens
//! and steps, is in memory, read from the files' ends at the start. Nothing here is an error for a request: what cannot be
//! written or is not whole is told once, and the prompt is evaluated.

mod folder;

use std::fs::File;
use std::io::{self, Cursor, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dim::host::saved::{SaveError, Saved, SavedError, Worth};
use dim::{Error, Host, Session};

use crate::metrics::Metrics;
pub(crate) use folder::Folder;
use folder::Kept;

/// Where prompts are kept that no slot has any more.
#[derive(Clone, Debug, Default)]
pub struct CacheOptions {
    /// A folder in which they outlive the server.
    pub dir: Option<PathBuf>,
    /// The most bytes of all files there; the oldest go first.
    pub disk_bytes: u64,
    /// The most bytes of them in memory.
    pub ram_bytes: u64,
}

/// Who hears what a person should know; clones tell the same.
#[derive(Clone)]
pub struct Notices(Arc<dyn Fn(&str) + Send + Sync>);

impl Notices {
    /// Tells it so.
    pub fn new(tell: impl Fn(&str) + Send + Sync + 'static) -> Notices {
        Notices(Arc::new(tell))
    }

    fn tell(&self, text: &str) {
        (self.0)(text);
    }
}

impl Default for Notices {
    fn default() -> Notices {
        Notices::new(|_| {})
    }
}

impl std::fmt::Debug for Notices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Notices")
    }
}

/// The prompts that are kept.
pub(crate) struct Cache {
    folder: Option<Folder>,
    ram_bytes: u64,
    state: Mutex<State>,
    notices: Notices,
    /// it was told that nothing can be written, and nothing could since
    is_told: AtomicBool,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct State {
    entries: Vec<Entry>,
    clock: u64,
}

struct Entry {
    saved: Arc<Saved>,
    place: Place,
    used_at: u64,
}

#[derive(Clone)]
enum Place {
    Memory(Arc<Vec<u8>>),
    File(PathBuf),
}

impl Place {
    fn memory_bytes(&self) -> u64 {
        match self {
            Place::Memory(bytes) => bytes.len() as u64,
            Place::File(_) => 0,
        }
    }

    fn is_same(&self, other: &Place) -> bool {
        match (self, other) {
            (Place::Memory(a), Place::Memory(b)) => Arc::ptr_eq(a, b),
            (Place::File(a), Place::File(b)) => a == b,
            _ => false,
        }
    }
}

/// What is best restored for a prompt.
struct Found {
    saved: Arc<Saved>,
    place: Place,
    worth: Worth,
}

impl Cache {
    /// With what lies in the folder already; `None`, where nothing is to be kept, or this model's sessions cannot be.
    pub(crate) fn open(
        folder: Option<Folder>,
        ram_bytes: u64,
        host: &Host,
        notices: Notices,
        metrics: Arc<Metrics>,
    ) -> Option<Cache> {
        if folder.is_none() && ram_bytes == 0 {
            return None;
        }
        let Some(identity) = host.saves_as() else {
            notices.tell("prompts are not kept: this model's memory is more than keys and values");
            return None;
        };
        let mut state = State::default();
        let folder = folder.map(|folder| folder.of(identity));
        if let Some(folder) = &folder {
            let (kept, left_out) = folder.read(host);
            state.entries = kept.into_iter().map(Entry::of_file).collect();
            // in the order in which they were used
            state.clock = state.entries.len() as u64;
            (0..).zip(&mut state.entries).for_each(|(i, entry)| entry.used_at = i);
            if let Some(first) = left_out.first() {
                let more = match left_out.len() {
                    1 => String::new(),
                    n => format!(", and so are {} more", n - 1),
                };
                notices.tell(&format!("a kept prompt is left out{more}: {first}"));
            }
        }
        let state = Mutex::new(state);
        Some(Cache { folder, ram_bytes, state, notices, is_told: AtomicBool::new(false), metrics })
    }

    /// The lock is left whole by whoever panics with it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session is about to be given a prompt: what of it would be lost is kept, and what was kept of the prompt is put in
    /// its place, if that is worth it.
    ///
    /// # Errors
    /// A worker cannot be had.
    pub(crate) fn exchange(
        &self,
        session: &mut Session,
        prompt: &[i32],
        may_restore: bool,
        stop: &AtomicBool,
    ) -> Result<(), Error> {
        let (n_held, common) = (session.evaluated().len(), common(session.evaluated(), prompt));
        let held = if may_restore { common } else { 0 };
        let found = if may_restore { self.best(prompt, common) } else { None };
        if found.is_some() || (n_held - held) * 2 > n_held {
            self.keep(session);
        }
        match found {
            Some(found) => self.restore(session, &found, stop),
            None => Ok(()),
        }
    }

    fn best(&self, prompt: &[i32], held: usize) -> Option<Found> {
        let mut state = self.lock();
        let all = state.entries.iter().map(|entry| entry.saved.worth(common(entry.saved.tokens(), prompt)));
        let (i, worth) = all.enumerate().max_by(|(_, a), (_, b)| a.rows.total_cmp(&b.rows))?;
        state.clock += 1;
        let used_at = state.clock;
        let entry = &mut state.entries[i];
        if worth.tokens < LEAST_TOKENS || worth.rows <= entry.saved.worth_held(held) {
            return None;
        }
        entry.used_at = used_at;
        Some(Found { saved: Arc::clone(&entry.saved), place: entry.place.clone(), worth })
    }

    fn restore(&self, session: &mut Session, found: &Found, stop: &AtomicBool) -> Result<(), Error> {
        let (saved, steps, stop) = (&found.saved, found.worth.steps, Some(stop));
        let restored = match &found.place {
            Place::Memory(bytes) => session.restore(saved, &mut Cursor::new(&bytes[..]), steps, stop),
            Place::File(path) => File::open(path).map_err(SavedError::from).and_then(|mut file| {
                // when it was used last, for whoever makes room there
                let _ = file.set_modified(std::time::SystemTime::now());
                session.restore(saved, &mut file, steps, stop)
            }),
        };
        match (restored, &found.place) {
            (Ok(()), _) => {
                self.metrics.restored(session.evaluated().len());
                Ok(())
            }
            (Err(SavedError::Library(error)), _) => Err(error),
            (Err(why), Place::File(path)) => {
                self.forget(&found.place);
                // another server has made room
                if !matches!(&why, SavedError::Io(error) if error.kind() == io::ErrorKind::NotFound) {
                    self.notices.tell(&format!("a kept prompt is left out: {}: {why}", path.display()));
                }
                Ok(())
            }
            (Err(_), Place::Memory(_)) => {
                self.forget(&found.place);
                Ok(())
            }
        }
    }

    fn forget(&self, place: &Place) {
        self.lock().entries.retain(|entry| !entry.place.is_same(place));
    }

    /// Keeps what a session holds, if it is enough and is not kept already.
    pub(crate) fn keep(&self, session: &mut Session) {
        let tokens = session.evaluated();
        if tokens.len() < LEAST_TOKENS || self.has(tokens) {
            return;
        }
        if self.ram_bytes > 0 {
            let mut out = Limited { out: Vec::new(), left: self.ram_bytes };
            // one that is too large for the memory may have room in the folder
            if let Ok(saved) = session.save(&mut out) {
                self.add(Arc::new(saved), Place::Memory(Arc::new(out.out)));
                return self.make_room();
            }
        }
        self.write(|out| session.save(out));
    }

    /// Whether all of these tokens are in something that is kept, which was used then.
    fn has(&self, tokens: &[i32]) -> bool {
        let mut state = self.lock();
        state.clock += 1;
        let used_at = state.clock;
        // other servers may have made room
        let is_there = |entry: &Entry| match &entry.place {
            Place::File(path) => path.is_file(),
            Place::Memory(_) => true,
        };
        let mut entries = state.entries.iter_mut();
        let has = entries.find(|entry| entry.saved.tokens().starts_with(tokens) && is_there(entry));
        has.map(|entry| entry.used_at = used_at).is_some()
    }

    /// What is all in this one is not kept any more.
    fn add(&self, saved: Arc<Saved>, place: Place) {
        let mut state = self.lock();
        state.clock += 1;
        let used_at = state.clock;
        let is_part = |entry: &mut Entry| saved.tokens().starts_with(entry.saved.tokens());
        let parts: Vec<Entry> = state.entries.extract_if(.., is_part).collect();
        state.entries.push(Entry { saved, place, used_at });
        drop(state);
        for part in parts {
            if let Place::File(path) = part.place {
                let _ = std::fs::remove_file(path);
            }
        }
    }

    /// What memory has no room for any more goes into the folder.
    fn make_room(&self) {
        loop {
            let mut state = self.lock();
            let bytes: u64 = state.entries.iter().map(|entry| entry.place.memory_bytes()).sum();
            if bytes <= self.ram_bytes {
                return;
            }
            let in_memory = state.entries.iter().enumerate().filter(|(_, e)| e.place.memory_bytes() > 0);
            let Some((oldest, _)) = in_memory.min_by_key(|(_, entry)| entry.used_at) else { return };
            let entry = state.entries.swap_remove(oldest);
            drop(state);
            self.write_out(entry);
        }
    }

    fn write_out(&self, entry: Entry) {
        if let Place::Memory(bytes) = entry.place {
            let saved = (*entry.saved).clone();
            self.write(|out| out.write_all(&bytes).map(|()| saved).map_err(SaveError::from));
        }
    }

    fn write(&self, fill: impl FnOnce(&mut dyn Write) -> Result<Saved, SaveError>) {
        let Some(folder) = &self.folder else { return };
        match folder.write(fill) {
            Ok((path, saved)) => {
                self.is_told.store(false, Ordering::Relaxed);
                self.add(Arc::new(saved), Place::File(path));
                let gone = folder.make_room();
                self.lock()
                    .entries
                    .retain(|entry| !matches!(&entry.place, Place::File(path) if gone.contains(path)));
            }
            Err(SaveError::Nothing) => {}
            Err(why) if !self.is_told.swap(true, Ordering::Relaxed) => {
                self.notices
                    .tell(&format!("a prompt could not be kept in {}: {why}", folder.path().display()));
            }
            Err(_) => {}
        }
    }

    /// Writes what is only in memory, for the next server.
    pub(crate) fn close(&self) {
        let mut entries = std::mem::take(&mut self.lock().entries);
        entries.sort_by_key(|entry| entry.used_at);
        entries.into_iter().for_each(|entry| self.write_out(entry));
    }
}

impl Entry {
    fn of_file(kept: Kept) -> Entry {
        Entry { saved: Arc::new(kept.saved), place: Place::File(kept.path), used_at: 0 }
    }
}

/// So many tokens both begin with.
fn common(held: &[i32], prompt: &[i32]) -> usize {
    held.iter().zip(prompt).take_while(|(a, b)| a == b).count()
}

/// What takes no more than so many bytes.
struct Limited<W> {
    out: W,
    left: u64,
}

impl<W: Write> Write for Limited<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let left = self.left.checked_sub(bytes.len() as u64);
        self.left = left.ok_or_else(|| io::Error::other("it is larger than all that may be kept"))?;
        self.out.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Fewer are evaluated as quickly.
const LEAST_TOKENS: usize = 16;
