//! The messages: one table of numbers, and the layout of each.
//!
//! ```text
//!     0       1       2       3       4       5       6       7
//!     | kind  | a     | b             | length of the whole message   |
//! ```
//!
//! [`Message::decode`] reads any message but the two that carry hidden rows without looking at the state of
//! the connection; for STEP and STEP_DONE it needs the agreed shape, because their length follows from it.
//! [`super::connection`] decides which message may come when.

pub use dim_core::stage::Span;

use super::codec::{Reader, Writer};
use super::error::Malformed;
use super::rows::{EXPONENTS, RowsRef};
use super::terms::{Reason, Terms};

/// The size of the header that every message begins with: kind + a + b + length.
pub const HEADER: usize = 1 + 1 + 2 + 4;
/// The size of a [`Span`] on the wire: session + position + count + zero.
pub const SPAN: usize = 4 + 4 + 4 + 4;
/// The size of a STEP up to its spans: header + step id + n_rows.
pub const STEP: usize = HEADER + 4 + 4;
/// The size of a STEP_DONE up to its rows: header + step id + n_rows + compute time + waiting time.
pub const STEP_DONE: usize = HEADER + 4 + 4 + 4 + 4;
/// The most bytes a string naming a device, a person's choice or a program has.
pub const MAX_NAME: usize = 64;
/// The most bytes the name of an architecture has.
pub const MAX_ARCH: usize = 32;
/// The most bytes a sentence for the user has.
pub const MAX_TEXT: usize = 1000;
/// The most files a push has.
pub const MAX_ITEMS: usize = 64;
/// The most bytes of a file in one PUSH_DATA.
pub const MAX_PUSH_DATA: usize = 262_144;
/// "None" in a field that holds a session or a block.
pub const NONE: u32 = u32::MAX;

const _: () = assert!(STEP == 16 && STEP_DONE == 24 && SPAN == 16, "PROTOCOL.md, sections 5.3 and 5.4");
const _: () = assert!((STEP | SPAN | STEP_DONE).is_multiple_of(8), "rows begin at a multiple of 8");

/// The numbers of the messages. A retired number would stay here, never to be used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Host: what it expects and needs. Terms.
    Hello = 0x01,
    /// Worker: agreed. Terms.
    Accept = 0x02,
    /// Either side: not agreed. `b` = reason; terms, text.
    Refuse = 0x03,
    /// Worker: it serves another host. u64 for how long in ms, host's name.
    Busy = 0x04,
    /// Host: what do you hold? Nothing.
    Inquire = 0x05,
    /// Worker: this. Terms.
    Offer = 0x06,
    /// Host, pairing: name, software.
    PairRequest = 0x08,
    /// Worker, pairing: 32-byte key, name, software.
    PairGrant = 0x09,
    /// Host, pairing: it has stored the key. Nothing.
    PairStored = 0x0A,
    /// Host: evaluate. `a` = row format, `b` = number of spans; u32 step, u32 n_rows, spans, exponents,
    /// hidden.
    Step = 0x10,
    /// Worker: evaluated. `a` = row format; u32 step, u32 n_rows, u32 compute us, u32 wait us, exponents,
    /// hidden.
    StepDone = 0x11,
    /// Host: forget a session's end. u32 session, u32 position.
    Rewind = 0x12,
    /// Host: forget a session. u32 session, u32 zero.
    EndSession = 0x13,
    /// Either side, when it has been silent. See [`Status`].
    Heartbeat = 0x20,
    /// Either side: answer this. u64.
    Ping = 0x21,
    /// Either side: the answer. The same u64.
    Pong = 0x22,
    /// Either side's last message. `b` = code; u32 step, u32 session, u32 block, u32 count, text.
    Error = 0x23,
    /// Either side's last message. `b` = why. Nothing.
    Goodbye = 0x24,
    /// Host: files to store. `b` = items; 32-byte model, 32-byte slice, u32 first, u32 last, items, name.
    PushOffer = 0x30,
    /// Worker: what it has of them. `b` = items; u64 each.
    PushNeed = 0x31,
    /// Host: bytes of a file. `b` = item; u64 offset, the bytes.
    PushData = 0x32,
    /// Worker: stored so far. `b` = item; u64 bytes, u64 zero.
    PushStored = 0x33,
    /// Worker: the end. `a` = outcome, `b` = item; text.
    PushResult = 0x34,
}

