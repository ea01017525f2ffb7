//! Models whose blocks cannot be evaluated apart are refused when a stage is made, by name and with the reason; never
//! evaluated wrongly. The synthesiser makes only models that can be cut, so these are written by hand: loadable, small.

mod common;

use common::{Chain, Wire, assert_exact, context, decode, pipeline, stock, tokens};
use gguf_tools::gguf::write::{GgufWriter, TensorSpec};
use gguf_tools::gguf::{TensorType, Value};
use llama_sys_patch::test_support as tiny;
use llama_sys_patch::{
    Error, GraphPlan, Model, ModelParams, Reason, Refusal, Row, Stage, StageParams, State, StateKind,
};

const N_EMBD: u64 = 64;
const N_BLOCKS: u64 = 4;
const N_VOCAB: u64 = 100;
const N_CTX: u64 = 256;

/// A model without a tokenizer: keys and tensors as given, blocks' tensors once per block.
fn write(arch: &str, keys: &[(&str, Value<'static>)], tensors: &[(&str, &[u64])]) -> Model {
    let mut metadata = vec![
        ("general.architecture".to_owned(), Value::String(arch.as_bytes().to_vec().into())),
        ("tokenizer.ggml.model".to_owned(), Value::String(b"none".as_slice().into())),
    ];
    let mut put = |key: &str, value| {
        let key = if key.contains("tokenizer") { key.to_owned() } else { format!("{arch}.{key}") };
        metadata.push((key, value));
    };
    put("vocab_size", Value::U32(N_VOCAB as u32));
    put("context_length", Value::U32(N_CTX as u32));
    put("embedding_length", Value::U32(N_EMBD as u32));
    put("block_count", Value::U32(N_BLOCKS as u32));
    for (key, value) in keys {
        put(key, value.clone());
    }
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .flat_map(|(name, dims)| {
            let blocks = if name.contains('#') { N_BLOCKS } else { 1 };
            (0..blocks)
                .map(move |b| TensorSpec::new(name.replace('#', &b.to_string()), TensorType::F32, *dims))
        })
        .collect();

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let mut writer = GgufWriter::create(&path, &metadata, &specs).unwrap();
    let mut state = 1u64;
    for spec in &specs {
        let data: Vec<u8> = (0..spec.n_bytes().unwrap() / 4)
            .flat_map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.2).to_le_bytes()
            })
            .collect();
        writer.write(&data).unwrap();
    }
    writer.sync().unwrap();
    writer.publish().unwrap();
    Model::load(&[&path], ModelParams { gpu_layers: Some(0), ..Default::default() })
        .expect("llama.cpp loads it")
}

fn gpt2() -> Model {
    let (e, f) = (N_EMBD, 2 * N_EMBD);
    write(
        "gpt2",
        &[
            ("feed_forward_length", Value::U32(f as u32)),
            ("attention.head_count", Value::U32(4)),
            ("attention.layer_norm_epsilon", Value::F32(1e-5)),
        ],
        &[
            ("token_embd.weight", &[e, N_VOCAB]),
            ("position_embd.weight", &[e, N_CTX]),
            ("output_norm.weight", &[e]),
            ("output_norm.bias", &[e]),
            ("blk.#.attn_norm.weight", &[e]),
            ("blk.#.attn_norm.bias", &[e]),
            ("blk.#.attn_qkv.weight", &[e, 3 * e]),
            ("blk.#.attn_qkv.bias", &[3 * e]),
            ("blk.#.attn_output.weight", &[e, e]),
            ("blk.#.attn_output.bias", &[e]),
            ("blk.#.ffn_norm.weight", &[e]),
            ("blk.#.ffn_norm.bias", &[e]),
            ("blk.#.ffn_up.weight", &[e, f]),
            ("blk.#.ffn_up.bias", &[f]),
            ("blk.#.ffn_down.weight", &[f, e]),
            ("blk.#.ffn_down.bias", &[e]),
        ],
    )
}

