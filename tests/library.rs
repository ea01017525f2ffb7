//! The library as another program uses it: hosts, sessions and workers in this process, and the two examples as their
//! reader runs them. What comes out is held against `WholeModel`, stock llama.cpp.

use std::any::Any;
use std::io::{BufRead as _, BufReader, Cursor, Write as _};
use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use dim::host::report::Stop;
use dim::host::saved::{SaveError, Saved};
use dim::{
    CallOff, Error, Event, Host, HostBuilder, Key, Resources, RowType, Sampling, Session, StopHandle,
    WholeModel, Worker,
};
use gguf_tools::gguf::Gguf;
use gguf_tools::plan::{Plan, Request};
use gguf_tools::split::split;
use gguf_tools::synth::Spec;

const PROMPT: &str = "The capital of France is";

/// One thread and a short context, as every test here has.
const SMALL: Resources =
    Resources { n_ctx: 256, n_threads: Some(1), n_ubatch: 512, gpu_layers: None, snapshots: 0 };

/// A model with random weights, cut in three, and a key.
struct Cut(tempfile::TempDir);

impl Cut {
    fn new() -> Cut {
        let cut = Cut(tempfile::tempdir().unwrap());
        Spec::tiny("qwen2").unwrap().write(cut.file("m.gguf")).unwrap();
        let model = Gguf::open(cut.file("m.gguf")).unwrap();
        let middles = vec!["1..2".parse().unwrap()];
        let request = Request { middles, stem: "m".into(), ..Request::default() };
        split(&Plan::new(&model, &request).unwrap(), cut.0.path(), "m", |_| {}).unwrap();
        std::fs::write(cut.file("key"), "5a".repeat(32)).unwrap();
        cut
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn key(&self) -> Key {
        Key::from_file(&self.file("key")).unwrap()
    }

    fn host(&self) -> HostBuilder {
        Host::open(self.file("m.split.json")).unwrap().resources(SMALL).wire(RowType::F32)
    }

    /// A worker for the middle in a thread of its own.
    fn worker(&self, listen: &str) -> Serving {
        self.worker_of(1, listen)
    }

    /// The same for as many sessions.
    fn worker_of(&self, sessions: u32, listen: &str) -> Serving {
        let worker = Worker::open(self.file("m.middle-1..2.gguf")).key(self.key()).resources(SMALL);
        Serving::start(worker.max_sessions(sessions).listen(listen).bind(|_| {}).unwrap())
    }

    /// What stock llama.cpp makes of the prompt.
    fn expected(&self, n: usize) -> Vec<i32> {
        let whole = WholeModel::open(&self.file("m.gguf"), &SMALL, true, |_| {}).unwrap();
        continued(&mut whole.session().unwrap(), n)
    }
}

struct Serving {
    address: String,
    stop: StopHandle,
    thread: Option<JoinHandle<()>>,
}

impl Serving {
    fn start(mut worker: Worker) -> Serving {
        let (address, stop) = (worker.address().to_string(), worker.stop_handle());
        let thread = std::thread::spawn(move || worker.serve().unwrap());
        Serving { address, stop, thread: Some(thread) }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the worker panicked");
        }
    }
}

/// The `n` tokens after the prompt.
fn continued(session: &mut Session, n: usize) -> Vec<i32> {
    session.push_text(PROMPT).unwrap();
    let tokens = session.generate(Sampling::greedy()).take(n);
    tokens.map(|token| token.unwrap().id).collect()
}

#[test]
fn a_session_gives_what_stock_llama_cpp_gives_and_goes_on_where_it_stopped() {
    let cut = Cut::new();
    let expected = cut.expected(24);
    let host = cut.host().connect(|_| {}).unwrap();
    let mut session = host.session().unwrap();
    let mut got = continued(&mut session, 10);
    got.extend(session.generate(Sampling::greedy()).limit(Some(14)).map(|token| token.unwrap().id));
    assert_eq!(got, expected);
    assert!(session.tokens().ends_with(&expected));
    drop(session);
    // the next session begins from nothing
    assert_eq!(continued(&mut host.session().unwrap(), 24), expected);
}

