//! Dials, and pauses between them, that another thread ends.

use std::io;
use std::net::Shutdown;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use socket2::Socket;

use super::LinkError;
use super::line::lock;
use crate::link_error::LinkErrorKind;

/// Ends dials from another thread, those that are under way and those yet to begin; clones end the same ones. Whoever dials
/// gets [`LinkErrorKind::Stopped`] at once, but where the system is looking up a name (nothing ends that) and, on some
/// systems, where it waits for a machine that does not answer: that has the dial's own limit.
#[derive(Clone, Debug, Default)]
pub struct CallOff(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// it is off
    called: Condvar,
}

#[derive(Debug, Default)]
struct State {
    is_off: bool,
    n_dials: u64,
    /// of each dial that is under way and has one, by the dial's number
    sockets: Vec<(u64, Socket)>,
}

impl CallOff {
    /// Of dials that go on until [`call_off`](CallOff::call_off).
    pub fn new() -> CallOff {
        CallOff::default()
    }

    /// Ends them. Those that have come to their end already stay as they are.
    pub fn call_off(&self) {
        let mut state = self.lock();
        state.is_off = true;
        for (_, socket) in state.sockets.drain(..) {
            // it wakes whoever waits for this socket: to be connected, to be read, to be written
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.0.called.notify_all();
    }

    /// Whether they are ended.
    pub fn is_called_off(&self) -> bool {
        self.lock().is_off
    }

    /// Waits for `pause`, or until they are ended: whether they are.
    pub fn sleep(&self, pause: Duration) -> bool {
        let mut state = self.lock();
        // a pause beyond all times has no end
        let until = Instant::now().checked_add(pause);
        while !state.is_off {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            state = match left {
                Some(Duration::ZERO) => return false,
                Some(left) => {
                    self.0.called.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.0.called.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
        true
    }

    /// One more dial, to `address`: what `run` comes to, unless it is called off.
    pub(super) fn dial<T>(
        &self,
        address: &str,
        run: impl FnOnce(&Dial<'_>) -> Result<T, LinkError>,
    ) -> Result<T, LinkError> {
        let number = {
            let mut state = self.lock();
            state.n_dials += 1;
            state.n_dials
        };
        let dialled = run(&Dial { off: self, number });
        match self.is_called_off() {
            true => Err(LinkErrorKind::Stopped.with(address)),
            false => dialled,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0.state)
    }
}

/// A dial that may be called off. Once it is over, its socket is somebody else's or nobody's.
pub(super) struct Dial<'a> {
    off: &'a CallOff,
    number: u64,
}

impl Dial<'_> {
    /// The socket that is dialled with from now on.
    pub(super) fn watch(&self, socket: &Socket) -> io::Result<()> {
        let socket = socket.try_clone()?;
        let mut state = self.off.lock();
        if state.is_off {
            return Err(io::ErrorKind::Interrupted.into());
        }
        state.sockets.retain(|(dial, _)| *dial != self.number);
        state.sockets.push((self.number, socket));
        Ok(())
    }
}

impl Drop for Dial<'_> {
    fn drop(&mut self) {
        self.off.lock().sockets.retain(|(dial, _)| *dial != self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};
    use std::time::Duration;

    use socket2::{Domain, Type};

    use super::*;
    use crate::keys::Key;
    use crate::terms::Terms;
    use crate::transport::{Timing, dial_unless};

    /// Nothing but a call ends a dial with these.
    fn patient() -> Timing {
        let long = Duration::from_secs(3600);
        Timing { opening: long, stalled_write: long, ..Timing::default() }
    }

    fn dial(address: SocketAddr, off: &CallOff) -> Result<(), LinkErrorKind> {
        let (key, need) = (Key::from_bytes([7; 32]), Terms::blank(0, "", ""));
        let dialled = dial_unless(off, &address.to_string(), &key, &need, &patient());
        dialled.map(drop).map_err(|error| error.kind)
    }

    /// Calls a dial to `address` off once it has a socket.
    fn called_off_under_way(address: SocketAddr, until: impl FnOnce()) {
        let off = CallOff::new();
        std::thread::scope(|scope| {
            let dialling = scope.spawn(|| dial(address, &off));
            while off.lock().sockets.is_empty() && !dialling.is_finished() {
                std::thread::yield_now();
            }
            until();
            off.call_off();
            assert!(matches!(dialling.join().unwrap(), Err(LinkErrorKind::Stopped)));
        });
        assert!(off.lock().sockets.is_empty());
    }

    #[test]
    fn one_that_waits_for_a_silent_peer_ends_and_so_does_the_connection() {
        let silent = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut peer = None;
        called_off_under_way(silent.local_addr().unwrap(), || peer = Some(silent.accept().unwrap().0));
        std::io::copy(&mut peer.unwrap(), &mut std::io::sink()).unwrap();
    }

    /// Nobody accepts, and the queue is full: Linux leaves who comes then without an answer.
    #[cfg(target_os = "linux")]
    #[test]
    fn one_that_waits_for_a_machine_that_does_not_answer_ends() {
        let full = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        full.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        full.listen(0).unwrap();
        let address = full.local_addr().unwrap();
        let mut queued = Vec::new();
        loop {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            match socket.connect_timeout(&address, Duration::from_millis(200)) {
                Ok(()) => queued.push(socket),
                Err(_) => break,
            }
        }
        called_off_under_way(address.as_socket().unwrap(), || {});
    }

    #[test]
    fn all_that_are_under_way_end_and_so_does_who_waits_to_dial_again() {
        let silent = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (address, off) = (silent.local_addr().unwrap(), CallOff::new());
        std::thread::scope(|scope| {
            let dials: Vec<_> = (0..3).map(|_| scope.spawn(|| dial(address, &off))).collect();
            let pause = scope.spawn(|| off.sleep(Duration::MAX));
            let _peers: Vec<_> = (0..3).map(|_| silent.accept().unwrap()).collect();
            while off.lock().sockets.len() < 3 {
                std::thread::yield_now();
            }
            off.call_off();
            for dial in dials {
                assert!(matches!(dial.join().unwrap(), Err(LinkErrorKind::Stopped)));
            }
            assert!(pause.join().unwrap() && off.sleep(Duration::MAX) && off.is_called_off());
        });
        assert!(!CallOff::new().sleep(Duration::from_millis(1)));
    }

    #[test]
    fn one_that_has_not_begun_does_not() {
        let off = CallOff::new();
        off.clone().call_off();
        let nobody = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        assert!(matches!(dial(nobody.local_addr().unwrap(), &off), Err(LinkErrorKind::Stopped)));
        nobody.set_nonblocking(true).unwrap();
        assert!(nobody.accept().is_err());
    }
}
