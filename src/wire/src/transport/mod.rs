//! Sockets under the protocol of [`crate`]: blocking TCP, threads, the clock.
//!
//! * [`tcp`]: socket options, and reading and writing against absolute deadlines.
//! * [`link`]: an authenticated, agreed connection: [`Link`], its [`Sender`] and its [`Receiver`].
//! * [`mod@dial`]: a host's way to a link: [`dial()`], [`inquire`], [`pair`].
//! * [`mod@push`]: files of a slice, sent to a worker.
//! * [`discover`]: workers of the local network, by mDNS: announced and found.
//! * [`listen`]: a worker's: [`Listener`], which serves one host at a time and survives everybody else.
//!
//! One token takes one write and, mostly, one read on each side, in the threads that compute: no queue, no
//! other thread is woken. Each link has one thread of its own besides, which sends heartbeats and reads
//! ahead while the owner computes.

pub mod dial;
pub mod discover;
pub mod link;
pub mod listen;
pub mod push;
pub mod tcp;

use std::time::Duration;

pub use dial::{dial, inquire, pair};
pub use link::{Counters, Event, Link, Receiver, Sender};
pub use listen::{KeyRing, Listener, ListenerConfig, Notice, Readiness};

use crate::error::{HandshakeError, Misbehaved, ReceiveError};
use crate::keys::KeyError;
use crate::message::{Farewell, Fault};
use crate::terms::{Mismatch, Reason, Terms};

/// The times of PROTOCOL.md, section 12. The defaults are its values; tests make some shorter.
#[derive(Clone, Debug)]
pub struct Timing {
    /// Host: from dialling to the worker's answer to HELLO. Worker: from accepting to HELLO.
    pub opening: Duration,
    /// Worker: from accepting to Noise message 1.
    pub stranger: Duration,
    /// Host: the longest a worker may prepare, sending heartbeats, before it answers HELLO.
    pub preparing: Duration,
    /// How long a side waits without hearing a byte before it gives its peer up.
    pub silence: Duration,
    /// How long a message may wait without the peer taking a byte of it. A peer that is not heard meanwhile
    /// is lost earlier, by its silence.
    pub stalled_write: Duration,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            opening: Duration::from_secs(5),
            stranger: Duration::from_secs(2),
            preparing: Duration::from_secs(60),
            silence: Duration::from_secs(3),
            stalled_write: Duration::from_secs(30),
        }
    }
}

/// Why there is no link, or no longer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The address means nothing or nobody answers there.
    #[error("cannot reach {address}: {text}")]
    Unreachable {
        /// Where.
        address: String,
        /// What the system says.
        text: String,
    },
    /// The connection broke.
    #[error("lost {peer}: {text}")]
    Broken {
        /// Who.
        peer: String,
        /// What the system says.
        text: String,
    },
    /// The peer closed the connection without a word.
    #[error("lost {peer}: it closed the connection without saying why")]
    Closed {
        /// Who.
        peer: String,
    },
    /// The peer has not been heard for too long.
    #[error("lost {peer}: nothing heard for {ms} ms")]
    Silent {
        /// Who.
        peer: String,
        /// How long.
        ms: u64,
    },
    /// What was waited for did not come in time.
    #[error("{peer} did not {what} within {ms} ms")]
    Deadline {
        /// Who.
        peer: String,
        /// What it should have done.
        what: &'static str,
        /// How long it had.
        ms: u64,
    },
    /// No connection was set up.
    #[error("{peer}: {error}")]
    Handshake {
        /// With whom.
        peer: String,
        /// Why.
        error: HandshakeError,
    },
    /// Host and worker do not fit together.
    #[error("{peer}: {}", refusal(.mismatches, .reason, .text))]
    Refused {
        /// Who.
        peer: String,
        /// The first difference.
        reason: Reason,
        /// Every difference, as this side sees them; empty for a worker's own reasons.
        mismatches: Vec<Mismatch>,
        /// What the side that refused said.
        text: String,
    },
    /// The worker serves another host.
    #[error("{peer} is busy: it has served {host} for {} s", .since_ms / 1000)]
    Busy {
        /// Which worker.
        peer: String,
        /// The host it serves.
        host: String,
        /// For how long.
        since_ms: u64,
    },
    /// The peer reported a fault and ended the connection.
    #[error("{peer}: {fault}")]
    Fault {
        /// Who.
        peer: String,
        /// What it reported.
        fault: Fault,
    },
    /// The peer ended the connection in order.
    #[error("{peer} {}", farewell(.why))]
    Goodbye {
        /// Who.
        peer: String,
        /// Why.
        why: Farewell,
    },
    /// The peer broke a rule of the protocol.
    #[error("{peer} broke the protocol ({}): {error}", .error.rule())]
    Broke {
        /// Who.
        peer: String,
        /// Which rule.
        error: ReceiveError,
    },
    /// This side was about to break a rule; nothing was sent.
    #[error("not sent, because it would break the protocol: {0}")]
    Misuse(Misbehaved),
    /// This side has stopped the link.
    #[error("the connection was stopped on this side")]
    Stopped,
    /// A key cannot be read or stored.
    #[error("{0}")]
    Keys(String),
}

