//! Sessions out of a pipeline and into another one, a [step](SavedStep) at a time.

use std::time::Duration;

use super::{Kind, Pipeline, PipelineError, StepWork, Work, take_back};
use crate::ids::{JobId, SessionId, StageId};
use crate::replay::OwnRows;
use crate::rows::Rows;
use crate::saved::SavedStep;
use crate::schedule::StepKind;
use crate::stage::{Span, StageError, TakeBack};

impl Pipeline {
    /// Whether sessions can be saved: every stage of this process can save its own, and none has to evaluate anew what it
    /// takes back.
    pub fn can_save(&self) -> bool {
        let can = |slot: &super::Slot| match &slot.kind {
            Kind::Local(stage) => stage.saved_bytes().is_some(),
            Kind::Remote(_) => true,
        };
        take_back(&self.slots) == TakeBack::ALL && self.slots.iter().all(can)
    }

    /// Steps of a session from `position` on: all of them, or so many that they take some megabytes, for meanwhile nothing
    /// else is done here. Where no worker has steps of it they have `most` rows. The session holds `length` rows and has
    /// nothing under way but rewinds to that. None: there is no first one to be had, because batches lost rows on their way
    /// and the steps are not the same everywhere.
    ///
    /// # Errors
    /// A stage cannot save one.
    pub fn save_steps(
        &mut self,
        session: SessionId,
        position: u32,
        length: u32,
        most: u32,
    ) -> Result<Vec<SavedStep>, PipelineError> {
        let (mut steps, mut end, mut bytes) = (Vec::new(), position, 0);
        while end < length
            && bytes < SAVED_AT_ONCE
            && let Some(step) = self.save_step(session, end, length, most)?
        {
            end = step.end();
            bytes += step.states.iter().map(Vec::len).sum::<usize>();
            steps.push(step);
        }
        Ok(steps)
    }

    /// The one that wrote the rows from `position` on, of which there are some.
    fn save_step(
        &mut self,
        session: SessionId,
        position: u32,
        length: u32,
        most: u32,
    ) -> Result<Option<SavedStep>, PipelineError> {
        let (mut rows, mut step): (Vec<Rows>, Option<OwnRows>) = (Vec::new(), None);
        for slot in &self.slots {
            let Kind::Remote(remote) = &slot.kind else { continue };
            let Some(mut own) = remote.log.own_rows(session, position, length) else { return Ok(None) };
            rows.push(std::mem::replace(&mut own.rows, Rows::empty(self.dtype)));
            match &mut step {
                Some(first) if (first.count, first.live) != (own.count, own.live) => return Ok(None),
                // any of them may be the one that reads them
                Some(first) if first.tokens.is_empty() => first.tokens = own.tokens,
                Some(_) => {}
                first => *first = Some(own),
            }
        }
        let (count, live, mut tokens) = match step {
            Some(own) => (own.count, own.live, own.tokens),
            None => {
                let n = length.saturating_sub(position).min(most.max(1));
                (n, n, Vec::new())
            }
        };
        tokens.resize(count as usize, 0);
        let mut states = Vec::new();
        for slot in &mut self.slots {
            let Kind::Local(stage) = &mut slot.kind else { continue };
            let saved = stage.save(session, position, position + live);
            let stage = &slot.name;
            states.push(saved.map_err(|source| PipelineError::Stage { stage: stage.clone(), source })?);
        }
        Ok(Some(SavedStep { position, tokens, live, rows, states }))
    }

    /// Gives a session a step that was saved, as [`submit`](Self::submit) gives one: behind all others of the session, and
    /// with a result, which has no logits.
    pub fn restore(&mut self, session: SessionId, mut step: SavedStep) -> JobId {
        let (count, end) = (step.count(), step.end());
        let span = Span { session: session.0, position: step.position, count };
        let tokens = std::mem::take(&mut step.tokens);
        let job = self.schedule.push(session, StepKind::Prefill, count);
        let is_cut = step.live < count;
        let want_logits = vec![false; tokens.len()];
        let work = StepWork { saved: Some(Box::new(step)), ..StepWork::new(span, tokens, want_logits) };
        self.work.insert(job, Work::Step(work));
        self.given(session, job);
        if is_cut {
            self.rewind(session, end);
        }
        job
    }

    /// A step's own part of a stage of this process is put back.
    pub(super) fn put_back(&mut self, id: JobId, at: StageId) {
        let nth = self.slots[..at.0].iter().filter(|slot| matches!(slot.kind, Kind::Local(_))).count();
        let worker = self.worker(at.0 + 1);
        let slot = &mut self.slots[at.0];
        let (Kind::Local(stage), Some(Work::Step(step))) = (&mut slot.kind, self.work.get_mut(id)) else {
            unreachable!("the schedule runs steps on local stages")
        };
        self.spare.extend(step.hidden.take());
        match restored(&mut **stage, step, nth).and_then(|spent| {
            step.hidden = worker.map(|worker| step.take_rows(worker)).transpose()?;
            Ok(spent)
        }) {
            Ok(spent) => slot.stats.compute += spent,
            Err(source) => {
                let error = PipelineError::Stage { stage: slot.name.clone(), source };
                self.fail_members(id, at, &error);
                return self.done(id, at);
            }
        }
        match at.0 + 1 == self.slots.len() {
            true => self.came_out(id, at, Vec::new()),
            false => self.done(id, at),
        }
    }

    /// Where the stage is a worker's: how many workers come before it.
    pub(super) fn worker(&self, stage: usize) -> Option<usize> {
        let is_remote = |slot: &super::Slot| matches!(slot.kind, Kind::Remote(_));
        let before = self.slots.iter().take(stage).filter(|slot| is_remote(slot)).count();
        self.slots.get(stage).is_some_and(is_remote).then_some(before)
    }
}

impl StepWork {
    /// Of a saved step, what the worker with this number is to be given.
    pub(super) fn take_rows(&mut self, worker: usize) -> Result<Rows, StageError> {
        let rows = self.saved.as_mut().and_then(|saved| saved.rows.get_mut(worker));
        let rows = rows.ok_or_else(|| StageError::failed(OTHER_STAGES))?;
        let empty = Rows::empty(rows.row_type());
        Ok(std::mem::replace(rows, empty))
    }
}

fn restored(
    stage: &mut dyn crate::stage::LocalStage,
    step: &mut StepWork,
    nth: usize,
) -> Result<Duration, StageError> {
    let saved = step.saved.as_mut().ok_or_else(|| StageError::failed(OTHER_STAGES))?;
    let state = saved.states.get_mut(nth).map(std::mem::take);
    let tokens = step.tokens.get(..saved.live as usize);
    let (Some(state), Some(tokens)) = (state, tokens) else { return Err(StageError::failed(OTHER_STAGES)) };
    stage.restore(Span { count: saved.live, ..step.spans[0] }, tokens, &state)
}

/// Bytes of what stages save that are copied before others have their turn.
const SAVED_AT_ONCE: usize = 16 << 20;

const OTHER_STAGES: &str = "what was saved is of other stages";
