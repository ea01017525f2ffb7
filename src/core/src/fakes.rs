//! Stages for tests and benches: exact arithmetic, in real time and in real threads. (Those on a clock that a test moves
//! are the pipeline's own.)

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use crate::bell::Bell;
use crate::blocks::BlockRange;
use crate::ids::{JobId, SessionId};
use crate::rows::{Rows, RowsRef};
use crate::stage::{Answer, LocalStage, RemoteStage, Span, StageError, StageInput, StageOutput, Traffic};

/// Output depends on everything a cache holds: a row's result is the sum of the session's rows up to it. A wrong, lost
/// or doubled row shows at once.
#[derive(Default, Clone, Debug)]
pub struct Sums(BTreeMap<u32, Vec<f32>>);

impl Sums {
    /// How many rows a session has.
    pub fn length(&self, session: u32) -> u32 {
        self.0.get(&session).map_or(0, |cells| cells.len() as u32)
    }

    /// Forgets a session's rows from `position` on.
    pub fn rewind(&mut self, session: u32, position: u32) {
        self.0.entry(session).or_default().truncate(position as usize);
    }

    /// A session's rows, 4 bytes each.
    fn save(&self, session: u32, from: u32, to: u32) -> Option<Vec<u8>> {
        let cells = self.0.get(&session)?.get(from as usize..to as usize)?;
        Some(cells.iter().flat_map(|cell| cell.to_le_bytes()).collect())
    }

    /// Puts them back. Whether they fit.
    fn restore(&mut self, span: Span, bytes: &[u8]) -> bool {
        let cells = self.0.entry(span.session).or_default();
        let fits = cells.len() == span.position as usize && bytes.len() == 4 * span.count as usize;
        if fits {
            cells.extend(bytes.as_chunks().0.iter().map(|cell| f32::from_le_bytes(*cell)));
        }
        fits
    }

    /// The results of a step of one value a row.
    ///
    /// # Panics
    /// A span does not go on where its session stands.
    pub fn step(&mut self, spans: &[Span], values: &[f32]) -> Vec<f32> {
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

/// Rows of either format as numbers.
pub fn floats(rows: RowsRef<'_>) -> Vec<f32> {
    match rows {
        RowsRef::F32(values) => values.to_vec(),
        RowsRef::F16(values) => values.iter().map(|x| x.to_f32()).collect(),
    }
}

/// What goes into a stage as numbers: tokens are their own values.
pub fn inputs(input: StageInput<'_>) -> Vec<f32> {
    match input {
        StageInput::Tokens(tokens) => tokens.iter().map(|&token| token as f32).collect(),
        StageInput::Rows { rows, .. } => floats(rows),
    }
}

/// Hands results on as F32 rows, or those that are wanted as logits.
pub fn put_out(results: Vec<f32>, output: StageOutput<'_>) {
    match output {
        StageOutput::Rows(rows) => *rows = Rows::F32(results),
        StageOutput::Logits { rows, out } => {
            out.clear();
            out.extend(results.iter().zip(rows).filter(|(_, wanted)| **wanted).map(|(result, _)| *result));
        }
    }
}

/// A stage of this process that sleeps instead of computing.
pub struct SleepingStage {
    compute: Duration,
    sums: Sums,
    n_evaluated: Arc<AtomicUsize>,
}

impl SleepingStage {
    /// One that takes so long for each step.
    pub fn new(compute: Duration) -> SleepingStage {
        SleepingStage { compute, sums: Sums::default(), n_evaluated: Arc::default() }
    }

    /// How many rows it has evaluated.
    pub fn n_evaluated(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.n_evaluated)
    }
}

/// A token that [`SleepingStage`] cannot compute.
pub const FAILS_AT: i32 = -1;
/// A token at which it panics.
pub const PANICS_AT: i32 = -2;

impl LocalStage for SleepingStage {
    fn name(&self) -> String {
        "local".to_owned()
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
        if !self.compute.is_zero() {
            sleep(self.compute);
        }
        let values = inputs(input);
        assert!(!values.contains(&(PANICS_AT as f32)), "a stage with a bug");
        if values.contains(&(FAILS_AT as f32)) {
            return Err(StageError::failed("a token that cannot be computed"));
        }
        put_out(self.sums.step(spans, &values), output);
        self.n_evaluated.fetch_add(values.len(), Ordering::Relaxed);
        Ok(self.compute)
    }

    fn rewind(&mut self, session: SessionId, position: u32) -> Result<(), StageError> {
        self.sums.rewind(session.0, position);
        Ok(())
    }

    fn saved_bytes(&self) -> Option<usize> {
        Some(4)
    }

    fn save(&mut self, session: SessionId, from: u32, to: u32) -> Result<Vec<u8>, StageError> {
        self.sums.save(session.0, from, to).ok_or_else(|| StageError::failed("there are no such rows"))
    }

