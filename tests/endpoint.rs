//! Two endpoints on simulated time: what PROTOCOL.md promises about silence, deadlines, slow and broken networks, to
//! the millisecond and without waiting for any.

mod simulation;

use dim_core::stage::Span;
use dim_wire::endpoint::{Ask, ClockOffset, ComputeTime, Endpoint, Timing};
use dim_wire::error::HandshakeError;
use dim_wire::fault::{ErrorCode, Farewell, Fault};
use dim_wire::frame::Store;
use dim_wire::handshake::{FIRST_FLIGHT, GREETING, HostHandshake, Lookup, Purpose};
use dim_wire::keys::Key;
use dim_wire::link_error::{Awaited, LinkErrorKind};
use dim_wire::message::{Message, Status};
use dim_wire::rows::RowsRef;
use dim_wire::terms::Reason;
use half::f16;
use proptest::prelude::*;
use simulation::{N_EMBD, Seen, World, key, ms, terms};

// --- times of a served host ------------------------------------------------------------------------------

#[test]
fn a_token_takes_two_latencies_and_the_worker_s_time() {
    let mut world = World::serving().with_latency(ms(5));
    world.compute = ms(7);
    for step in 1..=100 {
        let begun = world.elapsed_ms();
        world.host.send_rows(1, step as f32);
        world.run_for(ms(17));
        assert_eq!(world.trace, [(begun + 17, Seen::Answer(step, step as f32 + 1.0))]);
        world.trace.clear();
    }
    assert_eq!(world.host.endpoint.traffic().round_trips, 100);
}

#[test]
fn an_idle_link_lives_by_a_heartbeat_of_42_bytes_every_half_second() {
    let mut world = World::serving().with_latency(ms(20));
    let before = world.host.endpoint.traffic();
    world.run_for(ms(60_000));
    assert_eq!(world.trace, []);
    let after = world.host.endpoint.traffic();
    assert_eq!(after.bytes_sent - before.bytes_sent, 120 * 42);
    // the last one is still under way
    assert_eq!(after.bytes_received - before.bytes_received, 119 * 42);
}

#[test]
fn no_heartbeat_is_sent_beside_other_bytes() {
    let mut world = World::serving();
    for step in 0..100 {
        world.host.send_rows(1, step as f32);
        world.run_for(ms(400));
    }
    let traffic = world.host.endpoint.traffic();
    let handshake_and_hello = traffic.bytes_sent - 100 * (2 * u64::from(N_EMBD) + 50);
    assert!(handshake_and_hello < 400, "{handshake_and_hello} bytes that are no steps");
}

#[test]
fn a_pulled_cable_is_noticed_by_both_after_the_silence_and_not_before() {
    let mut world = World::serving();
    world.run_for(ms(10_000));
    world.freeze(true);
    world.run_for(ms(2_999));
    assert_eq!(world.trace, []);
    world.run_for(ms(1));
    let silent = LinkErrorKind::Silent { ms: 3_000 };
    let ends = world.seen();
    assert!(ends.contains(&Seen::Host(silent.clone())) && ends.contains(&Seen::Worker(silent)), "{ends:?}");
}

/// A host that looks up from its waiting ten times a second, for somebody who may have had enough.
#[test]
fn a_reader_that_looks_up_often_hears_the_silence_as_soon() {
    let mut world = World::serving();
    world.host.looks_up = true;
    world.run_for(ms(10_000));
    assert_eq!(world.trace, [], "heartbeats are heard");
    world.freeze(true);
    for _ in 0..29 {
        world.run_for(ms(100));
        assert_eq!(world.trace, []);
    }
    world.run_for(ms(101));
    let ends = world.seen();
    assert!(ends.contains(&Seen::Host(LinkErrorKind::Silent { ms: 3_000 })), "{ends:?}");
}

#[test]
fn a_stall_shorter_than_the_silence_is_only_a_delay() {
    // the last byte before it may be a heartbeat's, half a second old
    let mut world = World::serving();
    for (step, stall) in [(1, 100), (2, 500), (3, 2_000), (4, 2_499)] {
        world.freeze(true);
        world.host.send_rows(1, 1.0);
        world.run_for(ms(stall));
        assert_eq!(world.trace, [], "{stall} ms");
        world.freeze(false);
        world.run_for(ms(1));
        assert_eq!(world.seen(), [Seen::Answer(step, 2.0)], "{stall} ms");
    }
}

