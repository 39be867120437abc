//! Which part of the node a command looks at: the options `--pid` and `--cgroup`.

use std::path::{Path, PathBuf};

use anyhow::bail;

use crate::{
    attribute::cgroups,
    kernel::{Filter, MAX_CGROUPS},
    pipeline::CgroupFinder,
};

/// What to keep; the rest is filtered in the kernel.
#[derive(Clone, Debug, Default, clap::Args)]
// Every group of arguments has a name of its own.
#[group(id = "filter")]
pub struct Args {
    /// Only this process, by its PID on this node; a retransmit is its own once its sender is known
    #[arg(long, value_name = "PID", conflicts_with = "cgroup", value_parser = clap::value_parser!(u32).range(1..))]
    pub pid: Option<u32>,

    /// Only this cgroup (v2) and those below it; a path below its mount, or a full one
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<PathBuf>,
}

impl Args {
    /// The filter, and what keeps it up to date.
    ///
    /// # Errors
    ///
    /// If there is no such process or cgroup.
    pub fn resolve(&self) -> anyhow::Result<(Filter, Option<CgroupFinder>)> {
        if let Some(pid) = self.pid
            && !Path::new(&format!("/proc/{pid}")).exists()
        {
            bail!("no process has PID {pid} on this node (it may have exited; see `ps -e`)");
        }
        let Some(path) = self.cgroup.clone() else {
            return Ok((Filter { cgroups: None, pid: self.pid }, None));
        };
        let cgroups = cgroups::descendants(&path, MAX_CGROUPS)?;
        let mut last = cgroups.clone();
        let find: CgroupFinder = Box::new(move || {
            // When the cgroup is gone, its last events may still come.
            if let Ok(now) = cgroups::descendants(&path, MAX_CGROUPS) {
                last = now;
            }
            last.clone()
        });
        Ok((Filter { cgroups: Some(cgroups), pid: None }, Some(find)))
    }

    /// What is kept, in words; `None` for all.
    #[must_use]
    pub fn describe(&self) -> Option<String> {
        self.pid
            .map(|pid| format!("process {pid}"))
            .or_else(|| self.cgroup.as_ref().map(|path| format!("cgroup {}", path.display())))
    }
}
