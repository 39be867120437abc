//! What the correlator finds: incidents, their causes, and the evidence for them.

use super::{
    lead::Lead,
    observe::{Metric, Name, Slot, Subject},
};

/// The layer that is to blame, as a person would name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Layer {
    /// The pod's own code, and its locks.
    Application,
    /// Who shares the node's CPUs.
    Platform,
    /// Memory and storage of the node.
    Infrastructure,
    /// Packets between this pod and others.
    Network,
    /// A limit that is too low for what the pod does.
    Configuration,
    /// Another service. What is wrong there is its own incident, if it runs on this node.
    Downstream,
}

/// What may be to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CauseKind {
    /// Packets to or from one peer are lost.
    PathLoss,
    /// Packets to and from all peers are lost.
    PodLoss,
    /// Answers of a peer that itself answers as before come late.
    PathDelay,
    /// The limit of CPU time is too low while the node has CPU time to give.
    CpuLimit,
    /// The limit of memory is too low for the files and the memory in use.
    MemoryLimit,
    /// The node is short of memory.
    MemoryPressure,
    /// Files are read from storage that were in the page cache before.
    PageCache,
    /// Storage takes longer to answer.
    Storage,
    /// Connections are opened instead of kept.
    Connections,
    /// Memory is allocated and given back all the time.
    Allocation,
    /// Threads wait for each other.
    Lock,
    /// A function costs more.
    Code,
    /// More calls of a peer for each request.
    FanOut,
    /// Threads sleep.
    Sleep,
    /// Another pod uses the CPU.
    Neighbour,
    /// The limit of CPU time, on a node that has none left.
    Throttled,
    /// The node has more to run than it has CPUs.
    BusyNode,
    /// A peer answers late.
    SlowPeer,
}

impl CauseKind {
    /// The layer it is in.
    #[must_use]
    pub fn layer(self) -> Layer {
        match self {
            Self::PathLoss | Self::PodLoss | Self::PathDelay => Layer::Network,
            Self::CpuLimit | Self::MemoryLimit => Layer::Configuration,
            Self::MemoryPressure | Self::PageCache | Self::Storage => Layer::Infrastructure,
            Self::Connections
            | Self::Allocation
            | Self::Lock
            | Self::Code
            | Self::FanOut
            | Self::Sleep => Layer::Application,
            Self::Neighbour | Self::Throttled | Self::BusyNode => Layer::Platform,
            Self::SlowPeer => Layer::Downstream,
        }
    }
}

/// What is measured of a symptom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SymptomKind {
    /// The median response time.
    ResponseP50,
    /// The 99th percentile of the response time.
    ResponseP99,
    /// The mean response time.
    ResponseMean,
    /// Requests answered in a second, which all but ended while something blocks the pod.
    Throughput,
    /// CPU time for each request.
    CpuPerRequest,
    /// Major faults in a second.
    MajorFaults,
    /// Minor faults for each request.
    MinorFaults,
    /// Retransmits in a second.
    Retransmits,
    /// Connections accepted in a second.
    Accepts,
    /// Connections opened in a second.
    Connections,
}

/// What is wrong, and how much.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Symptom {
    /// Which.
    pub kind: SymptomKind,
    /// What is usual. Nanoseconds, nanoseconds a request, faults a request, or a number a second.
    pub usual: f64,
    /// What it was last.
    pub now: f64,
    /// The worst it was.
    pub worst: f64,
}

/// A number that speaks for a cause.
#[derive(Clone, Debug, PartialEq)]
pub struct Evidence {
    /// What was measured.
    pub metric: Metric,
    /// Whose number it is, if not of the incident's pod: the neighbour's, or the peer's.
    pub workload: Option<Name>,
    /// What it is about.
    pub subject: Option<Name>,
    /// The number is for each request, and not for each second. Levels are neither.
    pub per_request: bool,
    /// The median before.
    pub usual: f64,
    /// The usual deviation from it: scaled median absolute deviation, or a floor.
    pub deviation: f64,
    /// How many bins of 5 s that rests on.
    pub values: u32,
    /// The mean inside of the incident.
    pub now: f64,
    /// How it goes together with the symptom, where that was compared.
    pub lead: Option<Lead>,
}

/// Something that may be to blame.
#[derive(Clone, Debug, PartialEq)]
pub struct Cause {
    /// What.
    pub kind: CauseKind,
    /// What it is about: the peer, the function, the file, the lock, the neighbour. `None` where there
    /// is none beside the pod itself.
    pub subject: Option<Subject>,
    /// How sure: 0 to 1. A product of how much of the symptom it pays for, how far beyond the usual it
    /// is, how well it goes together with the symptom, how directly it was seen, and how much data there
    /// is.
    pub confidence: f64,
    /// How much of the symptom it can explain, in nanoseconds a request; for a symptom that is no time,
    /// in its unit.
    pub dose: f64,
    /// The same as a share of the symptom's extra, 0 to 1.
    pub share: f64,
    /// What is wrong at the peer, where that is an incident of its own.
    pub root: Option<Root>,
    /// What was measured, most telling first.
    pub evidence: Vec<Evidence>,
}

/// The cause of another pod's incident, at the end of the chain of peers that wait for each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// The other pod.
    pub workload: Name,
    /// What is wrong there.
    pub kind: CauseKind,
    /// What it is about.
    pub subject: Option<Subject>,
}

/// What can be said of the cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The first cause is to blame.
    Cause,
    /// All was measured, and nothing that was measured pays for the symptom.
    NoCorrelation,
    /// Too much is unknown to say.
    NotEnoughData,
}

/// Why an incident ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All is as usual again.
    Over,
    /// It lasted so long that this is what is usual now.
    NewUsual,
    /// Nothing is known of the pod any more.
    Unknown,
}

/// A pod that is not as usual.
#[derive(Clone, Debug, PartialEq)]
pub struct Incident {
    /// Distinguishes it from all others of this agent. The same in every update.
    pub id: u64,
    /// The pod, container or other workload.
    pub workload: Name,
    /// When it began.
    pub start: Slot,
    /// When it was told first.
    pub detected: Slot,
    /// When the symptom was last seen.
    pub last_seen: Slot,
    /// When and why it ended, if it has.
    pub end: Option<(Slot, End)>,
    /// What is wrong.
    pub symptom: Symptom,
    /// What else is, beside the symptom.
    pub also: Vec<SymptomKind>,
    /// What can be said of the cause.
    pub verdict: Verdict,
    /// What may be to blame, best first. At most [`super::MAX_CAUSES`].
    pub causes: Vec<Cause>,
    /// Share of the data inside of the incident that is unknown or was lost, of the source that lost
    /// most.
    pub lost: f64,
}

/// A pod that has more to do than usual, and does it at the usual cost. Not an incident.
#[derive(Clone, Debug, PartialEq)]
pub struct MoreWork {
    /// The pod.
    pub workload: Name,
    /// Since when.
    pub start: Slot,
    /// Requests a second that are usual.
    pub usual: f64,
    /// Requests a second now.
    pub now: f64,
}

/// What the correlator tells.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A new incident.
    Opened(Incident),
    /// More is known of one.
    Updated(Incident),
    /// One ended.
    Closed(Incident),
    /// A pod has more to do. Told once, until that is over.
    MoreWork(MoreWork),
}
