//! A worker's way to a link: listen, tell strangers from hosts, serve one host at a time.
//!
//! ```text
//!     accept ---> a thread for each newcomer ---> HELLO, terms ---> slot free? ---> Listener::accept
//!                   | wrong first bytes, wrong key, 2 s: closed        | taken: BUSY
//! ```
//!
//! Nothing that a newcomer does touches the host being served. A newcomer is a stranger until its first sealed message
//! has opened. When 16 strangers are there, one is closed for the newest, of whoever has brought the most.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::line::lock;
use super::link::{self, Link};
use super::notices::{Limiter, Notice};
use super::opening::Opening;
use super::slot::{Host, Slot};
use super::strangers::Strangers;
use super::{LinkError, Timing, tcp};
use crate::endpoint::{Endpoint, LookUp};
use crate::error::HandshakeError;
use crate::fault::{ErrorCode, Farewell, Fault};
use crate::handshake::{Lookup, Named, Purpose};
use crate::keys::{FoundKey, Key, KeyError, KeyId, KeyStore, PairingCode, PairingWindow, Peer};
use crate::link_error::{Awaited, LinkErrorKind};
use crate::message::Message;
use crate::terms::{self, Reason, Terms};

/// How long the system is left alone after it would not accept a connection.
const TROUBLED: Duration = Duration::from_millis(100);
/// How often it is looked whether the key of the host being served is still there.
const KEY_WATCHED: Duration = Duration::from_secs(1);

/// Where a worker's keys are.
pub trait KeyRing: Send + Sync {
    /// The key that a host names, if it is here. Asked for every stranger: it must not take long.
    fn find(&self, named: &Named) -> Option<FoundKey>;
    /// Whether a key is still here. Asked every second while it is in use: when it is not, its connection ends.
    fn holds(&self, id: KeyId) -> bool;
    /// Keeps the key of a host that has just been paired, whose name is `name`.
    ///
    /// # Errors
    /// Why it could not be kept, for the user.
    fn add(&self, key: &Key, name: &str) -> Result<(), String>;
}

/// One key from a file, and no pairing.
impl KeyRing for Key {
    fn find(&self, named: &Named) -> Option<FoundKey> {
        named.is(self).then(|| FoundKey::good(self.clone()))
    }

    /// It was read once and for all.
    fn holds(&self, _: KeyId) -> bool {
        true
    }

    fn add(&self, _: &Key, _: &str) -> Result<(), String> {
        Err("this worker was started with one key and keeps no others".to_owned())
    }
}

/// The user's own keys.
impl KeyRing for KeyStore {
    fn find(&self, named: &Named) -> Option<FoundKey> {
        self.find_named(|key| named.is(key))
    }

    fn holds(&self, id: KeyId) -> bool {
        KeyStore::holds(self, id)
    }

    fn add(&self, key: &Key, name: &str) -> Result<(), String> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let peer = Peer { name: name.to_owned(), address: String::new(), paired_at: now.as_secs() };
        KeyStore::add(self, key, &peer).map_err(|e| e.to_string())
    }
}

/// What a worker can say to a host's HELLO.
#[derive(Clone, Debug)]
pub enum Readiness {
    /// It can serve, on these terms; their `version` is filled in.
    Ready(Terms),
    /// It cannot now: these are its terms so far, the reason (not one of comparison), and a sentence.
    NotReady(Terms, Reason, String),
}

impl Readiness {
    fn terms(&self, version: u16) -> Terms {
        let (Readiness::Ready(terms) | Readiness::NotReady(terms, ..)) = self;
        Terms { version, ..terms.clone() }
    }
}

/// What a listener needs.
pub struct ListenerConfig {
    /// The keys of the hosts that may come.
    pub keys: Arc<dyn KeyRing>,
    /// What it says to them; see [`Listener::set_readiness`].
    pub readiness: Readiness,
    /// The times.
    pub timing: Timing,
    /// Is told what happens, from any thread.
    pub notice: Box<dyn Fn(&Notice) + Send + Sync>,
}

