//! What the demo shows: plain lines, with some weight and colour on a terminal.

use std::fmt::Write as _;
use std::io::IsTerminal as _;

use dim::host::report::thousands;
use gguf_tools::failure::Failure;
use gguf_tools::manifest::Manifest;
use gguf_tools::plan::Role;
use gguf_tools::terminal;
use gguf_tools::text::Safe;

use super::conversation::{Arm, Reply};
use crate::progress::size;

/// Standard output.
pub(super) struct Page {
    colours: bool,
}

impl Page {
    pub(super) fn new() -> Page {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Page { colours: wanted && std::io::stdout().is_terminal() }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// A line as it is.
    ///
    /// # Errors
    /// Of this and of all that print: nobody reads it any more.
    pub(super) fn line(&self, text: &str) -> Result<(), Failure> {
        terminal::print(&format!("{text}\n"))
    }

    pub(super) fn heading(&self, text: &str) -> Result<(), Failure> {
        self.line(&self.paint("1", text))
    }

    /// A command, as it could be typed.
    pub(super) fn command(&self, typed: &str) -> Result<(), Failure> {
        self.line(&self.paint("2", &format!("$ {}", Safe(typed))))
    }

    /// What a command came to.
    pub(super) fn outcome(&self, text: &str) -> Result<(), Failure> {
        self.line(&format!("  {}", Safe(text)))
    }

    /// What is said to the model: a question, or the beginning of a text.
    pub(super) fn said(&self, text: &str, question: bool) -> Result<(), Failure> {
        if question {
            self.line(&format!("{} {}", self.paint("1;36", "you>"), self.paint("36", text)))
        } else {
            terminal::print(&self.paint("2", text))
        }
    }

    /// Something that is as it should be.
    pub(super) fn good(&self, text: &str) -> Result<(), Failure> {
        self.line(&self.paint("1;32", text))
    }
}

/// Who holds what.
///
/// ```text
///   +-- dim-host, process 4710 ------------------+               +-- dim-worker, process 4711 --+
///   | head: embedding, blocks 0..9     121.1 MiB | -- 2.3 kB --> | blocks 10..19       67.5 MiB |
///   | tail: blocks 20..29, lm_head     121.1 MiB | <-- 2.3 kB -- | 127.0.0.1:43211              |
///   +--------------------------------------------+   per token   +------------------------------+
/// ```
pub(super) fn picture(manifest: &Manifest, worker_pid: u32, address: &str) -> String {
    let bytes = |role| {
        let slices = manifest.slices.iter().filter(|slice| slice.role == role);
        size(slices.map(|slice| slice.bytes).sum::<u64>() as f64)
    };
    let blocks = |role| {
        let slice = manifest.slices.iter().find(|slice| slice.role == role);
        slice.map_or(String::new(), |slice| slice.blocks().to_string())
    };
    let host = [
        (format!("head: embedding, blocks {}", blocks(Role::Head)), bytes(Role::Head)),
        (format!("tail: blocks {}, lm_head", blocks(Role::Tail)), bytes(Role::Tail)),
    ];
    let worker = [
        (format!("middle: blocks {}", blocks(Role::Middle)), bytes(Role::Middle)),
        (format!("listens on {address}"), String::new()),
    ];
    let left = Frame::new(&format!("dim-host, process {}", std::process::id()), &host);
    let right = Frame::new(&format!("dim-worker, process {worker_pid}"), &worker);
    // an F32 row, as in the conversation that follows
    let row = format!("{} bytes", thousands(u64::from(manifest.model.n_embd) * 4));
    let (there, back) = (format!(" -- {row} --> "), format!(" <-- {row} -- "));
    let under = format!("{:^width$}", "a token", width = there.len());
    let mut text = String::new();
    let links = ["".into(), there.clone(), back, under];
    for (i, link) in links.iter().enumerate() {
        let _ = writeln!(text, "  {}{link:width$}{}", left.line(i), right.line(i), width = there.len());
    }
    text
}

/// A box with two lines.
struct Frame {
    title: String,
    lines: Vec<String>,
    width: usize,
}

impl Frame {
    fn new(title: &str, lines: &[(String, String)]) -> Frame {
        let left = lines.iter().map(|(text, _)| text.len()).max().unwrap_or(0);
        let right = lines.iter().map(|(_, size)| size.len()).max().unwrap_or(0);
        let line = |(text, size): &(String, String)| match right {
            0 => format!("{text:left$}"),
            _ => format!("{text:left$}  {size:>right$}"),
        };
        let lines: Vec<String> = lines.iter().map(line).collect();
        let width = lines.iter().map(String::len).max().unwrap_or(0).max(title.len() + 4);
        Frame { title: title.to_owned(), lines, width }
    }

