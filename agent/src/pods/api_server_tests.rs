//! An API server that misbehaves: slow, forgetful, refusing, with broken streams. Names come late
//! then, but right, and the server is asked no more than it takes.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use kube::Config;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{super::Pods, *};

/// Longer than every pause of these tests together.
const LIMIT: Duration = Duration::from_secs(60);

/// What the server says.
#[derive(Default)]
struct Server {
    pods: Mutex<Vec<Value>>,
    /// One for each watch of pods, in their order; a watch beyond them waits.
    watches: Mutex<std::collections::VecDeque<Watch>>,
    forbidden: AtomicBool,
    slow: AtomicBool,
    /// The requests: whether to watch, and their path.
    requests: Mutex<Vec<(bool, String)>>,
}

enum Watch {
    /// These lines, and then the end.
    Lines(Vec<Value>),
    /// Half a line.
    Broken,
    /// The place is forgotten.
    Gone,
}

impl Server {
    /// Starts it; returns where it is.
    fn start(self) -> (Arc<Self>, Config) {
        let (server, listener) = (Arc::new(self), TcpListener::bind("127.0.0.1:0").unwrap());
        let address = listener.local_addr().unwrap();
        let serving = Arc::clone(&server);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = Arc::clone(&serving);
                // A client that goes away ends the thread.
                thread::spawn(move || drop(server.answer(stream)));
            }
        });
        let mut config = Config::new(format!("http://{address}").parse().unwrap());
        config.read_timeout = Some(Duration::from_secs(20));
        (server, config)
    }

    fn answer(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let request = lines.next().transpose()?.unwrap_or_default();
        for line in lines.by_ref() {
            if line?.is_empty() {
                break;
            }
        }
        let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
        let watches = path.contains("watch=true");
        let namespaces = path.starts_with("/api/v1/namespaces?");
        self.requests.lock().unwrap().push((watches, path.clone()));
        if self.forbidden.load(Ordering::Relaxed) {
            let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
                "reason": "Forbidden", "message": "pods is forbidden", "code": 403});
            return send(&stream, "403 Forbidden", &status.to_string());
        }
        match (watches, namespaces) {
            (true, true) => self.watch(&stream, None),
            (true, false) => {
                let next = self.watches.lock().unwrap().pop_front();
                self.watch(&stream, next)
            }
            (false, true) => {
                let list = json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
                    "metadata": {"resourceVersion": "1"}, "items": []});
                send(&stream, "200 OK", &list.to_string())
            }
            (false, false) => {
                if self.slow.load(Ordering::Relaxed) {
                    // Blocked by nothing but the reader's patience.
                    thread::park_timeout(Duration::from_millis(20));
                }
                send(&stream, "200 OK", &self.page(&path).to_string())
            }
        }
    }

    fn page(&self, path: &str) -> Value {
        let number = |key: &str| {
            let query = path.split_once('?').map_or("", |(_, query)| query);
            let mut values = query.split('&').filter_map(|pair| pair.strip_prefix(key));
            values.next().and_then(|value| value.parse::<usize>().ok())
        };
        let pods = self.pods.lock().unwrap();
        let (from, limit) = (number("continue=").unwrap_or(0), number("limit=").unwrap_or(500));
        let to = (from + limit).min(pods.len());
        let more = if to < pods.len() { to.to_string() } else { String::new() };
        json!({"kind": "PodList", "apiVersion": "v1", "items": pods[from..to],
            "metadata": {"resourceVersion": "100", "continue": more}})
    }

    fn watch(&self, mut stream: &TcpStream, what: Option<Watch>) -> std::io::Result<()> {
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")?;
        stream.write_all(b"Connection: close\r\n\r\n")?;
        match what {
            Some(Watch::Lines(lines)) => {
                for line in lines {
                    writeln!(stream, "{line}")?;
                }
            }
            Some(Watch::Broken) => stream.write_all(br#"{"type": "ADDED", "object": {"meta"#)?,
            Some(Watch::Gone) => {
                let gone = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1",
                    "status": "Failure", "reason": "Expired", "message": "too old", "code": 410}});
                writeln!(stream, "{gone}")?;
            }
            None => thread::park(),
        }
        Ok(())
    }

    fn count(&self, watches: bool) -> usize {
        let requests = self.requests.lock().unwrap();
        let of_pods = |path: &str| path.starts_with("/api/v1/pods?");
        requests.iter().filter(|(watch, path)| *watch == watches && of_pods(path)).count()
    }
}

fn send(mut stream: &TcpStream, status: &str, body: &str) -> std::io::Result<()> {
    let length = body.len();
    write!(stream, "HTTP/1.1 {status}\r\nContent-Type: application/json\r\n")?;
    write!(stream, "Content-Length: {length}\r\nConnection: close\r\n\r\n{body}")
}

/// A pod as a server of today sends it: some KiB, most of it of no use here.
fn pod(n: usize) -> Value {
    let id = format!("{n:064x}");
    json!({
        "metadata": {
            "name": format!("web-7d4b9c6f5d-{n:05}"), "namespace": "shop",
            "uid": format!("00000000-0000-0000-0000-{n:012x}"), "resourceVersion": "7",
            "creationTimestamp": "2026-11-21T07:10:00Z",
            "labels": {"app": "web", "pod-template-hash": "7d4b9c6f5d"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet",
                "name": "web-7d4b9c6f5d", "uid": "2", "controller": true}],
            "managedFields": vec![json!({"manager": "kubelet", "fieldsV1": {"f:status": {}}}); 20],
        },
        "spec": {"nodeName": "node1", "containers": vec![
            json!({"name": "app", "env": vec![json!({"name": "A", "value": "b"}); 30]}); 3]},
        "status": {"phase": "Running", "qosClass": "Burstable",
            "podIP": format!("10.{}.{}.{}", n >> 16, (n >> 8) & 255, n & 255),
            "containerStatuses": [{"name": "app", "image": "web:1", "restartCount": 0,
                "containerID": format!("containerd://{id}")}]},
    })
}

