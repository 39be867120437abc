//! The binary `podflame`: daemon, local recorder and client in one.

use std::{io::IsTerminal, process::ExitCode};

use clap::{Parser, Subcommand, ValueEnum};
use podflame::command::{self, Exit, Usage};
use tracing_subscriber::{EnvFilter, layer::SubscriberExt, util::SubscriberInitExt};

/// An eBPF profiler for Linux nodes: what a process, a container or a pod spends its time on, and
/// whether the code, the memory or the network is to blame.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  podflame record --seconds 10 -o node.svg    profile this node, get a flame graph
  podflame doctor                             what this kernel and these privileges allow
  podflame agent                              serve profiles on /run/podflame/podflame.sock
  podflame flamegraph --since 5m -o last.svg  a picture from a running agent's memory

Exit status: 0 done, 1 failed, 2 wrong usage."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// How much to log: error, warn, info, debug, trace, or rules such as podflame::kernel=debug
    #[arg(
        long,
        global = true,
        value_name = "LEVEL",
        env = "PODFLAME_LOG",
        default_value = "warn,podflame=info"
    )]
    log: String,

    /// Form of the log
    #[arg(long, global = true, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    Record(command::record::Args),
    Agent(command::agent::Args),
    Watch(command::watch::Args),
    Flamegraph(command::flamegraph::Args),
    Status(command::status::Args),
    Doctor(command::doctor::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(e) = init_log(&cli.log, cli.log_format) {
        eprintln!("error: --log {}: {e}", cli.log);
        return ExitCode::from(2);
    }
    match run(cli.command) {
        Ok(exit) => exit.into(),
        Err(e) => {
            eprintln!("error: {}", message(&e));
            if e.is::<Usage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

fn run(command: Command) -> anyhow::Result<Exit> {
    match command {
        Command::Record(args) => command::record::run(&args),
        Command::Agent(args) => command::agent::run(&args),
        Command::Watch(args) => command::watch::run(args).map(|()| Exit::Done),
        Command::Flamegraph(args) => command::flamegraph::run(args).map(|()| Exit::Done),
        Command::Status(args) => command::status::run(args).map(|()| Exit::Done),
        Command::Doctor(args) => command::doctor::run(&args),
    }
}

/// An error with its causes, but for those that the message in front of them tells already.
fn message(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Logs go to standard error: standard output belongs to what a command is asked for.
fn init_log(rules: &str, format: LogFormat) -> Result<(), tracing_subscriber::filter::ParseError> {
    let filter = EnvFilter::try_new(rules)?;
    let base = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match format {
        LogFormat::Text => {
            let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            base.with(layer.with_ansi(colours).with_target(false)).init();
        }
        LogFormat::Json => base.with(layer.json()).init(),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::Cli;

    /// clap checks this only in debug builds, and there when it runs.
    #[test]
    fn the_command_line_does_not_contradict_itself() {
        Cli::command().debug_assert();
    }
}
