//! The protocol in memory, without sockets or time: frames split, garbled, repeated and reflected; any bytes
//! where messages should be; and host and worker through random lives with a hostile network between them.

use std::collections::VecDeque;

use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use dim_core::random::{GOLDEN, mix};
use dim_wire::connection::{Connection, Role};
use dim_wire::error::{FrameError, ReceiveError};
use dim_wire::frame::{Inbox, MAX_BODY, Opener, Outgoing, Sealer, Store, wire_bytes};
use dim_wire::handshake::{
    Established, FIRST_FLIGHT, GREETING, HostHandshake, Lookup, PREAMBLE, Purpose, SECOND_FLIGHT,
    WorkerHandshake,
};
use dim_wire::keys::Key;
use dim_wire::message::{DoneHead, Kind, MAX_PARTS, Message, Span, encode_step_done_head, encode_step_head};
use dim_wire::rows::{Layout, Part, PartType, RowTypes, RowsRef, Shape, as_bytes};
use dim_wire::terms::{self, Agreed, Reason, SliceRole, Terms};
use half::f16;
use proptest::prelude::*;

// --- frames ----------------------------------------------------------------------------------------------

fn message(length: usize, seed: u8) -> Vec<u8> {
    let mut m: Vec<u8> = (0..length).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect();
    m[4..8].copy_from_slice(&(length as u32).to_le_bytes());
    m
}

fn seal_into(sealer: &mut Sealer, head: &[u8], rows: &[u8], out: &mut Vec<u8>) {
    let mut outgoing = Outgoing::new(head, rows);
    while sealer.seal(&mut outgoing, out).unwrap() {}
}

fn sealed(key: &[u8; 32], messages: &[Vec<u8>]) -> Vec<u8> {
    let mut sealer = Sealer::new(key);
    let mut stream = Vec::new();
    for m in messages {
        let (head, rows) = m.split_at(8);
        seal_into(&mut sealer, head, rows, &mut stream);
    }
    stream
}

const KEY: [u8; 32] = [9; 32];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// However a stream is cut into reads, and whether messages are released in place or taken out, the same
    /// comes out.
    #[test]
    fn a_stream_split_anywhere_is_the_same_messages(
        lengths in prop::collection::vec(prop_oneof![8usize..64, 8usize..4096, 65_500usize..65_540, 131_000usize..131_100], 1..6),
        reads in prop::collection::vec(prop_oneof![1usize..40, 1usize..70_000], 1..40),
        take in any::<bool>(),
    ) {
        let messages: Vec<Vec<u8>> = lengths.iter().enumerate().map(|(i, &n)| message(n, i as u8)).collect();
        let stream = sealed(&KEY, &messages);
        prop_assert_eq!(stream.len(), lengths.iter().map(|&n| wire_bytes(n)).sum::<usize>());
        let mut inbox = Inbox::new(Opener::new(&KEY), 200_000);
        let mut store = Store::default();
        let (mut rest, mut got) = (&stream[..], Vec::new());
        let mut reads = reads.iter().cycle();
        loop {
            while inbox.poll().unwrap() {
                prop_assert_eq!(inbox.message().as_ptr().align_offset(64), 0);
                if take {
                    inbox.take(&mut store);
                    got.push(store.message().to_vec());
                } else {
                    got.push(inbox.message().to_vec());
                    inbox.release();
                }
            }
            if rest.is_empty() {
                break;
            }
            let n = (*reads.next().unwrap()).min(rest.len());
            let n = inbox.fill(&rest[..n]);
            prop_assert!(n > 0, "no room though no message waits");
            rest = &rest[n..];
        }
        prop_assert!(got == messages);
        prop_assert!(inbox.is_between_messages());
    }

    /// Any bytes at all: an error or silence, never a message.
    #[test]
    fn garbage_is_never_a_message(bytes in prop::collection::vec(any::<u8>(), 0..5000), limit in 0usize..10_000) {
        let mut inbox = Inbox::new(Opener::new(&KEY), limit);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let n = inbox.fill(rest);
            rest = &rest[n..];
            match inbox.poll() {
                Ok(complete) => prop_assert!(!complete),
                Err(first) => {
                    prop_assert_eq!(inbox.poll(), Err(first), "an error stays");
                    prop_assert!(inbox.space().is_empty());
                    break;
                }
            }
        }
    }

    /// A message above the limit is refused from its first frame's two clear bytes, or from its header.
    #[test]
    fn what_is_longer_than_the_limit_is_refused_before_it_arrives(limit in 8usize..150_000, over in 1usize..100_000) {
        let length = limit + over;
        let stream = sealed(&KEY, &[message(length, 1)]);
        let mut inbox = Inbox::new(Opener::new(&KEY), limit);
        let first_frame = wire_bytes(length.min(MAX_BODY));
        let mut fed = 0;
        let error = loop {
            match inbox.poll() {
                Err(error) => break error,
                Ok(complete) => prop_assert!(!complete),
            }
            prop_assert!(fed < first_frame, "the second frame was waited for");
            fed += inbox.fill(&stream[fed..(fed + 1000).min(first_frame)]);
        };
        prop_assert!(matches!(error, FrameError::TooLong { .. }), "{:?}", error);
    }

    /// Messages survive writing and reading; reading never panics and never reads past the end.
    #[test]
    fn any_bytes_are_a_message_or_a_named_error(
        kind in prop_oneof![prop::sample::select(Kind::ALL.map(|k| k as u8).to_vec()), any::<u8>()],
        a in prop_oneof![Just(0u8), 1u8..4, any::<u8>()],
        b in prop_oneof![Just(0u16), 1u16..70, any::<u16>()],
        body in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..400),
        n_embd in prop_oneof![1u32..16, any::<u32>()],
        reads_tokens in any::<bool>(),
    ) {
        let mut bytes = vec![kind, a];
        bytes.extend(b.to_le_bytes());
        bytes.extend((8 + body.len() as u32).to_le_bytes());
        bytes.extend(&body);
        let shape = Shape { reads_tokens, ..Shape::hidden(n_embd) };
        if let Ok(message) = Message::decode(&bytes, &shape) {
            let mut again = Vec::new();
            message.encode(&mut again);
            let text_was_made_safe = again.len() != bytes.len() || matches!(message.kind(), Kind::Error | Kind::StepFailed);
            if !text_was_made_safe {
                prop_assert_eq!(Message::decode(&again, &shape), Ok(message));
            }
        }
    }
}

