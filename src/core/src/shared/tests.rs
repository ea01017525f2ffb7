use std::sync::mpsc::channel;
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use super::*;
use crate::fakes::{Cut, FAILS_AT, PANICS_AT, SleepingStage, SleepingWorker, Sums};
use crate::pipeline::{Patience, StageSlot};
use crate::random::random;
use crate::rows::RowType;
use crate::saved::SavedStep;
use crate::schedule::StepKind;
use crate::stage::Span;
use crate::trace::Happened;

const US: Duration = Duration::from_micros(1);

/// Head, workers and tail that take so long for each step, and what cuts the workers' connections.
fn pipeline(local: Duration, workers: &[Duration], sessions: u32) -> (SharedPipeline, Vec<Cut>) {
    let workers: Vec<SleepingWorker> =
        workers.iter().map(|&compute| SleepingWorker::start(compute, 20 * US, 4)).collect();
    let cuts = workers.iter().map(SleepingWorker::cut).collect();
    let here = || StageSlot::Local(Box::new(SleepingStage::new(local)));
    let mut stages = vec![here()];
    stages.extend(workers.into_iter().map(|worker| StageSlot::Remote(Box::new(worker))));
    stages.push(here());
    let patience = Patience { first_pause: US, longest_pause: 1000 * US, ..Patience::default() };
    (SharedPipeline::new(Pipeline::new(stages, RowType::F32, patience), sessions), cuts)
}

fn step(position: u32, tokens: &[i32]) -> Step {
    Step {
        session: SessionId(0),
        position,
        want_logits: vec![true; tokens.len()],
        tokens: tokens.to_vec(),
        kind: if tokens.len() == 1 { StepKind::Decode } else { StepKind::Prefill },
    }
}

/// Runs steps and gives all that comes out.
fn run(client: &mut Client, steps: Vec<Step>) -> Result<Vec<f32>, PipelineError> {
    let mut out = Vec::new();
    client.run(steps, None, |logits| {
        out.extend_from_slice(&logits);
        Some(logits)
    })?;
    Ok(out)
}

/// A caller that prompts, replies and takes back at random, and holds everything against the sums of its own.
fn converse(client: &mut Client, n_stages: usize, seed: u64, turns: u64) {
    let mut drawn = 0;
    let mut below = |n: u64| {
        drawn += 1;
        random(seed, drawn) % n
    };
    let mut model = vec![Sums::default(); n_stages];
    let mut length = 0;
    for _ in 0..turns {
        if below(4) == 0 {
            length = below(u64::from(length) + 1) as u32;
            client.rewind(length);
            model.iter_mut().for_each(|sums| sums.rewind(0, length));
        }
        let mut steps = Vec::new();
        let mut expected = Vec::new();
        for _ in 0..1 + below(4) {
            let tokens: Vec<i32> = (0..1 + below(3)).map(|_| 1 + below(50) as i32).collect();
            let span = [Span { session: 0, position: length, count: tokens.len() as u32 }];
            let values = tokens.iter().map(|&token| token as f32).collect();
            expected
                .extend(model.iter_mut().fold(values, |values: Vec<f32>, sums| sums.step(&span, &values)));
            steps.push(step(length, &tokens));
            length += tokens.len() as u32;
        }
        assert_eq!(run(client, steps).unwrap(), expected, "seed {seed}");
    }
}

#[test]
fn threads_with_a_session_each_get_what_each_gets_alone_though_workers_are_lost() {
    for workers in [&[][..], &[50 * US], &[30 * US, 90 * US]] {
        let (pipeline, cuts) = pipeline(10 * US, workers, 4);
        scope(|scope| {
            let threads = [0, 1, 2, 3].map(|seed| {
                let pipeline = &pipeline;
                scope.spawn(move || {
                    // leaves in between, and somebody else may have its number then
                    for turn in 0..4 {
                        let mut client = pipeline.client().unwrap();
                        converse(&mut client, 2 + workers.len(), seed * 100 + turn, 15);
                    }
                })
            });
            // each loss is longer made good than it takes to be lost: there is an end to them
            for _ in 0..20 {
                sleep(3000 * US);
                cuts.iter().for_each(Cut::now);
            }
            drop(threads);
        });
        let snapshot = pipeline.client().unwrap().snapshot().unwrap();
        let lost: u32 = snapshot.stages.iter().map(|stage| stage.stats.reconnects).sum();
        assert!(workers.is_empty() || lost > 0, "nothing was lost");
    }
}

