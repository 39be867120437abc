//! Machines as data, and what the doctor says of them.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::path::PathBuf;

use super::{
    facts::{effective, source_version},
    *,
};
use crate::attribute::cgroups::Mount;

/// A machine under lockdown, on which all works.
fn machine() -> Facts {
    Facts {
        release: "6.18.44".to_owned(),
        version: Some((6, 18, 44)),
        btf_error: None,
        lockdown: Lockdown::Mode("confidentiality".to_owned()),
        capabilities: 0x1ff_feff_ffff,
        perf_event_paranoid: Some(2),
        kptr_restrict: Some(0),
        unprivileged_bpf_disabled: Some(2),
        max_sample_rate: Some(100_000),
        bpf_jit: Some(1),
        perf_events: [0; 3],
        tracepoints: [Some(true); 3],
        cgroup2: Some(Mount { point: PathBuf::from("/sys/fs/cgroup/unified"), whole: true }),
        cpus: "0-1".to_owned(),
    }
}

/// The signals, and whatever is not well.
fn complaints(facts: &Facts) -> String {
    let mut report = report(facts);
    report.findings.retain(|finding| finding.status != Status::Ok);
    let text = render(&report, false);
    let lines: Vec<_> = text.lines().skip(2).map(squeeze).collect();
    lines.join("\n")
}

