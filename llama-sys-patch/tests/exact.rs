//! Block ranges against llama_decode on the whole model: the same bits.

mod common;

use common::{Chain, Wire, argmax, assert_exact, context, decode, load, stock, tokens};
use gguf_tools::synth::Spec;
use llama_sys_patch::{ContextParams, FlashAttn, Row};

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
fn several_threads_are_exact() {
    let context = ContextParams { n_threads: 2, ..context() };
    prompt_and_decode_are_exact(&Spec::tiny("qwen2").unwrap(), &[2, 4], &context);
}
