//! Events → one [`Flush`]: equal events merged, stacks interned, drops counted. Single owner, no I/O.
//!
//! Addresses stay raw; [`crate::resolve`] names them. A stack that was seen before costs a hash and
//! a comparison, and no allocation.

use std::{hash::BuildHasher, sync::Arc};

use hashbrown::{HashMap, HashTable, hash_table};

use crate::{
    account::AgentDrop,
    event::{CgroupId, Detail, Event, KTime, Probe, ProcessKey, PythonEnd, Stack, StackEnd, Task},
};

/// Most distinct samples of one flush; more are dropped and counted. Each costs about 150 bytes, and
/// its stack up to 2 KiB where that is new.
pub const MAX_SAMPLES: usize = 65_536;

/// Most distinct stacks that are remembered from flush to flush; beyond it all are forgotten at the
/// end of a flush. A forgotten stack costs one more allocation.
pub const MAX_STACKS: usize = 65_536;

/// Most events that one flush tells one by one; more are still in its samples, and counted.
pub const MAX_OCCURRENCES: usize = 16_384;

/// A stack of raw addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RawStack {
    /// Kernel frames, innermost first, then user frames, and then two words for each Python frame.
    pub frames: Box<[u64]>,
    /// How many are kernel frames.
    pub kernel_frames: u16,
    /// Why the user stack ended.
    pub end: StackEnd,
    /// How many Python frames there are.
    pub python_frames: u16,
    /// Why the Python stack ended.
    pub python_end: PythonEnd,
}

impl RawStack {
    fn is(&self, other: &Stack<'_>) -> bool {
        self.kernel_frames == other.kernel_frames
            && (self.end, self.python_end) == (other.end, other.python_end)
            && self.python_frames == other.python_frames
            && self.frames.len() == other.frames.iter().len()
            && self.frames.iter().copied().eq(other.frames.iter())
    }
}

/// What tells samples of one flush apart: everything that a resolved sample shows, before it is
/// resolved.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SampleKey {
    /// The probe.
    pub probe: Probe,
    /// The task's process and name; its thread does not tell samples apart.
    pub process: ProcessKey,
    /// The thread's name.
    pub comm: crate::event::Comm,
    /// The cgroup that is charged.
    pub cgroup: CgroupId,
    /// What only this kind has, as far as it tells samples apart.
    pub subject: Subject,
}

/// What a sample is about, besides its stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// Nothing else.
    None,
    /// The page that faulted, by its address.
    Page(u64),
    /// The peer of the socket, and the port on this side.
    Peer(std::net::SocketAddr, u16),
}

/// Page size for telling faults apart: 4 KiB, the smallest that Linux has.
const PAGE: u64 = 4096;

/// An event told one by one, its stack interned.
#[derive(Clone, Debug)]
pub struct RawOccurrence {
    /// When.
    pub time: KTime,
    /// The cgroup that is charged.
    pub cgroup: CgroupId,
    /// The task that is charged.
    pub task: Task,
    /// What it stands for.
    pub weight: u64,
    /// Its stack.
    pub stack: Arc<RawStack>,
    /// What happened.
    pub detail: Detail,
}

/// What one flush gathered.
#[derive(Debug, Default)]
pub struct Flush {
    /// Distinct samples: stack, count, weight.
    pub samples: Vec<(SampleKey, Arc<RawStack>, u64, u64)>,
    /// Events told one by one.
    pub occurrences: Vec<RawOccurrence>,
    /// Events that should have been told one by one but had no room.
    pub occurrences_lost: u64,
    /// Events in `samples`, by probe.
    pub aggregated: [u64; Probe::ALL.len()],
}

/// Gathers events until it is flushed.
#[derive(Debug, Default)]
pub struct Aggregator {
    hasher: foldhash::fast::RandomState,
    stacks: HashTable<Arc<RawStack>>,
    samples: HashMap<(SampleKey, StackPtr), (u64, u64), foldhash::fast::RandomState>,
    flush: Flush,
    dropped: [[u64; AgentDrop::ALL.len()]; Probe::ALL.len()],
}

/// An interned stack, by identity: equal stacks are one allocation while they are interned.
#[derive(Clone, Debug)]
struct StackPtr(Arc<RawStack>);

impl PartialEq for StackPtr {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for StackPtr {}

impl std::hash::Hash for StackPtr {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).hash(state);
    }
}

impl Aggregator {
    /// Adds an event.
    pub fn add(&mut self, event: &Event<'_>) {
        let key = SampleKey {
            probe: event.probe,
            process: event.task.process,
            comm: event.task.comm,
            cgroup: event.cgroup,
            subject: match event.detail {
                Detail::OnCpu => Subject::None,
                Detail::Fault { address } => Subject::Page(address & !(PAGE - 1)),
                Detail::Retransmit(r) => Subject::Peer(r.remote, r.local.port()),
            },
        };
        let stack = self.intern(&event.stack);
        let full = self.samples.len() >= MAX_SAMPLES;
        match self.samples.entry((key, StackPtr(stack.clone()))) {
            hashbrown::hash_map::Entry::Occupied(mut sum) => {
                let sum = sum.get_mut();
                sum.0 += 1;
                sum.1 += event.weight;
            }
            hashbrown::hash_map::Entry::Vacant(_) if full => {
                self.drop(event.probe, AgentDrop::TableFull);
                return;
            }
            hashbrown::hash_map::Entry::Vacant(slot) => {
                slot.insert((1, event.weight));
            }
        }
        self.flush.aggregated[event.probe as usize] += 1;
        if matches!(event.probe, Probe::MajorFault | Probe::Retransmit | Probe::SynAck) {
            self.tell(event, stack);
        }
    }

