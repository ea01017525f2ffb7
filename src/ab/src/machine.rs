//! The machine a measurement was made on: what goes into the record, what the system did meanwhile, and a cold page
//! cache on demand.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// What a reader needs to know about the machine. Nothing that names its owner.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// As `Linux 6.1.0` or `macOS 26.0`.
    pub os: String,
    /// `x86_64`, `aarch64`.
    pub arch: String,
    /// The processor's name.
    pub cpu: String,
    /// Cores this process may run on.
    pub cores: usize,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Swap there is, in bytes; `None` where it is made as needed (macOS).
    pub swap_bytes: Option<u64>,
}

/// Versions of what was measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// This program's.
    pub dim: String,
    /// The crate that ships llama.cpp.
    pub llama_cpp_sys_2: String,
}

/// What the system as a whole did while an arm ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemActivity {
    /// Pages' bytes that came back from swap.
    pub swap_in_bytes: Option<u64>,
    /// Pages' bytes that went to swap.
    pub swap_out_bytes: Option<u64>,
    /// Memory pressure at the end (macOS: percent of memory free as `memory_pressure` counts it).
    pub memory_free_percent: Option<u64>,
}

impl Machine {
    /// This one.
    pub fn describe() -> Machine {
        Machine {
            arch: std::env::consts::ARCH.to_owned(),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            ..platform::describe()
        }
    }
}

impl SystemActivity {
    /// The counters since the machine was started.
    pub fn now() -> SystemActivity {
        platform::activity()
    }

    /// What happened since `start`.
    pub fn since(self, start: SystemActivity) -> SystemActivity {
        let minus = |now: Option<u64>, then: Option<u64>| Some(now?.saturating_sub(then?));
        SystemActivity {
            swap_in_bytes: minus(self.swap_in_bytes, start.swap_in_bytes),
            swap_out_bytes: minus(self.swap_out_bytes, start.swap_out_bytes),
            memory_free_percent: self.memory_free_percent,
        }
    }
}

/// Drops a file from the page cache, so that the next one to read it waits for the disk. Returns whether the system
/// took the request; pages that a process has mapped or that are not written yet stay.
pub fn evict(file: &Path) -> bool {
    platform::evict(file)
}

/// The date and time of `at` in UTC, as `2026-01-31T23:59:59Z`.
pub fn rfc3339(at: SystemTime) -> String {
    let seconds = at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // years counted from March, so that the leap day is the last day of one; 146,097 days are 400 years
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// What a program prints, trimmed; nothing when it is not there.
#[cfg(target_os = "macos")]
fn output_of(program: &str, args: &[&str]) -> String {
    let output = std::process::Command::new(program).args(args).output();
    output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default()
}

#[cfg(target_os = "linux")]
mod platform {
    use super::{Machine, Path, SystemActivity};
    use std::fs;

    pub(super) fn describe() -> Machine {
        let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let cpu = cpuinfo
            .lines()
            .find_map(|l| l.strip_prefix("model name")?.split_once(": "))
            .map(|(_, name)| name);
        let meminfo = read("/proc/meminfo");
        let kib = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
        };
        Machine {
            os: format!("Linux {}", read("/proc/sys/kernel/osrelease").trim()),
            cpu: cpu.unwrap_or("unknown").trim().to_owned(),
            memory_bytes: kib("MemTotal:").unwrap_or(0),
            swap_bytes: kib("SwapTotal:"),
            ..Machine::default()
        }
    }

    pub(super) fn activity() -> SystemActivity {
        let text = fs::read_to_string("/proc/vmstat").unwrap_or_default();
        let page = rustix::param::page_size() as u64;
        let pages = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
            Some(line.trim().parse::<u64>().ok()? * page)
        };
        SystemActivity {
            swap_in_bytes: pages("pswpin"),
            swap_out_bytes: pages("pswpout"),
            memory_free_percent: None,
        }
    }

    pub(super) fn evict(file: &Path) -> bool {
        let Ok(file) = fs::File::open(file) else { return false };
        // what is not on the disk yet cannot be dropped
        let _ = file.sync_all();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).is_ok()
    }
}

