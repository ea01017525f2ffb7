//! The protocol between host and worker, as docs/PROTOCOL.md specifies it: bytes in, bytes out.
//!
//! There is no socket, no clock and no thread in here but in [`transport`], so every rule can be
//! tested in memory: time is a number the caller passes. From the bottom up:
//!
//! * [`codec`]: one bounded reader over untrusted bytes, one writer.
//! * [`message`]: the table of message numbers, and the layout of each.
//! * [`frame`]: messages cut into encrypted frames, and joined again in the buffer where the rows are read.
//! * [`handshake`]: versions, keys, Noise.
//! * [`terms`]: what both sides compare, what they agree on, and who has to fix a difference.
//! * [`connection`]: which message may come when, and the books of sessions and positions.
//! * [`error`]: every rule of the protocol as a variant, with the name it has in PROTOCOL.md.
//!
//! docs/vectors/ holds golden bytes for all of it; tests/vectors.rs writes and checks them.

#![forbid(unsafe_code)]

pub mod codec;
pub mod connection;
pub mod error;
pub mod frame;
#[doc(hidden)]
pub mod fuzz;
pub mod handshake;
pub mod keys;
pub mod message;
pub mod rows;
pub mod terms;
pub mod transport;

pub use connection::{Connection, Role};
pub use error::{HandshakeError, Malformed, Misbehaved};
pub use message::{DType, Message, Span, Status};
pub use rows::{Rows, RowsRef};
pub use terms::{Agreed, Terms};

/// The lowest and the highest version of the protocol that this software speaks.
pub const VERSIONS: std::ops::RangeInclusive<u16> = 1..=1;

#[cfg(target_endian = "big")]
compile_error!(
    "hidden rows are read in place as little-endian numbers: this protocol needs a little-endian machine"
);
