//! `podflame doctor`.

use std::io::{IsTerminal, Write};

use anyhow::Context;

use crate::{
    command::Exit,
    doctor::{Facts, Status, render, report},
    kernel::btf::Btf,
    profile::Signal,
};

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

/// Writes the report to standard output.
///
/// # Errors
///
/// If the report cannot be written.
pub fn run(args: &Args) -> anyhow::Result<Exit> {
    let report = report(&facts());
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
    if missing.is_empty() {
        return Ok(Exit::Done);
    }
    eprintln!("this machine cannot give: {}", missing.join(", "));
    Ok(Exit::No)
}

/// What there is to know of this machine.
fn facts() -> Facts {
    let tracepoints = Btf::from_sys().ok().map(|btf| btf.tracepoints());
    Facts::gather(|name| Some(tracepoints.as_ref()?.contains(name)))
}

/// Refuses to start what cannot work, or would harm this machine, with the doctor's words.
///
/// # Errors
///
/// If one of the signals cannot be had here.
pub fn preflight(signals: &[Signal]) -> anyhow::Result<()> {
    let report = report(&facts());
    for finding in &report.findings {
        let hit = |signal: &&Signal| finding.signals.contains(&signal.name());
        if finding.status == Status::Missing
            && let Some(signal) = signals.iter().find(hit)
        {
            anyhow::bail!(
                "{} cannot be measured here: {}: {} (remedy: {}; see `podflame doctor`)",
                signal.name(),
                finding.subject,
                finding.detail,
                finding.remedy
            );
        }
    }
    Ok(())
}
