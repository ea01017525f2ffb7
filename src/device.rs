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

/// This program and its version, as the other side shows it.
pub fn software(program: &str) -> String {
    format!("{program} {}", env!("CARGO_PKG_VERSION"))
}
