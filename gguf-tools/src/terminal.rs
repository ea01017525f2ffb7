//! What programs say: lines to a person on standard error, results on standard output.
//!
//! Neither ever ends the process by itself. Who does not read standard error loses the lines and nothing else; a standard
//! output that is gone or full is a [`Failure`], so that nobody computes on for a reader who has left.

use std::fmt::{self, Write as _};
use std::io::{self, Write as _};

use crate::failure::Failure;
use crate::text::write_safe;

/// Writes a line to standard error, without what a terminal would obey: lines hold texts of files and peers. Newlines
/// stay. A standard error that is closed or full changes nothing.
///
/// Arguments as of `println!`.
#[macro_export]
macro_rules! tell {
    () => { $crate::terminal::tell(format_args!("\n")) };
    ($($arg:tt)*) => { $crate::terminal::tell(format_args!("{}\n", format_args!($($arg)*))) };
}

/// What [`tell!`](crate::tell) does; it writes no newline of its own.
pub fn tell(what: fmt::Arguments<'_>) {
    let _ = io::stderr().lock().write_all(safe(what).as_bytes());
}

/// Writes what moves the cursor: progress that renews itself. Only for texts of the program itself.
pub fn steer(what: fmt::Arguments<'_>) {
    let mut err = io::stderr().lock();
    let _ = err.write_fmt(what);
    let _ = err.flush();
}

/// Writes a result to standard output, at once.
///
/// # Errors
/// Nobody reads it any more ([`Failure::unread`], which ends the program in silence), or it cannot be written.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(cannot_print)
}

/// The end of a program that cannot write its results.
pub fn cannot_print(error: io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::unread(),
        _ => Failure::failed(format!("cannot write to standard output: {error}")),
    }
}

fn safe(what: fmt::Arguments<'_>) -> String {
    let mut line = String::new();
    // writing to a String does not fail
    let _ = write!(Safe(&mut line), "{what}");
    line
}

struct Safe<'a>(&'a mut String);

impl fmt::Write for Safe<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| if c == '\n' { self.0.write_char(c) } else { write_safe(c, self.0) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_a_file_s_text_moves_no_cursor() {
        assert_eq!(safe(format_args!("{} {}\n", "a\u{1b}[2J", "\rb\u{7}")), "a\\u{1b}[2J \\rb\\u{7}\n");
    }

    #[test]
    fn a_reader_who_has_left_is_no_error_to_tell_of() {
        assert!(cannot_print(io::ErrorKind::BrokenPipe.into()).message().is_empty());
        let full = cannot_print(io::ErrorKind::StorageFull.into());
        assert!(full.message().starts_with("cannot write to standard output"), "{full}");
    }
}
