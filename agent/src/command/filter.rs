//! Which part of the node a command looks at: the options `--pid`, `--cgroup`, `--pod` and their like.

use std::path::{Path, PathBuf};

use anyhow::bail;

use super::{Usage, privacy::OptOut};
use crate::{
    follow::{Choice, Follower},
    pods::{Latest, Policy},
};

/// What to keep; the rest is filtered in the kernel.
#[derive(Clone, Debug, Default, clap::Args)]
// Every group of arguments has a name of its own.
#[group(id = "filter")]
pub struct Args {
    /// Only this process, by its PID on this node; a retransmit is its own once its sender is known
    #[arg(long, value_name = "PID", conflicts_with = "cgroup", value_parser = clap::value_parser!(u32).range(1..))]
    pub pid: Option<u32>,

    /// Only this cgroup (v2) and those below it; a path below its mount, or a full one
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<PathBuf>,

    /// Only this pod, also one that starts later. May be repeated
    #[arg(long = "pod", value_name = "NAMESPACE/NAME", conflicts_with_all = ["pid", "cgroup"])]
    pub pods: Vec<String>,

    /// Only pods of this namespace. May be repeated
    #[arg(long = "namespace", value_name = "NAME", conflicts_with_all = ["pid", "cgroup"])]
    pub namespaces: Vec<String>,

    /// Only pods with these labels, such as app=web,tier!=cache
    #[arg(long, value_name = "LABELS", conflicts_with_all = ["pid", "cgroup"])]
    pub selector: Option<String>,

    /// Only containers of this name in their pods, from when the name is known on. May be repeated
    #[arg(long = "container", value_name = "NAME", conflicts_with_all = ["pid", "cgroup"])]
    pub containers: Vec<String>,
}

impl Args {
    /// Whether pods are chosen by their names, which somebody has to tell then.
    #[must_use]
    pub fn by_pod(&self) -> bool {
        let Self { pods, namespaces, selector, containers, .. } = self;
        !(pods.is_empty() && namespaces.is_empty() && selector.is_none() && containers.is_empty())
    }

    /// Marks the chosen pods.
    ///
    /// # Errors
    ///
    /// If a choice cannot be read.
    pub fn policy(&self, policy: Policy) -> Result<Policy, Usage> {
        let chosen = policy.select(&self.pods, &self.namespaces, self.selector.as_deref());
        chosen.map_err(|e| Usage(e.to_string()))
    }

    /// What keeps the filter up to date, which also has it to start with.
    ///
    /// # Errors
    ///
    /// If there is no such process or cgroup, or nobody names pods though names are needed.
    pub fn resolve(&self, pods: Option<Latest>, opt_out: OptOut) -> anyhow::Result<Follower> {
        if let Some(pid) = self.pid
            && !Path::new(&format!("/proc/{pid}")).exists()
        {
            bail!("no process has PID {pid} on this node (it may have exited; see `ps -e`)");
        }
        if self.by_pod() && pods.is_none() {
            bail!(
                "nobody names pods: give --kubeconfig FILE, or run in a pod with a service account"
            );
        }
        let strict = opt_out == OptOut::Strict;
        if strict && pods.is_none() {
            bail!("--opt-out strict: nobody tells which pods opted out: give --kubeconfig FILE");
        }
        let choice = Choice {
            path: self.cgroup.clone(),
            selected_pods: self.by_pod(),
            containers: self.containers.clone(),
            pid: self.pid,
            strict,
        };
        Ok(Follower::new(choice, pods)?)
    }

    /// What is kept, in words; `None` for all.
    #[must_use]
    pub fn describe(&self) -> Option<String> {
        self.pid
            .map(|pid| format!("process {pid}"))
            .or_else(|| self.cgroup.as_ref().map(|path| format!("cgroup {}", path.display())))
            .or_else(|| self.by_pod().then(|| self.describe_pods()))
    }

    fn describe_pods(&self) -> String {
        let mut words = Vec::new();
        for (what, names) in
            [("pod", &self.pods), ("namespace", &self.namespaces), ("container", &self.containers)]
        {
            if !names.is_empty() {
                words.push(format!("{what} {}", names.join(" or ")));
            }
        }
        words.extend(self.selector.as_ref().map(|labels| format!("pods with {labels}")));
        words.join(", ")
    }
}
