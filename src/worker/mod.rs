//! The worker: serves one stage to one host at a time.
//!
//! ```text
//! Worker::open --options--> bind: hosts are answered, "still loading" --load--> ready --serve--> until it is stopped
//! ```

mod reach;
mod serve;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dim_wire::keys::{Key, KeyStore, PairingCode};
use dim_wire::message::Farewell;
use dim_wire::terms::Reason;
use dim_wire::transport::discover::Announcement;
use dim_wire::transport::{KeyRing, LinkErrorKind, Listener, ListenerConfig, Readiness, Timing};
use gguf_tools::plan::Role;
use gguf_tools::slice::SliceInfo;

use crate::device;
use crate::error::{BadOption, Error};
use crate::event::{Event, Events};
use crate::resources::Resources;
use crate::stage::load::{self, LoadOptions};
use crate::stage::local::LlamaStage;
use crate::stage::verified::Verify;
use crate::terms::{Offer, of_worker, random_instance};

pub use serve::serve;

/// Where a worker listens that is not told otherwise.
pub const DEFAULT_PORT: u16 = 7878;
/// The most conversations at once that a worker has caches for.
pub const MAX_SESSIONS: u32 = 64;
/// What the buffers for computing may take unless it is said how many rows they are for: a worker is to hold its slice,
/// its cache, and 150 MiB at most.
const COMPUTE_BYTES: u64 = 90 << 20;

/// The options of a worker: made by [`Worker::open`], used up by [`bind`](WorkerBuilder::bind).
#[must_use = "nothing is opened before `bind`"]
pub struct WorkerBuilder {
    slice: PathBuf,
    listen: String,
    keys: Option<Arc<dyn KeyRing>>,
    max_sessions: u32,
    verify: Verify,
    mmap: bool,
    resources: Resources,
    chooses_rows: bool,
    software: String,
}

impl WorkerBuilder {
    /// Where to listen, `address:port`; port 0 takes any that is free. Default: port 7878 of every address.
    pub fn listen(mut self, address: impl Into<String>) -> WorkerBuilder {
        self.listen = address.into();
        self
    }

    /// The one key that opens this worker. Default: those that this user has from pairing.
    pub fn key(self, key: Key) -> WorkerBuilder {
        self.keys(Arc::new(key))
    }

    /// Where the keys are that open this worker.
    pub fn keys(mut self, keys: Arc<dyn KeyRing>) -> WorkerBuilder {
        self.keys = Some(keys);
        self
    }

    /// Conversations at once, each with a context of its own: 1 to [`MAX_SESSIONS`]; one, unless this says otherwise.
    pub fn max_sessions(mut self, n: u32) -> WorkerBuilder {
        self.max_sessions = n;
        self
    }

    /// When the slice's weights are compared with their digests: once, unless this says otherwise.
    pub fn verify(mut self, when: Verify) -> WorkerBuilder {
        self.verify = when;
        self
    }

    /// Whether the slice is mapped instead of read: it must not change then.
    pub fn mmap(mut self, yes: bool) -> WorkerBuilder {
        self.mmap = yes;
        self
    }

    /// How much of this machine to use.
    pub fn resources(mut self, resources: Resources) -> WorkerBuilder {
        self.resources = resources;
        self
    }

    /// Whether the rows computed at once are as many as the resources say, however much memory that takes; otherwise
    /// they are at most as many, and the worker stays small.
    pub fn exact_rows(mut self, yes: bool) -> WorkerBuilder {
        self.chooses_rows = !yes;
        self
    }

    /// Program and version, as hosts are told.
    pub fn software(mut self, software: impl Into<String>) -> WorkerBuilder {
        self.software = software.into();
        self
    }

    /// Checks the slice and begins to listen: hosts that come before the slice is [loaded](Worker::load) are told so.
    /// `on_event` hears of everything that happens as long as the worker lives, from several threads, one at a time.
    ///
    /// # Errors
    /// An option is out of range, the slice is no middle, or the address cannot be had.
    ///
    /// If `on_event` panics, it is not called again, and [`bind`](Self::bind), [`load`](Worker::load) or
    /// [`serve`](Worker::serve), whichever is under way or comes next, panics with the same once it has finished what it
    /// was at: a host is served to its end.
    pub fn bind(self, on_event: impl FnMut(Event) + Send + 'static) -> Result<Worker, Error> {
        let events = Events::new(on_event);
        events.came_to(self.bind_and_tell(&events))
    }

    fn bind_and_tell(self, events: &Events) -> Result<Worker, Error> {
        self.resources.check()?;
        if !(1..=MAX_SESSIONS).contains(&self.max_sessions) {
            return Err(BadOption::new("max_sessions", self.max_sessions, "1 to 64").into());
        }
        let keys = match &self.keys {
            Some(keys) => Arc::clone(keys),
            None => Arc::new(KeyStore::of_user()?),
        };
        let info = load::open_any(&self.slice, self.verify, events)?;
        if info.role != Role::Middle {
            return Err(Error::NotAMiddle { path: self.slice, found: info.role });
        }
        let n_ctx = self.resources.n_ctx_for(info.hparams.n_ctx_train, events);
        let instance = random_instance();
        let offer = Offer {
            slice: &info,
            software: &self.software,
            instance,
            n_ctx,
            max_rows: self.resources.n_ubatch,
            max_sessions: self.max_sessions,
        };
        let terms = of_worker(&offer, None);
        let readiness = Readiness::NotReady(terms, Reason::NotReady, "still loading its slice".to_owned());
        let told = events.clone();
        let notice = Box::new(move |notice: &_| told.tell(Event::Notice(Clone::clone(notice))));
        let config = ListenerConfig { keys, readiness, timing: Timing::default(), notice };
        let listener = Arc::new(Listener::bind(&self.listen, config).map_err(Error::Listen)?);
        let resources = Resources { n_ctx, ..self.resources };
        let options = WorkerBuilder { resources, ..self };
        Ok(Worker {
            listener,
            info,
            instance,
            options,
            events: events.clone(),
            stage: None,
            announcement: None,
        })
    }
}

