//! Whose a saved session is: of hosts that compute the same in the same way, and of no others.

use std::fmt::Write as _;
use std::sync::Arc;

use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use dim_core::rows::{Layout, RowType};
use dim_core::stage::LocalStage as _;
use gguf_tools::slice::SliceInfo;

use crate::resources::Resources;
use crate::stage::local::LlamaStage;

/// What sessions that a host saves belong to, and what their steps are made of.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Belongs {
    /// over everything that the bits depend on, as far as it is known
    pub identity: Sha,
    pub row_type: RowType,
    /// bytes of a row that each worker is sent
    pub row_bytes: Vec<usize>,
    /// bytes that each stage of this process saves of a row
    pub state_bytes: Vec<usize>,
    /// of all blocks, the part that workers have
    pub away: f64,
    pub n_ctx: u32,
    pub n_ubatch: u32,
}

/// The stages of a host, as they are made one after the other.
pub(crate) struct Stages {
    /// everything that is to be the same
    said: String,
    row_type: RowType,
    row_bytes: Vec<usize>,
    state_bytes: Vec<usize>,
    n_away: u32,
    /// what goes into the next one, if it is known
    before: Option<Layout>,
    can_save: bool,
}

impl Stages {
    pub(crate) fn new(head: &SliceInfo, row_type: RowType) -> Stages {
        let cpu = llama_sys_patch::unused_cpu_features().join("+");
        let params = head.params_sha256.map_or_else(String::new, |sha256| sha256.to_string());
        let said = format!(
            "dim saved session 1, llama.cpp {}, {} without {cpu}, model {}, settings {params}, rows {}\n",
            llama_sys_patch::LLAMA_CPP_SYS_VERSION,
            std::env::consts::ARCH,
            head.model_sha256,
            row_type.name(),
        );
        let (row_bytes, state_bytes) = (Vec::new(), Vec::new());
        Stages { said, row_type, row_bytes, state_bytes, n_away: 0, before: None, can_save: true }
    }

    /// One of this process.
    pub(crate) fn here(&mut self, info: &SliceInfo, stage: &LlamaStage) {
        let is_fused = stage.inner().info().flash_attn;
        // writing into a String does not fail
        let _ = writeln!(self.said, "{} here, {}, fused {is_fused}", info.blocks, info.slice_sha256);
        match stage.saved_bytes() {
            Some(bytes) => self.state_bytes.push(bytes),
            None => self.can_save = false,
        }
        self.before = Some(stage.layouts().1);
    }

    /// One of a worker, with what comes out of it.
    pub(crate) fn away(&mut self, blocks: BlockRange, slice: Option<Sha>, output: Option<Layout>) {
        let slice = slice.map_or_else(String::new, |sha256| sha256.to_string());
        let _ = writeln!(self.said, "{blocks} away, {slice}");
        self.n_away += blocks.count();
        match self.before.take() {
            Some(layout) => self.row_bytes.push(layout.bytes(self.row_type)),
            None => self.can_save = false,
        }
        self.before = output;
    }

    /// All of them: `None`, where one cannot save, or where it is not known what goes into one.
    pub(crate) fn belongs(mut self, n_blocks: u32, resources: &Resources) -> Option<Arc<Belongs>> {
        let Resources { n_ctx, n_ubatch, gpu_layers, .. } = *resources;
        let gpu = gpu_layers.map_or_else(|| "all".to_owned(), |n| n.to_string());
        let _ = writeln!(self.said, "{n_ctx} positions, {n_ubatch} rows at once, {gpu} blocks on a GPU");
        self.can_save.then(|| {
            Arc::new(Belongs {
                identity: Sha::of(self.said.as_bytes()),
                row_type: self.row_type,
                row_bytes: self.row_bytes,
                state_bytes: self.state_bytes,
                away: f64::from(self.n_away) / f64::from(n_blocks.max(1)),
                n_ctx,
                n_ubatch,
            })
        })
    }
}