#[test]
fn what_two_prompts_have_in_common_is_evaluated_once() {
    let cut = Cut::new();
    let host = cut.host().connect(|_| {}).unwrap();
    let mut session = host.session().unwrap();
    let begun = std::time::Instant::now();
    let mut tokens = session.tokenize(PROMPT, true).unwrap();
    let mut turn = |tokens: &[i32]| {
        session.set_tokens(tokens).unwrap();
        let mut reply = session.generate(Sampling::greedy()).limit(Some(3));
        let ids: Vec<i32> = reply.by_ref().map(|token| token.unwrap().id).collect();
        (reply.report(begun).prompt_tokens, ids)
    };
    let (evaluated, first) = turn(&tokens);
    assert_eq!(evaluated, tokens.len());
    // the same again: one token, for its logits
    assert_eq!(turn(&tokens), (1, first.clone()));
    // the reply's last token was chosen and not evaluated
    let extended: Vec<i32> = [&tokens[..], &first[..], &tokens[..2]].concat();
    assert_eq!(turn(&extended).0, 3);
    // another one from its third token on
    let other = tokens[2] + 1;
    tokens[2] = other;
    assert_eq!(turn(&tokens).0, tokens.len() - 2);
}

#[test]
fn a_reply_ends_where_it_is_told_to_and_says_why() {
    let cut = Cut::new();
    let host = cut.host().connect(|_| {}).unwrap();
    let begun = std::time::Instant::now();
    let end = |limit: Option<usize>, flag: bool| {
        let mut session = host.session().unwrap();
        session.push_text(PROMPT).unwrap();
        let n_prompt = session.tokens().len();
        let flag = AtomicBool::new(flag);
        let reply = session.generate(Sampling::greedy()).ignore_eos(true).limit(limit);
        let mut reply = reply.stop_when(&flag);
        let texts: String = reply.by_ref().map(|token| token.unwrap().text).collect();
        assert!(reply.next().is_none());
        let report = reply.report(begun);
        assert_eq!(report.text, texts);
        (report.stop, report.tokens.len(), n_prompt)
    };
    assert!(matches!(end(Some(0), false), (Stop::Length, 0, _)));
    assert!(matches!(end(Some(5), false), (Stop::Length, 5, _)));
    assert!(matches!(end(None, true), (Stop::Interrupted, 0, _)));
    let (stop, n, n_prompt) = end(None, false);
    // the last one is chosen, and there is no position left to evaluate it at
    assert_eq!((stop, n_prompt + n), (Stop::ContextFull, 257));
}

#[test]
fn errors_say_whose_they_are_and_leave_the_session_as_it_was() {
    let cut = Cut::new();
    let host = cut.host().connect(|_| {}).unwrap();
    let mut session = host.session().unwrap();

    let empty = session.generate(Sampling::greedy()).next().unwrap().unwrap_err();
    assert!(matches!(empty, Error::EmptyPrompt) && empty.is_misuse() && empty.hint().is_some());
    let long = session.push_tokens(&[1; 300]).unwrap_err();
    assert!(matches!(long, Error::PromptTooLong { n_tokens: 300, n_ctx: 256 }), "{long}");
    assert!(long.hint().is_some_and(|hint| hint.contains("a context of 512")), "{long}");
    let n_vocab = i32::try_from(host.vocabulary().n_vocab()).unwrap();
    for token in [-1, i32::MIN, i32::MAX, n_vocab] {
        let pushed = session.push_tokens(&[1, token]).unwrap_err();
        assert!(matches!(pushed, Error::NoSuchToken { token: t, .. } if t == token), "{pushed}");
        assert!(pushed.is_misuse() && pushed.hint().is_some());
        assert!(session.set_tokens(&[token]).is_err() && session.logits_of(&[token], &mut |_| {}).is_err());
    }
    assert!(session.tokens().is_empty());
    session.push_text(PROMPT).unwrap();
    let bad = Sampling { top_p: 2.0, ..Sampling::default() };
    let mut reply = session.generate(bad);
    assert!(matches!(reply.next(), Some(Err(Error::Option(e))) if e.option == "top_p"));
    assert!(reply.next().is_none());
    let reply: Vec<_> = session.generate(Sampling::greedy()).take(8).map(|token| token.unwrap().id).collect();
    assert_eq!(reply, cut.expected(8));

    let nowhere = cut.host().worker("127.0.0.1:1", cut.key());
    let patience = dim::Patience { give_up_after: Duration::ZERO, ..Default::default() };
    let Err(error) = nowhere.patience(patience).connect(|_| {}) else { panic!("nobody is there") };
    assert!(matches!(error, Error::Link(_)) && !error.is_misuse() && error.hint().is_some(), "{error}");
    // a worker that was there when it was dialled and is not when it is asked what is known
    let source = dim_core::stage::StageError::lost("gone");
    let error = Error::Check { stage: "middle".to_owned(), source };
    assert!(
        !error.is_misuse() && error.hint().is_some_and(|hint| hint.contains("start it again")),
        "{error}"
    );
    let Err(error) = Worker::open(cut.file("m.head.gguf")).key(cut.key()).bind(|_| {}) else {
        panic!("a head is no middle")
    };
    assert!(matches!(error, Error::NotAMiddle { .. }) && error.is_misuse(), "{error}");
}

