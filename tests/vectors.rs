//! The golden vectors of docs/vectors/: writes them (with `DIM_WRITE_VECTORS=1`), and checks that the files
//! are what this implementation makes. What they hold is told in docs/PROTOCOL.md, section 14. That they are
//! also *right* is shown by docs/vectors/check.py and the Swift tests, which know nothing of this code.

use std::path::PathBuf;

use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use dim_core::stage::TakeBack;
use dim_wire::connection::{Books, Connection, Role};
use dim_wire::error::{HandshakeError, ReceiveError};
use dim_wire::frame::{Inbox, Opener, Outgoing, Sealer};
use dim_wire::handshake::{Established, HostHandshake, Lookup, Named, Purpose, WorkerHandshake};
use dim_wire::keys::{Key, PairingCode};
use dim_wire::message::{
    Activity, DoneHead, ErrorCode, Farewell, Fault, Item, ItemKind, Kind, Message, PushOffer, PushOutcome,
    Span, Status, StepFailed, Temperature, encode_step_done_head, encode_step_head,
};
use dim_wire::rows::{self, Layout, Part, PartType, RowType, RowTypes, RowsRef, Shape};
use dim_wire::terms::{self, Agreed, Engine, Machine, Measured, Reason, SliceRole, Terms, Unit, features};
use half::f16;
use ring::hmac;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

#[test]
fn keys() {
    let keys: Vec<Value> = [[0u8; 32], [0xFF; 32], counting(1)]
        .into_iter()
        .map(|k| {
            let key = Key::from_bytes(k);
            let named = Named { purpose: Purpose::Key, mark: [0; 8], salt: SALT, nonce: NONCE };
            json!({
                "key": hex(&k), "id": key.id().to_string(), "nonce": hex(&NONCE), "salt": hex(&SALT),
                "mark": hex(&named.mark_of(&key)),
            })
        })
        .collect();
    let codes: Vec<Value> = [
        "00000000000000000000",
        "ZZZZZZZZZZZZZZZZZZZZ",
        "0123456789ABCDEFGHJK",
        "MNPQRSTVWXYZ01234567",
        "7Q3C0HV1K9XJ2M5T8R4W",
    ]
    .into_iter()
    .map(|characters| {
        let check = check_character(characters);
        let code = PairingCode::parse(&format!("{characters}{check}")).unwrap();
        let shown = code.to_string();
        json!({
            "characters": characters,
            "check": check.to_string(),
            "shown": shown,
            "typed": [
                shown.to_lowercase(),
                shown.replace('-', ""),
                format!("  {} ", shown.replace('-', " ")),
                shown.replace('0', "O").replace('1', "l"),
                shown.replace('0', "o").replace('1', "I"),
            ],
            "pairing_key": hex(code.key().bytes()),
        })
    })
    .collect();
    let good = codes[4]["shown"].as_str().unwrap().to_owned();
    let bad_codes: Vec<Value> = [
        (String::new(), "length"),
        (good[..23].to_owned(), "length"),
        (format!("{good}0"), "length"),
        (good.replace("7Q3C0", "7Q3CU"), "character"),
        (good.replace("7Q3C0", "7Q3C*"), "character"),
        (good.replace("7Q3C0", "7Q3C2"), "check"),
        (good.replace("7Q3C0", "Q73C0"), "check"),
    ]
    .into_iter()
    .map(|(typed, rule)| json!({ "typed": typed, "rule": rule }))
    .collect();
    let bad_keys = [
        String::new(),
        "0".repeat(63),
        "0".repeat(65),
        "g".repeat(64),
        format!("{}\n{}", "0".repeat(64), "0".repeat(64)),
    ];
    for text in &bad_keys {
        assert!(Key::from_hex(text).is_err());
    }
    for bad in &bad_codes {
        assert!(PairingCode::parse(bad["typed"].as_str().unwrap()).is_err(), "{bad}");
    }
    check("keys.json", json!({ "keys": keys, "codes": codes, "bad_codes": bad_codes, "bad_keys": bad_keys }));
}

/// Which of the 32 is right is asked of the parser: `check.py` computes it.
fn check_character(characters: &str) -> char {
    let fits = |c: &char| PairingCode::parse(&format!("{characters}{c}")).is_ok();
    let found: Vec<char> = "0123456789ABCDEFGHJKMNPQRSTVWXYZ".chars().filter(fits).collect();
    assert_eq!(found.len(), 1);
    found[0]
}

// --- handshake -------------------------------------------------------------------------------------------

/// What both sides draw in all cases.
const NONCE: [u8; 16] = *b"sixteen of these";
const SALT: [u8; 8] = *b"eight mo";

struct Case {
    name: &'static str,
    purpose: Purpose,
    key: [u8; 32],
    host_ephemeral: [u8; 32],
    worker_ephemeral: [u8; 32],
    host_versions: (u16, u16),
    worker_versions: (u16, u16),
}

fn cases() -> [Case; 3] {
    let plain = Case {
        name: "paired key, version 2",
        purpose: Purpose::Key,
        key: counting(0x00),
        host_ephemeral: counting(0x20),
        worker_ephemeral: counting(0x40),
        host_versions: (2, 2),
        worker_versions: (2, 2),
    };
    [
        Case {
            name: "paired key, overlapping ranges",
            host_versions: (1, 4),
            worker_versions: (2, 3),
            ..plain
        },
        Case {
            name: "pairing code 7Q3C0HV1K9XJ2M5T8R4W",
            purpose: Purpose::Pairing,
            key: *code().key().bytes(),
            host_ephemeral: counting(0x60),
            worker_ephemeral: counting(0x80),
            ..plain
        },
        plain,
    ]
}

fn code() -> PairingCode {
    PairingCode::parse(&format!("7Q3C0HV1K9XJ2M5T8R4W{}", check_character("7Q3C0HV1K9XJ2M5T8R4W"))).unwrap()
}

/// Both sides of a case.
struct Shaken {
    greeting: Vec<u8>,
    first: Vec<u8>,
    answer: Vec<u8>,
    host: Established,
    worker: Established,
}

fn host_of(case: &Case) -> HostHandshake {
    let (key, versions) = (Key::from_bytes(case.key), case.host_versions.0..=case.host_versions.1);
    HostHandshake::with_secrets(&key, case.purpose, versions, SALT, case.host_ephemeral)
}

fn worker_of(case: &Case) -> WorkerHandshake {
    let versions = case.worker_versions.0..=case.worker_versions.1;
    WorkerHandshake::with_secrets(versions, NONCE, case.worker_ephemeral)
}

fn shake(case: &Case) -> Shaken {
    let key = Key::from_bytes(case.key);
    let (mut host, mut worker) = (host_of(case), worker_of(case));
    let (greeting, mut first) = (worker.greeting().to_vec(), Vec::new());
    assert!(host.receive(&mut &greeting[..], &mut first).unwrap().is_none());
    let found = |named: &Named| match case.purpose == Purpose::Pairing || named.is(&key) {
        true => Lookup::Found(key.clone()),
        false => Lookup::Unknown,
    };
    let verdict = worker.receive(&mut &first[..], found).unwrap();
    let host = host.receive(&mut &verdict.answer[..], &mut Vec::new()).unwrap().unwrap();
    Shaken { greeting, first, answer: verdict.answer, host, worker: verdict.outcome.unwrap() }
}

