//! What a reply has to be: `response_format` as OpenAI's chats have it, llama-server's `json_schema` and `grammar` beside it, and
//! the form in which the other dialects say the same.
//!
//! Schema and grammar stay text here. It is read within bounds of its own when it is compiled for the model's vocabulary.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::Fields;
use crate::error::ApiError;

/// What every choice is valid by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Format {
    /// The field it came in, for whoever is told what is wrong with it.
    pub field: &'static str,
    /// In what it is written.
    pub language: Language,
    /// As it was sent.
    pub text: Arc<str>,
}

/// In what it is said what a choice has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    /// A JSON schema.
    JsonSchema,
    /// llama.cpp's grammars.
    Gbnf,
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
pub(super) fn format(fields: &mut Fields, takes_grammars: bool) -> Result<Option<Format>, ApiError> {
    let schema = fields.json_schema.take().map(|schema| Format::of("json_schema", Some(schema)));
    let beside = match (schema, fields.grammar.take().filter(|grammar| !grammar.is_empty())) {
        (beside, None) => beside,
        (_, Some(_)) if !takes_grammars => {
            let message = "this server follows no grammars of clients: it can be started so that it does";
            return Err(ApiError::field("grammar", message));
        }
        (Some(_), Some(_)) => return Err(ApiError::field("grammar", "there is a json_schema beside it")),
        (None, Some(grammar)) => {
            Some(Format { field: "grammar", language: Language::Gbnf, text: grammar.into() })
        }
    };
    let Some(format) = fields.response_format.take() else { return Ok(beside) };
    let within = match (format.kind.as_str(), format.json_schema) {
        ("text", _) => return Ok(beside),
        ("json_object", _) => Format::of("response_format.schema", format.schema),
        ("json_schema", Some(named)) => Format::of("response_format.json_schema.schema", named.schema),
        ("json_schema", None) => return Err(ApiError::field("response_format.json_schema", "missing")),
        (kind, _) => return Err(unknown("response_format.type", kind)),
    };
    match beside {
        Some(Format { field, .. }) => Err(ApiError::field(field, "there is a response_format beside it")),
        None => Ok(Some(within)),
    }
}

/// A format as the dialects have it that say kind and schema side by side.
#[derive(Deserialize)]
#[serde(expecting = "a format: an object with a type")]
pub(super) struct FlatFormat {
    #[serde(rename = "type")]
    kind: String,
    schema: Option<Box<RawValue>>,
}

impl fmt::Debug for FlatFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FlatFormat").field(&self.kind).finish()
    }
}

impl FlatFormat {
    /// What it says, if anything; `kind_at` and `schema_at` say where that stands in the request.
    pub(super) fn read(self, kind_at: &str, schema_at: &'static str) -> Result<Option<Format>, ApiError> {
        match (self.kind.as_str(), self.schema) {
            ("text", _) => Ok(None),
            ("json_object", _) => Ok(Some(Format::of(schema_at, None))),
            ("json_schema", Some(schema)) => Ok(Some(Format::of(schema_at, Some(schema)))),
            ("json_schema", None) => Err(ApiError::field(schema_at, "missing")),
            (kind, _) => Err(unknown(kind_at, kind)),
        }
    }
}

impl Format {
    /// Of a schema as it was sent; without one, any object.
    fn of(field: &'static str, schema: Option<Box<RawValue>>) -> Format {
        let schema = schema.filter(|schema| schema.get() != "null");
        let text = schema.map_or(ANY_OBJECT.into(), |schema| schema.get().into());
        Format { field, language: Language::JsonSchema, text }
    }
}

fn unknown(field: &str, kind: &str) -> ApiError {
    ApiError::field(field, format!("{kind:?} is none of \"text\", \"json_object\", \"json_schema\""))
}

const ANY_OBJECT: &str = r#"{"type": "object"}"#;
