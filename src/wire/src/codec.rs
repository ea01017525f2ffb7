//! One bounded reader for untrusted bytes, and the writer that mirrors it.
//!
//! Nothing here allocates by a length that a peer gave, and a reader must be [finished](Reader::finish):
//! bytes left over are an error, as missing ones are.

#![deny(clippy::cast_possible_truncation)]

/// Bytes that are no message of this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A field reaches past the end of the message.
    #[error("the message ends {missing} bytes too early")]
    Truncated {
        /// How many bytes the field that was being read lacks.
        missing: usize,
    },
    /// The message goes on after its last field.
    #[error("{extra} bytes are left over behind the message's last field")]
    TrailingBytes {
        /// How many.
        extra: usize,
    },
    /// No message has this number.
    #[error("no message has the number {kind:#04x}")]
    UnknownKind {
        /// The number.
        kind: u8,
    },
    /// A byte that has no meaning yet is not zero.
    #[error("a reserved byte is not zero")]
    ReservedNotZero,
    /// A string is not UTF-8.
    #[error("a text is not UTF-8")]
    NotUtf8,
    /// A string is longer than its field allows.
    #[error("a text is {length} bytes long, {max} are allowed")]
    StringTooLong {
        /// Its length.
        length: usize,
        /// The field's limit.
        max: usize,
    },
    /// A field holds a number that its table does not have.
    #[error("{field} is {value}, which means nothing")]
    BadValue {
        /// The field's name.
        field: &'static str,
        /// What it held.
        value: u64,
    },
}

impl Malformed {
    /// The rule's name in PROTOCOL.md.
    pub fn rule(&self) -> &'static str {
        match self {
            Malformed::Truncated { .. } => "truncated",
            Malformed::TrailingBytes { .. } => "trailing-bytes",
            Malformed::UnknownKind { .. } => "unknown-kind",
            Malformed::ReservedNotZero => "reserved-not-zero",
            Malformed::NotUtf8 => "not-utf8",
            Malformed::StringTooLong { .. } => "string-too-long",
            Malformed::BadValue { .. } => "bad-value",
        }
    }
}

/// Reads little-endian fields off the front of a slice.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// A reader over all of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { rest: bytes }
    }

    /// The next `n` bytes.
    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        let missing = Malformed::Truncated { missing: n.saturating_sub(self.rest.len()) };
        let (head, tail) = self.rest.split_at_checked(n).ok_or(missing)?;
        self.rest = tail;
        Ok(head)
    }

    /// The next `N` bytes, by value.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let missing = Malformed::Truncated { missing: N.saturating_sub(self.rest.len()) };
        let (head, tail) = self.rest.split_first_chunk::<N>().ok_or(missing)?;
        self.rest = tail;
        Ok(*head)
    }

    /// The next byte.
    pub fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// The next `n` bytes, which are reserved.
    pub fn zeros(&mut self, n: usize) -> Result<(), Malformed> {
        match self.bytes(n)?.iter().all(|&b| b == 0) {
            true => Ok(()),
            false => Err(Malformed::ReservedNotZero),
        }
    }

    /// A string of at most `max` bytes, made safe to show: see [`printable`].
    pub fn string(&mut self, max: usize) -> Result<String, Malformed> {
        let length = usize::from(self.u16()?);
        if length > max {
            return Err(Malformed::StringTooLong { length, max });
        }
        let text = std::str::from_utf8(self.bytes(length)?).map_err(|_| Malformed::NotUtf8)?;
        Ok(printable(text))
    }

    /// How many bytes are left.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// All bytes must have been read.
    pub fn finish(self) -> Result<(), Malformed> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(Malformed::TrailingBytes { extra }),
        }
    }
}

/// Appends little-endian fields to a vector.
#[derive(Debug)]
pub struct Writer<'a> {
    out: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    /// A writer that appends to `out`.
    pub fn new(out: &'a mut Vec<u8>) -> Writer<'a> {
        Writer { out }
    }

    /// Appends bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.out.extend_from_slice(bytes);
        self
    }

    /// Appends one byte.
    pub fn u8(&mut self, v: u8) -> &mut Self {
        self.bytes(&[v])
    }

    /// Appends two bytes.
    pub fn u16(&mut self, v: u16) -> &mut Self {
        self.bytes(&v.to_le_bytes())
    }

    /// Appends four bytes.
    pub fn u32(&mut self, v: u32) -> &mut Self {
        self.bytes(&v.to_le_bytes())
    }

    /// Appends eight bytes.
    pub fn u64(&mut self, v: u64) -> &mut Self {
        self.bytes(&v.to_le_bytes())
    }

    /// Appends `n` reserved bytes.
    pub fn zeros(&mut self, n: usize) -> &mut Self {
        self.out.resize(self.out.len() + n, 0);
        self
    }

    /// Appends a string, cut to at most `max` bytes at a character's boundary.
    pub fn string(&mut self, text: &str, max: usize) -> &mut Self {
        let cut = &text[..text.floor_char_boundary_compat(max)];
        // a text longer than any field's limit is left out rather than given a wrong length
        let (length, cut) = u16::try_from(cut.len()).map_or((0, ""), |length| (length, cut));
        self.u16(length).bytes(cut.as_bytes())
    }
}

/// A peer's text with everything that could change how other text is shown replaced by U+FFFD: control
/// characters (a terminal obeys them), bidirectional controls and line separators. Bytes may grow, characters
/// do not.
pub fn printable(text: &str) -> String {
    let unsafe_to_show = |c: char| {
        c.is_control()
            || matches!(c, '\u{200E}' | '\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}')
            || matches!(c, '\u{2028}' | '\u{2029}')
    };
    text.chars().map(|c| if unsafe_to_show(c) { '\u{FFFD}' } else { c }).collect()
}

/// `str::floor_char_boundary`, which is newer than this project's minimum Rust.
trait FloorCharBoundary {
    fn floor_char_boundary_compat(&self, index: usize) -> usize;
}

impl FloorCharBoundary for str {
    fn floor_char_boundary_compat(&self, index: usize) -> usize {
        (0..=index.min(self.len())).rev().find(|&i| self.is_char_boundary(i)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