/// Without alignment.
fn squeeze(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn check(facts: &Facts, expected: &str) {
    let expected: Vec<_> = expected.trim().lines().map(squeeze).collect();
    assert_eq!(complaints(facts), expected.join("\n"));
}

#[test]
fn a_machine_under_lockdown() {
    assert_eq!(
        render(&report(&machine()), false),
        "\
kernel 6.18.44

SIGNALS
  ok        cpu
  ok        page-fault
  ok        retransmit

FINDINGS
  ok        kernel                             6.18.44
  ok        user memory in interrupts          safe to read
  ok        BTF                                /sys/kernel/btf/vmlinux
  ok        lockdown                           confidentiality: nothing that podflame uses is refused
  ok        CAP_BPF                            effective
  ok        CAP_PERFMON                        effective
  ok        CAP_SYS_PTRACE                     effective
  ok        CAP_CHECKPOINT_RESTORE             effective
  ok        CAP_DAC_READ_SEARCH                effective
  ok        CAP_SYSLOG                         effective
  ok        kernel.perf_event_paranoid         2
  ok        kernel.unprivileged_bpf_disabled   2; of no effect with CAP_BPF
  ok        event cpu-clock                    opens
  ok        event minor-faults                 opens
  ok        event major-faults                 opens
  ok        tracepoint tcp_retransmit_skb      in the kernel's BTF
  ok        tracepoint tcp_retransmit_synack   in the kernel's BTF
  ok        tracepoint sock_send_length        in the kernel's BTF
  ok        kernel.perf_event_max_sample_rate  100000
  ok        kernel.kptr_restrict               0
  ok        net.core.bpf_jit_enable            1
  ok        cgroup2                            /sys/fs/cgroup/unified
  ok        CPUs online                        0-1
"
    );
}

#[test]
fn an_old_kernel() {
    let facts = Facts {
        release: "5.10.0-28-amd64".to_owned(),
        version: Some((5, 10, 209)),
        tracepoints: [Some(true), Some(true), Some(false)],
        ..machine()
    };
    check(
        &facts,
        "
        SIGNALS
        missing cpu because of kernel
        missing page-fault because of kernel
        missing retransmit because of kernel

        FINDINGS
        missing kernel 5.10.0-28-amd64
        effect: podflame does not start on it
        remedy: run kernel 5.15 or later
        degraded tracepoint sock_send_length not in the kernel's BTF
        effect: retransmits come without the stack of their sender
        remedy: run kernel 6.3 or later
        ",
    );
    assert_eq!(report(&facts).missing(), ["cpu", "page-fault", "retransmit"]);
}

#[test]
fn a_kernel_before_the_senders_tracepoint() {
    let facts = Facts {
        release: "6.1.0-31-cloud-amd64".to_owned(),
        version: Some((6, 1, 128)),
        tracepoints: [Some(true), Some(true), Some(false)],
        ..machine()
    };
    check(
        &facts,
        "
        SIGNALS
        ok cpu
        ok page-fault
        degraded retransmit because of tracepoint sock_send_length

        FINDINGS
        degraded tracepoint sock_send_length not in the kernel's BTF
        effect: retransmits come without the stack of their sender
        remedy: run kernel 6.3 or later
        ",
    );
    assert!(report(&facts).missing().is_empty());
}

#[test]
fn a_kernel_that_freezes() {
    let freezes = |version| {
        let facts = Facts { version: Some(version), ..machine() };
        report(&facts).missing() == ["cpu", "page-fault"]
    };
    for version in [(5, 19, 0), (6, 0, 19), (6, 1, 0), (6, 1, 35), (6, 2, 16), (6, 3, 9)] {
        assert!(freezes(version), "{version:?}");
    }
    for version in [(5, 15, 0), (5, 18, 19), (6, 1, 36), (6, 1, 170), (6, 3, 10), (6, 12, 0)] {
        assert!(!freezes(version), "{version:?}");
    }
}

#[test]
fn no_btf() {
    let facts = Facts {
        btf_error: Some("No such file or directory (os error 2)".to_owned()),
        tracepoints: [None; 3],
        ..machine()
    };
    check(
        &facts,
        "
        SIGNALS
        missing cpu because of BTF
        missing page-fault because of BTF
        missing retransmit because of BTF, tracepoint tcp_retransmit_skb

        FINDINGS
        missing BTF /sys/kernel/btf/vmlinux: No such file or directory (os error 2)
        effect: the layout of kernel structures is not known
        remedy: run a kernel with CONFIG_DEBUG_INFO_BTF=y; in a container, mount the host's /sys
        missing tracepoint tcp_retransmit_skb unknown without BTF
        effect: no TCP retransmits
        remedy: see BTF
        degraded tracepoint tcp_retransmit_synack unknown without BTF
        effect: SYN-ACKs that are sent again are not seen
        remedy: see BTF
        degraded tracepoint sock_send_length unknown without BTF
        effect: retransmits come without the stack of their sender
        remedy: see BTF
        ",
    );
}

#[test]
fn an_ordinary_user() {
    let facts = Facts { capabilities: 0, perf_events: [libc::EACCES; 3], ..machine() };
    let report = report(&facts);
    assert_eq!(report.missing(), ["cpu", "page-fault", "retransmit"]);
    assert_eq!(
        report.signals[0].because,
        ["CAP_BPF", "CAP_PERFMON", "event cpu-clock"],
        "degradations do not hide among what is missing"
    );
    let paranoid = report.findings.iter().find(|f| f.subject == "kernel.perf_event_paranoid");
    assert_eq!(paranoid.unwrap().status, Status::Degraded);
}

#[test]
fn least_privilege() {
    // CAP_BPF, CAP_PERFMON and CAP_SYS_PTRACE.
    let facts = Facts { capabilities: 1 << 39 | 1 << 38 | 1 << 19, ..machine() };
    check(
        &facts,
        "
        SIGNALS
        degraded cpu because of CAP_CHECKPOINT_RESTORE, CAP_DAC_READ_SEARCH, CAP_SYSLOG
        degraded page-fault because of CAP_CHECKPOINT_RESTORE, CAP_DAC_READ_SEARCH, CAP_SYSLOG
        degraded retransmit because of CAP_CHECKPOINT_RESTORE, CAP_DAC_READ_SEARCH

        FINDINGS
        degraded CAP_CHECKPOINT_RESTORE not effective
        effect: files that were deleted or replaced cannot be opened: their frames stay unnamed
        remedy: run as root, or add CHECKPOINT_RESTORE to the capabilities of the process or container
        degraded CAP_DAC_READ_SEARCH not effective
        effect: files that are not readable to all stay without symbols, and new cgroups are found by walking their tree
        remedy: run as root, or add DAC_READ_SEARCH to the capabilities of the process or container
        degraded CAP_SYSLOG not effective
        effect: /proc/kallsyms shows no addresses: kernel frames stay unnamed
        remedy: run as root, or add SYSLOG to the capabilities of the process or container
        ",
    );
    // CAP_SYS_ADMIN includes BPF, PERFMON and CHECKPOINT_RESTORE.
    let facts = Facts { capabilities: 1 << 21, ..machine() };
    assert!(report(&facts).missing().is_empty());
}

#[test]
fn settings_that_degrade() {
    let facts = Facts {
        lockdown: Lockdown::Unknown,
        kptr_restrict: Some(2),
        max_sample_rate: Some(50),
        bpf_jit: Some(0),
        perf_events: [0, 0, libc::ENOENT],
        cgroup2: None,
        ..machine()
    };
    check(
        &facts,
        "
        SIGNALS
        degraded cpu because of kernel.perf_event_max_sample_rate, kernel.kptr_restrict, net.core.bpf_jit_enable, cgroup2
        degraded page-fault because of event major-faults, kernel.perf_event_max_sample_rate, kernel.kptr_restrict, net.core.bpf_jit_enable, cgroup2
        degraded retransmit because of net.core.bpf_jit_enable, cgroup2

        FINDINGS
        degraded event major-faults perf_event_open: No such file or directory (os error 2)
        effect: no major page faults
        degraded kernel.perf_event_max_sample_rate 50
        effect: the default of 99 Hz is refused; choose a lower frequency
        remedy: sysctl kernel.perf_event_max_sample_rate=100000
        degraded kernel.kptr_restrict 2
        effect: /proc/kallsyms shows no addresses even to root: kernel frames stay unnamed
        remedy: sysctl kernel.kptr_restrict=1
        degraded net.core.bpf_jit_enable 0
        effect: BPF programs are interpreted: every event costs several times more
        remedy: sysctl net.core.bpf_jit_enable=1
        degraded cgroup2 not mounted
        effect: cgroups have no path: pods are known by their processes only, and --cgroup is refused
        remedy: mount -t cgroup2 none /sys/fs/cgroup; in a container, mount the host's
        ",
    );
    let text = render(&report(&facts), false);
    assert!(text.contains("remedy: to see it: mount -t securityfs securityfs"), "{text}");
}

#[test]
fn versions_behind_a_distributions_release() {
    let check = |release, build, signature, expected| {
        assert_eq!(source_version(release, build, signature), expected, "{release}");
    };
    let debian = "#1 SMP PREEMPT_DYNAMIC Debian 6.1.76-1 (2024-02-01)";
    check("6.1.0-18-cloud-amd64", debian, "", Some((6, 1, 76)));
    let ubuntu = "Ubuntu 5.19.0-50.50-generic 5.19.17";
    check("5.19.0-50-generic", "#50-Ubuntu SMP", ubuntu, Some((5, 19, 17)));
    check("6.18.44-fc", "#1 SMP PREEMPT_DYNAMIC @0", "", Some((6, 18, 44)));
    check("6.19-rc1", "", "", Some((6, 19, 0)));
    check("5.14.0-362.el9.x86_64", "#1 SMP", "", Some((5, 14, 0)));
    for nonsense in ["", "6", "x", ".", "6.", "99999999999.1", "é"] {
        check(nonsense, "Debian x", "Ubuntu", None);
    }
}

#[test]
fn capabilities_of_a_status_file() {
    assert_eq!(effective("Name:\tx\nCapEff:\t000001ffffffffff\n"), 0x1ff_ffff_ffff);
    assert_eq!(effective("CapEff:\tzz\n"), 0);
    assert_eq!(effective(""), 0);
}

#[test]
fn json_has_every_field() {
    let facts = Facts { tracepoints: [Some(true), Some(true), Some(false)], ..machine() };
    let json = serde_json::to_value(report(&facts)).unwrap();
    assert_eq!(
        json["signals"][2],
        serde_json::json!({
            "signal": "retransmit",
            "status": "degraded",
            "because": ["tracepoint sock_send_length"],
        })
    );
    let findings = json["findings"].as_array().unwrap();
    let sender = findings.iter().find(|f| f["subject"] == "tracepoint sock_send_length");
    assert_eq!(
        sender,
        Some(&serde_json::json!({
            "subject": "tracepoint sock_send_length",
            "status": "degraded",
            "detail": "not in the kernel's BTF",
            "effect": "retransmits come without the stack of their sender",
            "remedy": "run kernel 6.3 or later",
            "signals": ["retransmit"],
        }))
    );
}

#[test]
fn colours_are_of_the_status_and_nothing_else_escapes() {
    let facts = Facts { release: "6.18.0\u{1b}[2J".to_owned(), ..machine() };
    let plain = render(&report(&facts), false);
    assert!(!plain.contains('\u{1b}') && plain.contains("6.18.0\u{fffd}[2J"));
    let color = render(&report(&facts), true);
    assert!(color.contains("\u{1b}[32mok      \u{1b}[0m  cpu"));
    assert!(!color.contains("\u{1b}[2J"));
}

#[test]
fn this_machine_can_be_looked_at() {
    let facts = Facts::gather(|_| Some(true));
    assert!(facts.version.is_some_and(|version| version >= (2, 6, 0)), "{facts:?}");
    assert!(!facts.cpus.is_empty() && facts.tracepoints == [Some(true); 3]);
    // SAFETY: has no conditions.
    if unsafe { libc::geteuid() } == 0 {
        assert_ne!(facts.capabilities, 0);
    }
}
