//! The product as a user runs it: real processes, real sockets, encryption on, against stock llama.cpp.

mod common;

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Cut, PROMPT, Worker, failure, host_program, report, run, signal, text, worker_program};
use dim::host::report::{Report, Stop};
use gguf_tools::synth::Spec;

/// What stock llama.cpp and a split run say, with the logits behind every token.
fn with_logits(command: &mut Command, folder: &std::path::Path, name: &str) -> (Report, Vec<u8>) {
    let path = folder.join(name);
    let report = report(command.args(["-n", "64", "--temp", "0"]).arg("--logits-out").arg(&path));
    (report, std::fs::read(path).unwrap())
}

#[test]
fn split_over_processes_gives_stock_logits_bit_for_bit() {
    let spec =
        |arch: &str, weights: &str, tied| Spec::tiny(arch).unwrap().with_type(weights).unwrap().tied(tied);
    let cases: [(Spec, &[&str]); 6] = [
        (spec("qwen2", "f16", false), &["1..2"]),
        (spec("qwen2", "q4_k_m", true), &["1..2"]),
        (spec("llama", "q8_0", false), &["1..1", "2..3"]),
        (spec("qwen3", "bf16", true), &["1..1"]),
        (spec("qwen3", "f32", false), &["1..4"]),
        (spec("olmo2", "f16", false), &["2..2", "3..3"]),
    ];
    for (spec, middles) in cases {
        let cut = Cut::new(&spec, middles);
        let (stock, expected) = with_logits(&mut cut.stock(&[]), cut.folder.path(), "stock");
        assert!(stock.prompt_tokens >= 128, "{} tokens", stock.prompt_tokens);

        let workers: Vec<Worker> = (0..middles.len()).map(|i| cut.worker(1 + i)).collect();
        // their order on the command line does not matter
        let addresses: Vec<&str> = workers.iter().rev().map(|w| w.address.as_str()).collect();
        let (got, logits) =
            with_logits(&mut cut.generate(&addresses, &["--wire", "f32"]), cut.folder.path(), "split");
        assert_eq!(got.tokens, stock.tokens, "{}", stock.model);
        assert_eq!(logits.len(), got.tokens.len() * 4 * cut.manifest.model.n_vocab as usize);
        assert!(logits == expected, "{}: logits differ", stock.model);
        assert_eq!(got.text, stock.text);

        // the comparison can fail: with F16 rows the logits are others
        let f16 = ["--wire", "f16"];
        let (_, rounded) = with_logits(&mut cut.generate(&addresses, &f16), cut.folder.path(), "f16");
        assert!(rounded != expected, "{}: F16 rows changed nothing", stock.model);
    }
}

#[test]
fn chunks_that_overlap_over_two_workers_change_nothing() {
    let cut = Cut::new(&Spec::tiny("qwen2").unwrap(), &["1..1", "2..2"]);
    let small = ["--ubatch", "16"];
    let (stock, expected) = with_logits(&mut cut.stock(&small), cut.folder.path(), "stock");
    let workers = [cut.worker(1), cut.worker(2)];
    let addresses = [workers[0].address.as_str(), &workers[1].address];
    let (got, logits) = with_logits(
        &mut cut.generate(&addresses, &["--wire", "f32", "--ubatch", "16"]),
        cut.folder.path(),
        "split",
    );
    assert_eq!(got.tokens, stock.tokens);
    assert!(logits == expected);
    let chunks = stock.prompt_tokens.div_ceil(16) as u64;
    assert_eq!(got.wire.round_trips, 2 * (chunks + 63));
}

#[test]
fn stages_may_all_be_files_of_this_machine() {
    let cut = Cut::tiny("qwen2");
    let (stock, expected) = with_logits(&mut cut.stock(&[]), cut.folder.path(), "stock");
    let (got, logits) = with_logits(&mut cut.generate(&[], &["--wire", "f32"]), cut.folder.path(), "split");
    assert_eq!((got.tokens, got.wire.bytes_sent), (stock.tokens, 0));
    assert!(logits == expected);
    let mut by_name = Command::new(host_program());
    by_name.args([
        "generate",
        "--threads",
        "1",
        "--json",
        "-n",
        "64",
        "--temp",
        "0",
        "--ctx",
        "512",
        "-p",
        PROMPT,
    ]);
    by_name.arg("--head").arg(cut.slice(0)).arg("--middle").arg(cut.slice(1)).arg("--tail").arg(cut.slice(2));
    assert_eq!(report(by_name.args(["--wire", "f32"])).text, stock.text);
}

