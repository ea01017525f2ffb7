//! What each family's loader in llama.cpp wants: its keys, its tensors, and how large each tensor's values must be
//! for the model to behave like a trained one.
//!
//! The sizes follow one idea. Norms make every block's input 1; a query-key product gets a deviation of 3, so that
//! attention looks at few positions and the text depends on its past; all block outputs together give the residual
//! stream a length of [`STREAM`]; logits get a deviation of [`LOGITS`]. Where the lm_head is the embedding, the
//! embedding's own share of the stream is kept so small that the likeliest next token is not the last one again.

use super::shapes::{Experts, RopeFactors, Shape};
use crate::gguf::Value;

/// One tensor to be made.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Its name in the file.
    pub name: String,
    /// `dims[0]` is the row.
    pub dims: Vec<u64>,
    /// How it is filled.
    pub fill: Fill,
}

/// What a tensor is filled with.
#[derive(Debug, Clone)]
pub enum Fill {
    /// A matrix: N(0, deviation), in the model's type.
    Matrix(f32),
    /// As a matrix, but rows of special tokens are nearly 0: no random model ends its own text.
    Vocabulary(f32),
    /// Norms and biases: N(mean, deviation), always F32.
    Vector(f32, f32),
    /// Small matrices that llama.cpp keeps in F32, routers of experts.
    Router(f32),
    /// These values, F32.
    Values(Vec<f32>),
}

