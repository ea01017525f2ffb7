//! `dim-host push`: the program against peers over sockets that take files as PROTOCOL.md, section 9, says, break off,
//! refuse, and lie. What the Swift worker makes of it stands in tests/swift-interop.rs.

mod common;

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};

use common::{Cut, failure, host_program, run, text};
use dim::host::packages::Packages;
use dim_wire::VERSIONS;
use dim_wire::connection::{Connection, Role};
use dim_wire::frame::{Inbox, Outgoing, Sealer};
use dim_wire::handshake::{FIRST_FLIGHT, Lookup, Named, Purpose, WorkerHandshake};
use dim_wire::keys::Key;
use dim_wire::message::{ErrorCode, Farewell, Fault, Message, PushOffer, PushOutcome};
use dim_wire::terms::{OPENING_LIMIT, Reason, Terms};
use gguf_tools::coreml::{Identity, Options, PackagePlan};
use gguf_tools::digest::Sha;
use gguf_tools::gguf::Gguf;
use gguf_tools::plan::BlockRange;

/// What a peer does with a connection.
#[derive(Clone, Debug)]
enum Act {
    /// takes everything, compares, says so
    Take,
    /// breaks the connection after so many bytes of this connection
    CutAfter(u64),
    /// says goodbye after so many
    PauseAfter(u64),
    /// is too hot after so many
    TooHotAfter(u64),
    /// says that the last item's bytes were others, and drops it
    HashDiffers,
    StoringFailed,
    Refuse(Reason, &'static str),
    Busy,
    /// sends a message that only a host sends
    Misbehave,
    /// says in PUSH_NEED that it has more than there is
    HasTooMuch,
}

/// A peer that takes pushes, in a thread of its own; its files survive its connections.
struct Taker {
    address: String,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    script: VecDeque<Act>,
    /// what it holds of each item
    stored: Vec<Vec<u8>>,
    /// how much of all items it had at the beginning of each connection
    had: Vec<u64>,
    offers: Vec<PushOffer>,
    verified: bool,
    /// the last words of hosts
    heard: Vec<String>,
}

impl Taker {
    fn start(key: &Key, script: impl IntoIterator<Item = Act>) -> Taker {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Mutex::new(State { script: script.into_iter().collect(), ..State::default() }));
        let (shared, key) = (state.clone(), key.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                serve(stream, &key, &shared);
            }
        });
        Taker { address, state }
    }
}

struct Wire {
    stream: TcpStream,
    connection: Connection,
    sealer: Sealer,
    inbox: Inbox,
}

impl Wire {
    fn accept(mut stream: TcpStream, key: &Key) -> Option<Wire> {
        let mut handshake = WorkerHandshake::new(VERSIONS).unwrap();
        stream.write_all(&handshake.greeting()).ok()?;
        loop {
            let mut buffer = [0; FIRST_FLIGHT];
            let n = stream.read(&mut buffer[..handshake.wants()]).ok().filter(|&n| n > 0)?;
            let mut input = &buffer[..n];
            let look_up = |named: &Named| match named.is(key) {
                true => Lookup::Found(key.clone()),
                false => Lookup::Unknown,
            };
            if let Some(verdict) = handshake.receive(&mut input, look_up) {
                stream.write_all(&verdict.answer).unwrap();
                let established = verdict.outcome.ok()?;
                return Some(Wire {
                    stream,
                    connection: Connection::new(Role::Worker, Purpose::Key),
                    sealer: established.sealer,
                    inbox: Inbox::new(established.opener, OPENING_LIMIT),
                });
            }
        }
    }

    fn say(&mut self, message: &Message<'_>) {
        let (mut plain, mut out) = (Vec::new(), Vec::new());
        message.encode(&mut plain);
        let mut outgoing = Outgoing::new(&plain, &[]);
        while self.sealer.seal(&mut outgoing, &mut out).unwrap() {}
        let _ = self.stream.write_all(&out);
    }

