//! `dim-host demo`: the whole way on this machine, with the programs a user would call, in the order in which a
//! user would call them.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use dim::host::report::{Report, thousands};
use gguf_tools::failure::Failure;

/// Arguments of `dim-host demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model's shape, as of `dim-synth`
    #[arg(long, default_value = "demo")]
    shape: String,
    /// Blocks of the middle, inclusive
    #[arg(long, value_name = "A..B", default_value = "4..7")]
    middle: String,
    /// Tokens to generate
    #[arg(short = 'n', long = "predict", value_name = "N", default_value_t = 64)]
    n_predict: u32,
    /// Compute threads of each process
    #[arg(short = 't', long, default_value_t = 1)]
    threads: u32,
    /// Where to put the model and its slices; they are removed afterwards unless this is given
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// Runs it.
pub fn run(args: &Args) -> Result<(), Failure> {
    let scratch = Scratch::new(args.keep.clone())?;
    let dir = scratch.dir.as_path();
    let model = dir.join("demo.gguf");
    let split = dir.join("demo.split.json");
    let key = dir.join("demo.key");
    write_key(&key)?;

    step("1. a model with random weights, since none can be assumed here");
    run_to_end(program("dim-synth")?.arg(&model).args(["--shape", &args.shape]))?;

    step("2. the model, cut in three");
    run_to_end(
        program("dim-split")?.arg(&model).args(["--middle", &args.middle, "--verify"]).arg("--out").arg(dir),
    )?;

    step("3. a worker with the middle");
    let middle = find_middle(dir)?;
    let worker = Worker::start(&middle, &key, args.threads)?;

    step("4. the same text three times: stock llama.cpp alone, then split over two processes");
    let n = args.n_predict.to_string();
    let threads = args.threads.to_string();
    let common = ["-p", PROMPT, "-n", &n, "--temp", "0", "--ctx", "1024", "--threads", &threads, "--json"];
    let stock = generate(program("dim-host")?.arg("stock").arg("--model").arg(&model).args(common))?;
    let mut split_runs = Vec::new();
    for wire in ["f32", "f16"] {
        let mut command = program("dim-host")?;
        command.arg("generate").arg("--split").arg(&split).args(["--worker", &worker.address]);
        command.arg("--key-file").arg(&key).args(common).args(["--wire", wire]);
        split_runs.push(generate(&mut command)?);
    }
    drop(worker);

    eprintln!();
    print!("{}", table(&stock, &split_runs));
    let exact = &split_runs[0];
    if exact.tokens != stock.tokens {
        let at = agreeing(&exact.tokens, &stock.tokens);
        return Err(Failure::failed(format!(
            "the split model's tokens differ from stock llama.cpp's from token {at} on"
        ))
        .hint("this should never happen: please report it with the output above"));
    }
    println!("\nAll {} tokens of the f32 run are those of stock llama.cpp.", stock.tokens.len());
    if split_runs[1].tokens != stock.tokens {
        println!(
            "The f16 run leaves them where two tokens are nearly as likely: with random weights that is soon."
        );
    }
    if let Some(dir) = &args.keep {
        println!("The model and its slices are in {}.", dir.display());
    }
    Ok(())
}

/// One line per arm.
fn table(stock: &Report, split: &[Report]) -> String {
    let mut t = String::new();
    let _ = writeln!(
        t,
        "{:<22} {:>12} {:>12} {:>12} {:>18} {:>14}",
        "", "prompt", "generation", "first token", "bytes per token", "tokens equal"
    );
    for (name, report) in std::iter::once(("stock llama.cpp", stock)).chain(
        split.iter().map(|r| (if r.wire.dtype == "f32" { "split, f32 wire" } else { "split, f16 wire" }, r)),
    ) {
        let steps = report.tokens.len().saturating_sub(1).max(1) as u64;
        let bytes = match report.wire.round_trips {
            0 => "-".to_owned(),
            _ => format!(
                "{} + {}",
                thousands(report.wire.gen_bytes_sent / steps),
                thousands(report.wire.gen_bytes_received / steps)
            ),
        };
        let _ = writeln!(
            t,
            "{name:<22} {:>6.0} tok/s {:>6.1} tok/s {:>9.0} ms {bytes:>18} {:>8} of {}",
            report.prompt_tok_s,
            report.gen_tok_s,
            report.ttft_ms,
            agreeing(&report.tokens, &stock.tokens),
            stock.tokens.len(),
        );
    }
    t
}

