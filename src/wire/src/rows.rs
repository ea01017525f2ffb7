//! Hidden rows as they cross the wire: which number formats there are, the bytes of rows, and the one rule that holds
//! for all of them: every value is finite.

pub use dim_core::rows::{RowType, RowsRef};

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

/// How many values are infinite or not numbers. A value is finite unless all bits of its exponent are set, so this is
/// one mask and one comparison a value, which the compiler turns into vector code: about 0.2 us for 3,584 F16.
pub fn non_finite(rows: RowsRef<'_>) -> u32 {
    fn count<T: Copy>(values: &[T], not_finite: impl Fn(T) -> bool) -> u32 {
        // summed in short runs: the inner sums fit in 8 bits, which keeps the vectors full
        let run = |c: &[T]| u32::from(c.iter().fold(0u8, |n, &v| n + u8::from(not_finite(v))));
        values.chunks(128).map(run).fold(0, u32::saturating_add)
    }
    match rows {
        RowsRef::F16(v) => count(bytemuck::cast_slice(v), |b: u16| b & 0x7C00 == 0x7C00),
        RowsRef::F32(v) => count(bytemuck::cast_slice(v), |b: u32| b & 0x7F80_0000 == 0x7F80_0000),
    }
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
                assert_eq!(non_finite(RowsRef::F32(&v)), 1);
                let h: Vec<f16> = v.iter().map(|&x| f16::from_f32(x)).collect();
                assert_eq!(non_finite(RowsRef::F16(&h)), 1);
            }
        }
        assert_eq!(non_finite(RowsRef::F32(&[f32::NAN; 1000])), 1000);
        let finite = [f16::MAX, f16::MIN, f16::MIN_POSITIVE_SUBNORMAL, f16::NEG_ZERO];
        assert_eq!(non_finite(RowsRef::F16(&finite)), 0);
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
