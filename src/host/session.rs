//! A conversation: tokens in, tokens out. The core loop: tokens -> logits -> token -> text, and again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dim_core::pipeline::Snapshot;

use crate::error::{BadOption, Error};
use crate::host::constraint::Constraint;
use crate::host::engine::{Engine, to_u32};
use crate::host::prompt::Vocabulary;
use crate::host::report::{Report, StageReport, Stop, WireReport, ms, per_second};
use crate::host::sampler::{Sampler, Sampling};
use crate::host::saved::Belongs;
use crate::host::template::{ChatTemplate, TemplateError, Turn};
use crate::host::text::{StopTexts, TextStream};

/// One sequence of tokens, in the caches of all stages.
///
/// What is pushed is evaluated by the next [`generate`](Session::generate); what was generated belongs to the session
/// too, so that a second `generate` goes on where the first one stopped.
///
/// Sessions of one host live side by side, each in the thread that drives it: their steps take turns in the stages, a
/// reply's before a prompt's, and what goes wrong with one is no other's concern. A session outlives the host that it was
/// made by; dropping it gives its caches back.
pub struct Session {
    pub(super) engine: Box<dyn Engine>,
    vocabulary: Arc<Vocabulary>,
    n_ctx: u32,
    model_name: Arc<str>,
    /// all of them, prompt and replies
    pub(super) tokens: Vec<i32>,
    /// how many of them, from the start, the stages' caches hold
    pub(super) evaluated: usize,
    /// a step has failed: what the caches hold beyond `evaluated` is not known
    pub(super) torn: bool,
    /// whose it is when it is saved, where it can be
    pub(super) saving: Option<Arc<Belongs>>,
}

impl Session {
    /// A session that is empty.
    pub(crate) fn new(
        engine: impl Engine + 'static,
        vocabulary: &Arc<Vocabulary>,
        n_ctx: u32,
        model_name: &Arc<str>,
    ) -> Session {
        Session {
            engine: Box::new(engine),
            vocabulary: Arc::clone(vocabulary),
            n_ctx,
            model_name: Arc::clone(model_name),
            tokens: Vec::new(),
            evaluated: 0,
            torn: false,
            saving: None,
        }
    }

    /// The same, of a host that says whose sessions are that are saved.
    pub(crate) fn saving(mut self, belongs: Option<Arc<Belongs>>) -> Session {
        self.saving = belongs;
        self
    }

    /// Positions there are.
    pub fn n_ctx(&self) -> u32 {
        self.n_ctx
    }

    /// All tokens so far, of prompt and replies: at most as many as there are [positions](Session::n_ctx). The last one of a
    /// reply that ended because the context is full has none, and is not among them.
    pub fn tokens(&self) -> &[i32] {
        &self.tokens
    }

    /// A text as tokens; special tokens in it are read as such. `begins` says whether it is the beginning of a session:
    /// models that want a token there get it; none
    /// is put behind it, for it is to be continued.
    ///
    /// # Errors
    /// [`Error::Text`]: the model has no vocabulary, or the text is too long.
    pub fn tokenize(&self, text: &str, begins: bool) -> Result<Vec<i32>, Error> {
        self.vocabulary.text(text, begins)
    }

    /// A conversation as tokens, ending where the assistant is to speak. Only the template makes control tokens: one that
    /// somebody typed (`<|im_end|>`) is text.
    ///
    /// # Errors
    /// The template fails, or as [`tokenize`](Self::tokenize).
    pub fn tokenize_chat(&self, template: &ChatTemplate, turns: &[Turn]) -> Result<Vec<i32>, Error> {
        self.vocabulary.chat(template, turns)
    }

    /// The model's own chat template.
    ///
    /// # Errors
    /// It has none, or one that cannot be used.
    pub fn chat_template(&self) -> Result<ChatTemplate, TemplateError> {
        self.vocabulary.own_template()
    }

