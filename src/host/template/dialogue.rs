//! Conversations with tools: what of them is a prompt, and how their answers are read.
//!
//! ```text
//! Dialogue --(a process of its own: llama.cpp's `common` runs the template)--> Prepared { prompt, grammar, parser, ... }
//! tokens of the answer, as text --(here: Answer, on a stack of its own)--> Message { content, reasoning, calls }
//! ```

use llama_sys_patch::{AnswerParser, ChatTemplate as Common, Error as CommonError};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{MAX_TEXT_BYTES, Source, TemplateError};

/// A conversation as OpenAI's clients write it, after it was checked.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Dialogue {
    /// Who said what: objects with `role`, `content`, and where they are `tool_calls`, `tool_call_id`, `name`,
    /// `reasoning_content`.
    pub messages: Vec<Value>,
    /// What the model may call: objects with `type` and `function`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Value>,
    /// Whether it has to.
    pub tool_choice: ToolChoice,
    /// Whether it may call several at once.
    pub parallel_tool_calls: bool,
    /// Whether a model that reasons does.
    pub enable_thinking: bool,
}

/// Whether a tool is to be called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ToolChoice {
    /// As the model likes.
    #[default]
    Auto,
    /// No.
    None,
    /// Yes, whichever there is.
    Required,
}

