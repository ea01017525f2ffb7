//! DIM: one model across your Mac and your phone.
//!
//! The way of the data, and where each part of it stands: docs/ARCHITECTURE.md.
#![forbid(unsafe_code)]

pub mod device;
pub mod error;
pub mod event;
pub mod host;
mod resources;
pub mod retry;
pub mod stage;
mod terms;
pub mod worker;

pub use dim_core::blocks::BlockRange;
pub use dim_core::pipeline::Patience;
pub use dim_core::rows::RowType;
pub use dim_wire::keys::Key;
pub use error::{BadOption, Error};
pub use event::Event;
pub use host::discovery::Discovery;
pub use host::sampler::Sampling;
pub use host::{Generation, Host, HostBuilder, Session, Token, WholeModel};
pub use resources::Resources;
pub use stage::verified::Verify;
pub use worker::{StopHandle, Worker, WorkerBuilder};
