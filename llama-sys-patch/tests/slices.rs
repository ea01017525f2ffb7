//! Slices as files: the whole model's keys, the tensors of a range, and a description of the rest, which is checked.

mod common;

use std::path::{Path, PathBuf};

use common::pipeline::{self, Pipeline};
use common::slices::{self, Absent};
use common::{assert_exact, decode, max_difference, stock};
use gguf_tools::gguf::{Array, Gguf, Value};
use llama_sys_patch::test_support as tiny;
use llama_sys_patch::{
    ContextParams, Error, GraphPlan, Input, Model, ModelParams, Output, Reason, Row, Stage, StageParams,
    Stock, ValueType,
};

fn context() -> ContextParams {
    ContextParams { n_ctx: 128, n_batch: 64, n_ubatch: 16, n_threads: 1, ..ContextParams::default() }
}

/// A tiny model and its three slices.
struct Cut {
    folder: tempfile::TempDir,
    model: PathBuf,
    files: Vec<PathBuf>,
}

fn cut_with(arch: &str, options: &[&str], cuts: &[u32]) -> Cut {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny::write(arch, options, folder.path()).unwrap();
    let files = pipeline::cut(&model, &pipeline::plan(&model, cuts).unwrap());
    Cut { folder, model, files }
}

fn cut(arch: &str) -> Cut {
    cut_with(arch, &[], &[3, 6])
}

/// Rows of several sessions through slices and through llama_decode().
fn slices_are_exact(cut: &Cut, context: &ContextParams, what: &str) {
    let whole = pipeline::load(&cut.model).unwrap();
    let mut stock = stock(&whole, context);
    let mut ours = Pipeline::new(&cut.files, context).unwrap();
    let mut position = 0;
    for (call, n) in [20, 1, 7, 1, 1, 13].into_iter().enumerate() {
        let rows: Vec<Row> = (0..n)
            .flat_map(|i| {
                (0..context.max_sessions).map(move |session| Row {
                    session,
                    position: position + i,
                    want_output: true,
                })
            })
            .collect();
        let tokens = common::tokens(&whole, call as u64, rows.len());
        let expected = decode(&mut stock, &rows, &tokens);
        assert_exact(&ours.evaluate(&rows, &tokens).unwrap(), &expected, &format!("{what}, call {call}"));
        position += n;
    }
}

#[test]
fn other_cuts_chunks_and_sessions_are_exact() {
    for (arch, cuts) in [
        ("gemma3", [1, 2]),
        ("gpt-oss", [2, 7]),
        ("qwen35", [4, 5]),
        ("deepseek2", [1, 4]),
        ("deepseek4", [1, 4]),
        ("granitehybrid", [2, 7]),
        ("rwkv7", [1, 2]),
        ("qwen2vl", [3, 6]),
        ("minimax-m3", [2, 5]),
    ] {
        let cut = cut_with(arch, &[], &cuts);
        for (n_ubatch, max_sessions) in [(5, 1), (16, 3), (64, 1)] {
            let context = ContextParams { n_ubatch, max_sessions, ..context() };
            slices_are_exact(
                &cut,
                &context,
                &format!("{arch} {cuts:?}, {n_ubatch} rows, {max_sessions} sessions"),
            );
        }
    }
}

#[test]
fn a_slice_is_the_model_with_its_numbers_and_a_part_of_its_bytes() {
    let cut = cut("qwen2");
    let whole = pipeline::load(&cut.model).unwrap();
    assert!(!whole.is_slice() && whole.blocks() == (0..8));
    let mut bytes = 0;
    for (file, blocks) in cut.files.iter().zip([0..3, 3..6, 6..8]) {
        for (use_mmap, no_lm_head, no_repack) in
            [(false, false, false), (true, true, true), (true, false, true)]
        {
            let params =
                ModelParams { gpu_layers: Some(0), use_mmap, no_lm_head, no_repack, ..Default::default() };
            let slice = Model::load(&[file], params).unwrap();
            assert!(slice.is_slice());
            assert_eq!(
                (slice.n_blocks(), slice.blocks(), slice.n_vocab()),
                (8, blocks.clone(), whole.n_vocab())
            );
            assert_eq!(slice.weights_bytes(), Gguf::open(file).unwrap().tensor_bytes());
            assert_eq!(
                slice.offload().host_bytes,
                slice.weights_bytes(),
                "nothing is there twice, and nothing else"
            );
        }
        bytes += Gguf::open(file).unwrap().tensor_bytes();
    }
    assert_eq!(bytes, whole.weights_bytes(), "every tensor is in one slice");

    let middle = pipeline::load(&cut.files[1]).unwrap();
    for blocks in [0..3, 2..5, 4..7, 6..8] {
        let params = StageParams { blocks, takes_tokens: false, has_lm_head: false, context: context() };
        let error = Stage::new(&middle, params).unwrap_err();
        assert!(matches!(&error, Error::InvalidArgument(text) if text.contains("3..5")), "{error}");
    }
    let error = Stock::new(&middle, &context(), None).unwrap_err();
    assert!(matches!(&error, Error::Unsupported(text) if text.contains("slice")), "{error}");
}

