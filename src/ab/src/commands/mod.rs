//! The subcommands of `dim-ab`.

pub mod ab;
pub mod arms;
pub mod eval;
pub mod report;
