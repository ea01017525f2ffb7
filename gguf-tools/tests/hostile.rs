//! Rows A1 to A7 of the fault table: every way a file can be wrong is a named error, cheap and without a signal.

mod common;

use std::{
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

use common::{ARRAY, BOOL, F32, I32, N_TOKENS, Raw, Rng, STRING, U8, U32, U64, array, string};
use gguf_tools::gguf::{Error, Foreign, Gguf, Place, Rule, check};

struct Case {
    /// Row of the table, and what is wrong.
    name: &'static str,
    bytes: Vec<u8>,
    /// Whether this is the error it must be.
    is: fn(&Rule) -> bool,
    place: Place,
}

macro_rules! case {
    ($cases:ident, $name:literal, $place:expr, $rule:pat $(if $guard:expr)?, $bytes:expr) => {
        $cases.push(Case { name: $name, bytes: $bytes, is: |rule| matches!(rule, $rule $(if $guard)?), place: $place })
    };
}

fn key(name: &str) -> Place {
    Place::Key(name.to_owned())
}

fn tensor(name: &str) -> Place {
    Place::Tensor(name.to_owned())
}

/// A change to the smallest model.
fn with(change: impl FnOnce(&mut Raw)) -> Vec<u8> {
    let mut raw = Raw::model();
    change(&mut raw);
    raw.bytes()
}

fn le(n: u32) -> Vec<u8> {
    n.to_le_bytes().to_vec()
}

fn float(v: f32) -> Vec<u8> {
    v.to_le_bytes().to_vec()
}

fn cases() -> Vec<Case> {
    let mut c = Vec::new();
    header(&mut c);
    metadata(&mut c);
    alignment(&mut c);
    tensors(&mut c);
    hparams(&mut c);
    tokenizer(&mut c);
    truncated(&mut c);
    c
}

fn header(c: &mut Vec<Case>) {
    use Place::Header;
    case!(c, "A1 empty file", Header, Rule::TooShort(0), Vec::new());
    case!(c, "A1 three bytes", Header, Rule::TooShort(3), b"GGU".to_vec());
    case!(c, "A1 magic only", Header, Rule::TooShort(4), b"GGUF".to_vec());
    case!(c, "A1 wrong magic", Header, Rule::NotGguf(_), with(|r| r.magic = *b"GGML"));
    case!(
        c,
        "A1 a zip",
        Header,
        Rule::Foreign(Foreign::Zip),
        b"PK\x03\x04 and so on, more than a header".to_vec()
    );
    case!(c, "A1 version 0", Header, Rule::Version(0), with(|r| r.version = 0));
    case!(c, "A1 version 1", Header, Rule::Version1, with(|r| r.version = 1));
    case!(c, "A1 version 4", Header, Rule::Version(4), with(|r| r.version = 4));
    case!(c, "A1 version swapped", Header, Rule::BigEndian(3), with(|r| r.version = 3u32.swap_bytes()));
    for n in [1 << 32, u64::MAX, i64::MIN as u64, u64::MAX / 33] {
        let is_count = |rule: &Rule| matches!(rule, Rule::Count { .. });
        for (name, bytes) in [
            ("A1 tensor count", with(|r| r.n_tensors = Some(n))),
            ("A1 metadata count", with(|r| r.n_keys = Some(n))),
        ] {
            c.push(Case { name, bytes, is: is_count, place: Header });
        }
    }
    let many = || {
        let mut raw = Raw::empty();
        raw.keys = (0..65_537u32).map(|i| (i.to_le_bytes()[..3].to_vec(), U8, vec![0])).collect();
        raw.bytes()
    };
    case!(c, "A1 65,537 keys", Header, Rule::TooManyKeys(65_537), many());
}

// a table, long because there is a line for each rule
fn metadata(c: &mut Vec<Case>) {
    let last = Place::KeyIndex(Raw::model().keys.len() as u64);
    case!(
        c,
        "A2 empty key",
        last.clone(),
        Rule::KeyEmpty,
        with(|r| {
            r.key("", U8, vec![0]);
        })
    );
    case!(
        c,
        "A2 key too long",
        last.clone(),
        Rule::KeyTooLong(65_536),
        with(|r| {
            r.key(vec![b'k'; 65_536], U8, vec![0]);
        })
    );
    case!(
        c,
        "A2 key not UTF-8",
        last.clone(),
        Rule::KeyNotText,
        with(|r| {
            r.key(b"k\xff", U8, vec![0]);
        })
    );
    case!(
        c,
        "A2 key with NUL",
        last,
        Rule::KeyNotText,
        with(|r| {
            r.key(b"k\0", U8, vec![0]);
        })
    );
    let duplicate = with(|r| r.keys.push((b"general.name".to_vec(), U8, vec![1])));
    case!(c, "A2 duplicate key", key("general.name"), Rule::KeyDuplicate { .. }, duplicate);
    for ty in [13, 14, 255, 1 << 31, u32::MAX] {
        let bytes = with(|r| {
            r.key("x", ty, vec![0; 8]);
        });
        c.push(Case {
            name: "A2 value type",
            bytes,
            is: |r| matches!(r, Rule::ValueType(_)),
            place: key("x"),
        });
        let bytes = with(|r| {
            r.key("x", ARRAY, array(ty, 1, &[0; 8]));
        });
        c.push(Case {
            name: "A2 element type",
            bytes,
            is: |r| matches!(r, Rule::ValueType(_)),
            place: key("x"),
        });
    }
    for n in [1 << 20, 1 << 40, u64::MAX, u64::MAX - 7, i64::MIN as u64] {
        let bytes = with(|r| {
            r.key("x", STRING, n.to_le_bytes().to_vec());
        });
        c.push(Case {
            name: "A2 string length",
            bytes,
            is: |r| matches!(r, Rule::PastEnd { .. }),
            place: key("x"),
        });
        for ty in [U8, U32, U64, STRING, ARRAY, BOOL] {
            let bytes = with(|r| {
                r.key("x", ARRAY, array(ty, n, &[]));
            });
            c.push(Case {
                name: "A2 array length",
                bytes,
                is: |r| matches!(r, Rule::Count { .. }),
                place: key("x"),
            });
        }
        let inner = with(|r| {
            r.key("x", ARRAY, array(STRING, 2, &[string("a"), n.to_le_bytes().to_vec()].concat()));
        });
        c.push(Case {
            name: "A2 element length",
            bytes: inner,
            is: |r| matches!(r, Rule::PastEnd { .. }),
            place: key("x"),
        });
    }
    let deep = |levels: usize| {
        let mut value = array(U8, 1, &[7]);
        for _ in 1..levels {
            value = array(ARRAY, 1, &value);
        }
        with(|r| {
            r.key("x", ARRAY, value);
        })
    };
    case!(c, "A2 arrays 5 deep", key("x"), Rule::TooDeep, deep(5));
    case!(c, "A2 arrays 10,000 deep", key("x"), Rule::TooDeep, deep(10_000));
    case!(c, "A2 array of arrays", key("x"), Rule::NestedArray, deep(2));
    case!(
        c,
        "A2 flag of 2",
        key("x"),
        Rule::Flag(2),
        with(|r| {
            r.key("x", BOOL, vec![2]);
        })
    );
    case!(
        c,
        "A2 flags with 255",
        key("x"),
        Rule::Flag(255),
        with(|r| {
            r.key("x", ARRAY, array(BOOL, 3, &[0, 1, 255]));
        })
    );
}

fn alignment(c: &mut Vec<Case>) {
    let align = |ty, value: Vec<u8>| {
        with(|r| {
            r.key("general.alignment", ty, value);
        })
    };
    let place = || key("general.alignment");
    case!(c, "A3 zero", place(), Rule::Alignment(0), align(U32, le(0)));
    case!(c, "A3 not a power of two", place(), Rule::Alignment(33), align(U32, le(33)));
    case!(c, "A3 above 1 MiB", place(), Rule::Alignment(_), align(U32, le(1 << 21)));
    case!(c, "A3 2^31", place(), Rule::Alignment(_), align(U32, le(1 << 31)));
    case!(c, "A3 u64", place(), Rule::AlignmentType(_), align(U64, 32u64.to_le_bytes().to_vec()));
    case!(c, "A3 string", place(), Rule::AlignmentType(_), align(STRING, string("32")));
}

// a table, long because there is a line for each rule
fn tensors(c: &mut Vec<Case>) {
    const NAME: &str = "output_norm.weight";
    let change = |f: fn(&mut common::RawTensor)| with(|r| f(r.tensor_mut(NAME)));
    let here = || tensor(NAME);
    case!(
        c,
        "A4 name of 64 bytes",
        Place::TensorIndex(1),
        Rule::NameTooLong(64),
        change(|t| t.name = vec![b'a'; 64])
    );
    case!(c, "A4 name of 2^40 bytes", Place::TensorIndex(0), Rule::NameTooLong(_), {
        let mut raw = Raw::empty();
        raw.n_tensors = Some(1);
        [raw.header(), (1u64 << 40).to_le_bytes().to_vec(), vec![0; 64]].concat()
    });
    case!(c, "A4 empty name", Place::TensorIndex(1), Rule::NameEmpty, change(|t| t.name.clear()));
    case!(
        c,
        "A4 name with NUL",
        Place::TensorIndex(1),
        Rule::NameNotText,
        change(|t| t.name = b"a\0b".to_vec())
    );
    case!(
        c,
        "A4 name not UTF-8",
        Place::TensorIndex(1),
        Rule::NameNotText,
        change(|t| t.name = b"\xc3\x28".to_vec())
    );
    case!(
        c,
        "A4 duplicate",
        tensor("token_embd.weight"),
        Rule::NameDuplicate,
        change(|t| t.name = b"token_embd.weight".to_vec())
    );
    case!(c, "A4 no dimensions", here(), Rule::DimCount(0), change(|t| t.dims.clear()));
    case!(c, "A4 five dimensions", here(), Rule::DimCount(5), change(|t| t.dims = vec![1; 5]));
    case!(c, "A4 2^32-1 dimensions", here(), Rule::DimCount(u32::MAX), change(|t| t.n_dims = Some(u32::MAX)));
    case!(c, "A4 dimension 0", here(), Rule::Dim { index: 1, value: 0 }, change(|t| t.dims = vec![32, 0]));
    case!(c, "A4 dimension -1", here(), Rule::Dim { value: -1, .. }, change(|t| t.dims = vec![u64::MAX]));
    case!(
        c,
        "A4 product overflow",
        here(),
        Rule::SizeOverflow(_),
        change(|t| t.dims = vec![1 << 32, 1 << 31])
    );
    case!(
        c,
        "A4 product wraps to 0",
        here(),
        Rule::SizeOverflow(_),
        change(|t| t.dims = vec![1 << 32, 1 << 32])
    );
    case!(c, "A4 bytes overflow", here(), Rule::SizeOverflow(_), change(|t| t.dims = vec![1 << 62]));
    case!(c, "A4 type Q4_2", here(), Rule::TypeRemoved { id: 4, .. }, change(|t| t.ty = 4));
    case!(c, "A4 type Q4_3", here(), Rule::TypeRemoved { id: 5, .. }, change(|t| t.ty = 5));
    case!(c, "A4 type Q4_0_4_4", here(), Rule::TypeRemoved { id: 31, .. }, change(|t| t.ty = 31));
    case!(c, "A4 type 43", here(), Rule::TypeUnknown(43), change(|t| t.ty = 43));
    case!(c, "A4 type 2^31", here(), Rule::TypeUnknown(_), change(|t| t.ty = 1 << 31));
    case!(
        c,
        "A4 row not whole groups",
        here(),
        Rule::RowNotWhole { row: 33, .. },
        change(|t| (t.ty, t.dims[0]) = (8, 33))
    );
    case!(c, "A4 row of a K-quant", here(), Rule::RowNotWhole { row: 32, .. }, change(|t| t.ty = 12));
    case!(c, "A4 offset unaligned", here(), Rule::OffsetUnaligned { .. }, change(|t| t.offset += 1));
    case!(c, "A4 overlap", tensor("output_norm.weight"), Rule::Overlap(_), change(|t| t.offset -= 32));
    case!(c, "A4 same place", tensor("output_norm.weight"), Rule::Overlap(_), change(|t| t.offset = 0));
    case!(c, "A4 offset wraps", here(), Rule::OffsetOverflow { .. }, change(|t| t.offset = u64::MAX - 31));
    case!(c, "A4 offset 2^63-32", here(), Rule::OffsetOverflow { .. }, change(|t| t.offset = (1 << 63) - 32));
    case!(c, "A4 past the end", here(), Rule::Truncated { .. }, change(|t| t.offset = 1 << 40));
    case!(
        c,
        "A4 larger than the file",
        tensor("blk.2.ffn_down.weight"),
        Rule::Truncated { .. },
        with(|r| {
            r.tensor_mut("blk.2.ffn_down.weight").dims[1] = 1 << 30;
        })
    );
}

// a table, long because there is a line for each rule
fn hparams(c: &mut Vec<Case>) {
    /// A number of the model, changed.
    macro_rules! number {
        ($text:literal, $key:literal, $value:expr) => {
            case!(
                c,
                $text,
                key(concat!("llama.", $key)),
                Rule::Hparam { .. },
                with(|r| {
                    r.key(concat!("llama.", $key), U32, le($value));
                })
            );
        };
    }
    macro_rules! real {
        ($text:literal, $key:literal, $value:expr) => {
            case!(
                c,
                $text,
                key(concat!("llama.", $key)),
                Rule::Hparam { .. },
                with(|r| {
                    r.key(concat!("llama.", $key), F32, float($value));
                })
            );
        };
    }
    number!("A5 no blocks", "block_count", 0);
    number!("A5 513 blocks", "block_count", 513);
    number!("A5 2^32-1 blocks", "block_count", u32::MAX);
    number!("A5 no width", "embedding_length", 0);
    number!("A5 context 0", "context_length", 0);
    number!("A5 context 2^32-1", "context_length", u32::MAX);
    number!("A5 no feed-forward", "feed_forward_length", 0);
    number!("A5 no heads", "attention.head_count", 0);
    number!("A5 heads do not divide the width", "attention.head_count", 6);
    number!("A5 more kv heads than heads", "attention.head_count_kv", 8);
    number!("A5 no kv heads", "attention.head_count_kv", 0);
    number!("A5 kv heads do not divide", "attention.head_count_kv", 3);
    number!("A5 key length 0", "attention.key_length", 0);
    number!("A5 value length differs", "attention.value_length", 16);
    number!("A5 rotation of an odd count", "rope.dimension_count", 7);
    number!("A5 rotation beyond the head", "rope.dimension_count", 16);
    number!("A5 rotation of half a head", "rope.dimension_count", 4);
    number!("A5 1025 experts", "expert_count", 1025);
    number!("A5 experts used without experts", "expert_used_count", 2);
    number!("A5 more nextn blocks than blocks", "nextn_predict_layers", 4);
    number!("A5 pooling", "pooling_type", 7);
    number!("A5 gating function", "expert_gating_func", 9);
    number!("A5 original context 0", "rope.scaling.original_context_length", 0);
    real!("A5 eps NaN", "attention.layer_norm_rms_epsilon", f32::NAN);
    real!("A5 eps negative", "attention.layer_norm_rms_epsilon", -1e-5);
    real!("A5 eps zero", "attention.layer_norm_rms_epsilon", 0.0);
    real!("A5 eps infinite", "attention.layer_norm_rms_epsilon", f32::INFINITY);
    real!("A5 freq_base zero", "rope.freq_base", 0.0);
    real!("A5 freq_base negative", "rope.freq_base", -1.0);
    real!("A5 freq_base NaN", "rope.freq_base", f32::NAN);
    real!("A5 scaling factor negative", "rope.scaling.factor", -2.0);
    real!("A5 any number infinite", "logit_scale", f32::NEG_INFINITY);
    /// Several numbers of the experts at once.
    macro_rules! experts {
        ($text:literal, $at:literal, $($key:literal = $value:expr),*) => {
            case!(c, $text, key(concat!("llama.", $at)), Rule::Hparam { .. }, with(|r| {
                $(r.key(concat!("llama.", $key), U32, le($value));)*
            }));
        };
    }
    experts!(
        "A5 more experts used than there are",
        "expert_used_count",
        "expert_count" = 4,
        "expert_used_count" = 5
    );
    experts!("A5 no expert used", "expert_used_count", "expert_count" = 4, "expert_used_count" = 0);
    experts!("A5 nothing about used experts", "expert_used_count", "expert_count" = 4);
    experts!(
        "A5 as many groups as experts",
        "expert_group_count",
        "expert_count" = 4,
        "expert_used_count" = 2,
        "expert_group_count" = 4
    );
    experts!(
        "A5 groups do not divide",
        "expert_group_count",
        "expert_count" = 4,
        "expert_used_count" = 2,
        "expert_group_count" = 3
    );
    experts!(
        "A5 no group used",
        "expert_group_used_count",
        "expert_count" = 4,
        "expert_used_count" = 2,
        "expert_group_count" = 2
    );
    experts!("A5 groups without experts", "expert_group_count", "expert_group_count" = 2);
    let per_block = |n: u64, ty, bytes: &[u8]| {
        with(|r| {
            r.key("llama.attention.head_count", ARRAY, array(ty, n, bytes));
        })
    };
    case!(
        c,
        "A5 heads for two of three blocks",
        key("llama.attention.head_count"),
        Rule::Hparam { .. },
        per_block(2, U32, &[le(4), le(4)].concat())
    );
    case!(
        c,
        "A5 negative heads",
        key("llama.attention.head_count"),
        Rule::Hparam { .. },
        per_block(3, I32, &[le(4), le(4), le(u32::MAX)].concat())
    );
    case!(
        c,
        "A5 heads as floats",
        key("llama.attention.head_count"),
        Rule::KeyType { .. },
        per_block(3, F32, &[0; 12])
    );
    case!(
        c,
        "A5 blocks as u64",
        key("llama.block_count"),
        Rule::KeyType { .. },
        with(|r| {
            r.key("llama.block_count", U64, 3u64.to_le_bytes().to_vec());
        })
    );
    case!(
        c,
        "A5 eps as u32",
        key("llama.attention.layer_norm_rms_epsilon"),
        Rule::KeyType { .. },
        with(|r| {
            r.key("llama.attention.layer_norm_rms_epsilon", U32, le(1));
        })
    );
    case!(
        c,
        "A5 unknown scaling",
        key("llama.rope.scaling.type"),
        Rule::Hparam { .. },
        with(|r| {
            r.key("llama.rope.scaling.type", STRING, string("cubic"));
        })
    );
    case!(
        c,
        "A5 no architecture",
        key("general.architecture"),
        Rule::KeyMissing,
        with(|r| {
            r.without("general.architecture");
        })
    );
    case!(
        c,
        "A5 architecture a number",
        key("general.architecture"),
        Rule::KeyType { .. },
        with(|r| {
            r.key("general.architecture", U32, le(1));
        })
    );
    case!(
        c,
        "A5 no block count",
        key("llama.block_count"),
        Rule::KeyMissing,
        with(|r| {
            r.without("llama.block_count");
        })
    );
    case!(
        c,
        "A5 a block without tensors",
        tensor("blk.3.*"),
        Rule::TensorMissing { blocks: 4 },
        with(|r| {
            r.key("llama.block_count", U32, le(4));
        })
    );
    case!(
        c,
        "A5 tensors without a block",
        tensor("blk.2.attn_norm.weight"),
        Rule::Hparam { .. },
        with(|r| {
            r.key("llama.block_count", U32, le(2));
        })
    );
    case!(
        c,
        "A5 norm stored as F16",
        tensor("blk.0.attn_norm.weight"),
        Rule::TensorTypeForbidden { .. },
        with(|r| r.tensor_mut("blk.0.attn_norm.weight").ty = 1)
    );
    case!(
        c,
        "A5 weights stored as integers",
        tensor("blk.0.attn_q.weight"),
        Rule::TensorTypeForbidden { .. },
        with(|r| r.tensor_mut("blk.0.attn_q.weight").ty = 25)
    );
    case!(
        c,
        "A5 embedding of another width",
        tensor("token_embd.weight"),
        Rule::TensorShape { .. },
        with(|r| r.tensor_mut("token_embd.weight").dims = vec![16, N_TOKENS])
    );
    case!(
        c,
        "A5 no embedding",
        tensor("token_embd.weight"),
        Rule::TensorMissing { .. },
        with(|r| r.tensor_mut("token_embd.weight").name = b"other".to_vec())
    );
}

// a table, long because there is a line for each rule
fn tokenizer(c: &mut Vec<Case>) {
    let tokens = |n: u64, text: &dyn Fn(u64) -> Vec<u8>| {
        let all: Vec<u8> = (0..n).flat_map(|i| string(text(i))).collect();
        array(STRING, n, &all)
    };
    const TOKENS: &str = "tokenizer.ggml.tokens";
    let with_tokens = |value: Vec<u8>| {
        with(|r| {
            r.key(TOKENS, ARRAY, value);
        })
    };
    let named = |i: u64| format!("t{i}").into_bytes();
    case!(
        c,
        "A6 duplicate token",
        key(TOKENS),
        Rule::TokenDuplicate { first: 3, second: 299, .. },
        with_tokens(tokens(N_TOKENS, &|i| if i == 299 { named(3) } else { named(i) }))
    );
    case!(
        c,
        "A6 duplicate up to a NUL",
        key(TOKENS),
        Rule::TokenDuplicate { .. },
        with_tokens(tokens(N_TOKENS, &|i| if i == 299 { b"t3\0x".to_vec() } else { named(i) }))
    );
    case!(
        c,
        "A6 name given to an empty token",
        key(TOKENS),
        Rule::TokenDuplicate { first: 5, second: 6, .. },
        with_tokens(tokens(N_TOKENS, &|i| match i {
            5 => Vec::new(),
            6 => b"[EMPTY_5]".to_vec(),
            _ => named(i),
        }))
    );
    case!(
        c,
        "A6 fewer tokens than rows",
        key(TOKENS),
        Rule::Hparam { .. },
        with_tokens(tokens(N_TOKENS - 1, &named))
    );
    case!(
        c,
        "A6 tokens of another type",
        key(TOKENS),
        Rule::KeyType { .. },
        with_tokens(array(I32, N_TOKENS, &[0; 1200]))
    );
    case!(
        c,
        "A6 no tokens",
        key(TOKENS),
        Rule::KeyMissing,
        with(|r| {
            r.without(TOKENS);
        })
    );
    case!(
        c,
        "A6 no tokenizer",
        key("tokenizer.ggml.model"),
        Rule::KeyMissing,
        with(|r| {
            r.without("tokenizer.ggml.model");
        })
    );
    case!(
        c,
        "A6 scores too short",
        key("tokenizer.ggml.scores"),
        Rule::Hparam { .. },
        with(|r| {
            r.key("tokenizer.ggml.scores", ARRAY, array(F32, 10, &[0; 40]));
        })
    );
    case!(
        c,
        "A6 scores as strings",
        key("tokenizer.ggml.scores"),
        Rule::KeyType { .. },
        with(|r| {
            r.key("tokenizer.ggml.scores", ARRAY, array(STRING, 1, &string("1")));
        })
    );
    case!(
        c,
        "A6 score NaN",
        key("tokenizer.ggml.scores"),
        Rule::Hparam { .. },
        with(|r| {
            r.key(
                "tokenizer.ggml.scores",
                ARRAY,
                array(F32, N_TOKENS, &float(f32::NAN).repeat(N_TOKENS as usize)),
            );
        })
    );
    case!(
        c,
        "A6 types too short",
        key("tokenizer.ggml.token_type"),
        Rule::Hparam { .. },
        with(|r| {
            r.key("tokenizer.ggml.token_type", ARRAY, array(I32, 10, &[0; 40]));
        })
    );
    case!(
        c,
        "A6 types as u32",
        key("tokenizer.ggml.token_type"),
        Rule::KeyType { .. },
        with(|r| {
            r.key("tokenizer.ggml.token_type", ARRAY, array(U32, N_TOKENS, &[0; 1200]));
        })
    );
    case!(
        c,
        "A6 begin outside the vocabulary",
        key("tokenizer.ggml.bos_token_id"),
        Rule::Hparam { .. },
        with(|r| {
            r.key("tokenizer.ggml.bos_token_id", U32, le(300));
        })
    );
    case!(
        c,
        "A6 end -1",
        key("tokenizer.ggml.eos_token_id"),
        Rule::KeyType { .. },
        with(|r| {
            r.key("tokenizer.ggml.eos_token_id", I32, le(u32::MAX));
        })
    );
    case!(
        c,
        "A6 merges as numbers",
        key("tokenizer.ggml.merges"),
        Rule::KeyType { .. },
        with(|r| {
            r.key("tokenizer.ggml.merges", ARRAY, array(I32, 1, &[0; 4]));
        })
    );
    case!(
        c,
        "A6 add_bos a number",
        key("tokenizer.ggml.add_bos_token"),
        Rule::KeyType { .. },
        with(|r| {
            r.key("tokenizer.ggml.add_bos_token", U32, le(1));
        })
    );
    case!(
        c,
        "A6 negative byte token",
        key(TOKENS),
        Rule::Hparam { .. },
        with(|r| {
            r.key(TOKENS, ARRAY, tokens(N_TOKENS, &|i| if i == 7 { b"<0x-1>".to_vec() } else { named(i) }));
            let types: Vec<u8> = (0..N_TOKENS).flat_map(|i| le(if i == 7 { 6 } else { 1 })).collect();
            r.key("tokenizer.ggml.token_type", ARRAY, array(I32, N_TOKENS, &types));
        })
    );
    case!(
        c,
        "A6 no bytes to fall back to",
        key(TOKENS),
        Rule::Hparam { .. },
        with(|r| {
            r.key("tokenizer.ggml.model", STRING, string("llama"));
        })
    );
    case!(
        c,
        "A6 made-up tokens",
        key("llama.vocab_size"),
        Rule::Hparam { .. },
        with(|r| {
            r.key("tokenizer.ggml.model", STRING, string("none"));
            r.key("llama.vocab_size", U32, le(u32::MAX));
        })
    );
}

fn truncated(c: &mut Vec<Case>) {
    let whole = Raw::model().bytes();
    case!(
        c,
        "A7 one byte short",
        tensor("blk.2.ffn_down.weight"),
        Rule::Truncated { short_by: 1 },
        whole[..whole.len() - 1].to_vec()
    );
    case!(c, "A7 half", tensor("blk.0.ffn_down.weight"), Rule::Truncated { .. }, {
        let raw = Raw::model();
        let start = raw.header().len().next_multiple_of(32);
        let offset = raw.tensors.iter().find(|t| t.name == b"blk.0.ffn_down.weight").unwrap().offset as usize;
        whole[..start + offset + 100].to_vec()
    });
}

fn check(bytes: Vec<u8>) -> Result<(), Error> {
    check::model(&Gguf::from_bytes(bytes)?).map(drop)
}

#[test]
fn the_model_that_the_cases_change_is_accepted() {
    check(Raw::model().bytes()).unwrap();
}

/// llama.cpp does without such an id, and models with one are about.
#[test]
fn a_padding_id_outside_the_vocabulary_is_accepted() {
    check(with(|r| {
        r.key("tokenizer.ggml.padding_token_id", U32, le(N_TOKENS as u32));
    }))
    .unwrap();
}

#[test]
fn every_row_is_a_named_error_with_its_place() {
    let cases = cases();
    assert!(cases.len() > 150, "{} cases", cases.len());
    for case in cases {
        let started = Instant::now();
        let error = match check(case.bytes) {
            Ok(()) => panic!("{}: accepted", case.name),
            Err(e) => e,
        };
        assert!((case.is)(&error.rule), "{}: {error}", case.name);
        assert_eq!(error.place, case.place, "{}: {error}", case.name);
        assert!(started.elapsed() < Duration::from_millis(500), "{}: {:?}", case.name, started.elapsed());
        // whoever reads it sees the file and one line
        let text = error.to_string();
        assert!(text.starts_with("<memory>: ") && !text.contains('\n'), "{text}");
    }
}

#[test]
fn errors_name_the_byte() {
    let mut raw = Raw::model();
    raw.tensor_mut("output_norm.weight").ty = 99;
    let bytes = raw.bytes();
    let name_at = bytes.windows(18).position(|w| w == b"output_norm.weight").unwrap();
    let error = check(bytes).unwrap_err();
    // behind the name: dimension count, one dimension, then the type
    assert_eq!(error.offset, Some((name_at + 18 + 4 + 8) as u64));
    assert!(error.to_string().contains(&format!("tensor 'output_norm.weight' at byte {}", name_at + 30)));
}

/// The program on a file, in a process that may not allocate more than `kib`. What is measured is the reader: renumbered
/// slices are planned without llama.cpp, which takes a lot more.
fn run(path: &Path, kib: u64) -> Output {
    let script = r#"ulimit -v "$1" && exec "$2" --dry-run --renumber --middle 1..1 "$3""#;
    Command::new("sh")
        .args(["-c", script, "sh", &kib.to_string(), env!("CARGO_BIN_EXE_dim-split")])
        .arg(path)
        .output()
        .unwrap()
}

/// What the program takes to refuse three bytes, in KiB.
fn floor(dir: &Path) -> u64 {
    let path = dir.join("floor.gguf");
    std::fs::write(&path, b"GGU").unwrap();
    let mut floor = 2 << 10;
    while run(&path, floor).status.code() != Some(2) {
        floor += 256;
        assert!(floor < 1 << 20, "the program does not start in 1 GiB");
    }
    floor
}

const ALLOWED_KIB: u64 = 8 << 10;

#[test]
fn no_case_costs_more_than_8_mib_or_a_signal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("case.gguf");
    let floor = floor(dir.path());
    let mut tried = 0;
    for case in cases() {
        assert!(case.bytes.len() < 2 << 20, "{}: {} bytes", case.name, case.bytes.len());
        std::fs::write(&path, &case.bytes).unwrap();
        let asked = Command::new(env!("CARGO_BIN_EXE_dim-split"))
            .args(["--dry-run", "--middle", "1..1"])
            .arg(&path)
            .output()
            .unwrap();
        for out in [run(&path, floor + ALLOWED_KIB), asked] {
            let text = String::from_utf8_lossy(&out.stderr);
            assert_eq!(out.status.signal(), None, "{}: {text}", case.name);
            assert_eq!(out.status.code(), Some(2), "{}: {text}", case.name);
            // one line that says what is wrong, and at most one that says what to do
            assert!(text.starts_with("error: ") && text.lines().count() <= 2, "{}: {text}", case.name);
            assert!(text.lines().skip(1).all(|line| line.starts_with("hint: ")), "{}: {text}", case.name);
        }
        tried += 1;
    }
    assert!(tried > 150);
    // the limit bites: the same room is not enough for a model with a 12 MiB key
    let mut raw = Raw::model();
    raw.key("padding", STRING, string(vec![b'x'; 12 << 20]));
    std::fs::write(&path, raw.bytes()).unwrap();
    assert_ne!(run(&path, floor + ALLOWED_KIB).status.code(), Some(0));
    assert_eq!(run(&path, floor + (80 << 10)).status.code(), Some(0));
}

