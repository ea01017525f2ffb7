//! Host and worker over real sockets on loopback: what PROTOCOL.md promises about strangers, second hosts,
//! lost peers and the times of all of these.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dim_core::bell::Bell;
use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use dim_wire::error::HandshakeError;
use dim_wire::keys::{Key, KeyStore, PairingCode};
use dim_wire::message::{ErrorCode, Farewell, Fault, Span};
use dim_wire::rows::{RowTypes, RowsRef};
use dim_wire::terms::{Reason, SliceRole, Terms};
use dim_wire::transport::{
    Event, Link, LinkError, LinkErrorKind, Listener, ListenerConfig, Notice, Readiness, Timing, dial,
    inquire, pair,
};
use half::f16;

const N_EMBD: usize = 64;

fn key() -> Key {
    Key::from_bytes([7; 32])
}

fn terms(name: &str) -> Terms {
    Terms {
        row_types: RowTypes::F16,
        role: SliceRole::Middle,
        instance: 0,
        n_embd: N_EMBD as u32,
        n_blocks: 12,
        blocks: BlockRange { first: 4, last: 7 },
        n_ctx: 4096,
        max_rows: 512,
        max_sessions: 4,
        max_in_flight: 4,
        model: Some(Sha([1; 32])),
        slice: Some(Sha([2; 32])),
        params: Some(Sha([3; 32])),
        arch: "qwen2".into(),
        ..Terms::blank(1, "test 0", name)
    }
}

fn worker_terms() -> Terms {
    Terms { row_types: RowTypes::ALL, ..terms("worker") }
}

