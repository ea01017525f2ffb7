//! The rounds: every arm as a process of its own, one after the other, again and again.
//!
//! ```text
//! round 0   split, solo, ...   first load: files evicted from the page cache, process started, first token timed
//! round 1   split, solo, ...   steady: the process evaluates the prompt once unmeasured, then prompt and generation
//! round 2   split, solo, ...
//! ```
//!
//! A b a b: what changes on the machine over the minutes changes for all arms alike. A round in which a worker was
//! lost, a process ended before its time or fewer tokens came than were asked for is written down, marked, and not
//! counted.
//!
//! With a memory limit an arm's files are evicted before every round, not only the first: the page cache belongs to
//! the group that read it first, and what another arm has read would be there for nothing.

use std::fs::File;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, SystemTime};

use crate::cgroup::MemoryGroup;
use crate::energy::Meter;
use crate::launch::{Confinement, Ended, Program, Server, beside};
use crate::link::{Link, LinkTraffic};
use crate::machine::{Machine, SystemActivity, Versions, evict, rfc3339};
use crate::record::{Arm, ModelFile, Phase, Record, SCHEMA, Scenario, append};
use crate::report::gigabytes;
use dim::host::report::{Report, Stop};
use gguf_tools::failure::Failure;

/// What is to be measured, everything found and checked.
#[derive(Debug)]
pub struct Experiment {
    /// The arms in the order in which they run.
    pub arms: Vec<Arm>,
    /// Rounds after the first.
    pub rounds: u32,
    /// What all arms have in common.
    pub scenario: Scenario,
    /// The whole model.
    pub model: PathBuf,
    /// Its parts, when it has several.
    pub model_parts: Vec<PathBuf>,
    /// The manifest of the cut model.
    pub split: PathBuf,
    /// The slices that the host reads.
    pub host_slices: Vec<PathBuf>,
    /// The quantised models, by arm.
    pub quantised: Vec<(Arm, PathBuf)>,
    /// The workers.
    pub workers: Workers,
    /// Where stock llama.cpp's RPC server is; needed by [`Arm::Rpc`].
    pub rpc: Option<RpcServer>,
    /// The key shared with the workers.
    pub key_file: Option<PathBuf>,
    /// The prompt's arguments: `-p TEXT --prompt-tokens N`.
    pub prompt: Vec<String>,
    /// More arguments of every host process.
    pub machine: Vec<String>,
    /// How long a process may take.
    pub time_limit: Duration,
    /// Where records, logs and reports go.
    pub out: PathBuf,
}

/// Who holds the middles.
#[derive(Debug)]
pub enum Workers {
    /// Workers that run already, on other machines or this one.
    Running(Vec<String>),
    /// Slices for workers that are started here.
    Local {
        /// `dim-worker`.
        program: PathBuf,
        /// The middle slices in order.
        slices: Vec<PathBuf>,
    },
}

/// Where stock llama.cpp's RPC server is.
#[derive(Debug)]
pub enum RpcServer {
    /// Runs already.
    Running(String),
    /// Is started here, with the limits of a worker.
    Local,
}

/// The file of the records, below the output folder.
pub const RECORDS: &str = "results.jsonl";

/// Runs everything. `tell` gets a line for a person now and then.
pub fn run(plan: &Experiment, mut tell: impl FnMut(&str)) -> Result<PathBuf, Failure> {
    let cannot_write =
        |e: std::io::Error| Failure::misuse(format!("cannot write to {}: {e}", plan.out.display()));
    let logs = plan.out.join("logs");
    std::fs::create_dir_all(&logs).map_err(cannot_write)?;
    let records = plan.out.join(RECORDS);
    let mut stand = Stand::new(plan, logs)?;
    let total = plan.arms.len() as u32 * (plan.rounds + 1);
    let mut done = 0;
    for round in 0..=plan.rounds {
        for &arm in &plan.arms {
            done += 1;
            let record = stand.run_arm(arm, round)?;
            append(&records, &record).map_err(cannot_write)?;
            tell(&format!("[{done}/{total}] {}", describe(&record)));
        }
    }
    Ok(records)
}

/// What stands on this machine for the time of a run: workers, the RPC server, the link before each.
struct Stand<'a> {
    plan: &'a Experiment,
    /// the program that is measured
    host: PathBuf,
    logs: PathBuf,
    // links before servers, servers before groups: a group can only go when nobody is in it
    worker_links: Vec<Link>,
    rpc_link: Option<Link>,
    workers: Vec<Server>,
    rpc: Option<Server>,
    worker_groups: Vec<MemoryGroup>,
    rpc_group: Option<MemoryGroup>,
    machine: Machine,
}

