//! The kernel's own record of the BPF programs that are loaded: what runs, and how often.

use std::{collections::BTreeMap, os::fd::OwnedFd};

use anyhow::{Context as _, Result};
use aya::{
    programs::loaded_programs,
    sys::{Stats, enable_stats},
};

/// A loaded program.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Program {
    /// The kernel keeps the first 15 bytes of the name.
    pub(crate) name: String,
    /// How often it ran while [`count_runs`] was on.
    pub(crate) runs: u64,
}

/// All loaded programs of the machine by ID.
pub(crate) fn programs() -> Result<BTreeMap<u32, Program>> {
    loaded_programs()
        .map(|program| {
            let program = program.context("list the loaded BPF programs")?;
            let name = program.name_as_str().unwrap_or_default().to_owned();
            Ok((program.id(), Program { name, runs: program.run_count() }))
        })
        .collect()
}

/// Has the kernel count the runs of BPF programs until what is returned is dropped.
pub(crate) fn count_runs() -> Result<OwnedFd> {
    enable_stats(Stats::RunTime).context("have the kernel count the runs of BPF programs")
}
