//! What each session was given, for pipelines with a stage that cannot take rows back: a recurrent state knows only where
//! it is.
//!
//! There a rewind is a beginning anew. Every stage forgets the session, and what should stay of it goes through all of
//! them once more, in the steps in which it went before; only the last of those is shorter, if the rewind cut it. So the
//! states come out as they were, bit for bit, but for the rows of a step that was cut, which had another shape.
//!
//! Where all stages have snapshots of their states ([`TakeBack`]), a few rows of the last step are taken back by them. A
//! step that was cut by as few rows is then given again whole, and cut in the same way: the states come out as they were,
//! bit for bit, by whichever way they were come to.
//!
//! It is kept as tokens, 4 bytes a row: from them each stage's own input follows again.

use std::collections::BTreeMap;

use crate::ids::SessionId;
use crate::stage::TakeBack;

/// Rows that went through the stages together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// the position of the first
    pub(crate) position: u32,
    pub(crate) tokens: Vec<i32>,
    /// rows of it that count: fewer than it has where snapshots took the others back
    pub(crate) live: usize,
}

impl Chunk {
    /// The position behind what counts of it.
    pub(crate) fn end(&self) -> u32 {
        self.position.saturating_add(u32::try_from(self.live).unwrap_or(u32::MAX))
    }

    /// Whether all rows count.
    pub(crate) fn is_whole(&self) -> bool {
        self.live == self.tokens.len()
    }
}

/// Where every stage can take everything back nothing is kept.
#[derive(Debug)]
pub(crate) struct History {
    take_back: TakeBack,
    sessions: BTreeMap<SessionId, Given>,
}

#[derive(Debug, Default)]
struct Given {
    chunks: Vec<Chunk>,
    /// a step of it has failed: where its states are nobody knows
    is_broken: bool,
}

impl Given {
    fn cut(&mut self, position: u32, take_back: TakeBack) {
        while let Some(last) = self.chunks.last_mut() {
            let keep = position.saturating_sub(last.position) as usize;
            if keep >= last.live {
                break;
            }
            if keep == 0 {
                self.chunks.pop();
                continue;
            }
            if !take_back.reaches(last.tokens.len(), keep) {
                last.tokens.truncate(keep);
            }
            last.live = keep;
        }
    }

    /// The position behind them.
    fn length(&self) -> u32 {
        self.chunks.last().map_or(0, Chunk::end)
    }

    /// Whether the stages hold snapshots that a rewind to here needs: of the last step, once.
    fn has_snapshot(&self, position: u32, take_back: TakeBack) -> bool {
        self.chunks.last().is_some_and(|last| {
            let keep = position.saturating_sub(last.position) as usize;
            !self.is_broken && last.is_whole() && take_back.reaches(last.tokens.len(), keep)
        })
    }
}

impl History {
    /// Of stages that can all take this much back.
    pub(crate) fn new(take_back: TakeBack) -> History {
        History { take_back, sessions: BTreeMap::new() }
    }

    /// A session is given a step.
    pub(crate) fn gave(&mut self, session: SessionId, position: u32, tokens: &[i32]) {
        if self.take_back == TakeBack::ALL {
            return;
        }
        let given = self.sessions.entry(session).or_default();
        // what was cancelled is cut by the rewind that has to follow; a caller that leaves that out is cut here
        given.cut(position, self.take_back);
        given.chunks.push(Chunk { position, tokens: tokens.to_vec(), live: tokens.len() });
    }

    /// A step of a session has failed, or was called off: not every stage has it.
    pub(crate) fn broke(&mut self, session: SessionId) {
        if let Some(given) = self.sessions.get_mut(&session) {
            given.is_broken = true;
        }
    }

    /// A session is rewound: `None` where its stages can do that, else what it has to be given again from its beginning.
    pub(crate) fn rewind(&mut self, session: SessionId, position: u32) -> Option<Vec<Chunk>> {
        if self.take_back == TakeBack::ALL {
            return None;
        }
        if position == 0 {
            self.sessions.remove(&session);
            return None;
        }
        let given = self.sessions.get_mut(&session)?;
        if position >= given.length() && !given.is_broken {
            return None;
        }
        let has_snapshot = given.has_snapshot(position, self.take_back);
        given.cut(position, self.take_back);
        if has_snapshot {
            return None;
        }
        given.is_broken = false;
        Some(given.chunks.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: SessionId = SessionId(0);

    fn chunk(position: u32, tokens: &[i32]) -> Chunk {
        Chunk { position, tokens: tokens.to_vec(), live: tokens.len() }
    }

    #[test]
    fn what_stays_is_given_again_in_the_steps_in_which_it_was_given() {
        let mut history = History::new(TakeBack::NOTHING);
        history.gave(ALICE, 0, &[1, 2, 3]);
        history.gave(ALICE, 3, &[4, 5, 6]);
        history.gave(ALICE, 6, &[7]);
        assert_eq!(history.rewind(ALICE, 7), None, "nothing to take back");
        assert_eq!(history.rewind(SessionId(1), 7), None, "nothing known");
        assert_eq!(history.rewind(ALICE, 5), Some(vec![chunk(0, &[1, 2, 3]), chunk(3, &[4, 5])]));
        assert_eq!(history.rewind(ALICE, 3), Some(vec![chunk(0, &[1, 2, 3])]));
        history.gave(ALICE, 3, &[9]);
        // after a failure even a rewind to where it was given up to begins anew
        history.broke(ALICE);
        assert_eq!(history.rewind(ALICE, 4), Some(vec![chunk(0, &[1, 2, 3]), chunk(3, &[9])]));
        assert_eq!(history.rewind(ALICE, 4), None);
        assert_eq!(history.rewind(ALICE, 0), None, "to its beginning every stage can");
        assert_eq!(history.rewind(ALICE, 1), None);
    }

    #[test]
    fn a_few_rows_of_the_last_step_are_taken_back_by_snapshots_and_once() {
        let mut history = History::new(TakeBack(2));
        history.gave(ALICE, 0, &[1, 2, 3, 4]);
        assert_eq!(history.rewind(ALICE, 2), None, "two of four");
        // the snapshots are spent: the step is given again whole, and cut as before
        let cut = |live| Chunk { live, ..chunk(0, &[1, 2, 3, 4]) };
        assert_eq!(history.rewind(ALICE, 1), Some(vec![chunk(0, &[1])]), "three are too many");
        history.gave(ALICE, 1, &[7, 8]);
        assert_eq!(history.rewind(ALICE, 2), None);
        history.gave(ALICE, 2, &[9]);
        let again = Chunk { live: 1, ..chunk(1, &[7, 8]) };
        assert_eq!(history.rewind(ALICE, 2), Some(vec![chunk(0, &[1]), again]), "a step of one row has none");
        history.rewind(ALICE, 0);
        history.gave(ALICE, 0, &[1, 2, 3, 4]);
        history.broke(ALICE);
        assert_eq!(history.rewind(ALICE, 3), Some(vec![cut(3)]), "not every stage has the step");
        assert_eq!(history.rewind(ALICE, 2), Some(vec![cut(2)]));
    }

    #[test]
    fn where_everything_can_be_taken_back_nothing_is_kept() {
        let mut history = History::new(TakeBack::ALL);
        history.gave(ALICE, 0, &[1, 2, 3]);
        assert_eq!(history.rewind(ALICE, 1), None);
        assert!(history.sessions.is_empty());
    }
}
