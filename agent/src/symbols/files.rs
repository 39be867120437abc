//! Open files with their symbol tables and DWARF: offset in a file → functions.
//!
//! Bounded by descriptors, bytes of tables and bytes of DWARF; what was used longest ago goes
//! first. Not for results, which are cached above, nor for what a process has mapped where.

use std::{
    fs::{File, Metadata},
    os::unix::fs::MetadataExt,
    sync::Arc,
    time::{Duration, Instant},
};

use hashbrown::HashMap;
use object::elf::SHT_SYMTAB;

use super::{
    Limits, Stats, Unknown, debug,
    dwarf::{self, Dwarf, Frame},
    elf::Elf,
    names, sys,
    table::Table,
};

/// How long DWARF stays in memory after it was last asked.
const IDLE: Duration = Duration::from_secs(30);
/// Failed look-ups after which the DWARF of a file is left alone: each may cost 20 ms.
const FAILURES: u32 = 16;

/// A file that cannot be confused with another one, nor with what it held before. The process's
/// root is part of it, because its debug file may be there: processes of another root may not
/// choose the names in this one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FileKey {
    root: (u64, u64),
    dev: u64,
    ino: u64,
    size: u64,
    modified: (i64, i64),
}

impl FileKey {
    /// The same for all roots: what is read of the file alone depends on none.
    #[must_use]
    pub fn of_any_root(self) -> Self {
        Self { root: (0, 0), ..self }
    }