    /// The next message of the host, handed to `body`; false at the end of the connection.
    fn hear(&mut self, body: &mut dyn FnMut(Message<'_>)) -> bool {
        self.inbox.release();
        while !self.inbox.poll().unwrap() {
            match self.stream.read(self.inbox.space()) {
                Ok(n) if n > 0 => self.inbox.filled(n),
                _ => return false,
            }
        }
        body(self.connection.receive(self.inbox.message()).unwrap());
        true
    }
}

fn serve(stream: TcpStream, key: &Key, state: &Mutex<State>) {
    let Some(mut wire) = Wire::accept(stream, key) else { return };
    let mut offered = None;
    wire.hear(&mut |message| {
        if let Message::PushOffer(offer) = message {
            offered = Some(offer);
        }
    });
    let Some(offer) = offered else { return };
    let mut state = state.lock().unwrap();
    let act = state.script.pop_front().unwrap_or(Act::Take);
    state.offers.push(offer.clone());
    match act {
        Act::Refuse(reason, text) => {
            let terms = Terms::blank(2, "test", "a phone");
            return wire.say(&Message::Refuse { reason, terms, text: text.to_owned() });
        }
        Act::Busy => return wire.say(&Message::Busy { since_ms: 12_000, name: "Tom's Mac".to_owned() }),
        _ => {}
    }
    if state.stored.len() != offer.items.len() {
        state.stored = vec![Vec::new(); offer.items.len()];
    }
    let mut have: Vec<u64> = state.stored.iter().map(|s| s.len() as u64).collect();
    state.had.push(have.iter().sum());
    if let Act::HasTooMuch = act {
        have[0] = offer.items[0].size + 1;
        return wire.say(&Message::PushNeed(have));
    }
    wire.say(&Message::PushNeed(have.clone()));
    wire.connection.begin_push(&offer, &have).unwrap();
    wire.inbox.set_limit(wire.connection.limit());
    // what a host does with heartbeats and pings in between
    wire.say(&Message::Ping(77));
    wire.say(&Message::Heartbeat(Default::default()));
    if let Act::Misbehave = act {
        wire.say(&Message::PushOffer(offer.clone()));
    }

    let total: u64 = offer.items.iter().map(|i| i.size).sum();
    let mut came = 0;
    while state.stored.iter().map(|s| s.len() as u64).sum::<u64>() < total {
        let State { stored, heard, .. } = &mut *state;
        let alive = wire.hear(&mut |message| match message {
            Message::PushData { item, bytes, .. } => {
                stored[usize::from(item)].extend_from_slice(bytes);
                came += bytes.len() as u64;
            }
            Message::Pong { number, .. } => heard.push(format!("pong {number}")),
            Message::Error(fault) => heard.push(fault.text),
            _ => {}
        });
        if !alive {
            return;
        }
        match act {
            Act::CutAfter(bytes) if came >= bytes => return,
            Act::PauseAfter(bytes) if came >= bytes => {
                return wire.say(&Message::Goodbye(Farewell::Pausing));
            }
            Act::TooHotAfter(bytes) if came >= bytes => {
                let fault = Fault::new(ErrorCode::TooHot, "a phone is too hot");
                return wire.say(&Message::Error(fault));
            }
            _ => {}
        }
    }
    let result = |outcome, item, text: &str| Message::PushResult { outcome, item, text: text.to_owned() };
    match act {
        Act::HashDiffers => {
            let last = state.stored.len() - 1;
            state.stored[last].clear();
            wire.say(&result(PushOutcome::HashDiffers, Some(last as u16), "the file arrived altered"));
        }
        Act::StoringFailed => wire.say(&result(PushOutcome::StoringFailed, None, "the disk is gone")),
        _ => {
            // a host that has sent everything still answers
            let heard = &mut state.heard;
            while !heard.iter().any(|h| h == "pong 77") {
                let mut note = |message: Message<'_>| {
                    if let Message::Pong { number, .. } = message {
                        heard.push(format!("pong {number}"));
                    }
                };
                if !wire.hear(&mut note) {
                    return;
                }
            }
            let right = |(item, bytes): (&dim_wire::message::Item, &Vec<u8>)| item.sha256 == Sha::of(bytes);
            state.verified = offer.items.iter().zip(&state.stored).all(right);
            wire.say(&result(PushOutcome::Stored, None, ""));
        }
    }
    // the host closes
    while wire.hear(&mut |_| {}) {}
}

/// A tiny model's packages, as dim-split writes them, and a key.
struct Directory {
    cut: Cut,
    path: PathBuf,
    key: Key,
}

/// The middle of what `Cut::tiny` cuts.
const BLOCKS: BlockRange = BlockRange { first: 1, last: 2 };

impl Directory {
    fn new() -> Directory {
        let cut = Cut::tiny("qwen2");
        let gguf = Gguf::open(&cut.model).unwrap();
        // a package for each of the two blocks
        let whole = PackagePlan::new(&gguf, BLOCKS, Options::default()).unwrap().weight_bytes();
        let options = Options { n_ctx: 256, n_prefill: 16, max_bytes: whole * 2 / 3, ..Options::default() };
        let plan = PackagePlan::new(&gguf, BLOCKS, options).unwrap();
        assert_eq!(plan.n_packages(), 2);
        let path = cut.folder.path().join("model.middle-1..2.coreml");
        let identity = Identity {
            model_name: "a \u{1b}[2Jmodel",
            model_sha256: &cut.manifest.model.sha256,
            params_sha256: None,
            slice_sha256: Some(&cut.manifest.slices[1].sha256),
        };
        plan.write(&path, &identity, &mut |_| {}).unwrap();
        let key = Key::from_file(&cut.key).unwrap();
        Directory { cut, path, key }
    }

