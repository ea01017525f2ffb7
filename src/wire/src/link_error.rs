//! Why there is no link, or no longer: with whom, what happened, and what a person can do about it.

use std::fmt;
use std::io;

use crate::error::{HandshakeError, Misbehaved, ReceiveError};
use crate::fault::{ErrorCode, Farewell, Fault};
use crate::keys::KeyError;
use crate::terms::{Mismatch, Reason};

/// What happened, and with whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkError {
    /// The peer's name and address, as far as they are known.
    pub peer: String,
    /// What happened.
    pub kind: LinkErrorKind,
}

/// What happened to a connection, or why there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkErrorKind {
    /// No TCP connection: the address means nothing, or nobody answers there.
    Unreachable {
        /// What the system says, and what that means.
        text: String,
        /// The machine is there and says that nothing listens at this port.
        is_refused: bool,
    },
    /// The connection broke under this side's hands.
    Broken {
        /// What the system says.
        text: String,
    },
    /// The peer closed the connection without a word.
    Closed,
    /// Not a byte came while this side waited for one.
    Silent {
        /// For how long.
        ms: u64,
    },
    /// The peer is there, and takes none of the bytes that it is sent.
    Stalled {
        /// For how long.
        ms: u64,
    },
    /// What was waited for did not come in time.
    Deadline {
        /// What the peer should have done.
        awaited: Awaited,
        /// How long it had.
        ms: u64,
    },
    /// Versions or keys do not fit.
    Handshake(HandshakeError),
    /// What the host needs and what the worker holds do not fit.
    Refused {
        /// The first difference, or the worker's own reason.
        reason: Reason,
        /// Every difference, as this side sees them; empty for a worker's own reasons.
        mismatches: Vec<Mismatch>,
        /// What the side that refused said.
        text: String,
    },
    /// The worker serves another host.
    Busy {
        /// What that host calls itself.
        host: String,
        /// For how long it has been served.
        since_ms: u64,
    },
    /// The peer reported a fault of its own, and that ended the connection.
    Fault(Fault),
    /// The peer ended the connection in order.
    Goodbye(Farewell),
    /// The peer broke a rule of the protocol.
    Broke(ReceiveError),
    /// This side was about to break a rule; nothing was sent.
    Misuse(Misbehaved),
    /// This side stopped the link.
    Stopped,
    /// A key cannot be read or stored.
    Keys(String),
}

/// What a peer should have done in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Awaited {
    /// Either side's part of the handshake.
    Handshake,
    /// A worker's answer to what it was asked, or to a step.
    Answer,
    /// A worker's new key, in pairing.
    Key,
    /// What a host wants of the worker.
    Need,
    /// A host's name, in pairing.
    Name,
    /// A host's word that it has stored its new key.
    Stored,
}

/// As it follows "did not".
impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Awaited::Handshake => "answer the handshake",
            Awaited::Answer => "answer",
            Awaited::Key => "hand over a key",
            Awaited::Need => "say what it needs",
            Awaited::Name => "say who it is",
            Awaited::Stored => "store its key",
        })
    }
}

impl LinkErrorKind {
    /// The error with a peer.
    pub fn with(self, peer: &str) -> LinkError {
        LinkError { peer: peer.to_owned(), kind: self }
    }

    /// What the system says of a connection that was there.
    pub fn broken(error: &io::Error) -> LinkErrorKind {
        LinkErrorKind::Broken { text: error.to_string() }
    }

    /// What the system says of a connection that could not be made, with what to look at.
    pub fn unreachable(error: &io::Error) -> LinkErrorKind {
        use io::ErrorKind::*;
        let text = match error.kind() {
            ConnectionRefused => "nothing listens there: is the worker running?".to_owned(),
            TimedOut => "no answer: is the worker running, and is this the right network?".to_owned(),
            // what macOS answers to a program that it keeps from the local network is this and nothing else
            HostUnreachable | NetworkUnreachable | NetworkDown | PermissionDenied => format!(
                "{error}: is it on the same network? On a Mac, System Settings > Privacy & Security > Local \
                 Network has to allow this terminal"
            ),
            _ => error.to_string(),
        };
        LinkErrorKind::Unreachable { text, is_refused: error.kind() == ConnectionRefused }
    }

    /// Whether the connection is just gone, so that what the peer said before is worth looking for.
    pub(crate) fn is_bare_loss(&self) -> bool {
        matches!(self, LinkErrorKind::Broken { .. } | LinkErrorKind::Closed)
    }
}

