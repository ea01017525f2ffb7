//! A stage: the blocks `[first, last)` of a model, with caches and states of their own.

use std::ops::Range;
use std::ptr::NonNull;

use half::f16;

use crate::error::{check, check_status};
use crate::session::SessionCalls;
use crate::{Error, Layout, Model, ffi};

/// Whether attention runs as one fused operation. The two ways differ in their last bits: every stage of a pipeline
/// must use the same, and [`ContextInfo::flash_attn`] says what `Auto` came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FlashAttn {
    /// llama.cpp's default: on, where the device of every block can do it.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always.
    On,
}

/// Type of the cached keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvType {
    /// llama.cpp's default. Queries, too, are rounded to it before they meet the keys.
    #[default]
    F16,
    /// Twice the memory, nothing rounded: with [`FlashAttn::Off`] and F32 weights, or
    /// [`f32_products`](ContextParams::f32_products), the evaluation is F32 throughout.
    F32,
}

/// The settings a stage and a [`Stock`](crate::Stock) context have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextParams {
    /// Positions of one session.
    pub n_ctx: u32,
    /// Most rows of one call.
    pub n_batch: u32,
    /// Most rows computed at once; a call is cut into chunks of it. Results depend on it in their last bits.
    pub n_ubatch: u32,
    /// Threads computing, for prompts and for single tokens alike.
    pub n_threads: u32,
    /// Sessions, each with `n_ctx` positions of its own. With 1 the arithmetic is that of llama.cpp for one sequence.
    pub max_sessions: u32,
    /// Rows of its last call that a recurrent session can be taken back by, where llama.cpp keeps snapshots for the
    /// architecture (0 elsewhere); each costs as much memory as the state itself. Less than `n_ubatch`. Results depend on it
    /// in that chunks may be cut elsewhere: every stage of a pipeline must use the same.
    pub snapshots: u32,
    /// Fused attention.
    pub flash_attn: FlashAttn,
    /// Cached keys and values: every stage of a pipeline must use the same.
    pub kv_type: KvType,
    /// Compute products with matrices that are not F32 with their rows turned to F32, a few at a time: llama.cpp rounds
    /// what it multiplies a matrix with to the matrix's type (F16, BF16, 8-bit blocks for quantised ones). Slower, on
    /// the CPU only. For stages; [`Stock`](crate::Stock) refuses it.
    pub f32_products: bool,
}

impl Default for ContextParams {
    fn default() -> Self {
        let n_threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(512) as u32);
        // n_batch and n_ubatch are llama.cpp's own defaults
        ContextParams {
            n_ctx: 2048,
            n_batch: 2048,
            n_ubatch: 512,
            n_threads,
            max_sessions: 1,
            snapshots: 0,
            flash_attn: FlashAttn::Auto,
            kv_type: KvType::F16,
            f32_products: false,
        }
    }
}

impl ContextParams {
    pub(crate) fn to_c(&self, max_outputs: u32) -> ffi::dim_context_params {
        ffi::dim_context_params {
            n_ctx: self.n_ctx,
            n_batch: self.n_batch,
            n_ubatch: self.n_ubatch.min(self.n_batch),
            n_threads: self.n_threads,
            max_sessions: self.max_sessions,
            n_snapshots: self.snapshots,
            flash_attn: match self.flash_attn {
                FlashAttn::Auto => ffi::DIM_FLASH_ATTN_AUTO,
                FlashAttn::Off => ffi::DIM_FLASH_ATTN_OFF,
                FlashAttn::On => ffi::DIM_FLASH_ATTN_ON,
            },
            kv_type: match self.kv_type {
                KvType::F16 => ffi::DIM_KV_F16,
                KvType::F32 => ffi::DIM_KV_F32,
            },
            f32_products: self.f32_products,
            max_outputs,
        }
    }
}

/// Which part of a model a stage is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageParams {
    /// Blocks, numbered as in the model.
    pub blocks: Range<u32>,
    /// The range starts the model: tokens come in. Else rows do. A middle or tail cut in the old way starts with block 0 of
    /// its file too, so the file alone does not tell.
    pub takes_tokens: bool,
    /// The range ends the model: logits go out. Else hidden rows do.
    pub has_lm_head: bool,
    /// Sizes and threads.
    pub context: ContextParams,
}

