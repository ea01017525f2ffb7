//! Vocabulary matrices in another type, through ggml's own quantisers, a few rows at a time.
//!
//! Without the `engine` feature both functions say so.

use std::fmt;

use crate::{
    gguf::{self, Tensor, TensorType},
    text::Shown,
};

/// Why a tensor cannot be stored in another type.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unconvertible {
    /// This build has no quantisers.
    NeedsEngine,
    /// The type takes whole groups of values.
    RowNotWhole {
        /// Values per row.
        row: u64,
        /// Values per group.
        multiple: u64,
    },
    /// The model keeps a scale beside its lm_head, which belongs to the values as they are.
    Scaled,
    /// ggml does not read this type.
    NotRead(TensorType),
    /// ggml writes the type only with an importance matrix.
    NotWritten,
}

impl fmt::Display for Unconvertible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unconvertible::NeedsEngine => f.write_str("changing types needs ggml's quantisers"),
            Unconvertible::RowNotWhole { row, multiple } => {
                write!(f, "its rows have {row} values, not a multiple of {multiple}")
            }
            Unconvertible::Scaled => f.write_str("the model keeps a scale beside its lm_head"),
            Unconvertible::NotRead(from) => write!(f, "ggml does not read {from} back"),
            Unconvertible::NotWritten => {
                f.write_str("ggml does not write this type without an importance matrix")
            }
        }
    }
}

impl Unconvertible {
    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Unconvertible::NeedsEngine => Some("build gguf-tools with its `engine` feature (the default)"),
            _ => None,
        }
    }
}

/// Converting a tensor failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequantiseError {
    /// It cannot be stored so.
    #[error("tensor '{}': {why}", Shown(tensor))]
    Unconvertible {
        /// The tensor.
        tensor: String,
        /// Why not.
        why: Unconvertible,
    },
    /// ggml refused.
    #[cfg(feature = "engine")]
    #[error("tensor '{}': {source}", Shown(tensor))]
    Engine {
        /// The tensor.
        tensor: String,
        /// What ggml said.
        source: llama_sys_patch::Error,
    },
}

/// Whether a tensor can be stored as `to`.
///
/// # Errors
/// The `engine` feature is off, or the types do not fit.
pub(crate) fn check(tensor: &Tensor<'_>, to: TensorType) -> Result<(), Unconvertible> {
    let (row, multiple) = (tensor.dims()[0], to.block_len());
    if !row.is_multiple_of(multiple) {
        return Err(Unconvertible::RowNotWhole { row, multiple });
    }
    engine::check(tensor.tensor_type(), to)
}

/// Values converted at a time: 4 MiB of them.
#[cfg(feature = "engine")]
const VALUES_AT_ONCE: u64 = 1 << 20;

/// Converts a tensor. `each` takes some rows as they were and as they are now.
///
/// # Errors
/// Reading or converting fails, or `each` does.
#[cfg(feature = "engine")]
pub(crate) fn rows<E: From<gguf::Error> + From<RequantiseError>>(
    tensor: &Tensor<'_>,
    to: TensorType,
    mut each: impl FnMut(&[u8], &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let failed = |source| RequantiseError::Engine { tensor: tensor.name().to_owned(), source };
    let n_per_row = tensor.dims()[0] as usize;
    let row_bytes = tensor.row_bytes();
    let n_rows = tensor.n_bytes() / row_bytes;
    let rows_at_once = (VALUES_AT_ONCE / n_per_row as u64).clamp(1, n_rows);
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
pub(crate) fn rows<E: From<gguf::Error> + From<RequantiseError>>(
    tensor: &Tensor<'_>,
    _to: TensorType,
    _each: impl FnMut(&[u8], &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let why = Unconvertible::NeedsEngine;
    Err(RequantiseError::Unconvertible { tensor: tensor.name().to_owned(), why }.into())
}

#[cfg(feature = "engine")]
mod engine {
    use super::{TensorType, Unconvertible};

    pub(super) fn check(from: TensorType, to: TensorType) -> Result<(), Unconvertible> {
        let known = llama_sys_patch::RowType::of;
        if !known(from.id()).is_ok_and(|ty| ty.to_f32) {
            return Err(Unconvertible::NotRead(from));
        }
        if !known(to.id()).is_ok_and(|ty| ty.from_f32) {
            return Err(Unconvertible::NotWritten);
        }
        Ok(())
    }
}

#[cfg(not(feature = "engine"))]
mod engine {
    use super::{TensorType, Unconvertible};

    pub(super) fn check(_from: TensorType, _to: TensorType) -> Result<(), Unconvertible> {
        Err(Unconvertible::NeedsEngine)
    }
}
