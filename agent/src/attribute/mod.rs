//! What an event is charged to: from a cgroup ID and a process to a [`Workload`].
//!
//! A pod is its UID here; [`Namer`] joins it with what the API server says of that UID.
//!
//! The cgroup decides where its path names a pod, a container or a systemd unit. Where it does not
//! (a cgroup v1 or hybrid machine, where tasks are in the root of cgroup2), the process's own path
//! in any hierarchy decides, taken while it was alive and guarded by its start time. Else the event
//! is charged to the kernel, or to the process by its executable, or to nobody with the reason.
//!
//! An event is never charged to a pod on a guess: a process stands in for a cgroup only where the
//! event's cgroup is the one that the process was in, or where the event has no cgroup, or where
//! this machine's cgroup2 is not mounted or not to be seen.

pub mod cgroups;
mod engine;
mod lru;
mod name;
pub mod path;
mod process;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use hashbrown::HashSet;

use self::{cgroups::Cgroups, engine::Engines, lru::Lru, path::CgroupName};
pub use self::{
    cgroups::{Error, descendants},
    name::Namer,
    process::{Facts, read as facts},
};
use crate::{
    event::{CgroupId, Comm, ProcessKey},
    profile::{Confidence, Source, Workload, WorkloadKind},
};

/// Processes and cgroups remembered. Each costs about 300 bytes, beside the paths.
const CAPACITY: usize = 16_384;

/// Distinct workloads kept for sharing.
const MAX_WORKLOADS: usize = 16_384;

/// An answer that rests on a process is looked at again after this: a container's first process
/// starts outside of its cgroup and is moved in. One that names a pod is final.
const PROCESS_AGE: Duration = Duration::from_secs(10);

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// The table of cgroups.
    pub cgroups: cgroups::Stats,
    /// Distinct workloads that are shared.
    pub workloads: usize,
    /// Processes remembered.
    pub processes: usize,
    /// Processes and cgroups forgotten to stay within bounds.
    pub evicted: u64,
    /// Answers that charged nobody.
    pub unattributed: u64,
}

/// The single owner of everything known about cgroups and processes.
#[derive(Debug)]
pub struct Attributor {
    cgroups: Cgroups,
    /// Workloads of cgroups whose path names one. The ID is enough of a key: it is never reused.
    named: Lru<CgroupId, Arc<Workload>>,
    /// Facts by PID and start time, as a PID alone is reused.
    facts: Lru<ProcessKey, Facts>,
    processes: Lru<Charge, Answer>,
    engines: Engines,
    workloads: HashSet<Arc<Workload>>,
    unattributed: u64,
}

/// What an answer that rests on a process is kept under: the process with its start time, as PIDs
/// are reused, and the cgroup, as a process acts for sockets of others and can be moved. The
/// executable changes under the same key and is compared at every hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Charge {
    cgroup: CgroupId,
    process: ProcessKey,
}

#[derive(Debug)]
struct Answer {
    executable: Option<Box<str>>,
    at: Instant,
    workload: Arc<Workload>,
}

impl Attributor {
    /// Learns the cgroups there are. Works without a cgroup2 mount too, from processes alone.
    #[must_use]
    pub fn new() -> Self {
        Self {
            cgroups: Cgroups::new(),
            named: Lru::new(CAPACITY),
            facts: Lru::new(CAPACITY),
            processes: Lru::new(CAPACITY),
            engines: Engines::default(),
            workloads: HashSet::new(),
            unattributed: 0,
        }
    }

    /// Keeps the [`facts`] of a process, which were read while it was alive, as far as its cgroup does
    /// not say enough. To be called at its first event, with the cgroup of that event.
    pub fn sight(&mut self, process: ProcessKey, cgroup: CgroupId, facts: Facts) {
        if !matches!(self.place(cgroup), Place::Named(_)) {
            self.facts.insert(process, facts);
        }
    }

    /// A cgroup was made, and has that path below the mount: its events may ask for it when it is
    /// gone.
    pub fn made(&mut self, cgroup: CgroupId, path: Arc<str>) {
        self.cgroups.made(cgroup, path);
    }

