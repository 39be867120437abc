//! A simulated node: six services that call each other, a batch job, and faults to inject.
//!
//! It is no proof that the correlator works on a kernel, whose numbers are dirtier. It has what fools
//! simple detectors: log-normal times, Poisson counts, a load that wanders, CPU time known from 99
//! samples a second, waits that are sampled, moments in which nothing moves, idle threads whose waits
//! look like waits for a lock, and faults that spread to callers.

use std::{collections::BTreeMap, sync::Arc};

use super::rng::Rng;
use crate::correlate::{
    Correlator, Event, Metric, Name, Observation, Slot, Source, Subject, Times, Value,
};

/// Nanoseconds of a CPU sample at 99 Hz.
const SAMPLE: f64 = 1e9 / 99.0;

const MS: f64 = 1e6;

pub(super) const NAMES: [&str; 7] =
    ["frontend", "checkout", "payments", "inventory", "storage", "recommender", "batch"];

const BATCH: usize = 6;

struct Service {
    rate: f64,
    cpu: f64,
    calls: &'static [usize],
    lock: f64,
    file: f64,
    faults: f64,
}

const SERVICES: [Service; 6] = [
    Service { rate: 50.0, cpu: 1.5 * MS, calls: &[1, 5], lock: 0.05 * MS, file: 0.0, faults: 5.0 },
    Service { rate: 50.0, cpu: 2.0 * MS, calls: &[2, 3], lock: 0.05 * MS, file: 0.0, faults: 8.0 },
    Service { rate: 50.0, cpu: 2.5 * MS, calls: &[], lock: 0.1 * MS, file: 0.0, faults: 10.0 },
    Service { rate: 50.0, cpu: 1.5 * MS, calls: &[4], lock: 0.05 * MS, file: 0.0, faults: 4.0 },
    Service { rate: 50.0, cpu: 1.0 * MS, calls: &[], lock: 0.05 * MS, file: 0.6 * MS, faults: 6.0 },
    Service { rate: 50.0, cpu: 3.0 * MS, calls: &[], lock: 0.4 * MS, file: 0.0, faults: 20.0 },
];

/// What goes wrong. Each has a size: 0 is small, 1 middle, 2 large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Quiet,
    /// A load that rises and falls by half within 20 minutes.
    Ramp,
    /// checkout ⇄ payments.
    PathLoss,
    /// Everything to and from checkout.
    PodLoss,
    /// A function of payments.
    Code,
    /// A lock of recommender.
    Lock,
    /// payments allocates.
    Allocation,
    /// storage does not fit into its memory.
    PageCache,
    /// inventory is throttled.
    CpuLimit,
    /// batch runs on the CPU of recommender.
    Neighbour,
    /// payments sleeps, which checkout feels.
    SlowPeer,
    /// batch connects to frontend.
    Storm,
    /// More requests for all.
    Load,
    /// A lock of recommender is hardly ever free.
    Stall,
    /// Hardly any requests for all.
    Stop,
}

impl Fault {
    fn size(self, size: usize) -> f64 {
        let sizes = match self {
            Self::Quiet | Self::Ramp => [0.0; 3],
            Self::Stall | Self::Stop => [0.1, 0.03, 0.0],
            Self::PathLoss | Self::PodLoss => [0.01, 0.05, 0.2],
            Self::Code => [1.6, 3.0, 6.0],
            Self::Lock => [2.0, 8.0, 30.0],
            Self::Allocation => [500.0, 2000.0, 6000.0],
            Self::PageCache => [0.8, 3.0, 10.0],
            Self::CpuLimit => [0.15, 0.35, 0.6],
            Self::Neighbour => [0.8, 3.0, 10.0],
            Self::SlowPeer => [4.0, 15.0, 80.0],
            Self::Storm => [300.0, 1200.0, 4000.0],
            Self::Load => [1.6, 2.2, 3.5],
        };
        sizes[size]
    }
}