#[test]
fn options_out_of_range_are_refused_by_name_before_anything_is_opened() {
    let cut = Cut::new();
    let option = |error: Error| match error {
        Error::Option(bad) => bad.option,
        other => panic!("{other}"),
    };
    let resources: [(Resources, &str); 5] = [
        (Resources { n_ctx: (1 << 22) + 1, ..SMALL }, "n_ctx"),
        (Resources { n_ubatch: 0, ..SMALL }, "n_ubatch"),
        (Resources { n_threads: Some(0), ..SMALL }, "n_threads"),
        (Resources { n_threads: Some(513), ..SMALL }, "n_threads"),
        (Resources { gpu_layers: Some(u32::MAX), ..SMALL }, "gpu_layers"),
    ];
    let worker = || Worker::open(cut.file("m.middle-1..2.gguf")).key(cut.key()).listen("127.0.0.1:0");
    for (resources, name) in resources {
        assert_eq!(option(cut.host().resources(resources).connect(|_| {}).err().unwrap()), name);
        assert_eq!(option(worker().resources(resources).bind(|_| {}).err().unwrap()), name);
        let whole = WholeModel::open(&cut.file("m.gguf"), &resources, true, |_| {});
        assert_eq!(option(whole.err().unwrap()), name);
    }
    for n in [0, 65, u32::MAX] {
        assert_eq!(option(cut.host().sessions(n).connect(|_| {}).err().unwrap()), "sessions");
        assert_eq!(option(worker().max_sessions(n).bind(|_| {}).err().unwrap()), "max_sessions");
    }
    let without = cut.host().worker_with_one_of("127.0.0.1:1", Vec::new()).connect(|_| {});
    assert!(matches!(without.err().unwrap(), Error::NoKey { address, .. } if address == "127.0.0.1:1"));
}

/// Whoever is lost is waited for without an end.
fn endless() -> dim::Patience {
    let ever = Duration::MAX;
    dim::Patience { give_up_after: ever, paused_for: ever, longest_pause: ever, ..Default::default() }
}

#[test]
fn times_without_an_end_are_waited_for_and_end_when_somebody_has_had_enough() {
    let cut = Cut::new();
    let patience = endless();
    let worker = cut.worker("127.0.0.1:0");
    let is_lost = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&is_lost);
    let host = cut.host().worker(&worker.address, cut.key()).patience(patience).step_timeout(Duration::MAX);
    let host = host.connect(move |event| told.store(matches!(event, Event::Lost { .. }), Ordering::SeqCst));
    let mut session = host.unwrap().session().unwrap();
    let got = continued(&mut session, 4);
    assert_eq!(got, cut.expected(4));
    drop(worker);
    let mut reply = session.generate(Sampling::greedy()).stop_when(&is_lost);
    assert!(reply.next().is_none());
    assert_eq!(reply.report(std::time::Instant::now()).stop, Stop::Interrupted);
}

