//! What it costs to build a stage's graph, and how often one is built, for models of many blocks: llama.cpp builds the graph
//! of all of them, whichever a stage keeps.
//!
//! usage: cargo bench -p llama-sys-patch --bench graphs -- [ARCH ...] [--blocks N] [--rounds N]
//!
//! A tiny random model of each architecture (94 blocks if nobody says: the largest that people run has as many), cut in three
//! slices and run beside llama_decode() of the whole. The logits of both are compared bit for bit before anything is timed.
//! A step of as many rows as the one before uses its graph again, another number of rows has one built: the difference of the
//! two, per stage, is the build, with what ggml's scheduler does to place it. The same is taken of stock, in turns.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use common::pipeline::{self, Pipeline, Rows};
use llama_sys_patch::{ContextParams, Row, Stock, test_support};

struct Options {
    archs: Vec<String>,
    n_blocks: u32,
    rounds: usize,
}

fn options() -> Options {
    let mut options = Options { archs: Vec::new(), n_blocks: 94, rounds: 40 };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{arg} N"));
        match arg.as_str() {
            "--bench" => {} // from cargo
            "--blocks" => options.n_blocks = number(),
            "--rounds" => options.rounds = number() as usize,
            _ if arg.starts_with("--") => panic!("unknown option {arg}"),
            _ => options.archs.push(arg),
        }
    }
    if options.archs.is_empty() {
        options.archs = ["qwen3", "qwen3moe", "gemma3", "qwen35moe"].map(str::to_owned).to_vec();
    }
    options
}

/// Three stages, or stock as the only one.
enum Arm {
    Ours(Box<Pipeline>),
    Stock(Stock),
}

impl Arm {
    /// The logits, and how long each stage took.
    fn step(&mut self, position: usize, tokens: &[i32]) -> (Vec<f32>, Vec<Duration>) {
        let row = |i| Row { session: 0, position: (position + i) as u32, want_output: true };
        let rows: Vec<Row> = (0..tokens.len()).map(row).collect();
        match self {
            Arm::Stock(stock) => {
                let mut logits = vec![0f32; rows.len() * stock.model().n_vocab()];
                let start = Instant::now();
                stock.decode(&rows, tokens, &mut logits).expect("rows");
                (logits, vec![start.elapsed()])
            }
            Arm::Ours(ours) => {
                let (mut between, mut times) = (Rows::F32(Vec::new()), Vec::new());
                for i in 0..ours.stages.len() {
                    let start = Instant::now();
                    between = ours.step(i, &rows, tokens, &between).expect("rows");
                    times.push(start.elapsed());
                }
                let Rows::F32(logits) = between else { unreachable!("logits are F32") };
                (logits, times)
            }
        }
    }

    /// Forgets everything.
    fn clear(&mut self) {
        match self {
            Arm::Stock(stock) => stock.clear(0).expect("session 0"),
            Arm::Ours(ours) => ours.stages.iter_mut().for_each(|stage| stage.clear(0).expect("session 0")),
        }
    }

    /// (steps, stages): the times of steps of so many rows each, from the start of a session.
    fn times(&mut self, counts: &[usize], tokens: &[i32]) -> Vec<Vec<Duration>> {
        self.clear();
        let mut position = 0;
        // the first one builds in any case
        self.step(0, &tokens[..counts[counts.len() - 1]]);
        position += counts[counts.len() - 1];
        counts
            .iter()
            .map(|&n| {
                let times = self.step(position, &tokens[position..position + n]).1;
                position += n;
                times
            })
            .collect()
    }
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}

/// Milliseconds a graph takes to build, of each stage.
fn build_ms(arm: &mut Arm, rounds: usize, tokens: &[i32]) -> Vec<f64> {
    let turns: Vec<usize> = (0..2 * rounds).map(|i| 1 + i % 2).collect();
    let (ones, twos) = (vec![1; rounds], vec![2; rounds]);
    let [turns, ones, twos] = [turns, ones, twos].map(|counts| arm.times(&counts, tokens));
    let of = |steps: &[Vec<Duration>], stage: usize| median(steps.iter().map(|s| s[stage]).collect());
    let (odd, even): (Vec<_>, Vec<_>) = turns.chunks_exact(2).map(|p| (p[0].clone(), p[1].clone())).unzip();
    (0..ones[0].len())
        .map(|stage| (of(&odd, stage) - of(&ones, stage) + of(&even, stage) - of(&twos, stage)) / 2.0)
        .collect()
}

fn main() {
    let options = options();
    println!("{} blocks, three slices; ms a graph, medians of {} each", options.n_blocks, 2 * options.rounds);
    println!(
        "| architecture | head | middle | tail | stock, whole | a step of the three | built in 200 steps |"
    );
    println!("|---|---|---|---|---|---|---|");
    for arch in &options.archs {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("model.gguf");
        test_support::write_model(arch, options.n_blocks, &test_support::options(arch), &path)
            .expect("a model");
        let cuts = [options.n_blocks / 3, 2 * options.n_blocks / 3];
        let ranges = pipeline::plan(&path, &cuts).expect("it can be cut there");
        let files = pipeline::cut(&path, &ranges);
        let context =
            ContextParams { n_ctx: 512, n_batch: 64, n_ubatch: 64, n_threads: 1, ..ContextParams::default() };
        let whole = pipeline::load(&path).expect("the model loads");
        let mut ours = Arm::Ours(Box::new(Pipeline::new(&files, &context).expect("the slices load")));
        let mut stock = Arm::Stock(Stock::new(&whole, &context, None).expect("a context"));
        let tokens = common::tokens(&whole, 11, 512);

        // the answer first: a fast wrong answer is no figure
        let mut position = 0;
        for n in [64, 40, 1, 1, 2, 1] {
            let tokens = &tokens[position..position + n];
            let (a, b) = (stock.step(position, tokens).0, ours.step(position, tokens).0);
            assert!(a.iter().any(|&x| x != 0.0) && a == b, "{arch}: the logits differ");
            position += n;
        }

        let built = |arm: &Arm| match arm {
            Arm::Ours(ours) => ours.stages.iter().map(|stage| stage.graphs().1).max().unwrap_or(0),
            Arm::Stock(_) => 0,
        };
        ours.clear();
        ours.step(0, &tokens[..1]);
        let before = built(&ours);
        let mut times = Vec::new();
        for position in 1..=200 {
            times.push(ours.step(position, &tokens[position..=position]).1.iter().sum());
        }
        let n_built = built(&ours) - before;
        let (a, b) =
            (build_ms(&mut ours, options.rounds, &tokens), build_ms(&mut stock, options.rounds, &tokens));
        println!(
            "| {arch} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {n_built} |",
            a[0],
            a[1],
            a[2],
            b[0],
            median(times)
        );
    }
}
