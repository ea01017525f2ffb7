use super::fakes::*;
use super::*;
use crate::guard::EVERY_ROWS;
use crate::rows::RowsRef;
use crate::schedule::StepKind;
use crate::stage::{StageError, WrongAnswer};
use proptest::prelude::*;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

const ALICE: SessionId = SessionId(0);
const BOB: SessionId = SessionId(1);

/// What a run does: feed a session some tokens in chunks, or rewind it.
#[derive(Clone, Debug)]
enum Op {
    Feed(u32, Vec<u32>),
    Rewind(u32, u32),
}

fn run(pipeline: &mut Pipeline, ops: &[Op]) -> Result<Vec<f32>, PipelineError> {
    let mut lengths: BTreeMap<u32, u32> = BTreeMap::new();
    let mut out = Vec::new();
    for (round, op) in ops.iter().enumerate() {
        match op {
            Op::Feed(session, counts) => {
                for &count in counts {
                    let at = lengths.entry(*session).or_default();
                    let token = |i| (round as i32 * 7 + *at as i32 + i as i32) % 13 + 1;
                    pipeline.submit(Step {
                        session: SessionId(*session),
                        position: *at,
                        tokens: (0..count).map(token).collect(),
                        want_logits: vec![true; count as usize],
                        kind: StepKind::Prefill,
                    });
                    *at += count;
                }
                for finished in drain(pipeline) {
                    out.extend(finished.outcome?);
                }
            }
            Op::Rewind(session, to) => {
                let at = lengths.entry(*session).or_default();
                *at = (*at).min(*to);
                pipeline.rewind(SessionId(*session), *at);
            }
        }
    }
    Ok(out)
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let feed = (0u32..3, proptest::collection::vec(1u32..5, 1..6)).prop_map(|(s, c)| Op::Feed(s, c));
    let rewind = (0u32..3, 0u32..20).prop_map(|(s, p)| Op::Rewind(s, p));
    proptest::collection::vec(prop_oneof![3 => feed, 1 => rewind], 1..12)
}

proptest! {
    #[test]
    fn a_worker_lost_at_any_call_changes_nothing(
        ops in ops(),
        n_remotes in 1usize..3,
        breaks in proptest::collection::vec(proptest::bool::weighted(0.15), 0..200),
    ) {
        let make = |breaks: &[bool]| {
            let script = Arc::new(Mutex::new(breaks.iter().copied().collect::<VecDeque<bool>>()));
            let remote = || Scripted { breaks: Arc::clone(&script), ..Scripted::new(&[]) };
            scripted((0..n_remotes).map(|_| remote()).collect(), PATIENT)
        };
        let expected = run(&mut make(&[]), &ops).unwrap();
        let got = run(&mut make(&breaks), &ops).unwrap();
        prop_assert_eq!(got, expected);
    }
}

proptest! {
    /// Stages that cannot take rows back, which would panic if they were told to: the same logits as those that can.
    #[test]
    fn what_cannot_be_taken_back_is_evaluated_anew(
        ops in ops(),
        head_and_tail in any::<bool>(),
        breaks in proptest::collection::vec(proptest::bool::weighted(0.1), 0..100),
    ) {
        let expected = run(&mut scripted(vec![Scripted::new(&[])], PATIENT), &ops).unwrap();
        let of = |is_recurrent| if is_recurrent { TakeBack::NOTHING } else { TakeBack::ALL };
        let worker = Scripted { memory: Memory::new(of(!head_and_tail)), ..Scripted::new(&breaks) };
        let got = run(&mut scripted_with(vec![worker], PATIENT, of(head_and_tail)), &ops).unwrap();
        prop_assert_eq!(got, expected);
    }

    /// Stages with snapshots of so many rows of their last step, which would panic if they were told to take back more.
    #[test]
    fn what_has_snapshots_is_taken_back_by_them_and_evaluated_anew_else(
        ops in ops(),
        head in 0u32..4,
        worker in 1u32..4,
        breaks in proptest::collection::vec(proptest::bool::weighted(0.1), 0..100),
    ) {
        // such stages have one session
        let ops: Vec<Op> = ops.into_iter().map(|op| match op {
            Op::Feed(_, counts) => Op::Feed(0, counts),
            Op::Rewind(_, to) => Op::Rewind(0, to),
        }).collect();
        let expected = run(&mut scripted(vec![Scripted::new(&[])], PATIENT), &ops).unwrap();
        let worker = Scripted { memory: Memory::new(TakeBack(worker)), ..Scripted::new(&breaks) };
        let got = run(&mut scripted_with(vec![worker], PATIENT, TakeBack(head)), &ops).unwrap();
        prop_assert_eq!(got, expected);
    }
}

