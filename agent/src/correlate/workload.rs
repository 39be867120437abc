//! All series of one workload, or of the node, and what is usual there.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use super::{
    baseline::{Baseline, Change},
    histogram::Times,
    observe::{Kind, Metric, Name, SECOND, Source, Subject},
    persist::{Entry, MAX_ENTRIES, Remembered},
    series::{BIN, BINS, Coverage, QUANTILES, RESPONSE_SECONDS, RING, Responses, Series, Span},
};

/// A baseline is one from so many values on: a minute.
pub const MIN_VALUES: u32 = 12;

/// The last bins are no part of a baseline yet: an incident may have begun in them. 30 s.
pub(super) const QUARANTINE: u64 = 6 * BIN;

/// A bin with fewer requests says nothing about one request.
const MIN_REQUESTS: f64 = 10.0;

/// What is left of a subject's weight after a second.
const DECAY: f64 = 0.98;

/// What an amount is put in relation to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Per {
    Second,
    Request,
}

/// The series of a workload.
#[derive(Debug)]
pub(super) struct Workload {
    /// The first slot it was seen in, and the last.
    pub(super) since: u64,
    pub(super) seen: u64,
    totals: BTreeMap<Metric, Series>,
    subjects: BTreeMap<Metric, BTreeMap<Name, (Subject, Series)>>,
    responses: Option<Responses>,
    /// How many bins there were, and the end of those that are remembered.
    bins: u64,
    ends: VecDeque<u64>,
    /// Bit n % 128 stands for bin n: what was known in it, by source.
    known: [u128; Source::ALL.len()],
    /// What an earlier run of the agent found to be usual.
    pub(super) remembered: Remembered,
    /// Amounts whose subject has no series of its own.
    pub(super) folded: u64,
}

impl Workload {
    /// Memory of one, besides series, response times and what is remembered.
    pub(super) const BYTES: usize = size_of::<Self>() + BINS * 8 + 2048;

    pub(super) fn new(since: u64, remembered: Remembered) -> Self {
        Self {
            since,
            seen: since,
            totals: BTreeMap::new(),
            subjects: BTreeMap::new(),
            responses: None,
            bins: 0,
            ends: VecDeque::with_capacity(BINS),
            known: [0; Source::ALL.len()],
            remembered,
            folded: 0,
        }
    }

    fn all(&mut self) -> impl Iterator<Item = (Metric, &mut Series)> {
        let subjects = self.subjects.iter_mut();
        let subjects = subjects.flat_map(|(m, all)| all.values_mut().map(|(_, s)| (*m, s)));
        self.totals.iter_mut().map(|(m, s)| (*m, s)).chain(subjects)
    }

    /// Series that it has.
    pub(super) fn series(&self) -> usize {
        self.totals.len() + self.subjects.values().map(BTreeMap::len).sum::<usize>()
    }

    /// Memory of all series, response times and what is remembered.
    pub(super) fn bytes(&self) -> usize {
        let responses = if self.responses.is_some() { Responses::BYTES } else { 0 };
        let remembered = self.remembered.entries.len() * Remembered::ENTRY_BYTES;
        Self::BYTES + self.series() * Series::BYTES + responses + remembered
    }

    /// What is usual before `until`, to be remembered beyond this run.
    pub(super) fn remember(&self, until: u64) -> Remembered {
        let subjects = self.subjects.iter().flat_map(|(m, all)| all.keys().map(|n| (*m, Some(n))));
        let series = self.totals.keys().map(|m| (*m, None)).chain(subjects).take(MAX_ENTRIES);
        let entry = |(metric, subject): (Metric, Option<&Name>)| {
            let get = |per| {
                let baseline = self.baseline(metric, subject.map(|s| &**s), per, until);
                baseline.filter(|b| b.values >= MIN_VALUES)
            };
            let entry = Entry { second: get(Per::Second), request: get(Per::Request) };
            let some = entry.second.is_some() || entry.request.is_some();
            some.then(|| ((metric, subject.cloned()), entry))
        };
        Remembered {
            entries: series.filter_map(entry).collect(),
            quantiles: std::array::from_fn(|index| self.usual_quantile(index, until)),
        }
    }