    /// Another chat template for this model: Jinja, as a GGUF has it.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn chat_template_of(&self, source: &str) -> Result<ChatTemplate, TemplateError> {
        self.vocabulary.template(source)
    }

    /// A JSON schema that a reply is to be valid by, for [`Sampling::constraint`]. Of the keywords of draft 2020-12 each is
    /// enforced, or the schema is refused.
    ///
    /// # Errors
    /// [`Error::Constraint`]: it is no schema, says what is not enforced, or is too large or too complex.
    pub fn json_schema(&self, schema: &str) -> Result<Constraint, Error> {
        self.vocabulary.json_schema(schema)
    }

    /// A grammar in GBNF, llama.cpp's, that a reply is to follow from its beginning, for [`Sampling::constraint`].
    ///
    /// # Errors
    /// [`Error::Constraint`]: it cannot be read, recurses on its left, or nests too deep.
    pub fn grammar(&self, gbnf: &str) -> Result<Constraint, Error> {
        self.vocabulary.grammar(gbnf)
    }

    /// Adds a text.
    ///
    /// # Errors
    /// As [`tokenize`](Self::tokenize) and [`push_tokens`](Self::push_tokens).
    pub fn push_text(&mut self, text: &str) -> Result<(), Error> {
        let tokens = self.tokenize(text, self.tokens.is_empty())?;
        self.push_tokens(&tokens)
    }

    /// Adds tokens.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] and [`Error::NoSuchToken`]; nothing was added then.
    pub fn push_tokens(&mut self, tokens: &[i32]) -> Result<(), Error> {
        self.has_room(self.tokens.len() + tokens.len())?;
        self.are_tokens(tokens)?;
        self.tokens.extend_from_slice(tokens);
        Ok(())
    }

    /// Makes these all of the session's tokens. What they have in common with those before, from the start, stays in the
    /// caches: a conversation whose every turn is rendered anew is not evaluated anew.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] and [`Error::NoSuchToken`], before anything has changed; or a stage that fails.
    pub fn set_tokens(&mut self, tokens: &[i32]) -> Result<(), Error> {
        self.has_room(tokens.len())?;
        self.are_tokens(tokens)?;
        let held = &self.tokens[..self.evaluated];
        let common = held.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        // at least one is evaluated, for its logits
        self.forget_from(common.min(tokens.len().saturating_sub(1)))?;
        self.tokens = tokens.to_vec();
        Ok(())
    }

    /// The tokens of which the stages' caches hold what came of them, from the first: what [`save`](Self::save) would save.
    pub fn evaluated(&self) -> &[i32] {
        &self.tokens[..self.evaluated]
    }

    /// Evaluates what is pending and takes it back: weights are read and memory is touched, for measurements.
    ///
    /// # Errors
    /// As a generation's first token.
    pub fn warm_up(&mut self) -> Result<(), Error> {
        let before = self.evaluated;
        self.evaluate_pending(None, &mut Vec::new())?;
        self.forget_from(before)
    }

    /// Evaluates `tokens` as a session of their own, which takes this one's place, and gives the logits of every one of
    /// them to `on_logits`: (n_rows, n_vocab) of a chunk at a time, in order. Nothing is pending afterwards.
    ///
    /// # Errors
    /// As of [`set_tokens`](Self::set_tokens), and as a generation's first token.
    pub fn logits_of(&mut self, tokens: &[i32], on_logits: &mut dyn FnMut(&[f32])) -> Result<(), Error> {
        self.has_room(tokens.len())?;
        self.are_tokens(tokens)?;
        self.tokens.clear();
        self.forget_from(0)?;
        self.torn = true;
        self.engine.evaluate_all(0, tokens, on_logits)?;
        self.torn = false;
        (self.tokens, self.evaluated) = (tokens.to_vec(), tokens.len());
        Ok(())
    }

    /// Goes on from here, a token at a time.
    pub fn generate(&mut self, sampling: Sampling) -> Generation<'_> {
        Generation::new(self, &sampling)
    }

    fn has_room(&self, n_tokens: usize) -> Result<(), Error> {
        match n_tokens > self.n_ctx as usize {
            true => Err(Error::PromptTooLong { n_tokens, n_ctx: self.n_ctx }),
            false => Ok(()),
        }
    }

    /// Whether they are numbers of the vocabulary: a step with another one fails, and so does whatever is built on it.
    pub(super) fn are_tokens(&self, tokens: &[i32]) -> Result<(), Error> {
        let n_vocab = self.vocabulary.model.n_vocab();
        let is_token = |token: i32| usize::try_from(token).is_ok_and(|token| token < n_vocab);
        match tokens.iter().find(|token| !is_token(**token)) {
            Some(&token) => Err(Error::NoSuchToken { token, n_vocab }),
            None => Ok(()),
        }
    }

    /// Forgets what the caches hold from `position` on; the tokens stay.
    fn forget_from(&mut self, position: usize) -> Result<(), Error> {
        self.torn = true;
        self.evaluated = self.evaluated.min(position);
        self.engine.rewind(to_u32(self.evaluated))?;
        self.torn = false;
        Ok(())
    }

    /// Tokens that are to be evaluated before the next one can be chosen; one at least, where there is any.
    fn n_pending(&self) -> usize {
        (self.tokens.len() - self.evaluated).max(1).min(self.tokens.len())
    }

    /// The logits of the last token, (n_vocab), in the place of those before. `false`: `stop` was set before they came; what
    /// was evaluated until then is not evaluated again.
    fn evaluate_pending(&mut self, stop: Option<&AtomicBool>, logits: &mut Vec<f32>) -> Result<bool, Error> {
        if self.tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        self.has_room(self.tokens.len())?;
        let first = self.tokens.len() - self.n_pending();
        if self.torn || first < self.evaluated {
            self.forget_from(first)?;
        }
        self.torn = true;
        let n_evaluated = self.engine.evaluate(to_u32(first), &self.tokens[first..], stop, logits)?;
        self.evaluated = first + n_evaluated;
        // otherwise what was under way may have come further
        self.torn = self.evaluated < self.tokens.len();
        Ok(!self.torn)
    }
}

