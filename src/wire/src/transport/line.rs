//! An agreed connection's socket and endpoint, shared by the threads that use them.
//!
//! ```text
//!     owner's thread              send ---> seal ---> write            (one call a frame)
//!     owner's thread              next_message <--- open <--- read     (one call, mostly)
//!     the line's own thread       heartbeats; reads ahead while the owner is busy elsewhere
//!     a thread for the rest       writes what a host has said and the socket has no room for, then ends
//! ```
//!
//! The owner reads in its own thread, so a token wakes no other. While the owner computes a prompt's chunk, though, the
//! next one should arrive, a peer that is sending must not be kept waiting, and a dead peer should be noticed: so the
//! line's thread reads ahead as soon as rows of a prompt are under way, and in any case when nobody has read for a
//! quarter of a second. What it finds waits, opened, for the owner.
//!
//! Two locks, taken in this order: `out`, held while somebody writes who may, and `state`, never held while anything is
//! waited for but its own change. The inbox is lent to whoever reads, so nobody holds a lock while reading either, and the
//! thread for the rest ([`sending`](super::sending)) holds none while it writes.

use std::io::{self, Read};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dim_core::bell::Bell;

use super::sending::Out;
use super::tcp;
use crate::endpoint::{Endpoint, Filed, HEARTBEAT_EVERY};
use crate::frame::Inbox;
use crate::link_error::{Awaited, LinkError, LinkErrorKind};

/// After how long without its owner reading the line's thread reads.
const OWNER_AWAY: Duration = Duration::from_millis(250);

/// What the threads share.
pub(super) struct Line {
    pub stream: TcpStream,
    /// the peer's name and address
    pub peer: String,
    most_ready: usize,
    pub(super) out: Mutex<Out>,
    /// nothing is left to the thread for the rest any more
    pub(super) caught_up: Condvar,
    state: Mutex<State>,
    /// the state has changed
    pub(super) changed: Condvar,
    stopped: AtomicBool,
}

/// The endpoint, and who reads for it: whoever has its inbox.
pub(super) struct State {
    pub endpoint: Endpoint,
    /// the owner waits for what the line's thread reads
    owner_waits: bool,
    /// when the owner was here last
    pub owner_left: Instant,
    /// rows of a prompt are under way
    pub read_ahead: bool,
    /// rung for every event and at the end; while there is one, the line's thread does all reading
    bell: Option<Bell>,
}

impl State {
    pub(super) fn ring(&self) {
        if let Some(bell) = &self.bell {
            bell.ring();
        }
    }
}

impl Line {
    /// Shares what an opening leaves, and starts the line's thread.
    pub(super) fn start(stream: TcpStream, peer: String, endpoint: Endpoint) -> Result<Arc<Line>, LinkError> {
        let broken = |e: std::io::Error| LinkErrorKind::broken(&e).with(&peer);
        tcp::tick(&stream).map_err(broken)?;
        let in_flight = endpoint.agreed().map_or(0, |agreed| agreed.max_in_flight);
        let line = Arc::new(Line {
            stream,
            most_ready: (in_flight as usize).clamp(8, 64),
            out: Mutex::default(),
            caught_up: Condvar::new(),
            state: Mutex::new(State {
                endpoint,
                owner_waits: false,
                owner_left: Instant::now(),
                read_ahead: false,
                bell: None,
            }),
            changed: Condvar::new(),
            stopped: AtomicBool::new(false),
            peer: peer.clone(),
        });
        let own = line.clone();
        std::thread::Builder::new().name("dim-link".into()).spawn(move || own.attend()).map_err(broken)?;
        Ok(line)
    }

    /// The state, for a moment.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Whoever waits for the state to change looks again.
    pub(super) fn wake(&self) {
        self.changed.notify_all();
    }

