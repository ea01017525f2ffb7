//! Everything at once, at random and the same each time: several sessions that feed, take back, cancel and give up, over
//! one or two workers that are lost, fail at steps, begin to compute wrongly and are checked, with and without a session to
//! spare, with and without batches, with states that can be taken back and such that cannot. Held against a model of what each session has to get.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};

use super::fakes::*;
use super::*;
use crate::guard::EVERY_ROWS;
use crate::random::random;
use crate::schedule::StepKind;
use crate::stage::StageError;

const CASES: u64 = 600;
/// A row for which a worker reports a fault.
const FAULT: f32 = 100.0;

/// Numbers that are the same in every run.
struct Random {
    seed: u64,
    drawn: u64,
}

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.drawn += 1;
        random(self.seed, self.drawn) % n
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// What a session has been given and has no result for.
enum Given {
    Step { job: JobId, position: u32, end: u32, expected: Vec<f32> },
    Rewind(u32),
}

/// A session as its caller knows it.
#[derive(Default)]
struct Caller {
    given: VecDeque<Given>,
    /// every step it was ever given
    jobs: BTreeSet<JobId>,
    /// where its next step begins
    length: u32,
    /// rows that have come out and were not taken back
    known: u32,
    /// the head or a worker fails at a step that it was given since it last heard of an error
    has_bad: bool,
    /// the same, ever: those of its batch hear of it too
    has_ever_bad: bool,
    /// it was given a wrong row and has not heard of it
    is_misled: bool,
    /// it has given everything up, and was given nothing since
    is_given_up: bool,
    /// it has to be rewound before it goes on
    is_torn: bool,
}

impl Caller {
    /// What it was given will not come out, but its rewinds take effect.
    fn clear(&mut self) {
        for given in self.given.drain(..) {
            if let Given::Rewind(to) = given {
                self.known = self.known.min(to);
            }
        }
        self.is_torn = true;
    }
}

struct Case {
    seed: u64,
    random: Random,
    pipeline: Pipeline,
    /// what the stages have to compute: sums, and in the workers that are guarded one more
    model: Vec<(Sums, f32)>,
    callers: BTreeMap<u32, Caller>,
    has_batches: bool,
    is_heavy: bool,
    may_be_wrong: bool,
    heals: bool,
    /// how often somebody has heard that a worker computes wrongly
    n_wrong: usize,
    /// which values a worker fails at
    fails: bool,
}

impl Case {
    fn new(seed: u64) -> Case {
        let mut random = Random { seed, drawn: 0 };
        let (has_batches, may_be_wrong) = (random.chance(30), random.chance(30));
        let (fails, has_two) = (random.chance(50), random.chance(40));
        let is_guarded = random.chance(70) || may_be_wrong;
        let n_sessions = 1 + random.below(4) as u32;
        let has_spare = random.chance(50);
        // so many rows that checks come while workers are lost
        let is_heavy = is_guarded && random.chance(50);
        let weight =
            if is_heavy { [0, 4][random.below(2) as usize] } else { [0, 3, 15][random.below(3) as usize] };
        let breaks = (0..if is_heavy { 1000 } else { random.below(200) })
            .map(|_| random.chance(weight))
            .collect::<VecDeque<bool>>();
        let breaks = Arc::new(Mutex::new(breaks));
        // a worker that answers wrongly, is lost and comes back right is not found out
        let heals = random.chance(50) && weight == 0 && !fails;
        let wrong_from = may_be_wrong.then(|| random.below(40) as usize);
        let take_back = if random.chance(30) { TakeBack::NOTHING } else { TakeBack::ALL };
        let goes_on = random.chance(50);
        let mut worker = |wrong_from| Scripted {
            memory: Memory::new(take_back),
            goes_on,
            breaks: Arc::clone(&breaks),
            fails_at: fails.then_some(FAULT),
            wrong_from,
            heals,
            lag: random.below(3) as usize,
            ..Scripted::new(&[])
        };
        let stages = 1 + usize::from(has_two);
        let workers: Vec<Scripted> = (0..stages).map(|i| worker(wrong_from.filter(|_| i == 0))).collect();
        let spare = if has_spare { n_sessions } else { 0 };
        let mut pipeline = match is_guarded {
            true => {
                let workers = workers.into_iter().map(|worker| guarded(worker, spare)).collect();
                scripted_with(workers, PATIENT, take_back)
            }
            false => scripted_with(workers, PATIENT, take_back),
        };
        if has_batches {
            pipeline.set_batch_rows(4);
        }
        pipeline.set_shared(random.chance(50));
        let of_worker = (Sums::default(), f32::from(u8::from(is_guarded)));
        let mut model = vec![of_worker; stages];
        model.insert(0, (Sums::default(), 0.0));
        model.push((Sums::default(), 0.0));
        let callers = (0..n_sessions).map(|session| (session, Caller::default())).collect();
        Case {
            seed,
            random,
            pipeline,
            model,
            callers,
            has_batches,
            is_heavy,
            may_be_wrong,
            heals,
            n_wrong: 0,
            fails,
        }
    }

