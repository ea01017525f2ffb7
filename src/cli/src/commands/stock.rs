//! `dim-host stock`: the whole model by llama.cpp itself, with the options and the report of `generate`.

use std::path::PathBuf;
use std::time::Instant;

use crate::commands::PromptArgs;
use crate::commands::generate::Run;
use dim::failure::Failure;
use dim::host::engine::StockEngine;
use dim::host::interrupt::Interrupt;
use dim::host::machine::MachineArgs;
use dim::host::setup::{load_model, model_name, set_log, stock_params};

/// Arguments of `dim-host stock`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The whole model
    #[arg(short = 'm', long, value_name = "MODEL.gguf")]
    model: PathBuf,
    /// Read the file instead of mapping it (llama.cpp maps by default)
    #[arg(long)]
    no_mmap: bool,
    /// Spread it with llama.cpp's own RPC backend: the server
    #[cfg(feature = "rpc")]
    #[arg(long, value_name = "ADDR:PORT", requires = "rpc_blocks")]
    rpc: Option<std::net::SocketAddr>,
    /// How many blocks, the last ones, the RPC server gets
    #[cfg(feature = "rpc")]
    #[arg(long, value_name = "N", requires = "rpc")]
    rpc_blocks: Option<u32>,
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    machine: MachineArgs,
}

/// Runs it.
pub fn run(args: &Args, process_start: Instant) -> Result<(), Failure> {
    args.machine.check()?;
    args.prompt.sampling.check().map_err(Failure::misuse)?;
    set_log(&args.machine);
    let interrupt = Interrupt::watch();
    let model = load(args)?;
    let n_ctx = args.machine.n_ctx_for(model.n_ctx_train());
    let params = stock_params(&args.machine, n_ctx);
    let context = llama_sys_patch::Stock::new(&model, &params, None).map_err(Failure::failed)?;
    let n_batch = context.info().n_batch;
    let mut engine = StockEngine::new(context, model.n_vocab(), model.n_blocks(), n_batch);
    let name = model_name(&args.model);
    Run { vocabulary: &model, n_ctx, model_name: &name }.run(
        &mut engine,
        &args.prompt,
        &interrupt,
        process_start,
    )
}

#[cfg(feature = "rpc")]
fn load(args: &Args) -> Result<llama_sys_patch::Model, Failure> {
    use gguf_tools::gguf::{Gguf, check};

    let (Some(server), Some(n_blocks)) = (args.rpc, args.rpc_blocks) else {
        return load_model(&args.model, &args.machine, !args.no_mmap);
    };
    let gguf = Gguf::open(&args.model)?;
    check::model(&gguf)?;
    let files: Vec<PathBuf> = gguf.files().map(std::path::Path::to_owned).collect();
    llama_sys_patch::rpc::load(&files, server, n_blocks, !args.no_mmap).map_err(Failure::failed)
}

#[cfg(not(feature = "rpc"))]
fn load(args: &Args) -> Result<llama_sys_patch::Model, Failure> {
    load_model(&args.model, &args.machine, !args.no_mmap)
}
