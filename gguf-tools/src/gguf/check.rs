//! What a file says about its model, read into [`Hparams`] or refused.
//!
//! llama.cpp answers some wrong numbers by ending the process (`GGML_ASSERT` stays in release builds) and some
//! by computing nonsense: a block count of 0 or 513, an unknown rope scaling, a normalisation epsilon below
//! zero, a token that stands twice, a norm stored as F16. Whoever loads a file calls [`model`] first. Each rule
//! here names the key or tensor, what the file says and what it must be.
//!
//! Not checked: what llama.cpp itself refuses with an error, such as a tensor of the wrong shape.

use super::{
    error::{Error, Rule},
    reader::{Gguf, Tensor},
    types::{TensorType, ValueType},
    value::{Array, Value},
};
use crate::arch;

/// llama.cpp's `LLAMA_MAX_LAYERS`.
pub const MAX_BLOCKS: u32 = 512;
/// llama.cpp's `LLAMA_MAX_EXPERTS`.
pub const MAX_EXPERTS: u32 = 1024;
/// Far above any model's width; keeps products of two of them inside 64 bits.
const MAX_WIDTH: u32 = 1 << 24;

/// A model's numbers, each checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Hparams {
    /// `general.architecture`.
    pub arch: String,
    /// `general.name`, where there is one.
    pub name: Option<String>,
    /// Blocks.
    pub n_blocks: u32,
    /// Values per hidden row.
    pub n_embd: u32,
    /// Tokens in the vocabulary: rows of `token_embd.weight`.
    pub n_vocab: u32,
    /// Context length the model was trained for.
    pub n_ctx_train: u32,
    /// Attention heads, per block.
    pub n_head: Vec<u32>,
    /// Heads of keys and values, per block.
    pub n_head_kv: Vec<u32>,
    /// Values per head in keys.
    pub key_length: u32,
    /// Values per head in values.
    pub value_length: u32,
    /// Values per head that are rotated.
    pub rope_dims: u32,
    /// Experts; 0 in a dense model.
    pub n_expert: u32,
    /// Blocks for multi-token prediction among `n_blocks`.
    pub n_nextn: u32,
    /// A tokenizer stands in the file.
    pub has_tokenizer: bool,
}

impl Hparams {
    /// Bytes of F16 keys and values that one position takes in blocks `blocks`.
    pub fn kv_bytes_per_position(&self, blocks: std::ops::Range<u32>) -> u64 {
        let heads = self.n_head_kv.get(blocks.start as usize..blocks.end as usize).unwrap_or_default();
        let per_head = u64::from(self.key_length) + u64::from(self.value_length);
        heads.iter().map(|&n| u64::from(n) * per_head * 2).sum()
    }
}

/// Reads and checks everything.
///
/// # Errors
/// The first rule that is broken.
pub fn model(gguf: &Gguf) -> Result<Hparams, Error> {
    let keys = Keys::new(gguf)?;
    keys.all_plain()?;
    let mut hparams = keys.hparams()?;
    hparams.n_vocab = vocabulary(gguf, &keys, &hparams)?;
    hparams.has_tokenizer = gguf.entry("tokenizer.ggml.tokens").is_some();
    tensors(gguf, &hparams)?;
    Ok(hparams)
}

/// Keys of one architecture.
struct Keys<'a> {
    gguf: &'a Gguf,
    arch: String,
}

impl<'a> Keys<'a> {
    fn new(gguf: &'a Gguf) -> Result<Self, Error> {
        let key = "general.architecture";
        let value = gguf.get(key).ok_or_else(|| gguf.key_error(key, Rule::KeyMissing))?;
        let kind = value.value_type();
        let plain = |s: &&str| !s.is_empty() && s.len() <= 64 && s.bytes().all(|b| b.is_ascii_graphic());
        match value.as_str().filter(plain) {
            Some(arch) => Ok(Keys { gguf, arch: arch.to_owned() }),
            None => {
                Err(gguf.key_error(key, Rule::KeyType { found: kind, must: "the name of an architecture" }))
            }
        }
    }

