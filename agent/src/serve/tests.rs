//! Real clients on a real socket.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::{
    io::Write as _,
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::Path,
};

use podflame_proto::v1::{self, profiler_client::ProfilerClient};
use tempfile::TempDir;
use tonic::{
    Code, Streaming,
    transport::{Channel, Endpoint},
};

use super::{convert::stream::from_dictionary, hub::QUEUE_BATCHES, *};
use crate::{
    fixture::Source,
    profile::{Dictionary, Sample, Signal, StackId},
};
use v1::stream_profiles_response::Message;

/// An agent that serves in a directory of its own.
struct Agent {
    directory: TempDir,
    batches: mpsc::Sender<Arc<Batch>>,
    _status: watch::Sender<Status>,
    server: Server,
    source: Source,
}

impl Agent {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (batches, receiver) = mpsc::channel(1);
        let mut status = Status::default();
        status.probes[0] = ProbeState::Active { frequency_hz: 99 };
        let (sender, status) = watch::channel(status);
        let config = Config::new(directory.path().join("run/agent.sock"));
        let server = spawn(config, receiver, status).unwrap();
        Self { directory, batches, _status: sender, server, source: Source::new() }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("run/agent.sock")
    }

    async fn client(&self) -> ProfilerClient<Channel> {
        // The smallest window, so that a client that does not read fills it at once.
        let endpoint = Endpoint::try_from(format!("unix://{}", self.socket().display())).unwrap();
        let endpoint = endpoint.initial_stream_window_size(65_535);
        ProfilerClient::new(endpoint.connect().await.unwrap())
    }

    /// Publishes samples of one flush, and waits until the hub has them.
    async fn flush(&mut self, samples: Vec<Sample>) {
        let batch = self.source.flush(samples, vec![]);
        self.publish(batch).await;
    }

    async fn publish(&self, batch: Arc<Batch>) {
        self.batches.send(batch).await.unwrap();
        // The channel holds one: once there is room again, the hub took the batch.
        drop(self.batches.reserve().await.unwrap());
    }

    async fn status(&self, client: &mut ProfilerClient<Channel>) -> v1::GetStatusResponse {
        client.get_status(v1::GetStatusRequest {}).await.unwrap().into_inner()
    }

    /// Ends the agent as its daemon does.
    async fn stop(self) -> TempDir {
        drop(self.batches);
        self.server.finished().await.unwrap();
        self.directory
    }
}

/// What a client made of a profile stream.
struct Reader {
    stream: Streaming<v1::StreamProfilesResponse>,
    dictionary: Dictionary,
    /// Entries of the dictionary in the last message that had some.
    news: usize,
    delivered: u64,
    lost: u64,
    sequences: Vec<u64>,
    stacks: Vec<String>,
    end: Option<v1::StreamEnd>,
}

impl Reader {
    async fn new(client: &mut ProfilerClient<Channel>) -> Self {
        let request = v1::StreamProfilesRequest::default();
        let mut stream = client.stream_profiles(request).await.unwrap().into_inner();
        let first = stream.message().await.unwrap().unwrap().message.unwrap();
        let Message::Header(header) = first else { unreachable!("{first:?}") };
        assert!(header.agent_epoch > 0 && !header.node.is_empty());
        Self {
            stream,
            dictionary: Dictionary::default(),
            news: 0,
            delivered: 0,
            lost: 0,
            sequences: vec![],
            stacks: vec![],
            end: None,
        }
    }

    /// Reads to the end of a batch. False at the end of the stream.
    async fn read(&mut self) -> bool {
        while let Some(message) = self.stream.message().await.unwrap() {
            match message.message.unwrap() {
                Message::Header(_) => unreachable!("a second header"),
                Message::Dictionary(d) => {
                    self.news = d.stacks.len();
                    self.dictionary.apply(d.generation, &from_dictionary(d));
                }
                Message::Batch(batch) => {
                    assert!(self.take(&batch), "an ID cannot be resolved");
                    if !batch.continues {
                        return true;
                    }
                }
                Message::End(end) => self.end = Some(end),
            }
        }
        false
    }

