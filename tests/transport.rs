//! Host and worker over real sockets on loopback: what only threads and sockets can show. Times and lost peers are
//! tests/endpoint.rs's, on simulated time; what waits here says why.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use dim_core::bell::Bell;
use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use dim_wire::error::HandshakeError;
use dim_wire::handshake::{FIRST_FLIGHT, GREETING, HostHandshake, Named, Purpose};
use dim_wire::keys::{FoundKey, Key, KeyId, KeyStore, PairingCode, Peer};
use dim_wire::message::{ErrorCode, Farewell, Fault, Span};
use dim_wire::rows::{RowTypes, RowsRef, Shape};
use dim_wire::terms::{Reason, SliceRole, Terms};
use dim_wire::transport::MAX_STRANGERS;
use dim_wire::transport::{
    ComputeTime, Event, KeyRing, Link, LinkError, LinkErrorKind, Listener, ListenerConfig, Notice, Readiness,
    Sender, Timing, dial, inquire, pair,
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
        shape: Shape::hidden(N_EMBD as u32),
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
        ..Terms::blank(2, "test 0", name)
    }
}

fn worker_terms() -> Terms {
    Terms { row_types: RowTypes::ALL, ..terms("worker") }
}

/// A worker that adds one to every value, in a thread of its own, until it is dropped.
struct Adder {
    listener: Arc<Listener>,
    stopped: Arc<AtomicBool>,
    notices: Arc<(Mutex<Vec<Notice>>, Condvar)>,
    /// who holds it keeps the worker from answering
    gate: Arc<Mutex<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Adder {
    fn start(config: ListenerConfig) -> Adder {
        let notices: Arc<(Mutex<Vec<Notice>>, Condvar)> = Arc::default();
        let seen = notices.clone();
        let notice: Box<dyn Fn(&Notice) + Send + Sync> = Box::new(move |n| {
            seen.0.lock().unwrap().push(n.clone());
            seen.1.notify_all();
        });
        let listener = Arc::new(Listener::bind("127.0.0.1:0", ListenerConfig { notice, ..config }).unwrap());
        let stopped = Arc::new(AtomicBool::new(false));
        let gate: Arc<Mutex<()>> = Arc::default();
        let (l, s, g) = (listener.clone(), stopped.clone(), gate.clone());
        let thread = std::thread::spawn(move || {
            while !s.load(Ordering::Relaxed) {
                if let Some(link) = l.accept(None) {
                    let _ = add_one(link, &g);
                }
            }
        });
        Adder { listener, stopped, notices, gate, thread: Some(thread) }
    }

    fn plain() -> Adder {
        Adder::start(config(Arc::new(key()), Timing::default()))
    }

    fn at(&self) -> String {
        self.listener.address().to_string()
    }

    /// What happened is told after the peer has been answered.
    fn until_noticed(&self, what: impl Fn(&Notice) -> bool) {
        let notices = self.notices.0.lock().unwrap();
        let wait = |seen: &mut Vec<Notice>| !seen.iter().any(&what);
        let (seen, late) = self.notices.1.wait_timeout_while(notices, Duration::from_secs(10), wait).unwrap();
        assert!(!late.timed_out(), "{seen:?}");
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

fn add_one(link: Link, gate: &Mutex<()>) -> Result<(), LinkError> {
    let (sender, mut receiver) = link.split();
    let mut out16: Vec<f16> = Vec::new();
    let mut out32: Vec<f32> = Vec::new();
    loop {
        match receiver.receive(None)? {
            Event::Step { step, rows, arrived, .. } => {
                let begun = Instant::now();
                drop(gate.lock());
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
                sender.send_done(
                    step,
                    n_rows,
                    out,
                    ComputeTime { began: begun, compute: begun.elapsed(), wait: begun - arrived },
                )?;
            }
            Event::Rewind { .. } | Event::EndSession { .. } => {}
            Event::Done { .. } | Event::Failed { .. } => unreachable!("a worker gets no answers"),
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
    let step = link.send_step(&span, &[], sent.as_slice().into())?;
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
    assert_eq!(link.sender().traffic().round_trips, 1002);
    link.close(Farewell::Finished);
}

#[test]
fn bytes_per_token_are_within_the_budget() {
    let worker = Adder::plain();
    let mut link = worker.dial("host").unwrap();
    token(&mut link, 0).unwrap();
    let before = link.sender().traffic();
    for position in 1..=100 {
        token(&mut link, position).unwrap();
    }
    let after = link.sender().traffic();
    let per_token =
        (after.bytes_sent + after.bytes_received - before.bytes_sent - before.bytes_received) as f64 / 100.0;
    assert!(per_token <= (2 * (2 * N_EMBD + 64)) as f64, "{per_token} bytes a token");
}

/// `rounds` times 4 chunks of 8 MiB each way, under way at once, with one thread at each end.
fn saturate(rounds: u32, pace: Option<u32>) {
    let wide = |name| Terms { shape: Shape::hidden(8192), ..terms(name) };
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
            sender.send_done(step, 512, rows, at_once()).unwrap();
        }
        let _ = receiver.receive(soon());
    });
    let mut link = dial(&at, &key(), &wide("host"), &Timing::default()).unwrap();
    let chunk: Vec<f16> = (0..512 * 8192).map(|i| f16::from_bits((i % 0x7000) as u16)).collect();
    for round in 0..rounds {
        for session in 0..4 {
            let span = [Span { session, position: round * 512, count: 512 }];
            link.send_step(&span, &[], chunk.as_slice().into()).unwrap();
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
    saturate(1, Some(64 << 20));
}

/// A host and its worker with rows of 8192 numbers, and how fast bytes go between them, both ways.
fn through_a_pacing_relay(host: &Timing, worker: Timing) -> (Link, (Link, Listener), Arc<AtomicU32>) {
    let wide = |name| Terms { shape: Shape::hidden(8192), ..terms(name) };
    let readiness = Readiness::Ready(wide("worker"));
    let config = ListenerConfig { readiness, ..config(Arc::new(key()), worker) };
    let listener = Listener::bind("127.0.0.1:0", config).unwrap();
    let (at, pace) = pacing_relay(listener.address());
    let host = dial(&at, &key(), &wide("host"), host).unwrap();
    let link = listener.accept(Some(Duration::from_secs(5))).unwrap();
    (host, (link, listener), pace)
}

/// 8 MiB, more than the sockets' buffers hold.
fn chunk() -> Vec<f16> {
    vec![f16::ONE; 512 * 8192]
}

/// Session `session`'s first 512 rows.
fn send_chunk(link: &Link, session: u32) -> Result<u32, LinkError> {
    link.send_step(&[Span { session, position: 0, count: 512 }], &[], chunk().as_slice().into())
}

#[test]
fn a_goodbye_is_not_held_up_by_a_blocked_send() {
    let (host, (worker, _listener), pace) = through_a_pacing_relay(&Timing::default(), Timing::default());
    let (sender, mut receiver) = worker.split();
    let step = send_chunk(&host, 0).unwrap();
    assert!(matches!(receiver.receive(soon()), Ok(Event::Step { .. })));
    pace.store(0, Ordering::Relaxed);
    let answering = sender.clone();
    let sending =
        std::thread::spawn(move || answering.send_done(step, 512, chunk().as_slice().into(), at_once()));
    until_blocked(&sender);
    assert!(!sending.is_finished(), "the relay took everything");
    sender.goodbye(Farewell::Finished);
    sender.stop();
    assert!(sending.join().unwrap().is_err());
}

#[test]
fn a_host_is_not_held_up_by_a_worker_that_takes_no_bytes() {
    // a send that waited would come back after the limit, with an error
    let long = Duration::from_secs(20);
    let timing = Timing { silence: long, stalled_write: long, ..Timing::default() };
    let (mut host, (mut worker, _listener), pace) = through_a_pacing_relay(&timing, timing.clone());
    pace.store(0, Ordering::Relaxed);
    for session in 0..4 {
        send_chunk(&host, session).unwrap();
    }
    host.sender().rewind(3, 256).unwrap();
    until_blocked(host.sender());
    assert!(host.sender().traffic().bytes_sent < 32 << 20, "the relay took everything");
    // what waited arrives whole and in order, and so does what is sent behind it
    pace.store(u32::MAX, Ordering::Relaxed);
    let served = std::thread::spawn(move || {
        for session in 0..4 {
            let Ok(Event::Step { step, spans, rows, .. }) = worker.receive(soon()) else { panic!("no step") };
            assert_eq!(spans[0].session, session);
            assert!(rows == RowsRef::F16(&chunk()));
            worker.sender().send_done(step, 512, chunk().as_slice().into(), at_once()).unwrap();
        }
        assert!(matches!(worker.receive(soon()), Ok(Event::Rewind { session: 3, position: 256 })));
        assert!(matches!(worker.receive(soon()), Ok(Event::Step { step: 5, .. })));
    });
    for step in 1..=4 {
        assert!(matches!(host.receive(soon()), Ok(Event::Done { step: s, .. }) if s == step));
    }
    let span = [Span { session: 3, position: 256, count: 512 }];
    host.send_step(&span, &[], chunk().as_slice().into()).unwrap();
    served.join().unwrap();
}

#[test]
fn a_worker_that_takes_no_bytes_for_the_limit_is_lost_and_the_bell_rings() {
    let long = Duration::from_secs(60);
    let timing = Timing { silence: long, stalled_write: Duration::from_millis(300), ..Timing::default() };
    let (mut host, _worker, pace) = through_a_pacing_relay(&timing, Timing::default());
    let bell = Bell::new();
    host.receiver().notify(Some(bell.clone()));
    pace.store(0, Ordering::Relaxed);
    send_chunk(&host, 0).unwrap();
    let lost = loop {
        assert!(bell.wait(soon()), "nobody rang");
        match host.receiver().try_receive() {
            Ok(event) => assert!(event.is_none(), "{event:?}"),
            Err(lost) => break lost,
        }
    };
    assert!(matches!(lost.kind, LinkErrorKind::Stalled { .. }), "{lost:?}");
    assert!(lost.may_pass());
    assert_eq!(send_chunk(&host, 1).unwrap_err().kind, lost.kind);
}

#[test]
fn a_host_leaves_a_worker_that_takes_no_bytes() {
    let (host, worker, pace) = through_a_pacing_relay(&Timing::default(), Timing::default());
    pace.store(0, Ordering::Relaxed);
    send_chunk(&host, 0).unwrap();
    let sender = host.sender().clone();
    // nobody takes the goodbye, which does not keep it: see LAST_WORDS
    host.close(Farewell::Finished);
    assert!(sender.is_lost());
    drop(worker);
}

/// Waits until the sockets' buffers are full: only the system knows how large they are.
fn until_blocked(sender: &Sender) {
    let (mut before, mut still) = (0, 0);
    while still < 10 {
        std::thread::sleep(Duration::from_millis(5));
        let now = sender.traffic().bytes_sent;
        still = if now == before && now > 1 << 16 { still + 1 } else { 0 };
        before = now;
    }
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
        let step = link.send_step(&span, &[], rows(1, 1.0).as_slice().into()).unwrap();
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
    link.send_step(&spans, &[], sent.as_slice().into()).unwrap();
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
        match worker.dial("second") {
            Err(LinkError { kind: LinkErrorKind::Busy { host, .. }, .. }) => {
                assert!(host.starts_with("first ("), "{host}")
            }
            other => panic!("{other:?}"),
        }
        token(&mut first, 1 + round).unwrap();
    }
    // the first has left: its slot is free as soon as the worker has noticed
    drop(first);
    let second = std::iter::from_fn(|| Some(worker.dial("second"))).take(10_000).find_map(Result::ok);
    token(&mut second.expect("the slot is not freed"), 0).unwrap();
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
fn a_deadline_leaves_the_link_usable() {
    let worker = Adder::plain();
    let gate = worker.gate.lock().unwrap();
    let mut link = worker.dial("host").unwrap();
    let sent = rows(1, 0.0);
    link.send_step(&[Span { session: 0, position: 0, count: 1 }], &[], sent.as_slice().into()).unwrap();
    let early = link.receive(Some(Instant::now() + Duration::from_millis(20)));
    assert!(matches!(early, Err(LinkError { kind: LinkErrorKind::Deadline { .. }, .. })), "{early:?}");
    drop(gate);
    assert!(matches!(link.receive(soon()), Ok(Event::Done { .. })));
}

#[test]
fn a_blocked_send_ends_when_the_peer_falls_silent() {
    // a real silence, because the write is blocked in the system: that it comes back is the transport's doing
    let timing = Timing { silence: Duration::from_millis(700), ..Timing::default() };
    let (host, (mut worker, _listener), pace) = through_a_pacing_relay(&Timing::default(), timing);
    let step = send_chunk(&host, 0).unwrap();
    assert!(matches!(worker.receive(soon()), Ok(Event::Step { .. })));
    pace.store(0, Ordering::Relaxed);
    let sent = worker.sender().send_done(step, 512, chunk().as_slice().into(), at_once());
    let sent = sent.unwrap_err();
    let lost = worker.receiver().explain(sent.clone());
    assert!(matches!(lost, LinkError { kind: LinkErrorKind::Silent { .. }, .. }), "{sent:?} {lost:?}");
}

#[test]
fn stop_wakes_a_blocked_receive_from_another_thread() {
    let worker = Adder::plain();
    let link = worker.dial("host").unwrap();
    let (sender, mut receiver) = link.split();
    let blocked = std::thread::spawn(move || receiver.receive(None).map(|_| ()));
    sender.stop();
    assert_eq!(blocked.join().unwrap().unwrap_err().kind, LinkErrorKind::Stopped);
}

#[test]
fn a_fault_reaches_the_host_with_its_block_and_a_way_out() {
    let listener = Listener::bind("127.0.0.1:0", config(Arc::new(key()), Timing::default())).unwrap();
    let at = listener.address().to_string();
    let mut link = dial(&at, &key(), &terms("host"), &Timing::default()).unwrap();
    let (sender, mut receiver) = listener.accept(Some(Duration::from_secs(5))).unwrap().split();
    let sent = rows(1, 0.0);
    link.send_step(&[Span { session: 0, position: 0, count: 1 }], &[], sent.as_slice().into()).unwrap();
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
            assert!(e.to_string().contains("block 17: 3 values are not finite; try F32 rows"), "{e}");
        }
        other => panic!("{other:?}"),
    }
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
        (Reason::Layout, |t| t.shape = Shape::hidden(65)),
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
    // a host of the future, by hand: speaks 3-4
    let worker = Adder::plain();
    let mut peer = TcpStream::connect(worker.listener.address()).unwrap();
    let mut preamble = dim_wire::handshake::MAGIC.to_vec();
    preamble.extend([3, 0, 4, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8]);
    preamble.extend([48, 0]);
    preamble.extend([0; 48]);
    peer.write_all(&preamble).unwrap();
    let mut answer = Vec::new();
    peer.read_to_end(&mut answer).unwrap();
    let answer = &answer[GREETING..];
    assert_eq!(answer.len(), 24);
    assert_eq!(answer[8..16], [2, 0, 2, 0, 1, 0, 0, 0], "speaks 2-2, status VERSION, nothing chosen");

    // a worker of the future, by hand: speaks 3-4
    let door = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = door.local_addr().unwrap().to_string();
    let future = std::thread::spawn(move || {
        let (mut peer, _) = door.accept().unwrap();
        let mut greeting = dim_wire::handshake::MAGIC.to_vec();
        greeting.extend([3, 0, 4, 0, 0, 0, 0, 0]);
        greeting.extend([7; 16]);
        peer.write_all(&greeting).unwrap();
        assert_eq!(peer.read(&mut [0; FIRST_FLIGHT]).unwrap(), 0, "nothing is said to it");
    });
    let refused = dial(&at, &key(), &terms("host"), &Timing::default()).unwrap_err();
    future.join().unwrap();
    let text = refused.to_string();
    assert!(text.contains("speaks protocol versions 3-4") && text.contains("this side speaks 2-2"), "{text}");
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
        let mut peer = TcpStream::connect(worker.listener.address()).unwrap();
        let _ = peer.write_all(bytes);
        peer.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut answer = Vec::new();
        // closed with bytes unread: a reset is an end too
        let _ = peer.read_to_end(&mut answer);
        assert!(answer.len() <= GREETING, "{bytes:?} was answered {answer:?}");
        token(&mut link, i as u32).unwrap();
    }
    let notices = worker.notices.0.lock().unwrap();
    assert_eq!(notices.len(), 1, "one line a minute and address: {notices:?}");
}

#[test]
fn a_key_holder_that_says_nothing_is_closed() {
    // a real deadline, because the worker's thread is blocked in a read
    let timing = Timing { opening: Duration::from_millis(300), ..Timing::default() };
    let worker = Adder::start(config(Arc::new(key()), timing));
    let mut peer = TcpStream::connect(worker.listener.address()).unwrap();
    let (mut h, flight) = greeted(&mut peer);
    peer.write_all(&flight).unwrap();
    let mut answer = [0; 98];
    peer.read_exact(&mut answer).unwrap();
    h.receive(&mut &answer[..], &mut Vec::new()).unwrap().unwrap();
    assert_eq!(peer.read(&mut [0; 8]).unwrap(), 0);
    worker.until_noticed(
        |n| matches!(n, Notice::Refused { why, .. } if why.contains("did not say what it needs")),
    );
}

#[test]
fn a_crowd_of_idle_strangers_does_not_keep_a_host_out() {
    let worker = Adder::plain();
    let crowd: Vec<TcpStream> =
        (0..100).map(|_| TcpStream::connect(worker.listener.address()).unwrap()).collect();
    let mut link = worker.dial("host").unwrap();
    token(&mut link, 0).unwrap();
    drop(crowd);
}

/// The host's part of a handshake that a worker has greeted, up to its first flight.
fn greeted(peer: &mut TcpStream) -> (HostHandshake, Vec<u8>) {
    let (mut greeting, mut flight) = ([0; GREETING], Vec::new());
    peer.read_exact(&mut greeting).unwrap();
    let mut host = HostHandshake::new(&key(), Purpose::Key, dim_wire::VERSIONS);
    assert!(host.receive(&mut &greeting[..], &mut flight).unwrap().is_none());
    (host, flight)
}

/// Who has overheard a host's first flight is no nearer to the worker than who has not: the greeting was another.
#[test]
fn a_crowd_with_an_overheard_first_flight_does_not_keep_a_host_out() {
    let worker = Adder::plain();
    let overheard = greeted(&mut TcpStream::connect(worker.listener.address()).unwrap()).1;
    let mut crowd: Vec<TcpStream> = (0..100)
        .map(|_| {
            let mut peer = TcpStream::connect(worker.listener.address()).unwrap();
            let _ = peer.write_all(&overheard);
            peer
        })
        .collect();
    let mut link = worker.dial("host").unwrap();
    token(&mut link, 0).unwrap();
    let still_open = |peer: &mut TcpStream| {
        peer.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let end = peer.read_to_end(&mut Vec::new());
        end.is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock)
    };
    let open = crowd.iter_mut().filter_map(|peer| still_open(peer).then_some(())).count();
    assert!(open <= MAX_STRANGERS, "{open} strangers are kept");
}

