//! Files to models, and models to stages.

use std::path::{Path, PathBuf};

use gguf_tools::gguf::{Gguf, absent, check};
use gguf_tools::plan::Role;
use gguf_tools::slice::{SliceInfo, keys};
use llama_sys_patch::{ContextParams, FlashAttn, Model, ModelParams, Stage, StageParams};

use crate::error::Error;
use crate::event::{Event, Events};
use crate::resources::Resources;
use crate::stage::local::LlamaStage;
use crate::stage::trial;
use crate::stage::verified::{Verify, open_slice_while};

/// How a slice is loaded.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// How much of this machine it may use; its `n_ctx` counts as it is.
    pub resources: Resources,
    /// Whether the file is mapped: it must not change then while the stage lives.
    pub mmap: bool,
    /// Sessions at once, each with a context of its own.
    pub max_sessions: u32,
    /// Take fewer rows at once than the resources say, at least 32, so that the buffers for computing have room in this
    /// many bytes.
    pub compute_bytes: Option<u64>,
}

/// Reads a slice's header and checks its weights as `verify` says; it has to be a `role`.
pub(crate) fn open(path: &Path, role: Role, verify: Verify, events: &Events) -> Result<SliceInfo, Error> {
    let info = open_any(path, verify, events)?;
    match info.role == role {
        true => Ok(info),
        false => Err(Error::WrongRole { path: path.to_owned(), found: info.role, wanted: role }),
    }
}

/// The same for a slice of any role.
pub(crate) fn open_any(path: &Path, verify: Verify, events: &Events) -> Result<SliceInfo, Error> {
    let file = file_name(path);
    let checking = |done, total| events.tell(Event::Checking { file: file.clone(), done, total });
    Ok(open_slice_while(path, verify, || events.goes_on(), checking)?)
}

/// Loads a slice as a stage; `on_event` hears how far it is.
///
/// # Errors
/// llama.cpp refuses the file, or there is no room for its cache.
pub fn load_stage(
    path: &Path,
    info: &SliceInfo,
    options: &LoadOptions,
    on_event: impl FnMut(Event) + Send + 'static,
) -> Result<LlamaStage, Error> {
    let events = Events::new(on_event);
    events.came_to(stage(path, info, options, &events))
}

/// The same for who listens already.
pub(crate) fn stage(
    path: &Path,
    info: &SliceInfo,
    options: &LoadOptions,
    events: &Events,
) -> Result<LlamaStage, Error> {
    let lm_head = info.role == Role::Tail;
    let model = load(&[path.to_owned()], &options.resources, options.mmap, lm_head, events)?;
    let mut n_ubatch = options.resources.n_ubatch;
    loop {
        let stage = stage_of(&model, path, info, options, n_ubatch, events)?;
        let bytes = stage.inner().info().compute_bytes;
        let least = LEAST_ROWS.max(options.max_sessions);
        let Some(most) = options.compute_bytes.filter(|&most| bytes > most && n_ubatch > least) else {
            return Ok(stage);
        };
        // what grows with the rows is most of it; if something else does, the next round goes on
        let fit = u64::from(n_ubatch) * most / bytes;
        let fit = u32::try_from(fit).unwrap_or(n_ubatch).min(n_ubatch - 1).max(least);
        n_ubatch = if fit.is_power_of_two() { fit } else { (fit.next_power_of_two() / 2).max(least) };
    }
}

/// Rows that a stage can always compute at once, whatever they take.
const LEAST_ROWS: u32 = 32;

fn stage_of(
    model: &Model,
    path: &Path,
    info: &SliceInfo,
    options: &LoadOptions,
    n_ubatch: u32,
    events: &Events,
) -> Result<LlamaStage, Error> {
    let context = ContextParams {
        n_ctx: options.resources.n_ctx,
        n_batch: n_ubatch,
        n_ubatch,
        n_threads: options.resources.threads(),
        max_sessions: options.max_sessions,
        // another session's step would end what they are good for
        snapshots: if options.max_sessions == 1 { options.resources.snapshots.min(n_ubatch - 1) } else { 0 },
        flash_attn: FlashAttn::Auto,
        ..ContextParams::default()
    };
    // a slice that keeps the model's numbers has weights for some of its blocks; a renumbered one is a model of its own
    let (blocks, first_block) = match info.renumbered {
        true => (0..model.n_blocks(), info.blocks.first),
        false => (info.blocks.as_range(), 0),
    };
    let params = StageParams {
        blocks,
        takes_tokens: info.role == Role::Head,
        has_lm_head: info.role == Role::Tail,
        context,
    };
    let stage = Stage::new(model, params);
    let stage = stage.map_err(|source| Error::Load { path: path.to_owned(), source })?;
    if let Some(snapshots) = stage.snapshots().filter(|_| options.resources.snapshots > 0) {
        events.tell(Event::Snapshots { file: file_name(path), snapshots, cache_bytes: stage.kv_bytes() });
    }
    Ok(LlamaStage::new(stage, info.role.as_str(), first_block))
}

/// Loads a whole model, after this project's own checks: llama.cpp aborts on some files that these refuse.
pub(crate) fn load_model(
    path: &Path,
    resources: &Resources,
    mmap: bool,
    events: &Events,
) -> Result<Model, Error> {
    let gguf = Gguf::open(path)?;
    if gguf.entry(keys::ROLE).is_some() || absent::is_said(&gguf) {
        return Err(Error::NotTheModel(path.to_owned()));
    }
    check::model(&gguf)?;
    let files: Vec<PathBuf> = gguf.files().map(Path::to_owned).collect();
    drop(gguf);
    load(&files, resources, mmap, true, events)
}

fn load(
    files: &[PathBuf],
    resources: &Resources,
    mmap: bool,
    lm_head: bool,
    events: &Events,
) -> Result<Model, Error> {
    trial::survive(files)?;
    let file = files.first().map(|path| file_name(path)).unwrap_or_default();
    let total: u64 = files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum();
    let mut on_progress = |fraction: f32| {
        let done = (f64::from(fraction) * total as f64) as u64;
        events.tell(Event::Loading { file: file.clone(), done, total });
        events.goes_on()
    };
    let params = ModelParams {
        gpu_layers: resources.gpu_layers,
        use_mmap: mmap,
        no_lm_head: !lm_head,
        progress: Some(&mut on_progress),
        ..Default::default()
    };
    Ok(Model::load(files, params)?)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// The file's name without its folder and `.gguf`.
pub fn model_name(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}
