//! The terms of a connection: what a host expects and needs, what a worker holds and can do, and what
//! follows.
//!
//! Both sides have both terms after HELLO and ACCEPT (or REFUSE) and run [`agree`] on them, so both come to
//! the same result and either can tell its user what differs and which side to fix.

use super::codec::{Reader, Writer};
use super::error::Malformed;
use super::message::{DType, HEADER, MAX_ARCH, MAX_NAME, SPAN, STEP, STEP_DONE};

/// Bits of [`Terms::features`].
pub mod features {
    /// Rows may carry a power of two each.
    pub const SCALED_ROWS: u32 = 1;
    /// Files can be pushed to this worker.
    pub const PUSH: u32 = 2;
}

/// The place of a slice in its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum SliceRole {
    None = 0,
    Head = 1,
    Middle = 2,
    Tail = 3,
}

/// Terms, of a host (in HELLO) or of a worker (in ACCEPT, OFFER, REFUSE).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The version chosen in the handshake.
    pub version: u16,
    /// Host: the one row format it will use. Worker: all it can. Bits as of [`DType::bit`].
    pub dtypes: u8,
    /// The slice's place.
    pub role: SliceRole,
    /// See [`features`].
    pub features: u32,
    /// Random, made once by each process.
    pub instance: u64,
    /// The length of a hidden row.
    pub n_embd: u32,
    /// Blocks of the whole model.
    pub n_blocks: u32,
    /// First block of the slice.
    pub first_block: u32,
    /// Last block of the slice, inclusive.
    pub last_block: u32,
    /// Host: positions per session it needs. Worker: the most it can serve.
    pub n_ctx: u32,
    /// The most rows in a step that this side wants or takes.
    pub max_rows: u32,
    /// Host: sessions it needs. Worker: the most it can serve.
    pub max_sessions: u32,
    /// The most steps without an answer that this side wants or takes.
    pub max_in_flight: u32,
    /// Identity of the model.
    pub model: [u8; 32],
    /// Identity of the slice; zeros: not known.
    pub slice: [u8; 32],
    /// Digest of the parameters that are not weights; zeros: not known.
    pub params: [u8; 32],
    /// The architecture's name as in the GGUF.
    pub arch: String,
    /// Program and version.
    pub software: String,
    /// What the user calls this device.
    pub name: String,
}

impl Terms {
    /// Terms that say nothing but who is speaking: of a worker without a slice, or to fill in.
    pub fn blank(version: u16, software: &str, name: &str) -> Terms {
        Terms {
            version,
            dtypes: 0,
            role: SliceRole::None,
            features: 0,
            instance: 0,
            n_embd: 0,
            n_blocks: 0,
            first_block: 0,
            last_block: 0,
            n_ctx: 0,
            max_rows: 0,
            max_sessions: 0,
            max_in_flight: 0,
            model: [0; 32],
            slice: [0; 32],
            params: [0; 32],
            arch: String::new(),
            software: software.to_owned(),
            name: name.to_owned(),
        }
    }

    pub(super) fn decode(r: &mut Reader<'_>) -> Result<Terms, Malformed> {
        let version = r.u16()?;
        let dtypes = r.u8()?;
        if dtypes & !0b111 != 0 {
            return Err(Malformed::BadValue { field: "dtypes", value: dtypes.into() });
        }
        let role = match r.u8()? {
            0 => SliceRole::None,
            1 => SliceRole::Head,
            2 => SliceRole::Middle,
            3 => SliceRole::Tail,
            other => return Err(Malformed::BadValue { field: "role", value: other.into() }),
        };
        Ok(Terms {
            version,
            dtypes,
            role,
            features: r.u32()?,
            instance: r.u64()?,
            n_embd: r.u32()?,
            n_blocks: r.u32()?,
            first_block: r.u32()?,
            last_block: r.u32()?,
            n_ctx: r.u32()?,
            max_rows: r.u32()?,
            max_sessions: r.u32()?,
            max_in_flight: r.u32()?,
            model: r.array()?,
            slice: r.array()?,
            params: r.array()?,
            arch: r.string(MAX_ARCH)?,
            software: r.string(MAX_NAME)?,
            name: r.string(MAX_NAME)?,
        })
    }

    pub(super) fn encode(&self, w: &mut Writer<'_>) {
        w.u16(self.version).u8(self.dtypes).u8(self.role as u8).u32(self.features).u64(self.instance);
        w.u32(self.n_embd).u32(self.n_blocks).u32(self.first_block).u32(self.last_block);
        w.u32(self.n_ctx).u32(self.max_rows).u32(self.max_sessions).u32(self.max_in_flight);
        w.bytes(&self.model).bytes(&self.slice).bytes(&self.params);
        w.string(&self.arch, MAX_ARCH).string(&self.software, MAX_NAME).string(&self.name, MAX_NAME);
    }
}

