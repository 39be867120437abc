//! Times as a histogram: 26 octaves from 1 µs to 69 s, 8 buckets each, so that a quantile is off by at
//! most 7 %.
//!
//! The buckets of an octave are equally wide, which needs no logarithm: [`bucket`] is three bit
//! operations, and BPF can count in the same buckets.

/// log2 of how many buckets an octave has.
const SUB_BITS: u32 = 3;

/// Times below 2^10 ns are in the first bucket.
const FIRST_OCTAVE: u32 = 10;

/// Octaves: up to 2^36 ns = 69 s. What is longer is in the last bucket.
const OCTAVES: u32 = 26;

/// How many buckets there are.
pub const BUCKETS: usize = (OCTAVES << SUB_BITS) as usize;

/// The bucket of a time in nanoseconds.
#[must_use]
pub const fn bucket(ns: u64) -> usize {
    if ns < 1 << FIRST_OCTAVE {
        return 0;
    }
    let octave = ns.ilog2();
    let sub = (ns >> (octave - SUB_BITS)) & ((1 << SUB_BITS) - 1);
    let index = (((octave - FIRST_OCTAVE) << SUB_BITS) as u64 + sub) as usize;
    if index < BUCKETS { index } else { BUCKETS - 1 }
}

/// Where a bucket starts, in nanoseconds.
fn start(bucket: usize) -> f64 {
    let octave = FIRST_OCTAVE + (bucket >> SUB_BITS) as u32;
    let sub = (bucket & ((1 << SUB_BITS) - 1)) as u64;
    (((1 << SUB_BITS) + sub) << (octave - SUB_BITS)) as f64
}

/// How long some operations took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Times {
    /// How many.
    pub count: u64,
    /// Their sum, in nanoseconds.
    pub sum_ns: u64,
    /// How many by [`bucket`].
    pub buckets: Box<[u32; BUCKETS]>,
}

impl Default for Times {
    fn default() -> Self {
        Self { count: 0, sum_ns: 0, buckets: Box::new([0; BUCKETS]) }
    }
}

impl Times {
    /// One more operation.
    pub fn add(&mut self, ns: u64) {
        self.count = self.count.saturating_add(1);
        self.sum_ns = self.sum_ns.saturating_add(ns);
        let bucket = &mut self.buckets[bucket(ns)];
        *bucket = bucket.saturating_add(1);
    }

    /// All operations of another.
    pub fn merge(&mut self, other: &Self) {
        self.count = self.count.saturating_add(other.count);
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
        for (to, from) in self.buckets.iter_mut().zip(other.buckets.iter()) {
            *to = to.saturating_add(*from);
        }
    }

    /// No operation any more.
    pub fn clear(&mut self) {
        (self.count, self.sum_ns) = (0, 0);
        self.buckets.fill(0);
    }

    /// The time that this share of the operations did not exceed, in nanoseconds; `None` if there were
    /// none.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let total: u64 = self.buckets.iter().map(|n| u64::from(*n)).sum();
        if total == 0 {
            return None;
        }
        let rank = (share.clamp(0.0, 1.0) * total as f64).max(f64::MIN_POSITIVE);
        let mut below = 0.0;
        for (index, count) in self.buckets.iter().enumerate() {
            let count = f64::from(*count);
            if count > 0.0 && below + count >= rank {
                let (from, to) = (start(index), start(index + 1));
                return Some(from + (to - from) * (rank - below) / count);
            }
            below += count;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn buckets_follow_each_other() {
        for index in 1..BUCKETS {
            let edge = start(index) as u64;
            assert_eq!((bucket(edge), bucket(edge - 1)), (index, index - 1));
        }
        assert_eq!((bucket(0), bucket(u64::MAX)), (0, BUCKETS - 1));
    }

    #[test]
    fn no_operation_has_no_quantile() {
        assert_eq!(Times::default().quantile(0.5), None);
    }

    proptest! {
        #[test]
        fn a_quantile_is_off_by_a_bucket(mut times in prop::collection::vec(1024u64..1 << 35, 1..300)) {
            let mut histogram = Times::default();
            times.iter().for_each(|ns| histogram.add(*ns));
            times.sort_unstable();
            for share in [0.5, 0.99, 1.0] {
                let rank = (share * times.len() as f64).ceil() as usize;
                let exact = times[rank.max(1) - 1] as f64;
                let error = histogram.quantile(share).unwrap_or_default() / exact;
                prop_assert!((0.88..1.126).contains(&error), "{share}: {error}");
            }
        }
    }
}
