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

use crate::gguf::{self, Gguf, TensorType};
pub use args::CoremlArgs;
use graph::Context;
use manifest::Manifest;
use shape::{ARCHITECTURES, Shape};
use weights::{Rows, WeightPlan};

/// Above this the residual stream is scaled down: half of what fp16 holds, because a text is only a sample.
pub const SCALE_ABOVE: f32 = 30_000.0;
/// What the scaled stream stays under: there its squares stay in fp16 too, see [`graph::NORM_SCALE`].
pub const SCALED_BELOW: f32 = 16_320.0;

/// What to write.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The whole model.
    pub gguf: &'a Gguf,
    /// The middle's blocks, inclusive.
    pub blocks: (u32, u32),
    /// The directory to be, `STEM.middle-A..B.coreml`.
    pub target: &'a Path,
    /// Name of the model, for the manifest.
    pub model_name: &'a str,
    /// Identity of the model, 64 hex digits.
    pub model_sha256: &'a str,
    /// SHA-256 of the GGUF slice with the same blocks, or empty.
    pub slice_sha256: &'a str,
    /// How.
    pub options: Options,
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

/// A request that was found possible.
#[derive(Debug)]
pub struct Plan<'a> {
    request: Request<'a>,
    shape: Shape,
    runs: Vec<RangeInclusive<u32>>,
    bytes: u64,
}

/// What is going on, for whoever shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// llama.cpp evaluates the calibration text.
    Calibrating {
        /// Its tokens.
        n_tokens: usize,
    },
    /// Package `index` of `n` was begun.
    Package {
        /// From 0.
        index: usize,
        /// How many there will be.
        n: usize,
    },
    /// So many more bytes were written.
    Bytes(u64),
}

