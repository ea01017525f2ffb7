//! What the driver makes of its stages: 20 steps that are there at once, on stages that only take their time, over the
//! bound of the busiest device; and what a step costs that nothing computes.
//!
//! The answers are asserted before anything is said about time. The simulated column is exact and asserted too; the
//! other is the real pipeline on threads that sleep, so it has the machine's delays in it. Filling and draining are
//! part of both: 1.03 to 1.07 with one and two workers, up to 1.12 with three.
//!
//!     cargo bench -p dim-core --bench driver
//!     STEPS=100000 ROUNDS=9 cargo bench -p dim-core --bench driver

use std::collections::VecDeque;
use std::hint::black_box;
use std::time::{Duration, Instant};

use dim_core::bell::Bell;
use dim_core::blocks::BlockRange;
use dim_core::fakes::{SleepingStage, SleepingWorker, Sums};
use dim_core::ids::{JobId, SessionId};
use dim_core::pipeline::{Advance, Patience, Pipeline, StageSlot, Step};
use dim_core::rows::{RowType, Rows, RowsRef};
use dim_core::schedule::StepKind;
use dim_core::shared::SharedPipeline;
use dim_core::simulator::{Cost, Simulator, StageModel};
use dim_core::stage::{Answer, LocalStage, RemoteStage, Span, StageError, StageInput, StageOutput, Traffic};

/// Stages in ms, and how much of the bound they may take.
const TABLE: [(&[u64], f64); 4] = [
    (&[10, 60, 10], 1.10),
    (&[10, 60, 60, 10], 1.15),
    (&[10, 30, 90, 10], 1.15),
    (&[10, 60, 60, 60, 10], 1.25),
];
const ONE_WAY_MS: [u64; 2] = [0, 5];
const STEPS: u32 = 20;
const SESSION: SessionId = SessionId(0);
const AGREED: usize = 8;

fn main() {
    println!("{STEPS} steps at once, time over the bound of the busiest device\n");
    println!(
        "{:<18} {:>10} {:>10} {:>10} {:>10}",
        "stages, ms", "one way", "at most", "simulated", "threads"
    );
    for (stages, most) in TABLE {
        for one_way in ONE_WAY_MS {
            let last = stages.len() - 1;
            let host = stages[0] + stages[last];
            let bound = stages[1..last].iter().copied().max().unwrap_or(0).max(host) * u64::from(STEPS);
            let over = |took: Duration| took.as_secs_f64() * 1e3 / bound as f64;
            let simulated = over(simulated(stages, one_way));
            let threads = over(on_threads(stages, one_way));
            let name = stages.iter().map(u64::to_string).collect::<Vec<_>>().join("/");
            println!("{name:<18} {one_way:>7} ms {most:>10.2} {simulated:>10.3} {threads:>10.3}");
            assert!(simulated <= most, "{name} at {one_way} ms: {simulated} of the bound");
        }
    }
    cost_of_a_step();
}

fn simulated(stages: &[u64], one_way: u64) -> Duration {
    let last = stages.len() - 1;
    let models = stages.iter().enumerate().map(|(i, &ms)| {
        let cost = Cost { step: Duration::from_millis(ms), row: Duration::ZERO };
        match i {
            _ if i == 0 || i == last => StageModel::Local(cost),
            _ => StageModel::Remote {
                cost,
                one_way: Duration::from_millis(one_way),
                agreed: AGREED,
                losses: VecDeque::new(),
            },
        }
    });
    let mut simulator = Simulator::new(models.collect(), Patience::default());
    let jobs: Vec<JobId> = (0..STEPS).map(|_| simulator.submit(SESSION, StepKind::Decode, 1)).collect();
    let out: Vec<JobId> = std::iter::from_fn(|| simulator.advance()).collect();
    assert_eq!(out, jobs);
    simulator.now()
}

fn on_threads(stages: &[u64], one_way: u64) -> Duration {
    let last = stages.len() - 1;
    let ms = Duration::from_millis;
    let slots = stages.iter().enumerate().map(|(i, &compute)| match i {
        _ if i == 0 || i == last => StageSlot::Local(Box::new(SleepingStage::new(ms(compute)))),
        _ => StageSlot::Remote(Box::new(SleepingWorker::start(ms(compute), ms(one_way), AGREED))),
    });
    let mut pipeline = Pipeline::new(slots.collect(), RowType::F32, Patience::default());
    let begun = Instant::now();
    for position in 0..STEPS {
        pipeline.submit(Step::decode(SESSION, position, position as i32));
    }
    let mut out = Vec::new();
    while let Advance::Finished(finished) = pipeline.advance(None) {
        out.extend(finished.outcome.expect("nothing can go wrong"));
    }
    let took = begun.elapsed();
    // every stage sums up what came before, so each step went through each of them, in order
    let all = [Span { session: SESSION.0, position: 0, count: STEPS }];
    let tokens: Vec<f32> = (0..STEPS).map(|token| token as f32).collect();
    let expected = stages.iter().fold(tokens, |values, _| Sums::default().step(&all, &values));
    assert_eq!(out, expected);
    took
}

