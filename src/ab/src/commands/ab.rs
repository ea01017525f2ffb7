//! `dim-host ab`: the split against the other ways to run the same model on this machine.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gguf_tools::gguf::Gguf;
use gguf_tools::manifest::{Manifest, SliceEntry};
use gguf_tools::plan::Role;

use crate::commands::same_model;
use crate::launch::{CAN_PIN, Program, beside};
use crate::link::LinkOptions;
use crate::record::{Arm, Scenario};
use crate::report::{Page, read_all};
use crate::run::{Experiment, RpcServer, Workers, run as run_plan};
use dim::stage::load::model_name;
use dim::stage::verified::open_slice;
use dim::{RowType, Verify};
use dim_cli::args::{cut_from, row_type};
use dim_cli::explain;
use dim_cli::progress::ProgressLine;
use gguf_tools::failure::Failure;
use gguf_tools::{tell, terminal};

/// Arguments of `dim-host ab`.
#[derive(Debug, clap::Args)]
pub struct AbArgs {
    /// The whole model
    #[arg(short = 'm', long, value_name = "MODEL.gguf")]
    model: PathBuf,
    /// The same model, cut by dim-split
    #[arg(long, value_name = "STEM.split.json")]
    split: PathBuf,
    /// A worker that runs already (repeat for more; default: one is started here for every middle)
    #[arg(long, value_name = "ADDR:PORT")]
    worker: Vec<String>,
    /// The key shared with the workers (default: the one from pairing; a fresh one for workers started here)
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// What to compare with
    #[arg(long, value_enum, value_name = "ARMS", value_delimiter = ',', default_value = "solo")]
    baseline: Vec<Arm>,
    /// llama.cpp's RPC server, if it runs already (default: it is started here)
    #[arg(long, value_name = "ADDR:PORT")]
    rpc: Option<String>,

    /// The prompt's text, repeated or cut to its number of tokens
    #[arg(short = 'p', long, value_name = "TEXT", default_value = PROMPT, hide_default_value = true)]
    prompt: String,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    prompt_tokens: u32,
    /// Tokens to generate
    #[arg(short = 'n', long = "predict", value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    n_predict: u32,
    /// Rounds after the first load
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=1_000))]
    rounds: u32,
    /// Number format of the rows that cross the network
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = row_type())]
    wire: RowType,

    /// Compute threads of each process (default: one per core)
    #[arg(short = 't', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=512))]
    threads: Option<u32>,
    /// Context of each process (default: what prompt and reply need)
    #[arg(short = 'c', long = "ctx", value_name = "N")]
    n_ctx: Option<u32>,
    /// Memory each host process may use, page cache included, as 12GB (Linux; not for the arm solo-unlimited)
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory_limit: Option<u64>,
    /// Memory each worker started here may use
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    worker_memory_limit: Option<u64>,
    /// Cores of the host processes, as 0 or 0,1 (Linux)
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    host_cpus: Vec<usize>,
    /// Cores of the workers started here
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    worker_cpus: Vec<usize>,
    /// Put an emulated link before every worker and the RPC server: round trip in ms, rate in Mbit/s, jitter in ms
    #[arg(long, value_name = "RTT_MS:MBIT")]
    link: Option<LinkOptions>,

    /// Most time one process may take
    #[arg(long, value_name = "SECONDS", default_value_t = 3_600)]
    time_limit: u64,
    /// Where records, logs and the report go; records are added to those that are there
    #[arg(long, value_name = "DIR", default_value = "ab")]
    out: PathBuf,
    /// More arguments of every `generate` and `stock`, as --gpu-layers 0
    #[arg(last = true, value_name = "ARGS")]
    host_args: Vec<String>,
}

