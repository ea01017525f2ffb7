//! What can be wrong with what a slice says it lacks.

use std::fmt;

use super::{limits::MAX_NAME_BYTES, types::TensorType};

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadAbsent {
    /// No name.
    NameEmpty,
    /// ggml keeps names in 64 bytes.
    NameTooLong,
    /// Not UTF-8, or with a NUL in it.
    NameNotText,
    /// The name came before.
    NamedTwice,
    /// The slice holds it.
    Present,
    /// `blk.` without a block's number behind it.
    BlockNotNumber,
    /// More than any model has blocks.
    NoSuchBlock,
    /// A type that ggml does not have, or no longer.
    TypeUnknown,
    /// Zero, or beyond what ggml counts to.
    Dim {
        /// Which, from 0.
        index: usize,
        /// What it says.
        value: u64,
    },
    /// A row that ends inside a group of values.
    RowNotWhole {
        /// Values of a row.
        row: u64,
        /// The type.
        ty: TensorType,
    },
    /// More values or bytes than can be counted.
    TooLarge,
}

impl fmt::Display for BadAbsent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadAbsent::NameEmpty => f.write_str("has no name"),
            BadAbsent::NameTooLong => write!(f, "has a name of more than {MAX_NAME_BYTES} bytes"),
            BadAbsent::NameNotText => f.write_str("has a name that is not plain text"),
            BadAbsent::NamedTwice => f.write_str("is named twice"),
            BadAbsent::Present => f.write_str("is in the slice as well"),
            BadAbsent::BlockNotNumber => f.write_str("has a name without a block's number"),
            BadAbsent::NoSuchBlock => f.write_str("is of a block that the model does not have"),
            BadAbsent::TypeUnknown => f.write_str("has a type that ggml does not know"),
            BadAbsent::Dim { index, value } => write!(f, "has {value} as dimension {index}"),
            BadAbsent::RowNotWhole { row, ty } => {
                write!(f, "has rows of {row} values, {ty} takes multiples of {}", ty.block_len())
            }
            BadAbsent::TooLarge => f.write_str("has more values or bytes than can be counted"),
        }
    }
}