impl Kind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [Kind; 23] = {
        use Kind::*;
        [
            Hello,
            Accept,
            Refuse,
            Busy,
            Inquire,
            Offer,
            PairRequest,
            PairGrant,
            PairStored,
            Step,
            StepDone,
            Rewind,
            EndSession,
            Heartbeat,
            Ping,
            Pong,
            Error,
            Goodbye,
            PushOffer,
            PushNeed,
            PushData,
            PushStored,
            PushResult,
        ]
    };

    /// The kind with this number.
    pub fn from_u8(kind: u8) -> Result<Kind, Malformed> {
        Kind::ALL.into_iter().find(|&k| k as u8 == kind).ok_or(Malformed::UnknownKind { kind })
    }
}

/// The number format of hidden rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DType {
    /// IEEE half precision, the default.
    F16 = 1,
    /// IEEE single precision, for bit-exact runs.
    F32 = 2,
    /// The upper half of an F32.
    Bf16 = 3,
}

impl DType {
    /// Bytes per value.
    pub fn width(self) -> usize {
        match self {
            DType::F16 | DType::Bf16 => 2,
            DType::F32 => 4,
        }
    }

    /// This format's bit in a set of formats.
    pub fn bit(self) -> u8 {
        1 << (self as u8 - 1)
    }

    /// The format of a set that has exactly one.
    pub fn from_single_bit(bits: u8) -> Option<DType> {
        [DType::F16, DType::F32, DType::Bf16].into_iter().find(|d| d.bit() == bits)
    }
}

/// The format of a message's rows: a number format, and whether rows are scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowFormat {
    /// The number format.
    pub dtype: DType,
    /// Each row has an exponent.
    pub scaled: bool,
}

impl RowFormat {
    const SCALED: u8 = 0x80;

    /// The byte `a` of STEP and STEP_DONE.
    pub fn to_u8(self) -> u8 {
        self.dtype as u8 | if self.scaled { RowFormat::SCALED } else { 0 }
    }

    /// The format that a byte stands for.
    pub fn from_u8(byte: u8) -> Result<RowFormat, Malformed> {
        let dtype = match byte & !RowFormat::SCALED {
            1 => DType::F16,
            2 => DType::F32,
            3 => DType::Bf16,
            _ => return Err(Malformed::BadValue { field: "row format", value: byte.into() }),
        };
        Ok(RowFormat { dtype, scaled: byte & RowFormat::SCALED != 0 })
    }

    /// Bytes of the exponents of `n_rows` rows, with their padding.
    pub fn exponent_bytes(self, n_rows: usize) -> usize {
        if self.scaled { n_rows.next_multiple_of(8) } else { 0 }
    }
}

/// A span as it is on the wire.
pub fn span_bytes(span: Span) -> [u8; SPAN] {
    let mut bytes = [0; SPAN];
    bytes[..4].copy_from_slice(&span.session.to_le_bytes());
    bytes[4..8].copy_from_slice(&span.position.to_le_bytes());
    bytes[8..12].copy_from_slice(&span.count.to_le_bytes());
    bytes
}

/// Rows to evaluate, borrowed from the receive buffer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step<'a> {
    /// Its number: 1, 2, 3, ... on a connection.
    pub step: u32,
    /// How many rows.
    pub n_rows: u32,
    /// Their format.
    pub format: RowFormat,
    /// The spans as they are on the wire: [`Step::spans`] reads them.
    spans: &'a [u8],
    /// One exponent a row; empty if not scaled.
    pub exponents: &'a [i8],
    /// The values' bytes, `(n_rows, n_embd)`.
    pub hidden: &'a [u8],
}

impl<'a> Step<'a> {
    /// How many spans.
    pub fn n_spans(&self) -> usize {
        self.spans.len() / SPAN
    }

    /// The spans. Their reserved bytes have been checked.
    pub fn spans(&self) -> impl ExactSizeIterator<Item = Span> + Clone + 'a {
        let word = |b: &[u8], at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        self.spans.chunks_exact(SPAN).map(move |b| Span {
            session: word(b, 0),
            position: word(b, 4),
            count: word(b, 8),
        })
    }
}

