//! Crowds of strangers, for tests/strangers.rs, and the Swift worker that they stand before.

use std::collections::VecDeque;
use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use dim_wire::handshake::{GREETING, HostHandshake, Purpose};
use dim_wire::keys::Key;
use dim_wire::message::Span;
use dim_wire::rows::{RowTypes, RowsRef, Shape};
use dim_wire::terms::{SliceRole, Terms};
use dim_wire::transport::{Event, Link, Timing, dial};
use half::f16;
use socket2::{Domain, Socket, Type};

/// Who else is at the door.
pub(crate) enum Crowd {
    /// so many that connect before each try and say nothing
    Silent(usize),
    /// so many that connect before each try and send what somebody has overheard
    Replays(usize),
    /// so many a second, from so many addresses, all of them silent, the latest 256 kept open
    Rate { per_s: u32, addresses: u8 },
}

impl Crowd {
    /// Every crowd of the table.
    pub(crate) fn all() -> Vec<Crowd> {
        let silent = [16, 100, 1000].map(Crowd::Silent).into_iter();
        let replays = [100, 1000].map(Crowd::Replays);
        let rate = |addresses| [500, 2000, 6000].map(|per_s| Crowd::Rate { per_s, addresses });
        silent.chain(replays).chain(rate(1)).chain(rate(8)).collect()
    }

    /// The part of it that stands there before a try, until it is dropped.
    pub(crate) fn gather(&self, address: &str) -> Vec<Socket> {
        let to: SocketAddr = address.parse().unwrap();
        match self {
            Crowd::Silent(n) => (0..*n).map(|_| connect(to, 0)).collect(),
            Crowd::Replays(n) => {
                let overheard = overheard(to);
                let replay = |_| {
                    let socket = connect(to, 0);
                    let _ = socket.send(&overheard);
                    socket
                };
                (0..*n).map(replay).collect()
            }
            Crowd::Rate { .. } => Vec::new(),
        }
    }

    /// The part of it that comes all the time.
    pub(crate) fn begin(&self, address: &str) -> Flood {
        let to = address.parse().unwrap();
        let (over, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let threads = match *self {
            Crowd::Rate { per_s, addresses } => {
                let (over, count) = (Arc::clone(&over), Arc::clone(&count));
                vec![std::thread::spawn(move || pour(to, per_s, addresses, &over, &count))]
            }
            _ => Vec::new(),
        };
        Flood { over, count, begun: Instant::now(), threads }
    }
}

impl fmt::Display for Crowd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Crowd::Silent(n) => write!(f, "{n} silent"),
            Crowd::Replays(n) => write!(f, "{n} replays"),
            Crowd::Rate { per_s, addresses: 1 } => write!(f, "{per_s} a second, one address"),
            Crowd::Rate { per_s, addresses } => write!(f, "{per_s} a second, {addresses} addresses"),
        }
    }
}

/// Connections that come all the time.
pub(crate) struct Flood {
    over: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    begun: Instant,
    threads: Vec<JoinHandle<()>>,
}

impl Flood {
    /// Ends it: how many came a second.
    pub(crate) fn end(self) -> f64 {
        let per_s = self.count.load(Ordering::Relaxed) as f64 / self.begun.elapsed().as_secs_f64();
        self.over.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        per_s
    }
}

fn pour(to: SocketAddr, per_s: u32, addresses: u8, over: &AtomicBool, count: &AtomicU64) {
    let begun = Instant::now();
    let mut open = VecDeque::new();
    for n in 0u32.. {
        if over.load(Ordering::Relaxed) {
            return;
        }
        // one that is behind does not catch up in bursts of more than a hundredth of a second
        let due = Duration::from_secs_f64(f64::from(n) / f64::from(per_s));
        if let Some(early) = due.checked_sub(begun.elapsed()).filter(|early| early.as_millis() >= 1) {
            std::thread::sleep(early);
        }
        open.push_back(connect(to, (n % u32::from(addresses)) as u8));
        if open.len() > 256 {
            open.pop_front();
        }
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// A connection from 127.0.0.2 or one behind it, under way. Its end is a reset, so that no port stays taken.
fn connect(to: SocketAddr, address: u8) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    socket.bind(&SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2 + address), 0)).into()).unwrap();
    socket.set_nonblocking(true).unwrap();
    let _ = socket.connect(&to.into());
    socket
}

