//! What the writer needs to know of a model, read from its metadata, and what it refuses.
//!
//! A program is right only if every key and tensor that changes the computation is accounted for. So: four
//! architectures are known, a block's tensors must be exactly those its architecture has here, with the shapes the
//! dimensions give, and keys that llama.cpp's graphs of these architectures would act on and this writer would not
//! are refused by name.

use std::f64::consts::PI;

use super::Error;
pub use super::limits::ARCHITECTURES;
use crate::gguf::{Gguf, Tensor, TensorType, Value};
use crate::text::Shown;

/// The dimensions of a model's blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// GGUF's name of the architecture.
    pub arch: &'static str,
    /// Blocks of the model.
    pub n_blocks: u32,
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
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// q and k are normed head by head.
    pub qk_norm: bool,
    /// The rows of q's and k's projections stand pair by pair in the file (2i, 2i + 1) and are wanted half by half
    /// (i, i + head_dim / 2).
    pub paired_rows: bool,
    /// Positions the model was trained on.
    pub n_ctx_train: u64,
    /// How positions turn q and k.
    pub rope: Rope,
}

/// Rotation of q and k: angle of dimension pair i at position p is p * `inv_freq[i]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub freq_base: f64,
    /// Name of the scaling: `none`, `linear` or `yarn`. Factors per frequency (llama 3) are in `inv_freq` too.
    pub scaling: &'static str,
    /// Its factor, 1 for none.
    pub factor: f64,
    /// Whether the file has factors per frequency.
    pub freq_factors: bool,
    /// (head_dim / 2), with every scaling applied
    pub inv_freq: Vec<f64>,
    /// What cosines and sines are multiplied by (yarn); 1 otherwise.
    pub magnitude: f64,
}

/// One tensor a block may have.
struct Expected {
    suffix: &'static str,
    dims: fn(&Shape) -> [u64; 2], // as GGUF has them, row length first; second 0 for vectors
    need: Need,
}

#[derive(Clone, Copy, PartialEq)]
enum Need {
    Always,
    May,
    Qwen3,
    MayLlama,
}

const EXPECTED: &[Expected] = &[
    Expected { suffix: "attn_norm.weight", dims: |s| [s.n_embd, 0], need: Need::Always },
    Expected { suffix: "attn_q.weight", dims: |s| [s.n_embd, s.n_head * s.head_dim], need: Need::Always },
    Expected { suffix: "attn_q.bias", dims: |s| [s.n_head * s.head_dim, 0], need: Need::May },
    Expected { suffix: "attn_k.weight", dims: |s| [s.n_embd, s.n_head_kv * s.head_dim], need: Need::Always },
    Expected { suffix: "attn_k.bias", dims: |s| [s.n_head_kv * s.head_dim, 0], need: Need::May },
    Expected { suffix: "attn_v.weight", dims: |s| [s.n_embd, s.n_head_kv * s.head_dim], need: Need::Always },
    Expected { suffix: "attn_v.bias", dims: |s| [s.n_head_kv * s.head_dim, 0], need: Need::May },
    Expected { suffix: "attn_q_norm.weight", dims: |s| [s.head_dim, 0], need: Need::Qwen3 },
    Expected { suffix: "attn_k_norm.weight", dims: |s| [s.head_dim, 0], need: Need::Qwen3 },
    Expected {
        suffix: "attn_output.weight",
        dims: |s| [s.n_head * s.head_dim, s.n_embd],
        need: Need::Always,
    },
    Expected { suffix: "attn_output.bias", dims: |s| [s.n_embd, 0], need: Need::MayLlama },
    Expected { suffix: "ffn_norm.weight", dims: |s| [s.n_embd, 0], need: Need::Always },
    Expected { suffix: "ffn_gate.weight", dims: |s| [s.n_embd, s.n_ff], need: Need::Always },
    Expected { suffix: "ffn_gate.bias", dims: |s| [s.n_ff, 0], need: Need::MayLlama },
    Expected { suffix: "ffn_up.weight", dims: |s| [s.n_embd, s.n_ff], need: Need::Always },
    Expected { suffix: "ffn_up.bias", dims: |s| [s.n_ff, 0], need: Need::MayLlama },
    Expected { suffix: "ffn_down.weight", dims: |s| [s.n_ff, s.n_embd], need: Need::Always },
    Expected { suffix: "ffn_down.bias", dims: |s| [s.n_embd, 0], need: Need::MayLlama },
];

