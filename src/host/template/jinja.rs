//! Jinja as transformers reads it, by MiniJinja.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, context};

use super::{FUEL, MAX_TEXT_BYTES, Role, Source, TemplateError, Turn, dates, json};

/// A template that was read.
#[derive(Debug)]
pub(super) struct Jinja {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl Jinja {
    pub(super) fn new(source: &Source) -> Result<Jinja, TemplateError> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(64);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        // as transformers renders them: a block tag takes the newline after it and the indent before it along
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(failed)?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| dates::now(&format));
        environment.add_filter("tojson", json::tojson);
        environment.add_template_owned("chat", without_generation_marks(&source.jinja)).map_err(failed)?;
        Ok(Jinja { environment, bos: source.bos.clone(), eos: source.eos.clone() })
    }

    pub(super) fn render(&self, turns: &[Turn]) -> Result<String, TemplateError> {
        let template = self.environment.get_template("chat").map_err(failed)?;
        let messages: Vec<Value> = turns.iter().map(value).collect();
        let mut text = LimitedText { text: Vec::new(), overflowed: false };
        let rendered = template.render_captured_to(
            context! { messages => messages, add_generation_prompt => true, bos_token => self.bos.as_str(), eos_token => self.eos.as_str() },
            &mut text,
        );
        if text.overflowed {
            return Err(TemplateError::TooMuchText);
        }
        match rendered {
            Ok(_) => Ok(String::from_utf8_lossy(&text.text).into_owned()),
            Err(e) if e.kind() == ErrorKind::OutOfFuel => Err(TemplateError::Endless),
            Err(e) => Err(failed(e)),
        }
    }
}

/// A turn as templates see it: a map with `role` and `content`.
fn value(turn: &Turn) -> Value {
    let role = match turn.role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
    };
    Value::from_pairs([("role", role), ("content", turn.content.as_str())])
}

fn failed(error: impl std::fmt::Display) -> TemplateError {
    TemplateError::Failed(short(&error.to_string()))
}

/// What went wrong, no longer than a person reads: a template chooses the text of its own exceptions.
pub(super) fn short(text: &str) -> String {
    const MOST: usize = 500;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// `{% generation %}` and `{% endgeneration %}` mark what a model is trained on; to whoever talks with it they are a scope
/// and nothing else, which MiniJinja calls `with`. What stands in expressions, comments and `raw` is left alone.
pub(super) fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut is_raw = false;
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let end = match rest.as_bytes().get(1) {
            Some(b'%') => rest.find("%}"),
            Some(b'{') if !is_raw => end_of_expression(rest),
            Some(b'#') if !is_raw => rest.find("#}"),
            _ => None,
        };
        let (piece, after) = rest.split_at(end.map_or(1, |end| end + 2));
        let word =
            || piece[2..piece.len() - 2].trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let replaced = match (piece.len() > 3 && piece.starts_with("{%")).then(word) {
            Some("generation") if !is_raw => Some("with"),
            Some("endgeneration") if !is_raw => Some("endwith"),
            Some(mark @ ("raw" | "endraw")) => {
                is_raw = mark == "raw";
                None
            }
            _ => None,
        };
        match replaced {
            Some(instead) => out.push_str(&piece.replace(word(), instead)),
            None => out.push_str(piece),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Where the `}}` of the expression at the beginning stands that is in no string.
fn end_of_expression(source: &str) -> Option<usize> {
    let mut quote = None;
    let mut bytes = source.bytes().enumerate().skip(2);
    while let Some((i, byte)) = bytes.next() {
        match (byte, quote) {
            (b'\\', Some(_)) => drop(bytes.next()),
            (b'\'' | b'"', None) => quote = Some(byte),
            (_, Some(open)) if byte == open => quote = None,
            (b'}', None) if source[i..].starts_with("}}") => return Some(i),
            _ => {}
        }
    }
    None
}

struct LimitedText {
    text: Vec<u8>,
    overflowed: bool,
}

impl std::io::Write for LimitedText {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.text.len() + bytes.len() > MAX_TEXT_BYTES {
            self.overflowed = true;
            return Err(std::io::Error::other("too much text"));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
