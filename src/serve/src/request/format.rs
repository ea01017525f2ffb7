//! What a reply has to be: `response_format` as OpenAI has it, and llama-server's `json_schema` beside it.
//!
//! The schema stays text here. It is read within bounds of its own when it is compiled for the model's vocabulary.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::Fields;
use crate::error::ApiError;

/// A JSON schema that every choice is valid by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Format {
    /// The field it came in, for whoever is told what is wrong with it.
    pub field: &'static str,
    /// As it was sent.
    pub schema: Arc<str>,
}

#[derive(Deserialize)]
pub(super) struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
    json_schema: Option<Named>,
    /// llama-server's, with `json_object`
    schema: Option<Box<RawValue>>,
}

/// A schema as OpenAI wraps it. `name`, `description` and `strict` change nothing here: what is taken is enforced.
#[derive(Deserialize)]
struct Named {
    schema: Option<Box<RawValue>>,
}

impl fmt::Debug for ResponseFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ResponseFormat").field(&self.kind).finish()
    }
}

/// What `fields` say, if anything.
pub(super) fn format(fields: &mut Fields) -> Result<Option<Format>, ApiError> {
    let of = |field, schema: Option<Box<RawValue>>| {
        let schema = schema.filter(|schema| schema.get() != "null");
        let schema = schema.map_or(ANY_OBJECT.into(), |schema| schema.get().into());
        Format { field, schema }
    };
    let beside = fields.json_schema.take().map(|schema| of("json_schema", Some(schema)));
    let Some(format) = fields.response_format.take() else { return Ok(beside) };
    let within = match (format.kind.as_str(), format.json_schema) {
        ("text", _) => return Ok(beside),
        ("json_object", _) => of("response_format.schema", format.schema),
        ("json_schema", Some(named)) => of("response_format.json_schema.schema", named.schema),
        ("json_schema", None) => return Err(ApiError::field("response_format.json_schema", "missing")),
        (kind, _) => {
            let message = format!("{kind:?} is none of \"text\", \"json_object\", \"json_schema\"");
            return Err(ApiError::field("response_format.type", message));
        }
    };
    match beside {
        Some(_) => Err(ApiError::field("json_schema", "there is a response_format beside it")),
        None => Ok(Some(within)),
    }
}

const ANY_OBJECT: &str = r#"{"type": "object"}"#;
