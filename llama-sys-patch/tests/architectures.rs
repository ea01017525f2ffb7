//! Every architecture that llama.cpp has a name for: a tiny random model, cut in three files, each with its own tensors only,
//! against llama_decode() of the whole. The prompt in chunks and 32 steps, all rows' logits: the same bits. The same
//! comparison with the middle left out must differ, or it says nothing.
//!
//! There is no list of architectures that work: what is listed here is what does not, and why. A new name in a newer
//! llama.cpp is tried like all others.
//!
//! The result is written as a table to `architectures.md` in `DIM_ARCHITECTURES_DIR`, or in cargo's folder for tests.

mod common;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::pipeline::{self, Pipeline, Rows};
use common::{max_difference, tiny};
use llama_sys_patch::{ContextParams, Error, FlashAttn, Model, Row, Stock, test_support};

const CUTS: [u32; 2] = [3, 6];
const N_PROMPT: usize = 40;
const N_STEPS: usize = 32;
/// The number that a change must not make smaller.
const EXACT_AT_LEAST: usize = 125;

/// Not text decoders, and what they are.
const NOT_DECODERS: &[(&str, &str)] = &[
    ("clip", "the vision part of other models"),
    ("gptj", "a name that llama.cpp has no code for"),
    ("bert", "an encoder"),
    ("modern-bert", "an encoder"),
    ("nomic-bert", "an encoder"),
    ("nomic-bert-moe", "an encoder"),
    ("neo-bert", "an encoder"),
    ("jina-bert-v2", "an encoder"),
    ("jina-bert-v3", "an encoder"),
    ("eurobert", "an encoder"),
    ("gemma-embedding", "an encoder"),
    ("llama-embed", "an encoder"),
    ("t5", "has an encoder beside the decoder"),
    ("t5encoder", "an encoder"),
    ("clef", "a classifier"),
    ("wavtokenizer-dec", "audio"),
    ("dream", "generates by diffusion"),
    ("llada", "generates by diffusion"),
    ("llada-moe", "generates by diffusion"),
    ("rnd1", "generates by diffusion"),
    ("gemma4-assistant", "drafts for another model"),
    ("eagle3", "drafts for another model"),
    ("dflash", "drafts for another model"),
];

/// Text decoders for which no tiny model is made here: nothing is known.
const NOT_TRIED: &[(&str, &str)] = &[
    ("dots3note", "no tiny model: its keys are not known here"),
    ("qwen3tts", "no tiny model: its keys are not known here"),
];

/// Text decoders that are refused, with what the refusal says.
const REFUSED: &[(&str, &str)] = &[("hrm_text", "a weight of block")];

