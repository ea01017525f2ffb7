//! `dim-host ab`, `eval` and `report` on real processes and synthetic models: what they say is checked, how fast it was
//! never.

mod common;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Cut, Worker, failure, host_program, text, worker_program};
use dim_ab::quality::Evaluation;
use dim_ab::record::{Arm, Phase, Record, read};
use dim_ab::report::{Measured, Page};
use dim_ab::summary::{Same, summarise};
use gguf_tools::synth::Spec;

/// `dim-host ab` for `cut`, records into `out`.
fn ab(cut: &Cut, out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(host_program());
    command.arg("ab").arg("--model").arg(&cut.model).arg("--split").arg(&cut.split);
    command.arg("--key-file").arg(&cut.key).arg("--out").arg(out);
    command.args(["--threads", "1", "--wire", "f32", "--ctx", "512"]).args(more);
    command.stdin(Stdio::null());
    command
}

/// Runs it, and reads what it recorded.
fn records(command: &mut Command, out: &Path) -> Vec<Record> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?} ended with {}\n{}", output.status, text(&output.stderr));
    read(&out.join("results.jsonl")).unwrap()
}

fn tokens(record: &Record) -> &[i32] {
    &record.report.as_ref().unwrap_or_else(|| panic!("no report: {:?}", record.not_counted)).tokens
}

#[test]
fn every_arm_runs_in_every_round_and_gives_the_tokens_of_stock() {
    let cut = Cut::tiny("qwen2");
    let out = tempfile::tempdir().unwrap();
    let arguments = [
        "--baseline",
        "solo,q8_0,q4_k_m",
        "--rounds",
        "2",
        "-n",
        "12",
        "--prompt-tokens",
        "40",
        "--link",
        "2:200",
    ];
    let records = records(&mut ab(&cut, out.path(), &arguments), out.path());

    let order: Vec<(u32, Arm)> = records.iter().map(|r| (r.round, r.arm)).collect();
    let arms = [Arm::Split, Arm::Solo, Arm::Q8_0, Arm::Q4KM];
    let expected: Vec<(u32, Arm)> = (0..=2).flat_map(|round| arms.map(|arm| (round, arm))).collect();
    assert_eq!(order, expected, "not a b a b");
    for record in &records {
        assert_eq!(record.not_counted, None, "{:?}", record.arm);
        assert_eq!(record.phase, if record.round == 0 { Phase::First } else { Phase::Steady });
        let report = record.report.as_ref().unwrap();
        assert_eq!((report.tokens.len(), report.prompt_tokens), (12, 40));
        assert!(
            record.command.iter().all(|c| !c.contains('/')),
            "a path is in the record: {:?}",
            record.command
        );
        if cfg!(target_os = "linux") {
            assert!(record.host.peak_rss_bytes.unwrap() > 1 << 20, "{:?}", record.host);
        }
    }

    // what the link saw is what the host says it sent, and more: the end of the connection
    for record in records.iter().filter(|r| r.arm == Arm::Split) {
        let (link, wire) = (record.link_traffic.unwrap(), &record.report.as_ref().unwrap().wire);
        assert!(wire.gen_bytes_sent > 0 && link.bytes_up >= wire.bytes_sent, "{link:?} {wire:?}");
        assert!(wire.gen_bytes_received > 0 && link.bytes_down >= wire.bytes_received, "{link:?} {wire:?}");
        assert_eq!(record.workers.len(), 1);
        // eleven steps after the first token, none faster than the link's round trip
        assert!(record.report.as_ref().unwrap().gen_ms >= 22.0, "the link was not in the way");
    }
    let tables = summarise(&records);
    assert_eq!((tables.len(), tables[0].rows.len()), (1, 4));
    for row in &tables[0].rows {
        let same = if row.arm == Arm::Split { Same::Yes } else { Same::NotCompared };
        assert_eq!((row.rounds, row.same), (2, same), "{:?}", row.arm);
    }
    let html = std::fs::read_to_string(out.path().join("report.html")).unwrap();
    let version = format!("llama-cpp-sys-2 {}", llama_sys_patch::LLAMA_CPP_SYS_VERSION);
    for text in [version.as_str(), "solo Q4_K_M", "2 ms, 200 Mbit/s", "<svg"] {
        assert!(html.contains(text), "the report has no {text:?}");
    }

    // the quantised models are quantised, and are kept for the next run
    let bytes = |arm| records.iter().find(|r| r.arm == arm).unwrap().model.bytes;
    assert!(bytes(Arm::Q8_0) < bytes(Arm::Solo) && bytes(Arm::Q4KM) < bytes(Arm::Solo));
    assert!(out.path().join("models/model-q8_0.gguf").is_file());
}

