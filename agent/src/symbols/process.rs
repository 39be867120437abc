//! What a process has mapped: ranges of addresses with the files and regions behind them.
//!
//! Not for reading a process while it lives, which is [`super::sight`]'s.

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use hashbrown::HashMap;

use super::{
    Limits, Module, Stats, Unknown,
    files::{FileKey, Files},
    maps::{self, Line},
    names,
    sight::{Code, Sighting},
    sys,
};

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

    /// Makes sense of what was read of a process, and keeps the files of its code open.
    pub(super) fn of(
        sighting: Sighting,
        files: &mut Files,
        images: &mut Images,
        limits: &Limits,
        stats: &mut Stats,
    ) -> Result<Self, Unknown> {
        let Sighting { maps: text, cut, executable, files: found, .. } = sighting;
        let (opened, named) = (HashMap::new(), HashMap::new());
        let mut reader = Reader { files, images, limits, stats, opened, named };
        let most = limits.mappings_per_process;
        reader.open_all(maps::parse(&text).take(most), found);
        let mut mappings: Vec<Mapping> =
            maps::parse(&text).take(most).map(|line| reader.mapping(&line)).collect();
        if mappings.is_empty() {
            // A kernel thread, or a process that is about to be gone.
            return Err(Unknown::NoProcess);
        }
        // The kernel lists them in order, but the search relies on it.
        mappings.sort_by_key(|m| m.start);
        mappings.shrink_to_fit();
        let cut = cut || mappings.len() >= most;
        stats.maps_read += 1;
        stats.maps_cut += u64::from(cut);
        Ok(Self { mappings, executable, cut })
    }
}

struct Reader<'a> {
    files: &'a mut Files,
    images: &'a mut Images,
    limits: &'a Limits,
    stats: &'a mut Stats,
    /// By device and inode.
    opened: HashMap<(u64, u64), Arc<Image>>,
    named: HashMap<Vec<u8>, Arc<Image>>,
}

impl Reader<'_> {
    /// Keeps the files of the executable mappings.
    fn open_all<'l>(&mut self, lines: impl Iterator<Item = Line<'l>>, mut found: Code) {
        for line in lines {
            let at = (line.dev, line.ino);
            let Some(found) = found.remove(&at) else { continue };
            let found = found.and_then(|(key, file)| {
                let metadata = file.metadata().map_err(|_| Unknown::Unreadable)?;
                let id = self.files.insert(key, file, &metadata, self.limits, self.stats)?;
                Ok((Content::File(key), id))
            });
            let (content, build_id) = found.unwrap_or_else(|u| (Content::Other(u), "".into()));
            let image = self.images.get(&path(&line.name), build_id, content);
            self.opened.insert(at, image);
        }
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
    let inserted = own_vdso(size).and_then(|file| {
        let metadata = file.metadata().ok()?;
        files.insert(key, Arc::new(file), &metadata, limits, stats).ok()
    });
    match inserted {
        Some(_) => Content::File(key),
        None => Content::Other(Unknown::NoSymbol),
    }
}

/// A copy of the agent's own vDSO, which the kernel gives to every process of the same word size, if it
/// is of that size.
#[must_use]
pub fn own_vdso(size: u64) -> Option<File> {
    let maps = std::fs::read("/proc/self/maps").ok()?;
    let own = maps::parse(&maps).find(|line| *line.name == *b"[vdso]")?;
    let len = (own.end - own.start == size && size <= VDSO).then_some(size)?;
    let mut bytes = vec![0; usize::try_from(len).ok()?];
    File::open("/proc/self/mem").ok()?.read_exact_at(&mut bytes, own.start).ok()?;
    sys::memory_file(&bytes).ok()
}
