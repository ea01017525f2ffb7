//! A trained model, where `.ci/model` has fetched it: SmolLM2-135M-Instruct, in F16.
//!
//! Random weights have no massive activations, no attention sinks and no text worth guessing; this has all three. The
//! figures that these tests print stand in docs/REAL.md, and the table there is held against what is measured here.
//! Where the model is not, the tests pass at once and say so; `make test` names it at its end.

mod common;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use common::{Worker, host_program, key_file, real_model, report, run, text, top, worker_program};
use dim::host::template::{ChatTemplate, Role, Turn};
use dim::host::text::TextStream;
use dim_ab::quality::Evaluation;
use dim_ab::record::{Arm, read};
use dim_ab::summary::{Same, summarise};
use gguf_tools::dequantise::Dequantised;
use gguf_tools::gguf::{Gguf, TensorType};
use gguf_tools::manifest::Manifest;
use gguf_tools::plan::{Plan, Request};
use gguf_tools::split::split;
use half::f16;
use llama_sys_patch::{ContextParams, Input, Model, ModelParams, Output, Row, Stage, StageParams};
use serde::Deserialize;

/// The model in F16, cut in three, and a key.
struct Real {
    model: PathBuf,
    split: PathBuf,
    middle: PathBuf,
    key: PathBuf,
    folder: PathBuf,
}

const MIDDLE: &str = "10..19";

/// The model, made once for all tests; `None` where it was not fetched.
fn real() -> Option<&'static Real> {
    static REAL: LazyLock<Option<Real>> = LazyLock::new(|| real_model().map(|file| Real::of(&file)));
    REAL.as_ref()
}

impl Real {
    /// In a folder that every run takes again, below target: half a gigabyte, which `make clean` removes.
    fn of(quantised: &Path) -> Real {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("real");
        std::fs::create_dir_all(&folder).unwrap();
        let model = folder.join("smollm2.gguf");
        let gguf = Gguf::open(quantised).unwrap();
        Dequantised::new(&gguf, TensorType::F16).unwrap().write(&model, |_, _| {}).unwrap();
        let gguf = Gguf::open(&model).unwrap();
        let middles = vec![MIDDLE.parse().unwrap()];
        let request = Request { middles, stem: "smollm2".into(), ..Request::default() };
        let manifest = split(&Plan::new(&gguf, &request).unwrap(), &folder, "smollm2", |_| {}).unwrap();
        let split = folder.join("smollm2.split.json");
        let key = key_file(&folder);
        let middle = Manifest::slice_path(&split, &manifest.slices[1]);
        Real { model, split, middle, key, folder }
    }

    fn worker(&self, n_ctx: &str) -> Worker {
        Worker::start(&self.middle, &self.key, &["--ctx", n_ctx])
    }

    fn whole(&self) -> Model {
        let params = ModelParams { gpu_layers: Some(0), use_mmap: true, ..ModelParams::default() };
        Model::load(&[&self.model], params).unwrap()
    }

    /// A command of `dim-host` with the split and the worker.
    fn host(&self, command: &str, worker: &Worker) -> Command {
        let mut host = Command::new(host_program());
        host.arg(command).arg("--split").arg(&self.split).arg("--key-file").arg(&self.key);
        host.args(["--worker", &worker.address, "--threads", "1"]);
        host
    }
}

/// A text of tests/texts.
fn book(name: &str) -> String {
    std::fs::read_to_string(top().join("tests/texts").join(name)).unwrap()
}

