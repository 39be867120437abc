//! What the commands that ask an agent share: how to reach it, what to select, and how to say it.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use podflame_proto::v1::{self, profiler_client::ProfilerClient};
use serde::Serialize;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::{profile::Signal, serve::convert::to_signal};

/// How long to wait until an agent accepts a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Which agent to ask.
#[derive(Clone, Debug, clap::Args)]
pub struct Connect {
    /// The agent to ask, as `unix://PATH`, `https://HOST:PORT` or, on this machine,
    /// `http://127.0.0.1:PORT`.
    #[arg(
        long = "connect",
        value_name = "URL",
        env = "PODFLAME_CONNECT",
        default_value = "unix:///run/podflame/podflame.sock"
    )]
    pub url: String,
    /// Authorities of the agent's certificate (PEM), for https.
    #[arg(long, value_name = "FILE", env = "PODFLAME_CLIENT_CA")]
    pub ca: Option<PathBuf>,
    /// Certificate to show to the agent (PEM), for https.
    #[arg(long, value_name = "FILE", env = "PODFLAME_CLIENT_CERT", requires = "key")]
    pub cert: Option<PathBuf>,
    /// Its private key (PEM).
    #[arg(long, value_name = "FILE", env = "PODFLAME_CLIENT_KEY", requires = "cert")]
    pub key: Option<PathBuf>,
}

impl Connect {
    /// Connects.
    ///
    /// # Errors
    /// When no agent answers, with what to do about it.
    pub async fn profiler(&self) -> anyhow::Result<ProfilerClient<Channel>> {
        let url = &self.url;
        let endpoint = self.endpoint()?.connect_timeout(CONNECT_TIMEOUT);
        let channel = endpoint.connect().await.map_err(|error| {
            let cause = anyhow!(error).root_cause().to_string();
            anyhow!(
                "no agent answers at {url} ({cause}): \
                 start one with `podflame agent`, or name its socket with --connect"
            )
        })?;
        Ok(ProfilerClient::new(channel))
    }

    fn endpoint(&self) -> anyhow::Result<Endpoint> {
        let url = &self.url;
        let bad = || format!("--connect {url}");
        if let Some(path) = url.strip_prefix("unix:").map(|p| p.strip_prefix("//").unwrap_or(p))
            && Path::new(path).is_absolute()
        {
            return Endpoint::try_from(format!("unix://{path}")).with_context(bad);
        }
        if url.starts_with("https://") {
            let endpoint = Endpoint::from_shared(url.clone()).with_context(bad)?;
            return endpoint.tls_config(self.tls()?).with_context(bad);
        }
        if let Some(address) = url.strip_prefix("http://") {
            let address = address.trim_end_matches('/').parse::<std::net::SocketAddr>();
            if address.is_ok_and(|address| address.ip().is_loopback()) {
                return Endpoint::from_shared(url.clone()).with_context(bad);
            }
        }
        bail!(
            "--connect {url}: name the agent's socket, as unix:///run/podflame/podflame.sock, or its \
             port, as https://HOST:PORT (http only for 127.0.0.1 and ::1)"
        )
    }

    fn tls(&self) -> anyhow::Result<ClientTlsConfig> {
        let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
        let Some(ca) = &self.ca else {
            bail!(
                "--connect {}: give --ca FILE, the authority of the agent's certificate",
                self.url
            );
        };
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?));
        if let (Some(cert), Some(key)) = (&self.cert, &self.key) {
            tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        Ok(tls)
    }

    /// What to tell of a call that failed.
    #[must_use]
    pub fn failed(&self, status: &tonic::Status) -> anyhow::Error {
        match status.code() {
            tonic::Code::Unavailable | tonic::Code::Unknown | tonic::Code::Cancelled => anyhow!(
                "the agent at {} went away before it was done ({}): see its log, then try again",
                self.url,
                printable(status.message())
            ),
            _ => anyhow!("the agent at {}: {}", self.url, printable(status.message())),
        }
    }
}

/// Which workloads and processes to show.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Filters {
    /// Only workloads of this name, as `podflame watch` shows them. May be repeated.
    #[arg(long, value_name = "NAME")]
    pub workload: Vec<String>,
    /// Only this pod. May be repeated.
    #[arg(long, value_name = "[NAMESPACE/]NAME")]
    pub pod: Vec<String>,
    /// Only the container of this ID, or of an ID that starts so. May be repeated.
    #[arg(long, value_name = "ID")]
    pub container: Vec<String>,
    /// Only this cgroup and those below it, as a path below the cgroup mount. May be repeated.
    #[arg(long, value_name = "PATH")]
    pub cgroup: Vec<String>,
    /// Only this process. May be repeated.
    #[arg(long, value_name = "PID")]
    pub pid: Vec<u32>,
}

