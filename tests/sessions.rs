//! Several sessions of one host at once, from several threads, over workers that are processes: each gets what it gets
//! alone, whatever happens to the others and to the worker.

mod common;

use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use common::{Cut, PROMPT, Worker};
use dim::host::report::Stop;
use dim::stage::load::{LoadOptions, load_stage};
use dim::{Error, Event, Host, HostBuilder, Key, Patience, Resources, RowType, Sampling, Session};
use dim_core::ids::{SessionId, StageId};
use dim_core::pipeline::{Advance, Pipeline, StageSlot, Step};
use dim_core::schedule::StepKind;
use dim_core::trace::Happened;
use gguf_tools::slice::SliceInfo;
use llama_sys_patch::{ContextParams, Model, ModelParams, Row, Stock};

/// Small chunks: the prompts are several steps each, and their steps take turns.
const SMALL: Resources =
    Resources { n_ctx: 512, n_threads: Some(1), n_ubatch: 16, gpu_layers: None, snapshots: 0 };
/// What each of three conversations begins with.
const BEGINNINGS: [usize; 3] = [0, 90, 200];
const N: usize = 48;

fn host(cut: &Cut, address: &str, sessions: u32) -> HostBuilder {
    let key = Key::from_file(&cut.key).unwrap();
    let host = Host::open(&cut.split).unwrap().resources(SMALL).wire(RowType::F32);
    host.worker(address, key).sessions(sessions)
}

fn begin(session: &mut Session, i: usize) {
    session.push_text(&PROMPT[BEGINNINGS[i]..]).unwrap();
}

/// The next `n` tokens.
fn go_on(session: &mut Session, n: usize) -> Vec<i32> {
    let tokens = session.generate(Sampling::greedy()).ignore_eos(true).limit(Some(n));
    tokens.map(|token| token.unwrap().id).collect()
}

/// What each conversation gives alone, on a host of its own.
fn alone(cut: &Cut) -> Vec<Vec<i32>> {
    let worker = cut.worker(1);
    let each = |i| {
        let host = host(cut, &worker.address, 1).connect(|_| {}).unwrap();
        let mut session = host.session().unwrap();
        begin(&mut session, i);
        go_on(&mut session, N)
    };
    (0..3).map(each).collect()
}

fn parallel(cut: &Cut, listen: &str, n: &str) -> Worker {
    Worker::start_at(listen, &cut.slice(1), &cut.key, &["--parallel", n])
}

#[test]
fn three_sessions_from_three_threads_give_what_each_gives_alone() {
    for arch in ["qwen2", "llama"] {
        let cut = Cut::tiny(arch);
        let expected = alone(&cut);
        assert!(expected[0] != expected[1] && expected[1] != expected[2], "three texts, three replies");
        // with and without a session to spare for the canary
        for n in ["3", "4"] {
            let worker = parallel(&cut, "127.0.0.1:0", n);
            let host = host(&cut, &worker.address, 3).connect(|_| {}).unwrap();
            std::thread::scope(|scope| {
                for (i, expected) in expected.iter().enumerate() {
                    let host = &host;
                    scope.spawn(move || {
                        let mut session = host.session().unwrap();
                        begin(&mut session, i);
                        let mut got = go_on(&mut session, N / 2);
                        got.extend(go_on(&mut session, N - N / 2));
                        assert_eq!(&got, expected, "{arch}, session {i}");
                    });
                }
            });
        }
    }
}

