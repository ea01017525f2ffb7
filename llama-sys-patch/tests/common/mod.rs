//! Synthetic models, and a model's stages in a row in one process.

#![allow(dead_code)] // every test file uses its part

pub(crate) mod pipeline;
pub(crate) mod slices;

use std::ops::Range;
use std::path::PathBuf;

use gguf_tools::synth::Spec;
use half::f16;
use llama_sys_patch::{
    ContextParams, Error, Input, Model, ModelParams, Output, Row, Stage, StageParams, Stock,
};

/// A model file in a directory that goes away with it.
pub(crate) struct Synthetic {
    _directory: tempfile::TempDir,
    pub path: PathBuf,
}

pub(crate) fn write(spec: &Spec) -> Synthetic {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("model.gguf");
    spec.write(&path).expect("the model is written");
    Synthetic { _directory: directory, path }
}

/// Writes the model and loads it, on the CPU.
pub(crate) fn load(spec: &Spec) -> Model {
    let file = write(spec);
    Model::load(&[&file.path], ModelParams { gpu_layers: Some(0), ..Default::default() })
        .expect("the model loads")
}

/// One thread and small chunks, so that a short prompt has several.
pub(crate) fn context() -> ContextParams {
    ContextParams {
        n_ctx: 256,
        n_batch: 128,
        n_ubatch: 32,
        n_threads: 1,
        max_sessions: 1,
        ..Default::default()
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Wire {
    F16,
    F32,
}

/// The stages of a whole model, cut at `cuts`, one after another.
pub(crate) struct Chain {
    pub stages: Vec<Stage>,
    wire: Wire,
}

impl Chain {
    pub(crate) fn new(model: &Model, cuts: &[u32], context: &ContextParams, wire: Wire) -> Chain {
        let mut ends: Vec<u32> = cuts.to_vec();
        ends.push(model.n_blocks());
        let mut first = 0;
        let mut stages = Vec::new();
        for last in ends {
            let params = StageParams::of_whole_model(model, first..last, context.clone());
            stages.push(Stage::new(model, params).expect("a stage"));
            first = last;
        }
        Chain { stages, wire }
    }

    /// Rows through all stages: (rows that want output, n_vocab).
    pub(crate) fn evaluate(&mut self, rows: &[Row], tokens: &[i32]) -> Result<Vec<f32>, Error> {
        let n_embd = self.stages[0].model().n_embd();
        let n_vocab = self.stages[0].model().n_vocab();
        let wanted = rows.iter().filter(|row| row.want_output).count();
        let mut hidden32 = vec![0f32; rows.len() * n_embd];
        let mut hidden16 = vec![f16::ZERO; rows.len() * n_embd];
        let mut logits = vec![0f32; wanted * n_vocab];
        let n_stages = self.stages.len();
        for (i, stage) in self.stages.iter_mut().enumerate() {
            let (in32, in16) = (hidden32.clone(), hidden16.clone());
            let input = match (i, self.wire) {
                (0, _) => Input::Tokens(tokens),
                (_, Wire::F16) => Input::F16(&in16),
                (_, Wire::F32) => Input::F32(&in32),
            };
            let output = match self.wire {
                _ if i + 1 == n_stages => Output::Logits(&mut logits),
                Wire::F16 => Output::F16(&mut hidden16),
                Wire::F32 => Output::F32(&mut hidden32),
            };
            let n = stage.evaluate(rows, input, output)?;
            assert_eq!(n, if i + 1 == n_stages { wanted } else { rows.len() });
        }
        Ok(logits)
    }

    pub(crate) fn rewind(&mut self, session: u32, position: u32) {
        for stage in &mut self.stages {
            stage.rewind(session, position).expect("the position is in the session");
        }
    }
}

pub(crate) fn stock(model: &Model, context: &ContextParams) -> Stock {
    Stock::new(model, context, None).expect("a stock context")
}

pub(crate) fn decode(stock: &mut Stock, rows: &[Row], tokens: &[i32]) -> Vec<f32> {
    let wanted = rows.iter().filter(|row| row.want_output).count();
    let mut logits = vec![0f32; wanted * stock.model().n_vocab()];
    assert_eq!(stock.decode(rows, tokens, &mut logits).expect("llama_decode"), wanted);
    logits
}

/// Tokens that look like nothing in particular, the same every time.
pub(crate) fn tokens(model: &Model, seed: u64, n: usize) -> Vec<i32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % model.n_vocab() as u64) as i32
        })
        .collect()
}

pub(crate) fn argmax(logits: &[f32]) -> i32 {
    logits
        .iter()
        .enumerate()
        .max_by(|a, b| a.1.total_cmp(b.1))
        .map(|(i, _)| i as i32)
        .expect("there are logits")
}

pub(crate) fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Bit for bit, and not all zero (an empty comparison would pass too).
pub(crate) fn assert_exact(ours: &[f32], stock: &[f32], what: &str) {
    assert!(stock.iter().any(|&x| x != 0.0), "{what}: stock gives nothing but zeros");
    let same = ours.len() == stock.len() && ours.iter().zip(stock).all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(same, "{what}: max |difference| = {}", max_difference(ours, stock));
}

/// Ranges as `cuts` makes them.
pub(crate) fn ranges(cuts: &[u32], n_blocks: u32) -> Vec<Range<u32>> {
    let starts = std::iter::once(0).chain(cuts.iter().copied());
    starts.zip(cuts.iter().copied().chain([n_blocks])).map(|(a, b)| a..b).collect()
}
