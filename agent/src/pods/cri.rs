//! Pods from the container runtime's own socket, for nodes whose agents may not ask the API server:
//! the Container Runtime Interface that kubelet itself uses (containerd, CRI-O). Only lists and
//! states are asked for, never changed.
//!
//! The runtime knows names, UIDs, labels and annotations, but no owners: a pod's owner follows from
//! the labels that controllers give (`pod-template-hash`, `controller-revision-hash`, `job-name`),
//! and is left empty where they do not agree with the pod's name. Which containers are for
//! initialization it does not tell either, nor the class of quality, nor annotations of namespaces.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use podflame_proto::cri::{
    self as runtime, ImageSpec, ListContainersRequest, ListPodSandboxRequest, NamespaceMode,
    PodSandbox, PodSandboxState, PodSandboxStatusRequest, image_service_client::ImageServiceClient,
    runtime_service_client::RuntimeServiceClient,
};
use tonic::transport::{Channel, Endpoint, Uri};
use tracing::{debug, info, warn};

use super::{Container, Phase, Pod, Policy, Publisher, owner, policy::profiled, text};
use crate::profile::{ContainerKind, Owner, Source};

/// How often the runtime is asked. It keeps a container for a while after its end, so that short
/// ones are seen too; sooner only means sooner names.
const POLL: Duration = Duration::from_secs(1);

/// Longest pause after failures.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Most bytes of one answer: a list of some thousand containers.
const MAX_ANSWER: usize = 16 << 20;

/// Most sandboxes whose addresses are asked for in one turn.
const MAX_ASKED: usize = 64;

/// Most images whose tags are kept.
const MAX_IMAGES: usize = 4096;

/// Most containers taken of one pod.
const MAX_CONTAINERS: usize = 64;

/// Asks until nobody listens any more.
pub(super) async fn run(socket: PathBuf, node: String, policy: Policy, mut publisher: Publisher) {
    info!(socket = %socket.display(), "asking the container runtime for pods");
    let mut runtime = Runtime {
        socket,
        node,
        policy,
        channel: None,
        client: None,
        images: HashMap::new(),
        ips: HashMap::new(),
    };
    let mut pause = POLL;
    // Nobody tells of namespaces here.
    publisher.except = Some(std::sync::Arc::default());
    loop {
        let Some(listed) = publisher.until(runtime.list()).await else { break };
        match listed {
            Ok(pods) => {
                pause = POLL;
                take(pods, &mut publisher);
            }
            Err(reason) => {
                runtime.client = None;
                if publisher.state.phase != Phase::Failing {
                    warn!(reason, "the container runtime does not answer: trying again");
                }
                publisher.failed(&reason);
                pause = (pause * 2).min(MAX_PAUSE);
            }
        }
        if publisher.until(tokio::time::sleep(pause)).await.is_none() {
            break;
        }
    }
    debug!("nobody asks for pods any more");
}

fn take(pods: Vec<Pod>, publisher: &mut Publisher) {
    let now = Instant::now();
    let Publisher { table, state, .. } = publisher;
    table.begin_list();
    let changes = pods.into_iter().map(|pod| u64::from(table.apply(pod, now))).sum::<u64>();
    let gone = table.end_list(now);
    state.lists += 1;
    state.changes += changes;
    let back = state.phase != Phase::Watching;
    state.phase = Phase::Watching;
    if changes > 0 || gone || back {
        publisher.touch();
    }
}

struct Runtime {
    socket: PathBuf,
    node: String,
    policy: Policy,
    channel: Option<Channel>,
    client: Option<RuntimeServiceClient<Channel>>,
    /// Tags of images by their digests.
    images: HashMap<String, String>,
    /// Addresses of sandboxes, which do not change: none if it uses those of the node.
    ips: HashMap<String, Vec<IpAddr>>,
}