#[test]
fn one_that_is_dropped_and_one_that_fails_are_no_harm_to_the_others() {
    let cut = Cut::tiny("qwen2");
    let expected = alone(&cut);
    let worker = parallel(&cut, "127.0.0.1:0", "4");
    let host = host(&cut, &worker.address, 4).connect(|_| {}).unwrap();
    std::thread::scope(|scope| {
        let (host, expected) = (&host, &expected);
        // goes on all the time
        scope.spawn(move || {
            let mut session = host.session().unwrap();
            begin(&mut session, 0);
            assert_eq!(go_on(&mut session, N), expected[0]);
        });
        // is dropped in the middle of a reply, begins anew, and is dropped again
        scope.spawn(move || {
            for n in [1, 5, 9, N] {
                let mut session = host.session().unwrap();
                begin(&mut session, 1);
                assert_eq!(go_on(&mut session, n), expected[1][..n]);
            }
        });
        // fills its context, says so, and cannot take more
        scope.spawn(move || {
            let mut session = host.session().unwrap();
            let n_ctx = session.n_ctx() as usize;
            session.push_tokens(&vec![7; n_ctx - 3]).unwrap();
            let mut reply = session.generate(Sampling::greedy()).ignore_eos(true);
            let reply_tokens: Vec<i32> = reply.by_ref().map(|token| token.unwrap().id).collect();
            assert_eq!(reply_tokens.len(), 4);
            assert_eq!(reply.report(std::time::Instant::now()).stop, Stop::ContextFull);
            let full = session.push_tokens(&[7]).unwrap_err();
            assert!(matches!(full, Error::PromptTooLong { .. }), "{full}");
            // the reply's last token has no position: the session is what it was when that was chosen, and chooses it again
            let last = *reply_tokens.last().unwrap();
            let held = session.tokens().to_vec();
            assert_eq!(held.len(), n_ctx);
            session.set_tokens(&held).unwrap();
            let mut reply = session.generate(Sampling::greedy()).ignore_eos(true);
            let again: Vec<i32> = reply.by_ref().map(|token| token.unwrap().id).collect();
            assert_eq!(
                (again, reply.report(std::time::Instant::now()).stop),
                (vec![last], Stop::ContextFull)
            );
        });
        // panics in the middle of what it is given
        let panics = scope.spawn(move || {
            let mut session = host.session().unwrap();
            let _ = session.logits_of(&[5; 100], &mut |_| panic!("the caller's own"));
        });
        assert!(panics.join().is_err());
    });
    // and every one of the four places is free again, and empty
    let mut sessions: Vec<Session> = (0..4).map(|_| host.session().unwrap()).collect();
    for session in &mut sessions {
        begin(session, 2);
        assert_eq!(go_on(session, 8), expected[2][..8]);
    }
}

#[test]
fn a_worker_killed_in_the_middle_changes_no_token_of_any_session() {
    let cut = Cut::tiny("qwen2");
    let expected = alone(&cut);
    // it comes back with a session to spare, without, and with one again
    let mut worker = parallel(&cut, "127.0.0.1:0", "4");
    let address = worker.address.clone();
    let lost = Arc::new(Mutex::new(0));
    let told = Arc::clone(&lost);
    let on_event = move |event| *told.lock().unwrap() += usize::from(matches!(event, Event::Lost { .. }));
    let host = host(&cut, &address, 3).connect(on_event).unwrap();
    for n in ["3", "4", "3"] {
        std::thread::scope(|scope| {
            for (i, expected) in expected.iter().enumerate() {
                let host = &host;
                scope.spawn(move || {
                    let mut session = host.session().unwrap();
                    begin(&mut session, i);
                    let got: Vec<i32> = (0..N).flat_map(|_| go_on(&mut session, 1)).collect();
                    assert_eq!(&got, expected, "session {i}, then --parallel {n}");
                });
            }
            std::thread::sleep(Duration::from_millis(60));
            worker.kill();
            worker = parallel(&cut, &address, n);
        });
    }
    assert!(*lost.lock().unwrap() > 0, "it was never noticed");
}

/// A conversation alone has a session to spare at its worker, and goes on without it when the worker comes back so.
#[test]
fn a_worker_that_comes_back_with_fewer_sessions_is_used_without_the_spare_one() {
    let cut = Cut::tiny("qwen2");
    let expected = alone(&cut);
    let mut worker = parallel(&cut, "127.0.0.1:0", "2");
    let address = worker.address.clone();
    let host = host(&cut, &address, 1).connect(|_| {}).unwrap();
    let mut session = host.session().unwrap();
    begin(&mut session, 0);
    let mut got = go_on(&mut session, 10);
    worker.kill();
    worker = parallel(&cut, &address, "1");
    got.extend(go_on(&mut session, N - 10));
    assert_eq!(got, expected[0], "{}", worker.stderr());
}

