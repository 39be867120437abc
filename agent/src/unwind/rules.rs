//! The rules of all files, each kept once and known by its number.
//!
//! Files have a few dozen to a few hundred rules, most of which other files have too. Rules are never
//! taken back: the kernel may hold rows that name them.

use hashbrown::HashMap;
use podflame_wire::unwind::{Cfa, MAX_RULES, NO_RULE, Rule, Saved};

/// The number of the rule that says that the file's own rule cannot be said. It is there from the
/// start, so that a row always can have it.
pub const UNSUPPORTED: u16 = 1;

/// A rule that says nothing but what kind it is.
pub(super) const fn bare(cfa: Cfa) -> Rule {
    Rule {
        cfa: cfa as u8,
        cfa_register: 0,
        ra: Saved::Same as u8,
        fp: Saved::Same as u8,
        cfa_offset: 0,
        cfa_add: 0,
        ra_offset: 0,
        fp_offset: 0,
    }
}

/// The rules by number, and their numbers.
#[derive(Clone, Debug)]
pub struct Rules {
    rules: Vec<Rule>,
    /// By the bytes of the rule, which are hashed at once.
    numbers: HashMap<u128, u16, foldhash::fast::RandomState>,
}

impl Default for Rules {
    fn default() -> Self {
        let mut rules = Self { rules: Vec::new(), numbers: HashMap::default() };
        let first = [rules.number(bare(Cfa::None)), rules.number(bare(Cfa::Unsupported))];
        debug_assert_eq!(first, [Some(NO_RULE), Some(UNSUPPORTED)]);
        rules
    }
}

impl Rules {
    /// The number of a rule; `None` if it is new and there is no room.
    pub(super) fn number(&mut self, rule: Rule) -> Option<u16> {
        let key: u128 = zerocopy::transmute!(rule);
        if let Some(number) = self.numbers.get(&key) {
            return Some(*number);
        }
        if self.rules.len() >= MAX_RULES {
            return None;
        }
        let number = u16::try_from(self.rules.len()).ok()?;
        self.rules.push(rule);
        self.numbers.insert(key, number);
        Some(number)
    }

    /// How many there are; the number of the next one.
    #[must_use]
    pub fn count(&self) -> usize {
        self.rules.len()
    }

    /// Those that have come since there were `count`.
    #[must_use]
    pub fn added_since(&self, count: usize) -> &[Rule] {
        self.rules.get(count..).unwrap_or_default()
    }

    /// The rule of a number.
    #[must_use]
    pub fn get(&self, number: u16) -> Option<&Rule> {
        self.rules.get(usize::from(number))
    }
}

const _: () = assert!(MAX_RULES <= 1 << 16);

#[cfg(test)]
mod tests {
    use super::*;

    fn sp(offset: usize) -> Rule {
        Rule { cfa_offset: offset.try_into().unwrap_or(0), ..bare(Cfa::Sp) }
    }

    #[test]
    fn equal_rules_are_kept_once() {
        let mut rules = Rules::default();
        assert_eq!(rules.count(), 2);
        assert_eq!(rules.number(bare(Cfa::None)), Some(NO_RULE));
        assert_eq!(rules.number(bare(Cfa::Unsupported)), Some(UNSUPPORTED));
        assert_eq!(rules.number(sp(8)), Some(2));
        assert_eq!(rules.number(sp(16)), Some(3));
        assert_eq!(rules.number(sp(8)), Some(2));
        assert_eq!(rules.added_since(2), [sp(8), sp(16)]);
        assert_eq!(rules.added_since(3), [sp(16)]);
        assert!(rules.added_since(4).is_empty() && rules.added_since(99).is_empty());
        assert_eq!(rules.get(2), Some(&sp(8)));
        assert_eq!(rules.get(4), None);
    }

    #[test]
    fn new_rules_are_refused_when_there_are_too_many() {
        let mut rules = Rules::default();
        let numbered = (0..2 * MAX_RULES).filter_map(|n| rules.number(sp(n))).count();
        assert_eq!(numbered, MAX_RULES - 2);
        assert_eq!(rules.count(), MAX_RULES);
        assert_eq!(rules.number(sp(0)), Some(2));
    }
}
