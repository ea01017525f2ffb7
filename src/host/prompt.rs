//! Texts and conversations as tokens. Only a chat template makes control tokens: what a person or a model wrote never does,
//! whatever it looks like.

use llama_sys_patch::Model;

use crate::error::Error;
use crate::host::template::{ChatTemplate, Turn};

/// Around a control token's name in what somebody said, on its way through the template. Neither is a character of any
/// text: Unicode keeps them for uses like this one.
const OPEN: char = '\u{fdd0}';
const CLOSE: char = '\u{fdd1}';

/// A text that is to be continued. Special tokens in it are read as such. `begins`: models that want a token before
/// every text get it; none is put behind this one, though some models want that too.
pub(crate) fn text(vocabulary: &Model, text: &str, begins: bool) -> Result<Vec<i32>, Error> {
    let mut tokens = vocabulary.tokenize(text, begins, true).map_err(Error::Text)?;
    if begins && vocabulary.adds_eos() && tokens.last().copied() == vocabulary.eos() {
        tokens.pop();
    }
    Ok(tokens)
}

/// A conversation, ending where the assistant is to speak.
pub(crate) fn chat(vocabulary: &Model, template: &ChatTemplate, turns: &[Turn]) -> Result<Vec<i32>, Error> {
    let mut turns = turns.to_vec();
    for turn in &mut turns {
        turn.content.retain(|c| c != OPEN && c != CLOSE);
    }
    let mut suspicious = false;
    for turn in &turns {
        let read = |special| vocabulary.tokenize(&turn.content, false, special).map_err(Error::Text);
        suspicious |= read(true)? != read(false)?;
    }
    if suspicious {
        // rare, and a pass over the vocabulary
        let names = control_names(vocabulary);
        turns.iter_mut().for_each(|turn| turn.content = guarded(&turn.content, &names));
    }
    let rendered = template.render(&turns)?;
    // a template may begin with the token that the tokenizer would add again
    let begins = !template.adds_bos(&rendered);
    if !suspicious {
        return text(vocabulary, &rendered, begins);
    }
    let mut tokens = Vec::new();
    for (i, piece) in rendered.split(OPEN).enumerate() {
        // before the first mark, and behind every closing one, is the template's
        let (said, made) = if i == 0 { ("", piece) } else { piece.split_once(CLOSE).unwrap_or((piece, "")) };
        tokens.extend(vocabulary.tokenize(said, false, false).map_err(Error::Text)?);
        tokens.extend(text(vocabulary, made, begins && i == 0)?);
    }
    Ok(tokens)
}

/// The names of the tokens that have no text of their own.
fn control_names(vocabulary: &Model) -> Vec<String> {
    let n_vocab = i32::try_from(vocabulary.n_vocab()).unwrap_or(i32::MAX);
    let is_control = |&id: &i32| vocabulary.token_bytes(id).is_ok_and(|bytes| bytes.is_empty());
    let name = |id| String::from_utf8(vocabulary.token_name(id).unwrap_or_default()).ok();
    (0..n_vocab).filter(is_control).filter_map(name).filter(|name| !name.is_empty()).collect()
}

/// `said` with every name in it between marks.
fn guarded(said: &str, names: &[String]) -> String {
    let mut out = String::with_capacity(said.len());
    let mut rest = said;
    while !rest.is_empty() {
        let at = names.iter().filter_map(|name| Some((rest.find(name.as_str())?, name.len())));
        // the first one, and of those there the longest
        let Some((at, len)) = at.min_by_key(|&(at, len)| (at, std::cmp::Reverse(len))) else { break };
        out.push_str(&rest[..at]);
        out.extend([OPEN]);
        out.push_str(&rest[at..at + len]);
        out.extend([CLOSE]);
        rest = &rest[at + len..];
    }
    out.push_str(rest);
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
