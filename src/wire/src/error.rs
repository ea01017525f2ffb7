//! Every rule of the protocol that a peer can break, under the name it has in PROTOCOL.md, section 11.

use std::ops::RangeInclusive;

pub use crate::codec::Malformed;

use crate::fault::ErrorCode;

/// What is wrong with a stream of frames. Nothing after it can be trusted or even found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A frame has a length that no frame at this place can have.
    #[error("a frame of {length} bytes stands where {expected} bytes were due")]
    Length {
        /// What its two clear bytes say.
        length: usize,
        /// What they should have said (for a message's first frame: the least).
        expected: usize,
    },
    /// A frame or its message is longer than the connection allows now.
    #[error("a message of {length} bytes is longer than the {limit} bytes this connection allows")]
    TooLong {
        /// The message's length, as far as it is known.
        length: usize,
        /// The limit of the moment.
        limit: usize,
    },
    /// A frame was altered, repeated, reordered, left out, or sealed with another key.
    #[error("frame {number} is not what the peer sealed: altered, repeated or out of order")]
    BadTag {
        /// The frame's number in its direction.
        number: u64,
    },
    /// All frame numbers of this connection have been used.
    #[error("this connection has used up its frame numbers")]
    Exhausted,
}

impl FrameError {
    /// The rule's name in PROTOCOL.md.
    pub fn rule(&self) -> &'static str {
        match self {
            FrameError::Length { .. } => "frame-length",
            FrameError::TooLong { .. } => "too-long",
            FrameError::BadTag { .. } => "bad-tag",
            FrameError::Exhausted => "exhausted",
        }
    }
}

/// A well-formed message that breaks a rule of the conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misbehaved {
    /// A message that this side may not send, or not now.
    #[error("message {kind:#04x} is not allowed here")]
    Unexpected {
        /// Its number.
        kind: u8,
    },
    /// A session that was not agreed on.
    #[error("session {session} does not exist: sessions 0 to {max_sessions}, exclusive, were agreed")]
    Session {
        /// Its number.
        session: u32,
        /// How many there are.
        max_sessions: u32,
    },
    /// A session stands twice in a step.
    #[error("session {session} stands twice in one step")]
    SessionTwice {
        /// Its number.
        session: u32,
    },
    /// Rows that do not go on where the session stands, or a rewind to a place it has not reached.
    #[error("session {session} stands at position {expected}, not at {position}")]
    Position {
        /// The session.
        session: u32,
        /// Where the message would go on.
        position: u32,
        /// Where the session stands.
        expected: u32,
    },
    /// More positions than a session has.
    #[error("session {session} would reach position {end}, its context holds {n_ctx}")]
    Context {
        /// The session.
        session: u32,
        /// One past the last position asked for.
        end: u64,
        /// The context length agreed on.
        n_ctx: u32,
    },
    /// A step that is not the next one.
    #[error("step {step} came where step {expected} was due")]
    StepId {
        /// Its number.
        step: u32,
        /// The number that was due.
        expected: u32,
    },
    /// A step with too many or too few spans, or an empty one.
    #[error("a step has {spans} spans, 1 to {max_sessions} are allowed, each with a row at least")]
    SpanCount {
        /// How many.
        spans: u32,
        /// The most.
        max_sessions: u32,
    },
    /// A step with another number of rows than its spans have, than was asked, or than was agreed.
    #[error("a step has {rows} rows where {expected} were due")]
    RowCount {
        /// How many.
        rows: u32,
        /// How many should be there, or the most.
        expected: u32,
    },
    /// Token ids where none were agreed on, or too few.
    #[error("a step has {tokens} token ids where {expected} were due")]
    TokenCount {
        /// How many.
        tokens: u32,
        /// How many should be there.
        expected: u32,
    },
    /// Rows in another format than the one agreed on.
    #[error("rows come in format {format:#04x}, which was not agreed on")]
    RowFormat {
        /// The format.
        format: u8,
    },
    /// More steps without an answer than agreed.
    #[error("{steps} steps are under way, {max_in_flight} are allowed")]
    InFlight {
        /// How many, with this one.
        steps: u32,
        /// How many may be.
        max_in_flight: u32,
    },
    /// Values that are infinite or not numbers.
    #[error("{count} of the values received are not finite")]
    NonFinite {
        /// How many.
        count: u32,
    },
    /// File bytes out of order.
    #[error("bytes of item {item} at {offset} came where {expected} was due")]
    PushOrder {
        /// The item's place in the list.
        item: u16,
        /// Where the bytes belong.
        offset: u64,
        /// Where the item stands.
        expected: u64,
    },
    /// A list of files that breaks a rule.
    #[error("the list of files is not sorted, or names a file that does not exist")]
    PushItems,
}