/// What hears of a host's events runs where its sessions are driven.
#[test]
fn a_session_that_is_waited_for_in_an_event_of_its_host_is_an_error_and_not_for_ever() {
    let cut = Cut::new();
    let worker = cut.worker_of(3, "127.0.0.1:0");
    let other = Arc::new(Mutex::new(None::<Session>));
    let heard = Arc::new(Mutex::new(None));
    let enough = Arc::new(AtomicBool::new(false));
    let (within, told, stop) = (Arc::clone(&other), Arc::clone(&heard), Arc::clone(&enough));
    let host = cut.host().worker(&worker.address, cut.key()).sessions(2).connect(move |event| {
        if let (Event::Lost { .. }, Some(mut session)) = (event, within.lock().unwrap().take()) {
            *told.lock().unwrap() = session.generate(Sampling::greedy()).next();
            stop.store(true, Ordering::SeqCst);
        }
    });
    let host = host.unwrap();
    let mut session = host.session().unwrap();
    let mut second = host.session().unwrap();
    second.push_text(PROMPT).unwrap();
    *other.lock().unwrap() = Some(second);
    continued(&mut session, 4);
    drop(worker);
    assert!(session.generate(Sampling::greedy()).stop_when(&enough).next().is_none());
    let error = heard.lock().unwrap().take().unwrap().unwrap_err();
    assert!(error.is_misuse() && error.hint().is_some(), "{error}");
    assert!(error.to_string().contains("cannot wait for a session"), "{error}");
}

/// Whatever `connect` is at: the one who waits for it is not kept waiting.
#[test]
fn connecting_is_called_off_while_it_waits_dials_compares_and_loads() {
    let cut = Cut::new();
    let patience = endless();
    let called_off = |host: HostBuilder, off: CallOff, at: fn(&Event) -> bool| {
        let (called, seen) = (off.clone(), Arc::new(AtomicBool::new(false)));
        let told = Arc::clone(&seen);
        let host = host.patience(patience).unless(off).connect(move |event| {
            if at(&event) {
                told.store(true, Ordering::SeqCst);
                called.call_off();
            }
        });
        let Err(error) = host else { panic!("it was called off") };
        assert!(matches!(error, Error::CalledOff) && !error.is_misuse(), "{error}");
        seen.load(Ordering::SeqCst)
    };
    // nobody is there, and it would be waited for without an end
    let nobody = cut.host().worker("127.0.0.1:1", cut.key());
    assert!(called_off(nobody, CallOff::new(), |event| matches!(event, Event::Retrying { .. })));
    // weights that are compared with their digests, and loaded
    let compared = cut.host().verify(dim::Verify::Always);
    assert!(called_off(compared, CallOff::new(), |event| matches!(event, Event::Checking { .. })));
    assert!(called_off(cut.host(), CallOff::new(), |event| matches!(event, Event::Loading { .. })));
    // somebody who says nothing; only another thread can call that off
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let off = CallOff::new();
    let calls = off.clone();
    let address = silent.local_addr().unwrap().to_string();
    let thread = std::thread::spawn(move || {
        let peer = silent.accept().unwrap();
        calls.call_off();
        peer
    });
    assert!(!called_off(cut.host().worker(address, cut.key()), off, |_| false));
    thread.join().unwrap();
    // one that was called off before it began; of a host that is connected it ends nothing
    let off = CallOff::new();
    let host = cut.host().unless(off.clone()).connect(|_| {}).unwrap();
    off.call_off();
    assert_eq!(continued(&mut host.session().unwrap(), 4), cut.expected(4));
    assert!(!called_off(cut.host(), off, |_| false));
}

