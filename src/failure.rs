//! How a program of this project ends when it cannot go on: one `error:` line, one `hint:` line, an exit code.

use std::fmt;

/// What went wrong, what to do about it, and whose doing it was.
#[derive(Debug)]
pub struct Failure {
    message: String,
    hint: Option<String>,
    code: u8,
}

impl Failure {
    /// Wrong arguments or a file that cannot be used: exit code 2.
    pub fn misuse(message: impl fmt::Display) -> Failure {
        Failure { message: message.to_string(), hint: None, code: 2 }
    }

    /// Something that failed on the way: exit code 1.
    pub fn failed(message: impl fmt::Display) -> Failure {
        Failure { message: message.to_string(), hint: None, code: 1 }
    }

    /// Adds what to do about it.
    pub fn hint(mut self, hint: impl fmt::Display) -> Failure {
        self.hint = Some(hint.to_string());
        self
    }

    /// The sentence without `error:`.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Prints the lines to stderr and gives the exit code.
    pub fn report(&self) -> std::process::ExitCode {
        eprintln!("error: {}", self.message);
        if let Some(hint) = &self.hint {
            eprintln!("hint: {hint}");
        }
        std::process::ExitCode::from(self.code)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}
