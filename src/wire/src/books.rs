//! The books that both sides keep alike: sessions, positions and steps while serving, files while pushing.

use std::collections::VecDeque;

use dim_core::rows::{RowType, RowsRef};
use dim_core::stage::Span;

use crate::error::Misbehaved;
use crate::message::PushOffer;
use crate::rows;
use crate::terms::Agreed;

/// Sessions, positions and steps of a connection. Host and worker keep the same: the host writes when it
/// sends, the worker when it receives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Books {
    agreed: Agreed,
    /// positions accepted, by session
    lengths: Vec<u32>,
    /// the attempt in which a session was last seen, to find one that stands twice in a step
    seen: Vec<u64>,
    attempt: u64,
    last_step: u32,
    /// (step, n_rows), the oldest first
    unanswered: VecDeque<(u32, u32)>,
    /// nothing was said since ACCEPT
    pub(crate) untouched: bool,
}

impl Books {
    /// Every session has length 0, no step was sent.
    pub fn new(agreed: Agreed) -> Books {
        let sessions = agreed.max_sessions as usize;
        Books {
            lengths: vec![0; sessions],
            seen: vec![0; sessions],
            attempt: 0,
            last_step: 0,
            unanswered: VecDeque::with_capacity(agreed.max_in_flight.min(64) as usize),
            untouched: true,
            agreed,
        }
    }

    /// What the books are kept for.
    pub fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    /// The length of a session: where it goes on.
    pub fn length(&self, session: u32) -> Option<u32> {
        self.lengths.get(session as usize).copied()
    }

    /// How many steps have no answer.
    pub fn in_flight(&self) -> usize {
        self.unanswered.len()
    }

    /// The number of the last STEP; 0: none yet.
    pub fn last_step(&self) -> u32 {
        self.last_step
    }

    /// A STEP goes from host to worker. On an error nothing has changed.
    pub fn step(
        &mut self,
        step: u32,
        n_rows: u32,
        row_type: RowType,
        spans: impl ExactSizeIterator<Item = Span> + Clone,
    ) -> Result<(), Misbehaved> {
        let a = &self.agreed;
        let expected = self.last_step.wrapping_add(1);
        if step != expected || expected == 0 {
            return Err(Misbehaved::StepId { step, expected });
        }
        let steps = self.unanswered.len() as u32 + 1;
        if steps > a.max_in_flight {
            return Err(Misbehaved::InFlight { steps, max_in_flight: a.max_in_flight });
        }
        self.check_type(row_type)?;
        let n_spans = spans.len() as u32;
        if n_spans == 0 || n_spans > a.max_sessions {
            return Err(Misbehaved::SpanCount { spans: n_spans, max_sessions: a.max_sessions });
        }
        if n_rows == 0 || n_rows > a.max_rows {
            return Err(Misbehaved::RowCount { rows: n_rows, expected: a.max_rows });
        }
        self.attempt += 1;
        let mut sum = 0u64;
        for span in spans.clone() {
            if span.count == 0 {
                return Err(Misbehaved::SpanCount { spans: n_spans, max_sessions: a.max_sessions });
            }
            let expected = session(&self.lengths, span.session)?;
            let seen = &mut self.seen[span.session as usize];
            if *seen == self.attempt {
                return Err(Misbehaved::SessionTwice { session: span.session });
            }
            *seen = self.attempt;
            if span.position != expected {
                return Err(Misbehaved::Position {
                    session: span.session,
                    position: span.position,
                    expected,
                });
            }
            let end = u64::from(span.position) + u64::from(span.count);
            if end > u64::from(a.n_ctx) {
                return Err(Misbehaved::Context { session: span.session, end, n_ctx: a.n_ctx });
            }
            sum += u64::from(span.count);
        }
        if sum != u64::from(n_rows) {
            return Err(Misbehaved::RowCount { rows: n_rows, expected: sum.min(u64::from(u32::MAX)) as u32 });
        }

        for span in spans {
            self.lengths[span.session as usize] += span.count;
        }
        self.last_step = step;
        self.unanswered.push_back((step, n_rows));
        self.untouched = false;
        Ok(())
    }

