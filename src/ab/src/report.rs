//! A report of all records in a folder: one page of HTML with its plots inside, and the same as Markdown with its plots
//! as SVG files beside it. Made from the records alone: the same records give the same report, byte for byte.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use crate::charts::{self, Chart, significant};
use crate::quality::Evaluation;
use crate::record::{Arm, Record, RecordError, Scenario, read};
use crate::stats::{Ratio, Summary};
use crate::summary::{Row, Same, Table, summarise};

/// A report, before it is a page.
#[derive(Debug)]
pub struct Page {
    blocks: Vec<Block>,
}

#[derive(Debug)]
enum Block {
    Heading(String),
    Paragraph(String),
    List(Vec<String>),
    Table { head: Vec<&'static str>, rows: Vec<Vec<String>> },
    Chart(Chart),
}

/// All that was measured.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// What `dim-host ab` recorded.
    pub records: Vec<Record>,
    /// What `dim-host eval --json` printed.
    pub evaluations: Vec<Evaluation>,
}

impl Measured {
    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty() && self.evaluations.is_empty()
    }
}

/// All that was measured below `dir`: every file that ends in `.jsonl` (records) or `.eval.json`
/// (evaluations), there and one folder down, in the order of their names.
pub fn read_all(dir: &Path) -> Result<Measured, RecordError> {
    let io = |source| RecordError::Io { file: dir.display().to_string(), source };
    let mut files = Vec::new();
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.is_dir() { folders.push(path) } else { files.push(path) }
    }
    for folder in folders {
        files.extend(std::fs::read_dir(&folder).map_err(io)?.flatten().map(|e| e.path()));
    }
    files.sort();
    let mut measured = Measured::default();
    for file in files {
        let name = file.to_string_lossy();
        if name.ends_with(".jsonl") {
            measured.records.extend(read(&file)?);
        } else if name.ends_with(".eval.json") {
            let of_file = |source| RecordError::Io { file: name.clone().into_owned(), source };
            let text = std::fs::read_to_string(&file).map_err(of_file)?;
            let not_a_record =
                |source| RecordError::NotARecord { file: name.clone().into_owned(), line: 1, source };
            measured.evaluations.push(serde_json::from_str(&text).map_err(not_a_record)?);
        }
    }
    Ok(measured)
}

impl Page {
    /// What was measured says.
    pub fn new(measured: &Measured) -> Page {
        let tables = summarise(&measured.records);
        let mut page = Page { blocks: Vec::new() };
        for (i, table) in tables.iter().enumerate() {
            page.table(table, i + 1);
        }
        page.over_several(&tables);
        measured.evaluations.iter().for_each(|e| page.evaluation(e));
        page
    }

    fn evaluation(&mut self, e: &Evaluation) {
        self.blocks.push(Block::Heading(format!("{}: the answer", e.model)));
        let day: String = e.date.chars().take(10).collect();
        self.blocks.push(Block::Paragraph(format!(
            "{} tokens of text in windows of {}, every token but the first guessed once; compared with stock llama.cpp \
             row by row. {day}; {} ({}), {}.",
            e.tokens, e.window, e.machine.cpu, e.machine.arch, e.machine.os
        )));
        self.blocks.push(Block::Table { head: Evaluation::HEAD.to_vec(), rows: e.cells() });
    }

    fn table(&mut self, table: &Table, number: usize) {
        self.blocks.push(Block::Heading(title(&table.scenario)));
        self.blocks.push(Block::Paragraph(conditions(table)));
        let base = if table.base == Some(Arm::SoloUnlimited) { "x solo, no limit" } else { "x solo" };
        let head = [
            "arm",
            "generation tok/s",
            base,
            "prompt tok/s",
            base,
            "first token after a cold start",
            "same tokens as stock",
        ];
        self.dense_table(&head, table.rows.iter().map(speed_cells).collect());
        let head = [
            "arm",
            "model on the host",
            "own memory",
            "mapped memory",
            "major faults a round",
            "disk reads a round",
            "wire per token, up / down",
            "wire of a first load, up / down",
            "energy per token",
        ];
        let costs = table.rows.iter().map(|row| cost_cells(row, &table.scenario));
        self.dense_table(&head, costs.collect());
        let unexplained: Vec<Vec<String>> = table.rows.iter().filter_map(breakdown_cells).collect();
        if !unexplained.is_empty() {
            self.blocks.push(Block::Table {
                head: vec!["arm", "ms per token", "of which", "not explained"],
                rows: unexplained,
            });
        }
        let marked: Vec<String> = table
            .rows
            .iter()
            .flat_map(|row| {
                row.not_counted
                    .iter()
                    .map(|(round, why)| format!("{}, round {round}, not counted: {why}", row.arm.title()))
            })
            .collect();
        if !marked.is_empty() {
            self.blocks.push(Block::List(marked));
        }
        let slug = slug(&table.scenario);
        self.blocks.extend(charts::speeds(table, format!("{number:02}-{slug}-speed")).map(Block::Chart));
        self.blocks.extend(charts::breakdown(table, format!("{number:02}-{slug}-time")).map(Block::Chart));
    }

