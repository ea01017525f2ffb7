//! A session's steps as they can be kept elsewhere, for a pipeline of the same stages in another process.
//!
//! For each step that the session was given: what came of it in the stages of this process (keys and values, as each of
//! them saves its own), and the rows that each worker was sent. Put back, it goes through the pipeline as any other step
//! does, and where it would be computed here it is copied instead. Workers compute: no state of one is asked for, kept or
//! trusted. They are given the rows that they were given, in the steps in which they were given, as after a
//! [loss](crate::replay); so what comes behind has the bits that it had.
//!
//! Of a step that was put together from several sessions the session's own rows are kept, and they go alone: that has
//! another shape, and other last bits.

use crate::rows::Rows;

/// A step of one session, and what came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedStep {
    /// Where the session stood before it.
    pub position: u32,
    /// (n_rows) token ids. Of rows that do not count, which nobody may know any more, those that the workers read, or 0.
    pub tokens: Vec<i32>,
    /// Rows of it that count, from the first, at least one: the others were taken back.
    pub live: u32,
    /// What each worker was given, in the order of the stages: (n_rows, width of that cut).
    pub rows: Vec<Rows>,
    /// What each stage of this process has saved of the rows that count, in the order of the stages.
    pub states: Vec<Vec<u8>>,
}

impl SavedStep {
    /// Its rows.
    pub fn count(&self) -> u32 {
        // no step has more rows than a context has positions
        u32::try_from(self.tokens.len()).unwrap_or(u32::MAX)
    }

    /// Where the session stands behind it.
    pub fn end(&self) -> u32 {
        self.position + self.live
    }
}
