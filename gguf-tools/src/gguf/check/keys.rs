//! The numbers under the architecture's name, each checked where it is read.

use super::{Hparams, MAX_BLOCKS, MAX_EXPERTS, TOKENS, vocabulary::vocabulary, whole::Whole};
use crate::{
    arch,
    gguf::{
        error::{Error, Rule},
        reader::Gguf,
        types::ValueType,
        value::Value,
    },
    text::shown_bytes,
};

/// Far above any model's width; keeps products of two of them inside 64 bits.
const MAX_WIDTH: u32 = 1 << 24;
/// Far above any model's heads, and values per head.
const MAX_HEADS: u32 = 1 << 16;
/// Longest name of an architecture.
const MAX_ARCH_BYTES: usize = 64;

/// Keys of one architecture.
pub(super) struct Keys<'a> {
    pub(super) gguf: &'a Gguf,
    pub(super) whole: &'a Whole<'a>,
    arch: String,
}

impl<'a> Keys<'a> {
    pub(super) fn new(whole: &'a Whole<'a>) -> Result<Self, Error> {
        let gguf = whole.gguf;
        let key = "general.architecture";
        let value = gguf.get(key).ok_or_else(|| gguf.key_error(key, Rule::KeyMissing))?;
        let kind = value.value_type();
        let plain =
            |s: &&str| !s.is_empty() && s.len() <= MAX_ARCH_BYTES && s.bytes().all(|b| b.is_ascii_graphic());
        match value.as_str().filter(plain) {
            Some(arch) => Ok(Keys { gguf, whole, arch: arch.to_owned() }),
            None => {
                Err(gguf.key_error(key, Rule::KeyType { found: kind, must: "the name of an architecture" }))
            }
        }
    }

    /// No arrays of arrays, and no number under the architecture's name that is not one.
    pub(super) fn all_plain(&self) -> Result<(), Error> {
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

    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    fn refuse<T>(&self, name: &str, says: impl ToString, must: impl Into<String>) -> Result<T, Error> {
        let rule = Rule::Hparam { says: says.to_string(), must: must.into() };
        Err(self.gguf.key_error(&self.key(name), rule))
    }

    /// A u32, which is the only integer type llama.cpp reads its numbers from.
    pub(super) fn number(&self, name: &str) -> Result<Option<u32>, Error> {
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

    /// Heads are as many in every block: the graphs of the architectures known here build all blocks like the first.
    fn one_for_all(&self, name: &str, of_blocks: &Option<Vec<u32>>) -> Result<(), Error> {
        let numbers = of_blocks.as_deref().unwrap_or_default();
        match numbers.iter().position(|n| Some(n) != numbers.first()) {
            Some(block) => {
                let says = format!("{} for block 0 and {} for block {block}", numbers[0], numbers[block]);
                self.refuse(name, says, "the same for every block")
            }
            None => Ok(()),
        }
    }

    /// Whether the architecture is one whose numbers are known one by one.
    pub(super) fn is_known(&self) -> bool {
        arch::is_supported(&self.arch)
    }

    pub(super) fn hparams(&self) -> Result<Hparams, Error> {
        let n_blocks = self.required("block_count", 1, MAX_BLOCKS)?;
        let n_embd = self.required("embedding_length", 1, MAX_WIDTH)?;
        let n_ctx_train = self.required("context_length", 1, i32::MAX as u32)?;
        let n_nextn = self.within("nextn_predict_layers", 0, n_blocks - 1)?.unwrap_or(0);
        let common = Hparams {
            arch: self.arch.clone(),
            name: self.gguf.get("general.name").and_then(|v| v.as_str().map(str::to_owned)),
            n_blocks,
            n_embd,
            n_vocab: 0,
            n_ctx_train,
            n_head: vec![0; n_blocks as usize],
            n_head_kv: vec![0; n_blocks as usize],
            key_length: 0,
            value_length: 0,
            rope_dims: 0,
            n_expert: 0,
            n_nextn,
            has_tokenizer: self.gguf.entry(TOKENS).is_some(),
        };
        let numbers = if self.is_known() { self.known(common)? } else { self.unknown(common) };
        let n_vocab = vocabulary(self, n_blocks, n_embd)?;
        Ok(Hparams { n_vocab, ..numbers })
    }

    /// What can be told of an architecture about which nothing is known: names that most of them use.
    fn unknown(&self, common: Hparams) -> Hparams {
        let n_blocks = common.n_blocks as usize;
        let of_blocks = |name: &str| match self.gguf.get(&self.key(name)) {
            Some(Value::Array(array)) if array.len() == n_blocks as u64 => {
                array.iter().map(|v| v.as_u32().filter(|&n| n <= MAX_HEADS)).collect()
            }
            Some(value) => {
                value.as_u32().filter(|&n| n <= MAX_HEADS).map(|n| std::iter::repeat_n(n, n_blocks).collect())
            }
            None => None,
        };
        let length = |name: &str| self.gguf.get(&self.key(name))?.as_u32().filter(|&n| n <= MAX_HEADS);
        let n_head: Vec<u32> = of_blocks("attention.head_count").unwrap_or_else(|| common.n_head.clone());
        let n_head_kv = of_blocks("attention.head_count_kv").unwrap_or_else(|| n_head.clone());
        let most_heads = n_head.iter().copied().max().unwrap_or(0);
        let usual = common.n_embd.checked_div(most_heads).unwrap_or(0);
        let key_length = length("attention.key_length").unwrap_or(usual);
        let value_length = length("attention.value_length").unwrap_or(usual);
        let n_expert = length("expert_count").unwrap_or(0);
        Hparams { n_head, n_head_kv, key_length, value_length, n_expert, ..common }
    }

    /// The numbers of an architecture of which each is known.
    fn known(&self, common: Hparams) -> Result<Hparams, Error> {
        let (n_blocks, n_embd) = (common.n_blocks, common.n_embd);
        self.per_block("feed_forward_length", n_blocks, 1, MAX_WIDTH)?;
        self.per_block("expert_feed_forward_length", n_blocks, 0, MAX_WIDTH)?;
        let n_expert = self.experts(n_blocks)?;

        let n_head = self.per_block("attention.head_count", n_blocks, 1, MAX_HEADS)?;
        let n_head_kv = self.per_block("attention.head_count_kv", n_blocks, 1, MAX_HEADS)?;
        if let (Some(heads), Some(kv)) = (&n_head, &n_head_kv) {
            for (block, (&h, &k)) in heads.iter().zip(kv).enumerate() {
                if !h.is_multiple_of(k) {
                    let must = format!("a divisor of {h}, the number of heads of block {block}");
                    return self.refuse("attention.head_count_kv", k, must);
                }
            }
        }
        self.one_for_all("attention.head_count", &n_head)?;
        self.one_for_all("attention.head_count_kv", &n_head_kv)?;
        let n_head =
            n_head.ok_or_else(|| self.gguf.key_error(&self.key("attention.head_count"), Rule::KeyMissing))?;
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
        Ok(Hparams { n_head, n_head_kv, key_length, value_length, rope_dims, n_expert, ..common })
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
        let key = self.within("attention.key_length", 1, MAX_HEADS)?;
        let value = self.within("attention.value_length", 1, MAX_HEADS)?;
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
            Some(Value::String(s)) => self.refuse(name, shown_bytes(&s), "none, linear, yarn or longrope"),
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
