//! What happens when a worker or the way to it breaks in the middle of a reply: the reply is the same.

mod common;

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Cut, Numbers, Relay, Undisturbed, Worker, failure, report, text};
use dim::host::report::{Report, Stop};
use gguf_tools::gguf::TensorType;
use gguf_tools::synth::Spec;

const ROUNDS: u64 = 20;
const OPTIONS: [&str; 6] = Undisturbed::OPTIONS;

fn spawn(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn finish(host: Child) -> (Report, String) {
    let output = host.wait_with_output().unwrap();
    let stderr = text(&output.stderr);
    assert!(output.status.success(), "{}\n{stderr}", output.status);
    (serde_json::from_slice(&output.stdout).unwrap(), stderr)
}

#[test]
fn a_worker_killed_at_any_point_and_restarted_changes_no_token() {
    for arch in ["qwen2", "llama"] {
        let cut = Cut::tiny(arch);
        let Undisturbed { report: expected, before, bytes } = Undisturbed::of(&cut);
        let mut worker = cut.worker(1);
        let address = worker.address.clone();
        let relay = Relay::to(&address);
        let mut numbers = Numbers(42);
        let rounds = if arch == "qwen2" { ROUNDS } else { 5 };
        for round in 0..rounds {
            relay.break_after(before + 400 + numbers.below(bytes - 600));
            let host = spawn(&mut cut.generate(&[&relay.address()], &OPTIONS));
            assert!(relay.wait_until_broken(), "round {round}: the reply ended before the break");
            worker.kill();
            relay.mend();
            worker = Worker::start_at(&address, &cut.slice(1), &cut.key, &[]);
            let (got, stderr) = finish(host);
            assert_eq!(got.tokens, expected.tokens, "{arch}, round {round}");
            assert_eq!(got.text, expected.text);
            assert!(got.stages[1].reconnects >= 1, "round {round}: {stderr}");
            assert!(stderr.contains("is back"), "{stderr}");
        }
        println!("{arch}: {rounds} of {rounds} replies identical, kill -9 at random points");
    }
}

#[test]
fn a_connection_cut_at_any_point_changes_no_token() {
    let cut = Cut::new(&Spec::tiny("qwen3").unwrap(), &["1..2", "3..3"]);
    let second = cut.worker(2);
    let worker = cut.worker(1);
    let relay = Relay::to(&worker.address);
    let generate = || cut.generate(&[&relay.address(), &second.address], &OPTIONS);
    let expected = report(&mut generate());
    let bytes = expected.wire.bytes_received / 2;
    let before = relay.received().saturating_sub(bytes);
    let mut numbers = Numbers(7);
    for round in 0..ROUNDS {
        relay.break_after(before + 400 + numbers.below(bytes - 600));
        let host = spawn(&mut generate());
        assert!(relay.wait_until_broken(), "round {round}");
        relay.mend();
        let (got, _) = finish(host);
        assert_eq!(got.tokens, expected.tokens, "round {round}");
        assert!(got.stages[1].reconnects >= 1 && got.stages[2].reconnects == 0, "round {round}");
    }
    println!("{ROUNDS} of {ROUNDS} replies identical, connection cut at random points");
}

#[test]
fn a_worker_that_hangs_past_the_deadline_changes_no_token() {
    let cut = Cut::tiny("qwen2");
    let Undisturbed { report: expected, before, bytes } = Undisturbed::of(&cut);
    let worker = cut.worker(1);
    let mut numbers = Numbers(3);
    for round in 0..3 {
        // the relay only tells when: it breaks nothing here that the stopped worker could notice
        let relay = Relay::to(&worker.address);
        relay.break_after(before + 1000 + numbers.below(bytes - 1500));
        let host = spawn(&mut cut.generate(&[&relay.address()], &OPTIONS));
        assert!(relay.wait_until_broken());
        worker.signal("STOP");
        relay.mend();
        // longer than the 3 s of silence and the 5 s of a handshake
        std::thread::sleep(Duration::from_millis(4500));
        worker.signal("CONT");
        let (got, stderr) = finish(host);
        assert_eq!(got.tokens, expected.tokens, "round {round}: {stderr}");
        assert!(got.stages[1].reconnects >= 1, "{stderr}");
    }
}

#[test]
fn a_hanging_worker_is_noticed_without_any_help_from_the_network() {
    let cut = Cut::new(&Spec::new("demo", Some("qwen2")).unwrap(), &["4..7"]);
    let worker = Worker::start(&cut.slice(1), &cut.key, &["--ctx", "512"]);
    let options = ["-n", "200", "--temp", "0"];
    let expected = report(&mut cut.generate(&[&worker.address], &options));
    let host = spawn(&mut cut.generate(&[&worker.address], &options));
    std::thread::sleep(Duration::from_millis(expected.start_to_first_token_ms as u64 + 200));
    worker.signal("STOP");
    std::thread::sleep(Duration::from_secs(4));
    worker.signal("CONT");
    let (got, stderr) = finish(host);
    assert_eq!(got.tokens, expected.tokens);
    // on a machine so slow that the reply had not begun, or so fast that it was over, there is nothing to notice
    if got.stages[1].reconnects > 0 {
        assert!(stderr.contains("nothing heard for"), "{stderr}");
    } else {
        assert!(!stderr.contains("lost"), "{stderr}");
    }
}

/// A way on which nothing moves for a while, and then everything does: waited for, or, past the silence, dialled anew.
#[test]
fn a_link_that_stands_still_changes_no_token() {
    let cut = Cut::tiny("qwen2");
    let Undisturbed { report: expected, before, bytes } = Undisturbed::of(&cut);
    let worker = cut.worker(1);
    let relay = Relay::to(&worker.address);
    let mut numbers = Numbers(21);
    for (stall_ms, is_lost) in
        [(100, false), (700, false), (1800, false), (100, false), (4500, true), (7000, true)]
    {
        relay.stall_after(before + 1000 + numbers.below(bytes - 1500));
        let host = spawn(&mut cut.generate(&[&relay.address()], &OPTIONS));
        assert!(relay.wait_until_stalled(), "the reply ended before it stood still");
        std::thread::sleep(Duration::from_millis(stall_ms));
        relay.pace(u64::MAX);
        let (got, stderr) = finish(host);
        assert_eq!(got.tokens, expected.tokens, "{stall_ms} ms: {stderr}");
        assert_eq!(got.stages[1].reconnects > 0, is_lost, "{stall_ms} ms: {stderr}");
    }
}

#[test]
fn a_slow_link_takes_time_and_nothing_else() {
    let cut = Cut::tiny("qwen2");
    let Undisturbed { report: expected, .. } = Undisturbed::of(&cut);
    let worker = cut.worker(1);
    let relay = Relay::to(&worker.address);
    for mbit_per_s in [1, 5, 20] {
        relay.pace(mbit_per_s * 125_000);
        let got = report(&mut cut.generate(&[&relay.address()], &OPTIONS));
        assert_eq!(got.tokens, expected.tokens, "{mbit_per_s} Mbit/s");
        assert_eq!(got.stages[1].reconnects, 0, "{mbit_per_s} Mbit/s");
    }
}

/// Slices are read, not mapped: what happens to their files afterwards is nobody's concern.
#[test]
fn files_changed_under_a_reply_change_no_token() {
    let cut = Cut::tiny("qwen2");
    let other = Cut::new(&Spec::tiny("qwen2").unwrap().seed(2), &["1..2"]);
    let Undisturbed { report: expected, before, bytes } = Undisturbed::of(&cut);
    let mut numbers = Numbers(17);
    type Change = fn(&Path, &Path);
    let changes: [(&str, Change); 5] = [
        ("replaced by rename", |file, other| {
            let beside = file.with_extension("new");
            fs::copy(other, &beside).unwrap();
            fs::rename(beside, file).unwrap();
        }),
        ("overwritten in place", |file, other| {
            let bytes = fs::read(other).unwrap();
            fs::OpenOptions::new().write(true).open(file).unwrap().write_all(&bytes).unwrap();
        }),
        ("made shorter", |file, _| {
            let file = fs::OpenOptions::new().write(true).open(file).unwrap();
            file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        }),
        ("emptied", |file, _| drop(fs::File::create(file).unwrap())),
        ("removed", |file, _| fs::remove_file(file).unwrap()),
    ];
    for (what, change) in changes {
        for _ in 0..2 {
            let worker = cut.worker(1);
            let relay = Relay::to(&worker.address);
            relay.stall_after(before + 1000 + numbers.below(bytes - 1500));
            let host = spawn(&mut cut.generate(&[&relay.address()], &OPTIONS));
            assert!(relay.wait_until_stalled());
            let whole: Vec<Vec<u8>> = (0..3).map(|i| fs::read(cut.slice(i)).unwrap()).collect();
            (0..3).for_each(|i| change(&cut.slice(i), &other.slice(i)));
            relay.pace(u64::MAX);
            let (got, stderr) = finish(host);
            (0..3).for_each(|i| fs::write(cut.slice(i), &whole[i]).unwrap());
            assert_eq!(got.tokens, expected.tokens, "{what}: {stderr}");
            assert_eq!(got.stages[1].reconnects, 0, "{what}: {stderr}");
        }
    }
}

#[test]
fn two_workers_and_a_host_may_be_started_in_any_order() {
    let cut = Cut::new(&Spec::tiny("llama").unwrap(), &["1..2", "3..3"]);
    let expected = report(&mut cut.generate(&[], &["-n", "4", "--temp", "0"]));
    // addresses that are free now
    let addresses = [cut.worker(1).address.clone(), cut.worker(2).address.clone()];
    let pause = || std::thread::sleep(Duration::from_millis(400));
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [2, 0, 1], [1, 2, 0], [2, 1, 0]] {
        let (mut host, mut workers) = (None, Vec::new());
        for who in order {
            match who {
                0 => {
                    let addresses = [addresses[0].as_str(), &addresses[1]];
                    host = Some(spawn(&mut cut.generate(&addresses, &["-n", "4", "--temp", "0"])));
                }
                i => workers.push(Worker::start_at(&addresses[i - 1], &cut.slice(i), &cut.key, &[])),
            }
            pause();
        }
        let (got, stderr) = finish(host.unwrap());
        assert_eq!(got.tokens, expected.tokens, "{order:?}: {stderr}");
    }
}