    fn restore(&mut self, span: Span, _: &[i32], state: &[u8]) -> Result<Duration, StageError> {
        match self.sums.restore(span, state) {
            true => Ok(Duration::ZERO),
            false => Err(StageError::failed("rows that do not go on here")),
        }
    }
}

/// What has arrived from a worker, and who is told.
#[derive(Default)]
struct Arrived {
    answers: VecDeque<(Answer, Vec<f32>)>,
    bell: Option<Bell>,
}

/// On its way to a worker: a step's number, its results, and when it was sent.
type Sent = (JobId, Vec<f32>, Instant);
/// On its way back: an answer, its rows, and when it was given.
type Answered = (Answer, Vec<f32>, Instant);

/// A worker on a thread of its own that sleeps instead of computing, at the end of a way that takes its time.
pub struct SleepingWorker {
    compute: Duration,
    one_way: Duration,
    agreed: usize,
    sums: Sums,
    sender: Sender<Sent>,
    arrived: Arc<Mutex<Arrived>>,
    own_bell: Bell,
    cut: Cut,
}

/// Cuts the connection to a worker.
#[derive(Clone, Debug, Default)]
pub struct Cut(Arc<AtomicBool>);

impl Cut {
    /// It is noticed with the next answer, or the next step.
    pub fn now(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl SleepingWorker {
    /// One that takes so long for each step, so far away, and may hold so many steps.
    pub fn start(compute: Duration, one_way: Duration, agreed: usize) -> SleepingWorker {
        let (arrived, own_bell) = (Arc::new(Mutex::new(Arrived::default())), Bell::new());
        let sender = connect(compute, one_way, &arrived, &own_bell);
        let (sums, cut) = (Sums::default(), Cut::default());
        SleepingWorker { compute, one_way, agreed, sums, sender, arrived, own_bell, cut }
    }

    /// What cuts its connection.
    pub fn cut(&self) -> Cut {
        self.cut.clone()
    }

    fn arrived(&self) -> MutexGuard<'_, Arrived> {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Two threads: the worker, and the way back from it. Both end with the connection.
fn connect(compute: Duration, one_way: Duration, arrived: &Arc<Mutex<Arrived>>, bell: &Bell) -> Sender<Sent> {
    let (sender, steps) = channel();
    let (answers, way_back): (Sender<Answered>, _) = channel();
    spawn(move || work(&steps, &answers, compute, one_way));
    let (to, bell) = (Arc::clone(arrived), bell.clone());
    spawn(move || {
        for (answer, rows, at) in way_back {
            sleep_until(at + one_way);
            let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
            to.answers.push_back((answer, rows));
            bell.ring();
            to.bell.iter().for_each(Bell::ring);
        }
    });
    sender
}

fn work(steps: &Receiver<Sent>, answers: &Sender<Answered>, compute: Duration, one_way: Duration) {
    for (job, rows, sent) in steps {
        let there = sent + one_way;
        sleep_until(there);
        let wait = there.elapsed();
        if !compute.is_zero() {
            sleep(compute);
        }
        if answers.send((Answer::done(job, compute, wait), rows, Instant::now())).is_err() {
            return;
        }
    }
}

fn sleep_until(at: Instant) {
    let left = at.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        sleep(left);
    }
}

impl RemoteStage for SleepingWorker {
    fn name(&self) -> String {
        "remote".to_owned()
    }

    fn blocks(&self) -> Option<BlockRange> {
        None
    }

    fn max_in_flight(&self) -> usize {
        self.agreed
    }

    fn submit(&mut self, job: JobId, spans: &[Span], _: &[i32], rows: &Rows) -> Result<(), StageError> {
        let results = self.sums.step(spans, &floats(rows.as_ref()));
        self.sender.send((job, results, Instant::now())).map_err(StageError::lost)
    }

    fn poll(&mut self, rows: &mut Rows) -> Result<Option<Answer>, StageError> {
        let Some((answer, results)) = self.arrived().answers.pop_front() else { return Ok(None) };
        if self.cut.0.swap(false, Ordering::SeqCst) {
            return Err(StageError::lost("the connection was cut"));
        }
        *rows = Rows::F32(results);
        Ok(Some(answer))
    }

    fn collect_until(
        &mut self,
        rows: &mut Rows,
        deadline: Option<Instant>,
    ) -> Result<Option<Answer>, StageError> {
        loop {
            if let Some(answer) = self.poll(rows)? {
                return Ok(Some(answer));
            }
            if !self.own_bell.wait(deadline) {
                return Ok(None);
            }
        }
    }

    fn notify(&mut self, bell: Option<Bell>) {
        let mut arrived = self.arrived();
        if !arrived.answers.is_empty() {
            bell.iter().for_each(Bell::ring);
        }
        arrived.bell = bell;
    }

    fn rewind(&mut self, session: SessionId, position: u32) -> Result<(), StageError> {
        self.sums.rewind(session.0, position);
        Ok(())
    }

    fn begin_reconnect(&mut self, bell: &Bell) {
        // what the old threads still bring goes where nobody looks
        self.arrived = Arc::default();
        self.sender = connect(self.compute, self.one_way, &self.arrived, &self.own_bell);
        self.sums = Sums::default();
        bell.ring();
    }

    fn poll_connected(&mut self) -> Result<bool, StageError> {
        Ok(true)
    }

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}
