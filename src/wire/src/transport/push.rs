//! Files to a worker: one connection from PUSH_OFFER to PUSH_RESULT (PROTOCOL.md, section 9).
//!
//! ```text
//!     calling thread     file -> PUSH_DATA -> seal -> write      TCP is the only window
//!     the line's thread  read -> PUSH_STORED, the result; heartbeats; notices silence
//! ```
//!
//! Two threads, because a worker that has written its answers into full buffers reads no more until they are
//! taken. What this is not: patient. A connection that is lost is an error; whoever pushes calls again, and the
//! worker says how much it has.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dim_core::bell::Bell;
use dim_core::stage::Traffic;

use super::dial;
use super::line::Line;
use super::opening::Opening;
use super::{LinkError, Timing, tcp};
use crate::endpoint::Received;
use crate::fault::Farewell;
use crate::frame::Store;
use crate::keys::Key;
use crate::layout::MAX_PUSH_DATA;
use crate::link_error::LinkErrorKind;
use crate::message::{Message, PushOffer, PushOutcome};

/// Why a push did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// There is no connection, or no longer.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The worker found other bytes than the offer promised and dropped the item: to be pushed again.
    #[error("{peer} got other bytes than were sent{}: {text}", of_item(.item))]
    HashDiffers {
        /// Which worker.
        peer: String,
        /// The item's place in the offer; none: it did not say.
        item: Option<u16>,
        /// What it said.
        text: String,
    },
    /// The worker could not keep what it was sent.
    #[error("{peer} could not store the files: {text}")]
    StoringFailed {
        /// Which worker.
        peer: String,
        /// What it said.
        text: String,
    },
    /// A file of the offer cannot be read any more, or is shorter than the offer says.
    #[error("file {item} of the push cannot be read: {source}")]
    File {
        /// The item's place in the offer.
        item: usize,
        /// Why.
        source: io::Error,
    },
}

fn of_item(item: &Option<u16>) -> String {
    item.map(|i| format!(" in file {i}")).unwrap_or_default()
}

/// Pushes what `offer` lists to the worker at `address`, from where an earlier push of the same offer stopped.
///
/// `open` gives the file of an item. `moved` hears how many bytes of all items have left this machine: first, what
/// the worker has already.
///
/// # Errors
/// [`PushError`]. What the worker has stored, it keeps, except for an item whose hash differed.
///
/// The result is what crossed the socket on this connection.
pub fn push(
    address: &str,
    key: &Key,
    offer: &PushOffer,
    open: &dyn Fn(usize) -> io::Result<File>,
    timing: &Timing,
    moved: &mut dyn FnMut(u64),
) -> Result<Traffic, PushError> {
    let (opening, have) = dial::offer(address, key, offer, timing)?;
    let peer = opening.peer();
    let Opening { stream, endpoint, .. } = opening;
    let line = Line::start(stream, peer, endpoint)?;
    // the line's thread reads all the time: the worker must never wait for this one to take its answers
    line.notify(Some(Bell::new()));
    let mut push = Push { line, current: Store::default() };
    let result = push.send_all(offer, &have, open, moved);
    push.close(&result);
    result.map(|()| push.line.state().endpoint.traffic())
}

/// A push under way.
struct Push {
    line: Arc<Line>,
    current: Store,
}

/// How the worker ended the push.
struct Verdict {
    outcome: PushOutcome,
    item: Option<u16>,
    text: String,
}

impl Push {
    fn send_all(
        &mut self,
        offer: &PushOffer,
        have: &[u64],
        open: &dyn Fn(usize) -> io::Result<File>,
        moved: &mut dyn FnMut(u64),
    ) -> Result<(), PushError> {
        let mut done: u64 = have.iter().sum();
        moved(done);
        let mut piece = vec![0; MAX_PUSH_DATA];
        for (at, (item, &have)) in (0u16..).zip(offer.items.iter().zip(have)) {
            if have == item.size {
                continue;
            }
            let unreadable = |source| PushError::File { item: at.into(), source };
            let mut file = open(at.into()).map_err(unreadable)?;
            file.seek(SeekFrom::Start(have)).map_err(unreadable)?;
            let mut offset = have;
            while offset < item.size {
                let n = usize::try_from(item.size - offset).unwrap_or(usize::MAX).min(piece.len());
                file.read_exact(&mut piece[..n]).map_err(unreadable)?;
                // it may have ended the push already
                if let Some(verdict) = self.verdict(Wait::No)? {
                    return self.ended(verdict);
                }
                let bytes = &piece[..n];
                if let Err(error) = self.line.send(bytes, |s| s.endpoint.send_file(at, offset, bytes)) {
                    return self.explain(error);
                }
                offset += n as u64;
                done += n as u64;
                moved(done);
            }
        }
        // the worker compares hashes now; the line's thread says that this side lives
        match self.verdict(Wait::Until(None))? {
            Some(verdict) => self.ended(verdict),
            None => Err(LinkErrorKind::Stopped.with(&self.line.peer).into()),
        }
    }

    /// How the worker has ended the push, if it has.
    fn verdict(&mut self, wait: Wait) -> Result<Option<Verdict>, LinkError> {
        loop {
            let mut state = match wait {
                Wait::No => self.line.look_for_event(),
                Wait::Until(deadline) => self.line.wait_for_event(deadline)?,
            };
            let event = state.endpoint.poll_event(&mut self.current, Instant::now());
            drop(state);
            match event.map_err(|kind| kind.with(&self.line.peer))? {
                None => return Ok(None),
                Some(Received { message: Message::PushResult { outcome, item, text }, .. }) => {
                    return Ok(Some(Verdict { outcome, item, text }));
                }
                // PUSH_STORED: for progress only
                Some(_) => {}
            }
        }
    }

    /// A write failed: the worker may have said why before it closed.
    fn explain(&mut self, error: LinkError) -> Result<(), PushError> {
        match self.verdict(Wait::Until(Some(Instant::now() + SAID_BEFORE))) {
            Ok(Some(verdict)) => self.ended(verdict),
            Ok(None) => Err(error.into()),
            Err(said) if said.kind.is_bare_loss() => Err(error.into()),
            Err(LinkError { kind: LinkErrorKind::Deadline { .. }, .. }) => Err(error.into()),
            Err(said) => Err(said.into()),
        }
    }

    fn ended(&self, Verdict { outcome, item, text }: Verdict) -> Result<(), PushError> {
        let peer = self.line.peer.clone();
        match outcome {
            PushOutcome::Stored => Ok(()),
            PushOutcome::HashDiffers => Err(PushError::HashDiffers { peer, item, text }),
            PushOutcome::StoringFailed => Err(PushError::StoringFailed { peer, text }),
        }
    }

    /// Leaves: a worker that broke a rule is told so, one that has not said its last word hears GOODBYE.
    fn close(&self, result: &Result<(), PushError>) {
        match result {
            Err(PushError::Link(LinkError { kind: LinkErrorKind::Broke(_), .. })) => {
                self.line.tell_broken_rule();
            }
            Err(PushError::File { .. }) => self.line.say_last(|e| e.goodbye(Farewell::ShuttingDown)),
            _ => {}
        }
        tcp::close_gently(&self.line.stream);
        self.line.stop();
    }
}

enum Wait {
    No,
    Until(Option<Instant>),
}

/// How long a worker's last words are waited for once a write has failed.
const SAID_BEFORE: Duration = Duration::from_secs(1);