/// A crowd from one address drives out its own, not who comes alone from another.
#[test]
fn a_crowd_of_one_address_does_not_drive_out_who_comes_from_another() {
    let timing = Timing { stranger: Duration::from_secs(30), ..Timing::default() };
    let config = config(Arc::new(key()), timing);
    let listener = Listener::bind("0.0.0.0:0", config).unwrap();
    let port = listener.address().port();
    let from = |ip: &str| -> Option<TcpStream> {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&format!("{ip}:0").parse::<std::net::SocketAddr>().unwrap().into()).ok()?;
        socket.connect(&format!("127.0.0.1:{port}").parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
        Some(socket.into())
    };
    let mut owner = from("127.0.0.1").unwrap();
    // other loopback addresses exist on Linux only
    let Some(first) = from("127.0.0.2") else { return };
    let (mut host, flight) = greeted(&mut owner);
    let crowd: Vec<TcpStream> =
        std::iter::once(first).chain((0..100).filter_map(|_| from("127.0.0.2"))).collect();
    assert_eq!(crowd.len(), 101);
    owner.write_all(&flight).unwrap();
    let mut answer = [0; 98];
    owner.read_exact(&mut answer).unwrap();
    assert!(host.receive(&mut &answer[..], &mut Vec::new()).unwrap().is_some());
}