/// How a family's norms are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Norm {
    /// root mean square, weight
    Rms,
    /// mean and deviation, weight and bias
    Layer,
    /// mean and deviation, weight only
    LayerNoBias,
    /// mean and deviation, no tensor at all
    LayerBare,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Qkv {
    Separate,
    /// three matrices, each with a bias
    SeparateBias,
    /// one matrix
    Fused,
    FusedBias,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ffn {
    /// down(act(gate) * up)
    Gated,
    /// gate and up in one matrix
    GatedFused,
    /// down(act(up))
    Plain,
    /// down(act(up)), biases
    PlainBias,
    /// experts, with or without a shared one
    Experts,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum QkNorm {
    No,
    /// one weight per value of a head, all heads alike
    PerHead,
    /// over the whole row
    Row,
}

/// Which lm_heads a family's loader takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// the token embedding or a matrix of its own
    Either,
    /// the token embedding only
    Tied,
    /// a matrix of its own only
    Own,
}

/// One architecture as llama.cpp knows it.
#[derive(Debug)]
pub struct Family {
    /// `general.architecture`.
    pub arch: &'static str,
    /// Its lm_head.
    pub head: Head,
    norm: Norm,
    qkv: Qkv,
    /// the attention's output matrix has a bias
    out_bias: bool,
    ffn: Ffn,
    qk_norm: QkNorm,
    /// norms before attention and before the feed-forward part
    pre_norms: (bool, bool),
    /// norms after attention and after the feed-forward part, before they are added
    post_norms: bool,
    /// what the norm before the feed-forward part is called
    ffn_norm: &'static str,
    output_bias: bool,
    /// llama.cpp's name for the way its text is split before merging
    pub pre_tokenizer: &'static str,
    /// whether a text begins with a token of its own
    pub add_bos: bool,
}

/// The most common kind, to be changed field by field.
const PLAIN: Family = Family {
    arch: "",
    head: Head::Either,
    norm: Norm::Rms,
    qkv: Qkv::Separate,
    out_bias: false,
    ffn: Ffn::Gated,
    qk_norm: QkNorm::No,
    pre_norms: (true, true),
    post_norms: false,
    ffn_norm: "ffn_norm",
    output_bias: false,
    pre_tokenizer: "gpt-2",
    add_bos: false,
};

/// Every family there is.
pub const FAMILIES: &[Family] = &[
    Family { arch: "qwen2", qkv: Qkv::SeparateBias, pre_tokenizer: "qwen2", ..PLAIN },
    Family { arch: "qwen3", qk_norm: QkNorm::PerHead, pre_tokenizer: "qwen2", ..PLAIN },
    Family { arch: "llama", pre_tokenizer: "llama-bpe", add_bos: true, ..PLAIN },
    Family {
        arch: "qwen2moe",
        head: Head::Own,
        qkv: Qkv::SeparateBias,
        ffn: Ffn::Experts,
        pre_tokenizer: "qwen2",
        ..PLAIN
    },
    Family { arch: "qwen3moe", qk_norm: QkNorm::PerHead, ffn: Ffn::Experts, pre_tokenizer: "qwen2", ..PLAIN },
    Family { arch: "mistral3", pre_tokenizer: "tekken", add_bos: true, ..PLAIN },
    Family {
        arch: "olmo2",
        head: Head::Own,
        qk_norm: QkNorm::Row,
        pre_norms: (false, false),
        post_norms: true,
        ..PLAIN
    },
    Family { arch: "olmo", norm: Norm::LayerBare, pre_tokenizer: "olmo", ..PLAIN },
    Family {
        arch: "olmoe",
        head: Head::Own,
        qk_norm: QkNorm::Row,
        ffn: Ffn::Experts,
        pre_tokenizer: "olmo",
        ..PLAIN
    },
    Family {
        arch: "starcoder2",
        norm: Norm::Layer,
        qkv: Qkv::SeparateBias,
        out_bias: true,
        ffn: Ffn::PlainBias,
        pre_tokenizer: "starcoder",
        ..PLAIN
    },
    Family {
        arch: "stablelm",
        head: Head::Own,
        norm: Norm::Layer,
        qkv: Qkv::SeparateBias,
        pre_tokenizer: "stablelm2",
        ..PLAIN
    },
    Family { arch: "internlm2", head: Head::Own, ..PLAIN },
    Family { arch: "granite", pre_tokenizer: "refact", ..PLAIN },
    Family { arch: "granitemoe", ffn: Ffn::Experts, pre_tokenizer: "refact", ..PLAIN },
    Family { arch: "minicpm", ..PLAIN },
    Family { arch: "exaone", pre_tokenizer: "exaone", ..PLAIN },
    Family { arch: "seed_oss", qkv: Qkv::SeparateBias, ffn_norm: "post_attention_norm", ..PLAIN },
    Family { arch: "arcee", ffn: Ffn::Plain, pre_tokenizer: "llama-bpe", add_bos: true, ..PLAIN },
    Family {
        arch: "chatglm",
        qkv: Qkv::FusedBias,
        ffn: Ffn::GatedFused,
        pre_tokenizer: "chatglm-bpe",
        ..PLAIN
    },
    Family { arch: "gemma", head: Head::Tied, add_bos: true, ..PLAIN },
    Family {
        arch: "phi2",
        head: Head::Own,
        norm: Norm::Layer,
        qkv: Qkv::FusedBias,
        out_bias: true,
        ffn: Ffn::PlainBias,
        pre_norms: (true, false),
        output_bias: true,
        ..PLAIN
    },
    Family { arch: "phi3", qkv: Qkv::Fused, ffn: Ffn::GatedFused, ..PLAIN },
    Family {
        arch: "command-r",
        head: Head::Tied,
        norm: Norm::LayerNoBias,
        pre_norms: (true, false),
        pre_tokenizer: "command-r",
        add_bos: true,
        ..PLAIN
    },
    Family {
        arch: "falcon",
        norm: Norm::Layer,
        qkv: Qkv::Fused,
        ffn: Ffn::Plain,
        pre_norms: (true, false),
        pre_tokenizer: "falcon",
        ..PLAIN
    },
    Family {
        arch: "gptneox",
        head: Head::Own,
        norm: Norm::Layer,
        qkv: Qkv::FusedBias,
        out_bias: true,
        ffn: Ffn::PlainBias,
        ..PLAIN
    },
];

impl Family {
    /// The family of this architecture.
    pub fn find(arch: &str) -> Option<&'static Family> {
        FAMILIES.iter().find(|family| family.arch == arch)
    }

    /// Gives a shape of no real model what this family cannot be without.
    pub(super) fn adapt(&self, shape: &mut Shape) {
        if self.ffn == Ffn::Experts {
            let n_ff_shared = if self.arch == "qwen2moe" { shape.n_ff } else { 0 };
            shape.n_ff /= 2;
            shape.experts = Some(Experts { n: 8, n_used: 2, n_ff_shared });
        }
        match self.arch {
            "stablelm" | "gptneox" => shape.n_rot = shape.head_dim / 4,
            "phi2" | "chatglm" => shape.n_rot = shape.head_dim / 2,
            // its loader wants the norm of k as long as a hidden row
            "olmoe" => shape.n_head_kv = shape.n_head,
            _ => {}
        }
    }

    /// The keys of `<arch>.*`.
    pub fn metadata(&self, shape: &Shape) -> Vec<(String, Value<'static>)> {
        let mut keys = Vec::new();
        let mut put = |name: &str, value| keys.push((format!("{}.{name}", self.arch), value));
        put("vocab_size", Value::U32(shape.n_vocab));
        put("context_length", Value::U32(shape.n_ctx));
        put("embedding_length", Value::U32(shape.n_embd));
        put("block_count", Value::U32(shape.n_blocks));
        put("feed_forward_length", Value::U32(shape.n_ff));
        put("attention.head_count", Value::U32(shape.n_head));
        put("attention.head_count_kv", Value::U32(shape.n_head_kv));
        if shape.head_dim * shape.n_head != shape.n_embd || self.arch.starts_with("qwen3") {
            put("attention.key_length", Value::U32(shape.head_dim));
            put("attention.value_length", Value::U32(shape.head_dim));
        }
        put("rope.dimension_count", Value::U32(shape.n_rot));
        put("rope.freq_base", Value::F32(shape.rope_base));
        match self.norm {
            Norm::Rms => put("attention.layer_norm_rms_epsilon", Value::F32(shape.eps)),
            _ => put("attention.layer_norm_epsilon", Value::F32(shape.eps)),
        }
        if let Some(experts) = shape.experts {
            put("expert_count", Value::U32(experts.n));
            put("expert_used_count", Value::U32(experts.n_used));
            put("expert_feed_forward_length", Value::U32(shape.n_ff));
            if experts.n_ff_shared > 0 {
                put("expert_shared_feed_forward_length", Value::U32(experts.n_ff_shared));
            }
        }
        if let Some(window) = shape.window {
            put("attention.sliding_window", Value::U32(window));
        }
        if let RopeFactors::Long { original } = shape.rope_factors {
            put("rope.scaling.original_context_length", Value::U32(original));
            put("rope.scaling.attn_factor", Value::F32(1.19));
        }
        let scales = self.scales(shape);
        match self.arch {
            "granite" | "granitemoe" => {
                put("embedding_scale", Value::F32(scales.embedding));
                put("residual_scale", Value::F32(scales.residual));
                put("attention.scale", Value::F32(scales.attention));
                put("logit_scale", Value::F32(1.0 / scales.logit));
            }
            "command-r" => put("logit_scale", Value::F32(scales.logit)),
            "gptneox" => put("use_parallel_residual", Value::Bool(true)),
            _ => {}
        }
        keys
    }

    /// The tensors, in the order in which they stand in the file.
    ///
    /// `gain` scales the whole residual stream: the model says the same, its hidden rows are `gain` times as long.
    pub fn tensors(&self, shape: &Shape, tied: bool, gain: f32) -> Vec<Tensor> {
        let scales = self.scales(shape);
        let width = shape.n_embd as f32;
        // without a last norm's weight, a tied embedding must have the lm_head's length itself
        let stream = if tied && self.norm == Norm::LayerBare { LOGITS / OWN } else { STREAM };
        // what one of the 2 * n_blocks branches adds
        let branch = stream / (2.0 * shape.n_blocks as f32).sqrt() / scales.residual * gain;
        let embedding = if tied { OWN * stream / width.sqrt() } else { 0.5 } / scales.embedding * gain;
        // the norm before the lm_head carries what a tied embedding's length cannot
        let (head, head_norm) = match tied {
            true => (0.0, LOGITS / (embedding * width.sqrt() * scales.logit)),
            false => (LOGITS / (width.sqrt() * scales.logit), 1.0),
        };

        let n_embd = u64::from(shape.n_embd);
        let n_vocab = u64::from(shape.n_vocab);
        let mut tensors = Vec::new();
        let mut add =
            |name: String, dims: &[u64], fill| tensors.push(Tensor { name, dims: dims.to_vec(), fill });
        add("token_embd.weight".into(), &[n_embd, n_vocab], Fill::Vocabulary(embedding));
        for (name, factors) in rope_factors(shape) {
            add(name.into(), &[factors.len() as u64], Fill::Values(factors));
        }
        for block in 0..shape.n_blocks {
            let mut add = |name: &str, dims: &[u64], fill| add(format!("blk.{block}.{name}"), dims, fill);
            self.attention(shape, &scales, branch, &mut add);
            self.feed_forward(shape, branch, &mut add);
        }
        self.norm_tensors("output_norm", n_embd, head_norm, &mut |name, dims, fill| {
            add(name.into(), dims, fill)
        });
        if !tied {
            add("output.weight".into(), &[n_embd, n_vocab], Fill::Vocabulary(head));
            if self.output_bias {
                add("output.bias".into(), &[n_vocab], Fill::Vector(0.0, 0.1));
            }
        }
        tensors
    }

    fn attention(
        &self,
        shape: &Shape,
        scales: &Scales,
        branch: f32,
        add: &mut dyn FnMut(&str, &[u64], Fill),
    ) {
        let n_embd = u64::from(shape.n_embd);
        let (n_q, n_kv) =
            (u64::from(shape.n_head * shape.head_dim), u64::from(shape.n_head_kv * shape.head_dim));
        let unit = 1.0 / (shape.n_embd as f32).sqrt();
        // the deviation of q and of k that gives their product SCORES
        let sharp = (SCORES / (scales.attention * (shape.head_dim as f32).sqrt())).sqrt();

        if self.pre_norms.0 {
            self.norm_tensors("attn_norm", n_embd, 1.0, add);
        }
        // families that norm q and k carry the sharpness in the norms
        let (in_matrix, in_norm) = match self.qk_norm {
            QkNorm::No => (sharp, 0.0),
            _ => (1.0, sharp),
        };
        match self.qkv {
            Qkv::Separate | Qkv::SeparateBias => {
                for (name, rows, size) in [("q", n_q, in_matrix), ("k", n_kv, in_matrix), ("v", n_kv, 1.0)] {
                    add(&format!("attn_{name}.weight"), &[n_embd, rows], Fill::Matrix(size * unit));
                    if self.qkv == Qkv::SeparateBias {
                        add(&format!("attn_{name}.bias"), &[rows], Fill::Vector(0.0, BIAS));
                    }
                }
            }
            Qkv::Fused | Qkv::FusedBias => {
                add("attn_qkv.weight", &[n_embd, n_q + 2 * n_kv], Fill::Matrix(in_matrix * unit));
                if self.qkv == Qkv::FusedBias {
                    add("attn_qkv.bias", &[n_q + 2 * n_kv], Fill::Vector(0.0, BIAS));
                }
            }
        }
        match self.qk_norm {
            QkNorm::No => {}
            QkNorm::PerHead => {
                for name in ["attn_q_norm.weight", "attn_k_norm.weight"] {
                    add(name, &[u64::from(shape.head_dim)], Fill::Vector(in_norm, 0.1 * in_norm));
                }
            }
            QkNorm::Row => {
                add("attn_q_norm.weight", &[n_q], Fill::Vector(in_norm, 0.1 * in_norm));
                add("attn_k_norm.weight", &[n_kv], Fill::Vector(in_norm, 0.1 * in_norm));
            }
        }
        // an average over several positions is shorter than one of them
        let out = if self.post_norms { 1.0 } else { 1.6 * branch };
        add("attn_output.weight", &[n_q, n_embd], Fill::Matrix(out / (n_q as f32).sqrt()));
        if self.out_bias {
            add("attn_output.bias", &[n_embd], Fill::Vector(0.0, BIAS * branch));
        }
        if self.post_norms {
            add("post_attention_norm.weight", &[n_embd], Fill::Vector(branch, 0.1 * branch));
        }
    }

    fn feed_forward(&self, shape: &Shape, branch: f32, add: &mut dyn FnMut(&str, &[u64], Fill)) {
        let n_embd = u64::from(shape.n_embd);
        let n_ff = u64::from(shape.n_ff);
        let unit = 1.0 / (shape.n_embd as f32).sqrt();
        if self.pre_norms.1 {
            self.norm_tensors(self.ffn_norm, n_embd, 1.0, add);
        }
        // activations halve what comes in
        let down =
            |n: u64| Fill::Matrix(if self.post_norms { 1.0 } else { 1.6 * branch } / (n as f32).sqrt());
        match (self.ffn, shape.experts) {
            (Ffn::Experts, Some(experts)) | (_, Some(experts)) => {
                let n = u64::from(experts.n);
                add("ffn_gate_inp.weight", &[n_embd, n], Fill::Router(2.0 * unit));
                add("ffn_gate_exps.weight", &[n_embd, n_ff, n], Fill::Matrix(unit));
                add("ffn_down_exps.weight", &[n_ff, n_embd, n], down(n_ff));
                add("ffn_up_exps.weight", &[n_embd, n_ff, n], Fill::Matrix(unit));
                if experts.n_ff_shared > 0 {
                    let n_shared = u64::from(experts.n_ff_shared);
                    add("ffn_gate_inp_shexp.weight", &[n_embd], Fill::Vector(0.0, unit));
                    add("ffn_gate_shexp.weight", &[n_embd, n_shared], Fill::Matrix(unit));
                    add("ffn_down_shexp.weight", &[n_shared, n_embd], down(n_shared));
                    add("ffn_up_shexp.weight", &[n_embd, n_shared], Fill::Matrix(unit));
                }
            }
            (Ffn::Gated | Ffn::Experts, None) => {
                add("ffn_gate.weight", &[n_embd, n_ff], Fill::Matrix(unit));
                add("ffn_up.weight", &[n_embd, n_ff], Fill::Matrix(unit));
                add("ffn_down.weight", &[n_ff, n_embd], down(n_ff));
            }
            (Ffn::GatedFused, None) => {
                add("ffn_up.weight", &[n_embd, 2 * n_ff], Fill::Matrix(unit));
                add("ffn_down.weight", &[n_ff, n_embd], down(n_ff));
            }
            (Ffn::Plain | Ffn::PlainBias, None) => {
                // GELU of N(0, 1) has a mean, which adds the same row to every position; of N(0, 1/4) hardly
                add("ffn_up.weight", &[n_embd, n_ff], Fill::Matrix(0.5 * unit));
                add("ffn_down.weight", &[n_ff, n_embd], Fill::Matrix(4.0 * branch / (n_ff as f32).sqrt()));
                if self.ffn == Ffn::PlainBias {
                    add("ffn_up.bias", &[n_ff], Fill::Vector(GELU_CENTRE, BIAS));
                    add("ffn_down.bias", &[n_embd], Fill::Vector(0.0, BIAS * branch));
                }
            }
        }
        if self.post_norms {
            add("post_ffw_norm.weight", &[n_embd], Fill::Vector(branch, 0.1 * branch));
        }
    }

    fn norm_tensors(&self, name: &str, n: u64, size: f32, add: &mut dyn FnMut(&str, &[u64], Fill)) {
        if self.norm != Norm::LayerBare {
            add(&format!("{name}.weight"), &[n], Fill::Vector(size, 0.1 * size));
        }
        if self.norm == Norm::Layer {
            add(&format!("{name}.bias"), &[n], Fill::Vector(0.0, BIAS * size));
        }
    }

    /// The factors the family multiplies with on the way.
    fn scales(&self, shape: &Shape) -> Scales {
        let usual = 1.0 / (shape.head_dim as f32).sqrt();
        let plain = Scales { embedding: 1.0, residual: 1.0, attention: usual, logit: 1.0 };
        match self.arch {
            "granite" => Scales {
                embedding: 12.0,
                residual: 0.22,
                attention: 1.0 / shape.head_dim as f32,
                logit: 0.125,
            },
            "gemma" => Scales { embedding: (shape.n_embd as f32).sqrt(), ..plain },
            // its first converters left these out of the file, and so does this
            "minicpm" => Scales {
                embedding: 12.0,
                residual: 1.4 / (shape.n_blocks as f32).sqrt(),
                logit: shape.n_embd as f32 / 256.0,
                ..plain
            },
            "command-r" => Scales { logit: 0.0625, ..plain },
            _ => plain,
        }
    }
}