    /// What has to come out of a step, and whether some stage fails at it.
    fn expect(&mut self, span: Span, tokens: &[i32]) -> (Vec<f32>, bool) {
        let mut is_bad = tokens.contains(&BAD_TOKEN);
        let mut values: Vec<f32> = tokens.iter().map(|&token| token as f32).collect();
        let last = self.model.len() - 1;
        for (at, (sums, more)) in self.model.iter_mut().enumerate() {
            values = sums.step(&[span], &values);
            values.iter_mut().for_each(|value| *value += *more);
            is_bad |= self.fails && (1..last).contains(&at) && values.contains(&FAULT);
        }
        (values, is_bad)
    }

    fn submit(&mut self, session: u32, n: u32) {
        if self.callers[&session].is_torn {
            self.rewind(session);
        }
        let mut tokens: Vec<i32> = (0..n).map(|_| 1 + self.random.below(9) as i32).collect();
        if self.random.below(40) == 0 {
            tokens[0] = BAD_TOKEN;
        }
        let position = self.callers[&session].length;
        let (expected, is_bad) = self.expect(Span { session, position, count: n }, &tokens);
        let kind = if n == 1 { StepKind::Decode } else { StepKind::Prefill };
        let want_logits = vec![true; n as usize];
        let job =
            self.pipeline.submit(Step { session: SessionId(session), position, tokens, want_logits, kind });
        let caller = self.callers.get_mut(&session).expect("it is there");
        (caller.length, caller.is_given_up) = (position + n, false);
        caller.jobs.insert(job);
        caller.has_bad |= is_bad;
        caller.has_ever_bad |= is_bad;
        caller.given.push_back(Given::Step { job, position, end: position + n, expected });
    }

    /// To where its caller knows it, or before.
    fn rewind(&mut self, session: u32) {
        let caller = &self.callers[&session];
        let most = if caller.is_torn { caller.known } else { caller.length };
        let to = if self.random.below(3) == 0 { 0 } else { self.random.below(u64::from(most) + 1) as u32 };
        self.rewind_to(session, to);
    }

    fn rewind_to(&mut self, session: u32, to: u32) {
        self.pipeline.rewind(SessionId(session), to);
        self.model.iter_mut().for_each(|(sums, _)| sums.rewind(session, to));
        let caller = self.callers.get_mut(&session).expect("it is there");
        caller.given.push_back(Given::Rewind(to));
        (caller.length, caller.is_torn, caller.is_given_up) = (to, false, false);
        // nothing is left that stands on a wrong row
        caller.is_misled &= to > 0;
    }

    /// A step that has no rewind behind it.
    fn cancel(&mut self, session: u32) {
        let caller = self.callers.get_mut(&session).expect("it is there");
        let Some(&Given::Step { job, position, .. }) = caller.given.back() else { return };
        caller.given.pop_back();
        self.pipeline.cancel(SessionId(session), job);
        if !caller.is_torn {
            self.rewind_to(session, position);
        }
    }

    fn give_up(&mut self, session: u32) {
        self.pipeline.give_up(SessionId(session));
        let caller = self.callers.get_mut(&session).expect("it is there");
        caller.clear();
        // not even an error may come of them
        (caller.has_bad, caller.is_given_up) = (false, true);
    }

