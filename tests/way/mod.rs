//! A way between host and worker that breaks at a byte, for tests/losses.rs.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::common::signal;

/// How it breaks.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Break {
    /// both ends see it closed
    Cut,
    /// both ends see it reset
    Reset,
    /// both ends see it closed, and for a while somebody else answers at the worker's address
    Impostor,
    /// the host sees no more, and is heard
    HalfClose,
    /// a bit of what the worker sends
    Flip,
    /// a bit of what the host sends next
    FlipBack,
    /// nothing moves until it is mended
    Stall,
    /// the process is killed
    Kill(u32),
    /// the process is stopped
    Stop(u32),
}

pub(crate) struct Way {
    address: SocketAddr,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    received: AtomicU64,
    plan: Mutex<Option<(u64, Break)>>,
    broken_at: Mutex<Option<Instant>>,
    is_broken: Condvar,
    flips_back: AtomicBool,
    stands_still: AtomicBool,
    /// how many dials somebody else is still to answer
    impostors: AtomicUsize,
    dialled: Mutex<Vec<Instant>>,
}

impl Way {
    pub(crate) fn to(worker: &str) -> Way {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, state) = (listener.local_addr().unwrap(), Arc::<State>::default());
        let (shared, worker) = (Arc::clone(&state), worker.to_owned());
        std::thread::spawn(move || {
            for host in listener.incoming().map_while(Result::ok) {
                shared.dialled.lock().unwrap().push(Instant::now());
                let left = shared.impostors.load(Ordering::SeqCst);
                if left > 0 {
                    shared.impostors.store(left - 1, Ordering::SeqCst);
                    std::thread::spawn(move || answer_as_another(host, left));
                    continue;
                }
                let Ok(worker) = TcpStream::connect(&worker) else { continue };
                let ends = Arc::new((host, worker));
                for end in [&ends.0, &ends.1] {
                    end.set_nodelay(true).unwrap();
                }
                for is_down in [true, false] {
                    let (ends, state) = (Arc::clone(&ends), Arc::clone(&shared));
                    std::thread::spawn(move || state.carry(&ends, is_down));
                }
            }
        });
        Way { address, state }
    }

    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    /// Breaks when so many bytes have come from the worker.
    pub(crate) fn arm(&self, at: u64, how: Break) {
        *self.state.plan.lock().unwrap() = Some((at, how));
    }

    /// Waits until it has broken, at most a minute; false if it did not.
    pub(crate) fn wait_until_broken(&self) -> bool {
        let broken_at = self.state.broken_at.lock().unwrap();
        let wait = |at: &mut Option<Instant>| at.is_none();
        let waited = self.state.is_broken.wait_timeout_while(broken_at, Duration::from_secs(60), wait);
        !waited.unwrap().1.timed_out()
    }

    pub(crate) fn broken_at(&self) -> Option<Instant> {
        *self.state.broken_at.lock().unwrap()
    }

    /// Lets everything through again.
    pub(crate) fn mend(&self) {
        self.state.stands_still.store(false, Ordering::SeqCst);
    }

    /// How often the host dialled in the worst second after `since`, until now.
    pub(crate) fn most_dials_in_a_second(&self, since: Instant) -> usize {
        let dialled = self.state.dialled.lock().unwrap();
        let after: Vec<Instant> = dialled.iter().copied().filter(|at| *at >= since).collect();
        let in_second = |from: &Instant| {
            after.iter().filter(|at| **at >= *from && **at - *from < Duration::from_secs(1)).count()
        };
        after.iter().map(in_second).max().unwrap_or(0)
    }
}

