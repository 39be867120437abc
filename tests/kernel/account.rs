//! Every event is accounted for: in a storm, behind a filter, and when podflame is killed.
//!
//! The equations themselves are checked by `record`, at the end of every recording.

use std::{collections::BTreeSet, fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use aya::{maps::loaded_maps, programs::loaded_links};
use podflame_tests::{Cgroup, Workload, wait_for, workload};

use crate::{
    Test, bpf,
    record::{Recorded, Recording},
};

pub(crate) const TESTS: &[Test] = &[
    ("a_storm_of_samples_is_counted", a_storm_of_samples_is_counted),
    ("a_storm_of_faults_is_counted", a_storm_of_faults_is_counted),
    ("a_pid_leaves_others_out", a_pid_leaves_others_out),
    ("a_cgroup_leaves_others_out", a_cgroup_leaves_others_out),
    (
        "killed_recordings_leave_nothing_in_the_kernel",
        killed_recordings_leave_nothing_in_the_kernel,
    ),
];

/// The smallest ring buffer there is: a page, which holds two to thirty records.
const TINY: [&str; 2] = ["--ring-bytes", "4096"];

fn start(name: &str, words: &[&str]) -> Result<Workload> {
    let mut command = workload(name)?;
    command.args(words);
    Workload::start(command)
}

fn a_storm_of_samples_is_counted() -> Result<()> {
    let load = start("stacks", &["--distinct", "10000"])?;
    let deep = start("stacks", &["--depth", "1000"])?;
    let recording = Recording::start(&[&["--frequency", "1000"][..], &TINY].concat())?;
    stall(&recording, 1000)?;
    let recorded = recording.stop()?;
    for load in [load, deep] {
        load.stop()?;
    }
    overflowed(&recorded, "on_cpu")
}

fn a_storm_of_faults_is_counted() -> Result<()> {
    let dir = tempfile::tempdir_in(podflame_tests::tool("PODFLAME_WORKLOADS")?)?;
    let file = dir.path().join("pages");
    let file = file.to_str().context("a path that is not text")?;
    let load = start("faults", &["--pages", "500", "--file", file])?;
    let anonymous = start("faults", &[])?;
    let recording = Recording::start(&[&["--signal", "page-fault"][..], &TINY].concat())?;
    stall(&recording, 10_000)?;
    let recorded = recording.stop()?;
    for load in [load, anonymous] {
        load.stop()?;
    }
    overflowed(&recorded, "major_fault")
}

/// Keeps podflame from reading while its programs run so many times, which the ring buffer cannot
/// hold, whatever this machine's speed.
fn stall(recording: &Recording, runs: u64) -> Result<()> {
    let own: Vec<u32> = held_by(recording.pid())?
        .iter()
        .filter(|held| held.0 == "prog")
        .map(|held| held.1)
        .collect();
    let count = || -> Result<u64> {
        let programs = bpf::programs()?;
        Ok(own.iter().filter_map(|id| programs.get(id)).map(|program| program.runs).sum())
    };
    let before = count()?;
    recording.signal(libc::SIGSTOP);
    wait_for("a storm", Duration::from_secs(60), || Ok((count()? >= before + runs).then_some(())))?;
    recording.signal(libc::SIGCONT);
    Ok(())
}

fn overflowed(recorded: &Recorded, probe: &str) -> Result<()> {
    let lost = recorded.count(probe, "/dropped_in_kernel/ring_full");
    assert!(lost > 0, "nothing was lost: {}", recorded.summary);
    let stored = recorded.count(probe, "/stored");
    assert!(stored > 0, "nothing was stored: {}", recorded.summary);
    let all = recorded.summary["lost"].as_u64().context("no number of lost events")?;
    assert!(all >= lost, "{}", recorded.summary);
    assert_eq!(recorded.profile["lost"].as_u64(), Some(all));
    Ok(())
}

fn a_pid_leaves_others_out() -> Result<()> {
    for (signal, name) in [("cpu", "split"), ("page-fault", "faults")] {
        let (wanted, other) = (start(name, &[])?, start(name, &[])?);
        let pid = wanted.pid().to_string();
        let words = ["--seconds", "2", "--pid", &pid, "--signal", signal];
        let recorded = Recording::start(&words)?.finish()?;
        only(&recorded, signal, |it| it == wanted.pid());
        for load in [wanted, other] {
            load.stop()?;
        }
    }
    Ok(())
}

fn a_cgroup_leaves_others_out() -> Result<()> {
    let outer = Cgroup::new("podflame-outer")?;
    let mount_path = outer.path();
    // One is there before podflame is, one is made below the cgroup while podflame runs.
    let mut early = workload("split")?;
    outer.enter(&mut early)?;
    let early = Workload::start(early)?;
    let other = start("split", &[])?;
    let words: [PathBuf; 4] =
        ["--cgroup".into(), mount_path.clone(), "--frequency".into(), "499".into()];
    let recording = Recording::start(&words)?;
    let name = mount_path.strip_prefix("/")?.to_str().context("a name that is not text")?;
    let name = name.trim_end_matches(&format!("-{}", std::process::id())).to_owned();
    let inner = Cgroup::new(&format!("{name}/inner"))?;
    let mut late = workload("split")?;
    late.args(["--seconds", "4"]);
    inner.enter(&mut late)?;
    let late = Workload::start(late)?;
    let late_pid = late.pid();
    late.finish(Duration::from_secs(60))?;
    let recorded = recording.stop()?;
    let early_pid = early.pid();
    only(&recorded, "cpu", |pid| pid == early_pid || pid == late_pid);
    for pid in [early_pid, late_pid] {
        let percent = recorded.percent(|sample| sample.pid() == pid);
        assert!(percent > 10.0, "{percent} % of process {pid}: {early_pid} early, {late_pid} late");
    }
    early.stop()?;
    other.stop()?;
    drop(inner);
    drop(outer);
    Ok(())
}

/// Others were there and were left out.
fn only(recorded: &Recorded, signal: &str, wanted: impl Fn(u32) -> bool) {
    let probe = if signal == "cpu" { "on_cpu" } else { "minor_fault" };
    let filtered = recorded.count(probe, "/filtered");
    assert!(filtered > 0, "{signal}: nothing was filtered: {}", recorded.summary);
    let strangers: BTreeSet<_> =
        recorded.samples().map(|sample| sample.pid()).filter(|pid| !wanted(*pid)).collect();
    assert!(strangers.is_empty(), "{signal}: also samples of {strangers:?}");
    assert!(recorded.count(probe, "/stored") > 0, "no samples: {}", recorded.summary);
}

/// What a process holds in the kernel: kind and ID.
type Held = BTreeSet<(&'static str, u32)>;

fn killed_recordings_leave_nothing_in_the_kernel() -> Result<()> {
    // The perf events of the first have no link of their own, the tracepoints of the last have.
    // Two of each are for cgroups that come and go.
    for (signal, probes, links) in [("cpu", 3, 2), ("page-fault", 4, 2), ("retransmit", 5, 5)] {
        let recording = Recording::start(&["--signal", signal])?;
        let held = held_by(recording.pid())?;
        let count = |kind| held.iter().filter(|(its, _)| *its == kind).count();
        assert_eq!((count("prog"), count("link")), (probes, links), "{signal}: {held:?}");
        assert!(count("map") >= 5, "{signal}: {held:?}");
        let missing: Held = held.difference(&in_kernel()?).copied().collect();
        assert!(missing.is_empty(), "{signal}: the kernel does not know {missing:?}");
        recording.kill()?;
        // By ID, as others may load and unload theirs at the same time. The kernel frees them after
        // a grace period.
        wait_for("the kernel to let go of them", Duration::from_secs(10), || {
            Ok(held.is_disjoint(&in_kernel()?).then_some(()))
        })
        .with_context(|| format!("{signal}: {held:?}"))?;
    }
    Ok(())
}

/// By the descriptors it has open (`bpf_prog_show_fdinfo` and its like).
fn held_by(pid: u32) -> Result<Held> {
    let mut held = Held::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // One that was closed meanwhile.
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        let id = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)?.trim().parse().ok());
        let kinds = [("link", "link_id:"), ("map", "map_id:"), ("prog", "prog_id:")];
        // A link shows its program, too.
        held.extend(kinds.iter().find_map(|(kind, key)| Some((*kind, id(key)?))));
    }
    Ok(held)
}

/// All that the kernel has.
fn in_kernel() -> Result<Held> {
    let mut held: Held = bpf::programs()?.into_keys().map(|id| ("prog", id)).collect();
    for map in loaded_maps() {
        held.insert(("map", map.context("list the BPF maps")?.id()));
    }
    for link in loaded_links() {
        held.insert(("link", link.context("list the BPF links")?.id()));
    }
    Ok(held)
}
