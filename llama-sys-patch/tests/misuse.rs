//! Every way to use the API wrongly is an error, never an abort: each case here would trip an assertion, or read past a
//! buffer, if it got through.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use common::{context, load, tokens, write};
use gguf_tools::synth::Spec;
use half::f16;
use llama_sys_patch::{
    ContextParams, Error, FlashAttn, Input, Model, ModelParams, Output, Row, RowType, Stage, StageParams,
    Stock, dequantize_rows, devices, quantize_rows,
};

fn tiny() -> Model {
    load(&Spec::tiny("qwen2").unwrap())
}

fn stage(model: &Model, first: u32, last: u32) -> Stage {
    Stage::new(model, StageParams::of_whole_model(model, first..last, context())).expect("a stage")
}

#[test]
fn rows_that_do_not_fit_the_session_are_refused_and_change_nothing() {
    let model = tiny();
    let n_embd = model.n_embd();
    let mut head = stage(&model, 0, 3);
    let mut out = vec![0f32; 128 * n_embd];
    let mut run = |head: &mut Stage, rows: &[Row], tokens: &[i32]| {
        head.evaluate(rows, Input::Tokens(tokens), Output::F32(&mut out))
    };
    let row = |session, position| Row { session, position, want_output: true };

    assert!(matches!(run(&mut head, &[], &[]), Err(Error::InvalidArgument(_))));
    assert_eq!(run(&mut head, &[row(1, 0)], &[0]), Err(Error::UnknownSession { session: 1, sessions: 1 }));
    assert_eq!(
        run(&mut head, &[row(u32::MAX, 0)], &[0]),
        Err(Error::UnknownSession { session: u32::MAX, sessions: 1 })
    );
    assert_eq!(
        run(&mut head, &[row(0, 1)], &[0]),
        Err(Error::WrongPosition { session: 0, position: 1, expected: 0 })
    );
    assert_eq!(
        run(&mut head, &[row(0, 0), row(0, 0)], &[0, 0]),
        Err(Error::WrongPosition { session: 0, position: 0, expected: 1 })
    );
    assert_eq!(
        run(&mut head, &[row(0, 0), row(0, 2)], &[0, 0]),
        Err(Error::WrongPosition { session: 0, position: 2, expected: 1 })
    );
    assert_eq!(
        run(&mut head, &[row(0, u32::MAX)], &[0]),
        Err(Error::WrongPosition { session: 0, position: u32::MAX, expected: 0 })
    );
    let many = Row::chunk(0, 0, 129);
    assert_eq!(run(&mut head, &many, &[0; 129]), Err(Error::TooManyRows { rows: 129, limit: 128 }));
    for token in [-1, i32::MIN, i32::MAX, 512] {
        let expected = Error::UnknownToken { token: token.into(), n_vocab: 512 };
        assert_eq!(run(&mut head, &[row(0, 0)], &[token]), Err(expected));
    }
    assert_eq!(head.length(0), Ok(0));
    run(&mut head, &[row(0, 0)], &[0]).expect("it still works");
    assert_eq!(head.length(0), Ok(1));
}

#[test]
fn a_full_context_is_an_error_and_can_be_rewound() {
    let model = tiny();
    // not a multiple of what llama.cpp rounds contexts to
    let context = ContextParams { n_ctx: 100, n_batch: 64, ..context() };
    let mut head = Stage::new(&model, StageParams::of_whole_model(&model, 0..3, context.clone())).unwrap();
    let mut oracle = Stock::new(&model, &context, None).unwrap();
    let text = tokens(&model, 1, 101);
    let mut out = vec![0f32; 64 * model.n_embd()];
    let mut logits = vec![0f32; model.n_vocab()];
    for (position, chunk) in [(0, 64), (64, 36)] {
        let part = &text[position..position + chunk];
        let rows = Row::chunk(0, position as u32, chunk);
        head.evaluate(&rows, Input::Tokens(part), Output::F32(&mut out)).unwrap();
        oracle.decode(&rows, part, &mut logits).unwrap();
    }
    let full = Err(Error::ContextFull { session: 0, n_ctx: 100 });
    let rows = Row::chunk(0, 100, 1);
    assert_eq!(head.evaluate(&rows, Input::Tokens(&text[100..]), Output::F32(&mut out)), full);
    assert_eq!(oracle.decode(&rows, &text[100..], &mut logits), full);
    // a chunk that starts inside and ends outside
    head.rewind(0, 98).unwrap();
    let rows = Row::chunk(0, 98, 3);
    assert_eq!(head.evaluate(&rows, Input::Tokens(&text[98..]), Output::F32(&mut out)), full);
    assert_eq!(head.length(0), Ok(98));
    head.evaluate(&Row::chunk(0, 98, 2), Input::Tokens(&text[98..100]), Output::F32(&mut out)).unwrap();
}