fn refusal(model: &Model, params: StageParams) -> Refusal {
    match Stage::new(model, params) {
        Err(Error::NotApart(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_model_that_adds_positions_before_block_0_is_exact_in_ranges() {
    let model = gpt2();
    let mut chain = Chain::new(&model, &[1, 3], &context(), Wire::F32);
    let mut oracle = stock(&model, &context());
    let prompt = tokens(&model, 1, 70);
    let rows = Row::chunk(0, 0, 70);
    assert_exact(&chain.evaluate(&rows, &prompt).unwrap(), &decode(&mut oracle, &rows, &prompt), "gpt2");
}

#[test]
fn a_cut_between_blocks_that_share_keys_is_refused_and_says_whose() {
    // of 24 blocks the last four use the keys of blocks 18 and 19
    let folder = tempfile::tempdir().unwrap();
    let path = tiny::write("gemma3n", &[], folder.path()).unwrap();
    let mut plan = GraphPlan::open(&[&path]).unwrap();
    for block in 1..24 {
        let cut = plan.cut(block);
        if block <= 18 {
            cut.unwrap_or_else(|e| panic!("before {block}: {e}"));
        } else {
            let Err(Error::NotApart(refusal)) = cut else { panic!("before {block}: {cut:?}") };
            assert_eq!((refusal.arch.as_str(), &refusal.blocks), ("gemma3n", &(block..24)));
            let Reason::ReadsState(state) = &refusal.reason else { panic!("{block}: {refusal}") };
            assert!(matches!(state.kind, StateKind::Keys | StateKind::Values), "{state:?}");
            assert!(matches!(state.block, Some(18 | 19)), "{state:?}");
        }
    }
    assert!(plan.range(18..24).is_ok());
    assert!(plan.range(20..24).is_err() && plan.range(3..21).is_ok());
    assert!(matches!(plan.cut(0), Err(Error::InvalidArgument(_))));
    assert!(matches!(plan.cut(24), Err(Error::InvalidArgument(_))));
    assert!(matches!(plan.range(20..25), Err(Error::InvalidArgument(_))));

    // a stage of the whole file says the same
    let model = pipeline::load(&path).unwrap();
    let refusal = refusal(&model, StageParams::of_whole_model(&model, 20..24, context()));
    let keys = State { kind: StateKind::Keys, block: Some(18), name: "cache_k_l18".into() };
    assert_eq!(refusal.reason, Reason::ReadsState(keys));
    let short = "the last four read the keys of block 18, which they do not write";
    assert_eq!(refusal.reason.of("the last four"), short);
    assert_eq!(
        refusal.to_string(),
        "blocks 20..23 of a gemma3n model cannot be evaluated apart: they read the keys of block 18, which they do not write"
    );
}

#[test]
fn blocks_that_run_in_loops_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = tiny::write("hrm_text", &[], folder.path()).unwrap();
    let model = pipeline::load(&path).unwrap();
    let refusal = refusal(&model, StageParams::of_whole_model(&model, 3..8, context()));
    assert_eq!((refusal.arch.as_str(), &refusal.blocks), ("hrm_text", &(3..8)));
    let weight = Reason::ReadsWeight { name: "blk.0.attn_q.weight".into(), block: 0 };
    assert_eq!(refusal.reason, weight);
}

#[test]
fn an_encoder_is_refused() {
    let (e, f) = (N_EMBD, 2 * N_EMBD);
    let model = write(
        "bert",
        &[
            ("feed_forward_length", Value::U32(f as u32)),
            ("attention.head_count", Value::U32(4)),
            ("attention.layer_norm_epsilon", Value::F32(1e-5)),
            ("attention.causal", Value::Bool(false)),
            ("tokenizer.ggml.token_type_count", Value::U32(2)),
        ],
        &[
            ("token_embd.weight", &[e, N_VOCAB]),
            ("position_embd.weight", &[e, N_CTX]),
            ("token_embd_norm.weight", &[e]),
            ("token_embd_norm.bias", &[e]),
            ("blk.#.attn_q.weight", &[e, e]),
            ("blk.#.attn_k.weight", &[e, e]),
            ("blk.#.attn_v.weight", &[e, e]),
            ("blk.#.attn_output.weight", &[e, e]),
            ("blk.#.attn_output_norm.weight", &[e]),
            ("blk.#.attn_output_norm.bias", &[e]),
            ("blk.#.ffn_up.weight", &[e, f]),
            ("blk.#.ffn_down.weight", &[f, e]),
            ("blk.#.layer_output_norm.weight", &[e]),
            ("blk.#.layer_output_norm.bias", &[e]),
        ],
    );
    let error = Stage::new(&model, StageParams::of_whole_model(&model, 0..2, context())).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Unsupported(_)), "{text}");
    assert!(text.contains("bert") && text.contains("causal"), "{text}");
}

#[test]
fn a_file_without_a_tokenizer_says_so() {
    let model = gpt2();
    assert!(!model.has_tokenizer());
    assert_eq!((model.bos(), model.eos(), model.adds_bos(), model.is_eog(0)), (None, None, false, false));
    assert!(matches!(model.tokenize("hello", true, true), Err(Error::NoTokenizer(_))));
    assert!(matches!(model.token_bytes(0), Err(Error::NoTokenizer(_))));
}