#[test]
fn noise() {
    let cases_json: Vec<Value> = cases()
        .iter()
        .map(|case| {
            let Shaken { greeting, first, answer, host, worker } = shake(case);
            assert_eq!(host.hash, worker.hash);
            let trace = by_hand(case, &greeting, &first, &answer);
            assert_eq!(trace["handshake_hash"], hex(&host.hash), "the library and section 3.3 agree");
            json!({
                "name": case.name,
                "purpose": case.purpose as u8,
                "psk": hex(&case.key),
                "host_salt": hex(&SALT),
                "host_ephemeral": hex(&case.host_ephemeral),
                "worker_nonce": hex(&NONCE),
                "worker_ephemeral": hex(&case.worker_ephemeral),
                "host_versions": [case.host_versions.0, case.host_versions.1],
                "worker_versions": [case.worker_versions.0, case.worker_versions.1],
                "version": host.version,
                "greeting": hex(&greeting),
                "first_flight": hex(&first),
                "answer": hex(&answer),
                "trace": trace,
            })
        })
        .collect();

    let [_, _, plain] = cases();
    let Shaken { greeting, first, answer, .. } = shake(&plain);
    let change = |bytes: &[u8], at: usize, to: u8| {
        let mut bytes = bytes.to_vec();
        bytes[at] = to;
        bytes
    };
    let refused_by_worker: Vec<Value> = [
        ("HTTP", b"GET / HTTP/1.1\r\n".to_vec()),
        ("TLS", vec![0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01]),
        ("the magic as text", change(&first, 4, b'\n')),
        ("lowest version above highest", change(&first, 8, 9)),
        ("unknown purpose", change(&first, 12, 2)),
        ("reserved byte set", change(&first, 15, 1)),
        ("pairing with a key id", change(&first, 12, 1)),
        ("only newer versions", change(&change(&first, 8, 5), 10, 6)),
        ("only older versions", change(&change(&first, 8, 0), 10, 1)),
        ("another salt", change(&first, 16, first[16] ^ 1)),
        ("a mark of no key", change(&first, 24, first[24] ^ 1)),
        ("message 1 too short", change(&first, 32, 47)),
        ("message 1 too long", change(&first, 33, 0xFF)),
        ("ephemeral key altered", change(&first, 34, first[34] ^ 1)),
        ("tag altered", change(&first, 81, first[81] ^ 1)),
        ("the versions altered on the way", change(&first, 10, 3)),
        ("meant for another greeting", shake(&Case { worker_versions: (1, 2), ..cases()[2] }).first),
        ("the host's ephemeral key is zero", zero_point(&plain)),
    ]
    .into_iter()
    .map(|(name, bytes)| {
        let mut worker = worker_of(&plain);
        let key = Key::from_bytes(plain.key);
        let found = |named: &Named| if named.is(&key) { Lookup::Found(key) } else { Lookup::Unknown };
        let verdict = worker.receive(&mut &bytes[..], found).expect("enough bytes for a verdict");
        json!({
            "name": name,
            "worker_versions": [2, 2],
            "bytes": hex(&bytes),
            "rule": verdict.outcome.unwrap_err().rule(),
            "answer": hex(&verdict.answer),
        })
    })
    .collect();

    let status = |s: u8| {
        let mut clear = answer[..24].to_vec();
        (clear[12], clear[14]) = (s, 0);
        clear
    };
    // everything that the worker sends: its greeting, mostly the right one, and what comes behind it
    let behind = |bytes: Vec<u8>| [&greeting[..], &bytes].concat();
    let greeted = |at: usize, to: u8| change(&greeting, at, to);
    let refused_by_host: Vec<Value> = [
        ("not this protocol", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
        ("the magic as text", greeted(4, b'\n')),
        ("greeting: lowest version above highest", greeted(8, 9)),
        ("greeting: reserved byte set", greeted(13, 1)),
        ("greeting: no version in common", change(&greeted(8, 3), 10, 4)),
        ("greeting: only older versions", change(&greeted(8, 1), 10, 1)),
        ("another greeting than the one answered to", [change(&greeting, 16, 0), answer.clone()].concat()),
    ]
    .into_iter()
    .chain(
        [
            ("no version in common", status(1)),
            ("versions that it did not greet with", change(&change(&status(1), 8, 3), 10, 4)),
            ("key not accepted", status(2)),
            ("no pairing open", status(3)),
            ("crowded", status(4)),
            ("unknown status", status(5)),
            ("a status with a version chosen", change(&status(2), 14, 1)),
            ("reserved byte set", change(&answer, 13, 1)),
            ("a version that was not offered", change(&answer, 14, 3)),
            ("a worse version than possible", change(&answer, 14, 0)),
            ("the clear answer altered", change(&answer, 8, 1)),
            ("message 2 too short", change(&answer, 24, 71)),
            ("ephemeral key altered", change(&answer, 26, answer[26] ^ 1)),
            ("payload altered", change(&answer, 60, answer[60] ^ 1)),
            ("tag altered", change(&answer, 97, answer[97] ^ 1)),
            ("the worker's ephemeral key is zero", [&answer[..26], &[0; 32], &answer[58..]].concat()),
        ]
        .map(|(name, bytes)| (name, behind(bytes))),
    )
    .map(|(name, bytes)| {
        let error = host_of(&plain).receive(&mut &bytes[..], &mut Vec::new()).expect_err(name);
        json!({ "name": name, "bytes": hex(&bytes), "rule": error.rule() })
    })
    .collect();

    check(
        "noise.json",
        json!({ "cases": cases_json, "refused_by_worker": refused_by_worker, "refused_by_host": refused_by_host }),
    );
}

/// A first flight under the right key whose ephemeral key is the zero point.
fn zero_point(case: &Case) -> Vec<u8> {
    let Shaken { greeting, first, .. } = shake(case);
    let mut noise = Symmetric::begin(&[&greeting[..], &first[..32]].concat());
    noise.mix_key_and_hash(&case.key);
    noise.mix_hash(&[0; 32]);
    noise.mix_key(&[0; 32]);
    let tag = noise.seal(&[]);
    [&first[..34], &[0; 32], &tag[..]].concat()
}

/// Section 3.3 step by step, with nothing of the Noise library but its curve.
fn by_hand(case: &Case, greeting: &[u8], first: &[u8], answer: &[u8]) -> Value {
    let (message_1, message_2) = (&first[34..], &answer[26..]);
    let clear = [greeting, &first[..32]].concat();
    let mut noise = Symmetric::begin(&clear);
    let begun = (hex(&noise.h), hex(&noise.ck));
    noise.mix_key_and_hash(&case.key);
    let after_psk = noise.state();
    noise.mix_hash(&message_1[..32]);
    noise.mix_key(&message_1[..32]);
    let after_host_e = noise.state();
    let sealed_1 = noise.seal(&[]);
    assert_eq!(message_1[32..], sealed_1, "message 1");
    let after_message_1 = hex(&noise.h);
    noise.mix_hash(&message_2[..32]);
    noise.mix_key(&message_2[..32]);
    let after_worker_e = noise.state();
    let shared = curve(&case.host_ephemeral, &message_2[..32]);
    assert_eq!(shared, curve(&case.worker_ephemeral, &message_1[..32]));
    noise.mix_key(&shared);
    let after_ee = noise.state();
    let sealed_2 = noise.seal(&answer[..24]);
    assert_eq!(message_2[32..], sealed_2, "message 2");
    let [host_key, worker_key, _] = hkdf(&noise.ck, &[]);
    json!({
        "prologue": hex(&[PROLOGUE, &clear].concat()),
        "h_after_prologue": begun.0,
        "ck_at_first": begun.1,
        "after_psk": after_psk,
        "after_host_e": after_host_e,
        "h_after_message_1": after_message_1,
        "after_worker_e": after_worker_e,
        "shared_secret": hex(&shared),
        "after_ee": after_ee,
        "handshake_hash": hex(&noise.h),
        "host_key": hex(&host_key),
        "worker_key": hex(&worker_key),
    })
}

const PROLOGUE: &[u8] = b"dim wire: host initiates, worker responds";

struct Symmetric {
    h: [u8; 32],
    ck: [u8; 32],
    k: [u8; 32],
}

impl Symmetric {
    fn begin(clear: &[u8]) -> Symmetric {
        let name: [u8; 32] = Sha256::digest(b"Noise_NNpsk0_25519_ChaChaPoly_SHA256").into();
        let mut noise = Symmetric { h: name, ck: name, k: [0; 32] };
        noise.mix_hash(&[PROLOGUE, clear].concat());
        noise
    }

    fn mix_hash(&mut self, data: &[u8]) {
        self.h = Sha256::new().chain_update(self.h).chain_update(data).finalize().into();
    }

    fn mix_key(&mut self, data: &[u8]) {
        [self.ck, self.k, _] = hkdf(&self.ck, data);
    }

    fn mix_key_and_hash(&mut self, data: &[u8]) {
        let [ck, t, k] = hkdf(&self.ck, data);
        (self.ck, self.k) = (ck, k);
        self.mix_hash(&t);
    }

    fn seal(&mut self, plain: &[u8]) -> Vec<u8> {
        use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
        let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &self.k).unwrap());
        let mut sealed = plain.to_vec();
        key.seal_in_place_append_tag(Nonce::assume_unique_for_key([0; 12]), Aad::from(self.h), &mut sealed)
            .unwrap();
        self.mix_hash(&sealed);
        sealed
    }

    fn state(&self) -> Value {
        json!({ "h": hex(&self.h), "ck": hex(&self.ck), "k": hex(&self.k) })
    }
}

fn hkdf(ck: &[u8; 32], input: &[u8]) -> [[u8; 32]; 3] {
    let mac = |key: &[u8], parts: &[&[u8]]| -> [u8; 32] {
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), &parts.concat());
        tag.as_ref().try_into().unwrap()
    };
    let t = mac(ck, &[input]);
    let o1 = mac(&t, &[&[1]]);
    let o2 = mac(&t, &[&o1, &[2]]);
    let o3 = mac(&t, &[&o2, &[3]]);
    [o1, o2, o3]
}

fn curve(secret: &[u8; 32], public: &[u8]) -> [u8; 32] {
    use snow::resolvers::{CryptoResolver, DefaultResolver};
    let mut curve = DefaultResolver.resolve_dh(&snow::params::DHChoice::Curve25519).unwrap();
    curve.set(secret);
    let mut shared = [0; 32];
    curve.dh(public, &mut shared).unwrap();
    shared
}

// --- frames ----------------------------------------------------------------------------------------------

/// A message of `length` bytes: a header, then byte i = (31 i + 7) mod 256.
fn filled(kind: u8, length: usize) -> Vec<u8> {
    let mut m: Vec<u8> = (0..length).map(|i| (31 * i + 7) as u8).collect();
    m[..4].copy_from_slice(&[kind, 0, 0, 0]);
    m[4..8].copy_from_slice(&(length as u32).to_le_bytes());
    m
}

fn seal(sealer: &mut Sealer, message: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let (head, rows) = message.split_at(message.len().min(16));
    let mut outgoing = Outgoing::new(head, rows);
    while sealer.seal(&mut outgoing, &mut out).unwrap() {}
    out
}

/// How many messages come out, and what ends the stream, if anything.
fn open(key: &[u8; 32], limit: usize, stream: &[u8]) -> (usize, Option<&'static str>) {
    let mut inbox = Inbox::new(Opener::new(key), limit);
    let (mut rest, mut messages) = (stream, 0);
    loop {
        match inbox.poll() {
            Ok(true) => {
                messages += 1;
                inbox.release();
            }
            Ok(false) if rest.is_empty() => return (messages, None),
            Ok(false) => rest = &rest[inbox.fill(rest)..],
            Err(error) => return (messages, Some(error.rule())),
        }
    }
}