#[test]
fn ranges_of_a_slice_are_ranges_too() {
    let cut = cut("gemma2");
    let whole = pipeline::load(&cut.model).unwrap();
    let middle = pipeline::load(&cut.files[1]).unwrap();
    let rows = Row::chunk(0, 0, 20);
    let input: Vec<f32> = (0..20 * whole.n_embd()).map(|i| (i as f32 * 0.37).sin()).collect();
    let run = |model: &Model, blocks| {
        let mut out = vec![0f32; input.len()];
        let mut stage = Stage::new(model, StageParams::of_whole_model(model, blocks, context())).unwrap();
        stage.evaluate(&rows, Input::F32(&input), Output::F32(&mut out)).unwrap();
        out
    };
    assert_exact(&run(&middle, 4..6), &run(&whole, 4..6), "blocks 4 and 5 of a slice");
}

#[test]
fn a_load_of_a_slice_is_watched_and_stopped() {
    let cut = cut("llama");
    for use_mmap in [false, true] {
        let mut seen = Vec::new();
        let mut watch = |fraction: f32| {
            seen.push(fraction);
            true
        };
        let params =
            ModelParams { use_mmap, gpu_layers: Some(0), progress: Some(&mut watch), ..Default::default() };
        Model::load(&[&cut.files[1]], params).unwrap();
        assert!(seen.windows(2).all(|w| w[0] <= w[1]) && seen.last() == Some(&1.0), "{seen:?}");
        let mut stop = |_: f32| false;
        let params =
            ModelParams { use_mmap, gpu_layers: Some(0), progress: Some(&mut stop), ..Default::default() };
        assert!(matches!(Model::load(&[&cut.files[1]], params), Err(Error::Cancelled(_))));
    }
}

#[test]
fn a_plan_of_a_slice_is_that_of_the_model() {
    for arch in ["gemma3n", "jamba", "qwen3vl"] {
        let cut = cut(arch);
        let mut of_whole = GraphPlan::open(&[&cut.model]).unwrap();
        let mut of_slice = GraphPlan::open(&[&cut.files[1]]).unwrap();
        assert_eq!((of_slice.arch(), of_slice.n_blocks()), (arch, of_whole.n_blocks()));
        for blocks in [0..3, 3..6, 2..7, 5..of_whole.n_blocks()] {
            assert_eq!(of_slice.range(blocks.clone()).unwrap(), of_whole.range(blocks).unwrap(), "{arch}");
        }
    }
}

#[test]
fn a_plan_counts_what_a_session_takes() {
    // (blocks, bytes of a position, bytes that do not grow): 2 heads of 64, keys and values, as F16
    let kv = 2 * 2 * 64 * 2;
    for (arch, per_block, has_state) in
        [("llama", kv, false), ("gemma3", kv, false), ("mamba", 0, true), ("falcon-h1", kv, true)]
    {
        let folder = tempfile::tempdir().unwrap();
        let mut plan = GraphPlan::open(&[tiny::write(arch, &[], folder.path()).unwrap()]).unwrap();
        let range = plan.range(2..5).unwrap();
        assert_eq!(range.cache_bytes_per_position, 3 * per_block, "{arch}");
        assert_eq!(range.state_bytes_per_session > 0, has_state, "{arch}: {}", range.state_bytes_per_session);
    }
}

