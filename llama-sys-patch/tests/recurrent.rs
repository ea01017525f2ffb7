//! Models with recurrent states: what can be taken back, what cannot, and sessions that a failed call has lost.

mod common;

use common::pipeline::{self, Pipeline};
use common::{assert_exact, decode, stock};
use half::f16;
use llama_sys_patch::test_support as tiny;
use llama_sys_patch::{ContextParams, Error, Input, Output, Row, Stage, StageParams, Stock};

const SNAPSHOTS: u32 = 3;

fn context(snapshots: u32, max_sessions: u32) -> ContextParams {
    ContextParams {
        n_ctx: 128,
        n_batch: 64,
        n_ubatch: 16,
        n_threads: 1,
        max_sessions,
        snapshots,
        ..ContextParams::default()
    }
}

/// A tiny model in three slices, and llama_decode() beside them.
struct Pair {
    ours: Pipeline,
    stock: Stock,
    _folder: tempfile::TempDir,
}

impl Pair {
    fn new(arch: &str, context: &ContextParams) -> Pair {
        let folder = tempfile::tempdir().unwrap();
        let path = tiny::write(arch, &[], folder.path()).unwrap();
        let ranges = pipeline::plan(&path, &[3, 6]).unwrap();
        let files = pipeline::cut(&path, &ranges);
        let whole = pipeline::load(&path).unwrap();
        Pair { ours: Pipeline::new(&files, context).unwrap(), stock: stock(&whole, context), _folder: folder }
    }

    /// The same rows through both, the same bits out of both.
    fn step(&mut self, session: u32, position: u32, tokens: &[i32], what: &str) -> Vec<f32> {
        let rows: Vec<Row> = (0..tokens.len())
            .map(|i| Row { session, position: position + i as u32, want_output: true })
            .collect();
        let expected = decode(&mut self.stock, &rows, tokens);
        assert_exact(&self.ours.evaluate(&rows, tokens).unwrap(), &expected, what);
        expected
    }

    fn rewind(&mut self, session: u32, position: u32) {
        self.stock.rewind(session, position).unwrap();
        self.ours.rewind(session, position).unwrap();
    }

    fn lowest(&self, session: u32) -> Vec<Option<u32>> {
        let stages = self.ours.stages.iter().map(|stage| stage.lowest(session).unwrap());
        stages.chain([self.stock.lowest(session).unwrap()]).collect()
    }
}

/// Architectures for which llama.cpp keeps snapshots.
const WITH_SNAPSHOTS: [&str; 11] = [
    "qwen35",
    "qwen35moe",
    "nemotron_h",
    "nemotron_h_moe",
    "lfm2",
    "lfm2moe",
    "deepseek4",
    "kimi-k3",
    "qwen4exp",
    "glm5-next",
    "bailingmoe3",
];

/// Rows are taken back as after wrong guesses of a draft: some are evaluated, most of them forgotten, and on. What follows
/// must be llama_decode()'s after the same, and that of a session that never had the forgotten rows.
#[test]
fn rows_with_snapshots_are_taken_back() {
    for arch in WITH_SNAPSHOTS {
        let mut pair = Pair::new(arch, &context(SNAPSHOTS, 1));
        let mut straight = Pair::new(arch, &context(SNAPSHOTS, 1));
        let text: Vec<i32> = (0..60).map(|i| (i * 37 + 5) % 160).collect();
        pair.step(0, 0, &text[..20], arch);
        straight.step(0, 0, &text[..20], arch);
        let mut position = 20;
        for (round, kept) in [1, 2, 3, 1, 1].into_iter().enumerate() {
            // right tokens, then wrong ones up to a guess of four
            let at = position as usize;
            let mut guess = text[at..at + kept].to_vec();
            guess.resize(4, 159);
            let what = format!("{arch}, round {round}");
            let logits = pair.step(0, position, &guess, &what);
            assert_eq!(pair.lowest(0), [Some(position + 4 - SNAPSHOTS); 4], "{what}");
            position += kept as u32;
            pair.rewind(0, position);
            assert_eq!(pair.lowest(0), [Some(position); 4], "{what}: once only");
            // the state that it went back to is that after the right ones
            let n_vocab = logits.len() / 4;
            let mut plain = Vec::new();
            for (i, token) in text[at..at + kept].iter().enumerate() {
                plain.extend(straight.step(0, (at + i) as u32, &[*token], &what));
            }
            let largest = plain.iter().fold(0f32, |max, x| max.max(x.abs()));
            let off = common::max_difference(&logits[..kept * n_vocab], &plain);
            assert!(off <= 1e-2 * largest, "{what}: other kernels, but the same rows: {off} of {largest}");
        }
        let (a, b) = (pair.step(0, position, &[7], arch), straight.step(0, position, &[7], arch));
        let largest = b.iter().fold(0f32, |max, x| max.max(x.abs()));
        let off = common::max_difference(&a, &b);
        assert!(off <= 1e-2 * largest, "{arch}: after all rounds {off} of {largest}");
    }
}

