//! Counts by `perf stat`, which knows nothing of podflame.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::perf_control::Perf;

/// `perf stat` at work. Dropping it ends it.
#[derive(Debug)]
pub struct PerfStat(Perf);

impl PerfStat {
    /// Counts an event such as `page-faults` on all CPUs, whoever causes it; it counts when this
    /// returns.
    ///
    /// # Errors
    /// When perf is missing, or does not know the event.
    pub fn all_cpus(event: &str) -> Result<Self> {
        Self::start(event, &[])
    }

    /// Counts a tracepoint where the fields of its record fit, in the syntax of the kernel's filters.
    ///
    /// # Errors
    /// As [`PerfStat::all_cpus`], and when there is no such field.
    pub fn tracepoint_if(event: &str, filter: &str) -> Result<Self> {
        Self::start(event, &["--filter", filter])
    }

    fn start(event: &str, more: &[&str]) -> Result<Self> {
        let words = ["stat", "--field-separator", ",", "--all-cpus", "--event", event];
        let mut perf = Perf::start(&words, more)?;
        perf.tell("enable")?;
        Ok(Self(perf))
    }

    /// Ends the counting and returns the count.
    ///
    /// # Errors
    /// When perf fails, or could not count all of the time.
    pub fn stop(mut self) -> Result<u64> {
        self.0.tell("disable")?;
        let report = self.0.end()?;
        parse(&report).with_context(|| format!("perf stat wrote {report:?}"))
    }
}

/// Runs a workload to its end, and counts an event of it and of the processes that it starts.
///
/// Returns the count, and what the workload wrote after `ready`.
///
/// # Errors
/// When perf is missing or does not know the event, or when the workload fails.
pub fn perf_stat(event: &str, workload: &Command) -> Result<(u64, String)> {
    let out = Command::new("perf")
        .args(["stat", "--field-separator", ",", "--event", event, "--"])
        .arg(workload.get_program())
        .args(workload.get_args())
        .stdin(Stdio::null())
        .output()
        .context("start perf: run the tests by `cargo xtask test`")?;
    let report = String::from_utf8_lossy(&out.stderr);
    if !out.status.success() {
        bail!("perf stat of {workload:?}: {}: {report}", out.status);
    }
    let count = parse(&report).with_context(|| format!("perf stat wrote {report:?}"))?;
    let written = String::from_utf8(out.stdout)?;
    let rest = written.split_once('\n').map_or("", |(_, rest)| rest);
    Ok((count, rest.to_owned()))
}

/// The count in `value,unit,event,time running,percent,…`.
fn parse(report: &str) -> Result<u64> {
    let line = report.lines().find(|line| line.contains(',')).context("no count")?;
    let mut fields = line.split(',');
    let value = fields.next().unwrap_or_default();
    let percent: f64 = fields.nth(3).context("no percentage")?.parse()?;
    if percent < 100.0 {
        bail!("it counted {percent} % of the time only");
    }
    value.parse().with_context(|| format!("not counted: {value:?}"))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_and_partial_ones_refused() {
        assert_eq!(parse("1234,,page-faults,1000,100.00,,\n").unwrap(), 1234);
        assert_eq!(parse("note\n7,,page-faults:u,1000,100.00,3,K/sec\n").unwrap(), 7);
        assert!(parse("1234,,cycles,500,50.00,,\n").is_err());
        assert!(parse("<not supported>,,cycles,0,100.00,,\n").is_err());
        assert!(parse("").is_err());
    }
}
