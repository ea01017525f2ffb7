//! Workers of the local network: a worker announces itself by mDNS as `_dim._tcp`, a host looks for those.
//!
//! Nothing that is seen here is trusted, and nothing secret is said: an announcement is a name to show and
//! addresses to try, anybody can send one. Who is behind an address is decided by the handshake alone. An
//! announcement carries no properties (TXT), so that the network does not learn which models are about.
//!
//! The name is the device's own; the host name that mDNS needs besides is random. The machine's real one
//! belongs to the system's own responder, and two that announce it make macOS rename the machine.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::time::{Duration, Instant};

use mdns_sd::{DaemonEvent, IfKind, ScopedIp, ServiceDaemon, ServiceEvent, ServiceInfo};

use crate::codec::printable;

/// The service's type, as the app for phones announces it too.
const SERVICE: &str = "_dim._tcp.local.";
/// The port of multicast DNS.
pub const MDNS_PORT: u16 = 5353;
/// Announcements that are remembered, of those that ripen and of those that were told; a network with more of them is
/// somebody's joke, and is told of some of them twice.
const MOST: usize = 1024;
/// Addresses of one announcement that are tried.
const MOST_ADDRESSES: usize = 4;
/// How long the addresses of an announcement are waited for after the first.
const RIPENS: Duration = Duration::from_millis(150);
/// Bytes of a name that are shown.
const MOST_NAME: usize = 64;

/// Why there is no search or no announcement.
#[derive(Debug, thiserror::Error)]
#[error("mDNS: {0}")]
pub struct DiscoverError(String);

impl From<mdns_sd::Error> for DiscoverError {
    fn from(error: mdns_sd::Error) -> DiscoverError {
        DiscoverError(error.to_string())
    }
}

/// A worker that makes itself known, until this is dropped.
pub struct Announcement {
    daemon: ServiceDaemon,
    fullname: String,
}

impl Announcement {
    /// Announces that a worker called `name` listens at `address`: on every interface if that is the unspecified
    /// address, on its own otherwise. `told` hears, from another thread, whether the announcement has left this
    /// machine within [`Announcement::LEAVES`].
    ///
    /// # Errors
    /// [`DiscoverError`], for the user; a worker works without.
    pub fn start(
        name: &str,
        address: SocketAddr,
        mdns_port: u16,
        told: impl FnOnce(bool) + Send + 'static,
    ) -> Result<Announcement, DiscoverError> {
        let daemon = ServiceDaemon::new_with_port(mdns_port)?;
        let events = daemon.monitor()?;
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|e| DiscoverError(e.to_string()))?;
        let host = format!("dim-{:016x}.local.", u64::from_le_bytes(random));
        // a label of DNS has 63 bytes at most
        let mut label = printable(name);
        while label.len() > 63 {
            label.pop();
        }
        let everywhere = address.ip().is_unspecified();
        let at = if everywhere { String::new() } else { address.ip().to_string() };
        let properties: Option<HashMap<String, String>> = None;
        let mut info = ServiceInfo::new(SERVICE, &label, &host, at.as_str(), address.port(), properties)?;
        if everywhere {
            info = info.enable_addr_auto();
            // a socket for IPv4 hears no IPv6, one for IPv6 hears both
            if address.is_ipv4() {
                info.set_interfaces(vec![IfKind::IPv4]);
            }
        } else {
            info.set_interfaces(vec![match address.ip() {
                ip if !ip.is_loopback() => IfKind::Addr(ip),
                IpAddr::V4(_) => IfKind::LoopbackV4,
                IpAddr::V6(_) => IfKind::LoopbackV6,
            }]);
        }
        let fullname = info.get_fullname().to_owned();
        daemon.register(info)?;
        let watch = move || {
            let until = Instant::now() + Announcement::LEAVES;
            told(
                std::iter::from_fn(|| events.recv_deadline(until).ok())
                    .any(|e| matches!(e, DaemonEvent::Announce(..))),
            );
        };
        let spawned = std::thread::Builder::new().name("dim-announce".into()).spawn(watch);
        spawned.map_err(|e| DiscoverError(e.to_string()))?;
        Ok(Announcement { daemon, fullname })
    }

    /// How long an announcement may take to leave: three quarters of a second of asking whether the name is free, and
    /// as much again for each name that is not.
    pub const LEAVES: Duration = Duration::from_secs(5);
}

impl Drop for Announcement {
    fn drop(&mut self) {
        // tells the network, so that hosts do not look for a worker that has gone; never for long
        if let Ok(gone) = self.daemon.unregister(&self.fullname) {
            let _ = gone.recv_timeout(Duration::from_millis(200));
        }
        let _ = self.daemon.shutdown();
    }
}

/// Something that says it is a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// What it calls itself, safe to show.
    pub name: String,
    /// `address:port`, the likeliest first; not empty.
    pub addresses: Vec<String>,
}

/// A search under way.
pub struct Search {
    daemon: ServiceDaemon,
    events: mdns_sd::Receiver<ServiceEvent>,
    /// seen, and since when: an announcement's addresses come one by one
    fresh: HashMap<String, (Instant, Sighting)>,
    /// what was told of each
    seen: HashMap<String, Vec<String>>,
}

