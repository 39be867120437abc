//! What is read of a process while it lives: its mappings, its executable, and the files behind its
//! code, which are opened so that they outlive it.
//!
//! Not for making sense of it, which is slow where files are large and can wait.

use std::{
    borrow::Cow,
    ffi::OsStr,
    fs::{File, Metadata},
    io::{self, Read},
    os::{
        fd::AsFd,
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::Path,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use hashbrown::HashMap;

pub(crate) use super::files::FileKey;
use super::{
    COST, Limits, Unknown,
    maps::{self, Line},
    names, sys,
};
use crate::event::ProcessKey;

/// Bytes of `/proc/PID/maps` that are read for each mapping that is allowed.
const LINE: u64 = 256;
/// Most executable files of one process that are opened. A large desktop program has some 300.
const EXECUTABLES: usize = 512;
/// Files that [`Sights`] holds open beside those that the symbols hold.
const ON_THE_WAY: usize = 128;
/// Shortest time between two readings of a process that were asked for.
const SOON: Duration = Duration::from_millis(10);
/// Processes of which it is known when they were read; beyond it all are forgotten.
const KNOWN: usize = 65_536;

/// The files of executable mappings by device and inode.
pub(super) type Code = HashMap<(u64, u64), Result<(FileKey, Arc<File>), Unknown>>;

/// What was read of a process.
#[derive(Debug)]
pub struct Sighting {
    /// `/proc/PID/maps`.
    pub(super) maps: Vec<u8>,
    /// There was more of it than is read.
    pub(super) cut: bool,
    /// Path of the executable.
    pub(super) executable: Option<Arc<str>>,
    /// What was opened.
    pub(super) files: Code,
    /// When it was read.
    pub(super) at: Instant,
    /// How long that took.
    pub(super) cost: Duration,
}

/// An executable part of a process's memory.
#[derive(Clone, Debug)]
pub struct CodeMapping {
    /// Where it begins.
    pub start: u64,
    /// The first address behind it.
    pub end: u64,
    /// Offset in the file.
    pub offset: u64,
    /// What is behind it.
    pub file: CodeFile,
}

/// What is behind executable memory.
#[derive(Clone, Debug)]
pub enum CodeFile {
    /// A file; the same one has the same key, whatever the process.
    File(FileKey, Arc<File>),
    /// The kernel's code for user space.
    Vdso,
    /// No file, or one that could not be opened.
    None,
}

/// Reads processes as soon as they are seen. Never waits for symbols: a thread that does nothing
/// else reads a process within milliseconds, whatever file is being searched for functions.
#[derive(Debug)]
pub struct Sights {
    limits: Limits,
    open: OpenFiles,
    known: HashMap<ProcessKey, (Instant, Duration), foldhash::fast::RandomState>,
}

/// Files that are open somewhere, so that none is open twice.
#[derive(Debug, Default)]
pub(super) struct OpenFiles(HashMap<FileKey, Weak<File>>);

impl Sights {
    /// Nothing is read yet.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, open: OpenFiles::default(), known: HashMap::default() }
    }

    /// Reads a process. `None` if it is gone, or was read so short a time ago that reading it again
    /// would cost too much.
    pub fn read(&mut self, process: ProcessKey) -> Option<Sighting> {
        let too_soon = |(at, cost): &(Instant, Duration)| at.elapsed() < SOON.max(*cost * COST);
        if self.known.get(&process).is_some_and(too_soon) {
            return None;
        }
        self.read_again(process)
    }

    /// Reads a process, however short a time ago it was read. `None` if it is gone.
    pub fn read_again(&mut self, process: ProcessKey) -> Option<Sighting> {
        let sighting = Sighting::read(process, &mut self.open, &self.limits).ok()?;
        if self.known.len() >= KNOWN {
            self.known.clear();
        }
        self.known.insert(process, (sighting.at, sighting.cost));
        Some(sighting)
    }
}

impl Sighting {
    /// Bytes of memory that it takes, but for its files.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.maps.len()
    }

    /// The executable mappings of files that were opened: first address, offset in the file, path, and
    /// the file.
    pub(crate) fn code_files(
        &self,
    ) -> impl Iterator<Item = (u64, u64, Cow<'_, [u8]>, FileKey, &Arc<File>)> {
        let lines = maps::parse(&self.maps).filter(|line| line.executable && line.ino != 0);
        lines.filter_map(|line| {
            let (key, file) = self.files.get(&(line.dev, line.ino))?.as_ref().ok()?;
            Some((line.start, line.offset, line.name, *key, file))
        })
    }

    /// When it was read.
    #[must_use]
    pub fn at(&self) -> Instant {
        self.at
    }

    /// The executable parts of its memory, in the order of their addresses.
    #[must_use]
    pub fn code(&self, limits: &Limits) -> Vec<CodeMapping> {
        let lines = maps::parse(&self.maps).take(limits.mappings_per_process);
        let mut code: Vec<CodeMapping> = lines
            .filter(|line| line.executable)
            .map(|line| CodeMapping {
                start: line.start,
                end: line.end,
                offset: line.offset,
                file: match self.files.get(&(line.dev, line.ino)) {
                    Some(Ok((key, file))) if line.ino != 0 => {
                        CodeFile::File(key.of_any_root(), Arc::clone(file))
                    }
                    _ if *line.name == *b"[vdso]" => CodeFile::Vdso,
                    _ => CodeFile::None,
                },
            })
            .collect();
        // The kernel lists them in order, but a search relies on it.
        code.sort_by_key(|mapping| mapping.start);
        code
    }

    /// Reads the mappings of a process and opens the files of its code.
    pub(super) fn read(
        process: ProcessKey,
        open: &mut OpenFiles,
        limits: &Limits,
    ) -> Result<Self, Unknown> {
        let at = Instant::now();
        let dir = ProcDir::open(process)?;
        let most = limits.mappings_per_process as u64 * LINE;
        let maps = dir.text("/maps", most).map_err(|_| Unknown::NoProcess)?;
        let root = dir.root().map_err(|_| Unknown::NoProcess)?;
        let metadata = root.metadata().map_err(|_| Unknown::NoProcess)?;
        let root_key = (metadata.dev(), metadata.ino());
        let mut files = Code::new();
        let lines = maps::parse(&maps).take(limits.mappings_per_process);
        for line in lines.filter(|line| line.executable && line.ino != 0) {
            let full = files.len() >= EXECUTABLES;
            files.entry((line.dev, line.ino)).or_insert_with(|| {
                if full {
                    return Err(Unknown::TooLarge);
                }
                let (file, metadata) =
                    dir.open_mapped(&line, &root).map_err(|_| Unknown::Unreadable)?;
                let key = FileKey::new(root_key, &metadata);
                Ok((key, open.share(key, file, limits.files + ON_THE_WAY)?))
            });
        }
        let executable = dir.executable();
        let cut = maps.len() as u64 >= most;
        Ok(Self { maps, cut, executable, files, at, cost: at.elapsed() })
    }
}

