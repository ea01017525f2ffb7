//! Files that are wrong in any way: `dim-split`, `dim-worker` and `dim-host stock` end with one error or do their work.
//!
//! A model's keys and tensors are dropped, added, given another type, size or value, or made a list of one a block, in all
//! architectures that `dim-synth` makes. No program may end by a signal or a panic, hang, or leave a file behind that is
//! not whole. What `dim-split` accepts, its worker has to load: what has not been able to be loaded does not end 0.
#![cfg(unix)]

mod common;

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::Duration;

use common::{Numbers, host_program, key_file, seed, signal, text, worker_program};
use gguf_tools::gguf::write::{GgufWriter, TensorSpec};
use gguf_tools::gguf::{Array, Gguf, TensorType, Value};
use gguf_tools::synth::{FAMILIES, Spec};

/// Nothing here takes as long.
const HANGS: Duration = Duration::from_secs(60);
const BLOCKS: u32 = 4;
/// Files that are tried at once: much of a try is waiting for processes to begin and to end.
const WORKERS: usize = 4;

/// What is changed.
const KINDS: [&str; 9] = [
    "a key dropped",
    "a key added",
    "a key of another type",
    "a key of another value",
    "a list of one a block",
    "a tensor dropped",
    "a tensor added",
    "a tensor of another type",
    "a tensor of another size",
];

/// Numbers of blocks, heads and widths: they may be lists.
const PER_BLOCK: [&str; 5] = [
    "attention.head_count",
    "attention.head_count_kv",
    "feed_forward_length",
    "attention.key_length",
    "attention.sliding_window_pattern",
];

/// Keys below the architecture's name that llama.cpp reads of some model.
const KNOWN: [&str; 20] = [
    "vocab_size",
    "expert_count",
    "expert_used_count",
    "expert_group_count",
    "expert_shared_count",
    "nextn_predict_layers",
    "attention.sliding_window",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_indices",
    "rope.dimension_count",
    "rope.dimension_sections",
    "leading_dense_block_count",
    "pooling_type",
    "logit_scale",
    "attention.causal",
    "ssm.conv_kernel",
    "ssm.state_size",
    "rope.scaling.factor",
    "full_attention_interval",
];

fn edge(rng: &mut Numbers) -> u32 {
    let edges = [0, 1, 2, 3, 4, 7, 8, 16, 31, 64, 127, 256, 513, 1 << 16, 1 << 31, u32::MAX];
    edges[rng.below(edges.len() as u64) as usize]
}

fn any_value(rng: &mut Numbers) -> Value<'static> {
    match rng.below(9) {
        0 => Value::U32(edge(rng)),
        1 => Value::I32(edge(rng) as i32),
        2 => Value::U64(u64::from(edge(rng)) << 31),
        3 => Value::F32([0.0, -1.0, 1e-38, 1e38, f32::NAN, f32::INFINITY][rng.below(6) as usize]),
        4 => Value::Bool(rng.below(2) == 1),
        5 => Value::string(["", "llama", "gpt2", "yarn", "\u{1b}[2J"][rng.below(5) as usize]),
        6 => Value::Array(Array::of_i32(vec![edge(rng) as i32; rng.below(8) as usize])),
        7 => Value::Array(Array::of_strings(vec![b"x".to_vec(); rng.below(4) as usize])),
        _ => Value::U8(edge(rng) as u8),
    }
}

/// A model that can be written with a change.
struct Mutant<'a> {
    arch: &'a str,
    metadata: Vec<(String, Value<'a>)>,
    tensors: Vec<(TensorSpec, Vec<u8>)>,
}

