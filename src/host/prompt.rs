//! Texts and conversations as tokens. Only a chat template makes control tokens: what a person or a model wrote never does,
//! whatever it looks like.

use std::sync::OnceLock;

use llama_sys_patch::Model;
use serde_json::Value;

use crate::error::Error;
use crate::host::constraint::{Compiler, Constraint, Gbnf};
use crate::host::template::dialogue::{Dialogue, Prepared, ToolChoice, call_at_once, one_call};
use crate::host::template::{ChatTemplate, TemplateError, Turn};

/// Around a control token's name in what somebody said, on its way through the template. Neither is a character of any
/// text: Unicode keeps them for uses like this one.
const OPEN: char = '\u{fdd0}';
const CLOSE: char = '\u{fdd1}';

/// A model's vocabulary, for a host and all its sessions.
pub(crate) struct Vocabulary {
    pub model: Model,
    /// of the tokens that have no text of their own, once somebody talks: a pass over the vocabulary
    control_names: OnceLock<Vec<String>>,
    /// of constraints
    compiler: Compiler,
}

impl Vocabulary {
    /// That of `model`.
    pub(crate) fn new(model: Model) -> Vocabulary {
        Vocabulary { model, control_names: OnceLock::new(), compiler: Compiler::default() }
    }

    /// A JSON schema that replies are to be valid by.
    pub(crate) fn json_schema(&self, schema: &str) -> Result<Constraint, Error> {
        Ok(self.compiler.json_schema(&self.model, schema)?)
    }

    /// A text that is to be continued. Special tokens in it are read as such. `begins`: models that want a token before
    /// every text get it; none is put behind this one, though some models want that too.
    pub(crate) fn text(&self, text: &str, begins: bool) -> Result<Vec<i32>, Error> {
        let mut tokens = self.model.tokenize(text, begins, true).map_err(Error::Text)?;
        if begins && self.model.adds_eos() && tokens.last().copied() == self.model.eos() {
            tokens.pop();
        }
        Ok(tokens)
    }

    /// The model's own chat template.
    pub(crate) fn own_template(&self) -> Result<ChatTemplate, TemplateError> {
        self.template(&self.model.chat_template().unwrap_or_default())
    }

    /// `source` as this model's chat template.
    pub(crate) fn template(&self, source: &str) -> Result<ChatTemplate, TemplateError> {
        let special = |token: Option<i32>| {
            let text = token.and_then(|t| self.model.token_name(t).ok()).unwrap_or_default();
            String::from_utf8_lossy(&text).into_owned()
        };
        let (bos, eos) = (special(self.model.bos()), special(self.model.eos()));
        ChatTemplate::new(source, &bos, &eos)
    }

    /// A conversation, ending where the assistant is to speak.
    pub(crate) fn chat(&self, template: &ChatTemplate, turns: &[Turn]) -> Result<Vec<i32>, Error> {
        let names = self.control_names.get_or_init(|| control_names(&self.model));
        let mut turns = turns.to_vec();
        for turn in &mut turns {
            turn.content.retain(|c| c != OPEN && c != CLOSE);
            turn.content = guarded(&turn.content, names);
        }
        self.rendered(template, &template.render(&turns)?)
    }

    /// A grammar that replies are to follow.
    pub(crate) fn grammar(&self, gbnf: &str) -> Result<Constraint, Error> {
        Ok(Gbnf::constraint(&self.model, gbnf, Vec::new(), "")?)
    }

    /// A conversation with tools as tokens, with what its answer is read with and held to.
    pub(crate) fn dialogue(&self, template: &ChatTemplate, dialogue: &Dialogue) -> Result<Prompted, Error> {
        let names = self.control_names.get_or_init(|| control_names(&self.model));
        let mut dialogue = dialogue.clone();
        let told = dialogue.messages.iter_mut().chain(&mut dialogue.tools);
        told.for_each(|value| guard_all(value, names));
        let mut prepared = template.prepare(&dialogue)?;
        let tokens = self.rendered(template, &prepared.prompt)?;
        // what the model is to say has no marks in it
        for text in [&mut prepared.grammar, &mut prepared.parser, &mut prepared.prompt] {
            text.retain(|c| c != OPEN && c != CLOSE);
        }
        if dialogue.tool_choice == ToolChoice::Required {
            prepared.grammar = call_at_once(&prepared.grammar);
        }
        if !dialogue.parallel_tool_calls {
            prepared.grammar = one_call(&prepared.grammar);
        }
        let constraint = match prepared.grammar.as_str() {
            "" => None,
            gbnf => {
                let triggers = prepared.triggers.clone();
                let prefill = if triggers.is_empty() { prepared.prefill.as_str() } else { "" };
                Some(Gbnf::constraint(&self.model, gbnf, triggers, prefill)?)
            }
        };
        let preserved = prepared.preserved.iter().filter_map(|text| self.one_token(text)).collect();
        Ok(Prompted { tokens, constraint, preserved, prepared })
    }