/// Evaluated rows, borrowed from the receive buffer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepDone<'a> {
    /// The step they answer.
    pub step: u32,
    /// How many rows.
    pub n_rows: u32,
    /// Their format.
    pub format: RowFormat,
    /// How long the worker computed, in microseconds, saturating.
    pub compute_us: u32,
    /// How long the step lay there before, in microseconds, saturating.
    pub wait_us: u32,
    /// One exponent a row; empty if not scaled.
    pub exponents: &'a [i8],
    /// The values' bytes, `(n_rows, n_embd)`.
    pub hidden: &'a [u8],
}

/// How a device is, sent with every heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// What it is doing.
    pub activity: Activity,
    /// How hot it is.
    pub temperature: Temperature,
    /// Battery in per cent.
    pub battery_percent: Option<u8>,
    /// Memory it may still take, in MiB.
    pub free_mib: Option<u32>,
    /// The last step it finished, 0: none.
    pub step: u32,
}

impl Default for Status {
    fn default() -> Status {
        Status {
            activity: Activity::Idle,
            temperature: Temperature::Unknown,
            battery_percent: None,
            free_mib: None,
            step: 0,
        }
    }
}

/// What a device is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Activity {
    Idle = 0,
    Computing = 1,
    Loading = 2,
    AboutToPause = 3,
}

/// How hot a device is, in the words of Apple's `ProcessInfo.ThermalState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Temperature {
    Unknown = 0,
    Nominal = 1,
    Fair = 2,
    Serious = 3,
    Critical = 4,
}

/// Codes of ERROR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum ErrorCode {
    /// A message that cannot be read.
    Malformed = 1,
    /// A message that is not allowed.
    Unexpected = 2,
    /// A session or position that does not fit.
    Position = 3,
    /// A step that breaks a rule.
    Step = 4,
    /// Values that are not finite.
    NonFinite = 5,
    /// Values too large for the row format.
    Overflow = 6,
    /// The engine failed.
    Compute = 7,
    /// Out of memory.
    NoMemory = 8,
    /// Too hot.
    TooHot = 9,
    /// The stage failed its own test.
    SelfTest = 10,
    /// Anything else, and every code this software does not know.
    Internal = 11,
    /// The peer took too long.
    Deadline = 12,
}

impl ErrorCode {
    /// The code for a number; unknown ones are [`Internal`](ErrorCode::Internal).
    pub fn from_u16(code: u16) -> ErrorCode {
        use ErrorCode::*;
        [
            Malformed, Unexpected, Position, Step, NonFinite, Overflow, Compute, NoMemory, TooHot, SelfTest,
            Internal, Deadline,
        ]
        .into_iter()
        .find(|&c| c as u16 == code)
        .unwrap_or(Internal)
    }
}

/// A fault as one side tells it to the other. It is the last thing that side says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.sentence())]
pub struct Fault {
    /// What kind of fault.
    pub code: ErrorCode,
    /// The step it is about.
    pub step: Option<u32>,
    /// The session it is about.
    pub session: Option<u32>,
    /// The block in which it was seen.
    pub block: Option<u32>,
    /// How many values were not finite or too large.
    pub count: u32,
    /// A sentence for the user.
    pub text: String,
}

impl Fault {
    /// A fault that is about no step, session or block.
    pub fn new(code: ErrorCode, text: impl Into<String>) -> Fault {
        Fault { code, step: None, session: None, block: None, count: 0, text: text.into() }
    }

    fn sentence(&self) -> String {
        let place = self.block.map(|b| format!("block {b}: ")).unwrap_or_default();
        let way_out = match self.code {
            ErrorCode::NonFinite | ErrorCode::Overflow => "; try --wire f32",
            ErrorCode::NoMemory => {
                "; it is out of memory: close other apps there, or take a smaller --ctx or fewer blocks"
            }
            ErrorCode::TooHot => "; take it out of its case and off the charger",
            ErrorCode::SelfTest => {
                "; it computes wrong values with this slice: cut it anew with dim-split and push it again"
            }
            _ => "",
        };
        format!("{place}{}{way_out}", self.text)
    }
}

/// Why a side says goodbye.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Farewell {
    /// It is finished.
    Finished = 0,
    /// It shuts down.
    ShuttingDown = 1,
    /// The phone is locked or the app left the foreground.
    Pausing = 2,
    /// The same host opened a newer connection.
    Replaced = 3,
}