#[test]
fn frames() {
    let key = counting(0xA0);
    let lengths: [&[usize]; 5] = [&[8], &[16, 8, 9], &[65_519], &[65_520, 8], &[150_000, 8]];
    let streams: Vec<Value> = lengths
        .iter()
        .map(|lengths| {
            let mut sealer = Sealer::new(&key);
            let messages: Vec<Vec<u8>> = lengths.iter().map(|&n| filled(0x24, n)).collect();
            let stream: Vec<u8> = messages.iter().flat_map(|m| seal(&mut sealer, m)).collect();
            assert_eq!(open(&key, 200_000, &stream), (lengths.len(), None));
            let digest: [u8; 32] = Sha256::digest(&stream).into();
            let mut entry = json!({
                "messages": lengths.iter().map(|&n| json!({ "head": hex(&filled(0x24, n)[..8]), "length": n })).collect::<Vec<_>>(),
                "fill": "from byte 8 on: byte i = (31 i + 7) mod 256",
                "stream_length": stream.len(),
                "stream_sha256": hex(&digest),
            });
            if stream.len() < 4096 {
                entry["stream"] = hex(&stream).into();
            }
            entry
        })
        .collect();

    // frames made by hand, to break rules that a sealer cannot break
    let frames = |plains: &[&[u8]]| {
        let mut sealer = Raw::new(&key);
        plains.iter().flat_map(|p| sealer.frame(p)).collect::<Vec<u8>>()
    };
    let m = |n: usize| filled(0x24, n);
    let good = frames(&[&m(16), &m(8)]);
    let cut = good.len() - m(8).len() - 18;
    let flip = |at: usize| {
        let mut s = good.clone();
        s[at] ^= 1;
        s
    };
    let big = m(70_000);
    let with_length = |n: u32| {
        let mut bytes = m(16);
        bytes[4..8].copy_from_slice(&n.to_le_bytes());
        bytes
    };
    let refused: Vec<Value> = [
        ("a bit of the ciphertext flipped", 4096, flip(5), "bad-tag"),
        ("a bit of the tag flipped", 4096, flip(2 + 16 + 15), "bad-tag"),
        ("a bit of the second frame flipped", 4096, flip(cut + 3), "bad-tag"),
        ("the first frame again", 4096, [&good[..cut], &good[..cut]].concat(), "bad-tag"),
        ("two frames in the wrong order", 4096, [&good[cut..], &good[..cut]].concat(), "bad-tag"),
        ("a frame left out", 4096, good[cut..].to_vec(), "bad-tag"),
        ("a frame of the other direction", 4096, Raw::new(&counting(0xC0)).frame(&m(16)), "bad-tag"),
        ("a frame without plaintext", 4096, vec![16, 0], "frame-length"),
        ("a frame shorter than its tag", 4096, vec![1, 0], "frame-length"),
        ("a first frame too short for a header", 4096, frames(&[&m(8)[..7]]), "frame-length"),
        (
            "a first frame longer than the limit, from two bytes",
            4096,
            (4097u16 + 16).to_le_bytes().to_vec(),
            "too-long",
        ),
        ("the largest frame, from two bytes", 4096, vec![0xFF, 0xFF], "too-long"),
        ("a header that says more than the limit", 4096, frames(&[&with_length(4097)]), "too-long"),
        ("a header that says 4 GiB", 200_000, frames(&[&with_length(u32::MAX)]), "too-long"),
        ("a message shorter than its frame", 4096, frames(&[&with_length(15)]), "frame-length"),
        (
            "a message longer than its frame, though it would fit",
            4096,
            frames(&[&with_length(17)]),
            "frame-length",
        ),
        ("a message of length 0", 4096, frames(&[&with_length(0)]), "frame-length"),
        (
            "a long message in frames that are not full",
            200_000,
            frames(&[&big[..60_000], &big[60_000..]]),
            "frame-length",
        ),
        (
            "a second frame that is too short",
            200_000,
            frames(&[&big[..65_519], &big[65_519..69_999]]),
            "frame-length",
        ),
        (
            "a second frame that holds the next message too",
            200_000,
            frames(&[&big[..65_519], &[&big[65_519..], &m(8)].concat()]),
            "frame-length",
        ),
    ]
    .into_iter()
    .map(|(name, limit, stream, rule)| {
        let (messages, found) = open(&key, limit, &stream);
        assert_eq!(found, Some(rule), "{name}");
        let mut entry = json!({ "name": name, "limit": limit, "messages_before": messages, "rule": rule });
        if stream.len() < 4096 {
            entry["stream"] = hex(&stream).into();
        } else {
            // long streams are told as plaintexts of their frames
            entry["frames"] = long_frames(name);
        }
        entry
    })
    .collect();
    check("frames.json", json!({ "key": hex(&key), "streams": streams, "refused": refused }));
}

/// The frames of the long streams above, as ranges of the message of 70,000 bytes and what follows it.
fn long_frames(name: &str) -> Value {
    let ranges: &[[usize; 2]] = match name {
        "a long message in frames that are not full" => &[[0, 60_000], [60_000, 70_000]],
        "a second frame that is too short" => &[[0, 65_519], [65_519, 69_999]],
        "a second frame that holds the next message too" => &[[0, 65_519], [65_519, 70_008]],
        other => panic!("{other}"),
    };
    json!({
        "of": "the messages of 70,000 and of 8 bytes, filled as above, one after the other",
        "ranges": ranges,
    })
}

/// Seals whatever it is given as one frame.
struct Raw {
    sealer: Sealer,
}

impl Raw {
    fn new(key: &[u8; 32]) -> Raw {
        Raw { sealer: Sealer::new(key) }
    }

    fn frame(&mut self, plain: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        assert!(self.sealer.seal(&mut Outgoing::new(plain, &[]), &mut out).unwrap());
        out
    }
}

// --- messages --------------------------------------------------------------------------------------------

/// A bit of the features that has no meaning any more: to be ignored.
const RETIRED: u32 = 1;

fn host_terms() -> Terms {
    Terms {
        version: 2,
        row_types: RowTypes::F16,
        role: SliceRole::Middle,
        features: RETIRED,
        instance: 0x1122_3344_5566_7788,
        n_blocks: 24,
        blocks: BlockRange { first: 11, last: 16 },
        shape: Shape::hidden(4),
        input: Some(Sha(counting(0x70))),
        output: None,
        n_ctx: 2048,
        max_rows: 128,
        max_sessions: 2,
        max_in_flight: 2,
        take_back: TakeBack::NOTHING,
        machine: Machine::default(),
        model: Some(Sha(counting(0x10))),
        slice: Some(Sha(counting(0x30))),
        params: Some(Sha(counting(0x50))),
        arch: "qwen2".into(),
        software: "dim-host 0.1.0".into(),
        name: "Anna's MacBook".into(),
    }
}

fn worker_terms() -> Terms {
    Terms {
        row_types: RowTypes::ALL,
        features: RETIRED | features::PUSH,
        instance: 0x8877_6655_4433_2211,
        n_ctx: 4096,
        max_rows: 64,
        max_sessions: 8,
        max_in_flight: 4,
        take_back: TakeBack::ALL,
        machine: Machine {
            engine: Engine::CoreMl,
            unit: Unit::Npu,
            budget_mib: Some(2100),
            measured: Measured { rows: 1, us: 140_000 },
        },
        software: "dim-worker 0.1.0".into(),
        name: "Zoë's iPhone 📱".into(),
        ..host_terms()
    }
}

fn offer() -> PushOffer {
    let item = |kind, index, size, fill| Item { kind, index, size, sha256: Sha(counting(fill)) };
    PushOffer {
        model: Sha(counting(0x10)),
        slice: Sha(counting(0x30)),
        blocks: BlockRange { first: 11, last: 16 },
        items: vec![
            item(ItemKind::Manifest, 0, 1234, 0x01),
            item(ItemKind::PackageManifest, 0, 600, 0x02),
            item(ItemKind::PackageModel, 0, 50_000, 0x03),
            item(ItemKind::PackageWeights, 0, 950_000_000, 0x04),
            item(ItemKind::SelfTest, 0, 4096, 0x05),
        ],
        name: "Anna's MacBook".into(),
    }
}

fn agreed() -> Agreed {
    terms::agree(&host_terms(), &worker_terms()).unwrap()
}

/// Rows of all kinds of parts, with token ids: 3 F32, 2 I32, 2 F32 that may not be rounded, 2 F16; back, the first two.
fn several_parts() -> Shape {
    let part = |part_type, may_round, values| Part { part_type, may_round, values };
    let input = Layout {
        parts: vec![
            part(PartType::F32, true, 3),
            part(PartType::I32, false, 2),
            part(PartType::F32, false, 2),
            part(PartType::F16, false, 2),
        ],
    };
    Shape { output: Layout { parts: input.parts[..2].to_vec() }, input, reads_tokens: true }
}

fn shape_json(shape: &Shape) -> Value {
    let layout = |layout: &Layout| -> Vec<Value> {
        let number = |part_type| match part_type {
            PartType::F16 => 1,
            PartType::F32 => 2,
            PartType::I32 => 3,
        };
        layout.parts.iter().map(|p| json!([number(p.part_type), u8::from(p.may_round), p.values])).collect()
    };
    json!({ "tokens": shape.reads_tokens, "input": layout(&shape.input), "output": layout(&shape.output) })
}

fn step_bytes(step: u32, spans: &[Span], tokens: &[i32], values: RowsRef<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_step_head(&mut bytes, step, spans, tokens, values);
    bytes.extend_from_slice(rows::as_bytes(values));
    bytes
}

fn done_bytes(step: u32, n_rows: u32, values: RowsRef<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let head = DoneHead { step, n_rows, compute_us: 1500, wait_us: 20, began_us: 1 << 33 };
    encode_step_done_head(&mut bytes, head, values);
    bytes.extend_from_slice(rows::as_bytes(values));
    bytes
}

const NUMBERS: [f32; 12] =
    [0.0, -0.0, 1.0, -1.0, 0.5, 65504.0, -65504.0, 6.1035156e-5, 1024.0, -3.25, 100.0, 0.125];

fn encoded(message: &Message<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}

