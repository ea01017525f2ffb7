//! STEP and STEP_DONE: the two messages with rows. Their heads are written apart from the rows, which go from
//! the caller's memory into the frame, and are read in place.

use dim_core::rows::{RowType, RowsRef};
use dim_core::stage::Span;

use super::Kind;
use crate::codec::{Malformed, Reader, Writer};
use crate::layout::{SPAN, STEP, STEP_DONE, token_bytes};
use crate::rows::{self, Layout, Shape};

/// A span as it is on the wire.
pub fn span_bytes(span: Span) -> [u8; SPAN] {
    let mut bytes = [0; SPAN];
    bytes[..4].copy_from_slice(&span.session.to_le_bytes());
    bytes[4..8].copy_from_slice(&span.position.to_le_bytes());
    bytes[8..12].copy_from_slice(&span.count.to_le_bytes());
    bytes
}

/// Rows to evaluate, borrowed from the receive buffer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step<'a> {
    /// Its number: 1, 2, 3, ... on a connection.
    pub step: u32,
    /// How many rows.
    pub n_rows: u32,
    /// Their format.
    pub row_type: RowType,
    /// Each row is to be evaluated by itself.
    pub is_exact: bool,
    /// The spans as they are on the wire: [`Step::spans`] reads them.
    spans: &'a [u8],
    /// The token ids as they are on the wire, none where they are not read: [`Step::tokens`] reads them.
    tokens: &'a [u8],
    /// The rows' bytes, `(n_rows, width)`.
    pub rows: &'a [u8],
}

/// The bit of the row format that says that each row is to be evaluated by itself.
const EXACT: u8 = 0x10;

impl<'a> Step<'a> {
    /// How many spans.
    pub fn n_spans(&self) -> usize {
        self.spans.len() / SPAN
    }

    /// The spans. Their reserved bytes have been checked.
    pub fn spans(&self) -> impl ExactSizeIterator<Item = Span> + Clone + 'a {
        let word = |b: &[u8], at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        self.spans.chunks_exact(SPAN).map(move |b| Span {
            session: word(b, 0),
            position: word(b, 4),
            count: word(b, 8),
        })
    }

    /// The token ids, one a row; none where they are not read.
    pub fn tokens(&self) -> impl ExactSizeIterator<Item = i32> + 'a {
        let (ids, _) = self.tokens.as_chunks::<4>();
        // what fills them up to a multiple of 8 is none
        let n_rows = if ids.is_empty() { 0 } else { self.n_rows as usize };
        ids.iter().take(n_rows).map(|id| i32::from_le_bytes(*id))
    }

    /// What stands behind the header; `a` and `b` stand in it.
    pub(super) fn decode(r: &mut Reader<'a>, a: u8, b: u16, shape: &Shape) -> Result<Step<'a>, Malformed> {
        let is_exact = a & EXACT != 0;
        let row_type = rows::from_number(a & !EXACT)?;
        let (step, n_rows) = (r.u32()?, r.u32()?);
        let spans = r.bytes(usize::from(b) * SPAN)?;
        if spans.chunks_exact(SPAN).any(|s| s[12..] != [0; 4]) {
            return Err(Malformed::ReservedNotZero);
        }
        let tokens = if shape.reads_tokens { token_ids(r, n_rows)? } else { &[] };
        let rows = rows_of(r, row_type, n_rows, &shape.input)?;
        Ok(Step { step, n_rows, row_type, is_exact, spans, tokens, rows })
    }

    pub(super) fn encode(&self, w: &mut Writer<'_>) {
        w.u32(self.step).u32(self.n_rows).bytes(self.spans).bytes(self.tokens).bytes(self.rows);
    }

    /// The byte `a` of its header.
    pub(super) fn format(&self) -> u8 {
        rows::number(self.row_type) | if self.is_exact { EXACT } else { 0 }
    }
}

/// The bytes of `n_rows` token ids, filled up with zeros to a multiple of 8.
fn token_ids<'a>(r: &mut Reader<'a>, n_rows: u32) -> Result<&'a [u8], Malformed> {
    let size = n_rows as usize * 4;
    let bytes = r.bytes(token_bytes(n_rows as usize))?;
    if bytes[size..].iter().any(|&b| b != 0) {
        return Err(Malformed::ReservedNotZero);
    }
    Ok(bytes)
}

