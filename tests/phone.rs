//! What a phone says while it serves (docs/PROTOCOL.md, sections 5.7 and 5.8), and what `dim-host` makes of it: each
//! its own sentence, and a reply that waits and goes on.
//!
//! The worker runs in this process, with a real stage, so that it can be made to say these things in the middle of a
//! reply.

mod common;

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Cut, Numbers, failure, report, text};
use dim::Resources;
use dim::host::report::Report;
use dim::stage::load::{LoadOptions, load_stage};
use dim::stage::verified::{Verify, open_slice};
use dim_wire::keys::Key;
use dim_wire::message::{ErrorCode, Farewell, Fault};
use dim_wire::rows::{RowTypes, Shape};
use dim_wire::terms::{Reason, SliceRole, Terms};
use dim_wire::transport::{Listener, ListenerConfig, Readiness, Sender, Timing};

const OPTIONS: [&str; 6] = ["-n", "200", "--temp", "0", "--ubatch", "48"];

/// A phone: serves until told otherwise.
struct Phone {
    address: String,
    terms: Terms,
    key: Key,
    listener: Mutex<Option<Arc<Listener>>>,
    serving: Arc<Mutex<Option<Sender>>>,
    served: Arc<AtomicU32>,
    slice: std::path::PathBuf,
}

impl Phone {
    fn new(cut: &Cut) -> Phone {
        let slice = cut.slice(1);
        let info = open_slice(&slice, Verify::Never, |_, _| {}).unwrap();
        let terms = Terms {
            row_types: RowTypes::ALL,
            role: SliceRole::Middle,
            instance: 7,
            shape: Shape::hidden(info.hparams.n_embd),
            n_blocks: info.model_blocks,
            blocks: info.blocks,
            n_ctx: 512,
            max_rows: 512,
            max_sessions: 1,
            max_in_flight: 4,
            model: Some(info.model_sha256),
            slice: Some(info.slice_sha256),
            arch: info.hparams.arch.clone(),
            ..Terms::blank(0, "test 0", "Anna's iPhone")
        };
        Phone {
            address: "127.0.0.1:0".to_owned(),
            terms,
            key: Key::from_file(&cut.key).unwrap(),
            listener: Mutex::new(None),
            serving: Arc::default(),
            served: Arc::default(),
            slice,
        }
    }

    fn open(&mut self, readiness: Readiness) {
        let config = || ListenerConfig {
            keys: Arc::new(self.key.clone()),
            readiness: readiness.clone(),
            timing: Timing::default(),
            notice: Box::new(|_| {}),
        };
        // the listener that was closed before gives its port back when its thread has ended
        let bound = (0..500).find_map(|_| {
            Listener::bind(&self.address, config())
                .inspect_err(|_| std::thread::sleep(Duration::from_millis(10)))
                .ok()
        });
        let listener = Arc::new(bound.expect("the port is free again"));
        self.address = listener.address().to_string();
        *self.listener.lock().unwrap() = Some(listener.clone());
        let info = open_slice(&self.slice, Verify::Never, |_, _| {}).unwrap();
        let resources = Resources { n_ctx: 512, n_threads: Some(1), ..Resources::default() };
        let options = LoadOptions { resources, mmap: false, max_sessions: 1, compute_bytes: None };
        let (serving, served, slice) = (self.serving.clone(), self.served.clone(), self.slice.clone());
        std::thread::spawn(move || {
            let mut stage = load_stage(&slice, &info, &options, |_| {}).unwrap();
            while let Some(link) = listener.accept(None) {
                *serving.lock().unwrap() = Some(link.sender().clone());
                served.fetch_add(1, Ordering::SeqCst);
                dim::worker::serve(&mut stage, link);
            }
        });
    }

    fn ready(&mut self) {
        self.open(Readiness::Ready(self.terms.clone()));
    }

