//! Tokens to logits, whoever computes them: the pipeline, or stock llama.cpp for comparison.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dim_core::blocks::BlockRange;
use dim_core::pipeline::{Event as PipelineEvent, Pipeline, Snapshot, StageSnapshot, StageStats, Step};
use dim_core::saved::SavedStep;
use dim_core::schedule::StepKind;
use dim_core::shared::{Client, NoSession, SharedPipeline};
use dim_core::stage::Traffic;

use crate::error::Error;
use crate::event::{Event, Events};

/// One session's evaluation. Its length is what was evaluated and not rewound. Dropping it frees its place.
pub(crate) trait Engine: Send {
    /// `split` or `stock`.
    fn mode(&self) -> &'static str;
    /// Evaluates `tokens` from `position` on, in chunks of the micro-batch, and gives `on_logits` the logits of those that
    /// it wants, (n_wanted, n_vocab), a chunk at a time in order; it gives back a buffer for the next ones. How many were
    /// evaluated: all of them, unless `stop` was set meanwhile.
    fn run(
        &mut self,
        position: u32,
        tokens: &[i32],
        stop: Option<&AtomicBool>,
        wants: &dyn Fn(usize) -> bool,
        on_logits: &mut dyn FnMut(Vec<f32>) -> Option<Vec<f32>>,
    ) -> Result<usize, Error>;
    /// The same, with the last one's logits (n_vocab) in the place of what `logits` held, which is used for the next.
    fn evaluate(
        &mut self,
        position: u32,
        tokens: &[i32],
        stop: Option<&AtomicBool>,
        logits: &mut Vec<f32>,
    ) -> Result<usize, Error> {
        let last = tokens.len().wrapping_sub(1);
        // the last chunk's are the only ones that were asked for
        let mut keep = |new| Some(std::mem::replace(logits, new));
        self.run(position, tokens, stop, &|i| i == last, &mut keep)
    }
    /// The same, to the end and with everyone's logits.
    fn evaluate_all(
        &mut self,
        position: u32,
        tokens: &[i32],
        on_logits: &mut dyn FnMut(&[f32]),
    ) -> Result<(), Error> {
        let mut lend = |logits: Vec<f32>| {
            on_logits(&logits);
            Some(logits)
        };
        self.run(position, tokens, None, &|_| true, &mut lend).map(drop)
    }
    /// Forgets everything from `position` on.
    fn rewind(&mut self, position: u32) -> Result<(), Error>;
    /// What each stage has done so far, whoever it was for, and what has crossed sockets; nothing where that is not known
    /// any more.
    fn snapshot(&self) -> Snapshot;
    /// The number format on the wire, `none` without one.
    fn wire_dtype(&self) -> &'static str;
    /// Steps from `position` on, of the `length` rows that there are, at least one; none: they are not to be had.
    fn save_steps(&self, _position: u32, _length: u32) -> Result<Vec<SavedStep>, Error> {
        Ok(Vec::new())
    }
    /// Takes steps that were saved, the first of which goes on where the session stands. How many it has come to: all of
    /// them, unless `stop` was set meanwhile.
    fn restore(&mut self, _steps: Vec<SavedStep>, _stop: Option<&AtomicBool>) -> Result<usize, Error> {
        Ok(0)
    }
}

/// The pipeline, for as many sessions as its stages have caches for.
pub(crate) struct SplitEngine {
    pipeline: SharedPipeline,
    n_ubatch: usize,
    wire_dtype: &'static str,
    events: Events,
}

impl SplitEngine {
    /// `n_ubatch`: rows per chunk; stock llama.cpp's micro-batch, so that both compute the same products.
    pub(crate) fn new(mut pipeline: Pipeline, n_ubatch: u32, sessions: u32, events: Events) -> SplitEngine {
        let told = events.clone();
        pipeline.observe(move |event| told.tell(event_of(event)));
        let wire_dtype = if pipeline.has_remote_stages() { pipeline.dtype().name() } else { "none" };
        let n_ubatch = n_ubatch.max(1) as usize;
        SplitEngine { pipeline: SharedPipeline::new(pipeline, sessions), n_ubatch, wire_dtype, events }
    }

