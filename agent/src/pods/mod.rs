//! The pods of this node, by the UIDs and container IDs that cgroup paths hold: their names, owners,
//! labels and addresses, from the Kubernetes API server or from the container runtime.
//!
//! One task, on a thread of its own, owns the [`table`] and publishes it whole ([`Pods`]): readers
//! take what is current and wait for nobody. A list of thousands of pods is parsed there, and never
//! keeps the collector from its ring buffer. Nothing here decides what an event is charged to: that
//! is [`crate::attribute`]'s, which only looks up names by UID.
//!
//! Beside it, who has an address anywhere in the cluster ([`Peers`]), where that is asked for.
//!
//! What the API server says is as hostile as any input: every text and every list is bounded here,
//! and escaped where it is shown.

mod api;
mod cri;
mod object;
mod owner;
mod pause;
mod peers;
mod policy;
mod selector;
mod table;

use std::{net::IpAddr, path::PathBuf, sync::Arc, thread, time::Duration};

use hashbrown::HashSet;
use tokio::sync::watch;
use tracing::warn;

pub use self::{
    peers::{LatestPeers, PeerState, Peers, watch_peers},
    policy::{DEFAULT_LABELS, LabelList, Policy, SelectError},
};
use crate::profile::{ContainerKind, Owner, Source};

/// Longest text kept of anything that a pod is described with, in bytes: names of Kubernetes have at
/// most 253 characters. Longer text is cut.
const MAX_TEXT: usize = 256;

/// How soon a change is published. Changes come in bursts; each publication copies an index of all
/// pods, about 0.1 ms for a thousand.
const PUBLISH_DELAY: Duration = Duration::from_millis(20);

/// How often pods that are gone are looked at, to be forgotten.
const PRUNE_INTERVAL: Duration = Duration::from_secs(5);

/// A watch that did not fail for so long works again, also if it told nothing: longer than the
/// longest pause between two attempts.
const RECOVERED: Duration = Duration::from_secs(90);

/// How long the first list may take before a caller goes on without names.
pub const FIRST_LIST: Duration = Duration::from_secs(10);

/// A pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// UID in the paths of its cgroups: that of the pod, or the hash of its configuration if it is
    /// a static pod.
    pub uid: Box<str>,
    /// Namespace.
    pub namespace: Box<str>,
    /// Name.
    pub name: Box<str>,
    /// What a person deployed.
    pub owner: Owner,
    /// Labels on the allow-list, by key.
    pub labels: Box<[(Box<str>, Box<str>)]>,
    /// Quality-of-service class.
    pub qos: Box<str>,
    /// Name of its node.
    pub node: Box<str>,
    /// Its own addresses: none if it has ended, or uses those of its node.
    pub ips: Box<[IpAddr]>,
    /// Its containers, also those that ended not long ago.
    pub containers: Box<[Container]>,
    /// It may be profiled.
    pub profiled: bool,
    /// It is one of those that a command asked for.
    pub selected: bool,
    /// Who told of it.
    pub source: Source,
}

/// A container of a pod: one start of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Container {
    /// 64 hexadecimal digits.
    pub id: Box<str>,
    /// Name in the pod.
    pub name: Box<str>,
    /// Image as the runtime names it.
    pub image: Box<str>,
    /// What it is to the pod.
    pub kind: ContainerKind,
    /// How often it had been restarted before.
    pub restarts: u32,
}

impl Pod {
    /// The container of that ID.
    #[must_use]
    pub fn container(&self, id: &str) -> Option<&Container> {
        self.containers.iter().find(|container| &*container.id == id)
    }
}

/// What is known of the pods at one moment.
#[derive(Clone, Debug, Default)]
pub struct Pods {
    by_uid: table::ByUid,
    by_ip: table::ByIp,
    /// Namespaces that opted out.
    except: Arc<HashSet<Box<str>>>,
    /// How the source does.
    pub state: State,
}

impl Pods {
    /// The pod whose cgroups have that UID.
    #[must_use]
    pub fn by_uid(&self, uid: &str) -> Option<&Arc<Pod>> {
        self.by_uid.get(uid)
    }

    /// The pod that has that address now.
    #[must_use]
    pub fn by_ip(&self, ip: IpAddr) -> Option<&Arc<Pod>> {
        self.by_ip.get(&ip.to_canonical())
    }

    /// Whether neither the pod nor its namespace opted out.
    #[must_use]
    pub fn is_profiled(&self, pod: &Pod) -> bool {
        pod.profiled && !self.except.contains(&pod.namespace)
    }

    /// Every pod, those included that are gone but not forgotten.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Pod>> {
        self.by_uid.values()
    }
}

/// How the source of names does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Which one it is.
    pub source: Source,
    /// What it does.
    pub phase: Phase,
    /// Pods known, those included that are gone but not forgotten.
    pub pods: usize,
    /// Whole lists taken.
    pub lists: u64,
    /// Changes taken.
    pub changes: u64,
    /// Attempts that failed.
    pub failures: u64,
    /// Why the last attempt failed, also if a later one did not.
    pub last_failure: String,
    /// Pods left out because the table was full.
    pub refused: u64,
}

/// What a source of names does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// There is none.
    #[default]
    Off,
    /// Nothing was heard of it yet.
    Connecting,
    /// It told all there is, and tells what changes.
    Watching,
    /// It cannot be reached, or refuses; what was known before stays.
    Failing,
}

