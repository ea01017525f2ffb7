//! What each session was given, for pipelines with a stage that cannot take rows back: a recurrent state knows only where
//! it is.
//!
//! There a rewind is a beginning anew. Every stage forgets the session, and what should stay of it goes through all of
//! them once more, in the steps in which it went before; only the last of those is shorter, if the rewind cut it. So the
//! states come out as they were, bit for bit, but for the rows of a step that was cut, which had another shape.
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
    fn cut(&mut self, position: u32) {
        while let Some(last) = self.chunks.last_mut() {
            let keep = position.saturating_sub(last.position) as usize;
            if keep >= last.tokens.len() {
                break;
            }
            last.tokens.truncate(keep);
            if keep == 0 {
                self.chunks.pop();
            }
        }
    }

    /// The position behind them.
    fn length(&self) -> u32 {
        let end =
            |last: &Chunk| last.position.saturating_add(u32::try_from(last.tokens.len()).unwrap_or(u32::MAX));
        self.chunks.last().map_or(0, end)
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
        given.cut(position);
        given.chunks.push(Chunk { position, tokens: tokens.to_vec() });
    }

    /// A step of a session has failed.
    pub(crate) fn broke(&mut self, session: SessionId) {
        if let Some(given) = self.sessions.get_mut(&session) {
            given.is_broken = true;
        }
    }

    /// A session is rewound: `None` where its stages can do that, else what it has to be given again from its beginning.
    ///
    /// Rows of which there are snapshots could be taken back without that ([`TakeBack`]), but only until any session's
    /// next step, and sessions take turns: that is left to who knows that it is alone.
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
        given.cut(position);
        given.is_broken = false;
        Some(given.chunks.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: SessionId = SessionId(0);

    fn chunk(position: u32, tokens: &[i32]) -> Chunk {
        Chunk { position, tokens: tokens.to_vec() }
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
    fn where_everything_can_be_taken_back_nothing_is_kept() {
        let mut history = History::new(TakeBack::ALL);
        history.gave(ALICE, 0, &[1, 2, 3]);
        assert_eq!(history.rewind(ALICE, 1), None);
        assert!(history.sessions.is_empty());
    }
}