#[test]
fn every_flipped_bit_of_a_thousand_frames_is_noticed() {
    let mut sealer = Sealer::new(&KEY);
    for number in 0..1000u64 {
        let plain = message(16 + (number as usize % 5), number as u8);
        let mut stream = Vec::new();
        let mut fresh = Sealer::new(&[number as u8; 32]);
        seal_into(&mut fresh, &plain, &[], &mut stream);
        seal_into(&mut sealer, &plain, &[], &mut Vec::new());
        for bit in 0..stream.len() * 8 {
            stream[bit / 8] ^= 1 << (bit % 8);
            let mut inbox = Inbox::new(Opener::new(&[number as u8; 32]), 4096);
            inbox.fill(&stream);
            // a length made larger waits for bytes that never come: the caller's deadline
            assert_ne!(inbox.poll(), Ok(true), "bit {bit} of frame {number}");
            stream[bit / 8] ^= 1 << (bit % 8);
        }
        let mut inbox = Inbox::new(Opener::new(&[number as u8; 32]), 4096);
        inbox.fill(&stream);
        assert_eq!(inbox.poll(), Ok(true), "the frame itself is good");
    }
}

#[test]
fn frames_repeated_reordered_reflected_or_spliced_are_refused() {
    let frames: Vec<Vec<u8>> = {
        let mut sealer = Sealer::new(&KEY);
        (0..4)
            .map(|i| {
                let mut out = Vec::new();
                seal_into(&mut sealer, &message(20, i), &[], &mut out);
                out
            })
            .collect()
    };
    let other = sealed(&[8; 32], &[message(20, 0)]);
    let orders: [(&str, Vec<&Vec<u8>>, usize); 6] = [
        ("as sent", vec![&frames[0], &frames[1], &frames[2], &frames[3]], 4),
        ("repeated", vec![&frames[0], &frames[0]], 1),
        ("reordered", vec![&frames[0], &frames[2], &frames[1]], 1),
        ("one left out", vec![&frames[0], &frames[1], &frames[3]], 2),
        ("another connection's", vec![&frames[0], &other], 1),
        ("first again at the end", vec![&frames[0], &frames[1], &frames[2], &frames[3], &frames[0]], 4),
    ];
    for (name, order, expected) in orders {
        let mut inbox = Inbox::new(Opener::new(&KEY), 4096);
        let mut messages = 0;
        for frame in order {
            inbox.fill(frame);
            match inbox.poll() {
                Ok(true) => messages += 1,
                other => {
                    assert!(matches!(other, Err(FrameError::BadTag { .. })), "{name}: {other:?}");
                    break;
                }
            }
            inbox.release();
        }
        assert_eq!(messages, expected, "{name}");
    }
    // reflected: the sender's own inbox opens with the other direction's key
    let (host, _) = shake();
    let mut host_sealer = host.sealer;
    let mut inbox = Inbox::new(host.opener, 4096);
    let mut own = Vec::new();
    seal_into(&mut host_sealer, &message(20, 0), &[], &mut own);
    inbox.fill(&own);
    assert!(matches!(inbox.poll(), Err(FrameError::BadTag { number: 0 })));
}

#[test]
fn a_limit_is_checked_before_memory_is_taken() {
    // a first frame whose header says 2 GiB less one byte, under a limit of 1 MiB
    let mut head = message(100, 0);
    head[4..8].copy_from_slice(&(u32::MAX / 2).to_le_bytes());
    let mut out = Vec::new();
    let mut sealer = Sealer::new(&KEY);
    assert!(sealer.seal(&mut Outgoing::new(&head, &[]), &mut out).unwrap());
    let mut inbox = Inbox::new(Opener::new(&KEY), 1 << 20);
    inbox.fill(&out);
    assert!(matches!(inbox.poll(), Err(FrameError::TooLong { length: 0x7FFF_FFFF, limit: 0x10_0000 })));
}

// --- handshake -------------------------------------------------------------------------------------------

fn shake() -> (Established, Established) {
    let key = Key::from_bytes([3; 32]);
    let (mut host, mut worker, flight) = met(&key);
    let verdict = worker.receive(&mut &flight[..], |_| Lookup::Found(key.clone())).unwrap();
    let established = host.receive(&mut &verdict.answer[..], &mut Vec::new()).unwrap().unwrap();
    (established, verdict.outcome.unwrap())
}

