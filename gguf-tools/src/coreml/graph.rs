//! The program of a run of blocks: what one call computes for T rows.
//!
//! It reads as the model does. Per block, with x the residual stream `[1, T, n_embd]`:
//!
//! ```text
//! h        = rmsnorm(x) * gain
//! q, k, v  = conv(h) + bias                  `[1, heads, T, head_dim]`, q and k normed (qwen3), rotated
//! `kv[2l]`   = k, `kv[2l+1]` = v                 rows pos .. pos + T of the state
//! a        = softmax(q/sqrt(head_dim) @ K^T + mask) @ V      over the whole context, masked
//! x        = x + conv(a)
//! h        = rmsnorm(x) * gain
//! x        = x + sum over parts of conv(silu(conv(h)) * conv(h))
//! ```
//!
//! What is peculiar is for the sake of fp16 and of the neural engine; docs/COREML.md has the evidence:
//! - rmsnorm is a layer_norm of (x, -x), whose mean is 0 and whose variance is the mean square, on x scaled by
//!   [`NORM_SCALE`] (a power of two, so exact): no square of it overflows fp16 below |x| = 16,320.
//! - q is scaled before the product, the mask is added and finite, the state is read once at the top and after that
//!   only through the value written last.
//! - q's heads that share a key head are viewed as more rows of it, so K and V are never tiled.
//! - the feed-forward network is cut into parts no wider than [`MAX_AXIS`].
//! - with a residual scale a (a power of two below 1), x stands for a * x throughout: epsilon shrinks by a^2 and
//!   what is added to x is scaled by a, on activations, so that the weights stay as they are.

use half::f16;

use dim_core::blocks::BlockRange;

use super::mil::{FunctionBuilder, State, Val};
use super::proto::{self, DataType};
use super::shape::Shape;

/// What x is multiplied by before it is squared.
pub const NORM_SCALE: f32 = 1.0 / 64.0;

/// The longest axis but the channel axis that the neural engine takes.
pub const MAX_AXIS: u64 = 16384;

/// What the mask holds where a row must not look. Finite: a row of nothing else would still be a number.
pub const MASKED: f32 = -1e4;

/// A tensor in the weight file: the offset of its record and its shape there.
#[derive(Clone, Debug)]
pub struct Weight {
    /// Offset of the metadata record in weight.bin.
    pub record: u64,
    /// Shape, outermost first.
    pub dims: Vec<u64>,
}

/// A projection: conv weight `[out, in, 1, 1]` and bias `[out]`.
#[derive(Clone, Debug)]
pub struct Projection {
    /// `[out, in, 1, 1]`
    pub weight: Weight,
    /// `[out]`
    pub bias: Option<Weight>,
}

/// One part of a feed-forward network: a range of its inner width.
#[derive(Clone, Debug)]
pub struct FfnPart {
    /// `[width, n_embd, 1, 1]`
    pub gate: Projection,
    /// `[width, n_embd, 1, 1]`
    pub up: Projection,
    /// `[n_embd, width, 1, 1]`; the bias is the first part's
    pub down: Projection,
}

/// The weights of one block.
#[derive(Clone, Debug)]
pub struct BlockWeights {
    /// Number in the model.
    pub block: u32,
    /// `[1, 1, n_embd]`
    pub attn_norm: Weight,
    /// `[n_head * head_dim, n_embd, 1, 1]`
    pub q: Projection,
    /// `[n_head_kv * head_dim, n_embd, 1, 1]`
    pub k: Projection,
    /// `[n_head_kv * head_dim, n_embd, 1, 1]`
    pub v: Projection,
    /// `[1, 1, 1, head_dim]` each, qwen3
    pub qk_norm: Option<(Weight, Weight)>,
    /// `[n_embd, n_head * head_dim, 1, 1]`
    pub o: Projection,
    /// `[1, 1, n_embd]`
    pub ffn_norm: Weight,
    /// At least one.
    pub ffn: Vec<FfnPart>,
}

/// What both functions of a package have in common.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The model's dimensions.
    pub shape: &'a Shape,
    /// Positions the state has room for.
    pub n_ctx: u32,
    /// Power of two, 1 in most models.
    pub residual_scale: f32,
}

