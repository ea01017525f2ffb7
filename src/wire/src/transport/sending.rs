//! The way to the socket: who writes, and who waits.
//!
//! A host never waits for its worker to take bytes ([`Line::queue`]): other workers and other sessions would wait with it.
//! What the socket has no room for is sealed and left to a thread that lives as long as there is such a rest. How much that
//! can be the books bound: as many steps as may be in flight, and rewinds of the rows that were sent. A worker and a push
//! have nothing better to do, and are to hold nothing beside what they send: they wait ([`Line::send`]).

use std::io::{self, Write};
use std::net::Shutdown;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::line::{Line, State, lock};
use super::tcp;
use crate::endpoint::Endpoint;
use crate::error::Misbehaved;
use crate::link_error::{LinkError, LinkErrorKind};

/// How long last words may take to be written.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// The way to the socket.
#[derive(Default)]
pub(super) struct Out {
    /// sealed, and not yet taken by the socket: goes before anything else
    bytes: Vec<u8>,
    /// a thread is writing the rest of what came before, and will take these bytes too: nobody else may write
    is_behind: bool,
    /// a frame was not written whole: nothing can follow it
    failure: Option<LinkErrorKind>,
}

impl Out {
    /// Nothing can follow any more, for this reason.
    fn fail(&mut self, kind: LinkErrorKind) -> LinkErrorKind {
        self.failure.insert(kind).clone()
    }
}

impl Line {
    /// Enters a message into the books with `begin`, and writes it with its `payload`: returns once the socket has it.
    ///
    /// A failure is not yet the line's end: what the peer said before it closed may still be there to be read.
    pub(super) fn send<T>(
        &self,
        payload: &[u8],
        begin: impl FnOnce(&mut State) -> Result<T, Misbehaved>,
    ) -> Result<T, LinkError> {
        let mut out = lock(&self.out);
        while out.is_behind {
            out = self.caught_up.wait(out).unwrap_or_else(PoisonError::into_inner);
        }
        let mut now = Instant::now();
        let (begun, mut state) = self.begin(&out, begin)?;
        loop {
            let more = self.seal_frame(&mut state, payload, &mut out, now)?;
            if !more && out.bytes.is_empty() {
                return Ok(begun);
            }
            drop(state);
            let unreported = match self.write(&out.bytes) {
                Ok(n) => n,
                Err(kind) => return Err(self.error(out.fail(kind))),
            };
            out.bytes.clear();
            now = Instant::now();
            state = self.state();
            state.endpoint.sent(unreported, now);
        }
    }

    /// As [`send`](Self::send), and never waits for the socket: what it has no room for is written by a thread of its own,
    /// and whatever is said meanwhile goes behind it.
    ///
    /// That thread's failure ends the line.
    pub(super) fn queue<T>(
        self: &Arc<Self>,
        payload: &[u8],
        begin: impl FnOnce(&mut State) -> Result<T, Misbehaved>,
    ) -> Result<T, LinkError> {
        let mut out = lock(&self.out);
        let mut is_full = out.is_behind;
        let mut now = Instant::now();
        let (begun, mut state) = self.begin(&out, begin)?;
        loop {
            let more = self.seal_frame(&mut state, payload, &mut out, now)?;
            if !more && (is_full || out.bytes.is_empty()) {
                break;
            }
            drop(state);
            let written = if is_full { 0 } else { self.write_now(&mut out)? };
            is_full = !out.bytes.is_empty();
            state = self.state();
            if written > 0 {
                now = Instant::now();
                state.endpoint.sent(written, now);
            }
        }
        drop(state);
        if !out.bytes.is_empty() && !out.is_behind {
            let line = self.clone();
            let rest = std::thread::Builder::new().name("dim-rest".into()).spawn(move || line.write_rest());
            rest.map_err(|e| self.error(out.fail(LinkErrorKind::broken(&e))))?;
            out.is_behind = true;
        }
        Ok(begun)
    }

    /// Enters a message into the books, if anything can still be sent.
    fn begin<T>(
        &self,
        out: &Out,
        begin: impl FnOnce(&mut State) -> Result<T, Misbehaved>,
    ) -> Result<(T, MutexGuard<'_, State>), LinkError> {
        if let Some(failure) = &out.failure {
            return Err(self.error(failure.clone()));
        }
        let mut state = self.state();
        let begun = begin(&mut state).map_err(|rule| self.error(LinkErrorKind::Misuse(rule)))?;
        if state.read_ahead {
            self.wake();
        }
        Ok((begun, state))
    }

