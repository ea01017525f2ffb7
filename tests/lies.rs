//! Slices that say of themselves what is not so, and say it well: every field has the right form and agrees with the others.
//! Each is given to a worker that does not look at digests (`--verify never`), and a host asks that worker for a reply: it gets
//! the right tokens, or one error. Nothing dies of a signal, and no token is another one.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{key_file, worker_program};
use dim::{Host, Key, Patience, Resources, RowType, Sampling, Session, WholeModel};
use gguf_tools::gguf::absent::{self, Absent};
use gguf_tools::gguf::write::{GgufWriter, TensorSpec};
use gguf_tools::gguf::{Gguf, TensorType, Value};
use gguf_tools::manifest::Manifest;
use gguf_tools::plan::{Plan, Request};
use gguf_tools::slice::keys;
use gguf_tools::split::split;
use llama_sys_patch::test_support;

const SMALL: Resources =
    Resources { n_ctx: 64, n_threads: Some(1), n_ubatch: 16, gpu_layers: Some(0), snapshots: 0 };
const PROMPT: [i32; 6] = [5, 9, 2, 77, 31, 8];

/// A slice as it is written: keys, what it holds, what it says that it lacks.
struct Slice {
    keys: Vec<(String, Value<'static>)>,
    held: Vec<(String, TensorType, Vec<u64>, Vec<u8>)>,
    absent: Vec<Absent>,
}

impl Slice {
    fn read(path: &Path) -> Slice {
        let gguf = Gguf::open(path).unwrap();
        let keys = gguf.metadata().filter(|e| !e.key.starts_with("dim.absent."));
        let keys = keys.map(|e| (e.key.to_owned(), e.value.into_owned())).collect();
        let held = gguf
            .tensors()
            .map(|t| (t.name().to_owned(), t.tensor_type(), t.dims().to_vec(), t.data().unwrap().to_vec()))
            .collect();
        Slice { keys, held, absent: absent::read(&gguf).unwrap() }
    }

    fn write(&self, path: &Path) {
        let absent = absent::entries(&self.absent).map(|(key, value)| (key.to_owned(), value));
        let metadata: Vec<_> = self.keys.iter().cloned().chain(absent).collect();
        let spec = |(name, ty, dims, _): &(String, TensorType, Vec<u64>, Vec<u8>)| {
            TensorSpec::new(name.clone(), *ty, dims.clone())
        };
        let specs: Vec<_> = self.held.iter().map(spec).collect();
        let mut writer = GgufWriter::create(path, &metadata, &specs).unwrap();
        self.held.iter().for_each(|(.., bytes)| writer.write(bytes).unwrap());
        writer.finish().unwrap();
    }

    fn set(&mut self, key: &str, value: Value<'static>) {
        let entry = self.keys.iter_mut().find(|(name, _)| name == key).expect("a key of slices");
        entry.1 = value;
    }

