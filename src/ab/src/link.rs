//! A network on one machine: a relay that passes bytes on as a link of a given delay, rate and jitter would, and
//! that can be cut or stalled. Any TCP peer can be put behind it, ours or another's, so that all are measured over
//! the same link.
//!
//! ```text
//! host -> [relay's port]  queue: rate, delay  -> worker        up
//! host <-                 queue: rate, delay  <- worker        down
//! ```
//!
//! The link is one in each direction, shared by all connections. What it does to bytes: they leave one after the
//! other at the link's rate, arrive half a round trip (plus jitter) later, and never overtake each other. A new
//! connection pays one round trip before its first byte, as a handshake would. What it does not do: lose single
//! packets, or slow start; TCP's answer to loss is a stall or a cut, and those it can do.
//!
//! When bytes arrive is computed by [`Lane`], which knows no clock and no socket.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::stats::Seeded;

/// What a link is like.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkOptions {
    /// Round trip of an empty message, in milliseconds.
    pub rtt_ms: f64,
    /// Megabit a second, each way; `None`: as fast as this machine.
    pub rate_mbit_per_s: Option<f64>,
    /// Up to this much is added to every one-way delay, evenly spread, in milliseconds.
    #[serde(default)]
    pub jitter_ms: f64,
    /// Cuts every connection after a number of bytes (both ways together) drawn from this range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_after_bytes: Option<(u64, u64)>,
    /// The same seed draws the same jitter and the same cuts.
    #[serde(default)]
    pub seed: u64,
}

impl Default for LinkOptions {
    /// A wire without length or limit.
    fn default() -> LinkOptions {
        LinkOptions { rtt_ms: 0.0, rate_mbit_per_s: None, jitter_ms: 0.0, cut_after_bytes: None, seed: 1 }
    }
}

impl std::str::FromStr for LinkOptions {
    type Err = String;

    /// `RTT_MS`, `RTT_MS:MBIT` or `RTT_MS:MBIT:JITTER_MS`; `MBIT` may be `inf`.
    fn from_str(text: &str) -> Result<LinkOptions, String> {
        let parts: Vec<&str> = text.split(':').collect();
        if parts.len() > 3 {
            return Err(format!("{text}: RTT_MS:MBIT:JITTER_MS has three parts, as in 5:200:0.5"));
        }
        let number = |i: usize, what: &str| -> Result<f64, String> {
            let Some(part) = parts.get(i) else { return Ok(0.0) };
            match part.parse::<f64>() {
                Ok(n) if n.is_finite() && (0.0..=1e6).contains(&n) => Ok(n),
                _ => Err(format!("{part}: {what} must be a number from 0 to 1000000, as in 5:200:0.5")),
            }
        };
        let rate_mbit_per_s = match parts.get(1) {
            None | Some(&"inf") => None,
            Some(_) => match number(1, "the rate in Mbit/s")? {
                0.0 => return Err(format!("{text}: nothing gets through at 0 Mbit/s; `inf` is no limit")),
                rate => Some(rate),
            },
        };
        Ok(LinkOptions {
            rtt_ms: number(0, "the round trip in ms")?,
            rate_mbit_per_s,
            jitter_ms: number(2, "the jitter in ms")?,
            ..LinkOptions::default()
        })
    }
}

impl std::fmt::Display for LinkOptions {
    /// `5 ms, 200 Mbit/s`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ms", self.rtt_ms)?;
        if self.jitter_ms > 0.0 {
            write!(f, " +{} ms", self.jitter_ms)?;
        }
        match self.rate_mbit_per_s {
            Some(rate) => write!(f, ", {rate} Mbit/s"),
            None => write!(f, ", no rate limit"),
        }
    }
}

impl LinkOptions {
    fn rtt(&self) -> Duration {
        Duration::from_secs_f64(self.rtt_ms / 1e3)
    }
}

/// One direction of a link: when bytes that reach it come out. All times are what the caller says they are.
#[derive(Debug)]
pub struct Lane {
    one_way: Duration,
    jitter: Duration,
    ns_per_byte: f64,
    rng: Seeded,
    free_at: Option<Instant>,
}

impl Lane {
    /// The lane `number` (0: up, 1: down) of such a link.
    pub fn new(options: &LinkOptions, number: u64) -> Lane {
        Lane {
            one_way: options.rtt() / 2,
            jitter: Duration::from_secs_f64(options.jitter_ms / 1e3),
            ns_per_byte: options.rate_mbit_per_s.map_or(0.0, |mbit| 8e3 / mbit),
            rng: Seeded::new(options.seed.wrapping_mul(2).wrapping_add(number)),
            free_at: None,
        }
    }

    /// When the last of `bytes` that are ready at `now` arrives.
    pub fn arrival(&mut self, now: Instant, bytes: usize) -> Instant {
        let start = self.free_at.map_or(now, |free| free.max(now));
        let sent = start + Duration::from_nanos((bytes as f64 * self.ns_per_byte) as u64);
        self.free_at = Some(sent);
        sent + self.one_way + self.jitter.mul_f64(self.rng.unit())
    }
}