/// The bounds of F16 rows are a few times what was seen (docs/REAL.md), for CPUs that sum in another order.
#[test]
fn a_book_is_guessed_as_stock_guesses_it() {
    let Some(real) = real() else { return };
    let file = real.folder.join("book.txt");
    std::fs::write(&file, book("alice.txt") + &book("tongues.txt")).unwrap();
    let worker = real.worker("4096");
    let mut command = real.host("eval", &worker);
    command.arg("--text").arg(&file).arg("--against").arg(&real.model);
    let output = run(command.args(["--window", "4000", "--json"]));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let evaluation: Evaluation = serde_json::from_slice(&output.stdout).unwrap();
    print!("{}", evaluation.table());

    assert!(evaluation.tokens > 2_500, "{} tokens", evaluation.tokens);
    let [stock, rounded, exact] = evaluation.engines.as_slice() else { panic!("{evaluation:?}") };
    assert_eq!([&*stock.name, &rounded.name, &exact.name], ["stock", "split f16", "split f32"]);
    // whoever has learnt nothing guesses one of 49,152
    assert!((5.0..40.0).contains(&stock.perplexity), "perplexity {}", stock.perplexity);

    let difference = exact.difference.unwrap();
    assert_eq!(exact.perplexity.to_bits(), stock.perplexity.to_bits());
    assert_eq!((difference.equal_rows, difference.max_abs), (evaluation.tokens as u64 - 1, 0.0));
    let difference = rounded.difference.unwrap();
    assert!(difference.kl_mean > 0.0, "F16 rows that differ in nothing were not F16");
    assert!(difference.kl_mean < MOST_KL_MEAN && difference.top1 >= LEAST_TOP1, "{difference:?}");
}

const MOST_KL_MEAN: f64 = 1e-5;
const LEAST_TOP1: f64 = 0.99;

/// Rows as they cross behind each block, on real text: how large they get, and what F16 makes of them.
#[test]
fn what_crosses_behind_each_block_is_what_the_table_says() {
    let Some(real) = real() else { return };
    let model = real.whole();
    let tokens = model.tokenize(&book("alice.txt"), true, false).unwrap();
    let tokens = &tokens[..N_HIDDEN];
    let measured: Vec<Crossing> = crossings(&model, tokens);
    let table: String = measured.iter().map(Crossing::line).collect();
    println!("{}{table}", Crossing::HEAD);

    for crossing in &measured {
        assert!(crossing.largest < 65_504.0, "block {}: {}", crossing.block, crossing.largest);
        // half a unit in the last of 11 bits
        assert!(crossing.f16_error < 4.9e-4, "block {}: {}", crossing.block, crossing.f16_error);
    }
    // what random weights do not have: values far from all others, in few channels, where the text begins
    let massive = measured.iter().filter(|c| c.largest > 100.0 * c.rms && c.token == 0).count();
    assert!(massive > measured.len() / 2, "{massive} of {} boundaries have massive values", measured.len());

    let page = std::fs::read_to_string(top().join("docs/REAL.md")).unwrap();
    let written: Vec<Vec<f32>> = page.lines().filter_map(Crossing::numbers_of).collect();
    let now: Vec<Vec<f32>> =
        measured.iter().filter_map(|c| Crossing::numbers_of(c.line().trim_end())).collect();
    assert_eq!(written.len(), now.len(), "docs/REAL.md has not as many rows");
    for (written, now) in written.iter().zip(&now) {
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 0.05 * a.abs().max(b.abs());
        assert!(written.iter().zip(now).all(near), "docs/REAL.md: {written:?}, measured {now:?}");
    }
}

/// Tokens of the text that are looked at.
const N_HIDDEN: usize = 1024;

/// What was seen behind one block.
struct Crossing {
    block: usize,
    /// |value|, and where it stands
    largest: f32,
    token: usize,
    channel: usize,
    /// the largest of all tokens but the first
    largest_later: f32,
    /// root of the mean square of a row, the median over rows
    rms: f32,
    /// the worst row's difference from itself in F16, relative, in L2
    f16_error: f64,
}

impl Crossing {
    const HEAD: &str = "| behind block | largest | token, channel | largest but for token 0 | rms of a row, median | F16's error, worst row |\n|---|---|---|---|---|---|\n";

