//! `/v1/responses`: a text or a conversation as OpenAI's newer clients say it. Nothing is kept between requests, so a
//! conversation comes whole: messages, calls, what came of them, and thoughts, each an item of one list.

use std::collections::HashMap;

use dim::host::template::{Role, Turn};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::chat::word_of_openai;
use super::conversation::{self, Said, there_is_one};
use super::fields::{Content, Listed, TextOr, ToolChoice};
use super::format::FlatFormat;
use super::tools::{self, Choice, Toolbox};
use super::{Defaults, Fields, Thinking, Wanted, parse, renamed};
use crate::error::ApiError;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Responses {
    /// a text that a user says, or a conversation
    input: Option<TextOr<Item>>,
    instructions: Option<String>,
    max_output_tokens: Option<i64>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    stream: Option<bool>,
    background: Option<bool>,
    previous_response_id: Option<String>,
    text: Option<Text>,
    reasoning: Option<Reasoning>,
    tools: Option<Vec<Tool>>,
    tool_choice: Option<ToolChoice>,
    parallel_tool_calls: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "an object")]
struct Text {
    format: Option<FlatFormat>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "an object")]
struct Reasoning {
    effort: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "a tool: an object")]
struct Tool {
    #[serde(rename = "type")]
    kind: String,
    name: Option<String>,
    description: Option<String>,
    parameters: Option<Box<RawValue>>,
    strict: Option<bool>,
}

/// An item of whichever kind: serde would keep one in memory to see which it is.
#[derive(Debug, Deserialize)]
#[serde(expecting = "an item: an object")]
struct Item {
    /// a message, if it does not say
    #[serde(rename = "type")]
    kind: Option<String>,
    /// of a message
    role: Option<String>,
    /// of a message or a thought
    content: Option<Content>,
    /// of a call, and of what came of one
    call_id: Option<String>,
    /// of a call
    name: Option<String>,
    arguments: Option<String>,
    /// of what came of one
    output: Option<Content>,
}

impl Listed for Item {
    const EXPECTED: &'static str = "a string or a list of items";
}

/// A request of that form.
///
/// # Errors
/// It is no JSON, or a field is wrong or not served here: which.
pub fn responses(body: &[u8], defaults: &Defaults) -> Result<Wanted, ApiError> {
    let given: Responses = parse(body)?;
    if given.previous_response_id.is_some() {
        let message = "no response is kept here; send the conversation as input";
        return Err(ApiError::field("previous_response_id", message));
    }
    if given.background == Some(true) {
        return Err(ApiError::field("background", "no response is kept here; leave it out"));
    }
    let mut told_back = Map::new();
    let toolbox = toolbox(&mut told_back, given.tools, given.tool_choice, given.parallel_tool_calls)?;
    told_back.insert("instructions".into(), given.instructions.as_deref().into());
    told_back.insert("max_output_tokens".into(), given.max_output_tokens.into());
    let thinking = match given.reasoning.and_then(|reasoning| reasoning.effort).as_deref() {
        Some("none") => Thinking::Off,
        _ => Thinking::Told,
    };
    let mut said = Conversation::new(given.instructions.unwrap_or_default());
    match given.input.ok_or_else(|| ApiError::field("input", "missing"))? {
        TextOr::Text(content) => said.turn(Turn { role: Role::User, content }),
        TextOr::List(items) => {
            there_is_one("input", &items)?;
            for (i, item) in items.into_iter().enumerate() {
                said.item(i, item)?;
            }
        }
    }
    let fields = Fields {
        max_tokens: given.max_output_tokens,
        temperature: given.temperature,
        top_p: given.top_p,
        stream: given.stream,
        ..Fields::default()
    };
    let prompts = conversation::prompts(said.finish(), toolbox, thinking);
    let wanted = fields.wanted(prompts, None, defaults);
    let wanted = wanted.map_err(|error| renamed(error, "max_tokens", "max_output_tokens"))?;
    let format = given.text.and_then(|text| text.format);
    let format = format.map(|format| format.read("text.format.type", "text.format.schema")).transpose()?;
    told_back.insert("temperature".into(), wanted.sampling.temperature.into());
    told_back.insert("top_p".into(), wanted.sampling.top_p.into());
    Wanted { thinking, told_back, ..wanted }.held_to(format.flatten())
}

