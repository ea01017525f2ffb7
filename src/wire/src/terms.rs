//! The terms of a connection: what a host expects and needs, what a worker holds and can do, and what
//! follows.
//!
//! Both sides have both terms after HELLO and ACCEPT (or REFUSE) and run [`agree`] on them, so both come to
//! the same result and either can tell its user what differs and which side to fix. What the bytes are stands in
//! `terms/coding.rs`.

#![deny(clippy::cast_possible_truncation)]

mod coding;
mod machine;

use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use dim_core::rows::{Layout, RowType};
use dim_core::stage::TakeBack;

pub use crate::layout::OPENING_LIMIT;
use crate::layout::{SPAN, STEP, STEP_DONE};
use crate::rows::{RowTypes, Shape};
pub use machine::{Engine, Machine, Measured, Unit};

/// Bits of [`Terms::features`]. The bit 1 is retired; bits without a meaning are ignored.
pub mod features {
    /// Files can be pushed to this worker.
    pub const PUSH: u32 = 2;
    /// Rows of a step can be evaluated one by one. Reserved: nobody has it yet.
    pub const EXACT: u32 = 4;
    /// The worker can measure itself. Reserved: nobody has it yet.
    pub const PROBE: u32 = 8;
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
    /// Host: the one row format it will use. Worker: all it can.
    pub row_types: RowTypes,
    /// The slice's place.
    pub role: SliceRole,
    /// See [`features`].
    pub features: u32,
    /// Random, made once by each process.
    pub instance: u64,
    /// Blocks of the whole model.
    pub n_blocks: u32,
    /// The blocks of the slice, as this side says them: that there are any, and that the model has them, is checked by
    /// [`agree`]. Without a slice, 0..0.
    pub blocks: BlockRange,
    /// What crosses the cuts. A host that does not know it leaves it empty, and takes the worker's.
    pub shape: Shape,
    /// Digest of what a row to the worker means, if it is known: the same bytes may be other tensors.
    pub input: Option<Sha>,
    /// Digest of what a row from the worker means, if it is known.
    pub output: Option<Sha>,
    /// Host: positions per session it needs. Worker: the most it can serve.
    pub n_ctx: u32,
    /// The most rows in a step that this side wants or takes.
    pub max_rows: u32,
    /// Host: sessions it needs. Worker: the most it can serve.
    pub max_sessions: u32,
    /// The most steps without an answer that this side wants or takes.
    pub max_in_flight: u32,
    /// Host: how much it has to be able to take back of a session; nothing, if it would rather replay. Worker: how much
    /// can be.
    pub take_back: TakeBack,
    /// Worker: what it computes with. Host: nothing.
    pub machine: Machine,
    /// Identity of the model, if this side has one. (In the bytes, zeros stand for a digest that is not known.)
    pub model: Option<Sha>,
    /// Identity of the slice, if it is known.
    pub slice: Option<Sha>,
    /// Digest of the parameters that are not weights, if it is known.
    pub params: Option<Sha>,
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
            row_types: RowTypes::NONE,
            role: SliceRole::None,
            features: 0,
            instance: 0,
            n_blocks: 0,
            blocks: BlockRange { first: 0, last: 0 },
            shape: Shape::default(),
            input: None,
            output: None,
            n_ctx: 0,
            max_rows: 0,
            max_sessions: 0,
            max_in_flight: 0,
            take_back: TakeBack::NOTHING,
            machine: Machine::default(),
            model: None,
            slice: None,
            params: None,
            arch: String::new(),
            software: software.to_owned(),
            name: name.to_owned(),
        }
    }
}

/// Why a side refuses. The numbers up to 17 are also the order of comparison.
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
    Layout = 7,
    Role = 8,
    Blocks = 9,
    Slice = 10,
    DType = 11,
    Context = 12,
    Sessions = 13,
    Rows = 14,
    InFlight = 15,
    TooLarge = 16,
    TakeBack = 17,
    NotReady = 32,
    Stopping = 33,
    NoMemory = 34,
    NoPush = 35,
    NoSpace = 36,
    PushItems = 37,
}

impl Reason {
    /// Every reason, in the order of their numbers.
    pub const ALL: [Reason; 23] = {
        use Reason::*;
        [
            Version, NoSlice, Arch, Model, Params, NBlocks, Layout, Role, Blocks, Slice, DType, Context,
            Sessions, Rows, InFlight, TooLarge, TakeBack, NotReady, Stopping, NoMemory, NoPush, NoSpace,
            PushItems,
        ]
    };

    /// The reason with this number.
    pub fn from_u16(reason: u16) -> Option<Reason> {
        Reason::ALL.into_iter().find(|&r| r as u16 == reason)
    }

