//! Cutting: one pass over the model, each slice written beside its place and renamed when all of it is on disk.
//!
//! 1. remove what killed runs left, compare the space needed with the space there is;
//! 2. write every slice's header, then stream the tensors: the main thread copies, inside the system where it can,
//!    two threads read the same pieces from its cache and digest them, another flushes what was written;
//! 3. with all data seen, write the digests into the headers, flush, find the middles' canaries meanwhile, rename the
//!    slices in order;
//! 4. the manifest last.
//!
//! Data is read through the file, not through a map: a model that becomes shorter meanwhile is an error, and one
//! that is overwritten meanwhile gives slices whose digests do not match, which nobody loads. Memory is a few
//! buffers and the headers, whatever the model's size.

mod stream;
mod verify;

use std::{
    borrow::Cow,
    io,
    path::{Path, PathBuf},
    thread,
};

use sha2::{Digest as _, Sha256};

use crate::{
    apart::{self, Task},
    ask::Ask,
    canary::{self, Canary, NoCanary},
    digest::{Identity, Sha},
    failure::Explained,
    gguf::{
        self, Array, Value,
        write::{GgufWriter, TensorSpec, WriteError, remove_stale},
    },
    manifest::{self, Manifest, ModelEntry, SliceEntry},
    os,
    plan::{Plan, SlicePlan},
    recipe::Recipe,
    requantise::RequantiseError,
    slice::{Role, SliceError, keys},
    text::{Safe, Shown, gib},
};
use stream::stream;
pub use verify::verify;

/// What a cut is doing, for whoever waits.
#[derive(Clone, Copy, Debug)]
pub enum CutProgress<'a> {
    /// Bytes of tensor data written, of how many, and the file.
    Writing(u64, u64, &'a str),
    /// Flushing to the disk.
    Flushing,
    /// Bytes compared, of how many, and the file.
    Verifying(u64, u64, &'a str),
    /// This middle gets no canary: the file, and why.
    NoCanary(&'a str, &'a NoCanary),
}

/// Why a cut failed. No slice of this run has its final name then, except those that were complete.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SplitError {
    /// The folder for the slices cannot be made or read.
    #[error("{}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not enough room on the disk.
    #[error("need {}, have {} in {}", gib(*.need), gib(*.have), path.display())]
    Space {
        /// Bytes the slices take.
        need: u64,
        /// Bytes there are.
        have: u64,
        /// The folder.
        path: PathBuf,
    },
    /// The model would be overwritten by one of its slices.
    #[error("{}: a slice would take the model's own name", .0.display())]
    OverModel(PathBuf),
    /// Reading the model failed.
    #[error(transparent)]
    Read(#[from] gguf::Error),
    /// Writing a slice failed.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Writing the manifest failed.
    #[error("cannot write {}: {source}", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Changing a type failed.
    #[error(transparent)]
    Requantise(#[from] RequantiseError),
    /// llama.cpp does not load a slice that was just written. Nothing is left of it.
    #[error("{file} cannot be loaded again: {}", Safe(&why.to_string()))]
    Unloadable {
        /// The slice.
        file: String,
        /// What llama.cpp said.
        why: NoCanary,
    },
    /// A slice that was just written is not what it should be.
    #[error(transparent)]
    Slice(#[from] SliceError),
    /// A slice that was just written differs from the model.
    #[error(
        "{file}: {} differs from what was read before: the disk or the memory of this machine is at fault",
        Shown(what)
    )]
    Differs {
        /// The slice.
        file: String,
        /// The key or tensor.
        what: String,
    },
}

impl Explained for SplitError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        match self {
            SplitError::Read(e) => e.hint(),
            SplitError::Write(e) => e.hint(),
            SplitError::Slice(e) => e.hint(),
            SplitError::Space { .. } => Some("free some space, or name another folder".into()),
            SplitError::OverModel(_) => Some("name another folder".into()),
            SplitError::Unloadable { .. } => Some(
                "the model has keys or tensors that this llama.cpp does not take: convert it again with a current \
                 converter, or take another file of it"
                    .into(),
            ),
            _ => None,
        }
    }

    fn is_misuse(&self) -> bool {
        matches!(self, SplitError::Space { .. } | SplitError::OverModel(_) | SplitError::Read(_))
    }
}

