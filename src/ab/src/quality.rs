//! How good a model's guesses of a text are, and how far two engines' guesses of it are apart: perplexity,
//! Kullback-Leibler divergence, top-1 agreement, difference of the logits.
//!
//! A text is evaluated in [`windows`] of consecutive tokens, each from an empty cache and in one long chunk, so that a
//! row of logits is never computed for one token alone. Windows overlap by half, and only rows with at least half a
//! window behind them are scored (all rows, in the first window): every token of the text but the first is scored
//! once, and seen with context.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::machine::Machine;

/// A stretch of the text that is evaluated at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its tokens.
    pub tokens: Range<usize>,
    /// Those of its rows whose guess of the next token is scored, numbered as tokens of the text.
    pub scored: Range<usize>,
}

/// Cuts a text of `n` tokens into windows of at most `size` (at least 2). Every row from 0 to `n - 2` is scored once:
/// the last row has nothing to guess.
pub fn windows(n: usize, size: usize) -> Vec<Window> {
    let size = size.max(2);
    let stride = size / 2;
    let mut list = Vec::new();
    let mut start = 0;
    let mut scored = 0;
    while scored + 1 < n {
        let end = (start + size).min(n);
        // the window's last row guesses the first token of the next one, where there is one
        let last = end.min(n - 1);
        list.push(Window { tokens: start..end, scored: scored..last });
        scored = last;
        start += stride;
    }
    list
}

/// Perplexity of one engine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Perplexity {
    n: u64,
    sum: f64,
    sum_of_squares: f64,
}

impl Perplexity {
    /// Adds a row (n_vocab) and the token that really came next.
    pub fn add(&mut self, logits: &[f32], next: i32) {
        let Some(&logit) = usize::try_from(next).ok().and_then(|i| logits.get(i)) else { return };
        let surprise = log_sum_exp(logits) - f64::from(logit);
        self.n += 1;
        self.sum += surprise;
        self.sum_of_squares += surprise * surprise;
    }

    /// Rows so far.
    pub fn rows(&self) -> u64 {
        self.n
    }

    /// exp of the mean surprise, and its standard error.
    pub fn value(&self) -> Option<(f64, f64)> {
        if self.n == 0 {
            return None;
        }
        let n = self.n as f64;
        let mean = self.sum / n;
        let variance = (self.sum_of_squares / n - mean * mean).max(0.0);
        let value = mean.exp();
        Some((value, value * (variance / n).sqrt()))
    }
}

/// How well engines guess a text: what `dim-host eval --json` prints.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Evaluation {
    /// When, in UTC.
    pub date: String,
    /// The model's name.
    pub model: String,
    /// Tokens of the text.
    pub tokens: usize,
    /// Tokens evaluated at once.
    pub window: u32,
    /// One entry for each engine that was run; stock first, if it was.
    pub engines: Vec<EngineResult>,
    /// The machine.
    pub machine: Machine,
}

/// One engine's guesses.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EngineResult {
    /// `stock`, `split f16`, `split f32`.
    pub name: String,
    /// Guesses scored.
    pub rows: u64,
    /// exp of the mean surprise.
    pub perplexity: f64,
    /// Its standard error.
    pub perplexity_error: f64,
    /// Tokens evaluated per second, windows' overlaps included.
    pub tok_s: f64,
    /// How far its guesses are from stock's.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub difference: Option<DifferenceSummary>,
}

impl Evaluation {
    /// What the columns of [`cells`](Self::cells) are.
    pub const HEAD: [&'static str; 8] = [
        "engine",
        "perplexity",
        "tok/s",
        "mean KL, nats",
        "99 % of rows below",
        "largest KL",
        "same top token",
        "largest logit difference",
    ];

