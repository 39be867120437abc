//! What leaves the agent: resolved samples, dictionary-coded, in batches.
//!
//! One owner (the resolver) fills the [`Dictionary`]; everyone else holds replicas built from the
//! [`Additions`] that batches carry. IDs are dense, start at 0 and are valid within one generation.

use std::{net::SocketAddr, sync::Arc};

use hashbrown::HashMap;

use crate::{
    account::Account,
    event::{Cause, KTime, StackEnd},
};

/// A kind of measurement, as users choose it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Signal {
    /// Time on a CPU, in nanoseconds.
    Cpu,
    /// Page faults, minor and major.
    PageFault,
    /// TCP retransmits; `count` is hits of the tracepoint, `weight` segments.
    Retransmit,
}

impl Signal {
    /// Every signal.
    pub const ALL: [Self; 3] = [Self::Cpu, Self::PageFault, Self::Retransmit];

    /// The name users type.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::PageFault => "page-fault",
            Self::Retransmit => "retransmit",
        }
    }

    /// The unit of [`Sample::weight`].
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Self::Cpu => "nanoseconds",
            Self::PageFault => "faults",
            Self::Retransmit => "segments",
        }
    }
}

macro_rules! ids {
    ($($(#[$meta:meta])* $name:ident;)*) => { $(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub u32);
    )* };
}

ids! {
    /// Index of a string. 0 is the empty string.
    StringId;
    /// Index of a [`Mapping`].
    MappingId;
    /// Index of a [`Function`].
    FunctionId;
    /// Index of a [`Frame`].
    FrameId;
    /// Index of a stack.
    StackId;
    /// Index of a [`Workload`].
    WorkloadId;
}

/// A file that code or data was mapped from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mapping {
    /// Its path as the process sees it, or a name in brackets as in `/proc/PID/maps`.
    pub path: StringId,
    /// Its GNU build ID in hexadecimal, empty if it has none.
    pub build_id: StringId,
}

/// A function.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Function {
    /// Its name, demangled.
    pub name: StringId,
    /// Its source file, empty if unknown.
    pub file: StringId,
    /// Where its code is.
    pub mapping: MappingId,
}

/// What a frame stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FrameKind {
    /// Code in user space.
    User,
    /// Code of the kernel.
    Kernel,
    /// No code, but what the event is about: a peer, a file that faulted, a reason.
    Annotation,
    /// Python code, which stands where its interpreter ran it.
    Python,
}

/// One level of a stack.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Frame {
    /// The function; for an unknown one its name says why.
    pub function: FunctionId,
    /// Source line, 0 if unknown.
    pub line: u32,
    /// Offset in the file, kept only where no function is known, so that a backend can finish.
    pub offset: u64,
    /// What it stands for.
    pub kind: FrameKind,
    /// The compiler put this function into the next outer one.
    pub inlined: bool,
    /// It was found by frame pointer, because the code that it called has no unwind table: if that code
    /// kept no frame pointer, this is not its caller.
    pub by_frame_pointer: bool,
}

/// What an event is charged to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Workload {
    /// Which of the fields below speak.
    pub kind: WorkloadKind,
    /// One word for a person: pod and container, unit, or executable.
    pub name: String,
    /// Namespace of the pod, empty if unknown.
    pub namespace: String,
    /// Name of the pod, empty if unknown.
    pub pod: String,
    /// Name of the container in its pod, or of one outside Kubernetes; empty if unknown.
    pub container: String,
    /// What the container is to its pod.
    pub container_kind: ContainerKind,
    /// Image of the container as its owner wrote it, empty if unknown.
    pub image: String,
    /// How often the container had been restarted when this one began.
    pub restarts: u32,
    /// What a person deployed: kind (`Deployment`) and name of the pod's outermost owner; empty if
    /// there is none, or it is not known.
    pub owner: Owner,
    /// Labels of the pod that are on the allow-list, by key.
    pub labels: Vec<(String, String)>,
    /// Quality-of-service class of the pod, empty if unknown.
    pub qos: String,
    /// Name of the node in its cluster, empty off Kubernetes.
    pub node: String,
    /// Pod UID, empty off Kubernetes.
    pub pod_uid: String,
    /// Container ID (64 hexadecimal digits), empty outside containers.
    pub container_id: String,
    /// systemd unit, empty if there is none.
    pub unit: String,
    /// Path of the cgroup below its mount, empty if unknown.
    pub cgroup_path: String,
    /// Why the event is charged to nobody, empty otherwise.
    pub unattributed: String,
    /// Who gave the names.
    pub source: Source,
    /// How sure it is that the event is this workload's.
    pub confidence: Confidence,
}

impl Workload {
    /// Bytes of all its texts.
    #[must_use]
    pub fn text_bytes(&self) -> usize {
        let texts = [
            &self.name,
            &self.namespace,
            &self.pod,
            &self.container,
            &self.image,
            &self.owner.kind,
            &self.owner.name,
            &self.qos,
            &self.node,
            &self.pod_uid,
            &self.container_id,
            &self.unit,
            &self.cgroup_path,
            &self.unattributed,
        ];
        let labels: usize = self.labels.iter().map(|(key, value)| key.len() + value.len()).sum();
        labels + texts.iter().map(|text| text.len()).sum::<usize>()
    }

