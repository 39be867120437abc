//! Made-up batches for tests: what a resolver would publish, from names.

use std::{collections::HashMap, sync::Arc};

use crate::{
    account::Account,
    event::{Cause, KTime, Probe, StackEnd},
    profile::{
        Additions, Batch, Frame, FrameId, FrameKind, Function, FunctionId, Mapping, MappingId,
        Occurrence, Sample, Signal, StackId, StringId, What, Workload, WorkloadId, WorkloadKind,
    },
};

/// Nanoseconds in a second; each flush takes one.
pub(crate) const SECOND: u64 = 1_000_000_000;

/// The owner of a dictionary.
pub(crate) struct Source {
    generation: u64,
    sequence: u64,
    strings: HashMap<String, u32>,
    stacks: HashMap<Vec<String>, u32>,
    frames: HashMap<String, u32>,
    workloads: HashMap<String, u32>,
    additions: Additions,
    /// Goes out with the next batch.
    pub(crate) account: Account,
}

impl Source {
    pub(crate) fn new() -> Self {
        let mut new = Self {
            generation: 0,
            sequence: 0,
            strings: HashMap::new(),
            stacks: HashMap::new(),
            frames: HashMap::new(),
            workloads: HashMap::new(),
            additions: Additions::default(),
            account: Account::default(),
        };
        new.next_generation();
        new
    }

    /// Voids every ID.
    pub(crate) fn next_generation(&mut self) {
        self.generation += 1;
        for table in [&mut self.strings, &mut self.frames, &mut self.workloads] {
            table.clear();
        }
        self.stacks.clear();
        self.additions = Additions::default();
        self.string("");
        let path = self.string("/bin/app");
        self.additions.mappings.push(Mapping { path, build_id: StringId(0) });
    }

    fn string(&mut self, text: &str) -> StringId {
        let next = self.strings.len() as u32;
        StringId(*self.strings.entry(text.into()).or_insert_with(|| {
            self.additions.strings.push(text.into());
            next
        }))
    }

    fn frame(&mut self, name: &str) -> FrameId {
        if let Some(known) = self.frames.get(name) {
            return FrameId(*known);
        }
        let id = self.frames.len() as u32;
        let text = self.string(name);
        let file = self.string("app.rs");
        self.additions.functions.push(Function { name: text, file, mapping: MappingId(0) });
        self.additions.frames.push(Frame {
            function: FunctionId(id),
            line: name.len() as u32,
            offset: 0,
            kind: FrameKind::User,
            inlined: false,
            by_frame_pointer: false,
        });
        self.frames.insert(name.into(), id);
        FrameId(id)
    }

    /// A stack by the names of its frames, the innermost first, separated by spaces.
    pub(crate) fn stack(&mut self, names: &str) -> StackId {
        let names: Vec<String> = names.split(' ').map(str::to_owned).collect();
        let frames: Vec<FrameId> = names.iter().map(|n| self.frame(n)).collect();
        let next = self.stacks.len() as u32;
        StackId(*self.stacks.entry(names).or_insert_with(|| {
            self.additions.stacks.push(frames.into());
            next
        }))
    }

    /// A pod by its name.
    pub(crate) fn workload(&mut self, pod: &str) -> WorkloadId {
        let next = self.workloads.len() as u32;
        WorkloadId(*self.workloads.entry(pod.into()).or_insert_with(|| {
            self.additions.workloads.push(Arc::new(Workload {
                kind: WorkloadKind::Pod,
                name: format!("shop/{pod}/main"),
                namespace: "shop".into(),
                pod: pod.into(),
                cgroup_path: format!("/kubepods/pod{pod}/c"),
                ..Workload::default()
            }));
            next
        }))
    }

    /// A sample of so many events, each of weight 10.
    pub(crate) fn sample(&mut self, signal: Signal, pod: &str, stack: &str, count: u64) -> Sample {
        Sample {
            signal,
            workload: self.workload(pod),
            pid: 7,
            comm: self.string("main"),
            stack: self.stack(stack),
            count,
            weight: 10 * count,
        }
    }

    /// A major fault.
    pub(crate) fn fault(&mut self, pod: &str, stack: &str) -> Occurrence {
        let mapping = MappingId(0);
        let what = What::MajorFault { address: 0x7f00_0000_1000, mapping, offset: 4096 };
        self.occurrence(pod, stack, what)
    }

    /// A retransmit.
    pub(crate) fn retransmit(&mut self, pod: &str, stack: &str) -> Occurrence {
        let what = What::Retransmit {
            local: ([10, 0, 0, 1], 80).into(),
            remote: ([0xfd00, 0, 0, 0, 0, 0, 0, 2], 40_000).into(),
            cause: Cause::Fast,
            state: 1,
            srtt_us: 250,
            cwnd: 10,
            netns: 4_026_531_840,
            segments: 3,
            sender_age_ns: Some(5),
        };
        self.occurrence(pod, stack, what)
    }

    fn occurrence(&mut self, pod: &str, stack: &str, what: What) -> Occurrence {
        Occurrence {
            time: KTime(self.now().0 + SECOND / 2),
            workload: self.workload(pod),
            pid: 7,
            tid: 8,
            comm: self.string("main"),
            stack: self.stack(stack),
            stack_end: StackEnd::Complete,
            what,
        }
    }

    /// When the flush under way started.
    pub(crate) fn now(&self) -> KTime {
        KTime((self.sequence + 1) * SECOND)
    }

    /// Ends a flush of one second. Its events are counted as one probe's of each signal.
    pub(crate) fn flush(
        &mut self,
        samples: Vec<Sample>,
        occurrences: Vec<Occurrence>,
    ) -> Arc<Batch> {
        for s in &samples {
            let probe = match s.signal {
                Signal::Cpu => Probe::OnCpu,
                Signal::PageFault => Probe::MajorFault,
                Signal::Retransmit => Probe::Retransmit,
            };
            let account = self.account.probe_mut(probe);
            account.hits += s.count;
            account.stored += s.count;
            account.aggregated += s.count;
        }
        let start = self.now();
        self.sequence += 1;
        Arc::new(Batch {
            sequence: self.sequence,
            generation: self.generation,
            start,
            end: self.now(),
            additions: Arc::new(std::mem::take(&mut self.additions)),
            samples,
            occurrences,
            occurrences_lost: 0,
            account: self.account.clone(),
        })
    }
}
