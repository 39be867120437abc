//! Serves what the agent has to programs: `podflame.v1` over gRPC, on a unix socket and, if told to, over
//! TCP with TLS, with `grpc.health.v1` and reflection.
//!
//! Two tasks: the [`hub`] owns all state, and the server asks it. They end when the batches end: each
//! stream gets its final counts and a clean end. Not for rendering, which is [`crate::export`]'s.

pub mod convert;
pub mod grpc;
pub mod hub;
pub mod listen;
pub mod tls;

use std::{fs, net::SocketAddr, path::PathBuf, pin::pin, sync::Arc, time::Duration};

use podflame_proto::{DESCRIPTORS, v1::profiler_server::ProfilerServer};
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server as Transport;

use crate::{
    clock::Clock,
    event::{KTime, Probe},
    pods,
    profile::Batch,
    store::Store,
    unwinder::Unwinding,
};
use grpc::MAX_REQUEST_BYTES;
use listen::{ListenError, Listener, MAX_CONNECTIONS, Tcp, TcpError};

/// Where an agent is served and asked unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/podflame/podflame.sock";

/// A client that is not heard from for this long is asked whether it is there.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// A client that does not answer within this time is gone.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Most calls at once on one connection.
pub const MAX_CALLS: u32 = 32;

/// Most bytes of the headers of a call.
pub const MAX_HEADER_BYTES: u32 = 16 << 10;

/// How long clients may take to read the end of their streams when the agent ends.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Questions to the hub that wait at most; askers wait beyond that.
const COMMANDS: usize = 64;

/// How to serve, and who serves.
#[derive(Clone, Debug)]
pub struct Config {
    /// The unix socket.
    pub socket: PathBuf,
    /// The TCP port, if any.
    pub tcp: Option<Tcp>,
    /// How finely samples are remembered.
    pub window: Duration,
    /// How long they are remembered.
    pub retention: Duration,
    /// Most memory they take, in bytes.
    pub max_bytes: usize,
    /// Distinguishes this run of the agent from every other.
    pub epoch: u64,
    /// When the agent started.
    pub started: KTime,
    /// Name of the node.
    pub node: String,
    /// Release of the kernel.
    pub kernel_release: String,
}

impl Config {
    /// The defaults: windows of 10 s, kept for 15 min in at most 64 MiB. The epoch is the wall
    /// clock's time in nanoseconds.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        let clock = Clock::now();
        let since_1970 = clock.wall.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let kernel = |name: &str| {
            let text = fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap_or_default();
            text.trim().to_owned()
        };
        Self {
            socket,
            tcp: None,
            window: Duration::from_secs(10),
            retention: Duration::from_mins(15),
            max_bytes: 64 << 20,
            epoch: u64::try_from(since_1970.as_nanos()).unwrap_or_default(),
            started: clock.monotonic,
            node: kernel("hostname"),
            kernel_release: kernel("osrelease"),
        }
    }
}

/// What clients are told of the agent that is in no batch.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// What the agent is limited to, in words; empty if it observes the whole node.
    pub filter: String,
    /// By [`Probe`] number.
    pub probes: [ProbeState; Probe::ALL.len()],
    /// Who names pods.
    pub pods: pods::State,
    /// Who names peers outside of this node, as it changes.
    pub peers: Option<pods::LatestPeers>,
    /// What is known for unwinding, as it changes.
    pub unwinding: Option<watch::Receiver<Unwinding>>,
}

/// Whether a probe works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeState {
    /// It is attached.
    Active {
        /// Samples a second on each CPU that it aims at; 0 if it takes every event.
        frequency_hz: u32,
    },
    /// It is not, for this reason.
    Inactive(String),
}

impl Default for ProbeState {
    fn default() -> Self {
        Self::Inactive("not started".into())
    }
}

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The TCP port.
    #[error(transparent)]
    Tcp(#[from] TcpError),
    /// The description of the API, built in.
    #[error("the API's descriptors: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The server.
    #[error("the gRPC server: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// A task died.
    #[error("a task of the gRPC server died: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// A server that runs.
#[derive(Debug)]
pub struct Server {
    task: JoinHandle<Result<(), ServeError>>,
    /// Where it listens on TCP, if it does.
    pub tcp: Option<SocketAddr>,
}

impl Server {
    /// Waits until the server ends, which it does by itself only if it fails. May be given up and
    /// called again.
    ///
    /// # Errors
    /// When the server failed.
    pub async fn failed(&mut self) -> Result<(), ServeError> {
        (&mut self.task).await?
    }

    /// Waits until the batches have ended and the clients have read the end of their streams, but for
    /// those that take longer than [`DRAIN_TIMEOUT`]. Then the socket is gone.
    ///
    /// # Errors
    /// When the server failed.
    pub async fn finished(self) -> Result<(), ServeError> {
        self.task.await?
    }
}

/// Starts to serve. The socket answers when this returns; it has to be called in a tokio runtime.
///
/// # Errors
/// When the socket cannot be served.
pub fn spawn(
    config: Config,
    batches: mpsc::Receiver<Arc<Batch>>,
    status: watch::Receiver<Status>,
) -> Result<Server, ServeError> {
    let tcp = config.tcp.as_ref().map(Tcp::bind).transpose()?;
    let address = tcp.as_ref().and_then(Listener::tcp_address);
    let (listener, file) = listen::bind(&config.socket)?;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let (new, old) = (reflection().build_v1()?, reflection().build_v1alpha()?);
    let store = Store::new(config.window, config.retention, config.max_bytes);
    let hub = hub::Hub::new(store, config.max_bytes);
    let (commands, asked) = mpsc::channel(COMMANDS);
    let hub = tokio::spawn(hub.run(batches, asked));
    let profiler = grpc::Profiler::new(Arc::new(config), commands, status);
    let profiler = ProfilerServer::new(profiler).max_decoding_message_size(MAX_REQUEST_BYTES);

    let (accepted, incoming) = mpsc::channel(1);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    for listener in [Some(Listener::Unix(listener)), tcp].into_iter().flatten() {
        tokio::spawn(listen::accept(listener, Arc::clone(&places), accepted.clone()));
    }
    drop(accepted);
    let (stop, stopped) = oneshot::channel();
    let (health, health_service) = tonic_health::server::health_reporter();
    let router = Transport::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(MAX_CALLS)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .add_service(profiler)
        .add_service(health_service)
        .add_service(new)
        .add_service(old);
    let task = async move {
        // Removed when the server is done.
        let _file = file;
        health.set_serving::<ProfilerServer<grpc::Profiler>>().await;
        let stopped = async {
            let _ = stopped.await;
        };
        let served = router.serve_with_incoming_shutdown(ReceiverStream::new(incoming), stopped);
        let mut served = pin!(served);
        tokio::select! {
            early = &mut served => return Ok(early?),
            ended = hub => ended?,
        }
        health.set_not_serving::<ProfilerServer<grpc::Profiler>>().await;
        let _ = stop.send(());
        match timeout(DRAIN_TIMEOUT, served).await {
            Ok(served) => served?,
            Err(_) => tracing::warn!("some clients did not read the end of their streams"),
        }
        Ok(())
    };
    Ok(Server { task: tokio::spawn(task), tcp: address })
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_tests;
