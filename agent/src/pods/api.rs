//! Pods from the Kubernetes API server: one watch of those of this node.
//!
//! kube's watcher lists in pages, watches with bookmarks, resumes where a broken stream ended, and
//! lists anew only when the server forgot that place (410 Gone); failures are followed by a pause
//! that doubles to 30 s, with jitter ([`Pause`]), so that the agents of a cluster do not come back all at once.
//!
//! Beside it, the metadata of namespaces is watched, for their opt-outs; without the permission, only
//! those of pods count.
//!
//! The server sends whole objects; all but metadata, statuses and what tells sidecars apart is
//! skipped while it is parsed.

use std::{collections::BTreeMap, net::IpAddr, path::Path, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use hashbrown::HashSet;
use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api, Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event},
    },
};
use serde::Deserialize;
use tracing::{debug, info, warn};

use super::{
    Container, Error, Phase, Pod, Policy, Publisher,
    object::{Kind, MIRROR, Object},
    owner,
    pause::Pause,
    policy::profiled,
    text,
};
use crate::profile::{ContainerKind, Owner, Source};

/// Pods in one page of a list: some MiB of JSON, which is what a list takes in memory.
pub(super) const PAGE: u32 = 100;

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the server may say nothing: longer than a watch lasts (290 s by kube's default).
const READ_TIMEOUT: Duration = Duration::from_secs(330);

/// Namespaces that opted out, remembered at most.
const MAX_NAMESPACES: usize = 4096;

/// Most containers taken of one status. The API server accepts objects of 1.5 MiB.
const MAX_STATUSES: usize = 64;

/// Most addresses taken of one object: a pod or Service has one of each family.
const MAX_IPS: usize = 4;

/// The label that tells a Deployment's ReplicaSets apart.
const TEMPLATE_HASH: &str = "pod-template-hash";

/// Credentials: a file, or else the service account of the pod that this runs in.
pub(super) async fn config(kubeconfig: Option<&Path>) -> Result<Config, Error> {
    let failed = |e: &dyn std::error::Error| {
        let mut reason = e.to_string();
        let mut source = e.source();
        while let Some(cause) = source {
            reason = format!("{reason}: {cause}");
            source = cause.source();
        }
        Error::Credentials(reason)
    };
    let mut config = match kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path).map_err(|e| failed(&e))?;
            let options = KubeConfigOptions::default();
            Config::from_custom_kubeconfig(file, &options).await.map_err(|e| failed(&e))?
        }
        None => Config::incluster().map_err(|e| failed(&e))?,
    };
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(READ_TIMEOUT);
    Ok(config)
}

/// Watches until nobody listens any more.
pub(super) async fn run(config: Config, node: String, policy: Policy, mut publisher: Publisher) {
    info!(server = %config.cluster_url, node, "watching the pods of this node");
    let client = match Client::try_from(config) {
        Ok(client) => client,
        Err(e) => {
            warn!("no client of the API server: {e}");
            publisher.failed(&e.to_string());
            publisher.publish();
            return;
        }
    };
    let watch = watcher::Config::default()
        .fields(&format!("spec.nodeName={node}"))
        // From the server's cache: a restart of all agents is no storm on its storage.
        .any_semantic()
        .page_size(PAGE);
    let pods = kube::runtime::watcher(Api::<PodObject>::all(client.clone()), watch);
    let watch = watcher::Config::default().any_semantic().page_size(PAGE);
    // Metadata only.
    let namespaces = Api::<PartialObjectMeta<Namespace>>::all(client);
    let namespaces = kube::runtime::watcher(namespaces, watch);
    let mut events = std::pin::pin!(stream::select(
        pods.backoff(Pause::default()).map(|event| event.map(Told::Pod)).map_err(Failed::Pods),
        namespaces
            .backoff(Pause::default())
            .map(|event| event.map(Told::Namespace))
            .map_err(Failed::Namespaces),
    ));
    let mut listing = HashSet::new();
    while let Some(next) = publisher.until(events.next()).await {
        match next {
            Some(Ok(Told::Pod(event))) => take(event, &policy, &mut publisher),
            Some(Ok(Told::Namespace(event))) => {
                take_namespace(event, &mut listing, &mut publisher);
            }
            Some(Err(Failed::Namespaces(e))) => {
                // Pods are named all the same.
                if publisher.except.is_none() {
                    warn!(reason = describe(&e), "annotations of namespaces cannot be read");
                    publisher.except = Some(Arc::default());
                    settle(&mut publisher);
                }
            }
            Some(Err(Failed::Pods(e))) => {
                let reason = describe(&e);
                if publisher.state.phase != Phase::Failing {
                    warn!(reason, "the API server cannot be watched: trying again");
                }
                publisher.failed(&reason);
            }
            None => return,
        }
    }
    debug!("nobody asks for pods any more");
}

