//! Reads, plans, cuts and synthesises GGUF files.
//!
//! Pure Rust: without the `engine` feature no C++ is compiled, and everything works except what asks llama.cpp. Each module
//! knows those above it only:
//!
//! | module | what |
//! |---|---|
//! | [`text`], [`failure`], [`terminal`] | what is shown to people: texts of files, errors with their way out, lines |
//! | [`arch`] | which architectures' blocks can be renumbered |
//! | [`gguf`] | files, read and written; what llama.cpp would end the process for |
//! | [`digest`] | names of tensors, models and slices |
//! | [`slice`](mod@slice) | the keys of a slice, and whether its file is what they say |
//! | [`source`] | where a cut model came from |
//! | [`died`] | how a process that looked at a file ended without an answer |
//! | [`requantise`], [`canary`] | what takes llama.cpp: other types, a middle's answer to a known input |
//! | [`dequantise`] | a quantised model as plain numbers |
//! | [`needs`], [`apart`], [`ask`] | what a range of blocks needs; llama.cpp, which says it, in a process of its own; who is asked |
//! | [`plan`] | a cut before anything is written |
//! | [`manifest`] | what was cut, as a file |
//! | [`recipe`] | how a slice is made from where its model came from |
//! | [`split`] | the cut itself |
//! | `hub` | models and slices from the Hugging Face hub; feature `hub` |
//! | [`coreml`], [`synth`] | Core ML packages of a middle; models with random weights |
#![deny(unsafe_code)]

pub mod apart;
pub mod arch;
pub mod ask;
pub mod canary;
pub mod coreml;
pub mod dequantise;
pub mod died;
pub mod digest;
pub mod failure;
#[doc(hidden)]
pub mod fuzz;
pub mod gguf;
#[cfg(feature = "hub")]
pub mod hub;
pub mod manifest;
pub mod needs;
mod os;
pub mod plan;
pub mod recipe;
pub mod requantise;
pub mod slice;
pub mod source;
pub mod split;
pub mod synth;
pub mod terminal;
pub mod text;
