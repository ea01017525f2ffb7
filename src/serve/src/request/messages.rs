//! `/v1/messages`: a conversation as Anthropic's clients say it, and how many tokens it has.
//!
//! A message is a list of blocks. What came of calls stands in the user's next message there; templates have it in messages
//! of its own, right behind the calls, so it goes before what else the user says.

use std::collections::HashMap;

use dim::host::template::{Role, Turn};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::conversation::{self, Said, there_is_one};
use super::fields::{Content, Listed, NamedChoice, OneOrMany, TextOr};
use super::format::FlatFormat;
use super::tools::{self, Choice, Toolbox};
use super::{Defaults, Fields, Thinking, Wanted, parse, renamed};
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
    tools: Option<Vec<Tool>>,
    tool_choice: Option<NamedChoice>,
    thinking: Option<ThinkingField>,
    output_config: Option<OutputConfig>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "a message: an object")]
struct Message {
    role: String,
    content: Option<TextOr<Block>>,
}

/// A block of whichever kind: serde would keep one in memory to see which it is.
#[derive(Debug, Deserialize)]
#[serde(expecting = "a block: an object with a type")]
struct Block {
    #[serde(rename = "type")]
    kind: String,
    /// of a text
    text: Option<String>,
    /// of a thought
    thinking: Option<String>,
    /// of a call
    id: Option<String>,
    name: Option<String>,
    input: Option<Box<RawValue>>,
    /// of what came of one
    tool_use_id: Option<String>,
    content: Option<Content>,
    is_error: Option<bool>,
}

impl Listed for Block {
    const EXPECTED: &'static str = "a string or a list of blocks";
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "a tool: an object")]
struct Tool {
    #[serde(rename = "type")]
    kind: Option<String>,
    name: Option<String>,
    description: Option<String>,
    input_schema: Option<Box<RawValue>>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "an object with a type")]
struct ThinkingField {
    #[serde(rename = "type")]
    kind: String,
    display: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "an object")]
struct OutputConfig {
    format: Option<FlatFormat>,
}

/// A request of that form.
///
/// # Errors
/// It is no JSON, or a field is wrong: which.
pub fn messages(body: &[u8], defaults: &Defaults) -> Result<Wanted, ApiError> {
    let given: Messages = parse(body)?;
    match given.max_tokens {
        None => Err(ApiError::field("max_tokens", "missing")),
        Some(limit @ ..1) => Err(ApiError::field("max_tokens", format!("{limit} must be 1 or more"))),
        Some(_) => given.wanted(defaults),
    }
}

/// A conversation of that form whose tokens are to be counted: nothing is said of an answer.
///
/// # Errors
/// As of [`messages`].
pub fn to_be_counted(body: &[u8], defaults: &Defaults) -> Result<Wanted, ApiError> {
    parse::<Messages>(body)?.wanted(defaults)
}

impl Messages {
    fn wanted(self, defaults: &Defaults) -> Result<Wanted, ApiError> {
        let messages = self.messages.ok_or_else(|| ApiError::field("messages", "missing"))?;
        there_is_one("messages", &messages)?;
        let thinking = self.thinking.map_or(Ok(Thinking::Hidden), thinking)?;
        let tools = self.tools.unwrap_or_default().into_iter().enumerate().map(declared);
        let parallel = self.tool_choice.as_ref().and_then(|choice| choice.disable_parallel_tool_use);
        let choice = self.tool_choice.map_or(Ok(Choice::Auto), choice)?;
        let toolbox = Toolbox::of(tools.collect::<Result<_, _>>()?, !parallel.unwrap_or(false))?;
        let toolbox = toolbox.chosen(choice)?;
        let mut said: Vec<Said> = conversation::system(self.system.joined("\n")).into_iter().collect();
        let mut calls = HashMap::new();
        for (i, message) in messages.into_iter().enumerate() {
            message.read(i, &mut calls, &mut said)?;
        }
        let fields = Fields {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            stop: self.stop_sequences.map(OneOrMany),
            stream: self.stream,
            ..Fields::default()
        };
        let wanted = fields.wanted(conversation::prompts(said, toolbox, thinking), None, defaults);
        let wanted = wanted.map_err(|error| renamed(error, "stop", "stop_sequences"))?;
        let format = self.output_config.and_then(|config| config.format);
        let format = format
            .map(|format| format.read("output_config.format.type", "output_config.format.schema"))
            .transpose()?;
        Wanted { thinking, ..wanted }.held_to(format.flatten())
    }
}