/// With two sessions in one batch: what is left of it after one of them began anew goes to a new worker alone.
#[test]
fn a_batch_of_a_worker_that_cannot_take_back_is_replayed_without_what_was_taken() {
    let worker = Scripted { memory: Memory::new(TakeBack::NOTHING), ..Scripted::new(&[]) };
    let (log, breaks) = (Arc::clone(&worker.log), Arc::clone(&worker.breaks));
    let mut p = scripted(vec![worker], PATIENT);
    p.set_batch_rows(8);
    for session in [ALICE, BOB] {
        p.submit(Step::decode(session, 0, 1));
    }
    for session in [ALICE, BOB] {
        p.submit(Step::decode(session, 1, 2));
    }
    assert_eq!(drain(&mut p).len(), 4);
    p.rewind(ALICE, 1);
    p.submit(Step::decode(ALICE, 1, 3));
    assert_eq!(drain(&mut p).len(), 1);
    log.lock().unwrap().clear();
    breaks.lock().unwrap().push_back(true);
    p.submit(Step::decode(BOB, 2, 4));
    assert_eq!(drain(&mut p).len(), 1);
    let log = log.lock().unwrap();
    assert_eq!(log.join(" | "), "dial | 1:0+1 | 1:1+1 | 0:0+1 | 0:1+1 | 1:2+1");
}

/// Rows that snapshots reach are taken back without a step; a worker that is lost then is sent the step as it was, and the
/// rewind behind it; and so is one whose session has to go back farther.
#[test]
fn a_step_that_snapshots_have_cut_is_given_again_as_it_was() {
    let worker = Scripted { memory: Memory::new(TakeBack(2)), ..Scripted::new(&[]) };
    let (log, breaks) = (Arc::clone(&worker.log), Arc::clone(&worker.breaks));
    let mut p = scripted_with(vec![worker], PATIENT, TakeBack(2));
    let said = || std::mem::take(&mut *log.lock().unwrap()).join(" | ");
    let feed = |p: &mut Pipeline, position, tokens: &[i32]| {
        let want_logits = vec![false; tokens.len()];
        let tokens = tokens.to_vec();
        p.submit(Step { session: ALICE, position, tokens, want_logits, kind: StepKind::Prefill });
    };
    feed(&mut p, 0, &[1, 2, 3, 4]);
    drain(&mut p);
    p.rewind(ALICE, 3);
    p.submit(Step::decode(ALICE, 3, 5));
    drain(&mut p);
    assert_eq!(said(), "0:0+4 | 0<3 | 0:3+1");
    breaks.lock().unwrap().push_back(true);
    p.submit(Step::decode(ALICE, 4, 6));
    drain(&mut p);
    assert_eq!(said(), "dial | 0:0+4 | 0<3 | 0:3+1 | 0:4+1");
    p.rewind(ALICE, 3);
    p.submit(Step::decode(ALICE, 3, 7));
    drain(&mut p);
    assert_eq!(said(), "0<0 | 0:0+4 | 0<3 | 0:3+1");
}

#[test]
fn a_step_that_a_worker_cannot_do_ends_its_session_and_not_the_connection() {
    // ALICE's second step: the head has 1 and 6
    let worker = Scripted { fails_at: Some(7.0), goes_on: true, ..Scripted::new(&[]) };
    let log = Arc::clone(&worker.log);
    let mut p = scripted(vec![worker], PATIENT);
    p.submit(Step::decode(ALICE, 0, 1));
    p.submit(Step::decode(BOB, 0, 2));
    p.submit(Step::decode(ALICE, 1, 5));
    p.submit(Step::decode(BOB, 1, 2));
    let finished = drain(&mut p);
    let failed: Vec<SessionId> = finished.iter().filter(|f| f.outcome.is_err()).map(|f| f.session).collect();
    assert_eq!((finished.len(), failed), (4, vec![ALICE]));
    // what is asked of it next is right, and it was never dialled
    p.rewind(ALICE, 1);
    p.submit(Step::decode(ALICE, 1, 3));
    let [last] = <[Finished; 1]>::try_from(drain(&mut p)).unwrap();
    // head 1, 4; worker 1, 5; tail 1, 6
    assert_eq!((last.session, last.outcome.unwrap()), (ALICE, vec![6.0]));
    assert_eq!(asked(&log, "dial"), 0);
}