    /// No arrays of arrays, and no number under the architecture's name that is not one.
    fn all_plain(&self) -> Result<(), Error> {
        for entry in self.gguf.metadata() {
            let refuse = |says: f64| {
                let rule = Rule::Hparam { says: says.to_string(), must: "a finite number".into() };
                Err(self.gguf.key_error(entry.key, rule))
            };
            let ours = entry.key.strip_prefix(&self.arch).is_some_and(|rest| rest.starts_with('.'));
            match &entry.value {
                Value::Array(a) if a.element_type() == ValueType::Array => {
                    return Err(self.gguf.key_error(entry.key, Rule::NestedArray));
                }
                Value::Array(a) if ours && a.element_type() == ValueType::F32 => {
                    if let Some(v) = a.iter().filter_map(|v| v.as_f64()).find(|v| !v.is_finite()) {
                        return refuse(v);
                    }
                }
                value if ours => match value.as_f64() {
                    Some(v) if !v.is_finite() => return refuse(v),
                    _ => {}
                },
                _ => {}
            }
        }
        Ok(())
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    fn refuse<T>(&self, name: &str, says: impl ToString, must: impl Into<String>) -> Result<T, Error> {
        let rule = Rule::Hparam { says: says.to_string(), must: must.into() };
        Err(self.gguf.key_error(&self.key(name), rule))
    }

    /// A u32, which is the only integer type llama.cpp reads its numbers from.
    fn number(&self, name: &str) -> Result<Option<u32>, Error> {
        match self.gguf.get(&self.key(name)) {
            None => Ok(None),
            Some(Value::U32(n)) => Ok(Some(n)),
            Some(other) => Err(self.wrong_type(name, &other, "u32")),
        }
    }

    fn wrong_type(&self, name: &str, found: &Value<'_>, must: &'static str) -> Error {
        self.gguf.key_error(&self.key(name), Rule::KeyType { found: found.value_type(), must })
    }

    fn required(&self, name: &str, least: u32, most: u32) -> Result<u32, Error> {
        match self.within(name, least, most)? {
            Some(n) => Ok(n),
            None => Err(self.gguf.key_error(&self.key(name), Rule::KeyMissing)),
        }
    }

    fn within(&self, name: &str, least: u32, most: u32) -> Result<Option<u32>, Error> {
        match self.number(name)? {
            Some(n) if n < least || n > most => self.refuse(name, n, format!("{least} to {most}")),
            n => Ok(n),
        }
    }

    fn float(&self, name: &str) -> Result<Option<f32>, Error> {
        match self.gguf.get(&self.key(name)) {
            None => Ok(None),
            Some(Value::F32(v)) => Ok(Some(v)),
            Some(other) => Err(self.wrong_type(name, &other, "f32")),
        }
    }

    fn positive(&self, name: &str) -> Result<Option<f32>, Error> {
        match self.float(name)? {
            Some(v) if !(v.is_finite() && v > 0.0) => self.refuse(name, v, "finite and above 0"),
            v => Ok(v),
        }
    }

    /// A number for every block: one for all, or an array with one each.
    fn per_block(&self, name: &str, n_blocks: u32, least: u32, most: u32) -> Result<Option<Vec<u32>>, Error> {
        let out_of_range = |n: u64| n < u64::from(least) || n > u64::from(most);
        match self.gguf.get(&self.key(name)) {
            None => Ok(None),
            Some(Value::U32(n)) if out_of_range(n.into()) => {
                self.refuse(name, n, format!("{least} to {most}"))
            }
            Some(Value::U32(n)) => Ok(Some(vec![n; n_blocks as usize])),
            Some(Value::Array(a)) => {
                if !matches!(a.element_type(), ValueType::U32 | ValueType::I32) {
                    return Err(self.wrong_type(name, &Value::Array(a), "u32, or an array of u32 or i32"));
                }
                if a.len() != u64::from(n_blocks) {
                    return self.refuse(
                        name,
                        format!("{} values", a.len()),
                        format!("{n_blocks}, one per block"),
                    );
                }
                // a block of some unsupported architectures has no attention, and so no heads
                let least = if arch::is_supported(&self.arch) { least } else { 0 };
                let mut numbers = Vec::with_capacity(n_blocks as usize);
                for (block, value) in a.iter().enumerate() {
                    match value.as_u32().filter(|n| (least..=most).contains(n)) {
                        Some(n) => numbers.push(n),
                        None => {
                            return self.refuse(
                                name,
                                format!("{value:?} for block {block}"),
                                format!("{least} to {most}"),
                            );
                        }
                    }
                }
                Ok(Some(numbers))
            }
            Some(other) => Err(self.wrong_type(name, &other, "u32, or an array of u32 or i32")),
        }
    }

    fn hparams(&self) -> Result<Hparams, Error> {
        let n_blocks = self.required("block_count", 1, MAX_BLOCKS)?;
        let n_embd = self.required("embedding_length", 1, MAX_WIDTH)?;
        let n_ctx_train = self.required("context_length", 1, i32::MAX as u32)?;
        let n_nextn = self.within("nextn_predict_layers", 0, n_blocks)?.unwrap_or(0);
        self.per_block("feed_forward_length", n_blocks, 1, MAX_WIDTH)?;
        self.per_block("expert_feed_forward_length", n_blocks, 0, MAX_WIDTH)?;
        let n_expert = self.experts(n_blocks)?;

        let all_positive = |v: &Option<Vec<u32>>| v.as_ref().is_some_and(|v| v.iter().all(|&n| n > 0));
        let n_head = self.per_block("attention.head_count", n_blocks, 1, 1 << 16)?;
        let n_head_kv = self.per_block("attention.head_count_kv", n_blocks, 1, 1 << 16)?;
        if all_positive(&n_head)
            && all_positive(&n_head_kv)
            && let (Some(heads), Some(kv)) = (&n_head, &n_head_kv)
        {
            for (block, (&h, &k)) in heads.iter().zip(kv).enumerate() {
                if !h.is_multiple_of(k) {
                    let must = format!("a divisor of {h}, the number of heads of block {block}");
                    return self.refuse("attention.head_count_kv", k, must);
                }
            }
        }
        let n_head = n_head.unwrap_or_else(|| vec![0; n_blocks as usize]);
        let n_head_kv = n_head_kv.unwrap_or_else(|| n_head.clone());
        let (key_length, value_length, rope_dims) = self.heads(n_embd, n_head[0])?;

        for eps in ["attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"] {
            self.positive(eps)?;
        }
        self.positive("attention.group_norm_epsilon")?;
        self.rope()?;
        self.causal()?;
        for divisor in ["logit_scale", "final_logit_softcapping", "attn_logit_softcapping"] {
            match self.float(divisor)? {
                Some(0.0) if divisor == "logit_scale" && self.arch.starts_with("granite") => {
                    return self.refuse(divisor, 0, "other than 0: logits are divided by it");
                }
                _ => {}
            }
        }
        let name = self.gguf.get("general.name").and_then(|v| v.as_str().map(str::to_owned));
        Ok(Hparams {
            arch: self.arch.clone(),
            name,
            n_blocks,
            n_embd,
            n_vocab: 0,
            n_ctx_train,
            n_head,
            n_head_kv,
            key_length,
            value_length,
            rope_dims,
            n_expert,
            n_nextn,
            has_tokenizer: false,
        })
    }

    /// Expert counts; each of these is an assertion in llama.cpp.
    fn experts(&self, n_blocks: u32) -> Result<u32, Error> {
        let n_expert = self.within("expert_count", 0, MAX_EXPERTS)?.unwrap_or(0);
        let used = self.per_block("expert_used_count", n_blocks, 0, MAX_EXPERTS)?.unwrap_or_default();
        let most_used = used.iter().copied().max().unwrap_or(0);
        let groups = self.number("expert_group_count")?.unwrap_or(0);
        let groups_used = self.number("expert_group_used_count")?.unwrap_or(0);
        if most_used > n_expert {
            return self.refuse("expert_used_count", most_used, format!("at most expert_count, {n_expert}"));
        }
        if n_expert > 0 && (used.is_empty() || used.contains(&0)) {
            return self.refuse("expert_used_count", 0, format!("1 to expert_count, {n_expert}"));
        }
        if groups > 0 && groups >= n_expert {
            return self.refuse("expert_group_count", groups, format!("below expert_count, {n_expert}"));
        }
        if groups > 1 {
            if !n_expert.is_multiple_of(groups) {
                return self.refuse(
                    "expert_group_count",
                    groups,
                    format!("a divisor of expert_count, {n_expert}"),
                );
            }
            if groups_used == 0 || groups_used >= groups {
                return self.refuse("expert_group_used_count", groups_used, format!("1 to {}", groups - 1));
            }
        }
        self.within("expert_gating_func", 0, 4)?;
        Ok(n_expert)
    }

    /// Values per head: in keys, in values, rotated.
    fn heads(&self, n_embd: u32, n_head: u32) -> Result<(u32, u32, u32), Error> {
        if n_head == 0 {
            return Ok((0, 0, 0));
        }
        let key = self.within("attention.key_length", 1, 1 << 16)?;
        let value = self.within("attention.value_length", 1, 1 << 16)?;
        if (key.is_none() || value.is_none()) && !n_embd.is_multiple_of(n_head) {
            return self.refuse(
                "attention.head_count",
                n_head,
                format!("a divisor of embedding_length, {n_embd}"),
            );
        }
        let (key, value) = (key.unwrap_or(n_embd / n_head), value.unwrap_or(n_embd / n_head));
        let rope = self.within("rope.dimension_count", 0, key)?.unwrap_or(key);
        if let Ok(arch) = arch::find(&self.arch) {
            if key != value {
                return self.refuse(
                    "attention.value_length",
                    value,
                    format!("{key}, the same as key_length"),
                );
            }
            if !rope.is_multiple_of(2) || rope == 0 {
                return self.refuse("rope.dimension_count", rope, "even, and at least 2");
            }
            if arch.rope_whole_head && rope != key {
                return self.refuse("rope.dimension_count", rope, format!("{key}, a whole head"));
            }
        }
        Ok((key, value, rope))
    }

    fn rope(&self) -> Result<(), Error> {
        self.positive("rope.freq_base")?;
        self.positive("rope.freq_base_swa")?;
        for factor in ["rope.scaling.factor", "rope.scale_linear"] {
            match self.float(factor)? {
                // 0 stands for "none" in old files
                Some(v) if !(v.is_finite() && v >= 0.0) => {
                    return self.refuse(factor, v, "finite and not below 0");
                }
                _ => {}
            }
        }
        self.within("rope.scaling.original_context_length", 1, i32::MAX as u32)?;
        let name = "rope.scaling.type";
        match self.gguf.get(&self.key(name)) {
            None => Ok(()),
            Some(Value::String(s)) if matches!(&s[..], b"none" | b"linear" | b"yarn" | b"longrope") => Ok(()),
            Some(Value::String(s)) => {
                self.refuse(name, String::from_utf8_lossy(&s), "none, linear, yarn or longrope")
            }
            Some(other) => Err(self.wrong_type(name, &other, "string")),
        }
    }

    fn causal(&self) -> Result<(), Error> {
        self.within("pooling_type", 0, 4)?;
        let name = "attention.causal";
        match self.gguf.get(&self.key(name)) {
            None | Some(Value::Bool(_)) => Ok(()),
            Some(other) => Err(self.wrong_type(name, &other, "bool")),
        }
    }
}

/// The tokenizer, and how many tokens there are.
fn vocabulary(gguf: &Gguf, keys: &Keys<'_>, hparams: &Hparams) -> Result<u32, Error> {
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
    let rows = match gguf.tensor("token_embd.weight") {
        Some(t) if t.dims()[0] != u64::from(hparams.n_embd) || t.dims().len() > 2 => {
            let must = format!("rows of embedding_length, {}", hparams.n_embd);
            return Err(t.error(Rule::TensorShape { found: t.dims().to_vec(), must }));
        }
        Some(t) => t.dims().get(1).copied().unwrap_or(1),
        None => {
            let rule = Rule::TensorMissing { blocks: hparams.n_blocks.into() };
            return Err(Error {
                place: super::Place::Tensor("token_embd.weight".into()),
                ..Error::file(gguf.path(), rule)
            });
        }
    };
    let Ok(rows) = u32::try_from(rows) else {
        return refuse("tokenizer.ggml.tokens", format!("{rows} tokens"), "at most 2^31".into());
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

    let tokens = string_array(gguf, "tokenizer.ggml.tokens")?
        .ok_or_else(|| gguf.key_error("tokenizer.ggml.tokens", Rule::KeyMissing))?;
    if tokens.len() != u64::from(rows) {
        let must = format!("{rows}, the rows of token_embd.weight");
        return refuse("tokenizer.ggml.tokens", format!("{} tokens", tokens.len()), must);
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
    let mut order: Vec<u32> = (0..texts.len() as u32).collect();
    order.sort_unstable_by_key(|&i| (texts[i as usize], i));
    let refuse = |text: &[u8], first: u32, second: u32| {
        let text = String::from_utf8_lossy(text).chars().take(80).collect();
        let rule = Rule::TokenDuplicate { text, first: first.into(), second: second.into() };
        Err(gguf.key_error("tokenizer.ggml.tokens", rule))
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
            return refuse(name.as_bytes(), i as u32, order[at]);
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
                return Err(gguf.key_error("tokenizer.ggml.tokens", rule));
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
            return Err(gguf.key_error("tokenizer.ggml.tokens", rule));
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

/// Types that ggml's operations take, and tensors for every block.
fn tensors(gguf: &Gguf, hparams: &Hparams) -> Result<(), Error> {
    let mut blocks = vec![false; hparams.n_blocks as usize];
    for tensor in gguf.tensors() {
        if let Some(block) = block_of(tensor.name()) {
            match blocks.get_mut(block as usize) {
                Some(seen) => *seen = true,
                None => {
                    let must =
                        format!("in one of the {} blocks, 0 to {}", hparams.n_blocks, hparams.n_blocks - 1);
                    return Err(tensor.error(Rule::Hparam { says: format!("block {block}"), must }));
                }
            }
        }
        tensor_type(&tensor, arch::is_supported(&hparams.arch))?;
    }
    // llama.cpp asserts that an NVFP4 lm_head with scales beside it is not the embedding
    if let Some(scale) = gguf.tensor("output.scale").or_else(|| gguf.tensor("output.input_scale"))
        && gguf.tensor("output.weight").is_none()
        && gguf.tensor("token_embd.weight").is_some_and(|t| t.tensor_type() == TensorType::NVFP4)
    {
        let must = "beside output.weight".into();
        return Err(scale.error(Rule::Hparam { says: "a scale without output.weight".into(), must }));
    }
    if let Some(block) = blocks.iter().position(|&seen| !seen) {
        let rule = Rule::TensorMissing { blocks: hparams.n_blocks.into() };
        let place = super::Place::Tensor(format!("blk.{block}.*"));
        return Err(Error { place, ..Error::file(gguf.path(), rule) });
    }
    Ok(())
}

fn tensor_type(tensor: &Tensor<'_>, known: bool) -> Result<(), Error> {
    use TensorType::*;
    let found = tensor.tensor_type();
    let integer = matches!(found, I8 | I16 | I32 | I64 | F64);
    if matches!(found, Q8_1 | Q8_K) || integer && known {
        // ggml has them for intermediate results and for tables that the architectures known here do not have:
        // no operation on weights takes them
        return Err(
            tensor.error(Rule::TensorTypeForbidden { found, must: "a type for weights, such as F16" })
        );
    }
    if needs_f32(tensor.name()) && found != F32 {
        return Err(tensor.error(Rule::TensorTypeForbidden { found, must: "F32" }));
    }
    Ok(())
}

/// Tensors that are added or multiplied element by element: ggml does that in F32 only.
fn needs_f32(name: &str) -> bool {
    let last = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map_or(name, |(_, last)| last);
    last.ends_with(".bias")
        || last.ends_with("scale")
        || last.contains("norm")
        || last.starts_with("rope_f")
        || last.starts_with("attn_sinks")
}

/// The block a tensor belongs to, by its name: `blk.7.attn_q.weight` to 7.
pub fn block_of(name: &str) -> Option<u32> {
    let (number, _) = name.strip_prefix("blk.")?.split_once('.')?;
    // as ggml writes it: no sign, no leading zero
    if number.is_empty()
        || number.len() > 1 && number.starts_with('0')
        || !number.bytes().all(|b| b.is_ascii_digit())
    {
        return None;
    }
    Some(number.parse().unwrap_or(u32::MAX))
}
