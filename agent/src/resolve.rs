//! [`Flush`] → [`Batch`]: every address gets its name, every event its workload. Single owner of
//! the symbols, the attribution and the dictionary; runs on a thread of its own, because all of
//! them read files.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hashbrown::HashMap;

use crate::{
    account::Account,
    aggregate::{Flush, RawOccurrence, RawStack, SampleKey, Subject},
    attribute::{Attributor, Facts, Namer},
    event::{
        BY_FRAME_POINTER, CgroupId, Comm, Detail, KTime, Probe, ProcessKey, PythonEnd, StackEnd,
    },
    intern::Interner,
    pods::{Latest, LatestPeers, Peers},
    profile::{
        Batch, Frame, FrameId, FrameKind, Function, Mapping, MappingId, Occurrence, Sample, Signal,
        What, WorkloadId,
    },
    python::{self, Codes, Program, merge::Merged},
    redact::Redactor,
    symbols::{Limits, Module, Sighting, Symbol, Symbols},
};

/// Most resolved stacks that are remembered; beyond it all are forgotten. A forgotten one costs a
/// cached look-up for each of its frames.
const MAX_STACKS: usize = 32_768;

/// First port of the default ephemeral range (`net.ipv4.ip_local_port_range`): from here on a port
/// says nothing about the service, and each connection would be a peer of its own.
const FIRST_EPHEMERAL_PORT: u16 = 32_768;

/// The frames of a resolved stack, innermost first.
type Resolved = Arc<[FrameId]>;

/// What was read of a process that will be gone when it exits.
#[derive(Debug)]
pub struct Seen {
    /// What it has mapped.
    pub sighting: Option<Sighting>,
    /// Where it belongs.
    pub facts: Option<Facts>,
    /// The Python it runs.
    pub python: Option<Arc<Program>>,
}

/// Gives names.
pub struct Resolver {
    symbols: Symbols,
    attributor: Attributor,
    namer: Namer,
    watched_peers: Option<LatestPeers>,
    /// What is current, taken once for each flush.
    peers: Arc<Peers>,
    python: Codes,
    interner: Interner,
    stacks: HashMap<(ProcessKey, Arc<RawStack>), Resolved, foldhash::fast::RandomState>,
    frames: HashMap<(FrameKind, bool, ByAddress), Box<[FrameId]>, foldhash::fast::RandomState>,
    sequence: u64,
}

/// Cached symbols by identity; the cache keeps them alive, so an address is not used again.
#[derive(Debug)]
struct ByAddress(Arc<[Symbol]>);

impl PartialEq for ByAddress {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for ByAddress {}

impl std::hash::Hash for ByAddress {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).cast::<()>().hash(state);
    }
}

impl Resolver {
    /// A resolver with nothing seen yet.
    #[must_use]
    pub fn new(symbols: Symbols, attributor: Attributor) -> Self {
        Self {
            symbols,
            attributor,
            namer: Namer::new(None),
            watched_peers: None,
            peers: Arc::default(),
            python: Codes::default(),
            interner: Interner::default(),
            stacks: HashMap::default(),
            frames: HashMap::default(),
            sequence: 0,
        }
    }

    /// Names pods by what is told there.
    #[must_use]
    pub fn with_pods(mut self, pods: Option<Latest>) -> Self {
        self.namer = Namer::new(pods);
        self
    }

    /// Names addresses outside of this node by what is told there.
    #[must_use]
    pub fn with_peers(mut self, mut watched: Option<LatestPeers>) -> Self {
        // What was told already is no change any more.
        let peers = watched.as_mut().map(|watched| Arc::clone(&watched.borrow_and_update()));
        self.peers = peers.unwrap_or_default();
        self.watched_peers = watched;
        self
    }

    /// Takes out of everything what those rules say.
    #[must_use]
    pub fn with_redactor(mut self, redactor: Redactor) -> Self {
        self.interner = self.interner.with_redactor(redactor);
        self
    }

    /// A process was seen: takes over what was read of it.
    pub fn sight(&mut self, process: ProcessKey, cgroup: CgroupId, seen: Seen) {
        if let Some(sighting) = seen.sighting {
            self.python.sight(process, seen.python);
            self.symbols.accept(process, sighting);
        }
        if let Some(facts) = seen.facts {
            self.attributor.sight(process, cgroup, facts);
        }
    }