fn take(event: Event<PodObject>, policy: &Policy, publisher: &mut Publisher) {
    let now = std::time::Instant::now();
    let Publisher { table, state, .. } = publisher;
    let changed = match event {
        Event::Init => {
            table.begin_list();
            return;
        }
        Event::InitApply(object) => {
            table.apply(object.pod(policy), now);
            // Told with the whole list, unless that takes long.
            true
        }
        Event::InitDone => {
            table.end_list(now);
            state.lists += 1;
            info!(pods = table.len(), "the pods of this node are listed");
            true
        }
        Event::Apply(object) => {
            state.changes += 1;
            table.apply(object.pod(policy), now)
        }
        Event::Delete(object) => {
            state.changes += 1;
            table.delete(&object.uid(), now)
        }
    };
    if changed {
        publisher.touch();
    }
    settle(publisher);
}

/// Whatever came, the server answers; but only whole lists are all there is.
fn settle(publisher: &mut Publisher) {
    let state = &mut publisher.state;
    if state.phase != Phase::Watching && state.lists > 0 && publisher.except.is_some() {
        state.phase = Phase::Watching;
        publisher.touch();
    }
}

/// An event of either watch.
enum Told {
    Pod(Event<PodObject>),
    Namespace(Event<PartialObjectMeta<Namespace>>),
}

/// A failure of either.
enum Failed {
    Pods(watcher::Error),
    Namespaces(watcher::Error),
}

/// Keeps which namespaces opted out; `listing` are those of a list that is not complete.
fn take_namespace(
    event: Event<PartialObjectMeta<Namespace>>,
    listing: &mut HashSet<Box<str>>,
    publisher: &mut Publisher,
) {
    let name = |object: &PartialObjectMeta<Namespace>| -> Box<str> {
        text(object.metadata.name.as_deref().unwrap_or_default()).into()
    };
    let mut except = publisher.except.clone().unwrap_or_default();
    match event {
        Event::Init => return listing.clear(),
        Event::InitApply(object) => {
            if !profiled(object.metadata.annotations.as_ref()) && listing.len() < MAX_NAMESPACES {
                listing.insert(name(&object));
            }
            return;
        }
        Event::InitDone => except = Arc::new(std::mem::take(listing)),
        Event::Apply(object) if !profiled(object.metadata.annotations.as_ref()) => {
            if except.len() < MAX_NAMESPACES {
                Arc::make_mut(&mut except).insert(name(&object));
            }
        }
        Event::Apply(object) | Event::Delete(object) => {
            if except.contains(&name(&object)) {
                Arc::make_mut(&mut except).remove(&name(&object));
            }
        }
    }
    if publisher.except.as_ref() != Some(&except) {
        publisher.except = Some(except);
        publisher.touch();
    }
    settle(publisher);
}

/// An error with its causes, in one line.
pub(super) fn describe(error: &watcher::Error) -> String {
    let mut reason = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors repeat their cause.
        if !reason.contains(&cause_text) {
            reason = format!("{reason}: {cause_text}");
        }
        source = cause.source();
    }
    reason
}

/// A pod, as far as it is looked at.
pub(super) type PodObject = Object<Pods>;

/// The kind of [`PodObject`].
#[derive(Clone, Debug)]
pub(super) struct Pods;