/// A worker that has greeted a host, and the host's first flight.
fn met(host: &Key) -> (HostHandshake, WorkerHandshake, Vec<u8>) {
    let mut host = HostHandshake::new(host, Purpose::Key, 2..=2);
    let worker = WorkerHandshake::new(2..=2).unwrap();
    let mut flight = Vec::new();
    assert!(host.receive(&mut &worker.greeting()[..], &mut flight).unwrap().is_none());
    (host, worker, flight)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Bytes of the handshake may come in any pieces, and what follows it is left alone.
    #[test]
    fn a_handshake_split_anywhere_is_the_same(pieces in prop::collection::vec(1usize..30, 1..20)) {
        let key = Key::from_bytes([3; 32]);
        let mut host = HostHandshake::new(&key, Purpose::Key, 1..=3);
        let mut worker = WorkerHandshake::new(1..=2).unwrap();
        let (mut at, mut pieces) = (0, pieces.iter().cycle());
        let (greeting, mut flight) = (worker.greeting(), Vec::new());
        while at < greeting.len() {
            prop_assert!(flight.is_empty());
            let end = (at + pieces.next().unwrap()).min(greeting.len());
            let mut input = &greeting[at..end];
            prop_assert!(host.receive(&mut input, &mut flight).unwrap().is_none());
            at = end - input.len();
        }
        flight.extend(b"what follows");
        at = 0;
        let verdict = loop {
            let end = (at + pieces.next().unwrap()).min(flight.len());
            let mut input = &flight[at..end];
            let verdict = worker.receive(&mut input, |named| match named.is(&key) {
                true => Lookup::Found(key.clone()),
                false => Lookup::Unknown,
            });
            at = end - input.len();
            if let Some(verdict) = verdict {
                break verdict;
            }
        };
        prop_assert_eq!(&flight[at..], b"what follows");
        let mut answer = verdict.answer.clone();
        answer.extend(b"what follows");
        let mut at = 0;
        let established = loop {
            let end = (at + pieces.next().unwrap()).min(answer.len());
            let mut input = &answer[at..end];
            let done = host.receive(&mut input, &mut Vec::new()).unwrap();
            at = end - input.len();
            if let Some(established) = done {
                break established;
            }
        };
        prop_assert_eq!(&answer[at..], b"what follows");
        prop_assert_eq!(established.version, 2);
        prop_assert_eq!(established.hash, verdict.outcome.unwrap().hash);
    }

    #[test]
    fn garbage_is_never_a_handshake(bytes in prop::collection::vec(any::<u8>(), 0..200), magic in any::<bool>()) {
        let mut flight = if magic { dim_wire::handshake::MAGIC.to_vec() } else { Vec::new() };
        flight.extend(bytes);
        let mut worker = WorkerHandshake::new(2..=2).unwrap();
        let key = Key::from_bytes([3; 32]);
        if let Some(verdict) = worker.receive(&mut &flight[..], |_| Lookup::Found(key)) {
            prop_assert!(verdict.outcome.is_err());
        }
        prop_assert_eq!(worker.curve_work(), 0);
        let mut host = HostHandshake::new(&Key::from_bytes([3; 32]), Purpose::Key, 2..=2);
        prop_assert!(!matches!(host.receive(&mut &flight[..], &mut Vec::new()), Ok(Some(_))));
    }
}

#[test]
fn every_flipped_bit_of_a_handshake_is_noticed() {
    let key = Key::from_bytes([3; 32]);
    let mut refused_by = [0; 3];
    for bit in 0..GREETING * 8 {
        let mut host = HostHandshake::new(&key, Purpose::Key, 2..=2);
        let mut worker = WorkerHandshake::new(2..=2).unwrap();
        let (mut greeting, mut flight) = (worker.greeting(), Vec::new());
        greeting[bit / 8] ^= 1 << (bit % 8);
        // what the host does not refuse by itself the worker does: it is in the prologue
        if host.receive(&mut &greeting[..], &mut flight).is_ok() {
            let verdict = worker.receive(&mut &flight[..], |_| Lookup::Found(key.clone())).unwrap();
            assert!(verdict.outcome.is_err(), "bit {bit} of the worker's greeting");
        }
        refused_by[0] += 1;
    }
    for bit in 0..FIRST_FLIGHT * 8 {
        let (_, mut worker, mut flight) = met(&key);
        flight[bit / 8] ^= 1 << (bit % 8);
        // a worker that finds the key by any mark: the mark is bound too
        let verdict = worker.receive(&mut &flight[..], |_| Lookup::Found(key.clone())).unwrap();
        // X25519 ignores the top bit of a public key, but the tag covers it
        assert!(verdict.outcome.is_err(), "bit {bit} of the host's flight");
        assert_eq!(worker.curve_work(), 0);
        refused_by[1] += 1;
    }
    for bit in 0..SECOND_FLIGHT * 8 {
        let (mut host, mut worker, flight) = met(&key);
        let verdict = worker.receive(&mut &flight[..], |_| Lookup::Found(key.clone())).unwrap();
        let mut answer = verdict.answer;
        answer[bit / 8] ^= 1 << (bit % 8);
        assert!(host.receive(&mut &answer[..], &mut Vec::new()).is_err(), "bit {bit} of the worker's answer");
        refused_by[2] += 1;
    }
    assert_eq!(refused_by, [256, 656, 784]);
}

