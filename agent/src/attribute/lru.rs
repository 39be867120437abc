//! A map of bounded size that forgets what was not used for longest, and counts what it forgets.
//!
//! Not for exact order: an eighth is forgotten at a time, so that the cost per insertion stays
//! constant.

use std::hash::Hash;

use hashbrown::HashMap;

/// See the module.
#[derive(Debug)]
pub(super) struct Lru<K, V> {
    entries: HashMap<K, (V, u64)>,
    capacity: usize,
    uses: u64,
    evicted: u64,
}

impl<K: Hash + Eq, V> Lru<K, V> {
    /// A map of at most `capacity` entries.
    pub(super) fn new(capacity: usize) -> Self {
        Self { entries: HashMap::new(), capacity, uses: 0, evicted: 0 }
    }

    /// The value, which counts as used now.
    pub(super) fn get(&mut self, key: &K) -> Option<&V> {
        self.uses += 1;
        let (value, used) = self.entries.get_mut(key)?;
        *used = self.uses;
        Some(value)
    }

    /// Puts a value in, over an earlier one.
    pub(super) fn insert(&mut self, key: K, value: V) {
        if self.entries.len() >= self.capacity && !self.entries.contains_key(&key) {
            self.evict();
        }
        self.uses += 1;
        self.entries.insert(key, (value, self.uses));
    }

    /// How many entries there are.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// How many entries were forgotten so far.
    pub(super) fn evicted(&self) -> u64 {
        self.evicted
    }

    fn evict(&mut self) {
        let mut uses: Vec<u64> = self.entries.values().map(|(_, used)| *used).collect();
        let at = (uses.len() / 8).min(uses.len().saturating_sub(1));
        if uses.is_empty() {
            return;
        }
        let newest_to_go = *uses.select_nth_unstable(at).1;
        let before = self.entries.len();
        self.entries.retain(|_, (_, used)| *used > newest_to_go);
        self.evicted += (before - self.entries.len()) as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgets_what_was_not_used() {
        let mut lru = Lru::new(16);
        for key in 0..16 {
            lru.insert(key, key * 10);
        }
        assert_eq!(lru.get(&0), Some(&0));
        lru.insert(0, 1);
        assert_eq!((lru.len(), lru.evicted()), (16, 0));
        lru.insert(16, 160);
        assert_eq!([0, 1, 16].map(|key| lru.get(&key).copied()), [Some(1), None, Some(160)]);
        assert_eq!(lru.len() as u64 + lru.evicted(), 17);
    }

    #[test]
    fn stays_within_its_capacity() {
        for capacity in [1, 2, 7, 100] {
            let mut lru = Lru::new(capacity);
            for key in 0..1000 {
                lru.insert(key, ());
                assert!(lru.len() <= capacity && lru.get(&key).is_some());
            }
            assert_eq!(lru.len() as u64 + lru.evicted(), 1000);
        }
    }
}
