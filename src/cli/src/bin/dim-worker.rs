//! `dim-worker`: serves a slice of a split model to one host at a time. See `dim-worker --help`.
#![forbid(unsafe_code)]

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::parser::ValueSource;
use clap::{CommandFactory as _, FromArgMatches as _, Parser};
use dim::failure::Failure;
use dim::host::machine::MachineArgs;
use dim::host::setup::{load_stage, load_stage_within, set_log};
use dim::stage::verified::{Verify, open_slice};
use dim::{device, worker};
use dim_wire::keys::{Key, KeyStore};
use dim_wire::message::Farewell;
use dim_wire::rows::RowTypes;
use dim_wire::terms::{Reason, SliceRole, Terms};
use dim_wire::transport::discover::{Announcement, MDNS_PORT};
use dim_wire::transport::{
    KeyRing, LinkError, LinkErrorKind, Listener, ListenerConfig, Notice, Readiness, Timing,
};
use gguf_tools::plan::Role;
use gguf_tools::slice::SliceInfo;

/// Serve a slice of a split model to one host at a time.
///
/// Prints `listening on ADDR:PORT` when it is ready. The first time it shows a pairing code for `dim-host pair`.
#[derive(Parser)]
#[command(name = "dim-worker", version, max_term_width = 100, args_override_self = true)]
struct Args {
    /// The slice, as dim-split wrote it: STEM.middle-A..B.gguf
    slice: PathBuf,
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
    #[command(flatten)]
    machine: MachineArgs,
}

