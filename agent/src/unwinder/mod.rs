//! Which unwind tables are in the kernel, and for which processes: the thread that builds them.
//!
//! [`Unwinder`] is the one owner of the kernel's tables. It is told of each process that is seen
//! ([`Told`]), builds the tables of the files that are new ([`crate::unwind`]), and then says where the
//! process has mapped what. A table is there once, for all processes that map its file. Memory is
//! bounded: tables that no process needs go first, those used longest ago before others; a process
//! that has no table is walked by frame pointers.
//!
//! Not for reading processes, nor for walking.

#[cfg(test)]
mod cases;
mod ranges;
mod space;
#[cfg(test)]
mod tests;

use std::{
    cmp::Ordering,
    collections::VecDeque,
    fs::File,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use hashbrown::HashMap;
use podflame_wire::unwind::{
    MAX_MAPPINGS, MAX_PROCESS_MAPPINGS, MAX_PROCESSES, MAX_TABLES, Mapping, MappingKind, Process,
};
use tokio::sync::watch;
use tracing::{debug, warn};

use self::{
    ranges::Ranges,
    space::{Part, add, add_without},
};
use crate::{
    event::ProcessKey,
    kernel::{MapError, tables::Tables},
    symbols::{self, CodeFile, CodeMapping, FileKey},
    unwind::{self, Load, NoTable, Rules},
};

/// Bytes of kernel memory for tables, all together. The 20 largest programs of a desktop take 40 MiB.
pub const TABLE_BYTES: u64 = 128 << 20;

/// Processes that may wait to be taken.
pub const QUEUE: usize = 256;

/// Files of which it is remembered that they have no table; each takes some 100 bytes.
const FILES: usize = 8192;

/// How often processes that are gone are looked for.
const TIDY: Duration = Duration::from_secs(5);

/// How long what was freed is not used again: a walk that began before takes some microseconds.
const REST: Duration = Duration::from_secs(1);

/// A file for whose table there was no room is tried again after this time.
const RETRY: Duration = Duration::from_secs(60);

/// Work on one file after which the thread rests as long as it works: nobody shall notice.
const SPURT: Duration = Duration::from_millis(50);

/// How much nicer than others the thread is: it gets two fifths of a CPU where another thread wants it all. Much
/// nicer, and new processes would wait for seconds.
const NICE: libc::c_int = 2;

/// A process whose tables are ready within this time of its first sight is ready early.
pub const EARLY: Duration = Duration::from_millis(300);

/// A process as it was seen.
#[derive(Debug)]
pub struct Told {
    /// Which one.
    pub process: ProcessKey,
    /// Its executable memory.
    pub code: Vec<CodeMapping>,
    /// When it was read.
    pub at: Instant,
}

/// What there is, and what came of it so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unwinding {
    /// Processes that are walked by tables now.
    pub processes: u64,
    /// Tables in the kernel now.
    pub tables: u64,
    /// Bytes of kernel memory that they take.
    pub bytes: u64,
    /// Rows in them.
    pub rows: u64,
    /// Rules that differ.
    pub rules: u64,
    /// Files whose tables were built so far.
    pub built: u64,
    /// Microseconds that took, rests included.
    pub built_us: u64,
    /// Files without a table, by [`NoTable`].
    pub without: [u64; NoTable::ALL.len()],
    /// Tables that went to make room.
    pub evicted: u64,
    /// Files for whose tables there was no room.
    pub no_room: u64,
    /// Processes with more mappings than there is room for.
    pub too_many_mappings: u64,
    /// Processes that became ready so far.
    pub ready: u64,
    /// Those of them that were ready within [`EARLY`] of their first sight.
    pub ready_early: u64,
}

/// A file's table in the kernel.
#[derive(Debug)]
struct Placed {
    loads: Vec<Load>,
    parts: Vec<Part>,
    bytes: u64,
    rows: u64,
}

#[derive(Debug)]
enum State {
    Placed(Placed),
    /// It has none, and how its code is left instead.
    None(MappingKind),
    NoRoom(Instant),
}

#[derive(Debug)]
struct Entry {
    state: State,
    /// Processes that map it.
    users: usize,
    used: u64,
}

#[derive(Debug)]
struct Known {
    process: ProcessKey,
    first: u32,
    mappings: Vec<Mapping>,
    files: Vec<FileKey>,
    used: u64,
}

