//! What cutting a model costs by itself: three stages in one process against llama_decode, no wire between them.
//!
//! usage: cargo bench -p llama-sys-patch --bench ranges -- [MODEL.gguf] [--threads N] [--rounds N] [--prompt N] [--tokens N]
//!
//! Without a model it synthesises one of the qwen2.5-0.5b shape (1 GB, in the temporary directory). The logits of both are
//! compared bit for bit before anything is timed, and after. Rounds take turns, so that a machine that slows down slows
//! both; figures are medians of rounds.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use gguf_tools::synth::Spec;
use half::f16;
use llama_sys_patch::{ContextParams, Input, Model, ModelParams, Output, Row, Stage, StageParams, Stock};

struct Options {
    model: Option<PathBuf>,
    threads: u32,
    rounds: usize,
    prompt: usize,
    tokens: usize,
}

fn options() -> Options {
    let mut options = Options { model: None, threads: 1, rounds: 9, prompt: 128, tokens: 32 };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{arg} N"));
        match arg.as_str() {
            "--bench" => {} // from cargo
            "--threads" => options.threads = number() as u32,
            "--rounds" => options.rounds = number(),
            "--prompt" => options.prompt = number(),
            "--tokens" => options.tokens = number(),
            _ if arg.starts_with("--") => panic!("unknown option {arg}"),
            _ => options.model = Some(arg.into()),
        }
    }
    options
}

/// Three stages, F16 between them.
struct Ranges {
    stages: Vec<Stage>,
    hidden: Vec<f16>, // (n_rows, n_embd)
    next: Vec<f16>,
}

impl Ranges {
    fn new(model: &Model, context: &ContextParams) -> Ranges {
        let n = model.n_blocks();
        let cuts = [0, n / 3, 2 * n / 3, n];
        let stage = |w: &[u32]| {
            Stage::new(model, StageParams::of_whole_model(model, w[0]..w[1], context.clone()))
                .expect("a stage")
        };
        let room = vec![f16::ZERO; context.n_batch as usize * model.n_embd()];
        Ranges { stages: cuts.windows(2).map(stage).collect(), hidden: room.clone(), next: room }
    }

    fn evaluate(&mut self, rows: &[Row], tokens: &[i32], logits: &mut [f32]) {
        let n = rows.len() * self.stages[0].model().n_embd();
        let last = self.stages.len() - 1;
        for (i, stage) in self.stages.iter_mut().enumerate() {
            let input = if i == 0 { Input::Tokens(tokens) } else { Input::F16(&self.hidden[..n]) };
            let output =
                if i == last { Output::Logits(&mut *logits) } else { Output::F16(&mut self.next[..n]) };
            stage.evaluate(rows, input, output).expect("rows");
            std::mem::swap(&mut self.hidden, &mut self.next);
        }
    }

    /// As `evaluate`, with F32 between the stages: what must be exact.
    fn evaluate_exactly(&mut self, rows: &[Row], tokens: &[i32], logits: &mut [f32]) {
        let n = rows.len() * self.stages[0].model().n_embd();
        let last = self.stages.len() - 1;
        let (mut from, mut to) = (vec![0f32; n], vec![0f32; n]);
        for (i, stage) in self.stages.iter_mut().enumerate() {
            let input = if i == 0 { Input::Tokens(tokens) } else { Input::F32(&from) };
            let output = if i == last { Output::Logits(&mut *logits) } else { Output::F32(&mut to) };
            stage.evaluate(rows, input, output).expect("rows");
            std::mem::swap(&mut from, &mut to);
        }
    }

    fn clear(&mut self) {
        self.stages.iter_mut().for_each(|stage| stage.clear(0).expect("session 0"));
    }
}

fn argmax(logits: &[f32]) -> i32 {
    logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(i, _)| i as i32)
}

/// A prompt and single tokens after it: the times of both, and the last logits.
fn run(
    prompt: &[i32],
    n_tokens: usize,
    n_vocab: usize,
    mut evaluate: impl FnMut(&[Row], &[i32], &mut [f32]),
) -> (Duration, Duration, Vec<f32>) {
    let mut logits = vec![0f32; n_vocab];
    let start = Instant::now();
    evaluate(&Row::chunk(0, 0, prompt.len()), prompt, &mut logits);
    let prompt_time = start.elapsed();
    // the tokens are given, not sampled: both arms compute the same whatever comes out
    let start = Instant::now();
    for i in 0..n_tokens {
        let token = prompt[i % prompt.len()];
        evaluate(&Row::chunk(0, (prompt.len() + i) as u32, 1), &[token], &mut logits);
    }
    (prompt_time, start.elapsed(), logits)
}