fn main() -> ExitCode {
    let matches = Args::command().get_matches();
    // what was asked for is done; what was not is chosen so that a worker stays small
    let chooses_rows = matches.value_source("n_ubatch") != Some(ValueSource::CommandLine);
    let args = Args::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    match run(&args, chooses_rows) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(args: &Args, chooses_rows: bool) -> Result<(), Failure> {
    args.machine.check()?;
    set_log(&args.machine);
    let keys = keys(args)?;
    let info = open_slice(&args.slice, args.verify)?;
    if info.role != Role::Middle {
        return Err(Failure::misuse(format!(
            "{} is a {} slice; a worker serves a middle",
            args.slice.display(),
            info.role
        ))
        .hint("the head and the tail stay with dim-host"));
    }
    let n_ctx = args.machine.n_ctx_for(info.hparams.n_ctx_train);
    let mut terms = terms(args, &info, n_ctx);

    // the door opens before the slice is loaded: an address that cannot be had is known at once, and a host is
    // told that this worker is loading
    let loading = Readiness::NotReady(terms.clone(), Reason::NotReady, "still loading its slice".to_owned());
    let notice = Box::new(|notice: &Notice| eprintln!("{notice}"));
    let config = ListenerConfig { keys, readiness: loading, timing: Timing::default(), notice };
    let listener = Arc::new(Listener::bind(&args.listen, config).map_err(cannot_listen)?);
    end_on_signals(Arc::clone(&listener));

    let (machine, mmap, sessions) = (&args.machine, args.mmap, args.max_sessions);
    let mut stage = if chooses_rows {
        load_stage_within(&args.slice, &info, machine, mmap, n_ctx, sessions, COMPUTE_BYTES)?
    } else {
        load_stage(&args.slice, &info, machine, mmap, n_ctx, machine.n_ubatch, sessions)?
    };
    terms.max_rows = stage.inner().info().n_ubatch;
    listener.set_readiness(Readiness::Ready(terms));
    let count = info.blocks.count();
    eprintln!(
        "{}: blocks {}..{} of {} ({count} block{}), {:.2} GiB, context {n_ctx}",
        info.model_name,
        info.blocks.first,
        info.blocks.last,
        info.model_blocks,
        if count == 1 { "" } else { "s" },
        info.file_bytes as f64 / f64::from(1u32 << 30),
    );
    if args.key_file.is_none()
        && (args.pair || KeyStore::of_user().and_then(|s| s.list()).is_ok_and(|l| l.is_empty()))
    {
        let code = listener.open_pairing().map_err(Failure::failed)?;
        eprintln!(
            "pairing code, good for 5 minutes and one host:\n\n    {code}\n\non the host: dim-host pair {}",
            listener.address()
        );
    }
    let announcement = announce(args, &listener);
    // a script waits for this line; who does not read it should not end the worker
    let _ = writeln!(std::io::stdout(), "listening on {}", listener.address());
    let _ = std::io::stdout().flush();

    while let Some(link) = listener.accept(None) {
        let host = link.peer().to_owned();
        eprintln!("serving {host}");
        match worker::serve(&mut stage, link) {
            LinkError { kind: LinkErrorKind::Goodbye(Farewell::Finished), .. } => {
                eprintln!("{host} has finished")
            }
            LinkError { kind: LinkErrorKind::Stopped, .. } => {}
            error => eprintln!("{error}"),
        }
    }
    drop(announcement);
    Ok(())
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

/// Makes the worker known; one that cannot be found works all the same.
fn announce(args: &Args, listener: &Listener) -> Option<Announcement> {
    match args.announce {
        Announce::Never => return None,
        Announce::Reachable if listener.address().ip().is_loopback() => return None,
        _ => {}
    }
    let address = listener.address();
    // several workers of one machine are told apart by their ports
    let name = match address.port() {
        DEFAULT_PORT => device::name(),
        port => format!("{:.40} ({port})", device::name()),
    };
    let by_hand =
        |why: &str| eprintln!("note: hosts do not find this worker by themselves ({why}); its address works");
    let told = move |is_out: bool| {
        if !is_out {
            by_hand("no announcement leaves this machine: is its UDP port 5353 taken or blocked?");
        }
    };
    Announcement::start(&name, address, args.mdns_port, told).inspect_err(|e| by_hand(&e.to_string())).ok()
}

fn keys(args: &Args) -> Result<Arc<dyn KeyRing>, Failure> {
    Ok(match &args.key_file {
        Some(path) => Arc::new(Key::from_file(path).map_err(Failure::misuse)?),
        None => Arc::new(KeyStore::of_user().map_err(Failure::misuse)?),
    })
}

fn cannot_listen(error: LinkError) -> Failure {
    let text = match &error {
        LinkError { peer, kind: LinkErrorKind::Unreachable { text } } => {
            format!("cannot listen on {peer}: {text}")
        }
        other => other.to_string(),
    };
    Failure::misuse(text).hint("--listen takes an address of this machine and a port, as 0.0.0.0:7878")
}

/// What this worker holds and can do.
fn terms(args: &Args, info: &SliceInfo, n_ctx: u32) -> Terms {
    Terms {
        row_types: RowTypes::ALL,
        role: SliceRole::Middle,
        instance: u64::from(std::process::id()),
        n_embd: info.hparams.n_embd,
        n_blocks: info.model_blocks,
        blocks: info.blocks,
        n_ctx,
        max_rows: args.machine.n_ubatch,
        max_sessions: args.max_sessions,
        max_in_flight: MAX_IN_FLIGHT,
        model: Some(info.model_sha256),
        slice: Some(info.slice_sha256),
        params: info.params_sha256,
        arch: info.hparams.arch.clone(),
        ..Terms::blank(0, &device::software("dim-worker"), &device::name())
    }
}

/// SIGINT and SIGTERM: the host is told, the door closes, the program ends. The second one ends it at once.
fn end_on_signals(listener: Arc<Listener>) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_io().build() else { return };
    std::thread::spawn(move || {
        runtime.block_on(async {
            signal().await;
            listener.close(Farewell::ShuttingDown);
            signal().await;
            std::process::exit(1);
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

/// Where a worker listens that is not told otherwise.
const DEFAULT_PORT: u16 = 7878;
/// What the buffers for computing may take unless `--ubatch` says how many rows they are for: a worker is to hold its
/// slice, its cache, and 150 MiB at most.
const COMPUTE_BYTES: u64 = 90 << 20;

/// Steps a host may send ahead.
const MAX_IN_FLIGHT: u32 = 4;
