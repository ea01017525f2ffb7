//! What an endpoint has to send, in order, sealed only when it leaves: bytes ready as they are, a message whose rows
//! the caller keeps, messages of the endpoint's own behind it.

use std::collections::VecDeque;

use crate::error::FrameError;
use crate::frame::{Outgoing, Sealer};
use crate::message::Message;

#[derive(Debug, Default)]
pub(super) struct Outbox {
    sealer: Option<Sealer>,
    /// the handshake's bytes, and frames: go first
    ready: Vec<u8>,
    /// plaintext of the message with rows that is under way: what comes before its rows
    head: Vec<u8>,
    /// of that message: bytes of head and rows together, and how many of them are sealed
    length: usize,
    sealed: usize,
    /// plaintext of whole messages, for behind it
    queue: VecDeque<Vec<u8>>,
}

impl Outbox {
    /// From here on messages can be sealed.
    pub(super) fn open(&mut self, sealer: Sealer) {
        self.sealer = Some(sealer);
    }

    /// Bytes that go as they are: the handshake's.
    pub(super) fn push_bytes(&mut self, bytes: &[u8]) {
        self.ready.extend_from_slice(bytes);
    }

    /// A message without rows, behind everything else.
    pub(super) fn push(&mut self, message: &Message<'_>) {
        let mut plain = Vec::new();
        message.encode(&mut plain);
        self.queue.push_back(plain);
    }

    /// Begins a message with `payload` bytes of rows, whose head `write_head` writes.
    ///
    /// # Panics
    /// If the message before it has not been taken whole.
    pub(super) fn begin(
        &mut self,
        payload: usize,
        write_head: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(), FrameError> {
        assert!(!self.is_halfway(), "a message is still on its way: poll_transmit it to its end first");
        self.seal_queue()?;
        self.head.clear();
        write_head(&mut self.head);
        (self.length, self.sealed) = (self.head.len() + payload, 0);
        Ok(())
    }

    /// A message with rows has begun and has not been taken whole.
    pub(super) fn is_halfway(&self) -> bool {
        self.sealed < self.length
    }

    /// Nothing is left to send.
    pub(super) fn is_empty(&self) -> bool {
        self.ready.is_empty() && !self.is_halfway() && self.queue.is_empty()
    }

    /// Appends what goes next to `out`: one frame of the message with rows, or everything else there is. `payload` are
    /// the rows of that message. `false`: nothing.
    pub(super) fn take(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Result<bool, FrameError> {
        if self.ready.is_empty() && self.is_halfway() {
            let Some(sealer) = &mut self.sealer else { return Ok(false) };
            let mut message = Outgoing::new(&self.head, payload);
            message.skip(self.sealed);
            let before = message.left();
            sealer.seal(&mut message, out)?;
            self.sealed += before - message.left();
            return Ok(true);
        }
        if !self.is_halfway() {
            self.seal_queue()?;
        }
        out.extend_from_slice(&self.ready);
        let any = !self.ready.is_empty();
        self.ready.clear();
        Ok(any)
    }

    fn seal_queue(&mut self) -> Result<(), FrameError> {
        let Some(sealer) = &mut self.sealer else { return Ok(()) };
        while let Some(mut plain) = self.queue.pop_front() {
            let mut message = Outgoing::new(&plain, &[]);
            while sealer.seal(&mut message, &mut self.ready)? {}
            // a key may have been granted
            zeroize::Zeroize::zeroize(&mut plain);
        }
        Ok(())
    }
}
