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

pub mod graph;
pub mod manifest;
pub mod mil;
pub mod package;
pub mod proto;
#[cfg(feature = "engine")]
pub mod selftest;
pub mod shape;
pub mod weights;

mod args;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::gguf::{self, Gguf, TensorType};
use crate::os;
use crate::plan::BlockRange;
use crate::split::gib;
pub use args::CoremlArgs;
use graph::Context;
use manifest::Manifest;
use shape::{ARCHITECTURES, Shape};
use weights::{Rows, WeightPlan};

/// Above this the residual stream is scaled down: half of what fp16 holds, because a text is only a sample.
pub const SCALE_ABOVE: f32 = 30_000.0;
/// What the scaled stream stays under: there its squares stay in fp16 too, see [`graph::NORM_SCALE`].
pub const SCALED_BELOW: f32 = 16_320.0;

/// The least scale that fp16 holds with all its digits: the programs multiply by it.
#[cfg(feature = "engine")]
const LEAST_SCALE: f32 = 1.0 / 16384.0;

/// Whose blocks they are, as the GGUF slices' manifest says.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    /// Name of the model, for people.
    pub model_name: &'a str,
    /// Identity of the model, 64 hex digits.
    pub model_sha256: &'a str,
    /// Digest of the GGUF slice with the same blocks, 64 hex digits, or empty.
    pub slice_sha256: &'a str,
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

/// One middle's packages, found possible.
#[derive(Debug)]
pub struct Plan<'a> {
    gguf: &'a Gguf,
    options: Options,
    shape: Shape,
    blocks: RangeInclusive<u32>,
    /// The blocks of each package.
    runs: Vec<RangeInclusive<u32>>,
    weight_bytes: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options { n_ctx: 2048, n_prefill: 64, max_bytes: 950_000_000, selftest: cfg!(feature = "engine") }
    }
}

/// What is going on, for whoever shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
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
                    "no self-test vectors (--coreml-no-selftest): the phone cannot check itself before it serves"
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

/// Why packages cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model file itself.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    /// An architecture without a program.
    #[error(
        "no Core ML program for architecture \"{arch}\": there is one for {}; run these blocks as a GGUF slice instead \
         (without --coreml)",
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
    #[error("key \"{key}\": {why}; run these blocks as a GGUF slice instead (without --coreml)")]
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
    #[error(
        "tensor \"{tensor}\" has no place in the Core ML program of architecture \"{arch}\"; run these blocks as a GGUF \
         slice instead (without --coreml)"
    )]
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
        "tensor \"{tensor}\" is of type {found}: turning it into F16 takes ggml, which this dim-split was built without; \
         build it with the feature `engine`",
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
    #[error("blocks {first}..{last}: a middle of a model of {n_blocks} blocks is a range within 1..{}", n_blocks.saturating_sub(2))]
    Blocks {
        /// First asked for.
        first: u32,
        /// Last asked for.
        last: u32,
        /// Blocks of the model.
        n_blocks: u32,
    },
    /// A context length the program cannot have.
    #[error(
        "--coreml-ctx {n_ctx}: no program has such a context; give a multiple of 64 between 64 and 16384"
    )]
    Ctx {
        /// Asked for.
        n_ctx: u32,
    },
    /// A chunk the program cannot have.
    #[error(
        "--coreml-prefill {n_prefill}: no program has such a chunk; give 2 to 512 rows, at most the context of {n_ctx}"
    )]
    Prefill {
        /// Asked for.
        n_prefill: u32,
        /// Context length.
        n_ctx: u32,
    },
    /// One block is too much for a package.
    #[error("--coreml-max-bytes {max_bytes}: block {block} alone takes {bytes} bytes; give it at least that")]
    MaxBytes {
        /// Asked for.
        max_bytes: u64,
        /// The block.
        block: u32,
        /// What it takes.
        bytes: u64,
    },
    /// Not enough room on the disk.
    #[error("need {}, have {} in {}; free some space, or name another folder with --out", gib(*.need), gib(*.have), path.display())]
    Space {
        /// Bytes all files take.
        need: u64,
        /// Bytes there are.
        have: u64,
        /// The folder.
        path: PathBuf,
    },
    /// Something else has the directory's name.
    #[error("\"{}\" is in the way, and is not a directory of packages that dim-split wrote: move it", .0.display())]
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
    #[error("self-test vectors: {0}; --coreml-no-selftest leaves them out")]
    Engine(#[from] llama_sys_patch::Error),
    /// It could, and the values are beyond what any scale helps.
    #[error(
        "|hidden| reaches {max_abs:e}: no scale brings that into fp16; run these blocks as a GGUF slice instead (without --coreml)"
    )]
    HiddenTooLarge {
        /// Greatest measured.
        max_abs: f32,
    },
    /// It could, and the values are no numbers.
    #[error(
        "self-test vectors: block {block} makes {count} values that are not finite; the model file is damaged"
    )]
    NotFinite {
        /// The block.
        block: u32,
        /// How many of its values.
        count: u64,
    },
}

