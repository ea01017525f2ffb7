//! `dim-host demo` as `make demo` runs it: into a pipe, with random weights, and with trained ones where they are.

mod common;

use std::path::Path;
use std::process::Command;

use common::{failure, host_program, real_model, run, text};

/// The demo in a temporary folder of its own, so that what it leaves is seen.
fn demo(scratch: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(host_program());
    command.arg("demo").args(arguments).env("TMPDIR", scratch);
    command
}

/// What it prints, once it has ended well and left nothing.
fn printed(scratch: &Path, command: &mut Command) -> String {
    let output = run(command);
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    assert_eq!(text(&output.stderr), "", "lines for a terminal, or warnings");
    let page = text(&output.stdout);
    assert!(!page.contains(['\u{1b}', '\r']), "{page}");
    assert_eq!(std::fs::read_dir(scratch).unwrap().count(), 0, "the model was left behind");
    println!("{page}");
    page
}

#[test]
fn without_a_model_it_says_so_and_compares_all_the_same() {
    let scratch = tempfile::tempdir().unwrap();
    let empty = tempfile::tempdir().unwrap();
    let mut command = demo(scratch.path(), &["-n", "16"]);
    command.env_remove("DIM_REAL_MODEL").env("XDG_CACHE_HOME", empty.path());
    let page = printed(scratch.path(), &mut command);
    for line in ["random weights, because", "$ dim-synth", "$ dim-split", "$ dim-worker", "blocks 4..7"] {
        assert!(page.contains(line), "no {line:?} in\n{page}");
    }
    assert!(page.contains("All 48 tokens are those of stock llama.cpp."), "{page}");
}

/// Where `.ci/model` has fetched it; `make test` says where it has not.
#[test]
fn with_the_model_it_answers() {
    if real_model().is_none() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let page = printed(scratch.path(), &mut demo(scratch.path(), &[]));
    assert!(page.contains("you> What is the capital of France?") && page.contains("Paris"), "{page}");
    assert!(page.contains("$ dim-dequantise") && page.contains("blocks 10..19"), "{page}");
    assert!(page.contains("are those of stock llama.cpp."), "{page}");
}

#[test]
fn what_it_cannot_do_is_one_line_and_leaves_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let missing = failure(&mut demo(scratch.path(), &["--model", "missing.gguf"]), 2);
    assert!(missing.contains("missing.gguf"), "{missing}");
    let cut = failure(&mut demo(scratch.path(), &["--shape", "demo", "--middle", "9..99"]), 1);
    assert!(cut.contains("dim-split") && cut.contains("99"), "{cut}");
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
}
