//! `dim-ab`: measures the split against the other ways to run the same model. See `dim-ab --help`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
#[cfg(unix)]
use dim_ab::commands::ab;
use dim_ab::commands::{arms, eval, report};

/// Is the split worth it here, how much, and is the answer the same?
#[derive(Parser)]
#[command(name = "dim-ab", version, max_term_width = 100, args_override_self = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure the split against the other ways to run the same model on this machine
    #[cfg(unix)]
    #[command(name = "ab", visible_alias = "run")]
    Ab(ab::AbArgs),
    /// How well the split guesses a text, and how far its guesses are from stock llama.cpp's
    Eval(eval::EvalArgs),
    /// Make tables and plots of what `ab` has recorded
    Report(report::ReportArgs),
    #[cfg(unix)]
    #[command(hide = true)]
    Launch(arms::LaunchArgs),
    #[command(hide = true)]
    Quantise(arms::QuantiseArgs),
    #[cfg(feature = "rpc")]
    #[command(hide = true)]
    RpcServer(arms::RpcServerArgs),
}

fn main() -> ExitCode {
    if let Some(code) = dim_cli::tries_files_apart() {
        return code;
    }
    // clap ends misuse with exit code 2 and --help with 0
    let result = match Cli::parse_from(dim_cli::habits::long_words(std::env::args_os())).command {
        #[cfg(unix)]
        Command::Ab(args) => ab::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Report(args) => report::run(&args),
        #[cfg(unix)]
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
