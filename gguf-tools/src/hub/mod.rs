//! Models from the Hugging Face hub: `hf:ORG/REPO[/FILE|:QUANT]`, fetched into the cache that its own tools use, and
//! slices that are [made](crate::recipe) from byte ranges of what is there.
//!
//! | module | what |
//! |---|---|
//! | `place` | which repository, which file: parsed, and chosen among what a repository has |
//! | `settings` | whom to ask, where to keep it, as whom: `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and their like |
//! | `http` | one request, its redirects, and patience: what is tried again, and what is the end |
//! | `download` | whole files: resumed, checked, named |
//! | `headers` | what a model is like, without its weights |
//! | `slice` | a slice, by its ranges |
//!
//! What is trusted: the hub says which digest a file has, and nothing else it says is believed. Its names stay inside the
//! cache, its lengths are compared before they are used, its answers are bounded in bytes and in time. The token goes to
//! the hub's own origin (scheme, host and port) and to nobody that it redirects to.
//!
//! Every request asks for a range of at most 64 MiB: what serves the hub's large files refuses more than it likes, and a
//! connection that is cut loses nothing that has arrived.

mod download;
mod error;
mod headers;
mod http;
mod place;
mod settings;
mod slice;

pub use download::{Fetched, fetch};
pub use error::HubError;
pub use headers::{Headers, fetch_headers};
pub use place::{HubName, Wanted};
pub use settings::{Patience, Settings, Token};
pub use slice::{Outcome, fetch_manifest, fetch_slice, is_url, middle};

/// Hears how many bytes there are of how many, and of which file.
pub type OnBytes<'a> = &'a mut dyn FnMut(u64, u64, &str);
