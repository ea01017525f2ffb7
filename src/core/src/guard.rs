//! A worker that is checked while it is used: its answer to a known input is held against the one that dim-split
//! found ([`crate::canary`]).
//!
//! 1. After each connection, before any row that matters: session 0 is empty then, takes the canary's rows, and is
//!    rewound.
//! 2. After every [`EVERY_ROWS`] rows, as soon as it costs nothing but the canary itself: where the session begins
//!    anew, or at once where the worker has a session to spare.
//! 3. In a reply that is longer, with one session: a row that was just answered is taken back and asked again. Both
//!    answers must agree. This finds a worker that has become unsteady (heat, memory), not one that is wrong in the
//!    same way twice; for that, the session would have to be filled anew, which takes as long as the reply did.
//!
//! A worker that fails is an error, and nothing it answered after the last check that it passed is used: the check
//! stands before the answer is handed on. What checks cost is in no step's time and in no traffic.

use std::time::{Duration, Instant};

use crate::canary::{Canary, LEAST_MEAN_COSINE, Likeness};
use half::f16;

use crate::rows::{RowType, Rows};
use crate::stage::{RemoteStage, Span, StageError, Traffic};

/// Rows between two checks.
pub const EVERY_ROWS: u32 = 4096;

/// The largest |value| of an answer that is asked for in F16: its largest number is 65504.
const MOST_IN_F16: u64 = 60_000;

/// What was agreed on with the worker, as far as a check needs it.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// The length of a row.
    pub n_embd: usize,
    /// The number format of the rows.
    pub dtype: RowType,
    /// Positions of a session.
    pub n_ctx: u32,
    /// The most rows of a step.
    pub max_rows: u32,
    /// A session that nothing else uses; 0, the one everything uses, where there is no other.
    pub session: u32,
}

/// A remote stage with its canary.
pub struct Guarded<S> {
    inner: S,
    canary: Canary,
    room: Room,
    /// rows submitted since the last check
    rows: u32,
    /// steps submitted and not answered
    in_flight: u32,
    /// the step that is to be asked again when its answer is there
    again: Option<(u64, Span, Rows)>,
    /// what the checks sent and received
    aside: Traffic,
    spent: Duration,
}

impl<S: RemoteStage> Guarded<S> {
    /// A stage that was just connected, to be [checked](Self::check) before its first step.
    pub fn new(inner: S, canary: Canary, room: Room) -> Guarded<S> {
        Guarded {
            inner,
            canary,
            room,
            rows: 0,
            in_flight: 0,
            again: None,
            aside: Traffic::default(),
            spent: Duration::ZERO,
        }
    }

    /// The worker's answer to the canary, held against the right one: the mean cosine of its rows, or `None` where the
    /// rows' number format cannot hold it. The spare session is empty, and is left so; nothing is in flight.
    ///
    /// # Errors
    /// [`StageError::Wrong`], or whatever the stage itself fails with.
    pub fn check(&mut self) -> Result<Option<f64>, StageError> {
        self.aside(|guard| {
            let (canary, room) = (&guard.canary, guard.room);
            if room.dtype == RowType::F16 && canary.max_abs > MOST_IN_F16 {
                return Ok(None);
            }
            let input = canary.input(room.n_embd);
            let mut output: Vec<f32> = Vec::with_capacity(input.len());
            let mut answer = Rows::empty(room.dtype);
            let mut position = 0;
            let most = room.max_rows.max(1);
            let pieces = canary
                .steps
                .iter()
                .flat_map(|&n| (0..n).step_by(most as usize).map(move |at| (n - at).min(most)));
            for count in pieces.collect::<Vec<_>>() {
                let count = count.min(room.n_ctx - position);
                if count == 0 {
                    break;
                }
                let values = position as usize * room.n_embd..(position + count) as usize * room.n_embd;
                let span = Span { session: room.session, position, count };
                let rows = hidden(&input[values], room.dtype);
                guard.inner.submit(0, &[span], &rows).map_err(|e| guard.in_check(e))?;
                guard.inner.collect(&mut answer).map_err(|e| guard.in_check(e))?;
                extend(&mut output, &answer);
                position += count;
            }
            guard.inner.rewind(room.session, 0)?;
            guard.rows = 0;
            let verdict = guard.canary.compare(room.n_embd, &output);
            verdict
                .map(Some)
                .map_err(|wrong| guard.wrong(&format!("of its answer to a known input, {wrong}")))
        })
    }