/// A token that was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Its number in the vocabulary.
    pub id: i32,
    /// What can be shown now: a character that is not complete yet comes with a later token, so this may be empty.
    pub text: String,
    /// Whether the model ends its reply with it.
    pub is_end: bool,
}

/// A reply under way: an iterator over its tokens, that ends where the reply does. After an error it has ended too, and
/// the session can go on from the tokens that came before.
#[must_use = "tokens are generated as they are asked for"]
pub struct Generation<'s> {
    session: &'s mut Session,
    sampler: Result<Sampler, BadOption>,
    limit: Option<usize>,
    ignore_eos: bool,
    shown: Vec<i32>,
    stop_flag: Option<&'s AtomicBool>,
    stream: TextStream,
    stop_texts: StopTexts,
    logits: Vec<f32>,
    stop: Option<Stop>,
    so_far: SoFar,
}

/// What a report is made of.
struct SoFar {
    n_prompt: usize,
    tokens: Vec<i32>,
    text: String,
    error: Option<String>,
    ready: Instant,
    first_token_at: Option<Instant>,
    end: Instant,
    prompt_time: Duration,
    sampling: Duration,
    before: Snapshot,
    after_prompt: Snapshot,
}

impl<'s> Generation<'s> {
    fn new(session: &'s mut Session, sampling: &Sampling) -> Generation<'s> {
        let mut sampler = Sampler::new(sampling, session.vocabulary.model.n_vocab());
        if let Ok(sampler) = &mut sampler {
            session.tokens.iter().for_each(|&token| sampler.accept(token));
        }
        let ready = Instant::now();
        let before = session.engine.snapshot();
        let so_far = SoFar {
            n_prompt: session.n_pending(),
            tokens: Vec::new(),
            text: String::new(),
            error: None,
            ready,
            first_token_at: None,
            end: ready,
            prompt_time: Duration::ZERO,
            sampling: Duration::ZERO,
            after_prompt: before.clone(),
            before,
        };
        Generation {
            session,
            sampler,
            limit: None,
            ignore_eos: false,
            shown: Vec::new(),
            stop_flag: None,
            stream: TextStream::default(),
            stop_texts: StopTexts::default(),
            logits: Vec::new(),
            stop: None,
            so_far,
        }
    }

    /// Ends after `n` tokens; without one, where the model ends or the context is full.
    pub fn limit(mut self, n: Option<usize>) -> Self {
        self.limit = n;
        self
    }

    /// Goes on after a token with which the model ends its reply.
    pub fn ignore_eos(mut self, yes: bool) -> Self {
        self.ignore_eos = yes;
        self
    }

    /// Gives the names of these control tokens as text, which otherwise have none: what reads the reply looks for them.
    pub fn show(mut self, tokens: impl IntoIterator<Item = i32>) -> Self {
        self.shown = tokens.into_iter().collect();
        self
    }

    /// Ends where one of these texts would come, without it.
    pub fn stop_at(mut self, texts: impl IntoIterator<Item = String>) -> Self {
        self.stop_texts = StopTexts::new(texts);
        self
    }

    /// Ends once another thread has set this: in a prompt within a chunk, in a reply with the token that is being computed,
    /// or without it where it takes long. The session keeps what was evaluated.
    pub fn stop_when(mut self, flag: &'s AtomicBool) -> Self {
        self.stop_flag = Some(flag);
        self
    }

    /// The logits that the last token was chosen from, (n_vocab); empty before the first one.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// The text that the reply was to end at, where it did.
    pub fn stop_text(&self) -> Option<&str> {
        self.stop_texts.found()
    }

    /// What was generated, why it ended and where the time went; times from the start of the process count from
    /// `process_start`. What the stages did and what crossed sockets is what was done meanwhile, for other sessions too.
    pub fn report(&self, process_start: Instant) -> Report {
        let so_far = &self.so_far;
        let first_token_at = so_far.first_token_at.unwrap_or(so_far.end);
        let gen_time = so_far.end - first_token_at;
        let after = self.session.engine.snapshot();
        Report {
            mode: self.session.engine.mode().to_owned(),
            model: self.session.model_name.to_string(),
            // whoever asks for no more tokens has ended it
            stop: self.stop.unwrap_or(Stop::Length),
            error: so_far.error.clone(),
            seed: self.sampler.as_ref().map_or(0, Sampler::seed),
            sampled: self.sampler.as_ref().is_ok_and(Sampler::is_random),
            prompt_tokens: so_far.n_prompt,
            prompt_tok_s: per_second(so_far.n_prompt, so_far.prompt_time),
            gen_tok_s: per_second(so_far.tokens.len().saturating_sub(1), gen_time),
            ttft_ms: ms(first_token_at - so_far.ready),
            start_to_first_token_ms: ms(first_token_at - process_start),
            load_ms: ms(so_far.ready - process_start),
            prompt_ms: ms(so_far.prompt_time),
            gen_ms: ms(gen_time),
            sample_ms: ms(so_far.sampling),
            stages: stages_since(&after, &so_far.before, &so_far.after_prompt),
            wire: wire_since(&after, &so_far.before, &so_far.after_prompt, self.session.engine.wire_dtype()),
            tokens: so_far.tokens.clone(),
            text: so_far.text.clone(),
        }
    }

    /// What was held back, where nothing follows.
    fn rest_of_text(&mut self) -> String {
        let mut rest = self.stop_texts.push(&self.stream.finish()).0;
        rest.push_str(&self.stop_texts.finish());
        rest
    }

    /// The next token; `None` where there is none to choose.
    fn step(&mut self) -> Result<Option<Token>, Error> {
        self.sampler.as_ref().map_err(Clone::clone)?;

        // tokens -> logits of the last one
        if !self.session.evaluate_pending(self.stop_flag, &mut self.logits)? {
            self.stop = Some(Stop::Interrupted);
            let rest = self.rest_of_text();
            self.so_far.text.push_str(&rest);
            return Ok(None);
        }
        let (sampler, so_far) = (self.sampler.as_mut().map_err(|e| e.clone())?, &mut self.so_far);
        if so_far.first_token_at.is_none() {
            so_far.prompt_time = so_far.ready.elapsed();
            so_far.after_prompt = self.session.engine.snapshot();
        }
        if self.limit == Some(0) {
            self.stop = Some(Stop::Length);
            return Ok(None);
        }

        // logits -> token
        let sampled_at = Instant::now();
        let Some(id) = sampler.sample(&self.logits)? else {
            self.stop = Some(Stop::EndOfGeneration);
            return Ok(None);
        };
        so_far.sampling += sampled_at.elapsed();
        so_far.first_token_at.get_or_insert_with(Instant::now);
        so_far.tokens.push(id);
        let has_position = self.session.tokens.len() < self.session.n_ctx as usize;
        if has_position {
            self.session.tokens.push(id);
        }

        // token -> text
        let is_end = self.session.vocabulary.model.is_eog(id);
        // what a constraint has all of ends here, whether or not the model says so
        let is_complete = sampler.is_complete();
        let ignores_end = self.ignore_eos && !is_complete;
        let mut text = String::new();
        if !is_end || ignores_end {
            let model = &self.session.vocabulary.model;
            let bytes = if self.shown.contains(&id) { model.token_name(id) } else { model.token_bytes(id) };
            text = self.stream.push(&bytes.unwrap_or_default());
        }
        let (mut text, at_stop_text) = self.stop_texts.push(&text);

        // and again?
        self.stop = if is_end && !ignores_end {
            Some(Stop::EndOfGeneration)
        } else if at_stop_text {
            Some(Stop::StopText)
        } else if is_complete {
            Some(Stop::EndOfGeneration)
        } else if self.limit.is_some_and(|n| so_far.tokens.len() >= n) {
            Some(Stop::Length)
        } else if !has_position {
            Some(Stop::ContextFull)
        } else if self.stop_flag.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
            Some(Stop::Interrupted)
        } else {
            None
        };
        if self.stop.is_some() && !at_stop_text {
            text.push_str(&self.rest_of_text());
        }
        self.so_far.text.push_str(&text);
        Ok(Some(Token { id, text, is_end }))
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Token, Error>;

    fn next(&mut self) -> Option<Result<Token, Error>> {
        if self.stop.is_some() {
            return None;
        }
        let result = self.step();
        if let Err(error) = &result {
            self.stop = Some(Stop::Error);
            self.so_far.error = Some(error.to_string());
            let rest = self.rest_of_text();
            self.so_far.text.push_str(&rest);
        }
        self.so_far.end = Instant::now();
        result.transpose()
    }
}

/// What the stages did from `start` to `now`, and of that since the prompt.
fn stages_since(now: &Snapshot, start: &Snapshot, after_prompt: &Snapshot) -> Vec<StageReport> {
    let stages = now.stages.iter().zip(&start.stages).zip(&after_prompt.stages);
    stages
        .map(|((now, start), after_prompt)| StageReport {
            name: now.name.clone(),
            blocks: now.blocks.map_or(String::new(), |blocks| blocks.to_string()),
            compute_ms: ms(now.stats.compute - start.stats.compute),
            wait_ms: ms(now.stats.wait - start.stats.wait),
            gen_compute_ms: ms(now.stats.compute - after_prompt.stats.compute),
            gen_wait_ms: ms(now.stats.wait - after_prompt.stats.wait),
            reconnects: now.stats.reconnects - start.stats.reconnects,
        })
        .collect()
}

/// What crossed sockets. The handshake before the first prompt counts in the totals: it is what the run cost.
fn wire_since(now: &Snapshot, start: &Snapshot, after_prompt: &Snapshot, dtype: &str) -> WireReport {
    let (now, start, then) = (now.traffic, start.traffic, after_prompt.traffic);
    WireReport {
        dtype: dtype.to_owned(),
        bytes_sent: now.bytes_sent,
        bytes_received: now.bytes_received,
        round_trips: now.round_trips.saturating_sub(start.round_trips),
        gen_bytes_sent: now.bytes_sent.saturating_sub(then.bytes_sent),
        gen_bytes_received: now.bytes_received.saturating_sub(then.bytes_received),
    }
}
