//! The command line of DIM: arguments in, exit code out.
#![forbid(unsafe_code)]

pub mod commands;
