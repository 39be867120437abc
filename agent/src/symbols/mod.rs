//! Addresses → functions, of user space and of the kernel.
//!
//! [`Symbols`] has one owner and blocks on files, so it runs on a thread of its own. It reads the
//! mappings of a process at first sight and keeps the files of its code open, so that samples of a
//! process that is gone get names too. Everything it reads from a process is hostile: sizes are
//! bounded, files are regular and never mapped, and an address that stays unknown says why.
//!
//! Not for unwinding, and not for escaping names.

mod answer;
mod debug;
mod dwarf;
pub(crate) mod elf;
mod files;
mod go;
mod kernel;
mod limits;
mod maps;
mod meter;
mod names;
mod perf;
mod process;
mod results;
pub(crate) mod sight;
mod sys;
mod table;
#[cfg(test)]
mod tests;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use hashbrown::HashMap;

pub use self::process::own_vdso;
pub(crate) use self::sight::memory;
pub use self::{
    answer::{Module, Region, Symbol, Unknown},
    files::FileKey,
    limits::{Limits, Stats},
    names::demangle,
    sight::{CodeFile, CodeMapping, Sighting, Sights},
};
use self::{
    dwarf::Frame,
    files::Files,
    kernel::Kernel,
    perf::PerfMap,
    process::{Content, Image, Images, Memory},
    results::Results,
    sight::{OpenFiles, ProcDir},
};
use crate::event::ProcessKey;

/// Shortest time between two readings of a process's mappings when an address is in none.
const AGAIN: Duration = Duration::from_millis(100);
/// Time after which the mappings of a process that is still seen are read again, since another
/// program or library may have taken the place of the one that was known (exec, dlclose).
const REFRESH: Duration = Duration::from_secs(10);
/// A process's mappings may cost this share of the time, whatever their number: 1 in 200.
const COST: u32 = 200;

/// Whether a process is still there, and the same.
#[must_use]
pub fn is_alive(process: ProcessKey) -> bool {
    ProcDir::open(process).is_ok()
}

struct Process {
    memory: Memory,
    /// Why nothing is known of it.
    gone: Option<Unknown>,
    perf: PerfMap,
    read: Instant,
    cost: Duration,
    used: u64,
}

impl Process {
    /// Whether its mappings may be read again after `wait`.
    fn due(&self, wait: Duration) -> bool {
        self.read.elapsed() >= wait.max(self.cost * COST)
    }
}

/// Turns addresses into functions.
pub struct Symbols {
    limits: Limits,
    processes: HashMap<ProcessKey, Process, foldhash::fast::RandomState>,
    files: Files,
    images: Images,
    kernel: Kernel,
    results: Results,
    /// Answers for addresses of which not even the module is known.
    nowhere: Vec<Arc<[Symbol]>>,
    stats: Stats,
    clock: u64,
}

