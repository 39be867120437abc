//! What `/proc` says about a process while it is alive: its cgroups in every hierarchy, and whether
//! it is a thread of the kernel.
//!
//! Not for its mappings or its executable, which the symbols stage reads.

use std::{fs::File, io::Read, os::fd::AsRawFd};

use super::{cgroups::cut, path};
use crate::event::ProcessKey;

/// Bytes read of one file at most. A line of `cgroup` has a path; a machine has about 15 lines.
const MAX_FILE: u64 = 64 * 1024;

/// `PF_KTHREAD` in `include/linux/sched.h`.
const PF_KTHREAD: u64 = 0x0020_0000;

/// Nanoseconds in a clock tick as `/proc` counts: `USER_HZ` is 100 on every architecture that runs
/// BPF programs (`include/asm-generic/param.h`).
const TICK_NS: u64 = 10_000_000;

/// What there is to know of a process besides its mappings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// It runs in the kernel only.
    pub(super) kernel_thread: bool,
    /// Its paths.
    pub(super) cgroups: Paths,
}

/// A process's paths in the cgroup hierarchies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Paths {
    /// In cgroup2; empty if there is none.
    pub(super) unified: String,
    /// The one of all hierarchies that says most.
    pub(super) telling: String,
}

/// Reads the facts of exactly this process; `None` if it is gone, or if its start is unknown, as
/// it could be another of the same PID then.
#[must_use]
pub fn read(process: ProcessKey) -> Option<Facts> {
    if process.pid == 0 || process.start_ns == 0 {
        return None;
    }
    // An open directory stays the one of this process, so that nothing read through it can be of
    // a later one.
    let directory = File::open(format!("/proc/{}", process.pid)).ok()?;
    let file = |name| contents(&format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()));
    let (flags, start_ticks) = flags_and_start(&file("stat")?)?;
    if start_ticks != process.start_ns / TICK_NS {
        return None;
    }
    let cgroups = paths(&String::from_utf8_lossy(&file("cgroup")?));
    Some(Facts { kernel_thread: flags & PF_KTHREAD != 0, cgroups })
}

fn contents(path: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_FILE).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Fields 9 (flags) and 22 (start in clock ticks) of `/proc/PID/stat` (proc_pid_stat(5)). The name
/// in field 2 can hold anything but ends at the last parenthesis.
fn flags_and_start(stat: &[u8]) -> Option<(u64, u64)> {
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let mut fields = std::str::from_utf8(stat.get(end + 1..)?).ok()?.split_ascii_whitespace();
    let flags = fields.nth(9 - 3)?.parse().ok()?;
    let start = fields.nth(22 - 9 - 1)?.parse().ok()?;
    Some((flags, start))
}

/// The paths in `/proc/PID/cgroup` (cgroups(7)): `hierarchy:controllers:path` a line. Of two that
/// say as much, cgroup2's counts, then systemd's.
fn paths(text: &str) -> Paths {
    let mut found = Paths::default();
    let mut best = (0, 0);
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let path = cut(path.strip_suffix(" (deleted)").unwrap_or(path));
        let trust = match controllers {
            "" => 3,
            "name=systemd" => 2,
            _ => 1,
        };
        if controllers.is_empty() {
            found.unified = path.to_owned();
        }
        let says = says(&path::parse(path));
        if says > 0 && (says, trust) > best {
            best = (says, trust);
            found.telling = path.to_owned();
        }
    }
    found
}

/// How much a path says.
fn says(name: &path::CgroupName<'_>) -> u32 {
    match (&name.pod_uid, name.container_id, name.unit) {
        (Some(_), Some(_), _) => 4,
        (Some(_), None, _) => 3,
        (None, Some(_), _) => 2,
        (None, None, Some(_)) => 1,
        (None, None, None) => 0,
    }
}

/// The key of a living process, its start rounded down to a tick.
#[cfg(test)]
pub(super) fn key_of(pid: u32) -> Option<ProcessKey> {
    let (_, ticks) = flags_and_start(&contents(&format!("/proc/{pid}/stat"))?)?;
    Some(ProcessKey { pid, start_ns: ticks * TICK_NS, exec_id: 0 })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn stat_with_a_hostile_name() {
        let stat = b"42 (a) R 1 (b)) S 2 42 42 0 -1 2129984 0 0 0 0 1 2 3 4 20 0 1 0 777 0 0\n";
        assert_eq!(flags_and_start(stat), Some((2_129_984, 777)));
        for short in [&b""[..], b"42", b"42 (x", b"42 (x)", b"42 (x) S 1", b"42 (x) \xff\xff"] {
            assert_eq!(flags_and_start(short), None);
        }
    }

    fn check(text: &str, unified: &str, telling: &str) {
        let expected = Paths { unified: unified.to_owned(), telling: telling.to_owned() };
        assert_eq!(paths(text), expected, "{text:?}");
    }

    #[test]
    fn the_path_that_says_most() {
        let pod = "kubepods/pod8f6b2f0a-5a43-4c0b-9a3e-0d2f6c1b7e55";
        check("0::/system.slice/a.service\n", "/system.slice/a.service", "/system.slice/a.service");
        check(&format!("9:pids:/{pod}\n0::/\n"), "/", &format!("/{pod}"));
        check(&format!("9:pids:/\n0::/{pod} (deleted)\n"), &format!("/{pod}"), &format!("/{pod}"));
        check(
            "12:cpu,cpuacct:/b.service\n1:name=systemd:/system.slice/a:b.service\n0::/\n",
            "/",
            "/system.slice/a:b.service",
        );
        check("1:cpu:/x\n0::/\n", "/", "");
        check("\n1\n1:cpu\n::\n", "", "");
    }

    #[test]
    fn itself_but_no_other_of_its_pid() {
        let me = key_of(std::process::id()).unwrap();
        let facts = read(me).unwrap();
        assert!(!facts.kernel_thread);
        assert_eq!(read(ProcessKey { start_ns: me.start_ns + TICK_NS - 1, ..me }), Some(facts));
        assert_eq!(read(ProcessKey { start_ns: me.start_ns + TICK_NS, ..me }), None);
        assert_eq!(read(ProcessKey { start_ns: 0, ..me }), None);
    }
}
