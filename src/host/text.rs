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

/// Texts at which a reply ends, wherever tokens have their borders. What may be the beginning of one is held back until
/// it is clear.
#[derive(Debug, Default)]
pub struct StopTexts {
    stops: Vec<String>,
    /// shown later, or never
    held: String,
    /// the one that came, by its place in `stops`
    found: Option<usize>,
}

impl StopTexts {
    /// Empty ones are left out: every text contains them.
    pub fn new(stops: impl IntoIterator<Item = String>) -> StopTexts {
        let stops = stops.into_iter().filter(|s| !s.is_empty()).collect();
        StopTexts { stops, ..StopTexts::default() }
    }

    /// Adds text. What can be shown now, and whether the reply ends there: before the stop text, which is not shown.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        if self.stops.is_empty() {
            return (text.to_owned(), false);
        }
        self.held.push_str(text);
        let places = self.stops.iter().enumerate();
        let found = places.filter_map(|(i, stop)| self.held.find(stop.as_str()).map(|at| (at, i))).min();
        if let Some((at, i)) = found {
            self.found = Some(i);
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let begins = |from: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*from..]));
        let keep = self.held.char_indices().map(|(i, _)| i).find(begins).unwrap_or(self.held.len());
        let later = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, later), false)
    }

    /// The one that ended the reply.
    pub fn found(&self) -> Option<&str> {
        self.found.map(|i| self.stops[i].as_str())
    }

    /// The end of the stream: what was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_stop_text_ends_the_reply_across_the_borders_of_tokens() {
        let mut s = StopTexts::new(["User:".to_owned(), "\n\n".to_owned(), String::new()]);
        assert_eq!(s.push("Hi \nU"), ("Hi \n".to_owned(), false));
        assert_eq!(s.push("se"), (String::new(), false));
        assert_eq!(s.push("d it. \n"), ("Used it. ".to_owned(), false));
        assert_eq!(s.push("\nmore"), (String::new(), true));
        let mut s = StopTexts::new(["User:".to_owned()]);
        assert_eq!(s.push("aUser"), ("a".to_owned(), false));
        assert_eq!(s.finish(), "User");
        assert_eq!(s.push("éUsUser:x"), ("éUs".to_owned(), true));
    }

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