#[test]
fn a_hundred_thousand_strangers_get_nothing_and_cost_no_curve_work() {
    // none, wrong and old keys; a host's flight is costly, so each is used under many wrong keys
    let ours = Key::from_bytes([1; 32]);
    let flights: Vec<_> = (0..100u8).map(|n| met(&Key::from_bytes([100 + n % 100; 32])).2).collect();
    let mut accepted = 0;
    for n in 0..100_000usize {
        let mut flight = flights[n % flights.len()].clone();
        flight[PREAMBLE + 2 + n % 48] ^= (n / 4800) as u8;
        let mut worker = WorkerHandshake::new(2..=2).unwrap();
        let verdict = worker.receive(&mut &flight[..], |_| Lookup::Found(ours.clone())).unwrap();
        accepted += u32::from(verdict.outcome.is_ok());
        assert_eq!(worker.curve_work(), 0);
        assert_eq!(verdict.answer.len(), 24);
    }
    assert_eq!(accepted, 0);
}

/// What was overheard of one handshake is worth nothing in another, and does not show that the host is the same.
#[test]
fn a_first_flight_is_good_for_one_greeting_and_no_two_are_alike() {
    let key = Key::from_bytes([3; 32]);
    let (_, mut worker, flight) = met(&key);
    for _ in 0..100 {
        let mut other = WorkerHandshake::new(2..=2).unwrap();
        let verdict = other.receive(&mut &flight[..], |_| Lookup::Found(key.clone())).unwrap();
        assert!(
            verdict.outcome.is_err() && other.curve_work() == 0,
            "a flight that was meant for another greeting"
        );
    }
    let named = worker.receive(&mut &flight[..], |named| match named.is(&key) {
        true => Lookup::Found(key.clone()),
        false => Lookup::Unknown,
    });
    assert!(named.unwrap().outcome.is_ok());
    // who plays the worker with one and the same nonce each time learns no name to know the host again by
    let fixed = WorkerHandshake::with_secrets(2..=2, [1; 16], [2; 32]).greeting();
    let mut marks = std::collections::BTreeSet::new();
    for _ in 0..100 {
        let (mut host, mut flight) = (HostHandshake::new(&key, Purpose::Key, 2..=2), Vec::new());
        host.receive(&mut &fixed[..], &mut flight).unwrap();
        marks.insert(flight[24..32].to_vec());
    }
    assert_eq!(marks.len(), 100);
}

// --- messages and terms ----------------------------------------------------------------------------------

fn host_terms() -> Terms {
    Terms {
        row_types: RowTypes::F32,
        role: SliceRole::Middle,
        shape: Shape::hidden(4),
        n_blocks: 12,
        blocks: BlockRange { first: 3, last: 5 },
        n_ctx: 64,
        max_rows: 16,
        max_sessions: 3,
        max_in_flight: 4,
        model: Some(Sha([1; 32])),
        slice: Some(Sha([2; 32])),
        params: Some(Sha([3; 32])),
        arch: "llama".into(),
        ..Terms::blank(2, "test", "host")
    }
}

fn agreed() -> Agreed {
    terms::agree(&host_terms(), &host_terms()).unwrap()
}

#[test]
fn a_token_costs_at_most_64_bytes_more_than_its_values_each_way() {
    for n_embd in [1usize, 64, 896, 1536, 3584, 8192, 16384] {
        let values = vec![f16::ONE; n_embd];
        let rows = RowsRef::F16(&values);
        let mut head = Vec::new();
        encode_step_head(&mut head, 1, &[Span { session: 0, position: 0, count: 1 }], &[], rows);
        let there = wire_bytes(head.len() + 2 * n_embd);
        head.clear();
        encode_step_done_head(&mut head, done(1, 1), rows);
        let back = wire_bytes(head.len() + 2 * n_embd);
        assert!(there <= 2 * n_embd + 64 && back <= 2 * n_embd + 64, "{n_embd}: {there} {back}");
        assert_eq!((there, back), (2 * n_embd + 50, 2 * n_embd + 50), "PROTOCOL.md, section 13");
    }
}

#[test]
fn the_longest_step_is_exactly_the_limit() {
    let a = agreed();
    let values = vec![1f32; 16 * 4];
    let spans: Vec<Span> = (0..3).map(|session| Span { session, position: 0, count: 1 }).collect();
    let mut head = Vec::new();
    encode_step_head(&mut head, 1, &spans, &[], RowsRef::F32(&values));
    assert!(a.host_limit() >= head.len() + values.len() * 4);
    let wide = Agreed { shape: Shape::hidden(4096), ..a };
    assert_eq!(wide.host_limit(), head.len() + 16 * 4096 * 4);
    let tokens = Agreed { shape: Shape { reads_tokens: true, ..Shape::hidden(4096) }, max_rows: 15, ..wide };
    assert_eq!(tokens.host_limit(), head.len() + 64 + 15 * 4096 * 4, "15 ids and what fills them up");
}

fn done(step: u32, n_rows: u32) -> DoneHead {
    DoneHead { step, n_rows, compute_us: 0, wait_us: 0, began_us: 0 }
}