impl<'a> Mutant<'a> {
    fn of(arch: &'a str, model: &'a Gguf) -> Mutant<'a> {
        let metadata = model.metadata().map(|e| (e.key.to_owned(), e.value)).collect();
        let tensors = model
            .tensors()
            .map(|t| (TensorSpec::new(t.name(), t.tensor_type(), t.dims()), t.data().unwrap().to_vec()));
        Mutant { arch, metadata, tensors: tensors.collect() }
    }

    fn set(&mut self, key: &str, value: Value<'a>) {
        let key = format!("{}.{key}", self.arch);
        self.metadata.retain(|(k, _)| *k != key);
        self.metadata.push((key, value));
    }

    /// The tensor has other contents: what there is over and over, as long as it has to be.
    fn refill(&mut self, at: usize) {
        let (spec, data) = &mut self.tensors[at];
        let n = spec.n_bytes().unwrap_or(0).min(1 << 20) as usize;
        *data = data.iter().copied().cycle().take(n).collect();
    }

    fn change(&mut self, kind: &str, rng: &mut Numbers) {
        let key = rng.below(self.metadata.len() as u64) as usize;
        let tensor = rng.below(self.tensors.len() as u64) as usize;
        match kind {
            "a key dropped" => drop(self.metadata.remove(key)),
            "a key added" => {
                let name = KNOWN[rng.below(KNOWN.len() as u64) as usize];
                self.set(name, any_value(rng));
            }
            "a key of another type" => self.metadata[key].1 = any_value(rng),
            "a key of another value" => match &self.metadata[key].1 {
                Value::U32(_) => self.metadata[key].1 = Value::U32(edge(rng)),
                Value::F32(_) => {
                    let edges = [0.0, -1.0, 1e-38, 1e38, 1e4, f32::NAN];
                    self.metadata[key].1 = Value::F32(edges[rng.below(6) as usize]);
                }
                Value::Bool(b) => self.metadata[key].1 = Value::Bool(!b),
                Value::String(_) => self.metadata[key].1 = Value::string("another"),
                _ => self.metadata[key].1 = any_value(rng),
            },
            "a list of one a block" => {
                let name = PER_BLOCK[rng.below(PER_BLOCK.len() as u64) as usize];
                let n = [BLOCKS, BLOCKS, BLOCKS - 1, BLOCKS + 1][rng.below(4) as usize];
                let items: Vec<i32> = (0..n).map(|_| [0, 1, 2, 4, 64, -1][rng.below(6) as usize]).collect();
                self.set(name, Value::Array(Array::of_i32(items)));
            }
            "a tensor dropped" => drop(self.tensors.remove(tensor)),
            "a tensor added" => {
                let (mut spec, data) = self.tensors[tensor].clone();
                let names =
                    ["attn_rot_embd", "attn_q.bias", "ffn_up.scale", "attn_norm_2.weight", "nobody_s"];
                spec.name = format!("blk.{}.{}", rng.below(5), names[rng.below(5) as usize]);
                if self.tensors.iter().all(|(s, _)| s.name != spec.name) {
                    self.tensors.push((spec, data));
                }
            }
            "a tensor of another type" => {
                let types =
                    [TensorType::F32, TensorType::F16, TensorType::BF16, TensorType::Q8_0, TensorType::Q4_0];
                self.tensors[tensor].0.tensor_type = types[rng.below(5) as usize];
                self.refill(tensor);
            }
            _ => {
                let dims = &mut self.tensors[tensor].0.dims;
                let at = rng.below(dims.len() as u64) as usize;
                dims[at] = [1, dims[at] * 2, dims[at] / 2, dims[at] + 32][rng.below(4) as usize].max(1);
                self.refill(tensor);
            }
        }
    }

    /// `false`: the format has no such file.
    fn write(&self, to: &Path) -> bool {
        let specs: Vec<TensorSpec> = self.tensors.iter().map(|(spec, _)| spec.clone()).collect();
        let Ok(mut writer) = GgufWriter::create(to, &self.metadata, &specs) else { return false };
        self.tensors.iter().all(|(_, data)| writer.write(data).is_ok()) && writer.finish().is_ok()
    }
}

