//! A chat template in a process of its own: this program again, with no environment to speak of, no files, little memory
//! and little time. One lives as long as the conversation, so that a turn costs a line of JSON each way; one that fails is
//! replaced by the next turn.
//!
//! ```text
//! Room::open    -- Source --> Jinja::new      -- Result<(), TemplateError> -->
//! Room::ask     -- Render --> Jinja::render   -- Result<String, TemplateError> -->
//!               -- Prepare -> llama.cpp       -- Result<String, TemplateError> -->
//! ```
//!
//! What its limits are, and where: the time by the clock everywhere; its processor time, address space and files on Linux,
//! its memory on macOS.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use gguf_tools::apart;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::jinja::Jinja;
use super::{STACK, Source, TemplateError, Turn, dialogue};

/// What a template is asked.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// A conversation's prompt, by MiniJinja.
    Render(Vec<Turn>),
    /// That of a dialogue and what its answer is read with, by llama.cpp: JSON both ways.
    Prepare(String),
}

/// The first argument of a process that [serves](serve) a template: no user types it.
pub const ARGUMENT: &str = "__template";

/// The longest a template may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// What a template may use besides its stack, in bytes.
pub(super) const MEMORY: u64 = 512 << 20;

/// A template behind a pipe.
#[derive(Debug)]
pub(super) struct Room {
    program: PathBuf,
    source: Source,
    process: Mutex<Option<Process>>,
}

impl Room {
    /// Has `source` read.
    pub(super) fn open(program: &Path, source: &Source) -> Result<Room, TemplateError> {
        let process = Process::start(program, source)?;
        Ok(Room { program: program.to_owned(), source: source.clone(), process: Mutex::new(Some(process)) })
    }

    pub(super) fn ask(&self, request: &Request) -> Result<String, TemplateError> {
        let mut place = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        // one that was ended between two turns, by whomever, is no fault of the template
        let alive = place.take().filter(Process::is_alive);
        let mut process = match alive {
            Some(process) => process,
            None => Process::start(&self.program, &self.source)?,
        };
        // only one that has answered is asked again
        let answer = process.ask(request)?;
        *place = Some(process);
        answer
    }
}

/// The process, and a thread that waits for what it writes.
#[derive(Debug)]
struct Process {
    child: Child,
    requests: Sender<Vec<u8>>,
    /// lines, without their ends; an empty one: it writes no more
    answers: Receiver<Vec<u8>>,
}

