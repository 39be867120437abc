//! Perf events: one per CPU, with a BPF program on it. See `perf_event_open(2)`.

use std::{
    fs, io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use aya_obj::generated::{
    PERF_FLAG_FD_CLOEXEC, perf_event_attr, perf_sw_ids::PERF_COUNT_SW_CPU_CLOCK,
    perf_sw_ids::PERF_COUNT_SW_PAGE_FAULTS_MAJ, perf_sw_ids::PERF_COUNT_SW_PAGE_FAULTS_MIN,
    perf_type_id::PERF_TYPE_SOFTWARE,
};
use podflame_wire::{FAULT_INTERVAL_NS, FAULT_PERIOD};

/// `PERF_EVENT_IOC_ENABLE` of `include/uapi/linux/perf_event.h`.
const IOC_ENABLE: libc::c_ulong = 0x2400;
/// `PERF_EVENT_IOC_SET_BPF`: `_IOW('$', 8, __u32)`.
const IOC_SET_BPF: libc::c_ulong = 0x4004_2408;

/// Most samples of minor faults a second on each CPU, in Hz.
pub const FAULT_HZ: u32 = (1_000_000_000 / FAULT_INTERVAL_NS) as u32;

/// Which CPUs are online now, as the kernel lists them.
pub const ONLINE: &str = "/sys/devices/system/cpu/online";

/// What to sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Time on the CPU, the idle task left out, at this frequency in Hz. `cpu-clock` is a software
    /// timer: unlike hardware cycles it leaves `kernel.perf_event_max_sample_rate` alone.
    CpuClock(u32),
    /// Every [`FAULT_PERIOD`]th minor page fault.
    MinorFaults,
    /// Every major page fault.
    MajorFaults,
}

/// An open perf event with a program on it. Closing it stops it; nothing outlives the agent.
#[derive(Debug)]
pub struct PerfEvent {
    /// Open is on; dropping it closes it.
    _fd: OwnedFd,
    /// The CPU it samples.
    pub cpu: u32,
}

impl PerfEvent {
    /// Starts sampling `source` on `cpu` into `program`.
    ///
    /// # Errors
    ///
    /// As the kernel says; `ENODEV` if the CPU went offline.
    pub fn start(source: Source, cpu: u32, program: BorrowedFd<'_>) -> io::Result<Self> {
        let fd = open(&attributes(source), cpu)?;
        ioctl(&fd, IOC_SET_BPF, program.as_raw_fd())?;
        ioctl(&fd, IOC_ENABLE, 0)?;
        Ok(Self { _fd: fd, cpu })
    }
}

fn attributes(source: Source) -> perf_event_attr {
    // SAFETY: a plain C struct for which all zeros is the kernel's "default".
    let mut attr: perf_event_attr = unsafe { std::mem::zeroed() };
    attr.type_ = PERF_TYPE_SOFTWARE as u32;
    attr.size = size_of::<perf_event_attr>() as u32;
    attr.set_disabled(1);
    // A frequency, or else a period.
    let (config, rate) = match source {
        Source::CpuClock(hz) => {
            attr.set_exclude_idle(1);
            (PERF_COUNT_SW_CPU_CLOCK, Ok(hz))
        }
        Source::MinorFaults => (PERF_COUNT_SW_PAGE_FAULTS_MIN, Err(FAULT_PERIOD)),
        Source::MajorFaults => (PERF_COUNT_SW_PAGE_FAULTS_MAJ, Err(1)),
    };
    attr.config = config as u64;
    match rate {
        Ok(hz) => {
            attr.set_freq(1);
            attr.__bindgen_anon_1.sample_freq = u64::from(hz);
        }
        Err(period) => attr.__bindgen_anon_1.sample_period = period,
    }
    attr
}

fn open(attr: &perf_event_attr, cpu: u32) -> io::Result<OwnedFd> {
    // SAFETY: the attributes are a valid struct of the size they state; the rest are integers.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            std::ptr::from_ref(attr),
            -1,
            cpu as libc::c_int,
            -1,
            libc::c_ulong::from(PERF_FLAG_FD_CLOEXEC),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor, and nobody else holds it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn ioctl(fd: &OwnedFd, request: libc::c_ulong, argument: i32) -> io::Result<()> {
    // SAFETY: both requests take an integer.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The CPUs that are online.
///
/// # Errors
///
/// If the kernel's list cannot be read.
pub fn online_cpus() -> io::Result<Vec<u32>> {
    parse_cpus(&fs::read_to_string(ONLINE)?)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{ONLINE}: not a list")))
}

/// Parses a list such as `0-3,8` (`Documentation/admin-guide/cputopology.rst`).
fn parse_cpus(list: &str) -> Option<Vec<u32>> {
    let mut cpus = Vec::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        // No kernel has more (`CONFIG_NR_CPUS` is at most 8192).
        if last > 65_535 {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists() {
        for (list, cpus) in [
            ("0\n", Some(vec![0])),
            ("0-1\n", Some(vec![0, 1])),
            ("0-2,5,7-8\n", Some(vec![0, 1, 2, 5, 7, 8])),
            ("\n", Some(vec![])),
            ("0-", None),
            ("a", None),
            ("0-4294967295", None),
        ] {
            assert_eq!(parse_cpus(list), cpus, "{list:?}");
        }
    }
}
