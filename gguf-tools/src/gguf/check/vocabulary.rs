//! The tokenizer: as many tokens as the embedding has rows, each text once, and what llama.cpp asserts of them.

use super::{TOKENS, keys::Keys};
use crate::gguf::{
    error::{Error, Place, Rule},
    index,
    reader::Gguf,
    types::ValueType,
    value::{Array, Value},
};

/// The tokenizer, and how many tokens there are.
pub(super) fn vocabulary(keys: &Keys<'_>, n_blocks: u32, n_embd: u32) -> Result<u32, Error> {
    let gguf = keys.gguf;
    let refuse =
        |key: &str, says: String, must: String| Err(gguf.key_error(key, Rule::Hparam { says, must }));
    let kind = match gguf.get("tokenizer.ggml.model") {
        None => return Err(gguf.key_error("tokenizer.ggml.model", Rule::KeyMissing)),
        Some(Value::String(s)) => String::from_utf8_lossy(&s).into_owned(),
        Some(other) => {
            let rule = Rule::KeyType { found: other.value_type(), must: "string" };
            return Err(gguf.key_error("tokenizer.ggml.model", rule));
        }
    };
    // every other part is an array as long as the vocabulary, which is as long as the embedding
    let rows = match keys.whole.tensor("token_embd.weight") {
        Some(t) if keys.is_known() && t.dims[0] != u64::from(n_embd) || t.dims.len() > 2 => {
            let must = format!("rows of embedding_length, {}", n_embd);
            return Err(t.error(Rule::TensorShape { found: t.dims.to_vec(), must }));
        }
        Some(t) => t.dims.get(1).copied().unwrap_or(1),
        None => {
            let rule = Rule::TensorMissing { blocks: n_blocks.into() };
            return Err(Error {
                place: Place::Tensor("token_embd.weight".into()),
                ..Error::file(gguf.path(), rule)
            });
        }
    };
    let Ok(rows) = u32::try_from(rows) else {
        return refuse(TOKENS, format!("{rows} tokens"), "at most 2^31".into());
    };
    let says = keys.number("vocab_size")?;
    if kind == "none" || kind == "no_vocab" {
        // llama.cpp makes up this many tokens, whatever the number
        return match says {
            Some(n) if n != rows => {
                let must = format!("{rows}, the rows of token_embd.weight");
                refuse(&keys.key("vocab_size"), n.to_string(), must)
            }
            Some(n) => Ok(n),
            None => Err(gguf.key_error(&keys.key("vocab_size"), Rule::KeyMissing)),
        };
    }

    let tokens = string_array(gguf, TOKENS)?.ok_or_else(|| gguf.key_error(TOKENS, Rule::KeyMissing))?;
    if tokens.len() != u64::from(rows) {
        let must = format!("{rows}, the rows of token_embd.weight");
        return refuse(TOKENS, format!("{} tokens", tokens.len()), must);
    }
    unique_tokens(gguf, &tokens)?;
    string_array(gguf, "tokenizer.ggml.merges")?;
    token_arrays(gguf, &tokens, &kind)?;
    special_tokens(gguf, rows, &kind)?;
    Ok(rows)
}

fn string_array<'a>(gguf: &'a Gguf, key: &str) -> Result<Option<Array<'a>>, Error> {
    match gguf.get(key) {
        None => Ok(None),
        Some(Value::Array(a)) if a.element_type() == ValueType::String => Ok(Some(a)),
        Some(other) => {
            let rule = Rule::KeyType { found: other.value_type(), must: "an array of strings" };
            Err(gguf.key_error(key, rule))
        }
    }
}

/// No two tokens with one text, as llama.cpp sees texts: up to the first NUL, and `[EMPTY_7]` for an empty one.
fn unique_tokens(gguf: &Gguf, tokens: &Array<'_>) -> Result<(), Error> {
    let seen = |text: &[u8]| text.iter().position(|&b| b == 0).unwrap_or(text.len());
    let texts: Vec<&[u8]> = tokens.strings().map(|t| &t[..seen(t)]).collect();
    let mut order: Vec<u32> = (0..index(texts.len())).collect();
    order.sort_unstable_by_key(|&i| (texts[i as usize], i));
    let refuse = |text: &[u8], first: u32, second: u32| {
        let text = String::from_utf8_lossy(text).chars().take(80).collect();
        let rule = Rule::TokenDuplicate { text, first: first.into(), second: second.into() };
        Err(gguf.key_error(TOKENS, rule))
    };
    for pair in order.windows(2) {
        let (a, b) = (texts[pair[0] as usize], texts[pair[1] as usize]);
        if a == b && !a.is_empty() {
            return refuse(a, pair[0], pair[1]);
        }
    }
    for (i, _) in texts.iter().enumerate().filter(|(_, t)| t.is_empty()) {
        let name = format!("[EMPTY_{i}]");
        if let Ok(at) = order.binary_search_by(|&j| texts[j as usize].cmp(name.as_bytes())) {
            return refuse(name.as_bytes(), index(i), order[at]);
        }
    }
    Ok(())
}

