//! How much anonymous memory a process takes: what it allocates (heap, stacks), not the files it has mapped. The kernel
//! counts it as RssAnon in /proc/PID/status; the greatest value seen is what is given here. Linux only: None elsewhere.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What a program gives, and the most anonymous memory it had, in bytes.
pub(crate) fn peak_of(command: &mut Command) -> std::io::Result<(Output, Option<u64>)> {
    command.stdin(std::process::Stdio::null());
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let child = command.spawn()?;
    let status = PathBuf::from(format!("/proc/{}/status", child.id()));
    let (output, peak) = watch(&status, || child.wait_with_output());
    Ok((output?, peak))
}

/// What `work` gives, and the most anonymous memory this process had meanwhile, in bytes more than before.
pub(crate) fn growth<T>(work: impl FnOnce() -> T) -> (T, Option<u64>) {
    let status = Path::new("/proc/self/status");
    let before = anonymous_bytes(status);
    let (result, peak) = watch(status, work);
    (result, peak.zip(before).map(|(peak, before)| peak.saturating_sub(before)))
}

fn watch<T>(status: &Path, work: impl FnOnce() -> T) -> (T, Option<u64>) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut peak = anonymous_bytes(status);
            while !done.load(Ordering::Relaxed) {
                peak = peak.max(anonymous_bytes(status));
                std::thread::sleep(Duration::from_millis(1));
            }
            peak
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        (result, watcher.join().expect("the watcher does not panic"))
    })
}

fn anonymous_bytes(status: &Path) -> Option<u64> {
    let status = std::fs::read_to_string(status).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}