/// Whether a PID went from one program to another: by exec, or by being used again. Where the kernel hides
/// when a process started, none is known to be later.
fn is_later(one: ProcessKey, than: ProcessKey) -> bool {
    let executed = one.exec_id.wrapping_sub(than.exec_id).cast_signed();
    match one.start_ns.cmp(&than.start_ns) {
        Ordering::Equal => one.start_ns != 0 && executed > 0,
        order => than.start_ns != 0 && order == Ordering::Greater,
    }
}

/// What will be free.
#[derive(Debug)]
enum Freed {
    Mappings(u32, u32),
    Slot(u32),
}

/// The owner of the kernel's tables.
pub struct Unwinder {
    kernel: Tables,
    limits: unwind::Limits,
    rules: Rules,
    uploaded: usize,
    files: HashMap<FileKey, Entry>,
    known: HashMap<u32, Known>,
    ranges: Ranges,
    slots: Vec<u32>,
    next_slot: u32,
    freed: VecDeque<(Instant, Freed)>,
    clock: u64,
    generation: u32,
    stats: Unwinding,
    told: watch::Sender<Unwinding>,
}

impl Unwinder {
    /// Nothing is known yet. `stats` is told what there is after each change.
    #[must_use]
    pub fn new(kernel: Tables, stats: watch::Sender<Unwinding>) -> Self {
        Self {
            kernel,
            limits: unwind::Limits::default(),
            rules: Rules::default(),
            uploaded: 0,
            files: HashMap::default(),
            known: HashMap::default(),
            ranges: Ranges::new(MAX_MAPPINGS as u32),
            slots: Vec::new(),
            next_slot: 0,
            freed: VecDeque::new(),
            clock: 0,
            generation: 0,
            stats: Unwinding::default(),
            told: stats,
        }
    }

