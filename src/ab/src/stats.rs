//! What is said about a handful of measurements: the middle, the ends, and how sure a ratio is.

use dim_core::random::{GOLDEN, mix};
use serde::{Deserialize, Serialize};

/// The middle and the ends of some measurements.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// How many there are.
    pub n: usize,
    /// The median.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    /// Of `values`; `None` without any. Values that are not finite are measurements that failed, and left out.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Summary> {
        let sorted = sorted(values);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        Some(Summary { n: sorted.len(), median: median(&sorted), min, max })
    }
}

/// A ratio with the interval that 95 of 100 resamples fall into.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Ratio of the medians.
    pub ratio: f64,
    /// The interval's lower end; equal to `ratio` where there are too few measurements to say anything.
    pub low: f64,
    /// The interval's upper end.
    pub high: f64,
    /// Whether there were enough measurements for an interval: two or more of each.
    pub has_interval: bool,
}

impl Ratio {
    /// Median of `a` over median of `b`, with a percentile bootstrap of [`RESAMPLES`] resamples from `seed`.
    /// Measurements of the same round share what the machine did in it: where both lists are as long, rounds are
    /// resampled and not measurements.
    pub fn of(a: &[f64], b: &[f64], seed: u64) -> Option<Ratio> {
        if a.iter().chain(b).any(|x| !x.is_finite() || *x <= 0.0) {
            return None;
        }
        let of =
            |a: &[f64], b: &[f64]| median(&sorted(a.iter().copied())) / median(&sorted(b.iter().copied()));
        if a.is_empty() || b.is_empty() {
            return None;
        }
        let ratio = of(a, b);
        if a.len() < 2 || b.len() < 2 {
            return Some(Ratio { ratio, low: ratio, high: ratio, has_interval: false });
        }
        let mut rng = Seeded::new(seed);
        let (mut resample_a, mut resample_b) = (a.to_vec(), b.to_vec());
        let mut ratios: Vec<f64> = (0..RESAMPLES)
            .map(|_| {
                if a.len() == b.len() {
                    for i in 0..a.len() {
                        let round = rng.below(a.len() as u64) as usize;
                        (resample_a[i], resample_b[i]) = (a[round], b[round]);
                    }
                } else {
                    for (resample, all) in [(&mut resample_a, a), (&mut resample_b, b)] {
                        resample.fill_with(|| all[rng.below(all.len() as u64) as usize]);
                    }
                }
                of(&resample_a, &resample_b)
            })
            .collect();
        ratios.sort_by(f64::total_cmp);
        let at = |share: f64| ratios[((ratios.len() - 1) as f64 * share).round() as usize];
        Some(Ratio { ratio, low: at(0.025), high: at(0.975), has_interval: true })
    }
}

/// The value in the middle of `sorted`, or the mean of the two there; 0 for none.
fn median(sorted: &[f64]) -> f64 {
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Numbers that look random and are the same for the same seed (splitmix64). Not for secrets.
#[derive(Clone, Debug)]
pub struct Seeded(u64);

impl Seeded {
    /// From a seed.
    pub fn new(seed: u64) -> Seeded {
        Seeded(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// From 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// From 0 to below `n`; 0 for 0.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u64
    }
}

/// Resamples of a bootstrap.
pub const RESAMPLES: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_middle_and_the_ends() {
        let s = Summary::of([3.0, 1.0, 2.0]).unwrap();
        assert_eq!((s.n, s.median, s.min, s.max), (3, 2.0, 1.0, 3.0));
        assert_eq!(Summary::of([4.0, 1.0]).unwrap().median, 2.5);
        assert_eq!(Summary::of([f64::NAN, 7.0]).unwrap().n, 1);
        assert_eq!(Summary::of([]), None);
    }

    #[test]
    fn splitmix64_gives_its_published_numbers() {
        let mut rng = Seeded::new(1_234_567);
        let first: Vec<u64> = (0..3).map(|_| rng.bits()).collect();
        assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn a_ratio_without_spread_has_no_width_and_one_with_spread_has_some() {
        let r = Ratio::of(&[2.0; 5], &[1.0; 5], 1).unwrap();
        assert_eq!((r.ratio, r.low, r.high), (2.0, 2.0, 2.0));
        let r = Ratio::of(&[2.0, 2.2, 1.8, 2.1, 1.9], &[1.0, 1.0, 1.1, 0.9, 1.0], 1).unwrap();
        assert!(r.low < r.ratio && r.ratio < r.high && r.has_interval, "{r:?}");
        assert_eq!(Ratio::of(&[2.0, 2.2], &[1.0, 1.0], 9), Ratio::of(&[2.0, 2.2], &[1.0, 1.0], 9));
        let one = Ratio::of(&[3.0], &[1.0, 1.2], 1).unwrap();
        assert!(!one.has_interval);
        assert_eq!(Ratio::of(&[], &[1.0], 1), None);
        assert_eq!(Ratio::of(&[1.0], &[0.0], 1), None, "a speed of 0 was not measured");
    }

    #[test]
    fn rounds_stay_together_when_they_are_resampled() {
        // a machine twice as fast in every other round: the ratio within a round is 2 exactly
        let b = [1.0, 2.0, 1.0, 2.0, 1.0, 2.0];
        let a = b.map(|x| 2.0 * x);
        let r = Ratio::of(&a, &b, 3).unwrap();
        assert_eq!((r.low, r.high), (2.0, 2.0), "resampled apart, the interval would be 1 to 4");
    }

    proptest! {
        #[test]
        fn the_interval_holds_the_ratio(a in proptest::collection::vec(0.1f64..10.0, 1..12), b in proptest::collection::vec(0.1f64..10.0, 1..12)) {
            let r = Ratio::of(&a, &b, 1).unwrap();
            prop_assert!(r.low <= r.high);
            let (lo, hi) = (a.iter().copied().fold(f64::MAX, f64::min), a.iter().copied().fold(0.0, f64::max));
            let (blo, bhi) = (b.iter().copied().fold(f64::MAX, f64::min), b.iter().copied().fold(0.0, f64::max));
            prop_assert!(r.low >= lo / bhi - 1e-12 && r.high <= hi / blo + 1e-12);
        }

        #[test]
        fn numbers_stay_below_their_limit(seed: u64, n in 1u64..1000) {
            let mut rng = Seeded::new(seed);
            for _ in 0..50 {
                prop_assert!(rng.below(n) < n);
                prop_assert!((0.0..1.0).contains(&rng.unit()));
            }
        }
    }
}
