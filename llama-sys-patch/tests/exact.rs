//! Block ranges against llama_decode on the whole model: the same bits.

mod common;

use common::{Chain, Wire, argmax, assert_exact, context, decode, load, max_difference, stock, tokens};
use gguf_tools::synth::Spec;
use llama_sys_patch::{ContextParams, FlashAttn, Input, KvType, Output, Row, Stage, StageParams};

/// A prompt in one call (several chunks of n_ubatch), then greedy single tokens.
fn prompt_and_decode_are_exact(spec: &Spec, cuts: &[u32], context: &ContextParams) {
    let model = load(spec);
    let what = format!("{} cut at {cuts:?}", spec.name());
    let mut chain = Chain::new(&model, cuts, context, Wire::F32);
    let mut oracle = stock(&model, context);

    let prompt = tokens(&model, 7, 77);
    let rows = Row::chunk(0, 0, prompt.len());
    let mut expected = decode(&mut oracle, &rows, &prompt);
    let mut ours = chain.evaluate(&rows, &prompt).expect("the prompt");
    assert_exact(&ours, &expected, &format!("{what}: prompt"));

    for step in 0..12 {
        let token = [argmax(&expected)];
        let rows = Row::chunk(0, (prompt.len() + step) as u32, 1);
        expected = decode(&mut oracle, &rows, &token);
        ours = chain.evaluate(&rows, &token).expect("a token");
        assert_exact(&ours, &expected, &format!("{what}: step {step}"));
    }
}

#[test]
fn three_ranges_of_qwen2_are_exact() {
    prompt_and_decode_are_exact(&Spec::tiny("qwen2").unwrap(), &[2, 4], &context());
}

#[test]
fn odd_cuts_are_exact() {
    let spec = Spec::tiny("qwen2").unwrap();
    for cuts in [&[][..], &[1], &[5], &[1, 5], &[1, 2, 3, 4, 5]] {
        prompt_and_decode_are_exact(&spec, cuts, &context());
    }
}

#[test]
fn every_weight_type_is_exact() {
    for name in ["f32", "bf16", "q8_0", "q4_k", "q4_0"] {
        prompt_and_decode_are_exact(
            &Spec::tiny("qwen2").unwrap().with_type(name).unwrap(),
            &[2, 4],
            &context(),
        );
    }
}

#[test]
fn tied_and_untied_are_exact() {
    for tied in [true, false] {
        prompt_and_decode_are_exact(&Spec::tiny("qwen2").unwrap().tied(tied), &[3], &context());
    }
}

#[test]
fn families_are_exact() {
    // every family the synthesiser knows
    for family in gguf_tools::synth::FAMILIES {
        prompt_and_decode_are_exact(&Spec::tiny(family.arch).unwrap(), &[2, 4], &context());
    }
}

#[test]
fn both_kinds_of_attention_are_exact() {
    for flash_attn in [FlashAttn::Off, FlashAttn::On] {
        let context = ContextParams { flash_attn, ..context() };
        prompt_and_decode_are_exact(&Spec::tiny("qwen2").unwrap(), &[2, 4], &context);
    }
}

#[test]
fn a_cache_of_f32_is_exact_and_not_that_of_f16() {
    let spec = Spec::tiny("qwen2").unwrap().with_type("f32").unwrap();
    for flash_attn in [FlashAttn::Off, FlashAttn::On] {
        let context = ContextParams { flash_attn, kv_type: KvType::F32, ..context() };
        prompt_and_decode_are_exact(&spec, &[2, 4], &context);
    }
    // the option does something: other bits, and not by much
    let model = load(&spec);
    let prompt = tokens(&model, 7, 77);
    let rows = Row::chunk(0, 0, prompt.len());
    let logits = |kv_type| {
        let context = ContextParams { flash_attn: FlashAttn::Off, kv_type, ..context() };
        Chain::new(&model, &[3], &context, Wire::F32).evaluate(&rows, &prompt).expect("the prompt")
    };
    let (f16, f32) = (logits(KvType::F16), logits(KvType::F32));
    let difference = max_difference(&f16, &f32);
    let largest = f32.iter().fold(0f32, |max, x| max.max(x.abs()));
    assert!(difference > 0.0 && difference < 1e-2 * largest, "{difference} of {largest}");
}

#[test]
fn products_in_f32_round_nothing() {
    let hidden = |weights: &str, f32_products, n_ubatch| {
        let model = load(&Spec::tiny("llama").unwrap().with_type(weights).unwrap());
        let context = ContextParams { f32_products, n_ubatch, ..context() };
        let blocks = 0..4;
        let params = StageParams { blocks, takes_tokens: true, has_lm_head: false, context };
        let mut stage = Stage::new(&model, params).expect("a stage");
        let prompt = tokens(&model, 7, 77);
        let mut out = vec![0f32; prompt.len() * model.n_embd()];
        let rows = Row::chunk(0, 0, prompt.len());
        stage.evaluate(&rows, Input::Tokens(&prompt), Output::F32(&mut out)).expect("the prompt");
        out
    };
    let relative =
        |a: &[f32], b: &[f32]| max_difference(a, b) / b.iter().fold(0f32, |max, x| max.max(x.abs()));
    // there is nothing to do for F32
    assert_exact(&hidden("f32", true, 32), &hidden("f32", false, 32), "f32");
    // the difference is the rounding of activations: the coarser the type, the larger; tests/coreml of gguf-tools compares
    // with the same model in F32
    let difference = |weights| relative(&hidden(weights, false, 32), &hidden(weights, true, 32));
    let (f16, bf16, q8_0) = (difference("f16"), difference("bf16"), difference("q8_0"));
    println!("f16 {f16:.1e}, bf16 {bf16:.1e}, q8_0 {q8_0:.1e}");
    assert!(f16 > 1e-5 && bf16 > 2.0 * f16 && q8_0 > 2.0 * f16 && q8_0 < 0.2, "{f16} {bf16} {q8_0}");
    // logits are such a product too
    let model = load(&Spec::tiny("llama").unwrap().with_type("q8_0").unwrap().tied(false));
    let logits = |f32_products| {
        let prompt = tokens(&model, 7, 9);
        let context = ContextParams { f32_products, ..context() };
        Chain::new(&model, &[3], &context, Wire::F32).evaluate(&Row::chunk(0, 0, 9), &prompt).expect("rows")
    };
    let difference = relative(&logits(false), &logits(true));
    assert!(difference > 0.0 && difference < 0.2, "{difference}");
    // chunks of another size are other kernels
    assert!(relative(&hidden("q8_0", true, 7), &hidden("q8_0", true, 32)) < 1e-3);
}

#[test]
fn several_threads_are_exact() {
    let context = ContextParams { n_threads: 2, ..context() };
    prompt_and_decode_are_exact(&Spec::tiny("qwen2").unwrap(), &[2, 4], &context);
}