pub(super) struct Sim {
    rng: Rng,
    names: Vec<Name>,
    fault: Fault,
    size: f64,
    /// Slots of the fault.
    begin: u64,
    end: u64,
    start: u64,
    /// Slots so far.
    at: u64,
    /// Autocorrelated noise of the load, and of the throttling's period.
    load: f64,
    /// What is told once a second.
    second: BTreeMap<(usize, Metric, Option<&'static str>), f64>,
    /// Share of the slots that are not told, and not covered either.
    pub(super) dropped: f64,
    dropping: Rng,
    /// How often a service stops for a moment, in a slot.
    pub(super) pauses: f64,
    /// The order in which pods are told of.
    pub(super) order: Vec<usize>,
    pub(super) told: u64,
}

/// What a service did in a slot.
#[derive(Default)]
struct Done {
    answered: Vec<f64>,
}

impl Sim {
    pub(super) fn new(seed: u64, fault: Fault, size: usize, begin_s: u64, end_s: u64) -> Self {
        Self {
            rng: Rng::new(seed),
            names: NAMES.iter().map(|n| Name::from(*n)).collect(),
            fault,
            size: fault.size(size),
            begin: begin_s * 10,
            end: end_s * 10,
            start: 1000,
            at: 0,
            load: 0.0,
            second: BTreeMap::new(),
            dropped: 0.0,
            dropping: Rng::new(seed ^ 0x5eed),
            pauses: 0.002,
            order: (0..NAMES.len()).collect(),
            told: 0,
        }
    }

    pub(super) fn starting(mut self, slot: u64) -> Self {
        self.start = slot;
        self
    }

    /// The slot that a second of the simulation is.
    pub(super) fn slot(&self, second: u64) -> Slot {
        Slot(self.start + second * 10)
    }

    fn is(&self, fault: Fault) -> bool {
        self.fault == fault && (self.begin..self.end).contains(&self.at)
    }

    fn sized(&self, fault: Fault, usual: f64) -> f64 {
        if self.is(fault) { self.size } else { usual }
    }

    /// Runs for a while; returns what the correlator told.
    pub(super) fn run(&mut self, correlator: &mut Correlator, seconds: u64) -> Vec<Event> {
        let mut events = Vec::new();
        for _ in 0..seconds {
            let mut told = Vec::new();
            let first = self.at;
            for _ in 0..10 {
                self.slot_passes(&mut told);
                self.at += 1;
            }
            self.second_passes(&mut told);
            let slot = |at| Slot(self.start + at);
            let unknown: Vec<bool> = (0..10).map(|_| self.dropping.chance(self.dropped)).collect();
            for at in first..self.at {
                let share = if unknown[(at - first) as usize] { 0.0 } else { 1.0 };
                for source in Source::ALL {
                    correlator.cover(source, slot(at), slot(at + 1), share);
                }
            }
            told.retain(|o| o.slots > 1 || !unknown[(o.slot.0 - self.start - first) as usize]);
            let rank = |o: &Observation| {
                let of = o.workload.as_ref().and_then(|w| self.names.iter().position(|n| n == w));
                of.and_then(|w| self.order.iter().position(|o| *o == w))
            };
            told.sort_by_key(rank);
            told.iter().for_each(|o| correlator.observe(o));
            self.told += told.len() as u64;
            events.extend(correlator.tick(slot(self.at)));
        }
        events
    }

    fn slot_passes(&mut self, told: &mut Vec<Observation>) {
        let drift = 0.02 * self.rng.normal();
        self.load = self.load * 0.99 + drift;
        let ramp = match self.fault {
            Fault::Ramp => 1.0 + 0.5 * (self.at as f64 / 12_000.0 * std::f64::consts::TAU).sin(),
            _ => 1.0,
        };
        let load =
            self.load.exp() * ramp * self.sized(Fault::Load, 1.0) * self.sized(Fault::Stop, 1.0);
        let mut done: [Done; 6] = Default::default();
        // Callees first.
        for of in [4, 2, 3, 5, 1, 0] {
            done[of] = self.serve(of, load, &done, told);
        }
        let batch = if self.is(Fault::Neighbour) { 0.9e8 } else { 0.02e8 };
        let burnt = self.rng.time(batch, 0.3);
        self.add(BATCH, Metric::Cpu, None, burnt);
    }

    /// A call: how long its answer takes to come, and who had to send again.
    fn call(&mut self, of: usize, peer: usize, answers: &[f64]) -> (f64, f64, f64) {
        let answer = if answers.is_empty() {
            self.rng.time(SERVICES[peer].cpu * 1.3, 0.4)
        } else {
            answers[(self.rng.unit() * answers.len() as f64) as usize]
        };
        let loss = match (of, peer) {
            (1, 2) => self.sized(Fault::PathLoss, 0.0).max(self.sized(Fault::PodLoss, 0.0)),
            (0, 1) | (1, _) => self.sized(Fault::PodLoss, 0.0),
            _ => 0.0,
        };
        let (mut wait, mut mine, mut theirs) = (answer + self.rng.time(0.15 * MS, 0.5), 0.0, 0.0);
        if self.rng.chance(0.0002) {
            mine += 1.0;
            wait += 200.0 * MS;
        }
        let mut timeout = 200.0 * MS;
        while self.rng.chance(loss) && timeout < 2e9 {
            if self.rng.chance(0.5) {
                mine += 1.0
            } else {
                theirs += 1.0
            }
            wait += timeout;
            timeout *= 2.0;
        }
        (wait, mine, theirs)
    }

