//! GGUF files: read without trust and without loss, checked, and written.
//!
//! - [`Gguf`] opens a file (or the parts of one model) and answers: metadata in file order, tensors by name.
//! - [`Value`] and [`Array`] are metadata values, byte for byte.
//! - [`check`](mod@check) refuses what llama.cpp would answer by ending the process.
//! - [`write::GgufWriter`] writes: metadata and tensor descriptions first, then data as a stream.
//!
//! What it is not: a tensor library. Nothing here looks inside tensor data.

pub mod check;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod parts;
mod reader;
mod types;
mod value;
pub mod write;

pub(crate) use error::Shown;
pub use error::{Error, Place, Rule};
pub use reader::{DEFAULT_ALIGNMENT, Entry, Gguf, MAX_ALIGNMENT, MAX_DEPTH, MAX_KEYS, Tensor};
pub use types::{TensorType, ValueType};
pub use value::{Array, Elements, Value};
