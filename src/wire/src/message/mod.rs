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

#![deny(clippy::cast_possible_truncation)]

mod failed;
mod push;
mod status;
mod step;

pub use dim_core::stage::Span;

pub use crate::fault::{ErrorCode, Farewell, Fault};
pub use crate::layout::{
    HEADER, MAX_ARCH, MAX_ITEMS, MAX_NAME, MAX_PARTS, MAX_PUSH_DATA, MAX_TEXT, NONE, SPAN, STEP, STEP_DONE,
};
pub use failed::StepFailed;
pub use push::{Item, ItemKind, PushOffer, PushOutcome, encode_push_data_head};
pub use status::{Activity, Status, Temperature};
pub use step::{DoneHead, Step, StepDone, encode_step_done_head, encode_step_head, span_bytes};

use crate::codec::{Malformed, Reader, Writer};
use crate::keys::Key;
use crate::rows::{self, Shape};
use crate::terms::{Reason, Terms};

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
    /// Host: measure yourself. To come.
    Probe = 0x07,
    /// Host, pairing: name, software.
    PairRequest = 0x08,
    /// Worker, pairing: 32-byte key, name, software.
    PairGrant = 0x09,
    /// Host, pairing: it has stored the key. Nothing.
    PairStored = 0x0A,
    /// Worker: what it measured. To come.
    Probed = 0x0B,
    /// Host: evaluate. `a` = row format, `b` = number of spans; u32 step, u32 n_rows, spans, token ids, rows.
    Step = 0x10,
    /// Worker: evaluated. `a` = row format; u32 step, u32 n_rows, u32 compute us, u32 wait us, u64 began us, rows.
    StepDone = 0x11,
    /// Host: forget a session's end. u32 session, u32 position.
    Rewind = 0x12,
    /// Host: forget a session. u32 session, u32 zero.
    EndSession = 0x13,
    /// Worker: not evaluated. `a` = 1: called off, `b` = code; u32 step, u32 session, u32 block, u32 count, text.
    StepFailed = 0x14,
    /// Host: a step need not be evaluated. u32 step, u32 zero.
    Cancel = 0x15,
    /// Either side, when it has been silent. See [`Status`].
    Heartbeat = 0x20,
    /// Either side: answer this. u64 clock us.
    Ping = 0x21,
    /// Either side: the answer. The same u64, u64 clock us.
    Pong = 0x22,
    /// Either side's last message. `b` = code; u32 step, u32 session, u32 block, u32 count, text.
    Error = 0x23,
    /// Either side's last message. `b` = why. Nothing.
    Goodbye = 0x24,
    /// Host: nothing but that it is there, while a reply runs. To come.
    Tick = 0x25,
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
    pub const ALL: [Kind; 28] = {
        use Kind::*;
        [
            Hello,
            Accept,
            Refuse,
            Busy,
            Inquire,
            Offer,
            Probe,
            PairRequest,
            PairGrant,
            PairStored,
            Probed,
            Step,
            StepDone,
            Rewind,
            EndSession,
            StepFailed,
            Cancel,
            Heartbeat,
            Ping,
            Pong,
            Error,
            Goodbye,
            Tick,
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

/// One message, decoded. Rows and file bytes are borrowed; everything else is small and owned.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Message<'a> {
    Hello(Terms),
    Accept(Terms),
    Refuse {
        reason: Reason,
        terms: Terms,
        text: String,
    },
    Busy {
        since_ms: u64,
        name: String,
    },
    Inquire,
    Offer(Terms),
    PairRequest {
        name: String,
        software: String,
    },
    PairGrant {
        key: Key,
        name: String,
        software: String,
    },
    PairStored,
    Step(Step<'a>),
    StepDone(StepDone<'a>),
    Rewind {
        session: u32,
        position: u32,
    },
    EndSession {
        session: u32,
    },
    StepFailed(StepFailed),
    Cancel {
        step: u32,
    },
    Heartbeat(Status),
    /// the sender's clock, in microseconds
    Ping(u64),
    /// the number of the PING, and the clock of who answers it
    Pong {
        number: u64,
        clock_us: u64,
    },
    Error(Fault),
    Goodbye(Farewell),
    PushOffer(PushOffer),
    PushNeed(Vec<u64>),
    PushData {
        item: u16,
        offset: u64,
        bytes: &'a [u8],
    },
    PushStored {
        item: u16,
        bytes: u64,
    },
    PushResult {
        outcome: PushOutcome,
        item: Option<u16>,
        text: String,
    },
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
            Message::StepFailed(_) => Kind::StepFailed,
            Message::Cancel { .. } => Kind::Cancel,
            Message::Heartbeat(_) => Kind::Heartbeat,
            Message::Ping(_) => Kind::Ping,
            Message::Pong { .. } => Kind::Pong,
            Message::Error(_) => Kind::Error,
            Message::Goodbye(_) => Kind::Goodbye,
            Message::PushOffer(_) => Kind::PushOffer,
            Message::PushNeed(_) => Kind::PushNeed,
            Message::PushData { .. } => Kind::PushData,
            Message::PushStored { .. } => Kind::PushStored,
            Message::PushResult { .. } => Kind::PushResult,
        }
    }

    /// Reads a whole message. `shape` is what rows are made of, as agreed on; nothing else of the agreement is checked
    /// here.
    ///
    /// # Errors
    /// The rule of layout that the bytes break.
    pub fn decode(bytes: &'a [u8], shape: &Shape) -> Result<Message<'a>, Malformed> {
        let mut r = Reader::new(bytes);
        let (kind, a, b) = decode_header(&mut r, bytes.len())?;
        let message = match kind {
            Kind::Step => Message::Step(Step::decode(&mut r, a, b, shape)?),
            Kind::StepDone => Message::StepDone(StepDone::decode(&mut r, a, shape)?),
            Kind::Rewind => Message::Rewind { session: r.u32()?, position: r.u32()? },
            Kind::EndSession => {
                let session = r.u32()?;
                r.zeros(4)?;
                Message::EndSession { session }
            }
            Kind::StepFailed => Message::StepFailed(StepFailed::decode(&mut r, a, b)?),
            Kind::Cancel => {
                let step = r.u32()?;
                r.zeros(4)?;
                Message::Cancel { step }
            }
            Kind::Heartbeat => Message::Heartbeat(Status::decode(&mut r)?),
            Kind::Ping => Message::Ping(r.u64()?),
            Kind::Pong => Message::Pong { number: r.u64()?, clock_us: r.u64()? },
            Kind::Error => Message::Error(Fault::decode(&mut r, b)?),
            Kind::Goodbye => Message::Goodbye(Farewell::from_u16(b)?),
            Kind::PushOffer | Kind::PushNeed | Kind::PushData | Kind::PushStored | Kind::PushResult => {
                decode_push(&mut r, kind, a, b)?
            }
            _ => decode_opening(&mut r, kind, b)?,
        };
        r.finish()?;
        Ok(message)
    }

    /// Appends the message's bytes. Texts that are too long are cut.
    ///
    /// # Panics
    /// If it is a message of rows or of file bytes that is longer than 4 GiB.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        let (a, b) = self.header_fields();
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
                w.bytes(key.bytes()).string(name, MAX_NAME).string(software, MAX_NAME);
            }
            Message::Step(step) => step.encode(&mut w),
            Message::StepDone(done) => done.encode(&mut w),
            Message::Rewind { session, position } => {
                w.u32(*session).u32(*position);
            }
            Message::EndSession { session } => {
                w.u32(*session).zeros(4);
            }
            Message::StepFailed(failed) => failed.encode(&mut w),
            Message::Cancel { step } => {
                w.u32(*step).zeros(4);
            }
            Message::Heartbeat(status) => status.encode(&mut w),
            Message::Ping(clock_us) => {
                w.u64(*clock_us);
            }
            Message::Pong { number, clock_us } => {
                w.u64(*number).u64(*clock_us);
            }
            Message::Error(fault) => fault.encode(&mut w),
            Message::PushOffer(offer) => offer.encode(&mut w),
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
        let length = u32::try_from(out.len() - start).expect("a message is shorter than 4 GiB");
        out[start + 4..start + 8].copy_from_slice(&length.to_le_bytes());
    }

    /// `a` and `b` of the header.
    fn header_fields(&self) -> (u8, u16) {
        // counts that are longer than their field are refused by whoever reads them: nothing here makes such
        let count = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        match self {
            Message::Refuse { reason, .. } => (0, *reason as u16),
            Message::Step(s) => (s.format(), count(s.n_spans())),
            Message::StepDone(s) => (rows::number(s.row_type), 0),
            Message::StepFailed(failed) => failed.header_fields(),
            Message::Error(fault) => (0, fault.code as u16),
            Message::Goodbye(why) => (0, *why as u16),
            Message::PushOffer(offer) => (0, count(offer.items.len())),
            Message::PushNeed(have) => (0, count(have.len())),
            Message::PushData { item, .. } | Message::PushStored { item, .. } => (0, *item),
            Message::PushResult { outcome, item, .. } => (*outcome as u8, item.unwrap_or(u16::MAX)),
            _ => (0, 0),
        }
    }
}

