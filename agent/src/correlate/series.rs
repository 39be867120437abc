//! Series in memory of a fixed size: the last minutes by slot, and before that bins of 5 s.

use super::{
    histogram::Times,
    observe::{Kind, Metric, SECOND, Source},
};

/// Slots that are remembered, one by one: 102 s, for onsets and for lead and lag. Each costs 4 bytes a
/// series.
pub const RING: usize = 1024;

/// Slots of a bin: 5 s. What is usual is the median of bins, so they are as long as the window that is
/// compared with it.
pub const BIN: u64 = 5 * SECOND;

/// Bins that are remembered: 10 min 40 s, the sliding period of a baseline. Each costs 4 bytes a series.
pub const BINS: usize = 128;

/// How far from the current slot observations are taken, into the past and the future.
pub const REACH: u64 = 5 * SECOND;

/// Longest time that one observation is about.
pub const MAX_SPAN: u16 = 100;

/// Seconds of response times that are remembered: a window, and the reach to both sides.
pub(super) const RESPONSE_SECONDS: usize = 16;

/// Of a slot's events, at least so many arrived, or the slot is unknown.
const MIN_SHARE: f64 = 0.5;

/// A part of the time, in slots since the first one: from the first to before the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) from: u64,
    pub(super) to: u64,
}

impl Span {
    pub(super) fn last(slots: u64, to: u64) -> Self {
        Self { from: to.saturating_sub(slots), to }
    }

    pub(super) fn len(self) -> u64 {
        self.to.saturating_sub(self.from)
    }
}

fn cell(slot: u64) -> usize {
    (slot % RING as u64) as usize
}

/// For which slots the numbers of each source are whole.
#[derive(Debug)]
pub(super) struct Coverage {
    /// The share of a slot's events that arrived, by source.
    shares: [Box<[f32; RING]>; Source::ALL.len()],
}

impl Coverage {
    pub(super) fn new() -> Self {
        Self { shares: std::array::from_fn(|_| Box::new([0.0; RING])) }
    }

    pub(super) fn set(&mut self, source: Source, slot: u64, share: f64) {
        let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
        self.shares[source as usize][cell(slot)] = share as f32;
    }

    pub(super) fn clear(&mut self, slot: u64) {
        self.shares.iter_mut().for_each(|s| s[cell(slot)] = 0.0);
    }

    /// The share of a slot's events; `None` if the slot is unknown.
    fn share(&self, source: Source, slot: u64) -> Option<f64> {
        let share = f64::from(self.shares[source as usize][cell(slot)]);
        (share >= MIN_SHARE).then_some(share)
    }

    /// The share of all events in a time that arrived.
    pub(super) fn whole(&self, source: Source, span: Span) -> f64 {
        let shares = (span.from..span.to).filter_map(|slot| self.share(source, slot));
        shares.sum::<f64>() / span.len().max(1) as f64
    }
}

/// The numbers of one workload, metric and subject. About 4.7 KiB.
#[derive(Debug)]
pub(super) struct Series {
    slots: Box<[f32; RING]>,
    bins: Box<[f32; BINS]>,
    /// The first slot that it knows.
    since: u64,
    /// A second's amount, decayed: who is lightest has to go.
    pub(super) weight: f64,
}

impl Series {
    pub(super) const BYTES: usize = size_of::<Self>() + 4 * (RING + BINS);

    /// Without any number before `since`, with these bins.
    pub(super) fn new(since: u64, bins: [f32; BINS]) -> Self {
        Self { slots: Box::new([0.0; RING]), bins: Box::new(bins), since, weight: 0.0 }
    }

    pub(super) fn put(&mut self, metric: Metric, slot: u64, amount: f64) {
        let value = &mut self.slots[cell(slot)];
        match metric.kind() {
            Kind::Sum => *value += amount as f32,
            Kind::Level => *value = amount as f32,
        }
    }

    pub(super) fn clear(&mut self, slot: u64) {
        self.slots[cell(slot)] = 0.0;
    }

    /// The amount of a slot, made up for what was lost of it; NaN if the slot is unknown.
    pub(super) fn at(&self, metric: Metric, slot: u64, coverage: &Coverage) -> f64 {
        match coverage.share(metric.source(), slot) {
            Some(share) if slot >= self.since => {
                let value = f64::from(self.slots[cell(slot)]);
                if metric.kind() == Kind::Sum { value / share } else { value }
            }
            _ => f64::NAN,
        }
    }

    /// The amount in a second, or the mean level; `None` if less than half of the time is known.
    pub(super) fn rate(&self, metric: Metric, span: Span, coverage: &Coverage) -> Option<f64> {
        let mut known = 0_u64;
        let mut sum = 0.0;
        for slot in span.from..span.to {
            let value = self.at(metric, slot, coverage);
            if value.is_finite() {
                known += 1;
                sum += value;
            }
        }
        if known == 0 || known * 2 < span.len() {
            return None;
        }
        let scale = if metric.kind() == Kind::Sum { SECOND as f64 } else { 1.0 };
        Some(sum / known as f64 * scale)
    }

    pub(super) fn set_bin(&mut self, bin: u64, rate: Option<f64>) {
        self.bins[(bin % BINS as u64) as usize] = rate.map_or(f32::NAN, |r| r as f32);
    }

    /// The amount in a second of a bin; NaN if unknown.
    pub(super) fn bin(&self, bin: u64) -> f64 {
        f64::from(self.bins[(bin % BINS as u64) as usize])
    }
}

/// Response times of the last seconds.
#[derive(Debug)]
pub(super) struct Responses {
    seconds: Vec<Times>,
    /// The median and the 99th percentile of the bins.
    quantiles: [Box<[f32; BINS]>; 2],
}

/// The quantiles that have a baseline.
pub(super) const QUANTILES: [f64; 2] = [0.5, 0.99];

impl Responses {
    pub(super) const BYTES: usize =
        RESPONSE_SECONDS * (size_of::<Times>() + 4 * super::histogram::BUCKETS) + 8 * BINS;

    pub(super) fn new() -> Self {
        Self {
            seconds: vec![Times::default(); RESPONSE_SECONDS],
            quantiles: std::array::from_fn(|_| Box::new([f32::NAN; BINS])),
        }
    }

    fn second(&mut self, slot: u64) -> &mut Times {
        &mut self.seconds[(slot / SECOND) as usize % RESPONSE_SECONDS]
    }

    pub(super) fn put(&mut self, slot: u64, times: &Times) {
        self.second(slot).merge(times);
    }

    pub(super) fn clear(&mut self, slot: u64) {
        self.second(slot).clear();
    }

    /// All of a time that is whole seconds.
    pub(super) fn times(&self, span: Span) -> Times {
        let mut times = Times::default();
        for second in span.from / SECOND..span.to / SECOND {
            times.merge(&self.seconds[second as usize % RESPONSE_SECONDS]);
        }
        times
    }

    pub(super) fn set_bin(&mut self, bin: u64, span: Span) {
        let times = self.times(span);
        for (bins, share) in self.quantiles.iter_mut().zip(QUANTILES) {
            let quantile = times.quantile(share).map_or(f32::NAN, |q| q as f32);
            bins[(bin % BINS as u64) as usize] = quantile;
        }
    }

    pub(super) fn bin(&self, quantile: usize, bin: u64) -> f64 {
        f64::from(self.quantiles[quantile][(bin % BINS as u64) as usize])
    }
}