    pub(super) fn usual_quantile(&self, index: usize, until: u64) -> Option<Baseline> {
        let own = Baseline::of(self.quantiles(index, until));
        self.or_remembered(own, || self.remembered.quantile(index))
    }

    /// Whether anything came from a source.
    pub(super) fn uses(&self, source: Source) -> bool {
        self.totals.keys().any(|m| m.source() == source)
    }

    /// The subjects of a metric, by name.
    pub(super) fn subjects(&self, metric: Metric) -> impl Iterator<Item = &Subject> {
        self.subjects.get(&metric).into_iter().flat_map(|all| all.values().map(|(s, _)| s))
    }

    /// Bins of a series that did not exist: nothing happened while its source was known, unless others
    /// were folded away.
    fn empty(&self, metric: Metric, folded: bool) -> [f32; BINS] {
        let known = if metric.kind() == Kind::Level || folded {
            0
        } else {
            self.known[metric.source() as usize]
        };
        std::array::from_fn(|bin| if known >> bin & 1 == 1 { 0.0 } else { f32::NAN })
    }

    /// Adds to a series. `room` is how many series may be made; returns how many were.
    pub(super) fn put(
        &mut self,
        metric: Metric,
        subject: Option<&Subject>,
        span: Span,
        amount: f64,
        room: usize,
    ) -> usize {
        self.seen = self.seen.max(span.to);
        let share =
            if metric.kind() == Kind::Sum { amount / span.len().max(1) as f64 } else { amount };
        let before = self.series();
        if !self.totals.contains_key(&metric) && room > 0 {
            let bins = self.empty(metric, false);
            self.totals.insert(metric, Series::new(self.since, bins));
        }
        if let Some(total) = self.totals.get_mut(&metric) {
            (span.from..span.to).for_each(|slot| total.put(metric, slot, share));
        }
        let made = self.series() - before;
        if let Some(subject) = subject.filter(|_| metric.subjects() > 0) {
            match self.subject(metric, subject, amount, span.from, made < room) {
                Some(series) => {
                    series.weight += amount.abs();
                    (span.from..span.to).for_each(|slot| series.put(metric, slot, share));
                }
                None => self.folded = self.folded.saturating_add(1),
            }
        }
        // Who took another's place made none.
        self.series().saturating_sub(before)
    }

    /// The series of a subject, a new one if there is room or if a lighter one has to go.
    fn subject(
        &mut self,
        metric: Metric,
        subject: &Subject,
        amount: f64,
        now: u64,
        room: bool,
    ) -> Option<&mut Series> {
        let count = self.subjects.get(&metric).map_or(0, BTreeMap::len);
        let new = !self.subjects.get(&metric).is_some_and(|all| all.contains_key(&subject.name));
        if new {
            let full = count >= metric.subjects();
            if !full && !room {
                return None;
            }
            if full {
                let all = self.subjects.get_mut(&metric)?;
                let lightest = all.iter().min_by(|a, b| a.1.1.weight.total_cmp(&b.1.1.weight));
                let (name, weight) = lightest.map(|(n, (_, s))| (Arc::clone(n), s.weight))?;
                if amount.abs() <= weight {
                    return None;
                }
                all.remove(&name);
            }
            // As long as nothing was folded, who is new did nothing before.
            let folded = full || self.folded > 0;
            let series =
                Series::new(if folded { now } else { self.since }, self.empty(metric, folded));
            let all = self.subjects.entry(metric).or_default();
            all.insert(Arc::clone(&subject.name), (subject.clone(), series));
        }
        let (known, series) = self.subjects.get_mut(&metric)?.get_mut(&subject.name)?;
        if subject.workload.is_some() {
            known.workload.clone_from(&subject.workload);
        }
        Some(series)
    }