    /// Seals what goes next, a frame of the message that was begun, behind what is there. Whether there was any.
    fn seal_frame(
        &self,
        state: &mut State,
        payload: &[u8],
        out: &mut Out,
        now: Instant,
    ) -> Result<bool, LinkError> {
        let any = state.endpoint.poll_transmit(payload, &mut out.bytes, now);
        match state.endpoint.end().filter(|_| !any && state.endpoint.is_halfway()) {
            Some(end) => Err(self.error(out.fail(end.clone()))),
            None => Ok(any),
        }
    }

    /// Writes what the socket has room for; how many bytes, of which the endpoint is still to be told.
    fn write_now(&self, out: &mut Out) -> Result<usize, LinkError> {
        match tcp::write_now(&self.stream, &out.bytes) {
            Ok(n) => {
                out.bytes.drain(..n);
                Ok(n)
            }
            Err(e) if tcp::is_tick(&e) => Ok(0),
            Err(e) => Err(self.error(out.fail(self.not_written(&e)))),
        }
    }

    /// Why a write failed: because of the peer, or because this side has closed the socket.
    fn not_written(&self, error: &io::Error) -> LinkErrorKind {
        if self.is_stopped() { LinkErrorKind::Stopped } else { LinkErrorKind::broken(error) }
    }

    /// Of a thread of its own: writes until nothing is left, or until it is over.
    fn write_rest(&self) {
        loop {
            let mut out = lock(&self.out);
            if out.bytes.is_empty() {
                out.is_behind = false;
                return self.caught_up.notify_all();
            }
            let bytes = std::mem::take(&mut out.bytes);
            drop(out);
            match self.write(&bytes) {
                Ok(unreported) => self.state().endpoint.sent(unreported, Instant::now()),
                Err(kind) => return self.rest_failed(kind),
            }
        }
    }

    /// The rest of what was sent cannot be written: the line is over, once what the peer has said is read. Whoever sent it
    /// has left long ago, so the end is told by the receiving half.
    fn rest_failed(&self, kind: LinkErrorKind) {
        let mut out = lock(&self.out);
        out.fail(kind.clone());
        out.is_behind = false;
        self.caught_up.notify_all();
        drop(out);
        let goes_on = |state: &mut State| state.endpoint.end().is_none();
        let waited = self.changed.wait_timeout_while(self.state(), LAST_WORDS, goes_on);
        let (mut state, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            state.endpoint.broken(kind);
        }
        let _ = self.stream.shutdown(Shutdown::Both);
        state.ring();
        drop(state);
        self.wake();
    }

    /// Writes all of it: one system call if the peer keeps up. How many bytes the last call took, of which the endpoint
    /// is still to be told.
    fn write(&self, mut bytes: &[u8]) -> Result<usize, LinkErrorKind> {
        loop {
            let n = match (&mut { &self.stream }).write(bytes) {
                Ok(n) if n == bytes.len() => return Ok(n),
                Ok(0) => return Err(LinkErrorKind::broken(&io::ErrorKind::WriteZero.into())),
                Ok(n) => n,
                Err(e) if tcp::is_tick(&e) => 0,
                Err(e) => return Err(self.not_written(&e)),
            };
            bytes = &bytes[n..];
            let mut state = self.state();
            state.endpoint.sent(n, Instant::now());
            if let Some(end) = state.endpoint.end() {
                return Err(end.clone());
            }
        }
    }

    /// Sends what the endpoint has to say by itself, unless something is being sent or the socket is full: a write may
    /// be blocked until the peer reads, and the peer until this thread does. Whether nothing is left.
    pub(super) fn send_own(&self) -> bool {
        let Ok(mut out) = self.out.try_lock() else { return false };
        loop {
            if out.failure.is_some() {
                // for whoever sends next
                return true;
            }
            if out.is_behind {
                return false;
            }
            if out.bytes.is_empty() {
                // nothing more is sealed while the peer does not take what is: it could ask for ever
                while self.state().endpoint.poll_transmit(&[], &mut out.bytes, Instant::now()) {}
                if out.bytes.is_empty() {
                    return true;
                }
            }
            let Ok(n) = self.write_now(&mut out) else { continue };
            self.state().endpoint.sent(n, Instant::now());
            if !out.bytes.is_empty() {
                return false;
            }
        }
    }

    /// Says something final, unless another thread is blocked in a write: then the peer takes no bytes anyway.
    pub(super) fn say_last(&self, say: impl FnOnce(&mut Endpoint)) {
        let give_up = Instant::now() + LAST_WORDS;
        let mut say = Some(say);
        loop {
            // not while a message is halfway: its frames belong together
            if let Ok(out) = self.out.try_lock() {
                if let Some(say) = say.take() {
                    say(&mut self.state().endpoint);
                }
                drop(out);
                if self.send_own() {
                    break;
                }
            }
            if Instant::now() >= give_up {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.finish_sending();
    }

    /// Nothing more is sent; what was sent arrives.
    pub(super) fn finish_sending(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }
}