/// Keys under the architecture's prefix that change what llama.cpp computes and that no program here accounts for,
/// with the value that leaves things as they are.
const REFUSED_KEYS: &[(&str, Option<f64>)] = &[
    ("attention.scale", Some(0.0)),
    ("attention.temperature_scale", Some(0.0)),
    ("attention.clamp_kqv", Some(0.0)),
    ("attention.causal", Some(1.0)),
    ("attention.sliding_window_pattern", None),
    ("attn_logit_softcapping", Some(0.0)),
    ("embedding_scale", None),
    ("expert_count", Some(0.0)),
    ("residual_scale", None),
    ("rope.dimension_sections", None),
    ("rope.scaling.alpha", Some(0.0)),
    ("rope.scaling.attn_factor", Some(1.0)),
    ("rope.scaling.yarn_attn_factor", Some(1.0)),
    ("rope.scaling.yarn_ext_factor", Some(1.0)),
    ("rope.scaling.yarn_log_multiplier", Some(0.0)),
    ("swiglu_clamp_exp", None),
    ("swiglu_clamp_shexp", None),
    ("use_parallel_residual", Some(0.0)),
];

/// No dimension of a model is longer; it keeps every product of two below 2^40 and every one in an int32.
const MAX_DIM: u64 = 1 << 20;

