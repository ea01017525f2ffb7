//! Files that our reader accepts do not end the process that llama.cpp runs in.
//!
//! Models are changed at random, in their bytes and in their keys. What [`check::model`] accepts is loaded by
//! llama.cpp in a child process, which also tokenises, evaluates and prints what it gets. An error is a good
//! answer; a signal is not. Before and after the checks: the same mutants without them end the child, so the test
//! can fail.
#![cfg(feature = "engine")]

mod common;

use std::path::Path;

use common::{Rng, child, child::Child, write_with};
use gguf_tools::{
    gguf::{
        Array, Gguf, Value, ValueType, check,
        write::{GgufWriter, TensorSpec},
    },
    synth::Spec,
};
use llama_sys_patch::{ContextParams, Model, ModelParams, Row, Stock};

const MUTANTS: usize = 1000;

/// The child: loads and runs every file it is told, and says so.
#[test]
fn loads_what_it_is_told() {
    child::serve(load_and_run);
}

fn load_and_run(path: &Path) -> Result<(), llama_sys_patch::Error> {
    let model = Model::load(&[path], ModelParams { gpu_layers: Some(0), ..Default::default() })?;
    let mut tokens = vec![3, 5];
    if model.has_tokenizer() {
        tokens.extend(model.tokenize("Hello, \u{1F44B} world\n\x01", true, true)?);
        for &token in &tokens {
            model.token_bytes(token)?;
        }
    }
    tokens.truncate(24);
    let context = ContextParams { n_ctx: 64, n_batch: 32, n_ubatch: 32, n_threads: 1, ..Default::default() };
    let mut stock = Stock::new(&model, &context, Some(1))?;
    let mut logits = vec![0.0; model.n_vocab()];
    for (position, &token) in tokens.iter().enumerate().take(4) {
        let row = Row { session: 0, position: position as u32, want_output: true };
        stock.decode(&[row], &[token], &mut logits)?;
    }
    Ok(())
}

