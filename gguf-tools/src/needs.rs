//! What each range of a model's blocks needs: which tensors, what crosses its two ends, how much memory.
//!
//! llama.cpp's own graph says it, [asked](crate::ask) here or apart: the model is loaded without its weights, its graph is cut at
//! the ranges' ends, and what is left is looked at. No architecture is known here by name. Where this crate was built without
//! llama.cpp there is a rule by the tensors' names, which is right for most models; whether it was is found
//! out when the slice is loaded:
//!
//! | tensor | goes to |
//! |---|---|
//! | `blk.N.*` | the range with block N |
//! | `rope_*` | all |
//! | `token_embd*`, `per_layer_*`, `position_*` | the head; `token_embd.weight` to the tail as well where there is no `output.weight` |
//! | `output*` | the tail |
//! | any other | all |

use std::{borrow::Cow, fmt, ops::Range};

use dim_core::blocks::BlockRange;
use serde::{Deserialize, Serialize};

use crate::{
    died::{Died, LESS_MEMORY},
    failure::Explained,
    gguf::{
        Gguf,
        check::{self, Hparams},
    },
    text::Safe,
};

/// What the values of a [`Part`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ValueKind {
    /// Singles; they may be rounded to F16 on their way.
    F32,
    /// Numbers of things: they go as they are.
    I32,
}

/// One of the tensors that cross a cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// llama.cpp's name of it, for people, as `l_out-11`.
    pub name: String,
    /// What its values are.
    #[serde(rename = "type")]
    pub kind: ValueKind,
    /// Values of each token, four bytes each.
    pub values: u32,
}

/// What a token's row at a cut is made of, part after part: one hidden row for most models. Nothing where tokens or logits
/// are what comes or goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Crossing(pub Vec<Part>);

impl Crossing {
    /// The one hidden row of most models.
    pub fn hidden_row(n_embd: u32, block: u32) -> Crossing {
        let name = format!("l_out-{block}");
        Crossing(vec![Part { name, kind: ValueKind::F32, values: n_embd }])
    }

    /// Bytes of each token's row, where singles stay singles.
    pub fn bytes_f32(&self) -> u64 {
        self.0.iter().map(|part| 4 * u64::from(part.values)).sum()
    }

    /// Bytes of each token's row, where singles are rounded to F16.
    pub fn bytes_f16(&self) -> u64 {
        let bytes = |part: &Part| if part.kind == ValueKind::F32 { 2 } else { 4 } * u64::from(part.values);
        self.0.iter().map(bytes).sum()
    }
}

impl fmt::Display for Crossing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, part) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { " + " };
            let kind = if part.kind == ValueKind::F32 { "F32" } else { "I32" };
            write!(f, "{comma}{} {} x {kind}", Safe(&part.name), part.values)?;
        }
        Ok(())
    }
}

/// What a range of blocks needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    /// The tensors' names, sorted.
    pub tensors: Vec<String>,
    /// What comes in; nothing where tokens do.
    pub input: Crossing,
    /// What goes out; nothing where logits do.
    pub output: Crossing,
    /// Token ids are read, beside the rows that come in or instead of them.
    pub reads_tokens: bool,
    /// Bytes of F16 keys and values per position of a session.
    pub kv_bytes_per_position: u64,
    /// Bytes of a session's state that does not grow with positions.
    pub state_bytes_per_session: u64,
}

/// What a model's ranges need.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Survey {
    /// What is kept of past positions, for people, as `KV cache with sliding windows`; not known by names alone.
    pub memory: Option<String>,
    /// An entry for each range that was asked for.
    pub ranges: Vec<Needs>,
}

/// What a model's cuts are like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cuts {
    /// Blocks that a cut can lie between.
    pub n_blocks: u32,
    /// What is kept of past positions, for people.
    pub memory: String,
    /// For each cut, that before block 1 first: what crosses there, or why it is not possible.
    pub cuts: Vec<Result<Crossing, NoCut>>,
}

/// Why a cut is not possible.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoCut {
    /// The whole sentence, with the model and the blocks.
    pub sentence: String,
    /// The same for who has said where the cut is: "the blocks from there to 41 read ..."; alike for cuts that are.
    pub short: String,
}

impl Cuts {
    /// The range that can leave and is most like this one: both its ends lie at cuts that are possible, as near as can be to
    /// where they were.
    pub fn nearest(&self, to: BlockRange) -> Option<BlockRange> {
        let possible = |block: u32| self.cuts.get(block as usize - 1).is_some_and(Result::is_ok);
        let firsts = (1..self.n_blocks).filter(|&first| possible(first));
        let ranges = firsts.flat_map(|first| {
            let ends = (first + 1..self.n_blocks).filter(|&end| possible(end));
            ends.map(move |end| BlockRange { first, last: end - 1 })
        });
        ranges.min_by_key(|r| (r.first.abs_diff(to.first) + r.last.abs_diff(to.last), r.first))
    }
}

