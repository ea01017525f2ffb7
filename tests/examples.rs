//! The examples as their reader runs them: a worker inside another program, and a host that uses it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use gguf_tools::gguf::Gguf;
use gguf_tools::plan::{Plan, Request};
use gguf_tools::split::split;
use gguf_tools::synth::Spec;

/// An example of this package: `cargo test` builds them beside the tests.
fn example(name: &str) -> Command {
    let here = std::env::current_exe().unwrap();
    let target = here.parent().and_then(|deps| deps.parent()).unwrap();
    let path: PathBuf = target.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(path.is_file(), "{} is missing: cargo build --release --examples", path.display());
    Command::new(path)
}

#[test]
fn a_host_and_a_worker_inside_another_program_continue_a_text() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    Spec::tiny("qwen2").unwrap().write(file("m.gguf")).unwrap();
    let model = Gguf::open(file("m.gguf")).unwrap();
    let middles = vec!["1..2".parse().unwrap()];
    let request = Request { middles, stem: "m".into(), ..Request::default() };
    split(&Plan::new(&model, &request).unwrap(), folder.path(), "m", |_| {}).unwrap();
    std::fs::write(file("key"), "5a".repeat(32)).unwrap();

    let mut worker = example("worker");
    worker.arg(file("m.middle-1..2.gguf")).arg(file("key"));
    let mut worker = worker.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(worker.stdout.take().unwrap()).lines().map_while(Result::ok);
    let first = said.next().unwrap_or_default();
    let address = first.strip_prefix("listening on ").expect("the worker says where it listens").to_owned();

    let generate = |more: &[&str]| {
        let mut command = example("generate");
        command.arg(file("m.split.json")).arg("The capital of France is").args(more);
        let output = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{stderr}");
        (String::from_utf8(output.stdout).unwrap(), stderr)
    };
    let key = file("key").display().to_string();
    let (remote, told) = generate(&[&address, &key]);
    assert!(told.contains(&format!("blocks 1..2 {address}")), "{told}");
    // the same text as without a worker, and one that was not there before
    let (local, told) = generate(&[]);
    assert!(told.contains("blocks 1..2 here"), "{told}");
    assert_eq!(remote, local);
    assert!(remote.trim().chars().count() > 16, "{remote:?}");

    // the program around the worker has gone on with its own work, and ends with its input
    let mut stdin = worker.stdin.take().unwrap();
    writeln!(stdin, "hello").unwrap();
    drop(stdin);
    assert_eq!(said.collect::<Vec<_>>(), ["you said: hello", "hosts served: 1"]);
    assert!(worker.wait().unwrap().success());
}
