//! llama.cpp in a process of its own: what it does to a file that nobody has looked at does not end this one.
//!
//! llama.cpp and ggml check much of a file by assertions that stay in release builds; the loaders of 130 architectures have
//! their own. So a program that is about to load an unseen file starts itself again with [`ARGUMENT`], writes one line of
//! JSON, the [`Task`], to that process's standard input, and reads one line of JSON, its answer. If there is none, the
//! process has died, and what ggml said last is the error: one sentence, exit code 2, and no core file.

use std::{
    io::{Read, Write},
    ops::Range,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    sync::mpsc::channel,
    thread,
    time::Duration,
};

use dim_core::canary::Canary;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    canary::NoCanary,
    died::died,
    needs::{Cuts, NeedsError, Refusal, Survey},
};

pub use crate::died::{Died, LESS_MEMORY};

/// The first argument of a process that [serves](serve) tasks: no user types it.
pub const ARGUMENT: &str = "__apart";

/// Whether there is a llama.cpp in this build.
pub const IS_BUILT_IN: bool = cfg!(feature = "engine");

/// What the other process is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Task {
    /// What these ranges of a model's blocks need, which are all of it in order: a `Result<Survey, Refusal>`.
    Survey {
        /// Its files, in order.
        #[serde(with = "paths")]
        files: Vec<PathBuf>,
        /// The ranges.
        ranges: Vec<Range<u32>>,
    },
    /// Where a model can be cut: a `Result<Cuts, Refusal>`.
    Cuts {
        /// Its files, in order.
        #[serde(with = "paths")]
        files: Vec<PathBuf>,
    },
    /// Whether llama.cpp can prepare to load and evaluate a model or a slice, without its weights: a `Result<(), Refusal>`.
    Try {
        /// Its files, in order.
        #[serde(with = "paths")]
        files: Vec<PathBuf>,
    },
    /// A middle's answer to a known input: a `Result<Canary, NoCanary>`.
    Canary {
        /// The slice.
        #[serde(with = "path")]
        path: PathBuf,
        /// Values of a hidden row.
        n_embd: usize,
        /// What the rows are drawn from.
        seed: u64,
    },
}

/// Paths as the system has them, which need not be UTF-8.
mod paths {
    use std::path::PathBuf;

    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    pub(super) fn serialize<S: Serializer>(paths: &[PathBuf], to: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<&[u8]> = paths.iter().map(|path| path.as_os_str().as_encoded_bytes()).collect();
        bytes.serialize(to)
    }

    pub(super) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<Vec<PathBuf>, D::Error> {
        let paths = Vec::<Vec<u8>>::deserialize(from)?;
        Ok(paths.into_iter().map(from_bytes).collect())
    }

    #[cfg(unix)]
    pub(super) fn from_bytes(bytes: Vec<u8>) -> PathBuf {
        <std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(bytes).into()
    }

    #[cfg(not(unix))]
    pub(super) fn from_bytes(bytes: Vec<u8>) -> PathBuf {
        String::from_utf8_lossy(&bytes).into_owned().into()
    }
}

/// The same for one.
mod path {
    use std::path::{Path, PathBuf};

    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    pub(super) fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        path.as_os_str().as_encoded_bytes().serialize(to)
    }

    pub(super) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<PathBuf, D::Error> {
        Vec::deserialize(from).map(super::paths::from_bytes)
    }
}

/// Whether llama.cpp survives a model or a slice that nobody has looked at: asked of `program` in a process of its own.
///
/// # Errors
/// It does not, or it refuses the file.
pub fn try_file(program: &Path, files: Vec<PathBuf>) -> Result<(), NeedsError> {
    let answer: Result<(), Refusal> = Task::Try { files }.ask(program)?;
    Ok(answer?)
}

