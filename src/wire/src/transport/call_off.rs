//! A dial that another thread ends.

use std::io;
use std::net::Shutdown;
use std::sync::{Arc, Mutex};

use socket2::Socket;

use super::LinkError;
use super::line::lock;
use crate::link_error::LinkErrorKind;

/// Ends a dial from another thread, whether it is under way or yet to begin; clones end the same one. Whoever dials gets
/// [`LinkErrorKind::Stopped`] at once, but where the system is looking up a name (nothing ends that) and, on some systems,
/// where it waits for a machine that does not answer: that has the dial's own limit.
#[derive(Clone, Debug, Default)]
pub struct CallOff(Arc<Mutex<Dialled>>);

#[derive(Debug, Default)]
struct Dialled {
    is_off: bool,
    socket: Option<Socket>,
}

impl CallOff {
    /// Of a dial that goes on until [`call_off`](CallOff::call_off).
    pub fn new() -> CallOff {
        CallOff::default()
    }

    /// Ends it. Where it has come to its end already, nothing happens.
    pub fn call_off(&self) {
        let mut dialled = lock(&self.0);
        dialled.is_off = true;
        if let Some(socket) = dialled.socket.take() {
            // it wakes whoever waits for this socket: to be connected, to be read, to be written
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// The socket that is dialled with from now on.
    pub(super) fn watch(&self, socket: &Socket) -> io::Result<()> {
        let mut dialled = lock(&self.0);
        if dialled.is_off {
            return Err(io::ErrorKind::Interrupted.into());
        }
        dialled.socket = Some(socket.try_clone()?);
        Ok(())
    }

    /// What a dial came to: it is over, and its socket is somebody else's or nobody's.
    pub(super) fn ended<T>(&self, address: &str, result: Result<T, LinkError>) -> Result<T, LinkError> {
        let mut dialled = lock(&self.0);
        dialled.socket = None;
        match dialled.is_off {
            true => Err(LinkErrorKind::Stopped.with(address)),
            false => result,
        }
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
            while lock(&off.0).socket.is_none() && !dialling.is_finished() {
                std::thread::yield_now();
            }
            until();
            off.call_off();
            assert!(matches!(dialling.join().unwrap(), Err(LinkErrorKind::Stopped)));
        });
        assert!(lock(&off.0).socket.is_none());
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
    fn one_that_has_not_begun_does_not() {
        let off = CallOff::new();
        off.clone().call_off();
        let nobody = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        assert!(matches!(dial(nobody.local_addr().unwrap(), &off), Err(LinkErrorKind::Stopped)));
        nobody.set_nonblocking(true).unwrap();
        assert!(nobody.accept().is_err());
    }
}
