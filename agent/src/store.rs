//! What the agent remembers: the samples of the last minutes, merged by window, in bounded memory.
//!
//! Not for events that are told one by one, and not for disk: an agent that restarts starts empty.

mod join;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use hashbrown::HashMap;

use crate::{
    account::Account,
    event::{KTime, Probe},
    profile::{
        Additions, Batch, Dictionary, Merger, Profile, Sample, Signal, Workload, WorkloadId,
    },
    select::{Selection, Selector},
};
use join::{Joined, Known};

/// How many signals there are: the length of every array by `Signal as usize`.
pub const SIGNALS: usize = Signal::ALL.len();

/// Memory of a sample while its window still merges: an entry of a hash table that is on average
/// two thirds full, with its control byte.
const MERGING_BYTES: usize = (size_of::<Sample>() + 1) * 3 / 2;

/// Memory that a reference-counted string, stack or workload takes besides its content.
const SHARED_BYTES: usize = 2 * size_of::<usize>() + size_of::<Arc<str>>();

/// What to look up.
#[derive(Clone, Debug)]
pub struct Query {
    /// The signal.
    pub signal: Signal,
    /// Start of the time.
    pub since: KTime,
    /// End of the time. A window counts if any of it is in the time.
    pub until: KTime,
    /// Which events; its signals are not looked at.
    pub selector: Selector,
}

/// Events of one signal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Total {
    /// Sum of their weights, in the signal's unit.
    pub weight: u64,
    /// How many.
    pub count: u64,
}

/// What one workload used in the time that is remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The workload.
    pub workload: Arc<Workload>,
    /// By `Signal as usize`.
    pub totals: [Total; SIGNALS],
}

/// What all workloads used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usages {
    /// Of each workload, in no order.
    pub workloads: Vec<Usage>,
    /// Start and end of the time that is remembered; `None` if there is none.
    pub span: Option<(KTime, KTime)>,
}

/// The size of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Windows.
    pub windows: usize,
    /// Start of the oldest window.
    pub oldest: Option<KTime>,
    /// Memory of all windows and dictionaries, estimated, in bytes.
    pub bytes: usize,
    /// Memory of the current dictionary, estimated, in bytes.
    pub dictionary_bytes: usize,
    /// Windows forgotten before their time, to keep within memory.
    pub evicted: u64,
}

/// The signal that a probe's events are samples of.
#[must_use]
pub fn signal_of(probe: Probe) -> Option<Signal> {
    match probe {
        Probe::OnCpu => Some(Signal::Cpu),
        Probe::MinorFault | Probe::MajorFault => Some(Signal::PageFault),
        Probe::Retransmit | Probe::SynAck => Some(Signal::Retransmit),
        Probe::Sender => None,
    }
}

/// Events lost in the kernel or in the agent since it started, by `Signal as usize`.
fn lost(account: &Account) -> [u64; SIGNALS] {
    let mut lost = [0; SIGNALS];
    for (probe, account) in account.iter() {
        if let Some(signal) = signal_of(probe) {
            lost[signal as usize] += account.lost();
        }
    }
    lost
}

/// Estimated memory of dictionary entries, in bytes.
fn size(a: &Additions) -> usize {
    let strings: usize = a.strings.iter().map(|s| s.len() + SHARED_BYTES).sum();
    let stacks: usize = a.stacks.iter().map(|s| size_of_val(&**s) + SHARED_BYTES).sum();
    let workload = |w: &Workload| size_of::<Workload>() + SHARED_BYTES + w.text_bytes();
    let renamed = a.renamed.iter().map(|(_, w)| w);
    let workloads: usize = a.workloads.iter().chain(renamed).map(|w| workload(w)).sum();
    strings
        + stacks
        + workloads
        + size_of_val(&*a.mappings)
        + size_of_val(&*a.functions)
        + size_of_val(&*a.frames)
}

/// The samples of some time, which no longer change.
#[derive(Debug)]
struct Window {
    start: KTime,
    end: KTime,
    samples: Box<[Sample]>,
    lost: [u64; SIGNALS],
}

/// The window that batches go into.
#[derive(Debug)]
struct Open {
    start: KTime,
    end: KTime,
    merger: Merger,
    lost: [u64; SIGNALS],
}

/// The windows whose samples refer to one dictionary.
#[derive(Debug)]
struct Generation {
    dictionary: Arc<Dictionary>,
    dictionary_bytes: usize,
    windows: VecDeque<Window>,
}

/// The store. Its memory is within `max_bytes` and the current dictionary, which the dictionary's
/// owner bounds.
#[derive(Debug)]
pub struct Store {
    window_ns: u64,
    retention_ns: u64,
    max_bytes: usize,
    /// The oldest first; the last one is current, and only it may have no window.
    generations: VecDeque<Generation>,
    open: Option<Open>,
    /// [`lost`] as of the last batch.
    lost: [u64; SIGNALS],
    /// Of all windows that are closed, and of all dictionaries.
    bytes: usize,
    evicted: u64,
}

