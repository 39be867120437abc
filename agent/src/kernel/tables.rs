//! The unwind tables in the kernel: rules, tables, mappings and processes, as the programs read them
//! (`podflame_wire::unwind`).
//!
//! Not for deciding what is there: see [`crate::unwind`].

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use aya::maps::{Array, ArrayOfMaps, HashMap, IterableMap, MapData, MapError};
use podflame_wire::unwind::{Mapping, PAGE_ROWS, Page, Process, Rule};
use zerocopy::transmute;

/// `BPF_F_INNER_MAP` of `include/uapi/linux/bpf.h`: an array of another length than the one that the
/// array of maps was declared with.
const BPF_F_INNER_MAP: u32 = 1 << 12;

// The values as aya takes them.
pub(super) type PageWords = [u64; size_of::<Page>() / 8];
pub(super) type RuleWords = [u64; size_of::<Rule>() / 8];
pub(super) type MappingWords = [u64; size_of::<Mapping>() / 8];
pub(super) type ProcessWords = [u64; size_of::<Process>() / 8];

type Table = Array<MapData, PageWords>;

/// `BPF_MAP_UPDATE_BATCH` of the same.
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;

/// The `batch` part of `union bpf_attr`.
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Puts maps in slots of an array of maps with one system call, which aya does not offer.
fn batch(map: BorrowedFd<'_>, tables: &[(u32, &Table)]) -> io::Result<()> {
    let keys: Vec<u32> = tables.iter().map(|(slot, _)| *slot).collect();
    let values: Vec<i32> =
        tables.iter().map(|(_, table)| table.map().fd().as_fd().as_raw_fd()).collect();
    let attributes = Batch {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: keys.len() as u32,
        map_fd: map.as_raw_fd() as u32,
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: the attributes and what they point to live through the call, which reads them only.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_MAP_UPDATE_BATCH,
            &raw const attributes,
            size_of::<Batch>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The maps.
pub struct Tables {
    pub(super) rules: Array<MapData, RuleWords>,
    pub(super) tables: ArrayOfMaps<MapData, Table>,
    /// Its descriptor, which aya keeps to itself.
    pub(super) tables_fd: OwnedFd,
    pub(super) mappings: Array<MapData, MappingWords>,
    pub(super) processes: HashMap<MapData, u32, ProcessWords>,
    /// What stands where no table is: an array of maps gives none back otherwise.
    pub(super) empty: Table,
    /// Tables that are not in their slots yet.
    pub(super) staged: Vec<(u32, Option<Table>)>,
}

impl Tables {
    /// An empty table.
    pub(super) fn empty() -> Result<Table, MapError> {
        let mut table = Table::create(1, BPF_F_INNER_MAP)?;
        let page = Page { start: [podflame_wire::unwind::NO_ROW; PAGE_ROWS], rule: [0; PAGE_ROWS] };
        let words: PageWords = transmute!(page);
        table.set(0, words, 0)?;
        Ok(table)
    }

    /// Maps that no program reads, for so many processes.
    #[cfg(test)]
    pub(crate) fn alone(processes: u32) -> Result<Self, super::KernelError> {
        let mut loader = aya::EbpfLoader::new();
        let name = podflame_wire::map::PROCESSES;
        super::take_tables(&mut loader.map_max_entries(name, processes).load(super::OBJECT)?)
    }

    /// Puts rules at consecutive indices.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn put_rules(&mut self, first: usize, rules: &[Rule]) -> Result<(), MapError> {
        for (index, rule) in rules.iter().enumerate() {
            let words: RuleWords = transmute!(*rule);
            self.rules.set((first + index) as u32, words, 0)?;
        }
        Ok(())
    }

    /// Makes a table, which [`Tables::commit`] puts in its slot.
    ///
    /// # Errors
    ///
    /// If the kernel refuses, as when it has no memory.
    pub fn stage(&mut self, slot: u32, pages: &[Page]) -> Result<(), MapError> {
        let mut table = Table::create(pages.len() as u32, BPF_F_INNER_MAP)?;
        for (index, page) in pages.iter().enumerate() {
            let words: PageWords = transmute!(*page);
            table.set(index as u32, words, 0)?;
        }
        self.staged.push((slot, Some(table)));
        Ok(())
    }

    /// Gives up the table of a slot, whose memory [`Tables::commit`] frees.
    pub fn stage_none(&mut self, slot: u32) {
        self.staged.push((slot, None));
    }

    /// Puts what is staged in its slots, all at once: each time the kernel waits until no program runs
    /// that could still see what was there (`maybe_wait_bpf_programs`), some ten milliseconds.
    ///
    /// # Errors
    ///
    /// If the kernel refuses. What is staged stays so, for the next time.
    pub fn commit(&mut self) -> Result<(), MapError> {
        if self.staged.is_empty() {
            return Ok(());
        }
        let tables: Vec<(u32, &Table)> = self
            .staged
            .iter()
            .map(|(slot, table)| (*slot, table.as_ref().unwrap_or(&self.empty)))
            .collect();
        if batch(self.tables_fd.as_fd(), &tables).is_err() {
            // Kernels before 5.16 do not know batches of maps.
            for (slot, table) in tables {
                self.tables.set(slot, table, 0)?;
            }
        }
        self.staged.clear();
        Ok(())
    }

    /// Says what is known of a process, in place of what was: commits what is staged, and puts its mappings
    /// where `process` says that they are, which no other process has.
    ///
    /// # Errors
    ///
    /// If the kernel refuses, as when there are too many processes. Then no program knows of it.
    pub fn put(
        &mut self,
        pid: u32,
        process: Process,
        mappings: &[Mapping],
    ) -> Result<(), MapError> {
        self.commit()?;
        for (index, mapping) in (process.first..).zip(mappings) {
            let words: MappingWords = transmute!(*mapping);
            self.mappings.set(index, words, 0)?;
        }
        let words: ProcessWords = transmute!(process);
        self.processes.insert(pid, words, 0)
    }

    /// Forgets a process.
    pub fn remove_process(&mut self, pid: u32) {
        // It can only be gone already.
        let _ = self.processes.remove(&pid);
    }
}