/// Which file of a slice's directory an item of a push is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum ItemKind {
    Manifest = 1,
    PackageManifest = 2,
    PackageModel = 3,
    PackageWeights = 4,
    SelfTest = 5,
    GgufSlice = 16,
}

/// A file of a push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// Which file.
    pub kind: ItemKind,
    /// Of which package.
    pub index: u8,
    /// Its size in bytes, at least 1, at most 2^40.
    pub size: u64,
    /// Its SHA-256.
    pub sha256: [u8; 32],
}

/// A list of files to store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushOffer {
    /// Identity of the model that the slice is from.
    pub model: [u8; 32],
    /// Identity of the slice.
    pub slice: [u8; 32],
    /// First block of the slice.
    pub first_block: u32,
    /// Last block of the slice, inclusive.
    pub last_block: u32,
    /// The files, sorted by kind and index.
    pub items: Vec<Item>,
    /// The host's name.
    pub name: String,
}

impl PushOffer {
    /// What the worker knows this push by, from one connection to the next.
    pub fn id(&self) -> [u8; 32] {
        let mut message = Vec::new();
        Message::PushOffer(self.clone()).encode(&mut message);
        let items_end = HEADER + 32 + 32 + 4 + 4 + ITEM * self.items.len();
        use sha2::Digest;
        sha2::Sha256::digest(&message[HEADER..items_end]).into()
    }

    /// Whether the list keeps the rules of section 9.
    pub fn is_valid(&self) -> bool {
        let place = |i: &Item| (i.kind, i.index);
        (1..=MAX_ITEMS).contains(&self.items.len())
            && self.items.windows(2).all(|w| place(&w[0]) < place(&w[1]))
            && self.items.iter().all(|i| (1..=1 << 40).contains(&i.size))
    }
}

/// The size of an [`Item`] on the wire: kind + index + zeros + size + SHA-256.
const ITEM: usize = 1 + 1 + 6 + 8 + 32;

/// How a push, or an item of it, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PushOutcome {
    /// Complete and verified.
    Stored = 0,
    /// The bytes are not those of the offer; they have been dropped.
    HashDiffers = 1,
    /// The worker could not store them.
    StoringFailed = 2,
}

