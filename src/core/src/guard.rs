//! A worker that is checked while it is used: its answer to a known input is held against the one that dim-split
//! found ([`crate::canary`]).
//!
//! 1. After each connection, before any row that matters: its sessions are empty then, one takes the canary's rows, and
//!    is rewound.
//! 2. After every [`EVERY_ROWS`] rows, however many steps are under way: where the worker has a session to spare, the
//!    canary's steps are jobs like any other, in that session; where it has none, as soon as session 0 begins anew. A
//!    worker that comes back with fewer sessions than before has none to spare from then on.
//! 3. In a reply that is longer, with none to spare: a row that was just answered is taken back and asked again. Both
//!    answers must agree. This finds a worker that has become unsteady (heat, memory), not one that is wrong in the
//!    same way twice; for that, the session would have to be filled anew, which takes as long as the reply did.
//!
//! A worker that fails is an error for everybody whose rows it has answered since it was last right, with the next step
//! at the latest; and it is asked again before it is given another. A row that is asked again is handed on when both
//! answers agree. What was answered between two checks of a spare session is used meanwhile, but not while such a check is
//! under way: what comes out of the pipeline then waits for its end. What checks cost is in no step's time and in no traffic; beside other steps their bytes
//! are counted as those of their rows.
//!
//! This file has what is asked and what is right; the [pipeline](crate::pipeline) asks it.

use std::time::Instant;

use crate::bell::{Bell, LOOKS};
use crate::blocks::BlockRange;
use crate::canary::{Canary, LEAST_MEAN_COSINE, Likeness, Widths, update};
use half::f16;

use crate::ids::{JobId, SessionId};
use crate::rows::{RowType, Rows};
use crate::stage::{Answer, RemoteStage, Span, StageError, TakeBack, Traffic, WrongAnswer};

/// Rows between two checks.
pub const EVERY_ROWS: u32 = 4096;

/// The largest |value| of an answer that is asked for in F16: its largest number is 65504.
const MOST_IN_F16: u64 = 60_000;

/// What was agreed on with the worker, as far as a check needs it.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// The lengths of rows.
    pub widths: Widths,
    /// The number format of the rows.
    pub dtype: RowType,
    /// Positions of a session.
    pub n_ctx: u32,
    /// The most rows of a step.
    pub max_rows: u32,
    /// Sessions that steps use: those below this.
    pub sessions: u32,
}

/// What a worker is held against, and how much it has answered since.
#[derive(Debug)]
pub struct Guard {
    canary: Canary,
    room: Room,
    /// the one that checks use
    session: u32,
    blocks: Option<BlockRange>,
    /// rows sent since the last check
    rows: u32,
    /// what the checks sent and received
    check_traffic: Traffic,
}

/// The canary's steps, and what has been answered of them.
#[derive(Debug)]
pub struct Check {
    pieces: Vec<(Span, Rows)>,
    answered: usize,
    /// (n_rows, widths.output)
    output: Vec<f32>,
}

impl Check {
    /// How many steps there are.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether there is nothing to ask.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// One of its steps.
    pub fn piece(&self, i: usize) -> Option<(Span, &Rows)> {
        self.pieces.get(i).map(|(span, rows)| (*span, rows))
    }

    /// The answer to the next step. Whether it was the last.
    pub fn answered(&mut self, rows: &Rows) -> bool {
        extend(&mut self.output, rows);
        self.answered += 1;
        self.answered == self.pieces.len()
    }
}

impl Guard {
    /// A guard of a stage with these blocks, whose worker has so many sessions.
    pub fn new(canary: Canary, room: Room, blocks: Option<BlockRange>, worker_sessions: u32) -> Guard {
        let mut guard =
            Guard { canary, room, session: 0, blocks, rows: 0, check_traffic: Traffic::default() };
        guard.connected(worker_sessions);
        guard
    }

    /// There is a new connection, to a worker with so many sessions: checks use the last one, if no step does, and the
    /// first one otherwise.
    pub fn connected(&mut self, worker_sessions: u32) {
        let spare = worker_sessions.checked_sub(1).filter(|&last| last >= self.room.sessions);
        self.session = spare.unwrap_or(0);
    }

    /// The session that checks use.
    pub fn session(&self) -> SessionId {
        SessionId(self.session)
    }

    /// Whether nothing else uses that session.
    pub fn has_spare_session(&self) -> bool {
        self.session >= self.room.sessions
    }

