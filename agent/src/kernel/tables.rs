//! The unwind tables in the kernel: rules, tables, mappings and processes, as the programs read them
//! (`podflame_wire::unwind`).
//!
//! Not for deciding what is there: see [`crate::unwind`].

use aya::maps::{Array, ArrayOfMaps, HashMap, MapData, MapError};
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

/// The maps.
pub struct Tables {
    pub(super) rules: Array<MapData, RuleWords>,
    pub(super) tables: ArrayOfMaps<MapData, Table>,
    pub(super) mappings: Array<MapData, MappingWords>,
    pub(super) processes: HashMap<MapData, u32, ProcessWords>,
    /// What stands where no table is: an array of maps gives none back otherwise.
    pub(super) empty: Table,
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

    /// Puts a table in a slot.
    ///
    /// # Errors
    ///
    /// If the kernel refuses, as when it has no memory.
    pub fn put_table(&mut self, slot: u32, pages: &[Page]) -> Result<(), MapError> {
        let mut table = Table::create(pages.len() as u32, BPF_F_INNER_MAP)?;
        for (index, page) in pages.iter().enumerate() {
            let words: PageWords = transmute!(*page);
            table.set(index as u32, words, 0)?;
        }
        self.tables.set(slot, &table, 0)
    }

    /// Frees a table's memory.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn clear_table(&mut self, slot: u32) -> Result<(), MapError> {
        self.tables.set(slot, &self.empty, 0)
    }

    /// Puts mappings at consecutive indices, which no process has.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn put_mappings(&mut self, first: u32, mappings: &[Mapping]) -> Result<(), MapError> {
        for (index, mapping) in (first..).zip(mappings) {
            let words: MappingWords = transmute!(*mapping);
            self.mappings.set(index, words, 0)?;
        }
        Ok(())
    }

    /// Says what is known of a process, in place of what was.
    ///
    /// # Errors
    ///
    /// If the kernel refuses, as when there are too many.
    pub fn put_process(&mut self, pid: u32, process: Process) -> Result<(), MapError> {
        let words: ProcessWords = transmute!(process);
        self.processes.insert(pid, words, 0)
    }

    /// Forgets a process.
    pub fn remove_process(&mut self, pid: u32) {
        // It can only be gone already.
        let _ = self.processes.remove(&pid);
    }
}