/// One message, decoded. Rows and file bytes are borrowed; everything else is small and owned.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Message<'a> {
    Hello(Terms),
    Accept(Terms),
    Refuse { reason: Reason, terms: Terms, text: String },
    Busy { since_ms: u64, name: String },
    Inquire,
    Offer(Terms),
    PairRequest { name: String, software: String },
    PairGrant { key: [u8; 32], name: String, software: String },
    PairStored,
    Step(Step<'a>),
    StepDone(StepDone<'a>),
    Rewind { session: u32, position: u32 },
    EndSession { session: u32 },
    Heartbeat(Status),
    Ping(u64),
    Pong(u64),
    Error(Fault),
    Goodbye(Farewell),
    PushOffer(PushOffer),
    PushNeed(Vec<u64>),
    PushData { item: u16, offset: u64, bytes: &'a [u8] },
    PushStored { item: u16, bytes: u64 },
    PushResult { outcome: PushOutcome, item: Option<u16>, text: String },
}

impl<'a> Message<'a> {
    /// The message's number.
    pub fn kind(&self) -> Kind {
        match self {
            Message::Hello(_) => Kind::Hello,
            Message::Accept(_) => Kind::Accept,
            Message::Refuse { .. } => Kind::Refuse,
            Message::Busy { .. } => Kind::Busy,
            Message::Inquire => Kind::Inquire,
            Message::Offer(_) => Kind::Offer,
            Message::PairRequest { .. } => Kind::PairRequest,
            Message::PairGrant { .. } => Kind::PairGrant,
            Message::PairStored => Kind::PairStored,
            Message::Step(_) => Kind::Step,
            Message::StepDone(_) => Kind::StepDone,
            Message::Rewind { .. } => Kind::Rewind,
            Message::EndSession { .. } => Kind::EndSession,
            Message::Heartbeat(_) => Kind::Heartbeat,
            Message::Ping(_) => Kind::Ping,
            Message::Pong(_) => Kind::Pong,
            Message::Error(_) => Kind::Error,
            Message::Goodbye(_) => Kind::Goodbye,
            Message::PushOffer(_) => Kind::PushOffer,
            Message::PushNeed(_) => Kind::PushNeed,
            Message::PushData { .. } => Kind::PushData,
            Message::PushStored { .. } => Kind::PushStored,
            Message::PushResult { .. } => Kind::PushResult,
        }
    }

    /// Reads a whole message. `n_embd` is the row length agreed on; nothing else of the agreement is checked
    /// here.
    pub fn decode(bytes: &'a [u8], n_embd: u32) -> Result<Message<'a>, Malformed> {
        let mut r = Reader::new(bytes);
        let kind = Kind::from_u8(r.u8()?)?;
        let a = r.u8()?;
        let b = r.u16()?;
        let length = r.u32()? as usize;
        if length > bytes.len() {
            return Err(Malformed::Truncated { missing: length - bytes.len() });
        }
        if length < bytes.len() {
            return Err(Malformed::TrailingBytes { extra: bytes.len() - length });
        }
        let uses_a = matches!(kind, Kind::Step | Kind::StepDone | Kind::PushResult);
        let uses_b = matches!(
            kind,
            Kind::Step
                | Kind::Refuse
                | Kind::Error
                | Kind::Goodbye
                | Kind::PushOffer
                | Kind::PushNeed
                | Kind::PushData
                | Kind::PushStored
                | Kind::PushResult
        );
        if (a != 0 && !uses_a) || (b != 0 && !uses_b) {
            return Err(Malformed::ReservedNotZero);
        }

        let message = match kind {
            Kind::Hello => Message::Hello(Terms::decode(&mut r)?),
            Kind::Accept => Message::Accept(Terms::decode(&mut r)?),
            Kind::Offer => Message::Offer(Terms::decode(&mut r)?),
            Kind::Refuse => Message::Refuse {
                reason: Reason::from_u16(b)
                    .ok_or(Malformed::BadValue { field: "reason", value: b.into() })?,
                terms: Terms::decode(&mut r)?,
                text: r.string(MAX_TEXT)?,
            },
            Kind::Busy => Message::Busy { since_ms: r.u64()?, name: r.string(MAX_NAME)? },
            Kind::Inquire => Message::Inquire,
            Kind::PairRequest => {
                Message::PairRequest { name: r.string(MAX_NAME)?, software: r.string(MAX_NAME)? }
            }
            Kind::PairGrant => Message::PairGrant {
                key: r.array()?,
                name: r.string(MAX_NAME)?,
                software: r.string(MAX_NAME)?,
            },
            Kind::PairStored => Message::PairStored,
            Kind::Step => Message::Step(decode_step(&mut r, a, b, n_embd)?),
            Kind::StepDone => Message::StepDone(decode_step_done(&mut r, a, n_embd)?),
            Kind::Rewind => Message::Rewind { session: r.u32()?, position: r.u32()? },
            Kind::EndSession => {
                let session = r.u32()?;
                r.zeros(4)?;
                Message::EndSession { session }
            }
            Kind::Heartbeat => Message::Heartbeat(decode_status(&mut r)?),
            Kind::Ping => Message::Ping(r.u64()?),
            Kind::Pong => Message::Pong(r.u64()?),
            Kind::Error => decode_fault(&mut r, b)?,
            Kind::Goodbye => Message::Goodbye(match b {
                0 => Farewell::Finished,
                1 => Farewell::ShuttingDown,
                2 => Farewell::Pausing,
                3 => Farewell::Replaced,
                _ => return Err(Malformed::BadValue { field: "farewell", value: b.into() }),
            }),
            Kind::PushOffer => Message::PushOffer(decode_push_offer(&mut r, b)?),
            Kind::PushNeed => {
                if !(1..=MAX_ITEMS).contains(&usize::from(b)) {
                    return Err(Malformed::BadValue { field: "items", value: b.into() });
                }
                Message::PushNeed((0..b).map(|_| r.u64()).collect::<Result<_, _>>()?)
            }
            Kind::PushData => {
                let offset = r.u64()?;
                let bytes = r.bytes(r.remaining())?;
                if bytes.is_empty() || bytes.len() > MAX_PUSH_DATA {
                    return Err(Malformed::BadValue { field: "file bytes", value: bytes.len() as u64 });
                }
                Message::PushData { item: b, offset, bytes }
            }
            Kind::PushStored => {
                let bytes = r.u64()?;
                r.zeros(8)?;
                Message::PushStored { item: b, bytes }
            }
            Kind::PushResult => Message::PushResult {
                outcome: match a {
                    0 => PushOutcome::Stored,
                    1 => PushOutcome::HashDiffers,
                    2 => PushOutcome::StoringFailed,
                    _ => return Err(Malformed::BadValue { field: "outcome", value: a.into() }),
                },
                item: (b != u16::MAX).then_some(b),
                text: r.string(MAX_TEXT)?,
            },
        };
        r.finish()?;
        Ok(message)
    }

    /// The message without its borrow. `None` for STEP, STEP_DONE and PUSH_DATA, whose bytes stay where they
    /// are.
    pub fn into_owned(self) -> Option<Message<'static>> {
        Some(match self {
            Message::Step(_) | Message::StepDone(_) | Message::PushData { .. } => return None,
            Message::Hello(terms) => Message::Hello(terms),
            Message::Accept(terms) => Message::Accept(terms),
            Message::Refuse { reason, terms, text } => Message::Refuse { reason, terms, text },
            Message::Busy { since_ms, name } => Message::Busy { since_ms, name },
            Message::Inquire => Message::Inquire,
            Message::Offer(terms) => Message::Offer(terms),
            Message::PairRequest { name, software } => Message::PairRequest { name, software },
            Message::PairGrant { key, name, software } => Message::PairGrant { key, name, software },
            Message::PairStored => Message::PairStored,
            Message::Rewind { session, position } => Message::Rewind { session, position },
            Message::EndSession { session } => Message::EndSession { session },
            Message::Heartbeat(status) => Message::Heartbeat(status),
            Message::Ping(number) => Message::Ping(number),
            Message::Pong(number) => Message::Pong(number),
            Message::Error(fault) => Message::Error(fault),
            Message::Goodbye(why) => Message::Goodbye(why),
            Message::PushOffer(offer) => Message::PushOffer(offer),
            Message::PushNeed(have) => Message::PushNeed(have),
            Message::PushStored { item, bytes } => Message::PushStored { item, bytes },
            Message::PushResult { outcome, item, text } => Message::PushResult { outcome, item, text },
        })
    }

    /// Appends the message's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        let (a, b) = match self {
            Message::Refuse { reason, .. } => (0, *reason as u16),
            Message::Step(s) => (s.format.to_u8(), s.n_spans() as u16),
            Message::StepDone(s) => (s.format.to_u8(), 0),
            Message::Error(fault) => (0, fault.code as u16),
            Message::Goodbye(why) => (0, *why as u16),
            Message::PushOffer(offer) => (0, offer.items.len() as u16),
            Message::PushNeed(have) => (0, have.len() as u16),
            Message::PushData { item, .. } | Message::PushStored { item, .. } => (0, *item),
            Message::PushResult { outcome, item, .. } => (*outcome as u8, item.unwrap_or(u16::MAX)),
            _ => (0, 0),
        };
        let mut w = Writer::new(out);
        w.u8(self.kind() as u8).u8(a).u16(b).u32(0);
        match self {
            Message::Hello(terms) | Message::Accept(terms) | Message::Offer(terms) => terms.encode(&mut w),
            Message::Refuse { terms, text, .. } => {
                terms.encode(&mut w);
                w.string(text, MAX_TEXT);
            }
            Message::Busy { since_ms, name } => {
                w.u64(*since_ms).string(name, MAX_NAME);
            }
            Message::Inquire | Message::PairStored | Message::Goodbye(_) => {}
            Message::PairRequest { name, software } => {
                w.string(name, MAX_NAME).string(software, MAX_NAME);
            }
            Message::PairGrant { key, name, software } => {
                w.bytes(key).string(name, MAX_NAME).string(software, MAX_NAME);
            }
            Message::Step(s) => {
                w.u32(s.step).u32(s.n_rows).bytes(s.spans);
                encode_rows(&mut w, s.format, s.exponents, s.hidden);
            }
            Message::StepDone(s) => {
                w.u32(s.step).u32(s.n_rows).u32(s.compute_us).u32(s.wait_us);
                encode_rows(&mut w, s.format, s.exponents, s.hidden);
            }
            Message::Rewind { session, position } => {
                w.u32(*session).u32(*position);
            }
            Message::EndSession { session } => {
                w.u32(*session).zeros(4);
            }
            Message::Heartbeat(status) => {
                w.u8(status.activity as u8).u8(status.temperature as u8);
                w.u8(status.battery_percent.unwrap_or(255)).zeros(1);
                w.u32(status.free_mib.unwrap_or(NONE)).u32(status.step).zeros(4);
            }
            Message::Ping(number) | Message::Pong(number) => {
                w.u64(*number);
            }
            Message::Error(fault) => {
                w.u32(fault.step.unwrap_or(0)).u32(fault.session.unwrap_or(NONE));
                w.u32(fault.block.unwrap_or(NONE)).u32(fault.count).string(&fault.text, MAX_TEXT);
            }
            Message::PushOffer(offer) => {
                w.bytes(&offer.model).bytes(&offer.slice).u32(offer.first_block).u32(offer.last_block);
                for item in &offer.items {
                    w.u8(item.kind as u8).u8(item.index).zeros(6).u64(item.size).bytes(&item.sha256);
                }
                w.string(&offer.name, MAX_NAME);
            }
            Message::PushNeed(have) => have.iter().for_each(|&h| {
                w.u64(h);
            }),
            Message::PushData { offset, bytes, .. } => {
                w.u64(*offset).bytes(bytes);
            }
            Message::PushStored { bytes, .. } => {
                w.u64(*bytes).zeros(8);
            }
            Message::PushResult { text, .. } => {
                w.string(text, MAX_TEXT);
            }
        }
        let length = (out.len() - start) as u32;
        out[start + 4..start + 8].copy_from_slice(&length.to_le_bytes());
    }
}

