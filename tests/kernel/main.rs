//! The tests on the running kernel. Run by `cargo xtask test`, as root, one after the other.
//!
//! A test that lacks a privilege reports itself as ignored, with the reason; on CI it fails.
//! Add a test to the table of its subject; `shared` proves what the others rely on, and `record` runs
//! `podflame record` for them.

mod account;
mod agent;
mod bpf;
mod cpu;
mod faults;
mod input;
mod python;
mod record;
mod retransmit;
mod running;
mod shared;
mod unwind;
mod verifier;

use std::{env, process::ExitCode};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

/// A test's name and what it does. It fails by an error or by a failed assertion.
type Test = (&'static str, fn() -> anyhow::Result<()>);

fn main() -> ExitCode {
    let tables: [(&str, &[Test]); 9] = [
        ("account", account::TESTS),
        ("agent", agent::TESTS),
        ("cpu", cpu::TESTS),
        ("faults", faults::TESTS),
        ("input", input::TESTS),
        ("retransmit", retransmit::TESTS),
        ("shared", shared::TESTS),
        ("unwind", unwind::TESTS),
        ("verifier", verifier::TESTS),
    ];
    let trials = tables.iter().flat_map(|(subject, tests)| {
        tests.iter().map(move |(name, test)| {
            Trial::ignorable_test(format!("{subject}::{name}"), move || run(*test))
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.chain(python::trials()).collect())
        .exit_code()
}

fn run(test: impl FnOnce() -> anyhow::Result<()>) -> Result<Completion, Failed> {
    if let Some(reason) = missing_privilege() {
        return match env::var("CI").is_ok_and(|ci| ci == "true") {
            true => Err(reason.into()),
            false => Ok(Completion::ignored_with(reason)),
        };
    }
    test().map_err(|error| format!("{error:#}"))?;
    Ok(Completion::Completed)
}

/// What keeps this process from observing the kernel.
fn missing_privilege() -> Option<&'static str> {
    // SAFETY: it cannot fail and touches no memory.
    if unsafe { libc::geteuid() } != 0 {
        return Some("needs root: run `cargo xtask test` as root");
    }
    // Root in a container can lack what it takes.
    let allowed = aya::sys::enable_stats(aya::sys::Stats::RunTime).is_ok();
    (!allowed).then_some("needs CAP_SYS_ADMIN and the bpf system call")
}
