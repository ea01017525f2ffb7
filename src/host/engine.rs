//! Tokens to logits, whoever computes them: the pipeline, or stock llama.cpp for comparison.

use std::time::{Duration, Instant};

use dim_core::blocks::BlockRange;
use dim_core::ids::SessionId;
use dim_core::pipeline::{Advance, Event as PipelineEvent, Pipeline, StageStats, Step};
use dim_core::schedule::StepKind;
use dim_core::stage::Traffic;

use crate::error::Error;
use crate::event::{Event, Events};

/// One session's evaluation. Its length is what was evaluated and not rewound.
pub(crate) trait Engine {
    /// `split` or `stock`.
    fn mode(&self) -> &'static str;
    /// Evaluates `tokens` from `position` on, in chunks of the micro-batch, and puts the last one's logits (n_vocab)
    /// in the place of what `logits` held, which is used for the next.
    fn evaluate(&mut self, position: u32, tokens: &[i32], logits: &mut Vec<f32>) -> Result<(), Error>;
    /// Evaluates `tokens` from `position` on and gives every one's logits, a chunk at a time in order.
    fn evaluate_all(
        &mut self,
        position: u32,
        tokens: &[i32],
        on_logits: &mut dyn FnMut(&[f32]),
    ) -> Result<(), Error>;
    /// Forgets everything from `position` on.
    fn rewind(&mut self, position: u32) -> Result<(), Error>;
    /// What each stage has done so far.
    fn stages(&self) -> Vec<StageSnapshot>;
    /// What has crossed sockets so far.
    fn traffic(&self) -> Traffic;
    /// The number format on the wire, `none` without one.
    fn wire_dtype(&self) -> &'static str;
}

/// What a stage has done so far.
#[derive(Clone, Debug)]
pub(crate) struct StageSnapshot {
    /// Its name and place.
    pub name: String,
    /// Its blocks, `first..last` inclusive; empty when it has none.
    pub blocks: String,
    /// Time it computed.
    pub compute: Duration,
    /// Time the host stood still for it beyond that.
    pub wait: Duration,
    /// How often its worker was lost and found.
    pub reconnects: u32,
}

/// The pipeline as an [`Engine`], with session 0.
pub(crate) struct SplitEngine {
    pipeline: Pipeline,
    n_ubatch: usize,
}

impl SplitEngine {
    /// `n_ubatch`: rows per chunk; stock llama.cpp's micro-batch, so that both compute the same products.
    pub(crate) fn new(mut pipeline: Pipeline, n_ubatch: u32, events: Events) -> SplitEngine {
        pipeline.observe(move |event| events.tell(event_of(event)));
        SplitEngine { pipeline, n_ubatch: n_ubatch.max(1) as usize }
    }

    fn run(
        &mut self,
        position: u32,
        tokens: &[i32],
        want: impl Fn(usize) -> bool,
        mut on_logits: impl FnMut(Vec<f32>) -> Option<Vec<f32>>,
    ) -> Result<(), Error> {
        let mut done = 0;
        for chunk in tokens.chunks(self.n_ubatch) {
            self.pipeline.submit(Step {
                session: SessionId(SESSION),
                position: position + to_u32(done),
                tokens: chunk.to_vec(),
                want_logits: (done..done + chunk.len()).map(&want).collect(),
                kind: if tokens.len() == 1 { StepKind::Decode } else { StepKind::Prefill },
            });
            done += chunk.len();
        }
        loop {
            match self.pipeline.advance(None) {
                Advance::Finished(finished) => {
                    let spare = on_logits(finished.outcome?);
                    spare.into_iter().for_each(|logits| self.pipeline.reuse(logits));
                }
                // a check behind the last answer may have failed: then that one does not count either
                Advance::Idle => {
                    return self.pipeline.take_untold().map_or(Ok(()), |error| Err(error.into()));
                }
                Advance::Later => {}
            }
        }
    }
}

impl Engine for SplitEngine {
    fn mode(&self) -> &'static str {
        "split"
    }

    fn evaluate(&mut self, position: u32, tokens: &[i32], logits: &mut Vec<f32>) -> Result<(), Error> {
        let last = tokens.len().wrapping_sub(1);
        // the last chunk's are the only ones that were asked for
        self.run(position, tokens, |i| i == last, |new| Some(std::mem::replace(logits, new)))
    }

    fn evaluate_all(
        &mut self,
        position: u32,
        tokens: &[i32],
        on_logits: &mut dyn FnMut(&[f32]),
    ) -> Result<(), Error> {
        let lend = |logits: Vec<f32>| {
            on_logits(&logits);
            Some(logits)
        };
        self.run(position, tokens, |_| true, lend)
    }

    fn rewind(&mut self, position: u32) -> Result<(), Error> {
        // takes effect before the next step; what goes wrong with it is that step's error
        self.pipeline.rewind(SessionId(SESSION), position);
        Ok(())
    }

    fn stages(&self) -> Vec<StageSnapshot> {
        let snapshot = |(name, blocks, stats): (&str, Option<BlockRange>, StageStats)| StageSnapshot {
            name: name.to_owned(),
            blocks: blocks.map_or(String::new(), |blocks| blocks.to_string()),
            compute: stats.compute,
            wait: stats.wait,
            reconnects: stats.reconnects,
        };
        self.pipeline.stages().map(snapshot).collect()
    }

    fn traffic(&self) -> Traffic {
        self.pipeline.traffic()
    }

    fn wire_dtype(&self) -> &'static str {
        if self.pipeline.has_remote_stages() { self.pipeline.dtype().name() } else { "none" }
    }
}

