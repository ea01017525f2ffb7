//! A worker that serves the right slice and computes something else: right shape, right identity, wrong values. Real
//! processes, with slices whose data was exchanged under the keys of the right one.

mod common;

use std::path::{Path, PathBuf};

use common::{Cut, Relay, Worker, failure, report, run, text};
use gguf_tools::gguf::Gguf;
use gguf_tools::manifest::Manifest;
use gguf_tools::synth::Spec;

const OPTIONS: [&str; 4] = ["-n", "24", "--temp", "0"];

/// The middle of `cut` again, with the same keys, and for each tensor the data that stands in `from` under the name
/// that `name` gives.
fn tampered(cut: &Cut, from: &Path, name: impl Fn(&str) -> String) -> PathBuf {
    let path = cut.folder.path().join("tampered.gguf");
    let from = Gguf::open(from).unwrap();
    common::tampered(&cut.slice(1), &path, |tensor| {
        let source = from.tensor(&name(tensor.name())).unwrap();
        assert_eq!(source.dims(), tensor.dims(), "{}", tensor.name());
        (source.tensor_type(), source.data().unwrap().to_vec())
    });
    path
}

/// Blocks 1 and 2 change places.
fn exchanged(name: &str) -> String {
    match name.split_once('.').and_then(|(_, rest)| rest.split_once('.')) {
        Some(("1", rest)) if name.starts_with("blk.") => format!("blk.2.{rest}"),
        Some(("2", rest)) if name.starts_with("blk.") => format!("blk.1.{rest}"),
        _ => name.to_owned(),
    }
}

/// A worker that believes what stands in the file.
fn gullible(cut: &Cut, slice: &Path) -> Worker {
    Worker::start(slice, &cut.key, &["--verify", "never"])
}

#[test]
fn right_workers_pass_for_every_type_and_wire() {
    for arch in ["qwen2", "llama", "qwen3"] {
        for weights in ["f16", "q8_0", "q4_k_m"] {
            let cut = Cut::new(&Spec::tiny(arch).unwrap().with_type(weights).unwrap(), &["1..2"]);
            assert!(cut.manifest.slices[1].canary.is_some());
            let worker = cut.worker(1);
            for wire in ["f16", "f32"] {
                let with = report(cut.generate(&[&worker.address], &OPTIONS).args(["--wire", wire]));
                let mut verbose = cut.generate(&[&worker.address], &["-n", "1", "--verbose", "--wire", wire]);
                let told = text(&run(&mut verbose).stderr);
                assert!(
                    told.contains("answers right: a cosine of 0.999") || told.contains("a cosine of 1.0"),
                    "{told}"
                );
                let mut without = cut.generate(&[&worker.address], &OPTIONS);
                let without = report(without.args(["--wire", wire, "--no-canary"]));
                assert_eq!(
                    with.tokens, without.tokens,
                    "{arch} {weights} {wire}: the canary left something behind"
                );
                // and it is in no figure of the report
                assert_eq!(with.wire.round_trips, without.wire.round_trips);
                assert_eq!(with.wire.gen_bytes_sent / 23, without.wire.gen_bytes_sent / 23);
                let rows = u64::from(cut.manifest.model.n_embd) * 2;
                assert!(
                    with.wire.bytes_sent < without.wire.bytes_sent + rows,
                    "the canary's rows are counted"
                );
            }
        }
    }
}

/// Every wrong worker is refused before a token is out; without the canary each is accepted and answers otherwise.
#[test]
fn wrong_workers_are_caught_and_without_the_canary_they_are_believed() {
    let mut caught = 0;
    for (arch, weights) in [("qwen2", "f16"), ("llama", "q8_0"), ("qwen3", "q4_k_m")] {
        let spec = Spec::tiny(arch).unwrap().with_type(weights).unwrap();
        let cut = Cut::new(&spec, &["1..2"]);
        let right = report(&mut cut.generate(&[], &OPTIONS));
        let other = Cut::new(&spec.clone().seed(2), &["1..2"]);
        let elsewhere = Cut::new(&spec, &["2..3"]);
        let own = cut.slice(1);
        let mut cases: Vec<(String, PathBuf)> = Vec::new();
        let mut case = |what: &str, from: &Path, name: &dyn Fn(&str) -> String| {
            let path = tampered(&cut, from, name);
            let kept = path.with_file_name(format!("wrong-{}.gguf", cases.len()));
            std::fs::rename(path, &kept).unwrap();
            cases.push((what.to_owned(), kept));
        };
        case("blocks exchanged", &own, &exchanged);
        case("the first block twice", &own, &|name| name.replacen("blk.2.", "blk.1.", 1));
        case("weights of another seed", &other.slice(1), &str::to_owned);
        case("the slice of other blocks", &elsewhere.slice(1), &|name| {
            let (block, rest) = name["blk.".len()..].split_once('.').unwrap();
            format!("blk.{}.{rest}", block.parse::<u32>().unwrap() + 1)
        });
        // one projection, from the other block
        for projection in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] {
            let altered = format!("blk.2.{projection}.weight");
            let from = format!("blk.1.{projection}.weight");
            case(projection, &own, &|name| if name == altered { from.clone() } else { name.to_owned() });
        }
        for (what, path) in &cases {
            let worker = gullible(&cut, path);
            for wire in ["f16", "f32"] {
                let mut command = cut.generate(&[&worker.address], &OPTIONS);
                let output = run(command.args(["--wire", wire]));
                let says = text(&output.stderr);
                assert_eq!(output.status.code(), Some(1), "{arch} {weights}: {what}: {says}");
                assert!(output.stdout.is_empty(), "{what}: something was printed: {}", text(&output.stdout));
                let errors: Vec<&str> = says.lines().filter(|l| l.starts_with("error: ")).collect();
                assert_eq!(errors.len(), 1, "{says}");
                for part in [worker.address.as_str(), "blocks 1..2", "cosine"] {
                    assert!(errors[0].contains(part), "no {part:?} in {says}");
                }
                assert!(says.contains("hint: "), "{says}");
            }
            let mut believed = cut.generate(&[&worker.address], &OPTIONS);
            let believed = report(believed.arg("--no-canary"));
            assert_ne!(believed.tokens, right.tokens, "{what} changes nothing");
            caught += 1;
        }
    }
    println!(
        "{caught} of {caught} wrong workers caught; without the canary each was accepted, with other tokens"
    );
}