/// Appends what comes before the rows' values in a STEP: header, spans, exponents. The values follow as they
/// are.
pub fn encode_step_head(
    out: &mut Vec<u8>,
    step: u32,
    spans: &[Span],
    exponents: &[i8],
    values: &RowsRef<'_>,
) {
    let n_rows: u32 = spans.iter().map(|s| s.count).sum();
    let format = RowFormat { dtype: values.dtype(), scaled: !exponents.is_empty() };
    let length = STEP + SPAN * spans.len() + format.exponent_bytes(exponents.len()) + values.as_bytes().len();
    let mut w = Writer::new(out);
    w.u8(Kind::Step as u8)
        .u8(format.to_u8())
        .u16(spans.len() as u16)
        .u32(length as u32)
        .u32(step)
        .u32(n_rows);
    for span in spans {
        w.bytes(&span_bytes(*span));
    }
    encode_exponents(&mut w, format, exponents);
}

/// Appends what comes before the rows' values in a STEP_DONE. The values follow as they are.
pub fn encode_step_done_head(
    out: &mut Vec<u8>,
    step: u32,
    n_rows: u32,
    compute_us: u32,
    wait_us: u32,
    exponents: &[i8],
    values: &RowsRef<'_>,
) {
    let format = RowFormat { dtype: values.dtype(), scaled: !exponents.is_empty() };
    let length = STEP_DONE + format.exponent_bytes(exponents.len()) + values.as_bytes().len();
    let mut w = Writer::new(out);
    w.u8(Kind::StepDone as u8).u8(format.to_u8()).u16(0).u32(length as u32);
    w.u32(step).u32(n_rows).u32(compute_us).u32(wait_us);
    encode_exponents(&mut w, format, exponents);
}