#[test]
fn wrong_kinds_and_sizes_of_buffers_are_refused() {
    let model = tiny();
    let (n_embd, n_vocab) = (model.n_embd(), model.n_vocab());
    let (mut head, mut middle, mut tail) = (stage(&model, 0, 2), stage(&model, 2, 4), stage(&model, 4, 6));
    let rows = Row::chunk(0, 0, 2);
    let (mut out, mut logits) = (vec![0f32; 2 * n_embd], vec![0f32; n_vocab]);
    let hidden = vec![0.5f32; 2 * n_embd];
    let hidden16 = vec![f16::ONE; 2 * n_embd];

    let error = head.evaluate(&rows, Input::F32(&hidden), Output::F32(&mut out)).unwrap_err();
    assert!(matches!(&error, Error::WrongInput(_)), "{error}");
    let error = middle.evaluate(&rows, Input::Tokens(&[0, 0]), Output::F32(&mut out)).unwrap_err();
    assert!(matches!(&error, Error::WrongInput(_)), "{error}");
    let error = middle.evaluate(&rows, Input::F32(&hidden), Output::Logits(&mut logits)).unwrap_err();
    assert!(matches!(&error, Error::WrongOutput(_)), "{error}");
    let error = tail.evaluate(&rows, Input::F32(&hidden), Output::F32(&mut out)).unwrap_err();
    assert!(matches!(&error, Error::WrongOutput(_)), "{error}");

    for len in [0, 1, n_embd, 2 * n_embd - 1] {
        let error = middle.evaluate(&rows, Input::F32(&hidden[..len]), Output::F32(&mut out)).unwrap_err();
        assert!(
            matches!(error, Error::WrongSize { got, expected, .. } if got == len && expected == 2 * n_embd)
        );
        let error = middle.evaluate(&rows, Input::F16(&hidden16[..len]), Output::F32(&mut out)).unwrap_err();
        assert!(matches!(error, Error::WrongSize { .. }));
        let error = middle.evaluate(&rows, Input::F32(&hidden), Output::F32(&mut out[..len])).unwrap_err();
        assert!(
            matches!(error, Error::WrongSize { got, expected, .. } if got == len && expected == 2 * n_embd)
        );
    }
    assert!(matches!(
        head.evaluate(&rows, Input::Tokens(&[0]), Output::F32(&mut out)),
        Err(Error::WrongSize { got: 1, expected: 2, .. })
    ));
    assert!(matches!(
        tail.evaluate(&rows, Input::F32(&hidden), Output::Logits(&mut logits[1..])),
        Err(Error::WrongSize { .. })
    ));
    for stage in [&head, &middle, &tail] {
        assert_eq!(stage.length(0), Ok(0));
    }
}

#[test]
fn rewinding_forward_or_elsewhere_is_refused() {
    let model = tiny();
    let mut head = stage(&model, 0, 3);
    let mut out = vec![0f32; 5 * model.n_embd()];
    head.evaluate(&Row::chunk(0, 0, 5), Input::Tokens(&[1, 2, 3, 4, 5]), Output::F32(&mut out)).unwrap();
    assert_eq!(head.rewind(0, 6), Err(Error::WrongPosition { session: 0, position: 6, expected: 5 }));
    assert_eq!(
        head.rewind(0, u32::MAX),
        Err(Error::WrongPosition { session: 0, position: u32::MAX, expected: 5 })
    );
    assert_eq!(head.rewind(7, 0), Err(Error::UnknownSession { session: 7, sessions: 1 }));
    assert_eq!(head.length(7), Err(Error::UnknownSession { session: 7, sessions: 1 }));
    assert_eq!(head.rewind(0, 5), Ok(()));
    assert_eq!(head.length(0), Ok(5));
}