    fn take(&mut self, batch: &v1::ProfileBatch) -> bool {
        self.sequences.push(batch.sequence);
        self.delivered += batch.samples.iter().map(|s| s.count).sum::<u64>();
        let client = |l: &&v1::Loss| l.stage == v1::LossStage::Client as i32;
        self.lost += batch.losses.iter().filter(client).map(|l| l.events).sum::<u64>();
        let d = &self.dictionary;
        batch.samples.iter().all(|s| {
            let frames = d.stack(StackId(s.stack_id)).iter();
            let names: Option<Vec<&str>> =
                frames.map(|f| Some(d.string(d.frame(*f)?.1.name))).collect();
            self.stacks.extend(names.iter().map(|n| n.join(";")));
            names.is_some_and(|n| !n.is_empty() && n.iter().all(|n| !n.is_empty()))
        })
    }
}

#[tokio::test]
async fn a_snapshot_then_what_is_new() {
    let mut agent = Agent::start();
    for name in ["a main", "b main"] {
        let sample = agent.source.sample(Signal::Cpu, "cart", name, 1);
        agent.flush(vec![sample]).await;
    }
    let mut reader = Reader::new(&mut agent.client().await).await;
    for name in ["b main", "c main"] {
        let sample = agent.source.sample(Signal::Cpu, "cart", name, 1);
        agent.flush(vec![sample]).await;
    }
    assert!(reader.read().await);
    assert_eq!((reader.news, &*reader.stacks), (2, &["b;main".to_owned()][..]));
    assert!(reader.read().await);
    assert_eq!((reader.news, &*reader.stacks), (1, &["b;main".to_owned(), "c;main".into()][..]));
    assert_eq!(reader.sequences, [3, 4]);
    assert_eq!(reader.dictionary.all.stacks.len(), 3);
}

#[tokio::test]
async fn a_slow_client_loses_only_its_own_data_and_the_sums_are_exact() {
    let mut agent = Agent::start();
    let mut slow = Reader::new(&mut agent.client().await).await;
    let mut fast = Reader::new(&mut agent.client().await).await;
    let flushes = 4 * QUEUE_BATCHES as u64;
    let mut sent = 0;
    for flush in 0..flushes {
        let samples: Vec<Sample> = (0..2000)
            .map(|i| {
                agent.source.sample(Signal::Cpu, "cart", &format!("f{} g{flush}", i % 50), 1 + i)
            })
            .collect();
        sent += samples.iter().map(|s| s.count).sum::<u64>();
        agent.flush(samples).await;
        assert!(fast.read().await);
    }
    assert_eq!((fast.delivered, fast.lost, fast.sequences.len() as u64), (sent, 0, flushes));

    let mut client = agent.client().await;
    let status = agent.status(&mut client).await;
    assert_eq!(status.clients.len(), 2);
    for client in &status.clients {
        let cpu = &client.deliveries[0];
        assert_eq!(cpu.aggregated, sent);
        assert_eq!(cpu.delivered + cpu.lost + cpu.queued, sent);
    }
    assert!(status.clients[0].batches_lost > 0 && status.clients[1].batches_lost == 0);

    // It catches up, and is told. What it cannot resolve would fail here.
    while slow.sequences.len() < QUEUE_BATCHES {
        assert!(slow.read().await);
    }
    let last = agent.source.sample(Signal::Cpu, "cart", "last", 7);
    agent.flush(vec![last]).await;
    assert!(fast.read().await);
    while slow.sequences.last() != Some(&(flushes + 1)) {
        assert!(slow.read().await);
    }
    assert!(slow.lost > 0);
    assert_eq!(slow.delivered + slow.lost, sent + 7);
    assert_eq!(slow.dictionary.all, fast.dictionary.all);

    drop(client);
    let ends = tokio::join!(agent.stop(), slow.read(), fast.read());
    assert!(!ends.1 && !ends.2);
    for reader in [slow, fast] {
        let end = reader.end.unwrap();
        let cpu = &end.deliveries[0];
        assert_eq!(
            (cpu.aggregated, cpu.delivered, cpu.lost),
            (sent + 7, reader.delivered, reader.lost)
        );
        assert_eq!(end.probes[0].aggregated, sent + 7);
        assert_eq!(end.reason, "shutdown");
    }
}

