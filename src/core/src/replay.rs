//! What a remote stage was given, kept on the host so that another worker (or the same one, restarted) can be
//! brought to the same state.
//!
//! A KV cache is bit-identical only when it is filled with the same chunks: rows that went together through
//! the matrix kernels once have to go together again. So the log keeps whole steps, with their boundaries,
//! and a step that was partly rewound is replayed whole and then rewound. What it costs: the boundary's
//! hidden rows of the tokens in the cache, `2 * n_embd` bytes a token on an F16 wire (7 KB for n_embd 3584).

use std::collections::VecDeque;

use crate::rows::Rows;
use crate::stage::Span;

/// One step as it was sent.
#[derive(Clone, Debug)]
pub struct LoggedStep {
    /// The number the caller gave it.
    pub id: u64,
    /// Which rows belong to which session.
    pub spans: Vec<Span>,
    /// The rows, in the order of the spans: (n_rows, n_embd).
    pub rows: Rows,
    /// How many rows of each span still count after rewinds.
    live: Vec<u32>,
}

/// What to send again, in this order.
#[derive(Debug, PartialEq)]
pub enum ReplayOp<'a> {
    /// A step, exactly as before.
    Step {
        /// The number the caller gave it.
        id: u64,
        /// As it was.
        spans: &'a [Span],
        /// As they were.
        rows: &'a Rows,
    },
    /// The rows of `session` from `position` on were taken back.
    Rewind {
        /// The session.
        session: u32,
        /// Its next position afterwards.
        position: u32,
    },
}

/// The steps since the sessions began, less what was rewound.
#[derive(Debug, Default)]
pub struct ReplayLog {
    steps: VecDeque<LoggedStep>,
}

impl ReplayLog {
    /// Remembers a step; its rows move into the log, and [`last`](Self::last) lends them for sending.
    pub fn push(&mut self, id: u64, spans: Vec<Span>, rows: Rows) {
        let live = spans.iter().map(|s| s.count).collect();
        self.steps.push_back(LoggedStep { id, spans, rows, live });
    }

    /// The step remembered last.
    pub fn last(&self) -> Option<&LoggedStep> {
        self.steps.back()
    }

    /// The rows of `session` from `position` on no longer count.
    pub fn rewind(&mut self, session: u32, position: u32) {
        for step in &mut self.steps {
            for (span, live) in step.spans.iter().zip(&mut step.live) {
                if span.session == session {
                    *live = (*live).min(position.saturating_sub(span.position));
                }
            }
            // A span of which nothing is left cannot be sent again: its session may stand before it by then.
            if step.live.contains(&0) && step.live.iter().any(|&l| l > 0) {
                step.drop_dead_spans();
            }
        }
        self.steps.retain(|step| step.live.iter().any(|&l| l > 0));
    }

    /// Takes the steps out that have not been answered: they will be sent anew and not replayed. They are the
    /// last ones, because steps are answered in order.
    pub fn take_unanswered(&mut self, is_unanswered: impl Fn(u64) -> bool) -> Vec<LoggedStep> {
        let answered = self.steps.iter().position(|s| is_unanswered(s.id)).unwrap_or(self.steps.len());
        self.steps.split_off(answered).into()
    }

    /// Everything to send to a stage that has forgotten all of it.
    pub fn ops(&self) -> impl Iterator<Item = ReplayOp<'_>> {
        self.steps.iter().flat_map(|step| {
            let whole = ReplayOp::Step { id: step.id, spans: &step.spans, rows: &step.rows };
            let cut = step.spans.iter().zip(&step.live).filter(|(span, live)| **live < span.count);
            let rewinds =
                cut.map(|(s, live)| ReplayOp::Rewind { session: s.session, position: s.position + live });
            std::iter::once(whole).chain(rewinds)
        })
    }

    /// Bytes of hidden rows held.
    pub fn bytes(&self) -> usize {
        self.steps.iter().map(|s| s.rows.bytes()).sum()
    }
}

