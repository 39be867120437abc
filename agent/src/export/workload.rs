//! What is known of a workload beyond what tells it apart, as JSON has it everywhere.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::profile::Workload;

/// Fields of a workload's JSON object, in lines of a stream and in documents. Those that are not known
/// are left out.
#[derive(Serialize)]
pub struct WorkloadDetails<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    container: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    container_kind: Option<&'static str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    image: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    restarts: u32,
    #[serde(skip_serializing_if = "str::is_empty")]
    owner_kind: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    owner_name: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<&'a str, &'a str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    qos_class: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    node: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    confidence: Option<&'static str>,
}

impl<'a> WorkloadDetails<'a> {
    /// Those of that workload.
    #[must_use]
    pub fn new(w: &'a Workload) -> Self {
        Self {
            container: &w.container,
            container_kind: w.container_kind.name(),
            image: &w.image,
            restarts: w.restarts,
            owner_kind: &w.owner.kind,
            owner_name: &w.owner.name,
            labels: w.labels.iter().map(|(key, value)| (&**key, &**value)).collect(),
            qos_class: &w.qos,
            node: &w.node,
            source: w.source.name(),
            confidence: w.confidence.name(),
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}
