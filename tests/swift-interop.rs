//! The Rust host against the Swift worker (`ios_worker/`), over real sockets: two implementations of
//! docs/PROTOCOL.md that share no code.
//!
//! ```sh
//! W="ios_worker/tools/swift6 ios_worker/.build/release/dim-worker-swift"
//! cargo run --release --example swift-interop -- $W
//! taskset -c 0 cargo run --release --example swift-interop -- --bench $W
//! ```
//!
//! The worker evaluates with exact integer arithmetic in place of a model (`--fake`; the formula stands in
//! `ios_worker/Sources/DIMStage/FakePackage.swift`), computed here a second time. Any row lost, doubled or out of
//! place changes every later answer. With `--bench` first, round trips to it and to a Rust worker are timed in
//! turns. `ios_worker/tools/test.sh` runs both.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dim::host::packages::Packages;
use dim_ab::link::{Link as Relay, LinkOptions};
use dim_core::blocks::BlockRange;
use dim_wire::keys::{Key, PairingCode};
use dim_wire::message::{Farewell, Span};
use dim_wire::rows::{RowTypes, RowsRef, Shape};
use dim_wire::terms::{SliceRole, Terms};
use dim_wire::transport::push::{PushError, push};
use dim_wire::transport::{
    ComputeTime, Event, Link, LinkError, LinkErrorKind, Listener, ListenerConfig, Readiness, Timing, dial,
    inquire, pair,
};
use gguf_tools::coreml::manifest::{
    Dims, FORMAT, Manifest, ModelIdentity, Package, PackageFile, RopeParameters, SliceIdentity, VERSION,
};
use gguf_tools::coreml::package::{MANIFEST, MODEL_FILE, PACKAGE_MANIFEST, WEIGHT_FILE, directory_name};
use gguf_tools::digest::Sha;
use half::f16;

const N_EMBD: usize = 64;
const BLOCKS: usize = 2;
const N_CTX: u32 = 2048;
const FAKE: &str = "blocks=11..12,of=28,n_embd=64";

fn main() {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == "--rust-worker") {
        return rust_worker(&Key::from_hex(&words[1]).unwrap());
    }
    let bench = words.first().is_some_and(|word| word == "--bench");
    if bench {
        words.remove(0);
    }
    if words.is_empty() {
        eprintln!("usage: swift-interop [--bench] WORKER-COMMAND...");
        std::process::exit(2);
    }
    let folder = tempfile::tempdir().unwrap();
    if bench {
        return time_round_trips(&words, folder.path());
    }
    let key = Key::random().unwrap();
    let key_file = folder.path().join("key");
    std::fs::write(&key_file, format!("{}\n", key.to_hex())).unwrap();
    let with_key = ["--fake", FAKE, "--key-file", key_file.to_str().unwrap()];
    let mut worker = Swift::start(&words, folder.path(), "127.0.0.1:0", &with_key);

    strangers_and_mismatches(&worker.address, &key);
    println!("refused with their reasons: a wrong key, and terms that differ in 10 ways");
    steps_and_rewinds(&mut worker, &key);
    println!(
        "right: a prompt in chunks in flight, 1,000 steps, rewinds, two sessions; byte counts equal on both sides"
    );
    one_host_at_a_time(&worker.address, &key);
    println!("a second host heard BUSY; the first went on, and its own new connection replaced it");
    worker = killed_and_replayed(worker, &words, folder.path(), &with_key, &key);
    println!("replayed after kill -9 of the worker, 10 of 10: the same answers");
    worker.stop();
    pairing(&words, folder.path());
    println!("paired by code; a wrong code and a second use were refused");
    let store = folder.path().join("store");
    let mut with_store = with_key.to_vec();
    with_store.extend(["--receive", store.to_str().unwrap()]);
    pushed(&words, folder.path(), &with_store, &store, &key);
}

/// What the worker must answer.
#[derive(Clone, Default)]
struct Oracle {
    keys: [Vec<u32>; BLOCKS],
}

