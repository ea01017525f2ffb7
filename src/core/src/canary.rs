//! A canary: a middle's answer to a known input, found when the model is cut, against which a worker's answer is held
//! before it computes anything that matters.
//!
//! A digest says that a file is the right one, not that what was loaded from it computes right: blocks in another
//! order, a kernel that a driver compiles wrongly, memory that lost a bit, packages of another cut all give rows of the
//! right shape. A canary finds them in a few milliseconds, and needs nothing of the worker but that it does its job:
//!
//! 1. rows are drawn from a seed: integers of 8 bits times a power of two, which every row format of the wire carries
//!    exactly. They are about as large as what the blocks add to them: much smaller, and every block would magnify the
//!    rounding of the one before it; much larger, and blocks in another order would add nearly the same;
//! 2. they go through the middle as one session, some rows in one step and then one alone, so that both ways of
//!    computing and the KV cache take part;
//! 3. what the middle added to each row (its *update*; of rows that go in wider than they come out, to the end of each, where
//!    the hidden row stands) is folded to [`FOLD`] numbers: value `i` is added to or, by a
//!    random sign, taken from number `i % FOLD`. Lengths and angles between updates stay what they were, to about a
//!    tenth of a difference, so the answer of a row of any width is half a kilobyte in the manifest;
//! 4. an answer is right if its updates point the same way ([`LEAST_MEAN_COSINE`], [`LEAST_ROW_COSINE`]) and are as
//!    long ([`LENGTH_TOLERANCE`]).
//!
//! It is a guard against faults, not against a worker that wants to deceive: that one knows what is asked.

use serde::{Deserialize, Serialize};

use crate::random::random;

/// Numbers an update is folded to.
pub const FOLD: usize = 128;

/// The least cosine between the updates expected and those that came, in the mean of all rows.
///
/// Between right workers there is rounding: rows in F16 (1 - cosine below 1e-7), fp16 arithmetic (1e-6), and, most of
/// all, activations of 8 bits where a CPU multiplies quantised weights and a GPU does not (up to 3e-4 over ten blocks).
/// One matrix that is another costs 3e-2 there, two blocks that changed places 1e-2: gguf-tools/tests/canary.rs
/// measures both sides.
pub const LEAST_MEAN_COSINE: f64 = 0.999;

/// The least cosine of any single row: what is wrong in one step only does not hide behind the others.
pub const LEAST_ROW_COSINE: f64 = 0.99;

/// How far an update's length may be from the one expected, as a part of it.
pub const LENGTH_TOLERANCE: f64 = 0.1;

/// A middle's answer to a known input, as it stands in the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Canary {
    /// What the rows are drawn from.
    pub seed: u64,
    /// The power of two that the drawn integers are multiplied by.
    pub exponent: i32,
    /// Rows of each step, in order: one session from position 0 on.
    pub steps: Vec<u32>,
    /// The largest |value| of the answer, rounded up: a row format has to hold it.
    pub max_abs: u64,
    /// The update of each row: [`FOLD`] numbers as F32, little endian, in hex.
    pub updates: Vec<String>,
}

/// How many values rows have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    /// Those that go in.
    pub input: usize,
    /// Those that come out.
    pub output: usize,
}

impl From<usize> for Widths {
    /// As many out as in, as for most models.
    fn from(width: usize) -> Widths {
        Widths { input: width, output: width }
    }
}

/// How one row's update compares with the one expected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Likeness {
    /// The cosine of the angle between them.
    pub cosine: f64,
    /// The length of the one that came, as a part of the one expected.
    pub length: f64,
}

/// An answer that is not the right one.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum Wrong {
    /// One row is.
    #[error(
        "row {row} has a cosine of {:.4} to the right answer (right is at least {LEAST_ROW_COSINE}) and {:.2} of its length",
        .likeness.cosine, .likeness.length
    )]
    Row {
        /// The first such row.
        row: usize,
        /// How far off.
        likeness: Likeness,
    },
    /// All are, a little.
    #[error("a mean cosine of {mean:.5} to the right answer (right is at least {LEAST_MEAN_COSINE})")]
    Mean {
        /// Of the rows' cosines.
        mean: f64,
    },
}

impl Likeness {
    /// Of two updates, folded or whole.
    pub fn of(expected: &[f32], got: &[f32]) -> Likeness {
        let (mut dot, mut e2, mut g2) = (0.0f64, 0.0f64, 0.0f64);
        for (&e, &g) in expected.iter().zip(got) {
            let (e, g) = (f64::from(e), f64::from(g));
            dot += e * g;
            e2 += e * e;
            g2 += g * g;
        }
        // what has no length, or one that is no number, is like nothing
        let number = |x: f64| if x.is_finite() { x } else { 0.0 };
        Likeness { cosine: number(dot / (e2.sqrt() * g2.sqrt())), length: number((g2 / e2).sqrt()) }
    }
}

impl Canary {
    /// Rows in all.
    pub fn n_rows(&self) -> usize {
        self.steps.iter().map(|&n| n as usize).sum()
    }