/// A worker that adds one to every value, in a thread of its own, until it is dropped.
struct Adder {
    listener: Arc<Listener>,
    stopped: Arc<AtomicBool>,
    notices: Arc<Mutex<Vec<Notice>>>,
    compute: Arc<AtomicU32>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Adder {
    fn start(config: ListenerConfig) -> Adder {
        let notices = Arc::new(Mutex::new(Vec::new()));
        let seen = notices.clone();
        let notice: Box<dyn Fn(&Notice) + Send + Sync> =
            Box::new(move |n| seen.lock().unwrap().push(n.clone()));
        let listener = Arc::new(Listener::bind("127.0.0.1:0", ListenerConfig { notice, ..config }).unwrap());
        let stopped = Arc::new(AtomicBool::new(false));
        let compute = Arc::new(AtomicU32::new(0));
        let (l, s, c) = (listener.clone(), stopped.clone(), compute.clone());
        let thread = std::thread::spawn(move || {
            while !s.load(Ordering::Relaxed) {
                if let Some(link) = l.accept(Some(Duration::from_millis(100))) {
                    let _ = add_one(link, &c);
                }
            }
        });
        Adder { listener, stopped, notices, compute, thread: Some(thread) }
    }

    fn plain() -> Adder {
        Adder::start(config(Arc::new(key()), Timing::default()))
    }

    fn at(&self) -> String {
        self.listener.address().to_string()
    }

    /// What happened at the door is told after the peer has been answered.
    fn until_noticed(&self, what: impl Fn(&Notice) -> bool) {
        let until = Instant::now() + Duration::from_secs(5);
        while !self.notices.lock().unwrap().iter().any(&what) {
            assert!(Instant::now() < until, "{:?}", self.notices.lock().unwrap());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn dial(&self, name: &str) -> Result<Link, LinkError> {
        dial(&self.at(), &key(), &terms(name), &Timing::default())
    }
}

impl Drop for Adder {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.listener.close(Farewell::ShuttingDown);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn config(keys: Arc<dyn dim_wire::transport::KeyRing>, timing: Timing) -> ListenerConfig {
    ListenerConfig { keys, readiness: Readiness::Ready(worker_terms()), timing, notice: Box::new(|_| {}) }
}

fn add_one(link: Link, compute_ms: &AtomicU32) -> Result<(), LinkError> {
    let (sender, mut receiver) = link.split();
    let mut out16: Vec<f16> = Vec::new();
    let mut out32: Vec<f32> = Vec::new();
    loop {
        match receiver.receive(None)? {
            Event::Step { step, rows, arrived, .. } => {
                let begun = Instant::now();
                std::thread::sleep(Duration::from_millis(compute_ms.load(Ordering::Relaxed).into()));
                let n_rows = (rows.len() / N_EMBD) as u32;
                let out = match rows {
                    RowsRef::F16(v) => {
                        out16.clear();
                        out16.extend(v.iter().map(|x| f16::from_f32(x.to_f32() + 1.0)));
                        RowsRef::F16(&out16)
                    }
                    RowsRef::F32(v) => {
                        out32.clear();
                        out32.extend(v.iter().map(|x| x + 1.0));
                        RowsRef::F32(&out32)
                    }
                };
                sender.send_done(step, n_rows, out, begun.elapsed(), begun - arrived)?;
            }
            Event::Rewind { .. } | Event::EndSession { .. } => {}
            Event::Done { .. } => unreachable!("a worker gets no answers"),
        }
    }
}

fn rows(n: usize, value: f32) -> Vec<f16> {
    vec![f16::from_f32(value); n * N_EMBD]
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(10))
}

/// One row at `position` of session 0, there and back.
fn token(link: &mut Link, position: u32) -> Result<(), LinkError> {
    let span = [Span { session: 0, position, count: 1 }];
    let sent = rows(1, position as f32);
    let step = link.send_step(&span, sent.as_slice().into())?;
    match link.receive(soon())? {
        Event::Done { step: done, rows, .. } => {
            assert_eq!(done, step);
            let RowsRef::F16(values) = rows else { panic!("another format") };
            assert!(values.iter().all(|v| v.to_f32() == position as f32 + 1.0));
        }
        other => panic!("{other:?}"),
    }
    Ok(())
}

#[test]
fn a_conversation_of_a_thousand_tokens() {
    let worker = Adder::plain();
    let mut link = worker.dial("host").unwrap();
    assert_eq!(link.peer_terms().name, "worker");
    for position in 0..1000 {
        token(&mut link, position).unwrap();
    }
    link.sender().rewind(0, 10).unwrap();
    token(&mut link, 10).unwrap();
    link.sender().end_session(0).unwrap();
    token(&mut link, 0).unwrap();
    assert_eq!(link.sender().counters().round_trips, 1002);
    link.close(Farewell::Finished);
}

#[test]
fn bytes_per_token_are_within_the_budget() {
    let worker = Adder::plain();
    let mut link = worker.dial("host").unwrap();
    token(&mut link, 0).unwrap();
    let before = link.sender().counters();
    for position in 1..=100 {
        token(&mut link, position).unwrap();
    }
    let after = link.sender().counters();
    let per_token =
        (after.bytes_sent + after.bytes_received - before.bytes_sent - before.bytes_received) as f64 / 100.0;
    assert!(per_token <= (2 * (2 * N_EMBD + 64)) as f64, "{per_token} bytes a token");
}

/// `rounds` times 4 chunks of 8 MiB each way, under way at once, with one thread at each end.
fn saturate(rounds: u32, pace: Option<u32>) {
    let wide = |name| Terms { n_embd: 8192, ..terms(name) };
    let readiness = Readiness::Ready(wide("worker"));
    let listener = Listener::bind(
        "127.0.0.1:0",
        ListenerConfig { readiness, ..config(Arc::new(key()), Timing::default()) },
    )
    .unwrap();
    let at = match pace {
        None => listener.address().to_string(),
        Some(bytes_per_s) => {
            let (at, rate) = pacing_relay(listener.address());
            rate.store(bytes_per_s, Ordering::Relaxed);
            at
        }
    };
    let served = std::thread::spawn(move || {
        let (sender, mut receiver) = listener.accept(Some(Duration::from_secs(5))).unwrap().split();
        for _ in 0..4 * rounds {
            let received = receiver.receive(soon());
            let Ok(Event::Step { step, rows, .. }) = received else { panic!("no step: {received:?}") };
            sender.send_done(step, 512, rows, Duration::ZERO, Duration::ZERO).unwrap();
        }
        let _ = receiver.receive(soon());
    });
    let mut link = dial(&at, &key(), &wide("host"), &Timing::default()).unwrap();
    let chunk: Vec<f16> = (0..512 * 8192).map(|i| f16::from_bits((i % 0x7000) as u16)).collect();
    for round in 0..rounds {
        for session in 0..4 {
            let span = [Span { session, position: round * 512, count: 512 }];
            link.send_step(&span, chunk.as_slice().into()).unwrap();
        }
        for _ in 0..4 {
            let received = link.receive(soon());
            let Ok(Event::Done { rows, .. }) = received else { panic!("no answer: {received:?}") };
            assert!(rows == RowsRef::F16(&chunk));
        }
    }
    link.close(Farewell::Finished);
    served.join().unwrap();
}

#[test]
fn prompt_chunks_in_flight_from_one_thread_do_not_block_each_other() {
    saturate(3, None);
}

#[test]
fn a_slow_link_full_in_both_directions_does_not_lock_up() {
    saturate(1, Some(8 << 20));
}

#[test]
fn a_goodbye_is_not_held_up_by_a_blocked_send() {
    let wide = |name| Terms { n_embd: 8192, ..terms(name) };
    let readiness = Readiness::Ready(wide("worker"));
    let listener = Listener::bind(
        "127.0.0.1:0",
        ListenerConfig { readiness, ..config(Arc::new(key()), Timing::default()) },
    )
    .unwrap();
    let (at, pace) = pacing_relay(listener.address());
    let link = dial(&at, &key(), &wide("host"), &Timing::default()).unwrap();
    let _worker = listener.accept(Some(Duration::from_secs(5))).unwrap();
    pace.store(0, Ordering::Relaxed);
    let sender = link.sender().clone();
    let sending = std::thread::spawn(move || {
        let chunk = vec![f16::ONE; 512 * 8192];
        link.send_step(&[Span { session: 0, position: 0, count: 512 }], chunk.as_slice().into())
    });
    std::thread::sleep(Duration::from_millis(300));
    assert!(!sending.is_finished(), "the relay took everything");
    let begun = Instant::now();
    sender.goodbye(Farewell::Finished);
    sender.stop();
    assert!(sending.join().unwrap().is_err());
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[test]
fn a_bell_rings_for_every_message_and_at_the_end_and_nothing_blocks() {
    let worker = Adder::plain();
    let mut link = worker.dial("host").unwrap();
    let bell = Bell::new();
    let rung = || assert!(bell.wait(soon()), "nobody rang");
    token(&mut link, 0).unwrap();
    assert!(matches!(link.receiver().try_receive(), Ok(None)));
    link.receiver().notify(Some(bell.clone()));
    for position in 1..50 {
        let span = [Span { session: 0, position, count: 1 }];
        let step = link.send_step(&span, rows(1, 1.0).as_slice().into()).unwrap();
        let answered = loop {
            rung();
            match link.receiver().try_receive().unwrap() {
                Some(Event::Done { step, .. }) => break step,
                None => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(answered, step);
        assert!(matches!(link.receiver().try_receive(), Ok(None)));
    }
    // a blocking receive works beside it, and direct reads after it
    token(&mut link, 50).unwrap();
    link.receiver().notify(None);
    token(&mut link, 51).unwrap();
    token(&mut link, 52).unwrap();
    link.receiver().notify(Some(bell.clone()));
    while bell.wait(Some(Instant::now())) {}
    drop(worker);
    let lost = loop {
        rung();
        match link.receiver().try_receive() {
            Ok(event) => assert!(event.is_none(), "{event:?}"),
            Err(lost) => break lost,
        }
    };
    assert!(
        matches!(lost, LinkError { kind: LinkErrorKind::Goodbye(Farewell::ShuttingDown), .. }),
        "{lost:?}"
    );
}

#[test]
fn several_sessions_in_one_step_and_f32() {
    let worker = Adder::plain();
    let need = Terms { row_types: RowTypes::F32, ..terms("host") };
    let mut link = dial(&worker.at(), &key(), &need, &Timing::default()).unwrap();
    let spans = [
        Span { session: 2, position: 0, count: 3 },
        Span { session: 0, position: 0, count: 1 },
        Span { session: 3, position: 0, count: 2 },
    ];
    let sent: Vec<f32> = (0..6 * N_EMBD).map(|i| i as f32 * 1e-3).collect();
    link.send_step(&spans, sent.as_slice().into()).unwrap();
    let Event::Done { rows, .. } = link.receive(soon()).unwrap() else { panic!() };
    let RowsRef::F32(values) = rows else { panic!() };
    assert!(values.iter().zip(&sent).all(|(a, b)| *a == b + 1.0));
    assert_eq!(link.sender().session_length(2), Some(3));
}

#[test]
fn a_second_host_is_told_busy_at_once_and_the_first_goes_on() {
    let worker = Adder::plain();
    let mut first = worker.dial("first").unwrap();
    token(&mut first, 0).unwrap();
    for round in 0..20 {
        let begun = Instant::now();
        let refused = worker.dial("second");
        let took = begun.elapsed();
        match refused {
            Err(LinkError { kind: LinkErrorKind::Busy { host, .. }, .. }) => {
                assert!(host.starts_with("first ("), "{host}")
            }
            other => panic!("{other:?}"),
        }
        assert!(took < Duration::from_millis(100), "BUSY took {took:?}");
        token(&mut first, 1 + round).unwrap();
    }
    // also a host that is only being computed for
    drop(first);
    let begun = Instant::now();
    while worker.dial("second").is_err() {
        assert!(begun.elapsed() < Duration::from_secs(1), "the place is not freed");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_worker_can_be_asked_while_it_serves() {
    let worker = Adder::plain();
    let mut first = worker.dial("first").unwrap();
    let offer = inquire(&worker.at(), &key(), &Timing::default()).unwrap();
    assert_eq!((offer.name.as_str(), offer.blocks), ("worker", BlockRange { first: 4, last: 7 }));
    token(&mut first, 0).unwrap();
}

#[test]
fn the_same_process_takes_its_place_back() {
    let worker = Adder::plain();
    let need = Terms { instance: 77, ..terms("host") };
    let dial_again = || dial(&worker.at(), &key(), &need, &Timing::default());
    let mut ghost = dial_again().unwrap();
    token(&mut ghost, 0).unwrap();
    let mut link = dial_again().unwrap();
    token(&mut link, 0).unwrap();
    match token(&mut ghost, 1) {
        Err(LinkError { kind: LinkErrorKind::Goodbye(Farewell::Replaced), .. })
        | Err(LinkError { kind: LinkErrorKind::Broken { .. }, .. }) => {}
        other => panic!("{other:?}"),
    }
    let why = ghost.receiver().explain(LinkErrorKind::Closed.with(""));
    assert!(
        matches!(
            why,
            LinkError { kind: LinkErrorKind::Goodbye(Farewell::Replaced), .. }
                | LinkError { kind: LinkErrorKind::Closed, .. }
        ),
        "{why:?}"
    );
    token(&mut link, 1).unwrap();
}

#[test]
fn a_silent_peer_is_lost_after_the_silence_and_not_before() {
    let timing = Timing { silence: Duration::from_millis(1500), ..Timing::default() };
    let listener = Listener::bind("127.0.0.1:0", config(Arc::new(key()), timing.clone())).unwrap();
    // a relay that can be frozen stands for a pulled cable
    let (at, frozen) = relay(listener.address());
    let link = dial(&at, &key(), &terms("host"), &timing).unwrap();
    let worker_link = listener.accept(Some(Duration::from_secs(5))).unwrap();

    // idle for longer than the silence: heartbeats keep both alive
    let (_sender, mut receiver) = worker_link.split();
    let watch = std::thread::spawn(move || (receiver.receive(None).map(|_| ()), Instant::now()));
    let (sender, mut receiver) = link.split();
    let idle = receiver.receive(Some(Instant::now() + Duration::from_secs(3)));
    assert!(matches!(idle, Err(LinkError { kind: LinkErrorKind::Deadline { .. }, .. })), "{idle:?}");
    assert!(!sender.is_lost());

    frozen.store(true, Ordering::Relaxed);
    let begun = Instant::now();
    let lost = receiver.receive(None).map(|_| ());
    let took = begun.elapsed();
    assert!(matches!(lost, Err(LinkError { kind: LinkErrorKind::Silent { .. }, .. })), "{lost:?}");
    assert!((1000..2200).contains(&took.as_millis()), "{took:?}");
    let (lost, at) = watch.join().unwrap();
    assert!(matches!(lost, Err(LinkError { kind: LinkErrorKind::Silent { .. }, .. })), "{lost:?}");
    assert!(at - begun < Duration::from_millis(2200));
}

#[test]
fn a_side_that_computes_longer_than_the_silence_is_not_lost() {
    let timing = Timing { silence: Duration::from_millis(1200), ..Timing::default() };
    let worker = Adder::start(config(Arc::new(key()), timing.clone()));
    worker.compute.store(2500, Ordering::Relaxed);
    let mut link = dial(&worker.at(), &key(), &terms("host"), &timing).unwrap();
    token(&mut link, 0).unwrap();
    worker.compute.store(0, Ordering::Relaxed);
    // and the host, whose owner is away from the link
    std::thread::sleep(Duration::from_millis(2500));
    token(&mut link, 1).unwrap();
}

#[test]
fn a_deadline_leaves_the_link_usable() {
    let worker = Adder::plain();
    worker.compute.store(700, Ordering::Relaxed);
    let mut link = worker.dial("host").unwrap();
    let sent = rows(1, 0.0);
    link.send_step(&[Span { session: 0, position: 0, count: 1 }], sent.as_slice().into()).unwrap();
    let early = link.receive(Some(Instant::now() + Duration::from_millis(100)));
    assert!(matches!(early, Err(LinkError { kind: LinkErrorKind::Deadline { .. }, .. })), "{early:?}");
    assert!(matches!(link.receive(soon()), Ok(Event::Done { .. })));
}

#[test]
fn a_link_that_stalls_for_less_than_the_silence_goes_on() {
    let worker = Adder::plain();
    let (at, pace) = pacing_relay(worker.listener.address());
    let mut link = dial(&at, &key(), &terms("host"), &Timing::default()).unwrap();
    for (position, stall_ms) in [(0, 100), (1, 500), (2, 2000)] {
        pace.store(0, Ordering::Relaxed);
        let recover = std::thread::spawn({
            let pace = pace.clone();
            move || {
                std::thread::sleep(Duration::from_millis(stall_ms));
                pace.store(u32::MAX, Ordering::Relaxed);
            }
        });
        let begun = Instant::now();
        token(&mut link, position).unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(stall_ms - 20), "the relay did not stall");
        recover.join().unwrap();
    }
}

#[test]
fn a_peer_that_takes_no_bytes_for_a_while_is_not_lost() {
    // a worker that computes with its buffers full looks like this to the host's system, for as long as it
    // computes
    let timing = Timing { silence: Duration::from_secs(20), ..Timing::default() };
    let wide = |name| Terms { n_embd: 8192, ..terms(name) };
    let listener = Listener::bind(
        "127.0.0.1:0",
        ListenerConfig {
            readiness: Readiness::Ready(wide("worker")),
            ..config(Arc::new(key()), timing.clone())
        },
    )
    .unwrap();
    let (at, pace) = pacing_relay(listener.address());
    let link = dial(&at, &key(), &wide("host"), &timing).unwrap();
    let (_, mut receiver) = listener.accept(Some(Duration::from_secs(5))).unwrap().split();
    pace.store(0, Ordering::Relaxed);
    let sending = std::thread::spawn(move || {
        let chunk = vec![f16::ONE; 512 * 8192];
        let sent = link.send_step(&[Span { session: 0, position: 0, count: 512 }], chunk.as_slice().into());
        (sent.map(|_| ()), link)
    });
    std::thread::sleep(Duration::from_secs(6));
    assert!(!sending.is_finished(), "the relay took everything");
    pace.store(u32::MAX, Ordering::Relaxed);
    let Ok(Event::Step { rows, .. }) = receiver.receive(soon()) else { panic!("no step") };
    assert_eq!(rows.len(), 512 * 8192);
    assert_eq!(sending.join().unwrap().0, Ok(()));
}

#[test]
fn a_blocked_send_ends_when_the_peer_falls_silent() {
    let timing = Timing { silence: Duration::from_millis(1500), ..Timing::default() };
    let wide = |name| Terms { n_embd: 8192, ..terms(name) };
    let listener = Listener::bind(
        "127.0.0.1:0",
        ListenerConfig {
            readiness: Readiness::Ready(wide("worker")),
            ..config(Arc::new(key()), Timing::default())
        },
    )
    .unwrap();
    let (at, pace) = pacing_relay(listener.address());
    let mut link = dial(&at, &key(), &wide("host"), &timing).unwrap();
    let _worker = listener.accept(Some(Duration::from_secs(5))).unwrap();
    pace.store(0, Ordering::Relaxed);
    let chunk = vec![f16::ONE; 512 * 8192];
    let begun = Instant::now();
    let sent = link.send_step(&[Span { session: 0, position: 0, count: 512 }], chunk.as_slice().into());
    let took = begun.elapsed();
    let sent = sent.unwrap_err();
    let lost = link.receiver().explain(sent.clone());
    assert!(
        matches!(lost, LinkError { kind: LinkErrorKind::Silent { .. }, .. }),
        "{sent:?} {lost:?} after {took:?}"
    );
    assert!((1000..3000).contains(&took.as_millis()), "{took:?}");
}

#[test]
fn a_slow_link_is_slow_and_nothing_else() {
    // a chunk takes more than twice as long as the silence, in each direction
    let timing = Timing { silence: Duration::from_secs(1), ..Timing::default() };
    let worker = Adder::start(config(Arc::new(key()), timing.clone()));
    let (at, pace) = pacing_relay(worker.listener.address());
    let mut link = dial(&at, &key(), &terms("host"), &timing).unwrap();
    let chunk = rows(512, 3.0);
    pace.store((chunk.len() as u32 * 2) * 10 / 24, Ordering::Relaxed);
    let begun = Instant::now();
    link.send_step(&[Span { session: 0, position: 0, count: 512 }], chunk.as_slice().into()).unwrap();
    let Ok(Event::Done { rows, .. }) = link.receive(Some(begun + Duration::from_secs(30))) else { panic!() };
    assert_eq!(rows.len(), chunk.len());
    assert!(begun.elapsed() > Duration::from_secs(3), "the relay was not slow: {:?}", begun.elapsed());
}

#[test]
fn stop_wakes_a_blocked_receive_from_another_thread() {
    let worker = Adder::plain();
    let link = worker.dial("host").unwrap();
    let (sender, mut receiver) = link.split();
    let blocked = std::thread::spawn(move || receiver.receive(None).map(|_| ()));
    std::thread::sleep(Duration::from_millis(300));
    let begun = Instant::now();
    sender.stop();
    assert_eq!(blocked.join().unwrap().unwrap_err().kind, LinkErrorKind::Stopped);
    assert!(begun.elapsed() < Duration::from_millis(300));
}

#[test]
fn a_fault_reaches_the_host_with_its_block_and_a_way_out() {
    let listener = Listener::bind("127.0.0.1:0", config(Arc::new(key()), Timing::default())).unwrap();
    let at = listener.address().to_string();
    let mut link = dial(&at, &key(), &terms("host"), &Timing::default()).unwrap();
    let (sender, mut receiver) = listener.accept(Some(Duration::from_secs(5))).unwrap().split();
    let sent = rows(1, 0.0);
    link.send_step(&[Span { session: 0, position: 0, count: 1 }], sent.as_slice().into()).unwrap();
    let Ok(Event::Step { step, .. }) = receiver.receive(soon()) else { panic!() };
    let fault = Fault {
        step: Some(step),
        block: Some(17),
        count: 3,
        ..Fault::new(ErrorCode::NonFinite, "3 values are not finite")
    };
    sender.fail(fault.clone());
    match link.receive(soon()) {
        Err(e @ LinkError { kind: LinkErrorKind::Fault(_), .. }) => {
            assert!(!e.may_pass());
            assert!(e.to_string().contains("block 17: 3 values are not finite; try --wire f32"), "{e}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn values_that_are_not_finite_are_not_sent() {
    let worker = Adder::plain();
    let mut link = worker.dial("host").unwrap();
    let mut sent = rows(1, 1.0);
    for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
        sent[N_EMBD / 2] = bad;
        let refused = link.send_step(&[Span { session: 0, position: 0, count: 1 }], sent.as_slice().into());
        assert!(matches!(refused, Err(LinkError { kind: LinkErrorKind::Misuse(_), .. })), "{refused:?}");
    }
    // nothing was sent and nothing was booked
    token(&mut link, 0).unwrap();
}

// --- strangers -------------------------------------------------------------------------------------------

#[test]
fn a_wrong_key_is_refused_with_the_reason() {
    let worker = Adder::plain();
    let refused = dial(&worker.at(), &Key::from_bytes([8; 32]), &terms("host"), &Timing::default());
    match refused {
        Err(e @ LinkError { kind: LinkErrorKind::Handshake(HandshakeError::Key), .. }) => {
            assert!(!e.may_pass())
        }
        other => panic!("{other:?}"),
    }
    worker.until_noticed(|n| matches!(n, Notice::Refused { why, .. } if why.contains("key")));
}

#[test]
fn every_mismatch_is_refused_with_its_reason() {
    let worker = Adder::plain();
    type Change = (Reason, fn(&mut Terms));
    let changes: [Change; 12] = [
        (Reason::Arch, |t| t.arch = "llama".into()),
        (Reason::Model, |t| t.model = Some(Sha([9; 32]))),
        (Reason::Params, |t| t.params = Some(Sha([9; 32]))),
        (Reason::NBlocks, |t| t.n_blocks = 13),
        (Reason::NEmbd, |t| t.n_embd = 65),
        (Reason::Role, |t| t.role = SliceRole::Tail),
        (Reason::Blocks, |t| t.blocks.last = 8),
        (Reason::Slice, |t| t.slice = Some(Sha([9; 32]))),
        (Reason::DType, |t| t.row_types = RowTypes::NONE),
        (Reason::Context, |t| t.n_ctx = 4097),
        (Reason::Sessions, |t| t.max_sessions = 5),
        (Reason::Rows, |t| t.max_rows = 0),
    ];
    for (expected, change) in changes {
        let mut need = terms("host");
        change(&mut need);
        match dial(&worker.at(), &key(), &need, &Timing::default()) {
            Err(LinkError { kind: LinkErrorKind::Refused { reason, mismatches, .. }, .. }) => {
                assert_eq!(reason, expected);
                assert_eq!(mismatches[0].reason, expected);
            }
            other => panic!("{expected:?}: {other:?}"),
        }
    }
    assert!(worker.dial("host").is_ok(), "and the right one is let in");
}

#[test]
fn version_skew_is_answered_with_both_ranges() {
    // a host of the future, by hand: speaks 2-3
    let worker = Adder::plain();
    let mut peer = TcpStream::connect(worker.listener.address()).unwrap();
    let mut preamble = dim_wire::handshake::MAGIC.to_vec();
    preamble.extend([2, 0, 3, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    preamble.extend([48, 0]);
    preamble.extend([0; 48]);
    peer.write_all(&preamble).unwrap();
    let mut answer = Vec::new();
    peer.read_to_end(&mut answer).unwrap();
    assert_eq!(answer.len(), 24);
    assert_eq!(answer[8..16], [1, 0, 1, 0, 1, 0, 0, 0], "speaks 1-1, status VERSION, nothing chosen");

    // a worker of the future, by hand: speaks 3-4
    let door = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = door.local_addr().unwrap().to_string();
    let future = std::thread::spawn(move || {
        let (mut peer, _) = door.accept().unwrap();
        peer.read_exact(&mut [0; 74]).unwrap();
        let mut answer = dim_wire::handshake::MAGIC.to_vec();
        answer.extend([3, 0, 4, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        peer.write_all(&answer).unwrap();
    });
    let refused = dial(&at, &key(), &terms("host"), &Timing::default()).unwrap_err();
    future.join().unwrap();
    let text = refused.to_string();
    assert!(text.contains("speaks protocol versions 3-4") && text.contains("this side speaks 1-1"), "{text}");
    assert!(text.contains("update the software on this side"), "{text}");
}

#[test]
fn garbage_is_closed_without_an_answer_and_the_host_goes_on() {
    let worker = Adder::plain();
    let mut link = worker.dial("host").unwrap();
    let garbage: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n",
        &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xFC, 3, 3],
        b"\0",
        &[0xFF; 4096],
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        &[0xD1, b'D', b'I', b'M', b'\n', 0x1A, b'\n'],
    ];
    for (i, bytes) in garbage.iter().cycle().take(60).enumerate() {
        let begun = Instant::now();
        let mut peer = TcpStream::connect(worker.listener.address()).unwrap();
        let _ = peer.write_all(bytes);
        peer.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut answer = Vec::new();
        // closed with bytes unread: a reset is an end too
        let _ = peer.read_to_end(&mut answer);
        assert!(answer.is_empty(), "{bytes:?} was answered {answer:?}");
        assert!(begun.elapsed() < Duration::from_millis(500), "{bytes:?} took {:?}", begun.elapsed());
        token(&mut link, i as u32).unwrap();
    }
    let notices = worker.notices.lock().unwrap();
    assert_eq!(notices.len(), 1, "one line a minute and address: {notices:?}");
}

#[test]
fn a_drip_feed_is_closed_at_the_absolute_deadline() {
    let worker = Adder::plain();
    let flight = {
        let h = dim_wire::handshake::HostHandshake::new(&key(), dim_wire::handshake::Purpose::Key, 1..=1);
        *h.unwrap().first_flight()
    };
    let peers: Vec<_> = (0..4)
        .map(|n| {
            let at = worker.listener.address();
            std::thread::spawn(move || {
                let begun = Instant::now();
                let mut peer = TcpStream::connect(at).unwrap();
                peer.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
                for byte in flight {
                    // the right bytes, too slowly; one peer sends nothing at all
                    if n > 0 && peer.write_all(&[byte]).is_err() {
                        break;
                    }
                    match peer.read(&mut [0; 8]) {
                        Ok(0) => break,
                        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                        Err(_) => break,
                        Ok(_) => panic!("answered"),
                    }
                }
                begun.elapsed()
            })
        })
        .collect();
    for peer in peers {
        let took = peer.join().unwrap().as_millis();
        assert!((1900..2200).contains(&took), "closed after {took} ms");
    }
}

#[test]
fn a_key_holder_that_says_nothing_is_closed_after_five_seconds() {
    let timing = Timing { opening: Duration::from_millis(800), ..Timing::default() };
    let worker = Adder::start(config(Arc::new(key()), timing));
    let mut peer = TcpStream::connect(worker.listener.address()).unwrap();
    let mut h =
        dim_wire::handshake::HostHandshake::new(&key(), dim_wire::handshake::Purpose::Key, 1..=1).unwrap();
    let begun = Instant::now();
    peer.write_all(h.first_flight()).unwrap();
    let mut answer = [0; 98];
    peer.read_exact(&mut answer).unwrap();
    h.receive(&mut &answer[..]).unwrap().unwrap();
    assert_eq!(peer.read(&mut [0; 8]).unwrap(), 0);
    assert!((700..1100).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
}

#[test]
fn a_crowd_of_idle_strangers_does_not_keep_a_host_out() {
    let worker = Adder::plain();
    let crowd: Vec<TcpStream> =
        (0..100).map(|_| TcpStream::connect(worker.listener.address()).unwrap()).collect();
    let begun = Instant::now();
    let mut link = worker.dial("host").unwrap();
    token(&mut link, 0).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    drop(crowd);
}

#[test]
fn a_thousand_handshakes_one_after_the_other() {
    let worker = Adder::plain();
    let mut wrong = 0;
    for n in 0..1000 {
        if n % 4 == 3 {
            let mut other = [n as u8; 32];
            other[0] = 0xFF;
            let refused = inquire(&worker.at(), &Key::from_bytes(other), &Timing::default());
            assert!(
                matches!(refused, Err(LinkError { kind: LinkErrorKind::Handshake(HandshakeError::Key), .. })),
                "{refused:?}"
            );
            wrong += 1;
        } else {
            assert_eq!(inquire(&worker.at(), &key(), &Timing::default()).unwrap().name, "worker");
        }
    }
    assert_eq!(wrong, 250);
}

#[test]
fn an_altered_byte_ends_the_connection() {
    let worker = Adder::plain();
    let (at, flips) = flipping_relay(worker.listener.address());
    let mut link = dial(&at, &key(), &terms("host"), &Timing::default()).unwrap();
    token(&mut link, 0).unwrap();
    flips.store(true, Ordering::Relaxed);
    let lost = token(&mut link, 1).unwrap_err();
    assert!(lost.may_pass(), "{lost:?}");
}

#[test]
fn an_eavesdropper_sees_none_of_the_rows() {
    let worker = Adder::plain();
    let (at, tape) = taping_relay(worker.listener.address());
    let mut link =
        dial(&at, &key(), &Terms { name: "a very private name".into(), ..terms("") }, &Timing::default())
            .unwrap();
    let pattern: Vec<f16> = (0..N_EMBD).map(|i| f16::from_f32(1.0 + i as f32 / 64.0)).collect();
    for position in 0..50 {
        link.send_step(&[Span { session: 0, position, count: 1 }], pattern.as_slice().into()).unwrap();
        link.receive(soon()).unwrap();
    }
    link.close(Farewell::Finished);
    let tape = tape.lock().unwrap();
    assert!(tape.len() > 50 * N_EMBD * 2);
    let plain: &[u8] = bytemuck::cast_slice(&pattern);
    for window in plain.windows(16).chain(b"a very private name".windows(16)) {
        assert!(!tape.windows(16).any(|w| w == window));
    }
}

// --- pairing ---------------------------------------------------------------------------------------------

#[test]
fn pairing_leaves_the_same_key_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let store = KeyStore::at(dir.path().join("worker"));
    let worker = Adder::start(config(Arc::new(store.clone()), Timing::default()));

    let no_window = pair_with(&worker, &PairingCode::random().unwrap());
    assert!(
        matches!(no_window, Err(LinkError { kind: LinkErrorKind::Handshake(HandshakeError::NoPairing), .. })),
        "{no_window:?}"
    );

    let code = worker.listener.open_pairing().unwrap();
    let typed = PairingCode::parse(&code.to_string().to_lowercase()).unwrap();
    let (key, name) = pair_with(&worker, &typed).unwrap();
    assert_eq!(name, "worker");
    worker.until_noticed(|n| matches!(n, Notice::Paired { name, .. } if name == "Anna"));
    assert_eq!(store.find(key.id()).unwrap().unwrap().bytes(), key.bytes());
    assert_eq!(store.list().unwrap()[0].1.name, "Anna");
    let mut link = dial(&worker.at(), &key, &terms("host"), &Timing::default()).unwrap();
    token(&mut link, 0).unwrap();

    // the code was good once
    let again = pair_with(&worker, &typed);
    assert!(
        matches!(again, Err(LinkError { kind: LinkErrorKind::Handshake(HandshakeError::NoPairing), .. })),
        "{again:?}"
    );
    // and its key opens nothing but pairing
    let as_key = dial(&worker.at(), &code.key(), &terms("host"), &Timing::default());
    assert!(
        matches!(as_key, Err(LinkError { kind: LinkErrorKind::Handshake(HandshakeError::Key), .. })),
        "{as_key:?}"
    );
}

#[test]
fn five_wrong_codes_close_the_window_even_for_the_right_one() {
    let dir = tempfile::tempdir().unwrap();
    let worker = Adder::start(config(Arc::new(KeyStore::at(dir.path())), Timing::default()));
    let code = worker.listener.open_pairing().unwrap();
    for _ in 0..5 {
        let wrong = pair_with(&worker, &PairingCode::random().unwrap());
        assert!(
            matches!(wrong, Err(LinkError { kind: LinkErrorKind::Handshake(HandshakeError::Key), .. })),
            "{wrong:?}"
        );
    }
    let spent = pair_with(&worker, &code);
    assert!(
        matches!(spent, Err(LinkError { kind: LinkErrorKind::Handshake(HandshakeError::NoPairing), .. })),
        "{spent:?}"
    );
    assert!(!worker.listener.is_pairing());
}

fn pair_with(worker: &Adder, code: &PairingCode) -> Result<(Key, String), LinkError> {
    pair(&worker.at(), code, "Anna", "test 0", &Timing::default(), |_, _| Ok(()))
}

// --- relays ----------------------------------------------------------------------------------------------

/// Passes bytes on both ways through `pass`, which may change them or stop them.
fn relay_with(to: SocketAddr, pass: impl Fn(&mut [u8]) -> bool + Send + Sync + 'static) -> String {
    let door = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = door.local_addr().unwrap().to_string();
    let pass = Arc::new(pass);
    std::thread::spawn(move || {
        while let Ok((near, _)) = door.accept() {
            let far = TcpStream::connect(to).unwrap();
            for (mut from, mut to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
                let pass = pass.clone();
                std::thread::spawn(move || {
                    let mut buffer = [0; 4096];
                    while let Ok(n @ 1..) = from.read(&mut buffer) {
                        if pass(&mut buffer[..n]) && to.write_all(&buffer[..n]).is_err() {
                            break;
                        }
                    }
                    if pass(&mut []) {
                        let _ = to.shutdown(std::net::Shutdown::Both);
                    }
                });
            }
        }
    });
    at
}

fn relay(to: SocketAddr) -> (String, Arc<AtomicBool>) {
    let frozen = Arc::new(AtomicBool::new(false));
    let is_frozen = frozen.clone();
    (relay_with(to, move |_| !is_frozen.load(Ordering::Relaxed)), frozen)
}

std::thread_local! {
    static OWED_S: std::cell::Cell<f64> = const { std::cell::Cell::new(0.0) };
}

/// Passes so many bytes a second; 0: none until that changes.
fn pacing_relay(to: SocketAddr) -> (String, Arc<AtomicU32>) {
    let pace = Arc::new(AtomicU32::new(u32::MAX));
    let rate = pace.clone();
    let wait = move |bytes: &mut [u8]| {
        loop {
            match rate.load(Ordering::Relaxed) {
                u32::MAX => break,
                0 => std::thread::sleep(Duration::from_millis(5)),
                bytes_per_s => {
                    // each direction has a thread of its own; sleeps too short to be kept are saved up
                    let owed = OWED_S.get() + bytes.len() as f64 / f64::from(bytes_per_s);
                    let pays = owed > 0.005;
                    OWED_S.set(if pays { 0.0 } else { owed });
                    if pays {
                        std::thread::sleep(Duration::from_secs_f64(owed));
                    }
                    break;
                }
            }
        }
        true
    };
    (relay_with(to, wait), pace)
}

fn flipping_relay(to: SocketAddr) -> (String, Arc<AtomicBool>) {
    let flips = Arc::new(AtomicBool::new(false));
    let on = flips.clone();
    let flip = move |bytes: &mut [u8]| {
        if on.load(Ordering::Relaxed) {
            let middle = bytes.len() / 2;
            if let Some(byte) = bytes.get_mut(middle) {
                *byte ^= 1;
            }
        }
        true
    };
    (relay_with(to, flip), flips)
}

fn taping_relay(to: SocketAddr) -> (String, Arc<Mutex<Vec<u8>>>) {
    let tape = Arc::new(Mutex::new(Vec::new()));
    let record = tape.clone();
    let write = move |bytes: &mut [u8]| {
        record.lock().unwrap().extend_from_slice(bytes);
        true
    };
    (relay_with(to, write), tape)
}