/// The first flight of some host.
fn overheard(to: SocketAddr) -> Vec<u8> {
    let (mut greeting, mut flight) = ([0; GREETING], Vec::new());
    let mut peer = std::net::TcpStream::connect(to).unwrap();
    peer.read_exact(&mut greeting).unwrap();
    let mut host = HostHandshake::new(&Key::from_bytes([0x5a; 32]), Purpose::Key, dim_wire::VERSIONS);
    host.receive(&mut &greeting[..], &mut flight).unwrap();
    flight
}

/// A dim-worker-swift that evaluates with exact integers in place of a model.
pub(crate) struct Swift {
    child: Child,
    pub address: String,
    _folder: tempfile::TempDir,
}

const N_EMBD: usize = 64;

impl Swift {
    /// `words`: the command that starts it.
    pub(crate) fn start(words: &str, key: &Key) -> Swift {
        let folder = tempfile::tempdir().unwrap();
        let key_file = folder.path().join("key");
        std::fs::write(&key_file, format!("{}\n", key.to_hex())).unwrap();
        let words: Vec<&str> = words.split_whitespace().collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).args(["--fake", "blocks=11..12,of=28,n_embd=64"]);
        command.arg("--key-file").arg(key_file).args(["--listen", "127.0.0.1:0"]).stderr(Stdio::null());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address =
            line.trim().strip_prefix("listening on ").unwrap_or_else(|| panic!("{line:?}")).to_owned();
        Swift { child, address, _folder: folder }
    }
}

impl Drop for Swift {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A session of 200 steps with that worker, again and again.
pub(crate) struct SwiftReply {
    link: Link,
    expected: Vec<Vec<f16>>,
}

impl SwiftReply {
    pub(crate) fn new(address: &str, key: &Key) -> SwiftReply {
        let digest = |text: &str| Some(Sha::of(text.as_bytes()));
        let terms = Terms {
            row_types: RowTypes::F16,
            role: SliceRole::Middle,
            instance: 7,
            shape: Shape::hidden(N_EMBD as u32),
            n_blocks: 28,
            blocks: BlockRange { first: 11, last: 12 },
            n_ctx: 2048,
            max_rows: 128,
            max_sessions: 1,
            max_in_flight: 4,
            model: digest("dim fake model"),
            slice: digest("dim fake slice"),
            arch: "fake".into(),
            ..Terms::blank(2, "strangers", "a desk")
        };
        let link = dial(address, key, &terms, &Timing::default()).unwrap();
        let mut reply = SwiftReply { link, expected: Vec::new() };
        reply.expected = reply.steps();
        reply
    }

    /// Whether it is the same as before.
    pub(crate) fn again(&mut self) -> bool {
        self.link.sender().rewind(0, 0).unwrap();
        self.steps() == self.expected
    }

    fn steps(&mut self) -> Vec<Vec<f16>> {
        let step = |position: u32| {
            let row: Vec<f16> = (0..N_EMBD)
                .map(|i| f16::from_bits(0x3000 + ((i as u32 * 37 + position * 101) % 4096) as u16))
                .collect();
            self.link.send_step(&[Span { session: 0, position, count: 1 }], &[], (&row[..]).into()).unwrap();
            match self.link.receive(Some(Instant::now() + Duration::from_secs(10))) {
                Ok(Event::Done { rows: RowsRef::F16(values), .. }) => values.to_vec(),
                other => panic!("{other:?}"),
            }
        };
        (0..200).map(step).collect()
    }
}