    /// Waits until the host being served has had at least `answers` of its own.
    fn after(&self, answers: u64) -> Sender {
        loop {
            if let Some(sender) = self.serving.lock().unwrap().clone()
                && sender.traffic().round_trips >= answers
            {
                return sender;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The screen is locked: a farewell, and nobody listens any more.
    fn lock(&self) {
        self.serving.lock().unwrap().take();
        if let Some(listener) = self.listener.lock().unwrap().take() {
            listener.close(Farewell::Pausing);
        }
    }
}

impl Drop for Phone {
    fn drop(&mut self) {
        self.lock();
    }
}

fn spawn(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn finish(host: Child) -> (Report, String) {
    let output = host.wait_with_output().unwrap();
    let stderr = text(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    (serde_json::from_slice(&output.stdout).unwrap(), stderr)
}

#[test]
fn a_reply_waits_for_a_locked_phone_longer_than_for_a_lost_one_and_goes_on() {
    let cut = Cut::tiny("qwen2");
    let mut phone = Phone::new(&cut);
    phone.ready();
    let generate = |phone: &Phone, more: &[&str]| {
        let mut command = cut.generate(&[&phone.address], &OPTIONS);
        command.args(more);
        command
    };
    let whole = report(&mut generate(&phone, &[]));
    assert_eq!(whole.tokens.len(), 200);
    let mut numbers = Numbers(3);
    for _ in 0..5 {
        phone.serving.lock().unwrap().take();
        // away for longer than a lost worker would be looked for
        let host = spawn(&mut generate(&phone, &["--give-up-after", "1", "--wait-paused", "60"]));
        phone.after(5 + numbers.below(100));
        phone.lock();
        std::thread::sleep(Duration::from_millis(2500));
        phone.ready();
        let (got, says) = finish(host);
        assert_eq!(got.tokens, whole.tokens);
        assert_eq!(got.stages[1].reconnects, 1, "{says}");
        for part in ["Anna's iPhone", "is paused; unlock the phone", "up to 60 s", "is back"] {
            assert!(says.contains(part), "no {part:?} in {says}");
        }
        assert!(!says.contains("looking for it for up to 1 s"), "{says}");
    }
    // the longer patience is what did it
    phone.serving.lock().unwrap().take();
    let host = spawn(&mut generate(&phone, &["--give-up-after", "1", "--wait-paused", "1"]));
    phone.after(5);
    phone.lock();
    let output = host.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("is gone"), "{}", text(&output.stderr));
}

#[test]
fn a_phone_that_is_too_hot_is_waited_for_and_one_without_memory_or_sense_is_not() {
    let cut = Cut::tiny("llama");
    let mut phone = Phone::new(&cut);
    phone.ready();
    let generate = |phone: &Phone| {
        let mut command = cut.generate(&[&phone.address], &OPTIONS);
        command.args(["--give-up-after", "1", "--wait-paused", "60"]);
        command
    };
    let whole = report(&mut generate(&phone));

    phone.serving.lock().unwrap().take();
    let host = spawn(&mut generate(&phone));
    let sender = phone.after(20);
    sender.fail(Fault::new(ErrorCode::TooHot, "Anna's iPhone is too hot: it stopped to cool down"));
    let (got, says) = finish(host);
    assert_eq!(got.tokens, whole.tokens);
    for part in ["too hot", "off the charger", "the reply waits for it, up to 60 s", "is back"] {
        assert!(says.contains(part), "no {part:?} in {says}");
    }

    for (code, said, wanted) in [
        (
            ErrorCode::NoMemory,
            "iOS asks for memory back",
            ["out of memory", "close other apps", "fewer blocks"],
        ),
        (
            ErrorCode::SelfTest,
            "no compute unit passes the self-test",
            ["no compute unit passes", "wrong values with this slice", "push it again"],
        ),
    ] {
        phone.serving.lock().unwrap().take();
        let host = spawn(&mut generate(&phone));
        let sender = phone.after(20);
        sender.fail(Fault::new(code, said));
        let output = host.wait_with_output().unwrap();
        let says = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{says}");
        for part in wanted.iter().chain(&["Anna's iPhone", said]) {
            assert!(says.contains(part), "no {part:?} in {says}");
        }
    }
}

#[test]
fn a_phone_that_cannot_serve_from_the_beginning_says_why() {
    let cut = Cut::tiny("qwen2");
    let mut phone = Phone::new(&cut);
    let text = "it needs 900 MiB, 300 are free".to_owned();
    phone.open(Readiness::NotReady(phone.terms.clone(), Reason::NoMemory, text));
    let says = failure(&mut cut.generate(&[&phone.address], &OPTIONS), 1);
    assert!(says.contains("300 are free") && says.contains("close other apps"), "{says}");
    phone.lock();

    // still testing its packages: it is waited for
    let text = "testing its packages".to_owned();
    phone.open(Readiness::NotReady(phone.terms.clone(), Reason::NotReady, text));
    let host = spawn(&mut cut.generate(&[&phone.address], &OPTIONS));
    std::thread::sleep(Duration::from_millis(700));
    let listener = phone.listener.lock().unwrap().clone().unwrap();
    listener.set_readiness(Readiness::Ready(phone.terms.clone()));
    let (got, says) = finish(host);
    assert_eq!(got.tokens.len(), 200);
    assert!(says.contains("testing its packages"), "{says}");
}

/// On macOS this is what a program hears that may not use the local network.
#[test]
fn no_way_to_a_worker_names_the_setting_of_the_mac() {
    let cut = Cut::tiny("qwen2");
    // the limited broadcast address: a system refuses to connect to it, at once
    let says = failure(cut.generate(&["255.255.255.255:7878"], &OPTIONS).args(["--give-up-after", "0"]), 1);
    assert!(says.contains("System Settings > Privacy & Security > Local Network"), "{says}");
}