impl Oracle {
    fn evaluate(&mut self, rows: &[f16]) -> Vec<f16> {
        rows.chunks(N_EMBD).flat_map(|row| self.row(row)).collect()
    }

    fn row(&mut self, row: &[f16]) -> Vec<f16> {
        let mut x: Vec<u16> = row.iter().map(|v| v.to_bits()).collect();
        for keys in &mut self.keys {
            let weighted = x
                .iter()
                .zip(1u32..)
                .fold(0u32, |sum, (&bits, factor)| sum.wrapping_add(factor.wrapping_mul(u32::from(bits))));
            keys.push(weighted.wrapping_mul(keys.len() as u32 + 1));
            let digest = keys.iter().fold(0u32, |sum, key| sum.wrapping_add(*key));
            for (bits, i) in x.iter_mut().zip(0u32..) {
                let value = u32::from(*bits).wrapping_add(digest).wrapping_add(i) % 2048;
                *bits = f16::from_f32(value as f32).to_bits();
            }
        }
        x.into_iter().map(f16::from_bits).collect()
    }

    fn rewind(&mut self, position: u32) {
        self.keys.iter_mut().for_each(|keys| keys.truncate(position as usize));
    }
}

/// `count` rows that depend on `seed`.
fn rows(count: usize, seed: usize) -> Vec<f16> {
    (0..count * N_EMBD).map(|i| f16::from_bits(0x3000 + ((i * 37 + seed * 101) % 4096) as u16)).collect()
}

fn host_terms(instance: u64) -> Terms {
    let digest = |text: &str| Some(Sha::of(text.as_bytes()));
    Terms {
        row_types: RowTypes::F16,
        role: SliceRole::Middle,
        instance,
        shape: Shape::hidden(N_EMBD as u32),
        n_blocks: 28,
        blocks: BlockRange { first: 11, last: 12 },
        n_ctx: N_CTX,
        max_rows: 128,
        max_sessions: 2,
        max_in_flight: 4,
        model: digest("dim fake model"),
        slice: digest("dim fake slice"),
        arch: "fake".into(),
        ..Terms::blank(2, "swift-interop", "a desk")
    }
}

fn connect(address: &str, key: &Key, instance: u64) -> Link {
    dial(address, key, &host_terms(instance), &Timing::default()).unwrap()
}

fn send(link: &Link, session: u32, position: u32, rows: &[f16]) {
    let count = (rows.len() / N_EMBD) as u32;
    link.send_step(&[Span { session, position, count }], &[], rows.into()).unwrap();
}

fn receive(link: &mut Link) -> Result<Vec<f16>, LinkError> {
    match link.receive(Some(Instant::now() + Duration::from_secs(10)))? {
        Event::Done { rows, .. } => {
            let RowsRef::F16(values) = rows else { panic!("another format") };
            Ok(values.to_vec())
        }
        other => panic!("{other:?}"),
    }
}

fn strangers_and_mismatches(address: &str, key: &Key) {
    let stranger = dial(address, &Key::random().unwrap(), &host_terms(1), &Timing::default());
    assert!(
        matches!(stranger, Err(LinkError { kind: LinkErrorKind::Handshake(_), .. })),
        "{stranger:?}",
        stranger = stranger.err()
    );

    let held = inquire(address, key, &Timing::default()).unwrap();
    assert_eq!(
        (&held.shape, held.blocks),
        (&Shape::hidden(N_EMBD as u32), BlockRange { first: 11, last: 12 })
    );
    type Change = fn(&mut Terms);
    let changes: [(&str, Change); 10] = [
        ("arch", |t| t.arch = "qwen2".into()),
        ("model", |t| t.model = Some(Sha([9; 32]))),
        ("n_blocks", |t| t.n_blocks = 29),
        ("rows", |t| t.shape = Shape::hidden(32)),
        ("role", |t| t.role = SliceRole::Tail),
        ("blocks", |t| t.blocks.last = 13),
        ("slice", |t| t.slice = Some(Sha([9; 32]))),
        ("dtype", |t| t.row_types = RowTypes::ALL),
        ("context", |t| t.n_ctx = N_CTX + 1),
        ("sessions", |t| t.max_sessions = 100),
    ];
    for (name, change) in changes {
        let mut terms = host_terms(1);
        change(&mut terms);
        let refused = dial(address, key, &terms, &Timing::default());
        assert!(
            matches!(refused, Err(LinkError { kind: LinkErrorKind::Refused { .. }, .. })),
            "{name}: {:?}",
            refused.err()
        );
    }
}

