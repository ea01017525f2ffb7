//! Where other machines find a worker that listens on every address.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

use if_addrs::{IfAddr, Interface};

/// The addresses at which a listener at `listening` is reached, from likely to unlikely. Empty where this machine has none
/// but its own (127.0.0.1).
pub(super) fn addresses(listening: SocketAddr) -> Vec<SocketAddr> {
    if !listening.ip().is_unspecified() {
        return vec![listening];
    }
    of(listening, &if_addrs::get_if_addrs().unwrap_or_default())
}

/// Of an interface that is down too: it may be up when somebody comes.
fn of(listening: SocketAddr, interfaces: &[Interface]) -> Vec<SocketAddr> {
    let mut found: Vec<(u8, SocketAddr)> = interfaces
        .iter()
        .filter(|i| !i.is_loopback())
        .filter_map(|i| {
            let address = match &i.addr {
                IfAddr::V4(v4) => SocketAddr::new(IpAddr::V4(v4.ip), listening.port()),
                IfAddr::V6(_) if listening.is_ipv4() => return None,
                // without its interface, a link's own address names nobody
                IfAddr::V6(v6) => {
                    let scope = if v6.ip.is_unicast_link_local() { i.index.unwrap_or(0) } else { 0 };
                    SocketAddr::V6(SocketAddrV6::new(v6.ip, listening.port(), 0, scope))
                }
            };
            Some((rank(&i.name, address.ip()), address))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, address)| address).collect()
}

/// A network at home first; a cable without a router; then what virtual machines and containers see.
fn rank(interface: &str, ip: IpAddr) -> u8 {
    let is_virtual = ["docker", "br-", "veth", "virbr", "vmnet", "utun", "bridge", "podman", "cni"];
    let own_link = |v6: Ipv6Addr| v6.is_unicast_link_local();
    match ip {
        _ if is_virtual.iter().any(|name| interface.starts_with(name)) => 4,
        IpAddr::V4(v4) if v4.is_private() => 0,
        IpAddr::V4(v4) if v4.is_link_local() => 2,
        IpAddr::V4(_) => 1,
        IpAddr::V6(v6) if own_link(v6) => 3,
        IpAddr::V6(_) => 1,
    }
}

// an interface has a field more on Windows
#[cfg(all(test, not(windows)))]
mod tests {
    use super::*;
    use if_addrs::{IfOperStatus, Ifv4Addr, Ifv6Addr};

    #[test]
    fn the_home_network_comes_first_and_loopback_never() {
        let v4 = |name: &str, ip: [u8; 4]| {
            let addr = Ifv4Addr {
                ip: ip.into(),
                netmask: [255, 255, 255, 0].into(),
                prefixlen: 24,
                broadcast: None,
            };
            Interface {
                name: name.to_owned(),
                addr: IfAddr::V4(addr),
                index: Some(1),
                oper_status: IfOperStatus::Up,
                is_p2p: false,
            }
        };
        let interfaces = [
            v4("lo", [127, 0, 0, 1]),
            v4("docker0", [172, 17, 0, 1]),
            v4("en7", [169, 254, 3, 4]),
            v4("wlan0", [192, 168, 1, 20]),
        ];
        let shown = |listening: &str| {
            of(listening.parse().unwrap(), &interfaces).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(shown("0.0.0.0:7878"), ["192.168.1.20:7878", "169.254.3.4:7878", "172.17.0.1:7878"]);
        assert_eq!(of("0.0.0.0:7878".parse().unwrap(), &interfaces[..1]), []);
        assert_eq!(addresses("127.0.0.1:7".parse().unwrap()), ["127.0.0.1:7".parse().unwrap()]);
    }

    #[test]
    fn a_link_s_own_address_goes_with_its_interface() {
        let ip: Ipv6Addr = "fe80::1".parse().unwrap();
        let addr = Ifv6Addr { ip, netmask: Ipv6Addr::UNSPECIFIED, prefixlen: 64, broadcast: None };
        let interface = Interface {
            name: "en0".to_owned(),
            addr: IfAddr::V6(addr),
            index: Some(7),
            oper_status: IfOperStatus::Up,
            is_p2p: false,
        };
        let found = of("[::]:1".parse().unwrap(), std::slice::from_ref(&interface));
        assert_eq!(found[0].to_string(), "[fe80::1%7]:1");
        assert_eq!(of("0.0.0.0:1".parse().unwrap(), &[interface]), []);
    }
}
