//! `dim-worker`: serves a slice of a split model to one host at a time. See `dim-worker --help`.
#![forbid(unsafe_code)]

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::parser::ValueSource;
use clap::{CommandFactory as _, FromArgMatches as _, Parser};
use dim::{StopHandle, Worker, device};
use dim_cli::args::{MachineArgs, Verify, key_of_file};
use dim_cli::{explain, fetch, habits, shown};
use dim_core::blocks::BlockRange;
use dim_wire::keys::KeyStore;
use dim_wire::transport::discover::MDNS_PORT;
use gguf_tools::failure::Failure;
use gguf_tools::tell;

/// Serve a slice of a split model to one host at a time.
///
/// Prints `listening on ADDR:PORT` when it is ready. The first time it shows a pairing code for `dim-host pair`.
#[derive(Parser)]
#[command(name = "dim-worker", version, max_term_width = 100, args_override_self = true)]
struct Args {
    /// The slice, as dim-split wrote it: STEM.middle-A..B.gguf. With --fetch, where it goes (default: this folder, under its
    /// name in the manifest)
    #[arg(required_unless_present = "fetch")]
    slice: Option<PathBuf>,
    /// Fetch the slice first, if it is not there, from where its model came from: only its own bytes. Takes the manifest that
    /// dim-split hf:ORG/REPO wrote, a file or its address
    #[arg(long, value_name = "STEM.split.json|URL")]
    fetch: Option<String>,
    /// Which middle to fetch, if the manifest has more than one
    #[arg(long, value_name = "A..B", requires = "fetch")]
    middle: Option<BlockRange>,
    /// Where to listen; port 0 takes any that is free
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:7878")]
    listen: String,
    /// The key shared with the host: one line, 64 hex digits (default: the ones from pairing)
    #[arg(long, value_name = "FILE", conflicts_with = "pair")]
    key_file: Option<PathBuf>,
    /// Show a pairing code even if a host is paired already
    #[arg(long)]
    pair: bool,
    /// When to make this worker known on the local network, by mDNS as `_dim._tcp`, for `dim-host --worker auto`
    #[arg(long, value_enum, value_name = "WHEN", default_value = "reachable")]
    announce: Announce,
    /// The port of multicast DNS, for tests
    #[arg(long, value_name = "PORT", default_value_t = MDNS_PORT, hide = true)]
    mdns_port: u16,
    /// Conversations at once, each with a context of its own
    #[arg(long = "parallel", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    max_sessions: u32,
    /// When to compare the slice's weights with their digests
    #[arg(long, value_enum, value_name = "WHEN", default_value = "once")]
    verify: Verify,
    /// Map the slice instead of reading it: it must not change while this runs
    #[arg(long)]
    mmap: bool,
    /// Read it, as is done anyway
    #[arg(long, hide_short_help = true, overrides_with = "mmap")]
    no_mmap: bool,
    #[command(flatten)]
    machine: MachineArgs,
}

fn main() -> ExitCode {
    if let Some(code) = dim_cli::tries_files_apart() {
        return code;
    }
    let matches = Args::command().get_matches_from(habits::long_words(std::env::args_os()));
    // what was asked for is done; what was not is chosen so that a worker stays small
    let chooses_rows = matches.value_source("n_ubatch") != Some(ValueSource::CommandLine);
    let args = Args::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    match run(&args, chooses_rows) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(args: &Args, chooses_rows: bool) -> Result<(), Failure> {
    let resources = args.machine.resources()?;
    args.machine.set_log();
    let slice = match (&args.fetch, &args.slice) {
        (Some(manifest), place) => fetch::slice(manifest, args.middle, place.as_deref())?,
        (None, Some(slice)) => slice.clone(),
        // clap asks for one of the two
        (None, None) => return Err(Failure::misuse("no slice is named")),
    };
    let mut worker = Worker::open(&slice)
        .listen(&args.listen)
        .max_sessions(args.max_sessions)
        .verify(args.verify.when())
        .mmap(args.mmap)
        .resources(resources)
        .exact_rows(!chooses_rows)
        .software(device::software("dim-worker"));
    if let Some(path) = &args.key_file {
        worker = worker.key(key_of_file(path)?);
    }
    // it listens before the slice is loaded: an address that cannot be had is known at once, and a host is told that
    // this worker is loading
    let mut worker = worker.bind(shown::events(args.machine.verbose)).map_err(explain)?;
    end_on_signals(worker.stop_handle());
    worker.load().map_err(explain)?;

    let (info, n_ctx) = (worker.slice(), worker.n_ctx());
    let count = info.blocks.count();
    tell!(
        "{}: blocks {} of {} ({count} block{}), {:.2} GiB, context {n_ctx}",
        info.model_name,
        info.blocks,
        info.model_blocks,
        if count == 1 { "" } else { "s" },
        info.file_bytes as f64 / f64::from(1u32 << 30),
    );
    if args.key_file.is_none() && (args.pair || is_unpaired()) {
        let code = worker.open_pairing().map_err(Failure::failed)?;
        tell!("pairing code, good for 5 minutes and one host:\n\n    {code}\n\n{}", how_to_pair(&worker));
    }
    if args.announce == Announce::Always
        || args.announce == Announce::Reachable && !worker.address().ip().is_loopback()
    {
        worker.announce(args.mdns_port);
    }
    // a script waits for this line; who does not read it should not end the worker
    let _ = writeln!(std::io::stdout(), "listening on {}", worker.address());
    let _ = std::io::stdout().flush();
    worker.serve().map_err(explain)
}

/// What to type on the other machine, with an address that works from there.
fn how_to_pair(worker: &Worker) -> String {
    let addresses = worker.reachable_at();
    let Some((first, others)) = addresses.split_first() else {
        let port = worker.address().port();
        return format!("on this machine, which has no network: dim-host pair 127.0.0.1:{port}");
    };
    let mut text = format!("on the host: dim-host pair {first}");
    if !others.is_empty() {
        let others: Vec<String> = others.iter().map(ToString::to_string).collect();
        text += &format!("\n(or, as the network has it: {})", others.join(", "));
    }
    text
}

/// Whether this user has no keys yet.
fn is_unpaired() -> bool {
    KeyStore::of_user().and_then(|store| store.list()).is_ok_and(|keys| keys.is_empty())
}

/// When a worker makes itself known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Announce {
    /// If it listens where other machines can reach it
    Reachable,
    /// Also on 127.0.0.1, to programs of this machine
    Always,
    /// Hosts are told its address by hand
    Never,
}

/// SIGINT and SIGTERM: the host is told, nobody else is let in, the program ends. The second one ends it at once.
fn end_on_signals(worker: StopHandle) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_io().build() else { return };
    std::thread::spawn(move || {
        runtime.block_on(async {
            signal().await;
            worker.stop();
            signal().await;
            llama_sys_patch::end_process(1);
        });
    });
}

async fn signal() {
    #[cfg(unix)]
    if let Ok(mut terminate) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        return;
    }
    let _ = tokio::signal::ctrl_c().await;
}
