//! What goes on once both sides have agreed: steps, files, signs of life, the end.

use std::time::{Duration, Instant};

use dim_core::rows::RowsRef;
use dim_core::stage::Span;

use super::timers::Timer;
use super::{Endpoint, LinkErrorKind};
use crate::error::Misbehaved;
use crate::fault::{Farewell, Fault};
use crate::message::{Message, encode_step_done_head, encode_step_head};
use crate::rows;

impl Endpoint {
    /// Both sides have agreed: steps or files go.
    pub fn is_established(&self) -> bool {
        self.connection.is_established()
    }

    /// Host: enters a step into the books and begins its message; the step's number. The rows' bytes are the payload of
    /// [`poll_transmit`](Self::poll_transmit) until it returns `false`.
    ///
    /// # Errors
    /// The rule that this side would break; nothing has changed then.
    ///
    /// # Panics
    /// If a message before it is still halfway.
    pub fn send_step(&mut self, spans: &[Span], rows: RowsRef<'_>) -> Result<u32, Misbehaved> {
        let step = self.connection.send_step(spans, rows)?;
        let payload = rows::as_bytes(rows).len();
        self.begin(payload, |head| encode_step_head(head, step, spans, rows));
        Ok(step)
    }

    /// Worker: answers the oldest step without an answer; as [`send_step`](Self::send_step).
    ///
    /// # Errors
    /// The rule that this side would break; nothing has changed then.
    ///
    /// # Panics
    /// If a message before it is still halfway.
    pub fn send_step_done(
        &mut self,
        step: u32,
        n_rows: u32,
        rows: RowsRef<'_>,
        compute: Duration,
        wait: Duration,
    ) -> Result<(), Misbehaved> {
        self.connection.send_step_done(step, n_rows, rows)?;
        let payload = rows::as_bytes(rows).len();
        let (compute_us, wait_us) = (micros(compute), micros(wait));
        self.begin(payload, |head| encode_step_done_head(head, step, n_rows, compute_us, wait_us, rows));
        self.counters.round_trips += 1;
        Ok(())
    }

    /// Host: begins a message with these bytes of a file, which are its payload; as [`send_step`](Self::send_step).
    ///
    /// # Errors
    /// The rule that this side would break; nothing has changed then.
    ///
    /// # Panics
    /// If a message before it is still halfway.
    pub fn send_file(&mut self, item: u16, offset: u64, bytes: &[u8]) -> Result<(), Misbehaved> {
        self.connection.send(&Message::PushData { item, offset, bytes })?;
        self.begin(bytes.len(), |head| {
            crate::message::encode_push_data_head(head, item, offset, bytes.len())
        });
        Ok(())
    }

    fn begin(&mut self, payload: usize, write_head: impl FnOnce(&mut Vec<u8>)) {
        if let Err(error) = self.outbox.begin(payload, write_head) {
            self.finish(LinkErrorKind::Broken { text: error.to_string() });
        }
    }

    /// Any other message: REWIND, END_SESSION, PING.
    ///
    /// # Errors
    /// The rule that this side would break; nothing has changed then.
    pub fn send(&mut self, message: &Message<'_>) -> Result<(), Misbehaved> {
        self.connection.send(message)?;
        self.outbox.push(message);
        Ok(())
    }

    /// Asks the peer for an answer; [`round_trip_time`](Self::round_trip_time) tells how long it took. Does nothing
    /// while another PING is under way.
    ///
    /// # Errors
    /// [`Misbehaved::Unexpected`] before anything is agreed on, or after the end.
    pub fn ping(&mut self, now: Instant) -> Result<(), Misbehaved> {
        if self.connection.is_pinging() {
            return Ok(());
        }
        let number = super::millis(now.saturating_duration_since(self.begun));
        self.send(&Message::Ping(number))?;
        self.pinged = Some(now);
        Ok(())
    }

    pub(super) fn pong_came(&mut self, now: Instant) {
        // a PONG that nobody waits for changes nothing
        if !self.connection.is_pinging()
            && let Some(sent) = self.pinged.take()
        {
            self.round_trip_time = Some(now.saturating_duration_since(sent));
        }
    }

    /// Queues the PONG that is owed, and a HEARTBEAT if one is due.
    pub(super) fn say_what_is_due(&mut self, now: Instant) {
        if let Some(number) = self.pong.take() {
            let _ = self.send(&Message::Pong(number));
        }
        if !self.is_sending() && self.timers.is_due(Timer::Heartbeat, now) {
            let _ = self.send(&Message::Heartbeat(self.own_status));
        }
    }

    /// Reports a fault; nothing can be sent after it.
    pub fn fail(&mut self, fault: Fault) {
        self.say_last(&Message::Error(fault));
    }

    /// Ends the connection in order; nothing can be sent after it.
    pub fn goodbye(&mut self, why: Farewell) {
        self.say_last(&Message::Goodbye(why));
    }

    fn say_last(&mut self, message: &Message<'_>) {
        if self.connection.send(message).is_ok() {
            self.outbox.push(message);
            self.said_last = true;
            self.timers.clear(Timer::Heartbeat);
        }
    }

    /// Something final has been said: the peer should have the time to read it before the connection is closed.
    pub fn has_said_last(&self) -> bool {
        self.said_last
    }
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}