/// Stock llama.cpp: the whole model in one `llama_context`.
pub(crate) struct StockEngine {
    context: llama_sys_patch::Stock,
    n_vocab: usize,
    n_blocks: u32,
    n_batch: usize,
    compute: Duration,
    /// what the context holds: a recurrent state is taken back by evaluating it anew
    tokens: Vec<i32>,
}

impl StockEngine {
    /// `context` is of a whole model with this vocabulary and these blocks; `n_batch` is its batch size.
    pub(crate) fn new(
        context: llama_sys_patch::Stock,
        n_vocab: usize,
        n_blocks: u32,
        n_batch: u32,
    ) -> StockEngine {
        let n_batch = n_batch.max(1) as usize;
        StockEngine { context, n_vocab, n_blocks, n_batch, compute: Duration::ZERO, tokens: Vec::new() }
    }

    fn decode(
        &mut self,
        position: u32,
        tokens: &[i32],
        want: impl Fn(usize) -> bool,
        on_logits: &mut dyn FnMut(&[f32]),
    ) -> Result<(), Error> {
        let mut done = 0;
        let mut logits = Vec::new();
        for chunk in tokens.chunks(self.n_batch) {
            let rows: Vec<llama_sys_patch::Row> = (0..chunk.len())
                .map(|i| llama_sys_patch::Row {
                    session: SESSION,
                    position: position + to_u32(done + i),
                    want_output: want(done + i),
                })
                .collect();
            let n_wanted = rows.iter().filter(|r| r.want_output).count();
            logits.resize(n_wanted * self.n_vocab, 0.0);
            let start = Instant::now();
            self.context.decode(&rows, chunk, &mut logits)?;
            self.compute += start.elapsed();
            self.tokens.truncate(position as usize + done);
            self.tokens.extend_from_slice(chunk);
            if n_wanted > 0 {
                on_logits(&logits);
            }
            done += chunk.len();
        }
        Ok(())
    }
}

impl Engine for StockEngine {
    fn mode(&self) -> &'static str {
        "stock"
    }

    fn evaluate(&mut self, position: u32, tokens: &[i32], logits: &mut Vec<f32>) -> Result<(), Error> {
        let last = tokens.len().wrapping_sub(1);
        let mut keep = |new: &[f32]| {
            logits.clear();
            logits.extend_from_slice(new);
        };
        self.decode(position, tokens, |i| i == last, &mut keep)
    }

    fn evaluate_all(
        &mut self,
        position: u32,
        tokens: &[i32],
        on_logits: &mut dyn FnMut(&[f32]),
    ) -> Result<(), Error> {
        self.decode(position, tokens, |_| true, on_logits)
    }

    fn rewind(&mut self, position: u32) -> Result<(), Error> {
        use llama_sys_patch::Error::{CannotRewind, SessionLost};
        match self.context.rewind(SESSION, position) {
            Err(CannotRewind { .. } | SessionLost { .. }) => {
                self.context.clear(SESSION)?;
                let kept = self.tokens[..self.tokens.len().min(position as usize)].to_vec();
                self.decode(0, &kept, |_| false, &mut |_| {})
            }
            other => Ok(other?),
        }
    }

    fn stages(&self) -> Vec<StageSnapshot> {
        vec![StageSnapshot {
            name: "model".to_owned(),
            blocks: format!("0..{}", self.n_blocks.saturating_sub(1)),
            compute: self.compute,
            wait: Duration::ZERO,
            reconnects: 0,
        }]
    }

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }

    fn wire_dtype(&self) -> &'static str {
        "none"
    }
}

/// What happened to a worker, for whoever listens to the host.
fn event_of(event: PipelineEvent<'_>) -> Event {
    match event {
        PipelineEvent::Lost { stage, reason, give_up_after } => {
            Event::Lost { stage: stage.to_owned(), reason: reason.to_owned(), give_up_after }
        }
        PipelineEvent::Paused { stage, reason, give_up_after } => {
            Event::Paused { stage: stage.to_owned(), reason: reason.to_owned(), give_up_after }
        }
        PipelineEvent::Replaying { stage, steps } => Event::Replaying { stage: stage.to_owned(), steps },
        PipelineEvent::Back { stage, after } => Event::Back { stage: stage.to_owned(), after },
    }
}

/// A count as a position; the context's limit is checked before it gets anywhere near the largest one.
pub(crate) fn to_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// A host has one session at a time, which is this one of each stage.
const SESSION: u32 = 0;
