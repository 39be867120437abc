//! The unix socket, and what may come in through it.
//!
//! A connection takes a place only once it has sent the HTTP/2 preface, so that silent or foreign
//! connections cannot keep a client out.

use std::{
    collections::VecDeque,
    fs, io,
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
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::{AbortHandle, JoinSet},
};
use tonic::transport::server::Connected;

/// Most connections that speak HTTP/2. Each takes a file descriptor and some 100 KiB.
pub const MAX_CONNECTIONS: usize = 128;

/// Most connections that have not sent the preface yet; the oldest makes room for the next.
pub const MAX_SILENT: usize = 128;

/// A connection that has not sent the preface in this time is closed.
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
    stream: UnixStream,
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
        Pin::new(&mut self.stream).poll_write(cx, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Accepts connections until nobody takes them any more.
pub async fn accept(listener: UnixListener, connections: mpsc::Sender<io::Result<Connection>>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
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
                Ok((stream, _)) => {
                    oldest.retain(|task| !task.is_finished());
                    if oldest.len() >= MAX_SILENT && let Some(task) = oldest.pop_front() {
                        task.abort();
                    }
                    oldest.push_back(silent.spawn(greeted(stream)));
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
async fn greeted(mut stream: UnixStream) -> Option<UnixStream> {
    let mut preface = [0; PREFACE.len()];
    let read = tokio::time::timeout(PREFACE_TIMEOUT, stream.read_exact(&mut preface)).await;
    (matches!(read, Ok(Ok(_))) && preface == *PREFACE).then_some(stream)
}