fn steps_and_rewinds(worker: &mut Swift, key: &Key) {
    let mut link = connect(&worker.address, key, 2);
    let mut oracles = [Oracle::default(), Oracle::default()];
    // a prompt of two chunks, both under way before the first answer
    let prompt = rows(200, 1);
    send(&link, 0, 0, &prompt[..128 * N_EMBD]);
    send(&link, 0, 128, &prompt[128 * N_EMBD..]);
    let mut found = receive(&mut link).unwrap();
    found.extend(receive(&mut link).unwrap());
    assert!(found == oracles[0].evaluate(&prompt), "the prompt's rows");

    let (mut position, mut rewinds) = (200, 0);
    for step in 0..1000 {
        if step % 300 == 299 {
            // the last guesses were wrong
            position -= 37;
            rewinds += 1;
            link.sender().rewind(0, position).unwrap();
            oracles[0].rewind(position);
        }
        let row = rows(1, step);
        send(&link, 0, position, &row);
        assert!(receive(&mut link).unwrap() == oracles[0].evaluate(&row), "step {step}");
        position += 1;
        if step % 100 == 0 {
            // another session in between
            let begun = oracles[1].keys[0].len() as u32;
            let other = rows(3, step + 7);
            send(&link, 1, begun, &other);
            assert!(receive(&mut link).unwrap() == oracles[1].evaluate(&other), "session 1, step {step}");
        }
    }
    link.sender().end_session(1).unwrap();
    send(&link, 1, 0, &rows(1, 5));
    assert!(
        receive(&mut link).unwrap() == Oracle::default().evaluate(&rows(1, 5)),
        "a session's second life"
    );
    assert_eq!(rewinds, 3);

    // GOODBYE is one frame of 8 bytes; heartbeats of a slow run are in both counts
    let traffic = link.sender().traffic();
    link.close(Farewell::Finished);
    let line = worker.wait_for("bytes in");
    let [bytes_in, bytes_out] = bytes_of(&line);
    assert_eq!(bytes_in, traffic.bytes_sent + 8 + 18, "bytes from host to worker: {line}");
    assert_eq!(bytes_out, traffic.bytes_received, "bytes from worker to host: {line}");
}

fn one_host_at_a_time(address: &str, key: &Key) {
    let mut first = connect(address, key, 3);
    let second = dial(address, key, &host_terms(4), &Timing::default());
    assert!(matches!(second, Err(LinkError { kind: LinkErrorKind::Busy { .. }, .. })), "{:?}", second.err());
    send(&first, 0, 0, &rows(1, 1));
    assert!(receive(&mut first).unwrap() == Oracle::default().evaluate(&rows(1, 1)));
    // the same process again: the old connection is its ghost
    let mut again = connect(address, key, 3);
    send(&again, 0, 0, &rows(1, 2));
    assert!(receive(&mut again).unwrap() == Oracle::default().evaluate(&rows(1, 2)));
    assert!(receive(&mut first).is_err());
    again.close(Farewell::Finished);
}

