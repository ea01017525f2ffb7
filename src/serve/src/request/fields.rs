//! Fields that come in more than one shape. Each is read by a visitor, so that an error says which shapes there are and
//! where the wrong one stands; nothing is held in between.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// A text, or a list of something.
#[derive(Debug)]
pub(super) enum TextOr<T> {
    Text(String),
    List(Vec<T>),
}

/// What there can be a list of.
pub(super) trait Listed {
    /// What a text or a list of them is called.
    const EXPECTED: &'static str;
}

impl<'de, T: Listed + Deserialize<'de>> Deserialize<'de> for TextOr<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<TextOr<T>, D::Error> {
        struct Either<T>(PhantomData<T>);
        impl<'de, T: Listed + Deserialize<'de>> Visitor<'de> for Either<T> {
            type Value = TextOr<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(T::EXPECTED)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<TextOr<T>, E> {
                Ok(TextOr::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<TextOr<T>, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(seq)).map(TextOr::List)
            }
        }
        deserializer.deserialize_any(Either(PhantomData))
    }
}

impl Listed for String {
    const EXPECTED: &'static str = "a string or a list of strings";
}

/// A text, or a list of them.
#[derive(Debug)]
pub(super) struct OneOrMany(pub(super) Vec<String>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<OneOrMany, D::Error> {
        Ok(OneOrMany(match TextOr::deserialize(deserializer)? {
            TextOr::Text(text) => vec![text],
            TextOr::List(texts) => texts,
        }))
    }
}

/// What a message says: a string, a list of parts, or nothing.
#[derive(Debug, Default)]
pub(super) struct Content(Vec<String>);

impl Content {
    /// One text, with `between` between the parts.
    pub(super) fn joined(mut self, between: &str) -> String {
        match self.0.len() {
            0 | 1 => self.0.pop().unwrap_or_default(),
            _ => self.0.join(between),
        }
    }
}

/// A part of a message; of the kinds that there are, text is the one that a text model reads.
struct Part(String);

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Content, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of parts")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content(vec![text.to_owned()]))
            }

            fn visit_unit<E: Error>(self) -> Result<Content, E> {
                Ok(Content::default())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
                let mut parts = Vec::new();
                while let Some(Part(part)) = seq.next_element()? {
                    parts.push(part);
                }
                Ok(Content(parts))
            }
        }
        deserializer.deserialize_any(Text)
    }
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Part, D::Error> {
        struct OfText;
        impl<'de> Visitor<'de> for OfText {
            type Value = Part;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a part: {\"type\": \"text\", \"text\": ...}")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Part, A::Error> {
                let (mut kind, mut text) = (None::<String>, None::<String>);
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "type" => kind = Some(map.next_value()?),
                        "text" => text = Some(map.next_value()?),
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                match (kind.as_deref(), text) {
                    (
                        Some("text" | "input_text" | "output_text" | "refusal" | "reasoning_text"),
                        Some(text),
                    ) => Ok(Part(text)),
                    (Some("text"), None) => Err(A::Error::missing_field("text")),
                    (Some(other), _) => Err(A::Error::custom(format_args!(
                        "parts of type {other:?} are not supported: this is a text model"
                    ))),
                    (None, _) => Err(A::Error::missing_field("type")),
                }
            }
        }
        deserializer.deserialize_map(OfText)
    }
}

/// The prompts of a completion: a string, a list of them, a list of tokens, or a list of such lists.
#[derive(Debug)]
pub(super) struct PromptField(pub(super) Vec<super::Prompt>);

/// An element of a list of prompts.
enum Element {
    Text(String),
    Token(i32),
    Tokens(Vec<i32>),
}

impl<'de> Deserialize<'de> for PromptField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PromptField, D::Error> {
        struct Prompts;
        impl<'de> Visitor<'de> for Prompts {
            type Value = PromptField;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a list of strings, a list of tokens or a list of lists of tokens")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<PromptField, E> {
                Ok(PromptField(vec![super::Prompt::Text(text.to_owned())]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<PromptField, A::Error> {
                let mut prompts = Vec::new();
                let mut tokens = Vec::new();
                while let Some(element) = seq.next_element()? {
                    match element {
                        Element::Token(token) if prompts.is_empty() => tokens.push(token),
                        Element::Text(text) if tokens.is_empty() => prompts.push(super::Prompt::Text(text)),
                        Element::Tokens(list) if tokens.is_empty() => {
                            prompts.push(super::Prompt::Tokens(list))
                        }
                        _ => return Err(A::Error::custom("tokens beside other prompts")),
                    }
                    if prompts.len() > super::MAX_CHOICES {
                        return Err(A::Error::custom(format_args!(
                            "more than {} prompts",
                            super::MAX_CHOICES
                        )));
                    }
                }
                if !tokens.is_empty() {
                    prompts.push(super::Prompt::Tokens(tokens));
                }
                Ok(PromptField(prompts))
            }
        }
        deserializer.deserialize_any(Prompts)
    }
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Element, D::Error> {
        struct One;
        impl<'de> Visitor<'de> for One {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token's number or a list of tokens")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Text(text.to_owned()))
            }

            fn visit_u64<E: Error>(self, n: u64) -> Result<Element, E> {
                i32::try_from(n).map(Element::Token).map_err(|_| E::custom(format_args!("{n} is no token")))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Element, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(seq)).map(Element::Tokens)
            }
        }
        deserializer.deserialize_any(One)
    }
}

/// Whether log probabilities are told, as chats say it, or of how many tokens, as completions do.
#[derive(Clone, Copy, Debug)]
pub(super) enum LogprobsField {
    Told(bool),
    Of(u64),
}

impl<'de> Deserialize<'de> for LogprobsField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<LogprobsField, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = LogprobsField;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false or, for completions, a number of tokens")
            }

            fn visit_bool<E: Error>(self, told: bool) -> Result<LogprobsField, E> {
                Ok(LogprobsField::Told(told))
            }

            fn visit_u64<E: Error>(self, n: u64) -> Result<LogprobsField, E> {
                Ok(LogprobsField::Of(n))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// Which tool is to be called: a word, or an object that names one.
#[derive(Debug)]
pub(super) enum ToolChoice {
    Word(String),
    Object(NamedChoice),
}

/// As the dialects say it.
#[derive(Debug, serde::Deserialize)]
#[serde(expecting = "an object with a type")]
pub(super) struct NamedChoice {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    /// of chats
    pub(super) function: Option<Named>,
    /// of the other two
    pub(super) name: Option<String>,
    pub(super) disable_parallel_tool_use: Option<bool>,
}

/// A function by its name.
#[derive(Debug, serde::Deserialize)]
pub(super) struct Named {
    pub(super) name: String,
}

impl<'de> Deserialize<'de> for ToolChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ToolChoice, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = ToolChoice;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an object that names a tool")
            }

            fn visit_str<E: Error>(self, word: &str) -> Result<ToolChoice, E> {
                Ok(ToolChoice::Word(word.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ToolChoice, A::Error> {
                NamedChoice::deserialize(MapAccessDeserializer::new(map)).map(ToolChoice::Object)
            }
        }
        deserializer.deserialize_any(Either)
    }
}