/// Every field of a layout that a peer may write, 20 values each in every part: one clear rule, or terms that are compared.
#[test]
fn two_thousand_hostile_layouts_are_each_refused_by_name_or_compared() {
    let parts = |n| -> Vec<Part> {
        let types =
            [(PartType::F32, true), (PartType::I32, false), (PartType::F16, false), (PartType::F32, false)];
        (0..n)
            .map(|i| Part { part_type: types[i % 4].0, may_round: types[i % 4].1, values: 2 + 2 * i as u32 })
            .collect()
    };
    let shape =
        Shape { input: Layout { parts: parts(5) }, output: Layout { parts: parts(3) }, reads_tokens: true };
    let terms = Terms { shape, ..host_terms() };
    let mut good = Vec::new();
    Message::Hello(terms.clone()).encode(&mut good);
    let counts = 232;
    assert_eq!(&good[counts..counts + 8], [1, 5, 3, 0, 0, 0, 0, 0]);
    let mut rules: std::collections::BTreeMap<&str, u32> = std::collections::BTreeMap::new();
    let mut tried = 0;
    for at in counts..counts + 8 + 8 * 8 {
        for value in [0u8, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 32, 63, 64, 127, 128, 129, 200, 254, 255] {
            for fills in [false, true] {
                let mut bytes = good.clone();
                if bytes[at] == value {
                    continue;
                }
                bytes[at] = value;
                if fills {
                    // enough parts for whatever the counts say now
                    let missing =
                        (usize::from(bytes[counts + 1]) + usize::from(bytes[counts + 2])).saturating_sub(8);
                    let behind = bytes.split_off(counts + 8 + 64);
                    (0..missing).for_each(|_| bytes.extend([2, 1, 0, 0, 4, 0, 0, 0]));
                    bytes.extend(behind);
                    let length = bytes.len() as u32;
                    bytes[4..8].copy_from_slice(&length.to_le_bytes());
                }
                tried += 1;
                let rule = match Message::decode(&bytes, &Shape::default()) {
                    Ok(Message::Hello(host)) => {
                        assert!(host.shape.input.parts.len() <= MAX_PARTS);
                        assert!(host.shape.output.parts.len() <= MAX_PARTS);
                        let found = terms::agree(&host, &terms).err().unwrap_or_default();
                        assert_eq!(
                            found.first().map(|m| m.reason),
                            Some(Reason::Layout),
                            "byte {at}: {value}"
                        );
                        assert!(
                            found[0].text.contains("the worker's") && found[0].text.contains("use slices")
                        );
                        "compared"
                    }
                    Ok(other) => panic!("{other:?}"),
                    Err(error) => error.rule(),
                };
                *rules.entry(rule).or_default() += 1;
            }
        }
    }
    println!("{tried} layouts: {rules:?}");
    assert!(
        tried > 2_000
            && rules["compared"] > 100
            && rules["bad-value"] > 500
            && rules["reserved-not-zero"] > 300
    );
}

/// Rows of several parts, in both formats, with token ids: what goes out comes in, and a row too few or too many does not.
#[test]
fn rows_of_several_parts_go_both_ways() {
    let part = |part_type, may_round, values| Part { part_type, may_round, values };
    let input = Layout {
        parts: vec![
            part(PartType::F32, true, 3),
            part(PartType::I32, false, 2),
            part(PartType::F16, false, 4),
        ],
    };
    let output = Layout { parts: input.parts[..2].to_vec() };
    let shape = Shape { input, output, reads_tokens: true };
    for row_types in [RowTypes::F16, RowTypes::F32] {
        let worker = Terms { row_types: RowTypes::ALL, shape: shape.clone(), ..host_terms() };
        // a host that does not know the rows takes the worker's
        let host = Terms { row_types, shape: Shape::default(), ..host_terms() };
        let agreed = terms::agree(&host, &worker).unwrap();
        assert_eq!(agreed.shape, shape);
        let mut ends = [Role::Host, Role::Worker].map(|role| Connection::new(role, Purpose::Key));
        ends.iter_mut().for_each(|end| end.begin_serving(agreed.clone()));
        let [host, worker] = &mut ends;
        let spans = [Span { session: 1, position: 0, count: 3 }];
        let tokens = [7, -1, i32::MAX];
        let (bits16, bits32): (Vec<f16>, Vec<f32>) = (
            (0..3 * 11).map(|i| f16::from_bits(0x3C00 + i)).collect(),
            (0..3 * 7).map(|i| f32::from_bits(0x3F80_0000 + i)).collect(),
        );
        let values = match agreed.row_type {
            dim_wire::RowType::F16 => RowsRef::F16(&bits16),
            dim_wire::RowType::F32 => RowsRef::F32(&bits32),
        };
        assert_eq!(host.send_step(&spans, &[], values).unwrap_err().rule(), "row-count");
        assert_eq!(host.send_step(&spans, &tokens[..2], values).unwrap_err().rule(), "row-count");
        let two = [Span { session: 1, position: 0, count: 2 }];
        assert_eq!(host.send_step(&two, &tokens[..2], values).unwrap_err().rule(), "row-count");
        let step = host.send_step(&spans, &tokens, values).unwrap();
        let mut bytes = Vec::new();
        encode_step_head(&mut bytes, step, &spans, &tokens, values);
        assert_eq!(bytes.len() % 8, 0, "rows begin at a multiple of 8");
        bytes.extend(as_bytes(values));
        assert_eq!(bytes.len(), 16 + 16 + 16 + 3 * agreed.input_bytes());
        let Ok(Message::Step(heard)) = worker.receive(&bytes) else { panic!() };
        assert_eq!(heard.tokens().collect::<Vec<_>>(), tokens);
        assert_eq!(heard.rows, as_bytes(values));
        // back, the first two parts
        let width = agreed.output_bytes() / agreed.row_type.width();
        let back = match agreed.row_type {
            dim_wire::RowType::F16 => RowsRef::F16(&bits16[..3 * width]),
            dim_wire::RowType::F32 => RowsRef::F32(&bits32[..3 * width]),
        };
        assert_eq!(worker.send_step_done(step, 3, values).unwrap_err().rule(), "row-count");
        worker.send_step_done(step, 3, back).unwrap();
        let mut bytes = Vec::new();
        encode_step_done_head(&mut bytes, done(step, 3), back);
        bytes.extend(as_bytes(back));
        let Ok(Message::StepDone(heard)) = host.receive(&bytes) else { panic!() };
        assert_eq!(heard.rows, as_bytes(back));
    }
}