#[test]
fn a_second_client_is_not_kept_by_an_answer_that_does_not_come() {
    let long = Duration::from_secs(3);
    let (pipeline, _) = pipeline(Duration::ZERO, &[long], 2);
    let (begun, has_begun) = channel();
    let has_come = AtomicBool::new(false);
    scope(|scope| {
        let mut first = pipeline.client().unwrap();
        let (has_come, begun) = (&has_come, begun);
        scope.spawn(move || {
            let steps = std::iter::once_with(|| {
                begun.send(()).unwrap();
                step(0, &[1])
            });
            first.run(steps, None, Some).unwrap();
            has_come.store(true, Ordering::SeqCst);
        });
        has_begun.recv().unwrap();
        // the first one reads by now
        sleep(100_000 * US);
        pipeline.client().unwrap().snapshot().unwrap();
        assert!(!has_come.load(Ordering::SeqCst), "it waited for the other one's answer");
    });
}

#[test]
fn there_are_as_many_clients_as_sessions_and_each_begins_empty() {
    let (pipeline, _) = pipeline(Duration::ZERO, &[Duration::ZERO], 2);
    let mut first = pipeline.client().unwrap();
    let second = pipeline.client().unwrap();
    assert_ne!(first.session(), second.session());
    let Err(error) = pipeline.client() else { panic!("a third of two") };
    assert_eq!(
        (error, error.to_string()),
        (NoSession { sessions: 2 }, "all 2 sessions are in use".to_owned())
    );
    assert_eq!(run(&mut first, vec![step(0, &[5, 6])]).unwrap().len(), 2);
    let number = first.session();
    drop(first);
    let mut third = pipeline.client().unwrap();
    assert_eq!(third.session(), number);
    assert_eq!(run(&mut third, vec![step(0, &[7])]).unwrap(), [7.0]);
}

#[test]
fn an_error_is_its_session_s_and_it_goes_on_from_where_it_is_rewound_to() {
    let (pipeline, _) = pipeline(10 * US, &[10 * US], 2);
    let mut other = pipeline.client().unwrap();
    scope(|scope| {
        scope.spawn(|| converse(&mut other, 3, 1, 40));
        let mut client = pipeline.client().unwrap();
        for _ in 0..20 {
            assert_eq!(run(&mut client, vec![step(0, &[1])]).unwrap(), [1.0]);
            let error = run(&mut client, vec![step(1, &[2]), step(2, &[FAILS_AT]), step(3, &[1])]);
            assert!(matches!(error, Err(PipelineError::Stage { .. })), "{error:?}");
            client.rewind(1);
            assert_eq!(run(&mut client, vec![step(1, &[2])]).unwrap(), [5.0]);
            client.rewind(0);
        }
    });
}

#[test]
fn a_caller_that_panics_takes_its_steps_back() {
    let (pipeline, _) = pipeline(10 * US, &[10 * US], 2);
    let mut client = pipeline.client().unwrap();
    let steps = (0..20).map(|i| step(i, &[1])).collect::<Vec<_>>();
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        client.run(
            steps,
            None,
            |logits| if logits == [4.0] { panic!("the caller's own") } else { Some(logits) },
        )
    }));
    assert!(caught.is_err());
    client.rewind(0);
    assert_eq!(run(&mut client, vec![step(0, &[9])]).unwrap(), [9.0]);
    assert_eq!(run(&mut pipeline.client().unwrap(), vec![step(0, &[3])]).unwrap(), [3.0]);
}

#[test]
fn steps_that_panic_while_they_are_made_leave_nothing_behind() {
    let (pipeline, _) = pipeline(10 * US, &[10 * US], 1);
    let mut client = pipeline.client().unwrap();
    let made = |i: u32| if i == 4 { panic!("the caller's own") } else { step(i, &[1]) };
    let caught =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| client.run((0..20).map(made), None, Some)));
    assert!(caught.is_err());
    client.rewind(0);
    assert_eq!(run(&mut client, vec![step(0, &[9])]).unwrap(), [9.0]);
}

#[test]
fn when_a_stage_panics_under_whoever_drives_nobody_waits_for_ever() {
    let (pipeline, _) = pipeline(50 * US, &[50 * US], 3);
    let errors: Vec<PipelineError> = scope(|scope| {
        let client = || pipeline.client().unwrap();
        let talk = |mut client: Client| {
            let mut at = 0;
            loop {
                match run(&mut client, vec![step(at, &[1])]) {
                    Ok(_) => at += 1,
                    Err(error) => return error,
                }
            }
        };
        let [a, b, mut bad] = [client(), client(), client()];
        let threads = [scope.spawn(move || talk(a)), scope.spawn(move || talk(b))];
        // whichever thread drives then
        let own = scope.spawn(move || run(&mut bad, vec![step(0, &[PANICS_AT])]));
        let mut errors: Vec<PipelineError> =
            threads.into_iter().filter_map(|thread| thread.join().ok()).collect();
        errors.extend(own.join().ok().and_then(Result::err));
        errors
    });
    assert_eq!(errors.len(), 2, "the thread that panicked, and two that hear of it");
    assert!(errors.iter().all(|error| matches!(error, PipelineError::Abandoned)), "{errors:?}");
}

