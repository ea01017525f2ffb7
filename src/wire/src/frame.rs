//! Frames: messages cut into sealed pieces, and put together again where they will be read.
//!
//! ```text
//!     message   |------------------ 150,000 bytes ------------------|
//!     frames    |2| 65,519 |16| |2| 65,519 |16| |2| 18,962 |16|          length, ciphertext, tag
//! ```
//!
//! The cut is the only one possible, so a receiver knows each frame's length as soon as it knows the
//! message's, which stands in the first frame. Frames are numbered per direction and the number is the nonce,
//! never sent.
//!
//! [`Inbox`] lends its buffer to be read into, and opens each frame in place, moving its plaintext up to the
//! frame before: no byte is copied but by the decryption itself, frames are opened while later ones arrive,
//! and the message's rows come to lie aligned.

#![deny(clippy::cast_possible_truncation)]

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use crate::error::FrameError;
use crate::layout::HEADER;

/// Bytes of a frame's length.
pub const LENGTH: usize = 2;
/// Bytes of a frame's tag.
pub const TAG: usize = 16;
/// The most plaintext in a frame: what a u16 can count, less the tag.
pub const MAX_BODY: usize = u16::MAX as usize - TAG;
/// The largest frame.
pub const MAX_FRAME: usize = LENGTH + MAX_BODY + TAG;

const _: () = assert!(MAX_BODY == 65_519, "PROTOCOL.md, section 4");

/// How many bytes a message of `length` bytes is on the wire.
pub fn wire_bytes(length: usize) -> usize {
    length + length.div_ceil(MAX_BODY) * (LENGTH + TAG)
}

/// One direction's key and the number of its next frame.
struct Cipher {
    key: LessSafeKey,
    next: u64,
}

impl Cipher {
    fn new(key: &[u8; 32]) -> Cipher {
        let key = UnboundKey::new(&CHACHA20_POLY1305, key).expect("the key has this cipher's length");
        Cipher { key: LessSafeKey::new(key), next: 0 }
    }

    /// The nonce of Noise for ChaCha20-Poly1305, used once: 32 zero bits, then the number, little-endian.
    fn nonce(&mut self) -> Result<Nonce, FrameError> {
        if self.next == u64::MAX {
            return Err(FrameError::Exhausted);
        }
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&self.next.to_le_bytes());
        self.next += 1;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

/// Seals the frames of one direction.
pub struct Sealer {
    cipher: Cipher,
}

impl Sealer {
    /// Frames under `key`, numbered from 0.
    pub fn new(key: &[u8; 32]) -> Sealer {
        Sealer { cipher: Cipher::new(key) }
    }

    /// Appends the next frame of a message to `out`; `false`: there was nothing left of it.
    pub fn seal(&mut self, message: &mut Outgoing<'_>, out: &mut Vec<u8>) -> Result<bool, FrameError> {
        let body = message.left.min(MAX_BODY);
        if body == 0 {
            return Ok(false);
        }
        out.reserve(LENGTH + body + TAG);
        let length = u16::try_from(body + TAG).expect("a frame's body is at most MAX_BODY");
        out.extend_from_slice(&length.to_le_bytes());
        let start = out.len();
        message.take(body, out);
        let nonce = self.cipher.nonce()?;
        // sealing fails only for texts far longer than a frame
        let tag = self
            .cipher
            .key
            .seal_in_place_separate_tag(nonce, Aad::empty(), &mut out[start..])
            .map_err(|_| FrameError::Exhausted)?;
        out.extend_from_slice(tag.as_ref());
        Ok(true)
    }
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealer").field("next", &self.cipher.next).finish_non_exhaustive()
    }
}

/// A message on its way out, in up to three parts: what comes before the rows, the rows, nothing or more.
#[derive(Clone, Debug)]
pub struct Outgoing<'a> {
    parts: [&'a [u8]; 2],
    left: usize,
}

impl<'a> Outgoing<'a> {
    /// The message whose bytes are `head`, then `rows`.
    pub fn new(head: &'a [u8], rows: &'a [u8]) -> Outgoing<'a> {
        Outgoing { parts: [head, rows], left: head.len() + rows.len() }
    }

    /// Passes over the first `n` bytes: they have been sealed before.
    pub fn skip(&mut self, n: usize) {
        let mut n = n.min(self.left);
        self.left -= n;
        for part in &mut self.parts {
            let passed = n.min(part.len());
            *part = &part[passed..];
            n -= passed;
        }
    }

    /// How many bytes are left to be sealed.
    pub fn left(&self) -> usize {
        self.left
    }

    fn take(&mut self, n: usize, out: &mut Vec<u8>) {
        let mut n = n;
        for part in &mut self.parts {
            let (now, later) = part.split_at(n.min(part.len()));
            out.extend_from_slice(now);
            *part = later;
            n -= now.len();
            self.left -= now.len();
        }
    }
}