/// A slice that is served to hosts. Dropping it says goodbye to the host that is being served.
pub struct Worker {
    listener: Arc<Listener>,
    info: SliceInfo,
    /// random, as its terms say it
    instance: u64,
    options: WorkerBuilder,
    events: Events,
    stage: Option<LlamaStage>,
    announcement: Option<Announcement>,
}

impl Worker {
    /// A worker for the slice at `slice`, as dim-split wrote it: `STEM.middle-A..B.gguf`.
    pub fn open(slice: impl AsRef<Path>) -> WorkerBuilder {
        WorkerBuilder {
            slice: slice.as_ref().to_owned(),
            listen: format!("0.0.0.0:{DEFAULT_PORT}"),
            keys: None,
            max_sessions: 1,
            verify: Verify::Once,
            mmap: false,
            resources: Resources::default(),
            chooses_rows: true,
            software: device::software("dim"),
        }
    }

    /// Where it listens, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.listener.address()
    }

    /// Where other machines find it, from likely to unlikely; empty where this machine has no address but its own.
    pub fn reachable_at(&self) -> Vec<SocketAddr> {
        reach::addresses(self.address())
    }

    /// What it serves.
    pub fn slice(&self) -> &SliceInfo {
        &self.info
    }

    /// Positions of a conversation.
    pub fn n_ctx(&self) -> u32 {
        self.options.resources.n_ctx
    }

    /// Ends this worker from another thread.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(Arc::clone(&self.listener))
    }

    /// Loads the slice; from then on hosts are served.
    ///
    /// # Errors
    /// llama.cpp refuses the file, or there is no room for it.
    pub fn load(&mut self) -> Result<(), Error> {
        let WorkerBuilder { resources, mmap, max_sessions, chooses_rows, .. } = self.options;
        let compute_bytes = chooses_rows.then_some(COMPUTE_BYTES);
        let options = LoadOptions { resources, mmap, max_sessions, compute_bytes };
        let stage = load::stage(&self.options.slice, &self.info, &options, &self.events);
        let stage = self.events.came_to(stage)?;
        let offer = Offer {
            slice: &self.info,
            software: &self.options.software,
            instance: self.instance,
            n_ctx: resources.n_ctx,
            max_rows: stage.inner().info().n_ubatch,
            max_sessions,
        };
        let terms = of_worker(&offer, Some(&stage));
        self.stage = Some(stage);
        self.listener.set_readiness(Readiness::Ready(terms));
        Ok(())
    }

    /// Opens a pairing window: the code is for the person at the host, good for five minutes and one host.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn open_pairing(&self) -> Result<PairingCode, Error> {
        Ok(self.listener.open_pairing()?)
    }

    /// Makes this worker known on the local network, by multicast DNS at `mdns_port`. One that cannot be announced works
    /// all the same: [`Event::NotAnnounced`] says why.
    pub fn announce(&mut self, mdns_port: u16) {
        let address = self.address();
        // several workers of one machine are told apart by their ports
        let name = match address.port() {
            DEFAULT_PORT => device::name(),
            port => format!("{:.40} ({port})", device::name()),
        };
        let events = self.events.clone();
        let told = move |is_out: bool| {
            if !is_out {
                let why = "no announcement leaves this machine: is its UDP port 5353 taken or blocked?";
                events.tell(Event::NotAnnounced { why: why.to_owned() });
            }
        };
        match Announcement::start(&name, address, mdns_port, told) {
            Ok(announcement) => self.announcement = Some(announcement),
            Err(e) => self.events.tell(Event::NotAnnounced { why: e.to_string() }),
        }
    }

    /// Serves one host after the other until it is [stopped](StopHandle::stop); loads the slice first where that is not
    /// done yet.
    ///
    /// # Errors
    /// The slice cannot be loaded. What goes wrong with a host is an event.
    pub fn serve(&mut self) -> Result<(), Error> {
        if self.stage.is_none() {
            self.load()?;
        }
        let Some(stage) = &mut self.stage else { return Ok(()) };
        while let Some(link) = self.listener.accept(None) {
            let host = link.peer().to_owned();
            self.events.tell(Event::Serving { host: host.clone() });
            let ended = serve(stage, link);
            match ended.kind {
                LinkErrorKind::Goodbye(Farewell::Finished) => self.events.tell(Event::Finished { host }),
                LinkErrorKind::Stopped => {}
                _ => self.events.tell(Event::Gone(ended)),
            }
            self.events.came_to(());
        }
        self.announcement = None;
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.listener.close(Farewell::ShuttingDown);
    }
}

/// Ends a worker: the host that is being served is told, nobody else is let in, and [`Worker::serve`] returns.
#[derive(Clone, Debug)]
pub struct StopHandle(Arc<Listener>);

impl StopHandle {
    /// Ends it; the second time does nothing.
    pub fn stop(&self) {
        self.0.close(Farewell::ShuttingDown);
    }
}
