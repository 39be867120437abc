//! What the correlator is told: amounts on slots of 100 ms, by workload, metric and subject.
//!
//! Not for how they are measured. A probe plugs in by adding a [`Metric`], if none fits, and by saying
//! with [`super::Correlator::cover`] for which slots its numbers are whole: a slot that nobody covers
//! is unknown, which is not zero.

use std::sync::Arc;

use super::histogram::Times;
use crate::event::KTime;

/// A name that is shared: a workload, a peer, a file, a function.
pub type Name = Arc<str>;

/// Longest name that is kept, in bytes; what is longer loses its middle.
const MAX_NAME: usize = 200;

/// Length of a slot, in nanoseconds.
pub const SLOT_NS: u64 = 100_000_000;

/// Slots in a second.
pub const SECOND: u64 = 1_000_000_000 / SLOT_NS;

/// A stretch of 100 ms on the kernel's clock: slot n starts at n × 100 ms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u64);

impl Slot {
    /// The slot that a time is in.
    #[must_use]
    pub fn of(time: KTime) -> Self {
        Self(time.0 / SLOT_NS)
    }

    /// When it starts.
    #[must_use]
    pub fn start(self) -> KTime {
        KTime(self.0.saturating_mul(SLOT_NS))
    }
}

/// What measures: all metrics of a source are known or unknown together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// Times on sockets, and connections.
    Sockets,
    /// TCP retransmits.
    Tcp,
    /// CPU time.
    Cpu,
    /// Functions of the sampled stacks.
    Profile,
    /// Waits: run queue and off-CPU.
    Sched,
    /// Page faults.
    Faults,
    /// Page-cache misses.
    PageCache,
    /// Files of cgroups, polled.
    Cgroup,
    /// Files of the node, polled.
    Node,
}

impl Source {
    /// Every source.
    pub const ALL: [Self; 9] = [
        Self::Sockets,
        Self::Tcp,
        Self::Cpu,
        Self::Profile,
        Self::Sched,
        Self::Faults,
        Self::PageCache,
        Self::Cgroup,
        Self::Node,
    ];
}

/// How values of a metric come together in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// They add up; the value of a slot without any is zero.
    Sum,
    /// Each slot has the last one that was told for it.
    Level,
}

/// What a number is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unit {
    /// Nanoseconds.
    Time,
    /// A number of things.
    Count,
    /// Bytes.
    Bytes,
    /// A part of 1.
    Share,
}

