//! Stage 0's queue: a lane for each session, and which of them has its turn.

use std::collections::VecDeque;

use super::{Entry, Member, Schedule, StageQueue, StepKind, What};
use crate::ids::{JobId, SessionId};

/// What a session has waiting for stage 0.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) session: SessionId,
    pub(super) items: VecDeque<LaneItem>,
    /// steps of its reply that are between the start of stage 0 and the end of the last stage
    pub(super) decodes_under_way: usize,
    /// a step of its reply has left since the last chunk of any prompt started: its next one is likely to come soon
    pub(super) has_replied: bool,
    /// steps of other replies that have started since there was anything of it
    pub(super) passed: usize,
}

impl Lane {
    pub(super) fn front(&self) -> Option<What> {
        self.items.front().map(|item| item.what)
    }

    /// Whether anything of it waits or is under way.
    fn has_steps(&self) -> bool {
        !self.items.is_empty() || self.decodes_under_way > 0
    }

    /// Whether its first item is a step of this kind.
    fn begins_with(&self, kind: StepKind) -> bool {
        self.front() == Some(What::Step(kind))
    }

    /// Whether its token has just come out, and nothing else has started since.
    fn is_about_to_go_on(&self) -> bool {
        self.has_replied && !self.has_steps() && self.passed == 0
    }

