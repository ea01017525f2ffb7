//! The message path: a row of n_embd 3584 in F16 (7,168 bytes) to a worker and back, through books, codec,
//! encryption and socket, against a bare blocking socket that carries the same bytes.
//!
//! Host and worker are two processes with one thread each on the way of the bytes. Both ways of carrying them
//! are measured in the same run over loopback, in turns of 1,000 round trips, so whatever else the machine
//! does meets both. Where the processes run is decided from outside:
//!
//! ```sh
//! WORKER_CORE=1 taskset -c 0 cargo bench -p dim-wire --bench wire        # each on its own core
//! WORKER_CORE=0 taskset -c 0 cargo bench -p dim-wire --bench wire        # both on one
//! ```
//!
//! Before and after anything is timed the answer is checked: the worker adds one to every value. The cipher
//! alone, twice each way, is timed too: it is the part that no better code around it can save.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use dim_wire::keys::Key;
use dim_wire::message::{Farewell, Span};
use dim_wire::rows::{RowTypes, RowsRef, Shape};
use dim_wire::terms::{SliceRole, Terms};
use dim_wire::transport::{ComputeTime, Event, Link, Listener, ListenerConfig, Readiness, Timing, dial};
use half::f16;

const N_EMBD: usize = 3584;
const TURNS: usize = 10;
const ROUND_TRIPS: usize = 1000;
const N_CTX: u32 = 1 << 20;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let Some(key) = args.iter().position(|a| a == "--worker").and_then(|at| args.get(at + 1)) {
        return worker(&Key::from_hex(key).unwrap());
    }
    // `cargo test` runs benches too: then only that the answer is right
    let only_check = !args.iter().any(|a| a == "--bench");
    let key = Key::random().unwrap();
    let mut peer = Peer::start(&key);
    let mut link = dial(&peer.address("link"), &key, &terms("host"), &Timing::default()).unwrap();
    let mut bare = TcpStream::connect(peer.address("bare")).unwrap();
    bare.set_nodelay(true).unwrap();
    let row: Vec<f16> = (0..N_EMBD).map(|i| f16::from_f32(i as f32 / 1000.0)).collect();
    let mut position = 0;
    check(&mut link, &row, &mut position);
    if only_check {
        link.close(Farewell::Finished);
        return;
    }

    let mut times = [Vec::new(), Vec::new()];
    for turn in 0..TURNS + 1 {
        for _ in 0..ROUND_TRIPS {
            let begun = Instant::now();
            round_trip(&mut link, &row, &mut position);
            times[0].push(begun.elapsed());
        }
        let mut buffer = vec![0; 2 * N_EMBD];
        for _ in 0..ROUND_TRIPS {
            let begun = Instant::now();
            bare.write_all(bytemuck::cast_slice(&row)).unwrap();
            bare.read_exact(&mut buffer).unwrap();
            times[1].push(begun.elapsed());
        }
        if turn == 0 {
            // warm-up
            times.iter_mut().for_each(Vec::clear);
        }
    }
    check(&mut link, &row, &mut position);
    let traffic = link.sender().traffic();
    let per_trip = (traffic.bytes_sent + traffic.bytes_received) as f64 / traffic.round_trips as f64;
    link.close(Farewell::Finished);

    let [wire, plain] = times.map(|mut t| {
        t.sort();
        [50, 90, 99].map(|p| t[(t.len() - 1) * p / 100].as_nanos() as f64 / 1000.0)
    });
    println!(
        "worker on core {}; host wherever this was started",
        std::env::var("WORKER_CORE").unwrap_or("any".into())
    );
    println!("round trip of {} bytes each way, {} times, microseconds:", 2 * N_EMBD, TURNS * ROUND_TRIPS);
    println!("                          p50      p90      p99");
    println!("  bare socket        {:8.1} {:8.1} {:8.1}", plain[0], plain[1], plain[2]);
    println!("  dim's message path {:8.1} {:8.1} {:8.1}", wire[0], wire[1], wire[2]);
    println!("  of that the cipher {:8.1}", cipher());
    println!("  ratio of medians   {:8.2}   (at most 2.00 is the goal)", wire[0] / plain[0]);
    println!("  bytes per token    {per_trip:8.0}   (at most {})", 2 * (2 * N_EMBD + 64));
}

fn check(link: &mut Link, row: &[f16], position: &mut u32) {
    let values = round_trip(link, row, position);
    assert!(values.iter().zip(row).all(|(a, b)| *a == plus_one(*b)), "the worker's answer is wrong");
}

