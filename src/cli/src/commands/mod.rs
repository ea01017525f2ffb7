//! The subcommands of `dim-host`: arguments in, exit out. What they do stands in the library and the modules beside.

pub mod chat;
pub mod demo;
pub mod generate;
pub mod laboratory;
pub mod pair;
pub mod push;
pub mod serve;
mod several;
pub mod stock;
