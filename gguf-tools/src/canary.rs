//! Finds a middle's [canary](dim_core::canary) when the model is cut: its answer to a known input, by llama.cpp.

pub use dim_core::canary::{
    Canary, FOLD, LEAST_MEAN_COSINE, LEAST_ROW_COSINE, LENGTH_TOLERANCE, Likeness, Widths, Wrong,
};
#[cfg(feature = "engine")]
use dim_core::canary::{EXPONENTS, update};

use crate::died::Died;

/// Why a middle has no canary.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum NoCanary {
    /// This build cannot evaluate anything.
    #[error("this program was built without llama.cpp (the feature `engine`)")]
    NotBuilt,
    /// llama.cpp does not load the slice, or cannot prepare to evaluate it: what it says.
    #[error("{0}")]
    Unloadable(String),
    /// It loads, and cannot be evaluated: what llama.cpp says.
    #[error("{0}")]
    NotEvaluated(String),
    /// What goes in or comes out is more than rows of singles.
    #[error("what crosses its two ends is more than rows of singles ({0})")]
    Crossing(String),
    /// It is another model's.
    #[error("its rows have {found} values, not {wanted}")]
    RowLength {
        /// What llama.cpp says.
        found: usize,
        /// What the plan says.
        wanted: usize,
    },
    /// Its answer would be right for a worker that does nothing.
    #[error("it adds nothing to its rows")]
    Silent,
    /// Its answer breaks a rule for canaries.
    #[error("its answer {0}")]
    Unfit(String),
}

impl From<Died> for NoCanary {
    /// A slice that ends a process ends every process; one that nobody looked at says nothing of the slice.
    fn from(died: Died) -> NoCanary {
        match died {
            Died::Ended { .. } => NoCanary::Unloadable(died.to_string()),
            Died::NoMemory(_) | Died::Silent(_) | Died::Nonsense | Died::NotStarted(..) => {
                NoCanary::NotEvaluated(died.to_string())
            }
        }
    }
}

impl NoCanary {
    /// Whether nobody else will be able to load the slice either.
    pub fn is_unloadable(&self) -> bool {
        matches!(self, NoCanary::Unloadable(_))
    }
}

/// Finds the answer of the slice at `path`, whose hidden rows have `n_embd` values, by llama.cpp on the CPU. The slice is
/// mapped and its weights stay as they are, so this takes little memory.
///
/// # Errors
/// Why there is none: llama.cpp cannot evaluate the slice, or what it gives tells nothing.
#[cfg(feature = "engine")]
pub fn find(path: &std::path::Path, n_embd: usize, seed: u64) -> Result<Canary, NoCanary> {
    use llama_sys_patch::{ContextParams, Layout, Model, ModelParams, Stage, StageParams, ValueType};

    let params = ModelParams {
        gpu_layers: Some(0),
        use_mmap: true,
        no_lm_head: true,
        no_repack: true,
        ..ModelParams::default()
    };
    // a lack of memory too: a slice that says that it has 2^31 tokens ends so
    let unloadable = |e: llama_sys_patch::Error| NoCanary::Unloadable(e.to_string());
    let model = Model::load(&[path], params).map_err(unloadable)?;
    if model.n_embd() != n_embd {
        return Err(NoCanary::RowLength { found: model.n_embd(), wanted: n_embd });
    }
    let most = STEPS.into_iter().max().unwrap_or(1);
    // a slice that keeps its numbers has weights for some of the model's blocks; a renumbered one is a model of its own
    let (n_ctx, blocks) = (STEPS.iter().sum(), model.blocks());
    // one thread: for so few rows a second one waits more than it helps, and the disk has work meanwhile
    let context =
        ContextParams { n_ctx, n_batch: most, n_ubatch: most, n_threads: 1, ..ContextParams::default() };
    let params = StageParams { blocks, takes_tokens: false, has_lm_head: false, context };
    let mut stage = Stage::new(&model, params).map_err(unloadable)?;
    // what stands beside the hidden row is drawn like it; what goes through unchanged adds nothing to the answer
    let all_f32 = |layout: &Layout| layout.parts.iter().all(|part| part.value_type == ValueType::F32);
    if !all_f32(stage.input_layout()) || !all_f32(stage.output_layout()) || stage.reads_tokens() {
        let ids = if stage.reads_tokens() { ", token ids" } else { "" };
        let (input, output) = (stage.input_layout(), stage.output_layout());
        return Err(NoCanary::Crossing(format!("in: {input}{ids}; out: {output}")));
    }

    let steps = STEPS.to_vec();
    let mut canary = Canary { seed, exponent: FIRST_EXPONENT, steps, max_abs: 0, updates: Vec::new() };
    let mut output = evaluate(&canary, &mut stage)?;
    let wanted = exponent_for(&canary, widths(&stage), &output)?;
    if wanted != canary.exponent {
        canary.exponent = wanted;
        output = evaluate(&canary, &mut stage)?;
    }
    let canary = canary.with_answer(widths(&stage), &output);
    canary.check().map(|()| canary).map_err(NoCanary::Unfit)
}

