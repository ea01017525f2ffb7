//! What each slice's file will hold where every slice is a model of its own, which unmodified llama.cpp loads: its blocks are
//! renumbered from 0, and it has what the loader wants besides them.
//!
//! | slice | vocabulary | besides its blocks |
//! |---|---|---|
//! | head | `token_embd.weight`, the tokenizer | `output_norm` (the loader wants it) |
//! | middle | one row of `token_embd.weight`, no tokenizer | `output_norm` |
//! | tail | the lm_head as `token_embd.weight`, the tokenizer | `output_norm`, `output.bias` and friends |
//!
//! That is right for [some architectures](crate::arch) only.

use std::borrow::Cow;

use dim_core::blocks::BlockRange;

use super::{PlanError, SlicePlan, Source, common::Common};
use crate::{
    arch::{Arch, LmHead},
    gguf::{
        Tensor, TensorType, Value, ValueType, check,
        write::{GgufWriter, TensorSpec},
    },
    needs::Crossing,
    slice::{Role, VERSION_RENUMBERED},
};

/// Describes the slices of one model.
pub(super) struct Cutter<'a, 'p> {
    pub(super) of: Common<'a, 'p>,
    pub(super) arch: &'static Arch,
}

impl<'a> Cutter<'a, '_> {
    /// One slice: its metadata, its tensors, and what it takes.
    pub(super) fn slice(&self, role: Role, blocks: BlockRange) -> Result<SlicePlan<'a>, PlanError> {
        let tensors = self.tensors(role, blocks)?;
        let metadata = self.metadata(role, blocks, tensors.len())?;
        let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
        let row = |block, ends| match ends {
            true => Crossing::default(),
            false => Crossing::hidden_row(self.of.hparams.n_embd, block),
        };
        Ok(SlicePlan {
            role,
            blocks,
            file: self.of.file_name(role, blocks),
            file_bytes: GgufWriter::planned_bytes(&metadata, &specs)?,
            weight_bytes: specs.iter().filter_map(TensorSpec::n_bytes).sum(),
            kv_bytes_per_position: self.of.hparams.kv_bytes_per_position(blocks.as_range()),
            state_bytes_per_session: 0,
            input: row(blocks.first.wrapping_sub(1), role == Role::Head),
            output: row(blocks.last, role == Role::Tail),
            reads_tokens: false,
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
        for entry in self.of.gguf.carried() {
            let key = entry.key;
            let below_arch = key.strip_prefix(arch).and_then(|rest| rest.strip_prefix('.'));
            let value = match (key, below_arch) {
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
            set("residual_scale", Value::F32(scale.of(self.of.hparams.n_blocks)));
        }
        out.extend(self.of.own_keys(VERSION_RENUMBERED, role, blocks, n_tensors));
        Ok(out)
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
        if array.len() != u64::from(self.of.hparams.n_blocks) || NOT_PER_BLOCK.contains(&name) {
            return Ok(value);
        }
        if !PER_BLOCK.contains(&name) || matches!(array.element_type(), ValueType::String | ValueType::Array)
        {
            return Err(PlanError::UnknownArray { file: self.of.file(), key: key.to_owned() });
        }
        let range = blocks.as_range();
        // the length was compared: the range is inside
        Ok(array.slice(range.start.into()..range.end.into()).map_or(value, Value::Array))
    }

    fn tensors(&self, role: Role, blocks: BlockRange) -> Result<Vec<(TensorSpec, Source<'a>)>, PlanError> {
        let mut out = Vec::new();
        let own_head = self.needs_own_head();
        let has_output = self.of.gguf.tensor("output.weight").is_some();
        for tensor in self.of.gguf.tensors() {
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
                    out.push(self.of.vocabulary(tensor, "token_embd.weight", self.of.request.embed_type)?);
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
                    out.push(self.of.vocabulary(tensor, "token_embd.weight", self.of.request.output_type)?);
                }
                ("output.weight", Role::Head) if own_head => out.push(placeholder(tensor)),
                ("output.weight", Role::Head) => {}
                ("output.weight", Role::Tail) => {
                    let name = if own_head { "output.weight" } else { "token_embd.weight" };
                    out.push(self.of.vocabulary(tensor, name, self.of.request.output_type)?);
                }
                ("output.bias" | "output.scale" | "output.input_scale", Role::Tail) => out.push(keep()),
                ("output.bias", Role::Head) if self.arch.lm_head == LmHead::Own => out.push(keep()),
                ("output.bias", Role::Middle) if self.arch.lm_head == LmHead::Own => {
                    out.push((TensorSpec::new(name, tensor.tensor_type(), [1]), Source::Start(tensor)));
                }
                ("output.bias" | "output.scale" | "output.input_scale", _) => {}
                _ if name.starts_with("output_norm.") || ROPE_TENSORS.contains(&name) => out.push(keep()),
                _ => {
                    return Err(PlanError::UnknownTensor { file: self.of.file(), tensor: name.to_owned() });
                }
            }
        }
        Ok(out)
    }

    /// Whether the lm_head must stay `output.weight` in every file: the loader demands that name, or there is a
    /// scale to it, which the loader refuses (by ending the process) for an lm_head that is the embedding.
    fn needs_own_head(&self) -> bool {
        let scaled =
            ["output.scale", "output.input_scale"].iter().any(|name| self.of.gguf.tensor(name).is_some());
        self.arch.lm_head == LmHead::Own || scaled && self.of.gguf.tensor("output.weight").is_some()
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