impl Task {
    /// Starts `program` for this task and reads its answer, which is of the type that the task names.
    ///
    /// # Errors
    /// The process has died, or does not answer.
    pub fn ask<T: DeserializeOwned>(&self, program: &Path) -> Result<T, Died> {
        let not_started = |e: std::io::Error| Died::NotStarted(program.to_owned(), e.to_string());
        let mut child = Command::new(program)
            .arg(ARGUMENT)
            // its own walk through the stack takes a debugger and seconds, and tells nobody here anything
            .env("GGML_NO_BACKTRACE", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(not_started)?;
        let mut line = serde_json::to_vec(self).map_err(|e| not_started(e.into()))?;
        line.push(b'\n');
        // one that has died already says so by its end
        let _ = child.stdin.take().map(|mut stdin| stdin.write_all(&line));
        let (answer, said, status) = self.wait(child).map_err(not_started)?;
        let Some(status) = status else { return Err(Died::Silent(self.patience().as_secs())) };
        if !status.success() {
            return Err(died(how(status), last_words(&said)));
        }
        serde_json::from_slice(&answer).map_err(|_| Died::Nonsense)
    }

    /// What it wrote to both outputs, and how it ended: `None`, it had to be ended.
    fn wait(&self, mut child: Child) -> std::io::Result<(Vec<u8>, Vec<u8>, Option<ExitStatus>)> {
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (to, from) = channel();
        thread::scope(|scope| {
            let stderr = scope.spawn(move || read(stderr, MOST_SAID));
            let stdout = scope.spawn(move || {
                let answer = read(stdout, MOST_ANSWER);
                // its end of the pipe closes when it ends, whatever ends it
                let _ = to.send(());
                answer
            });
            let is_over = from.recv_timeout(self.patience()).is_ok();
            if !is_over {
                child.kill()?;
            }
            let status = child.wait()?;
            let answer = stdout.join().unwrap_or_default();
            Ok((answer, stderr.join().unwrap_or_default(), is_over.then_some(status)))
        })
    }

    /// How long it is waited for: what loads no weights takes milliseconds a block.
    fn patience(&self) -> Duration {
        match self {
            Task::Survey { .. } | Task::Cuts { .. } | Task::Try { .. } => Duration::from_secs(300),
            Task::Canary { .. } => Duration::from_secs(3600),
        }
    }

    /// Does it, in this process.
    fn answer(self) -> serde_json::Result<Vec<u8>> {
        match self {
            Task::Survey { files, ranges } => serde_json::to_vec(&survey(&files, &ranges)),
            Task::Cuts { files } => serde_json::to_vec(&cuts(&files)),
            Task::Try { files } => serde_json::to_vec(&try_out(&files)),
            Task::Canary { path, n_embd, seed } => {
                let found: Result<Canary, NoCanary> = crate::canary::find(&path, n_embd, seed);
                serde_json::to_vec(&found)
            }
        }
    }
}

/// The life of a process that was started for a [`Task`].
pub fn serve() -> ExitCode {
    no_core_file();
    let mut line = Vec::new();
    let read = std::io::stdin().lock().take(MOST_ANSWER).read_to_end(&mut line);
    let task = read.ok().and_then(|_| serde_json::from_slice::<Task>(&line).ok());
    let Some(answer) = task.and_then(|task| task.answer().ok()) else { return ExitCode::FAILURE };
    match std::io::stdout().lock().write_all(&answer) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// A process whose death is expected leaves nothing behind.
pub fn no_core_file() {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, Rlimit, setrlimit};
        let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    }
}

fn read(from: Option<impl Read>, most: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut from) = from {
        let _ = from.by_ref().take(most).read_to_end(&mut bytes);
        // whoever writes more is not to wait for a reader
        let _ = std::io::copy(&mut from, &mut std::io::sink());
    }
    bytes
}

/// How a process ended: `SIGABRT`, `exit code 1`.
pub fn how(status: ExitStatus) -> String {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return match signal {
            4 => "SIGILL".into(),
            6 => "SIGABRT".into(),
            7 if cfg!(target_os = "linux") => "SIGBUS".into(),
            10 if cfg!(target_vendor = "apple") => "SIGBUS".into(),
            8 => "SIGFPE".into(),
            9 => "SIGKILL".into(),
            11 => "SIGSEGV".into(),
            24 => "SIGXCPU".into(),
            other => format!("signal {other}"),
        };
    }
    match status.code() {
        Some(code) => format!("exit code {code}"),
        None => "no exit code".into(),
    }
}

