//! A worker's slice, loaded into this process when the worker has stayed away for too long.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, TryRecvError, channel};

use dim_core::bell::Bell;
use dim_core::digest::Sha;
use dim_core::reserve::Reserve;
use dim_core::stage::{LocalStage, StageError};
use dim_wire::transport::CallOff;
use gguf_tools::plan::Role;

use crate::device;
use crate::error::Error;
use crate::event::Events;
use crate::stage::load::{self, LoadOptions};
use crate::stage::local::LlamaStage;
use crate::stage::verified::Verify;

/// The file of a worker's slice, and how it would be loaded.
pub(crate) struct SliceReserve {
    source: Source,
    events: Events,
    loading: Option<Loading>,
}

#[derive(Clone)]
struct Source {
    path: PathBuf,
    /// the slice that it was when the host began
    slice: Sha,
    verify: Verify,
    options: LoadOptions,
}

/// A stage that is being loaded, in a thread of its own that does not outlive the interest in it.
struct Loading {
    result: Receiver<Result<LlamaStage, StageError>>,
    off: CallOff,
}

impl Drop for Loading {
    fn drop(&mut self) {
        self.off.call_off();
    }
}

/// Why a slice cannot run here.
#[derive(Debug, thiserror::Error)]
enum NotHere {
    #[error("its blocks cannot run here: {} has changed since this began", .0.display())]
    Changed(PathBuf),
    #[error(
        "its blocks cannot run here: {} takes {needed} MiB, and {free} MiB of memory are free", path.display()
    )]
    Memory { path: PathBuf, needed: u64, free: u64 },
    #[error("its blocks cannot run here: {0}")]
    Failed(#[source] Error),
    #[error("its blocks cannot run here: the thread that loads them did not start")]
    NoThread,
}

impl SliceReserve {
    /// `slice`: what the file at `path` was found to be.
    pub(crate) fn new(
        path: PathBuf,
        slice: Sha,
        verify: Verify,
        options: LoadOptions,
        events: &Events,
    ) -> SliceReserve {
        let source = Source { path, slice, verify, options };
        SliceReserve { source, events: events.clone(), loading: None }
    }
}

impl Source {
    /// Checked again: much time may have passed.
    fn load(&self, events: &Events) -> Result<LlamaStage, NotHere> {
        let Source { path, slice, verify, options } = self;
        let info = load::open(path, Role::Middle, *verify, events).map_err(NotHere::Failed)?;
        if info.slice_sha256 != *slice {
            return Err(NotHere::Changed(path.clone()));
        }
        // what the system would only say by swapping, or by ending this process; caches and buffers are less than this
        // in most cases, and llama.cpp says so itself where they do not fit
        let (needed, free) = (info.file_bytes, device::free_memory());
        if let Some(free) = free.filter(|&free| free < needed) {
            return Err(NotHere::Memory { path: path.clone(), needed: needed >> 20, free: free >> 20 });
        }
        load::stage(path, &info, options, events).map_err(NotHere::Failed)
    }
}

impl Reserve for SliceReserve {
    fn begin(&mut self, bell: &Bell) {
        let ((sender, result), off) = (channel(), CallOff::new());
        let (source, events, bell) = (self.source.clone(), self.events.until(off.clone()), bell.clone());
        self.loading = Some(Loading { result, off });
        let loader = std::thread::Builder::new().name("dim-load".into()).spawn(move || {
            let loaded = source.load(&events).map_err(StageError::refused);
            // who waits no longer has nothing to hear
            let _ = sender.send(loaded);
            bell.ring();
        });
        // without a thread the channel is closed, and `poll` says so
        drop(loader);
    }

    fn poll(&mut self) -> Result<Option<Box<dyn LocalStage>>, StageError> {
        let result = match self.loading.as_ref().map(|loading| loading.result.try_recv()) {
            Some(Err(TryRecvError::Empty)) => return Ok(None),
            Some(Ok(result)) => result,
            Some(Err(TryRecvError::Disconnected)) | None => Err(StageError::refused(NotHere::NoThread)),
        };
        self.loading = None;
        result.map(|stage| Some(Box::new(stage) as Box<dyn LocalStage>))
    }
}
