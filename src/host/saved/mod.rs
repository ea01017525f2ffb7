//! What a session has in its caches as bytes, for a host of another process.
//!
//! ```text
//! Session::save    -> steps, one after the other -> index -> a file, or memory
//! Session::restore <- as many of the steps as are worth it <- Saved::read: the index alone
//! ```
//!
//! What is in it: the tokens; for each step that the session was given the keys and values of the stages of this process and
//! the rows that each worker was sent ([`dim_core::saved`]). A worker's own cache is filled again by those rows. So what is
//! spared is the computing of this process, and of the way to a worker that its rows wait for; a worker computes again what
//! it computed. With F32 rows what comes behind a restored session has the bits that it had in the process that saved it.
//!
//! The bytes ([`format`](mod@format)): nothing in them is believed before its digest is right, and nothing is allocated that the
//! file does not have. They belong to one model, one cut of it, one way of computing: [`Host::saves_as`].
//!
//! [`Host::saves_as`]: crate::Host::saves_as

mod belongs;
pub mod format;
mod session;

use std::io::{Read, Seek};

pub(crate) use belongs::{Belongs, Stages};
pub use format::Saved;

use crate::error::Error;

/// Why a session could not be saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The memory of this model is more than keys and values, or can not all be taken back.
    #[error("sessions of this model cannot be saved: its memory is more than keys and values")]
    Unsupported,
    /// It holds nothing.
    #[error("there is nothing to save")]
    Nothing,
    /// A stage could not give what it holds.
    #[error(transparent)]
    Library(#[from] Error),
    /// It could not be written.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Why what was saved cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SavedError {
    /// It is something else.
    #[error("it is no saved session")]
    NotSaved,
    /// It is cut off, or was changed.
    #[error("it is not whole: {0}")]
    Damaged(&'static str),
    /// It is of another model, another cut, another wire, or was computed otherwise.
    #[error("it was saved by a host of another model, or one that computes otherwise")]
    OtherHost,
    /// The session could not be given it.
    #[error(transparent)]
    Library(#[from] Error),
    /// It could not be read.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// How much of what was saved is best restored.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Worth {
    /// Steps, from the first.
    pub steps: usize,
    /// Tokens that they are of.
    pub tokens: usize,
    /// What that spares beside the prompt's evaluation, in rows evaluated by all blocks.
    pub rows: f64,
}

impl Saved {
    /// How much of it is worth restoring for a prompt that has `common` tokens in common with it, from the first.
    ///
    /// A step that is restored costs what the workers take for it. A step costs about what [`STEP_ROWS`] rows do, whatever it
    /// has, because all weights are read for it; so the tokens of a reply, which went one by one, are restored only where
    /// the workers have few of the blocks. Otherwise it is cheaper to evaluate them together, as a part of the prompt.
    pub fn worth(&self, common: usize) -> Worth {
        let belongs = self.belongs();
        let chunk = belongs.n_ubatch.max(1) as usize;
        let mut best = Worth::default();
        let (mut replay, mut end) = (0.0, 0);
        for (i, step) in self.steps().iter().enumerate() {
            if end >= common {
                break;
            }
            end += step.live as usize;
            replay += STEP_ROWS + f64::from(step.count);
            let tokens = end.min(common);
            let rows = rows_of(tokens, chunk) - belongs.away * replay;
            if rows > best.rows {
                best = Worth { steps: i + 1, tokens, rows };
            }
        }
        best
    }

    /// What it spares to hold so many tokens already, as [`Worth::rows`].
    pub fn worth_held(&self, tokens: usize) -> f64 {
        rows_of(tokens, self.belongs().n_ubatch.max(1) as usize)
    }

    /// Reads the index of what a session has saved, and nothing else: tokens and steps.
    ///
    /// # Errors
    /// It is not what [`Session::save`](crate::Session::save) writes, not whole, or not of this host.
    pub fn read(from: &mut (impl Read + Seek), host: &crate::Host) -> Result<Saved, SavedError> {
        let belongs = host.saving().ok_or(SavedError::OtherHost)?;
        Saved::read_of(from, belongs)
    }
}

/// The evaluation of a prompt of so many tokens, in rows.
fn rows_of(tokens: usize, chunk: usize) -> f64 {
    tokens as f64 + STEP_ROWS * tokens.div_ceil(chunk) as f64
}

/// Rows that take as long as a step does beyond its rows. A token of a reply takes as long as seven of a prompt on the
/// CPUs that README.md's table is of, and more on a GPU.
pub const STEP_ROWS: f64 = 8.0;

#[cfg(test)]
mod tests;