impl Process {
    /// A process that has read `source`.
    fn start(program: &Path, source: &Source) -> Result<Process, TemplateError> {
        let mut command = Command::new(program);
        command.arg(ARGUMENT).env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.envs(KEPT.iter().filter_map(|name| std::env::var_os(name).map(|value| (name, value))));
        // a Ctrl-C is meant for the conversation
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(command.current_dir("/"), 0);
        let not_started = |e: io::Error| TemplateError::NotStarted(format!("{}: {e}", program.display()));
        let mut child = command.spawn().map_err(not_started)?;
        let (requests, to_be_sent) = channel();
        let (to_be_read, answers) = channel();
        if let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) {
            let thread = thread::Builder::new().name("template".into());
            thread
                .spawn(move || carry(to, BufReader::new(from), &to_be_sent, &to_be_read))
                .map_err(not_started)?;
        }
        let mut process = Process { child, requests, answers };
        // how long the system takes to start a program is not the template's fault
        let greeting: String = process.answer(START_PATIENCE).map_err(|e| match e {
            TemplateError::Slow => TemplateError::NotStarted("it does not answer".into()),
            TemplateError::Died(how) => TemplateError::NotStarted(how),
            other => other,
        })?;
        if greeting != ARGUMENT {
            return Err(TemplateError::NotStarted(format!("{} is another program", program.display())));
        }
        let read: Result<(), TemplateError> = process.ask(source)?;
        read?;
        Ok(process)
    }

    fn is_alive(&self) -> bool {
        // its end of the pipe closes with it
        !matches!(self.answers.try_recv(), Ok(_) | Err(std::sync::mpsc::TryRecvError::Disconnected))
    }

    /// Sends a line and reads the one that answers it.
    fn ask<T: DeserializeOwned>(&mut self, request: &impl Serialize) -> Result<T, TemplateError> {
        let mut line = serde_json::to_vec(request).map_err(|e| TemplateError::Failed(e.to_string()))?;
        line.push(b'\n');
        // one that has ended says so below
        let _ = self.requests.send(line);
        self.answer(PATIENCE)
    }

    fn answer<T: DeserializeOwned>(&mut self, patience: Duration) -> Result<T, TemplateError> {
        match self.answers.recv_timeout(patience) {
            Ok(line) if !line.is_empty() => serde_json::from_slice(&line)
                .map_err(|_| TemplateError::Died("it answers something else".into())),
            Ok(_) | Err(RecvTimeoutError::Disconnected) => Err(self.how_it_died()),
            Err(RecvTimeoutError::Timeout) => Err(TemplateError::Slow),
        }
    }

    fn how_it_died(&mut self) -> TemplateError {
        // it has closed its output: if it lives, it does nothing that is waited for
        let _ = self.child.kill();
        let mut said = Vec::new();
        if let Some(stderr) = &mut self.child.stderr {
            let _ = stderr.take(MOST_SAID).read_to_end(&mut said);
        }
        let said = String::from_utf8_lossy(&said);
        let status = match self.child.wait() {
            Ok(status) => status,
            Err(e) => return TemplateError::Died(e.to_string()),
        };
        let how = apart::how(status);
        match how.as_str() {
            _ if status.code() == Some(TOO_MUCH_MEMORY) => TemplateError::TooMuchMemory,
            // its processor time was over before the clock's was
            "SIGXCPU" => TemplateError::Slow,
            _ if said.contains(STD_ON_STACK) => TemplateError::TooDeep,
            _ if said.contains(STD_ON_MEMORY) => TemplateError::TooMuchMemory,
            _ => TemplateError::Died(how),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Carries lines both ways until either side ends.
fn carry(
    mut to: ChildStdin,
    mut from: BufReader<ChildStdout>,
    requests: &Receiver<Vec<u8>>,
    answers: &Sender<Vec<u8>>,
) {
    loop {
        let mut line = Vec::new();
        let read = from.by_ref().take(MOST_ANSWER).read_until(b'\n', &mut line);
        if read.is_err() || line.pop() != Some(b'\n') || answers.send(line).is_err() {
            let _ = answers.send(Vec::new());
            return;
        }
        let Ok(request) = requests.recv() else { return };
        // one that reads no more closes its other pipe too
        let _ = to.write_all(&request);
    }
}

/// The life of a process that was started for a template.
pub fn serve() -> ExitCode {
    apart::no_core_file();
    close_what_was_inherited();
    limit_memory();
    // it is told by its end: see `Process::how_it_died`
    let room = thread::Builder::new().name("template".into()).stack_size(STACK).spawn(|| {
        let mut requests = io::stdin().lock();
        answer(&ARGUMENT)?;
        let source: Source = request(&mut requests)?;
        let jinja = Jinja::new(&source);
        answer(&jinja.as_ref().map(drop))?;
        let jinja = jinja.map_err(io::Error::other)?;
        let mut common = None;
        loop {
            match request(&mut requests)? {
                Request::Render(turns) => answer(&jinja.render(&turns))?,
                Request::Prepare(wanted) => answer(&dialogue::prepare(&mut common, &source, &wanted))?,
            }
        }
    });
    let ended: io::Result<()> = match room.map(thread::JoinHandle::join) {
        Ok(Ok(ended)) => ended,
        Ok(Err(_)) | Err(_) => return ExitCode::FAILURE,
    };
    match ended {
        Err(e) if e.kind() != io::ErrorKind::UnexpectedEof => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    }
}

/// The next line. The clock runs from here on.
fn request<T: for<'de> Deserialize<'de>>(from: &mut impl BufRead) -> io::Result<T> {
    let mut line = Vec::new();
    from.read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    limit_processor_time();
    Ok(serde_json::from_slice(&line)?)
}

fn answer(answer: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    let mut stdout = io::stdout().lock();
    stdout.write_all(&line)?;
    stdout.flush()
}

/// Closes all but the three pipes. What the program opened itself it does not inherit; what the program was started with,
/// by a shell or by make, it would.
#[cfg(unix)]
fn close_what_was_inherited() {
    let open = std::fs::read_dir("/dev/fd").map(|files| {
        let names = files.filter_map(|file| file.ok()?.file_name().to_str()?.parse::<i32>().ok());
        names.filter(|&file| file > 2).collect::<Vec<_>>()
    });
    for file in open.unwrap_or_default() {
        // the directory's own is closed already
        let _ = nix::unistd::close(file);
    }
}

#[cfg(not(unix))]
fn close_what_was_inherited() {}

/// Memory, and what else a template has no need of.
#[cfg(target_os = "linux")]
fn limit_memory() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let to = |most: u64| Rlimit { current: Some(most), maximum: Some(most) };
    // what the program itself is mapped to: pages, the first number
    let mapped = std::fs::read_to_string("/proc/self/statm").ok();
    let mapped = mapped.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
    let mapped = mapped.unwrap_or(0) * rustix::param::page_size() as u64;
    let _ = setrlimit(Resource::As, to(mapped + STACK as u64 + MEMORY));
    let _ = setrlimit(Resource::Nproc, to(0));
    let _ = setrlimit(Resource::Fsize, to(0));
}

/// There is no such limit on macOS: a thread looks.
#[cfg(target_os = "macos")]
fn limit_memory() {
    use libproc::libproc::pid_rusage::{RUsageInfoV4, pidrusage};
    let Ok(pid) = i32::try_from(std::process::id()) else { return };
    thread::spawn(move || {
        loop {
            match pidrusage::<RUsageInfoV4>(pid) {
                Ok(used) if used.ri_phys_footprint > STACK as u64 + MEMORY => {
                    std::process::exit(TOO_MUCH_MEMORY);
                }
                _ => thread::sleep(Duration::from_millis(20)),
            }
        }
    });
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
fn limit_memory() {}

/// For what it does from now on. The clock of whoever waits is the shorter one: this is for a process that nobody waits for.
#[cfg(target_os = "linux")]
fn limit_processor_time() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    use rustix::time::{ClockId, clock_gettime};
    let used = u64::try_from(clock_gettime(ClockId::ProcessCPUTime).tv_sec).unwrap_or(0);
    let limit = Rlimit { current: Some(used + PATIENCE.as_secs() + 2), ..getrlimit(Resource::Cpu) };
    let _ = setrlimit(Resource::Cpu, limit);
}

#[cfg(not(target_os = "linux"))]
fn limit_processor_time() {}

/// What of the environment it is left: the time zone, and what Windows and dynamic linkers need.
const KEPT: [&str; 5] = ["TZ", "TZDIR", "SystemRoot", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"];
const START_PATIENCE: Duration = Duration::from_secs(60);
/// The largest text there may be, every character of it escaped.
const MOST_ANSWER: u64 = 6 * super::MAX_TEXT_BYTES as u64 + 1024;
const MOST_SAID: u64 = 64 << 10;
/// The exit code of a process that has found out by itself that it uses too much.
const TOO_MUCH_MEMORY: i32 = 77;
/// What Rust's standard library writes before it aborts. Both ends are the same SIGABRT, and whoever wants to say more than
/// that himself needs `unsafe` (an allocator or a handler of signals of his own; `set_alloc_error_hook` is unstable). Nothing
/// of the template is written there, and the program is this one, with this standard library: where it says something else
/// one day, the error is [`TemplateError::Died`], and `tests/templates.rs` fails.
const STD_ON_STACK: &str = "overflowed its stack";
const STD_ON_MEMORY: &str = "memory allocation of";