impl Runtime {
    /// Every pod there is; the error says why not.
    async fn list(&mut self) -> Result<Vec<Pod>, String> {
        let told = |status: tonic::Status| format!("{}: {}", status.code(), status.message());
        let mut client = self.client().await?;
        let sandboxes = client.list_pod_sandbox(ListPodSandboxRequest {}).await.map_err(told)?;
        let containers = client.list_containers(ListContainersRequest {}).await.map_err(told)?;
        let sandboxes = sandboxes.into_inner().items;
        let containers = containers.into_inner().containers;
        self.ask_for_images(&containers).await;
        self.ask_for_addresses(&mut client, &sandboxes).await;
        let mut of_sandbox: HashMap<String, Vec<Container>> = HashMap::new();
        for c in containers {
            let all = of_sandbox.entry(c.pod_sandbox_id).or_default();
            let metadata = c.metadata.unwrap_or_default();
            if all.len() < MAX_CONTAINERS {
                all.push(Container {
                    id: text(&c.id).into(),
                    name: text(&metadata.name).into(),
                    image: text(&self.image(c.image.unwrap_or_default())).into(),
                    kind: ContainerKind::Unknown,
                    restarts: metadata.attempt,
                });
            }
        }
        let mut pods: HashMap<Box<str>, Pod> = HashMap::new();
        for sandbox in &sandboxes {
            let ips = self.ips.get(&sandbox.id).cloned().unwrap_or_default();
            let containers = of_sandbox.remove(&sandbox.id).unwrap_or_default();
            let pod = pod(sandbox, containers, ips, &self.policy, &self.node);
            match pods.entry(pod.uid.clone()) {
                std::collections::hash_map::Entry::Vacant(slot) => drop(slot.insert(pod)),
                // A sandbox that was made anew: the pod has the containers of both.
                std::collections::hash_map::Entry::Occupied(mut known) => {
                    let known = known.get_mut();
                    let both = known.containers.iter().chain(&pod.containers).cloned();
                    known.containers = both.take(2 * MAX_CONTAINERS).collect();
                    if known.ips.is_empty() {
                        known.ips = pod.ips;
                    }
                }
            }
        }
        Ok(pods.into_values().collect())
    }

    /// The name of an image: as its owner wrote it (kubelet tells that since 1.28), or a tag of it.
    fn image(&self, spec: ImageSpec) -> String {
        if !spec.user_specified_image.is_empty() {
            return spec.user_specified_image;
        }
        self.images.get(&spec.image).cloned().unwrap_or(spec.image)
    }

    /// Asks for the tags of images if a container has one that is known by its digest only.
    async fn ask_for_images(&mut self, containers: &[runtime::Container]) {
        let unknown = |c: &runtime::Container| {
            c.image.as_ref().is_some_and(|i| {
                i.user_specified_image.is_empty()
                    && i.image.starts_with("sha256:")
                    && !self.images.contains_key(&i.image)
            })
        };
        let Some(channel) = self.channel.clone().filter(|_| containers.iter().any(unknown)) else {
            return;
        };
        let mut client = ImageServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER);
        // Without tags, digests are shown.
        let Ok(listed) = client.list_images(runtime::ListImagesRequest {}).await else { return };
        let tagged = |image: runtime::Image| {
            let tag = image.repo_tags.into_iter().next();
            (image.id.clone(), tag.unwrap_or(image.id))
        };
        self.images = listed.into_inner().images.into_iter().take(MAX_IMAGES).map(tagged).collect();
    }

    async fn client(&mut self) -> Result<RuntimeServiceClient<Channel>, String> {
        if let Some(client) = &self.client {
            return Ok(client.clone());
        }
        let socket = self.socket.display();
        let channel = Endpoint::try_from(format!("unix://{socket}"))
            .map_err(|e| format!("{socket}: {e}"))?
            // The path of a socket is no authority that servers in Go take.
            .origin(Uri::from_static("http://localhost"))
            .connect_timeout(TIMEOUT)
            .timeout(TIMEOUT)
            .connect()
            .await
            .map_err(|e| {
                let cause = anyhow::Error::from(e).root_cause().to_string();
                format!("connect to {socket}: {cause}")
            })?;
        self.channel = Some(channel.clone());
        let client = RuntimeServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER);
        Ok(self.client.insert(client).clone())
    }

    /// Asks for those of new sandboxes. What fails is asked again in the next turn.
    async fn ask_for_addresses(
        &mut self,
        client: &mut RuntimeServiceClient<Channel>,
        sandboxes: &[PodSandbox],
    ) {
        let ready = |s: &&PodSandbox| s.state == PodSandboxState::SandboxReady as i32;
        let there: std::collections::HashSet<&str> =
            sandboxes.iter().filter(ready).map(|s| s.id.as_str()).collect();
        self.ips.retain(|id, _| there.contains(id.as_str()));
        let new: Vec<&str> = there.into_iter().filter(|id| !self.ips.contains_key(*id)).collect();
        for id in new.into_iter().take(MAX_ASKED) {
            let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned() };
            let Ok(answer) = client.pod_sandbox_status(request).await else { continue };
            let status = answer.into_inner().status.unwrap_or_default();
            let options = status.linux.and_then(|l| l.namespaces).and_then(|n| n.options);
            let on_node = options.is_some_and(|o| o.network == NamespaceMode::Node as i32);
            let network = status.network.unwrap_or_default();
            let more = network.additional_ips.into_iter().map(|ip| ip.ip);
            let all = std::iter::once(network.ip).chain(more).filter_map(|ip| ip.parse().ok());
            let all = all.map(|ip: IpAddr| ip.to_canonical()).take(4);
            self.ips.insert(id.to_owned(), if on_node { Vec::new() } else { all.collect() });
        }
    }
}