    /// Whether it is a difference that both sides see, and not the worker's own reason.
    pub fn is_compared(self) -> bool {
        self <= Reason::TakeBack
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
    pub row_type: RowType,
    /// What rows are made of.
    pub shape: Shape,
    /// The blocks of the slice.
    pub blocks: BlockRange,
    /// Positions per session.
    pub n_ctx: u32,
    /// The most rows in a step.
    pub max_rows: u32,
    /// Sessions are numbered below this.
    pub max_sessions: u32,
    /// The most steps without an answer.
    pub max_in_flight: u32,
    /// What both sides can do: see [`features`].
    pub features: u32,
    /// How much of a session the worker can take back.
    pub take_back: TakeBack,
}

impl Agreed {
    /// Bytes of a row to the worker.
    pub fn input_bytes(&self) -> usize {
        self.shape.input.bytes(self.row_type)
    }

    /// Bytes of a row from the worker.
    pub fn output_bytes(&self) -> usize {
        self.shape.output.bytes(self.row_type)
    }

    /// The longest message from host to worker.
    pub fn host_limit(&self) -> usize {
        usize::try_from(self.step_bytes()).unwrap_or(usize::MAX).max(OPENING_LIMIT)
    }

    /// The longest message from worker to host.
    pub fn worker_limit(&self) -> usize {
        usize::try_from(self.step_done_bytes()).unwrap_or(usize::MAX).max(OPENING_LIMIT)
    }

    /// The longest STEP, of whatever was agreed on: it may be beyond every message.
    fn step_bytes(&self) -> u128 {
        let n_rows = u128::from(self.max_rows);
        // as `layout::token_bytes`
        let tokens = if self.shape.reads_tokens { (4 * n_rows).next_multiple_of(8) } else { 0 };
        let spans = SPAN as u128 * u128::from(self.max_sessions);
        STEP as u128 + spans + tokens + n_rows * self.row_bytes(&self.shape.input)
    }

    /// The longest STEP_DONE, in the same way.
    fn step_done_bytes(&self) -> u128 {
        STEP_DONE as u128 + u128::from(self.max_rows) * self.row_bytes(&self.shape.output)
    }

    fn row_bytes(&self, layout: &Layout) -> u128 {
        let width = self.row_type.width() as u128;
        layout.parts.iter().map(|part| part.width(self.row_type) as u128 * width).sum()
    }
}

/// Compares the terms of a host and a worker.
///
/// # Errors
/// Every difference, in the order of [`Reason`]; never an empty list.
pub fn agree(host: &Terms, worker: &Terms) -> Result<Agreed, Vec<Mismatch>> {
    let mut found = Mismatches(Vec::new());
    found.of_model(host, worker);
    found.of_slice(host, worker);
    let row_type = host.row_types.single();
    found.of_size(host, worker, row_type);

    let agreed = Agreed {
        version: host.version,
        row_type: row_type.unwrap_or(RowType::F16),
        shape: worker.shape.clone(),
        blocks: host.blocks,
        n_ctx: host.n_ctx,
        max_rows: host.max_rows.min(worker.max_rows),
        max_sessions: host.max_sessions,
        max_in_flight: host.max_in_flight.min(worker.max_in_flight),
        features: host.features & worker.features,
        take_back: worker.take_back,
    };
    let largest = agreed.step_bytes().max(agreed.step_done_bytes());
    let fits = largest <= LARGEST_STEP && agreed.max_sessions <= u32::from(u16::MAX);
    found.unless(fits, Reason::TooLarge, || {
        format!("a step of {} rows would be {largest} bytes: ask for fewer rows a step", agreed.max_rows)
    });
    found.unless(host.take_back <= worker.take_back, Reason::TakeBack, || {
        let (h, w) = (rows_back(host.take_back), rows_back(worker.take_back));
        format!(
            "the host has to take back {h} of a conversation, the worker can {w}: start it as it was started before, \
             or begin anew"
        )
    });
    if found.0.is_empty() { Ok(agreed) } else { Err(found.0) }
}

const LARGEST_STEP: u128 = (1 << 31) - 1;

/// The differences between a host's terms `h` and a worker's `w`, as they are found.
struct Mismatches(Vec<Mismatch>);

impl Mismatches {
    fn unless(&mut self, ok: bool, reason: Reason, text: impl FnOnce() -> String) {
        if !ok {
            self.0.push(Mismatch { reason, text: text() });
        }
    }

