//! Answers by image and offset, so that a known address costs one look-up.
//!
//! Two generations: when the young one is full it becomes the old one, which is forgotten, and what
//! is asked for again moves to the young one.

use std::sync::Arc;

use hashbrown::{HashMap, HashSet};

use super::Symbol;

/// An image and an offset in it; image 0 is the kernel.
pub(super) type Place = (u32, u64);

/// The cache.
#[derive(Default)]
pub(super) struct Results {
    young: HashMap<Place, Arc<[Symbol]>, foldhash::fast::RandomState>,
    old: HashMap<Place, Arc<[Symbol]>, foldhash::fast::RandomState>,
    /// Names of the symbols, so that functions and files that many addresses share are kept once.
    names: HashSet<Arc<str>>,
}

impl Results {
    /// What is known of a place.
    #[inline]
    pub(super) fn get(&mut self, place: Place) -> Option<Arc<[Symbol]>> {
        if let Some(known) = self.young.get(&place) {
            return Some(Arc::clone(known));
        }
        let known = self.old.remove(&place)?;
        self.young.insert(place, Arc::clone(&known));
        Some(known)
    }

    /// Keeps an answer; `most` bounds how many are kept.
    pub(super) fn insert(&mut self, place: Place, symbols: Arc<[Symbol]>, most: usize) {
        if self.young.len() >= most / 2 {
            self.old = std::mem::take(&mut self.young);
            self.names.clear();
        }
        self.young.insert(place, symbols);
    }

    /// The one copy of a name.
    pub(super) fn name(&mut self, name: &str) -> Arc<str> {
        Arc::clone(self.names.get_or_insert_with(name, |name| name.into()))
    }

    /// How many answers are kept.
    pub(super) fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }
}
