//! One function a subject: from the facts to a finding.

use super::{
    Finding, Status,
    facts::{Facts, Lockdown, TRACEPOINTS, Version},
};

/// The oldest kernel that podflame runs on: the first long-term one with all hooks of all signals
/// but the sender's stack.
const OLDEST: Version = (5, 15, 0);

const ALL: &[&str] = &["cpu", "page-fault", "retransmit"];
const PERF: &[&str] = &["cpu", "page-fault"];
const CPU: &[&str] = &["cpu"];
const FAULT: &[&str] = &["page-fault"];
const RETRANSMIT: &[&str] = &["retransmit"];
const NONE: &[&str] = &[];

/// A capability, by its bit in `include/uapi/linux/capability.h`.
struct Capability {
    name: &'static str,
    bit: u32,
    /// Those that include it, by bit.
    included_in: &'static [u32],
    without: Status,
    signals: &'static [&'static str],
    effect: &'static str,
}

const SYS_ADMIN: u32 = 21;
const PERFMON: u32 = 38;

const CAPABILITIES: &[Capability] = &[
    Capability {
        name: "CAP_BPF",
        bit: 39,
        included_in: &[SYS_ADMIN],
        without: Status::Missing,
        signals: ALL,
        effect: "no BPF program can be loaded",
    },
    Capability {
        name: "CAP_PERFMON",
        bit: PERFMON,
        included_in: &[SYS_ADMIN],
        without: Status::Missing,
        signals: ALL,
        effect: "no program can be attached to perf events and tracepoints",
    },
    Capability {
        name: "CAP_SYS_PTRACE",
        bit: 19,
        included_in: &[],
        without: Status::Degraded,
        signals: ALL,
        effect: "mappings of other users' processes cannot be read: their user frames stay unnamed",
    },
    Capability {
        name: "CAP_CHECKPOINT_RESTORE",
        bit: 40,
        included_in: &[SYS_ADMIN],
        without: Status::Degraded,
        signals: ALL,
        effect: "files that were deleted or replaced cannot be opened: their frames stay unnamed",
    },
    Capability {
        name: "CAP_DAC_READ_SEARCH",
        bit: 2,
        included_in: &[],
        without: Status::Degraded,
        signals: ALL,
        effect: "files that are not readable to all stay without symbols, and new cgroups are found \
                 by walking their tree",
    },
    Capability {
        name: "CAP_SYSLOG",
        bit: 34,
        included_in: &[],
        without: Status::Degraded,
        signals: PERF,
        effect: "/proc/kallsyms shows no addresses: kernel frames stay unnamed",
    },
];

/// Every finding, in the order in which they matter.
pub(super) fn all(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![release(facts), user_memory(facts), btf(facts), lockdown(facts)];
    findings.extend(CAPABILITIES.iter().map(|one| capability(facts, one)));
    findings.extend([perf_event_paranoid(facts), unprivileged_bpf(facts)]);
    findings.extend([cpu_clock(facts), fault_event(facts, 1), fault_event(facts, 2)]);
    findings.extend((0..TRACEPOINTS.len()).map(|at| tracepoint(facts, at)));
    findings.extend([sample_rate(facts), kptr_restrict(facts), jit(facts), cgroup2(facts)]);
    findings.push(ok("CPUs online", &facts.cpus));
    findings
}

fn ok(subject: &str, detail: impl Into<String>) -> Finding {
    Finding {
        subject: subject.to_owned(),
        status: Status::Ok,
        detail: detail.into(),
        effect: String::new(),
        remedy: String::new(),
        signals: Vec::new(),
    }
}