    /// What an event is charged to. `executable` is the path of the process's program as far as it
    /// is known; its last part names a process that nothing else names.
    pub fn workload(
        &mut self,
        cgroup: CgroupId,
        process: ProcessKey,
        comm: Comm,
        executable: Option<&str>,
    ) -> Arc<Workload> {
        if let Some(workload) = self.named.get(&cgroup) {
            return Arc::clone(workload);
        }
        let key = Charge { cgroup, process };
        let workload = match self.processes.get(&key) {
            Some(answer) if answer.holds(executable) => Arc::clone(&answer.workload),
            _ => match self.place(cgroup) {
                Place::Named(workload) => workload,
                Place::Bare(path) => {
                    let workload = self.by_process(&path, process, comm, executable);
                    if !matches!(path, Err(Error::Later(_))) {
                        let answer = Answer::new(executable, &workload);
                        self.processes.insert(key, answer);
                    }
                    workload
                }
            },
        };
        self.unattributed += u64::from(workload.kind == WorkloadKind::Unattributed);
        workload
    }

    /// What happened so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            cgroups: self.cgroups.stats(),
            workloads: self.workloads.len(),
            processes: self.facts.len(),
            evicted: self.named.evicted() + self.facts.evicted() + self.processes.evicted(),
            unattributed: self.unattributed,
        }
    }

    /// What the cgroup alone says.
    fn place(&mut self, cgroup: CgroupId) -> Place {
        if let Some(workload) = self.named.get(&cgroup) {
            return Place::Named(Arc::clone(workload));
        }
        let path = self.cgroups.path(cgroup);
        let Some(workload) = path.as_deref().ok().and_then(by_path) else {
            return Place::Bare(path);
        };
        let workload = self.engines.name(workload);
        let workload = self.intern(workload);
        self.named.insert(cgroup, Arc::clone(&workload));
        Place::Named(workload)
    }

    /// What the process says, in a cgroup that says nothing.
    fn by_process(
        &mut self,
        path: &Result<Arc<str>, Error>,
        process: ProcessKey,
        comm: Comm,
        executable: Option<&str>,
    ) -> Arc<Workload> {
        if process.pid == 0 && comm.0.starts_with(b"swapper/") {
            return self.intern(kernel());
        }
        self.read_facts(process);
        let facts = self.facts.get(&process);
        let cgroup_path = path.as_deref().unwrap_or_default().to_owned();
        let from_facts = facts.and_then(|facts| {
            let speaks = match path {
                Ok(path) => is_same(path, &facts.cgroups.unified),
                Err(Error::Gone(_) | Error::Later(_)) => false,
                Err(_) => true,
            };
            let named = if speaks { by_path(&facts.cgroups.telling) } else { None };
            let named = named.map(|workload| Workload {
                source: Source::Process,
                confidence: Confidence::Inferred,
                ..workload
            });
            let named = named.map(|workload| self.engines.name(workload));
            named.or_else(|| facts.kernel_thread.then(kernel))
        });
        let workload = match (from_facts, path, executable.and_then(base_name)) {
            (Some(workload), ..) => workload,
            (None, Err(error @ (Error::Gone(_) | Error::Later(_))), _) => {
                unattributed(error.to_string(), cgroup_path)
            }
            (None, _, Some(name)) => Workload {
                kind: WorkloadKind::Process,
                name: name.to_owned(),
                cgroup_path,
                source: Source::Process,
                confidence: Confidence::Inferred,
                ..Workload::default()
            },
            (None, _, None) => unattributed(self.reason(process), cgroup_path),
        };
        self.intern(workload)
    }

    /// Why a process without an executable stays without a name.
    fn reason(&mut self, process: ProcessKey) -> String {
        let reason = if process.pid == 0 {
            "neither the cgroup names a workload nor is the process known"
        } else if self.facts.get(&process).is_some() {
            "the cgroup names no workload, and the executable of the process could not be read"
        } else {
            "the process exited before its cgroup or executable could be read"
        };
        reason.to_owned()
    }

    /// Reads the facts anew; those of a process that is gone stay.
    fn read_facts(&mut self, process: ProcessKey) {
        if let Some(facts) = process::read(process) {
            self.facts.insert(process, facts);
        }
    }

    /// The one copy of that workload. Those that nothing else holds make room for new ones.
    fn intern(&mut self, workload: Workload) -> Arc<Workload> {
        if let Some(known) = self.workloads.get(&workload) {
            return Arc::clone(known);
        }
        if self.workloads.len() >= MAX_WORKLOADS {
            self.workloads.retain(|known| Arc::strong_count(known) > 1);
        }
        let workload = Arc::new(workload);
        if self.workloads.len() < MAX_WORKLOADS {
            self.workloads.insert(Arc::clone(&workload));
        }
        workload
    }
}

