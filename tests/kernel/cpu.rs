//! On-CPU samples: whose time it is, where it goes, and what becomes of stacks that are hard to have.

use std::{
    collections::HashSet,
    fs,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use podflame_tests::{Cgroup, Workload, tool, workload};

use crate::{
    Test,
    record::{self, Recorded, Recording},
    shared::perf_report,
};

pub(crate) const TESTS: &[Test] = &[
    ("shares_are_those_of_the_program_and_of_perf", shares_are_those_of_the_program_and_of_perf),
    ("time_in_the_kernel_has_kernel_frames", time_in_the_kernel_has_kernel_frames),
    ("the_rate_is_kept", the_rate_is_kept),
    ("thousands_of_stacks_are_told_apart", thousands_of_stacks_are_told_apart),
    ("a_deep_stack_is_marked_as_truncated", a_deep_stack_is_marked_as_truncated),
    ("short_lived_processes_have_names", short_lived_processes_have_names),
    ("pprof_opens_in_gos_pprof", pprof_opens_in_gos_pprof),
];

fn start(name: &str, words: &[&str]) -> Result<Workload> {
    let mut command = workload(name)?;
    command.args(words);
    Workload::start(command)
}

/// Records one running workload.
fn record(load: &Workload, words: &[&str]) -> Result<Recorded> {
    let pid = load.pid().to_string();
    Recording::start(&[&["--pid", &pid], words].concat())?.finish()
}

fn shares_are_those_of_the_program_and_of_perf() -> Result<()> {
    let load = start("split", &["--threads", "2"])?;
    let dir = tempfile::tempdir()?;
    let data = dir.path().join("perf.data");
    let pid = load.pid().to_string();
    let mut perf = Command::new("perf")
        .args(["record", "--quiet", "--event", "cpu-clock", "--freq", "99", "-g", "--pid", &pid])
        .arg("--output")
        .arg(&data)
        // Lasts as long as the recording.
        .args(["--", "sleep", "8"])
        .stdin(Stdio::null())
        .spawn()
        .context("start perf")?;
    let recorded = record(&load, &["--seconds", "8"]);
    let status = perf.wait()?;
    let recorded = recorded?;
    ensure!(status.success(), "perf record: {status}");
    load.stop()?;
    let perf = perf_report(&data)?;
    for (function, its) in [("hot_a", 70.0), ("hot_b", 30.0)] {
        let ours = recorded.percent(|sample| sample.is_in(function));
        let theirs = perf.iter().find(|(name, _)| name.ends_with(function)).map_or(0.0, |f| f.1);
        assert!(f64::abs(ours - its) <= 3.0, "{function}: {ours} %, in truth {its} %");
        assert!(f64::abs(ours - theirs) <= 3.0, "{function}: {ours} %, perf says {theirs} %");
    }
    let caller = recorded.percent(|sample| sample.has("split_loop"));
    assert!(caller > 95.0, "split_loop is on {caller} % of the stacks");
    Ok(())
}

fn time_in_the_kernel_has_kernel_frames() -> Result<()> {
    let load = start("syscalls", &[])?;
    let recorded = record(&load, &["--seconds", "3", "--frequency", "499"])?;
    load.stop()?;
    let kernel = recorded.percent(|sample| sample.frames("kernel").next().is_some());
    // The workload spends at most a tenth of its time in user mode (see `shared`).
    assert!(kernel > 90.0, "{kernel} % in the kernel");
    let reads = recorded.percent(|sample| {
        let mut frames = sample.frames("kernel");
        frames.any(|name| name == "vfs_read") && frames.any(|name| name.ends_with("64"))
    });
    assert!(reads > 0.9 * kernel, "{reads} % below do_syscall_64 and vfs_read");
    let both = recorded.percent(|s| s.frames("kernel").next().is_some() && s.has("main"));
    assert!(both > 0.9 * kernel, "{both} % have the program's frames below the kernel's");
    let unnamed =
        recorded.percent(|s| s.frames("kernel").any(|n| n.is_empty() || n.starts_with('[')));
    assert!(unnamed < 1.0, "{unnamed} % with a kernel frame that has no name");
    Ok(())
}

fn the_rate_is_kept() -> Result<()> {
    let cpus = std::thread::available_parallelism()?.get();
    let load = start("split", &["--threads", &cpus.to_string()])?;
    // Of the whole node: the loops share the CPUs with others, but leave none of them idle.
    let recorded = Recording::start(&["--seconds", "10"])?.finish()?;
    load.stop()?;
    let seconds = recorded.summary["seconds"].as_f64().context("no seconds")?;
    let wanted = 99.0 * cpus as f64 * seconds;
    let hits = recorded.count("on_cpu", "/hits") as f64;
    // One in a hundred, and one more: on a virtual machine whose CPUs are taken away for a while,
    // timers are late and their ticks are merged.
    assert!((hits / wanted - 1.0).abs() < 0.02, "{hits} samples instead of {wanted}");
    assert_eq!(recorded.summary["lost"], 0, "{}", recorded.summary);
    assert_eq!(recorded.count("on_cpu", "/stored") as f64, hits);
    // Each stands for one period.
    let weight = recorded.weight(|_| true) as f64 / 1e9 / cpus as f64;
    assert!((weight / seconds - 1.0).abs() < 0.02, "{weight} s of {seconds} s");
    Ok(())
}

fn thousands_of_stacks_are_told_apart() -> Result<()> {
    let load = start("stacks", &["--distinct", "10000", "--microseconds", "7"])?;
    let recorded = record(&load, &["--seconds", "6", "--frequency", "997"])?;
    load.stop()?;
    let path = |sample: &record::Sample<'_>| {
        let frames: Vec<_> = sample.frames("user").skip_while(|n| !n.ends_with("turn")).collect();
        frames.join(";")
    };
    let samples = recorded.count("on_cpu", "/stored");
    let distinct = recorded.samples().map(|s| path(&s)).collect::<HashSet<_>>().len() as u64;
    // The stacks come in turn, so that sampling may keep in step with them for a while. Fewer samples
    // than that are taken only where the workload gets less than a third of a CPU.
    assert!(samples > 2000, "{samples} samples only");
    let unnamed = recorded.percent(|sample| path(sample).is_empty());
    assert!(unnamed < 2.0, "{unnamed} % without a name");
    assert!(distinct > 500, "{distinct} distinct stacks in {samples} samples");
    assert!(distinct <= 10_100, "{distinct} distinct stacks of 10000");
    assert_eq!(recorded.summary["lost"], 0, "{}", recorded.summary);
    Ok(())
}

