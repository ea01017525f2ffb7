//! Grammars as llama.cpp has them.

use std::sync::Arc;

use llama_cpp_2::token::data_array::LlamaTokenDataArray;
use llama_sys_patch::{Error, Grammar, Model};

use super::{Constraint, ConstraintError};

/// A grammar in GBNF, read for a vocabulary. [`Host::grammar`](crate::Host::grammar) makes one.
pub struct Gbnf {
    model: Model,
    text: String,
    /// from where on it holds; none: from the beginning
    triggers: Vec<String>,
    /// what counts as said before the reply begins
    prefill: String,
}

impl Gbnf {
    /// `text`, where it can be followed. With `triggers`, regular expressions, it holds from where one of them matches;
    /// without, after `prefill`.
    pub(crate) fn constraint(
        model: &Model,
        text: &str,
        triggers: Vec<String>,
        prefill: &str,
    ) -> Result<Constraint, ConstraintError> {
        let gbnf =
            Gbnf { model: model.clone(), text: text.to_owned(), triggers, prefill: prefill.to_owned() };
        gbnf.read()?;
        Ok(Constraint::Gbnf(Arc::new(gbnf)))
    }

    fn read(&self) -> Result<Grammar, ConstraintError> {
        let refused = |e: Error| match e {
            Error::NoTokenizer(_) => ConstraintError::Vocabulary("it has no vocabulary"),
            other => ConstraintError::Grammar(other.to_string()),
        };
        let mut grammar = Grammar::new(&self.model, &self.text, &self.triggers).map_err(refused)?;
        grammar.accept_text(&self.prefill).map_err(refused)?;
        Ok(grammar)
    }

    /// It, at the beginning of a reply; `None`: the vocabulary is another one.
    pub(super) fn begin(&self, n_vocab: usize) -> Option<Position> {
        if self.model.n_vocab() != n_vocab {
            return None;
        }
        // it was read before: only memory can be wanting, and then the whole reply is not to be had
        self.read().ok().map(|grammar| Position { grammar, mask: Vec::new(), is_over: false })
    }
}

/// A grammar in the middle of a reply.
pub(crate) struct Position {
    grammar: Grammar,
    /// (n_vocab): minus infinity for what may not follow
    mask: Vec<f32>,
    /// what began it went on as it does not allow: it holds no more
    is_over: bool,
}

impl Position {
    pub(super) fn retain_allowed(
        &mut self,
        candidates: &mut LlamaTokenDataArray,
    ) -> Result<(), ConstraintError> {
        if self.is_over {
            return Ok(());
        }
        self.mask.clear();
        self.mask.resize(candidates.data.len(), 0.0);
        self.grammar.apply(&mut self.mask).map_err(|e| ConstraintError::Grammar(e.to_string()))?;
        let mask = &self.mask;
        let is_allowed =
            |id: i32| usize::try_from(id).ok().and_then(|i| mask.get(i)).is_some_and(|m| *m == 0.0);
        candidates.data.retain(|candidate| is_allowed(candidate.id().0));
        Ok(())
    }

    pub(super) fn accept(&mut self, token: i32) -> Result<(), ConstraintError> {
        match self.grammar.accept(token) {
            // the token that begins what it is for goes on within itself as it may not: then it is no such beginning
            Err(Error::Refused(_)) => self.is_over = true,
            other => other.map_err(|e| ConstraintError::Grammar(e.to_string()))?,
        }
        Ok(())
    }
}