#[test]
fn a_worker_hears_of_what_nobody_wants_any_more() {
    let worker = Scripted { lag: 4, ..Scripted::new(&[]) };
    let log = Arc::clone(&worker.log);
    let mut p = scripted(vec![worker], PATIENT);
    let first = p.submit(Step::decode(ALICE, 0, 1));
    p.submit(Step::decode(BOB, 0, 2));
    while asked(&log, "0:0+1") == 0 {
        assert!(matches!(p.advance(Some(p.clock.now())), Advance::Later));
    }
    p.cancel(ALICE, first);
    p.rewind(ALICE, 0);
    let called_off = asked(&log, &format!("x{}", first.0));
    assert_eq!((called_off, asked(&log, "0:0+1")), (1, 1), "it was sent, and is called off");
    assert_eq!(drain(&mut p).len(), 1);
}

#[test]
#[should_panic(expected = "row out of place")]
fn a_worker_that_kept_its_memory_over_a_reconnect_would_be_noticed() {
    let ops = [Op::Feed(0, vec![3]), Op::Feed(0, vec![1, 1])];
    let remote = Scripted { remembers: true, ..Scripted::new(&[false, false, true]) };
    let _ = run(&mut scripted(vec![remote], PATIENT), &ops);
}

#[test]
fn a_worker_that_stays_away_is_one_clear_error_per_session() {
    let mut p = scripted(vec![Scripted::new(&[true; 100_000])], Patience::default());
    for session in [ALICE, BOB] {
        p.submit(Step::decode(session, 0, 1));
        p.submit(Step::decode(session, 1, 1));
    }
    let finished = drain(&mut p);
    assert_eq!(finished.iter().map(|f| f.session).collect::<Vec<_>>(), [ALICE, BOB]);
    for f in finished {
        let e = f.outcome.unwrap_err();
        assert!(matches!(e, PipelineError::WorkerGone { .. }), "{e}");
        assert!(e.to_string().contains("remote is gone: no connection for 30 s"), "{e}");
    }
    assert!(matches!(p.advance(None), Advance::Idle), "nothing is under way after an error");
}

/// What takes a worker's place in these tests: a stage, or a reason why not.
struct Spare(Option<Box<dyn crate::stage::LocalStage>>);

impl crate::reserve::Reserve for Spare {
    fn begin(&mut self, bell: &Bell) {
        bell.ring();
    }
    fn poll(&mut self) -> Result<Option<Box<dyn crate::stage::LocalStage>>, StageError> {
        self.0.take().map(Some).ok_or_else(|| StageError::refused("no room"))
    }
}

fn with_spare(worker: Scripted, has_one: bool) -> Pipeline {
    let spare: Box<dyn crate::stage::LocalStage> =
        Box::new(Local { memory: Memory::new(TakeBack::ALL), cost: FREE, world: World::new(0) });
    let spare = Spare(has_one.then_some(spare));
    scripted(vec![crate::reserve::OrHere::new(Box::new(worker), Box::new(spare))], Patience::default())
}

/// Lost at any of its calls and never seen again: what it was told is told to its blocks here, and nothing that comes out
/// is another. Then they go on as a stage that was here from the start, rewinds too.
#[test]
fn a_worker_that_stays_away_is_replaced_by_its_blocks_here_and_no_result_changes() {
    let ops = [
        Op::Feed(0, vec![3, 2]),
        Op::Feed(1, vec![4, 1, 1]),
        Op::Rewind(0, 4),
        Op::Feed(0, vec![2, 1, 1]),
        Op::Rewind(1, 0),
        Op::Feed(1, vec![5, 1]),
    ];
    let expected = run(&mut scripted(vec![Scripted::new(&[])], PATIENT), &ops).unwrap();
    let mut n_replaced = 0;
    for is_shared in [false, true] {
        for at in 0..60 {
            let breaks: Vec<bool> = (0..100_000).map(|call| call >= at).collect();
            let mut p = with_spare(Scripted::new(&breaks), true);
            p.set_shared(is_shared);
            let heard = Arc::new(Mutex::new(Vec::new()));
            let log = Arc::clone(&heard);
            p.observe(move |event| {
                if let Event::Replaced { stage, by, .. } = event {
                    log.lock().unwrap().push(format!("{stage} by {by}"));
                }
            });
            assert_eq!(run(&mut p, &ops).unwrap(), expected, "lost at call {at}");
            let heard = heard.lock().unwrap();
            assert!(heard.is_empty() || *heard == ["remote by local"], "{heard:?}");
            n_replaced += heard.len();
            assert_eq!(p.stages().nth(1).unwrap().0, if heard.is_empty() { "remote" } else { "local" });
        }
    }
    assert!(n_replaced > 20, "{n_replaced}");
}

