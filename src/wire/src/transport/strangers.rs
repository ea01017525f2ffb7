//! Newcomers that have not shown yet that they hold a key, and which of them leaves when there are too many.

use std::net::{IpAddr, Ipv6Addr, Shutdown, TcpStream};

/// Strangers at once, of all addresses.
pub const MAX_STRANGERS: usize = 16;

/// A newcomer that has not shown yet that it holds a key.
struct Stranger {
    number: u64,
    network: IpAddr,
    stream: TcpStream,
}

/// All of them, the oldest first.
#[derive(Default)]
pub(super) struct Strangers(Vec<Stranger>);

impl Strangers {
    /// Takes in another one; somebody else leaves for it when there are too many.
    pub(super) fn admit(&mut self, number: u64, from: IpAddr, stream: TcpStream) {
        if self.0.len() >= MAX_STRANGERS {
            self.close_one();
        }
        self.0.push(Stranger { number, network: network(from), stream });
    }

    /// Closes the one that is least missed.
    pub(super) fn close_one(&mut self) {
        let networks: Vec<IpAddr> = self.0.iter().map(|s| s.network).collect();
        if let Some(at) = leaves(&networks) {
            let _ = self.0.remove(at).stream.shutdown(Shutdown::Both);
        }
    }

    /// Closes them all.
    pub(super) fn close_all(&mut self) {
        for stranger in self.0.drain(..) {
            let _ = stranger.stream.shutdown(Shutdown::Both);
        }
    }

    /// Whether it is still here.
    pub(super) fn has(&self, number: u64) -> bool {
        self.0.iter().any(|s| s.number == number)
    }

    /// It is no stranger any more, or gone.
    pub(super) fn forget(&mut self, number: u64) {
        self.0.retain(|s| s.number != number);
    }
}

/// Which of `networks`, the oldest first, leaves: the oldest of the one that has the most. Who comes alone is not driven
/// out by somebody's crowd.
fn leaves(networks: &[IpAddr]) -> Option<usize> {
    let of = |network: &IpAddr| networks.iter().filter(|other| *other == network).count();
    let most = networks.iter().map(of).max()?;
    networks.iter().position(|network| of(network) == most)
}

/// What an address is counted as: an IPv4 address is itself, of an IPv6 address its first 64 bits, since one machine may
/// have all the rest.
fn network(from: IpAddr) -> IpAddr {
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
        assert_eq!(leaves(&[]), None);
        assert_eq!(leaves(&ips(&["10.0.0.1", "10.0.0.2", "10.0.0.3"])), Some(0));
        assert_eq!(leaves(&ips(&["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.2"])), Some(1));
        assert_eq!(leaves(&ips(&["10.0.0.1", "10.0.0.2", "10.0.0.2", "10.0.0.1", "10.0.0.1"])), Some(0));
    }

    #[test]
    fn a_network_of_ipv6_counts_as_one_and_an_ipv4_address_as_itself_however_it_is_written() {
        assert_eq!(leaves(&ips(&["10.0.0.1", "2001:db8::1", "2001:db8::2", "10.0.0.2"])), Some(1));
        assert_eq!(
            leaves(&ips(&["2001:db8:0:1::1", "2001:db8:0:2::1", "::ffff:10.0.0.1", "10.0.0.1"])),
            Some(2)
        );
        assert_eq!(leaves(&ips(&["::ffff:10.0.0.1", "::ffff:10.0.0.2", "10.0.0.2"])), Some(1));
    }
}
