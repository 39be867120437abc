//! A workload over time: whether it has more work, and its incident from the first second to the last.

use std::sync::Arc;

use super::{
    detect::{BUSY_SECONDS, CLOSE_SECONDS, Heat, Reading, Streaks, Usual},
    incident::{End, Event, Incident, MoreWork, Symptom, SymptomKind, Verdict},
    observe::{Name, SECOND, Slot},
    persist::Remembered,
    rank::Ranking,
    workload::Workload,
};

/// An incident that lasts longer is what is usual from then on: an hour.
const NEW_USUAL: u64 = 3600 * SECOND;

/// An incident whose symptoms cannot be measured for so many seconds ends.
const LOST_SIGHT_SECONDS: u16 = 60;

/// An update is told at least so often, and whenever the answer is another.
const UPDATE: u64 = 10 * SECOND;

/// An incident, and what is needed to follow it.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) incident: Incident,
    pub(super) onset: u64,
    /// Bins up to here are what is usual.
    pub(super) until: u64,
    /// Seconds without any symptom, and without any reading.
    quiet: u8,
    unseen: u16,
    told: u64,
}

/// A workload, and what is the matter with it.
#[derive(Debug)]
pub(super) struct Pod {
    pub(super) workload: Workload,
    pub(super) usual: Usual,
    pub(super) streaks: Streaks,
    pub(super) open: Option<Open>,
    /// Seconds with more work; those without, once that was told.
    busy: u8,
    told_busy: Option<u8>,
    /// Bins count again from here on.
    pub(super) settled: u64,
}

impl Pod {
    pub(super) fn new(since: u64, remembered: Remembered) -> Self {
        Self {
            workload: Workload::new(since, remembered),
            usual: Usual::default(),
            streaks: Streaks::default(),
            open: None,
            busy: 0,
            told_busy: None,
            settled: 0,
        }
    }

    pub(super) fn has_incident(&self) -> bool {
        self.open.is_some()
    }

    pub(super) fn incident(&self) -> Option<&Incident> {
        self.open.as_ref().map(|o| &o.incident)
    }
}

impl Pod {
    /// Follows how much there is to do; tells once that it is more than usual.
    pub(super) fn work(
        &mut self,
        more: Option<(f64, f64)>,
        start: Slot,
        name: &Name,
    ) -> Option<MoreWork> {
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
                if self.busy >= BUSY_SECONDS {
                    self.told_busy = Some(0);
                    return Some(MoreWork { workload: Arc::clone(name), start, usual, now });
                }
            }
        }
        None
    }

    /// Its incident begins.
    pub(super) fn open(&mut self, open: Open) {
        self.workload.forget(open.until);
        (self.busy, self.told_busy) = (0, None);
        self.open = Some(open);
    }

    /// It was told that it has more work, and that is not over.
    pub(super) fn is_busy(&self) -> bool {
        self.told_busy.is_some()
    }

    /// Its incident is over.
    pub(super) fn close(&mut self, now: u64) {
        let end = self.open.take().and_then(|open| open.incident.end);
        if let Some((_, End::NewUsual)) = end {
            self.workload.unlearn();
        }
        self.streaks.clear();
        self.settled = now;
    }
}

impl Open {
    pub(super) fn new(incident: Incident, onset: u64, until: u64, now: u64) -> Self {
        Self { incident, onset, until, quiet: 0, unseen: 0, told: now }
    }

    /// Takes another second of the incident.
    pub(super) fn follow(
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

pub(super) fn symptom(reading: &Reading) -> Symptom {
    let now = reading.change.now;
    Symptom { kind: reading.kind, usual: reading.change.base.median, now, worst: now }
}

fn worse(kind: SymptomKind, a: f64, b: f64) -> f64 {
    if kind == SymptomKind::Throughput { a.min(b) } else { a.max(b) }
}

/// FNV-1a over the name and the slot it began in.
pub(super) fn id(name: &str, start: u64) -> u64 {
    let bytes = name.bytes().chain(start.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}