#[test]
fn a_worker_that_computes_for_longer_than_the_silence_is_not_lost() {
    for reads in [true, false] {
        let mut world = World::serving();
        (world.compute, world.reads_while_computing) = (ms(20_000), reads);
        world.host.send_rows(1, 1.0);
        world.run_for(ms(19_999));
        assert_eq!(world.trace, []);
        world.run_for(ms(1));
        assert_eq!(world.seen(), [Seen::Answer(1, 2.0)]);
    }
}

#[test]
fn a_host_whose_owner_is_away_loses_nothing_and_nobody() {
    let mut world = World::serving();
    world.host.send_rows(1, 1.0);
    world.host.reads = false;
    world.run_for(ms(60_000));
    assert_eq!(world.trace, []);
    world.host.reads = true;
    world.run_for(ms(1));
    assert_eq!(world.seen(), [Seen::Answer(1, 2.0)]);
}

/// A process that was stopped for longer than the silence: what lies in its buffers was said in time.
#[test]
fn what_arrived_while_nobody_looked_counts_before_the_time() {
    let mut world = World::serving();
    world.run_for(ms(100));
    let (now, later) = (world.now, world.now + ms(10_000));
    world.worker.endpoint.send(&Message::Ping(1)).unwrap();
    let mut bytes = Vec::new();
    assert!(world.worker.endpoint.poll_transmit(&[], &mut bytes, now));
    world.host.receive(&bytes, later);
    world.host.endpoint.handle_timeout(later);
    assert_eq!(world.host.endpoint.end(), None);
}

#[test]
fn a_worker_that_takes_no_bytes_but_is_heard_has_thirty_seconds() {
    let mut world = World::serving();
    world.to_worker.capacity = 10_000;
    world.to_worker.frozen = true;
    world.host.send_rows(512, 1.0);
    world.run_for(ms(29_000));
    // the worker hears nothing of the host: it has given up long ago, as its protocol tells it
    assert_eq!(
        world.seen(),
        [Seen::Worker(LinkErrorKind::Silent { ms: 3_000 }), Seen::Host(LinkErrorKind::Closed)]
    );

    // a worker that computes and reads nothing meanwhile
    let mut world = World::serving();
    world.to_worker.capacity = 10_000;
    (world.compute, world.reads_while_computing) = (ms(25_000), false);
    world.host.send_rows(1, 1.0);
    world.host.send_rows(512, 2.0);
    world.run_for(ms(24_999));
    assert!(world.host.unsent() > 0, "the buffers took everything");
    assert_eq!(world.trace, []);
    world.run_for(ms(30_000));
    assert_eq!(world.seen(), [Seen::Answer(1, 2.0), Seen::Answer(2, 3.0)]);

    // and one that does so for too long
    let mut world = World::serving();
    world.to_worker.capacity = 10_000;
    (world.compute, world.reads_while_computing) = (ms(40_000), false);
    world.host.send_rows(1, 1.0);
    world.host.send_rows(512, 2.0);
    world.run_for(ms(29_999));
    assert_eq!(world.trace, []);
    world.run_for(ms(1));
    assert_eq!(world.seen()[0], Seen::Host(LinkErrorKind::Stalled { ms: 30_000 }));
}

#[test]
fn a_blocked_send_ends_when_the_peer_falls_silent() {
    let mut world = World::serving();
    world.to_worker.capacity = 10_000;
    world.freeze(true);
    world.host.send_rows(512, 1.0);
    world.run_for(ms(3_000));
    assert!(world.seen().contains(&Seen::Host(LinkErrorKind::Silent { ms: 3_000 })));
    assert!(world.host.endpoint.is_halfway());
    assert!(!world.host.endpoint.poll_transmit(&[0; 1], &mut Vec::new(), world.now), "nothing may follow");
}

#[test]
fn a_slow_link_is_slow_and_nothing_else() {
    // a chunk takes more than twice as long as the silence, in each direction
    let timing = Timing { silence: ms(1_000), ..Timing::default() };
    let mut world = World::serving_with(&timing);
    let bytes = 512 * u64::from(N_EMBD) * 2;
    for pipe in [&mut world.to_worker, &mut world.to_host] {
        (pipe.bytes_per_s, pipe.capacity) = (Some(bytes * 10 / 24), 4_096);
    }
    world.host.send_rows(512, 1.0);
    world.run_for(ms(4_800));
    assert_eq!(world.trace, []);
    world.run_for(ms(200));
    assert_eq!(world.seen(), [Seen::Answer(1, 2.0)]);
}

