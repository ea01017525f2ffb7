//! What a remote stage was given, kept on the host so that another worker (or the same one, restarted) can be
//! brought to the same state.
//!
//! A KV cache is bit-identical only when it is filled with the same chunks: rows that went together through
//! the matrix kernels once have to go together again. So the log keeps whole steps, with their boundaries.
//!
//! It is a log of operations, steps and rewinds, in the order in which the worker saw them, in two parts:
//!
//! * *sent*: from the oldest unanswered step on, as it was sent. When the worker is lost these go back to the schedule,
//!   rewinds included ([`take_unanswered`](ReplayLog::take_unanswered)), and nothing of them is replayed. A rewind among
//!   them takes nothing from the steps before it: those have yet to be answered.
//! * *done*: everything before. Here a rewind is folded into the steps it cut: each span has a number of rows that still
//!   count. A step of which no row counts is dropped; what is kept is every step of which some row does, whole. So the
//!   memory is bounded by what is in the cache: `2 * n_embd` bytes a row on an F16 wire (7 KB for n_embd 3584), times,
//!   at worst, the rows of a batch for each row that counts.
//!
//! A kept step is sent with all its rows, also those that no longer count, so that it has the same shape, and what does
//! not count is rewound behind it. Rows of which nothing counts any more may have lost what they stood on (their
//! session was rewound further and its steps dropped); they are sent at the position where their session stands by
//! then. What is identical: the rows of each step, their order and number, and the context of every row that counts.
//! What is not: the context of those that don't.
//!
//! A worker that [cannot take rows back](TakeBack) is sent only what counts: what stays of a batch has another shape then.
//! One that can take back a few is sent a step of which so few do not count whole.

use std::collections::{BTreeMap, VecDeque};

use crate::ids::{JobId, SessionId};
use crate::rows::{Rows, retain};
use crate::stage::{Span, TakeBack, n_rows};

/// One step as it was sent.
#[derive(Clone, Debug)]
pub struct LoggedStep {
    /// The job it is of.
    pub job: JobId,
    /// Which rows belong to which session.
    pub spans: Vec<Span>,
    /// The rows' token ids, in the same order, where the worker reads them.
    pub tokens: Vec<i32>,
    /// The rows, in the order of the spans: (n_rows, width).
    pub rows: Rows,
    /// How many rows of each span still count after rewinds; empty: all of them.
    live: Vec<u32>,
}

impl LoggedStep {
    fn live(&self) -> impl Iterator<Item = u32> {
        let all = self.spans.iter().map(|span| span.count).filter(|_| self.live.is_empty());
        all.chain(self.live.iter().copied())
    }

    /// The rows of `session` from `position` on no longer count.
    fn cut(&mut self, session: SessionId, position: u32) {
        let is_cut = |span: &Span| span.session() == session && span.end() > position;
        if !self.spans.iter().any(is_cut) {
            return;
        }
        if self.live.is_empty() {
            self.live = self.spans.iter().map(|span| span.count).collect();
        }
        for (span, live) in self.spans.iter().zip(&mut self.live) {
            if span.session() == session {
                *live = (*live).min(position.saturating_sub(span.position));
            }
        }
    }

    /// Lets go of the rows that do not count, of spans where they are more than can be taken back.
    fn shed(&mut self, take_back: TakeBack) {
        if self.live.is_empty() {
            return;
        }
        let stay = |span: &Span, live: u32| match take_back.reaches(span.count as usize, live as usize) {
            true => span.count,
            false => live,
        };
        let counts: Vec<u32> = self.spans.iter().zip(self.live()).map(|(s, live)| stay(s, live)).collect();
        let of = |(span, n): (&Span, &u32)| {
            let n = *n;
            (0..span.count).map(move |row| row < n)
        };
        let keep: Vec<bool> = self.spans.iter().zip(&counts).flat_map(of).collect();
        self.rows.retain_rows(&keep);
        retain(&mut self.tokens, &keep);
        self.spans.iter_mut().zip(&counts).for_each(|(span, n)| span.count = *n);
        let there: Vec<bool> = counts.iter().map(|n| *n > 0).collect();
        retain(&mut self.spans, &there);
        retain(&mut self.live, &there);
    }
}

