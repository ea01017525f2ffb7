//! A slice, made from its [recipe](crate::recipe): its header is in the manifest, its tensors are byte ranges of the source.
//!
//! It grows in a file beside its place. Whoever goes on with one believes nothing of it: every tensor there is compared with
//! its digest, and what differs is fetched. At the end the whole file is read once more, against the digests in its header
//! and the slice's in the manifest, and only then it gets its name.

use std::{
    fs::{self, File},
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use dim_core::blocks::BlockRange;

use super::{
    HubError, OnBytes, Settings,
    download::{COMMIT_DIGITS, address, at_repo, check_space, open_part},
    http::{Client, Remote},
    place::{is_hex, is_inside, is_repo},
};
use crate::{
    digest::{self, Sha},
    gguf::Gguf,
    manifest::{self, Manifest, SliceEntry},
    os,
    recipe::{ModelSource, Piece, Recipe},
    slice::{self, Role, SliceInfo},
};

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The slice was there.
    Present,
    /// It was fetched.
    Fetched {
        /// Bytes that were asked for: those of tensors that were not there yet, and of the gaps between them.
        bytes: u64,
    },
}

/// Whether a manifest is named by its address.
pub fn is_url(text: &str) -> bool {
    text.starts_with("http://") || text.starts_with("https://")
}

/// Reads a manifest from a file or, by its address, from a server.
///
/// # Errors
/// It cannot be read, or is none.
pub fn fetch_manifest(settings: &Settings, from: &str) -> Result<Manifest, HubError> {
    if !is_url(from) {
        return Ok(Manifest::read(from)?);
    }
    let text = Client::new(settings)?.small(from, from, manifest::MAX_BYTES)?;
    Ok(Manifest::from_bytes(&text, Path::new(from))?)
}

/// The middle of these blocks, or the only one. `name` is the manifest's, for errors.
///
/// # Errors
/// There is none, or more than one.
pub fn middle<'m>(
    manifest: &'m Manifest,
    blocks: Option<BlockRange>,
    name: &str,
) -> Result<&'m SliceEntry, HubError> {
    let middles = || manifest.slices.iter().filter(|entry| entry.role == Role::Middle);
    let mut found = middles().filter(|entry| blocks.is_none_or(|blocks| blocks == entry.blocks()));
    match (found.next(), found.next()) {
        (Some(entry), None) => Ok(entry),
        (first, _) => Err(HubError::Middle {
            manifest: name.to_owned(),
            why: if first.is_none() { "has no such middle" } else { "has more than one middle" },
            middles: middles().map(|entry| entry.blocks().to_string()).collect(),
        }),
    }
}

/// Makes a slice at `target` from the model's source, identical to the one that was cut. What is there already is not
/// fetched again.
///
/// # Errors
/// The manifest does not say how, the source cannot be had, or what arrives is not what the manifest says. What had
/// arrived is kept.
pub fn fetch_slice(
    settings: &Settings,
    manifest: &Manifest,
    entry: &SliceEntry,
    target: &Path,
    progress: OnBytes<'_>,
) -> Result<Outcome, HubError> {
    if is_whole(target, entry) {
        return Ok(Outcome::Present);
    }
    let source =
        manifest.model.source.as_ref().ok_or_else(|| HubError::NoSource(manifest.model.name.clone()))?;
    let wrong = |why| HubError::Recipe { slice: entry.file.clone(), why };
    let recipe = entry
        .recipe
        .as_ref()
        .ok_or_else(|| wrong("has no recipe: it is not made of the model's bytes alone"))?;
    check_source(source).map_err(wrong)?;
    let client = Client::new(settings)?;
    let mut growing = Growing::open(target, entry, recipe, source)?;
    let runs = runs(&growing.missing, &recipe.pieces);
    let total: u64 = runs.iter().map(|run| run.end - run.start).sum();
    check_space(os::folder_of(&growing.part), total)?;
    let mut before = 0;
    for run in &runs {
        growing
            .fetch(&client, source, recipe, run, &mut |done| progress(before + done, total, &entry.file))?;
        before += run.end - run.start;
    }
    growing.finish(target, entry)?;
    Ok(Outcome::Fetched { bytes: total })
}

/// Whether the slice is there: the right one by its digest, and of its size. Its data is compared when it is loaded.
fn is_whole(target: &Path, entry: &SliceEntry) -> bool {
    fs::metadata(target).is_ok_and(|meta| meta.len() == entry.bytes)
        && SliceInfo::read(target).is_ok_and(|info| info.slice_sha256.to_string() == entry.sha256)
}

/// The names that become addresses.
fn check_source(source: &ModelSource) -> Result<(), &'static str> {
    let is_file = |name: &str, sha256: &str| is_inside(name) && Sha::parse(sha256).is_some();
    match () {
        () if !is_repo(&source.repo) || !is_hex(&source.revision, COMMIT_DIGITS) => {
            Err("the manifest names no commit of a repository")
        }
        () if !source.files.iter().all(|file| is_file(&file.name, &file.sha256)) => {
            Err("the manifest names no files of a repository")
        }
        () => Ok(()),
    }
}

/// A slice that is not complete yet.
struct Growing {
    part: PathBuf,
    file: File,
    /// Where each tensor's data goes, in bytes from the file's start.
    places: Vec<u64>,
    /// Which tensors are still to come.
    missing: Vec<usize>,
}

/// Neighbouring tensors of the source.
struct Run {
    /// Indices of its pieces, in the order of their data.
    pieces: Vec<usize>,
    file: u32,
    start: u64,
    end: u64,
}

