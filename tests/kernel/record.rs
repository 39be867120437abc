//! `podflame record` as users run it, and what it left behind: the file and the summary.
//!
//! Every recording that ends here is checked for its loss account, so that each test is one of the
//! equations E1 to E4 too.

use std::{
    ffi::OsStr,
    fs,
    io::Read as _,
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use podflame_tests::{podflame, wait_for};
use serde_json::Value;
use tempfile::TempDir;

use crate::bpf;

/// Longer than a start takes on a machine that is busy with others.
const STARTED: Duration = Duration::from_secs(30);

/// Longer than naming the functions of a whole busy node takes, debug information included.
const NAMED: Duration = Duration::from_secs(120);

/// A recording at work. Dropping it kills it.
pub(crate) struct Recording {
    child: Child,
    dir: TempDir,
    /// The kernel counts runs as long as this is open, for E1.
    _counting: std::os::fd::OwnedFd,
}

/// What a recording came to.
pub(crate) struct Recorded {
    /// The document of `--format json`.
    pub(crate) profile: Value,
    /// What `--summary` wrote.
    pub(crate) summary: Value,
}

/// `podflame record` with these words behind, not started.
pub(crate) fn command<S: AsRef<OsStr>>(arguments: &[S]) -> Result<Command> {
    let mut command = podflame()?;
    command.arg("record").args(arguments).stdin(Stdio::null());
    Ok(command)
}

/// Runs `podflame record` with these words behind to its end.
pub(crate) fn output<S: AsRef<OsStr>>(arguments: &[S]) -> Result<Output> {
    command(arguments)?.output().context("start podflame")
}

impl Recording {
    /// Starts a recording with these words behind, which last for an hour if they do not say how
    /// long. When this returns, every probe is attached.
    pub(crate) fn start<S: AsRef<OsStr>>(arguments: &[S]) -> Result<Self> {
        let counting = bpf::count_runs()?;
        let dir = tempfile::tempdir()?;
        let mut command = command(arguments)?;
        if !arguments.iter().any(|word| word.as_ref() == "--seconds") {
            command.args(["--seconds", "3600"]);
        }
        let child = command
            .args(["--format", "json", "--output"])
            .arg(dir.path().join("profile.json"))
            .arg("--summary")
            .arg(dir.path().join("summary.json"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let mut recording = Self { child, dir, _counting: counting };
        // Its threads start once all probes are attached, and before that it takes Ctrl-C.
        wait_for("podflame to record", STARTED, || {
            if let Some(status) = recording.child.try_wait()? {
                anyhow::bail!("podflame ended early: {status}: {}", recording.stderr()?);
            }
            Ok(resolves(recording.pid())?.then_some(()))
        })?;
        Ok(recording)
    }

    /// Its process ID.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: libc::c_int) {
        // SAFETY: kill touches no memory; the child has not been waited for, so the ID is its own.
        unsafe { libc::kill(self.pid().cast_signed(), signal) };
    }

    /// Kills it as the kernel does when memory is short, and waits until it is gone.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        let status = self.child.wait()?;
        ensure!(status.signal() == Some(libc::SIGKILL), "not killed but {status}");
        Ok(())
    }

    /// Interrupts it, which keeps what was gathered, and takes that.
    pub(crate) fn stop(self) -> Result<Recorded> {
        self.signal(libc::SIGINT);
        self.finish()
    }

    /// Waits for its end and takes what it gathered.
    pub(crate) fn finish(mut self) -> Result<Recorded> {
        let status = wait_for("a recording to end", NAMED, || Ok(self.child.try_wait()?))?;
        let stderr = self.stderr()?;
        ensure!(status.success(), "podflame: {status}: {stderr}");
        let mut names: Vec<_> = fs::read_dir(self.dir.path())?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<Result<_, _>>()?;
        names.sort();
        assert_eq!(names, ["profile.json", "summary.json"], "what it left behind");
        let recorded = Recorded {
            profile: read_json(&self.dir.path().join("profile.json"))?,
            summary: read_json(&self.dir.path().join("summary.json"))?,
        };
        recorded.check_account();
        Ok(recorded)
    }

    /// What it wrote, once it has ended. It is far less than a pipe holds.
    fn stderr(&mut self) -> Result<String> {
        let mut text = String::new();
        if let Some(mut pipe) = self.child.stderr.take() {
            pipe.read_to_string(&mut text)?;
        }
        Ok(text)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Whether podflame's last thread has started.
fn resolves(pid: u32) -> Result<bool> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))?;
    let names = threads.filter_map(|thread| fs::read(thread.ok()?.path().join("comm")).ok());
    Ok(names.into_iter().any(|name| name == b"resolver\n"))
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("parse {}", path.display()))
}

