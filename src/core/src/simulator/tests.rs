use super::*;
use crate::pipeline::fakes::{drain, models, timed};
use crate::pipeline::{Advance, Finished, Step};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Losses never end these runs.
const PATIENT: Patience = Patience {
    give_up_after: Duration::from_secs(1_000_000),
    paused_for: Duration::from_secs(1_000_000),
    first_pause: Duration::from_millis(200),
    longest_pause: Duration::from_secs(5),
};

/// The pipelines of the table: stages in ms, and how much of the bound 20 steps may take that are there at once. Filling
/// and draining are part of it.
const TABLE: [(&[u64], f64); 4] = [
    (&[10, 60, 10], 1.10),
    (&[10, 60, 60, 10], 1.15),
    (&[10, 30, 90, 10], 1.15),
    (&[10, 60, 60, 60, 10], 1.25),
];

/// Time over that of the busiest device alone.
fn over_the_bound(stages_ms: &[u64], took: Duration) -> f64 {
    let last = stages_ms.len() - 1;
    let bound = stages_ms[1..last].iter().copied().max().unwrap().max(stages_ms[0] + stages_ms[last]) * 20;
    took.as_secs_f64() * 1e3 / bound as f64
}

#[test]
fn whichever_worker_answers_first_is_heard_first() {
    for (stages, most) in TABLE {
        for one_way_ms in [0, 5] {
            let (mut pipeline, world) = timed(&models(stages, one_way_ms, 8), PATIENT);
            for position in 0..20 {
                pipeline.submit(Step::decode(SessionId(0), position, 1));
            }
            assert_eq!(drain(&mut pipeline).len(), 20);
            let ratio = over_the_bound(stages, world.elapsed());
            println!("{stages:?} ms, one way {one_way_ms} ms: {ratio:.2} of the bound");
            assert!(ratio <= most, "{stages:?} ms, one way {one_way_ms} ms: {ratio:.2} of the bound");
        }
    }
}

/// A worker that is quick and far away is kept busy by a window as long as the way, and no longer than was agreed.
#[test]
fn the_window_fills_the_way_to_a_quick_worker() {
    let took = |agreed| {
        let mut simulator = Simulator::new(models(&[1, 10, 1], 20, agreed), PATIENT);
        for _ in 0..100 {
            simulator.submit(SessionId(0), StepKind::Decode, 1);
        }
        while simulator.advance().is_some() {}
        simulator.now().as_millis()
    };
    // 100 steps of 10 ms; the round trip is 40 ms: two at a time take 50 ms, five are always enough
    assert!(took(2) >= 2500, "{} ms", took(2));
    assert!(took(8) <= 1150, "{} ms", took(8));
}

/// Eight replies over an even cut and a way of 5 ms: each device computes one half of them while the other has the other.
/// All in one batch would take half as long again, each alone twice as long.
#[test]
fn replies_of_several_sessions_keep_both_devices_busy() {
    let cost = |step_ms: f64, row_ms: f64| Cost {
        step: Duration::from_secs_f64(step_ms / 1e3),
        row: Duration::from_secs_f64(row_ms / 1e3),
    };
    let took = |batch_rows| {
        let (losses, one_way) = (VecDeque::new(), Duration::from_millis(5));
        let stages = vec![
            StageModel::Local(cost(7.0, 3.0)),
            StageModel::Remote { cost: cost(14.0, 6.0), one_way, agreed: 8, losses },
            StageModel::Local(cost(7.0, 3.0)),
        ];
        let mut simulator = Simulator::new(stages, PATIENT);
        simulator.set_batch_rows(batch_rows);
        let mut of = BTreeMap::new();
        for session in (0..8).map(SessionId) {
            of.insert(simulator.submit(session, StepKind::Decode, 1), (session, 1));
        }
        while let Some(job) = simulator.advance() {
            let (session, n) = of[&job];
            if n < 50 {
                of.insert(simulator.submit(session, StepKind::Decode, 1), (session, n + 1));
            }
        }
        simulator.now().as_secs_f64() * 1e3 / 50.0
    };
    let (alone, batched) = (took(1), took(16));
    // of four rows 38 ms on each device and 10 ms on the way: 86 ms a round; filling and draining are part of it
    println!("a round of eight: {batched:.1} ms, each alone {alone:.1} ms");
    assert!(batched < 86.0 * 1.03, "{batched:.1} ms");
    assert!(alone > 160.0 * 0.99, "{alone:.1} ms");
}

