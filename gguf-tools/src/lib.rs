//! Reads, plans, cuts and synthesises GGUF files.
//!
//! Pure Rust: without the `engine` feature no C++ is compiled, and everything works except requantising.
#![deny(unsafe_code)]

pub mod arch;
pub mod canary;
pub mod coreml;
pub mod digest;
pub mod failure;
pub mod gguf;
pub mod manifest;
mod os;
pub mod plan;
mod requantise;
pub mod slice;
pub mod split;
pub mod synth;
