//! The protocol between host and worker, as docs/PROTOCOL.md specifies it, and the sockets under it.
//!
//! There is no socket, no clock and no thread in here but in [`transport`], so every rule can be tested in memory: time
//! is a value that the caller passes. Each module knows only those above it:
//!
//! | module | what |
//! |---|---|
//! | [`codec`] | one bounded reader over untrusted bytes, one writer |
//! | [`layout`] | sizes and limits |
//! | [`rows`] | rows: what they are made of, and their bytes |
//! | [`keys`] | keys, pairing codes, and where they are kept |
//! | [`fault`] | faults and farewells |
//! | [`error`] | every rule of the protocol as a variant, with the name it has in PROTOCOL.md |
//! | [`terms`] | what both sides compare, what they agree on, and who has to fix a difference |
//! | [`message`] | the table of message numbers, and the layout of each |
//! | [`frame`] | messages cut into encrypted frames, and joined again in the buffer where the rows are read |
//! | [`handshake`] | versions, keys, Noise |
//! | [`books`], [`connection`] | which message may come when; sessions, positions, steps |
//! | [`link_error`] | why there is no link, or no longer |
//! | [`endpoint`] | one side of a connection from its first byte to its last, its timers inside |
//! | [`transport`] | threads and sockets |
//!
//! docs/vectors/ holds golden bytes for all of it; tests/vectors.rs writes and checks them.

#![forbid(unsafe_code)]

pub mod books;
pub mod codec;
pub mod connection;
pub mod endpoint;
pub mod error;
pub mod fault;
pub mod frame;
#[doc(hidden)]
pub mod fuzz;
pub mod handshake;
pub mod keys;
pub mod layout;
pub mod link_error;
pub mod message;
pub mod rows;
pub mod terms;
pub mod transport;

pub use connection::{Connection, Role};
pub use error::{HandshakeError, Malformed, Misbehaved};
pub use link_error::{LinkError, LinkErrorKind};
pub use message::{Message, Span, Status};
pub use rows::{RowType, RowTypes, RowsRef};
pub use terms::{Agreed, Terms};

/// The lowest and the highest version of the protocol that this software speaks.
pub const VERSIONS: std::ops::RangeInclusive<u16> = 2..=2;

#[cfg(target_endian = "big")]
compile_error!(
    "hidden rows are read in place as little-endian numbers: this protocol needs a little-endian machine"
);