#[test]
fn a_worker_whose_blocks_cannot_be_here_either_is_gone_and_looked_for_by_the_next_step() {
    let breaks: Vec<bool> = (0..40).map(|_| true).collect();
    let mut p = with_spare(Scripted::new(&breaks), false);
    p.submit(Step::decode(ALICE, 0, 1));
    let finished = drain(&mut p);
    let [Finished { outcome: Err(error), .. }] = &finished[..] else { panic!("{finished:?}") };
    assert!(matches!(error, PipelineError::WorkerGone { .. }), "{error}");
    assert!(error.to_string().ends_with("remote is gone: no connection for 30 s (no room)"), "{error}");
    for _ in 0..5 {
        p.rewind(ALICE, 0);
        p.submit(Step::decode(ALICE, 0, 1));
        if drain(&mut p).iter().all(|finished| finished.outcome.is_ok()) {
            return;
        }
    }
    panic!("it was never found again");
}

/// A step at which a worker falls over each time is not retried for ever, and not as fast as it can: losses count until a
/// new answer has come. Whoever else is there goes on.
#[test]
fn a_step_that_fails_the_same_way_each_time_ends_its_session_and_no_other() {
    let remote = Scripted { breaks_at: Some(100.0), ..Scripted::new(&[]) };
    let log = Arc::clone(&remote.log);
    let mut p = scripted(vec![remote], Patience::default());
    p.submit(Step::decode(ALICE, 0, 100));
    for position in 0..4 {
        p.submit(Step::decode(BOB, position, 1));
    }
    let finished = drain(&mut p);
    let (alice, bob): (Vec<_>, Vec<_>) = finished.into_iter().partition(|f| f.session == ALICE);
    assert_eq!(bob.len(), 4);
    assert!(bob.iter().all(|f| f.outcome.is_ok()));
    let [Finished { outcome: Err(error), .. }] = &alice[..] else { panic!("{alice:?}") };
    let PipelineError::WorkerKeepsFailing { losses, after, .. } = error else { panic!("{error}") };
    // 30 s with pauses of 0.2, 0.4, ... 5 s
    assert!(*after >= Duration::from_secs(30) && (8..14).contains(losses), "{losses} losses in {after:?}");
    let dialled = log.lock().unwrap().iter().filter(|what| *what == "dial").count();
    assert!(dialled <= 14, "{dialled}");
}

/// A fault that a worker reports of a step ends that step's session; the others' steps go to its next connection.
#[test]
fn a_fault_of_one_session_s_step_leaves_the_others_alone() {
    let remote = Scripted { fails_at: Some(100.0), ..Scripted::new(&[]) };
    let mut p = scripted(vec![remote], PATIENT);
    let bobs = [p.submit(Step::decode(BOB, 0, 1)), p.submit(Step::decode(BOB, 1, 2))];
    let bad = p.submit(Step::decode(ALICE, 0, 100));
    p.submit(Step::decode(ALICE, 1, 1));
    let last = p.submit(Step::decode(BOB, 2, 3));
    let finished = drain(&mut p);
    let failed: Vec<_> = finished.iter().filter(|f| f.outcome.is_err()).map(|f| (f.session, f.job)).collect();
    assert_eq!(failed, [(ALICE, bad)]);
    let fine: Vec<_> = finished.iter().filter_map(|f| Some((f.job, f.outcome.as_ref().ok()?[0]))).collect();
    // head, worker and tail each sum up
    assert_eq!(fine, [(bobs[0], 1.0), (bobs[1], 5.0), (last, 15.0)]);
    // a session that failed goes on from where it is rewound to
    p.rewind(ALICE, 0);
    p.submit(Step::decode(ALICE, 0, 7));
    assert_eq!(drain(&mut p)[0].outcome.as_ref().unwrap(), &[7.0]);
}

#[test]
fn an_error_of_a_local_stage_ends_the_sessions_of_its_batch_only() {
    let mut p = scripted(vec![Scripted::new(&[])], PATIENT);
    p.set_batch_rows(2);
    let carol = SessionId(2);
    let busy = p.submit(Step { kind: StepKind::Prefill, ..Step::decode(carol, 0, 3) });
    assert!(matches!(p.advance(None), Advance::Finished(f) if f.job == busy));
    let (a, b) = (p.submit(Step::decode(ALICE, 0, BAD_TOKEN)), p.submit(Step::decode(BOB, 0, 1)));
    let c = p.submit(Step::decode(carol, 1, 1));
    let outcomes: Vec<_> = drain(&mut p).into_iter().map(|f| (f.job, f.outcome.is_ok())).collect();
    // Alice and Bob went together
    assert_eq!(outcomes, [(a, false), (b, false), (c, true)]);
}

