//! The conventions of this repository that neither rustfmt nor clippy knows, as a test.
//!
//! The rules are data, in `rules`; this file applies them to the files that git knows or would add.
//! Code generated from the .proto files is made at build time and never committed, so there is
//! nothing to compare it with.

mod rules;

use std::{env, fs, process::Command};

use anyhow::{Context as _, Result, bail};

use self::rules::{Line, violations};
use crate::{
    build_ebpf,
    shell::{cargo, output, progress, root},
};

/// Lines after which a file deserves a second look; see `rules` for where it ends.
const LOOK_AGAIN: usize = 500;

/// Checks every convention and prints each violation as `file:line: rule: remedy`.
///
/// # Errors
/// When there is a violation, or git or cargo cannot be asked.
pub(crate) fn tidy() -> Result<()> {
    progress("conventions");
    let list = output(Command::new("git").current_dir(root()).args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]))
    .context("list the files of the repository")?;
    let private = private_directories();
    let mut found = Vec::new();
    for file in list.split('\0').filter(|file| !file.is_empty()) {
        // A file can be in git's index and gone from the disk.
        let Ok(content) = fs::read(root().join(file)) else { continue };
        let text = String::from_utf8_lossy(&content);
        found.extend(violations(file, &text, &private));
        if file.ends_with(".rs") && text.lines().count() > LOOK_AGAIN {
            eprintln!("note: {file}: more than {LOOK_AGAIN} lines: is it still one subject?");
        }
    }
    for (at, check) in [
        ("agent-ebpf/podflame.bpf.o", build_ebpf::check(root())),
        ("Cargo.lock", lock_is_current()),
    ] {
        found.extend(check.err().map(|error| format!("{at}:1: {error:#}")));
    }
    for violation in &found {
        eprintln!("{violation}");
    }
    match found.len() {
        0 => Ok(()),
        1 => bail!("1 convention violated"),
        n => bail!("{n} conventions violated"),
    }
}

/// The directories that a path of this very machine would begin with.
fn private_directories() -> Vec<Line> {
    let home = env::home_dir().filter(|home| home.parent().is_some());
    let dirs = home.into_iter().chain([root().to_path_buf()]);
    dirs.map(|dir| Line::new(&format!("{}/", dir.display()))).collect()
}

fn lock_is_current() -> Result<()> {
    output(cargo().args(["metadata", "--locked", "--format-version", "1"]))
        .map(drop)
        .context("stale: run `cargo metadata` and commit the lock file")
}