impl Message {
    /// Puts what it says behind what was `said`; `calls`: the names of all calls so far, by their numbers.
    fn read(
        self,
        i: usize,
        calls: &mut HashMap<String, String>,
        said: &mut Vec<Said>,
    ) -> Result<(), ApiError> {
        let role = conversation::role(&self.role).ok_or_else(|| {
            let rule = format!("{:?} is none of \"user\", \"assistant\", \"system\"", self.role);
            ApiError::field(format!("messages[{i}].role"), rule)
        })?;
        let blocks = match self.content {
            None => Vec::new(),
            Some(TextOr::Text(content)) => {
                conversation::say(said, Turn { role, content });
                return Ok(());
            }
            Some(TextOr::List(blocks)) => blocks,
        };
        let mut parts = Parts::default();
        for (k, block) in blocks.into_iter().enumerate() {
            parts.take(role, block, calls, |name| format!("messages[{i}].content[{k}]{name}"))?;
        }
        let Parts { texts, thoughts, made, results } = parts;
        tools::check_calls(&format!("messages[{i}].content"), made.len())?;
        let has_results = !results.is_empty();
        said.extend(results);
        let text = texts.join("\n");
        match role {
            Role::Assistant => said.push(Said::by_assistant(text, thoughts.join("\n"), made)),
            // it said what came of its calls, and nothing else
            _ if texts.is_empty() && has_results => {}
            _ => conversation::say(said, Turn { role, content: text }),
        }
        Ok(())
    }
}

/// The blocks of a message, by what they are.
#[derive(Default)]
struct Parts {
    texts: Vec<String>,
    thoughts: Vec<String>,
    made: Vec<Value>,
    results: Vec<Said>,
}

impl Parts {
    /// Takes a block of somebody's message in; `at` says where a field of it stands in the request.
    fn take(
        &mut self,
        role: Role,
        block: Block,
        calls: &mut HashMap<String, String>,
        at: impl Fn(&str) -> String,
    ) -> Result<(), ApiError> {
        let missing = |name: &str| ApiError::field(at(name), "missing");
        match (block.kind.as_str(), role) {
            ("text", _) => self.texts.push(block.text.ok_or_else(|| missing(".text"))?),
            ("thinking", Role::Assistant) => {
                self.thoughts.push(block.thinking.ok_or_else(|| missing(".thinking"))?);
            }
            // somebody else's, which nobody here can read
            ("redacted_thinking", Role::Assistant) => {}
            ("tool_use", Role::Assistant) => {
                let id = block.id.ok_or_else(|| missing(".id"))?;
                let name = block.name.ok_or_else(|| missing(".name"))?;
                let input = block.input.ok_or_else(|| missing(".input"))?;
                if !input.get().starts_with('{') {
                    return Err(ApiError::field(at(".input"), "must be an object"));
                }
                let id_told = Some(id.clone());
                self.made.push(tools::called(&at(".name"), &at(".input"), id_told, &name, input.get())?);
                calls.insert(id, name);
            }
            ("tool_result", Role::User) => {
                let call = block.tool_use_id.ok_or_else(|| missing(".tool_use_id"))?;
                let Some(name) = calls.get(&call).cloned() else {
                    let rule = format!("no tool_use before has the id {call:?}");
                    return Err(ApiError::field(at(".tool_use_id"), rule));
                };
                let text = block.content.unwrap_or_default().joined("\n");
                // templates have no other place for it
                let text = if block.is_error == Some(true) { format!("Error: {text}") } else { text };
                self.results.push(Said::Result { call, name: Some(name), text });
            }
            (kind, _) => {
                let rule = format!("blocks of type {kind:?} are not supported in a message of that role");
                return Err(ApiError::field(at(".type"), rule));
            }
        }
        Ok(())
    }
}

fn declared((i, tool): (usize, Tool)) -> Result<tools::Tool, ApiError> {
    let at = |name: &str| format!("tools[{i}].{name}");
    if let Some(kind) = tool.kind.filter(|kind| kind != "custom") {
        let rule = format!("{kind:?} is not supported: only tools that the client runs");
        return Err(ApiError::field(at("type"), rule));
    }
    let (name_at, parameters_at) = (at("name"), at("input_schema"));
    let Some(parameters) = tool.input_schema else { return Err(ApiError::field(parameters_at, "missing")) };
    let Tool { name, description, .. } = tool;
    Ok(tools::Tool { name_at, parameters_at, name, description, parameters: Some(parameters) })
}

fn choice(given: NamedChoice) -> Result<Choice, ApiError> {
    match (given.kind.as_deref(), given.name) {
        (Some("auto"), _) => Ok(Choice::Auto),
        (Some("any"), _) => Ok(Choice::Required),
        (Some("none"), _) => Ok(Choice::None),
        (Some("tool"), Some(name)) => Ok(Choice::Named(name, "tool_choice.name")),
        (Some("tool"), None) => Err(ApiError::field("tool_choice.name", "missing")),
        (Some(other), _) => {
            let rule = format!("{other:?} is none of \"auto\", \"any\", \"tool\", \"none\"");
            Err(ApiError::field("tool_choice.type", rule))
        }
        (None, _) => Err(ApiError::field("tool_choice.type", "missing")),
    }
}

/// Whoever does not ask for thoughts does not get them, but that does not keep the model from thinking.
fn thinking(given: ThinkingField) -> Result<Thinking, ApiError> {
    match given.kind.as_str() {
        "enabled" | "adaptive" if given.display.as_deref() == Some("omitted") => Ok(Thinking::Hidden),
        "enabled" | "adaptive" => Ok(Thinking::Told),
        "disabled" => Ok(Thinking::Off),
        other => {
            let rule = format!("{other:?} is none of \"enabled\", \"adaptive\", \"disabled\"");
            Err(ApiError::field("thinking.type", rule))
        }
    }
}