#[test]
fn the_link_s_own_thread_speaks_for_an_owner_who_is_away() {
    // in real time, because what is shown is that a thread does it
    let timing = Timing { silence: Duration::from_millis(900), ..Timing::default() };
    let worker = Adder::start(config(Arc::new(key()), timing.clone()));
    let gate = worker.gate.lock().unwrap();
    let mut link = dial(&worker.at(), &key(), &terms("host"), &timing).unwrap();
    link.send_step(&[Span { session: 0, position: 0, count: 1 }], &[], rows(1, 0.0).as_slice().into())
        .unwrap();
    // the worker's owner is away; this side hears it all the same
    let early = link.receive(Some(Instant::now() + Duration::from_millis(1200)));
    assert!(matches!(early, Err(LinkError { kind: LinkErrorKind::Deadline { .. }, .. })), "{early:?}");
    drop(gate);
    assert!(matches!(link.receive(soon()), Ok(Event::Done { .. })));
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
        link.send_step(&[Span { session: 0, position, count: 1 }], &[], pattern.as_slice().into()).unwrap();
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

/// The code has 100 bits: who sends wrong ones, or preambles that end there, takes it from nobody.
#[test]
fn wrong_codes_and_half_handshakes_take_the_code_from_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let worker = Adder::start(config(Arc::new(KeyStore::at(dir.path())), Timing::default()));
    let code = worker.listener.open_pairing().unwrap();
    for _ in 0..20 {
        let wrong = pair_with(&worker, &PairingCode::random().unwrap());
        assert!(
            matches!(wrong, Err(LinkError { kind: LinkErrorKind::Handshake(HandshakeError::Key), .. })),
            "{wrong:?}"
        );
    }
    worker.until_noticed(|n| matches!(n, Notice::Refused { why, .. } if why == "wrong pairing code"));
    let halves: Vec<TcpStream> = (0..2 * MAX_STRANGERS)
        .map(|_| {
            let mut peer = TcpStream::connect(worker.listener.address()).unwrap();
            let (mut greeting, mut flight) = ([0; GREETING], Vec::new());
            peer.read_exact(&mut greeting).unwrap();
            let mut host = HostHandshake::new(&code.key(), Purpose::Pairing, dim_wire::VERSIONS);
            assert!(host.receive(&mut &greeting[..], &mut flight).unwrap().is_none());
            peer.write_all(&flight[..40]).unwrap();
            peer
        })
        .collect();
    pair_with(&worker, &code).unwrap();
    assert!(!worker.listener.is_pairing());
    drop(halves);
}

