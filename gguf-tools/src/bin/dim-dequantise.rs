//! `dim-dequantise`: a quantised model as a file of plain numbers.
#![forbid(unsafe_code)]

#[path = "common/bar.rs"]
mod bar;

use std::{path::PathBuf, process::ExitCode, time::Instant};

use bar::Bar;
use clap::Parser;
use gguf_tools::{
    dequantise::Dequantised,
    failure::Failure,
    gguf::{Gguf, TensorType},
    tell,
    text::{Safe, gib},
};

/// Write the matrices of a quantised GGUF as F16, with the values that ggml reads them as.
///
/// The new file knows no more than the old one. It is for comparisons, and for what takes no quantised weights: Core ML
/// packages.
#[derive(Parser)]
#[command(name = "dim-dequantise", version, max_term_width = 100)]
struct Args {
    /// The model; of a split one (NAME-00001-of-0000N.gguf), any part
    model: PathBuf,
    /// The file to write
    out: PathBuf,
    /// Type of what was quantised: f16, bf16 or f32
    #[arg(long = "type", value_name = "TYPE", default_value = "f16", value_parser = tensor_type)]
    to: TensorType,
    /// No progress on stderr
    #[arg(long, short)]
    quiet: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(args: &Args) -> Result<(), Failure> {
    let gguf = Gguf::open(&args.model)?;
    let model = Dequantised::new(&gguf, args.to)?;
    let bytes = model.file_bytes()?;
    let start = Instant::now();
    let mut bar = Bar::new(args.quiet);
    let written = model.write(&args.out, |done, total| bar.show(done, total, start.elapsed()));
    bar.clear();
    written?;
    if !args.quiet {
        tell!(
            "{}: {} of {} tensors converted to {}, {} in {:.1} s",
            Safe(&args.out.display().to_string()),
            model.n_converted(),
            gguf.n_tensors(),
            args.to,
            gib(bytes),
            start.elapsed().as_secs_f64(),
        );
    }
    Ok(())
}

fn tensor_type(text: &str) -> Result<TensorType, String> {
    let plain = [TensorType::F16, TensorType::BF16, TensorType::F32];
    let found = TensorType::from_name(text).filter(|ty| plain.contains(ty));
    found.ok_or_else(|| "give f16, bf16 or f32".to_owned())
}