#[test]
fn sampling_is_that_of_stock_for_the_same_seed() {
    let cut = Cut::tiny("llama");
    let worker = cut.worker(1);
    let options = ["-n", "40", "--temp", "0.9", "--top-k", "50", "--seed", "11", "--repeat-penalty", "1.1"];
    let stock = report(&mut cut.stock(&options));
    let split = report(cut.generate(&[&worker.address], &options).args(["--wire", "f32"]));
    assert_eq!(split.tokens, stock.tokens);
    let other = report(cut.stock(&options).args(["--seed", "12"]));
    assert_ne!(other.tokens, stock.tokens, "another seed, the same tokens");
}

#[test]
fn the_report_has_its_fields_and_the_wire_its_bound() {
    let cut = Cut::tiny("qwen2");
    let worker = cut.worker(1);
    let output = run(&mut cut.generate(&[&worker.address], &["-n", "33", "--temp", "0"]));
    let json: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("one object and nothing else on stdout");
    for field in ["tokens", "text", "prompt_tokens", "prompt_tok_s", "gen_tok_s", "ttft_ms", "stages", "wire"]
    {
        assert!(!json[field].is_null(), "no {field}");
    }
    for stage in json["stages"].as_array().unwrap() {
        for field in ["name", "blocks", "compute_ms", "wait_ms"] {
            assert!(!stage[field].is_null(), "no stages[].{field}");
        }
    }
    let report: Report = serde_json::from_value(json).unwrap();
    assert_eq!((report.tokens.len(), report.stop), (33, Stop::Length));
    assert_eq!(report.stages.iter().map(|s| s.blocks.as_str()).collect::<Vec<_>>(), ["0..0", "1..2", "3..5"]);
    assert_eq!(report.wire.round_trips, 33);
    let n_embd = u64::from(cut.manifest.model.n_embd);
    let per_token = (report.wire.gen_bytes_sent + report.wire.gen_bytes_received) as f64 / 32.0;
    assert!(per_token <= (2 * (2 * n_embd + 64)) as f64, "{per_token} bytes a token");
    assert!(per_token >= (4 * n_embd) as f64, "{per_token} bytes a token: the rows are not among them");
    // a table for people, and the picture of who has what
    let stderr = text(&output.stderr);
    for part in ["tok/s", "compute", "wait", "per token", "1..2 on "] {
        assert!(stderr.contains(part), "no {part:?} in {stderr}");
    }
}

#[test]
fn a_worker_that_does_not_fit_is_refused_with_the_side_to_fix() {
    let cut = Cut::tiny("qwen2");
    let worker = cut.worker(1);
    let at = worker.address.as_str();

    // another model's slice
    let other = Cut::new(&Spec::tiny("qwen2").unwrap().seed(2), &["1..2"]);
    let says = failure(&mut other.generate(&[at], &[]), 2);
    assert!(says.contains("another model") && says.contains(at), "{says}");
    // other blocks of the same model
    let elsewhere = Cut::new(&Spec::tiny("qwen2").unwrap(), &["2..3"]);
    let says = failure(&mut elsewhere.generate(&[at], &[]), 2);
    assert!(
        says.contains("two stages have block 1: ")
            && says.contains("model.head.gguf has 0..1, ")
            && says.contains(&format!("{at} has 1..2, ")),
        "{says}"
    );
    // the same worker twice
    let says = failure(&mut cut.generate(&[at, &at.replace("127.0.0.1", "localhost")], &[]), 2);
    assert!(
        says.contains(&format!("{at} has 1..2, localhost")) && says.contains("name each worker once"),
        "{says}"
    );
    // a manifest that was taken away from its slices
    let away = tempfile::tempdir().unwrap();
    let moved = away.path().join("m.split.json");
    std::fs::copy(&cut.split, &moved).unwrap();
    let mut command = Command::new(host_program());
    let says = failure(command.args(["generate", "-p", "a", "--split"]).arg(&moved), 2);
    assert!(says.contains("is not there") && says.contains("one folder"), "{says}");
    // a longer context than the worker's
    let says = failure(cut.generate(&[at], &[]).args(["--ctx", "600"]), 2);
    assert!(says.contains("600") && says.contains("512"), "{says}");
    // another key
    let key = cut.folder.path().join("other-key");
    std::fs::write(&key, "ab".repeat(32)).unwrap();
    let says = failure(cut.generate(&[at], &[]).arg("--key-file").arg(&key), 2);
    assert!(says.contains("key") && says.contains("pair"), "{says}");
    // nobody there
    let says = failure(cut.generate(&["127.0.0.1:1"], &[]).args(["--give-up-after", "0"]), 1);
    assert!(says.contains("127.0.0.1:1") && says.contains("dim-worker"), "{says}");
    // and after all that it serves as if nothing had been
    assert_eq!(report(&mut cut.generate(&[at], &["-n", "2"])).tokens.len(), 2);
}