/// A running relay. Dropping it cuts every connection and frees the port.
#[derive(Debug)]
pub struct Link {
    addr: SocketAddr,
    shared: Arc<Shared>,
}

/// What went through a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkTraffic {
    /// Bytes from those who dialled.
    pub bytes_up: u64,
    /// Bytes to those who dialled.
    pub bytes_down: u64,
    /// Connections so far.
    pub connections: u64,
}

impl LinkTraffic {
    /// What went through both.
    pub fn plus(self, other: LinkTraffic) -> LinkTraffic {
        LinkTraffic {
            bytes_up: self.bytes_up + other.bytes_up,
            bytes_down: self.bytes_down + other.bytes_down,
            connections: self.connections + other.connections,
        }
    }

    /// What went through since `then`, an earlier reading of the same links.
    pub fn since(self, then: LinkTraffic) -> LinkTraffic {
        LinkTraffic {
            bytes_up: self.bytes_up - then.bytes_up,
            bytes_down: self.bytes_down - then.bytes_down,
            connections: self.connections - then.connections,
        }
    }
}

impl Link {
    /// Listens on a free port of this machine's loopback and passes connections on to `to` (`host:port`, looked up
    /// at each connection).
    pub fn start(to: &str, options: LinkOptions) -> io::Result<Link> {
        Link::start_on("127.0.0.1:0", to, options)
    }

    /// The same, listening on `listen`.
    pub fn start_on(listen: &str, to: &str, options: LinkOptions) -> io::Result<Link> {
        let listener = TcpListener::bind(listen)?;
        let addr = listener.local_addr()?;
        let shared = Arc::new(Shared {
            options,
            lanes: [Mutex::new(Lane::new(&options, 0)), Mutex::new(Lane::new(&options, 1))],
            bytes: [AtomicU64::new(0), AtomicU64::new(0)],
            connections: AtomicU64::new(0),
            live: Mutex::new(Vec::new()),
            stalled: (Mutex::new(false), Condvar::new()),
            closed: AtomicBool::new(false),
        });
        let (to, of_thread) = (to.to_owned(), Arc::clone(&shared));
        std::thread::Builder::new()
            .name("link".into())
            .spawn(move || listen_on(&listener, &to, &of_thread))?;
        Ok(Link { addr, shared })
    }

    /// Where to dial instead of the peer itself.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What went through so far.
    pub fn traffic(&self) -> LinkTraffic {
        LinkTraffic {
            bytes_up: self.shared.bytes[0].load(Ordering::Relaxed),
            bytes_down: self.shared.bytes[1].load(Ordering::Relaxed),
            connections: self.shared.connections.load(Ordering::Relaxed),
        }
    }

    /// Cuts all connections there are now: both ends see a reset. New ones are taken.
    pub fn cut(&self) {
        for connection in lock(&self.shared.live).drain(..) {
            connection.cut();
        }
    }

    /// While stalled, bytes go in and none come out: a half-open connection, a cable pulled.
    pub fn stall(&self, stalled: bool) {
        *lock(&self.shared.stalled.0) = stalled;
        self.shared.stalled.1.notify_all();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        self.stall(false);
        self.cut();
        // wakes the listener, which sees that it is closed
        let _ = TcpStream::connect_timeout(&self.addr, Duration::from_secs(1));
    }
}

#[derive(Debug)]
struct Shared {
    options: LinkOptions,
    lanes: [Mutex<Lane>; 2],
    bytes: [AtomicU64; 2],
    connections: AtomicU64,
    live: Mutex<Vec<Arc<Connection>>>,
    stalled: (Mutex<bool>, Condvar),
    closed: AtomicBool,
}

#[derive(Debug)]
struct Connection {
    near: TcpStream,
    far: TcpStream,
    opened: Instant,
    /// bytes until it is cut; `u64::MAX`: never
    left: AtomicU64,
    cut: AtomicBool,
}

