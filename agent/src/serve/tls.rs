//! Who may ask over TCP: clients with a certificate of a certain authority, and of certain names.
//!
//! TLS 1.2 or 1.3 by rustls, with a certificate on either side. The files are looked at before each
//! handshake, and read again when they changed, so that certificates are renewed without a restart (also
//! by the exchange of a symbolic link, as Kubernetes does with a mounted Secret). Sessions are never
//! resumed: each connection proves anew who it is.

use std::{
    fmt, fs,
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier},
};

/// Largest file, in bytes: chains of a few certificates have some KiB, bundles of authorities 200 KiB.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// How soon files that could not be read are tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// Where certificates are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The server's certificate, with those that lead to its authority, in PEM.
    pub cert: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
    /// The authorities of clients, in PEM.
    pub client_ca: PathBuf,
}

/// Why a client cannot be trusted, or nobody can.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file.
    #[error("{0}: {1}")]
    File(PathBuf, String),
    /// The files do not go together.
    #[error("{cert} and {key}: {reason}", cert = .0.cert.display(), key = .0.key.display(), reason = .1)]
    Mismatch(Box<Files>, rustls::Error),
    /// The authorities of clients cannot be used.
    #[error("{0}: {1}")]
    Authorities(PathBuf, String),
    /// Not a name that a certificate can have.
    #[error("{0:?} is no DNS name and no IP address of a client")]
    Name(String),
}

/// What a file was when it was read: device, inode, size, and when it was changed.
type Stamp = [(u64, u64, u64, i64, i64); 3];

/// See the module.
pub struct Tls {
    files: Files,
    /// Names of clients; any if empty.
    allowed: Vec<ServerName<'static>>,
    state: Mutex<State>,
}

struct State {
    config: Arc<ServerConfig>,
    stamp: Option<Stamp>,
    /// When the files were last found bad.
    failed: Option<Instant>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { files, allowed, .. } = self;
        f.debug_struct("Tls")
            .field("files", files)
            .field("allowed", allowed)
            .finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads the files. Clients have to have one of these names in their certificate (its subject
    /// alternative names), or any if there are none.
    ///
    /// # Errors
    /// When a file cannot be used, or a name is none.
    pub fn new(files: Files, allowed: &[String]) -> Result<Self, TlsError> {
        let name = |name: &String| {
            ServerName::try_from(name.clone()).map_err(|_| TlsError::Name(name.clone()))
        };
        let allowed = allowed.iter().map(name).collect::<Result<_, _>>()?;
        // Before reading: what changes meanwhile is read again.
        let stamp = stamp(&files).ok();
        let config = load(&files)?;
        Ok(Self { files, allowed, state: Mutex::new(State { config, stamp, failed: None }) })
    }

    /// What to shake hands by now.
    #[must_use]
    pub fn config(&self) -> Arc<ServerConfig> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = stamp(&self.files).ok();
        let again = state.failed.is_none_or(|failed| failed.elapsed() >= AGAIN);
        if now != state.stamp && again {
            match load(&self.files) {
                Ok(config) => {
                    tracing::info!(cert = %self.files.cert.display(), "certificates read again");
                    *state = State { config, stamp: now, failed: None };
                }
                Err(error) => {
                    if state.failed.is_none() {
                        tracing::warn!("certificates changed, the old ones stay in use: {error}");
                    }
                    state.failed = Some(Instant::now());
                }
            }
        }
        Arc::clone(&state.config)
    }

    /// Whether a client whose certificate was verified is one of those that may ask.
    #[must_use]
    pub fn allows(&self, certificates: Option<&[CertificateDer<'_>]>) -> bool {
        let Some(leaf) = certificates.and_then(<[_]>::first) else { return false };
        let Ok(leaf) = ParsedCertificate::try_from(leaf) else { return false };
        let is = |name| rustls::client::verify_server_name(&leaf, name).is_ok();
        self.allowed.is_empty() || self.allowed.iter().any(is)
    }
}

fn stamp(files: &Files) -> io::Result<Stamp> {
    let of = |path: &Path| {
        let m = fs::metadata(path)?;
        io::Result::Ok((m.dev(), m.ino(), m.size(), m.mtime(), m.mtime_nsec()))
    };
    Ok([of(&files.cert)?, of(&files.key)?, of(&files.client_ca)?])
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let fail = |reason: String| TlsError::File(path.to_owned(), reason);
    let file = fs::File::open(path).map_err(|e| fail(e.to_string()))?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|e| fail(e.to_string()))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(fail(format!("larger than {MAX_FILE_BYTES} bytes")));
    }
    Ok(bytes)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let fail = |reason: String| TlsError::File(path.to_owned(), reason);
    let all = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| fail(format!("no certificates in PEM: {e}")))?;
    if all.is_empty() { Err(fail("no certificate in it (PEM)".to_owned())) } else { Ok(all) }
}

fn load(files: &Files) -> Result<Arc<ServerConfig>, TlsError> {
    let chain = certificates(&files.cert)?;
    let key = PrivateKeyDer::from_pem_slice(&read(&files.key)?)
        .map_err(|e| TlsError::File(files.key.clone(), format!("no private key in PEM: {e}")))?;
    let bad = |reason: String| TlsError::Authorities(files.client_ca.clone(), reason);
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&files.client_ca)? {
        roots.add(certificate).map_err(|e| bad(e.to_string()))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|e| bad(e.to_string()))?;
    let mismatch = |e| TlsError::Mismatch(Box::new(files.clone()), e);
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(mismatch)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(mismatch)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}