/// What may be called, which the reply says too, as it was given.
fn toolbox(
    told_back: &mut Map<String, Value>,
    given: Option<Vec<Tool>>,
    choice: Option<ToolChoice>,
    parallel: Option<bool>,
) -> Result<Toolbox, ApiError> {
    let (mut tools, mut stricts) = (Vec::new(), Vec::new());
    for (i, Tool { kind, name, description, parameters, strict }) in
        given.unwrap_or_default().into_iter().enumerate()
    {
        let at = |name: &str| format!("tools[{i}].{name}");
        if kind != "function" {
            let rule = format!("{kind:?} is not supported: only \"function\", which the client runs");
            return Err(ApiError::field(at("type"), rule));
        }
        stricts.push(strict);
        let (name_at, parameters_at) = (at("name"), at("parameters"));
        tools.push(tools::Tool { name_at, parameters_at, name, description, parameters });
    }
    let (choice, choice_told) = match choice {
        None => (Choice::Auto, json!("auto")),
        Some(ToolChoice::Word(word)) => (word_of_openai(&word)?, word.into()),
        Some(ToolChoice::Object(object)) => match (object.kind.as_deref(), object.name) {
            (Some("function"), Some(name)) => {
                let told = json!({"type": "function", "name": name});
                (Choice::Named(name, "tool_choice.name"), told)
            }
            (Some("function"), None) => return Err(ApiError::field("tool_choice.name", "missing")),
            (kind, _) => {
                let rule = format!("{:?} is not supported: only \"function\"", kind.unwrap_or_default());
                return Err(ApiError::field("tool_choice.type", rule));
            }
        },
    };
    let parallel = parallel.unwrap_or(true);
    let all = Toolbox::of(tools, parallel)?;
    let told = all.tools.iter().zip(stricts).map(|(tool, strict)| {
        let mut told = tool["function"].clone();
        told["type"] = "function".into();
        told["strict"] = strict.into();
        told
    });
    told_back.insert("tools".into(), told.collect());
    told_back.insert("tool_choice".into(), choice_told);
    told_back.insert("parallel_tool_calls".into(), parallel.into());
    all.chosen(choice)
}

/// Items as messages. A turn of the assistant is one message for templates: what it thought, what it said, and all it called.
struct Conversation {
    said: Vec<Said>,
    /// names of all calls so far, by their numbers
    names: HashMap<String, String>,
    /// of the assistant's turn that may go on
    thought: String,
    text: Option<String>,
    calls: Vec<Value>,
}

impl Conversation {
    fn new(instructions: String) -> Conversation {
        Conversation {
            said: conversation::system(instructions).into_iter().collect(),
            names: HashMap::new(),
            thought: String::new(),
            text: None,
            calls: Vec::new(),
        }
    }

    /// Ends the assistant's turn, if there is one.
    fn end_turn(&mut self) {
        let (thought, calls) = (std::mem::take(&mut self.thought), std::mem::take(&mut self.calls));
        match self.text.take() {
            None if thought.is_empty() && calls.is_empty() => {}
            text => self.said.push(Said::by_assistant(text.unwrap_or_default(), thought, calls)),
        }
    }

    fn turn(&mut self, turn: Turn) {
        if turn.role == Role::Assistant {
            if self.text.is_some() || !self.calls.is_empty() {
                self.end_turn();
            }
            self.text = Some(turn.content);
            return;
        }
        self.end_turn();
        conversation::say(&mut self.said, turn);
    }

    fn item(&mut self, i: usize, item: Item) -> Result<(), ApiError> {
        let at = |name: &str| format!("input[{i}].{name}");
        let missing = |name: &str| ApiError::field(at(name), "missing");
        match item.kind.as_deref().unwrap_or("message") {
            "message" => {
                let role = item.role.ok_or_else(|| missing("role"))?;
                let Some(role) = conversation::role(&role) else {
                    let rule =
                        format!("{role:?} is none of \"user\", \"assistant\", \"system\", \"developer\"");
                    return Err(ApiError::field(at("role"), rule));
                };
                self.turn(Turn { role, content: item.content.unwrap_or_default().joined("") });
            }
            "reasoning" => {
                if self.text.is_some() || !self.calls.is_empty() {
                    self.end_turn();
                }
                self.thought.push_str(&item.content.unwrap_or_default().joined("\n"));
            }
            "function_call" => {
                let id = item.call_id.ok_or_else(|| missing("call_id"))?;
                let name = item.name.ok_or_else(|| missing("name"))?;
                let arguments = item.arguments.ok_or_else(|| missing("arguments"))?;
                let call = tools::called(&at("name"), &at("arguments"), Some(id.clone()), &name, &arguments)?;
                self.calls.push(call);
                tools::check_calls(&format!("input[{i}]"), self.calls.len())?;
                self.names.insert(id, name);
            }
            "function_call_output" => {
                let call = item.call_id.ok_or_else(|| missing("call_id"))?;
                let text = item.output.ok_or_else(|| missing("output"))?.joined("\n");
                let Some(name) = self.names.get(&call).cloned() else {
                    let rule = format!("no function_call before has the call_id {call:?}");
                    return Err(ApiError::field(at("call_id"), rule));
                };
                self.end_turn();
                self.said.push(Said::Result { call, name: Some(name), text });
            }
            other => {
                return Err(ApiError::field(
                    at("type"),
                    format!("items of type {other:?} are not supported"),
                ));
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Vec<Said> {
        self.end_turn();
        self.said
    }
}
