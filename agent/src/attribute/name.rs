//! Names for what a cgroup's path says: joins a [`Workload`] with the pod of its UID.
//!
//! The UID decides, which is never given twice, and within the pod the container's ID: a name that
//! comes late is still the right one, and none comes from a neighbour. A container that its pod does
//! not tell of is left without a name.

use std::sync::Arc;

use super::{lru::Lru, short};
use crate::{
    pods::{Latest, Pod, Pods},
    profile::{Source, Workload, WorkloadKind},
};

/// Workloads whose last names are remembered, for those whose pod is forgotten. Each costs about
/// 1 KiB.
const CAPACITY: usize = 4096;

/// Gives names, as far as they are known.
#[derive(Debug)]
pub struct Namer {
    latest: Option<Latest>,
    /// What is current, taken once for each flush.
    pods: Arc<Pods>,
    last: Lru<Arc<Workload>, Arc<Workload>>,
}

impl Namer {
    /// Names from there; without it everything stays as it is.
    #[must_use]
    pub fn new(mut latest: Option<Latest>) -> Self {
        // What was told already is no change any more.
        let pods = latest.as_mut().map(|latest| Arc::clone(&latest.borrow_and_update()));
        Self { latest, pods: pods.unwrap_or_default(), last: Lru::new(CAPACITY) }
    }

    /// Takes what is current. Whether anything changed.
    pub fn refresh(&mut self) -> bool {
        let Some(latest) = &mut self.latest else { return false };
        // An error says that the watch ended, which leaves what was known.
        let changed = latest.has_changed().unwrap_or_default();
        if changed {
            self.pods = Arc::clone(&latest.borrow_and_update());
        }
        changed
    }

    /// The pods that are known.
    #[must_use]
    pub fn pods(&self) -> &Arc<Pods> {
        &self.pods
    }

    /// The workload with its names.
    pub fn name(&mut self, workload: &Arc<Workload>) -> Arc<Workload> {
        if workload.kind != WorkloadKind::Pod || self.latest.is_none() {
            return Arc::clone(workload);
        }
        let Some(pod) = self.pods.by_uid(&workload.pod_uid) else {
            return self.last.get(workload).unwrap_or(workload).clone();
        };
        let named = named(workload, pod);
        match self.last.get(workload) {
            Some(last) if **last == named => Arc::clone(last),
            _ => {
                let named = Arc::new(named);
                self.last.insert(Arc::clone(workload), Arc::clone(&named));
                named
            }
        }
    }
}

/// A workload of that pod, with its names.
fn named(workload: &Workload, pod: &Pod) -> Workload {
    let container = pod.container(&workload.container_id);
    let mut name = format!("{}/{}", pod.namespace, pod.name);
    match container {
        Some(container) => name = format!("{name}/{}", container.name),
        None if !workload.container_id.is_empty() => {
            name = format!("{name}/{}", short(&workload.container_id));
        }
        None => {}
    }
    let (container, image, container_kind, restarts) = container
        .map(|c| (c.name.to_string(), c.image.to_string(), c.kind, c.restarts))
        .unwrap_or_default();
    let source = if pod.source == Source::None { workload.source } else { pod.source };
    Workload {
        name,
        namespace: pod.namespace.to_string(),
        pod: pod.name.to_string(),
        container,
        container_kind,
        image,
        restarts,
        owner: pod.owner.clone(),
        labels: pod.labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
        qos: pod.qos.to_string(),
        node: pod.node.to_string(),
        source,
        ..workload.clone()
    }
}
