//! Where baselines are kept between two runs of the agent: one file, written whole or not at all.
//!
//! The only I/O of the correlation. What is in the file is the business of [`crate::correlate`].

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
};

use crate::correlate::{self, Baselines, MAX_BYTES};

/// Baselines that cannot be kept or found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read or written.
    #[error("{action} baselines in {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file holds something else.
    #[error("read baselines in {}: {source} (remove the file to begin anew)", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: correlate::Error,
    },
}

/// Reads them; `None` if there is no file.
///
/// # Errors
/// If the file cannot be read, is too long, or holds something else.
pub fn load(path: &Path) -> Result<Option<Baselines>, Error> {
    let failed = |source| Error::File { action: "read", path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    // One byte more shows that it is too long, which is refused below.
    file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    let content = |source| Error::Content { path: path.to_owned(), source };
    correlate::decode(&bytes).map(Some).map_err(content)
}

/// Writes them beside the file, and then takes its place: whoever reads it, also after a crash, finds
/// the old ones or the new ones. The file is readable by its owner only, as it holds names.
///
/// # Errors
/// If the directory does not exist, or cannot be written to, or is full. The file is as before then.
pub fn save(path: &Path, baselines: &Baselines) -> Result<(), Error> {
    let failed = |source| Error::File { action: "write", path: path.to_owned(), source };
    let content = |source| Error::Content { path: path.to_owned(), source };
    let bytes = correlate::encode(baselines).map_err(content)?;
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failed)?;
    file.write_all(&bytes).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|e| failed(e.error))?;
    // The name is in the directory, which has to reach the disk as well.
    File::open(directory).and_then(|d| d.sync_all()).map_err(failed)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;
    use crate::correlate::Correlator;

    fn some(taken_unix_s: u64) -> Baselines {
        Correlator::new(Baselines::default()).baselines(taken_unix_s)
    }

    #[test]
    fn what_is_saved_is_found_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("baselines.json");
        assert_eq!(load(&path).unwrap(), None);
        for taken in [1, 2] {
            save(&path, &some(taken)).unwrap();
            assert_eq!(load(&path).unwrap(), Some(some(taken)));
        }
        let names = fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(names, 1, "nothing is left beside the file");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_cannot_be_is_an_error_that_names_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("baselines.json");
        fs::write(&path, "{\"version\":1,").unwrap();
        let error = load(&path).unwrap_err().to_string();
        assert!(error.contains("baselines.json") && error.contains("remove the file"), "{error}");
        let huge = File::create(&path).unwrap();
        huge.set_len(1 << 40).unwrap();
        assert!(load(&path).unwrap_err().to_string().contains("more than"));
        assert!(load(directory.path()).is_err(), "a directory");
        let error = save(&directory.path().join("none/b.json"), &some(1)).unwrap_err();
        assert!(error.to_string().contains("write baselines"), "{error}");
    }

    #[test]
    fn a_failed_write_leaves_the_old_ones() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("baselines.json");
        fs::create_dir(&path).unwrap();
        assert!(save(&path, &some(1)).is_err(), "its place is taken by a directory");
        assert!(path.is_dir());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