/// A folder for temporary files, one for what is cut, and one for everything that is kept of the user.
struct Scene {
    dir: tempfile::TempDir,
    key: PathBuf,
}

impl Scene {
    fn new() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let key = key_file(dir.path());
        for folder in ["tmp", "home", "out"] {
            std::fs::create_dir(dir.path().join(folder)).unwrap();
        }
        Scene { dir, key }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn files(&self, folder: &str) -> Vec<String> {
        let names = std::fs::read_dir(self.at(folder)).unwrap().flatten();
        names.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Removes what a program has left.
    fn clear(&self) {
        for folder in ["tmp", "out"] {
            for name in self.files(folder) {
                let _ = std::fs::remove_file(self.at(folder).join(name));
            }
        }
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env("TMPDIR", self.at("tmp"))
            .env("HOME", self.at("home"))
            .env("XDG_CACHE_HOME", self.at("home"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// What is wrong with how the programs take the model, if anything is; whether it was cut.
    fn judge(&self, model: &Path) -> Result<bool, String> {
        let split = host_program().with_file_name("dim-split");
        let mut cut = self.command(&split);
        cut.arg(model).args(["--middle", "1..2", "--out"]).arg(self.at("out"));
        let is_cut = self.end_of("dim-split", &mut cut)?;
        let written = self.files("out");
        if let Some(middle) = written.iter().find(|name| name.contains(".middle-")).filter(|_| is_cut) {
            self.serves(&self.at("out").join(middle))?;
        } else if !written.is_empty() {
            return Err(format!("dim-split left {written:?}"));
        }
        for name in written {
            std::fs::remove_file(self.at("out").join(name)).unwrap();
        }
        let mut stock = self.command(host_program());
        stock.arg("stock").arg("--model").arg(model);
        stock.args(["-p", "a", "-n", "2", "--ctx", "64", "--threads", "1"]);
        self.end_of("dim-host stock", &mut stock)?;
        match self.files("tmp") {
            left if left.is_empty() => Ok(is_cut),
            left => Err(format!("temporary files left: {left:?}")),
        }
    }

    /// Whether it succeeded.
    fn end_of(&self, name: &str, command: &mut Command) -> Result<bool, String> {
        let output = within(command.spawn().unwrap()).ok_or_else(|| format!("{name} hangs"))?;
        judge_end(name, &output)
    }

    /// A worker listens with the slice. A middle that cannot be asked anything may be refused, in words.
    fn serves(&self, slice: &Path) -> Result<(), String> {
        let mut command = self.command(worker_program());
        command.arg(slice).arg("--key-file").arg(&self.key);
        command.args(["--listen", "127.0.0.1:0", "--threads", "1", "--ctx", "64"]);
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        if line.starts_with("listening on ") {
            let _ = child.kill();
            let _ = child.wait();
            return Ok(());
        }
        let output = within(child).ok_or("dim-worker hangs")?;
        judge_end("dim-worker", &output)?;
        Err(format!("dim-worker does not take what dim-split has cut: {}", text(&output.stderr)))
    }
}

/// What it said and how it ended; `None`: it had to be ended.
fn within(child: Child) -> Option<Output> {
    let pid = child.id();
    let (to, ended) = channel();
    std::thread::spawn(move || to.send(child.wait_with_output()));
    let in_time = ended.recv_timeout(HANGS);
    if in_time.is_err() {
        signal(pid, "KILL");
        let _ = ended.recv_timeout(HANGS);
    }
    in_time.ok().map(Result::unwrap)
}

fn judge_end(name: &str, output: &Output) -> Result<bool, String> {
    let said = text(&output.stderr);
    if let Some(signal) = output.status.signal() {
        return Err(format!("{name} ended by signal {signal}: {said}"));
    }
    if said.contains("panicked") || said.contains('\u{1b}') {
        return Err(format!("{name} said {said:?}"));
    }
    let n_errors = said.lines().filter(|line| line.starts_with("error: ")).count();
    match (output.status.code(), n_errors) {
        (Some(0), 0) => Ok(true),
        (Some(1 | 2), 1) => Ok(false),
        (code, n) => Err(format!("{name} ended with {code:?} and {n} errors: {said}")),
    }
}

/// How often each kind was cut and refused, and what was wrong.
fn try_mutants(n: usize, seed: u64) -> ([[u32; 2]; KINDS.len()], Vec<String>) {
    let scene = Scene::new();
    let models: Vec<(&str, Gguf)> = FAMILIES
        .iter()
        .map(|family| {
            let path = scene.at(&format!("{}.gguf", family.arch));
            Spec::tiny(family.arch).unwrap().blocks(BLOCKS).write(&path).unwrap();
            (family.arch, Gguf::open(&path).unwrap())
        })
        .collect();
    assert!(models.len() >= 20, "{} architectures", models.len());
    let drawn = Mutex::new((0, Numbers(seed)));
    let found = Mutex::new(([[0; 2]; KINDS.len()], Vec::new()));
    // which mutants there are does not depend on who tries them
    let draw = |to: &Path| {
        let (tried, rng) = &mut *drawn.lock().unwrap();
        while *tried < n {
            // each kind and each architecture comes as often as the others
            let kind = *tried % KINDS.len();
            let (arch, gguf) = &models[*tried / KINDS.len() % models.len()];
            let mut mutant = Mutant::of(arch, gguf);
            mutant.change(KINDS[kind], rng);
            if mutant.write(to) {
                *tried += 1;
                if *tried % 1000 == 0 {
                    eprintln!("{tried} of {n}");
                }
                return Some((kind, *arch));
            }
        }
        None
    };
    let work = || {
        let scene = Scene::new();
        let path = scene.at("mutant.gguf");
        while let Some((kind, arch)) = draw(&path) {
            let judged = scene.judge(&path);
            let (counts, wrong) = &mut *found.lock().unwrap();
            match judged {
                Ok(is_cut) => counts[kind][usize::from(!is_cut)] += 1,
                Err(why) => {
                    let kept = std::env::temp_dir().join(format!("dim-mutant-{seed}-{}.gguf", wrong.len()));
                    std::fs::copy(&path, &kept).unwrap();
                    wrong.push(format!("{arch}, {}, kept as {}: {why}", KINDS[kind], kept.display()));
                    scene.clear();
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(work);
        }
    });
    found.into_inner().unwrap()
}

#[test]
fn wrong_files_end_no_program_and_leave_nothing_behind() {
    let n = std::env::var("DIM_MUTANTS").ok().and_then(|s| s.parse().ok()).unwrap_or(9 * 24);
    let (counts, wrong) = try_mutants(n, seed());
    println!("cut and refused, of each kind: {counts:?}");
    assert!(wrong.is_empty(), "{} of {n}:\n{}", wrong.len(), wrong.join("\n"));
    let of = |i: usize| counts.iter().map(|kind| kind[i]).sum::<u32>();
    assert!(of(0) > 0 && of(1) > 0, "{counts:?}");
}

#[test]
fn the_table_of_mutants() {
    if !common::makes_tables() {
        return;
    }
    let (n, seed) = (20_000, 7);
    let (counts, wrong) = try_mutants(n, seed);
    let mut table = format!(
        "Files that are wrong\n{n} files of {} architectures, drawn from seed {seed}, through `dim-split`, `dim-worker` and `dim-host stock`: {} ended a \
         program by a signal or a panic, hung it, or left a file.\n\n| changed | cut, and served | refused |\n|---|---:|---:|\n",
        FAMILIES.len(),
        wrong.len(),
    );
    for (kind, [cut, refused]) in KINDS.iter().zip(counts) {
        writeln!(table, "| {kind} | {cut} | {refused} |").unwrap();
    }
    common::leave_table("3-mutants", &table);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