/// Runs it.
pub fn run(args: &AbArgs) -> Result<(), Failure> {
    let arms = args.arms()?;
    let gguf = Gguf::open(&args.model)?;
    let model_parts: Vec<PathBuf> = gguf.files().map(Path::to_owned).collect();
    drop(gguf);
    let manifest = Manifest::read(&args.split)?;
    same_model(&args.model, &cut_from(&args.split, &manifest)?, Verify::Once)?;
    let middles: Vec<&SliceEntry> = manifest.slices.iter().filter(|s| s.role == Role::Middle).collect();
    if !args.worker.is_empty() && args.worker.len() != middles.len() {
        return Err(Failure::misuse(format!(
            "{} workers for {} middles: name one with --worker for each, or none to have them started here",
            args.worker.len(),
            middles.len()
        )));
    }
    let path = |slice: &SliceEntry| Manifest::slice_path(&args.split, slice);
    let host_slices: Vec<PathBuf> =
        manifest.slices.iter().filter(|s| s.role != Role::Middle).map(path).collect();
    // slices are compared with their digests now, so that no first load has to
    for slice in &host_slices {
        let mut checking = ProgressLine::new(format!("checking {}", model_name(slice)));
        open_slice(slice, Verify::Once, |done, all| checking.update(done, all)).map_err(explain)?;
    }

    std::fs::create_dir_all(&args.out)
        .map_err(|e| Failure::misuse(format!("cannot make {}: {e}", args.out.display())))?;
    let scratch = Scratch::new()?;
    let (workers, key_file) = if args.worker.is_empty() {
        let program = beside("dim-worker")?;
        let key = args.key_file.clone().map_or_else(|| scratch.key(), Ok)?;
        (Workers::Local { program, slices: middles.iter().map(|s| path(s)).collect() }, Some(key))
    } else {
        (Workers::Running(args.worker.clone()), args.key_file.clone())
    };
    let quantised = quantise(&arms, args)?;

    let plan = Experiment {
        rounds: args.rounds,
        scenario: args.scenario(&middles),
        model: args.model.clone(),
        model_parts,
        split: args.split.clone(),
        host_slices,
        quantised,
        workers,
        rpc: arms.contains(&Arm::Rpc).then(|| args.rpc.clone().map_or(RpcServer::Local, RpcServer::Running)),
        arms,
        key_file,
        prompt: ["-p", &args.prompt, "--prompt-tokens", &args.prompt_tokens.to_string()]
            .map(str::to_owned)
            .to_vec(),
        machine: args.host_args.clone(),
        time_limit: Duration::from_secs(args.time_limit),
        out: args.out.clone(),
    };
    run_plan(&plan, |line| tell!("{line}"))?;
    let page = Page::new(&read_all(&args.out).map_err(Failure::failed)?);
    let file = page.write(&args.out).map_err(|e| Failure::failed(format!("cannot write the report: {e}")))?;
    terminal::print(&format!("{}\n", page.markdown(2, "charts").trim_end()))?;
    tell!("\nthe same with its plots: {}", file.display());
    Ok(())
}

impl AbArgs {
    /// What is measured, each once, the split first.
    fn arms(&self) -> Result<Vec<Arm>, Failure> {
        let mut arms = vec![Arm::Split];
        for &arm in &self.baseline {
            if !arms.contains(&arm) {
                arms.push(arm);
            }
        }
        if arms.contains(&Arm::Rpc) && !cfg!(feature = "rpc") {
            return Err(Failure::misuse("--baseline rpc: this build has no RPC backend").hint(
                "GGML_RPC=ON cargo build --release --features rpc --target-dir target/rpc, then run dim-host ab from there",
            ));
        }
        if !CAN_PIN && (!self.host_cpus.is_empty() || !self.worker_cpus.is_empty()) {
            return Err(Failure::misuse(
                "--host-cpus, --worker-cpus: processes cannot be pinned to cores on this system",
            ));
        }
        Ok(arms)
    }

    /// What all arms have in common.
    fn scenario(&self, middles: &[&SliceEntry]) -> Scenario {
        let ranges: Vec<String> = middles.iter().map(|s| format!("{}..{}", s.first, s.last)).collect();
        Scenario {
            model: model_name(&self.model),
            middle: ranges.join(" "),
            remote_blocks: middles.iter().map(|s| s.last - s.first + 1).sum(),
            prompt_tokens: self.prompt_tokens as usize,
            n_predict: self.n_predict as usize,
            n_ctx: self.n_ctx.unwrap_or_else(|| (self.prompt_tokens + self.n_predict).next_multiple_of(256)),
            threads: self.threads.unwrap_or_else(|| {
                std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1))
            }),
            wire: self.wire.name().to_owned(),
            memory_limit_bytes: self.memory_limit,
            worker_memory_limit_bytes: self.worker_memory_limit,
            link: self.link,
            host_cpus: self.host_cpus.clone(),
            worker_cpus: self.worker_cpus.clone(),
            local_workers: self.worker.is_empty(),
        }
    }
}

