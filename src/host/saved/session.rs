//! A session into bytes, and out of them.

use std::io::{Read, Seek, Write};
use std::sync::atomic::AtomicBool;

use dim_core::saved::SavedStep;

use super::format::StepWriter;
use super::{SaveError, Saved, SavedError};
use crate::host::Session;
use crate::host::engine::to_u32;

impl Session {
    /// Writes what the caches hold, for [`restore`](Self::restore) in a host of another process that
    /// [saves as](crate::Host::saves_as) this one does: keys and values of the stages here, and the rows that went to workers.
    /// A worker is not needed for it. Where batches were on, a session's steps are saved as if each had been alone.
    ///
    /// # Errors
    /// There is nothing to save, it cannot be saved or not be written. The session is as it was.
    pub fn save(&mut self, out: &mut dyn Write) -> Result<Saved, SaveError> {
        let Some(belongs) = &self.saving else { return Err(SaveError::Unsupported) };
        if self.evaluated == 0 {
            return Err(SaveError::Nothing);
        }
        let mut writer = StepWriter::new(out, belongs)?;
        let (mut position, length) = (0, to_u32(self.evaluated));
        while position < length {
            let steps = self.engine.save_steps(position, length)?;
            if steps.is_empty() {
                break;
            }
            for mut step in steps {
                let (begin, end) = (position as usize, step.end() as usize);
                step.tokens[..end - begin].copy_from_slice(&self.tokens[begin..end]);
                position = step.end();
                writer.step(&step)?;
            }
        }
        Ok(writer.finish()?)
    }

    /// Takes the first `n_steps` of what a session has saved in the place of what this one holds. The caches here are
    /// copied, and workers compute what they computed then, from the same rows in the same steps: with F32 rows what follows
    /// has the same bits. [`Saved::worth`] says how many steps are worth it. `stop` ends it early, and less is held then.
    ///
    /// # Errors
    /// It cannot be read or is not whole, is of another host, or a worker could not be given it. The session then holds what
    /// came before.
    pub fn restore(
        &mut self,
        saved: &Saved,
        from: &mut (impl Read + Seek),
        n_steps: usize,
        stop: Option<&AtomicBool>,
    ) -> Result<(), SavedError> {
        if !self.saving.as_ref().is_some_and(|belongs| saved.is_of(belongs)) {
            return Err(SavedError::OtherHost);
        }
        self.are_tokens(saved.tokens())?;
        self.set_tokens(&[])?;
        let mut steps = saved.read_steps(from, n_steps)?;
        loop {
            let (some, read) = take_some(&mut steps);
            let ends: Vec<usize> = some.iter().map(|step| step.end() as usize).collect();
            if ends.is_empty() {
                return read;
            }
            self.torn = true;
            let n_out = self.engine.restore(some, stop)?;
            let end = ends[..n_out].last().copied().unwrap_or(self.evaluated);
            (self.tokens, self.evaluated) = (saved.tokens()[..end].to_vec(), end);
            self.torn = n_out < ends.len();
            if self.torn {
                return Ok(());
            }
            read?;
        }
    }
}

/// As many steps as are to be in memory at once, and what ended them.
fn take_some(
    steps: &mut impl Iterator<Item = Result<SavedStep, SavedError>>,
) -> (Vec<SavedStep>, Result<(), SavedError>) {
    let (mut bytes, mut some) = (0, Vec::new());
    while bytes < AT_ONCE {
        match steps.next() {
            Some(Ok(step)) => {
                bytes += step.states.iter().map(Vec::len).sum::<usize>();
                some.push(step);
            }
            Some(Err(error)) => return (some, Err(error)),
            None => break,
        }
    }
    (some, Ok(()))
}

/// Bytes of keys and values that are in memory at once while a session is restored, but for the last step's.
const AT_ONCE: usize = 64 << 20;
