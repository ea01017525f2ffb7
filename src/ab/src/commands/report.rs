//! `dim-host report`: tables and plots from records.

use std::path::{Path, PathBuf};

use crate::report::{BEGIN, END, Page, insert, read_all};
use gguf_tools::failure::Failure;
use gguf_tools::terminal;

/// Arguments of `dim-host report`.
#[derive(Debug, clap::Args)]
pub struct ReportArgs {
    /// A folder with records (*.jsonl), as `dim-host ab --out` left them
    dir: PathBuf,
    /// Put the tables into this Markdown file, between its marks, instead of writing a report
    #[arg(long, value_name = "FILE.md")]
    into: Option<PathBuf>,
    /// Write nothing: end with exit code 1 if what would be written differs from what is there
    #[arg(long, requires = "into")]
    check: bool,
}

/// Runs it.
pub fn run(args: &ReportArgs) -> Result<(), Failure> {
    let measured = read_all(&args.dir).map_err(Failure::misuse)?;
    if measured.is_empty() {
        return Err(Failure::misuse(format!("there are no records in {}", args.dir.display()))
            .hint("dim-host ab --out DIR makes some"));
    }
    let page = Page::new(&measured);
    let Some(document) = &args.into else {
        let file =
            page.write(&args.dir).map_err(|e| Failure::failed(format!("cannot write the report: {e}")))?;
        return terminal::print(&format!("{}\n", file.display()));
    };
    let charts = args.dir.join("charts");
    let text = std::fs::read_to_string(document)
        .map_err(|e| Failure::misuse(format!("cannot read {}: {e}", document.display())))?;
    let generated = page.markdown(3, &relative(document, &charts));
    let new = insert(&text, &generated).ok_or_else(|| {
        Failure::misuse(format!("{} has no place for the tables", document.display()))
            .hint(format!("it needs the lines {BEGIN} and {END}"))
    })?;
    if args.check {
        let same = |name: &str, svg: &str| {
            std::fs::read_to_string(charts.join(format!("{name}.svg"))).is_ok_and(|there| there == svg)
        };
        if new != text || !page.charts().all(|chart| same(&chart.name, &chart.svg)) {
            return Err(Failure::failed(format!("{} is not what its records say", document.display()))
                .hint(format!("dim-host report {} --into {}", args.dir.display(), document.display())));
        }
        return Ok(());
    }
    page.write_charts(&charts).map_err(|e| Failure::failed(format!("cannot write the plots: {e}")))?;
    std::fs::write(document, new)
        .map_err(|e| Failure::failed(format!("cannot write {}: {e}", document.display())))
}

/// How `document` names `to`, which is beside it or below; else as given.
fn relative(document: &Path, to: &Path) -> String {
    let base = document.parent().unwrap_or(Path::new(""));
    to.strip_prefix(base).unwrap_or(to).display().to_string()
}