impl Context<'_> {
    /// `[2 * blocks, n_head_kv, n_ctx, head_dim]`; row 2l holds block l's keys after rope, row 2l + 1 its values.
    pub fn state_dims(&self, n_blocks: usize) -> [u64; 4] {
        [2 * n_blocks as u64, self.shape.n_head_kv, self.n_ctx.into(), self.shape.head_dim]
    }

    /// The whole model of a package: functions `decode` (one row) and `prefill` (n_prefill rows).
    pub fn model(&self, blocks: &[BlockWeights], n_prefill: u32, metadata: proto::Metadata) -> proto::Model {
        let (decode_description, decode) = self.function("decode", 1, blocks);
        let (prefill_description, prefill) = self.function("prefill", n_prefill.into(), blocks);
        proto::Model {
            specification_version: 9,
            description: Some(proto::ModelDescription {
                functions: vec![decode_description, prefill_description],
                default_function_name: "decode".into(),
                metadata: Some(metadata),
            }),
            ml_program: Some(proto::Program {
                version: 1,
                functions: [("decode".to_string(), decode), ("prefill".to_string(), prefill)].into(),
            }),
        }
    }

    fn function(
        &self,
        name: &str,
        rows: u64,
        blocks: &[BlockWeights],
    ) -> (proto::FunctionDescription, proto::Function) {
        let (h, d, ctx) = (self.shape.n_embd, self.shape.head_dim, u64::from(self.n_ctx));
        let mut f = FunctionBuilder::default();
        let hidden = f.input("hidden", DataType::Float16, &[1, rows, h], "residual stream, one row a token");
        let pos = f.input("pos", DataType::Int32, &[1], "position of the first row");
        let cos = f.input("cos", DataType::Float16, &[1, 1, rows, d], "rope cosines, halves equal");
        let sin = f.input("sin", DataType::Float16, &[1, 1, rows, d], "rope sines, halves equal");
        let mask =
            f.input("mask", DataType::Float16, &[1, 1, rows, ctx], "0 where a row may look, else -10000");
        let state_dims = self.state_dims(blocks.len());
        let kv = f.state("kv", &state_dims, "keys (even rows) and values (odd rows) of every block");

        let n_rows = f.ints("n_rows", &[rows as i32]);
        let pos_end = f.add("pos_end", &pos, &n_rows);
        let cache = f.read_state("kv_before", &kv);
        let inputs = Inputs { rows, pos, pos_end, cos, sin, mask };

        let mut x = hidden;
        let mut cache = Cache { state: kv, value: cache };
        let last = blocks.len() - 1;
        for (i, weights) in blocks.iter().enumerate() {
            let output = if i == last { "hidden_out".into() } else { format!("b{}_out", weights.block) };
            x = Block { f: &mut f, context: self, inputs: &inputs, weights }
                .build(i as u64, x, &mut cache, &output);
        }
        f.finish(name, &x, "residual stream after the last block")
    }
}

struct Inputs {
    rows: u64,
    pos: Val,
    pos_end: Val,
    cos: Val,
    sin: Val,
    mask: Val,
}

/// The state, and the value it has now.
struct Cache {
    state: State,
    value: Val,
}

/// One block being built.
struct Block<'a> {
    f: &'a mut FunctionBuilder,
    context: &'a Context<'a>,
    inputs: &'a Inputs,
    weights: &'a BlockWeights,
}