impl Shape {
    /// Reads a model's shape.
    ///
    /// # Errors
    /// An architecture, key or value that the programs do not account for, by name.
    pub fn read(gguf: &Gguf) -> Result<Shape, Error> {
        let arch = gguf.get("general.architecture");
        let arch =
            arch.as_ref().and_then(Value::as_str).ok_or(Error::KeyMissing("general.architecture".into()))?;
        let Some(&arch) = ARCHITECTURES.iter().find(|&&a| a == arch) else {
            return Err(Error::Architecture { arch: Shown(arch).to_string() });
        };
        let keys = Keys { gguf, arch };
        for (key, neutral) in REFUSED_KEYS {
            keys.refuse_unless(key, *neutral)?;
        }

        let n_embd = keys.dim("embedding_length")?;
        let n_head = keys.dim("attention.head_count")?;
        let n_head_kv = keys.dim_or("attention.head_count_kv", n_head)?;
        if n_head % n_head_kv != 0 {
            return Err(
                keys.bad("attention.head_count_kv", format!("{n_head_kv} does not divide {n_head} heads"))
            );
        }
        let head_dim = keys.dim_or("attention.key_length", n_embd / n_head)?;
        for key in ["attention.value_length", "rope.dimension_count"] {
            let n = keys.dim_or(key, head_dim)?;
            if n != head_dim {
                let why = format!(
                    "{n} differs from the keys' head width {head_dim}: heads must be of one width and turned whole"
                );
                return Err(keys.bad(key, why));
            }
        }
        if head_dim == 0 || head_dim % 2 != 0 || head_dim > 1024 {
            return Err(
                keys.bad("attention.key_length", format!("heads of width {head_dim} cannot be turned"))
            );
        }
        let n_blocks = keys.dim("block_count")?;
        let norm_eps = keys
            .float("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| Error::KeyMissing(keys.full("attention.layer_norm_rms_epsilon")))?
            as f32;
        if !(norm_eps > 0.0 && norm_eps < 1.0) {
            return Err(keys.bad("attention.layer_norm_rms_epsilon", format!("{norm_eps} is no epsilon")));
        }
        Ok(Shape {
            arch,
            n_blocks: n_blocks as u32,
            n_embd,
            n_head,
            n_head_kv,
            head_dim,
            n_ff: keys.dim("feed_forward_length")?,
            norm_eps,
            qk_norm: arch == "qwen3",
            paired_rows: matches!(arch, "llama" | "mistral3"),
            n_ctx_train: keys.dim_or("context_length", 0)?,
            rope: Rope::read(&keys, head_dim)?,
        })
    }

    /// Checks that block `block` has exactly the tensors it should, of the shapes it should.
    ///
    /// # Errors
    /// The tensor that is missing, unknown, or of another shape.
    pub fn check_block(&self, gguf: &Gguf, block: u32) -> Result<(), Error> {
        let prefix = format!("blk.{block}.");
        for tensor in gguf.tensors() {
            let Some(suffix) = tensor.name().strip_prefix(&prefix) else { continue };
            let Some(expected) = EXPECTED.iter().find(|e| e.suffix == suffix && self.has(e.need)) else {
                return Err(Error::TensorUnknown {
                    tensor: Shown(tensor.name()).to_string(),
                    arch: self.arch,
                });
            };
            let [row, rows] = (expected.dims)(self);
            let wanted: &[u64] = if rows == 0 { &[row] } else { &[row, rows] };
            if tensor.dims() != wanted {
                let (found, wanted) = (tensor.dims().to_vec(), wanted.to_vec());
                return Err(Error::TensorShape { tensor: Shown(tensor.name()).to_string(), found, wanted });
            }
        }
        for expected in EXPECTED {
            let needed = expected.need == Need::Always || (expected.need == Need::Qwen3 && self.qk_norm);
            let name = format!("{prefix}{}", expected.suffix);
            if needed && gguf.tensor(&name).is_none() {
                return Err(Error::TensorMissing(name));
            }
        }
        Ok(())
    }

    fn has(&self, need: Need) -> bool {
        match need {
            Need::Always | Need::May => true,
            Need::Qwen3 => self.qk_norm,
            Need::MayLlama => self.paired_rows,
        }
    }
}

impl Rope {
    /// As llama.cpp's `ggml_rope_ext` turns, in double: yarn's ramp and magnitude as in `rope_yarn`.
    fn read(keys: &Keys<'_>, head_dim: u64) -> Result<Rope, Error> {
        let freq_base = keys.float("rope.freq_base")?.unwrap_or(10000.0);
        if !(freq_base > 1.0 && freq_base < 1e12) {
            return Err(keys.bad("rope.freq_base", format!("{freq_base} is no base")));
        }
        let factor = match keys.float("rope.scaling.factor")? {
            Some(factor) => factor,
            None => keys.float("rope.scale_linear")?.unwrap_or(0.0), // the key's name of old
        };
        let factor = if factor == 0.0 { 1.0 } else { factor };
        if !(0.01..=1e4).contains(&factor) {
            return Err(keys.bad("rope.scaling.factor", format!("{factor} is no factor")));
        }
        // without a type llama.cpp takes linear; a linear scaling by 1 is none
        let scaling = match keys.text("rope.scaling.type")?.as_deref().unwrap_or("linear") {
            "linear" if factor == 1.0 => "none",
            "linear" => "linear",
            "none" => "none",
            "yarn" => "yarn",
            other => {
                let why = format!("{} is not among none, linear, yarn", Shown(other));
                return Err(keys.bad("rope.scaling.type", why));
            }
        };
        let factor = if scaling == "none" { 1.0 } else { factor };

        let factors = match keys.gguf.tensor("rope_freqs.weight") {
            Some(tensor) => Some(read_freq_factors(&tensor, head_dim)?),
            None => None,
        };
        for name in ["rope_factors_long.weight", "rope_factors_short.weight"] {
            if keys.gguf.tensor(name).is_some() {
                return Err(Error::TensorUnknown { tensor: name.into(), arch: keys.arch });
            }
        }
        let n = head_dim as f64;
        let unscaled = |i: u64| {
            let divisor = factors.as_ref().map_or(1.0, |f| f64::from(f[i as usize]));
            freq_base.powf(-2.0 * i as f64 / n) / divisor
        };
        let (inv_freq, magnitude): (Vec<f64>, f64) = if scaling == "yarn" {
            let trained = match keys.float("rope.scaling.original_context_length")? {
                Some(n) => n,
                None => keys.float("context_length")?.unwrap_or(0.0),
            };
            if !(1.0..=1e9).contains(&trained) {
                return Err(keys.bad(
                    "rope.scaling.original_context_length",
                    format!("yarn cannot start from {trained}"),
                ));
            }
            // only mistral3's loader reads these two
            let beta = |key: &str, default: f64| match keys.arch {
                "mistral3" => keys.float(key).map(|b| b.unwrap_or(default)),
                _ => Ok(default),
            };
            let (fast, slow) =
                (beta("rope.scaling.yarn_beta_fast", 32.0)?, beta("rope.scaling.yarn_beta_slow", 1.0)?);
            let dim = |turns: f64| n * (trained / (turns * 2.0 * PI)).ln() / (2.0 * freq_base.ln());
            let low = dim(fast).floor().max(0.0);
            let high = dim(slow).ceil().min(n - 1.0);
            let ramp = |i: u64| 1.0 - ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
            let mixed = |i: u64| unscaled(i) * ((1.0 - ramp(i)) / factor + ramp(i));
            ((0..head_dim / 2).map(mixed).collect(), (1.0 + 0.1 * factor.ln()).max(1.0))
        } else {
            ((0..head_dim / 2).map(|i| unscaled(i) / factor).collect(), 1.0)
        };
        Ok(Rope { freq_base, scaling, factor, freq_factors: factors.is_some(), inv_freq, magnitude })
    }
}

fn read_freq_factors(tensor: &Tensor<'_>, head_dim: u64) -> Result<Vec<f32>, Error> {
    let name = || tensor.name().to_string();
    if tensor.dims() != [head_dim / 2] {
        let (found, wanted) = (tensor.dims().to_vec(), vec![head_dim / 2]);
        return Err(Error::TensorShape { tensor: name(), found, wanted });
    }
    if tensor.tensor_type() != TensorType::F32 {
        return Err(Error::TensorType { tensor: name(), found: tensor.tensor_type() });
    }
    let mut bytes = vec![0; tensor.n_bytes() as usize];
    tensor.read_at(0, &mut bytes)?;
    let factors: Vec<f32> =
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    match factors.iter().find(|f| !(f.is_finite() && **f > 0.0)) {
        Some(&value) => Err(Error::TensorValue { tensor: name(), value }),
        None => Ok(factors),
    }
}

/// A model's keys under its architecture's name.
struct Keys<'a> {
    gguf: &'a Gguf,
    arch: &'static str,
}

