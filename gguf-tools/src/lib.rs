//! Reads, plans, cuts and synthesises GGUF files.
//!
//! Pure Rust: without the `engine` feature no C++ is compiled, and everything works except requantising.
#![deny(unsafe_code)]

pub mod arch;
pub mod coreml;
pub mod gguf;
mod os;
pub mod synth;