/// It is the caller's own closure: the panic is his, and nothing of the library's is harmed by it.
#[test]
fn a_panic_of_whoever_hears_of_events_goes_to_the_caller_and_host_and_sessions_stay_whole() {
    let cut = Cut::new();
    let panic_of = |panic: Box<dyn Any + Send>| *panic.downcast::<&str>().unwrap();
    // while it connects
    let host = cut.host();
    let connected = catch_unwind(AssertUnwindSafe(|| {
        host.connect(|event| {
            if matches!(event, Event::Loading { .. }) {
                panic!("while it loads")
            }
        })
    }));
    assert_eq!(panic_of(connected.err().unwrap()), "while it loads");

    // in a reply whose worker is lost, while another session lives beside it
    let worker = cut.worker_of(3, "127.0.0.1:0");
    let address = worker.address.clone();
    let n_told = Arc::new(AtomicUsize::new(0));
    let told = Arc::clone(&n_told);
    let host = cut.host().worker(&address, cut.key()).sessions(2).connect(move |event| {
        if matches!(event, Event::Lost { .. } | Event::Back { .. }) {
            told.fetch_add(1, Ordering::SeqCst);
            panic!("in a reply");
        }
    });
    let host = host.unwrap();
    let expected = cut.expected(24);
    let (mut session, mut other) = (host.session().unwrap(), host.session().unwrap());
    let mut got = continued(&mut session, 4);
    let mut others = continued(&mut other, 4);
    drop(worker);
    let _again = cut.worker_of(3, &address);
    let mut reply = session.generate(Sampling::greedy());
    let panic = catch_unwind(AssertUnwindSafe(|| reply.next()));
    assert_eq!(panic_of(panic.err().unwrap()), "in a reply");
    drop(reply);
    // both go on from the tokens they have, and nobody is told any more
    got.extend(session.generate(Sampling::greedy()).take(20).map(|token| token.unwrap().id));
    others.extend(other.generate(Sampling::greedy()).take(20).map(|token| token.unwrap().id));
    assert_eq!((got, others), (expected.clone(), expected));
    assert_eq!(n_told.load(Ordering::SeqCst), 1);
}

#[test]
fn a_worker_that_comes_back_changes_no_token_and_its_absence_is_told() {
    let cut = Cut::new();
    let expected = cut.expected(24);
    let worker = cut.worker("127.0.0.1:0");
    let address = worker.address.clone();
    let events = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&events);
    let host = cut.host().worker(&address, cut.key());
    let host = host.connect(move |event| told.lock().unwrap().push(event)).unwrap();
    let mut session = host.session().unwrap();

    let mut got = continued(&mut session, 10);
    drop(worker);
    let _again = cut.worker(&address);
    got.extend(session.generate(Sampling::greedy()).take(14).map(|token| token.unwrap().id));
    assert_eq!(got, expected);

    let events = events.lock().unwrap();
    let is_middle = |stage: &str| stage.contains(&address);
    let ready = events.iter().find_map(|e| match e {
        Event::Ready { stages, n_blocks } => Some((stages, *n_blocks)),
        _ => None,
    });
    let (stages, n_blocks) = ready.expect("it was told to be ready");
    assert_eq!(stages.iter().map(|s| s.blocks.count()).sum::<u32>(), n_blocks);
    assert_eq!(stages[1].worker.as_ref(), Some(&address));
    let of_loss: Vec<&str> = events
        .iter()
        .filter_map(|event| match event {
            Event::Lost { stage, .. } if is_middle(stage) => Some("lost"),
            Event::Replaying { stage, .. } if is_middle(stage) => Some("replaying"),
            Event::Back { stage, .. } if is_middle(stage) => Some("back"),
            _ => None,
        })
        .collect();
    assert_eq!(of_loss, ["lost", "replaying", "back"]);
}

#[test]
fn a_worker_is_stopped_while_nobody_is_there() {
    let cut = Cut::new();
    let events = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&events);
    let worker = Worker::open(cut.file("m.middle-1..2.gguf")).key(cut.key()).resources(SMALL);
    let mut worker = worker
        .listen("127.0.0.1:0")
        .bind(move |event| {
            if matches!(event, Event::Serving { .. }) {
                told.store(true, Ordering::SeqCst);
            }
        })
        .unwrap();
    let stop = worker.stop_handle();
    let thread = std::thread::spawn(move || worker.serve());
    stop.stop();
    assert!(thread.join().unwrap().is_ok());
    assert!(!events.load(Ordering::SeqCst));
}

/// The logits that each of the next `n` tokens is chosen from.
fn logits(session: &mut Session, n: usize) -> Vec<u32> {
    let mut generation = session.generate(Sampling::greedy()).ignore_eos(true);
    let mut bits = Vec::new();
    for _ in 0..n {
        generation.next().unwrap().unwrap();
        bits.extend(generation.logits().iter().map(|logit| logit.to_bits()));
    }
    bits
}

