//! A worker's way to a link: listen, tell strangers from hosts, serve one host at a time.
//!
//! ```text
//!     accept ---> a thread for each handshake, 16 at most ---> host's place free? ---> Listener::accept
//!                   | wrong first bytes, wrong key, 2 s: closed     | taken: BUSY
//! ```
//!
//! Nothing that a peer does in its handshake touches the host being served. When 16 handshakes are under way
//! the oldest is given up for the newest: a host needs milliseconds, who needs longer is none.

use std::collections::HashMap;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::dial::Opening;
use super::link::{self, Link, Sender, lock};
use super::{LinkError, Timing, described, refusal_text, tcp};
use crate::VERSIONS;
use crate::connection::Role;
use crate::error::{HandshakeError, Misbehaved};
use crate::handshake::{Established, FIRST_FLIGHT, Lookup, Purpose, WorkerHandshake};
use crate::keys::{Key, KeyId, KeyStore, PairingCode, PairingWindow, Peer};
use crate::message::{Farewell, Message};
use crate::terms::{self, Reason, Terms};

/// Handshakes under way at once, of all peers.
pub const MAX_HANDSHAKES: usize = 16;
/// Least time between two notices about one address.
const NOTICE_EVERY: Duration = Duration::from_secs(60);
/// Addresses remembered for that.
const NOTICED: usize = 1024;
/// How long a host may take to be gone after its own newer connection has come.
const REPLACING: Duration = Duration::from_secs(1);

/// Where a worker's keys are.
pub trait KeyRing: Send + Sync {
    /// The key with this id.
    fn find(&self, id: KeyId) -> Option<Key>;
    /// Keeps the key of a host that has just been paired, whose name is `name`.
    ///
    /// # Errors
    /// Why it could not be kept, for the user.
    fn add(&self, key: &Key, name: &str) -> Result<(), String>;
}

/// One key from a file, and no pairing.
impl KeyRing for Key {
    fn find(&self, id: KeyId) -> Option<Key> {
        (self.id() == id).then(|| self.clone())
    }

    fn add(&self, _: &Key, _: &str) -> Result<(), String> {
        Err("this worker was started with --key-file and keeps no other keys".to_owned())
    }
}

/// The user's own keys.
impl KeyRing for KeyStore {
    fn find(&self, id: KeyId) -> Option<Key> {
        KeyStore::find(self, id).ok().flatten()
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
    /// Is told what happens at the door, from any thread.
    pub notice: Box<dyn Fn(&Notice) + Send + Sync>,
}

/// Something that happened at the door.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Notice {
    /// A peer was not let in. At most one notice a minute for an address.
    #[error("refused {from}: {why}{}", more(.suppressed))]
    Refused {
        /// From where.
        from: IpAddr,
        /// What was wrong.
        why: String,
        /// How many more of that address went unmentioned since the last notice.
        suppressed: u32,
    },
    /// A host was told to wait, because another is being served.
    #[error("told {host} to wait: {serving} is being served")]
    Busy {
        /// Who came.
        host: String,
        /// Who is being served.
        serving: String,
    },
    /// A host has been paired.
    #[error("paired with {name} (key {key})")]
    Paired {
        /// What it calls itself.
        name: String,
        /// The new key's id.
        key: KeyId,
    },
    /// Pairing failed at the last step.
    #[error("could not pair with {name}: {why}")]
    NotPaired {
        /// What the host calls itself.
        name: String,
        /// Why.
        why: String,
    },
    /// The system gives no more connections for now.
    #[error("cannot accept connections: {0}")]
    Trouble(String),
}

fn more(suppressed: &u32) -> String {
    if *suppressed == 0 { String::new() } else { format!(" (and {suppressed} times more before)") }
}

/// A worker's open door. Dropping it closes the door and ends the link it gave away.
pub struct Listener {
    door: Arc<Door>,
    address: SocketAddr,
}