#[test]
fn a_batch_is_split_by_session_again() {
    let mut p = scripted(vec![Scripted::new(&[])], PATIENT);
    p.set_batch_rows(8);
    let two = Step {
        session: BOB,
        position: 0,
        tokens: vec![1, 2, 3],
        want_logits: vec![true, false, true],
        kind: StepKind::Decode,
    };
    let (a, b) = (p.submit(Step::decode(ALICE, 0, 5)), p.submit(two));
    let finished = drain(&mut p);
    let got: Vec<_> =
        finished.iter().map(|f| (f.job, f.session, f.outcome.as_ref().unwrap().clone())).collect();
    // 1, 3, 6 -> 1, 4, 10 -> 1, 5, 15
    assert_eq!(got, [(a, ALICE, vec![5.0]), (b, BOB, vec![1.0, 15.0])]);
}

#[test]
fn the_observer_hears_of_a_loss_and_of_the_return() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let mut p = scripted(vec![Scripted::new(&[false, true])], PATIENT);
    let log = Arc::clone(&heard);
    p.observe(move |event| {
        log.lock().unwrap().push(match event {
            Event::Lost { .. } => "lost",
            Event::Paused { .. } => "paused",
            Event::Replaying { .. } => "replaying",
            Event::Replaced { .. } => "replaced",
            Event::Back { .. } => "back",
        });
    });
    run(&mut p, &[Op::Feed(0, vec![2, 2])]).unwrap();
    assert_eq!(*heard.lock().unwrap(), ["lost", "replaying", "back"]);
    assert_eq!(p.stages().nth(1).unwrap().2.reconnects, 1);
}

#[test]
fn a_deadline_is_kept_and_an_interrupt_ends_a_wait() {
    let (mut p, world) = timed(&models(&[10, 60, 10], 5, 2), PATIENT);
    p.submit(Step::decode(ALICE, 0, 1));
    let interrupt = p.interrupt();
    p.set_shared(true);
    let in_30_ms = p.clock.now() + Duration::from_millis(30);
    assert!(matches!(p.advance(Some(in_30_ms)), Advance::Later));
    assert_eq!(world.elapsed(), Duration::from_millis(30));
    interrupt.ask();
    assert!(matches!(p.advance(None), Advance::Later));
    assert!(matches!(p.advance(None), Advance::Finished(_)));
    assert_eq!(world.elapsed(), Duration::from_millis(90));
    // of threads, without a worker that ever answers
    let mut p = scripted(vec![Scripted::new(&[])], PATIENT);
    p.clock = Box::new(SystemClock);
    assert!(matches!(p.advance(None), Advance::Idle));
}

#[test]
fn logits_that_are_given_back_are_used_again() {
    let mut p = scripted(vec![Scripted::new(&[])], PATIENT);
    p.submit(Step::decode(ALICE, 0, 1));
    let Advance::Finished(Finished { outcome: Ok(mut logits), .. }) = p.advance(None) else {
        panic!("no logits")
    };
    logits.reserve(1000);
    let (at, room) = (logits.as_ptr(), logits.capacity());
    p.reuse(logits);
    p.submit(Step::decode(ALICE, 1, 1));
    let Advance::Finished(Finished { outcome: Ok(logits), .. }) = p.advance(None) else {
        panic!("no logits")
    };
    assert_eq!((logits.as_ptr(), logits.capacity(), logits.len()), (at, room, 1));
}

/// Chunks of a prompt up to the row at which a check is due.
fn fill(p: &mut Pipeline, session: SessionId) {
    assert!(filled(p, session).iter().all(|f| f.outcome.is_ok()));
}

fn filled(p: &mut Pipeline, session: SessionId) -> Vec<Finished> {
    for position in (0..EVERY_ROWS).step_by(512) {
        let (tokens, want_logits) = (vec![0; 512], vec![false; 512]);
        p.submit(Step { session, position, tokens, want_logits, kind: StepKind::Prefill });
    }
    drain(p)
}

fn asked(log: &Arc<Mutex<Vec<String>>>, what: &str) -> usize {
    log.lock().unwrap().iter().filter(|said| *said == what).count()
}