impl Keys<'_> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn bad(&self, key: &str, why: String) -> Error {
        Error::Key { key: self.full(key), why }
    }

    fn dim(&self, key: &str) -> Result<u64, Error> {
        match self.dim_or(key, u64::MAX)? {
            u64::MAX => Err(Error::KeyMissing(self.full(key))),
            n => Ok(n),
        }
    }

    fn dim_or(&self, key: &str, default: u64) -> Result<u64, Error> {
        let Some(value) = self.gguf.get(&self.full(key)) else { return Ok(default) };
        if value.as_array().is_some() {
            return Err(
                self.bad(key, "it differs from block to block, which no program here accounts for".into())
            );
        }
        match value.as_u64() {
            Some(n) if key == "context_length" && n <= u64::from(u32::MAX) => Ok(n),
            Some(n) if (1..=MAX_DIM).contains(&n) => Ok(n),
            Some(n) => Err(self.bad(key, format!("{n} is not a size between 1 and {MAX_DIM}"))),
            None => Err(self.bad(key, "it is not a whole number".into())),
        }
    }

    fn float(&self, key: &str) -> Result<Option<f64>, Error> {
        let Some(value) = self.gguf.get(&self.full(key)) else { return Ok(None) };
        match value.as_f64().or(value.as_u64().map(|n| n as f64)) {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => Err(self.bad(key, "it is not a finite number".into())),
        }
    }

    fn text(&self, key: &str) -> Result<Option<String>, Error> {
        let Some(value) = self.gguf.get(&self.full(key)) else { return Ok(None) };
        match value.as_str() {
            Some(text) => Ok(Some(text.to_string())),
            None => Err(self.bad(key, "it is not a text".into())),
        }
    }

    fn refuse_unless(&self, key: &str, neutral: Option<f64>) -> Result<(), Error> {
        let Some(value) = self.gguf.get(&self.full(key)) else { return Ok(()) };
        let number = value.as_f64().or(value.as_u64().map(|n| n as f64)).or(value.as_bool().map(f64::from));
        match (number, neutral) {
            (Some(n), Some(neutral)) if n == neutral => Ok(()),
            _ => Err(self.bad(
                key,
                "it changes what a block computes in a way the programs do not account for".into(),
            )),
        }
    }
}
