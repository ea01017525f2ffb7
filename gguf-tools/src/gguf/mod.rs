//! GGUF files: read without trust and without loss, checked, and written.
//!
//! - [`Gguf`] opens a file (or the parts of one model) and answers: metadata in file order, tensors by name.
//! - [`Value`] and [`Array`] are metadata values, byte for byte.
//! - [`absent`] is what a slice says it lacks.
//! - [`check`](mod@check) refuses what llama.cpp would answer by ending the process.
//! - [`write::GgufWriter`] writes: metadata and tensor descriptions first, then data as a stream.
//!
//! What it is not: a tensor library. Nothing here looks inside tensor data.

pub mod absent;
pub mod check;
mod error;
mod file;
mod header;
pub mod limits;
mod part;
mod parts;
mod reader;
mod temp;
mod types;
mod value;
pub mod write;

pub use error::{Error, Foreign, NotAModel, Place, Rule};
#[cfg(feature = "hub")]
pub(crate) use parts::PartName;
pub use reader::{Entry, Gguf, Tensor};
pub use types::{TensorType, ValueType};
pub use value::{Array, Elements, Value};
