//! `dim-host chat`.

use std::time::Instant;

use crate::commands::limit;
use dim::failure::Failure;
use dim::host::chat::{ChatOptions, chat};
use dim::host::engine::SplitEngine;
use dim::host::interrupt::Interrupt;
use dim::host::machine::MachineArgs;
use dim::host::sampler::SamplerOptions;
use dim::host::setup::{SplitArgs, open_split};

/// Arguments of `dim-host chat`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    split: SplitArgs,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    sampling: SamplerOptions,
    /// How the assistant is to behave
    #[arg(long = "system", visible_alias = "system-prompt", value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of a reply; -1: until the model ends or the context is full
    #[arg(short = 'n', long = "predict", value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    n_predict: i64,
    /// Print the speeds after each reply
    #[arg(long)]
    timings: bool,
}

/// Runs it.
pub fn run(args: &Args, process_start: Instant) -> Result<(), Failure> {
    args.machine.check()?;
    args.sampling.check().map_err(Failure::misuse)?;
    let n_predict = limit(args.n_predict)?;
    let interrupt = Interrupt::watch();
    let split = open_split(&args.split, &args.machine)?;
    let mut engine = SplitEngine::new(split.pipeline, split.n_ubatch);
    let options = ChatOptions {
        vocabulary: &split.vocabulary,
        sampling: &args.sampling,
        system: args.system.as_deref(),
        n_predict,
        n_ctx: split.n_ctx as usize,
        interrupt: &interrupt,
        process_start,
        model_name: &split.model_name,
    };
    chat(&mut engine, &options, &mut std::io::stdin().lock(), |report| {
        if args.timings {
            eprintln!("\n{}", report.table());
        }
    })
}
