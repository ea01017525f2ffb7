//! `/v1/messages`: a conversation as Anthropic's clients say it.

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::fields::{Content, OneOrMany};
use super::turns::turns;
use super::{Defaults, Fields, Message, Prompts, Wanted, parse, refuse_tools, renamed};
use crate::error::ApiError;

/// All are optional for whoever reads them; which are not is said below.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Messages {
    messages: Option<Vec<Message>>,
    system: Content,
    max_tokens: Option<i64>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i32>,
    stop_sequences: Option<Vec<String>>,
    stream: Option<bool>,
    tools: Option<Vec<IgnoredAny>>,
}

/// A request of that form.
///
/// # Errors
/// It is no JSON, or a field is wrong: which.
pub fn messages(body: &[u8], defaults: &Defaults) -> Result<Wanted, ApiError> {
    let given: Messages = parse(body)?;
    refuse_tools(given.tools.as_deref())?;
    let messages = given.messages.ok_or_else(|| ApiError::field("messages", "missing"))?;
    let turns = turns(Some(given.system.0), messages)?;
    let limit = given.max_tokens.ok_or_else(|| ApiError::field("max_tokens", "missing"))?;
    if limit < 1 {
        return Err(ApiError::field("max_tokens", format!("{limit} must be 1 or more")));
    }
    let fields = Fields {
        max_tokens: Some(limit),
        temperature: given.temperature,
        top_p: given.top_p,
        top_k: given.top_k,
        stop: given.stop_sequences.map(OneOrMany),
        stream: given.stream,
        ..Fields::default()
    };
    let wanted = fields.wanted(Prompts::Chat(turns), None, defaults);
    wanted.map_err(|error| renamed(error, "stop", "stop_sequences"))
}
