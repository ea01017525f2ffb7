//! Rows as they cross the wire: what they are made of, which number formats there are, the bytes of rows, and the one
//! rule that holds for all of them: every value that is a number is finite.

pub use dim_core::rows::{Layout, Part, PartType, RowType, RowsRef};

use crate::codec::Malformed;

/// The number of a format: the byte `a` of STEP and STEP_DONE. 3 (BF16) and the bit 0x80 (scaled rows) are retired.
pub fn number(row_type: RowType) -> u8 {
    match row_type {
        RowType::F16 => 1,
        RowType::F32 => 2,
    }
}

/// The format with this number.
///
/// # Errors
/// [`Malformed::BadValue`]: no format has it.
pub fn from_number(number: u8) -> Result<RowType, Malformed> {
    match number {
        1 => Ok(RowType::F16),
        2 => Ok(RowType::F32),
        _ => Err(Malformed::BadValue { field: "row format", value: number.into() }),
    }
}

/// What the rows of a connection are: from which the lengths of STEP and STEP_DONE follow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// What a row to the worker is made of.
    pub input: Layout,
    /// What a row from the worker is made of.
    pub output: Layout,
    /// Whether token ids go to the worker beside the rows.
    pub reads_tokens: bool,
}

impl Shape {
    /// One hidden row of `n_embd` values each way, without token ids: what most models have.
    pub fn hidden(n_embd: u32) -> Shape {
        Shape { input: Layout::hidden(n_embd), output: Layout::hidden(n_embd), reads_tokens: false }
    }

    /// Nothing is said of the rows.
    pub fn is_unknown(&self) -> bool {
        self.input.is_empty() && self.output.is_empty()
    }
}

/// A set of number formats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RowTypes(u8);

impl RowTypes {
    /// None at all.
    pub const NONE: RowTypes = RowTypes(0);
    /// Only F16.
    pub const F16: RowTypes = RowTypes(0b01);
    /// Only F32.
    pub const F32: RowTypes = RowTypes(0b10);
    /// Every one there is.
    pub const ALL: RowTypes = RowTypes(0b11);

    /// The set with these bits: 1 = F16, 2 = F32. The bit 4 (BF16) is retired.
    ///
    /// # Errors
    /// [`Malformed::BadValue`]: a bit that stands for no format.
    pub fn from_bits(bits: u8) -> Result<RowTypes, Malformed> {
        match bits & !RowTypes::ALL.0 {
            0 => Ok(RowTypes(bits)),
            _ => Err(Malformed::BadValue { field: "dtypes", value: bits.into() }),
        }
    }

    /// A bit for each format.
    pub fn bits(self) -> u8 {
        self.0
    }

    /// Whether `row_type` is among them.
    pub fn contains(self, row_type: RowType) -> bool {
        self.0 & RowTypes::from(row_type).0 != 0
    }

    /// The format of a set that has exactly one.
    pub fn single(self) -> Option<RowType> {
        [RowType::F16, RowType::F32].into_iter().find(|&t| RowTypes::from(t) == self)
    }
}

impl From<RowType> for RowTypes {
    fn from(row_type: RowType) -> RowTypes {
        match row_type {
            RowType::F16 => RowTypes::F16,
            RowType::F32 => RowTypes::F32,
        }
    }
}

/// As people read it: `F16, F32`.
impl std::fmt::Display for RowTypes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match *self {
            RowTypes::F16 => "F16",
            RowTypes::F32 => "F32",
            RowTypes::NONE => "nothing",
            _ => "F16, F32",
        })
    }
}

/// Reads bytes in place. `None` if they are not aligned for the format or not a whole number of values.
pub fn from_bytes(row_type: RowType, bytes: &[u8]) -> Option<RowsRef<'_>> {
    Some(match row_type {
        RowType::F16 => RowsRef::F16(bytemuck::try_cast_slice(bytes).ok()?),
        RowType::F32 => RowsRef::F32(bytemuck::try_cast_slice(bytes).ok()?),
    })
}

/// The rows as they are on the wire.
pub fn as_bytes(rows: RowsRef<'_>) -> &[u8] {
    match rows {
        RowsRef::F16(v) => bytemuck::cast_slice(v),
        RowsRef::F32(v) => bytemuck::cast_slice(v),
    }
}

/// How many numbers in rows of this layout are infinite or not numbers; what is no number (I32) is passed over.
pub fn non_finite(layout: &Layout, rows: RowsRef<'_>) -> u32 {
    match layout.parts.as_slice() {
        // most models: all values are of one part
        [part] if part.is_of(rows.row_type()) => non_finite_values(rows),
        parts => non_finite_parts(parts, rows),
    }
}

/// A value is finite unless all bits of its exponent are set, so this is one mask and one comparison a value, which the
/// compiler turns into vector code: about 0.2 us for 3,584 F16.
fn non_finite_values(rows: RowsRef<'_>) -> u32 {
    match rows {
        RowsRef::F16(v) => count(bytemuck::cast_slice(v), is_not_finite_16),
        RowsRef::F32(v) => count(bytemuck::cast_slice(v), is_not_finite_32),
    }
}