impl Default for Attributor {
    fn default() -> Self {
        Self::new()
    }
}

impl Answer {
    fn new(executable: Option<&str>, workload: &Arc<Workload>) -> Self {
        let executable = executable.map(Box::from);
        Self { executable, at: Instant::now(), workload: Arc::clone(workload) }
    }

    /// Whether it still answers for a process of that executable. One that is not known now does
    /// not contradict.
    fn holds(&self, executable: Option<&str>) -> bool {
        let same = executable.is_none() || executable == self.executable.as_deref();
        let last = matches!(self.workload.kind, WorkloadKind::Pod | WorkloadKind::Kernel);
        same && (last || self.at.elapsed() < PROCESS_AGE)
    }
}

/// What a cgroup alone says.
enum Place {
    /// It names a workload.
    Named(Arc<Workload>),
    /// Its path, or why there is none.
    Bare(Result<Arc<str>, Error>),
}

/// Whether a path below the mount and one of `/proc/PID/cgroup` are the same. Both can be relative
/// to a cgroup namespace, in which the root of all is shown as a row of `..`.
fn is_same(path: &str, shown: &str) -> bool {
    path == shown || (path == "/" && shown.split('/').all(|name| name.is_empty() || name == ".."))
}

/// The workload that a path names.
fn by_path(path: &str) -> Option<Workload> {
    let name = path::parse(path);
    let (kind, word) = match &name {
        CgroupName { pod_uid: Some(uid), container_id: Some(id), .. } => {
            (WorkloadKind::Pod, format!("pod/{uid}/{}", short(id)))
        }
        CgroupName { pod_uid: Some(uid), .. } => (WorkloadKind::Pod, format!("pod/{uid}")),
        CgroupName { container_id: Some(id), .. } => {
            (WorkloadKind::Container, format!("container/{}", short(id)))
        }
        // A user names their own units as they like: the manager tells them from the system's.
        CgroupName { unit: Some(unit), user_manager: Some(manager), .. } if unit != manager => {
            (WorkloadKind::Unit, format!("{manager}/{unit}"))
        }
        CgroupName { unit: Some(unit), .. } => (WorkloadKind::Unit, (*unit).to_owned()),
        _ => return None,
    };
    Some(Workload {
        kind,
        name: word,
        pod_uid: name.pod_uid.unwrap_or_default().into_owned(),
        container_id: name.container_id.unwrap_or_default().to_owned(),
        unit: name.unit.unwrap_or_default().to_owned(),
        cgroup_path: path.to_owned(),
        source: Source::Cgroup,
        confidence: Confidence::Certain,
        ..Workload::default()
    })
}

/// The first digits of a container's ID, as its tools show it.
fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// The kernel's own threads are one workload; the thread's name is with every sample.
fn kernel() -> Workload {
    Workload {
        kind: WorkloadKind::Kernel,
        name: "kernel".to_owned(),
        source: Source::Kernel,
        confidence: Confidence::Certain,
        ..Workload::default()
    }
}

fn unattributed(reason: String, cgroup_path: String) -> Workload {
    let name = "unattributed".to_owned();
    Workload { name, unattributed: reason, cgroup_path, ..Workload::default() }
}

/// The file's name in a path, also of one that was deleted since.
fn base_name(path: &str) -> Option<&str> {
    let path = path.strip_suffix(" (deleted)").unwrap_or(path);
    path.rsplit('/').next().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