/// What the breakdown leaves unexplained, it says; the parts it names are not more than there is.
#[test]
fn the_parts_of_a_token_are_not_more_than_the_whole() {
    let cut = Cut::new(&Spec::new("demo", None).unwrap(), &["4..7"]);
    let out = tempfile::tempdir().unwrap();
    let records = records(
        &mut ab(&cut, out.path(), &["--rounds", "1", "-n", "16", "--prompt-tokens", "16"]),
        out.path(),
    );
    for row in &summarise(&records)[0].rows {
        let breakdown = row.breakdown.as_ref().unwrap();
        assert!((-0.2..0.5).contains(&breakdown.unexplained()), "{:?}: {breakdown:?}", row.arm);
        let stages = breakdown.parts.len();
        assert_eq!(stages, if row.arm == Arm::Split { 5 } else { 2 }, "{breakdown:?}");
    }
}

#[test]
fn a_round_in_which_the_worker_died_is_marked_and_not_counted() {
    let cut = Cut::tiny("qwen2");
    let out = tempfile::tempdir().unwrap();
    // a port of its own, so that the next worker can have it again
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let mut worker = Worker::start_at(&address, &cut.slice(1), &cut.key, &[]);

    // 20 ms a token: two seconds to die in
    let arguments =
        ["--worker", &address, "--rounds", "2", "-n", "100", "--prompt-tokens", "16", "--link", "20:inf"];
    let mut command = ab(&cut, out.path(), &arguments);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let log = out.path().join("logs/split-1.log");
    let deadline = Instant::now() + Duration::from_secs(120);
    while !std::fs::read_to_string(&log).unwrap_or_default().contains("blocks: ") {
        assert!(Instant::now() < deadline, "the first steady round did not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(700));
    worker.kill();
    let _second = Worker::start_at(&address, &cut.slice(1), &cut.key, &[]);

    let output = child.wait_with_output().unwrap();
    let stderr = text(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let records = read(&out.path().join("results.jsonl")).unwrap();
    let split: Vec<&Record> = records.iter().filter(|r| r.arm == Arm::Split).collect();
    let why = split[1].not_counted.as_deref().unwrap_or("it was counted");
    assert!(why.contains("lost and found again"), "{why}\n{stderr}");
    assert!(split[0].counts() && split[2].counts(), "{:?} {:?}", split[0].not_counted, split[2].not_counted);
    assert!(stderr.contains("NOT COUNTED"), "{stderr}");
    // the reply was right all the same
    assert_eq!(tokens(split[1]), tokens(split[0]));
    let row = &summarise(&records)[0].rows[0];
    assert_eq!((row.rounds, row.not_counted.len(), row.same), (1, 1, Same::Yes));
    assert!(Page::new(&Measured { records, evaluations: vec![] }).html().contains("lost and found again"));
}

#[test]
#[cfg(target_os = "linux")]
fn a_memory_limit_holds_or_the_way_to_one_is_named() {
    let cut = Cut::tiny("qwen2");
    let out = tempfile::tempdir().unwrap();
    let few = ["--rounds", "0", "-n", "4", "--prompt-tokens", "8", "--baseline", "solo,solo-unlimited"];
    let limited = |limit: &'static str| {
        let mut command = ab(&cut, &out.path().join(limit), &few);
        command.args(["--memory-limit", limit]);
        command
    };
    if let Err(e) = dim_ab::cgroup::MemoryGroup::new(1 << 30) {
        // not as root, or a system without groups: misuse, with a hint, before anything was run
        let stderr = failure(&mut limited("2GB"), 2);
        assert!(stderr.contains("hint: ") && stderr.contains(&e.to_string()), "{stderr}");
        return;
    }
    let records_of = |limit: &'static str| records(&mut limited(limit), &out.path().join(limit));
    for record in records_of("2GB") {
        assert_eq!(record.not_counted, None);
        let peak = record.host_group_peak_bytes;
        if record.arm == Arm::SoloUnlimited {
            assert_eq!(peak, None, "the ceiling has no limit");
        } else {
            assert!((1 << 20..2_000_000_000).contains(&peak.unwrap()), "{:?}: {peak:?}", record.arm);
            assert!(record.cold_cache, "another arm may have read the file");
        }
    }
    // too little to live: the kernel ends it, and that is what the record says
    for record in records_of("4MB") {
        let why = record.not_counted.as_deref().unwrap_or("counted");
        let expected = if record.arm == Arm::SoloUnlimited {
            "counted"
        } else {
            "ended by the kernel: more memory than its limit"
        };
        assert!(why.starts_with(expected), "{:?}: {why}", record.arm);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_launched_program_is_pinned_and_a_wrong_core_is_named() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dim-ab"));
    command.args(["launch", "--cpus", "0", "--", "/bin/cat", "/proc/self/status"]);
    let status = text(&command.output().unwrap().stdout);
    assert!(status.lines().any(|l| l == "Cpus_allowed_list:\t0"), "{status}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_dim-ab"));
    let stderr = failure(command.args(["launch", "--cpus", "1023", "--", "/bin/true"]), 1);
    assert!(stderr.contains("1023"), "{stderr}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_dim-ab"));
    let stderr = failure(command.args(["launch", "--", "/nonexistent/program"]), 1);
    assert!(stderr.contains("/nonexistent/program"), "{stderr}");
}

#[test]
fn what_cannot_be_measured_is_refused_before_it_starts() {
    let (cut, other) = (Cut::tiny("qwen2"), Cut::tiny("llama"));
    let out = tempfile::tempdir().unwrap();
    let mut command = ab(&cut, out.path(), &[]);
    let stderr = failure(command.arg("--split").arg(&other.split), 2);
    assert!(stderr.contains("is not the model that was cut: its parameters are others"), "{stderr}");
    // one of the same size, trained otherwise
    let twin = Cut::new(&Spec::tiny("qwen2").unwrap().seed(99), &["1..2"]);
    let size = |cut: &Cut| std::fs::metadata(&cut.model).unwrap().len();
    assert_eq!(size(&cut), size(&twin));
    let mut command = ab(&cut, out.path(), &[]);
    let stderr = failure(command.arg("--split").arg(&twin.split), 2);
    assert!(stderr.contains("is not the model that was cut: its weights are others"), "{stderr}");
    assert!(stderr.contains("hint: ") && !stderr.contains("panicked"), "{stderr}");
    let stderr =
        failure(&mut ab(&cut, out.path(), &["--worker", "127.0.0.1:1", "--worker", "127.0.0.1:2"]), 2);
    assert!(stderr.contains("2 workers for 1 middles"), "{stderr}");
    let stderr = failure(&mut ab(&cut, out.path(), &["--memory-limit", "12G"]), 2);
    assert!(stderr.contains("12GB"), "{stderr}");
    if !cfg!(feature = "rpc") {
        let stderr = failure(&mut ab(&cut, out.path(), &["--baseline", "rpc"]), 2);
        assert!(stderr.contains("GGML_RPC=ON"), "{stderr}");
    }
    assert!(!out.path().join("results.jsonl").exists());
}

/// llama.cpp's RPC backend beside the split, on the same blocks' count and the same link.
#[test]
#[cfg(feature = "rpc")]
fn the_rpc_backend_gives_the_tokens_of_stock() {
    let cut = Cut::tiny("qwen2");
    let out = tempfile::tempdir().unwrap();
    let arguments =
        ["--baseline", "solo,rpc", "--rounds", "1", "-n", "12", "--prompt-tokens", "40", "--link", "1:inf"];
    let records = records(&mut ab(&cut, out.path(), &arguments), out.path());
    let of = |arm| records.iter().filter(move |r| r.arm == arm);
    for record in of(Arm::Rpc) {
        assert_eq!(record.not_counted, None);
        assert_eq!(tokens(record), tokens(of(Arm::Solo).next().unwrap()));
        // the weights of two blocks crossed the link, at every start
        let up = record.link_traffic.unwrap().bytes_up;
        let of_split = of(Arm::Split).next().unwrap().link_traffic.unwrap().bytes_up;
        assert!(up > 4 * of_split, "{up} bytes for RPC, {of_split} for the split");
    }
}

/// `dim-host eval` for `cut` on `text`.
fn eval(cut: &Cut, file: &Path, worker: &str, more: &[&str]) -> Command {
    let mut command = Command::new(host_program());
    command.arg("eval").arg("--text").arg(file).arg("--split").arg(&cut.split).args(["--worker", worker]);
    command.arg("--key-file").arg(&cut.key).args(["--threads", "1", "--ctx", "512"]).args(more);
    command
}

fn evaluation(command: &mut Command) -> Evaluation {
    let output = command.arg("--json").output().unwrap();
    assert!(output.status.success(), "{command:?}\n{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn write_text(folder: &Path) -> PathBuf {
    let file = folder.join("text.txt");
    std::fs::write(&file, common::PROMPT.repeat(3)).unwrap();
    file
}

#[test]
fn eval_sees_no_difference_where_there_is_none_and_a_small_one_where_it_is_small() {
    // one that begins every text with a token of its own, and one that does not
    for arch in ["llama", "qwen2"] {
        let cut = Cut::tiny(arch);
        let file = write_text(cut.folder.path());
        let worker = cut.worker(1);
        let against = cut.model.to_str().unwrap();
        let found =
            evaluation(&mut eval(&cut, &file, &worker.address, &["--against", against, "--window", "128"]));
        let names: Vec<&str> = found.engines.iter().map(|e| e.name.as_str()).collect();
        assert_eq!(names, ["stock", "split f16", "split f32"], "without --wire both are measured");
        let (stock, f16, f32) = (&found.engines[0], &found.engines[1], &found.engines[2]);
        for engine in &found.engines {
            assert_eq!(engine.rows as usize, found.tokens - 1, "every token but the first is guessed once");
            assert!(engine.perplexity > 1.0 && engine.perplexity_error > 0.0, "{engine:?}");
        }
        assert!(stock.difference.is_none());
        let exact = f32.difference.unwrap();
        assert_eq!(
            (exact.equal_rows, exact.max_abs, exact.kl_max, exact.top1),
            (f32.rows, 0.0, 0.0, 1.0),
            "{arch}"
        );
        assert_eq!(f32.perplexity, stock.perplexity);
        let close = f16.difference.unwrap();
        assert!(close.max_abs > 0.0 && close.equal_rows < close.rows, "F16 rows changed nothing: {close:?}");
        assert!(close.kl_mean < 1e-3 && close.top1 > 0.95, "{arch}: {close:?}");
    }
}

/// Another model is refused, and the comparison sees its weights.
#[test]
fn eval_refuses_another_model_and_would_see_it() {
    let cut = Cut::tiny("qwen2");
    let other = cut.folder.path().join("other.gguf");
    Spec::tiny("qwen2").unwrap().seed(99).write(&other).unwrap();
    let file = write_text(cut.folder.path());
    let worker = cut.worker(1);
    let more =
        ["--against", other.to_str().unwrap(), "--wire", "f32", "--max-tokens", "100", "--window", "64"];
    let stderr = failure(&mut eval(&cut, &file, &worker.address, &more), 2);
    assert!(stderr.contains("other.gguf is not the model that was cut: its weights are others"), "{stderr}");
    // whoever insists sees how different they are
    let more = [&more[..], &["--verify", "never"]].concat();
    let found = evaluation(&mut eval(&cut, &file, &worker.address, &more));
    assert_eq!((found.tokens, found.engines.len()), (100, 2));
    let difference = found.engines[1].difference.unwrap();
    assert!(
        difference.kl_mean > 0.1 && difference.top1 < 0.5 && difference.equal_rows == 0,
        "{difference:?}"
    );
}

#[test]
fn eval_refuses_what_it_cannot_evaluate() {
    let cut = Cut::tiny("qwen2");
    let file = write_text(cut.folder.path());
    let stderr = failure(&mut eval(&cut, &file, "127.0.0.1:1", &["--window", "512"]), 2);
    assert!(stderr.contains("--window 512") && stderr.contains("--ctx"), "{stderr}");
    let stderr =
        failure(&mut eval(&cut, Path::new("/nonexistent/text"), "127.0.0.1:1", &["--window", "64"]), 2);
    assert!(stderr.contains("/nonexistent/text"), "{stderr}");
    std::fs::write(&file, [0x61, 0xff]).unwrap();
    let stderr = failure(&mut eval(&cut, &file, "127.0.0.1:1", &["--window", "64"]), 2);
    assert!(stderr.contains("UTF-8"), "{stderr}");
}

/// What docs/RESULTS.md shows is what its records say, and no more.
#[test]
fn the_record_in_the_documents_is_made_from_its_records() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let has_records = std::fs::read_dir(docs.join("results"))
        .is_ok_and(|dir| dir.flatten().any(|e| e.path().extension().is_some_and(|x| x == "jsonl")));
    let mut command = Command::new(host_program());
    command.arg("report").arg(docs.join("results")).arg("--into").arg(docs.join("RESULTS.md")).arg("--check");
    if has_records {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        return;
    }
    let results = std::fs::read_to_string(docs.join("RESULTS.md")).unwrap();
    let generated = results.split(dim_ab::report::BEGIN).nth(1).unwrap();
    let generated = generated.split(dim_ab::report::END).next().unwrap();
    assert!(!generated.contains('|'), "there are tables without records");
    failure(&mut command, 2);
}

#[test]
fn the_worker_beside_the_host_is_the_one_that_is_started() {
    assert_eq!(worker_program(), host_program().with_file_name("dim-worker"));
}

#[test]
fn what_dim_host_hands_on_is_dim_ab_s_own_with_its_help_and_its_exit_code() {
    let run = |program: &Path, arguments: &[&str]| Command::new(program).args(arguments).output().unwrap();
    let laboratory = host_program().with_file_name("dim-ab");
    for subcommand in ["ab", "eval", "report"] {
        let (handed_on, own) =
            (run(host_program(), &[subcommand, "--help"]), run(&laboratory, &[subcommand, "--help"]));
        assert_eq!((handed_on.status.code(), own.status.code()), (Some(0), Some(0)), "{subcommand}");
        assert_eq!(text(&handed_on.stdout), text(&own.stdout), "{subcommand}");
        assert!(text(&own.stdout).contains("Usage: dim-ab"), "{}", text(&own.stdout));
        // misuse is clap's 2, through the other program
        assert_eq!(
            run(host_program(), &[subcommand, "--no-such-option"]).status.code(),
            Some(2),
            "{subcommand}"
        );
    }
}

#[test]
fn without_dim_ab_beside_it_dim_host_says_what_is_missing() {
    let alone = tempfile::tempdir().unwrap();
    let host = alone.path().join("dim-host");
    std::fs::copy(host_program(), &host).unwrap();
    let stderr = failure(Command::new(&host).args(["report", "x"]), 1);
    assert!(stderr.contains("dim-ab") && stderr.contains("cargo build -p dim-ab"), "{stderr}");
}
