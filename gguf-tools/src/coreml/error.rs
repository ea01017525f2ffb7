//! Why packages cannot be written.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use dim_core::blocks::BlockRange;

use super::limits::{ARCHITECTURES, CTX_STEP, MAX_CTX, MAX_PREFILL, MIN_PREFILL};
use crate::failure::Explained;
use crate::gguf::{self, TensorType};
use crate::text::gib;

/// Why packages cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model file itself.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    /// An architecture without a program.
    #[error(
        "no Core ML program for architecture \"{arch}\": there is one for {}",
        ARCHITECTURES.join(", ")
    )]
    Architecture {
        /// What the file says.
        arch: String,
    },
    /// A key that a program needs.
    #[error("the model has no key \"{0}\", which its Core ML program needs")]
    KeyMissing(String),
    /// A key whose value no program here is right for.
    #[error("key \"{key}\": {why}")]
    Key {
        /// The key.
        key: String,
        /// What about it.
        why: String,
    },
    /// A tensor that a program needs.
    #[error("the model has no tensor \"{0}\", which its Core ML program needs")]
    TensorMissing(String),
    /// A tensor that no program here would use.
    #[error("tensor \"{tensor}\" has no place in the Core ML program of architecture \"{arch}\"")]
    TensorUnknown {
        /// Its name.
        tensor: String,
        /// The model's architecture.
        arch: &'static str,
    },
    /// A tensor of another shape than the dimensions give.
    #[error("tensor \"{tensor}\" has shape {found:?} where the model's dimensions give {wanted:?}")]
    TensorShape {
        /// Its name.
        tensor: String,
        /// Its shape, row length first.
        found: Vec<u64>,
        /// The shape it should have.
        wanted: Vec<u64>,
    },
    /// A tensor of a type that cannot be turned into F16.
    #[error("tensor \"{tensor}\" is of type {found}, which cannot be turned into F16", found = .found.name())]
    TensorType {
        /// Its name.
        tensor: String,
        /// Its type.
        found: TensorType,
    },
    /// A quantised tensor in a build that cannot read it.
    #[error(
        "tensor \"{tensor}\" is of type {found}: turning it into F16 takes ggml, which this dim-split was built without",
        found = .found.name()
    )]
    NeedsEngine {
        /// Its name.
        tensor: String,
        /// Its type.
        found: TensorType,
    },
    /// ggml refused.
    #[error("tensor \"{tensor}\" cannot be dequantised: {why}")]
    Dequantise {
        /// Its name.
        tensor: String,
        /// ggml's reason.
        why: String,
    },
    /// A value that F16 does not hold.
    #[error(
        "tensor \"{tensor}\" holds {value}, which F16 does not (at most 65504); the phone computes in F16"
    )]
    TensorValue {
        /// Its name.
        tensor: String,
        /// The value.
        value: f32,
    },
    /// Blocks that are no middle.
    #[error("blocks {blocks}: a middle of a model of {n_blocks} blocks is a range within 1..{}", n_blocks.saturating_sub(2))]
    Blocks {
        /// Asked for.
        blocks: BlockRange,
        /// Blocks of the model.
        n_blocks: u32,
    },
    /// A context length the program cannot have.
    #[error("a context of {n_ctx}: no program of Core ML has such a one")]
    Ctx {
        /// Asked for.
        n_ctx: u32,
    },
    /// A chunk the program cannot have.
    #[error("chunks of {n_prefill}: no program of Core ML has such")]
    Prefill {
        /// Asked for.
        n_prefill: u32,
        /// Context length.
        n_ctx: u32,
    },
    /// One block is too much for a package.
    #[error("packages of {max_bytes} bytes: block {block} alone takes {bytes}")]
    MaxBytes {
        /// Asked for.
        max_bytes: u64,
        /// The block.
        block: u32,
        /// What it takes.
        bytes: u64,
    },
    /// Not enough room on the disk.
    #[error("need {}, have {} in {}", gib(*.need), gib(*.have), path.display())]
    Space {
        /// Bytes all files take.
        need: u64,
        /// Bytes there are.
        have: u64,
        /// The folder.
        path: PathBuf,
    },
    /// Something else has the directory's name.
    #[error("\"{}\" is in the way, and is not a directory of packages that dim-split wrote", .0.display())]
    InTheWay(PathBuf),
    /// The disk.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// llama.cpp could not evaluate the self-test.
    #[cfg(feature = "engine")]
    #[error("self-test vectors: {0}")]
    Engine(#[from] llama_sys_patch::Error),
    /// It could, and the values are beyond what any scale helps.
    #[error("|hidden| reaches {max_abs:e}: no scale brings that into fp16")]
    HiddenTooLarge {
        /// Greatest measured.
        max_abs: f32,
    },
    /// It could, and the values are no numbers.
    #[error(
        "self-test vectors: block {block} makes {count} values that are not finite: the model file is damaged"
    )]
    NotFinite {
        /// The block.
        block: u32,
        /// How many of its values.
        count: u64,
    },
}

impl Explained for Error {
    fn hint(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Error::Gguf(e) => return e.hint(),
            Error::Architecture { .. }
            | Error::Key { .. }
            | Error::TensorUnknown { .. }
            | Error::HiddenTooLarge { .. } => "run these blocks as a GGUF slice instead".into(),
            Error::NeedsEngine { .. } => "build it with the feature `engine`".into(),
            Error::Ctx { .. } => {
                let step = CTX_STEP;
                format!("give a multiple of {step} between {step} and {MAX_CTX}").into()
            }
            Error::Prefill { n_ctx, .. } => {
                format!("give {MIN_PREFILL} to {MAX_PREFILL} rows, at most the context of {n_ctx}").into()
            }
            Error::MaxBytes { bytes, .. } => format!("give it at least {bytes}").into(),
            Error::Space { .. } => "free some space, or name another folder".into(),
            Error::InTheWay(_) => "move it".into(),
            #[cfg(feature = "engine")]
            Error::Engine(_) => "leave them out: the phone cannot check itself then".into(),
            _ => return None,
        })
    }

    fn is_misuse(&self) -> bool {
        match self {
            Error::Io { .. } => false,
            #[cfg(feature = "engine")]
            Error::Engine(_) => false,
            _ => true,
        }
    }
}

/// An [`io::Error`] with the path it is about.
pub(crate) trait IoContext<T> {
    fn at(self, path: &Path) -> Result<T, Error>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, path: &Path) -> Result<T, Error> {
        self.map_err(|source| Error::Io { path: path.into(), source })
    }
}
