//! A conversation without tools: what each of its messages says, and who says it.

use dim::host::template::{Role, Turn};

use super::Message;
use super::fields::Content;
use crate::error::ApiError;

/// A conversation, of one message at least; before them, if there is something in it, what the system says.
pub(super) fn turns(system: Option<String>, messages: Vec<Message>) -> Result<Vec<Turn>, ApiError> {
    there_is_one(&messages)?;
    let said = messages.into_iter().enumerate().map(|(i, message)| turn(i, message));
    system.map(system_turn).into_iter().flatten().map(Ok).chain(said).collect()
}

/// There is nothing to answer to in an empty conversation.
pub(super) fn there_is_one(messages: &[Message]) -> Result<(), ApiError> {
    match messages.is_empty() {
        true => Err(ApiError::field("messages", "there must be one at least")),
        false => Ok(()),
    }
}

/// What the system says; nothing, if that is no text.
pub(super) fn system_turn(content: String) -> Option<Turn> {
    (!content.is_empty()).then_some(Turn { role: Role::System, content })
}

/// A message of a conversation without tools.
fn turn(i: usize, message: Message) -> Result<Turn, ApiError> {
    if message.tool_calls.is_some_and(|calls| !calls.is_empty()) {
        return Err(ApiError::field(
            format!("messages[{i}].tool_calls"),
            "there are no tools under this path",
        ));
    }
    let role = role(i, &message.role)?.ok_or_else(|| {
        ApiError::field(format!("messages[{i}].role"), "there are no tools under this path")
    })?;
    let Content(content) = message.content;
    Ok(Turn { role, content })
}

/// Who says something; `None`: a tool.
pub(super) fn role(i: usize, role: &str) -> Result<Option<Role>, ApiError> {
    match role {
        "system" | "developer" => Ok(Some(Role::System)),
        "user" => Ok(Some(Role::User)),
        "assistant" => Ok(Some(Role::Assistant)),
        "tool" => Ok(None),
        other => {
            let message =
                format!("{other:?} is none of \"system\", \"developer\", \"user\", \"assistant\", \"tool\"");
            Err(ApiError::field(format!("messages[{i}].role"), message))
        }
    }
}