/// The line that ggml_abort() writes, as `ggml.c:1745: GGML_ASSERT(...) failed`, without the folders of whoever built it; or
/// the last line that is one.
fn last_words(said: &[u8]) -> Option<String> {
    let said = String::from_utf8_lossy(said);
    let lines = || said.lines().map(str::trim).filter(|line| !line.is_empty());
    let asserted = |line: &&str| line.contains("GGML_ASSERT") || line.contains("GGML_ABORT");
    let line = lines().rfind(asserted).or_else(|| lines().next_back())?;
    let (place, rest) = line.split_once(": ").unwrap_or(("", line));
    let place = place.rsplit(['/', '\\']).next().unwrap_or(place);
    Some(if place.is_empty() { rest.to_owned() } else { format!("{place}: {rest}") })
}

/// Most bytes of an answer: DeepSeek V3 has a thousand tensors.
const MOST_ANSWER: u64 = 64 << 20;
/// Most bytes that are kept of what it says before it dies.
const MOST_SAID: u64 = 64 << 10;

/// What these ranges need, by llama.cpp in this process.
///
/// # Errors
/// llama.cpp does not take the model, or it cannot be cut so.
#[cfg(feature = "engine")]
pub(crate) fn survey(files: &[PathBuf], ranges: &[Range<u32>]) -> Result<Survey, Refusal> {
    let mut plan = open(files)?;
    for first in ranges.iter().map(|range| range.start).filter(|&first| first > 0) {
        plan.cut(first).map_err(|e| Refusal::Cut(first, e.to_string()))?;
    }
    let needs = ranges.iter().map(|blocks| {
        let found = plan.range(blocks.clone());
        found.map(engine::needs).map_err(|e| Refusal::Blocks(blocks.clone(), e.to_string()))
    });
    let ranges = needs.collect::<Result<_, _>>()?;
    let memory = Some(plan.memory().to_owned());
    Ok(Survey { memory, ranges })
}

/// Where a model can be cut, by llama.cpp in this process.
///
/// # Errors
/// llama.cpp does not take the model.
#[cfg(feature = "engine")]
pub(crate) fn cuts(files: &[PathBuf]) -> Result<Cuts, Refusal> {
    let mut plan = open(files)?;
    let n_blocks = plan.n_blocks();
    let cut = |block| plan.cut(block).map(engine::crossing).map_err(|e| engine::no_cut(&e, n_blocks));
    let cuts = (1..n_blocks).map(cut).collect();
    Ok(Cuts { n_blocks, memory: plan.memory().to_owned(), cuts })
}

/// Whether llama.cpp can prepare to load and evaluate what a file holds.
///
/// # Errors
/// It cannot.
#[cfg(feature = "engine")]
fn try_out(files: &[PathBuf]) -> Result<(), Refusal> {
    let mut plan = open(files)?;
    let blocks = plan.blocks();
    plan.range(blocks.clone()).map(drop).map_err(|e| Refusal::Blocks(blocks, e.to_string()))
}

#[cfg(feature = "engine")]
fn open(files: &[PathBuf]) -> Result<llama_sys_patch::GraphPlan, Refusal> {
    llama_sys_patch::GraphPlan::open(files).map_err(|error| {
        let text = error.to_string();
        let file = files.first().map(|file| format!("{}: ", file.display())).unwrap_or_default();
        // whoever shows it names the file
        let why = text.strip_prefix(&file).unwrap_or(&text).to_owned();
        match error {
            llama_sys_patch::Error::Unsupported(_) => Refusal::Kind(why),
            llama_sys_patch::Error::OutOfMemory(_) => Refusal::NoMemory(why),
            _ => Refusal::Model(why),
        }
    })
}

/// Nothing is known without llama.cpp.
#[cfg(not(feature = "engine"))]
pub(crate) fn survey(_files: &[PathBuf], _ranges: &[Range<u32>]) -> Result<Survey, Refusal> {
    Err(Refusal::Model("there is no llama.cpp in this program".into()))
}

/// Nothing is known without llama.cpp.
#[cfg(not(feature = "engine"))]
pub(crate) fn cuts(_files: &[PathBuf]) -> Result<Cuts, Refusal> {
    Err(Refusal::Model("there is no llama.cpp in this program".into()))
}

