//! A worker's slice, fetched by the worker itself.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dim_core::blocks::BlockRange;
use gguf_tools::failure::Failure;
use gguf_tools::hub::{self, HubError, Outcome, Settings};
use gguf_tools::tell;
use gguf_tools::text::gib;

/// Makes the middle of these blocks, or the only one, from where its model came from, if it is not there. `manifest` is a
/// file or an address. Gives the slice's file: `place`, or its own name in this folder.
///
/// # Errors
/// The manifest does not say how, or the bytes cannot be had.
pub fn slice(manifest: &str, blocks: Option<BlockRange>, place: Option<&Path>) -> Result<PathBuf, Failure> {
    let settings = Settings::from_env()?;
    let read = hub::fetch_manifest(&settings, manifest)?;
    let entry = hub::middle(&read, blocks, manifest).map_err(which)?;
    let target = place.map_or_else(|| PathBuf::from(&entry.file), Path::to_owned);
    let started = Instant::now();
    let mut shown = started;
    let outcome = hub::fetch_slice(&settings, &read, entry, &target, &mut |done, total, file| {
        if shown.elapsed() >= BETWEEN_LINES {
            shown = Instant::now();
            tell!("{file}: {} of {} fetched", gib(done), gib(total));
        }
    })?;
    match outcome {
        Outcome::Present => tell!("{} is there already", target.display()),
        Outcome::Fetched { bytes } => {
            let seconds = started.elapsed().as_secs_f64();
            tell!("{}: fetched {} in {seconds:.1} s", target.display(), gib(bytes));
        }
    }
    Ok(target)
}

/// The library's words; which middle it is, an option says.
fn which(error: HubError) -> Failure {
    match &error {
        HubError::Middle { .. } => Failure::from(error).hint("name one with --middle A..B"),
        _ => Failure::from(error),
    }
}

/// A large slice takes minutes: a line now and then says how far it is.
const BETWEEN_LINES: Duration = Duration::from_secs(5);