impl LoggedStep {
    fn drop_dead_spans(&mut self) {
        let n_rows: u32 = self.spans.iter().map(|s| s.count).sum();
        let mut keep = Vec::with_capacity(n_rows as usize);
        for (span, &live) in self.spans.iter().zip(&self.live) {
            keep.extend(std::iter::repeat_n(live > 0, span.count as usize));
        }
        self.rows.retain_rows(&keep);
        let live = std::mem::take(&mut self.live);
        let mut alive = live.iter().map(|&l| l > 0);
        self.spans.retain(|_| alive.next().unwrap_or(false));
        self.live = live.into_iter().filter(|&l| l > 0).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const N_EMBD: usize = 2;

    fn span(session: u32, position: u32, count: u32) -> Span {
        Span { session, position, count }
    }

    /// Rows that name their step, so that a test can see which one filled a position.
    fn rows(id: u64, n: u32) -> Rows {
        Rows::F32(vec![id as f32; n as usize * N_EMBD])
    }

    /// What a stage's cache holds: for each session, per position the step (and its size) that wrote it.
    #[derive(Default, Debug, PartialEq, Clone)]
    struct Cache(BTreeMap<u32, Vec<(u64, usize)>>);

    impl Cache {
        fn step(&mut self, id: u64, spans: &[Span]) {
            for s in spans {
                let cells = self.0.entry(s.session).or_default();
                assert_eq!(cells.len(), s.position as usize, "a step must go on where its session stands");
                cells.extend(std::iter::repeat_n((id, s.count as usize), s.count as usize));
            }
        }
        fn rewind(&mut self, session: u32, position: u32) {
            self.0.entry(session).or_default().truncate(position as usize);
        }
        fn without_empty(mut self) -> Cache {
            self.0.retain(|_, c| !c.is_empty());
            self
        }
    }

    fn replayed(log: &ReplayLog) -> Cache {
        let mut cache = Cache::default();
        for op in log.ops() {
            match op {
                ReplayOp::Step { id, spans, rows } => {
                    let n: u32 = spans.iter().map(|s| s.count).sum();
                    assert_eq!(rows.bytes(), n as usize * N_EMBD * 4);
                    cache.step(id, spans);
                }
                ReplayOp::Rewind { session, position } => cache.rewind(session, position),
            }
        }
        cache.without_empty()
    }

    #[test]
    fn a_step_that_was_partly_rewound_is_replayed_whole_and_then_rewound() {
        let mut log = ReplayLog::default();
        log.push(0, vec![span(1, 0, 8)], rows(0, 8));
        log.push(1, vec![span(1, 8, 4)], rows(1, 4));
        log.rewind(1, 5);
        log.push(2, vec![span(1, 5, 1)], rows(2, 1));
        let ops: Vec<_> = log.ops().collect();
        assert!(matches!(ops[0], ReplayOp::Step { id: 0, .. }));
        assert_eq!(ops[1], ReplayOp::Rewind { session: 1, position: 5 });
        assert!(matches!(ops[2], ReplayOp::Step { id: 2, .. }));
        assert_eq!(ops.len(), 3);
        assert_eq!(log.bytes(), 9 * N_EMBD * 4);
    }

    #[test]
    fn a_rewound_session_does_not_take_another_sessions_rows_along() {
        let mut log = ReplayLog::default();
        log.push(0, vec![span(1, 0, 2), span(2, 0, 3)], rows(0, 5));
        log.rewind(1, 0);
        assert_eq!(log.bytes(), 3 * N_EMBD * 4);
        log.push(1, vec![span(1, 0, 1)], rows(1, 1));
        assert_eq!(replayed(&log).0[&2], vec![(0, 3); 3]);
        log.rewind(2, 0);
        log.rewind(1, 0);
        assert_eq!(log.ops().count(), 0);
    }

    proptest! {
        /// Single-session steps: the replayed cache is the original one, cell for cell and chunk for chunk.
        #[test]
        fn a_replayed_cache_is_the_same_cache(ops in proptest::collection::vec((0u32..3, 1u32..6, any::<bool>(), 0u32..20), 1..40)) {
            let mut log = ReplayLog::default();
            let mut cache = Cache::default();
            for (id, (session, count, is_rewind, to)) in (0u64..).zip(ops) {
                let at = cache.0.get(&session).map_or(0, |c| c.len() as u32);
                if is_rewind {
                    let to = to.min(at);
                    cache.rewind(session, to);
                    log.rewind(session, to);
                } else {
                    let spans = vec![span(session, at, count)];
                    cache.step(id, &spans);
                    log.push(id, spans, rows(id, count));
                }
                prop_assert_eq!(replayed(&log), cache.clone().without_empty());
            }
        }
    }
}