    pub(super) fn is_in_reply(&self) -> bool {
        self.has_replied
            || self.decodes_under_way > 0
            || self.items.iter().any(|item| item.what == What::Step(StepKind::Decode))
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct LaneItem {
    pub(super) job: JobId,
    pub(super) what: What,
    pub(super) rows: u32,
}

impl Schedule {
    /// What a lane has for stage 0: its own turn, or a batch.
    pub(super) fn enter(&mut self) -> Option<Entry> {
        let at = self.lane_in_turn()?;
        if self.lanes[at].front() == Some(What::Rewind) {
            return self.entry_of(at);
        }
        let batch = self.batch_with(at);
        let mut batch = batch.into_iter().filter_map(|at| self.entry_of(at));
        let mut entry = batch.next()?;
        entry.others.extend(batch.map(|entry| entry.first));
        // of a batch too the turn goes to the lane behind its first: who did not fit is not passed over
        self.turn = at + 1;
        if entry.what == What::Step(StepKind::Prefill) {
            self.decodes_in_a_row = 0;
            self.prefills_under_way += 1;
            self.lanes.iter_mut().for_each(|lane| lane.has_replied = false);
        } else {
            self.decodes_in_a_row += entry.members().count();
            for lane in self.lanes.iter_mut().filter(|lane| !lane.has_steps()) {
                lane.passed += 1;
            }
        }
        self.under_way += 1;
        Some(entry)
    }

    /// The lanes whose first steps go together if this one's goes, in order of their sessions: of a reply those of its batch that
    /// have one ready, as far as there is room.
    fn batch_with(&mut self, at: usize) -> Vec<usize> {
        if !self.lanes[at].begins_with(StepKind::Decode) {
            return vec![at];
        }
        let rows_of = |lane: &Lane| lane.items.front().map_or(0, |item| item.rows);
        let mut rows = rows_of(&self.lanes[at]);
        let mut batch = self.batch_of(at);
        batch.retain(|&other| {
            let lane = &self.lanes[other];
            let goes =
                other == at || lane.begins_with(StepKind::Decode) && rows + rows_of(lane) <= self.batch_rows;
            rows += if goes && other != at { rows_of(lane) } else { 0 };
            goes
        });
        batch
    }

    /// The lanes of the batch that this reply is one of, in order of their sessions. They lie side by side: llama.cpp takes
    /// sessions in one pass whose numbers follow on each other, and makes a pass for each gap.
    fn batch_of(&mut self, at: usize) -> Vec<usize> {
        let (_, of_each) = self.batches();
        let mut all: Vec<usize> =
            (0..self.lanes.len()).filter(|&i| i == at || self.goes_on(&self.lanes[i])).collect();
        all.sort_unstable_by_key(|&at| self.lanes[at].session);
        let place = all.iter().position(|&other| other == at).unwrap_or_default();
        let begin = place - place % of_each;
        all.drain(begin..all.len().min(begin.saturating_add(of_each))).collect()
    }

    /// Whether a reply is likely to have another step: not if it had none for two rounds.
    fn goes_on(&self, lane: &Lane) -> bool {
        lane.is_in_reply() && lane.passed < 2 * self.groups.chosen().max(1)
    }

    /// The lane whose first item stage 0 would start now.
    fn lane_in_turn(&mut self) -> Option<usize> {
        // a rewind costs nothing
        if self.stages[0].takes(What::Rewind)
            && let Some(at) = self.lanes.iter().position(|lane| lane.front() == Some(What::Rewind))
        {
            return Some(at);
        }
        if self.under_way >= self.limit || !self.stages[0].takes(What::Step(StepKind::Decode)) {
            return None;
        }
        let decode = self.next_lane(StepKind::Decode).filter(|_| self.has_room_for_a_batch());
        let is_alone = self.lanes.len() == 1 && decode.is_some();
        let prefill = if is_alone { None } else { self.next_lane(StepKind::Prefill) };
        match (decode, prefill.filter(|&at| self.may_prefill(at))) {
            (Some(decode), Some(prefill)) => {
                let replies = self.lanes.iter().filter(|lane| lane.is_in_reply()).count();
                Some(if self.decodes_in_a_row >= replies { prefill } else { decode })
            }
            (decode, prefill) => decode.or(prefill),
        }
    }

    fn has_room_for_a_batch(&mut self) -> bool {
        let (groups, _) = self.batches();
        self.under_way - self.prefills_under_way < groups
    }

    /// In how many batches replies go on, and how many of them in each; no bound where there are no batches, and where a
    /// reply has no other beside it.
    fn batches(&mut self) -> (usize, usize) {
        let replies = self.lanes.iter().filter(|lane| self.goes_on(lane)).count();
        if self.batch_rows <= 1 || replies <= 1 {
            return (usize::MAX, usize::MAX);
        }
        let groups = self.groups.of(replies);
        (groups, replies.div_ceil(groups))
    }

    /// Whether what stage 0 would start is no chunk of a prompt that a reply further on would wait for.
    pub(super) fn enters_without_harm(&mut self) -> bool {
        self.lane_in_turn().is_some_and(|at| !self.lanes[at].begins_with(StepKind::Prefill))
            || !self.lanes.iter().any(Lane::is_in_reply)
    }

    /// Whether it is worth waiting a moment for replies whose token has just come out: stage 0 would start a batch that has
    /// room for them, or a stage behind it would run while the first worker has nothing to do.
    pub fn awaits_company(&mut self) -> bool {
        let has_company = self.lanes.iter().any(Lane::is_about_to_go_on);
        if !has_company || self.is_computing() {
            return false;
        }
        if self.batches().0 == usize::MAX || !self.has_room_for_a_batch() {
            return false;
        }
        let runs_later =
            self.stages.iter().skip(1).any(|stage| !stage.is_remote() && !stage.waiting.is_empty());
        if runs_later && !self.stages.get(1).is_some_and(StageQueue::is_hungry) {
            return false;
        }
        match self.next_lane(StepKind::Decode) {
            Some(at) => self.batch_of(at).into_iter().any(|at| self.lanes[at].is_about_to_go_on()),
            None => runs_later,
        }
    }

    /// Sessions end without a word to the schedule: once there are many lanes, those with nothing in them go.
    pub(super) fn forget_idle_lanes(&mut self) {
        if self.lanes.len() < MANY_LANES {
            return;
        }
        let in_turn = self.lanes.get(self.turn % self.lanes.len()).map(|lane| lane.session);
        self.lanes.retain(Lane::has_steps);
        let turn = self.lanes.iter().position(|lane| Some(lane.session) == in_turn);
        self.turn = turn.unwrap_or(0);
    }

    /// Pops a lane's first item.
    fn entry_of(&mut self, at: usize) -> Option<Entry> {
        let lane = &mut self.lanes[at];
        let item = lane.items.pop_front()?;
        self.n_in_lanes -= 1;
        lane.decodes_under_way += usize::from(item.what == What::Step(StepKind::Decode));
        let first = Member { job: item.job, session: Some(lane.session), is_void: false };
        Some(Entry { first, others: Vec::new(), what: item.what, last: self.stages.len() - 1 })
    }

    /// The next lane in turn whose first item is a step of this kind.
    fn next_lane(&self, kind: StepKind) -> Option<usize> {
        let n = self.lanes.len();
        (0..n).map(|i| (self.turn + i) % n).find(|&at| self.lanes[at].begins_with(kind))
    }

    /// Whether a chunk of this lane's prompt may start: not if another session's next token would find more than one
    /// in a window.
    fn may_prefill(&self, lane: usize) -> bool {
        if self.prefills_under_way == 0 {
            return true;
        }
        let mut others = self.lanes.iter().enumerate().filter(|&(at, _)| at != lane);
        if !others.any(|(_, lane)| lane.is_in_reply()) {
            return true;
        }
        let n_remotes = self.stages.iter().filter(|s| s.is_remote()).count();
        let first_remote = self.stages.iter().position(StageQueue::is_remote).unwrap_or(0);
        let ahead = self.stages[..=first_remote].iter().any(StageQueue::holds_prefill);
        !ahead && self.prefills_under_way < n_remotes
    }
}

/// Lanes that are kept whether or not anything is in them.
pub(super) const MANY_LANES: usize = 64;