/// The weights say nothing of the settings they were made for: those have a digest of their own.
#[test]
fn the_same_weights_with_other_settings_are_refused() {
    let cut = Cut::tiny("qwen2");
    let other = cut.with_f32("qwen2.rope.freq_base", 1.0e6, &["1..2"]);
    assert_eq!(other.manifest.model.sha256, cut.manifest.model.sha256);
    assert_ne!(other.manifest.model.params_sha256, cut.manifest.model.params_sha256);
    let worker = other.worker(1);
    let says = failure(&mut cut.generate(&[&worker.address], &["-n", "1"]), 2);
    assert!(says.contains("the same weights with other settings (rope, norms, ...)"), "{says}");
    assert!(says.contains(&worker.address) && says.contains("one split on both sides"), "{says}");
    // as files of this machine
    let mut mixed = Command::new(host_program());
    mixed.args(["generate", "-p", "x", "--head"]).arg(cut.slice(0)).arg("--middle").arg(other.slice(1));
    let says = failure(mixed.arg("--tail").arg(cut.slice(2)), 2);
    assert!(says.contains("the same weights with other settings"), "{says}");
    // among themselves they are a model
    assert_eq!(report(&mut other.generate(&[&worker.address], &["-n", "1"])).tokens.len(), 1);
}

#[test]
fn misuse_is_exit_code_2_and_one_error_line() {
    let cut = Cut::tiny("qwen2");
    let s = |i| cut.slice(i).display().to_string();
    let (head, middle, tail, model) = (s(0), s(1), s(2), cut.model.display().to_string());
    let generate = |args: &[&str]| {
        failure(Command::new(host_program()).args(["generate", "-p", "x", "--threads", "1"]).args(args), 2)
    };
    assert!(generate(&["--head", &tail, "--tail", &tail]).contains("tail slice, not a head"));
    assert!(generate(&["--head", &model, "--tail", &tail]).contains("not a slice"));
    assert!(generate(&["--head", &head, "--tail", &tail]).contains("nobody has blocks 1..2"));
    assert!(generate(&["--head", &head, "--tail", "/nowhere.gguf"]).contains("/nowhere.gguf"));
    assert!(generate(&["--split", &model]).contains("manifest"));
    assert!(generate(&["--head", &head]).contains("--tail"));
    let full = ["--head", &head, "--middle", &middle, "--tail", &tail];
    assert!(generate(&[&full[..], &["--temp=-1"]].concat()).contains("--temp"));
    assert!(generate(&[&full[..], &["--ubatch", "0"]].concat()).contains("--ubatch"));
    assert!(generate(&[&full[..], &["--threads", "0"]].concat()).contains("threads"));
    assert!(generate(&[&full[..], &["-n", "-2"]].concat()).contains("-n"));
    assert!(
        failure(Command::new(host_program()).args(["generate", "-p", ""]).args(full), 2)
            .contains("prompt is empty")
    );
    let says =
        failure(Command::new(host_program()).args(["generate", "--ctx", "8", "-p", PROMPT]).args(full), 2);
    assert!(says.contains("context 8") && says.contains("hint: "), "{says}");
    assert!(failure(Command::new(worker_program()).arg(&head), 2).contains("a worker serves a middle"));
    assert!(
        failure(Command::new(worker_program()).arg(&middle).args(["--key-file", "/nowhere"]), 2)
            .contains("/nowhere")
    );
    let at = ["--listen", "203.0.113.1:1"];
    let key = cut.key.display().to_string();
    assert!(
        failure(Command::new(worker_program()).arg(&middle).args(at).args(["--key-file", &key]), 2)
            .contains("--listen")
    );
}

