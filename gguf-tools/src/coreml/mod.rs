//! The middle of a model as Core ML packages: what a phone runs.
//!
//! From a mapped GGUF straight to `.mlpackage` directories, in constant memory and at the disk's speed: no Python, no
//! framework, no intermediate files. docs/COREML.md has the format, the choices and what they rest on.
//!
//! The steps, in order:
//! 1. [`shape`]: read the model's dimensions; refuse what the programs would not compute right.
//! 2. [`weights`]: lay out each package's weight file, before a byte of it is read.
//! 3. [`selftest`]: llama.cpp evaluates a text through the same blocks: the vectors a worker checks itself with, and
//!    the greatest |hidden|, which decides the residual scale.
//! 4. [`graph`] over [`mil`] over [`proto`]: the programs.
//! 5. [`package`]: write everything into a directory of a temporary name; [`manifest`] last; rename.
//!
//! What it is not: a converter of models. It writes these blocks, of these four architectures.

mod error;
pub mod graph;
pub mod limits;
pub mod manifest;
pub mod mil;
pub mod package;
mod plan;
pub mod proto;
#[cfg(feature = "engine")]
pub mod selftest;
pub mod shape;
pub mod types;
pub mod weights;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dim_core::blocks::BlockRange;

pub use error::Error;
pub(crate) use error::IoContext;
pub use plan::PackagePlan;

use crate::gguf::{Gguf, TensorType};
use crate::os;
use manifest::Manifest;

/// Above this the residual stream is scaled down: half of what fp16 holds, because a text is only a sample.
pub const SCALE_ABOVE: f32 = 30_000.0;
/// What the scaled stream stays under: there its squares stay in fp16 too, see [`graph::NORM_SCALE`].
pub const SCALED_BELOW: f32 = 16_320.0;

/// Whose blocks they are, as the GGUF slices' manifest says.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    /// Name of the model, for people.
    pub model_name: &'a str,
    /// Identity of the model, 64 hex digits.
    pub model_sha256: &'a str,
    /// Digest of the model's settings, 64 hex digits, if it is known.
    pub params_sha256: Option<&'a str>,
    /// Digest of the GGUF slice with the same blocks, 64 hex digits, if one was written.
    pub slice_sha256: Option<&'a str>,
}

/// How to write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Positions the state has room for.
    pub n_ctx: u32,
    /// Rows of one prefill call.
    pub n_prefill: u32,
    /// Most bytes of a package's weight file.
    pub max_bytes: u64,
    /// Whether to evaluate the self-test vectors, where this build can.
    pub selftest: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { n_ctx: 2048, n_prefill: 64, max_bytes: 950_000_000, selftest: cfg!(feature = "engine") }
    }
}

/// What is going on, for whoever shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackageProgress {
    /// llama.cpp evaluates the calibration text.
    Calibrating {
        /// Its tokens.
        n_tokens: usize,
    },
    /// So many more bytes of a package were written.
    Writing {
        /// The package, from 0.
        index: usize,
        /// Bytes since the last call.
        bytes: u64,
    },
}

/// What was written, and what its user should know.
#[derive(Debug)]
pub struct Report {
    /// Where.
    pub directory: PathBuf,
    /// The manifest as written.
    pub manifest: Manifest,
    /// Bytes of all files.
    pub bytes: u64,
    /// How long writing took, the evaluation of the text not counted.
    pub write_time: Duration,
    /// In the order in which to show them.
    pub notices: Vec<Notice>,
}