#[cfg(target_os = "macos")]
mod platform {
    use super::{Machine, Path, SystemActivity, output_of, parse_memory_pressure, parse_vm_stat};

    pub(super) fn describe() -> Machine {
        Machine {
            os: format!("macOS {}", output_of("sw_vers", &["-productVersion"])),
            cpu: output_of("sysctl", &["-n", "machdep.cpu.brand_string"]),
            memory_bytes: output_of("sysctl", &["-n", "hw.memsize"]).parse().unwrap_or(0),
            swap_bytes: None,
            ..Machine::default()
        }
    }

    pub(super) fn activity() -> SystemActivity {
        SystemActivity {
            memory_free_percent: parse_memory_pressure(&output_of("memory_pressure", &["-Q"])),
            ..parse_vm_stat(&output_of("vm_stat", &[]))
        }
    }

    /// `purge` drops every file's pages and needs root; there is no way to drop one file's.
    pub(super) fn evict(_file: &Path) -> bool {
        std::process::Command::new("sudo").args(["-n", "purge"]).output().is_ok_and(|o| o.status.success())
    }
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
mod platform {
    use super::{Machine, Path, SystemActivity};

    pub(super) fn describe() -> Machine {
        Machine { os: std::env::consts::OS.to_owned(), ..Machine::default() }
    }

    pub(super) fn activity() -> SystemActivity {
        SystemActivity::default()
    }

    pub(super) fn evict(_file: &Path) -> bool {
        false
    }
}

/// macOS's `vm_stat`: a head line with the page size, then `Swapins: 123.`
#[cfg(any(target_os = "macos", test))]
fn parse_vm_stat(text: &str) -> SystemActivity {
    let page = text
        .split("page size of ")
        .nth(1)
        .and_then(|t| t.split(' ').next())
        .and_then(|n| n.parse::<u64>().ok());
    let pages = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().trim_end_matches('.').parse::<u64>().ok()? * page?)
    };
    SystemActivity {
        swap_in_bytes: pages("Swapins:"),
        swap_out_bytes: pages("Swapouts:"),
        memory_free_percent: None,
    }
}

/// macOS's `memory_pressure -Q`: its last line ends in `: 57%`.
#[cfg(any(target_os = "macos", test))]
fn parse_memory_pressure(text: &str) -> Option<u64> {
    text.lines().find_map(|l| l.split_once("free percentage: ")?.1.trim_end_matches('%').parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let at = |seconds| rfc3339(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(951_868_800), "2000-03-01T00:00:00Z");
        assert_eq!(at(1_798_761_599), "2026-12-31T23:59:59Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00Z");
    }

    #[test]
    fn this_machine_has_a_processor_and_memory() {
        let machine = Machine::describe();
        assert!(
            machine.cores >= 1 && machine.memory_bytes > 64 << 20 && !machine.os.is_empty(),
            "{machine:?}"
        );
    }

    #[test]
    fn what_macos_prints_is_read() {
        let text = "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n\
                    Pages free:                               12345.\n\
                    Swapins:                                    100.\n\
                    Swapouts:                                     3.\n";
        let activity = parse_vm_stat(text);
        assert_eq!((activity.swap_in_bytes, activity.swap_out_bytes), (Some(1_638_400), Some(49_152)));
        assert_eq!(parse_vm_stat(""), SystemActivity::default());
        let text = "The system has 17179869184 (1048576 pages with a page size of 16384).\n\
                    System-wide memory free percentage: 57%";
        assert_eq!(parse_memory_pressure(text), Some(57));
        assert_eq!(parse_memory_pressure("?"), None);
    }

    #[test]
    fn what_the_system_did_is_a_difference() {
        let then = SystemActivity { swap_in_bytes: Some(10), ..SystemActivity::default() };
        let now = SystemActivity {
            swap_in_bytes: Some(12),
            swap_out_bytes: Some(5),
            memory_free_percent: Some(40),
        };
        let since = now.since(then);
        assert_eq!(since.swap_in_bytes, Some(2));
        assert_eq!(since.swap_out_bytes, None, "not known at the start");
        assert_eq!(since.memory_free_percent, Some(40));
    }
}