fn round_trip<'a>(link: &'a mut Link, row: &[f16], position: &mut u32) -> &'a [f16] {
    let span = [Span { session: 0, position: *position, count: 1 }];
    *position += 1;
    let sent = link.send_step(&span, &[], row.into()).unwrap();
    match link.receive(Some(Instant::now() + Duration::from_secs(10))).unwrap() {
        Event::Done { step, rows, .. } => {
            assert_eq!(step, sent);
            let RowsRef::F16(values) = rows else { panic!("another format") };
            values
        }
        other => panic!("{other:?}"),
    }
}

fn plus_one(v: f16) -> f16 {
    f16::from_f32(v.to_f32() + 1.0)
}

fn terms(name: &str) -> Terms {
    Terms {
        row_types: RowTypes::F16,
        role: SliceRole::Middle,
        shape: Shape::hidden(N_EMBD as u32),
        n_blocks: 28,
        blocks: BlockRange { first: 11, last: 16 },
        n_ctx: N_CTX,
        max_rows: 1,
        max_sessions: 1,
        max_in_flight: 1,
        model: Some(Sha([1; 32])),
        arch: "qwen2".into(),
        ..Terms::blank(2, "bench", name)
    }
}

/// Microseconds to seal and open a row's message in both directions.
fn cipher() -> f64 {
    use dim_wire::frame::{Inbox, Opener, Outgoing, Sealer};
    let mut message = vec![0; 32 + 2 * N_EMBD];
    let length = message.len() as u32;
    message[4..8].copy_from_slice(&length.to_le_bytes());
    let (mut sealer, mut inbox) = (Sealer::new(&[1; 32]), Inbox::new(Opener::new(&[1; 32]), message.len()));
    let mut frame = Vec::new();
    let mut times: Vec<Duration> = (0..5000)
        .map(|_| {
            frame.clear();
            let begun = Instant::now();
            sealer.seal(&mut Outgoing::new(&message, &[]), &mut frame).unwrap();
            let sealed = begun.elapsed();
            inbox.fill(&frame);
            let begun = Instant::now();
            assert!(inbox.poll().unwrap());
            let opened = begun.elapsed();
            inbox.release();
            sealed + opened
        })
        .collect();
    times.sort();
    2.0 * times[times.len() / 2].as_nanos() as f64 / 1000.0
}

/// The worker's process: says where it listens, then answers until its input ends.
fn worker(key: &Key) {
    let config = ListenerConfig {
        keys: Arc::new(key.clone()),
        readiness: Readiness::Ready(terms("worker")),
        timing: Timing::default(),
        notice: Box::new(|notice| eprintln!("{notice}")),
    };
    let listener = Listener::bind("127.0.0.1:0", config).unwrap();
    let bare = TcpListener::bind("127.0.0.1:0").unwrap();
    println!("link {}", listener.address());
    println!("bare {}", bare.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut peer, _) = bare.accept().unwrap();
        peer.set_nodelay(true).unwrap();
        let mut buffer = vec![0; 2 * N_EMBD];
        while peer.read_exact(&mut buffer).is_ok() && peer.write_all(&buffer).is_ok() {}
    });
    std::thread::spawn(move || {
        let (sender, mut receiver) = listener.accept(None).unwrap().split();
        // the right answer, made once: only the message path is timed
        let mut out: Vec<f16> = Vec::new();
        while let Ok(event) = receiver.receive(None) {
            let Event::Step { step, rows, .. } = event else { continue };
            if out.is_empty() {
                let RowsRef::F16(values) = rows else { panic!("another format") };
                out = values.iter().map(|&v| plus_one(v)).collect();
            }
            sender.send_done(step, 1, out.as_slice().into(), at_once()).unwrap();
        }
    });
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

struct Peer {
    process: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Peer {
    fn start(key: &Key) -> Peer {
        let exe = std::env::current_exe().unwrap();
        let mut command = match std::env::var("WORKER_CORE") {
            Ok(core) => {
                let mut taskset = Command::new("taskset");
                taskset.args(["-c", &core]).arg(exe);
                taskset
            }
            Err(_) => Command::new(exe),
        };
        command.args(["--worker", &key.to_hex()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        Peer { process, output }
    }

    /// Where the worker's process says it listens; to be asked in the order of its lines.
    fn address(&mut self, what: &str) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().strip_prefix(what).unwrap().trim().to_owned()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// A step that took no time.
fn at_once() -> ComputeTime {
    ComputeTime { began: Instant::now(), compute: Duration::ZERO, wait: Duration::ZERO }
}
