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

mod error;
mod slices;

use std::borrow::Cow;

pub use dim_core::blocks::{BlockRange, RangeError};
pub use error::PlanError;

pub use crate::slice::{Role, keys};
use crate::{
    arch,
    digest::{self, Sha},
    gguf::{
        Gguf, Tensor, TensorType, Value,
        check::{self, Hparams},
        write::TensorSpec,
    },
};
use slices::Cutter;

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
        check::is_model(gguf)?;
        // the name first: it says more than whatever else an unknown architecture does differently
        let name = gguf.get("general.architecture");
        let unsupported = |why| PlanError::Unsupported { file: file(), why };
        if let Some(name) = name.as_ref().and_then(Value::as_str) {
            arch::find(name).map_err(unsupported)?;
        }
        let hparams = check::hparams(gguf)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Explained;

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
        let error = |middles: &[BlockRange], n| {
            let error = ranges(middles, n).unwrap_err();
            format!("{error}; {}", error.hint().unwrap_or_default())
        };
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