/// What is kept of a pod, from its sandbox.
fn pod(
    sandbox: &PodSandbox,
    mut containers: Vec<Container>,
    ips: Vec<IpAddr>,
    policy: &Policy,
    node: &str,
) -> Pod {
    let metadata = sandbox.metadata.clone().unwrap_or_default();
    let labels: BTreeMap<String, String> = sandbox.labels.clone().into_iter().collect();
    let annotations: BTreeMap<String, String> = sandbox.annotations.clone().into_iter().collect();
    let name = text(&metadata.name);
    containers.push(Container {
        id: text(&sandbox.id).into(),
        name: "POD".into(),
        kind: ContainerKind::Sandbox,
        ..Container::default()
    });
    Pod {
        uid: text(&metadata.uid).into(),
        namespace: text(&metadata.namespace).into(),
        name: name.into(),
        owner: owner_of(name, &labels, &annotations, sandbox.created_at / 1_000_000_000, node),
        labels: policy.keep(&labels),
        qos: Box::default(),
        node: text(node).into(),
        ips: ips.into(),
        containers: containers.into(),
        profiled: profiled(Some(&annotations)),
        selected: policy.selects(&metadata.namespace, &metadata.name, &labels),
        source: Source::Cri,
    }
}

/// What a person deployed, by what controllers put into names and labels.
fn owner_of(
    pod: &str,
    labels: &BTreeMap<String, String>,
    annotations: &BTreeMap<String, String>,
    created_unix: i64,
    node: &str,
) -> Owner {
    let owner = |kind: &str, name: &str| Owner { kind: kind.to_owned(), name: name.to_owned() };
    if annotations.get("kubernetes.io/config.source").is_some_and(|source| source != "api") {
        return owner::of_static(pod, node);
    }
    // Pods of all controllers but StatefulSet end with five random characters.
    let base = pod.rsplit_once('-').map_or("", |(base, _)| base);
    let job = labels.get("batch.kubernetes.io/job-name").or_else(|| labels.get("job-name"));
    if let Some(job) = job.filter(|job| *job == base) {
        return owner::outermost(owner("Job", job), None, Some(created_unix));
    }
    if let Some(hash) = labels.get("pod-template-hash") {
        let found = owner::outermost(owner("ReplicaSet", base), Some(hash), None);
        return if found.kind == "Deployment" { found } else { Owner::default() };
    }
    if base.is_empty() || !labels.contains_key("controller-revision-hash") {
        return Owner::default();
    }
    match labels.get("statefulset.kubernetes.io/pod-name") {
        Some(name) if name == pod => owner("StatefulSet", base),
        Some(_) => Owner::default(),
        None => owner("DaemonSet", base),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(pod: &str, labels: &str, expected: &str) {
        let pair = |pair: &str| pair.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()));
        let labels = labels.split(',').filter_map(pair).collect();
        let found = owner_of(pod, &labels, &BTreeMap::new(), 28_123_456 * 60 + 5, "node1");
        assert_eq!(format!("{}/{}", found.kind, found.name), expected, "{pod}");
    }

    #[test]
    fn owners_follow_from_labels_that_agree_with_the_name() {
        check("web-7d4b9c6f5d-x2x4z", "pod-template-hash=7d4b9c6f5d", "Deployment/web");
        check("web-7d4b9c6f5d-x2x4z", "pod-template-hash=other", "/");
        check("each-x2x4z", "controller-revision-hash=5f", "DaemonSet/each");
        let set = "controller-revision-hash=s-5f,statefulset.kubernetes.io/pod-name=db-0";
        check("db-0", set, "StatefulSet/db");
        check("other-0", set, "/");
        check("once-x2x4z", "job-name=once", "Job/once");
        check("often-28123456-x2x4z", "job-name=often-28123456", "CronJob/often");
        check("alone", "app=a", "/");
    }

    #[test]
    fn a_sandbox_is_a_pod() {
        let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        let sandbox = PodSandbox {
            id: "5".repeat(64),
            metadata: Some(podflame_proto::cri::PodSandboxMetadata {
                name: "etcd-node1".into(),
                uid: "0123456789abcdef0123456789abcdef".into(),
                namespace: "kube-system".into(),
                attempt: 0,
            }),
            annotations: [
                pair("kubernetes.io/config.source", "file"),
                pair("podflame.dev/profile", "false"),
            ]
            .into(),
            labels: [pair("app", "etcd")].into(),
            ..PodSandbox::default()
        };
        let pod = pod(&sandbox, Vec::new(), Vec::new(), &Policy::default(), "node1");
        assert_eq!((&*pod.owner.kind, &*pod.owner.name), ("StaticPod", "etcd"));
        assert_eq!(pod.container(&"5".repeat(64)).map(|c| c.kind), Some(ContainerKind::Sandbox));
        assert!(!pod.profiled && pod.labels.len() == 1);
    }
}
