//! Hidden rows as they cross the wire: three number formats, an optional power of two per row, and the one
//! rule that holds for all of them: every value is finite.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::message::DType;

/// Borrowed hidden rows, row-major `(n_rows, n_embd)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RowsRef<'a> {
    /// 2 bytes a value: the default.
    F16(&'a [f16]),
    /// 4 bytes a value: for runs that are to be bit-exact.
    F32(&'a [f32]),
    /// 2 bytes a value, with the range of F32.
    Bf16(&'a [bf16]),
}

impl<'a> RowsRef<'a> {
    /// Reads bytes in place. `None` if they are not aligned for the format or not a whole number of values.
    pub fn from_bytes(dtype: DType, bytes: &'a [u8]) -> Option<RowsRef<'a>> {
        Some(match dtype {
            DType::F16 => RowsRef::F16(bytemuck::try_cast_slice(bytes).ok()?),
            DType::F32 => RowsRef::F32(bytemuck::try_cast_slice(bytes).ok()?),
            DType::Bf16 => RowsRef::Bf16(bytemuck::try_cast_slice(bytes).ok()?),
        })
    }

    /// The rows as they are on the wire.
    pub fn as_bytes(&self) -> &'a [u8] {
        match self {
            RowsRef::F16(v) => bytemuck::cast_slice(v),
            RowsRef::F32(v) => bytemuck::cast_slice(v),
            RowsRef::Bf16(v) => bytemuck::cast_slice(v),
        }
    }

    /// The number format.
    pub fn dtype(&self) -> DType {
        match self {
            RowsRef::F16(_) => DType::F16,
            RowsRef::F32(_) => DType::F32,
            RowsRef::Bf16(_) => DType::Bf16,
        }
    }

    /// How many values.
    pub fn len(&self) -> usize {
        match self {
            RowsRef::F16(v) => v.len(),
            RowsRef::F32(v) => v.len(),
            RowsRef::Bf16(v) => v.len(),
        }
    }

    /// No values at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many values are infinite or not numbers. A value is finite unless all bits of its exponent are
    /// set, so this is one mask and one comparison a value, which the compiler turns into vector code: about
    /// 0.2 us for 3,584 F16.
    pub fn non_finite(&self) -> u32 {
        fn count<T: Copy>(values: &[T], not_finite: impl Fn(T) -> bool) -> u32 {
            // summed in short runs: the inner sums fit in 8 bits, which keeps the vectors full
            let run = |c: &[T]| u32::from(c.iter().fold(0u8, |n, &v| n + u8::from(not_finite(v))));
            values.chunks(128).map(run).fold(0, u32::saturating_add)
        }
        match self {
            RowsRef::F16(v) => count(bytemuck::cast_slice(v), |b: u16| b & 0x7C00 == 0x7C00),
            RowsRef::Bf16(v) => count(bytemuck::cast_slice(v), |b: u16| b & 0x7F80 == 0x7F80),
            RowsRef::F32(v) => count(bytemuck::cast_slice(v), |b: u32| b & 0x7F80_0000 == 0x7F80_0000),
        }
    }
}

/// Hidden rows with their exponents, if they are scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rows<'a> {
    /// The values as stored, `(n_rows, n_embd)`.
    pub values: RowsRef<'a>,
    /// Row by row, the power of two that the stored values are to be multiplied with; empty: not scaled.
    pub exponents: &'a [i8],
}

impl<'a> From<RowsRef<'a>> for Rows<'a> {
    fn from(values: RowsRef<'a>) -> Rows<'a> {
        Rows { values, exponents: &[] }
    }
}

impl<'a> From<&'a [f16]> for Rows<'a> {
    fn from(values: &'a [f16]) -> Rows<'a> {
        RowsRef::F16(values).into()
    }
}

impl<'a> From<&'a [f32]> for Rows<'a> {
    fn from(values: &'a [f32]) -> Rows<'a> {
        RowsRef::F32(values).into()
    }
}

/// The largest and the smallest exponent a row may have.
pub const EXPONENTS: std::ops::RangeInclusive<i8> = -64..=64;

/// Values that a format cannot hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, thiserror::Error)]
#[error("{non_finite} values are not finite and {too_large} are above 65,504, the largest F16 number")]
pub struct NotRepresentable {
    /// How many were infinite or not numbers before.
    pub non_finite: u32,
    /// How many were finite before and would be infinite.
    pub too_large: u32,
}

/// Rounds to F16, `(n_rows, n_embd)` to the same shape. On an error `out` holds infinities or NaNs where they
/// came from.
///
/// # Panics
/// If the slices differ in length.
pub fn to_f16(values: &[f32], out: &mut [f16]) -> Result<(), NotRepresentable> {
    out.convert_from_f32_slice(values);
    let bad = RowsRef::F16(out).non_finite();
    if bad == 0 {
        return Ok(());
    }
    let non_finite = RowsRef::F32(values).non_finite();
    Err(NotRepresentable { non_finite, too_large: bad - non_finite })
}

/// Rounds one row to F16 after dividing by a power of two, which is returned: 0 for a row whose largest value
/// is at most 32,768, so that ordinary rows are the same as from [`to_f16`]. Dividing by a power of two costs
/// no precision but in values 2^-14 and smaller, which are nothing beside the largest.
///
/// # Panics
/// If the slices differ in length.
pub fn to_scaled_f16(row: &[f32], out: &mut [f16]) -> Result<i8, NotRepresentable> {
    let non_finite = RowsRef::F32(row).non_finite();
    if non_finite > 0 {
        return Err(NotRepresentable { non_finite, too_large: 0 });
    }
    let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
    let fits = |e: &i8| largest * f32::powi(2.0, -i32::from(*e)) <= 32_768.0;
    let too_large = NotRepresentable { non_finite: 0, too_large: 1 };
    let exponent = (0..=*EXPONENTS.end()).find(fits).ok_or(too_large)?;
    if exponent == 0 {
        out.convert_from_f32_slice(row);
    } else {
        let factor = f32::powi(2.0, -i32::from(exponent));
        out.iter_mut().zip(row).for_each(|(o, v)| *o = f16::from_f32(v * factor));
    }
    Ok(exponent)
}

/// Rows of F16 (scaled or not) as F32.
///
/// # Panics
/// If the slices differ in length, or `exponents` is neither empty nor one for each row.
pub fn from_f16(values: &[f16], exponents: &[i8], out: &mut [f32]) {
    values.convert_to_f32_slice(out);
    if exponents.is_empty() {
        return;
    }
    assert_eq!(out.len() % exponents.len(), 0, "one exponent a row");
    let n_embd = out.len() / exponents.len();
    for (row, &e) in out.chunks_mut(n_embd.max(1)).zip(exponents) {
        if e != 0 {
            let factor = f32::powi(2.0, i32::from(e));
            row.iter_mut().for_each(|v| *v *= factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_every_value_that_is_not_finite_wherever_it_stands() {
        for at in 0..1000 {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut v = vec![1.5f32; 1000];
                v[at] = bad;
                assert_eq!(RowsRef::F32(&v).non_finite(), 1);
                let h: Vec<f16> = v.iter().map(|&x| f16::from_f32(x)).collect();
                assert_eq!(RowsRef::F16(&h).non_finite(), 1);
                let b: Vec<bf16> = v.iter().map(|&x| bf16::from_f32(x)).collect();
                assert_eq!(RowsRef::Bf16(&b).non_finite(), 1);
            }
        }
        assert_eq!(RowsRef::F32(&[f32::NAN; 1000]).non_finite(), 1000);
        assert_eq!(
            RowsRef::F16(&[f16::MAX, f16::MIN, f16::MIN_POSITIVE_SUBNORMAL, f16::NEG_ZERO]).non_finite(),
            0
        );
    }

    #[test]
    fn a_value_too_large_for_f16_is_an_error_in_both_directions() {
        let mut out = [f16::ZERO; 4];
        to_f16(&[65_504.0, -65_504.0, 1e-8, 0.0], &mut out).unwrap();
        // 65,520 is the first number that rounds to infinity
        assert_eq!(
            to_f16(&[65_520.0, -70_000.0, f32::NAN, 1.0], &mut out),
            Err(NotRepresentable { non_finite: 1, too_large: 2 })
        );
    }

    #[test]
    fn scaled_rows_hold_what_f16_cannot_and_leave_ordinary_rows_alone() {
        let row = [300_000.0f32, -1.0, 0.5, 12_345.0];
        let mut out = [f16::ZERO; 4];
        let e = to_scaled_f16(&row, &mut out).unwrap();
        assert_eq!(e, 4);
        let mut back = [0f32; 4];
        from_f16(&out, &[e], &mut back);
        for (a, b) in row.iter().zip(back) {
            assert!((a - b).abs() <= a.abs() / 2048.0, "{a} {b}");
        }
        let mut plain = [f16::ZERO; 4];
        to_f16(&[1.1, -2.2, 30_000.0, 0.0], &mut plain).unwrap();
        assert_eq!(to_scaled_f16(&[1.1, -2.2, 30_000.0, 0.0], &mut out).unwrap(), 0);
        assert_eq!(out, plain);
        assert!(to_scaled_f16(&[f32::NAN], &mut out[..1]).is_err());
        assert!(to_scaled_f16(&[f32::MAX], &mut out[..1]).is_err());
    }
}
