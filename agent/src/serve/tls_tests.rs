//! Clients over TCP, with certificates that are good, bad, foreign and renewed.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::{fs, path::Path};

use podflame_proto::v1::{self, profiler_client::ProfilerClient};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::{
    listen::Tcp,
    tls::{Files, Tls},
    *,
};

/// An authority, and what it signs.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate of that name and its key, in PEM.
    fn sign(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    /// Writes a server's files.
    fn write(&self, dir: &Path, clients: &Self) -> Files {
        let (cert, key) = self.sign("127.0.0.1");
        let files = Files {
            cert: dir.join("tls.crt"),
            key: dir.join("tls.key"),
            client_ca: dir.join("ca.crt"),
        };
        fs::write(&files.cert, cert).unwrap();
        fs::write(&files.key, key).unwrap();
        fs::write(&files.client_ca, &clients.pem).unwrap();
        files
    }
}

/// An agent on a port, whose clients come from one authority.
struct Agent {
    dir: TempDir,
    server: Server,
    batches: mpsc::Sender<Arc<Batch>>,
    _status: watch::Sender<Status>,
    authority: Authority,
    clients: Authority,
}

impl Agent {
    fn start(allowed: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (authority, clients) = (Authority::new(), Authority::new());
        let files = authority.write(dir.path(), &clients);
        let allowed: Vec<String> = allowed.iter().map(|name| (*name).to_owned()).collect();
        let tls = Some(Arc::new(Tls::new(files, &allowed).unwrap()));
        let mut config = Config::new(dir.path().join("agent.sock"));
        config.tcp = Some(Tcp { address: "127.0.0.1:0".parse().unwrap(), tls });
        let (batches, receiver) = mpsc::channel(1);
        let (status, current) = watch::channel(Status::default());
        let server = spawn(config, receiver, current).unwrap();
        Self { dir, server, batches, _status: status, authority, clients }
    }

    /// Whether a client gets an answer that trusts this authority and shows that identity.
    async fn answers(&self, authority: &Authority, identity: Option<(String, String)>) -> bool {
        self.ask(authority, identity).await.is_some()
    }

    async fn ask(
        &self,
        authority: &Authority,
        identity: Option<(String, String)>,
    ) -> Option<ProfilerClient<Channel>> {
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&authority.pem));
        if let Some((cert, key)) = identity {
            tls = tls.identity(Identity::from_pem(cert, key));
        }
        let url = format!("https://{}", self.server.tcp.unwrap());
        let endpoint = Endpoint::from_shared(url).unwrap().tls_config(tls).unwrap();
        let mut client = ProfilerClient::new(endpoint.connect().await.ok()?);
        client.get_status(v1::GetStatusRequest {}).await.ok()?;
        Some(client)
    }

    async fn stop(self) {
        drop(self.batches);
        self.server.finished().await.unwrap();
    }
}

#[tokio::test]
async fn only_clients_of_the_authority_and_on_the_list_get_answers() {
    let agent = Agent::start(&["oncall.example", "10.0.0.7"]);
    let (ours, clients) = (&agent.authority, &agent.clients);
    assert!(agent.answers(ours, Some(clients.sign("oncall.example"))).await);
    assert!(agent.answers(ours, Some(clients.sign("10.0.0.7"))).await);
    for name in ["other.example", "x.oncall.example", "10.0.0.8"] {
        assert!(!agent.answers(ours, Some(clients.sign(name))).await, "{name}");
    }
    assert!(!agent.answers(ours, None).await);
    assert!(!agent.answers(ours, Some(Authority::new().sign("oncall.example"))).await);
    // And the client knows whom it asks.
    assert!(!agent.answers(&Authority::new(), Some(clients.sign("oncall.example"))).await);
    agent.stop().await;
}

#[tokio::test]
async fn without_a_list_the_authority_is_enough() {
    let agent = Agent::start(&[]);
    assert!(agent.answers(&agent.authority, Some(agent.clients.sign("any.example"))).await);
    assert!(!agent.answers(&agent.authority, None).await);
    agent.stop().await;
}

#[tokio::test]
async fn renewed_certificates_are_used_at_once_and_bad_ones_never() {
    let agent = Agent::start(&[]);
    let identity = agent.clients.sign("a.example");
    let mut open = agent.ask(&agent.authority, Some(identity.clone())).await.unwrap();
    // Half written: the old ones stay.
    fs::write(agent.dir.path().join("tls.key"), "-----BEGIN PRIVATE KEY-----").unwrap();
    assert!(agent.answers(&agent.authority, Some(identity.clone())).await);
    let (server, clients) = (Authority::new(), Authority::new());
    server.write(agent.dir.path(), &clients);
    // Bad files are tried again a second later.
    let renewed = async {
        while !agent.answers(&server, Some(clients.sign("a.example"))).await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(20), renewed).await.unwrap();
    assert!(!agent.answers(&agent.authority, Some(identity.clone())).await);
    assert!(!agent.answers(&server, Some(identity)).await);
    // Who was let in stays.
    open.get_status(v1::GetStatusRequest {}).await.unwrap();
    agent.stop().await;
}

#[tokio::test]
async fn nobody_is_served_openly() {
    let open = Tcp { address: "0.0.0.0:0".parse().unwrap(), tls: None };
    let error = open.bind().unwrap_err().to_string();
    assert!(error.contains("0.0.0.0:0") && error.contains("--tls-cert"), "{error}");
    let loopback = Tcp { address: "[::1]:0".parse().unwrap(), tls: None };
    assert!(loopback.bind().unwrap().tcp_address().is_some());
}

#[test]
fn bad_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let files = authority.write(dir.path(), &authority);
    let error = |files: &Files, name: &str| {
        Tls::new(files.clone(), &[name.to_owned()]).unwrap_err().to_string()
    };
    assert!(error(&files, "no name at all").contains("no name at all"));
    let gone = Files { key: dir.path().join("gone"), ..files.clone() };
    assert!(error(&gone, "a.example").contains("gone: No such file"), "{}", error(&gone, "a"));
    let swapped = Files { cert: files.key.clone(), ..files.clone() };
    assert!(error(&swapped, "a.example").contains("no certificate in it"));
    let (_, foreign) = authority.sign("127.0.0.1");
    fs::write(&files.key, foreign).unwrap();
    assert!(error(&files, "a.example").contains("tls.key"), "{}", error(&files, "a.example"));
    fs::write(&files.cert, vec![b'x'; 2 << 20]).unwrap();
    assert!(error(&files, "a.example").contains("larger than"));
}
