//! What a file says about its model, read into [`Hparams`] or refused.
//!
//! llama.cpp answers some wrong numbers by ending the process (`GGML_ASSERT` stays in release builds) and some
//! by computing nonsense: a block count of 0 or 513, an unknown rope scaling, a normalisation epsilon below
//! zero, a token that stands twice, a norm stored as F16. Whoever loads a file calls [`model`] first. Each rule
//! here names the key or tensor, what the file says and what it must be.
//!
//! Not checked: what llama.cpp itself refuses with an error, such as most tensors that are missing or of the wrong shape.
//! Of architectures that are not [known one by one](crate::arch) only what all have in common is checked: whoever has not
//! made such a file loads it in [a process of its own](crate::apart) first.
//!
//! A slice is checked as the model that it is a part of: the tensors that it [lacks](super::absent) count as if they were
//! there.
//!
//! `keys` reads the numbers under the architecture's name, `vocabulary` the tokenizer, `whole` the list of tensors; what
//! concerns them is here.

mod keys;
mod vocabulary;
mod whole;

use super::{
    absent,
    error::{Error, NotAModel, Place, Rule},
    limits::DEFAULT_ALIGNMENT,
    reader::Gguf,
    types::TensorType,
    value::Value,
};
use crate::arch;
use keys::Keys;
use whole::{Described, Whole};

pub use super::{limits::MAX_BLOCKS, names::block_of};
/// llama.cpp's `LLAMA_MAX_EXPERTS`.
pub const MAX_EXPERTS: u32 = 1024;

/// A model's numbers, each checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Hparams {
    /// `general.architecture`.
    pub arch: String,
    /// `general.name`, where there is one.
    pub name: Option<String>,
    /// Blocks.
    pub n_blocks: u32,
    /// Values per hidden row.
    pub n_embd: u32,
    /// Tokens in the vocabulary: rows of `token_embd.weight`.
    pub n_vocab: u32,
    /// Context length the model was trained for.
    pub n_ctx_train: u32,
    /// Attention heads, per block; 0 where that is not known.
    pub n_head: Vec<u32>,
    /// Heads of keys and values, per block; 0 where that is not known.
    pub n_head_kv: Vec<u32>,
    /// Values per head in keys; 0 where that is not known.
    pub key_length: u32,
    /// Values per head in values; 0 where that is not known.
    pub value_length: u32,
    /// Values per head that are rotated; 0 where that is not known.
    pub rope_dims: u32,
    /// Experts; 0 in a dense model.
    pub n_expert: u32,
    /// Blocks for multi-token prediction among `n_blocks`.
    pub n_nextn: u32,
    /// A tokenizer stands in the file.
    pub has_tokenizer: bool,
}

impl Hparams {
    /// Blocks that one token after the other goes through: without those that predict further tokens.
    pub fn n_chain(&self) -> u32 {
        self.n_blocks - self.n_nextn
    }

    /// Bytes of F16 keys and values that one position takes in blocks `blocks`, counted from the file's first.
    pub fn kv_bytes_per_position(&self, blocks: std::ops::Range<u32>) -> u64 {
        let heads = self.n_head_kv.get(blocks.start as usize..blocks.end as usize).unwrap_or_default();
        let per_head = u64::from(self.key_length) + u64::from(self.value_length);
        heads.iter().map(|&n| u64::from(n) * per_head * 2).sum()
    }
}

/// Reads and checks everything of a file that llama.cpp is to load.
///
/// # Errors
/// The first rule that is broken.
pub fn model(gguf: &Gguf) -> Result<Hparams, Error> {
    let hparams = hparams(gguf)?;
    loadable(gguf)?;
    Ok(hparams)
}

/// Refuses a file whose layout llama.cpp answers by ending the process, whatever stands in it.
///
/// # Errors
/// The rule.
pub fn loadable(gguf: &Gguf) -> Result<(), Error> {
    // ggml asserts that a mapped buffer begins at a multiple of this
    if gguf.alignment() < DEFAULT_ALIGNMENT {
        return Err(gguf.key_error("general.alignment", Rule::AlignmentUnloadable(gguf.alignment())));
    }
    Ok(())
}

/// Reads and checks everything of a model that is to be cut: its slices are written anew, so how the file lays its data
/// out is no matter.
///
/// # Errors
/// The first rule that is broken.
pub fn hparams(gguf: &Gguf) -> Result<Hparams, Error> {
    is_model(gguf)?;
    let absent = absent::read(gguf)?;
    let whole = Whole::new(gguf, &absent);
    let keys = Keys::new(&whole)?;
    keys.all_plain()?;
    let hparams = keys.hparams()?;
    tensors(&whole, &hparams)?;
    Ok(hparams)
}