/// Why a side refuses. The numbers up to 16 are also the order of comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
#[allow(missing_docs)]
pub enum Reason {
    Version = 1,
    NoSlice = 2,
    Arch = 3,
    Model = 4,
    Params = 5,
    NBlocks = 6,
    NEmbd = 7,
    Role = 8,
    Blocks = 9,
    Slice = 10,
    DType = 11,
    Context = 12,
    Sessions = 13,
    Rows = 14,
    InFlight = 15,
    TooLarge = 16,
    NotReady = 32,
    Stopping = 33,
    NoMemory = 34,
    NoPush = 35,
    NoSpace = 36,
    PushItems = 37,
}

impl Reason {
    /// Every reason, in the order of their numbers.
    pub const ALL: [Reason; 22] = {
        use Reason::*;
        [
            Version, NoSlice, Arch, Model, Params, NBlocks, NEmbd, Role, Blocks, Slice, DType, Context,
            Sessions, Rows, InFlight, TooLarge, NotReady, Stopping, NoMemory, NoPush, NoSpace, PushItems,
        ]
    };

    /// The reason with this number.
    pub fn from_u16(reason: u16) -> Option<Reason> {
        Reason::ALL.into_iter().find(|&r| r as u16 == reason)
    }

    /// Whether waiting may help.
    pub fn is_temporary(self) -> bool {
        matches!(self, Reason::NotReady | Reason::Stopping)
    }
}

/// One difference between the terms of the two sides.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Mismatch {
    /// What differs.
    pub reason: Reason,
    /// One sentence with both values and the side to fix.
    pub text: String,
}

/// What both sides hold to for the rest of the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The protocol's version.
    pub version: u16,
    /// The row format.
    pub dtype: DType,
    /// Whether rows may be scaled.
    pub scaled_rows: bool,
    /// The length of a row.
    pub n_embd: u32,
    /// First block of the slice.
    pub first_block: u32,
    /// Last block of the slice, inclusive.
    pub last_block: u32,
    /// Positions per session.
    pub n_ctx: u32,
    /// The most rows in a step.
    pub max_rows: u32,
    /// Sessions are numbered below this.
    pub max_sessions: u32,
    /// The most steps without an answer.
    pub max_in_flight: u32,
}

impl Agreed {
    /// Bytes of a row's values.
    pub fn row_bytes(&self) -> usize {
        self.n_embd as usize * self.dtype.width()
    }

    /// The longest message from host to worker.
    pub fn host_limit(&self) -> usize {
        let step = STEP + SPAN * self.max_sessions as usize + self.largest_rows();
        step.max(OPENING_LIMIT)
    }

    /// The longest message from worker to host.
    pub fn worker_limit(&self) -> usize {
        (STEP_DONE + self.largest_rows()).max(OPENING_LIMIT)
    }

    fn largest_rows(&self) -> usize {
        let rows = self.max_rows as usize;
        let exponents = if self.scaled_rows { rows.next_multiple_of(8) } else { 0 };
        exponents + rows * self.row_bytes()
    }
}

/// The longest message before anything is agreed on, and the least limit after.
pub const OPENING_LIMIT: usize = 4096;
const _: () = assert!(OPENING_LIMIT > HEADER);

