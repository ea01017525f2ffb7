//! Blocks of a model, numbered as the model numbers them.

use std::{fmt, ops::Range, str::FromStr};

/// Blocks `first..=last`, numbered as in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockRange {
    /// The first.
    pub first: u32,
    /// The last one, inclusive.
    pub last: u32,
}

impl BlockRange {
    /// How many blocks there are. (A range is never empty.)
    pub fn count(self) -> u32 {
        self.last - self.first + 1
    }

    /// Whether a block is among them.
    pub fn contains(self, block: u32) -> bool {
        (self.first..=self.last).contains(&block)
    }

    /// The same as a range of Rust, which excludes its end.
    pub fn as_range(self) -> Range<u32> {
        self.first..self.last + 1
    }
}

/// As file names and options have it: `11..16` (inclusive).
impl fmt::Display for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.first, self.last)
    }
}

/// Why a range could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a range of blocks; write A..B, both inclusive, as in 11..16 for six blocks")]
pub struct RangeError(String);

impl FromStr for BlockRange {
    type Err = RangeError;

    /// `A..B` and `A..=B` are the same, both inclusive.
    fn from_str(text: &str) -> Result<Self, RangeError> {
        let error = || RangeError(text.to_owned());
        let (first, last) = text.split_once("..").ok_or_else(error)?;
        let last = last.strip_prefix('=').unwrap_or(last);
        let number = |s: &str| {
            let digits = !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| s.parse::<u32>().ok()).flatten().filter(|&n| n < u32::MAX)
        };
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => Ok(BlockRange { first, last }),
            _ => Err(error()),
        }
    }
}