/// Something that is not an error.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// Weights that are not F16 in the model were rounded to it.
    Rounded(Vec<TensorType>),
    /// Quantised weights take more space as F16.
    Dequantised(Vec<TensorType>),
    /// No vectors, and no measured |hidden|: this build has no llama.cpp, or was told to leave them out.
    NoSelfTest {
        /// Whether this build could have.
        possible: bool,
    },
    /// The stream was scaled.
    Scaled {
        /// Greatest |hidden| measured.
        max_abs: f32,
        /// The scale.
        scale: f32,
    },
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |types: &[TensorType]| types.iter().map(|t| t.name()).collect::<Vec<_>>().join(", ");
        match self {
            Notice::Rounded(types) => {
                write!(f, "weights of type {} are rounded to F16 for Core ML", names(types))
            }
            Notice::Dequantised(types) => {
                write!(
                    f,
                    "weights of type {} are stored as F16 for Core ML: larger than in the model",
                    names(types)
                )
            }
            Notice::NoSelfTest { possible: true } => {
                write!(
                    f,
                    "no self-test vectors, as was asked for: the phone cannot check itself before it serves"
                )
            }
            Notice::NoSelfTest { possible: false } => write!(
                f,
                "no self-test vectors and no measure of |hidden|: this dim-split was built without llama.cpp (feature \
                 `engine`); the phone cannot check itself before it serves"
            ),
            Notice::Scaled { max_abs, scale } => write!(
                f,
                "warning: |hidden| reaches {max_abs:.0}, more than {SCALE_ABOVE:.0}: the packages carry {scale} times \
                 the residual stream, so that fp16 holds it"
            ),
        }
    }
}

/// Plans the packages of several middles.
///
/// # Errors
/// As [`PackagePlan::new`].
pub fn plan_middles<'a>(
    gguf: &'a Gguf,
    middles: &[BlockRange],
    options: Options,
) -> Result<Vec<PackagePlan<'a>>, Error> {
    middles.iter().map(|&blocks| PackagePlan::new(gguf, blocks, options)).collect()
}

/// Whether `folder`, or where it will be, has room for the packages and for `more` bytes.
///
/// # Errors
/// It has not.
pub fn check_space(plans: &[PackagePlan<'_>], folder: &Path, more: u64) -> Result<(), Error> {
    let need = plans.iter().map(PackagePlan::file_bytes).fold(more, u64::saturating_add);
    let exists = folder.ancestors().find(|f| f.is_dir()).unwrap_or(Path::new("."));
    match os::free_bytes(exists) {
        Some(have) if have < need => Err(Error::Space { need, have, path: folder.into() }),
        _ => Ok(()),
    }
}

/// Name of the directory of a middle's packages.
pub fn directory_name(stem: &str, blocks: BlockRange) -> String {
    format!("{stem}.middle-{blocks}.coreml")
}

/// Writes the packages of several middles beside their GGUF slices, which `slices` describes.
///
/// # Errors
/// As [`PackagePlan::write`]. Middles before the one that failed are complete.
pub fn write_middles(
    plans: &[PackagePlan<'_>],
    slices: &crate::manifest::Manifest,
    folder: &Path,
    stem: &str,
    progress: &mut dyn FnMut(PackageProgress),
) -> Result<Vec<Report>, Error> {
    let write = |plan: &PackagePlan<'_>| {
        let blocks = plan.blocks();
        let slice = slices.slices.iter().find(|s| s.blocks() == blocks);
        let identity = Identity {
            model_name: &slices.model.name,
            model_sha256: &slices.model.sha256,
            params_sha256: slices.model.params_sha256.as_deref(),
            slice_sha256: slice.map(|s| s.sha256.as_str()),
        };
        plan.write(&folder.join(directory_name(stem, blocks)), &identity, progress)
    };
    plans.iter().map(write).collect()
}

/// The largest power of two that brings `max_abs` under [`SCALED_BELOW`], or 1 where fp16 has room enough.
pub fn residual_scale(max_abs: f32) -> f32 {
    if max_abs <= SCALE_ABOVE {
        return 1.0;
    }
    let mut scale = 0.5;
    while max_abs * scale >= SCALED_BELOW {
        scale /= 2.0;
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::residual_scale;

    #[test]
    fn residual_scale_is_a_power_of_two_that_leaves_room() {
        assert_eq!(residual_scale(0.0), 1.0);
        assert_eq!(residual_scale(30_000.0), 1.0);
        assert_eq!(residual_scale(30_001.0), 0.5);
        assert_eq!(residual_scale(40_000.0), 0.25);
        assert_eq!(residual_scale(1e9), 2f32.powi(-16));
        assert!(residual_scale(f32::MAX) > 0.0);
    }
}
