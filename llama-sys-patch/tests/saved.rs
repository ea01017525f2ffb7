//! Keys and values, out of the stages of one process and into those of another: what is computed behind them has the same
//! bits; what cannot be saved so is refused.

mod common;

use std::path::PathBuf;

use common::assert_exact;
use common::pipeline::{self, Pipeline};
use llama_sys_patch::test_support as tiny;
use llama_sys_patch::{ContextParams, Error, FlashAttn, Row};

/// A session's rows as they are given: a prompt in chunks, and a few one by one.
const CHUNKS: [u32; 5] = [16, 16, 7, 1, 1];
const SESSION: u32 = 1;

fn context(flash_attn: FlashAttn) -> ContextParams {
    ContextParams {
        n_ctx: 128,
        n_batch: 32,
        n_ubatch: 16,
        n_threads: 1,
        max_sessions: 2,
        flash_attn,
        ..ContextParams::default()
    }
}

fn files(arch: &str, folder: &tempfile::TempDir) -> Vec<PathBuf> {
    let path = tiny::write(arch, &[], folder.path()).unwrap();
    pipeline::cut(&path, &pipeline::plan(&path, &[3, 6]).unwrap())
}

fn rows(position: u32, n: u32) -> Vec<Row> {
    Row::chunk(SESSION, position, n as usize)
}

fn tokens(position: u32, n: u32) -> Vec<i32> {
    (position..position + n).map(|i| (i as i32 * 37 + 11) % 100).collect()
}

fn evaluate(pipeline: &mut Pipeline, position: u32, n: u32) -> Vec<f32> {
    pipeline.evaluate(&rows(position, n), &tokens(position, n)).unwrap()
}

/// What every stage gives of each chunk.
fn saved(pipeline: &mut Pipeline) -> Vec<Vec<Vec<u8>>> {
    let mut from = 0;
    let chunk = |n| {
        let positions = from..from + n;
        from += n;
        let mut of = |stage: &mut llama_sys_patch::Stage| {
            let mut bytes = vec![1, 2, 3];
            stage.save(SESSION, positions.clone(), &mut bytes).unwrap();
            assert_eq!(bytes.len(), stage.saved_bytes().unwrap() * positions.len());
            bytes
        };
        pipeline.stages.iter_mut().map(&mut of).collect()
    };
    CHUNKS.into_iter().map(chunk).collect()
}

fn restore(pipeline: &mut Pipeline, saved: &[Vec<Vec<u8>>]) {
    let mut from = 0;
    for (n, of_stages) in CHUNKS.into_iter().zip(saved) {
        for (stage, bytes) in pipeline.stages.iter_mut().zip(of_stages) {
            stage.restore(&rows(from, n), &tokens(from, n), bytes).unwrap();
        }
        from += n;
    }
}

#[test]
fn what_is_computed_behind_restored_rows_has_the_same_bits() {
    // plain, with windows, with values inside the keys, several parts to a position, with tokens read in the middle
    for arch in ["qwen2", "gemma3", "deepseek2", "qwen2vl", "gemma3n"] {
        for flash_attn in [FlashAttn::Auto, FlashAttn::Off] {
            let what = format!("{arch}, {flash_attn:?}");
            let folder = tempfile::tempdir().unwrap();
            let files = files(arch, &folder);
            let mut before = Pipeline::new(&files, &context(flash_attn)).unwrap();
            // a neighbour, so that the session's is not the first stream
            before.evaluate(&Row::chunk(0, 0, 9), &tokens(50, 9)).unwrap();
            let mut position = 0;
            for n in CHUNKS {
                evaluate(&mut before, position, n);
                position += n;
            }
            let bytes = saved(&mut before);
            let expected = [evaluate(&mut before, position, 1), evaluate(&mut before, position + 1, 5)];

            let mut after = Pipeline::new(&files, &context(flash_attn)).unwrap();
            restore(&mut after, &bytes);
            let ours = [evaluate(&mut after, position, 1), evaluate(&mut after, position + 1, 5)];
            assert_exact(&ours[0], &expected[0], &what);
            assert_exact(&ours[1], &expected[1], &what);

            // and a part of them, behind which it goes on otherwise
            before.stages.iter_mut().chain(&mut after.stages).for_each(|s| s.rewind(SESSION, 20).unwrap());
            let [expected, ours] = [&mut before, &mut after].map(|p| evaluate(p, 20, 3));
            assert_exact(&ours, &expected, &format!("{what}, taken back"));

            // what is not the same is not taken for it
            let mut spoiled = bytes.clone();
            spoiled
                .iter_mut()
                .flatten()
                .for_each(|bytes| bytes.iter_mut().step_by(2).for_each(|b| *b ^= 0x10));
            let mut other = Pipeline::new(&files, &context(flash_attn)).unwrap();
            restore(&mut other, &spoiled);
            let logits = other.evaluate(&rows(position, 1), &tokens(position, 1));
            assert!(logits.is_err() || logits.unwrap() != expected, "{what}: the bytes are not looked at");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_and_the_session_is_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let files = files("qwen2", &folder);
    let mut pipeline = Pipeline::new(&files, &context(FlashAttn::Auto)).unwrap();
    evaluate(&mut pipeline, 0, 16);
    let stage = &mut pipeline.stages[0];
    let mut bytes = Vec::new();
    assert!(matches!(stage.save(SESSION, 0..17, &mut bytes), Err(Error::WrongPosition { .. })));
    assert!(matches!(stage.save(2, 0..1, &mut bytes), Err(Error::UnknownSession { .. })));
    stage.save(SESSION, 4..16, &mut bytes).unwrap();
    let short = &bytes[1..];
    assert!(matches!(stage.restore(&rows(16, 12), &tokens(16, 12), short), Err(Error::WrongSize { .. })));
    assert!(matches!(
        stage.restore(&rows(17, 12), &tokens(16, 12), &bytes),
        Err(Error::WrongPosition { .. })
    ));
    assert!(matches!(stage.restore(&rows(16, 12), &[-1; 12], &bytes), Err(Error::UnknownToken { .. })));
    assert!(matches!(stage.restore(&rows(16, 12), &[1; 11], &bytes), Err(Error::WrongSize { .. })));
    assert_eq!(stage.length(SESSION).unwrap(), 16);
    let ours = evaluate(&mut pipeline, 16, 4);
    let mut fresh = Pipeline::new(&files, &context(FlashAttn::Auto)).unwrap();
    evaluate(&mut fresh, 0, 16);
    assert_exact(&ours, &evaluate(&mut fresh, 16, 4), "after what was refused");
}

#[test]
fn states_that_are_more_than_keys_and_values_are_refused() {
    for arch in ["mamba", "qwen35", "lfm2"] {
        let folder = tempfile::tempdir().unwrap();
        let files = files(arch, &folder);
        let context = ContextParams { max_sessions: 1, ..context(FlashAttn::Auto) };
        let mut pipeline = Pipeline::new(&files, &context).unwrap();
        pipeline.evaluate(&Row::chunk(0, 0, 4), &[1; 4]).unwrap();
        for stage in &mut pipeline.stages {
            assert_eq!(stage.saved_bytes(), None, "{arch}");
            assert!(matches!(stage.save(0, 0..4, &mut Vec::new()), Err(Error::Unsupported(_))), "{arch}");
            let restored = stage.restore(&Row::chunk(0, 4, 1), &[1], &[]);
            assert!(matches!(restored, Err(Error::Unsupported(_))), "{arch}");
            assert_eq!(stage.length(0).unwrap(), 4);
        }
    }
}
