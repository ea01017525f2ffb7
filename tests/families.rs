//! What people run this month, as a user runs it: a worker in a process of its own, a socket, encryption, the head and the
//! tail here. A tiny random model of each family, prompt in chunks, 32 steps, and the worker killed in the middle of the
//! reply: the logits behind every token are stock llama.cpp's, bit for bit.
//!
//! llama-sys-patch/tests/architectures.rs has every architecture that llama.cpp names, in one process.

mod common;

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Worker, failure, host_program};
use dim::{Host, Key, Resources, RowType, Sampling, Session, WholeModel};
use gguf_tools::gguf::Gguf;
use gguf_tools::plan::{Plan, Request};
use gguf_tools::split::split;
use llama_sys_patch::test_support;

const N_BLOCKS: u32 = 8;
const MIDDLE: &str = "3..5";
const N_PROMPT: usize = 40;
const N_STEPS: usize = 32;
/// The step before which the worker is killed.
const KILLED_AT: usize = 10;

/// Chunks of 16 rows: the prompt has three.
const SMALL: Resources = Resources { n_ctx: 128, n_threads: Some(1), n_ubatch: 16, gpu_layers: Some(0) };

/// Families, with what their tiny models want beyond the usual keys.
const FAMILIES: &[(&str, &[&str])] = &[
    ("llama", &[]),
    ("qwen35", &[]),
    ("qwen35moe", &[]),
    ("qwen3next", &[]),
    ("gemma2", &[]),
    ("gemma3", &[]),
    ("gemma4", &[]),
    ("gpt-oss", &[]),
    ("deepseek2", &[]),
    ("glm4moe", &[]),
    ("nemotron_h_moe", &[]),
    ("minimax-m2", &[]),
    ("llama4", &[]),
    ("lfm2", &[]),
    ("granitehybrid", &[]),
    ("mamba", &[]),
    ("qwen3vl", &[]),
];

/// A tiny model, cut in three, and a key.
struct Cut {
    folder: tempfile::TempDir,
    key: PathBuf,
}

impl Cut {
    fn new(arch: &str, options: &[&str]) -> Cut {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("m.gguf");
        test_support::write_model(arch, N_BLOCKS, options, &model).unwrap();
        let gguf = Gguf::open(&model).unwrap();
        let middles = vec![MIDDLE.parse().unwrap()];
        let request = Request { middles, stem: "m".into(), ..Request::default() };
        split(&Plan::new(&gguf, &request).unwrap(), folder.path(), "m", |_| {}).unwrap();
        let key = folder.path().join("key");
        std::fs::write(&key, "5a".repeat(32)).unwrap();
        Cut { folder, key }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn middle(&self) -> PathBuf {
        self.file(&format!("m.middle-{MIDDLE}.gguf"))
    }

    fn worker(&self, listen: &str) -> Worker {
        let more = ["--ctx", "128", "--ubatch", "16", "--gpu-layers", "0"];
        Worker::start_at(listen, &self.middle(), &self.key, &more)
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
fn check(arch: &str, options: &[&str]) -> Result<(), String> {
    let cut = Cut::new(arch, options);
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
    match got.iter().zip(&expected).position(|(a, b)| a != b) {
        Some(step) => Err(format!("{arch}: other logits at step {step}")),
        None => Ok(()),
    }
}

#[test]
fn families_over_processes_are_exact_and_survive_their_worker() {
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((arch, options)) = FAMILIES.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let begun = std::time::Instant::now();
                    if let Err(why) = check(arch, options) {
                        wrong.lock().unwrap().push(why);
                    }
                    println!("{arch}: {:.1} s", begun.elapsed().as_secs_f64());
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Not only where llama.cpp would notice: what it loads of a slice computes nonsense.
#[test]
fn a_slice_is_not_taken_for_the_model() {
    let cut = Cut::new("gemma3", &[]);
    let mut command = std::process::Command::new(host_program());
    let says = failure(command.args(["stock", "-p", "x", "--model"]).arg(cut.middle()), 2);
    assert!(says.contains("slice") && says.contains("hint: "), "{says}");
}
