//! `/v1/chat/completions`.

use super::fields::LogprobsField;
use super::{Defaults, Fields, Prompts, Wanted, parse, tools, top_logprobs};
use crate::error::ApiError;

/// A chat's request.
///
/// # Errors
/// It is no JSON, or a field is wrong: which.
pub fn chat(body: &[u8], defaults: &Defaults) -> Result<Wanted, ApiError> {
    let mut fields: Fields = parse(body)?;
    let messages = fields.messages.take().ok_or_else(|| ApiError::field("messages", "missing"))?;
    let prompts = tools::prompts(messages, &mut fields)?;
    let top = top(&fields)?;
    let wanted = fields.wanted(prompts, top, defaults)?;
    if let (Prompts::Dialogue(dialogue), Some(format)) = (&wanted.prompts, &wanted.format)
        && !dialogue.tools.is_empty()
    {
        return Err(ApiError::field(format.field, "an answer is a call of a tool or of a schema, not both"));
    }
    Ok(wanted)
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
