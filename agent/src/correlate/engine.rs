//! The correlator: takes observations, keeps series, and tells of incidents. One owner, no clock.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    detect::{self, CLOSE_SECONDS, Heat, OPEN_SECONDS, Reading, Streaks, Usual, WINDOW},
    incident::{End, Event, Incident, MoreWork, Symptom, SymptomKind, Verdict},
    observe::{Metric, Name, Observation, SECOND, Slot, Source, Value},
    persist::Baselines,
    rank::{self, Ranking},
    scene::Scene,
    series::{BIN, Coverage, MAX_SPAN, REACH, RING, Series, Span},
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

/// An incident that lasts longer is what is usual from then on: an hour.
const NEW_USUAL: u64 = 3600 * SECOND;

/// An incident whose symptoms cannot be measured for so many seconds ends.
const LOST_SIGHT_SECONDS: u16 = 60;

/// Causes are looked for in the first minute of an incident: what else goes wrong later would be
/// charged to it, and the slots before it are forgotten.
const JUDGE: u64 = 60 * SECOND;

/// An update is told at least so often, and whenever the answer is another.
const UPDATE: u64 = 10 * SECOND;

/// An incident, and what is needed to follow it.
#[derive(Debug)]
struct Open {
    incident: Incident,
    onset: u64,
    /// Bins up to here are what is usual.
    until: u64,
    /// Seconds without any symptom, and without any reading.
    quiet: u8,
    unseen: u16,
    told: u64,
}

/// A workload, and what is the matter with it.
#[derive(Debug)]
pub(super) struct Pod {
    pub(super) workload: Workload,
    usual: Usual,
    streaks: Streaks,
    open: Option<Open>,
    /// Seconds with more work; those without, once that was told.
    busy: u8,
    told_busy: Option<u8>,
    /// Bins count again from here on.
    settled: u64,
}

impl Pod {
    pub(super) fn has_incident(&self) -> bool {
        self.open.is_some()
    }

