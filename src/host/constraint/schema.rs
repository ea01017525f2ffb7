//! A schema's text as a value, within bounds: nothing that the library below is given nests deeply or repeats itself at
//! length. And where in a schema a keyword stands, for whoever used one that is not enforced.

use serde::Deserialize as _;
use serde_json::{Map, Value};

use super::ConstraintError;

/// `text` as a schema, if it is within the bounds.
pub(super) fn read(text: &str) -> Result<Value, ConstraintError> {
    within(text.len(), MOST_BYTES, "bytes")?;
    let mut json = serde_json::Deserializer::from_str(text);
    // it nests at most 128 deep, by serde_json's own limit
    let value = Value::deserialize(&mut json).and_then(|value| json.end().map(|()| value));
    let value = value.map_err(|e| ConstraintError::NotJson(e.to_string()))?;
    if !value.is_object() && !value.is_boolean() {
        return Err(ConstraintError::NotASchema);
    }
    let mut counts = Counts::default();
    counts.count(&value, 0)?;
    Ok(value)
}

/// Of the parts that cost more than their length.
#[derive(Default)]
struct Counts {
    values: usize,
    properties: usize,
    patterns: usize,
    pattern_bytes: usize,
    choices: usize,
}

impl Counts {
    /// Counts everything in `value`, wherever it stands: what is no keyword's is counted as if it were.
    fn count(&mut self, value: &Value, depth: usize) -> Result<(), ConstraintError> {
        within(depth, MOST_LEVELS, "levels")?;
        self.values += 1;
        within(self.values, MOST_VALUES, "values in it")?;
        match value {
            Value::Array(list) => list.iter().try_for_each(|value| self.count(value, depth + 1)),
            Value::Object(object) => {
                self.keywords(object)?;
                object.values().try_for_each(|value| self.count(value, depth + 1))
            }
            Value::String(text) if text.chars().any(is_unwritable) => Err(unwritable()),
            _ => Ok(()),
        }
    }

    fn keywords(&mut self, object: &Map<String, Value>) -> Result<(), ConstraintError> {
        let size = |key: &str| object.get(key).map_or(0, size);
        self.properties += size("properties") + size("required");
        within(self.properties, MOST_PROPERTIES, "properties, those that are required counted twice")?;
        self.choices +=
            ["enum", "anyOf", "oneOf", "allOf", "prefixItems"].into_iter().map(size).sum::<usize>();
        within(self.choices, MOST_CHOICES, "alternatives and values to choose from")?;

        let patterns = object.get("patternProperties").and_then(Value::as_object);
        let named = patterns.into_iter().flat_map(|patterns| patterns.keys().map(String::as_str));
        let of_text = object.get("pattern").and_then(Value::as_str);
        self.patterns += patterns.map_or(0, Map::len);
        within(self.patterns, MOST_PATTERNS, "patterns of properties' names")?;
        for pattern in named.chain(of_text) {
            self.pattern_bytes += pattern.len();
            within(self.pattern_bytes, MOST_PATTERN_BYTES, "bytes of patterns")?;
            if pattern.chars().any(is_unwritable) || escapes_unwritable(pattern) {
                return Err(unwritable());
            }
        }
        at_least(object)
    }
}

/// Refuses to count names: an object that says one name twice has one property for whoever reads it, and two for a grammar.
/// One that is not required is as many as can be told apart, for it differs from those that are.
fn at_least(object: &Map<String, Value>) -> Result<(), ConstraintError> {
    let Some(least) = object.get("minProperties").and_then(Value::as_f64) else { return Ok(()) };
    let mut required: Vec<&str> = object
        .get("required")
        .and_then(Value::as_array)
        .map_or(Vec::new(), |names| names.iter().filter_map(Value::as_str).collect());
    required.sort_unstable();
    required.dedup();
    match least > required.len() as f64 + 1.0 {
        true => Err(ConstraintError::Unsupported(format!(
            "\"minProperties\" of {least} is supported where all of them but one are required by name"
        ))),
        false => Ok(()),
    }
}

