//! Progress of a program that writes one file.

use std::{io::IsTerminal, time::Duration};

use gguf_tools::terminal;

/// One line on a terminal, a few times a second.
pub(crate) struct Bar {
    shown: Option<Duration>,
    on: bool,
}

impl Bar {
    pub(crate) fn new(quiet: bool) -> Self {
        Self { shown: None, on: !quiet && std::io::stderr().is_terminal() }
    }

    pub(crate) fn show(&mut self, done: u64, total: u64, elapsed: Duration) {
        if !self.on || self.shown.is_some_and(|at| elapsed < at + Duration::from_millis(100)) {
            return;
        }
        self.shown = Some(elapsed);
        let share = done as f64 / total.max(1) as f64;
        let rate = done as f64 / elapsed.as_secs_f64().max(1e-3);
        let full = (share * 30.0) as usize;
        terminal::steer(format_args!(
            "\r[{:<30}] {:>5.1} %  {:>7.1} of {:.1} MB  {:.2} GB/s  {:.0} s left ",
            "#".repeat(full),
            share * 100.0,
            done as f64 / 1e6,
            total as f64 / 1e6,
            rate / 1e9,
            (total - done) as f64 / rate.max(1.0)
        ));
    }

    pub(crate) fn clear(&self) {
        if self.shown.is_some() {
            terminal::steer(format_args!("\r\x1b[K"));
        }
    }
}
