//! Why a model cannot be cut as asked.

use std::borrow::Cow;

use dim_core::blocks::BlockRange;

use crate::{
    arch::Unsupported,
    failure::Explained,
    gguf::{self, TensorType, write::WriteError},
    needs::NeedsError,
    requantise::Unconvertible,
    text::Shown,
};

/// Why a model cannot be cut as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The file breaks a rule.
    #[error(transparent)]
    Model(#[from] gguf::Error),
    /// The architecture's slices cannot be models of their own.
    #[error("{file}: {why}")]
    Unsupported {
        /// The file.
        file: String,
        /// Which, and why.
        why: Unsupported,
    },
    /// llama.cpp does not take the model, or it cannot be cut so.
    #[error("{file}: {why}")]
    Needs {
        /// The file.
        file: String,
        /// What llama.cpp says.
        why: NeedsError,
        /// What would work.
        nearest: Option<BlockRange>,
    },
    /// The file is a slice already.
    #[error("{0}: this is a slice already")]
    Slice(String),
    /// No middle was asked for.
    #[error("no middle slice")]
    NoMiddle,
    /// Fewer than three blocks.
    #[error("the model has {0} blocks: head, middle and tail need one each")]
    TooFewBlocks(u32),
    /// The range passes the model's end.
    #[error("middle {range}: the model has {n_blocks} blocks, 0 to {}", n_blocks - 1)]
    PastEnd {
        /// As asked.
        range: BlockRange,
        /// Blocks of the model.
        n_blocks: u32,
        /// What would work.
        nearest: BlockRange,
    },
    /// The head would have no block.
    #[error("middle {range} leaves the head without a block")]
    EmptyHead {
        /// As asked.
        range: BlockRange,
        /// What would work.
        nearest: BlockRange,
    },
    /// The tail would have no block.
    #[error("middle {range} leaves the tail without a block")]
    EmptyTail {
        /// As asked.
        range: BlockRange,
        /// What would work.
        nearest: BlockRange,
    },
    /// Two middles share a block.
    #[error("middles {0} and {1} share blocks")]
    Overlap(BlockRange, BlockRange),
    /// Blocks between two middles belong to nobody.
    #[error("blocks between middles {0} and {1} would be in no slice")]
    Gap(BlockRange, BlockRange),
    /// A tensor that no slice has a place for.
    #[error(
        "{file}: tensor '{}' has no place in a slice: the model has more than this program knows of",
        Shown(tensor)
    )]
    UnknownTensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// An array as long as there are blocks, of which it is not known whether it has one value per block.
    #[error("{file}: key '{}' may hold one value per block, and this program does not know it", Shown(key))]
    UnknownArray {
        /// The file.
        file: String,
        /// The key.
        key: String,
    },
    /// The type asked for does not fit.
    #[error("tensor '{}' cannot be stored as {to}: {why}", Shown(tensor))]
    Type {
        /// The tensor.
        tensor: String,
        /// As asked.
        to: TensorType,
        /// Why not.
        why: Unconvertible,
    },
    /// The slice's description breaks a rule of the format.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl Explained for PlanError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            PlanError::Model(e) => return e.hint(),
            PlanError::Write(e) => return e.hint(),
            PlanError::Unsupported { why, .. } => return why.hint(),
            PlanError::Type { why, .. } => return why.hint().map(Cow::Borrowed),
            PlanError::Needs { nearest: Some(nearest), .. } => {
                format!("the nearest range is {nearest}").into()
            }
            PlanError::Needs { why, .. } => return why.hint(),
            PlanError::Slice(_) => "cut the model it came from".into(),
            PlanError::NoMiddle => "name the blocks that leave this machine".into(),
            PlanError::PastEnd { nearest, .. }
            | PlanError::EmptyHead { nearest, .. }
            | PlanError::EmptyTail { nearest, .. } => format!("the nearest range is {nearest}").into(),
            PlanError::Gap(..) => "let one begin where the other ends".into(),
            _ => return None,
        })
    }

    fn is_misuse(&self) -> bool {
        match self {
            PlanError::Needs { why, .. } => why.is_misuse(),
            _ => true,
        }
    }
}
