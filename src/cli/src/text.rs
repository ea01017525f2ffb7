//! Texts that options name by their files.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Why there is no text.
#[derive(Debug)]
pub enum NoText {
    /// It cannot be read.
    Unreadable(io::Error),
    /// It is what a text is not: longer than this may be, or no UTF-8.
    Is(String),
}

impl std::fmt::Display for NoText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NoText::Unreadable(e) => e.fmt(f),
            NoText::Is(what) => f.write_str(what),
        }
    }
}

/// The text in `file`, which may be a pipe. More than `most_mib` is read of nothing.
///
/// # Errors
/// It cannot be read, is longer, or is no UTF-8.
pub fn read(file: &Path, most_mib: u64) -> Result<String, NoText> {
    File::open(file).map_err(NoText::Unreadable).and_then(|file| read_from(file, most_mib))
}

/// The same of what is open already.
///
/// # Errors
/// As of [`read`].
pub fn read_from(from: impl Read, most_mib: u64) -> Result<String, NoText> {
    let (mut bytes, most) = (Vec::new(), most_mib << 20);
    from.take(most + 1).read_to_end(&mut bytes).map_err(NoText::Unreadable)?;
    if bytes.len() as u64 > most {
        return Err(NoText::Is(format!("longer than {most_mib} MiB")));
    }
    let not_text = |e: std::string::FromUtf8Error| {
        NoText::Is(format!("not UTF-8 at byte {}", e.utf8_error().valid_up_to()))
    };
    String::from_utf8(bytes).map_err(not_text)
}