    /// A cgroup was made, and has that path below the mount.
    pub fn made(&mut self, cgroup: CgroupId, path: Arc<str>) {
        self.attributor.made(cgroup, path);
    }

    /// Code objects of a process were read: takes them over.
    pub fn read(&mut self, process: ProcessKey, read: python::Read) {
        if self.python.accept(process, read) {
            // Stacks with the old names; it is rare.
            self.stacks.clear();
        }
    }

    /// The limits that the symbols keep.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        self.symbols.limits()
    }

    /// Names everything in a flush.
    pub fn resolve(&mut self, flush: Flush, start: KTime, end: KTime, account: Account) -> Batch {
        if self.interner.turn_over() {
            self.stacks.clear();
            self.frames.clear();
        }
        if self.namer.refresh() {
            let namer = &mut self.namer;
            self.interner.rename(|workload| namer.name(workload));
        }
        if let Some(watched) = &mut self.watched_peers
            && watched.has_changed().unwrap_or_default()
        {
            self.peers = Arc::clone(&watched.borrow_and_update());
        }
        if self.stacks.len() > MAX_STACKS {
            self.stacks.clear();
        }
        let samples = flush
            .samples
            .iter()
            .map(|(key, stack, n, w)| self.sample(key, stack, *n, *w))
            .collect();
        let occurrences = flush.occurrences.iter().filter_map(|o| self.occurrence(o)).collect();
        self.sequence += 1;
        Batch {
            sequence: self.sequence,
            generation: self.interner.generation(),
            start,
            end,
            additions: Arc::new(self.interner.take_new()),
            samples,
            occurrences,
            occurrences_lost: flush.occurrences_lost,
            account,
        }
    }

    fn sample(
        &mut self,
        key: &SampleKey,
        stack: &Arc<RawStack>,
        count: u64,
        weight: u64,
    ) -> Sample {
        self.symbols.sight(key.process);
        let base = self.stack(key.process, stack);
        let mut frames: Vec<FrameId> = Vec::new();
        let signal = match key.subject {
            Subject::None => Signal::Cpu,
            Subject::Page(address) => {
                let region = self.symbols.region(key.process, address).mapping.path.clone();
                let kind = if key.probe == Probe::MajorFault { "major" } else { "minor" };
                frames.push(self.annotation(&format!("{kind} fault: {region}")));
                Signal::PageFault
            }
            Subject::Peer(..) => Signal::Retransmit,
        };
        frames.extend_from_slice(&base);
        if let Subject::Peer(remote, local_port) = key.subject {
            if base.is_empty() {
                frames.push(self.annotation(unknown_sender(key.probe, stack.end)));
            }
            let address = peer_name(remote, local_port);
            let text = match self.peer(remote.ip()) {
                Some(name) => format!("peer {name} ({address})"),
                None => format!("peer {address}"),
            };
            frames.push(self.annotation(&text));
        }
        let comm = self.comm(key.process, key.comm);
        Sample {
            signal,
            workload: self.workload(key.cgroup, key.process, key.comm),
            pid: key.process.pid,
            comm: self.interner.string(&comm),
            stack: self.interner.stack(&frames),
            count,
            weight,
        }
    }

    /// Who has that address. The pods of this node are known best.
    fn peer(&self, ip: IpAddr) -> Option<String> {
        let local = self.namer.pods().by_ip(ip);
        local
            .map(|pod| format!("{}/{}", pod.namespace, pod.name))
            .or_else(|| self.peers.by_ip(ip).map(|peer| peer.to_string()))
    }

    /// `None` for a kind that is not told one by one.
    fn occurrence(&mut self, raw: &RawOccurrence) -> Option<Occurrence> {
        let process = raw.task.process;
        self.symbols.sight(process);
        let frames = self.stack(process, &raw.stack);
        let comm = self.comm(process, raw.task.comm);
        let what = match raw.detail {
            Detail::Retransmit(r) => What::Retransmit {
                local: self.interner.address(r.local),
                remote: self.interner.address(r.remote),
                cause: r.cause,
                state: r.state,
                srtt_us: r.srtt_us,
                cwnd: r.cwnd,
                netns: r.netns,
                segments: raw.weight,
                sender_age_ns: (process.pid != 0).then_some(r.sender_age_ns),
            },
            Detail::Fault { address } => {
                let region = self.symbols.region(process, address);
                let mapping = self.mapping(&region.mapping);
                What::MajorFault { address, mapping, offset: region.offset }
            }
            Detail::OnCpu => return None,
        };
        Some(Occurrence {
            time: raw.time,
            workload: self.workload(raw.cgroup, process, raw.task.comm),
            pid: process.pid,
            tid: raw.task.tid,
            comm: self.interner.string(&comm),
            stack: self.interner.stack(&frames),
            stack_end: raw.stack.end,
            what,
        })
    }

    fn workload(&mut self, cgroup: CgroupId, process: ProcessKey, comm: Comm) -> WorkloadId {
        let executable = self.symbols.executable(process);
        let workload = self.attributor.workload(cgroup, process, comm, executable.as_deref());
        let namer = &mut self.namer;
        self.interner.workload_named(workload, |workload| namer.name(workload))
    }

    /// Name of the thread; a retransmit whose sender is not known has none.
    fn comm(&self, process: ProcessKey, comm: Comm) -> String {
        let name = comm.to_text();
        if process.pid == 0 && name.is_empty() { "[unknown sender]".to_owned() } else { name }
    }

    /// The frames of a stack, innermost first.
    fn stack(&mut self, process: ProcessKey, raw: &Arc<RawStack>) -> Resolved {
        // A stack of the kernel alone has the same names in every process.
        let kernel_only = usize::from(raw.kernel_frames) == raw.frames.len();
        let owner = if kernel_only { ProcessKey::default() } else { process };
        if let Some(known) = self.stacks.get(&(owner, raw.clone())) {
            return known.clone();
        }
        let (kernel, user) = raw.frames.split_at(raw.frames.len().min(raw.kernel_frames.into()));
        let python = user.len().saturating_sub(2 * usize::from(raw.python_frames));
        let (user, python) = user.split_at(python);
        let mut frames = Vec::with_capacity(raw.frames.len());
        for (index, address) in kernel.iter().enumerate() {
            let symbols = self.symbols.kernel(*address, index > 0);
            self.push(&mut frames, (FrameKind::Kernel, false), symbols);
        }
        for frame in self.merge(process, raw, user, python) {
            match frame {
                Merged::Native(index) => {
                    let Some(address) = user.get(index) else { continue };
                    // The innermost address is where the thread is, also behind a system call.
                    let marked = address & BY_FRAME_POINTER != 0;
                    let address = address & !BY_FRAME_POINTER;
                    let symbols = self.symbols.user(process, address, index > 0);
                    self.push(&mut frames, (FrameKind::User, marked), symbols);
                }
                Merged::Python(code, place) => frames.extend(self.python(process, code, place)),
            }
        }
        match raw.end {
            StackEnd::None | StackEnd::Complete | StackEnd::Torn => {}
            StackEnd::Truncated => frames.push(self.annotation("truncated stack")),
            end => {
                let reason = end.name().replace('_', " ");
                frames.push(self.annotation(&format!("incomplete stack: {reason}")));
            }
        }
        if matches!(raw.python_end, PythonEnd::Truncated | PythonEnd::Unreadable) {
            frames.push(self.annotation(&format!("{} Python stack", raw.python_end.name())));
        }
        let frames: Resolved = frames.into();
        self.stacks.insert((owner, raw.clone()), frames.clone());
        frames
    }

    /// Puts the Python frames of a stack where they belong among the native ones.
    fn merge(
        &self,
        process: ProcessKey,
        raw: &RawStack,
        user: &[u64],
        python: &[u64],
    ) -> Vec<Merged> {
        let program = self.python.program(process).filter(|_| !python.is_empty());
        let is_loop = |(index, address): (usize, &u64)| {
            let address = (address & !BY_FRAME_POINTER).wrapping_sub(u64::from(index > 0));
            program.is_some_and(|program| program.is_loop(address))
        };
        let loops: Vec<bool> = user.iter().enumerate().map(is_loop).collect();
        let complete = raw.end == StackEnd::Complete && raw.python_end == PythonEnd::Complete;
        python::merge::merge(&loops, python, complete)
    }

    /// The frame of a place in a Python function; `None` if it is not of the program.
    fn python(&mut self, process: ProcessKey, code: u64, place: u32) -> Option<FrameId> {
        let module = match self.python.program(process) {
            Some(program) => format!("[python 3.{}]", program.version.minor),
            None => "[python]".to_owned(),
        };
        let code = self.python.find(process, code);
        let (name, file, line) = match &code {
            Ok(code) if code.hidden => return None,
            Ok(code) => (&*code.name, &*code.file, code.line(place)),
            Err(unknown) => (unknown.name(), "", 0),
        };
        let mapping =
            Mapping { path: self.interner.string(&module), build_id: self.interner.string("") };
        let function = Function {
            name: self.interner.string(name),
            file: self.interner.string(file),
            mapping: self.interner.mapping(mapping),
        };
        let function = self.interner.function(function);
        Some(self.interner.frame(Frame {
            function,
            line,
            offset: 0,
            kind: FrameKind::Python,
            inlined: false,
            by_frame_pointer: false,
        }))
    }

    fn push(
        &mut self,
        frames: &mut Vec<FrameId>,
        (kind, by_frame_pointer): (FrameKind, bool),
        symbols: Arc<[Symbol]>,
    ) {
        let key = (kind, by_frame_pointer, ByAddress(symbols));
        if let Some(known) = self.frames.get(&key) {
            frames.extend_from_slice(known);
            return;
        }
        let mut ids = Vec::with_capacity(key.2.0.len());
        for symbol in key.2.0.iter() {
            let function = Function {
                name: self.interner.string(&symbol.name),
                file: self.interner.string(&symbol.file),
                mapping: self.mapping(&symbol.module),
            };
            let function = self.interner.function(function);
            ids.push(self.interner.frame(Frame {
                function,
                line: symbol.line,
                offset: if symbol.unknown.is_some() { symbol.offset } else { 0 },
                kind,
                inlined: symbol.inlined,
                by_frame_pointer,
            }));
        }
        frames.extend_from_slice(&ids);
        self.frames.insert(key, ids.into());
    }

    fn mapping(&mut self, module: &Module) -> MappingId {
        let mapping = Mapping {
            path: self.interner.string(&module.path),
            build_id: self.interner.string(&module.build_id),
        };
        self.interner.mapping(mapping)
    }

    fn annotation(&mut self, text: &str) -> FrameId {
        let none = self.interner.string("");
        let mapping = self.interner.mapping(Mapping { path: none, build_id: none });
        let name = self.interner.string(text);
        let function = self.interner.function(Function { name, file: none, mapping });
        self.interner.frame(Frame {
            function,
            line: 0,
            offset: 0,
            kind: FrameKind::Annotation,
            inlined: false,
            by_frame_pointer: false,
        })
    }
}