/// Every message but those with rows, with its fields as JSON.
fn good_messages() -> Vec<(&'static str, Message<'static>, Value)> {
    let status = Status {
        activity: Activity::Computing,
        temperature: Temperature::Serious,
        battery_percent: Some(81),
        free_mib: Some(1234),
        step: 77,
        pause_in_s: Some(90),
    };
    let fault = Fault {
        code: ErrorCode::NonFinite,
        step: Some(9),
        session: Some(1),
        block: Some(17),
        count: 3,
        text: "3 values are not finite".into(),
    };
    vec![
        ("HELLO", Message::Hello(host_terms()), terms_json(&host_terms())),
        ("ACCEPT", Message::Accept(worker_terms()), terms_json(&worker_terms())),
        (
            "OFFER without a slice",
            Message::Offer(Terms::blank(2, "dim-worker 0.1.0", "phone")),
            terms_json(&Terms::blank(2, "dim-worker 0.1.0", "phone")),
        ),
        (
            "OFFER of several parts",
            Message::Offer(Terms { shape: several_parts(), ..worker_terms() }),
            terms_json(&Terms { shape: several_parts(), ..worker_terms() }),
        ),
        (
            "REFUSE",
            Message::Refuse { reason: Reason::Context, terms: worker_terms(), text: "too long".into() },
            json!({ "reason": 12, "terms": terms_json(&worker_terms()), "text": "too long" }),
        ),
        (
            "BUSY",
            Message::Busy { since_ms: 123_456_789_012, name: "Anna's MacBook".into() },
            json!({ "since_ms": 123_456_789_012u64, "name": "Anna's MacBook" }),
        ),
        ("INQUIRE", Message::Inquire, json!({})),
        (
            "PAIR_REQUEST",
            Message::PairRequest { name: "Anna's MacBook".into(), software: "dim-host 0.1.0".into() },
            json!({ "name": "Anna's MacBook", "software": "dim-host 0.1.0" }),
        ),
        (
            "PAIR_GRANT",
            Message::PairGrant {
                key: Key::from_bytes(counting(0x77)),
                name: "phone".into(),
                software: "dim-worker 0.1.0".into(),
            },
            json!({ "key": hex(&counting(0x77)), "name": "phone", "software": "dim-worker 0.1.0" }),
        ),
        ("PAIR_STORED", Message::PairStored, json!({})),
        ("REWIND", Message::Rewind { session: 1, position: 200 }, json!({ "session": 1, "position": 200 })),
        ("END_SESSION", Message::EndSession { session: 1 }, json!({ "session": 1 })),
        (
            "STEP_FAILED",
            Message::StepFailed(StepFailed { step: 9, fault: Some(fault.clone()) }),
            json!({
                "void": false, "code": 5, "step": 9, "session": 1, "block": 17, "count": 3,
                "text": "3 values are not finite",
            }),
        ),
        (
            "STEP_FAILED, called off",
            Message::StepFailed(StepFailed { step: 10, fault: None }),
            json!({ "void": true, "code": 0, "step": 10, "session": null, "block": null, "count": 0, "text": "" }),
        ),
        ("CANCEL", Message::Cancel { step: 10 }, json!({ "step": 10 })),
        (
            "HEARTBEAT",
            Message::Heartbeat(status),
            json!({ "state": 1, "temperature": 3, "battery": 81, "free_mib": 1234, "step": 77, "pause_in_s": 90 }),
        ),
        (
            "HEARTBEAT of a host",
            Message::Heartbeat(Status::default()),
            json!({ "state": 0, "temperature": 0, "battery": null, "free_mib": null, "step": 0, "pause_in_s": null }),
        ),
        ("PING", Message::Ping(0x0102_0304_0506_0708), json!({ "number": 0x0102_0304_0506_0708u64 })),
        (
            "PONG",
            Message::Pong { number: 0x0102_0304_0506_0708, clock_us: 1 << 40 },
            json!({ "number": 0x0102_0304_0506_0708u64, "clock_us": 1u64 << 40 }),
        ),
        (
            "ERROR",
            Message::Error(fault),
            json!({ "code": 5, "step": 9, "session": 1, "block": 17, "count": 3, "text": "3 values are not finite" }),
        ),
        (
            "ERROR about nothing in particular",
            Message::Error(Fault::new(ErrorCode::Internal, "")),
            json!({ "code": 11, "step": null, "session": null, "block": null, "count": 0, "text": "" }),
        ),
        ("GOODBYE, pausing", Message::Goodbye(Farewell::Pausing), json!({ "why": 2 })),
        ("PUSH_OFFER", Message::PushOffer(offer()), push_offer_json(&offer())),
        (
            "PUSH_NEED",
            Message::PushNeed(vec![1234, 600, 0, 16_777_216, 0]),
            json!({ "have": [1234, 600, 0, 16_777_216, 0] }),
        ),
        (
            "PUSH_DATA",
            Message::PushData { item: 2, offset: 0, bytes: b"some bytes" },
            json!({ "item": 2, "offset": 0, "bytes": hex(b"some bytes") }),
        ),
        (
            "PUSH_STORED",
            Message::PushStored { item: 3, bytes: 33_554_432 },
            json!({ "item": 3, "bytes": 33_554_432 }),
        ),
        (
            "PUSH_RESULT, all",
            Message::PushResult { outcome: PushOutcome::Stored, item: None, text: String::new() },
            json!({ "outcome": 0, "item": null, "text": "" }),
        ),
        (
            "PUSH_RESULT, one differs",
            Message::PushResult {
                outcome: PushOutcome::HashDiffers,
                item: Some(3),
                text: "sent again, please".into(),
            },
            json!({ "outcome": 1, "item": 3, "text": "sent again, please" }),
        ),
    ]
}

fn terms_json(t: &Terms) -> Value {
    let machine = &t.machine;
    json!({
        "version": t.version, "dtypes": t.row_types.bits(), "role": t.role as u8, "features": t.features,
        "instance": t.instance, "n_blocks": t.n_blocks, "first_block": t.blocks.first,
        "last_block": t.blocks.last, "n_ctx": t.n_ctx, "max_rows": t.max_rows, "max_sessions": t.max_sessions,
        "max_in_flight": t.max_in_flight, "take_back": t.take_back.0,
        "engine": machine.engine as u8, "unit": machine.unit as u8, "budget_mib": machine.budget_mib,
        "measured_rows": machine.measured.rows, "measured_us": machine.measured.us,
        "model": digest(t.model), "slice": digest(t.slice), "params": digest(t.params),
        "input": digest(t.input), "output": digest(t.output), "shape": shape_json(&t.shape),
        "arch": t.arch, "software": t.software, "name": t.name,
    })
}

/// Zeros: not known.
fn digest(known: Option<Sha>) -> String {
    hex(&known.map_or([0; 32], |sha| sha.0))
}

fn push_offer_json(o: &PushOffer) -> Value {
    let items: Vec<Value> = o
        .items
        .iter()
        .map(|i| json!({ "kind": i.kind as u8, "index": i.index, "size": i.size, "sha256": i.sha256.to_string() }))
        .collect();
    json!({
        "model": o.model.to_string(), "slice": o.slice.to_string(), "first_block": o.blocks.first,
        "last_block": o.blocks.last,
        "items": items, "name": o.name, "push_id": o.id().to_string(),
    })
}

#[test]
fn messages() {
    let mut good = Vec::new();
    for (name, message, fields) in good_messages() {
        let bytes = encoded(&message);
        assert_eq!(Message::decode(&bytes, &Shape::default()), Ok(message), "{name}");
        let shape = shape_json(&Shape::default());
        good.push(json!({ "name": name, "shape": shape, "fields": fields, "hex": hex(&bytes) }));
    }
    let f16s: Vec<f16> = NUMBERS.iter().map(|&x| f16::from_f32(x)).collect();
    let spans = [Span { session: 1, position: 7, count: 2 }, Span { session: 0, position: 0, count: 1 }];
    let one = [Span { session: 0, position: 41, count: 1 }];
    let (plain, parts) = (Shape::hidden(4), several_parts());
    let places = |row_type| 3 * parts.input.width(row_type);
    // bits of an I32 are any bits
    let wide16: Vec<f16> = (0..places(RowType::F16)).map(|i| f16::from_bits(0x3C00 + i as u16)).collect();
    let wide32: Vec<f32> =
        (0..places(RowType::F32)).map(|i| f32::from_bits(0x3F80_0000 + i as u32)).collect();
    let ids = [5, -1, i32::MAX];
    let exact = {
        let mut bytes = step_bytes(4, &one, &[], RowsRef::F16(&f16s[..4]));
        bytes[1] |= 0x10;
        bytes
    };
    type WithRows<'a> = (&'a str, Vec<u8>, &'a [Span], &'a Shape);
    let with_rows: [WithRows<'_>; 8] = [
        ("STEP, one row, F16", step_bytes(1, &one, &[], RowsRef::F16(&f16s[..4])), &one, &plain),
        ("STEP, two sessions, F16", step_bytes(2, &spans, &[], RowsRef::F16(&f16s)), &spans, &plain),
        ("STEP, two sessions, F32", step_bytes(3, &spans, &[], RowsRef::F32(&NUMBERS)), &spans, &plain),
        ("STEP_DONE, F16", done_bytes(2, 3, RowsRef::F16(&f16s)), &[], &plain),
        ("STEP, each row by itself", exact, &one, &plain),
        (
            "STEP, several parts and token ids, F16",
            step_bytes(5, &spans, &ids, RowsRef::F16(&wide16)),
            &spans,
            &parts,
        ),
        (
            "STEP, several parts and token ids, F32",
            step_bytes(6, &spans, &ids, RowsRef::F32(&wide32)),
            &spans,
            &parts,
        ),
        ("STEP_DONE, two parts, F16", done_bytes(5, 3, RowsRef::F16(&wide16[..21])), &[], &parts),
    ];
    for (name, bytes, spans, shape) in &with_rows {
        let message = Message::decode(bytes, shape).unwrap();
        assert_eq!(encoded(&message), *bytes, "{name}");
        let spans: Vec<_> = spans.iter().map(|s| [s.session, s.position, s.count]).collect();
        let fields = match message {
            Message::Step(s) => json!({
                "step": s.step, "n_rows": s.n_rows, "row_format": rows::number(s.row_type), "exact": s.is_exact,
                "spans": spans, "tokens": s.tokens().collect::<Vec<_>>(), "rows": hex(s.rows),
            }),
            Message::StepDone(s) => json!({
                "step": s.step, "n_rows": s.n_rows, "row_format": rows::number(s.row_type),
                "compute_us": s.compute_us, "wait_us": s.wait_us, "began_us": s.began_us, "rows": hex(s.rows),
            }),
            other => panic!("{other:?}"),
        };
        good.push(json!({ "name": name, "shape": shape_json(shape), "fields": fields, "hex": hex(bytes) }));
    }

    let of_shape = |shape: &Shape, list: Vec<(&'static str, Vec<u8>, &'static str)>| -> Vec<Value> {
        let refused = |(name, bytes, rule): (&str, Vec<u8>, &str)| {
            let found = Message::decode(&bytes, shape).map(|m| m.kind()).map_err(|e| e.rule());
            assert_eq!(found, Err(rule), "{name}");
            json!({ "name": name, "shape": shape_json(shape), "hex": hex(&bytes), "rule": rule })
        };
        list.into_iter().map(refused).collect()
    };
    let mut bad = of_shape(&plain, bad_messages(&with_rows[0].1, &with_rows[3].1));
    bad.extend(of_shape(&parts, bad_steps_of_parts(&with_rows[5].1)));

    check(
        "messages.json",
        json!({ "good": good, "bad": bad, "unexpected": unexpected(&with_rows[0].1, &with_rows[3].1) }),
    );
}

