//! The kernel side as the rest of the agent sees it: load the programs, attach them, read what they
//! counted, stop them. The only user of aya.
//!
//! A probe whose hook this kernel lacks is left out with its reason ([`ProbeState`]); the others
//! run. Nothing is pinned, so that nothing outlives the agent, `kill -9` included.

use std::{
    collections::{BTreeSet, HashSet},
    io,
    os::fd::AsFd,
};

use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    maps::{Array, HashMap, MapData, PerCpuArray},
    programs::{
        BtfTracePoint, PerfEvent as PerfEventProgram, Program, ProgramError,
        tp_btf::BtfTracePointLinkId,
    },
};
pub use podflame_wire::Verdict;
use podflame_wire::{Control, Counters, EXCEPT, ONLY_KEPT, Probe, field, map};
use tracing::{info, warn};
use zerocopy::transmute;

use self::{
    btf::{Btf, BtfError},
    perf::{PerfEvent, Source},
    python::PythonMap,
    ring::Ring,
    tables::Tables,
};
use crate::{
    account::{self, ProbeAccount},
    event::CgroupId,
};

pub mod btf;
pub mod perf;
pub mod python;
pub mod ring;
pub mod tables;

pub use aya::maps::MapError;

/// The object that `cargo xtask build-ebpf` makes.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../agent-ebpf/podflame.bpf.o"
));

/// Ring buffer bytes for each CPU: at 99 Hz with two full stacks a second of samples is 0.2 MiB, so
/// that a CPU's share holds a second of stalled agent. More costs locked kernel memory.
const RING_BYTES_PER_CPU: u32 = 256 << 10;

/// The ring buffer's least size: a storm of page faults on a small machine fills a smaller one
/// between two polls.
const RING_BYTES_MIN: u32 = 1 << 20;

/// The ring buffer's greatest size, whatever the machine.
const RING_BYTES_MAX: u32 = 32 << 20;

/// Most cgroups that [`Filter::cgroups`] can hold.
pub const MAX_CGROUPS: usize = podflame_wire::MAX_CGROUPS as usize;

/// What to profile, and how.
#[derive(Clone, Debug)]
pub struct Config {
    /// On-CPU samples a second on each CPU, in Hz.
    pub frequency_hz: u32,
    /// The probes to run.
    pub probes: BTreeSet<Probe>,
    /// What to keep.
    pub filter: Filter,
    /// Size of the ring buffer in bytes; by the number of CPUs if not given. Rounded up to a power
    /// of two of pages.
    pub ring_bytes: Option<u32>,
}

/// What the programs keep; everything else they count as filtered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Only what is in cgroups that are kept.
    pub only_kept: bool,
    /// Some cgroups are never stored.
    pub except: bool,
    /// What each cgroup is to the filter; those made in one later are as it is.
    pub verdicts: Verdicts,
    /// Only this thread group.
    pub pid: Option<u32>,
}

/// What cgroups are to the filter.
pub type Verdicts = Vec<(CgroupId, Verdict)>;

/// Why the kernel side did not start.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No type information.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// The object was refused as a whole.
    #[error(
        "load the BPF object: {0} (needs root, or CAP_BPF and CAP_PERFMON; see `podflame doctor`)"
    )]
    Load(#[from] aya::EbpfError),
    /// A map is not there or not as expected: the object and the agent do not belong together.
    #[error("BPF map {name}: {cause}")]
    Map {
        /// Its name.
        name: &'static str,
        /// Why.
        cause: String,
    },
    /// The ring buffer or a list of the kernel cannot be read.
    #[error("{0}: {1}")]
    Io(&'static str, #[source] io::Error),
    /// Nothing that was asked for can run.
    #[error("no probe could be attached: {0}")]
    NothingAttached(String),
}

/// What became of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeState {
    /// It was not asked for.
    Off,
    /// It runs.
    Active,
    /// It does not run, for this reason.
    Failed(String),
}

/// What a start gives.
pub struct Started {
    /// The kernel side.
    pub kernel: Kernel,
    /// The reading end of the records.
    pub ring: Ring,
    /// That of changes of cgroups, if they can be followed.
    pub changes: Option<Ring>,
    /// The unwind tables.
    pub tables: Tables,
}