/// Several sessions, always as many steps under way as the window holds: the canary is asked all the same, after every
/// 4,096 rows, in the session that is its own; and what it is asked is in no traffic.
#[test]
fn the_canary_is_asked_under_full_load() {
    let worker = Scripted { lag: 1, ..Scripted::new(&[]) };
    let log = Arc::clone(&worker.log);
    let mut p = scripted(vec![guarded(worker, 3)], PATIENT);
    let (mut at, mut n) = ([0u32; 3], 0u64);
    let mut feed = |p: &mut Pipeline, session: usize| {
        p.submit(Step::decode(SessionId(session as u32), at[session], 0));
        at[session] += 1;
        n += 1;
    };
    for session in [0, 1, 2, 0, 1, 2] {
        feed(&mut p, session);
    }
    for _ in 0..3 * EVERY_ROWS {
        let Advance::Finished(f) = p.advance(None) else { panic!("nothing came out") };
        f.outcome.unwrap();
        assert!(p.schedule.n_running(StageId(1)) > 0, "the worker is never without a step");
        feed(&mut p, f.session.0 as usize);
    }
    drain(&mut p);
    assert_eq!(asked(&log, "3:0+3"), 3);
    assert_eq!((asked(&log, "3:3+1"), asked(&log, "3<0")), (3, 3));
    assert_eq!(p.traffic().round_trips, n);
}

/// A worker that begins to lie under load is caught, and everybody hears of it; it is asked again before it is used
/// again, and used again when it answers right.
#[test]
fn a_worker_that_begins_to_lie_under_load_is_caught() {
    let worker = Scripted { wrong_from: Some(6000), lag: 1, ..Scripted::new(&[]) };
    let mut p = scripted(vec![guarded(worker, 2)], PATIENT);
    let mut at = [0u32; 2];
    let mut answered = 0;
    let mut failed = Vec::new();
    for session in [0, 1, 0, 1] {
        p.submit(Step::decode(SessionId(session), at[session as usize], 0));
        at[session as usize] += 1;
    }
    while let Advance::Finished(f) = p.advance(None) {
        match f.outcome {
            Ok(_) => {
                answered += 1;
                p.submit(Step::decode(f.session, at[f.session.0 as usize], 0));
                at[f.session.0 as usize] += 1;
            }
            Err(error) => failed.push((f.session, error)),
        }
    }
    assert_eq!(failed.iter().map(|f| f.0).collect::<std::collections::BTreeSet<_>>().len(), 2, "{failed:?}");
    for (_, error) in &failed {
        let says = error.to_string();
        let wrong = matches!(error, PipelineError::Stage { source: StageError::Wrong { .. }, .. });
        assert!(wrong && says.contains("blocks 11..16 come out wrong there"), "{says}");
    }
    assert!((6000..2 * EVERY_ROWS + 8).contains(&answered), "{answered}");
    // it still lies
    p.rewind(ALICE, 0);
    p.submit(Step::decode(ALICE, 0, 1));
    assert!(drain(&mut p)[0].outcome.is_err());
}

#[test]
fn every_connection_is_checked_before_its_replay() {
    let worker = Scripted::new(&[]);
    let (log, breaks) = (Arc::clone(&worker.log), Arc::clone(&worker.breaks));
    let mut p = scripted(vec![guarded(worker, 0)], PATIENT);
    run(&mut p, &[Op::Feed(0, vec![2])]).unwrap();
    breaks.lock().unwrap().push_back(true);
    p.submit(Step::decode(ALICE, 2, 1));
    assert!(drain(&mut p)[0].outcome.is_ok());
    assert_eq!(*log.lock().unwrap(), ["0:0+2", "dial", "0:0+3", "0:3+1", "0<0", "0:0+2", "0:2+1"]);
    assert_eq!(p.traffic().round_trips, 3, "two steps and a replay; the check is nobody's");
}

#[test]
fn a_worker_that_comes_back_wrong_is_an_error_and_not_dialled_again() {
    let worker = Scripted { wrong_from: Some(1), ..Scripted::new(&[]) };
    let (log, breaks) = (Arc::clone(&worker.log), Arc::clone(&worker.breaks));
    let mut p = scripted(vec![guarded(worker, 0)], PATIENT);
    run(&mut p, &[Op::Feed(0, vec![2])]).unwrap();
    breaks.lock().unwrap().push_back(true);
    p.submit(Step::decode(ALICE, 2, 1));
    let error = drain(&mut p).remove(0).outcome.unwrap_err();
    assert!(matches!(error, PipelineError::Stage { source: StageError::Wrong { .. }, .. }), "{error}");
    assert_eq!(asked(&log, "dial"), 1);
}