    pub(super) fn error(&self, kind: LinkErrorKind) -> LinkError {
        kind.with(&self.peer)
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    // --- receiving

    /// Waits until the endpoint has an event, until `deadline` (for ever without one).
    pub(super) fn wait_for_event(
        &self,
        deadline: Option<Instant>,
    ) -> Result<MutexGuard<'_, State>, LinkError> {
        let begun = Instant::now();
        let mut state = self.state();
        let inbox = loop {
            if state.endpoint.has_event() {
                return Ok(self.owner_takes(state));
            }
            if state.bell.is_none()
                && let Some(inbox) = state.endpoint.lend_inbox(begun)
            {
                break inbox;
            }
            // the line's thread is reading: what it finds is for us
            state.owner_waits = true;
            let left =
                deadline.map_or(Duration::from_secs(3600), |d| d.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                state.owner_waits = false;
                return Err(self.too_late(begun));
            }
            (state, _) = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            state.owner_waits = false;
        };
        state.read_ahead = false;
        drop(state);
        let (state, found) = self.read_event(inbox, deadline, false);
        match found {
            true => Ok(self.owner_takes(state)),
            false => Err(self.too_late(begun)),
        }
    }

    /// The owner looks for an event that has been read already.
    pub(super) fn look_for_event(&self) -> MutexGuard<'_, State> {
        self.owner_takes(self.state())
    }

    /// The owner has the state, and with it the time.
    fn owner_takes<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.owner_left = Instant::now();
        if state.bell.is_some() && state.endpoint.events() >= self.most_ready {
            // there will be room
            self.wake();
        }
        state
    }

    /// Reads what there is, waiting a tick at most, and not beyond `until`.
    fn read_before(&self, until: Option<Instant>, space: &mut [u8]) -> io::Result<usize> {
        let Some(left) = tcp::less_than_a_tick(until, Instant::now()) else {
            return (&mut { &self.stream }).read(space);
        };
        self.stream.set_read_timeout(Some(left))?;
        let read = (&mut { &self.stream }).read(space);
        self.stream.set_read_timeout(Some(tcp::TICK))?;
        read
    }

    fn too_late(&self, begun: Instant) -> LinkError {
        let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.error(LinkErrorKind::Deadline { awaited: Awaited::Answer, ms })
    }

    /// Reads until there is an event or the end, and gives the inbox back. `false`: `deadline` came first. The line's
    /// own thread is `attending` meanwhile: it sends heartbeats.
    fn read_event(
        &self,
        mut inbox: Inbox,
        deadline: Option<Instant>,
        attending: bool,
    ) -> (MutexGuard<'_, State>, bool) {
        let mut came = None;
        let mut silent_at = self.state().endpoint.silent_at();
        loop {
            // opened without a lock; with it, a message is only filed
            let polled = inbox.poll();
            // nothing can have changed before the first read
            if came.is_some() || polled != Ok(false) {
                let now = Instant::now();
                let mut state = self.state();
                state.endpoint.heard(came.take().unwrap_or(0), now);
                silent_at = state.endpoint.silent_at();
                let filed = match polled {
                    Ok(true) => Some(self.file_all(&mut state, &mut inbox, now)),
                    Ok(false) => None,
                    Err(error) => Some(state.endpoint.file(&mut inbox, Err(error), now)),
                };
                // a message that has just become complete comes before the deadline
                let found = filed == Some(Filed::Event) || state.endpoint.end().is_some();
                if found || (filed.is_none() && deadline.is_some_and(|d| now >= d)) {
                    state.endpoint.return_inbox(inbox, now);
                    return self.left_off(state, found);
                }
                drop(state);
                if filed == Some(Filed::Own) {
                    // a PING is answered by whoever reads it
                    self.send_own();
                    continue;
                }
            }
            let until = deadline.into_iter().chain(silent_at).min();
            match self.read_before(until, inbox.space()) {
                Ok(n) if n > 0 => {
                    inbox.filled(n);
                    came = Some(n);
                }
                Err(e) if tcp::is_tick(&e) && !self.is_stopped() => {
                    came = Some(0);
                    self.state().endpoint.handle_timeout(Instant::now());
                }
                other => {
                    came = Some(0);
                    let mut state = self.state();
                    match other {
                        _ if self.is_stopped() => state.endpoint.broken(LinkErrorKind::Stopped),
                        Ok(_) => state.endpoint.closed(),
                        Err(e) => state.endpoint.broken(LinkErrorKind::broken(&e)),
                    }
                }
            }
            if attending {
                self.send_own();
            }
        }
    }

    /// Files a complete message, and what lies complete behind it: a step that is called off there need not be begun.
    fn file_all(&self, state: &mut State, inbox: &mut Inbox, now: Instant) -> Filed {
        let mut filed = state.endpoint.file(inbox, Ok(()), now);
        while filed != Filed::Over && state.endpoint.events() < self.most_ready && inbox.poll() == Ok(true) {
            match state.endpoint.file(inbox, Ok(()), now) {
                Filed::Own => {}
                more => filed = more,
            }
        }
        filed
    }

    /// What there is to do once nobody reads: an end is told to everybody.
    fn left_off<'a>(&'a self, state: MutexGuard<'a, State>, found: bool) -> (MutexGuard<'a, State>, bool) {
        let Some(end) = state.endpoint.end().cloned() else { return (state, found) };
        drop(state);
        match end {
            // whoever is blocked in a write to this peer comes back too
            LinkErrorKind::Silent { .. } => {
                let _ = self.stream.shutdown(Shutdown::Both);
            }
            LinkErrorKind::Broke(_) => {
                self.send_own();
                self.finish_sending();
            }
            _ => {}
        }
        let state = self.state();
        state.ring();
        self.wake();
        (state, found)
    }

    /// The peer broke a rule in what has just been understood: it hears so.
    pub(super) fn tell_broken_rule(&self) {
        self.send_own();
        self.finish_sending();
    }

    /// From now on the line's thread reads everything and rings; or not any more.
    pub(super) fn notify(&self, bell: Option<Bell>) {
        let mut state = self.state();
        state.bell = bell;
        if state.endpoint.has_event() {
            state.ring();
        }
        drop(state);
        self.wake();
    }

    /// Ends the line at once, from any thread.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        let _ = self.stream.shutdown(Shutdown::Both);
        let mut state = self.state();
        state.endpoint.broken(LinkErrorKind::Stopped);
        state.ring();
        drop(state);
        self.wake();
    }

    /// The owner has left: what this side said last must not be lost with what the peer said meanwhile.
    pub(super) fn leave(&self) {
        if self.state().endpoint.has_said_last() && !self.is_stopped() {
            tcp::close_gently(&self.stream);
        }
        self.stop();
    }

    // --- the line's own thread

    fn attend(&self) {
        while !self.is_stopped() {
            self.send_own();
            let mut state = self.state();
            if state.endpoint.end().is_some() {
                return;
            }
            let now = Instant::now();
            let away = !state.owner_waits && now - state.owner_left >= OWNER_AWAY;
            let room = state.endpoint.events() < self.most_ready;
            let wanted = room && (state.read_ahead || away || state.bell.is_some());
            match wanted.then(|| state.endpoint.lend_inbox(now)).flatten() {
                Some(inbox) => {
                    drop(state);
                    self.read_ahead(inbox);
                }
                None => {
                    let due = state.endpoint.poll_timeout().map_or(OWNER_AWAY, |at| at - now.min(at));
                    let pause = due.clamp(Duration::from_millis(10), HEARTBEAT_EVERY / 2);
                    drop(self.changed.wait_timeout(state, pause));
                }
            }
        }
    }

    /// Reads messages until the owner has one to go on with, or enough wait for it.
    fn read_ahead(&self, mut inbox: Inbox) {
        loop {
            let (mut state, _) = self.read_event(inbox, None, true);
            state.ring();
            if state.owner_waits || state.bell.is_none() {
                self.wake();
            }
            let room = state.endpoint.events() < self.most_ready && state.endpoint.end().is_none();
            let wanted = state.bell.is_some() || !state.owner_waits;
            match (room && wanted).then(|| state.endpoint.lend_inbox(Instant::now())).flatten() {
                Some(again) => inbox = again,
                None => {
                    state.read_ahead = false;
                    return;
                }
            }
        }
    }
}

/// A lock whose data every critical section leaves whole, so a panic elsewhere does not take the link down.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
