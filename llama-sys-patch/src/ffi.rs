//! bindgen's view of `cpp/layer_eval.h`. That header is the contract every `SAFETY` comment of this crate refers to.

#![allow(
    non_camel_case_types,
    non_upper_case_globals,
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]

include!(concat!(env!("OUT_DIR"), "/layer_eval.rs"));
