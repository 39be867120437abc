//! Where the names of pods come from: the options `--kubernetes`, `--node-name` and their like.

use std::{env, fs, path::PathBuf};

use anyhow::bail;
use tracing::warn;

use super::Usage;
use crate::pods::{self, From, LabelList, Latest, LatestPeers, Policy};

/// Where container runtimes serve unless told otherwise: containerd, CRI-O, k3s.
const SOCKETS: [&str; 3] = [
    "/run/containerd/containerd.sock",
    "/run/crio/crio.sock",
    "/run/k3s/containerd/containerd.sock",
];

/// How to learn the names of pods.
#[derive(Clone, Debug, clap::Args)]
// Every group of arguments has a name of its own.
#[group(id = "kubernetes-options")]
pub struct Args {
    /// Who names pods: the API server, the container runtime (cri), whichever is there (auto), or
    /// nobody (off)
    #[arg(long, value_name = "SOURCE", env = "PODFLAME_KUBERNETES", value_enum, default_value_t = Mode::Auto)]
    pub kubernetes: Mode,

    /// Name of this node in its cluster [default: $NODE_NAME, or else the host's name]
    #[arg(long, value_name = "NAME", env = "PODFLAME_NODE_NAME")]
    pub node_name: Option<String>,

    /// Credentials for the API server; in a pod, its service account has them
    #[arg(long, value_name = "FILE", env = "KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,

    /// Socket of the container runtime; asked for pods by --kubernetes cri
    #[arg(long, value_name = "PATH", env = "PODFLAME_CRI_SOCKET")]
    pub cri_socket: Option<PathBuf>,

    /// Labels of pods to show: keys separated by commas, each of which may end with *
    #[arg(long, value_name = "KEYS", env = "PODFLAME_LABELS", default_value = pods::DEFAULT_LABELS)]
    pub labels: String,

    /// Which peers of retransmits get names: pods of this node, or all pods, Services and nodes of
    /// the cluster, which takes the permission to list them and a watch of each
    #[arg(long, value_name = "SCOPE", env = "PODFLAME_PEERS", value_enum, default_value_t = Scope::Node)]
    pub peers: Scope,
}

/// Whose addresses get names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Scope {
    /// Those of the pods of this node.
    Node,
    /// Those of the whole cluster.
    Cluster,
}

/// Who names pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// The API server if there are credentials for it, or else a socket that is given.
    Auto,
    /// The API server.
    Api,
    /// The container runtime.
    Cri,
    /// Nobody.
    Off,
}

impl Args {
    /// What to keep of pods.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy::new(LabelList::from(self.labels.as_str()))
    }

    /// Starts to watch; `None` if nobody names pods.
    ///
    /// # Errors
    ///
    /// If what was asked for cannot be used.
    pub async fn watch(&self, policy: Policy) -> anyhow::Result<Option<Latest>> {
        let in_pod = env::var_os("KUBERNETES_SERVICE_HOST").is_some();
        let api = || -> anyhow::Result<From> {
            Ok(From::Api { kubeconfig: self.kubeconfig.clone(), node: self.node()? })
        };
        let from = match (self.kubernetes, &self.cri_socket) {
            (Mode::Off, _) => return Ok(None),
            (Mode::Api, _) => api()?,
            (Mode::Auto, _) if in_pod || self.kubeconfig.is_some() => api()?,
            (Mode::Cri | Mode::Auto, Some(socket)) => {
                From::Cri { socket: socket.clone(), node: self.node()? }
            }
            (Mode::Cri, None) => {
                let found = SOCKETS.iter().map(PathBuf::from).find(|path| path.exists());
                let none = || Usage(format!("--cri-socket: none is at {}", SOCKETS.join(" or ")));
                From::Cri { socket: found.ok_or_else(none)?, node: self.node()? }
            }
            (Mode::Auto, None) => return Ok(None),
        };
        match pods::watch(from, policy).await {
            Ok(latest) => Ok(Some(latest)),
            Err(e) if self.kubernetes == Mode::Auto => {
                warn!("pods get no names: {e}");
                Ok(None)
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Starts to watch the whole cluster for its addresses, if that was asked for.
    ///
    /// # Errors
    ///
    /// If there are no credentials for the API server.
    pub async fn watch_peers(&self) -> anyhow::Result<Option<LatestPeers>> {
        match self.peers {
            Scope::Node => Ok(None),
            Scope::Cluster => Ok(Some(pods::watch_peers(self.kubeconfig.as_deref()).await?)),
        }
    }

    /// The node's name: given, or the host's, which is kubelet's default.
    fn node(&self) -> anyhow::Result<String> {
        let given = self.node_name.clone().or_else(|| env::var("NODE_NAME").ok());
        let name = match given {
            Some(name) => name,
            None => fs::read_to_string("/proc/sys/kernel/hostname")
                .map(|name| name.trim().to_lowercase())
                .unwrap_or_default(),
        };
        // It becomes part of a field selector, where these separate.
        let clean = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
        if name.is_empty() || !name.chars().all(clean) {
            bail!(Usage(format!("--node-name {name:?}: that is no name of a node")));
        }
        Ok(name)
    }
}
