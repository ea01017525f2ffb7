//! The programs of this project, run as a person would run them: shown, waited for, and cleaned up after.

use std::fs::File;
use std::io::{BufRead as _, BufReader, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dim::Key;
use gguf_tools::failure::Failure;
use gguf_tools::terminal::steer;

use crate::progress::size;

/// A program of this project: it lies beside this one.
pub(super) fn program(name: &str) -> Result<Command, Failure> {
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
pub(super) fn typed(command: &Command) -> String {
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

/// Runs a program that writes files into `dir` to its end; what it says is told only when it fails. On a terminal, what is
/// written so far is shown.
pub(super) fn run_to_end(command: &mut Command, dir: &Path) -> Result<(), Failure> {
    let cannot = |e| Failure::failed(format!("cannot run {}: {e}", typed(command)));
    let log = dir.join("demo.log");
    let stderr =
        File::create(&log).map_err(|e| Failure::failed(format!("cannot write {}: {e}", log.display())))?;
    let mut running = Command::new(command.get_program());
    running.args(command.get_args()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    let mut child = running.spawn().map_err(cannot)?;
    let (start, before, terminal) = (Instant::now(), bytes_in(dir), std::io::stderr().is_terminal());
    let mut shown = false;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(cannot)? {
            break status;
        }
        std::thread::sleep(Duration::from_millis(20));
        if terminal && start.elapsed() > Duration::from_millis(500) {
            let written = bytes_in(dir).saturating_sub(before);
            steer(format_args!(
                "\r\x1b[K  {:.0} s, {} written",
                start.elapsed().as_secs_f64(),
                size(written as f64)
            ));
            shown = true;
        }
    };
    if shown {
        steer(format_args!("\r\x1b[K"));
    }
    if status.success() {
        let _ = std::fs::remove_file(&log);
        return Ok(());
    }
    let said = std::fs::read(&log).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    Err(Failure::failed(format!("{} ended with {status}\n{}", typed(command), said.trim_end())))
}

fn bytes_in(dir: &Path) -> u64 {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|file| file.len()).sum()
}

/// A pre-shared key for this run alone, and in a file.
pub(super) fn write_key(path: &Path) -> Result<Key, Failure> {
    let key = Key::random().map_err(Failure::failed)?;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(path).and_then(|mut f| writeln!(f, "{}", key.to_hex()));
    written.map_err(|e| Failure::failed(format!("cannot write {}: {e}", path.display())))?;
    Ok(key)
}

/// A folder that goes when the demo ends, unless it is to be kept.
pub(super) struct Scratch {
    pub(super) dir: PathBuf,
    keep: bool,
}

impl Scratch {
    pub(super) fn new(keep: Option<PathBuf>) -> Result<Scratch, Failure> {
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
pub(super) struct Worker {
    child: Child,
    /// Where it listens.
    pub(super) address: String,
}

impl Worker {
    /// Starts what `command` says, and waits until it listens.
    pub(super) fn start(command: &mut Command) -> Result<Worker, Failure> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| Failure::failed(format!("cannot start {}: {e}", typed(command))))?;
        // read to its end, or the worker would stand still with a full pipe
        let stderr = BufReader::new(child.stderr.take().expect("stderr is piped"));
        let said = std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).take(1000).collect::<Vec<_>>().join("\n")
        });
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let _ = out.read_line(&mut line);
        let Some(address) = line.trim().strip_prefix("listening on ") else {
            let _ = child.kill();
            let _ = child.wait();
            let said = said.join().unwrap_or_default();
            return Err(Failure::failed(format!("{} did not start\n{said}", typed(command))));
        };
        Ok(Worker { address: address.to_owned(), child })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