impl Store {
    /// An empty store. A longer `window` takes less memory and answers more coarsely.
    #[must_use]
    pub fn new(window: Duration, retention: Duration, max_bytes: usize) -> Self {
        let nanos = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        let first = Generation {
            dictionary: Arc::default(),
            dictionary_bytes: 0,
            windows: VecDeque::new(),
        };
        Self {
            window_ns: nanos(window),
            retention_ns: nanos(retention),
            max_bytes,
            generations: VecDeque::from([first]),
            open: None,
            lost: [0; SIGNALS],
            bytes: 0,
            evicted: 0,
        }
    }

    /// Takes in a batch.
    pub fn apply(&mut self, batch: &Batch) {
        let changed = self.dictionary().generation != batch.generation;
        let full = |o: &Open| batch.start.0 >= o.start.0.saturating_add(self.window_ns);
        if changed || self.open.as_ref().is_some_and(full) {
            self.close();
        }
        if changed {
            self.start_generation();
        }
        self.extend_dictionary(batch);
        self.rename_past(&batch.additions.renamed);

        let open = self.open.get_or_insert_with(|| Open {
            start: batch.start,
            end: batch.end,
            merger: Merger::default(),
            lost: [0; SIGNALS],
        });
        open.end = open.end.max(batch.end);
        batch.samples.iter().for_each(|s| open.merger.add(s));
        let now = lost(&batch.account);
        for ((sum, now), before) in open.lost.iter_mut().zip(now).zip(self.lost) {
            *sum += now.saturating_sub(before);
        }
        self.lost = now;
        self.forget(batch.end);
    }

    /// The dictionary of the current generation.
    #[must_use]
    pub fn dictionary(&self) -> &Arc<Dictionary> {
        // There is always a current generation.
        &self.generations[self.generations.len() - 1].dictionary
    }

    /// What the query selects, merged; `None` if that is nothing. Samples of several generations get
    /// a dictionary of their own.
    #[must_use]
    pub fn profile(&self, query: &Query) -> Option<Profile> {
        let wanted = |start: KTime, end: KTime| end > query.since && start < query.until;
        let open = self.open.as_ref().filter(|o| wanted(o.start, o.end));
        let selector = Arc::new(query.selector.clone());
        let mut parts = Vec::new();
        let (mut start, mut end, mut lost) = (KTime(u64::MAX), KTime(0), 0);
        let mut cover = |from: KTime, to: KTime, l: &[u64; SIGNALS]| {
            start = start.min(from);
            end = end.max(to);
            lost += l[query.signal as usize];
        };
        for (i, generation) in self.generations.iter().enumerate() {
            let mut merger = Merger::default();
            let mut selection = Selection::new(Arc::clone(&selector));
            selection.extend(&generation.dictionary.all.workloads);
            let mut add = |s: &Sample| {
                if s.signal == query.signal && selection.takes(s.signal, s.workload, s.pid) {
                    merger.add(s);
                }
            };
            for window in generation.windows.iter().filter(|w| wanted(w.start, w.end)) {
                window.samples.iter().for_each(&mut add);
                cover(window.start, window.end, &window.lost);
            }
            if let (true, Some(open)) = (i + 1 == self.generations.len(), open) {
                open.merger.iter().for_each(|s| add(&s));
                cover(open.start, open.end, &open.lost);
            }
            if !merger.is_empty() {
                parts.push((&generation.dictionary, merger));
            }
        }
        let (dictionary, samples) = join(parts)?;
        Some(Profile { signal: query.signal, start, end, dictionary, samples, lost })
    }

    /// What each selected workload used.
    #[must_use]
    pub fn usages(&self, selector: &Selector) -> Usages {
        let mut all: HashMap<Arc<Workload>, [Total; SIGNALS]> = HashMap::new();
        for (i, generation) in self.generations.iter().enumerate() {
            let workloads = &generation.dictionary.all.workloads;
            let mut totals = vec![None; workloads.len()];
            let mut add = |s: &Sample| {
                if let Some(totals) = totals.get_mut(s.workload.0 as usize) {
                    let totals: &mut [Total; SIGNALS] = totals.get_or_insert_default();
                    totals[s.signal as usize].count += s.count;
                    totals[s.signal as usize].weight += s.weight;
                }
            };
            generation.windows.iter().flat_map(|w| &w.samples).for_each(&mut add);
            if let (true, Some(open)) = (i + 1 == self.generations.len(), &self.open) {
                open.merger.iter().for_each(|s| add(&s));
            }
            for (workload, totals) in workloads.iter().zip(totals) {
                if let (Some(totals), true) = (totals, selector.takes_workload(workload)) {
                    let sums = all.entry(Arc::clone(workload)).or_default();
                    for (sum, part) in sums.iter_mut().zip(totals) {
                        sum.count += part.count;
                        sum.weight += part.weight;
                    }
                }
            }
        }
        let workloads =
            all.into_iter().map(|(workload, totals)| Usage { workload, totals }).collect();
        Usages { workloads, span: self.span() }
    }

