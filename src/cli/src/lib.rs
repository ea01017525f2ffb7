//! The command line of DIM: arguments in, exit code out. Everything that is printed is printed here.
#![forbid(unsafe_code)]

pub mod args;
pub mod commands;
pub mod constraint;
pub mod fetch;
pub mod habits;
mod hints;
pub mod interrupt;
pub mod progress;
pub mod prompt;
pub mod shown;
pub mod template;
pub mod text;
pub mod type_ahead;

use std::process::ExitCode;

use dim::Error;
use dim::host::template::room;
use gguf_tools::apart;
use gguf_tools::failure::Failure;

/// The first thing that a program does which loads files: from then on it tries those that llama.cpp has not seen, and reads
/// chat templates, in a process of its own, which is this program again. The exit code, if this is that process.
pub fn tries_files_apart() -> Option<ExitCode> {
    match std::env::args_os().nth(1) {
        Some(argument) if argument == apart::ARGUMENT => return Some(apart::serve()),
        Some(argument) if argument == room::ARGUMENT => return Some(room::serve()),
        _ => {}
    }
    if let Ok(program) = std::env::current_exe() {
        dim::stage::trial::with(program);
    }
    None
}

/// The library's error as a program ends with it: exit code 2 where an argument or a file is wrong, else 1.
pub fn explain(error: impl Into<Error>) -> Failure {
    let error = error.into();
    let message = match &error {
        Error::Option(e) => format!("--{} {}: must be {}", hints::option(e.option), e.value, e.rule),
        Error::Address(e) => format!("--worker {e}"),
        other => other.to_string(),
    };
    ended_by(message, error.is_misuse(), hints::hint(&error))
}

/// An error of a library, by its parts, as a program ends with it.
fn ended_by(message: String, is_misuse: bool, hint: Option<String>) -> Failure {
    let failure = if is_misuse { Failure::misuse(message) } else { Failure::failed(message) };
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}