#[derive(Clone, Debug)]
enum Op {
    /// steps of a session, with so many rows each
    Feed(u32, Vec<u32>),
    /// a session goes back by so many rows
    Rewind(u32, u32),
    /// a session's steps from one of its last on are given up
    Cancel(u32, usize),
    /// so many steps come out
    Advance(usize),
}

/// What is done to both, and what each says came out.
struct Both {
    pipeline: crate::pipeline::Pipeline,
    simulator: Simulator,
    trace: Arc<Mutex<Vec<Traced>>>,
    out: Vec<Finished>,
    /// per session: its length when everything is done, and its steps since the last rewind with their positions
    plan: BTreeMap<u32, (u32, Vec<(JobId, u32)>)>,
    /// jobs that must come out, in order of their session
    expected: BTreeMap<u32, Vec<JobId>>,
}

impl Both {
    fn new(stages: Vec<StageModel>, batch_rows: u32) -> Both {
        let (mut pipeline, _) = timed(&stages, PATIENT);
        let mut simulator = Simulator::new(stages, PATIENT);
        let trace = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&trace);
        pipeline.trace(move |event| kept.lock().unwrap().push(event));
        pipeline.set_batch_rows(batch_rows);
        simulator.set_batch_rows(batch_rows);
        Both { pipeline, simulator, trace, out: Vec::new(), plan: BTreeMap::new(), expected: BTreeMap::new() }
    }

    fn feed(&mut self, session: u32, rows: u32) {
        let (at, steps) = self.plan.entry(session).or_default();
        let kind = if rows <= 2 { StepKind::Decode } else { StepKind::Prefill };
        let tokens = (0..rows).map(|i| ((*at + i) * 7 + session) as i32 % 13 + 1).collect();
        let want_logits = vec![true; rows as usize];
        let id = SessionId(session);
        let job = self.pipeline.submit(Step { session: id, position: *at, tokens, want_logits, kind });
        assert_eq!(self.simulator.submit(id, kind, rows), job);
        steps.push((job, *at));
        self.expected.entry(session).or_default().push(job);
        *at += rows;
    }

    fn rewind(&mut self, session: u32, to: u32) {
        let (at, steps) = self.plan.entry(session).or_default();
        (*at, *steps) = (to, Vec::new());
        let job = self.pipeline.rewind(SessionId(session), to);
        assert_eq!(self.simulator.rewind(SessionId(session)), job);
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Feed(session, counts) => counts.iter().for_each(|&rows| self.feed(*session, rows)),
            Op::Rewind(session, by) => {
                let at = self.plan.get(session).map_or(0, |plan| plan.0);
                self.rewind(*session, at.saturating_sub(*by));
            }
            Op::Cancel(session, back) => {
                let steps = self.plan.get(session).map_or(&[][..], |plan| &plan.1);
                let Some(&(job, position)) = steps.len().checked_sub(back + 1).and_then(|i| steps.get(i))
                else {
                    return;
                };
                self.pipeline.cancel(SessionId(*session), job);
                self.simulator.cancel(SessionId(*session), job);
                let came_out: Vec<JobId> = self.out.iter().map(|finished| finished.job).collect();
                let expected = self.expected.entry(*session).or_default();
                expected.retain(|id| *id < job || came_out.contains(id));
                self.rewind(*session, position);
            }
            Op::Advance(n) => {
                for _ in 0..*n {
                    self.advance();
                }
            }
        }
    }

    fn advance(&mut self) -> bool {
        let simulated = self.simulator.advance();
        let finished = match self.pipeline.advance(None) {
            Advance::Finished(finished) => Some(finished),
            Advance::Idle => None,
            Advance::Later => unreachable!("there is no deadline"),
        };
        assert_eq!(finished.as_ref().map(|finished| finished.job), simulated);
        self.out.extend(finished);
        simulated.is_some()
    }
}