/// A worker's listening socket. Dropping it ends the link it gave away.
pub struct Listener {
    shared: Arc<Shared>,
    address: SocketAddr,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

impl Listener {
    /// Listens at `address` (`host:port`, port 0 for any) and begins to answer.
    ///
    /// # Errors
    /// [`LinkErrorKind::Unreachable`] if the address cannot be had.
    pub fn bind(address: &str, config: ListenerConfig) -> Result<Listener, LinkError> {
        let unreachable = |e: std::io::Error| {
            let text = match e.kind() {
                std::io::ErrorKind::AddrInUse => {
                    "another program listens there: choose another port".to_owned()
                }
                _ => e.to_string(),
            };
            LinkErrorKind::Unreachable { text, is_refused: false }.with(address)
        };
        let socket: std::net::TcpListener = tcp::listen(address).map_err(unreachable)?.into();
        let local = socket.local_addr().map_err(unreachable)?;
        let shared = Arc::new(Shared {
            keys: config.keys,
            readiness: Mutex::new(config.readiness),
            timing: config.timing,
            notice: config.notice,
            begun: Instant::now(),
            pairing: Mutex::new(None),
            slot: Arc::default(),
            strangers: Mutex::default(),
            strangers_changed: Condvar::new(),
            limiter: Limiter::default(),
            next: AtomicU64::new(1),
            closed: AtomicBool::new(false),
        });
        let acceptor = shared.clone();
        let run = move || acceptor.run(&socket);
        let acceptor =
            std::thread::Builder::new().name("dim-accept".into()).spawn(run).map_err(unreachable)?;
        Ok(Listener { shared, address: local, acceptor: Mutex::new(Some(acceptor)) })
    }

    /// Where it listens, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next host that is to be served; `None` after `timeout` or when the listener is closed. The next
    /// one comes only after this link's receiver has been dropped.
    pub fn accept(&self, timeout: Option<Duration>) -> Option<Link> {
        self.shared.slot.fetch(timeout)
    }

    /// What hosts are told from now on.
    pub fn set_readiness(&self, readiness: Readiness) {
        *lock(&self.shared.readiness) = readiness;
    }

    /// Opens a pairing window, in place of one that may be open. The code is to be shown to the user.
    ///
    /// # Errors
    /// [`LinkErrorKind::Keys`] if the system has no random numbers.
    pub fn open_pairing(&self) -> Result<PairingCode, LinkError> {
        let code = PairingCode::random()?;
        *lock(&self.shared.pairing) = Some(PairingWindow::open(&code, self.shared.now_ms()));
        Ok(code)
    }

    /// Whether a code is good now.
    pub fn is_pairing(&self) -> bool {
        let now = self.shared.now_ms();
        lock(&self.shared.pairing).as_ref().is_some_and(|w| w.is_open(now))
    }