    /// A table without the columns that say nothing in any row.
    fn dense_table(&mut self, head: &[&'static str], rows: Vec<Vec<String>>) {
        let says = |column: &usize| rows.iter().any(|row| row[*column] != NOTHING);
        let kept: Vec<usize> = (0..head.len()).filter(says).collect();
        let rows = rows.iter().map(|row| kept.iter().map(|&i| row[i].clone()).collect()).collect();
        self.blocks.push(Block::Table { head: kept.iter().map(|&i| head[i]).collect(), rows });
    }

    /// Plots over tables that differ in one thing only. How many tokens were generated does not count: speeds are
    /// per token, and where one takes ten seconds nobody waits for 64.
    fn over_several(&mut self, tables: &[Table]) {
        let without_limit = |s: &Scenario| Scenario {
            memory_limit_bytes: None,
            middle: String::new(),
            remote_blocks: 0,
            worker_memory_limit_bytes: None,
            n_predict: 0,
            ..s.clone()
        };
        let without_link = |s: &Scenario| Scenario { link: None, n_predict: 0, ..s.clone() };
        let mut groups: Vec<(Vec<&Table>, bool)> = Vec::new();
        for (same, by_memory) in
            [(&without_limit as &dyn Fn(&Scenario) -> Scenario, true), (&without_link, false)]
        {
            let mut of_kind: Vec<Vec<&Table>> = Vec::new();
            for table in tables {
                let fits = |g: &&mut Vec<&Table>| {
                    same(&g[0].scenario) == same(&table.scenario) && g[0].machine == table.machine
                };
                match of_kind.iter_mut().find(fits) {
                    Some(group) => group.push(table),
                    None => of_kind.push(vec![table]),
                }
            }
            groups.extend(of_kind.into_iter().map(|g| (g, by_memory)));
        }
        for (group, by_memory) in groups {
            let scenario = &group[0].scenario;
            let chart = if by_memory {
                charts::against_memory(&group, format!("memory-{}", slug(&without_limit(scenario))))
            } else {
                charts::against_round_trip(&group, format!("round-trip-{}", slug(&without_link(scenario))))
            };
            if let Some(chart) = chart {
                let what = if by_memory { "memory" } else { "round-trip time" };
                self.blocks.push(Block::Heading(format!("{}: speed against {what}", scenario.model)));
                self.blocks.push(Block::Chart(chart));
            }
        }
    }

    /// The page as Markdown, headings from `level` on, plots as files in `charts`.
    pub fn markdown(&self, level: usize, charts: &str) -> String {
        let mut text = String::new();
        for block in &self.blocks {
            let _ = match block {
                Block::Heading(t) => writeln!(text, "{} {t}\n", "#".repeat(level)),
                Block::Paragraph(t) => writeln!(text, "{t}\n"),
                Block::List(items) => {
                    items.iter().for_each(|item| text.push_str(&format!("- {item}\n")));
                    writeln!(text)
                }
                Block::Table { head, rows } => {
                    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
                    text.push_str(&line(&head.iter().map(|&h| h.to_owned()).collect::<Vec<_>>()));
                    text.push_str(&line(&vec!["---".to_owned(); head.len()]));
                    rows.iter().for_each(|row| text.push_str(&line(row)));
                    writeln!(text)
                }
                Block::Chart(chart) => writeln!(text, "![{}]({charts}/{}.svg)\n", chart.caption, chart.name),
            };
        }
        text
    }

    /// The page as one HTML file that needs nothing beside it.
    pub fn html(&self) -> String {
        let mut body = String::new();
        for block in &self.blocks {
            let _ = match block {
                Block::Heading(t) => writeln!(body, "<h2>{}</h2>", escape(t)),
                Block::Paragraph(t) => writeln!(body, "<p>{}</p>", escape(t)),
                Block::List(items) => {
                    let items: String = items.iter().map(|i| format!("<li>{}</li>", escape(i))).collect();
                    writeln!(body, "<ul class=\"marked\">{items}</ul>")
                }
                Block::Table { head, rows } => {
                    let cells = |tag: &str, cells: &mut dyn Iterator<Item = &str>| -> String {
                        cells.map(|c| format!("<{tag}>{}</{tag}>", escape(c))).collect()
                    };
                    let rows: String = rows
                        .iter()
                        .map(|row| format!("<tr>{}</tr>\n", cells("td", &mut row.iter().map(String::as_str))))
                        .collect();
                    let head = cells("th", &mut head.iter().copied());
                    writeln!(body, "<div class=\"wide\"><table>\n<tr>{head}</tr>\n{rows}</table></div>")
                }
                Block::Chart(chart) => {
                    writeln!(
                        body,
                        "<figure>{}<figcaption>{}</figcaption></figure>",
                        chart.svg,
                        escape(&chart.caption)
                    )
                }
            };
        }
        format!("{HTML_HEAD}{body}</main></body></html>\n")
    }

    /// Writes `report.html`, `report.md` and `charts/*.svg` into `dir`. Returns the page's file.
    pub fn write(&self, dir: &Path) -> io::Result<PathBuf> {
        self.write_charts(&dir.join("charts"))?;
        std::fs::write(dir.join("report.md"), format!("# A/B\n\n{}", self.markdown(2, "charts")))?;
        let page = dir.join("report.html");
        std::fs::write(&page, self.html())?;
        Ok(page)
    }

    /// Writes the plots into `dir`, which then holds no other plots.
    pub fn write_charts(&self, dir: &Path) -> io::Result<()> {
        std::fs::create_dir_all(dir)?;
        for entry in std::fs::read_dir(dir)?.flatten() {
            if entry.path().extension().is_some_and(|e| e == "svg") {
                std::fs::remove_file(entry.path())?;
            }
        }
        for chart in self.charts() {
            std::fs::write(dir.join(format!("{}.svg", chart.name)), &chart.svg)?;
        }
        Ok(())
    }

    /// The plots.
    pub fn charts(&self) -> impl Iterator<Item = &Chart> {
        self.blocks.iter().filter_map(|b| if let Block::Chart(chart) = b { Some(chart) } else { None })
    }
}

/// Puts `generated` between the two marks of `document`. `None` where they are not there, in this order.
pub fn insert(document: &str, generated: &str) -> Option<String> {
    let start = document.find(BEGIN)? + BEGIN.len();
    let end = start + document[start..].find(END)?;
    Some(format!("{}\n\n{}\n\n{}", &document[..start], generated.trim(), &document[end..]))
}

/// Marks the place of the generated part in a document.
pub const BEGIN: &str = "<!-- generated by `dim-host report`: do not edit below -->";
/// Marks its end.
pub const END: &str = "<!-- end of the generated part -->";

fn title(s: &Scenario) -> String {
    let mut title = format!("{}, {} of its blocks elsewhere ({})", s.model, s.remote_blocks, s.middle);
    if let Some(limit) = s.memory_limit_bytes {
        let _ = write!(title, ", host limited to {}", gigabytes(limit));
    }
    if let Some(link) = s.link {
        let _ = write!(title, ", over a link of {link}");
    }
    title
}

fn conditions(table: &Table) -> String {
    let s = &table.scenario;
    let plural = |n: u64, what: &str| if n == 1 { format!("{n} {what}") } else { format!("{n} {what}s") };
    let mut text = format!(
        "Prompt of {}, {} generated greedily, {} per process, context {}, rows on the wire as {}.",
        plural(s.prompt_tokens as u64, "token"),
        plural(s.n_predict as u64, "token"),
        plural(s.threads.into(), "thread"),
        s.n_ctx,
        s.wire,
    );
    if s.local_workers {
        text.push_str(" The worker is a process on the same machine");
        if let Some(limit) = s.worker_memory_limit_bytes {
            let _ = write!(text, ", limited to {}", gigabytes(limit));
        }
        text.push('.');
    }
    let cores = |cpus: &[usize]| cpus.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    if !s.host_cpus.is_empty() || !s.worker_cpus.is_empty() {
        let _ =
            write!(text, " Host on core {}, worker on core {}.", cores(&s.host_cpus), cores(&s.worker_cpus));
    }
    if let Some(link) = s.link {
        let _ = write!(text, " Emulated link: {link}, seed {}.", link.seed);
    }
    let m = &table.machine;
    let days = if table.days.0 == table.days.1 {
        table.days.0.clone()
    } else {
        format!("{} to {}", table.days.0, table.days.1)
    };
    let _ = write!(
        text,
        " {days}; {} ({}, {}), {} of memory, {}; dim {}, llama.cpp of llama-cpp-sys-2 {}.",
        m.cpu,
        m.arch,
        plural(m.cores as u64, "core"),
        gigabytes(m.memory_bytes),
        m.os,
        table.versions.dim,
        table.versions.llama_cpp_sys_2,
    );
    text
}

fn speed_cells(row: &Row) -> Vec<String> {
    let same = match row.same {
        Same::NotCompared => NOTHING.to_owned(),
        Same::Yes => "yes".to_owned(),
        Same::Until(at, of) => format!("the first {at} of {of}"),
    };
    vec![
        row.arm.title().to_owned(),
        row.generation.map_or(NOTHING.to_owned(), range),
        row.generation_ratio.map_or(NOTHING.to_owned(), ratio),
        row.prompt.map_or(NOTHING.to_owned(), range),
        row.prompt_ratio.map_or(NOTHING.to_owned(), ratio),
        row.first_token_s.map_or(NOTHING.to_owned(), |s| format!("{} s", significant(s.median))),
        same,
    ]
}

fn cost_cells(row: &Row, scenario: &Scenario) -> Vec<String> {
    let or_nothing = |bytes: Option<u64>| bytes.map_or(NOTHING.to_owned(), gigabytes);
    let count = |s: Option<Summary>| s.map_or(NOTHING.to_owned(), |s| format!("{:.0}", s.median));
    let mapped = match (row.group_peak_bytes, scenario.memory_limit_bytes) {
        (Some(group), Some(_)) => {
            format!("{} ({} in its group)", or_nothing(row.peak_rss_bytes), gigabytes(group))
        }
        _ => or_nothing(row.peak_rss_bytes),
    };
    vec![
        row.arm.title().to_owned(),
        gigabytes(row.model_bytes),
        or_nothing(row.peak_own_bytes),
        mapped,
        count(row.major_faults),
        row.disk_read_bytes.map_or(NOTHING.to_owned(), |s| gigabytes(s.median as u64)),
        row.wire_per_token.map_or(NOTHING.to_owned(), |(up, down)| format!("{up:.0} / {down:.0} B")),
        row.wire_first_load
            .map_or(NOTHING.to_owned(), |(up, down)| format!("{} / {}", gigabytes(up), gigabytes(down))),
        row.joules_per_token.map_or(NOTHING.to_owned(), |s| format!("{} J", significant(s.median))),
    ]
}

fn breakdown_cells(row: &Row) -> Option<Vec<String>> {
    let b = row.breakdown.as_ref()?;
    let parts = b
        .parts
        .iter()
        .map(|(name, ms)| format!("{name}: {}", significant(*ms)))
        .collect::<Vec<_>>()
        .join(", ");
    Some(vec![
        row.arm.title().to_owned(),
        significant(b.total_ms),
        parts,
        // + 0.0: a rounded minus nothing is shown as nothing
        format!("{:.1} %", (b.unexplained() * 1e3).round() / 10.0 + 0.0),
    ])
}

fn range(s: Summary) -> String {
    if s.n == 1 {
        return significant(s.median);
    }
    format!("{} ({} to {})", significant(s.median), significant(s.min), significant(s.max))
}

fn ratio(r: Ratio) -> String {
    if !r.has_interval {
        return significant(r.ratio);
    }
    format!("{} ({} to {})", significant(r.ratio), significant(r.low), significant(r.high))
}

/// Bytes as people read them, in powers of ten.
pub(super) fn gigabytes(bytes: u64) -> String {
    let value = bytes as f64;
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{} kB", significant(value / 1e3)),
        1_000_000..1_000_000_000 => format!("{} MB", significant(value / 1e6)),
        _ => format!("{} GB", significant(value / 1e9)),
    }
}