#[test]
fn a_worker_with_too_few_sessions_and_a_host_without_a_free_one_are_clear_errors() {
    let cut = Cut::tiny("qwen2");
    let worker = cut.worker(1);
    let Err(error) = host(&cut, &worker.address, 3).connect(|_| {}) else { panic!("one is not three") };
    let (says, hint) = (error.to_string(), error.hint().unwrap_or_default());
    assert!(
        error.is_misuse() && says.contains(&worker.address) && says.contains("serves 1 session"),
        "{says}"
    );
    assert!(hint.contains("with 3 sessions"), "{hint}");
    for n in [0, 65] {
        let Err(error) = host(&cut, &worker.address, n).connect(|_| {}) else { panic!("{n} sessions") };
        assert!(
            error.is_misuse() && matches!(&error, Error::Option(bad) if bad.option == "sessions"),
            "{error}"
        );
    }

    let host = host(&cut, &worker.address, 1).connect(|_| {}).unwrap();
    let session = host.session().unwrap();
    let Err(error) = host.session() else { panic!("a second one") };
    assert!(error.is_misuse() && error.to_string() == "the one session is in use", "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("sessions(n)")), "{error}");
    drop(session);
    assert!(host.session().is_ok());
}

/// It comes back with fewer than the conversations need: that ends them with the side to fix, and nothing hangs.
#[test]
fn a_worker_that_comes_back_with_too_few_sessions_is_an_error_for_each() {
    let cut = Cut::tiny("qwen2");
    let mut worker = parallel(&cut, "127.0.0.1:0", "3");
    let address = worker.address.clone();
    let host = host(&cut, &address, 2).connect(|_| {}).unwrap();
    let mut sessions = [host.session().unwrap(), host.session().unwrap()];
    for session in &mut sessions {
        begin(session, 0);
        assert_eq!(go_on(session, 3).len(), 3);
    }
    worker.kill();
    let _worker = parallel(&cut, &address, "1");
    for session in &mut sessions {
        let error = session.generate(Sampling::greedy()).next().unwrap().unwrap_err();
        assert!(error.to_string().contains("the host needs 2 sessions, the worker has 1"), "{error}");
        assert!(error.hint().is_some(), "{error}");
    }
}

/// What is promised of batches: a pass of several sessions' rows gives what `llama_decode` gives for the same batch.
#[test]
fn a_batch_of_three_replies_is_llama_decode_s_on_the_same_batch() {
    for arch in ["qwen2", "llama"] {
        let cut = Cut::tiny(arch);
        let options = LoadOptions { resources: SMALL, mmap: false, max_sessions: 3, compute_bytes: None };
        let stage = |i: usize| {
            let path = cut.slice(i);
            let info = SliceInfo::read(&path).unwrap();
            StageSlot::Local(Box::new(load_stage(&path, &info, &options, |_| {}).unwrap()))
        };
        let mut pipeline = Pipeline::new((0..3).map(stage).collect(), RowType::F32, Patience::default());
        let n_passes = Arc::new(Mutex::new(0));
        let passes = Arc::clone(&n_passes);
        pipeline.trace(move |traced| {
            let is_pass = matches!(traced.what, Happened::Run(_, stage) if stage == StageId(0));
            *passes.lock().unwrap() += usize::from(is_pass);
        });
        pipeline.set_batch_rows(3);

        let model =
            Model::load(&[&cut.model], ModelParams { gpu_layers: Some(0), ..Default::default() }).unwrap();
        let context = ContextParams {
            n_ctx: SMALL.n_ctx,
            n_batch: SMALL.n_ubatch,
            n_ubatch: SMALL.n_ubatch,
            n_threads: 1,
            max_sessions: 3,
            ..Default::default()
        };
        let mut stock = Stock::new(&model, &context, None).unwrap();
        let n_vocab = model.n_vocab();
        let token = |session: u32, position: u32| {
            (7919 * (session + 1) + 13 * position) as i32 % i32::try_from(n_vocab).unwrap()
        };

        // prompts of different lengths, each a step of its own
        let mut lengths = [5, 9, 3];
        for session in 0..3u32 {
            let n = lengths[session as usize];
            let tokens: Vec<i32> = (0..n).map(|position| token(session, position)).collect();
            pipeline.submit(Step {
                session: SessionId(session),
                position: 0,
                want_logits: vec![true; tokens.len()],
                tokens: tokens.clone(),
                kind: StepKind::Prefill,
            });
            let rows: Vec<Row> =
                (0..n).map(|position| Row { session, position, want_output: true }).collect();
            let mut expected = vec![0.0; rows.len() * n_vocab];
            stock.decode(&rows, &tokens, &mut expected).unwrap();
            let finished = drain(&mut pipeline);
            assert!(finished[0].1 == expected, "{arch}, prompt {session}");
        }

        for pass in 0..20 {
            // one leaves now and then
            let members: Vec<u32> = (0..3).filter(|session| pass % 7 != 3 || *session != 1).collect();
            for &session in &members {
                let position = lengths[session as usize];
                pipeline.submit(Step::decode(SessionId(session), position, token(session, position)));
            }
            *n_passes.lock().unwrap() = 0;
            let finished = drain(&mut pipeline);
            assert_eq!((finished.len(), *n_passes.lock().unwrap()), (members.len(), 1), "one pass for all");
            // they come out in the order in which they lay in it
            let row = |session: u32| Row { session, position: lengths[session as usize], want_output: true };
            let rows: Vec<Row> = finished.iter().map(|(session, _)| row(*session)).collect();
            let tokens: Vec<i32> = rows.iter().map(|row| token(row.session, row.position)).collect();
            let mut expected = vec![0.0; rows.len() * n_vocab];
            stock.decode(&rows, &tokens, &mut expected).unwrap();
            let got: Vec<f32> = finished.into_iter().flat_map(|(_, logits)| logits).collect();
            assert!(got.iter().any(|&x| x != 0.0) && got == expected, "{arch}, pass {pass}");
            members.iter().for_each(|&session| lengths[session as usize] += 1);
        }
    }
}

/// What comes out until nothing is under way: whose it is, and the logits.
fn drain(pipeline: &mut Pipeline) -> Vec<(u32, Vec<f32>)> {
    let mut all = Vec::new();
    loop {
        match pipeline.advance(None) {
            Advance::Finished(finished) => all.push((finished.session.0, finished.outcome.unwrap())),
            Advance::Idle => return all,
            Advance::Later => panic!("there is no deadline"),
        }
    }
}

/// Several replies at once over a worker: fewer steps cross than tokens come out, and all of them come out.
#[test]
fn a_host_with_batches_sends_fewer_steps_than_tokens() {
    const N: usize = 200;
    let cut = Cut::tiny("qwen2");
    let worker = parallel(&cut, "127.0.0.1:0", "3");
    let round_trips = |batch_rows| {
        let host =
            host(&cut, &worker.address, 3).batch_rows(batch_rows).canary(false).connect(|_| {}).unwrap();
        // all of them are there before the first step, so what each counts is what crosses for all
        let sessions: Vec<Session> = (0..3).map(|_| host.session().unwrap()).collect();
        let barrier = Barrier::new(3);
        std::thread::scope(|scope| {
            let replies: Vec<_> = sessions
                .into_iter()
                .zip(5..)
                .map(|(mut session, token)| {
                    let barrier = &barrier;
                    scope.spawn(move || {
                        session.push_tokens(&[token]).unwrap();
                        let mut reply = session.generate(Sampling::greedy()).ignore_eos(true).limit(Some(N));
                        barrier.wait();
                        assert_eq!(reply.by_ref().map(Result::unwrap).count(), N);
                        reply.report(Instant::now()).wire.round_trips
                    })
                })
                .collect();
            // the last one's count is that of all
            replies.into_iter().map(|reply| reply.join().unwrap()).max().unwrap()
        })
    };
    assert_eq!(round_trips(1), 3 * N as u64, "rows apart");
    let batched = round_trips(3);
    assert!((N as u64..3 * N as u64).contains(&batched), "{batched}");
    let Err(error) = host(&cut, &worker.address, 3).batch_rows(0).connect(|_| {}) else { panic!("no rows") };
    assert!(error.is_misuse() && error.to_string().contains("batch_rows"), "{error}");
}
