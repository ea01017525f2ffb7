//! A connection on which nothing has been agreed yet, of either side: one thread reads, writes, and waits for the
//! endpoint's deadline.

use std::io::ErrorKind;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::{LinkError, tcp};
use crate::endpoint::Endpoint;
use crate::frame::Store;
use crate::link_error::LinkErrorKind;
use crate::message::Message;
use crate::terms::Terms;

/// How long a message may take to be written once its deadline has passed: last words.
const LAST_WORDS: Duration = Duration::from_millis(200);

pub(super) struct Opening {
    pub stream: TcpStream,
    pub endpoint: Endpoint,
    address: String,
    current: Store,
}

impl Opening {
    pub(super) fn new(stream: TcpStream, address: String, endpoint: Endpoint) -> Opening {
        Opening { stream, endpoint, address, current: Store::default() }
    }

    /// The peer's name, as far as it is known, and its address.
    pub(super) fn peer(&self) -> String {
        described(self.endpoint.peer_terms(), &self.address)
    }

    /// Reads until the peer has said something.
    ///
    /// # Errors
    /// Why the connection is over. The peer has been told, if it is to be.
    pub(super) fn next(&mut self) -> Result<Message<'_>, LinkError> {
        self.flush()?;
        while !self.endpoint.has_event() {
            self.read();
            self.flush()?;
        }
        let Opening { stream, endpoint, address, current } = self;
        match endpoint.poll_event(current, Instant::now()) {
            Ok(Some(received)) => Ok(received.message),
            Ok(None) => Err(LinkErrorKind::Stopped.with(address)),
            Err(kind) => {
                if endpoint.has_said_last() {
                    let _ = flush(stream, endpoint);
                    tcp::close_gently(stream);
                }
                Err(kind.with(&described(endpoint.peer_terms(), address)))
            }
        }
    }

    /// Sends what there is to be sent.
    pub(super) fn flush(&mut self) -> Result<(), LinkError> {
        flush(&self.stream, &mut self.endpoint).map_err(|kind| kind.with(&self.peer()))
    }

    /// Sends what there is to be sent, and closes so that it arrives.
    pub(super) fn close(mut self) {
        let _ = self.flush();
        tcp::close_gently(&self.stream);
    }

    fn read(&mut self) {
        let deadline = self.endpoint.poll_timeout().unwrap_or_else(|| Instant::now() + LAST_WORDS);
        match tcp::read_until(&self.stream, self.endpoint.space(), deadline) {
            Ok(0) => self.endpoint.closed(),
            Ok(n) => self.endpoint.received(n, Instant::now()),
            Err(e) if e.kind() == ErrorKind::TimedOut => self.endpoint.handle_timeout(Instant::now()),
            Err(e) => self.endpoint.broken(LinkErrorKind::broken(&e)),
        }
    }
}

fn flush(stream: &TcpStream, endpoint: &mut Endpoint) -> Result<(), LinkErrorKind> {
    let mut out = Vec::new();
    while endpoint.poll_transmit(&[], &mut out, Instant::now()) {
        let at_least = Instant::now() + LAST_WORDS;
        let deadline = endpoint.poll_timeout().map_or(at_least, |at| at.max(at_least));
        if let Err(e) = tcp::write_until(stream, &out, deadline) {
            let lost = LinkErrorKind::broken(&e);
            endpoint.broken(lost.clone());
            return Err(lost);
        }
        endpoint.sent(out.len(), Instant::now());
        zeroize::Zeroize::zeroize(&mut out);
    }
    Ok(())
}

/// What a peer calls itself, with where it is.
pub(super) fn described(terms: Option<&Terms>, address: &str) -> String {
    match terms.map(|terms| terms.name.as_str()) {
        None | Some("") => address.to_owned(),
        Some(name) => format!("{name} ({address})"),
    }
}