fn change(bytes: &[u8], at: usize, to: u8) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] = to;
    bytes
}

/// Drops or adds bytes at the end and says so in the header.
fn resize(bytes: &[u8], by: isize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().saturating_add_signed(by), 0);
    let length = bytes.len() as u32;
    bytes[4..8].copy_from_slice(&length.to_le_bytes());
    bytes
}

/// Of a step of three rows with token ids.
fn bad_steps_of_parts(step: &[u8]) -> Vec<(&'static str, Vec<u8>, &'static str)> {
    vec![
        ("STEP without the last row's last part", resize(step, -4), "truncated"),
        ("STEP with a place too many", resize(step, 2), "trailing-bytes"),
        (
            "STEP whose token ids are not filled up with zeros",
            change(step, 16 + 2 * 16 + 12, 1),
            "reserved-not-zero",
        ),
        ("STEP of no rows, with token ids", change(step, 12, 0), "trailing-bytes"),
    ]
}

fn bad_messages(step: &[u8], done: &[u8]) -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let hello = encoded(&Message::Hello(host_terms()));
    let ping = encoded(&Message::Ping(1));
    let heartbeat = encoded(&Message::Heartbeat(Status::default()));
    let push = encoded(&Message::PushOffer(offer()));
    let result =
        encoded(&Message::PushResult { outcome: PushOutcome::Stored, item: None, text: String::new() });
    let error = encoded(&Message::Error(Fault::new(ErrorCode::Internal, "ab")));
    let failed = encoded(&Message::StepFailed(StepFailed { step: 10, fault: None }));
    vec![
        ("empty", vec![], "truncated"),
        ("half a header", ping[..5].to_vec(), "truncated"),
        ("kind 0", change(&ping, 0, 0), "unknown-kind"),
        ("kind 0x0C, between two that exist", change(&ping, 0, 0x0C), "unknown-kind"),
        ("kind 0xFF", change(&ping, 0, 0xFF), "unknown-kind"),
        ("shorter than its header says", ping[..15].to_vec(), "truncated"),
        ("longer than its header says", [&ping[..], &[0]].concat(), "trailing-bytes"),
        ("PING with bytes left over", resize(&ping, 1), "trailing-bytes"),
        ("PING cut short", resize(&ping, -1), "truncated"),
        ("PING with a", change(&ping, 1, 1), "reserved-not-zero"),
        ("PING with b", change(&ping, 2, 1), "reserved-not-zero"),
        ("GOODBYE for no known reason", vec![0x24, 0, 4, 0, 8, 0, 0, 0], "bad-value"),
        ("HELLO cut in its last string", resize(&hello, -1), "truncated"),
        ("HELLO with bytes left over", resize(&hello, 1), "trailing-bytes"),
        ("HELLO with an unknown dtype", change(&hello, 10, 8), "bad-value"),
        ("HELLO with the retired dtype", change(&hello, 10, 4), "bad-value"),
        ("HELLO with an unknown role", change(&hello, 11, 4), "bad-value"),
        ("HELLO with a tick", change(&hello, 58, 1), "reserved-not-zero"),
        ("HELLO with an unknown engine", change(&hello, 56, 3), "bad-value"),
        ("HELLO with an unknown unit", change(&hello, 57, 4), "bad-value"),
        ("HELLO that may want token ids", change(&hello, 232, 2), "bad-value"),
        ("HELLO with 129 parts", change(&hello, 233, 129), "bad-value"),
        ("HELLO with a reserved byte behind its counts", change(&hello, 239, 1), "reserved-not-zero"),
        ("HELLO with a part of no type", change(&hello, 240, 0), "bad-value"),
        ("HELLO with a part of an unknown type", change(&hello, 240, 4), "bad-value"),
        ("HELLO with an I32 that may be rounded", change(&hello, 240, 3), "bad-value"),
        ("HELLO with unknown flags of a part", change(&hello, 241, 2), "bad-value"),
        ("HELLO with a reserved byte in a part", change(&hello, 242, 1), "reserved-not-zero"),
        ("HELLO with a part of no values", change(&hello, 244, 0), "bad-value"),
        (
            "HELLO with an odd number of F16",
            change(&change(&change(&hello, 240, 1), 241, 0), 244, 3),
            "bad-value",
        ),
        ("HELLO with one part more than it has", change(&hello, 234, 2), "reserved-not-zero"),
        ("HELLO with a next hop", change(&hello, hello.len() - 2, 1), "reserved-not-zero"),
        ("HELLO with a string of 64 KiB", change(&change(&hello, 256, 0xFF), 257, 0xFF), "string-too-long"),
        ("HELLO with an architecture of 33 bytes", change(&hello, 256, 33), "string-too-long"),
        ("HELLO with a string that is not UTF-8", change(&hello, 258, 0xFF), "not-utf8"),
        (
            "REFUSE for no known reason",
            change(
                &encoded(&Message::Refuse { reason: Reason::Arch, terms: host_terms(), text: String::new() }),
                2,
                18,
            ),
            "bad-value",
        ),
        ("HEARTBEAT in an unknown state", change(&heartbeat, 8, 4), "bad-value"),
        ("HEARTBEAT with an unknown temperature", change(&heartbeat, 9, 5), "bad-value"),
        ("HEARTBEAT with a battery of 101 %", change(&heartbeat, 10, 101), "bad-value"),
        ("HEARTBEAT with a reserved byte", change(&heartbeat, 11, 1), "reserved-not-zero"),
        (
            "END_SESSION with a reserved byte",
            change(&encoded(&Message::EndSession { session: 0 }), 15, 1),
            "reserved-not-zero",
        ),
        (
            "CANCEL with a reserved byte",
            change(&encoded(&Message::Cancel { step: 1 }), 15, 1),
            "reserved-not-zero",
        ),
        ("STEP_FAILED that is neither", change(&failed, 1, 2), "bad-value"),
        ("STEP_FAILED, called off for a reason", change(&failed, 2, 1), "reserved-not-zero"),
        ("STEP_FAILED, called off with a count", change(&failed, 20, 1), "reserved-not-zero"),
        ("HEARTBEAT with a reserved byte at its end", change(&heartbeat, 22, 1), "reserved-not-zero"),
        (
            "PONG without a clock",
            resize(&encoded(&Message::Pong { number: 1, clock_us: 2 }), -8),
            "truncated",
        ),
        ("ERROR with a text of 1,001 bytes", change(&change(&error, 24, 0xE9), 25, 3), "string-too-long"),
        ("STEP in row format 0", change(step, 1, 0), "bad-value"),
        ("STEP in row format 3, which is retired", change(step, 1, 3), "bad-value"),
        ("STEP in row format 4", change(step, 1, 4), "bad-value"),
        ("STEP with the retired bit 0x80 in its row format", change(step, 1, 0x81), "bad-value"),
        ("STEP one byte short", resize(step, -1), "truncated"),
        ("STEP one byte long", resize(step, 1), "trailing-bytes"),
        ("STEP with 65,535 spans", change(&change(step, 2, 0xFF), 3, 0xFF), "truncated"),
        ("STEP with 2^32 - 1 rows", (12..16).fold(step.to_vec(), |b, at| change(&b, at, 0xFF)), "truncated"),
        ("STEP with no rows and rows behind", change(step, 12, 0), "trailing-bytes"),
        ("STEP with a reserved byte in a span", change(step, 16 + 12, 1), "reserved-not-zero"),
        ("STEP_DONE in the retired row format 3", change(done, 1, 3), "bad-value"),
        ("STEP_DONE with b", change(done, 2, 1), "reserved-not-zero"),
        ("STEP_DONE one row short", resize(done, -8), "truncated"),
        ("PUSH_OFFER of nothing", change(&push, 2, 0), "bad-value"),
        ("PUSH_OFFER of 65 items", change(&push, 2, 65), "bad-value"),
        ("PUSH_OFFER of an unknown kind", change(&push, 80, 6), "bad-value"),
        ("PUSH_OFFER with a reserved byte", change(&push, 82, 1), "reserved-not-zero"),
        ("PUSH_NEED of nothing", vec![0x31, 0, 0, 0, 8, 0, 0, 0], "bad-value"),
        ("PUSH_DATA without bytes", vec![0x32, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "bad-value"),
        (
            "PUSH_STORED with a reserved byte",
            change(&encoded(&Message::PushStored { item: 0, bytes: 0 }), 23, 1),
            "reserved-not-zero",
        ),
        ("PUSH_RESULT that is neither", change(&result, 1, 3), "bad-value"),
    ]
}

