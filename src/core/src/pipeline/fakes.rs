//! Stages for tests: exact arithmetic, on a clock that the test moves.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;
use crate::ids::JobId;
use crate::rows::RowsRef;
use crate::simulator::{Cost, StageModel};
use crate::stage::{Answer, RemoteStage, StageError};

/// A simulated clock, and when each remote stage has something to tell.
#[derive(Clone)]
pub(crate) struct World {
    start: Instant,
    state: Arc<Mutex<(Duration, Vec<Option<Duration>>)>>,
}

impl World {
    pub(crate) fn new(n_stages: usize) -> World {
        World { start: Instant::now(), state: Arc::new(Mutex::new((Duration::ZERO, vec![None; n_stages]))) }
    }
    pub(crate) fn elapsed(&self) -> Duration {
        self.state.lock().unwrap().0
    }
    fn pass(&self, time: Duration) {
        self.state.lock().unwrap().0 += time;
    }
    fn go_to(&self, time: Duration) {
        let mut state = self.state.lock().unwrap();
        state.0 = state.0.max(time);
    }
    fn is_due(&self, stage: usize, at: Option<Duration>) {
        self.state.lock().unwrap().1[stage] = at;
    }
}

impl Clock for World {
    fn now(&self) -> Instant {
        self.start + self.elapsed()
    }
    fn wait(&self, _: &Bell, until: Option<Instant>) -> bool {
        let next = self.state.lock().unwrap().1.iter().flatten().min().copied();
        let until = until.map(|until| until - self.start);
        self.go_to(next.into_iter().chain(until).min().expect("nothing to wait for, for ever"));
        next.is_some_and(|next| next <= self.elapsed())
    }
}

/// Output depends on everything a cache holds: a row's result is the sum of the session's rows up to it. A wrong, lost
/// or doubled row shows at once.
#[derive(Default, Clone)]
pub(crate) struct Sums(BTreeMap<u32, Vec<f32>>);

impl Sums {
    /// How many rows a session has.
    pub(crate) fn length(&self, session: u32) -> u32 {
        self.0.get(&session).map_or(0, |cells| cells.len() as u32)
    }
    pub(crate) fn rewind(&mut self, session: u32, position: u32) {
        self.0.entry(session).or_default().truncate(position as usize);
    }
    pub(crate) fn step(&mut self, spans: &[Span], values: &[f32]) -> Vec<f32> {
        let places = spans.iter().flat_map(|s| (0..s.count).map(|i| (s.session, s.position + i)));
        let mut row = |session, position: u32, value: f32| {
            let cells = self.0.entry(session).or_default();
            assert_eq!(cells.len(), position as usize, "row out of place");
            let next = cells.last().copied().unwrap_or(0.0) + value;
            cells.push(next);
            next % 1024.0
        };
        places.zip(values).map(|((session, position), &v)| row(session, position, v)).collect()
    }
}

pub(crate) fn floats(h: RowsRef<'_>) -> Vec<f32> {
    match h {
        RowsRef::F32(v) => v.to_vec(),
        RowsRef::F16(v) => v.iter().map(|x| x.to_f32()).collect(),
    }
}

/// A token that no stage can compute.
pub(crate) const BAD_TOKEN: i32 = -1;

pub(crate) struct Local {
    pub(crate) sums: Sums,
    pub(crate) cost: Cost,
    pub(crate) world: World,
    /// cannot take rows back
    pub(crate) is_recurrent: bool,
}

/// What a recurrent state can do: begin anew.
pub(crate) fn check_rewind(is_recurrent: bool, sums: &Sums, session: u32, position: u32) {
    let can = !is_recurrent || position == 0 || position >= sums.length(session);
    assert!(can, "session {session} cannot be taken back to {position}");
}

impl LocalStage for Local {
    fn name(&self) -> String {
        "local".into()
    }
    fn blocks(&self) -> Option<BlockRange> {
        None
    }
    fn evaluate(
        &mut self,
        spans: &[Span],
        input: StageInput<'_>,
        output: StageOutput<'_>,
    ) -> Result<Duration, StageError> {
        let values: Vec<f32> = match input {
            StageInput::Tokens(t) => t.iter().map(|&t| t as f32).collect(),
            StageInput::Rows { rows, .. } => floats(rows),
        };
        if values.contains(&(BAD_TOKEN as f32)) {
            return Err(StageError::NotFinite { block: Some(0), count: 1, said: None });
        }
        let compute = self.cost.of(values.len() as u32);
        self.world.pass(compute);
        let results = self.sums.step(spans, &values);
        match output {
            StageOutput::Rows(h) => *h = Rows::F32(results),
            StageOutput::Logits { rows, out } => {
                out.clear();
                out.extend(results.iter().zip(rows).filter(|(_, w)| **w).map(|(r, _)| *r));
            }
        }
        Ok(compute)
    }
    fn rewind(&mut self, session: SessionId, position: u32) -> Result<(), StageError> {
        check_rewind(self.is_recurrent, &self.sums, session.0, position);
        self.sums.rewind(session.0, position);
        Ok(())
    }
    fn take_back(&self) -> TakeBack {
        if self.is_recurrent { TakeBack::NOTHING } else { TakeBack::ALL }
    }
}

/// A worker as the simulator models it, with a cache. What it has answered once it answers at once.
pub(crate) struct Timed {
    at: usize,
    cost: Cost,
    one_way: Duration,
    agreed: usize,
    losses: VecDeque<(Duration, Duration)>,
    world: World,
    sums: Sums,
    free_at: Duration,
    answers: VecDeque<(Answer, Duration, Vec<f32>)>,
    answered: BTreeSet<JobId>,
    away: Duration,
    back_at: Option<Duration>,
}

