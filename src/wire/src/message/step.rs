//! STEP and STEP_DONE: the two messages with hidden rows. Their heads are written apart from the rows, which go from
//! the caller's memory into the frame, and are read in place.

use dim_core::rows::{RowType, RowsRef};
use dim_core::stage::Span;

use super::Kind;
use crate::codec::{Malformed, Reader, Writer};
use crate::layout::{SPAN, STEP, STEP_DONE};
use crate::rows;

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
    /// The spans as they are on the wire: [`Step::spans`] reads them.
    spans: &'a [u8],
    /// The values' bytes, `(n_rows, n_embd)`.
    pub hidden: &'a [u8],
}

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

    /// What stands behind the header; `a` and `b` stand in it.
    pub(super) fn decode(r: &mut Reader<'a>, a: u8, b: u16, n_embd: u32) -> Result<Step<'a>, Malformed> {
        let row_type = rows::from_number(a)?;
        let (step, n_rows) = (r.u32()?, r.u32()?);
        let spans = r.bytes(usize::from(b) * SPAN)?;
        if spans.chunks_exact(SPAN).any(|s| s[12..] != [0; 4]) {
            return Err(Malformed::ReservedNotZero);
        }
        Ok(Step { step, n_rows, row_type, spans, hidden: hidden(r, row_type, n_rows, n_embd)? })
    }

    pub(super) fn encode(&self, w: &mut Writer<'_>) {
        w.u32(self.step).u32(self.n_rows).bytes(self.spans).bytes(self.hidden);
    }
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
    /// The values' bytes, `(n_rows, n_embd)`.
    pub hidden: &'a [u8],
}

impl<'a> StepDone<'a> {
    /// What stands behind the header; `a` stands in it.
    pub(super) fn decode(r: &mut Reader<'a>, a: u8, n_embd: u32) -> Result<StepDone<'a>, Malformed> {
        let row_type = rows::from_number(a)?;
        let (step, n_rows, compute_us, wait_us) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
        let hidden = hidden(r, row_type, n_rows, n_embd)?;
        Ok(StepDone { step, n_rows, row_type, compute_us, wait_us, hidden })
    }

    pub(super) fn encode(&self, w: &mut Writer<'_>) {
        w.u32(self.step).u32(self.n_rows).u32(self.compute_us).u32(self.wait_us).bytes(self.hidden);
    }
}

/// The bytes of (n_rows, n_embd) values: exactly what their number asks for.
fn hidden<'a>(
    r: &mut Reader<'a>,
    row_type: RowType,
    n_rows: u32,
    n_embd: u32,
) -> Result<&'a [u8], Malformed> {
    let size = u128::from(n_rows) * u128::from(n_embd) * row_type.width() as u128;
    r.bytes(usize::try_from(size).map_err(|_| Malformed::Truncated { missing: usize::MAX })?)
}

/// Appends what comes before the rows' values in a STEP: header and spans. The values follow as they are.
///
/// # Panics
/// If the message would be longer than any that can be agreed on: [`crate::connection`] has refused it before.
pub fn encode_step_head(out: &mut Vec<u8>, step: u32, spans: &[Span], values: RowsRef<'_>) {
    let n_rows: u32 = spans.iter().map(|s| s.count).sum();
    let length = STEP + SPAN * spans.len() + rows::as_bytes(values).len();
    let mut w = Writer::new(out);
    w.u8(Kind::Step as u8).u8(rows::number(values.row_type())).u16(fits(spans.len())).u32(fits(length));
    w.u32(step).u32(n_rows);
    for span in spans {
        w.bytes(&span_bytes(*span));
    }
}

/// Appends what comes before the rows' values in a STEP_DONE. The values follow as they are. Times in microseconds.
///
/// # Panics
/// As [`encode_step_head`].
pub fn encode_step_done_head(
    out: &mut Vec<u8>,
    step: u32,
    n_rows: u32,
    compute_us: u32,
    wait_us: u32,
    values: RowsRef<'_>,
) {
    let length = STEP_DONE + rows::as_bytes(values).len();
    let mut w = Writer::new(out);
    w.u8(Kind::StepDone as u8).u8(rows::number(values.row_type())).u16(0).u32(fits(length));
    w.u32(step).u32(n_rows).u32(compute_us).u32(wait_us);
}

fn fits<T: TryFrom<usize>>(n: usize) -> T {
    T::try_from(n).ok().expect("the books refuse a step longer than the agreement's limit")
}
