//! The link emulator as an instrument, and as a relay of its own.
//!
//!     cargo bench --bench link                     what it adds to a round trip and what it lets through, against what it
//!                                                  was told
//!     cargo bench --bench link -- relay 127.0.0.1:7000 192.168.1.5:7878 5:200
//!                                                  listens on the first address and passes bytes on to the second, over
//!                                                  a link of 5 ms round trip and 200 Mbit/s: for any TCP peer
//!
//! Bytes come out as they went in, or nothing is said about speed. The emulator sleeps, but for the last tens
//! of microseconds, so that it takes no core from what is measured: what it adds beyond the link itself is what this bench
//! shows.

#[path = "machine/mod.rs"]
mod machine;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use dim_ab::link::{Link, LinkOptions};
use machine::median;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["relay", listen, to] => relay(listen, to, "0"),
        ["relay", listen, to, link] => relay(listen, to, link),
        _ => instrument(),
    }
}

fn relay(listen: &str, to: &str, link: &str) {
    let options: LinkOptions = link.parse().unwrap_or_else(|e| panic!("{e}"));
    let link = Link::start_on(listen, to, options).unwrap_or_else(|e| panic!("{listen}: {e}"));
    println!("listening on {}, passing on to {to}: {options}", link.addr());
    loop {
        std::thread::sleep(Duration::from_secs(10));
        let t = link.traffic();
        eprintln!("{} connections, {} bytes up, {} bytes down", t.connections, t.bytes_up, t.bytes_down);
    }
}

fn instrument() {
    machine::describe("link");
    let peer = echo();
    println!("\nround trip of 7168 bytes (median, 99 of 100)");
    let direct = round_trips(peer, 500);
    println!("  direct                        {}", milliseconds(&direct));
    for text in ["0", "1", "5", "20", "50", "5:200", "5:200:2"] {
        let options: LinkOptions = text.parse().expect("a link");
        let link = Link::start(&peer.to_string(), options).expect("a relay");
        let measured = round_trips(link.addr(), if options.rtt_ms > 10.0 { 60 } else { 300 });
        // two sends of 7168 bytes at the rate
        let told = options.rtt_ms + options.rate_mbit_per_s.map_or(0.0, |rate| 2.0 * 7168.0 * 8e-3 / rate);
        let least = measured.iter().copied().fold(f64::INFINITY, f64::min);
        assert!(least >= told - 0.001, "{text}: a round trip took {least} ms, less than {told}");
        println!("  {:<28}  {}   told {told:.3}", options.to_string(), milliseconds(&measured));
    }
    println!("\nrate of 8 MB one way, Mbit/s");
    for mbit in [20.0, 200.0, 1000.0] {
        let options = LinkOptions { rate_mbit_per_s: Some(mbit), ..LinkOptions::default() };
        let link = Link::start(&peer.to_string(), options).expect("a relay");
        let seen = rate(link.addr(), 8 << 20);
        assert!(seen <= mbit * 1.01, "{seen} Mbit/s came through a link of {mbit}");
        println!("  told {mbit:>6.0}   seen {seen:>8.1}");
    }
}

/// Sends back what it gets.
fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let _ = stream.set_nodelay(true);
            std::thread::spawn(move || {
                let mut copy = stream.try_clone().expect("a second handle");
                let _ = std::io::copy(&mut copy, &mut stream);
                let _ = stream.shutdown(Shutdown::Write);
            });
        }
    });
    address
}

fn round_trips(to: SocketAddr, n: usize) -> Vec<f64> {
    let mut stream = TcpStream::connect(to).expect("the echo");
    stream.set_nodelay(true).expect("no delay");
    let (sent, mut back) = ([7u8; 7168], [0u8; 7168]);
    let mut times = Vec::new();
    for i in 0..n + 5 {
        let start = Instant::now();
        stream.write_all(&sent).expect("sent");
        stream.read_exact(&mut back).expect("back");
        assert_eq!(back, sent, "other bytes came back");
        if i >= 5 {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    times
}

fn rate(to: SocketAddr, bytes: usize) -> f64 {
    let mut stream = TcpStream::connect(to).expect("the echo");
    let mut writer = stream.try_clone().expect("a second handle");
    let start = Instant::now();
    let thread = std::thread::spawn(move || {
        writer.write_all(&vec![1u8; bytes]).expect("sent");
        writer.shutdown(Shutdown::Write).expect("ended");
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back).expect("back");
    let elapsed = start.elapsed().as_secs_f64();
    thread.join().expect("the writer");
    assert!(back.len() == bytes && back.iter().all(|&b| b == 1), "other bytes came back");
    bytes as f64 * 8e-6 / elapsed
}

fn milliseconds(times: &[f64]) -> String {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    format!("{:>8.3} {:>8.3} ms", median(times.to_vec()), sorted[sorted.len() * 99 / 100])
}
