//! Hidden rows of a real text at every package boundary, by llama.cpp: what a worker checks itself with.
//!
//! The text goes through the blocks before the middle, then through the blocks of each package, in F32 on the CPU. The
//! rows at the boundaries are kept; the greatest |hidden| after every block is what decides whether fp16 holds the
//! residual stream. The text starts as the model wants it (its beginning-of-text token first): the first token of a
//! text carries the massive activations that matter here.
//!
//! selftest.bin is one array after the other, little-endian, row-major: per boundary (n_rows, n_embd) in fp16, then the
//! same in fp32, all times the residual scale. Every offset is in the manifest.

use std::ops::RangeInclusive;

use half::f16;
use llama_sys_patch::{ContextParams, FlashAttn, Input, Model, ModelParams, Output, Row, Stage, StageParams};

use super::manifest::{Boundary, SelfTest};
use super::package::{SELF_TEST, Staging};
use super::{Error, Options, Progress};
use crate::gguf::Gguf;

/// Tokens of the calibration text, if the vectors need no more.
const CALIBRATION_TOKENS: usize = 128;
/// Rows after the prefill that the vectors hold, one decode step each.
const DECODE_STEPS: usize = 8;
/// Rows computed at once.
const CHUNK: usize = 128;

/// The calibration text: prose, a list, numbers, code and a second language, so that many kinds of tokens occur.
const TEXT: &str = "\
The lighthouse keeper wrote in his log every evening, whether anything had happened or not. On the twelfth of March he \
noted that the wind had turned to the north-west, that two ships had passed, and that the lamp had needed a new wick. \
\"It is not the storms that wear a man down,\" he told the inspector, who came once a year by boat; \"it is the quiet \
between them.\" The inspector nodded, counted the barrels of oil (there were 14, as there should be), and asked why the \
third step of the stair was still broken. Nobody had an answer to that.

How to repair a step:
1. Remove the old board; keep the nails if they are straight.
2. Measure twice: 82.5 cm x 24 cm x 3.2 cm.
3. Cut, plane, and oil the new board. Let it dry for 2 days.

def height(steps, rise=0.18):
    \"\"\"Height of a stair in metres.\"\"\"
    return sum(rise for _ in range(steps))  # 96 steps -> 17.28

Am Abend, wenn die Lampe brannte, las er laut aus einem Buch vor, obwohl niemand zuhörte. Die Möwen, sagte er, \
verstünden mehr davon, als man glaube. In 1911 the light was made electric, the keeper's post was given up, and the log, \
with its 9,862 entries, went to the harbour office, where it can still be read: the last line says only \"Lamp out at \
6:04. All well.\" Historians have since compared his remarks about the weather with those of three other stations along \
the coast; they differ by less than half a degree, and by no more than one point of the compass.
";

/// What the evaluation gave.
pub(super) struct Measured {
    n_embd: usize,
    n_tokens: usize,
    n_rows: usize,
    n_prefill: usize,
    /// Per boundary (n_tokens, n_embd).
    boundaries: Vec<Vec<f32>>,
    /// Before the first block, then after each.
    pub(super) max_abs_hidden: Vec<f32>,
}

/// Evaluates the text up to the end of the last run.
pub(super) fn measure(
    gguf: &Gguf,
    options: Options,
    runs: &[RangeInclusive<u32>],
    progress: &mut dyn FnMut(Progress),
) -> Result<Measured, Error> {
    let (n_ctx, n_prefill) = (options.n_ctx as usize, options.n_prefill as usize);
    let n_rows = (n_prefill + DECODE_STEPS).min(n_ctx);
    let n_tokens = n_rows.max(CALIBRATION_TOKENS.min(n_ctx));
    progress(Progress::Calibrating { n_tokens });

    let files: Vec<_> = gguf.files().collect();
    let model = Model::load(
        &files,
        ModelParams { gpu_layers: Some(0), use_mmap: true, no_lm_head: true, ..Default::default() },
    )?;
    let tokens = tokens(&model, n_tokens)?;
    let n_embd = model.n_embd();

    let first = *runs[0].start();
    let mut rows = vec![0.0; n_tokens * n_embd];
    evaluate(&model, 0..first, Input::Tokens(&tokens), &mut rows)?;
    let mut max_abs_hidden = vec![rows.iter().fold(0.0f32, |max, x| max.max(x.abs()))];
    let mut boundaries = vec![rows];
    for run in runs {
        let mut out = vec![0.0; n_tokens * n_embd];
        let input = boundaries.last().expect("there is one before the first run");
        max_abs_hidden.extend(evaluate(&model, *run.start()..run.end() + 1, Input::F32(input), &mut out)?);
        boundaries.push(out);
    }
    Ok(Measured { n_embd, n_tokens, n_rows, n_prefill: n_prefill.min(n_rows), boundaries, max_abs_hidden })
}

impl Measured {
    /// Writes selftest.bin.
    pub(super) fn write(&self, staging: &Staging, scale: f32) -> Result<SelfTest, Error> {
        let mut bytes = Vec::new();
        let mut boundaries = Vec::new();
        for rows in &self.boundaries {
            let rows = &rows[..self.n_rows * self.n_embd];
            let f16_offset = bytes.len() as u64;
            bytes.extend(rows.iter().flat_map(|x| f16::from_f32(x * scale).to_le_bytes()));
            let f32_offset = bytes.len() as u64;
            bytes.extend(rows.iter().flat_map(|x| (x * scale).to_le_bytes()));
            boundaries.push(Boundary { f16_offset, f32_offset });
        }
        let file = staging.write(SELF_TEST, &bytes)?;
        Ok(SelfTest {
            file: file.path,
            bytes: file.bytes,
            sha256: file.sha256,
            n_rows: self.n_rows as u64,
            n_prefill_rows: self.n_prefill as u64,
            boundaries,
            max_abs_hidden: self.max_abs_hidden.clone(),
            n_calibration_tokens: self.n_tokens as u64,
        })
    }
}

/// `n` tokens: the text, and again from its start where it is too short.
fn tokens(model: &Model, n: usize) -> Result<Vec<i32>, Error> {
    let mut tokens = model.tokenize(TEXT, true, false)?;
    let again = model.tokenize(TEXT, false, false)?;
    while tokens.len() < n && !again.is_empty() {
        tokens.extend(&again);
    }
    tokens.truncate(n);
    Ok(tokens)
}

/// Rows of one session from position 0 through `blocks`; gives the greatest |hidden| after each block.
fn evaluate(
    model: &Model,
    blocks: std::ops::Range<u32>,
    input: Input<'_>,
    out: &mut [f32],
) -> Result<Vec<f32>, Error> {
    let n_rows = out.len() / model.n_embd();
    let context = ContextParams {
        n_ctx: n_rows as u32,
        n_batch: n_rows as u32,
        n_ubatch: n_rows.min(CHUNK) as u32,
        max_sessions: 1,
        flash_attn: FlashAttn::Off, // the plain operations, closer to F32
        ..ContextParams::default()
    };
    let takes_tokens = matches!(input, Input::Tokens(_));
    let mut stage = Stage::new(model, StageParams { blocks, takes_tokens, has_lm_head: false, context })?;
    stage.watch_blocks(true)?;
    stage.evaluate(&Row::chunk(0, 0, n_rows), input, Output::F32(out))?;
    stage
        .block_stats()?
        .iter()
        .map(|stats| match (stats.not_finite, stats.block) {
            (0, _) => Ok(stats.max_abs),
            (count, block) => Err(Error::NotFinite { block: block.unwrap_or(0), count }),
        })
        .collect()
}
