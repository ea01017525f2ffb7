//! Progress on standard error.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use gguf_tools::{split::CutProgress, tell, terminal, text::Safe};

/// What a terminal does with the line it stands on: back to its start, and empty.
const REDRAW: &str = "\r\x1b[K";

/// Shows progress on standard error: a line that is redrawn on a terminal, a line every ten seconds elsewhere.
pub(crate) struct Meter {
    started: Instant,
    shown: Option<Instant>,
    terminal: bool,
    drawn: bool,
}

impl Meter {
    pub(crate) fn new() -> Meter {
        Meter { started: Instant::now(), shown: None, terminal: io::stderr().is_terminal(), drawn: false }
    }

    pub(crate) fn show(&mut self, progress: CutProgress<'_>) {
        let flushing = matches!(progress, CutProgress::Flushing);
        if !flushing && !self.is_due() || flushing && !self.terminal {
            return;
        }
        let text = match progress {
            CutProgress::Flushing => "flushing to the disk".to_owned(),
            CutProgress::Writing(done, total, file) => self.line("writing", done, total, file),
            CutProgress::Verifying(done, total, file) => self.line("verifying", done, total, file),
            CutProgress::NoCanary(..) => return,
        };
        self.draw(text);
    }

    /// Bytes of a file that have arrived.
    #[cfg(feature = "hub")]
    pub(crate) fn fetching(&mut self, done: u64, total: u64, file: &str) {
        if !self.is_due() {
            return;
        }
        let text = self.line("fetching", done, total, file);
        self.draw(text);
    }

    fn is_due(&mut self) -> bool {
        let every = if self.terminal { Duration::from_millis(200) } else { Duration::from_secs(10) };
        let due = self.shown.unwrap_or(self.started).elapsed() >= every;
        if due {
            self.shown = Some(Instant::now());
        }
        due
    }

    fn draw(&mut self, text: String) {
        if self.terminal {
            terminal::steer(format_args!("{REDRAW}{}", Safe(&text)));
            self.drawn = true;
        } else {
            tell!("{}", Safe(&text));
        }
    }

    fn line(&self, what: &str, done: u64, total: u64, file: &str) -> String {
        let seconds = self.started.elapsed().as_secs_f64().max(1e-9);
        let rate = done as f64 / seconds;
        let left = total.saturating_sub(done) as f64 / rate.max(1.0);
        let percent = 100 * done / total.max(1);
        let (minutes, seconds) = (left as u64 / 60, left as u64 % 60);
        format!("{percent:>3}%  {:.2} GB/s  {minutes}:{seconds:02} left  {what} {file}", rate / 1e9)
    }

    pub(crate) fn clear(&mut self) {
        if self.drawn {
            terminal::steer(format_args!("{REDRAW}"));
            self.drawn = false;
        }
    }
}
