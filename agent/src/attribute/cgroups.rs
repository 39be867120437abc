//! The cgroups (v2) of this machine: from an ID that a BPF program sent to a path.
//!
//! Not for what a path means: see [`super::path`].
//!
//! A cgroup's ID is its kernfs ID, which 64-bit kernels also show as the inode number of its
//! directory (`kernfs_ino` in `include/linux/kernfs.h`). An ID is never given twice, and a cgroup
//! (v2) cannot be renamed, so what was learned once stays true after the cgroup is gone. All that
//! exist are learned at the start. An ID that is new is asked of the kernel: a file handle of
//! kernfs holds nothing but the ID (`FILEID_KERNFS` in `include/linux/exportfs.h`), so that
//! `open_by_handle_at` leads to the directory. That needs `CAP_DAC_READ_SEARCH`; without it the
//! tree is walked again, at a bounded rate.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{DirEntryExt, MetadataExt},
        },
    },
    path::{Component, Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use super::lru::Lru;
use crate::event::CgroupId;

/// Cgroups remembered, alive or gone. A node with 250 pods has about 1,000 at a time; each costs
/// about 300 bytes, and [`MAX_PATH`] at most.
const CAPACITY: usize = 16_384;

/// Longest path kept, in bytes. A cgroup nested deeper is taken for its ancestor up to there.
const MAX_PATH: usize = 1024;

/// Cgroups visited by one walk. The outer ones come first.
const MAX_WALK: usize = 65_536;

/// Least time between two walks for unknown IDs. A walk reads about one directory per 20 µs.
const WALK_INTERVAL: Duration = Duration::from_millis(100);

/// A walk is followed by a pause of this many times its own duration, so that walking never takes
/// more than 5 % of a CPU.
const WALK_PAUSE: u32 = 20;

/// ID and inode number of the root of every cgroup2 hierarchy (`cgroup_setup_root` in
/// `kernel/cgroup/cgroup.c` warns of any other).
const ROOT: u64 = 1;

/// Why a cgroup has no path, or a path no cgroup.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The event names no cgroup.
    #[error("the kernel did not say which cgroup it was")]
    Unknown,
    /// There is no cgroup2 mount.
    #[error(
        "no cgroup2 file system is mounted (mount one: mount -t cgroup2 none /sys/fs/cgroup; in a \
         container, mount the host's /sys/fs/cgroup)"
    )]
    NoMount,
    /// The cgroup was removed before anything asked for its path.
    #[error("cgroup {} was removed before its path could be read", .0.0)]
    Gone(CgroupId),
    /// The mount shows a part of the hierarchy, and the cgroup is not in it.
    #[error("cgroup {} is outside of what the cgroup2 mount shows (mount the host's)", .0.0)]
    Outside(CgroupId),
    /// The tree was walked a moment ago; ask again.
    #[error("cgroup {} is new, and its path is not read yet", .0.0)]
    Later(CgroupId),
    /// A path that leads to no cgroup.
    #[error("no cgroup at {}: {reason} (paths are below the cgroup2 mount {})", .path.display(), .mount.display())]
    NoSuchCgroup {
        /// What was looked for.
        path: PathBuf,
        /// Where the hierarchy is mounted.
        mount: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// More cgroups below one than can be taken.
    #[error("more than {limit} cgroups at and below {}: choose one further down", .path.display())]
    TooMany {
        /// The outermost.
        path: PathBuf,
        /// How many can be taken.
        limit: usize,
    },
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Cgroups remembered now, alive or gone.
    pub known: usize,
    /// Cgroups forgotten because [`CAPACITY`] was reached.
    pub evicted: u64,
    /// IDs asked of the kernel.
    pub asked: u64,
    /// IDs that no cgroup had any more.
    pub gone: u64,
    /// Walks over the tree, the first included.
    pub walks: u64,
    /// Directories left out of walks, unreadable or beyond [`MAX_WALK`].
    pub skipped: u64,
}