/// Refuses GGUF files that hold something else than a model.
///
/// # Errors
/// What it holds.
pub fn is_model(gguf: &Gguf) -> Result<(), Error> {
    let kinds = [
        ("general.type", "adapter", NotAModel::Adapter),
        ("general.type", "mmproj", NotAModel::Projector),
        ("general.type", "imatrix", NotAModel::ImportanceMatrix),
        // projectors of before `general.type`
        ("general.architecture", "clip", NotAModel::Projector),
    ];
    for (key, value, kind) in kinds {
        if gguf.get(key).as_ref().and_then(Value::as_str) == Some(value) {
            return Err(gguf.key_error(key, Rule::NotAModel(kind)));
        }
    }
    if gguf.n_tensors() == 0 && gguf.entry(TOKENS).is_some() {
        return Err(Error::file(gguf.path(), Rule::NotAModel(NotAModel::Vocabulary)));
    }
    Ok(())
}

/// The texts of the tokens.
const TOKENS: &str = "tokenizer.ggml.tokens";

/// Types that ggml's operations take, and tensors for every block.
fn tensors(whole: &Whole<'_>, hparams: &Hparams) -> Result<(), Error> {
    let mut blocks = vec![false; hparams.n_blocks as usize];
    for tensor in whole.tensors() {
        if let Some(block) = block_of(tensor.name) {
            match blocks.get_mut(block as usize) {
                Some(seen) => *seen = true,
                None => {
                    let must =
                        format!("in one of the {} blocks, 0 to {}", hparams.n_blocks, hparams.n_blocks - 1);
                    return Err(tensor.error(Rule::Hparam { says: format!("block {block}"), must }));
                }
            }
        }
        tensor_type(&tensor, arch::is_supported(&hparams.arch))?;
        scaled_and_biased(whole, &tensor)?;
    }
    // llama.cpp asserts that an NVFP4 lm_head with scales beside it is not the embedding
    if let Some(scale) = whole.tensor("output.scale").or_else(|| whole.tensor("output.input_scale"))
        && whole.tensor("output.weight").is_none()
        && whole.tensor("token_embd.weight").is_some_and(|t| t.tensor_type == TensorType::NVFP4)
    {
        let must = "beside output.weight".into();
        return Err(scale.error(Rule::Hparam { says: "a scale without output.weight".into(), must }));
    }
    // blocks that predict further tokens may have been left out of the file
    if let Some(block) = blocks[..hparams.n_chain() as usize].iter().position(|&seen| !seen) {
        let rule = Rule::TensorMissing { blocks: hparams.n_blocks.into() };
        let place = Place::Tensor(format!("blk.{block}.*"));
        return Err(Error { place, ..Error::file(whole.gguf.path(), rule) });
    }
    if arch::is_supported(&hparams.arch) {
        (0..hparams.n_chain()).try_for_each(|block| attention(whole, block, hparams.n_blocks))?;
    }
    Ok(())
}

/// The attention's matrices, in one or in three: some loaders take a block without them, and its graph then has none.
fn attention(whole: &Whole<'_>, block: u32, n_blocks: u32) -> Result<(), Error> {
    let name = |part: &str| format!("blk.{block}.{part}.weight");
    let has = |part: &str| whole.tensor(&name(part)).is_some();
    if has("attn_qkv") {
        return Ok(());
    }
    match ["attn_q", "attn_k", "attn_v"].into_iter().find(|part| !has(part)) {
        Some(part) => {
            let rule = Rule::TensorMissing { blocks: n_blocks.into() };
            Err(Error { place: Place::Tensor(name(part)), ..Error::file(whole.gguf.path(), rule) })
        }
        None => Ok(()),
    }
}

/// llama.cpp asserts that what it multiplies by a scale of its own has no bias as well.
fn scaled_and_biased(whole: &Whole<'_>, tensor: &Described<'_>) -> Result<(), Error> {
    let found = tensor.tensor_type;
    let Some(stem) = tensor.name.strip_suffix(".weight").filter(|_| found == TensorType::NVFP4) else {
        return Ok(());
    };
    let beside = |part: &str| whole.tensor(&format!("{stem}.{part}")).is_some();
    if beside("scale") && beside("bias") {
        let must = "another type beside both a scale and a bias";
        return Err(tensor.error(Rule::TensorTypeForbidden { found, must }));
    }
    Ok(())
}

fn tensor_type(tensor: &Described<'_>, known: bool) -> Result<(), Error> {
    use TensorType::*;
    let found = tensor.tensor_type;
    let integer = matches!(found, I8 | I16 | I32 | I64 | F64);
    if matches!(found, Q8_1 | Q8_K) || integer && known {
        // ggml has them for intermediate results and for tables that the architectures known here do not have:
        // no operation on weights takes them
        return Err(
            tensor.error(Rule::TensorTypeForbidden { found, must: "a type for weights, such as F16" })
        );
    }
    if known && needs_f32(tensor.name) && found != F32 {
        return Err(tensor.error(Rule::TensorTypeForbidden { found, must: "F32" }));
    }
    Ok(())
}

/// Tensors that are added or multiplied element by element: ggml does that in F32 only.
fn needs_f32(name: &str) -> bool {
    let last = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map_or(name, |(_, last)| last);
    last.ends_with(".bias")
        || last.ends_with("scale")
        || last.contains("norm")
        || last.starts_with("rope_f")
        || last.starts_with("attn_sinks")
}
