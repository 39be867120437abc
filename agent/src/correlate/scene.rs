//! The node at an incident: the pod that has it, and everything beside it.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    baseline::Change,
    detect::WINDOW,
    incident::Evidence,
    lead::{Lead, lead},
    observe::{Kind, Metric, Name, SECOND, Subject},
    series::{Coverage, Span},
    track::Pod,
    workload::{Per, View, Workload},
};

/// Lead and lag are looked for up to this many slots: 3 s.
const MAX_LEAD: usize = 3 * SECOND as usize;

/// Lead and lag are looked for from so long before the onset to so long after it.
const BEFORE: u64 = 15 * SECOND;
const AFTER: u64 = 45 * SECOND;

/// A change that has to be taken seriously.
const LIFTED_Z: f64 = 4.0;

/// A part of something that changed has changed as well.
const GROWN_Z: f64 = 3.0;

/// Everything that can speak for a cause.
pub(super) struct Scene<'a> {
    pub(super) pods: &'a BTreeMap<Name, Pod>,
    pub(super) node: &'a Workload,
    pub(super) coverage: &'a Coverage,
    /// The pod that has the incident.
    pub(super) name: &'a Name,
    pub(super) view: View<'a>,
    pub(super) onset: u64,
    /// What doses are counted by.
    pub(super) per: Per,
}

/// What a metric's number is put in relation to: levels to nothing.
fn by(metric: Metric, per: Per) -> Per {
    if metric.kind() == Kind::Level { Per::Second } else { per }
}

impl<'a> Scene<'a> {
    /// Another workload in the same time, against what was usual there before the onset.
    pub(super) fn other(&self, workload: &'a Workload) -> View<'a> {
        View { workload, ..self.view }
    }

    /// A pod in the last seconds: for what has to go on, as a load.
    pub(super) fn recent(view: View<'a>) -> View<'a> {
        View { inside: Span::last(WINDOW, view.inside.to), ..view }
    }

    /// A peer that runs on this node.
    pub(super) fn peer(&self, subject: &Subject) -> Option<(&'a Name, &'a Pod, View<'a>)> {
        let name = subject.workload.as_ref().filter(|w| *w != self.name)?;
        let (name, pod) = self.pods.get_key_value(name)?;
        Some((name, pod, self.other(&pod.workload)))
    }

    /// How a metric of the pod changed, by request or second as everything here.
    pub(super) fn change(&self, metric: Metric, subject: Option<&str>) -> Option<Change> {
        self.view.change(metric, subject, by(metric, self.per))
    }

    /// The same, if it is well beyond the usual.
    pub(super) fn lifted(&self, metric: Metric, ratio: f64) -> Option<Change> {
        self.change(metric, None).filter(|c| c.is_lifted(LIFTED_Z, ratio))
    }

    /// The subject of a metric that grew most.
    pub(super) fn grown(&self, metric: Metric) -> Option<(Subject, Change)> {
        let subjects = self.view.workload.subjects(metric);
        let changes = subjects.filter_map(|s| Some((s, self.change(metric, Some(&s.name))?)));
        let grown = changes.filter(|(_, c)| c.extra() > 0.0 && c.z() >= GROWN_Z);
        let most = grown.max_by(|a, b| a.1.extra().total_cmp(&b.1.extra()))?;
        Some((most.0.clone(), most.1))
    }

    /// Evidence of the pod itself.
    pub(super) fn evidence(
        &self,
        metric: Metric,
        subject: Option<&Name>,
        change: Change,
    ) -> Evidence {
        let per_request = metric.kind() == Kind::Sum && self.per == Per::Request;
        evidence(metric, None, subject, change, per_request)
    }

    /// How a metric of the pod goes together with its response time, or with another metric where it
    /// has none.
    pub(super) fn lead(&self, metric: Metric, subject: Option<&str>) -> Option<Lead> {
        let span = self.around();
        let requests = self.view.slots(Metric::Requests, None, span);
        let mean = |metric: Metric, subject: Option<&str>| {
            smooth(&self.view.slots(metric, subject, span), Some(&requests))
        };
        lead(&mean(metric, subject), &mean(Metric::Response, None), MAX_LEAD)
    }

    /// How the CPU time of another workload goes together with the pod's waits for a CPU.
    pub(super) fn neighbour_lead(&self, other: &View<'_>) -> Option<Lead> {
        let span = self.around();
        let theirs = smooth(&other.slots(Metric::Cpu, None, span), None);
        let ours = smooth(&self.view.slots(Metric::RunQueue, None, span), None);
        lead(&theirs, &ours, MAX_LEAD)
    }

    fn around(&self) -> Span {
        let to = self.view.inside.to.min(self.onset + AFTER);
        Span { from: self.onset.saturating_sub(BEFORE), to }
    }

    /// How much of the data of a metric is there, against all that there could be.
    pub(super) fn whole(&self, metric: Metric) -> f64 {
        self.coverage.whole(metric.source(), self.view.inside)
    }
}

/// Evidence of a workload, `None` for the incident's pod.
pub(super) fn evidence(
    metric: Metric,
    workload: Option<&Name>,
    subject: Option<&Name>,
    change: Change,
    per_request: bool,
) -> Evidence {
    Evidence {
        metric,
        workload: workload.map(Arc::clone),
        subject: subject.map(Arc::clone),
        per_request,
        usual: change.base.median,
        deviation: change.sigma,
        values: change.base.values,
        now: change.now,
        lead: None,
    }
}

/// Means over the second that ends with each slot, by the sum of `weights` if there are some. What is
/// unknown is left out; NaN where all is.
fn smooth(values: &[f64], weights: Option<&[f64]>) -> Vec<f64> {
    let window = SECOND as usize;
    (0..values.len())
        .map(|end| {
            let from = (end + 1).saturating_sub(window);
            let (mut sum, mut weight) = (0.0, 0.0);
            for i in from..=end {
                let w = weights.map_or(1.0, |w| w[i]);
                if values[i].is_finite() && w.is_finite() {
                    sum += values[i];
                    weight += w;
                }
            }
            if weight > 0.0 { sum / weight } else { f64::NAN }
        })
        .collect()
}