/// What was written, and what its user should know.
#[derive(Debug)]
pub struct Report {
    /// The manifest as written.
    pub manifest: Manifest,
    /// Bytes of all files.
    pub bytes: u64,
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
    #[error("no Core ML program for architecture \"{arch}\": there is one for {}", ARCHITECTURES.join(", "))]
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
    /// Blocks the model does not have.
    #[error("blocks {first}..{last}: the model has blocks 0..{}", n_blocks - 1)]
    Blocks {
        /// First asked for.
        first: u32,
        /// Last asked for.
        last: u32,
        /// Blocks of the model.
        n_blocks: u32,
    },
    /// A context length the program cannot have.
    #[error("--coreml-ctx {n_ctx}: it must be a multiple of 64 between 64 and 16384")]
    Ctx {
        /// Asked for.
        n_ctx: u32,
    },
    /// A chunk the program cannot have.
    #[error("--coreml-prefill {n_prefill}: it must be between 2 and 512, and at most the context of {n_ctx}")]
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
    /// Checks everything that can be checked before writing.
    ///
    /// # Errors
    /// Whatever the programs would not compute right, by name; options out of range.
    pub fn new(request: Request<'a>) -> Result<Plan<'a>, Error> {
        let Request {
            gguf, blocks: (first, last), options: Options { n_ctx, n_prefill, max_bytes, .. }, ..
        } = request;
        if n_ctx % 64 != 0 || !(64..=16384).contains(&n_ctx) {
            return Err(Error::Ctx { n_ctx });
        }
        if !(2..=512).contains(&n_prefill) || n_prefill > n_ctx {
            return Err(Error::Prefill { n_prefill, n_ctx });
        }
        let shape = Shape::read(gguf)?;
        if first > last || last >= shape.n_blocks {
            return Err(Error::Blocks { first, last, n_blocks: shape.n_blocks });
        }
        let mut largest = 0;
        for block in first..=last {
            shape.check_block(gguf, block)?;
            let bytes = WeightPlan::new(gguf, &shape, block..=block, 1.0).file_bytes;
            if bytes > max_bytes {
                return Err(Error::MaxBytes { max_bytes, block, bytes });
            }
            largest = bytes.max(largest);
        }
        let per_package = u32::try_from(max_bytes / largest).unwrap_or(u32::MAX);
        let runs = graph::package_runs(first..=last, per_package);
        for run in &runs {
            weights::check_types(gguf, run.clone())?;
        }
        let bytes = runs.iter().map(|run| WeightPlan::new(gguf, &shape, run.clone(), 1.0).file_bytes).sum();
        Ok(Plan { request, shape, runs, bytes })
    }

    /// Bytes of the weight files; the rest is a few MB.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Packages there will be.
    pub fn n_packages(&self) -> usize {
        self.runs.len()
    }

    /// Writes it all.
    ///
    /// # Errors
    /// Reading, writing or evaluating fails. Nothing is then left under the target's name that was not there before.
    pub fn write(&self, progress: &mut dyn FnMut(Progress)) -> Result<Report, Error> {
        let Request { gguf, options, .. } = self.request;
        let mut notices = self.type_notices();
        let staging = package::Staging::create(self.request.target)?;

        let (selftest, residual_scale) = self.selftest(&staging, &mut notices, progress)?;

        let context = Context { shape: &self.shape, n_ctx: options.n_ctx, residual_scale };
        let mut packages = Vec::new();
        for (index, run) in self.runs.iter().enumerate() {
            progress(Progress::Package { index, n: self.runs.len() });
            let weights = WeightPlan::new(gguf, &self.shape, run.clone(), residual_scale);
            let model = context.model(&weights.weights, options.n_prefill, self.metadata(run));
            let files = staging
                .write_package(index, &model, &weights, gguf, &mut |n| progress(Progress::Bytes(n)))?;
            packages.push(manifest::Package {
                directory: package::directory_name(index),
                first_block: *run.start(),
                last_block: *run.end(),
                state_shape: context.state_dims(weights.weights.len()).into(),
                files,
                weight_file: package::WEIGHT_FILE.into(),
                weights: weights.blobs.iter().map(|blob| named_weight(gguf, blob)).collect(),
            });
        }
        let manifest = self.manifest(packages, residual_scale, selftest);
        let json = manifest.to_json();
        staging.write(package::MANIFEST, json.as_bytes())?;
        staging.publish()?;

        let files = manifest.packages.iter().flat_map(|p| &p.files).map(|f| f.bytes).sum::<u64>();
        let bytes = files + manifest.selftest.as_ref().map_or(0, |s| s.bytes) + json.len() as u64;
        Ok(Report { manifest, bytes, notices })
    }

    #[cfg(feature = "engine")]
    fn selftest(
        &self,
        staging: &package::Staging,
        notices: &mut Vec<Notice>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Option<manifest::SelfTest>, f32), Error> {
        if !self.request.options.selftest {
            notices.push(Notice::NoSelfTest { possible: true });
            return Ok((None, 1.0));
        }
        let measured = selftest::measure(&self.request, &self.runs, progress)?;
        let max_abs = measured.max_abs_hidden.iter().fold(0.0f32, |a, &b| a.max(b));
        let scale = residual_scale(max_abs);
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
        let (first, last) = self.request.blocks;
        let types = weights::converted_types(self.request.gguf, first..=last);
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
    fn metadata(&self, run: &RangeInclusive<u32>) -> proto::Metadata {
        let (shape, options) = (&self.shape, self.request.options);
        let user_defined: BTreeMap<String, String> = [
            ("dim.arch", shape.arch.to_string()),
            ("dim.first_block", run.start().to_string()),
            ("dim.last_block", run.end().to_string()),
            ("dim.model.blocks", shape.n_blocks.to_string()),
            ("dim.model.sha256", self.request.model_sha256.to_string()),
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
        packages: Vec<manifest::Package>,
        residual_scale: f32,
        selftest: Option<manifest::SelfTest>,
    ) -> Manifest {
        let (shape, request) = (&self.shape, &self.request);
        let (first_block, last_block) = request.blocks;
        let mut ffn_bounds = vec![0];
        ffn_bounds.extend(graph::ffn_parts(shape.n_ff).into_iter().map(|part| part.end));
        Manifest {
            format: manifest::FORMAT.into(),
            version: manifest::VERSION,
            model: manifest::ModelIdentity {
                name: request.model_name.into(),
                sha256: request.model_sha256.into(),
                arch: shape.arch.into(),
                n_blocks: shape.n_blocks,
            },
            slice: manifest::SliceIdentity { first_block, last_block, sha256: request.slice_sha256.into() },
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
            n_ctx: request.options.n_ctx,
            n_prefill: request.options.n_prefill,
            mask_value: graph::MASKED,
            residual_scale,
            packages,
            selftest,
        }
    }
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