/// Scores and types: of the right type, one for each token; byte tokens that are bytes.
fn token_arrays(gguf: &Gguf, tokens: &Array<'_>, kind: &str) -> Result<(), Error> {
    let array = |key: &'static str, element: &[ValueType], must| match gguf.get(key) {
        None => Ok(None),
        Some(Value::Array(a)) if element.contains(&a.element_type()) => {
            if a.len() < tokens.len() {
                let rule = Rule::Hparam {
                    says: format!("{} values", a.len()),
                    must: format!("{}, one per token", tokens.len()),
                };
                return Err(gguf.key_error(key, rule));
            }
            Ok(Some(a))
        }
        Some(other) => Err(gguf.key_error(key, Rule::KeyType { found: other.value_type(), must })),
    };
    let scores = array("tokenizer.ggml.scores", &[ValueType::F32, ValueType::I32], "an array of f32 or i32")?;
    if let Some(i) = scores.iter().flat_map(|a| a.iter()).position(|v| v.as_f64().is_some_and(f64::is_nan)) {
        let rule = Rule::Hparam { says: format!("NaN for token {i}"), must: "a number".into() };
        return Err(gguf.key_error("tokenizer.ggml.scores", rule));
    }
    let types = array("tokenizer.ggml.token_type", &[ValueType::I32], "an array of i32")?;
    if let Some(types) = &types {
        const BYTE: Value<'_> = Value::I32(6);
        for (i, (text, _)) in
            tokens.strings().zip(types.iter()).enumerate().filter(|(_, (_, ty))| *ty == BYTE)
        {
            if !is_byte_token(text) {
                let rule = Rule::Hparam {
                    says: format!("{:?} for byte token {i}", String::from_utf8_lossy(text)),
                    must: "<0x00> to <0xFF>".into(),
                };
                return Err(gguf.key_error(TOKENS, rule));
            }
        }
    }
    // this tokenizer falls back to bytes, and has nothing to fall back to without them
    if kind == "llama" {
        let mut has = [false; 256];
        for text in tokens.strings() {
            match text {
                [b] => has[*b as usize] = true,
                _ if is_byte_token(text) => {
                    let hex =
                        std::str::from_utf8(&text[3..5]).ok().and_then(|h| u8::from_str_radix(h, 16).ok());
                    has[hex.unwrap_or(0) as usize] = true;
                }
                _ => {}
            }
        }
        if let Some(byte) = has.iter().position(|&h| !h) {
            let rule = Rule::Hparam {
                says: format!("no token for byte {byte:#04X}"),
                must: "one for each byte: <0x00> to <0xFF>".into(),
            };
            return Err(gguf.key_error(TOKENS, rule));
        }
    }
    Ok(())
}

fn is_byte_token(text: &[u8]) -> bool {
    let upper_hex = |b: &u8| b.is_ascii_digit() || (b'A'..=b'F').contains(b);
    text.len() == 6 && text.starts_with(b"<0x") && text[5] == b'>' && text[3..5].iter().all(upper_hex)
}

/// Ids of the right type; begin and end of text inside the vocabulary, also where llama.cpp assumes them.
///
/// Any other id outside the vocabulary is harmless: llama.cpp warns and does without (padding ids of fine-tuned
/// models often are).
fn special_tokens(gguf: &Gguf, n_tokens: u32, kind: &str) -> Result<(), Error> {
    let prefix = "tokenizer.ggml.";
    for entry in gguf.metadata().filter(|e| e.key.starts_with(prefix) && e.key.ends_with("_token_id")) {
        let ends = ["bos_token_id", "eos_token_id"].iter().any(|name| entry.key[prefix.len()..] == **name);
        match entry.value {
            Value::U32(id) if id < n_tokens || !ends => {}
            Value::U32(id) => {
                let must = format!("below {n_tokens}, the number of tokens");
                return Err(gguf.key_error(entry.key, Rule::Hparam { says: id.to_string(), must }));
            }
            other => {
                let rule = Rule::KeyType { found: other.value_type(), must: "u32" };
                return Err(gguf.key_error(entry.key, rule));
            }
        }
    }
    // what llama.cpp takes for begin and end of text where the file names none
    let assumed = match kind {
        "llama" => [1, 2],
        "gpt2" => [11, 11],
        _ => return Ok(()),
    };
    for (key, id) in ["bos_token_id", "eos_token_id"].into_iter().zip(assumed) {
        let key = format!("{prefix}{key}");
        if gguf.entry(&key).is_none() && id >= n_tokens {
            return Err(gguf.key_error(&key, Rule::KeyMissing));
        }
    }
    for flag in ["add_bos_token", "add_eos_token", "add_space_prefix"] {
        let key = format!("{prefix}{flag}");
        match gguf.get(&key) {
            None | Some(Value::Bool(_)) => {}
            Some(other) => {
                return Err(gguf.key_error(&key, Rule::KeyType { found: other.value_type(), must: "bool" }));
            }
        }
    }
    Ok(())
}