#[test]
fn rows_of_several_parts_cross_in_f16_as_well() {
    for (arch, cuts, n_parts, has_numbers) in [
        ("gemma3n", [3, 6], 2, false),
        ("rwkv7", [3, 6], 2, false),
        ("hy_v4", [3, 6], 2, true),
        ("qwen3vl", [1, 2], 2, false),
        ("kimi-k3", [3, 6], 4, false),
        ("llama", [3, 6], 1, false),
    ] {
        let options: &[&str] = if arch == "qwen3vl" { &[".n_deepstack_layers=3"] } else { &[] };
        let cut = cut_with(arch, options, &cuts);
        let whole = pipeline::load(&cut.model).unwrap();
        let mut narrow = Pipeline::new(&cut.files, &context()).unwrap().in_f16();
        let layout = narrow.stages[1].output_layout().clone();
        println!("{arch}: {layout}");
        assert!(layout.parts.len() >= n_parts, "{arch}: {layout}");
        let numbers = layout.parts.iter().filter(|p| p.value_type == ValueType::I32).count();
        assert_eq!(numbers > 0, has_numbers, "{arch}: {layout}");
        let i32s: usize =
            layout.parts.iter().filter(|p| p.value_type == ValueType::I32).map(|p| p.values as usize).sum();
        assert_eq!(layout.width_f16(), layout.width_f32() + i32s);
        let tokens = common::tokens(&whole, 3, 30);
        let rows: Vec<Row> =
            (0..30).map(|position| Row { session: 0, position, want_output: true }).collect();
        let expected = decode(&mut stock(&whole, &context()), &rows, &tokens);
        let ours = narrow.evaluate(&rows, &tokens).unwrap();
        let largest = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
        let difference = max_difference(&ours, &expected);
        println!("{arch}: F16 differs by {difference} of {largest}");
        assert!(difference > 0.0 && difference < 0.2 * largest, "{arch}: {difference} of {largest}");
    }
}

/// Inputs of each block that are made at the start (Gemma 3n, the small Gemma 4) cross for the blocks behind a cut only. That
/// they are the right ones, tests/architectures.rs and tests/families.rs say.
#[test]
fn inputs_of_blocks_before_a_cut_do_not_cross_it() {
    let e4b = [".attention.shared_kv_layers=2", ".embedding_length_per_layer_input=64"];
    for (arch, options, width) in [("gemma3n", &[][..], 256), ("gemma4", &e4b, 64)] {
        let folder = tempfile::tempdir().unwrap();
        let mut plan = GraphPlan::open(&[tiny::write(arch, options, folder.path()).unwrap()]).unwrap();
        for cut in [1, 3, 4] {
            let (before, behind) = (plan.range(0..cut).unwrap(), plan.range(cut..plan.n_blocks()).unwrap());
            assert_eq!(before.output, behind.input, "{arch}");
            let values: Vec<u32> = behind.input.parts.iter().map(|part| part.values).collect();
            assert_eq!(values[0], width * (plan.n_blocks() - cut), "{arch} before block {cut}: {values:?}");
        }
    }
}

#[test]
fn rows_get_wider_as_a_context_grows() {
    // the best 512 positions cross, which are all while there are fewer
    let options = [".attention.indexer.top_k=512", ".context_length=1024"];
    let cut = cut_with("hy_v4", &options, &[3, 6]);
    let context = ContextParams { n_ctx: 1024, n_batch: 64, ..context() };
    let whole = pipeline::load(&cut.model).unwrap();
    let mut stock = stock(&whole, &context);
    let mut ours = Pipeline::new(&cut.files, &context).unwrap();
    for call in 0..12 {
        let tokens = common::tokens(&whole, call, 64);
        let rows = Row::chunk(0, 64 * call as u32, 64);
        let expected = decode(&mut stock, &rows, &tokens);
        assert_exact(&ours.evaluate(&rows, &tokens).unwrap(), &expected, &format!("call {call}"));
    }
}

#[test]
fn a_range_that_reads_token_ids_wants_them() {
    // deepseek4 picks the experts of its first two blocks by token
    let cut = cut_with("deepseek4", &[], &[1, 4]);
    let ranges = pipeline::plan(&cut.model, &[1, 4]).unwrap();
    assert_eq!(ranges.iter().map(|r| r.reads_tokens).collect::<Vec<_>>(), [true, true, false]);
    let model = pipeline::load(&cut.files[1]).unwrap();
    let mut middle = Stage::new(&model, StageParams::of_whole_model(&model, 1..4, context())).unwrap();
    assert!(middle.reads_tokens());
    let width = middle.input_layout().width_f32();
    let rows = Row::chunk(0, 0, 2);
    let (input, mut out) = (vec![0.5f32; 2 * width], vec![0f32; 2 * width]);
    let mut run = |tokens: Option<&[i32]>| {
        middle
            .evaluate_with_tokens(&rows, tokens, Input::F32(&input), Output::F32(&mut out))
            .map(|_| out.clone())
    };
    assert!(matches!(run(None), Err(Error::WrongInput(text)) if text.contains("token ids")));
    assert!(matches!(run(Some(&[1])), Err(Error::WrongSize { got: 1, expected: 2, .. })));
    assert!(matches!(run(Some(&[1, 160])), Err(Error::UnknownToken { token: 160, .. })));
    assert!(matches!(run(Some(&[1, -1])), Err(Error::UnknownToken { token: -1, .. })));
    run(Some(&[1, 159])).unwrap();
}