/// Opens the frames of one direction.
pub struct Opener {
    cipher: Cipher,
}

impl Opener {
    /// Frames under `key`, numbered from 0.
    pub fn new(key: &[u8; 32]) -> Opener {
        Opener { cipher: Cipher::new(key) }
    }

    /// Opens a frame's ciphertext and tag, which stand at `from` in `buffer` and reach to its end, and puts
    /// the plaintext at the buffer's start.
    fn open(&mut self, buffer: &mut [u8], from: usize) -> Result<(), FrameError> {
        let number = self.cipher.next;
        let nonce = self.cipher.nonce()?;
        match self.cipher.key.open_within(nonce, Aad::empty(), buffer, from..) {
            Ok(_) => Ok(()),
            Err(_) => Err(FrameError::BadTag { number }),
        }
    }
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opener").field("next", &self.cipher.next).finish_non_exhaustive()
    }
}

/// Memory for one message: its first byte lies at a multiple of 64, so its rows can be read in place.
///
/// How it is used while the message arrives, counted from the first 64-byte boundary:
///
/// ```text
///     0       62  64                 opened        sealed              filled      end of space
///     | unused |2|  plaintext so far  |  (18 a frame) | not opened yet  |  free      |
/// ```
#[derive(Debug, Default)]
pub struct Store {
    bytes: Vec<u8>,
    /// offset of the first 64-byte boundary
    base: usize,
    /// of the message, once it is complete
    length: usize,
}

impl Store {
    /// The complete message; empty if there is none.
    pub fn message(&self) -> &[u8] {
        self.bytes.get(self.base + PLAIN..self.base + PLAIN + self.length).unwrap_or_default()
    }

    /// Makes room up to `end`, keeping the first `used` bytes.
    fn grow(&mut self, end: usize, used: usize) {
        if self.bytes.len() >= self.base + end {
            return;
        }
        // a fresh zeroed allocation costs no page until bytes arrive in it
        let mut bytes = vec![0; end + ALIGN];
        let base = match bytes.as_ptr().align_offset(ALIGN) {
            n if n < ALIGN => n,
            _ => 0,
        };
        if used > 0 && !self.bytes.is_empty() {
            bytes[base..base + used].copy_from_slice(&self.bytes[self.base..self.base + used]);
        }
        (self.bytes, self.base) = (bytes, base);
    }

    fn range(&mut self, from: usize, to: usize) -> &mut [u8] {
        &mut self.bytes[self.base + from..self.base + to]
    }
}

/// Bytes received, on their way to becoming messages. Kinds of methods, in the order to call them:
///
/// * [`space`](Inbox::space) lends room for bytes from the socket, [`filled`](Inbox::filled) says how many
///   came;
/// * [`poll`](Inbox::poll) opens what is complete and says whether a message is;
/// * [`message`](Inbox::message) is that message; [`release`](Inbox::release) makes room for the next, or
///   [`take`](Inbox::take) moves the message out and goes on with another [`Store`].
pub struct Inbox {
    opener: Opener,
    store: Store,
    opened: usize,
    sealed: usize,
    filled: usize,
    /// of the message being received, once its first frame is open
    length: Option<usize>,
    complete: bool,
    limit: usize,
    broken: Option<FrameError>,
}

const ALIGN: usize = 64;
const PLAIN: usize = ALIGN;
const FIRST: usize = PLAIN - LENGTH;

impl Inbox {
    /// An inbox that takes messages of at most `limit` bytes.
    pub fn new(opener: Opener, limit: usize) -> Inbox {
        Inbox {
            opener,
            store: Store::default(),
            opened: PLAIN,
            sealed: FIRST,
            filled: FIRST,
            length: None,
            complete: false,
            limit: limit.max(HEADER),
            broken: None,
        }
    }

