//! `podflame record`: profile this node now, alone, and leave a picture or a file.

use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{
    account::Account,
    attribute::Attributor,
    clock::{self, Clock},
    command::{Exit, Usage, doctor, filter, kubernetes, privacy},
    event::{KTime, Probe},
    export::{self, Format, retransmits::RetransmitRow, top::TopRow, write},
    fold::{Root, printable},
    kernel,
    pipeline::{Options, Pipeline},
    pods,
    profile::{Batch, Occurrence, Profile, Signal},
    resolve::Resolver,
    select::Selector,
    store::{self, Query, Store},
    symbols::{Limits, Symbols},
};

/// Time between two looks at what was gathered; the progress bar shows it.
const FLUSH: Duration = Duration::from_millis(500);

/// Batches that may wait for the store.
const BATCHES: usize = 8;

/// Most memory of a recording: what comes after is kept, and the oldest part of it forgotten, which
/// the summary says.
const MAX_BYTES: usize = 1 << 30;

/// Most retransmits that the table rests on; the picture and the sums rest on all.
const MAX_OCCURRENCES: usize = 200_000;

/// Functions in the summary.
const TOP: usize = 5;

/// Profile this node now and write a flame graph.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  podflame record --seconds 10 -o node.svg
      where this node spends its CPU time
  podflame record --signal page-fault --pid 4321 -o faults.svg
      which code of one process touches new memory, and which files it waits for
  podflame record --signal retransmit --cgroup system.slice/nginx.service -o lost.svg
      which code sent what the network lost, and to whom
  podflame record --format folded -o - | grep alloc
      folded stacks for other tools; Ctrl-C keeps what was gathered

Exit status: 0 done, 1 failed, 2 wrong usage.")]
pub struct Args {
    /// How long to record, in seconds; Ctrl-C ends it earlier and keeps what was gathered
    #[arg(long, short = 's', value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,

    /// On-CPU samples a second on each CPU, in Hz
    #[arg(long, short = 'F', value_name = "HZ", default_value_t = 99, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub frequency: u32,

    /// What to measure
    #[arg(long, value_name = "SIGNAL", default_value = "cpu", value_parser = super::signal)]
    pub signal: Signal,

    /// Which part of the node
    #[command(flatten)]
    pub filter: filter::Args,

    /// Who names pods
    #[command(flatten)]
    pub kubernetes: kubernetes::Args,

    /// What must not leave the node
    #[command(flatten)]
    pub privacy: privacy::Args,

    /// Kind of file: svg, folded, pprof or json; by the file's ending if not given
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<Format>,

    /// Where to write; `-` is standard output [default: SIGNAL.FORMAT]
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,

    /// Also write the summary, with the loss account, as JSON
    #[arg(long, value_name = "FILE")]
    pub summary: Option<PathBuf>,

    /// Size of the ring buffer in bytes, for tests of its overflow
    #[arg(long, value_name = "BYTES", hide = true)]
    pub ring_bytes: Option<u32>,
}

/// The probes that make up a signal.
#[must_use]
pub fn probes(signal: Signal) -> &'static [Probe] {
    match signal {
        Signal::Cpu => &[Probe::OnCpu],
        Signal::PageFault => &[Probe::MinorFault, Probe::MajorFault],
        Signal::Retransmit => &[Probe::Retransmit, Probe::SynAck, Probe::Sender],
    }
}

impl Args {
    fn format(&self) -> anyhow::Result<Format> {
        if let Some(format) = self.format {
            return Ok(format);
        }
        let Some(output) = self.output.as_deref().filter(|path| *path != Path::new("-")) else {
            return Ok(Format::Svg);
        };
        let name = output.to_string_lossy();
        match output.extension().map(|e| e.to_string_lossy()).as_deref() {
            Some("svg") | None => Ok(Format::Svg),
            Some("folded" | "txt") => Ok(Format::Folded),
            Some("pprof" | "pb") => Ok(Format::Pprof),
            Some("gz") if name.ends_with(".pb.gz") => Ok(Format::Pprof),
            Some("json") => Ok(Format::Json),
            Some(_) => {
                let text = "the ending names no format: choose one with --format";
                Err(Usage(format!("--output {name}: {text}")).into())
            }
        }
    }

    fn output(&self, format: Format) -> PathBuf {
        self.output.clone().unwrap_or_else(|| {
            let ending = if format == Format::Pprof { "pb.gz" } else { format.name() };
            format!("{}.{ending}", self.signal.name()).into()
        })
    }
}

