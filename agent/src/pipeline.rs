//! Wires the stages: kernel → decode → aggregate → resolve → whoever takes the batches.
//!
//! Four owners. The *collector*, a task, owns the kernel side and the aggregator: it drains the ring
//! buffer, flushes, and never waits for anyone. The *witness*, a thread, reads processes as soon as
//! they are seen, before they can exit. The *unwinder*, a thread, owns the unwind tables in the kernel. The
//! *resolver*, a thread, owns symbols, attribution and the
//! dictionary, and may spend seconds in a large file. Between them are bounded queues; while they
//! are full the collector goes on gathering into its bounded table, and what does not fit is counted
//! as dropped.

use std::{collections::VecDeque, sync::Arc, thread, time::Duration};

use hashbrown::HashMap;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior, interval, interval_at},
};
use tracing::{debug, error, warn};

use crate::{
    account::{Account, AgentDrop},
    aggregate::{Aggregator, Flush},
    attribute, clock,
    decode::decode,
    event::{CgroupId, Event, KTime, Probe, ProcessKey, StackEnd},
    follow::{Followed, Follower},
    kernel::{
        Config, Kernel, KernelError, ProbeState, Started,
        python::PythonMap,
        ring::{Ring, cgroup_change},
    },
    pods::Latest,
    profile::Batch,
    python::{self, Code, Program},
    resolve::{Resolver, Seen},
    symbols::{Limits, Sighting, Sights},
    unwinder::{self, Told, Unwinder, Unwinding},
};

/// How often the ring buffer is read when nothing wakes the agent. Longer means fewer wake-ups and
/// later names for short-lived processes that were seen before.
const POLL: Duration = Duration::from_millis(100);

/// How often the set of online CPUs, and of cgroups below a chosen one, is looked at.
const FOLLOW: Duration = Duration::from_millis(500);

/// Most records between two looks at the clock.
const DRAIN: usize = 8192;

/// Messages that may wait for the resolver, nearly all of them first sights of processes.
const QUEUE: usize = 1024;

/// Flushes that may be on their way at the same time: one being resolved, one waiting. Each may hold
/// some MiB.
const FLUSHES: usize = 2;

/// Processes whose sight was sent; beyond it all are forgotten, and sent again.
const MAX_SIGHTED: usize = 65_536;

/// How often a process with major faults is read again, in nanoseconds: each may be in a file that was
/// mapped since, and waits for a device far longer than that costs.
const FAULTED_AGAIN_NS: u64 = 10_000_000;

/// How often a process whose stack leads to unknown memory is read again: it may have loaded a library.
const LOST_AGAIN_NS: u64 = 100_000_000;

/// How often a process is read again for which there are no unwind tables: they may have made room for
/// others.
const WITHOUT_AGAIN_NS: u64 = 2_000_000_000;

/// Code objects that were sent to be read; beyond it all are forgotten, and sent again. Each costs some
/// 40 bytes.
const MAX_CODES: usize = 65_536;

/// How often a code object is read again: another may have taken its address. Each reading costs some
/// 10 µs.
const CODE_AGAIN_NS: u64 = 10_000_000_000;

/// When a new process is read again: some live no longer than the first, and by the last a program has
/// started.
const YOUNG: [Duration; 2] = [Duration::from_millis(3), Duration::from_millis(10)];

/// KiB of mappings, as text, that may wait for the resolver: those of some thousand processes.
const SEEN_KIB: u32 = 16 << 10;

/// How long the last counters may take to agree with the kernel's own when everything is stopped:
/// a program that runs on another CPU at that moment has counted its hit but not its end.
const SETTLE: Duration = Duration::from_millis(200);

/// How soon a new cgroup that is not there yet is looked for again: sooner than anything runs in it.
const AGAIN: Duration = Duration::from_millis(2);

/// Most changes of cgroups looked at between two looks at the records.
const CHANGES: usize = 1024;

/// How to run the pipeline.
pub struct Options {
    /// What to profile.
    pub kernel: Config,
    /// Time between two batches.
    pub flush: Duration,
    /// Keeps the filter of cgroups up to date.
    pub follower: Follower,
    /// When to look whether the filter is up to date, beside changes of cgroups.
    pub pods: Option<Latest>,
}