/// Files of almost 1 MiB that make the most of what a header may hold.
#[test]
fn crowded_headers_cost_no_more_than_8_mib() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("crowded.gguf");
    let floor = floor(dir.path());
    let keys = {
        let mut raw = Raw::empty();
        raw.keys = (0..62_000u32)
            .map(|i| ([i % 100, i / 100 % 100, i / 10_000].map(|d| d as u8 + 20).to_vec(), U8, vec![0]))
            .collect();
        raw.bytes()
    };
    let tensors = {
        let mut raw = Raw::empty();
        raw.alignment = 4;
        raw.key("general.alignment", U32, le(4));
        for i in 0..22_000 {
            raw.tensor(&format!("{i:05}"), 0, &[1]);
        }
        raw.bytes()
    };
    let tokens = {
        let mut raw = Raw::model();
        let n = 80_000;
        raw.key("llama.embedding_length", U32, le(1));
        raw.key("llama.attention.head_count", U32, le(1));
        raw.key("llama.attention.head_count_kv", U32, le(1));
        for length in ["attention.key_length", "attention.value_length", "rope.dimension_count"] {
            raw.key(format!("llama.{length}"), U32, le(2));
        }
        raw.without("tokenizer.ggml.token_type");
        raw.key("tokenizer.ggml.tokens", ARRAY, array(STRING, n, &string("").repeat(n as usize)));
        raw.data.clear();
        raw.tensors.clear();
        raw.tensor("token_embd.weight", 1, &[1, n]);
        (0..3).for_each(|block| {
            raw.tensor(&format!("blk.{block}.attn_norm.weight"), 0, &[1]);
            raw.tensor(&format!("blk.{block}.attn_qkv.weight"), 0, &[1]);
        });
        raw.bytes()
    };
    for (what, bytes, code) in [("keys", keys, 2), ("tensors", tensors, 2), ("tokens", tokens, 0)] {
        assert!(bytes.len() < 1 << 20 && bytes.len() > 800_000, "{what}: {} bytes", bytes.len());
        std::fs::write(&path, &bytes).unwrap();
        let out = run(&path, floor + ALLOWED_KIB);
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{what}: {:?}: {text}", out.status);
    }
}