    /// Whether both are the same container or pod, whatever its names.
    #[must_use]
    pub fn is_same_place(&self, other: &Self) -> bool {
        let key = |w: &Self| (w.kind, w.confidence);
        key(self) == key(other)
            && (&self.pod_uid, &self.container_id, &self.cgroup_path)
                == (&other.pod_uid, &other.container_id, &other.cgroup_path)
            && !(self.pod_uid.is_empty() && self.container_id.is_empty())
    }
}

impl ContainerKind {
    /// The word users see; `None` for what is not known.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::Unknown => None,
            Self::App => Some("app"),
            Self::Init => Some("init"),
            Self::Sidecar => Some("sidecar"),
            Self::Ephemeral => Some("ephemeral"),
            Self::Sandbox => Some("sandbox"),
        }
    }
}

impl Source {
    /// The word users see; `None` for nobody.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Cgroup => Some("cgroup"),
            Self::Process => Some("process"),
            Self::Kernel => Some("kernel"),
            Self::Api => Some("api"),
            Self::Cri => Some("cri"),
            Self::Engine => Some("engine"),
        }
    }
}

impl Confidence {
    /// The word users see; `None` for none.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Inferred => Some("inferred"),
            Self::Certain => Some("certain"),
        }
    }
}

/// What made a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Owner {
    /// Its kind, such as `Deployment`.
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// What a container is to its pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ContainerKind {
    /// Not known, or not in a pod.
    #[default]
    Unknown,
    /// What the pod is for.
    App,
    /// Runs to its end before the app starts.
    Init,
    /// Starts before the app and stays beside it.
    Sidecar,
    /// Put into a running pod to look into it.
    Ephemeral,
    /// Holds the pod's namespaces (the pause container).
    Sandbox,
}

/// Who gave a workload its names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Source {
    /// Nobody.
    #[default]
    None,
    /// The path of the cgroup alone.
    Cgroup,
    /// The process: its executable, or its path in a cgroup v1 hierarchy.
    Process,
    /// The kernel: the thread is its own.
    Kernel,
    /// The Kubernetes API server.
    Api,
    /// The container runtime's CRI socket.
    Cri,
    /// The files of a container engine outside Kubernetes.
    Engine,
}

/// How sure an attribution is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Confidence {
    /// Nothing is known.
    #[default]
    None,
    /// It follows from the process, which can have been moved or have acted for another.
    Inferred,
    /// The kernel's own record names the cgroup, or the kernel itself.
    Certain,
}

/// What kind of thing a [`Workload`] is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WorkloadKind {
    /// It cannot be known; `unattributed` says why.
    #[default]
    Unattributed,
    /// A container of a pod.
    Pod,
    /// A container outside Kubernetes.
    Container,
    /// A systemd unit.
    Unit,
    /// A process outside all of these, by its executable.
    Process,
    /// The kernel's own threads.
    Kernel,
}

impl WorkloadKind {
    /// The word that users see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unattributed => "unattributed",
            Self::Pod => "pod",
            Self::Container => "container",
            Self::Unit => "unit",
            Self::Process => "process",
            Self::Kernel => "kernel",
        }
    }
}

/// Events alike in everything but time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sample {
    /// What was measured.
    pub signal: Signal,
    /// What is charged.
    pub workload: WorkloadId,
    /// Process ID in the initial PID namespace, 0 if unknown.
    pub pid: u32,
    /// Name of the thread.
    pub comm: StringId,
    /// The stack.
    pub stack: StackId,
    /// How many events.
    pub count: u64,
    /// Sum of their weights, in the signal's unit.
    pub weight: u64,
}

/// An event that is told one by one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Occurrence {
    /// When.
    pub time: KTime,
    /// What is charged.
    pub workload: WorkloadId,
    /// Process ID, 0 if unknown.
    pub pid: u32,
    /// Thread ID, 0 if unknown.
    pub tid: u32,
    /// Name of the thread.
    pub comm: StringId,
    /// The stack.
    pub stack: StackId,
    /// Why its user part ended.
    pub stack_end: StackEnd,
    /// What happened.
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// TCP sent a segment again.
    Retransmit {
        /// The end on this node.
        local: SocketAddr,
        /// The other end.
        remote: SocketAddr,
        /// What made TCP send again.
        cause: Cause,
        /// TCP state, 1 for established.
        state: u8,
        /// Smoothed round-trip time in microseconds.
        srtt_us: u32,
        /// Congestion window in segments.
        cwnd: u32,
        /// Inode number of the network namespace.
        netns: u32,
        /// Segments sent again; 0 if the kernel tried and could not, which it tells since 6.17.
        segments: u64,
        /// Age of the sender's stack in nanoseconds; `None` while no sender is known.
        sender_age_ns: Option<u64>,
    },
    /// A page had to be read from storage.
    MajorFault {
        /// The address.
        address: u64,
        /// The file or region it is in.
        mapping: MappingId,
        /// Offset in that file, or in the region.
        offset: u64,
    },
}

