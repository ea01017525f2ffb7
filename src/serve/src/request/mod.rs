//! A request's bytes as what is to be generated: one pure function each for chats and completions.
//!
//! Fields that nobody here knows are left out, as OpenAI's own server does with clients that are newer than it. A field
//! that is known and wrong is an error that names it. Nothing is built in memory for what is left out, nothing that is read
//! nests deeper than four levels, and what is left out is skipped without recursion; so is a schema, which stays text.

mod chat;
mod completion;
pub(crate) mod conversation;
mod fields;
mod format;
mod messages;
mod responses;
#[cfg(test)]
mod tests;
mod tools;

use std::collections::HashMap;

use axum::http::StatusCode;
use dim::Sampling;
use dim::host::template::Turn;
use dim::host::template::dialogue::Dialogue;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::error::ApiError;
use fields::{LogprobsField, OneOrMany, PromptField, ToolChoice};
use format::ResponseFormat;

pub use chat::chat;
pub use completion::completion;
pub use format::{Format, Language};
pub use messages::{messages, to_be_counted};
pub use responses::responses;

/// What is to be generated, and how it is to be told.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// Of what it is the continuation.
    pub prompts: Prompts,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens of each choice; `None`: until the model ends or the context is full.
    pub limit: Option<usize>,
    /// Texts at which a choice ends.
    pub stop: Vec<String>,
    /// What every choice has to be, if anything.
    pub format: Option<Format>,
    /// Choices for each prompt.
    pub n: u32,
    /// Whether log probabilities are told, and of how many of the likeliest tokens beside the chosen one.
    pub top_logprobs: Option<usize>,
    /// Whether it is told as it comes.
    pub stream: bool,
    /// Whether a stream ends with how many tokens there were.
    pub include_usage: bool,
    /// Whether every part of a stream says how fast it goes.
    pub timings_per_token: bool,
    /// Whether the tokens' numbers are told too.
    pub return_tokens: bool,
    /// Whether the caches' common beginning is used.
    pub cache_prompt: bool,
    /// Whether it goes on after the model's end.
    pub ignore_eos: bool,
    /// Whether a completion begins with its prompt.
    pub echo: bool,
    /// What becomes of what a model thinks before it answers.
    pub thinking: Thinking,
    /// Fields of the request that stand in the reply too, where its dialect has that.
    pub told_back: Map<String, Value>,
}

/// What becomes of what a model thinks before it answers, if it is one that does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Thinking {
    /// It is told apart from the answer.
    #[default]
    Told,
    /// It is left out.
    Hidden,
    /// There is to be none, as far as the model's template can say so.
    Off,
}

impl Wanted {
    /// The same, whose every choice is of that form.
    fn held_to(self, format: Option<Format>) -> Result<Wanted, ApiError> {
        if let (Prompts::Dialogue(dialogue), Some(format)) = (&self.prompts, &format)
            && !dialogue.tools.is_empty()
        {
            return Err(ApiError::field(
                format.field,
                "an answer is a call of a tool or of a schema, not both",
            ));
        }
        Ok(Wanted { format, ..self })
    }
}

/// What is to be continued.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompts {
    /// A conversation, where the assistant is to speak.
    Chat(Vec<Turn>),
    /// One with tools.
    Dialogue(Dialogue),
    /// Texts, each by itself.
    Texts(Vec<Prompt>),
}

/// A text that is to be continued.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// As text.
    Text(String),
    /// As tokens.
    Tokens(Vec<i32>),
}

impl Prompts {
    /// How many there are.
    pub fn count(&self) -> usize {
        match self {
            Prompts::Chat(_) | Prompts::Dialogue(_) => 1,
            Prompts::Texts(texts) => texts.len(),
        }
    }
}

/// What holds for whoever says nothing else.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Defaults {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens of a choice.
    pub limit: Option<usize>,
    /// Whether grammars that clients send are followed: one may be made so that llama.cpp is never done with it.
    pub takes_grammars: bool,
}

/// Most choices of a request.
pub const MAX_CHOICES: usize = 128;
/// Most texts at which a choice ends, and their longest.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
/// Most tokens with a bias.
const MAX_BIASES: usize = 1024;
/// As many as a chat tells beside the chosen one.
const MAX_TOP_LOGPROBS: usize = 20;