    /// The bytes of one block's tensors become another's, where both are held and alike.
    fn exchange(&mut self, a: u32, b: u32) {
        let of = |name: &str, from: u32, to: u32| {
            name.strip_prefix(&format!("blk.{from}.")).map(|rest| format!("blk.{to}.{rest}"))
        };
        for i in 0..self.held.len() {
            let Some(other) = of(&self.held[i].0, a, b) else { continue };
            let j = self.held.iter().position(|held| held.0 == other).expect("blocks that are alike");
            let bytes = std::mem::take(&mut self.held[i].3);
            self.held[i].3 = std::mem::replace(&mut self.held[j].3, bytes);
        }
    }
}

/// A tiny model of 8 blocks, cut in three, and another one of the same shapes.
struct Cut {
    folder: tempfile::TempDir,
    key: PathBuf,
}

impl Cut {
    fn new(arch: &str) -> Cut {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("m.gguf");
        let options = test_support::options(arch);
        test_support::write_model(arch, test_support::N_BLOCKS, &options, &model).unwrap();
        let gguf = Gguf::open(&model).unwrap();
        for (middle, stem) in [("3..5", "m"), ("2..4", "other")] {
            let middles = vec![middle.parse().unwrap()];
            let request = Request { middles, stem: stem.into(), ..Request::default() };
            split(&Plan::new(&gguf, &request).unwrap(), folder.path(), stem, |_| {}).unwrap();
        }
        let key = key_file(folder.path());
        Cut { folder, key }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What a worker with this slice comes to: the tokens of a reply, or the error.
    fn outcome(&self, slice: &Path) -> Result<Vec<i32>, String> {
        let mut worker = Process::start(slice, &self.key);
        let Some(address) = worker.listens.clone() else { return Err(worker.ended()) };
        let patience = Patience { give_up_after: Duration::from_secs(5), ..Patience::default() };
        let host = Host::open(self.file("m.split.json")).unwrap().resources(SMALL).wire(RowType::F32);
        let host = host.worker(&address, Key::from_file(&self.key).unwrap()).patience(patience);
        let replied = host.connect(|_| {}).and_then(|host| reply(&mut host.session()?));
        let ended = worker.end();
        match replied {
            Ok(tokens) => Ok(tokens),
            // one whose worker has ended says less than the worker did
            Err(error) => Err(ended.unwrap_or_else(|| error.to_string())),
        }
    }
}

fn reply(session: &mut Session) -> Result<Vec<i32>, dim::Error> {
    session.push_tokens(&PROMPT)?;
    let tokens = session.generate(Sampling::greedy()).ignore_eos(true).limit(Some(8));
    tokens.map(|token| token.map(|token| token.id)).collect()
}

/// A worker that may end by itself.
struct Process {
    child: Child,
    listens: Option<String>,
}

impl Process {
    fn start(slice: &Path, key: &Path) -> Process {
        let mut command = Command::new(worker_program());
        command.arg(slice).args(["--verify", "never", "--listen", "127.0.0.1:0", "--threads", "1"]);
        command.args(["--ctx", "64", "--ubatch", "16", "--gpu-layers", "0", "--key-file"]).arg(key);
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let listens = line.trim().strip_prefix("listening on ").map(str::to_owned);
        Process { child, listens }
    }

    /// It has ended: its one error line.
    fn ended(&mut self) -> String {
        let status = self.child.wait().unwrap();
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error: ")).collect();
        assert!(matches!(status.code(), Some(1 | 2)), "{status}: {said}");
        assert!(errors.len() == 1 && !said.contains("panicked"), "{said}");
        errors[0].to_owned()
    }

