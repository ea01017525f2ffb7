//! The host: drives the pipeline from tokens to tokens.
//!
//! ```text
//! prompt -> tokens -> [schedule] -> head stage -> hidden -> remote stage(s) -> hidden -> tail stage -> logits
//!                                                                                            -> sampler -> token
//! ```

pub mod pipeline;
pub mod report;
pub mod sampler;
pub mod schedule;
pub mod template;
pub mod text;