#[test]
fn truncated_anywhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    common::tiny("qwen2", &path);
    let whole = std::fs::read(&path).unwrap();
    let data_offset = Gguf::open(&path).unwrap().data_offset() as usize;
    let mut rng = Rng(7);
    let last = Gguf::open(&path).unwrap().tensors().map(|t| t.file_offset() + t.n_bytes()).max().unwrap();
    let offsets = (0..data_offset)
        .chain((0..1000).map(|_| data_offset + rng.below(last - data_offset as u64) as usize));
    let mut tried = 0;
    for len in offsets {
        let error = Gguf::from_bytes(whole[..len].to_vec()).map(drop).unwrap_err();
        if len >= data_offset {
            assert!(matches!(*error.rule, Rule::Truncated { .. }), "{len}: {error}");
            assert!(
                error.to_string().contains("short here") && error.to_string().contains("download"),
                "{error}"
            );
        }
        tried += 1;
    }
    assert_eq!(tried, data_offset + 1000);
}

/// Whatever is accepted has its tensors inside the file and apart from each other, by arithmetic in 128 bits.
#[test]
fn accepted_files_keep_their_tensors_inside_and_apart() {
    let whole = Raw::model().bytes();
    let header = Raw::model().header().len();
    let mut rng = Rng(20_261_122);
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..200_000 {
        let mut bytes = whole.clone();
        rng.mutate(&mut bytes, header);
        let len = bytes.len() as u128;
        let Ok(gguf) = Gguf::from_bytes(bytes) else {
            refused += 1;
            continue;
        };
        accepted += 1;
        let mut ranges: Vec<(u128, u128)> = gguf
            .tensors()
            .map(|t| {
                let elements: u128 = t.dims().iter().map(|&d| u128::from(d)).product();
                let ty = t.tensor_type();
                let bytes = elements / u128::from(ty.block_len()) * u128::from(ty.block_bytes());
                assert_eq!(bytes, u128::from(t.n_bytes()));
                let start = u128::from(gguf.data_offset()) + u128::from(t.offset());
                assert_eq!(t.data().unwrap().len() as u128, bytes);
                (start, start + bytes)
            })
            .collect();
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|w| w[0].1 <= w[1].0));
        assert!(ranges.iter().all(|r| r.1 <= len));
        // and what it says can be read to the end
        for entry in gguf.metadata() {
            if let Some(array) = entry.value.as_array() {
                assert_eq!(array.iter().count() as u64, array.len());
            }
        }
        let _ = check::model(&gguf);
    }
    assert!(accepted > 5_000 && refused > 5_000, "{accepted} accepted, {refused} refused");
}