impl Phase {
    /// The word users see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Connecting => "connecting",
            Self::Watching => "watching",
            Self::Failing => "failing",
        }
    }
}

/// Where names come from.
#[derive(Clone, Debug)]
pub enum From {
    /// The API server.
    Api {
        /// Credentials; those of the pod's service account if not given.
        kubeconfig: Option<PathBuf>,
        /// The node whose pods are watched.
        node: String,
    },
    /// The container runtime.
    Cri {
        /// Its socket.
        socket: PathBuf,
        /// The name of the node.
        node: String,
    },
}

/// Why a source of names cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No credentials.
    #[error(
        "credentials for the Kubernetes API server: {0} (in a pod, mount its service account; \
         elsewhere give --kubeconfig FILE; or --kubernetes off)"
    )]
    Credentials(String),
    /// No thread.
    #[error("start the thread that watches pods: {0}")]
    Thread(#[from] std::io::Error),
}

/// The latest [`Pods`]. The watch ends when every clone of it is gone.
pub type Latest = watch::Receiver<Arc<Pods>>;

/// Starts to watch.
///
/// # Errors
/// When there are no credentials, or no thread.
pub async fn watch(from: From, policy: Policy) -> Result<Latest, Error> {
    let (publish, latest) = watch::channel(Arc::new(Pods::default()));
    match from {
        From::Api { kubeconfig, node } => {
            let config = api::config(kubeconfig.as_deref()).await?;
            let publisher = Publisher::new(publish, Source::Api);
            let watching = api::run(config, node, policy, publisher);
            spawn(watching)?;
        }
        From::Cri { socket, node } => {
            spawn(cri::run(socket, node, policy, Publisher::new(publish, Source::Cri)))?;
        }
    }
    Ok(latest)
}

fn spawn(watching: impl Future<Output = ()> + Send + 'static) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("pods".to_owned()).spawn(move || {
        runtime.block_on(watching);
        runtime.shutdown_background();
    })?;
    Ok(())
}

/// Waits until every pod there is was told of, at most [`FIRST_LIST`]. Whether that came to pass.
pub async fn first_list(latest: &mut Latest) -> bool {
    let told = async { latest.wait_for(|pods| pods.state.phase == Phase::Watching).await.is_ok() };
    let told = tokio::time::timeout(FIRST_LIST, told).await.unwrap_or_default();
    if !told {
        let reason = latest.borrow().state.last_failure.clone();
        warn!(reason, "no list of pods yet: names will come later");
    }
    told
}

/// The writing end: a table, and who reads it.
struct Publisher {
    table: table::Table,
    state: State,
    /// Namespaces that opted out; `None` until they were listed, or could not be.
    except: Option<Arc<HashSet<Box<str>>>>,
    publish: watch::Sender<Arc<Pods>>,
    /// When the last attempt failed.
    failed: Option<std::time::Instant>,
    /// When what changed is to be published.
    due: Option<tokio::time::Instant>,
}

impl Publisher {
    fn new(publish: watch::Sender<Arc<Pods>>, source: Source) -> Self {
        let state = State { source, phase: Phase::Connecting, ..State::default() };
        let mut new = Self {
            table: table::Table::default(),
            state,
            except: None,
            publish,
            failed: None,
            due: None,
        };
        new.publish();
        new
    }

    /// Something changed.
    fn touch(&mut self) {
        self.due.get_or_insert_with(|| tokio::time::Instant::now() + PUBLISH_DELAY);
    }

    fn failed(&mut self, reason: &str) {
        self.state.phase = Phase::Failing;
        self.state.failures += 1;
        self.state.last_failure = text(reason).into();
        self.failed = Some(std::time::Instant::now());
        self.touch();
    }

    fn publish(&mut self) {
        self.due = None;
        self.state.refused = self.table.refused();
        self.state.pods = self.table.len();
        let (by_uid, by_ip) = self.table.index();
        let except = self.except.clone().unwrap_or_default();
        let state = self.state.clone();
        self.publish.send_replace(Arc::new(Pods { by_uid, by_ip, except, state }));
    }

    /// Does what is due until something of the source comes: publishes, and forgets the dead.
    /// `None` when nobody listens any more.
    async fn until<T>(&mut self, next: impl Future<Output = T>) -> Option<T> {
        let mut next = std::pin::pin!(next);
        loop {
            let due = self.due;
            let publishing = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = self.publish.closed() => return None,
                () = publishing => self.publish(),
                next = &mut next => return Some(next),
                () = tokio::time::sleep(PRUNE_INTERVAL) => {
                    let now = std::time::Instant::now();
                    let recovered = self.state.lists > 0
                        && self.failed.is_some_and(|at| now.duration_since(at) > RECOVERED);
                    if recovered {
                        self.state.phase = Phase::Watching;
                        self.failed = None;
                    }
                    if self.table.prune(now) || recovered {
                        self.touch();
                    }
                }
            }
        }
    }
}

/// A text from outside, of at most [`MAX_TEXT`] bytes.
fn text(text: &str) -> &str {
    text.get(..text.floor_char_boundary(MAX_TEXT)).unwrap_or_default()
}

#[cfg(test)]
mod tests;