    /// Counts a record that could not be used. A record whose probe cannot be known is counted for
    /// the first one: the equations of that probe then show it.
    pub fn drop(&mut self, probe: Probe, reason: AgentDrop) {
        self.dropped[probe as usize][reason as usize] += 1;
    }

    /// Records dropped since the start, by probe and reason.
    #[must_use]
    pub fn dropped(&self) -> &[[u64; AgentDrop::ALL.len()]; Probe::ALL.len()] {
        &self.dropped
    }

    /// Events gathered since the last flush, by probe.
    #[must_use]
    pub fn gathered(&self) -> [u64; Probe::ALL.len()] {
        self.flush.aggregated
    }

    /// Takes what was gathered, and starts afresh.
    pub fn flush(&mut self) -> Flush {
        let mut flush = std::mem::take(&mut self.flush);
        flush.samples =
            self.samples.drain().map(|((key, stack), (n, w))| (key, stack.0, n, w)).collect();
        flush.occurrences.sort_by_key(|o| o.time);
        if self.stacks.len() > MAX_STACKS {
            self.stacks.clear();
        }
        flush
    }

    /// Whether so much is gathered that it should be flushed before its time.
    #[must_use]
    pub fn is_filling(&self) -> bool {
        self.samples.len() >= MAX_SAMPLES / 2 || self.stacks.len() > MAX_STACKS
    }

    fn tell(&mut self, event: &Event<'_>, stack: Arc<RawStack>) {
        if self.flush.occurrences.len() >= MAX_OCCURRENCES {
            self.flush.occurrences_lost += 1;
            return;
        }
        self.flush.occurrences.push(RawOccurrence {
            time: event.time,
            cgroup: event.cgroup,
            task: event.task,
            weight: event.weight,
            stack,
            detail: event.detail,
        });
    }

    fn intern(&mut self, stack: &Stack<'_>) -> Arc<RawStack> {
        // The rest hardly ever tells stacks apart that are alike in these.
        let hash = self.hasher.hash_one((stack.frames.0, stack.kernel_frames, stack.end));
        let rehash = |known: &Arc<RawStack>| {
            let bytes: &[u8] = zerocopy::IntoBytes::as_bytes(&*known.frames);
            self.hasher.hash_one((bytes, known.kernel_frames, known.end))
        };
        match self.stacks.entry(hash, |known| known.is(stack), rehash) {
            hash_table::Entry::Occupied(known) => known.get().clone(),
            hash_table::Entry::Vacant(slot) => {
                let stack = Arc::new(RawStack {
                    frames: stack.frames.iter().collect(),
                    kernel_frames: stack.kernel_frames,
                    end: stack.end,
                    python_frames: stack.python_frames,
                    python_end: stack.python_end,
                });
                slot.insert(stack.clone());
                stack
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::event::{Comm, Frames};

    fn event(frames: &[u8], pid: u32, weight: u64) -> Event<'_> {
        Event {
            probe: Probe::OnCpu,
            time: KTime(0),
            cpu: 0,
            cgroup: CgroupId(1),
            weight,
            task: Task {
                process: ProcessKey { pid, ..ProcessKey::default() },
                tid: pid,
                comm: Comm::default(),
            },
            stack: Stack {
                frames: Frames(frames),
                kernel_frames: 0,
                end: StackEnd::Complete,
                python_frames: 0,
                python_end: PythonEnd::None,
            },
            detail: Detail::OnCpu,
        }
    }

    #[test]
    fn equal_events_are_one_sample_and_share_their_stack() {
        let mut aggregator = Aggregator::default();
        let frames = [1_u8; 16];
        for pid in [1, 2, 1] {
            aggregator.add(&event(&frames, pid, 10));
        }
        let flush = aggregator.flush();
        assert_eq!(flush.samples.len(), 2);
        assert!(Arc::ptr_eq(&flush.samples[0].1, &flush.samples[1].1));
        assert_eq!(flush.aggregated[Probe::OnCpu as usize], 3);
        assert!(aggregator.flush().samples.is_empty());
    }

    #[test]
    fn a_full_table_drops_what_is_new_and_counts_it() {
        let mut aggregator = Aggregator::default();
        let extra = 10;
        for pid in 0..(MAX_SAMPLES + extra) as u32 {
            aggregator.add(&event(&[], pid, 1));
        }
        aggregator.add(&event(&[], 0, 1));
        let on_cpu = Probe::OnCpu as usize;
        assert_eq!(aggregator.dropped()[on_cpu][AgentDrop::TableFull as usize], extra as u64);
        assert_eq!(aggregator.flush().aggregated[on_cpu], MAX_SAMPLES as u64 + 1);
    }

    proptest! {
        #[test]
        fn counts_and_weights_are_conserved(
            events in proptest::collection::vec((0_u8..4, 0_u32..4, 1_u64..1_000_000), 0..200)
        ) {
            let mut aggregator = Aggregator::default();
            for (frame, pid, weight) in &events {
                let frames = [*frame; 24];
                aggregator.add(&event(&frames, *pid, *weight));
            }
            let flush = aggregator.flush();
            let count: u64 = flush.samples.iter().map(|s| s.2).sum();
            let weight: u64 = flush.samples.iter().map(|s| s.3).sum();
            prop_assert_eq!(count, events.len() as u64);
            prop_assert_eq!(weight, events.iter().map(|e| e.2).sum::<u64>());
        }
    }
}
