//! DIM: one model across your Mac and your phone.
//!
//! The way of the data, and where each part of it stands: docs/ARCHITECTURE.md.
#![forbid(unsafe_code)]

pub mod device;
pub mod host;
pub mod progress;
pub mod stage;
pub mod worker;

pub use gguf_tools::failure;