impl Kind for Pods {
    const NAME: &str = "Pod";
    const PLURAL: &str = "pods";
    type Spec = Spec;
    type Status = Status;
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Spec {
    node_name: Option<String>,
    host_network: Option<bool>,
    init_containers: Option<Vec<InitContainer>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct InitContainer {
    name: String,
    restart_policy: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Status {
    phase: Option<String>,
    qos_class: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
    container_statuses: Option<Vec<ContainerStatus>>,
    init_container_statuses: Option<Vec<ContainerStatus>>,
    ephemeral_container_statuses: Option<Vec<ContainerStatus>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct PodIp {
    ip: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ContainerStatus {
    name: String,
    image: Option<String>,
    #[serde(rename = "containerID")]
    container_id: Option<String>,
    restart_count: u32,
    last_state: Option<LastState>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct LastState {
    terminated: Option<Terminated>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Terminated {
    #[serde(rename = "containerID")]
    container_id: Option<String>,
}

impl PodObject {
    /// The UID in the paths of its cgroups.
    fn uid(&self) -> Box<str> {
        let mirror = self.metadata.annotations.as_ref().and_then(|all| all.get(MIRROR));
        text(mirror.or(self.metadata.uid.as_ref()).map_or("", |uid| uid)).into()
    }

    /// What is kept of it.
    pub(super) fn pod(&self, policy: &Policy) -> Pod {
        let meta = &self.metadata;
        let [namespace, name] = self.names();
        let none = BTreeMap::new();
        let labels = meta.labels.as_ref().unwrap_or(&none);
        let node = self.spec.node_name.as_deref().unwrap_or_default();
        Pod {
            uid: self.uid(),
            namespace: namespace.into(),
            name: name.into(),
            owner: self.owner(name, node, labels),
            labels: policy.keep(labels),
            qos: text(self.status.qos_class.as_deref().unwrap_or_default()).into(),
            node: text(node).into(),
            ips: self.ips(),
            containers: self.containers(),
            profiled: profiled(meta.annotations.as_ref()),
            selected: policy.selects(namespace, name, labels),
            source: Source::Api,
        }
    }

    fn owner(&self, name: &str, node: &str, labels: &BTreeMap<String, String>) -> Owner {
        let meta = &self.metadata;
        if meta.annotations.as_ref().is_some_and(|all| all.contains_key(MIRROR)) {
            return owner::of_static(name, node);
        }
        let owners = meta.owner_references.iter().flatten();
        let controller = owners.into_iter().find(|owner| owner.controller == Some(true));
        let controller = controller.map_or_else(Owner::default, |owner| Owner {
            kind: text(&owner.kind).to_owned(),
            name: text(&owner.name).to_owned(),
        });
        let hash = labels.get(TEMPLATE_HASH).map(String::as_str);
        let created = meta.creation_timestamp.as_ref().map(|time| time.0.as_second());
        owner::outermost(controller, hash, created)
    }

    /// None if it has ended: its address may be another's.
    pub(super) fn ips(&self) -> Box<[IpAddr]> {
        let status = &self.status;
        let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        if ended || self.spec.host_network == Some(true) {
            return Box::default();
        }
        let all = status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.as_ref());
        addresses(status.pod_ip.iter().chain(all))
    }

    fn containers(&self) -> Box<[Container]> {
        let status = &self.status;
        let init = |status: &ContainerStatus| {
            let mut specs = self.spec.init_containers.iter().flatten();
            let stays = specs.any(|spec| {
                spec.name == status.name && spec.restart_policy.as_deref() == Some("Always")
            });
            if stays { ContainerKind::Sidecar } else { ContainerKind::Init }
        };
        let mut all = Vec::new();
        for (statuses, kind) in [
            (&status.container_statuses, Some(ContainerKind::App)),
            (&status.init_container_statuses, None),
            (&status.ephemeral_container_statuses, Some(ContainerKind::Ephemeral)),
        ] {
            for status in statuses.iter().flatten().take(MAX_STATUSES) {
                let kind = kind.unwrap_or_else(|| init(status));
                all.extend(status.starts(kind));
            }
        }
        all.into()
    }
}

/// Those of the texts that are addresses, each once, [`MAX_IPS`] at most.
pub(super) fn addresses<'a>(texts: impl Iterator<Item = &'a String>) -> Box<[IpAddr]> {
    let all = texts.filter_map(|ip| ip.parse::<IpAddr>().ok());
    let mut ips: Vec<IpAddr> = all.map(|ip| ip.to_canonical()).take(2 * MAX_IPS).collect();
    ips.sort_unstable();
    ips.dedup();
    ips.truncate(MAX_IPS);
    ips.into()
}

impl ContainerStatus {
    /// The container that runs or ran last, and the one before it.
    fn starts(&self, kind: ContainerKind) -> impl Iterator<Item = Container> {
        let last = self.last_state.as_ref().and_then(|last| last.terminated.as_ref());
        let last = last.and_then(|terminated| terminated.container_id.as_deref());
        let now = self.container_id.as_deref();
        let starts = [
            (now, self.restart_count),
            (last.filter(|last| Some(*last) != now), self.restart_count.saturating_sub(1)),
        ];
        starts.into_iter().filter_map(move |(id, restarts)| {
            // `containerd://<64 digits>`
            let id = id?.rsplit_once("://").map_or(id?, |(_, id)| id);
            let image = self.image.as_deref().unwrap_or_default();
            (!id.is_empty()).then(|| Container {
                id: text(id).into(),
                name: text(&self.name).into(),
                image: text(image).into(),
                kind,
                restarts,
            })
        })
    }
}

#[cfg(test)]
#[path = "api_server_tests.rs"]
mod server_tests;
#[cfg(test)]
#[path = "api_tests.rs"]
mod tests;
