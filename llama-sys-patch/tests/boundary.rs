//! What crosses between stages: F16 beside F32, and values that must never cross.

mod common;

use common::{Chain, Wire, argmax, context, decode, load, stock, tokens};
use gguf_tools::synth::Spec;
use half::f16;
use llama_sys_patch::{Error, Input, Model, Output, Row, Stage, StageParams};

fn stage(model: &Model, first: u32, last: u32) -> Stage {
    Stage::new(model, StageParams::of_whole_model(model, first..last, context())).expect("a stage")
}

/// log-sum-exp of a row, in f64.
fn log_probabilities(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::MIN, f32::max) as f64;
    let sum: f64 = logits.iter().map(|&x| (x as f64 - max).exp()).sum();
    logits.iter().map(|&x| x as f64 - max - sum.ln()).collect()
}

#[test]
fn f16_between_stages_changes_little() {
    let model = load(&Spec::tiny("qwen2").unwrap());
    let mut narrow = Chain::new(&model, &[2, 4], &context(), Wire::F16);
    let mut oracle = stock(&model, &context());
    let prompt = tokens(&model, 20, 60);
    let rows: Vec<Row> = (0..60).map(|i| Row { session: 0, position: i, want_output: true }).collect();
    let expected = decode(&mut oracle, &rows, &prompt);
    let ours = narrow.evaluate(&rows, &prompt).unwrap();

    let (mut divergence, mut agree) = (0.0, 0);
    let n_vocab = model.n_vocab();
    for (p, q) in expected.chunks(n_vocab).zip(ours.chunks(n_vocab)) {
        agree += usize::from(argmax(p) == argmax(q));
        let (p, q) = (log_probabilities(p), log_probabilities(q));
        divergence += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>() / 60.0;
    }
    println!("mean KL divergence {divergence:.2e}, same best token in {agree} of 60");
    assert!(divergence < 1e-4, "mean KL divergence {divergence}");
    assert!(divergence > 0.0, "F16 and F32 cannot be the same");
    assert!(agree >= 58, "same best token in {agree} of 60");
}

#[test]
fn f16_in_and_out_are_the_nearest_values() {
    let model = load(&Spec::tiny("qwen2").unwrap());
    let prompt = tokens(&model, 21, 40);
    let rows = Row::chunk(0, 0, 40);
    let n = 40 * model.n_embd();
    let (mut exact, mut nearest) = (vec![0f32; n], vec![f16::ZERO; n]);
    stage(&model, 0, 2).evaluate(&rows, Input::Tokens(&prompt), Output::F32(&mut exact)).unwrap();
    stage(&model, 0, 2).evaluate(&rows, Input::Tokens(&prompt), Output::F16(&mut nearest)).unwrap();
    for (x, y) in exact.iter().zip(&nearest) {
        assert_eq!(f16::from_f32(*x).to_bits(), y.to_bits(), "{x} became {y}");
    }

    // and in: F16 rows give what the same values as F32 rows give, bit for bit
    let widened: Vec<f32> = nearest.iter().map(|x| x.to_f32()).collect();
    let (mut from16, mut from32) = (vec![0f32; n], vec![0f32; n]);
    stage(&model, 2, 4).evaluate(&rows, Input::F16(&nearest), Output::F32(&mut from16)).unwrap();
    stage(&model, 2, 4).evaluate(&rows, Input::F32(&widened), Output::F32(&mut from32)).unwrap();
    common::assert_exact(&from16, &from32, "F16 in");
}