impl Filters {
    /// The workload filters of a request.
    #[must_use]
    pub fn workloads(&self) -> Vec<v1::WorkloadFilter> {
        let any = v1::WorkloadFilter::default;
        let mut all = Vec::new();
        all.extend(self.workload.iter().map(|n| v1::WorkloadFilter { name: n.clone(), ..any() }));
        all.extend(self.pod.iter().map(|p| {
            let (namespace, pod) = p.split_once('/').unwrap_or(("", p));
            v1::WorkloadFilter { namespace: namespace.into(), pod: pod.into(), ..any() }
        }));
        let container = |c: &String| v1::WorkloadFilter { container_id: c.clone(), ..any() };
        all.extend(self.container.iter().map(container));
        let cgroup = |c: &String| v1::WorkloadFilter { cgroup_prefix: c.clone(), ..any() };
        all.extend(self.cgroup.iter().map(cgroup));
        all
    }
}

/// Parses the name of a signal, and lists them in the help.
#[must_use]
pub fn signal_parser() -> impl clap::builder::TypedValueParser<Value = Signal> {
    PossibleValuesParser::new(Signal::ALL.map(Signal::name))
        .try_map(|name| Signal::ALL.into_iter().find(|s| s.name() == name).ok_or("no such signal"))
}

/// The numbers of signals in a request.
#[must_use]
pub fn signal_numbers(signals: &[Signal]) -> Vec<i32> {
    signals.iter().map(|s| to_signal(*s)).collect()
}

/// Parses a duration such as `90s`, `5m`, `2h` or `500ms`.
///
/// # Errors
/// When it has another form.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor_ms = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err("use a number and ms, s, m, h or d, such as 5m".into()),
    };
    let number: u64 = number.parse().map_err(|_| "use a whole number and a unit, such as 5m")?;
    let ms = number.checked_mul(factor_ms).ok_or("that is too long")?;
    Ok(Duration::from_millis(ms))
}

/// Whether a terminal could obey the character, or show text in another order because of it.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Text from elsewhere that is safe to show: what a terminal could obey is written as `\u{…}`.
#[must_use]
pub fn printable(text: &str) -> String {
    let escape = |c: char| -> String {
        if is_unsafe(c) { c.escape_unicode().to_string() } else { c.into() }
    };
    text.chars().map(escape).collect()
}

/// One line of JSON, in which every character that a terminal could obey is escaped.
///
/// # Errors
/// When the value cannot be JSON.
pub fn json_line(value: &impl Serialize) -> serde_json::Result<String> {
    let json = serde_json::to_string(value)?;
    // Outside strings, JSON of serde has none of these characters; all are in the first plane.
    let escape = |c: char| -> String {
        if is_unsafe(c) { format!("\\u{:04x}", u32::from(c)) } else { c.into() }
    };
    Ok(json.chars().map(escape).chain(["\n".into()]).collect())
}

/// Writes to standard output. False when nobody reads it any more.
///
/// # Errors
/// When it cannot be written for another reason.
pub fn print(text: &[u8]) -> anyhow::Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("write to standard output"),
    }
}

/// Runs a command's asynchronous part on this thread.
///
/// # Errors
/// Those of the part, and when the runtime cannot be made.
pub fn block_on<T>(part: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the client's runtime")?
        .block_on(part)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::*;

    #[test]
    fn durations() {
        for (text, ms) in [("500ms", 500), ("90s", 90_000), ("5m", 300_000), ("2h", 7_200_000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)));
        }
        for text in ["", "5", "m", "-1s", "1.5s", "5 m", "99999999999999999d"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_a_terminal_could_obey_is_escaped() {
        let hostile = "a\u{1b}[2J\u{9b}31m\u{202e}b\nö";
        assert_eq!(printable(hostile), r"a\u{1b}[2J\u{9b}31m\u{202e}b\u{a}ö");
        let line = json_line(&hostile).unwrap();
        assert!(line.trim_end_matches('\n').chars().all(|c| !is_unsafe(c)), "{line:?}");
        assert_eq!(serde_json::from_str::<String>(&line).unwrap(), hostile);
    }

    #[test]
    fn each_filter_is_one_workload_filter() {
        let filters = Filters {
            pod: vec!["shop/cart".into(), "user".into()],
            container: vec!["ab".into()],
            ..Filters::default()
        };
        let all = filters.workloads();
        assert_eq!((&*all[0].namespace, &*all[0].pod), ("shop", "cart"));
        assert_eq!((&*all[1].namespace, &*all[1].pod), ("", "user"));
        assert_eq!((&*all[2].container_id, all.len()), ("ab", 3));
    }

    #[test]
    fn an_agent_that_does_not_answer_is_named_with_the_remedy() {
        let ask = |url: &str| {
            let connect = Connect { url: url.into(), ca: None, cert: None, key: None };
            block_on(async { connect.profiler().await.map(drop) }).unwrap_err().to_string()
        };
        let error = ask("unix:///nonexistent/a.sock");
        assert!(
            error.contains("no agent answers at unix:///nonexistent/a.sock (No such file"),
            "{error}"
        );
        assert!(error.contains("podflame agent") && error.contains("--connect"), "{error}");
        assert!(ask("http://localhost:1").contains("name the agent's socket"));
        assert!(ask("http://10.0.0.1:1").contains("http only for 127.0.0.1"));
        assert!(ask("https://localhost:1").contains("--ca FILE"));
        assert!(ask("unix:relative").contains("name the agent's socket"));
    }
}
