//! Texts for people: what a file says, made safe to show, and sizes.

use std::fmt;

/// Text out of a file, made safe to show on one line of a terminal: what a terminal obeys and what changes the
/// order of other text is escaped, and after [`MAX_SHOWN`] characters it is cut.
///
/// Everything of a file's text that reaches a person goes through this.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a>(pub &'a str);

/// Characters of a file's text that are shown.
pub const MAX_SHOWN: usize = 80;

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, c) in self.0.chars().enumerate() {
            if i == MAX_SHOWN {
                return f.write_str("...");
            }
            write_safe(c, f)?;
        }
        Ok(())
    }
}

/// A message that may hold text out of a file or from llama.cpp, made safe in the same way, and not cut.
#[derive(Clone, Copy, Debug)]
pub struct Safe<'a>(pub &'a str);

impl fmt::Display for Safe<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| write_safe(c, f))
    }
}

/// Whether a character says something to a terminal, or about text beside it, instead of being shown: control
/// characters, line separators, and those that change the direction of text.
pub(crate) fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}' | '\u{2029}' | '\u{061c}')
        || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The character, or what it is called where it [`is_hidden`].
pub(crate) fn write_safe(c: char, f: &mut impl fmt::Write) -> fmt::Result {
    if is_hidden(c) { write!(f, "{}", c.escape_default()) } else { f.write_char(c) }
}

/// `9.3 GiB`, as people read sizes.
pub fn gib(bytes: u64) -> String {
    const GIB: f64 = (1u64 << 30) as f64;
    const MIB: f64 = (1u64 << 20) as f64;
    match bytes as f64 {
        b if b >= 0.1 * GIB => format!("{:.1} GiB", b / GIB),
        b => format!("{:.1} MiB", b / MIB),
    }
}

/// Bytes that should be text, safe to show.
pub(crate) fn shown_bytes(bytes: &[u8]) -> String {
    Shown(&String::from_utf8_lossy(bytes)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_a_terminal_obeys_passes() {
        let text = "a\u{1b}[2Jb\u{202e}c\nd\u{9b}e\u{7}";
        assert_eq!(Shown(text).to_string(), "a\\u{1b}[2Jb\\u{202e}c\\nd\\u{9b}e\\u{7}");
        assert_eq!(Safe(text).to_string(), Shown(text).to_string());
        assert_eq!(Safe(&"x".repeat(81)).to_string(), "x".repeat(81));
        assert_eq!(Shown("Zoë's 電話 📱").to_string(), "Zoë's 電話 📱");
        assert_eq!(Shown(&"x".repeat(81)).to_string(), format!("{}...", "x".repeat(80)));
    }

    #[test]
    fn sizes_have_one_digit_behind_the_point() {
        assert_eq!((gib(1 << 20), gib(10 << 30)), ("1.0 MiB".into(), "10.0 GiB".into()));
    }
}
