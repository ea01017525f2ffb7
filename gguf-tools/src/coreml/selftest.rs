//! Hidden rows of a real text at every package boundary, by llama.cpp: what a worker checks itself with.
//!
//! The text goes through one block after the other, from the embedding to the middle's end, on the CPU and in F32: hidden
//! rows, KV cache and products, whatever the weights' type (rounding what they are multiplied with to an 8-bit type, as
//! llama.cpp does by itself, would be a larger difference than the one a worker looks for). The rows at the boundaries are kept; the greatest |hidden| after every block is what decides
//! whether fp16 holds the residual stream. The text starts as the model wants it (its beginning-of-text token first): the
//! first token of a text carries the massive activations that matter here.
//!
//! Memory does not grow with the model: the tokenizer is gone before the first block is evaluated, weights stay where
//! they are mapped, a block's KV cache and buffers go with the block, and boundaries go to the file as they are reached,
//! unscaled, to be scaled there at the end.
//!
//! selftest.bin is one array after the other, little-endian, row-major: per boundary (n_rows, n_embd) in fp16, then the
//! same in fp32, all times the residual scale. Every offset is in the manifest.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use half::f16;
use llama_sys_patch::{
    ContextParams, FlashAttn, Input, KvType, Model, ModelParams, ModelPart, Output, Row, Stage, StageParams,
};

use dim_core::blocks::BlockRange;

use super::manifest::{Boundary, SelfTest};
use super::package::{SELF_TEST, Staging};
use super::{Error, IoContext, Options, PackageProgress};
use crate::gguf::Gguf;

/// Tokens of the calibration text, if the vectors need no more.
const CALIBRATION_TOKENS: usize = 128;
/// Rows after the prefill that the vectors hold, one decode step each.
const DECODE_STEPS: usize = 8;
/// Rows computed at once: few, for the sake of the widest intermediate result, (CHUNK, n_ff) of F32.
const CHUNK: usize = 32;
/// Values scaled at once.
const PIECE: usize = 1 << 14;

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

/// What the evaluation gave. The rows are in selftest.bin already, as fp32 and unscaled.
pub(super) struct Measured {
    file: File,
    n_embd: usize,
    n_tokens: usize,
    n_rows: usize,
    n_prefill: usize,
    n_boundaries: usize,
    /// Before the first block of the middle, then after each.
    pub(super) max_abs_hidden: Vec<f32>,
}

/// Evaluates the text up to the end of the last run.
pub(super) fn measure(
    gguf: &Gguf,
    options: Options,
    runs: &[BlockRange],
    staging: &Staging,
    progress: &mut dyn FnMut(PackageProgress),
) -> Result<Measured, Error> {
    let (n_ctx, n_prefill) = (options.n_ctx as usize, options.n_prefill as usize);
    let n_rows = (n_prefill + DECODE_STEPS).min(n_ctx);
    let n_tokens = n_rows.max(CALIBRATION_TOKENS.min(n_ctx));
    progress(PackageProgress::Calibrating { n_tokens });

    let files: Vec<_> = gguf.files().collect();
    let load = |part| {
        let params = ModelParams {
            part,
            gpu_layers: Some(0),
            use_mmap: true,
            no_lm_head: true,
            no_repack: true,
            ..Default::default()
        };
        Model::load(&files, params)
    };
    let tokens = tokens(&load(ModelPart::Tokenizer)?, n_tokens)?;
    let model = load(ModelPart::Weights)?;
    let mut measured = Measured {
        file: staging.open(SELF_TEST)?,
        n_embd: model.n_embd(),
        n_tokens,
        n_rows,
        n_prefill: n_prefill.min(n_rows),
        n_boundaries: 0,
        max_abs_hidden: Vec::new(),
    };

    let (first, last) = (runs[0].first, runs[runs.len() - 1].last);
    let mut rows = vec![0.0; n_tokens * model.n_embd()];
    for block in 0..=last {
        evaluate(&model, block, &tokens, &mut rows)?;
        if block + 1 >= first {
            measured.max_abs_hidden.push(rows.iter().fold(0.0, |max, x| max.max(x.abs())));
        }
        if block + 1 == first || runs.iter().any(|run| run.last == block) {
            measured.push(&rows).at(&staging.path().join(SELF_TEST))?;
        }
    }
    Ok(measured)
}

