//! What is done with any bytes at all: the body of the fuzz target in tests/fuzz, and a unit test here.
//!
//! The first byte chooses the part, the rest is its input. Nothing may panic, no input may become a message
//! without the key, and the books must agree with a model that is too simple to be wrong.

use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use dim_core::stage::TakeBack;

use super::connection::{Books, Connection, Role};
use super::frame::{Inbox, Opener, Outgoing, Sealer};
use super::handshake::{FIRST_FLIGHT, HostHandshake, Lookup, Named, Purpose, WorkerHandshake};
use super::message::{HEADER, Item, ItemKind, MAX_PARTS, Message, PushOffer, Span};
use super::rows::{Layout, Part, PartType, RowType, RowTypes, Shape};
use super::terms::{self, Agreed, Reason, SliceRole, Terms};
use crate::keys::{Key, PairingCode};

/// How many parts there are: first bytes below this mean something.
pub const PARTS: u8 = 8;

/// Runs one input.
///
/// # Panics
/// If the protocol has a bug.
pub fn exercise(input: &[u8]) {
    let Some((&part, rest)) = input.split_first() else { return };
    match part {
        0 => one_message(rest),
        1 => frames_from_a_stranger(rest),
        2 => frames_from_a_peer(rest),
        3 => a_first_flight(rest),
        4 => an_answer(rest),
        5 => a_script(rest),
        6 => typed_text(rest),
        7 => a_layout(rest),
        _ => {}
    }
}

/// The shape of rows, then a message.
fn one_message(input: &[u8]) {
    let Some((&number, bytes)) = input.split_first() else { return };
    let shape = shape_of(number);
    if let Ok(message) = Message::decode(bytes, &shape) {
        let (mut once, mut twice) = (Vec::new(), Vec::new());
        message.encode(&mut once);
        // a text may have been made safe to show, which may cut it; after that nothing changes any more
        if let Ok(again) = Message::decode(&once, &shape) {
            again.encode(&mut twice);
            assert_eq!(once, twice);
        } else {
            panic!("{message:?} cannot be read again");
        }
    }
}

/// One hidden row of so many values; with the high bit, some parts of all types and token ids.
fn shape_of(number: u8) -> Shape {
    if number & 0x80 == 0 {
        return Shape::hidden(number.into());
    }
    let part = |part_type, may_round, values| Part { part_type, may_round, values };
    let parts = vec![
        part(PartType::F32, true, u32::from(number & 7) + 1),
        part(PartType::I32, false, 2),
        part(PartType::F32, false, u32::from(number >> 3 & 3) + 1),
        part(PartType::F16, false, 2),
    ];
    let input = Layout { parts };
    Shape { output: Layout { parts: input.parts[1..].to_vec() }, input, reads_tokens: number & 0x40 != 0 }
}