/// The loaded programs.
pub struct Kernel {
    ebpf: Ebpf,
    config: Config,
    counters: PerCpuArray<MapData, [u64; COUNTER_WORDS]>,
    events: Vec<(Probe, PerfEvent)>,
    links: Vec<(Probe, BtfTracePointLinkId)>,
    states: Vec<(Probe, ProbeState)>,
    cpus: Vec<u32>,
    /// The cgroups whose verdict was set, and is to be taken back.
    judged: HashSet<CgroupId>,
}

/// The kernel's own count of a program's runs, read after ours, if it can be compared with ours: something
/// must have had `BPF_ENABLE_STATS` on all the time.
fn comparable(hits: u64, count: u64, cpus: usize) -> Option<u64> {
    // One run a CPU can have counted its hit and not its end. More that are not counted never will be.
    (count > 0 && hits <= count + cpus as u64).then_some(count)
}

const COUNTER_WORDS: usize = size_of::<Counters>() / 8;

/// Name of a probe's program in the object.
fn program_name(probe: Probe) -> &'static str {
    match probe {
        Probe::OnCpu => "on_cpu",
        Probe::MinorFault => "minor_fault",
        Probe::MajorFault => "major_fault",
        Probe::Retransmit => "retransmit",
        Probe::SynAck => "synack",
        Probe::Sender => "sender_stack",
    }
}

/// The tracepoint a probe is on; `None` for a perf event.
#[must_use]
pub fn tracepoint(probe: Probe) -> Option<&'static str> {
    match probe {
        Probe::OnCpu | Probe::MinorFault | Probe::MajorFault => None,
        Probe::Retransmit => Some("tcp_retransmit_skb"),
        Probe::SynAck => Some("tcp_retransmit_synack"),
        Probe::Sender => Some("sock_send_length"),
    }
}

impl Kernel {
    /// Loads the programs and attaches the probes that are asked for; must be called within a tokio
    /// runtime.
    ///
    /// # Errors
    ///
    /// If the object is refused, or no probe at all could be attached.
    pub fn start(config: Config) -> Result<Started, KernelError> {
        let types = Btf::from_sys()?;
        let aya_types = aya::Btf::from_sys_fs()
            .map_err(|e| KernelError::Map { name: "BTF", cause: e.to_string() })?;
        let cpus = perf::online_cpus().map_err(|e| KernelError::Io("list the online CPUs", e))?;
        let ring_bytes = config.ring_bytes.unwrap_or(
            (RING_BYTES_PER_CPU.saturating_mul(cpus.len() as u32))
                .clamp(RING_BYTES_MIN, RING_BYTES_MAX)
                .next_power_of_two(),
        );
        let mut ebpf = load(&types, &aya_types, ring_bytes)?;
        attach_logger(&mut ebpf);
        let ring = take_map(&mut ebpf, map::EVENTS)?;
        let ring = aya::maps::RingBuf::try_from(ring).map_err(|e| wrong_map(map::EVENTS, &e))?;
        let ring = Ring::new(ring).map_err(|e| KernelError::Io("watch the ring buffer", e))?;
        let counters = PerCpuArray::try_from(take_map(&mut ebpf, map::COUNTERS)?)
            .map_err(|e| wrong_map(map::COUNTERS, &e))?;
        let tables = take_tables(&mut ebpf)?;
        set_control(&mut ebpf, &config.filter, ring_bytes)?;
        let mut kernel = Self {
            ebpf,
            counters,
            events: Vec::new(),
            links: Vec::new(),
            states: Vec::new(),
            cpus,
            judged: HashSet::new(),
            config,
        };
        // Before the first event: what is excluded is so from the start.
        let changes = kernel.follow_cgroups(&aya_types);
        let verdicts = std::mem::take(&mut kernel.config.filter.verdicts);
        kernel.set_verdicts(&verdicts)?;
        kernel.attach_all(&aya_types)?;
        Ok(Started { kernel, ring, changes, tables })
    }

    fn attach_all(&mut self, types: &aya::Btf) -> Result<(), KernelError> {
        for &probe in Probe::ALL {
            let state = if !self.config.probes.contains(&probe) {
                ProbeState::Off
            } else {
                match self.attach(probe, types) {
                    Ok(()) => ProbeState::Active,
                    Err(reason) => {
                        warn!(probe = probe.name(), reason, "a probe is left out");
                        ProbeState::Failed(reason)
                    }
                }
            };
            self.states.push((probe, state));
        }
        if self.states.iter().any(|(_, state)| *state == ProbeState::Active) {
            return Ok(());
        }
        let reasons: Vec<_> = self
            .states
            .iter()
            .filter_map(|(probe, state)| match state {
                ProbeState::Failed(reason) => Some(format!("{}: {reason}", probe.name())),
                _ => None,
            })
            .collect();
        Err(KernelError::NothingAttached(reasons.join("; ")))
    }

