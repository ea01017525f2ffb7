//! Files to a worker: one connection from PUSH_OFFER to PUSH_RESULT (PROTOCOL.md, section 9).
//!
//! ```text
//!     calling thread   file -> PUSH_DATA -> seal -> write      TCP is the only window
//!     second thread    read -> PUSH_STORED, heartbeats, the result; notices silence
//! ```
//!
//! Two threads, because a worker that has written its answers into full buffers reads no more until they are
//! taken. What this is not: patient. A connection that is lost is an error; whoever pushes calls again, and the
//! worker says how much it has.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::net::{Shutdown, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::dial::{self, Opening};
use super::link::{Counters, lock};
use super::{LinkError, Timing, tcp};
use crate::connection::{Connection, Heartbeats, Silence};
use crate::error::{Misbehaved, ReceiveError};
use crate::frame::{Inbox, Outgoing, Sealer};
use crate::keys::Key;
use crate::message::{Farewell, Fault, MAX_PUSH_DATA, Message, PushOffer, PushOutcome, Status};

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
) -> Result<Counters, PushError> {
    let (opening, have) = dial::offer(address, key, offer, timing)?;
    let Opening { stream, peer, connection, sealer, inbox, bytes_sent, bytes_received, .. } = opening;
    let broken = |e: io::Error| LinkError::Broken { peer: peer.clone(), text: e.to_string() };
    tcp::tick(&stream).map_err(broken)?;
    let line = Line {
        stream,
        peer: peer.clone(),
        connection: Mutex::new(connection),
        timing: timing.clone(),
        begun: Instant::now(),
        pong: Mutex::new(None),
        over: AtomicBool::new(false),
        last_sent_ms: AtomicU64::new(0),
        bytes_sent: AtomicU64::new(bytes_sent),
        bytes_received: AtomicU64::new(bytes_received),
    };
    let (tell, verdict) = channel();
    std::thread::scope(|scope| {
        let reader = std::thread::Builder::new()
            .name("dim-push".into())
            .spawn_scoped(scope, || line.read(inbox, &tell))
            .map_err(broken)?;
        let mut writer = Writer { line: &line, sealer, head: Vec::new(), frames: Vec::new(), verdict };
        let result = writer.send_all(offer, &have, open, moved);
        writer.close(&result);
        line.over.store(true, Ordering::Release);
        // the reader comes back within a tick
        drop(reader.join());
        result
    })?;
    let count = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed);
    let (bytes_sent, bytes_received) = (count(&line.bytes_sent), count(&line.bytes_received));
    Ok(Counters { bytes_sent, bytes_received, round_trips: 0 })
}

/// What both threads share.
struct Line {
    stream: TcpStream,
    peer: String,
    connection: Mutex<Connection>,
    timing: Timing,
    begun: Instant,
    /// the number of a PING that we owe a PONG
    pong: Mutex<Option<u64>>,
    /// nobody waits for what the reader finds any more
    over: AtomicBool,
    last_sent_ms: AtomicU64,
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
}

/// How the worker ended the push.
type Verdict = Result<(PushOutcome, Option<u16>, String), LinkError>;

impl Line {
    fn now_ms(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64
    }

    /// The second thread: reads until the worker has said how the push ended, or is lost.
    fn read(&self, mut inbox: Inbox, tell: &Sender<Verdict>) {
        inbox.release();
        let verdict = self.read_verdict(&mut inbox);
        if matches!(verdict, Err(LinkError::Silent { .. })) {
            // whoever is blocked in a write to this peer comes back too
            let _ = self.stream.shutdown(Shutdown::Both);
        }
        // a writer that has failed by itself listens no more
        let _ = tell.send(verdict);
    }

    fn read_verdict(&self, inbox: &mut Inbox) -> Verdict {
        let peer = || self.peer.clone();
        let mut silence = Silence::begin(self.now_ms(), self.timing.silence.as_millis() as u64);
        loop {
            while inbox.poll().map_err(|error| LinkError::Broke { peer: peer(), error: error.into() })? {
                let received = lock(&self.connection).receive(inbox.message()).map(Message::into_owned);
                inbox.release();
                match received.map_err(|error| LinkError::Broke { peer: peer(), error })? {
                    Some(Message::PushResult { outcome, item, text }) => return Ok((outcome, item, text)),
                    Some(Message::Ping(number)) => *lock(&self.pong) = Some(number),
                    Some(Message::Error(fault)) => return Err(LinkError::Fault { peer: peer(), fault }),
                    Some(Message::Goodbye(why)) => return Err(LinkError::Goodbye { peer: peer(), why }),
                    // PUSH_STORED, HEARTBEAT, PONG: it lives
                    _ => {}
                }
            }
            match (&mut { &self.stream }).read(inbox.space()) {
                Ok(0) => return Err(LinkError::Closed { peer: peer() }),
                Ok(n) => {
                    inbox.filled(n);
                    self.bytes_received.fetch_add(n as u64, Ordering::Relaxed);
                    silence.heard(self.now_ms());
                }
                Err(e) if tcp::is_tick(&e) => {
                    if self.over.load(Ordering::Acquire) {
                        return Err(LinkError::Stopped);
                    }
                    if silence.is_over(self.now_ms()) {
                        let ms = self.timing.silence.as_millis() as u64;
                        return Err(LinkError::Silent { peer: peer(), ms });
                    }
                }
                Err(e) => return Err(LinkError::Broken { peer: peer(), text: e.to_string() }),
            }
        }
    }
}

