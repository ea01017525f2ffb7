//! `dim-split`: cuts a GGUF into a head, one or more middles and a tail, each a GGUF of its own.

use std::{
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use gguf_tools::{
    coreml::{self, CoremlArgs},
    failure::Failure,
    gguf::{Gguf, TensorType},
    manifest::Manifest,
    plan::{BlockRange, Plan, PlanError, Request, Role},
    split::{self, Progress, SplitError, gib},
};

/// Cut a GGUF into slices that run on different machines.
///
/// Writes STEM.head.gguf, STEM.middle-A..B.gguf, STEM.tail.gguf and STEM.split.json. The head and the tail stay on
/// this machine; each middle goes to another one.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Options {
    /// The model; of a split one (NAME-00001-of-0000N.gguf), any part.
    model: PathBuf,

    /// Blocks that leave this machine, both inclusive: 11..16 are six blocks. Once per machine.
    #[arg(long, value_name = "A..B", required = true)]
    middle: Vec<BlockRange>,

    /// Folder for the slices [default: the model's own].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Store the token embedding in this type, such as q8_0.
    #[arg(long, value_name = "TYPE", value_parser = tensor_type)]
    embed_type: Option<TensorType>,

    /// Store the lm_head in this type, such as q8_0.
    #[arg(long, value_name = "TYPE", value_parser = tensor_type)]
    output_type: Option<TensorType>,

    /// Context length that the memory figures are for [default: the model's, at most 4096].
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    ctx: Option<u32>,

    /// Show the plan and write nothing.
    #[arg(long)]
    dry_run: bool,

    /// Afterwards, read everything again and compare it with the model.
    #[arg(long)]
    verify: bool,

    /// Do not find out what the middles have to answer to a known input: a host then cannot tell whether a worker
    /// computes right.
    #[arg(long)]
    no_canary: bool,

    /// Print one JSON object on standard output.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    coreml: CoremlArgs,
}

fn tensor_type(text: &str) -> Result<TensorType, String> {
    TensorType::from_name(text).ok_or_else(|| {
        let names: Vec<_> = TensorType::ALL.iter().map(|t| t.name().to_lowercase()).collect();
        format!("no such type; types are {}", names.join(", "))
    })
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.hint_from_message().report(),
    }
}

fn run(options: &Options) -> Result<(), Failure> {
    let bad_input = |e: &dyn std::fmt::Display| Failure::misuse(e);
    let gguf = Gguf::open(&options.model).map_err(|e| bad_input(&e))?;
    let stem = gguf.stem();
    let request = Request {
        middles: options.middle.clone(),
        embed_type: options.embed_type,
        output_type: options.output_type,
        stem: stem.clone(),
        no_canary: options.no_canary,
    };
    let plan = Plan::new(&gguf, &request).map_err(|e: PlanError| bad_input(&e))?;
    let n_ctx = options.ctx.unwrap_or(plan.hparams.n_ctx_train.min(4096));
    let mut text = String::new();
    show_plan(&plan, n_ctx, &mut text).map_err(|e| bad_input(&e))?;
    let packages = match options.coreml.options() {
        Some(o) => coreml::plan_middles(&gguf, &options.middle, o).map_err(|e| bad_input(&e))?,
        None => Vec::new(),
    };
    show_packages(&packages, &stem, &mut text).map_err(|e| bad_input(&e))?;
    eprint!("{text}");

    if options.dry_run {
        if options.json {
            print_json(&plan, n_ctx, None, None, &[])?;
        }
        return Ok(());
    }

    let out = options.out.clone().unwrap_or_else(|| parent(&options.model));
    coreml::check_space(&packages, &out, plan.file_bytes()).map_err(|e| bad_input(&e))?;
    let started = Instant::now();
    let mut meter = Meter::new();
    let mut copied = None;
    let result = split::split(&plan, &out, &stem, |p| {
        match p {
            Progress::Flushing => copied = Some(started.elapsed().as_secs_f64()),
            Progress::NoCanary(file, why) => {
                meter.clear();
                eprintln!("{file}: no canary, so a host cannot tell whether a worker computes right: {why}");
            }
            _ => {}
        }
        meter.show(p);
    });
    meter.clear();
    let manifest = result.map_err(failure_of)?;
    let seconds = started.elapsed().as_secs_f64();
    let took = Took { seconds, copy_seconds: copied.unwrap_or(seconds), verified: options.verify };
    eprintln!(
        "wrote {} in {seconds:.1} s ({:.2} GB/s): {}",
        gib(plan.file_bytes()),
        plan.file_bytes() as f64 / 1e9 / seconds.max(1e-9),
        out.join(split::manifest_name(&stem)).display()
    );

    if options.verify {
        let mut meter = Meter::new();
        let result = split::verify(&plan, &out, &manifest, |p| meter.show(p));
        meter.clear();
        result.map_err(Failure::failed)?;
        eprintln!("verified: every key and tensor of the slices equals the model's");
    }
    let reports = write_packages(&packages, &manifest, &out, &stem)?;
    if options.json {
        print_json(&plan, n_ctx, Some((&manifest, &out)), Some(took), &reports)?;
    }
    Ok(())
}

