//! Why a reply cannot be held to a schema, in sentences that say what to do. The library's own speak of grammars and of
//! options that nobody here can set.

use super::schema;

/// Why a constraint cannot be made, or not be followed to the end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConstraintError {
    /// The schema is no JSON.
    #[error("the schema is not JSON: {0}")]
    NotJson(String),
    /// It is JSON, and no schema.
    #[error("a schema is an object, or true or false")]
    NotASchema,
    /// It is larger than what is compiled for anybody.
    #[error("the schema has more than {most} {what}")]
    TooLarge {
        /// Of what there is too much.
        what: &'static str,
        /// The most there may be.
        most: usize,
    },
    /// It says what is not enforced, and so is not taken.
    #[error("{0}")]
    Unsupported(String),
    /// There is no document that is valid by it.
    #[error("nothing can be valid by the schema: {0}")]
    Unsatisfiable(String),
    /// It is small and takes too long.
    #[error("the schema is too complex: {0}")]
    TooComplex(String),
    /// As many schemas as may be are being compiled.
    #[error("other schemas are being compiled")]
    Busy,
    /// A grammar that is none.
    #[error("the grammar cannot be followed: {0}")]
    Grammar(String),
    /// The vocabulary cannot be held to a grammar.
    #[error("replies of this model cannot be constrained: {0}")]
    Vocabulary(&'static str),
    /// In the middle of a reply no token of the vocabulary may follow.
    #[error("no token of this model's vocabulary continues the reply as the schema wants it")]
    NothingFollows,
}

impl ConstraintError {
    /// What to do about it, where there is more to say than the error itself does.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            ConstraintError::NotASchema | ConstraintError::NotJson(_) => {
                Some("as {\"type\": \"object\", \"properties\": {\"name\": {\"type\": \"string\"}}}")
            }
            ConstraintError::TooLarge { .. } | ConstraintError::TooComplex(_) => {
                Some("take a simpler schema")
            }
            ConstraintError::Unsupported(_) => {
                Some("leave it out, and check the answer for it: what is taken is enforced")
            }
            ConstraintError::Busy => Some("try again"),
            ConstraintError::Grammar(_) => {
                Some("GBNF begins with the rule root, as: root ::= \"yes\" | \"no\"")
            }
            ConstraintError::Unsatisfiable(_)
            | ConstraintError::Vocabulary(_)
            | ConstraintError::NothingFollows => None,
        }
    }

    /// Whether what was asked for is wrong.
    pub fn is_misuse(&self) -> bool {
        !matches!(self, ConstraintError::Busy | ConstraintError::NothingFollows)
    }
}

/// What went wrong while `schema` was compiled.
pub(super) fn while_compiling(chain: &str, schema: &serde_json::Value) -> ConstraintError {
    let text = told(chain);
    if let Some(keywords) = text.strip_prefix("Unimplemented keys: ") {
        let keywords: Vec<String> = serde_json::from_str(keywords).unwrap_or_default();
        return ConstraintError::Unsupported(schema::not_supported(&keywords, schema));
    }
    if chain.contains("oneOf constraints are not supported") {
        return ConstraintError::Unsupported(
            "\"oneOf\" is supported where no two alternatives can both be valid; \"anyOf\" is always"
                .to_owned(),
        );
    }
    if chain.contains("nsatisfiable") || chain.contains("No options in") {
        let why = chain.rsplit("nsatisfiable schema: ").next().unwrap_or(&text);
        return ConstraintError::Unsatisfiable(short(why));
    }
    if ["fuel", "too large", "too many", "too complex", "stack level", "limit"]
        .iter()
        .any(|word| chain.contains(word))
    {
        return ConstraintError::TooComplex(text);
    }
    ConstraintError::Unsupported(text)
}

/// What went wrong in the middle of a reply.
pub(super) fn while_running(text: &str) -> ConstraintError {
    match text.starts_with("NoExtension") {
        true => ConstraintError::NothingFollows,
        false => ConstraintError::TooComplex(told(text)),
    }
}

/// A sentence of the library's: of a pattern's parser the one that says why, of a bug in it no more than that.
fn told(text: &str) -> String {
    if text.contains("panic: ") {
        return "the library that enforces schemas cannot read this one".to_owned();
    }
    if text.contains("regex parse error")
        && let Some(why) = text.lines().rev().find_map(|line| line.strip_prefix("error: "))
    {
        return format!("a pattern cannot be read: {why}");
    }
    short(text.trim_end_matches("\n<non-verbose/>"))
}

/// On one line, and no longer than one reads.
fn short(text: &str) -> String {
    let mut line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = line.char_indices().nth(MOST_CHARS) {
        line.truncate(end);
        line.push_str("...");
    }
    line
}

const MOST_CHARS: usize = 240;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_library_says_becomes_a_sentence_for_whoever_wrote_the_schema() {
        let schema = json!({"items": {"contains": {}}});
        let of = |text: &str| while_compiling(text, &schema);
        let unsupported = of("Unimplemented keys: [\"contains\"]");
        assert_eq!(unsupported.to_string(), "\"contains\" is not supported (in #/items)");
        assert!(
            of("oneOf constraints are not supported. Enable 'coerce_one_of'").to_string().contains("anyOf")
        );
        let nothing = of("x: Unsatisfiable schema: minItems (2) is greater than maxItems (1)");
        assert!(
            matches!(&nothing, ConstraintError::Unsatisfiable(why) if why.starts_with("minItems")),
            "{nothing}"
        );
        let pattern = of("regex parse error:\n    (?=a)\n    ^^^\nerror: look-around is not supported");
        assert_eq!(pattern.to_string(), "a pattern cannot be read: look-around is not supported");
        assert!(matches!(of("schema too large"), ConstraintError::TooComplex(_)));
        let bug = of("panic: index out of bounds\n<backtrace>\n0: secrets\n</backtrace>").to_string();
        assert!(bug.contains("cannot read") && !bug.contains("backtrace"), "{bug}");
        let long = of(&format!("Invalid type: {}\n<non-verbose/>", "é".repeat(5_000))).to_string();
        assert!(long.chars().count() < 250 && long.ends_with("é..."), "{long}");
        assert_eq!(while_running("NoExtensionBias\n<non-verbose/>"), ConstraintError::NothingFollows);
        let deep = while_running("Parser Error: Current row has 9 items; max is 8\n<non-verbose/>");
        assert_eq!(
            deep.to_string(),
            "the schema is too complex: Parser Error: Current row has 9 items; max is 8"
        );
    }
}
