//! When a pod is not as usual: each symptom against its baseline.
//!
//! Four conditions have to hold at once, as each alone is fooled: many deviations (a noisy pod), a
//! multiple (a pod whose numbers never deviate), a least amount (a pod that answers in microseconds) and
//! enough requests. They have to hold for some seconds, and not even half of each may hold for
//! [`CLOSE_SECONDS`] until it is over.

use std::ops::Range;

use super::{
    baseline::{Baseline, Change},
    incident::SymptomKind,
    observe::{Metric, SECOND},
    workload::{MIN_VALUES, Per, View, Workload},
};

/// Slots that are compared with what is usual: as many as a bin has.
pub(super) const WINDOW: u64 = super::series::BIN;

/// Seconds that more work has to last before it is told.
pub(super) const BUSY_SECONDS: u8 = 4;

/// An incident ends when no symptom was there for so many seconds.
pub const CLOSE_SECONDS: u8 = 10;

/// What makes a symptom.
struct Rule {
    kind: SymptomKind,
    /// Robust deviations beyond the median.
    z: f64,
    /// Times the usual.
    ratio: f64,
    /// More than the usual, in the symptom's unit.
    extra: f64,
    /// Requests in the window.
    requests: f64,
    /// For so many seconds. A median has moved only if half of the window has; a mean, a percentile or a
    /// count can be one bad moment, which stays in the window for five seconds.
    seconds: u8,
}

const fn rule(
    kind: SymptomKind,
    z: f64,
    ratio: f64,
    extra: f64,
    requests: f64,
    seconds: u8,
) -> Rule {
    Rule { kind, z, ratio, extra, requests, seconds }
}

/// In the order in which they are told: what users feel first.
const RULES: [Rule; 10] = [
    rule(SymptomKind::ResponseP50, 6.0, 1.3, 300e3, 30.0, 4),
    rule(SymptomKind::ResponseP99, 7.0, 1.6, 2e6, 200.0, 8),
    rule(SymptomKind::ResponseMean, 7.0, 1.4, 500e3, 30.0, 8),
    rule(SymptomKind::Throughput, 3.5, 3.0, 5.0, 0.0, 8),
    rule(SymptomKind::CpuPerRequest, 7.0, 1.6, 300e3, 30.0, 6),
    rule(SymptomKind::MajorFaults, 7.0, 4.0, 20.0, 0.0, 6),
    rule(SymptomKind::MinorFaults, 7.0, 4.0, 100.0, 30.0, 6),
    rule(SymptomKind::Retransmits, 7.0, 4.0, 2.0, 0.0, 7),
    rule(SymptomKind::Accepts, 8.0, 5.0, 50.0, 0.0, 6),
    rule(SymptomKind::Connections, 8.0, 5.0, 50.0, 0.0, 6),
];

/// How many symptoms there are.
pub(super) const SYMPTOMS: usize = RULES.len();

/// How much of a symptom there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Heat {
    /// As usual.
    None,
    /// Enough for an incident to stay open.
    Warm,
    /// Enough to open one.
    Hot,
}

/// A symptom, as it is in a window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    pub(super) kind: SymptomKind,
    pub(super) change: Change,
    pub(super) heat: Heat,
    /// For how many seconds it has to be hot.
    pub(super) seconds: u8,
}

/// What a symptom is measured by.
enum Measure {
    Quantile(usize),
    Metric(Metric, Per),
}

fn measure(kind: SymptomKind) -> Measure {
    match kind {
        SymptomKind::ResponseP50 => Measure::Quantile(0),
        SymptomKind::ResponseP99 => Measure::Quantile(1),
        SymptomKind::ResponseMean => Measure::Metric(Metric::Response, Per::Request),
        SymptomKind::Throughput => Measure::Metric(Metric::Requests, Per::Second),
        SymptomKind::CpuPerRequest => Measure::Metric(Metric::Cpu, Per::Request),
        SymptomKind::MajorFaults => Measure::Metric(Metric::MajorFaults, Per::Second),
        SymptomKind::MinorFaults => Measure::Metric(Metric::MinorFaults, Per::Request),
        SymptomKind::Retransmits => Measure::Metric(Metric::Retransmits, Per::Second),
        SymptomKind::Accepts => Measure::Metric(Metric::Accepts, Per::Second),
        SymptomKind::Connections => Measure::Metric(Metric::Connections, Per::Second),
    }
}