#[test]
fn a_worker_gone_for_good_is_one_clear_error_and_keeps_the_text() {
    let cut = Cut::tiny("qwen2");
    let Undisturbed { report: expected, before, bytes } = Undisturbed::of(&cut);
    let mut worker = cut.worker(1);
    let relay = Relay::to(&worker.address);
    // the prompt is the larger part of the bytes: this falls among the tokens of the reply
    relay.break_after(before + bytes * 8 / 10);
    let start = Instant::now();
    let host = spawn(cut.generate(&[&relay.address()], &OPTIONS).args(["--give-up-after", "2"]));
    assert!(relay.wait_until_broken());
    worker.kill();
    let output = host.wait_with_output().unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(start.elapsed() < Duration::from_secs(30));
    let errors: Vec<&str> = stderr.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{stderr}");
    assert!(errors[0].contains("is gone") && stderr.contains("hint: "), "{stderr}");
    let kept: Report = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(kept.stop, Stop::Error);
    assert!(kept.tokens.len() > 10 && kept.tokens.len() < 128, "{} tokens kept", kept.tokens.len());
    assert!(expected.tokens.starts_with(&kept.tokens), "what was kept is the beginning of the whole reply");
    assert!(!kept.text.is_empty() && expected.text.starts_with(kept.text.trim_end_matches('\u{fffd}')));
}

