//! DIM: one model across your Mac and your phone.
//!
//! `dim-split` cuts a GGUF in three. The host runs the first and the last blocks with llama.cpp, the middle ones run on a
//! phone or on any other machine, and only the hidden rows between them cross the network, encrypted. With F32 rows the
//! logits are those of stock llama.cpp, bit for bit.
//!
//! ```
//! # // a model with random weights, cut in three, and a worker for its middle in this process
//! # use gguf_tools::{gguf::Gguf, plan::{Plan, Request}, split::split, synth::Spec};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # Spec::tiny("qwen2")?.write(folder.path().join("m.gguf"))?;
//! # let model = Gguf::open(folder.path().join("m.gguf"))?;
//! # let middles = vec!["1..2".parse()?];
//! # let request = Request { middles, stem: "m".into(), ..Request::default() };
//! # split(&Plan::new(&model, &request)?, folder.path(), "m", |_| {})?;
//! # let (key, on_event) = (dim::Key::random()?, |_| {});
//! # let small = dim::Resources { n_ctx: 256, n_threads: Some(1), ..Default::default() };
//! # let worker = dim::Worker::open(folder.path().join("m.middle-1..2.gguf")).key(key.clone());
//! # let mut worker = worker.resources(small).listen("127.0.0.1:0").bind(on_event)?;
//! # let (addr, stop) = (worker.address().to_string(), worker.stop_handle());
//! # let serving = std::thread::spawn(move || worker.serve());
//! # let split = folder.path().join("m.split.json");
//! use dim::{Host, RowType, Sampling};
//!
//! let host = Host::open(split)?
//! #   .resources(small)
//!     .worker(addr, key).wire(RowType::F16).connect(on_event)?;
//! let mut session = host.session()?;
//! session.push_text("The capital of France is")?;
//! for token in session.generate(Sampling::greedy()).take(100) {
//!     print!("{}", token?.text);
//! }
//! # assert!(session.tokens().len() > 100);
//! # drop(host);
//! # stop.stop();
//! # serving.join().unwrap()?;
//! # Ok(())
//! # }
//! ```
//!
//! | | |
//! |---|---|
//! | [`Host`], [`Session`] | a split model and conversations with it, side by side; [`WholeModel`] is the same without a split |
//! | [`Worker`] | a slice, served to hosts from inside any program |
//! | [`Event`] | what happens meanwhile: this library prints nothing |
//! | [`Error`] | why something could not be done, with [what to do about it](Error::hint) |
//!
//! `examples/generate.rs` and `examples/worker.rs` are whole programs over it; `dim-host` and `dim-worker` are others. The
//! way of the data, and where each part of it stands: docs/ARCHITECTURE.md.
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
pub use dim_core::digest::Sha;
pub use dim_core::pipeline::Patience;
pub use dim_core::rows::RowType;
pub use dim_wire::keys::Key;
pub use dim_wire::transport::CallOff;
pub use error::{BadOption, Error};
pub use event::Event;
pub use host::constraint::Constraint;
pub use host::discovery::Discovery;
pub use host::sampler::Sampling;
pub use host::{Generation, Host, HostBuilder, Session, Token, WholeModel};
pub use resources::{MAX_CTX, MAX_SNAPSHOTS, Resources};
pub use stage::verified::Verify;
pub use worker::{StopHandle, Worker, WorkerBuilder};

/// A host is shared by the threads of its sessions; sessions and workers move to whichever thread is to drive them.
const _: () = {
    const fn is_send<T: Send>() {}
    const fn is_shared<T: Send + Sync>() {}
    is_shared::<Host>();
    is_shared::<WholeModel>();
    is_send::<Session>();
    is_send::<Worker>();
    is_send::<Error>();
};
