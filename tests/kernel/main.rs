//! The tests on the running kernel. Run by `cargo xtask test`, as root, one after the other.
//!
//! A test that lacks a privilege reports itself as ignored, with the reason; on CI it fails.
//! Add a test to the table of its subject; `shared` proves what the others rely on, and `record` runs
//! `podflame record` for them.

mod account;
mod agent;
mod agreement;
mod attribution;
mod bpf;
mod cluster;
mod cpu;
mod faults;
mod input;
mod kubernetes;
mod network;
mod perf_maps;
mod python;
mod record;
mod retransmit;
mod running;
mod shared;
mod unwind;
mod verifier;

use std::{env, process::ExitCode};

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use podflame_tests::Node;

/// A test's name and what it does. It fails by an error or by a failed assertion.
type Test = (&'static str, fn() -> anyhow::Result<()>);

fn main() -> ExitCode {
    let tables: [(&str, &[Test]); 14] = [
        ("account", account::TESTS),
        ("agent", agent::TESTS),
        ("attribution", attribution::TESTS),
        ("cpu", cpu::TESTS),
        ("faults", faults::TESTS),
        ("input", input::TESTS),
        ("kubernetes", kubernetes::TESTS),
        ("kubernetes", kubernetes::OWN_NODE),
        ("network", network::TESTS),
        ("perf_maps", perf_maps::TESTS),
        ("retransmit", retransmit::TESTS),
        ("shared", shared::TESTS),
        ("unwind", unwind::TESTS),
        ("verifier", verifier::TESTS),
    ];
    let trials = tables.iter().flat_map(|(subject, tests)| {
        tests.iter().map(move |(name, test)| {
            let missing = if *subject == "kubernetes" { Node::missing() } else { None };
            let own = || kubernetes::OWN_NODE.iter().any(|(its, _)| its == name);
            let given = *subject == "kubernetes" && Node::is_given() && own();
            Trial::ignorable_test(format!("{subject}::{name}"), move || match missing {
                Some(reason) => lacking(reason),
                None if given => Ok(Completion::ignored_with("only on a node of the tests' own")),
                None => run(*test),
            })
        })
    });
    let trials = trials.chain(python::trials()).collect();
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    cluster::end();
    conclusion.exit_code()
}

fn run(test: impl FnOnce() -> anyhow::Result<()>) -> Result<Completion, Failed> {
    if let Some(reason) = missing_privilege() {
        return lacking(reason);
    }
    test().map_err(|error| format!("{error:#}"))?;
    Ok(Completion::Completed)
}

/// The result of a test that cannot run here.
fn lacking(reason: &'static str) -> Result<Completion, Failed> {
    match env::var("CI").is_ok_and(|ci| ci == "true") {
        true => Err(reason.into()),
        false => Ok(Completion::ignored_with(reason)),
    }
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