impl Timed {
    fn note_due(&self) {
        let answer = self.answers.front().map(|answer| answer.1);
        let loss = self.losses.front().map(|loss| loss.0).filter(|_| answer.is_some());
        self.world.is_due(self.at, self.back_at.into_iter().chain(answer).chain(loss).min());
    }
    fn answer(&mut self, rows: &mut Rows) -> Result<Option<Answer>, StageError> {
        let now = self.world.elapsed();
        let lost_at = self.losses.front().map(|loss| loss.0);
        let front = self.answers.front().map(|answer| answer.1);
        if front.is_some_and(|here| here <= now && lost_at.is_none_or(|lost| here <= lost)) {
            let (answer, _, values) = self.answers.pop_front().expect("the front is there");
            *rows = Rows::F32(values);
            self.answered.insert(answer.job);
            self.note_due();
            return Ok(Some(answer));
        }
        if lost_at.is_some_and(|lost| lost <= now) {
            self.away = self.losses.pop_front().map_or(Duration::ZERO, |loss| loss.1);
            self.answers.clear();
            self.sums = Sums::default();
            self.note_due();
            return Err(StageError::lost("the script says so"));
        }
        Ok(None)
    }
}

impl RemoteStage for Timed {
    fn name(&self) -> String {
        "remote".into()
    }
    fn blocks(&self) -> Option<BlockRange> {
        None
    }
    fn max_in_flight(&self) -> usize {
        self.agreed
    }
    fn submit(&mut self, job: JobId, spans: &[Span], _: &[i32], rows: &Rows) -> Result<(), StageError> {
        assert!(self.answers.len() < self.agreed, "more steps than were agreed on");
        let values = self.sums.step(spans, &floats(rows.as_ref()));
        let now = self.world.elapsed();
        let answer = match self.answered.contains(&job) {
            true => (Answer::done(job, Duration::ZERO, Duration::ZERO), now),
            false => {
                let compute = self.cost.of(values.len() as u32);
                let there = now + self.one_way;
                let wait = self.free_at.saturating_sub(there);
                self.free_at = self.free_at.max(there) + compute;
                (Answer::done(job, compute, wait), self.free_at + self.one_way)
            }
        };
        self.answers.push_back((answer.0, answer.1, values));
        self.note_due();
        Ok(())
    }
    fn poll(&mut self, rows: &mut Rows) -> Result<Option<Answer>, StageError> {
        self.answer(rows)
    }
    fn collect_until(&mut self, rows: &mut Rows, _: Option<Instant>) -> Result<Option<Answer>, StageError> {
        loop {
            if let Some(answer) = self.answer(rows)? {
                return Ok(Some(answer));
            }
            let lost_at = self.losses.front().map(|loss| loss.0);
            let here = self.answers.front().map(|answer| answer.1);
            self.world.go_to(here.into_iter().chain(lost_at).min().expect("an answer to nothing"));
        }
    }
    fn notify(&mut self, _: Option<Bell>) {}
    fn rewind(&mut self, session: SessionId, position: u32) -> Result<(), StageError> {
        self.sums.rewind(session.0, position);
        Ok(())
    }
    fn begin_reconnect(&mut self, _: &Bell) {
        self.back_at = Some(self.world.elapsed() + self.away);
        self.note_due();
    }
    fn poll_connected(&mut self) -> Result<bool, StageError> {
        if self.back_at.is_some_and(|at| at > self.world.elapsed()) {
            return Ok(false);
        }
        self.back_at = None;
        self.free_at = self.world.elapsed();
        self.losses.retain(|loss| loss.0 > self.free_at);
        self.note_due();
        Ok(true)
    }
    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}

/// A pipeline over such stages, and its clock.
pub(crate) fn timed(models: &[StageModel], patience: Patience) -> (Pipeline, World) {
    let world = World::new(models.len());
    let stages = models.iter().enumerate().map(|(at, model)| match model.clone() {
        StageModel::Local(cost) => {
            let (sums, world) = (Sums::default(), world.clone());
            StageSlot::Local(Box::new(Local { sums, cost, world, is_recurrent: false }))
        }
        StageModel::Remote { cost, one_way, agreed, losses } => StageSlot::Remote(Box::new(Timed {
            at,
            cost,
            one_way,
            agreed,
            losses,
            world: world.clone(),
            sums: Sums::default(),
            free_at: Duration::ZERO,
            answers: VecDeque::new(),
            answered: BTreeSet::new(),
            away: Duration::ZERO,
            back_at: None,
        })),
    });
    let stages: Vec<StageSlot> = stages.collect();
    (Pipeline::with_clock(stages, RowType::F32, patience, Box::new(world.clone())), world)
}

/// Stages that take so many milliseconds a step: local at both ends, remote between.
pub(crate) fn models(stages_ms: &[u64], one_way_ms: u64, agreed: usize) -> Vec<StageModel> {
    let last = stages_ms.len() - 1;
    let model = |(i, &ms): (usize, &u64)| {
        let cost = Cost { step: Duration::from_millis(ms), row: Duration::ZERO };
        if i == 0 || i == last {
            return StageModel::Local(cost);
        }
        StageModel::Remote {
            cost,
            one_way: Duration::from_millis(one_way_ms),
            agreed,
            losses: VecDeque::new(),
        }
    };
    stages_ms.iter().enumerate().map(model).collect()
}

/// Everything that comes out until there is nothing under way.
pub(crate) fn drain(pipeline: &mut Pipeline) -> Vec<Finished> {
    let mut all = Vec::new();
    loop {
        match pipeline.advance(None) {
            Advance::Finished(finished) => all.push(finished),
            Advance::Idle => return all,
            Advance::Later => unreachable!("there is no deadline"),
        }
    }
}