    /// How many sessions there can be at once.
    pub(crate) fn sessions(&self) -> u32 {
        self.pipeline.sessions()
    }

    /// A session that nobody has, empty.
    pub(crate) fn session(&self) -> Result<SplitSession, NoSession> {
        let client = self.pipeline.client()?;
        let events = self.events.clone();
        Ok(SplitSession { client, n_ubatch: self.n_ubatch, wire_dtype: self.wire_dtype, events })
    }
}

/// A session of the pipeline, as an [`Engine`].
pub(crate) struct SplitSession {
    client: Client,
    n_ubatch: usize,
    wire_dtype: &'static str,
    events: Events,
}

impl Engine for SplitSession {
    fn mode(&self) -> &'static str {
        "split"
    }

    fn run(
        &mut self,
        position: u32,
        tokens: &[i32],
        stop: Option<&AtomicBool>,
        wants: &dyn Fn(usize) -> bool,
        on_logits: &mut dyn FnMut(Vec<f32>) -> Option<Vec<f32>>,
    ) -> Result<usize, Error> {
        let session = self.client.session();
        let chunks = tokens.chunks(self.n_ubatch).scan(0, |done, chunk| {
            let first = *done;
            *done += chunk.len();
            Some(Step {
                session,
                position: position + to_u32(first),
                tokens: chunk.to_vec(),
                want_logits: (first..*done).map(wants).collect(),
                kind: if tokens.len() == 1 { StepKind::Decode } else { StepKind::Prefill },
            })
        });
        let n_out = self.events.came_to(self.client.run(chunks, stop, on_logits))?;
        Ok(tokens.len().min(n_out * self.n_ubatch))
    }

    fn rewind(&mut self, position: u32) -> Result<(), Error> {
        // takes effect before the next step; what goes wrong with it is that step's error
        self.client.rewind(position);
        Ok(())
    }

    fn snapshot(&self) -> Snapshot {
        self.client.snapshot().unwrap_or_default()
    }

    fn wire_dtype(&self) -> &'static str {
        self.wire_dtype
    }

    fn save_steps(&self, position: u32, length: u32) -> Result<Vec<SavedStep>, Error> {
        Ok(self.client.save_steps(position, length, to_u32(self.n_ubatch))?)
    }

    fn restore(&mut self, steps: Vec<SavedStep>, stop: Option<&AtomicBool>) -> Result<usize, Error> {
        Ok(self.events.came_to(self.client.restore(steps, stop))?)
    }
}

/// Stock llama.cpp: the whole model in one `llama_context`.
pub(crate) struct StockEngine {
    context: llama_sys_patch::Stock,
    n_vocab: usize,
    n_blocks: u32,
    /// rows of a call: what `llama_decode()` would compute at once of a longer one, so that between two a person can have
    /// had enough
    n_ubatch: usize,
    compute: Duration,
    /// what the context holds: a recurrent state is taken back by evaluating it anew
    tokens: Vec<i32>,
}

impl StockEngine {
    /// `context` is of a whole model with this vocabulary and these blocks, and computes `n_ubatch` rows at once.
    pub(crate) fn new(
        context: llama_sys_patch::Stock,
        n_vocab: usize,
        n_blocks: u32,
        n_ubatch: u32,
    ) -> StockEngine {
        let n_ubatch = n_ubatch.max(1) as usize;
        StockEngine { context, n_vocab, n_blocks, n_ubatch, compute: Duration::ZERO, tokens: Vec::new() }
    }

