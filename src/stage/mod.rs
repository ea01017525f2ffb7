//! A stage that llama.cpp computes, and one behind a connection.

pub mod load;
pub mod local;
mod memory;
pub mod remote;
pub(crate) mod reserve;
pub mod trial;
pub mod verified;
