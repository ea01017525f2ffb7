//! Per-layer graph evaluation, beside llama.cpp and not inside it.
//!
//! What it is: a [`Model`] is a GGUF loaded by the llama.cpp that llama-cpp-sys-2 builds: a whole one, or a slice that keeps
//! the whole's keys, names and numbers and lacks the weights of other blocks. A [`Stage`] evaluates any contiguous range of
//! its blocks with caches and states of its own: tokens or rows in, rows or logits out. The head, middle and tail of a model
//! are three stages; the numbers are llama.cpp's own, bit for bit, for every architecture that can be cut, and none is known
//! by name. A [`GraphPlan`] says of a whole file, without reading its weights, where it can be cut, what a range needs and what
//! crosses ([`Layout`]). A [`Stock`] context is plain `llama_decode` on the whole model with the same settings: the oracle,
//! and the A arm of every comparison.
//!
//! What it is not: a fork or a copy. The C++ in `cpp/` compiles against llama.cpp's internal headers where cargo put
//! them, and `cpp/upstream.h` fails to compile when they change under it.
//!
//! All of the workspace's `unsafe` is here, but for one memory map in gguf-tools. How it is layered:
//!
//! ```text
//! model.rs plan.rs layout.rs           the safe API: typed errors, lengths by slices
//! stage.rs stock.rs rows.rs
//! chat.rs grammar.rs                   what is said: templates, parsers of answers, GBNF
//! quantise.rs rpc.rs                   for comparisons: quantised models, llama.cpp's RPC backend
//! error.rs refusal.rs                  a dim_status and its dim_fault become an Error
//! ffi.rs                               bindgen's view of the contract, and nothing else
//! cpp/layer_eval.h cpp/dialogue.h      the contract: ownership, threads, what holds on failure
//! cpp/*.cpp                            llama.cpp's internals behind one exception boundary
//! ```

mod chat;
mod cpu;
mod error;
mod ffi;
mod grammar;
mod layout;
mod model;
mod plan;
mod quantise;
mod refusal;
mod rows;
#[cfg(feature = "rpc")]
pub mod rpc;
mod session;
mod stack;
mod stage;
mod stock;
#[cfg(feature = "test-support")]
#[doc(hidden)]
pub mod test_support;

pub use chat::{AnswerParser, ChatTemplate};
pub use cpu::unused_cpu_features;
pub use error::Error;
pub use grammar::Grammar;
pub use layout::{Layout, Part, ValueType};
pub use model::{Device, LogLevel, Model, ModelParams, ModelPart, Offload, devices, end_process, set_log};
pub use plan::{GraphPlan, RangePlan};
pub use quantise::{Quantised, quantise_model};
pub use refusal::{CrossingFault, Reason, Refusal, State, StateKind};
pub use rows::{RowType, dequantize_rows, quantize_rows};
pub use stage::{
    BlockStats, ContextInfo, ContextParams, FlashAttn, Input, KvType, Output, Row, Stage, StageParams,
};
pub use stock::Stock;

/// The version of llama-cpp-sys-2, the crate whose llama.cpp this is built on.
pub const LLAMA_CPP_SYS_VERSION: &str = env!("LLAMA_CPP_SYS_VERSION");

/// The llama.cpp bindings this crate is built on, for samplers: `llama_cpp_2::sampling`.
pub use llama_cpp_2;
