//! Tests of what the other tests rely on: workloads, cgroups, network namespaces and counts.

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use podflame_tests::{
    Cgroup, NetPair, PerfStat, Workload, left_behind, perf_stat, tool, wait_for, workload,
};
use serde_json::Value;

use crate::{Test, bpf};

pub(crate) const TESTS: &[Test] = &[
    ("faults_are_the_faults_that_perf_counts", faults_are_the_faults_that_perf_counts),
    ("file_faults_are_major", file_faults_are_major),
    ("split_is_70_to_30", split_is_70_to_30),
    ("syscalls_are_kernel_time", syscalls_are_kernel_time),
    ("loss_makes_retransmits", loss_makes_retransmits),
    ("forks_keep_their_rate", forks_keep_their_rate),
    ("cgroups_hold_what_starts_in_them", cgroups_hold_what_starts_in_them),
    ("stacks_are_distinct", stacks_are_distinct),
    ("workloads_die_when_dropped", workloads_die_when_dropped),
    ("programs_of_bpf_are_listed", programs_of_bpf_are_listed),
    ("waiting_ends", waiting_ends),
];

/// A number of the JSON that a workload ends with.
fn number(json: &str, key: &str) -> Result<f64> {
    let json: Value = serde_json::from_str(json).with_context(|| format!("read {json:?}"))?;
    json[key].as_f64().with_context(|| format!("no {key} in {json}"))
}

fn close(a: f64, b: f64, part: f64) -> bool {
    (a - b).abs() <= part * b.abs()
}

fn faults_are_the_faults_that_perf_counts() -> Result<()> {
    let mut command = workload("faults")?;
    command.args(["--count", "1000000"]);
    let (counted, json) = perf_stat("minor-faults", &command)?;
    assert_eq!(number(&json, "pages")?, 1e6);
    assert!(close(counted as f64, 1e6, 0.01), "perf counts {counted}, {json}");
    assert!(close(number(&json, "minor")?, 1e6, 0.01), "{json}");
    Ok(())
}

fn file_faults_are_major() -> Result<()> {
    // Beside the workloads: /tmp may be kept in memory, where there are no major faults.
    let dir = tempfile::tempdir_in(tool("PODFLAME_WORKLOADS")?)?;
    let mut command = workload("faults")?;
    command.args(["--pages", "1000", "--count", "2000", "--file"]).arg(dir.path().join("file"));
    let (counted, json) = perf_stat("major-faults", &command)?;
    assert!(close(number(&json, "major")?, 2000.0, 0.02), "{json}");
    assert!(close(counted as f64, 2000.0, 0.02), "perf counts {counted}, {json}");
    Ok(())
}

fn split_is_70_to_30() -> Result<()> {
    let mut command = workload("split")?;
    command.args(["--seconds", "8", "--threads", "2"]);
    let shares = perf_shares(command)?;
    let share = |name: &str| shares.iter().find(|(its, _)| its == name).map_or(0.0, |s| s.1);
    let (a, b) = (share("split::hot_a"), share("split::hot_b"));
    // The rest is the kernel's: interrupts, and more of it on a busy machine.
    assert!(a + b > 95.0, "{shares:?}");
    assert!((100.0 * a / (a + b) - 70.0).abs() < 1.0, "{a} % and {b} %: {shares:?}");
    Ok(())
}

/// The share of each function in the samples of `perf record`, in percent.
fn perf_shares(command: Command) -> Result<Vec<(String, f64)>> {
    let dir = tempfile::tempdir()?;
    let data = dir.path().join("perf.data");
    let mut record = Command::new("perf");
    record
        .args(["record", "--quiet", "--event", "cpu-clock", "--freq", "999", "--output"])
        .arg(&data)
        .arg(command.get_program())
        .args(command.get_args());
    let status = record.stdout(Stdio::null()).status().context("start perf")?;
    ensure!(status.success(), "{record:?}: {status}");
    perf_report(&data)
}

/// The share of each function in the samples that `perf record` wrote to that file, in percent.
pub(crate) fn perf_report(data: &Path) -> Result<Vec<(String, f64)>> {
    let report = Command::new("perf")
        .args(["report", "--stdio", "--fields", "overhead,sym", "--field-separator", ";"])
        .args(["--no-children", "--call-graph", "none", "--percent-limit", "0.1", "--input"])
        .arg(data)
        .output()
        .context("start perf")?;
    let text = String::from_utf8(report.stdout)?;
    // 70.01%;[.] split::hot_a
    let shares = text.lines().filter_map(|line| {
        let (share, symbol) = line.split_once(';')?;
        let share = share.trim().trim_end_matches('%').parse().ok()?;
        Some((symbol.trim().trim_start_matches("[.] ").to_owned(), share))
    });
    Ok(shares.collect())
}

fn syscalls_are_kernel_time() -> Result<()> {
    let load = Workload::start(workload("syscalls")?)?;
    let stat = format!("/proc/{}/stat", load.pid());
    let (user, system) = wait_for("a second of CPU time", Duration::from_secs(30), || {
        let stat = fs::read_to_string(&stat)?;
        // Behind the name, which may hold anything: field 3, and on; 14 and 15 are times.
        let fields = stat.rsplit_once(')').context("no name")?.1.split_whitespace();
        let times: Vec<u64> = fields.skip(11).take(2).filter_map(|t| t.parse().ok()).collect();
        let [user, system] = times[..] else { anyhow::bail!("no times in {stat:?}") };
        Ok((user + system >= 100).then_some((user, system)))
    })?;
    load.stop()?;
    assert!(system > 9 * user, "{user} ticks in user mode, {system} in the kernel");
    Ok(())
}