#[test]
fn altered_weights_are_refused_and_the_tensor_is_named() {
    let cut = Cut::tiny("qwen2");
    let path = cut.slice(1);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 0x10;
    std::fs::write(&path, &bytes).unwrap();
    let says = failure(Command::new(worker_program()).arg(&path).arg("--key-file").arg(&cut.key), 2);
    assert!(says.contains("in blk.") && says.contains("hash mismatch"), "{says}");
    // the host refuses it too, whole again it is taken
    assert!(failure(&mut cut.generate(&[], &["-n", "1"]), 2).contains("in blk."));
    bytes[at] ^= 0x10;
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(report(&mut cut.generate(&[], &["-n", "1"])).tokens.len(), 1);
}

#[test]
fn the_second_host_is_told_who_is_served() {
    let cut = Cut::tiny("qwen2");
    let worker = cut.worker(1);
    // a conversation that waits for its next line holds the worker
    let mut first = Command::new(host_program());
    first
        .arg("chat")
        .arg("--split")
        .arg(&cut.split)
        .arg("--key-file")
        .arg(&cut.key)
        .args(["--worker", &worker.address]);
    first.args(["--threads", "1", "--ctx", "512", "-n", "4"]);
    let mut first =
        first.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(first.stdout.take().unwrap());
    writeln!(first.stdin.as_mut().unwrap(), "hello").unwrap();
    let mut line = String::new();
    said.read_line(&mut line).unwrap();

    let says = failure(&mut cut.generate(&[&worker.address], &["-n", "1", "--give-up-after", "0"]), 1);
    assert!(says.contains("busy"), "{says}");
    // the first one goes on, and when it has gone the second one is served
    writeln!(first.stdin.as_mut().unwrap(), "and on").unwrap();
    line.clear();
    said.read_line(&mut line).unwrap();
    drop(first.stdin.take());
    assert!(first.wait().unwrap().success());
    assert_eq!(report(&mut cut.generate(&[&worker.address], &["-n", "1"])).tokens.len(), 1);
}

#[test]
fn a_worker_ends_cleanly_on_signals() {
    let cut = Cut::tiny("qwen2");
    for name in ["TERM", "INT"] {
        let mut worker = cut.worker(1);
        worker.signal(name);
        assert_eq!(worker.child.wait().unwrap().code(), Some(0), "SIG{name}: {}", worker.stderr());
    }
}

#[test]
fn any_order_of_starting_works() {
    let cut = Cut::tiny("qwen2");
    // an address that is free now
    let address = cut.worker(1).address.clone();
    let mut host = cut.generate(&[&address], &["-n", "3"]);
    let host = host.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(700));
    let _worker = Worker::start_at(&address, &cut.slice(1), &cut.key, &[]);
    let output = host.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("is the worker running?"));
}

#[test]
fn pairing_by_code_makes_a_key_that_only_its_owner_can_read() {
    let cut = Cut::tiny("qwen2");
    let homes = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mut worker = Command::new(worker_program());
    worker.arg(cut.slice(1)).args(["--listen", "127.0.0.1:0", "--threads", "1", "--ctx", "512"]);
    let worker = Worker::spawn(worker.env("XDG_CONFIG_HOME", homes[0].path()));
    let shown = || {
        worker.stderr().lines().map(str::trim).find(|l| l.len() == 24 && l.contains('-')).map(str::to_owned)
    };
    let start = Instant::now();
    let code = loop {
        match shown() {
            Some(code) => break code,
            None if start.elapsed() > Duration::from_secs(10) => panic!("no code in {}", worker.stderr()),
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let host = |args: &[&str]| {
        let mut command = Command::new(host_program());
        command.args(args).env("XDG_CONFIG_HOME", homes[1].path());
        command
    };
    let split = cut.split.display().to_string();
    let generate = [
        "generate",
        "--split",
        &split,
        "--worker",
        &worker.address,
        "-p",
        "x",
        "-n",
        "1",
        "--ctx",
        "512",
        "--json",
    ];
    assert!(failure(&mut host(&generate), 2).contains("dim-host pair"));
    // a mistyped code costs no try; a wrong one does, and the right one still works
    let mut mistyped = code.clone().into_bytes();
    mistyped[0] = if mistyped[0] == b'7' { b'8' } else { b'7' };
    failure(&mut host(&["pair", &worker.address, &text(&mistyped)]), 2);
    assert!(run(&mut host(&["pair", &worker.address, &code.to_lowercase()])).status.success());
    assert_eq!(report(&mut host(&generate)).tokens.len(), 1);
    // used up
    failure(&mut host(&["pair", &worker.address, &code]), 2);
    #[cfg(unix)]
    for home in &homes {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = home.path().join("dim/keys");
        let mode = |p: &std::path::Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&folder), 0o700);
        let keys: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(!keys.is_empty());
        assert!(keys.iter().all(|k| mode(k) == 0o600), "{keys:?}");
    }
}

