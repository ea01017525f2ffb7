//! Tools: what a model may call, and what it has called. Each dialect says them in its own form and names its own fields.
//!
//! Parameters are a schema of a client's own. They stay text until they are counted: the template that shows them to the
//! model, and the grammar made of them, take as long as they are large.

use std::collections::HashSet;

use dim::host::template::dialogue::ToolChoice;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::error::ApiError;

/// Something that may be called, as a dialect has read it.
#[derive(Debug)]
pub(super) struct Tool {
    /// Where its name stands in the request.
    pub name_at: String,
    /// Where its parameters do.
    pub parameters_at: String,
    pub name: Option<String>,
    pub description: Option<String>,
    pub parameters: Option<Box<RawValue>>,
}

/// Which tool is to be called, as a dialect has read it.
#[derive(Debug)]
pub(super) enum Choice {
    Auto,
    None,
    /// whichever there is
    Required,
    /// the one of this name, and where that stands in the request
    Named(String, &'static str),
}

/// What may be called, and how.
#[derive(Debug)]
pub(super) struct Toolbox {
    /// As templates read them.
    pub tools: Vec<Value>,
    /// Whether one has to be.
    pub choice: ToolChoice,
    /// Whether several may be at once.
    pub parallel: bool,
}

impl Toolbox {
    /// Of all that was `given`.
    pub(super) fn of(given: Vec<Tool>, parallel: bool) -> Result<Toolbox, ApiError> {
        Ok(Toolbox { tools: tools(given)?, choice: ToolChoice::Auto, parallel })
    }

    /// The same, of which that is to be called.
    pub(super) fn chosen(mut self, choice: Choice) -> Result<Toolbox, ApiError> {
        self.choice = match &choice {
            Choice::Auto => ToolChoice::Auto,
            Choice::None => ToolChoice::None,
            Choice::Required | Choice::Named(..) => ToolChoice::Required,
        };
        if self.choice == ToolChoice::Required && self.tools.is_empty() {
            return Err(ApiError::field("tool_choice", "there are no tools"));
        }
        if let Choice::Named(name, field) = choice {
            self.tools.retain(|tool| tool["function"]["name"] == name);
            if self.tools.is_empty() {
                return Err(ApiError::field(field, format!("there is no tool {name:?}")));
            }
        }
        Ok(self)
    }
}

/// The tools as templates read them.
fn tools(given: Vec<Tool>) -> Result<Vec<Value>, ApiError> {
    if given.len() > MAX_TOOLS {
        return Err(ApiError::field("tools", format!("{} are more than {MAX_TOOLS}", given.len())));
    }
    let (mut names, mut left) = (HashSet::new(), MAX_VALUES);
    let tool = |Tool { name_at, parameters_at, name, description, parameters }: Tool| {
        let name = name.ok_or_else(|| ApiError::field(&name_at, "missing"))?;
        check_name(&name_at, &name)?;
        if !names.insert(name.clone()) {
            return Err(ApiError::field(name_at, "there are two of this name"));
        }
        let parameters = parameters.as_deref().map_or("null", RawValue::get);
        let (parameters, n_values) = counted(&parameters_at, parameters)?;
        left = usize::checked_sub(left, n_values).ok_or_else(|| {
            ApiError::field("tools", format!("their schemas have more than {MAX_VALUES} values"))
        })?;
        let parameters = match parameters {
            Value::Object(_) => parameters,
            Value::Null => json!({"type": "object", "properties": {}}),
            _ => return Err(ApiError::field(parameters_at, "must be an object: a JSON schema")),
        };
        Ok(json!({"type": "function", "function": {
            "name": name,
            "description": description.unwrap_or_default(),
            "parameters": parameters,
        }}))
    };
    given.into_iter().map(tool).collect()
}

/// A call that the model made, as templates read it; `name_at` and `arguments_at` say where it stands in the request.
pub(super) fn called(
    name_at: &str,
    arguments_at: &str,
    id: Option<String>,
    name: &str,
    arguments: &str,
) -> Result<Value, ApiError> {
    check_name(name_at, name)?;
    // templates of some families want an object there, and get one: text that is none would end them
    let arguments = if arguments.is_empty() { "{}" } else { arguments };
    counted(arguments_at, arguments)?;
    let mut call = json!({"type": "function", "function": {"name": name, "arguments": arguments}});
    if let Some(id) = id {
        call["id"] = id.into();
    }
    Ok(call)
}

/// As many calls as a message may have.
pub(super) fn check_calls(field: &str, n: usize) -> Result<(), ApiError> {
    match n > MAX_TOOLS {
        true => Err(ApiError::field(field, format!("more than {MAX_TOOLS} calls at once"))),
        false => Ok(()),
    }
}

/// As OpenAI has it, and as long as Anthropic does: templates and grammars write names as they are.
fn check_name(field: &str, name: &str) -> Result<(), ApiError> {
    let is_name = (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    match is_name {
        true => Ok(()),
        false => Err(ApiError::field(field, format!("must be 1 to {MAX_NAME} letters, digits, _ and -"))),
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
const MAX_NAME: usize = 128;
/// Most values in the schemas of all tools: llama.cpp turns them into a grammar, some of whose rules have as many
/// alternatives as an object has optional members, each as long.
const MAX_VALUES: usize = 4_000;
/// Deeper than anybody's schema.
const MAX_DEPTH: usize = 32;
