//! The core loop: prompt -> tokens -> logits -> token -> text, and again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use llama_sys_patch::Model;

use crate::failure::Failure;
use crate::host::engine::{Engine, StageSnapshot, to_u32};
use crate::host::report::{Report, StageReport, Stop, WireReport, ms, per_second};
use crate::host::sampler::Sampler;
use crate::host::text::TextStream;
use dim_core::stage::Traffic;

/// What one generation is to do.
pub struct Request<'a> {
    /// The tokens before the reply, all of them; at least one.
    pub prompt: &'a [i32],
    /// How many of them the engine holds already (a common prefix, after a rewind); less than all.
    pub cached: usize,
    /// Most tokens to generate; `None`: until the model ends or the context is full.
    pub n_predict: Option<usize>,
    /// Go on after an end-of-generation token.
    pub ignore_eos: bool,
    /// Positions there are.
    pub n_ctx: usize,
    /// Set by another thread to stop after the token that is being computed.
    pub stop: &'a AtomicBool,
    /// When the process started.
    pub process_start: Instant,
    /// The model's name, for the report.
    pub model_name: &'a str,
}

/// Generates. Text goes to `on_text` as it becomes complete; `on_logits` sees the logits each token was chosen
/// from. The report is whole even when an error ended the reply: then it comes with the failure.
pub fn generate(
    engine: &mut dyn Engine,
    vocabulary: &Model,
    sampler: &mut Sampler,
    request: &Request<'_>,
    mut on_text: impl FnMut(&str),
    mut on_logits: impl FnMut(&[f32]),
) -> (Report, Option<Failure>) {
    let ready = Instant::now();
    let before = Snapshot::take(engine);
    let mut after_prompt = before.clone();

    let mut tokens: Vec<i32> = Vec::new();
    let mut text = String::new();
    let mut stream = TextStream::default();
    let mut sampling = Duration::ZERO;
    let mut first_token_at = None;
    let mut prompt_time = Duration::ZERO;
    let mut failure = None;

    for &token in request.prompt {
        sampler.accept(token);
    }
    let mut next = engine.evaluate(to_u32(request.cached), &request.prompt[request.cached..]);
    let stop = loop {
        // logits of the last token
        let logits = match next {
            Ok(logits) => logits,
            Err(e) => {
                failure = Some(e);
                break Stop::Error;
            }
        };
        if first_token_at.is_none() {
            prompt_time = ready.elapsed();
            after_prompt = Snapshot::take(engine);
        }
        if request.n_predict == Some(0) {
            break Stop::Length;
        }
        on_logits(&logits);

        // logits -> token
        let sampled_at = Instant::now();
        let Some(token) = sampler.sample(&logits) else { break Stop::EndOfGeneration };
        sampling += sampled_at.elapsed();
        first_token_at.get_or_insert_with(Instant::now);
        tokens.push(token);
        if vocabulary.is_eog(token) && !request.ignore_eos {
            break Stop::EndOfGeneration;
        }

        // token -> text
        let piece = stream.push(&vocabulary.token_bytes(token).unwrap_or_default());
        if !piece.is_empty() {
            on_text(&piece);
            text.push_str(&piece);
        }

        // and again
        let position = request.prompt.len() + tokens.len() - 1;
        if request.n_predict.is_some_and(|n| tokens.len() >= n) {
            break Stop::Length;
        }
        if position >= request.n_ctx {
            break Stop::ContextFull;
        }
        if request.stop.load(Ordering::Relaxed) {
            break Stop::Interrupted;
        }
        next = engine.evaluate(to_u32(position), &[token]);
    };
    let end = Instant::now();
    let rest = stream.finish();
    if !rest.is_empty() {
        on_text(&rest);
        text.push_str(&rest);
    }

    let first_token_at = first_token_at.unwrap_or(end);
    let gen_time = end - first_token_at;
    let after = Snapshot::take(engine);
    let report = Report {
        mode: engine.mode().to_owned(),
        model: request.model_name.to_owned(),
        stop,
        error: failure.as_ref().map(|f| f.message().to_owned()),
        seed: sampler.seed(),
        prompt_tokens: request.prompt.len() - request.cached,
        prompt_tok_s: per_second(request.prompt.len() - request.cached, prompt_time),
        gen_tok_s: per_second(tokens.len().saturating_sub(1), gen_time),
        ttft_ms: ms(first_token_at - ready),
        start_to_first_token_ms: ms(first_token_at - request.process_start),
        load_ms: ms(ready - request.process_start),
        prompt_ms: ms(prompt_time),
        gen_ms: ms(gen_time),
        sample_ms: ms(sampling),
        stages: after.stages_since(&before, &after_prompt),
        wire: after.wire_since(&before, &after_prompt, engine.wire_dtype()),
        tokens,
        text,
    };
    (report, failure)
}

/// Counters at one moment.
#[derive(Clone)]
struct Snapshot {
    stages: Vec<StageSnapshot>,
    traffic: Traffic,
}

impl Snapshot {
    fn take(engine: &dyn Engine) -> Snapshot {
        Snapshot { stages: engine.stages(), traffic: engine.traffic() }
    }

    fn stages_since(&self, start: &Snapshot, after_prompt: &Snapshot) -> Vec<StageReport> {
        let stages = self.stages.iter().zip(&start.stages).zip(&after_prompt.stages);
        stages
            .map(|((now, start), after_prompt)| StageReport {
                name: now.name.clone(),
                blocks: now.blocks.clone(),
                compute_ms: ms(now.compute - start.compute),
                wait_ms: ms(now.wait - start.wait),
                gen_compute_ms: ms(now.compute - after_prompt.compute),
                gen_wait_ms: ms(now.wait - after_prompt.wait),
                reconnects: now.reconnects - start.reconnects,
            })
            .collect()
    }

    /// The handshake before the first prompt counts in the totals: it is what the run cost.
    fn wire_since(&self, start: &Snapshot, after_prompt: &Snapshot, dtype: &str) -> WireReport {
        let (now, then) = (self.traffic, after_prompt.traffic);
        WireReport {
            dtype: dtype.to_owned(),
            bytes_sent: now.bytes_sent,
            bytes_received: now.bytes_received,
            round_trips: now.round_trips - start.traffic.round_trips,
            gen_bytes_sent: now.bytes_sent - then.bytes_sent,
            gen_bytes_received: now.bytes_received - then.bytes_received,
        }
    }
}
