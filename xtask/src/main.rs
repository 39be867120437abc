//! The chores of podflame: `cargo xtask --help` lists them.
//!
//! Each chore installs what it lacks, says what it does on the terminal, and fails with the remedy.
//! Nothing here is part of the product.

mod bench;
mod build_ebpf;
mod lint;
mod record_stacks;
mod setup;
mod shell;
mod test;
mod tidy;

use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};

/// The chores of podflame.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Measure podflame beside other profilers, as root.
    Bench {
        #[command(subcommand)]
        what: bench::Bench,
    },
    /// Build the BPF programs into agent-ebpf/podflame.bpf.o, which the agent embeds.
    BuildEbpf {
        /// Build nothing; fail when the committed object is older than its sources.
        #[arg(long)]
        check: bool,
    },
    /// Run what CI runs: `lint`, then `test`, with no test ignored.
    Ci,
    /// Check what needs no running: format, lints, conventions, licences, the BPF object.
    Lint,
    /// Record stacks of real programs under gdb for the tests of the stack walk; by hand, x86-64 only.
    RecordStacks,
    /// Run every test: units, then, as root, those on the running kernel.
    Test {
        /// Run only tests with this in their name.
        #[arg(long)]
        filter: Option<String>,
    },
    /// Check the conventions that neither rustfmt nor clippy knows; a part of `lint`.
    Tidy,
}

fn main() -> ExitCode {
    let done = match Cli::parse().chore {
        Chore::Bench { what } => bench::bench(what),
        Chore::BuildEbpf { check: true } => build_ebpf::check(shell::root()),
        Chore::BuildEbpf { check: false } => build_ebpf::build_and_commit(),
        Chore::Ci => shell::run(&mut Command::new(shell::root().join(".ci/run"))),
        Chore::Lint => lint::lint(),
        Chore::RecordStacks => record_stacks::record(),
        Chore::Test { filter } => return test::test(filter.as_deref()),
        Chore::Tidy => tidy::tidy(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
