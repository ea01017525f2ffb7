//! DIM: one model across your Mac and your phone.
#![forbid(unsafe_code)]

pub mod host;
pub mod stage;