impl StageParams {
    /// A range of a whole model, or of a slice that keeps its numbers: what comes in and goes out follows from the range.
    pub fn of_whole_model(model: &Model, blocks: Range<u32>, context: ContextParams) -> Self {
        StageParams {
            takes_tokens: blocks.start == 0,
            has_lm_head: blocks.end == model.n_blocks(),
            blocks,
            context,
        }
    }
}

/// One row of a call: which token of which session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// The session.
    pub session: u32,
    /// The token's index in it: the session's length so far.
    pub position: u32,
    /// Logits are wanted. Without meaning for stages that give hidden rows: those give all.
    pub want_output: bool,
}

impl Row {
    /// The rows of one session from `position` on, with the output of the last one wanted.
    pub fn chunk(session: u32, position: u32, n_rows: usize) -> Vec<Row> {
        (0..n_rows)
            .map(|i| Row { session, position: position + i as u32, want_output: i + 1 == n_rows })
            .collect()
    }
}

/// What goes in: one entry per row. A row is what [`Stage::input_layout`] says: for most models `n_embd` values.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// (n_rows) token ids.
    Tokens(&'a [i32]),
    /// (n_rows, [`width_f16`](Layout::width_f16)), row-major; converted to F32 on the device.
    F16(&'a [f16]),
    /// (n_rows, [`width_f32`](Layout::width_f32)), row-major.
    F32(&'a [f32]),
}

/// Where the output goes. The buffer may be longer than needed.
#[derive(Debug)]
pub enum Output<'a> {
    /// (n_rows, [`width_f16`](Layout::width_f16)), row-major; converted from F32 on the device, to the nearest.
    F16(&'a mut [f16]),
    /// (n_rows, [`width_f32`](Layout::width_f32)), row-major.
    F32(&'a mut [f32]),
    /// (rows that want output, n_vocab), row-major.
    Logits(&'a mut [f32]),
}

/// Sizes of a context, as they came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextInfo {
    /// Most rows of one call.
    pub n_batch: u32,
    /// Rows of one chunk.
    pub n_ubatch: u32,
    /// What [`FlashAttn::Auto`] came to.
    pub flash_attn: bool,
    /// The KV cache.
    pub kv_bytes: u64,
    /// The graph's buffers.
    pub compute_bytes: u64,
    /// llama.cpp's own buffer for logits.
    pub output_bytes: u64,
}

/// What was seen at the output of one block while [`Stage::watch_blocks`] was on.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct BlockStats {
    /// The block, as numbered in the file; `None` for the lm_head.
    pub block: Option<u32>,
    /// Chunks computed.
    pub calls: u64,
    /// Rows computed.
    pub rows: u64,
    /// Time of this block alone; the first has the embedding in it.
    pub nanoseconds: u64,
    /// The largest finite |x| of its output.
    pub max_abs: f32,
    /// Values of its output that are not finite.
    pub not_finite: u64,
}

/// A range of blocks with its sessions' keys and values.
///
/// Methods, in the order they are called: [`new`](Stage::new); [`evaluate`](Stage::evaluate) as often as there are rows,
/// with [`rewind`](Stage::rewind) and [`clear`](Stage::clear) between; [`watch_blocks`](Stage::watch_blocks) and
/// [`block_stats`](Stage::block_stats) to look inside.
pub struct Stage {
    stage: NonNull<ffi::dim_stage>,
    params: StageParams,
    info: ContextInfo,
    input: Layout,
    output: Layout,
    model: Model, // after `stage`: must outlive it
}

// SAFETY: a dim_stage belongs to no thread. It may be used from one thread at a time, which `&mut self` on everything
// that computes ensures; what takes `&self` only reads plain numbers. The thread-local error text is read by the same
// call that failed, on the same thread. The model it points to is kept alive by `model`, and is not changed by stages:
// llama.cpp's contexts share models by design.
unsafe impl Send for Stage {}

impl Stage {
    /// Makes a stage. Its buffers are allocated, at their largest, when it returns.
    ///
    /// # Errors
    /// [`Error::NotApart`] for blocks that cannot be evaluated apart, [`Error::InvalidArgument`] for
    /// ranges the file does not have and sizes that make no sense, [`Error::OutOfMemory`].
    pub fn new(model: &Model, params: StageParams) -> Result<Stage, Error> {
        let c_params = ffi::dim_stage_params {
            context: params.context.to_c(0),
            first: params.blocks.start,
            last: params.blocks.end,
            takes_tokens: params.takes_tokens,
            has_lm_head: params.has_lm_head,
        };
        let mut stage = std::ptr::null_mut();
        // SAFETY: the model is alive, and the stage keeps it so; both structs are valid for the call.
        check_status(unsafe { ffi::dim_stage_create(model.raw(), &raw const c_params, &raw mut stage) })?;
        let stage = NonNull::new(stage).ok_or_else(|| Error::Internal("a stage that is NULL".into()))?;
        let mut info = ffi::dim_context_info::default();
        // SAFETY: the stage was just made; `info` is written.
        let status = unsafe { ffi::dim_stage_describe(stage.as_ptr(), &raw mut info) };
        let (input, output) = (Layout::default(), Layout::default());
        let mut stage =
            Stage { stage, params, info: ContextInfo::from_c(&info), input, output, model: model.clone() };
        check_status(status)?;
        for (end, layout) in [(ffi::DIM_END_IN, &mut stage.input), (ffi::DIM_END_OUT, &mut stage.output)] {
            *layout = Layout::read(|out, capacity, n| {
                // SAFETY: the stage is alive; `out` has room for `capacity` entries.
                unsafe { ffi::dim_stage_crossing(stage.stage.as_ptr(), end, out, capacity, n) }
            })?;
        }
        Ok(stage)
    }

    /// Computes rows: of any sessions, in any order, as long as the positions of each session go on where it ends. Gives
    /// the number of rows written: all of them, or those that want logits.
    ///
    /// # Errors
    /// See [`Error`]. The sessions then are as they were, or lost ([`Error::SessionLost`]), where a recurrent state cannot be
    /// taken back; the output buffer may hold anything.
    pub fn evaluate(&mut self, rows: &[Row], input: Input, output: Output) -> Result<usize, Error> {
        self.evaluate_with_tokens(rows, None, input, output)
    }

    /// The same for a stage that [reads token ids](Self::reads_tokens) beside the rows: (n_rows) of them. Others ignore them.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate); [`Error::WrongInput`] without ids where they are read.
    pub fn evaluate_with_tokens(
        &mut self,
        rows: &[Row],
        tokens: Option<&[i32]>,
        input: Input,
        output: Output,
    ) -> Result<usize, Error> {
        if let Some(tokens) = tokens.filter(|tokens| tokens.len() != rows.len()) {
            let text = format!("{} token ids for {} rows", tokens.len(), rows.len());
            return Err(Error::WrongSize { got: tokens.len(), expected: rows.len(), text });
        }
        let (input_type, input, input_len) = match input {
            Input::Tokens(x) => (ffi::DIM_TOKENS, x.as_ptr().cast(), x.len()),
            Input::F16(x) => (ffi::DIM_F16, x.as_ptr().cast(), x.len()),
            Input::F32(x) => (ffi::DIM_F32, x.as_ptr().cast(), x.len()),
        };
        let (output_type, output, output_len) = match output {
            Output::F16(x) => (ffi::DIM_F16, x.as_mut_ptr().cast(), x.len()),
            Output::F32(x) => (ffi::DIM_F32, x.as_mut_ptr().cast(), x.len()),
            Output::Logits(x) => (ffi::DIM_LOGITS, x.as_mut_ptr().cast(), x.len()),
        };
        let rows = to_c(rows);
        let mut n_written = 0;
        let mut fault = ffi::dim_fault::default();
        // SAFETY: the stage is alive and ours alone (`&mut`); all pointers are valid for the lengths given, which are in
        // elements of the types named; input and output cannot overlap, one being shared and the other not. f16 is
        // transparent over u16.
        let status = unsafe {
            ffi::dim_stage_evaluate(
                self.stage.as_ptr(),
                rows.as_ptr(),
                rows.len(),
                tokens.map_or(std::ptr::null(), <[i32]>::as_ptr),
                input_type,
                input,
                input_len,
                output_type,
                output,
                output_len,
                &raw mut n_written,
                &raw mut fault,
            )
        };
        check(status, &fault)?;
        Ok(n_written)
    }

    /// Forgets a session's positions from `position` on; the next row then has that position.
    ///
    /// # Errors
    /// [`Error::WrongPosition`] beyond the session's length, [`Error::UnknownSession`]; below what
    /// [`lowest`](Self::lowest) says [`Error::CannotRewind`], and [`Error::SessionLost`] for a lost one. To 0 it always can.
    pub fn rewind(&mut self, session: u32, position: u32) -> Result<(), Error> {
        // SAFETY: the stage is alive and ours alone (`&mut`).
        unsafe { SESSIONS.rewind(self.stage.as_ptr(), session, position) }
    }

    /// Forgets a session.
    ///
    /// # Errors
    /// [`Error::UnknownSession`].
    pub fn clear(&mut self, session: u32) -> Result<(), Error> {
        self.rewind(session, 0)
    }

    /// Positions a session holds.
    ///
    /// # Errors
    /// [`Error::UnknownSession`].
    pub fn length(&self, session: u32) -> Result<u32, Error> {
        // SAFETY: the stage is alive, and what changes it takes `&mut`.
        unsafe { SESSIONS.length(self.stage.as_ptr(), session) }
    }

    /// The lowest position, beside 0, that a session can be taken back to: 0 for models without recurrent states, for others
    /// its length, or a few less where there are snapshots ([`ContextParams::snapshots`]). `None`: the session is lost.
    ///
    /// # Errors
    /// [`Error::UnknownSession`].
    pub fn lowest(&self, session: u32) -> Result<Option<u32>, Error> {
        // SAFETY: the stage is alive, and what changes it takes `&mut`.
        unsafe { SESSIONS.lowest(self.stage.as_ptr(), session) }
    }

    /// Rows that a session can be taken back by, of its last call and at most all but the first of those; `None`: any
    /// number, as nothing here is recurrent. To its beginning it always can.
    pub fn snapshots(&self) -> Option<u32> {
        // SAFETY: the stage is alive; a plain number is read.
        let n = unsafe { ffi::dim_stage_snapshots(self.stage.as_ptr()) };
        (n != u32::MAX).then_some(n)
    }

    /// Bytes of keys and values that [`save`](Self::save) gives of each position; `None`: the stage's memory is more than
    /// those (recurrent states, ...) and cannot be saved.
    pub fn saved_bytes(&self) -> Option<usize> {
        // SAFETY: the stage is alive, and what changes it takes `&mut`.
        let bytes = unsafe { ffi::dim_stage_saved_bytes(self.stage.as_ptr()) };
        usize::try_from(bytes).ok().filter(|_| bytes != u64::MAX)
    }

    /// The keys and values of a session's positions, in the place of what `out` held: for [`restore`](Self::restore).
    ///
    /// # Errors
    /// [`Error::WrongPosition`] for positions that the session does not hold, [`Error::Unsupported`] where there is more than
    /// keys and values.
    pub fn save(&mut self, session: u32, positions: Range<u32>, out: &mut Vec<u8>) -> Result<(), Error> {
        out.clear();
        out.resize(self.saved_bytes().unwrap_or(0) * positions.len(), 0);
        let mut fault = ffi::dim_fault::default();
        // SAFETY: the stage is alive and ours alone (`&mut`); `out` has room for its length.
        let status = unsafe {
            ffi::dim_stage_save(
                self.stage.as_ptr(),
                session,
                positions.start,
                positions.end,
                out.as_mut_ptr(),
                out.len(),
                &raw mut fault,
            )
        };
        check(status, &fault)
    }

    /// Takes rows of one session as evaluated, with what [`save`](Self::save) gave of their positions in a stage of the same
    /// blocks that was made in the same way; `tokens`: (n_rows). What is computed behind them has the bits that it has
    /// behind rows that were evaluated.
    ///
    /// # Errors
    /// As of [`evaluate`](Self::evaluate); [`Error::WrongSize`] for another number of bytes. The session is as it was then.
    pub fn restore(&mut self, rows: &[Row], tokens: &[i32], bytes: &[u8]) -> Result<(), Error> {
        if tokens.len() != rows.len() {
            let text = format!("{} token ids for {} rows", tokens.len(), rows.len());
            return Err(Error::WrongSize { got: tokens.len(), expected: rows.len(), text });
        }
        let rows = to_c(rows);
        let mut fault = ffi::dim_fault::default();
        // SAFETY: the stage is alive and ours alone (`&mut`); all pointers are valid for the lengths given.
        let status = unsafe {
            ffi::dim_stage_restore(
                self.stage.as_ptr(),
                rows.as_ptr(),
                rows.len(),
                tokens.as_ptr(),
                bytes.as_ptr(),
                bytes.len(),
                &raw mut fault,
            )
        };
        check(status, &fault)
    }

    /// What a row that comes in is made of; empty where tokens come in.
    pub fn input_layout(&self) -> &Layout {
        &self.input
    }

    /// What a row that goes out is made of; empty where logits go out.
    pub fn output_layout(&self) -> &Layout {
        &self.output
    }

    /// The range reads token ids beside the rows that come in: [`evaluate_with_tokens`](Self::evaluate_with_tokens).
    pub fn reads_tokens(&self) -> bool {
        // SAFETY: the stage is alive.
        unsafe { ffi::dim_stage_reads_tokens(self.stage.as_ptr()) }
    }

    /// What it was made with.
    pub fn params(&self) -> &StageParams {
        &self.params
    }

    /// Sizes, as they came out.
    pub fn info(&self) -> &ContextInfo {
        &self.info
    }

    /// Bytes of caches and recurrent states: those of the stage's own blocks.
    pub fn kv_bytes(&self) -> u64 {
        self.info.kv_bytes
    }

    /// The model it is a part of.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// How often the last graph could be used again, and how often one had to be built.
    pub fn graphs(&self) -> (u64, u64) {
        let (mut reused, mut built) = (0, 0);
        // SAFETY: the stage is alive; both numbers are written.
        unsafe { ffi::dim_stage_graphs(self.stage.as_ptr(), &raw mut reused, &raw mut built) };
        (reused, built)
    }

    /// Starts (from zero) or stops looking at every block's output. Results do not change; it takes time, because every
    /// block is waited for.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn watch_blocks(&mut self, on: bool) -> Result<(), Error> {
        // SAFETY: the stage is alive and ours alone.
        check_status(unsafe { ffi::dim_stage_watch(self.stage.as_ptr(), on) })
    }

    /// What was seen since [`watch_blocks`](Stage::watch_blocks): the blocks in order, then the lm_head if there is one.
    /// Empty if it was never called.
    ///
    /// # Errors
    /// None that a caller can bring about.
    pub fn block_stats(&self) -> Result<Vec<BlockStats>, Error> {
        let mut stats = vec![ffi::dim_block_stats::default(); self.params.blocks.len() + 1];
        let mut n = 0;
        // SAFETY: the stage is alive; `stats` has room for its length.
        let status = unsafe {
            ffi::dim_stage_block_stats(self.stage.as_ptr(), stats.as_mut_ptr(), stats.len(), &raw mut n)
        };
        check_status(status)?;
        let blocks = self.params.blocks.clone().map(Some).chain([None]);
        Ok(stats[..n]
            .iter()
            .zip(blocks)
            .map(|(s, block)| BlockStats {
                block,
                calls: s.calls,
                rows: s.rows,
                nanoseconds: s.nanoseconds,
                max_abs: s.max_abs,
                not_finite: s.not_finite,
            })
            .collect())
    }
}

const SESSIONS: SessionCalls<ffi::dim_stage> = SessionCalls {
    rewind: ffi::dim_stage_rewind,
    length: ffi::dim_stage_length,
    lowest: ffi::dim_stage_lowest,
};

impl Drop for Stage {
    fn drop(&mut self) {
        // SAFETY: the stage is ours, and its model is still alive.
        unsafe { ffi::dim_stage_free(self.stage.as_ptr()) };
    }
}

impl std::fmt::Debug for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stage({:?}, blocks {:?})", self.model, self.params.blocks)
    }
}

impl ContextInfo {
    pub(crate) fn from_c(info: &ffi::dim_context_info) -> Self {
        ContextInfo {
            n_batch: info.n_batch,
            n_ubatch: info.n_ubatch,
            flash_attn: info.flash_attn,
            kv_bytes: info.kv_bytes,
            compute_bytes: info.compute_bytes,
            output_bytes: info.output_bytes,
        }
    }
}

pub(crate) fn to_c(rows: &[Row]) -> Vec<ffi::dim_row> {
    rows.iter()
        .map(|row| ffi::dim_row {
            session: row.session,
            position: row.position,
            want_output: row.want_output,
        })
        .collect()
}
