//! The store, filled with made-up batches.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{
    event::Probe,
    fixture::{SECOND, Source},
    select::WorkloadFilter,
};

fn store(max_bytes: usize) -> Store {
    Store::new(Duration::from_secs(10), Duration::from_mins(1), max_bytes)
}

fn everything(signal: Signal) -> Query {
    Query { signal, since: KTime(0), until: KTime(u64::MAX), selector: Selector::default() }
}

/// Counts by workload and stack, in names.
fn named(profile: &Profile) -> BTreeMap<String, u64> {
    let d = &profile.dictionary;
    let name = |s: &Sample| {
        let frames: Vec<&str> =
            d.stack(s.stack).iter().rev().map(|f| d.string(d.frame(*f).unwrap().1.name)).collect();
        format!("{} {} {}", d.workload(s.workload).unwrap().pod, d.string(s.comm), frames.join(";"))
    };
    profile.samples.iter().map(|s| (name(s), s.count)).collect()
}

#[test]
fn windows_merge_and_a_query_selects() {
    let mut source = Source::new();
    let mut store = store(usize::MAX);
    for _ in 0..30 {
        let cart = source.sample(Signal::Cpu, "cart", "leaf main", 2);
        let user = source.sample(Signal::Cpu, "user", "main", 1);
        store.apply(&source.flush(vec![cart, user], vec![]));
    }
    assert_eq!(store.size().windows, 3);

    let all = store.profile(&everything(Signal::Cpu)).unwrap();
    assert_eq!(
        named(&all),
        [("cart main main;leaf".into(), 60), ("user main main".into(), 30)].into()
    );
    assert_eq!((all.start, all.end), (KTime(SECOND), KTime(31 * SECOND)));

    let pod = WorkloadFilter { pod: "cart".into(), ..Default::default() };
    let selector = Selector { workloads: vec![pod], ..Default::default() };
    // The last window starts at 21 s and is open.
    let since = KTime(22 * SECOND);
    let some = store.profile(&Query { since, selector, ..everything(Signal::Cpu) }).unwrap();
    assert_eq!(named(&some), [("cart main main;leaf".into(), 20)].into());
    assert_eq!(some.start, KTime(21 * SECOND));

    assert!(store.profile(&everything(Signal::PageFault)).is_none());
    let selector = Selector { pids: vec![8], ..Default::default() };
    assert!(store.profile(&Query { selector, ..everything(Signal::Cpu) }).is_none());
}

#[test]
fn generations_are_joined_in_one_dictionary() {
    let mut source = Source::new();
    let mut store = store(usize::MAX);
    let a = source.sample(Signal::Cpu, "cart", "leaf main", 1);
    store.apply(&source.flush(vec![a], vec![]));
    source.next_generation();
    // The same names get other IDs.
    let b = source.sample(Signal::Cpu, "user", "other main", 5);
    let c = source.sample(Signal::Cpu, "cart", "leaf main", 2);
    store.apply(&source.flush(vec![b, c], vec![]));

    let profile = store.profile(&everything(Signal::Cpu)).unwrap();
    let expected = [("cart main main;leaf".into(), 3), ("user main main;other".into(), 5)];
    assert_eq!(named(&profile), expected.into());
    let d = &profile.dictionary.all;
    assert_eq!((&*d.strings[0], d.stacks.len(), d.frames.len()), ("", 2, 3));

    let usages: BTreeMap<String, u64> = store
        .usages(&Selector::default())
        .workloads
        .into_iter()
        .map(|u| (u.workload.pod.clone(), u.totals[Signal::Cpu as usize].count))
        .collect();
    assert_eq!(usages, [("cart".into(), 3), ("user".into(), 5)].into());
}

#[test]
fn an_answer_stays_as_it_was() {
    let mut source = Source::new();
    let mut store = store(usize::MAX);
    let a = source.sample(Signal::Cpu, "cart", "main", 1);
    store.apply(&source.flush(vec![a], vec![]));
    let before = store.profile(&everything(Signal::Cpu)).unwrap();
    let b = source.sample(Signal::Cpu, "user", "main", 1);
    store.apply(&source.flush(vec![b], vec![]));
    assert_eq!(before.dictionary.all.workloads.len(), 1);
    assert_eq!(store.dictionary().all.workloads.len(), 2);
}

