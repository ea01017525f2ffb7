//! What the tests with real processes have in common: a cut model, workers, hosts, servers, and a relay between them.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub(crate) mod served;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use dim::host::report::Report;
use dim_core::random::{GOLDEN, mix};
use gguf_tools::gguf::write::{GgufWriter, TensorSpec};
use gguf_tools::gguf::{Gguf, Tensor, TensorType, Value};
use gguf_tools::manifest::Manifest;
use gguf_tools::plan::{Plan, Request};
use gguf_tools::split::split;
use gguf_tools::synth::Spec;

/// `dim-host`.
pub(crate) fn host_program() -> &'static Path {
    static FILE: LazyLock<PathBuf> =
        LazyLock::new(|| program("dim-host", option_env!("CARGO_BIN_EXE_dim-host")));
    &FILE
}

/// `dim-worker`.
pub(crate) fn worker_program() -> &'static Path {
    static FILE: LazyLock<PathBuf> =
        LazyLock::new(|| program("dim-worker", option_env!("CARGO_BIN_EXE_dim-worker")));
    &FILE
}

/// A program of this package, as cargo names it; one of another, beside them in the target directory.
fn program(name: &str, own: Option<&str>) -> PathBuf {
    if let Some(own) = own {
        return own.into();
    }
    let here = std::env::current_exe().unwrap();
    let file = here.ancestors().nth(2).unwrap().join(name);
    assert!(file.is_file(), "{} is not there: cargo build --release --workspace", file.display());
    file
}

/// At least 128 tokens for a byte-level tokenizer, whatever it merges.
pub(crate) const PROMPT: &str = "The quick brown fox jumps over the lazy dog, and then the dog, who is not as lazy as people say, \
gets up, walks around the fence twice, and lies down again in the shade of the old pear tree, where nobody jumps over anybody. \
In the evening both of them sit at the river and count the boats: seven, eight, nine. Tomorrow there will be more of them!";

/// A synthetic model and its slices in a folder of their own, with a key.
pub(crate) struct Cut {
    pub folder: tempfile::TempDir,
    pub model: PathBuf,
    pub split: PathBuf,
    pub manifest: Manifest,
    pub key: PathBuf,
}

impl Cut {
    pub(crate) fn new(spec: &Spec, middles: &[&str]) -> Cut {
        Cut::of(|path| spec.write(path).unwrap(), middles)
    }

    /// The same model with one number of its metadata changed.
    pub(crate) fn with_f32(&self, key: &str, number: f32, middles: &[&str]) -> Cut {
        let old = Gguf::open(&self.model).unwrap();
        assert!(matches!(old.get(key), Some(Value::F32(old)) if old != number), "{key}");
        Cut::of(|path| write_with(&self.model, path, key, Some(Value::F32(number))), middles)
    }

    /// The same model without a key.
    pub(crate) fn without_key(&self, key: &str, middles: &[&str]) -> Cut {
        assert!(Gguf::open(&self.model).unwrap().get(key).is_some(), "{key}");
        Cut::of(|path| write_with(&self.model, path, key, None), middles)
    }

    /// The same model, whole, with another value of a key; a file in this folder.
    pub(crate) fn with_key(&self, key: &str, value: Value<'_>) -> PathBuf {
        let path = self.folder.path().join("other.gguf");
        write_with(&self.model, &path, key, Some(value));
        path
    }

    /// Another model, from a file.
    pub(crate) fn of_file(file: &Path, middles: &[&str]) -> Cut {
        Cut::of(|path| assert!(std::fs::copy(file, path).unwrap() > 0), middles)
    }

    fn of(write: impl FnOnce(&Path), middles: &[&str]) -> Cut {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model.gguf");
        write(&model);
        let gguf = Gguf::open(&model).unwrap();
        let request = Request {
            middles: middles.iter().map(|m| m.parse().unwrap()).collect(),
            stem: "model".into(),
            ..Request::default()
        };
        let plan = Plan::new(&gguf, &request).unwrap();
        let manifest = split(&plan, folder.path(), "model", |_| {}).unwrap();
        let key = key_file(folder.path());
        let split = folder.path().join("model.split.json");
        assert!(split.is_file());
        Cut { model, split, manifest, key, folder }
    }

    /// A cut tiny model: four or more blocks of `arch`, blocks 1 and 2 in the middle.
    pub(crate) fn tiny(arch: &str) -> Cut {
        Cut::new(&Spec::tiny(arch).unwrap(), &["1..2"])
    }

