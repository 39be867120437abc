//! What a process has mapped, read while it lives: mappings, its executable, and the files behind
//! its code, which are opened so that they outlive it.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::{
        fd::AsFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt},
        },
    },
    path::Path,
    sync::Arc,
};

use hashbrown::HashMap;

use super::{
    Limits, Module, Stats, Unknown,
    files::{FileKey, Files},
    maps::{self, Line},
    names, sys,
};
use crate::event::ProcessKey;

/// Bytes of `/proc/PID/maps` that are read for each mapping that is allowed.
const LINE: u64 = 256;
/// Most executable files of one process that are opened. A large desktop program has some 300.
const EXECUTABLES: usize = 512;
/// Largest vDSO; the kernel's has two or three pages.
const VDSO: u64 = 64 << 10;

/// What mappings are of: a file or a region with a name.
#[derive(Debug)]
pub(super) struct Image {
    /// Unique, for keys of results.
    pub(super) id: u32,
    /// As users see it.
    pub(super) module: Arc<Module>,
    /// Where functions of it are to be found.
    pub(super) content: Content,
}

/// Where functions of an image are to be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Content {
    /// In this file.
    File(FileKey),
    /// At best in the process's perf map, else unknown for this reason.
    Other(Unknown),
}

/// A range of addresses.
#[derive(Debug)]
pub(super) struct Mapping {
    start: u64,
    end: u64,
    offset: u64,
    image: Arc<Image>,
}

/// Every image that some process has mapped, once.
#[derive(Default)]
pub(super) struct Images {
    known: HashMap<(Arc<str>, Arc<str>, Content), Arc<Image>>,
    last: u32,
    prune_at: usize,
}

impl Images {
    /// A number that no image has had. After 2^32 of them results could be mistaken.
    pub(super) fn fresh_id(&mut self) -> u32 {
        self.last = self.last.wrapping_add(1).max(1);
        self.last
    }