/// Why a retransmit carries no stack.
fn unknown_sender(probe: Probe, end: StackEnd) -> &'static str {
    match (probe, end) {
        (Probe::SynAck, _) => "handshake: no sender",
        (_, StackEnd::Torn) => "sender not known: sending while it was read",
        _ => "sender not known: nothing sent since the first retransmit",
    }
}

/// A peer as a person would name it: the service's port with it where one end has one.
#[must_use]
pub fn peer_name(remote: SocketAddr, local_port: u16) -> String {
    if remote.port() < FIRST_EPHEMERAL_PORT || remote.port() <= local_port {
        return remote.to_string();
    }
    match remote {
        SocketAddr::V4(v4) => v4.ip().to_string(),
        SocketAddr::V6(v6) => format!("[{}]", v6.ip()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_named_with_its_port_only_where_that_is_a_service() {
        let name = |remote: &str, local| remote.parse().map(|r| peer_name(r, local));
        assert_eq!(name("10.0.0.2:80", 40_000), Ok("10.0.0.2:80".to_owned()));
        assert_eq!(name("10.0.0.2:50000", 80), Ok("10.0.0.2".to_owned()));
        assert_eq!(name("[fd00::2]:50000", 443), Ok("[fd00::2]".to_owned()));
        assert_eq!(name("10.0.0.2:33333", 40_000), Ok("10.0.0.2:33333".to_owned()));
    }
}
