//! Against a directory of its own.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::os::unix::fs::{FileTypeExt as _, symlink};

use super::*;

/// What is in a directory.
fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_file_is_made_and_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out.svg");
    check_writable(&path).unwrap();
    assert!(names(directory.path()).is_empty(), "the check leaves nothing");
    for text in ["first", "second"] {
        write(&path, text.as_bytes()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
    check_writable(&path).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "second");
    assert_eq!(names(directory.path()), ["out.svg"]);
    let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode & !0o644, 0, "{mode:o}");
    assert_eq!(mode & 0o600, 0o600, "{mode:o}");
}

#[test]
fn a_link_stays_a_link() {
    let directory = tempfile::tempdir().unwrap();
    let [file, link] = ["file", "link"].map(|name| directory.path().join(name));
    fs::write(&file, "old").unwrap();
    symlink(&file, &link).unwrap();
    write(&link, b"new").unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(fs::read_to_string(&file).unwrap(), "new");
}

#[test]
fn a_device_is_written_to_and_not_replaced() {
    let null = Path::new("/dev/null");
    check_writable(null).unwrap();
    write(null, b"gone").unwrap();
    assert!(fs::metadata(null).unwrap().file_type().is_char_device());
}

#[test]
fn errors_name_path_cause_and_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "kept").unwrap();
    let cases = [
        (directory.path().join("missing/out.svg"), "does not exist: create it"),
        (directory.path().to_owned(), "name a file in it"),
        (directory.path().join("new/"), "name a file in it"),
        (file.join("out.svg"), "is not a directory: choose another"),
        // Not even root creates files there.
        (PathBuf::from("/proc/out.svg"), "/proc"),
    ];
    for (path, remedy) in cases {
        for error in [check_writable(&path).unwrap_err(), write(&path, b"x").unwrap_err()] {
            let text = error.to_string();
            assert!(text.starts_with(&format!("write {}: ", path.display())), "{text}");
            assert!(text.contains(remedy), "{text}");
        }
    }
    assert_eq!(names(directory.path()), ["file"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "kept");
}

#[test]
fn every_cause_with_a_remedy_names_the_directory() {
    let causes = [
        (libc::EACCES, "no permission"),
        (libc::EROFS, "read-only"),
        (libc::ENOSPC, "free some space"),
        (libc::EDQUOT, "free some space"),
    ];
    for (code, remedy) in causes {
        let source = io::Error::from_raw_os_error(code);
        let text = WriteError { path: "/srv/out/a.svg".into(), source }.to_string();
        assert!(text.contains(remedy) && text.contains(" /srv/out"), "{text}");
    }
}
