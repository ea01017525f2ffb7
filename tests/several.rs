//! `dim-host generate --parallel`: a prompt a line, several at once, a line of JSON for each.

mod common;

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use common::{Cut, Relay, Worker, failure, report, text};
use serde_json::Value;

const LINES: [&str; 6] =
    ["Once upon a time", "The capital of France", "A list of fruits:", "Dear Ada,", "In 1815", "def main():"];
const N: &str = "24";

fn worker(cut: &Cut, sessions: &str) -> Worker {
    Worker::start_at("127.0.0.1:0", &cut.slice(1), &cut.key, &["--parallel", sessions])
}

/// Greedy, over f32 rows.
fn generate(cut: &Cut, worker: &str) -> Command {
    let mut command = cut.host("generate", &[worker]);
    command.args(["--ctx", "512", "--threads", "1", "-n", N, "--temp", "0", "--wire", "f32"]);
    command
}

fn tokens_alone(cut: &Cut, worker: &str, prompt: &str) -> Value {
    let report = report(generate(cut, worker).args(["-p", prompt, "--json"]));
    serde_json::to_value(report.tokens).unwrap()
}

/// `generate` of what stands in a file.
fn command(cut: &Cut, worker: &str, prompts: &str, more: &[&str]) -> Command {
    let file = cut.folder.path().join("prompts.txt");
    std::fs::write(&file, prompts).unwrap();
    let mut command = generate(cut, worker);
    command.arg("-f").arg(file).args(more);
    command
}

/// The lines of what was printed, in order of the prompts.
fn results(output: &Output) -> Vec<Value> {
    let mut lines: Vec<Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    lines.sort_by_key(|line| line["index"].as_u64());
    lines
}

fn alone(cut: &Cut, worker: &str) -> Vec<Value> {
    LINES.iter().map(|line| tokens_alone(cut, worker, line)).collect()
}

#[test]
fn each_line_is_continued_as_it_is_alone_also_when_the_worker_is_lost() {
    let cut = Cut::tiny("qwen2");
    let worker = worker(&cut, "3");
    let expected = alone(&cut, &worker.address);
    let prompts = LINES.join("\n\n");
    let exact = ["--parallel", "3", "--exact"];
    let told = command(&cut, &worker.address, &prompts, &exact).output().unwrap();
    assert!(told.status.success(), "{}", text(&told.stderr));
    let lines = results(&told);
    let places: Vec<u64> = lines.iter().map(|line| line["index"].as_u64().unwrap()).collect();
    assert_eq!(places, [0, 2, 4, 6, 8, 10], "blank lines count and are none");
    for ((line, prompt), tokens) in lines.iter().zip(LINES).zip(&expected) {
        assert_eq!((&line["prompt"], &line["tokens"]), (&prompt.into(), tokens));
        assert_eq!((&line["stop"], line["text"].is_string()), (&"length".into(), true), "{line}");
    }
    assert!(text(&told.stderr).contains("6 prompts, 144 tokens in "), "{}", text(&told.stderr));

    let relay = Relay::to(&worker.address);
    relay.break_after(40_000);
    let mut lossy = command(&cut, &relay.address(), &prompts, &exact);
    let child = lossy.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    assert!(relay.wait_until_broken(), "it ended before");
    relay.mend();
    let told = child.wait_with_output().unwrap();
    let tokens: Vec<Value> = results(&told).iter().map(|line| line["tokens"].clone()).collect();
    assert_eq!(tokens, expected, "{}", text(&told.stderr));

    // batches: as many tokens, of each
    let told = command(&cut, &worker.address, &prompts, &["--parallel", "3"]).output().unwrap();
    assert!(results(&told).iter().all(|line| line["tokens"].as_array().unwrap().len() == 24));
}

#[test]
fn a_prompt_that_fails_is_a_line_and_the_others_are_answered() {
    let cut = Cut::tiny("qwen2");
    let worker = worker(&cut, "2");
    let long = "long ".repeat(2000);
    let prompts = format!("{}\n{long}\n{}\n", LINES[0], LINES[1]);
    let told = command(&cut, &worker.address, &prompts, &["--parallel", "2", "--exact"]).output().unwrap();
    assert_eq!(told.status.code(), Some(1));
    assert!(
        text(&told.stderr).contains("1 of 3 prompts failed: \"error\" says why"),
        "{}",
        text(&told.stderr)
    );
    let lines = results(&told);
    assert!(lines[1]["error"].as_str().unwrap().contains("tokens"), "{}", lines[1]);
    let expected = alone(&cut, &worker.address);
    assert_eq!((&lines[0]["tokens"], &lines[2]["tokens"]), (&expected[0], &expected[1]));

    let said = failure(&mut command(&cut, &worker.address, "\n \n", &["--parallel", "2"]), 2);
    assert!(said.contains("empty"), "{said}");
    let said = failure(&mut command(&cut, &worker.address, "x", &["--parallel", "5"]), 2);
    assert!(said.contains("--parallel"), "{said}");
    failure(&mut command(&cut, &worker.address, "x", &["--parallel", "0"]), 2);
    failure(&mut command(&cut, &worker.address, "x", &["--exact"]), 2);
}

#[test]
fn lines_come_from_standard_input_with_what_stands_for_other_characters() {
    let cut = Cut::tiny("qwen2");
    let worker = worker(&cut, "2");
    let mut command = generate(&cut, &worker.address);
    command.args(["-f", "-", "-e", "--parallel", "2", "--exact"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"a\\nb\nc\\td").unwrap();
    let lines = results(&child.wait_with_output().unwrap());
    assert_eq!(lines[0]["tokens"], tokens_alone(&cut, &worker.address, "a\nb"));
    assert_eq!((&lines[1]["prompt"], lines.len()), (&"c\\td".into(), 2));
}
