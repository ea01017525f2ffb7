//! What happens while a host or a worker is set up and runs, for whoever wants to show it: this library prints nothing.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dim_core::blocks::BlockRange;
use dim_wire::transport::{LinkError, Notice};
use gguf_tools::plan::Role;

/// Something that happened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// A slice's weights are being compared with their digests.
    Checking {
        /// The file's name.
        file: String,
        /// Bytes so far.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// A file is being loaded.
    Loading {
        /// The file's name.
        file: String,
        /// Bytes so far.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// llama.cpp was compiled without instructions that this machine's CPU has: everything takes several times as long.
    SlowBuild {
        /// The instructions.
        unused: Vec<&'static str>,
    },
    /// More positions were asked for than the model was trained for.
    BeyondTraining {
        /// Positions of the context.
        n_ctx: u32,
        /// What the model was trained for.
        n_ctx_train: u32,
    },

    /// A worker could not be had, and is tried again.
    Retrying {
        /// Why not, in one sentence.
        reason: String,
        /// For how long it is tried in all.
        give_up_after: Duration,
    },
    /// Whether a worker computes right is not checked.
    Unchecked {
        /// The worker.
        address: String,
        /// Why not.
        why: NoCanary,
    },
    /// A worker's answer to a known input is right.
    Checked {
        /// The stage's name.
        stage: String,
        /// The mean cosine to the right answer.
        cosine: f64,
    },
    /// Workers of the local network are looked for.
    Searching,
    /// A worker of the local network was seen.
    Seen {
        /// What it calls itself; empty where it says nothing.
        name: String,
        /// Where it is.
        address: String,
        /// What became of it.
        found: Sighted,
    },
    /// Every block of the model is in a stage that is ready.
    Ready {
        /// The stages, in the order of their blocks.
        stages: Vec<Placement>,
        /// Blocks of the model.
        n_blocks: u32,
    },
    /// A worker was lost in the middle of a reply; it is dialled again.
    Lost {
        /// The stage's name.
        stage: String,
        /// Why.
        reason: String,
        /// How long it will be looked for.
        give_up_after: Duration,
    },
    /// A worker has said that it pauses or is too hot; the reply waits for it.
    Paused {
        /// The stage's name.
        stage: String,
        /// What it said, and what to do.
        reason: String,
        /// How long it will be waited for.
        give_up_after: Duration,
    },
    /// A worker is back, and its cache is being filled again.
    Replaying {
        /// The stage's name.
        stage: String,
        /// How many steps.
        steps: usize,
    },
    /// A worker is back where it was.
    Back {
        /// The stage's name.
        stage: String,
        /// How long it was away.
        after: Duration,
    },

    /// Of a worker: something happened while peers were told apart.
    Notice(Notice),
    /// Of a worker: hosts do not find it by themselves.
    NotAnnounced {
        /// Why not.
        why: String,
    },
    /// Of a worker: a host is being served.
    Serving {
        /// What the host calls itself, and where it is.
        host: String,
    },
    /// Of a worker: the host that was served has left in order.
    Finished {
        /// What the host calls itself, and where it is.
        host: String,
    },
    /// Of a worker: the host that was served is gone otherwise.
    Gone(LinkError),
}

/// Where a stage runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Which part of the model it is.
    pub role: Role,
    /// Its blocks.
    pub blocks: BlockRange,
    /// The worker's address; `None`: in this process.
    pub worker: Option<String>,
}

/// What became of a worker that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sighted {
    /// A key opens it, and its blocks are among those looked for.
    Holds(Offered),
    /// It has no slice yet.
    NoSlice,
    /// Its slice is of another model.
    OtherModel(Offered),
    /// Its blocks are others.
    OtherBlocks {
        /// What it has.
        offer: Offered,
        /// What is looked for.
        needed: Vec<BlockRange>,
    },
    /// No key of this user opens it; at this address.
    NotPaired {
        /// Where it is.
        address: String,
    },
    /// It could not be asked.
    NotAsked {
        /// What the system says.
        why: String,
    },
    /// It could not be reached, or not be agreed with.
    Failed(LinkError),
}

/// A slice as a worker describes it: nothing of it is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offered {
    /// The architecture's name.
    pub arch: String,
    /// First block.
    pub first: u32,
    /// Last block, inclusive.
    pub last: u32,
    /// Blocks of the whole model.
    pub n_blocks: u32,
}

impl fmt::Display for Offered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} blocks {}..{} of {}", self.arch, self.first, self.last, self.n_blocks)
    }
}

/// Why a worker's answers are not checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoCanary {
    /// It was asked for.
    Off,
    /// Only a manifest says what a middle has to answer, and none was given.
    NoManifest,
    /// The manifest says nothing of it: it was cut by an older program, or without.
    NotInManifest,
    /// What goes in or comes out is more than rows of singles: a canary is not made for that.
    OtherRows,
}

/// Who is told; clones tell the same.
#[derive(Clone)]
pub(crate) struct Events(Arc<Mutex<dyn FnMut(Event) + Send>>);

impl Events {
    /// Tells at once what holds for all that follows.
    pub(crate) fn new(on_event: impl FnMut(Event) + Send + 'static) -> Events {
        let events = Events(Arc::new(Mutex::new(on_event)));
        let unused = llama_sys_patch::unused_cpu_features();
        if !unused.is_empty() {
            events.tell(Event::SlowBuild { unused });
        }
        events
    }

    pub(crate) fn tell(&self, event: Event) {
        (self.0.lock().unwrap_or_else(PoisonError::into_inner))(event);
    }
}
