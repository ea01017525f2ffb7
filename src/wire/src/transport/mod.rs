//! Sockets under the protocol: blocking TCP, threads, the clock. What is said when is [`crate::endpoint`]'s business.
//!
//! * [`tcp`]: socket options, and reading and writing against absolute deadlines.
//! * [`mod@dial`]: a host's way to a link: [`dial()`], [`inquire`], [`pair`]. A [`CallOff`] ends a dial from
//!   another thread.
//! * [`listen`]: a worker's: [`Listener`], which serves one host at a time and survives everybody else.
//! * [`link`]: an agreed connection: [`Link`], its [`Sender`] and its [`Receiver`].
//! * [`mod@push`]: files of a slice, sent to a worker.
//! * [`discover`]: workers of the local network, by mDNS: announced and found.
//!
//! One token takes one write and, mostly, one read on each side, in the threads that compute: no queue, no
//! other thread is woken. Each link has one thread of its own besides, which sends heartbeats and reads
//! ahead while the owner computes; what a host has said and the socket has no room for is written by another, for as long
//! as there is such a rest.

mod call_off;
pub mod dial;
pub mod discover;
mod line;
pub mod link;
pub mod listen;
mod notices;
mod opening;
pub mod push;
mod sending;
mod slot;
mod strangers;
pub mod tcp;

pub use crate::endpoint::{ClockOffset, ComputeTime, Timing};
pub use crate::link_error::{Awaited, LinkError, LinkErrorKind};
pub use call_off::CallOff;
pub use dial::{dial, dial_unless, inquire, inquire_unless, pair};
pub use link::{Event, Link, Receiver, Sender};
pub use listen::{KeyRing, Listener, ListenerConfig, Readiness};
pub use notices::Notice;
pub use strangers::MAX_STRANGERS;
