//! A stage in this process: a slice evaluated by llama.cpp.

use std::time::{Duration, Instant};

use llama_sys_patch::{Error, Input, Output, Row, Stage, ValueType};

use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use dim_core::ids::SessionId;
use dim_core::rows::{Layout, Part, PartType, Rows, RowsRef};
use dim_core::stage::{LocalStage, Span, StageError, StageInput, StageOutput, TakeBack};

/// A slice, loaded, with its place in the model.
pub struct LlamaStage {
    stage: Stage,
    role: &'static str,
    /// the model's number of the slice's block 0
    first_block: u32,
    reads_tokens: bool,
    /// what a row that goes out is made of
    output: Layout,
    rows: Vec<Row>,
}

impl LlamaStage {
    /// `first_block` is the model's number of the slice's first block: errors name blocks as the model does.
    pub fn new(stage: Stage, role: &'static str, first_block: u32) -> LlamaStage {
        let (output, reads_tokens) = (layout_of(stage.output_layout()), stage.reads_tokens());
        LlamaStage { stage, role, first_block, reads_tokens, output, rows: Vec::new() }
    }

    /// What rows that come in and rows that go out are made of; empty where tokens come in or logits go out.
    pub fn layouts(&self) -> (Layout, Layout) {
        (layout_of(self.stage.input_layout()), self.output.clone())
    }

    /// Digests of the two, with llama.cpp's names of the parts; `None` where there are no rows, and for a slice whose
    /// blocks were numbered anew: the names have the numbers in them.
    pub fn layout_digests(&self) -> (Option<Sha>, Option<Sha>) {
        match self.first_block {
            0 => (digest_of(self.stage.input_layout()), digest_of(self.stage.output_layout())),
            _ => (None, None),
        }
    }

    /// Whether token ids are read beside rows.
    pub fn reads_tokens(&self) -> bool {
        self.reads_tokens && !self.stage.params().takes_tokens
    }

    /// The stage itself.
    pub fn inner(&self) -> &Stage {
        &self.stage
    }

    /// Runs one step; as [`LocalStage::evaluate`], with llama.cpp's error.
    pub fn run(
        &mut self,
        spans: &[Span],
        input: StageInput<'_>,
        output: StageOutput<'_>,
    ) -> Result<Duration, Error> {
        let start = Instant::now();
        self.rows.clear();
        for span in spans {
            let row = |i| Row { session: span.session, position: span.position + i, want_output: false };
            self.rows.extend((0..span.count).map(row));
        }
        let tokens = match input {
            StageInput::Rows { tokens, .. } if self.reads_tokens => Some(tokens),
            _ => None,
        };
        let input = match input {
            StageInput::Tokens(tokens) => Input::Tokens(tokens),
            StageInput::Rows { rows: RowsRef::F16(rows), .. } => Input::F16(rows),
            StageInput::Rows { rows: RowsRef::F32(rows), .. } => Input::F32(rows),
        };
        match output {
            StageOutput::Rows(hidden) => {
                hidden.resize(self.rows.len() * self.output.width(hidden.row_type()));
                let output = match hidden {
                    Rows::F16(rows) => Output::F16(rows),
                    Rows::F32(rows) => Output::F32(rows),
                };
                self.stage.evaluate_with_tokens(&self.rows, tokens, input, output)?;
            }
            StageOutput::Logits { rows, out } => {
                self.rows.iter_mut().zip(rows).for_each(|(row, &wanted)| row.want_output = wanted);
                let n_wanted = rows.iter().filter(|w| **w).count();
                out.resize(n_wanted * self.stage.model().n_vocab(), 0.0);
                self.stage.evaluate_with_tokens(&self.rows, tokens, input, Output::Logits(out))?;
            }
        }
        Ok(start.elapsed())
    }

    /// The error in the model's words: its block numbers, and how many values.
    pub fn explain(&self, error: &Error) -> StageError {
        match *error {
            Error::OutputNotFinite { block, count, .. } => {
                StageError::NotFinite { block: Some(self.first_block + block), count, said: None }
            }
            Error::InputNotFinite { count, .. } => StageError::NotFinite { block: None, count, said: None },
            Error::OutputOverflows { block, count, max_abs, .. } => StageError::TooLargeForF16 {
                block: Some(self.first_block + block),
                count,
                max_abs: Some(max_abs),
                said: None,
            },
            _ => StageError::failed(error.clone()),
        }
    }

    /// The model's number of the slice's first block.
    pub fn first_block(&self) -> u32 {
        self.first_block
    }

    /// Forgets the rows of `session` from `position` on; nothing, where it has none.
    pub fn rewind_session(&mut self, session: u32, position: u32) -> Result<(), Error> {
        let length = self.stage.length(session)?;
        if position < length { self.stage.rewind(session, position) } else { Ok(()) }
    }
}

impl LocalStage for LlamaStage {
    fn name(&self) -> String {
        self.role.to_owned()
    }

    fn blocks(&self) -> Option<BlockRange> {
        let range = &self.stage.params().blocks;
        let last = range.end.checked_sub(1)?;
        let (first, last) = (self.first_block + range.start, self.first_block + last);
        (range.start < range.end).then_some(BlockRange { first, last })
    }

    fn evaluate(
        &mut self,
        spans: &[Span],
        input: StageInput<'_>,
        output: StageOutput<'_>,
    ) -> Result<Duration, StageError> {
        self.run(spans, input, output).map_err(|e| self.explain(&e))
    }

    fn rewind(&mut self, session: SessionId, position: u32) -> Result<(), StageError> {
        self.rewind_session(session.0, position).map_err(StageError::failed)
    }

    fn take_back(&self) -> TakeBack {
        self.stage.snapshots().map_or(TakeBack::ALL, TakeBack)
    }

    fn saved_bytes(&self) -> Option<usize> {
        self.stage.saved_bytes()
    }

    fn save(&mut self, session: SessionId, from: u32, to: u32) -> Result<Vec<u8>, StageError> {
        let mut bytes = Vec::new();
        self.stage.save(session.0, from..to, &mut bytes).map_err(|e| self.explain(&e))?;
        Ok(bytes)
    }

    fn restore(&mut self, span: Span, tokens: &[i32], state: &[u8]) -> Result<Duration, StageError> {
        let start = Instant::now();
        let rows = Row::chunk(span.session, span.position, span.count as usize);
        self.stage.restore(&rows, tokens, state).map_err(|e| self.explain(&e))?;
        Ok(start.elapsed())
    }
}

/// The digest of a layout that has parts.
pub(crate) fn digest_of(layout: &llama_sys_patch::Layout) -> Option<Sha> {
    (!layout.parts.is_empty()).then(|| Sha(layout.digest()))
}

/// The same without names: the types of ours.
pub(crate) fn layout_of(layout: &llama_sys_patch::Layout) -> Layout {
    let part = |part: &llama_sys_patch::Part| match part.value_type {
        ValueType::F32 => Part { part_type: PartType::F32, may_round: true, values: part.values },
        ValueType::I32 => Part { part_type: PartType::I32, may_round: false, values: part.values },
    };
    Layout { parts: layout.parts.iter().map(part).collect() }
}