fn encode_rows(w: &mut Writer<'_>, format: RowFormat, exponents: &[i8], hidden: &[u8]) {
    encode_exponents(w, format, exponents);
    w.bytes(hidden);
}

fn encode_exponents(w: &mut Writer<'_>, format: RowFormat, exponents: &[i8]) {
    w.bytes(bytemuck::cast_slice(exponents)).zeros(format.exponent_bytes(exponents.len()) - exponents.len());
}

fn decode_step<'a>(r: &mut Reader<'a>, a: u8, b: u16, n_embd: u32) -> Result<Step<'a>, Malformed> {
    let format = RowFormat::from_u8(a)?;
    let (step, n_rows) = (r.u32()?, r.u32()?);
    let spans = r.bytes(usize::from(b) * SPAN)?;
    if spans.chunks_exact(SPAN).any(|s| s[12..] != [0; 4]) {
        return Err(Malformed::ReservedNotZero);
    }
    let (exponents, hidden) = decode_rows(r, format, n_rows, n_embd)?;
    Ok(Step { step, n_rows, format, spans, exponents, hidden })
}

fn decode_step_done<'a>(r: &mut Reader<'a>, a: u8, n_embd: u32) -> Result<StepDone<'a>, Malformed> {
    let format = RowFormat::from_u8(a)?;
    let (step, n_rows, compute_us, wait_us) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
    let (exponents, hidden) = decode_rows(r, format, n_rows, n_embd)?;
    Ok(StepDone { step, n_rows, format, compute_us, wait_us, exponents, hidden })
}

