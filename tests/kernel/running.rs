//! podflame as users run it: recordings, agents, and the commands that ask an agent.

use std::{
    fs::{self, File},
    io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use podflame_tests::{podflame, wait_for};
use serde_json::Value;
use tempfile::TempDir;

use crate::bpf;

/// Longer than podflame takes to start or to stop on a machine that is busy with others.
const LIMIT: Duration = Duration::from_secs(60);

/// A process whose output goes to files. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    dir: TempDir,
}

impl Running {
    /// Starts it.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let child = command
            .stdin(Stdio::null())
            .stdout(File::create(dir.path().join("stdout"))?)
            .stderr(File::create(dir.path().join("stderr"))?)
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        Ok(Self { child, dir })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to standard output so far.
    pub(crate) fn stdout(&self) -> Result<String> {
        Ok(fs::read_to_string(self.dir.path().join("stdout"))?)
    }

    /// What it wrote to standard error so far.
    pub(crate) fn stderr(&self) -> Result<String> {
        Ok(fs::read_to_string(self.dir.path().join("stderr"))?)
    }

    /// Waits until a condition holds, which it shall reach while it runs.
    pub(crate) fn until<T>(
        &mut self,
        what: &str,
        mut condition: impl FnMut(&Self) -> Result<Option<T>>,
    ) -> Result<T> {
        wait_for(what, LIMIT, || {
            if let Some(found) = condition(self)? {
                return Ok(Some(found));
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended before: {status}: {}", self.stderr()?);
            }
            Ok(None)
        })
    }

    pub(crate) fn signal(&self, signal: libc::c_int) {
        // SAFETY: kill touches no memory; the child has not been waited for, so the ID is its own.
        unsafe { libc::kill(self.child.id().cast_signed(), signal) };
    }

    /// Waits for its end.
    pub(crate) fn end(&mut self) -> Result<ExitStatus> {
        wait_for("a process to end", LIMIT, || Ok(self.child.try_wait()?))
    }

