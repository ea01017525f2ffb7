use super::*;
use proptest::prelude::*;

fn options(text: &str) -> LinkOptions {
    text.parse().unwrap()
}

#[test]
fn options_are_read_and_shown_as_people_write_them() {
    let o = options("5:200");
    assert_eq!((o.rtt_ms, o.rate_mbit_per_s, o.jitter_ms), (5.0, Some(200.0), 0.0));
    assert_eq!(o.to_string(), "5 ms, 200 Mbit/s");
    assert_eq!(options("0.5:inf:0.25").to_string(), "0.5 ms +0.25 ms, no rate limit");
    assert_eq!(options("20").rate_mbit_per_s, None);
    for bad in ["", "x", "5:0", "5:-1", "5:1:2:3", "nan", "-1:5", "5:inf:inf"] {
        assert!(bad.parse::<LinkOptions>().is_err(), "{bad:?} was taken");
    }
}

#[test]
fn bytes_leave_at_the_rate_and_arrive_half_a_round_trip_later() {
    let start = Instant::now();
    let mut lane = Lane::new(&options("5:200"), 0);
    // 25,000 bytes at 200 Mbit/s are 1 ms
    assert_eq!(lane.arrival(start, 25_000) - start, Duration::from_micros(3_500));
    assert_eq!(lane.arrival(start, 25_000) - start, Duration::from_micros(4_500), "waits for the first");
    let later = start + Duration::from_millis(100);
    assert_eq!(lane.arrival(later, 25_000) - later, Duration::from_micros(3_500), "an idle link is free");
    assert_eq!(lane.arrival(later, 0) - later, Duration::from_micros(3_500));
}

#[test]
fn a_timer_is_never_early() {
    let mut timer = Timer::default();
    for i in 0..500 {
        let at = Instant::now() + Duration::from_micros(i % 7 * 100);
        timer.sleep_until(at);
        assert!(Instant::now() >= at, "early by {:?}", at - Instant::now());
    }
}

#[test]
fn jitter_is_drawn_from_the_seed() {
    let start = Instant::now();
    let draw = |seed| -> Vec<Duration> {
        let mut lane = Lane::new(&LinkOptions { seed, ..options("2:inf:4") }, 0);
        (0..50).map(|_| lane.arrival(start, 1) - start).collect()
    };
    assert_eq!(draw(7), draw(7));
    assert_ne!(draw(7), draw(8));
    let (least, most) = (draw(7).into_iter().min().unwrap(), draw(7).into_iter().max().unwrap());
    assert!(least >= Duration::from_millis(1) && most <= Duration::from_millis(5), "{least:?} {most:?}");
    assert!(most - least > Duration::from_millis(2), "no jitter: {least:?} {most:?}");
}

proptest! {
    #[test]
    fn a_link_is_never_faster_than_its_rate(sizes in proptest::collection::vec(1usize..100_000, 1..40)) {
        let start = Instant::now();
        let mut lane = Lane::new(&options("0:80"), 1);
        let last = sizes.iter().map(|&n| lane.arrival(start, n)).last().unwrap();
        let total: usize = sizes.iter().sum();
        let expected = Duration::from_nanos(total as u64 * 100);
        let difference = (last - start).abs_diff(expected);
        prop_assert!(difference < Duration::from_micros(1), "{difference:?}");
    }
}

/// Sends back what it gets, one connection after the other.
fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut copy = stream.try_clone().unwrap();
                let _ = io::copy(&mut copy, &mut stream);
                let _ = stream.shutdown(Shutdown::Write);
            });
        }
    });
    addr
}