/// Good messages out of place: (receiver, its state, message).
fn unexpected(step: &[u8], done: &[u8]) -> Vec<Value> {
    let m = |message: Message<'_>| encoded(&message);
    let hello = || m(Message::Hello(host_terms()));
    let accept = || m(Message::Accept(worker_terms()));
    let list: Vec<(&str, &str, &str, Vec<u8>)> = vec![
        ("a STEP before HELLO", "worker", "opening", step.to_vec()),
        ("a REWIND before HELLO", "worker", "opening", m(Message::Rewind { session: 0, position: 0 })),
        (
            "a HEARTBEAT of a host before ACCEPT",
            "worker",
            "opening",
            m(Message::Heartbeat(Status::default())),
        ),
        ("an ACCEPT sent to a worker", "worker", "opening", accept()),
        (
            "a PAIR_REQUEST under a paired key",
            "worker",
            "opening",
            m(Message::PairRequest { name: "a".into(), software: "b".into() }),
        ),
        ("a HELLO while serving", "worker", "serving", hello()),
        ("a STEP_DONE sent to a worker", "worker", "serving", done.to_vec()),
        ("an INQUIRE while serving", "worker", "serving", m(Message::Inquire)),
        (
            "PUSH_DATA while serving",
            "worker",
            "serving",
            m(Message::PushData { item: 0, offset: 0, bytes: b"x" }),
        ),
        ("an ACCEPT nobody asked for", "host", "opening", accept()),
        ("an OFFER nobody asked for", "host", "opening", m(Message::Offer(worker_terms()))),
        ("a STEP sent to a host", "host", "serving", step.to_vec()),
        ("a second ACCEPT", "host", "serving", accept()),
        ("a REWIND sent to a host", "host", "serving", m(Message::Rewind { session: 0, position: 0 })),
        ("a HELLO under a pairing code", "worker", "pairing", hello()),
        ("a STEP under a pairing code", "worker", "pairing", step.to_vec()),
        ("a PAIR_STORED before the key", "worker", "pairing", m(Message::PairStored)),
        (
            "a PAIR_GRANT nobody asked for",
            "host",
            "pairing",
            m(Message::PairGrant { key: Key::from_bytes([0; 32]), name: "a".into(), software: "b".into() }),
        ),
        ("a STEP while pushing", "worker", "pushing", step.to_vec()),
        ("a PUSH_STORED sent to a worker", "worker", "pushing", m(Message::PushStored { item: 0, bytes: 1 })),
        ("a PING after GOODBYE", "worker", "closed", m(Message::Ping(1))),
        ("a CANCEL before HELLO", "worker", "opening", m(Message::Cancel { step: 1 })),
        ("a CANCEL sent to a host", "host", "serving", m(Message::Cancel { step: 1 })),
        (
            "a STEP_FAILED sent to a worker",
            "worker",
            "serving",
            m(Message::StepFailed(StepFailed { step: 1, fault: None })),
        ),
        ("a TICK, which nobody may send yet", "worker", "serving", bare(Kind::Tick)),
        ("a PROBE, which nobody may send yet", "worker", "opening", bare(Kind::Probe)),
        ("a PROBED, which nobody may send yet", "host", "opening", bare(Kind::Probed)),
    ];
    list.into_iter()
        .map(|(name, receiver, state, bytes)| {
            let role = if receiver == "host" { Role::Host } else { Role::Worker };
            let found = in_state(role, state).receive(&bytes).map(|m| m.kind()).map_err(|e| e.rule());
            assert_eq!(found, Err("unexpected"), "{name}");
            json!({ "name": name, "receiver": receiver, "state": state, "hex": hex(&bytes), "rule": "unexpected" })
        })
        .collect()
}

/// A header alone.
fn bare(kind: Kind) -> Vec<u8> {
    vec![kind as u8, 0, 0, 0, 8, 0, 0, 0]
}

fn in_state(role: Role, state: &str) -> Connection {
    let purpose = if state == "pairing" { Purpose::Pairing } else { Purpose::Key };
    let mut connection = Connection::new(role, purpose);
    match state {
        "serving" => connection.begin_serving(agreed()),
        "pushing" => connection.begin_push(&offer(), &[0; 5]).unwrap(),
        "closed" => connection.close(),
        _ => {}
    }
    connection
}

// --- terms -----------------------------------------------------------------------------------------------

#[test]
fn terms_compared() {
    type Change = fn(&mut Terms, &mut Terms);
    let changes: Vec<(&str, Change)> = vec![
        ("they fit", |_, _| {}),
        ("F32", |h, _| h.row_types = RowTypes::F32),
        ("no features in common", |h, _| h.features = 0),
        ("the worker is the smaller", |_, w| (w.max_rows, w.max_in_flight) = (1, 1)),
        ("the host does not know the slice", |h, _| h.slice = None),
        ("the worker does not know its parameters", |_, w| w.params = None),
        ("the host needs exactly what there is", |h, w| {
            (h.n_ctx, h.max_sessions) = (w.n_ctx, w.max_sessions)
        }),
        ("versions", |_, w| w.version = 3),
        ("no slice", |_, w| *w = Terms::blank(2, "dim-worker 0.1.0", "phone")),
        ("architecture", |_, w| w.arch = "llama".into()),
        ("model", |_, w| alter(&mut w.model, 0, 1)),
        ("both models unknown", |h, w| (h.model, w.model) = (None, None)),
        ("parameters", |_, w| alter(&mut w.params, 31, 0x80)),
        ("blocks of the model", |_, w| w.n_blocks = 25),
        ("row length", |_, w| w.shape = Shape::hidden(8)),
        ("rows that may not be rounded", |_, w| w.shape.input.parts[0].may_round = false),
        ("another type", |_, w| {
            w.shape.output.parts[0] = Part { part_type: PartType::I32, may_round: false, values: 4 };
        }),
        ("token ids", |h, _| h.shape.reads_tokens = true),
        ("the worker says nothing of its rows", |_, w| w.shape = Shape::default()),
        ("a middle that gives no rows", |h, w| {
            (h.shape.output, w.shape.output) = (Layout::default(), Layout::default());
        }),
        ("other tensors", |_, w| alter(&mut w.input, 3, 1)),
        ("the worker does not know what its rows mean", |_, w| w.input = None),
        ("the host does not know the rows", |h, _| h.shape = Shape::default()),
        ("several parts, F16", |h, w| (h.shape, w.shape) = (several_parts(), several_parts())),
        ("several parts, F32", |h, w| {
            (h.shape, w.shape, h.row_types) = (several_parts(), several_parts(), RowTypes::F32);
        }),
        ("the host has to take back what the worker can", |h, w| {
            (h.take_back, w.take_back) = (TakeBack(4), TakeBack(4));
        }),
        ("the host has to take back more", |h, w| (h.take_back, w.take_back) = (TakeBack(5), TakeBack(4))),
        ("role", |_, w| w.role = SliceRole::Tail),
        ("first block", |_, w| w.blocks.first = 10),
        ("last block", |_, w| w.blocks.last = 17),
        ("an empty range on both sides", |h, w| (h.blocks.last, w.blocks.last) = (10, 10)),
        ("a range past the model's end on both sides", |h, w| (h.blocks.last, w.blocks.last) = (24, 24)),
        ("slice", |_, w| alter(&mut w.slice, 5, 1)),
        ("the worker lacks the dtype", |h, w| (h.row_types, w.row_types) = (RowTypes::F32, RowTypes::F16)),
        ("the host names two dtypes", |h, _| h.row_types = RowTypes::ALL),
        ("the host names no dtype", |h, _| h.row_types = RowTypes::NONE),
        ("one position too many", |h, w| h.n_ctx = w.n_ctx + 1),
        ("no positions", |h, _| h.n_ctx = 0),
        ("one session too many", |h, w| h.max_sessions = w.max_sessions + 1),
        ("no sessions", |h, _| h.max_sessions = 0),
        ("no rows", |_, w| w.max_rows = 0),
        ("nothing in flight", |h, _| h.max_in_flight = 0),
        ("a step above 2 GiB", |h, w| {
            (h.max_rows, w.max_rows) = (1 << 20, 1 << 20);
            (h.shape, w.shape) = (Shape::hidden(1024), Shape::hidden(1024));
        }),
        ("an answer above 2 GiB", |h, w| {
            (h.max_rows, w.max_rows) = (1 << 20, 1 << 20);
            for terms in [h, w] {
                terms.shape.output = Layout::hidden(1024);
            }
        }),
        ("parts that no number of bytes holds", |h, w| {
            for terms in [h, w] {
                let part = Part { part_type: PartType::I32, may_round: false, values: u32::MAX };
                terms.shape.input.parts = vec![part; 128];
            }
        }),
        ("65,536 sessions", |h, w| (h.max_sessions, w.max_sessions) = (65_536, 65_536)),
        ("everything at once", |h, w| {
            *w = Terms {
                version: 9,
                arch: "llama".into(),
                model: Some(Sha([9; 32])),
                params: Some(Sha([9; 32])),
                slice: Some(Sha([9; 32])),
                n_blocks: 1,
                shape: Shape::hidden(1),
                role: SliceRole::Head,
                blocks: BlockRange { first: 0, last: 0 },
                row_types: RowTypes::F32,
                n_ctx: 1,
                max_sessions: 1,
                max_rows: 0,
                max_in_flight: 0,
                ..h.clone()
            };
            h.take_back = TakeBack::ALL;
            w.take_back = TakeBack::NOTHING;
        }),
    ];
    let list: Vec<Value> = changes
        .into_iter()
        .map(|(name, change)| {
            let (mut host, mut worker) = (host_terms(), worker_terms());
            change(&mut host, &mut worker);
            let result = match terms::agree(&host, &worker) {
                Ok(a) => json!({ "agreed": agreed_json(&a) }),
                Err(m) => {
                    assert!(m.windows(2).all(|w| w[0].reason < w[1].reason), "in order");
                    json!({ "refused": m.iter().map(|m| m.reason as u16).collect::<Vec<_>>() })
                }
            };
            json!({
                "name": name,
                "hello": hex(&encoded(&Message::Hello(host))),
                "accept": hex(&encoded(&Message::Accept(worker))),
                "result": result,
            })
        })
        .collect();
    check("terms.json", Value::Array(list));
}

