//! Where a worker is, as people write it.

use std::net::Ipv6Addr;

use crate::worker::DEFAULT_PORT;

/// Why a text is no address of a worker.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadAddress {
    /// There is nothing.
    #[error("the address is empty")]
    Empty,
    /// It begins with a scheme.
    #[error("{0:?} is a URL; a worker has an address and a port")]
    Url(String),
    /// What follows the last colon is no port.
    #[error("{port:?} in {address:?} is no port")]
    Port {
        /// The whole.
        address: String,
        /// That part.
        port: String,
    },
    /// No machine has such a name.
    #[error("{0:?} is no address and no name of a machine")]
    Name(String),
    /// A link's own address, which every link of the machine has: nobody can tell which is meant.
    #[error("{0:?} is an address of a link, and does not say which")]
    NoZone(String),
    /// This machine has no such interface.
    #[error("there is no network interface {zone:?}, which {address:?} names")]
    Zone {
        /// The whole.
        address: String,
        /// The interface.
        zone: String,
    },
}

impl BadAddress {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            BadAddress::Port { .. } => "a port is 1 to 65535, as in 192.168.1.20:7878",
            BadAddress::Zone { .. } | BadAddress::NoZone(_) => {
                "`ip link` or `ifconfig` lists them: [fe80::1%en0]:7878"
            }
            _ => "as in 192.168.1.20:7878, phone.local or [fe80::1%en0]:7878",
        }
    }
}

/// `host:port`, ready to be dialled: [`DEFAULT_PORT`] where none is written, a link's own address with its interface as a
/// number, as the system wants it. A name is not looked up.
///
/// # Errors
/// It is not written as an address is.
pub fn complete(text: &str) -> Result<String, BadAddress> {
    let text = text.trim();
    if text.is_empty() {
        return Err(BadAddress::Empty);
    }
    if text.contains("://") {
        return Err(BadAddress::Url(text.to_owned()));
    }
    let (host, port) = split(text)?;
    let port = port.unwrap_or(DEFAULT_PORT);
    if let Some(v6) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        return Ok(format!("[{}]:{port}", with_zone(v6, text)?));
    }
    let is_name = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_');
    match !host.is_empty() && host.chars().all(is_name) {
        true => Ok(format!("{host}:{port}")),
        false => Err(BadAddress::Name(text.to_owned())),
    }
}

/// Whether an address says its port itself.
pub(crate) fn names_its_port(text: &str) -> bool {
    split(text.trim()).is_ok_and(|(_, port)| port.is_some())
}

/// Host, with its brackets, and the port that is written.
fn split(text: &str) -> Result<(String, Option<u16>), BadAddress> {
    let bad_port = |port: &str| BadAddress::Port { address: text.to_owned(), port: port.to_owned() };
    let port = |port: &str| match port.parse() {
        Ok(n) if n > 0 => Ok(Some(n)),
        _ => Err(bad_port(port)),
    };
    if text.starts_with('[') {
        let end = text.find(']').ok_or_else(|| BadAddress::Name(text.to_owned()))?;
        return match text[end + 1..].strip_prefix(':') {
            Some(after) => Ok((text[..=end].to_owned(), port(after)?)),
            None if end + 1 == text.len() => Ok((text.to_owned(), None)),
            None => Err(BadAddress::Name(text.to_owned())),
        };
    }
    match text.matches(':').count() {
        0 => Ok((text.to_owned(), None)),
        1 => {
            let (host, after) = text.split_once(':').unwrap_or((text, ""));
            Ok((host.to_owned(), port(after)?))
        }
        // an address of version 6 by itself
        _ => Ok((format!("[{text}]"), None)),
    }
}

/// An address of version 6, its interface by number.
fn with_zone(v6: &str, text: &str) -> Result<String, BadAddress> {
    let (ip, zone) = v6.split_once('%').map_or((v6, None), |(ip, zone)| (ip, Some(zone)));
    let ip: Ipv6Addr = ip.parse().map_err(|_| BadAddress::Name(text.to_owned()))?;
    let Some(zone) = zone else {
        return match ip.is_unicast_link_local() {
            true => Err(BadAddress::NoZone(text.to_owned())),
            false => Ok(ip.to_string()),
        };
    };
    let by_name = || {
        let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
        interfaces.into_iter().find(|interface| interface.name == zone).and_then(|interface| interface.index)
    };
    match zone.parse().ok().or_else(by_name) {
        Some(index) => Ok(format!("{ip}%{index}")),
        None => Err(BadAddress::Zone { address: text.to_owned(), zone: zone.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_completed() {
        for (text, expected) in [
            ("127.0.0.1", "127.0.0.1:7878"),
            (" phone.local ", "phone.local:7878"),
            ("büro:1", "büro:1"),
            ("[::1]", "[::1]:7878"),
            ("::1", "[::1]:7878"),
            ("[fe80::1%7]:9", "[fe80::1%7]:9"),
            ("fe80::1%7", "[fe80::1%7]:7878"),
        ] {
            assert_eq!(complete(text).as_deref(), Ok(expected), "{text}");
            assert_eq!(names_its_port(text), !expected.ends_with(":7878"), "{text}");
        }
    }

    #[test]
    fn what_can_never_work_is_known_before_anything_is_dialled() {
        for text in [
            "",
            "  ",
            "http://127.0.0.1:7878",
            "127.0.0.1:99999",
            "h:",
            "h:0",
            "h:-1",
            ":7878",
            "a b:1",
            "[::1",
        ] {
            assert!(complete(text).is_err(), "{text}");
        }
        for text in [
            "[::1]x",
            "[::1]:",
            "[h]:1",
            "1:2:3",
            "[fe80::1%no-such-interface]:1",
            "[fe80::1]:1",
            "fe80::1",
            "h/x:1",
        ] {
            assert!(complete(text).is_err(), "{text}");
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn an_interface_has_a_number() {
        assert_eq!(complete("[fe80::1%lo]:1").unwrap(), "[fe80::1%1]:1");
    }
}