    /// The token that is all of `text`.
    fn one_token(&self, text: &str) -> Option<i32> {
        match self.model.tokenize(text, false, true).ok()?.as_slice() {
            &[token] => Some(token),
            _ => None,
        }
    }

    /// What a template has rendered, as tokens.
    fn rendered(&self, template: &ChatTemplate, rendered: &str) -> Result<Vec<i32>, Error> {
        // a template may begin with the token that the tokenizer would add again
        let begins = !template.adds_bos(rendered);
        let mut tokens = Vec::new();
        for (i, piece) in rendered.split(OPEN).enumerate() {
            // before the first mark, and behind every closing one, is the template's
            let (said, made) =
                if i == 0 { ("", piece) } else { piece.split_once(CLOSE).unwrap_or((piece, "")) };
            if !said.is_empty() {
                tokens.extend(self.model.tokenize(said, false, false).map_err(Error::Text)?);
            }
            tokens.extend(self.text(made, begins && i == 0)?);
        }
        Ok(tokens)
    }
}

/// A conversation with tools, ready for a model.
#[derive(Clone, Debug)]
pub struct Prompted {
    /// The prompt.
    pub tokens: Vec<i32>,
    /// What the answer is held to, for [`Sampling::constraint`](crate::Sampling::constraint).
    pub constraint: Option<Constraint>,
    /// Control tokens that belong to the answer's text, for [`Generation::show`](crate::Generation::show).
    pub preserved: Vec<i32>,
    /// What the template made of it.
    pub prepared: Prepared,
}

/// Guards every text in `value`, the names of members too: a schema has them from whoever sent it.
fn guard_all(value: &mut Value, names: &[String]) {
    let guard = |text: &mut String| {
        text.retain(|c| c != OPEN && c != CLOSE);
        *text = guarded(text, names);
    };
    match value {
        Value::String(text) => guard(text),
        Value::Array(list) => list.iter_mut().for_each(|value| guard_all(value, names)),
        Value::Object(map) => {
            let members = std::mem::take(map).into_iter();
            map.extend(members.map(|(mut name, mut value)| {
                guard(&mut name);
                guard_all(&mut value, names);
                (name, value)
            }));
        }
        _ => {}
    }
}

fn control_names(model: &Model) -> Vec<String> {
    let n_vocab = i32::try_from(model.n_vocab()).unwrap_or(i32::MAX);
    let is_control = |&id: &i32| model.token_bytes(id).is_ok_and(|bytes| bytes.is_empty());
    let name = |id| String::from_utf8(model.token_name(id).unwrap_or_default()).ok();
    (0..n_vocab).filter(is_control).filter_map(name).filter(|name| !name.is_empty()).collect()
}

/// `said` with every name in it between marks: of several that begin at one place, the longest.
fn guarded(said: &str, names: &[String]) -> String {
    let mut begins_one = [false; 256];
    names.iter().filter_map(|name| name.bytes().next()).for_each(|byte| begins_one[usize::from(byte)] = true);
    let mut out = String::with_capacity(said.len());
    let mut rest = said;
    while let Some(c) = rest.chars().next() {
        let here = match begins_one[usize::from(rest.as_bytes()[0])] {
            true => names.iter().filter(|name| rest.starts_with(name.as_str())).map(String::len).max(),
            false => None,
        };
        let (piece, after) = rest.split_at(here.unwrap_or(c.len_utf8()));
        out.extend(here.map(|_| OPEN));
        out.push_str(piece);
        out.extend(here.map(|_| CLOSE));
        rest = after;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_marked_wherever_they_stand() {
        let names = ["<|end|>", "<|end|>!", "</s>"].map(str::to_owned);
        assert_eq!(guarded("hello", &names), "hello");
        assert_eq!(guarded("", &names), "");
        assert_eq!(
            guarded("é<|end|>!</s></s>x<|end|", &names),
            "é\u{fdd0}<|end|>!\u{fdd1}\u{fdd0}</s>\u{fdd1}\u{fdd0}</s>\u{fdd1}x<|end|"
        );
    }
}
