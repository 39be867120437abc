//! Who has a remote address: pods, Services and nodes of the whole cluster, from three watches of the
//! API server. Only where that was asked for: it needs the permission to list them all, and each
//! change anywhere in the cluster is told to every agent that asks.
//!
//! An address that two claim at once names neither. A pod that has ended, or that uses the addresses
//! of its node, claims none.

use std::{fmt, net::IpAddr, path::Path, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt as _, stream};
use hashbrown::{HashMap, hash_map::Entry as Slot};
use kube::{
    Api, Client,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event},
    },
};
use serde::Deserialize;
use tokio::{sync::watch, time::Instant};
use tracing::{info, warn};

use super::{
    Error,
    api::{self, PAGE, Pods, addresses, describe},
    object::{Kind, Object},
    pause::Pause,
    spawn, text,
};

/// Objects kept: those of a cluster of some hundred nodes. Each takes about 300 bytes, the index
/// included.
const MAX_OBJECTS: usize = 65_536;

/// How soon a change is published: an index of everything is made each time, some 10 ms for a full
/// table, and in a large cluster something changes every moment.
const PUBLISH_DELAY: Duration = Duration::from_secs(1);

/// Who has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    kind: PeerKind,
    namespace: Box<str>,
    name: Box<str>,
}

/// What has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum PeerKind {
    Pod,
    Service,
    Node,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, namespace, name } = self;
        match kind {
            PeerKind::Pod => write!(f, "{namespace}/{name}"),
            PeerKind::Service => write!(f, "service {namespace}/{name}"),
            PeerKind::Node => write!(f, "node {name}"),
        }
    }
}

/// What is known at one moment.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    by_ip: HashMap<IpAddr, Arc<Peer>>,
    /// How the watches do.
    pub state: PeerState,
}

impl Peers {
    /// Who has that address now.
    #[must_use]
    pub fn by_ip(&self, ip: IpAddr) -> Option<&Arc<Peer>> {
        self.by_ip.get(&ip.to_canonical())
    }
}

/// How the watches do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerState {
    /// Pods, Services and nodes known.
    pub objects: usize,
    /// Whole lists taken, of any of them.
    pub lists: u64,
    /// Attempts that failed.
    pub failures: u64,
    /// Why the last attempt failed, also if a later one did not.
    pub last_failure: Box<str>,
    /// Objects left out because there were too many.
    pub refused: u64,
}

/// The latest [`Peers`]. The watches end when every clone of it is gone.
pub type LatestPeers = watch::Receiver<Arc<Peers>>;

/// Starts to watch, with those credentials.
///
/// # Errors
/// When there are no credentials, or no thread.
pub async fn watch_peers(kubeconfig: Option<&Path>) -> Result<LatestPeers, Error> {
    let config = api::config(kubeconfig).await?;
    let (publish, latest) = watch::channel(Arc::new(Peers::default()));
    let client = Client::try_from(config).map_err(|e| Error::Credentials(e.to_string()))?;
    spawn(run(client, publish))?;
    Ok(latest)
}

/// Watches until nobody listens any more.
async fn run(client: Client, publish: watch::Sender<Arc<Peers>>) {
    info!("watching the pods, Services and nodes of the cluster");
    let mut told = std::pin::pin!(stream::select(
        changes::<Pods>(client.clone()),
        stream::select(changes::<Services>(client.clone()), changes::<Nodes>(client)),
    ));
    let mut table = Table::default();
    let mut due: Option<Instant> = None;
    loop {
        let publishing = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = publish.closed() => return,
            () = publishing => {
                due = None;
                publish.send_replace(Arc::new(table.publication()));
            }
            next = told.next() => {
                let Some(change) = next else { return };
                if table.take(change) {
                    due.get_or_insert_with(|| Instant::now() + PUBLISH_DELAY);
                }
            }
        }
    }
}

/// What the watch of a kind tells.
fn changes<K: Addressed>(client: Client) -> impl Stream<Item = Change> {
    // From the server's cache: a restart of all agents is no storm on its storage.
    let config = watcher::Config::default().any_semantic().page_size(PAGE);
    kube::runtime::watcher(Api::<Object<K>>::all(client), config).backoff(Pause::default()).map(
        |event| {
            let what = match event {
                Ok(Event::Init) => What::Begin,
                Ok(Event::InitApply(object) | Event::Apply(object)) => there(&object),
                Ok(Event::InitDone) => What::Complete,
                Ok(Event::Delete(object)) => What::Gone(key(&object)),
                Err(error) => What::Failed(describe(&error)),
            };
            (K::PEER, what)
        },
    )
}

fn there<K: Addressed>(object: &Object<K>) -> What {
    What::There(key(object), K::addresses(object))
}

fn key<K: Kind>(object: &Object<K>) -> Key {
    let [namespace, name] = object.names();
    (namespace.into(), name.into())
}

/// A change of one kind.
type Change = (PeerKind, What);

enum What {
    /// A whole list begins.
    Begin,
    /// An object is there, with these addresses.
    There(Key, Box<[IpAddr]>),
    /// It is gone.
    Gone(Key),
    /// The list is complete.
    Complete,
    Failed(String),
}

