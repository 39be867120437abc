//! Objects of the API server as this agent reads them: metadata without what is long and of no use
//! here, and of specification and status only what a [`Kind`] names. All else is skipped while the
//! answer is parsed.

use std::{collections::BTreeMap, fmt::Debug};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use kube::Resource;
use serde::{Deserialize, Deserializer, de::DeserializeOwned};

use super::{policy::OPT_OUT, text};

/// The annotation by which kubelet marks the API's copy of a static pod; its value is the hash that
/// is the UID in cgroup paths (`ConfigMirrorAnnotationKey` in `pkg/kubelet/types/pod_update.go`).
pub(super) const MIRROR: &str = "kubernetes.io/config.mirror";

/// A part of an object.
pub(super) trait Part:
    Clone + Debug + Default + DeserializeOwned + Send + Sync + 'static
{
}

impl<T: Clone + Debug + Default + DeserializeOwned + Send + Sync + 'static> Part for T {}

/// A kind of objects of the core API group, version 1.
pub(super) trait Kind: Clone + Debug + Send + Sync + 'static {
    /// As in `kind`.
    const NAME: &str;
    /// As in URLs.
    const PLURAL: &str;
    /// What is read of `spec`.
    type Spec: Part;
    /// What is read of `status`.
    type Status: Part;
}

/// See the module.
#[derive(Clone, Debug, Deserialize)]
#[serde(bound = "")]
pub(super) struct Object<K: Kind> {
    #[serde(deserialize_with = "slim")]
    pub(super) metadata: ObjectMeta,
    #[serde(default)]
    pub(super) spec: K::Spec,
    #[serde(default)]
    pub(super) status: K::Status,
}

impl<K: Kind> Object<K> {
    /// Namespace and name; the former is empty where the kind has none.
    pub(super) fn names(&self) -> [&str; 2] {
        let meta = &self.metadata;
        [&meta.namespace, &meta.name].map(|name| text(name.as_deref().unwrap_or_default()))
    }
}

fn slim<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct Slim {
        name: Option<String>,
        namespace: Option<String>,
        uid: Option<String>,
        resource_version: Option<String>,
        creation_timestamp: Option<Time>,
        labels: Option<BTreeMap<String, String>>,
        annotations: Option<BTreeMap<String, String>>,
        owner_references: Option<Vec<OwnerReference>>,
    }
    let slim = Slim::deserialize(deserializer)?;
    let mut annotations = slim.annotations.unwrap_or_default();
    annotations.retain(|key, _| key == MIRROR || key == OPT_OUT);
    Ok(ObjectMeta {
        name: slim.name,
        namespace: slim.namespace,
        uid: slim.uid,
        resource_version: slim.resource_version,
        creation_timestamp: slim.creation_timestamp,
        labels: slim.labels,
        annotations: Some(annotations),
        owner_references: slim.owner_references,
        ..ObjectMeta::default()
    })
}

impl<K: Kind> Resource for Object<K> {
    type DynamicType = ();
    /// Not used: whole clusters are watched, and nothing is written.
    type Scope = k8s_openapi::NamespaceResourceScope;

    fn kind((): &()) -> std::borrow::Cow<'_, str> {
        K::NAME.into()
    }
    fn group((): &()) -> std::borrow::Cow<'_, str> {
        "".into()
    }
    fn version((): &()) -> std::borrow::Cow<'_, str> {
        "v1".into()
    }
    fn plural((): &()) -> std::borrow::Cow<'_, str> {
        K::PLURAL.into()
    }
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