    fn line(&self, i: usize) -> String {
        let width = self.width;
        match i {
            0 => format!("+{:-<width$}+", format!("- {} ", self.title), width = width + 2),
            i if i <= self.lines.len() => format!("| {:width$} |", self.lines[i - 1]),
            _ => format!("+{}+", "-".repeat(width + 2)),
        }
    }
}

/// The beginning of a reply as two ways of computing it had it, token under token.
///
/// ```text
///   split  The| capital| of| France| is| Paris|.
///   stock  The| capital| of| France| is| Paris|.
/// ```
pub(super) fn token_under_token(split: &Reply, stock: &Reply) -> String {
    let cell = |reply: &Reply, i: usize| {
        let piece = reply.pieces.get(i).map_or("", String::as_str);
        Safe(piece).to_string()
    };
    // the token that ends a reply has no text
    let shown =
        |reply: &Reply| reply.pieces.len() - usize::from(reply.pieces.last().is_some_and(String::is_empty));
    let n = shown(split).max(shown(stock));
    let mut rows = [String::from("  split  "), String::from("  stock  ")];
    for i in 0..n {
        let (a, b) = (cell(split, i), cell(stock, i));
        let width = a.chars().count().max(b.chars().count());
        if rows[0].chars().count() + width > PAGE_WIDTH {
            rows.iter_mut().for_each(|row| row.push_str("..."));
            break;
        }
        let mark = if i + 1 < n { "|" } else { "" };
        let _ = write!(rows[0], "{a:width$}{mark}");
        let _ = write!(rows[1], "{b:width$}{mark}");
    }
    format!("{}\n{}\n", rows[0].trim_end(), rows[1].trim_end())
}

/// One line per way of computing it; the first is what the others are held against.
pub(super) fn table(arms: &[&Arm]) -> String {
    let head = ["", "prompt", "generation", "first token", "bytes a token, each way", "tokens as stock"];
    let mut rows = vec![head.map(str::to_owned)];
    for arm in arms {
        let first = arm.replies.first().map_or(0.0, |reply| reply.report.ttft_ms);
        let (same, all) = (arm.agreeing(arms[0]), arms[0].tokens().len());
        rows.push([
            arm.name.to_owned(),
            format!("{:.0} tok/s", arm.prompt_tok_s()),
            format!("{:.1} tok/s", arm.gen_tok_s()),
            format!("{first:.0} ms"),
            arm.bytes_per_token()
                .map_or("-".to_owned(), |(up, down)| format!("{} + {}", thousands(up), thousands(down))),
            if std::ptr::eq(*arm, arms[0]) { "-".to_owned() } else { format!("{same} of {all}") },
        ]);
    }
    let width = |i: usize| rows.iter().map(|row| row[i].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate();
        let cells =
            cells.map(|(i, (cell, &w))| if i == 0 { format!("{cell:<w$}") } else { format!("{cell:>w$}") });
        let _ = writeln!(text, "  {}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    text
}

/// Columns that are used.
const PAGE_WIDTH: usize = 96;

#[cfg(test)]
mod tests {
    use super::*;
    use dim::host::report::{Stop, WireReport};

    fn reply(tokens: &[i32], pieces: &[&str]) -> Reply {
        let report = dim::host::report::Report {
            mode: "split".into(),
            model: "m".into(),
            tokens: tokens.to_vec(),
            text: pieces.concat(),
            stop: Stop::Length,
            error: None,
            seed: 0,
            sampled: false,
            prompt_tokens: 30,
            prompt_tok_s: 0.0,
            gen_tok_s: 0.0,
            ttft_ms: 100.0,
            start_to_first_token_ms: 0.0,
            load_ms: 0.0,
            prompt_ms: 100.0,
            gen_ms: 20.0,
            sample_ms: 0.0,
            stages: vec![],
            wire: WireReport {
                dtype: "f32".into(),
                round_trips: 3,
                gen_bytes_sent: 4_700,
                gen_bytes_received: 4_600,
                ..WireReport::default()
            },
        };
        Reply { report, pieces: pieces.iter().map(|&p| p.to_owned()).collect() }
    }

    #[test]
    fn tokens_stand_under_each_other_and_obey_no_terminal() {
        let split = reply(&[1, 2, 3], &["The", " end", "\n"]);
        let stock = reply(&[1, 4, 3], &["The", " start", "\u{1b}[2J"]);
        assert_eq!(
            token_under_token(&split, &stock),
            "  split  The| end  |\\n\n  stock  The| start|\\u{1b}[2J\n"
        );
    }

    #[test]
    fn the_table_counts_tokens_from_the_start_of_each_reply() {
        let stock = Arm { name: "stock", replies: vec![reply(&[1, 2, 3], &[]), reply(&[5, 6, 7], &[])] };
        let split = Arm { name: "split", replies: vec![reply(&[1, 9, 3], &[]), reply(&[5, 6, 7], &[])] };
        let text = table(&[&stock, &split]);
        assert!(
            text.contains("4 of 6") && text.contains("300 tok/s") && text.contains("100.0 tok/s"),
            "{text}"
        );
        assert!(text.contains("2,350 + 2,300"), "{text}");
    }

    #[test]
    fn frames_are_as_wide_as_what_stands_in_them() {
        let frame = Frame::new("a", &[("long line".into(), "1".into()), ("b".into(), "22".into())]);
        let lines: Vec<String> = (0..4).map(|i| frame.line(i)).collect();
        assert_eq!(
            lines,
            ["+- a -----------+", "| long line   1 |", "| b          22 |", "+---------------+"]
                .map(str::to_owned)
                .to_vec()
        );
    }
}
