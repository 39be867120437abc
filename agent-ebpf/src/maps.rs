//! The maps. All are bounded; none is pinned, so they go with the agent.

use aya_ebpf::{
    bindings::BPF_F_INNER_MAP,
    btf_maps::{self, ArrayOfMaps, SkStorage},
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use podflame_wire::{
    Control, Counters, FaultRecord, MAX_CGROUPS, MAX_FRAMES, Probe, RetransmitRecord, SampleRecord,
    StackShape, Task,
    hop::RuleCache,
    python::{self, MAX_PYTHON_FRAMES, MAX_SENDER_PYTHON_FRAMES},
    unwind::{MAX_MAPPINGS, MAX_PROCESSES, MAX_RULES, MAX_TABLES, Mapping, Page, Process, Rule},
    walk::Walk,
};

/// Room for the frames of a record: two stacks, and a Python one of two words a frame, and up to the
/// next power of two so that an index can be masked instead of checked.
pub(crate) const FRAMES: usize = (2 * MAX_FRAMES + 2 * MAX_PYTHON_FRAMES).next_power_of_two();

/// Room for the frames of a sender, likewise.
pub(crate) const SENDER_FRAMES: usize =
    (MAX_FRAMES + 2 * MAX_SENDER_PYTHON_FRAMES).next_power_of_two();

/// A record while it is put together. Too large for the 512 bytes of a BPF stack.
#[repr(C)]
pub(crate) struct Scratch<R> {
    /// The fixed part.
    pub(crate) record: R,
    /// The frames, right behind it.
    pub(crate) frames: [u64; FRAMES],
    /// The walk over the user stack.
    pub(crate) walk: Walk,
    /// The walk over the Python stack.
    pub(crate) python: python::Walk,
}

/// What is kept with a socket that has retransmitted: who sent last, and from where.
#[repr(C)]
pub(crate) struct Sender {
    /// Odd while it is written; a reader that sees two values takes nothing.
    pub(crate) version: u64,
    /// When it was taken, `CLOCK_MONOTONIC` in nanoseconds. 0: never.
    pub(crate) time_ns: u64,
    /// Who sent.
    pub(crate) task: Task,
    /// How many frames there are, all of user space.
    pub(crate) shape: StackShape,
    /// The user stack and then the Python stack, innermost frame first.
    pub(crate) stack: [u64; SENDER_FRAMES],
}

/// Records on their way to the agent. The agent sets the size by the number of CPUs.
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// What each program counted, by `Probe`.
#[map]
pub(crate) static COUNTERS: PerCpuArray<Counters> =
    PerCpuArray::with_max_entries(Probe::ALL.len() as u32, 0);

/// What the agent changes while the programs run.
#[map]
pub(crate) static CONTROL: Array<Control> = Array::with_max_entries(1, 0);

/// `Verdict`s by cgroup ID, as `Control::cgroups` asks for.
#[map]
pub(crate) static CGROUPS: HashMap<u64, u8> = HashMap::with_max_entries(MAX_CGROUPS, 0);

/// Cgroups that came or went: some thousand wait for the agent, which is woken at each.
#[map]
pub(crate) static CGROUP_CHANGES: RingBuf = RingBuf::with_byte_size(64 << 10, 0);

/// Processes whose first record has woken the agent. An evicted one wakes it once more.
#[map]
pub(crate) static SEEN: LruHashMap<u32, u64> = LruHashMap::with_max_entries(8192, 0);

/// Processes that run Python, written by the agent. One that is evicted loses its Python frames until
/// it is seen again.
#[map]
pub(crate) static PYTHON: LruHashMap<u32, python::Process> = LruHashMap::with_max_entries(4096, 0);

/// Where the thread state of a thread was the last time, by thread ID.
#[map]
pub(crate) static PYTHON_THREADS: LruHashMap<u32, u64> = LruHashMap::with_max_entries(16_384, 0);

/// Sender stacks of sockets that have retransmitted; freed with the socket.
#[btf_map]
pub(crate) static SENDERS: SkStorage<Sender> = SkStorage::new();

/// Processes whose mappings are known.
#[map]
pub(crate) static PROCESSES: HashMap<u32, Process> =
    HashMap::with_max_entries(MAX_PROCESSES as u32, 0);

/// Their mappings.
#[map]
pub(crate) static MAPPINGS: Array<Mapping> = Array::with_max_entries(MAX_MAPPINGS as u32, 0);

/// The unwind tables. They come and go, and each has as many pages as it needs.
#[btf_map]
pub(crate) static TABLES: ArrayOfMaps<
    btf_maps::Array<Page, 1, { BPF_F_INNER_MAP as usize }>,
    MAX_TABLES,
> = ArrayOfMaps::new();

/// The rules that tables name.
#[map]
pub(crate) static RULES: Array<Rule> = Array::with_max_entries(MAX_RULES as u32, 0);

/// What the perf event programs, which exclude one another, remember of them.
#[map]
pub(crate) static RULE_CACHE: PerCpuArray<RuleCache> = PerCpuArray::with_max_entries(1, 0);

// One scratch for programs that cannot interrupt each other on a CPU. `perf_event` programs exclude
// one another (`bpf_prog_active` in `kernel/events/core.c`), retransmits run with bottom halves off,
// and a program never interrupts itself (`prog->active` in `kernel/trace/bpf_trace.c`).

/// For on-CPU samples.
#[map]
pub(crate) static ON_CPU_SCRATCH: PerCpuArray<Scratch<SampleRecord>> =
    PerCpuArray::with_max_entries(1, 0);

/// For page faults.
#[map]
pub(crate) static FAULT_SCRATCH: PerCpuArray<Scratch<FaultRecord>> =
    PerCpuArray::with_max_entries(1, 0);

/// The faults of one kind on one CPU that no sample stands for yet.
#[repr(C)]
pub(crate) struct Tally {
    /// What the perf event had counted when the program last ran.
    pub(crate) counter: u64,
    /// Faults, of what is wanted, that the next sample will stand for.
    pub(crate) waiting: u64,
    /// When the last sample was taken that came at least `FAULT_INTERVAL_NS` after the one before,
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub(crate) sampled_ns: u64,
}

/// Of minor faults, and of major ones.
#[map]
pub(crate) static TALLIES: PerCpuArray<Tally> = PerCpuArray::with_max_entries(2, 0);

/// For retransmits.
#[map]
pub(crate) static RETRANSMIT_SCRATCH: PerCpuArray<Scratch<RetransmitRecord>> =
    PerCpuArray::with_max_entries(1, 0);

/// For senders: the frames go to the socket.
#[map]
pub(crate) static SENDER_SCRATCH: PerCpuArray<(Walk, python::Walk)> =
    PerCpuArray::with_max_entries(1, 0);
