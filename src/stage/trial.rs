//! Files that llama.cpp has not seen are tried out in a process of their own: it checks much of a file by assertions, which
//! end the process that they are in.
//!
//! A library cannot know which program to start for that. One that names [itself](with), and hands over to
//! [`gguf_tools::apart::serve`] and [`template::room::serve`](crate::host::template::room::serve) where it is told to, gets
//! an [error](crate::Error::Unsurvived) instead of an end. `dim-host` and `dim-worker` do. A file that was survived is remembered until it changes.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use gguf_tools::apart;

use crate::error::Error;
use crate::stage::memory::Memory;

static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// From now on files are tried out by this program before they are loaded. The first call counts.
pub fn with(program: PathBuf) {
    let _ = PROGRAM.set(program);
}

/// The program that tries files out, and reads chat templates, in a process of its own.
pub(crate) fn program() -> Option<&'static Path> {
    PROGRAM.get().map(PathBuf::as_path)
}

/// Tries a model's files, or a slice's, where there is a program to do it.
pub(crate) fn survive(files: &[PathBuf]) -> Result<(), Error> {
    let (Some(program), Some(first)) = (program(), files.first()) else { return Ok(()) };
    // another llama.cpp may take a file otherwise
    let version = format!("llama-cpp-sys-2 {}", llama_sys_patch::LLAMA_CPP_SYS_VERSION);
    let memory = Memory::of("survived", files.iter().map(PathBuf::as_path), &version);
    if memory.holds() {
        return Ok(());
    }
    apart::try_file(program, files.to_vec())
        .map_err(|why| Error::Unsurvived { path: Path::to_owned(first), why: Box::new(why) })?;
    memory.keep();
    Ok(())
}