    /// A result has to be the oldest of its session, and right; an error has to be about the session.
    fn take(&mut self, finished: Finished) {
        let (seed, session) = (self.seed, finished.session);
        let any_bad = self.callers.values().any(|caller| caller.has_ever_bad);
        let mut others = self.callers.iter().filter(|(of, _)| **of != session.0);
        let is_another_s = others.any(|(_, caller)| caller.jobs.contains(&finished.job));
        let caller = self.callers.get_mut(&session.0).expect("no other session comes out");
        match finished.outcome {
            Ok(values) => loop {
                match caller.given.pop_front() {
                    Some(Given::Rewind(to)) => caller.known = caller.known.min(to),
                    Some(Given::Step { job, end, expected, .. }) => {
                        assert_eq!(job, finished.job, "case {seed}: {session} out of order");
                        caller.known = end;
                        let is_over = caller.given.iter().any(|given| matches!(given, Given::Rewind(0)));
                        caller.is_misled |= values != expected && !is_over;
                        assert!(self.may_be_wrong || values == expected, "case {seed}: {session} at {job}");
                        break;
                    }
                    None => {
                        panic!("case {seed}: {session} has nothing that could come out as {}", finished.job)
                    }
                }
            },
            Err(error) => {
                let is_wrong = match &error {
                    PipelineError::Stage { source: StageError::NotFinite { .. }, .. } => false,
                    PipelineError::Stage { source: StageError::Wrong { .. }, .. } => true,
                    other => panic!("case {seed}: {session}: {other}"),
                };
                assert!(!is_wrong || self.may_be_wrong, "case {seed}: {session}: {error}");
                let own = caller.has_bad || (self.has_batches && any_bad);
                // what a wrong worker gives may be anything
                assert!(is_wrong || own || self.may_be_wrong, "case {seed}: {session}: {error}");
                // its own, or one that fills a recurrent state anew
                assert!(!is_another_s, "case {seed}: {session}: {} is another's", finished.job);
                assert!(!caller.is_given_up, "case {seed}: {session}: {error}, for what it has given up");
                self.n_wrong += usize::from(is_wrong);
                (caller.is_misled, caller.has_bad) = (false, false);
                caller.clear();
            }
        }
    }

    fn advance(&mut self) -> bool {
        for _ in 0..10_000 {
            match self.pipeline.advance(None) {
                Advance::Finished(finished) => {
                    self.take(finished);
                    return true;
                }
                Advance::Idle => return false,
                Advance::Later => {}
            }
        }
        panic!("case {}: it gets nowhere", self.seed)
    }

    fn drain(&mut self) {
        while self.advance() {}
        for (session, caller) in &mut self.callers {
            let left = caller.given.iter().any(|given| matches!(given, Given::Step { .. }));
            assert!(!left, "case {}: session {session} waits for ever", self.seed);
            for given in caller.given.drain(..) {
                if let Given::Rewind(to) = given {
                    caller.known = caller.known.min(to);
                }
            }
        }
    }

    fn run(mut self) {
        for _ in 0..10 + self.random.below(60) {
            let session = self.random.below(self.callers.len() as u64) as u32;
            match self.random.below(20) {
                0..=8 => {
                    let sizes = if self.is_heavy { [1, 1, 5, 512, 512, 512] } else { [1, 1, 1, 2, 5, 40] };
                    let n = sizes[self.random.below(6) as usize];
                    self.submit(session, n);
                }
                9..=10 => self.rewind(session),
                11 => self.cancel(session),
                12 => self.give_up(session),
                13 => self.drain(),
                14 => self.pipeline.interrupt().ask(),
                _ => drop(self.advance()),
            }
        }
        self.drain();
        if self.may_be_wrong {
            self.everybody_hears();
        }
    }

    /// A worker that computes wrongly is found sooner or later; then everybody hears of it who was given something wrong,
    /// with the next step.
    fn everybody_hears(&mut self) {
        // one that is right again is not found a second time
        let before = if self.heals { 0 } else { self.n_wrong };
        for round in 0.. {
            // who was told may have given everything up, and the worker is right again
            if round == 20 && self.heals {
                break;
            }
            assert!(round < 100, "case {}: nobody has noticed", self.seed);
            if self.n_wrong > before {
                break;
            }
            self.rewind_to(0, 0);
            for _ in 0..EVERY_ROWS / 512 {
                self.submit(0, 512);
            }
            self.rewind_to(0, 0);
            self.submit(0, 1);
            self.drain();
        }
        for session in 0..self.callers.len() as u32 {
            if self.callers[&session].is_misled {
                let known = self.callers[&session].known;
                self.rewind_to(session, known);
                self.submit(session, 1);
                self.drain();
                assert!(
                    !self.callers[&session].is_misled,
                    "case {}: session {session} has not heard",
                    self.seed
                );
            }
        }
    }
}

#[test]
fn every_session_gets_its_own_results_in_order_whatever_happens_to_the_others() {
    for seed in 0..CASES {
        Case::new(seed).run();
    }
}