fn killed_and_replayed(
    mut worker: Swift,
    words: &[String],
    folder: &Path,
    arguments: &[&str],
    key: &Key,
) -> Swift {
    let mut oracle = Oracle::default();
    let chunks: Vec<Vec<f16>> = (0..30).map(|i| rows(if i % 7 == 0 { 40 } else { 1 }, i)).collect();
    let expected: Vec<Vec<f16>> = chunks.iter().map(|chunk| oracle.evaluate(chunk)).collect();
    for trial in 0..10 {
        let address = worker.address.clone();
        let mut link = connect(&address, key, 5);
        let mut position = 0;
        for (at, chunk) in chunks.iter().enumerate() {
            if at == 2 + 2 * trial {
                // with the step on its way
                send(&link, 0, position, chunk);
                worker.kill();
                worker = Swift::start(words, folder, &address, arguments);
                let lost = (0..2).find_map(|_| receive(&mut link).err());
                assert!(lost.is_some(), "the loss was not noticed");
                // a new epoch: everything once more, in the same chunks
                link = connect(&address, key, 5);
                position = 0;
                for (earlier, right) in chunks[..at].iter().zip(&expected) {
                    send(&link, 0, position, earlier);
                    assert!(receive(&mut link).unwrap() == *right, "replay, trial {trial}");
                    position += (earlier.len() / N_EMBD) as u32;
                }
            }
            send(&link, 0, position, chunk);
            assert!(receive(&mut link).unwrap() == expected[at], "trial {trial}, chunk {at}");
            position += (chunk.len() / N_EMBD) as u32;
        }
        link.close(Farewell::Finished);
        worker.wait_for("bytes in");
    }
    worker
}

fn pairing(words: &[String], folder: &Path) {
    let mut worker = Swift::start(words, folder, "127.0.0.1:0", &["--fake", FAKE, "--pair"]);
    let code = PairingCode::parse(worker.code.as_ref().expect("the worker shows a code")).unwrap();
    let keep = |_: &Key, _: &str| Ok(());
    let wrong = PairingCode::random().unwrap();
    let refused = pair(&worker.address, &wrong, "a desk", "swift-interop", &Timing::default(), keep);
    assert!(
        matches!(refused, Err(LinkError { kind: LinkErrorKind::Handshake(_), .. })),
        "{:?}",
        refused.err()
    );
    let (key, name) =
        pair(&worker.address, &code, "a desk", "swift-interop", &Timing::default(), keep).unwrap();
    assert_eq!(name, "a phone");
    worker.wait_for("paired with a desk");
    let twice = pair(&worker.address, &code, "a desk", "swift-interop", &Timing::default(), keep);
    assert!(matches!(twice, Err(LinkError { kind: LinkErrorKind::Handshake(_), .. })), "{:?}", twice.err());
    // the key works, and is still there after a restart
    connect(&worker.address, &key, 6).close(Farewell::Finished);
    let address = worker.address.clone();
    worker.stop();
    let worker = Swift::start(words, folder, &address, &["--fake", FAKE]);
    connect(&worker.address, &key, 6).close(Farewell::Finished);
    worker.stop();
}

