//! The plan of a cut: which blocks go where, and what each slice's file will hold, before anything is written.
//!
//! A slice keeps the model's numbers, names and keys: it holds the tensors that its range [needs](crate::needs), byte for
//! byte, and says of all others what they are called, of which type and how large they are. This project's engine loads it as
//! the whole model of which some bytes are missing. With [`Request::renumber`] it is a model of its own, which unmodified
//! llama.cpp loads; that is right for [some architectures](crate::arch) only.
//!
//! What is known about the model as a whole is added under `dim.`.

mod common;
mod error;
mod kept;
mod renumbered;

use std::{borrow::Cow, collections::BTreeSet};

pub use dim_core::blocks::{BlockRange, RangeError};
pub use error::PlanError;

pub use crate::slice::{Role, keys};
use crate::{
    arch,
    ask::Ask,
    digest::{self, Sha},
    gguf::{
        Gguf, Tensor, TensorType, Value, absent,
        check::{self, Hparams},
        write::TensorSpec,
    },
    needs::{Crossing, NeedsError, Refusal},
    source::ModelSource,
};
use common::Common;
use renumbered::Cutter;

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
    /// Make every slice a model of its own, with its blocks numbered from 0, that unmodified llama.cpp loads.
    pub renumber: bool,
    /// Who is asked what a range needs.
    pub ask: Ask,
    /// Where the model was fetched from: whoever has the manifest can then make a middle from there.
    pub source: Option<ModelSource>,
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
    /// Blocks that its slices make up: without those that predict further tokens.
    pub n_blocks: u32,
    /// What is kept of past positions, for people.
    pub memory: Option<String>,
    /// Where the model was fetched from.
    pub source: Option<ModelSource>,
    /// What no slice holds.
    pub left_out: LeftOut,
    /// Who finds each middle's answer to a known input; `None` where that is not wanted.
    pub canary: Option<Ask>,
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
    /// Bytes of a session's state that does not grow with positions.
    pub state_bytes_per_session: u64,
    /// What comes in for each token; nothing where tokens do.
    pub input: Crossing,
    /// What goes out for each token; nothing where logits do.
    pub output: Crossing,
    /// Whether token ids are read beside the rows that come in.
    pub reads_tokens: bool,
}

/// Tensors of the model that no slice holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Blocks that predict further tokens (NextN, MTP), and do not belong to the chain.
    pub predicting: BTreeSet<u32>,
    /// Bytes of their tensors.
    pub predicting_bytes: u64,
    /// Names of tensors that no block's graph reads.
    pub unread: Vec<String>,
    /// Bytes of these.
    pub unread_bytes: u64,
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
        if gguf.entry(keys::ROLE).is_some() || absent::is_said(gguf) {
            return Err(PlanError::Slice(file()));
        }
        check::is_model(gguf)?;
        let (hparams, arch) = match request.renumber {
            true => can_be_renumbered(gguf).map(|(hparams, arch)| (hparams, Some(arch)))?,
            false => (check::hparams(gguf)?, None),
        };
        let ranges = ranges(&request.middles, hparams.n_chain())?;
        let model_name = hparams.name.clone().unwrap_or_else(|| request.stem.clone());
        let params_sha256 = digest::of_params(gguf, &hparams.arch);
        let of = Common { gguf, hparams: &hparams, request, model_name: &model_name, params_sha256 };
        let mut plan = Plan {
            gguf,
            n_blocks: hparams.n_chain(),
            memory: None,
            source: request.source.clone(),
            left_out: LeftOut::default(),
            canary: (!request.no_canary).then(|| request.ask.clone()),
            slices: Vec::with_capacity(ranges.len()),
            params_sha256,
            hparams: hparams.clone(),
            model_name: model_name.clone(),
        };
        if let Some(arch) = arch {
            let cutter = Cutter { of, arch };
            for (role, blocks) in ranges {
                plan.slices.push(cutter.slice(role, blocks)?);
            }
            return Ok(plan);
        }
        let blocks: Vec<BlockRange> = ranges.iter().map(|(_, blocks)| *blocks).collect();
        let survey = request.ask.ranges(gguf, &hparams, &blocks);
        let survey = survey.map_err(|why| not_so(gguf, request, why))?;
        plan.memory = survey.memory;
        for ((role, blocks), needs) in ranges.into_iter().zip(survey.ranges) {
            plan.slices.push(kept::slice(&of, role, blocks, needs)?);
        }
        plan.left_out = kept::left_out(&of, &plan.slices, hparams.n_chain());
        Ok(plan)
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

/// The model's numbers and its architecture, if that is one of those whose slices can be models of their own.
fn can_be_renumbered(gguf: &Gguf) -> Result<(Hparams, &'static arch::Arch), PlanError> {
    let file = || gguf.path().display().to_string();
    let unsupported = |why| PlanError::Unsupported { file: file(), why };
    // the name first: it says more than whatever else an unknown architecture does differently
    let name = gguf.get("general.architecture");
    if let Some(name) = name.as_ref().and_then(Value::as_str) {
        arch::find(name).map_err(unsupported)?;
    }
    let hparams = check::hparams(gguf)?;
    let arch = arch::find(&hparams.arch).map_err(unsupported)?;
    let number = |key: &str| gguf.get(&format!("{}.{key}", arch.name))?.as_u64();
    arch::refuse_by_keys(arch, hparams.n_blocks, number, |key| gguf.entry(key).is_some())
        .map_err(unsupported)?;
    Ok((hparams, arch))
}

/// Why the model cannot be cut as asked, with what would work.
fn not_so(gguf: &Gguf, request: &Request, why: NeedsError) -> PlanError {
    let nearest = match (&why, &request.middles[..]) {
        (NeedsError::Refused(Refusal::Cut(..) | Refusal::Blocks(..)), [middle]) => {
            request.ask.cuts(gguf).ok().and_then(|cuts| cuts.nearest(*middle))
        }
        _ => None,
    };
    PlanError::Needs { file: gguf.path().display().to_string(), why, nearest }
}

/// The key with which a file without a tokenizer says how many tokens there are.
fn model_vocab_size(arch: &str) -> String {
    format!("{arch}.vocab_size")
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
        assert!(error(&[], 8).contains("name the blocks"));
        assert!(error(&[range(1, 1)], 2).contains("2 blocks"));
        assert!(error(&[range(0, 3)], 8).contains("nearest range is 1..3"));
        assert!(error(&[range(3, 7)], 8).contains("nearest range is 3..6"));
        assert!(error(&[range(3, 8)], 8).contains("nearest range is 3..6"));
        assert!(error(&[range(20, 30)], 8).contains("nearest range is 6..6"));
        assert!(error(&[range(1, 3), range(3, 4)], 8).contains("share"));
        assert!(error(&[range(1, 2), range(4, 4)], 8).contains("no slice"));
    }
}