#[test]
fn prompt_chunks_both_ways_over_full_buffers_do_not_lock_up() {
    let mut world = World::serving().with_latency(ms(3));
    for pipe in [&mut world.to_worker, &mut world.to_host] {
        (pipe.bytes_per_s, pipe.capacity) = (Some(1 << 20), 4_096);
    }
    for n in 0..64 {
        world.host.send_rows(512, n as f32);
    }
    world.run_for(ms(6_000));
    let answers: Vec<Seen> = (0..64).map(|n| Seen::Answer(n + 1, n as f32 + 1.0)).collect();
    assert_eq!(world.seen(), answers);
}

#[test]
fn a_ping_measures_the_round_trip_and_is_answered_behind_a_message_that_is_halfway() {
    let mut world = World::serving().with_latency(ms(8));
    world.host.endpoint.ping(world.now).unwrap();
    world.run_for(ms(16));
    assert_eq!(world.host.endpoint.round_trip_time(), Some(ms(16)));

    // the worker's answer of 64 KiB fills a narrow pipe when the second PING comes
    (world.to_host.bytes_per_s, world.to_host.capacity) = (Some(100_000), 2_000);
    world.host.send_rows(512, 1.0);
    world.run_for(ms(20));
    world.host.endpoint.ping(world.now).unwrap();
    world.run_for(ms(2_000));
    assert_eq!(world.seen(), [Seen::Answer(1, 2.0)]);
    assert!(world.host.endpoint.round_trip_time().is_some_and(|time| time > ms(500)));
}

#[test]
fn heartbeats_carry_how_the_peer_is() {
    let mut world = World::serving();
    let status = Status { battery_percent: Some(40), step: 3, ..Status::default() };
    world.worker.endpoint.set_status(status);
    world.run_for(ms(500));
    assert_eq!(world.host.endpoint.peer_status(), Some(status));
}

// --- ends ------------------------------------------------------------------------------------------------

#[test]
fn last_words_count_more_than_the_close_behind_them() {
    let fault =
        Fault { block: Some(17), count: 3, ..Fault::new(ErrorCode::NonFinite, "3 values are not finite") };
    let mut world = World::serving().with_latency(ms(1));
    world.worker.endpoint.fail(fault.clone());
    world.worker.endpoint.broken(LinkErrorKind::Stopped);
    world.run_for(ms(10));
    let ends = world.seen();
    assert!(ends.contains(&Seen::Host(LinkErrorKind::Fault(fault))), "{ends:?}");

    let mut world = World::serving();
    world.worker.endpoint.goodbye(Farewell::Pausing);
    world.run_for(ms(1));
    assert_eq!(
        world.seen(),
        [Seen::Host(LinkErrorKind::Goodbye(Farewell::Pausing)), Seen::Worker(LinkErrorKind::Closed)]
    );
}

/// Both in one read, before anybody looks: what was said first is understood later.
#[test]
fn a_goodbye_is_not_hidden_by_the_end_of_the_connection_behind_it() {
    let mut world = World::serving();
    world.worker.endpoint.goodbye(Farewell::Pausing);
    let mut bytes = Vec::new();
    assert!(world.worker.endpoint.poll_transmit(&[], &mut bytes, world.now));
    world.host.receive(&bytes, world.now);
    world.host.endpoint.closed();
    let goodbye = LinkErrorKind::Goodbye(Farewell::Pausing);
    let host = &mut world.host.endpoint;
    assert_eq!(host.poll_event(&mut Store::default(), world.now).unwrap_err(), goodbye);
    assert_eq!(host.end(), Some(&goodbye));
}

#[test]
fn answers_that_arrived_before_the_end_are_still_given() {
    let mut world = World::serving();
    world.host.reads = false;
    world.host.send_rows(1, 1.0);
    world.run_for(ms(10));
    world.worker.endpoint.goodbye(Farewell::ShuttingDown);
    world.worker.endpoint.broken(LinkErrorKind::Stopped);
    world.run_for(ms(10));
    world.seen();
    world.host.reads = true;
    world.run_for(ms(10));
    let goodbye = Seen::Host(LinkErrorKind::Goodbye(Farewell::ShuttingDown));
    assert_eq!(world.seen(), [Seen::Answer(1, 2.0), goodbye]);
}

