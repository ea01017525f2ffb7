//! `/v1/chat/completions`.

use dim::host::template::{Role, Turn};

use super::fields::{Content, LogprobsField};
use super::{Defaults, Fields, Message, Prompts, Wanted, parse, top_logprobs};
use crate::error::ApiError;

/// A chat's request.
///
/// # Errors
/// It is no JSON, or a field is wrong: which.
pub fn chat(body: &[u8], defaults: &Defaults) -> Result<Wanted, ApiError> {
    let mut fields: Fields = parse(body)?;
    let messages = fields.messages.take().ok_or_else(|| ApiError::field("messages", "missing"))?;
    let turns = turns(None, messages)?;
    let top = top(&fields)?;
    fields.wanted(Prompts::Chat(turns), top, defaults)
}

/// A conversation, of one message at least; before them, if there is something in it, what the system says.
pub(super) fn turns(system: Option<String>, messages: Vec<Message>) -> Result<Vec<Turn>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::field("messages", "there must be one at least"));
    }
    let said = messages.into_iter().enumerate().map(|(i, message)| turn(i, message));
    system.map(system_turn).into_iter().flatten().map(Ok).chain(said).collect()
}

/// What the system says; nothing, if that is no text.
pub(super) fn system_turn(content: String) -> Option<Turn> {
    (!content.is_empty()).then_some(Turn { role: Role::System, content })
}

fn turn(
    i: usize,
    Message { role, content: Content(content), tool_calls }: Message,
) -> Result<Turn, ApiError> {
    if tool_calls.is_some_and(|calls| !calls.is_empty()) {
        return Err(ApiError::field(format!("messages[{i}].tool_calls"), "tools are not supported yet"));
    }
    let role = match role.as_str() {
        "system" | "developer" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        "tool" | "function" => {
            return Err(ApiError::field(format!("messages[{i}].role"), "tools are not supported yet"));
        }
        other => {
            let message = format!("{other:?} is none of \"system\", \"developer\", \"user\", \"assistant\"");
            return Err(ApiError::field(format!("messages[{i}].role"), message));
        }
    };
    Ok(Turn { role, content })
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
