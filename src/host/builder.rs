//! What a host is to be, before it is one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use dim_core::pipeline::Patience;
use dim_core::rows::RowType;
use dim_wire::keys::{Key, KeyError};
use dim_wire::transport::CallOff;
use gguf_tools::gguf::Gguf;

use crate::device;
use crate::error::{BadOption, Error};
use crate::event::{Event, Events};
use crate::host::Host;
use crate::host::address;
use crate::host::discovery::Discovery;
use crate::host::split::{Split, SplitFiles};
use crate::host::template::{ChatTemplate, TemplateError};
use crate::resources::Resources;
use crate::stage::verified::Verify;
use crate::terms::Needs;
use crate::worker::MAX_SESSIONS;

/// The options of a host: made by [`Host::open`], used up by [`connect`](HostBuilder::connect).
#[derive(Clone, Debug)]
#[must_use = "nothing is opened before `connect`"]
pub struct HostBuilder {
    files: SplitFiles,
    options: HostOptions,
}

#[derive(Clone, Debug)]
pub(crate) struct HostOptions {
    /// addresses as they were given, and the keys one of which is the right one
    pub workers: Vec<(String, Vec<Key>)>,
    pub search: Option<Discovery>,
    pub sessions: u32,
    pub batch_rows: u32,
    pub wire: RowType,
    /// whether the model decides on it
    pub wire_is_free: bool,
    pub resources: Resources,
    pub verify: Verify,
    pub mmap: bool,
    pub canary: bool,
    pub patience: Patience,
    pub falls_back: bool,
    pub step_timeout: Duration,
    pub software: String,
    pub off: CallOff,
}

impl HostOptions {
    /// How many sessions a worker is asked for: the conversations', and where there is something to hold it against one more
    /// for that. A worker that does not have it is used without.
    pub(crate) fn wanted_sessions(&self, has_canary: bool) -> u32 {
        self.sessions + u32::from(self.canary && has_canary)
    }

    /// What every worker has to have.
    pub(crate) fn needs(&self) -> Needs {
        Needs {
            software: self.software.clone(),
            wire: self.wire,
            n_ctx: self.resources.n_ctx,
            max_rows: self.resources.n_ubatch,
        }
    }
}

impl HostBuilder {
    /// Of the files that dim-split wrote.
    pub(crate) fn of_manifest(path: &Path) -> Result<HostBuilder, Error> {
        Ok(HostBuilder::new(SplitFiles::of_manifest(path)?))
    }

    /// Of files that are named one by one.
    pub(crate) fn of_slices(head: &Path, middles: &[PathBuf], tail: &Path) -> Result<HostBuilder, Error> {
        Ok(HostBuilder::new(SplitFiles::of_slices(head, middles, tail)?))
    }

    fn new(files: SplitFiles) -> HostBuilder {
        let options = HostOptions {
            workers: Vec::new(),
            search: None,
            sessions: 1,
            batch_rows: 1,
            wire: RowType::F32,
            wire_is_free: true,
            resources: Resources::default(),
            verify: Verify::Once,
            mmap: false,
            canary: true,
            patience: Patience::default(),
            falls_back: false,
            step_timeout: Duration::from_secs(120),
            software: device::software("dim"),
            off: CallOff::new(),
        };
        HostBuilder { files, options }
    }

    /// A worker that holds a middle, at `host:port`; their order does not matter. Middles that no worker holds run in
    /// this process.
    pub fn worker(self, address: impl Into<String>, key: Key) -> HostBuilder {
        self.worker_with_one_of(address, vec![key])
    }

    /// The same where it is not known which key is the worker's: they are tried in this order.
    pub fn worker_with_one_of(mut self, address: impl Into<String>, keys: Vec<Key>) -> HostBuilder {
        self.options.workers.push((address.into(), keys));
        self
    }

    /// Looks on the local network for workers that hold what nobody else does.
    pub fn find_workers(mut self, search: Discovery) -> HostBuilder {
        self.options.search = Some(search);
        self
    }

    /// The number format of the rows that cross the network: F32 is bit-exact, F16 half as much. Unless this says which,
    /// F16 where the model's own weights are F16 or BF16, which rounding the rows adds next to nothing to, and F32 elsewhere:
    /// llama.cpp rounds a row again to multiply it with quantised weights, and then other numbers are the nearest.
    pub fn wire(mut self, rows: RowType) -> HostBuilder {
        (self.options.wire, self.options.wire_is_free) = (rows, false);
        self
    }

    /// How many conversations there can be at once: one, unless this says otherwise. Each costs a cache of as many
    /// positions as the [resources](Resources) say in every stage, here and on the workers, whether or not it is used;
    /// workers have to have at least as many, by [`WorkerBuilder::max_sessions`](crate::WorkerBuilder::max_sessions) (one
    /// more, if they are to be checked while they compute).
    pub fn sessions(mut self, n: u32) -> HostBuilder {
        self.options.sessions = n;
        self
    }

    /// The most rows of several conversations' next tokens that are evaluated in one pass: one, unless this says otherwise,
    /// which is no batches. A pass reads the weights once for all its rows, so replies that run side by side get more tokens
    /// a second. It is made of what waits when the head becomes free; nobody waits for others to come.
    ///
    /// What is promised: a pass gives what `llama_decode` gives for the same rows in one batch, bit for bit with F32 rows.
    /// It does not give what each row gives alone: llama.cpp multiplies several rows with other kernels than one, whose sums
    /// are rounded in another order. So with batches a reply may go another way where two tokens are nearly as likely, and
    /// which way depends on who else was there. Without them each conversation gets what it gets alone, to the bit.
    pub fn batch_rows(mut self, n: u32) -> HostBuilder {
        self.options.batch_rows = n;
        self
    }

