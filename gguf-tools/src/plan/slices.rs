//! What each slice's file will hold: its keys, and its tensors with where each comes from.

use std::borrow::Cow;

use dim_core::blocks::BlockRange;

use super::{PlanError, Request, SlicePlan, Source};
use crate::{
    arch::{Arch, LmHead},
    digest::Sha,
    gguf::{
        Array, Gguf, Tensor, TensorType, Value, ValueType,
        check::{self, Hparams},
        limits::DEFAULT_ALIGNMENT,
        write::{GgufWriter, TensorSpec},
    },
    requantise::{self, Unconvertible},
    slice::{Role, VERSION, keys},
};

/// Describes the slices of one model.
pub(super) struct Cutter<'a, 'p> {
    pub(super) gguf: &'a Gguf,
    pub(super) arch: &'static Arch,
    pub(super) hparams: &'p Hparams,
    pub(super) request: &'p Request,
    pub(super) model_name: &'p str,
    pub(super) params_sha256: Sha,
}

impl<'a> Cutter<'a, '_> {
    /// One slice: its metadata, its tensors, and what it takes.
    pub(super) fn slice(&self, role: Role, blocks: BlockRange) -> Result<SlicePlan<'a>, PlanError> {
        let tensors = self.tensors(role, blocks)?;
        let metadata = self.metadata(role, blocks, tensors.len())?;
        let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
        let stem = &self.request.stem;
        let file = match role {
            Role::Middle => format!("{stem}.middle-{blocks}.gguf"),
            _ => format!("{stem}.{role}.gguf"),
        };
        Ok(SlicePlan {
            role,
            blocks,
            file,
            file_bytes: GgufWriter::planned_bytes(&metadata, &specs)?,
            weight_bytes: specs.iter().filter_map(TensorSpec::n_bytes).sum(),
            kv_bytes_per_position: self.hparams.kv_bytes_per_position(blocks.as_range()),
            metadata,
            tensors,
        })
    }

    fn metadata(
        &self,
        role: Role,
        blocks: BlockRange,
        n_tensors: usize,
    ) -> Result<Vec<(Cow<'a, str>, Value<'a>)>, PlanError> {
        let arch = self.arch.name;
        let mut out: Vec<(Cow<'a, str>, Value<'a>)> = Vec::new();
        for entry in self.gguf.metadata() {
            let key = entry.key;
            let below_arch = key.strip_prefix(arch).and_then(|rest| rest.strip_prefix('.'));
            let value = match (key, below_arch) {
                // how the source was spread over files is no concern of a slice
                _ if key.starts_with("split.") => continue,
                // a slice is laid out anew, so that llama.cpp can map it
                ("general.alignment", _) if self.gguf.alignment() < DEFAULT_ALIGNMENT => continue,
                _ if role == Role::Middle
                    && key.starts_with("tokenizer.")
                    && key != "tokenizer.ggml.model" =>
                {
                    continue;
                }
                ("tokenizer.ggml.model", _) if role == Role::Middle => Value::string("none"),
                (_, Some("block_count")) => Value::U32(blocks.count()),
                (_, Some("vocab_size")) if role == Role::Middle => Value::U32(1),
                (_, Some("embedding_scale")) if role != Role::Head => match self.arch.neutral_embedding_scale
                {
                    Some(scale) => Value::F32(scale),
                    None => entry.value,
                },
                (_, Some(name)) => self.per_block(key, name, entry.value, blocks)?,
                _ => entry.value,
            };
            out.push((Cow::Borrowed(key), value));
        }
        let mut set = |name: &str, value: Value<'static>| {
            let key = format!("{arch}.{name}");
            if !out.iter().any(|(k, _)| *k == key) {
                out.push((Cow::Owned(key), value));
            }
        };
        if role == Role::Middle {
            set("vocab_size", Value::U32(1));
        }
        if let Some(scale) = self.arch.neutral_embedding_scale.filter(|_| role != Role::Head) {
            set("embedding_scale", Value::F32(scale));
        }
        if let Some(scale) = self.arch.residual_scale {
            set("residual_scale", Value::F32(scale.of(self.hparams.n_blocks)));
        }
        out.extend(self.own_keys(role, blocks, n_tensors).map(|(key, value)| (Cow::Borrowed(key), value)));
        Ok(out)
    }

    /// The keys under `dim.`. Digests that are known only when all data was seen are zeros.
    fn own_keys(
        &self,
        role: Role,
        blocks: BlockRange,
        n_tensors: usize,
    ) -> [(&'static str, Value<'static>); 10] {
        let zeros = Sha([0; 32]).to_string();
        let of_tensors = Array::of_strings(std::iter::repeat_n(&zeros, n_tensors));
        [
            (keys::VERSION, Value::U32(VERSION)),
            (keys::ROLE, Value::string(role.as_str())),
            (keys::FIRST_BLOCK, Value::U32(blocks.first)),
            (keys::LAST_BLOCK, Value::U32(blocks.last)),
            (keys::MODEL_BLOCKS, Value::U32(self.hparams.n_blocks)),
            (keys::MODEL_NAME, Value::string(self.model_name)),
            (keys::MODEL_SHA256, Value::string(zeros.as_str())),
            (keys::PARAMS_SHA256, Value::string(self.params_sha256.to_string())),
            (keys::SLICE_SHA256, Value::string(zeros.as_str())),
            (keys::TENSOR_SHA256, Value::Array(of_tensors)),
        ]
    }

    /// An array with a value per block, cut to the slice's blocks; anything else as it is.
    fn per_block(
        &self,
        key: &str,
        name: &str,
        value: Value<'a>,
        blocks: BlockRange,
    ) -> Result<Value<'a>, PlanError> {
        let Value::Array(array) = &value else { return Ok(value) };
        if array.len() != u64::from(self.hparams.n_blocks) || NOT_PER_BLOCK.contains(&name) {
            return Ok(value);
        }
        if !PER_BLOCK.contains(&name) || matches!(array.element_type(), ValueType::String | ValueType::Array)
        {
            return Err(PlanError::UnknownArray {
                file: self.gguf.path().display().to_string(),
                key: key.to_owned(),
            });
        }
        let range = blocks.as_range();
        // the length was compared: the range is inside
        Ok(array.slice(range.start.into()..range.end.into()).map_or(value, Value::Array))
    }

    fn tensors(&self, role: Role, blocks: BlockRange) -> Result<Vec<(TensorSpec, Source<'a>)>, PlanError> {
        let mut out = Vec::new();
        let own_head = self.needs_own_head();
        let has_output = self.gguf.tensor("output.weight").is_some();
        for tensor in self.gguf.tensors() {
            let name = tensor.name();
            let keep = || (TensorSpec::new(name, tensor.tensor_type(), tensor.dims()), Source::Whole(tensor));
            if let Some(block) = check::block_of(name) {
                if blocks.contains(block) {
                    let rest = &name[name.match_indices('.').nth(1).map_or(0, |(i, _)| i)..];
                    let renamed = format!("blk.{}{rest}", block - blocks.first);
                    out.push((TensorSpec { name: renamed, ..keep().0 }, Source::Whole(tensor)));
                }
                continue;
            }
            match (name, role) {
                ("token_embd.weight", Role::Head) => {
                    out.push(self.vocabulary(tensor, "token_embd.weight", self.request.embed_type)?);
                }
                ("token_embd.weight" | "output.weight", Role::Middle) => {
                    // one row, for the loader; the tail's or head's own type
                    if name == "token_embd.weight" || own_head {
                        out.push((
                            TensorSpec::new(name, tensor.tensor_type(), [tensor.dims()[0], 1]),
                            Source::Start(tensor),
                        ));
                    }
                }
                ("token_embd.weight", Role::Tail) if own_head => out.push(placeholder(tensor)),
                ("token_embd.weight", Role::Tail) if has_output => {}
                ("token_embd.weight", Role::Tail) => {
                    out.push(self.vocabulary(tensor, "token_embd.weight", self.request.output_type)?);
                }
                ("output.weight", Role::Head) if own_head => out.push(placeholder(tensor)),
                ("output.weight", Role::Head) => {}
                ("output.weight", Role::Tail) => {
                    let name = if own_head { "output.weight" } else { "token_embd.weight" };
                    out.push(self.vocabulary(tensor, name, self.request.output_type)?);
                }
                ("output.bias" | "output.scale" | "output.input_scale", Role::Tail) => out.push(keep()),
                ("output.bias", Role::Head) if self.arch.lm_head == LmHead::Own => out.push(keep()),
                ("output.bias", Role::Middle) if self.arch.lm_head == LmHead::Own => {
                    out.push((TensorSpec::new(name, tensor.tensor_type(), [1]), Source::Start(tensor)));
                }
                ("output.bias" | "output.scale" | "output.input_scale", _) => {}
                _ if name.starts_with("output_norm.") || ROPE_TENSORS.contains(&name) => out.push(keep()),
                _ => {
                    return Err(PlanError::UnknownTensor {
                        file: self.gguf.path().display().to_string(),
                        tensor: name.to_owned(),
                    });
                }
            }
        }
        Ok(out)
    }

    /// Whether the lm_head must stay `output.weight` in every file: the loader demands that name, or there is a
    /// scale to it, which the loader refuses (by ending the process) for an lm_head that is the embedding.
    fn needs_own_head(&self) -> bool {
        let scaled =
            ["output.scale", "output.input_scale"].iter().any(|name| self.gguf.tensor(name).is_some());
        self.arch.lm_head == LmHead::Own || scaled && self.gguf.tensor("output.weight").is_some()
    }

    /// One of the two vocabulary matrices, in another type if that was asked.
    fn vocabulary(
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

/// A matrix of the same shape that takes as little room as can be.
fn placeholder<'a>(like: Tensor<'a>) -> (TensorSpec, Source<'a>) {
    let ty = [TensorType::IQ1_S, TensorType::Q4_0, TensorType::F16]
        .into_iter()
        .find(|ty| like.dims()[0].is_multiple_of(ty.block_len()))
        .unwrap_or(TensorType::F16);
    (TensorSpec::new(like.name(), ty, like.dims()), Source::Placeholder)
}

/// Keys below the architecture's name whose arrays have one value per block.
const PER_BLOCK: &[&str] = &[
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_used_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.sliding_window_pattern",
    "attention.rope_pattern",
    "swiglu_clamp_exp",
    "swiglu_clamp_shexp",
];

/// Keys whose arrays have another meaning, whatever their length.
const NOT_PER_BLOCK: &[&str] = &["rope.dimension_sections", "classifier.output_labels"];

/// Tables for rotations, which every block reads.
const ROPE_TENSORS: &[&str] = &["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"];