/// Nothing is known without llama.cpp.
#[cfg(not(feature = "engine"))]
fn try_out(_files: &[PathBuf]) -> Result<(), Refusal> {
    Err(Refusal::Model("there is no llama.cpp in this program".into()))
}

#[cfg(feature = "engine")]
mod engine {
    use llama_sys_patch::{Error, Layout, RangePlan, ValueType};

    use crate::needs::{Crossing, Needs, NoCut, Part, ValueKind};

    pub(super) fn no_cut(error: &Error, n_blocks: u32) -> NoCut {
        let sentence = error.to_string();
        let short = match error {
            Error::NotApart(refusal) if refusal.blocks.start == 0 => {
                refusal.reason.of("the blocks before it")
            }
            Error::NotApart(refusal) => {
                refusal.reason.of(&format!("the blocks from there to {}", n_blocks.saturating_sub(1)))
            }
            _ => sentence.clone(),
        };
        NoCut { sentence, short }
    }

    pub(super) fn needs(range: RangePlan) -> Needs {
        Needs {
            tensors: range.tensors,
            input: crossing(range.input),
            output: crossing(range.output),
            reads_tokens: range.reads_tokens,
            kv_bytes_per_position: range.cache_bytes_per_position,
            state_bytes_per_session: range.state_bytes_per_session,
        }
    }

    pub(super) fn crossing(layout: Layout) -> Crossing {
        let kind = |of| match of {
            ValueType::F32 => ValueKind::F32,
            ValueType::I32 => ValueKind::I32,
        };
        let parts = layout.parts.into_iter();
        Crossing(parts.map(|p| Part { name: p.name, kind: kind(p.value_type), values: p.values }).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_are_ggml_s_and_without_folders() {
        let said = b"loading\n/home/me/x/ggml/src/ggml.c:1745: GGML_ASSERT(n > 0) failed\n#1 backtrace\n";
        assert_eq!(last_words(said).as_deref(), Some("ggml.c:1745: GGML_ASSERT(n > 0) failed"));
        assert_eq!(last_words(b"one\n two \n\n").as_deref(), Some("two"));
        assert_eq!(last_words(b"\n"), None);
    }

    #[cfg(unix)]
    #[test]
    fn a_path_that_is_no_text_arrives_as_it_is() {
        let odd: PathBuf = paths::from_bytes(b"x\xff.gguf".to_vec());
        let line = serde_json::to_vec(&Task::Try { files: vec![odd.clone()] }).unwrap();
        assert!(matches!(serde_json::from_slice(&line), Ok(Task::Try { files }) if files == [odd.clone()]));
        let line = serde_json::to_vec(&Task::Canary { path: odd.clone(), n_embd: 1, seed: 2 }).unwrap();
        assert!(matches!(serde_json::from_slice(&line), Ok(Task::Canary { path, .. }) if path == odd));
    }

    #[test]
    fn a_process_without_memory_says_nothing_against_the_file() {
        for said in [
            "ggml.c:1644: GGML_ASSERT(ctx->mem_buffer != NULL) failed",
            "what():  std::bad_alloc",
            "memory allocation of 65536 bytes failed",
        ] {
            assert_eq!(died("SIGABRT".into(), Some(said.into())), Died::NoMemory("SIGABRT".into()), "{said}");
        }
        let other = died("SIGABRT".into(), Some("GGML_ASSERT(n > 0) failed".into()));
        assert!(matches!(other, Died::Ended { .. }), "{other}");
    }

    #[test]
    fn a_process_that_says_nothing_sensible_is_an_error() {
        let task = Task::Cuts { files: vec![] };
        let asked = |program: &str| task.ask::<Result<Cuts, Refusal>>(Path::new(program)).unwrap_err();
        assert!(matches!(asked("/nowhere/at/all"), Died::NotStarted(..)));
        assert_eq!(asked("/bin/true"), Died::Nonsense);
        assert!(matches!(asked("/bin/false"), Died::Ended { how, said: None } if how == "exit code 1"));
    }
}
