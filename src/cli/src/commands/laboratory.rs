//! `dim-host ab`, `eval` and `report`: handed on to `dim-ab`, which stands beside this program.

use std::ffi::OsString;
use std::process::Command;

use gguf_tools::failure::Failure;

/// Whatever `dim-ab` takes.
#[derive(Debug, clap::Args)]
pub struct LaboratoryArgs {
    /// Arguments of `dim-ab`; `--help` shows them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    rest: Vec<OsString>,
}

/// Becomes `dim-ab SUBCOMMAND ...`.
///
/// # Errors
/// It is not beside this program, or cannot be started.
pub fn run(subcommand: &str, args: &LaboratoryArgs) -> Result<(), Failure> {
    let here =
        std::env::current_exe().map_err(|e| Failure::failed(format!("this program's own file: {e}")))?;
    let program = here.with_file_name(format!("dim-ab{}", std::env::consts::EXE_SUFFIX));
    let mut command = Command::new(&program);
    command.arg(subcommand).args(&args.rest);
    let cannot = |e: std::io::Error| {
        Failure::failed(format!("cannot start {}: {e}", program.display())).hint(
            "`ab`, `eval` and `report` are in dim-ab, which belongs beside dim-host: cargo build -p dim-ab",
        )
    };
    become_program(command, cannot)
}

/// Signals, the terminal and the exit code are the other program's from here on.
#[cfg(unix)]
fn become_program(
    mut command: Command,
    cannot: impl FnOnce(std::io::Error) -> Failure,
) -> Result<(), Failure> {
    use std::os::unix::process::CommandExt as _;
    Err(cannot(command.exec()))
}

#[cfg(not(unix))]
fn become_program(
    mut command: Command,
    cannot: impl FnOnce(std::io::Error) -> Failure,
) -> Result<(), Failure> {
    let status = command.status().map_err(cannot)?;
    std::process::exit(status.code().unwrap_or(1));
}