impl Misbehaved {
    /// The rule's name in PROTOCOL.md.
    pub fn rule(&self) -> &'static str {
        match self {
            Misbehaved::Unexpected { .. } => "unexpected",
            Misbehaved::Session { .. } => "session",
            Misbehaved::SessionTwice { .. } => "session-twice",
            Misbehaved::Position { .. } => "position",
            Misbehaved::Context { .. } => "context",
            Misbehaved::StepId { .. } => "step-id",
            Misbehaved::SpanCount { .. } => "span-count",
            Misbehaved::RowCount { .. } | Misbehaved::TokenCount { .. } => "row-count",
            Misbehaved::RowFormat { .. } => "row-format",
            Misbehaved::InFlight { .. } => "in-flight",
            Misbehaved::NonFinite { .. } => "non-finite",
            Misbehaved::PushOrder { .. } => "push-order",
            Misbehaved::PushItems => "push-items",
        }
    }

    /// The code under which the peer is told.
    pub fn code(&self) -> ErrorCode {
        match self {
            Misbehaved::Unexpected { .. } | Misbehaved::PushOrder { .. } | Misbehaved::PushItems => {
                ErrorCode::Unexpected
            }
            Misbehaved::Session { .. }
            | Misbehaved::SessionTwice { .. }
            | Misbehaved::Position { .. }
            | Misbehaved::Context { .. } => ErrorCode::Position,
            Misbehaved::NonFinite { .. } => ErrorCode::NonFinite,
            _ => ErrorCode::Step,
        }
    }
}

/// What was wrong with something received inside a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReceiveError {
    /// The stream of frames is broken.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A message cannot be read.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// A message may not be sent.
    #[error(transparent)]
    Misbehaved(#[from] Misbehaved),
}

impl ReceiveError {
    /// The rule's name in PROTOCOL.md.
    pub fn rule(&self) -> &'static str {
        match self {
            ReceiveError::Frame(e) => e.rule(),
            ReceiveError::Malformed(e) => e.rule(),
            ReceiveError::Misbehaved(e) => e.rule(),
        }
    }

    /// The code under which the peer is told; `None`: it is not told, the connection just closes.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            ReceiveError::Frame(FrameError::TooLong { .. }) | ReceiveError::Malformed(_) => {
                Some(ErrorCode::Malformed)
            }
            ReceiveError::Frame(_) => None,
            ReceiveError::Misbehaved(e) => Some(e.code()),
        }
    }
}

/// Why a handshake failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The first bytes are not this protocol's.
    #[error("the peer does not speak this protocol")]
    BadMagic,
    /// The preamble has a field that makes no sense.
    #[error("the peer's first bytes make no sense")]
    BadPreamble,
    /// The worker's greeting has a field that makes no sense.
    #[error("the worker's first bytes make no sense")]
    BadGreeting,
    /// The worker's answer has a field that makes no sense.
    #[error("the worker's answer makes no sense")]
    BadAnswer,
    /// No version in common.
    #[error(
        "the peer speaks protocol versions {}-{}, this side speaks {}-{}: update the {}",
        theirs.start(), theirs.end(), ours.start(), ours.end(),
        if theirs.end() < ours.start() { "peer" } else { "software on this side" }
    )]
    Version {
        /// What the peer speaks.
        theirs: RangeInclusive<u16>,
        /// What this side speaks.
        ours: RangeInclusive<u16>,
    },
    /// The key is unknown to the worker, or not the one it knows, or the pairing code is wrong.
    #[error("the key or pairing code was not accepted: pair host and worker again")]
    Key,
    /// No pairing is open on the worker.
    #[error("the worker shows no pairing code now: a code is good for 5 minutes and one use")]
    NoPairing,
    /// Too many handshakes at once.
    #[error("the worker is busy with other connections: try again")]
    Crowded,
    /// A Noise message has another length than the pattern gives it.
    #[error("a handshake message is {length} bytes long, {expected} were due")]
    NoiseLength {
        /// Its length.
        length: usize,
        /// The only right one.
        expected: usize,
    },
    /// The peer's ephemeral key leads to the all-zero shared secret.
    #[error("the peer sent a key that would make the encryption worthless")]
    ZeroDh,
    /// The clear answer is not the one that the worker sealed.
    #[error("the worker's answer was changed on its way")]
    AnswerChanged,
    /// The system's random numbers or the Noise library failed.
    #[error("the encryption cannot be set up on this machine: {0}")]
    Crypto(String),
}

impl HandshakeError {
    /// The rule's name in PROTOCOL.md.
    pub fn rule(&self) -> &'static str {
        match self {
            HandshakeError::BadMagic => "bad-magic",
            HandshakeError::BadPreamble => "bad-preamble",
            HandshakeError::BadGreeting => "bad-greeting",
            HandshakeError::BadAnswer => "bad-answer",
            HandshakeError::Version { .. } => "version",
            HandshakeError::Key => "key",
            HandshakeError::NoPairing => "no-pairing",
            HandshakeError::Crowded => "crowded",
            HandshakeError::NoiseLength { .. } => "noise-length",
            HandshakeError::ZeroDh => "zero-dh",
            HandshakeError::AnswerChanged => "answer-changed",
            HandshakeError::Crypto(_) => "crypto",
        }
    }
}
