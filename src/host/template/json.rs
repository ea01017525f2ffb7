//! The filter `tojson` as transformers has it: Python's `json.dumps`, not the one of web pages that escapes `<`.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

use super::MAX_TEXT_BYTES;

/// `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(value: Value, positional: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let argument = |at: usize, name: &str| -> Result<Option<Value>, Error> {
        let given = match positional.get(at) {
            Some(given) => Some(given.clone()),
            None => named.get::<Option<Value>>(name)?,
        };
        Ok(given.filter(|given| !given.is_none() && !given.is_undefined()))
    };
    let indent = match argument(1, "indent")? {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(n) => Some(" ".repeat(usize::try_from(n)?.min(MAX_INDENT + 1))),
    };
    if indent.as_ref().is_some_and(|indent| indent.len() > MAX_INDENT) {
        return Err(wrong(format!("tojson takes an indent of at most {MAX_INDENT}")));
    }
    let separators: Option<Vec<String>> = match argument(2, "separators")? {
        None => None,
        Some(pair) => Some(pair.try_iter()?.map(|text| text.to_string()).collect()),
    };
    let (between_items, before_value) = match separators.as_deref() {
        None if indent.is_some() => (",", ": "),
        None => (", ", ": "),
        Some([items, keys]) => (items.as_str(), keys.as_str()),
        Some(_) => return Err(wrong("tojson takes two separators")),
    };
    let is_true = |given: Option<Value>| given.is_some_and(|given| given.is_true());
    let mut writer = Writer {
        out: String::new(),
        ascii: is_true(argument(0, "ensure_ascii")?),
        sort: is_true(argument(3, "sort_keys")?),
        indent: indent.as_deref(),
        between_items,
        before_value,
    };
    named.assert_all_used()?;
    writer.value(&value, 0)?;
    Ok(Value::from(writer.out))
}

struct Writer<'a> {
    out: String,
    ascii: bool,
    sort: bool,
    indent: Option<&'a str>,
    between_items: &'a str,
    before_value: &'a str,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(wrong(format!("tojson takes at most {MAX_DEPTH} levels")));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => self.map(value, depth)?,
            ValueKind::Seq | ValueKind::Iterable => self.list(value, depth)?,
            kind => return Err(wrong(format!("{kind} is not JSON serializable"))),
        }
        match self.out.len() > MAX_TEXT_BYTES {
            true => Err(wrong(format!("tojson writes at most {MAX_TEXT_BYTES} bytes"))),
            false => Ok(()),
        }
    }

    fn list(&mut self, list: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('[');
        let mut is_empty = true;
        for item in list.try_iter()? {
            self.next_item(is_empty, depth);
            is_empty = false;
            self.value(&item, depth + 1)?;
        }
        self.end(is_empty, depth, ']');
        Ok(())
    }

    fn map(&mut self, map: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('{');
        let mut keys: Vec<Value> = map.try_iter()?.collect();
        if self.sort {
            keys.sort();
        }
        for (i, key) in keys.iter().enumerate() {
            self.next_item(i == 0, depth);
            match key.kind() {
                ValueKind::String => self.string(key.as_str().unwrap_or_default()),
                ValueKind::Number | ValueKind::Bool | ValueKind::None => {
                    self.out.push('"');
                    self.value(key, depth + 1)?;
                    self.out.push('"');
                }
                kind => return Err(wrong(format!("a key is a string in JSON, not a {kind}"))),
            }
            self.out.push_str(self.before_value);
            self.value(&map.get_item(key)?, depth + 1)?;
        }
        self.end(keys.is_empty(), depth, '}');
        Ok(())
    }

    fn next_item(&mut self, is_first: bool, depth: usize) {
        if !is_first {
            self.out.push_str(self.between_items);
        }
        self.new_line(depth + 1);
    }

    fn end(&mut self, is_empty: bool, depth: usize, bracket: char) {
        if !is_empty {
            self.new_line(depth);
        }
        self.out.push(bracket);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            (0..depth).for_each(|_| self.out.push_str(indent));
        }
    }

    fn number(&mut self, value: &Value) {
        let text = value.to_string();
        self.out.push_str(match text.as_str() {
            "inf" => "Infinity",
            "-inf" => "-Infinity",
            other => other,
        });
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || self.ascii && (c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn wrong(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

const MAX_INDENT: usize = 64;
/// Deeper than any schema of a tool.
const MAX_DEPTH: usize = 128;
