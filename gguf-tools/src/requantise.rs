//! Vocabulary matrices in another type, through ggml's own quantisers, a few rows at a time.
//!
//! The only file of the reader, planner and writer that touches the engine. Without the `engine` feature both
//! functions say so.

use crate::{
    gguf::{Tensor, TensorType},
    plan::PlanError,
    split::SplitError,
};

/// Whether a tensor can be stored as `to`.
///
/// # Errors
/// The `engine` feature is off, or the types do not fit.
pub(crate) fn check(tensor: &Tensor<'_>, to: TensorType) -> Result<(), PlanError> {
    let refuse = |why: String| Err(PlanError::Type { tensor: tensor.name().to_owned(), to, why });
    if !tensor.dims()[0].is_multiple_of(to.block_len()) {
        return refuse(format!(
            "its rows have {} values, not a multiple of {}",
            tensor.dims()[0],
            to.block_len()
        ));
    }
    if !cfg!(feature = "engine") {
        return Err(PlanError::NeedsEngine);
    }
    #[cfg(feature = "engine")]
    {
        let known = llama_sys_patch::RowType::of;
        if !known(tensor.tensor_type().id()).is_ok_and(|ty| ty.to_f32) {
            return refuse(format!("ggml does not read {} back", tensor.tensor_type()));
        }
        if !known(to.id()).is_ok_and(|ty| ty.from_f32) {
            return refuse("ggml does not write this type without an importance matrix".into());
        }
    }
    Ok(())
}

/// Converts a tensor. `each` takes some rows as they were and as they are now.
///
/// # Errors
/// Reading or converting fails, or `each` does.
#[cfg(feature = "engine")]
pub(crate) fn rows(
    tensor: &Tensor<'_>,
    to: TensorType,
    mut each: impl FnMut(&[u8], &[u8]) -> Result<(), SplitError>,
) -> Result<(), SplitError> {
    let failed = |e: llama_sys_patch::Error| SplitError::Requantise {
        tensor: tensor.name().to_owned(),
        why: e.to_string(),
    };
    let n_per_row = tensor.dims()[0] as usize;
    let row_bytes = tensor.row_bytes();
    let n_rows = tensor.n_bytes() / row_bytes;
    // about 4 MiB of values at a time, at least one row
    let rows_at_once = ((1 << 20) / n_per_row as u64).clamp(1, n_rows);
    let mut from = vec![0; (rows_at_once * row_bytes) as usize];
    let mut values = vec![0f32; rows_at_once as usize * n_per_row]; // (rows_at_once, n_per_row)
    let mut row = 0;
    while row < n_rows {
        let n = rows_at_once.min(n_rows - row);
        let from = &mut from[..(n * row_bytes) as usize];
        let values = &mut values[..n as usize * n_per_row];
        tensor.read_at(row * row_bytes, from)?;
        llama_sys_patch::dequantize_rows(tensor.tensor_type().id(), from, n_per_row, values)
            .map_err(failed)?;
        let out = llama_sys_patch::quantize_rows(to.id(), values, n_per_row).map_err(failed)?;
        each(from, &out)?;
        row += n;
    }
    Ok(())
}

/// Without the engine nothing is planned to be converted.
#[cfg(not(feature = "engine"))]
pub(crate) fn rows(
    tensor: &Tensor<'_>,
    _to: TensorType,
    _each: impl FnMut(&[u8], &[u8]) -> Result<(), SplitError>,
) -> Result<(), SplitError> {
    Err(SplitError::Requantise { tensor: tensor.name().to_owned(), why: PlanError::NeedsEngine.to_string() })
}