impl Recorded {
    /// The samples of the profile.
    pub(crate) fn samples(&self) -> impl Iterator<Item = Sample<'_>> {
        self.profile["samples"].as_array().into_iter().flatten().map(Sample)
    }

    /// Weight of the samples for which that holds.
    pub(crate) fn weight(&self, that: impl Fn(&Sample<'_>) -> bool) -> u64 {
        self.samples().filter(that).map(|sample| sample.weight()).sum()
    }

    /// The part of all weight that is in samples for which that holds, in percent.
    pub(crate) fn percent(&self, that: impl Fn(&Sample<'_>) -> bool) -> f64 {
        100.0 * self.weight(that) as f64 / self.weight(|_| true) as f64
    }

    /// A number of the account of a probe, by its path such as `/dropped_in_kernel/ring_full`.
    pub(crate) fn count(&self, probe: &str, path: &str) -> u64 {
        self.summary["account"][probe].pointer(path).and_then(Value::as_u64).unwrap_or(0)
    }

    /// The equations, from the numbers themselves and not from podflame's own check alone.
    fn check_account(&self) {
        assert_eq!(self.summary["violations"], Value::Array(Vec::new()), "{}", self.summary);
        let probes = self.summary["account"].as_object().into_iter().flatten();
        let (mut active, mut aggregated) = (0, 0);
        for (probe, account) in probes {
            let count = |path: &str| self.count(probe, path);
            let dropped = |whose: &str| -> u64 {
                let reasons = account[whose].as_object().into_iter().flatten();
                reasons.filter_map(|(_, n)| n.as_u64()).sum()
            };
            // E1. The kernel's count of a program that never ran cannot be told from none.
            assert_eq!(count("/run_count"), count("/hits"), "E1 {probe}: {account}");
            let ends = count("/stored") + dropped("dropped_in_kernel") + count("/filtered");
            assert_eq!(count("/hits"), ends, "E2 {probe}: {account}");
            let used = count("/aggregated") + dropped("dropped_in_agent");
            // This one keeps what it stores with the socket, and sends nothing.
            assert!(probe == "sender" || count("/stored") == used, "E3 {probe}: {account}");
            active += 1;
            aggregated += count("/aggregated");
        }
        assert!(active > 0, "no probe in {}", self.summary);
        // E4, for the one client there is: the file.
        let delivered: u64 = self.samples().map(|sample| sample.count()).sum();
        assert_eq!(delivered, aggregated, "E4: {}", self.summary);
        assert_eq!(self.summary["samples"].as_u64(), Some(delivered));
    }
}

/// A sample of the JSON document.
pub(crate) struct Sample<'a>(&'a Value);

impl<'a> Sample<'a> {
    /// How many events it stands for.
    pub(crate) fn count(&self) -> u64 {
        self.0["count"].as_u64().unwrap_or(0)
    }

    /// What they weigh.
    pub(crate) fn weight(&self) -> u64 {
        self.0["weight"].as_u64().unwrap_or(0)
    }

    /// The process it was taken of.
    pub(crate) fn pid(&self) -> u32 {
        self.0["pid"].as_u64().and_then(|pid| pid.try_into().ok()).unwrap_or(0)
    }

    /// Its frames of a kind (`user`, `kernel`, `annotation`), innermost first, without the inlined
    /// ones: these are a part of the frame that is left.
    pub(crate) fn frames(&self, kind: &'static str) -> impl Iterator<Item = &'a str> {
        let frames = self.0["stack"].as_array().into_iter().flatten().rev();
        let frames = frames.filter(move |f| f["kind"] == kind && f["inlined"] == false);
        frames.filter_map(|frame| frame["name"].as_str())
    }

    /// All its frames, outermost first.
    pub(crate) fn all(&self) -> impl DoubleEndedIterator<Item = &'a Value> {
        self.0["stack"].as_array().into_iter().flatten()
    }

    /// Whether a function, by the end of its path, is on the stack.
    pub(crate) fn has(&self, function: &str) -> bool {
        ["user", "kernel", "python"]
            .iter()
            .any(|kind| self.frames(kind).any(|name| is(name, function)))
    }

    /// Whether a function is where the code was, kernel frames aside.
    pub(crate) fn is_in(&self, function: &str) -> bool {
        self.frames("user").next().is_some_and(|name| is(name, function))
    }
}

/// Whether a name such as `split::hot_a` is of that function.
fn is(name: &str, function: &str) -> bool {
    name.rsplit("::").next() == Some(function)
}
