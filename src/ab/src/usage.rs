//! What a process costs its machine: memory, faults, bytes from the disk. Seen from outside, so that the same
//! instrument measures every arm.
//!
//! Linux: /proc/PID/status, stat and io. macOS: `proc_pid_rusage` (footprint, page-ins, bytes read). A process is
//! sampled while it runs, for what is gone with it, and read once more after it has ended and before it is forgotten,
//! for what is only whole then.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What one process has used. `None` is what this system does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Most memory at once that was mapped to it, pages of files included (Linux: VmHWM; macOS: resident size).
    pub peak_rss_bytes: Option<u64>,
    /// Most memory at once that was its own and no file's (Linux: RssAnon; macOS: the footprint that jetsam counts).
    pub peak_own_bytes: Option<u64>,
    /// Pages it waited for because they had to come from the disk.
    pub major_faults: Option<u64>,
    /// Bytes that the disk read for it.
    pub disk_read_bytes: Option<u64>,
}

impl Usage {
    /// The larger of two samples of the same process, part for part: all that is measured here only grows.
    pub fn merge(self, later: Usage) -> Usage {
        let larger = |a: Option<u64>, b: Option<u64>| a.max(b);
        Usage {
            peak_rss_bytes: larger(self.peak_rss_bytes, later.peak_rss_bytes),
            peak_own_bytes: larger(self.peak_own_bytes, later.peak_own_bytes),
            major_faults: larger(self.major_faults, later.major_faults),
            disk_read_bytes: larger(self.disk_read_bytes, later.disk_read_bytes),
        }
    }

    /// What was used between `start` and this sample of the same process; peaks stay what they are.
    pub fn since(self, start: Usage) -> Usage {
        let minus = |now: Option<u64>, then: Option<u64>| Some(now?.saturating_sub(then.unwrap_or(0)));
        Usage {
            major_faults: minus(self.major_faults, start.major_faults),
            disk_read_bytes: minus(self.disk_read_bytes, start.disk_read_bytes),
            ..self
        }
    }
}

/// Samples a process until it is told to stop.
#[derive(Debug)]
pub struct Watch {
    pid: u32,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Usage>,
}

impl Watch {
    /// Starts to watch.
    pub fn start(pid: u32) -> Watch {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut usage = Usage::default();
            while !told.load(Ordering::Relaxed) {
                usage = usage.merge(sample(pid));
                std::thread::park_timeout(INTERVAL);
            }
            usage
        });
        Watch { pid, stop, thread }
    }

    /// Stops, and adds a last look at the process: it may have ended, but must not have been waited for.
    pub fn finish(self) -> Usage {
        let last = sample(self.pid);
        self.stop.store(true, Ordering::Relaxed);
        self.thread.thread().unpark();
        self.thread.join().unwrap_or_default().merge(last)
    }
}

/// One look at a process. All `None` for one that is gone.
pub fn sample(pid: u32) -> Usage {
    platform::sample(pid)
}

/// How often a process is looked at. A look costs about 30 us.
const INTERVAL: Duration = Duration::from_millis(20);

#[cfg(target_os = "linux")]
mod platform {
    use super::Usage;

    pub(super) fn sample(pid: u32) -> Usage {
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        parse(&read("status"), &read("stat"), &read("io"))
    }

    pub(super) fn parse(status: &str, stat: &str, io: &str) -> Usage {
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
        };
        // the program's name stands in parentheses and may hold anything; majflt is the tenth field after it
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        Usage {
            peak_rss_bytes: kib("VmHWM:"),
            peak_own_bytes: kib("RssAnon:"),
            major_faults: after_name.split_whitespace().nth(9).and_then(|n| n.parse().ok()),
            disk_read_bytes: io.lines().find_map(|l| l.strip_prefix("read_bytes: ")?.trim().parse().ok()),
        }
    }
}

#[cfg(target_os = "macos")]
mod platform {
    use super::Usage;
    use libproc::libproc::pid_rusage::{RUsageInfoV4, pidrusage};

    pub(super) fn sample(pid: u32) -> Usage {
        let Ok(pid) = i32::try_from(pid) else { return Usage::default() };
        let Ok(info) = pidrusage::<RUsageInfoV4>(pid) else { return Usage::default() };
        Usage {
            // the peak of this one is the largest sample
            peak_rss_bytes: Some(info.ri_resident_size),
            peak_own_bytes: Some(info.ri_lifetime_max_phys_footprint),
            major_faults: Some(info.ri_pageins),
            disk_read_bytes: Some(info.ri_diskio_bytesread),
        }
    }
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
mod platform {
    pub(super) fn sample(_pid: u32) -> super::Usage {
        super::Usage::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_files_are_read_by_name_and_place() {
        let status = "Name:\ta) R 1\nVmHWM:\t  204800 kB\nVmRSS:\t  1024 kB\nRssAnon:\t     512 kB\n";
        let stat = "42 (a) R 1) S 1 42 42 0 -1 4194560 1183 0 77 0 12 3 0 0 20";
        let io = "rchar: 999\nwchar: 1\nread_bytes: 4096\nwrite_bytes: 0\n";
        let expected = Usage {
            peak_rss_bytes: Some(200 << 20),
            peak_own_bytes: Some(512 << 10),
            major_faults: Some(77),
            disk_read_bytes: Some(4096),
        };
        assert_eq!(platform::parse(status, stat, io), expected);
        assert_eq!(platform::parse("", "", ""), Usage::default());
    }

    #[test]
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    fn memory_that_was_given_back_is_still_in_the_peak() {
        let watch = Watch::start(std::process::id());
        let before = sample(std::process::id()).peak_own_bytes.unwrap();
        let block = vec![1u8; 64 << 20];
        std::thread::sleep(INTERVAL * 10);
        assert_eq!(std::hint::black_box(&block)[12_345], 1);
        drop(block);
        let usage = watch.finish();
        assert!(usage.peak_own_bytes.unwrap() >= before + (60 << 20), "{usage:?}, before: {before}");
        assert!(usage.peak_rss_bytes.unwrap() >= usage.peak_own_bytes.unwrap(), "{usage:?}");
    }

    #[test]
    fn counts_are_taken_from_the_start_and_peaks_are_kept() {
        let then = Usage { major_faults: Some(10), disk_read_bytes: None, ..Usage::default() };
        let now = Usage {
            major_faults: Some(15),
            disk_read_bytes: Some(7),
            peak_rss_bytes: Some(9),
            peak_own_bytes: None,
        };
        let since = now.since(then);
        assert_eq!(
            (since.major_faults, since.disk_read_bytes, since.peak_rss_bytes),
            (Some(5), Some(7), Some(9))
        );
        assert_eq!(then.merge(now).major_faults, Some(15));
    }

    #[test]
    fn a_process_that_is_gone_tells_nothing() {
        assert_eq!(sample(u32::MAX - 1).peak_rss_bytes, None);
    }
}
