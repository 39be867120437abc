//! Running other programs: where the workspace is, progress lines, and errors that name the command.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use anyhow::{Context as _, Result, bail};

/// The directory of the workspace.
pub(crate) fn root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        // What cargo says at run time is right even where a `target/` was copied from elsewhere.
        let manifest =
            env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let manifest = PathBuf::from(manifest);
        manifest.parent().unwrap_or(&manifest).to_path_buf()
    })
}

/// Where chores keep what they build and install: never the user's own directories.
pub(crate) fn target() -> PathBuf {
    root().join("target")
}

/// Says on the terminal what happens next.
pub(crate) fn progress(what: impl AsRef<str>) {
    eprintln!("==> {}", what.as_ref());
}

/// A `cargo` that knows nothing of the cargo that started this program.
///
/// `cargo xtask` describes this package in `CARGO_PKG_*` and friends, which build scripts of a
/// nested build would take for their own or, where they watch them, rebuild on.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(describes_this_package) {
            command.env_remove(name);
        }
    }
    command
}

fn describes_this_package(name: &str) -> bool {
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "CARGO_PRIMARY_"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

/// Runs a command to its end, its output going to the terminal.
///
/// # Errors
/// When the command cannot be started or does not exit with 0; the message holds the command.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {}", display(command)))?;
    if !status.success() {
        bail!("{}: {status}", display(command));
    }
    Ok(())
}

/// Runs a command to its end and returns what it wrote to standard output, trimmed.
///
/// # Errors
/// When the command cannot be started or does not exit with 0.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let out = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("start {}", display(command)))?;
    if !out.status.success() {
        bail!("{}: {}", display(command), out.status);
    }
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

/// The path of a program on `PATH`.
pub(crate) fn which(program: &str) -> Option<PathBuf> {
    // Administration tools such as `ip` are not on the PATH of every account.
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// `PATH` with a directory put in front.
///
/// # Errors
/// When the directory's name holds a colon.
pub(crate) fn path_with(first: &Path) -> Result<std::ffi::OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = [first.to_path_buf()].into_iter().chain(env::split_paths(&path));
    env::join_paths(dirs).with_context(|| format!("put {} on PATH", first.display()))
}

fn display(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}
