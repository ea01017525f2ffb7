//! The plan of a cut: which blocks go where, and what each slice's file will hold, before anything is written.
//!
//! A slice is an ordinary GGUF that an unmodified llama.cpp loads: its blocks are renumbered from 0, and it has
//! what the loader wants besides them.
//!
//! | slice | vocabulary | besides its blocks |
//! |---|---|---|
//! | head | `token_embd.weight`, the tokenizer | `output_norm` (the loader wants it) |
//! | middle | one row of `token_embd.weight`, no tokenizer | `output_norm` |
//! | tail | the lm_head as `token_embd.weight`, the tokenizer | `output_norm`, `output.bias` and friends |
//!
//! Every other key is carried as it is, every tensor byte for byte; what is known about the model as a whole is
//! added under `dim.`.

use std::{borrow::Cow, fmt};

pub use dim_core::blocks::{BlockRange, RangeError};

use crate::{
    arch::{self, Arch, LmHead, Unsupported},
    digest::{self, Sha},
    gguf::{
        self, Array, Gguf, Shown, Tensor, TensorType, Value, ValueType,
        check::{self, Hparams},
        write::{GgufWriter, TensorSpec, WriteError},
    },
};

/// Keys this project adds to a slice.
pub mod keys {
    /// u32: version of these keys, [`VERSION`](super::VERSION).
    pub const VERSION: &str = "dim.version";
    /// string: head, middle or tail.
    pub const ROLE: &str = "dim.role";
    /// u32: the slice's first block, numbered as in the model.
    pub const FIRST_BLOCK: &str = "dim.first_block";
    /// u32: the slice's last block (inclusive), numbered as in the model.
    pub const LAST_BLOCK: &str = "dim.last_block";
    /// u32: blocks of the model.
    pub const MODEL_BLOCKS: &str = "dim.model.blocks";
    /// string: the model's name.
    pub const MODEL_NAME: &str = "dim.model.name";
    /// string, 64 hex digits: the model's identity.
    pub const MODEL_SHA256: &str = "dim.model.sha256";
    /// string, 64 hex digits: the digest of the model's parameters that are not weights. Slices of older cuts have none.
    pub const PARAMS_SHA256: &str = "dim.params.sha256";
    /// string, 64 hex digits: the slice's own digest.
    pub const SLICE_SHA256: &str = "dim.slice.sha256";
    /// array of strings, 64 hex digits each: the digest of every tensor's data, in file order.
    pub const TENSOR_SHA256: &str = "dim.tensor_sha256";
}

/// Version of the keys under `dim.`.
pub const VERSION: u32 = 1;

/// A slice's place in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Token embedding and first blocks.
    Head,
    /// Blocks only.
    Middle,
    /// Last blocks, output norm and lm_head.
    Tail,
}

impl Role {
    /// As `dim.role` says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Head => "head",
            Role::Middle => "middle",
            Role::Tail => "tail",
        }
    }

    /// The role of this name.
    pub fn from_name(name: &str) -> Option<Role> {
        [Role::Head, Role::Middle, Role::Tail].into_iter().find(|role| role.as_str() == name)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What to cut, and how.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The middle slices, in order, without gaps. Head and tail are what is before and after.
    pub middles: Vec<BlockRange>,
    /// Type for the token embedding; None keeps the model's.
    pub embed_type: Option<TensorType>,
    /// Type for the lm_head; None keeps the model's.
    pub output_type: Option<TensorType>,
    /// What file names begin with.
    pub stem: String,
    /// Leave the [canaries](crate::canary) out.
    pub no_canary: bool,
}

/// A cut, planned.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The model.
    pub gguf: &'a Gguf,
    /// Its numbers.
    pub hparams: Hparams,
    /// Its name: `general.name`, or the stem.
    pub model_name: String,
    /// The digest of its parameters that are not weights.
    pub params_sha256: Sha,
    /// Whether each middle's answer to a known input is to be found.
    pub canary: bool,
    /// The slices: head, middles, tail.
    pub slices: Vec<SlicePlan<'a>>,
}