/// What was sent.
#[derive(Clone, Debug)]
pub enum LoggedOp {
    /// A step.
    Step(LoggedStep),
    /// The rows of `session` from `position` on were taken back.
    Rewind {
        /// The session.
        session: SessionId,
        /// Its next position afterwards.
        position: u32,
    },
}

/// A session's own part of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct OwnRows {
    /// Its rows.
    pub count: u32,
    /// Those of them that count, from the first.
    pub live: u32,
    /// Their token ids, where the worker reads them.
    pub tokens: Vec<i32>,
    /// (count, width).
    pub rows: Rows,
}

/// What to send again, in this order.
#[derive(Debug, PartialEq)]
pub enum ReplayOp<'a> {
    /// A step, with the rows it had.
    Step {
        /// The job it is of.
        job: JobId,
        /// Whose rows they are, and where they go on.
        spans: Vec<Span>,
        /// As they were.
        tokens: &'a [i32],
        /// As they were.
        rows: &'a Rows,
    },
    /// The rows of `session` from `position` on are taken back.
    Rewind {
        /// The session.
        session: SessionId,
        /// Its next position afterwards.
        position: u32,
    },
}

/// The operations since the sessions began, less what no longer counts.
#[derive(Debug, Default)]
pub struct ReplayLog {
    done: VecDeque<LoggedStep>,
    sent: VecDeque<LoggedOp>,
    /// a worker that cannot take rows back is not sent what would have to be
    sheds: Option<TakeBack>,
}

impl ReplayLog {
    /// Of a worker that can take this much back.
    pub fn of(take_back: TakeBack) -> ReplayLog {
        ReplayLog { sheds: (take_back != TakeBack::ALL).then_some(take_back), ..ReplayLog::default() }
    }

    /// Remembers a step that is about to be sent; its rows move into the log, and [`last`](Self::last) lends them.
    pub fn push(&mut self, job: JobId, spans: Vec<Span>, tokens: Vec<i32>, rows: Rows) {
        self.sent.push_back(LoggedOp::Step(LoggedStep { job, spans, tokens, rows, live: Vec::new() }));
    }

    /// The step remembered last, if it has no answer and nothing was sent behind it.
    pub fn last(&self) -> Option<&LoggedStep> {
        match self.sent.back() {
            Some(LoggedOp::Step(step)) => Some(step),
            _ => None,
        }
    }

    /// The step remembered last was not sent after all: its rows.
    pub fn unsent(&mut self) -> Option<Rows> {
        match self.sent.pop_back()? {
            LoggedOp::Step(step) => Some(step.rows),
            rewind => {
                self.sent.push_back(rewind);
                None
            }
        }
    }

    /// The rows of `session` from `position` on are taken back, after everything sent so far.
    pub fn rewind(&mut self, session: SessionId, position: u32) {
        self.sent.push_back(LoggedOp::Rewind { session, position });
        self.settle();
    }

    /// The oldest step without an answer has been answered.
    pub fn answered(&mut self) {
        if let Some(LoggedOp::Step(step)) = self.sent.pop_front() {
            self.done.push_back(step);
        }
        self.settle();
    }

    /// The oldest step without an answer has failed, or was called off: nothing of it is kept.
    pub fn failed(&mut self) {
        self.sent.pop_front();
        self.settle();
    }

    /// Rewinds that no unanswered step stands before are done.
    fn settle(&mut self) {
        while let Some(&LoggedOp::Rewind { session, position }) = self.sent.front() {
            self.sent.pop_front();
            self.done.iter_mut().for_each(|step| step.cut(session, position));
            self.done.retain(|step| step.live().any(|live| live > 0));
            if let Some(take_back) = self.sheds {
                self.done.iter_mut().for_each(|step| step.shed(take_back));
            }
        }
    }

    /// Takes everything out from the oldest unanswered step on: it will be sent anew and not replayed.
    pub fn take_unanswered(&mut self) -> impl Iterator<Item = LoggedOp> {
        std::mem::take(&mut self.sent).into_iter()
    }