    /// What it said if it has ended by itself; else it is ended.
    fn end(&mut self) -> Option<String> {
        let until = Instant::now() + Duration::from_millis(200);
        while Instant::now() < until {
            if self.child.try_wait().unwrap().is_some() {
                return Some(self.ended());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        None
    }
}

type Lie = (&'static str, fn(&mut Slice));

/// What `m.middle-3..5.gguf` is made to say, and what has to come of it: a part of the error; "" for the right tokens.
const LIES: &[(Lie, &str)] = &[
    (("nothing", |_| {}), ""),
    (("blocks 4 and 5 exchanged", |s| s.exchange(4, 5)), "come out wrong there"),
    (("other weights of the same shapes", other_weights), "come out wrong there"),
    (("another cut: of blocks 2..4", |s| blocks(s, 2, 4)), "blk."),
    (("another cut: of blocks 3..4", |s| blocks(s, 3, 4)), "blk."),
    (("another cut: of blocks 4..6", |s| blocks(s, 4, 6)), "blk."),
    (("a block more", |s| s.set(keys::MODEL_BLOCKS, Value::U32(9))), "9"),
    (("a tensor it should hold is absent", lacks_one), "blk.4."),
    (("absent tensors of another width in one block", narrow_block), "blk.0."),
    (("absent tensors of another width in all blocks", narrow_all), "blk."),
    (("an absent block's tensors are those of no block", |s| rename(s, "blk.0.", "blk.60.")), "blk."),
    (("an absent block is missing", |s| s.absent.retain(|a| !a.name.starts_with("blk.0."))), "blk.0."),
    (("absent tensors of another type", other_types), ""),
];

fn other_weights(slice: &mut Slice) {
    for (.., bytes) in &mut slice.held {
        let half = bytes.len() / 2;
        bytes.rotate_left(half / 4 * 4);
    }
}

fn blocks(slice: &mut Slice, first: u32, last: u32) {
    slice.set(keys::FIRST_BLOCK, Value::U32(first));
    slice.set(keys::LAST_BLOCK, Value::U32(last));
}

fn lacks_one(slice: &mut Slice) {
    let at = slice.held.iter().position(|held| held.0 == "blk.4.attn_norm.weight").expect("its norm");
    let (name, tensor_type, dims, _) = slice.held.remove(at);
    let mut padded = [1; 4];
    padded[..dims.len()].copy_from_slice(&dims);
    slice.absent.push(Absent { name, tensor_type, dims: padded });
}

fn narrow(slice: &mut Slice, of: impl Fn(&str) -> bool) {
    let width = slice.held.iter().find(|held| held.0.ends_with("attn_norm.weight")).expect("a norm").2[0];
    for absent in slice.absent.iter_mut().filter(|absent| of(&absent.name)) {
        absent.dims.iter_mut().filter(|n| **n == width).for_each(|n| *n /= 2);
    }
}

fn narrow_block(slice: &mut Slice) {
    narrow(slice, |name| name.starts_with("blk.0."));
}

fn narrow_all(slice: &mut Slice) {
    narrow(slice, |name| name.starts_with("blk."));
}

fn rename(slice: &mut Slice, from: &str, to: &str) {
    for absent in &mut slice.absent {
        if let Some(rest) = absent.name.strip_prefix(from) {
            absent.name = format!("{to}{rest}");
        }
    }
}

/// Of what matrices are multiplied by: llama.cpp has no convolution with weights of another type than F32, and that is said.
fn other_types(slice: &mut Slice) {
    let is_matrix =
        |a: &&mut Absent| a.name.starts_with("blk.") && a.dims[1] > 1 && !a.name.contains("conv1d");
    for absent in slice.absent.iter_mut().filter(is_matrix) {
        absent.tensor_type =
            if absent.tensor_type == TensorType::F16 { TensorType::F32 } else { TensorType::F16 };
    }
}

#[test]
fn a_slice_that_lies_well_gives_the_right_tokens_or_one_error() {
    let mut wrong = Vec::new();
    for arch in ["qwen3", "gemma3", "qwen35"] {
        let cut = Cut::new(arch);
        let whole = WholeModel::open(&cut.file("m.gguf"), &SMALL, false, |_| {}).unwrap();
        let expected = reply(&mut whole.session().unwrap()).unwrap();
        for ((what, lie), says) in LIES {
            let mut slice = Slice::read(&cut.file("m.middle-3..5.gguf"));
            lie(&mut slice);
            let path = cut.file("lie.gguf");
            slice.write(&path);
            let outcome = cut.outcome(&path);
            println!("{arch}: {what}: {outcome:?}");
            match outcome {
                Ok(tokens) if tokens == expected && says.is_empty() => {}
                Err(error) if !says.is_empty() && error.contains(says) && !error.contains('\n') => {}
                other => wrong.push(format!("{arch}: {what}: {other:?}")),
            }
        }
        // the other cut's own middle, which calls itself this one
        let manifest = Manifest::read(cut.file("m.split.json")).unwrap();
        let mut slice = Slice::read(&cut.file("other.middle-2..4.gguf"));
        slice.set(keys::SLICE_SHA256, Value::string(manifest.slices[1].sha256.clone()));
        let path = cut.file("lie.gguf");
        slice.write(&path);
        let outcome = cut.outcome(&path);
        println!("{arch}: another cut's middle: {outcome:?}");
        if outcome.is_ok() {
            wrong.push(format!("{arch}: another cut's middle: {outcome:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
