//! Stacks by `perf record --call-graph dwarf`, which knows nothing of podflame: it copies the top of each
//! stack out of the kernel, and `perf script` unwinds the copies later.

use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    ops::Range,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::perf_control::Perf;

/// `perf record` at work. Dropping it ends it.
#[derive(Debug)]
pub struct PerfRecord(Perf);

/// What it recorded.
#[derive(Debug)]
pub struct PerfSamples(Perf);

impl PerfRecord {
    /// Samples every CPU so often a second, with a timer for each of these rates, and copies 8 KiB of
    /// each stack, as perf does by default; it samples when this returns.
    ///
    /// The timers are the CPUs' and not the processes': such a one begins anew when its process is
    /// switched to, and so favours what is done then. All are in one perf, since kernels garble the
    /// records of new BPF programs (`PERF_RECORD_KSYMBOL`) where two of them watch the same CPU.
    ///
    /// # Errors
    /// When perf is missing.
    pub fn all_cpus(rates: &[u32]) -> Result<Self> {
        let rates = rates.iter().map(|rate| format!("cpu-clock/freq={rate},name=hz{rate}/"));
        let words = ["record", "--all-cpus", "--no-bpf-event", "--clockid", "CLOCK_MONOTONIC"];
        let more = ["--call-graph", "dwarf,8192", "--mmap-pages", "64M", "--realtime", "1"];
        let more = [&more[..], &["--output", "perf.data"]].concat();
        let event = ["--event", &rates.collect::<Vec<_>>().join(",")];
        let mut perf = Perf::start(&words, &[&more[..], &event].concat())?;
        perf.tell("enable")?;
        Ok(Self(perf))
    }

    /// Ends the recording.
    ///
    /// # Errors
    /// When perf fails.
    pub fn stop(mut self) -> Result<PerfSamples> {
        self.0.tell("disable")?;
        let report = self.0.end()?;
        ensure!(self.0.dir().join("perf.data").exists(), "perf record: {report}");
        Ok(PerfSamples(self.0))
    }
}

impl PerfSamples {
    /// The stacks of these processes at these nanoseconds on `CLOCK_MONOTONIC`: by which rate each was
    /// sampled, and of each frame the function, mangled, and the file, innermost first. Inlined functions
    /// have no frame. At most `depth` frames of user code are unwound.
    ///
    /// # Errors
    /// When perf fails, or has lost one sample for a hundred that it has.
    pub fn stacks(
        &self,
        pids: &[u32],
        at: Range<u64>,
        depth: usize,
        mut take: impl FnMut(u32, &[(&str, &str)]),
    ) -> Result<()> {
        let pids = pids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let errors = self.0.dir().join("errors");
        let mut script = Command::new("perf")
            .args(["script", "--input", "perf.data", "--no-inline", "--no-demangle", "--ns"])
            .args([
                "--max-stack",
                &depth.to_string(),
                "--pid",
                &pids,
                "--show-lost-events",
                "--fields",
                "event,time,ip,sym,dso",
            ])
            .current_dir(self.0.dir())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&errors)?)
            .spawn()
            .context("start perf script")?;
        let stdout = script.stdout.take().context("perf without standard output")?;
        let (mut within, mut stack) = (None, Vec::new());
        let (mut samples, mut lost) = (0, 0);
        for line in BufReader::new(stdout).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            if let Some((_, number)) = line.split_once("PERF_RECORD_LOST lost ") {
                lost += number.trim().parse::<u64>()?;
                continue;
            }
            // A line with the time and the event, one for each frame, and an empty one.
            if line.is_empty() {
                let frames: Vec<_> = stack.iter().map(|line: &String| frame(line)).collect();
                if let Some(rate) = within.take() {
                    take(rate, &frames);
                }
                stack.clear();
            } else if let Some((time, rate)) = head(&line) {
                within = at.contains(&time).then_some(rate);
                samples += 1;
            } else {
                stack.push(line);
            }
        }
        let status = script.wait()?;
        let errors = std::fs::read_to_string(errors)?;
        ensure!(status.success(), "perf script: {status}: {errors}");
        ensure!(
            lost * 100 < samples,
            "perf lost {lost} samples and has {samples} of the processes"
        );
        Ok(())
    }
}

/// Nanoseconds and rate of a line such as `23423.516622849: hz997:`.
fn head(line: &str) -> Option<(u64, u32)> {
    let (time, event) = line.trim().strip_suffix(':')?.split_once(':')?;
    let (seconds, nanoseconds) = time.split_once('.')?;
    let seconds: u64 = seconds.parse().ok()?;
    let rate = event.trim().strip_prefix("hz")?.parse().ok()?;
    Some((seconds * 1_000_000_000 + nanoseconds.parse::<u64>().ok()?, rate))
}

/// Function and file of a line such as `ef96d sqlite3_step (/usr/lib/libsqlite3.so.0)`.
fn frame(line: &str) -> (&str, &str) {
    let line = line.trim_start();
    let line = line.split_once(' ').map_or("", |(_, rest)| rest).trim_end();
    // Names may have parentheses and spaces, files may have neither at their beginning.
    match line.rsplit_once(" (") {
        Some((function, file)) => (function, file.strip_suffix(')').unwrap_or(file)),
        None => (line, ""),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn lines_of_perf_are_read() {
        assert_eq!(head("23423.516622849: hz997: ").unwrap(), (23_423_516_622_849, 997));
        assert_eq!(head("\t ef96d a.b::c (d)"), None);
        assert_eq!(frame("\t  ef96d step (/usr/lib/a.so)"), ("step", "/usr/lib/a.so"));
        let cpp = "\t 1 a::b(int, char (*)(c)) const (//anon)";
        assert_eq!(frame(cpp), ("a::b(int, char (*)(c)) const", "//anon"));
        assert_eq!(frame("\t ffff [unknown] ([unknown])"), ("[unknown]", "[unknown]"));
        assert_eq!(frame("12"), ("", ""));
    }
}