    fn push(&self, to: &str) -> Command {
        let mut command = Command::new(host_program());
        command.arg("push").arg(&self.path).args(["--worker", to]).arg("--key-file").arg(&self.cut.key);
        command
    }

    fn bytes(&self) -> u64 {
        Packages::open(&self.path, &mut |_, _| {}).unwrap().bytes
    }
}

/// Every byte of every file has arrived, and what was sent twice is less than what was under way at the breaks.
#[test]
fn a_push_goes_on_where_it_stopped_and_every_byte_arrives() {
    let directory = Directory::new();
    let total = directory.bytes();
    let breaks = [Act::CutAfter(total / 5), Act::PauseAfter(total / 4), Act::TooHotAfter(total / 5)];
    let taker = Taker::start(&directory.key, breaks);
    let done = run(&mut directory.push(&taker.address));
    let says = text(&done.stderr);
    assert!(done.status.success(), "{says}");
    let state = taker.state.lock().unwrap();
    assert!(state.verified, "other bytes than the files'");
    assert_eq!(state.stored.iter().map(|s| s.len() as u64).sum::<u64>(), total);
    let packages = Packages::open(&directory.path, &mut |_, _| {}).unwrap();
    for (stored, file) in state.stored.iter().zip(&packages.files) {
        assert!(*stored == std::fs::read(file).unwrap(), "{}", file.display());
    }
    // four connections, each from where the one before had come to
    assert_eq!(state.had.len(), 4, "{says}");
    assert!(state.had.windows(2).all(|w| w[0] < w[1]), "{:?}", state.had);
    assert!(state.offers.windows(2).all(|w| w[0].id() == w[1].id()));
    assert!(state.heard.iter().any(|h| h == "pong 77"), "{:?}", state.heard);
    for part in ["unlock the phone", "too hot", "already: going on there", "verified", "blocks 1..2"] {
        assert!(says.contains(part), "no {part:?} in {says}");
    }
    // a model's name comes out of a file
    assert!(!says.contains('\u{1b}'), "{says:?}");
    drop(state);

    // complete: nothing is sent again
    let done = run(&mut directory.push(&taker.address));
    assert!(text(&done.stderr).contains("0.0 MiB sent"), "{}", text(&done.stderr));
    assert_eq!(*taker.state.lock().unwrap().had.last().unwrap(), total);
}

#[test]
fn bytes_that_arrived_altered_are_sent_once_more_and_not_twice() {
    let directory = Directory::new();
    let taker = Taker::start(&directory.key, [Act::HashDiffers]);
    let done = run(&mut directory.push(&taker.address));
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(text(&done.stderr).contains("once more"), "{}", text(&done.stderr));
    assert!(taker.state.lock().unwrap().verified);

    let taker = Taker::start(&directory.key, [Act::HashDiffers, Act::HashDiffers]);
    let says = failure(&mut directory.push(&taker.address), 1);
    assert!(says.contains("selftest.bin") && says.contains("twice"), "{says}");
}

#[test]
fn each_way_to_refuse_a_push_has_its_own_sentence() {
    let directory = Directory::new();
    let refused = |act, code, wanted: &[&str]| {
        let taker = Taker::start(&directory.key, [act]);
        let says = failure(directory.push(&taker.address).args(["--give-up-after", "0"]), code);
        for part in wanted {
            assert!(says.contains(part), "no {part:?} in {says}");
        }
    };
    refused(Act::Busy, 1, &["is busy", "Tom's Mac", "12 s"]);
    refused(
        Act::Refuse(Reason::NoSpace, "1.20 GB needed, 0.50 GB free"),
        1,
        &["not enough room", "0.50 GB", "free space"],
    );
    refused(Act::Refuse(Reason::PushItems, "there must be one manifest"), 2, &["cannot use", "one manifest"]);
    refused(Act::StoringFailed, 1, &["could not store", "the disk is gone"]);
    refused(Act::Misbehave, 2, &["broke the protocol", "unexpected"]);
    refused(Act::HasTooMuch, 2, &["broke the protocol", "push-items"]);
    refused(Act::CutAfter(1), 1, &["lost", "goes on where this one stopped"]);

    // a worker of GGUF slices
    let worker = directory.cut.worker(1);
    let says = failure(&mut directory.push(&worker.address), 2);
    assert!(says.contains("takes no packages") && says.contains("dim-worker-swift --receive"), "{says}");
    // one that this host is not paired with
    let key = directory.cut.folder.path().join("other");
    std::fs::write(&key, "ab".repeat(32)).unwrap();
    let says = failure(directory.push(&worker.address).arg("--key-file").arg(&key), 2);
    assert!(says.contains("pair"), "{says}");
    // nobody
    let says = failure(directory.push("127.0.0.1:1").args(["--give-up-after", "0"]), 1);
    assert!(says.contains("cannot reach 127.0.0.1:1") && says.contains("phone unlocked"), "{says}");
}

