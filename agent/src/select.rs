//! What a client asks for: signals, workloads and processes.
//!
//! Not for the filter of the kernel side, which decides what is recorded at all.

use std::sync::Arc;

use crate::profile::{Signal, Workload, WorkloadId};

/// Selects workloads. A workload passes if every field that is not empty fits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkloadFilter {
    /// [`Workload::name`], in full.
    pub name: String,
    /// [`Workload::namespace`], in full.
    pub namespace: String,
    /// [`Workload::pod`], in full.
    pub pod: String,
    /// [`Workload::pod_uid`], in full.
    pub pod_uid: String,
    /// [`Workload::container_id`], or its first digits.
    pub container_id: String,
    /// [`Workload::unit`], in full.
    pub unit: String,
    /// [`Workload::cgroup_path`], or that of a cgroup around it.
    pub cgroup_prefix: String,
}

impl WorkloadFilter {
    /// Whether that workload passes.
    #[must_use]
    pub fn takes(&self, workload: &Workload) -> bool {
        let same = |wanted: &str, is: &str| wanted.is_empty() || wanted == is;
        same(&self.name, &workload.name)
            && same(&self.namespace, &workload.namespace)
            && same(&self.pod, &workload.pod)
            && same(&self.pod_uid, &workload.pod_uid)
            && same(&self.unit, &workload.unit)
            && workload.container_id.starts_with(&self.container_id)
            && is_at_or_below(&workload.cgroup_path, &self.cgroup_prefix)
    }
}

/// Whether a cgroup is that one or below it; every cgroup is below the empty path.
fn is_at_or_below(path: &str, ancestor: &str) -> bool {
    let ancestor = ancestor.trim_end_matches('/');
    path.strip_prefix(ancestor).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        || ancestor.is_empty()
}

/// Selects events. Each list that is empty selects all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// These signals.
    pub signals: Vec<Signal>,
    /// Workloads that one of these selects.
    pub workloads: Vec<WorkloadFilter>,
    /// These processes.
    pub pids: Vec<u32>,
}

impl Selector {
    /// Whether that workload is selected.
    #[must_use]
    pub fn takes_workload(&self, workload: &Workload) -> bool {
        self.workloads.is_empty() || self.workloads.iter().any(|f| f.takes(workload))
    }

    /// Whether that signal is selected.
    #[must_use]
    pub fn takes_signal(&self, signal: Signal) -> bool {
        self.signals.is_empty() || self.signals.contains(&signal)
    }
}

/// A selector with the answer for each workload of one dictionary, so that a sample costs a look-up.
/// Clones share the answers.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    selector: Arc<Selector>,
    /// By [`WorkloadId`].
    workloads: Arc<Vec<bool>>,
}

impl Selection {
    /// Of a dictionary that has no workload yet.
    #[must_use]
    pub fn new(selector: Arc<Selector>) -> Self {
        Self { selector, workloads: Arc::default() }
    }

    /// Decides on the next workloads of the dictionary.
    pub fn extend(&mut self, workloads: &[Arc<Workload>]) {
        if !workloads.is_empty() && !self.selector.workloads.is_empty() {
            let taken = workloads.iter().map(|w| self.selector.takes_workload(w));
            Arc::make_mut(&mut self.workloads).extend(taken);
        }
    }

    /// Answers anew for the workloads whose names changed.
    pub fn rename(&mut self, renamed: &[(WorkloadId, Arc<Workload>)]) {
        if renamed.is_empty() || self.selector.workloads.is_empty() {
            return;
        }
        let answers = Arc::make_mut(&mut self.workloads);
        for (id, workload) in renamed {
            if let Some(answer) = answers.get_mut(id.0 as usize) {
                *answer = self.selector.takes_workload(workload);
            }
        }
    }

    /// What it was made from.
    #[must_use]
    pub fn selector(&self) -> &Arc<Selector> {
        &self.selector
    }

    /// Whether an event of that kind is selected.
    #[must_use]
    pub fn takes(&self, signal: Signal, workload: WorkloadId, pid: u32) -> bool {
        let s = &self.selector;
        s.takes_signal(signal)
            && (s.pids.is_empty() || s.pids.contains(&pid))
            && (s.workloads.is_empty()
                || self.workloads.get(workload.0 as usize).copied().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload() -> Workload {
        Workload {
            name: "shop/cart-7f/app".into(),
            namespace: "shop".into(),
            pod: "cart-7f".into(),
            container_id: "ab12".into(),
            cgroup_path: "/kubepods/burstable/pod1/ab12".into(),
            ..Workload::default()
        }
    }

    #[test]
    fn every_given_field_must_fit() {
        let takes = |filter: WorkloadFilter| filter.takes(&workload());
        assert!(takes(WorkloadFilter::default()));
        assert!(takes(WorkloadFilter { pod: "cart-7f".into(), ..Default::default() }));
        assert!(!takes(WorkloadFilter { pod: "cart".into(), ..Default::default() }));
        assert!(takes(WorkloadFilter { container_id: "ab".into(), ..Default::default() }));
        assert!(!takes(WorkloadFilter {
            pod: "cart-7f".into(),
            namespace: "other".into(),
            ..Default::default()
        }));
    }

    #[test]
    fn a_cgroup_prefix_ends_at_a_component() {
        for (prefix, fits) in [
            ("", true),
            ("/", true),
            ("/kubepods", true),
            ("/kubepods/", true),
            ("/kube", false),
            ("/kubepods/burstable/pod1/ab12", true),
            ("/kubepods/burstable/pod1/ab12/x", false),
        ] {
            let filter = WorkloadFilter { cgroup_prefix: prefix.into(), ..Default::default() };
            assert_eq!(filter.takes(&workload()), fits, "{prefix}");
        }
    }

    #[test]
    fn a_selection_answers_by_id() {
        let pod = WorkloadFilter { pod: "cart-7f".into(), ..Default::default() };
        let selector = Selector { workloads: vec![pod], pids: vec![7], ..Default::default() };
        let mut selection = Selection::new(Arc::new(selector));
        selection.extend(&[Arc::new(Workload::default())]);
        selection.extend(&[Arc::new(workload())]);
        let takes = |id, pid| selection.takes(Signal::Cpu, WorkloadId(id), pid);
        assert_eq!(
            [takes(0, 7), takes(1, 7), takes(1, 8), takes(2, 7)],
            [false, true, false, false]
        );
    }
}