#[test]
fn types_can_change_from_call_to_call() {
    let model = load(&Spec::tiny("qwen2").unwrap());
    let prompt = tokens(&model, 22, 8);
    let n_embd = model.n_embd();
    let mut head = stage(&model, 0, 3);
    let mut oracle = stage(&model, 0, 3);
    for (i, token) in prompt.iter().enumerate() {
        let rows = Row::chunk(0, i as u32, 1);
        let mut exact = vec![0f32; n_embd];
        oracle.evaluate(&rows, Input::Tokens(&[*token]), Output::F32(&mut exact)).unwrap();
        if i % 2 == 0 {
            let mut narrow = vec![f16::ZERO; n_embd];
            head.evaluate(&rows, Input::Tokens(&[*token]), Output::F16(&mut narrow)).unwrap();
            assert!(exact.iter().zip(&narrow).all(|(x, y)| f16::from_f32(*x) == *y));
        } else {
            let mut wide = vec![0f32; n_embd];
            head.evaluate(&rows, Input::Tokens(&[*token]), Output::F32(&mut wide)).unwrap();
            common::assert_exact(&wide, &exact, "F32 after F16");
        }
    }
}

#[test]
fn overflow_of_f16_is_an_error_that_names_the_block() {
    // hidden values around 250,000: fine in F32, infinite in F16
    let model = load(&Spec::tiny("qwen2").unwrap().with_type("bf16").unwrap().gain(100_000.0));
    let prompt = tokens(&model, 23, 40);
    let rows = Row::chunk(0, 0, 40);
    let n = 40 * model.n_embd();
    let mut head = stage(&model, 0, 4);

    let mut narrow = vec![f16::ZERO; n];
    let error = head.evaluate(&rows, Input::Tokens(&prompt), Output::F16(&mut narrow)).unwrap_err();
    let Error::OutputOverflows { block: 3, count, max_abs, row } = error else { panic!("{error:?}") };
    assert!(count > 0 && max_abs > 65504.0 && row < 40, "{error}");
    assert!(error.to_string().contains("block 3"), "{error}");

    // nothing of the call stayed behind: the same rows again, in F32, are those of a fresh stage
    assert_eq!(head.length(0).unwrap(), 0);
    let (mut again, mut fresh) = (vec![0f32; n], vec![0f32; n]);
    head.evaluate(&rows, Input::Tokens(&prompt), Output::F32(&mut again)).unwrap();
    stage(&model, 0, 4).evaluate(&rows, Input::Tokens(&prompt), Output::F32(&mut fresh)).unwrap();
    common::assert_exact(&again, &fresh, "after an overflow");
}

#[test]
fn input_that_is_not_finite_is_refused_wherever_it_stands() {
    let model = load(&Spec::tiny("qwen2").unwrap());
    let n_embd = model.n_embd();
    let mut middle = stage(&model, 2, 4);
    let good: Vec<f32> = (0..8 * n_embd).map(|i| (i as f32 * 0.37).sin()).collect();
    let good16: Vec<f16> = good.iter().map(|&x| f16::from_f32(x)).collect();
    let rows = Row::chunk(0, 0, 8);
    let mut out = vec![0f32; 8 * n_embd];

    let mut caught = 0;
    for at in (0..8 * n_embd).step_by(13).chain([8 * n_embd - 1]) {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut input = good.clone();
            input[at] = bad;
            let error = middle.evaluate(&rows, Input::F32(&input), Output::F32(&mut out)).unwrap_err();
            assert_eq!(error, Error::InputNotFinite { row: at / n_embd, count: 1 });
            let mut input = good16.clone();
            input[at] = f16::from_f32(bad);
            let error = middle.evaluate(&rows, Input::F16(&input), Output::F32(&mut out)).unwrap_err();
            assert_eq!(error, Error::InputNotFinite { row: at / n_embd, count: 1 });
            caught += 2;
        }
    }
    println!("{caught} of {caught} caught");
    assert!(caught >= 900);
    assert_eq!(middle.length(0).unwrap(), 0);
    middle.evaluate(&rows, Input::F32(&good), Output::F32(&mut out)).expect("good rows still pass");
}

