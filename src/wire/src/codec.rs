//! One bounded reader for untrusted bytes, and the writer that mirrors it.
//!
//! Nothing here allocates by a length that a peer gave, and a reader must be [finished](Reader::finish):
//! bytes left over are an error, as missing ones are.

use super::error::Malformed;

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
        let cut = &text[..text.floor_char_boundary_compat(max.min(usize::from(u16::MAX)))];
        self.u16(cut.len() as u16).bytes(cut.as_bytes())
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
mod tests {
    use super::*;

    #[test]
    fn reads_what_was_written() {
        let mut bytes = Vec::new();
        Writer::new(&mut bytes).u8(1).u16(0x0203).u32(0x04050607).u64(8).zeros(3).string("grüße", 64);
        let mut r = Reader::new(&bytes);
        assert_eq!((r.u8(), r.u16(), r.u32(), r.u64()), (Ok(1), Ok(0x0203), Ok(0x04050607), Ok(8)));
        r.zeros(3).unwrap();
        assert_eq!(r.string(64).unwrap(), "grüße");
        r.finish().unwrap();
    }

    #[test]
    fn refuses_missing_left_over_and_reserved_bytes() {
        assert_eq!(Reader::new(&[1, 2, 3]).u32(), Err(Malformed::Truncated { missing: 1 }));
        assert_eq!(
            Reader::new(&[1]).bytes(usize::MAX),
            Err(Malformed::Truncated { missing: usize::MAX - 1 })
        );
        assert_eq!(Reader::new(&[1]).finish(), Err(Malformed::TrailingBytes { extra: 1 }));
        assert_eq!(Reader::new(&[0, 1]).zeros(2), Err(Malformed::ReservedNotZero));
    }

    #[test]
    fn refuses_strings_too_long_or_not_utf8_before_reading_them() {
        assert_eq!(
            Reader::new(&[0xFF, 0xFF]).string(64),
            Err(Malformed::StringTooLong { length: 65535, max: 64 })
        );
        assert_eq!(Reader::new(&[2, 0, 0xC3, 0x28]).string(64), Err(Malformed::NotUtf8));
    }

    #[test]
    fn a_peers_name_cannot_move_the_cursor_or_turn_the_text_around() {
        assert_eq!(printable("a\u{1b}[2Jb\u{202e}c\nd\u{9b}e"), "a\u{FFFD}[2Jb\u{FFFD}c\u{FFFD}d\u{FFFD}e");
        assert_eq!(printable("Zoë's 電話 📱"), "Zoë's 電話 📱");
    }

    #[test]
    fn a_name_too_long_is_cut_at_a_character() {
        let mut bytes = Vec::new();
        Writer::new(&mut bytes).string("äää", 5);
        assert_eq!(bytes, [4, 0, 0xC3, 0xA4, 0xC3, 0xA4]);
    }
}