impl OpenFiles {
    /// The file, or the same one that is open already. Refused where too many are.
    fn share(&mut self, key: FileKey, file: File, most: usize) -> Result<Arc<File>, Unknown> {
        if let Some(known) = self.0.get(&key).and_then(Weak::upgrade) {
            return Ok(known);
        }
        if self.0.len() >= most {
            self.0.retain(|_, file| file.strong_count() > 0);
        }
        if self.0.len() >= most {
            return Err(Unknown::Evicted);
        }
        let file = Arc::new(file);
        self.0.insert(key, Arc::downgrade(&file));
        Ok(file)
    }
}

/// The directory of a process in `/proc`. It stays that of the same process: once the process is
/// gone, everything below it fails, even if its PID is in use again.
pub(super) struct ProcDir(File);

impl ProcDir {
    /// Opens it if the process is the one that `key` means.
    pub(super) fn open(key: ProcessKey) -> Result<Self, Unknown> {
        let dir = sys::handle(Path::new(&format!("/proc/{}", key.pid)));
        let dir = Self(dir.map_err(|_| Unknown::NoProcess)?);
        if key.pid == 0 || (key.start_ns != 0 && !dir.started(key.start_ns)) {
            return Err(Unknown::NoProcess);
        }
        Ok(dir)
    }

    /// Whether the process started then, as far as the clock tick of `stat` can tell.
    fn started(&self, start_ns: u64) -> bool {
        let Ok(stat) = self.text("/stat", 4096) else { return false };
        let expected = u128::from(start_ns) * u128::from(sys::ticks_per_second()) / 1_000_000_000;
        start_ticks(&stat).is_some_and(|ticks| expected.abs_diff(ticks.into()) <= 1)
    }

    fn path(&self, name: &str) -> String {
        sys::below(self.0.as_fd(), name)
    }

    fn text(&self, name: &str, most: u64) -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        File::open(self.path(name))?.take(most).read_to_end(&mut text)?;
        Ok(text)
    }

    /// A handle of the process's root directory.
    pub(super) fn root(&self) -> io::Result<File> {
        sys::handle(Path::new(&self.path("/root")))
    }

    /// PID in the innermost namespace, and effective user ID in ours.
    pub(super) fn inner_pid_and_user(&self) -> Option<(u32, u32)> {
        let status = String::from_utf8(self.text("/status", 16 << 10).ok()?).ok()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let pid = field("NSpid:")?.split_whitespace().next_back()?.parse().ok()?;
        let user = field("Uid:")?.split_whitespace().nth(1)?.parse().ok()?;
        Some((pid, user))
    }

    /// The path of the executable as the process sees it.
    fn executable(&self) -> Option<Arc<str>> {
        let path = std::fs::read_link(self.path("/exe")).ok()?;
        let path = path.as_os_str().as_bytes();
        let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
        Some(names::shown(&String::from_utf8_lossy(path)).into())
    }

    /// Opens what is mapped: through the kernel's link to the very file, which works for deleted
    /// ones too, or else by its path if that still leads to the same inode.
    fn open_mapped(&self, line: &Line<'_>, root: &File) -> io::Result<(File, Metadata)> {
        let link = self.path(&format!("/map_files/{:x}-{:x}", line.start, line.end));
        sys::open(Path::new(&link)).or_else(|_| {
            let found = sys::open_at(root, OsStr::from_bytes(&line.name), sys::IN_ROOT)?;
            if (found.1.dev(), found.1.ino()) != (line.dev, line.ino) {
                return Err(io::ErrorKind::NotFound.into());
            }
            Ok(found)
        })
    }
}

/// The memory of a process, if it is the one that `key` means.
pub(crate) fn memory(key: ProcessKey) -> io::Result<File> {
    let dir = ProcDir::open(key).map_err(|_| io::ErrorKind::NotFound)?;
    File::open(dir.path("/mem"))
}

/// Field 22 of `/proc/PID/stat`; the name in field 2 may hold anything, parentheses too.
fn start_ticks(stat: &[u8]) -> Option<u64> {
    let after = stat.iter().rposition(|b| *b == b')')? + 1;
    let field = stat.get(after..)?.split(|b| *b == b' ').nth(20)?;
    str::from_utf8(field).ok()?.parse().ok()
}