#[test]
fn a_block_that_gives_nan_is_named() {
    // a hidden row so large that its square overflows F32: the norm divides by infinity, the sum keeps the row
    let model = load(&Spec::tiny("qwen2").unwrap());
    let n_embd = model.n_embd();
    let mut middle = stage(&model, 2, 5);
    let rows = Row::chunk(0, 0, 3);
    let mut input = vec![1f32; 3 * n_embd];
    input[n_embd..2 * n_embd].fill(f32::MAX);
    let mut out = vec![f16::ZERO; 3 * n_embd];
    let error = middle.evaluate(&rows, Input::F32(&input), Output::F16(&mut out)).unwrap_err();
    let (block, row) = match error {
        Error::OutputNotFinite { block, row, .. } | Error::OutputOverflows { block, row, .. } => (block, row),
        other => panic!("{other:?}"),
    };
    assert_eq!((block, row), (4, 1));
}

#[test]
fn a_model_with_a_nan_weight_is_caught_at_the_boundary() {
    let file = common::write(&Spec::tiny("qwen2").unwrap().with_type("f32").unwrap());
    // the last bytes of the file are a weight of the last tensor written: make them NaN
    let mut bytes = std::fs::read(&file.path).unwrap();
    let end = bytes.len();
    bytes[end - 4096..].iter_mut().for_each(|b| *b = 0xff);
    std::fs::write(&file.path, bytes).unwrap();
    let model = Model::load(&[&file.path], Default::default()).expect("llama.cpp does not look at weights");
    let prompt = tokens(&model, 24, 20);
    let rows = Row::chunk(0, 0, 20);
    let mut logits = vec![0f32; model.n_vocab()];
    let error =
        stage(&model, 0, 6).evaluate(&rows, Input::Tokens(&prompt), Output::Logits(&mut logits)).unwrap_err();
    assert!(matches!(error, Error::OutputNotFinite { block: 5, .. }), "{error:?}");
}

#[test]
fn watching_blocks_changes_nothing_and_sees_every_block() {
    let model = load(&Spec::tiny("qwen2").unwrap());
    let prompt = tokens(&model, 25, 70);
    let rows = Row::chunk(0, 0, 70);
    let n_vocab = model.n_vocab();
    let (mut plain, mut watched) = (vec![0f32; n_vocab], vec![0f32; n_vocab]);
    stage(&model, 0, 6).evaluate(&rows, Input::Tokens(&prompt), Output::Logits(&mut plain)).unwrap();
    let mut whole = stage(&model, 0, 6);
    assert!(whole.block_stats().unwrap().is_empty());
    whole.watch_blocks(true).unwrap();
    whole.evaluate(&rows, Input::Tokens(&prompt), Output::Logits(&mut watched)).unwrap();
    common::assert_exact(&watched, &plain, "watched");

    let stats = whole.block_stats().unwrap();
    assert_eq!(
        stats.iter().map(|s| s.block).collect::<Vec<_>>(),
        [Some(0), Some(1), Some(2), Some(3), Some(4), Some(5), None]
    );
    for s in &stats[..5] {
        assert_eq!((s.calls, s.rows, s.not_finite), (3, 70, 0), "three chunks of 32, 32 and 6 rows");
        assert!(s.nanoseconds > 0);
    }

    // max |hidden| is that of the rows a stage ending there gives
    let mut exact = vec![0f32; 70 * model.n_embd()];
    stage(&model, 0, 3).evaluate(&rows, Input::Tokens(&prompt), Output::F32(&mut exact)).unwrap();
    let max = exact.iter().fold(0f32, |max, x| max.max(x.abs()));
    assert_eq!(stats[2].max_abs, max);

    // and it can be turned off again
    whole.watch_blocks(false).unwrap();
    whole.clear(0).unwrap();
    whole.evaluate(&rows, Input::Tokens(&prompt), Output::Logits(&mut watched)).unwrap();
    common::assert_exact(&watched, &plain, "no longer watched");
    assert!(whole.block_stats().unwrap().iter().all(|s| s.calls == 0));
}