/// One slice, planned.
#[derive(Debug)]
pub struct SlicePlan<'a> {
    /// Its place.
    pub role: Role,
    /// Its blocks, numbered as in the model.
    pub blocks: BlockRange,
    /// Its file's name.
    pub file: String,
    /// Its metadata; digests are zeros until they are known.
    pub metadata: Vec<(Cow<'a, str>, Value<'a>)>,
    /// Its tensors, and where each comes from.
    pub tensors: Vec<(TensorSpec, Source<'a>)>,
    /// Bytes of its file.
    pub file_bytes: u64,
    /// Bytes of its tensors' data.
    pub weight_bytes: u64,
    /// Bytes of F16 keys and values per position.
    pub kv_bytes_per_position: u64,
}

/// Where a slice's tensor comes from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A tensor of the model as it is.
    Whole(Tensor<'a>),
    /// The first bytes of one.
    Start(Tensor<'a>),
    /// A tensor of the model in another type.
    Requantised(Tensor<'a>),
    /// Nothing: the loader wants a tensor that this slice never computes with.
    Placeholder,
}

/// Why a model cannot be cut as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The file breaks a rule.
    #[error(transparent)]
    Model(#[from] gguf::Error),
    /// The architecture cannot be cut.
    #[error("{file}: {why}")]
    Unsupported {
        /// The file.
        file: String,
        /// Which, and why.
        why: Unsupported,
    },
    /// The file is a slice already.
    #[error("{0}: this is a slice already; cut the model it came from")]
    Slice(String),
    /// No middle was asked for.
    #[error("no middle slice; name the blocks that leave this machine: --middle A..B")]
    NoMiddle,
    /// Fewer than three blocks.
    #[error("the model has {0} blocks; head, middle and tail need one each")]
    TooFewBlocks(u32),
    /// The range passes the model's end.
    #[error("--middle {range}: the model has {n_blocks} blocks, 0 to {}; the nearest range is {nearest}", n_blocks - 1)]
    PastEnd {
        /// As asked.
        range: BlockRange,
        /// Blocks of the model.
        n_blocks: u32,
        /// What would work.
        nearest: BlockRange,
    },
    /// The head would have no block.
    #[error(
        "--middle {range} leaves the head without a block, and llama.cpp loads no model without blocks; the nearest \
         range is {nearest}"
    )]
    EmptyHead {
        /// As asked.
        range: BlockRange,
        /// What would work.
        nearest: BlockRange,
    },
    /// The tail would have no block.
    #[error(
        "--middle {range} leaves the tail without a block, and llama.cpp loads no model without blocks; the nearest \
         range is {nearest}"
    )]
    EmptyTail {
        /// As asked.
        range: BlockRange,
        /// What would work.
        nearest: BlockRange,
    },
    /// Two middles share a block.
    #[error("--middle {0} and --middle {1} share blocks")]
    Overlap(BlockRange, BlockRange),
    /// Blocks between two middles belong to nobody.
    #[error(
        "blocks between --middle {0} and --middle {1} would be in no slice; let one begin where the other ends"
    )]
    Gap(BlockRange, BlockRange),
    /// A tensor that no slice has a place for.
    #[error(
        "{file}: tensor '{tensor}' has no place in a slice; the model has more than this program knows of"
    )]
    UnknownTensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// An array as long as there are blocks, of which it is not known whether it has one value per block.
    #[error("{file}: key '{key}' may hold one value per block; this program does not know it")]
    UnknownArray {
        /// The file.
        file: String,
        /// The key.
        key: String,
    },
    /// Requantising without ggml.
    #[error(
        "changing types needs ggml's quantisers: build gguf-tools with its `engine` feature (the default)"
    )]
    NeedsEngine,
    /// The type asked for does not fit.
    #[error("tensor '{tensor}' cannot be stored as {to}: {why}")]
    Type {
        /// The tensor.
        tensor: String,
        /// As asked.
        to: TensorType,
        /// Why not.
        why: String,
    },
    /// The slice's description breaks a rule of the format.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl<'a> Plan<'a> {
    /// Checks the model, and plans the slices.
    ///
    /// # Errors
    /// The model breaks a rule, cannot be cut, or cannot be cut like this.
    pub fn new(gguf: &'a Gguf, request: &Request) -> Result<Plan<'a>, PlanError> {
        let file = || gguf.path().display().to_string();
        if gguf.entry(keys::ROLE).is_some() {
            return Err(PlanError::Slice(file()));
        }
        // the name first: it says more than whatever else an unknown architecture does differently
        let name = gguf.get("general.architecture");
        let unsupported = |why| PlanError::Unsupported { file: file(), why };
        if let Some(name) = name.as_ref().and_then(Value::as_str) {
            arch::find(name).map_err(unsupported)?;
        }
        let hparams = check::model(gguf)?;
        let arch = arch::find(&hparams.arch).map_err(unsupported)?;
        let number = |key: &str| gguf.get(&format!("{}.{key}", arch.name))?.as_u64();
        arch::refuse_by_keys(arch, hparams.n_blocks, number, |key| gguf.entry(key).is_some())
            .map_err(unsupported)?;

        let ranges = ranges(&request.middles, hparams.n_blocks)?;
        let model_name = hparams.name.clone().unwrap_or_else(|| request.stem.clone());
        let params_sha256 = digest::of_params(gguf, arch.name);
        let cutter =
            Cutter { gguf, arch, hparams: &hparams, request, model_name: &model_name, params_sha256 };
        let slices =
            ranges.into_iter().map(|(role, blocks)| cutter.slice(role, blocks)).collect::<Result<_, _>>()?;
        let canary = !request.no_canary;
        Ok(Plan { gguf, hparams, model_name, params_sha256, canary, slices })
    }

    /// Bytes of all slices' files.
    pub fn file_bytes(&self) -> u64 {
        self.slices.iter().map(|s| s.file_bytes).sum()
    }

    /// Whether anything changes its type.
    pub fn requantises(&self) -> bool {
        self.slices
            .iter()
            .flat_map(|s| &s.tensors)
            .any(|(_, source)| matches!(source, Source::Requantised(_)))
    }
}