fn alter(digest: &mut Option<Sha>, byte: usize, bits: u8) {
    digest.as_mut().unwrap().0[byte] ^= bits;
}

fn agreed_json(a: &Agreed) -> Value {
    json!({
        "version": a.version, "row_dtype": rows::number(a.row_type), "shape": shape_json(&a.shape),
        "features": a.features, "take_back": a.take_back.0,
        "first_block": a.blocks.first, "last_block": a.blocks.last, "n_ctx": a.n_ctx, "max_rows": a.max_rows,
        "max_sessions": a.max_sessions, "max_in_flight": a.max_in_flight,
        "limit_host_to_worker": a.host_limit(), "limit_worker_to_host": a.worker_limit(),
    })
}

// --- sessions --------------------------------------------------------------------------------------------

#[test]
fn sessions() {
    let agreed = Agreed { n_ctx: 16, max_rows: 8, max_sessions: 3, max_in_flight: 2, ..agreed() };
    // (step, row format, spans, n_rows or the sum)
    let step = |id: u32, spans: &[[u32; 3]]| json!({ "event": "STEP", "step": id, "row_format": 1, "n_rows": spans.iter().map(|s| s[2]).sum::<u32>(), "spans": spans });
    let done = |id: u32, n: u32| json!({ "event": "STEP_DONE", "step": id, "row_format": 1, "n_rows": n });
    let failed = |id: u32| json!({ "event": "STEP_FAILED", "step": id });
    let rewind = |s: u32, p: u32| json!({ "event": "REWIND", "session": s, "position": p });
    let end = |s: u32| json!({ "event": "END_SESSION", "session": s });
    let with = |mut event: Value, field: &str, value: Value| {
        event[field] = value;
        event
    };
    let scripts: Vec<(&str, Vec<Value>)> = vec![
        (
            "prompt in chunks, then tokens",
            vec![
                step(1, &[[0, 0, 8]]),
                step(2, &[[0, 8, 4]]),
                done(1, 8),
                done(2, 4),
                step(3, &[[0, 12, 1]]),
                done(3, 1),
            ],
        ),
        (
            "a gap, an overwrite, the right place",
            vec![
                step(1, &[[0, 1, 1]]),
                step(1, &[[0, 0, 2]]),
                done(1, 2),
                step(2, &[[0, 1, 1]]),
                step(2, &[[0, 2, 1]]),
            ],
        ),
        (
            "rewind and go on",
            vec![
                step(1, &[[0, 0, 8]]),
                done(1, 8),
                rewind(0, 9),
                rewind(0, 8),
                rewind(0, 3),
                step(2, &[[0, 8, 1]]),
                step(2, &[[0, 3, 2]]),
                rewind(0, 0),
                rewind(3, 0),
            ],
        ),
        (
            "rewind while a step is under way",
            vec![step(1, &[[0, 0, 8]]), rewind(0, 4), step(2, &[[0, 4, 1]]), done(1, 8), done(2, 1)],
        ),
        ("end a session", vec![step(1, &[[1, 0, 8]]), end(1), step(2, &[[1, 0, 1]]), end(2), end(3)]),
        (
            "the context's last position",
            vec![
                step(1, &[[0, 0, 8]]),
                done(1, 8),
                step(2, &[[0, 8, 8]]),
                done(2, 8),
                step(3, &[[0, 16, 1]]),
                rewind(0, 15),
                step(3, &[[0, 15, 2]]),
                step(3, &[[0, 15, 1]]),
            ],
        ),
        (
            "positions near 2^32",
            vec![
                step(1, &[[0, u32::MAX, 1]]),
                with(step(1, &[[0, 0, 1]]), "spans", json!([[0, 0, u32::MAX]])),
            ],
        ),
        (
            "several sessions in one step",
            vec![
                step(1, &[[2, 0, 3], [0, 0, 1], [1, 0, 4]]),
                done(1, 8),
                step(2, &[[0, 1, 1], [0, 2, 1]]),
                step(2, &[[0, 1, 1], [3, 0, 1]]),
                step(2, &[[1, 4, 1], [2, 3, 1]]),
            ],
        ),
        (
            "step numbers",
            vec![
                step(0, &[[0, 0, 1]]),
                step(2, &[[0, 0, 1]]),
                step(1, &[[0, 0, 1]]),
                step(1, &[[0, 1, 1]]),
                step(2, &[[0, 1, 1]]),
            ],
        ),
        (
            "too many under way",
            vec![
                step(1, &[[0, 0, 1]]),
                step(2, &[[0, 1, 1]]),
                step(3, &[[0, 2, 1]]),
                done(1, 1),
                step(3, &[[0, 2, 1]]),
            ],
        ),
        (
            "answers",
            vec![
                done(1, 1),
                done(0, 0),
                step(1, &[[0, 0, 2]]),
                step(2, &[[0, 2, 1]]),
                done(2, 1),
                done(1, 1),
                done(1, 2),
                done(1, 2),
                done(2, 1),
            ],
        ),
        (
            "a step that failed, and what stood on it",
            vec![
                step(1, &[[0, 0, 2]]),
                step(2, &[[0, 2, 1]]),
                failed(2),
                failed(1),
                failed(1),
                // the lengths stay until they are taken back
                failed(2),
                step(3, &[[0, 2, 1]]),
                rewind(0, 0),
                step(3, &[[0, 0, 2]]),
                done(3, 2),
                failed(3),
            ],
        ),
        (
            "counts",
            vec![
                with(step(1, &[[0, 0, 2]]), "n_rows", json!(1)),
                with(step(1, &[[0, 0, 2]]), "n_rows", json!(3)),
                step(1, &[[0, 0, 9]]),
                with(step(1, &[[0, 0, 1]]), "n_rows", json!(0)),
                step(1, &[[0, 0, 8]]),
            ],
        ),
        (
            "spans",
            vec![
                with(step(1, &[]), "n_rows", json!(1)),
                with(step(1, &[[0, 0, 0]]), "n_rows", json!(1)),
                step(1, &[[0, 0, 1], [1, 0, 1], [2, 0, 1], [3, 0, 1]]),
            ],
        ),
        (
            "row formats",
            vec![
                with(step(1, &[[0, 0, 1]]), "row_format", json!(2)),
                with(done(1, 1), "row_format", json!(2)),
                step(2, &[[0, 1, 1]]),
                with(done(2, 1), "row_format", json!(2)),
                done(2, 1),
            ],
        ),
    ];
    let list: Vec<Value> = scripts
        .into_iter()
        .map(|(name, events)| {
            let mut books = Books::new(agreed.clone());
            let played: Vec<Value> = events
                .into_iter()
                .map(|event| {
                    let rule = play(&mut books, &event).err().map(|e| e.rule());
                    with(event, "rule", json!(rule))
                })
                .collect();
            let lengths: Vec<u32> = (0..3).map(|s| books.length(s).unwrap()).collect();
            json!({ "name": name, "events": played, "lengths": lengths })
        })
        .collect();
    check("sessions.json", json!({ "agreed": agreed_json(&agreed), "scripts": list }));
}

fn play(books: &mut Books, event: &Value) -> Result<(), dim_wire::Misbehaved> {
    let n = |field: &str| event[field].as_u64().unwrap() as u32;
    let format = || rows::from_number(n("row_format") as u8).unwrap();
    match event["event"].as_str().unwrap() {
        "STEP" => {
            let word = |v: &Value| v.as_u64().unwrap() as u32;
            let spans: Vec<Span> = event["spans"]
                .as_array()
                .unwrap()
                .iter()
                .map(|s| Span { session: word(&s[0]), position: word(&s[1]), count: word(&s[2]) })
                .collect();
            books.step(n("step"), n("n_rows"), format().into(), spans.into_iter())
        }
        "STEP_FAILED" => books.step_failed(n("step")),
        "STEP_DONE" => books.step_done(n("step"), n("n_rows"), format()),
        "REWIND" => books.rewind(n("session"), n("position")),
        _ => books.end(n("session")),
    }
}

// --- transcripts -----------------------------------------------------------------------------------------

