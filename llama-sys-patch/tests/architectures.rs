//! Every architecture that llama.cpp has a name for: a tiny random model, cut in three files, each with its own tensors only,
//! against llama_decode() of the whole. The prompt in chunks and 32 steps, all rows' logits: the same bits. The same
//! comparison with the middle left out must differ, or it says nothing.
//!
//! There is no list of architectures that work: what is listed here is what does not, and why. A new name in a newer
//! llama.cpp is tried like all others.
//!
//! docs/MODELS.md is written from the result, and has to be what is committed.

mod common;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::max_difference;
use common::pipeline::{self, Pipeline, Rows};
use gguf_tools::arch::SUPPORTED;
use llama_sys_patch::{
    ContextParams, Error, FlashAttn, GraphPlan, Model, Row, Stage, StageParams, Stock, test_support,
};

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
    HoldsOthers(String),
    Refused(String),
    NotADecoder(&'static str),
    NotTried(&'static str),
    Failed(String),
}

/// Of an exact one, for the table.
#[derive(Debug, Clone)]
struct Facts {
    memory: &'static str,
    cuts: String,
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
    let path = test_support::write(arch, &[], folder.path())?;
    let ranges = match pipeline::plan(&path, &CUTS) {
        Ok(ranges) => ranges,
        Err(Error::NotApart(refusal)) => return Ok(Outcome::Refused(refusal.to_string())),
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
    let mut plan = GraphPlan::open(&[&path])?;
    if let Some(why) = holds_others(arch, &whole, &ours, &context)? {
        return Ok(Outcome::HoldsOthers(why));
    }
    Ok(Outcome::Exact(Facts {
        memory: plan.memory(),
        cuts: cuts(&mut plan),
        crossing,
        reads_tokens: ours.stages.iter().any(|stage| stage.reads_tokens()),
        take_back: take_back(&whole, &context)?,
        max_logit,
        control,
    }))
}

/// Stages that hold more than the caches and states of their own blocks, and why; no more than one block's each.
const HOLD_MORE: &[(&str, &str)] = &[
    ("deepseek4", "clears the bytes of all blocks: those of others share some"),
    ("graniteswitch", "every block reads the keys of a router that none of them owns"),
];

/// What stages hold together, and what a stage of the whole model does, where that is not the same.
fn holds_others(
    arch: &str,
    whole: &Model,
    ours: &Pipeline,
    context: &ContextParams,
) -> Result<Option<String>, Error> {
    let params = StageParams::of_whole_model(whole, whole.blocks(), context.clone());
    let all = Stage::new(whole, params)?.kv_bytes();
    let each: Vec<u64> = ours.stages.iter().map(Stage::kv_bytes).collect();
    let together: u64 = each.iter().sum();
    let more = reason(HOLD_MORE, arch).map_or(0, |_| each.len() as u64 * all / u64::from(whole.n_blocks()));
    Ok((together < all || together > all + more)
        .then(|| format!("slices with {each:?} bytes of caches and states; the whole model has {all}")))
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

/// Where a model can be cut, in words: `anywhere`, or the blocks before which it can.
fn cuts(plan: &mut GraphPlan) -> String {
    let n_blocks = plan.n_blocks();
    let possible: Vec<u32> = (1..n_blocks).filter(|&block| plan.cut(block).is_ok()).collect();
    if possible.len() as u32 == n_blocks - 1 {
        return "anywhere".to_owned();
    }
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for block in possible {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == block => *last = block,
            _ => runs.push((block, block)),
        }
    }
    let text = |&(first, last): &(u32, u32)| {
        if first == last { first.to_string() } else { format!("{first} to {last}") }
    };
    match runs.is_empty() {
        true => "nowhere".to_owned(),
        false => format!("before {}", runs.iter().map(text).collect::<Vec<_>>().join(", ")),
    }
}

/// Models with inputs for each block, made at the start, as wide as they are released: what crosses.
fn per_block_inputs() -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    let mut text = String::from(
        "| model | before block | values a token | bytes, F16 | bytes, F32 |\n|---|---|---|---|---|\n",
    );
    let cases: [(&str, &str, u32, &[&str]); 2] = [
        ("gemma3n", "Gemma 3n E2B", 30, &[".embedding_length=2048"]),
        (
            "gemma4",
            "Gemma 4 E4B",
            42,
            &[
                ".embedding_length=2560",
                ".attention.shared_kv_layers=18",
                ".embedding_length_per_layer_input=256",
            ],
        ),
    ];
    for (arch, model, n_blocks, options) in cases {
        test_support::write_model(arch, n_blocks, options, &path).expect("a model");
        let mut plan = GraphPlan::open(&[&path]).expect("a plan");
        let cuts: Vec<u32> = (1..n_blocks).filter(|&block| plan.cut(block).is_ok()).collect();
        for cut in [cuts[0], cuts[cuts.len() / 2], cuts[cuts.len() - 1]] {
            let layout = plan.range(cut..n_blocks).expect("a range").input;
            let (values, f16, f32) = (layout.to_string(), layout.bytes_f16(), layout.bytes_f32());
            writeln!(text, "| {model} | {cut} | {values} | {f16} | {f32} |").expect("a String takes it");
        }
    }
    text
}

/// Models whose late blocks share keys and values, as they are released: where each can be cut.
fn shared_caches() -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let cases: [(&str, &str, u32, &[&str]); 3] = [
        ("gemma3n", "a model of 30 blocks (E2B)", 30, &[]),
        ("gemma4", "35 blocks, of which 20 share (E2B)", 35, &[".attention.shared_kv_layers=20"]),
        ("gemma4", "42 blocks, of which 18 share (E4B)", 42, &[".attention.shared_kv_layers=18"]),
    ];
    let mut text = String::from("| architecture | model | cuts | why not elsewhere |\n|---|---|---|---|\n");
    for (arch, model, n_blocks, options) in cases {
        let path = folder.path().join("model.gguf");
        test_support::write_model(arch, n_blocks, options, &path).expect("a tiny model");
        let mut plan = GraphPlan::open(&[&path]).expect("a plan");
        let Err(Error::NotApart(refusal)) = plan.cut(n_blocks - 1) else { panic!("the last block shares") };
        let why = refusal.reason.of("the last blocks");
        writeln!(text, "| {arch} | {model} | {} | {why} |", cuts(&mut plan)).expect("a String takes it");
    }
    text
}