fn a_deep_stack_is_marked_as_truncated() -> Result<()> {
    let load = start("stacks", &["--depth", "1000"])?;
    let recorded = record(&load, &["--seconds", "2", "--frequency", "499"])?;
    load.stop()?;
    let marked =
        |sample: &record::Sample<'_>| sample.frames("annotation").any(|a| a == "truncated stack");
    let percent = recorded.percent(marked);
    assert!(percent > 99.0, "{percent} % are marked as truncated");
    let count: u64 = recorded.samples().filter(marked).map(|sample| sample.count()).sum();
    assert_eq!(recorded.count("on_cpu", "/stack_ends/truncated"), count);
    let deepest = recorded.samples().filter(marked).map(|s| s.frames("user").count()).max();
    // As many as a record holds, all but the innermost calls of the same function.
    assert!(deepest.is_some_and(|n| (120..=127).contains(&n)), "{deepest:?} frames");
    let whole = recorded.percent(|s| s.has("at_the_bottom") && s.has("deeper"));
    assert!(whole > 99.0, "{whole} % have the innermost frames");
    Ok(())
}

fn short_lived_processes_have_names() -> Result<()> {
    let cgroup = Cgroup::new("podflame-short")?;
    let path = cgroup.path();
    let words = [OsWord::from("--frequency"), "997".into(), "--cgroup".into(), path.into()];
    let recording = Recording::start(&words)?;
    let mut command = workload("forks")?;
    command.args(["--per-second", "10", "--ms", "50", "--seconds", "6"]);
    cgroup.enter(&mut command)?;
    let load = Workload::start(command)?;
    let parent = load.pid();
    load.finish(Duration::from_secs(60))?;
    let recorded = recording.stop()?;
    let children: HashSet<_> =
        recorded.samples().map(|s| s.pid()).filter(|p| *p != parent).collect();
    assert!(children.len() > 40, "{} processes seen of 60", children.len());
    let of_children = recorded.weight(|sample| sample.pid() != parent);
    let percent = |that: &dyn Fn(&record::Sample<'_>) -> bool| {
        let weight = recorded.weight(|sample| sample.pid() != parent && that(sample));
        100.0 * weight as f64 / of_children as f64
    };
    // The rest goes to starting, in the loader and the kernel, some 5 %; and to the first 10 ms of
    // processes whose mappings podflame read before the loader was done: until it reads them again,
    // stacks that lead through a library end there. That is 2 to 8 %, by what else the machine does.
    let work = percent(&|sample| sample.has("short_lived_work"));
    assert!(work > 90.0, "{work} % of their time is known to be their work");
    let gone = percent(&|sample| sample.frames("user").any(|name| name.contains("process gone")));
    assert!(gone < 2.0, "{gone} % of their time is of processes that were gone too soon");
    Ok(())
}

type OsWord = std::ffi::OsString;

fn pprof_opens_in_gos_pprof() -> Result<()> {
    let load = start("split", &[])?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("split.pb.gz");
    let out = record::output(&[
        OsWord::from("--seconds"),
        "3".into(),
        "--pid".into(),
        load.pid().to_string().into(),
        "--format".into(),
        "pprof".into(),
        "--output".into(),
        file.clone().into(),
    ])?;
    load.stop()?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(fs::read_dir(dir.path())?.count(), 1);
    let out = Command::new(tool("PODFLAME_GO")?)
        .args(["tool", "pprof", "-top", "-noinlines", "-nodecount=5"])
        .arg(&file)
        .env("HOME", dir.path())
        .env("PPROF_TMPDIR", dir.path())
        .output()
        .context("start go tool pprof")?;
    let text = String::from_utf8_lossy(&out.stdout);
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    //       flat  flat%   sum%        cum   cum%
    //      2.01s 70.03% 70.03%      2.01s 70.03%  split::hot_a
    let mut rows = text.lines().skip_while(|line| !line.trim_start().starts_with("flat ")).skip(1);
    let first = rows.next().with_context(|| format!("no rows in {text}"))?;
    assert!(first.ends_with("split::hot_a"), "{text}");
    let share: f64 =
        first.split_whitespace().nth(1).context("no share")?.trim_end_matches('%').parse()?;
    assert!((share - 70.0).abs() <= 5.0, "{share} % after three seconds: {text}");
    Ok(())
}