/// The series that shows a symptom second by second: for quantiles, that of the mean.
pub(super) fn series_of(kind: SymptomKind) -> (Metric, Per) {
    match measure(kind) {
        Measure::Quantile(_) => (Metric::Response, Per::Request),
        Measure::Metric(metric, per) => (metric, per),
    }
}

/// What is usual of each symptom, computed once for each set of bins.
#[derive(Debug, Default)]
pub(super) struct Usual {
    bins: Range<u64>,
    of: [Option<Baseline>; SYMPTOMS],
    /// How many bins are known, and by how much the symptom was there in those in which it was.
    count: [usize; SYMPTOMS],
    before: [Vec<f64>; SYMPTOMS],
}

impl Usual {
    /// Follows the bins that a view rests on.
    pub(super) fn refresh(&mut self, workload: &Workload, until: u64) {
        let bins = workload.usual(until);
        if bins == self.bins {
            return;
        }
        for rule in &RULES {
            let index = rule.kind as usize;
            let (base, values) = match measure(rule.kind) {
                Measure::Quantile(index) => {
                    (workload.usual_quantile(index, until), workload.quantiles(index, until))
                }
                Measure::Metric(metric, per) => (
                    workload.baseline(metric, None, per, until),
                    workload.values(metric, None, per, until),
                ),
            };
            self.of[index] = base;
            self.count[index] = values.iter().filter(|v| v.is_finite()).count();
            let changes = values.iter().filter_map(|v| Some(rule.change(base?, *v)));
            let hot = changes.filter(|c| rule.holds(*c, 1.0));
            self.before[index] = hot.map(|c| c.extra().abs()).collect();
        }
        self.bins = bins;
    }
}

impl Rule {
    fn read(&self, view: &View<'_>, usual: &Usual, requests: f64) -> Option<Reading> {
        let base = usual.of[self.kind as usize].filter(|b| b.values >= MIN_VALUES)?;
        if requests < self.requests {
            return None;
        }
        let now = match measure(self.kind) {
            Measure::Quantile(index) => view.quantile(index)?,
            Measure::Metric(metric, per) => view.now(metric, None, per)?,
        };
        let change = self.change(base, now);
        let heat = if self.holds(change, 1.0) {
            Heat::Hot
        } else if self.holds(change, 0.5) {
            Heat::Warm
        } else {
            Heat::None
        };
        let seconds = self.lasting(usual, change);
        Some(Reading { kind: self.kind, change, heat, seconds })
    }

    fn change(&self, base: Baseline, now: f64) -> Change {
        let (metric, per) = series_of(self.kind);
        Change { base, now, sigma: base.sigma(metric.floor(per == Per::Request)) }
    }

    /// A change goes beyond this part of the rule.
    fn holds(&self, change: Change, part: f64) -> bool {
        let (z, ratio, extra) = match self.kind {
            // Of the throughput it is the fall that counts.
            SymptomKind::Throughput => {
                let ratio = change.base.median / change.now.max(1e-3);
                (-change.z(), ratio, -change.extra())
            }
            _ => (change.z(), change.ratio(), change.extra()),
        };
        z >= self.z * part && ratio >= 1.0 + (self.ratio - 1.0) * part && extra >= self.extra * part
    }

    /// For how long it has to last, given how often half as much was there all the same: so long that
    /// chance alone hardly ever makes it. A pod that stops for a moment every minute is known to.
    fn lasting(&self, usual: &Usual, change: Change) -> u8 {
        /// Logarithms of how rarely chance may: once in 10,000 bins for what was seen to happen, and once
        /// in 1,000 for what was not.
        const SEEN: f64 = -9.21;
        const UNSEEN: f64 = -6.91;
        let index = self.kind as usize;
        let count = usual.count[index] as f64;
        let half = change.extra().abs() / 2.0;
        let times = usual.before[index].iter().filter(|extra| **extra >= half).count() as f64;
        // No single moment moves a median.
        let median = self.kind == SymptomKind::ResponseP50;
        let (often, chance) = match times {
            0.0 if median || count == 0.0 => return self.seconds,
            0.0 => (0.5 / count, UNSEEN),
            _ => (times / count, SEEN),
        };
        let bins = (chance / f64::min(often, 0.6).ln()).ceil();
        self.seconds.max(bins as u8 * (super::series::BIN / SECOND) as u8)
    }
}

