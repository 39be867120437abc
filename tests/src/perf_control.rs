//! A perf that is told when to begin, and that says when it has begun.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    process::{self, Child, ChildStderr, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::wait_for;

/// perf at work, with a directory of its own. Dropping it ends it, and removes the directory.
#[derive(Debug)]
pub(crate) struct Perf {
    child: Child,
    stderr: ChildStderr,
    control: File,
    answers: File,
    dir: PathBuf,
}

impl Perf {
    /// Starts a subcommand that knows `--control`. It does nothing until it is told to.
    pub(crate) fn start(words: &[&str], more: &[&str]) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("podflame-perf-{}-{count}", process::id()));
        fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
        let (control, answers) = (fifo(dir.join("control"))?, fifo(dir.join("answers"))?);
        let mut child = Command::new("perf")
            .args(words)
            .args(more)
            .args(["--delay", "-1", "--control"])
            .arg(format!("fifo:{0}/control,{0}/answers", dir.display()))
            .current_dir(&dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start perf: run the tests by `cargo xtask test`")?;
        let stderr = child.stderr.take().context("perf without standard error")?;
        Ok(Self { child, stderr, control, answers, dir })
    }

    /// Where it was started.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Sends a command and waits for the answer.
    pub(crate) fn tell(&mut self, command: &str) -> Result<()> {
        writeln!(self.control, "{command}")?;
        wait_for(&format!("perf to {command}"), Duration::from_secs(30), || {
            if let Some(status) = self.child.try_wait()? {
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

    /// Interrupts it, waits for its end, and returns what it wrote to standard error.
    pub(crate) fn end(&mut self) -> Result<String> {
        // SAFETY: kill touches no memory; perf has not been waited for, so the ID is its own.
        unsafe { libc::kill(self.child.id().cast_signed(), libc::SIGINT) };
        let mut report = String::new();
        self.stderr.read_to_string(&mut report)?;
        self.child.wait()?;
        Ok(report)
    }
}

impl Drop for Perf {
    fn drop(&mut self) {
        // These fail only if perf has ended, or the directory is gone already.
        drop(self.child.kill());
        drop(self.child.wait());
        drop(fs::remove_dir_all(&self.dir));
    }
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