    /// The file of slice `i`: 0 is the head, the last one the tail.
    pub(crate) fn slice(&self, i: usize) -> PathBuf {
        Manifest::slice_path(&self.split, &self.manifest.slices[i])
    }

    pub(crate) fn worker(&self, i: usize) -> Worker {
        Worker::start(&self.slice(i), &self.key, &[])
    }

    /// A command of `dim-host` with this split, its key and `workers`.
    pub(crate) fn host(&self, name: &str, workers: &[&str]) -> Command {
        let mut command = Command::new(host_program());
        command.arg(name).arg("--split").arg(&self.split).arg("--key-file").arg(&self.key);
        for worker in workers {
            command.args(["--worker", worker]);
        }
        command
    }

    /// `dim-host generate` for this model, with the options every run here has in common.
    pub(crate) fn generate(&self, workers: &[&str], more: &[&str]) -> Command {
        let mut command = self.host("generate", workers);
        command.args(COMMON).args(more);
        command
    }

    /// `dim-host stock`, the same.
    pub(crate) fn stock(&self, more: &[&str]) -> Command {
        let mut command = Command::new(host_program());
        command.arg("stock").arg("--model").arg(&self.model).args(COMMON).args(more);
        command
    }

    /// What `dim-host chat` with all blocks here says on stdout and on stderr when it is given `input`, and its exit code.
    pub(crate) fn chat(&self, args: &[&str], input: &[u8]) -> (String, String, Option<i32>) {
        let mut command = self.host("chat", &[]);
        command.args(["--threads", "1", "--temp", "0"]).args(args);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        let output = child.wait_with_output().unwrap();
        (text(&output.stdout), text(&output.stderr), output.status.code())
    }
}

/// A key in a file of this folder.
pub(crate) fn key_file(folder: &Path) -> PathBuf {
    let key = folder.join("key");
    std::fs::write(&key, format!("{}\n", "5a".repeat(32))).unwrap();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    key
}

pub(crate) const COMMON: [&str; 7] = ["--threads", "1", "--ctx", "512", "--json", "-p", PROMPT];

/// An undisturbed reply, and which bytes from the worker are the room in which to break it: `before` are spent on the
/// question what it holds, the handshake and the canary, `bytes` follow.
pub(crate) struct Undisturbed {
    pub report: Report,
    pub before: u64,
    pub bytes: u64,
}

impl Undisturbed {
    /// 128 tokens, and small chunks, so that a prompt is several steps and a break can fall among them.
    pub(crate) const OPTIONS: [&str; 6] = ["-n", "128", "--temp", "0", "--ubatch", "48"];

    pub(crate) fn of(cut: &Cut) -> Undisturbed {
        let worker = cut.worker(1);
        let relay = Relay::to(&worker.address);
        let report = report(&mut cut.generate(&[&relay.address()], &Undisturbed::OPTIONS));
        assert_eq!(report.tokens.len(), 128);
        let bytes = report.wire.bytes_received;
        Undisturbed { before: relay.received().saturating_sub(bytes), bytes, report }
    }
}

/// Runs a host that has to succeed.
pub(crate) fn report(command: &mut Command) -> Report {
    let output = run(command);
    assert!(output.status.success(), "{command:?} ended with {}\n{}", output.status, text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&output.stdout)))
}