/// Namespace and name.
type Key = (Box<str>, Box<str>);

/// A kind of objects that can have addresses.
trait Addressed: Kind {
    const PEER: PeerKind;
    /// The addresses that an object has.
    fn addresses(object: &Object<Self>) -> Box<[IpAddr]>
    where
        Self: Sized;
}

impl Addressed for Pods {
    const PEER: PeerKind = PeerKind::Pod;

    fn addresses(pod: &Object<Self>) -> Box<[IpAddr]> {
        pod.ips()
    }
}

#[derive(Clone, Debug)]
struct Services;

impl Kind for Services {
    const NAME: &str = "Service";
    const PLURAL: &str = "services";
    type Spec = ServiceSpec;
    type Status = ServiceStatus;
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct ServiceSpec {
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    #[serde(rename = "externalIPs")]
    external_ips: Option<Vec<String>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ServiceStatus {
    load_balancer: Option<LoadBalancer>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct LoadBalancer {
    ingress: Option<Vec<Ingress>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Ingress {
    ip: Option<String>,
}

impl Addressed for Services {
    const PEER: PeerKind = PeerKind::Service;

    /// None of a headless one, whose cluster IP is the word `None`.
    fn addresses(service: &Object<Self>) -> Box<[IpAddr]> {
        let Object { spec, status, .. } = service;
        let balanced = status.load_balancer.iter().flat_map(|b| b.ingress.iter().flatten());
        addresses(
            spec.cluster_ip
                .iter()
                .chain(spec.cluster_ips.iter().flatten())
                .chain(spec.external_ips.iter().flatten())
                .chain(balanced.filter_map(|ingress| ingress.ip.as_ref())),
        )
    }
}

#[derive(Clone, Debug)]
struct Nodes;

impl Kind for Nodes {
    const NAME: &str = "Node";
    const PLURAL: &str = "nodes";
    type Spec = NodeSpec;
    type Status = NodeStatus;
}

/// Nothing of it is read.
#[derive(Clone, Debug, Default, Deserialize)]
struct NodeSpec {}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct NodeStatus {
    addresses: Option<Vec<NodeAddress>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct NodeAddress {
    address: String,
}

impl Addressed for Nodes {
    const PEER: PeerKind = PeerKind::Node;

    /// Those that are no host names.
    fn addresses(node: &Object<Self>) -> Box<[IpAddr]> {
        addresses(node.status.addresses.iter().flatten().map(|entry| &entry.address))
    }
}

/// All that claim addresses.
#[derive(Default)]
struct Table {
    objects: HashMap<(PeerKind, Key), Entry>,
    /// Counts the lists of each kind.
    lists: [u64; 3],
    state: PeerState,
}

struct Entry {
    ips: Box<[IpAddr]>,
    list: u64,
}

impl Table {
    /// Takes in a change. Whether there is anything to publish.
    fn take(&mut self, (kind, what): Change) -> bool {
        match what {
            What::Begin => {
                self.lists[kind as usize] += 1;
                false
            }
            What::There(key, ips) => self.there((kind, key), ips),
            What::Gone(key) => self.objects.remove(&(kind, key)).is_some(),
            What::Complete => {
                let list = self.lists[kind as usize];
                self.objects.retain(|(of, _), entry| *of != kind || entry.list == list);
                self.state.lists += 1;
                true
            }
            What::Failed(reason) => {
                if self.state.failures == 0 {
                    warn!(reason, "peers in the cluster cannot be watched: trying again");
                }
                self.state.failures += 1;
                self.state.last_failure = text(&reason).into();
                true
            }
        }
    }

    fn there(&mut self, key: (PeerKind, Key), ips: Box<[IpAddr]>) -> bool {
        let (list, full) = (self.lists[key.0 as usize], self.objects.len() >= MAX_OBJECTS);
        match self.objects.entry(key) {
            Slot::Occupied(known) if ips.is_empty() => {
                known.remove();
                true
            }
            Slot::Occupied(mut known) => {
                let known = known.get_mut();
                known.list = list;
                let changed = known.ips != ips;
                known.ips = ips;
                changed
            }
            Slot::Vacant(_) if ips.is_empty() => false,
            Slot::Vacant(_) if full => {
                self.state.refused += 1;
                true
            }
            Slot::Vacant(slot) => {
                slot.insert(Entry { ips, list });
                true
            }
        }
    }

    fn publication(&self) -> Peers {
        let mut by_ip: HashMap<IpAddr, Option<Arc<Peer>>> = HashMap::new();
        for ((kind, (namespace, name)), entry) in &self.objects {
            let peer = Peer { kind: *kind, namespace: namespace.clone(), name: name.clone() };
            let peer = Arc::new(peer);
            for ip in &entry.ips {
                let claimed = by_ip.contains_key(ip);
                by_ip.insert(*ip, (!claimed).then(|| Arc::clone(&peer)));
            }
        }
        let by_ip = by_ip.into_iter().filter_map(|(ip, peer)| Some((ip, peer?))).collect();
        Peers { by_ip, state: PeerState { objects: self.objects.len(), ..self.state.clone() } }
    }
}

#[cfg(test)]
#[path = "peers_tests.rs"]
mod tests;
