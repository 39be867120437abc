//! The correlator: takes observations, keeps series, and tells of incidents. One owner, no clock.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    detect::{self, Heat, Load, Reading, WINDOW},
    incident::{End, Event, Incident, Symptom, SymptomKind},
    observe::{Metric, Name, Observation, SECOND, Slot, Source, Value},
    persist::Baselines,
    rank::{self, Ranking},
    scene::Scene,
    series::{BIN, Coverage, MAX_SPAN, REACH, RING, Series, Span},
    track::{Open, Pod, id, symptom},
    workload::{Per, QUARANTINE, View, Workload},
};

/// Workloads that are watched. Each costs about 4 KiB and, if it answers requests, 16 KiB more.
pub const MAX_WORKLOADS: usize = 256;

/// Series of all workloads. Each costs 4.7 KiB: 29 MiB in all.
pub const MAX_SERIES: usize = 6144;

/// A workload of which nothing is heard is forgotten after this: 10 min.
const FORGET: u64 = 600 * SECOND;

/// One that is silent for so long may be forgotten for a new one: a minute.
const SILENT: u64 = 60 * SECOND;

/// Causes are looked for in the first minute of an incident: what else goes wrong later would be
/// charged to it, and the slots before it are forgotten.
const JUDGE: u64 = 60 * SECOND;

/// What was not taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    /// Observations of slots that are too far from now, or of too many slots at once.
    pub out_of_reach: u64,
    /// Observations whose number is not finite, or negative, or of the wrong shape for the metric.
    pub not_a_number: u64,
    /// Observations of workloads beyond [`MAX_WORKLOADS`].
    pub workloads: u64,
    /// Observations whose series would be beyond [`MAX_SERIES`], or whose subject beyond the bound of
    /// its metric: these are in the total only.
    pub folded: u64,
}

/// The correlator. See the module.
#[derive(Debug)]
pub struct Correlator {
    pods: BTreeMap<Name, Pod>,
    node: Workload,
    coverage: Coverage,
    remembered: Baselines,
    /// The slot that counts as 0.
    first: Option<u64>,
    /// Every slot before this one is complete.
    now: u64,
    series: usize,
    refused: Refused,
}

/// What a second means for a pod.
enum Step {
    /// It opens an incident.
    Open(Box<Open>),
    /// Its incident goes on.
    Follow { readings: Vec<Reading>, ranking: Option<(Symptom, Ranking)> },
    /// It has more work than usual, or not.
    Busy(Option<(f64, f64)>),
}

impl Correlator {
    /// Knows of nothing but these baselines.
    #[must_use]
    pub fn new(remembered: Baselines) -> Self {
        Self {
            pods: BTreeMap::new(),
            node: Workload::new(0, Default::default()),
            coverage: Coverage::new(),
            remembered,
            first: None,
            now: 0,
            series: 0,
            refused: Refused::default(),
        }
    }

    /// What was not taken so far.
    #[must_use]
    pub fn refused(&self) -> Refused {
        Refused { folded: self.refused.folded + self.node.folded, ..self.refused }
    }