#[test]
fn layouts_are_told_apart_by_their_digest() {
    let layout = |arch, cuts: [u32; 2]| {
        let folder = tempfile::tempdir().unwrap();
        let path = tiny::write(arch, &[], folder.path()).unwrap();
        pipeline::plan(&path, &cuts).unwrap().swap_remove(0).output
    };
    let (a, again, other) = (layout("llama", [3, 6]), layout("llama", [3, 6]), layout("llama", [4, 6]));
    assert_eq!(a.digest(), again.digest());
    assert_ne!(a.digest(), other.digest(), "another cut");
    assert_ne!(a.digest(), layout("talkie", [3, 6]).digest());
    assert_eq!(a.to_string(), "256 x F32 l_out-2");
}

#[test]
fn a_slice_without_a_tensor_that_its_range_needs_is_refused_by_name() {
    let cut = cut("llama");
    let keep: Vec<String> = Gguf::open(&cut.files[1])
        .unwrap()
        .tensors()
        .map(|t| t.name().to_owned())
        .filter(|name| name != "blk.4.ffn_up.weight")
        .collect();
    let file = cut.folder.path().join("short.gguf");
    slices::write(&cut.model, &keep, &file);
    let model = pipeline::load(&file).unwrap();
    let error = Stage::new(&model, StageParams::of_whole_model(&model, 3..6, context())).unwrap_err();
    let lacks = Reason::LacksWeight { name: "blk.4.ffn_up.weight".into() };
    assert!(matches!(&error, Error::NotApart(refusal) if refusal.reason == lacks), "{error}");
    let text = error.to_string();
    assert!(text.ends_with("apart: they read blk.4.ffn_up.weight, which this slice lacks"), "{text}");
}

/// Loads a slice with a description that `change` has made wrong.
fn load_changed(cut: &Cut, keep: &[String], change: impl FnOnce(&mut Absent)) -> Result<Model, Error> {
    let file = cut.folder.path().join("changed.gguf");
    slices::write_with(&cut.model, keep, &file, |mut absent| {
        change(&mut absent);
        absent.keys()
    });
    pipeline::load(&file)
}

