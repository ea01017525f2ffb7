//! `dim-host`: drives a split model. See `dim-host --help`.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};
use dim::host::commands::{ab, arms, chat, demo, eval, generate, pair, push, report, stock};

/// One model across your machines: the host runs the head and the tail of a split GGUF, workers run the middle.
#[derive(Parser)]
#[command(name = "dim-host", version, max_term_width = 100, args_override_self = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Continue a text with a split model
    Generate(generate::Args),
    /// Talk with a split model
    Chat(chat::Args),
    /// The same as `generate` with stock llama.cpp and the whole model: the other arm of a comparison
    Stock(stock::Args),
    /// Pair with a worker, once: it shows a code, this command takes it
    Pair(pair::Args),
    /// Send Core ML packages that `dim-split --coreml` wrote to a phone, over the paired connection
    Push(push::Args),
    /// Synthesise a small model, cut it, run it over two processes, compare it with stock llama.cpp
    Demo(demo::Args),
    /// Measure the split against the other ways to run the same model on this machine
    Ab(ab::Args),
    /// How well the split guesses a text, and how far its guesses are from stock llama.cpp's
    Eval(eval::Args),
    /// Make tables and plots of what `ab` has recorded
    Report(report::Args),
    #[command(hide = true)]
    Launch(arms::LaunchArgs),
    #[command(hide = true)]
    Quantise(arms::QuantiseArgs),
    #[cfg(feature = "rpc")]
    #[command(hide = true)]
    RpcServer(arms::RpcServerArgs),
}

fn main() -> ExitCode {
    let process_start = Instant::now();
    // clap ends misuse with exit code 2 and --help with 0
    let result = match Cli::parse().command {
        Command::Generate(args) => generate::run(&args, process_start),
        Command::Chat(args) => chat::run(&args, process_start),
        Command::Stock(args) => stock::run(&args, process_start),
        Command::Pair(args) => pair::run(&args),
        Command::Push(args) => push::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Ab(args) => ab::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Launch(args) => arms::launch(&args),
        Command::Quantise(args) => arms::quantise(&args),
        #[cfg(feature = "rpc")]
        Command::RpcServer(args) => arms::rpc_server(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
