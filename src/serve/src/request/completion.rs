//! `/v1/completions`.

use super::fields::{LogprobsField, PromptField};
use super::{Defaults, Fields, Prompt, Prompts, Wanted, parse, top_logprobs};
use crate::error::ApiError;

/// A completion's request.
///
/// # Errors
/// It is no JSON, or a field is wrong: which.
pub fn completion(body: &[u8], defaults: &Defaults) -> Result<Wanted, ApiError> {
    let mut fields: Fields = parse(body)?;
    let PromptField(prompts) = fields.prompt.take().ok_or_else(|| ApiError::field("prompt", "missing"))?;
    let is_empty = |prompt: &Prompt| matches!(prompt, Prompt::Tokens(tokens) if tokens.is_empty());
    if prompts.is_empty() || prompts.iter().any(is_empty) {
        return Err(ApiError::field("prompt", "must not be empty"));
    }
    if fields.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::field("suffix", "texts to be put between are not supported"));
    }
    let n = fields.n.unwrap_or(1);
    if fields.best_of.is_some_and(|best_of| best_of != n) {
        return Err(ApiError::field("best_of", "must be as many as n: choices are not ranked here"));
    }
    let top = match fields.logprobs {
        None | Some(LogprobsField::Told(false)) => None,
        Some(LogprobsField::Told(true)) => Some(1),
        Some(LogprobsField::Of(n)) => Some(top_logprobs("logprobs", n.into())?),
    };
    let echo = fields.echo.unwrap_or(false);
    if echo && top.is_some() {
        return Err(ApiError::field(
            "echo",
            "log probabilities of the prompt are not told: leave out one of both",
        ));
    }
    let wanted = fields.wanted(Prompts::Texts(prompts), top, defaults)?;
    Ok(Wanted { echo, ..wanted })
}