macro_rules! metrics {
    ($($(#[$meta:meta])* $name:ident = $text:literal, $source:ident, $kind:ident, $unit:ident, $subjects:literal;)*) => {
        /// A kind of number.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Metric { $($(#[$meta])* $name,)* }

        impl Metric {
            /// Every metric.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Its name, as in evidence and in the file of baselines. Never changed.
            #[must_use]
            pub const fn name(self) -> &'static str { match self { $(Self::$name => $text,)* } }

            /// What measures it.
            #[must_use]
            pub const fn source(self) -> Source { match self { $(Self::$name => Source::$source,)* } }

            /// How its values come together.
            #[must_use]
            pub const fn kind(self) -> Kind { match self { $(Self::$name => Kind::$kind,)* } }

            /// What it is a number of.
            #[must_use]
            pub const fn unit(self) -> Unit { match self { $(Self::$name => Unit::$unit,)* } }

            /// Most subjects that have a series of their own, in one workload. The others are in the
            /// total only.
            #[must_use]
            pub const fn subjects(self) -> usize { match self { $(Self::$name => $subjects,)* } }
        }
    };
}

metrics! {
    /// Time from the last receive to the first send on accepted sockets; the subject is the local
    /// port. As [`Value::Times`], whose count becomes [`Metric::Requests`].
    Response = "response_time", Sockets, Sum, Time, 4;
    /// How many requests were answered. Comes with [`Metric::Response`].
    Requests = "requests", Sockets, Sum, Count, 4;
    /// Time from the send to the first receive on connected sockets, by peer. As [`Value::Times`],
    /// whose count becomes [`Metric::Calls`].
    Downstream = "downstream_wait", Sockets, Sum, Time, 16;
    /// How many answers were waited for, by peer. Comes with [`Metric::Downstream`].
    Calls = "calls", Sockets, Sum, Count, 16;
    /// CPU time.
    Cpu = "cpu", Cpu, Sum, Time, 0;
    /// CPU time by function, with all that it calls: a sample counts once for each function of its
    /// stack.
    Function = "function_cpu", Profile, Sum, Time, 32;
    /// Time runnable but not running. Holds the time of threads that are throttled.
    RunQueue = "run_queue_wait", Sched, Sum, Time, 0;
    /// Time blocked on a lock, by lock or by the function that waits. Not for idle threads that wait
    /// for work on a condition variable.
    LockWait = "lock_wait", Sched, Sum, Time, 8;
    /// Time blocked on a file, by file: reads, write-back and major faults.
    FileWait = "file_wait", Sched, Sum, Time, 8;
    /// Time asleep by a timer while a request is served.
    Sleep = "sleep", Sched, Sum, Time, 0;
    /// Page faults that needed no I/O, by the function that faulted, outside of the allocator.
    MinorFaults = "minor_faults", Faults, Sum, Count, 8;
    /// Page faults that needed I/O, by file.
    MajorFaults = "major_faults", Faults, Sum, Count, 8;
    /// Pages that a read or fault did not find in the page cache, by file.
    CacheMisses = "page_cache_misses", PageCache, Sum, Count, 8;
    /// TCP retransmits, by peer.
    Retransmits = "retransmits", Tcp, Sum, Count, 16;
    /// Connections opened, by peer.
    Connections = "connections_opened", Sockets, Sum, Count, 8;
    /// Connections accepted, by peer.
    Accepts = "connections_accepted", Sockets, Sum, Count, 8;
    /// Bytes sent.
    Bytes = "bytes_sent", Sockets, Sum, Bytes, 0;
    /// Time that the cgroup was throttled (`throttled_usec` of `cpu.stat`).
    Throttled = "throttled", Cgroup, Sum, Time, 0;
    /// The limit of CPU time, in nanoseconds a second (`cpu.max`). Not there without a limit.
    CpuLimit = "cpu_limit", Cgroup, Level, Time, 0;
    /// Memory in use (`memory.current`).
    MemoryUsed = "memory_used", Cgroup, Level, Bytes, 0;
    /// The limit of memory: the smaller one of `memory.high` and `memory.max`. Not there without a
    /// limit.
    MemoryLimit = "memory_limit", Cgroup, Level, Bytes, 0;
    /// How often the cgroup went over a limit of memory (`high` and `max` of `memory.events`).
    MemoryEvents = "memory_limit_events", Cgroup, Sum, Count, 0;
    /// Pages read again that were evicted shortly before (`workingset_refault_file`).
    Refaults = "refaults", Cgroup, Sum, Count, 0;
    /// Share of time in which some task waited for a CPU (PSI).
    CpuPressure = "cpu_pressure", Cgroup, Level, Share, 0;
    /// Share of time in which some task waited for memory (PSI).
    MemoryPressure = "memory_pressure", Cgroup, Level, Share, 0;
    /// Share of time in which all tasks waited for memory (PSI).
    MemoryStall = "memory_stall", Cgroup, Level, Share, 0;
    /// Share of time in which some task waited for I/O (PSI).
    IoPressure = "io_pressure", Cgroup, Level, Share, 0;
    /// Share of time in which all tasks waited for I/O (PSI).
    IoStall = "io_stall", Cgroup, Level, Share, 0;
    /// Runnable tasks of the node.
    NodeRunnable = "node_runnable", Node, Level, Count, 0;
    /// Share of the node's CPU time that is idle.
    NodeIdle = "node_idle", Node, Level, Share, 0;
    /// Memory of the node that can be had without swapping, as a share of all (`MemAvailable`).
    NodeFree = "node_free_memory", Node, Level, Share, 0;
}

impl Metric {
    /// What a change must exceed to mean anything: it stands for the deviation of a baseline that does
    /// not deviate. For each request, or for each second: a retransmit every 5 s happens everywhere.
    pub(super) const fn floor(self, per_request: bool) -> f64 {
        match (self.unit(), per_request) {
            (Unit::Time, true) => 20e3,
            (Unit::Time, false) => 1e6,
            (Unit::Count, true) => 0.02,
            (Unit::Count, false) => 0.2,
            (Unit::Bytes, _) => 1000.0,
            (Unit::Share, _) => 0.01,
        }
    }
}

/// What a number is about, beside its workload: a peer, a file, a function, a lock, a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Subject {
    /// Its name, which people read, without control characters and at most 200 bytes.
    pub name: Name,
    /// The workload of this node that it is, where it is one: a peer that runs here.
    pub workload: Option<Name>,
}

impl Subject {
    /// Something that is no workload of this node.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { name: clean(name), workload: None }
    }

    /// A workload of this node.
    #[must_use]
    pub fn local(name: &str, workload: &Name) -> Self {
        Self { name: clean(name), workload: Some(Arc::clone(workload)) }
    }
}

/// A name without control characters, and short: names come from processes and are hostile.
fn clean(name: &str) -> Name {
    let mut text: String = name
        .chars()
        .map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
        .collect();
    if text.len() > MAX_NAME {
        let head = text.floor_char_boundary(MAX_NAME / 2 - 2);
        let tail = text.ceil_char_boundary(text.len() - MAX_NAME / 2 + 2);
        text = format!("{}…{}", &text[..head], &text[tail..]);
    }
    text.into()
}

/// A number.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// An amount, or a level, in the metric's unit. What is not finite is refused.
    Amount(f64),
    /// Times of operations.
    Times(Times),
}

/// One number about one slot.
#[derive(Clone, Debug, PartialEq)]
pub struct Observation {
    /// The slot, or the last one if there are several.
    pub slot: Slot,
    /// How many slots it is about; an amount is spread evenly over them. From 1 to
    /// [`super::MAX_SPAN`].
    pub slots: u16,
    /// The workload; `None` for the node.
    pub workload: Option<Name>,
    /// What is measured.
    pub metric: Metric,
    /// What it is about.
    pub subject: Option<Subject>,
    /// How much.
    pub value: Value,
}