#[test]
fn a_session_that_was_saved_goes_on_in_another_host_with_the_same_bits() {
    let cut = Cut::new();
    let small = Resources { n_ubatch: 16, ..SMALL };
    // over a worker, and with the middle here
    for is_away in [true, false] {
        let worker = cut.worker("127.0.0.1:0");
        let host = |worker: &Serving| {
            let host = cut.host().resources(small);
            match is_away {
                true => host.worker(&worker.address, cut.key()).connect(|_| {}).unwrap(),
                false => host.connect(|_| {}).unwrap(),
            }
        };
        let before = host(&worker);
        let mut session = before.session().unwrap();
        assert!(matches!(session.save(&mut Vec::new()), Err(SaveError::Nothing)));
        session.push_text(&PROMPT.repeat(6)).unwrap();
        let n_prompt = session.tokens().len();
        assert!(n_prompt > 32, "more than two chunks");
        logits(&mut session, 5);
        // chunks, one by one, and a chunk of which a part does not count
        let mut tokens = session.tokens()[..n_prompt + 3].to_vec();
        tokens.extend(session.tokenize("and then there were more", false).unwrap());
        session.set_tokens(&tokens).unwrap();
        logits(&mut session, 1);
        tokens.truncate(n_prompt + 6);
        tokens.push(tokens[3]);
        session.set_tokens(&tokens).unwrap();
        logits(&mut session, 2);
        let mut bytes = Vec::new();
        let saved = session.save(&mut bytes).unwrap();
        assert_eq!(saved.tokens(), session.evaluated());
        // chosen and not evaluated yet, so no part of it
        let pending = session.tokens()[saved.tokens().len()..].to_vec();
        let expected = logits(&mut session, 6);
        let as_it_was = before.saves_as().unwrap();
        drop((session, before, worker));

        // another worker, too, which knows nothing
        let worker = cut.worker("127.0.0.1:0");
        let after = host(&worker);
        assert_eq!(after.saves_as(), Some(as_it_was));
        let mut session = after.session().unwrap();
        session.push_text("something else").unwrap();
        logits(&mut session, 2);
        let saved = Saved::read(&mut Cursor::new(&bytes), &after).unwrap();
        let all = saved.steps().len();
        session.restore(&saved, &mut Cursor::new(&bytes), all, None).unwrap();
        assert_eq!(session.evaluated(), saved.tokens());
        session.push_tokens(&pending).unwrap();
        assert_eq!(logits(&mut session, 6), expected, "away: {is_away}");
    }
}

/// An example of this package: `cargo test` builds them beside the tests.
fn example(name: &str) -> Command {
    let here = std::env::current_exe().unwrap();
    let target = here.parent().and_then(|deps| deps.parent()).unwrap();
    let path: PathBuf = target.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(path.is_file(), "{} is missing: cargo build --release --examples", path.display());
    Command::new(path)
}

#[test]
fn the_examples_continue_a_text_over_a_worker_inside_another_program() {
    let cut = Cut::new();
    let mut worker = example("worker");
    worker.arg(cut.file("m.middle-1..2.gguf")).arg(cut.file("key"));
    let mut worker = worker.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(worker.stdout.take().unwrap()).lines().map_while(Result::ok);
    let first = said.next().unwrap_or_default();
    let address = first.strip_prefix("listening on ").expect("the worker says where it listens").to_owned();

    let generate = |more: &[&str]| {
        let mut command = example("generate");
        let output = command.arg(cut.file("m.split.json")).arg(PROMPT).args(more).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{stderr}");
        (String::from_utf8(output.stdout).unwrap(), stderr)
    };
    let key = cut.file("key").display().to_string();
    let (remote, told) = generate(&[&address, &key]);
    assert!(told.contains(&format!("blocks 1..2 {address}")), "{told}");
    // the same text as without a worker
    let (local, told) = generate(&[]);
    assert!(told.contains("blocks 1..2 here"), "{told}");
    assert_eq!(remote, local);
    assert!(remote.trim().chars().count() > 16, "{remote:?}");

    // the program around the worker has gone on with its own work, and ends with its input
    let mut stdin = worker.stdin.take().unwrap();
    writeln!(stdin, "hello").unwrap();
    drop(stdin);
    assert_eq!(said.collect::<Vec<_>>(), ["you said: hello", "hosts served: 1"]);
    assert!(worker.wait().unwrap().success());
}