/// The fields of chats and completions. All are optional, and `null` is as good as not there. (One struct for both: serde
/// keeps what it flattens in memory, and forgets where it stood.)
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Fields {
    messages: Option<Vec<chat::Message>>,
    prompt: Option<PromptField>,
    logprobs: Option<LogprobsField>,
    top_logprobs: Option<i64>,
    tools: Option<Vec<chat::Tool>>,
    parallel_tool_calls: Option<bool>,
    functions: Option<Vec<IgnoredAny>>,
    tool_choice: Option<ToolChoice>,
    suffix: Option<String>,
    echo: Option<bool>,
    best_of: Option<i64>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    min_p: Option<f64>,
    top_k: Option<i32>,
    seed: Option<i64>,
    repeat_penalty: Option<f64>,
    repeat_last_n: Option<i32>,
    frequency_penalty: Option<f64>,
    presence_penalty: Option<f64>,
    logit_bias: Option<HashMap<String, f64>>,
    stop: Option<OneOrMany>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    n: Option<i64>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    timings_per_token: Option<bool>,
    return_tokens: Option<bool>,
    cache_prompt: Option<bool>,
    ignore_eos: Option<bool>,
    grammar: Option<String>,
    json_schema: Option<Box<RawValue>>,
    response_format: Option<ResponseFormat>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: Option<bool>,
}

impl Fields {
    /// With the prompts; `top_logprobs` as the two dialects say it.
    fn wanted(
        mut self,
        prompts: Prompts,
        top_logprobs: Option<usize>,
        defaults: &Defaults,
    ) -> Result<Wanted, ApiError> {
        self.refuse_what_is_not_built()?;
        let n = match self.n {
            None => 1,
            Some(n) => u32::try_from(n).ok().filter(|n| *n > 0).ok_or_else(|| bad_n("n"))?,
        };
        if prompts.count().saturating_mul(n as usize) > MAX_CHOICES {
            return Err(bad_n(if n > 1 { "n" } else { "prompt" }));
        }
        let format = format::format(&mut self, defaults.takes_grammars)?;
        let wanted = Wanted {
            format: None,
            limit: self.limit(defaults.limit)?,
            stop: self.stop()?,
            sampling: self.sampling(&defaults.sampling)?,
            n,
            prompts,
            top_logprobs,
            stream: self.stream.unwrap_or(false),
            include_usage: self.stream_options.and_then(|o| o.include_usage).unwrap_or(false),
            timings_per_token: self.timings_per_token.unwrap_or(false),
            return_tokens: self.return_tokens.unwrap_or(false),
            cache_prompt: self.cache_prompt.unwrap_or(true),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            echo: false,
            thinking: Thinking::default(),
            told_back: Map::new(),
        };
        wanted.held_to(format)
    }

    /// What would change the answer and is not there is said, not left out.
    fn refuse_what_is_not_built(&self) -> Result<(), ApiError> {
        if self.functions.as_ref().is_some_and(|list| !list.is_empty()) {
            return Err(ApiError::field("functions", "not supported: they are called tools now"));
        }
        if self.tools.as_ref().is_some_and(|list| !list.is_empty()) {
            return Err(ApiError::field("tools", "a completion calls none: ask /v1/chat/completions"));
        }
        Ok(())
    }

    fn limit(&self, default: Option<usize>) -> Result<Option<usize>, ApiError> {
        let (field, given) = match (self.max_completion_tokens, self.max_tokens) {
            (Some(n), _) => ("max_completion_tokens", n),
            (None, Some(n)) => ("max_tokens", n),
            (None, None) => return Ok(default),
        };
        match given {
            -1 => Ok(None),
            n => usize::try_from(n).map(Some).map_err(|_| {
                ApiError::field(
                    field,
                    format!("{n} must be 0 or more, or -1 for as many as there is room for"),
                )
            }),
        }
    }

    fn stop(&self) -> Result<Vec<String>, ApiError> {
        let stop = self.stop.as_ref().map_or(&[][..], |OneOrMany(texts)| texts);
        if stop.len() > MAX_STOPS {
            return Err(ApiError::field("stop", format!("{} texts are more than {MAX_STOPS}", stop.len())));
        }
        if let Some(i) = stop.iter().position(|text| text.len() > MAX_STOP_BYTES) {
            return Err(ApiError::field(format!("stop[{i}]"), format!("longer than {MAX_STOP_BYTES} bytes")));
        }
        Ok(stop.to_vec())
    }

