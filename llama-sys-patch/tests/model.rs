//! Models: what the file says, where the weights are, the view llama-cpp-2 has of them.

mod common;

use common::{context, decode, load, max_difference, stock, tokens, write};
use gguf_tools::synth::Spec;
use llama_sys_patch::{
    ContextParams, Error, Input, KvType, Model, ModelParams, ModelPart, Output, Row, Stage, StageParams,
    Stock,
};

/// Fails if `LlamaModel` is not transparent over the pointer (src/model.rs, `adopt`): every number comes through it on
/// one side and through our own C functions on the other.
#[test]
fn llama_cpp_2_sees_the_same_model() {
    let model = load(&Spec::tiny("qwen2").unwrap());
    let inner = model.inner();
    assert_eq!(inner.n_embd() as usize, model.n_embd());
    assert_eq!(inner.n_layer(), model.n_blocks());
    assert_eq!(inner.n_vocab() as usize, model.n_vocab());
    assert_eq!(inner.size(), model.weights_bytes());
    assert_eq!(inner.meta_val_str("general.architecture").unwrap(), "qwen2");
    assert_eq!(model.meta("general.architecture").unwrap().as_deref(), Some("qwen2"));
    assert_eq!((model.arch(), model.n_embd(), model.n_blocks(), model.n_vocab()), ("qwen2", 256, 6, 512));
    assert!(model.has_tokenizer() && model.eos().is_some_and(|eos| model.is_eog(eos)));
}

#[test]
fn weights_are_counted_where_they_are() {
    let model = load(&Spec::tiny("qwen2").unwrap().tied(false));
    let offload = model.offload();
    assert_eq!((offload.blocks_on_device, offload.lm_head_on_device, offload.device_bytes), (0, false, 0));
    assert_eq!(offload.host_bytes, model.weights_bytes());
}

#[test]
fn a_file_whose_lm_head_is_not_used_holds_one_vocabulary_matrix() {
    // q4_0 is a type the CPU repacks for products: loaded as usual, a tied matrix is there twice
    let file = write(&Spec::tiny("qwen2").unwrap().with_type("q4_0").unwrap().tied(true));
    let host_bytes = |no_lm_head| {
        let params = ModelParams { gpu_layers: Some(0), no_lm_head, ..Default::default() };
        Model::load(&[&file.path], params).unwrap().offload().host_bytes
    };
    println!("{} bytes with an lm_head, {} without", host_bytes(false), host_bytes(true));
    let model = load(&Spec::tiny("qwen2").unwrap().with_type("q4_0").unwrap().tied(true));
    assert_eq!(host_bytes(true), model.weights_bytes());
}

#[test]
fn buffers_of_a_stage_do_not_grow_with_the_vocabulary() {
    // 512 rows of logits over 100,000 tokens would be 195 MiB
    let model = load(&Spec::tiny("qwen2").unwrap().vocab(100_000));
    let context = ContextParams { n_ctx: 512, n_batch: 512, n_ubatch: 512, ..context() };
    let stage =
        |blocks| Stage::new(&model, StageParams::of_whole_model(&model, blocks, context.clone())).unwrap();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let stock = Stock::new(&model, &context, None).unwrap();
    println!(
        "stock: {:.1} MiB compute, {:.1} MiB output",
        mib(stock.info().compute_bytes),
        mib(stock.info().output_bytes)
    );
    for (name, stage) in [("head", stage(0..2)), ("middle", stage(2..4)), ("tail", stage(4..6))] {
        let info = stage.info();
        println!(
            "{name}: {:.1} MiB compute, {:.1} MiB output, {:.1} MiB KV",
            mib(info.compute_bytes),
            mib(info.output_bytes),
            mib(info.kv_bytes)
        );
        assert!(mib(info.compute_bytes) < 16.0, "{name}: {:.1} MiB", mib(info.compute_bytes));
    }
    assert!(stock.info().compute_bytes > 150 << 20, "else this test shows nothing");
}

#[test]
fn a_stage_keeps_keys_and_values_of_its_own_blocks_only() {
    let model = load(&Spec::tiny("qwen2").unwrap());
    let kv_bytes = |blocks, kv_type| {
        let context = ContextParams { kv_type, ..context() };
        Stage::new(&model, StageParams::of_whole_model(&model, blocks, context)).unwrap().kv_bytes()
    };
    let whole = Stock::new(&model, &context(), None).unwrap().info().kv_bytes;
    let n_blocks = u64::from(model.n_blocks());
    assert!(whole > 0);
    for blocks in [0..1, 2..3, 2..5, 5..6, 0..6] {
        let expected = whole / n_blocks * blocks.len() as u64;
        assert_eq!(kv_bytes(blocks.clone(), KvType::F16), expected, "{blocks:?}");
        assert_eq!(kv_bytes(blocks.clone(), KvType::F32), 2 * expected, "{blocks:?}");
    }
    // blocks that attend to a window only, too: llama.cpp keeps two caches, of which these blocks are given memory
    let model = load(&Spec::tiny("olmo2").unwrap().window(64));
    let whole = Stock::new(&model, &context(), None).unwrap().info().kv_bytes;
    for blocks in [2..3, 0..6] {
        let n = blocks.len() as u64;
        let stage = Stage::new(&model, StageParams::of_whole_model(&model, blocks, context())).unwrap();
        assert_eq!(stage.kv_bytes(), whole / 6 * n);
    }
}

