//! Workers that are lost in the middle of a reply, in every way there is: the reply is the same, or there is one clear
//! error; the loss is noticed in time, and the worker is not dialled as fast as the machine can.
//!
//! ```text
//!     dim-host --- way (counts bytes, breaks at one of them, notes when) --- dim-worker
//! ```
//!
//! `make faults` (DIM_FAULTS=1) runs as many of each as the table of docs/TESTING.md says; every run of the tests a few.
#![cfg(target_os = "linux")]

#[path = "common/mod.rs"]
mod common;
#[path = "way/mod.rs"]
mod way;

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Cut, Numbers, Undisturbed, Worker, signal};
use dim::host::report::Report;
use gguf_tools::synth::Spec;
use way::{Break, Way};

/// Longer than the 3 s after which a silent peer is lost.
const SILENCE: Duration = Duration::from_millis(4500);

/// What happens to a worker.
#[derive(Clone, Copy, PartialEq)]
enum Loss {
    Kill,
    Way(Break),
    Stop,
    /// killed, and started again with something else
    Other(Restart),
}

#[derive(Clone, Copy, PartialEq)]
enum Restart {
    Slice,
    Model,
    Context,
    Rows,
}

/// Every way to lose one: its name, how many are tried, and whether anybody's system says so.
const LOSSES: [(&str, Loss, usize, bool); 13] = [
    ("kill -9, started again", Loss::Kill, 100, true),
    ("cut", Loss::Way(Break::Cut), 25, true),
    ("reset", Loss::Way(Break::Reset), 25, true),
    ("cut, and others answer five dials", Loss::Way(Break::Impostor), 25, true),
    ("half-closed", Loss::Way(Break::HalfClose), 25, true),
    ("a flipped byte to the host", Loss::Way(Break::Flip), 25, true),
    ("a flipped byte to the worker", Loss::Way(Break::FlipBack), 25, true),
    ("the way stands still", Loss::Way(Break::Stall), 25, false),
    ("kill -STOP", Loss::Stop, 25, false),
    ("started again with another slice", Loss::Other(Restart::Slice), 25, true),
    ("started again with another model", Loss::Other(Restart::Model), 25, true),
    ("started again with less context", Loss::Other(Restart::Context), 25, true),
    ("started again with smaller chunks", Loss::Other(Restart::Rows), 25, true),
];

/// What they are lost from.
struct Scene {
    cut: Cut,
    other_slice: Cut,
    other_model: Cut,
    undisturbed: Undisturbed,
}

/// What became of one reply.
struct Outcome {
    is_same: bool,
    /// why it is neither the same nor one clear error
    wrong: Option<String>,
    error: Option<String>,
    noticed: Option<Duration>,
    most_dials_in_a_second: usize,
}

impl Scene {
    fn new() -> Scene {
        let cut = Cut::tiny("qwen2");
        Scene {
            undisturbed: Undisturbed::of(&cut),
            other_slice: Cut::new(&Spec::tiny("qwen2").unwrap(), &["1..1"]),
            other_model: Cut::new(&Spec::tiny("qwen2").unwrap().seed(2), &["1..2"]),
            cut,
        }
    }

    fn restart(&self, at: &str, with: Restart) -> Worker {
        let Scene { cut, other_slice, other_model, .. } = self;
        match with {
            Restart::Slice => Worker::start_at(at, &other_slice.slice(1), &cut.key, &[]),
            Restart::Model => Worker::start_at(at, &other_model.slice(1), &cut.key, &[]),
            Restart::Context => Worker::start_at(at, &cut.slice(1), &cut.key, &["--ctx", "256"]),
            Restart::Rows => Worker::start_at(at, &cut.slice(1), &cut.key, &["--ubatch", "16"]),
        }
    }

    /// Loses a worker somewhere in a reply.
    fn lose(&self, loss: Loss, numbers: &mut Numbers) -> Outcome {
        let mut worker = self.cut.worker(1);
        let way = Way::to(&worker.address);
        let Undisturbed { report: expected, before, bytes } = &self.undisturbed;
        let at = before + 400 + numbers.below(bytes - 600);
        let (pid, address) = (worker.pid(), worker.address.clone());
        way.arm(
            at,
            match loss {
                Loss::Way(how) => how,
                Loss::Kill | Loss::Other(_) => Break::Kill(pid),
                Loss::Stop => Break::Stop(pid),
            },
        );
        let mut command = self.cut.generate(&[&way.address()], &Undisturbed::OPTIONS);
        let host = Running::start(&mut command);
        assert!(way.wait_until_broken(), "the reply ended before it broke");
        match loss {
            Loss::Kill => {
                worker.kill();
                worker = Worker::start_at(&address, &self.cut.slice(1), &self.cut.key, &[]);
            }
            Loss::Other(with) => {
                worker.kill();
                worker = self.restart(&address, with);
            }
            Loss::Way(Break::Stall) => {
                std::thread::sleep(SILENCE);
                way.mend();
            }
            Loss::Stop => {
                std::thread::sleep(SILENCE);
                signal(pid, "CONT");
            }
            Loss::Way(_) => {}
        }
        let broken = way.broken_at().unwrap();
        let outcome = host.finish(broken, expected);
        drop(worker);
        Outcome { most_dials_in_a_second: way.most_dials_in_a_second(broken), ..outcome }
    }

