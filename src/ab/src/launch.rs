//! Programs started in a place of their own: in a memory group, on chosen cores, watched from outside.
//!
//! What has to be done inside the new process before the program starts is done by this program: it starts itself
//! with `launch`, which enters the group, pins itself and becomes the program (`exec`). The number of the process
//! stays the same, so nothing the program does is missed.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use gguf_tools::failure::Failure;

use super::cgroup::MemoryGroup;
use super::usage::{self, Usage, Watch};

/// Where a program runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Confinement<'a> {
    /// Its memory group.
    pub group: Option<&'a MemoryGroup>,
    /// The cores it may use; none: all.
    pub cpus: &'a [usize],
}

/// A program of this project: it stands beside this one.
///
/// # Errors
/// It does not.
pub fn beside(name: &str) -> Result<PathBuf, Failure> {
    let here =
        std::env::current_exe().map_err(|e| Failure::failed(format!("this program's own file: {e}")))?;
    let file = here.with_file_name(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    if file.is_file() {
        return Ok(file);
    }
    Err(Failure::misuse(format!("{} is not there", file.display()))
        .hint(format!("build {name} too: cargo build --release --workspace")))
}

/// A program and what it is given.
#[derive(Clone, Debug)]
pub struct Program {
    /// The file.
    pub file: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
}

/// How a program ended, and what it used.
#[derive(Debug)]
pub struct Ended {
    /// Its status; `None` when it was ended for taking too long.
    pub status: Option<ExitStatus>,
    /// What it printed on stdout.
    pub stdout: String,
    /// What it used.
    pub usage: Usage,
}

impl Program {
    /// A program beside this one, or this one itself.
    pub fn new(file: impl Into<PathBuf>) -> Program {
        Program { file: file.into(), args: Vec::new() }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Program {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Program {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// The command line as a record keeps it: files by their names alone, since whose directories they are in is
    /// nobody's business.
    pub fn shown(&self) -> Vec<String> {
        let name = |arg: &OsStr| {
            let text = arg.to_string_lossy();
            let path = Path::new(arg);
            match path.file_name() {
                Some(name) if text.contains('/') && path.exists() => name.to_string_lossy().into_owned(),
                _ => text.into_owned(),
            }
        };
        std::iter::once(name(self.file.as_os_str())).chain(self.args.iter().map(|a| name(a))).collect()
    }

    /// Runs it to its end, its stderr into `log`.
    pub fn run(&self, place: Confinement<'_>, log: File, time_limit: Duration) -> io::Result<Ended> {
        let deadline = Instant::now() + time_limit;
        let mut child = self.spawn(place, log)?;
        let watch = Watch::start(child.id());
        let mut stdout = child.stdout.take().expect("stdout is piped");
        let reader = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stdout.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        let in_time = wait_for_end(&child, deadline)?;
        if !in_time {
            child.kill()?;
            wait_for_end(&child, Instant::now() + Duration::from_secs(30))?;
        }
        // the process has ended, and is still known to the system: its counters are whole now
        let usage = watch.finish();
        let status = child.wait()?;
        let stdout = reader.join().unwrap_or_default();
        Ok(Ended { status: in_time.then_some(status), stdout, usage })
    }

    fn spawn(&self, place: Confinement<'_>, log: File) -> io::Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("launch");
        if let Some(group) = place.group {
            command.arg("--group").arg(group.procs_file());
        }
        if !place.cpus.is_empty() {
            let cpus: Vec<String> = place.cpus.iter().map(usize::to_string).collect();
            command.arg("--cpus").arg(cpus.join(","));
        }
        command.arg("--").arg(&self.file).args(&self.args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn()
    }
}

/// What `launch` does: never returns when it succeeds.
pub fn enter(group: Option<&Path>, cpus: &[usize], program: &OsStr, args: &[OsString]) -> io::Error {
    let become_program = || -> io::Result<io::Error> {
        if let Some(procs) = group {
            std::fs::write(procs, std::process::id().to_string())
                .map_err(|e| io::Error::new(e.kind(), format!("cannot enter {}: {e}", procs.display())))?;
        }
        pin(cpus)?;
        Ok(exec(program, args))
    };
    become_program().unwrap_or_else(|e| e)
}

/// Whether processes can be pinned to cores here.
pub const CAN_PIN: bool = cfg!(target_os = "linux");

#[cfg(target_os = "linux")]
fn pin(cpus: &[usize]) -> io::Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = rustix::thread::CpuSet::new();
    for &cpu in cpus {
        if cpu >= rustix::thread::CpuSet::MAX_CPU {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("there is no core {cpu}")));
        }
        set.set(cpu);
    }
    rustix::thread::sched_setaffinity(None, &set)
        .map_err(|e| io::Error::new(e.kind(), format!("cannot run on cores {cpus:?}: {e}")))
}

#[cfg(not(target_os = "linux"))]
fn pin(cpus: &[usize]) -> io::Result<()> {
    match cpus {
        [] => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "processes cannot be pinned to cores on this system",
        )),
    }
}

fn exec(program: &OsStr, args: &[OsString]) -> io::Error {
    use std::os::unix::process::CommandExt;
    let e = Command::new(program).args(args).exec();
    io::Error::new(e.kind(), format!("cannot start {}: {e}", program.display()))
}

/// Waits until a child has ended, without taking it off the system's list; false when the time is over first.
fn wait_for_end(child: &Child, deadline: Instant) -> io::Result<bool> {
    let pid = Pid::from_child(child);
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    loop {
        if waitid(WaitId::Pid(pid), options)?.is_some() {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A program that serves until it is dropped: a worker, an RPC server.
#[derive(Debug)]
pub struct Server {
    child: Child,
    address: String,
}

/// Why a server does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// It could not be started.
    #[error("cannot start {program}: {source}")]
    Start {
        /// Which.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// It ended, or said nothing in time.
    #[error("{program} {what}; it said: {log}")]
    NotReady {
        /// Which.
        program: String,
        /// What happened.
        what: &'static str,
        /// The end of its log.
        log: String,
    },
}

impl Server {
    /// Starts it and waits for its line `listening on ADDRESS`. Its stderr goes to `log`.
    pub fn start(
        program: &Program,
        place: Confinement<'_>,
        log: &Path,
        patience: Duration,
    ) -> Result<Server, ServerError> {
        let name = || program.shown().remove(0);
        let start_error = |source| ServerError::Start { program: name(), source };
        let file = File::create(log).map_err(start_error)?;
        let mut child = program.spawn(place, file).map_err(start_error)?;
        let stdout = child.stdout.take().expect("stdout is piped");
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            // read to its end, or the server would stand still once the pipe is full
            for line in BufReader::new(stdout).lines() {
                let Ok(line) = line else { return };
                if let Some((_, address)) = line.split_once("listening on ") {
                    let _ = tell.send(address.trim().to_owned());
                }
            }
        });
        let mut server = Server { child, address: String::new() };
        match told.recv_timeout(patience) {
            Ok(address) => server.address = address,
            Err(e) => {
                let what = match e {
                    mpsc::RecvTimeoutError::Timeout => "is not ready in time",
                    mpsc::RecvTimeoutError::Disconnected => "ended before it was ready",
                };
                let text = std::fs::read_to_string(log).unwrap_or_default();
                let last = text.lines().rfind(|l| !l.trim().is_empty()).unwrap_or("nothing").to_owned();
                return Err(ServerError::NotReady { program: name(), what, log: last });
            }
        }
        Ok(server)
    }

    /// Where it listens, as it says.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The number of its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// What it has used so far.
    pub fn usage(&self) -> Usage {
        usage::sample(self.child.id())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