    fn attach(&mut self, probe: Probe, types: &aya::Btf) -> Result<(), String> {
        if let Some(hook) = tracepoint(probe) {
            let program: &mut BtfTracePoint = self.program(probe)?;
            program.load(hook, types).map_err(|e| explain(&e))?;
            let link = program.attach().map_err(|e| explain(&e))?;
            self.links.push((probe, link));
            return Ok(());
        }
        let program: &mut PerfEventProgram = self.program(probe)?;
        program.load().map_err(|e| explain(&e))?;
        for cpu in self.cpus.clone() {
            self.sample(probe, cpu).map_err(|e| format!("perf event on cpu {cpu}: {e}"))?;
        }
        Ok(())
    }

    /// Starts a perf probe on one CPU.
    fn sample(&mut self, probe: Probe, cpu: u32) -> Result<(), String> {
        let source = match probe {
            Probe::OnCpu => Source::CpuClock(self.config.frequency_hz),
            Probe::MinorFault => Source::MinorFaults,
            _ => Source::MajorFaults,
        };
        let program: &mut PerfEventProgram = self.program(probe)?;
        let fd = program.fd().map_err(|e| e.to_string())?;
        let event = PerfEvent::start(source, cpu, fd.as_fd()).map_err(|e| e.to_string())?;
        self.events.push((probe, event));
        Ok(())
    }

