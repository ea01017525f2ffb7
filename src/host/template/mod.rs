//! The model's own chat template: a program that came with a download.
//!
//! A Jinja engine reads it, without access to anything outside its arguments and with limits on its steps and its text. That
//! bounds neither time, nor memory, nor stack: an expression of 28,000 terms is one step. So where a program has named
//! itself ([`stage::trial`](crate::stage::trial)), a template is read and rendered in a [process of its own](room), and
//! whatever it does ends in one of the errors below. Elsewhere it is read here, on a stack that is large enough for any
//! template of the size allowed.
//!
//! Two engines read it. MiniJinja renders what people and models say to each other, as transformers does. A [dialogue] with
//! tools, or with a model that reasons, is rendered by llama.cpp's `common`, which gives the parser of the model's answer
//! and the grammar of its tool calls along, and has no limits of its own: it runs in the process of its own or not at all.

pub(crate) mod dates;
pub mod dialogue;
mod jinja;
mod json;
pub mod room;

use serde::{Deserialize, Serialize};

use crate::stage::trial;
use dialogue::{Dialogue, Prepared};
use jinja::Jinja;
use room::{Request, Room};

/// Who said something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// How the assistant is to behave; at most one, at the start.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// Who said it.
    pub role: Role,
    /// What was said.
    pub content: String,
}

/// The template that most models without one understand, and that llama.cpp takes then: ChatML.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
                          message['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}\
                          {{ '<|im_start|>assistant\\n' }}{% endif %}";

/// A chat template of a model.
#[derive(Debug)]
pub struct ChatTemplate {
    bos: String,
    reader: Reader,
}

/// Who renders it.
#[derive(Debug)]
enum Reader {
    Here(Box<Jinja>),
    Apart(Room),
}

/// A template and what it is given besides the conversation.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Source {
    jinja: String,
    bos: String,
    eos: String,
}

/// Why a conversation could not be rendered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum TemplateError {
    /// The model has none.
    #[error("this model has no chat template")]
    None,
    /// It is longer than any real one.
    #[error("this model's chat template is {bytes} bytes long, more than the {MAX_TEMPLATE_BYTES} allowed")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// It does not parse, or failed while it ran.
    #[error("this model's chat template failed: {0}")]
    Failed(String),
    /// It ran longer than any real one would.
    #[error("this model's chat template did not end within {FUEL} steps")]
    Endless,
    /// It produced more text than any real one would.
    #[error("this model's chat template produced more than {MAX_TEXT_BYTES} bytes")]
    TooMuchText,
    /// It was given up.
    #[error("this model's chat template took longer than {} s", room::PATIENCE.as_secs())]
    Slow,
    /// It asked for more than there is.
    #[error("this model's chat template needs more than {} MiB of memory", room::MEMORY >> 20)]
    TooMuchMemory,
    /// It overflowed the stack of its process.
    #[error("this model's chat template nests deeper than {} MiB of stack can hold", STACK >> 20)]
    TooDeep,
    /// It ended its process otherwise: how.
    #[error("this model's chat template ends the process that reads it ({0})")]
    Died(String),
    /// Tools want a process of their own to read a template in, and this program has none.
    #[error("tools need a process of their own to read the model's chat template in")]
    NotApart,
    /// There is no process for it: why.
    #[error("the process that reads chat templates cannot be started: {0}")]
    NotStarted(String),
}

impl TemplateError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            TemplateError::NotApart => "name a program that serves it: dim::stage::trial::with",
            TemplateError::NotStarted(_) => "is the program being replaced while it runs? start it again",
            _ => "another template takes its place: ChatML, or one of yours",
        }
    }
}

impl ChatTemplate {
    /// Parses `source` (the GGUF's `tokenizer.chat_template`). `bos` and `eos` are the texts of those tokens,
    /// which templates may insert.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<ChatTemplate, TemplateError> {
        if source.trim().is_empty() {
            return Err(TemplateError::None);
        }
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(TemplateError::TooLong { bytes: source.len() });
        }
        let source = Source { jinja: source.to_owned(), bos: bos.to_owned(), eos: eos.to_owned() };
        let reader = match trial::program() {
            Some(program) => Reader::Apart(Room::open(program, &source)?),
            None => Reader::Here(Box::new(with_room(|| Jinja::new(&source))?)),
        };
        Ok(ChatTemplate { bos: source.bos, reader })
    }

    /// Whether a rendered text begins with the token that a tokenizer adds to the beginning of one.
    pub fn adds_bos(&self, rendered: &str) -> bool {
        !self.bos.is_empty() && rendered.starts_with(&self.bos)
    }

    /// The prompt for `turns`, ending where the assistant is to speak.
    ///
    /// # Errors
    /// The template does not take them, or does something that no template should; it can be asked again.
    pub fn render(&self, turns: &[Turn]) -> Result<String, TemplateError> {
        match &self.reader {
            Reader::Here(jinja) => with_room(|| jinja.render(turns)),
            Reader::Apart(room) => room.ask(&Request::Render(turns.to_vec())),
        }
    }

    /// The prompt for `dialogue`, and with what its answer is read.
    ///
    /// # Errors
    /// As [`render`](Self::render); [`TemplateError::NotApart`] where the program has not named itself.
    pub fn prepare(&self, dialogue: &Dialogue) -> Result<Prepared, TemplateError> {
        match &self.reader {
            Reader::Here(_) => Err(TemplateError::NotApart),
            Reader::Apart(room) => Prepared::read(&room.ask(&Request::Prepare(dialogue.to_json()))?),
        }
    }
}

/// Runs `work` where there is stack for any template: parsing takes a level for each bracket, compiling one for each term.
fn with_room<T: Send>(work: impl FnOnce() -> Result<T, TemplateError> + Send) -> Result<T, TemplateError> {
    let thread = std::thread::Builder::new().stack_size(STACK);
    std::thread::scope(|scope| match thread.spawn_scoped(scope, work) {
        Ok(running) => running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        Err(e) => Err(TemplateError::NotStarted(e.to_string())),
    })
}

/// A real one of 2026 has up to 20 KiB.
const MAX_TEMPLATE_BYTES: usize = 256 * 1024;
const MAX_TEXT_BYTES: usize = 16 * 1024 * 1024;
/// Steps of the interpreter; real ones take thousands.
const FUEL: u64 = 5_000_000;
/// Touched only as far as a template goes; see `the_stack_is_large_enough_for_any_template`.
const STACK: usize = 512 << 20;

#[cfg(test)]
mod tests;
