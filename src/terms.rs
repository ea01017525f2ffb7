//! What is agreed on with a worker, in the words of the wire.

use dim_core::blocks::BlockRange;
use dim_core::canary::Widths;
use dim_core::digest::Sha;
use dim_core::rows::{Part, PartType, RowType};
use dim_core::stage::{LocalStage, TakeBack};
use dim_wire::rows::{RowTypes, Shape};
use dim_wire::terms::{Engine, Machine, SliceRole, Terms};
use gguf_tools::manifest::SliceEntry;
use gguf_tools::needs::{Crossing, ValueKind};
use gguf_tools::slice::SliceInfo;
use llama_sys_patch::ValueType;

use crate::device;
use crate::event::Offered;
use crate::stage::local::{LlamaStage, digest_of, layout_of};

/// What this program needs of every worker.
#[derive(Clone, Debug)]
pub(crate) struct Needs {
    pub software: String,
    pub wire: RowType,
    pub n_ctx: u32,
    pub max_rows: u32,
}

/// What a host knows of the slice that a worker should hold.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    pub blocks: BlockRange,
    /// its identity
    pub slice: Option<Sha>,
    pub rows: ExpectedRows,
}

/// What a host knows of the rows that go in and out of a slice.
#[derive(Clone, Debug, Default)]
pub(crate) struct ExpectedRows {
    shape: Shape,
    input: Option<Sha>,
    output: Option<Sha>,
}

impl ExpectedRows {
    /// Whether it is known that no canary is made for such rows.
    pub(crate) fn are_not_singles(&self) -> bool {
        self.input.is_some() && canary_widths(&self.shape).is_none()
    }

    /// What a manifest says of them; of one that says nothing, nothing.
    pub(crate) fn of(slice: &SliceEntry) -> ExpectedRows {
        let (input, output) = (layout(&slice.input), layout(&slice.output));
        ExpectedRows {
            input: digest_of(&input),
            output: digest_of(&output),
            shape: Shape {
                input: layout_of(&input),
                output: layout_of(&output),
                reads_tokens: slice.reads_tokens,
            },
        }
    }
}

/// The lengths of the rows that a canary is made of: of singles only. `None` for others.
pub(crate) fn canary_widths(shape: &Shape) -> Option<Widths> {
    let is_single = |part: &Part| part.part_type == PartType::F32 && part.may_round;
    let all = shape.input.parts.iter().chain(&shape.output.parts);
    let [input, output] = [&shape.input, &shape.output].map(|layout| layout.width(RowType::F32));
    let fits = { all }.all(is_single) && !shape.reads_tokens;
    (fits && input > 0 && output > 0).then_some(Widths { input, output })
}

/// The same in the engine's words, whose digest it has.
fn layout(crossing: &Crossing) -> llama_sys_patch::Layout {
    let part = |part: &gguf_tools::needs::Part| llama_sys_patch::Part {
        name: part.name.clone(),
        value_type: match part.kind {
            ValueKind::F32 => ValueType::F32,
            ValueKind::I32 => ValueType::I32,
        },
        values: part.values,
    };
    llama_sys_patch::Layout { parts: crossing.0.iter().map(part).collect() }
}

/// The terms of a host that needs a worker with this slice of the model that `head` is of.
pub(crate) fn of_host(needs: &Needs, head: &SliceInfo, expected: &Expected, max_sessions: u32) -> Terms {
    let ExpectedRows { shape, input, output } = expected.rows.clone();
    Terms {
        row_types: match needs.wire {
            RowType::F16 => RowTypes::F16,
            RowType::F32 => RowTypes::F32,
        },
        role: SliceRole::Middle,
        instance: random_instance(),
        n_ctx: needs.n_ctx,
        max_rows: needs.max_rows,
        max_sessions,
        max_in_flight: dim_core::pipeline::MAX_IN_FLIGHT,
        // whatever it cannot take back is evaluated anew
        take_back: TakeBack::NOTHING,
        shape,
        input,
        output,
        slice: expected.slice,
        ..of_model(head, expected.blocks, &needs.software)
    }
}

/// What a worker with this slice holds and can do.
pub(crate) struct Offer<'a> {
    pub slice: &'a SliceInfo,
    pub software: &'a str,
    pub instance: u64,
    pub n_ctx: u32,
    pub max_rows: u32,
    pub max_sessions: u32,
}

/// The terms of a worker; what only the loaded stage knows is there once it is.
pub(crate) fn of_worker(offer: &Offer<'_>, stage: Option<&LlamaStage>) -> Terms {
    let n_embd = offer.slice.hparams.n_embd;
    let (shape, input, output, take_back) = match stage {
        None => (Shape::hidden(n_embd), None, None, TakeBack::ALL),
        Some(stage) => {
            let ((input, output), digests) = (stage.layouts(), stage.layout_digests());
            let shape = Shape { input, output, reads_tokens: stage.reads_tokens() };
            (shape, digests.0, digests.1, stage.take_back())
        }
    };
    Terms {
        row_types: RowTypes::ALL,
        role: SliceRole::Middle,
        instance: offer.instance,
        n_ctx: offer.n_ctx,
        max_rows: offer.max_rows,
        max_sessions: offer.max_sessions,
        max_in_flight: MAX_IN_FLIGHT,
        shape,
        input,
        output,
        take_back,
        machine: Machine { engine: Engine::LlamaCpp, ..Machine::default() },
        slice: Some(offer.slice.slice_sha256),
        ..of_model(offer.slice, offer.slice.blocks, offer.software)
    }
}

fn of_model(slice: &SliceInfo, blocks: BlockRange, software: &str) -> Terms {
    Terms {
        n_blocks: slice.model_blocks,
        blocks,
        model: Some(slice.model_sha256),
        params: slice.params_sha256,
        arch: slice.hparams.arch.clone(),
        ..Terms::blank(0, software, &device::name())
    }
}

/// A worker's slice, as it describes it.
pub(crate) fn offered(offer: &Terms) -> Offered {
    Offered {
        arch: offer.arch.clone(),
        first: offer.blocks.first,
        last: offer.blocks.last,
        n_blocks: offer.n_blocks,
    }
}

/// The blocks that a worker says it has, if a model of `n_blocks` has such blocks.
pub(crate) fn blocks_of(offer: &Terms, n_blocks: u32) -> Option<BlockRange> {
    let BlockRange { first, last } = offer.blocks;
    (first <= last && last < n_blocks).then_some(offer.blocks)
}

/// A number for this process, by which a peer knows it again.
pub(crate) fn random_instance() -> u64 {
    let mut bytes = [0; 8];
    // zero is allowed: it only keeps the worker from recognising a ghost of this process
    let _ = getrandom::fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

/// Steps a host may send ahead.
const MAX_IN_FLIGHT: u32 = 4;
