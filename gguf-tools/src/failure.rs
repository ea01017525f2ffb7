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

    /// Takes what stands behind the last semicolon for the hint: where this crate's errors name the way out.
    pub fn hint_from_message(mut self) -> Failure {
        // a semicolon in a quoted name ends no sentence
        let is_sentence = |text: &str| ['"', '\''].iter().all(|&quote| text.matches(quote).count() % 2 == 0);
        if let Some((says, hint)) = self.message.rsplit_once("; ").filter(|(_, hint)| is_sentence(hint)) {
            (self.hint, self.message) = (Some(hint.to_owned()), says.to_owned());
        }
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

#[cfg(test)]
mod tests {
    use super::Failure;

    #[test]
    fn the_way_out_is_what_stands_behind_the_last_semicolon() {
        let lines = |text: &str| {
            let failure = Failure::misuse(text).hint_from_message();
            (failure.message, failure.hint)
        };
        let hint = |text: &str| Some(text.to_owned());
        assert_eq!(
            lines("need 2; have 1; free some space"),
            ("need 2; have 1".into(), hint("free some space"))
        );
        assert_eq!(lines("no way out"), ("no way out".into(), None));
        assert_eq!(lines("tensor \"a; b\" is odd"), ("tensor \"a; b\" is odd".into(), None));
        assert_eq!(
            lines("tensor 'a; b' is odd; leave it out"),
            ("tensor 'a; b' is odd".into(), hint("leave it out"))
        );
    }
}