impl Growing {
    /// Opens what is there, or begins: the header, and room for the data.
    fn open(
        target: &Path,
        entry: &SliceEntry,
        recipe: &Recipe,
        source: &ModelSource,
    ) -> Result<Growing, HubError> {
        let wrong = |why| HubError::Recipe { slice: entry.file.clone(), why };
        let header = recipe.header_bytes().ok_or_else(|| wrong("its recipe's header is not hex"))?;
        if header.len() as u64 > entry.bytes {
            return Err(wrong("its recipe's header is longer than the slice"));
        }
        let name = target.file_name().ok_or_else(|| wrong("it has no place to go"))?;
        let part = target.with_file_name(format!(".{}.fetch-part", name.to_string_lossy()));
        let io = |source| HubError::Io { path: part.clone(), source };
        let mut file = open_part(&part)?;
        let goes_on = file.metadata().map_err(io)?.len() == entry.bytes;
        if !goes_on {
            file.set_len(0).map_err(io)?;
        }
        file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&header)).map_err(io)?;
        file.set_len(entry.bytes).map_err(io)?;
        let gguf = Gguf::open(&part)?;
        let places = check_pieces(&gguf, recipe, source).map_err(wrong)?;
        let missing = if goes_on { missing(&gguf)? } else { (0..places.len()).collect() };
        Ok(Growing { part, file, places, missing })
    }

    /// Brings the tensors of a run to their places.
    fn fetch(
        &mut self,
        client: &Client<'_>,
        source: &ModelSource,
        recipe: &Recipe,
        run: &Run,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), HubError> {
        let of = &source.files[run.file as usize];
        let url = address(client.settings, &source.repo, &source.revision, &of.name);
        let remote = Remote { url, what: &of.name, bytes: of.bytes, etag: None };
        let mut at = run.start;
        let mut pieces = run.pieces.iter().peekable();
        let result = client.range(&remote, run.start, run.end, &mut |bytes| {
            let end = at + bytes.len() as u64;
            while let Some(&&index) = pieces.peek() {
                let piece = &recipe.pieces[index];
                let (from, to) = (piece.offset.max(at), (piece.offset + piece.bytes).min(end));
                if from < to {
                    let to_write = &bytes[(from - at) as usize..(to - at) as usize];
                    let place = SeekFrom::Start(self.places[index] + (from - piece.offset));
                    let written = self.file.seek(place).and_then(|_| self.file.write_all(to_write));
                    written.map_err(|source| HubError::Io { path: self.part.clone(), source })?;
                }
                if piece.offset + piece.bytes > end {
                    break;
                }
                pieces.next();
            }
            at = end;
            progress(at - run.start);
            Ok(())
        });
        result.map_err(|e| at_repo(e, client.settings, &source.repo))
    }

    /// Reads all of it, and gives it its name.
    fn finish(self, target: &Path, entry: &SliceEntry) -> Result<(), HubError> {
        let io = |source| HubError::Io { path: self.part.clone(), source };
        self.file.sync_all().map_err(io)?;
        let gguf = Gguf::open(&self.part)?;
        let info = slice::verify_opened(&gguf, |_, _| {})?;
        let found = info.slice_sha256.to_string();
        if found != entry.sha256 {
            let expected = entry.sha256.clone();
            return Err(HubError::Hash { what: entry.file.clone(), expected, found });
        }
        fs::rename(&self.part, target).and_then(|()| os::sync_folder(target)).map_err(io)
    }
}

/// Where each tensor of a header goes, if the pieces are those tensors and lie inside the source.
fn check_pieces(gguf: &Gguf, recipe: &Recipe, source: &ModelSource) -> Result<Vec<u64>, &'static str> {
    if gguf.n_tensors() != recipe.pieces.len() {
        return Err("its recipe has another number of tensors than its header");
    }
    let mut places = Vec::with_capacity(recipe.pieces.len());
    for (tensor, piece) in gguf.tensors().zip(&recipe.pieces) {
        if tensor.name() != piece.tensor || tensor.n_bytes() != piece.bytes {
            return Err("its recipe has other tensors than its header");
        }
        let file = source.files.get(piece.file as usize).ok_or("its recipe has a tensor of no file")?;
        if piece.offset.checked_add(piece.bytes).is_none_or(|end| end > file.bytes) {
            return Err("its recipe has a tensor past the end of its file");
        }
        places.push(tensor.file_offset());
    }
    Ok(places)
}

/// Which tensors are not what the header says.
fn missing(gguf: &Gguf) -> Result<Vec<usize>, HubError> {
    let digests = slice::tensor_digests(gguf);
    let mut buf = vec![0; 256 << 10];
    let mut missing = Vec::new();
    for (index, tensor) in gguf.tensors().enumerate() {
        let found = digest::of_tensor(&tensor, &mut buf, |_| {})?;
        if digests.get(index) != Some(&Some(found)) {
            missing.push(index);
        }
    }
    Ok(missing)
}

/// Tensors that stand side by side, but for the padding between them, in one run.
fn runs(missing: &[usize], pieces: &[Piece]) -> Vec<Run> {
    let mut order = missing.to_vec();
    order.sort_by_key(|&index| (pieces[index].file, pieces[index].offset));
    let mut runs: Vec<Run> = Vec::new();
    for index in order {
        let Piece { file, offset, bytes, .. } = pieces[index];
        let end = offset + bytes;
        match runs.last_mut() {
            Some(run) if run.file == file && offset >= run.end && offset - run.end <= MAX_GAP_BYTES => {
                run.pieces.push(index);
                run.end = end;
            }
            _ => runs.push(Run { pieces: vec![index], file, start: offset, end }),
        }
    }
    runs
}

/// What alignment may leave between two tensors, and what is not worth a request of its own.
const MAX_GAP_BYTES: u64 = 256;
