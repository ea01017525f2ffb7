//! Rows: what goes from stage to stage, one for each token.
//!
//! A row is made of *parts*, one behind the other, as its [`Layout`] says. For most models that is one part, the hidden
//! row of n_embd values; some architectures hand more from block to block, and some of that are numbers of things (I32)
//! that nobody may round.
//!
//! Rows are kept and sent as an array of F16 or of F32, and what is not of the array's type takes as many places there
//! as its bits need:
//!
//! | part | in [`Rows::F16`] | in [`Rows::F32`] |
//! |---|---|---|
//! | F32 that may be rounded | a place a value, rounded | a place a value |
//! | F32 that may not, I32 | two places a value: its bits, the lower half first | a place a value (of I32: its bits) |
//! | F16 | a place a value | a place for two values: their bits, the first one lower |

use half::f16;

/// The number format of rows between stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowType {
    /// 2 bytes a value: the default.
    F16,
    /// 4 bytes a value: for runs that are to be bit-exact.
    F32,
}

impl RowType {
    /// `f16` or `f32`.
    pub fn name(self) -> &'static str {
        match self {
            RowType::F16 => "f16",
            RowType::F32 => "f32",
        }
    }

    /// Bytes of a value.
    pub fn width(self) -> usize {
        match self {
            RowType::F16 => 2,
            RowType::F32 => 4,
        }
    }
}

/// The type of the values of a [`Part`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PartType {
    /// 2 bytes a value, and an even number of them.
    F16,
    /// 4 bytes a value.
    F32,
    /// 4 bytes a value: numbers of things, never rounded.
    I32,
}

/// One of the tensors that make a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Part {
    /// What its values are.
    pub part_type: PartType,
    /// Whether F32 values may be rounded to F16 on their way.
    pub may_round: bool,
    /// Values of each token, at least 1.
    pub values: u32,
}

impl Part {
    /// Places of a row that it takes in an array of this type.
    pub fn width(self, row_type: RowType) -> usize {
        let values = self.values as usize;
        match (row_type, self.part_type) {
            (RowType::F16, PartType::F16) | (RowType::F32, PartType::F32 | PartType::I32) => values,
            (RowType::F32, PartType::F16) => values / 2,
            (RowType::F16, PartType::F32) if self.may_round => values,
            (RowType::F16, PartType::F32 | PartType::I32) => 2 * values,
        }
    }

    /// Whether its values are numbers of the array's own type, in an array of this type.
    pub fn is_of(self, row_type: RowType) -> bool {
        match (row_type, self.part_type) {
            (RowType::F16, PartType::F32) => self.may_round,
            (RowType::F16, part) => part == PartType::F16,
            (RowType::F32, part) => part == PartType::F32,
        }
    }
}

/// What a row is made of, part after part. Without a part: not known, or, where tokens or logits go, no rows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Layout {
    /// The parts, in the order in which they stand in a row.
    pub parts: Vec<Part>,
}

impl Layout {
    /// One hidden row of `n_embd` F32 values, which may be rounded: what most models have.
    pub fn hidden(n_embd: u32) -> Layout {
        Layout { parts: vec![Part { part_type: PartType::F32, may_round: true, values: n_embd }] }
    }

    /// No parts.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Places of a row in an array of this type.
    pub fn width(&self, row_type: RowType) -> usize {
        self.parts.iter().map(|part| part.width(row_type)).sum()
    }

    /// Bytes of a row in an array of this type.
    pub fn bytes(&self, row_type: RowType) -> usize {
        self.width(row_type) * row_type.width()
    }
}

/// As people read it: `3584 F32`, `2048 F32 + 256 F32 + 8 I32`.
impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_empty() {
            return f.write_str("no rows");
        }
        for (i, part) in self.parts.iter().enumerate() {
            let plus = if i == 0 { "" } else { " + " };
            let name = match part.part_type {
                PartType::F16 => "F16",
                PartType::F32 => "F32",
                PartType::I32 => "I32",
            };
            let exact = if part.part_type == PartType::F32 && !part.may_round { ", exact" } else { "" };
            write!(f, "{plus}{} {name}{exact}", part.values)?;
        }
        Ok(())
    }
}

/// Rows of one layout, row-major (n_rows, [width](Layout::width)).
#[derive(Clone, Debug, PartialEq)]
pub enum Rows {
    /// As [`RowType::F16`].
    F16(Vec<f16>),
    /// As [`RowType::F32`].
    F32(Vec<f32>),
}

