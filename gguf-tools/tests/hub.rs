//! The hub, as a server of the tests plays it: whole and right whatever breaks on the way, and nothing believed.
#![cfg(feature = "hub")]

#[path = "common/hub.rs"]
mod server;

use std::{
    fs,
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

use gguf_tools::{
    digest::Sha,
    failure::Explained,
    hub::{self, HubError, HubName, Outcome, Patience, Settings, Token},
    manifest::Manifest,
    synth::Spec,
};
use server::{COMMIT, Fault, Hub, REPO};

fn settings(hub: &Hub, cache: &Path) -> Settings {
    let patience = Patience {
        connect: Duration::from_secs(2),
        answer: Duration::from_millis(700),
        stall: Duration::from_millis(800),
        tries: 4,
        pause: Duration::from_millis(2),
        longest_wait: Duration::from_secs(5),
    };
    Settings {
        endpoint: hub.endpoint.clone(),
        cache: cache.to_owned(),
        token: Token::new("hf_secret").unwrap(),
        patience,
    }
}

fn bytes(n: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut out = Vec::with_capacity(n + 8);
    while out.len() < n {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(n);
    out
}

/// A hub with one file, and an empty cache.
fn one_file(n: usize) -> (Hub, tempfile::TempDir, Vec<u8>) {
    let (hub, data) = (Hub::start(), bytes(n));
    hub.add("m-Q8_0.gguf", data.clone());
    (hub, tempfile::tempdir().unwrap(), data)
}

fn fetch(hub: &Hub, cache: &Path) -> Result<hub::Fetched, HubError> {
    let place = HubName::parse(&format!("hf:{REPO}")).unwrap();
    hub::fetch(&settings(hub, cache), &place, &mut |_, _, _| {})
}

/// One sentence, with a way out where `hint` is part of it.
fn refused(result: Result<hub::Fetched, HubError>, why: &str, hint: &str) {
    let error = result.expect_err(why);
    let (text, way) = (error.to_string(), error.hint().unwrap_or_default().into_owned());
    assert!(text.contains(why) && !text.contains('\n'), "{text}");
    assert!(way.contains(hint), "{text}: {way}");
}

#[test]
fn two_hundred_megabytes_arrive_whole_over_ten_cuts_and_a_429() {
    let (hub, cache, data) = one_file(200_000_000);
    hub.fail((1..=5).map(|i| Fault::Cut(7_000_001 * i)));
    hub.fail([Fault::Status(429, Some("1"))]);
    hub.fail((1..=5).map(|i| Fault::Cut(3_000_017 * i)));
    let started = Instant::now();
    let fetched = fetch(&hub, cache.path()).unwrap();
    assert!(started.elapsed() >= Duration::from_secs(1), "the server asked for a second");
    assert!(hub.state.faults.lock().unwrap().is_empty(), "everything broke that should");
    assert!(fs::read(&fetched.path).unwrap() == data, "other bytes");
    // nothing came twice
    assert_eq!(hub.sent(), data.len() as u64);
    let source = &fetched.source.files[0];
    assert_eq!((source.bytes, &source.sha256), (data.len() as u64, &Sha::of(&data).to_string()));
}

#[test]
fn the_cache_is_laid_out_as_the_hub_s_own_tools_have_it() {
    let (hub, cache, data) = one_file(100_000);
    let fetched = fetch(&hub, cache.path()).unwrap();
    let folder = cache.path().join("models--org--model");
    assert_eq!(fetched.path, folder.join("snapshots").join(COMMIT).join("m-Q8_0.gguf"));
    assert_eq!(fs::read_to_string(folder.join("refs/main")).unwrap(), COMMIT);
    assert_eq!(fs::read(folder.join("blobs").join(Sha::of(&data).to_string())).unwrap(), data);
    #[cfg(unix)]
    assert!(fs::read_link(&fetched.path).unwrap().starts_with("../../blobs"));
    // and what is there is not fetched again
    let asked = hub.state.at_storage.lock().unwrap().len();
    assert_eq!(fetch(&hub, cache.path()).unwrap().path, fetched.path);
    assert_eq!(hub.state.at_storage.lock().unwrap().len(), asked);
}

#[test]
fn the_token_goes_to_the_hub_and_no_further() {
    let (hub, cache, _) = one_file(100_000);
    fetch(&hub, cache.path()).unwrap();
    let at_hub = hub.state.at_hub.lock().unwrap();
    assert!(at_hub.iter().all(|asked| asked.token.as_deref() == Some("Bearer hf_secret")), "{at_hub:?}");
    let at_storage = hub.state.at_storage.lock().unwrap();
    assert!(!at_storage.is_empty() && at_storage.iter().all(|asked| asked.token.is_none()), "{at_storage:?}");
}

#[test]
fn goes_on_where_another_run_stopped() {
    let (hub, cache, data) = one_file(3_000_000);
    hub.fail([Fault::Cut(1_000_000)]);
    hub.fail((0..4).map(|_| Fault::Cut(0)));
    refused(fetch(&hub, cache.path()), "failed 4 times in a row", "goes on");
    let before = hub.sent();
    let fetched = fetch(&hub, cache.path()).unwrap();
    assert!(fs::read(fetched.path).unwrap() == data);
    assert_eq!((before, hub.sent()), (1_000_000, 3_000_000));
}

#[test]
fn what_is_wrong_is_thrown_away_and_not_gone_on_with() {
    let (hub, cache, data) = one_file(300_000);
    hub.fail([Fault::Garbage]);
    refused(fetch(&hub, cache.path()), "SHA-256", "try again");
    assert!(fs::read(fetch(&hub, cache.path()).unwrap().path).unwrap() == data);
}

#[test]
fn each_refusal_is_one_sentence_with_the_way_out() {
    let (hub, cache, _) = one_file(100_000);
    let statuses = [
        (401, "does not take this token", "renew"),
        (403, "does not let this account", "accept its terms at http://127.0.0.1"),
        (404, "has no such thing", "spelling"),
        (418, "status 418", ""),
    ];
    for (status, why, hint) in statuses {
        *hub.state.refuses.lock().unwrap() = Some(status);
        refused(fetch(&hub, cache.path()), why, hint);
    }
    *hub.state.refuses.lock().unwrap() = Some(401);
    let nobody = Settings { token: None, ..settings(&hub, cache.path()) };
    let place = HubName::parse(&format!("hf:{REPO}")).unwrap();
    refused(hub::fetch(&nobody, &place, &mut |_, _, _| {}), "not there, or not for everybody", "HF_TOKEN");
    *hub.state.refuses.lock().unwrap() = None;
    hub.fail([Fault::Status(429, Some("86400"))]);
    refused(fetch(&hub, cache.path()), "left alone for 86400 s", "kept");
}

#[test]
fn nothing_a_server_says_is_believed() {
    let (hub, cache, data) = one_file(200_000);
    hub.fail([Fault::Size(1 << 60)]);
    refused(fetch(&hub, cache.path()), "another size", "");
    // a connection that dies, then a server that knows no ranges
    hub.fail([Fault::Cut(50_000), Fault::Whole]);
    refused(fetch(&hub, cache.path()), "cannot go on", "");
    for etag in ["../../../evil", "", "abc", &"G".repeat(64)] {
        *hub.state.etag.lock().unwrap() = Some(etag.to_owned());
        refused(fetch(&hub, cache.path()), "by no digest", "");
    }
    *hub.state.etag.lock().unwrap() = None;
    hub.fail([Fault::Endless]);
    assert!(fs::read(fetch(&hub, cache.path()).unwrap().path).unwrap() == data, "the end that was asked for");
}

#[test]
fn a_server_that_says_nothing_is_not_waited_for() {
    for fault in [Fault::Silence, Fault::Drip] {
        let (hub, cache, _) = one_file(200_000);
        hub.fail(std::iter::repeat_n(fault.clone(), 4));
        let started = Instant::now();
        refused(fetch(&hub, cache.path()), "failed 4 times in a row", "try again");
        assert!(started.elapsed() < Duration::from_secs(6), "{fault:?}");
    }
}

#[test]
fn a_name_never_leaves_the_cache() {
    let (hub, cache, _) = one_file(100_000);
    for name in ["../../evil.gguf", "/evil.gguf", "a/../../evil.gguf"] {
        *hub.state.listed.lock().unwrap() = vec![name.to_owned()];
        hub.state.files.lock().unwrap().clear();
        refused(fetch(&hub, cache.path()), "is no name of a file", "");
    }
    assert!(!cache.path().join("evil.gguf").exists());
}

#[test]
fn a_model_in_parts_comes_whole() {
    let hub = Hub::start();
    let cache = tempfile::tempdir().unwrap();
    for n in 1..=3 {
        hub.add(&format!("q8/m-Q8_0-{n:05}-of-00003.gguf"), bytes(10_000 * n));
    }
    let fetched = fetch(&hub, cache.path()).unwrap();
    assert_eq!(fetched.source.files.len(), 3);
    for (n, file) in (1..).zip(&fetched.source.files) {
        let path = fetched.path.with_file_name(file.name.rsplit('/').next().unwrap());
        assert!(fs::read(path).unwrap() == bytes(10_000 * n), "{}", file.name);
    }
    hub.state.files.lock().unwrap().pop_first();
    refused(fetch(&hub, cache.path()), "2 of the model's 3 parts", "name one");
}

/// Runs `dim-split hf:...` in `folder`, against this hub.
fn dim_split(hub: &Hub, folder: &Path, arguments: &[&str]) -> Output {
    dim_split_in(hub, folder, &std::env::temp_dir(), arguments)
}

/// The same, with its temporary files in `temporary`.
fn dim_split_in(hub: &Hub, folder: &Path, temporary: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dim-split"))
        .current_dir(folder)
        .env("HF_ENDPOINT", &hub.endpoint)
        .env("HF_HOME", folder.join("hf"))
        .env("TMPDIR", temporary)
        .env_remove("HF_HUB_CACHE")
        .env_remove("HF_TOKEN")
        .args(arguments)
        .output()
        .unwrap()
}

/// A hub with a tiny model, and the model.
fn tiny(folder: &Path) -> (Hub, Vec<u8>) {
    let path = folder.join("local.gguf");
    Spec::tiny("llama").unwrap().write(&path).unwrap();
    let (hub, data) = (Hub::start(), fs::read(&path).unwrap());
    hub.add("tiny-F16.gguf", data.clone());
    (hub, data)
}

#[test]
fn dim_split_cuts_what_it_fetched_and_a_slice_is_made_from_there_again() {
    let folder = tempfile::tempdir().unwrap();
    let (hub, _) = tiny(folder.path());
    let output = dim_split(&hub, folder.path(), &["hf:org/model:F16", "--middle", "1..2"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let manifest = Manifest::read(folder.path().join("tiny-F16.split.json")).unwrap();
    let source = manifest.model.source.as_ref().unwrap();
    assert_eq!((source.repo.as_str(), source.revision.as_str()), (REPO, COMMIT));

    let settings = settings(&hub, &folder.path().join("unused"));
    let entry = hub::middle(&manifest, None, "m").unwrap();
    let cut = fs::read(folder.path().join(&entry.file)).unwrap();
    let target = folder.path().join("again.gguf");
    let make = || hub::fetch_slice(&settings, &manifest, entry, &target, &mut |_, _, _| {});

    // cut off in the middle, given up, gone on with
    let before = hub.sent();
    hub.fail([Fault::Cut(40_000)]);
    hub.fail((0..4).map(|_| Fault::Cut(0)));
    assert!(matches!(make(), Err(HubError::Network { .. })) && !target.exists());
    // a tensor that is wrong where it lies is found by its digest, and comes once more
    hub.fail([Fault::Garbage]);
    assert!(make().is_err() && !target.exists());
    let wasted = hub.sent() - before;
    assert!(matches!(make().unwrap(), Outcome::Fetched { .. }));
    assert!(fs::read(&target).unwrap() == cut, "not the slice that was cut");
    assert_eq!(make().unwrap(), Outcome::Present);
    assert!(wasted > 0);

    // from nothing: its own bytes and no more
    fs::remove_file(&target).unwrap();
    let before = hub.sent();
    make().unwrap();
    let moved = hub.sent() - before;
    assert!(moved as f64 <= 1.02 * cut.len() as f64 && moved > 0, "{moved} bytes for {}", cut.len());
}

/// What a dry run tells stands in the header: nothing else is fetched, and nothing stays.
#[test]
fn a_dry_run_fetches_the_header_alone_and_says_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("big-F16.gguf");
    // a header of some megabytes: it takes more than one range
    Spec::tiny("llama").unwrap().vocab(100_000).write(&path).unwrap();
    let (hub, data) = (Hub::start(), fs::read(&path).unwrap());
    hub.add("big-F16.gguf", data.clone());
    let header = gguf_tools::gguf::Gguf::open(&path).unwrap().data_offset();
    assert!(header > 1 << 20 && data.len() as u64 > 4 * header, "{header} of {}", data.len());
    let temporary = tempfile::tempdir().unwrap();
    let run = |model: &str, arguments: &[&str]| {
        let arguments = [&[model, "--dry-run", "--json"], arguments].concat();
        let output = dim_split_in(&hub, folder.path(), temporary.path(), &arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        (output.stdout, String::from_utf8(output.stderr).unwrap())
    };
    for arguments in [&["--middle", "1..2"][..], &[]] {
        if arguments.is_empty() && !cfg!(feature = "engine") {
            continue;
        }
        let before = hub.sent();
        let (json, text) = run("hf:org/model", arguments);
        let moved = hub.sent() - before;
        assert!(moved >= header && moved < data.len() as u64 / 2, "{moved} bytes for a header of {header}");
        assert!(text.contains("its header was fetched"), "{text}");
        assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 0, "something is left");
        assert!(json == run(path.to_str().unwrap(), arguments).0, "another plan than that of the file");
    }
    assert!(!folder.path().join("hf/hub/models--org--model/blobs").exists(), "nothing in the cache");
    // what is all in the cache is looked at there
    assert!(dim_split(&hub, folder.path(), &["hf:org/model", "--middle", "1..2"]).status.success());
    let before = hub.sent();
    run("hf:org/model", &["--middle", "1..2"]);
    assert_eq!(hub.sent(), before);
}

#[test]
fn a_recipe_that_lies_makes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (hub, _) = tiny(folder.path());
    assert!(dim_split(&hub, folder.path(), &["hf:org/model", "--middle", "1..2"]).status.success());
    let manifest = Manifest::read(folder.path().join("tiny-F16.split.json")).unwrap();
    let settings = settings(&hub, &folder.path().join("unused"));
    let target = folder.path().join("lie.gguf");
    let make = |change: &dyn Fn(&mut Manifest)| {
        let mut manifest = manifest.clone();
        change(&mut manifest);
        let entry = manifest.slices[1].clone();
        // each lie from nothing
        let _ = fs::remove_file(folder.path().join(".lie.gguf.fetch-part"));
        let error = hub::fetch_slice(&settings, &manifest, &entry, &target, &mut |_, _, _| {}).unwrap_err();
        assert!(!target.exists(), "{error}");
        error.to_string()
    };
    let recipe = |change: &dyn Fn(&mut gguf_tools::recipe::Recipe)| {
        make(&|m| change(m.slices[1].recipe.as_mut().unwrap()))
    };
    assert!(make(&|m| m.model.source = None).contains("does not say where the model came from"));
    assert!(make(&|m| m.slices[1].recipe = None).contains("no recipe"));
    assert!(make(&|m| m.model.source.as_mut().unwrap().repo = "../..".into()).contains("no commit"));
    assert!(make(&|m| m.model.source.as_mut().unwrap().files[0].name = "../x".into()).contains("no files"));
    assert!(make(&|m| m.slices[1].bytes = 3).contains("longer than the slice"));
    assert!(make(&|m| m.slices[1].sha256 = "0".repeat(64)).contains("SHA-256"));
    assert!(recipe(&|r| r.header = "zz".into()).contains("not hex"));
    assert!(recipe(&|r| drop(r.pieces.pop())).contains("another number"));
    assert!(recipe(&|r| r.pieces[0].bytes += 1).contains("other tensors"));
    assert!(recipe(&|r| r.pieces[0].file = 9).contains("no file"));
    assert!(recipe(&|r| r.pieces[0].offset = u64::MAX - 4).contains("past the end"));
    // the right size from the wrong place
    assert!(!recipe(&|r| r.pieces[0].offset = 0).is_empty());
}

#[test]
fn dim_split_says_what_there_is() {
    let folder = tempfile::tempdir().unwrap();
    let (hub, _) = tiny(folder.path());
    hub.add("tiny-Q8_0.gguf", bytes(100));
    for (model, why) in
        [("hf:org/model", "2 models; there is tiny-F16.gguf, tiny-Q8_0.gguf"), ("hf:org", "ORG/REPO")]
    {
        let output = dim_split(&hub, folder.path(), &[model, "--middle", "1..2"]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(why) && stderr.contains("hint: "), "{stderr}");
    }
}
