//! The functions that a profile spends most in, for a summary.
//!
//! Self is what a function spends in its own code, total includes its callees. Annotations stand for
//! no code: the self value goes to the innermost code frame. Values are sums of weights, in the
//! signal's unit.

use std::cmp::Reverse;

use hashbrown::HashMap;
use serde::Serialize;

use crate::{
    fold::UNKNOWN,
    profile::{Dictionary, FrameId, FrameKind, Profile},
};

/// One function.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TopRow {
    /// Its name, as in the profile: not safe for a terminal, see [`crate::fold::printable`].
    pub name: String,
    /// The file its code is in, empty if unknown. As in the profile, too.
    pub module: String,
    /// Weight of the samples in its own code.
    pub self_value: u64,
    /// The part that is of all weight, 0 to 1.
    pub self_share: f64,
    /// Weight of the samples with the function anywhere in the stack, each counted once.
    pub total_value: u64,
    /// The part that is of all weight, 0 to 1.
    pub total_share: f64,
}

#[derive(Default)]
struct Sums {
    own: u64,
    total: u64,
    /// Number of the last sample added to `total`, from 1: recursion counts once.
    last: usize,
}

/// The `n` functions with the greatest self value, greatest first. Functions are one if they share
/// name and module. A stack without any code is a row of its own, named by its annotation.
#[must_use]
pub fn top(profile: &Profile, n: usize) -> Vec<TopRow> {
    let dictionary = &*profile.dictionary;
    let mut rows: HashMap<(&str, &str), Sums> = HashMap::new();
    let mut all: u64 = 0;
    for (number, sample) in (1..).zip(&profile.samples) {
        all = all.saturating_add(sample.weight);
        let stack = dictionary.stack(sample.stack);
        let mut innermost = true;
        for key in stack.iter().filter_map(|id| code(dictionary, *id)) {
            let sums = rows.entry(key).or_default();
            if innermost {
                sums.own = sums.own.saturating_add(sample.weight);
                innermost = false;
            }
            if sums.last != number {
                sums.last = number;
                sums.total = sums.total.saturating_add(sample.weight);
            }
        }
        if innermost {
            let found = stack.iter().find_map(|id| dictionary.frame(*id));
            let name = found.map_or(UNKNOWN, |(_, f)| dictionary.string(f.name));
            let sums = rows.entry((name, "")).or_default();
            sums.own = sums.own.saturating_add(sample.weight);
            sums.total = sums.total.saturating_add(sample.weight);
        }
    }
    let mut rows: Vec<((&str, &str), Sums)> = rows.into_iter().collect();
    rows.sort_unstable_by_key(|(key, sums)| (Reverse(sums.own), Reverse(sums.total), *key));
    rows.truncate(n);
    let share = |value: u64| if all == 0 { 0.0 } else { value as f64 / all as f64 };
    rows.into_iter()
        .map(|((name, module), sums)| TopRow {
            name: name.to_owned(),
            module: module.to_owned(),
            self_value: sums.own,
            self_share: share(sums.own),
            total_value: sums.total,
            total_share: share(sums.total),
        })
        .collect()
}

/// Name and module of a frame that stands for code.
fn code(dictionary: &Dictionary, id: FrameId) -> Option<(&str, &str)> {
    let Some((frame, function)) = dictionary.frame(id) else { return Some((UNKNOWN, "")) };
    if frame.kind == FrameKind::Annotation {
        return None;
    }
    let mapping = dictionary.all.mappings.get(function.mapping.0 as usize);
    let name = dictionary.string(function.name);
    let name = if name.is_empty() { UNKNOWN } else { name };
    Some((name, mapping.map_or("", |m| dictionary.string(m.path))))
}

#[cfg(test)]
mod tests;
