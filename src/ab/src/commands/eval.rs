//! `dim-host eval`: how well the split guesses a text, and how far its guesses are from stock llama.cpp's.

use std::fs::File;
use std::io::{BufReader, BufWriter, IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use crate::commands::same_model;
use crate::machine::{Machine, rfc3339};
use crate::quality::{Difference, EngineResult, Evaluation, Perplexity, Window, windows};
use dim::{RowType, Session, WholeModel};
use dim_cli::args::{MachineArgs, SplitArgs};
use dim_cli::{explain, shown};
use gguf_tools::failure::Failure;
use gguf_tools::{tell, terminal};
use llama_sys_patch::Model;

/// Arguments of `dim-host eval`.
#[derive(Debug, clap::Args)]
pub struct EvalArgs {
    /// The text to guess, token for token
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Compare with stock llama.cpp on the whole model, row by row
    #[arg(long, value_name = "MODEL.gguf")]
    against: Option<PathBuf>,
    /// Tokens evaluated at once from an empty cache; every token is guessed with at least half of them before it
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    window: u32,
    /// Stop after this many tokens of the text
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Print one JSON object on stdout instead of the table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    split: SplitArgs,
    #[command(flatten)]
    machine: MachineArgs,
}

/// Runs it.
pub fn run(args: &EvalArgs) -> Result<(), Failure> {
    let resources = args.machine.resources()?;
    args.machine.set_log();
    let text = args.read_text()?;

    // one engine after the other: a machine that needs the split has no room for both models
    args.check_model()?;
    let mut engines = Vec::new();
    let mut kept = None;
    let mut tokens_of_stock = None;
    if let Some(path) = &args.against {
        let shown = shown::events(args.machine.verbose);
        let whole = WholeModel::open(path, &resources, true, shown).map_err(explain)?;
        let tokens = Text::new(whole.model(), &text, args)?;
        let n_vocab = whole.model().n_vocab();
        let mut rows = KeptRows::create(tokens.scored_rows(), n_vocab)?;
        let mut session = whole.session().map_err(explain)?;
        let on_row = |row: &[f32]| rows.write(row).map(|()| None);
        engines.push(tokens.evaluate(&mut session, "stock".to_owned(), n_vocab, on_row)?);
        kept = Some(rows);
        tokens_of_stock = Some(tokens);
    }
    let wires = args.split.wire().map_or(vec![RowType::F16, RowType::F32], |wire| vec![wire]);
    let mut name = String::new();
    let mut n_tokens = 0;
    for wire in wires {
        let host = args.split.host(&args.machine)?.wire(wire);
        let host = host.connect(shown::events(args.machine.verbose)).map_err(explain)?;
        let tokens = Text::new(host.vocabulary(), &text, args)?;
        if tokens_of_stock.as_ref().is_some_and(|stock| stock.tokens != tokens.tokens) {
            return Err(Failure::misuse(
                "the model given with --against reads the text as other tokens than the split",
            )
            .hint("--against takes the model that was cut"));
        }
        let n_vocab = host.vocabulary().n_vocab();
        let model_name = host.model_name().to_owned();
        if let Some(rows) = &mut kept {
            rows.rewind(n_vocab)?;
        }
        let mut session = host.session().map_err(explain)?;
        let result =
            tokens.evaluate(
                &mut session,
                format!("split {}", wire.name()),
                n_vocab,
                |_| match &mut kept {
                    Some(rows) => rows.read().map(Some),
                    None => Ok(None),
                },
            )?;
        engines.push(result);
        (name, n_tokens) = (model_name, tokens.tokens.len());
    }
    let evaluation = Evaluation {
        date: rfc3339(SystemTime::now()),
        model: name,
        tokens: n_tokens,
        window: args.window,
        engines,
        machine: Machine::describe(),
    };
    if args.json {
        return terminal::print(&format!(
            "{}\n",
            serde_json::to_string(&evaluation).map_err(Failure::failed)?
        ));
    }
    terminal::print(&evaluation.table())
}

impl EvalArgs {
    /// The text, once it is clear that it can be evaluated in such windows.
    fn read_text(&self) -> Result<String, Failure> {
        let (window, n_ctx) = (self.window, self.machine.n_ctx);
        if n_ctx != 0 && window >= n_ctx {
            return Err(Failure::misuse(format!(
                "--window {window}: must be less than the context, {n_ctx}"
            ))
            .hint("raise --ctx, on the workers too, or evaluate shorter windows"));
        }
        let file = self.text.display();
        let bytes =
            std::fs::read(&self.text).map_err(|e| Failure::misuse(format!("cannot read {file}: {e}")))?;
        String::from_utf8(bytes)
            .map_err(|e| Failure::misuse(format!("{file} is not UTF-8: {}", e.utf8_error())))
    }

    /// The whole model is the one that the slices were cut from.
    fn check_model(&self) -> Result<(), Failure> {
        let Some(model) = &self.against else { return Ok(()) };
        same_model(model, &self.split.cut_from()?, self.split.verify())
    }
}

/// A text as tokens, cut into windows.
struct Text {
    tokens: Vec<i32>,
    windows: Vec<Window>,
    /// before every window, for a model that begins every text with it
    bos: Option<i32>,
}

impl Text {
    fn new(model: &Model, text: &str, args: &EvalArgs) -> Result<Text, Failure> {
        let mut tokens = model.tokenize(text, false, false).map_err(Failure::misuse)?;
        tokens.truncate(args.max_tokens.unwrap_or(usize::MAX));
        if tokens.len() < 2 {
            return Err(Failure::misuse(format!("{} has fewer than two tokens", args.text.display())));
        }
        let bos = model.bos().filter(|_| model.adds_bos());
        Ok(Text { windows: windows(tokens.len(), args.window as usize), tokens, bos })
    }

    fn scored_rows(&self) -> usize {
        self.tokens.len() - 1
    }

    /// Evaluates the text. `on_row` sees every scored row in order, and may give the reference's same row.
    fn evaluate(
        &self,
        session: &mut Session,
        name: String,
        n_vocab: usize,
        mut on_row: impl FnMut(&[f32]) -> Result<Option<Vec<f32>>, Failure>,
    ) -> Result<EngineResult, Failure> {
        let mut perplexity = Perplexity::default();
        let mut difference = Difference::default();
        let mut spent = Duration::ZERO;
        let mut evaluated = 0;
        for window in &self.windows {
            let mut tokens: Vec<i32> = self.bos.into_iter().collect();
            let before = tokens.len();
            tokens.extend(&self.tokens[window.tokens.clone()]);
            let mut at = 0;
            let mut failed = None;
            let mut scoring = Duration::ZERO;
            let start = Instant::now();
            let evaluated_all = session.logits_of(&tokens, &mut |logits| {
                let chunk_at = Instant::now();
                for row in logits.chunks_exact(n_vocab) {
                    // the row of the text's token `i` guesses token `i + 1`
                    let i = (at + window.tokens.start).checked_sub(before);
                    at += 1;
                    let Some(i) = i.filter(|i| window.scored.contains(i) && failed.is_none()) else {
                        continue;
                    };
                    perplexity.add(row, self.tokens[i + 1]);
                    match on_row(row) {
                        Ok(Some(reference)) => difference.add(&reference, row),
                        Ok(None) => {}
                        Err(e) => failed = Some(e),
                    }
                }
                scoring += chunk_at.elapsed();
            });
            evaluated_all.map_err(explain)?;
            spent += start.elapsed().saturating_sub(scoring);
            evaluated += tokens.len();
            if let Some(e) = failed {
                return Err(e);
            }
            if std::io::stderr().is_terminal() {
                let (done, all) = (window.scored.end, self.tokens.len());
                terminal::steer(format_args!("\r\x1b[K{name}: {done} of {all} tokens"));
            }
        }
        if std::io::stderr().is_terminal() {
            tell!();
        }
        let (value, error) = perplexity.value().ok_or_else(|| Failure::failed("no row was scored"))?;
        Ok(EngineResult {
            name,
            rows: perplexity.rows(),
            perplexity: value,
            perplexity_error: error,
            tok_s: evaluated as f64 / spent.as_secs_f64().max(1e-9),
            difference: difference.summary(),
        })
    }
}

/// The reference's rows of logits, in a file without a name: (n_rows, n_vocab) as f32.
struct KeptRows {
    file: File,
    writer: Option<BufWriter<File>>,
    reader: Option<BufReader<File>>,
    n_vocab: usize,
}

impl KeptRows {
    fn create(n_rows: usize, n_vocab: usize) -> Result<KeptRows, Failure> {
        let bytes = n_rows as u64 * n_vocab as u64 * 4;
        let path = std::env::temp_dir().join(format!("dim-eval-{}", std::process::id()));
        let failed = |e: std::io::Error| {
            Failure::failed(format!(
                "cannot keep {:.1} GB of logits in {}: {e}",
                bytes as f64 / 1e9,
                path.display()
            ))
            .hint("TMPDIR names another place; --max-tokens makes them fewer")
        };
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(&path).map_err(failed)?;
        // it stays as long as it is open, and is gone with this process however that ends
        std::fs::remove_file(&path).map_err(failed)?;
        // the disk is asked for all of it now, not after an hour
        #[cfg(target_os = "linux")]
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes)
            .map_err(|e| failed(e.into()))?;
        let writer = Some(BufWriter::with_capacity(1 << 20, file.try_clone().map_err(failed)?));
        Ok(KeptRows { file, writer, reader: None, n_vocab })
    }

    fn write(&mut self, row: &[f32]) -> Result<(), Failure> {
        let Some(writer) = &mut self.writer else {
            return Err(Failure::failed("rows are written before they are read"));
        };
        writer
            .write_all(bytemuck::cast_slice(row))
            .map_err(|e| Failure::failed(format!("cannot keep the logits: {e}")))
    }

    /// From the first row again.
    fn rewind(&mut self, n_vocab: usize) -> Result<(), Failure> {
        if n_vocab != self.n_vocab {
            return Err(Failure::misuse(
                "the model given with --against has another vocabulary than the split",
            ));
        }
        let failed = |e: std::io::Error| Failure::failed(format!("cannot read the logits again: {e}"));
        if let Some(mut writer) = self.writer.take() {
            writer.flush().map_err(failed)?;
        }
        let mut file = self.file.try_clone().map_err(failed)?;
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        self.reader = Some(BufReader::with_capacity(1 << 20, file));
        Ok(())
    }

    fn read(&mut self) -> Result<Vec<f32>, Failure> {
        let mut row = vec![0f32; self.n_vocab];
        let Some(reader) = &mut self.reader else {
            return Err(Failure::failed("rows are read after a rewind"));
        };
        reader
            .read_exact(bytemuck::cast_slice_mut(&mut row))
            .map_err(|e| Failure::failed(format!("cannot read the logits again: {e}")))?;
        Ok(row)
    }
}