    fn serve(
        &mut self,
        of: usize,
        load: f64,
        done: &[Done; 6],
        told: &mut Vec<Observation>,
    ) -> Done {
        let service = &SERVICES[of];
        let stalled = of == 5 && self.is(Fault::Stall);
        let rate = service.rate * if stalled { self.size } else { 1.0 };
        let count = self.rng.poisson(rate * load / 10.0) as usize;
        let mut response = Times::default();
        let mut result = Done::default();
        let mut peers = vec![(Times::default(), 0.0, 0.0); service.calls.len()];
        let (mut cpu, mut dear, mut kernel, mut queue, mut lock, mut file) =
            (0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
        let (mut minor, mut missed, mut slept, mut throttled) = (0.0, 0.0, 0.0, 0.0);
        // More work makes everybody wait a little longer for a CPU.
        let crowd = load.max(0.2).powi(2);
        for _ in 0..count {
            let base = self.rng.time(service.cpu, 0.35);
            let mut run = base;
            if of == 2 && self.is(Fault::Code) {
                let more = base * 0.4 * (self.size - 1.0);
                dear += more;
                run += more;
            }
            let mut faults = self.rng.time(service.faults, 0.5);
            if of == 2 && self.is(Fault::Allocation) {
                faults += self.rng.time(self.size, 0.3);
            }
            kernel += faults * 700.0;
            run += faults * 700.0;
            minor += faults;
            if of == 0 && self.is(Fault::Storm) {
                let extra = self.size / service.rate * 0.1 * MS;
                run += extra;
                kernel += extra;
            }
            let mut waits = self.rng.time(0.15 * MS * crowd, 1.0);
            if of == 5 && self.is(Fault::Neighbour) {
                waits += self.rng.time(self.size * MS, 0.8);
            }
            if of == 3 && self.is(Fault::CpuLimit) && self.rng.chance(self.size) {
                waits += self.rng.unit() * self.size * 100.0 * MS;
            }
            let mut locked = self.rng.time(service.lock * crowd, 1.0);
            if of == 5 && self.is(Fault::Lock) {
                locked += self.rng.time(self.size * MS, 0.7);
            }
            let mut read = self.rng.time(service.file, 0.8);
            if of == 4 {
                let misses = self.rng.poisson(self.sized(Fault::PageCache, 0.05));
                missed += misses;
                read += misses * self.rng.time(1.5 * MS, 0.5);
            }
            let sleep = if of == 2 && self.is(Fault::SlowPeer) {
                self.rng.time(self.size * MS, 0.2)
            } else {
                0.0
            };
            let mut total = run + waits + locked + read + sleep + self.rng.time(0.1 * MS, 0.5);
            for (index, peer) in service.calls.iter().enumerate() {
                let (wait, mine, theirs) = self.call(of, *peer, &done[*peer].answered);
                peers[index].0.add(wait as u64);
                peers[index].1 += mine;
                peers[index].2 += theirs;
                total += wait;
            }
            response.add(total as u64);
            result.answered.push(total);
            (cpu, queue, lock, file, slept) =
                (cpu + run, queue + waits, lock + locked, file + read, slept + sleep);
        }
        // A moment in which it does nothing: a collection of garbage, a slow disk. Nothing measured says why.
        if self.rng.chance(self.pauses) {
            let pause = self.rng.time(80.0 * MS, 0.5);
            result.answered.iter_mut().for_each(|t| *t += pause);
            response = Times::default();
            result.answered.iter().for_each(|t| response.add(*t as u64));
        }
        // Waits are sampled, and some threads that wait for work seem to wait for a lock.
        lock += self.rng.time(1.0 * MS, 1.0);
        queue *= self.rng.time(1.0, 0.4);
        lock *= self.rng.time(1.0, 0.4);
        file *= self.rng.time(1.0, 0.4);
        if stalled {
            // Eight threads.
            lock += 0.8e9;
        }
        if of == 3 && self.is(Fault::CpuLimit) {
            throttled = self.size * 0.1e9;
        }
        let amount =
            |metric, subject, value| self.observation(1, of, metric, subject, Value::Amount(value));
        told.push(self.observation(1, of, Metric::Response, None, Value::Times(response)));
        told.push(amount(Metric::RunQueue, None, queue));
        let name = ["session", "cart", "ledger", "stock", "index", "model"][of];
        told.push(amount(Metric::LockWait, Some(Subject::new(name)), lock));
        told.push(amount(Metric::Sleep, None, slept));
        told.push(amount(Metric::MinorFaults, Some(Subject::new("parse")), minor));
        if of == 4 {
            let data = Some(Subject::new("/data/index.db"));
            told.push(amount(Metric::FileWait, data.clone(), file));
            told.push(amount(Metric::MajorFaults, data.clone(), missed * 0.7));
            told.push(amount(Metric::CacheMisses, data, missed));
        }
        if of == 0 {
            let storm = self.sized(Fault::Storm, 0.0);
            let batch = Some(Subject::local("batch", &self.names[BATCH]));
            let opened = self.rng.poisson(0.02 + storm / 10.0);
            told.push(self.observation(1, of, Metric::Accepts, batch, Value::Amount(opened)));
        }
        for (index, (times, mine, theirs)) in peers.into_iter().enumerate() {
            let peer = service.calls[index];
            let subject = Subject::local(&format!("{}:8080", NAMES[peer]), &self.names[peer]);
            let us = Subject::local(NAMES[of], &self.names[of]);
            let put =
                |of, metric, subject, value| self.observation(1, of, metric, Some(subject), value);
            told.push(put(of, Metric::Downstream, subject.clone(), Value::Times(times)));
            told.push(put(of, Metric::Retransmits, subject, Value::Amount(mine)));
            told.push(put(peer, Metric::Retransmits, us, Value::Amount(theirs)));
        }
        self.add(of, Metric::Cpu, None, cpu);
        for (function, part) in [("main", 1.0), ("handle", 0.97), ("price", 0.4), ("parse", 0.3)] {
            let mut part = part * (cpu - dear - kernel);
            if function != "parse" {
                part += dear;
            }
            if function != "price" {
                part += kernel;
            }
            self.add(of, Metric::Function, Some(function), part);
        }
        self.add(of, Metric::Function, Some("asm_exc_page_fault"), minor * 700.0);
        self.add(of, Metric::Throttled, None, throttled);
        result
    }

    fn add(&mut self, of: usize, metric: Metric, subject: Option<&'static str>, amount: f64) {
        *self.second.entry((of, metric, subject)).or_default() += amount;
    }

    fn observation(
        &self,
        slots: u16,
        of: usize,
        metric: Metric,
        subject: Option<Subject>,
        value: Value,
    ) -> Observation {
        let slot = Slot(self.start + self.at);
        let workload = Some(Arc::clone(&self.names[of]));
        Observation { slot, slots, workload, metric, subject, value }
    }

    /// What is told once a second: samples, and files that are polled.
    fn second_passes(&mut self, told: &mut Vec<Observation>) {
        self.at -= 1;
        for ((of, metric, subject), amount) in std::mem::take(&mut self.second) {
            let amount = match metric {
                Metric::Cpu | Metric::Function => self.rng.poisson(amount / SAMPLE) * SAMPLE,
                _ => amount,
            };
            let subject = subject.map(Subject::new);
            told.push(self.observation(10, of, metric, subject, Value::Amount(amount)));
        }
        let full = if self.is(Fault::PageCache) { 0.99 } else { 0.7 };
        let refaults = self.rng.poisson(self.sized(Fault::PageCache, 0.05) * 40.0);
        let idle = if self.is(Fault::Neighbour) { 0.3 } else { 0.6 } + 0.02 * self.rng.normal();
        let level = |metric, value| self.observation(10, 4, metric, None, Value::Amount(value));
        told.push(level(Metric::MemoryUsed, full * 256e6));
        told.push(level(Metric::MemoryLimit, 256e6));
        told.push(level(Metric::Refaults, refaults));
        let mut node = level(Metric::NodeIdle, idle.clamp(0.0, 1.0));
        node.workload = None;
        told.push(node.clone());
        told.push(Observation { metric: Metric::NodeFree, value: Value::Amount(0.5), ..node });
        self.at += 1;
    }
}