/// What two sides may say of their rows: whatever it is they agree, on limits that fit every message, or they name a
/// reason.
fn a_layout(input: &[u8]) {
    let Some((&[n_input, n_output, tokens, rows], parts)) = input.split_first_chunk() else { return };
    let terms = |software: &str| Terms {
        max_rows: u32::from(rows) << (rows % 24),
        max_sessions: 2,
        max_in_flight: 2,
        n_ctx: 64,
        n_blocks: 4,
        role: SliceRole::Middle,
        row_types: RowTypes::F16,
        blocks: BlockRange { first: 1, last: 2 },
        model: Some(Sha([1; 32])),
        ..Terms::blank(2, software, "")
    };
    let mut bytes = Vec::new();
    Message::Hello(terms("host")).encode(&mut bytes);
    // behind the digests: the counts of the parts, then the parts
    let at = HEADER + 224;
    let strings = bytes.split_off(at + 8);
    bytes[at..at + 3].copy_from_slice(&[tokens % 3, n_input, n_output]);
    bytes.extend_from_slice(parts);
    bytes.extend_from_slice(&strings);
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    bytes[4..8].copy_from_slice(&length.to_le_bytes());
    let Ok(Message::Hello(host)) = Message::decode(&bytes, &Shape::default()) else { return };
    let all = host.shape.input.parts.iter().chain(&host.shape.output.parts);
    assert!(all.clone().count() <= 2 * MAX_PARTS && all.clone().all(|part| part.values > 0));
    let worker = Terms { software: "worker".into(), row_types: RowTypes::ALL, ..host.clone() };
    match terms::agree(&host, &worker) {
        Ok(agreed) => {
            assert!(agreed.host_limit() < 1 << 31 && agreed.worker_limit() < 1 << 31);
            assert_eq!(agreed.shape, host.shape);
        }
        Err(mismatches) => assert!(!mismatches.is_empty()),
    }
    // one value more, and they are not the same any more
    let mut other = worker;
    if let Some(part) = other.shape.output.parts.last_mut() {
        part.values = part.values.wrapping_add(2).max(2);
        let mismatches = terms::agree(&host, &other).err().unwrap_or_default();
        assert!(mismatches.iter().any(|mismatch| mismatch.reason == Reason::Layout));
    }
}

/// Without the key nothing is a message.
fn frames_from_a_stranger(input: &[u8]) {
    let Some((limit, bytes)) = input.split_first_chunk() else { return };
    let mut inbox = Inbox::new(Opener::new(&[7; 32]), u16::from_le_bytes(*limit).into());
    let mut rest = bytes;
    while !rest.is_empty() {
        let n = inbox.fill(rest);
        match inbox.poll() {
            Ok(complete) => assert!(!complete && n > 0, "a message, or no room though none waits"),
            Err(_) => break,
        }
        rest = &rest[n..];
    }
}

/// A peer with the key that seals whatever it likes: role and state, then pieces of plaintext, each a frame.
fn frames_from_a_peer(input: &[u8]) {
    let Some((&[setup, piece], bytes)) = input.split_first_chunk() else { return };
    let role = if setup & 1 == 0 { Role::Host } else { Role::Worker };
    let purpose = if setup & 2 == 0 { Purpose::Key } else { Purpose::Pairing };
    let mut connection = Connection::new(role, purpose);
    match setup >> 2 & 3 {
        0 => connection.begin_serving(agreed()),
        1 => assert!(connection.begin_push(&offer(), &[0, 5]).is_ok()),
        _ => {}
    }
    let mut sealer = Sealer::new(&[7; 32]);
    let mut inbox = Inbox::new(Opener::new(&[7; 32]), connection.limit());
    for body in pieces(bytes, piece) {
        let mut frame = Vec::new();
        sealer.seal(&mut Outgoing::new(body, &[]), &mut frame).unwrap();
        let mut rest = &frame[..];
        while !rest.is_empty() {
            let n = inbox.fill(rest);
            rest = &rest[n..];
            match inbox.poll() {
                Ok(true) => {
                    if connection.receive(inbox.message()).is_err() {
                        return;
                    }
                    if let Some(books) = connection.books() {
                        let a = books.agreed();
                        assert!((0..a.max_sessions).all(|s| books.length(s).is_some_and(|n| n <= a.n_ctx)));
                        assert!(books.in_flight() <= a.max_in_flight as usize);
                    }
                    inbox.release();
                }
                Ok(false) => assert!(n > 0, "no room though no message waits"),
                Err(_) => return,
            }
        }
    }
}

/// Messages as their headers say, or pieces of `piece` bytes when that is not zero.
fn pieces(mut bytes: &[u8], piece: u8) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = match (piece, bytes) {
            (_, []) => return None,
            (0, [_, _, _, _, a, b, c, d, ..]) => u32::from_le_bytes([*a, *b, *c, *d]) as usize,
            (0, _) => bytes.len(),
            (n, _) => n.into(),
        };
        let (now, later) = bytes.split_at(length.clamp(1, bytes.len()));
        bytes = later;
        Some(now)
    })
}

