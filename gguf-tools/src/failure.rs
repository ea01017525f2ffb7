//! How a program of this project ends when it cannot go on: one `error:` line, one `hint:` line, an exit code.

use std::{
    borrow::Cow,
    fmt::{self, Write as _},
    io,
    process::ExitCode,
};

use crate::text;

/// An error that knows more than its sentence: the way out, and whose doing it was. Its `Display` is what went wrong,
/// without the way out.
pub trait Explained: std::error::Error {
    /// What to do about it, where that is known.
    fn hint(&self) -> Option<Cow<'static, str>>;

    /// Whether the request or the file is at fault, and not what happened while it was carried out.
    fn is_misuse(&self) -> bool;
}

/// What went wrong, what to do about it, and whose doing it was.
#[derive(Debug)]
pub struct Failure {
    message: String,
    hint: Option<String>,
    code: u8,
}

/// Exit code of a [`Failure::failed`].
const FAILED: u8 = 1;
/// Exit code of a [`Failure::misuse`].
const MISUSE: u8 = 2;

impl Failure {
    /// Wrong arguments or a file that cannot be used: exit code 2.
    pub fn misuse(message: impl fmt::Display) -> Failure {
        Failure { message: message.to_string(), hint: None, code: MISUSE }
    }

    /// Something that failed on the way: exit code 1.
    pub fn failed(message: impl fmt::Display) -> Failure {
        Failure { message: message.to_string(), hint: None, code: FAILED }
    }

    /// Nobody reads what the program writes: it ends as `head` wants it to, without a word and with exit code 0.
    pub fn unread() -> Failure {
        Failure { message: String::new(), hint: None, code: 0 }
    }

    /// Whether nobody reads any more, and nothing else is wrong.
    pub fn is_unread(&self) -> bool {
        self.message.is_empty()
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

    /// Writes the lines, without what a terminal would obey: messages hold texts of files and peers.
    ///
    /// # Errors
    /// Writing fails.
    pub fn write_to(&self, out: &mut impl io::Write) -> io::Result<()> {
        if self.message.is_empty() {
            return Ok(());
        }
        let mut lines = String::new();
        write_line(&mut lines, "error", &self.message);
        if let Some(hint) = &self.hint {
            write_line(&mut lines, "hint", hint);
        }
        out.write_all(lines.as_bytes())
    }

    /// Writes the lines to standard error, and gives the exit code. A closed standard error changes nothing.
    pub fn report(&self) -> ExitCode {
        let _ = self.write_to(&mut io::stderr().lock());
        ExitCode::from(self.code)
    }
}

fn write_line(lines: &mut String, what: &str, text: &str) {
    // writing to a String does not fail
    let _ = write!(lines, "{what}: ");
    for c in text.chars() {
        let _ = if c == '\n' { lines.write_char(c) } else { text::write_safe(c, lines) };
    }
    lines.push('\n');
}

impl<E: Explained> From<E> for Failure {
    fn from(error: E) -> Failure {
        let failure = if error.is_misuse() { Failure::misuse(&error) } else { Failure::failed(&error) };
        match error.hint() {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the disk is full")]
    struct Full;

    impl Explained for Full {
        fn hint(&self) -> Option<Cow<'static, str>> {
            Some("free some space".into())
        }

        fn is_misuse(&self) -> bool {
            false
        }
    }

    fn lines(failure: &Failure) -> String {
        let mut out = Vec::new();
        failure.write_to(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_way_out_is_the_error_s_own() {
        let failure = Failure::from(Full);
        assert_eq!(lines(&failure), "error: the disk is full\nhint: free some space\n");
        assert_eq!(failure.code, FAILED);
        // a semicolon is a semicolon
        assert_eq!(lines(&Failure::misuse("need 2; have 1")), "error: need 2; have 1\n");
    }

    #[test]
    fn nothing_in_a_message_moves_the_cursor() {
        let failure = Failure::failed("no \u{1b}[2Jmodel").hint("\u{9b}31mrun\tit");
        assert_eq!(lines(&failure), "error: no \\u{1b}[2Jmodel\nhint: \\u{9b}31mrun\\tit\n");
    }
}
