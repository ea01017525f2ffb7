//! What every bench says about where it ran, and how it keeps its processes apart.
#![allow(dead_code, reason = "each bench uses a part of it")]

use std::ffi::OsStr;
use std::process::Command;

/// Prints the machine, its load and the date: a figure without them cannot be compared with anything.
pub(crate) fn describe(bench: &str) {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo")
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split(':').nth(1).map(str::trim).map(str::to_owned));
    let cpu = cpu
        .or_else(|| output("sysctl", &["-n", "machdep.cpu.brand_string"]))
        .unwrap_or_else(|| "unknown CPU".into());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let load = read("/proc/loadavg").split(' ').next().map(str::to_owned).filter(|l| !l.is_empty());
    let date = output("date", &["-u", "+%Y-%m-%d %H:%M UTC"]).unwrap_or_default();
    println!(
        "{bench}: {cpu}, {cores} cores, load {} before, {date}",
        load.unwrap_or_else(|| "unknown".into())
    );
    if cores < 2 {
        println!(
            "note: fewer than two cores: the two processes share one, and the ratio says nothing about the split"
        );
    }
}

/// A program on one core; where there is no taskset (macOS), wherever the system puts it.
pub(crate) fn pinned(core: usize, program: impl AsRef<OsStr>) -> Command {
    let has_taskset = Command::new("taskset").arg("-V").output().is_ok_and(|o| o.status.success());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if !has_taskset {
        return Command::new(program);
    }
    let mut command = Command::new("taskset");
    command.args(["-c", &(core % cores).to_string()]).arg(program);
    command
}

/// An environment variable, or what stands for it.
pub(crate) fn env(name: &str, default: &str) -> String {
    std::env::var(name).ok().filter(|v| !v.is_empty()).unwrap_or_else(|| default.to_owned())
}

/// The middle one; of an even number the mean of the two.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

fn output(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
