//! What this device is called, for the other side to show.

use std::process::Command;

/// The device's name as its owner knows it: the computer's name on a Mac, the host name elsewhere.
pub fn name() -> String {
    let from_file = || std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let from = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let from_mac =
        || if cfg!(target_os = "macos") { from("scutil", &["--get", "ComputerName"]) } else { None };
    let name = from_mac().or_else(from_file).or_else(|| from("hostname", &[])).unwrap_or_default();
    // the wire takes 64 bytes
    let mut name = name.trim().to_owned();
    while name.len() > 64 {
        name.pop();
    }
    if name.is_empty() { "a computer".to_owned() } else { name }
}

/// Bytes of memory that programs can still have without others being swapped out; `None` where the system does not say.
pub(crate) fn free_memory() -> Option<u64> {
    let text = |path: &str| std::fs::read_to_string(path).ok();
    let available = text("/proc/meminfo")?
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .and_then(|kb| kb.parse::<u64>().ok())?
        << 10;
    // of a container; what caches files can be had back
    let number = |path: &str| text(path)?.trim().parse::<u64>().ok();
    let limit = number("/sys/fs/cgroup/memory.max");
    let used = number("/sys/fs/cgroup/memory.current");
    let cached = text("/sys/fs/cgroup/memory.stat").and_then(|stat| {
        stat.lines().find_map(|line| line.strip_prefix("inactive_file ")).and_then(|n| n.parse::<u64>().ok())
    });
    let of_container =
        limit.zip(used).map(|(limit, used)| limit.saturating_sub(used.saturating_sub(cached.unwrap_or(0))));
    Some(of_container.map_or(available, |room| room.min(available)))
}

/// This program and its version, as the other side shows it.
pub fn software(program: &str) -> String {
    format!("{program} {}", env!("CARGO_PKG_VERSION"))
}
