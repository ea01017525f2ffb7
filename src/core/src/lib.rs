//! What host and worker have in common that needs no model, no socket and no clock: which blocks, whose rows, which
//! stage runs what next, and what happens when a worker is lost.
//!
//! | module | what |
//! |---|---|
//! | [`blocks`], [`digest`] | names of parts of a model |
//! | [`rows`] | hidden rows and their number formats |
//! | [`stage`] | steps, and the two kinds of stage |
//! | [`schedule`] | which stage runs what next: pure |
//! | [`pipeline`] | the stages, driven by the schedule |
//! | [`replay`] | what a worker that lost its memory is told again |
//! | [`guard`], [`canary`] | a worker held against a known answer |

#![forbid(unsafe_code)]

pub mod bell;
pub mod blocks;
pub mod canary;
pub mod digest;
pub mod guard;
pub mod pipeline;
pub mod random;
pub mod replay;
pub mod rows;
pub mod schedule;
pub mod stage;
