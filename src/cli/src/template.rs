//! Which chat template a conversation is rendered with.

use std::path::Path;

use dim::Session;
use dim::host::template::{CHATML, ChatTemplate, TemplateError};
use gguf_tools::failure::Failure;
use gguf_tools::tell;

use crate::{explain, text};

/// What `--chat-template` means.
///
/// # Errors
/// It is neither a name, nor Jinja, nor a file that can be read.
pub fn text(given: &str) -> Result<String, Failure> {
    match given {
        "chatml" => Ok(CHATML.to_owned()),
        jinja if jinja.contains('{') => Ok(jinja.to_owned()),
        file => text::read(Path::new(file), MAX_MIB).map_err(|why| {
            Failure::misuse(format!("--chat-template {file}: neither `chatml`, nor Jinja, nor a file: {why}"))
        }),
    }
}

/// The template whose text is `given`, or the model's own, or ChatML where it has none, with a note.
///
/// # Errors
/// It cannot be used.
pub fn of(session: &Session, given: Option<&str>) -> Result<ChatTemplate, Failure> {
    let template = match given {
        Some(source) => session.chat_template_of(source),
        None => session.chat_template(),
    };
    match template {
        Err(TemplateError::None) if given.is_none() => {
            tell!("note: this model has no chat template; ChatML is used, --chat-template names another");
            session.chat_template_of(CHATML).map_err(explain)
        }
        template => template.map_err(explain),
    }
}

const MAX_MIB: u64 = 1;
