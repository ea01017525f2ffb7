//! Tools: what a model may call, what it has called, and what came of it.
//!
//! Parameters are a schema of a client's own. They stay text until they are counted: the template that shows them to the
//! model, and the grammar made of them, take as long as they are large.

use std::collections::HashSet;

use dim::host::template::dialogue::{Dialogue, ToolChoice};
use dim::host::template::{Role, Turn};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::fields::{Content, ToolChoice as Choice};
use super::turns::{role, there_is_one, turns};
use super::{Fields, Message, Prompts};
use crate::error::ApiError;

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

/// A call that a model made, as it was told.
#[derive(Debug, Deserialize)]
pub(super) struct MadeCall {
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

/// A conversation: with tools in it, or plain.
pub(super) fn prompts(messages: Vec<Message>, fields: &mut Fields) -> Result<Prompts, ApiError> {
    let tools = tools(fields.tools.take().unwrap_or_default())?;
    let (tools, tool_choice) = chosen(tools, fields.tool_choice.take())?;
    let is_plain = |message: &Message| {
        let has_called = message.tool_calls.as_ref().is_some_and(|calls| !calls.is_empty());
        message.role != "tool" && !has_called && message.reasoning_content.is_none()
    };
    if tools.is_empty() && messages.iter().all(is_plain) {
        return Ok(Prompts::Chat(turns(None, messages)?));
    }
    there_is_one(&messages)?;
    let messages = messages.into_iter().enumerate().map(|(i, message)| told(i, message));
    Ok(Prompts::Dialogue(Dialogue {
        messages: messages.collect::<Result<_, _>>()?,
        tools,
        tool_choice,
        parallel_tool_calls: fields.parallel_tool_calls.unwrap_or(true),
        enable_thinking: true,
    }))
}

/// A plain conversation, for a template that has to say how the answer is read.
pub(crate) fn as_dialogue(turns: &[Turn]) -> Dialogue {
    let messages = turns.iter().map(|turn| json!({"role": turn.role, "content": turn.content}));
    Dialogue { messages: messages.collect(), enable_thinking: true, ..Dialogue::default() }
}

/// A message as templates read it.
fn told(i: usize, message: Message) -> Result<Value, ApiError> {
    let Content(content) = message.content;
    let field = |name: &str| format!("messages[{i}].{name}");
    let Some(role) = role(i, &message.role)? else {
        let id = message.tool_call_id.ok_or_else(|| {
            ApiError::field(field("tool_call_id"), "missing: which call it is the answer to")
        })?;
        let mut told = json!({"role": "tool", "content": content, "tool_call_id": id});
        if let Some(name) = message.name {
            told["name"] = name.into();
        }
        return Ok(told);
    };
    let mut told = json!({"role": role, "content": content});
    if let Some(reasoning) = message.reasoning_content.filter(|text| !text.is_empty()) {
        told["reasoning_content"] = reasoning.into();
    }
    let calls = message.tool_calls.unwrap_or_default();
    if calls.is_empty() {
        return Ok(told);
    }
    if role != Role::Assistant {
        return Err(ApiError::field(field("tool_calls"), "only the assistant calls tools"));
    }
    if calls.len() > MAX_TOOLS {
        return Err(ApiError::field(field("tool_calls"), format!("more than {MAX_TOOLS}")));
    }
    let calls = calls.into_iter().enumerate().map(|(k, MadeCall { id, function })| {
        let field = |name: &str| format!("messages[{i}].tool_calls[{k}].function.{name}");
        check_name(&field("name"), &function.name)?;
        // templates of some families want an object there, and get one: text that is none would end them
        let arguments = if function.arguments.is_empty() { "{}" } else { &function.arguments };
        counted(&field("arguments"), arguments)?;
        let mut call =
            json!({"type": "function", "function": {"name": function.name, "arguments": arguments}});
        if let Some(id) = id {
            call["id"] = id.into();
        }
        Ok(call)
    });
    told["tool_calls"] = calls.collect::<Result<Vec<_>, ApiError>>()?.into();
    Ok(told)
}

/// The tools as templates read them.
fn tools(given: Vec<Tool>) -> Result<Vec<Value>, ApiError> {
    if given.len() > MAX_TOOLS {
        return Err(ApiError::field("tools", format!("{} are more than {MAX_TOOLS}", given.len())));
    }
    let (mut names, mut left) = (HashSet::new(), MAX_VALUES);
    let tool = |(i, Tool { kind, function }): (usize, Tool)| {
        let field = |name: &str| format!("tools[{i}]{name}");
        if kind != "function" {
            return Err(ApiError::field(field(".type"), format!("{kind:?} is not \"function\"")));
        }
        let Some(function) = function else { return Err(ApiError::field(field(".function"), "missing")) };
        check_name(&field(".function.name"), &function.name)?;
        if !names.insert(function.name.clone()) {
            return Err(ApiError::field(field(".function.name"), "there are two of this name"));
        }
        let parameters = function.parameters.as_deref().map_or("null", RawValue::get);
        let at = field(".function.parameters");
        let (parameters, n_values) = counted(&at, parameters)?;
        left = usize::checked_sub(left, n_values).ok_or_else(|| {
            ApiError::field("tools", format!("their schemas have more than {MAX_VALUES} values"))
        })?;
        let parameters = match parameters {
            Value::Object(_) => parameters,
            Value::Null => json!({"type": "object", "properties": {}}),
            _ => return Err(ApiError::field(at, "must be an object: a JSON schema")),
        };
        Ok(json!({"type": "function", "function": {
            "name": function.name,
            "description": function.description.unwrap_or_default(),
            "parameters": parameters,
        }}))
    };
    given.into_iter().enumerate().map(tool).collect()
}

/// What of `tools` may be called, and whether it must.
fn chosen(mut tools: Vec<Value>, choice: Option<Choice>) -> Result<(Vec<Value>, ToolChoice), ApiError> {
    let needs_tools = |tools: &[Value]| match tools.is_empty() {
        true => Err(ApiError::field("tool_choice", "there are no tools")),
        false => Ok(()),
    };
    let choice = match choice {
        None => ToolChoice::Auto,
        Some(Choice::Word(word)) => match word.as_str() {
            "auto" => ToolChoice::Auto,
            "none" => ToolChoice::None,
            "required" => {
                needs_tools(&tools)?;
                ToolChoice::Required
            }
            other => {
                let message = format!("{other:?} is none of \"auto\", \"none\", \"required\", a function");
                return Err(ApiError::field("tool_choice", message));
            }
        },
        Some(Choice::Named(name)) => {
            needs_tools(&tools)?;
            tools.retain(|tool| tool["function"]["name"] == name);
            if tools.is_empty() {
                return Err(ApiError::field(
                    "tool_choice.function.name",
                    format!("there is no tool {name:?}"),
                ));
            }
            ToolChoice::Required
        }
    };
    Ok((tools, choice))
}

/// As OpenAI has it: templates and grammars write names as they are.
fn check_name(field: &str, name: &str) -> Result<(), ApiError> {
    let is_name = (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    match is_name {
        true => Ok(()),
        false => Err(ApiError::field(field, "must be 1 to 64 letters, digits, _ and -")),
    }
}

/// `text` as JSON and how many values it has, or what is wrong with it.
fn counted(field: &str, text: &str) -> Result<(Value, usize), ApiError> {
    fn count(value: &Value, depth: usize) -> Option<usize> {
        let depth = depth.checked_sub(1)?;
        let inner: Option<usize> = match value {
            Value::Array(list) => list.iter().map(|value| count(value, depth)).sum(),
            Value::Object(map) => map.values().map(|value| count(value, depth)).sum(),
            _ => Some(0),
        };
        inner.map(|n| n + 1)
    }
    let value: Value = serde_json::from_str(text)
        .map_err(|e| ApiError::field(field, format!("not JSON: {}", super::sentence(&e))))?;
    match count(&value, MAX_DEPTH) {
        Some(n) if n <= MAX_VALUES => Ok((value, n)),
        Some(_) => Err(ApiError::field(field, format!("more than {MAX_VALUES} values"))),
        None => Err(ApiError::field(field, format!("deeper than {MAX_DEPTH} levels"))),
    }
}

/// Most tools of a request, and most calls of a message: as many as OpenAI takes.
const MAX_TOOLS: usize = 128;
/// Most values in the schemas of all tools: llama.cpp turns them into a grammar, some of whose rules have as many
/// alternatives as an object has optional members, each as long.
const MAX_VALUES: usize = 4_000;
/// Deeper than anybody's schema.
const MAX_DEPTH: usize = 32;
