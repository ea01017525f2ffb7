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
}

impl Lane {
    pub(super) fn front(&self) -> Option<What> {
        self.items.front().map(|item| item.what)
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
        // a rewind costs nothing
        if self.stages[0].takes(What::Rewind)
            && let Some(at) = self.lanes.iter().position(|lane| lane.front() == Some(What::Rewind))
        {
            return self.entry_of(at);
        }
        if self.under_way >= self.limit || !self.stages[0].takes(What::Step(StepKind::Decode)) {
            return None;
        }
        let decode = self.next_lane(StepKind::Decode);
        let is_alone = self.lanes.len() == 1 && decode.is_some();
        let prefill = if is_alone { None } else { self.next_lane(StepKind::Prefill) };
        let at = match (decode, prefill.filter(|&at| self.may_prefill(at))) {
            (Some(decode), Some(prefill)) => {
                let replies = self.lanes.iter().filter(|lane| lane.is_in_reply()).count();
                if self.decodes_in_a_row >= replies { prefill } else { decode }
            }
            (decode, prefill) => decode.or(prefill)?,
        };
        let mut rows = self.lanes[at].items.front().map_or(0, |item| item.rows);
        let mut entry = self.entry_of(at)?;
        // of a batch too the turn goes to the lane behind its first: who did not fit is not passed over
        self.turn = at + 1;
        if entry.what == What::Step(StepKind::Prefill) {
            self.decodes_in_a_row = 0;
            self.prefills_under_way += 1;
            self.lanes.iter_mut().for_each(|lane| lane.has_replied = false);
        } else {
            // one step of each session that has one ready, as far as there is room
            let n_lanes = self.lanes.len();
            for at in (1..n_lanes).map(|i| (at + i) % n_lanes) {
                let Some(item) = self.lanes[at].items.front().copied() else { continue };
                if item.what != What::Step(StepKind::Decode) || rows + item.rows > self.batch_rows {
                    continue;
                }
                rows += item.rows;
                entry.others.extend(self.entry_of(at).map(|entry| entry.first));
            }
            self.decodes_in_a_row += entry.members().count();
        }
        self.under_way += 1;
        Some(entry)
    }

    /// Sessions end without a word to the schedule: once there are many lanes, those with nothing in them go.
    pub(super) fn forget_idle_lanes(&mut self) {
        if self.lanes.len() < MANY_LANES {
            return;
        }
        let in_turn = self.lanes.get(self.turn % self.lanes.len()).map(|lane| lane.session);
        self.lanes.retain(|lane| !lane.items.is_empty() || lane.decodes_under_way > 0);
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
        (0..n).map(|i| (self.turn + i) % n).find(|&at| self.lanes[at].front() == Some(What::Step(kind)))
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