    /// Changes the limit for the messages that follow.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit.max(HEADER);
    }

    /// Room for bytes from the peer; never empty unless a message waits to be [released](Inbox::release) or
    /// the stream is broken. It ends where the message being received ends, once that is known.
    ///
    /// Memory for the largest message is taken at once, so nothing is allocated while later messages arrive:
    /// the limit was checked before.
    pub fn space(&mut self) -> &mut [u8] {
        if self.complete || self.broken.is_some() {
            return &mut [];
        }
        let end = self.space_end().max(self.filled);
        let most = PLAIN + wire_bytes(self.limit) + MAX_FRAME;
        if self.store.bytes.len() < self.store.base + end {
            self.store.grow(most.max(end), self.filled);
        }
        self.store.range(self.filled, end)
    }

    /// The first `n` bytes of [`space`](Inbox::space) hold bytes from the peer now.
    pub fn filled(&mut self, n: usize) {
        self.filled += n;
    }

    /// Copies as many of `bytes` as there is room for now; how many.
    pub fn fill(&mut self, bytes: &[u8]) -> usize {
        let space = self.space();
        let n = space.len().min(bytes.len());
        space[..n].copy_from_slice(&bytes[..n]);
        self.filled(n);
        n
    }

    /// Opens the frames that are complete. `true`: a whole message is there.
    ///
    /// # Errors
    /// The first broken rule; the same again on every later call, for the stream cannot be picked up after
    /// it.
    pub fn poll(&mut self) -> Result<bool, FrameError> {
        if let Some(error) = self.broken {
            return Err(error);
        }
        while !self.complete {
            match self.open_next() {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(error) => {
                    self.broken = Some(error);
                    return Err(error);
                }
            }
        }
        Ok(true)
    }

    /// The message that [`poll`](Inbox::poll) found; its first byte lies at a multiple of 64. Empty if there
    /// is none.
    pub fn message(&self) -> &[u8] {
        self.store.message()
    }

    /// Forgets the message; bytes that came behind it move to the front.
    pub fn release(&mut self) {
        if self.complete {
            let rest = self.store.base + self.sealed..self.store.base + self.filled;
            self.store.bytes.copy_within(rest, self.store.base + FIRST);
            self.begin_next();
        }
    }

    /// Moves the message out into `other`, whose memory is used for the next ones. Does nothing if there is
    /// no message.
    pub fn take(&mut self, other: &mut Store) {
        if !self.complete {
            return;
        }
        let rest = self.filled - self.sealed;
        if rest > 0 {
            other.grow(FIRST + rest, 0);
            other.range(FIRST, FIRST + rest).copy_from_slice(self.store.range(self.sealed, self.filled));
        }
        std::mem::swap(&mut self.store, other);
        self.begin_next();
    }

    /// Nothing of a message has arrived: a connection that closes here closed between messages.
    pub fn is_between_messages(&self) -> bool {
        self.complete || (self.filled == FIRST && self.length.is_none())
    }

    fn begin_next(&mut self) {
        self.filled = FIRST + (self.filled - self.sealed);
        self.sealed = FIRST;
        self.opened = PLAIN;
        self.length = None;
        self.complete = false;
        self.store.length = 0;
    }

    /// Opens one frame, if it is complete.
    fn open_next(&mut self) -> Result<bool, FrameError> {
        if self.filled - self.sealed < LENGTH {
            return Ok(false);
        }
        let clear = self.store.range(self.sealed, self.sealed + LENGTH);
        let length = usize::from(u16::from_le_bytes([clear[0], clear[1]]));
        match self.length {
            None => {
                let expected = HEADER + TAG;
                if length < expected {
                    return Err(FrameError::Length { length, expected });
                }
                if length - TAG > self.limit {
                    return Err(FrameError::TooLong { length: length - TAG, limit: self.limit });
                }
            }
            Some(whole) => {
                let expected = (whole - self.received()).min(MAX_BODY) + TAG;
                if length != expected {
                    return Err(FrameError::Length { length, expected });
                }
            }
        }
        let frame_end = self.sealed + LENGTH + length;
        if self.filled < frame_end {
            return Ok(false);
        }

        let from = self.sealed + LENGTH - self.opened;
        self.opener.open(self.store.range(self.opened, frame_end), from)?;
        let body = length - TAG;
        self.opened += body;
        self.sealed = frame_end;

        if self.length.is_none() {
            let header = self.store.range(PLAIN, PLAIN + HEADER);
            let whole = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
            if whole > self.limit {
                return Err(FrameError::TooLong { length: whole, limit: self.limit });
            }
            if body != whole.min(MAX_BODY) {
                return Err(FrameError::Length { length, expected: whole.min(MAX_BODY) + TAG });
            }
            self.length = Some(whole);
        }
        self.complete = Some(self.received()) == self.length;
        if self.complete {
            self.store.length = self.received();
        }
        Ok(true)
    }

    /// Plaintext bytes of the message that are there.
    fn received(&self) -> usize {
        self.opened - PLAIN
    }

    /// Where bytes of the message being received end at the latest; while its length is unknown, of its first
    /// frame.
    fn space_end(&self) -> usize {
        match self.length {
            None => FIRST + LENGTH + self.limit.min(MAX_BODY) + TAG,
            Some(whole) => self.sealed + wire_bytes(whole - self.received()),
        }
    }
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox")
            .field("opener", &self.opener)
            .field("length", &self.length)
            .field("complete", &self.complete)
            .field("limit", &self.limit)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}
