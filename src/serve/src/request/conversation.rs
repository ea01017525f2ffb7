//! A conversation, once a dialect has read it: who said what, what was called and what came of it, and what may be called.

use dim::host::template::dialogue::Dialogue;
use dim::host::template::{Role, Turn};
use serde_json::{Value, json};

use super::tools::Toolbox;
use super::{Prompts, Thinking};
use crate::error::ApiError;

/// What stands between two messages.
#[derive(Debug)]
pub(super) enum Said {
    /// Somebody said a text.
    Turn(Turn),
    /// The assistant thought or called, and may have said something too; the calls are [`called`](super::tools::called).
    Acted { text: String, reasoning: String, calls: Vec<Value> },
    /// What came of a call.
    Result { call: String, name: Option<String>, text: String },
}

impl Said {
    /// Of the assistant.
    pub(super) fn by_assistant(text: String, reasoning: String, calls: Vec<Value>) -> Said {
        match reasoning.is_empty() && calls.is_empty() {
            true => Said::Turn(Turn { role: Role::Assistant, content: text }),
            false => Said::Acted { text, reasoning, calls },
        }
    }

    /// As templates read it.
    fn told(self) -> Value {
        match self {
            Said::Turn(Turn { role, content }) => json!({"role": role, "content": content}),
            Said::Acted { text, reasoning, calls } => {
                let mut told = json!({"role": Role::Assistant, "content": text});
                if !reasoning.is_empty() {
                    told["reasoning_content"] = reasoning.into();
                }
                if !calls.is_empty() {
                    told["tool_calls"] = calls.into();
                }
                told
            }
            Said::Result { call, name, text } => {
                let mut told = json!({"role": "tool", "content": text, "tool_call_id": call});
                if let Some(name) = name {
                    told["name"] = name.into();
                }
                told
            }
        }
    }
}

/// What the system says, before all else; nothing, if that is no text.
pub(super) fn system(text: String) -> Option<Said> {
    (!text.is_empty()).then_some(Said::Turn(Turn { role: Role::System, content: text }))
}

/// Puts what the system or a person says behind what was `said`, as templates take it: one message of the system, at the
/// start, and no two of the person one after the other. What the system says later stands in the person's, between marks.
pub(super) fn say(said: &mut Vec<Said>, Turn { role, content }: Turn) {
    let is_first = matches!(said.as_slice(), [] | [Said::Turn(Turn { role: Role::System, .. })]);
    let (role, content) = match role {
        Role::System if !is_first => (Role::User, format!("<system>\n{content}\n</system>")),
        role => (role, content),
    };
    match said.last_mut() {
        Some(Said::Turn(last)) if last.role == role && role != Role::Assistant => {
            last.content.push_str("\n\n");
            last.content.push_str(&content);
        }
        _ => said.push(Said::Turn(Turn { role, content })),
    }
}

/// The prompt of a conversation: plain, where nobody calls or may call anything and nobody's thoughts are given back.
pub(super) fn prompts(said: Vec<Said>, toolbox: Toolbox, thinking: Thinking) -> Prompts {
    let is_plain = |said: &Said| matches!(said, Said::Turn(_));
    if toolbox.tools.is_empty() && said.iter().all(is_plain) {
        let turn = |said| match said {
            Said::Turn(turn) => Some(turn),
            _ => None,
        };
        return Prompts::Chat(said.into_iter().filter_map(turn).collect());
    }
    Prompts::Dialogue(Dialogue {
        messages: said.into_iter().map(Said::told).collect(),
        tools: toolbox.tools,
        tool_choice: toolbox.choice,
        parallel_tool_calls: toolbox.parallel,
        enable_thinking: thinking != Thinking::Off,
    })
}

/// A plain conversation, for a template that has to say how the answer is read.
pub(crate) fn as_dialogue(turns: &[Turn], thinking: Thinking) -> Dialogue {
    let messages = turns.iter().cloned().map(|turn| Said::Turn(turn).told());
    let enable_thinking = thinking != Thinking::Off;
    Dialogue { messages: messages.collect(), enable_thinking, ..Dialogue::default() }
}

/// There is nothing to answer to in an empty conversation.
pub(super) fn there_is_one<T>(field: &str, messages: &[T]) -> Result<(), ApiError> {
    match messages.is_empty() {
        true => Err(ApiError::field(field, "there must be one at least")),
        false => Ok(()),
    }
}

/// Who says something, by the field that says it; `None`: none of those that all dialects know.
pub(super) fn role(role: &str) -> Option<Role> {
    match role {
        "system" | "developer" => Some(Role::System),
        "user" => Some(Role::User),
        "assistant" => Some(Role::Assistant),
        _ => None,
    }
}
