//! Bytes of tokens to text that can be shown as it comes: a character that is not complete yet is held back.

/// Turns the bytes of one token after the other into text. A token can end in the middle of a UTF-8
/// character; what is not complete waits for the next token, what can never be completed becomes U+FFFD.
#[derive(Debug, Default)]
pub struct TextStream {
    /// an incomplete character: at most 3 bytes
    held: Vec<u8>,
}

impl TextStream {
    /// Adds a token's bytes and returns what can be shown now.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = self.held.as_slice();
        let keep = loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    break 0;
                }
                Err(e) => {
                    let (valid, after) = rest.split_at(e.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    match e.error_len() {
                        None => break after.len(),
                        Some(n) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &after[n..];
                        }
                    }
                }
            }
        };
        self.held.drain(..self.held.len() - keep);
        text
    }

    /// The end of the stream: a character left incomplete becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = if self.held.is_empty() { "" } else { "\u{fffd}" };
        self.held.clear();
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_character_split_over_tokens_is_shown_whole() {
        let mut s = TextStream::default();
        let euro = "€".as_bytes();
        assert_eq!(s.push(&[b'a', euro[0]]), "a");
        assert_eq!(s.push(&[euro[1]]), "");
        assert_eq!(s.push(&[euro[2], b'b']), "€b");
        assert_eq!(s.finish(), "");
    }

    #[test]
    fn bytes_that_are_no_text_become_replacement_characters() {
        let mut s = TextStream::default();
        assert_eq!(s.push(&[0xff, b'x', 0xe2]), "\u{fffd}x");
        assert_eq!(s.push(b"y"), "\u{fffd}y");
        assert_eq!(s.push(&[0xf0, 0x9f]), "");
        assert_eq!(s.finish(), "\u{fffd}");
    }

    proptest! {
        #[test]
        fn valid_text_comes_out_as_it_went_in_however_it_is_split(text in ".{0,40}", cuts in proptest::collection::vec(0usize..160, 0..8)) {
            let bytes = text.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut s = TextStream::default();
            let mut out = String::new();
            for w in cuts.windows(2) { out.push_str(&s.push(&bytes[w[0]..w[1]])); }
            out.push_str(&s.finish());
            prop_assert_eq!(out, text);
        }

        #[test]
        fn any_bytes_come_out_as_lossy_utf8(bytes in proptest::collection::vec(any::<u8>(), 0..60), cut in 0usize..60) {
            let cut = cut.min(bytes.len());
            let mut s = TextStream::default();
            let out = s.push(&bytes[..cut]) + &s.push(&bytes[cut..]) + &s.finish();
            prop_assert_eq!(out, String::from_utf8_lossy(&bytes));
        }
    }
}
