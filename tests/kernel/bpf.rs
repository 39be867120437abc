//! The kernel's own record of the BPF programs that are loaded: what runs, how often, and who holds it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::fd::OwnedFd,
};

use anyhow::{Context as _, Result};
use aya::{
    maps::loaded_maps,
    programs::{loaded_links, loaded_programs},
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

/// The BPF objects that a process holds, by their IDs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) programs: BTreeSet<u32>,
    pub(crate) maps: BTreeSet<u32>,
    pub(crate) links: BTreeSet<u32>,
}

/// What a process holds now, as its descriptors say.
pub(crate) fn held(pid: u32) -> Result<Held> {
    let path = format!("/proc/{pid}/fdinfo");
    let mut held = Held::default();
    for descriptor in fs::read_dir(&path).with_context(|| format!("list {path}"))? {
        // A descriptor may be closed by now.
        let info = fs::read_to_string(descriptor?.path()).unwrap_or_default();
        for (key, value) in info.lines().filter_map(|line| line.split_once(':')) {
            let ids = match key {
                "prog_id" => &mut held.programs,
                "map_id" => &mut held.maps,
                "link_id" => &mut held.links,
                _ => continue,
            };
            ids.insert(value.trim().parse()?);
        }
    }
    Ok(held)
}

impl Held {
    /// What of it the kernel still has.
    pub(crate) fn left(&self) -> Self {
        // One that goes while the kernel lists it is an error, and gone.
        let programs = loaded_programs().filter_map(|program| Some(program.ok()?.id()));
        let maps = loaded_maps().filter_map(|map| Some(map.ok()?.id()));
        let links = loaded_links().filter_map(|link| Some(link.ok()?.id()));
        let both = |held: &BTreeSet<u32>, there: BTreeSet<u32>| held & &there;
        Self {
            programs: both(&self.programs, programs.collect()),
            maps: both(&self.maps, maps.collect()),
            links: both(&self.links, links.collect()),
        }
    }
}

/// How many instructions the verifier looked at of each program that a process holds, by its name.
pub(crate) fn verified(pid: u32) -> Result<BTreeMap<String, u32>> {
    let held = held(pid)?;
    let mut verified = BTreeMap::new();
    for program in loaded_programs() {
        // One that goes while the kernel lists it is none of ours.
        let Ok(program) = program else { continue };
        if let (true, Some(count)) =
            (held.programs.contains(&program.id()), program.verified_instruction_count())
        {
            verified.insert(program.name_as_str().unwrap_or_default().to_owned(), count);
        }
    }
    Ok(verified)
}