/// One line a middle: what the phone will get.
fn show_packages(packages: &[coreml::Plan<'_>], stem: &str, out: &mut String) -> std::fmt::Result {
    use std::fmt::Write as _;
    for plan in packages {
        let (n, directory) = (plan.n_packages(), coreml::directory_name(stem, &plan.blocks()));
        let (weights, state) = (gib(plan.weight_bytes()), gib(plan.state_bytes()));
        let packages = if n == 1 { "package" } else { "packages" };
        writeln!(out, "  Core ML: {directory}: {n} {packages}, {weights} weights + {state} cache")?;
    }
    Ok(())
}

/// Writes what `--coreml` asks for, and says what its user should know.
fn write_packages(
    packages: &[coreml::Plan<'_>],
    manifest: &Manifest,
    out: &Path,
    stem: &str,
) -> Result<Vec<coreml::Report>, Failure> {
    let total: u64 = packages.iter().map(coreml::Plan::weight_bytes).sum();
    let mut meter = Meter::new();
    let (mut done, mut before) = (0, 0);
    let result = coreml::write_middles(packages, manifest, out, stem, &mut |progress| match progress {
        coreml::Progress::Calibrating { n_tokens } => {
            meter.clear();
            eprintln!("evaluating {n_tokens} tokens of text up to the end of the middle, for the self-test");
            before = done;
        }
        coreml::Progress::Writing { index, bytes } => {
            // an evaluation is not writing's time
            if done == before {
                meter = Meter::new();
            }
            done += bytes;
            let (done, total) = (done - before, total - before);
            meter.show(Progress::Writing(done, total, &coreml::package::directory_name(index)));
        }
    });
    meter.clear();
    let reports =
        result.map_err(|e| if e.is_bad_input() { Failure::misuse(e) } else { Failure::failed(e) })?;
    for report in &reports {
        for notice in &report.notices {
            eprintln!("{notice}");
        }
        if let Some(test) = &report.manifest.selftest {
            let max_abs: Vec<_> = test.max_abs_hidden.iter().map(|x| format!("{x:.1}")).collect();
            eprintln!(
                "greatest |hidden| before the middle and after each of its blocks: {}",
                max_abs.join(" ")
            );
        }
        let seconds = report.write_time.as_secs_f64();
        let rate = report.bytes as f64 / 1e9 / seconds.max(1e-9);
        eprintln!(
            "wrote {} in {seconds:.1} s ({rate:.2} GB/s): {}",
            gib(report.bytes),
            report.directory.display()
        );
    }
    Ok(reports)
}

fn failure_of(error: SplitError) -> Failure {
    match error {
        SplitError::Space { .. } | SplitError::OverModel(_) | SplitError::Read(_) => Failure::misuse(error),
        _ => Failure::failed(error),
    }
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// What will be where, and what it takes.
///
/// ```text
/// qwen2.5-7b  qwen2, 28 blocks, width 3584, vocabulary 152064
///
///   head    blocks  0..10  (11 blocks)   5.9 GiB weights + 176.0 MiB cache at 4096 tokens   this machine
///   middle  blocks 11..16   (6 blocks)   2.6 GiB weights +  96.0 MiB cache at 4096 tokens   device 1
///   tail    blocks 17..27  (11 blocks)   5.9 GiB weights + 176.0 MiB cache at 4096 tokens   this machine
///
///   embed >[HHHHHHHHHHH]--[111111]--[TTTTTTTTTTT]> logits
/// ```
fn show_plan(plan: &Plan<'_>, n_ctx: u32, out: &mut String) -> std::fmt::Result {
    use std::fmt::Write as _;
    let h = &plan.hparams;
    writeln!(
        out,
        "{}: {}, {} blocks, width {}, vocabulary {}\n",
        plan.model_name, h.arch, h.n_blocks, h.n_embd, h.n_vocab
    )?;
    let (mut here_weights, mut here_cache) = (0, 0);
    let mut picture = String::from("  tokens >");
    let mut device = 0;
    for slice in &plan.slices {
        let cache = slice.kv_bytes_per_position * u64::from(n_ctx);
        let place = if slice.role == Role::Middle {
            device += 1;
            format!("device {device}")
        } else {
            here_weights += slice.weight_bytes;
            here_cache += cache;
            "this machine".to_owned()
        };
        let count = slice.blocks.count();
        let blocks = if count == 1 { "block" } else { "blocks" };
        writeln!(
            out,
            "  {:<6}  {:>8} {:<14} {:>10} weights + {:>9} cache   {place}",
            slice.role.as_str(),
            slice.blocks.to_string(),
            format!("({count} {blocks})"),
            gib(slice.weight_bytes),
            gib(cache),
        )?;
        let mark = match slice.role {
            Role::Head => 'H',
            Role::Tail => 'T',
            Role::Middle => char::from_digit(device % 10, 10).unwrap_or('M'),
        };
        let link = if slice.role == Role::Head { "" } else { "--" };
        let width = if h.n_blocks <= 80 { count } else { (count * 80 / h.n_blocks).max(1) };
        write!(picture, "{link}[{}]", mark.to_string().repeat(width as usize))?;
    }
    writeln!(out, "\n{picture}> logits")?;
    writeln!(
        out,
        "\n  this machine holds {} weights + {} cache at {n_ctx} tokens; {} to write",
        gib(here_weights),
        gib(here_cache),
        gib(plan.file_bytes())
    )
}

/// What a cut took.
#[derive(Clone, Copy)]
struct Took {
    /// In all, until the slices are safe on the disk.
    seconds: f64,
    /// Until all data was read, digested and handed to the system.
    copy_seconds: f64,
    /// Whether everything was read again.
    verified: bool,
}

/// One object: the plan, and what was written if anything was.
fn print_json(
    plan: &Plan<'_>,
    n_ctx: u32,
    written: Option<(&Manifest, &Path)>,
    took: Option<Took>,
    packages: &[coreml::Report],
) -> Result<(), Failure> {
    let slices: Vec<_> = plan
        .slices
        .iter()
        .enumerate()
        .map(|(i, slice)| {
            serde_json::json!({
                "role": slice.role,
                "first": slice.blocks.first,
                "last": slice.blocks.last,
                "n_blocks": slice.blocks.count(),
                "file": slice.file,
                "bytes": slice.file_bytes,
                "weight_bytes": slice.weight_bytes,
                "kv_bytes": slice.kv_bytes_per_position * u64::from(n_ctx),
                "sha256": written.map(|(m, _)| &m.slices[i].sha256),
                "canary": written.is_some_and(|(m, _)| m.slices[i].canary.is_some()),
            })
        })
        .collect();
    let object = serde_json::json!({
        "model": {
            "name": plan.model_name,
            "arch": plan.hparams.arch,
            "n_blocks": plan.hparams.n_blocks,
            "n_embd": plan.hparams.n_embd,
            "n_vocab": plan.hparams.n_vocab,
            "sha256": written.map(|(m, _)| &m.model.sha256),
        },
        "n_ctx": n_ctx,
        "bytes": plan.file_bytes(),
        "slices": slices,
        "out": written.map(|(_, out)| out.display().to_string()),
        "seconds": took.map(|t| t.seconds),
        "copy_seconds": took.map(|t| t.copy_seconds),
        "coreml": packages.iter().map(coreml_json).collect::<Vec<_>>(),
        "verified": took.is_some_and(|t| t.verified),
    });
    let mut out = std::io::stdout().lock();
    writeln!(out, "{object}").map_err(|e| Failure::failed(format!("cannot write to standard output: {e}")))
}

fn coreml_json(report: &coreml::Report) -> serde_json::Value {
    serde_json::json!({
        "directory": report.directory.display().to_string(),
        "bytes": report.bytes,
        "packages": report.manifest.packages.len(),
        "residual_scale": report.manifest.residual_scale,
        "max_abs_hidden": report.manifest.selftest.as_ref().map(|t| &t.max_abs_hidden),
        "write_seconds": report.write_time.as_secs_f64(),
    })
}

/// Shows progress on standard error: a line that is redrawn on a terminal, a line every ten seconds elsewhere.
struct Meter {
    started: Instant,
    shown: Option<Instant>,
    terminal: bool,
    drawn: bool,
}

impl Meter {
    fn new() -> Meter {
        Meter {
            started: Instant::now(),
            shown: None,
            terminal: std::io::stderr().is_terminal(),
            drawn: false,
        }
    }

    fn show(&mut self, progress: Progress<'_>) {
        let every = if self.terminal { Duration::from_millis(200) } else { Duration::from_secs(10) };
        let last = self.shown.unwrap_or(self.started);
        let flushing = progress == Progress::Flushing;
        if last.elapsed() < every && !flushing || flushing && !self.terminal {
            return;
        }
        self.shown = Some(Instant::now());
        let text = match progress {
            Progress::Flushing => "flushing to the disk".to_owned(),
            Progress::Writing(done, total, file) => self.line("writing", done, total, file),
            Progress::Verifying(done, total, file) => self.line("verifying", done, total, file),
            Progress::NoCanary(..) => return,
        };
        if self.terminal {
            eprint!("\r\x1b[K{text}");
            self.drawn = true;
        } else {
            eprintln!("{text}");
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

    fn clear(&mut self) {
        if self.drawn {
            eprint!("\r\x1b[K");
        }
    }
}