/// Entries that are new since the last batch of the same generation, in the order of their IDs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Additions {
    /// Strings.
    pub strings: Vec<Arc<str>>,
    /// Mappings.
    pub mappings: Vec<Mapping>,
    /// Functions.
    pub functions: Vec<Function>,
    /// Frames.
    pub frames: Vec<Frame>,
    /// Stacks, innermost frame first.
    pub stacks: Vec<Arc<[FrameId]>>,
    /// Workloads.
    pub workloads: Vec<Arc<Workload>>,
    /// Workloads of this generation whose names became known or changed: each replaces its entry,
    /// for what was charged before too. To be applied after `workloads`.
    pub renamed: Vec<(WorkloadId, Arc<Workload>)>,
}

/// One flush of the agent.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Counts the batches of this agent from 1.
    pub sequence: u64,
    /// The generation of the dictionary. When it changes, earlier IDs are void.
    pub generation: u64,
    /// Start of the flush.
    pub start: KTime,
    /// End of the flush; the next one starts here.
    pub end: KTime,
    /// New entries of the dictionary.
    pub additions: Arc<Additions>,
    /// What was sampled.
    pub samples: Vec<Sample>,
    /// What was told one by one, in the order of time.
    pub occurrences: Vec<Occurrence>,
    /// Occurrences left out because a flush holds a bounded number; their events are in `samples`.
    pub occurrences_lost: u64,
    /// All counts since the agent started.
    pub account: Account,
}

/// A replica of the dictionary of one generation: tables by ID.
#[derive(Clone, Debug, Default)]
pub struct Dictionary {
    /// The generation these IDs belong to.
    pub generation: u64,
    /// All entries so far.
    pub all: Additions,
}

impl Dictionary {
    /// Appends a batch's additions; starts afresh when the generation changed.
    pub fn apply(&mut self, generation: u64, additions: &Additions) {
        if generation != self.generation {
            *self = Self { generation, all: Additions::default() };
        }
        let all = &mut self.all;
        all.strings.extend_from_slice(&additions.strings);
        all.mappings.extend_from_slice(&additions.mappings);
        all.functions.extend_from_slice(&additions.functions);
        all.frames.extend_from_slice(&additions.frames);
        all.stacks.extend_from_slice(&additions.stacks);
        all.workloads.extend_from_slice(&additions.workloads);
        for (id, workload) in &additions.renamed {
            if let Some(entry) = all.workloads.get_mut(id.0 as usize) {
                *entry = Arc::clone(workload);
            }
        }
    }

    /// A string; empty for an ID that is not there.
    #[must_use]
    pub fn string(&self, id: StringId) -> &str {
        self.all.strings.get(id.0 as usize).map_or("", |s| s)
    }

    /// The frames of a stack, innermost first; empty for an ID that is not there.
    #[must_use]
    pub fn stack(&self, id: StackId) -> &[FrameId] {
        self.all.stacks.get(id.0 as usize).map_or(&[], |s| s)
    }

    /// A frame with its function.
    #[must_use]
    pub fn frame(&self, id: FrameId) -> Option<(&Frame, &Function)> {
        let frame = self.all.frames.get(id.0 as usize)?;
        Some((frame, self.all.functions.get(frame.function.0 as usize)?))
    }

    /// A workload.
    #[must_use]
    pub fn workload(&self, id: WorkloadId) -> Option<&Arc<Workload>> {
        self.all.workloads.get(id.0 as usize)
    }
}

/// Samples of one signal merged over some time, for a picture or a file.
#[derive(Clone, Debug)]
pub struct Profile {
    /// What was measured.
    pub signal: Signal,
    /// Start of the time it covers.
    pub start: KTime,
    /// End of it.
    pub end: KTime,
    /// The tables that the samples refer to.
    pub dictionary: Arc<Dictionary>,
    /// The samples, merged, in no order.
    pub samples: Vec<Sample>,
    /// Events lost in that time, in the kernel or in the agent.
    pub lost: u64,
}

/// What tells samples apart: every field of [`Sample`] but count and weight.
type SampleKey = (Signal, WorkloadId, u32, StringId, StackId);

/// Merges samples that are alike in everything but count and weight.
#[derive(Clone, Debug, Default)]
pub struct Merger(HashMap<SampleKey, (u64, u64)>);

impl Merger {
    /// Adds one.
    pub fn add(&mut self, s: &Sample) {
        let sum = self.0.entry((s.signal, s.workload, s.pid, s.comm, s.stack)).or_default();
        sum.0 += s.count;
        sum.1 += s.weight;
    }

    /// How many distinct samples there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The merged samples, in no order.
    pub fn iter(&self) -> impl Iterator<Item = Sample> {
        self.0.iter().map(|(&(signal, workload, pid, comm, stack), &(count, weight))| Sample {
            signal,
            workload,
            pid,
            comm,
            stack,
            count,
            weight,
        })
    }
}