/// One session, nothing to spare: where it begins anew the canary is asked first, and not again soon.
#[test]
fn a_session_that_begins_anew_after_many_rows_is_checked_first() {
    let worker = Scripted::new(&[]);
    let log = Arc::clone(&worker.log);
    let mut p = scripted(vec![guarded(worker, 0)], PATIENT);
    fill(&mut p, ALICE);
    let before = log.lock().unwrap().len();
    for _ in 0..2 {
        p.rewind(ALICE, 0);
        p.submit(Step::decode(ALICE, 0, 2));
        assert!(drain(&mut p)[0].outcome.is_ok());
    }
    assert_eq!(log.lock().unwrap()[before..], ["0<0", "0:0+3", "0:3+1", "0<0", "0:0+1", "0<0", "0:0+1"]);
}

/// One session that goes on: a row is asked twice, and everything is as if not.
#[test]
fn a_long_reply_has_a_row_asked_again_and_goes_on_as_if_not() {
    let worker = Scripted::new(&[]);
    let log = Arc::clone(&worker.log);
    let mut p = scripted(vec![guarded(worker, 0)], PATIENT);
    fill(&mut p, ALICE);
    let before = log.lock().unwrap().len();
    let mut out = Vec::new();
    for position in EVERY_ROWS..EVERY_ROWS + 3 {
        p.submit(Step::decode(ALICE, position, 1));
        out.extend(drain(&mut p).remove(0).outcome.unwrap());
    }
    assert_eq!(log.lock().unwrap()[before..], ["0:4096+1", "0<4096", "0:4096+1", "0:4097+1", "0:4098+1"]);
    assert_eq!(p.traffic().round_trips, 8 + 3);
    // head, worker (and one) and tail sum up, behind 4,096 rows of which each is one at the tail
    assert_eq!(out, [2.0, 6.0, 13.0]);
}

#[test]
fn an_unsteady_worker_is_found_before_its_answer_is_handed_on() {
    // eight chunks, the row, and its repetition
    let worker = Scripted { wrong_from: Some(9), ..Scripted::new(&[]) };
    let mut p = scripted(vec![guarded(worker, 0)], PATIENT);
    fill(&mut p, ALICE);
    p.submit(Step::decode(ALICE, EVERY_ROWS, 1));
    let error = drain(&mut p).remove(0).outcome.unwrap_err();
    let PipelineError::Stage { source: StageError::Wrong { answer, .. }, .. } = &error else {
        panic!("{error}")
    };
    assert!(matches!(answer, WrongAnswer::Unsteady { .. }), "{error}");
}

/// A row that has another behind it cannot be taken back; a later one that stands alone can.
#[test]
fn a_row_that_has_another_behind_it_is_not_taken_back() {
    let worker = Scripted::new(&[]);
    let log = Arc::clone(&worker.log);
    let mut p = scripted(vec![guarded(worker, 0)], PATIENT);
    fill(&mut p, ALICE);
    let before = log.lock().unwrap().len();
    p.submit(Step::decode(ALICE, EVERY_ROWS, 1));
    p.submit(Step::decode(ALICE, EVERY_ROWS + 1, 1));
    // the second is sent before the first is heard: a worker that answers at once is heard after the head's next step
    drain(&mut p);
    p.submit(Step::decode(ALICE, EVERY_ROWS + 2, 1));
    drain(&mut p);
    let said = log.lock().unwrap()[before..].to_vec();
    assert_eq!(said.iter().filter(|what| what.contains('<')).count(), 1, "{said:?}");
    let rows = said.iter().filter(|what| !what.contains('<')).count();
    assert_eq!(rows, 4, "{said:?}");
}

/// Rows are what a stage gives, whatever their number format.
#[test]
fn fakes_read_both_formats() {
    let half = [half::f16::from_f32(1.5)];
    assert_eq!((floats(RowsRef::F16(&half)), floats(RowsRef::F32(&[2.0]))), (vec![1.5], vec![2.0]));
}