impl LinkError {
    /// Whether the same attempt may succeed later: a worker that is away, busy, loading or paused.
    pub fn may_pass(&self) -> bool {
        use LinkErrorKind::*;
        match &self.kind {
            Unreachable { .. } | Broken { .. } | Closed | Silent { .. } | Stalled { .. } => true,
            Deadline { .. } | Busy { .. } | Goodbye(_) => true,
            Refused { reason, .. } => reason.is_temporary(),
            Handshake(error) => matches!(error, HandshakeError::Crowded),
            Fault(fault) => matches!(
                fault.code,
                ErrorCode::Position
                    | ErrorCode::Compute
                    | ErrorCode::TooHot
                    | ErrorCode::Internal
                    | ErrorCode::Deadline
            ),
            // altered bytes end a connection, not a conversation
            Broke(ReceiveError::Frame(_)) => true,
            Broke(_) | Misuse(_) | Stopped | Keys(_) => false,
        }
    }

    /// Whether the worker has said that it will be back when somebody sees to it: a locked phone is unlocked, a
    /// hot one has cooled down. Such a worker is waited for longer than one that is just gone.
    pub fn is_pause(&self) -> bool {
        match &self.kind {
            LinkErrorKind::Goodbye(why) => *why == Farewell::Pausing,
            LinkErrorKind::Fault(fault) => fault.code == ErrorCode::TooHot,
            _ => false,
        }
    }

    /// Whether the user has to change something on one of the sides before another attempt makes sense.
    pub fn is_misuse(&self) -> bool {
        match &self.kind {
            LinkErrorKind::Refused { reason, .. } => !reason.is_temporary() && *reason != Reason::NoMemory,
            _ => !self.may_pass(),
        }
    }

    /// What a person can do about it, where that does not stand in the sentence already.
    pub fn hint(&self) -> Option<&'static str> {
        match &self.kind {
            LinkErrorKind::Refused { reason: Reason::NoMemory, .. } => {
                Some("close other apps on it, take a smaller context, or give it fewer blocks")
            }
            LinkErrorKind::Refused { reason, .. } if reason.is_temporary() => {
                Some("it will be ready later: try again then, or wait for it longer")
            }
            LinkErrorKind::Refused { .. } => Some("the line above names the side to fix"),
            LinkErrorKind::Handshake(HandshakeError::Key) => {
                Some("pair them again, or give both the same key")
            }
            LinkErrorKind::Busy { .. } => Some("stop the other host, or use another worker"),
            LinkErrorKind::Unreachable { .. } => {
                Some("is dim-worker running there, on the same network, and its port open?")
            }
            _ => None,
        }
    }
}

impl fmt::Display for LinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use LinkErrorKind::*;
        let peer = &self.peer;
        match &self.kind {
            Unreachable { text, .. } => write!(f, "cannot reach {peer}: {text}"),
            Broken { text } => write!(f, "lost {peer}: {text}"),
            Closed => write!(f, "lost {peer}: it closed the connection without saying why"),
            Silent { ms } => write!(f, "lost {peer}: nothing heard for {ms} ms"),
            Stalled { ms } => write!(f, "lost {peer}: it has taken no bytes for {ms} ms"),
            Deadline { awaited, ms } => write!(f, "{peer} did not {awaited} within {ms} ms"),
            Handshake(error) => write!(f, "{peer}: {error}"),
            Refused { reason, mismatches, text } if mismatches.is_empty() && text.is_empty() => {
                write!(f, "{peer}: refused ({reason:?})")
            }
            Refused { mismatches, text, .. } if mismatches.is_empty() => write!(f, "{peer}: {text}"),
            Refused { mismatches, .. } => write!(f, "{peer}: {}", refusal_text(mismatches)),
            Busy { host, since_ms } => {
                write!(f, "{peer} is busy: it has served {host} for {} s", since_ms / 1000)
            }
            Fault(fault) => write!(f, "{peer}: {fault}"),
            Goodbye(why) => write!(f, "{peer} {why}"),
            Broke(error) => write!(f, "{peer} broke the protocol ({}): {error}", error.rule()),
            Misuse(rule) => write!(f, "not sent, because it would break the protocol: {rule}"),
            Stopped => f.write_str("the connection was stopped on this side"),
            Keys(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for LinkError {}

impl From<KeyError> for LinkError {
    fn from(error: KeyError) -> LinkError {
        LinkErrorKind::Keys(error.to_string()).with("this side")
    }
}

/// A text for a REFUSE: every difference in one line.
pub(crate) fn refusal_text(mismatches: &[Mismatch]) -> String {
    mismatches.iter().map(|m| m.text.as_str()).collect::<Vec<_>>().join("; ")
}