/// 200 MB, over three connections: one that a relay cuts, one at whose end the worker is killed, one that goes through.
fn pushed(words: &[String], folder: &Path, arguments: &[&str], store: &Path, key: &Key) {
    let directory = folder.join("packages");
    write_packages(&directory, 100_000_000);
    let packages = Packages::open(&directory, &mut |_, _| {}).unwrap();
    let total = packages.bytes;
    let offer = dim_wire::message::PushOffer { name: "a desk".into(), ..packages.offer.clone() };
    let open = |at: usize| std::fs::File::open(&packages.files[at]);
    let timing = Timing::default();
    let mut worker = Swift::start(words, folder, "127.0.0.1:0", arguments);
    let address = worker.address.clone();
    let complete = || {
        let names = std::fs::read_dir(store).into_iter().flatten().map(|e| e.unwrap().file_name());
        names.filter(|n| n.to_string_lossy().starts_with("middle-")).collect::<Vec<_>>()
    };

    // cut by the network; while it lasts, nobody else is served
    let relay = Relay::start(&address, LinkOptions::default()).unwrap();
    let through = relay.addr().to_string();
    let (mut reached, mut heard) = (0, None);
    let first = push(&through, key, &offer, &open, &timing, &mut |done| {
        if heard.is_none() && done > total / 10 {
            heard = Some(dial(&address, key, &host_terms(9), &timing).map(drop));
        }
        if reached < total / 3 && done >= total / 3 {
            relay.cut();
        }
        reached = done;
    });
    assert!(matches!(first, Err(PushError::Link(_))), "the cut was not noticed: {first:?}");
    assert!(matches!(heard, Some(Err(LinkError { kind: LinkErrorKind::Busy { .. }, .. }))), "{heard:?}");
    assert!(complete().is_empty(), "a half push is there to be served");
    worker.wait_for("bytes in");

    // killed
    let (mut began, mut got) = (None, 0);
    let second = when_free(|| {
        push(&address, key, &offer, &open, &timing, &mut |done| {
            began.get_or_insert(done);
            if got < 2 * total / 3 && done >= 2 * total / 3 {
                worker.kill();
            }
            got = done;
        })
    });
    assert!(matches!(second, Err(PushError::Link(_))), "the kill was not noticed: {second:?}");
    let first_resumed = began.unwrap();
    assert!(0 < first_resumed && first_resumed <= reached, "{first_resumed} of {reached}");
    assert!(complete().is_empty(), "a half push is there to be served");

    worker = Swift::start(words, folder, &address, arguments);
    let mut began = None;
    let traffic = push(&address, key, &offer, &open, &timing, &mut |done| {
        began.get_or_insert(done);
    })
    .unwrap();
    let second_resumed = began.unwrap();
    assert!(first_resumed < second_resumed && second_resumed <= got, "{second_resumed} of {got}");
    let line = worker.wait_for("bytes in");
    assert_eq!(bytes_of(&line), [traffic.bytes_sent, traffic.bytes_received], "bytes in and out: {line}");

    let names = complete();
    assert_eq!(names.len(), 1, "{names:?}");
    let place = store.join(&names[0]);
    for file in &packages.files {
        let there = place.join(file.strip_prefix(&directory).unwrap());
        assert!(std::fs::read(&there).unwrap() == std::fs::read(file).unwrap(), "{}", there.display());
    }
    // complete: nothing is sent again, and steps are served as before
    let mut moved = Vec::new();
    when_free(|| push(&address, key, &offer, &open, &timing, &mut |done| moved.push(done))).unwrap();
    assert_eq!(moved, [total]);
    let dial = || dial(&address, key, &host_terms(10), &timing).map_err(PushError::Link);
    let mut link = when_free(dial).unwrap();
    send(&link, 0, 0, &rows(1, 1));
    assert!(receive(&mut link).unwrap() == Oracle::default().evaluate(&rows(1, 1)));
    link.close(Farewell::Finished);
    worker.stop();
    println!(
        "pushed {total} bytes over 3 connections, cut and killed: went on at {first_resumed} of {reached} and at \
         {second_resumed} of {got} sent; every file the same; bytes of the last connection equal on both sides: {} and {}",
        traffic.bytes_sent, traffic.bytes_received
    );
}

/// Does something as soon as the worker has let go of the connection before.
fn when_free<T>(mut attempt: impl FnMut() -> Result<T, PushError>) -> Result<T, PushError> {
    for _ in 0..1000 {
        match attempt() {
            Err(PushError::Link(LinkError { kind: LinkErrorKind::Busy { .. }, .. })) => {
                std::thread::sleep(Duration::from_millis(5))
            }
            other => return other,
        }
    }
    panic!("the worker stays busy");
}

