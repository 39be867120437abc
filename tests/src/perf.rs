//! Counts by `perf stat`, which knows nothing of podflame.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::ffi::OsStrExt as _,
    path::PathBuf,
    process::{self, Child, ChildStderr, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::wait_for;

/// `perf stat` at work. Dropping it ends it.
#[derive(Debug)]
pub struct PerfStat {
    perf: Child,
    stderr: ChildStderr,
    control: File,
    answers: File,
    dir: PathBuf,
}

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
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("podflame-perf-{}-{count}", process::id()));
        fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
        let (control, answers) = (fifo(dir.join("control"))?, fifo(dir.join("answers"))?);
        let mut perf = Command::new("perf")
            .args(["stat", "--field-separator", ",", "--event", event])
            .args(more)
            .arg("--all-cpus")
            // Counts nothing until it is told to, and answers once it does.
            .args(["--delay", "-1", "--control"])
            .arg(format!("fifo:{0}/control,{0}/answers", dir.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start perf: run the tests by `cargo xtask test`")?;
        let stderr = perf.stderr.take().context("perf without standard error")?;
        let mut stat = Self { perf, stderr, control, answers, dir };
        stat.tell("enable")?;
        Ok(stat)
    }

    /// Ends the counting and returns the count.
    ///
    /// # Errors
    /// When perf fails, or could not count all of the time.
    pub fn stop(mut self) -> Result<u64> {
        self.tell("disable")?;
        // SAFETY: kill touches no memory; perf has not been waited for, so the ID is its own.
        unsafe { libc::kill(self.perf.id().cast_signed(), libc::SIGINT) };
        let mut report = String::new();
        self.stderr.read_to_string(&mut report)?;
        self.perf.wait()?;
        parse(&report).with_context(|| format!("perf stat wrote {report:?}"))
    }

    /// Sends a command and waits for the answer.
    fn tell(&mut self, command: &str) -> Result<()> {
        writeln!(self.control, "{command}")?;
        wait_for(&format!("perf to {command}"), Duration::from_secs(30), || {
            if let Some(status) = self.perf.try_wait()? {
                let mut error = String::new();
                self.stderr.read_to_string(&mut error)?;
                bail!("perf: {status}: {}", error.trim());
            }
            let mut answer = [0; 64];
            // Nothing to read is an error of this descriptor, which never blocks.
            let read = self.answers.read(&mut answer).unwrap_or(0);
            Ok(answer[..read].starts_with(b"ack").then_some(()))
        })
    }
}

impl Drop for PerfStat {
    fn drop(&mut self) {
        // These fail only if perf has ended, or the directory is gone already.
        drop(self.perf.kill());
        drop(self.perf.wait());
        drop(fs::remove_dir_all(&self.dir));
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

/// A named pipe, open both ways, so that opening it and writing to it never wait for the other end.
fn fifo(path: PathBuf) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let name = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the name is a C string that lives through the call.
    if unsafe { libc::mkfifo(name.as_ptr(), 0o600) } != 0 {
        let error = std::io::Error::last_os_error();
        return Err(error).with_context(|| format!("make {}", path.display()));
    }
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    options.open(&path).with_context(|| format!("open {}", path.display()))
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