/// Cuts a model as planned into `out`. Returns what was written; the manifest is `out/STEM.split.json`.
///
/// # Errors
/// Not enough space, or reading or writing fails. Nothing half-written keeps its final name, and temporary files
/// are removed.
pub fn split(
    plan: &Plan<'_>,
    out: &Path,
    stem: &str,
    mut progress: impl FnMut(CutProgress<'_>),
) -> Result<Manifest, SplitError> {
    let folder = |source| SplitError::Folder { path: out.to_owned(), source };
    std::fs::create_dir_all(out).map_err(folder)?;
    let targets: Vec<PathBuf> = plan.slices.iter().map(|s| out.join(&s.file)).collect();
    let manifest_path = out.join(manifest_name(stem));
    for target in targets.iter().chain([&manifest_path]) {
        remove_stale(target).map_err(folder)?;
        if plan.gguf.files().any(|file| os::same_file(file, target)) {
            return Err(SplitError::OverModel(target.clone()));
        }
    }
    check_space(plan, out)?;

    // the headers of all slices, then their data
    let mut writers = Vec::with_capacity(plan.slices.len());
    for (slice, target) in plan.slices.iter().zip(&targets) {
        let specs: Vec<TensorSpec> = slice.tensors.iter().map(|(spec, _)| spec.clone()).collect();
        writers.push(GgufWriter::create(target, &slice.metadata, &specs)?);
    }
    let digests = stream(plan, &mut writers, &mut progress)?;

    // the model's tensors, in its own order
    let mut identity = Identity::default();
    for (tensor, sha) in plan.gguf.tensors().zip(&digests.of_model) {
        identity.add(tensor.name(), tensor.tensor_type(), tensor.dims(), *sha);
    }
    let model_sha256 = identity.finish();

    progress(CutProgress::Flushing);
    let mut entries = Vec::with_capacity(plan.slices.len());
    for ((slice, writer), of_slice) in plan.slices.iter().zip(&mut writers).zip(&digests.of_slices) {
        entries.push(write_digests(slice, writer, of_slice, model_sha256, plan.source.is_some())?);
    }
    for (entry, canary) in entries.iter_mut().zip(sync(plan, &mut writers, model_sha256)?) {
        match canary {
            Some(Ok(canary)) => entry.canary = Some(canary),
            // no worker could load it: better no slices than slices of which nobody knows
            Some(Err(why)) if why.is_unloadable() => {
                return Err(SplitError::Unloadable { file: entry.file.clone(), why });
            }
            Some(Err(why)) => progress(CutProgress::NoCanary(&entry.file, &why)),
            None => {}
        }
    }
    for writer in writers {
        writer.publish()?;
    }

    let manifest =
        Manifest { version: manifest::VERSION, model: model_entry(plan, model_sha256), slices: entries };
    manifest.write(&manifest_path).map_err(|source| SplitError::Manifest { path: manifest_path, source })?;
    Ok(manifest)
}

/// Writes what is known only now into a slice's header. Gives its line of the manifest, without a canary.
fn write_digests(
    slice: &SlicePlan<'_>,
    writer: &mut GgufWriter,
    of_tensors: &[Sha],
    model_sha256: Sha,
    is_fetched: bool,
) -> Result<SliceEntry, WriteError> {
    let tensors = Array::of_strings(of_tensors.iter().map(Sha::to_string));
    writer.patch(keys::TENSOR_SHA256, &Value::Array(tensors))?;
    writer.patch(keys::MODEL_SHA256, &Value::string(model_sha256.to_string()))?;
    // its own digest stands as zeros until here, which is how it is defined
    let mut hash = Sha256::new();
    writer.read_header(|bytes| hash.update(bytes))?;
    let slice_sha256 = Sha(hash.finalize().into());
    writer.patch(keys::SLICE_SHA256, &Value::string(slice_sha256.to_string()))?;
    let recipe = match (slice.role, is_fetched) {
        (Role::Middle, true) => Recipe::of(slice, writer)?,
        _ => None,
    };
    Ok(SliceEntry {
        role: slice.role,
        first: slice.blocks.first,
        last: slice.blocks.last,
        file: slice.file.clone(),
        bytes: slice.file_bytes,
        sha256: slice_sha256.to_string(),
        input: slice.input.clone(),
        output: slice.output.clone(),
        reads_tokens: slice.reads_tokens,
        kv_bytes_per_position: slice.kv_bytes_per_position,
        state_bytes_per_session: slice.state_bytes_per_session,
        canary: None,
        recipe,
    })
}

fn model_entry(plan: &Plan<'_>, sha256: Sha) -> ModelEntry {
    ModelEntry {
        name: plan.model_name.clone(),
        sha256: sha256.to_string(),
        params_sha256: Some(plan.params_sha256.to_string()),
        arch: plan.hparams.arch.clone(),
        n_blocks: plan.n_blocks,
        n_embd: plan.hparams.n_embd,
        n_vocab: plan.hparams.n_vocab,
        n_ctx_train: plan.hparams.n_ctx_train,
        bytes: plan.gguf.file_bytes(),
        memory: plan.memory.clone(),
        source: plan.source.clone(),
    }
}

/// Flushes every file to the disk, and meanwhile finds the middles' [canaries](crate::canary) in what the system
/// still has in memory. `None` where none is wanted.
fn sync(
    plan: &Plan<'_>,
    writers: &mut [GgufWriter],
    model: Sha,
) -> Result<Vec<Option<Result<Canary, NoCanary>>>, SplitError> {
    let middle = |(slice, writer): (&SlicePlan<'_>, &GgufWriter)| {
        let wanted = plan.canary.is_some() && slice.role == Role::Middle;
        writer.temp_path().filter(|_| wanted).map(Path::to_owned)
    };
    let middles: Vec<Option<PathBuf>> = plan.slices.iter().zip(&*writers).map(middle).collect();
    // of the weights alone: the same cut gives the same manifest
    let seed = model.0.iter().take(8).fold(0, |seed, &byte| seed << 8 | u64::from(byte));
    let n_embd = plan.hparams.n_embd as usize;
    let find = |path: &PathBuf| match &plan.canary {
        Some(Ask::Apart(program)) if apart::IS_BUILT_IN => {
            let task = Task::Canary { path: path.clone(), n_embd, seed };
            task.ask(program).unwrap_or_else(|died| Err(died.into()))
        }
        _ => canary::find(path, n_embd, seed),
    };
    thread::scope(|scope| {
        let find = || middles.iter().map(|m| m.as_ref().map(find)).collect();
        let canaries = scope.spawn(find);
        writers.iter_mut().try_for_each(GgufWriter::sync)?;
        Ok(canaries.join().unwrap_or_else(|_| plan.slices.iter().map(|_| None).collect()))
    })
}

/// The folder where a model's slices go if nobody says: its own.
pub fn folder_of(model: &Path) -> &Path {
    os::folder_of(model)
}

/// The manifest's file name.
pub fn manifest_name(stem: &str) -> String {
    format!("{stem}.split.json")
}

fn check_space(plan: &Plan<'_>, out: &Path) -> Result<(), SplitError> {
    let need = plan.file_bytes().saturating_add(BESIDE_BYTES);
    match os::free_bytes(out) {
        Some(have) if have < need => Err(SplitError::Space { need, have, path: out.to_owned() }),
        _ => Ok(()),
    }
}

/// What folders and the manifest take beside the slices, about.
const BESIDE_BYTES: u64 = 1 << 20;
/// Bytes read and digested at a time: they stay in the processor's cache in between.
const DIGEST_BYTES: usize = 256 << 10;