#[test]
fn a_digest_that_differs_is_refused_and_names_what_to_update() {
    let known = |byte| Terms { input: Some(Sha([byte; 32])), ..host_terms() };
    assert!(terms::agree(&known(1), &known(1)).is_ok());
    assert!(terms::agree(&known(1), &host_terms()).is_ok(), "compared only if both are known");
    let found = terms::agree(&known(1), &known(2)).unwrap_err();
    assert_eq!(found[0].reason, Reason::Layout);
    assert!(found[0].text.contains("update the older"), "{}", found[0].text);
}

#[test]
fn every_combination_of_mismatches_is_refused_by_both_sides_alike() {
    type Change = (Reason, fn(&mut Terms));
    let changes: [Change; 12] = [
        (Reason::Version, |t| t.version += 1),
        (Reason::Arch, |t| t.arch.push('x')),
        (Reason::Model, |t| t.model = Some(Sha([9; 32]))),
        (Reason::Params, |t| t.params = Some(Sha([9; 32]))),
        (Reason::NBlocks, |t| t.n_blocks += 1),
        (Reason::Layout, |t| t.shape = Shape::hidden(5)),
        (Reason::Role, |t| t.role = SliceRole::Tail),
        (Reason::Blocks, |t| t.blocks.first -= 1),
        (Reason::Slice, |t| t.slice = Some(Sha([9; 32]))),
        (Reason::DType, |t| t.row_types = RowTypes::F16),
        (Reason::Context, |t| t.n_ctx -= 1),
        (Reason::Sessions, |t| t.max_sessions -= 1),
    ];
    for set in 0..1u32 << changes.len() {
        let host = host_terms();
        let mut worker = host_terms();
        let wanted: Vec<Reason> = changes
            .iter()
            .enumerate()
            .filter(|(i, _)| set >> i & 1 == 1)
            .map(|(_, (reason, change))| {
                change(&mut worker);
                *reason
            })
            .collect();
        let found: Vec<Reason> =
            terms::agree(&host, &worker).err().unwrap_or_default().iter().map(|m| m.reason).collect();
        assert_eq!(found, wanted);
    }
}

#[test]
fn every_mismatch_says_both_values_and_which_side_to_fix() {
    let mut worker = host_terms();
    worker.n_ctx = 32;
    worker.blocks.last = 6;
    let text: Vec<String> =
        terms::agree(&host_terms(), &worker).unwrap_err().into_iter().map(|m| m.text).collect();
    assert!(text[0].contains("3..5") && text[0].contains("3..6"), "{text:?}");
    assert!(
        text[1].contains("64") && text[1].contains("32") && text[1].contains("smaller context"),
        "{text:?}"
    );
}

// --- lives -----------------------------------------------------------------------------------------------

/// A small deterministic source of choices, so that a failure can be told by its seed.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// One end: what `transport` does, without the socket.
struct End {
    connection: Connection,
    sealer: Sealer,
    inbox: Inbox,
}

impl End {
    fn new(role: Role, send: &[u8; 32], receive: &[u8; 32]) -> End {
        let mut connection = Connection::new(role, Purpose::Key);
        connection.begin_serving(agreed());
        let inbox = Inbox::new(Opener::new(receive), connection.limit());
        End { connection, sealer: Sealer::new(send), inbox }
    }
}

/// A host, a worker and the network between them, in one epoch after another. A token is a number; a worker's
/// cache is the tokens it was given, and its answer to a row is a digest of the cache up to it: so an answer
/// is right only if the cache was.
struct World {
    dice: Dice,
    epoch: u32,
    /// each epoch has keys of its own; the control experiment uses the same for all
    keys_change: bool,
    host: End,
    worker: End,
    /// what the host has sent and not rewound, by session
    told: Vec<Vec<u32>>,
    /// digests due for each step under way
    due: VecDeque<Vec<f32>>,
    cache: Vec<Vec<u32>>,
    to_worker: VecDeque<Vec<u8>>,
    to_host: VecDeque<Vec<u8>>,
    /// frames of all times, for those who kept them
    kept: Vec<Vec<u8>>,
    answers: u64,
    refused: u64,
    wrong: u64,
}

impl World {
    fn new(seed: u64, keys_change: bool) -> World {
        let (host, worker) = World::ends(0, keys_change);
        World {
            dice: Dice(seed),
            epoch: 0,
            keys_change,
            host,
            worker,
            told: vec![Vec::new(); 3],
            due: VecDeque::new(),
            cache: vec![Vec::new(); 3],
            to_worker: VecDeque::new(),
            to_host: VecDeque::new(),
            kept: Vec::new(),
            answers: 0,
            refused: 0,
            wrong: 0,
        }
    }

