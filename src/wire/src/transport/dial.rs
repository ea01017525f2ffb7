//! A host's way to a worker: dial, and ask for one of the things that a worker does.

use std::net::TcpStream;
use std::time::Instant;

use super::call_off::{CallOff, Dial};
use super::link::{self, Link};
use super::opening::Opening;
use super::{LinkError, Timing, tcp};
use crate::endpoint::{Ask, Endpoint};
use crate::fault::Farewell;
use crate::keys::{Key, PairingCode};
use crate::link_error::LinkErrorKind;
use crate::message::{Message, PushOffer};
use crate::terms::Terms;

/// Connects to the worker at `address` (`host:port`) and agrees on `need`; its `version` is filled in.
///
/// # Errors
/// [`LinkError`]; [`LinkError::may_pass`] tells which are worth trying again.
pub fn dial(address: &str, key: &Key, need: &Terms, timing: &Timing) -> Result<Link, LinkError> {
    dial_unless(&CallOff::new(), address, key, need, timing)
}

/// [`dial`], unless another thread calls it off.
///
/// # Errors
/// As of [`dial`]; [`LinkErrorKind::Stopped`] where it was called off.
pub fn dial_unless(
    off: &CallOff,
    address: &str,
    key: &Key,
    need: &Terms,
    timing: &Timing,
) -> Result<Link, LinkError> {
    off.dial(address, |dial| {
        let mut opening = begin(dial, address, key, Ask::Serve(Box::new(need.clone())), timing)?;
        while !matches!(opening.next()?, Message::Accept(_)) {}
        link::start(opening, None)
    })
}

/// Offers files to the worker at `address`: the connection, and how many bytes of each it has already.
///
/// # Errors
/// As of [`dial`].
pub(super) fn offer(
    address: &str,
    key: &Key,
    offer: &PushOffer,
    timing: &Timing,
) -> Result<(Opening, Vec<u64>), LinkError> {
    CallOff::new().dial(address, |dial| {
        let mut opening = begin(dial, address, key, Ask::Push(offer.clone()), timing)?;
        loop {
            if let Message::PushNeed(have) = opening.next()? {
                return Ok((opening, have));
            }
        }
    })
}

/// Asks the worker at `address` what it holds, without being served, and also while it serves another host.
///
/// # Errors
/// As of [`dial`].
pub fn inquire(address: &str, key: &Key, timing: &Timing) -> Result<Terms, LinkError> {
    inquire_unless(&CallOff::new(), address, key, timing)
}

/// [`inquire`], unless another thread calls it off.
///
/// # Errors
/// As of [`dial_unless`].
pub fn inquire_unless(off: &CallOff, address: &str, key: &Key, timing: &Timing) -> Result<Terms, LinkError> {
    off.dial(address, |dial| {
        let mut opening = begin(dial, address, key, Ask::Inquire, timing)?;
        loop {
            if let Message::Offer(terms) = opening.next()? {
                opening.endpoint.goodbye(Farewell::Finished);
                let _ = opening.flush();
                return Ok(terms);
            }
        }
    })
}

/// Pairs with the worker at `address`, which shows `code`. `store` is given the new key and the worker's
/// name, and the worker is told only after it has returned; both are also the result.
///
/// # Errors
/// As of [`dial`], and what `store` returns.
pub fn pair(
    address: &str,
    code: &PairingCode,
    name: &str,
    software: &str,
    timing: &Timing,
    store: impl FnOnce(&Key, &str) -> Result<(), LinkError>,
) -> Result<(Key, String), LinkError> {
    let ask = Ask::Pair { name: name.to_owned(), software: software.to_owned() };
    CallOff::new().dial(address, |dial| {
        let mut opening = begin(dial, address, &code.key(), ask, timing)?;
        loop {
            if let Message::PairGrant { key, name, .. } = opening.next()? {
                store(&key, &name)?;
                opening.endpoint.stored();
                opening.flush()?;
                opening.close();
                return Ok((key, name));
            }
        }
    })
}

/// Connects and lets the endpoint begin. Everything until an answer has one deadline.
fn begin(dial: &Dial<'_>, address: &str, key: &Key, ask: Ask, timing: &Timing) -> Result<Opening, LinkError> {
    let now = Instant::now();
    let unreachable = |e: std::io::Error| LinkErrorKind::unreachable(&e).with(address);
    let connect = || -> std::io::Result<TcpStream> {
        let stream = tcp::connect(address, now + timing.opening, dial)?;
        tcp::configure(&stream, timing.stalled_write)?;
        Ok(stream)
    };
    let stream = connect().map_err(unreachable)?;
    let endpoint = Endpoint::host(key, ask, timing, now);
    Ok(Opening::new(stream, address.to_owned(), endpoint))
}