impl<'a> Stand<'a> {
    fn new(plan: &'a Experiment, logs: PathBuf) -> Result<Stand<'a>, Failure> {
        let mut stand = Stand {
            plan,
            host: beside("dim-host")?,
            logs,
            worker_links: Vec::new(),
            rpc_link: None,
            workers: Vec::new(),
            rpc: None,
            worker_groups: Vec::new(),
            rpc_group: None,
            machine: Machine::describe(),
        };
        // a limit that cannot be had is known before anything was measured
        stand.host_group(Arm::Split)?;
        if let (Workers::Local { slices, .. }, Some(limit)) =
            (&plan.workers, plan.scenario.worker_memory_limit_bytes)
        {
            for _ in slices {
                stand.worker_groups.push(group(limit)?);
            }
        }
        if let (Some(RpcServer::Local), Some(limit)) = (&plan.rpc, plan.scenario.worker_memory_limit_bytes) {
            stand.rpc_group = Some(group(limit)?);
        }
        Ok(stand)
    }

    /// The limited group of an arm's host process, new for every process so that its peak is that process's own.
    fn host_group(&self, arm: Arm) -> Result<Option<MemoryGroup>, Failure> {
        match self.plan.scenario.memory_limit_bytes {
            Some(limit) if arm != Arm::SoloUnlimited => group(limit).map(Some),
            _ => Ok(None),
        }
    }

    fn run_arm(&mut self, arm: Arm, round: u32) -> Result<Record, Failure> {
        let plan = self.plan;
        let phase = if round == 0 { Phase::First } else { Phase::Steady };
        match arm {
            Arm::Split => self.need_workers()?,
            Arm::Rpc => self.need_rpc()?,
            _ => {}
        }
        let program = self.program(arm, phase);
        let files = self.files(arm);
        let group = self.host_group(arm)?;
        let cold = phase == Phase::First || group.is_some();
        let cold_cache = cold && files.iter().filter(|f| !evict(f)).count() == 0;

        let log_path = self.logs.join(format!("{}-{round}.log", arm.name()));
        let log = File::create(&log_path)
            .map_err(|e| Failure::misuse(format!("cannot write {}: {e}", log_path.display())))?;
        let before: Vec<_> = self.servers(arm).iter().map(Server::usage).collect();
        let (link_before, system_before) = (self.link_traffic(arm), SystemActivity::now());
        let meter = Meter::start();
        let place = Confinement { group: group.as_ref(), cpus: &plan.scenario.host_cpus };
        let ended = program
            .run(place, log, plan.time_limit)
            .map_err(|e| Failure::failed(format!("cannot run {}: {e}", program.file.display())))?;
        let energy = meter.and_then(Meter::finish);
        let system = SystemActivity::now().since(system_before);
        let workers = self.servers(arm).iter().zip(&before).map(|(s, &then)| s.usage().since(then)).collect();
        let link_traffic = self.link_traffic(arm).zip(link_before).map(|(now, then)| now.since(then));

        let report = last_object(&ended.stdout);
        let oom = group.as_ref().is_some_and(|g| g.oom_kills() > 0);
        let server_died = self.servers_mut(arm).iter_mut().any(|s| !s.is_alive());
        let not_counted = why_not(
            &ended,
            report.as_ref(),
            plan,
            oom.then_some(&group).and_then(Option::as_ref),
            server_died,
        )
        .map(|why| match last_line(&log_path) {
            Some(line) if report.is_none() => format!("{why}: {line}"),
            _ => why,
        });
        Ok(Record {
            schema: SCHEMA,
            date: rfc3339(SystemTime::now()),
            arm,
            round,
            phase,
            not_counted,
            scenario: plan.scenario.clone(),
            model: model_file(&files),
            command: program.shown(),
            report,
            host: ended.usage,
            host_group_peak_bytes: group.as_ref().and_then(MemoryGroup::peak_bytes),
            workers,
            link_traffic,
            system,
            energy,
            cold_cache,
            machine: self.machine.clone(),
            versions: Versions {
                dim: env!("CARGO_PKG_VERSION").to_owned(),
                llama_cpp_sys_2: llama_sys_patch::LLAMA_CPP_SYS_VERSION.to_owned(),
            },
        })
    }

    /// The servers started here that an arm computes with.
    fn servers(&self, arm: Arm) -> &[Server] {
        match arm {
            Arm::Split => &self.workers,
            Arm::Rpc => self.rpc.as_slice(),
            _ => &[],
        }
    }

    fn servers_mut(&mut self, arm: Arm) -> &mut [Server] {
        match arm {
            Arm::Split => &mut self.workers,
            Arm::Rpc => self.rpc.as_mut_slice(),
            _ => &mut [],
        }
    }

    /// The host process of an arm.
    fn program(&self, arm: Arm, phase: Phase) -> Program {
        let plan = self.plan;
        let mut program = Program::new(&self.host);
        match arm {
            Arm::Split => {
                program = program.arg("generate").arg("--split").arg(&plan.split);
                for address in self.worker_addresses() {
                    program = program.arg("--worker").arg(address);
                }
                if let Some(key) = &plan.key_file {
                    program = program.arg("--key-file").arg(key);
                }
                program = program.arg("--wire").arg(&plan.scenario.wire);
            }
            Arm::Solo | Arm::SoloUnlimited => program = program.arg("stock").arg("--model").arg(&plan.model),
            Arm::Rpc => {
                program = program.arg("stock").arg("--model").arg(&plan.model);
                program = program.arg("--rpc").arg(self.rpc_address());
                program = program.arg("--rpc-blocks").arg(plan.scenario.remote_blocks.to_string());
            }
            Arm::Q8_0 | Arm::Q4KM => {
                program = program.arg("stock").arg("--model").arg(self.quantised(arm));
            }
        }
        program = program.args(&plan.prompt);
        program = program.arg("-n").arg(plan.scenario.n_predict.to_string());
        program = program.args(["--temp", "0", "--ignore-eos", "--json"]);
        program = program.arg("--ctx").arg(plan.scenario.n_ctx.to_string());
        program = program.arg("--threads").arg(plan.scenario.threads.to_string());
        program = program.args(&plan.machine);
        if phase == Phase::Steady { program.arg("--warm-up") } else { program }
    }

    /// The model files that the host process of an arm reads.
    fn files(&self, arm: Arm) -> Vec<PathBuf> {
        match arm {
            Arm::Split => self.plan.host_slices.clone(),
            Arm::Solo | Arm::SoloUnlimited | Arm::Rpc => self.plan.model_parts.clone(),
            Arm::Q8_0 | Arm::Q4KM => vec![self.quantised(arm).to_owned()],
        }
    }

    fn quantised(&self, arm: Arm) -> &Path {
        let found = self.plan.quantised.iter().find(|(a, _)| *a == arm);
        found
            .map(|(_, path)| path.as_path())
            .expect("every quantised arm has its file: the plan was made from the arms")
    }

    /// What the host dials, a link where there is one.
    fn worker_addresses(&self) -> Vec<String> {
        if !self.worker_links.is_empty() {
            return self.worker_links.iter().map(|l| l.addr().to_string()).collect();
        }
        match &self.plan.workers {
            Workers::Running(addresses) => addresses.clone(),
            Workers::Local { .. } => self.workers.iter().map(|w| w.address().to_owned()).collect(),
        }
    }

    fn rpc_address(&self) -> String {
        match (&self.rpc_link, &self.rpc, &self.plan.rpc) {
            (Some(link), _, _) => link.addr().to_string(),
            (None, Some(server), _) => server.address().to_owned(),
            (None, None, Some(RpcServer::Running(address))) => address.clone(),
            _ => String::new(),
        }
    }

    fn link_traffic(&self, arm: Arm) -> Option<LinkTraffic> {
        let links: Vec<&Link> = match arm {
            Arm::Split => self.worker_links.iter().collect(),
            Arm::Rpc => self.rpc_link.iter().collect(),
            _ => Vec::new(),
        };
        links.into_iter().map(Link::traffic).reduce(LinkTraffic::plus)
    }

    /// Every worker runs, and a link stands before it: what died in the last round starts again.
    fn need_workers(&mut self) -> Result<(), Failure> {
        let plan = self.plan;
        if let Workers::Local { program, slices } = &plan.workers {
            for (i, slice) in slices.iter().enumerate() {
                if self.workers.get_mut(i).is_some_and(Server::is_alive) {
                    continue;
                }
                let mut worker = Program::new(program).arg(slice).args(["--listen", "127.0.0.1:0"]);
                if let Some(key) = &plan.key_file {
                    worker = worker.arg("--key-file").arg(key);
                }
                worker = worker.arg("--ctx").arg(plan.scenario.n_ctx.to_string());
                worker = worker.arg("--threads").arg(plan.scenario.threads.to_string());
                let place =
                    Confinement { group: self.worker_groups.get(i), cpus: &plan.scenario.worker_cpus };
                let log = self.logs.join(format!("worker-{i}.log"));
                let server = Server::start(&worker, place, &log, SERVER_PATIENCE).map_err(Failure::failed)?;
                let link = match plan.scenario.link {
                    Some(options) => Some(Link::start(server.address(), options).map_err(no_link)?),
                    None => None,
                };
                replace(&mut self.workers, i, server);
                if let Some(link) = link {
                    replace(&mut self.worker_links, i, link);
                }
            }
        }
        if let (Workers::Running(addresses), Some(options)) = (&plan.workers, plan.scenario.link) {
            for address in &addresses[self.worker_links.len()..] {
                self.worker_links.push(Link::start(address, options).map_err(no_link)?);
            }
        }
        Ok(())
    }

    fn need_rpc(&mut self) -> Result<(), Failure> {
        let plan = self.plan;
        if matches!(plan.rpc, Some(RpcServer::Local)) && !self.rpc.as_mut().is_some_and(Server::is_alive) {
            let program = Program::new(std::env::current_exe().map_err(Failure::failed)?).args([
                "rpc-server",
                "--listen",
                "127.0.0.1:0",
                "--threads",
            ]);
            let program = program.arg(plan.scenario.threads.to_string());
            let place = Confinement { group: self.rpc_group.as_ref(), cpus: &plan.scenario.worker_cpus };
            let log = self.logs.join("rpc-server.log");
            self.rpc = Some(Server::start(&program, place, &log, SERVER_PATIENCE).map_err(Failure::failed)?);
            self.rpc_link = None;
        }
        if let (None, Some(options)) = (&self.rpc_link, plan.scenario.link) {
            self.rpc_link = Some(Link::start(&self.rpc_address(), options).map_err(no_link)?);
        }
        Ok(())
    }
}

fn group(limit: u64) -> Result<MemoryGroup, Failure> {
    MemoryGroup::new(limit).map_err(|e| Failure::misuse(&e).hint(e.hint()))
}

fn no_link(e: std::io::Error) -> Failure {
    Failure::failed(format!("cannot start the link emulator: {e}"))
}

fn replace<T>(list: &mut Vec<T>, i: usize, new: T) {
    match list.get_mut(i) {
        Some(old) => *old = new,
        None => list.push(new),
    }
}

/// Why a round does not count.
fn why_not(
    ended: &Ended,
    report: Option<&Report>,
    plan: &Experiment,
    out_of: Option<&MemoryGroup>,
    server_died: bool,
) -> Option<String> {
    if let Some(group) = out_of {
        let limit = gigabytes(group.limit_bytes());
        return Some(format!("ended by the kernel: more memory than its limit of {limit}"));
    }
    let Some(status) = ended.status else {
        return Some(format!("not done after {} s", plan.time_limit.as_secs()));
    };
    if server_died {
        return Some("the worker's process ended in the middle".to_owned());
    }
    if let Some(lost) = report.map(|r| r.stages.iter().map(|s| s.reconnects).sum::<u32>()).filter(|&n| n > 0)
    {
        return Some(format!("a worker was lost and found again {lost}x"));
    }
    if !status.success() {
        let why = report.and_then(|r| r.error.as_ref()).map_or(String::new(), |e| format!(" ({e})"));
        return Some(format!("{}{why}", ending(status)));
    }
    let Some(report) = report else { return Some("said nothing that could be read".to_owned()) };
    if report.tokens.len() < plan.scenario.n_predict {
        let wanted = plan.scenario.n_predict;
        let why = if report.stop == Stop::ContextFull { ": the context is full" } else { "" };
        return Some(format!("{} of {wanted} tokens{why}", report.tokens.len()));
    }
    None
}

fn ending(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("ended by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// The report is the last line of stdout that is one.
fn last_object(stdout: &str) -> Option<Report> {
    stdout.lines().rev().find_map(|line| serde_json::from_str(line).ok())
}

/// The last line of a log that says what is wrong, or the last line at all.
fn last_line(log: &Path) -> Option<String> {
    let bytes = std::fs::read(log).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let said = |line: &&str| !line.trim().is_empty();
    let error = text.lines().rev().filter(said).find(|l| l.starts_with("error:"));
    error.or_else(|| text.lines().rev().find(said)).map(|l| l.trim().to_owned())
}

fn model_file(files: &[PathBuf]) -> ModelFile {
    let name = files.first().and_then(|f| f.file_name()).unwrap_or_default().to_string_lossy().into_owned();
    ModelFile { name, bytes: files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum() }
}

/// A line for a person.
fn describe(record: &Record) -> String {
    let what = match record.phase {
        Phase::First => "first load".to_owned(),
        Phase::Steady => format!("round {}", record.round),
    };
    let figures = record.report.as_ref().map_or("no report".to_owned(), |r| {
        format!(
            "generation {:.2} tok/s, prompt {:.2} tok/s, first token {:.2} s after the start",
            r.gen_tok_s,
            r.prompt_tok_s,
            r.start_to_first_token_ms / 1e3
        )
    });
    let mark = record.not_counted.as_ref().map_or(String::new(), |why| format!("; NOT COUNTED: {why}"));
    format!("{what}, {}: {figures}{mark}", record.arm.title())
}

/// How long a worker may take until it listens; it checks and loads its slice before.
const SERVER_PATIENCE: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests;