/// Without llama.cpp there is no canary, and this says so.
///
/// # Errors
/// Always.
#[cfg(not(feature = "engine"))]
pub fn find(_path: &std::path::Path, _n_embd: usize, _seed: u64) -> Result<Canary, NoCanary> {
    Err(NoCanary::NotBuilt)
}

#[cfg(feature = "engine")]
fn widths(stage: &llama_sys_patch::Stage) -> Widths {
    Widths { input: stage.input_layout().width_f32(), output: stage.output_layout().width_f32() }
}

/// The answer to its rows, (n_rows, width of a row that comes out).
#[cfg(feature = "engine")]
fn evaluate(canary: &Canary, stage: &mut llama_sys_patch::Stage) -> Result<Vec<f32>, NoCanary> {
    use llama_sys_patch::{Input, Output, Row};

    let Widths { input: width, output: out_width } = widths(stage);
    let input = canary.input(width);
    let mut output = vec![0f32; canary.n_rows() * out_width];
    let failed = |e: llama_sys_patch::Error| NoCanary::NotEvaluated(e.to_string());
    stage.clear(0).map_err(failed)?;
    let mut position = 0;
    for &n in &canary.steps {
        let values = |width: usize| position as usize * width..(position + n) as usize * width;
        let rows = Row::chunk(0, position, n as usize);
        stage
            .evaluate(&rows, Input::F32(&input[values(width)]), Output::F32(&mut output[values(out_width)]))
            .map_err(failed)?;
        position += n;
    }
    Ok(output)
}

/// The exponent that makes the input about as large as what was added to it.
#[cfg(feature = "engine")]
fn exponent_for(canary: &Canary, widths: Widths, output: &[f32]) -> Result<i32, NoCanary> {
    let input = canary.input(widths.input);
    let rows = input.chunks_exact(widths.input).zip(output.chunks_exact(widths.output));
    let squares = rows.flat_map(|(before, after)| update(before, after)).map(|x| x * x);
    let added = (squares.sum::<f64>() / output.len() as f64).sqrt();
    if added < f64::from(f32::MIN_POSITIVE) {
        return Err(NoCanary::Silent);
    }
    let exponent = (added / DRAWN_RMS).log2().round() as i32;
    Ok(exponent.clamp(*EXPONENTS.start(), *EXPONENTS.end()))
}

/// Steps of a new canary.
#[cfg(feature = "engine")]
const STEPS: [u32; 2] = [8, 1];
/// Where a new canary begins: rows with a root mean square of 2.3.
#[cfg(feature = "engine")]
const FIRST_EXPONENT: i32 = -5;
/// The root mean square of the drawn integers.
#[cfg(feature = "engine")]
const DRAWN_RMS: f64 = 73.9;