fn median(times: &mut [Duration]) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

fn main() {
    let options = options();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = options.model.clone().unwrap_or_else(|| {
        let path = directory.path().join("model.gguf");
        Spec::new("qwen2.5-0.5b", None).and_then(|spec| spec.write(&path)).expect("the model is written");
        path
    });
    let params = ModelParams { gpu_layers: Some(0), ..Default::default() };
    let model = Model::load(&[&path], params).expect("the model loads");
    let n_rows = options.prompt + options.tokens;
    let context = ContextParams {
        n_ctx: n_rows as u32,
        n_batch: options.prompt as u32,
        n_ubatch: options.prompt.min(512) as u32,
        n_threads: options.threads,
        ..Default::default()
    };
    let mut stock = Stock::new(&model, &context, Some(1)).expect("a context");
    let mut ranges = Ranges::new(&model, &context);
    let n_vocab = model.n_vocab();
    let prompt: Vec<i32> =
        (0..options.prompt).map(|i| ((i * 7919 + 13) % n_vocab.min(50_000)) as i32).collect();

    // the answer first: a fast wrong answer is no figure
    let check = |stock: &mut Stock, ranges: &mut Ranges| {
        stock.clear(0).expect("session 0");
        ranges.clear();
        let (_, _, a) = run(&prompt, 8.min(options.tokens), n_vocab, |r, t, l| {
            stock.decode(r, t, l).expect("rows");
        });
        let (_, _, b) =
            run(&prompt, 8.min(options.tokens), n_vocab, |r, t, l| ranges.evaluate_exactly(r, t, l));
        assert!(a.iter().any(|&x| x != 0.0) && a == b, "the logits differ");
        argmax(&a)
    };
    let before = check(&mut stock, &mut ranges);

    let mut times = measure(&options, &prompt, n_vocab, &mut stock, &mut ranges);
    assert_eq!(check(&mut stock, &mut ranges), before);
    println!(
        "{model:?}, {} threads, medians of {} rounds, identical logits",
        options.threads, options.rounds
    );
    print_times(&options, model.weights_bytes(), &mut times);
}

/// Both arms in turn: the times of stock's prompts and tokens, then those of the ranges.
fn measure(
    options: &Options,
    prompt: &[i32],
    n_vocab: usize,
    stock: &mut Stock,
    ranges: &mut Ranges,
) -> [Vec<Duration>; 4] {
    let mut times: [Vec<Duration>; 4] = Default::default();
    for round in 0..options.rounds {
        let mut arms = [true, false];
        if round % 2 == 1 {
            arms.reverse();
        }
        for is_stock in arms {
            let (prompt_time, tokens_time, _) = if is_stock {
                stock.clear(0).expect("session 0");
                run(prompt, options.tokens, n_vocab, |r, t, l| {
                    stock.decode(r, t, l).expect("rows");
                })
            } else {
                ranges.clear();
                run(prompt, options.tokens, n_vocab, |r, t, l| ranges.evaluate(r, t, l))
            };
            times[usize::from(!is_stock) * 2].push(prompt_time);
            times[usize::from(!is_stock) * 2 + 1].push(tokens_time);
        }
    }
    times
}

fn print_times(options: &Options, weights_bytes: u64, times: &mut [Vec<Duration>; 4]) {
    let [stock_prompt, stock_tokens, ranges_prompt, ranges_tokens] = times;
    let rate = |n: usize, seconds: f64| n as f64 / seconds;
    let (a, b) = (rate(options.tokens, median(stock_tokens)), rate(options.tokens, median(ranges_tokens)));
    let (c, d) = (rate(options.prompt, median(stock_prompt)), rate(options.prompt, median(ranges_prompt)));
    let gb_s = weights_bytes as f64 / 1e9;
    println!("                stock          three ranges      ratio");
    println!("prompt    {c:8.1} tok/s     {d:8.1} tok/s      {:.3}", d / c);
    println!(
        "tokens    {a:8.2} tok/s     {b:8.2} tok/s      {:.3}   ({:.1} and {:.1} GB/s of weights)",
        b / a,
        a * gb_s,
        b * gb_s
    );
}