impl Rows {
    /// No rows.
    pub fn empty(dtype: RowType) -> Rows {
        match dtype {
            RowType::F16 => Rows::F16(Vec::new()),
            RowType::F32 => Rows::F32(Vec::new()),
        }
    }

    /// The same, borrowed.
    pub fn as_ref(&self) -> RowsRef<'_> {
        match self {
            Rows::F16(v) => RowsRef::F16(v),
            Rows::F32(v) => RowsRef::F32(v),
        }
    }

    /// Their number format.
    pub fn row_type(&self) -> RowType {
        match self {
            Rows::F16(_) => RowType::F16,
            Rows::F32(_) => RowType::F32,
        }
    }

    /// The size of the rows in memory and on the wire.
    pub fn bytes(&self) -> usize {
        match self {
            Rows::F16(v) => v.len() * 2,
            Rows::F32(v) => v.len() * 4,
        }
    }

    /// Makes room for `n` values; what they are is up to who writes them next.
    pub fn resize(&mut self, n: usize) {
        match self {
            Rows::F16(v) => v.resize(n, f16::ZERO),
            Rows::F32(v) => v.resize(n, 0.0),
        }
    }

    /// Of `n` rows these, copied.
    pub fn of(&self, rows: std::ops::Range<usize>, n: usize) -> Rows {
        fn part<T: Clone>(values: &[T], rows: std::ops::Range<usize>, n: usize) -> Vec<T> {
            let width = values.len() / n.max(1);
            values.get(rows.start * width..rows.end * width).unwrap_or_default().to_vec()
        }
        match self {
            Rows::F16(v) => Rows::F16(part(v, rows, n)),
            Rows::F32(v) => Rows::F32(part(v, rows, n)),
        }
    }

    /// Keeps the rows whose entry in `keep` is true; `keep` has an entry for every row.
    pub fn retain_rows(&mut self, keep: &[bool]) {
        match self {
            Rows::F16(v) => retain(v, keep),
            Rows::F32(v) => retain(v, keep),
        }
    }
}

/// Keeps what belongs to an entry of `keep` that is true; each entry has as many of the values.
pub(crate) fn retain<T>(values: &mut Vec<T>, keep: &[bool]) {
    let width = values.len() / keep.len().max(1);
    let mut i = 0;
    values.retain(|_| {
        i += 1;
        keep[(i - 1) / width]
    });
}

/// Rows that somebody else owns, row-major (n_rows, [width](Layout::width)).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RowsRef<'a> {
    /// As [`RowType::F16`].
    F16(&'a [f16]),
    /// As [`RowType::F32`].
    F32(&'a [f32]),
}

impl RowsRef<'_> {
    /// Their number format.
    pub fn row_type(&self) -> RowType {
        match self {
            RowsRef::F16(_) => RowType::F16,
            RowsRef::F32(_) => RowType::F32,
        }
    }

    /// How many values.
    pub fn len(&self) -> usize {
        match self {
            RowsRef::F16(v) => v.len(),
            RowsRef::F32(v) => v.len(),
        }
    }

    /// No values at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<'a> From<&'a [f16]> for RowsRef<'a> {
    fn from(values: &'a [f16]) -> RowsRef<'a> {
        RowsRef::F16(values)
    }
}

impl<'a> From<&'a [f32]> for RowsRef<'a> {
    fn from(values: &'a [f32]) -> RowsRef<'a> {
        RowsRef::F32(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_takes_as_many_places_as_its_bits_need() {
        let part = |part_type, may_round, values| Part { part_type, may_round, values };
        let (f16, f32) = (RowType::F16, RowType::F32);
        let cases = [
            (part(PartType::F32, true, 6), (6, 6), (true, true)),
            (part(PartType::F32, false, 6), (12, 6), (false, true)),
            (part(PartType::I32, false, 6), (12, 6), (false, false)),
            (part(PartType::F16, false, 6), (6, 3), (true, false)),
        ];
        for (part, widths, is_of) in cases {
            assert_eq!((part.width(f16), part.width(f32)), widths, "{part:?}");
            assert_eq!((part.is_of(f16), part.is_of(f32)), is_of, "{part:?}");
        }
        let layout = Layout { parts: cases.map(|case| case.0).to_vec() };
        assert_eq!((layout.width(f16), layout.bytes(f16)), (36, 72));
        assert_eq!((layout.width(f32), layout.bytes(f32)), (21, 84));
        assert_eq!(layout.to_string(), "6 F32 + 6 F32, exact + 6 I32 + 6 F16");
    }
}