/// A name for files: letters, digits and dashes.
fn slug(s: &Scenario) -> String {
    let mut name = s.model.clone();
    if let Some(limit) = s.memory_limit_bytes {
        let _ = write!(name, "-{}gb", limit / 1_000_000_000);
    }
    if let Some(link) = s.link {
        let _ = write!(name, "-{}ms", link.rtt_ms);
    }
    let safe = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c.to_ascii_lowercase() } else { '-' };
    name.chars().map(safe).collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const NOTHING: &str = "–";

const HTML_HEAD: &str = r#"<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>dim: A/B</title>
<style>
body { font: 15px/1.5 "DejaVu Sans", Helvetica, Arial, sans-serif; color: #222; margin: 0; background: #fff; }
main { max-width: 1080px; margin: 0 auto; padding: 24px; }
h1 { font-size: 24px; } h2 { font-size: 18px; margin-top: 40px; border-top: 1px solid #ddd; padding-top: 24px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 12px 0; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; border-bottom: 1px solid #e3e3e3; text-align: left; vertical-align: top; }
th { font-weight: 600; border-bottom: 2px solid #bbb; }
td:first-child { font-weight: 600; white-space: nowrap; }
figure { margin: 20px 0; } figure svg { max-width: 100%; height: auto; }
figcaption { font-size: 13px; color: #555; }
.marked { color: #a33; font-size: 13px; }
</style></head><body><main>
<h1>Split or solo?</h1>
<p>Every arm ran as a process of its own, in turns. Speeds are medians over the steady rounds (slowest to fastest), after
the process has evaluated the prompt once unmeasured; ratios are of medians, with the interval that 95 of 100 resamples of
the rounds fall into. A first load starts with none of the arm's files in the page cache. Rounds that did not go as asked
are named and not counted.</p>
"#;

#[cfg(test)]
mod tests;
