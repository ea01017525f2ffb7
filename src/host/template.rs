//! The model's own chat template, rendered in a sandbox: no files, no network, bounded time, bounded text.
//!
//! A template is a program that came with a download. It runs in MiniJinja (no access to anything outside
//! its arguments) with a limit of steps ("fuel") and a limit on its output.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, context};

/// Who said something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// How the assistant is to behave; at most one, at the start.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Who said it.
    pub role: Role,
    /// What was said.
    pub content: String,
}

impl Turn {
    /// As templates see it: a map with `role` and `content`.
    fn value(&self) -> Value {
        let role = match self.role {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        Value::from_pairs([("role", role), ("content", self.content.as_str())])
    }
}

/// The template that most models without one understand, and that llama.cpp takes then: ChatML.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
                          message['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}\
                          {{ '<|im_start|>assistant\\n' }}{% endif %}";

/// A chat template of a model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

/// Why a conversation could not be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The model has none.
    #[error("this model has no chat template; use `dim-host generate -p` for plain text")]
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
}

impl ChatTemplate {
    /// Parses `source` (the GGUF's `tokenizer.chat_template`). `bos` and `eos` are the texts of those tokens,
    /// which templates may insert.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<ChatTemplate, TemplateError> {
        if source.trim().is_empty() {
            return Err(TemplateError::None);
        }
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(TemplateError::TooLong { bytes: source.len() });
        }
        // the parser recurses: a template of thousands of nested parentheses must not meet a small stack
        if nesting(source) > MAX_NESTING {
            return Err(TemplateError::Failed(format!("it nests deeper than {MAX_NESTING} levels")));
        }
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(64);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        // as transformers renders them: a block tag takes the newline after it and the indent before it along
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| TemplateError::Failed(e.to_string()))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        // templates that print today's date would change the prompt from day to day; a fixed one keeps runs alike
        environment.add_function("strftime_now", |_format: String| String::from("26 Jul 2024"));
        environment
            .add_template_owned("chat", source.to_owned())
            .map_err(|e| TemplateError::Failed(e.to_string()))?;
        Ok(ChatTemplate { environment, bos: bos.to_owned(), eos: eos.to_owned() })
    }

    /// Whether a rendered text begins with the token that a tokenizer adds to the beginning of one.
    pub fn adds_bos(&self, rendered: &str) -> bool {
        !self.bos.is_empty() && rendered.starts_with(&self.bos)
    }

    /// The prompt for `turns`, ending where the assistant is to speak.
    pub fn render(&self, turns: &[Turn]) -> Result<String, TemplateError> {
        let template =
            self.environment.get_template("chat").map_err(|e| TemplateError::Failed(e.to_string()))?;
        let messages: Vec<Value> = turns.iter().map(Turn::value).collect();
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
            Err(e) => Err(TemplateError::Failed(e.to_string())),
        }
    }
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

/// The deepest nesting of brackets and of block tags, counted over the source without regard to strings: an
/// upper bound of what the parser will recurse into.
fn nesting(source: &str) -> usize {
    let (mut depth, mut deepest) = (0usize, 0usize);
    for byte in source.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    let tags = |word: &str| source.matches(word).count();
    // unary operators and filters recurse as well, a level each
    let unary = source.split("not").count().max(source.split('-').filter(|s| s.is_empty()).count());
    deepest.max(tags("{% if").saturating_sub(tags("endif"))).max(if unary > 2_000 { unary } else { 0 })
}

const MAX_TEMPLATE_BYTES: usize = 256 * 1024;
const MAX_TEXT_BYTES: usize = 16 * 1024 * 1024;
const MAX_NESTING: usize = 100;
const FUEL: u64 = 5_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(role: Role, content: &str) -> Turn {
        Turn { role, content: content.to_owned() }
    }

    #[test]
    fn renders_chatml() {
        let t = ChatTemplate::new(CHATML, "", "").unwrap();
        assert_eq!(
            t.render(&[turn(Role::System, "Be brief."), turn(Role::User, "Hi")]).unwrap(),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn python_methods_and_exceptions_work_as_templates_expect() {
        let source = "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}[{{ m['content'].strip() | upper }}]{% endfor %}";
        let t = ChatTemplate::new(source, "<s>", "</s>").unwrap();
        assert_eq!(t.render(&[turn(Role::User, "  hi ")]).unwrap(), "<s>[HI]");
        let e = t.render(&[turn(Role::Assistant, "x")]).unwrap_err().to_string();
        assert!(e.contains("roles must alternate"), "{e}");
    }

    #[test]
    fn hostile_templates_end_with_an_error() {
        let user = [turn(Role::User, "x")];
        let render = |source: &str| ChatTemplate::new(source, "", "").and_then(|t| t.render(&user));
        let endless =
            "{% for a in range(9999) %}{% for b in range(9999) %}{% set x = a * b %}{% endfor %}{% endfor %}";
        assert!(matches!(render(endless), Err(TemplateError::Endless)));
        let bomb =
            "{% for a in range(90000) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' * 100 }}{% endfor %}";
        assert!(matches!(render(bomb), Err(TemplateError::TooMuchText)));
        assert!(render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").is_err());
        assert!(render("{% for %}").is_err());
        assert!(render("{% include '/etc/passwd' %}").is_err());
        assert!(render(&format!("{{{{ {}1{} }}}}", "(".repeat(50_000), ")".repeat(50_000))).is_err());
        assert!(render(&format!("{{{{ {} x }}}}", "not ".repeat(60_000))).is_err());
        assert!(matches!(render(&"x".repeat(MAX_TEMPLATE_BYTES + 1)), Err(TemplateError::TooLong { .. })));
        assert!(matches!(render("  "), Err(TemplateError::None)));
    }
}
