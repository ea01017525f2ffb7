//! What host and worker have in common that needs no model, no socket and no clock: which blocks, whose rows, which
//! stage runs what next, and what happens when a worker is lost.
//!
//! | module | what |
//! |---|---|
//! | [`blocks`], [`digest`] | names of parts of a model |
//! | [`rows`] | rows, what they are made of, and their number formats |
//! | [`ids`], [`stage`], [`error`] | jobs, sessions and stages, the two kinds of stage, and what can go wrong there |
//! | [`schedule`], [`groups`], [`window`] | which stage runs what next, what of it together, and how far ahead: pure |
//! | [`pipeline`], [`shared`] | the stages, driven by the schedule; by several threads, each for a session |
//! | [`simulator`], [`trace`] | the same schedule over stages that only take time, and what either driver did |
//! | [`replay`], [`patience`] | what a worker that lost its memory is told again, and how long it is looked for |
//! | [`reserve`] | its blocks in this process, when it stays away |
//! | [`saved`] | a session as it can be kept, for another process |
//! | [`guard`], [`canary`] | a worker held against a known answer |

#![forbid(unsafe_code)]

pub mod bell;
pub mod blocks;
pub mod canary;
pub mod digest;
pub mod error;
#[cfg(any(test, feature = "test-support"))]
pub mod fakes;
pub mod groups;
pub mod guard;
mod history;
pub mod ids;
pub mod patience;
pub mod pipeline;
pub mod random;
pub mod replay;
pub mod reserve;
pub mod rows;
pub mod saved;
pub mod schedule;
pub mod shared;
pub mod simulator;
pub mod stage;
pub mod trace;
pub mod window;
