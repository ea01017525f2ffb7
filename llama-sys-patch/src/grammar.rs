//! Grammars in GBNF, by llama.cpp's own engine.

use std::ffi::{CString, c_char};
use std::ptr::NonNull;

use crate::error::check_status;
use crate::stack::{on_a_stack_of, with_room_for_brackets};
use crate::{Error, Model, ffi};

/// A grammar, and where in it a text has come.
pub struct Grammar {
    grammar: NonNull<ffi::dim_grammar>,
    _model: Model, // after `grammar`: must outlive it
}

// SAFETY: a dim_grammar belongs to no thread, everything that changes it takes `&mut self`, and `_model` keeps alive what it
// points to.
unsafe impl Send for Grammar {}

impl Grammar {
    /// The longest grammar there may be.
    pub const MAX_BYTES: usize = 1 << 20;
    /// Most brackets that may be open at a time in one.
    pub const MAX_DEPTH: usize = 1_000;

    /// Reads `gbnf`, whose start is `root`. With `triggers`, ECMAScript's regular expressions, it holds from where one of
    /// them matches the end of what was said, some 1,000 bytes of it; without, from the start.
    ///
    /// # Errors
    /// [`Error::Refused`] with llama.cpp's sentence, or: it is longer than [`MAX_BYTES`](Self::MAX_BYTES), deeper than
    /// [`MAX_DEPTH`](Self::MAX_DEPTH); [`Error::NoTokenizer`], [`Error::InvalidArgument`] for a NUL byte.
    pub fn new(model: &Model, gbnf: &str, triggers: &[String]) -> Result<Grammar, Error> {
        if gbnf.len() > Self::MAX_BYTES {
            let (got, most) = (gbnf.len(), Self::MAX_BYTES);
            return Err(Error::Refused(format!("it is {got} bytes long: at most {most}")));
        }
        let nul = |_| Error::InvalidArgument("a NUL byte in a grammar".into());
        let gbnf_c = CString::new(gbnf).map_err(nul)?;
        let triggers: Vec<CString> = triggers
            .iter()
            .map(|trigger| CString::new(trigger.as_str()).map_err(nul))
            .collect::<Result<_, _>>()?;
        let create = || {
            let pointers: Vec<*const c_char> = triggers.iter().map(|trigger| trigger.as_ptr()).collect();
            let mut grammar = std::ptr::null_mut();
            // SAFETY: the model is alive, and the Grammar keeps it so; all strings end with a NUL and are valid for the
            // call, as `pointers` is for its length; `grammar` is written.
            check_status(unsafe {
                ffi::dim_grammar_create(
                    model.raw(),
                    gbnf_c.as_ptr(),
                    pointers.as_ptr(),
                    pointers.len(),
                    &raw mut grammar,
                )
            })?;
            let grammar =
                NonNull::new(grammar).ok_or_else(|| Error::Internal("a grammar that is NULL".into()))?;
            Ok(Grammar { grammar, _model: model.clone() })
        };
        // brackets nest, and rules that begin with each other do
        with_room_for_brackets(gbnf, b"()", Self::MAX_DEPTH, || ())?;
        on_a_stack_of(gbnf.len().saturating_mul(BYTES_PER_BYTE), create)?
    }

    /// Sets the logit of every token that may not come next to minus infinity. `logits`: (n_vocab).
    ///
    /// # Errors
    /// [`Error::WrongSize`]: there are more than tokens.
    pub fn apply(&self, logits: &mut [f32]) -> Result<(), Error> {
        // SAFETY: the grammar is alive, `logits` valid for its length.
        check_status(unsafe {
            ffi::dim_grammar_apply(self.grammar.as_ptr(), logits.as_mut_ptr(), logits.len())
        })
    }

    /// Whether `token` may come next.
    ///
    /// # Errors
    /// [`Error::UnknownToken`].
    pub fn allows(&self, token: i32) -> Result<bool, Error> {
        let mut allowed = false;
        // SAFETY: the grammar is alive; `allowed` is written.
        check_status(unsafe { ffi::dim_grammar_allows(self.grammar.as_ptr(), token, &raw mut allowed) })?;
        Ok(allowed)
    }

    /// Goes on by a token.
    ///
    /// # Errors
    /// [`Error::Refused`]: it may not come next; [`Error::UnknownToken`].
    pub fn accept(&mut self, token: i32) -> Result<(), Error> {
        // SAFETY: the grammar is alive and ours alone (`&mut`).
        check_status(unsafe { ffi::dim_grammar_accept(self.grammar.as_ptr(), token) })
    }

    /// Goes on by what stands in the prompt already and counts as said.
    ///
    /// # Errors
    /// [`Error::Refused`]: it may not come next; the grammar is of no use then.
    pub fn accept_text(&mut self, text: &str) -> Result<(), Error> {
        // SAFETY: the grammar is alive and ours alone (`&mut`); `text` is valid for its length.
        check_status(unsafe {
            ffi::dim_grammar_accept_text(self.grammar.as_ptr(), text.as_ptr().cast(), text.len())
        })
    }
}

impl Drop for Grammar {
    fn drop(&mut self) {
        // SAFETY: the grammar is ours, and its model is still alive.
        unsafe { ffi::dim_grammar_free(self.grammar.as_ptr()) };
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Grammar")
    }
}

/// Stack for each byte of a grammar: a rule that begins with another takes six at least (`a::=b` and a line's end), and a
/// level of llama.cpp's search for left recursion some 200 bytes.
const BYTES_PER_BYTE: usize = 256;
