//! A quantised model as a file of plain numbers: what a published Q4 or Q8 file says, without its quantisation.
//!
//! Every matrix of a quantised type is read by ggml's own conversion and stored as F16, BF16 or F32, rounded to the
//! nearest; whatever is not quantised stays byte for byte as it is, and so does every key but `general.file_type`. The
//! new file does not know more than the old one: it is for comparisons, for Core ML packages (which take no quantised
//! weights), and for arithmetic that does not depend on how a backend multiplies quantised blocks.
//!
//! | step | |
//! |---|---|
//! | [`Dequantised::new`] | checks the model, and plans the file |
//! | [`Dequantised::write`] | converts, some rows of a matrix at a time; the file appears when it is whole |

use std::{borrow::Cow, path::Path};

use crate::{
    failure::Explained,
    gguf::{
        self, Gguf, Tensor, TensorType, Value, check,
        write::{GgufWriter, TensorSpec, WriteError},
    },
    os,
    requantise::{self, RequantiseError, Unconvertible},
    slice::keys,
    text::Shown,
};

/// A model without its quantisation, planned.
#[derive(Debug)]
pub struct Dequantised<'a> {
    gguf: &'a Gguf,
    to: TensorType,
    metadata: Vec<(&'a str, Value<'a>)>,
    /// as they will be, and as they are
    tensors: Vec<(TensorSpec, Tensor<'a>)>,
}

