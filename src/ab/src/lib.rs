//! Is the split worth it here, how much, and is the answer the same?
//!
//! ```text
//! dim-ab run       plan -> [run]: every arm a process of its own (launch, cgroup), in turns, watched from outside
//!                          (usage, energy, machine), over an emulated link (link) where one is asked for
//!                              -> results.jsonl, one [record] per arm and round
//! dim-ab report    records -> [summary]: medians, ranges, ratios (stats) -> [report]: tables, plots (charts)
//! dim-ab eval      text -> logits of two engines -> [quality]: perplexity, divergence, agreement
//! ```
//!
//! What is measured is what people run: the programs themselves, started as they are. This crate computes nothing
//! with a model.
//!
//! `run` is for Linux and macOS: an arm is a process that `exec` made, is watched through the system's own counters, and may
//! be ended by a signal. `report`, `eval` and the arithmetic under them are for every system.
#![forbid(unsafe_code)]

#[cfg(unix)]
pub mod cgroup;
pub mod charts;
pub mod commands;
pub mod energy;
#[cfg(unix)]
pub mod launch;
pub mod link;
pub mod machine;
pub mod quality;
pub mod record;
pub mod report;
#[cfg(unix)]
pub mod run;
pub mod stats;
pub mod summary;
pub mod usage;