/// Makes the quantised models of the arms that need one, unless they are there from an earlier run.
fn quantise(arms: &[Arm], args: &AbArgs) -> Result<Vec<(Arm, PathBuf)>, Failure> {
    let dir = args.out.join("models");
    let mut made = Vec::new();
    for (arm, name) in [(Arm::Q8_0, "q8_0"), (Arm::Q4KM, "q4_k_m")] {
        if !arms.contains(&arm) {
            continue;
        }
        std::fs::create_dir_all(&dir)
            .map_err(|e| Failure::misuse(format!("cannot make {}: {e}", dir.display())))?;
        let file = dir.join(format!("{}-{name}.gguf", model_name(&args.model)));
        let changed = |p: &Path| std::fs::metadata(p).and_then(|m| m.modified()).ok();
        if changed(&file) <= changed(&args.model) {
            tell!("making {}", file.display());
            // in a process of its own: what llama.cpp cannot quantise may end it
            let part = dir.join(format!("{}-{name}.part", model_name(&args.model)));
            let log = std::fs::File::create(dir.join(format!("{name}.log"))).map_err(Failure::failed)?;
            let exe = std::env::current_exe().map_err(Failure::failed)?;
            let program = Program::new(exe).arg("quantise").arg(&args.model).arg(&part).arg(name);
            let ended = program
                .run(Default::default(), log, Duration::from_secs(args.time_limit))
                .map_err(|e| Failure::failed(format!("cannot start the quantiser: {e}")))?;
            if !ended.status.is_some_and(|s| s.success()) {
                let _ = std::fs::remove_file(&part);
                let log = dir.join(format!("{name}.log"));
                return Err(Failure::failed(format!(
                    "llama.cpp could not make a {name} of {}",
                    args.model.display()
                ))
                .hint(format!("what it said: {}; leave {name} out of --baseline", log.display())));
            }
            std::fs::rename(&part, &file).map_err(|e| Failure::failed(format!("{}: {e}", file.display())))?;
        }
        made.push((arm, file));
    }
    Ok(made)
}

/// A folder for the key of workers started here; removed afterwards.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Scratch, Failure> {
        let dir = std::env::temp_dir().join(format!("dim-ab-{}", std::process::id()));
        std::fs::create_dir_all(&dir)
            .map_err(|e| Failure::failed(format!("cannot make {}: {e}", dir.display())))?;
        Ok(Scratch(dir))
    }

    fn key(&self) -> Result<PathBuf, Failure> {
        let file = self.0.join("key");
        let mut bytes = [0u8; 32];
        getrandom::fill(&mut bytes).map_err(Failure::failed)?;
        let hex = bytes.iter().fold(String::new(), |mut hex, b| {
            let _ = write!(hex, "{b:02x}");
            hex
        });
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true);
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let written = options
            .open(&file)
            .and_then(|mut f| std::io::Write::write_all(&mut f, format!("{hex}\n").as_bytes()));
        written.map_err(|e| Failure::failed(format!("cannot write {}: {e}", file.display())))?;
        Ok(file)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// `12GB`, `1.5GiB`, `800MB`; a unit without B could mean either.
fn parse_size(text: &str) -> Result<u64, String> {
    let unit_at = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let factor = match unit {
        "B" => 1.0,
        "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KiB" => f64::from(1u32 << 10),
        "MiB" => f64::from(1u32 << 20),
        "GiB" => f64::from(1u32 << 30),
        _ => return Err(format!("{text}: a size is a number and MB, GB, MiB or GiB, as 12GB")),
    };
    match number.trim().parse::<f64>() {
        Ok(n) if n.is_finite() && n * factor >= 1e6 && n * factor < 1e18 => Ok((n * factor) as u64),
        _ => Err(format!("{text}: at least 1MB")),
    }
}

/// Any text will do: what is measured is the same for all.
const PROMPT: &str = "A long time ago, before there were roads, people found their way by the stars and by the rivers. \
    Whoever wanted to cross the mountains asked those who had done it before, and wrote down what they said. ";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_say_which_kind_they_are() {
        assert_eq!(parse_size("12GB"), Ok(12_000_000_000));
        assert_eq!(parse_size("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_size("800 MB"), Ok(800_000_000));
        for bad in ["12G", "12", "GB", "-1GB", "1kB", "1e30GB", ""] {
            assert!(parse_size(bad).is_err(), "{bad:?} was taken");
        }
    }
}