    /// Takes a step back that was just answered, asks it again, and compares.
    fn ask_again(&mut self, id: u64, span: Span, before: &Rows, first: &Rows) -> Result<(), StageError> {
        self.aside(|guard| {
            let mut second = Rows::empty(guard.room.dtype);
            guard.inner.rewind(span.session, span.position)?;
            guard.inner.submit(id, &[span], before)?;
            guard.inner.collect(&mut second)?;
            guard.rows = 0;
            let (before, first, second) = (floats(before), floats(first), floats(&second));
            let update = |after: &[f32]| -> Vec<f32> { after.iter().zip(&before).map(|(a, b)| a - b).collect() };
            let cosine = Likeness::of(&update(&first), &update(&second)).cosine;
            // the same bits are the same even where nothing was added
            if cosine >= LEAST_MEAN_COSINE || first == second {
                return Ok(());
            }
            Err(guard.wrong(&format!(
                "asked the same row again it answered with a cosine of {cosine:.4} to its first answer (right is at \
                 least {LEAST_MEAN_COSINE})"
            )))
        })
    }

    fn wrong(&self, how: &str) -> StageError {
        let (first, last) = self.inner.blocks().unwrap_or_default();
        StageError::Wrong(format!("blocks {first}..{last} come out wrong there: {how}"))
    }

    /// What a step of the check fails with: a value that is not finite is an answer too, and a wrong one.
    fn in_check(&self, error: StageError) -> StageError {
        match error {
            StageError::Failed(why) => self.wrong(&format!("a known input could not be answered ({why})")),
            other => other,
        }
    }

    /// What `work` sends, receives and takes belongs to no step.
    fn aside<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T, StageError>) -> Result<T, StageError> {
        let (start, before) = (Instant::now(), self.inner.traffic());
        let result = work(self);
        let now = self.inner.traffic();
        self.aside.bytes_sent += now.bytes_sent - before.bytes_sent;
        self.aside.bytes_received += now.bytes_received - before.bytes_received;
        self.aside.round_trips += now.round_trips - before.round_trips;
        self.spent += start.elapsed();
        result
    }
}

impl<S: RemoteStage> RemoteStage for Guarded<S> {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn blocks(&self) -> Option<(u32, u32)> {
        self.inner.blocks()
    }

    fn submit(&mut self, id: u64, spans: &[Span], rows: &Rows) -> Result<(), StageError> {
        if self.rows >= EVERY_ROWS && self.in_flight == 0 {
            match spans {
                _ if self.room.session > 0 => drop(self.check()?),
                [span] if span.position == 0 => drop(self.check()?),
                [span] if span.count == 1 => self.again = Some((id, *span, rows.clone())),
                _ => {}
            }
        }
        self.inner.submit(id, spans, rows)?;
        self.in_flight += 1;
        self.rows = self.rows.saturating_add(spans.iter().map(|s| s.count).sum());
        Ok(())
    }

    fn collect(&mut self, rows: &mut Rows) -> Result<(u64, Duration), StageError> {
        let (id, compute) = self.inner.collect(rows)?;
        self.in_flight = self.in_flight.saturating_sub(1);
        // with another step behind it the row cannot be taken back; a later one can
        match self.again.take() {
            Some((asked, span, before)) if asked == id && self.in_flight == 0 => {
                self.ask_again(id, span, &before, rows)?;
            }
            _ => {}
        }
        Ok((id, compute))
    }