    /// How much of this machine to use.
    pub fn resources(mut self, resources: Resources) -> HostBuilder {
        self.options.resources = resources;
        self
    }

    /// When the slices' weights are compared with their digests: once, unless this says otherwise.
    pub fn verify(mut self, when: Verify) -> HostBuilder {
        self.options.verify = when;
        self
    }

    /// Whether slices are mapped instead of read: they must not change then.
    pub fn mmap(mut self, yes: bool) -> HostBuilder {
        self.options.mmap = yes;
        self
    }

    /// Whether the workers' answers to a known input are held against the right ones; they are, unless this says no.
    pub fn canary(mut self, yes: bool) -> HostBuilder {
        self.options.canary = yes;
        self
    }

    /// How long a lost worker is looked for.
    pub fn patience(mut self, patience: Patience) -> HostBuilder {
        self.options.patience = patience;
        self
    }

    /// Whether the blocks of a worker that stays away for longer than [`patience`](Self::patience) says run in this process
    /// then, from the slice that is beside the manifest, if there is memory for it; they do not, unless this says so. The
    /// reply goes on with what it would have been (the slice is told again what the worker was told, in the same chunks; a
    /// worker of another kind, a phone, rounds otherwise). It stays so for as long as the host lives.
    pub fn fall_back(mut self, yes: bool) -> HostBuilder {
        self.options.falls_back = yes;
        self
    }

    /// The longest a worker may take for one step: two minutes, unless this says otherwise.
    pub fn step_timeout(mut self, limit: Duration) -> HostBuilder {
        self.options.step_timeout = limit;
        self
    }

    /// Program and version, as workers are told.
    pub fn software(mut self, software: impl Into<String>) -> HostBuilder {
        self.options.software = software.into();
        self
    }

    /// What ends [`connect`](HostBuilder::connect) from another thread: workers that are looked for, dialled or waited for,
    /// digests that are compared, slices that are loaded. It is over within a tenth of a second, but where llama.cpp tries a
    /// file for the first time or lays out a stage's buffers, and where the system looks up a name. Of a host that is
    /// connected it ends nothing.
    ///
    /// ```
    /// # fn main() -> Result<(), dim::Error> {
    /// # let split = std::path::Path::new("no.split.json");
    /// let off = dim::CallOff::new();
    /// let calls_off = off.clone();
    /// let on_cancel = move || calls_off.call_off();
    /// # std::thread::spawn(on_cancel);
    /// # if split.exists() {
    /// match dim::Host::open(split)?.unless(off).connect(|_| {}) {
    ///     Err(dim::Error::CalledOff) => println!("not now, then"),
    ///     host => drop(host?.session()?),
    /// }
    /// # }
    /// # Ok(())
    /// # }
    /// ```
    pub fn unless(mut self, off: CallOff) -> HostBuilder {
        self.options.off = off;
        self
    }

    /// Whether the model's own chat template, or this one, can be read: known before anything is dialled or loaded. A model
    /// that has none is no error.
    ///
    /// # Errors
    /// It cannot be read, or the head cannot.
    pub fn check_chat_template(&self, given: Option<&str>) -> Result<(), Error> {
        let gguf = Gguf::open(&self.files.head)?;
        let own = gguf.entry("tokenizer.chat_template");
        let own = own.as_ref().and_then(|entry| entry.value.as_str());
        match ChatTemplate::new(given.or(own).unwrap_or_default(), "", "") {
            Ok(_) => Ok(()),
            Err(TemplateError::None) if given.is_none() => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens the files, dials the workers and loads what runs here. `on_event` hears of it, and of workers that are lost
    /// and found as long as the host lives: in whatever thread it happens, which later is one that a session is driven by.
    /// So it must not wait for a session of this host; where it tries, that is an error.
    ///
    /// If it panics, it is not called again, and the call during which that happened panics with the same where it would
    /// have returned: this one, or one for the session that drove the others then. Host and sessions are whole: they go on
    /// from the tokens they have, and this session too.
    ///
    /// # Errors
    /// Whatever is in the way: a file, an option, a worker, memory; [`Error::CalledOff`].
    pub fn connect(self, on_event: impl FnMut(Event) + Send + 'static) -> Result<Host, Error> {
        let events = Events::unless(self.options.off.clone(), on_event);
        let connected = events.came_to(self.connect_and_tell(&events));
        match events.off().is_called_off() {
            true => Err(Error::CalledOff),
            false => connected,
        }
    }

    fn connect_and_tell(mut self, events: &Events) -> Result<Host, Error> {
        self.options.resources.check()?;
        let (sessions, most) = (self.options.sessions, MAX_SESSIONS.min(self.options.resources.n_ubatch));
        if !(1..=most).contains(&sessions) {
            return Err(BadOption::new(
                "sessions",
                sessions,
                "1 to 64, and no more than rows of the micro-batch",
            )
            .into());
        }
        if self.options.batch_rows == 0 {
            return Err(BadOption::new("batch_rows", 0, "1, which is no batches, or more").into());
        }
        for (given, keys) in &self.options.workers {
            let address = address::complete(given)?;
            if keys.is_empty() {
                return Err(Error::NoKey { address, source: KeyError::NotPaired { address: given.clone() } });
            }
        }
        if self.options.falls_back {
            self.files.have_reserves()?;
        }
        let split = Split::open(self.files, self.options.verify, events)?;
        if self.options.wire_is_free && split.head.is_half {
            self.options.wire = RowType::F16;
        }
        let resources = &mut self.options.resources;
        resources.n_ctx = resources.n_ctx_for(split.head.hparams.n_ctx_train, events);
        split.assign(&self.options, events)?.connect(&split, &self.options, events)
    }
}