/// While one session's prompt is evaluated, chunk after chunk on this machine's own device, another one's token comes in
/// between.
#[test]
fn a_token_does_not_wait_for_another_session_s_prompt() {
    let (pipeline, _) = pipeline(1000 * US, &[], 2);
    let [mut long, mut short] = [pipeline.client().unwrap(), pipeline.client().unwrap()];
    let (sender, begun) = channel();
    scope(|scope| {
        let prompt = scope.spawn(move || {
            let mut n = 0;
            let steps = (0..60).map(|i| step(2 * i, &[1, 1])).collect::<Vec<_>>();
            long.run(steps, None, |logits| {
                n += 1;
                sender.send(n).unwrap();
                Some(logits)
            })
        });
        begun.recv().unwrap();
        assert_eq!(run(&mut short, vec![step(0, &[5])]).unwrap(), [5.0]);
        let chunks = begun.try_iter().last().unwrap_or(1);
        assert!(chunks < 40, "{chunks} of 60 chunks came first");
        prompt.join().unwrap().unwrap();
    });
}

#[test]
fn who_wants_to_know_how_it_stands_does_not_wait_for_a_slow_worker() {
    let (pipeline, _) = pipeline(Duration::ZERO, &[Duration::from_millis(400)], 2);
    let [mut slow, other] = [pipeline.client().unwrap(), pipeline.client().unwrap()];
    let begun = Instant::now();
    scope(|scope| {
        let run = scope.spawn(move || run(&mut slow, vec![step(0, &[1])]));
        sleep(Duration::from_millis(50));
        assert_eq!(other.snapshot().unwrap().stages.len(), 3);
        assert!(begun.elapsed() < Duration::from_millis(300), "{:?}", begun.elapsed());
        run.join().unwrap().unwrap();
    });
}

/// A worker that takes 20 s for each step, and somebody who has had enough after the first look.
#[test]
fn steps_that_were_called_off_are_not_waited_for_and_the_session_goes_on() {
    let (shared, _) = pipeline(US, &[Duration::from_secs(20)], 2);
    let stop = AtomicBool::new(false);
    let (done, ended) = channel();
    scope(|scope| {
        for _ in 0..2 {
            let mut client = shared.client().unwrap();
            let (stop, done) = (&stop, done.clone());
            scope.spawn(move || {
                let came_out = client.run((0..3).map(|i| step(i, &[1])), Some(stop), Some);
                done.send(came_out).unwrap();
            });
        }
        sleep(Duration::from_millis(50));
        stop.store(true, Ordering::Relaxed);
        for _ in 0..2 {
            let came_out = ended.recv_timeout(Duration::from_secs(10)).expect("it waits for the worker");
            assert_eq!(came_out.unwrap(), 0);
        }
    });
}

/// It asks for no step, and so leaves nothing to do; whoever drives has his logits by then.
#[test]
fn a_rewind_that_comes_while_another_session_s_step_comes_out_is_no_harm_to_it() {
    let here = || StageSlot::Local(Box::new(SleepingStage::new(US)));
    let mut pipeline = Pipeline::new(vec![here(), here()], RowType::F32, Patience::default());
    let other = Arc::new(Mutex::new(None::<Client>));
    let rewinds = Arc::clone(&other);
    pipeline.trace(move |traced| {
        if let (Happened::Out(_), Some(other)) = (traced.what, &mut *rewinds.lock().unwrap()) {
            other.rewind(0);
        }
    });
    let shared = SharedPipeline::new(pipeline, 2);
    let mut client = shared.client().unwrap();
    *other.lock().unwrap() = Some(shared.client().unwrap());
    assert_eq!(run(&mut client, vec![step(0, &[1]), step(1, &[2])]).unwrap(), [1.0, 4.0]);
    let mut other = other.lock().unwrap().take().unwrap();
    assert_eq!(run(&mut other, vec![step(0, &[5])]).unwrap(), [5.0]);
}