#[test]
fn weights_stay_where_the_file_has_them() {
    // q4_0 is a type that the CPU repacks for products
    let file = write(&Spec::tiny("qwen2").unwrap().with_type("q4_0").unwrap());
    let model = |no_repack| {
        let params = ModelParams { gpu_layers: Some(0), use_mmap: true, no_repack, ..Default::default() };
        Model::load(&[&file.path], params).unwrap()
    };
    let logits = |model: &Model| {
        let prompt = tokens(model, 7, 40);
        decode(&mut stock(model, &context()), &Row::chunk(0, 0, prompt.len()), &prompt)
    };
    let (repacked, plain) = (model(false), model(true));
    assert_eq!(plain.offload().host_bytes, plain.weights_bytes());
    // other kernels, which round activations at other places
    let (a, b) = (logits(&repacked), logits(&plain));
    let largest = a.iter().fold(0f32, |max, x| max.max(x.abs()));
    let difference = max_difference(&a, &b);
    assert!(difference < 0.1 * largest, "{difference} of {largest}");
}

#[test]
fn tokenizer_and_weights_can_be_loaded_apart() {
    let file = write(&Spec::tiny("llama").unwrap().tied(true));
    let load = |part| {
        let params = ModelParams { part, gpu_layers: Some(0), use_mmap: true, ..Default::default() };
        Model::load(&[&file.path], params).unwrap()
    };
    let whole = load(ModelPart::Whole);
    let (tokenizer, weights) = (load(ModelPart::Tokenizer), load(ModelPart::Weights));

    let text = "The wind had turned, and 2 ships had passed.";
    let tokens = whole.tokenize(text, true, false).unwrap();
    assert_eq!(tokenizer.tokenize(text, true, false).unwrap(), tokens);
    assert!(matches!(weights.tokenize(text, true, false), Err(Error::NoTokenizer(_))));

    let logits =
        |model: &Model| decode(&mut stock(model, &context()), &Row::chunk(0, 0, tokens.len()), &tokens);
    assert_eq!(weights.n_vocab(), whole.n_vocab());
    common::assert_exact(&logits(&weights), &logits(&whole), "without a tokenizer");
    let params = StageParams { blocks: 0..1, takes_tokens: true, has_lm_head: false, context: context() };
    assert!(Stage::new(&tokenizer, params).is_err());
    assert!(Stock::new(&tokenizer, &context(), None).is_err());
}

#[test]
fn mapped_and_read_models_give_the_same() {
    let file = write(&Spec::tiny("llama").unwrap().tied(true));
    let load = |use_mmap, no_lm_head| {
        let params = ModelParams { gpu_layers: Some(0), use_mmap, no_lm_head, ..Default::default() };
        Model::load(&[&file.path], params).unwrap()
    };
    let rows = Row::chunk(0, 0, 4);
    let whole = |use_mmap| {
        common::decode(&mut common::stock(&load(use_mmap, false), &context()), &rows, &[1, 2, 3, 4])
    };
    common::assert_exact(&whole(true), &whole(false), "mapped");

    let head = |use_mmap| {
        let model = load(use_mmap, true);
        let params =
            StageParams { has_lm_head: false, ..StageParams::of_whole_model(&model, 0..6, context()) };
        let mut hidden = vec![0f32; 4 * model.n_embd()];
        let mut stage = Stage::new(&model, params).unwrap();
        stage.evaluate(&rows, Input::Tokens(&[1, 2, 3, 4]), Output::F32(&mut hidden)).unwrap();
        hidden
    };
    common::assert_exact(&head(true), &head(false), "mapped, without an lm_head");
}

#[test]
fn a_read_model_does_not_care_what_happens_to_its_file() {
    let file = write(&Spec::tiny("qwen2").unwrap());
    let model =
        Model::load(&[&file.path], ModelParams { gpu_layers: Some(0), ..Default::default() }).unwrap();
    let mut stock = common::stock(&model, &context());
    let before = common::decode(&mut stock, &Row::chunk(0, 0, 4), &[1, 2, 3, 4]);
    std::fs::OpenOptions::new().write(true).open(&file.path).unwrap().set_len(10).unwrap(); // SIGBUS under a map
    stock.clear(0).unwrap();
    let after = common::decode(&mut stock, &Row::chunk(0, 0, 4), &[1, 2, 3, 4]);
    common::assert_exact(&after, &before, "after the file was truncated");
}

#[test]
fn stages_outlive_the_model_handle_and_move_between_threads() {
    let stage = {
        let model = load(&Spec::tiny("qwen2").unwrap());
        Stage::new(&model, StageParams::of_whole_model(&model, 0..6, context())).unwrap()
    };
    let logits = std::thread::spawn(move || {
        let mut stage = stage;
        let mut logits = vec![0f32; stage.model().n_vocab()];
        let rows = Row::chunk(0, 0, 3);
        stage.evaluate(&rows, Input::Tokens(&[1, 2, 3]), Output::Logits(&mut logits)).unwrap();
        logits
    });
    assert!(logits.join().unwrap().iter().all(|x| x.is_finite()));
}