/// One session over one worker, a step at a time, and nothing computes: what is left is the driver.
fn cost_of_a_step() {
    let over_one_worker = || {
        let stages = vec![
            StageSlot::Local(Box::new(Adder)),
            StageSlot::Remote(Box::new(Instantly::default())),
            StageSlot::Local(Box::new(Adder)),
        ];
        Pipeline::new(stages, RowType::F32, Patience::default())
    };
    let mut pipeline = over_one_worker();
    let step = |position| {
        if position == 0 {
            pipeline.rewind(SESSION, 0);
        }
        pipeline.submit(Step::decode(SESSION, position, 7));
        let Advance::Finished(finished) = pipeline.advance(None) else { panic!("nothing came out") };
        let logits = finished.outcome.expect("nothing can go wrong");
        assert_eq!(black_box(&logits)[..], [10.0]);
        pipeline.reuse(logits);
    };
    println!();
    per_step("one session, one worker, no compute", step);

    let shared = SharedPipeline::new(over_one_worker(), 1);
    let mut client = shared.client().expect("nobody else has it");
    let step = |position| {
        if position == 0 {
            client.rewind(0);
        }
        let check = |logits: Vec<f32>| {
            assert_eq!(black_box(&logits)[..], [10.0]);
            Some(logits)
        };
        client.run([Step::decode(SESSION, position, 7)], None, check).expect("nothing can go wrong");
    };
    per_step("the same, of a pipeline that threads may share", step);
}

/// Times a step at every position of a conversation, again and again.
fn per_step(what: &str, mut step: impl FnMut(u32)) {
    let number = |name, default: u32| std::env::var(name).map_or(default, |n| n.parse().expect("a number"));
    let (steps, rounds) = (number("STEPS", 100_000), number("ROUNDS", 9));
    let round = |_| {
        let begun = Instant::now();
        (0..steps).for_each(&mut step);
        begun.elapsed().as_nanos() / u128::from(steps)
    };
    let mut nanos: Vec<u128> = (0..rounds).map(round).collect();
    nanos.sort_unstable();
    let (median, fastest) = (nanos[nanos.len() / 2], nanos[0]);
    println!("{what}: {median} ns a step (median of {rounds}; fastest {fastest})");
}

/// Adds one to each row.
struct Adder;

impl LocalStage for Adder {
    fn name(&self) -> String {
        "local".to_owned()
    }
    fn blocks(&self) -> Option<BlockRange> {
        None
    }
    fn evaluate(
        &mut self,
        _: &[Span],
        input: StageInput<'_>,
        output: StageOutput<'_>,
    ) -> Result<Duration, StageError> {
        let out = match output {
            StageOutput::Rows(Rows::F32(out)) => out,
            StageOutput::Logits { out, .. } => out,
            StageOutput::Rows(Rows::F16(_)) => unreachable!("the rows are F32"),
        };
        out.clear();
        match input {
            StageInput::Tokens(tokens) => out.extend(tokens.iter().map(|&token| token as f32 + 1.0)),
            StageInput::Rows { rows: RowsRef::F32(rows), .. } => out.extend(rows.iter().map(|x| x + 1.0)),
            StageInput::Rows { rows: RowsRef::F16(_), .. } => unreachable!("the rows are F32"),
        }
        Ok(Duration::ZERO)
    }
    fn rewind(&mut self, _: SessionId, _: u32) -> Result<(), StageError> {
        Ok(())
    }
}

fn values(rows: &Rows) -> &[f32] {
    match rows {
        Rows::F32(rows) => rows,
        Rows::F16(_) => unreachable!("the rows are F32"),
    }
}

fn give(to: &mut Rows, from: &[f32]) {
    if let Rows::F32(to) = to {
        to.clear();
        to.extend_from_slice(from);
    }
}

/// A worker that adds one and has its answer at once.
#[derive(Default)]
struct Instantly {
    answers: VecDeque<(JobId, Vec<f32>)>,
    spare: Vec<Vec<f32>>,
}

impl RemoteStage for Instantly {
    fn name(&self) -> String {
        "remote".to_owned()
    }
    fn blocks(&self) -> Option<BlockRange> {
        None
    }
    fn max_in_flight(&self) -> usize {
        4
    }
    fn submit(&mut self, job: JobId, _: &[Span], _: &[i32], rows: &Rows) -> Result<(), StageError> {
        let mut answer = self.spare.pop().unwrap_or_default();
        answer.clear();
        answer.extend(values(rows).iter().map(|x| x + 1.0));
        self.answers.push_back((job, answer));
        Ok(())
    }
    fn poll(&mut self, rows: &mut Rows) -> Result<Option<Answer>, StageError> {
        let Some((job, answer)) = self.answers.pop_front() else { return Ok(None) };
        give(rows, &answer);
        self.spare.push(answer);
        Ok(Some(Answer::done(job, Duration::ZERO, Duration::ZERO)))
    }
    fn collect_until(&mut self, rows: &mut Rows, _: Option<Instant>) -> Result<Option<Answer>, StageError> {
        self.poll(rows)
    }
    fn notify(&mut self, _: Option<Bell>) {}
    fn rewind(&mut self, _: SessionId, _: u32) -> Result<(), StageError> {
        Ok(())
    }
    fn begin_reconnect(&mut self, _: &Bell) {}
    fn poll_connected(&mut self) -> Result<bool, StageError> {
        Ok(true)
    }
    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}
