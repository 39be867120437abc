//! What is usual: the median and the median absolute deviation of a series.
//!
//! Both stay where they are while less than half of the values are wrong, which is why a few bad
//! seconds in the sliding period do not make an incident look usual (Rousseeuw and Croux,
//! "Alternatives to the Median Absolute Deviation", 1993). Two selections over some hundred values
//! need no crate.

use serde::{Deserialize, Serialize};

/// What makes the median absolute deviation of normal values their standard deviation.
const MAD_TO_SIGMA: f64 = 1.4826;

/// A deviation is never taken for less than this share of the median.
const MIN_DEVIATION: f64 = 0.05;

/// What is usual.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// The median.
    pub median: f64,
    /// The median absolute deviation from it.
    pub mad: f64,
    /// How many values it rests on, of 5 s each.
    pub values: u32,
}

impl Baseline {
    /// Of these values; those that are not finite are unknown. `None` if there are none.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
        let count = u32::try_from(values.len()).ok()?;
        let median = median(&mut values)?;
        values.iter_mut().for_each(|v| *v = (*v - median).abs());
        Some(Self { median, mad: median_of(&mut values), values: count })
    }

    /// The deviation that is usual: robust, and larger the fewer values there are.
    pub(super) fn sigma(&self, floor: f64) -> f64 {
        let few = 1.0 + 4.0 / f64::from(self.values.max(1));
        few * (MAD_TO_SIGMA * self.mad).max(MIN_DEVIATION * self.median.abs()).max(floor)
    }

    /// No number in it is impossible.
    pub(super) fn is_sane(&self) -> bool {
        self.median.is_finite() && self.mad.is_finite() && self.mad >= 0.0 && self.values > 0
    }
}

fn median(values: &mut [f64]) -> Option<f64> {
    (!values.is_empty()).then(|| median_of(values))
}

/// The median of values that are finite; 0 if there are none.
fn median_of(values: &mut [f64]) -> f64 {
    let middle = values.len() / 2;
    if values.is_empty() {
        return 0.0;
    }
    let even = values.len().is_multiple_of(2);
    let (below, upper, _) = values.select_nth_unstable_by(middle, f64::total_cmp);
    let lower = below.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if even { f64::midpoint(lower, *upper) } else { *upper }
}

/// How a value differs from what is usual.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Change {
    pub(super) base: Baseline,
    pub(super) now: f64,
    /// See [`Baseline::sigma`].
    pub(super) sigma: f64,
}

impl Change {
    /// How much more it is.
    pub(super) fn extra(&self) -> f64 {
        self.now - self.base.median
    }

    /// How many usual deviations that is.
    pub(super) fn z(&self) -> f64 {
        self.extra() / self.sigma
    }

    /// It is this many times what is usual, where the usual is at least one deviation: 3 retransmits
    /// instead of none are not infinitely many times as many.
    pub(super) fn ratio(&self) -> f64 {
        (self.now / self.base.median.max(self.sigma)).max(0.0)
    }

    /// It is well beyond what is usual.
    pub(super) fn is_lifted(&self, z: f64, ratio: f64) -> bool {
        self.z() >= z && self.ratio() >= ratio
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[f64]) -> Option<(f64, f64, u32)> {
        Baseline::of(values.iter().copied()).map(|b| (b.median, b.mad, b.values))
    }

    #[test]
    fn medians() {
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[f64::NAN]), None);
        assert_eq!(of(&[3.0]), Some((3.0, 0.0, 1)));
        assert_eq!(of(&[4.0, 1.0, f64::NAN, 2.0, 3.0]), Some((2.5, 1.0, 4)));
    }

    #[test]
    fn a_third_of_wrong_values_changes_little() {
        let usual = (0..100).map(|i| 100.0 + f64::from(i % 10));
        let clean = Baseline::of(usual.clone());
        let polluted = Baseline::of(usual.chain((0..50).map(|_| 1e9)));
        let (clean, polluted) = (clean.unwrap_or_default(), polluted.unwrap_or_default());
        assert!((clean.median - polluted.median).abs() < 5.0, "{clean:?} {polluted:?}");
        assert!(polluted.mad < 3.0 * clean.mad, "{clean:?} {polluted:?}");
    }

    #[test]
    fn few_values_make_less_sure() {
        let sigma = |values| Baseline { median: 100.0, mad: 10.0, values }.sigma(0.0);
        assert!(sigma(4) > 1.5 * sigma(100), "{} {}", sigma(4), sigma(100));
    }
}