/// What hears of an event is called by whoever drives, and would wait for itself.
#[test]
fn who_is_told_something_by_the_driver_cannot_wait_for_it_and_nobody_is_the_worse_for_it() {
    let here = || StageSlot::Local(Box::new(SleepingStage::new(US)));
    let mut pipeline = Pipeline::new(vec![here(), here()], RowType::F32, Patience::default());
    let (told, asked) = (Arc::new(Mutex::new(None::<Client>)), Arc::new(Mutex::new(Vec::new())));
    let (within, answers) = (Arc::clone(&told), Arc::clone(&asked));
    pipeline.trace(move |_| {
        if let Some(mut client) = within.lock().unwrap().take() {
            let mut answers = answers.lock().unwrap();
            answers.push(client.snapshot().map(drop));
            answers.push(run(&mut client, vec![step(0, &[9])]).map(drop));
        }
    });
    let shared = SharedPipeline::new(pipeline, 2);
    let mut client = shared.client().unwrap();
    *told.lock().unwrap() = Some(shared.client().unwrap());
    assert_eq!(run(&mut client, vec![step(0, &[1]), step(1, &[2])]).unwrap(), [1.0, 4.0]);
    let asked = asked.lock().unwrap();
    assert!(asked.len() == 2 && asked.iter().all(|answer| matches!(answer, Err(PipelineError::FromWithin))));
    // and the other session is free again, and empty
    assert_eq!(run(&mut shared.client().unwrap(), vec![step(0, &[5])]).unwrap(), [5.0]);
}

/// All of a session.
fn saved(client: &Client, length: u32) -> Vec<SavedStep> {
    client.save_steps(0, length, 4).unwrap()
}

#[test]
fn a_session_that_was_saved_goes_on_in_another_pipeline_though_workers_are_lost_there() {
    for workers in [&[][..], &[20 * US], &[20 * US, 50 * US]] {
        for seed in 0..12 {
            let (before, _) = pipeline(Duration::ZERO, workers, 3);
            // the neighbour's steps stand between the session's, before and behind
            let (mut neighbour, mut client) = (before.client().unwrap(), before.client().unwrap());
            run(&mut neighbour, vec![step(0, &[3; 5])]).unwrap();
            let mut length = 0u32;
            for turn in 0..8 {
                let n = 1 + random(seed, turn) as u32 % 6;
                let tokens: Vec<i32> =
                    (0..n).map(|i| 1 + (random(seed, 100 + turn) % 40) as i32 + i as i32).collect();
                run(&mut client, vec![step(length, &tokens)]).unwrap();
                length += n;
                if turn % 3 == 2 {
                    length -= random(seed, 200 + turn) as u32 % length.min(7);
                    client.rewind(length);
                }
                run(&mut neighbour, vec![step(5 + turn as u32, &[2])]).unwrap();
            }
            // the last rewind has not come through, and is none of the saver's business
            let steps = saved(&client, length);
            assert_eq!(steps.last().map(SavedStep::end), Some(length), "seed {seed}");
            let next = vec![step(length, &[7, 8]), step(length + 2, &[9])];
            let expected = run(&mut client, next.clone()).unwrap();

            let (after, cuts) = pipeline(Duration::ZERO, workers, 3);
            let _other = after.client().unwrap();
            let mut client = after.client().unwrap();
            run(&mut client, vec![step(0, &[1, 2, 3])]).unwrap();
            client.rewind(0);
            if seed % 2 == 0 {
                cuts.iter().for_each(Cut::now);
            }
            assert_eq!(client.restore(steps.clone(), None).unwrap(), steps.len());
            if seed % 3 == 0 {
                // what was restored is replayed as anything else is
                cuts.iter().for_each(Cut::now);
            }
            assert_eq!(run(&mut client, next).unwrap(), expected, "seed {seed}, {} workers", workers.len());
            assert_eq!(saved(&client, length), steps, "and is saved as it was");
        }
    }
}

#[test]
fn what_is_restored_is_not_evaluated_here() {
    let stages = [SleepingStage::new(Duration::ZERO), SleepingStage::new(Duration::ZERO)];
    let counts = stages.each_ref().map(SleepingStage::n_evaluated);
    let stages = stages.into_iter().map(|stage| StageSlot::Local(Box::new(stage))).collect();
    let pipeline = SharedPipeline::new(Pipeline::new(stages, RowType::F32, Patience::default()), 2);
    let (mut first, mut second) = (pipeline.client().unwrap(), pipeline.client().unwrap());
    run(&mut first, vec![step(0, &[1, 2, 3])]).unwrap();
    let steps = saved(&first, 3);
    second.restore(steps.clone(), None).unwrap();
    assert_eq!(run(&mut first, vec![step(3, &[4])]).unwrap(), run(&mut second, vec![step(3, &[4])]).unwrap());
    assert_eq!(counts.map(|n| n.load(Ordering::Relaxed)), [5, 5]);
    // of other stages, or out of place: the session ends, and begins anew
    let other = SavedStep { states: vec![vec![0; 12]], ..steps[0].clone() };
    second.rewind(0);
    assert!(second.restore([other], None).is_err());
    second.rewind(0);
    assert!(second.restore([SavedStep { position: 1, ..steps[0].clone() }], None).is_err());
    second.rewind(0);
    assert_eq!(second.restore(steps, None).unwrap(), 1);
    assert_eq!(saved(&second, 3), saved(&first, 3));
    assert!(first.save_steps(4, 9, 4).is_err(), "it does not hold them");
}