impl<'a> Dequantised<'a> {
    /// Plans the file. `to` is F16, BF16 or F32.
    ///
    /// # Errors
    /// The file is no model, none of its tensors is quantised, or one is of a type that ggml does not read back.
    pub fn new(gguf: &'a Gguf, to: TensorType) -> Result<Dequantised<'a>, DequantiseError> {
        let file = || gguf.path().display().to_string();
        let Some(file_type) = file_type(to) else { return Err(DequantiseError::NotPlain(to)) };
        if gguf.entry(keys::ROLE).is_some() {
            return Err(DequantiseError::Slice(file()));
        }
        check::is_model(gguf)?;
        let is_quantized = |t: &Tensor<'_>| t.tensor_type().is_quantized();
        if !gguf.tensors().any(|t| is_quantized(&t)) {
            return Err(DequantiseError::NothingToDo(file()));
        }
        let mut tensors = Vec::with_capacity(gguf.n_tensors());
        for tensor in gguf.tensors() {
            let stored_as = if is_quantized(&tensor) {
                requantise::check(&tensor, to).map_err(|why| RequantiseError::Unconvertible {
                    tensor: tensor.name().to_owned(),
                    why,
                })?;
                to
            } else {
                tensor.tensor_type()
            };
            tensors.push((TensorSpec::new(tensor.name(), stored_as, tensor.dims()), tensor));
        }
        let metadata = gguf.carried().map(|entry| match entry.key {
            "general.file_type" => (entry.key, Value::U32(file_type)),
            key => (key, entry.value),
        });
        Ok(Dequantised { gguf, to, metadata: metadata.collect(), tensors })
    }

    /// Bytes the file will have.
    ///
    /// # Errors
    /// It would be larger than files can be.
    pub fn file_bytes(&self) -> Result<u64, DequantiseError> {
        let specs: Vec<_> = self.tensors.iter().map(|(spec, _)| spec.clone()).collect();
        Ok(GgufWriter::planned_bytes(&self.metadata, &specs)?)
    }

    /// Tensors that change their type.
    pub fn n_converted(&self) -> usize {
        self.tensors.iter().filter(|(_, tensor)| tensor.tensor_type().is_quantized()).count()
    }

    /// Writes it to `out`. `progress` hears bytes written and bytes in all, of tensors' data.
    ///
    /// # Errors
    /// Reading or writing fails, `out` is the model itself, or a value is too large for the type.
    pub fn write(&self, out: &Path, mut progress: impl FnMut(u64, u64)) -> Result<(), DequantiseError> {
        if self.gguf.files().any(|file| os::same_file(file, out)) {
            return Err(DequantiseError::OntoItself(out.display().to_string()));
        }
        let specs: Vec<_> = self.tensors.iter().map(|(spec, _)| spec.clone()).collect();
        let total = specs.iter().filter_map(TensorSpec::n_bytes).sum();
        let mut writer = GgufWriter::create(out, &self.metadata, &specs)?;
        let mut done = 0;
        for (spec, tensor) in &self.tensors {
            if spec.tensor_type == tensor.tensor_type() {
                writer.copy(tensor, 0, tensor.n_bytes())?;
                done += tensor.n_bytes();
                progress(done, total);
                continue;
            }
            requantise::rows::<DequantiseError>(tensor, self.to, |_, rows| {
                if overflowed(self.to, rows) {
                    return Err(DequantiseError::TooLarge { tensor: tensor.name().to_owned(), to: self.to });
                }
                writer.write(rows)?;
                done += rows.len() as u64;
                progress(done, total);
                Ok(())
            })?;
        }
        Ok(writer.finish()?)
    }
}

/// `general.file_type` of a model whose matrices are of this type; `None` for types that are not plain numbers.
fn file_type(ty: TensorType) -> Option<u32> {
    match ty {
        TensorType::F32 => Some(0),
        TensorType::F16 => Some(1),
        TensorType::BF16 => Some(32),
        _ => None,
    }
}

/// Whether rounding made a value infinite; they were finite before.
fn overflowed(ty: TensorType, rows: &[u8]) -> bool {
    let infinity: u16 = match ty {
        TensorType::F16 => 0x7c00,
        TensorType::BF16 => 0x7f80,
        _ => return false,
    };
    rows.chunks_exact(2).any(|b| u16::from_le_bytes([b[0], b[1]]) & 0x7fff == infinity)
}

/// Why a model could not be written without its quantisation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DequantiseError {
    /// The model breaks a rule, or cannot be read.
    #[error(transparent)]
    Read(#[from] gguf::Error),
    /// The file could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A tensor cannot be converted.
    #[error(transparent)]
    Convert(#[from] RequantiseError),
    /// The type asked for is a quantised one.
    #[error("{0} does not store values one by one")]
    NotPlain(TensorType),
    /// Nothing in it is quantised.
    #[error("nothing in {} is quantised", Shown(.0))]
    NothingToDo(String),
    /// A slice: its digests are over the weights as they are.
    #[error("{} is a slice, whose digests are those of its weights as they are", Shown(.0))]
    Slice(String),
    /// The file would take its own place.
    #[error("{} is the model itself", Shown(.0))]
    OntoItself(String),
    /// A value rounds to infinity.
    #[error("tensor '{}' has values that are too large for {to}", Shown(tensor))]
    TooLarge {
        /// The tensor.
        tensor: String,
        /// The type.
        to: TensorType,
    },
}

impl Explained for DequantiseError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let hint = match self {
            DequantiseError::Read(e) => return e.hint(),
            DequantiseError::Write(e) => return e.hint(),
            DequantiseError::Convert(RequantiseError::Unconvertible { why, .. }) => why.hint()?,
            #[cfg(feature = "engine")]
            DequantiseError::Convert(RequantiseError::Engine { .. }) => return None,
            DequantiseError::NotPlain(_) => "give f16, bf16 or f32",
            DequantiseError::NothingToDo(_) => "it can be used as it is",
            DequantiseError::Slice(_) => "convert the model, then cut it",
            DequantiseError::OntoItself(_) => "give the new file another name",
            DequantiseError::TooLarge { .. } => "bf16 and f32 have their range",
        };
        Some(hint.into())
    }

    fn is_misuse(&self) -> bool {
        match self {
            DequantiseError::Read(e) => e.is_misuse(),
            DequantiseError::Write(e) => e.is_misuse(),
            DequantiseError::Convert(RequantiseError::Unconvertible { why, .. }) => {
                !matches!(why, Unconvertible::NeedsEngine)
            }
            #[cfg(feature = "engine")]
            DequantiseError::Convert(RequantiseError::Engine { .. }) => false,
            _ => true,
        }
    }
}
