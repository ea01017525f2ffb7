//! What a thousand peers that mean no good cost a worker: alone in its process, so that memory can be
//! measured.
#![cfg(target_os = "linux")]

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;

use dim_wire::keys::Key;
use dim_wire::terms::Terms;
use dim_wire::transport::{Listener, ListenerConfig, Readiness, Timing, inquire};

#[test]
fn a_thousand_hostile_peers_cost_a_worker_less_than_16_mib() {
    let key = Key::from_bytes([1; 32]);
    let config = ListenerConfig {
        keys: Arc::new(key.clone()),
        readiness: Readiness::Ready(Terms::blank(2, "test", "worker")),
        timing: Timing::default(),
        notice: Box::new(|_| {}),
    };
    let listener = Listener::bind("127.0.0.1:0", config).unwrap();
    let at = listener.address();
    inquire(&at.to_string(), &key, &Timing::default()).unwrap();
    let before = resident();
    let mut most = before;
    let mut peers = Vec::new();
    for n in 0..1000 {
        let mut peer = TcpStream::connect(at).unwrap();
        // the right beginning, the largest lengths there are, or nothing: and then they stay
        let sent: &[u8] = match n % 3 {
            0 => &dim_wire::handshake::MAGIC,
            1 => &[0xFF; 82],
            _ => &[],
        };
        let _ = peer.write_all(sent);
        peers.push(peer);
        most = most.max(resident());
    }
    // within the five seconds that a host waits
    inquire(&at.to_string(), &key, &Timing::default()).unwrap();
    let grown = (most - before) >> 20;
    println!("1,000 hostile peers: {grown} MiB");
    assert!(grown < 16, "{grown} MiB");
}

fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