/// A ring whose disk is full the first time.
struct FullOnce(KeyStore, AtomicBool);

impl KeyRing for FullOnce {
    fn find(&self, named: &Named) -> Option<FoundKey> {
        self.0.find_named(|key| named.is(key))
    }

    fn holds(&self, id: KeyId) -> bool {
        self.0.holds(id)
    }

    fn add(&self, key: &Key, name: &str) -> Result<(), String> {
        match self.1.swap(false, Ordering::Relaxed) {
            true => Err("No space left on device".to_owned()),
            false => KeyRing::add(&self.0, key, name),
        }
    }
}

#[test]
fn a_key_that_cannot_be_kept_leaves_the_code_good_and_the_host_hears_why() {
    let dir = tempfile::tempdir().unwrap();
    let ring = FullOnce(KeyStore::at(dir.path()), AtomicBool::new(true));
    let worker = Adder::start(config(Arc::new(ring), Timing::default()));
    let code = worker.listener.open_pairing().unwrap();
    let full = pair_with(&worker, &code).unwrap_err();
    assert!(full.to_string().contains("No space left"), "{full}");
    worker.until_noticed(|n| matches!(n, Notice::NotPaired { why, .. } if why.contains("No space left")));
    assert!(worker.listener.is_pairing());
    pair_with(&worker, &code).unwrap();
    let used = pair_with(&worker, &code);
    assert!(matches!(used.unwrap_err().kind, LinkErrorKind::Handshake(HandshakeError::NoPairing)));
}