    fn rewind(&mut self, session: u32, position: u32) -> Result<(), StageError> {
        self.inner.rewind(session, position)
    }

    fn reconnect(&mut self) -> Result<(), StageError> {
        self.inner.reconnect()?;
        (self.in_flight, self.again) = (0, None);
        self.check().map(drop)
    }

    fn traffic(&self) -> Traffic {
        let all = self.inner.traffic();
        Traffic {
            bytes_sent: all.bytes_sent - self.aside.bytes_sent,
            bytes_received: all.bytes_received - self.aside.bytes_received,
            round_trips: all.round_trips - self.aside.round_trips,
        }
    }

    fn time_aside(&self) -> Duration {
        self.spent
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
mod tests {
    use super::*;
    use std::collections::VecDeque;

    const N_EMBD: usize = 4;

    /// A worker whose blocks add the sum of the session so far to each row, in exact arithmetic, and that goes wrong
    /// when its script says so.
    #[derive(Default)]
    struct Worker {
        sessions: Vec<Vec<f32>>,
        answers: VecDeque<(u64, Vec<f32>)>,
        /// steps from this one on (counted over all connections) are answered with other numbers
        wrong_from: Option<u64>,
        /// the answer to this step, counted the same, does not come
        lost_at: Option<u64>,
        steps: u64,
        log: Vec<String>,
    }

    impl RemoteStage for Worker {
        fn name(&self) -> String {
            "middle @ there".into()
        }
        fn blocks(&self) -> Option<(u32, u32)> {
            Some((11, 16))
        }
        fn submit(&mut self, id: u64, spans: &[Span], rows: &Rows) -> Result<(), StageError> {
            let span = spans[0];
            self.log.push(format!("{}:{}+{}", span.session, span.position, span.count));
            self.sessions.resize(self.sessions.len().max(span.session as usize + 1), Vec::new());
            let session = &mut self.sessions[span.session as usize];
            assert_eq!(session.len(), span.position as usize, "a row out of place");
            let mut out = Vec::new();
            for row in floats(rows).chunks(N_EMBD) {
                session.push(row.iter().sum::<f32>() + 1.0);
                let sum: f32 = session.iter().sum();
                let wrong = self.wrong_from.is_some_and(|from| self.steps >= from);
                out.extend(row.iter().enumerate().map(|(i, x)| match wrong {
                    false => x + sum * (i as f32 + 1.0),
                    true => x + sum * (i as f32 - 2.0) * self.steps as f32,
                }));
            }
            self.steps += 1;
            self.answers.push_back((id, out));
            Ok(())
        }
        fn collect(&mut self, rows: &mut Rows) -> Result<(u64, Duration), StageError> {
            let (id, out) = self.answers.pop_front().expect("an answer to nothing");
            if self.lost_at == Some(self.steps) {
                return Err(StageError::Lost("gone".into()));
            }
            *rows = hidden(&out, rows.row_type());
            Ok((id, Duration::ZERO))
        }
        fn rewind(&mut self, session: u32, position: u32) -> Result<(), StageError> {
            self.log.push(format!("{session}<{position}"));
            self.sessions[session as usize].truncate(position as usize);
            Ok(())
        }
        fn reconnect(&mut self) -> Result<(), StageError> {
            self.log.push("dial".into());
            (self.sessions, self.answers) = (Vec::new(), VecDeque::new());
            Ok(())
        }
        fn traffic(&self) -> Traffic {
            Traffic { bytes_sent: self.steps * 100, bytes_received: self.steps * 90, round_trips: self.steps }
        }
    }

    /// What a right worker answers, as dim-split would have found it.
    fn canary() -> Canary {
        let blank = Canary { seed: 7, exponent: -5, steps: vec![3, 1], max_abs: 100, updates: vec![] };
        let mut worker = Worker::default();
        let input = blank.input(N_EMBD);
        let mut out = Rows::empty(RowType::F32);
        worker.submit(0, &[Span { session: 0, position: 0, count: 4 }], &Rows::F32(input)).unwrap();
        worker.collect(&mut out).unwrap();
        blank.with_answer(N_EMBD, &floats(&out))
    }

    fn guarded(worker: Worker, session: u32) -> Guarded<Worker> {
        let room = Room { n_embd: N_EMBD, dtype: RowType::F32, n_ctx: 100_000, max_rows: 512, session };
        Guarded::new(worker, canary(), room)
    }

    fn step(stage: &mut Guarded<Worker>, position: u32, count: u32) -> Result<(), StageError> {
        let rows = Rows::F32((0..count as usize * N_EMBD).map(|i| (i % 5) as f32).collect());
        stage.submit(9, &[Span { session: 0, position, count }], &rows)?;
        let mut out = Rows::empty(RowType::F32);
        let (id, _) = stage.collect(&mut out)?;
        assert_eq!((id, floats(&out).len()), (9, count as usize * N_EMBD));
        Ok(())
    }

    #[test]
    fn a_right_worker_passes_and_its_session_is_empty_again() {
        let mut stage = guarded(Worker::default(), 0);
        stage.check().unwrap();
        assert_eq!(stage.inner.log, ["0:0+3", "0:3+1", "0<0"]);
        assert_eq!(stage.traffic(), Traffic::default(), "a check is nobody's traffic");
        step(&mut stage, 0, 2).unwrap();
        assert_eq!(stage.traffic().round_trips, 1);
    }

    #[test]
    fn a_wrong_worker_is_told_by_its_blocks_and_figures() {
        let mut stage = guarded(Worker { wrong_from: Some(0), ..Worker::default() }, 0);
        let error = stage.check().unwrap_err();
        assert!(matches!(error, StageError::Wrong(_)));
        let says = error.to_string();
        assert!(says.contains("blocks 11..16") && says.contains("cosine") && says.contains("0.99"), "{says}");
    }

    #[test]
    fn every_connection_is_checked() {
        let mut stage = guarded(Worker { wrong_from: Some(4), ..Worker::default() }, 0);
        stage.check().unwrap();
        step(&mut stage, 0, 1).unwrap();
        stage.reconnect().unwrap_err();
        let mut stage = guarded(Worker::default(), 0);
        stage.check().unwrap();
        stage.reconnect().unwrap();
        assert_eq!(stage.inner.log.iter().filter(|l| *l == "0:0+3").count(), 2);
    }

    #[test]
    fn a_session_that_begins_anew_after_many_rows_is_checked_first() {
        let mut stage = guarded(Worker::default(), 0);
        stage.check().unwrap();
        for position in (0..EVERY_ROWS).step_by(512) {
            step(&mut stage, position, 512).unwrap();
        }
        stage.rewind(0, 0).unwrap();
        let before = stage.inner.log.len();
        step(&mut stage, 0, 2).unwrap();
        assert_eq!(stage.inner.log[before..], ["0:0+3", "0:3+1", "0<0", "0:0+2"]);
        // and not again
        stage.rewind(0, 0).unwrap();
        step(&mut stage, 0, 2).unwrap();
        assert_eq!(stage.inner.log.iter().filter(|l| *l == "0:0+3").count(), 2);
    }

    #[test]
    fn a_spare_session_is_checked_in_the_middle_of_a_reply() {
        let mut stage = guarded(Worker::default(), 1);
        stage.check().unwrap();
        for position in (0..EVERY_ROWS).step_by(512) {
            step(&mut stage, position, 512).unwrap();
        }
        let before = stage.inner.log.len();
        step(&mut stage, EVERY_ROWS, 1).unwrap();
        assert_eq!(stage.inner.log[before..], ["1:0+3", "1:3+1", "1<0", "0:4096+1"]);
    }

    #[test]
    fn a_long_reply_has_a_row_asked_again_and_goes_on_as_if_not() {
        let mut stage = guarded(Worker::default(), 0);
        let mut plain = Worker::default();
        stage.check().unwrap();
        for position in (0..EVERY_ROWS).step_by(512) {
            step(&mut stage, position, 512).unwrap();
        }
        let before = stage.inner.log.len();
        for position in EVERY_ROWS..EVERY_ROWS + 3 {
            step(&mut stage, position, 1).unwrap();
        }
        assert_eq!(stage.inner.log[before..], ["0:4096+1", "0<4096", "0:4096+1", "0:4097+1", "0:4098+1"]);
        assert_eq!(stage.traffic().round_trips, 8 + 3);
        assert!(stage.time_aside() > Duration::ZERO);
        // the session holds what it would hold without
        let all = Rows::F32((0..512 * N_EMBD).map(|i| (i % 5) as f32).collect());
        for position in (0..EVERY_ROWS).step_by(512) {
            plain.submit(0, &[Span { session: 0, position, count: 512 }], &all).unwrap();
        }
        assert_eq!(stage.inner.sessions[0][..EVERY_ROWS as usize], plain.sessions[0][..]);
    }

    #[test]
    fn an_unsteady_worker_is_found_before_its_answer_is_handed_on() {
        // two steps of the canary, eight of the prompt, one of the reply: its repetition is the twelfth
        let mut stage = guarded(Worker { wrong_from: Some(11), ..Worker::default() }, 0);
        stage.check().unwrap();
        for position in (0..EVERY_ROWS).step_by(512) {
            step(&mut stage, position, 512).unwrap();
        }
        let error = step(&mut stage, EVERY_ROWS, 1).unwrap_err();
        assert!(matches!(error, StageError::Wrong(_)), "{error}");
        assert!(error.to_string().contains("asked the same row again"), "{error}");
    }

    #[test]
    fn a_worker_lost_in_a_check_is_lost_and_not_wrong() {
        let mut stage = guarded(Worker { lost_at: Some(1), ..Worker::default() }, 0);
        assert!(matches!(stage.check().unwrap_err(), StageError::Lost(_)));
        stage.reconnect().unwrap();
    }

    #[test]
    fn a_row_that_has_another_behind_it_is_not_taken_back() {
        let mut stage = guarded(Worker::default(), 0);
        stage.check().unwrap();
        for position in (0..EVERY_ROWS).step_by(512) {
            step(&mut stage, position, 512).unwrap();
        }
        let one = Rows::F32(vec![1.0; N_EMBD]);
        let mut out = Rows::empty(RowType::F32);
        for position in [EVERY_ROWS, EVERY_ROWS + 1] {
            stage.submit(position.into(), &[Span { session: 0, position, count: 1 }], &one).unwrap();
        }
        let before = stage.inner.log.len();
        for _ in 0..2 {
            stage.collect(&mut out).unwrap();
        }
        assert_eq!(stage.inner.log.len(), before);
        // the next one that stands alone is
        step(&mut stage, EVERY_ROWS + 2, 1).unwrap();
        assert_eq!(stage.inner.log[before..], ["0:4098+1", "0<4098", "0:4098+1"]);
    }

    #[test]
    fn small_steps_and_short_contexts_are_kept_to() {
        let mut stage = guarded(Worker::default(), 0);
        stage.room = Room { n_ctx: 2, max_rows: 1, ..stage.room };
        stage.check().unwrap();
        assert_eq!(stage.inner.log, ["0:0+1", "0:1+1", "0<0"]);
        // an answer beyond F16 is not asked for in F16
        let mut stage = guarded(Worker::default(), 0);
        stage.canary.max_abs = 70_000;
        stage.room.dtype = RowType::F16;
        stage.check().unwrap();
        assert!(stage.inner.log.is_empty());
    }
}
