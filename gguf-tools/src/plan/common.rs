//! What is the same for slices of both kinds.

use std::borrow::Cow;

use dim_core::blocks::BlockRange;

use super::{PlanError, Request, Source};
use crate::{
    digest::Sha,
    gguf::{Array, Gguf, Tensor, TensorType, Value, check::Hparams, write::TensorSpec},
    requantise::{self, Unconvertible},
    slice::{Role, keys},
};

/// The model that is cut, and how.
pub(super) struct Common<'a, 'p> {
    pub(super) gguf: &'a Gguf,
    pub(super) hparams: &'p Hparams,
    pub(super) request: &'p Request,
    pub(super) model_name: &'p str,
    pub(super) params_sha256: Sha,
}

impl<'a> Common<'a, '_> {
    /// The model's file, for errors.
    pub(super) fn file(&self) -> String {
        self.gguf.path().display().to_string()
    }

    /// The name of a slice's file.
    pub(super) fn file_name(&self, role: Role, blocks: BlockRange) -> String {
        let stem = &self.request.stem;
        match role {
            Role::Middle => format!("{stem}.middle-{blocks}.gguf"),
            _ => format!("{stem}.{role}.gguf"),
        }
    }

    /// The keys under `dim.` of every slice. Digests that are known only when all data was seen are zeros.
    pub(super) fn own_keys(
        &self,
        version: u32,
        role: Role,
        blocks: BlockRange,
        n_tensors: usize,
    ) -> impl Iterator<Item = (Cow<'a, str>, Value<'a>)> {
        let zeros = Sha([0; 32]).to_string();
        let of_tensors = Array::of_strings(std::iter::repeat_n(&zeros, n_tensors));
        let own = [
            (keys::VERSION, Value::U32(version)),
            (keys::ROLE, Value::string(role.as_str())),
            (keys::FIRST_BLOCK, Value::U32(blocks.first)),
            (keys::LAST_BLOCK, Value::U32(blocks.last)),
            (keys::MODEL_BLOCKS, Value::U32(self.hparams.n_chain())),
            (keys::MODEL_NAME, Value::string(self.model_name)),
            (keys::MODEL_SHA256, Value::string(zeros.as_str())),
            (keys::PARAMS_SHA256, Value::string(self.params_sha256.to_string())),
            (keys::SLICE_SHA256, Value::string(zeros.as_str())),
            (keys::TENSOR_SHA256, Value::Array(of_tensors)),
        ];
        own.into_iter().map(|(key, value)| (Cow::Borrowed(key), value))
    }

    /// A tensor under this name, in another type if that was asked.
    pub(super) fn vocabulary(
        &self,
        tensor: Tensor<'a>,
        name: &str,
        to: Option<TensorType>,
    ) -> Result<(TensorSpec, Source<'a>), PlanError> {
        let from = tensor.tensor_type();
        let Some(to) = to.filter(|&to| to != from) else {
            return Ok((TensorSpec::new(name, from, tensor.dims()), Source::Whole(tensor)));
        };
        let refuse = |why| PlanError::Type { tensor: tensor.name().to_owned(), to, why };
        if self.gguf.tensor("output.scale").is_some() || self.gguf.tensor("output.input_scale").is_some() {
            return Err(refuse(Unconvertible::Scaled));
        }
        requantise::check(&tensor, to).map_err(refuse)?;
        Ok((TensorSpec::new(name, to, tensor.dims()), Source::Requantised(tensor)))
    }
}
