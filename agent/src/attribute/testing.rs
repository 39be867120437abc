//! Cgroups and processes of the running kernel, for the tests of this module.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::{
    fs,
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use super::{
    cgroups::{Mount, cgroup2_mounts},
    process::key_of,
};
use crate::event::{CgroupId, ProcessKey};

/// Where a test can make cgroups (v2). Without root there is none, which CI does not accept.
pub(super) fn mount() -> Option<Mount> {
    // SAFETY: has no conditions.
    let root = unsafe { libc::geteuid() } == 0;
    let mount = Mount::find().ok().filter(|_| root);
    if mount.is_none() {
        let reason = "needs root and a cgroup2 mount";
        assert!(std::env::var_os("CI").is_none(), "{reason}");
        eprintln!("not run: {reason}");
    }
    mount
}

/// Where cgroup v1's `pids` is mounted, if it is: right beside cgroup2, as on hybrid machines.
pub(super) fn v1_mount() -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let as_v2: String = text
        .lines()
        .filter(|line| line.contains(" - cgroup ") && line.ends_with("pids"))
        .map(|line| line.replace(" - cgroup ", " - cgroup2 ") + "\n")
        .collect();
    cgroup2_mounts(as_v2.as_bytes()).into_iter().next()
}

/// A cgroup with a name of its own, removed with all below it when dropped.
pub(super) struct TestCgroup(PathBuf);

impl TestCgroup {
    pub(super) fn new(mount: &Path) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = mount.join(format!("podflame-unit-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Makes a cgroup below.
    pub(super) fn make(&self, below: &str) -> (PathBuf, CgroupId) {
        let path = self.0.join(below);
        fs::create_dir_all(&path).unwrap();
        let id = CgroupId(fs::metadata(&path).unwrap().ino());
        (path, id)
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        fn remove(path: &Path) {
            for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    remove(&entry.path());
                }
            }
            if let Err(error) = fs::remove_dir(path)
                && !std::thread::panicking()
            {
                panic!("remove {}: {error}", path.display());
            }
        }
        remove(&self.0);
    }
}

/// A process that waits for its standard input to end.
pub(super) struct Waiting(Child);

impl Waiting {
    pub(super) fn start() -> Self {
        let (i, o) = (Stdio::piped(), Stdio::null());
        Self(Command::new("cat").stdin(i).stdout(o).spawn().unwrap())
    }

    pub(super) fn key(&self) -> ProcessKey {
        key_of(self.0.id()).unwrap()
    }

    /// Moves it into a cgroup of any version.
    pub(super) fn enter(&self, cgroup: &Path) {
        let mut procs =
            fs::OpenOptions::new().write(true).open(cgroup.join("cgroup.procs")).unwrap();
        procs.write_all(self.0.id().to_string().as_bytes()).unwrap();
    }

    /// Ends it and waits until it is gone.
    pub(super) fn end(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        drop(self.0.stdin.take());
        let _status = self.0.wait().unwrap();
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.stop();
    }
}
