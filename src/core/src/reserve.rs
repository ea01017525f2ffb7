//! A worker's blocks in this process, once the worker has stayed away for longer than somebody wants to wait.
//!
//! ```text
//! OrHere: There (every call is the worker's) -- given up --> Wanted --> Coming --> Here (every call is the stage's)
//!                   ^---------------------------- it could not be made ----'
//! ```
//!
//! To the [pipeline](crate::pipeline) the stage is a worker that was found again with an empty memory: it is replayed what
//! it has to know, in the chunks in which it went, and gives what the worker would have given. It stays here.
//!
//! It computes when it is polled, a step at a time, and tells of it when it is polled again: so whoever drives the pipeline
//! looks at what else there is between two steps, as with stages that were here from the start.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::bell::Bell;
use crate::blocks::BlockRange;
use crate::guard::Guard;
use crate::ids::{JobId, SessionId};
use crate::rows::Rows;
use crate::stage::{
    Answer, LocalStage, RemoteStage, Span, StageError, StageInput, StageOutput, TakeBack, Traffic,
};

/// What makes a stage of this process out of a file, when it is needed.
pub trait Reserve: Send {
    /// Begins to make it, without waiting, and gives up what was begun before. `bell` is rung when
    /// [`poll`](Self::poll) has its outcome.
    fn begin(&mut self, bell: &Bell);
    /// The stage, empty; `None` while it is being made.
    ///
    /// # Errors
    /// It cannot be made: [refused](StageError::Refused), with a sentence that says why.
    fn poll(&mut self) -> Result<Option<Box<dyn LocalStage>>, StageError>;
}

/// A worker's stage, or in its place one of this process.
pub struct OrHere {
    worker: Box<dyn RemoteStage>,
    reserve: Box<dyn Reserve>,
    place: Place,
    /// as the worker does
    reads_tokens: bool,
    bell: Option<Bell>,
}

enum Place {
    There,
    /// the next attempt to connect is one to make it here
    Wanted,
    Coming,
    Here(Here),
}

/// A stage of this process, asked as a worker is.
struct Here {
    stage: Box<dyn LocalStage>,
    waiting: VecDeque<Waiting>,
    done: VecDeque<(Answer, Rows)>,
}

struct Waiting {
    job: JobId,
    spans: Vec<Span>,
    tokens: Vec<i32>,
    rows: Rows,
}

impl OrHere {
    /// A worker that is connected, and what takes its place.
    pub fn new(worker: Box<dyn RemoteStage>, reserve: Box<dyn Reserve>) -> OrHere {
        let reads_tokens = worker.reads_tokens();
        OrHere { worker, reserve, place: Place::There, reads_tokens, bell: None }
    }

    fn ring(&self) {
        if let Some(bell) = &self.bell {
            bell.ring();
        }
    }
}

impl Here {
    /// Computes the oldest step that waits, if any does.
    fn compute(&mut self) -> bool {
        let Some(Waiting { job, spans, tokens, rows }) = self.waiting.pop_front() else { return false };
        let mut out = Rows::empty(rows.row_type());
        let input = StageInput::Rows { rows: rows.as_ref(), tokens: &tokens };
        let answer = match self.stage.evaluate(&spans, input, StageOutput::Rows(&mut out)) {
            Ok(compute) => Answer::done(job, compute, Duration::ZERO),
            Err(error) => {
                let failed = Some(error);
                Answer { failed, ..Answer::done(job, Duration::ZERO, Duration::ZERO) }
            }
        };
        self.done.push_back((answer, out));
        true
    }

    fn answer(&mut self, rows: &mut Rows) -> Option<Answer> {
        let (answer, out) = self.done.pop_front()?;
        *rows = out;
        Some(answer)
    }
}

impl RemoteStage for OrHere {
    fn name(&self) -> String {
        match &self.place {
            Place::Here(here) => here.stage.name(),
            _ => self.worker.name(),
        }
    }

    fn blocks(&self) -> Option<BlockRange> {
        self.worker.blocks()
    }

    fn max_in_flight(&self) -> usize {
        match &self.place {
            Place::Here(_) => 1,
            _ => self.worker.max_in_flight(),
        }
    }