/// What comes out while its worker is being checked waits for the end of that; and who was given something since the
/// worker was last right hears of it with the next step, unless nothing is left that stands on it.
#[test]
fn a_check_that_fails_is_heard_by_everybody_whom_it_concerns() {
    let carol = SessionId(2);
    let worker = Scripted { wrong_from: Some(11), heals: true, ..Scripted::new(&[]) };
    let mut p = scripted(vec![guarded(worker, 4)], PATIENT);
    for session in [BOB, carol] {
        p.submit(Step::decode(session, 0, 1));
        assert!(drain(&mut p).remove(0).outcome.is_ok());
    }
    p.rewind(carol, 0);
    // the last of eight chunks begins the check; the one before may still be in the tail then
    let mut finished = filled(&mut p, ALICE);
    let Some(Finished { job, outcome: Err(error), .. }) = finished.pop() else {
        panic!("nobody has noticed")
    };
    assert!(error.to_string().contains("blocks 11..16 come out wrong there"), "{error}");
    assert!((6..8).contains(&finished.len()) && finished.iter().all(|f| f.outcome.is_ok()));
    assert_eq!(job.0, finished[0].job.0 + finished.len() as u64, "the oldest that did not come out");

    // its rewind does not take the word from Bob
    p.rewind(BOB, 1);
    p.submit(Step::decode(BOB, 1, 1));
    let error = drain(&mut p).remove(0).outcome.unwrap_err();
    assert!(error.to_string().contains("blocks 11..16 come out wrong there"), "{error}");
    // Carol has begun anew
    p.submit(Step::decode(carol, 0, 1));
    assert!(drain(&mut p).remove(0).outcome.is_ok());
}

/// The same check passed: the last answer comes out behind it.
#[test]
fn an_answer_waits_for_the_check_that_began_behind_it() {
    let worker = Scripted::new(&[]);
    let log = Arc::clone(&worker.log);
    let mut p = scripted(vec![guarded(worker, 2)], PATIENT);
    for position in (0..EVERY_ROWS).step_by(512) {
        let (tokens, want_logits) = (vec![0; 512], vec![false; 512]);
        p.submit(Step { session: ALICE, position, tokens, want_logits, kind: StepKind::Prefill });
    }
    for n in 0..8 {
        assert!(matches!(p.advance(None), Advance::Finished(Finished { outcome: Ok(_), .. })));
        assert!(p.remote(1).check.is_none(), "the {n}th answer came out while the worker was being checked");
    }
    assert_eq!(asked(&log, "2:3+1"), 1);
}

/// Lost at any call, those of the check among them: what waits for it comes out all the same.
#[test]
fn a_worker_lost_while_it_is_checked_holds_nothing_back() {
    for at in 0..60 {
        let mut breaks = vec![false; at];
        breaks.push(true);
        let mut p = scripted(vec![guarded(Scripted { lag: 1, ..Scripted::new(&breaks) }, 2)], PATIENT);
        let finished = filled(&mut p, ALICE);
        assert_eq!(finished.iter().filter(|f| f.outcome.is_ok()).count(), 8, "lost at call {at}");
    }
}

/// What nobody wants any more, in the lanes, under way and behind a check, comes to nothing; the session goes on from
/// where it is rewound to.
#[test]
fn a_session_that_is_given_up_leaves_nothing_behind() {
    let mut p = scripted(vec![Scripted { lag: 1, fails_at: Some(100.0), ..Scripted::new(&[]) }], PATIENT);
    for (position, token) in [(0, 1), (1, 1), (2, 97), (3, 1), (4, 1)] {
        p.submit(Step::decode(ALICE, position, token));
        p.submit(Step::decode(BOB, position, 1));
    }
    let first = p.advance(None);
    assert!(matches!(first, Advance::Finished(Finished { session: ALICE, .. })), "{first:?}");
    p.give_up(ALICE);
    p.rewind(ALICE, 0);
    p.submit(Step::decode(ALICE, 0, 7));
    let rest = drain(&mut p);
    let of = |who| rest.iter().filter(move |f| f.session == who).map(|f| f.outcome.as_ref().unwrap()[0]);
    assert_eq!(of(ALICE).collect::<Vec<_>>(), [7.0]);
    assert_eq!(of(BOB).collect::<Vec<_>>(), [1.0, 4.0, 10.0, 20.0, 35.0]);
}

/// A row that was taken back while it was computed is not asked again: the worker stands before it by then.
#[test]
fn a_row_that_has_a_rewind_behind_it_is_not_asked_again() {
    let worker = Scripted { lag: 1, ..Scripted::new(&[]) };
    let log = Arc::clone(&worker.log);
    let mut p = scripted(vec![guarded(worker, 0)], PATIENT);
    fill(&mut p, ALICE);
    p.submit(Step::decode(ALICE, EVERY_ROWS, 1));
    p.rewind(ALICE, EVERY_ROWS - 1);
    assert!(drain(&mut p).iter().all(|f| f.outcome.is_ok()));
    p.submit(Step::decode(ALICE, EVERY_ROWS - 1, 1));
    assert!(drain(&mut p)[0].outcome.is_ok());
    assert_eq!(asked(&log, "0:4096+1"), 1);
}