    /// Estimated memory, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let coverage = Source::ALL.len() * RING * 4;
        let pods = self.pods.values().map(|p| p.workload.bytes() + size_of::<Pod>());
        pods.sum::<usize>() + self.node.bytes() + coverage + size_of::<Self>()
    }

    /// Incidents that are open.
    pub fn open(&self) -> impl Iterator<Item = &Incident> {
        self.pods.values().filter_map(Pod::incident)
    }

    /// What is usual now, to be kept for the next run.
    #[must_use]
    pub fn baselines(&self, taken_unix_s: u64) -> Baselines {
        let quiet = self.now.saturating_sub(QUARANTINE);
        let until = |p: &Pod| p.open.as_ref().map_or(quiet, |o| o.until);
        let mut workloads: BTreeMap<_, _> =
            self.pods.iter().map(|(n, p)| (Arc::clone(n), p.workload.remember(until(p)))).collect();
        workloads.retain(|_, r| !r.entries.is_empty());
        Baselines { taken_unix_s, workloads }
    }

    /// A slot since the first one, if it is within reach.
    fn reach(&mut self, slot: u64) -> Option<u64> {
        let first = *self.first.get_or_insert(slot);
        let slot = slot.checked_sub(first)?;
        let near = slot + REACH >= self.now && slot < self.now + REACH;
        near.then_some(slot)
    }

    /// Says that the numbers of a source are whole in the slots from `from` to before `to`, or how much
    /// of them arrived, from 0 to 1. Slots of which it is never said are unknown. At most
    /// [`MAX_SPAN`] slots.
    pub fn cover(&mut self, source: Source, from: Slot, to: Slot, share: f64) {
        for slot in from.0..to.0.min(from.0.saturating_add(u64::from(MAX_SPAN))) {
            if let Some(slot) = self.reach(slot) {
                self.coverage.set(source, slot, share);
            }
        }
    }

    /// Takes a number. What cannot be taken is counted, see [`Correlator::refused`].
    pub fn observe(&mut self, observation: &Observation) {
        let Observation { slot, slots, workload, metric, subject, value } = observation;
        let fits = (1..=MAX_SPAN).contains(slots);
        let Some(last) = self.reach(slot.0).filter(|_| fits) else {
            self.refused.out_of_reach += 1;
            return;
        };
        let to = last + 1;
        let oldest = self.now.saturating_sub(REACH + u64::from(MAX_SPAN));
        let span = Span { from: to.saturating_sub(u64::from(*slots)).max(oldest), to };
        let second = match metric {
            Metric::Response => Some(Metric::Requests),
            Metric::Downstream => Some(Metric::Calls),
            _ => None,
        };
        let (amount, count) = match value {
            Value::Amount(amount) if second.is_none() => (*amount, 0),
            Value::Times(times) if second.is_some() => (times.sum_ns as f64, times.count),
            _ => (f64::NAN, 0),
        };
        if !(amount.is_finite() && amount.abs() <= f64::from(f32::MAX) && amount >= 0.0) {
            self.refused.not_a_number += 1;
            return;
        }
        let Some(of) = self.workload(workload.as_ref(), last) else {
            self.refused.workloads += 1;
            return;
        };
        // Borrowed by field: `of` is one of them.
        let (of, series) = match of {
            None => (&mut self.node, &mut self.series),
            Some(name) => match self.pods.get_mut(&name) {
                Some(pod) => (&mut pod.workload, &mut self.series),
                None => return,
            },
        };
        let folded = of.folded;
        let mut put = |metric, amount| {
            let room = MAX_SERIES.saturating_sub(*series);
            *series += of.put(metric, subject.as_ref(), span, amount, room);
        };
        put(*metric, amount);
        if let Some(second) = second {
            put(second, count as f64);
        }
        if let (Metric::Response, Value::Times(times)) = (metric, value) {
            of.respond(last, times);
        }
        self.refused.folded += if workload.is_some() { of.folded - folded } else { 0 };
    }

    /// Finds or makes a workload; `Some(None)` is the node, `None` that there is no room.
    fn workload(&mut self, name: Option<&Name>, slot: u64) -> Option<Option<Name>> {
        let Some(name) = name else { return Some(None) };
        if !self.pods.contains_key(name) {
            if self.pods.len() >= MAX_WORKLOADS {
                let quiet = self
                    .pods
                    .iter()
                    .filter(|(_, p)| p.open.is_none() && p.workload.seen + SILENT < self.now);
                let longest = quiet.min_by_key(|(_, p)| p.workload.seen);
                let longest = longest.map(|(n, _)| Arc::clone(n))?;
                self.remove(&longest);
            }
            let remembered = self.remembered.workloads.get(name).cloned().unwrap_or_default();
            self.pods.insert(Arc::clone(name), Pod::new(slot, remembered));
        }
        Some(Some(Arc::clone(name)))
    }

    fn remove(&mut self, name: &Name) {
        if let Some(pod) = self.pods.remove(name) {
            self.series -= pod.workload.series();
        }
    }

    /// Says that every slot before `slot` is complete: all that will be known of it was told. Judges each
    /// second that this completes.
    pub fn tick(&mut self, slot: Slot) -> Vec<Event> {
        let first = *self.first.get_or_insert(slot.0);
        let target = slot.0.saturating_sub(first);
        let target = target - target % SECOND;
        let mut events = Vec::new();
        if target > self.now + RING as u64 {
            // So long a time without any word is unknown, and need not be gone through.
            for pod in self.pods.values_mut() {
                pod.workload.blank();
                pod.streaks.clear();
                pod.settled = target;
            }
            self.node.blank();
            (0..RING as u64).for_each(|slot| self.coverage.clear(slot));
            self.now = target;
        }
        while self.now < target {
            self.now += SECOND;
            self.second(&mut events);
        }
        events
    }

    /// Judges the second that ends now.
    fn second(&mut self, events: &mut Vec<Event>) {
        let now = self.now;
        if now.is_multiple_of(BIN) {
            let span = Span::last(BIN, now);
            self.node.push(span, &self.coverage);
            let quiet = self.pods.values_mut().filter(|p| p.open.is_none());
            for pod in quiet.filter(|p| p.settled <= span.from) {
                pod.workload.push(span, &self.coverage);
            }
        }
        // All are judged before any changes, so that no pod comes first.
        let mut steps = Vec::new();
        for (name, pod) in &mut self.pods {
            let view = View::last(&pod.workload, &self.coverage, WINDOW, now);
            let until = pod.open.as_ref().map_or(view.until, |o| o.until);
            pod.usual.refresh(&pod.workload, until);
            let readings = detect::read(&View { until, ..view }, &pod.usual);
            let lasting: Vec<Reading> =
                pod.streaks.follow(&readings).into_iter().copied().collect();
            steps.push((Arc::clone(name), readings, lasting));
        }
        let steps: Vec<(Name, Step)> = steps
            .into_iter()
            .filter_map(|(name, readings, lasting)| {
                let step = self.judge(&name, readings, &lasting)?;
                Some((name, step))
            })
            .collect();
        for (name, step) in steps {
            self.apply(&name, step, events);
        }
        self.forget(events);
        let ahead = Span { from: now + REACH, to: now + REACH + SECOND };
        for workload in self.pods.values_mut().map(|p| &mut p.workload).chain([&mut self.node]) {
            workload.clear(ahead);
        }
        (ahead.from..ahead.to).for_each(|slot| self.coverage.clear(slot));
    }

    fn judge(&self, name: &Name, readings: Vec<Reading>, lasting: &[Reading]) -> Option<Step> {
        let pod = self.pods.get(name)?;
        let Some(open) = &pod.open else {
            return match self.opened(name, pod, &readings, lasting) {
                Some(Ok(open)) => Some(Step::Open(Box::new(open))),
                Some(Err(load)) => Some(Step::Busy(Some(load))),
                None => {
                    let view = View::last(&pod.workload, &self.coverage, WINDOW, self.now);
                    let load = if pod.is_busy() { Load::Lasting } else { Load::Told };
                    let more = detect::more_work(&view, load);
                    Some(Step::Busy(more.map(|c| (c.base.median, c.now))))
                }
            };
        };
        // Another symptom is told instead if it is one that is felt more, and as sure.
        let kind = open.incident.symptom.kind;
        let kind = lasting.iter().map(|r| r.kind).fold(kind, SymptomKind::min);
        let judged = self.now <= open.onset + JUDGE;
        let reading = readings.iter().find(|r| r.kind == kind && r.heat > Heat::None);
        let ranking = reading.filter(|_| judged).map(|r| {
            let symptom = symptom(r);
            let scene = self.scene(name, pod, open.onset, open.until, kind);
            (symptom, rank::rank(&scene, kind, extra(&scene, r)))
        });
        Some(Step::Follow { readings, ranking })
    }

    /// A pod that had no incident has one: or else more work than usual.
    fn opened(
        &self,
        name: &Name,
        pod: &Pod,
        readings: &[Reading],
        lasting: &[Reading],
    ) -> Option<Result<Open, (f64, f64)>> {
        let mut load = None;
        for reading in lasting {
            let kind = reading.kind;
            let onset = self.onset(pod, reading);
            let until = onset.min(self.now.saturating_sub(BIN));
            let scene = self.scene(name, pod, onset, until, kind);
            if kind == SymptomKind::Throughput && !rank::is_blocked(&scene) {
                continue;
            }
            let ranking = rank::rank(&scene, kind, extra(&scene, reading));
            if let Some(more) = rank::is_only_load(&scene, &ranking) {
                load = Some(more);
                continue;
            }
            let hot = readings.iter().filter(|r| r.heat == Heat::Hot && r.kind != kind);
            let first = self.first.unwrap_or(0);
            let incident = Incident {
                id: id(name, first + onset),
                workload: Arc::clone(name),
                start: Slot(first + onset),
                detected: Slot(first + self.now),
                last_seen: Slot(first + self.now),
                end: None,
                symptom: symptom(reading),
                also: hot.map(|r| r.kind).collect(),
                verdict: ranking.verdict,
                causes: ranking.causes,
                lost: ranking.lost,
            };
            return Some(Ok(Open::new(incident, onset, until, self.now)));
        }
        load.map(Err)
    }

    fn onset(&self, pod: &Pod, reading: &Reading) -> u64 {
        let (metric, per) = detect::series_of(reading.kind);
        let last = |slots, now| View::last(&pod.workload, &self.coverage, slots, now);
        let usual = last(WINDOW, self.now).change(metric, None, per);
        let Some(usual) = usual else { return self.now.saturating_sub(WINDOW) };
        detect::onset(self.now, usual.base.median, usual.now, |end| {
            last(SECOND, end).now(metric, None, per)
        })
    }

    fn scene<'a>(
        &'a self,
        name: &'a Name,
        pod: &'a Pod,
        onset: u64,
        until: u64,
        kind: SymptomKind,
    ) -> Scene<'a> {
        let inside = Span { from: onset.max(self.now.saturating_sub(JUDGE)), to: self.now };
        let view = View { workload: &pod.workload, coverage: &self.coverage, inside, until };
        let per = match kind {
            SymptomKind::Throughput
            | SymptomKind::MajorFaults
            | SymptomKind::Retransmits
            | SymptomKind::Accepts
            | SymptomKind::Connections => Per::Second,
            _ => Per::Request,
        };
        let (pods, node, coverage) = (&self.pods, &self.node, &self.coverage);
        Scene { pods, node, coverage, name, view, onset, per }
    }

    fn apply(&mut self, name: &Name, step: Step, events: &mut Vec<Event>) {
        let (now, first) = (self.now, self.first.unwrap_or(0));
        let Some(pod) = self.pods.get_mut(name) else { return };
        match (step, &mut pod.open) {
            (Step::Open(open), _) => {
                events.push(Event::Opened(open.incident.clone()));
                pod.open(*open);
            }
            (Step::Busy(more), _) => {
                let start = Slot(first + now.saturating_sub(WINDOW));
                if let Some(work) = pod.work(more, start, name) {
                    events.push(Event::MoreWork(work));
                }
            }
            (Step::Follow { readings, ranking }, Some(open)) => {
                open.follow(&readings, ranking, now, first, events);
                if open.incident.end.is_some() {
                    pod.close(now);
                }
            }
            (Step::Follow { .. }, None) => {}
        }
    }

    /// Forgets workloads that are no more.
    fn forget(&mut self, events: &mut Vec<Event>) {
        let (now, first) = (self.now, self.first.unwrap_or(0));
        let gone = self.pods.iter().filter(|(_, p)| p.workload.seen + FORGET < now);
        let gone: Vec<Name> = gone.map(|(n, _)| Arc::clone(n)).collect();
        for name in gone {
            if let Some(open) = self.pods.get_mut(&name).and_then(|p| p.open.take()) {
                let end = Some((Slot(first + now), End::Unknown));
                events.push(Event::Closed(Incident { end, ..open.incident }));
            }
            self.remove(&name);
        }
    }
}

/// How much more than usual the symptom is, in the unit that doses are counted in: for response times,
/// nanoseconds of the mean request.
fn extra(scene: &Scene<'_>, reading: &Reading) -> f64 {
    let mean = || scene.change(Metric::Response, None).map_or(0.0, |c| c.extra());
    match reading.kind {
        SymptomKind::ResponseP50 => mean().max(0.5 * reading.change.extra()),
        // One of a hundred requests is so much slower, or slower still.
        SymptomKind::ResponseP99 => mean().max(0.01 * reading.change.extra()),
        SymptomKind::ResponseMean => mean(),
        SymptomKind::Throughput => {
            let payers = super::payers::payers(scene);
            payers.iter().map(super::payers::Payer::extra).fold(0.0, f64::max)
        }
        kind => {
            let (metric, per) = detect::series_of(kind);
            scene.view.change(metric, None, per).map_or(reading.change.extra(), |c| c.extra())
        }
    }
}

const _: () = assert!(RING as u64 > JUDGE + 15 * SECOND + 2 * REACH + MAX_SPAN as u64);
const _: () = assert!(Series::BYTES * MAX_SERIES < 32 << 20);
