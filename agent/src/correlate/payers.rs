//! Who pays for the symptom: the extra time of a request, item by item.
//!
//! A request is slower by E nanoseconds. Each thing that takes time (running, waiting for a CPU, for a
//! peer, for a lock, for a file, asleep) is counted for each request, inside of the incident and before.
//! The difference is what it pays. A cause that cannot pay is none, however much it correlates; and as
//! all are in one unit, they can be compared.

use super::{
    baseline::Change,
    observe::{Metric, Subject},
    scene::Scene,
};

/// A payer must be beyond its usual by so many deviations. Few, as the symptom is sure, and as it has to
/// pay: samples of CPU time deviate much.
const MIN_Z: f64 = 2.0;

/// Something that takes more time than usual.
#[derive(Clone, Debug)]
pub(super) struct Payer {
    pub(super) metric: Metric,
    /// The peer; for all else the payer is the whole.
    pub(super) subject: Option<Subject>,
    pub(super) change: Change,
}

impl Payer {
    /// What it pays, in nanoseconds a request (or a second, where there are no requests).
    pub(super) fn extra(&self) -> f64 {
        self.change.extra()
    }
}

/// Everything that pays, most first.
pub(super) fn payers(scene: &Scene<'_>) -> Vec<Payer> {
    const WHOLES: [Metric; 5] =
        [Metric::Cpu, Metric::RunQueue, Metric::LockWait, Metric::FileWait, Metric::Sleep];
    let whole = |metric| {
        let change = scene.change(metric, None)?;
        Some(Payer { metric, subject: None, change })
    };
    let peer = |subject: &Subject| {
        let change = scene.change(Metric::Downstream, Some(&subject.name))?;
        Some(Payer { metric: Metric::Downstream, subject: Some(subject.clone()), change })
    };
    let mut payers: Vec<Payer> = WHOLES.into_iter().filter_map(whole).collect();
    // Where waits for a CPU are not measured, the cgroup's own account of throttling is.
    if !payers.iter().any(|p| p.metric == Metric::RunQueue) {
        payers.extend(whole(Metric::Throttled));
    }
    payers.extend(scene.view.workload.subjects(Metric::Downstream).filter_map(peer));
    payers.retain(|p| p.extra() > 0.0 && p.change.z() >= MIN_Z);
    payers.sort_by(|a, b| b.extra().total_cmp(&a.extra()));
    payers
}
