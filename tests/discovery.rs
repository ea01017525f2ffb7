//! `--worker auto` and the announcement of `dim-worker`: real processes, real multicast on the loopback interface, on a
//! port of its own so that nobody else's workers are seen.

mod common;

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Cut, Relay, Worker, failure, host_program, report, run, text, worker_program};
use dim_wire::keys::{Key, KeyStore, Peer};
use dim_wire::transport::discover::{Announcement, Search};
use dim_wire::transport::{Listener, ListenerConfig, Readiness, Timing, inquire};
use gguf_tools::synth::Spec;

/// A port for one test's multicast DNS.
fn mdns_port() -> u16 {
    std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A user's keys, in a folder that stands for `$XDG_CONFIG_HOME`.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Home {
        Home(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn add(&self, key: &Key, name: &str) {
        let peer = Peer { name: name.to_owned(), address: String::new(), paired_at: 1 };
        KeyStore::at(self.path().join("dim/keys")).add(key, &peer).unwrap();
    }
}

/// Two users' homes that share a key.
fn pair(host: &Home, worker: &Home, name: &str) {
    let key = Key::random().unwrap();
    host.add(&key, name);
    worker.add(&key, "host");
}

fn announced(slice: &Path, home: &Home, port: u16) -> Worker {
    worker(slice, home, &["--announce", "always", "--mdns-port", &port.to_string()])
}

fn worker(slice: &Path, home: &Home, more: &[&str]) -> Worker {
    let mut command = Command::new(worker_program());
    command.arg(slice).args(["--listen", "127.0.0.1:0", "--threads", "1", "--ctx", "512"]).args(more);
    Worker::spawn(command.env("XDG_CONFIG_HOME", home.path()))
}

fn auto(cut: &Cut, home: &Home, port: u16, more: &[&str]) -> Command {
    let mut command = Command::new(host_program());
    command.arg("generate").arg("--split").arg(&cut.split).args(["--worker", "auto", "--wire", "f32"]);
    command.args(["--mdns-port", &port.to_string(), "--threads", "1", "--ctx", "512", "--json"]);
    command.args(["-p", common::PROMPT, "-n", "16", "--temp", "0"]).args(more);
    command.env("XDG_CONFIG_HOME", home.path());
    command
}

#[test]
fn the_paired_worker_with_the_right_blocks_is_found_and_every_other_is_told_apart() {
    let port = mdns_port();
    let cut = Cut::new(&Spec::tiny("qwen2").unwrap(), &["1..1", "2..2"]);
    let other_model = Cut::tiny("llama");
    let other_blocks = Cut::new(&Spec::tiny("qwen2").unwrap(), &["2..3"]);
    let stock = report(cut.stock(&["-n", "16", "--temp", "0"]).args(["--ctx", "512"]));

    let host = Home::new();
    let homes: Vec<Home> = (0..5).map(|_| Home::new()).collect();
    for (home, name) in homes.iter().zip(["a", "b", "c", "d"]).take(4) {
        pair(&host, home, name);
    }
    let first = announced(&cut.slice(1), &homes[0], port);
    let second = announced(&cut.slice(2), &homes[1], port);
    let llama = announced(&other_model.slice(1), &homes[2], port);
    let elsewhere = announced(&other_blocks.slice(1), &homes[3], port);
    let stranger = announced(&cut.slice(1), &homes[4], port);
    // gone without a word: what it announced is still about
    let mut gone = announced(&cut.slice(1), &homes[0], port);
    let gone_address = gone.address.clone();

    // the slices are not at hand: both middles have to be found
    for i in [1, 2] {
        std::fs::rename(cut.slice(i), cut.slice(i).with_extension("away")).unwrap();
    }
    // who is seen before the gaps are closed is chance, so a host that needs more than there is looks at everybody
    std::fs::rename(cut.slice(2).with_extension("away"), cut.slice(2)).unwrap();
    gone.kill();
    drop(second);
    let mut looking = auto(&cut, &host, port, &["--give-up-after", "8"]);
    std::fs::rename(cut.slice(2), cut.slice(2).with_extension("away")).unwrap();
    let says = failure(&mut looking, 1);
    let line = |address: &str, what: &str| {
        let found = says.lines().any(|l| l.contains(address) && l.contains(what));
        assert!(found, "no line with {address} and {what:?} in {says}");
    };
    line(&first.address, "paired, holds qwen2 blocks 1..1 of");
    line(&llama.address, "another model: llama blocks 1..2");
    line(&elsewhere.address, "other blocks: qwen2 blocks 2..3");
    line(&stranger.address, &format!("not paired with this host: dim-host pair {}", stranger.address));
    assert!(
        says.contains("no usable worker for blocks 1..4")
            || says.contains("no usable worker for blocks 1..2"),
        "{says}"
    );
    assert!(!says.lines().any(|l| l.contains(&gone_address) && l.contains("paired, holds")), "{says}");

    // with the second one back, the reply is stock's
    let second = announced(&cut.slice(2).with_extension("away"), &homes[1], port);
    let got = report(&mut auto(&cut, &host, port, &[]));
    assert_eq!(got.tokens, stock.tokens);
    assert_eq!(got.stages.len(), 4);
    drop((first, second));
}

#[test]
fn a_busy_worker_is_named_with_its_host_and_another_is_taken() {
    let port = mdns_port();
    let cut = Cut::tiny("qwen2");
    let host = Home::new();
    let homes = [Home::new(), Home::new()];
    homes.iter().for_each(|home| pair(&host, home, "a"));
    let busy = announced(&cut.slice(1), &homes[0], port);
    // a conversation that waits for its next line holds the worker
    let mut chat = Command::new(host_program());
    chat.arg("chat").arg("--split").arg(&cut.split).args([
        "--worker",
        "auto",
        "--mdns-port",
        &port.to_string(),
    ]);
    chat.args(["--threads", "1", "--ctx", "512", "-n", "4"]).env("XDG_CONFIG_HOME", host.path());
    let mut chat = chat.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut said = BufReader::new(chat.stdout.take().unwrap());
    writeln!(chat.stdin.as_mut().unwrap(), "hello").unwrap();
    said.read_line(&mut String::new()).unwrap();

    let away = cut.slice(1).with_extension("away");
    std::fs::rename(cut.slice(1), &away).unwrap();
    let says = failure(&mut auto(&cut, &host, port, &["--give-up-after", "4"]), 1);
    let lines: Vec<&str> = says.lines().filter(|l| l.contains("busy: it has served")).collect();
    assert_eq!(lines.len(), 1, "said once, though tried again: {says}");
    assert!(lines[0].contains(&busy.address), "{says}");
    // another one with the same blocks is taken instead
    let free = announced(&away, &homes[1], port);
    let output = run(&mut auto(&cut, &host, port, &[]));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains(&format!("1..2 on {}", free.address)), "{}", text(&output.stderr));
    drop(chat.stdin.take());
    assert!(chat.wait().unwrap().success());
    // and it is free again
    drop(free);
    assert_eq!(report(&mut auto(&cut, &host, port, &[])).tokens.len(), 16);
    drop(busy);
}

