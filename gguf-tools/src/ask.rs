//! Who says what a range of blocks needs: llama.cpp, here or in a process of its own, or the tensors' names alone.

use std::path::PathBuf;

use dim_core::blocks::BlockRange;
use serde::de::DeserializeOwned;

use crate::{
    apart::{self, Died, Task},
    gguf::{Gguf, check::Hparams},
    needs::{Cuts, NeedsError, Refusal, Survey, by_name},
};

/// Who is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Ask {
    /// llama.cpp in this process, if it was built in and the model is a file; names otherwise. A file that nobody has
    /// looked at may end the process.
    #[default]
    Here,
    /// llama.cpp in a process of its own: this program, which hands over to [`apart::serve`] where it is told to.
    Apart(PathBuf),
    /// Names alone.
    ByName,
}

impl Ask {
    /// What these ranges need, which are all of a model's, in order.
    ///
    /// # Errors
    /// llama.cpp does not take the model, or it cannot be cut so.
    pub fn ranges(
        &self,
        gguf: &Gguf,
        hparams: &Hparams,
        ranges: &[BlockRange],
    ) -> Result<Survey, NeedsError> {
        let asked: Vec<_> = ranges.iter().map(|blocks| blocks.as_range()).collect();
        let survey = self.llama_cpp(
            gguf,
            |files| apart::survey(files, &asked),
            |files| Task::Survey { files, ranges: asked.clone() },
        )?;
        let survey = survey.unwrap_or_else(|| by_name(gguf, hparams, ranges));
        match survey.ranges.len() == ranges.len() {
            true => Ok(survey),
            false => Err(NeedsError::Apart(Died::Nonsense)),
        }
    }

    /// Where the model can be cut, and what crosses there.
    ///
    /// # Errors
    /// llama.cpp does not take the model, or is not there to be asked.
    pub fn cuts(&self, gguf: &Gguf) -> Result<Cuts, NeedsError> {
        self.llama_cpp(gguf, apart::cuts, |files| Task::Cuts { files })?.ok_or(NeedsError::NotBuilt)
    }

    /// What llama.cpp says of a model's files, `here` or by a `task` elsewhere; `None` where it is not to be asked, or is not
    /// there, or the model is in memory.
    fn llama_cpp<T: DeserializeOwned>(
        &self,
        gguf: &Gguf,
        here: impl FnOnce(&[PathBuf]) -> Result<T, Refusal>,
        task: impl FnOnce(Vec<PathBuf>) -> Task,
    ) -> Result<Option<T>, NeedsError> {
        let files: Vec<_> = gguf.files().filter(|path| path.is_file()).map(PathBuf::from).collect();
        if files.is_empty() || !apart::IS_BUILT_IN {
            return Ok(None);
        }
        let answer = match self {
            Ask::Here => here(&files),
            Ask::Apart(program) => task(files).ask(program)?,
            Ask::ByName => return Ok(None),
        };
        Ok(Some(answer?))
    }
}