#[test]
fn chat_keeps_the_common_prefix_and_answers_as_a_fresh_run_would() {
    let cut = Cut::tiny("qwen2");
    let worker = cut.worker(1);
    let mut chat = Command::new(host_program());
    chat.arg("chat")
        .arg("--split")
        .arg(&cut.split)
        .arg("--key-file")
        .arg(&cut.key)
        .args(["--worker", &worker.address]);
    chat.args(["--threads", "1", "--ctx", "512", "-n", "12", "--temp", "0", "--wire", "f32", "--timings"]);
    chat.args(["--system", "You count boats."]);
    let mut chat = chat.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    chat.stdin
        .take()
        .unwrap()
        .write_all(b"How many boats?\nAnd now?\n/clear\nHow many boats?\n/exit\n")
        .unwrap();
    let output = chat.wait_with_output().unwrap();
    let stderr = text(&output.stderr);
    assert!(output.status.success(), "{stderr}");

    // "prompt  N tokens": what each turn had to evaluate
    let evaluated: Vec<usize> = stderr
        .lines()
        .filter(|l| l.starts_with("prompt "))
        .map(|l| l.split_whitespace().nth(1).unwrap().parse().unwrap())
        .collect();
    assert_eq!(evaluated.len(), 3, "{stderr}");
    let whole = |said: &[(&str, &str)]| -> String {
        let turn = |(role, content): &(&str, &str)| format!("<|im_start|>{role}\n{content}<|im_end|>\n");
        said.iter().map(turn).collect::<String>() + "<|im_start|>assistant\n"
    };
    let system = ("system", "You count boats.");
    let first = whole(&[system, ("user", "How many boats?")]);
    let fresh = report(&mut cut.stock(&["-n", "12", "--temp", "0", "-p", &first]));
    let replies = text(&output.stdout);
    assert!(replies.starts_with(&fresh.text), "{replies:?} does not begin with {:?}", fresh.text);
    assert_eq!(evaluated[0], fresh.prompt_tokens);
    // the second turn evaluates only what is new
    let second = evaluated[1];
    assert!(second < evaluated[0], "turn 2 evaluated {second} of more than {} tokens", evaluated[0]);
    // the same question again after /clear: the same answer, and only its last token evaluated
    assert_eq!(evaluated[2], 1, "{stderr}");
    assert_eq!(replies.matches(&fresh.text).count(), 2, "{replies:?}");
}

#[test]
fn ctrl_c_stops_a_reply_and_keeps_the_conversation() {
    let cut = Cut::new(&Spec::new("demo", Some("qwen2")).unwrap(), &["4..7"]);
    let worker = Worker::start(&cut.slice(1), &cut.key, &["--ctx", "4096"]);
    let mut chat = Command::new(host_program());
    chat.arg("chat")
        .arg("--split")
        .arg(&cut.split)
        .arg("--key-file")
        .arg(&cut.key)
        .args(["--worker", &worker.address]);
    chat.args(["--threads", "1", "--temp", "0"]);
    let mut chat = chat.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut said = chat.stdout.take().unwrap();
    let mut byte = [0];
    writeln!(chat.stdin.as_mut().unwrap(), "tell me everything").unwrap();
    std::io::Read::read_exact(&mut said, &mut byte).unwrap();
    signal(chat.id(), "INT");
    // the reply ends, and the next line is answered
    writeln!(chat.stdin.as_mut().unwrap(), "go on").unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    signal(chat.id(), "INT");
    drop(chat.stdin.take());
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut said, &mut rest).unwrap();
    assert!(chat.wait().unwrap().success());
    assert!(rest.matches('\n').count() >= 2, "two replies expected in {rest:?}");
    // ended long before the context's 4096 tokens
    assert!(rest.len() < 20_000, "{} bytes", rest.len());
}

/// Peak resident memory of a process, in bytes.
#[cfg(target_os = "linux")]
fn peak_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[cfg(target_os = "linux")]
#[test]
fn a_worker_takes_its_slice_its_cache_and_little_more() {
    let cut = Cut::new(&Spec::new("qwen2.5-0.5b", None).unwrap().blocks(6), &["1..4"]);
    let worker = Worker::start(&cut.slice(1), &cut.key, &["--ctx", "2048"]);
    report(&mut cut.generate(&[&worker.address], &["-n", "8", "--ctx", "2048"]));
    // K and V of 4 blocks: 2048 positions, 2 heads of 64, 2 bytes
    within_its_promise(&worker, cut.manifest.slices[1].bytes, 4 * 2 * 2048 * 2 * 64 * 2);
}