    /// `n` of a kind, several beside each other where they mostly wait.
    fn lose_all(&self, loss: Loss, n: usize, is_told: bool) -> Vec<Outcome> {
        let (next, outcomes) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for _ in 0..if is_told { 1 } else { 2 } {
                scope.spawn(|| {
                    loop {
                        let trial = next.fetch_add(1, Ordering::Relaxed);
                        if trial >= n {
                            return;
                        }
                        let outcome = self.lose(loss, &mut Numbers(1000 + trial as u64));
                        outcomes.lock().unwrap().push(outcome);
                    }
                });
            }
        });
        outcomes.into_inner().unwrap()
    }
}

/// A host, and when it said what.
struct Running {
    child: std::process::Child,
    stdout: std::thread::JoinHandle<Vec<u8>>,
    stderr: std::thread::JoinHandle<Vec<(Instant, String)>>,
}

impl Running {
    fn start(command: &mut Command) -> Running {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        let stdout = std::thread::spawn(move || {
            let mut all = Vec::new();
            out.read_to_end(&mut all).unwrap();
            all
        });
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let timed = move || lines.map_while(Result::ok).map(|line| (Instant::now(), line)).collect();
        Running { child, stdout, stderr: std::thread::spawn(timed) }
    }

    fn finish(mut self, broken: Instant, expected: &Report) -> Outcome {
        let status = self.child.wait().unwrap();
        let (stdout, said) = (self.stdout.join().unwrap(), self.stderr.join().unwrap());
        let noticed =
            said.iter().find(|(at, line)| *at >= broken && (line.contains("lost") || line.contains("broke")));
        let noticed = noticed.map(|(at, _)| *at - broken);
        let errors: Vec<&String> =
            said.iter().map(|(_, line)| line).filter(|line| line.starts_with("error: ")).collect();
        let got: Option<Report> = serde_json::from_slice(&stdout).ok();
        let is_same = status.success() && got.is_some_and(|got| got.tokens == expected.tokens);
        let panicked = said.iter().any(|(_, line)| line.contains("panicked"));
        let is_clear = matches!(status.code(), Some(1 | 2)) && errors.len() == 1 && !panicked;
        let wrong = (!is_same && !is_clear).then(|| format!("{status}: {said:?}"));
        let error = errors.first().map(|line| (*line).clone());
        Outcome { is_same, wrong, error, noticed, most_dials_in_a_second: 0 }
    }
}

/// The outcomes of a kind: its line of the table, and what is not as it has to be.
fn judge(name: &str, is_told: bool, outcomes: &[Outcome]) -> (String, Vec<String>) {
    let n = outcomes.len();
    let same = outcomes.iter().filter(|o| o.is_same).count();
    let mut wrong: Vec<String> = outcomes.iter().filter_map(|o| o.wrong.clone()).collect();
    let clear = n - same - wrong.len();
    let mut noticed: Vec<u128> = outcomes.iter().filter_map(|o| o.noticed).map(|d| d.as_millis()).collect();
    noticed.sort_unstable();
    let at = |share: f64| noticed.get((noticed.len() as f64 * share) as usize).or(noticed.last()).copied();
    let (p50, p99) = (at(0.5).unwrap_or(0), at(0.99).unwrap_or(0));
    let dials = outcomes.iter().map(|o| o.most_dials_in_a_second).max().unwrap_or(0);
    if dials > 5 {
        wrong.push(format!("{name}: dialled {dials} times in a second"));
    }
    if p99 > if is_told { 1000 } else { 3100 } {
        wrong.push(format!("{name}: noticed after {p99} ms"));
    }
    (format!("| {name} | {n} | {same} | {clear} | {p50} ms | {p99} ms | {dials} |"), wrong)
}

/// A few of each, in every run of the tests. What a loaded machine notices late is nobody's fault here.
#[test]
fn a_worker_lost_in_any_way_changes_no_token_or_is_one_clear_error() {
    let scene = Scene::new();
    for (name, loss, _, is_told) in LOSSES {
        for outcome in scene.lose_all(loss, 2, is_told) {
            assert!(outcome.wrong.is_none(), "{name}: {:?}", outcome.wrong);
            let has_other = matches!(loss, Loss::Other(_));
            assert!(outcome.is_same || has_other, "{name}: it could have gone on: {:?}", outcome.error);
            let names_it =
                |error: &String| error.contains("rows at once now") && error.contains("a micro-batch of 48");
            assert!(
                outcome.is_same
                    || loss != Loss::Other(Restart::Rows)
                    || outcome.error.as_ref().is_some_and(names_it),
                "{name}: {:?}",
                outcome.error
            );
            let dials = outcome.most_dials_in_a_second;
            assert!((1..=5).contains(&dials), "{name}: {dials} dials in a second");
        }
    }
}

/// All of them: `make faults`.
#[test]
fn the_table_of_losses() {
    if !common::makes_tables() {
        return;
    }
    let scene = Scene::new();
    let mut table = String::from(
        "Workers that are lost\n| what happens to the worker | times | reply identical | one clear error | noticed, p50 | p99 | dials in a second, most |\n\
         |---|---:|---:|---:|---:|---:|---:|\n",
    );
    let mut wrong = Vec::new();
    for (name, loss, n, is_told) in LOSSES {
        let (line, bad) = judge(name, is_told, &scene.lose_all(loss, n, is_told));
        println!("{line}");
        writeln!(table, "{line}").unwrap();
        wrong.extend(bad);
    }
    common::leave_table("2-losses", &table);
    assert!(wrong.is_empty(), "{wrong:#?}");
}