/// Evaluated rows, borrowed from the receive buffer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepDone<'a> {
    /// The step they answer.
    pub step: u32,
    /// How many rows.
    pub n_rows: u32,
    /// Their format.
    pub row_type: RowType,
    /// How long the worker computed, in microseconds, saturating.
    pub compute_us: u32,
    /// How long the step lay there before, in microseconds, saturating.
    pub wait_us: u32,
    /// When the worker began to compute, in microseconds of its clock.
    pub began_us: u64,
    /// The rows' bytes, `(n_rows, width)`.
    pub rows: &'a [u8],
}

impl<'a> StepDone<'a> {
    /// What stands behind the header; `a` stands in it.
    pub(super) fn decode(r: &mut Reader<'a>, a: u8, shape: &Shape) -> Result<StepDone<'a>, Malformed> {
        let row_type = rows::from_number(a)?;
        let (step, n_rows, compute_us, wait_us) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
        let began_us = r.u64()?;
        let rows = rows_of(r, row_type, n_rows, &shape.output)?;
        Ok(StepDone { step, n_rows, row_type, compute_us, wait_us, began_us, rows })
    }

    pub(super) fn encode(&self, w: &mut Writer<'_>) {
        w.u32(self.step).u32(self.n_rows).u32(self.compute_us).u32(self.wait_us).u64(self.began_us);
        w.bytes(self.rows);
    }
}

/// The bytes of n_rows rows: exactly what their number asks for.
fn rows_of<'a>(
    r: &mut Reader<'a>,
    row_type: RowType,
    n_rows: u32,
    layout: &Layout,
) -> Result<&'a [u8], Malformed> {
    let size = u128::from(n_rows) * layout.bytes(row_type) as u128;
    r.bytes(usize::try_from(size).map_err(|_| Malformed::Truncated { missing: usize::MAX })?)
}

/// Appends what comes before the rows in a STEP: header, spans and token ids, if there are any. The rows follow as they
/// are.
///
/// # Panics
/// If the message would be longer than any that can be agreed on: [`crate::connection`] has refused it before.
pub fn encode_step_head(out: &mut Vec<u8>, step: u32, spans: &[Span], tokens: &[i32], values: RowsRef<'_>) {
    let n_rows: u32 = spans.iter().map(|s| s.count).sum();
    let length = STEP + SPAN * spans.len() + token_bytes(tokens.len()) + rows::as_bytes(values).len();
    let mut w = Writer::new(out);
    w.u8(Kind::Step as u8).u8(rows::number(values.row_type())).u16(fits(spans.len())).u32(fits(length));
    w.u32(step).u32(n_rows);
    for span in spans {
        w.bytes(&span_bytes(*span));
    }
    w.bytes(bytemuck::cast_slice(tokens)).zeros(token_bytes(tokens.len()) - 4 * tokens.len());
}

/// What a STEP_DONE says beside its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoneHead {
    /// The step it answers.
    pub step: u32,
    /// How many rows it has.
    pub n_rows: u32,
    /// How long the worker computed, microseconds.
    pub compute_us: u32,
    /// How long the step lay there before, microseconds.
    pub wait_us: u32,
    /// When the worker began to compute, microseconds of its clock.
    pub began_us: u64,
}

/// Appends what comes before the rows in a STEP_DONE. The rows follow as they are.
///
/// # Panics
/// As [`encode_step_head`].
pub fn encode_step_done_head(out: &mut Vec<u8>, head: DoneHead, values: RowsRef<'_>) {
    let length = STEP_DONE + rows::as_bytes(values).len();
    let mut w = Writer::new(out);
    w.u8(Kind::StepDone as u8).u8(rows::number(values.row_type())).u16(0).u32(fits(length));
    w.u32(head.step).u32(head.n_rows).u32(head.compute_us).u32(head.wait_us).u64(head.began_us);
}

fn fits<T: TryFrom<usize>>(n: usize) -> T {
    T::try_from(n).ok().expect("the books refuse a step longer than the agreement's limit")
}