/// How many tokens are the same from the start.
fn agreeing(a: &[i32], b: &[i32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn step(what: &str) {
    eprintln!("\n{what}");
}

/// A program of this project: it lies beside this one.
fn program(name: &str) -> Result<Command, Failure> {
    let here = std::env::current_exe()
        .map_err(|e| Failure::failed(format!("cannot find this program's folder: {e}")))?;
    let path = here.with_file_name(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    if !path.is_file() {
        return Err(Failure::failed(format!("{} is missing", path.display()))
            .hint("build everything: cargo build --release --workspace"));
    }
    Ok(Command::new(path))
}

/// The command as a person would type it, less the folders of its own.
fn typed(command: &Command) -> String {
    let name =
        Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let words = command.get_args().map(|a| {
        let text = a.to_string_lossy();
        let path = Path::new(text.as_ref());
        let short = if path.is_absolute() {
            path.file_name().unwrap_or_default().to_string_lossy()
        } else {
            text.clone()
        };
        let plain =
            short.chars().all(|c| c.is_ascii_alphanumeric() || "-_./:,".contains(c)) && !short.is_empty();
        if plain { short.into_owned() } else { format!("'{short}'") }
    });
    std::iter::once(name).chain(words).collect::<Vec<_>>().join(" ")
}

fn run_to_end(command: &mut Command) -> Result<(), Failure> {
    eprintln!("$ {}", typed(command));
    let status =
        command.status().map_err(|e| Failure::failed(format!("cannot start {}: {e}", typed(command))))?;
    if status.success() {
        Ok(())
    } else {
        Err(Failure::failed(format!("{} ended with {status}", typed(command))))
    }
}

fn generate(command: &mut Command) -> Result<Report, Failure> {
    eprintln!("$ {}", typed(command));
    let output = command
        .stderr(Stdio::piped())
        .output()
        .map_err(|e| Failure::failed(format!("cannot start {}: {e}", typed(command))))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::failed(format!(
            "{} ended with {}\n{}",
            typed(command),
            output.status,
            why.trim_end()
        )));
    }
    serde_json::from_slice(&output.stdout)
        .map_err(|e| Failure::failed(format!("{}: no report: {e}", typed(command))))
}

/// The one middle slice that dim-split wrote.
fn find_middle(dir: &Path) -> Result<PathBuf, Failure> {
    let entries =
        std::fs::read_dir(dir).map_err(|e| Failure::failed(format!("cannot read {}: {e}", dir.display())))?;
    let is_middle = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().contains(".middle-"));
    let found = entries
        .flatten()
        .map(|e| e.path())
        .find(|p| is_middle(p) && p.extension().is_some_and(|e| e == "gguf"));
    found.ok_or_else(|| Failure::failed(format!("dim-split left no middle slice in {}", dir.display())))
}

/// A pre-shared key for this run alone.
fn write_key(path: &Path) -> Result<(), Failure> {
    let mut key = [0u8; 32];
    getrandom::fill(&mut key)
        .map_err(|e| Failure::failed(format!("the system gives no random bytes: {e}")))?;
    let hex: String = key.iter().map(|b| format!("{b:02x}")).collect();
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(path).and_then(|mut f| writeln!(f, "{hex}"));
    written.map_err(|e| Failure::failed(format!("cannot write {}: {e}", path.display())))
}

/// A folder that goes when the demo ends, unless it is to be kept.
struct Scratch {
    dir: PathBuf,
    keep: bool,
}

impl Scratch {
    fn new(keep: Option<PathBuf>) -> Result<Scratch, Failure> {
        let keep_it = keep.is_some();
        let dir =
            keep.unwrap_or_else(|| std::env::temp_dir().join(format!("dim-demo-{}", std::process::id())));
        std::fs::create_dir_all(&dir)
            .map_err(|e| Failure::misuse(format!("cannot make {}: {e}", dir.display())))?;
        let dir =
            dir.canonicalize().map_err(|e| Failure::failed(format!("cannot open {}: {e}", dir.display())))?;
        Ok(Scratch { dir, keep: keep_it })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// A worker process that ends with the demo.
struct Worker {
    child: Child,
    address: String,
}

impl Worker {
    fn start(slice: &Path, key: &Path, threads: u32) -> Result<Worker, Failure> {
        let mut command = program("dim-worker")?;
        command.arg(slice).args([
            "--listen",
            "127.0.0.1:0",
            "--ctx",
            "1024",
            "--threads",
            &threads.to_string(),
        ]);
        command.arg("--key-file").arg(key);
        eprintln!("$ {} &", typed(&command));
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| Failure::failed(format!("cannot start {}: {e}", typed(&command))))?;
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let _ = out.read_line(&mut line);
        let Some(address) = line.trim().strip_prefix("listening on ") else {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Failure::failed("the worker did not start; what it said stands above"));
        };
        eprintln!("listening on {address}");
        Ok(Worker { address: address.to_owned(), child })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const PROMPT: &str = "A model that does not fit one machine can be cut in three. The first blocks and the last ones stay here, \
the ones in the middle go to the phone that lies beside it, and only one row of numbers per token crosses the room.";
