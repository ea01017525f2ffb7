//! GGUF files: read without trust and without loss, checked, and written.
//!
//! - [`Gguf`] opens a file (or the parts of one model) and answers: metadata in file order, tensors by name.
//! - [`Value`] and [`Array`] are metadata values, byte for byte.
//! - [`absent`] is what a slice says it lacks.
//! - [`check`](mod@check) refuses what llama.cpp would answer by ending the process.
//! - [`write::GgufWriter`] writes: metadata and tensor descriptions first, then data as a stream.
//!
//! What it is not: a tensor library. Nothing here looks inside tensor data.

// numbers of a file are turned into others by what can say no
#![deny(clippy::cast_possible_truncation)]

pub mod absent;
mod bad_absent;
pub mod check;
mod error;
mod file;
mod header;
pub mod limits;
mod names;
mod part;
mod parts;
mod reader;
mod temp;
mod types;
mod value;
pub mod write;

/// A number of bytes or of things as a length in memory. What does not fit there, on a machine of 32 bits, is longer than
/// anything that is there: it is found missing like what lies past the end of a file.
pub(crate) fn length(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// The number of one of fewer than 2^32 things: each of them takes more than a byte of a header.
pub(crate) fn index(i: usize) -> u32 {
    u32::try_from(i).unwrap_or(u32::MAX)
}

/// Whether the header of a file of `len` bytes, which begins with these, goes on behind them.
#[cfg(feature = "hub")]
pub(crate) fn goes_on(bytes: &[u8], len: u64) -> bool {
    matches!(header::parse(bytes, len), Err(header::Stop::More))
}

pub use bad_absent::BadAbsent;
pub use error::{Error, Foreign, NotAModel, Place, Rule};
#[cfg(feature = "hub")]
pub(crate) use parts::PartName;
pub use reader::{Entry, Gguf, Tensor};
pub use types::{TensorType, ValueType};
pub use value::{Array, Elements, Value};
