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

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread,
};

use sha2::{Digest as _, Sha256};

use crate::{
    canary::{self, Canary},
    digest::{self, Identity, Sha},
    gguf::{
        self, Array, Tensor, Value,
        write::{GgufWriter, TensorSpec, WriteError, remove_stale},
    },
    manifest::{self, Manifest, ModelEntry, SliceEntry},
    os,
    plan::{Plan, Role, SlicePlan, Source, keys},
    slice::{self, SliceError, SliceInfo},
};

/// What a cut is doing, for whoever waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress<'a> {
    /// Bytes of tensor data written, of how many, and the file.
    Writing(u64, u64, &'a str),
    /// Flushing to the disk.
    Flushing,
    /// Bytes compared, of how many, and the file.
    Verifying(u64, u64, &'a str),
    /// This middle gets no canary: the file, and why.
    NoCanary(&'a str, &'a str),
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
    #[error("need {}, have {} in {}; free some space, or name another folder with --out", gib(*.need), gib(*.have), path.display())]
    Space {
        /// Bytes the slices take.
        need: u64,
        /// Bytes there are.
        have: u64,
        /// The folder.
        path: PathBuf,
    },
    /// The model would be overwritten by one of its slices.
    #[error("{}: a slice would take the model's own name; name another folder with --out", .0.display())]
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
    #[error("tensor '{tensor}': {why}")]
    Requantise {
        /// The tensor.
        tensor: String,
        /// What ggml said.
        why: String,
    },
    /// A slice that was just written is not what it should be.
    #[error(transparent)]
    Slice(#[from] SliceError),
    /// A slice that was just written differs from the model.
    #[error(
        "{file}: {what} differs from what was read before: the disk or the memory of this machine is at fault"
    )]
    Differs {
        /// The slice.
        file: String,
        /// The key or tensor.
        what: String,
    },
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
    mut progress: impl FnMut(Progress<'_>),
) -> Result<Manifest, SplitError> {
    let folder = |source| SplitError::Folder { path: out.to_owned(), source };
    std::fs::create_dir_all(out).map_err(folder)?;
    let targets: Vec<PathBuf> = plan.slices.iter().map(|s| out.join(&s.file)).collect();
    let manifest_path = out.join(manifest_name(stem));
    for target in targets.iter().chain([&manifest_path]) {
        remove_stale(target).map_err(folder)?;
        if plan.gguf.files().any(|file| same_file(file, target)) {
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

    progress(Progress::Flushing);
    let mut entries = Vec::with_capacity(plan.slices.len());
    for ((slice, writer), of_slice) in plan.slices.iter().zip(&mut writers).zip(&digests.of_slices) {
        let tensors = Array::of_strings(of_slice.iter().map(Sha::to_string));
        writer.patch(keys::TENSOR_SHA256, &Value::Array(tensors))?;
        writer.patch(keys::MODEL_SHA256, &Value::string(model_sha256.to_string()))?;
        // its own digest stands as zeros until here, which is how it is defined
        let mut hash = Sha256::new();
        writer.read_header(|bytes| hash.update(bytes))?;
        let slice_sha256 = Sha(hash.finalize().into());
        writer.patch(keys::SLICE_SHA256, &Value::string(slice_sha256.to_string()))?;
        entries.push(SliceEntry {
            role: slice.role,
            first: slice.blocks.first,
            last: slice.blocks.last,
            file: slice.file.clone(),
            bytes: slice.file_bytes,
            sha256: slice_sha256.to_string(),
            canary: None,
        });
    }
    let canaries = sync(plan, &mut writers, model_sha256)?;
    for (entry, canary) in entries.iter_mut().zip(canaries) {
        match canary {
            Some(Ok(canary)) => entry.canary = Some(canary),
            Some(Err(why)) => progress(Progress::NoCanary(&entry.file, &why)),
            None => {}
        }
    }
    for writer in writers {
        writer.publish()?;
    }

    let manifest = Manifest {
        version: manifest::VERSION,
        model: ModelEntry {
            name: plan.model_name.clone(),
            sha256: model_sha256.to_string(),
            params_sha256: Some(plan.params_sha256.to_string()),
            arch: plan.hparams.arch.clone(),
            n_blocks: plan.hparams.n_blocks,
            n_embd: plan.hparams.n_embd,
            n_vocab: plan.hparams.n_vocab,
            n_ctx_train: plan.hparams.n_ctx_train,
            bytes: plan.gguf.file_bytes(),
        },
        slices: entries,
    };
    manifest.write(&manifest_path).map_err(|source| SplitError::Manifest { path: manifest_path, source })?;
    Ok(manifest)
}

/// Flushes every file to the disk, and meanwhile finds the middles' [canaries](crate::canary) in what the system
/// still has in memory. `None` where none is wanted.
fn sync(
    plan: &Plan<'_>,
    writers: &mut [GgufWriter],
    model: Sha,
) -> Result<Vec<Option<Result<Canary, String>>>, SplitError> {
    let middle = |(slice, writer): (&SlicePlan<'_>, &GgufWriter)| {
        let wanted = plan.canary && slice.role == Role::Middle;
        writer.temp_path().filter(|_| wanted).map(Path::to_owned)
    };
    let middles: Vec<Option<PathBuf>> = plan.slices.iter().zip(&*writers).map(middle).collect();
    // of the weights alone: the same cut gives the same manifest
    let seed = model.0.iter().take(8).fold(0, |seed, &byte| seed << 8 | u64::from(byte));
    let n_embd = plan.hparams.n_embd as usize;
    thread::scope(|scope| {
        let find =
            || middles.iter().map(|m| m.as_ref().map(|path| canary::find(path, n_embd, seed))).collect();
        let canaries = scope.spawn(find);
        writers.iter_mut().try_for_each(GgufWriter::sync)?;
        Ok(canaries.join().unwrap_or_else(|_| vec![None; plan.slices.len()]))
    })
}

/// The manifest's file name.
pub fn manifest_name(stem: &str) -> String {
    format!("{stem}.split.json")
}

/// Re-reads the slices and the model from the disk, and compares everything: every digest, every key, every
/// tensor.
///
/// # Errors
/// The first difference, by the name of its key or tensor.
pub fn verify(
    plan: &Plan<'_>,
    out: &Path,
    manifest: &Manifest,
    mut progress: impl FnMut(Progress<'_>),
) -> Result<(), SplitError> {
    let total = plan.slices.iter().map(|s| s.weight_bytes).sum::<u64>() + plan.gguf.tensor_bytes();
    let mut before = 0;
    let mut buf = vec![0; DIGEST_BYTES];

    // the model once more, so that a bad read of the first pass does not become the truth
    let model_file = plan.gguf.path().display().to_string();
    plan.gguf.files().for_each(os::forget_cached);
    let mut of_model = Vec::with_capacity(plan.gguf.n_tensors());
    let mut identity = Identity::default();
    for tensor in plan.gguf.tensors() {
        let sha = digest::of_tensor(&tensor, &mut buf, |n| {
            before += n;
            progress(Progress::Verifying(before, total, &model_file));
        })?;
        identity.add(tensor.name(), tensor.tensor_type(), tensor.dims(), sha);
        of_model.push(sha);
    }
    if identity.finish().to_string() != manifest.model.sha256 {
        let what = "its identity, read again,".to_owned();
        return Err(SplitError::Differs { file: model_file, what });
    }

    for (slice, entry) in plan.slices.iter().zip(&manifest.slices) {
        let path = out.join(&slice.file);
        os::forget_cached(&path);
        let gguf = gguf::Gguf::open(&path)?;
        let info = slice::verify_opened(&gguf, |done, _| {
            progress(Progress::Verifying(before + done, total, &slice.file));
        })?;
        before += slice.weight_bytes;
        compare(slice, &gguf, &info, entry, manifest, &of_model, plan)?;
    }
    Ok(())
}

/// A slice that agrees with itself, against the plan and the model.
fn compare(
    slice: &SlicePlan<'_>,
    gguf: &gguf::Gguf,
    info: &SliceInfo,
    entry: &SliceEntry,
    manifest: &Manifest,
    of_model: &[Sha],
    plan: &Plan<'_>,
) -> Result<(), SplitError> {
    let differs = |what: &str| Err(SplitError::Differs { file: slice.file.clone(), what: what.to_owned() });
    if info.model_sha256.to_string() != manifest.model.sha256 || info.slice_sha256.to_string() != entry.sha256
    {
        return differs("its identity");
    }
    if gguf.metadata().len() != slice.metadata.len() || gguf.n_tensors() != slice.tensors.len() {
        return differs("the number of keys or tensors");
    }
    let patched = [keys::MODEL_SHA256, keys::SLICE_SHA256, keys::TENSOR_SHA256];
    for (found, (key, value)) in gguf.metadata().zip(&slice.metadata) {
        if found.key != key || !patched.contains(&found.key) && !same_value(&found.value, value) {
            return differs(found.key);
        }
    }
    let digests = gguf.get(keys::TENSOR_SHA256);
    let digests = digests.as_ref().and_then(Value::as_array);
    let digests: Vec<&[u8]> = digests.map(|a| a.strings().collect()).unwrap_or_default();
    for (i, (found, (spec, source))) in gguf.tensors().zip(&slice.tensors).enumerate() {
        let described =
            found.name() == spec.name && found.tensor_type() == spec.tensor_type && found.dims() == spec.dims;
        let carried = match source {
            // equal digests of what was just read from both
            Source::Whole(tensor) => {
                digests.get(i) == Some(&of_model[index_of(plan, tensor)].to_string().as_bytes())
            }
            Source::Start(tensor) => {
                let (mut a, mut b) = (vec![0; found.n_bytes() as usize], vec![0; found.n_bytes() as usize]);
                found.read_at(0, &mut a)?;
                tensor.read_at(0, &mut b)?;
                a == b
            }
            // has no counterpart; its own digest was compared
            Source::Requantised(_) | Source::Placeholder => true,
        };
        if !described || !carried {
            return differs(&spec.name);
        }
    }
    Ok(())
}

/// Equal to the bit: a NaN equals itself.
fn same_value(a: &Value<'_>, b: &Value<'_>) -> bool {
    let bytes = |v: &Value<'_>| {
        let mut out = Vec::new();
        v.encode(&mut out);
        out
    };
    a == b || a.value_type() == b.value_type() && bytes(a) == bytes(b)
}

fn index_of(plan: &Plan<'_>, tensor: &Tensor<'_>) -> usize {
    plan.gguf.index_of(tensor)
}

fn check_space(plan: &Plan<'_>, out: &Path) -> Result<(), SplitError> {
    // a little more than the files: folders and the manifest take room as well
    let need = plan.file_bytes().saturating_add(1 << 20);
    match os::free_bytes(out) {
        Some(have) if have < need => Err(SplitError::Space { need, have, path: out.to_owned() }),
        _ => Ok(()),
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

/// `9.3 GiB`, as people read sizes.
pub fn gib(bytes: u64) -> String {
    const GIB: f64 = (1u64 << 30) as f64;
    const MIB: f64 = (1u64 << 20) as f64;
    match bytes as f64 {
        b if b >= 0.1 * GIB => format!("{:.1} GiB", b / GIB),
        b => format!("{:.1} MiB", b / MIB),
    }
}

/// Digests found on the way.
struct Digests {
    /// Of the model's tensors, in its order.
    of_model: Vec<Sha>,
    /// Of each slice's tensors, in its order.
    of_slices: Vec<Vec<Sha>>,
}

/// Bytes copied between two looks at the clock and the other threads.
const PIECE_BYTES: u64 = 4 << 20;
/// Bytes read and digested at a time: they stay in the processor's cache in between.
const DIGEST_BYTES: usize = 256 << 10;
/// Pieces that copying may be ahead of digesting: what was copied is then still cached by the system.
const PIECES_AHEAD: usize = 32;
/// Digesting takes longer than copying: two threads share it, tensor by tensor.
const DIGESTERS: usize = 2;
/// Bytes written between two flushes.
const FLUSH_BYTES: u64 = 128 << 20;

/// Work for a digesting thread.
enum Piece<'a> {
    /// Bytes of a tensor of the model, from a byte on.
    Data(Tensor<'a>, u64, u64),
    Zeros(u64),
    /// The tensor is complete: report its digest under this number.
    End(usize),
}

/// Streams all data into the writers.
fn stream(
    plan: &Plan<'_>,
    writers: &mut [GgufWriter],
    progress: &mut impl FnMut(Progress<'_>),
) -> Result<Digests, SplitError> {
    thread::scope(|scope| {
        let (report, reports) = channel();
        let lanes: Vec<Lane<'_>> = (0..DIGESTERS)
            .map(|_| {
                let (pieces, work) = sync_channel(PIECES_AHEAD);
                let waiting = Arc::new(AtomicU64::new(0));
                let (report, counter) = (report.clone(), waiting.clone());
                scope.spawn(move || digest_pieces(&work, &counter, &report));
                Lane { pieces, waiting }
            })
            .collect();
        drop(report);
        // another thread keeps the disk busy from the start, so that little is left to flush at the end
        let (to_flush, files) = sync_channel::<File>(0);
        scope.spawn(move || files.iter().for_each(|file| drop(file.sync_data())));

        let written = write_all(plan, writers, &lanes, &to_flush, progress);
        drop(lanes);
        let mut shas = vec![None; plan.gguf.n_tensors()];
        let mut others = Vec::new();
        // a failed read shows here, and is the reason that a lane closed early
        for (number, sha) in reports {
            match shas.get_mut(number) {
                Some(slot) => *slot = Some(sha?),
                None => others.push((number, sha?)),
            }
        }
        let Written { requantised, of_slices } = written?;
        for (index, sha) in requantised {
            shas[index] = Some(sha);
        }
        // what no slice carries whole still belongs to the model's identity
        let mut buf = vec![0; DIGEST_BYTES];
        let of_model = plan
            .gguf
            .tensors()
            .zip(shas)
            .map(|(tensor, sha)| sha.map_or_else(|| digest::of_tensor(&tensor, &mut buf, |_| {}), Ok))
            .collect::<Result<Vec<Sha>, _>>()?;
        let sha_of = |slot: &Slot| match *slot {
            Slot::Known(sha) => Some(sha),
            Slot::Number(n) if n < of_model.len() => Some(of_model[n]),
            Slot::Number(n) => others.iter().find(|(number, _)| *number == n).map(|&(_, sha)| sha),
        };
        let of_slices = of_slices
            .iter()
            .map(|slots| slots.iter().map(|s| sha_of(s).expect("every piece of work is answered")).collect())
            .collect();
        Ok(Digests { of_model, of_slices })
    })
}

/// Where a slice's tensor finds its digest.
enum Slot {
    Known(Sha),
    /// Reported under this number: below the number of tensors, it is that tensor of the model.
    Number(usize),
}

/// What writing left to be answered.
struct Written {
    /// Digests of the model's tensors that were converted on the way.
    requantised: Vec<(usize, Sha)>,
    of_slices: Vec<Vec<Slot>>,
}

/// The main thread: copies, and hands out the digesting.
fn write_all<'a>(
    plan: &Plan<'a>,
    writers: &mut [GgufWriter],
    lanes: &[Lane<'a>],
    to_flush: &SyncSender<File>,
    progress: &mut impl FnMut(Progress<'_>),
) -> Result<Written, SplitError> {
    let total = plan.slices.iter().map(|s| s.weight_bytes).sum();
    let (mut done, mut unflushed) = (0, 0);
    let mut given = vec![false; plan.gguf.n_tensors()];
    let mut next_number = plan.gguf.n_tensors();
    let mut written = Written { requantised: Vec::new(), of_slices: Vec::new() };
    for (slice, writer) in plan.slices.iter().zip(writers) {
        let mut slots = Vec::with_capacity(slice.tensors.len());
        for (spec, source) in &slice.tensors {
            let n_bytes = spec.n_bytes().unwrap_or(0);
            let mut advance = |n: u64| {
                done += n;
                unflushed += n;
                progress(Progress::Writing(done, total, &slice.file));
                // a rendezvous: while a flush is on its way, the next one waits for its turn
                unflushed >= FLUSH_BYTES
            };
            let number = match source {
                Source::Whole(tensor) => plan.gguf.index_of(tensor),
                _ => {
                    next_number += 1;
                    next_number - 1
                }
            };
            // what a slice before carried as well needs no second digest
            let digest = !given.get_mut(number).is_some_and(|given| std::mem::replace(given, true));
            let lane = lanes.iter().min_by_key(|lane| lane.waiting.load(Ordering::Relaxed));
            let lane = lane.filter(|_| digest);
            let mut flush = false;
            match source {
                Source::Requantised(tensor) => {
                    let (sha, of_source) = requantise(tensor, spec, writer, &mut |n| flush |= advance(n))?;
                    written.requantised.push((plan.gguf.index_of(tensor), of_source));
                    slots.push(Slot::Known(sha));
                }
                Source::Whole(tensor) | Source::Start(tensor) => {
                    for at in (0..n_bytes).step_by(PIECE_BYTES as usize) {
                        let n = PIECE_BYTES.min(n_bytes - at);
                        writer.copy(tensor, at, n)?;
                        lane.iter().for_each(|lane| lane.give(Piece::Data(*tensor, at, n), n));
                        flush |= advance(n);
                    }
                    slots.push(Slot::Number(number));
                }
                Source::Placeholder => {
                    for at in (0..n_bytes).step_by(DIGEST_BYTES) {
                        let n = (DIGEST_BYTES as u64).min(n_bytes - at);
                        writer.write(&[0; DIGEST_BYTES][..n as usize])?;
                        lane.iter().for_each(|lane| lane.give(Piece::Zeros(n), n));
                        flush |= advance(n);
                    }
                    slots.push(Slot::Number(number));
                }
            }
            if !matches!(source, Source::Requantised(_)) {
                lane.iter().for_each(|lane| lane.give(Piece::End(number), 0));
            }
            if flush
                && let Ok(file) = writer.file()
                && to_flush.try_send(file).is_ok()
            {
                unflushed = 0;
            }
        }
        written.of_slices.push(slots);
    }
    Ok(written)
}

/// A digesting thread, as the main thread sees it.
struct Lane<'a> {
    pieces: SyncSender<Piece<'a>>,
    /// Bytes it was given and has not digested yet.
    waiting: Arc<AtomicU64>,
}

impl<'a> Lane<'a> {
    fn give(&self, piece: Piece<'a>, n_bytes: u64) {
        self.waiting.fetch_add(n_bytes, Ordering::Relaxed);
        // a closed lane has reported why
        let _ = self.pieces.send(piece);
    }
}

/// Digests what comes until there is no more, or until reading fails.
fn digest_pieces(
    pieces: &Receiver<Piece<'_>>,
    waiting: &AtomicU64,
    report: &Sender<(usize, Result<Sha, gguf::Error>)>,
) {
    let mut hash = Sha256::new();
    let mut buf = vec![0; DIGEST_BYTES];
    let mut failed = None;
    for piece in pieces {
        let n_bytes = match piece {
            Piece::Data(tensor, at, n) => {
                let mut done = 0;
                while done < n && failed.is_none() {
                    let step = (n - done).min(DIGEST_BYTES as u64) as usize;
                    match tensor.read_at(at + done, &mut buf[..step]) {
                        Ok(()) => hash.update(&buf[..step]),
                        Err(e) => failed = Some(e),
                    }
                    done += step as u64;
                }
                n
            }
            Piece::Zeros(n) => {
                hash.update(&[0; DIGEST_BYTES][..n as usize]);
                n
            }
            Piece::End(number) => {
                let sha = Sha(hash.finalize_reset().into());
                // the main thread listens until all work is answered
                let _ = report.send((number, failed.take().map_or(Ok(sha), Err)));
                0
            }
        };
        waiting.fetch_sub(n_bytes, Ordering::Relaxed);
    }
}

/// Writes a tensor in another type. Returns the digests of what was written and of what was read.
fn requantise(
    tensor: &Tensor<'_>,
    spec: &TensorSpec,
    writer: &mut GgufWriter,
    advance: &mut impl FnMut(u64),
) -> Result<(Sha, Sha), SplitError> {
    let (mut written, mut read) = (Sha256::new(), Sha256::new());
    crate::requantise::rows(tensor, spec.tensor_type, |from, to| {
        read.update(from);
        written.update(to);
        writer.write(to)?;
        advance(to.len() as u64);
        Ok(())
    })?;
    Ok((Sha(written.finalize().into()), Sha(read.finalize().into())))
}
