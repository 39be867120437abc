//! Starting workloads and podflame, and never leaving one behind.

use std::{
    env,
    io::{BufRead as _, BufReader, Read as _},
    path::PathBuf,
    process::{Child, ChildStdout, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::wait_for;

/// Longer than any program here takes to start or to stop on a machine that is busy with others.
const LIMIT: Duration = Duration::from_secs(30);

/// A command for the workload of that name, one of `tests/workloads/`.
///
/// # Errors
/// When the tests are not run by `cargo xtask test`, which builds the workloads.
pub fn workload(name: &str) -> Result<Command> {
    Ok(Command::new(tool("PODFLAME_WORKLOADS")?.join(name)))
}

/// A command for podflame as users run it.
///
/// # Errors
/// When the tests are not run by `cargo xtask test`, which builds podflame.
pub fn podflame() -> Result<Command> {
    Ok(Command::new(tool("PODFLAME_BIN")?))
}

/// The path in a variable that `cargo xtask test` sets: of a program, or of where programs are.
///
/// # Errors
/// When the variable is not set, or nothing is at that path.
pub fn tool(variable: &str) -> Result<PathBuf> {
    let path = env::var_os(variable)
        .map(PathBuf::from)
        .with_context(|| format!("{variable} is not set: run the tests by `cargo xtask test`"))?;
    if !path.exists() {
        bail!("{variable}: nothing at {}: run the tests by `cargo xtask test`", path.display());
    }
    Ok(path)
}

/// A running workload. Dropping it kills it.
#[derive(Debug)]
pub struct Workload {
    child: Child,
    stdout: BufReader<ChildStdout>,
    ready: String,
}

impl Workload {
    /// Starts a workload and waits until it says that it is ready.
    ///
    /// # Errors
    /// When it cannot be started, or ends before it is ready.
    pub fn start(command: Command) -> Result<Self> {
        Self::start_with(command, Stdio::null())
    }

    /// As [`start`](Self::start), with this as its input.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with(mut command: Command, input: Stdio) -> Result<Self> {
        let mut child = command
            .stdin(input)
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let stdout = child.stdout.take().context("a workload without standard output")?;
        // From here on, an early return kills it.
        let mut load = Self { child, stdout: BufReader::new(stdout), ready: String::new() };
        load.stdout.read_line(&mut load.ready)?;
        let Some(detail) = load.ready.strip_prefix("ready") else {
            bail!("{command:?} ended before it was ready; it wrote {:?}", load.ready);
        };
        load.ready = detail.trim().to_owned();
        Ok(load)
    }

    /// Its process ID.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote behind `ready`, such as the address on which it listens.
    #[must_use]
    pub fn detail(&self) -> &str {
        &self.ready
    }

    /// Asks it to stop and returns what it wrote at the end.
    ///
    /// # Errors
    /// When it does not stop in time or fails.
    pub fn stop(self) -> Result<String> {
        let pid = self.child.id().cast_signed();
        // SAFETY: kill touches no memory; the child has not been waited for, so the ID is its own.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        self.finish(LIMIT)
    }

    /// Waits for it to end by itself and returns what it wrote at the end.
    ///
    /// # Errors
    /// When it does not end within the limit, or fails.
    pub fn finish(mut self, limit: Duration) -> Result<String> {
        // What it writes after `ready` is far less than a pipe holds, so it never blocks on it.
        let status = wait_for("a workload to end", limit, || Ok(self.child.try_wait()?))?;
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest)?;
        if !status.success() {
            bail!("a workload failed: {status}; it wrote {rest:?}");
        }
        Ok(rest)
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