/// The cgroup2 mount that shows most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its mount point.
    pub point: PathBuf,
    /// It shows the whole hierarchy; if not, a cgroup namespace or a bind mount cuts it.
    pub whole: bool,
}

impl Mount {
    /// Finds it in `/proc/self/mountinfo`; one that shows the whole hierarchy comes first.
    ///
    /// # Errors
    /// [`Error::NoMount`] if there is none, or if it cannot be read.
    pub fn find() -> Result<Self, Error> {
        let text = fs::read("/proc/self/mountinfo").map_err(|_| Error::NoMount)?;
        let mut mounts: Vec<Self> = cgroup2_mounts(&text)
            .into_iter()
            .filter(|point| is_cgroup2(point))
            .filter_map(|point| {
                let whole = fs::metadata(&point).ok()?.ino() == ROOT;
                Some(Self { point, whole })
            })
            .collect();
        mounts.sort_by_key(|mount| !mount.whole);
        mounts.into_iter().next().ok_or(Error::NoMount)
    }

    /// The path below the mount, of a path of the file system.
    fn relative(&self, path: &Path) -> Option<Arc<str>> {
        let below = path.strip_prefix(&self.point).ok()?;
        Some(Arc::from(cut(&format!("/{}", below.to_string_lossy()))))
    }
}

/// Mount points of cgroup2 in the text of `/proc/PID/mountinfo` (proc_pid_mountinfo(5)), in order.
#[must_use]
pub fn cgroup2_mounts(mountinfo: &[u8]) -> Vec<PathBuf> {
    let point = |line: &[u8]| -> Option<PathBuf> {
        let mut fields = line.split(|byte| *byte == b' ');
        let point = fields.nth(4)?;
        // Optional fields end with a dash; the type follows it.
        fields.find(|field| *field == b"-")?;
        (fields.next()? == b"cgroup2").then(|| PathBuf::from(unescape(point)))
    };
    mountinfo.split(|byte| *byte == b'\n').filter_map(point).collect()
}

/// Undoes the octal escapes of `mangle_path` in `fs/seq_file.c`.
fn unescape(field: &[u8]) -> std::ffi::OsString {
    let mut text = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if byte == b'\\' => {
                Some((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'))
            }
            _ => None,
        };
        text.push(octal.unwrap_or(byte));
        rest = if octal.is_some() { tail.get(3..).unwrap_or_default() } else { tail };
    }
    std::ffi::OsString::from_vec(text)
}