impl Error {
    /// The model or the request is at fault, not the machine.
    pub fn is_bad_input(&self) -> bool {
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

impl<'a> Plan<'a> {
    /// Checks everything that can be checked before writing. `blocks` is inclusive.
    ///
    /// # Errors
    /// Whatever the programs would not compute right, by name; options out of range.
    pub fn new(gguf: &'a Gguf, blocks: RangeInclusive<u32>, options: Options) -> Result<Plan<'a>, Error> {
        let Options { n_ctx, n_prefill, max_bytes, .. } = options;
        if !n_ctx.is_multiple_of(64) || !(64..=16384).contains(&n_ctx) {
            return Err(Error::Ctx { n_ctx });
        }
        if !(2..=512).contains(&n_prefill) || n_prefill > n_ctx {
            return Err(Error::Prefill { n_prefill, n_ctx });
        }
        let shape = Shape::read(gguf)?;
        let (first, last) = (*blocks.start(), *blocks.end());
        if first == 0 || first > last || last.saturating_add(1) >= shape.n_blocks {
            return Err(Error::Blocks { first, last, n_blocks: shape.n_blocks });
        }
        let mut largest = 1;
        for block in blocks.clone() {
            shape.check_block(gguf, block)?;
            let bytes = WeightPlan::new(gguf, &shape, block..=block, 1.0).file_bytes;
            if bytes > max_bytes {
                return Err(Error::MaxBytes { max_bytes, block, bytes });
            }
            largest = bytes.max(largest);
        }
        weights::check_types(gguf, blocks.clone())?;
        let per_package = u32::try_from(max_bytes / largest).unwrap_or(u32::MAX);
        let runs = graph::package_runs(blocks.clone(), per_package);
        let file_bytes =
            |run: &RangeInclusive<u32>| WeightPlan::new(gguf, &shape, run.clone(), 1.0).file_bytes;
        let weight_bytes = runs.iter().map(file_bytes).sum();
        Ok(Plan { gguf, options, shape, blocks, runs, weight_bytes })
    }

    /// Its blocks, inclusive.
    pub fn blocks(&self) -> RangeInclusive<u32> {
        self.blocks.clone()
    }

    /// Bytes of the weight files. The other files are a few MB.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Bytes of the state on the phone.
    pub fn state_bytes(&self) -> u64 {
        let n_blocks = self.runs.iter().map(|run| u64::from(run.end() - run.start() + 1)).sum::<u64>();
        2 * 2 * n_blocks * self.shape.n_head_kv * u64::from(self.options.n_ctx) * self.shape.head_dim
    }

    /// Packages there will be.
    pub fn n_packages(&self) -> usize {
        self.runs.len()
    }

    /// Writes it all as the directory `target`.
    ///
    /// # Errors
    /// Reading, writing or evaluating fails. Nothing is then left under the target's name that was not there before.
    pub fn write(
        &self,
        target: &Path,
        identity: &Identity<'_>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Report, Error> {
        let mut notices = self.type_notices();
        let staging = package::Staging::create(target)?;

        let (selftest, residual_scale) = self.selftest(&staging, &mut notices, progress)?;

        let started = Instant::now();
        let context = Context { shape: &self.shape, n_ctx: self.options.n_ctx, residual_scale };
        let mut packages = Vec::new();
        for (index, run) in self.runs.iter().enumerate() {
            let weights = WeightPlan::new(self.gguf, &self.shape, run.clone(), residual_scale);
            let metadata = self.metadata(run, identity);
            let model = context.model(&weights.weights, self.options.n_prefill, metadata);
            let mut report = |bytes| progress(Progress::Writing { index, bytes });
            let files = staging.write_package(index, &model, &weights, self.gguf, &mut report)?;
            packages.push(manifest::Package {
                directory: package::directory_name(index),
                first_block: *run.start(),
                last_block: *run.end(),
                state_shape: context.state_dims(weights.weights.len()).into(),
                files,
                weight_file: package::WEIGHT_FILE.into(),
                weights: weights.blobs.iter().map(|blob| named_weight(self.gguf, blob)).collect(),
            });
        }
        let manifest = self.manifest(identity, packages, residual_scale, selftest);
        let json = manifest.to_json();
        staging.write(package::MANIFEST, json.as_bytes())?;
        staging.publish()?;

        let files = manifest.packages.iter().flat_map(|p| &p.files).map(|f| f.bytes).sum::<u64>();
        let bytes = files + manifest.selftest.as_ref().map_or(0, |s| s.bytes) + json.len() as u64;
        Ok(Report { directory: target.into(), manifest, bytes, write_time: started.elapsed(), notices })
    }

    #[cfg(feature = "engine")]
    fn selftest(
        &self,
        staging: &package::Staging,
        notices: &mut Vec<Notice>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Option<manifest::SelfTest>, f32), Error> {
        if !self.options.selftest {
            notices.push(Notice::NoSelfTest { possible: true });
            return Ok((None, 1.0));
        }
        let measured = selftest::measure(self.gguf, self.options, &self.runs, staging, progress)?;
        let max_abs = measured.max_abs_hidden.iter().fold(0.0f32, |a, &b| a.max(b));
        let scale = residual_scale(max_abs);
        if scale < LEAST_SCALE {
            return Err(Error::HiddenTooLarge { max_abs });
        }
        if scale != 1.0 {
            notices.push(Notice::Scaled { max_abs, scale });
        }
        Ok((Some(measured.write(staging, scale)?), scale))
    }

    #[cfg(not(feature = "engine"))]
    fn selftest(
        &self,
        _: &package::Staging,
        notices: &mut Vec<Notice>,
        _: &mut dyn FnMut(Progress),
    ) -> Result<(Option<manifest::SelfTest>, f32), Error> {
        notices.push(Notice::NoSelfTest { possible: false });
        Ok((None, 1.0))
    }

    fn type_notices(&self) -> Vec<Notice> {
        let types = weights::converted_types(self.gguf, self.blocks.clone());
        let (quantised, rounded): (Vec<_>, Vec<_>) = types.into_iter().partition(|t| t.is_quantized());
        let mut notices = Vec::new();
        if !rounded.is_empty() {
            notices.push(Notice::Rounded(rounded));
        }
        if !quantised.is_empty() {
            notices.push(Notice::Dequantised(quantised));
        }
        notices
    }

    /// What a package says of itself to someone who opens it in Xcode. Nothing of it is the model file's text.
    fn metadata(&self, run: &RangeInclusive<u32>, identity: &Identity<'_>) -> proto::Metadata {
        let (shape, options) = (&self.shape, self.options);
        let user_defined: BTreeMap<String, String> = [
            ("dim.arch", shape.arch.to_string()),
            ("dim.first_block", run.start().to_string()),
            ("dim.last_block", run.end().to_string()),
            ("dim.model.blocks", shape.n_blocks.to_string()),
            ("dim.model.sha256", identity.model_sha256.to_string()),
            ("dim.n_ctx", options.n_ctx.to_string()),
            ("dim.n_embd", shape.n_embd.to_string()),
            ("dim.n_prefill", options.n_prefill.to_string()),
        ]
        .map(|(key, value)| (key.to_string(), value))
        .into();
        let short_description = format!(
            "Blocks {} to {} of {}, see manifest.json beside this package",
            run.start(),
            run.end(),
            shape.n_blocks
        );
        proto::Metadata { short_description, user_defined }
    }

    fn manifest(
        &self,
        identity: &Identity<'_>,
        packages: Vec<manifest::Package>,
        residual_scale: f32,
        selftest: Option<manifest::SelfTest>,
    ) -> Manifest {
        let shape = &self.shape;
        let (first_block, last_block) = (*self.blocks.start(), *self.blocks.end());
        let mut ffn_bounds = vec![0];
        ffn_bounds.extend(graph::ffn_parts(shape.n_ff).into_iter().map(|part| part.end));
        Manifest {
            format: manifest::FORMAT.into(),
            version: manifest::VERSION,
            model: manifest::ModelIdentity {
                name: identity.model_name.into(),
                sha256: identity.model_sha256.into(),
                arch: shape.arch.into(),
                n_blocks: shape.n_blocks,
            },
            slice: manifest::SliceIdentity { first_block, last_block, sha256: identity.slice_sha256.into() },
            dims: manifest::Dims {
                n_embd: shape.n_embd,
                n_head: shape.n_head,
                n_head_kv: shape.n_head_kv,
                head_dim: shape.head_dim,
                n_ff: shape.n_ff,
                ffn_bounds,
                norm_eps: shape.norm_eps,
                qk_norm: shape.qk_norm,
            },
            rope: manifest::RopeParameters {
                pairing: "halves".into(),
                freq_base: shape.rope.freq_base,
                scaling: shape.rope.scaling.into(),
                factor: shape.rope.factor,
                freq_factors: shape.rope.freq_factors,
                magnitude: shape.rope.magnitude,
                inv_freq: shape.rope.inv_freq.clone(),
            },
            n_ctx: self.options.n_ctx,
            n_prefill: self.options.n_prefill,
            mask_value: graph::MASKED,
            residual_scale,
            packages,
            selftest,
        }
    }
}

/// Plans the packages of several middles.
///
/// # Errors
/// As [`Plan::new`].
pub fn plan_middles<'a>(
    gguf: &'a Gguf,
    middles: &[BlockRange],
    options: Options,
) -> Result<Vec<Plan<'a>>, Error> {
    middles.iter().map(|m| Plan::new(gguf, m.first..=m.last, options)).collect()
}

/// Whether `folder`, or where it will be, has room for the packages and for `more` bytes.
///
/// # Errors
/// It has not.
pub fn check_space(plans: &[Plan<'_>], folder: &Path, more: u64) -> Result<(), Error> {
    // per package a program, and per middle a manifest and vectors
    let files = |plan: &Plan<'_>| {
        let rows = u64::from(plan.options.n_prefill) + 64;
        let vectors = 6 * plan.shape.n_embd * rows * (plan.runs.len() as u64 + 1);
        plan.weight_bytes + vectors + (8 << 20)
    };
    let need = plans.iter().map(files).fold(more, u64::saturating_add);
    let exists = folder.ancestors().find(|f| f.is_dir()).unwrap_or(Path::new("."));
    match os::free_bytes(exists) {
        Some(have) if have < need => Err(Error::Space { need, have, path: folder.into() }),
        _ => Ok(()),
    }
}

/// Name of the directory of a middle's packages.
pub fn directory_name(stem: &str, blocks: &RangeInclusive<u32>) -> String {
    format!("{stem}.middle-{}..{}.coreml", blocks.start(), blocks.end())
}

/// Writes the packages of several middles beside their GGUF slices, which `slices` describes.
///
/// # Errors
/// As [`Plan::write`]. Middles before the one that failed are complete.
pub fn write_middles(
    plans: &[Plan<'_>],
    slices: &crate::manifest::Manifest,
    folder: &Path,
    stem: &str,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<Report>, Error> {
    let write = |plan: &Plan<'_>| {
        let blocks = plan.blocks();
        let slice = slices.slices.iter().find(|s| s.first == *blocks.start() && s.last == *blocks.end());
        let identity = Identity {
            model_name: &slices.model.name,
            model_sha256: &slices.model.sha256,
            slice_sha256: slice.map_or("", |s| &s.sha256),
        };
        plan.write(&folder.join(directory_name(stem, &blocks)), &identity, progress)
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

fn named_weight(gguf: &Gguf, blob: &weights::Blob) -> manifest::NamedWeight {
    let is_vector = gguf.tensor(&blob.tensor).is_none_or(|t| t.dims().len() == 1);
    let (rows, cols) = ([blob.rows.start, blob.rows.end], [blob.cols.start, blob.cols.end]);
    manifest::NamedWeight {
        name: blob.tensor.clone(),
        offset: blob.data_offset(),
        bytes: blob.n_bytes(),
        dtype: "f16".into(),
        shape: if is_vector { vec![cols[1] - cols[0]] } else { vec![rows[1] - rows[0], cols[1] - cols[0]] },
        rows,
        cols,
        order: match blob.order {
            Rows::AsIs => "as-is".into(),
            Rows::PairsToHalves { .. } => "pairs-to-halves".into(),
        },
        scale: blob.scale,
    }
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
