//! What may be held, and what is.

use super::Unknown;

/// What may be held. Memory is given for x86-64.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Processes; some 200 bytes each besides their mappings.
    pub processes: usize,
    /// Mappings of one process. The kernel's own bound is 65,530 (`vm.max_map_count`).
    pub mappings_per_process: usize,
    /// Mappings of all processes, of 40 bytes: 10 MiB.
    pub mappings: usize,
    /// Descriptors of executable files and their debug files. The usual soft limit of a process is
    /// 1,024, and the rest of the agent needs some too.
    pub files: usize,
    /// Bytes of the symbol table of one file, 16 a function. A browser has a million functions.
    pub table_bytes_per_file: u64,
    /// Bytes of the symbol tables of all files.
    pub table_bytes: u64,
    /// Bytes of the DWARF sections of one file, decompressed. Larger ones get names from the symbol
    /// table, without inlined functions and lines.
    pub dwarf_bytes_per_file: u64,
    /// Bytes of the DWARF sections of all files. It is only taken while new addresses come up.
    pub dwarf_bytes: u64,
    /// Addresses whose functions are remembered, of 150 bytes or so: 10 MiB.
    pub results: usize,
    /// Bytes of one process's perf map that are read.
    pub perf_map_bytes: u64,
    /// Functions of one process's perf map that are kept, of about 50 bytes.
    pub perf_map_entries: usize,
    /// Functions of all perf maps.
    pub perf_entries: usize,
    /// Perf maps, each with a descriptor.
    pub perf_maps: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            processes: 4096,
            mappings_per_process: 1 << 16,
            mappings: 1 << 18,
            files: 512,
            table_bytes_per_file: 16 << 20,
            table_bytes: 32 << 20,
            dwarf_bytes_per_file: 64 << 20,
            dwarf_bytes: 64 << 20,
            results: 1 << 16,
            perf_map_bytes: 64 << 20,
            perf_map_entries: 1 << 17,
            perf_entries: 1 << 18,
            perf_maps: 128,
        }
    }
}

/// What has been done and is held.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Processes known.
    pub processes: usize,
    /// Mappings of them.
    pub mappings: usize,
    /// Files open, debug files not counted.
    pub files: usize,
    /// Descriptors held.
    pub descriptors: usize,
    /// Bytes of symbol tables, the kernel's included.
    pub table_bytes: u64,
    /// Bytes of DWARF.
    pub dwarf_bytes: u64,
    /// Functions of perf maps.
    pub perf_entries: usize,
    /// Addresses remembered.
    pub results: usize,
    /// Readings of mappings.
    pub maps_read: u64,
    /// Readings that met the limit of mappings.
    pub maps_cut: u64,
    /// Perf maps that met a limit.
    pub perf_maps_cut: u64,
    /// Processes forgotten to stay within the limits.
    pub processes_evicted: u64,
    /// Files closed to stay within the limits.
    pub files_evicted: u64,
    /// Symbol tables dropped to stay within the limits.
    pub tables_evicted: u64,
    /// DWARF dropped to stay within the limits.
    pub dwarf_evicted: u64,
    /// Perf maps dropped to stay within the limits.
    pub perf_maps_evicted: u64,
    /// Times DWARF was loaded.
    pub dwarf_loads: u64,
    /// Files whose DWARF is too large or malformed.
    pub dwarf_refused: u64,
    /// Look-ups that DWARF could not answer within its bounds.
    pub dwarf_failed: u64,
    /// Resolutions that ended without a function, by the order of [`Unknown::ALL`].
    pub unknown: [u64; Unknown::ALL.len()],
}
