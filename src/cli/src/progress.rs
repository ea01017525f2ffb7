//! Progress of something slow, on stderr: a line that renews itself on a terminal, nothing elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use gguf_tools::terminal::steer;
use gguf_tools::text::Safe;

/// A line such as `loading head.gguf  42 %  1.3 GiB/s`.
pub struct ProgressLine {
    what: String,
    shown: bool,
    terminal: bool,
    start: Instant,
    /// what was there at the start: it does not count towards the rate
    base: u64,
    last: Option<Instant>,
}

impl ProgressLine {
    /// Nothing is shown before the first [`update`](Self::update), and nothing in the first half second.
    pub fn new(what: impl Into<String>) -> ProgressLine {
        ProgressLine {
            what: what.into(),
            shown: false,
            terminal: std::io::stderr().is_terminal(),
            start: Instant::now(),
            base: 0,
            last: None,
        }
    }

    /// The rate is counted from here: `done` bytes were there before.
    pub fn begin_at(&mut self, done: u64) {
        self.base = done;
        self.start = Instant::now();
    }

    /// `done` of `total` bytes.
    pub fn update(&mut self, done: u64, total: u64) {
        let now = Instant::now();
        let due = self.last.is_none_or(|t| now - t >= Duration::from_millis(100));
        if !self.terminal || now - self.start < Duration::from_millis(500) || !due {
            return;
        }
        self.last = Some(now);
        self.shown = true;
        let percent = if total == 0 { 100.0 } else { done as f64 / total as f64 * 100.0 };
        let rate = done.saturating_sub(self.base) as f64 / (now - self.start).as_secs_f64();
        let left = (total.saturating_sub(done)) as f64 / rate.max(1.0);
        let rate_s = size(rate);
        steer(format_args!("\r\x1b[K{}  {percent:.0} %  {rate_s}/s  {left:.0} s left", Safe(&self.what)));
    }
}

/// Bytes as a person reads them: `1.30 GiB`, `36.2 MiB`.
pub fn size(bytes: f64) -> String {
    let mib = bytes / f64::from(1 << 20);
    if mib >= 1000.0 { format!("{:.2} GiB", mib / 1024.0) } else { format!("{mib:.1} MiB") }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if self.shown {
            steer(format_args!("\r\x1b[K"));
        }
    }
}