#[test]
fn stages_that_cannot_be_are_refused() {
    let model = tiny();
    let n = model.n_blocks();
    let make = |blocks, takes_tokens, has_lm_head, context| {
        Stage::new(&model, StageParams { blocks, takes_tokens, has_lm_head, context }).map(|_| ())
    };
    #[allow(clippy::reversed_empty_ranges)]
    for blocks in [0..0, 3..3, 4..2, 0..n + 1, n..n + 1, 0..u32::MAX, u32::MAX - 1..u32::MAX] {
        let error = make(blocks.clone(), false, false, context()).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{blocks:?}: {error}");
    }
    assert!(matches!(make(1..3, true, false, context()), Err(Error::InvalidArgument(_))));
    assert!(matches!(make(0..3, true, true, context()), Err(Error::InvalidArgument(_))));

    let sizes = [
        ContextParams { n_ctx: 0, ..context() },
        ContextParams { n_ctx: u32::MAX, ..context() },
        ContextParams { n_batch: 0, ..context() },
        ContextParams { n_ubatch: 0, ..context() },
        ContextParams { n_threads: 0, ..context() },
        ContextParams { n_threads: 513, ..context() },
        ContextParams { max_sessions: 0, ..context() },
        ContextParams { max_sessions: 257, ..context() },
        ContextParams { max_sessions: 64, n_ubatch: 32, ..context() },
        ContextParams { n_ctx: 1 << 29, max_sessions: 4, ..context() },
        ContextParams { snapshots: 32, ..context() },
        ContextParams { snapshots: u32::MAX, ..context() },
    ];
    for size in sizes {
        let error = make(0..3, true, false, size.clone()).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{size:?}: {error}");
        assert!(Stock::new(&model, &size, None).is_err(), "{size:?}");
    }
    let error = Stock::new(&model, &ContextParams { f32_products: true, ..context() }, None).unwrap_err();
    assert!(matches!(&error, Error::InvalidArgument(why) if why.contains("f32_products")), "{error}");
    let experts = load(&Spec::tiny("qwen3moe").unwrap());
    let exact = ContextParams { f32_products: true, ..context() };
    let error = Stage::new(&experts, StageParams::of_whole_model(&experts, 1..3, exact)).unwrap_err();
    assert!(matches!(&error, Error::Unsupported(why) if why.contains("experts")), "{error}");
    // more memory than there is: 800 GiB of keys and values
    let deep = load(&Spec::tiny("qwen2").unwrap().blocks(200));
    let huge = ContextParams { n_ctx: 1 << 22, ..context() };
    let error = Stage::new(&deep, StageParams::of_whole_model(&deep, 0..200, huge)).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory(_)), "{error}");
}

#[test]
fn stock_refuses_what_llama_decode_asserts_on() {
    let model = tiny();
    let mut stock = Stock::new(&model, &context(), Some(2)).unwrap();
    let mut logits = vec![0f32; 8 * model.n_vocab()];
    let rows: Vec<Row> = (0..3).map(|i| Row { session: 0, position: i, want_output: true }).collect();
    assert_eq!(stock.decode(&rows, &[1, 2, 3], &mut logits), Err(Error::TooManyRows { rows: 3, limit: 2 }));
    assert_eq!(
        stock.decode(&Row::chunk(0, 0, 129), &[0; 129], &mut logits),
        Err(Error::TooManyRows { rows: 129, limit: 128 })
    );
    assert!(matches!(stock.decode(&rows[..1], &[1, 2], &mut logits), Err(Error::WrongSize { .. })));
    assert!(matches!(stock.decode(&rows[..1], &[1], &mut []), Err(Error::WrongSize { .. })));
    assert!(matches!(
        stock.decode(&rows[..1], &[-5], &mut logits),
        Err(Error::UnknownToken { token: -5, .. })
    ));
    assert_eq!(stock.length(0), Ok(0));
    assert_eq!(stock.decode(&rows[..2], &[1, 2], &mut logits), Ok(2));
}