#[test]
fn without_any_worker_a_middle_at_hand_runs_here_and_without_one_the_way_out_is_named() {
    let port = mdns_port();
    let cut = Cut::tiny("qwen2");
    let home = Home::new();
    let got = report(&mut auto(&cut, &home, port, &["--give-up-after", "2"]));
    assert!(got.stages.iter().all(|s| !s.name.contains('@')));
    std::fs::remove_file(cut.slice(1)).unwrap();
    let says = failure(&mut auto(&cut, &home, port, &["--give-up-after", "1"]), 1);
    assert!(says.contains("no usable worker for blocks 1..2") && says.contains("none was seen"), "{says}");
    assert!(says.contains("--worker ADDR:PORT"), "{says}");
}

/// A phone that is being unlocked, a worker whose machine wakes up: the question goes unanswered, and is asked again.
#[test]
fn a_worker_that_stands_still_for_seven_seconds_is_asked_again() {
    let port = mdns_port();
    let cut = Cut::tiny("qwen2");
    let (host, home) = (Home::new(), Home::new());
    pair(&host, &home, "a");
    let worker = worker(&cut.slice(1), &home, &["--announce", "never"]);
    std::fs::rename(cut.slice(1), cut.slice(1).with_extension("away")).unwrap();
    let relay = Relay::to(&worker.address);
    relay.pace(0);
    let _seen = Announcement::start("slow", relay.address, port, |_| {}).unwrap();
    let mut generate = auto(&cut, &host, port, &[]);
    let host = generate.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // longer than a question may take
    std::thread::sleep(Duration::from_secs(7));
    relay.pace(u64::MAX);
    let output = host.wait_with_output().unwrap();
    let says = text(&output.stderr);
    assert!(output.status.success() && says.contains("did not answer"), "{says}");
}

