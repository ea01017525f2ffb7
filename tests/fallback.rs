//! `--fallback local`: a worker that stays away, and its blocks here in its place, without a token that is another.

mod common;

use std::process::Stdio;
use std::time::{Duration, Instant};

use common::served::{BEGINNINGS, N, Server, generated, greedy, parallel};
use common::{Cut, PROMPT, Relay, failure, report, text};
use dim::host::report::Report;
use serde_json::json;

const LOCAL: [&str; 4] = ["--fallback", "local", "--give-up-after", "1"];

#[test]
fn a_server_goes_on_alone_with_the_same_tokens_and_says_so() {
    let cut = Cut::tiny("qwen2");
    let mut worker = parallel(&cut, "127.0.0.1:0");
    let expected = generated(&cut, &worker.address);
    let server =
        Server::start(&cut, &worker.address, &[&LOCAL[..], &["--parallel", "4", "--exact"]].concat());
    assert_eq!(server.get("/health")["fallen_back"], json!([]));
    let ask = |begin: usize| {
        let mut body = greedy(&PROMPT[begin..], N);
        body["cache_prompt"] = false.into();
        server.streamed(&body)
    };
    // what the worker is asked first and last is known; then it goes, in the middle of four replies
    assert_eq!(ask(BEGINNINGS[0]), expected[0]);
    std::thread::scope(|scope| {
        for (begin, expected) in BEGINNINGS.into_iter().zip(&expected) {
            scope.spawn(move || assert_eq!(&ask(begin), expected, "from {begin}"));
        }
        server.comes_true("all four have a slot", |server| server.get("/props")["slots_busy"] == 4);
        worker.kill();
    });
    let health = server.get("/health");
    assert_eq!((&health["status"], &health["away"]), (&json!("ok"), &json!([])), "{health}");
    assert_eq!(health["fallen_back"], json!([format!("middle @ {}", worker.address)]));
    let stages = server.get("/split")["stages"].clone();
    assert!(stages.as_array().unwrap().iter().all(|stage| stage["worker"].is_null()), "{stages}");
    // and for everybody who comes, at once; it stays so though the worker is back
    let _back = parallel(&cut, &worker.address);
    for (begin, expected) in BEGINNINGS.into_iter().zip(&expected) {
        assert_eq!(&ask(begin), expected);
        assert_eq!(&server.tokens(&greedy(&PROMPT[begin..], N)), expected, "with what the cache holds");
    }
    assert_eq!(server.get("/health")["lost"], 1);
}

/// A reply of one command: lost in its prompt, and in its middle.
#[test]
fn a_reply_goes_on_alone_with_the_same_tokens() {
    let cut = Cut::tiny("llama");
    let options = [&["-n", "64", "--temp", "0", "--ubatch", "48", "--wire", "f16"][..], &LOCAL].concat();
    let worker = cut.worker(1);
    let relay = Relay::to(&worker.address);
    let undisturbed = report(&mut cut.generate(&[&relay.address()], &options));
    let before = relay.received().saturating_sub(undisturbed.wire.bytes_received);
    for share in [0.1, 0.7] {
        let mut worker = cut.worker(1);
        let relay = Relay::to(&worker.address);
        relay.break_after(before + (undisturbed.wire.bytes_received as f64 * share) as u64);
        let mut command = cut.generate(&[&relay.address()], &options);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = child.spawn().unwrap();
        assert!(relay.wait_until_broken(), "the reply ended before it broke");
        worker.kill();
        let output = child.wait_with_output().unwrap();
        let said = text(&output.stderr);
        assert!(output.status.success(), "{said}");
        let got: Report = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(got.tokens, undisturbed.tokens, "at {share}: {said}");
        let told = said.lines().filter(|line| line.contains("stayed away: its blocks run here")).count();
        assert_eq!(told, 1, "{said}");
    }
}