fn decode_rows<'a>(
    r: &mut Reader<'a>,
    format: RowFormat,
    n_rows: u32,
    n_embd: u32,
) -> Result<(&'a [i8], &'a [u8]), Malformed> {
    let size = u128::from(n_rows) * u128::from(n_embd) * format.dtype.width() as u128;
    let too_much = Malformed::Truncated { missing: usize::MAX };
    let hidden_bytes = usize::try_from(size).map_err(|_| too_much)?;
    let n_rows = n_rows as usize;
    let padded = r.bytes(format.exponent_bytes(n_rows))?;
    let (exponents, padding) = padded.split_at(if format.scaled { n_rows } else { 0 });
    let exponents: &[i8] = bytemuck::cast_slice(exponents);
    if let Some(&exponent) = exponents.iter().find(|e| !EXPONENTS.contains(e)) {
        return Err(Malformed::RowExponent { exponent });
    }
    if padding.iter().any(|&p| p != 0) {
        return Err(Malformed::ReservedNotZero);
    }
    Ok((exponents, r.bytes(hidden_bytes)?))
}

fn decode_status(r: &mut Reader<'_>) -> Result<Status, Malformed> {
    let bad = |field, value: u8| Malformed::BadValue { field, value: value.into() };
    let activity = match r.u8()? {
        0 => Activity::Idle,
        1 => Activity::Computing,
        2 => Activity::Loading,
        3 => Activity::AboutToPause,
        other => return Err(bad("state", other)),
    };
    let temperature = match r.u8()? {
        0 => Temperature::Unknown,
        1 => Temperature::Nominal,
        2 => Temperature::Fair,
        3 => Temperature::Serious,
        4 => Temperature::Critical,
        other => return Err(bad("temperature", other)),
    };
    let battery_percent = match r.u8()? {
        255 => None,
        percent @ 0..=100 => Some(percent),
        other => return Err(bad("battery", other)),
    };
    r.zeros(1)?;
    let free_mib = Some(r.u32()?).filter(|&m| m != NONE);
    let step = r.u32()?;
    r.zeros(4)?;
    Ok(Status { activity, temperature, battery_percent, free_mib, step })
}

fn decode_fault<'a>(r: &mut Reader<'a>, b: u16) -> Result<Message<'a>, Malformed> {
    let (step, session, block, count) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
    Ok(Message::Error(Fault {
        code: ErrorCode::from_u16(b),
        step: Some(step).filter(|&s| s != 0),
        session: Some(session).filter(|&s| s != NONE),
        block: Some(block).filter(|&b| b != NONE),
        count,
        text: r.string(MAX_TEXT)?,
    }))
}

fn decode_push_offer(r: &mut Reader<'_>, n_items: u16) -> Result<PushOffer, Malformed> {
    if !(1..=MAX_ITEMS).contains(&usize::from(n_items)) {
        return Err(Malformed::BadValue { field: "items", value: n_items.into() });
    }
    let (model, slice, first_block, last_block) = (r.array()?, r.array()?, r.u32()?, r.u32()?);
    let mut items = Vec::with_capacity(usize::from(n_items));
    for _ in 0..n_items {
        let kind = match r.u8()? {
            1 => ItemKind::Manifest,
            2 => ItemKind::PackageManifest,
            3 => ItemKind::PackageModel,
            4 => ItemKind::PackageWeights,
            5 => ItemKind::SelfTest,
            16 => ItemKind::GgufSlice,
            other => return Err(Malformed::BadValue { field: "item kind", value: other.into() }),
        };
        let index = r.u8()?;
        r.zeros(6)?;
        items.push(Item { kind, index, size: r.u64()?, sha256: r.array()? });
    }
    Ok(PushOffer { model, slice, first_block, last_block, items, name: r.string(MAX_NAME)? })
}