/// What a recording came to; written by `--summary`, and stable.
#[derive(Debug, Serialize)]
struct Summary {
    signal: &'static str,
    unit: &'static str,
    seconds: f64,
    /// Events in the file, and their weight.
    samples: u64,
    weight: u64,
    /// Events lost in the kernel or in the agent.
    lost: u64,
    /// Processes seen.
    processes: usize,
    top: Vec<TopRow>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    retransmits: Vec<RetransmitRow>,
    #[serde(skip_serializing_if = "is_zero")]
    retransmits_not_in_table: u64,
    account: serde_json::Value,
    /// Equations of the account that do not hold; always empty unless there is a defect.
    violations: Vec<String>,
    file: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the form that serde asks for")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Runs the command.
///
/// # Errors
///
/// If the kernel side cannot start or a file cannot be written.
pub fn run(args: &Args) -> anyhow::Result<Exit> {
    let format = args.format()?;
    let output = args.output(format);
    write::check_writable(&output)?;
    if let Some(summary) = &args.summary {
        write::check_writable(summary)?;
    }
    doctor::preflight(&[args.signal])?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let recording = runtime.block_on(record(args))?;
    runtime.shutdown_background();

    let profile = recording.profile(args.signal);
    let summary = recording.summary(args, &profile, &output);
    let options = export::Options {
        title: title(args),
        subtitle: subtitle(&summary),
        root: Root::default(),
        start_unix_ns: Clock::now().to_unix_ns(profile.start),
    };
    let bytes = export::render(&profile, format, &options)?;
    write::write(&output, &bytes)?;
    if let Some(path) = &args.summary {
        write::write(path, &serde_json::to_vec_pretty(&summary)?)?;
    }
    print_summary(&summary, &output);
    Ok(Exit::Done)
}

/// What is left when everything is stopped.
struct Recording {
    gathered: Gathered,
    account: Account,
    elapsed: Duration,
    start: KTime,
}

/// What the batches add up to.
struct Gathered {
    store: Store,
    occurrences: Vec<Occurrence>,
    occurrences_lost: u64,
    rows: Vec<RetransmitRow>,
    generation: u64,
    processes: hashbrown::HashSet<u32>,
}

async fn record(args: &Args) -> anyhow::Result<Recording> {
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for Ctrl-C")?;
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut pods = args.kubernetes.watch(args.filter.policy(args.kubernetes.policy())?).await?;
    if let Some(pods) = &mut pods
        && !pods::first_list(pods).await
        && args.filter.by_pod()
    {
        bail!("who names pods does not answer: {}", pods.borrow().state.last_failure);
    }
    let follower = args.filter.resolve(pods.clone(), args.privacy.opt_out)?;
    let options = Options {
        kernel: kernel::Config {
            frequency_hz: args.frequency,
            probes: probes(args.signal).iter().copied().collect(),
            filter: follower.filter(),
            ring_bytes: args.ring_bytes,
        },
        flush: FLUSH,
        follower,
        pods: pods.clone(),
    };
    let resolver = Resolver::new(Symbols::new(Limits::default()), Attributor::new())
        .with_pods(pods)
        .with_peers(args.kubernetes.watch_peers().await?)
        .with_redactor(args.privacy.redactor()?);
    let (sender, batches) = mpsc::channel(BATCHES);
    let pipeline = Pipeline::start(options, resolver, sender)?;
    let start = clock::monotonic();
    let bar = progress(args, pipeline.cpus);
    let gathering = tokio::spawn(gather(batches, bar.clone(), args.signal));
    tokio::select! {
        () = tokio::time::sleep(Duration::from_secs(args.seconds)) => {}
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    let elapsed = Duration::from_nanos(clock::monotonic().0.saturating_sub(start.0));
    bar.set_message("naming functions…");
    let account = pipeline.stop().await;
    let gathered = tokio::select! {
        gathered = gathering => gathered.context("gather the batches")?,
        _ = interrupt.recv() => bail!("interrupted while naming functions: nothing was written"),
    };
    bar.finish_and_clear();
    Ok(Recording { gathered, account, elapsed, start })
}

async fn gather(
    mut batches: mpsc::Receiver<Arc<Batch>>,
    bar: ProgressBar,
    signal: Signal,
) -> Gathered {
    let mut all = Gathered {
        store: Store::new(Duration::MAX, Duration::MAX, MAX_BYTES),
        occurrences: Vec::new(),
        occurrences_lost: 0,
        rows: Vec::new(),
        generation: 0,
        processes: hashbrown::HashSet::new(),
    };
    while let Some(batch) = batches.recv().await {
        if batch.generation != all.generation {
            all.close_generation();
            all.generation = batch.generation;
        }
        all.store.apply(&batch);
        all.processes.extend(batch.samples.iter().map(|sample| sample.pid).filter(|pid| *pid != 0));
        let room = MAX_OCCURRENCES.saturating_sub(all.occurrences.len());
        if signal == Signal::Retransmit {
            all.occurrences.extend(batch.occurrences.iter().take(room).cloned());
            all.occurrences_lost += batch.occurrences.len().saturating_sub(room) as u64;
            all.occurrences_lost += batch.occurrences_lost;
        }
        let events: u64 = probes(signal).iter().map(|p| batch.account.probe(*p).aggregated).sum();
        bar.set_message(format!(
            "{events} samples, {} processes, {} lost",
            all.processes.len(),
            batch.account.lost()
        ));
    }
    all.close_generation();
    all
}

impl Gathered {
    /// Turns what was told one by one into rows, while its IDs are still valid.
    fn close_generation(&mut self) {
        let rows = export::retransmits::retransmits(&self.occurrences, self.store.dictionary());
        self.occurrences.clear();
        for row in rows {
            let same = |r: &&mut RetransmitRow| {
                (&r.owner, &r.peer, r.cause) == (&row.owner, &row.peer, row.cause)
            };
            match self.rows.iter_mut().find(same) {
                Some(known) => {
                    known.hits += row.hits;
                    known.segments += row.segments;
                    known.sender_known += row.sender_known;
                }
                None => self.rows.push(row),
            }
        }
    }
}

impl Recording {
    fn profile(&self, signal: Signal) -> Profile {
        let everything = Query {
            signal,
            since: KTime(0),
            until: KTime(u64::MAX),
            selector: Selector::default(),
        };
        self.gathered.store.profile(&everything).unwrap_or_else(|| Profile {
            signal,
            start: self.start,
            end: KTime(self.start.0 + self.elapsed.as_nanos() as u64),
            dictionary: self.gathered.store.dictionary().clone(),
            samples: Vec::new(),
            lost: self.account.lost(),
        })
    }

    fn summary(&self, args: &Args, profile: &Profile, output: &Path) -> Summary {
        let mut violations = self.account.violations(true);
        let samples = profile.samples.iter().map(|s| s.count).sum();
        let aggregated: u64 = Probe::ALL
            .iter()
            .filter(|probe| store::signal_of(**probe) == Some(args.signal))
            .map(|probe| self.account.probe(*probe).aggregated)
            .sum();
        let evicted = self.gathered.store.size().evicted;
        if evicted == 0 && samples != aggregated {
            violations.push(format!("E4: aggregated {aggregated} != delivered {samples}"));
        }
        Summary {
            signal: args.signal.name(),
            unit: args.signal.unit(),
            seconds: self.elapsed.as_secs_f64(),
            samples,
            weight: profile.samples.iter().map(|s| s.weight).sum(),
            lost: self.account.lost(),
            processes: self.gathered.processes.len(),
            top: export::top::top(profile, TOP),
            retransmits: self.gathered.rows.clone(),
            retransmits_not_in_table: self.gathered.occurrences_lost,
            account: export::account::json(&self.account),
            violations,
            file: output.display().to_string(),
        }
    }
}

fn progress(args: &Args, cpus: usize) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(args.seconds);
    let style = ProgressStyle::with_template(
        "{prefix} [{elapsed}] {wide_bar:.cyan/blue} {msg} (Ctrl-C keeps it)",
    );
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_prefix(format!("{} on {cpus} CPUs", args.signal.name()));
    let (ticking, seconds) = (bar.clone(), args.seconds);
    tokio::spawn(async move {
        for second in 1..=seconds {
            tokio::time::sleep(Duration::from_secs(1)).await;
            ticking.set_position(second);
        }
    });
    bar
}

fn title(args: &Args) -> String {
    let of = args.filter.describe().unwrap_or_else(|| "this node".to_owned());
    match args.signal {
        Signal::Cpu => format!("On-CPU time of {of}"),
        Signal::PageFault => format!("Page faults of {of}, by the code that touched the memory"),
        Signal::Retransmit => format!("TCP retransmits of {of}, by the code that sent the data"),
    }
}

fn subtitle(summary: &Summary) -> String {
    format!(
        "{} samples in {:.1} s, {} processes, {} lost",
        summary.samples, summary.seconds, summary.processes, summary.lost
    )
}

/// Tells a person how it went, on standard error: standard output may be the file.
fn print_summary(summary: &Summary, output: &Path) {
    eprintln!("{} ({})", subtitle(summary), summary.signal);
    for row in &summary.top {
        let (name, module) = (printable(&row.name), printable(&row.module));
        eprintln!("  {:5.1} %  {name}  {module}", 100.0 * row.self_share);
    }
    eprint!("{}", export::retransmits::text(&summary.retransmits));
    for violation in &summary.violations {
        eprintln!("warning: the loss account does not add up: {violation}");
    }
    if output != Path::new("-") {
        eprintln!("wrote {}", printable(&output.display().to_string()));
    }
}
