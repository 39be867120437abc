//! Recording stacks of real programs, with gdb as the judge, for the tests of the stack walk.
//!
//! By hand: the recordings depend on the machine's programs, and the tests on what was committed.
//! `tests/stacks` stops the programs; the tests of `agent/src/unwinder/cases` cut out what a walk needs.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    setup,
    shell::{cargo, progress, root, run, target},
};

/// Replaces all cases in `agent/src/unwinder/cases/testdata`.
///
/// # Errors
/// When a tool cannot be installed, or a program cannot be built or recorded.
pub(crate) fn record() -> Result<()> {
    setup::apt(
        &["gdb", "gdb-multiarch", "qemu-user", "python3", "gcc", "g++", "musl-tools"],
        &["gdb", "gdb-multiarch", "qemu-aarch64", "python3", "gcc", "g++", "musl-gcc"],
    )?;
    setup::apt(
        &["gcc-aarch64-linux-gnu", "g++-aarch64-linux-gnu"],
        &["aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++"],
    )?;
    let raw = target().join("stacks");
    if raw.exists() {
        fs::remove_dir_all(&raw).with_context(|| format!("remove {}", raw.display()))?;
    }
    progress("recording stacks under gdb (four minutes)");
    run(Command::new("python3").arg(root().join("tests/stacks/record.py")).arg(&raw))?;
    let cases = root().join("agent/src/unwinder/cases/testdata");
    fs::remove_dir_all(&cases).with_context(|| format!("remove {}", cases.display()))?;
    progress("cutting out what a walk needs");
    run(cargo()
        .args(["test", "--quiet", "--package", "podflame", "--lib", "record_cases"])
        .env("PODFLAME_STACKS", &raw))?;
    progress("walking them again");
    run(cargo().args(["test", "--quiet", "--package", "podflame", "--lib", "unwinder::cases"]))
}
