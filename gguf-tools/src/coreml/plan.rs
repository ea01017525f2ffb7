//! One middle's packages: found possible, then written.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use dim_core::blocks::BlockRange;

use super::graph::{self, Context};
use super::limits::{CTX_STEP, MAX_CTX, MAX_PREFILL, MIN_PREFILL};
use super::manifest::{self, Manifest};
use super::shape::Shape;
use super::weights::{self, Rows, WeightPlan};
use super::{Error, Identity, Notice, Options, PackageProgress, Report, package, proto, types};
#[cfg(feature = "engine")]
use super::{residual_scale, selftest};
use crate::gguf::{Gguf, check};

/// Bytes of a value in the state.
const F16_BYTES: u64 = 2;
/// Bytes of a value of the self-test vectors: in fp16 and in fp32.
const VECTOR_BYTES: u64 = 2 + 4;
/// Rows that the vectors have beside a prefill's, at most.
const MOST_OTHER_ROWS: u64 = 64;
/// Bytes of a middle's programs and manifest, at most.
const PROGRAM_BYTES: u64 = 8 << 20;

/// The least scale that fp16 holds with all its digits: the programs multiply by it.
#[cfg(feature = "engine")]
const LEAST_SCALE: f32 = 1.0 / 16384.0;

/// One middle's packages, found possible.
#[derive(Debug)]
pub struct PackagePlan<'a> {
    gguf: &'a Gguf,
    options: Options,
    shape: Shape,
    blocks: BlockRange,
    /// The blocks of each package.
    runs: Vec<BlockRange>,
    weight_bytes: u64,
}

impl<'a> PackagePlan<'a> {
    /// Checks everything that can be checked before writing.
    ///
    /// # Errors
    /// Whatever the programs would not compute right, by name; options out of range.
    pub fn new(gguf: &'a Gguf, blocks: BlockRange, options: Options) -> Result<PackagePlan<'a>, Error> {
        let Options { n_ctx, n_prefill, max_bytes, .. } = options;
        if !n_ctx.is_multiple_of(CTX_STEP) || !(CTX_STEP..=MAX_CTX).contains(&n_ctx) {
            return Err(Error::Ctx { n_ctx });
        }
        if !(MIN_PREFILL..=MAX_PREFILL).contains(&n_prefill) || n_prefill > n_ctx {
            return Err(Error::Prefill { n_prefill, n_ctx });
        }
        let shape = Shape::read(gguf)?;
        let BlockRange { first, last } = blocks;
        if first == 0 || first > last || last.saturating_add(1) >= shape.n_blocks {
            return Err(Error::Blocks { blocks, n_blocks: shape.n_blocks });
        }
        if cfg!(feature = "engine") && options.selftest {
            check::loadable(gguf)?;
        }
        let mut largest = 1;
        for block in blocks.as_range() {
            shape.check_block(gguf, block)?;
            let bytes =
                WeightPlan::new(gguf, &shape, BlockRange { first: block, last: block }, 1.0).file_bytes;
            if bytes > max_bytes {
                return Err(Error::MaxBytes { max_bytes, block, bytes });
            }
            largest = bytes.max(largest);
        }
        types::check_types(gguf, blocks)?;
        let per_package = u32::try_from(max_bytes / largest).unwrap_or(u32::MAX);
        let runs = graph::package_runs(blocks, per_package);
        let file_bytes = |run: &BlockRange| WeightPlan::new(gguf, &shape, *run, 1.0).file_bytes;
        let weight_bytes = runs.iter().map(file_bytes).sum();
        Ok(PackagePlan { gguf, options, shape, blocks, runs, weight_bytes })
    }

    /// Its blocks.
    pub fn blocks(&self) -> BlockRange {
        self.blocks
    }

    /// Bytes of the weight files. The other files are a few MB.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Bytes of all files, about, and not too few.
    pub(super) fn file_bytes(&self) -> u64 {
        let rows = u64::from(self.options.n_prefill) + MOST_OTHER_ROWS;
        let boundaries = self.runs.len() as u64 + 1;
        let vectors = VECTOR_BYTES * self.shape.n_embd * rows * boundaries;
        self.weight_bytes + vectors + PROGRAM_BYTES
    }

    /// Bytes of the state on the phone.
    pub fn state_bytes(&self) -> u64 {
        let n_blocks = self.runs.iter().map(|run| u64::from(run.count())).sum::<u64>();
        2 * F16_BYTES * n_blocks * self.shape.n_head_kv * u64::from(self.options.n_ctx) * self.shape.head_dim
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
        progress: &mut dyn FnMut(PackageProgress),
    ) -> Result<Report, Error> {
        let mut notices = self.type_notices();
        let staging = package::Staging::create(target)?;

        let (selftest, residual_scale) = self.selftest(&staging, &mut notices, progress)?;

        let started = Instant::now();
        let context = Context { shape: &self.shape, n_ctx: self.options.n_ctx, residual_scale };
        let mut packages = Vec::new();
        for (index, &run) in self.runs.iter().enumerate() {
            let weights = WeightPlan::new(self.gguf, &self.shape, run, residual_scale);
            let metadata = self.metadata(run, identity);
            let model = context.model(&weights.weights, self.options.n_prefill, metadata);
            let mut report = |bytes| progress(PackageProgress::Writing { index, bytes });
            let files = staging.write_package(index, &model, &weights, self.gguf, &mut report)?;
            packages.push(manifest::Package {
                directory: package::directory_name(index),
                first_block: run.first,
                last_block: run.last,
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
        progress: &mut dyn FnMut(PackageProgress),
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
        _: &mut dyn FnMut(PackageProgress),
    ) -> Result<(Option<manifest::SelfTest>, f32), Error> {
        notices.push(Notice::NoSelfTest { possible: false });
        Ok((None, 1.0))
    }

    fn type_notices(&self) -> Vec<Notice> {
        let types = types::converted_types(self.gguf, self.blocks);
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
    fn metadata(&self, run: BlockRange, identity: &Identity<'_>) -> proto::Metadata {
        let (shape, options) = (&self.shape, self.options);
        let user_defined: BTreeMap<String, String> = [
            ("dim.arch", shape.arch.to_string()),
            ("dim.first_block", run.first.to_string()),
            ("dim.last_block", run.last.to_string()),
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
            run.first, run.last, shape.n_blocks
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
        let mut ffn_bounds = vec![0];
        ffn_bounds.extend(graph::ffn_parts(shape.n_ff).into_iter().map(|part| part.end));
        Manifest {
            format: manifest::FORMAT.into(),
            version: manifest::VERSION,
            model: manifest::ModelIdentity {
                name: identity.model_name.into(),
                sha256: identity.model_sha256.into(),
                params_sha256: identity.params_sha256.map(Into::into),
                arch: shape.arch.into(),
                n_blocks: shape.n_blocks,
            },
            slice: manifest::SliceIdentity {
                first_block: self.blocks.first,
                last_block: self.blocks.last,
                sha256: identity.slice_sha256.unwrap_or_default().into(),
            },
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
