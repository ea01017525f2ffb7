//! What a reply has to be, whatever the model would rather say: a JSON schema or a grammar, enforced token for token.
//!
//! ```text
//! schema -> bounds (schema.rs) -> grammar over the vocabulary (compiler.rs), once  -> Constraint, in Sampling
//! logits -> the tokens that may follow -> samplers -> token -> the grammar one token on, or complete -> again
//! ```
//!
//! The grammar is llguidance's: it enforces a keyword or refuses the schema, it drops none in silence. Whatever takes it
//! too long ends with an error: compiling, the tokens that may follow, a token. Grammars in GBNF are llama.cpp's
//! (gbnf.rs): a user's own, and those of tool calls.

mod compiler;
mod error;
mod gbnf;
mod schema;

use std::fmt;
use std::sync::Arc;

use llama_cpp_2::token::data_array::LlamaTokenDataArray;
use llguidance::Matcher;
use llguidance::toktrie::SimpleVob;

pub(crate) use compiler::Compiler;
pub use error::ConstraintError;
pub use gbnf::Gbnf;

/// What a reply has to be. [`Host::json_schema`](crate::Host::json_schema) and
/// [`Session::json_schema`](crate::Session::json_schema) make one, [`Sampling::constraint`](crate::Sampling::constraint)
/// takes it; it is compiled once, for the vocabulary of its model, and cheap to clone.
#[derive(Clone)]
#[non_exhaustive]
pub enum Constraint {
    /// A JSON document that is valid by a schema.
    JsonSchema(Arc<JsonSchema>),
    /// A text that follows a grammar, from its beginning or from where something in it says so.
    Gbnf(Arc<Gbnf>),
}

/// A JSON schema, compiled for a vocabulary.
pub struct JsonSchema {
    /// at the beginning of a reply
    matcher: Matcher,
    n_vocab: usize,
}

impl Constraint {
    /// The constraint at the beginning of a reply, if this is the vocabulary that it was compiled for.
    pub(crate) fn follow(&self, n_vocab: usize) -> Option<Follower> {
        match self {
            // a copy that shares nothing: replies beside each other do not wait for one another
            Constraint::JsonSchema(schema) => {
                (schema.n_vocab == n_vocab).then(|| Follower::Schema(Box::new(schema.matcher.deep_clone())))
            }
            Constraint::Gbnf(gbnf) => gbnf.begin(n_vocab).map(Follower::Gbnf),
        }
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Constraint::JsonSchema(_) => "Constraint::JsonSchema",
            Constraint::Gbnf(_) => "Constraint::Gbnf",
        })
    }
}

/// The same one: two that were compiled from one schema are not told to be equal.
impl PartialEq for Constraint {
    fn eq(&self, other: &Constraint) -> bool {
        match (self, other) {
            (Constraint::JsonSchema(a), Constraint::JsonSchema(b)) => Arc::ptr_eq(a, b),
            (Constraint::Gbnf(a), Constraint::Gbnf(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// A constraint in the middle of a reply: asked for what may follow, told what did, in turns.
pub(crate) enum Follower {
    Schema(Box<Matcher>),
    Gbnf(gbnf::Position),
}

impl Follower {
    /// Takes the tokens that may not follow out of `candidates`; those that remain are one at least, and in their order.
    pub(crate) fn retain_allowed(
        &mut self,
        candidates: &mut LlamaTokenDataArray,
    ) -> Result<(), ConstraintError> {
        match self {
            Follower::Schema(matcher) => {
                let allowed = matcher.compute_mask().map_err(|e| error::while_running(&e.to_string()))?;
                candidates.data.retain(|candidate| is_in(&allowed, candidate.id().0));
            }
            Follower::Gbnf(position) => position.retain_allowed(candidates)?,
        }
        match candidates.data.is_empty() {
            true => Err(ConstraintError::NothingFollows),
            false => Ok(()),
        }
    }

    /// Counts `token`, one of those that were allowed, as said.
    pub(crate) fn accept(&mut self, token: i32) -> Result<(), ConstraintError> {
        match self {
            Follower::Schema(matcher) => {
                let token = u32::try_from(token).map_err(|_| ConstraintError::NothingFollows)?;
                matcher.consume_token(token).map_err(|e| error::while_running(&e.to_string()))
            }
            Follower::Gbnf(position) => position.accept(token),
        }
    }

    /// Whether the reply is complete: nothing may follow, or the model has ended it where it may.
    pub(crate) fn is_complete(&self) -> bool {
        match self {
            Follower::Schema(matcher) => matcher.is_stopped(),
            // the model ends it: it may want to go on where the grammar lets it
            Follower::Gbnf(_) => false,
        }
    }
}

impl fmt::Debug for Follower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Follower").field("is_complete", &self.is_complete()).finish_non_exhaustive()
    }
}

fn is_in(allowed: &SimpleVob, token: i32) -> bool {
    u32::try_from(token).is_ok_and(|token| (token as usize) < allowed.len() && allowed.is_allowed(token))
}