    fn ends(epoch: u32, keys_change: bool) -> (End, End) {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&if keys_change { epoch } else { 0 }.to_le_bytes());
        let mut other = key;
        other[31] = 1;
        (End::new(Role::Host, &key, &other), End::new(Role::Worker, &other, &key))
    }

    fn digest(tokens: &[u32]) -> f32 {
        // exact in an f32
        (tokens.iter().fold(7u32, |h, &t| h.wrapping_mul(0x0100_0193) ^ t) >> 9) as f32
    }

    fn step(&mut self) {
        match self.dice.below(100) {
            0..=29 => self.host_sends_rows(),
            30..=35 => self.host_rewinds(),
            36..=37 => self.host_ends_a_session(),
            38..=67 => self.worker_hears(),
            68..=93 => self.host_hears(),
            94 => self.duplicate(),
            95 => self.swap(),
            96 => self.late_frame(),
            97 => self.flip(),
            98 => self.lose(),
            _ => self.reconnect(),
        }
    }

    fn host_sends_rows(&mut self) {
        let mut sessions = [0u32, 1, 2];
        let n_spans = 1 + self.dice.below(3);
        for i in 0..3 {
            sessions.swap(i, self.dice.below(3));
        }
        let mut spans = Vec::new();
        let mut tokens = Vec::new();
        for &session in &sessions[..n_spans] {
            let count = 1 + self.dice.below(5) as u32;
            let position = self.told[session as usize].len() as u32;
            spans.push(Span { session, position, count });
            tokens.extend((0..count).map(|_| self.dice.next() as u32 % 1000));
        }
        let values: Vec<f32> = tokens.iter().flat_map(|&t| [t as f32, 0.0, 0.0, 0.0]).collect();
        let rows = RowsRef::from(values.as_slice());
        // the host's own books refuse a context that is full, and too many under way
        let Ok(step) = self.host.connection.send_step(&spans, &[], rows) else { return };
        let mut frame = Vec::new();
        let mut head = Vec::new();
        encode_step_head(&mut head, step, &spans, &[], rows);
        seal_into(&mut self.host.sealer, &head, as_bytes(rows), &mut frame);
        self.to_worker.push_back(frame);
        let mut digests = Vec::new();
        let mut tokens = tokens.into_iter();
        for span in spans {
            for _ in 0..span.count {
                let told = &mut self.told[span.session as usize];
                told.extend(tokens.next());
                digests.push(World::digest(told));
            }
        }
        self.due.push_back(digests);
    }

    fn host_says(&mut self, message: Message<'_>) {
        self.host.connection.send(&message).unwrap();
        let (mut plain, mut frame) = (Vec::new(), Vec::new());
        message.encode(&mut plain);
        seal_into(&mut self.host.sealer, &plain, &[], &mut frame);
        self.to_worker.push_back(frame);
    }

    fn host_rewinds(&mut self) {
        let session = self.dice.below(3);
        let position = self.dice.below(self.told[session].len() + 1);
        self.told[session].truncate(position);
        self.host_says(Message::Rewind { session: session as u32, position: position as u32 });
    }

    fn host_ends_a_session(&mut self) {
        let session = self.dice.below(3);
        self.told[session].clear();
        self.host_says(Message::EndSession { session: session as u32 });
    }

    fn worker_hears(&mut self) {
        let Some(frame) = self.to_worker.pop_front() else { return };
        self.keep(&frame);
        let worker = &mut self.worker;
        worker.inbox.fill(&frame);
        let heard = match worker.inbox.poll() {
            Ok(true) => worker.connection.receive(worker.inbox.message()),
            Ok(false) => return,
            Err(error) => Err(error.into()),
        };
        let answer = match heard {
            Ok(Message::Step(s)) => {
                let values: Vec<f32> =
                    s.rows.chunks(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                let mut rows = values.chunks(4);
                let mut out = Vec::new();
                for span in s.spans() {
                    let cache = &mut self.cache[span.session as usize];
                    // the invariant: what the worker's cache holds is what the books say
                    assert_eq!(cache.len(), span.position as usize);
                    for _ in 0..span.count {
                        cache.push(rows.next().unwrap()[0] as u32);
                        out.extend([World::digest(cache), 0.0, 0.0, 0.0]);
                    }
                }
                Some((s.step, s.n_rows, out))
            }
            Ok(Message::Rewind { session, position }) => {
                self.cache[session as usize].truncate(position as usize);
                None
            }
            Ok(Message::EndSession { session }) => {
                self.cache[session as usize].clear();
                None
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => {
                self.refuse(error);
                return;
            }
        };
        self.worker.inbox.release();
        if let Some((step, n_rows, values)) = answer {
            let rows = RowsRef::from(values.as_slice());
            self.worker.connection.send_step_done(step, n_rows, rows).unwrap();
            let (mut head, mut frame) = (Vec::new(), Vec::new());
            encode_step_done_head(&mut head, done(step, n_rows), rows);
            seal_into(&mut self.worker.sealer, &head, as_bytes(rows), &mut frame);
            self.to_host.push_back(frame);
        }
        let books = self.worker.connection.books().unwrap();
        for (session, cache) in self.cache.iter().enumerate() {
            assert_eq!(books.length(session as u32), Some(cache.len() as u32));
        }
    }

    fn host_hears(&mut self) {
        let Some(frame) = self.to_host.pop_front() else { return };
        self.keep(&frame);
        let host = &mut self.host;
        host.inbox.fill(&frame);
        let heard = match host.inbox.poll() {
            Ok(true) => host.connection.receive(host.inbox.message()),
            Ok(false) => return,
            Err(error) => Err(error.into()),
        };
        match heard {
            Ok(Message::StepDone(s)) => {
                let digests: Vec<f32> =
                    s.rows.chunks(16).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                self.answers += 1;
                if Some(digests) != self.due.pop_front() {
                    self.wrong += 1;
                }
                self.host.inbox.release();
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => self.refuse(error),
        }
    }

    /// A side has refused what came: the connection is over.
    fn refuse(&mut self, error: ReceiveError) {
        assert!(
            matches!(error, ReceiveError::Frame(_)),
            "the network cannot make a message that is read: {error}"
        );
        self.refused += 1;
        self.reconnect();
    }

    /// A new epoch: new keys, an empty worker, and the host replays what it kept.
    fn reconnect(&mut self) {
        self.epoch += 1;
        (self.host, self.worker) = World::ends(self.epoch, self.keys_change);
        self.cache = vec![Vec::new(); 3];
        self.due.clear();
        self.to_worker.clear();
        self.to_host.clear();
        for session in 0..3usize {
            let tokens = std::mem::take(&mut self.told[session]);
            for chunk in tokens.chunks(16) {
                let spans = [Span {
                    session: session as u32,
                    position: self.told[session].len() as u32,
                    count: chunk.len() as u32,
                }];
                let values: Vec<f32> = chunk.iter().flat_map(|&t| [t as f32, 0.0, 0.0, 0.0]).collect();
                let rows = RowsRef::from(values.as_slice());
                while self.host.connection.books().unwrap().in_flight() == 4 {
                    let epoch = self.epoch;
                    self.worker_hears();
                    self.host_hears();
                    assert_eq!(epoch, self.epoch, "a replay was refused");
                }
                let step = self.host.connection.send_step(&spans, &[], rows).unwrap();
                let (mut head, mut frame) = (Vec::new(), Vec::new());
                encode_step_head(&mut head, step, &spans, &[], rows);
                seal_into(&mut self.host.sealer, &head, as_bytes(rows), &mut frame);
                self.to_worker.push_back(frame);
                let mut digests = Vec::new();
                for &t in chunk {
                    self.told[session].push(t);
                    digests.push(World::digest(&self.told[session]));
                }
                self.due.push_back(digests);
            }
        }
    }

    fn keep(&mut self, frame: &[u8]) {
        if self.kept.len() < 64 {
            self.kept.push(frame.to_vec());
        } else {
            let at = self.dice.below(64);
            self.kept[at] = frame.to_vec();
        }
    }

    fn direction(&mut self) -> &mut VecDeque<Vec<u8>> {
        if self.dice.below(2) == 0 { &mut self.to_worker } else { &mut self.to_host }
    }

    fn duplicate(&mut self) {
        let way = self.direction();
        if let Some(frame) = way.front().cloned() {
            way.push_front(frame);
        }
    }

    fn swap(&mut self) {
        let way = self.direction();
        if way.len() >= 2 {
            way.swap(0, 1);
        }
    }

    /// A frame of any time, this epoch's or another's, either direction's.
    fn late_frame(&mut self) {
        if !self.kept.is_empty() {
            let at = self.dice.below(self.kept.len());
            let frame = self.kept[at].clone();
            self.direction().push_front(frame);
        }
    }

    fn flip(&mut self) {
        let bit = self.dice.next() as usize;
        if let Some(frame) = self.direction().front_mut() {
            // past the length: a longer one would just be waited for
            let body = (frame.len() - 2) * 8;
            frame[2 + bit % body / 8] ^= 1 << (bit % 8);
        }
    }

    fn lose(&mut self) {
        self.direction().pop_front();
    }
}

#[test]
fn whatever_the_network_does_positions_and_answers_stay_right() {
    // DIM_EVENTS=10000000 for the long run
    let events = std::env::var("DIM_EVENTS").ok().and_then(|n| n.parse().ok()).unwrap_or(400_000u64);
    let (mut answers, mut refused) = (0, 0);
    for seed in 0..8 {
        let mut world = World::new(seed, true);
        for _ in 0..events / 8 {
            world.step();
        }
        assert_eq!(world.wrong, 0, "seed {seed}");
        answers += world.answers;
        refused += world.refused;
    }
    println!("{events} events: {answers} answers, all right; {refused} connections ended by refused frames");
    assert!(answers > events / 20 && refused > events / 200, "the network was too kind to show anything");
}

/// The control experiment: with the same keys in every epoch, frames of an earlier one are taken for this
/// one's, and the world above notices.
#[test]
fn without_epochs_the_same_test_fails() {
    let noticed = (0..20).any(|seed| {
        std::panic::catch_unwind(|| {
            let mut world = World::new(seed, false);
            for _ in 0..50_000 {
                world.step();
            }
            world.wrong
        })
        .map_or(true, |wrong| wrong > 0)
    });
    assert!(noticed, "old frames were never taken for new ones: the test above shows nothing");
}