    /// How many steps there are to send to a stage that has forgotten all of it.
    pub fn n_steps(&self) -> usize {
        self.done.len()
    }

    /// Everything to send to a stage that has forgotten all of it, from the step with this number on. Where the
    /// sessions stand before it is in `standing`, and is kept there.
    pub fn ops_of<'a>(&'a self, step: usize, standing: &mut Standing) -> Option<Vec<ReplayOp<'a>>> {
        let step = self.done.get(step)?;
        let mut spans = step.spans.clone();
        let mut cuts = Vec::new();
        for (span, live) in spans.iter_mut().zip(step.live()) {
            let length = standing.0.entry(span.session).or_default();
            // Rows that count are where their session stands: the ones before them count too, and were written earlier.
            // Rows that don't go on wherever that is, at most where they were.
            debug_assert!(span.position == *length || (live == 0 && span.position > *length));
            span.position = *length;
            *length += live;
            if live < span.count {
                cuts.push(ReplayOp::Rewind { session: span.session(), position: *length });
            }
        }
        let mut ops = vec![ReplayOp::Step { job: step.job, spans, tokens: &step.tokens, rows: &step.rows }];
        ops.append(&mut cuts);
        Some(ops)
    }

    /// The step that wrote the rows of a session from `position` on, of a session that holds `length` rows, of which
    /// nothing is under way but rewinds to that.
    pub fn own_rows(&self, session: SessionId, position: u32, length: u32) -> Option<OwnRows> {
        self.done.iter().find_map(|step| {
            let n = n_rows(&step.spans) as usize;
            let mut first = 0;
            for (span, live) in step.spans.iter().zip(step.live()) {
                let rows = first..first + span.count as usize;
                first = rows.end;
                // only where rows count does the span say where they stand
                if span.session() == session && live > 0 && span.position == position {
                    let live = live.min(length.checked_sub(position).filter(|&rest| rest > 0)?);
                    let tokens = step.tokens.get(rows.clone()).unwrap_or_default().to_vec();
                    return Some(OwnRows { count: span.count, live, tokens, rows: step.rows.of(rows, n) });
                }
            }
            None
        })
    }

    /// Bytes of hidden rows held.
    pub fn bytes(&self) -> usize {
        let sent = self.sent.iter().map(|op| match op {
            LoggedOp::Step(step) => step.rows.bytes(),
            LoggedOp::Rewind { .. } => 0,
        });
        self.done.iter().map(|step| step.rows.bytes()).sum::<usize>() + sent.sum::<usize>()
    }
}

/// Where each session stands in the course of a replay; at first, nowhere.
#[derive(Debug, Default)]
pub struct Standing(BTreeMap<u32, u32>);

impl Standing {
    /// Nowhere.
    pub const NOWHERE: Standing = Standing(BTreeMap::new());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const N_EMBD: usize = 2;

    fn span(session: u32, position: u32, count: u32) -> Span {
        Span { session, position, count }
    }

    /// Rows that name their step, so that a test can see which one filled a position.
    fn rows(job: u64, n: u32) -> Rows {
        Rows::F32(vec![job as f32; n as usize * N_EMBD])
    }

    /// The step that wrote a position, the step's shape, and which of its rows this was.
    type Cell = (u64, Vec<(u32, u32)>, usize);

    /// What a worker was sent and has not answered.
    enum Unanswered {
        Step(u64, Vec<Span>),
        Rewind(u32, u32),
    }

    /// What a stage's cache holds: for each session, per position the step that wrote it, its shape (each span's session
    /// and count), and which row of it this was.
    #[derive(Default, Debug, PartialEq, Clone)]
    struct Cache(BTreeMap<u32, Vec<Cell>>);