    /// A row of text for each engine.
    pub fn cells(&self) -> Vec<Vec<String>> {
        let row = |e: &EngineResult| {
            let of = |f: fn(&DifferenceSummary) -> String| e.difference.as_ref().map_or(String::from("–"), f);
            vec![
                e.name.clone(),
                format!("{:.4} ± {:.4}", e.perplexity, e.perplexity_error),
                format!("{:.1}", e.tok_s),
                of(|d| scientific(d.kl_mean)),
                of(|d| scientific(d.kl_p99)),
                of(|d| scientific(d.kl_max)),
                of(|d| format!("{:.2} %", d.top1 * 100.0)),
                of(|d| {
                    if d.equal_rows == d.rows {
                        "0, every bit".to_owned()
                    } else {
                        scientific(f64::from(d.max_abs))
                    }
                }),
            ]
        };
        self.engines.iter().map(row).collect()
    }

    /// The table for a person. Ends with a newline.
    pub fn table(&self) -> String {
        let mut rows = vec![Evaluation::HEAD.map(str::to_owned).to_vec()];
        rows.extend(self.cells());
        let width = |i: usize| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..Evaluation::HEAD.len()).map(width).collect();
        let mut text = format!("{}, {} tokens in windows of {}\n\n", self.model, self.tokens, self.window);
        for row in &rows {
            let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
            text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

fn scientific(value: f64) -> String {
    if value == 0.0 { "0".to_owned() } else { format!("{value:.2e}") }
}

/// How far two engines are apart, row by row.
#[derive(Clone, Debug, Default)]
pub struct Difference {
    divergences: Vec<f64>,
    same_top: u64,
    max_abs: f32,
    sum_abs: f64,
    values: u64,
    equal_rows: u64,
}

/// [`Difference`], summed up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DifferenceSummary {
    /// Rows compared.
    pub rows: u64,
    /// Mean Kullback-Leibler divergence from the reference, in nats.
    pub kl_mean: f64,
    /// The largest of a row.
    pub kl_max: f64,
    /// 99 of 100 rows are below.
    pub kl_p99: f64,
    /// Share of rows in which both have the same likeliest token.
    pub top1: f64,
    /// Largest |difference| of a logit.
    pub max_abs: f32,
    /// Mean |difference|.
    pub mean_abs: f64,
    /// Rows that are equal to the last bit.
    pub equal_rows: u64,
}

impl Difference {
    /// Adds a row of the reference and the same row of the other, both (n_vocab).
    pub fn add(&mut self, reference: &[f32], other: &[f32]) {
        debug_assert_eq!(reference.len(), other.len());
        let (sum_r, sum_o) = (log_sum_exp(reference), log_sum_exp(other));
        let mut divergence = 0.0;
        for (&r, &o) in reference.iter().zip(other) {
            let (log_p, log_q) = (f64::from(r) - sum_r, f64::from(o) - sum_o);
            divergence += log_p.exp() * (log_p - log_q);
            let abs = (r - o).abs();
            // a NaN is a difference, and the largest
            if abs > self.max_abs || abs.is_nan() {
                self.max_abs = abs;
            }
            self.sum_abs += f64::from(abs);
        }
        self.values += reference.len() as u64;
        // rounding leaves a row that is equal a hair below zero
        self.divergences.push(divergence.max(0.0));
        self.same_top += u64::from(top(reference) == top(other));
        self.equal_rows += u64::from(reference.iter().zip(other).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    /// What they say together; `None` without rows.
    pub fn summary(&self) -> Option<DifferenceSummary> {
        let mut sorted = self.divergences.clone();
        sorted.sort_by(f64::total_cmp);
        let rows = sorted.len();
        let kl_max = *sorted.last()?;
        Some(DifferenceSummary {
            rows: rows as u64,
            kl_mean: sorted.iter().sum::<f64>() / rows as f64,
            kl_max,
            kl_p99: sorted[(rows * 99 / 100).min(rows - 1)],
            top1: self.same_top as f64 / rows as f64,
            max_abs: self.max_abs,
            mean_abs: self.sum_abs / self.values.max(1) as f64,
            equal_rows: self.equal_rows,
        })
    }
}

/// The likeliest token; the first of several.
fn top(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, &x) in logits.iter().enumerate() {
        if x > logits[best] {
            best = i;
        }
    }
    best
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - largest).exp()).sum();
    f64::from(largest) + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_uniform_guess_among_v_tokens_has_perplexity_v() {
        let mut p = Perplexity::default();
        for token in 0..10 {
            p.add(&[0.5; 32], token);
        }
        let (value, error) = p.value().unwrap();
        assert!((value - 32.0).abs() < 1e-9 && error < 1e-6, "{value} {error}");
        p.add(&[0.0; 32], 99);
        p.add(&[0.0; 32], -1);
        assert_eq!(p.rows(), 10, "a token outside the vocabulary has no guess");
        assert_eq!(Perplexity::default().value(), None);
    }

