//! A split model on its way to a host: its files, opened and checked.
//!
//! ```text
//! SplitFiles --Split::open--> head and tail checked --assign--> every block has a holder --connect--> stages
//! ```

use std::path::{Path, PathBuf};

use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use gguf_tools::canary::Canary;
use gguf_tools::manifest::Manifest;
use gguf_tools::plan::Role;
use gguf_tools::slice::SliceInfo;

use crate::error::{DifferentModels, Error};
use crate::event::{Events, NoCanary};
use crate::stage::load;
use crate::stage::verified::{Verify, open_slice};
use crate::terms::{Expected, ExpectedRows};

/// A middle that a manifest or an argument names.
#[derive(Clone, Debug)]
pub(crate) struct MiddleFile {
    pub path: PathBuf,
    pub blocks: BlockRange,
    /// its identity, if it is known
    pub sha256: Option<Sha>,
    pub canary: Option<Canary>,
    /// what is known of the rows that go in and out
    pub rows: ExpectedRows,
}

/// The files of a split model.
#[derive(Clone, Debug)]
pub(crate) struct SplitFiles {
    pub head: PathBuf,
    pub tail: PathBuf,
    pub middles: Vec<MiddleFile>,
    /// whether a manifest names them
    has_manifest: bool,
}

impl SplitFiles {
    /// Those that dim-split wrote beside `manifest`.
    pub(crate) fn of_manifest(manifest_path: &Path) -> Result<SplitFiles, Error> {
        let manifest = Manifest::read(manifest_path)?;
        let file = |i: usize| Manifest::slice_path(manifest_path, &manifest.slices[i]);
        let last = manifest.slices.len() - 1;
        let middles = (1..last).map(|i| {
            let slice = &manifest.slices[i];
            MiddleFile {
                path: file(i),
                blocks: BlockRange { first: slice.first, last: slice.last },
                sha256: Sha::parse(&slice.sha256),
                canary: slice.canary.clone(),
                rows: ExpectedRows::of(slice),
            }
        });
        let middles = middles.collect();
        let files = SplitFiles { head: file(0), tail: file(last), middles, has_manifest: true };
        let missing = [&files.head, &files.tail].into_iter().find(|path| !path.exists()).cloned();
        match missing {
            Some(path) => Err(Error::NotBeside { path, manifest: manifest_path.to_owned() }),
            None => Ok(files),
        }
    }

    /// Those that somebody names one by one.
    pub(crate) fn of_slices(head: &Path, middles: &[PathBuf], tail: &Path) -> Result<SplitFiles, Error> {
        let middle = |path: &PathBuf| {
            let info = open_slice(path, Verify::Never, |_, _| {})?;
            if info.role != Role::Middle {
                return Err(Error::WrongRole { path: path.clone(), found: info.role, wanted: Role::Middle });
            }
            let sha256 = Some(info.slice_sha256);
            Ok(MiddleFile {
                path: path.clone(),
                blocks: info.blocks,
                sha256,
                canary: None,
                rows: ExpectedRows::default(),
            })
        };
        let middles = middles.iter().map(middle).collect::<Result<_, Error>>()?;
        Ok(SplitFiles { head: head.to_owned(), tail: tail.to_owned(), middles, has_manifest: false })
    }

    /// Every middle's file is here, to take its worker's place.
    pub(crate) fn have_reserves(&self) -> Result<(), Error> {
        match self.middles.iter().find(|middle| !middle.path.is_file()) {
            Some(middle) => Err(Error::NoReserve { blocks: middle.blocks, path: middle.path.clone() }),
            None => Ok(()),
        }
    }

    fn middle(&self, blocks: BlockRange) -> Option<&MiddleFile> {
        self.middles.iter().find(|m| m.blocks == blocks)
    }

    /// What is known of the slice with these blocks.
    pub(crate) fn expected(&self, blocks: BlockRange) -> Expected {
        let middle = self.middle(blocks);
        let rows = middle.map(|middle| middle.rows.clone()).unwrap_or_default();
        Expected { blocks, slice: middle.and_then(|middle| middle.sha256), rows }
    }

    /// What the middle with these blocks has to answer, or why that is not known.
    pub(crate) fn canary_of(&self, blocks: BlockRange) -> Result<&Canary, NoCanary> {
        let middle = self.middle(blocks);
        let canary = middle.and_then(|m| m.canary.as_ref());
        canary.ok_or(match (self.has_manifest, middle) {
            (false, _) => NoCanary::NoManifest,
            (true, Some(middle)) if middle.rows.are_not_singles() => NoCanary::OtherRows,
            (true, _) => NoCanary::NotInManifest,
        })
    }
}

/// A split model whose head and tail are checked.
pub(crate) struct Split {
    pub files: SplitFiles,
    pub head: SliceInfo,
    pub tail: SliceInfo,
    verify: Verify,
}

impl Split {
    /// Opens head and tail: both have to be of one model.
    pub(crate) fn open(files: SplitFiles, verify: Verify, events: &Events) -> Result<Split, Error> {
        let head = load::open(&files.head, Role::Head, verify, events)?;
        let tail = load::open(&files.tail, Role::Tail, verify, events)?;
        same_model(&files.head, &head, &files.tail, &tail)?;
        Ok(Split { files, head, tail, verify })
    }

    /// Opens a middle that is to run here.
    pub(crate) fn open_middle(&self, middle: &MiddleFile, events: &Events) -> Result<SliceInfo, Error> {
        if !middle.path.is_file() {
            return Err(Error::NotHere { blocks: middle.blocks, path: middle.path.clone() });
        }
        let info = load::open(&middle.path, Role::Middle, self.verify, events)?;
        same_model(&self.files.head, &self.head, &middle.path, &info)?;
        Ok(info)
    }

    /// The file of a worker's blocks, which is to take its place if it stays away, and which slice it is.
    pub(crate) fn reserve(&self, blocks: BlockRange, events: &Events) -> Result<(PathBuf, Sha), Error> {
        let middle = self.files.middle(blocks).ok_or(Error::NoReserveNamed { blocks })?;
        let info = self.open_middle(middle, events)?;
        match info.blocks == blocks && middle.sha256.is_none_or(|named| named == info.slice_sha256) {
            true => Ok((middle.path.clone(), info.slice_sha256)),
            false => Err(Error::NoReserve { blocks, path: middle.path.clone() }),
        }
    }

    /// When weights are compared with their digests.
    pub(crate) fn verify(&self) -> Verify {
        self.verify
    }
}

fn same_model(path: &Path, a: &SliceInfo, other: &Path, b: &SliceInfo) -> Result<(), Error> {
    let (path, other) = (path.to_owned(), other.to_owned());
    if a.model_sha256 == b.model_sha256 {
        return match (a.params_sha256, b.params_sha256) {
            (Some(ours), Some(theirs)) if ours != theirs => Err(Error::OtherSettings { path, other }),
            _ => Ok(()),
        };
    }
    let named = |info: &SliceInfo| (info.model_name.clone(), info.model_sha256);
    let (model, other_model) = (named(a), named(b));
    Err(Error::OtherModel(Box::new(DifferentModels { path, model, other, other_model })))
}