#[test]
fn losses_are_told_by_signal_and_time() {
    let mut source = Source::new();
    let mut store = store(usize::MAX);
    for second in 0..20 {
        source.account.probe_mut(Probe::OnCpu).dropped_in_kernel[0] += u64::from(second == 3);
        source.account.probe_mut(Probe::MinorFault).dropped_in_agent[1] += 1;
        let samples = vec![
            source.sample(Signal::Cpu, "cart", "main", 1),
            source.sample(Signal::PageFault, "cart", "main", 1),
        ];
        store.apply(&source.flush(samples, vec![]));
    }
    let lost = |signal, since| {
        store.profile(&Query { since: KTime(since * SECOND), ..everything(signal) }).unwrap().lost
    };
    assert_eq!([lost(Signal::Cpu, 0), lost(Signal::Cpu, 12)], [1, 0]);
    assert_eq!([lost(Signal::PageFault, 0), lost(Signal::PageFault, 12)], [20, 10]);
}

#[test]
fn a_window_that_memory_cannot_hold_is_forgotten_and_counted() {
    let mut source = Source::new();
    let mut store = store(0);
    let a = source.sample(Signal::Cpu, "cart", "main", 1);
    store.apply(&source.flush(vec![a], vec![]));
    assert_eq!((store.size().windows, store.size().evicted), (0, 1));
    assert_eq!(store.size().bytes, store.size().dictionary_bytes);
}

/// The signal, the pod, the stack and the count of a sample.
type Made = (usize, u8, u8, u64);

/// The samples of each flush, and whether a new generation starts before it.
fn flushes() -> impl Strategy<Value = Vec<(Vec<Made>, bool)>> {
    let sample = (0..SIGNALS, 0..4u8, 0..6u8, 1..100u64);
    prop::collection::vec((prop::collection::vec(sample, 0..8), prop::bool::weighted(0.1)), 1..120)
}

proptest! {
    #[test]
    fn totals_are_conserved(flushes in flushes(), max_bytes in prop_oneof![Just(usize::MAX), 500usize..40_000]) {
        let mut source = Source::new();
        let mut store = store(max_bytes);
        let mut applied = Vec::new();
        for (samples, renew) in flushes {
            if renew {
                source.next_generation();
            }
            let samples: Vec<Sample> = samples
                .iter()
                .map(|&(signal, pod, stack, count)| source.sample(Signal::ALL[signal], &format!("p{pod}"), &format!("s{stack} main"), count))
                .collect();
            let batch = source.flush(samples, vec![]);
            store.apply(&batch);
            applied.push(batch);
            let size = store.size();
            prop_assert!(size.bytes <= max_bytes.max(size.dictionary_bytes));
        }
        // What is remembered is exactly what came since the oldest window.
        let oldest = store.size().oldest.unwrap_or(KTime(u64::MAX));
        if max_bytes == usize::MAX {
            prop_assert_eq!(store.size().evicted, 0);
            let end = applied.last().unwrap().end;
            prop_assert!(oldest.0 <= end.0.saturating_sub(60 * SECOND).max(SECOND));
        }
        let usages = store.usages(&Selector::default()).workloads;
        for signal in Signal::ALL {
            let expected: u64 = applied
                .iter()
                .filter(|b| b.start >= oldest)
                .flat_map(|b| &b.samples)
                .filter(|s| s.signal == signal)
                .map(|s| s.count)
                .sum();
            let profile = store.profile(&everything(signal));
            let (count, weight) = profile.map_or((0, 0), |p| {
                p.samples.iter().fold((0, 0), |(c, w), s| (c + s.count, w + s.weight))
            });
            prop_assert_eq!((count, weight), (expected, 10 * expected));
            let used: u64 = usages.iter().map(|u| u.totals[signal as usize].count).sum();
            prop_assert_eq!(used, expected);
        }
    }
}