    /// Takes what it is told until nobody can tell any more.
    pub fn run(mut self, told: &Receiver<Told>) {
        // SAFETY: it takes no pointer. On Linux it is the thread that gets nicer, whose ID 0 stands for.
        if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0 {
            debug!("the thread that builds unwind tables keeps its priority");
        }
        let mut waiting: Vec<Told> = Vec::new();
        let mut tidied = Instant::now();
        loop {
            if waiting.is_empty() {
                match told.recv_timeout(TIDY) {
                    Ok(one) => waiting.push(one),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
            for one in told.try_iter().take(QUEUE) {
                match waiting.iter_mut().find(|other| other.process == one.process) {
                    Some(before) => before.code = one.code,
                    None => waiting.push(one),
                }
            }
            // What takes long must not keep the others waiting.
            let next = (0..waiting.len()).min_by_key(|i| self.missing_bytes(&waiting[*i]));
            if let Some(next) = next {
                let one = waiting.swap_remove(next);
                let pid = one.process.pid;
                if let Err(error) = self.take(one) {
                    warn!(pid, "a process is walked by frame pointers: {error}");
                }
            }
            if tidied.elapsed() >= TIDY {
                self.forget_the_gone();
                tidied = Instant::now();
            }
            self.tell();
        }
    }

    fn tell(&mut self) {
        self.stats.processes = self.known.len() as u64;
        self.stats.rules = self.rules.count() as u64;
        self.told.send_if_modified(|last| std::mem::replace(last, self.stats) != self.stats);
    }

    /// Bytes of its files that have no table yet.
    fn missing_bytes(&self, told: &Told) -> u64 {
        let missing = told.code.iter().filter_map(|mapping| match &mapping.file {
            CodeFile::File(key, file) if !self.files.contains_key(key) => file.metadata().ok(),
            _ => None,
        });
        missing.map(|metadata| metadata.len()).sum()
    }

    /// Makes the tables of a process, and then says where it has mapped what.
    fn take(&mut self, told: Told) -> Result<(), MapError> {
        // Large files wait for small ones: what a process ran before its exec can come after what it runs
        // since, whose mappings have to stay.
        if self.known.get(&told.process.pid).is_some_and(|k| is_later(k.process, told.process)) {
            return Ok(());
        }
        self.clock += 1;
        let (mut space, mut files) = (Vec::new(), Vec::new());
        for mapping in &told.code {
            let (start, end, offset) = (mapping.start, mapping.end, mapping.offset);
            let key = match &mapping.file {
                CodeFile::File(key, file) => {
                    self.place(*key, || Some(file.clone()))?;
                    *key
                }
                CodeFile::Vdso => {
                    let key = FileKey::default();
                    self.place(key, || symbols::own_vdso(end - start).map(Arc::new))?;
                    key
                }
                CodeFile::None => {
                    add_without(&mut space, start, end, MappingKind::NoTable);
                    continue;
                }
            };
            match self.files.get(&key).map(|entry| &entry.state) {
                Some(State::Placed(placed)) => {
                    if !files.contains(&key) {
                        files.push(key);
                    }
                    add(&mut space, (start, end, offset), &placed.loads, &placed.parts);
                }
                Some(State::None(kind)) => add_without(&mut space, start, end, *kind),
                _ => add_without(&mut space, start, end, MappingKind::NoTable),
            }
        }
        self.publish(&told, space, files)
    }

    fn publish(
        &mut self,
        told: &Told,
        space: Vec<Mapping>,
        files: Vec<FileKey>,
    ) -> Result<(), MapError> {
        let pid = told.process.pid;
        if space.len() > MAX_PROCESS_MAPPINGS {
            self.stats.too_many_mappings += 1;
            self.forget(pid);
            return Ok(());
        }
        if let Some(known) = self.known.get_mut(&pid)
            && known.process == told.process
            && known.mappings == space
        {
            known.used = self.clock;
            return Ok(());
        }
        let len = space.len() as u32;
        // Before the old ones are given up: they may be the same files.
        for key in &files {
            if let Some(entry) = self.files.get_mut(key) {
                entry.users += 1;
            }
        }
        let room = self.room_for(pid, len);
        let Some(first) = room else {
            self.stats.too_many_mappings += 1;
            self.release(&files);
            return Ok(());
        };
        // No two lists have the same before 2^32 of them were made, and no walk knows 0.
        self.generation = self.generation.wrapping_add(1).max(1);
        let process = Process {
            start_ns: told.process.start_ns,
            exec_id: told.process.exec_id,
            first,
            mappings: len,
            generation: self.generation,
        };
        if let Err(error) = self.kernel.put(pid, process, &space) {
            // What is known of the process stays as it was. A walk cannot have seen the new mappings.
            self.release(&files);
            self.ranges.give(first, len);
            return Err(error);
        }
        let known =
            Known { process: told.process, first, mappings: space, files, used: self.clock };
        let before = self.known.insert(pid, known);
        if before.as_ref().is_none_or(|before| before.process != told.process) {
            self.stats.ready += 1;
            self.stats.ready_early += u64::from(told.at.elapsed() <= EARLY);
        }
        if let Some(before) = before {
            self.give_back(&before);
        }
        Ok(())
    }

    /// Room for so many mappings, for which processes that are gone, and then those that were seen
    /// longest ago, are forgotten.
    fn room_for(&mut self, pid: u32, len: u32) -> Option<u32> {
        if self.known.len() >= MAX_PROCESSES && !self.known.contains_key(&pid) {
            self.forget_the_gone();
        }
        loop {
            let full = self.known.len() >= MAX_PROCESSES && !self.known.contains_key(&pid);
            if !full {
                self.reuse();
                if let Some(first) = self.ranges.take(len) {
                    return Some(first);
                }
            }
            let others = self.known.iter().filter(|(other, _)| **other != pid);
            let oldest = others.min_by_key(|(_, known)| known.used).map(|(pid, _)| *pid)?;
            self.forget(oldest);
            if !full {
                // What it had rests now, and is there for the next.
                return None;
            }
        }
    }

    /// Makes sure that a file has its table, if it can have one.
    fn place(
        &mut self,
        key: FileKey,
        open: impl Fn() -> Option<Arc<File>>,
    ) -> Result<(), MapError> {
        let clock = self.clock;
        if let Some(entry) = self.files.get_mut(&key) {
            entry.used = clock;
            match &entry.state {
                State::NoRoom(since) if since.elapsed() >= RETRY => {}
                _ => return Ok(()),
            }
        }
        let began = Instant::now();
        let (mut worked, limits) = (Instant::now(), self.limits.clone());
        let mut pause = || {
            if began.elapsed() > SPURT {
                std::thread::park_timeout(worked.elapsed());
                worked = Instant::now();
            }
        };
        let built = match open() {
            Some(file) => unwind::build(&file, &mut self.rules, &limits, &mut pause),
            None => Err(NoTable::Unreadable),
        };
        let state = match built {
            Ok(table) => {
                self.stats.built += 1;
                self.stats.built_us += began.elapsed().as_micros() as u64;
                self.upload(&table)?
            }
            Err(reason) => {
                debug!(?key, reason = reason.name(), "a file has no unwind table");
                self.stats.without[reason as usize] += 1;
                State::None(match reason {
                    NoTable::Go => MappingKind::FramePointers,
                    _ => MappingKind::NoTable,
                })
            }
        };
        if self.files.len() >= FILES {
            // Those without a table are cheap to try again.
            self.files
                .retain(|_, entry| entry.users > 0 || matches!(entry.state, State::Placed(_)));
        }
        self.files.insert(key, Entry { state, users: 0, used: self.clock });
        Ok(())
    }

    fn upload(&mut self, table: &unwind::FileTable) -> Result<State, MapError> {
        while self.stats.bytes + table.bytes > TABLE_BYTES
            || self.free_slots() < table.segments.len()
        {
            if !self.evict() {
                self.stats.no_room += 1;
                return Ok(State::NoRoom(Instant::now()));
            }
        }
        let new = self.rules.added_since(self.uploaded);
        self.kernel.put_rules(self.uploaded, new)?;
        self.uploaded = self.rules.count();
        let mut parts = Vec::with_capacity(table.segments.len());
        for segment in &table.segments {
            let slot = self.slots.pop().unwrap_or(self.next_slot);
            self.next_slot = self.next_slot.max(slot + 1);
            self.kernel.stage(slot, &segment.pages)?;
            let pages = segment.pages.len() as u32;
            parts.push(Part { base: segment.base, end: segment.end, slot, pages });
        }
        self.stats.tables += parts.len() as u64;
        self.stats.bytes += table.bytes;
        self.stats.rows += table.rows;
        let loads = table.loads.clone();
        Ok(State::Placed(Placed { loads, parts, bytes: table.bytes, rows: table.rows }))
    }

    fn free_slots(&mut self) -> usize {
        self.reuse();
        self.slots.len() + MAX_TABLES - self.next_slot as usize
    }

    /// Frees the table that no process needs and that was used longest ago.
    fn evict(&mut self) -> bool {
        let idle = self.files.iter().filter(|(_, entry)| {
            entry.users == 0 && entry.used < self.clock && matches!(entry.state, State::Placed(_))
        });
        let Some(key) = idle.min_by_key(|(_, entry)| entry.used).map(|(key, _)| *key) else {
            return false;
        };
        if let Some(Entry { state: State::Placed(placed), .. }) = self.files.remove(&key) {
            self.stats.evicted += 1;
            self.stats.tables -= placed.parts.len() as u64;
            self.stats.bytes -= placed.bytes;
            self.stats.rows -= placed.rows;
            for part in placed.parts {
                self.kernel.stage_none(part.slot);
                self.freed.push_back((Instant::now(), Freed::Slot(part.slot)));
            }
        }
        true
    }

    /// Makes what has rested usable again.
    fn reuse(&mut self) {
        while let Some((since, _)) = self.freed.front()
            && since.elapsed() >= REST
        {
            match self.freed.pop_front() {
                Some((_, Freed::Mappings(first, len))) => self.ranges.give(first, len),
                Some((_, Freed::Slot(slot))) => self.slots.push(slot),
                None => {}
            }
        }
    }

    fn forget_the_gone(&mut self) {
        let gone = |known: &Known| !symbols::is_alive(known.process);
        let gone: Vec<u32> =
            self.known.iter().filter(|(_, known)| gone(known)).map(|(pid, _)| *pid).collect();
        for pid in gone {
            self.forget(pid);
        }
    }

    fn forget(&mut self, pid: u32) {
        if let Some(known) = self.known.remove(&pid) {
            self.kernel.remove_process(pid);
            self.give_back(&known);
        }
    }

    fn give_back(&mut self, known: &Known) {
        self.release(&known.files);
        let len = known.mappings.len() as u32;
        self.freed.push_back((Instant::now(), Freed::Mappings(known.first, len)));
    }

    fn release(&mut self, files: &[FileKey]) {
        for key in files {
            if let Some(entry) = self.files.get_mut(key) {
                entry.users -= 1;
            }
        }
    }
}
