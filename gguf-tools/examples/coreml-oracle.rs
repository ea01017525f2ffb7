//! What llama.cpp computes for a run of blocks, in F32: the truth that the packages' evaluator is compared with.
//!
//! `coreml-oracle MODEL.gguf FIRST LAST SCALE STEPS.json OUT` feeds tokens through the blocks before FIRST, rounds the
//! rows times SCALE (the packages' residual scale) to fp16, and feeds those, over SCALE, through FIRST..=LAST. STEPS.json
//! is a list of {"session", "rewind" (or null), "tokens"}, done in order; OUT gets, per step, the rows fed and the rows
//! computed, as fp32 (n, n_embd) each.
//!
//! The blocks FIRST..=LAST are evaluated with a KV cache of F32 and without flash attention, and MODEL.gguf must hold
//! them as F32: for other weights llama.cpp rounds what it multiplies them with to their type.

use std::fs;
use std::io::Write;

use gguf_tools::gguf::{Gguf, TensorType};
use half::f16;
use llama_sys_patch::{
    ContextParams, FlashAttn, Input, KvType, Model, ModelParams, Output, Row, Stage, StageParams,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Step {
    session: u32,
    rewind: Option<u32>,
    tokens: Vec<i32>,
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, first, last, scale, steps, out] = args.as_slice() else {
        return Err("usage: coreml-oracle MODEL.gguf FIRST LAST SCALE STEPS.json OUT".into());
    };
    let scale: f32 = scale.parse()?;
    let (first, last): (u32, u32) = (first.parse()?, last.parse()?);
    let steps: Vec<Step> = serde_json::from_slice(&fs::read(steps)?)?;
    let (blocks, gguf) = (first..=last, Gguf::open(model)?);
    let is_in = |name: &str| blocks.clone().any(|block| name.starts_with(&format!("blk.{block}.")));
    if let Some(other) = gguf.tensors().find(|t| is_in(t.name()) && t.tensor_type() != TensorType::F32) {
        return Err(format!("{} is {}, not F32", other.name(), other.tensor_type().name()).into());
    }
    let model = Model::load(
        &[model],
        ModelParams {
            gpu_layers: Some(0),
            use_mmap: true,
            no_lm_head: true,
            no_repack: true,
            ..Default::default()
        },
    )?;
    let longest = steps.iter().map(|s| s.tokens.len()).max().unwrap_or(0);
    let n_positions: usize = steps.iter().map(|s| s.tokens.len()).sum();
    let n_sessions = steps.iter().map(|s| s.session + 1).max().unwrap_or(1);
    let context = ContextParams {
        n_ctx: n_positions as u32,
        n_batch: longest.max(n_sessions as usize) as u32,
        n_ubatch: longest.max(n_sessions as usize) as u32,
        max_sessions: n_sessions,
        flash_attn: FlashAttn::Off,
        kv_type: KvType::F32,
        ..ContextParams::default()
    };
    let stage = |blocks: std::ops::Range<u32>| {
        let takes_tokens = blocks.start == 0;
        Stage::new(&model, StageParams { blocks, takes_tokens, has_lm_head: false, context: context.clone() })
    };
    let mut before = stage(0..first)?;
    let mut middle = stage(first..last + 1)?;
    let mut out = std::io::BufWriter::new(fs::File::create(out)?);
    for step in steps {
        if let Some(position) = step.rewind {
            before.rewind(step.session, position)?;
            middle.rewind(step.session, position)?;
        }
        let n = step.tokens.len();
        let rows = Row::chunk(step.session, middle.length(step.session)?, n);
        let mut hidden = vec![0.0f32; n * model.n_embd()];
        before.evaluate(&rows, Input::Tokens(&step.tokens), Output::F32(&mut hidden))?;
        hidden.iter_mut().for_each(|x| *x = f16::from_f32(*x * scale).to_f32() / scale);
        let mut computed = vec![0.0f32; hidden.len()];
        middle.evaluate(&rows, Input::F32(&hidden), Output::F32(&mut computed))?;
        for value in hidden.iter().chain(&computed) {
            out.write_all(&value.to_le_bytes())?;
        }
    }
    out.flush()?;
    Ok(())
}
