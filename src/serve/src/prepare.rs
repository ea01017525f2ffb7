//! A request on its way from what is wanted to what a slot takes: the chat template is rendered, texts become tokens, schemas
//! and tools what an answer is held to.

use std::sync::Arc;

use axum::http::StatusCode;
use dim::host::Prompted;
use dim::host::template::ChatTemplate;
use dim::host::template::dialogue::{Dialogue, ToolChoice};
use dim::{Constraint, Host};

use crate::error::ApiError;
use crate::request::conversation::as_dialogue;
use crate::request::{Format, Language, Prompt, Prompts, Wanted};
use crate::routes::{App, Loaded};
use crate::work::Reading;

/// The prompts as tokens, and the schema as what it allows. Templates, long texts and schemas take their time: not here, and
/// not many at once.
pub(crate) async fn prepare(app: &Arc<App>, wanted: &Arc<Wanted>) -> Result<Prepared, ApiError> {
    let permit = Arc::clone(&app.readers).acquire_owned().await;
    let (app, wanted) = (Arc::clone(app), Arc::clone(wanted));
    let task = tokio::task::spawn_blocking(move || {
        // whoever asks may leave meanwhile; the work goes on to its end, and counts until then
        let _permit = permit;
        let Loaded { host, template, thinks, .. } = app.loaded()?;
        let template = || template.as_ref().map_err(Clone::clone);
        let (mut constraint, mut reading) = (None, None);
        let mut read = |dialogue: &Dialogue| -> Result<Vec<Vec<i32>>, ApiError> {
            let prompted = prompted(host, template()?, dialogue)?;
            let rendered = prompted.prepared;
            reading =
                Some(Reading { parser: rendered.parser, shown: prompted.preserved, stops: rendered.stops });
            constraint = prompted.constraint;
            Ok(vec![prompted.tokens])
        };
        let prompts = match &wanted.prompts {
            Prompts::Dialogue(dialogue) => read(dialogue)?,
            // what a schema holds from its first token on has no other part
            Prompts::Chat(turns) if *thinks && wanted.format.is_none() => {
                read(&as_dialogue(turns, wanted.thinking))?
            }
            Prompts::Chat(turns) => {
                vec![host.tokenize_chat(template()?, turns).map_err(|e| ApiError::from(&e))?]
            }
            Prompts::Texts(texts) => {
                let tokens = |(i, prompt): (usize, &Prompt)| tokens_of(host, i, prompt);
                texts.iter().enumerate().map(tokens).collect::<Result<_, _>>()?
            }
        };
        if let Some(format) = &wanted.format {
            constraint = Some(compiled(host, format)?);
        }
        Ok(Prepared { prompts, constraint, reading })
    });
    task.await.unwrap_or_else(|e| Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, e.to_string())))
}

/// A request as a slot takes it.
pub(crate) struct Prepared {
    pub prompts: Vec<Vec<i32>>,
    pub constraint: Option<Constraint>,
    pub reading: Option<Reading>,
}

/// A conversation whose answer has parts; what is wrong with it because of its tools is wrong with them.
fn prompted(host: &Host, template: &ChatTemplate, dialogue: &Dialogue) -> Result<Prompted, ApiError> {
    let prompted = host.prepare(template, dialogue).map_err(|error| match error {
        dim::Error::Constraint(_) => ApiError::field("tools", error.to_string()),
        other => ApiError::from(&other),
    })?;
    if !dialogue.tools.is_empty() && !prompted.prepared.takes_tools {
        let message = "this model's chat template has no place for them (--chat-template takes one that has)";
        return Err(ApiError::field("tools", message));
    }
    if dialogue.tool_choice == ToolChoice::Required && prompted.constraint.is_none() {
        return Err(ApiError::field(
            "tool_choice",
            "a call cannot be enforced with this model's chat template",
        ));
    }
    Ok(prompted)
}

/// What is wrong with a schema or a grammar is wrong with the field that it came in.
fn compiled(host: &Host, format: &Format) -> Result<Constraint, ApiError> {
    let compiled = match format.language {
        Language::JsonSchema => host.json_schema(&format.text),
        Language::Gbnf => host.grammar(&format.text),
    };
    compiled.map_err(|error| {
        let error = ApiError::from(&error);
        match error.status {
            StatusCode::BAD_REQUEST => ApiError::field(format.field, error.message),
            _ => error,
        }
    })
}

fn tokens_of(host: &Host, i: usize, prompt: &Prompt) -> Result<Vec<i32>, ApiError> {
    match prompt {
        Prompt::Text(text) => host.tokenize(text, true).map_err(|e| ApiError::from(&e)),
        Prompt::Tokens(tokens) => {
            let n_vocab = host.vocabulary().n_vocab();
            let is_token = |token: &i32| usize::try_from(*token).is_ok_and(|token| token < n_vocab);
            match tokens.iter().find(|token| !is_token(token)) {
                Some(token) => {
                    Err(ApiError::field(format!("prompt[{i}]"), format!("there is no token {token}")))
                }
                None => Ok(tokens.clone()),
            }
        }
    }
}

/// What tokens say.
pub(crate) fn text_of(host: &Host, tokens: &[i32]) -> String {
    let bytes: Vec<u8> =
        tokens.iter().flat_map(|&t| host.vocabulary().token_bytes(t).unwrap_or_default()).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