/// A file with one to three keys changed, or with bytes changed.
fn mutate(model: &Gguf, bytes: &[u8], rng: &mut Rng, to: &Path) -> bool {
    if rng.below(3) == 0 {
        let mut changed = bytes.to_vec();
        rng.mutate(&mut changed, model.data_offset() as usize);
        std::fs::write(to, &changed).unwrap();
        return changed != bytes;
    }
    let mut metadata: Vec<(String, Value<'_>)> =
        model.metadata().map(|e| (e.key.to_owned(), e.value)).collect();
    let arch = model.get("general.architecture").unwrap().as_str().unwrap().to_owned();
    for _ in 0..1 + rng.below(3) {
        let at = rng.below(metadata.len() as u64) as usize;
        match rng.below(8) {
            0 => {
                metadata.remove(at);
            }
            1 => {
                // a key that llama.cpp knows and this model does not have
                let (name, value) = EXTRA[rng.below(EXTRA.len() as u64) as usize];
                let key = format!("{arch}.{name}");
                let value = match value {
                    0 => Value::U32(edge(rng)),
                    1 => Value::F32(float(rng)),
                    _ => Value::Bool(rng.below(2) == 1),
                };
                metadata.retain(|(k, _)| *k != key);
                metadata.push((key, value));
            }
            _ => metadata[at].1 = change(&metadata[at].1, rng),
        }
    }
    let mut specs: Vec<_> =
        model.tensors().map(|t| TensorSpec::new(t.name(), t.tensor_type(), t.dims())).collect();
    if rng.below(6) == 0 {
        // two tensors of one size trade places, or a row becomes a column
        let (a, b) = (rng.below(specs.len() as u64) as usize, rng.below(specs.len() as u64) as usize);
        if rng.below(2) == 0 && specs[a].n_bytes() == specs[b].n_bytes() {
            let name = specs[a].name.clone();
            specs[a].name = std::mem::replace(&mut specs[b].name, name);
        } else if specs[a].dims.len() == 1 {
            specs[a].dims = vec![1, specs[a].dims[0]];
        }
    }
    let Ok(mut writer) = GgufWriter::create(to, &metadata, &specs) else { return false };
    for tensor in model.tensors() {
        if writer.write(tensor.data().unwrap()).is_err() {
            return false;
        }
    }
    writer.finish().is_ok()
}

/// Keys below the architecture's name; 0: u32, 1: f32, 2: bool.
const EXTRA: &[(&str, u8)] = &[
    ("vocab_size", 0),
    ("expert_count", 0),
    ("expert_used_count", 0),
    ("expert_group_count", 0),
    ("expert_group_used_count", 0),
    ("expert_gating_func", 0),
    ("expert_shared_feed_forward_length", 0),
    ("expert_feed_forward_length", 0),
    ("nextn_predict_layers", 0),
    ("attention.sliding_window", 0),
    ("attention.sliding_window_pattern", 0),
    ("attention.key_length", 0),
    ("attention.value_length", 0),
    ("attention.key_length_swa", 0),
    ("attention.value_length_swa", 0),
    ("rope.dimension_count", 0),
    ("rope.dimension_count_swa", 0),
    ("rope.scaling.original_context_length", 0),
    ("pooling_type", 0),
    ("classifier.pooling_type", 0),
    ("embedding_length_out", 0),
    ("n_deepstack_layers", 0),
    ("leading_dense_block_count", 0),
    ("attention.temperature_length", 0),
    ("rope.freq_base", 1),
    ("rope.freq_base_swa", 1),
    ("rope.scaling.factor", 1),
    ("rope.scale_linear", 1),
    ("rope.scaling.attn_factor", 1),
    ("rope.scaling.yarn_log_multiplier", 1),
    ("rope.scaling.yarn_ext_factor", 1),
    ("rope.scaling.yarn_beta_fast", 1),
    ("attention.temperature_scale", 1),
    ("attention.scale", 1),
    ("attention.clamp_kqv", 1),
    ("attention.max_alibi_bias", 1),
    ("attention.layer_norm_epsilon", 1),
    ("attention.layer_norm_rms_epsilon", 1),
    ("logit_scale", 1),
    ("residual_scale", 1),
    ("embedding_scale", 1),
    ("final_logit_softcapping", 1),
    ("attn_logit_softcapping", 1),
    ("expert_weights_scale", 1),
    ("attention.causal", 2),
    ("use_parallel_residual", 2),
    ("rope.scaling.finetuned", 2),
    ("expert_weights_norm", 2),
];

fn edge(rng: &mut Rng) -> u32 {
    let edges =
        [0, 1, 2, 3, 4, 7, 8, 16, 31, 64, 127, 128, 256, 511, 512, 513, 1024, 1 << 16, 1 << 31, u32::MAX];
    edges[rng.below(edges.len() as u64) as usize]
}

fn float(rng: &mut Rng) -> f32 {
    let edges =
        [0.0, -0.0, 1.0, -1.0, 1e-38, 1e38, -1e38, 0.5, 2.0, 1e-6, 1e4, 1e6, f32::MIN_POSITIVE, f32::MAX];
    edges[rng.below(edges.len() as u64) as usize]
}

/// Another value of the same type, or now and then of another.
fn change(value: &Value<'_>, rng: &mut Rng) -> Value<'static> {
    match value {
        _ if rng.below(20) == 0 => Value::U64(rng.next()),
        Value::U32(n) if rng.below(2) == 0 => Value::U32(n.wrapping_add(rng.below(5) as u32).wrapping_sub(2)),
        Value::U32(_) => Value::U32(edge(rng)),
        Value::I32(_) => Value::I32(edge(rng) as i32),
        Value::F32(_) => Value::F32(float(rng)),
        Value::Bool(b) => Value::Bool(!b),
        Value::String(text) => {
            let words = [
                "", "none", "llama", "gpt2", "bert", "t5", "rwkv", "yarn", "longrope", "linear", "qwen2",
                "default",
            ];
            match rng.below(3) {
                0 => Value::string(words[rng.below(words.len() as u64) as usize]),
                1 => Value::String(text.iter().copied().chain([0xff]).collect::<Vec<u8>>().into()),
                _ => Value::String(text.iter().copied().skip(1).collect::<Vec<u8>>().into()),
            }
        }
        Value::Array(array) => match array.element_type() {
            ValueType::String => {
                let mut items: Vec<Vec<u8>> = array.strings().map(<[u8]>::to_vec).collect();
                if items.is_empty() {
                    return Value::Array(array.clone().into_owned());
                }
                for _ in 0..1 + rng.below(4) {
                    let at = rng.below(items.len() as u64) as usize;
                    match rng.below(7) {
                        0 => items[at].clear(),
                        1 => items[at] = b"<0x-1>".to_vec(),
                        2 => items[at] = b"a\0b".to_vec(),
                        3 => items[at] = vec![0xff, 0xfe],
                        4 => items[at] = vec![b'x'; 5000],
                        5 => items[at] = b" ".to_vec(),
                        _ => items.truncate(at + 1),
                    }
                }
                Value::Array(Array::of_strings(items))
            }
            ValueType::I32 => {
                let mut items: Vec<i32> =
                    array.iter().map(|v| if let Value::I32(n) = v { n } else { 0 }).collect();
                let at = rng.below(items.len() as u64) as usize;
                items[at] = [0, 1, 2, 3, 4, 5, 6, 7, -1, i32::MAX][rng.below(10) as usize];
                Value::Array(Array::of_i32(items))
            }
            _ => Value::Array(array.slice(0..array.len() / 2).unwrap()),
        },
        other => other.clone().into_owned(),
    }
}

#[test]
fn accepted_mutants_do_not_end_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let models: Vec<_> =
        ["qwen2", "llama", "qwen3moe", "granite", "starcoder2", "gptneox", "phi3", "minicpm"]
            .into_iter()
            .map(|arch| {
                let path = dir.path().join(format!("{arch}.gguf"));
                Spec::tiny(arch).unwrap().blocks(2).write(&path).unwrap();
                (Gguf::open(&path).unwrap(), std::fs::read(&path).unwrap())
            })
            .collect();
    let path = dir.path().join("mutant.gguf");
    // another seed, other mutants
    let seed = std::env::var("DIM_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_261_122);
    let mut rng = Rng(seed);
    let mut child = Child::start("loads_what_it_is_told");
    for (gguf, _) in &models {
        check::model(gguf).unwrap();
        assert_eq!(child.load(gguf.path()), Ok("ran".into()), "{}", gguf.path().display());
    }
    let (mut accepted, mut refused_by_us, mut ran, mut refused) = (0, 0, 0, 0);
    let mut failures = Vec::new();
    while accepted < MUTANTS {
        let (gguf, bytes) = &models[rng.below(models.len() as u64) as usize];
        if !mutate(gguf, bytes, &mut rng, &path) {
            continue;
        }
        match Gguf::open(&path).and_then(|g| check::model(&g)) {
            Ok(_) => accepted += 1,
            Err(_) => {
                refused_by_us += 1;
                continue;
            }
        }
        match child.load(&path) {
            Ok(verdict) if verdict == "ran" => ran += 1,
            Ok(_) => refused += 1,
            Err(signal) => {
                let kept = std::env::temp_dir().join(format!("mutant-{}.gguf", failures.len()));
                std::fs::copy(&path, &kept).unwrap();
                failures.push(format!("signal {signal}, kept as {}", kept.display()));
                child = Child::start("loads_what_it_is_told");
            }
        }
    }
    eprintln!(
        "{accepted} accepted: {ran} ran, {refused} refused by llama.cpp; {refused_by_us} refused by us"
    );
    assert!(failures.is_empty(), "{} of {accepted}:\n{}", failures.len(), failures.join("\n"));
    assert!(ran > MUTANTS / 10 && refused > MUTANTS / 50, "{ran} ran, {refused} refused");
}

/// The other half of the claim: without our checks, such files do end the process.
#[test]
fn what_we_refuse_does_end_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let changed = dir.path().join("changed.gguf");
    Spec::tiny("qwen2").unwrap().blocks(2).write(&path).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    let mut child = Child::start("loads_what_it_is_told");
    let mut ended = 0;
    for (key, value) in [
        ("qwen2.block_count", Value::U32(0)),
        ("qwen2.block_count", Value::U32(513)),
        ("qwen2.attention.layer_norm_rms_epsilon", Value::F32(-1.0)),
        ("qwen2.rope.scaling.type", Value::string("cubic")),
        ("qwen2.expert_count", Value::U32(5000)),
        ("qwen2.attention.value_length", Value::U32(32)),
    ] {
        let mut metadata: Vec<(String, Value<'_>)> =
            gguf.metadata().map(|e| (e.key.to_owned(), e.value)).collect();
        metadata.retain(|(k, _)| k != key);
        metadata.push((key.to_owned(), value));
        write_with(&gguf, &changed, &metadata);
        let error = Gguf::open(&changed).and_then(|g| check::model(&g)).unwrap_err();
        assert!(error.to_string().contains(key), "{error}");
        let verdict = child.load(&changed);
        match verdict {
            Err(_) => {
                ended += 1;
                child = Child::start("loads_what_it_is_told");
            }
            Ok(verdict) => eprintln!("{key}: {verdict}"),
        }
    }
    assert!(ended >= 4, "{ended} of 6 ended the process");
}