    /// The key of a file in a process whose root directory is `root` (device and inode).
    pub(super) fn new(root: (u64, u64), metadata: &Metadata) -> Self {
        Self {
            root,
            dev: metadata.dev(),
            ino: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// The open files.
#[derive(Default)]
pub(super) struct Files {
    entries: HashMap<FileKey, Entry>,
    clock: u64,
}

struct Entry {
    elf: Elf,
    build_id: Arc<str>,
    /// Its separate debug file.
    debug: Option<Elf>,
    /// Which of the two have the symbol table and the DWARF, once that is known.
    parts: Option<Parts>,
    table: Option<Result<Table, Unknown>>,
    dwarf: Option<Dwarf>,
    dwarf_failures: u32,
    used: u64,
}

#[derive(Clone, Copy)]
struct Parts {
    table_in_debug: bool,
    dwarf: Option<InDebug>,
}

/// Whether something is in the separate debug file.
type InDebug = bool;

impl Files {
    /// Whether a file is open; counts as a use of it.
    pub(super) fn touch(&mut self, key: &FileKey) -> Option<Arc<str>> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.used = self.clock;
        Some(Arc::clone(&entry.build_id))
    }

    /// Keeps a file open if it is an ELF file, and returns its build ID.
    pub(super) fn insert(
        &mut self,
        key: FileKey,
        file: Arc<File>,
        metadata: &Metadata,
        limits: &Limits,
        stats: &mut Stats,
    ) -> Result<Arc<str>, Unknown> {
        if let Some(build_id) = self.touch(&key) {
            return Ok(build_id);
        }
        let elf = Elf::open(file, metadata)?;
        let build_id: Arc<str> = elf.build_id.as_str().into();
        let entry = Entry {
            elf,
            build_id: Arc::clone(&build_id),
            debug: None,
            parts: None,
            table: None,
            dwarf: None,
            dwarf_failures: 0,
            used: self.clock,
        };
        self.entries.insert(key, entry);
        self.shrink(&key, limits, stats);
        Ok(build_id)
    }

    /// The functions at an offset in a file, innermost first, never empty. `root` opens the root
    /// directory of a process that has it mapped.
    pub(super) fn find(
        &mut self,
        key: &FileKey,
        path: &str,
        offset: u64,
        root: impl FnOnce() -> Option<File>,
        limits: &Limits,
        stats: &mut Stats,
    ) -> Result<Vec<Frame>, Unknown> {
        self.touch(key);
        let entry = self.entries.get_mut(key).ok_or(Unknown::Evicted)?;
        if !entry.elf.unchanged() {
            return Err(Unknown::Changed);
        }
        let address = entry.elf.address(offset).ok_or(Unknown::NoSymbol)?;
        let parts = entry.prepare(path, root, limits)?;
        let frames = entry.dwarf_frames(parts, address, limits, stats);
        let result = entry.merge(parts, address, frames);
        self.shrink(key, limits, stats);
        result
    }

    /// Drops DWARF that nothing has asked for in a while.
    pub(super) fn drop_idle(&mut self, now: Instant) {
        let idle = |d: &mut Dwarf| now.saturating_duration_since(d.used) > IDLE;
        let dropped = self.entries.values_mut().filter_map(|e| e.dwarf.take_if(idle)).count();
        if dropped > 0 {
            sys::give_back_memory();
        }
    }

    /// Files, descriptors, and bytes of tables and of DWARF that are held.
    pub(super) fn held(&self) -> (usize, usize, u64, u64) {
        let entries = || self.entries.values();
        (
            self.entries.len(),
            entries().map(Entry::descriptors).sum(),
            entries().map(Entry::table_bytes).sum(),
            entries().map(Entry::dwarf_bytes).sum(),
        )
    }

    /// Keeps within the limits, at the cost of what was used longest ago but not of `keep`.
    fn shrink(&mut self, keep: &FileKey, limits: &Limits, stats: &mut Stats) {
        let (_, mut descriptors, mut tables, mut dwarf) = self.held();
        while descriptors > limits.files {
            let Some(key) = self.oldest(keep, |_| true) else { break };
            let Some(entry) = self.entries.remove(&key) else { break };
            descriptors -= entry.descriptors();
            tables -= entry.table_bytes();
            dwarf -= entry.dwarf_bytes();
            stats.files_evicted += 1;
        }
        while tables > limits.table_bytes {
            let Some(key) = self.oldest(keep, |e| e.table_bytes() > 0) else { break };
            let Some(entry) = self.entries.get_mut(&key) else { break };
            tables -= entry.table_bytes();
            entry.table = None;
            stats.tables_evicted += 1;
        }
        while dwarf > limits.dwarf_bytes {
            let Some(key) = self.oldest(keep, |e| e.dwarf.is_some()) else { break };
            let Some(entry) = self.entries.get_mut(&key) else { break };
            dwarf -= entry.dwarf_bytes();
            entry.dwarf = None;
            stats.dwarf_evicted += 1;
        }
    }

    fn oldest(&self, keep: &FileKey, of: impl Fn(&Entry) -> bool) -> Option<FileKey> {
        let others = self.entries.iter().filter(|(key, entry)| *key != keep && of(entry));
        others.min_by_key(|(_, entry)| entry.used).map(|(key, _)| *key)
    }
}

impl Entry {
    fn descriptors(&self) -> usize {
        1 + usize::from(self.debug.is_some())
    }

    fn table_bytes(&self) -> u64 {
        match &self.table {
            Some(Ok(table)) => (table.len() * Table::ENTRY) as u64,
            _ => 0,
        }
    }

    fn dwarf_bytes(&self) -> u64 {
        self.dwarf.as_ref().map_or(0, |d| d.bytes)
    }

    fn file(&self, in_debug: InDebug) -> &Elf {
        self.debug.as_ref().filter(|_| in_debug).unwrap_or(&self.elf)
    }

    /// Looks once for a debug file if the file itself lacks something, and loads the table.
    fn prepare(
        &mut self,
        path: &str,
        root: impl FnOnce() -> Option<File>,
        limits: &Limits,
    ) -> Result<Parts, Unknown> {
        let parts = match self.parts {
            Some(parts) => parts,
            None => {
                let sections = self.elf.sections()?;
                let symbols = sections.iter().any(|s| s.kind == SHT_SYMTAB.0);
                let mut parts = Parts {
                    table_in_debug: false,
                    dwarf: dwarf::present(&sections).then_some(false),
                };
                if !symbols || parts.dwarf.is_none() {
                    self.debug = debug::find(&self.elf, &sections, path, root().as_ref());
                    let there = match &self.debug {
                        Some(debug) => debug.sections().unwrap_or_default(),
                        None => Vec::new(),
                    };
                    parts.table_in_debug = !symbols && there.iter().any(|s| s.kind == SHT_SYMTAB.0);
                    parts.dwarf = parts.dwarf.or_else(|| dwarf::present(&there).then_some(true));
                    if !parts.table_in_debug && parts.dwarf != Some(true) {
                        self.debug = None;
                    }
                }
                *self.parts.insert(parts)
            }
        };
        if self.table.is_none() {
            let elf = self.file(parts.table_in_debug);
            let most = limits.table_bytes_per_file / Table::ENTRY as u64;
            self.table = Some(elf.sections().and_then(|s| Table::read(elf, &s, most)));
        }
        Ok(parts)
    }

    fn dwarf_frames(
        &mut self,
        parts: Parts,
        address: u64,
        limits: &Limits,
        stats: &mut Stats,
    ) -> Vec<Frame> {
        let Some(in_debug) = parts.dwarf.filter(|_| self.dwarf_failures < FAILURES) else {
            return Vec::new();
        };
        if self.dwarf.as_ref().is_none_or(Dwarf::full) {
            self.dwarf = None;
            let elf = self.file(in_debug);
            let loaded = elf
                .sections()
                .and_then(|sections| Dwarf::load(elf, &sections, limits.dwarf_bytes_per_file));
            match loaded {
                Ok(dwarf) => {
                    stats.dwarf_loads += 1;
                    self.dwarf = Some(dwarf);
                }
                Err(_) => {
                    stats.dwarf_refused += 1;
                    self.dwarf_failures = FAILURES;
                }
            }
        }
        let Some(dwarf) = &mut self.dwarf else { return Vec::new() };
        dwarf.frames(address).unwrap_or_else(|_| {
            self.dwarf_failures += 1;
            stats.dwarf_failed += 1;
            Vec::new()
        })
    }

    /// Names the outermost function as the symbol table does where it can, so that it has the same
    /// name whether or not there is DWARF, and `malloc` is not `__GI___libc_malloc`.
    fn merge(
        &self,
        parts: Parts,
        address: u64,
        mut frames: Vec<Frame>,
    ) -> Result<Vec<Frame>, Unknown> {
        let symbol = match &self.table {
            Some(Ok(table)) => {
                table.find(self.file(parts.table_in_debug), address).ok_or(Unknown::NoSymbol)
            }
            Some(Err(unknown)) => Err(*unknown),
            None => Err(Unknown::NoSymbol),
        };
        if frames.is_empty() {
            frames.push(Frame::default());
        }
        if let Some(outer) = frames.last_mut() {
            match symbol {
                Ok(name) => outer.name = names::demangle(&name),
                Err(unknown) if outer.name.is_empty() => return Err(unknown),
                Err(_) => {}
            }
        }
        for unnamed in frames.iter_mut().filter(|f| f.name.is_empty()) {
            unnamed.name.push_str("[inlined]");
        }
        Ok(frames)
    }
}
