//! Page faults: their number, their stacks, and the files behind them.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result};
use podflame_tests::{Cgroup, PerfStat, Workload, tool, workload};
use serde_json::Value;

use crate::{
    Test,
    record::{Recorded, Recording},
};

pub(crate) const TESTS: &[Test] = &[
    ("weights_sum_to_the_faults_that_perf_counts", weights_sum_to_the_faults_that_perf_counts),
    ("a_process_has_its_faults", a_process_has_its_faults),
    ("each_major_fault_has_its_file", each_major_fault_has_its_file),
];

/// Runs the workload in a cgroup that is recorded. Returns that, and what the workload wrote.
fn record_faults(words: &[&str]) -> Result<(Recorded, Value)> {
    let cgroup = Cgroup::new("podflame-faults")?;
    let path = cgroup.path();
    let recording = Recording::start(&[
        Path::new("--signal"),
        Path::new("page-fault"),
        Path::new("--cgroup"),
        &path,
    ])?;
    let mut command = workload("faults")?;
    command.args(words);
    cgroup.enter(&mut command)?;
    let json = Workload::start(command)?.finish(Duration::from_secs(60))?;
    Ok((recording.stop()?, serde_json::from_str(&json)?))
}

fn weights_sum_to_the_faults_that_perf_counts() -> Result<()> {
    let recording = Recording::start(&["--signal", "page-fault"])?;
    let minor = PerfStat::all_cpus("minor-faults")?;
    let mut command = workload("faults")?;
    command.args(["--count", "1000000"]);
    Workload::start(command)?.finish(Duration::from_secs(60))?;
    let minor = minor.stop()? as f64;
    let recorded = recording.stop()?;
    let ours = recorded.count("minor_fault", "/weight") as f64;
    // Of the whole machine, so that nothing can be charged to the wrong process. What the machine
    // did while perf was started and stopped is in one of the two only.
    let account = &recorded.summary["account"]["minor_fault"];
    assert!((ours / minor - 1.0).abs() < 0.01, "{ours} faults, perf counts {minor}: {account}");
    Ok(())
}

fn a_process_has_its_faults() -> Result<()> {
    let (recorded, own) = record_faults(&["--count", "1000000"])?;
    let own = own["minor"].as_f64().context("no number of faults")?;
    let ours = recorded.count("minor_fault", "/weight") as f64;
    // What is lost are the faults behind the last sample on each CPU, and one period at each switch
    // from and to another process: 32, while this one faults thousands of times.
    assert!((ours / own - 1.0).abs() < 0.02, "{ours} faults, the kernel counts {own}");
    let touching = recorded.percent(|sample| sample.is_in("touch_pages"));
    assert!(touching > 99.0, "{touching} % in touch_pages");
    let anonymous =
        recorded.percent(|s| s.frames("annotation").any(|a| a == "minor fault: [anon]"));
    assert!(anonymous > 99.0, "{anonymous} % of anonymous memory");
    Ok(())
}

fn each_major_fault_has_its_file() -> Result<()> {
    // Beside the workloads: /tmp may be kept in memory, where there are no major faults.
    let dir = tempfile::tempdir_in(tool("PODFLAME_WORKLOADS")?)?;
    let file = dir.path().join("pages");
    let name = file.to_str().context("a path that is not text")?;
    let words = ["--pages", "2000", "--count", "2000", "--file", name];
    let (recorded, own) = record_faults(&words)?;
    let own = own["major"].as_u64().context("no number of faults")?;
    assert!(own >= 1950, "{own} major faults in 2000 pages: does the file system keep a cache?");
    assert_eq!(recorded.count("major_fault", "/stored"), own);
    let mark = format!("major fault: {name}");
    let in_file = recorded.weight(|sample| {
        sample.frames("annotation").any(|a| a == mark) && sample.is_in("touch_file_pages")
    });
    // The rest are of the program itself and its libraries, should they not have been in memory.
    assert!((1950..=2000).contains(&in_file), "{in_file} faults in {name} of {own}");
    let major = recorded.weight(|s| s.frames("annotation").any(|a| a.starts_with("major fault: ")));
    assert_eq!(major, own);
    Ok(())
}