/// Kind, `a` and `b` of a message of `length` bytes, whose own length must be the same.
fn decode_header(r: &mut Reader<'_>, length: usize) -> Result<(Kind, u8, u16), Malformed> {
    let kind = Kind::from_u8(r.u8()?)?;
    let (a, b) = (r.u8()?, r.u16()?);
    let said = r.u32()? as usize;
    if said > length {
        return Err(Malformed::Truncated { missing: said - length });
    }
    if said < length {
        return Err(Malformed::TrailingBytes { extra: length - said });
    }
    let uses_a = matches!(kind, Kind::Step | Kind::StepDone | Kind::StepFailed | Kind::PushResult);
    let uses_b = matches!(
        kind,
        Kind::Step
            | Kind::StepFailed
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
    Ok((kind, a, b))
}

/// What is said before anything is agreed on.
fn decode_opening<'a>(r: &mut Reader<'a>, kind: Kind, b: u16) -> Result<Message<'a>, Malformed> {
    Ok(match kind {
        Kind::Hello => Message::Hello(Terms::decode(r)?),
        Kind::Accept => Message::Accept(Terms::decode(r)?),
        Kind::Offer => Message::Offer(Terms::decode(r)?),
        Kind::Refuse => Message::Refuse {
            reason: Reason::from_u16(b).ok_or(Malformed::BadValue { field: "reason", value: b.into() })?,
            terms: Terms::decode(r)?,
            text: r.string(MAX_TEXT)?,
        },
        Kind::Busy => Message::Busy { since_ms: r.u64()?, name: r.string(MAX_NAME)? },
        Kind::Inquire => Message::Inquire,
        Kind::PairRequest => {
            Message::PairRequest { name: r.string(MAX_NAME)?, software: r.string(MAX_NAME)? }
        }
        Kind::PairGrant => Message::PairGrant {
            key: Key::from_bytes(r.array()?),
            name: r.string(MAX_NAME)?,
            software: r.string(MAX_NAME)?,
        },
        Kind::PairStored => Message::PairStored,
        other => return Err(Malformed::UnknownKind { kind: other as u8 }),
    })
}

fn decode_push<'a>(r: &mut Reader<'a>, kind: Kind, a: u8, b: u16) -> Result<Message<'a>, Malformed> {
    Ok(match kind {
        Kind::PushOffer => Message::PushOffer(PushOffer::decode(r, b)?),
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
            outcome: PushOutcome::from_u8(a)?,
            item: (b != u16::MAX).then_some(b),
            text: r.string(MAX_TEXT)?,
        },
        other => return Err(Malformed::UnknownKind { kind: other as u8 }),
    })
}