#[test]
fn a_directory_that_is_not_what_its_manifest_says_is_refused_before_anything_is_sent() {
    let directory = Directory::new();
    let manifest = directory.path.join("manifest.json");
    let whole = std::fs::read_to_string(&manifest).unwrap();
    let refuse = |wanted: &[&str]| {
        let says = failure(&mut directory.push("127.0.0.1:1"), 2);
        for part in wanted {
            assert!(says.contains(part), "no {part:?} in {says}");
        }
    };
    // hostile manifests: each names the place and what must stand there
    let json = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut value: serde_json::Value = serde_json::from_str(&whole).unwrap();
        change(&mut value);
        std::fs::write(&manifest, value.to_string()).unwrap();
    };
    json(&|m| m["format"] = "dim.other".into());
    refuse(&["manifest.json", "dim.other"]);
    json(&|m| m["version"] = 2.into());
    refuse(&["version 2"]);
    json(&|m| m["packages"][0]["directory"] = "../../etc".into());
    refuse(&["package 0", "../../etc", "middle-00.mlpackage"]);
    json(&|m| m["packages"][1]["files"][0]["path"] = "/etc/passwd".into());
    refuse(&["package 1", "/etc/passwd"]);
    json(&|m| m["packages"][0]["files"][1] = m["packages"][0]["files"][0].clone());
    refuse(&["package 0", "does not list"]);
    json(&|m| m["selftest"]["file"] = "../key".into());
    refuse(&["self-test", "../key"]);
    json(&|m| m["packages"][0]["files"][0]["bytes"] = 0.into());
    refuse(&["package 0", "0 bytes"]);
    json(&|m| m["packages"][0]["files"][0]["bytes"] = (1u64 << 41).into());
    refuse(&["package 0", "2199023255552 bytes"]);
    json(&|m| m["packages"][0]["files"][0]["sha256"] = "\u{1b}[31mx".into());
    refuse(&["no SHA-256"]);
    json(&|m| m["model"]["params_sha256"] = "beef".into());
    refuse(&["no SHA-256", "beef"]);
    json(&|m| m["packages"] = serde_json::json!([]));
    refuse(&["0 packages"]);
    json(&|m| m["packages"] = serde_json::Value::Array(vec![m["packages"][0].clone(); 300]));
    refuse(&["300 packages"]);
    json(&|m| m["slice"]["first_block"] = 3.into());
    refuse(&["blocks 3..2"]);
    std::fs::write(&manifest, "[".repeat(1 << 20)).unwrap();
    refuse(&["not a manifest of packages"]);
    std::fs::write(&manifest, vec![b' '; (16 << 20) + 1]).unwrap();
    refuse(&["longer than 16 MiB"]);
    std::fs::write(&manifest, b"\xff\xfe").unwrap();
    refuse(&["not a manifest of packages"]);
    std::fs::write(&manifest, &whole).unwrap();

    // files that differ from it
    let weights = directory.path.join("middle-01.mlpackage/Data/com.apple.CoreML/weights/weight.bin");
    let mut bytes = std::fs::read(&weights).unwrap();
    bytes[1000] ^= 1;
    std::fs::write(&weights, &bytes).unwrap();
    refuse(&["weight.bin", "SHA-256"]);
    bytes.pop();
    std::fs::write(&weights, &bytes).unwrap();
    refuse(&["weight.bin", "bytes instead of"]);
    std::fs::remove_file(&weights).unwrap();
    std::fs::create_dir(&weights).unwrap();
    refuse(&["weight.bin"]);
    std::fs::remove_dir(&weights).unwrap();
    refuse(&["weight.bin", "No such file"]);
    // no directory of packages at all
    let says = failure(
        Command::new(host_program())
            .arg("push")
            .arg(directory.cut.folder.path())
            .args(["--worker", "127.0.0.1:1"])
            .arg("--key-file")
            .arg(&directory.cut.key),
        2,
    );
    assert!(says.contains("is no directory of Core ML packages") && says.contains("dim-split"), "{says}");
}