    fn get(&mut self, path: &str, build_id: Arc<str>, content: Content) -> Arc<Image> {
        let key = (Arc::from(path), build_id, content);
        if let Some(image) = self.known.get(&key) {
            return Arc::clone(image);
        }
        if self.known.len() >= self.prune_at {
            self.known.retain(|_, image| Arc::strong_count(image) > 1);
            self.prune_at = (self.known.len() * 2).max(1024);
        }
        let id = self.fresh_id();
        let module = Arc::new(Module { path: Arc::clone(&key.0), build_id: Arc::clone(&key.1) });
        let image = Arc::new(Image { id, module, content });
        self.known.insert(key, Arc::clone(&image));
        image
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
    fn open_mapped(&self, line: &Line<'_>, root: &File) -> io::Result<(File, std::fs::Metadata)> {
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

/// Field 22 of `/proc/PID/stat`; the name in field 2 may hold anything, parentheses too.
fn start_ticks(stat: &[u8]) -> Option<u64> {
    let after = stat.iter().rposition(|b| *b == b')')? + 1;
    let field = stat.get(after..)?.split(|b| *b == b' ').nth(20)?;
    str::from_utf8(field).ok()?.parse().ok()
}

/// What has been read of a process.
#[derive(Debug, Default)]
pub(super) struct Memory {
    mappings: Vec<Mapping>,
    /// Path of the executable.
    pub(super) executable: Option<Arc<str>>,
    /// There were more mappings than are kept.
    pub(super) cut: bool,
}

impl Memory {
    /// The mapping of an address, and the offset in what is mapped.
    pub(super) fn find(&self, address: u64) -> Option<(&Arc<Image>, u64)> {
        let after = self.mappings.partition_point(|m| m.start <= address);
        let mapping = self.mappings.get(..after)?.last().filter(|m| address < m.end)?;
        Some((&mapping.image, mapping.offset.wrapping_add(address - mapping.start)))
    }

    /// How many mappings are kept.
    pub(super) fn len(&self) -> usize {
        self.mappings.len()
    }

    /// Reads the mappings of a process and opens the files of its code.
    pub(super) fn read(
        dir: &ProcDir,
        files: &mut Files,
        images: &mut Images,
        limits: &Limits,
        stats: &mut Stats,
    ) -> Result<Self, Unknown> {
        let most = limits.mappings_per_process;
        let text = dir.text("/maps", most as u64 * LINE).map_err(|_| Unknown::NoProcess)?;
        let root = dir.root().map_err(|_| Unknown::NoProcess)?;
        let metadata = root.metadata().map_err(|_| Unknown::NoProcess)?;
        let mut reader = Reader {
            dir,
            root_key: (metadata.dev(), metadata.ino()),
            root,
            files,
            images,
            limits,
            stats,
            opened: HashMap::new(),
            named: HashMap::new(),
        };
        maps::parse(&text).take(most).filter(|l| l.executable).for_each(|l| reader.open(&l));
        let mut mappings: Vec<Mapping> =
            maps::parse(&text).take(most).map(|line| reader.mapping(&line)).collect();
        if mappings.is_empty() {
            // A kernel thread, or a process that is about to be gone.
            return Err(Unknown::NoProcess);
        }
        // The kernel lists them in order, but the search relies on it.
        mappings.sort_by_key(|m| m.start);
        mappings.shrink_to_fit();
        let cut = mappings.len() >= most || text.len() as u64 >= most as u64 * LINE;
        stats.maps_read += 1;
        stats.maps_cut += u64::from(cut);
        Ok(Self { mappings, executable: dir.executable(), cut })
    }
}

struct Reader<'a> {
    dir: &'a ProcDir,
    root: File,
    root_key: (u64, u64),
    files: &'a mut Files,
    images: &'a mut Images,
    limits: &'a Limits,
    stats: &'a mut Stats,
    /// By device and inode.
    opened: HashMap<(u64, u64), Arc<Image>>,
    named: HashMap<Vec<u8>, Arc<Image>>,
}

impl Reader<'_> {
    /// Opens the file of an executable mapping.
    fn open(&mut self, line: &Line<'_>) {
        let at = (line.dev, line.ino);
        if line.ino == 0 || self.opened.contains_key(&at) {
            return;
        }
        let found = if self.opened.len() >= EXECUTABLES {
            Err(Unknown::TooLarge)
        } else {
            self.dir.open_mapped(line, &self.root).map_err(|_| Unknown::Unreadable)
        };
        let found = found.and_then(|(file, metadata)| {
            let key = FileKey::new(self.root_key, &metadata);
            let id = self.files.insert(key, file, &metadata, self.limits, self.stats)?;
            Ok((Content::File(key), id))
        });
        let (content, build_id) = found.unwrap_or_else(|u| (Content::Other(u), "".into()));
        let image = self.images.get(&path(&line.name), build_id, content);
        self.opened.insert(at, image);
    }

    fn mapping(&mut self, line: &Line<'_>) -> Mapping {
        let (start, end) = (line.start, line.end);
        let opened = self.opened.get(&(line.dev, line.ino)).filter(|_| line.ino != 0);
        // Offsets in what is no file count from the start of the region.
        let offset = if line.ino == 0 { 0 } else { line.offset };
        if let Some(image) = opened.or_else(|| self.named.get(&*line.name)) {
            return Mapping { start, end, offset, image: Arc::clone(image) };
        }
        let content = match &*line.name {
            b"[vdso]" => vdso(self.files, self.limits, self.stats, end - start),
            _ => Content::Other(Unknown::NoSymbol),
        };
        let image = self.images.get(&path(&line.name), "".into(), content);
        self.named.insert(line.name.to_vec(), Arc::clone(&image));
        Mapping { start, end, offset, image }
    }
}

/// The name that users see.
fn path(name: &[u8]) -> String {
    if name.is_empty() { "[anon]".into() } else { names::shown(&String::from_utf8_lossy(name)) }
}

/// The agent's own vDSO, which the kernel gives to every process of the same word size, as a file.
fn vdso(files: &mut Files, limits: &Limits, stats: &mut Stats, size: u64) -> Content {
    let key = FileKey::default();
    if files.touch(&key).is_some() {
        return Content::File(key);
    }
    let copy = || -> Option<(File, std::fs::Metadata)> {
        let maps = std::fs::read("/proc/self/maps").ok()?;
        let own = maps::parse(&maps).find(|line| *line.name == *b"[vdso]")?;
        let len = (own.end - own.start == size && size <= VDSO).then_some(size)?;
        let mut bytes = vec![0; usize::try_from(len).ok()?];
        File::open("/proc/self/mem").ok()?.read_exact_at(&mut bytes, own.start).ok()?;
        let file = sys::memory_file(&bytes).ok()?;
        let metadata = file.metadata().ok()?;
        Some((file, metadata))
    };
    match copy().map(|(file, metadata)| files.insert(key, file, &metadata, limits, stats)) {
        Some(Ok(_)) => Content::File(key),
        _ => Content::Other(Unknown::NoSymbol),
    }
}