fn a_first_flight(input: &[u8]) {
    // with an ephemeral key of its own: one that is given is set before anything is read, and that is counted
    let mut worker = WorkerHandshake::with_nonce(2..=3, [3; 16]);
    let mut rest = input;
    while !rest.is_empty() {
        let before = rest.len();
        let lookup = |named: &Named| match named.mark[0] & 3 {
            0 => Lookup::Unknown,
            1 => Lookup::NoPairing,
            2 => Lookup::Crowded,
            _ => Lookup::Found(Key::from_bytes([7; 32])),
        };
        if let Some(verdict) = worker.receive(&mut rest, lookup) {
            assert!(verdict.outcome.is_err(), "a stranger was let in");
            assert!(verdict.answer.is_empty() || verdict.answer.len() == 24);
            break;
        }
        assert!(rest.len() < before || worker.wants() == 0, "it neither takes bytes nor decides");
    }
    assert_eq!(worker.curve_work(), 0);
}

fn an_answer(input: &[u8]) {
    // making a host costs a scalar multiplication: one for all inputs would keep state between them
    let key = Key::from_bytes([7; 32]);
    let mut host = HostHandshake::with_secrets(&key, Purpose::Key, 2..=3, [4; 8], [9; 32]);
    let (mut input, mut flight) = (input, Vec::new());
    let outcome = host.receive(&mut input, &mut flight);
    assert!(!matches!(outcome, Ok(Some(_))), "a stranger's answer was believed");
    assert!(flight.is_empty() || flight.len() == FIRST_FLIGHT);
}

/// Events of 4 bytes each, for the books and for a model of them.
fn a_script(input: &[u8]) {
    let agreed = agreed();
    let mut books = Books::new(agreed.clone());
    let mut model = BooksModel {
        lengths: vec![0; agreed.max_sessions as usize],
        under_way: Vec::new(),
        last: 0,
        agreed: agreed.clone(),
    };
    for event in input.chunks_exact(4) {
        let [what, session, position, count] =
            [event[0], event[1] % 5, event[2] % 70, event[3] % 20].map(u32::from);
        match what % 4 {
            0 => {
                let step = model.last + 1 + u32::from(what & 64 != 0 && count == 7);
                model.step(&mut books, step, &spans_of(what, session, position, count));
            }
            1 => {
                let (step, n_rows) = match model.under_way.first() {
                    Some(&due) if position != 0 => due,
                    _ => (session, count),
                };
                model.answered(&mut books, step, n_rows, what & 32 != 0);
            }
            2 => model.rewind(&mut books, session, position),
            _ => model.end(&mut books, session),
        }
        let kept: Vec<u64> =
            (0..agreed.max_sessions).filter_map(|s| books.length(s)).map(u64::from).collect();
        assert_eq!(kept, model.lengths);
        assert_eq!(books.in_flight(), model.under_way.len());
    }
}

/// What the books should hold, and so what they should take.
struct BooksModel {
    agreed: Agreed,
    lengths: Vec<u64>,
    /// steps without an answer, with their rows
    under_way: Vec<(u32, u32)>,
    /// the last step's number
    last: u32,
}

impl BooksModel {
    fn step(&mut self, books: &mut Books, step: u32, spans: &[Span]) {
        let n_rows = spans.iter().map(|s| s.count).sum();
        let fits = |s: &Span| {
            self.lengths.get(s.session as usize) == Some(&s.position.into())
                && s.count > 0
                && u64::from(s.position) + u64::from(s.count) <= u64::from(self.agreed.n_ctx)
        };
        let right = step == self.last + 1
            && self.under_way.len() < self.agreed.max_in_flight as usize
            && spans.len() <= self.agreed.max_sessions as usize
            && n_rows > 0
            && n_rows <= self.agreed.max_rows
            && spans.iter().all(fits)
            && (spans.len() < 2 || spans[0].session != spans[1].session);
        let taken = books.step(step, n_rows, RowType::F16.into(), spans.iter().copied());
        assert_eq!(taken.is_ok(), right, "{spans:?} {taken:?}");
        if right {
            spans.iter().for_each(|s| self.lengths[s.session as usize] += u64::from(s.count));
            self.under_way.push((step, n_rows));
            self.last = step;
        }
    }