#[test]
fn files_that_are_not_models_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("not-a-model.gguf");
    let load = |path: &PathBuf| Model::load(&[path], ModelParams::default()).map(|_| ());
    let error = load(&path).unwrap_err();
    assert!(matches!(error, Error::LoadFailed(_)) && error.to_string().contains("not-a-model"), "{error}");
    for bytes in [&b""[..], b"GGUF", b"hello world, this is not a GGUF file at all", &[0u8; 4096]] {
        std::fs::write(&path, bytes).unwrap();
        let error = load(&path).unwrap_err();
        assert!(
            matches!(error, Error::LoadFailed(_)) && error.to_string().contains("not-a-model"),
            "{error}"
        );
    }
    let whole = write(&Spec::tiny("qwen2").unwrap());
    let bytes = std::fs::read(&whole.path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let error = load(&path).unwrap_err();
    assert!(matches!(error, Error::LoadFailed(_)), "{error}");

    assert!(matches!(Model::load::<PathBuf>(&[], ModelParams::default()), Err(Error::InvalidArgument(_))));
    assert!(matches!(load(&PathBuf::from("a\0b")), Err(Error::InvalidArgument(_))));
    let device = ModelParams { device: Some("no such GPU".into()), ..Default::default() };
    let error = Model::load(&[&whole.path], device).unwrap_err();
    assert!(matches!(&error, Error::InvalidArgument(text) if text.contains("no such GPU")), "{error}");
    let layers = ModelParams { gpu_layers: Some(u32::MAX), ..Default::default() };
    assert!(matches!(Model::load(&[&whole.path], layers), Err(Error::InvalidArgument(_))));
}

#[test]
fn a_load_can_be_watched_and_stopped() {
    let file = write(&Spec::tiny("qwen2").unwrap());
    let mut seen = Vec::new();
    let mut watch = |fraction: f32| {
        seen.push(fraction);
        true
    };
    Model::load(&[&file.path], ModelParams { progress: Some(&mut watch), ..Default::default() }).unwrap();
    assert!(seen.windows(2).all(|w| w[0] <= w[1]) && seen.last() == Some(&1.0), "{seen:?}");

    let mut stop = |_: f32| false;
    let params = ModelParams { progress: Some(&mut stop), ..Default::default() };
    assert!(matches!(Model::load(&[&file.path], params), Err(Error::Cancelled(_))));
    // a panic in the callback does not go through C++
    let mut panics = |_: f32| -> bool { panic!("this panic belongs to the test") };
    let params = ModelParams { progress: Some(&mut panics), ..Default::default() };
    let result = catch_unwind(AssertUnwindSafe(|| Model::load(&[&file.path], params).map(|_| ())));
    assert!(matches!(result, Ok(Err(Error::Cancelled(_)))));
}

#[test]
fn tokens_and_text_outside_the_vocabulary_are_refused() {
    let model = tiny();
    assert_eq!(model.token_bytes(-1), Err(Error::UnknownToken { token: -1, n_vocab: 512 }));
    assert_eq!(model.token_bytes(512), Err(Error::UnknownToken { token: 512, n_vocab: 512 }));
    assert!(!model.is_eog(-1) && !model.is_eog(i32::MAX));
    for text in ["", "hello", "\0", "héllo wörld ✓ \u{10ffff}", &"x".repeat(100_000)] {
        let tokens = model.tokenize(text, true, true).unwrap();
        let bytes: Vec<u8> = tokens.iter().flat_map(|&t| model.token_bytes(t).unwrap()).collect();
        assert_eq!(bytes, text.as_bytes(), "{} characters", text.len());
    }
    assert!(matches!(model.meta("a\0b"), Err(Error::InvalidArgument(_))));
    assert_eq!(model.meta("no.such.key"), Ok(None));
}