    /// So many rows were sent.
    pub fn count(&mut self, rows: u32) {
        self.rows = self.rows.saturating_add(rows);
    }

    /// Whether there were so many that it is time to check.
    pub fn is_due(&self) -> bool {
        self.rows >= EVERY_ROWS
    }

    /// Begins a check: its steps go to [its session](Self::session), which is empty, one after the other, and then that
    /// session is rewound to 0. `None` where the rows' number format cannot hold the answer.
    pub fn begin(&mut self) -> Option<Check> {
        self.rows = 0;
        let (canary, room) = (&self.canary, self.room);
        if room.dtype == RowType::F16 && canary.max_abs > MOST_IN_F16 {
            return None;
        }
        let width = room.widths.input;
        let input = canary.input(width);
        let mut pieces = Vec::new();
        let mut position = 0;
        let most = room.max_rows.max(1);
        let counts = canary
            .steps
            .iter()
            .flat_map(|&n| (0..n).step_by(most as usize).map(move |at| (n - at).min(most)));
        for count in counts {
            let count = count.min(room.n_ctx - position);
            if count == 0 {
                break;
            }
            let values = position as usize * width..(position + count) as usize * width;
            let span = Span { session: self.session, position, count };
            pieces.push((span, hidden(&input[values], room.dtype)));
            position += count;
        }
        Some(Check { pieces, answered: 0, output: Vec::new() })
    }

    /// The mean cosine of the rows of a check that has all its answers.
    ///
    /// # Errors
    /// [`StageError::Wrong`].
    pub fn verdict(&self, check: &Check) -> Result<f64, StageError> {
        let compared = self.canary.compare(self.room.widths, &check.output);
        compared.map_err(|wrong| self.wrong(WrongAnswer::Canary(wrong)))
    }

    /// What a step of a check fails with: a value that is not finite is an answer too, and a wrong one.
    pub fn in_check(&self, error: StageError) -> StageError {
        match error.is_of_step() {
            true => self.wrong(WrongAnswer::Unanswered(Box::new(error))),
            false => error,
        }
    }

    /// Compares two answers to the same row.
    ///
    /// # Errors
    /// [`StageError::Wrong`].
    pub fn compare_again(&mut self, before: &Rows, first: &Rows, second: &Rows) -> Result<(), StageError> {
        self.rows = 0;
        let (before, first, second) = (floats(before), floats(first), floats(second));
        let update = |after: &[f32]| -> Vec<f32> { update(&before, after).map(|x| x as f32).collect() };
        let cosine = Likeness::of(&update(&first), &update(&second)).cosine;
        // the same bits are the same even where nothing was added
        if cosine >= LEAST_MEAN_COSINE || first == second {
            return Ok(());
        }
        Err(self.wrong(WrongAnswer::Unsteady { cosine }))
    }

    /// What a check cost: it is nobody's traffic.
    pub fn count_check_traffic(&mut self, cost: Traffic) {
        self.check_traffic += cost;
    }

    fn wrong(&self, answer: WrongAnswer) -> StageError {
        StageError::Wrong { blocks: self.blocks, answer }
    }
}

/// A remote stage with its guard.
pub struct Guarded<S> {
    inner: S,
    guard: Guard,
}

impl<S: RemoteStage> Guarded<S> {
    /// A stage that was just connected, to be [checked](Self::check) before its first step.
    pub fn new(inner: S, canary: Canary, room: Room) -> Guarded<S> {
        let guard = Guard::new(canary, room, inner.blocks(), inner.n_sessions());
        Guarded { inner, guard }
    }

    /// The worker's answer to the canary, held against the right one: the mean cosine of its rows, or `None` where the
    /// rows' number format cannot hold it. For a stage outside a pipeline: its session is empty, and is left so; nothing
    /// is in flight. Blocks until the worker has answered, or nobody waits for that: `goes_on` is asked every [`LOOKS`].
    ///
    /// # Errors
    /// [`StageError::Wrong`], or whatever the stage itself fails with; [`StageError::Void`] where it does not go on.
    pub fn check(&mut self, goes_on: &dyn Fn() -> bool) -> Result<Option<f64>, StageError> {
        let before = self.inner.traffic();
        let result = self.ask(goes_on);
        self.guard.count_check_traffic(self.inner.traffic().since(before));
        result
    }