/// Runs it all; every job's logits.
fn run(
    stages: Vec<StageModel>,
    batch_rows: u32,
    ops: &[Op],
) -> Result<BTreeMap<JobId, Vec<f32>>, TestCaseError> {
    let mut both = Both::new(stages, batch_rows);
    ops.iter().for_each(|op| both.apply(op));
    while both.advance() {}
    let trace = both.trace.lock().unwrap();
    let differ = trace.iter().zip(both.simulator.trace()).position(|(a, b)| a != b);
    if let Some(at) = differ {
        let (a, b) = (&trace[at.saturating_sub(16)..], &both.simulator.trace()[at.saturating_sub(16)..]);
        prop_assert_eq!(&a[..a.len().min(20)], &b[..b.len().min(20)]);
    }
    prop_assert_eq!(trace.len(), both.simulator.trace().len());
    for (session, expected) in &both.expected {
        let own = both.out.iter().filter(|finished| finished.session.0 == *session);
        let own: Vec<JobId> = own.map(|finished| finished.job).collect();
        prop_assert_eq!(&own, expected, "what comes out of session {}, in its order", session);
    }
    Ok(both.out.iter().map(|finished| (finished.job, finished.outcome.as_ref().unwrap().clone())).collect())
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let feed = (0u32..3, proptest::collection::vec(1u32..6, 1..6))
        .prop_map(|(session, counts)| Op::Feed(session, counts));
    let rewind = (0u32..3, 0u32..9).prop_map(|(session, by)| Op::Rewind(session, by));
    let cancel = (0u32..3, 0usize..4).prop_map(|(session, back)| Op::Cancel(session, back));
    let advance = (0usize..5).prop_map(Op::Advance);
    proptest::collection::vec(prop_oneof![4 => feed, 1 => rewind, 1 => cancel, 3 => advance], 1..16)
}

fn cost() -> impl Strategy<Value = Cost> {
    (0u64..40, 0u64..10)
        .prop_map(|(step, row)| Cost { step: Duration::from_millis(step), row: Duration::from_millis(row) })
}

fn remote() -> impl Strategy<Value = StageModel> {
    let losses = proptest::collection::vec((1u64..400, 0u64..300), 0..4);
    (cost(), 0u64..30, 1usize..9, losses).prop_map(|(cost, one_way, agreed, losses)| {
        let ms = Duration::from_millis;
        let mut at = Duration::ZERO;
        let losses = losses.into_iter().map(|(after, away)| {
            at += ms(after);
            (at, ms(away))
        });
        StageModel::Remote { cost, one_way: ms(one_way), agreed, losses: losses.collect() }
    })
}

fn stages() -> impl Strategy<Value = Vec<StageModel>> {
    let local = || cost().prop_map(StageModel::Local);
    let middle = prop_oneof![5 => remote(), 1 => local()];
    (local(), proptest::collection::vec(middle, 0..4), local())
        .prop_map(|(head, middle, tail)| std::iter::once(head).chain(middle).chain([tail]).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Random pipelines, costs, round trips, windows, losses, rewinds and cancelled steps of several sessions, with and
    /// without batches: the pipeline does what the simulator says, event by event and at the same times; every step
    /// comes out in its session's order; and its numbers are those of a run alone in which nothing is ever lost.
    #[test]
    fn the_simulator_s_trace_is_the_pipeline_s(stages in stages(), ops in ops(), batch_rows in 1u32..5) {
        let alone = run(models(&vec![1; stages.len()], 0, 2), 1, &ops)?;
        let got = run(stages, batch_rows, &ops)?;
        for (job, logits) in &got {
            // a step that was cancelled may have come out before in one of them only
            if let Some(expected) = alone.get(job) {
                prop_assert_eq!(logits, expected, "{}", job);
            }
        }
    }
}