const HEAD: &str = "# Models

Every text model that llama.cpp runs can be cut by `dim-split`; there is no list that one would have to be on. llama.cpp's own
graph says what a range of blocks needs, whether and where the model can be cut, and what crosses there. `dim-split MODEL
--dry-run` shows it for yours.

This page is written by a test (`llama-sys-patch/tests/architectures.rs`, part of `make test`), which also fails when it is no
longer true. For every architecture that the pinned llama.cpp names it makes a tiny model with random weights, cuts it in
three files, each with its own tensors only, and holds the three, one after the other, against `llama_decode()` of the whole:
a prompt of 40 tokens in chunks and 32 steps, the logits of every row. **Exact** means the same bits; leaving the middle out
changes them. It says nothing of real weights: [REAL.md](REAL.md) has some of those.

- *memory*: what is kept of past positions. Recurrent states cannot be taken back row by row: where the column says `replay`, a
  session that is taken back is evaluated anew; `snapshots`: but for rows of its last step, as many as `--snapshots` says.
- *cuts*: of a model of 8 blocks (gemma3n: as it is). Blocks that predict further tokens (NextN, MTP) are left out of slices.
- *a row*: what crosses the cuts before blocks 3 and 6, in hidden rows of n_embd values; 1 is the hidden row alone.

Over processes and sockets, with the worker killed in the middle of the reply (`tests/families.rs`): FAMILIES.

";