#[test]
fn a_host_that_dies_frees_the_worker_for_the_next_one() {
    let cut = Cut::tiny("qwen2");
    let worker = cut.worker(1);
    for _ in 0..3 {
        let mut host =
            spawn(&mut cut.generate(&[&worker.address], &["-n", "300", "--temp", "0", "--ctx", "512"]));
        std::thread::sleep(Duration::from_millis(150));
        host.kill().unwrap();
        host.wait().unwrap();
        let next = report(&mut cut.generate(&[&worker.address], &["-n", "2"]));
        assert_eq!(next.tokens.len(), 2);
    }
}

#[test]
fn a_host_that_hangs_is_let_go_and_the_next_one_is_served() {
    let cut = Cut::new(&Spec::new("demo", Some("qwen2")).unwrap(), &["4..7"]);
    let worker = Worker::start(&cut.slice(1), &cut.key, &["--ctx", "1024"]);
    let mut host =
        spawn(&mut cut.generate(&[&worker.address], &["-n", "-1", "--temp", "0", "--ctx", "1024"]));
    std::thread::sleep(Duration::from_millis(800));
    common::signal(host.id(), "STOP");
    // BUSY at first, served within the 3 s of silence and a retry
    let next = report(&mut cut.generate(&[&worker.address], &["-n", "2"]));
    assert_eq!(next.tokens.len(), 2);
    common::signal(host.id(), "KILL");
    host.wait().unwrap();
}

