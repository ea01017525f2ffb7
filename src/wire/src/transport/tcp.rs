//! TCP as the protocol wants it: options, and reads and writes that end at absolute times.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

use super::call_off::Dial;

/// How often a blocked read or write comes back to look at the time. It costs nothing while bytes flow.
pub(super) const TICK: Duration = Duration::from_millis(100);

/// How long to wait for a time that comes before the next tick; `None`: it doesn't.
pub(super) fn less_than_a_tick(until: Option<Instant>, now: Instant) -> Option<Duration> {
    let left = until?.saturating_duration_since(now);
    // no time at all would mean for ever, and less than this is rounded by the system
    (left < TICK).then(|| left.max(Duration::from_millis(1)))
}

/// Connects to the first of the address's numbers that answers, before `deadline`, unless it is called off.
pub(super) fn connect(address: &str, deadline: Instant, dial: &Dial<'_>) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for to in address.to_socket_addrs()? {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
        dial.watch(&socket)?;
        match socket.connect_timeout(&to.into(), left) {
            Ok(()) => return Ok(socket.into()),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Listens; an address with port 0 gets a free one.
pub(super) fn listen(address: &str) -> io::Result<Socket> {
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for at in address.to_socket_addrs()? {
        match listen_at(at) {
            Ok(socket) => return Ok(socket),
            Err(e) => last = e,
        }
    }
    Err(last)
}

fn listen_at(at: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    // a worker that was killed must be able to take its port again at once
    #[cfg(unix)]
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    // connections wait in the system's queue while the acceptor is kept busy by a crowd: one that finds no room there
    // is tried again after a second
    socket.listen(1024)?;
    Ok(socket)
}

/// Sets what a link needs; `stalled` is how long the peer's system may take no bytes. Options that a system
/// does not have are left out: the protocol's own heartbeats and deadlines do not depend on them, they only
/// make the system notice earlier.
///
/// Buffers are left to the system's own tuning: a fixed size would switch it off, and Linux caps a fixed size
/// at `net.core.rmem_max`, which is smaller than one prompt chunk.
pub(super) fn configure(stream: &TcpStream, stalled: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(1)).with_interval(Duration::from_secs(1));
    #[cfg(not(windows))]
    let keepalive = keepalive.with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    // not the silence of three seconds: a peer that computes with its buffers full takes no bytes for as
    // long, is heard all the same, and this would cut it off
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket.set_tcp_user_timeout(Some(stalled))?;
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    let _ = stalled;
    Ok(())
}

/// Makes blocked reads and writes come back every [`TICK`].
pub(super) fn tick(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(TICK))?;
    stream.set_write_timeout(Some(TICK))
}

/// Whether a read or write came back only to look at the time.
pub(super) fn is_tick(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

/// Writes what the system has room for, and never waits for more: how many bytes that were. An error that
/// [`is_tick`]: there is no room.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(super) fn write_now(stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    use rustix::net::{SendFlags, send};
    Ok(send(stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?)
}

/// The same where a single call cannot be told not to wait. A read that begins meanwhile comes back as if its tick were
/// over.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(super) fn write_now(stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    stream.set_nonblocking(true)?;
    let written = (&mut { stream }).write(bytes);
    stream.set_nonblocking(false)?;
    written
}

/// Reads what there is, waiting for it until `deadline` at the latest. 0: the peer has closed.
pub(super) fn read_until(stream: &TcpStream, buffer: &mut [u8], deadline: Instant) -> io::Result<usize> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match (&mut { stream }).read(buffer) {
            Err(e) if is_tick(&e) => continue,
            other => return other,
        }
    }
}

/// Writes all of it, by `deadline` at the latest.
pub(super) fn write_until(stream: &TcpStream, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_write_timeout(Some(left))?;
        match (&mut { stream }).write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(e) if is_tick(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Closes so that what was sent last arrives: a socket closed with bytes unread makes the system discard what
/// the peer has not read yet.
pub(super) fn close_gently(stream: &TcpStream) {
    let deadline = Instant::now() + Duration::from_millis(250);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut unread = [0; 1024];
    for _ in 0..64 {
        match read_until(stream, &mut unread, deadline) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
    }
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader looks up every tick; it looks up last when the silence is too long, whenever it began.
    #[test]
    fn looks_end_exactly_at_the_time_that_is_waited_for() {
        let begun = Instant::now();
        for (ms, after) in [(3_000, 0), (3_000, 1), (3_000, 2_950), (3_037, 0), (99, 0), (250, 49)] {
            let silent_at = begun + Duration::from_millis(ms);
            let mut now = begun + Duration::from_millis(after);
            while now < silent_at {
                let look = less_than_a_tick(Some(silent_at), now).unwrap_or(TICK);
                assert!(look <= TICK && !look.is_zero());
                now += look;
            }
            assert_eq!(now, silent_at, "{ms} ms, of which {after} were over");
        }
        // a time that is over is not waited for, and never for ever
        let late = less_than_a_tick(Some(begun), begun + TICK);
        assert_eq!(late, Some(Duration::from_millis(1)));
        assert_eq!(less_than_a_tick(None, begun), None);
    }
}