/// A running pipeline.
pub struct Pipeline {
    /// What became of each probe.
    pub probes: Vec<(Probe, ProbeState)>,
    /// CPUs sampled at the start.
    pub cpus: usize,
    /// What is known for unwinding, as it changes.
    pub unwinding: watch::Receiver<Unwinding>,
    stop: oneshot::Sender<()>,
    collector: tokio::task::JoinHandle<Account>,
}

/// In the order in which it is to be done: a process is read before its events are resolved.
enum Work {
    /// A new cgroup, with its path.
    Made(CgroupId, Arc<str>),
    Sight(ProcessKey, CgroupId, Option<(Seen, OwnedSemaphorePermit)>),
    /// Code objects of Python that were seen, by their addresses.
    Codes(ProcessKey, Vec<u64>),
    /// What was read of them.
    Read(ProcessKey, python::Read, OwnedSemaphorePermit),
    Flush {
        flush: Flush,
        start: KTime,
        end: KTime,
        account: Box<Account>,
        /// Its place among the [`FLUSHES`], until it is through.
        _place: OwnedSemaphorePermit,
    },
}

impl Pipeline {
    /// Starts profiling; each batch goes to `batches`. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// If the kernel side cannot start, or the resolver's thread cannot.
    pub fn start(
        options: Options,
        resolver: Resolver,
        batches: mpsc::Sender<Arc<Batch>>,
    ) -> Result<Self, KernelError> {
        let Started { mut kernel, ring, changes, tables } = Kernel::start(options.kernel)?;
        let python = PythonReader { reader: python::Reader::default(), map: kernel.python()? };
        let probes = Probe::ALL.iter().map(|p| (*p, kernel.state(*p).clone())).collect();
        let cpus = kernel.cpus().len();
        let (work, seen) = mpsc::channel(QUEUE);
        let (read, waiting) = mpsc::channel(QUEUE);
        let (tell, told) = std::sync::mpsc::sync_channel(unwinder::QUEUE);
        let (stats, unwinding) = watch::channel(Unwinding::default());
        let unwinder = Unwinder::new(tables, stats);
        let witness = Witness {
            sights: Sights::new(resolver.limits().clone()),
            limits: resolver.limits().clone(),
            python,
            unwinder: tell,
            young: VecDeque::new(),
            room: Arc::new(Semaphore::new(SEEN_KIB as usize)),
        };
        let clock = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .map_err(|e| KernelError::Io("start the thread that reads processes", e))?;
        thread::Builder::new()
            .name("witness".to_owned())
            .spawn(move || clock.block_on(witness.run(seen, read)))
            .map_err(|e| KernelError::Io("start the thread that reads processes", e))?;
        thread::Builder::new()
            .name("unwinder".to_owned())
            .spawn(move || unwinder.run(&told))
            .map_err(|e| KernelError::Io("start the thread that builds unwind tables", e))?;
        thread::Builder::new()
            .name("resolver".to_owned())
            .spawn(move || resolve_all(resolver, waiting, &batches))
            .map_err(|e| KernelError::Io("start the resolver's thread", e))?;
        let (stop, stopped) = oneshot::channel();
        let collector = Collector {
            kernel,
            aggregator: Aggregator::default(),
            account: Account::default(),
            work,
            places: Arc::new(Semaphore::new(FLUSHES)),
            sighted: HashMap::default(),
            codes: HashMap::default(),
            since: clock::monotonic(),
            follower: options.follower,
            pods: options.pods,
            changes,
        };
        let collector = tokio::spawn(collector.run(ring, options.flush, stopped));
        Ok(Self { probes, cpus, unwinding, stop, collector })
    }

    /// Stops every probe, takes what is still on its way, and returns the final account. The last
    /// batch has been sent to the resolver when this returns; the channel of batches closes when the
    /// resolver is through.
    pub async fn stop(self) -> Account {
        // The collector can only be gone if it panicked; then there is nothing to stop.
        let _ = self.stop.send(());
        match self.collector.await {
            Ok(account) => account,
            Err(e) => {
                error!("the collector ended early: {e}");
                Account::default()
            }
        }
    }
}