    fn program<'a, P>(&'a mut self, probe: Probe) -> Result<&'a mut P, String>
    where
        &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
    {
        self.named(program_name(probe))
    }

    fn named<'a, P>(&'a mut self, name: &str) -> Result<&'a mut P, String>
    where
        &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
    {
        self.ebpf
            .program_mut(name)
            .ok_or_else(|| format!("the object has no program {name}"))?
            .try_into()
            .map_err(|e: ProgramError| e.to_string())
    }

    /// Follows CPUs that went offline or came back: the kernel ends the events of a CPU that goes.
    /// Returns whether anything changed.
    ///
    /// # Errors
    ///
    /// If the list of CPUs cannot be read.
    pub fn follow_cpus(&mut self) -> io::Result<bool> {
        let now = perf::online_cpus()?;
        if now == self.cpus {
            return Ok(false);
        }
        info!(before = ?self.cpus, now = ?now, "the set of online CPUs changed");
        let came: Vec<u32> = now.iter().copied().filter(|cpu| !self.cpus.contains(cpu)).collect();
        self.events.retain(|(_, event)| now.contains(&event.cpu));
        for &cpu in &came {
            for probe in [Probe::OnCpu, Probe::MinorFault, Probe::MajorFault] {
                if self.state(probe) == &ProbeState::Active
                    && let Err(reason) = self.sample(probe, cpu)
                {
                    warn!(probe = probe.name(), cpu, reason, "a CPU is not sampled");
                }
            }
        }
        self.cpus = now;
        Ok(true)
    }

    /// What became of a probe.
    #[must_use]
    pub fn state(&self, wanted: Probe) -> &ProbeState {
        const OFF: &ProbeState = &ProbeState::Off;
        self.states.iter().find(|(probe, _)| *probe == wanted).map_or(OFF, |(_, state)| state)
    }

    /// The CPUs that are sampled.
    #[must_use]
    pub fn cpus(&self) -> &[u32] {
        &self.cpus
    }

    /// Attaches what tells of cgroups that come and go. `None` if this kernel cannot: new ones are then
    /// found by walking.
    fn follow_cgroups(&mut self, types: &aya::Btf) -> Option<Ring> {
        for (name, hook) in [("cgroup_made", "cgroup_mkdir"), ("cgroup_removed", "cgroup_rmdir")] {
            let attached = self.named::<BtfTracePoint>(name).and_then(|program| {
                program.load(hook, types).map_err(|e| explain(&e))?;
                program.attach().map_err(|e| explain(&e))
            });
            if let Err(reason) = attached {
                warn!(hook, reason, "cgroups are found by walking");
                return None;
            }
        }
        let ring = take_map(&mut self.ebpf, map::CGROUP_CHANGES).ok()?;
        Ring::new(aya::maps::RingBuf::try_from(ring).ok()?).ok()
    }

    /// Replaces what cgroups are to the filter. What a new one took over from the one that it is in
    /// stays until it is in `verdicts` once.
    ///
    /// # Errors
    ///
    /// If there are more than the map holds.
    pub fn set_verdicts(&mut self, verdicts: &[(CgroupId, Verdict)]) -> Result<(), KernelError> {
        let mut map: HashMap<_, u64, u8> =
            HashMap::try_from(map_mut(&mut self.ebpf, map::CGROUPS)?)
                .map_err(|e| wrong_map(map::CGROUPS, &e))?;
        for (id, verdict) in verdicts {
            map.insert(id.0, *verdict as u8, 0).map_err(|e| wrong_map(map::CGROUPS, &e))?;
        }
        let now: HashSet<CgroupId> = verdicts.iter().map(|(id, _)| *id).collect();
        // What came and went unseen is left over; it is looked for before it fills the map.
        let left_over = map.keys().filter_map(Result::ok).map(CgroupId);
        let left_over: Vec<CgroupId> = left_over.filter(|id| !now.contains(id)).collect();
        let crowded = left_over.len() + now.len() > MAX_CGROUPS / 2;
        for id in left_over.iter().filter(|id| crowded || self.judged.contains(*id)) {
            // It can only be gone already.
            let _ = map.remove(&id.0);
        }
        self.judged = now;
        Ok(())
    }

    /// The map of processes that run Python, for whoever finds them. Can be taken once.
    ///
    /// # Errors
    ///
    /// If it is not there.
    pub fn python(&mut self) -> Result<PythonMap, KernelError> {
        PythonMap::new(take_map(&mut self.ebpf, map::PYTHON)?)
    }

    /// Stops every probe. What is in the ring buffer stays readable, and so do the counters.
    pub fn stop(&mut self) {
        self.events.clear();
        for (probe, link) in std::mem::take(&mut self.links) {
            let detached = self
                .program::<BtfTracePoint>(probe)
                .and_then(|program| program.detach(link).map_err(|e| e.to_string()));
            if let Err(reason) = detached {
                warn!(probe = probe.name(), reason, "detach");
            }
        }
    }

    /// Takes over into `accounts` what the programs counted, and what the kernel counted of them.
    ///
    /// # Errors
    ///
    /// If a counter cannot be read.
    pub fn read_counters(
        &mut self,
        accounts: &mut [ProbeAccount; Probe::ALL.len()],
    ) -> Result<(), KernelError> {
        for (&probe, account) in Probe::ALL.iter().zip(accounts) {
            let per_cpu = self
                .counters
                .get(&u32::from(probe as u8), 0)
                .map_err(|e| wrong_map(map::COUNTERS, &e))?;
            let counters: Vec<Counters> =
                per_cpu.iter().map(|words: &[u64; COUNTER_WORDS]| transmute!(*words)).collect();
            account.set_kernel(&account::sum(&counters));
            account.active = self.state(probe) == &ProbeState::Active;
            let stats = self
                .ebpf
                .program(program_name(probe))
                .and_then(|program| program.fd().ok())
                .and_then(|fd| run_stats(fd.as_fd()));
            account.run_count =
                stats.and_then(|(count, _)| comparable(account.hits, count, self.cpus.len()));
            account.run_time_ns = account.run_count.and(stats).map(|(_, time)| time);
        }
        Ok(())
    }
}

/// How often a program ran and for how many nanoseconds, by the kernel's own count, which stands
/// still while nothing has `BPF_ENABLE_STATS` on.
fn run_stats(program: std::os::fd::BorrowedFd<'_>) -> Option<(u64, u64)> {
    use std::os::fd::AsRawFd;
    // The kernel shows both in the descriptor's fdinfo (`bpf_prog_show_fdinfo`).
    let text =
        std::fs::read_to_string(format!("/proc/self/fdinfo/{}", program.as_raw_fd())).ok()?;
    let value = |key: &str| {
        text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok())
    };
    Some((value("run_cnt:")?, value("run_time_ns:")?))
}

