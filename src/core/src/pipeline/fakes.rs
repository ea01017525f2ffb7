//! Stages for tests: exact arithmetic, on a clock that the test moves.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;
use crate::canary::Canary;
pub(crate) use crate::fakes::{Sums, floats, inputs, put_out};
use crate::guard::{Guarded, Room};
use crate::ids::JobId;
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
    pub(crate) fn pass(&self, time: Duration) {
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
    fn wait(&self, _: &Bell, until: Option<Instant>) {
        let next = self.state.lock().unwrap().1.iter().flatten().min().copied();
        let until = until.map(|until| until - self.start);
        self.go_to(next.into_iter().chain(until).min().expect("nothing to wait for, for ever"));
    }
}

/// What takes no time.
pub(crate) const FREE: Cost = Cost { step: Duration::ZERO, row: Duration::ZERO };

/// A token that no stage can compute.
pub(crate) const BAD_TOKEN: i32 = -1;

pub(crate) struct Local {
    pub(crate) memory: Memory,
    pub(crate) cost: Cost,
    pub(crate) world: World,
}

/// What a stage keeps of its sessions, and what it can take back of them.
pub(crate) struct Memory {
    sums: Sums,
    take_back: TakeBack,
    /// rows of each session in the last step
    last: BTreeMap<u32, u32>,
}

