//! Rows of ggml's types, by ggml's own conversions.

use std::ffi::CStr;

use crate::error::{check, check_status};
use crate::{Error, ffi};

/// A ggml type, by its number in a GGUF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowType {
    /// The number in a GGUF.
    pub number: u32,
    /// ggml's name, as `q8_0`.
    pub name: String,
    /// Values of one block; a row is a whole number of blocks.
    pub block_values: usize,
    /// Bytes of one block.
    pub block_bytes: usize,
    /// [`dequantize_rows`] knows it.
    pub to_f32: bool,
    /// [`quantize_rows`] knows it.
    pub from_f32: bool,
}

impl RowType {
    /// The type with this number.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a number that is not, or no longer, a type.
    pub fn of(number: u32) -> Result<RowType, Error> {
        let mut info = ffi::dim_type_info {
            name: std::ptr::null(),
            block_values: 0,
            block_bytes: 0,
            to_f32: false,
            from_f32: false,
        };
        // SAFETY: `info` is written.
        check_status(unsafe { ffi::dim_type_describe(number, &raw mut info) })?;
        // SAFETY: on DIM_OK the name is NUL-terminated and static.
        let name = unsafe { CStr::from_ptr(info.name) }.to_string_lossy().into_owned();
        Ok(RowType {
            number,
            name,
            block_values: info.block_values as usize,
            block_bytes: info.block_bytes as usize,
            to_f32: info.to_f32,
            from_f32: info.from_f32,
        })
    }

    /// Bytes of one row of `n_per_row` values; `None` if it is not a whole number of blocks.
    pub fn row_bytes(&self, n_per_row: usize) -> Option<usize> {
        if !n_per_row.is_multiple_of(self.block_values) {
            return None;
        }
        (n_per_row / self.block_values).checked_mul(self.block_bytes)
    }
}

/// F32 rows to rows of the type numbered `number`. `values`: (n_rows, n_per_row), row-major, all finite.
///
/// # Errors
/// [`Error::WrongSize`] if `values` is not whole rows, [`Error::InputNotFinite`],
/// [`Error::InvalidArgument`] for types that need an importance matrix and rows that are not whole blocks.
pub fn quantize_rows(number: u32, values: &[f32], n_per_row: usize) -> Result<Vec<u8>, Error> {
    let row_type = RowType::of(number)?;
    let (n_rows, row_bytes) = shape(&row_type, values.len(), n_per_row)?;
    let mut out = vec![0u8; n_rows * row_bytes];
    let mut fault = ffi::dim_fault::default();
    // SAFETY: `values` holds n_rows * n_per_row values, `out` its own length.
    let status = unsafe {
        ffi::dim_quantize_rows(
            number,
            values.as_ptr(),
            n_rows,
            n_per_row,
            out.as_mut_ptr(),
            out.len(),
            &raw mut fault,
        )
    };
    check(status, &fault)?;
    Ok(out)
}

/// Rows of the type numbered `number` to F32. `out`: (n_rows, n_per_row), row-major; its length says how many rows.
///
/// # Errors
/// [`Error::WrongSize`] if `out` is not whole rows or `rows` is not that many,
/// [`Error::InvalidArgument`] for types without a conversion and rows that are not whole blocks.
pub fn dequantize_rows(number: u32, rows: &[u8], n_per_row: usize, out: &mut [f32]) -> Result<(), Error> {
    let row_type = RowType::of(number)?;
    let (n_rows, _) = shape(&row_type, out.len(), n_per_row)?;
    let mut fault = ffi::dim_fault::default();
    // SAFETY: `out` holds n_rows * n_per_row values, `rows` its own length.
    let status = unsafe {
        ffi::dim_dequantize_rows(
            number,
            rows.as_ptr(),
            rows.len(),
            n_rows,
            n_per_row,
            out.as_mut_ptr(),
            &raw mut fault,
        )
    };
    check(status, &fault)
}

/// (rows, bytes of one) of `n_values` values.
fn shape(row_type: &RowType, n_values: usize, n_per_row: usize) -> Result<(usize, usize), Error> {
    let row_bytes = row_type.row_bytes(n_per_row).filter(|&bytes| bytes > 0).ok_or_else(|| {
        Error::InvalidArgument(format!(
            "a row of {n_per_row} values is not a whole number of {} blocks ({} values)",
            row_type.name, row_type.block_values
        ))
    })?;
    let n_rows = n_values / n_per_row;
    if n_rows == 0 || !n_values.is_multiple_of(n_per_row) {
        return Err(Error::WrongSize {
            got: n_values,
            expected: n_per_row * (n_rows + 1),
            text: format!("{n_values} values are not rows of {n_per_row}"),
        });
    }
    if n_rows.checked_mul(row_bytes).is_none() {
        return Err(Error::InvalidArgument(format!("{n_rows} rows of {n_per_row} values are too many")));
    }
    Ok((n_rows, row_bytes))
}