    #[test]
    fn divergence_is_the_textbooks() {
        // p = (1/2, 1/2), q = (1/4, 3/4): 1/2 ln 2 + 1/2 ln (2/3)
        let mut d = Difference::default();
        d.add(&[0.0, 0.0], &[0.25f32.ln(), 0.75f32.ln()]);
        let s = d.summary().unwrap();
        let expected = 0.5 * 2f64.ln() + 0.5 * (2.0f64 / 3.0).ln();
        assert!((s.kl_mean - expected).abs() < 1e-7, "{s:?}");
        assert_eq!((s.rows, s.top1, s.equal_rows), (1, 0.0, 0));
        assert!((s.max_abs - 0.25f32.ln().abs()).abs() < 1e-6);
    }

    #[test]
    fn equal_rows_are_zero_apart_and_a_single_bit_is_seen() {
        let row: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin() * 8.0).collect();
        let mut d = Difference::default();
        d.add(&row, &row);
        let s = d.summary().unwrap();
        assert_eq!((s.kl_max, s.top1, s.max_abs, s.equal_rows), (0.0, 1.0, 0.0, 1));
        let mut other = row.clone();
        other[17] = f32::from_bits(other[17].to_bits() ^ 1);
        d.add(&row, &other);
        let s = d.summary().unwrap();
        assert!(s.max_abs > 0.0 && s.equal_rows == 1 && s.rows == 2, "{s:?}");
        other[17] = f32::NAN;
        d.add(&row, &other);
        assert!(d.summary().unwrap().max_abs.is_nan());
    }

    #[test]
    fn windows_are_as_described() {
        let list = windows(10, 6);
        assert_eq!(list[0], Window { tokens: 0..6, scored: 0..6 });
        assert_eq!(list[1], Window { tokens: 3..9, scored: 6..9 });
        assert_eq!(list.len(), 2);
        assert_eq!(windows(1, 6), []);
        assert_eq!(windows(0, 6), []);
        assert_eq!(windows(4, 512), [Window { tokens: 0..4, scored: 0..3 }]);
    }

    proptest! {
        #[test]
        fn every_row_is_scored_once_and_with_context(n in 2usize..300, size in 2usize..64) {
            let list = windows(n, size);
            let mut next = 0;
            for (i, w) in list.iter().enumerate() {
                prop_assert_eq!(w.scored.start, next);
                prop_assert!(w.scored.end > w.scored.start);
                prop_assert!(w.tokens.start <= w.scored.start && w.scored.end <= w.tokens.end);
                prop_assert!(w.tokens.len() <= size.max(2) && w.tokens.end <= n);
                if i > 0 {
                    prop_assert!(w.scored.start - w.tokens.start >= size / 2, "{:?}", w);
                }
                next = w.scored.end;
            }
            prop_assert_eq!(next, n - 1);
        }

        #[test]
        fn divergence_is_never_negative(a in proptest::collection::vec(-20f32..20.0, 2..50), noise in -3f32..3.0) {
            let b: Vec<f32> = a.iter().enumerate().map(|(i, x)| x + noise * (i as f32).cos()).collect();
            let mut d = Difference::default();
            d.add(&a, &b);
            let s = d.summary().unwrap();
            prop_assert!(s.kl_mean >= 0.0 && s.kl_mean.is_finite());
        }
    }
}
