//! What the split costs: one model over two processes against stock llama.cpp in one, each process on a core of its
//! own with one compute thread, over loopback with encryption on.
//!
//! The runs are interleaved (stock, split, stock, split, ...), so that a machine whose speed drifts drifts for both,
//! and what is compared is the ratio within each pair. The answer is asserted before anything is said about speed: with
//! F32 rows both arms give the same tokens.
//!
//!     cargo bench --bench split                         24 blocks of the qwen2.5-0.5b shape, 8..15 on the worker
//!     SHAPE=small MIDDLE=4..7 ROUNDS=3 cargo bench --bench split

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "machine/mod.rs"]
mod machine;

use std::process::Command;

use common::{Cut, PROMPT, Worker, report, worker_program};
use dim::host::report::Report;
use gguf_tools::synth::Spec;
use machine::{env, median, pinned};

fn main() {
    let shape = env("SHAPE", "qwen2.5-0.5b");
    let middle = env("MIDDLE", "8..15");
    let rounds: usize = env("ROUNDS", "5").parse().expect("ROUNDS is a number");
    let n_predict = env("TOKENS", "64");
    machine::describe("split");

    let cut = Cut::new(&Spec::new(&shape, None).expect("a shape of dim-synth --list"), &[&middle]);
    let mut worker = pinned(1, worker_program());
    worker.arg(cut.slice(1)).arg("--key-file").arg(&cut.key);
    worker.args(["--listen", "127.0.0.1:0", "--threads", "1", "--ctx", "512"]);
    let worker = Worker::spawn(&mut worker);

    // exactly 128 tokens, whatever the tokenizer makes of a text
    let prompt = prompt_of(&cut, 128);
    let on_core_0 = |command: Command| {
        let mut pinned = pinned(0, command.get_program());
        pinned.args(command.get_args());
        pinned
    };
    // both arms evaluate the prompt once before they are timed, as llama-bench does: a fresh process spends the first
    // pass on touching memory, and a split has two fresh contexts where stock has one
    let more = ["-n", &n_predict, "--temp", "0", "-p", &prompt, "--warm-up"];
    let stock = || report(&mut on_core_0(cut.stock(&more)));
    let split =
        |wire: &str| report(on_core_0(cut.generate(&[&worker.address], &more)).args(["--wire", wire]));

    // the answer first; these runs also warm the files
    let expected = stock();
    assert_eq!(expected.prompt_tokens, 128);
    assert_eq!(split("f32").tokens, expected.tokens, "the split model does not say what the model says");

    let mut pairs: Vec<(Report, Report)> = Vec::new();
    for round in 0..rounds {
        let pair = (stock(), split("f16"));
        println!(
            "round {}: generation {:.2} / {:.2} tok/s, prompt {:.1} / {:.1} tok/s (split / stock)",
            round + 1,
            pair.1.gen_tok_s,
            pair.0.gen_tok_s,
            pair.1.prompt_tok_s,
            pair.0.prompt_tok_s
        );
        pairs.push(pair);
    }
    println!("\n{shape} F16, blocks {middle} on the worker, {rounds} rounds, medians");
    print_speeds(&pairs);
    print_wire(&pairs[0].1, cut.manifest.model.n_embd);
}

/// Of pairs of stock and split: the medians, and the median of the ratios within each pair.
fn print_speeds(pairs: &[(Report, Report)]) {
    let ratio =
        |of: fn(&Report) -> f64| median(pairs.iter().map(|(stock, split)| of(split) / of(stock)).collect());
    let speed = |of: fn(&Report) -> f64| {
        (median(pairs.iter().map(|p| of(&p.0)).collect()), median(pairs.iter().map(|p| of(&p.1)).collect()))
    };
    let (stock_gen, split_gen) = speed(|r| r.gen_tok_s);
    let (stock_pp, split_pp) = speed(|r| r.prompt_tok_s);
    println!(
        "generation  split {split_gen:8.2} tok/s   stock {stock_gen:8.2} tok/s   ratio {:.3}",
        ratio(|r| r.gen_tok_s)
    );
    println!(
        "prompt 128  split {split_pp:8.2} tok/s   stock {stock_pp:8.2} tok/s   ratio {:.3}",
        ratio(|r| r.prompt_tok_s)
    );
}

/// What crossed for each token, held against what the protocol promises, and where the time went.
fn print_wire(split: &Report, n_embd: u32) {
    let steps = split.tokens.len().saturating_sub(1).max(1) as f64;
    let per_token = (split.wire.gen_bytes_sent + split.wire.gen_bytes_received) as f64 / steps;
    let bound = 2.0 * (2.0 * f64::from(n_embd) + 64.0);
    println!("wire        {per_token:.0} bytes per generated token, both ways (bound {bound:.0})");
    assert!(per_token <= bound, "more bytes per token than the protocol promises");
    for stage in &split.stages {
        println!(
            "  {:<28} blocks {:<7} compute {:8.3} ms   wait {:7.3} ms   per token",
            stage.name,
            stage.blocks,
            stage.gen_compute_ms / steps,
            stage.gen_wait_ms / steps
        );
    }
}

/// A text of `n` tokens: the common prompt, repeated and cut until the host counts that many.
fn prompt_of(cut: &Cut, n: usize) -> String {
    let count = |text: &str| report(&mut cut.stock(&["-n", "0", "-p", text])).prompt_tokens;
    let text = PROMPT.repeat(2);
    let (mut low, mut high) = (1, text.len());
    while low < high {
        let middle = (low + high) / 2;
        if count(&text[..middle]) < n { low = middle + 1 } else { high = middle }
    }
    assert_eq!(count(&text[..low]), n, "no beginning of the text has {n} tokens");
    text[..low].to_owned()
}