    fn ask(&mut self, goes_on: &dyn Fn() -> bool) -> Result<Option<f64>, StageError> {
        let Some(mut check) = self.guard.begin() else { return Ok(None) };
        let mut answer = Rows::empty(self.guard.room.dtype);
        for i in 0..check.len() {
            if let Some((span, rows)) = check.piece(i) {
                self.inner.submit(JobId(i as u64), &[span], &[], rows).map_err(|e| self.guard.in_check(e))?;
            }
            let answered = loop {
                let look_at = Instant::now() + LOOKS;
                let collected = self.inner.collect_until(&mut answer, Some(look_at));
                if let Some(answered) = collected.map_err(|e| self.guard.in_check(e))? {
                    break answered;
                }
                if !goes_on() {
                    return Err(StageError::Void);
                }
            };
            if let Some(failed) = answered.failed {
                return Err(self.guard.in_check(failed));
            }
            check.answered(&answer);
        }
        self.inner.rewind(self.guard.session(), 0)?;
        self.guard.verdict(&check).map(Some)
    }

    /// Connects anew and [checks](Self::check), for a stage outside a pipeline. Blocks for as long as that takes.
    ///
    /// # Errors
    /// There is no connection, or the worker computes something else; or as of [`check`](Self::check).
    pub fn reconnect(&mut self, goes_on: &dyn Fn() -> bool) -> Result<Option<f64>, StageError> {
        let bell = Bell::new();
        self.inner.begin_reconnect(&bell);
        while !self.inner.poll_connected()? {
            if !goes_on() {
                return Err(StageError::Void);
            }
            bell.wait(Some(Instant::now() + LOOKS));
        }
        self.guard.connected(self.inner.n_sessions());
        self.check(goes_on)
    }
}

impl<S: RemoteStage> RemoteStage for Guarded<S> {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn blocks(&self) -> Option<BlockRange> {
        self.inner.blocks()
    }

    fn max_in_flight(&self) -> usize {
        self.inner.max_in_flight()
    }

    fn n_sessions(&self) -> u32 {
        self.inner.n_sessions()
    }

    fn reads_tokens(&self) -> bool {
        self.inner.reads_tokens()
    }

    fn take_back(&self) -> TakeBack {
        self.inner.take_back()
    }

    fn submit(&mut self, job: JobId, spans: &[Span], tokens: &[i32], rows: &Rows) -> Result<(), StageError> {
        self.inner.submit(job, spans, tokens, rows)
    }

    fn cancel(&mut self, job: JobId) {
        self.inner.cancel(job);
    }

    fn poll(&mut self, rows: &mut Rows) -> Result<Option<Answer>, StageError> {
        self.inner.poll(rows)
    }

    fn collect_until(
        &mut self,
        rows: &mut Rows,
        deadline: Option<Instant>,
    ) -> Result<Option<Answer>, StageError> {
        self.inner.collect_until(rows, deadline)
    }

    fn notify(&mut self, bell: Option<Bell>) {
        self.inner.notify(bell);
    }

    fn poll_at(&self) -> Option<Instant> {
        self.inner.poll_at()
    }

    fn rewind(&mut self, session: SessionId, position: u32) -> Result<(), StageError> {
        self.inner.rewind(session, position)
    }

    fn begin_reconnect(&mut self, bell: &Bell) {
        self.inner.begin_reconnect(bell);
    }

    fn poll_connected(&mut self) -> Result<bool, StageError> {
        let is_connected = self.inner.poll_connected()?;
        if is_connected {
            self.guard.connected(self.inner.n_sessions());
        }
        Ok(is_connected)
    }

    fn traffic(&self) -> Traffic {
        self.inner.traffic().since(self.guard.check_traffic)
    }

    fn guard(&mut self) -> Option<&mut Guard> {
        Some(&mut self.guard)
    }
}

/// Rows as they go over the wire; a canary's are exact in every format.
fn hidden(values: &[f32], dtype: RowType) -> Rows {
    match dtype {
        RowType::F16 => Rows::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
        RowType::F32 => Rows::F32(values.to_vec()),
    }
}

fn floats(rows: &Rows) -> Vec<f32> {
    let mut out = Vec::new();
    extend(&mut out, rows);
    out
}

fn extend(out: &mut Vec<f32>, rows: &Rows) {
    match rows {
        Rows::F16(values) => out.extend(values.iter().map(|x| x.to_f32())),
        Rows::F32(values) => out.extend_from_slice(values),
    }
}

#[cfg(test)]
mod tests;