#[test]
fn sessions_with_snapshots_do_not_move_each_other() {
    for arch in ["qwen35", "lfm2", "nemotron_h"] {
        let mut pair = Pair::new(arch, &context(SNAPSHOTS, 3));
        for session in 0..3 {
            pair.step(session, 0, &[10 + session as i32; 9], arch);
        }
        pair.step(1, 9, &[1, 2, 3], arch);
        assert_eq!(pair.lowest(1), [Some(10); 4]);
        // another session's call moves states and leaves snapshots behind: nothing is promised any more
        pair.step(0, 9, &[4], arch);
        assert_eq!(pair.lowest(1), [Some(12); 4]);
        assert!(matches!(pair.ours.rewind(1, 11), Err(Error::CannotRewind { lowest: 12, .. })));
        pair.step(2, 9, &[5, 6], arch);
        pair.rewind(2, 10);
        for session in [2, 0, 1] {
            let at = pair.stock.length(session).unwrap();
            pair.step(session, at, &[8, 9], arch);
        }
    }
}

#[test]
fn what_has_no_snapshots_says_that_it_must_be_replayed() {
    // llama.cpp keeps none for these, whatever it is asked for
    for arch in ["qwen3next", "granitehybrid", "falcon-h1", "kimi-linear", "jamba", "mamba", "rwkv7"] {
        let mut pair = Pair::new(arch, &context(SNAPSHOTS, 1));
        pair.step(0, 0, &[1, 2, 3, 4, 5], arch);
        assert_eq!(pair.lowest(0), [Some(5); 4], "{arch}");
        for stage in &mut pair.ours.stages {
            let error = stage.rewind(0, 3).unwrap_err();
            assert_eq!(error, Error::CannotRewind { session: 0, position: 3, lowest: 5 }, "{arch}");
            assert_eq!(stage.rewind(0, 5), Ok(()));
            assert_eq!(stage.length(0), Ok(5), "nothing happened");
        }
        assert!(matches!(pair.stock.rewind(0, 4), Err(Error::CannotRewind { .. })));
        // on as if nothing had been asked; then from nothing again
        pair.step(0, 5, &[6], arch);
        pair.rewind(0, 0);
        let again = pair.step(0, 0, &[1, 2, 3], arch);
        let mut fresh = Pair::new(arch, &context(SNAPSHOTS, 1));
        assert_exact(&again, &fresh.step(0, 0, &[1, 2, 3], arch), arch);
    }
}

/// A middle stage of a tiny model.
fn middle(arch: &str, context: ContextParams) -> Stage {
    let folder = tempfile::tempdir().unwrap();
    let path = tiny::write(arch, &[], folder.path()).unwrap();
    let model = pipeline::load(&path).unwrap();
    Stage::new(&model, StageParams::of_whole_model(&model, 3..6, context)).unwrap()
}

