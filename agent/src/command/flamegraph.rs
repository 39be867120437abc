//! `podflame flamegraph`: a picture of what an agent remembers.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use podflame_proto::v1;
use tempfile::NamedTempFile;

use super::client::{Connect, Filters, block_on, duration, print, signal_parser};
use crate::{profile::Signal, serve::convert::to_signal};

/// Get a flame graph from an agent's memory.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  What the whole node spent its CPU time on in the last five minutes, for a browser:
      podflame flamegraph --since 5m -o node.svg
  The page faults of one pod, for `go tool pprof`:
      podflame flamegraph --signal page-fault --pod shop/cart-7f --format pprof -o faults.pb.gz
  The stacks that sent what was retransmitted, as text:
      podflame flamegraph --signal retransmit --format folded -o -")]
pub struct Args {
    #[command(flatten)]
    connect: Connect,
    /// What to show.
    #[arg(long, value_name = "SIGNAL", default_value = "cpu", value_parser = signal_parser())]
    signal: Signal,
    #[command(flatten)]
    filters: Filters,
    /// How far back, such as 90s, 5m or 1h; all that the agent remembers if not given.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    since: Option<Duration>,
    /// svg is for a browser, folded for other flame graph tools, pprof for `go tool pprof`.
    #[arg(long, value_enum, default_value_t = Format::Svg)]
    format: Format,
    /// Title of the picture.
    #[arg(long)]
    title: Option<String>,
    /// The file to write, or - for standard output; podflame.svg, .folded or .pb.gz if not given.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// The form of a flame graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Svg,
    Folded,
    Pprof,
}

impl Format {
    fn number(self) -> i32 {
        let format = match self {
            Self::Svg => v1::FlameGraphFormat::Svg,
            Self::Folded => v1::FlameGraphFormat::Folded,
            Self::Pprof => v1::FlameGraphFormat::Pprof,
        };
        format as i32
    }

    fn default_file(self) -> &'static str {
        match self {
            Self::Svg => "podflame.svg",
            Self::Folded => "podflame.folded",
            Self::Pprof => "podflame.pb.gz",
        }
    }
}

/// Where the flame graph goes.
enum Output {
    Stdout,
    /// A device or a pipe.
    Special(fs::File, PathBuf),
    /// A file beside the one that it replaces once it is complete.
    File(NamedTempFile, PathBuf),
}

impl Output {
    /// Finds out before the work whether the result can be written.
    fn open(path: &Path) -> anyhow::Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::Stdout);
        }
        let refused = || {
            let path = path.display();
            format!("-o {path}: cannot write there: make its directory, or choose another file")
        };
        // The file that a link leads to is replaced, not the link.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        match fs::metadata(&path) {
            Ok(found) if found.is_dir() => {
                bail!("-o {}: this is a directory: name a file in it", path.display());
            }
            Ok(found) if !found.is_file() => {
                let file = fs::File::options().write(true).open(&path).with_context(refused)?;
                return Ok(Self::Special(file, path));
            }
            Ok(_) | Err(_) => {}
        }
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        // The user's umask decides, as for any other file.
        let file = tempfile::Builder::new()
            .permissions(fs::Permissions::from_mode(0o666))
            .tempfile_in(directory)
            .with_context(refused)?;
        Ok(Self::File(file, path))
    }

    /// Puts the data where it belongs; into a file, all or nothing.
    fn write(self, data: &[u8]) -> anyhow::Result<()> {
        match self {
            Self::Stdout => print(data).map(drop),
            Self::Special(mut file, path) => {
                file.write_all(data).with_context(|| format!("write {}", path.display()))
            }
            Self::File(mut file, path) => {
                let what = || format!("write {}", path.display());
                file.write_all(data).with_context(what)?;
                file.persist(&path).with_context(what)?;
                Ok(())
            }
        }
    }
}

/// Asks for a flame graph and writes it.
///
/// # Errors
/// When the file cannot be written, no agent answers, or it has nothing to show.
pub fn run(args: Args) -> anyhow::Result<()> {
    let path = args.output.clone().unwrap_or_else(|| args.format.default_file().into());
    let output = Output::open(&path)?;
    let (info, data) = block_on(fetch(&args))?;
    output.write(&data)?;
    if path != Path::new("-") {
        eprintln!(
            "{}: {} events, {} {}, {} events lost",
            path.display(),
            info.count,
            info.weight,
            info.unit,
            info.lost
        );
    }
    Ok(())
}

async fn fetch(args: &Args) -> anyhow::Result<(v1::FlameGraphInfo, Vec<u8>)> {
    let last = |d: Duration| podflame_proto::Duration {
        seconds: i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
        nanos: d.subsec_nanos().cast_signed(),
    };
    let request = v1::GetFlameGraphRequest {
        signal: to_signal(args.signal),
        format: args.format.number(),
        workloads: args.filters.workloads(),
        pids: args.filters.pid.clone(),
        start: args.since.map(|d| v1::get_flame_graph_request::Start::Last(last(d))),
        until: None,
        title: args.title.clone().unwrap_or_default(),
    };
    let failed = |status| args.connect.failed(&status);
    let mut client = args.connect.profiler().await?;
    let mut messages = client.get_flame_graph(request).await.map_err(failed)?.into_inner();
    let (mut info, mut data) = (v1::FlameGraphInfo::default(), Vec::new());
    while let Some(message) = messages.message().await.map_err(failed)? {
        info = message.info.unwrap_or(info);
        data.extend_from_slice(&message.data);
    }
    if data.len() as u64 != info.size_bytes {
        bail!(
            "the agent sent {} bytes of a flame graph of {}: try again",
            data.len(),
            info.size_bytes
        );
    }
    Ok((info, data))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn a_file_is_replaced_as_a_whole_or_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.svg");
        fs::write(&path, "old").unwrap();
        drop(Output::open(&path).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        Output::open(&path).unwrap().write(b"new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        let usual = fs::File::create(directory.path().join("b")).unwrap();
        assert_eq!(path.metadata().unwrap().mode(), usual.metadata().unwrap().mode());
    }

    #[test]
    fn links_and_devices_stay_what_they_are() {
        let directory = tempfile::tempdir().unwrap();
        let (link, target) = (directory.path().join("link"), directory.path().join("target"));
        fs::write(&target, "old").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        Output::open(&link).unwrap().write(b"new").unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read_to_string(&target).unwrap(), "new");
        Output::open(Path::new("/dev/null")).unwrap().write(b"new").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn what_cannot_be_written_is_refused_early() {
        let error = |path: &str| format!("{:#}", Output::open(Path::new(path)).err().unwrap());
        assert!(error("/nonexistent/a.svg").contains("-o /nonexistent/a.svg: cannot write there"));
        assert!(error("/").contains("this is a directory"));
    }
}