    /// A STEP_DONE goes from worker to host. On an error nothing has changed.
    pub fn step_done(&mut self, step: u32, n_rows: u32, row_type: RowType) -> Result<(), Misbehaved> {
        let (expected, rows) = self.unanswered.front().copied().unwrap_or((0, 0));
        if step != expected || expected == 0 {
            return Err(Misbehaved::StepId { step, expected });
        }
        if n_rows != rows {
            return Err(Misbehaved::RowCount { rows: n_rows, expected: rows });
        }
        self.check_type(row_type)?;
        self.unanswered.pop_front();
        Ok(())
    }

    /// A REWIND goes from host to worker. On an error nothing has changed.
    pub fn rewind(&mut self, number: u32, position: u32) -> Result<(), Misbehaved> {
        let length = session(&self.lengths, number)?;
        if position > length {
            return Err(Misbehaved::Position { session: number, position, expected: length });
        }
        self.lengths[number as usize] = position;
        Ok(())
    }

    /// An END_SESSION goes from host to worker. On an error nothing has changed.
    pub fn end(&mut self, number: u32) -> Result<(), Misbehaved> {
        session(&self.lengths, number)?;
        self.lengths[number as usize] = 0;
        Ok(())
    }

    /// Rows that are about to be sent: as many as said, and finite.
    pub(crate) fn check_rows(&self, values: RowsRef<'_>, n_rows: u32) -> Result<(), Misbehaved> {
        if values.len() as u128 != u128::from(n_rows) * u128::from(self.agreed.n_embd) {
            let rows = values.len() / (self.agreed.n_embd as usize).max(1);
            return Err(Misbehaved::RowCount { rows: rows as u32, expected: n_rows });
        }
        match rows::non_finite(values) {
            0 => Ok(()),
            count => Err(Misbehaved::NonFinite { count }),
        }
    }

    fn check_type(&self, row_type: RowType) -> Result<(), Misbehaved> {
        match row_type == self.agreed.row_type {
            true => Ok(()),
            false => Err(Misbehaved::RowFormat { format: rows::number(row_type) }),
        }
    }
}

fn session(lengths: &[u32], session: u32) -> Result<u32, Misbehaved> {
    let unknown = Misbehaved::Session { session, max_sessions: lengths.len() as u32 };
    lengths.get(session as usize).copied().ok_or(unknown)
}

/// Which bytes of a push come next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PushBooks {
    sizes: Vec<u64>,
    have: Vec<u64>,
    item: usize,
}

impl PushBooks {
    pub(crate) fn new(offer: &PushOffer, have: &[u64]) -> Result<PushBooks, Misbehaved> {
        let sizes: Vec<u64> = offer.items.iter().map(|i| i.size).collect();
        if !offer.is_valid() || have.len() != sizes.len() || have.iter().zip(&sizes).any(|(h, s)| h > s) {
            return Err(Misbehaved::PushItems);
        }
        Ok(PushBooks { sizes, have: have.to_vec(), item: 0 })
    }

    pub(crate) fn data(&mut self, item: u16, offset: u64, length: usize) -> Result<(), Misbehaved> {
        while self.item < self.sizes.len() && self.have[self.item] == self.sizes[self.item] {
            self.item += 1;
        }
        let expected = self.have.get(self.item).copied().unwrap_or(u64::MAX);
        let fits = usize::from(item) == self.item
            && offset == expected
            && length as u64 <= self.sizes.get(self.item).map_or(0, |size| size - expected);
        if !fits {
            return Err(Misbehaved::PushOrder { item, offset, expected });
        }
        self.have[self.item] += length as u64;
        Ok(())
    }
}