/// The thread that reads processes.
struct Witness {
    sights: Sights,
    limits: Limits,
    python: PythonReader,
    unwinder: std::sync::mpsc::SyncSender<Told>,
    /// Those to be read again, and when; the next one first.
    young: VecDeque<(Instant, ProcessKey, CgroupId)>,
    /// For what waits for the resolver.
    room: Arc<Semaphore>,
}

impl Witness {
    /// Reads processes until the collector is gone. A new one is read again: at its first event it may
    /// still be loading its libraries.
    async fn run(mut self, mut seen: mpsc::Receiver<Work>, read: mpsc::Sender<Work>) {
        loop {
            let due = self.young.front().map(|(due, ..)| *due);
            let again = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            let work = tokio::select! {
                biased;
                () = again => {
                    let Some((_, process, cgroup)) = self.young.pop_front() else { continue };
                    let Some(sighting) = self.sights.read_again(process) else { continue };
                    self.tell_unwinder(process, cgroup, &sighting);
                    let facts = attribute::facts(process);
                    let python = self.python.look(process, &sighting);
                    let seen = Seen { sighting: Some(sighting), facts, python };
                    Some(Work::Sight(process, cgroup, with_room(seen, &self.room)))
                }
                work = seen.recv() => work.map(|work| match work {
                    Work::Sight(process, cgroup, _) => {
                        let facts = attribute::facts(process);
                        let sighting = self.sights.read(process);
                        let python = (sighting.as_ref())
                            .and_then(|sighting| self.python.look(process, sighting));
                        if let Some(sighting) = &sighting {
                            self.tell_unwinder(process, cgroup, sighting);
                            for after in YOUNG {
                                self.again(process, cgroup, after);
                            }
                        }
                        let seen = Seen { sighting, facts, python };
                        Work::Sight(process, cgroup, with_room(seen, &self.room))
                    }
                    Work::Codes(process, codes) => self.read_codes(process, &codes),
                    other => other,
                }),
            };
            let Some(work) = work else { return };
            if read.send(work).await.is_err() {
                return;
            }
        }
    }

    /// Reads code objects of Python.
    fn read_codes(&self, process: ProcessKey, codes: &[u64]) -> Work {
        let codes = self.python.reader.read(process, codes);
        let bytes = codes.iter().map(|(_, code)| code.as_ref().map_or(64, Code::bytes));
        match room_for(bytes.sum(), &self.room) {
            Some(room) => Work::Read(process, codes, room),
            None => Work::Codes(process, Vec::new()),
        }
    }

    fn again(&mut self, process: ProcessKey, cgroup: CgroupId, after: Duration) {
        if self.young.len() < QUEUE {
            let due = Instant::now() + after;
            let at = self.young.partition_point(|(other, ..)| *other <= due);
            self.young.insert(at, (due, process, cgroup));
        }
    }

    fn tell_unwinder(&mut self, process: ProcessKey, cgroup: CgroupId, sighting: &Sighting) {
        let told = Told { process, code: sighting.code(&self.limits), at: sighting.at() };
        if self.unwinder.try_send(told).is_err() {
            // It is busy with others. Reading the process again later costs less than waiting.
            self.again(process, cgroup, YOUNG[1]);
        }
    }
}

/// What was seen, if there is room for it until the resolver comes to it. If not, the resolver reads
/// the process by itself.
fn with_room(seen: Seen, room: &Arc<Semaphore>) -> Option<(Seen, OwnedSemaphorePermit)> {
    let bytes = seen.sighting.as_ref().map_or(0, Sighting::bytes);
    room_for(bytes, room).map(|room| (seen, room))
}

fn room_for(bytes: usize, room: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    let kib = u32::try_from(bytes / 1024 + 1).unwrap_or(SEEN_KIB).min(SEEN_KIB);
    room.clone().try_acquire_many_owned(kib).ok()
}

/// Finds Python in processes, and tells the programs in the kernel.
struct PythonReader {
    reader: python::Reader,
    map: PythonMap,
}

impl PythonReader {
    fn look(&mut self, process: ProcessKey, seen: &Sighting) -> Option<Arc<Program>> {
        let found = self.reader.look(process, seen);
        if let Err(e) = self.map.set(process.pid, found.as_ref().map(|program| &program.process)) {
            warn!(pid = process.pid, "its Python frames are left out: {e}");
        }
        found
    }
}