/// Anybody can announce eighty workers, at eighty addresses that take connections and say nothing.
#[cfg(target_os = "linux")]
#[test]
fn eighty_false_announcements_do_not_hide_the_paired_worker() {
    let port = mdns_port();
    let cut = Cut::tiny("qwen2");
    let (host, home) = (Home::new(), Home::new());
    let silent = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let at = silent.local_addr().unwrap().port();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            while !over.load(Ordering::Relaxed) {
                for n in 0..80 {
                    socket.send_to(&announcement(n, at), ("224.0.0.251", port)).unwrap();
                }
                std::thread::sleep(Duration::from_millis(300));
            }
        });
        let mut search = Search::start(port).unwrap();
        let mut seen = std::collections::HashSet::new();
        while seen.len() < 80 {
            let next = search.next(Instant::now() + Duration::from_secs(20)).expect("all of them are seen");
            seen.insert(next.name);
        }
        drop(search);
        let worker = announced(&cut.slice(1), &home, port);
        let mut search = Search::start(port).unwrap();
        let is_ours = |s: &dim_wire::transport::discover::Sighting| s.addresses.contains(&worker.address);
        let ours = std::iter::from_fn(|| search.next(Instant::now() + Duration::from_secs(20))).find(is_ours);
        pair(&host, &home, &ours.expect("it is seen").name);
        std::fs::rename(cut.slice(1), cut.slice(1).with_extension("away")).unwrap();
        let output = run(&mut auto(&cut, &host, port, &["--give-up-after", "12"]));
        over.store(true, Ordering::Relaxed);
        assert!(output.status.success(), "{}", text(&output.stderr));
    });
}

/// What a machine at 127.0.1.`n` would send to say that a worker listens there: PTR, SRV, TXT and A.
#[cfg(target_os = "linux")]
fn announcement(n: u8, port: u16) -> Vec<u8> {
    fn name(labels: &[&str]) -> Vec<u8> {
        let label = |l: &&str| std::iter::once(l.len() as u8).chain(l.bytes()).collect::<Vec<_>>();
        labels.iter().flat_map(label).chain([0]).collect()
    }
    let (service, host) = (["_dim", "_tcp", "local"], format!("false-{n}"));
    let instance = format!("worker {n}");
    let instance = name(&[&instance, service[0], service[1], service[2]]);
    let host = name(&[&host, "local"]);
    let record = |of: &[u8], kind: u16, class: u16, data: &[u8]| {
        let mut record = of.to_vec();
        record.extend(kind.to_be_bytes());
        record.extend(class.to_be_bytes());
        record.extend(120u32.to_be_bytes());
        record.extend((data.len() as u16).to_be_bytes());
        record.extend(data);
        record
    };
    let mut srv = vec![0; 4];
    srv.extend(port.to_be_bytes());
    srv.extend(&host);
    // a response, authoritative, of four answers
    let mut packet = vec![0, 0, 0x84, 0, 0, 0, 0, 4, 0, 0, 0, 0];
    packet.extend(record(&name(&service), 12, 1, &instance));
    packet.extend(record(&instance, 33, 0x8001, &srv));
    packet.extend(record(&instance, 16, 0x8001, &[0]));
    packet.extend(record(&host, 1, 0x8001, &[127, 0, 1, n + 1]));
    packet
}