#[tokio::test]
async fn the_end_of_the_agent_ends_streams_and_removes_the_socket() {
    let mut agent = Agent::start();
    let mut reader = Reader::new(&mut agent.client().await).await;
    let sample = agent.source.sample(Signal::Cpu, "cart", "main", 3);
    agent.flush(vec![sample]).await;
    let socket = agent.socket();
    assert_eq!(socket.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(socket.parent().unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o700);
    let ((), directory) = tokio::join!(async { while reader.read().await {} }, agent.stop());
    assert_eq!(reader.end.unwrap().deliveries[0].delivered, 3);
    assert!(!socket.exists());
    let left = fs::read_dir(directory.path().join("run")).unwrap().count();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn a_client_that_vanishes_is_forgotten() {
    let mut agent = Agent::start();
    let mut client = agent.client().await;
    let reader = Reader::new(&mut agent.client().await).await;
    assert_eq!(agent.status(&mut client).await.clients.len(), 1);
    drop(reader);
    let gone = async { while !agent.status(&mut client).await.clients.is_empty() {} };
    timeout(Duration::from_secs(10), gone).await.unwrap();
    let sample = agent.source.sample(Signal::Cpu, "cart", "main", 3);
    agent.flush(vec![sample]).await;
    assert_eq!(agent.status(&mut client).await.sequence, 1);
}

#[tokio::test]
async fn garbage_and_silence_do_not_keep_a_client_out() {
    let agent = Agent::start();
    let mut held = Vec::new();
    for i in 0..3 * listen::MAX_SILENT {
        let mut stream = UnixStream::connect(agent.socket()).unwrap();
        match i % 4 {
            0 => {}
            1 => stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap(),
            2 => stream.write_all(&[0xff; 64]).unwrap(),
            _ => stream
                .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff")
                .unwrap(),
        }
        held.push(stream);
    }
    let mut client = agent.client().await;
    assert_eq!(agent.status(&mut client).await.sequence, 0);
    drop(held);
}

#[tokio::test]
async fn bad_requests_are_refused() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let filter = v1::WorkloadFilter { name: "x".repeat(MAX_REQUEST_BYTES), ..Default::default() };
    let request = v1::StreamProfilesRequest { workloads: vec![filter], ..Default::default() };
    let refused = client.stream_profiles(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");

    let request = v1::StreamProfilesRequest { pids: vec![1; 65], ..Default::default() };
    let refused = client.stream_profiles(request).await.unwrap_err();
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::InvalidArgument, "pids has more than 64 entries")
    );

    let request = v1::StreamEventsRequest { signals: vec![77], ..Default::default() };
    let refused = client.stream_events(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);

    let mut request = v1::GetFlameGraphRequest { signal: 1, ..Default::default() };
    assert_eq!(
        client.get_flame_graph(request.clone()).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    request.format = v1::FlameGraphFormat::Folded as i32;
    assert_eq!(client.get_flame_graph(request).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_flame_graph_comes_in_chunks() {
    let mut agent = Agent::start();
    let names: Vec<String> = (0..200).map(|i| format!("{}{i}", "f".repeat(2000))).collect();
    let samples = names.iter().map(|n| agent.source.sample(Signal::Cpu, "cart", n, 2)).collect();
    agent.flush(samples).await;
    let request = v1::GetFlameGraphRequest {
        signal: v1::Signal::Cpu as i32,
        format: v1::FlameGraphFormat::Folded as i32,
        ..Default::default()
    };
    let mut stream = agent.client().await.get_flame_graph(request).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap();
    let info = first.info.unwrap();
    assert_eq!((info.count, info.weight, &*info.unit, info.lost), (400, 4000, "nanoseconds", 0));
    let mut data = first.data.to_vec();
    let mut messages = 1;
    while let Some(message) = stream.message().await.unwrap() {
        assert!(message.info.is_none());
        data.extend_from_slice(&message.data);
        messages += 1;
    }
    assert!(messages > 1);
    assert_eq!(data.len() as u64, info.size_bytes);
    let text = String::from_utf8(data).unwrap();
    assert!(names.iter().all(|n| text.contains(&**n)));
}

#[tokio::test]
async fn status_and_workloads_tell_what_is_there() {
    let mut agent = Agent::start();
    for (pod, count) in [("cart", 2), ("user", 5), ("idle", 1)] {
        let sample = agent.source.sample(Signal::Cpu, pod, "main", count);
        agent.flush(vec![sample]).await;
    }
    let mut client = agent.client().await;
    let request = v1::ListWorkloadsRequest { limit: 2, ..Default::default() };
    let answer = client.list_workloads(request).await.unwrap().into_inner();
    let pods: Vec<String> = answer.workloads.into_iter().map(|w| w.workload.unwrap().pod).collect();
    assert_eq!((answer.total, &*pods), (3, &["user".to_owned(), "cart".into()][..]));

    let status = agent.status(&mut client).await;
    let probe = |i: usize| &status.probes[i];
    assert!(probe(0).active && probe(0).frequency_hz == 99);
    assert_eq!((probe(1).active, &*probe(1).inactive_reason), (false, "not started"));
    let account = probe(0).account.as_ref().unwrap();
    assert_eq!((&*account.probe, account.stored, account.aggregated), ("on_cpu", 8, 8));
    let reasons: Vec<&str> = account.dropped_in_kernel.iter().map(|r| &*r.reason).collect();
    assert_eq!(reasons, ["ring_full", "no_memory"]);
    let dictionary = status.dictionary.unwrap();
    assert_eq!((dictionary.workloads, dictionary.stacks), (3, 1));
    assert!(status.resident_bytes > 0 && status.store.unwrap().windows == 1);
}

#[tokio::test]
async fn health_and_reflection_answer() {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let agent = Agent::start();
    let endpoint = Endpoint::try_from(format!("unix://{}", agent.socket().display())).unwrap();
    let channel = endpoint.connect().await.unwrap();
    let request = HealthCheckRequest { service: "podflame.v1.Profiler".into() };
    let health = HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner();
    assert_eq!(health.status, 1);

    let message_request = Some(MessageRequest::ListServices(String::new()));
    let request = ServerReflectionRequest { host: String::new(), message_request };
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else { unreachable!() };
    let names: Vec<String> = list.service.into_iter().map(|s| s.name).collect();
    assert!(names.contains(&"podflame.v1.Profiler".into()), "{names:?}");
}

fn listen_at(path: &Path) -> Result<Server, ServeError> {
    let (_, batches) = mpsc::channel(1);
    let (_, status) = watch::channel(Status::default());
    spawn(Config::new(path.to_owned()), batches, status)
}

#[tokio::test]
async fn a_socket_in_use_is_refused_and_a_stale_one_is_replaced() {
    let agent = Agent::start();
    let error = listen_at(&agent.socket()).unwrap_err().to_string();
    assert!(error.contains("another agent answers on this socket"), "{error}");
    // The first one still serves.
    agent.status(&mut agent.client().await).await;

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    listen_at(&path).unwrap().finished().await.unwrap();
    assert!(!path.exists());

    let file = directory.path().join("file");
    fs::write(&file, "precious").unwrap();
    let error = listen_at(&file).unwrap_err().to_string();
    assert!(error.contains("not a socket"), "{error}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");

    let error = listen_at(&directory.path().join("x".repeat(108))).unwrap_err().to_string();
    assert!(error.contains("cannot be the address of a socket"), "{error}");
}