#[test]
fn a_session_that_a_failed_call_has_spoilt_is_lost_until_it_is_cleared() {
    for (arch, snapshots, recurrent) in [
        ("qwen3next", 0, true),
        ("qwen35", SNAPSHOTS, true),
        ("mamba", 0, true),
        ("jamba", 0, true),
        ("llama", 0, false),
    ] {
        let mut stage = middle(arch, context(snapshots, 2));
        let n = stage.input_layout().width_f32();
        let good: Vec<f32> = (0..5 * n).map(|i| (i as f32 * 0.37).sin()).collect();
        // too large for F16, which is found out when all is computed
        let bad = vec![1e6f32; 3 * n];
        let fail = |stage: &mut Stage, session, position| {
            let mut out = vec![f16::ZERO; bad.len()];
            let rows = Row::chunk(session, position, 3);
            stage.evaluate(&rows, Input::F32(&bad), Output::F16(&mut out)).unwrap_err()
        };
        let run = |stage: &mut Stage, session, position, input: &[f32]| {
            let mut out = vec![0f32; input.len()];
            let rows = Row::chunk(session, position, input.len() / n);
            stage.evaluate(&rows, Input::F32(input), Output::F32(&mut out)).map(|_| out)
        };
        let first = run(&mut stage, 0, 0, &good).unwrap();
        run(&mut stage, 1, 0, &good).unwrap();
        let error = fail(&mut stage, 0, 5);
        assert!(matches!(error, Error::OutputOverflows { block: 5, .. }), "{arch}: {error}");
        assert_eq!(stage.length(0), Ok(5), "{arch}");
        if recurrent {
            assert_eq!(stage.lowest(0), Ok(None), "{arch}");
            let lost = Error::SessionLost { session: 0 };
            assert_eq!(run(&mut stage, 0, 5, &good), Err(lost.clone()), "{arch}");
            assert_eq!(stage.rewind(0, 3), Err(lost.clone()), "{arch}");
            assert_eq!(stage.rewind(0, 5), Err(lost), "{arch}");
            stage.clear(0).unwrap();
            assert_exact(&run(&mut stage, 0, 0, &good).unwrap(), &first, arch);
        } else {
            assert_eq!(stage.lowest(0), Ok(Some(0)), "{arch}");
        }
        assert_eq!(stage.lowest(0).map(|at| at.is_some()), Ok(true), "{arch}");
        // the other session has noticed nothing, and one that was empty is empty again
        let mut fresh = middle(arch, context(snapshots, 2));
        run(&mut fresh, 1, 0, &good).unwrap();
        let (a, b) = (run(&mut stage, 1, 5, &good), run(&mut fresh, 1, 5, &good));
        assert_exact(&a.unwrap(), &b.unwrap(), arch);
        fail(&mut fresh, 0, 0);
        assert_eq!(fresh.length(0), Ok(0));
        assert_exact(&run(&mut fresh, 0, 0, &good).unwrap(), &first, arch);
    }
}

#[test]
fn states_are_those_of_the_range_s_blocks() {
    for arch in ["mamba", "qwen3next", "lfm2", "llama", "gemma3", "qwen4exp", "glm5-next"] {
        let folder = tempfile::tempdir().unwrap();
        let path = tiny::write(arch, &[], folder.path()).unwrap();
        let model = pipeline::load(&path).unwrap();
        let whole = Stock::new(&model, &context(0, 2), None).unwrap().info().kv_bytes;
        let bytes = |blocks| {
            let params = StageParams::of_whole_model(&model, blocks, context(0, 2));
            Stage::new(&model, params).unwrap().kv_bytes()
        };
        let (parts, all) = (bytes(0..3) + bytes(3..6) + bytes(6..8), bytes(0..8));
        assert_eq!(parts, all, "{arch}");
        // with so few positions every one is looked at, and no index of them is read
        assert!(if arch == "qwen4exp" { all < whole } else { all == whole }, "{arch}: {all} of {whole}");
        assert!(bytes(3..4) < whole / 2, "{arch}");
    }
}

/// Sessions are cleared, and what comes next is what llama_decode() makes of it after the same: also where a memory writes
/// zeros to what it forgets, and where 128 positions fill a block of compressed keys.
#[test]
fn a_cleared_session_begins_anew_beside_another() {
    for arch in ["deepseek4", "qwen4exp", "glm5-next", "qwen35"] {
        let mut pair = Pair::new(arch, &ContextParams { n_ctx: 192, ..context(0, 2) });
        let text: Vec<i32> = (0..170).map(|i| (i * 37 + 5) % 160).collect();
        let fill = |pair: &mut Pair, session, text: &[i32]| -> Vec<f32> {
            let mut at = pair.stock.length(session).unwrap();
            let mut logits = Vec::new();
            for chunk in text.chunks(50) {
                logits.extend(pair.step(session, at, chunk, arch));
                at += chunk.len() as u32;
            }
            logits
        };
        fill(&mut pair, 1, &text[..140]);
        let first = fill(&mut pair, 0, &text);
        pair.rewind(0, 0);
        fill(&mut pair, 0, &text[100..]);
        fill(&mut pair, 1, &text[140..]);
        pair.rewind(0, 0);
        assert_exact(&fill(&mut pair, 0, &text), &first, arch);
    }
}