    /// The time that is remembered.
    fn span(&self) -> Option<(KTime, KTime)> {
        let closed = || self.generations.iter().flat_map(|g| &g.windows).map(|w| (w.start, w.end));
        let open = self.open.as_ref().map(|o| (o.start, o.end));
        let first = closed().next().or(open)?;
        let last = open.or_else(|| closed().next_back())?;
        Some((first.0, last.1))
    }

    /// How much there is.
    #[must_use]
    pub fn size(&self) -> Size {
        Size {
            windows: self.generations.iter().map(|g| g.windows.len()).sum::<usize>()
                + usize::from(self.open.is_some()),
            oldest: self.span().map(|s| s.0),
            bytes: self.bytes + self.open_bytes(),
            dictionary_bytes: self.generations.back().map_or(0, |g| g.dictionary_bytes),
            evicted: self.evicted,
        }
    }

    fn open_bytes(&self) -> usize {
        self.open.as_ref().map_or(0, |o| o.merger.len() * MERGING_BYTES)
    }

    fn start_generation(&mut self) {
        // A generation that no window refers to is of no use.
        if self.generations.back().is_some_and(|g| g.windows.is_empty())
            && let Some(old) = self.generations.pop_back()
        {
            self.bytes -= old.dictionary_bytes;
        }
        self.generations.push_back(Generation {
            dictionary: Arc::default(),
            dictionary_bytes: 0,
            windows: VecDeque::new(),
        });
    }

    /// Adds a batch's entries. While an answer still uses the dictionary, this copies its tables.
    fn extend_dictionary(&mut self, batch: &Batch) {
        let size = size(&batch.additions);
        if let Some(current) = self.generations.back_mut() {
            if size > 0 || current.dictionary.generation != batch.generation {
                let dictionary = Arc::make_mut(&mut current.dictionary);
                dictionary.apply(batch.generation, &batch.additions);
            }
            current.dictionary_bytes += size;
            self.bytes += size;
        }
    }

    /// Names that became known late hold for what was charged in earlier generations too: to the
    /// same container of the same pod, and to no other.
    fn rename_past(&mut self, renamed: &[(WorkloadId, Arc<Workload>)]) {
        let past = self.generations.len().saturating_sub(1);
        for generation in self.generations.iter_mut().take(past) {
            for (_, new) in renamed {
                let same = |w: &Arc<Workload>| w.is_same_place(new) && w != new;
                let workloads = &generation.dictionary.all.workloads;
                let Some(at) = workloads.iter().position(same) else { continue };
                Arc::make_mut(&mut generation.dictionary).all.workloads[at] = Arc::clone(new);
            }
        }
    }

    /// Closes the open window.
    fn close(&mut self) {
        if let (Some(open), Some(current)) = (self.open.take(), self.generations.back_mut()) {
            let samples: Box<[Sample]> = open.merger.iter().collect();
            self.bytes += size_of::<Window>() + size_of_val(&*samples);
            let Open { start, end, lost, .. } = open;
            current.windows.push_back(Window { start, end, samples, lost });
        }
    }

    /// Forgets the windows that are too old, and then the oldest ones that memory has no room for.
    fn forget(&mut self, now: KTime) {
        loop {
            let oldest = self.generations.front().and_then(|g| g.windows.front());
            let old = oldest.is_some_and(|w| w.end.0.saturating_add(self.retention_ns) < now.0);
            let full = self.bytes + self.open_bytes() > self.max_bytes;
            if !old && !full {
                return;
            }
            if oldest.is_none() {
                // The open window alone is too large.
                self.evicted += u64::from(self.open.take().is_some());
                return;
            }
            self.evicted += u64::from(!old);
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        let Some(generation) = self.generations.front_mut() else { return };
        if let Some(window) = generation.windows.pop_front() {
            self.bytes -= size_of::<Window>() + size_of_val(&*window.samples);
        }
        if generation.windows.is_empty() && self.generations.len() > 1 {
            let gone = self.generations.pop_front();
            self.bytes -= gone.map_or(0, |g| g.dictionary_bytes);
        }
    }
}

/// Brings the samples of several dictionaries together.
fn join(mut parts: Vec<(&Arc<Dictionary>, Merger)>) -> Option<(Arc<Dictionary>, Vec<Sample>)> {
    if parts.len() < 2 {
        let (dictionary, merger) = parts.pop()?;
        return Some((Arc::clone(dictionary), merger.iter().collect()));
    }
    let mut interner = Joined::default();
    let mut joined = Merger::default();
    for (dictionary, merger) in parts {
        let mut known = Known::default();
        merger.iter().for_each(|s| joined.add(&interner.sample(dictionary, &mut known, &s)));
    }
    Some((Arc::new(interner.finish()), joined.iter().collect()))
}

#[cfg(test)]
mod tests;
