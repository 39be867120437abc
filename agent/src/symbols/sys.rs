//! Opening files that a profiled process may have chosen: regular files only, and never through a
//! link that leads out of the process's own root.
//!
//! A file is first opened with `O_PATH`, which runs no driver and waits for nobody, and then, once
//! it is known to be regular, for reading. So a FIFO cannot block the agent and a device is not
//! touched.

use std::{
    ffi::{CString, OsStr},
    fs::{File, Metadata},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileTypeExt, fs::OpenOptionsExt},
    },
    path::Path,
};

/// `RESOLVE_IN_ROOT`: absolute paths and links start at the directory (openat2(2)).
pub(super) const IN_ROOT: u64 = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
/// As [`IN_ROOT`], and no component may be a symbolic link.
pub(super) const IN_ROOT_NO_LINKS: u64 = IN_ROOT | libc::RESOLVE_NO_SYMLINKS;

/// `struct open_how` of `include/uapi/linux/openat2.h`.
#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

/// Opens `path` as a handle (`O_PATH`), following links as the kernel does.
pub(super) fn handle(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path)
}

/// Opens `path` for reading if it is a regular file.
pub(super) fn open(path: &Path) -> io::Result<(File, Metadata)> {
    readable(&handle(path)?)
}

/// Opens `path` below `root` for reading if it is a regular file; `resolve` is [`IN_ROOT`] or
/// [`IN_ROOT_NO_LINKS`].
pub(super) fn open_at(root: &File, path: &OsStr, resolve: u64) -> io::Result<(File, Metadata)> {
    let path = CString::new(path.as_bytes())?;
    let how = OpenHow {
        flags: (libc::O_PATH | libc::O_CLOEXEC).cast_unsigned().into(),
        mode: 0,
        resolve,
    };
    // SAFETY: the path is NUL-terminated, `how` is a complete `open_how` of the size given, and
    // both outlive the call; the directory is open.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            root.as_raw_fd(),
            path.as_ptr(),
            &raw const how,
            size_of::<OpenHow>(),
        )
    };
    let fd = i32::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above returned this descriptor, and nothing else owns it.
    let handle = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    readable(&handle)
}

/// Turns a handle into a file that can be read, if it is a regular one.
fn readable(handle: &File) -> io::Result<(File, Metadata)> {
    let metadata = handle.metadata()?;
    let kind = metadata.file_type();
    if !kind.is_file() {
        let what = match () {
            () if kind.is_fifo() => "a FIFO",
            () if kind.is_dir() => "a directory",
            () => "no regular file",
        };
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC)
        .open(below(handle.as_fd(), ""))?;
    Ok((file, metadata))
}

/// The path of what a descriptor refers to, or of a file below it.
pub(super) fn below(fd: BorrowedFd<'_>, name: &str) -> String {
    format!("/proc/self/fd/{}{name}", fd.as_raw_fd())
}

/// A file in memory with these bytes.
pub(super) fn memory_file(bytes: &[u8]) -> io::Result<File> {
    // SAFETY: the name is NUL-terminated and outlives the call.
    let fd = unsafe { libc::memfd_create(c"podflame-vdso".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above returned this descriptor, and nothing else owns it.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    io::Write::write_all(&mut file, bytes)?;
    Ok(file)
}

/// Clock ticks in a second, the unit of times in `/proc/PID/stat`.
pub(super) fn ticks_per_second() -> u64 {
    // SAFETY: it takes no pointer and changes nothing.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    u64::try_from(ticks).unwrap_or(100).max(1)
}

/// Returns freed memory to the kernel. Parsed DWARF is many small pieces, of which the allocator
/// would keep the pages.
pub(super) fn give_back_memory() {
    // SAFETY: it touches free memory only.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}