/// A character that JSON writes as `\u00..` and no other way. Strings are not written with that here (compiler.rs says why),
/// and the library leaves such a character out of a constant where it should find that it cannot be written.
fn is_unwritable(c: char) -> bool {
    c.is_ascii_control() && !matches!(c, '\u{8}' | '\t' | '\n' | '\u{c}' | '\r')
}

fn unwritable() -> ConstraintError {
    let which = "control characters other than \\b, \\t, \\n, \\f and \\r";
    ConstraintError::Unsupported(format!("{which} are not supported in values and patterns"))
}

/// Whether an escape in `pattern` stands for such a character.
fn escapes_unwritable(pattern: &str) -> bool {
    let mut rest = pattern;
    while let Some((_, behind)) = rest.split_once('\\') {
        let mut chars = behind.chars();
        let Some(kind) = chars.next() else { return false };
        rest = chars.as_str();
        let n_digits = match kind {
            'a' | 'v' | '0' | 'c' => return true,
            'x' => 2,
            'u' => 4,
            'U' => 8,
            _ => continue,
        };
        let digits = match rest.strip_prefix('{') {
            Some(braced) => braced.split('}').next(),
            None => rest.get(..n_digits),
        };
        let code = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        if code.and_then(char::from_u32).is_some_and(is_unwritable) {
            return true;
        }
    }
    false
}

fn size(value: &Value) -> usize {
    match value {
        Value::Array(list) => list.len(),
        Value::Object(object) => object.len(),
        _ => 0,
    }
}

fn within(n: usize, most: usize, what: &'static str) -> Result<(), ConstraintError> {
    match n > most {
        true => Err(ConstraintError::TooLarge { what, most }),
        false => Ok(()),
    }
}

/// That `keywords` are not enforced, and where in `schema` the first of them stands.
pub(super) fn not_supported(keywords: &[String], schema: &Value) -> String {
    let names = keywords.iter().map(|keyword| format!("{keyword:?}")).collect::<Vec<_>>().join(", ");
    let place = keywords.first().and_then(|keyword| place_of(keyword, schema, "#"));
    let place = place.map_or(String::new(), |place| format!(" (in {place})"));
    let are = if keywords.len() == 1 { "is" } else { "are" };
    format!("{names} {are} not supported{place}")
}

/// The subschema in which `keyword` stands, as a pointer from `at`.
fn place_of(keyword: &str, schema: &Value, at: &str) -> Option<String> {
    if let Value::Array(list) = schema {
        let mut each = list.iter().enumerate();
        return each.find_map(|(i, schema)| place_of(keyword, schema, &format!("{at}/{i}")));
    }
    let object = schema.as_object()?;
    if object.contains_key(keyword) {
        return Some(at.to_owned());
    }
    object.iter().find_map(|(key, value)| {
        let at = format!("{at}/{key}");
        match key.as_str() {
            // of values, not of schemas
            "enum" | "const" | "default" | "examples" => None,
            // of schemas, by names that are no keywords
            "properties" | "patternProperties" | "$defs" | "definitions" | "dependentSchemas" => {
                let mut named = value.as_object()?.iter();
                named.find_map(|(name, schema)| place_of(keyword, schema, &format!("{at}/{name}")))
            }
            _ => place_of(keyword, value, &at),
        }
    })
}

