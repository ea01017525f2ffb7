//! A byte-level BPE tokenizer of any size, consistent in itself: every token above the 256 bytes is made by exactly
//! one merge of two earlier ones. Any text round-trips, common English takes few tokens, and what a model with
//! random weights says reads as made-up words instead of as noise.

use std::collections::HashSet;

use crate::gguf::{Array, Value};

/// The tokenizer of one model.
pub(super) struct Tokenizer {
    /// Every token's text in GPT-2's byte alphabet, ids in order.
    pub tokens: Vec<String>,
    /// `left right`, in the order of their ranks.
    pub merges: Vec<String>,
    /// llama.cpp's token types, one per token.
    pub types: Vec<i32>,
    /// Ids no model says of itself: special tokens and padding. Always one range up to the last id.
    pub special: std::ops::Range<u32>,
}

/// Names of the special tokens in the order of their ids.
const SPECIAL: [&str; 4] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"];

/// The fewest tokens there can be: the bytes and the special tokens.
pub const MIN_VOCAB: u32 = 256 + SPECIAL.len() as u32;

/// ChatML, as most models of today have it.
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
    message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\\n' }}{% endif %}";

impl Tokenizer {
    /// A vocabulary of `n_vocab` tokens, the special ones from `first_special` on (where the family has them) or
    /// the last four.
    pub(super) fn new(n_vocab: u32, first_special: Option<u32>) -> Self {
        let first_special = first_special.unwrap_or(n_vocab - SPECIAL.len() as u32);
        let mut tokens: Vec<String> = byte_letters().map(String::from).collect();
        let mut known: HashSet<String> = tokens.iter().cloned().collect();
        let mut merges = Vec::new();
        let wanted = first_special as usize;
        for (left, right) in english().chain(pseudo_words()) {
            if tokens.len() == wanted {
                break;
            }
            let token = format!("{left}{right}");
            if known.insert(token.clone()) {
                tokens.push(token);
                merges.push(format!("{left} {right}"));
            }
        }
        assert_eq!(tokens.len(), wanted, "pseudo_words() gives more than any vocabulary has");
        let mut types = vec![NORMAL; tokens.len()];
        for name in SPECIAL {
            tokens.push(name.into());
            types.push(CONTROL);
        }
        while tokens.len() < n_vocab as usize {
            tokens.push(format!("[PAD{}]", tokens.len()));
            types.push(UNUSED);
        }
        Self { tokens, merges, types, special: first_special..n_vocab }
    }

    /// The end-of-turn token's id.
    pub(super) fn eos(&self) -> u32 {
        self.special.start + 2
    }

    /// The `tokenizer.*` keys. `pre` names llama.cpp's pre-tokenizer; `add_bos` is for families that begin with one.
    pub(super) fn metadata(&self, pre: &str, add_bos: bool) -> Vec<(String, Value<'static>)> {
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let end_of_text = self.special.start;
        vec![
            (key("model"), Value::string("gpt2")),
            (key("pre"), Value::string(pre)),
            (key("tokens"), Value::Array(Array::of_strings(&self.tokens))),
            (key("token_type"), Value::Array(Array::of_i32(self.types.iter().copied()))),
            (key("merges"), Value::Array(Array::of_strings(&self.merges))),
            (key("bos_token_id"), Value::U32(end_of_text)),
            (key("eos_token_id"), Value::U32(self.eos())),
            (key("padding_token_id"), Value::U32(end_of_text + 3)),
            (key("add_bos_token"), Value::Bool(add_bos)),
            ("tokenizer.chat_template".into(), Value::string(CHAT_TEMPLATE)),
        ]
    }
}

// llama.cpp's token types
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const UNUSED: i32 = 5;

/// GPT-2's alphabet: printable bytes stand for themselves, the others for the letters from U+0100 on; ids in that
/// order.
fn byte_letters() -> impl Iterator<Item = char> {
    let printable = || (b'!'..=b'~').chain(0xa1..=0xac).chain(0xae..=0xff);
    let n_others = 256 - printable().count() as u32;
    printable().map(char::from).chain((0x100..0x100 + n_others).filter_map(char::from_u32))
}