fn dial_through(link: &Link) -> TcpStream {
    let stream = TcpStream::connect(link.addr()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

fn ping(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<Duration> {
    let start = Instant::now();
    stream.write_all(bytes)?;
    let mut back = vec![0; bytes.len()];
    stream.read_exact(&mut back)?;
    assert_eq!(back, bytes);
    Ok(start.elapsed())
}

#[test]
fn megabytes_come_out_as_they_went_in_however_they_were_delayed() {
    let link = Link::start(&echo().to_string(), options("2:400:1")).unwrap();
    let mut stream = dial_through(&link);
    let mut rng = Seeded::new(3);
    let sent: Vec<u8> = (0..2_000_000).map(|_| rng.below(256) as u8).collect();
    let mut writer = stream.try_clone().unwrap();
    let (copy, mut got) = (sent.clone(), Vec::new());
    let thread = std::thread::spawn(move || {
        writer.write_all(&copy).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    stream.read_to_end(&mut got).unwrap();
    thread.join().unwrap();
    assert!(got == sent, "{} of {} bytes came back, or other ones", got.len(), sent.len());
    let expected = LinkTraffic { bytes_up: 2_000_000, bytes_down: 2_000_000, connections: 1 };
    assert_eq!(link.traffic(), expected);
}

#[test]
fn a_round_trip_takes_at_least_what_it_was_told() {
    let link = Link::start(&echo().to_string(), options("20")).unwrap();
    let mut stream = dial_through(&link);
    // the first one pays for the handshake
    assert!(ping(&mut stream, b"first").unwrap() >= Duration::from_millis(40));
    for _ in 0..3 {
        assert!(ping(&mut stream, b"x").unwrap() >= Duration::from_millis(20));
    }
}

#[test]
fn a_cut_is_seen_and_a_new_connection_is_taken() {
    let link = Link::start(&echo().to_string(), LinkOptions::default()).unwrap();
    let mut stream = dial_through(&link);
    ping(&mut stream, b"before").unwrap();
    link.cut();
    assert!(ping(&mut stream, b"after").is_err());
    ping(&mut dial_through(&link), b"again").unwrap();
    assert_eq!(link.traffic().connections, 2);
}

#[test]
fn a_stalled_link_takes_bytes_and_gives_none_until_it_recovers() {
    let link = Link::start(&echo().to_string(), LinkOptions::default()).unwrap();
    let mut stream = dial_through(&link);
    ping(&mut stream, b"before").unwrap();
    link.stall(true);
    stream.write_all(b"hello").unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(150))).unwrap();
    let mut back = [0; 5];
    let e = stream.read_exact(&mut back).unwrap_err();
    assert!(matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{e}");
    link.stall(false);
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"hello");
}

#[test]
fn a_connection_is_cut_after_the_bytes_drawn_for_it() {
    let lengths = |seed| -> Vec<usize> {
        let cut_after_bytes = Some((1_000, 20_000));
        let link =
            Link::start(&echo().to_string(), LinkOptions { cut_after_bytes, seed, ..LinkOptions::default() });
        let link = link.unwrap();
        (0..4)
            .map(|_| {
                let mut stream = dial_through(&link);
                (0..).take_while(|_| ping(&mut stream, &[7; 100]).is_ok()).count()
            })
            .collect()
    };
    let first = lengths(5);
    assert_eq!(first, lengths(5));
    assert_ne!(first, lengths(6));
    assert!(first.iter().all(|&n| (4..=100).contains(&n)), "{first:?}");
}

#[test]
fn a_peer_that_is_not_there_hangs_up_and_a_dropped_link_frees_its_port() {
    let nobody = {
        let l = TcpListener::bind("127.0.0.1:0").unwrap();
        l.local_addr().unwrap()
    };
    let link = Link::start(&nobody.to_string(), LinkOptions::default()).unwrap();
    let mut stream = dial_through(&link);
    assert!(ping(&mut stream, b"x").is_err());
    let addr = link.addr();
    drop(link);
    let deadline = Instant::now() + Duration::from_secs(5);
    while TcpListener::bind(addr).is_err() {
        assert!(Instant::now() < deadline, "the port is still taken");
        std::thread::sleep(Duration::from_millis(10));
    }
}