    /// Waits for its end, which has to be a good one.
    pub(crate) fn succeed(&mut self) -> Result<()> {
        let status = self.end()?;
        ensure!(status.success(), "{status}: {}", self.stderr()?);
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// `podflame record`.
pub(crate) struct Recording(Running);

impl Recording {
    /// Starts to record retransmits with these further arguments. Every probe is attached when it
    /// returns.
    pub(crate) fn retransmits(arguments: &[&str]) -> Result<Self> {
        let mut command = podflame()?;
        command.args(["record", "--signal", "retransmit", "--seconds", "600"]).args(arguments);
        // Relative to the directory that it is started in.
        command.args(["--output", "profile", "--summary", "summary"]);
        let dir = tempfile::tempdir()?;
        let mut running = Running::start(command.current_dir(dir.path()))?;
        running.dir = dir;
        running.until("the probes to be attached", |running| {
            // Retransmits, those of SYN-ACKs, and senders; cgroups that come and that go.
            Ok((bpf::held(running.pid())?.links.len() == 5).then_some(()))
        })?;
        Ok(Self(running))
    }

    /// Ends it and returns the summary and the file.
    pub(crate) fn stop(mut self) -> Result<(Value, String)> {
        self.0.signal(libc::SIGINT);
        self.0.succeed()?;
        let dir = self.0.dir.path();
        let summary = serde_json::from_slice(&fs::read(dir.join("summary"))?)?;
        Ok((summary, fs::read_to_string(dir.join("profile"))?))
    }
}

/// `podflame agent` on a socket of its own.
pub(crate) struct Agent {
    pub(crate) running: Running,
    dir: TempDir,
}

impl Agent {
    /// Starts it with these further arguments. Its probes are attached when it returns.
    pub(crate) fn start(arguments: &[&str]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let running = Self::run(&Self::socket_in(dir.path()), arguments)?;
        let mut agent = Self { running, dir };
        agent.attached()?;
        Ok(agent)
    }

    /// Runs an agent on that socket, which may fail.
    pub(crate) fn run(socket: &Path, arguments: &[&str]) -> Result<Running> {
        let mut command = podflame()?;
        command.args(["agent", "--flush-ms", "100", "--socket"]).arg(socket).args(arguments);
        Running::start(&mut command)
    }

    /// Starts another one on the socket of one that died.
    pub(crate) fn restart(&mut self) -> Result<()> {
        self.running = Self::run(&self.socket(), &[])?;
        self.attached()
    }

    fn attached(&mut self) -> Result<()> {
        let socket = self.socket();
        let refused = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
        };
        self.running.until("the agent to answer", |_| match UnixStream::connect(&socket) {
            Ok(_) => Ok(Some(())),
            Err(error) if refused(&error) => Ok(None),
            Err(error) => Err(error.into()),
        })?;
        self.running.until("the agent to attach its probes", |running| {
            Ok(running.stderr()?.contains("profiling").then_some(()))
        })
    }

    pub(crate) fn socket(&self) -> PathBuf {
        Self::socket_in(self.dir.path())
    }

    fn socket_in(dir: &Path) -> PathBuf {
        dir.join("run/podflame.sock")
    }

    /// A command that asks it.
    pub(crate) fn ask(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = podflame()?;
        command.args(arguments).arg("--connect").arg(format!("unix://{}", self.socket().display()));
        Ok(command)
    }

    /// The answer of a command that has to succeed.
    pub(crate) fn answer(&self, arguments: &[&str]) -> Result<Vec<u8>> {
        let Output { status, stdout, stderr } = self.ask(arguments)?.output()?;
        ensure!(status.success(), "{arguments:?}: {status}: {}", String::from_utf8_lossy(&stderr));
        Ok(stdout)
    }

    /// Starts `podflame watch`; it is subscribed when this returns.
    pub(crate) fn watch(&self, arguments: &[&str]) -> Result<Running> {
        let mut command = self.ask(&["watch"])?;
        let mut watch = Running::start(command.args(arguments))?;
        watch.until("the header of a stream", |watch| {
            Ok(watch.stdout()?.contains(r#""type":"header""#).then_some(()))
        })?;
        Ok(watch)
    }

    /// Ends it as an init system does.
    pub(crate) fn terminate(&mut self) -> Result<()> {
        self.running.signal(libc::SIGTERM);
        self.running.succeed()
    }
}

/// The lines of a stream, each a JSON object.
pub(crate) fn lines(text: &str) -> Result<Vec<Value>> {
    let parse = |line| serde_json::from_str(line).with_context(|| format!("parse {line:?}"));
    text.lines().map(parse).collect()
}

/// A count in JSON by its pointer.
pub(crate) fn count(json: &Value, pointer: &str) -> Result<u64> {
    let value = json.pointer(pointer).with_context(|| format!("no {pointer} in {json}"))?;
    value.as_u64().with_context(|| format!("{pointer}: {value}"))
}

/// The sum of an object of counts.
pub(crate) fn sum(json: &Value, pointer: &str) -> Result<u64> {
    let counts = json.pointer(pointer).and_then(Value::as_object);
    let counts = counts.with_context(|| format!("no {pointer} in {json}"))?;
    Ok(counts.values().filter_map(Value::as_u64).sum())
}

/// Checks E1 to E3 of a probe's account, as it is when nothing is on its way any more. The kernel has to
/// count from before the start.
pub(crate) fn account_adds_up(account: &Value) -> Result<()> {
    let of = |name: &str| count(account, &format!("/{name}"));
    // The kernel's count is not known before the first run.
    let runs = account["run_count"].as_u64().unwrap_or(0);
    ensure!(runs == of("hits")?, "E1: {account}");
    let dropped = sum(account, "/dropped_in_kernel")?;
    ensure!(of("hits")? == of("stored")? + dropped + of("filtered")?, "E2: {account}");
    let used = of("aggregated")? + sum(account, "/dropped_in_agent")?;
    // This probe only keeps stacks for another.
    ensure!(of("stored")? == used || account["probe"] == "sender", "E3: {account}");
    Ok(())
}
