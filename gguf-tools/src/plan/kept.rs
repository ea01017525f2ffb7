//! What each slice's file will hold where blocks, names and keys stay the model's: the tensors of its range, and the names,
//! types and shapes of all others.

use std::{borrow::Cow, collections::HashSet};

use dim_core::blocks::BlockRange;

use super::{LeftOut, PlanError, SlicePlan, Source, common::Common, model_vocab_size};
use crate::{
    gguf::{
        Tensor, Value,
        absent::{self, Absent},
        check,
        write::{GgufWriter, TensorSpec},
    },
    needs::Needs,
    slice::{Role, VERSION},
};

/// One slice: its metadata, its tensors, and what it takes.
pub(super) fn slice<'a>(
    of: &Common<'a, '_>,
    role: Role,
    blocks: BlockRange,
    needs: Needs,
) -> Result<SlicePlan<'a>, PlanError> {
    let wanted: HashSet<&str> = needs.tensors.iter().map(String::as_str).collect();
    let mut tensors = Vec::with_capacity(wanted.len());
    let mut absent = Vec::new();
    for tensor in of.gguf.tensors() {
        match wanted.contains(tensor.name()) {
            true => tensors.push(source(of, role, tensor)?),
            false => absent.push(Absent::from(tensor)),
        }
    }
    if let Some(name) = needs.tensors.iter().find(|name| of.gguf.tensor(name).is_none()) {
        return Err(PlanError::UnknownTensor { file: of.file(), tensor: name.clone() });
    }
    let mut metadata = metadata(of, role);
    metadata.extend(of.own_keys(VERSION, role, blocks, tensors.len()));
    metadata.extend(absent::entries(&absent).map(|(key, value)| (Cow::Borrowed(key), value)));
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    Ok(SlicePlan {
        role,
        blocks,
        file: of.file_name(role, blocks),
        file_bytes: GgufWriter::planned_bytes(&metadata, &specs)?,
        weight_bytes: specs.iter().filter_map(TensorSpec::n_bytes).sum(),
        kv_bytes_per_position: needs.kv_bytes_per_position,
        state_bytes_per_session: needs.state_bytes_per_session,
        input: needs.input,
        output: needs.output,
        // the head gets nothing else
        reads_tokens: needs.reads_tokens && role != Role::Head,
        metadata,
        tensors,
    })
}

/// The model's keys as they are. A middle has no tokenizer: its texts are megabytes, and stay with the host; the size of the
/// vocabulary is said instead.
fn metadata<'a>(of: &Common<'a, '_>, role: Role) -> Vec<(Cow<'a, str>, Value<'a>)> {
    let is_middle = role == Role::Middle;
    let vocab_size = model_vocab_size(&of.hparams.arch);
    let n_vocab = Value::U32(of.hparams.n_vocab);
    let mut out: Vec<(Cow<'a, str>, Value<'a>)> = Vec::new();
    for entry in of.gguf.carried() {
        let value = match entry.key {
            "tokenizer.ggml.model" if is_middle => Value::string("none"),
            // nobody looks at it beside a tokenizer, and some files have it wrong
            key if is_middle && key == vocab_size => n_vocab.clone(),
            key if is_middle && key.starts_with("tokenizer.") => continue,
            _ => entry.value,
        };
        out.push((Cow::Borrowed(entry.key), value));
    }
    if is_middle && of.gguf.entry(&vocab_size).is_none() {
        out.push((Cow::Owned(vocab_size), n_vocab));
    }
    out
}

/// A tensor of the slice: as it is, but for the vocabulary's matrices where another type was asked for.
fn source<'a>(
    of: &Common<'a, '_>,
    role: Role,
    tensor: Tensor<'a>,
) -> Result<(TensorSpec, Source<'a>), PlanError> {
    let to = match (tensor.name(), role) {
        ("token_embd.weight", Role::Head) => of.request.embed_type,
        // an lm_head that is the embedding
        ("token_embd.weight" | "output.weight", Role::Tail) => of.request.output_type,
        _ => None,
    };
    of.vocabulary(tensor, tensor.name(), to)
}

/// What no slice holds: blocks that predict further tokens, and what no part of the graph reads.
pub(super) fn left_out(of: &Common<'_, '_>, slices: &[SlicePlan<'_>], n_chain: u32) -> LeftOut {
    let held: HashSet<&str> =
        slices.iter().flat_map(|slice| &slice.tensors).map(|(spec, _)| spec.name.as_str()).collect();
    let mut left = LeftOut::default();
    for tensor in of.gguf.tensors().filter(|tensor| !held.contains(tensor.name())) {
        match check::block_of(tensor.name()).filter(|&block| block >= n_chain) {
            Some(block) => {
                left.predicting.insert(block);
                left.predicting_bytes += tensor.n_bytes();
            }
            None => {
                left.unread.push(tensor.name().to_owned());
                left.unread_bytes += tensor.n_bytes();
            }
        }
    }
    left
}