/// Watches that server until what is known fits.
async fn until(config: Config, what: &str, mut fits: impl FnMut(&Pods) -> bool) -> Arc<Pods> {
    let (publish, mut latest) = watch::channel(Arc::default());
    let publisher = Publisher::new(publish, Source::Api);
    tokio::spawn(run(config, "node1".to_owned(), Policy::default(), publisher));
    let known = tokio::time::timeout(LIMIT, latest.wait_for(|pods| fits(pods))).await;
    let known = known.unwrap_or_else(|_| panic!("waited {LIMIT:?} for {what}")).unwrap();
    Arc::clone(&known)
}

fn named(pods: &Pods, n: usize) -> bool {
    let pod = pods.by_uid(&format!("00000000-0000-0000-0000-{n:012x}"));
    pod.is_some_and(|pod| *pod.name == format!("web-7d4b9c6f5d-{n:05}") && pod.owner.name == "web")
}

/// The resident set of this process in KiB.
fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().trim().parse().unwrap()
}

#[tokio::test]
async fn five_thousand_pods_of_a_slow_server_come_in_pages() {
    let server = Server { slow: true.into(), ..Server::default() };
    *server.pods.lock().unwrap() = (0..5000).map(pod).collect();
    let (server, config) = server.start();
    let pods = until(config, "5,000 pods", |p| p.state.phase == Phase::Watching).await;
    assert_eq!((pods.state.pods, pods.state.failures, pods.state.refused), (5000, 0, 0));
    assert!((0..5000).all(|n| named(&pods, n)));
    assert_eq!(server.count(false), 5000 / PAGE as usize);
    assert!(server.count(true) <= 1);
}

#[test]
fn a_thousand_pods_take_little_memory() {
    let objects: Vec<PodObject> =
        (0..1000).map(|n| serde_json::from_value(pod(n)).unwrap()).collect();
    let before = resident_kib();
    let mut table = super::super::table::Table::default();
    for object in &objects {
        table.apply(object.pod(&Policy::default()), std::time::Instant::now());
    }
    let indexes: Vec<_> = (0..2).map(|_| table.index()).collect();
    let taken = resident_kib().saturating_sub(before);
    eprintln!("1,000 pods: {taken} KiB, with two indexes");
    assert!(taken < 10 << 10, "{taken} KiB");
    assert_eq!(indexes[0].0.len(), 1000);
}

#[tokio::test]
async fn a_server_that_forgot_the_place_is_asked_for_a_list_once_more() {
    let server = Server::default();
    *server.pods.lock().unwrap() = vec![pod(2), pod(3)];
    // The first list is followed by changes and by 410.
    let added = json!({"type": "ADDED", "object": pod(1)});
    let deleted = json!({"type": "DELETED", "object": pod(3)});
    *server.watches.lock().unwrap() = [Watch::Lines(vec![added, deleted]), Watch::Gone].into();
    let (server, config) = server.start();
    let pods = until(config, "a second list", |p| p.state.lists == 2).await;
    assert!(named(&pods, 1) && named(&pods, 2) && named(&pods, 3));
    assert_eq!(server.count(false), 2, "{:?}", server.requests.lock().unwrap());
    assert!((2..=3).contains(&server.count(true)));
}

#[tokio::test]
async fn a_broken_stream_is_resumed_where_it_ended() {
    let server = Server::default();
    *server.pods.lock().unwrap() = vec![pod(1)];
    let added = json!({"type": "ADDED", "object": pod(2)});
    *server.watches.lock().unwrap() =
        [Watch::Broken, Watch::Lines(Vec::new()), Watch::Broken, Watch::Lines(vec![added])].into();
    let (server, config) = server.start();
    let pods = until(config, "the second pod", |p| named(p, 2)).await;
    assert!(named(&pods, 1));
    assert_eq!(server.count(false), 1, "no list but the first");
    let requests = server.requests.lock().unwrap();
    let resumed = |(watch, path): &&(bool, String)| *watch && path.contains("resourceVersion=100");
    assert!(requests.iter().filter(resumed).count() >= 4, "{requests:?}");
}

#[tokio::test]
async fn who_is_refused_asks_less_and_less_often_and_is_named_once_allowed() {
    let server = Server::default();
    *server.pods.lock().unwrap() = vec![pod(1)];
    server.forbidden.store(true, Ordering::Relaxed);
    let (server, config) = server.start();
    let allowing = Arc::clone(&server);
    let mut failures = 0;
    let pods = until(config, "permission", move |p| {
        failures = failures.max(p.state.failures);
        if failures >= 3 {
            allowing.forbidden.store(false, Ordering::Relaxed);
        }
        p.state.phase == Phase::Watching && named(p, 1)
    })
    .await;
    assert!(pods.state.last_failure.contains("forbidden"), "{}", pods.state.last_failure);
    // 0.8 s, 1.6 s and 3.2 s at least lie between them.
    assert!((4..=6).contains(&server.count(false)), "{:?}", server.requests.lock().unwrap());
}