/// Factors on: the embedding, what a branch adds, query-key products, logits.
struct Scales {
    embedding: f32,
    residual: f32,
    attention: f32,
    logit: f32,
}

/// Length (root mean square) of the residual stream after the last block.
const STREAM: f32 = 2.5;
/// Share of a tied embedding in the stream, in units of 1 / sqrt(n_embd): how much likelier than others a token is
/// to follow itself, in deviations of the logits.
const OWN: f32 = 0.4;
/// A bias that gives GELU(N(bias, 1/4)) a mean of 0.
const GELU_CENTRE: f32 = -0.205;
/// Deviation of the logits.
const LOGITS: f32 = 4.0;
/// Deviation of attention scores.
const SCORES: f32 = 3.0;
/// Deviation of biases, in units of what they are added to.
const BIAS: f32 = 0.03;

/// The tensors of a stretched rotation.
fn rope_factors(shape: &Shape) -> Vec<(&'static str, Vec<f32>)> {
    let halves = 0..shape.n_rot / 2;
    match shape.rope_factors {
        RopeFactors::None => vec![],
        RopeFactors::Llama3 => vec![("rope_freqs.weight", halves.map(|i| llama3_factor(shape, i)).collect())],
        // from 1 for the fastest frequency to some 1.5 and some 32 for the slowest
        RopeFactors::Long { .. } => {
            let slope = |i: u32, last: f32| 1.0 + (last - 1.0) * i as f32 / (shape.n_rot / 2 - 1) as f32;
            vec![
                ("rope_factors_long.weight", halves.clone().map(|i| slope(i, 32.0)).collect()),
                ("rope_factors_short.weight", halves.map(|i| slope(i, 1.5)).collect()),
            ]
        }
    }
}

/// What stretches llama 3's rotation to 131,072 positions: 1 for fast frequencies, 8 (32 in the models with a tied
/// lm_head) for slow ones, a slope between.
fn llama3_factor(shape: &Shape, i: u32) -> f32 {
    let (factor, low, high, original) = (if shape.tied { 32.0 } else { 8.0 }, 1.0, 4.0, 8192.0);
    let exponent = f64::from(2 * i) / f64::from(shape.n_rot);
    let wavelength = 2.0 * std::f64::consts::PI * super::weights::power(f64::from(shape.rope_base), exponent);
    let stretched = if wavelength < original / high {
        1.0
    } else if wavelength > original / low {
        factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        1.0 / ((1.0 - smooth) / factor + smooth)
    };
    stretched as f32
}