impl Finding {
    /// The same, but not well.
    fn bad(self, status: Status, signals: &[&'static str], effect: &str, remedy: &str) -> Self {
        let (effect, remedy) = (effect.to_owned(), remedy.to_owned());
        Self { status, effect, remedy, signals: signals.to_vec(), ..self }
    }
}

fn release(facts: &Facts) -> Finding {
    let subject = "kernel";
    match facts.version {
        Some(version) if version >= OLDEST => ok(subject, &facts.release),
        Some(_) => ok(subject, &facts.release).bad(
            Status::Missing,
            ALL,
            "podflame does not start on it",
            "run kernel 5.15 or later",
        ),
        None => ok(subject, format!("{:?}: version not understood", facts.release)).bad(
            Status::Degraded,
            NONE,
            "faults that only some versions have cannot be told",
            "",
        ),
    }
}

/// Whether reading user memory from a perf interrupt can freeze this kernel: from 5.19 on, fixed in
/// 6.1.36 and 6.3.10.
fn freezes(version: Version) -> bool {
    ((5, 19, 0)..(6, 1, 36)).contains(&version) || ((6, 2, 0)..(6, 3, 10)).contains(&version)
}

fn user_memory(facts: &Facts) -> Finding {
    let subject = "user memory in interrupts";
    match facts.version {
        Some(version) if freezes(version) => {
            let (major, minor, patch) = version;
            ok(subject, format!("can freeze kernel {major}.{minor}.{patch}")).bad(
                Status::Missing,
                PERF,
                "user stacks cannot be taken safely at perf events",
                "run kernel 6.1.36, 6.3.10 or later of its series",
            )
        }
        Some(_) => ok(subject, "safe to read"),
        None => ok(subject, "unknown"),
    }
}

fn btf(facts: &Facts) -> Finding {
    match &facts.btf_error {
        None => ok("BTF", "/sys/kernel/btf/vmlinux"),
        Some(error) => ok("BTF", format!("/sys/kernel/btf/vmlinux: {error}")).bad(
            Status::Missing,
            ALL,
            "the layout of kernel structures is not known",
            "run a kernel with CONFIG_DEBUG_INFO_BTF=y; in a container, mount the host's /sys",
        ),
    }
}

fn lockdown(facts: &Facts) -> Finding {
    match &facts.lockdown {
        Lockdown::Mode(mode) => {
            ok("lockdown", format!("{mode}: nothing that podflame uses is refused"))
        }
        Lockdown::Absent => ok("lockdown", "not in this kernel"),
        Lockdown::Unknown => Finding {
            remedy: "to see it: mount -t securityfs securityfs /sys/kernel/security".to_owned(),
            ..ok("lockdown", "unknown; podflame works in every mode")
        },
    }
}

fn has(facts: &Facts, bit: u32) -> bool {
    facts.capabilities >> bit & 1 == 1
}

fn capability(facts: &Facts, one: &Capability) -> Finding {
    if has(facts, one.bit) {
        return ok(one.name, "effective");
    }
    if one.included_in.iter().any(|bit| has(facts, *bit)) {
        return ok(one.name, "included in CAP_SYS_ADMIN");
    }
    let remedy = format!(
        "run as root, or add {} to the capabilities of the process or container",
        one.name.trim_start_matches("CAP_")
    );
    ok(one.name, "not effective").bad(one.without, one.signals, one.effect, &remedy)
}

/// A setting with its value.
fn setting(name: &str, value: Option<i64>) -> Finding {
    ok(name, value.map_or("not readable".to_owned(), |value| value.to_string()))
}

fn perf_event_paranoid(facts: &Facts) -> Finding {
    let value = facts.perf_event_paranoid;
    let found = setting("kernel.perf_event_paranoid", value);
    if has(facts, PERFMON) || has(facts, SYS_ADMIN) || value.is_some_and(|value| value <= 0) {
        return found;
    }
    let effect = "events of other users' tasks are refused without CAP_PERFMON";
    found.bad(Status::Degraded, PERF, effect, "add CAP_PERFMON, which makes it irrelevant")
}

fn unprivileged_bpf(facts: &Facts) -> Finding {
    let found = setting("kernel.unprivileged_bpf_disabled", facts.unprivileged_bpf_disabled);
    Finding { detail: format!("{}; of no effect with CAP_BPF", found.detail), ..found }
}

/// What `errno` says, and what to do about it.
fn refusal(errno: i32) -> (String, &'static str) {
    let remedy = match errno {
        libc::EPERM | libc::EACCES => {
            "add CAP_PERFMON, lower kernel.perf_event_paranoid to 2 if it is higher, and let the \
             seccomp profile allow perf_event_open"
        }
        libc::ENOSYS => {
            "run a kernel with CONFIG_PERF_EVENTS=y, under a seccomp profile that allows it"
        }
        libc::EMFILE | libc::ENFILE => "raise the limit of open files",
        _ => "",
    };
    (format!("perf_event_open: {}", std::io::Error::from_raw_os_error(errno)), remedy)
}

fn cpu_clock(facts: &Facts) -> Finding {
    let subject = "event cpu-clock";
    match facts.perf_events[0] {
        0 => ok(subject, "opens"),
        errno => {
            let (detail, remedy) = refusal(errno);
            ok(subject, detail).bad(Status::Missing, CPU, "no samples of CPU time", remedy)
        }
    }
}

/// Of minor (1) or major (2) faults. With one of the two there is still a signal.
fn fault_event(facts: &Facts, at: usize) -> Finding {
    let [_, minor, major] = facts.perf_events;
    let (subject, errno, other, effect) = if at == 1 {
        ("event minor-faults", minor, major, "no samples of minor page faults")
    } else {
        ("event major-faults", major, minor, "no major page faults")
    };
    if errno == 0 {
        return ok(subject, "opens");
    }
    let status = if other == 0 { Status::Degraded } else { Status::Missing };
    let (detail, remedy) = refusal(errno);
    ok(subject, detail).bad(status, FAULT, effect, remedy)
}

fn tracepoint(facts: &Facts, at: usize) -> Finding {
    let (status, effect, remedy) = match at {
        0 => (
            Status::Missing,
            "no TCP retransmits",
            "run a kernel with CONFIG_INET=y and CONFIG_TRACEPOINTS=y",
        ),
        1 => (
            Status::Degraded,
            "SYN-ACKs that are sent again are not seen",
            "run a kernel with CONFIG_INET=y and CONFIG_TRACEPOINTS=y",
        ),
        _ => (
            Status::Degraded,
            "retransmits come without the stack of their sender",
            "run kernel 6.3 or later",
        ),
    };
    let subject = format!("tracepoint {}", TRACEPOINTS[at]);
    match facts.tracepoints[at] {
        Some(true) => ok(&subject, "in the kernel's BTF"),
        Some(false) => {
            ok(&subject, "not in the kernel's BTF").bad(status, RETRANSMIT, effect, remedy)
        }
        None => {
            let remedy = "see BTF";
            ok(&subject, "unknown without BTF").bad(status, RETRANSMIT, effect, remedy)
        }
    }
}

fn sample_rate(facts: &Facts) -> Finding {
    let found = setting("kernel.perf_event_max_sample_rate", facts.max_sample_rate);
    let remedy = "sysctl kernel.perf_event_max_sample_rate=100000";
    match facts.max_sample_rate {
        Some(rate) if rate < 99 => {
            let effect = "the default of 99 Hz is refused; choose a lower frequency";
            found.bad(Status::Degraded, PERF, effect, remedy)
        }
        Some(rate) if rate < 1000 => {
            let effect = format!("frequencies above {rate} Hz are refused");
            found.bad(Status::Degraded, NONE, &effect, remedy)
        }
        _ => found,
    }
}

fn kptr_restrict(facts: &Facts) -> Finding {
    let found = setting("kernel.kptr_restrict", facts.kptr_restrict);
    if facts.kptr_restrict.is_some_and(|value| value >= 2) {
        let effect = "/proc/kallsyms shows no addresses even to root: kernel frames stay unnamed";
        return found.bad(Status::Degraded, PERF, effect, "sysctl kernel.kptr_restrict=1");
    }
    found
}

fn jit(facts: &Facts) -> Finding {
    let found = setting("net.core.bpf_jit_enable", facts.bpf_jit);
    if facts.bpf_jit == Some(0) {
        let effect = "BPF programs are interpreted: every event costs several times more";
        return found.bad(Status::Degraded, ALL, effect, "sysctl net.core.bpf_jit_enable=1");
    }
    found
}

fn cgroup2(facts: &Facts) -> Finding {
    let remedy = "mount -t cgroup2 none /sys/fs/cgroup; in a container, mount the host's";
    match &facts.cgroup2 {
        Some(mount) if mount.whole => ok("cgroup2", mount.point.display().to_string()),
        Some(mount) => ok("cgroup2", format!("{}: a part only", mount.point.display())).bad(
            Status::Degraded,
            ALL,
            "cgroups outside of that part have no path: pods are known by their processes only",
            "mount the host's /sys/fs/cgroup into the container",
        ),
        None => ok("cgroup2", "not mounted").bad(
            Status::Degraded,
            ALL,
            "cgroups have no path: pods are known by their processes only, and --cgroup is refused",
            remedy,
        ),
    }
}