/// All symptoms of a pod that can be measured in a window.
pub(super) fn read(view: &View<'_>, usual: &Usual) -> Vec<Reading> {
    let requests = view.requests();
    RULES.iter().filter_map(|rule| rule.read(view, usual, requests)).collect()
}

/// For how long each symptom was there.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Streaks([u8; SYMPTOMS]);

impl Streaks {
    /// Takes the readings of another second. Returns those that were hot for long enough.
    pub(super) fn follow<'a>(&mut self, readings: &'a [Reading]) -> Vec<&'a Reading> {
        for rule in &RULES {
            let reading = readings.iter().find(|r| r.kind == rule.kind);
            let streak = &mut self.0[rule.kind as usize];
            *streak = match reading {
                Some(Reading { heat: Heat::Hot, .. }) => streak.saturating_add(1),
                // What cannot be measured for a moment has not gone away, but does not count.
                None => *streak,
                Some(_) => 0,
            };
        }
        let long = |r: &&Reading| self.0[r.kind as usize] >= r.seconds;
        readings.iter().filter(|r| r.heat == Heat::Hot).filter(long).collect()
    }

    /// Forgets.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// How much more work there has to be.
#[derive(Clone, Copy, Debug)]
pub(super) enum Load {
    /// Enough to tell of it.
    Told,
    /// Enough for it to be still told of.
    Lasting,
    /// Enough that others wait longer.
    Felt,
}

/// More requests than usual, and to be told of, at the usual cost of CPU time for each. Where the load is
/// only felt, the cost is another matter: it pays for itself.
pub(super) fn more_work(view: &View<'_>, load: Load) -> Option<Change> {
    let (z, ratio) = match load {
        Load::Told => (4.0, 1.5),
        Load::Lasting => (2.5, 1.25),
        Load::Felt => (2.5, 1.2),
    };
    let requests = view.change(Metric::Requests, None, Per::Second)?;
    let cost = view.change(Metric::Cpu, None, Per::Request);
    let told = !matches!(load, Load::Felt);
    let dearer = told && cost.is_some_and(|c| c.ratio() >= 1.3 && c.z() >= 3.0);
    let more = requests.is_lifted(z, ratio)
        && requests.extra() >= 3.0
        && requests.base.values >= MIN_VALUES;
    (more && !dearer).then_some(requests)
}

/// Whether more work is enough of a reason to wait so much longer. Queues grow faster than the load, but
/// not without end: with the fourth power they do so only close to saturation.
pub(super) fn explains(load: Option<Change>, wait: Change) -> bool {
    load.is_some_and(|load| wait.ratio() <= load.ratio().powi(4))
}

/// When a symptom began: the first second of those before `now` in which its number was more than half
/// of the way up. `at` measures one second that ends at a slot.
pub(super) fn onset(now: u64, usual: f64, worst: f64, at: impl Fn(u64) -> Option<f64>) -> u64 {
    /// How far it is looked for.
    const SECONDS: u64 = 20;
    /// Seconds that belong to it anyway.
    const SURE: u64 = 3;
    /// Seconds that may be less, or unknown.
    const GAP: u64 = 2;
    let half = f64::midpoint(usual, worst);
    let up = |value: f64| if worst >= usual { value >= half } else { value <= half };
    let mut found = now.saturating_sub(SURE * SECOND);
    let mut gap = 0;
    for second in 0..SECONDS {
        let end = now.saturating_sub(second * SECOND);
        if at(end).is_some_and(up) {
            found = found.min(end.saturating_sub(SECOND));
            gap = 0;
        } else if second >= SURE {
            gap += 1;
            if gap > GAP {
                break;
            }
        }
    }
    found
}
