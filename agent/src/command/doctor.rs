//! `podflame doctor`.

use std::io::{IsTerminal, Write};

use anyhow::Context;

use crate::doctor::{Facts, render, report};

/// Say what this kernel and these privileges allow, signal by signal
///
/// Looks at the kernel, its settings, the capabilities of this process and the mounts, changes
/// nothing, and says for whatever is missing what suffers and what to do. The exit code is 0 if
/// every signal can be had, in full or degraded, and 1 if one cannot.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  podflame doctor
  podflame doctor --format json | jq '.findings[] | select(.status != \"ok\")'")]
pub struct Args {
    /// How to write the report
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

/// How to write the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A table for people; in colour on a terminal, unless `NO_COLOR` is set.
    Text,
    /// One JSON object.
    Json,
}

/// Writes the report to standard output. `has_tracepoint` says whether the kernel's BTF has a
/// tracepoint of that name, `None` if there is no BTF.
///
/// # Errors
/// If a signal is missing, or the report cannot be written.
pub fn run(args: &Args, has_tracepoint: impl Fn(&str) -> Option<bool>) -> anyhow::Result<()> {
    let report = report(&Facts::gather(has_tracepoint));
    let mut stdout = std::io::stdout().lock();
    let text = match args.format {
        Format::Json => serde_json::to_string_pretty(&report).context("write the report")? + "\n",
        Format::Text => {
            // https://no-color.org: set to anything but the empty string.
            let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
            render(&report, stdout.is_terminal() && !plain)
        }
    };
    stdout.write_all(text.as_bytes()).context("write the report to standard output")?;
    let missing = report.missing();
    anyhow::ensure!(missing.is_empty(), "this machine cannot give: {}", missing.join(", "));
    Ok(())
}