#[test]
fn a_key_that_is_taken_away_ends_the_connection_that_uses_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = KeyStore::at(dir.path());
    let (key, other) = (Key::random().unwrap(), Key::random().unwrap());
    store.add(&key, &Peer::default()).unwrap();
    store.add(&other, &Peer::default()).unwrap();
    let worker = Adder::start(config(Arc::new(store.clone()), Timing::default()));
    let mut link = dial(&worker.at(), &key, &terms("host"), &Timing::default()).unwrap();
    token(&mut link, 0).unwrap();
    // somebody else's key is no concern of this connection
    store.remove(other.id()).unwrap();
    let quiet = link.receive(Some(Instant::now() + Duration::from_millis(2500)));
    assert!(matches!(quiet.unwrap_err().kind, LinkErrorKind::Deadline { .. }));
    store.remove(key.id()).unwrap();
    let end = link.receive(soon()).unwrap_err();
    assert!(matches!(&end.kind, LinkErrorKind::Fault(f) if f.code == ErrorCode::Revoked), "{end}");
    assert!(!end.may_pass() && end.to_string().contains("taken away"), "{end}");
}

#[cfg(unix)]
#[test]
fn a_key_that_others_can_read_is_no_wrong_key_and_is_said_where_it_lies() {
    use std::os::unix::fs::PermissionsExt as _;
    let (_dir, store, key, file) = stored_key();
    let allow = |mode| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
    let worker = Adder::start(config(Arc::new(store), Timing::default()));
    let dial = || dial_to(&worker, &key);
    token(&mut dial().unwrap(), 0).unwrap();
    allow(0o644);
    let refused = dial().map(drop).unwrap_err();
    assert!(refused.may_pass() && refused.to_string().contains("read by others"), "{refused}");
    let says_where = |why: &str| why.contains(file.to_str().unwrap()) && why.contains("chmod 600");
    worker.until_noticed(|n| matches!(n, Notice::Refused { why, .. } if says_where(why)));
    // nothing is remembered of it
    allow(0o600);
    token(&mut dial().unwrap(), 0).unwrap();
}

