//! `dim-host stock`: the whole model by llama.cpp itself, with the options and the report of `generate`.

use std::path::PathBuf;
use std::time::Instant;

use dim::WholeModel;
use gguf_tools::failure::Failure;

use crate::args::MachineArgs;
use crate::commands::generate::reply;
use crate::interrupt::Interrupt;
use crate::prompt::PromptArgs;
use crate::{explain, shown};

/// Arguments of `dim-host stock`.
#[derive(Debug, clap::Args)]
pub struct StockArgs {
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
pub fn run(args: &StockArgs, process_start: Instant) -> Result<(), Failure> {
    let interrupt = Interrupt::watch();
    let wanted = args.prompt.read()?;
    args.machine.set_log();
    let model = load(args)?;
    reply(model.session().map_err(explain)?, &args.prompt, &wanted, &interrupt, process_start)
}

fn load(args: &StockArgs) -> Result<WholeModel, Failure> {
    let resources = args.machine.resources()?;
    #[cfg(feature = "rpc")]
    if let (Some(server), Some(n_blocks)) = (args.rpc, args.rpc_blocks) {
        use gguf_tools::gguf::{Gguf, check};

        let gguf = Gguf::open(&args.model).map_err(Failure::misuse)?;
        check::model(&gguf).map_err(Failure::misuse)?;
        let files: Vec<PathBuf> = gguf.files().map(std::path::Path::to_owned).collect();
        let model = llama_sys_patch::rpc::load(&files, server, n_blocks, !args.no_mmap);
        let name = dim::stage::load::model_name(&args.model);
        let shown = shown::events(args.machine.verbose);
        return WholeModel::of_model(model.map_err(explain)?, name, &resources, shown).map_err(explain);
    }
    WholeModel::open(&args.model, &resources, !args.no_mmap, shown::events(args.machine.verbose))
        .map_err(explain)
}