#[test]
fn who_breaks_a_rule_is_told_which() {
    let mut world = World::serving();
    // a REWIND past the end, which the host's own books would not let through
    world.host.endpoint.send(&Message::Rewind { session: 0, position: 0 }).unwrap();
    let mut bytes = Vec::new();
    world.host.endpoint.poll_transmit(&[], &mut bytes, world.now);
    bytes[9] ^= 1;
    world.worker.receive(&bytes, world.now);
    world.run_for(ms(1));
    let ends = world.seen();
    let broke =
        |seen: &Seen, rule: &str| matches!(seen, Seen::Worker(LinkErrorKind::Broke(e)) if e.rule() == rule);
    assert!(ends.iter().any(|e| broke(e, "bad-tag")), "{ends:?}");
    assert!(ends.contains(&Seen::Host(LinkErrorKind::Closed)), "altered bytes are not answered: {ends:?}");

    // a STEP_DONE that nobody asked for is
    let mut world = World::serving();
    let rows = [f16::ONE; N_EMBD as usize];
    let time = ComputeTime { began: world.now, compute: ms(0), wait: ms(0) };
    let rule = world.worker.endpoint.send_step_done(1, 1, RowsRef::F16(&rows), time).unwrap_err().rule();
    assert_eq!(rule, "step-id", "this side's own books refuse it first");
}

#[test]
fn nothing_is_sent_that_would_break_a_rule() {
    let mut world = World::serving();
    let host = &mut world.host.endpoint;
    let mut values = vec![f16::ONE; N_EMBD as usize];
    values[7] = f16::INFINITY;
    let span = [Span { session: 0, position: 0, count: 1 }];
    assert_eq!(host.send_step(&span, &[], RowsRef::F16(&values)).unwrap_err().rule(), "non-finite");
    assert!(!host.is_sending() && !host.is_halfway());
    values[7] = f16::ONE;
    assert_eq!(host.send_step(&span, &[], RowsRef::F16(&values)), Ok(1));
}

/// How far ahead a peer's clock is, whatever the way takes as long as it takes the same both ways.
#[test]
fn clocks_are_told_by_the_quickest_ping() {
    let begun = std::time::Instant::now();
    let mut worker = worker_at(begun);
    // the host's clock begins a quarter of a second later
    let now = begun + ms(250);
    let mut host = Endpoint::host(&key(), Ask::Serve(Box::new(terms("host"))), &Timing::default(), now);
    exchange(&mut host, &mut worker, now);
    let mut current = Store::default();
    let Ok(Some(_)) = worker.poll_event(&mut current, now) else { panic!() };
    let agreed = dim_wire::terms::agree(&terms("host"), &terms("worker")).unwrap();
    worker.accept(terms("worker"), agreed, now);
    exchange(&mut host, &mut worker, now);
    let Ok(Some(_)) = host.poll_event(&mut current, now) else { panic!() };
    assert_eq!(host.clock_offset(), None);
    let mut ping = |there_ms: u64, back_ms: u64| {
        host.ping(now).unwrap();
        let mut bytes = Vec::new();
        assert!(host.poll_transmit(&[], &mut bytes, now));
        assert_eq!(worker.receive(&bytes, now + ms(there_ms)), bytes.len());
        bytes.clear();
        assert!(worker.poll_transmit(&[], &mut bytes, now + ms(there_ms)));
        assert_eq!(host.receive(&bytes, now + ms(there_ms + back_ms)), bytes.len());
        host.clock_offset().unwrap()
    };
    assert_eq!(ping(20, 20), ClockOffset { us: 250_000, within_us: 20_000 });
    assert_eq!(ping(5, 25), ClockOffset { us: 240_000, within_us: 15_000 }, "off by no more than it says");
    assert_eq!(ping(50, 10), ClockOffset { us: 240_000, within_us: 15_000 }, "a slow one says less");
    assert_eq!(ping(0, 0), ClockOffset { us: 250_000, within_us: 0 });
    // and a step's beginning is told on that clock
    assert_eq!(worker.clock_us(now), 250_000);
}

// --- the opening -----------------------------------------------------------------------------------------

