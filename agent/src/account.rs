//! The loss account: what happened to every event, from the kernel to each client.
//!
//! Four equations hold per probe once the streams are quiet (per agent epoch):
//! E1 `run_cnt = hits`; E2 `hits = stored + Σ dropped_in_kernel + filtered`;
//! E3 `stored = aggregated + Σ dropped_in_agent + in_flight`; E4 per client
//! `aggregated = delivered + lost`. This module holds the counts; it changes none of them.

use podflame_wire::{Counters, DROPS, Drop as KernelDrop, Probe, StackEnd, python::PythonEnd};

/// Why the agent could not use a stored record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AgentDrop {
    /// The record's bytes do not follow the layout.
    Malformed = 0,
    /// The table of distinct stacks was full within one flush.
    TableFull = 1,
}

impl AgentDrop {
    /// Every reason.
    pub const ALL: [Self; 2] = [Self::Malformed, Self::TableFull];

    /// The name users see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::TableFull => "table_full",
        }
    }
}

/// The counts of one probe since the agent started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProbeAccount {
    /// The program is attached, or was during this recording.
    pub active: bool,
    /// The kernel's own count of runs; known while something has `BPF_ENABLE_STATS` on.
    pub run_count: Option<u64>,
    /// Run time in nanoseconds, by the kernel; known as `run_count` is.
    pub run_time_ns: Option<u64>,
    /// Runs that the program counted.
    pub hits: u64,
    /// Records handed over in the kernel.
    pub stored: u64,
    /// Events outside the filter.
    pub filtered: u64,
    /// Events lost in the kernel, by [`KernelDrop`].
    pub dropped_in_kernel: [u64; DROPS],
    /// Events that are in a published batch.
    pub aggregated: u64,
    /// Records lost in the agent, by [`AgentDrop`].
    pub dropped_in_agent: [u64; AgentDrop::ALL.len()],
    /// Sum of the weights of the stored records.
    pub weight: u64,
    /// User stacks by [`StackEnd`].
    pub stack_ends: [u64; StackEnd::ALL.len()],
    /// Python stacks by [`PythonEnd`].
    pub python_ends: [u64; PythonEnd::ALL.len()],
}

impl ProbeAccount {
    /// Takes over what the kernel counted, summed over the CPUs.
    pub fn set_kernel(&mut self, counters: &Counters) {
        self.hits = counters.hits;
        self.stored = counters.stored;
        self.filtered = counters.filtered;
        self.dropped_in_kernel = counters.dropped;
        self.weight = counters.weight;
        self.stack_ends = counters.stack_ends;
        self.python_ends = counters.python_ends;
    }

    /// Events lost anywhere.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.dropped_in_kernel.iter().chain(&self.dropped_in_agent).sum()
    }

    /// Records that are stored but in no published batch yet (E3). Negative if the account is wrong.
    /// A probe that sends no records ([`Probe::Sender`]) has none.
    #[must_use]
    pub fn in_flight(&self, probe: Probe) -> i128 {
        if probe == Probe::Sender {
            return 0;
        }
        let used = i128::from(self.aggregated)
            + self.dropped_in_agent.iter().copied().map(i128::from).sum::<i128>();
        i128::from(self.stored) - used
    }
}

/// The counts of every probe.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// By [`Probe`] number.
    pub probes: [ProbeAccount; Probe::ALL.len()],
}

impl Account {
    /// One probe's counts.
    #[must_use]
    pub fn probe(&self, probe: Probe) -> &ProbeAccount {
        &self.probes[probe as usize]
    }

    /// One probe's counts, to add to.
    pub fn probe_mut(&mut self, probe: Probe) -> &mut ProbeAccount {
        &mut self.probes[probe as usize]
    }

    /// Each probe with its counts.
    pub fn iter(&self) -> impl Iterator<Item = (Probe, &ProbeAccount)> {
        Probe::ALL.iter().copied().zip(&self.probes)
    }

    /// Events lost anywhere, by any probe.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.probes.iter().map(ProbeAccount::lost).sum()
    }

    /// Which equations do not hold now, in words; empty when all do. `quiet` says that nothing is
    /// on its way any more, so that E3 must hold with nothing in flight.
    #[must_use]
    pub fn violations(&self, quiet: bool) -> Vec<String> {
        let mut found = Vec::new();
        for (probe, account) in self.iter() {
            let name = probe.name();
            if let Some(runs) = account.run_count
                && runs != account.hits
            {
                found.push(format!("E1 {name}: run_cnt {runs} != hits {}", account.hits));
            }
            let dropped: u64 = account.dropped_in_kernel.iter().sum();
            if account.hits != account.stored + dropped + account.filtered {
                found.push(format!(
                    "E2 {name}: hits {} != stored {} + dropped {dropped} + filtered {}",
                    account.hits, account.stored, account.filtered
                ));
            }
            let in_flight = account.in_flight(probe);
            if in_flight < 0 || (quiet && in_flight != 0) {
                found.push(format!(
                    "E3 {name}: stored {} != aggregated {} + dropped {:?}, {in_flight} in flight",
                    account.stored, account.aggregated, account.dropped_in_agent
                ));
            }
        }
        found
    }
}

/// Sums the counters of each CPU.
#[must_use]
pub fn sum(per_cpu: &[Counters]) -> Counters {
    let mut total = Counters {
        hits: 0,
        stored: 0,
        filtered: 0,
        dropped: [0; DROPS],
        weight: 0,
        stack_ends: [0; StackEnd::ALL.len()],
        python_ends: [0; PythonEnd::ALL.len()],
    };
    for one in per_cpu {
        total.hits += one.hits;
        total.stored += one.stored;
        total.filtered += one.filtered;
        total.weight += one.weight;
        for (sum, part) in total.dropped.iter_mut().zip(one.dropped) {
            *sum += part;
        }
        for (sum, part) in total.stack_ends.iter_mut().zip(one.stack_ends) {
            *sum += part;
        }
        for (sum, part) in total.python_ends.iter_mut().zip(one.python_ends) {
            *sum += part;
        }
    }
    total
}

/// The reasons of [`ProbeAccount::dropped_in_kernel`], in order.
#[must_use]
pub fn kernel_drops() -> &'static [KernelDrop] {
    KernelDrop::ALL
}