    /// `rows`: (n_tokens, n_embd)
    fn of(block: usize, rows: &[f32], n_embd: usize) -> Crossing {
        let greatest = |rows: &[f32]| {
            let place = (0..rows.len()).max_by(|&a, &b| rows[a].abs().total_cmp(&rows[b].abs())).unwrap();
            (rows[place].abs(), place)
        };
        let (largest, place) = greatest(rows);
        let norm = |row: &mut dyn Iterator<Item = f64>| row.map(|x| x * x).sum::<f64>().sqrt();
        let mut rms: Vec<f32> = Vec::new();
        let mut f16_error = 0.0f64;
        for row in rows.chunks_exact(n_embd) {
            let size = norm(&mut row.iter().map(|&x| f64::from(x)));
            let error = norm(&mut row.iter().map(|&x| f64::from(f16::from_f32(x).to_f32() - x)));
            rms.push((size / (n_embd as f64).sqrt()) as f32);
            f16_error = f16_error.max(error / size);
        }
        rms.sort_by(f32::total_cmp);
        Crossing {
            block,
            largest,
            token: place / n_embd,
            channel: place % n_embd,
            largest_later: greatest(&rows[n_embd..]).0,
            rms: rms[rms.len() / 2],
            f16_error,
        }
    }

    /// A line of the table in docs/REAL.md.
    fn line(&self) -> String {
        let Crossing { block, largest, token, channel, largest_later, rms, f16_error } = self;
        format!(
            "| {block} | {largest:.1} | {token}, {channel} | {largest_later:.1} | {rms:.2} | {f16_error:.1e} |\n"
        )
    }

    /// The numbers of such a line, but for the last: how F16 rounds a single row depends on its last bits.
    fn numbers_of(line: &str) -> Option<Vec<f32>> {
        let cells: Vec<&str> = line.strip_prefix("| ")?.split('|').collect();
        let numbers: Option<Vec<f32>> = cells[..cells.len().min(5)]
            .iter()
            .flat_map(|c| c.split(','))
            .map(|n| n.trim().parse().ok())
            .collect();
        numbers.filter(|n| n.len() == 6)
    }
}

/// Evaluates the text block by block, each a stage of its own.
fn crossings(model: &Model, tokens: &[i32]) -> Vec<Crossing> {
    let n_embd = model.n_embd();
    let context = ContextParams {
        n_ctx: tokens.len() as u32,
        n_batch: tokens.len() as u32,
        n_threads: 1,
        max_sessions: 1,
        ..ContextParams::default()
    };
    let rows = Row::chunk(0, 0, tokens.len());
    let mut hidden: Vec<f32> = Vec::new(); // (n_tokens, n_embd)
    let mut found = Vec::new();
    for block in 0..model.n_blocks() - 1 {
        let blocks: Range<u32> = block..block + 1;
        let mut stage =
            Stage::new(model, StageParams::of_whole_model(model, blocks, context.clone())).unwrap();
        let input = if block == 0 { Input::Tokens(tokens) } else { Input::F32(&hidden) };
        let mut out = vec![0f32; tokens.len() * n_embd];
        stage.evaluate(&rows, input, Output::F32(&mut out)).unwrap();
        found.push(Crossing::of(block as usize, &out, n_embd));
        hidden = out;
    }
    found
}

/// A conversation and what it has to be rendered as, which tests/oracle/chat_templates.py holds against jinja2.
#[derive(Deserialize)]
struct Conversation {
    template: String,
    bos: String,
    eos: String,
    messages: Vec<Message>,
    rendered: String,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: String,
}