/// As much as a schema may be. Those that people write are a hundredth of it.
const MOST_BYTES: usize = 256 << 10;
const MOST_LEVELS: usize = 64;
const MOST_VALUES: usize = 20_000;
const MOST_PROPERTIES: usize = 1_000;
const MOST_CHOICES: usize = 5_000;
/// Each is compared with every other one, wherever two objects meet.
const MOST_PATTERNS: usize = 16;
const MOST_PATTERN_BYTES: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(n: usize) -> String {
        format!("{}true{}", "{\"not\":".repeat(n), "}".repeat(n))
    }

    #[test]
    fn what_is_too_large_is_refused_by_what_there_is_too_much_of() {
        let object = |n: usize| {
            let each: Vec<String> = (0..n).map(|i| format!("\"p{i}\": true")).collect();
            format!("{{{}}}", each.join(","))
        };
        let table = [
            (format!("{{\"title\": \"{}\"}}", "x".repeat(MOST_BYTES)), "bytes"),
            (nested(MOST_LEVELS + 1), "levels"),
            (format!("{{\"x\": [{}1]}}", "1,".repeat(MOST_VALUES)), "values in it"),
            (format!("{{\"properties\": {}}}", object(MOST_PROPERTIES + 1)), "properties, "),
            (format!("{{\"enum\": [{}1]}}", "1,".repeat(MOST_CHOICES)), "alternatives"),
            (format!("{{\"patternProperties\": {}}}", object(MOST_PATTERNS + 1)), "patterns of"),
            (format!("{{\"pattern\": \"{}\"}}", "x".repeat(MOST_PATTERN_BYTES + 1)), "bytes of patterns"),
            (format!("{{\"items\": {{\"required\": [{}\"a\"]}}}}", "\"a\",".repeat(1000)), "properties, "),
        ];
        for (text, expected) in table {
            match read(&text) {
                Err(ConstraintError::TooLarge { what, .. }) => assert!(what.starts_with(expected), "{what}"),
                other => panic!("{expected}: {other:?}"),
            }
        }
        assert!(read(&nested(MOST_LEVELS)).is_ok());
        assert!(read(&format!("{{\"properties\": {}}}", object(MOST_PROPERTIES))).is_ok());
    }

    #[test]
    fn what_is_no_schema_is_said_so() {
        for text in ["", "{", "{} {}", "\u{0}", &"[".repeat(100_000), &nested(128)] {
            assert!(matches!(read(text), Err(ConstraintError::NotJson(_))), "{text:.20}: {:?}", read(text));
        }
        for text in ["[]", "5", "null", "\"x\""] {
            assert_eq!(read(text), Err(ConstraintError::NotASchema));
        }
        assert_eq!(read("true"), Ok(Value::Bool(true)));
    }

    #[test]
    fn names_are_not_counted_where_one_could_come_twice() {
        assert!(read(r#"{"minProperties": 1}"#).is_ok());
        assert!(read(r#"{"minProperties": 3, "required": ["a", "b"]}"#).is_ok());
        for text in [r#"{"minProperties": 2}"#, r#"{"items": {"minProperties": 3, "required": ["a", "a"]}}"#]
        {
            assert!(matches!(read(text), Err(ConstraintError::Unsupported(_))), "{text}");
        }
    }

    #[test]
    fn what_json_cannot_write_plainly_is_refused() {
        for text in [
            r#"{"const": "a\u0000b"}"#,
            r#"{"items": {"enum": [1, {"x": "\u007f"}]}}"#,
            r#"{"pattern": "a\u0001"}"#,
            r#"{"pattern": "^\\\\\\x01$"}"#,
            r#"{"pattern": "[\\x{1f}]"}"#,
            r#"{"pattern": "\\u0000"}"#,
            r#"{"pattern": "\\a"}"#,
            r#"{"patternProperties": {"\\x7F": {}}}"#,
        ] {
            assert!(matches!(read(text), Err(ConstraintError::Unsupported(_))), "{text}: {:?}", read(text));
        }
        for text in [
            r#"{"const": "a\n\t\r\b\f\u00e9\u0080"}"#,
            r#"{"pattern": "^\\\\x01\\u00e9\\x41\\n\\d\\"}"#,
            r#"{"properties": {"a\u0001": {}}}"#,
        ] {
            assert!(read(text).is_ok(), "{text}: {:?}", read(text));
        }
    }

    #[test]
    fn a_keyword_is_found_where_it_is_one() {
        let schema = serde_json::json!({
            "enum": [{"not": 1}],
            "properties": {"not": {"type": "string"}, "a": {"items": [{}, {"anyOf": [{"not": {}}]}]}},
        });
        let told = not_supported(&["not".to_owned()], &schema);
        assert_eq!(told, "\"not\" is not supported (in #/properties/a/items/1/anyOf/0)");
        let told = not_supported(&["x".to_owned(), "y".to_owned()], &schema);
        assert_eq!(told, "\"x\", \"y\" are not supported");
    }
}
