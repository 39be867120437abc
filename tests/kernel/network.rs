//! An agent on the network: who gets an answer.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use podflame_tests::podflame;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::Value;

use crate::{Test, running::Agent};

pub(crate) const TESTS: &[Test] = &[
    ("clients_need_a_certificate", clients_need_a_certificate),
    ("nothing_is_served_openly", nothing_is_served_openly),
];

/// Writes an authority's certificate, and one that it signs for each name with its key, to files of the
/// names.
fn certificates(dir: &Path, authority: &str, names: &[&str]) -> Result<()> {
    let mut params = CertificateParams::new(vec![])?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate()?;
    fs::write(dir.join(authority), params.self_signed(&key)?.pem())?;
    let issuer = Issuer::new(params, key);
    for name in names {
        let key = KeyPair::generate()?;
        let signed = CertificateParams::new(vec![(*name).to_owned()])?.signed_by(&key, &issuer)?;
        fs::write(dir.join(name), signed.pem())?;
        fs::write(dir.join(format!("{name}.key")), key.serialize_pem())?;
    }
    Ok(())
}

fn clients_need_a_certificate() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name).display().to_string();
    certificates(dir.path(), "ca", &["127.0.0.1", "oncall.example", "other.example"])?;
    let mut agent = Agent::start(&[
        "--signal",
        "cpu",
        "--listen",
        "127.0.0.1:0",
        "--tls-cert",
        &path("127.0.0.1"),
        "--tls-key",
        &path("127.0.0.1.key"),
        "--tls-client-ca",
        &path("ca"),
        "--allow-client",
        "oncall.example",
    ])?;
    let log = agent.running.stderr()?;
    let port = log.split("address=127.0.0.1:").nth(1).context("no address in the log")?;
    let port: String = port.chars().take_while(char::is_ascii_digit).collect();
    let url = format!("https://127.0.0.1:{port}");
    let ask = |what: &[&str], name: Option<&str>| -> Result<std::process::Output> {
        let mut command = podflame()?;
        command.args(what).args(["--connect", &url, "--ca", &path("ca")]);
        if let Some(name) = name {
            command.args(["--cert", &path(name), "--key", &path(&format!("{name}.key"))]);
        }
        Ok(command.output()?)
    };
    let status = ask(&["status", "--format", "json"], Some("oncall.example"))?;
    ensure!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    let status: Value = serde_json::from_slice(&status.stdout)?;
    let probes = status["probes"].as_array().context("no probes")?;
    assert!(probes.iter().any(|probe| probe["active"] == true), "{status}");
    for name in [None, Some("other.example")] {
        let refused = ask(&["status"], name)?;
        let error = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{error}");
        assert!(error.contains(&url), "{error}");
    }
    agent.terminate()
}

fn nothing_is_served_openly() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let refused = |arguments: &[&str]| -> Result<String> {
        let mut agent = Agent::run(&dir.path().join("s"), arguments)?;
        assert_eq!(agent.end()?.code(), Some(2));
        agent.stderr()
    };
    let error = refused(&["--listen", "0.0.0.0:0"])?;
    assert!(error.contains("--listen 0.0.0.0:0") && error.contains("--tls-cert"), "{error}");
    let error = refused(&["--listen", "0.0.0.0:0", "--insecure-loopback"])?;
    assert!(error.contains("127.0.0.1 and ::1 alone"), "{error}");
    let error = refused(&["--listen", "127.0.0.1:0"])?;
    assert!(error.contains("without TLS, anyone could ask"), "{error}");
    Ok(())
}