impl Measured {
    /// Where boundary `index` has its rows in fp16, and in fp32.
    fn offsets(&self, index: usize) -> Boundary {
        let n_values = (self.n_rows * self.n_embd) as u64;
        let f16_offset = 6 * n_values * index as u64;
        Boundary { f16_offset, f32_offset: f16_offset + 2 * n_values }
    }

    /// Adds a boundary: `rows` (n_tokens, n_embd), of which the vectors hold the first n_rows.
    fn push(&mut self, rows: &[f32]) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(self.offsets(self.n_boundaries).f32_offset))?;
        for piece in rows[..self.n_rows * self.n_embd].chunks(PIECE) {
            let bytes: Vec<u8> = piece.iter().flat_map(|x| x.to_le_bytes()).collect();
            self.file.write_all(&bytes)?;
        }
        self.n_boundaries += 1;
        Ok(())
    }

    /// Brings a boundary to its scale, and writes its rows in fp16.
    fn scale(&mut self, boundary: &Boundary, scale: f32) -> io::Result<()> {
        let n_values = self.n_rows * self.n_embd;
        let mut bytes = vec![0; 4 * PIECE];
        for at in (0..n_values).step_by(PIECE) {
            let n = PIECE.min(n_values - at);
            let in_f32 = SeekFrom::Start(boundary.f32_offset + 4 * at as u64);
            self.file.seek(in_f32)?;
            self.file.read_exact(&mut bytes[..4 * n])?;
            let (values, _) = bytes[..4 * n].as_chunks();
            let scaled: Vec<f32> = values.iter().map(|&x| f32::from_le_bytes(x) * scale).collect();
            let (f32s, f16s): (Vec<_>, Vec<_>) =
                scaled.iter().map(|x| (x.to_le_bytes(), f16::from_f32(*x).to_le_bytes())).unzip();
            self.file.seek(in_f32)?;
            self.file.write_all(f32s.as_flattened())?;
            self.file.seek(SeekFrom::Start(boundary.f16_offset + 2 * at as u64))?;
            self.file.write_all(f16s.as_flattened())?;
        }
        Ok(())
    }

    /// Completes selftest.bin.
    pub(super) fn write(mut self, staging: &Staging, scale: f32) -> Result<SelfTest, Error> {
        let boundaries: Vec<_> = (0..self.n_boundaries).map(|index| self.offsets(index)).collect();
        for boundary in &boundaries {
            self.scale(boundary, scale).at(&staging.path().join(SELF_TEST))?;
        }
        let file = staging.finish(SELF_TEST, self.file)?;
        Ok(SelfTest {
            file: file.path,
            bytes: file.bytes,
            sha256: file.sha256,
            n_rows: self.n_rows as u64,
            n_prefill_rows: self.n_prefill as u64,
            boundaries,
            max_abs_hidden: self.max_abs_hidden,
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

/// One session from position 0 through a block: `rows` (n_tokens, n_embd) become its output. Block 0 starts from `tokens`.
fn evaluate(model: &Model, block: u32, tokens: &[i32], rows: &mut [f32]) -> Result<(), Error> {
    let context = ContextParams {
        n_ctx: tokens.len() as u32,
        n_batch: CHUNK as u32,
        n_ubatch: CHUNK as u32,
        max_sessions: 1,
        // F32 throughout
        flash_attn: FlashAttn::Off,
        kv_type: KvType::F32,
        f32_products: true,
        ..ContextParams::default()
    };
    let params =
        StageParams { blocks: block..block + 1, takes_tokens: block == 0, has_lm_head: false, context };
    let mut stage = Stage::new(model, params)?;
    let mut out = vec![0.0; CHUNK * model.n_embd()];
    for (at, rows) in (0..).step_by(CHUNK).zip(rows.chunks_mut(out.len())) {
        let n = rows.len() / model.n_embd();
        let out = &mut out[..rows.len()];
        let input = match block {
            0 => Input::Tokens(&tokens[at..at + n]),
            _ => Input::F32(rows),
        };
        stage.evaluate(&Row::chunk(0, at as u32, n), input, Output::F32(out)).map_err(|e| match e {
            llama_sys_patch::Error::OutputNotFinite { block, count, .. } => Error::NotFinite { block, count },
            e => e.into(),
        })?;
        rows.copy_from_slice(out);
    }
    Ok(())
}
