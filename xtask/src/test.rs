//! Running every test with one command, and adding up what they say.
//!
//! Unit tests first; then the tests on the running kernel, which need root, workloads built with
//! frame pointers, and programs that are not ours to compare with. Without root those tests report
//! themselves as ignored, and nothing is installed for them.

use std::{
    env,
    io::{BufRead as _, BufReader, Write as _},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result};

use crate::{
    setup,
    shell::{cargo, output, progress, run, target},
};

/// Runs every test whose name holds `filter` and closes with a line `N passed, N failed`.
pub(crate) fn test(filter: Option<&str>) -> ExitCode {
    let mut tally = Tally::default();
    if let Err(error) = run_all(filter, &mut tally) {
        eprintln!("error: {error:#}");
        tally.failed += 1;
    }
    println!();
    if tally.ignored > 0 {
        println!("{} ignored, each for the reason given above", tally.ignored);
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_all(filter: Option<&str>, tally: &mut Tally) -> Result<()> {
    // The same selection of packages both times, so that nothing is built twice.
    let every = ["test", "--locked", "--no-fail-fast", "--workspace"];
    let filter = filter.as_slice();

    progress("unit tests");
    count(cargo().args(every).args(["--", "--quiet"]).args(filter), tally)?;

    let mut kernel = cargo();
    kernel.args(every).args(["--test", "kernel", "--", "--test-threads=1"]).args(filter);
    if setup::is_root() {
        prepare_kernel_tests(&mut kernel)?;
    } else {
        progress("not root: the tests on the running kernel are ignored");
    }
    progress("tests on the running kernel");
    count(&mut kernel, tally)
}

/// Builds and installs what the tests on the running kernel use, and tells them where it is.
fn prepare_kernel_tests(tests: &mut Command) -> Result<()> {
    setup::apt(
        &["iproute2", "nftables", "linux-perf", "iperf3"],
        &["ip", "nft", "perf", "iperf3"],
    )?;
    // Programs that the tests profile, as a distribution ships them.
    setup::apt(
        &["redis-server", "nginx-light", "postgresql", "sqlite3", "g++", "python3", "nodejs"],
        &[
            "redis-server",
            "nginx",
            "/usr/lib/postgresql",
            "sqlite3",
            "g++",
            "/usr/bin/python3",
            "node",
        ],
    )?;
    setup::apt(&["podman", "runc"], &["podman", "runc"])?;
    let tools = setup::python_tools()?;
    if ["PODFLAME_TEST_KUBERNETES", "PODFLAME_TEST_KUBECONFIG"]
        .iter()
        .any(|v| env::var_os(v).is_some())
    {
        setup::kubernetes_node()?;
    }

    progress("building the workloads, with frame pointers");
    // Apart from the rest: other flags would rebuild everything at each switch.
    let workloads = target().join("workloads");
    run(cargo()
        .args(["build", "--quiet", "--locked", "--release", "--package", "podflame-tests"])
        .args(["--bins", "--target-dir"])
        .arg(&workloads)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-C force-frame-pointers=yes"))?;

    progress("building podflame");
    run(cargo().args(["build", "--quiet", "--locked", "--release", "--package", "podflame"]))?;

    tests
        .env("PODFLAME_BIN", target().join("release/podflame"))
        .env("PODFLAME_WORKLOADS", workloads.join("release"))
        .env("PODFLAME_PYTHON", tools.join("python"))
        .env("PODFLAME_BUF", tools.join("buf"))
        .env("PODFLAME_GO", tools.join("go"));
    // Pythons of several versions are used where they are; tests of those that are not are ignored.
    if let Ok(root) = output(Command::new("pyenv").arg("root")) {
        tests.env("PODFLAME_PYENV", root);
    }
    Ok(())
}

/// Runs `cargo test`, passing its output through, and adds up its results.
fn count(command: &mut Command, tally: &mut Tally) -> Result<()> {
    let failed_before = tally.failed;
    let mut child = command.stdout(Stdio::piped()).spawn().context("start cargo test")?;
    let stdout = child.stdout.take().context("cargo test without standard output")?;
    let mut terminal = std::io::stdout().lock();
    // Bytes, since a test may print what is not UTF-8; lines, since results are lines.
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("read the output of cargo test")?;
        terminal.write_all(&line)?;
        terminal.write_all(b"\n")?;
        tally.add(&String::from_utf8_lossy(&line));
    }
    let status = child.wait().context("wait for cargo test")?;
    if !status.success() && tally.failed == failed_before {
        // It did not build, or a test program died before it could say what failed.
        tally.failed += 1;
    }
    Ok(())
}

/// Sums over all test programs.
#[derive(Debug, Default, PartialEq)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Tally {
    /// Adds a line `test result: ok. 3 passed; 0 failed; 1 ignored; …`; other lines say nothing.
    fn add(&mut self, line: &str) {
        let Some(result) = line.trim().strip_prefix("test result: ") else { return };
        for part in result.split([';', '.']) {
            match part.trim().split_once(' ') {
                Some((n, "passed")) => self.passed += n.parse::<u64>().unwrap_or(0),
                Some((n, "failed")) => self.failed += n.parse::<u64>().unwrap_or(0),
                Some((n, "ignored")) => self.ignored += n.parse::<u64>().unwrap_or(0),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_all_programs_add_up() {
        let mut tally = Tally::default();
        for line in [
            "running 5 tests",
            "test a::b ... ok",
            "test result: ok. 3 passed; 0 failed; 2 ignored; 0 measured; 7 filtered out; finished in 0.01s",
            "a test that prints: 9 passed; 9 failed",
            "test result: FAILED. 10 passed; 4 failed; 0 ignored; 0 measured; 0 filtered out",
        ] {
            tally.add(line);
        }
        assert_eq!(tally, Tally { passed: 13, failed: 4, ignored: 2 });
    }
}
