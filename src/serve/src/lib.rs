//! A split model behind the HTTP API that every client of OpenAI's speaks.
//!
//! ```text
//! socket -> [door] -> [access] -> request: bytes as what is wanted -> tokens -> [slots: fair queue, sessions] -> updates
//!                                                                                                                 |
//! socket <- [stream: server-sent events] or a whole reply <- [reply: in the client's dialect] <-----------------------'
//! ```
//!
//! One thread with a tokio runtime of its own holds every connection; each session of the library has a thread; nothing of a
//! token's way waits for a client but behind a bounded channel. The server listens before its model is loaded and says so:
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let server = dim_serve::Server::bind(dim_serve::Options::default())?;
//! let watch = server.watch();
//! let host = dim::Host::open("model.split.json")?.sessions(4).connect(move |event| watch.hear(&event))?;
//! server.open(host)?;
//! println!("http://{}", server.address());
//! # Ok(())
//! # }
//! ```
//!
//! What it promises, and what it does not do: docs/SERVER.md.
#![forbid(unsafe_code)]

mod access;
mod cache;
mod door;
mod error;
mod markdown;
mod metrics;
mod page;
mod prepare;
mod queue;
mod reply;
pub mod request;
mod routes;
mod slots;
mod stream;
mod watch;
mod work;

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use dim::Host;
use dim::host::template::{CHATML, ChatTemplate, Role, TemplateError, Turn};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch as signal};

use access::Access;
use cache::{Cache, Folder};
use metrics::Metrics;
use routes::{App, Loaded};
use slots::Slots;

pub use access::ApiKeys;
pub use cache::{CacheOptions, Notices};
pub use error::{ApiError, ServeError};
pub use request::Defaults;
pub use watch::Watch;

/// What a server is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen: an address of this machine and a port (0: any).
    pub listen: String,
    /// What clients are told that the model is called, if not its own name.
    pub model_alias: Option<String>,
    /// Another chat template than the model's: Jinja.
    pub chat_template: Option<String>,
    /// Who may use it. Without keys only this machine can.
    pub keys: Option<ApiKeys>,
    /// Whether everybody may who can reach it.
    pub is_open: bool,
    /// Names beside `localhost` and addresses by which it is asked for.
    pub hosts: Vec<String>,
    /// Origins of pages elsewhere that may use it; `*`: all.
    pub origins: Vec<String>,
    /// Requests that may wait for a slot.
    pub queue: usize,
    /// How long a slot waits for a client that does not read.
    pub reader_timeout: Duration,
    /// What holds for requests that say nothing else.
    pub defaults: Defaults,
    /// Where prompts are kept that no slot has any more: nowhere, unless this says where.
    pub cache: CacheOptions,
    /// Who hears what a person should know.
    pub notices: Notices,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            listen: "127.0.0.1:8080".to_owned(),
            model_alias: None,
            chat_template: None,
            keys: None,
            is_open: false,
            hosts: Vec::new(),
            origins: Vec::new(),
            queue: 64,
            reader_timeout: Duration::from_secs(30),
            defaults: Defaults::default(),
            cache: CacheOptions::default(),
            notices: Notices::default(),
        }
    }
}

