//! `STEM.split.json`: what was cut, and into which files. Written last, so that it never names a file that is
//! not there.

use std::{
    borrow::Cow,
    fs::File,
    io::{self, Read as _, Write},
    path::{Path, PathBuf},
};

use dim_core::{blocks::BlockRange, canary::Canary};
use serde::{Deserialize, Serialize};

use crate::{
    failure::Explained,
    gguf::write::TempFile,
    needs::Crossing,
    recipe::{ModelSource, Recipe},
    slice::Role,
    text::Safe,
};

/// Version of the manifest's format.
pub const VERSION: u32 = 1;

/// A cut model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this format.
    pub version: u32,
    /// The model that was cut.
    pub model: ModelEntry,
    /// Its slices in order: head, middles, tail.
    pub slices: Vec<SliceEntry>,
}

/// The model of a [`Manifest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelEntry {
    /// Its name.
    pub name: String,
    /// Its identity (see [`digest`](crate::digest)), 64 hex digits.
    pub sha256: String,
    /// The digest of its parameters that are not weights, 64 hex digits; not in manifests of older cuts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub params_sha256: Option<String>,
    /// Its architecture.
    pub arch: String,
    /// Its blocks.
    pub n_blocks: u32,
    /// Values per hidden row.
    pub n_embd: u32,
    /// Tokens in the vocabulary.
    pub n_vocab: u32,
    /// Context length it was trained for.
    pub n_ctx_train: u32,
    /// Bytes of its files.
    pub bytes: u64,
    /// What is kept of past positions, for people, as `KV cache with sliding windows`; not known by a dim-split without
    /// llama.cpp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// Where it came from, if it was fetched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<ModelSource>,
}

/// A slice of a [`Manifest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceEntry {
    /// Its place.
    pub role: Role,
    /// Its first block, numbered as in the model.
    pub first: u32,
    /// Its last block, inclusive.
    pub last: u32,
    /// Its file's name, in the manifest's folder.
    pub file: String,
    /// Bytes of its file.
    pub bytes: u64,
    /// Its digest (see [`digest`](crate::digest)), 64 hex digits.
    pub sha256: String,
    /// What comes in, token by token; nothing where tokens do.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub input: Crossing,
    /// What goes out, token by token; nothing where logits do.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub output: Crossing,
    /// Whether token ids are read beside the rows.
    #[serde(default)]
    pub reads_tokens: bool,
    /// Bytes of F16 keys and values for each position of a session.
    #[serde(default)]
    pub kv_bytes_per_position: u64,
    /// Bytes of a session's state that does not grow with positions.
    #[serde(default)]
    pub state_bytes_per_session: u64,
    /// A middle's answer to a known input. Not in manifests of older cuts, nor of a dim-split without llama.cpp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<Canary>,
    /// How it is made from the model's source; only of middles, and only where the model was fetched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<Recipe>,
}

fn is_nothing(crossing: &Crossing) -> bool {
    crossing.0.is_empty()
}

/// Why a manifest could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// The operating system said no.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// A model or a slice.
    #[error("{}: a GGUF, not the manifest of a cut model", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
    },
    /// Not JSON, or not a manifest.
    #[error("{}: not a manifest of a cut model: {}", path.display(), Safe(&source.to_string()))]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A later version.
    #[error("{}: manifest version {found}, this program reads version {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The slices do not make up the model.
    #[error("{}: {why}", path.display())]
    Chain {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: BrokenChain,
    },
}

/// Why slices do not make up a model. Slices are counted from 0.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BrokenChain {
    /// Head, middles, tail, in this order.
    #[error("slice {slice} is the {found}, not the {must}")]
    Role {
        /// Which slice.
        slice: usize,
        /// What it says.
        found: Role,
        /// What stands in this place.
        must: Role,
    },
    /// A slice begins where the one before ends, and has a block.
    #[error("slice {slice} has blocks {first}..{last}, which do not follow")]
    Blocks {
        /// Which slice.
        slice: usize,
        /// What it says.
        first: u32,
        /// What it says. May be below `first`.
        last: u32,
    },
    /// A path, which could lead anywhere.
    #[error("slice {slice} is not a file beside the manifest")]
    File {
        /// Which slice.
        slice: usize,
    },
    /// What crosses a cut is not what a model has there, or one end of it says something else than the other.
    #[error("what comes into slice {slice} is not what the one before gives")]
    Crossing {
        /// Which slice.
        slice: usize,
    },
    /// Rows go into a head or come out of a tail, or none into or out of another.
    #[error("slice {slice} does not say what rows go in and come out")]
    Ends {
        /// Which slice.
        slice: usize,
    },
    /// A canary that breaks a rule.
    #[error("slice {slice}'s canary {why}")]
    Canary {
        /// Which slice.
        slice: usize,
        /// The rest of the sentence.
        why: String,
    },
    /// Blocks at the end belong to nobody, or there are more than the model has.
    #[error("the slices do not make up {n_blocks} blocks")]
    Count {
        /// Blocks of the model.
        n_blocks: u32,
    },
}

/// How a manifest comes about.
const CUT_FIRST: &str = "`dim-split MODEL.gguf --middle A..B` cuts a model and writes its manifest, MODEL.split.json, which is \
                         what is wanted here";