    /// Forgets all slots, after a time that nobody told of.
    pub(super) fn blank(&mut self) {
        self.clear(Span { from: 0, to: RING as u64 });
    }

    /// Adds response times.
    pub(super) fn respond(&mut self, slot: u64, times: &Times) {
        self.responses.get_or_insert_with(Responses::new).put(slot, times);
    }

    /// Makes room for the slots of a second, and lets weights decay.
    pub(super) fn clear(&mut self, slots: Span) {
        for (_, series) in self.all() {
            (slots.from..slots.to).for_each(|slot| series.clear(slot));
            series.weight *= DECAY;
        }
        if let Some(responses) = &mut self.responses {
            (slots.from..slots.to).step_by(SECOND as usize).for_each(|slot| responses.clear(slot));
        }
    }

    /// Keeps a bin.
    pub(super) fn push(&mut self, span: Span, coverage: &Coverage) {
        let bin = self.bins;
        for (metric, series) in self.all() {
            series.set_bin(bin, series.rate(metric, span, coverage));
        }
        if let Some(responses) = &mut self.responses {
            responses.set_bin(bin, span);
        }
        let bit = 1 << (bin % BINS as u64);
        let begun = span.from >= self.since;
        for source in Source::ALL {
            let known = &mut self.known[source as usize];
            let whole = begun && coverage.whole(source, span) >= 0.5;
            *known = if whole { *known | bit } else { *known & !bit };
        }
        self.bins += 1;
        if self.ends.len() == BINS {
            self.ends.pop_front();
        }
        self.ends.push_back(span.to);
    }

    /// Forgets bins that end after this.
    pub(super) fn forget(&mut self, after: u64) {
        while self.ends.back().is_some_and(|end| *end > after) {
            self.ends.pop_back();
            self.bins -= 1;
        }
    }

    /// Forgets all that was usual.
    pub(super) fn unlearn(&mut self) {
        self.forget(0);
        self.remembered = Remembered::default();
    }

    /// The bins that end before `until`.
    pub(super) fn usual(&self, until: u64) -> std::ops::Range<u64> {
        let skipped = self.ends.iter().rev().take_while(|end| **end > until).count() as u64;
        let end = self.bins - skipped;
        (self.bins - self.ends.len() as u64).min(end)..end
    }

    fn find(&self, metric: Metric, subject: Option<&str>) -> Option<&Series> {
        match subject {
            None => self.totals.get(&metric),
            Some(name) => self.subjects.get(&metric)?.get(name).map(|(_, s)| s),
        }
    }

    /// The amounts of the bins before `until`, a second or a request; NaN where unknown.
    pub(super) fn values(
        &self,
        metric: Metric,
        subject: Option<&str>,
        per: Per,
        until: u64,
    ) -> Vec<f64> {
        let Some(series) = self.find(metric, subject) else { return Vec::new() };
        let bins = self.usual(until);
        match (per, self.totals.get(&Metric::Requests)) {
            (Per::Second, _) => bins.map(|b| series.bin(b)).collect(),
            (Per::Request, None) => Vec::new(),
            (Per::Request, Some(requests)) => {
                let each = |b| {
                    let rate = requests.bin(b);
                    let enough = rate * (BIN / SECOND) as f64 >= MIN_REQUESTS;
                    if enough { series.bin(b) / rate } else { f64::NAN }
                };
                bins.map(each).collect()
            }
        }
    }

    /// A quantile of the response times of the bins before `until`; NaN where unknown.
    pub(super) fn quantiles(&self, index: usize, until: u64) -> Vec<f64> {
        let Some(responses) = &self.responses else { return Vec::new() };
        self.usual(until).map(|bin| responses.bin(index, bin)).collect()
    }

