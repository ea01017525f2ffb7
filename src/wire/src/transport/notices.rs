//! What a listener tells its user of peers that were not served, and how it keeps strangers from filling the log.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::line::lock;
use super::strangers::network;
use crate::keys::KeyId;

/// Least time between two notices about one network (as the door counts them: an IPv4 address, 64 bits of an IPv6 one), or
/// about the system.
const NOTICE_EVERY: Duration = Duration::from_secs(60);
/// Networks remembered for that.
const REMEMBERED: usize = 1024;

/// Something that happened while listening.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Notice {
    /// A peer was not let in. At most one notice a minute for an IPv4 address, or for the first 64 bits of an IPv6 one.
    #[error("refused {from}: {why}{}", more(.suppressed))]
    Refused {
        /// From where.
        from: IpAddr,
        /// What was wrong.
        why: String,
        /// How many more from there went unmentioned since the last notice.
        suppressed: u32,
    },
    /// A host was told to wait, because another is being served.
    #[error("told {host} to wait: {serving} is being served")]
    Busy {
        /// Who came.
        host: String,
        /// Who is being served.
        serving: String,
    },
    /// A host has been paired.
    #[error("paired with {name} (key {key})")]
    Paired {
        /// What it calls itself.
        name: String,
        /// The new key's id.
        key: KeyId,
    },
    /// Pairing failed at the last step.
    #[error("could not pair with {name}: {why}")]
    NotPaired {
        /// What the host calls itself.
        name: String,
        /// Why.
        why: String,
    },
    /// The system gives no more connections for now. At most one notice a minute.
    #[error("cannot accept connections: {why}{}", more(.suppressed))]
    Trouble {
        /// What the system says.
        why: String,
        /// How many times more since the last notice.
        suppressed: u32,
    },
}

fn more(suppressed: &u32) -> String {
    if *suppressed == 0 { String::new() } else { format!(" (and {suppressed} times more before)") }
}

/// Remembers what a notice was given about, and lets one through a minute.
#[derive(Default)]
pub(super) struct Limiter {
    seen: Mutex<HashMap<Option<IpAddr>, (Instant, u32)>>,
}

impl Limiter {
    /// How many notices about `what` (an address, or the system) went unmentioned since the last, if one may be given
    /// now.
    pub(super) fn pass(&self, what: Option<IpAddr>, now: Instant) -> Option<u32> {
        let what = what.map(network);
        let mut seen = lock(&self.seen);
        match seen.get_mut(&what) {
            Some((last, suppressed)) if now.duration_since(*last) < NOTICE_EVERY => {
                *suppressed = suppressed.saturating_add(1);
                None
            }
            Some((last, suppressed)) => {
                *last = now;
                Some(std::mem::take(suppressed))
            }
            None => {
                if seen.len() >= REMEMBERED {
                    seen.retain(|_, (last, _)| now.duration_since(*last) < NOTICE_EVERY);
                }
                // the memory of addresses is bounded: beyond it strangers go unmentioned
                if seen.len() >= REMEMBERED {
                    return None;
                }
                seen.insert(what, (now, 0));
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_notice_a_minute_and_address_and_the_rest_are_counted() {
        let limiter = Limiter::default();
        let (now, here) = (Instant::now(), Some(IpAddr::from([127, 0, 0, 1])));
        assert_eq!(limiter.pass(here, now), Some(0));
        for s in 0..59 {
            assert_eq!(limiter.pass(here, now + Duration::from_secs(s)), None);
        }
        assert_eq!(limiter.pass(None, now), Some(0), "something else");
        assert_eq!(limiter.pass(here, now + Duration::from_secs(60)), Some(59));
        assert_eq!(limiter.pass(here, now + Duration::from_secs(120)), Some(0));
    }

    /// One machine may have all of its 2^64 addresses: they do not fill the memory, nor the user's screen.
    #[test]
    fn a_network_of_ipv6_is_one_as_it_is_at_the_door() {
        let limiter = Limiter::default();
        let now = Instant::now();
        let from = |text: &str| Some(text.parse::<IpAddr>().unwrap());
        assert_eq!(limiter.pass(from("2001:db8::1"), now), Some(0));
        for host in 2..100 {
            assert_eq!(limiter.pass(from(&format!("2001:db8::{host:x}")), now), None);
        }
        assert_eq!(limiter.pass(from("2001:db8:0:1::1"), now), Some(0), "another network");
        assert_eq!(limiter.pass(from("10.0.0.1"), now), Some(0));
        assert_eq!(limiter.pass(from("::ffff:10.0.0.1"), now), None, "the same, written otherwise");
        assert_eq!(limiter.pass(from("2001:db8::ffff"), now + NOTICE_EVERY), Some(98));
    }

    #[test]
    fn a_flood_of_addresses_is_forgotten_after_a_minute_and_bounded_before() {
        let limiter = Limiter::default();
        let now = Instant::now();
        let address = |n: u32| Some(IpAddr::from(n.to_be_bytes()));
        let told = (0..5000).filter(|&n| limiter.pass(address(n), now).is_some()).count();
        assert_eq!((told, lock(&limiter.seen).len()), (REMEMBERED, REMEMBERED));
        assert_eq!(limiter.pass(address(9999), now + NOTICE_EVERY), Some(0));
        assert_eq!(lock(&limiter.seen).len(), 1);
    }
}
