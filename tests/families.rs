//! What people run this month, as a user runs it: a worker in a process of its own, a socket, encryption, the head and the
//! tail here. A tiny random model of each family, prompt in chunks, 32 steps, and the worker killed in the middle of the
//! reply: the logits behind every token are stock llama.cpp's, bit for bit.
//!
//! llama-sys-patch/tests/architectures.rs has every architecture that llama.cpp names, in one process.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use common::{Worker, failure, host_program, key_file, worker_program, write_with};
use dim::{Event, Host, Key, Resources, RowType, Sampling, Session, WholeModel};
use gguf_tools::ask::Ask;
use gguf_tools::failure::Explained as _;
use gguf_tools::gguf::{Gguf, Value};
use gguf_tools::manifest::Manifest;
use gguf_tools::plan::{Plan, PlanError, Request};
use gguf_tools::split::split;
use llama_sys_patch::test_support;

const MIDDLE: &str = "3..5";
const N_PROMPT: usize = 40;
const N_STEPS: usize = 32;
/// The step before which the worker is killed.
const KILLED_AT: usize = 10;

/// Chunks of 16 rows: the prompt has three.
const SMALL: Resources =
    Resources { n_ctx: 128, n_threads: Some(1), n_ubatch: 16, gpu_layers: Some(0), snapshots: 0 };