#[test]
fn a_drip_feed_is_closed_at_the_absolute_deadline() {
    for pace in [10, 30, 60, 1_000, 5_000] {
        let begun = std::time::Instant::now();
        let (mut worker, _, flight) = greeted_at(begun);
        let mut now = begun;
        for byte in &flight[..FIRST_FLIGHT - 1] {
            worker.receive(&[*byte], now);
            let next = now + ms(pace);
            let due = worker.poll_timeout().expect("a stranger has a deadline");
            if due <= next {
                now = due;
                worker.handle_timeout(now);
                break;
            }
            now = next;
        }
        if pace >= 30 {
            assert_eq!(
                worker.end(),
                Some(&LinkErrorKind::Deadline { awaited: Awaited::Handshake, ms: 2_000 })
            );
            assert_eq!(now - begun, ms(2_000), "one byte every {pace} ms");
        } else {
            assert_eq!(worker.end(), None, "who is fast enough is let in");
        }
    }
}

#[test]
fn a_key_holder_that_says_nothing_is_closed_after_five_seconds() {
    let now = std::time::Instant::now();
    let (mut worker, mut host, flight) = greeted_at(now);
    worker.receive(&flight, now);
    let mut answer = Vec::new();
    assert!(worker.poll_transmit(&[], &mut answer, now));
    worker.sent(answer.len(), now);
    assert!(host.receive(&mut &answer[..], &mut Vec::new()).unwrap().is_some());
    assert_eq!(worker.poll_timeout(), Some(now + ms(5_000)));
    worker.handle_timeout(now + ms(4_999));
    assert_eq!(worker.end(), None);
    worker.handle_timeout(now + ms(5_000));
    assert_eq!(worker.end(), Some(&LinkErrorKind::Deadline { awaited: Awaited::Need, ms: 5_000 }));
}

fn worker_at(now: std::time::Instant) -> Endpoint {
    Endpoint::worker(Box::new(|_| Lookup::Found(key())), &Timing::default(), now).unwrap()
}

/// A worker that has greeted, the host that was, and its first flight.
fn greeted_at(now: std::time::Instant) -> (Endpoint, HostHandshake, Vec<u8>) {
    let mut worker = worker_at(now);
    let mut host = HostHandshake::new(&key(), Purpose::Key, dim_wire::VERSIONS);
    let (mut greeting, mut flight) = (Vec::new(), Vec::new());
    assert!(worker.poll_transmit(&[], &mut greeting, now));
    worker.sent(greeting.len(), now);
    assert!(host.receive(&mut &greeting[..], &mut flight).unwrap().is_none());
    assert_eq!((greeting.len(), flight.len()), (GREETING, FIRST_FLIGHT));
    (worker, host, flight)
}

#[test]
fn a_worker_that_does_not_answer_is_given_up_after_five_seconds() {
    let mut world = World::new(&Timing::default(), Ask::Serve(Box::new(terms("host"))));
    world.freeze(true);
    world.run_for(ms(4_999));
    world.seen();
    world.run_for(ms(1));
    assert_eq!(
        world.seen(),
        [Seen::Host(LinkErrorKind::Deadline { awaited: Awaited::Handshake, ms: 5_000 })]
    );
}

#[test]
fn a_worker_that_prepares_has_a_minute_while_it_is_heard_and_three_seconds_after() {
    let preparing = |heard_for_ms: u64| {
        let mut world = World::new(&Timing::default(), Ask::Serve(Box::new(terms("host"))));
        world.accepts = false;
        world.run_for(ms(0));
        while world.elapsed_ms() < heard_for_ms {
            if world.worker.endpoint.send(&Message::Heartbeat(Status::default())).is_err() {
                break;
            }
            world.run_for(ms(500));
        }
        world.run_for(ms(100_000));
        let ended = |(at, seen): &(u64, Seen)| matches!(seen, Seen::Host(_)).then_some((*at, seen.clone()));
        world.trace.iter().find_map(ended).unwrap()
    };
    let end = |ms| Seen::Host(LinkErrorKind::Deadline { awaited: Awaited::Answer, ms });
    assert_eq!(preparing(0), (5_000, end(5_000)));
    assert_eq!(preparing(4_500), (7_000, end(7_000)), "3 s after the last heartbeat");
    assert_eq!(preparing(90_000), (60_000, end(60_000)));
}

