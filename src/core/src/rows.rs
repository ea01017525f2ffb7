//! Hidden rows: what goes from stage to stage.

use half::f16;

/// The number format of hidden rows between stages.
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

/// Rows rows, row-major (n_rows, n_embd).
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

    /// Keeps the rows whose entry in `keep` is true; `keep` has an entry for every row.
    pub fn retain_rows(&mut self, keep: &[bool]) {
        fn retain<T>(values: &mut Vec<T>, keep: &[bool]) {
            let n_embd = values.len() / keep.len().max(1);
            let mut i = 0;
            values.retain(|_| {
                i += 1;
                keep[(i - 1) / n_embd]
            });
        }
        match self {
            Rows::F16(v) => retain(v, keep),
            Rows::F32(v) => retain(v, keep),
        }
    }
}

/// Hidden rows that somebody else owns, row-major (n_rows, n_embd).
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
