//! Newcomers that have not shown yet that they hold a key, and which of them leaves when there are too many.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr, Shutdown, TcpStream};

/// Strangers at once, of all addresses.
pub const MAX_STRANGERS: usize = 16;
/// How many of those that were closed are remembered.
const CLOSED_REMEMBERED: usize = 256;

/// A newcomer that has not shown yet that it holds a key.
struct Stranger {
    number: u64,
    network: IpAddr,
    stream: TcpStream,
}

/// All of them.
#[derive(Default)]
pub(super) struct Strangers {
    /// the oldest first
    here: Vec<Stranger>,
    closed: Closed,
}

impl Strangers {
    /// Takes in another one; somebody else leaves for it when there are too many.
    pub(super) fn admit(&mut self, number: u64, from: IpAddr, stream: TcpStream) {
        if self.here.len() >= MAX_STRANGERS {
            self.close_one();
        }
        self.here.push(Stranger { number, network: network(from), stream });
    }

    /// Closes the one that is least missed.
    pub(super) fn close_one(&mut self) {
        let networks: Vec<IpAddr> = self.here.iter().map(|s| s.network).collect();
        if let Some(at) = leaves(&networks, &self.closed) {
            let _ = self.here.remove(at).stream.shutdown(Shutdown::Both);
            self.closed.add(networks[at]);
        }
    }

    /// Closes them all.
    pub(super) fn close_all(&mut self) {
        for stranger in self.here.drain(..) {
            let _ = stranger.stream.shutdown(Shutdown::Both);
        }
    }

    /// Whether it is still here.
    pub(super) fn has(&self, number: u64) -> bool {
        self.here.iter().any(|s| s.number == number)
    }

    /// It is no stranger any more, or gone.
    pub(super) fn forget(&mut self, number: u64) {
        self.here.retain(|s| s.number != number);
    }
}

/// Whose strangers were closed for others lately.
#[derive(Default)]
struct Closed {
    latest: VecDeque<IpAddr>,
    of: HashMap<IpAddr, usize>,
}

impl Closed {
    fn add(&mut self, network: IpAddr) {
        self.latest.push_back(network);
        *self.of.entry(network).or_default() += 1;
        if self.latest.len() > CLOSED_REMEMBERED
            && let Some(forgotten) = self.latest.pop_front()
            && let Entry::Occupied(mut n) = self.of.entry(forgotten)
        {
            *n.get_mut() -= 1;
            if *n.get() == 0 {
                n.remove();
            }
        }
    }
}

/// Which of `networks`, the oldest first, leaves: the oldest of the network that has the most, those counted that were
/// closed lately. Who comes alone, or as two, is not driven out by a crowd, whether it comes from one network or from
/// many.
fn leaves(networks: &[IpAddr], closed: &Closed) -> Option<usize> {
    let of = |network: &IpAddr| {
        let here = networks.iter().filter(|other| *other == network).count();
        here + closed.of.get(network).copied().unwrap_or(0)
    };
    let counts: Vec<usize> = networks.iter().map(of).collect();
    let most = counts.iter().max()?;
    counts.iter().position(|n| n == most)
}

/// What an address is counted as: an IPv4 address is itself, of an IPv6 address its first 64 bits, since one machine may
/// have all the rest.
pub(super) fn network(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|t| network(t.parse().unwrap())).collect()
    }

    #[test]
    fn the_oldest_of_the_largest_crowd_leaves() {
        let leaves = |texts: &[&str]| leaves(&ips(texts), &Closed::default());
        assert_eq!(leaves(&[]), None);
        assert_eq!(leaves(&["10.0.0.1", "10.0.0.2", "10.0.0.3"]), Some(0));
        assert_eq!(leaves(&["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.2"]), Some(1));
        assert_eq!(leaves(&["10.0.0.1", "10.0.0.2", "10.0.0.2", "10.0.0.1", "10.0.0.1"]), Some(0));
    }

    #[test]
    fn a_network_of_ipv6_counts_as_one_and_an_ipv4_address_as_itself_however_it_is_written() {
        let leaves = |texts: &[&str]| leaves(&ips(texts), &Closed::default());
        assert_eq!(leaves(&["10.0.0.1", "2001:db8::1", "2001:db8::2", "10.0.0.2"]), Some(1));
        assert_eq!(leaves(&["2001:db8:0:1::1", "2001:db8:0:2::1", "::ffff:10.0.0.1", "10.0.0.1"]), Some(2));
        assert_eq!(leaves(&["::ffff:10.0.0.1", "::ffff:10.0.0.2", "10.0.0.2"]), Some(1));
    }

    /// The owner has two connections under way, and sixty addresses come one after the other without an end.
    #[test]
    fn a_crowd_of_many_addresses_drives_out_its_own() {
        let (owner, crowd) =
            (ips(&["10.0.0.1"])[0], |n: u32| IpAddr::from((0x0a01_0000 + n % 60).to_be_bytes()));
        let mut closed = Closed::default();
        let mut here: Vec<IpAddr> = Vec::new();
        for n in 0..10_000 {
            let comes = if n == 1000 || n == 1001 { owner } else { crowd(n) };
            if here.len() >= MAX_STRANGERS {
                let network = here.remove(leaves(&here, &closed).unwrap());
                closed.add(network);
            }
            here.push(comes);
        }
        assert_eq!(here.iter().filter(|network| **network == owner).count(), 2);
        assert_eq!((closed.latest.len(), closed.of.values().sum()), (CLOSED_REMEMBERED, CLOSED_REMEMBERED));
    }
}