/// Bytes that are no host's, while a host is served: the reply is the same, and nobody is let in.
#[test]
fn garbage_on_the_port_disturbs_nobody() {
    use std::io::Read as _;
    let cut = Cut::tiny("qwen2");
    let Undisturbed { report: expected, .. } = Undisturbed::of(&cut);
    let worker = cut.worker(1);
    let host = spawn(&mut cut.generate(&[&worker.address], &OPTIONS));
    let mut numbers = Numbers(9);
    let starts: [&[u8]; 4] = [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", b"\xD1DIM\r\n\x1a\n", b""];
    for i in 0..60 {
        let mut stream = std::net::TcpStream::connect(&worker.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut bytes = starts[i % starts.len()].to_vec();
        bytes.extend((0..numbers.below(400)).map(|_| numbers_byte(&mut numbers.0)));
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        // a greeting, and a status
        assert!(answer.len() <= 32 + 24, "{} bytes of an answer to garbage", answer.len());
    }
    assert_eq!(finish(host).0.tokens, expected.tokens);
    assert_eq!(report(&mut cut.generate(&[&worker.address], &OPTIONS)).tokens, expected.tokens);
    // one line a peer and minute, not sixty
    let lines = worker.stderr().lines().filter(|l| l.starts_with("refused ")).count();
    assert!(lines <= 2, "{}", worker.stderr());
}

fn numbers_byte(state: &mut u64) -> u8 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    (*state >> 56) as u8
}

/// A weight that is no number, at the worker and at the host: the side and the block are named, and no token is made
/// of it.
#[test]
fn values_that_are_no_numbers_are_named_on_either_side() {
    let cut = Cut::tiny("qwen2");
    let broken = cut.folder.path().join("broken.gguf");
    let nan_in = |slice: &Path, name: &str| {
        common::tampered(slice, &broken, |tensor| {
            let mut bytes = tensor.data().unwrap().to_vec();
            if tensor.name() == name {
                assert_eq!(tensor.tensor_type(), TensorType::F16);
                bytes[100..102].copy_from_slice(&half::f16::NAN.to_le_bytes());
            }
            (tensor.tensor_type(), bytes)
        });
    };
    let options = ["-n", "4", "--temp", "0", "--verify", "never"];
    nan_in(&cut.slice(1), "blk.2.ffn_down.weight");
    let worker = Worker::start(&broken, &cut.key, &["--verify", "never"]);
    for wire in ["f16", "f32"] {
        for canary in [&[][..], &["--no-canary"]] {
            let mut command = cut.generate(&[&worker.address], &options);
            let says = failure(command.args(["--wire", wire]).args(canary), 1);
            assert!(says.contains(&worker.address) && says.contains("block 2"), "{says}");
            assert!(says.contains("not finite") && says.contains("hint: "), "{says}");
        }
    }
    // the worker lives on
    let right = cut.worker(1);
    nan_in(&cut.slice(0), "blk.0.ffn_down.weight");
    fs::rename(&broken, cut.slice(0)).unwrap();
    let says = failure(&mut cut.generate(&[&right.address], &options), 1);
    assert!(says.contains("head") && says.contains("block 0") && says.contains("not finite"), "{says}");
}

/// What a host asks for and a worker cannot compute is an error, not silence: the overflow of a boundary.
#[test]
fn a_value_that_f16_cannot_hold_is_named_and_f32_takes_it() {
    let cut = Cut::new(&Spec::tiny("qwen2").unwrap().with_type("f32").unwrap().gain(1.0e5), &["1..2"]);
    let worker = cut.worker(1);
    let rounded = ["-n", "2", "--temp", "0", "--wire", "f16"];
    let says = failure(&mut cut.generate(&[&worker.address], &rounded), 1);
    assert!(says.contains("block") && says.contains("65504"), "{says}");
    assert!(says.contains("--wire f32"), "{says}");
    let stock = report(&mut cut.stock(&["-n", "8", "--temp", "0"]));
    let split = report(&mut cut.generate(&[&worker.address], &["-n", "8", "--temp", "0", "--wire", "f32"]));
    assert_eq!(split.tokens, stock.tokens);
}
