//! `dim-synth`: writes a loadable GGUF of a real architecture and shape with random weights.
#![forbid(unsafe_code)]

#[path = "common/bar.rs"]
mod bar;

use std::{io::Write, path::PathBuf, process::ExitCode, time::Instant};

use bar::Bar;
use clap::Parser;
use gguf_tools::failure::Failure;
use gguf_tools::synth::{self, FAMILIES, Head, SHAPES, Spec};
use gguf_tools::tell;
use gguf_tools::text::Safe;

/// Write a GGUF of a real architecture and shape with random weights: for tests, benchmarks and the demo.
#[derive(Parser)]
#[command(name = "dim-synth", version)]
struct Args {
    /// The file to write
    #[arg(required_unless_present = "list")]
    out: Option<PathBuf>,
    /// Dimensions: tiny, demo, small, or those of a real model (see --list)
    #[arg(long, default_value = "tiny")]
    shape: String,
    /// Architecture, for the shapes that every architecture can have [default: qwen2]
    #[arg(long)]
    arch: Option<String>,
    /// Type of the matrices: f32, f16, bf16, q8_0, q6_k, q4_k, q4_k_m, ...
    #[arg(long = "type", default_value = "f16")]
    weights: String,
    /// The lm_head is the token embedding [default: as in the real model]
    #[arg(long, conflicts_with = "untied")]
    tied: bool,
    /// The lm_head is a matrix of its own
    #[arg(long)]
    untied: bool,
    /// Another seed is another model
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Number of tokens [default: as in the real model]
    #[arg(long)]
    vocab: Option<u32>,
    /// Context length the model says it was trained for [default: as in the real model]
    #[arg(long)]
    ctx: Option<u32>,
    /// Number of blocks [default: as in the real model]
    #[arg(long)]
    blocks: Option<u32>,
    /// List shapes, architectures and types, and end
    #[arg(long)]
    list: bool,
    /// No progress on stderr
    #[arg(long, short)]
    quiet: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.list {
        return list();
    }
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure(error).report(),
    }
}

/// As the library says it; where the way out is an option, by its name.
fn failure(error: synth::Error) -> Failure {
    let option = match &error {
        synth::Error::ShapeIsOf { .. } => "leave --arch out, or take tiny, demo or small",
        synth::Error::OnlyTied { .. } => "leave --untied out",
        synth::Error::OnlyOwnHead { .. } => "leave --tied out",
        _ => return Failure::from(error),
    };
    Failure::from(error).hint(option)
}

fn run(args: &Args) -> Result<(), synth::Error> {
    let mut spec = Spec::new(&args.shape, args.arch.as_deref())?.with_type(&args.weights)?.seed(args.seed);
    if args.tied || args.untied {
        spec = spec.tied(args.tied);
    }
    if let Some(n_vocab) = args.vocab {
        spec = spec.vocab(n_vocab);
    }
    if let Some(n_ctx) = args.ctx {
        spec = spec.context(n_ctx);
    }
    if let Some(n_blocks) = args.blocks {
        spec = spec.blocks(n_blocks);
    }
    let out = args.out.as_ref().expect("clap requires it without --list");
    let bytes = spec.bytes()?;
    let start = Instant::now();
    let mut bar = Bar::new(args.quiet);
    spec.write_with(out, |done, total| bar.show(done, total, start.elapsed()))?;
    bar.clear();
    if !args.quiet {
        let seconds = start.elapsed().as_secs_f64();
        tell!(
            "{}: {}, {:.1} MB in {seconds:.1} s, {:.2} GB/s",
            Safe(&out.display().to_string()),
            spec.name(),
            bytes as f64 / 1e6,
            bytes as f64 / 1e9 / seconds
        );
    }
    Ok(())
}

fn list() -> ExitCode {
    let mut text = String::from("shapes\n");
    for shape in SHAPES {
        text += &format!(
            "  {:<18} {:<11} {:>3} blocks of {:>5}, {:>6} tokens{}\n",
            shape.name,
            shape.arch.unwrap_or("any"),
            shape.n_blocks,
            shape.n_embd,
            shape.n_vocab,
            if shape.tied { ", tied" } else { "" }
        );
    }
    text += "architectures\n";
    for family in FAMILIES {
        let head = match family.head {
            Head::Either => "",
            Head::Tied => "  tied only",
            Head::Own => "  untied only",
        };
        text += &format!("  {:<11}{head}\n", family.arch);
    }
    text += &format!("types\n  {}\n", synth::type_names().collect::<Vec<_>>().join(" "));
    // a closed pipe (`dim-synth --list | head`) is no failure
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}