impl Block<'_> {
    /// x: `[1, T, n_embd]` -> `[1, T, n_embd]` named `output`
    fn build(&mut self, index: u64, x: Val, cache: &mut Cache, output: &str) -> Val {
        let weights = self.weights;
        let h = self.norm("attn_norm", &x, &weights.attn_norm);
        let a = self.attention(index, &h, cache);
        let x = self.f.add(&self.name("attn_sum"), &x, &a);
        let h = self.norm("ffn_norm", &x, &weights.ffn_norm);
        let m = self.ffn(&h);
        self.f.add(output, &x, &m)
    }

    /// x: `[1, T, n_embd]` -> rmsnorm(x) * gain as the channels of a convolution, `[1, n_embd, 1, T]`
    fn norm(&mut self, name: &str, x: &Val, gain: &Weight) -> Val {
        let name = self.name(name);
        let normed = self.rms(&name, x, self.context.residual_scale);
        let gain = self.f.weight(&format!("{name}_gain"), &gain.dims, gain.record);
        let scaled = self.f.mul(&format!("{name}_gained"), &normed, &gain);
        let channels = self.f.transpose(&format!("{name}_channels"), &scaled, &[0, 2, 1]);
        self.f.expand_dims(&format!("{name}_out"), &channels, 2)
    }

    /// x / sqrt(mean(x^2) + epsilon) over the last axis; x stands for `scaled_by` times the model's values.
    fn rms(&mut self, name: &str, x: &Val, scaled_by: f32) -> Val {
        let s = NORM_SCALE * scaled_by;
        let n = *x.dims().last().expect("x has axes");
        // s * x, where x already carries scaled_by
        let small = self.f.scale(&format!("{name}_small"), x, f16::from_f32(NORM_SCALE));
        let negated = self.f.scale(&format!("{name}_negated"), &small, f16::NEG_ONE);
        let both = self.f.concat(&format!("{name}_both"), &[&small, &negated], x.dims().len() - 1);
        let normed = self.f.layer_norm(&format!("{name}_normed"), &both, self.context.shape.norm_eps * s * s);
        let mut end = normed.dims().to_vec();
        *end.last_mut().expect("as x") = n;
        self.f.slice(&format!("{name}_half"), &normed, &vec![0; end.len()], &end)
    }

    /// h: `[1, n_embd, 1, T]` -> `[1, T, n_embd]`
    fn attention(&mut self, index: u64, h: &Val, cache: &mut Cache) -> Val {
        let Shape { n_head, n_head_kv, head_dim: d, .. } = *self.context.shape;
        let (t, ctx, group) = (self.inputs.rows, u64::from(self.context.n_ctx), n_head / n_head_kv);
        let weights = self.weights;

        let q = self.heads("q", h, &weights.q, n_head);
        let k = self.heads("k", h, &weights.k, n_head_kv);
        let v = self.heads("v", h, &weights.v, n_head_kv);
        let (q, k) = match &weights.qk_norm {
            Some((q_gain, k_gain)) => {
                (self.head_norm("q_norm", &q, q_gain), self.head_norm("k_norm", &k, k_gain))
            }
            None => (q, k),
        };
        let q = self.rope("q", &q);
        let k = self.rope("k", &k);
        let q = self.f.scale(&self.name("q_scaled"), &q, f16::from_f64(1.0 / (d as f64).sqrt()));

        self.store("k", 2 * index, &k, cache);
        self.store("v", 2 * index + 1, &v, cache);
        let row = |f: &mut FunctionBuilder, name: String, row: u64| {
            f.slice(&name, &cache.value, &[row, 0, 0, 0], &[row + 1, n_head_kv, ctx, d])
        };
        let keys = row(self.f, self.name("keys"), 2 * index);
        let values = row(self.f, self.name("values"), 2 * index + 1);

        // the heads that share a key head stand next to each other: T rows each, seen as group * T rows
        let q = self.f.reshape(&self.name("q_grouped"), &q, &[1, n_head_kv, group * t, d]);
        let scores = self.f.matmul(&self.name("scores_grouped"), &q, &keys, true);
        let scores = self.f.reshape(&self.name("scores"), &scores, &[1, n_head, t, ctx]);
        let scores = self.f.add(&self.name("scores_masked"), &scores, &self.inputs.mask);
        let probabilities = self.f.softmax(&self.name("probabilities"), &scores);
        let grouped = [1, n_head_kv, group * t, ctx];
        let probabilities = self.f.reshape(&self.name("probabilities_grouped"), &probabilities, &grouped);
        let mixed = self.f.matmul(&self.name("mixed_grouped"), &probabilities, &values, false);
        let mixed = self.f.reshape(&self.name("mixed_heads"), &mixed, &[1, n_head, t, d]);
        let mixed = self.f.transpose(&self.name("mixed_columns"), &mixed, &[0, 1, 3, 2]);
        let mut mixed = self.f.reshape(&self.name("mixed"), &mixed, &[1, n_head * d, 1, t]);
        if self.context.residual_scale != 1.0 {
            let scale = f16::from_f32(self.context.residual_scale);
            mixed = self.f.scale(&self.name("mixed_scaled"), &mixed, scale);
        }
        let out = self.project("o", &mixed, &weights.o);
        self.rows("attn", &out)
    }

    /// h: `[1, n_embd, 1, T]` -> `[1, T, n_embd]`
    fn ffn(&mut self, h: &Val) -> Val {
        let weights = self.weights;
        let mut sum: Option<Val> = None;
        for (i, part) in weights.ffn.iter().enumerate() {
            let gate = self.project(&format!("gate{i}"), h, &part.gate);
            let mut gate = self.f.silu(&self.name(&format!("gate{i}_silu")), &gate);
            if self.context.residual_scale != 1.0 {
                let scale = f16::from_f32(self.context.residual_scale);
                gate = self.f.scale(&self.name(&format!("gate{i}_scaled")), &gate, scale);
            }
            let up = self.project(&format!("up{i}"), h, &part.up);
            let inner = self.f.mul(&self.name(&format!("inner{i}")), &gate, &up);
            let down = self.project(&format!("down{i}"), &inner, &part.down);
            sum = Some(match sum {
                Some(sum) => self.f.add(&self.name(&format!("ffn_sum{i}")), &sum, &down),
                None => down,
            });
        }
        self.rows("ffn", &sum.expect("a network has parts"))
    }

    /// h: `[1, n_embd, 1, T]` -> `[1, n, T, head_dim]`
    fn heads(&mut self, name: &str, h: &Val, weights: &Projection, n: u64) -> Val {
        let (t, d) = (self.inputs.rows, self.context.shape.head_dim);
        let x = self.project(name, h, weights);
        let x = self.f.reshape(&self.name(&format!("{name}_columns")), &x, &[1, n, d, t]);
        self.f.transpose(&self.name(&format!("{name}_heads")), &x, &[0, 1, 3, 2])
    }

    /// x: `[1, n, T, head_dim]`, rmsnorm over each head
    fn head_norm(&mut self, name: &str, x: &Val, gain: &Weight) -> Val {
        let name = self.name(name);
        let normed = self.rms(&name, x, 1.0);
        let gain = self.f.weight(&format!("{name}_gain"), &gain.dims, gain.record);
        self.f.mul(&format!("{name}_out"), &normed, &gain)
    }

    /// x: `[1, n, T, head_dim]`, halves (a, b) -> x * cos + (-b, a) * sin
    fn rope(&mut self, name: &str, x: &Val) -> Val {
        let name = self.name(name);
        let [one, n, t, d] = *x.dims() else { unreachable!("heads have four axes") };
        let a = self.f.slice(&format!("{name}_first"), x, &[0, 0, 0, 0], &[one, n, t, d / 2]);
        let b = self.f.slice(&format!("{name}_second"), x, &[0, 0, 0, d / 2], &[one, n, t, d]);
        let b = self.f.scale(&format!("{name}_second_negated"), &b, f16::NEG_ONE);
        let turned = self.f.concat(&format!("{name}_turned"), &[&b, &a], 3);
        let along = self.f.mul(&format!("{name}_cos"), x, &self.inputs.cos);
        let across = self.f.mul(&format!("{name}_sin"), &turned, &self.inputs.sin);
        self.f.add(&format!("{name}_rope"), &along, &across)
    }

    /// x: `[1, n_head_kv, T, head_dim]` into row `row` of the state, positions pos .. pos + T
    fn store(&mut self, name: &str, row: u64, x: &Val, cache: &mut Cache) {
        let name = self.name(&format!("{name}_store"));
        let f = &mut *self.f;
        let zero = f.ints(&format!("{name}_zero"), &[0]);
        let first = f.ints(&format!("{name}_row"), &[row as i32]);
        let after = f.ints(&format!("{name}_row_end"), &[row as i32 + 1]);
        let begin = f.concat(&format!("{name}_begin"), &[&first, &zero, &self.inputs.pos, &zero], 0);
        let end = f.concat(&format!("{name}_end"), &[&after, &zero, &self.inputs.pos_end, &zero], 0);
        let whole = [false, true, false, true];
        let updated = f.slice_update(&format!("{name}_updated"), &cache.value, x, &begin, &end, &whole);
        f.write_state(&format!("{name}_write"), &cache.state, &updated);
        cache.value = f.read_state(&format!("{name}_read"), &cache.state);
    }

    fn project(&mut self, name: &str, x: &Val, weights: &Projection) -> Val {
        let name = self.name(name);
        let weight = self.f.weight(&format!("{name}_weight"), &weights.weight.dims, weights.weight.record);
        let bias = weights.bias.as_ref().map(|b| self.f.weight(&format!("{name}_bias"), &b.dims, b.record));
        self.f.conv(&name, x, &weight, bias.as_ref())
    }

    /// `[1, n_embd, 1, T]` -> `[1, T, n_embd]`
    fn rows(&mut self, name: &str, x: &Val) -> Val {
        let x = self.f.squeeze(&self.name(&format!("{name}_columns")), x, 2);
        self.f.transpose(&self.name(&format!("{name}_rows")), &x, &[0, 2, 1])
    }

    fn name(&self, name: &str) -> String {
        format!("b{}_{name}", self.weights.block)
    }
}