    /// Stops listening and says goodbye to the host being served.
    pub fn close(&self, why: Farewell) {
        if self.shared.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        self.shared.slot.close(why);
        lock(&self.shared.strangers).close_all();
        self.shared.strangers_changed.notify_all();
        // the acceptor's thread sits in accept(): a connection wakes it
        let mut own = self.address;
        if own.ip().is_unspecified() {
            own.set_ip(match own {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        let woken = TcpStream::connect_timeout(&own, Duration::from_millis(200)).is_ok();
        // the address is free again when this returns: whoever listens next may ask for the same one. A thread that
        // could not be woken is left to itself, and who is told something by it may close from there.
        if let Some(acceptor) =
            lock(&self.acceptor).take().filter(|a| woken && a.thread().id() != std::thread::current().id())
        {
            let _ = acceptor.join();
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close(Farewell::ShuttingDown);
    }
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("address", &self.address).finish_non_exhaustive()
    }
}

/// What the listener and its threads share.
struct Shared {
    keys: Arc<dyn KeyRing>,
    readiness: Mutex<Readiness>,
    timing: Timing,
    notice: Box<dyn Fn(&Notice) + Send + Sync>,
    begun: Instant,
    pairing: Mutex<Option<PairingWindow>>,
    slot: Arc<Slot>,
    strangers: Mutex<Strangers>,
    strangers_changed: Condvar,
    limiter: Limiter,
    next: AtomicU64,
    closed: AtomicBool,
}

impl Shared {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    // --- strangers

    fn run(self: &Arc<Shared>, socket: &std::net::TcpListener) {
        while !self.is_closed() {
            match socket.accept() {
                Ok((stream, from)) => self.begin(stream, from),
                Err(e) => self.troubled(&e),
            }
        }
    }

    /// Out of descriptors: a stranger makes room.
    fn troubled(&self, error: &std::io::Error) {
        // a peer that was gone before we looked, or a signal: nothing is short
        if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) {
            return;
        }
        if let Some(suppressed) = self.limiter.pass(None, Instant::now()) {
            (self.notice)(&Notice::Trouble { why: error.to_string(), suppressed });
        }
        let mut strangers = lock(&self.strangers);
        strangers.close_one();
        // until one of them is gone
        drop(
            self.strangers_changed.wait_timeout(strangers, TROUBLED).unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Gives a newcomer a thread; somebody else leaves for it when there are too many.
    fn begin(self: &Arc<Shared>, stream: TcpStream, from: SocketAddr) {
        let begun = Instant::now();
        let Ok(handle) = stream.try_clone() else { return };
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        {
            let mut strangers = lock(&self.strangers);
            if self.is_closed() {
                return;
            }
            strangers.admit(number, from.ip(), handle);
        }
        let shared = self.clone();
        let run = move || {
            shared.meet(stream, from, begun, number);
            // also a peer that is only being closed can be closed sooner
            shared.forget(number);
        };
        if std::thread::Builder::new().name("dim-newcomer".into()).spawn(run).is_err() {
            self.forget(number);
        }
    }

    /// It is no stranger any more, or gone.
    fn forget(&self, number: u64) {
        lock(&self.strangers).forget(number);
        self.strangers_changed.notify_all();
    }

    /// A newcomer's way from its first byte to what it wants.
    fn meet(self: &Arc<Shared>, stream: TcpStream, from: SocketAddr, begun: Instant, number: u64) {
        if tcp::configure(&stream, self.timing.stalled_write).is_err() {
            return;
        }
        let looked: Arc<Mutex<Looked>> = Arc::default();
        let endpoint = match Endpoint::worker(self.look_up(looked.clone()), &self.timing, begun) {
            Ok(endpoint) => endpoint,
            Err(error) => return self.refused(from.ip(), error.to_string()),
        };
        let mut opening = Opening::new(stream, from.to_string(), endpoint);
        let wish = opening.next().map(Wish::of);
        let done = match wish {
            Err(error) if !opening.endpoint.is_authenticated() => {
                let given_up = !lock(&self.strangers).has(number);
                self.refused(from.ip(), stranger_text(&error, given_up, lock(&looked).pairing));
                return;
            }
            Err(error) => Err(error),
            Ok(wish) => {
                // its first sealed message has opened: nobody who has only overheard one can do that
                self.forget(number);
                let unusable = lock(&looked).unusable.take();
                match unusable {
                    None => self.answer(&mut opening, wish),
                    Some(why) => {
                        opening.endpoint.fail(Fault::new(ErrorCode::Internal, why.at_the_worker()));
                        self.refused(from.ip(), why.to_string());
                        Ok(None)
                    }
                }
            }
        };
        match done {
            Ok(Some(hello)) => self.serve(opening, hello),
            Ok(None) => opening.close(),
            Err(error) => {
                // a host that only asked or that was refused has every right to leave
                if !matches!(error.kind, LinkErrorKind::Goodbye(_) | LinkErrorKind::Refused { .. }) {
                    self.refused(from.ip(), error.to_string());
                }
                opening.close();
            }
        }
    }

    fn look_up(self: &Arc<Shared>, looked: Arc<Mutex<Looked>>) -> LookUp {
        let shared = self.clone();
        Box::new(move |named| match named.purpose {
            Purpose::Key => match shared.keys.find(named) {
                None => Lookup::Unknown,
                Some(FoundKey { key, unusable }) => {
                    lock(&looked).unusable = unusable;
                    Lookup::Found(key)
                }
            },
            Purpose::Pairing => {
                let now = shared.now_ms();
                let key = lock(&shared.pairing).as_ref().and_then(|w| w.key(now));
                lock(&looked).pairing = key.is_some();
                key.map_or(Lookup::NoPairing, Lookup::Found)
            }
        })
    }

    // --- key holders

    /// Answers until the peer has what it wanted (`None`) or wants to be served.
    fn answer(&self, opening: &mut Opening, mut wish: Wish) -> Result<Option<Terms>, LinkError> {
        loop {
            match wish {
                Wish::Serve(hello) => return Ok(Some(*hello)),
                Wish::Pair(name) => return self.grant(opening, name).map(|()| None),
                Wish::Push => {
                    let terms = self.terms(opening);
                    let text = "this worker takes no files: give it its slice when you start it".to_owned();
                    opening.endpoint.refuse(Reason::NoPush, terms, text);
                    return Ok(None);
                }
                Wish::Know => {
                    let terms = self.terms(opening);
                    opening.endpoint.offer(terms);
                }
                Wish::Nothing => {}
            }
            wish = Wish::of(opening.next()?);
        }
    }

    fn terms(&self, opening: &Opening) -> Terms {
        lock(&self.readiness).terms(opening.endpoint.version())
    }

    fn grant(&self, opening: &mut Opening, name: String) -> Result<(), LinkError> {
        let key = Key::random()?;
        if let Err(why) = self.use_code(&key, &name) {
            // said while it can be: the host's user sits elsewhere
            opening.endpoint.fail(Fault::new(ErrorCode::Internal, format!("the worker did not pair: {why}")));
            (self.notice)(&Notice::NotPaired { name, why });
            return Ok(());
        }
        let terms = self.terms(opening);
        opening.endpoint.grant(&key, terms.name, terms.software);
        let stored = opening.next().map(|_| ());
        match &stored {
            Ok(()) => (self.notice)(&Notice::Paired { name, key: key.id() }),
            Err(e) => (self.notice)(&Notice::NotPaired { name, why: e.to_string() }),
        }
        stored
    }

    /// Keeps the key of a host that knew the code, and only then is the code used up: a disk that is full takes it from
    /// nobody. Of two hosts that know it one gets a key.
    fn use_code(&self, key: &Key, name: &str) -> Result<(), String> {
        let mut window = lock(&self.pairing);
        let Some(open) = window.as_mut().filter(|w| w.is_open(self.now_ms())) else {
            return Err("the pairing code is no longer good".to_owned());
        };
        self.keys.add(key, name)?;
        open.close();
        Ok(())
    }

    /// A host that wants to be served: do we fit, and is the slot free?
    fn serve(self: &Arc<Shared>, mut opening: Opening, hello: Terms) {
        let readiness = lock(&self.readiness).clone();
        let held = readiness.terms(opening.endpoint.version());
        let peer = opening.peer();
        if let Readiness::NotReady(_, reason, text) = readiness {
            opening.endpoint.refuse(reason, held, text);
            return opening.close();
        }
        let agreed = match terms::agree(&hello, &held) {
            Ok(agreed) if hello.version == opening.endpoint.version() => agreed,
            other => {
                let error = opening.endpoint.refuse_for(other.err().unwrap_or_default(), held).with(&peer);
                if let Ok(address) = opening.stream.peer_addr() {
                    self.refused(address.ip(), error.to_string());
                }
                return opening.close();
            }
        };
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let key_id = opening.endpoint.key_id();
        let host = Host { name: peer.clone(), key_id, instance: hello.instance };
        let occupied = match self.slot.take(number, host) {
            Ok(occupied) => occupied,
            Err((serving, since)) => {
                let since_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
                opening.endpoint.busy(since_ms, serving.clone());
                opening.close();
                return (self.notice)(&Notice::Busy { host: peer, serving });
            }
        };
        // from here on a heartbeat may be owed: the link is started right after the ACCEPT
        opening.endpoint.accept(held, agreed, Instant::now());
        if opening.flush().is_ok()
            && let Ok(link) = link::start(opening, Some(Box::new(occupied)))
        {
            self.slot.fill(number, link);
            self.watch(number, key_id);
        }
    }

    /// Ends the connection that has the slot when its key is taken away: whom it was taken from is a stranger then.
    fn watch(&self, number: u64, key: KeyId) {
        while let Some(served) = self.slot.served_after(number, KEY_WATCHED) {
            if !self.keys.holds(key) {
                let text = "this host's key was taken away at the worker";
                served.fail(Fault::new(ErrorCode::Revoked, text));
                return served.stop();
            }
        }
    }

    /// At most one notice a minute for a network.
    fn refused(&self, from: IpAddr, why: String) {
        if !self.is_closed()
            && let Some(suppressed) = self.limiter.pass(Some(from), Instant::now())
        {
            (self.notice)(&Notice::Refused { from, why, suppressed });
        }
    }
}

/// What was found for the key that a stranger names.
#[derive(Default)]
struct Looked {
    pairing: bool,
    /// the key is here and is not used: why, for the worker's user
    unusable: Option<KeyError>,
}

/// What a peer with a key wants.
enum Wish {
    Know,
    Serve(Box<Terms>),
    Push,
    Pair(String),
    Nothing,
}

impl Wish {
    fn of(message: Message<'_>) -> Wish {
        match message {
            Message::Inquire => Wish::Know,
            Message::Hello(hello) => Wish::Serve(Box::new(hello)),
            Message::PushOffer(_) => Wish::Push,
            Message::PairRequest { name, .. } => Wish::Pair(name),
            _ => Wish::Nothing,
        }
    }
}

/// What was wrong with a stranger, for the worker's user.
fn stranger_text(error: &LinkError, given_up: bool, pairing: bool) -> String {
    match &error.kind {
        LinkErrorKind::Handshake(HandshakeError::Key) if pairing => "wrong pairing code".to_owned(),
        LinkErrorKind::Handshake(HandshakeError::Key) => {
            "its key is not known here: pair it with this worker".to_owned()
        }
        LinkErrorKind::Handshake(other) => other.to_string(),
        _ if given_up => "it took too long while others were waiting".to_owned(),
        LinkErrorKind::Closed => "it closed the connection in the handshake".to_owned(),
        LinkErrorKind::Deadline { awaited: Awaited::Handshake, .. } => {
            "it took too long for the handshake".to_owned()
        }
        LinkErrorKind::Broken { text } => text.clone(),
        _ => error.to_string(),
    }
}