/// A server that listens. Dropping it ends it, once the prompts that its slots hold are kept, if they are to be.
pub struct Server {
    app: Arc<App>,
    options: Options,
    folder: Option<Folder>,
    address: SocketAddr,
    runtime: Handle,
    stop: signal::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens, and answers that the model is being loaded.
    ///
    /// # Errors
    /// The address cannot be had, or could be reached by others although there is no key; or prompts cannot be kept where
    /// they are to be.
    pub fn bind(mut options: Options) -> Result<Server, ServeError> {
        let address = options.listen.clone();
        let cannot = |source| ServeError::Listen { address: address.clone(), source };
        let mut addresses = address.to_socket_addrs().map_err(cannot)?;
        let to = addresses.next().ok_or_else(|| cannot(std::io::ErrorKind::AddrNotAvailable.into()))?;
        if !to.ip().is_loopback() && options.keys.is_none() && !options.is_open {
            return Err(ServeError::Open { address });
        }
        let folder =
            options.cache.dir.as_deref().map(|dir| folder(dir, options.cache.disk_bytes)).transpose()?;
        let access = Access {
            keys: options.keys.take(),
            hosts: hosts(&options.hosts)?,
            origins: origins(&options.origins)?,
        };
        let listener = std::net::TcpListener::bind(to).map_err(cannot)?;
        listener.set_nonblocking(true).map_err(cannot)?;
        let address = listener.local_addr().map_err(cannot)?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(4).build();
        let runtime = runtime.map_err(ServeError::Threads)?;

        let metrics = Arc::new(Metrics::new());
        let app = Arc::new(App {
            access,
            defaults: options.defaults.clone(),
            model_alias: options.model_alias.clone(),
            metrics: Arc::clone(&metrics),
            watch: Watch::default(),
            loaded: OnceLock::new(),
            readers: Arc::new(Semaphore::new(READERS)),
        });
        let (stop, stopped) = signal::channel(false);
        let (handle, router) = (runtime.handle().clone(), routes::router(Arc::clone(&app)));
        let serve = move || {
            runtime.block_on(async {
                if let Ok(listener) = tokio::net::TcpListener::from_std(listener) {
                    door::serve(listener, router, metrics, stopped).await;
                }
            });
            runtime.shutdown_timeout(Duration::from_millis(100));
        };
        let thread =
            std::thread::Builder::new().name("http".to_owned()).spawn(serve).map_err(ServeError::Threads)?;
        Ok(Server { app, options, folder, address, runtime: handle, stop, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What is to hear of the host's events.
    pub fn watch(&self) -> Watch {
        self.app.watch.clone()
    }

    /// Serves `host` from now on, with a slot for each session that it can have. Done once; a second host is dropped.
    ///
    /// # Errors
    /// A template was given that cannot be used, or there are no threads.
    pub fn open(&self, host: Host) -> Result<(), ServeError> {
        let template = match &self.options.chat_template {
            Some(source) => Ok(host.chat_template_of(source).map_err(dim::Error::from)?),
            None => match host.chat_template() {
                Err(TemplateError::None) => host.chat_template_of(CHATML),
                template => template,
            },
        };
        // the model's own: completions can do without
        let template = template.map_err(|e| ApiError::from(&dim::Error::from(e)));
        let host = Arc::new(host);
        let Options { queue, reader_timeout, .. } = self.options;
        let (metrics, watch) = (Arc::clone(&self.app.metrics), self.app.watch.clone());
        let thinks = template.as_ref().is_ok_and(thinks);
        let (folder, ram_bytes) = (self.folder.clone(), self.options.cache.ram_bytes);
        let cache = Cache::open(folder, ram_bytes, &host, self.options.notices.clone(), Arc::clone(&metrics));
        let slots = Slots::open(&host, queue, reader_timeout, cache, metrics, watch, self.runtime.clone())?;
        let _ = self.app.loaded.set(Loaded { host, template, thinks, slots });
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(loaded) = self.app.loaded.get() {
            loaded.slots.close();
        }
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Some(loaded) = self.app.loaded.get() {
            loaded.slots.finish();
        }
    }
}

fn folder(dir: &std::path::Path, disk_bytes: u64) -> Result<Folder, ServeError> {
    let cannot = |source| ServeError::CacheDir { path: dir.display().to_string(), source };
    Folder::create(dir, disk_bytes).map_err(cannot)
}

/// Whether a model's answers have a reasoning part, by its template. One that llama.cpp does not take has none that could be
/// told apart.
fn thinks(template: &ChatTemplate) -> bool {
    let turn = Turn { role: Role::User, content: "Hello".to_owned() };
    template
        .prepare(&request::conversation::as_dialogue(&[turn], request::Thinking::Told))
        .is_ok_and(|prepared| prepared.thinks)
}

fn hosts(given: &[String]) -> Result<Vec<String>, ServeError> {
    let host = |host: &String| {
        let is_name =
            !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
        match is_name {
            true => Ok(host.to_ascii_lowercase()),
            false => Err(ServeError::Allowed {
                field: "hosts",
                value: host.clone(),
                rule: "a name without scheme and port, as box.local",
            }),
        }
    };
    given.iter().map(host).collect()
}

fn origins(given: &[String]) -> Result<Vec<String>, ServeError> {
    let origin = |origin: &String| match origin == "*" || origin.contains("://") && !origin.ends_with('/') {
        true => Ok(origin.clone()),
        false => Err(ServeError::Allowed {
            field: "origins",
            value: origin.clone(),
            rule: "scheme, name and port as a browser writes them, as https://chat.example, or *",
        }),
    };
    given.iter().map(origin).collect()
}

/// Templates are rendered and texts tokenised for so many requests at once.
const READERS: usize = 2;