impl Explained for ManifestError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        match self {
            ManifestError::Version { .. } | ManifestError::Chain { .. } => Some("cut the model again".into()),
            ManifestError::Json { .. } => Some("give the STEM.split.json that dim-split wrote".into()),
            ManifestError::Gguf { .. } => Some(CUT_FIRST.into()),
            ManifestError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Some(CUT_FIRST.into())
            }
            ManifestError::Io { .. } => None,
        }
    }

    fn is_misuse(&self) -> bool {
        true
    }
}

impl SliceEntry {
    /// Its blocks, numbered as in the model. (A manifest that was read has none whose last block is before its first.)
    pub fn blocks(&self) -> BlockRange {
        BlockRange { first: self.first, last: self.last }
    }
}

impl Manifest {
    /// Reads a manifest, and checks that its slices make up the model and lie beside it.
    ///
    /// # Errors
    /// It cannot be read, is none, is of another version, or does not describe a whole chain.
    pub fn read(path: impl AsRef<Path>) -> Result<Manifest, ManifestError> {
        let path = path.as_ref();
        let io = |source| ManifestError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let mut text = Vec::new();
        (&file).take(4).read_to_end(&mut text).map_err(io)?;
        if text == b"GGUF" {
            return Err(ManifestError::Gguf { path: path.to_owned() });
        }
        // a few lines per slice, a canary of some KB and a header per middle: a larger file is something else
        // (a pipe or a device has no length that would say so)
        file.take(MAX_BYTES).read_to_end(&mut text).map_err(io)?;
        if text.len() as u64 > MAX_BYTES {
            let why = format!("more than {MAX_BYTES} bytes is no manifest");
            return Err(io(io::Error::new(io::ErrorKind::InvalidData, why)));
        }
        Manifest::from_bytes(&text, path)
    }

    /// Reads a manifest in memory, which `path` is the name of.
    ///
    /// # Errors
    /// It is none, is of another version, or does not describe a whole chain.
    pub fn from_bytes(text: &[u8], path: &Path) -> Result<Manifest, ManifestError> {
        let manifest: Manifest = serde_json::from_slice(text)
            .map_err(|source| ManifestError::Json { path: path.to_owned(), source })?;
        if manifest.version != VERSION {
            return Err(ManifestError::Version { path: path.to_owned(), found: manifest.version });
        }
        manifest.check().map_err(|why| ManifestError::Chain { path: path.to_owned(), why })?;
        Ok(manifest)
    }

    /// Writes it under its name, whole or not at all.
    ///
    /// # Errors
    /// Writing fails.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let (temp, mut file) = TempFile::create(path)?;
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        temp.publish(path)
    }

    /// Where a slice's file is, for a manifest at `path`.
    pub fn slice_path(path: &Path, slice: &SliceEntry) -> PathBuf {
        path.with_file_name(&slice.file)
    }

    fn check(&self) -> Result<(), BrokenChain> {
        let mut next = Some(0u32);
        for (slice, entry) in self.slices.iter().enumerate() {
            let must = match slice {
                0 => Role::Head,
                _ if slice + 1 == self.slices.len() => Role::Tail,
                _ => Role::Middle,
            };
            if entry.role != must {
                return Err(BrokenChain::Role { slice, found: entry.role, must });
            }
            if Some(entry.first) != next || entry.last < entry.first {
                return Err(BrokenChain::Blocks { slice, first: entry.first, last: entry.last });
            }
            // a name, not a path: a manifest cannot point outside its folder
            let plain = !entry.file.is_empty() && !entry.file.contains(['/', '\\', '\0']);
            if !plain || entry.file == "." || entry.file == ".." {
                return Err(BrokenChain::File { slice });
            }
            let before = slice.checked_sub(1).map(|before| &self.slices[before].output);
            // tokens go into the head, logits come out of the tail, and rows everywhere else
            if (entry.role == Role::Head) != entry.input.0.is_empty()
                || (entry.role == Role::Tail) != entry.output.0.is_empty()
            {
                return Err(BrokenChain::Ends { slice });
            }
            let is_whole = |crossing: &Crossing| {
                crossing.0.len() <= MAX_PARTS
                    && crossing.0.iter().all(|p| (1..=MAX_VALUES).contains(&p.values) && p.name.len() < 64)
            };
            if before.is_some_and(|before| *before != entry.input) || !is_whole(&entry.output) {
                return Err(BrokenChain::Crossing { slice });
            }
            if let Some(canary) = &entry.canary {
                canary.check().map_err(|why| BrokenChain::Canary { slice, why })?;
            }
            next = entry.last.checked_add(1);
        }
        let n_blocks = self.model.n_blocks;
        if self.slices.len() < 2 || next != Some(n_blocks) {
            return Err(BrokenChain::Count { n_blocks });
        }
        Ok(())
    }
}

/// Far more tensors than cross any model's cuts.
const MAX_PARTS: usize = 512;
/// Far above any model's width.
const MAX_VALUES: u32 = 1 << 24;
/// Most bytes of a manifest: 512 slices with a canary each take less, and so do the [recipes](crate::recipe) of dozens.
pub(crate) const MAX_BYTES: u64 = 32 << 20;