impl Connection {
    /// A reset at both ends, now.
    fn cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
        for stream in [&self.near, &self.far] {
            // linger 0: close() sends a reset instead of a polite end
            let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn listen_on(listener: &TcpListener, to: &str, shared: &Arc<Shared>) {
    let mut rng = Seeded::new(shared.options.seed ^ 0x5eed_c075);
    for near in listener.incoming() {
        if shared.closed.load(Ordering::SeqCst) {
            return;
        }
        let Ok(near) = near else { continue };
        // a peer that is not there: the one who dialled is hung up on, as by a port nobody listens on
        let Ok(far) = dial(to) else { continue };
        let _ = (near.set_nodelay(true), far.set_nodelay(true));
        let left = match shared.options.cut_after_bytes {
            None => u64::MAX,
            Some((least, most)) => least + rng.below(most.saturating_sub(least) + 1),
        };
        let connection = Arc::new(Connection {
            near,
            far,
            opened: Instant::now(),
            left: AtomicU64::new(left),
            cut: AtomicBool::new(false),
        });
        shared.connections.fetch_add(1, Ordering::Relaxed);
        {
            let mut live = lock(&shared.live);
            live.retain(|c| Arc::strong_count(c) > 1);
            live.push(Arc::clone(&connection));
        }
        for direction in [0, 1] {
            let queue = Arc::new(Queue::default());
            let (c, s, q) = (Arc::clone(&connection), Arc::clone(shared), Arc::clone(&queue));
            std::thread::spawn(move || take_in(&c, direction, &s, &q));
            let (c, s) = (Arc::clone(&connection), Arc::clone(shared));
            std::thread::spawn(move || give_out(&c, direction, &s, &queue));
        }
    }
}

fn dial(to: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{to}: no such address"));
    for addr in to.to_socket_addrs()? {
        match TcpStream::connect_timeout(&addr, Duration::from_secs(10)) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// What is on the link: bytes and when they arrive.
#[derive(Debug, Default)]
struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct QueueState {
    flights: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    /// no more will come in
    ended: bool,
    /// no more will go out
    dead: bool,
}

/// Reads from one end and puts it on the link.
fn take_in(connection: &Connection, direction: usize, shared: &Shared, queue: &Queue) {
    let mut from = if direction == 0 { &connection.near } else { &connection.far };
    let mut last_arrival = connection.opened;
    let mut chunk = [0u8; CHUNK_BYTES];
    loop {
        let n = match from.read(&mut chunk) {
            Ok(0) | Err(_) => break,
            Ok(n) => n,
        };
        shared.bytes[direction].fetch_add(n as u64, Ordering::Relaxed);
        if !spend(&connection.left, n as u64) {
            connection.cut();
            break;
        }
        // the connection's own handshake takes a round trip
        let ready = Instant::now().max(connection.opened + shared.options.rtt());
        let arrival = lock(&shared.lanes[direction]).arrival(ready, n).max(last_arrival);
        last_arrival = arrival;
        let mut state = lock(&queue.state);
        while state.bytes > QUEUE_BYTES && !state.dead {
            state = wait(&queue.changed, state);
        }
        if state.dead {
            return;
        }
        state.bytes += n;
        state.flights.push_back((arrival, chunk[..n].to_vec()));
        queue.changed.notify_all();
    }
    lock(&queue.state).ended = true;
    queue.changed.notify_all();
}

/// Takes what has arrived from the link and writes it to the other end.
fn give_out(connection: &Connection, direction: usize, shared: &Shared, queue: &Queue) {
    let mut to = if direction == 0 { &connection.far } else { &connection.near };
    let mut timer = Timer::default();
    loop {
        let (arrival, bytes) = {
            let mut state = lock(&queue.state);
            loop {
                if let Some(flight) = state.flights.pop_front() {
                    state.bytes -= flight.1.len();
                    break flight;
                }
                if state.ended {
                    // an end of the stream, or a cut: the peer sees the one or the other
                    if !connection.cut.load(Ordering::SeqCst) {
                        let _ = to.shutdown(Shutdown::Write);
                    }
                    return;
                }
                state = wait(&queue.changed, state);
            }
        };
        queue.changed.notify_all();
        timer.sleep_until(arrival);
        let mut stalled = lock(&shared.stalled.0);
        while *stalled && !connection.cut.load(Ordering::SeqCst) {
            // woken now and then, to notice a cut
            stalled = shared
                .stalled
                .1
                .wait_timeout(stalled, Duration::from_millis(50))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        drop(stalled);
        if to.write_all(&bytes).is_err() {
            lock(&queue.state).dead = true;
            queue.changed.notify_all();
            // the other direction is of no use any more either
            connection.cut();
            return;
        }
    }
}

/// Takes `n` of what is left; false when there is not as much.
fn spend(left: &AtomicU64, n: u64) -> bool {
    left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| match left {
        u64::MAX => Some(u64::MAX),
        left => left.checked_sub(n),
    })
    .is_ok()
}

/// Sleeps to the point and never short of it: the kernel wakes late, by an amount that changes little, so a timer that
/// has seen it asks to be woken that much earlier, and yields for what is then left (tens of microseconds).
#[derive(Default)]
struct Timer {
    lateness: Duration,
}

impl Timer {
    fn sleep_until(&mut self, at: Instant) {
        let start = Instant::now();
        let ask = at.saturating_duration_since(start).saturating_sub(self.lateness);
        if !ask.is_zero() {
            std::thread::sleep(ask);
            let late = start.elapsed().saturating_sub(ask).min(LONGEST_LATENESS);
            self.lateness = (self.lateness * 7 + late) / 8;
        }
        while Instant::now() < at {
            std::thread::yield_now();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// How much is read at once; at 200 Mbit/s it takes 0.7 ms to send.
const CHUNK_BYTES: usize = 16 << 10;
/// How much may be under way in one direction of a connection before the sender has to wait.
const QUEUE_BYTES: usize = 4 << 20;
/// A wake-up later than this was a busy machine, and nothing to learn from.
const LONGEST_LATENESS: Duration = Duration::from_micros(200);

#[cfg(test)]
mod tests;