impl Dialogue {
    pub(super) fn to_json(&self) -> String {
        // maps with keys that are texts: there is nothing in it that JSON does not know
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// What a template makes of a [`Dialogue`].
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Prepared {
    /// What the model goes on from.
    pub prompt: String,
    /// With what its answer is read: [`Answer::new`] takes it.
    pub parser: String,
    /// What a tool call follows, in GBNF; empty where there is none.
    pub grammar: String,
    /// Regular expressions that say from where on; none: from the beginning, after `prefill`.
    pub triggers: Vec<String>,
    /// What of the prompt's end counts as answer for grammar and parser.
    pub prefill: String,
    /// Control tokens that belong to the answer's text.
    pub preserved: Vec<String>,
    /// Texts at which the answer ends too.
    pub stops: Vec<String>,
    /// Whether the template does anything with tools.
    pub takes_tools: bool,
    /// Whether the model has a reasoning part.
    pub thinks: bool,
}

impl Prepared {
    pub(super) fn read(json: &str) -> Result<Prepared, TemplateError> {
        serde_json::from_str(json).map_err(|e| TemplateError::Failed(format!("its process answers: {e}")))
    }
}

/// `grammar` of a call that must come, without what llama.cpp lets the model say before it: as much as it likes, and a small
/// model never comes to the call. What it lets it think stays. (`until-12? ` in the rule `root`; a grammar of another shape
/// stays as it is.)
pub(crate) fn call_at_once(grammar: &str) -> String {
    let is_talk = |word: &str| {
        let number = word.strip_prefix("until-").and_then(|rest| rest.strip_suffix('?'));
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
    };
    let line = |line: &str| match line.starts_with("root ::= ") {
        true => line.split(' ').filter(|word| !is_talk(word)).collect::<Vec<_>>().join(" "),
        false => line.to_owned(),
    };
    grammar.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// `grammar` with one call where llama.cpp lets several follow each other, whatever it was told. (A grammar of another shape
/// stays as it is.)
pub(crate) fn one_call(grammar: &str) -> String {
    let line = |line| match line {
        "tool-calls ::= (tool-call space)+" => "tool-calls ::= tool-call space",
        other => other,
    };
    grammar.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// In the process of its own: `common` reads the template when it is asked for the first time.
pub(super) fn prepare(
    common: &mut Option<Common>,
    source: &Source,
    request: &str,
) -> Result<String, TemplateError> {
    let failed = |e: CommonError| match e {
        CommonError::OutOfMemory(_) => TemplateError::TooMuchMemory,
        other => TemplateError::Failed(super::jinja::short(&other.to_string())),
    };
    let template = match common {
        Some(template) => template,
        None => common.insert(Common::new(&source.jinja, &source.bos, &source.eos).map_err(failed)?),
    };
    let prepared = template.apply(request).map_err(failed)?;
    match prepared.len() > MAX_TEXT_BYTES {
        true => Err(TemplateError::TooMuchText),
        false => Ok(prepared),
    }
}

/// What a model said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Message {
    /// To whoever asked.
    pub content: String,
    /// To itself, before.
    #[serde(rename = "reasoning_content")]
    pub reasoning: String,
    /// What it wants done.
    #[serde(rename = "tool_calls")]
    pub calls: Vec<Call>,
}

/// A call of a tool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Call {
    /// The tool's name.
    pub name: String,
    /// JSON, as far as it was said.
    pub arguments: String,
    /// As the model says it; empty for most.
    pub id: String,
}

/// An answer as it comes.
#[derive(Debug)]
pub struct Answer {
    parser: AnswerParser,
    text: String,
    message: Message,
    /// the parser took all of the text, as far as it goes
    is_read: bool,
}

impl Answer {
    /// One that is read with [`Prepared::parser`].
    ///
    /// # Errors
    /// It is no parser.
    pub fn new(parser: &str) -> Result<Answer, TemplateError> {
        let parser = AnswerParser::new(parser).map_err(|e| TemplateError::Failed(e.to_string()))?;
        Ok(Answer { parser, text: String::new(), message: Message::default(), is_read: true })
    }

    /// What it says so far.
    pub fn message(&self) -> &Message {
        &self.message
    }

    /// Takes in what was said, and gives what of it is new.
    pub fn push(&mut self, text: &str) -> Message {
        self.text.push_str(text);
        let new = self.read(true);
        self.is_read = new.is_some();
        new.unwrap_or_default()
    }

    /// Where nothing follows: gives what is new. What does not have the form that the model's family uses stands as it was
    /// read before; a mere text that could not be read to its end stands as it was said.
    pub fn finish(&mut self) -> Message {
        if let Some(new) = self.read(false) {
            return new;
        }
        let Message { content, reasoning, calls } = &self.message;
        let was_read = self.is_read && self.message != Message::default();
        if was_read || !reasoning.is_empty() || !calls.is_empty() {
            return Message::default();
        }
        let rest = self.text.strip_prefix(content.as_str()).unwrap_or_default().to_owned();
        self.message.content.push_str(&rest);
        Message { content: rest, ..Message::default() }
    }

    /// Reads all of it again, which takes some 0.01 ms a kilobyte; `None`: the parser does not take it. What was told before
    /// is not taken back: where a reading goes another way than the one before, that one stands.
    fn read(&mut self, is_partial: bool) -> Option<Message> {
        let parsed = self.parser.parse(&self.text, is_partial).ok()?;
        let now: Message = serde_json::from_str(&parsed).ok()?;
        let Some(new) = difference(&self.message, &now) else { return Some(Message::default()) };
        self.message = now;
        Some(new)
    }
}

/// What `now` says more than `before`; of calls that were there before, the rest of their arguments. `None`: it says
/// something else.
fn difference(before: &Message, now: &Message) -> Option<Message> {
    let rest = |before: &str, now: &str| now.strip_prefix(before).map(str::to_owned);
    if now.calls.len() < before.calls.len() {
        return None;
    }
    let calls = now.calls.iter().enumerate().map(|(i, call)| {
        let before = before.calls.get(i).map_or("", |before| before.arguments.as_str());
        Some(Call { arguments: rest(before, &call.arguments)?, ..call.clone() })
    });
    Some(Message {
        content: rest(&before.content, &now.content)?,
        reasoning: rest(&before.reasoning, &now.reasoning)?,
        calls: calls.collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(name: &str, arguments: &str) -> Call {
        Call { name: name.into(), arguments: arguments.into(), id: String::new() }
    }

    #[test]
    fn a_call_that_must_come_comes_at_once() {
        let grammar = "a ::= until-1? b\nroot ::= \"x\" space until-161? tool-calls\nuntil-161 ::= [^<]";
        let at_once = "a ::= until-1? b\nroot ::= \"x\" space tool-calls\nuntil-161 ::= [^<]";
        assert_eq!(call_at_once(grammar), at_once);
        assert_eq!(
            one_call("a\ntool-calls ::= (tool-call space)+\nb"),
            "a\ntool-calls ::= tool-call space\nb"
        );
        assert_eq!(call_at_once("root ::= until-x? \"until-1?\""), "root ::= until-x? \"until-1?\"");
    }

    #[test]
    fn what_is_new_is_what_was_not_told() {
        let before = Message { content: "a".into(), reasoning: "r".into(), calls: vec![call("f", "{\"x\"")] };
        let mut now = before.clone();
        now.content.push('b');
        now.calls = vec![call("f", "{\"x\": 1}"), call("g", "")];
        let new = difference(&before, &now).unwrap();
        assert_eq!((new.content.as_str(), new.reasoning.as_str()), ("b", ""));
        assert_eq!(new.calls, [call("f", ": 1}"), call("g", "")]);
        assert_eq!(difference(&now, &before), None);
    }
}