/// The resolver's thread: until the collector is gone.
fn resolve_all(
    mut resolver: Resolver,
    mut waiting: mpsc::Receiver<Work>,
    batches: &mpsc::Sender<Arc<Batch>>,
) {
    while let Some(work) = waiting.blocking_recv() {
        match work {
            Work::Sight(process, cgroup, Some((seen, _room))) => {
                resolver.sight(process, cgroup, seen);
            }
            Work::Made(cgroup, path) => resolver.made(cgroup, path),
            Work::Read(process, codes, _room) => resolver.read(process, codes),
            // The resolver reads by itself what it needs and has not.
            Work::Sight(_, _, None) | Work::Codes(..) => {}
            Work::Flush { flush, start, end, account, _place } => {
                let batch = resolver.resolve(flush, start, end, *account);
                if batches.blocking_send(Arc::new(batch)).is_err() {
                    debug!("nobody takes batches any more");
                    return;
                }
            }
        }
    }
}

/// Waits until a cgroup came or went, or what is known of pods changed.
async fn changed(changes: &mut Option<Ring>, pods: &mut Option<Latest>) {
    let woken = async {
        if let Some(ring) = changes
            && ring.woken().await.is_ok()
        {
            return;
        }
        // After a failure, the tree is walked as before.
        std::future::pending().await
    };
    let told = async {
        if let Some(pods) = pods
            && pods.changed().await.is_ok()
        {
            return;
        }
        std::future::pending().await
    };
    tokio::select! {
        () = woken => {}
        () = told => {}
    }
}

struct Collector {
    kernel: Kernel,
    aggregator: Aggregator,
    account: Account,
    work: mpsc::Sender<Work>,
    places: Arc<Semaphore>,
    /// When each was last sent to be read, by the time of the event.
    sighted: HashMap<ProcessKey, KTime, foldhash::fast::RandomState>,
    /// When each code object of Python was last sent to be read, by the time of the event.
    codes: HashMap<(ProcessKey, u64), KTime, foldhash::fast::RandomState>,
    since: KTime,
    follower: Follower,
    pods: Option<Latest>,
    changes: Option<Ring>,
}

/// After what time since it was last read the event is a reason to read its process again.
fn again_after(event: &Event<'_>) -> Option<u64> {
    match (event.probe, event.stack.end) {
        (Probe::MajorFault, _) => Some(FAULTED_AGAIN_NS),
        (_, StackEnd::NoMapping) => Some(LOST_AGAIN_NS),
        (_, StackEnd::NoFramePointer) => Some(WITHOUT_AGAIN_NS),
        _ => None,
    }
}