/// A family: its name, llama.cpp's name of it, the blocks that leave, and what its tiny model wants beyond the usual keys of its kind.
struct Family(&'static str, &'static str, &'static str, &'static [&'static str]);

const fn family(arch: &'static str) -> Family {
    Family(arch, arch, MIDDLE, &[])
}

const FAMILIES: &[Family] = &[
    family("llama"),
    family("qwen35"),
    family("qwen35moe"),
    family("qwen3next"),
    family("gemma2"),
    family("gemma3"),
    family("gemma4"),
    family("gpt-oss"),
    family("deepseek2"),
    family("glm4moe"),
    family("nemotron_h_moe"),
    family("minimax-m2"),
    family("llama4"),
    family("lfm2"),
    family("granitehybrid"),
    family("mamba"),
    family("qwen3vl"),
    // its last block predicts further tokens, and is in no slice
    Family("glm4moe with MTP", "glm4moe", "3..4", &[".nextn_predict_layers=1"]),
    // more than the hidden row crosses
    family("gemma3n"),
    Family(
        "gemma4 as E4B",
        "gemma4",
        "1..3",
        &[".attention.shared_kv_layers=2", ".embedding_length_per_layer_input=64"],
    ),
    family("rwkv7"),
    family("talkie"),
    // token ids are read beside the rows
    Family("deepseek4", "deepseek4", "1..3", &[]),
];

/// A tiny model, cut in three, and a key.
struct Cut {
    folder: tempfile::TempDir,
    middle: PathBuf,
    key: PathBuf,
}

impl Cut {
    fn new(&Family(_, arch, middle, options): &Family) -> Cut {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("m.gguf");
        let options = [&test_support::options(arch)[..], options].concat();
        test_support::write_model(arch, test_support::N_BLOCKS, &options, &model).unwrap();
        let gguf = Gguf::open(&model).unwrap();
        let middles = vec![middle.parse().unwrap()];
        let request = Request { middles, stem: "m".into(), ..Request::default() };
        split(&Plan::new(&gguf, &request).unwrap(), folder.path(), "m", |_| {}).unwrap();
        let key = key_file(folder.path());
        let middle = folder.path().join(format!("m.middle-{middle}.gguf"));
        Cut { folder, middle, key }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn worker(&self, listen: &str) -> Worker {
        self.worker_with(listen, 0)
    }

    fn worker_with(&self, listen: &str, snapshots: u32) -> Worker {
        let snapshots = snapshots.to_string();
        let more = ["--ctx", "128", "--ubatch", "16", "--gpu-layers", "0", "--snapshots", &snapshots];
        Worker::start_at(listen, &self.middle, &self.key, &more)
    }
}

/// Tokens that look like nothing in particular, the same every time.
fn prompt(n_vocab: usize) -> Vec<i32> {
    let mut numbers = common::Numbers(7);
    (0..N_PROMPT).map(|_| numbers.below(n_vocab as u64) as i32).collect()
}

/// Greedy, whatever the tokens say: each, and the logits behind it; `before` is told which step comes.
fn run(session: &mut Session, prompt: &[i32], mut before: impl FnMut(usize)) -> Vec<(i32, Vec<u32>)> {
    session.push_tokens(prompt).unwrap();
    let mut generation = session.generate(Sampling::greedy()).ignore_eos(true).limit(Some(N_STEPS));
    let mut out = Vec::new();
    for step in 0..N_STEPS {
        before(step);
        let token = generation.next().expect("there is room").unwrap();
        out.push((token.id, generation.logits().iter().map(|x| x.to_bits()).collect()));
    }
    out
}

/// What went wrong with a family, if anything.
fn check(family: &Family) -> Result<(), String> {
    let (cut, arch) = (Cut::new(family), family.0);
    let whole = WholeModel::open(&cut.file("m.gguf"), &SMALL, false, |_| {}).unwrap();
    let prompt = prompt(whole.model().n_vocab());
    let expected = run(&mut whole.session().unwrap(), &prompt, |_| {});

    let mut worker = Some(cut.worker("127.0.0.1:0"));
    let address = worker.as_ref().unwrap().address.clone();
    let host = Host::open(cut.file("m.split.json")).unwrap().resources(SMALL).wire(RowType::F32);
    let host = host.worker(&address, Key::from_file(&cut.key).unwrap());
    let host = host.connect(|_| {}).map_err(|e| format!("{arch}: {e}"))?;
    let mut session = host.session().unwrap();
    let got = run(&mut session, &prompt, |step| {
        if step == KILLED_AT {
            worker.take().unwrap().kill();
            worker = Some(cut.worker(&address));
        }
    });
    drop(session);
    drop(host);
    // that the comparison can fail: with F16 rows the logits are others
    let host = Host::open(cut.file("m.split.json")).unwrap().resources(SMALL).wire(RowType::F16);
    let host = host.worker(&address, Key::from_file(&cut.key).unwrap()).connect(|_| {}).unwrap();
    let rounded = run(&mut host.session().unwrap(), &prompt, |_| {});
    if rounded == expected {
        return Err(format!("{arch}: F16 rows change nothing"));
    }
    match got.iter().zip(&expected).position(|(a, b)| a != b) {
        Some(step) => Err(format!("{arch}: other logits at step {step}")),
        None => Ok(()),
    }
}

/// Late blocks that read the keys of earlier ones: where such a model can be cut, what crosses there, and what is said
/// where it cannot.
#[test]
fn a_cut_that_is_not_possible_is_refused_with_the_nearest_one() {
    let e4b = FAMILIES.iter().find(|family| family.0 == "gemma4 as E4B").unwrap();
    let cut = Cut::new(e4b);
    let gguf = Gguf::open(cut.file("m.gguf")).unwrap();
    let cuts = Ask::Here.cuts(&gguf).unwrap();
    let possible: Vec<u32> = (1..8).filter(|&block| cuts.cuts[block as usize - 1].is_ok()).collect();
    assert_eq!(possible, [1, 2, 3, 4], "{cuts:?}");
    // the hidden row, and the inputs of each block behind the cut
    let crossing = cuts.cuts[0].as_ref().unwrap();
    assert_eq!(crossing.bytes_f32(), 4 * (256 + 7 * 64), "{crossing}");
    let why = cuts.cuts[5].as_ref().unwrap_err();
    assert!(why.sentence.contains("blocks 6..7") && why.sentence.contains("of block"), "{why:?}");
    assert!(why.short.starts_with("the blocks from there to 7 read the "), "{why:?}");
    for (middle, nearest) in [("3..5", "3..3"), ("5..6", "3..3"), ("1..6", "1..3")] {
        let request =
            Request { middles: vec![middle.parse().unwrap()], stem: "m".into(), ..Request::default() };
        let error = Plan::new(&gguf, &request).unwrap_err();
        assert!(matches!(error, PlanError::Needs { .. }) && error.is_misuse(), "{error:?}");
        assert!(error.to_string().contains("cannot be evaluated apart: they read"), "{error}");
        assert_eq!(error.hint().unwrap(), format!("the nearest range is {nearest}"), "{middle}");
    }
    let manifest = Manifest::read(cut.file("m.split.json")).unwrap();
    assert_eq!(manifest.model.memory.as_deref(), Some("KV cache with sliding windows"));
    assert_eq!(manifest.slices[1].input, *crossing);
}

/// Which middles have a canary: all that read no token ids, whatever crosses their two ends.
#[test]
fn middles_that_read_no_token_ids_have_a_canary() {
    for family in FAMILIES {
        let cut = Cut::new(family);
        let manifest = Manifest::read(cut.file("m.split.json")).unwrap();
        let middle = &manifest.slices[1];
        assert_eq!(middle.canary.is_some(), !middle.reads_tokens, "{}", family.0);
    }
}

/// Blocks that predict further tokens are in no slice, and that is said.
#[test]
fn blocks_that_predict_are_left_out() {
    let mtp = FAMILIES.iter().find(|family| family.0 == "glm4moe with MTP").unwrap();
    let cut = Cut::new(mtp);
    let gguf = Gguf::open(cut.file("m.gguf")).unwrap();
    let middles = vec!["3..4".parse().unwrap()];
    let plan = Plan::new(&gguf, &Request { middles, stem: "m".into(), ..Request::default() }).unwrap();
    assert_eq!(plan.n_blocks, 7);
    assert!(plan.left_out.predicting.iter().eq(&[7]) && plan.left_out.predicting_bytes > 0);
    assert_eq!(plan.left_out.unread, [""; 0]);
    let held: u64 = plan.slices.iter().map(|slice| slice.weight_bytes).sum();
    assert_eq!(held + plan.left_out.predicting_bytes, gguf.tensor_bytes());
}

/// The page that says so.
#[test]
fn the_page_of_models_names_these_families() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/MODELS.md")).unwrap();
    let names: Vec<&str> = FAMILIES.iter().map(|family| family.0).collect();
    let says = format!("(`tests/families.rs`): {}.", names.join(", "));
    assert!(page.contains(&says), "docs/MODELS.md does not say: {says}");
}

#[test]
fn families_over_processes_are_exact_and_survive_their_worker() {
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(family) = FAMILIES.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let begun = std::time::Instant::now();
                    if let Err(why) = check(family) {
                        wrong.lock().unwrap().push(why);
                    }
                    println!("{}: {:.1} s", family.0, begun.elapsed().as_secs_f64());
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A conversation whose next turn does not begin with the one before: what a recurrent state cannot take back is evaluated
/// anew.
#[test]
fn a_recurrent_session_is_taken_back_by_evaluating_it_anew() {
    for arch in ["qwen35", "mamba", "granitehybrid"] {
        let cut = Cut::new(&family(arch));
        let whole = WholeModel::open(&cut.file("m.gguf"), &SMALL, false, |_| {}).unwrap();
        let tokens = prompt(whole.model().n_vocab());
        let other: Vec<i32> = tokens[..20].iter().chain(&tokens[25..]).copied().collect();
        let worker = cut.worker("127.0.0.1:0");
        let host = Host::open(cut.file("m.split.json")).unwrap().resources(SMALL).wire(RowType::F32);
        let host = host.worker(&worker.address, Key::from_file(&cut.key).unwrap());
        let host = host.connect(|_| {}).unwrap();
        let mut session = host.session().unwrap();
        let mut turn = |tokens: &[i32]| -> Vec<i32> {
            session.set_tokens(tokens).unwrap();
            session.generate(Sampling::greedy()).ignore_eos(true).take(8).map(|t| t.unwrap().id).collect()
        };
        let (_, got) = (turn(&tokens), turn(&other));
        // the same in a session that never saw the first
        let fresh: Vec<i32> = {
            let mut session = whole.session().unwrap();
            session.push_tokens(&other).unwrap();
            session.generate(Sampling::greedy()).ignore_eos(true).take(8).map(|t| t.unwrap().id).collect()
        };
        assert_eq!(got, fresh, "{arch}");
        // stock llama.cpp's session can be taken back, too
        let mut stock = whole.session().unwrap();
        let mut turn = |tokens: &[i32]| -> Vec<i32> {
            stock.set_tokens(tokens).unwrap();
            stock.generate(Sampling::greedy()).ignore_eos(true).take(8).map(|t| t.unwrap().id).collect()
        };
        let (_, again) = (turn(&tokens), turn(&other));
        assert_eq!(again, fresh, "{arch}, stock");
    }
}

/// Tokens of the last chunk are taken back by snapshots: one step follows, not the whole prompt. The logits are, bit for
/// bit, those of a session that came there by being evaluated anew, and they survive a worker that is lost behind it.
#[test]
fn tokens_that_snapshots_reach_are_taken_back_by_them() {
    for (arch, snapshots) in [("qwen35", 3), ("lfm2", 3), ("nemotron_h_moe", 3), ("mamba", 0)] {
        let cut = Cut::new(&family(arch));
        let resources = Resources { snapshots: 3, ..SMALL };
        let mut worker = Some(cut.worker_with("127.0.0.1:0", 3));
        let address = worker.as_ref().unwrap().address.clone();
        let told = Arc::new(Mutex::new(Vec::new()));
        let host = Host::open(cut.file("m.split.json")).unwrap().resources(resources).wire(RowType::F32);
        let host = host.worker(&address, Key::from_file(&cut.key).unwrap());
        let hears = Arc::clone(&told);
        let hear = move |event| {
            if let Event::Snapshots { snapshots, cache_bytes, .. } = event {
                hears.lock().unwrap().push((snapshots, cache_bytes > 0));
            }
        };
        let host = host.connect(hear).unwrap();
        assert_eq!(*told.lock().unwrap(), [(snapshots, true); 2], "{arch}: head and tail");

        let mut session = host.session().unwrap();
        let whole = WholeModel::open(&cut.file("m.gguf"), &SMALL, false, |_| {}).unwrap();
        let tokens = prompt(whole.model().n_vocab());
        // the third chunk has the tokens from 32 on
        let other = [&tokens[..N_PROMPT - 2], &[1]].concat();
        let mut replies = |first: usize, mut before: Box<dyn FnMut(usize) + '_>| {
            session.set_tokens(&[]).unwrap();
            turn(&mut session, &tokens, first, |_| {});
            turn(&mut session, &other, 6, &mut before)
        };
        let (by_snapshot, trips) = replies(1, Box::new(|_| {}));
        let expected = if snapshots > 0 { 6 } else { 6 + 3 };
        assert_eq!(trips, expected, "{arch}: a step for each token, or the prompt again");
        // with a reply behind the chunk, what snapshots reach is not that chunk any more
        let (anew, trips) = replies(4, Box::new(|_| {}));
        assert_eq!(trips, 6 + 3, "{arch}");
        assert!(anew == by_snapshot, "{arch}: other bits by the other way");
        let (lost, _) = replies(
            1,
            Box::new(|step| {
                if step == 2 {
                    worker.take().unwrap().kill();
                    worker = Some(cut.worker_with(&address, 3));
                }
            }),
        );
        assert!(lost == by_snapshot, "{arch}: other bits after a lost worker");
    }
}

/// Makes these a session's tokens and generates `n` more: the bits of the logits behind each, and the steps it took.
fn turn(
    session: &mut Session,
    tokens: &[i32],
    n: usize,
    mut before: impl FnMut(usize),
) -> (Vec<Vec<u32>>, u64) {
    session.set_tokens(tokens).unwrap();
    let mut generation = session.generate(Sampling::greedy()).ignore_eos(true).limit(Some(n));
    let mut logits = Vec::new();
    for step in 0..n {
        before(step);
        generation.next().expect("there is room").unwrap();
        logits.push(generation.logits().iter().map(|x| x.to_bits()).collect());
    }
    (logits, generation.report(Instant::now()).wire.round_trips)
}

/// A key that llama.cpp answers by ending the process: in a model and in a slice of one. Every program that is given the
/// file says so in one line, and lives.
#[test]
fn a_file_that_llama_cpp_does_not_survive_is_one_error() {
    let cut = Cut::new(&family("gemma3"));
    let spoilt = |from: &Path, name: &str| {
        let path = cut.file(name);
        write_with(from, &path, "gemma3.expert_count", Some(Value::U32(5000)));
        path
    };
    let (model, middle) = (spoilt(&cut.file("m.gguf"), "bad.gguf"), spoilt(&cut.middle, "bad-middle.gguf"));
    let mut stock = Command::new(host_program());
    stock.args(["stock", "-p", "x", "--model"]).arg(&model);
    let mut worker = Command::new(worker_program());
    worker.arg(&middle).args(["--verify", "never", "--listen", "127.0.0.1:0", "--key-file"]).arg(&cut.key);
    for (command, file) in [(&mut stock, &model), (&mut worker, &middle)] {
        let says = failure(command.env("XDG_CACHE_HOME", cut.folder.path()), 2);
        let error = says.lines().find(|line| line.starts_with("error: ")).unwrap();
        assert!(error.contains(&file.display().to_string()), "{says}");
        assert!(error.contains("GGML_ASSERT") && error.contains("SIGABRT"), "{says}");
        assert!(!error.contains("/llama.cpp/"), "a folder of whoever built it: {says}");
        assert!(says.contains("hint: "), "{says}");
    }
}

/// Not only where llama.cpp would notice: what it loads of a slice computes nonsense.
#[test]
fn a_slice_is_not_taken_for_the_model() {
    let cut = Cut::new(&family("gemma3"));
    let mut command = Command::new(host_program());
    let says = failure(command.args(["stock", "-p", "x", "--model"]).arg(&cut.middle), 2);
    assert!(says.contains("slice") && says.contains("hint: "), "{says}");
}