/// The ranges of 0..n_ff that the parts of a feed-forward network cover: as few as [`MAX_AXIS`] allows, all but the
/// last of the same width, a multiple of 64.
pub fn ffn_parts(n_ff: u64) -> Vec<std::ops::Range<u64>> {
    let n = n_ff.div_ceil(MAX_AXIS);
    let width = if n == 1 { n_ff } else { n_ff.div_ceil(n).next_multiple_of(64) };
    (0..n).map(|i| i * width..((i + 1) * width).min(n_ff)).filter(|r| !r.is_empty()).collect()
}

/// The runs of blocks that packages hold: as few packages as `per_package` allows, filled evenly, larger ones first.
pub fn package_runs(blocks: BlockRange, per_package: u32) -> Vec<BlockRange> {
    let n = blocks.count();
    let n_packages = n.div_ceil(per_package);
    let mut first = blocks.first;
    (0..n_packages)
        .map(|i| {
            let len = n / n_packages + u32::from(i < n % n_packages);
            let run = BlockRange { first, last: first + len - 1 };
            first += len;
            run
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feed_forward_networks_are_cut_where_an_axis_is_too_long() {
        assert_eq!(ffn_parts(11008).len(), 1);
        assert_eq!(ffn_parts(MAX_AXIS).len(), 1);
        assert_eq!(ffn_parts(18944), [0..9472, 9472..18944]);
        assert_eq!(ffn_parts(27648), [0..13824, 13824..27648]);
        for n_ff in (16385..70_000).step_by(61) {
            let parts = ffn_parts(n_ff);
            assert_eq!((parts[0].start, parts.last().unwrap().end), (0, n_ff));
            assert!(parts.windows(2).all(|p| p[0].end == p[1].start));
            assert!(parts.iter().all(|p| !p.is_empty() && p.end - p.start <= MAX_AXIS), "{n_ff}: {parts:?}");
        }
    }

    #[test]
    fn packages_are_filled_evenly_and_in_order() {
        let range = |first, last| BlockRange { first, last };
        assert_eq!(package_runs(range(11, 16), 2), [range(11, 12), range(13, 14), range(15, 16)]);
        assert_eq!(package_runs(range(3, 9), 3), [range(3, 5), range(6, 7), range(8, 9)]);
        assert_eq!(package_runs(range(3, 4), u32::MAX).len(), 1);
        for (n, per_package) in (1..40).flat_map(|n| (1..9).map(move |p| (n, p))) {
            let runs = package_runs(range(5, 4 + n), per_package);
            assert_eq!(runs.len() as u32, n.div_ceil(per_package));
            assert_eq!((runs[0].first, runs.last().unwrap().last), (5, 4 + n));
            assert!(runs.windows(2).all(|r| r[0].last + 1 == r[1].first));
            assert!(runs.iter().all(|r| r.count() <= per_package));
        }
    }
}