#[test]
fn a_worker_that_is_not_there_at_the_start_is_not_needed() {
    let cut = Cut::tiny("qwen2");
    let worker = cut.worker(1);
    let options = ["-n", "16", "--temp", "0", "--wire", "f32"];
    let with = report(&mut cut.generate(&[&worker.address], &options));
    let address = worker.address.clone();
    drop(worker);
    let without = report(&mut cut.generate(&[&address], &[&options[..], &LOCAL].concat()));
    assert_eq!(with.tokens, without.tokens);
    failure(&mut cut.generate(&[&address], &[&options[..], &["--give-up-after", "1"]].concat()), 1);
}

/// Before anybody is dialled.
#[test]
fn a_slice_that_is_not_beside_the_manifest_is_said_at_once() {
    let cut = Cut::tiny("qwen2");
    let (slice, nobody) = (cut.slice(1), "127.0.0.1:9");
    std::fs::remove_file(&slice).unwrap();
    let start = Instant::now();
    let says = failure(&mut cut.generate(&[nobody], &["--fallback", "local", "--give-up-after", "60"]), 2);
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    assert!(
        says.contains(&format!(
            "blocks 1..2 could not run here if their worker stays away: {}",
            slice.display()
        )),
        "{says}"
    );
    assert!(says.contains("hint: ") && says.contains("--fallback local"), "{says}");
}

/// What is beside the manifest by then is another slice: the request ends, and the server does not.
#[test]
fn a_slice_that_has_changed_takes_nobody_s_place() {
    let cut = Cut::tiny("qwen2");
    let mut worker = parallel(&cut, "127.0.0.1:0");
    let expected = generated(&cut, &worker.address);
    let server = Server::start(&cut, &worker.address, &LOCAL);
    let other = Cut::new(&gguf_tools::synth::Spec::tiny("qwen2").unwrap().seed(2), &["1..2"]);
    let (slice, kept) = (cut.slice(1), cut.folder.path().join("kept.gguf"));
    std::fs::rename(&slice, &kept).unwrap();
    std::fs::copy(other.slice(1), &slice).unwrap();
    worker.kill();
    let refused = server.post("/v1/completions", &greedy(PROMPT, N));
    assert_eq!((refused.0, refused.word().as_str()), (503, "worker_unavailable"), "{}", refused.2);
    assert!(refused.2.contains("its blocks cannot run here"), "{}", refused.2);
    assert_eq!(server.get("/health")["fallen_back"], json!([]));
    std::fs::rename(&kept, &slice).unwrap();
    // then it can, without the worker, and with it
    assert_eq!(server.tokens(&greedy(PROMPT, N)), expected[0]);
    assert_eq!(server.get("/health")["status"], "ok");
}

/// Room for threads and small things, and none for the slice: the request ends, the server does not, and can do it later.
#[test]
#[cfg(target_os = "linux")]
fn blocks_that_there_is_no_memory_for_take_nobody_s_place() {
    let spec = gguf_tools::synth::Spec::new("qwen2.5-0.5b", None).unwrap().vocab(512).blocks(4);
    let cut = Cut::new(&spec, &["1..2"]);
    let mut worker = parallel(&cut, "127.0.0.1:0");
    let server = Server::start(&cut, &worker.address, &LOCAL);
    let body = greedy(PROMPT, 4);
    let expected = server.tokens(&body);
    worker.kill();
    let limit = |bytes: &str| {
        let mut command = std::process::Command::new("prlimit");
        let status = command.args(["--pid", &server.pid().to_string(), &format!("--as={bytes}")]).status();
        assert!(status.expect("prlimit, of util-linux").success());
    };
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let in_use = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    let in_use: u64 = in_use.trim().trim_end_matches(" kB").parse().unwrap();
    limit(&format!("{}:unlimited", (in_use + 20 * 1024) * 1024));
    let refused = server.post("/v1/completions", &body);
    assert_eq!((refused.0, refused.word().as_str()), (503, "worker_unavailable"), "{}", refused.2);
    assert!(refused.2.contains("its blocks cannot run here"), "{}", refused.2);
    assert_eq!(server.get("/health")["fallen_back"], json!([]));
    limit("unlimited");
    assert_eq!(server.tokens(&body), expected);
    assert_eq!(server.get("/health")["fallen_back"].as_array().map(Vec::len), Some(1));
}
