//! Which types of weights can be turned into F16, and a row of any of them as F32.

use dim_core::blocks::BlockRange;
use half::f16;

use super::Error;
use crate::gguf::{Gguf, Tensor, TensorType, check::block_of};
use crate::text::Shown;

/// Types other than F16 among the weights of `blocks` (not the vectors, which are F32 in every model), and which of
/// them need ggml's dequantiser.
pub fn converted_types(gguf: &Gguf, blocks: BlockRange) -> Vec<TensorType> {
    let mut types: Vec<TensorType> = gguf
        .tensors()
        .filter(|t| t.dims().len() > 1 && t.tensor_type() != TensorType::F16)
        .filter(|t| block_of(t.name()).is_some_and(|b| blocks.contains(b)))
        .map(|t| t.tensor_type())
        .collect();
    types.sort();
    types.dedup();
    types
}

/// Checks that every weight of `blocks` is of a type that can be turned into F16 here.
///
/// # Errors
/// The first tensor that is not.
pub fn check_types(gguf: &Gguf, blocks: BlockRange) -> Result<(), Error> {
    gguf.tensors()
        .filter(|t| block_of(t.name()).is_some_and(|b| blocks.contains(b)))
        .try_for_each(|t| check_type(&t))
}

/// Checks that a weight is of a type that can be turned into F16 here.
///
/// # Errors
/// It is not.
pub(super) fn check_type(tensor: &Tensor<'_>) -> Result<(), Error> {
    let found = tensor.tensor_type();
    if matches!(found, TensorType::F16 | TensorType::BF16 | TensorType::F32) || dequantise::can(found) {
        return Ok(());
    }
    let tensor = Shown(tensor.name()).to_string();
    Err(if cfg!(feature = "engine") || !found.is_quantized() {
        Error::TensorType { tensor, found }
    } else {
        Error::NeedsEngine { tensor, found }
    })
}

/// One row as F32.
pub(super) fn to_f32(tensor: &Tensor<'_>, raw: &[u8], values: &mut [f32]) -> Result<(), Error> {
    match tensor.tensor_type() {
        TensorType::F32 => {
            for (value, b) in values.iter_mut().zip(raw.chunks_exact(4)) {
                *value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        TensorType::BF16 => {
            for (value, b) in values.iter_mut().zip(raw.chunks_exact(2)) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
            }
        }
        TensorType::F16 => {
            for (value, b) in values.iter_mut().zip(raw.chunks_exact(2)) {
                *value = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        quantised => dequantise::row(quantised, raw, values)
            .map_err(|why| Error::Dequantise { tensor: Shown(tensor.name()).to_string(), why })?,
    }
    Ok(())
}

/// ggml's dequantisers, where this build has them.
mod dequantise {
    use crate::gguf::TensorType;

    /// Whether rows of this type can be turned into F32 here.
    #[cfg(feature = "engine")]
    pub(super) fn can(tensor_type: TensorType) -> bool {
        llama_sys_patch::RowType::of(tensor_type.id()).is_ok_and(|t| t.to_f32)
    }

    /// One row of a quantised type as F32.
    #[cfg(feature = "engine")]
    pub(super) fn row(tensor_type: TensorType, raw: &[u8], values: &mut [f32]) -> Result<(), String> {
        llama_sys_patch::dequantize_rows(tensor_type.id(), raw, values.len(), values)
            .map_err(|e| e.to_string())
    }

    #[cfg(not(feature = "engine"))]
    pub(crate) fn can(_: TensorType) -> bool {
        false
    }

    #[cfg(not(feature = "engine"))]
    pub(crate) fn row(_: TensorType, _: &[u8], _: &mut [f32]) -> Result<(), String> {
        unreachable!("a build without the engine feature refuses quantised tensors before it reads them")
    }
}