/// Anybody can announce anything.
#[test]
fn a_hostile_name_is_shown_harmless_and_a_withdrawn_one_is_not_seen() {
    let port = mdns_port();
    let at: SocketAddr = "127.0.0.1:4567".parse().unwrap();
    let evil =
        Announcement::start("evil\u{1b}[2J\u{202e}.\\name\r\nerror: trust me", at, port, |_| {}).unwrap();
    let mut search = Search::start(port).unwrap();
    let seen = search.next(Instant::now() + Duration::from_secs(20)).expect("it is seen");
    assert_eq!(seen.addresses, ["127.0.0.1:4567"]);
    assert!(seen.name.starts_with("evil\u{FFFD}[2J\u{FFFD}.\\name"), "{:?}", seen.name);
    assert!(!seen.name.chars().any(char::is_control), "{:?}", seen.name);
    drop((evil, search));
    // a worker that ends takes its announcement back
    let mut search = Search::start(port).unwrap();
    assert_eq!(search.next(Instant::now() + Duration::from_secs(3)), None);
}

#[test]
fn a_worker_that_cannot_be_announced_works_all_the_same() {
    let cut = Cut::tiny("qwen2");
    // a port that another program has to itself
    let taken = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let worker = Worker::start(&cut.slice(1), &cut.key, &["--announce", "always", "--mdns-port", &port]);
    assert_eq!(report(&mut cut.generate(&[&worker.address], &["-n", "2"])).tokens.len(), 2);
    let begun = Instant::now();
    while !worker.stderr().contains("hosts do not find this worker by themselves") {
        assert!(begun.elapsed() < Duration::from_secs(20), "nothing is said: {}", worker.stderr());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(report(&mut cut.generate(&[&worker.address], &["-n", "2"])).tokens.len(), 2);
    let quiet = Worker::start(&cut.slice(1), &cut.key, &["--announce", "never"]);
    assert_eq!(report(&mut cut.generate(&[&quiet.address], &["-n", "2"])).tokens.len(), 2);
}

/// A worker that was found is asked for a session more than the conversations need, as one that was named: its canary is
/// asked there while it computes.
#[test]
fn a_worker_that_is_found_is_asked_for_a_session_to_spare() {
    let port = mdns_port();
    let cut = Cut::tiny("qwen2");
    let (host, home) = (Home::new(), Home::new());
    let key = Key::random().unwrap();
    host.add(&key, "a");
    home.add(&key, "host");
    // what a real one says it is, by one that tells what it is asked for
    let real = worker(&cut.slice(1), &home, &["--announce", "never", "--parallel", "2"]);
    let terms = inquire(&real.address, &key, &Timing::default()).unwrap();
    assert_eq!(terms.max_sessions, 2);
    let config = ListenerConfig {
        keys: Arc::new(key),
        readiness: Readiness::Ready(terms),
        timing: Timing::default(),
        notice: Box::new(|_| {}),
    };
    let listener = Listener::bind("127.0.0.1:0", config).unwrap();
    let _seen = Announcement::start("a", listener.address(), port, |_| {}).unwrap();
    let mut generate = auto(&cut, &host, port, &[]);
    let mut host = generate.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let link = listener.accept(Some(Duration::from_secs(60))).expect("it is found");
    host.kill().unwrap();
    host.wait().unwrap();
    assert_eq!(link.agreed().max_sessions, 2, "one for the conversation, one for the canary");
}