/// The calling thread's half.
struct Writer<'a> {
    line: &'a Line,
    sealer: Sealer,
    head: Vec<u8>,
    frames: Vec<u8>,
    verdict: Receiver<Verdict>,
}

impl Writer<'_> {
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
        for (at, (item, &have)) in offer.items.iter().zip(have).enumerate() {
            if have == item.size {
                continue;
            }
            let unreadable = |source| PushError::File { item: at, source };
            let mut file = open(at).map_err(unreadable)?;
            file.seek(SeekFrom::Start(have)).map_err(unreadable)?;
            let mut offset = have;
            while offset < item.size {
                let n = usize::try_from(item.size - offset).unwrap_or(usize::MAX).min(piece.len());
                file.read_exact(&mut piece[..n]).map_err(unreadable)?;
                if let Some(ended) = self.poll() {
                    return ended;
                }
                let data = Message::PushData { item: at as u16, offset, bytes: &piece[..n] };
                if let Err(error) = self.send(&data) {
                    return self.explain(error);
                }
                offset += n as u64;
                done += n as u64;
                moved(done);
            }
        }
        // the worker compares hashes now, and needs to hear that this side lives
        loop {
            match self.verdict.recv_timeout(Duration::from_millis(Heartbeats::EVERY_MS / 2)) {
                Ok(verdict) => return self.ended(verdict),
                Err(RecvTimeoutError::Timeout) => {
                    let beats = Heartbeats::new(self.line.last_sent_ms.load(Ordering::Relaxed));
                    if beats.due_in_ms(self.line.now_ms()) == 0
                        && let Err(error) = self.send(&Message::Heartbeat(Status::default()))
                    {
                        return self.explain(error);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Err(LinkError::Stopped.into()),
            }
            if let Err(error) = self.answer_ping() {
                return self.explain(error);
            }
        }
    }

    /// Whether the worker has ended the push already.
    fn poll(&self) -> Option<Result<(), PushError>> {
        let verdict = self.verdict.try_recv().ok()?;
        Some(self.ended(verdict))
    }

    /// A write failed: the worker may have said why before it closed.
    fn explain(&self, error: LinkError) -> Result<(), PushError> {
        match self.verdict.recv_timeout(Duration::from_secs(1)) {
            Ok(Err(LinkError::Closed { .. } | LinkError::Broken { .. })) | Err(_) => Err(error.into()),
            Ok(verdict) => self.ended(verdict),
        }
    }

    fn ended(&self, verdict: Verdict) -> Result<(), PushError> {
        let peer = self.line.peer.clone();
        match verdict? {
            (PushOutcome::Stored, ..) => Ok(()),
            (PushOutcome::HashDiffers, item, text) => Err(PushError::HashDiffers { peer, item, text }),
            (PushOutcome::StoringFailed, _, text) => Err(PushError::StoringFailed { peer, text }),
        }
    }

    /// Leaves: a worker that broke a rule is told so, one that has not said its last word hears GOODBYE.
    fn close(&mut self, result: &Result<(), PushError>) {
        let last = match result {
            Ok(()) => None,
            Err(PushError::Link(LinkError::Broke { error, .. })) => error.code().map(|code| {
                Message::Error(Fault::new(code, format!("{error} ({})", ReceiveError::rule(error))))
            }),
            Err(PushError::File { .. }) => Some(Message::Goodbye(Farewell::ShuttingDown)),
            Err(_) => None,
        };
        if let Some(message) = last {
            // the state machine is closed after a broken rule; the words are still owed
            let _ = self.write(&message);
        }
        tcp::close_gently(&self.line.stream);
    }

    fn answer_ping(&mut self) -> Result<(), LinkError> {
        match lock(&self.line.pong).take() {
            Some(number) => self.send(&Message::Pong(number)),
            None => Ok(()),
        }
    }

    fn send(&mut self, message: &Message<'_>) -> Result<(), LinkError> {
        if matches!(message, Message::PushData { .. }) {
            self.answer_ping()?;
        }
        let noted = lock(&self.line.connection).send(message);
        match noted {
            Ok(()) => self.write(message),
            // the reader has just met the end of the connection
            Err(Misbehaved::Unexpected { .. }) => Err(LinkError::Closed { peer: self.line.peer.clone() }),
            Err(error) => Err(LinkError::Misuse(error)),
        }
    }

    fn write(&mut self, message: &Message<'_>) -> Result<(), LinkError> {
        let broken = |text: String| LinkError::Broken { peer: self.line.peer.clone(), text };
        self.head.clear();
        self.frames.clear();
        message.encode(&mut self.head);
        let mut outgoing = Outgoing::new(&self.head, &[]);
        while self.sealer.seal(&mut outgoing, &mut self.frames).map_err(|e| broken(e.to_string()))? {}
        tcp::write_all(&self.line.stream, &self.frames, self.line.timing.stalled_write)
            .map_err(|e| broken(e.to_string()))?;
        self.line.bytes_sent.fetch_add(self.frames.len() as u64, Ordering::Relaxed);
        self.line.last_sent_ms.store(self.line.now_ms(), Ordering::Relaxed);
        Ok(())
    }
}