impl Symbols {
    /// An empty set; nothing is read yet.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let nowhere = Unknown::ALL.iter().map(|unknown| nowhere(*unknown)).collect();
        Self {
            limits,
            processes: HashMap::default(),
            files: Files::default(),
            images: Images::default(),
            kernel: Kernel::default(),
            results: Results::default(),
            nowhere,
            stats: Stats::default(),
            clock: 0,
        }
    }

    /// Takes over what [`Sights`] has read of a process.
    pub fn accept(&mut self, process: ProcessKey, sighting: Sighting) {
        self.clock += 1;
        self.keep(process, Ok(sighting));
    }

    /// The limits it keeps.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Reads the mappings of a process that is new, and opens the files of its code. Of a known one
    /// they are read again after some seconds. Cheap otherwise, and meant to be called for every
    /// event as it arrives: it is what keeps a process from being forgotten.
    pub fn sight(&mut self, process: ProcessKey) {
        self.clock += 1;
        match self.processes.get_mut(&process) {
            Some(known) => {
                known.used = self.clock;
                // Without a start time, a process of the same PID may have come since.
                let gone = known.gone.is_some() && process.start_ns != 0;
                if !gone && known.due(REFRESH) {
                    self.read(process);
                    self.files.drop_idle(Instant::now());
                }
            }
            None => self.read(process),
        }
    }

    /// The functions at an address of a process, innermost first; never empty. A return address is
    /// looked up at the call before it.
    pub fn user(
        &mut self,
        process: ProcessKey,
        address: u64,
        is_return_address: bool,
    ) -> Arc<[Symbol]> {
        let address = address.wrapping_sub(is_return_address.into());
        let known = self.processes.get(&process).and_then(|p| p.memory.find(address));
        if let Some((image, offset)) = known
            && let Some(symbols) = self.results.get((image.id, offset))
        {
            return symbols;
        }
        let (image, offset) = match self.locate(process, address) {
            Ok(found) => found,
            Err(unknown) => return self.unknown(unknown),
        };
        match image.content {
            Content::File(key) => {
                let mut found = self.in_file(process, &image, &key, offset);
                if found == Err(Unknown::Evicted) && self.reopen(process) {
                    found = self.in_file(process, &image, &key, offset);
                }
                self.answer(&image, offset, found)
            }
            Content::Other(unknown) => self.in_perf_map(process, &image, address, unknown),
        }
    }

    /// The function at an address of the kernel; as [`user`](Self::user).
    pub fn kernel(&mut self, address: u64, is_return_address: bool) -> Arc<[Symbol]> {
        let address = address.wrapping_sub(is_return_address.into());
        if let Some(known) = self.results.get((0, address)) {
            return known;
        }
        let (name, module) = match self.kernel.find(address) {
            Ok(found) => found,
            Err(unknown) => {
                self.count(unknown);
                let path: Arc<str> = self.results.name("[kernel]");
                let module = Arc::new(Module { path: Arc::clone(&path), ..Module::default() });
                return one(path, module, address, Some(unknown));
            }
        };
        let module = Arc::new(Module { path: Arc::clone(module), ..Module::default() });
        let name = self.results.name(&demangle(name));
        let symbols = one(name, module, address, None);
        self.results.insert((0, address), Arc::clone(&symbols), self.limits.results);
        symbols
    }

    /// What is mapped at an address of a process, for page faults.
    pub fn region(&mut self, process: ProcessKey, address: u64) -> Region {
        match self.locate(process, address) {
            Ok((image, offset)) => Region { mapping: Arc::clone(&image.module), offset },
            Err(unknown) => {
                let symbols = self.unknown(unknown);
                let path = symbols.first().map(|s| Arc::clone(&s.name)).unwrap_or_default();
                let mapping = Arc::new(Module { path, ..Module::default() });
                Region { mapping, offset: address }
            }
        }
    }

    /// The path of a process's executable as the process sees it.
    pub fn executable(&mut self, process: ProcessKey) -> Option<Arc<str>> {
        if !self.processes.contains_key(&process) {
            self.sight(process);
        }
        self.processes.get(&process)?.memory.executable.clone()
    }

    /// What has been done and is held.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let (files, descriptors, table_bytes, dwarf_bytes) = self.files.held();
        let perf = self.processes.values().map(|p| &p.perf);
        Stats {
            processes: self.processes.len(),
            mappings: self.mappings(),
            files,
            descriptors: descriptors + perf.clone().filter(|p| p.is_open()).count(),
            table_bytes: table_bytes + self.kernel.bytes() as u64,
            dwarf_bytes,
            perf_entries: perf.map(PerfMap::len).sum(),
            results: self.results.len(),
            ..self.stats.clone()
        }
    }

    fn mappings(&self) -> usize {
        self.processes.values().map(|p| p.memory.len()).sum()
    }

    /// Reads a process's mappings. What was known of one that is gone by now stays.
    fn read(&mut self, key: ProcessKey) {
        let sighting = Sighting::read(key, &mut OpenFiles::default(), &self.limits);
        self.keep(key, sighting);
    }

    /// Keeps what was read of a process, unless what is known is newer.
    fn keep(&mut self, key: ProcessKey, sighting: Result<Sighting, Unknown>) {
        let (read, cost) = match &sighting {
            Ok(sighting) => (sighting.at, sighting.cost),
            Err(_) => (Instant::now(), Duration::ZERO),
        };
        let known = self.processes.get(&key);
        if sighting.is_ok() && known.is_some_and(|known| known.gone.is_none() && known.read > read)
        {
            return;
        }
        let memory = sighting.and_then(|sighting| {
            let (files, images) = (&mut self.files, &mut self.images);
            Memory::of(sighting, files, images, &self.limits, &mut self.stats)
        });
        match (self.processes.get_mut(&key), memory) {
            (Some(known), memory) => {
                (known.read, known.cost) = (read, cost);
                if let Ok(memory) = memory {
                    (known.memory, known.gone) = (memory, None);
                }
            }
            (None, memory) => {
                let gone = memory.as_ref().err().copied();
                let memory = memory.unwrap_or_default();
                let perf = PerfMap::new(self.images.fresh_id());
                let used = self.clock;
                self.processes.insert(key, Process { memory, gone, perf, read, cost, used });
            }
        }
        self.shrink(key);
    }

    /// Forgets the processes seen longest ago, but not `keep`, until the rest is within the limits.
    fn shrink(&mut self, keep: ProcessKey) {
        let mut mappings = self.mappings();
        while self.processes.len() > self.limits.processes || mappings > self.limits.mappings {
            let others = self.processes.iter().filter(|(key, _)| **key != keep);
            let Some(key) = others.min_by_key(|(_, p)| p.used).map(|(key, _)| *key) else { break };
            if let Some(process) = self.processes.remove(&key) {
                mappings -= process.memory.len();
                self.stats.processes_evicted += 1;
            }
        }
    }

    /// The image at an address and the offset in it; reads the mappings if there is none.
    fn locate(&mut self, key: ProcessKey, address: u64) -> Result<(Arc<Image>, u64), Unknown> {
        let mut seen = false;
        loop {
            let known = self.processes.get(&key);
            if let Some((image, offset)) = known.and_then(|p| p.memory.find(address)) {
                return Ok((Arc::clone(image), offset));
            }
            match known {
                None if seen => return Err(Unknown::NoProcess),
                None => self.sight(key),
                Some(p) if !seen && p.gone.is_none() && p.due(AGAIN) => self.read(key),
                Some(p) if p.memory.cut => return Err(Unknown::TooLarge),
                Some(p) => return Err(p.gone.unwrap_or(Unknown::Unmapped)),
            }
            seen = true;
        }
    }

    /// Opens the files of a process again, unless that was just done.
    fn reopen(&mut self, key: ProcessKey) -> bool {
        let reopen = self.processes.get(&key).is_some_and(|p| p.due(AGAIN));
        if reopen {
            self.read(key);
        }
        reopen
    }

    fn in_file(
        &mut self,
        process: ProcessKey,
        image: &Image,
        key: &FileKey,
        offset: u64,
    ) -> Result<Vec<Frame>, Unknown> {
        let root = || ProcDir::open(process).ok()?.root().ok();
        let path = &image.module.path;
        self.files.find(key, path, offset, root, &self.limits, &mut self.stats)
    }

    fn in_perf_map(
        &mut self,
        key: ProcessKey,
        image: &Arc<Image>,
        address: u64,
        unknown: Unknown,
    ) -> Arc<[Symbol]> {
        let Some(process) = self.processes.get_mut(&key) else { return self.unknown(unknown) };
        let place = (process.perf.id, address);
        if let Some(known) = self.results.get(place) {
            return known;
        }
        let mut name = process.perf.find(address);
        if name.is_none()
            && process.perf.due()
            && let Ok(dir) = ProcDir::open(key)
            && process.perf.refresh(&dir, &self.limits, &mut self.stats)
        {
            process.perf.id = self.images.fresh_id();
            name = process.perf.find(address);
        }
        let place = (process.perf.id, address);
        self.shrink_perf_maps(key);
        let Some(name) = name else {
            self.count(unknown);
            let name = self.results.name(&bracketed(&image.module.path));
            return one(name, Arc::clone(&image.module), address, Some(unknown));
        };
        let name = self.results.name(&demangle(&name));
        let symbols = one(name, Arc::clone(&image.module), address, None);
        self.results.insert(place, Arc::clone(&symbols), self.limits.results);
        symbols
    }

    /// Drops the perf maps of the processes seen longest ago, but not of `keep`.
    fn shrink_perf_maps(&mut self, keep: ProcessKey) {
        let perf = || self.processes.values().map(|p| &p.perf);
        let mut entries: usize = perf().map(PerfMap::len).sum();
        let mut open = perf().filter(|p| p.is_open()).count();
        while entries > self.limits.perf_entries || open > self.limits.perf_maps {
            let others = self.processes.iter_mut();
            let others = others.filter(|(key, p)| **key != keep && p.perf.is_open());
            let Some((_, oldest)) = others.min_by_key(|(_, p)| p.used) else { break };
            entries -= oldest.perf.len();
            open -= 1;
            oldest.perf = PerfMap::new(self.images.fresh_id());
            self.stats.perf_maps_evicted += 1;
        }
    }

    /// Turns what was found in a file into symbols, and remembers them unless they may change.
    fn answer(
        &mut self,
        image: &Image,
        offset: u64,
        found: Result<Vec<Frame>, Unknown>,
    ) -> Arc<[Symbol]> {
        let module = &image.module;
        let (symbols, lasting): (Arc<[Symbol]>, bool) = match found {
            Ok(frames) => {
                let outermost = frames.len().saturating_sub(1);
                let symbols = frames.iter().enumerate().map(|(depth, frame)| Symbol {
                    name: self.results.name(&frame.name),
                    file: self.results.name(&frame.file),
                    line: frame.line,
                    inlined: depth < outermost,
                    module: Arc::clone(module),
                    offset,
                    unknown: None,
                });
                (symbols.collect(), true)
            }
            Err(unknown) => {
                self.count(unknown);
                let name = self.results.name(&bracketed(&module.path));
                let lasting = !matches!(unknown, Unknown::Evicted | Unknown::Unreadable);
                (one(name, Arc::clone(module), offset, Some(unknown)), lasting)
            }
        };
        if lasting {
            self.results.insert((image.id, offset), Arc::clone(&symbols), self.limits.results);
        }
        symbols
    }

    fn unknown(&mut self, unknown: Unknown) -> Arc<[Symbol]> {
        self.count(unknown);
        let known = self.nowhere.get(unknown as usize);
        known.map_or_else(|| nowhere(unknown), Arc::clone)
    }

    fn count(&mut self, unknown: Unknown) {
        if let Some(count) = self.stats.unknown.get_mut(unknown as usize) {
            *count += 1;
        }
    }
}

/// The last part of a module's path in brackets, so that a flame graph shows one box for all of a
/// file's unknown functions.
fn bracketed(path: &str) -> String {
    if path.starts_with('[') {
        return path.to_owned();
    }
    format!("[{}]", path.rsplit('/').next().unwrap_or(path))
}

fn nowhere(unknown: Unknown) -> Arc<[Symbol]> {
    one(format!("[unknown: {}]", unknown.name()).into(), Arc::default(), 0, Some(unknown))
}

fn one(
    name: Arc<str>,
    module: Arc<Module>,
    offset: u64,
    unknown: Option<Unknown>,
) -> Arc<[Symbol]> {
    [Symbol { name, file: Arc::default(), line: 0, inlined: false, module, offset, unknown }].into()
}
