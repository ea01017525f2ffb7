//! Why a range of blocks cannot be evaluated apart: what the contract's `dim_refusal` says, and sentences made of it.

use std::ffi::{CStr, c_char};
use std::fmt;
use std::ops::Range;

use crate::ffi;

/// Blocks of a model that cannot be evaluated apart, and what keeps them from it.
///
/// Its text is the whole sentence; whoever has said already which blocks are meant takes [`Reason::of`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// llama.cpp's name of the architecture.
    pub arch: String,
    /// The blocks, numbered as in the model; for [`Reason::BothWrite`] those behind the cut.
    pub blocks: Range<u32>,
    /// What keeps them from it.
    pub reason: Reason,
}

/// What keeps a range from being evaluated apart.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// It reads a weight of another block.
    ReadsWeight {
        /// llama.cpp's name of the weight.
        name: String,
        /// Whose it is.
        block: u32,
    },
    /// It reads a weight that the slice does not hold.
    LacksWeight {
        /// llama.cpp's name of the weight.
        name: String,
    },
    /// It reads a state that other blocks write.
    ReadsState(State),
    /// The blocks before and those behind a cut write the same state.
    BothWrite(State),
    /// The model gives no logits.
    NoLogits,
    /// No tensor goes from the blocks before to these.
    NothingComes,
    /// No tensor goes from these to the blocks after.
    NothingGoes,
    /// What crosses an end of the range is nothing that could be carried.
    Crossing {
        /// llama.cpp's name of the tensor; empty where it is about all of them.
        name: String,
        /// What is wrong with it.
        fault: CrossingFault,
    },
    /// Another one, by its number in the contract.
    Other(u32),
}

/// What is kept of past positions, for a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// What of.
    pub kind: StateKind,
    /// The block that it is of, if one.
    pub block: Option<u32>,
    /// llama.cpp's name of it, as `cache_k_l21`.
    pub name: String,
}

/// Kinds of [`State`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateKind {
    /// Keys of attention.
    Keys,
    /// Values of attention.
    Values,
    /// A recurrent state.
    Recurrent,
    /// Another.
    Other,
}

/// Why a tensor cannot cross from range to range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrossingFault {
    /// It is a view of another tensor.
    View,
    /// It is neither F32 nor I32.
    Type,
    /// It is not so much for each token.
    Uneven,
    /// It does not depend on the tokens.
    Fixed,
    /// What crosses is not the same in every graph.
    Others,
}

impl Reason {
    /// The reason as a sentence about `subject`, in the plural, as "the last blocks": "the last blocks read the keys of block
    /// 21, which they do not write".
    pub fn of(&self, subject: &str) -> String {
        match self {
            Reason::ReadsWeight { name, block } => {
                format!("{subject} read {name}, a weight of block {block}")
            }
            Reason::LacksWeight { name } => format!("{subject} read {name}, which this slice lacks"),
            Reason::ReadsState(state) => format!("{subject} read {state}, which they do not write"),
            Reason::BothWrite(state) => format!("{subject} and those before them both write {state}"),
            Reason::NoLogits => "there are no logits".into(),
            Reason::NothingComes => format!("nothing goes into {subject}"),
            Reason::NothingGoes => format!("nothing goes on from {subject}"),
            Reason::Crossing { fault: CrossingFault::Others, .. } => {
                "what goes from block to block is not the same in every graph".into()
            }
            Reason::Crossing { name, fault } => {
                let why = match fault {
                    CrossingFault::View => "is a view of another tensor",
                    CrossingFault::Type => "is neither F32 nor I32",
                    CrossingFault::Uneven => "is not so much for each token",
                    CrossingFault::Fixed | CrossingFault::Others => "does not depend on the tokens",
                };
                format!("{name}, which goes from block to block, {why}")
            }
            Reason::Other(number) => format!("reason {number}"),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Refusal { arch, blocks, reason } = self;
        if let Reason::BothWrite(state) = reason {
            let before = blocks.start;
            return write!(
                f,
                "a {arch} model cannot be cut before block {before}: the blocks before and behind both write {state}"
            );
        }
        let last = blocks.end.saturating_sub(1);
        write!(
            f,
            "blocks {}..{last} of a {arch} model cannot be evaluated apart: {}",
            blocks.start,
            reason.of("they")
        )
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            StateKind::Keys => "the keys",
            StateKind::Values => "the values",
            StateKind::Recurrent => "the recurrent state",
            StateKind::Other => return write!(f, "the state {}", self.name),
        };
        match self.block {
            Some(block) => write!(f, "{what} of block {block}"),
            None => write!(f, "{what} {}", self.name),
        }
    }
}

/// The reason of this thread's last refusal.
pub(crate) fn last() -> Refusal {
    let mut c = ffi::dim_refusal::default();
    // SAFETY: `c` is written.
    unsafe { ffi::dim_last_refusal(&raw mut c) };
    let (arch, name) = (text(&c.arch), text(&c.name));
    let block = u32::try_from(c.block).ok();
    let crossing = |fault| Reason::Crossing { name: name.clone(), fault };
    let kind = match c.state {
        ffi::DIM_STATE_KEYS => StateKind::Keys,
        ffi::DIM_STATE_VALUES => StateKind::Values,
        ffi::DIM_STATE_RECURRENT => StateKind::Recurrent,
        _ => StateKind::Other,
    };
    let reason = match c.reason {
        ffi::DIM_READS_WEIGHT => Reason::ReadsWeight { name, block: block.unwrap_or(0) },
        ffi::DIM_LACKS_WEIGHT => Reason::LacksWeight { name },
        ffi::DIM_READS_STATE => Reason::ReadsState(State { kind, block, name }),
        ffi::DIM_BOTH_WRITE => Reason::BothWrite(State { kind, block, name }),
        ffi::DIM_NO_LOGITS => Reason::NoLogits,
        ffi::DIM_NOTHING_COMES => Reason::NothingComes,
        ffi::DIM_NOTHING_GOES => Reason::NothingGoes,
        ffi::DIM_CROSSES_VIEW => crossing(CrossingFault::View),
        ffi::DIM_CROSSES_TYPE => crossing(CrossingFault::Type),
        ffi::DIM_CROSSES_UNEVEN => crossing(CrossingFault::Uneven),
        ffi::DIM_CROSSES_FIXED => crossing(CrossingFault::Fixed),
        ffi::DIM_CROSSES_OTHERS => crossing(CrossingFault::Others),
        other => Reason::Other(other),
    };
    Refusal { arch, blocks: c.first..c.last, reason }
}

/// What stands before the first NUL.
fn text(chars: &[c_char]) -> String {
    // signed on some systems, unsigned on others
    let bytes: Vec<u8> = chars.iter().flat_map(|c| c.to_ne_bytes()).collect();
    CStr::from_bytes_until_nul(&bytes).map_or_else(|_| String::new(), |c| c.to_string_lossy().into_owned())
}