/// The worker that comes back after a loss is another one: it is checked before the rows it missed are sent.
#[test]
fn a_worker_that_comes_back_wrong_ends_the_reply() {
    let cut = Cut::tiny("qwen2");
    let mut worker = cut.worker(1);
    let relay = Relay::to(&worker.address);
    let address = worker.address.clone();
    let options = ["-n", "128", "--temp", "0"];
    let expected = report(&mut cut.generate(&[&relay.address()], &options));
    let all = relay.received();
    let wrong = tampered(&cut, &cut.slice(1), exchanged);

    relay.break_after(all - expected.wire.gen_bytes_received / 2);
    let mut command = cut.generate(&[&relay.address()], &options);
    let host = command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    assert!(relay.wait_until_broken());
    worker.kill();
    relay.mend();
    let _wrong = Worker::start_at(&address, &wrong, &cut.key, &["--verify", "never"]);
    let output = host.wait_with_output().unwrap();
    let says = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{says}");
    assert!(says.contains("error: ") && says.contains("blocks 1..2") && says.contains("cosine"), "{says}");
    let kept: dim::host::report::Report = serde_json::from_slice(&output.stdout).unwrap();
    assert!(!kept.tokens.is_empty() && kept.tokens.len() < 128);
    assert!(expected.tokens.starts_with(&kept.tokens), "a token of the wrong worker was used");
}

#[test]
fn without_a_manifest_there_is_no_canary_and_only_verbose_says_so() {
    let cut = Cut::tiny("qwen2");
    let worker = gullible(&cut, &tampered(&cut, &cut.slice(1), exchanged));
    let generate = |more: &[&str]| {
        let mut command = std::process::Command::new(common::host_program());
        command.arg("generate").arg("--head").arg(cut.slice(0)).arg("--tail").arg(cut.slice(2));
        command.arg("--key-file").arg(&cut.key).args(["--worker", &worker.address]);
        run(command.args(["--threads", "1", "--ctx", "512", "-n", "2", "-p", "x"]).args(more))
    };
    let quiet = generate(&[]);
    assert!(
        quiet.status.success() && !text(&quiet.stderr).contains("computes right"),
        "{}",
        text(&quiet.stderr)
    );
    let told = text(&generate(&["--verbose"]).stderr);
    assert!(told.contains("whether") && told.contains("computes right is not checked"), "{told}");
    // an older manifest
    let mut older: Manifest = cut.manifest.clone();
    older.slices[1].canary = None;
    older.write(&cut.split).unwrap();
    assert_eq!(report(&mut cut.generate(&[&worker.address], &["-n", "2"])).tokens.len(), 2);
    let told = failure(&mut cut.generate(&["127.0.0.1:1"], &["--give-up-after", "0"]), 1);
    assert!(!told.contains("canary"), "{told}");
}

/// A worker with a session to spare is asked there, whatever the conversation holds.
#[test]
fn a_spare_session_takes_the_canary() {
    let cut = Cut::tiny("llama");
    let one = report(&mut cut.generate(&[], &OPTIONS));
    let worker = Worker::start(&cut.slice(1), &cut.key, &["--parallel", "2"]);
    assert_eq!(report(&mut cut.generate(&[&worker.address], &OPTIONS)).tokens, one.tokens);
    let wrong = Worker::start(
        &tampered(&cut, &cut.slice(1), exchanged),
        &cut.key,
        &["--parallel", "2", "--verify", "never"],
    );
    assert!(failure(&mut cut.generate(&[&wrong.address], &OPTIONS), 1).contains("cosine"));
}

/// A session longer than the canary's interval: a row of the reply is asked again, and the reply is what it is without.
#[test]
fn a_long_session_is_checked_on_its_way_and_stays_the_same() {
    let cut = Cut::tiny("qwen2");
    let worker = Worker::start(&cut.slice(1), &cut.key, &["--ctx", "4608"]);
    let options = ["--prompt-tokens", "4100", "-n", "24", "--temp", "0", "--ignore-eos", "--wire", "f32"];
    let generate = |more: &[&str]| {
        let mut command = cut.generate(&[&worker.address], &options);
        report(command.args(["--ctx", "4608"]).args(more))
    };
    let (with, without) = (generate(&[]), generate(&["--no-canary"]));
    assert_eq!((with.prompt_tokens, with.tokens.len()), (4100, 24));
    assert_eq!(with.tokens, without.tokens);
    assert_eq!(with.wire.round_trips, without.wire.round_trips);
}