    fn answered(&mut self, books: &mut Books, step: u32, n_rows: u32, has_failed: bool) {
        let (right, taken) = match has_failed {
            true => (self.under_way.first().is_some_and(|due| due.0 == step), books.step_failed(step)),
            false => {
                let right = self.under_way.first() == Some(&(step, n_rows));
                (right, books.step_done(step, n_rows, RowType::F16))
            }
        };
        assert_eq!(taken.is_ok(), right);
        if right {
            self.under_way.remove(0);
        }
    }

    fn rewind(&mut self, books: &mut Books, session: u32, position: u32) {
        let right = self.lengths.get(session as usize).is_some_and(|&n| u64::from(position) <= n);
        assert_eq!(books.rewind(session, position).is_ok(), right);
        if right {
            self.lengths[session as usize] = position.into();
        }
    }

    fn end(&mut self, books: &mut Books, session: u32) {
        let right = (session as usize) < self.lengths.len();
        assert_eq!(books.end(session).is_ok(), right);
        if right {
            self.lengths[session as usize] = 0;
        }
    }
}

/// One or two spans, as the event's first byte says.
fn spans_of(what: u32, session: u32, position: u32, count: u32) -> Vec<Span> {
    let first = Span { session, position, count };
    let second = Span { session: (session + what / 4 % 3) % 5, position: position + what / 16 % 2, count: 1 };
    if what & 128 == 0 { vec![first] } else { vec![first, second] }
}

fn typed_text(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(code) = PairingCode::parse(text) {
        assert!(PairingCode::parse(&code.to_string()) == Ok(code));
    }
    if let Ok(key) = Key::from_hex(text) {
        assert_eq!(Key::from_hex(&key.to_hex()).map(|k| *k.bytes()), Ok(*key.bytes()));
    }
}

fn agreed() -> Agreed {
    Agreed {
        version: 2,
        row_type: RowType::F16,
        shape: Shape::hidden(4),
        blocks: BlockRange { first: 1, last: 2 },
        n_ctx: 64,
        max_rows: 16,
        max_sessions: 3,
        max_in_flight: 2,
        features: 0,
        take_back: TakeBack::ALL,
    }
}

fn offer() -> PushOffer {
    let item = |kind, size| Item { kind, index: 0, size, sha256: Sha([0; 32]) };
    PushOffer {
        model: Sha([1; 32]),
        slice: Sha([2; 32]),
        blocks: BlockRange { first: 1, last: 2 },
        items: vec![item(ItemKind::Manifest, 4), item(ItemKind::PackageWeights, 100)],
        name: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handshake::{MAGIC, PREAMBLE};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn any_bytes_are_survived(
            part in 0..PARTS,
            rest in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..120),
        ) {
            let mut input = vec![part];
            input.extend(rest);
            exercise(&input);
        }
    }

    /// First flights of the right form, whatever the worker finds for their mark.
    #[test]
    fn whole_flights_of_strangers_are_survived() {
        for first in 0..=u8::MAX {
            let magic_and_terms = [&MAGIC[..], &[2, 0, 2, 0, 0, 0, 0, 0]].concat();
            let mut input = [vec![3], magic_and_terms].concat();
            input.resize(1 + PREAMBLE, first);
            input.extend([48, 0]);
            input.resize(1 + FIRST_FLIGHT, first ^ 0x55);
            exercise(&input);
        }
    }
}
