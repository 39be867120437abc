//! Measurements beside other profilers, for the figures in the README. Not tests: they pass or fail nothing.

use std::path::PathBuf;

use anyhow::Result;

use crate::{
    setup,
    shell::{cargo, progress, run, target},
};

/// What to measure.
#[derive(clap::Subcommand)]
pub(crate) enum Bench {
    /// The time of the BPF program for a sample, by the depth of the stack, beside bpftrace.
    Stacks {
        /// How often all of it is measured; the median is what counts.
        #[arg(long, default_value_t = 5)]
        rounds: u32,
        /// How long each program is measured in a round.
        #[arg(long, default_value_t = 2.0)]
        seconds: f64,
        /// Samples a second on each CPU.
        #[arg(long, default_value_t = 99)]
        frequency: u32,
        /// Also write the figures to this file, as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
}

/// Installs what a measurement needs, and measures.
///
/// # Errors
/// When something cannot be installed or built, or a profiler fails.
pub(crate) fn bench(bench: Bench) -> Result<()> {
    let Bench::Stacks { rounds, seconds, frequency, json } = bench;
    setup::apt(&["bpftrace", "gcc"], &["bpftrace", "gcc"])?;
    progress("building podflame");
    run(cargo().args(["build", "--quiet", "--locked", "--release", "--package", "podflame"]))?;
    progress("measuring; other load on this machine makes all figures larger");
    let mut bench = cargo();
    bench
        .args(["bench", "--quiet", "--locked", "--package", "podflame-tests", "--bench", "stacks"])
        .args(["--", "--rounds", &rounds.to_string(), "--seconds", &seconds.to_string()])
        .args(["--frequency", &frequency.to_string()])
        .env("PODFLAME_BIN", target().join("release/podflame"));
    if let Some(file) = json {
        // cargo runs it elsewhere.
        bench.arg("--json").arg(std::path::absolute(file)?);
    }
    run(&mut bench)
}