#[test]
fn every_bad_field_of_what_is_absent_is_one_clear_error() {
    let cut = cut("llama");
    let keep: Vec<String> =
        Gguf::open(&cut.files[1]).unwrap().tensors().map(|t| t.name().to_owned()).collect();
    load_changed(&cut, &keep, |_| {}).expect("unchanged, it loads");

    type Change = Box<dyn FnOnce(&mut Absent)>;
    let change = |f: fn(&mut Absent)| -> Change { Box::new(f) };
    // (what is changed, which entry is named, what the sentence says)
    let cases: Vec<(Change, Option<usize>, &str)> = vec![
        (change(|a| a.names[2] = String::new()), Some(2), "no name"),
        (change(|a| a.names[2] = "x".repeat(64)), Some(2), "too long"),
        (change(|a| a.names[2] = "x".repeat(100_000)), Some(2), "too long"),
        (change(|a| a.names[2] = a.names[1].clone()), Some(2), "named twice"),
        (change(|a| a.names[2] = "blk.4.ffn_up.weight".into()), Some(2), "in the file as well"),
        (change(|a| a.names[2] = "blk.8.ffn_up.weight".into()), Some(2), "does not have"),
        (change(|a| a.names[2] = "blk.4294967296.x".into()), Some(2), "without a block's number"),
        (change(|a| a.names[2] = "blk.-1.x".into()), Some(2), "without a block's number"),
        (change(|a| a.names[2] = "blk.x".into()), Some(2), "without a block's number"),
        (change(|a| a.types[3] = 43), Some(3), "does not know"),
        (change(|a| a.types[3] = u32::MAX), Some(3), "does not know"),
        (change(|a| a.types[3] = 4), Some(3), "no longer knows"),
        (change(|a| a.shapes[4] = 0), Some(1), "dimension of 0"),
        (change(|a| a.shapes[7] = 0), Some(1), "dimension of 0"),
        (change(|a| a.shapes[4] = u64::MAX), Some(1), "too large"),
        (change(|a| a.shapes[4..8].fill(1 << 40)), Some(1), "more values"),
        (change(|a| a.shapes[4..8].copy_from_slice(&[1 << 62, 1, 1, 1])), Some(1), "more bytes"),
        (
            change(|a| {
                a.types[1] = 8; // q8_0: groups of 32
                a.shapes[4] = 33;
            }),
            Some(1),
            "whole number",
        ),
        (change(|a| a.types.truncate(a.names.len() - 1)), None, "types"),
        (change(|a| a.types.push(0)), None, "types"),
        (change(|a| a.shapes.truncate(4 * a.names.len() - 1)), None, "dimensions"),
        (change(|a| a.shapes.extend([1; 4])), None, "dimensions"),
        (change(|a| a.types.clear()), None, "types"),
    ];
    let n = cases.len();
    for (i, (change, entry, says)) in cases.into_iter().enumerate() {
        match load_changed(&cut, &keep, change) {
            Err(Error::BadSlice { entry: at, text }) => {
                assert_eq!(at, entry, "case {i}: {text}");
                assert!(text.contains(says) && text.contains("changed.gguf"), "case {i}: {text}");
                assert!(text.contains("split the model again"), "case {i}: {text}");
            }
            other => panic!("case {i}: {:?}", other.map(|_| ())),
        }
    }
    println!("{n} of {n} caught");
}

#[test]
fn keys_of_the_wrong_type_and_missing_ones_are_refused() {
    let cut = cut("llama");
    let keep: Vec<String> =
        Gguf::open(&cut.files[1]).unwrap().tensors().map(|t| t.name().to_owned()).collect();
    let load = |keys: Vec<(String, Value<'static>)>| {
        let file = cut.folder.path().join("keys.gguf");
        slices::write_with(&cut.model, &keep, &file, |_| keys);
        pipeline::load(&file).map(|_| ())
    };
    let mut absent = None;
    let file = cut.folder.path().join("good.gguf");
    slices::write_with(&cut.model, &keep, &file, |a| {
        absent = Some(a.clone());
        a.keys()
    });
    let absent = absent.expect("it was described");
    let mut refused = 0;
    for i in 0..3 {
        let mut without = absent.keys();
        without.remove(i);
        assert!(matches!(load(without), Err(Error::BadSlice { entry: None, .. })), "{i}");
        for wrong in [
            Value::U32(7),
            Value::string("a text"),
            Value::Array(Array::of_f32([1.0; 8])),
            Value::Array(Array::of_i32([1; 8])),
        ] {
            let mut keys = absent.keys();
            keys[i].1 = wrong;
            assert!(matches!(load(keys), Err(Error::BadSlice { entry: None, .. })), "{i}");
            refused += 1;
        }
    }
    assert_eq!(refused, 12);
}

#[test]
fn what_llama_cpp_would_not_load_is_an_error_and_no_abort() {
    // shapes that are possible and wrong: llama.cpp's own check finds them
    let cut = cut("llama");
    let keep: Vec<String> =
        Gguf::open(&cut.files[1]).unwrap().tensors().map(|t| t.name().to_owned()).collect();
    let load_failed = |change: fn(&mut Absent)| match load_changed(&cut, &keep, change) {
        Err(Error::LoadFailed(text)) => assert!(text.contains("changed.gguf"), "{text}"),
        other => panic!("{:?}", other.map(|_| ())),
    };
    load_failed(|a| a.shapes[0] += 32);
    load_failed(|a| a.names[0] = "something.else".into());
    load_failed(|a| {
        let at = a.names.iter().position(|name| name == "blk.0.attn_q.weight").expect("it is absent");
        a.names.remove(at);
        a.types.remove(at);
        a.shapes.drain(4 * at..4 * at + 4);
    });
    // a slice is one file
    let paths: [&Path; 2] = [&cut.files[1], &cut.files[2]];
    assert!(matches!(Model::load(&paths, ModelParams::default()), Err(Error::BadSlice { .. })));
}