/// Head, middles and tail as ranges, complete and in order.
fn ranges(middles: &[BlockRange], n_blocks: u32) -> Result<Vec<(Role, BlockRange)>, PlanError> {
    let (Some(&first), Some(&last)) = (middles.iter().min(), middles.iter().max()) else {
        return Err(PlanError::NoMiddle);
    };
    if n_blocks < 3 {
        return Err(PlanError::TooFewBlocks(n_blocks));
    }
    // blocks 1 to n-2 are the ones that may leave
    let clamp = |r: BlockRange| {
        let last = r.last.clamp(1, n_blocks - 2);
        BlockRange { first: r.first.clamp(1, last), last }
    };
    if let Some(&range) = middles.iter().find(|r| r.last >= n_blocks) {
        return Err(PlanError::PastEnd { range, n_blocks, nearest: clamp(range) });
    }
    if first.first == 0 {
        return Err(PlanError::EmptyHead { range: first, nearest: clamp(first) });
    }
    if last.last == n_blocks - 1 {
        return Err(PlanError::EmptyTail { range: last, nearest: clamp(last) });
    }
    let mut sorted = middles.to_vec();
    sorted.sort();
    for pair in sorted.windows(2) {
        if pair[1].first <= pair[0].last {
            return Err(PlanError::Overlap(pair[0], pair[1]));
        }
        if pair[1].first > pair[0].last + 1 {
            return Err(PlanError::Gap(pair[0], pair[1]));
        }
    }
    let head = (Role::Head, BlockRange { first: 0, last: first.first - 1 });
    let tail = (Role::Tail, BlockRange { first: last.last + 1, last: n_blocks - 1 });
    let middles = sorted.into_iter().map(|r| (Role::Middle, r));
    Ok(std::iter::once(head).chain(middles).chain(std::iter::once(tail)).collect())
}

