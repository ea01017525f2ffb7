//! `manifest.json` of a package set: what a worker needs to know to load the packages, drive them, and check them.
//!
//! docs/COREML.md describes every field. Field order here is the order in the file; together with numbers that
//! depend on nothing but the model it makes the file reproducible. Anything in it that came out of the model file
//! (its name) is a value and never part of a path.

use serde::{Deserialize, Serialize};

/// Value of [`Manifest::format`].
pub const FORMAT: &str = "dim.coreml";
/// Value of [`Manifest::version`].
pub const VERSION: u32 = 1;

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// "dim.coreml"
    pub format: String,
    /// 1; a reader refuses what it does not know.
    pub version: u32,
    /// Whose blocks these are.
    pub model: ModelIdentity,
    /// Which blocks, first and last inclusive.
    pub slice: SliceIdentity,
    /// The blocks' dimensions.
    pub dims: Dims,
    /// How the host's cosines and sines are made.
    pub rope: RopeParameters,
    /// Positions the state has room for; width of `mask`.
    pub n_ctx: u32,
    /// Rows of one `prefill` call.
    pub n_prefill: u32,
    /// What `mask` holds where a row must not look.
    pub mask_value: f32,
    /// `hidden` and `hidden_out` carry this times the model's values. A power of two, 1 in most models.
    pub residual_scale: f32,
    /// In the order in which they are chained.
    pub packages: Vec<Package>,
    /// Missing where the tool was built without llama.cpp, or told to leave it out.
    pub selftest: Option<SelfTest>,
}

/// Identity of the model: the same words as in STEM.split.json.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelIdentity {
    /// For people.
    pub name: String,
    /// 64 hex digits.
    pub sha256: String,
    /// Digest of its settings (rope, epsilons, ...), 64 hex digits: a host whose head was made with other ones refuses the
    /// worker. Missing where it was not known.
    pub params_sha256: Option<String>,
    /// GGUF's name of the architecture.
    pub arch: String,
    /// Blocks of the whole model.
    pub n_blocks: u32,
}

/// Identity of the slice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SliceIdentity {
    /// First block, as numbered in the model.
    pub first_block: u32,
    /// Last block, inclusive.
    pub last_block: u32,
    /// SHA-256 of the GGUF slice with the same blocks, 64 hex digits; empty where none was written.
    pub sha256: String,
}

/// Dimensions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dims {
    /// Width of the residual stream.
    pub n_embd: u64,
    /// Query heads.
    pub n_head: u64,
    /// Key and value heads.
    pub n_head_kv: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// Inner width of the feed-forward network.
    pub n_ff: u64,
    /// First columns of the feed-forward network's parts, and its width: `[0, 9472, 18944]`.
    pub ffn_bounds: Vec<u64>,
    /// Epsilon of the norms, before any scaling.
    pub norm_eps: f32,
    /// q and k are normed head by head.
    pub qk_norm: bool,
}

/// Rope.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeParameters {
    /// "halves": dimension i turns with i + head_dim / 2.
    pub pairing: String,
    /// Base of the frequencies, for people.
    pub freq_base: f64,
    /// "none", "linear" or "yarn", for people.
    pub scaling: String,
    /// Its factor, for people.
    pub factor: f64,
    /// Whether the model has factors per frequency, for people.
    pub freq_factors: bool,
    /// What cosines and sines are multiplied by.
    pub magnitude: f64,
    /// (head_dim / 2): the angle at position p is p * `inv_freq[i]`. Every scaling is in it.
    pub inv_freq: Vec<f64>,
}

/// One .mlpackage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Package {
    /// Directory, beside the manifest: "middle-00.mlpackage".
    pub directory: String,
    /// First block, as numbered in the model.
    pub first_block: u32,
    /// Last block, inclusive.
    pub last_block: u32,
    /// Shape of `kv`: `[2 * blocks, n_head_kv, n_ctx, head_dim]`.
    pub state_shape: Vec<u64>,
    /// Every file of the package.
    pub files: Vec<PackageFile>,
    /// Path of the weight file in the package.
    pub weight_file: String,
    /// Every tensor in it.
    pub weights: Vec<NamedWeight>,
}

/// One file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PackageFile {
    /// Path below the package's directory, with '/'.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// 64 hex digits.
    pub sha256: String,
}

/// A tensor in a weight file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NamedWeight {
    /// The GGUF tensor, numbered as in the model: "blk.11.ffn_down.weight".
    pub name: String,
    /// Offset of the data in the weight file; the record of it is 64 bytes before.
    pub offset: u64,
    /// Bytes of the data.
    pub bytes: u64,
    /// "f16", little-endian.
    pub dtype: String,
    /// `[rows, columns]` row-major as stored, or `[length]`. A row makes one output.
    pub shape: Vec<u64>,
    /// First and end of the tensor's outputs that are stored here.
    pub rows: [u64; 2],
    /// First and end of the tensor's inputs that are stored here; for a vector, of its elements.
    pub cols: [u64; 2],
    /// "as-is", or "pairs-to-halves": per head, GGUF's row 2i stands at i and 2i + 1 at i + head_dim / 2.
    pub order: String,
    /// What the model's values were multiplied by.
    pub scale: f32,
}

/// Inputs and outputs to check a worker with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SelfTest {
    /// "selftest.bin", beside the manifest.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// 64 hex digits.
    pub sha256: String,
    /// Rows of every array: positions 0 .. n_rows of one session.
    pub n_rows: u64,
    /// How the rows are fed: one prefill of this many rows, then one row at a time.
    pub n_prefill_rows: u64,
    /// One array (n_rows, n_embd) per boundary: before the first package, then after each package.
    pub boundaries: Vec<Boundary>,
    /// Greatest |hidden| of the model (unscaled) after each block on the calibration text, from the boundary before
    /// the first block on.
    pub max_abs_hidden: Vec<f32>,
    /// Tokens of the calibration text.
    pub n_calibration_tokens: u64,
}

/// Hidden rows at one boundary, times residual_scale.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Boundary {
    /// Offset of the rows in fp16, what is fed to the next package.
    pub f16_offset: u64,
    /// Offset of the rows in fp32, what is expected of the package before.
    pub f32_offset: u64,
}

impl Manifest {
    /// The file's text.
    pub fn to_json(&self) -> String {
        let mut text =
            serde_json::to_string_pretty(self).expect("no map has keys but strings, no float is infinite");
        text.push('\n');
        text
    }
}