impl LinkError {
    /// Whether the same attempt may succeed later: a worker that is away, busy, loading or paused.
    pub fn may_pass(&self) -> bool {
        match self {
            LinkError::Unreachable { .. }
            | LinkError::Broken { .. }
            | LinkError::Closed { .. }
            | LinkError::Silent { .. }
            | LinkError::Deadline { .. }
            | LinkError::Busy { .. }
            | LinkError::Goodbye { .. } => true,
            LinkError::Refused { reason, .. } => reason.is_temporary(),
            LinkError::Handshake { error, .. } => matches!(error, HandshakeError::Crowded),
            LinkError::Fault { fault, .. } => {
                use crate::message::ErrorCode::*;
                matches!(fault.code, Position | Compute | TooHot | Internal | Deadline)
            }
            // altered bytes end a connection, not a conversation
            LinkError::Broke { error: ReceiveError::Frame(_), .. } => true,
            LinkError::Broke { .. } | LinkError::Misuse(_) | LinkError::Stopped | LinkError::Keys(_) => false,
        }
    }
}

impl LinkError {
    /// Whether the worker has said that it will be back when somebody sees to it: a locked phone is unlocked, a
    /// hot one has cooled down. Such a worker is waited for longer than one that is just gone.
    pub fn is_pause(&self) -> bool {
        match self {
            LinkError::Goodbye { why, .. } => *why == Farewell::Pausing,
            LinkError::Fault { fault, .. } => fault.code == crate::message::ErrorCode::TooHot,
            _ => false,
        }
    }
}

/// Why nothing could be connected to, with what to look at.
fn no_way(error: &std::io::Error) -> String {
    use std::io::ErrorKind::*;
    match error.kind() {
        ConnectionRefused => "nothing listens there: is the worker running?".to_owned(),
        TimedOut => "no answer: is the worker running, and is this the right network?".to_owned(),
        // what macOS answers to a program that it keeps from the local network is this and nothing else
        HostUnreachable | NetworkUnreachable | NetworkDown | PermissionDenied => format!(
            "{error}: is it on the same network? On a Mac, System Settings > Privacy & Security > Local Network \
             has to allow this terminal"
        ),
        _ => error.to_string(),
    }
}

impl From<KeyError> for LinkError {
    fn from(error: KeyError) -> LinkError {
        LinkError::Keys(error.to_string())
    }
}

fn refusal(mismatches: &[Mismatch], reason: &Reason, text: &str) -> String {
    if mismatches.is_empty() {
        return if text.is_empty() { format!("refused ({reason:?})") } else { text.to_owned() };
    }
    mismatches.iter().map(|m| m.text.as_str()).collect::<Vec<_>>().join("; ")
}

fn farewell(why: &Farewell) -> &'static str {
    match why {
        Farewell::Finished => "has finished and closed the connection",
        Farewell::ShuttingDown => "is shutting down",
        Farewell::Pausing => "is paused; unlock the phone and bring the app to the front",
        Farewell::Replaced => "has a newer connection with this host",
    }
}

/// A text for a REFUSE: every difference in one line.
fn refusal_text(mismatches: &[Mismatch]) -> String {
    refusal(mismatches, &Reason::Version, "")
}

/// What a peer calls itself, with where it is.
fn described(terms: &Terms, address: &str) -> String {
    if terms.name.is_empty() { address.to_owned() } else { format!("{} ({address})", terms.name) }
}