/// Two packages that are right as files: `weight_bytes` of noise for weights, and a manifest that says so.
fn write_packages(directory: &Path, weight_bytes: usize) {
    let mut noise = 0x9e37_79b9_7f4a_7c15u64;
    let mut weights = Vec::with_capacity(weight_bytes + 8);
    while weights.len() < weight_bytes {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        weights.extend_from_slice(&noise.to_le_bytes());
    }
    weights.truncate(weight_bytes);
    let mut packages = Vec::new();
    for index in 0..2u32 {
        weights[0] = index as u8;
        let contents: [(&str, &[u8]); 3] =
            [(PACKAGE_MANIFEST, b"{}"), (MODEL_FILE, &[index as u8; 5000]), (WEIGHT_FILE, &weights)];
        let files = contents.map(|(path, bytes)| {
            let file = directory.join(directory_name(index as usize)).join(path);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, bytes).unwrap();
            PackageFile { path: path.into(), bytes: bytes.len() as u64, sha256: Sha::of(bytes).to_string() }
        });
        packages.push(Package {
            directory: directory_name(index as usize),
            first_block: 11 + index,
            last_block: 11 + index,
            state_shape: vec![2, 2, 256, 8],
            files: files.to_vec(),
            weight_file: WEIGHT_FILE.into(),
            weights: Vec::new(),
        });
    }
    let manifest = Manifest {
        format: FORMAT.into(),
        version: VERSION,
        model: ModelIdentity {
            name: "noise".into(),
            sha256: Sha::of(b"noise").to_string(),
            params_sha256: Some(Sha::of(b"noise's settings").to_string()),
            arch: "qwen2".into(),
            n_blocks: 28,
        },
        slice: SliceIdentity { first_block: 11, last_block: 12, sha256: Sha::of(b"slice").to_string() },
        dims: Dims {
            n_embd: 64,
            n_head: 8,
            n_head_kv: 2,
            head_dim: 8,
            n_ff: 128,
            ffn_bounds: vec![0, 128],
            norm_eps: 1e-6,
            qk_norm: false,
        },
        rope: RopeParameters {
            pairing: "halves".into(),
            freq_base: 10000.0,
            scaling: "none".into(),
            factor: 1.0,
            freq_factors: false,
            magnitude: 1.0,
            inv_freq: vec![1.0, 0.1, 0.01, 0.001],
        },
        n_ctx: 256,
        n_prefill: 16,
        mask_value: -30000.0,
        residual_scale: 1.0,
        packages,
        selftest: None,
    };
    std::fs::write(directory.join(MANIFEST), manifest.to_json()).unwrap();
}

/// The numbers of a line `HOST: WHY; N bytes in, M bytes out`.
fn bytes_of(line: &str) -> [u64; 2] {
    let mut words = line.rsplit(';').next().unwrap().split(' ').filter_map(|word| word.parse().ok());
    [words.next().expect("bytes in"), words.next().expect("bytes out")]
}