    fn decode(
        &mut self,
        position: u32,
        tokens: &[i32],
        stop: Option<&AtomicBool>,
        wants: &dyn Fn(usize) -> bool,
        on_logits: &mut dyn FnMut(Vec<f32>) -> Option<Vec<f32>>,
    ) -> Result<usize, Error> {
        let mut done = 0;
        let mut logits = Vec::new();
        for chunk in tokens.chunks(self.n_ubatch) {
            if stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
                break;
            }
            let rows: Vec<llama_sys_patch::Row> = (0..chunk.len())
                .map(|i| llama_sys_patch::Row {
                    session: SESSION,
                    position: position + to_u32(done + i),
                    want_output: wants(done + i),
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
                logits = on_logits(logits).unwrap_or_default();
            }
            done += chunk.len();
        }
        Ok(done)
    }

    fn rewind(&mut self, position: u32) -> Result<(), Error> {
        use llama_sys_patch::Error::{CannotRewind, SessionLost};
        match self.context.rewind(SESSION, position) {
            Err(CannotRewind { .. } | SessionLost { .. }) => {
                self.context.clear(SESSION)?;
                let kept = self.tokens[..self.tokens.len().min(position as usize)].to_vec();
                self.decode(0, &kept, None, &|_| false, &mut Some).map(drop)
            }
            other => Ok(other?),
        }
    }
}

/// Stock llama.cpp for one session at a time: who has it has the engine.
pub(crate) struct StockModel(Arc<Mutex<Option<StockEngine>>>);

impl StockModel {
    pub(crate) fn new(engine: StockEngine) -> StockModel {
        StockModel(Arc::new(Mutex::new(Some(engine))))
    }

    /// The one session there is, empty.
    pub(crate) fn session(&self) -> Result<StockSession, Error> {
        let engine = lock(&self.0).take();
        let engine = Some(engine.ok_or(NoSession { sessions: 1 })?);
        let mut session = StockSession { engine, home: Arc::clone(&self.0) };
        session.rewind(0)?;
        Ok(session)
    }
}

/// The session of a [`StockModel`], as an [`Engine`].
pub(crate) struct StockSession {
    /// there until it goes back
    engine: Option<StockEngine>,
    home: Arc<Mutex<Option<StockEngine>>>,
}

impl StockSession {
    fn engine(&mut self) -> &mut StockEngine {
        self.engine.as_mut().expect("it goes back when the session is dropped")
    }
}

impl Drop for StockSession {
    fn drop(&mut self) {
        *lock(&self.home) = self.engine.take();
    }
}

fn lock(home: &Mutex<Option<StockEngine>>) -> MutexGuard<'_, Option<StockEngine>> {
    home.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Engine for StockSession {
    fn mode(&self) -> &'static str {
        "stock"
    }

    fn run(
        &mut self,
        position: u32,
        tokens: &[i32],
        stop: Option<&AtomicBool>,
        wants: &dyn Fn(usize) -> bool,
        on_logits: &mut dyn FnMut(Vec<f32>) -> Option<Vec<f32>>,
    ) -> Result<usize, Error> {
        self.engine().decode(position, tokens, stop, wants, on_logits)
    }

    fn rewind(&mut self, position: u32) -> Result<(), Error> {
        self.engine().rewind(position)
    }

    fn snapshot(&self) -> Snapshot {
        let Some(engine) = &self.engine else { return Snapshot::default() };
        let blocks = engine.n_blocks.checked_sub(1).map(|last| BlockRange { first: 0, last });
        let stats = StageStats { compute: engine.compute, ..StageStats::default() };
        let stages = vec![StageSnapshot { name: "model".to_owned(), blocks, stats }];
        Snapshot { stages, traffic: Traffic::default() }
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
        PipelineEvent::Replaced { stage, by, steps } => {
            Event::FellBack { stage: stage.to_owned(), by: by.to_owned(), steps }
        }
        PipelineEvent::Back { stage, after } => Event::Back { stage: stage.to_owned(), after },
    }
}

/// A count as a position; the context's limit is checked before it gets anywhere near the largest one.
pub(crate) fn to_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Stock llama.cpp has one session, which is this one.
const SESSION: u32 = 0;