    /// The rows that go in, (n_rows, width).
    pub fn input(&self, width: usize) -> Vec<f32> {
        draw(self.seed, self.exponent, self.n_rows() * width)
    }

    /// The same with this as the right answer, (n_rows, widths.output).
    pub fn with_answer(self, widths: impl Into<Widths>, output: &[f32]) -> Canary {
        let widths = widths.into();
        let input = self.input(widths.input);
        let max_abs = output.iter().fold(0f32, |max, x| max.max(x.abs())).ceil() as u64;
        let rows = input.chunks_exact(widths.input).zip(output.chunks_exact(widths.output));
        let updates = rows.map(|(before, after)| hex(&fold(self.seed, before, after))).collect();
        Canary { max_abs, updates, ..self }
    }

    /// Compares what came back, (n_rows, widths.output), with what has to come: the first rows of the input if there are
    /// fewer. Gives the mean cosine of the rows.
    ///
    /// # Errors
    /// The answer is wrong.
    pub fn compare(&self, widths: impl Into<Widths>, output: &[f32]) -> Result<f64, Wrong> {
        let widths = widths.into();
        let input = self.input(widths.input);
        let (mut sum, mut n_rows) = (0.0, 0.0);
        let rows =
            input.chunks_exact(widths.input).zip(output.chunks_exact(widths.output)).zip(&self.updates);
        for (row, ((before, after), expected)) in rows.enumerate() {
            // what is no update has no length; `check` has seen to it that there is none
            let expected = unhex(expected).unwrap_or([0.0; FOLD]);
            let likeness = Likeness::of(&expected, &fold(self.seed, before, after));
            if likeness.cosine < LEAST_ROW_COSINE || (likeness.length - 1.0).abs() > LENGTH_TOLERANCE {
                return Err(Wrong::Row { row, likeness });
            }
            sum += likeness.cosine;
            n_rows += 1.0;
        }
        match sum / n_rows {
            mean if mean >= LEAST_MEAN_COSINE => Ok(mean),
            mean => Err(Wrong::Mean { mean }),
        }
    }

    /// Whether it holds together.
    ///
    /// # Errors
    /// A sentence's end that says what does not.
    pub fn check(&self) -> Result<(), String> {
        let rows: u64 = self.steps.iter().map(|&n| u64::from(n)).sum();
        if self.steps.is_empty() || self.steps.contains(&0) || rows > MOST_ROWS {
            return Err(format!("has {rows} rows in {} steps", self.steps.len()));
        }
        if !EXPONENTS.contains(&self.exponent) {
            return Err(format!("is scaled by 2^{}", self.exponent));
        }
        if self.updates.len() as u64 != rows {
            return Err(format!("has {} answers for {rows} rows", self.updates.len()));
        }
        match self.updates.iter().position(|u| unhex(u).is_none()) {
            Some(row) => Err(format!("has an answer to row {row} that is not {FOLD} numbers")),
            None => Ok(()),
        }
    }
}

/// `n` integers of 8 bits times 2^exponent.
fn draw(seed: u64, exponent: i32, n: usize) -> Vec<f32> {
    let scale = 2f32.powi(exponent);
    (0..n as u64).map(|i| f32::from((random(seed, i) >> 56) as u8 as i8) * scale).collect()
}

/// What was added to a row: to the end of it where it came out shorter, and to nothing before its beginning where longer.
pub fn update<'a>(before: &'a [f32], after: &'a [f32]) -> impl Iterator<Item = f64> + 'a {
    let was = move |i: usize| (i + before.len()).checked_sub(after.len()).map_or(0.0, |i| before[i]);
    after.iter().enumerate().map(move |(i, &a)| f64::from(a) - f64::from(was(i)))
}

/// What was added to a row, folded.
fn fold(seed: u64, before: &[f32], after: &[f32]) -> [f32; FOLD] {
    let mut sums = [0f64; FOLD];
    for (i, update) in update(before, after).enumerate() {
        let sign = if random(!seed, i as u64) >> 63 == 0 { update } else { -update };
        sums[i % FOLD] += sign;
    }
    sums.map(|x| x as f32)
}

fn hex(values: &[f32; FOLD]) -> String {
    values.iter().flat_map(|x| x.to_le_bytes()).map(|b| format!("{b:02x}")).collect()
}

/// `None` unless the text is FOLD numbers, all of them finite.
fn unhex(text: &str) -> Option<[f32; FOLD]> {
    let digits = text.as_bytes();
    if digits.len() != FOLD * 8 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut values = [0f32; FOLD];
    for (value, digits) in values.iter_mut().zip(text.as_bytes().chunks_exact(8)) {
        let bits = u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        *value = f32::from_bits(bits.swap_bytes());
    }
    values.iter().all(|x| x.is_finite()).then_some(values)
}

/// Rows a manifest may ask for.
const MOST_ROWS: u64 = 64;

/// Powers of two a manifest may ask for: within them the drawn integers are exact in F16, and none is too large.
pub const EXPONENTS: std::ops::RangeInclusive<i32> = -24..=8;