    /// What is usual before `until`, a second or a request.
    pub(super) fn baseline(
        &self,
        metric: Metric,
        subject: Option<&str>,
        per: Per,
        until: u64,
    ) -> Option<Baseline> {
        let own = Baseline::of(self.values(metric, subject, per, until));
        self.or_remembered(own, || self.remembered.get(metric, subject, per))
    }

    /// The mean amount in a second before `until`, for things so rare that their median is none; and for
    /// how many seconds it is known.
    pub(super) fn rarity(&self, metric: Metric, subject: &str, until: u64) -> Option<(f64, f64)> {
        let series = self.find(metric, Some(subject))?;
        let rates = self.usual(until).map(|bin| series.bin(bin)).filter(|rate| rate.is_finite());
        let (sum, bins) = rates.fold((0.0, 0.0), |(sum, bins), rate| (sum + rate, bins + 1.0));
        (bins > 0.0).then(|| (sum / bins, bins * (BIN / SECOND) as f64))
    }

    fn or_remembered(
        &self,
        own: Option<Baseline>,
        remembered: impl FnOnce() -> Option<Baseline>,
    ) -> Option<Baseline> {
        match own {
            Some(own) if own.values >= MIN_VALUES => Some(own),
            own => remembered().or(own),
        }
    }
}

/// A workload as one looks at it: what a stretch of time has against what was usual before.
#[derive(Clone, Copy, Debug)]
pub(super) struct View<'a> {
    pub(super) workload: &'a Workload,
    pub(super) coverage: &'a Coverage,
    /// The time that is looked at.
    pub(super) inside: Span,
    /// Bins up to here are what is usual.
    pub(super) until: u64,
}

impl<'a> View<'a> {
    /// The last `slots`, against what is usual now.
    pub(super) fn last(
        workload: &'a Workload,
        coverage: &'a Coverage,
        slots: u64,
        now: u64,
    ) -> Self {
        let inside = Span::last(slots, now);
        Self { workload, coverage, inside, until: now.saturating_sub(QUARANTINE) }
    }

    /// The amount in a second, the mean level, or the amount for each request.
    pub(super) fn now(&self, metric: Metric, subject: Option<&str>, per: Per) -> Option<f64> {
        let series = self.workload.find(metric, subject)?;
        let rate = series.rate(metric, self.inside, self.coverage)?;
        match per {
            Per::Second => Some(rate),
            Per::Request => {
                let requests = self.now(Metric::Requests, None, Per::Second)?;
                (requests * self.inside.len() as f64 >= SECOND as f64).then(|| rate / requests)
            }
        }
    }

    /// How it changed.
    pub(super) fn change(&self, metric: Metric, subject: Option<&str>, per: Per) -> Option<Change> {
        let base = self.workload.baseline(metric, subject, per, self.until)?;
        let now = self.now(metric, subject, per)?;
        let floor = metric.floor(per == Per::Request);
        Some(Change { base, now, sigma: base.sigma(floor) })
    }

    /// A quantile of the response time; looks at the last seconds only.
    pub(super) fn quantile(&self, index: usize) -> Option<f64> {
        let responses = self.workload.responses.as_ref()?;
        if self.coverage.whole(Metric::Response.source(), self.inside) < 0.5 {
            return None;
        }
        responses.times(self.inside).quantile(QUANTILES[index])
    }

    /// Requests in the time.
    pub(super) fn requests(&self) -> f64 {
        let rate = self.now(Metric::Requests, None, Per::Second).unwrap_or(0.0);
        rate * self.inside.len() as f64 / SECOND as f64
    }

    /// The amounts of each slot of a time; NaN where unknown.
    pub(super) fn slots(&self, metric: Metric, subject: Option<&str>, span: Span) -> Vec<f64> {
        let series = self.workload.find(metric, subject);
        let at = |slot| series.map_or(f64::NAN, |s| s.at(metric, slot, self.coverage));
        (span.from..span.to).map(at).collect()
    }
}

const _: () = assert!(RESPONSE_SECONDS as u64 * SECOND > BIN + 2 * super::series::REACH);