/// Merges that make common English cheap, in an order in which both halves exist.
fn english() -> impl Iterator<Item = (String, String)> {
    const MERGES: &str = "Ġ t;h e;i n;r e;o n;a n;e r;a t;Ġ a;Ġt he;Ġ s;Ġ w;o r;n d;i s;e n;o u;Ġ c;i t;e s;Ġ b;Ġ f;\
        in g;Ġ o;Ġ p;e d;a l;Ġ m;Ġ d;Ġ in;l l;an d;Ġ h;a r;i c;Ġo f;Ġ and;Ġt o;e l;r o;a s;l e;v e;i on;Ġ l;Ġ n;\
        Ġ is;s t;en t;Ġt h;o m;Ġ re;Ġ on;Ġ e;Ġ g;c t;Ġb e;h at;a y;Ġw h;Ġ it;v er;Ġf or;Ġ y;Ġy ou;a d;u r;i l;\
        Ġt hat;Ġ he;i m;o w;o t;u s;s e;l y;Ġ st;Ġw e;u t;c e;k e;er s;it h;Ġw ith;Ġ an;at ion;Ġ as";
    MERGES.split(';').filter_map(|pair| pair.split_once(' ')).map(|(left, right)| (left.into(), right.into()))
}

/// Two-letter syllables, then words of one, two and three of them with a space before.
fn pseudo_words() -> impl Iterator<Item = (String, String)> {
    const CONSONANTS: &str = "bdfghjklmnprstvz";
    const VOWELS: &str = "aeiou";
    fn syllables() -> impl Iterator<Item = String> + Clone {
        CONSONANTS.chars().flat_map(|c| VOWELS.chars().map(move |v| format!("{c}{v}")))
    }
    let letters =
        CONSONANTS.chars().flat_map(|c| VOWELS.chars().map(move |v| (c.to_string(), v.to_string())));
    let starts = syllables().map(|s| ("Ġ".to_owned(), s));
    let two = syllables().flat_map(|a| syllables().map(move |b| (format!("Ġ{a}"), b)));
    let three = syllables()
        .flat_map(|a| syllables().map(move |b| format!("Ġ{a}{b}")))
        .flat_map(|word| syllables().map(move |c| (word.clone(), c)));
    letters.chain(starts).chain(two).chain(three)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_distinct_and_made_by_one_merge_of_earlier_ones() {
        for n_vocab in [MIN_VOCAB, 300, 512, 4096, 151_936] {
            let tokenizer = Tokenizer::new(n_vocab, (n_vocab == 151_936).then_some(151_643));
            assert_eq!(tokenizer.tokens.len(), n_vocab as usize);
            assert_eq!(tokenizer.types.len(), n_vocab as usize);
            let mut known: HashSet<&str> = HashSet::new();
            let mut merges = tokenizer.merges.iter();
            for (id, token) in tokenizer.tokens.iter().enumerate() {
                assert!(known.insert(token), "token {id} {token:?} stands twice");
                if (256..tokenizer.special.start as usize).contains(&id) {
                    let (left, right) =
                        merges.next().and_then(|m| m.split_once(' ')).expect("a merge per token");
                    assert_eq!(format!("{left}{right}"), *token);
                    assert!(
                        known.contains(left) && known.contains(right),
                        "{left} {right}: a half is missing"
                    );
                }
            }
            assert_eq!(merges.next(), None);
            assert_eq!(tokenizer.tokens[tokenizer.eos() as usize], "<|im_end|>");
        }
    }

    #[test]
    fn no_merge_of_the_english_list_is_left_out() {
        let tokenizer = Tokenizer::new(4096, None);
        for (left, right) in english() {
            assert!(tokenizer.merges.contains(&format!("{left} {right}")), "{left} {right}");
        }
    }
}
