//! `dim-host`: drives a split model. See `dim-host --help`.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};
use dim_cli::commands::{chat, demo, generate, laboratory, pair, push, serve, stock};
use dim_cli::habits;

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
    Generate(generate::GenerateArgs),
    /// Talk with a split model
    Chat(chat::ChatArgs),
    /// Serve a split model to every program that speaks OpenAI's HTTP API
    Serve(serve::ServeArgs),
    /// The same as `generate` with stock llama.cpp and the whole model: the other arm of a comparison
    Stock(stock::StockArgs),
    /// Pair with a worker, once: it shows a code, this command takes it
    Pair(pair::PairArgs),
    /// Send Core ML packages that `dim-split --coreml` wrote to a phone, over the paired connection
    Push(push::PushArgs),
    /// Talk with a small model over two processes, and compare it with stock llama.cpp
    Demo(demo::DemoArgs),
    /// Measure the split against the other ways to run the same model on this machine: `dim-ab ab`
    #[command(disable_help_flag = true)]
    Ab(laboratory::LaboratoryArgs),
    /// How well the split guesses a text, and how far its guesses are from stock llama.cpp's: `dim-ab eval`
    #[command(disable_help_flag = true)]
    Eval(laboratory::LaboratoryArgs),
    /// Make tables and plots of what `ab` has recorded: `dim-ab report`
    #[command(disable_help_flag = true)]
    Report(laboratory::LaboratoryArgs),
}

fn main() -> ExitCode {
    if let Some(code) = dim_cli::tries_files_apart() {
        return code;
    }
    let process_start = Instant::now();
    // clap ends misuse with exit code 2 and --help with 0
    let cli = Cli::try_parse_from(habits::long_words(std::env::args_os()));
    let result = match cli.unwrap_or_else(|e| habits::explain(&e)).command {
        Command::Generate(args) => generate::run(&args, process_start),
        Command::Chat(args) => chat::run(&args, process_start),
        Command::Serve(args) => serve::run(&args),
        Command::Stock(args) => stock::run(&args, process_start),
        Command::Pair(args) => pair::run(&args),
        Command::Push(args) => push::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Ab(args) => laboratory::run("ab", &args),
        Command::Eval(args) => laboratory::run("eval", &args),
        Command::Report(args) => laboratory::run("report", &args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
