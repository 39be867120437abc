//! The subcommands: each turns its options into a run of the stages. The only place that knows
//! clap, and that prints.

use std::process::ExitCode;

use crate::profile::Signal;

pub mod agent;
pub mod client;
pub mod doctor;
pub mod filter;
pub mod flamegraph;
pub mod kubernetes;
pub mod listen;
pub mod privacy;
pub mod record;
pub mod status;
pub mod watch;

/// A wrong word on the command line that the parser cannot see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// How a command ended, when it did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// What was asked for is done.
    Done,
    /// It ran, and the answer is no.
    No,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Done => Self::SUCCESS,
            Exit::No => Self::FAILURE,
        }
    }
}

/// A signal by its name, for clap.
fn signal(text: &str) -> Result<Signal, String> {
    let names = || Signal::ALL.map(Signal::name).join(", ");
    Signal::ALL
        .into_iter()
        .find(|signal| signal.name() == text)
        .ok_or_else(|| format!("choose one of {}", names()))
}
