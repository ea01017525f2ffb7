//! `dim-host push`.

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use dim::Patience;
use dim::device;
use dim::host::packages::{Packages, PackagesError};
use dim::retry::{Absence, Retry, wait, wait_as};
use dim_wire::HandshakeError;
use dim_wire::terms::Reason;
use dim_wire::transport::push::{PushError, push};
use dim_wire::transport::{CallOff, LinkError, LinkErrorKind, Timing};
use gguf_tools::failure::Failure;
use gguf_tools::tell;

use crate::args::{PatienceArgs, address, keys_for};
use crate::explain;
use crate::progress::{ProgressLine, size};

/// Arguments of `dim-host push`.
#[derive(Debug, clap::Args)]
pub struct PushArgs {
    /// What dim-split --coreml wrote: STEM.middle-A..B.coreml
    #[arg(value_name = "DIRECTORY")]
    directory: PathBuf,
    /// The worker: the app on the phone, or dim-worker-swift --receive
    #[arg(long, value_name = "ADDR:PORT")]
    worker: String,
    /// The key shared with the worker: one line, 64 hex digits (default: the one from pairing)
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    #[command(flatten)]
    patience: PatienceArgs,
}

/// Runs it.
pub fn run(args: &PushArgs) -> Result<(), Failure> {
    let worker = address(&args.worker)?;
    let keys = keys_for(&worker, args.key_file.as_deref())?;
    let mut likeliest = 0;
    let mut checking = ProgressLine::new(format!("checking {}", args.directory.display()));
    let packages =
        Packages::open(&args.directory, &mut |done, all| checking.update(done, all)).map_err(unfit)?;
    drop(checking);
    let mut offer = packages.offer.clone();
    offer.name = device::name();

    let open = |at: usize| File::open(&packages.files[at]);
    let begun = Instant::now();
    let mut transfer = Transfer::new(packages.bytes, args.patience.patience());
    loop {
        let mut connection = Connection::new(&worker, &mut transfer);
        let attempt = push(&worker, &keys[likeliest], &offer, &open, &Timing::default(), &mut |done| {
            connection.moved(done)
        });
        drop(connection);
        match attempt {
            Ok(_) => break,
            // a key belongs to a worker, wherever that was when it was paired
            Err(PushError::Link(LinkError {
                kind: LinkErrorKind::Handshake(HandshakeError::Key), ..
            })) if likeliest + 1 < keys.len() && !transfer.was_there => {
                likeliest += 1;
            }
            Err(error) => transfer.failed(error).map_err(|error| final_failure(error, &packages))?,
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    let rate = size(transfer.sent as f64 / seconds.max(1e-3));
    tell!(
        "{} has blocks {} of {}: {} verified, {} sent in {seconds:.1} s ({rate}/s)",
        worker,
        offer.blocks,
        packages.model_name,
        size(packages.bytes as f64),
        size(transfer.sent as f64),
    );
    Ok(())
}

/// What has happened over all connections of a push.
struct Transfer {
    total: u64,
    /// how far the last connection came
    reached: u64,
    /// bytes that left this machine
    sent: u64,
    retry: Retry,
    hash_differed: bool,
    /// it has opened with this key, and said what it has
    was_there: bool,
}

impl Transfer {
    fn new(total: u64, patience: Patience) -> Transfer {
        let retry = Retry::new(patience, Instant::now());
        Transfer { total, reached: 0, sent: 0, retry, hash_differed: false, was_there: false }
    }

    /// Waits for the next attempt, or gives back why there is none.
    fn failed(&mut self, error: PushError) -> Result<(), PushError> {
        if matches!(error, PushError::HashDiffers { .. }) && !self.hash_differed {
            self.hash_differed = true;
            tell!("{error}; sending it once more");
            return Ok(());
        }
        let mut tell = |error: &PushError, limit: Duration| {
            tell!("{error}; trying for up to {} s", limit.as_secs());
        };
        match &error {
            // who was there before and is now said to be another has proven nothing: it counts as away
            PushError::Link(LinkError { kind: LinkErrorKind::Handshake(_), .. }) if self.was_there => {
                wait_as(&mut self.retry, error, Absence::Lost, &CallOff::new(), &mut tell)
            }
            _ => wait(&mut self.retry, error, &CallOff::new(), &mut tell),
        }
    }
}

/// One connection's part of it, on a terminal.
struct Connection<'a> {
    transfer: &'a mut Transfer,
    progress: ProgressLine,
    begun: bool,
}

impl<'a> Connection<'a> {
    fn new(worker: &str, transfer: &'a mut Transfer) -> Connection<'a> {
        Connection { transfer, progress: ProgressLine::new(format!("sending to {worker}")), begun: false }
    }

    fn moved(&mut self, done: u64) {
        let transfer = &mut *self.transfer;
        if !self.begun {
            self.begun = true;
            transfer.was_there = true;
            self.progress.begin_at(done);
            if done > 0 {
                let has = size(done as f64);
                tell!("the worker has {has} of {} already: going on there", size(transfer.total as f64));
            }
        } else {
            transfer.sent += done.saturating_sub(transfer.reached);
            transfer.retry.moved(Instant::now());
        }
        transfer.reached = done;
        self.progress.update(done, transfer.total);
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
fn final_failure(error: PushError, packages: &Packages) -> Failure {
    let again = "run the same command again: it goes on where this one stopped";
    match &error {
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
        PushError::Link(link) if !link.may_pass() => explain(link.clone()),
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Before the worker has opened with the key that is the end, and afterwards a reason to look for it.
    #[test]
    fn what_nobody_has_proven_ends_no_push_that_has_begun() {
        let pause = Duration::from_millis(1);
        let patience = Patience { first_pause: pause, longest_pause: pause, ..Patience::default() };
        for kind in [HandshakeError::Key, HandshakeError::NoPairing, HandshakeError::Crowded] {
            let error = || PushError::Link(LinkErrorKind::Handshake(kind.clone()).with("a phone"));
            let mut transfer = Transfer::new(100, patience);
            let at_first = transfer.failed(error());
            assert_eq!(at_first.is_ok(), kind == HandshakeError::Crowded, "{kind}");
            Connection::new("a phone", &mut transfer).moved(10);
            assert!(transfer.failed(error()).is_ok(), "{kind}");
        }
    }
}
