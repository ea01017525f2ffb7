//! `/v1/chat/completions`: a conversation as OpenAI's clients say it.

use dim::host::template::{Role, Turn};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::conversation::{self, Said, there_is_one};
use super::fields::{Content, LogprobsField, ToolChoice};
use super::tools::{self, Choice, Toolbox};
use super::{Defaults, Fields, Thinking, Wanted, parse, top_logprobs};
use crate::error::ApiError;

#[derive(Debug, Deserialize)]
pub(super) struct Message {
    role: String,
    #[serde(default)]
    content: Content,
    tool_calls: Option<Vec<MadeCall>>,
    tool_call_id: Option<String>,
    name: Option<String>,
    reasoning_content: Option<String>,
}

/// A call that a model made, as it was told.
#[derive(Debug, Deserialize)]
struct MadeCall {
    #[serde(default)]
    id: Option<String>,
    function: MadeFunction,
}

#[derive(Debug, Deserialize)]
struct MadeFunction {
    name: String,
    #[serde(default)]
    arguments: String,
}

/// Something that may be called.
#[derive(Debug, Deserialize)]
pub(super) struct Tool {
    #[serde(rename = "type")]
    kind: String,
    function: Option<Function>,
}

#[derive(Debug, Deserialize)]
struct Function {
    name: String,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    parameters: Option<Box<RawValue>>,
}

/// A chat's request.
///
/// # Errors
/// It is no JSON, or a field is wrong: which.
pub fn chat(body: &[u8], defaults: &Defaults) -> Result<Wanted, ApiError> {
    let mut fields: Fields = parse(body)?;
    let messages = fields.messages.take().ok_or_else(|| ApiError::field("messages", "missing"))?;
    there_is_one("messages", &messages)?;
    let tools = fields.tools.take().unwrap_or_default().into_iter().enumerate().map(declared);
    let choice = fields.tool_choice.take().map_or(Ok(Choice::Auto), choice)?;
    let parallel = fields.parallel_tool_calls.unwrap_or(true);
    let toolbox = Toolbox::of(tools.collect::<Result<_, _>>()?, parallel)?.chosen(choice)?;
    let said = messages.into_iter().enumerate().map(|(i, message)| said(i, message));
    let prompts = conversation::prompts(said.collect::<Result<_, _>>()?, toolbox, Thinking::Told);
    let top = top(&fields)?;
    fields.wanted(prompts, top, defaults)
}

/// What a message says.
fn said(i: usize, message: Message) -> Result<Said, ApiError> {
    let content = message.content.joined("");
    let field = |name: &str| format!("messages[{i}].{name}");
    if message.role == "tool" {
        let call = message.tool_call_id.ok_or_else(|| {
            ApiError::field(field("tool_call_id"), "missing: which call it is the answer to")
        })?;
        return Ok(Said::Result { call, name: message.name, text: content });
    }
    let role = conversation::role(&message.role).ok_or_else(|| {
        let given = &message.role;
        let rule =
            format!("{given:?} is none of \"system\", \"developer\", \"user\", \"assistant\", \"tool\"");
        ApiError::field(field("role"), rule)
    })?;
    let calls = message.tool_calls.unwrap_or_default();
    if role != Role::Assistant {
        return match calls.is_empty() {
            true => Ok(Said::Turn(Turn { role, content })),
            false => Err(ApiError::field(field("tool_calls"), "only the assistant calls tools")),
        };
    }
    tools::check_calls(&field("tool_calls"), calls.len())?;
    let calls = calls.into_iter().enumerate().map(|(k, MadeCall { id, function })| {
        let at = |name: &str| format!("messages[{i}].tool_calls[{k}].function.{name}");
        tools::called(&at("name"), &at("arguments"), id, &function.name, &function.arguments)
    });
    let calls = calls.collect::<Result<Vec<_>, ApiError>>()?;
    Ok(Said::by_assistant(content, message.reasoning_content.unwrap_or_default(), calls))
}

fn declared((i, Tool { kind, function }): (usize, Tool)) -> Result<tools::Tool, ApiError> {
    let field = |name: &str| format!("tools[{i}].{name}");
    if kind != "function" {
        return Err(ApiError::field(field("type"), format!("{kind:?} is not \"function\"")));
    }
    let Some(Function { name, description, parameters }) = function else {
        return Err(ApiError::field(field("function"), "missing"));
    };
    let (name_at, parameters_at) = (field("function.name"), field("function.parameters"));
    Ok(tools::Tool { name_at, parameters_at, name: Some(name), description, parameters })
}

fn choice(given: ToolChoice) -> Result<Choice, ApiError> {
    match given {
        ToolChoice::Word(word) => word_of_openai(&word),
        ToolChoice::Object(object) => match object.function {
            Some(function) => Ok(Choice::Named(function.name, "tool_choice.function.name")),
            None => Err(ApiError::field("tool_choice.function", "missing")),
        },
    }
}

/// Both of OpenAI's dialects have the same words.
pub(super) fn word_of_openai(word: &str) -> Result<Choice, ApiError> {
    match word {
        "auto" => Ok(Choice::Auto),
        "none" => Ok(Choice::None),
        "required" => Ok(Choice::Required),
        other => {
            let rule = format!("{other:?} is none of \"auto\", \"none\", \"required\", a function");
            Err(ApiError::field("tool_choice", rule))
        }
    }
}

fn top(fields: &Fields) -> Result<Option<usize>, ApiError> {
    let is_told = match fields.logprobs {
        None | Some(LogprobsField::Told(false)) => false,
        Some(LogprobsField::Told(true)) => true,
        Some(LogprobsField::Of(_)) => {
            return Err(ApiError::field(
                "logprobs",
                "must be true or false; top_logprobs says of how many tokens",
            ));
        }
    };
    match fields.top_logprobs {
        None => Ok(is_told.then_some(0)),
        Some(0) if !is_told => Ok(None),
        Some(_) if !is_told => Err(ApiError::field("top_logprobs", "needs \"logprobs\": true")),
        Some(n) => top_logprobs("top_logprobs", n.into()).map(Some),
    }
}
