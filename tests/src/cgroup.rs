//! A cgroup of the test's own, in the cgroup2 hierarchy.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write as _},
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{self, Command},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::wait_for;

/// A cgroup that is removed when dropped, with all that runs in it.
#[derive(Debug)]
pub struct Cgroup {
    mount: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    /// Makes a cgroup under the root of cgroup2; `name` may have slashes, for cgroups in cgroups.
    ///
    /// The first part of the name gets this process's ID, so that tests never share one.
    ///
    /// # Errors
    /// When no cgroup2 is mounted, or it cannot be written.
    pub fn new(name: &str) -> Result<Self> {
        let mount = mount_point()?;
        let (first, rest) = name.split_once('/').unwrap_or((name, ""));
        let path = mount.join(format!("{first}-{}", process::id())).join(rest);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self { mount, path })
    }

    /// The path as `/proc/PID/cgroup` shows it: from the root of the hierarchy.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new("/").join(self.path.strip_prefix(&self.mount).unwrap_or(&self.path))
    }

    /// The ID that `bpf_get_current_cgroup_id` gives for a task in it.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn id(&self) -> Result<u64> {
        // kernfs: on 64-bit machines the inode number is the node's ID.
        Ok(fs::metadata(&self.path)?.ino())
    }

    /// CPU time that was used inside.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat = fs::read_to_string(self.path.join("cpu.stat"))?;
        let used = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok());
        Ok(Duration::from_micros(used.context("cpu.stat without usage_usec")?))
    }

    /// The processes inside.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let pids = fs::read_to_string(self.path.join("cgroup.procs"))?;
        pids.lines().map(|pid| Ok(pid.parse()?)).collect()
    }

    /// Makes the command start inside.
    ///
    /// # Errors
    /// When the cgroup cannot be entered.
    pub fn enter(&self, command: &mut Command) -> Result<()> {
        let procs = self.path.join("cgroup.procs");
        let mut procs = File::options()
            .write(true)
            .open(&procs)
            .with_context(|| format!("open {}", procs.display()))?;
        // SAFETY: between fork and exec it only calls write(2), which is async-signal-safe.
        unsafe {
            // 0 is the process that writes.
            command.pre_exec(move || procs.write_all(b"0"));
        }
        Ok(())
    }

    fn remove(&self) -> Result<()> {
        // Where the file is missing (before 5.14), only empty cgroups can be removed.
        drop(fs::write(self.path.join("cgroup.kill"), "1"));
        // Busy until the kernel has let go of what was killed.
        wait_for("a cgroup to be empty", Duration::from_secs(10), || {
            match fs::remove_dir(&self.path) {
                Err(error) if error.kind() != ErrorKind::NotFound => Ok(None),
                _ => Ok(Some(())),
            }
        })
        .with_context(|| format!("remove {}", self.path.display()))?;
        // Those above it, up to one that holds another test's cgroup or is not of this kind.
        let above = self.path.ancestors().skip(1).take_while(|path| **path != self.mount);
        above.take_while(|path| fs::remove_dir(path).is_ok()).for_each(drop);
        Ok(())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("left behind: {error:#}");
        }
    }
}

/// Where cgroup2 is mounted: `/sys/fs/cgroup`, or below it next to the hierarchies of v1.
fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?;
    let mount = mounts.lines().find_map(|line| {
        // The type is the first word after the dash, the mount point the fifth before it.
        let (before, after) = line.split_once(" - ")?;
        (after.split(' ').next()? == "cgroup2").then(|| before.split(' ').nth(4))?
    });
    Ok(mount.context("no cgroup2 is mounted")?.into())
}