#[test]
fn conversations_are_rendered_as_jinja_renders_them() {
    let all: Vec<Conversation> = serde_json::from_str(&book("chat.json")).unwrap();
    assert!(all.len() >= 6);
    for Conversation { template, bos, eos, messages, rendered } in &all {
        let turn = |m: &Message| Turn {
            role: match m.role.as_str() {
                "system" => Role::System,
                "user" => Role::User,
                _ => Role::Assistant,
            },
            content: m.content.clone(),
        };
        let turns: Vec<Turn> = messages.iter().map(turn).collect();
        let ours = ChatTemplate::new(template, bos, eos).unwrap().render(&turns).unwrap();
        assert_eq!(&ours, rendered);
    }
    // and the first template is the model's own
    let Some(real) = real() else { return };
    assert_eq!(real.whole().chat_template().as_deref(), Some(all[0].template.as_str()));
    // its marks are tokens, not text
    let tokens = real.whole().tokenize(&all[0].rendered, true, true).unwrap();
    assert_eq!(tokens.iter().filter(|&&t| t == 1).count(), all[0].rendered.matches("<|im_start|>").count());
}

#[test]
fn no_character_breaks_on_its_way_through_tokens() {
    let Some(real) = real() else { return };
    let model = real.whole();
    let (mut n_tokens, mut n_incomplete) = (0, 0);
    for line in book("tongues.txt").lines().filter(|line| !line.is_empty()) {
        let tokens = model.tokenize(line, false, false).unwrap();
        let mut stream = TextStream::default();
        let mut shown = String::new();
        for &token in &tokens {
            let bytes = model.token_bytes(token).unwrap();
            n_incomplete += usize::from(std::str::from_utf8(&bytes).is_err());
            shown += &stream.push(&bytes);
        }
        shown += &stream.finish();
        assert_eq!(shown, line);
        n_tokens += tokens.len();
    }
    println!("{n_tokens} tokens, {n_incomplete} of them no characters by themselves");
    assert!(n_incomplete > 100, "only {n_incomplete} tokens end or begin within a character");
}

/// The same over processes: what is shown as it comes is what is reported at the end, and what stock says.
#[test]
fn text_of_many_bytes_comes_out_as_it_would_of_stock() {
    let Some(real) = real() else { return };
    let worker = real.worker("512");
    for prompt in [
        "吾輩は猫である。名前はまだ無い。",
        "Я помню чудное мгновенье:",
        "Les mots « été », « garçon » et « naïf »",
    ] {
        let options = ["-p", prompt, "-n", "24", "--temp", "0", "--ctx", "512"];
        let json = report(real.host("generate", &worker).args(options).args(["--wire", "f32", "--json"]));
        let shown = run(real.host("generate", &worker).args(options).args(["--wire", "f32"]));
        let shown = String::from_utf8(shown.stdout).expect("half a character was shown");
        assert_eq!(shown.trim_end_matches('\n'), json.text.trim_end_matches('\n'));
        let mut stock = Command::new(host_program());
        stock.arg("stock").arg("--model").arg(&real.model).args(options).args(["--threads", "1", "--json"]);
        let stock = report(&mut stock);
        assert_eq!((json.tokens, &json.text), (stock.tokens, &stock.text));
        println!("{prompt} | {}", stock.text);
    }
}

#[test]
fn the_laboratory_records_it() {
    let Some(real) = real() else { return };
    let out = tempfile::tempdir().unwrap();
    let mut command = Command::new(host_program());
    command.arg("ab").arg("--model").arg(&real.model).arg("--split").arg(&real.split);
    command.arg("--key-file").arg(&real.key).arg("--out").arg(out.path());
    command.args(["--threads", "1", "--wire", "f32", "--ctx", "512", "--baseline", "solo", "--rounds", "1"]);
    command.args(["--prompt-tokens", "32", "-n", "16"]);
    assert!(worker_program().is_file());
    let output = run(&mut command);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let records = read(&out.path().join("results.jsonl")).unwrap();
    assert_eq!(records.iter().filter(|r| r.counts()).count(), 4, "two arms, a first and a steady round");
    let rows = &summarise(&records)[0].rows;
    assert_eq!(rows.iter().find(|row| row.arm == Arm::Split).unwrap().same, Same::Yes);
}