/// Medians of round trips of a row of n_embd 3584 each way, to a Swift and to a Rust worker that both give back what
/// they get, in turns of 1,000. Start it with `taskset -c 0` for both ends on one core.
fn time_round_trips(words: &[String], folder: &Path) {
    const WIDTH: usize = 3584;
    const TURNS: usize = 10;
    let key = Key::random().unwrap();
    let key_file = folder.join("key");
    std::fs::write(&key_file, format!("{}\n", key.to_hex())).unwrap();
    let arguments = [
        "--fake",
        "blocks=11..12,of=28,n_embd=3584,echo",
        "--ctx",
        "1048576",
        "--key-file",
        key_file.to_str().unwrap(),
    ];
    let swift = Swift::start(words, folder, "127.0.0.1:0", &arguments);
    let mut rust = Command::new(std::env::current_exe().unwrap())
        .args(["--rust-worker", &key.to_hex()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(rust.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let terms = Terms {
        shape: Shape::hidden(WIDTH as u32),
        n_ctx: 1 << 20,
        max_rows: 1,
        max_sessions: 1,
        max_in_flight: 1,
        ..host_terms(1)
    };
    let row: Vec<f16> = (0..WIDTH).map(|i| f16::from_f32(i as f32 / 1000.0)).collect();
    let mut links =
        [swift.address.as_str(), line.trim()].map(|to| dial(to, &key, &terms, &Timing::default()).unwrap());
    let mut times = [Vec::new(), Vec::new()];
    for turn in 0..TURNS + 1 {
        for (link, times) in links.iter_mut().zip(&mut times) {
            for trip in 0..1000 {
                let begun = Instant::now();
                let span = Span { session: 0, position: (turn * 1000 + trip) as u32, count: 1 };
                link.send_step(&[span], &[], row.as_slice().into()).unwrap();
                let Event::Done { rows, .. } = link.receive(Some(begun + Duration::from_secs(10))).unwrap()
                else {
                    panic!("no answer")
                };
                let RowsRef::F16(values) = rows else { panic!("another format") };
                let took = begun.elapsed();
                assert!(values == row, "another answer");
                // the first turn warms up
                if turn > 0 {
                    times.push(took);
                }
            }
        }
    }
    let [swift_us, rust_us] = times.map(|mut times| {
        times.sort();
        times[times.len() / 2].as_nanos() as f64 / 1000.0
    });
    println!(
        "round trip of {} bytes each way, encrypted, median of {}: Swift worker {swift_us:.1} us, Rust worker \
        {rust_us:.1} us, ratio {:.2} (at most 2.00 is the goal)",
        2 * WIDTH,
        TURNS * 1000,
        swift_us / rust_us
    );
    links.into_iter().for_each(|link| link.close(Farewell::Finished));
    drop(rust.stdin.take());
    rust.wait().unwrap();
    swift.stop();
}

/// A Rust worker that gives rows back as they came, until its input ends.
fn rust_worker(key: &Key) {
    let terms = Terms {
        row_types: RowTypes::F16,
        shape: Shape::hidden(3584),
        n_ctx: 1 << 20,
        max_rows: 1,
        max_sessions: 1,
        max_in_flight: 1,
        ..host_terms(7)
    };
    let config = ListenerConfig {
        keys: Arc::new(key.clone()),
        readiness: Readiness::Ready(terms),
        timing: Timing::default(),
        notice: Box::new(|notice| eprintln!("{notice}")),
    };
    let listener = Listener::bind("127.0.0.1:0", config).unwrap();
    println!("{}", listener.address());
    std::io::stdout().flush().unwrap();
    std::thread::spawn(move || {
        let (sender, mut receiver) = listener.accept(None).unwrap().split();
        let mut answer: Vec<f16> = Vec::new();
        while let Ok(event) = receiver.receive(None) {
            let Event::Step { step, rows, .. } = event else { continue };
            let RowsRef::F16(values) = rows else { panic!("another format") };
            answer.clear();
            answer.extend_from_slice(values);
            sender.send_done(step, 1, answer.as_slice().into(), at_once()).unwrap();
        }
    });
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

/// A process of the Swift worker.
struct Swift {
    process: Child,
    address: String,
    code: Option<String>,
    errors: BufReader<std::process::ChildStderr>,
}

impl Swift {
    fn start(words: &[String], folder: &Path, listen: &str, arguments: &[&str]) -> Swift {
        let mut process = Command::new(&words[0])
            .args(&words[1..])
            .args(["--listen", listen, "--name", "a phone"])
            .args(arguments)
            .env("XDG_CONFIG_HOME", folder)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let errors = BufReader::new(process.stderr.take().unwrap());
        let mut output = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").expect("the worker's first line").to_owned();
        let mut code = None;
        if arguments.contains(&"--pair") {
            line.clear();
            output.read_line(&mut line).unwrap();
            code = line.split_whitespace().find(|word| word.len() == 24).map(str::to_owned);
        }
        Swift { process, address, code, errors }
    }

    /// The next line of its messages that has `text` in it.
    fn wait_for(&mut self, text: &str) -> String {
        let mut line = String::new();
        while !line.contains(text) {
            line.clear();
            assert!(self.errors.read_line(&mut line).unwrap() > 0, "the worker ended and did not say {text}");
        }
        line
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(self.process.wait().unwrap().success(), "the worker did not end cleanly");
    }
}

impl Drop for Swift {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A step that took no time.
fn at_once() -> ComputeTime {
    ComputeTime { began: Instant::now(), compute: Duration::ZERO, wait: Duration::ZERO }
}