impl Collector {
    async fn run(
        mut self,
        mut ring: Ring,
        flush: Duration,
        mut stop: oneshot::Receiver<()>,
    ) -> Account {
        let mut poll = interval(POLL.min(flush));
        let mut flushes = interval_at(Instant::now() + flush, flush);
        let mut follow = interval_at(Instant::now() + FOLLOW, FOLLOW);
        for timer in [&mut poll, &mut flushes, &mut follow] {
            timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        loop {
            let mut due = false;
            tokio::select! {
                biased;
                _ = &mut stop => break,
                _ = flushes.tick() => due = true,
                _ = follow.tick() => self.follow(),
                () = changed(&mut self.changes, &mut self.pods) => self.follow_cgroups(),
                () = tokio::time::sleep(AGAIN), if self.is_waiting() => self.follow_cgroups(),
                _ = poll.tick() => {}
                woken = ring.woken() => if let Err(e) = woken {
                    // Polling goes on; only the early wake-ups are gone.
                    warn!("wait for the ring buffer: {e}");
                    tokio::time::sleep(POLL).await;
                }
            }
            let mut more = true;
            while more {
                more = self.drain(&mut ring) == DRAIN;
                if due || self.aggregator.is_filling() {
                    if let Ok(place) = self.places.clone().try_acquire_owned() {
                        self.flush(place).await;
                    }
                    due = false;
                }
                // A storm must not keep the other tasks of this thread waiting.
                tokio::task::yield_now().await;
            }
        }
        self.finish(&mut ring).await
    }

    /// Takes what waits in the ring buffer, at most [`DRAIN`] records.
    fn drain(&mut self, ring: &mut Ring) -> usize {
        let Self { aggregator, sighted, codes, work, .. } = self;
        let mut fresh: HashMap<ProcessKey, Vec<u64>> = HashMap::new();
        let drained = ring.drain(DRAIN, |bytes| match decode(bytes) {
            Ok(event) => {
                let process = event.task.process;
                let due = sighted.get(&process).is_none_or(|last| {
                    again_after(&event).is_some_and(|after| event.time.0 >= last.0 + after)
                });
                if process.pid != 0 && due {
                    if sighted.len() >= MAX_SIGHTED {
                        sighted.clear();
                    }
                    // If the queue is full, the resolver looks when it gets the flush.
                    let _ = work.try_send(Work::Sight(process, event.cgroup, None));
                    sighted.insert(process, event.time);
                }
                for code in event.stack.codes() {
                    let due = codes
                        .get(&(process, code))
                        .is_none_or(|last| event.time.0.saturating_sub(last.0) >= CODE_AGAIN_NS);
                    if due {
                        if codes.len() >= MAX_CODES {
                            codes.clear();
                        }
                        codes.insert((process, code), event.time);
                        fresh.entry(process).or_default().push(code);
                    }
                }
                aggregator.add(&event);
            }
            Err(e) => {
                warn!("a record cannot be decoded: {e}");
                let probe = bytes.first().and_then(|kind| Probe::from_number(*kind));
                aggregator.drop(probe.unwrap_or(Probe::OnCpu), AgentDrop::Malformed);
            }
        });
        for (process, codes) in fresh {
            // As above.
            let _ = work.try_send(Work::Codes(process, codes));
        }
        drained
    }

    /// Sends what was gathered to the resolver, which has a place for it.
    async fn flush(&mut self, place: OwnedSemaphorePermit) {
        self.read_counters();
        let flush = self.aggregator.flush();
        for (account, count) in self.account.probes.iter_mut().zip(flush.aggregated) {
            account.aggregated += count;
        }
        let start = std::mem::replace(&mut self.since, clock::monotonic());
        let account = Box::new(self.account.clone());
        let work = Work::Flush { flush, start, end: self.since, account, _place: place };
        if self.work.send(work).await.is_err() {
            warn!("the resolver is gone: a flush is lost");
        }
    }

    fn read_counters(&mut self) {
        if let Err(e) = self.kernel.read_counters(&mut self.account.probes) {
            warn!("the counters cannot be read: {e}");
        }
        for (account, dropped) in self.account.probes.iter_mut().zip(self.aggregator.dropped()) {
            account.dropped_in_agent = *dropped;
        }
    }

    /// Follows CPUs and cgroups that come and go.
    fn follow(&mut self) {
        if let Err(e) = self.kernel.follow_cpus() {
            warn!("the online CPUs cannot be listed: {e}");
        }
        self.follow_cgroups();
    }

    /// Whether a new cgroup's directory is waited for.
    fn is_waiting(&self) -> bool {
        self.follower.is_waiting()
    }

    /// Follows cgroups, and the pods that they are of.
    fn follow_cgroups(&mut self) {
        let mut all = Vec::new();
        if let Some(changes) = &mut self.changes {
            changes.drain(CHANGES, |record| all.extend(cgroup_change(record)));
        }
        let Followed { made, verdicts } = self.follower.follow(&all);
        for (id, path) in made {
            // If the queue is full, the resolver asks at the first event.
            let _ = self.work.try_send(Work::Made(id, path));
        }
        if let Some(verdicts) = verdicts
            && let Err(e) = self.kernel.set_verdicts(&verdicts)
        {
            warn!("the cgroup filter cannot be updated: {e}");
        }
    }

    async fn finish(mut self, ring: &mut Ring) -> Account {
        self.kernel.stop();
        let limit = Instant::now() + SETTLE;
        loop {
            while self.drain(ring) > 0 {}
            self.read_counters();
            let mut settled = self.account.clone();
            for (account, count) in settled.probes.iter_mut().zip(self.aggregator.gathered()) {
                account.aggregated += count;
            }
            let violations = settled.violations(true);
            if violations.is_empty() || Instant::now() >= limit {
                debug!(?violations, "stopped");
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        match self.places.clone().acquire_owned().await {
            Ok(place) => self.flush(place).await,
            Err(e) => error!("the last flush has no place: {e}"),
        }
        self.account
    }
}
