//! How much of this machine a program uses.

use crate::error::BadOption;
use crate::event::{Event, Events};

/// How much of this machine to use; the same for a split and for a whole model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Positions of a conversation, [`MAX_CTX`] at most; 0: all the model was trained for.
    pub n_ctx: u32,
    /// Compute threads, 1 to 512; `None`: one per core. More than there are cores only wait for each other.
    pub n_threads: Option<u32>,
    /// Most prompt tokens evaluated at once, 1 to 65,536.
    pub n_ubatch: u32,
    /// Blocks to put on the GPU; `None`: all, where this build has a GPU backend.
    pub gpu_layers: Option<u32>,
    /// Rows of its last step that a conversation can be taken back by without being evaluated anew, where the model has
    /// recurrent states and llama.cpp keeps snapshots of them; each takes as much memory as the states. Fewer than
    /// `n_ubatch`, [`MAX_SNAPSHOTS`] at most; none where there is more than one session.
    pub snapshots: u32,
}

/// The most snapshots of a state.
pub const MAX_SNAPSHOTS: u32 = 31;

/// The most positions that a conversation can have.
pub const MAX_CTX: u32 = 1 << 22;

impl Default for Resources {
    fn default() -> Resources {
        Resources { n_ctx: 4096, n_threads: None, n_ubatch: 512, gpu_layers: None, snapshots: 0 }
    }
}

impl Resources {
    /// Checks what C code would not survive.
    ///
    /// # Errors
    /// The first value that is out of range.
    pub fn check(&self) -> Result<(), BadOption> {
        if self.n_ubatch == 0 || self.n_ubatch > 65_536 {
            return Err(BadOption::new("n_ubatch", self.n_ubatch, "1 to 65536"));
        }
        if self.snapshots > MAX_SNAPSHOTS || self.snapshots >= self.n_ubatch {
            return Err(BadOption::new(
                "snapshots",
                self.snapshots,
                "0 to 31, and fewer than a chunk has rows",
            ));
        }
        if self.n_ctx > MAX_CTX {
            return Err(BadOption::new(
                "n_ctx",
                self.n_ctx,
                "0, which is what the model was trained for, to 4194304",
            ));
        }
        if let Some(n) = self.gpu_layers.filter(|&n| i32::try_from(n).is_err()) {
            return Err(BadOption::new("gpu_layers", n, "a number of blocks"));
        }
        match self.n_threads {
            Some(n) if n == 0 || n > 512 => Err(BadOption::new("n_threads", n, "1 to 512")),
            _ => Ok(()),
        }
    }

    /// The threads to use.
    pub fn threads(&self) -> u32 {
        let cores =
            || std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1));
        self.n_threads.unwrap_or_else(cores)
    }

    /// The context to use, for a model trained for `n_ctx_train` positions (0: not known).
    pub(crate) fn n_ctx_for(&self, n_ctx_train: u32, events: &Events) -> u32 {
        match (self.n_ctx, n_ctx_train) {
            (0, 0) => 4096,
            (0, trained) => trained,
            (asked, trained) => {
                if trained > 0 && asked > trained {
                    events.tell(Event::BeyondTraining { n_ctx: asked, n_ctx_train: trained });
                }
                asked
            }
        }
    }
}