/// Compares the terms of a host and a worker.
///
/// # Errors
/// Every difference, in the order of [`Reason`]; never an empty list.
pub fn agree(host: &Terms, worker: &Terms) -> Result<Agreed, Vec<Mismatch>> {
    let mut found = Vec::new();
    let mut check = |ok: bool, reason: Reason, text: &dyn Fn() -> String| {
        if !ok {
            found.push(Mismatch { reason, text: text() });
        }
    };
    let both_known = |a: &[u8; 32], b: &[u8; 32]| *a != [0; 32] && *b != [0; 32];
    let (h, w) = (host, worker);

    check(h.version == w.version, Reason::Version, &|| {
        let older = if h.version < w.version { "host" } else { "worker" };
        format!("the host speaks protocol {}, the worker {}: update the {older}", h.version, w.version)
    });
    check(w.role != SliceRole::None, Reason::NoSlice, &|| {
        "the worker holds no slice: start it with one, or push one to it".into()
    });
    check(h.arch == w.arch, Reason::Arch, &|| {
        format!(
            "the host runs a {} model, the worker's slice is of a {} model: give the worker the right slice",
            shown(&h.arch),
            shown(&w.arch)
        )
    });
    check(h.model == w.model && h.model != [0; 32], Reason::Model, &|| {
        format!(
            "the host's slices are of model {}, the worker's of model {}: use slices of one split on both sides",
            short(&h.model),
            short(&w.model)
        )
    });
    check(!both_known(&h.params, &w.params) || h.params == w.params, Reason::Params, &|| {
        "host and worker hold the same weights with other settings (rope, norms, ...): use slices of one split on both sides".into()
    });
    check(h.n_blocks == w.n_blocks, Reason::NBlocks, &|| {
        format!(
            "the host's model has {} blocks, the worker's {}: use slices of one split on both sides",
            h.n_blocks, w.n_blocks
        )
    });
    check(h.n_embd == w.n_embd && h.n_embd > 0, Reason::NEmbd, &|| {
        format!(
            "the host's rows have {} values, the worker's {}: use slices of one split on both sides",
            h.n_embd, w.n_embd
        )
    });
    check(h.role == w.role, Reason::Role, &|| {
        format!(
            "the host needs a {} slice, the worker holds a {} slice: give the worker the right one",
            role(h.role),
            role(w.role)
        )
    });
    check(
        (h.first_block, h.last_block) == (w.first_block, w.last_block)
            && h.first_block <= h.last_block
            && h.last_block < h.n_blocks,
        Reason::Blocks,
        &|| {
            format!(
                "the host needs blocks {}..{}, the worker holds {}..{} (of {}): give the worker the slice that fits the host's, or split anew",
                h.first_block, h.last_block, w.first_block, w.last_block, w.n_blocks
            )
        },
    );
    check(!both_known(&h.slice, &w.slice) || h.slice == w.slice, Reason::Slice, &|| {
        format!(
            "the host expects slice {}, the worker holds {}: copy the slice of this split to the worker",
            short(&h.slice),
            short(&w.slice)
        )
    });
    let dtype = DType::from_single_bit(h.dtypes);
    check(dtype.is_some() && h.dtypes & w.dtypes != 0, Reason::DType, &|| {
        format!(
            "the host wants rows as {}, the worker can {}: choose another --wire on the host",
            dtypes(h.dtypes),
            dtypes(w.dtypes)
        )
    });
    check(h.n_ctx > 0 && h.n_ctx <= w.n_ctx, Reason::Context, &|| {
        format!(
            "the host needs a context of {} positions, the worker has {}: start the host with a smaller --ctx or the worker with a larger one",
            h.n_ctx, w.n_ctx
        )
    });
    check(h.max_sessions > 0 && h.max_sessions <= w.max_sessions, Reason::Sessions, &|| {
        format!(
            "the host needs {} sessions, the worker has {}: ask for fewer, or start the worker with more",
            h.max_sessions, w.max_sessions
        )
    });
    check(h.max_rows > 0 && w.max_rows > 0, Reason::Rows, &|| {
        format!(
            "the host sends {} rows a step, the worker takes {}: both must be at least 1",
            h.max_rows, w.max_rows
        )
    });
    check(h.max_in_flight > 0 && w.max_in_flight > 0, Reason::InFlight, &|| {
        format!(
            "the host sends {} steps ahead, the worker takes {}: both must be at least 1",
            h.max_in_flight, w.max_in_flight
        )
    });

    let agreed = Agreed {
        version: h.version,
        dtype: dtype.unwrap_or(DType::F16),
        scaled_rows: h.features & w.features & features::SCALED_ROWS != 0,
        n_embd: h.n_embd,
        first_block: h.first_block,
        last_block: h.last_block,
        n_ctx: h.n_ctx,
        max_rows: h.max_rows.min(w.max_rows),
        max_sessions: h.max_sessions,
        max_in_flight: h.max_in_flight.min(w.max_in_flight),
    };
    let largest = u128::from(agreed.max_rows) * u128::from(agreed.n_embd) * agreed.dtype.width() as u128
        + if agreed.scaled_rows { u128::from(agreed.max_rows).next_multiple_of(8) } else { 0 }
        + SPAN as u128 * u128::from(agreed.max_sessions)
        + STEP as u128;
    check(largest <= LARGEST_STEP && agreed.max_sessions <= u32::from(u16::MAX), Reason::TooLarge, &|| {
        format!("a step of {} rows would be {largest} bytes: ask for fewer rows a step", agreed.max_rows)
    });
    if found.is_empty() { Ok(agreed) } else { Err(found) }
}

const LARGEST_STEP: u128 = (1 << 31) - 1;

/// The first bytes of an identity, as people compare them.
pub fn short(identity: &[u8; 32]) -> String {
    if *identity == [0; 32] {
        return "(unknown)".to_owned();
    }
    identity[..4].iter().map(|b| format!("{b:02x}")).collect()
}

fn shown(text: &str) -> &str {
    if text.is_empty() { "(nameless)" } else { text }
}

fn role(role: SliceRole) -> &'static str {
    match role {
        SliceRole::None => "(none)",
        SliceRole::Head => "head",
        SliceRole::Middle => "middle",
        SliceRole::Tail => "tail",
    }
}

fn dtypes(bits: u8) -> String {
    let names: Vec<&str> = [(DType::F16, "F16"), (DType::F32, "F32"), (DType::Bf16, "BF16")]
        .into_iter()
        .filter(|(d, _)| bits & d.bit() != 0)
        .map(|(_, name)| name)
        .collect();
    if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
}
