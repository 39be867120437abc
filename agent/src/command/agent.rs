//! `podflame agent`: the daemon. Profiles the node and serves what it finds until it is told to stop.

use std::time::Duration;

use anyhow::Context;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};
use tracing::{error, info, warn};

use crate::{
    attribute::Attributor,
    command::{Exit, doctor, filter, kubernetes, listen, privacy, record::probes},
    event::Probe,
    kernel::{self, ProbeState, perf::FAULT_HZ},
    pipeline::{Options, Pipeline},
    pods,
    profile::Signal,
    resolve::Resolver,
    serve,
    symbols::{Limits, Symbols},
};

/// Batches that may wait for the hub.
const BATCHES: usize = 8;

/// Profile this node all the time and serve what is found.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  podflame agent
      profile the node, serve on /run/podflame/podflame.sock
  podflame agent --frequency 49 --flush-ms 200 --socket /tmp/podflame/podflame.sock
      fewer samples, sooner at the clients, on another socket
  podflame agent --listen 0.0.0.0:7443 --tls-cert tls.crt --tls-key tls.key \\
      --tls-client-ca ca.crt --allow-client oncall.example
      serve clients on the network that have a certificate of that name

SIGTERM and Ctrl-C end it: clients get the final counts and a clean end of their streams.
Exit status: 0 ended as told, 1 failed, 2 wrong usage.")]
pub struct Args {
    /// Where to serve, and whom
    #[command(flatten)]
    pub listen: listen::Args,

    /// On-CPU samples a second on each CPU, in Hz
    #[arg(long, short = 'F', value_name = "HZ", env = "PODFLAME_FREQUENCY", default_value_t = 99, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub frequency: u32,

    /// What to measure; all signals if not given
    #[arg(long = "signal", value_name = "SIGNAL", value_delimiter = ',', value_parser = super::signal)]
    pub signals: Vec<Signal>,

    /// Time between two batches to clients, in milliseconds: shorter is sooner, and more work
    #[arg(long, value_name = "MS", env = "PODFLAME_FLUSH_MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(10..=10_000))]
    pub flush_ms: u64,

    /// How long samples are kept in memory for flame graphs, in minutes
    #[arg(long, value_name = "MIN", env = "PODFLAME_RETENTION", default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=1440))]
    pub retention: u64,

    /// Most memory that kept samples take, in MiB
    #[arg(long, value_name = "MIB", env = "PODFLAME_MEMORY", default_value_t = 64, value_parser = clap::value_parser!(u64).range(8..=4096))]
    pub memory: u64,

    /// Which part of the node
    #[command(flatten)]
    pub filter: filter::Args,

    /// Who names pods
    #[command(flatten)]
    pub kubernetes: kubernetes::Args,

    /// What must not leave the node
    #[command(flatten)]
    pub privacy: privacy::Args,

    /// Size of the ring buffer in bytes, for tests of its overflow
    #[arg(long, value_name = "BYTES", hide = true)]
    pub ring_bytes: Option<u32>,
}

/// Runs the command.
///
/// # Errors
///
/// If the kernel side cannot start, or the socket cannot be served.
pub fn run(args: &Args) -> anyhow::Result<Exit> {
    let signals = if args.signals.is_empty() { Signal::ALL.to_vec() } else { args.signals.clone() };
    doctor::preflight(&signals)?;
    // One thread beside the resolver's: a node agent has no work for more.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve_until_told(args, &signals))?;
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(Exit::Done)
}

async fn serve_until_told(args: &Args, signals: &[Signal]) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for Ctrl-C")?;
    let mut config = serve::Config::new(args.listen.socket.clone());
    config.tcp = args.listen.tcp()?;
    config.retention = Duration::from_secs(60 * args.retention);
    config.max_bytes = usize::try_from(args.memory << 20).unwrap_or(usize::MAX);
    let (batches, published) = mpsc::channel(BATCHES);
    let (status, current) = watch::channel(serve::Status::default());
    // The socket first: if it is in use, nothing is attached.
    let mut server = serve::spawn(config, published, current)?;
    let mut pods = args.kubernetes.watch(args.filter.policy(args.kubernetes.policy())?).await?;
    if let Some(pods) = &mut pods {
        // Names are there from the first sample on, mostly.
        pods::first_list(pods).await;
    }
    let peers = args.kubernetes.watch_peers().await?;
    let pipeline = start(args, signals, batches, pods.clone(), peers.clone())?;
    status.send_replace(serve::Status { peers, ..status_of(args, &pipeline) });
    if let Some(pods) = pods {
        tokio::spawn(tell_state(pods, status));
    }
    if let Some(address) = server.tcp {
        info!(%address, tls = args.listen.tls_cert.is_some(), "listening");
    }
    info!(socket = %args.listen.socket.display(), cpus = pipeline.cpus, "profiling");
    tokio::select! {
        _ = terminate.recv() => info!("SIGTERM: stopping"),
        _ = interrupt.recv() => info!("Ctrl-C: stopping"),
        failed = server.failed() => error!("the server ended early: {failed:?}"),
    }
    let account = pipeline.stop().await;
    for violation in account.violations(true) {
        warn!("the loss account does not add up: {violation}");
    }
    server.finished().await?;
    info!(lost = account.lost(), "stopped");
    Ok(())
}

fn start(
    args: &Args,
    signals: &[Signal],
    batches: mpsc::Sender<std::sync::Arc<crate::profile::Batch>>,
    pods: Option<pods::Latest>,
    peers: Option<pods::LatestPeers>,
) -> anyhow::Result<Pipeline> {
    let follower = args.filter.resolve(pods.clone(), args.privacy.opt_out)?;
    let options = Options {
        kernel: kernel::Config {
            frequency_hz: args.frequency,
            probes: signals.iter().flat_map(|signal| probes(*signal)).copied().collect(),
            filter: follower.filter(),
            ring_bytes: args.ring_bytes,
        },
        flush: Duration::from_millis(args.flush_ms),
        follower,
        pods: pods.clone(),
    };
    let resolver = Resolver::new(Symbols::new(Limits::default()), Attributor::new())
        .with_pods(pods)
        .with_peers(peers)
        .with_redactor(args.privacy.redactor()?);
    Ok(Pipeline::start(options, resolver, batches)?)
}

/// Tells clients how the source of names does, as long as both are there.
async fn tell_state(mut pods: pods::Latest, status: watch::Sender<serve::Status>) {
    loop {
        let state = pods.borrow_and_update().state.clone();
        status.send_if_modified(|status| {
            let changed = status.pods != state;
            status.pods = state;
            changed
        });
        tokio::select! {
            changed = pods.changed() => if changed.is_err() { return },
            () = status.closed() => return,
        }
    }
}

fn status_of(args: &Args, pipeline: &Pipeline) -> serve::Status {
    let mut status = serve::Status {
        filter: args.filter.describe().unwrap_or_default(),
        unwinding: Some(pipeline.unwinding.clone()),
        ..serve::Status::default()
    };
    for (probe, state) in &pipeline.probes {
        status.probes[*probe as usize] = match state {
            ProbeState::Active => serve::ProbeState::Active {
                frequency_hz: match probe {
                    Probe::OnCpu => args.frequency,
                    Probe::MinorFault => FAULT_HZ,
                    _ => 0,
                },
            },
            ProbeState::Off => serve::ProbeState::Inactive("not asked for".to_owned()),
            ProbeState::Failed(reason) => serve::ProbeState::Inactive(reason.clone()),
        };
    }
    status
}
