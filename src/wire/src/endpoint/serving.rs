//! What goes on once both sides have agreed: steps, files, signs of life, the end.

use std::time::{Duration, Instant};

use dim_core::rows::RowsRef;
use dim_core::stage::Span;

use super::timers::Timer;
use super::{Endpoint, LinkErrorKind};
use crate::error::Misbehaved;
use crate::fault::{Farewell, Fault};
use crate::message::{DoneHead, Message, StepFailed, encode_step_done_head, encode_step_head};
use crate::rows;

/// When a worker computed a step.
#[derive(Clone, Copy, Debug)]
pub struct ComputeTime {
    /// When it began.
    pub began: Instant,
    /// How long it took.
    pub compute: Duration,
    /// How long the complete step lay there before.
    pub wait: Duration,
}

/// How a peer's clock goes, in terms of this side's: both count microseconds since the connection began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockOffset {
    /// What has to be added to a time of ours to have the peer's.
    pub us: i64,
    /// How far off that may be: half a round trip.
    pub within_us: u64,
}

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
    pub fn send_step(
        &mut self,
        spans: &[Span],
        tokens: &[i32],
        rows: RowsRef<'_>,
    ) -> Result<u32, Misbehaved> {
        let step = self.connection.send_step(spans, tokens, rows)?;
        let payload = rows::as_bytes(rows).len();
        self.begin(payload, |head| encode_step_head(head, step, spans, tokens, rows));
        Ok(step)
    }

    /// Worker: answers the oldest step without an answer, which it `began` to compute then; as
    /// [`send_step`](Self::send_step).
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
        time: ComputeTime,
    ) -> Result<(), Misbehaved> {
        self.connection.send_step_done(step, n_rows, rows)?;
        let payload = rows::as_bytes(rows).len();
        let (compute_us, wait_us) = (micros(time.compute), micros(time.wait));
        let began_us = self.clock_us(time.began);
        let head = DoneHead { step, n_rows, compute_us, wait_us, began_us };
        self.begin(payload, |out| encode_step_done_head(out, head, rows));
        self.answered(step);
        Ok(())
    }

    /// Worker: the oldest step without an answer was not evaluated; `None`: because it was called off, or stands on one
    /// that was or that failed.
    ///
    /// # Errors
    /// The rule that this side would break; nothing has changed then.
    pub fn send_step_failed(&mut self, step: u32, fault: Option<Fault>) -> Result<(), Misbehaved> {
        self.send(&Message::StepFailed(StepFailed { step, fault }))?;
        self.answered(step);
        Ok(())
    }

    fn answered(&mut self, step: u32) {
        self.called_off.retain(|&off| off != step);
        self.traffic.round_trips += 1;
    }

    /// Worker: the host does not want this step any more.
    pub(super) fn call_off(&mut self, step: u32) {
        let Some(books) = self.books() else { return };
        // answered, or never sent: nothing to call off. What was read and not polled yet is not in the books.
        let most = u64::from(books.last_step()) + u64::from(books.agreed().max_in_flight);
        let oldest = books.oldest_step().unwrap_or(books.last_step().saturating_add(1));
        if step >= oldest && u64::from(step) <= most && !self.called_off.contains(&step) {
            self.called_off.push(step);
        }
    }

    /// Worker: whether this step, which has no answer yet, was called off.
    pub fn is_called_off(&self, step: u32) -> bool {
        self.called_off.contains(&step)
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

    /// Any other message: REWIND, END_SESSION, CANCEL, PING.
    ///
    /// # Errors
    /// The rule that this side would break; nothing has changed then.
    pub fn send(&mut self, message: &Message<'_>) -> Result<(), Misbehaved> {
        self.connection.send(message)?;
        self.outbox.push(message);
        Ok(())
    }

    /// Asks the peer for an answer; [`round_trip_time`](Self::round_trip_time) tells how long it took, and
    /// [`clock_offset`](Self::clock_offset) how the peer's clock goes. Does nothing while another PING is under way.
    ///
    /// # Errors
    /// [`Misbehaved::Unexpected`] before anything is agreed on, or after the end.
    pub fn ping(&mut self, now: Instant) -> Result<(), Misbehaved> {
        if self.connection.is_pinging() {
            return Ok(());
        }
        self.send(&Message::Ping(self.clock_us(now)))?;
        self.pinged = Some(now);
        Ok(())
    }

    pub(super) fn pong_came(&mut self, clock_us: u64, now: Instant) {
        // a PONG that nobody waits for changes nothing
        if !self.connection.is_pinging()
            && let Some(sent) = self.pinged.take()
        {
            let round_trip = now.saturating_duration_since(sent);
            self.round_trip_time = Some(round_trip);
            // it was read there half-way, as far as anybody knows
            let within_us = u64::from(micros(round_trip)).div_ceil(2);
            let halfway = self.clock_us(sent).saturating_add(within_us);
            let us = i64::try_from(i128::from(clock_us) - i128::from(halfway));
            if let Ok(us) = us
                && self.clock_offset.is_none_or(|known| within_us <= known.within_us)
            {
                self.clock_offset = Some(ClockOffset { us, within_us });
            }
        }
    }

    /// Queues the PONG that is owed, and a HEARTBEAT if one is due.
    pub(super) fn say_what_is_due(&mut self, now: Instant) {
        if let Some((number, clock_us)) = self.pong.take() {
            let _ = self.send(&Message::Pong { number, clock_us });
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
