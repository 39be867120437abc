//! The chores of podflame: `cargo xtask --help` lists them.
//!
//! Each chore installs what it lacks, says what it does on the terminal, and fails with the remedy.
//! Nothing here is part of the product.

mod build_ebpf;
mod setup;
mod shell;

use anyhow::Result;
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
    /// Build the BPF programs into agent-ebpf/podflame.bpf.o, which the agent embeds.
    BuildEbpf {
        /// Build nothing; fail when the committed object is older than its sources.
        #[arg(long)]
        check: bool,
    },
}

fn main() -> Result<()> {
    match Cli::parse().chore {
        Chore::BuildEbpf { check: true } => build_ebpf::check(shell::root()),
        Chore::BuildEbpf { check: false } => build_ebpf::build_and_commit(),
    }
}
