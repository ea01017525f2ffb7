//! How much of this machine a program uses.

use crate::failure::Failure;

/// How much of this machine to use; the same for `generate`, `chat` and `stock`.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Machine")]
pub struct MachineArgs {
    /// Context: positions of a conversation (0: all the model was trained for)
    #[arg(short = 'c', long = "ctx", visible_alias = "ctx-size", value_name = "N", default_value_t = 4096)]
    pub n_ctx: u32,
    /// Compute threads (default: one per core)
    #[arg(short = 't', long, value_name = "N")]
    pub threads: Option<u32>,
    /// Most prompt tokens evaluated at once
    #[arg(long = "ubatch", visible_alias = "ubatch-size", value_name = "N", default_value_t = 512)]
    pub n_ubatch: u32,
    /// Blocks to put on the GPU (default: all, where this build has a GPU backend)
    #[arg(long = "gpu-layers", visible_alias = "n-gpu-layers", value_name = "N")]
    pub gpu_layers: Option<u32>,
    /// Show llama.cpp's own log
    #[arg(short = 'v', long)]
    pub verbose: bool,
}

impl MachineArgs {
    /// Checks what C code would not survive.
    pub fn check(&self) -> Result<(), Failure> {
        if self.n_ubatch == 0 || self.n_ubatch > 65_536 {
            return Err(Failure::misuse(format!("--ubatch {}: must be 1 to 65536", self.n_ubatch)));
        }
        if self.threads == Some(0) || self.threads > Some(512) {
            return Err(Failure::misuse("--threads: must be 1 to 512"));
        }
        Ok(())
    }

    /// The threads to use.
    pub fn n_threads(&self) -> u32 {
        let cores =
            || std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1));
        self.threads.unwrap_or_else(cores)
    }

    /// The context to use, for a model trained for `n_ctx_train` positions (0: not known).
    pub fn n_ctx_for(&self, n_ctx_train: u32) -> u32 {
        match (self.n_ctx, n_ctx_train) {
            (0, 0) => 4096,
            (0, trained) => trained,
            (asked, 0) => asked,
            (asked, trained) => {
                if asked > trained {
                    eprintln!(
                        "note: this model was trained for {trained} positions; --ctx {asked} goes beyond it"
                    );
                }
                asked
            }
        }
    }
}
