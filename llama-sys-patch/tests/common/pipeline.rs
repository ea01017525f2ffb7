//! A model of any architecture, cut in three files, and its stages one after another: whatever crosses, F32 or F16.

use std::ops::Range;
use std::path::{Path, PathBuf};

use half::f16;
use llama_sys_patch::{
    ContextParams, Error, GraphPlan, Input, Layout, Model, ModelParams, Output, RangePlan, Row, Stage,
    StageParams,
};

use super::slices;

pub(crate) fn load(path: &Path) -> Result<Model, Error> {
    Model::load(&[path], ModelParams { gpu_layers: Some(0), ..Default::default() })
}

/// The ranges that `cuts` make, and what each needs.
pub(crate) fn plan(model: &Path, cuts: &[u32]) -> Result<Vec<RangePlan>, Error> {
    let mut plan = GraphPlan::open(&[model])?;
    let mut ranges = Vec::new();
    for range in super::ranges(cuts, plan.n_blocks()) {
        if range.start > 0 {
            plan.cut(range.start)?;
        }
        ranges.push(plan.range(range)?);
    }
    Ok(ranges)
}

/// The slices as files beside the model, each with the tensors of its range and no others.
pub(crate) fn cut(model: &Path, ranges: &[RangePlan]) -> Vec<PathBuf> {
    ranges
        .iter()
        .map(|range| {
            let name = format!("blocks-{}-{}.gguf", range.blocks.start, range.blocks.end);
            let path = model.with_file_name(name);
            slices::write(model, &range.tensors, &path);
            path
        })
        .collect()
}

/// Stages of slices in a row.
pub(crate) struct Pipeline {
    pub stages: Vec<Stage>,
    f16: bool,
}

/// Rows between two stages.
pub(crate) enum Rows {
    F32(Vec<f32>),
    F16(Vec<f16>),
}

impl Pipeline {
    /// On the CPU.
    pub(crate) fn new(files: &[PathBuf], context: &ContextParams) -> Result<Pipeline, Error> {
        let models = files.iter().map(|file| load(file)).collect::<Result<Vec<_>, Error>>()?;
        Pipeline::of(&models, context)
    }

    /// Of slices that were loaded, wherever to.
    pub(crate) fn of(models: &[Model], context: &ContextParams) -> Result<Pipeline, Error> {
        let stages = models
            .iter()
            .map(|model| {
                assert!(model.is_slice());
                let blocks: Range<u32> = model.blocks();
                Stage::new(model, StageParams::of_whole_model(model, blocks, context.clone()))
            })
            .collect::<Result<Vec<_>, Error>>()?;
        for pair in stages.windows(2) {
            let (out, into) = (pair[0].output_layout(), pair[1].input_layout());
            assert_eq!(out, into, "both ends of a cut say the same");
            assert_eq!(out.digest(), into.digest());
        }
        Ok(Pipeline { stages, f16: false })
    }

    /// Rounded to F16 between the stages.
    pub(crate) fn in_f16(mut self) -> Pipeline {
        self.f16 = true;
        self
    }

    /// One stage: rows in, rows out.
    pub(crate) fn step(
        &mut self,
        i: usize,
        rows: &[Row],
        tokens: &[i32],
        from: &Rows,
    ) -> Result<Rows, Error> {
        let narrow = self.f16;
        let stage = &mut self.stages[i];
        let input = match from {
            _ if i == 0 => Input::Tokens(tokens),
            Rows::F32(x) => Input::F32(x),
            Rows::F16(x) => Input::F16(x),
        };
        let ids = stage.reads_tokens().then_some(tokens);
        if stage.output_layout().parts.is_empty() {
            let wanted = rows.iter().filter(|row| row.want_output).count();
            let mut logits = vec![0f32; wanted * stage.model().n_vocab()];
            let n = stage.evaluate_with_tokens(rows, ids, input, Output::Logits(&mut logits))?;
            assert_eq!(n, wanted);
            return Ok(Rows::F32(logits));
        }
        let layout: &Layout = stage.output_layout();
        if narrow {
            let mut out = vec![f16::ZERO; rows.len() * layout.width_f16()];
            stage.evaluate_with_tokens(rows, ids, input, Output::F16(&mut out))?;
            return Ok(Rows::F16(out));
        }
        let mut out = vec![0f32; rows.len() * layout.width_f32()];
        stage.evaluate_with_tokens(rows, ids, input, Output::F32(&mut out))?;
        Ok(Rows::F32(out))
    }

    /// Rows through all stages: (rows that want output, n_vocab).
    pub(crate) fn evaluate(&mut self, rows: &[Row], tokens: &[i32]) -> Result<Vec<f32>, Error> {
        let mut between = Rows::F32(Vec::new());
        for i in 0..self.stages.len() {
            between = self.step(i, rows, tokens, &between)?;
        }
        let Rows::F32(logits) = between else { unreachable!("logits are F32") };
        Ok(logits)
    }

    pub(crate) fn rewind(&mut self, session: u32, position: u32) -> Result<(), Error> {
        self.stages.iter_mut().try_for_each(|stage| stage.rewind(session, position))
    }
}