impl Search {
    /// Begins to look for workers.
    ///
    /// # Errors
    /// [`DiscoverError`] if this machine cannot.
    pub fn start(mdns_port: u16) -> Result<Search, DiscoverError> {
        let daemon = ServiceDaemon::new_with_port(mdns_port)?;
        let events = daemon.browse(SERVICE)?;
        Ok(Search { daemon, events, fresh: HashMap::new(), seen: HashMap::new() })
    }

    /// The next worker that was not seen before, or one whose addresses have changed; `None` at `until`.
    pub fn next(&mut self, until: Instant) -> Option<Sighting> {
        loop {
            let now = Instant::now();
            let is_full = self.fresh.len() >= MOST;
            let is_ripe = |since: &Instant| is_full || now >= *since + RIPENS;
            let ripe = self.fresh.iter().find(|(_, (since, _))| is_ripe(since)).map(|(n, _)| n.clone());
            if let Some((name, (_, sighting))) = ripe.and_then(|name| self.fresh.remove_entry(&name)) {
                if self.seen.get(&name) == Some(&sighting.addresses) {
                    continue;
                }
                if self.seen.len() >= MOST {
                    self.seen.clear();
                }
                self.seen.insert(name, sighting.addresses.clone());
                return Some(sighting);
            }
            if now >= until {
                return None;
            }
            let wake = self.fresh.values().map(|(since, _)| *since + RIPENS).fold(until, Instant::min);
            match self.events.recv_deadline(wake) {
                Ok(ServiceEvent::ServiceResolved(found)) => {
                    let addresses = addresses(&found.addresses, found.port);
                    if !addresses.is_empty() {
                        let sighting = Sighting { name: instance(&found.fullname), addresses };
                        let since = self.fresh.get(&found.fullname).map_or_else(Instant::now, |(s, _)| *s);
                        self.fresh.insert(found.fullname.clone(), (since, sighting));
                    }
                }
                Ok(_) => {}
                // at its time, or with the search itself: the caller's clock goes on all the same
                Err(_) => std::thread::sleep(wake.saturating_duration_since(Instant::now())),
            }
        }
    }
}

impl Drop for Search {
    fn drop(&mut self) {
        let _ = self.daemon.shutdown();
    }
}

/// The name in `NAME._dim._tcp.local.`, safe to show.
fn instance(fullname: &str) -> String {
    let name = fullname.strip_suffix(SERVICE).and_then(|n| n.strip_suffix('.')).unwrap_or(fullname);
    let mut shown = printable(name);
    while shown.len() > MOST_NAME {
        shown.pop();
    }
    shown
}

/// What to dial, the likeliest first: IPv4, then IPv6 with a wide scope, then link-local, this machine's own last.
fn addresses(found: &HashSet<ScopedIp>, port: u16) -> Vec<String> {
    let mut sorted: Vec<(u8, SocketAddr)> = found
        .iter()
        .filter_map(|ip| match ip {
            ScopedIp::V4(v4) => Some(SocketAddr::from((*v4.addr(), port))),
            ScopedIp::V6(v6) => {
                // a link-local address means nothing without its interface
                let scope = if v6.addr().is_unicast_link_local() { v6.scope_id().index } else { 0 };
                Some(SocketAddr::V6(SocketAddrV6::new(*v6.addr(), port, 0, scope)))
            }
            _ => None,
        })
        .filter(|to| !to.ip().is_unspecified() && !to.ip().is_multicast() && port != 0)
        .map(|to| (rank(&to), to))
        .collect();
    sorted.sort();
    sorted.dedup();
    sorted.truncate(MOST_ADDRESSES);
    sorted.into_iter().map(|(_, to)| to.to_string()).collect()
}

fn rank(to: &SocketAddr) -> u8 {
    match to.ip() {
        ip if ip.is_loopback() => 4,
        IpAddr::V4(v4) if v4.is_link_local() => 2,
        IpAddr::V4(_) => 0,
        IpAddr::V6(v6) if v6.is_unicast_link_local() => 3,
        IpAddr::V6(_) => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_shown_without_what_a_terminal_would_obey() {
        assert_eq!(instance("Anna's iPhone._dim._tcp.local."), "Anna's iPhone");
        assert_eq!(instance(r"a.b\c._dim._tcp.local."), r"a.b\c");
        assert_eq!(instance("a\u{1b}[2Jb\u{202e}._dim._tcp.local."), "a\u{FFFD}[2Jb\u{FFFD}");
        assert!(instance(&"ä".repeat(300)).len() <= MOST_NAME);
        // another name than was asked for, and none at all
        assert_eq!(instance(r"x\"), r"x\");
        assert_eq!(instance("._dim._tcp.local."), "");
    }

    #[test]
    fn addresses_that_cannot_be_dialled_are_left_out_and_the_likeliest_comes_first() {
        let found = |texts: &[&str]| -> HashSet<ScopedIp> {
            texts.iter().map(|t| ScopedIp::from(t.parse::<IpAddr>().unwrap())).collect()
        };
        let ips = found(&["127.0.0.1", "fd00::7", "192.168.1.20", "0.0.0.0", "224.0.0.251", "169.254.3.4"]);
        assert_eq!(
            addresses(&ips, 7878),
            ["192.168.1.20:7878", "[fd00::7]:7878", "169.254.3.4:7878", "127.0.0.1:7878"]
        );
        assert!(addresses(&ips, 0).is_empty());
        let many: Vec<String> = (1..100).map(|i| format!("10.0.0.{i}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(addresses(&found(&many), 1).len(), MOST_ADDRESSES);
    }
}