/// What is wrong with a key file is said as it is, on both sides, and what passes by itself is not remembered.
#[cfg(unix)]
#[test]
fn a_key_file_that_is_damaged_or_cannot_be_read_is_told_from_one_that_others_read() {
    use std::os::unix::fs::DirBuilderExt as _;
    let (dir, store, key, file) = stored_key();
    let aside = dir.path().join("aside");
    // the store looks at the directory's time: as if nothing in it had changed for long
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
    let settle = || std::fs::File::open(dir.path()).unwrap().set_modified(long_ago).unwrap();
    settle();
    let worker = Adder::start(config(Arc::new(store), Timing::default()));
    let dial = || dial_to(&worker, &key);
    token(&mut dial().unwrap(), 0).unwrap();

    let good = std::fs::read(&file).unwrap();
    std::fs::write(&file, "rubbish").unwrap();
    let damaged = dial().map(drop).unwrap_err().to_string();
    assert!(damaged.contains("is damaged") && damaged.contains("pair again"), "{damaged}");
    std::fs::write(&file, &good).unwrap();
    token(&mut dial().unwrap(), 0).unwrap();

    // what cannot be read, whoever tries
    let hide = || {
        std::fs::rename(&file, &aside).unwrap();
        std::fs::DirBuilder::new().mode(0o700).create(&file).unwrap();
        settle();
    };
    let show = || {
        std::fs::remove_dir(&file).unwrap();
        std::fs::rename(&aside, &file).unwrap();
        settle();
    };
    hide();
    let unread = dial().map(drop).unwrap_err().to_string();
    assert!(unread.contains("cannot be read") && !unread.contains("others"), "{unread}");
    show();
    token(&mut dial().unwrap(), 0).unwrap();

    // a worker that could not read it when it first looked
    hide();
    let again = Adder::start(config(Arc::new(KeyStore::at(dir.path())), Timing::default()));
    let dial = || dial_to(&again, &key);
    dial().map(drop).unwrap_err();
    show();
    token(&mut dial().unwrap(), 0).unwrap();
}

/// A store in a folder of its own, its one key, and the file of that.
#[cfg(unix)]
fn stored_key() -> (tempfile::TempDir, KeyStore, Key, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let store = KeyStore::at(dir.path());
    let key = Key::random().unwrap();
    store.add(&key, &Peer::default()).unwrap();
    let file = dir.path().join(format!("{}.key", key.id()));
    (dir, store, key, file)
}

#[cfg(unix)]
fn dial_to(worker: &Adder, key: &Key) -> Result<Link, LinkError> {
    dial(&worker.at(), key, &terms("host"), &Timing::default())
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

/// A step that took no time.
fn at_once() -> ComputeTime {
    ComputeTime { began: Instant::now(), compute: Duration::ZERO, wait: Duration::ZERO }
}
