//! The books that both sides keep alike: sessions, positions and steps while serving, files while pushing.

#![deny(clippy::cast_possible_truncation)]

use std::collections::VecDeque;

use dim_core::rows::{RowType, RowsRef};
use dim_core::stage::Span;

use crate::error::Misbehaved;
use crate::message::PushOffer;
use crate::rows::{self, Layout};
use crate::terms::{Agreed, features};

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

    /// The number of the oldest STEP without an answer.
    pub fn oldest_step(&self) -> Option<u32> {
        self.unanswered.front().map(|(step, _)| *step)
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
        format: Format,
        spans: impl ExactSizeIterator<Item = Span> + Clone,
    ) -> Result<(), Misbehaved> {
        let a = &self.agreed;
        let expected = self.last_step.wrapping_add(1);
        if step != expected || expected == 0 {
            return Err(Misbehaved::StepId { step, expected });
        }
        let steps = saturated(self.unanswered.len()).saturating_add(1);
        if steps > a.max_in_flight {
            return Err(Misbehaved::InFlight { steps, max_in_flight: a.max_in_flight });
        }
        self.check_format(format)?;
        let n_spans = saturated(spans.len());
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
            let expected = u32::try_from(sum).unwrap_or(u32::MAX);
            return Err(Misbehaved::RowCount { rows: n_rows, expected });
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
        let rows = self.oldest(step)?;
        if n_rows != rows {
            return Err(Misbehaved::RowCount { rows: n_rows, expected: rows });
        }
        self.check_format(Format { row_type, is_exact: false })?;
        self.unanswered.pop_front();
        Ok(())
    }

    /// A STEP_FAILED goes from worker to host. The lengths stay as they are: a REWIND takes back what was not computed.
    /// On an error nothing has changed.
    pub fn step_failed(&mut self, step: u32) -> Result<(), Misbehaved> {
        self.oldest(step)?;
        self.unanswered.pop_front();
        Ok(())
    }

    /// How many rows the oldest step without an answer has, which must be this one.
    fn oldest(&self, step: u32) -> Result<u32, Misbehaved> {
        let (expected, rows) = self.unanswered.front().copied().unwrap_or((0, 0));
        match step == expected && expected != 0 {
            true => Ok(rows),
            false => Err(Misbehaved::StepId { step, expected }),
        }
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

    /// Rows for the worker that are about to be sent, with their token ids: as many as said, and finite.
    pub(crate) fn check_input(
        &self,
        tokens: &[i32],
        values: RowsRef<'_>,
        n_rows: u32,
    ) -> Result<(), Misbehaved> {
        let expected = if self.agreed.shape.reads_tokens { n_rows } else { 0 };
        if tokens.len() as u128 != u128::from(expected) {
            return Err(Misbehaved::TokenCount { tokens: saturated(tokens.len()), expected });
        }
        check_rows(&self.agreed.shape.input, values, n_rows)
    }

    /// Rows for the host that are about to be sent.
    pub(crate) fn check_output(&self, values: RowsRef<'_>, n_rows: u32) -> Result<(), Misbehaved> {
        check_rows(&self.agreed.shape.output, values, n_rows)
    }

    fn check_format(&self, format: Format) -> Result<(), Misbehaved> {
        let is_agreed = format.row_type == self.agreed.row_type
            && (!format.is_exact || self.agreed.features & features::EXACT != 0);
        match is_agreed {
            true => Ok(()),
            false => Err(Misbehaved::RowFormat { format: rows::number(format.row_type) }),
        }
    }
}

/// How the rows of a step come, and how they are to be evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Their number format.
    pub row_type: RowType,
    /// Each by itself.
    pub is_exact: bool,
}

impl From<RowType> for Format {
    fn from(row_type: RowType) -> Format {
        Format { row_type, is_exact: false }
    }
}

/// As many rows of this layout as said, and every number of them finite.
fn check_rows(layout: &Layout, values: RowsRef<'_>, n_rows: u32) -> Result<(), Misbehaved> {
    let width = layout.width(values.row_type());
    if values.len() as u128 != u128::from(n_rows) * width as u128 {
        let rows = saturated(values.len() / width.max(1));
        return Err(Misbehaved::RowCount { rows, expected: n_rows });
    }
    match rows::non_finite(layout, values) {
        0 => Ok(()),
        count => Err(Misbehaved::NonFinite { count }),
    }
}

fn saturated(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn session(lengths: &[u32], session: u32) -> Result<u32, Misbehaved> {
    let unknown = Misbehaved::Session { session, max_sessions: saturated(lengths.len()) };
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