fn load(types: &Btf, aya_types: &aya::Btf, ring_bytes: u32) -> Result<Ebpf, KernelError> {
    let offsets: Vec<(&str, u32)> = field::ALL
        .iter()
        .map(|(global, name, path)| {
            (*global, types.field_offset(name, path).unwrap_or(field::ABSENT))
        })
        .collect();
    let mut loader = EbpfLoader::new();
    loader
        .btf(Some(aya_types))
        .verifier_log_level(VerifierLogLevel::STATS)
        .map_max_entries(map::EVENTS, ring_bytes);
    for (global, offset) in &offsets {
        if *offset == field::ABSENT {
            info!(field = global, "this kernel has no such field");
        }
        loader.override_global(global, offset, true);
    }
    Ok(loader.load(OBJECT)?)
}

/// Carries the programs' rare diagnostics into the agent's log.
fn attach_logger(ebpf: &mut Ebpf) {
    let logger = match aya_log::EbpfLogger::init(ebpf) {
        Ok(logger) => logger,
        Err(e) => return warn!("the programs' own log is not available: {e}"),
    };
    match ring::watch(logger) {
        Ok(mut logger) => {
            tokio::spawn(async move {
                while let Ok(mut guard) = logger.readable_mut().await {
                    guard.get_inner_mut().flush();
                    guard.clear_ready();
                }
            });
        }
        Err(e) => warn!("the programs' own log is not available: {e}"),
    }
}

fn set_control(ebpf: &mut Ebpf, filter: &Filter, ring_bytes: u32) -> Result<(), KernelError> {
    let control = Control {
        cgroups: (ONLY_KEPT * u32::from(filter.only_kept)) | (EXCEPT * u32::from(filter.except)),
        only_pid: filter.pid.unwrap_or(0),
        wake_bytes: u64::from(ring_bytes / 4),
    };
    let control: [u64; size_of::<Control>() / 8] = transmute!(control);
    let mut map: Array<_, [u64; size_of::<Control>() / 8]> =
        Array::try_from(map_mut(ebpf, map::CONTROL)?).map_err(|e| wrong_map(map::CONTROL, &e))?;
    map.set(0, control, 0).map_err(|e| wrong_map(map::CONTROL, &e))
}

fn take_map(ebpf: &mut Ebpf, name: &'static str) -> Result<aya::maps::Map, KernelError> {
    ebpf.take_map(name).ok_or_else(|| wrong_map(name, &"not in the object"))
}

fn take_tables(ebpf: &mut Ebpf) -> Result<Tables, KernelError> {
    fn typed<T: TryFrom<aya::maps::Map, Error = MapError>>(
        ebpf: &mut Ebpf,
        name: &'static str,
    ) -> Result<T, KernelError> {
        T::try_from(take_map(ebpf, name)?).map_err(|e| wrong_map(name, &e))
    }
    let tables = take_map(ebpf, map::TABLES)?;
    let aya::maps::Map::ArrayOfMaps(data) = &tables else {
        return Err(wrong_map(map::TABLES, &"not an array of maps"));
    };
    let tables_fd = data.fd().as_fd().try_clone_to_owned();
    let tables_fd = tables_fd.map_err(|e| wrong_map(map::TABLES, &e))?;
    Ok(Tables {
        rules: typed(ebpf, map::RULES)?,
        tables: tables.try_into().map_err(|e: MapError| wrong_map(map::TABLES, &e))?,
        tables_fd,
        mappings: typed(ebpf, map::MAPPINGS)?,
        processes: typed(ebpf, map::PROCESSES)?,
        empty: Tables::empty().map_err(|e| wrong_map(map::TABLES, &e))?,
        staged: Vec::new(),
    })
}

fn map_mut<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut aya::maps::Map, KernelError> {
    ebpf.map_mut(name).ok_or_else(|| wrong_map(name, &"not in the object"))
}

fn wrong_map(name: &'static str, error: &dyn std::fmt::Display) -> KernelError {
    KernelError::Map { name, cause: error.to_string() }
}

/// A load or attach error in one line with its cause; the verifier's log goes to the debug log.
fn explain(error: &ProgramError) -> String {
    if let ProgramError::LoadError { io_error, verifier_log } = error {
        tracing::debug!("verifier log:\n{verifier_log}");
        return format!("the kernel refused the program: {io_error}");
    }
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_compared_only_while_the_kernel_counts_them_all() {
        assert_eq!(comparable(0, 0, 2), None);
        assert_eq!(comparable(10, 9, 2), Some(9), "one is on its way");
        assert_eq!(comparable(20, 20, 2), Some(20));
        assert_eq!(comparable(20, 25, 2), Some(25), "it went on while they were read");
        assert_eq!(comparable(200, 100, 2), None, "it began late, or ended early");
    }
}
