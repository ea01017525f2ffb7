//! `/v1/responses` in its plain form: a text or a conversation, whose answer is a text. Nothing is kept between requests.

use dim::host::template::{Role, Turn};
use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};

use super::fields::TextOr;
use super::turns::{system_turn, turns};
use super::{Defaults, Fields, Message, Prompts, Wanted, parse, refuse_tools, renamed};
use crate::error::ApiError;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Responses {
    input: Option<Input>,
    instructions: Option<String>,
    max_output_tokens: Option<i64>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    stream: Option<bool>,
    background: Option<bool>,
    previous_response_id: Option<String>,
    text: Option<Text>,
    tools: Option<Vec<IgnoredAny>>,
}

#[derive(Debug, Deserialize)]
struct Text {
    format: Option<Format>,
}

#[derive(Debug, Deserialize)]
struct Format {
    #[serde(rename = "type")]
    kind: String,
}

/// A text that a user says, or a conversation.
#[derive(Debug)]
struct Input(TextOr<Message>);

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Input, D::Error> {
        TextOr::read(deserializer, "a string or a list of messages").map(Input)
    }
}

/// A request of that form.
///
/// # Errors
/// It is no JSON, or a field is wrong or not served here: which.
pub fn responses(body: &[u8], defaults: &Defaults) -> Result<Wanted, ApiError> {
    let given: Responses = parse(body)?;
    refuse_tools(given.tools.as_deref())?;
    if given.previous_response_id.is_some() {
        let message = "no response is kept here; send the conversation as input";
        return Err(ApiError::field("previous_response_id", message));
    }
    if given.background == Some(true) {
        return Err(ApiError::field("background", "no response is kept here; leave it out"));
    }
    if let Some(format) = given.text.and_then(|text| text.format).filter(|format| format.kind != "text") {
        let message = format!("{:?} is not supported under this path; take \"text\"", format.kind);
        return Err(ApiError::field("text.format.type", message));
    }
    let system = given.instructions;
    let turns = match given.input.ok_or_else(|| ApiError::field("input", "missing"))?.0 {
        TextOr::Text(content) => {
            let user = Turn { role: Role::User, content };
            system.and_then(system_turn).into_iter().chain([user]).collect()
        }
        TextOr::List(items) => turns(system, items).map_err(|error| renamed(error, "messages", "input"))?,
    };
    let fields = Fields {
        max_tokens: given.max_output_tokens,
        temperature: given.temperature,
        top_p: given.top_p,
        stream: given.stream,
        ..Fields::default()
    };
    let wanted = fields.wanted(Prompts::Chat(turns), None, defaults);
    wanted.map_err(|error| renamed(error, "max_tokens", "max_output_tokens"))
}
