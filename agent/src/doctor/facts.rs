//! The state of this machine, as far as it decides about signals: read, and never changed.

use std::{
    fs, io,
    os::fd::{FromRawFd, OwnedFd},
    path::Path,
};

use crate::attribute::cgroups::Mount;

/// A kernel's version: major, minor, patch.
pub type Version = (u32, u32, u32);

/// The tracepoints that signals hook, as BTF has them.
pub(super) const TRACEPOINTS: [&str; 3] =
    ["tcp_retransmit_skb", "tcp_retransmit_synack", "sock_send_length"];

/// What the kernel forbids even to root (kernel_lockdown(7)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lockdown {
    /// The mode in force: `none`, `integrity`, `confidentiality`.
    Mode(String),
    /// The kernel has no lockdown.
    Absent,
    /// It cannot be seen, because securityfs is not mounted or not readable.
    Unknown,
}

/// Everything that [`super::report`] goes by. `None` in a setting: it cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// As `uname -r` shows it.
    pub release: String,
    /// Version of the sources, which a distribution's release may hide; `None` if not understood.
    pub version: Option<Version>,
    /// Why `/sys/kernel/btf/vmlinux` cannot be read; `None` if it can.
    pub btf_error: Option<String>,
    /// Lockdown.
    pub lockdown: Lockdown,
    /// Effective capabilities, by bit.
    pub capabilities: u64,
    /// `kernel.perf_event_paranoid`.
    pub perf_event_paranoid: Option<i64>,
    /// `kernel.kptr_restrict`.
    pub kptr_restrict: Option<i64>,
    /// `kernel.unprivileged_bpf_disabled`.
    pub unprivileged_bpf_disabled: Option<i64>,
    /// `kernel.perf_event_max_sample_rate`, in Hz.
    pub max_sample_rate: Option<i64>,
    /// `net.core.bpf_jit_enable`.
    pub bpf_jit: Option<i64>,
    /// `errno` of `perf_event_open` for `cpu-clock`, minor and major faults; 0 where it works.
    pub perf_events: [i32; 3],
    /// Whether the tracepoints `tcp_retransmit_skb`, `tcp_retransmit_synack`, `sock_send_length` are
    /// there, in that order; `None` where it cannot be known.
    pub tracepoints: [Option<bool>; 3],
    /// Where cgroup2 is mounted.
    pub cgroup2: Option<Mount>,
    /// CPUs online, as ranges (`0-3,8`).
    pub cpus: String,
}

impl Facts {
    /// Looks at this machine. `has_tracepoint` says whether the kernel's BTF has a tracepoint of
    /// that name; `None` if there is no BTF to ask.
    #[must_use]
    pub fn gather(has_tracepoint: impl Fn(&str) -> Option<bool>) -> Self {
        let release = line("/proc/sys/kernel/osrelease");
        let version = line("/proc/sys/kernel/version");
        let signature = line("/proc/version_signature");
        let cpus = line("/sys/devices/system/cpu/online");
        let cpu = cpus.split([',', '-']).next().and_then(|first| first.parse().ok()).unwrap_or(0);
        let btf = fs::File::open("/sys/kernel/btf/vmlinux");
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        // PERF_COUNT_SW_CPU_CLOCK, _PAGE_FAULTS_MIN, _PAGE_FAULTS_MAJ.
        let perf_events = [0, 5, 6].map(|event| open_event(event, cpu));
        Self {
            version: source_version(&release, &version, &signature),
            btf_error: btf.err().map(|error| error.to_string()),
            lockdown: lockdown(),
            capabilities: effective(&status),
            perf_event_paranoid: number("/proc/sys/kernel/perf_event_paranoid"),
            kptr_restrict: number("/proc/sys/kernel/kptr_restrict"),
            unprivileged_bpf_disabled: number("/proc/sys/kernel/unprivileged_bpf_disabled"),
            max_sample_rate: number("/proc/sys/kernel/perf_event_max_sample_rate"),
            bpf_jit: number("/proc/sys/net/core/bpf_jit_enable"),
            perf_events,
            tracepoints: TRACEPOINTS.map(has_tracepoint),
            cgroup2: Mount::find().ok(),
            cpus,
            release,
        }
    }
}

/// The text of a file without the space around it; empty if it cannot be read.
fn line(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn number(path: &str) -> Option<i64> {
    line(path).parse().ok()
}

/// The version that a kernel was built from. Debian's release names the first version of a series
/// and the build line names the real one; so does Ubuntu's signature.
pub(super) fn source_version(release: &str, build: &str, signature: &str) -> Option<Version> {
    let debian = build.split_once("Debian ").map(|(_, rest)| rest);
    let ubuntu = signature.starts_with("Ubuntu").then(|| signature.rsplit(' ').next()).flatten();
    [ubuntu, debian, Some(release)].into_iter().flatten().find_map(version)
}

fn version(text: &str) -> Option<Version> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let mut numbers = text.get(..end)?.split('.').map(|part| part.parse().ok());
    Some((numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)))
}

fn lockdown() -> Lockdown {
    match fs::read_to_string("/sys/kernel/security/lockdown") {
        Ok(text) => text
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'))
            .map_or(Lockdown::Unknown, |(mode, _)| Lockdown::Mode(mode.to_owned())),
        // securityfs always has `lsm`.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                && Path::new("/sys/kernel/security/lsm").exists() =>
        {
            Lockdown::Absent
        }
        Err(_) => Lockdown::Unknown,
    }
}

/// The effective capabilities in the text of `/proc/PID/status`.
pub(super) fn effective(status: &str) -> u64 {
    let value = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    value.and_then(|value| u64::from_str_radix(value.trim(), 16).ok()).unwrap_or(0)
}

/// Opens a software event on a CPU, for all tasks, as the probes do, and closes it; its `errno`.
fn open_event(config: u64, cpu: i32) -> i32 {
    /// The first version of `struct perf_event_attr` (`include/uapi/linux/perf_event.h`).
    #[repr(C)]
    struct Attributes {
        kind: u32,
        size: u32,
        config: u64,
        sample_period: u64,
        rest: [u64; 5],
    }
    const PERF_TYPE_SOFTWARE: u32 = 1;
    const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 1 << 3;
    let attributes = Attributes {
        kind: PERF_TYPE_SOFTWARE,
        size: 64,
        config,
        sample_period: u64::from(u32::MAX),
        rest: [0; 5],
    };
    const { assert!(size_of::<Attributes>() == 64) };
    // SAFETY: the attributes are laid out as their size says and outlive the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            -1,
            cpu,
            -1,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    match i32::try_from(fd) {
        Ok(fd) if fd >= 0 => {
            // SAFETY: the kernel just gave this descriptor to nobody else.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            0
        }
        _ => io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
    }
}