/// Whether that is a cgroup2 file system: another can be mounted over it.
fn is_cgroup2(path: &Path) -> bool {
    let Ok(path) = std::ffi::CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: all zero is a value of this plain C struct.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` ends with a NUL, and `found` is writable and outlives the call.
    let done = unsafe { libc::statfs(path.as_ptr(), &raw mut found) };
    // The types of both differ between C libraries.
    done == 0 && i128::from(found.f_type) == i128::from(libc::CGROUP2_SUPER_MAGIC)
}

/// A path of at most [`MAX_PATH`] bytes: an ancestor's if it is longer.
pub(super) fn cut(path: &str) -> &str {
    if path.len() <= MAX_PATH {
        return path;
    }
    let end = path.bytes().take(MAX_PATH).rposition(|byte| byte == b'/').unwrap_or(0);
    path.get(..end).filter(|ancestor| !ancestor.is_empty()).unwrap_or("/")
}

/// The table. See the module.
#[derive(Debug)]
pub struct Cgroups {
    mount: Option<Mount>,
    /// The root directory, for `open_by_handle_at`; `None` when the kernel refused that.
    root: Option<File>,
    /// `None`: no cgroup has that ID any more.
    paths: Lru<CgroupId, Option<Arc<str>>>,
    next_walk: Option<Instant>,
    stats: Stats,
}

impl Cgroups {
    /// Learns all cgroups there are. Without a cgroup2 mount the table stays empty, and
    /// [`Self::path`] says so.
    #[must_use]
    pub fn new() -> Self {
        let mount = Mount::find().ok();
        let root = mount.as_ref().and_then(|mount| File::open(&mount.point).ok());
        let mut table = Self {
            mount,
            root,
            paths: Lru::new(CAPACITY),
            next_walk: None,
            stats: Stats::default(),
        };
        table.walk();
        table
    }

    /// The mount that IDs are looked up in.
    #[must_use]
    pub fn mount(&self) -> Option<&Mount> {
        self.mount.as_ref()
    }

    /// What happened so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats { known: self.paths.len(), evicted: self.paths.evicted(), ..self.stats }
    }

    /// The path of a cgroup below the mount, `/` for the root. At most 1,024 bytes: a cgroup nested
    /// deeper gives its ancestor's. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// Why there is none. Only [`Error::Later`] can be different the next time.
    pub fn path(&mut self, id: CgroupId) -> Result<Arc<str>, Error> {
        if id.0 == 0 {
            return Err(Error::Unknown);
        }
        if let Some(known) = self.paths.get(&id) {
            return known.clone().ok_or_else(|| self.missing(id));
        }
        if id.0 == ROOT {
            return Ok(Arc::from("/"));
        }
        if self.mount.is_none() {
            return Err(Error::NoMount);
        }
        let path = match self.ask(id) {
            Ok(path) => path,
            Err(Refused::Now) => return Err(Error::Later(id)),
            Err(Refused::Always) => {
                self.root = None;
                if self.next_walk.is_some_and(|next| Instant::now() < next) {
                    return Err(Error::Later(id));
                }
                self.walk();
                self.paths.get(&id).cloned().flatten()
            }
        };
        self.stats.gone += u64::from(path.is_none());
        self.paths.insert(id, path.clone());
        path.ok_or_else(|| self.missing(id))
    }

    /// Learns the path of a cgroup that is being made: the kernel tells of it a moment before its
    /// directory can be opened (`cgroup_mkdir` in `kernel/cgroup/cgroup.c`), so that none says
    /// nothing of later.
    pub fn learn(&mut self, id: CgroupId) -> Option<Arc<str>> {
        if let Some(Some(known)) = self.paths.get(&id) {
            return Some(Arc::clone(known));
        }
        let path = self.ask(id).ok().flatten()?;
        self.paths.insert(id, Some(Arc::clone(&path)));
        Some(path)
    }

    /// A cgroup that another table learned of.
    pub(super) fn made(&mut self, id: CgroupId, path: Arc<str>) {
        self.paths.insert(id, Some(path));
    }

    fn missing(&self, id: CgroupId) -> Error {
        match &self.mount {
            Some(mount) if !mount.whole => Error::Outside(id),
            _ => Error::Gone(id),
        }
    }

    /// Asks the kernel for the directory of a cgroup; `None` if there is none any more, or none
    /// below the mount.
    fn ask(&mut self, id: CgroupId) -> Result<Option<Arc<str>>, Refused> {
        let (Some(root), Some(mount)) = (&self.root, &self.mount) else {
            return Err(Refused::Always);
        };
        self.stats.asked += 1;
        let directory = match open_by_id(root, id) {
            Ok(directory) => directory,
            Err(error) => {
                return match error.raw_os_error() {
                    Some(libc::ESTALE | libc::ENOENT) => Ok(None),
                    Some(libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::EINTR) => {
                        Err(Refused::Now)
                    }
                    _ => Err(Refused::Always),
                };
            }
        };
        let link = fs::read_link(format!("/proc/self/fd/{}", directory.as_raw_fd()));
        let path = link.map_err(|_| Refused::Now)?.into_os_string().into_vec();
        // Removed since it was opened: the path is still its.
        let path = path.strip_suffix(b" (deleted)").unwrap_or(&path);
        Ok(mount.relative(Path::new(std::ffi::OsStr::from_bytes(path))))
    }

    /// Learns all cgroups there are now.
    fn walk(&mut self) {
        let Some(mount) = &self.mount else { return };
        let start = Instant::now();
        let (found, skipped) = walk(&mount.point, MAX_WALK);
        // The outer ones last, so that they are the last to be forgotten.
        for (id, path) in found.iter().rev() {
            if let Some(path) = mount.relative(path) {
                self.paths.insert(*id, Some(path));
            }
        }
        let took = start.elapsed();
        self.next_walk = Some(start + took + WALK_INTERVAL.max(took * WALK_PAUSE));
        self.stats.walks += 1;
        self.stats.skipped += skipped;
    }
}

impl Default for Cgroups {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether asking the kernel for an ID makes sense again.
enum Refused {
    Now,
    Always,
}

/// Opens the directory of a cgroup by its ID (open_by_handle_at(2)).
fn open_by_id(root: &File, id: CgroupId) -> io::Result<OwnedFd> {
    /// `struct file_handle` with the 8 bytes of `FILEID_KERNFS`.
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        id: u64,
    }
    const FILEID_KERNFS: i32 = 0xfe;
    let mut handle = Handle { bytes: 8, kind: FILEID_KERNFS, id: id.0 };
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the handle is laid out as the kernel expects it and outlives the call; `root` is open.
    let fd = unsafe {
        libc::syscall(libc::SYS_open_by_handle_at, root.as_raw_fd(), &raw mut handle, flags)
    };
    match i32::try_from(fd) {
        // SAFETY: the kernel just gave this descriptor to nobody else.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The directory and all below it, the outer ones first, at most `limit`; and how many directories
/// were left out. Follows no symbolic link. One that is removed meanwhile is not there.
fn walk(top: &Path, limit: usize) -> (Vec<(CgroupId, PathBuf)>, u64) {
    let mut found = Vec::new();
    let mut skipped = 0;
    let mut queue = VecDeque::new();
    if let Ok(meta) = fs::symlink_metadata(top) {
        found.push((CgroupId(meta.ino()), top.to_owned()));
        queue.push_back(top.to_owned());
    }
    while let Some(directory) = queue.pop_front() {
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) => {
                skipped += u64::from(error.kind() != io::ErrorKind::NotFound);
                continue;
            }
        };
        for entry in entries.flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            if found.len() >= limit {
                skipped += 1;
                continue;
            }
            found.push((CgroupId(entry.ino()), entry.path()));
            queue.push_back(entry.path());
        }
    }
    (found, skipped)
}

/// The cgroup at `path` and all below it, the outer ones first; at most `limit`. The path is one of
/// the file system (`/sys/fs/cgroup/system.slice`) or one below the cgroup2 mount
/// (`/system.slice`, `system.slice`).
///
/// # Errors
/// [`Error::NoMount`], [`Error::NoSuchCgroup`], or [`Error::TooMany`].
pub fn descendants(path: &Path, limit: usize) -> Result<Vec<CgroupId>, Error> {
    let mount = Mount::find()?;
    let looked_for = if path.starts_with(&mount.point) {
        path.to_owned()
    } else {
        mount.point.join(path.strip_prefix("/").unwrap_or(path))
    };
    let no = |reason: &str| Error::NoSuchCgroup {
        path: looked_for.clone(),
        mount: mount.point.clone(),
        reason: reason.to_owned(),
    };
    if looked_for.components().any(|part| part == Component::ParentDir) {
        return Err(no("\"..\" leads out of it"));
    }
    let found = fs::symlink_metadata(&looked_for).map_err(|error| {
        if path.starts_with("/sys/fs/cgroup") && path.exists() {
            no(&format!("{} is in a cgroup v1 hierarchy", path.display()))
        } else {
            no(&error.to_string())
        }
    })?;
    if !found.is_dir() || !is_cgroup2(&looked_for) {
        return Err(no("it is no directory of cgroup2"));
    }
    let (found, skipped) = walk(&looked_for, limit);
    match skipped {
        0 => Ok(found.into_iter().map(|(id, _)| id).collect()),
        _ if found.len() >= limit => Err(Error::TooMany { path: looked_for, limit }),
        _ => Err(no(&format!("{skipped} directories below it cannot be read"))),
    }
}

#[cfg(test)]
#[path = "cgroups_tests.rs"]
mod tests;