impl State {
    /// Copies one way: down is from the worker to the host.
    fn carry(&self, ends: &(TcpStream, TcpStream), is_down: bool) {
        let (mut from, mut to) = if is_down { (&ends.1, &ends.0) } else { (&ends.0, &ends.1) };
        let mut buffer = [0; 4096];
        while let Ok(n) = from.read(&mut buffer)
            && n > 0
        {
            if is_down && !self.came(&mut buffer[..n], ends) {
                return;
            }
            if !is_down && self.flips_back.swap(false, Ordering::SeqCst) {
                buffer[n / 2] ^= 0x10;
                self.broke(Instant::now());
            }
            while self.stands_still.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }

    /// Bytes have come from the worker: whether the connection goes on.
    fn came(&self, bytes: &mut [u8], ends: &(TcpStream, TcpStream)) -> bool {
        let received = self.received.fetch_add(bytes.len() as u64, Ordering::SeqCst) + bytes.len() as u64;
        let Some((_, how)) = self.plan.lock().unwrap().take_if(|(at, _)| received >= *at) else {
            return true;
        };
        if how == Break::FlipBack {
            self.flips_back.store(true, Ordering::SeqCst);
            return true;
        }
        let now = Instant::now();
        let goes_on = match how {
            Break::Cut | Break::Impostor => {
                if how == Break::Impostor {
                    self.impostors.store(IMPOSTORS, Ordering::SeqCst);
                }
                let _ = ends.0.shutdown(Shutdown::Both);
                let _ = ends.1.shutdown(Shutdown::Both);
                false
            }
            Break::Reset => {
                for end in [&ends.0, &ends.1] {
                    SockRef::from(end).set_linger(Some(Duration::ZERO)).unwrap();
                    // wakes the other direction: when both have gone the ends are closed, with a reset
                    let _ = end.shutdown(Shutdown::Read);
                }
                false
            }
            Break::HalfClose => {
                let _ = ends.0.shutdown(Shutdown::Write);
                false
            }
            Break::Flip => {
                bytes[bytes.len() / 2] ^= 0x10;
                true
            }
            Break::Stall => {
                self.stands_still.store(true, Ordering::SeqCst);
                true
            }
            Break::Kill(pid) => {
                signal(pid, "KILL");
                true
            }
            Break::Stop(pid) => {
                signal(pid, "STOP");
                // until then it was heard
                self.broke(Instant::now());
                return true;
            }
            Break::FlipBack => unreachable!(),
        };
        // a process that is to be killed has been, before anybody else may reap it
        self.broke(now);
        goes_on
    }

    fn broke(&self, at: Instant) {
        *self.broken_at.lock().unwrap() = Some(at);
        self.is_broken.notify_all();
    }
}

/// How many different ones there are.
const IMPOSTORS: usize = 5;

/// What somebody says who holds no key: a page of a network, a worker of another version, and each refusal that there is.
fn answer_as_another(mut host: TcpStream, which: usize) {
    const MAGIC: [u8; 8] = *b"\xD1DIM\r\n\x1a\n";
    let versions = |lowest: u16, highest: u16| [lowest.to_le_bytes(), highest.to_le_bytes()].concat();
    let greeting = |versions: &[u8]| [&MAGIC[..], versions, &[0; 4], &[7; 16]].concat();
    let spoken = versions(*dim_wire::VERSIONS.start(), *dim_wire::VERSIONS.end());
    let (greeting, status) = match which {
        1 => (b"HTTP/1.1 302 Found\r\nLocation: http://hotel.example/login\r\n\r\n".to_vec(), None),
        2 => (greeting(&versions(90, 99)), None),
        // KEY, NO_PAIRING, CROWDED
        n => (greeting(&spoken), Some(n as u8 - 1)),
    };
    let _ = host.write_all(&greeting);
    if let Some(status) = status {
        let mut flight = [0; dim_wire::handshake::FIRST_FLIGHT];
        let _ = host.read_exact(&mut flight);
        let _ = host.write_all(&[&MAGIC[..], &spoken, &[status, 0], &[0; 10]].concat());
    }
    let _ = host.shutdown(Shutdown::Write);
    let _ = host.read(&mut [0; 256]);
}
