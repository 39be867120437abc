//! Touches memory that is not there yet.
//!
//! `faults [--seconds N] [--count N]`: maps anonymous memory, touches each page once in
//! `touch_pages`, gives the pages back, and again; ends after `--count` pages. Each page is a minor fault.
//!
//! `faults --file PATH [--pages N] [--seconds N] [--count N]`: writes the file, maps it, drops it from
//! the page cache and touches each page once in `touch_file_pages`, and again. Each page is a major
//! fault where the file system keeps files on a device (not tmpfs).
//!
//! Ends with one line of JSON: the pages touched, and the faults of its life as the kernel counts them.

use std::{
    fs::File,
    hint::black_box,
    io::Write as _,
    os::fd::{AsRawFd as _, RawFd},
    path::PathBuf,
    ptr,
};

use anyhow::{Context as _, Result, bail};
use podflame_tests::load::{Load, option, ready};

/// Anonymous pages touched before they are given back: 16 MiB.
const PAGES: usize = 4096;

fn main() -> Result<()> {
    let load = Load::start()?;
    let count: u64 = option("--count", u64::MAX)?;
    let path: PathBuf = option("--file", PathBuf::new())?;
    let pages: usize = option("--pages", PAGES)?;
    let file = match path.as_os_str().is_empty() {
        true => None,
        false => Some(write_file(&path, pages)?),
    };
    let map = match &file {
        None => Mapping::new(pages, libc::MAP_ANONYMOUS, -1, libc::MADV_NOHUGEPAGE)?,
        // Without read-ahead, or one fault would bring in the pages around it.
        Some(file) => Mapping::new(pages, 0, file.as_raw_fd(), libc::MADV_RANDOM)?,
    };
    ready("")?;
    let mut touched = 0;
    while load.running() && touched < count {
        let left = usize::try_from(count - touched).unwrap_or(usize::MAX);
        let pages = pages.min(left);
        match &file {
            None => {
                black_box(touch_pages(&map, pages));
            }
            Some(file) => {
                // SAFETY: the descriptor is open; the call touches no memory.
                unsafe {
                    libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED);
                }
                black_box(touch_file_pages(&map, pages));
            }
        }
        map.give_back();
        touched += pages as u64;
    }
    let (minor, major) = faults_so_far()?;
    println!("{{\"pages\":{touched},\"minor\":{minor},\"major\":{major}}}");
    Ok(())
}

#[inline(never)]
fn touch_pages(map: &Mapping, pages: usize) -> usize {
    for page in 0..pages.min(map.pages) {
        // SAFETY: the page lies in the mapping, which can be written.
        unsafe { map.start.add(page * map.page_size).write_volatile(1) };
    }
    black_box(pages)
}

#[inline(never)]
fn touch_file_pages(map: &Mapping, pages: usize) -> u64 {
    let mut sum = 0;
    for page in 0..pages.min(map.pages) {
        // SAFETY: the page lies in the mapping, and in the file, which nobody truncates.
        sum += u64::from(unsafe { map.start.add(page * map.page_size).read_volatile() });
    }
    black_box(sum)
}

/// Memory that is given back when dropped, and stays where it is until then.
struct Mapping {
    start: *mut u8,
    pages: usize,
    page_size: usize,
}

impl Mapping {
    fn new(pages: usize, flags: libc::c_int, fd: RawFd, advice: libc::c_int) -> Result<Self> {
        let page_size = page_size()?;
        let length = pages * page_size;
        let access = libc::PROT_READ | if fd < 0 { libc::PROT_WRITE } else { 0 };
        // SAFETY: the kernel picks the place, so that nothing else is there.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), length, access, flags | libc::MAP_PRIVATE, fd, 0)
        };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).context("map memory");
        }
        // SAFETY: the range is the mapping. Kernels without huge pages refuse one of the advices.
        unsafe { libc::madvise(start, length, advice) };
        Ok(Self { start: start.cast(), pages, page_size })
    }

    /// Gives the pages back: the next access to each is a fault again.
    fn give_back(&self) {
        let length = self.pages * self.page_size;
        // SAFETY: the range is the mapping, and nothing relies on what it holds.
        unsafe { libc::madvise(self.start.cast(), length, libc::MADV_DONTNEED) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the mapping, and nothing points into it any more.
        unsafe { libc::munmap(self.start.cast(), self.pages * self.page_size) };
    }
}

fn write_file(path: &PathBuf, pages: usize) -> Result<File> {
    let mut options = File::options();
    let mut file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .with_context(|| format!("open {}", path.display()))?;
    file.write_all(&vec![1; pages * page_size()?])?;
    // Only clean pages can be dropped from the cache.
    file.sync_all().with_context(|| format!("write {}", path.display()))?;
    Ok(file)
}

fn page_size() -> Result<usize> {
    // SAFETY: sysconf touches no memory of ours.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).context("the page size")
}

/// Minor and major faults of this process.
fn faults_so_far() -> Result<(i64, i64)> {
    // SAFETY: an all-zero rusage is a valid one.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: it lives through the call.
    if unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) } != 0 {
        bail!("getrusage: {}", std::io::Error::last_os_error());
    }
    Ok((usage.ru_minflt, usage.ru_majflt))
}
