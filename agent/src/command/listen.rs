//! Where an agent answers, and whom: the options `--socket`, `--listen` and their like.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::bail;

use super::Usage;
use crate::serve::{
    self,
    listen::Tcp,
    tls::{Files, Tls},
};

/// Where to serve.
#[derive(Clone, Debug, clap::Args)]
// Every group of arguments has a name of its own.
#[group(id = "listen-options")]
pub struct Args {
    /// Unix socket to serve on; its directory is made for the owner alone
    #[arg(long, value_name = "PATH", env = "PODFLAME_SOCKET", default_value = serve::DEFAULT_SOCKET)]
    pub socket: PathBuf,

    /// Address and port to serve on as well, by TLS for clients with a certificate
    #[arg(long, value_name = "ADDRESS:PORT", env = "PODFLAME_LISTEN")]
    pub listen: Option<SocketAddr>,

    /// Certificate of the server, and those that lead to its authority (PEM). Read again when it changes
    #[arg(long, value_name = "FILE", env = "PODFLAME_TLS_CERT", requires_all = ["listen", "tls_key", "tls_client_ca"])]
    pub tls_cert: Option<PathBuf>,

    /// Its private key (PEM)
    #[arg(long, value_name = "FILE", env = "PODFLAME_TLS_KEY", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// Authorities of the certificates of clients (PEM)
    #[arg(long, value_name = "FILE", env = "PODFLAME_TLS_CLIENT_CA", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,

    /// Only clients whose certificate has this DNS name or IP address. May be repeated
    #[arg(
        long = "allow-client",
        value_name = "NAME",
        env = "PODFLAME_ALLOW_CLIENT",
        value_delimiter = ',',
        requires = "tls_cert"
    )]
    pub allow_clients: Vec<String>,

    /// Serve whoever is on this machine, without TLS; for 127.0.0.1 and ::1 alone
    #[arg(long, requires = "listen", conflicts_with = "tls_cert")]
    pub insecure_loopback: bool,
}

impl Args {
    /// How to listen on TCP, if at all.
    ///
    /// # Errors
    ///
    /// If anyone could ask, or the certificates cannot be used.
    pub fn tcp(&self) -> anyhow::Result<Option<Tcp>> {
        let Some(address) = self.listen else { return Ok(None) };
        let (Some(cert), Some(key), Some(client_ca)) =
            (self.tls_cert.clone(), self.tls_key.clone(), self.tls_client_ca.clone())
        else {
            if self.insecure_loopback && address.ip().is_loopback() {
                return Ok(Some(Tcp { address, tls: None }));
            }
            let why = if self.insecure_loopback {
                "--insecure-loopback is for 127.0.0.1 and ::1 alone"
            } else {
                "without TLS, anyone could ask"
            };
            bail!(Usage(format!(
                "--listen {address}: {why}: give --tls-cert, --tls-key and --tls-client-ca"
            )));
        };
        let tls = Tls::new(Files { cert, key, client_ca }, &self.allow_clients)?;
        Ok(Some(Tcp { address, tls: Some(Arc::new(tls)) }))
    }
}
