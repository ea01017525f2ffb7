//! `dim-worker --fetch`: a worker makes its slice from where the model came from, and serves it.

mod common;
#[path = "../gguf-tools/tests/common/hub.rs"]
mod server;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Cut, Worker, failure, report, worker_program};
use gguf_tools::gguf::Gguf;
use gguf_tools::hub::{self, HubName, Patience, Settings};
use gguf_tools::plan::{Plan, Request};
use gguf_tools::split::split;
use server::{Fault, Hub, REPO};

/// A hub with this model, and its cut as `dim-split hf:...` makes it, in a folder of its own: the manifest.
fn fetched(cut: &Cut, folder: &Path) -> (Hub, PathBuf) {
    let hub = Hub::start();
    hub.add("model.gguf", std::fs::read(&cut.model).unwrap());
    let cache = folder.join("cache");
    let settings =
        Settings { endpoint: hub.endpoint.clone(), cache, token: None, patience: Patience::default() };
    let place = HubName::parse(&format!("hf:{REPO}")).unwrap();
    let model = hub::fetch(&settings, &place, &mut |_, _, _| {}).unwrap();
    let gguf = Gguf::open(&model.path).unwrap();
    let middles = vec!["1..2".parse().unwrap()];
    let source = Some(model.source);
    let request = Request { middles, stem: "model".into(), source, ..Request::default() };
    split(&Plan::new(&gguf, &request).unwrap(), folder, "model", |_| {}).unwrap();
    (hub, folder.join("model.split.json"))
}

/// `dim-worker --fetch`, asking this hub.
fn worker(hub: &Hub, manifest: &Path, slice: &Path, key: &Path) -> Command {
    let mut command = Command::new(worker_program());
    command.arg("--fetch").arg(manifest).arg(slice).arg("--key-file").arg(key);
    command.args(["--listen", "127.0.0.1:0", "--threads", "1", "--ctx", "512"]);
    command.env("HF_ENDPOINT", &hub.endpoint).env("HF_HOME", slice.with_file_name("home"));
    command.env_remove("HF_TOKEN").env_remove("HF_TOKEN_PATH");
    command
}

#[test]
fn a_worker_makes_its_slice_by_its_own_bytes_and_serves_it() {
    let cut = Cut::tiny("llama");
    let folder = tempfile::tempdir().unwrap();
    let (hub, manifest) = fetched(&cut, folder.path());
    let plain = report(&mut cut.generate(&[&cut.worker(1).address], &["-n", "8", "--temp", "0"]));

    let before = hub.sent();
    hub.fail([Fault::Cut(10_000)]);
    let slice = folder.path().join("mine.gguf");
    let own = Worker::spawn(&mut worker(&hub, &manifest, &slice, &cut.key));
    let moved = hub.sent() - before;
    let (made, was_cut) = (std::fs::read(&slice).unwrap(), std::fs::read(cut.slice(1)).unwrap());
    assert!(made == was_cut, "not the slice that was cut");
    assert!(moved > 0 && moved as f64 <= 1.02 * made.len() as f64, "{moved} bytes for {}", made.len());
    let served = report(&mut cut.generate(&[&own.address], &["-n", "8", "--temp", "0"]));
    assert_eq!(served.tokens, plain.tokens);
    drop(own);

    // the second time it is there
    let again = Worker::spawn(&mut worker(&hub, &manifest, &slice, &cut.key));
    assert!(again.stderr().contains("is there already"), "{}", again.stderr());
    assert_eq!(hub.sent() - before, moved);
}

#[test]
fn a_manifest_without_a_source_is_one_sentence() {
    let cut = Cut::tiny("llama");
    let folder = tempfile::tempdir().unwrap();
    let slice = folder.path().join("mine.gguf");
    let hub = Hub::start();
    let stderr = failure(&mut worker(&hub, &cut.split, &slice, &cut.key), 2);
    assert!(stderr.contains("does not say where the model came from"), "{stderr}");
    assert!(stderr.contains("hint: cut it with dim-split hf:ORG/REPO"), "{stderr}");
    assert!(!slice.exists());
    let mut other = worker(&hub, &cut.split, &slice, &cut.key);
    let stderr = failure(other.args(["--middle", "1..1"]), 2);
    assert!(stderr.contains("no such middle: it has 1..2"), "{stderr}");
    assert!(stderr.contains("hint: name one with --middle A..B"), "{stderr}");
}