/// Runs a host that has to fail with `code`, and gives its stderr.
pub(crate) fn failure(command: &mut Command, code: i32) -> String {
    let output = run(command);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{command:?}\n{stderr}");
    assert!(stderr.contains("error: "), "no error line: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

pub(crate) fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The model or slice at `from` again at `to`, with another value of a key, or without it.
pub(crate) fn write_with(from: &Path, to: &Path, key: &str, value: Option<Value<'_>>) {
    let gguf = Gguf::open(from).unwrap();
    let others = gguf.metadata().filter(|e| e.key != key).map(|e| (e.key.to_owned(), e.value));
    let metadata: Vec<_> = others.chain(value.map(|value| (key.to_owned(), value))).collect();
    let spec = |t: Tensor<'_>| TensorSpec::new(t.name(), t.tensor_type(), t.dims());
    let specs: Vec<_> = gguf.tensors().map(spec).collect();
    let mut writer = GgufWriter::create(to, &metadata, &specs).unwrap();
    gguf.tensors().for_each(|t| writer.write(t.data().unwrap()).unwrap());
    writer.finish().unwrap();
}

/// The folder of the repository.
pub(crate) fn top() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// Whether this is `make faults`, which tries as many of everything as the tables of docs/TESTING.md say.
pub(crate) fn makes_tables() -> bool {
    std::env::var_os("DIM_FAULTS").is_some()
}

/// Leaves a heading's text and its table where `make faults` takes them from; `name` begins with their place on the page.
pub(crate) fn leave_table(name: &str, table: &str) {
    let folder = top().join("target/faults");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(name).with_extension("md"), table).unwrap();
}

/// The trained model as it was fetched; where it was not, that is said.
pub(crate) fn real_model() -> Option<PathBuf> {
    let output = run(Command::new("sh").arg(".ci/model").arg("--path").current_dir(top()));
    assert!(output.status.success() || output.stderr.is_empty(), "{}", text(&output.stderr));
    if !output.status.success() {
        println!("not run: no real weights (sh .ci/model fetches them)");
        return None;
    }
    Some(text(&output.stdout).trim_end().into())
}

/// The slice at `from` again at `to`, with the same keys and the contents that `contents` gives for each tensor: what
/// only a worker that does not look at the digests loads.
pub(crate) fn tampered(from: &Path, to: &Path, contents: impl Fn(&Tensor<'_>) -> (TensorType, Vec<u8>)) {
    let gguf = Gguf::open(from).unwrap();
    let metadata: Vec<_> = gguf.metadata().map(|e| (e.key.to_owned(), e.value)).collect();
    let contents: Vec<_> = gguf.tensors().map(|t| contents(&t)).collect();
    let spec = |(t, (ty, _)): (Tensor<'_>, &(TensorType, _))| TensorSpec::new(t.name(), *ty, t.dims());
    let specs: Vec<_> = gguf.tensors().zip(&contents).map(spec).collect();
    let mut writer = GgufWriter::create(to, &metadata, &specs).unwrap();
    contents.iter().for_each(|(_, bytes)| writer.write(bytes).unwrap());
    writer.finish().unwrap();
}

/// A dim-worker process.
pub(crate) struct Worker {
    pub child: Child,
    pub address: String,
    pub stderr: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Worker {
    pub(crate) fn start(slice: &Path, key: &Path, more: &[&str]) -> Worker {
        Worker::start_at("127.0.0.1:0", slice, key, more)
    }

    pub(crate) fn start_at(listen: &str, slice: &Path, key: &Path, more: &[&str]) -> Worker {
        let mut command = Command::new(worker_program());
        command.arg(slice).arg("--key-file").arg(key).args(["--listen", listen, "--threads", "1"]);
        if !more.contains(&"--ctx") {
            command.args(["--ctx", "512"]);
        }
        Worker::spawn(command.args(more))
    }

    /// Starts what `command` says and waits until it listens.
    pub(crate) fn spawn(command: &mut Command) -> Worker {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = Arc::new(Mutex::new(String::new()));
        let collected = Arc::clone(&stderr);
        let pipe = BufReader::new(child.stderr.take().unwrap());
        let reader = std::thread::spawn(move || {
            for line in pipe.lines().map_while(Result::ok) {
                let mut all = collected.lock().unwrap();
                all.push_str(&line);
                all.push('\n');
            }
        });
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").map(str::to_owned);
        let address = address.unwrap_or_else(|| {
            let _ = child.wait();
            std::thread::sleep(Duration::from_millis(100));
            panic!("{command:?} does not listen: {}", stderr.lock().unwrap())
        });
        Worker { child, address, stderr, reader: Some(reader) }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by name, as `kill -NAME`.
    pub(crate) fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub(crate) fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

pub(crate) fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap();
    assert!(status.success(), "kill -{name} {pid}");
}

/// A relay on loopback that hands bytes on until it is told to break, and counts what comes back from the worker.
pub(crate) struct Relay {
    pub address: SocketAddr,
    state: Arc<RelayState>,
}

struct RelayState {
    target: Mutex<String>,
    /// break every connection once this many bytes have come from the worker; u64::MAX: never
    break_at: AtomicU64,
    from_worker: AtomicU64,
    broken: AtomicBool,
    /// stand still once this many bytes have come from the worker; u64::MAX: never
    stall_at: AtomicU64,
    stalled: AtomicBool,
    /// bytes a second, each way; 0: nothing moves, u64::MAX: as fast as it goes
    pace: AtomicU64,
    connections: Mutex<Vec<TcpStream>>,
}

impl Relay {
    pub(crate) fn to(target: &str) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(RelayState {
            target: Mutex::new(target.to_owned()),
            break_at: AtomicU64::new(u64::MAX),
            from_worker: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            stall_at: AtomicU64::new(u64::MAX),
            stalled: AtomicBool::new(false),
            pace: AtomicU64::new(u64::MAX),
            connections: Mutex::new(Vec::new()),
        });
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for host in listener.incoming().map_while(Result::ok) {
                let target = shared.target.lock().unwrap().clone();
                let Ok(worker) = TcpStream::connect(&target) else { continue };
                for stream in [&host, &worker] {
                    stream.set_nodelay(true).unwrap();
                    shared.connections.lock().unwrap().push(stream.try_clone().unwrap());
                }
                let (h, w) = (host.try_clone().unwrap(), worker.try_clone().unwrap());
                let pace = Arc::clone(&shared);
                std::thread::spawn(move || {
                    copy(host, worker, |n| {
                        pace.hold_up(n);
                        n
                    });
                });
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || {
                    copy(w, h, |n| {
                        let before = shared.from_worker.fetch_add(n as u64, Ordering::SeqCst);
                        let room = shared.break_at.load(Ordering::SeqCst).saturating_sub(before);
                        if room < n as u64 {
                            shared.broken.store(true, Ordering::SeqCst);
                        }
                        if before + n as u64 > shared.stall_at.load(Ordering::SeqCst) {
                            shared.stall_at.store(u64::MAX, Ordering::SeqCst);
                            shared.pace.store(0, Ordering::SeqCst);
                            shared.stalled.store(true, Ordering::SeqCst);
                        }
                        shared.hold_up(n);
                        usize::try_from(room).unwrap_or(n).min(n)
                    });
                    if shared.broken.load(Ordering::SeqCst) {
                        shared.cut();
                    }
                });
            }
        });
        Relay { address, state }
    }

    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    /// Bytes that have come from the worker so far.
    pub(crate) fn received(&self) -> u64 {
        self.state.from_worker.load(Ordering::SeqCst)
    }

    /// Breaks all connections when `bytes` more bytes have come from the worker: in the middle of a frame, mostly.
    pub(crate) fn break_after(&self, bytes: u64) {
        self.state.broken.store(false, Ordering::SeqCst);
        let now = self.state.from_worker.load(Ordering::SeqCst);
        self.state.break_at.store(now.saturating_add(bytes), Ordering::SeqCst);
    }

    /// Waits until it has broken, at most a minute; false if it did not.
    pub(crate) fn wait_until_broken(&self) -> bool {
        comes_true(&self.state.broken)
    }

    /// Stands still in both directions, without closing anything, when `bytes` more bytes have come from the worker.
    pub(crate) fn stall_after(&self, bytes: u64) {
        self.state.stalled.store(false, Ordering::SeqCst);
        self.state.stall_at.store(self.received().saturating_add(bytes), Ordering::SeqCst);
    }

    /// Waits until it stands still, at most a minute; false if it does not.
    pub(crate) fn wait_until_stalled(&self) -> bool {
        comes_true(&self.state.stalled)
    }

    /// Hands on this many bytes a second each way from now on; u64::MAX: as fast as it goes.
    pub(crate) fn pace(&self, bytes_per_s: u64) {
        self.state.pace.store(bytes_per_s, Ordering::SeqCst);
    }

    /// Lets everything through again.
    pub(crate) fn mend(&self) {
        self.state.break_at.store(u64::MAX, Ordering::SeqCst);
    }
}

fn comes_true(flag: &AtomicBool) -> bool {
    for _ in 0..60_000 {
        if flag.load(Ordering::SeqCst) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

impl RelayState {
    /// As long as the pace demands for `n` bytes.
    fn hold_up(&self, n: usize) {
        loop {
            match self.pace.load(Ordering::SeqCst) {
                u64::MAX => return,
                0 => std::thread::sleep(Duration::from_millis(1)),
                pace => {
                    return std::thread::sleep(Duration::from_secs_f64(n as f64 / pace as f64));
                }
            }
        }
    }

    fn cut(&self) {
        for stream in self.connections.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Copies until either end closes; `let_through` says how many of the bytes read go on, fewer meaning the end.
fn copy(mut from: TcpStream, mut to: TcpStream, let_through: impl Fn(usize) -> usize) {
    let mut buffer = [0; 16 * 1024];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(n) => n,
        };
        let pass = let_through(n);
        if to.write_all(&buffer[..pass]).is_err() || pass < n {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// What tests draw from that try what is random: another `DIM_TEST_SEED`, other trials.
pub(crate) fn seed() -> u64 {
    std::env::var("DIM_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_261_128)
}

/// A small generator of numbers that are the same in every run: splitmix64.
pub(crate) struct Numbers(pub u64);

impl Numbers {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0) % n
    }
}