fn table(results: &[(String, Outcome)]) -> String {
    let mut text = String::from(
        "| architecture | models | result | memory | cuts | a row | token ids | taken back |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    let mut results: Vec<_> = results.iter().collect();
    results.sort_by_key(|(arch, _)| arch);
    for (arch, outcome) in results {
        let models = SUPPORTED.iter().find(|known| known.name == arch).map(|known| known.models);
        let models = models.or_else(|| reason(MODELS, arch)).unwrap_or_default();
        let line = match outcome {
            Outcome::Exact(f) => {
                let ids = if f.reads_tokens { "read" } else { "" };
                let row = if f.crossing[0] == f.crossing[1] {
                    f.crossing[0].clone()
                } else {
                    f.crossing.join(" / ")
                };
                format!("exact | {} | {} | {row} | {ids} | {}", f.memory, f.cuts, f.take_back)
            }
            Outcome::NotExact(why) => format!("NOT EXACT: {why} | | | | |"),
            Outcome::HoldsOthers(why) => format!("TOO MUCH MEMORY: {why} | | | | |"),
            Outcome::Refused(why) => format!("refused: {why} | | | | |"),
            Outcome::NotADecoder(why) => format!("not a text decoder: {why} | | | | |"),
            Outcome::NotTried(why) => format!("not tried: {why} | | | | |"),
            Outcome::Failed(why) => format!("FAILED: {why} | | | | |"),
        };
        writeln!(text, "| {arch} | {models} | {line} |").expect("a String takes it");
    }
    text
}

/// Who uses an architecture, for people who look for theirs.
const MODELS: &[(&str, &str)] = &[
    ("afmoe", "Trinity"),
    ("apertus", "Apertus"),
    ("baichuan", "Baichuan"),
    ("bailingmoe2", "Ling 2"),
    ("bloom", "BLOOM"),
    ("cohere2", "Command R7B, Command A"),
    ("dbrx", "DBRX"),
    ("deci", "Nemotron Ultra and Super"),
    ("deepseek", "DeepSeek MoE"),
    ("deepseek2", "DeepSeek V2, V3 and R1, Kimi K2"),
    ("deepseek32", "DeepSeek V3.2"),
    ("dots1", "dots.llm1"),
    ("ernie4_5", "ERNIE 4.5"),
    ("ernie4_5-moe", "ERNIE 4.5 MoE"),
    ("exaone4", "EXAONE 4"),
    ("falcon-h1", "Falcon H1"),
    ("gemma", "Gemma 1"),
    ("gemma2", "Gemma 2"),
    ("gemma3", "Gemma 3"),
    ("gemma3n", "Gemma 3n"),
    ("gemma4", "Gemma 4"),
    ("glm4", "GLM 4 (0414)"),
    ("glm4moe", "GLM 4.5 and 4.6"),
    ("gpt-oss", "gpt-oss"),
    ("gpt2", "GPT-2"),
    ("granitehybrid", "Granite 4"),
    ("grok", "Grok 1 and 2"),
    ("hunyuan-dense", "Hunyuan"),
    ("hunyuan-moe", "Hunyuan A13B"),
    ("jamba", "Jamba"),
    ("kimi-linear", "Kimi Linear"),
    ("lfm2", "LFM2"),
    ("lfm2moe", "LFM2 MoE"),
    ("llama4", "Llama 4"),
    ("mamba", "Mamba"),
    ("mamba2", "Mamba 2"),
    ("minicpm3", "MiniCPM 3"),
    ("minimax-m2", "MiniMax M2"),
    ("mpt", "MPT"),
    ("nemotron", "Nemotron 4"),
    ("nemotron_h", "Nemotron H, Nemotron Nano 2"),
    ("nemotron_h_moe", "Nemotron 3 Nano"),
    ("openelm", "OpenELM"),
    ("phimoe", "Phi 3.5 MoE"),
    ("qwen", "Qwen 1"),
    ("qwen2vl", "Qwen 2 and 2.5 VL"),
    ("qwen35", "Qwen 3.5"),
    ("qwen35moe", "Qwen 3.5 MoE"),
    ("qwen3next", "Qwen 3 Next"),
    ("qwen3vl", "Qwen 3 VL"),
    ("qwen3vlmoe", "Qwen 3 VL MoE"),
    ("rwkv6", "RWKV 6"),
    ("rwkv7", "RWKV 7"),
    ("smallthinker", "SmallThinker"),
    ("smollm3", "SmolLM 3"),
    ("starcoder", "StarCoder"),
];

/// The page, and where it stands.
fn page(results: &[(String, Outcome)]) -> (PathBuf, String) {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/MODELS.md"));
    // which families run over processes is known where that is tested
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let families = committed.lines().find_map(|line| line.split_once("(`tests/families.rs`): "));
    let families = families.map_or("none.", |(_, families)| families);
    let n_exact = results.iter().filter(|(_, o)| matches!(o, Outcome::Exact(_))).count();
    let mut text = HEAD.replace("FAMILIES.", families);
    writeln!(text, "{n_exact} of {} names are exact.\n", results.len()).expect("a String takes it");
    text.push_str(&table(results));
    text.push_str("\nWhere late blocks read the keys of earlier ones, the cut cannot lie between them:\n\n");
    text.push_str(&shared_caches());
    text.push_str(
        "\nSome models make an input for each block at the start. Those of the blocks behind a cut cross it, and no others:\n\n",
    );
    text.push_str(&per_block_inputs());
    (path, text)
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

    let (path, page) = page(&results);
    let n_exact = results.iter().filter(|(_, o)| matches!(o, Outcome::Exact(_))).count();
    println!("{n_exact} of {} names exact", results.len());
    let wrong: Vec<_> = results
        .iter()
        .filter(|(arch, outcome)| match outcome {
            Outcome::NotExact(_) | Outcome::HoldsOthers(_) | Outcome::Failed(_) => true,
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
    if std::fs::read_to_string(&path).ok().as_deref() != Some(&page) {
        let fresh = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("MODELS.md");
        std::fs::write(&fresh, page).expect("the page is written");
        panic!("docs/MODELS.md is not what came out: look at {}, and copy it there", fresh.display());
    }
}
