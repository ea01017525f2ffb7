//! What happens while a host or a worker is set up and runs, for whoever wants to show it: this library prints nothing.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dim_core::blocks::BlockRange;
use dim_wire::transport::{CallOff, LinkError, Notice};
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
    /// A slice has recurrent states, and snapshots of them were asked for.
    Snapshots {
        /// The file's name.
        file: String,
        /// Rows that a conversation can be taken back by: none where llama.cpp keeps no snapshots for the architecture.
        snapshots: u32,
        /// What the slice's caches and states take, snapshots included.
        cache_bytes: u64,
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
    /// A worker stayed away for longer than it is looked for: its blocks run in this process from now on, for as long as the
    /// host lives. Where that was in the middle of a reply, their cache is being filled, and [`Event::Back`] follows.
    FellBack {
        /// The stage's name until now.
        stage: String,
        /// Its name from now on.
        by: String,
        /// How many steps are evaluated again.
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

/// Who is told, and whether he still wants what he is told of; clones tell the same.
///
/// Where the closure panics it is not called again, and nothing of ours is unwound through: who called the library gets the
/// panic from [`came_to`](Events::came_to), once everything that belongs to the library is whole again.
#[derive(Clone)]
pub(crate) struct Events {
    hearer: Arc<Mutex<Option<Hearer>>>,
    panic: Arc<Mutex<Option<Panic>>>,
    off: CallOff,
}

type Hearer = Box<dyn FnMut(Event) + Send>;
type Panic = Box<dyn Any + Send>;

impl Events {
    /// Tells at once what holds for all that follows.
    pub(crate) fn new(on_event: impl FnMut(Event) + Send + 'static) -> Events {
        Events::unless(CallOff::new(), on_event)
    }

    /// The same for something that may be called off.
    pub(crate) fn unless(off: CallOff, on_event: impl FnMut(Event) + Send + 'static) -> Events {
        let hearer: Hearer = Box::new(on_event);
        let events = Events { hearer: Arc::new(Mutex::new(Some(hearer))), panic: Arc::default(), off };
        let unused = llama_sys_patch::unused_cpu_features();
        if !unused.is_empty() {
            events.tell(Event::SlowBuild { unused });
        }
        events
    }

    pub(crate) fn tell(&self, event: Event) {
        let mut hearer = lock(&self.hearer);
        let Some(on_event) = hearer.as_mut() else { return };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| on_event(event))) {
            *hearer = None;
            // not under the other lock: who is told may ask for something that looks here
            *lock(&self.panic) = Some(panic);
        }
    }

    /// The same hearer, of something that ends with another word.
    pub(crate) fn until(&self, off: CallOff) -> Events {
        Events { off, ..self.clone() }
    }

    /// What ends it from outside.
    pub(crate) fn off(&self) -> &CallOff {
        &self.off
    }

    /// Whether it is worth going on with something long: it was not called off, and who hears of it has not panicked.
    pub(crate) fn goes_on(&self) -> bool {
        !self.off.is_called_off() && lock(&self.panic).is_none()
    }

    /// What a call of the library came to, where it returns: if what it told of panicked, this is where that goes on.
    pub(crate) fn came_to<T>(&self, result: T) -> T {
        let panic = lock(&self.panic).take();
        match panic {
            // what was made goes first
            Some(panic) => {
                drop(result);
                resume_unwind(panic)
            }
            None => result,
        }
    }
}

/// A lock whose data every critical section leaves whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
