//! The unix socket and the TCP port, and what may come in through them.
//!
//! A connection takes a place only once it has sent the HTTP/2 preface, over TCP after its TLS handshake,
//! so that silent or foreign connections cannot keep a client out.

use std::{
    collections::VecDeque,
    fs, io,
    net::SocketAddr as TcpAddr,
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
        net::SocketAddr,
    },
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::{AbortHandle, JoinSet},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;

use super::tls::{Tls, TlsError};

/// Most connections that speak HTTP/2. Each takes a file descriptor and some 100 KiB.
pub const MAX_CONNECTIONS: usize = 128;

/// Most connections that have not sent the preface yet; the oldest makes room for the next.
pub const MAX_SILENT: usize = 128;

/// A connection that has not shaken hands and sent the preface in this time is closed.
pub const PREFACE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to leave the listener alone when the system has no descriptor or memory for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What every HTTP/2 client sends first (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another agent serves it.
    #[error("{0}: another agent answers on this socket: stop it, or choose another socket path")]
    InUse(PathBuf),
    /// There is something else.
    #[error("{0}: this is not a socket: remove it, or choose another socket path")]
    NotASocket(PathBuf),
    /// The system refuses.
    #[error("{0}: cannot {1}: {2}: choose a socket path that this user can write to")]
    System(PathBuf, &'static str, #[source] io::Error),
}

/// Why a TCP port cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum TcpError {
    /// Anyone on the network could ask.
    #[error(
        "--listen {0}: anyone could ask there: give --tls-cert, --tls-key and --tls-client-ca \
         (or --insecure-loopback for 127.0.0.1 and ::1 alone)"
    )]
    Open(TcpAddr),
    /// The certificates.
    #[error("TLS: {0}")]
    Tls(#[from] TlsError),
    /// The system refuses.
    #[error("--listen {0}: {1}: choose another port")]
    System(TcpAddr, #[source] io::Error),
}

/// How to listen on TCP.
#[derive(Clone, Debug)]
pub struct Tcp {
    /// The address and port.
    pub address: TcpAddr,
    /// Who may ask; anyone on this machine if there is none, which is for loopback alone.
    pub tls: Option<Arc<Tls>>,
}

impl Tcp {
    /// Listens.
    ///
    /// # Errors
    /// When anyone on the network could ask, or the system refuses.
    pub fn bind(&self) -> Result<Listener, TcpError> {
        if self.tls.is_none() && !self.address.ip().is_loopback() {
            return Err(TcpError::Open(self.address));
        }
        let fail = |error| TcpError::System(self.address, error);
        let listener = std::net::TcpListener::bind(self.address).map_err(fail)?;
        listener.set_nonblocking(true).map_err(fail)?;
        let listener = TcpListener::from_std(listener).map_err(fail)?;
        Ok(Listener::Tcp(listener, self.tls.clone()))
    }
}

/// Where connections come in.
#[derive(Debug)]
pub enum Listener {
    /// Those of this user.
    Unix(UnixListener),
    /// Those that TLS lets in; all if there is none.
    Tcp(TcpListener, Option<Arc<Tls>>),
}

impl Listener {
    /// The address and port, of TCP.
    #[must_use]
    pub fn tcp_address(&self) -> Option<TcpAddr> {
        match self {
            Self::Unix(_) => None,
            Self::Tcp(listener, _) => listener.local_addr().ok(),
        }
    }

    /// The next connection, which has said nothing yet.
    async fn accept(&self) -> io::Result<Raw> {
        Ok(match self {
            Self::Unix(listener) => Raw::Unix(listener.accept().await?.0),
            Self::Tcp(listener, tls) => {
                let (stream, from) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Raw::Tcp(stream, from, tls.clone())
            }
        })
    }
}

/// A connection that has said nothing yet.
enum Raw {
    Unix(UnixStream),
    Tcp(TcpStream, TcpAddr, Option<Arc<Tls>>),
}

impl Raw {
    /// Shakes hands; `None` if the other end cannot or may not.
    async fn greet(self) -> Option<Stream> {
        match self {
            Self::Unix(stream) => Some(Stream::Unix(stream)),
            Self::Tcp(stream, _, None) => Some(Stream::Tcp(stream)),
            Self::Tcp(stream, from, Some(tls)) => {
                let shaken = TlsAcceptor::from(tls.config()).accept(stream).await;
                let stream = shaken
                    .inspect_err(|error| tracing::debug!(%from, %error, "no TLS handshake"))
                    .ok()?;
                let may = tls.allows(stream.get_ref().1.peer_certificates());
                if !may {
                    tracing::debug!(%from, "a client whose name is not on the list");
                }
                may.then(|| Stream::Tls(Box::new(stream)))
            }
        }
    }
}

/// What a connection speaks over.
#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Does the same with whatever it is.
macro_rules! each {
    ($stream:expr, $inner:ident => $do:expr) => {
        match $stream {
            Stream::Unix($inner) => $do,
            Stream::Tcp($inner) => $do,
            Stream::Tls($inner) => $do,
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        each!(self.get_mut(), stream => Pin::new(stream).poll_read(cx, to))
    }
}

/// The file of a socket that is listened on, removed at the end.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Its device and inode, which tell whether it is still ours.
    id: Option<(u64, u64)>,
}

fn file_id(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.id.is_some() && file_id(&self.path) == self.id {
            // Nobody is left to tell: the next agent replaces a stale file.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens on a socket that only this user may open. Its directory is made, for this user alone, if
/// it is not there. The file of an agent that died is replaced.
///
/// # Errors
/// When another agent answers there, something else is there, or the system refuses.
pub fn bind(path: &Path) -> Result<(UnixListener, SocketFile), ListenError> {
    let fail = |what| move |error| ListenError::System(path.to_owned(), what, error);
    // It is bound under another name below, so the system would not object to a path that is longer
    // than clients can name (108 bytes with the NUL, unix(7)).
    SocketAddr::from_pathname(path).map_err(fail("be the address of a socket"))?;
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    if !directory.exists() {
        let mut builder = fs::DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(fail("make its directory"))?;
    }
    // Two agents that start at once take turns.
    let turn = fs::File::open(directory).map_err(fail("open its directory"))?;
    turn.lock().map_err(fail("lock its directory"))?;
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail("look at it")(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ListenError::NotASocket(path.to_owned()));
        }
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => return Err(ListenError::InUse(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(fail("ask whether an agent answers")(error)),
        },
    }
    // A socket's mode can only be set once it is there, so it is made where nobody else can look,
    // and put in its place when it is closed to others.
    let private = tempfile::tempdir_in(directory).map_err(fail("make a directory beside it"))?;
    let made = private.path().join("s");
    let listener = UnixListener::bind(&made).map_err(fail("listen"))?;
    let mode = fs::Permissions::from_mode(0o600);
    fs::set_permissions(&made, mode).map_err(fail("set its mode"))?;
    fs::rename(&made, path).map_err(fail("put it in its place"))?;
    Ok((listener, SocketFile { path: path.to_owned(), id: file_id(path) }))
}

/// A connection that speaks HTTP/2.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    /// What is left of the preface, which was read already.
    preface: &'static [u8],
    _place: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.preface.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, to);
        }
        let (now, later) = self.preface.split_at(self.preface.len().min(to.remaining()));
        to.put_slice(now);
        self.preface = later;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        each!(&mut self.stream, stream => Pin::new(stream).poll_write(cx, from))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(&mut self.stream, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(&mut self.stream, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

/// Accepts connections until nobody takes them any more.
/// `places` are [`MAX_CONNECTIONS`], whatever they come in by.
pub async fn accept(
    listener: Listener,
    places: Arc<Semaphore>,
    connections: mpsc::Sender<io::Result<Connection>>,
) {
    let mut silent = JoinSet::new();
    let mut oldest: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        tokio::select! {
            () = connections.closed() => return,
            Some(done) = silent.join_next() => {
                // Without a place, the connection is closed by dropping it.
                if let Ok(Some(stream)) = done
                    && let Ok(place) = Arc::clone(&places).try_acquire_owned()
                {
                    let connection = Connection { stream, preface: PREFACE, _place: place };
                    if connections.send(Ok(connection)).await.is_err() {
                        return;
                    }
                }
            }
            accepted = listener.accept() => match accepted {
                Ok(raw) => {
                    oldest.retain(|task| !task.is_finished());
                    if oldest.len() >= MAX_SILENT && let Some(task) = oldest.pop_front() {
                        task.abort();
                    }
                    oldest.push_back(silent.spawn(greeted(raw)));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// The stream, once it has sent the preface; `None` if it sends something else, or nothing in time.
async fn greeted(raw: Raw) -> Option<Stream> {
    let greeted = async {
        let mut stream = raw.greet().await?;
        let mut preface = [0; PREFACE.len()];
        stream.read_exact(&mut preface).await.ok()?;
        (preface == *PREFACE).then_some(stream)
    };
    tokio::time::timeout(PREFACE_TIMEOUT, greeted).await.ok().flatten()
}