/// What llama.cpp says against a model or a cut of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// It does not load the model.
    Model(String),
    /// The system gives no memory to look at it.
    NoMemory(String),
    /// The model is none that can be cut at all: an encoder, a draft model.
    Kind(String),
    /// It cannot be cut before this block.
    Cut(u32, String),
    /// These blocks cannot be evaluated apart.
    Blocks(Range<u32>, String),
}

/// Why it is not known what a range needs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NeedsError {
    /// llama.cpp says no.
    #[error("{}", refused(.0))]
    Refused(Refusal),
    /// The process that asked it ended without an answer.
    #[error("{}", apart_from(.0))]
    Apart(#[from] Died),
    /// There is no llama.cpp to ask.
    #[error(
        "this program was built without llama.cpp (the feature `engine`), which knows where a model can be cut"
    )]
    NotBuilt,
}

impl From<Refusal> for NeedsError {
    fn from(refusal: Refusal) -> NeedsError {
        NeedsError::Refused(refusal)
    }
}

fn apart_from(died: &Died) -> String {
    match died {
        Died::NoMemory(_) => died.to_string(),
        Died::Ended { .. } | Died::Silent(_) => format!("llama.cpp does not survive this file: {died}"),
        Died::Nonsense | Died::NotStarted(..) => {
            format!("whether llama.cpp survives this file cannot be tried: {died}")
        }
    }
}

fn refused(refusal: &Refusal) -> String {
    match refusal {
        // whole sentences, all of them
        Refusal::Model(why)
        | Refusal::NoMemory(why)
        | Refusal::Kind(why)
        | Refusal::Cut(_, why)
        | Refusal::Blocks(_, why) => Safe(why).to_string(),
    }
}

impl Explained for NeedsError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            NeedsError::Refused(Refusal::Kind(_)) => return None,
            NeedsError::Refused(Refusal::NoMemory(_)) => LESS_MEMORY.into(),
            NeedsError::Refused(Refusal::Model(_)) => {
                "the model has keys or tensors that this llama.cpp does not take: convert it again with a current \
                 converter, or take another file of it"
                    .into()
            }
            NeedsError::Refused(_) => "`dim-split MODEL --dry-run` shows where this model can be cut".into(),
            NeedsError::Apart(died) => died.hint().into(),
            NeedsError::NotBuilt => "build gguf-tools with its `engine` feature (the default)".into(),
        })
    }

    fn is_misuse(&self) -> bool {
        match self {
            NeedsError::Refused(Refusal::NoMemory(_)) => false,
            NeedsError::Apart(died) => matches!(died, Died::Ended { .. } | Died::Silent(_)),
            _ => true,
        }
    }
}

/// The rule of this file's head.
pub(crate) fn by_name(gguf: &Gguf, hparams: &Hparams, ranges: &[BlockRange]) -> Survey {
    let n_blocks = hparams.n_chain();
    let tied = gguf.tensor("output.weight").is_none();
    let needs = |range: &BlockRange| {
        let (is_head, is_tail) = (range.first == 0, range.last + 1 == n_blocks);
        let takes = |name: &str| {
            let begins = |starts: &[&str]| starts.iter().any(|start| name.starts_with(start));
            match check::block_of(name) {
                Some(block) => range.contains(block),
                None if begins(&["token_embd", "per_layer_", "position_"]) => {
                    is_head || is_tail && tied && name == "token_embd.weight"
                }
                None if begins(&["output"]) => is_tail,
                None => true,
            }
        };
        let mut tensors: Vec<String> =
            gguf.tensors().map(|t| t.name().to_owned()).filter(|name| takes(name)).collect();
        tensors.sort_unstable();
        let row = |block| Crossing::hidden_row(hparams.n_embd, block);
        Needs {
            tensors,
            input: if is_head { Crossing::default() } else { row(range.first - 1) },
            output: if is_tail { Crossing::default() } else { row(range.last) },
            reads_tokens: is_head,
            kv_bytes_per_position: hparams.kv_bytes_per_position(range.as_range()),
            state_bytes_per_session: 0,
        }
    };
    Survey { memory: None, ranges: ranges.iter().map(needs).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_cannot_be_had_says_nothing_against_the_file() {
        let none = NeedsError::from(Died::NotStarted("dim".into(), "Too many open files".into()));
        assert!(none.to_string().starts_with("whether llama.cpp survives this file cannot be tried: "));
        assert!(!none.is_misuse() && none.hint().is_some_and(|hint| hint.contains("ulimit -n")));
        let ended = NeedsError::from(Died::Ended { how: "signal 6".into(), said: None });
        assert!(ended.to_string().starts_with("llama.cpp does not survive this file") && ended.is_misuse());
    }
}
