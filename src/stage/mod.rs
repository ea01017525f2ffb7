//! A stage that llama.cpp computes, and one behind a connection.

pub mod load;
pub mod local;
pub mod remote;
pub mod verified;