    fn n_sessions(&self) -> u32 {
        self.worker.n_sessions()
    }

    fn reads_tokens(&self) -> bool {
        self.reads_tokens
    }

    fn take_back(&self) -> TakeBack {
        self.worker.take_back()
    }

    fn submit(&mut self, job: JobId, spans: &[Span], tokens: &[i32], rows: &Rows) -> Result<(), StageError> {
        let Place::Here(here) = &mut self.place else {
            return self.worker.submit(job, spans, tokens, rows);
        };
        let (spans, tokens, rows) = (spans.to_vec(), tokens.to_vec(), rows.clone());
        here.waiting.push_back(Waiting { job, spans, tokens, rows });
        self.ring();
        Ok(())
    }

    fn cancel(&mut self, job: JobId) {
        // what waits here is computed at once: there is nothing to save
        if !matches!(self.place, Place::Here(_)) {
            self.worker.cancel(job);
        }
    }

    fn poll(&mut self, rows: &mut Rows) -> Result<Option<Answer>, StageError> {
        let Place::Here(here) = &mut self.place else { return self.worker.poll(rows) };
        let answer = here.answer(rows);
        if answer.is_none() && here.compute() {
            self.ring();
        }
        Ok(answer)
    }

    fn collect_until(
        &mut self,
        rows: &mut Rows,
        deadline: Option<Instant>,
    ) -> Result<Option<Answer>, StageError> {
        let Place::Here(here) = &mut self.place else { return self.worker.collect_until(rows, deadline) };
        if here.done.is_empty() {
            here.compute();
        }
        Ok(here.answer(rows))
    }

    fn notify(&mut self, bell: Option<Bell>) {
        if !matches!(self.place, Place::Here(_)) {
            self.worker.notify(bell.clone());
        }
        self.bell = bell;
        if let Place::Here(here) = &self.place
            && !(here.waiting.is_empty() && here.done.is_empty())
        {
            self.ring();
        }
    }

    fn poll_at(&self) -> Option<Instant> {
        match &self.place {
            Place::There => self.worker.poll_at(),
            _ => None,
        }
    }

    fn rewind(&mut self, session: SessionId, position: u32) -> Result<(), StageError> {
        let Place::Here(here) = &mut self.place else { return self.worker.rewind(session, position) };
        // in order with the steps
        while here.compute() {}
        let rewound = here.stage.rewind(session, position);
        if !here.done.is_empty() {
            self.ring();
        }
        rewound
    }

    fn begin_reconnect(&mut self, bell: &Bell) {
        match self.place {
            Place::There => self.worker.begin_reconnect(bell),
            Place::Wanted | Place::Coming | Place::Here(_) => {
                self.reserve.begin(bell);
                self.place = Place::Coming;
            }
        }
    }

    fn poll_connected(&mut self) -> Result<bool, StageError> {
        match self.place {
            Place::There => return self.worker.poll_connected(),
            Place::Wanted => return Ok(false),
            Place::Here(_) => return Ok(true),
            Place::Coming => {}
        }
        let made = match self.reserve.poll() {
            Ok(None) => return Ok(false),
            // what stands on the worker's was built upon it
            Ok(Some(stage)) if stage.take_back() < self.worker.take_back() => {
                Err(StageError::refused("its blocks cannot take back here what the worker could"))
            }
            Ok(Some(stage)) => Ok(stage),
            Err(error) => Err(error),
        };
        // the worker is looked for again, by the next step that needs it
        self.place = Place::There;
        let (waiting, done) = (VecDeque::new(), VecDeque::new());
        self.place = Place::Here(Here { stage: made?, waiting, done });
        Ok(true)
    }

    fn fall_back(&mut self) -> bool {
        let can = matches!(self.place, Place::There);
        if can {
            self.place = Place::Wanted;
        }
        can
    }

    fn traffic(&self) -> Traffic {
        self.worker.traffic()
    }

    fn guard(&mut self) -> Option<&mut Guard> {
        match self.place {
            Place::There => self.worker.guard(),
            // this process is not held against itself
            _ => None,
        }
    }
}