struct Cutter<'a, 'p> {
    gguf: &'a Gguf,
    arch: &'static Arch,
    hparams: &'p Hparams,
    request: &'p Request,
    model_name: &'p str,
    params_sha256: Sha,
}

impl<'a> Cutter<'a, '_> {
    fn slice(&self, role: Role, blocks: BlockRange) -> Result<SlicePlan<'a>, PlanError> {
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
        let zeros = "0".repeat(64);
        out.extend(
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
                (
                    keys::TENSOR_SHA256,
                    Value::Array(Array::of_strings(std::iter::repeat_n(&zeros, n_tensors))),
                ),
            ]
            .map(|(key, value)| (Cow::Borrowed(key), value)),
        );
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
        if array.len() != u64::from(self.hparams.n_blocks) || NOT_PER_BLOCK.contains(&name) {
            return Ok(value);
        }
        if !PER_BLOCK.contains(&name) || matches!(array.element_type(), ValueType::String | ValueType::Array)
        {
            return Err(PlanError::UnknownArray {
                file: self.gguf.path().display().to_string(),
                key: Shown(key).to_string(),
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
                        tensor: Shown(name).to_string(),
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
        if self.gguf.tensor("output.scale").is_some() || self.gguf.tensor("output.input_scale").is_some() {
            let why = "the model keeps a scale beside its lm_head".to_owned();
            return Err(PlanError::Type { tensor: tensor.name().to_owned(), to, why });
        }
        crate::requantise::check(&tensor, to)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u32, last: u32) -> BlockRange {
        BlockRange { first, last }
    }

    #[test]
    fn ranges_are_inclusive_in_both_notations() {
        assert_eq!("11..16".parse(), Ok(range(11, 16)));
        assert_eq!("11..=16".parse(), Ok(range(11, 16)));
        assert_eq!(range(11, 16).count(), 6);
        assert_eq!(range(3, 3).to_string(), "3..3");
        for bad in [
            "",
            "3",
            "..",
            "3..",
            "..3",
            "4..3",
            "a..b",
            "+1..2",
            "1..-2",
            "1...2",
            "1..==2",
            "1..4294967295",
        ] {
            assert!(bad.parse::<BlockRange>().is_err(), "{bad}");
        }
    }

    #[test]
    fn head_and_tail_are_what_remains() {
        let all = ranges(&[range(4, 5), range(1, 3)], 8).unwrap();
        let expected = [
            (Role::Head, range(0, 0)),
            (Role::Middle, range(1, 3)),
            (Role::Middle, range(4, 5)),
            (Role::Tail, range(6, 7)),
        ];
        assert_eq!(all, expected);
    }

    #[test]
    fn refuses_ranges_that_leave_a_slice_empty_or_a_block_out() {
        let error = |middles: &[BlockRange], n| ranges(middles, n).unwrap_err().to_string();
        assert!(error(&[], 8).contains("--middle"));
        assert!(error(&[range(1, 1)], 2).contains("2 blocks"));
        assert!(error(&[range(0, 3)], 8).contains("nearest range is 1..3"));
        assert!(error(&[range(3, 7)], 8).contains("nearest range is 3..6"));
        assert!(error(&[range(3, 8)], 8).contains("nearest range is 3..6"));
        assert!(error(&[range(20, 30)], 8).contains("nearest range is 6..6"));
        assert!(error(&[range(1, 3), range(3, 4)], 8).contains("share"));
        assert!(error(&[range(1, 2), range(4, 4)], 8).contains("no slice"));
    }
}