    pub(super) fn incident(&self) -> Option<&Incident> {
        self.open.as_ref().map(|o| &o.incident)
    }
}

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
                let quiet = self.pods.iter().filter(|(_, p)| {
                    p.open.is_none() && p.workload.seen + SILENT < self.now
                });
                let longest = quiet.min_by_key(|(_, p)| p.workload.seen);
                let longest = longest.map(|(n, _)| Arc::clone(n))?;
                self.remove(&longest);
            }
            let remembered = self.remembered.workloads.get(name).cloned().unwrap_or_default();
            let pod = Pod {
                workload: Workload::new(slot, remembered),
                usual: Usual::default(),
                streaks: Streaks::default(),
                open: None,
                busy: 0,
                told_busy: None,
                settled: 0,
            };
            self.pods.insert(Arc::clone(name), pod);
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
            let lasting: Vec<Reading> = pod.streaks.follow(&readings).into_iter().copied().collect();
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
                    let ratio = if pod.told_busy.is_some() { 1.25 } else { 1.5 };
                    let more = detect::more_work(&view, ratio);
                    Some(Step::Busy(more.map(|c| (c.base.median, c.now))))
                }
            };
        };
        let first = lasting.first().or_else(|| readings.iter().find(|r| r.heat > Heat::None));
        // Another symptom is told instead if it is one that is felt more.
        let kind = first.map_or(open.incident.symptom.kind, |r| r.kind).min(open.incident.symptom.kind);
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
            return Some(Ok(Open { incident, onset, until, quiet: 0, unseen: 0, told: self.now }));
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
            SymptomKind::Throughput | SymptomKind::MajorFaults | SymptomKind::Retransmits => Per::Second,
            _ => Per::Request,
        };
        let (pods, node, coverage) = (&self.pods, &self.node, &self.coverage);
        Scene { pods, node, coverage, name, view, onset, per }
    }

    fn apply(&mut self, name: &Name, step: Step, events: &mut Vec<Event>) {
        let (now, first) = (self.now, self.first.unwrap_or(0));
        let Some(pod) = self.pods.get_mut(name) else { return };
        match (step, &mut pod.open) {
            (Step::Open(open), none) => {
                pod.workload.forget(open.until);
                (pod.busy, pod.told_busy) = (0, None);
                events.push(Event::Opened(open.incident.clone()));
                *none = Some(*open);
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

impl Pod {
    /// Follows how much there is to do; tells once that it is more than usual.
    fn work(&mut self, more: Option<(f64, f64)>, start: Slot, name: &Name) -> Option<MoreWork> {
        match (more, &mut self.told_busy) {
            (Some(_), Some(calm)) => *calm = 0,
            (None, Some(calm)) => {
                *calm += 1;
                if *calm >= CLOSE_SECONDS {
                    (self.busy, self.told_busy) = (0, None);
                }
            }
            (None, None) => self.busy = 0,
            (Some((usual, now)), None) => {
                self.busy += 1;
                if self.busy >= OPEN_SECONDS {
                    self.told_busy = Some(0);
                    return Some(MoreWork { workload: Arc::clone(name), start, usual, now });
                }
            }
        }
        None
    }

    /// Its incident is over.
    fn close(&mut self, now: u64) {
        self.open = None;
        self.streaks.clear();
        self.settled = now;
    }
}

impl Open {
    /// Takes another second of the incident.
    fn follow(
        &mut self,
        readings: &[Reading],
        ranking: Option<(Symptom, Ranking)>,
        now: u64,
        first: u64,
        events: &mut Vec<Event>,
    ) {
        let warm = readings.iter().any(|r| r.heat > Heat::None);
        if readings.is_empty() {
            self.unseen += 1;
        } else if warm {
            (self.quiet, self.unseen) = (0, 0);
            self.incident.last_seen = Slot(first + now);
        } else {
            (self.quiet, self.unseen) = (self.quiet + 1, 0);
        }
        let incident = &mut self.incident;
        for reading in readings.iter().filter(|r| r.heat == Heat::Hot) {
            if reading.kind != incident.symptom.kind && !incident.also.contains(&reading.kind) {
                incident.also.push(reading.kind);
            }
        }
        let before = answer(incident);
        if let Some((symptom, ranking)) = ranking {
            self.judge(symptom, ranking);
        } else if let Some(r) = readings.iter().find(|r| r.kind == self.incident.symptom.kind) {
            let symptom = &mut self.incident.symptom;
            symptom.now = r.change.now;
            symptom.worst = worse(symptom.kind, symptom.worst, r.change.now);
        }
        let incident = &mut self.incident;
        let end = if self.quiet >= CLOSE_SECONDS {
            Some(End::Over)
        } else if self.unseen >= LOST_SIGHT_SECONDS {
            Some(End::Unknown)
        } else if now >= self.onset + NEW_USUAL {
            Some(End::NewUsual)
        } else {
            None
        };
        if let Some(end) = end {
            incident.end = Some((Slot(first + now), end));
            events.push(Event::Closed(incident.clone()));
        } else if warm && (answer(incident) != before || now >= self.told + UPDATE) {
            self.told = now;
            events.push(Event::Updated(incident.clone()));
        }
    }

    /// Takes another judgement.
    fn judge(&mut self, symptom: Symptom, ranking: Ranking) {
        let incident = &mut self.incident;
        let worst = if incident.symptom.kind == symptom.kind {
            worse(symptom.kind, incident.symptom.worst, symptom.now)
        } else {
            incident.also.retain(|k| *k != symptom.kind);
            incident.also.push(incident.symptom.kind);
            symptom.now
        };
        incident.symptom = Symptom { worst, ..symptom };
        incident.lost = ranking.lost;
        // An answer is not taken back because there is less data now.
        if ranking.verdict == Verdict::Cause || incident.verdict != Verdict::Cause {
            incident.verdict = ranking.verdict;
            incident.causes = ranking.causes;
        }
    }
}

/// What makes an update worth telling at once.
fn answer(incident: &Incident) -> impl PartialEq + use<> {
    let first = incident.causes.first().map(|c| (c.kind, c.subject.clone(), c.root.clone()));
    (incident.symptom.kind, incident.verdict, first)
}

fn symptom(reading: &Reading) -> Symptom {
    let now = reading.change.now;
    Symptom { kind: reading.kind, usual: reading.change.base.median, now, worst: now }
}

fn worse(kind: SymptomKind, a: f64, b: f64) -> f64 {
    if kind == SymptomKind::Throughput { a.min(b) } else { a.max(b) }
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

/// FNV-1a over the name and the slot it began in.
fn id(name: &str, start: u64) -> u64 {
    let bytes = name.bytes().chain(start.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

const _: () = assert!(RING as u64 > JUDGE + 15 * SECOND + 2 * REACH + MAX_SPAN as u64);
const _: () = assert!(Series::BYTES * MAX_SERIES < 32 << 20);