    fn sampling(&self, default: &Sampling) -> Result<Sampling, ApiError> {
        let float = |given: Option<f64>, default: f32| given.map_or(default, |x| x as f32);
        let sampling = Sampling {
            temperature: float(self.temperature, default.temperature),
            top_p: float(self.top_p, default.top_p),
            min_p: float(self.min_p, default.min_p),
            top_k: self.top_k.unwrap_or(default.top_k),
            seed: match self.seed {
                None => default.seed,
                Some(-1) => None,
                // a client's seed has 64 bits, ours 32 of which the last one means something else
                Some(seed) => u32::try_from(seed.rem_euclid(i64::from(u32::MAX))).ok(),
            },
            repeat_penalty: float(self.repeat_penalty, default.repeat_penalty),
            repeat_last_n: self.repeat_last_n.unwrap_or(default.repeat_last_n),
            frequency_penalty: float(self.frequency_penalty, default.frequency_penalty),
            presence_penalty: float(self.presence_penalty, default.presence_penalty),
            logit_bias: self.logit_bias.as_ref().map_or_else(|| Ok(default.logit_bias.clone()), biases)?,
            // once it is compiled
            constraint: None,
        };
        sampling.check().map_err(|bad| ApiError::from(&dim::Error::from(bad)))?;
        Ok(sampling)
    }
}

fn bad_n(field: &str) -> ApiError {
    ApiError::field(field, format!("there must be 1 to {MAX_CHOICES} choices in all"))
}

/// `{"token": bias}`, the tokens by their numbers.
fn biases(given: &HashMap<String, f64>) -> Result<Vec<(i32, f32)>, ApiError> {
    if given.len() > MAX_BIASES {
        return Err(ApiError::field(
            "logit_bias",
            format!("{} tokens are more than {MAX_BIASES}", given.len()),
        ));
    }
    let bias = |(token, bias): (&String, &f64)| {
        let wrong = |rule| ApiError::field(format!("logit_bias[{token:?}]"), rule);
        let id = token.parse().ok().filter(|id| *id >= 0);
        let id = id.ok_or_else(|| wrong("must be a token's number"))?;
        match *bias {
            // as OpenAI has it: -100 bans a token
            bias if bias <= -100.0 => Ok((id, f32::NEG_INFINITY)),
            bias if bias <= 100.0 => Ok((id, bias as f32)),
            _ => Err(wrong("must be -100 to 100")),
        }
    };
    let mut biases = given.iter().map(bias).collect::<Result<Vec<_>, _>>()?;
    biases.sort_unstable_by_key(|(token, _)| *token);
    Ok(biases)
}

/// Of how many of the likeliest tokens it is told, by the field that says it.
fn top_logprobs(field: &str, n: i128) -> Result<usize, ApiError> {
    let top = usize::try_from(n).ok().filter(|n| *n <= MAX_TOP_LOGPROBS);
    top.ok_or_else(|| ApiError::field(field, format!("{n} must be 0 to {MAX_TOP_LOGPROBS}")))
}

/// `body` as a request, or which field of it is wrong.
fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let not_json =
        |e: &serde_json::Error| ApiError::new(StatusCode::BAD_REQUEST, format!("the body is not JSON: {e}"));
    let parsed = serde_path_to_error::deserialize(&mut json).map_err(|e| {
        let path = e.path().to_string();
        let e = e.into_inner();
        match e.classify() {
            serde_json::error::Category::Data if path != "." => ApiError::field(path, sentence(&e)),
            serde_json::error::Category::Data => ApiError::new(StatusCode::BAD_REQUEST, sentence(&e)),
            _ => not_json(&e),
        }
    })?;
    json.end().map_err(|e| not_json(&e))?;
    Ok(parsed)
}

/// An error about `from` that names the field as its dialect does.
fn renamed(error: ApiError, from: &str, to: &str) -> ApiError {
    let param =
        error.param.as_deref().and_then(|param| param.strip_prefix(from)).map(|rest| format!("{to}{rest}"));
    let message = error.message.strip_prefix(from).map(|rest| format!("{to}{rest}"));
    match (param, message) {
        (Some(param), Some(message)) => ApiError { param: Some(param), message, ..error },
        _ => error,
    }
}

/// What serde says, without the place: the field is named.
fn sentence(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}