fn loss_makes_retransmits() -> Result<()> {
    let pair = NetPair::new()?;
    for (address, port) in
        [(NetPair::RECEIVER_V4.to_owned(), 7001), (format!("[{}]", NetPair::RECEIVER_V6), 7002)]
    {
        let address = format!("{address}:{port}");
        let lossy = pair.lose(2, port)?;
        let before = pair.sender.counter("Tcp", "RetransSegs")?;
        let mut listen = workload("pump")?;
        listen.args(["listen", &address]);
        pair.receiver.enter(&mut listen)?;
        let sink = Workload::start(listen)?;
        assert_eq!(sink.detail(), address);
        let hits = PerfStat::all_cpus("tcp:tcp_retransmit_skb")?;
        let mut send = workload("pump")?;
        send.args(["send", &address, "--seconds", "3"]);
        pair.sender.enter(&mut send)?;
        let sent = number(&Workload::start(send)?.finish(Duration::from_secs(60))?, "bytes")?;
        let hits = hits.stop()?;
        let lost = lossy.packets()?;
        let segments = pair.sender.counter("Tcp", "RetransSegs")? - before;
        let read = number(&sink.stop()?, "bytes")?;
        assert!(sent > 0.0 && read > 0.0 && read <= sent, "{sent} sent, {read} read");
        // perf's count is of the whole machine: others may retransmit too.
        assert!(lost > 0 && hits > 0 && segments > 0, "{lost} lost, {hits} hits, {segments} sent");
    }
    drop(pair);
    assert_eq!(left_behind(), 0);
    Ok(())
}

fn forks_keep_their_rate() -> Result<()> {
    let mut command = workload("forks")?;
    command.args(["--per-second", "100", "--ms", "1", "--seconds", "3"]);
    let (executed, json) = perf_stat("sched:sched_process_exec", &command)?;
    let started = number(&json, "started")?;
    assert!(close(started, 300.0, 0.05), "{started} started in 3 s at 100 a second");
    // And one for the workload itself.
    assert_eq!(executed as f64, started + 1.0);
    Ok(())
}

fn cgroups_hold_what_starts_in_them() -> Result<()> {
    let cgroup = Cgroup::new("podflame-test/inner")?;
    let mut command = workload("split")?;
    cgroup.enter(&mut command)?;
    let load = Workload::start(command)?;
    let seen = fs::read_to_string(format!("/proc/{}/cgroup", load.pid()))?;
    let path = seen.lines().find_map(|line| line.strip_prefix("0::"));
    assert_eq!(path, cgroup.path().to_str());
    assert!(cgroup.id()? > 1);
    // Dropped with a process inside: it ends both.
    let path = cgroup.path();
    drop(cgroup);
    assert!(load.stop().is_err(), "the workload of {} outlived it", path.display());
    Ok(())
}

fn stacks_are_distinct() -> Result<()> {
    let mut command = workload("stacks")?;
    command.args(["--distinct", "1000", "--microseconds", "1", "--seconds", "0.5"]);
    let json = Workload::start(command)?.finish(Duration::from_secs(10))?;
    let visited = number(&json, "visited")?;
    assert!(visited > 1000.0, "{visited} stacks visited");
    let mut command = workload("stacks")?;
    command.args(["--depth", "1000", "--seconds", "0.1"]);
    let json = Workload::start(command)?.finish(Duration::from_secs(10))?;
    assert_eq!(number(&json, "visited")?, 1.0);
    Ok(())
}

fn workloads_die_when_dropped() -> Result<()> {
    let load = Workload::start(workload("split")?)?;
    let proc = format!("/proc/{}", load.pid());
    assert!(fs::exists(&proc)?);
    drop(load);
    assert!(!fs::exists(&proc)?);
    // One that cannot do its work is no workload.
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let mut command = workload("pump")?;
    command.args(["listen", &taken.local_addr()?.to_string()]).stderr(Stdio::null());
    let error = Workload::start(command).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(error.contains("ended before it was ready"), "{error:?}");
    Ok(())
}

fn programs_of_bpf_are_listed() -> Result<()> {
    let _counting = bpf::count_runs()?;
    // Whatever else this machine runs, nothing of podflame is left from an earlier test.
    let (first, second) = (bpf::programs()?, bpf::programs()?);
    for (id, program) in &first {
        let later = second.get(id);
        assert!(later.is_none_or(|later| later.runs >= program.runs), "{program:?}, {later:?}");
    }
    Ok(())
}

fn waiting_ends() -> Result<()> {
    let mut looks = 0;
    let third = wait_for("three looks", Duration::from_secs(5), || {
        looks += 1;
        Ok((looks == 3).then_some(looks))
    })?;
    assert_eq!(third, 3);
    let error = wait_for("nothing", Duration::from_millis(10), || Ok(None::<()>)).err();
    assert_eq!(error.map(|error| error.to_string()).as_deref(), Some("waited 10ms for nothing"));
    Ok(())
}