impl Listener {
    /// Listens at `address` (`host:port`, port 0 for any) and begins to answer.
    ///
    /// # Errors
    /// [`LinkError::Unreachable`] if the address cannot be had.
    pub fn bind(address: &str, config: ListenerConfig) -> Result<Listener, LinkError> {
        let unreachable = |e: std::io::Error| LinkError::Unreachable {
            address: address.to_owned(),
            text: match e.kind() {
                std::io::ErrorKind::AddrInUse => {
                    "another program listens there: choose another --listen".to_owned()
                }
                _ => e.to_string(),
            },
        };
        let socket: std::net::TcpListener = tcp::listen(address).map_err(unreachable)?.into();
        let local = socket.local_addr().map_err(unreachable)?;
        let door = Arc::new(Door {
            keys: config.keys,
            readiness: Mutex::new(config.readiness),
            timing: config.timing,
            notice: config.notice,
            begun: Instant::now(),
            pairing: Mutex::new(None),
            place: Mutex::new(Place::default()),
            place_changed: Condvar::new(),
            pending: Mutex::new(Vec::new()),
            threads: AtomicUsize::new(0),
            noticed: Mutex::new(HashMap::new()),
            next: AtomicU64::new(1),
            closed: AtomicBool::new(false),
        });
        let doorman = door.clone();
        let run = move || doorman.run(&socket);
        std::thread::Builder::new().name("dim-door".into()).spawn(run).map_err(unreachable)?;
        Ok(Listener { door, address: local })
    }

