//! Writes a result to a file or to standard output, whole or not at all.
//!
//! A regular file is written beside its place and then renamed into it, so that no reader ever sees
//! half of it and a failure leaves what was there. A device or FIFO is written to directly. Survives
//! a crash of the program, not of the machine: nothing waits for the disk.

use std::{
    fs,
    io::{self, ErrorKind, Write as _},
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

/// Stands for standard output.
pub const STDOUT: &str = "-";

/// A file cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("write {}: {source}{}", path.display(), remedy(path, source))]
pub struct WriteError {
    /// The file.
    pub path: PathBuf,
    /// What the system says.
    pub source: io::Error,
}

/// What to do about an error, in parentheses; empty if the error says it all.
fn remedy(path: &Path, error: &io::Error) -> String {
    let directory = directory(path).display();
    match error.kind() {
        ErrorKind::NotFound => {
            format!(" (the directory {directory} does not exist: create it, or choose another)")
        }
        ErrorKind::NotADirectory => {
            format!(" ({directory} is not a directory: choose another)")
        }
        ErrorKind::IsADirectory => " (name a file in it)".to_owned(),
        ErrorKind::PermissionDenied => {
            format!(" (no permission to create files in {directory}: choose another directory)")
        }
        ErrorKind::ReadOnlyFilesystem => {
            format!(" ({directory} is mounted read-only: choose another directory)")
        }
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            format!(" (free some space in {directory}, or choose another directory)")
        }
        _ => String::new(),
    }
}

/// Where a file's name is kept.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => path,
    }
}

/// How a path can be written.
enum Target {
    Stdout,
    /// A device, FIFO or the like.
    Special,
    /// A regular file, there or not, by its path behind symbolic links.
    Regular(PathBuf),
}

fn target(path: &Path) -> io::Result<Target> {
    if path == Path::new(STDOUT) {
        return Ok(Target::Stdout);
    }
    if path.as_os_str().as_bytes().ends_with(b"/") {
        return Err(ErrorKind::IsADirectory.into());
    }
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => Err(ErrorKind::IsADirectory.into()),
        Ok(found) if found.is_file() => fs::canonicalize(path).map(Target::Regular),
        Ok(_) => Ok(Target::Special),
        Err(error) if error.kind() == ErrorKind::NotFound && path.file_name().is_some() => {
            Ok(Target::Regular(path.to_owned()))
        }
        Err(error) => Err(error),
    }
}

/// A file beside the target, that vanishes unless it is renamed. Its permissions are those of any
/// new file of ours: 0644 without the umask.
fn beside(target: &Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new()
        .prefix(".podflame-")
        .permissions(fs::Permissions::from_mode(0o644))
        .tempfile_in(directory(target))
        // The library's error names its own temporary file, which nobody asked for.
        .map_err(|error| match error.raw_os_error() {
            Some(code) => io::Error::from_raw_os_error(code),
            None => error.kind().into(),
        })
}

/// Finds out, before long work, that [`write`] would fail. Leaves nothing behind.
///
/// # Errors
/// As [`write`], but for what only time can tell (a full disk).
pub fn check_writable(path: &Path) -> Result<(), WriteError> {
    let check = || match target(path)? {
        Target::Regular(file) => beside(&file).map(drop),
        // Opening a FIFO would wait for its reader.
        Target::Stdout | Target::Special => Ok(()),
    };
    check().map_err(|source| WriteError { path: path.to_owned(), source })
}

/// Writes a file, or standard output for `-`. A reader of standard output that has seen enough and
/// went away is no error.
///
/// # Errors
/// The file, the cause and the remedy. What was at `path` before is then still there.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), WriteError> {
    let write = || match target(path)? {
        Target::Stdout => {
            let mut out = io::stdout().lock();
            match out.write_all(bytes).and_then(|()| out.flush()) {
                Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
                result => result,
            }
        }
        Target::Special => fs::OpenOptions::new().write(true).open(path)?.write_all(bytes),
        Target::Regular(file) => {
            let mut temporary = beside(&file)?;
            temporary.write_all(bytes)?;
            temporary.persist(&file).map(drop).map_err(|error| error.error)
        }
    };
    write().map_err(|source| WriteError { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests;
