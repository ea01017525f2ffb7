//! `dim-host push`.

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use dim::device;
use dim::failure::Failure;
use dim::host::packages::{Packages, PackagesError};
use dim::host::setup::{key_for, refused};
use dim::progress::{Progress, size};
use dim_core::pipeline::Patience;
use dim_wire::terms::Reason;
use dim_wire::transport::push::{PushError, push};
use dim_wire::transport::{LinkError, LinkErrorKind, Timing};

/// Arguments of `dim-host push`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What dim-split --coreml wrote: STEM.middle-A..B.coreml
    #[arg(value_name = "DIRECTORY")]
    directory: PathBuf,
    /// The worker: the app on the phone, or dim-worker-swift --receive
    #[arg(long, value_name = "ADDR:PORT")]
    worker: String,
    /// The key shared with the worker: one line, 64 hex digits (default: the one from pairing)
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// How long a lost worker is looked for before the push ends; what was sent stays there
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    give_up_after: u64,
    /// How long instead, if it has said that it pauses (a locked phone) or is too hot
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    wait_paused: u64,
}

/// Runs it.
pub fn run(args: &Args) -> Result<(), Failure> {
    let key = key_for(&args.worker, args.key_file.as_deref())?;
    let mut checking = Progress::new(format!("checking {}", args.directory.display()));
    let packages =
        Packages::open(&args.directory, &mut |done, all| checking.update(done, all)).map_err(unfit)?;
    drop(checking);
    let mut offer = packages.offer.clone();
    offer.name = device::name();

    let patience = Patience {
        give_up_after: Duration::from_secs(args.give_up_after),
        paused_for: Duration::from_secs(args.wait_paused),
        ..Patience::default()
    };
    let open = |at: usize| File::open(&packages.files[at]);
    let begun = Instant::now();
    let mut journey = Journey::new(packages.bytes);
    loop {
        let mut shown = Shown::new(&args.worker, &mut journey);
        let attempt =
            push(&args.worker, &key, &offer, &open, &Timing::default(), &mut |done| shown.moved(done));
        drop(shown);
        match attempt {
            Ok(_) => break,
            Err(error) => journey.after(error, &patience, &packages)?,
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    let rate = size(journey.sent as f64 / seconds.max(1e-3));
    eprintln!(
        "{} has blocks {} of {}: {} verified, {} sent in {seconds:.1} s ({rate}/s)",
        args.worker,
        offer.blocks,
        packages.model_name,
        size(packages.bytes as f64),
        size(journey.sent as f64),
    );
    Ok(())
}

/// What has happened over all connections of a push.
struct Journey {
    total: u64,
    /// how far the last connection came
    reached: u64,
    /// bytes that left this machine
    sent: u64,
    /// since when nothing has moved
    stuck_since: Instant,
    pause: Duration,
    told: bool,
    hash_differed: bool,
}

impl Journey {
    fn new(total: u64) -> Journey {
        let stuck_since = Instant::now();
        let pause = Duration::ZERO;
        Journey { total, reached: 0, sent: 0, stuck_since, pause, told: false, hash_differed: false }
    }

    /// Waits for the next attempt, or says why there is none.
    fn after(&mut self, error: PushError, patience: &Patience, packages: &Packages) -> Result<(), Failure> {
        match &error {
            PushError::HashDiffers { .. } if !self.hash_differed => {
                self.hash_differed = true;
                eprintln!("{error}; sending it once more");
                Ok(())
            }
            PushError::Link(link) if link.may_pass() => {
                let limit = match link.is_pause() {
                    true => patience.paused_for.max(patience.give_up_after),
                    false => patience.give_up_after,
                };
                let stuck = self.stuck_since.elapsed();
                if stuck >= limit {
                    return Err(final_failure(&error, packages));
                }
                if !self.told {
                    eprintln!("{error}; trying for up to {} s", limit.as_secs());
                    self.told = true;
                }
                let pause = self.pause.max(patience.first_pause);
                std::thread::sleep(pause.min(limit - stuck));
                self.pause = (pause * 2).min(patience.longest_pause);
                Ok(())
            }
            _ => Err(final_failure(&error, packages)),
        }
    }
}

/// One connection's part of the journey, on a terminal.
struct Shown<'a> {
    journey: &'a mut Journey,
    progress: Progress,
    begun: bool,
}

impl<'a> Shown<'a> {
    fn new(worker: &str, journey: &'a mut Journey) -> Shown<'a> {
        Shown { journey, progress: Progress::new(format!("sending to {worker}")), begun: false }
    }

    fn moved(&mut self, done: u64) {
        let journey = &mut *self.journey;
        if !self.begun {
            self.begun = true;
            self.progress.begin_at(done);
            if done > 0 {
                let has = size(done as f64);
                eprintln!("the worker has {has} of {} already: going on there", size(journey.total as f64));
            }
        } else {
            journey.sent += done.saturating_sub(journey.reached);
            journey.stuck_since = Instant::now();
            journey.pause = Duration::ZERO;
            journey.told = false;
        }
        journey.reached = done;
        self.progress.update(done, journey.total);
    }
}

/// A directory that cannot be pushed, with the way out.
fn unfit(error: PackagesError) -> Failure {
    let hint = match &error {
        PackagesError::NoManifest { .. } => {
            "dim-split MODEL.gguf --middle A..B --coreml writes one: STEM.middle-A..B.coreml"
        }
        _ => "write it anew with dim-split --coreml, or copy it again",
    };
    Failure::misuse(error).hint(hint)
}

/// Why the push ends here, with the way out.
fn final_failure(error: &PushError, packages: &Packages) -> Failure {
    let again = "run the same command again: it goes on where this one stopped";
    match error {
        PushError::Link(LinkError { peer, kind: LinkErrorKind::Refused { reason: Reason::NoPush, text, .. } }) => {
            Failure::misuse(format!("{peer} takes no packages: {text}")).hint(
                "packages are for the app on a phone or for dim-worker-swift --receive DIR; dim-worker runs the .gguf \
                 slice",
            )
        }
        PushError::Link(LinkError { peer, kind: LinkErrorKind::Refused { reason: Reason::NoSpace, text, .. } }) => {
            Failure::failed(format!("{peer} has not enough room: {text}"))
                .hint("free space on it, then run the same command again")
        }
        PushError::Link(LinkError { peer, kind: LinkErrorKind::Refused { reason: Reason::PushItems, text, .. } }) => {
            Failure::misuse(format!("{peer} cannot use these packages: {text}"))
                .hint("update the app and this program to the same version, write the packages anew")
        }
        PushError::Link(link @ LinkError { kind: LinkErrorKind::Busy { .. }, .. }) => {
            Failure::failed(link).hint("end the host that uses it, then run the same command again")
        }
        PushError::Link(link) if !link.may_pass() => refused(link),
        PushError::Link(LinkError { kind: LinkErrorKind::Unreachable { .. }, .. }) => {
            Failure::failed(error).hint(format!("is the app open, the phone unlocked, on the same network? Then {again}"))
        }
        PushError::Link(_) => Failure::failed(error).hint(again),
        PushError::HashDiffers { item, .. } => {
            let file = item.and_then(|i| packages.files.get(usize::from(i)));
            let file = file.map(|f| format!(" ({})", f.display())).unwrap_or_default();
            Failure::failed(format!("{error}{file}, twice"))
                .hint("did the file change meanwhile? Else the worker's storage is at fault")
        }
        PushError::StoringFailed { .. } => {
            Failure::failed(error).hint("free space on it, or restart it, then run the same command again")
        }
        PushError::File { item, source } => {
            let path = packages.files.get(*item).map(|f| f.display().to_string()).unwrap_or_default();
            Failure::failed(format!("{path}: {source}")).hint("the directory must not change while it is sent")
        }
    }
}