    /// Where it listens, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next host that is to be served; `None` after `timeout` or when the listener is closed. The next
    /// one comes only after this link's receiver has been dropped.
    pub fn accept(&self, timeout: Option<Duration>) -> Option<Link> {
        let deadline = timeout.map(|t| Instant::now() + t);
        let mut place = lock(&self.door.place);
        loop {
            if let Some(link) = place.waiting.take() {
                return Some(link);
            }
            if self.door.closed.load(Ordering::Acquire) {
                return None;
            }
            let left = match deadline {
                None => Duration::from_secs(3600),
                Some(d) => d.checked_duration_since(Instant::now()).filter(|l| !l.is_zero())?,
            };
            (place, _) =
                self.door.place_changed.wait_timeout(place, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What hosts are told from now on.
    pub fn set_readiness(&self, readiness: Readiness) {
        *lock(&self.door.readiness) = readiness;
    }

    /// Opens a pairing window, in place of one that may be open. The code is to be shown to the user.
    ///
    /// # Errors
    /// [`LinkError::Keys`] if the system has no random numbers.
    pub fn open_pairing(&self) -> Result<PairingCode, LinkError> {
        let code = PairingCode::random()?;
        *lock(&self.door.pairing) = Some(PairingWindow::open(&code, self.door.now_ms()));
        Ok(code)
    }

    /// Whether a code is good now.
    pub fn is_pairing(&self) -> bool {
        let now = self.door.now_ms();
        lock(&self.door.pairing).as_ref().is_some_and(|w| w.is_open(now))
    }

    /// Closes the door and says goodbye to the host being served.
    pub fn close(&self, why: Farewell) {
        if self.door.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let (unclaimed, served) = {
            let mut place = lock(&self.door.place);
            (place.waiting.take(), place.serving.as_ref().and_then(|s| s.link.clone()))
        };
        if let Some(sender) = served {
            sender.goodbye(why);
            sender.stop();
        }
        // frees its place, which needs the lock
        drop(unclaimed);
        for pending in lock(&self.door.pending).drain(..) {
            let _ = pending.stream.shutdown(Shutdown::Both);
        }
        self.door.place_changed.notify_all();
        // the door's thread sits in accept(): knock
        let mut knock = self.address;
        if knock.ip().is_unspecified() {
            knock.set_ip(match knock {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        let _ = TcpStream::connect_timeout(&knock, Duration::from_millis(200));
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

struct Door {
    keys: Arc<dyn KeyRing>,
    readiness: Mutex<Readiness>,
    timing: Timing,
    notice: Box<dyn Fn(&Notice) + Send + Sync>,
    begun: Instant,
    pairing: Mutex<Option<PairingWindow>>,
    place: Mutex<Place>,
    place_changed: Condvar,
    pending: Mutex<Vec<Pending>>,
    threads: AtomicUsize,
    noticed: Mutex<HashMap<IpAddr, (Instant, u32)>>,
    next: AtomicU64,
    closed: AtomicBool,
}

/// The one place in which a host is served.
#[derive(Default)]
struct Place {
    serving: Option<Serving>,
    /// has the place, and nobody has asked for it yet
    waiting: Option<Link>,
}

struct Serving {
    number: u64,
    host: String,
    key_id: KeyId,
    instance: u64,
    since: Instant,
    link: Option<Sender>,
}

/// Frees the place when the link's receiver is dropped.
struct Occupied {
    door: Arc<Door>,
    number: u64,
}

impl Drop for Occupied {
    fn drop(&mut self) {
        let mut place = lock(&self.door.place);
        if place.serving.as_ref().is_some_and(|s| s.number == self.number) {
            place.serving = None;
        }
        drop(place);
        self.door.place_changed.notify_all();
    }
}

/// A handshake under way.
struct Pending {
    number: u64,
    stream: TcpStream,
}

impl Door {
    fn now_ms(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64
    }

    fn run(self: &Arc<Door>, socket: &std::net::TcpListener) {
        while !self.closed.load(Ordering::Acquire) {
            match socket.accept() {
                Ok((stream, from)) => self.admit(stream, from),
                // out of descriptors, or a peer that was gone before we looked
                Err(e) => {
                    (self.notice)(&Notice::Trouble(e.to_string()));
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn admit(self: &Arc<Door>, stream: TcpStream, from: SocketAddr) {
        let begun = Instant::now();
        // handshakes that were given up are still there for a moment; newcomers wait in the system's queue
        while self.threads.load(Ordering::Acquire) >= 2 * MAX_HANDSHAKES
            && begun.elapsed() < self.timing.stranger
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        if self.closed.load(Ordering::Acquire) {
            return;
        }
        let Ok(handle) = stream.try_clone() else { return };
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        {
            let mut pending = lock(&self.pending);
            if pending.len() >= MAX_HANDSHAKES {
                let oldest = pending.remove(0);
                let _ = oldest.stream.shutdown(Shutdown::Both);
            }
            pending.push(Pending { number, stream: handle });
        }
        self.threads.fetch_add(1, Ordering::AcqRel);
        let door = self.clone();
        let receive = move || {
            let outcome = door.handshake(&stream, from, begun, number);
            door.forget(number);
            match outcome {
                Ok(Some(established)) => door.open(stream, from, begun, established),
                Ok(None) => {}
                Err(why) => door.refused(from.ip(), why),
            }
            door.threads.fetch_sub(1, Ordering::AcqRel);
        };
        if std::thread::Builder::new().name("dim-handshake".into()).spawn(receive).is_err() {
            self.forget(number);
            self.threads.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn forget(&self, number: u64) {
        lock(&self.pending).retain(|p| p.number != number);
    }

    /// Tells a stranger from a host. `Ok(None)`: the worker is closing. `Err`: what was wrong with the peer,
    /// which is gone.
    fn handshake(
        &self,
        stream: &TcpStream,
        from: SocketAddr,
        begun: Instant,
        number: u64,
    ) -> Result<Option<(Established, u64, u64)>, String> {
        let deadline = begun + self.timing.stranger;
        tcp::configure(stream, self.timing.stalled_write).map_err(|e| e.to_string())?;
        let mut handshake = WorkerHandshake::new(VERSIONS);
        let mut received = 0u64;
        let mut pairing_try = false;
        let verdict = loop {
            let mut buffer = [0; FIRST_FLIGHT];
            // never more than the handshake's own bytes: what follows belongs to the inbox
            let read = tcp::read_until(stream, &mut buffer[..handshake.wants()], deadline);
            let n = match read {
                Ok(n) if n > 0 => n,
                other => {
                    if pairing_try {
                        lock(&self.pairing).iter_mut().for_each(PairingWindow::refund);
                    }
                    let given_up = !lock(&self.pending).iter().any(|p| p.number == number);
                    return Err(match other {
                        _ if given_up => "it took too long while others were waiting".to_owned(),
                        Ok(_) => "it closed the connection in the handshake".to_owned(),
                        Err(e) if e.kind() == std::io::ErrorKind::TimedOut => {
                            "it took too long for the handshake".to_owned()
                        }
                        Err(e) => e.to_string(),
                    });
                }
            };
            received += n as u64;
            let mut input = &buffer[..n];
            let verdict = handshake.receive(&mut input, |purpose, id| {
                let lookup = self.look_up(purpose, id);
                pairing_try = purpose == Purpose::Pairing && matches!(lookup, Lookup::Found(_));
                lookup
            });
            if let Some(verdict) = verdict {
                break verdict;
            }
        };
        let sent = verdict.answer.len() as u64;
        if !verdict.answer.is_empty() {
            tcp::write_until(
                stream,
                &verdict.answer,
                deadline.max(Instant::now() + Duration::from_millis(200)),
            )
            .map_err(|e| e.to_string())?;
        }
        match verdict.outcome {
            Ok(established) => {
                if pairing_try {
                    lock(&self.pairing).iter_mut().for_each(PairingWindow::refund);
                }
                Ok(Some((established, sent, received)))
            }
            Err(error) => {
                if sent > 0 {
                    tcp::close_gently(stream);
                }
                let _ = stream.shutdown(Shutdown::Both);
                let _ = from;
                Err(match error {
                    HandshakeError::Key if pairing_try => "wrong pairing code".to_owned(),
                    HandshakeError::Key => "its key is not known here: pair it with this worker".to_owned(),
                    other => other.to_string(),
                })
            }
        }
    }

    fn look_up(&self, purpose: Purpose, id: KeyId) -> Lookup {
        match purpose {
            Purpose::Key => self.keys.find(id).map_or(Lookup::Unknown, Lookup::Found),
            Purpose::Pairing => {
                let now = self.now_ms();
                let key = lock(&self.pairing).as_mut().and_then(|w| w.begin_try(now));
                key.map_or(Lookup::NoPairing, Lookup::Found)
            }
        }
    }

    /// A peer that has the key: what does it want?
    fn open(
        self: &Arc<Door>,
        stream: TcpStream,
        from: SocketAddr,
        begun: Instant,
        (established, sent, received): (Established, u64, u64),
    ) {
        let (purpose, key_id) = (established.purpose, established.key_id);
        let bytes = (sent, received);
        let mut opening =
            Opening::new(stream, from.to_string(), Role::Worker, established, begun, &self.timing, bytes);
        let done = match purpose {
            Purpose::Pairing => self.hand_over_a_key(&mut opening),
            Purpose::Key => match self.hear(&mut opening) {
                Ok(Some(hello)) => {
                    self.seat(opening, key_id, hello);
                    return;
                }
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            },
        };
        if let Err(error) = done {
            // a host that only asked or that was refused has every right to leave
            if !matches!(error, LinkError::Goodbye { .. } | LinkError::Refused { .. }) {
                self.refused(from.ip(), error.to_string());
            }
        }
        tcp::close_gently(&opening.stream);
    }

    fn hear(&self, opening: &mut Opening) -> Result<Option<Terms>, LinkError> {
        loop {
            match opening.receive("say what it needs")? {
                Message::Inquire => {
                    let terms = lock(&self.readiness).terms(opening.version);
                    opening.send(&Message::Offer(terms))?;
                }
                Message::Hello(hello) => return Ok(Some(hello)),
                Message::PushOffer(_) => {
                    let terms = lock(&self.readiness).terms(opening.version);
                    let text = "this worker takes no files: give it its slice when you start it".to_owned();
                    opening.refuse(Reason::NoPush, terms, text);
                    return Ok(None);
                }
                other => {
                    let kind = other.kind() as u8;
                    return Err(opening.broke(Misbehaved::Unexpected { kind }.into()));
                }
            }
        }
    }

    fn hand_over_a_key(&self, opening: &mut Opening) -> Result<(), LinkError> {
        let Message::PairRequest { name, .. } = opening.receive("say who it is")? else {
            return Err(LinkError::Closed { peer: opening.peer.clone() });
        };
        let key = Key::random()?;
        let now = self.now_ms();
        if !lock(&self.pairing).as_mut().is_some_and(|w| w.use_up(now)) {
            return Err(HandshakeError::NoPairing.into());
        }
        if let Err(why) = self.keys.add(&key, &name) {
            (self.notice)(&Notice::NotPaired { name, why: why.clone() });
            return Err(LinkError::Keys(why));
        }
        let terms = lock(&self.readiness).terms(opening.version);
        opening.send(&Message::PairGrant {
            key: *key.bytes(),
            name: terms.name,
            software: terms.software,
        })?;
        let stored = opening.receive("store its key").map(|_| ());
        match &stored {
            Ok(()) => (self.notice)(&Notice::Paired { name, key: key.id() }),
            Err(e) => (self.notice)(&Notice::NotPaired { name, why: e.to_string() }),
        }
        stored
    }

    /// A host that wants to be served.
    fn seat(self: &Arc<Door>, mut opening: Opening, key_id: KeyId, hello: Terms) {
        let readiness = lock(&self.readiness).clone();
        let held = readiness.terms(opening.version);
        let host = described(&hello, &opening.peer);
        if let Readiness::NotReady(_, reason, text) = readiness {
            opening.refuse(reason, held, text);
            return;
        }
        let agreed = match terms::agree(&hello, &held) {
            Ok(agreed) if hello.version == opening.version => agreed,
            other => {
                let mismatches = other.err().unwrap_or_default();
                let reason = mismatches.first().map_or(Reason::Version, |m| m.reason);
                let text = refusal_text(&mismatches);
                self.refused_host(&opening, &host, &text);
                opening.refuse(reason, held, text);
                return;
            }
        };
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if let Err((serving, since)) = self.take_place(number, key_id, hello.instance, &host) {
            let name = serving.clone();
            let _ = opening.send(&Message::Busy { since_ms: since.as_millis() as u64, name });
            tcp::close_gently(&opening.stream);
            (self.notice)(&Notice::Busy { host, serving });
            return;
        }
        let occupied = Occupied { door: self.clone(), number };
        // from here on a heartbeat may be owed: the link is started right after the ACCEPT
        if opening.send(&Message::Accept(held)).is_err() {
            return;
        }
        let Ok(link) = link::start(opening.into_parts(host, agreed, hello), Some(Box::new(occupied))) else {
            return;
        };
        let mut place = lock(&self.place);
        if let Some(serving) = place.serving.as_mut().filter(|s| s.number == number) {
            serving.link = Some(link::stopper(&link));
        }
        let unclaimed = match self.closed.load(Ordering::Acquire) {
            true => Some(link),
            false => place.waiting.replace(link),
        };
        drop(place);
        // a link that nobody fetched frees the place again, which needs the lock
        drop(unclaimed);
        self.place_changed.notify_all();
    }

    /// Takes the place, or says who has it and for how long. A connection of the same host's process gives
    /// way.
    fn take_place(
        &self,
        number: u64,
        key_id: KeyId,
        instance: u64,
        host: &str,
    ) -> Result<(), (String, Duration)> {
        let mut place = lock(&self.place);
        let is_ghost = |s: &Serving| s.key_id == key_id && s.instance == instance && instance != 0;
        if let Some(ghost) = place.serving.as_ref().filter(|s| is_ghost(s)) {
            let old = ghost.link.clone();
            let unclaimed = place.waiting.take();
            drop(place);
            drop(unclaimed);
            if let Some(sender) = old {
                sender.goodbye(Farewell::Replaced);
                sender.stop();
            }
            let deadline = Instant::now() + REPLACING;
            place = lock(&self.place);
            while place.serving.is_some() {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                (place, _) =
                    self.place_changed.wait_timeout(place, left).unwrap_or_else(PoisonError::into_inner);
            }
        }
        if let Some(serving) = &place.serving {
            return Err((serving.host.clone(), serving.since.elapsed()));
        }
        let since = Instant::now();
        place.serving = Some(Serving { number, host: host.to_owned(), key_id, instance, since, link: None });
        Ok(())
    }

    fn refused_host(&self, opening: &Opening, host: &str, text: &str) {
        if let Ok(address) = opening.stream.peer_addr() {
            self.refused(address.ip(), format!("{host}: {text}"));
        }
    }

    /// At most one notice a minute for an address, and a bounded memory of addresses.
    fn refused(&self, from: IpAddr, why: String) {
        if self.closed.load(Ordering::Acquire) {
            return;
        }
        let now = Instant::now();
        let suppressed = {
            let mut noticed = lock(&self.noticed);
            match noticed.get_mut(&from) {
                Some((last, suppressed)) if now.duration_since(*last) < NOTICE_EVERY => {
                    *suppressed = suppressed.saturating_add(1);
                    return;
                }
                Some((last, suppressed)) => {
                    *last = now;
                    std::mem::take(suppressed)
                }
                None => {
                    if noticed.len() >= NOTICED {
                        noticed.retain(|_, (last, _)| now.duration_since(*last) < NOTICE_EVERY);
                    }
                    if noticed.len() >= NOTICED {
                        return;
                    }
                    noticed.insert(from, (now, 0));
                    0
                }
            }
        };
        (self.notice)(&Notice::Refused { from, why, suppressed });
    }
}