#[test]
fn rows_of_types_are_checked_before_ggml_sees_them() {
    let values: Vec<f32> = (0..512).map(|i| (i as f32).sin()).collect();
    let mut out = vec![0f32; 512];
    let (mut made, mut refused) = (0, 0);
    for number in (0..64).chain([u32::MAX, i32::MAX as u32]) {
        let Ok(row_type) = RowType::of(number) else {
            assert!(quantize_rows(number, &values, 256).is_err());
            assert!(dequantize_rows(number, &[0; 64], 256, &mut out).is_err());
            refused += 1;
            continue;
        };
        let row_bytes = row_type.row_bytes(256).expect("256 is a whole number of blocks of every type");
        if row_type.from_f32 {
            let rows = quantize_rows(number, &values, 256).expect(&row_type.name);
            assert_eq!(rows.len(), 2 * row_bytes);
            made += 1;
            if row_type.to_f32 {
                dequantize_rows(number, &rows, 256, &mut out).expect(&row_type.name);
                let error = out.iter().zip(&values).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                assert!(error < 0.7, "{}: {error}", row_type.name);
                // from an odd address too
                let mut odd = vec![0u8; rows.len() + 1];
                odd[1..].copy_from_slice(&rows);
                let mut again = vec![0f32; 512];
                dequantize_rows(number, &odd[1..], 256, &mut again).unwrap();
                assert_eq!(again, out, "{}", row_type.name);
                assert!(matches!(
                    dequantize_rows(number, &rows[1..], 256, &mut out),
                    Err(Error::WrongSize { .. })
                ));
            }
        } else {
            assert!(
                matches!(quantize_rows(number, &values, 256), Err(Error::InvalidArgument(_))),
                "{}",
                row_type.name
            );
        }
        if row_type.block_values > 1 {
            assert!(matches!(quantize_rows(number, &values[..7], 7), Err(Error::InvalidArgument(_))));
        }
    }
    println!("{made} types quantised, {refused} numbers are no types");
    assert!(made >= 15 && refused >= 20);

    assert!(matches!(quantize_rows(8, &values, 0), Err(Error::InvalidArgument(_))));
    assert!(matches!(quantize_rows(8, &[], 32), Err(Error::WrongSize { .. })));
    assert!(matches!(quantize_rows(8, &values[..48], 32), Err(Error::WrongSize { .. })));
    for bad in [f32::NAN, f32::INFINITY] {
        let mut values = values.clone();
        values[300] = bad;
        assert_eq!(quantize_rows(8, &values, 256), Err(Error::InputNotFinite { row: 1, count: 1 }));
    }
}

#[test]
fn models_without_separate_blocks_are_refused() {
    // forced fused attention off and on both work; a device that is not there does not
    let model = tiny();
    for flash_attn in [FlashAttn::Auto, FlashAttn::Off, FlashAttn::On] {
        let context = ContextParams { flash_attn, ..context() };
        let stage = Stage::new(&model, StageParams::of_whole_model(&model, 0..3, context)).unwrap();
        assert_eq!(stage.info().flash_attn, flash_attn != FlashAttn::Off);
    }
    assert!(devices().iter().any(|d| !d.is_gpu), "the CPU is a device");
}

/// The program that this test starts again, to see how it ends.
const ABORTS: &str = "DIM_TEST_ABORTS";

/// ggml's own way starts a debugger on the dying process, which takes seconds and reads the user's memory.
#[cfg(unix)]
#[test]
fn an_abort_of_ggml_says_why_and_starts_nothing() {
    use std::os::unix::process::ExitStatusExt as _;
    if std::env::var_os(ABORTS).is_some() {
        let _initialised = load(&Spec::tiny("qwen2").unwrap());
        // SAFETY: three literals, NUL-terminated, and a format that takes nothing.
        unsafe { llama_cpp_sys_2::ggml_abort(c"here.c".as_ptr(), 7, c"on purpose".as_ptr()) };
    }
    let again = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "an_abort_of_ggml_says_why_and_starts_nothing", "--nocapture"])
        .env(ABORTS, "1")
        .env_remove("GGML_NO_BACKTRACE")
        // what a debugger would be looked for in
        .env("PATH", "/nowhere")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&again.stderr);
    assert_eq!(again.status.signal(), Some(6), "{said}");
    assert!(said.ends_with("here.c:7: on purpose\n"), "{said}");
}
