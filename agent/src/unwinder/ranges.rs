//! Which parts of a table of fixed size are free. First fit; neighbours are joined.

use std::collections::BTreeMap;

/// The free parts: where each begins, and how long it is.
#[derive(Debug)]
pub(super) struct Ranges(BTreeMap<u32, u32>);

impl Ranges {
    /// All of `0..len` is free.
    pub(super) fn new(len: u32) -> Self {
        Self(BTreeMap::from([(0, len)]))
    }

    /// Takes `len` places; returns the first.
    pub(super) fn take(&mut self, len: u32) -> Option<u32> {
        let (&start, &free) = self.0.iter().find(|(_, free)| **free >= len)?;
        self.0.remove(&start);
        if free > len {
            self.0.insert(start + len, free - len);
        }
        Some(start)
    }

    /// Gives back what was taken.
    pub(super) fn give(&mut self, mut start: u32, mut len: u32) {
        if len == 0 {
            return;
        }
        if let Some(after) = self.0.remove(&(start + len)) {
            len += after;
        }
        if let Some((&before, &free)) = self.0.range(..start).next_back()
            && before + free == start
        {
            self.0.remove(&before);
            (start, len) = (before, free + len);
        }
        self.0.insert(start, len);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn nothing_is_given_twice_and_all_comes_back(
            steps in proptest::collection::vec((1_u32..40, any::<bool>()), 0..200),
        ) {
            let mut ranges = Ranges::new(256);
            let mut taken: Vec<(u32, u32)> = Vec::new();
            for (len, give) in steps {
                if give && !taken.is_empty() {
                    let (start, len) = taken.remove(len as usize % taken.len());
                    ranges.give(start, len);
                } else if let Some(start) = ranges.take(len) {
                    prop_assert!(start + len <= 256);
                    prop_assert!(taken.iter().all(|(s, l)| start + len <= *s || s + l <= start));
                    taken.push((start, len));
                }
            }
            for (start, len) in taken {
                ranges.give(start, len);
            }
            prop_assert_eq!(ranges.take(256), Some(0));
        }
    }
}