fn non_finite_parts(parts: &[Part], rows: RowsRef<'_>) -> u32 {
    let row_type = rows.row_type();
    let widths: Vec<usize> = parts.iter().map(|part| part.width(row_type)).collect();
    let width: usize = widths.iter().sum();
    let bytes = as_bytes(rows);
    let mut found = 0u32;
    for row in bytes.chunks_exact((width * row_type.width()).max(1)) {
        let mut rest = row;
        for (part, width) in parts.iter().zip(&widths) {
            let (values, behind) = rest.split_at(width * row_type.width());
            rest = behind;
            let bad = match part.part_type {
                PartType::I32 => 0,
                PartType::F32 if row_type == RowType::F32 || !part.may_round => {
                    of_bytes(values, |b| is_not_finite_32(u32::from_le_bytes(b)))
                }
                PartType::F32 | PartType::F16 => {
                    of_bytes(values, |b| is_not_finite_16(u16::from_le_bytes(b)))
                }
            };
            found = found.saturating_add(bad);
        }
    }
    found
}

fn count<T: Copy>(values: &[T], not_finite: impl Fn(T) -> bool) -> u32 {
    // summed in short runs: the inner sums fit in 8 bits, which keeps the vectors full
    let run = |c: &[T]| u32::from(c.iter().fold(0u8, |n, &v| n + u8::from(not_finite(v))));
    values.chunks(128).map(run).fold(0, u32::saturating_add)
}

/// Of values that need not lie aligned.
fn of_bytes<const N: usize>(bytes: &[u8], not_finite: impl Fn([u8; N]) -> bool) -> u32 {
    let (values, _) = bytes.as_chunks::<N>();
    count(values, not_finite)
}

fn is_not_finite_16(bits: u16) -> bool {
    bits & 0x7C00 == 0x7C00
}

fn is_not_finite_32(bits: u32) -> bool {
    bits & 0x7F80_0000 == 0x7F80_0000
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    #[test]
    fn finds_every_value_that_is_not_finite_wherever_it_stands() {
        for at in 0..1000 {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut v = vec![1.5f32; 1000];
                v[at] = bad;
                assert_eq!(non_finite_values(RowsRef::F32(&v)), 1);
                let h: Vec<f16> = v.iter().map(|&x| f16::from_f32(x)).collect();
                assert_eq!(non_finite_values(RowsRef::F16(&h)), 1);
            }
        }
        assert_eq!(non_finite_values(RowsRef::F32(&[f32::NAN; 1000])), 1000);
        let finite = [f16::MAX, f16::MIN, f16::MIN_POSITIVE_SUBNORMAL, f16::NEG_ZERO];
        assert_eq!(non_finite_values(RowsRef::F16(&finite)), 0);
    }

    /// A row of all kinds of parts, in both formats: only numbers are looked at, and all of them are.
    #[test]
    fn in_a_row_of_several_parts_only_numbers_are_looked_at() {
        let part = |part_type, may_round, values| Part { part_type, may_round, values };
        let layout = Layout {
            parts: vec![
                part(PartType::F32, true, 3),
                part(PartType::I32, false, 2),
                part(PartType::F32, false, 2),
                part(PartType::F16, false, 2),
            ],
        };
        // what is bad in a place of each format, and the places where that is one number, none, or two
        let f32s = [1, 1, 1, 0, 0, 1, 1, 2];
        let f16s = [1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1, 1, 1];
        assert_eq!((layout.width(RowType::F32), layout.width(RowType::F16)), (f32s.len(), f16s.len()));
        for row in 0..3 {
            for (at, expected) in f32s.into_iter().enumerate() {
                let mut values = vec![0f32; 3 * f32s.len()];
                // all bits set: not finite as one F32 and as two F16
                values[row * f32s.len() + at] = f32::from_bits(u32::MAX);
                assert_eq!(non_finite(&layout, RowsRef::F32(&values)), expected, "F32 {at}");
            }
            for (at, expected) in f16s.into_iter().enumerate() {
                let mut values = vec![f16::ZERO; 3 * f16s.len()];
                values[row * f16s.len() + at] = f16::from_bits(0xFFFF);
                assert_eq!(non_finite(&layout, RowsRef::F16(&values)), expected, "F16 {at}");
            }
        }
    }

    #[test]
    fn retired_formats_are_refused() {
        for retired in [0, 3, 4, 0x81, 0x82, 0x83] {
            assert!(from_number(retired).is_err(), "{retired:#x}");
        }
        assert!(RowTypes::from_bits(4).is_err() && RowTypes::from_bits(0b111).is_err());
        assert_eq!((RowTypes::ALL.single(), RowTypes::F32.single()), (None, Some(RowType::F32)));
    }
}