#[test]
fn transcripts() {
    let [_, pairing, plain] = cases();
    let row = |v: f32| vec![f16::from_f32(v); 4];
    let chunk: Vec<f16> = (0..12).map(|i| f16::from_f32(i as f32)).collect();
    let span = |session, position, count| Span { session, position, count };
    let m = |message: Message<'_>| encoded(&message);

    let serve = vec![
        ("host", m(Message::Inquire)),
        ("worker", m(Message::Offer(worker_terms()))),
        ("host", m(Message::Hello(host_terms()))),
        ("worker", m(Message::Accept(worker_terms()))),
        ("host", step_bytes(1, &[span(0, 0, 3)], &[], RowsRef::F16(&chunk))),
        ("host", step_bytes(2, &[span(0, 3, 1)], &[], RowsRef::F16(&row(1.0)))),
        ("worker", done_bytes(1, 3, RowsRef::F16(&chunk))),
        ("worker", m(Message::Heartbeat(Status { step: 1, ..Status::default() }))),
        ("worker", done_bytes(2, 1, RowsRef::F16(&row(2.0)))),
        ("host", m(Message::Rewind { session: 0, position: 2 })),
        (
            "host",
            step_bytes(3, &[span(0, 2, 1), span(1, 0, 1)], &[], RowsRef::F16(&[row(1.5), row(2.5)].concat())),
        ),
        ("host", m(Message::Ping(99))),
        ("worker", done_bytes(3, 2, RowsRef::F16(&[row(3.5), row(4.5)].concat()))),
        ("worker", m(Message::Pong { number: 99, clock_us: 1_234_567 })),
        ("host", m(Message::EndSession { session: 1 })),
        // a guess and another that stands on it; the guess was wrong
        ("host", step_bytes(4, &[span(0, 3, 1)], &[], RowsRef::F16(&row(5.0)))),
        ("host", step_bytes(5, &[span(0, 4, 1)], &[], RowsRef::F16(&row(6.0)))),
        ("host", m(Message::Cancel { step: 5 })),
        ("worker", done_bytes(4, 1, RowsRef::F16(&row(6.0)))),
        ("host", m(Message::Rewind { session: 0, position: 4 })),
        ("worker", m(Message::StepFailed(StepFailed { step: 5, fault: None }))),
        ("host", m(Message::Goodbye(Farewell::Finished))),
    ];
    let refuse = vec![
        ("host", m(Message::Hello(Terms { n_ctx: 8192, ..host_terms() }))),
        (
            "worker",
            m(Message::Refuse { reason: Reason::Context, terms: worker_terms(), text: "too long".into() }),
        ),
    ];
    let busy = vec![
        ("host", m(Message::Hello(host_terms()))),
        ("worker", m(Message::Busy { since_ms: 61_000, name: "Otto's PC".into() })),
    ];
    let fault = vec![
        ("host", m(Message::Hello(host_terms()))),
        ("worker", m(Message::Accept(worker_terms()))),
        ("host", step_bytes(1, &[span(0, 0, 1)], &[], RowsRef::F16(&row(1.0)))),
        (
            "worker",
            m(Message::Error(Fault {
                step: Some(1),
                block: Some(12),
                count: 4,
                ..Fault::new(ErrorCode::NonFinite, "4 values are not finite")
            })),
        ),
    ];
    let push = vec![
        ("host", m(Message::PushOffer(offer()))),
        ("worker", m(Message::PushNeed(vec![1234, 600, 49_990, 950_000_000, 4096]))),
        ("host", m(Message::PushData { item: 2, offset: 49_990, bytes: b"0123456789" })),
        ("worker", m(Message::PushStored { item: 2, bytes: 50_000 })),
        ("worker", m(Message::PushResult { outcome: PushOutcome::Stored, item: None, text: String::new() })),
        ("host", m(Message::Goodbye(Farewell::Finished))),
    ];
    let pair = vec![
        (
            "host",
            m(Message::PairRequest { name: "Anna's MacBook".into(), software: "dim-host 0.1.0".into() }),
        ),
        (
            "worker",
            m(Message::PairGrant {
                key: Key::from_bytes(counting(0x77)),
                name: "phone".into(),
                software: "dim-worker 0.1.0".into(),
            }),
        ),
        ("host", m(Message::PairStored)),
    ];
    let list: Vec<Value> = [
        ("serve", &plain, serve),
        ("refuse", &plain, refuse),
        ("busy", &plain, busy),
        ("fault", &plain, fault),
        ("push", &plain, push),
        ("pair", &pairing, pair),
    ]
    .into_iter()
    .map(|(name, case, entries)| transcript(name, case, entries))
    .collect();
    check("transcripts.json", Value::Array(list));
}

/// Plays a conversation with a [`Connection`] at both ends, so that every transcript is also one that may
/// happen.
fn transcript(name: &str, case: &Case, entries: Vec<(&str, Vec<u8>)>) -> Value {
    let Shaken { greeting, first, answer, host, worker } = shake(case);
    let mut host = End::new(Role::Host, host);
    let mut worker = End::new(Role::Worker, worker);
    let played: Vec<Value> = entries
        .into_iter()
        .map(|(from, plain)| {
            let (sender, receiver) =
                if from == "host" { (&mut host, &mut worker) } else { (&mut worker, &mut host) };
            let wire = sender.send(&plain);
            assert_eq!(receiver.receive(&wire).as_deref(), Ok(&plain[..]), "{name}");
            json!({ "from": from, "plain": hex(&plain), "wire": hex(&wire) })
        })
        .collect();
    json!({
        "name": name,
        "purpose": case.purpose as u8,
        "psk": hex(&case.key),
        "host_salt": hex(&SALT),
        "host_ephemeral": hex(&case.host_ephemeral),
        "worker_nonce": hex(&NONCE),
        "worker_ephemeral": hex(&case.worker_ephemeral),
        "greeting": hex(&greeting),
        "first_flight": hex(&first),
        "answer": hex(&answer),
        "messages": played,
    })
}

struct End {
    connection: Connection,
    sealer: Sealer,
    inbox: Inbox,
    asked: Option<Terms>,
    pushing: Option<PushOffer>,
}

impl End {
    fn new(role: Role, established: Established) -> End {
        End {
            connection: Connection::new(role, established.purpose),
            sealer: established.sealer,
            inbox: Inbox::new(established.opener, 4096),
            asked: None,
            pushing: None,
        }
    }

    fn send(&mut self, plain: &[u8]) -> Vec<u8> {
        let shape = self.connection.books().map_or(Shape::default(), |b| b.agreed().shape.clone());
        let message = Message::decode(plain, &shape).unwrap();
        match &message {
            Message::Step(s) => {
                let spans: Vec<Span> = s.spans().collect();
                let values: Vec<f16> = s.rows.chunks(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
                assert_eq!(self.connection.send_step(&spans, &[], RowsRef::F16(&values)), Ok(s.step));
            }
            Message::StepDone(s) => {
                let values: Vec<f16> = s.rows.chunks(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
                self.connection.send_step_done(s.step, s.n_rows, RowsRef::F16(&values)).unwrap();
            }
            other => self.connection.send(other).unwrap(),
        }
        self.agree(&message, false);
        seal(&mut self.sealer, plain)
    }

    fn receive(&mut self, wire: &[u8]) -> Result<Vec<u8>, ReceiveError> {
        assert_eq!(self.inbox.fill(wire), wire.len());
        assert!(self.inbox.poll()?);
        let plain = self.inbox.message().to_vec();
        self.inbox.release();
        let message = self.connection.receive(&plain)?;
        self.agree(&message, true);
        Ok(plain)
    }

    fn agree(&mut self, message: &Message<'_>, received: bool) {
        match message {
            Message::Hello(hello) => self.asked = Some(hello.clone()),
            Message::PushOffer(offer) => self.pushing = Some(offer.clone()),
            Message::Accept(held) => {
                let hello = self.asked.take().unwrap();
                self.connection.begin_serving(terms::agree(&hello, held).unwrap());
            }
            Message::PushNeed(have) => {
                self.connection.begin_push(&self.pushing.take().unwrap(), have).unwrap()
            }
            _ => {}
        }
        let _ = received;
        self.inbox.set_limit(self.connection.limit());
    }
}

// --- files -----------------------------------------------------------------------------------------------

/// 32 bytes counting up from `first`.
fn counting(first: u8) -> [u8; 32] {
    std::array::from_fn(|i| first.wrapping_add(i as u8))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Compares with the file, or writes it. Rules are errors' names: that they are those of PROTOCOL.md is
/// checked too.
fn check(file: &str, made: Value) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/vectors").join(file);
    if std::env::var_os("DIM_WRITE_VECTORS").is_some() {
        let text = serde_json::to_string_pretty(&made).unwrap() + "\n";
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
    }
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let kept: Value = serde_json::from_str(&text).unwrap();
    assert!(kept == made, "{file} is not what this implementation makes; see docs/PROTOCOL.md, section 14");

    let protocol = include_str!("../docs/PROTOCOL.md");
    let mut rules = Vec::new();
    collect_rules(&made, &mut rules);
    for rule in rules {
        let known = ["length", "character", "check"].contains(&rule.as_str());
        assert!(known || protocol.contains(&format!("`{rule}`")), "{rule} is not in PROTOCOL.md");
    }
}

fn collect_rules(value: &Value, rules: &mut Vec<String>) {
    match value {
        Value::Array(list) => list.iter().for_each(|v| collect_rules(v, rules)),
        Value::Object(map) => map.iter().for_each(|(k, v)| match v {
            Value::String(rule) if k == "rule" => rules.push(rule.clone()),
            other => collect_rules(other, rules),
        }),
        _ => {}
    }
}

/// A worker spends no work on the curve for a peer without the key.
#[test]
fn a_stranger_costs_no_curve_work() {
    let key = Key::from_bytes(counting(1));
    let other = Key::from_bytes(counting(2));
    for (host_key, work) in [(&other, 0), (&key, 2)] {
        let mut host = HostHandshake::new(host_key, Purpose::Key, 2..=2);
        let mut worker = WorkerHandshake::new(2..=2).unwrap();
        let mut flight = Vec::new();
        host.receive(&mut &worker.greeting()[..], &mut flight).unwrap();
        let verdict = worker.receive(&mut &flight[..], |_| Lookup::Found(key.clone())).unwrap();
        assert_eq!(verdict.outcome.is_ok(), work > 0);
        if work == 0 {
            assert_eq!(verdict.outcome.unwrap_err(), HandshakeError::Key);
        }
        assert_eq!(worker.curve_work(), work, "one ephemeral key, one shared secret: the counter counts");
    }
}