impl Memory {
    pub(crate) fn new(take_back: TakeBack) -> Memory {
        Memory { sums: Sums::default(), take_back, last: BTreeMap::new() }
    }
    fn forget(&mut self) {
        *self = Memory::new(self.take_back);
    }
    fn step(&mut self, spans: &[Span], values: &[f32]) -> Vec<f32> {
        self.last = spans.iter().map(|span| (span.session, span.count)).collect();
        self.sums.step(spans, values)
    }
    /// # Panics
    /// It cannot.
    fn rewind(&mut self, session: u32, position: u32) {
        let length = self.sums.length(session);
        if position >= length {
            return;
        }
        let of_last = self.last.remove(&session).unwrap_or(0) as usize;
        let begin = (length as usize).saturating_sub(of_last);
        let has_snapshot = self.take_back.reaches(of_last, (position as usize).saturating_sub(begin));
        let can = self.take_back == TakeBack::ALL || position == 0 || has_snapshot;
        assert!(can, "session {session} cannot be taken back to {position}");
        self.sums.rewind(session, position);
    }
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
        let values = inputs(input);
        if values.contains(&(BAD_TOKEN as f32)) {
            return Err(StageError::NotFinite { block: Some(0), count: 1, said: None });
        }
        let compute = self.cost.of(values.len() as u32);
        self.world.pass(compute);
        put_out(self.memory.step(spans, &values), output);
        Ok(compute)
    }
    fn rewind(&mut self, session: SessionId, position: u32) -> Result<(), StageError> {
        self.memory.rewind(session.0, position);
        Ok(())
    }
    fn take_back(&self) -> TakeBack {
        self.memory.take_back
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
            let (memory, world) = (Memory::new(TakeBack::ALL), world.clone());
            StageSlot::Local(Box::new(Local { memory, cost, world }))
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

/// A worker behind a connection that breaks when its script says so: each call takes one entry.
pub(crate) struct Scripted {
    pub(crate) memory: Memory,
    pub(crate) answers: VecDeque<(JobId, Vec<f32>)>,
    pub(crate) breaks: Arc<Mutex<VecDeque<bool>>>,
    pub(crate) is_connected: bool,
    pub(crate) remembers: bool,
    /// breaks each time it is given this value
    pub(crate) breaks_at: Option<f32>,
    /// reports a fault of the step that has this value
    pub(crate) fails_at: Option<f32>,
    /// and goes on all the same
    pub(crate) goes_on: bool,
    /// what it was sent
    pub(crate) log: Arc<Mutex<Vec<String>>>,
    /// adds one to each row, so that none stays as it was: what a canary is about
    pub(crate) adds_one: bool,
    /// answers wrongly from its nth step on, those of all connections counted
    pub(crate) wrong_from: Option<usize>,
    /// the next connection is to one that computes right
    pub(crate) heals: bool,
    pub(crate) n_steps: usize,
    /// has an answer ready only when there are more than so many steps it could answer, or when it is waited for
    pub(crate) lag: usize,
    pub(crate) bell: Option<Bell>,
    pub(crate) n_sessions: u32,
}

impl Scripted {
    pub(crate) fn new(breaks: &[bool]) -> Scripted {
        Scripted {
            memory: Memory::new(TakeBack::ALL),
            answers: VecDeque::new(),
            breaks: Arc::new(Mutex::new(breaks.iter().copied().collect())),
            is_connected: true,
            remembers: false,
            breaks_at: None,
            fails_at: None,
            goes_on: false,
            log: Arc::default(),
            adds_one: false,
            wrong_from: None,
            heals: false,
            n_steps: 0,
            lag: 0,
            bell: None,
            n_sessions: 1,
        }
    }
    fn call(&mut self) -> Result<(), StageError> {
        if self.breaks.lock().unwrap().pop_front() == Some(true) {
            self.is_connected = false;
        }
        if self.is_connected { Ok(()) } else { Err(StageError::lost("the script says so")) }
    }
    fn next_answer(&mut self, rows: &mut Rows) -> Result<Option<Answer>, StageError> {
        let Some((job, results)) = self.answers.pop_front() else { return Ok(None) };
        if self.breaks_at.is_some_and(|value| results.contains(&value)) {
            self.is_connected = false;
            return Err(StageError::lost("it falls over this step"));
        }
        if self.fails_at.is_some_and(|value| results.contains(&value)) {
            let error = StageError::NotFinite { block: Some(12), count: 1, said: None };
            if self.goes_on {
                let failed = Some(error);
                return Ok(Some(Answer { failed, ..Answer::done(job, Duration::ZERO, Duration::ZERO) }));
            }
            self.is_connected = false;
            return Err(error);
        }
        *rows = Rows::F32(results);
        Ok(Some(Answer::done(job, Duration::ZERO, Duration::ZERO)))
    }
    fn note(&self, what: String) {
        self.log.lock().unwrap().push(what);
    }
}

impl RemoteStage for Scripted {
    fn name(&self) -> String {
        "remote".into()
    }
    fn blocks(&self) -> Option<BlockRange> {
        Some(BlockRange { first: 11, last: 16 })
    }
    fn max_in_flight(&self) -> usize {
        4
    }
    fn n_sessions(&self) -> u32 {
        self.n_sessions
    }
    fn take_back(&self) -> TakeBack {
        self.memory.take_back
    }
    fn cancel(&mut self, job: JobId) {
        self.note(format!("x{}", job.0));
    }
    fn submit(&mut self, job: JobId, spans: &[Span], _: &[i32], rows: &Rows) -> Result<(), StageError> {
        self.call()?;
        let says = spans.iter().map(|s| format!("{}:{}+{}", s.session, s.position, s.count));
        self.note(says.collect::<Vec<_>>().join(" "));
        let mut results = self.memory.step(spans, &floats(rows.as_ref()));
        results.iter_mut().for_each(|x| *x += f32::from(u8::from(self.adds_one)));
        if self.wrong_from.is_some_and(|from| self.n_steps >= from) {
            results.iter_mut().enumerate().for_each(|(i, x)| *x = -*x * (i as f32 + 2.0));
        }
        self.n_steps += 1;
        self.answers.push_back((job, results));
        if let Some(bell) = &self.bell {
            bell.ring();
        }
        Ok(())
    }
    fn poll(&mut self, rows: &mut Rows) -> Result<Option<Answer>, StageError> {
        self.call()?;
        if self.bell.is_none() && self.answers.len() <= self.lag {
            return Ok(None);
        }
        self.next_answer(rows)
    }
    fn collect_until(&mut self, rows: &mut Rows, _: Option<Instant>) -> Result<Option<Answer>, StageError> {
        self.call()?;
        let answer = self.next_answer(rows)?;
        assert!(answer.is_some(), "asked for an answer to nothing");
        Ok(answer)
    }
    fn notify(&mut self, bell: Option<Bell>) {
        self.bell = bell;
        if let Some(bell) = &self.bell {
            bell.ring();
        }
    }
    fn rewind(&mut self, session: SessionId, position: u32) -> Result<(), StageError> {
        self.call()?;
        self.note(format!("{}<{position}", session.0));
        self.memory.rewind(session.0, position);
        Ok(())
    }
    fn begin_reconnect(&mut self, bell: &Bell) {
        self.note("dial".into());
        self.wrong_from = self.wrong_from.filter(|_| !self.heals);
        self.is_connected = self.breaks.lock().unwrap().pop_front() != Some(true);
        self.answers.clear();
        if !self.remembers {
            self.memory.forget();
        }
        bell.ring();
    }
    fn poll_connected(&mut self) -> Result<bool, StageError> {
        if self.is_connected { Ok(true) } else { Err(StageError::lost("still away")) }
    }
    fn traffic(&self) -> Traffic {
        let n = self.n_steps as u64;
        Traffic { bytes_sent: n * 100, bytes_received: n * 90, round_trips: n }
    }
}

/// Time that nobody has to wait for: it goes on by itself when somebody would.
#[derive(Clone)]
pub(crate) struct Quick {
    world: World,
}

impl Clock for Quick {
    fn now(&self) -> Instant {
        self.world.now()
    }
    fn wait(&self, bell: &Bell, until: Option<Instant>) {
        if !bell.wait(Some(Instant::now())) {
            assert!(until.is_some(), "nothing to wait for, for ever");
            self.world.wait(bell, until);
        }
    }
}

pub(crate) fn scripted(remotes: Vec<impl RemoteStage + 'static>, patience: Patience) -> Pipeline {
    scripted_with(remotes, patience, TakeBack::ALL)
}

pub(crate) fn scripted_with(
    remotes: Vec<impl RemoteStage + 'static>,
    patience: Patience,
    of_locals: TakeBack,
) -> Pipeline {
    let world = World::new(0);
    let local = || Local { memory: Memory::new(of_locals), cost: FREE, world: world.clone() };
    let mut stages = vec![StageSlot::Local(Box::new(local()))];
    stages.extend(remotes.into_iter().map(|remote| StageSlot::Remote(Box::new(remote))));
    stages.push(StageSlot::Local(Box::new(local())));
    let clock = Quick { world: world.clone() };
    Pipeline::with_clock(stages, RowType::F32, patience, Box::new(clock))
}

/// A worker that is held against what it answers when it computes right.
pub(crate) fn guarded(worker: Scripted, session: u32) -> Guarded<Scripted> {
    let blank = Canary { seed: 7, exponent: -5, steps: vec![3, 1], max_abs: 100, updates: vec![] };
    let input = blank.input(1);
    let spans = [Span { session: 0, position: 0, count: input.len() as u32 }];
    let answer: Vec<f32> = Sums::default().step(&spans, &input).iter().map(|x| x + 1.0).collect();
    // a worker with one session more than the steps use, but for session 0
    let room = Room {
        widths: 1.into(),
        dtype: RowType::F32,
        n_ctx: 100_000,
        max_rows: 512,
        sessions: session.max(1),
    };
    let worker = Scripted { adds_one: true, n_sessions: session + 1, ..worker };
    Guarded::new(worker, blank.with_answer(1, &answer), room)
}

/// One that outlasts every script.
pub(crate) const PATIENT: Patience = Patience {
    give_up_after: Duration::from_secs(1_000_000),
    paused_for: Duration::from_secs(1_000_000),
    first_pause: Duration::from_millis(200),
    longest_pause: Duration::from_secs(5),
};

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