#[test]
fn a_wrong_key_ends_the_handshake_and_says_so() {
    let now = std::time::Instant::now();
    let mut host = Endpoint::host(&Key::from_bytes([9; 32]), Ask::Inquire, &Timing::default(), now);
    let mut worker = Endpoint::worker(Box::new(|_| Lookup::Unknown), &Timing::default(), now).unwrap();
    exchange(&mut host, &mut worker, now);
    let refused = LinkErrorKind::Handshake(HandshakeError::Key);
    assert_eq!((host.end(), worker.end()), (Some(&refused), Some(&refused)));
}

#[test]
fn a_refusal_names_every_difference_on_both_sides() {
    let now = std::time::Instant::now();
    let need = dim_wire::Terms { n_ctx: 1 << 21, max_sessions: 5, ..terms("host") };
    let mut host = Endpoint::host(&key(), Ask::Serve(Box::new(need)), &Timing::default(), now);
    let mut worker = worker_at(now);
    exchange(&mut host, &mut worker, now);
    let mut current = Store::default();
    let Ok(Some(received)) = worker.poll_event(&mut current, now) else { panic!() };
    let Message::Hello(hello) = received.message else { panic!() };
    let differences = dim_wire::terms::agree(&hello, &terms("worker")).unwrap_err();
    worker.refuse(Reason::Context, terms("worker"), "no".into());
    exchange(&mut host, &mut worker, now);
    match host.poll_event(&mut Store::default(), now) {
        Err(LinkErrorKind::Refused { reason: Reason::Context, mismatches, text }) => {
            assert_eq!((mismatches, text.as_str()), (differences, "no"));
        }
        other => panic!("{other:?}"),
    }
}

/// Passes bytes on until neither side has any.
fn exchange(host: &mut Endpoint, worker: &mut Endpoint, now: std::time::Instant) {
    loop {
        let (mut there, mut back) = (Vec::new(), Vec::new());
        while host.poll_transmit(&[], &mut there, now) {}
        worker.receive(&there, now);
        while worker.poll_transmit(&[], &mut back, now) {}
        host.receive(&back, now);
        if there.is_empty() && back.is_empty() {
            return;
        }
    }
}

#[test]
fn a_granted_key_is_not_shown() {
    let granted =
        Message::PairGrant { key: Key::from_bytes([0xAB; 32]), name: "a".into(), software: "b".into() };
    let shown = format!("{granted:?}");
    assert!(!shown.contains("171") && !shown.to_lowercase().contains("abab"), "{shown}");
}

// --- any network -----------------------------------------------------------------------------------------

/// A life on a network that delays, slows, narrows and stalls as the numbers say.
fn life(script: &[(u8, u16)], latency: u64, capacity: usize) -> Vec<(u64, Seen)> {
    let mut world = World::serving().with_latency(ms(latency));
    (world.to_worker.capacity, world.to_host.capacity) = (capacity, capacity * 2);
    let mut steps = 0;
    for &(what, number) in script {
        match what % 6 {
            0 | 1 => {
                world.host.send_rows(u32::from(number) % 200 + 1, steps as f32);
                steps += 1;
            }
            2 => world.run_for(ms(u64::from(number) % 1_000)),
            3 => world.compute = ms(u64::from(number) % 4_000),
            4 => {
                world.freeze(true);
                world.run_for(ms(u64::from(number) % 2_400));
                world.freeze(false);
                world.run_for(ms(latency * 2 + 600));
            }
            _ => world.to_host.bytes_per_s = Some(50_000 + u64::from(number) * 100),
        }
    }
    world.run_for(ms(1_000_000));
    world.trace
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn every_step_is_answered_in_order_and_the_same_script_gives_the_same_trace(
        script in prop::collection::vec((any::<u8>(), any::<u16>()), 1..40),
        latency in 0u64..200,
        capacity in 500usize..100_000,
    ) {
        let trace = life(&script, latency, capacity);
        let steps = script.iter().filter(|(what, _)| what % 6 < 2).count() as u32;
        let answers: Vec<Seen> = trace.iter().map(|(_, seen)| seen.clone()).collect();
        let right: Vec<Seen> = (0..steps).map(|n| Seen::Answer(n + 1, n as f32 + 1.0)).collect();
        prop_assert_eq!(answers, right);
        prop_assert_eq!(life(&script, latency, capacity), trace);
    }
}