fn reason(list: &'static [(&str, &str)], arch: &str) -> Option<&'static str> {
    list.iter().find(|(name, _)| *name == arch).map(|(_, why)| *why)
}

/// What came out for one architecture.
#[derive(Debug, Clone)]
enum Outcome {
    Exact(Facts),
    NotExact(String),
    Refused(String),
    NotADecoder(&'static str),
    NotTried(&'static str),
    Failed(String),
}

/// Of an exact one, for the table.
#[derive(Debug, Clone)]
struct Facts {
    crossing: [String; 2],
    reads_tokens: bool,
    take_back: &'static str,
    max_logit: f32,
    control: f32,
}

fn context(arch: &str) -> ContextParams {
    ContextParams {
        n_ctx: 128,
        n_batch: N_PROMPT as u32,
        n_ubatch: 16,
        n_threads: 1,
        // llama.cpp asserts on a tiny model of it with fused attention
        flash_attn: if arch == "plm" { FlashAttn::Off } else { FlashAttn::Auto },
        ..ContextParams::default()
    }
}

fn all_rows(position: usize, n: usize) -> Vec<Row> {
    (0..n).map(|i| Row { session: 0, position: (position + i) as u32, want_output: true }).collect()
}

fn decode(stock: &mut Stock, rows: &[Row], tokens: &[i32]) -> Result<Vec<f32>, Error> {
    let mut logits = vec![0f32; rows.len() * stock.model().n_vocab()];
    stock.decode(rows, tokens, &mut logits)?;
    Ok(logits)
}

fn differs(ours: &[f32], stock: &[f32], what: &str) -> Result<(), String> {
    if ours.iter().zip(stock).all(|(a, b)| a.to_bits() == b.to_bits()) {
        return Ok(());
    }
    Err(format!("{what}: max |difference| = {}", max_difference(ours, stock)))
}

/// How far a session can be taken back: to any row, by a few where there are snapshots, or not at all.
fn take_back(model: &Model, context: &ContextParams) -> Result<&'static str, Error> {
    let context = ContextParams { snapshots: 3, ..context.clone() };
    let mut stock = Stock::new(model, &context, None)?;
    decode(&mut stock, &all_rows(0, 8), &[1; 8])?;
    Ok(match stock.lowest(0)? {
        Some(0) => "any rows",
        Some(5) => "snapshots",
        _ => "replay",
    })
}

/// The comparison.
fn compare(arch: &str) -> Result<Outcome, Error> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = tiny::write(arch, &[], folder.path())?;
    let ranges = match pipeline::plan(&path, &CUTS) {
        Ok(ranges) => ranges,
        Err(Error::Unsupported(why)) => return Ok(Outcome::Refused(why)),
        Err(other) => return Err(other),
    };
    let files = pipeline::cut(&path, &ranges);
    let context = context(arch);
    let whole = pipeline::load(&path)?;
    let mut stock = Stock::new(&whole, &context, None)?;
    let mut ours = Pipeline::new(&files, &context)?;
    let n_vocab = whole.n_vocab();

    let tokens = common::tokens(&whole, 7, N_PROMPT + N_STEPS + 1);
    let rows = all_rows(0, N_PROMPT);
    let mut expected = decode(&mut stock, &rows, &tokens[..N_PROMPT])?;
    let max_logit = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
    let mut found = differs(&ours.evaluate(&rows, &tokens[..N_PROMPT])?, &expected, "prompt");
    let mut moved = 0f32;
    for step in 0..N_STEPS {
        let at = N_PROMPT + step;
        let (rows, token) = (all_rows(at, 1), &tokens[at..=at]);
        let before = expected[expected.len() - n_vocab..].to_vec();
        expected = decode(&mut stock, &rows, token)?;
        moved = moved.max(max_difference(&before, &expected));
        let logits = ours.evaluate(&rows, token)?;
        found = found.and(differs(&logits, &expected, &format!("step {step}")));
    }

    // that the comparison can fail: one more step, past the middle
    let at = N_PROMPT + N_STEPS;
    let (rows, token) = (all_rows(at, 1), &tokens[at..]);
    expected = decode(&mut stock, &rows, token)?;
    let mut past = ours.step(0, &rows, token, &Rows::F32(Vec::new()))?;
    let width = ours.stages[2].input_layout().width_f32();
    if ours.stages[0].output_layout().width_f32() != width {
        past = Rows::F32(vec![0f32; width]);
    }
    let Rows::F32(without) = ours.step(2, &rows, token, &past)? else { unreachable!("logits are F32") };
    let control = max_difference(&without, &expected);

    if let Err(why) = found {
        return Ok(Outcome::NotExact(why));
    }
    if !(control > 0.0 && moved > 0.0 && max_logit.is_finite()) {
        let why =
            format!("the comparison says nothing: control {control}, moved {moved}, largest {max_logit}");
        return Ok(Outcome::NotExact(why));
    }
    let crossing = [0, 1].map(|i| {
        let layout = ours.stages[i].output_layout();
        if layout.is_one_f32_row() && layout.width_f32() == whole.n_embd() {
            return "1".to_owned();
        }
        format!("{:.2} ({layout})", layout.width_f32() as f64 / whole.n_embd() as f64)
    });
    Ok(Outcome::Exact(Facts {
        crossing,
        reads_tokens: ours.stages.iter().any(|stage| stage.reads_tokens()),
        take_back: take_back(&whole, &context)?,
        max_logit,
        control,
    }))
}

fn outcome(arch: &str) -> Outcome {
    if let Some(why) = reason(NOT_DECODERS, arch) {
        return Outcome::NotADecoder(why);
    }
    if let Some(why) = reason(NOT_TRIED, arch) {
        return Outcome::NotTried(why);
    }
    compare(arch).unwrap_or_else(|error| Outcome::Failed(error.to_string()))
}

fn table(results: &[(String, Outcome)]) -> String {
    let mut text = String::from(
        "| architecture | result | a row at the two cuts, in n_embd values | token ids | can be taken back |\n\
         |---|---|---|---|---|\n",
    );
    for (arch, outcome) in results {
        let line = match outcome {
            Outcome::Exact(f) => {
                let ids = if f.reads_tokens { "read" } else { "" };
                format!("exact | {} / {} | {ids} | {}", f.crossing[0], f.crossing[1], f.take_back)
            }
            Outcome::NotExact(why) => format!("NOT EXACT: {why} | | |"),
            Outcome::Refused(why) => format!("refused: {why} | | |"),
            Outcome::NotADecoder(why) => format!("not a text decoder: {why} | | |"),
            Outcome::NotTried(why) => format!("not tried: {why} | | |"),
            Outcome::Failed(why) => format!("FAILED: {why} | | |"),
        };
        writeln!(text, "| {arch} | {line} |").expect("a String takes it");
    }
    text
}

#[test]
fn every_text_decoder_is_exact_in_three_slices() {
    let names = test_support::architectures();
    let next = AtomicUsize::new(0);
    let results = Mutex::new(vec![None; names.len()]);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((i, arch)) = {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    names.get(i).map(|arch| (i, arch))
                } {
                    let outcome = outcome(arch);
                    if let Outcome::Exact(f) = &outcome {
                        println!("{arch}: exact, largest logit {}, control {}", f.max_logit, f.control);
                    } else {
                        println!("{arch}: {outcome:?}");
                    }
                    results.lock().expect("no thread panics with it")[i] = Some(outcome);
                }
            });
        }
    });
    let results = results.into_inner().expect("no thread panicked");
    let results: Vec<(String, Outcome)> =
        names.into_iter().zip(results.into_iter().map(|r| r.expect("all were tried"))).collect();

    let folder = std::env::var_os("DIM_ARCHITECTURES_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    std::fs::write(folder.join("architectures.md"), table(&results)).expect("the table is written");

    let n_exact = results.iter().filter(|(_, o)| matches!(o, Outcome::Exact(_))).count();
    println!("{n_exact} of {} names exact", results.len());
    let wrong: Vec<_> = results
        .iter()
        .filter(|(arch, outcome)| match outcome {
            Outcome::NotExact(_) | Outcome::Failed(_) => true,
            Outcome::Refused(why) => !reason(REFUSED, arch).is_some_and(|says| why.contains(says)),
            Outcome::Exact(_) => reason(REFUSED, arch).is_some(),
            Outcome::NotADecoder(_) | Outcome::NotTried(_) => false,
        })
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(n_exact >= EXACT_AT_LEAST, "{n_exact} are exact");
    for (name, _) in NOT_DECODERS.iter().chain(NOT_TRIED).chain(REFUSED) {
        assert!(results.iter().any(|(arch, _)| arch == name), "llama.cpp has no {name} any more");
    }
}