/// At the width of a 7B model the buffers of 512 rows alone would take the 150 MiB: a worker computes fewer at once,
/// unless it is told how many.
#[cfg(target_os = "linux")]
#[test]
fn a_worker_of_a_7b_model_keeps_the_same_promise() {
    let cut = Cut::new(&Spec::new("qwen2.5-7b", None).unwrap().blocks(3).vocab(512), &["1..1"]);
    let worker = Worker::start(&cut.slice(1), &cut.key, &["--ctx", "2048"]);
    let long = ["-n", "4", "--ctx", "2048", "--prompt-tokens", "600"];
    let chosen = report(&mut cut.generate(&[&worker.address], &long));
    assert_eq!(chosen.wire.round_trips, 3 + 3, "600 rows in steps of 256");
    // K and V of one block: 2048 positions, 4 heads of 128, 2 bytes
    within_its_promise(&worker, cut.manifest.slices[1].bytes, 2 * 2048 * 4 * 128 * 2);
    drop(worker);
    let told = Worker::start(&cut.slice(1), &cut.key, &["--ctx", "2048", "--ubatch", "512"]);
    assert_eq!(report(&mut cut.generate(&[&told.address], &long)).wire.round_trips, 2 + 3);
}

/// Peak memory against the slice, its cache and 150 MiB.
#[cfg(target_os = "linux")]
fn within_its_promise(worker: &Worker, slice: u64, cache: u64) {
    let peak = peak_memory(worker.pid());
    let over = peak.saturating_sub(slice + cache) >> 20;
    println!(
        "worker: {} MiB peak, slice {} MiB, cache {} MiB, {over} MiB more",
        peak >> 20,
        slice >> 20,
        cache >> 20
    );
    assert!(peak <= slice + cache + (150 << 20), "{over} MiB more than its slice and cache");
    assert!(peak >= slice, "{peak} bytes: less than the slice itself");
}

/// Whoever has started a worker may stop reading what it says.
#[test]
fn a_worker_that_nobody_reads_serves_on() {
    let cut = Cut::tiny("qwen2");
    let args = ["-n", "4", "--temp", "0"];
    let expected = report(&mut cut.stock(&args)).tokens;
    let mut command = Command::new(worker_program());
    command.arg(cut.slice(1)).arg("--key-file").arg(&cut.key);
    command.args(["--listen", "127.0.0.1:0", "--threads", "1", "--ctx", "512"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.trim().strip_prefix("listening on ").unwrap();
    drop(child.stderr.take());
    for _ in 0..3 {
        assert_eq!(report(&mut cut.generate(&[address], &args)).tokens, expected);
    }
    assert_eq!(child.try_wait().unwrap(), None, "it has ended");
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A system that has no descriptor left is said a few times, not for every connection, and newcomers get their turn again.
#[cfg(target_os = "linux")]
#[test]
fn a_worker_without_descriptors_says_so_and_serves_on() {
    let cut = Cut::tiny("qwen2");
    let worker = cut.worker(1);
    // it has just begun, and may hold some for a moment
    let held = || std::fs::read_dir(format!("/proc/{}/fd", worker.pid())).unwrap().count() as u64;
    let looks = (0..20).map(|_| {
        std::thread::sleep(Duration::from_millis(50));
        held()
    });
    let held = looks.min().unwrap();
    let pid = rustix::process::Pid::from_raw(worker.pid().cast_signed()).unwrap();
    let limit = rustix::process::Rlimit { current: Some(held + 4), maximum: Some(held + 4) };
    rustix::process::prlimit(Some(pid), rustix::process::Resource::Nofile, limit).unwrap();
    let crowd: Vec<_> = (0..200).map(|_| std::net::TcpStream::connect(&worker.address)).collect();
    let begin = Instant::now();
    let said = || worker.stderr().matches("Too many open files").count();
    while said() == 0 {
        assert!(begin.elapsed() < Duration::from_secs(20), "{}", worker.stderr());
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_secs(1));
    assert!(said() < 10, "{}", worker.stderr());
    drop(crowd);
    let args = ["-n", "4", "--temp", "0"];
    let expected = report(&mut cut.stock(&args)).tokens;
    assert_eq!(report(&mut cut.generate(&[&worker.address], &args)).tokens, expected);
}