    /// Which model: version, architecture, weights, settings, shape.
    fn of_model(&mut self, h: &Terms, w: &Terms) {
        self.unless(h.version == w.version, Reason::Version, || {
            let older = if h.version < w.version { "host" } else { "worker" };
            format!("the host speaks protocol {}, the worker {}: update the {older}", h.version, w.version)
        });
        self.unless(w.role != SliceRole::None, Reason::NoSlice, || {
            "the worker holds no slice: start it with one, or push one to it".into()
        });
        self.unless(h.arch == w.arch, Reason::Arch, || {
            let (h, w) = (shown(&h.arch), shown(&w.arch));
            format!(
                "the host runs a {h} model, the worker's slice is of a {w} model: give the worker the right slice"
            )
        });
        self.unless(h.model == w.model && h.model.is_some(), Reason::Model, || {
            let (h, w) = (short(h.model), short(w.model));
            format!(
                "the host's slices are of model {h}, the worker's of model {w}: use slices of one split on both sides"
            )
        });
        self.unless(same_if_known(h.params, w.params), Reason::Params, || {
            "host and worker hold the same weights with other settings (rope, norms, ...): use slices of one split \
             on both sides"
                .into()
        });
        self.unless(h.n_blocks == w.n_blocks, Reason::NBlocks, || {
            let (h, w) = (h.n_blocks, w.n_blocks);
            format!(
                "the host's model has {h} blocks, the worker's {w}: use slices of one split on both sides"
            )
        });
        let has_rows = match w.role {
            SliceRole::None => true,
            SliceRole::Head => !w.shape.output.is_empty(),
            SliceRole::Middle => !w.shape.input.is_empty() && !w.shape.output.is_empty(),
            SliceRole::Tail => !w.shape.input.is_empty(),
        };
        let fits = has_rows && (h.shape.is_unknown() || h.shape == w.shape);
        let same = same_if_known(h.input, w.input) && same_if_known(h.output, w.output);
        self.unless(fits && same, Reason::Layout, || match fits {
            false => format!(
                "the host's rows are {}, the worker's {}: use slices of one split on both sides, and give the worker the \
                 right one",
                rows(&h.shape),
                rows(&w.shape)
            ),
            true => "host and worker mean other tensors by the same rows: use slices of one split and one version of \
                     DIM on both sides; update the older"
                .to_owned(),
        });
    }

    /// Which part of it: role, blocks, file.
    fn of_slice(&mut self, h: &Terms, w: &Terms) {
        self.unless(h.role == w.role, Reason::Role, || {
            let (h, w) = (role(h.role), role(w.role));
            format!("the host needs a {h} slice, the worker holds a {w} slice: give the worker the right one")
        });
        let exists = h.blocks.first <= h.blocks.last && h.blocks.last < h.n_blocks;
        self.unless(h.blocks == w.blocks && exists, Reason::Blocks, || {
            format!(
                "the host needs blocks {}, the worker holds {} (of {}): give the worker the slice that fits the host's, \
                 or split anew",
                h.blocks, w.blocks, w.n_blocks
            )
        });
        self.unless(same_if_known(h.slice, w.slice), Reason::Slice, || {
            let (h, w) = (short(h.slice), short(w.slice));
            format!(
                "the host expects slice {h}, the worker holds {w}: copy the slice of this split to the worker"
            )
        });
    }

    /// Which numbers and how many.
    fn of_size(&mut self, h: &Terms, w: &Terms, row_type: Option<RowType>) {
        self.unless(row_type.is_some_and(|t| w.row_types.contains(t)), Reason::DType, || {
            let (h, w) = (h.row_types, w.row_types);
            format!(
                "the host wants rows as {h}, the worker can {w}: choose another number format on the host"
            )
        });
        self.unless(h.n_ctx > 0 && h.n_ctx <= w.n_ctx, Reason::Context, || {
            format!(
                "the host needs a context of {} positions, the worker has {}: start the host with a smaller context or \
                 the worker with a larger one",
                h.n_ctx, w.n_ctx
            )
        });
        self.unless(h.max_sessions > 0 && h.max_sessions <= w.max_sessions, Reason::Sessions, || {
            let (h, w) = (h.max_sessions, w.max_sessions);
            format!(
                "the host needs {h} sessions, the worker has {w}: ask for fewer, or start the worker with more"
            )
        });
        self.unless(h.max_rows > 0 && w.max_rows > 0, Reason::Rows, || {
            let (h, w) = (h.max_rows, w.max_rows);
            format!("the host sends {h} rows a step, the worker takes {w}: both must be at least 1")
        });
        self.unless(h.max_in_flight > 0 && w.max_in_flight > 0, Reason::InFlight, || {
            let (h, w) = (h.max_in_flight, w.max_in_flight);
            format!("the host sends {h} steps ahead, the worker takes {w}: both must be at least 1")
        });
    }
}

/// Whether two identities can be of one thing: a side that does not say its own differs from none.
pub fn same_if_known(a: Option<Sha>, b: Option<Sha>) -> bool {
    a.is_none() || b.is_none() || a == b
}

/// The first bytes of an identity, as people compare them.
pub fn short(identity: Option<Sha>) -> String {
    match identity {
        Some(Sha(bytes)) => bytes[..4].iter().map(|b| format!("{b:02x}")).collect(),
        None => "(unknown)".to_owned(),
    }
}

fn shown(text: &str) -> &str {
    if text.is_empty() { "(nameless)" } else { text }
}

fn rows(shape: &Shape) -> String {
    let tokens = if shape.reads_tokens { ", with token ids" } else { "" };
    format!("{} in and {} out{tokens}", shape.input, shape.output)
}

fn rows_back(take_back: TakeBack) -> String {
    match take_back {
        TakeBack::ALL => "any number of rows".to_owned(),
        TakeBack::NOTHING => "none".to_owned(),
        TakeBack(n) => format!("{n} rows"),
    }
}

fn role(role: SliceRole) -> &'static str {
    match role {
        SliceRole::None => "(none)",
        SliceRole::Head => "head",
        SliceRole::Middle => "middle",
        SliceRole::Tail => "tail",
    }
}