    impl Cache {
        fn step(&mut self, job: u64, spans: &[Span]) {
            let shape: Vec<(u32, u32)> = spans.iter().map(|s| (s.session, s.count)).collect();
            let mut row = 0;
            for s in spans {
                let cells = self.0.entry(s.session).or_default();
                assert_eq!(cells.len(), s.position as usize, "a step must go on where its session stands");
                for _ in 0..s.count {
                    cells.push((job, shape.clone(), row));
                    row += 1;
                }
            }
        }
        fn rewind(&mut self, session: u32, position: u32) {
            self.0.entry(session).or_default().truncate(position as usize);
        }
        fn length(&self, session: u32) -> u32 {
            self.0.get(&session).map_or(0, |cells| cells.len() as u32)
        }
        fn without_empty(mut self) -> Cache {
            self.0.retain(|_, c| !c.is_empty());
            self
        }
    }

    fn all_ops(log: &ReplayLog) -> Vec<ReplayOp<'_>> {
        let mut standing = Standing::default();
        (0..log.n_steps()).flat_map(|step| log.ops_of(step, &mut standing).unwrap()).collect()
    }

    fn replayed(log: &ReplayLog) -> Cache {
        let mut cache = Cache::default();
        for op in all_ops(log) {
            match op {
                ReplayOp::Step { job, spans, rows, .. } => {
                    let n: u32 = spans.iter().map(|s| s.count).sum();
                    assert_eq!(rows.bytes(), n as usize * N_EMBD * 4);
                    cache.step(job.0, &spans);
                }
                ReplayOp::Rewind { session, position } => cache.rewind(session.0, position),
            }
        }
        cache.without_empty()
    }

    #[test]
    fn a_step_that_was_partly_rewound_is_replayed_whole_and_then_rewound() {
        let mut log = ReplayLog::default();
        for (job, at, n) in [(0, 0, 8), (1, 8, 4)] {
            log.push(JobId(job), vec![span(1, at, n)], Vec::new(), rows(job, n));
            log.answered();
        }
        log.rewind(SessionId(1), 5);
        log.push(JobId(2), vec![span(1, 5, 1)], Vec::new(), rows(2, 1));
        log.answered();
        let ops = all_ops(&log);
        assert!(matches!(ops[0], ReplayOp::Step { job: JobId(0), .. }));
        assert_eq!(ops[1], ReplayOp::Rewind { session: SessionId(1), position: 5 });
        assert!(matches!(ops[2], ReplayOp::Step { job: JobId(2), .. }));
        assert_eq!(ops.len(), 3);
        assert_eq!(log.bytes(), 9 * N_EMBD * 4);
    }

    #[test]
    fn a_rewind_behind_an_unanswered_step_takes_nothing_from_it() {
        let mut log = ReplayLog::default();
        log.push(JobId(0), vec![span(1, 0, 4)], Vec::new(), rows(0, 4));
        log.answered();
        log.push(JobId(1), vec![span(1, 4, 4)], Vec::new(), rows(1, 4));
        log.rewind(SessionId(1), 2);
        log.push(JobId(2), vec![span(1, 2, 1)], Vec::new(), rows(2, 1));
        assert_eq!(log.bytes(), 9 * N_EMBD * 4);
        let back: Vec<LoggedOp> = log.take_unanswered().collect();
        assert!(matches!(&back[0], LoggedOp::Step(step) if step.job == JobId(1) && step.rows == rows(1, 4)));
        assert!(matches!(back[1], LoggedOp::Rewind { position: 2, .. }));
        assert!(matches!(&back[2], LoggedOp::Step(step) if step.job == JobId(2)));
        // what was answered stands, whole
        assert_eq!(replayed(&log).length(1), 4);
    }

    #[test]
    fn dead_rows_keep_the_shape_of_a_batch_and_go_with_its_last_live_one() {
        let mut log = ReplayLog::default();
        log.push(JobId(0), vec![span(1, 0, 500)], Vec::new(), rows(0, 500));
        log.answered();
        log.push(JobId(1), vec![span(1, 500, 1), span(2, 0, 3)], Vec::new(), rows(1, 4));
        log.answered();
        log.rewind(SessionId(1), 0);
        // the long prompt of the session that ended is gone, its row in the batch is not
        assert_eq!(log.bytes(), 4 * N_EMBD * 4);
        assert_eq!(replayed(&log).0[&2][0].1, [(1, 1), (2, 3)]);
        assert_eq!(replayed(&log).length(1), 0);
        log.rewind(SessionId(2), 0);
        assert_eq!((log.bytes(), log.n_steps()), (0, 0));
    }

    #[test]
    fn a_session_s_own_part_of_a_step_is_its_rows_and_no_others() {
        let mut log = ReplayLog::default();
        let numbered = |from: u32, n: u32| Rows::F32((from * 2..(from + n) * 2).map(|x| x as f32).collect());
        log.push(JobId(0), vec![span(1, 0, 3)], vec![5, 6, 7], numbered(0, 3));
        log.push(JobId(1), vec![span(2, 0, 2), span(1, 3, 2)], vec![1, 2, 8, 9], numbered(10, 4));
        // another session's step without an answer, and a rewind that waits behind it
        log.push(JobId(2), vec![span(2, 2, 1)], vec![3], numbered(0, 1));
        log.answered();
        log.answered();
        log.rewind(SessionId(1), 4);
        let own =
            |count, live, tokens: &[i32], rows| Some(OwnRows { count, live, tokens: tokens.to_vec(), rows });
        assert_eq!(log.own_rows(SessionId(1), 0, 4), own(3, 3, &[5, 6, 7], numbered(0, 3)));
        assert_eq!(log.own_rows(SessionId(1), 3, 4), own(2, 1, &[8, 9], numbered(12, 2)));
        assert_eq!(log.own_rows(SessionId(2), 0, 2), own(2, 2, &[1, 2], numbered(10, 2)));
        assert_eq!(log.own_rows(SessionId(2), 2, 3), None, "it has no answer yet");
        assert_eq!(log.own_rows(SessionId(1), 1, 4), None, "no step begins there");
        assert_eq!(log.own_rows(SessionId(1), 4, 4), None);
    }

    proptest! {
        /// Batches of several sessions, rewinds, answers that come late, losses: the replayed cache is what the worker
        /// held when it had answered the last step that it answered, cell for cell and shape for shape.
        #[test]
        fn a_replayed_cache_is_the_same_cache(
            ops in proptest::collection::vec((0u32..3, 1u32..6, 0u32..8, 0u32..20, any::<bool>()), 1..60)
        ) {
            let mut log = ReplayLog::default();
            // as the worker will be when it has done everything sent, and what it has not answered
            let mut ahead = Cache::default();
            let mut answered = Cache::default();
            let mut sent: VecDeque<Unanswered> = VecDeque::new();
            for (job, (session, count, what, to, with_next)) in (0u64..).zip(ops) {
                match what {
                    0 | 1 => {
                        let to = to.min(ahead.length(session));
                        ahead.rewind(session, to);
                        log.rewind(SessionId(session), to);
                        sent.push_back(Unanswered::Rewind(session, to));
                    }
                    2 => {
                        log.take_unanswered().for_each(drop);
                        sent.clear();
                        ahead = answered.clone();
                    }
                    3 | 4 if sent.iter().any(|op| matches!(op, Unanswered::Step(..))) => {
                        let Some(Unanswered::Step(job, spans)) = sent.pop_front() else { unreachable!() };
                        answered.step(job, &spans);
                        log.answered();
                    }
                    _ => {
                        let other = (session + 1) % 3;
                        let mut spans = vec![span(session, ahead.length(session), count)];
                        if with_next {
                            spans.push(span(other, ahead.length(other), 1));
                        }
                        ahead.step(job, &spans);
                        log.push(JobId(job), spans.clone(), Vec::new(), rows(job, spans.iter().map(|s| s.count).sum()));
                        sent.push_back(Unanswered::Step(job, spans));
                    }
                }
                while let Some(&Unanswered::Rewind(session, to)) = sent.front() {
                    sent.pop_front();
                    answered.rewind(session, to);
                }
                prop_assert_eq!(replayed(&log), answered.clone().without_empty());
                // bounded by what counts: no step without a row that does
                let live: std::collections::BTreeSet<u64> =
                    answered.0.values().flatten().map(|cell| cell.0).collect();
                prop_assert_eq!(log.n_steps(), live.len());
            }
        }
    }
}
