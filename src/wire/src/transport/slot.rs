//! The one slot in which a worker serves a host: who has it, who waits to be fetched, and how it changes hands.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::line::lock;
use super::link::{Link, Sender};
use crate::fault::Farewell;
use crate::keys::KeyId;

/// How long a host may take to be gone after its own newer connection has come.
const REPLACING: Duration = Duration::from_secs(1);

#[derive(Default)]
pub(super) struct Slot {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    serving: Option<Serving>,
    /// has the slot, and nobody has fetched it yet
    unclaimed: Option<Link>,
    closed: bool,
}

struct Serving {
    number: u64,
    host: Host,
    since: Instant,
    link: Option<Sender>,
}

/// A host that wants to be served.
#[derive(Clone, Debug)]
pub(super) struct Host {
    /// its name and address
    pub name: String,
    pub key_id: KeyId,
    /// of its process; 0: it does not say
    pub instance: u64,
}

impl Host {
    /// The same process under the same key: its older connection is a ghost.
    fn is(&self, other: &Host) -> bool {
        self.key_id == other.key_id && self.instance == other.instance && self.instance != 0
    }
}

/// Frees the slot when the link's receiver is dropped.
pub(super) struct Occupied {
    slot: Arc<Slot>,
    number: u64,
}

impl Drop for Occupied {
    fn drop(&mut self) {
        let mut state = lock(&self.slot.state);
        if state.serving.as_ref().is_some_and(|s| s.number == self.number) {
            state.serving = None;
        }
        drop(state);
        self.slot.changed.notify_all();
    }
}

impl Slot {
    /// Takes the slot under a `number` of its own, or says who has it and for how long. An older connection of the same
    /// host gives way.
    pub(super) fn take(self: &Arc<Slot>, number: u64, host: Host) -> Result<Occupied, (String, Duration)> {
        let mut state = lock(&self.state);
        if state.serving.as_ref().is_some_and(|s| s.host.is(&host)) {
            state = self.replace(state);
        }
        if let Some(serving) = &state.serving {
            return Err((serving.host.name.clone(), serving.since.elapsed()));
        }
        state.serving = Some(Serving { number, host, since: Instant::now(), link: None });
        Ok(Occupied { slot: self.clone(), number })
    }

    /// Ends the connection that has the slot, and waits until it is gone, a while at most.
    fn replace<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let old = state.serving.as_ref().and_then(|s| s.link.clone());
        let unclaimed = state.unclaimed.take();
        drop(state);
        // frees its slot, which needs the lock
        drop(unclaimed);
        if let Some(sender) = old {
            sender.goodbye(Farewell::Replaced);
            sender.stop();
        }
        let deadline = Instant::now() + REPLACING;
        let mut state = lock(&self.state);
        while state.serving.is_some() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            (state, _) = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    /// Puts the link of the host that has the slot where [`fetch`](Self::fetch) finds it.
    pub(super) fn fill(&self, number: u64, link: Link) {
        let mut state = lock(&self.state);
        if let Some(serving) = state.serving.as_mut().filter(|s| s.number == number) {
            serving.link = Some(link.sender().clone());
        }
        let unclaimed = match state.closed {
            true => Some(link),
            false => state.unclaimed.replace(link),
        };
        drop(state);
        // a link that nobody fetched frees the slot again, which needs the lock
        drop(unclaimed);
        self.changed.notify_all();
    }

    /// The next link; `None` after `timeout` or when the slot is closed.
    pub(super) fn fetch(&self, timeout: Option<Duration>) -> Option<Link> {
        let deadline = timeout.map(|t| Instant::now() + t);
        let mut state = lock(&self.state);
        loop {
            if let Some(link) = state.unclaimed.take() {
                return Some(link);
            }
            if state.closed {
                return None;
            }
            let left = match deadline {
                None => Duration::from_secs(3600),
                Some(d) => d.checked_duration_since(Instant::now()).filter(|l| !l.is_zero())?,
            };
            (state, _) = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for `pause`, or until the connection of this `number` no longer has the slot (`None`).
    pub(super) fn served_after(&self, number: u64, pause: Duration) -> Option<Sender> {
        let has_it = |state: &mut State| state.serving.as_ref().is_some_and(|s| s.number == number);
        let state = lock(&self.state);
        let waited = self.changed.wait_timeout_while(state, pause, has_it);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let serving = state.serving.as_ref().filter(|s| s.number == number)?;
        serving.link.clone()
    }

    /// Ends the connection being served, and takes no other.
    pub(super) fn close(&self, why: Farewell) {
        let (unclaimed, served) = {
            let mut state = lock(&self.state);
            state.closed = true;
            (state.unclaimed.take(), state.serving.as_ref().and_then(|s| s.link.clone()))
        };
        if let Some(sender) = served {
            sender.goodbye(why);
            sender.stop();
        }
        // frees its slot, which needs the lock
        drop(unclaimed);
        self.changed.notify_all();
    }
}
