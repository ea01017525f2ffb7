//! The host: drives the pipeline from tokens to tokens.
//!
//! ```text
//! prompt -> tokens -> [schedule] -> head stage -> hidden -> remote stage(s) -> hidden -> tail stage -> logits
//!                                                                                            -> sampler -> token
//! ```

pub mod auto;
pub mod chat;
pub mod engine;
pub mod generate;
pub mod interrupt;
pub mod machine;
pub mod packages;
pub mod report;
pub mod sampler;
pub mod setup;
pub mod template;
pub mod text;
