//! The gRPC service: takes requests apart, asks the hub, and streams its answers.

use std::{
    collections::VecDeque,
    fmt::Display,
    fs,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use podflame_proto::{Timestamp, v1};
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    task::spawn_blocking,
};
use tokio_stream::Stream;
use tonic::{Request, Response, Status as Refusal};

use super::{
    Config, Status,
    convert::{self, BadRequest, stream::Message},
    hub::{Command, Kind, State, Subscription},
};
use crate::{
    clock::Clock,
    export::{self, Format},
    fold::Root,
    profile::Profile,
    select::Selector,
};

/// Most bytes of a request. The largest filter of names as Kubernetes allows them is below.
pub const MAX_REQUEST_BYTES: usize = 64 << 10;

/// Bytes of a flame graph in one message.
const CHUNK_BYTES: usize = 256 << 10;

/// Flame graphs rendered at once. Each takes a core while it lasts.
const MAX_RENDERS: usize = 1;

/// The service.
#[derive(Debug)]
pub struct Profiler {
    pub(super) config: Arc<Config>,
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) status: watch::Receiver<Status>,
    renders: Arc<Semaphore>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Refusal>> + Send>>;

impl From<BadRequest> for Refusal {
    fn from(error: BadRequest) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

fn shutting_down() -> Refusal {
    Refusal::unavailable("the agent is shutting down")
}

impl Profiler {
    pub(super) fn new(
        config: Arc<Config>,
        commands: mpsc::Sender<Command>,
        status: watch::Receiver<Status>,
    ) -> Self {
        Self { config, commands, status, renders: Arc::new(Semaphore::new(MAX_RENDERS)) }
    }

    /// Asks the hub.
    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| shutting_down())?;
        answer.await.map_err(|_| shutting_down())
    }

    async fn stream<M: Message>(
        &self,
        kind: Kind,
        selector: Selector,
    ) -> Result<Response<Answers<M>>, Refusal> {
        let subscription = self
            .ask(|reply| Command::Subscribe(kind, Arc::new(selector), reply))
            .await?
            .map_err(|too_many| Refusal::resource_exhausted(too_many.to_string()))?;
        let first = convert::stream::header(&self.config);
        let messages: Messages<M> = Box::new(std::iter::once(first));
        Ok(Response::new(Box::pin(Streaming { messages, subscription, ended: false })))
    }

    /// Renders away from the tasks that serve.
    async fn render(
        &self,
        profile: Profile,
        format: Format,
        options: export::Options,
    ) -> Result<Bytes, Refusal> {
        let failed = |error: &dyn Display| Refusal::internal(format!("render: {error}"));
        let _turn = self.renders.acquire().await.map_err(|_| shutting_down())?;
        match spawn_blocking(move || export::render(&profile, format, &options)).await {
            Ok(Ok(bytes)) => Ok(bytes.into()),
            Ok(Err(error)) => Err(failed(&error)),
            Err(error) => Err(failed(&error)),
        }
    }
}

#[tonic::async_trait]
impl v1::profiler_server::Profiler for Profiler {
    type StreamProfilesStream = Answers<v1::StreamProfilesResponse>;
    type StreamEventsStream = Answers<v1::StreamEventsResponse>;
    type GetFlameGraphStream = Answers<v1::GetFlameGraphResponse>;

    async fn stream_profiles(
        &self,
        request: Request<v1::StreamProfilesRequest>,
    ) -> Result<Response<Self::StreamProfilesStream>, Refusal> {
        let r = request.into_inner();
        let selector = convert::from_selector(&r.signals, r.workloads, r.pids)?;
        self.stream(Kind::Profiles, selector).await
    }

    async fn stream_events(
        &self,
        request: Request<v1::StreamEventsRequest>,
    ) -> Result<Response<Self::StreamEventsStream>, Refusal> {
        let r = request.into_inner();
        let selector = convert::from_selector(&r.signals, r.workloads, r.pids)?;
        self.stream(Kind::Events, selector).await
    }

    async fn get_flame_graph(
        &self,
        request: Request<v1::GetFlameGraphRequest>,
    ) -> Result<Response<Self::GetFlameGraphStream>, Refusal> {
        let request = request.into_inner();
        let format = convert::from_format(request.format)?;
        let clock = Clock::now();
        let query = convert::from_flame_graph_request(clock, &request)?;
        let signal = query.signal;
        let Some(profile) = self.ask(|reply| Command::Profile(Box::new(query), reply)).await?
        else {
            return Err(Refusal::not_found(format!(
                "no {} samples that the request selects are remembered: \
                 widen its time or its filter, or see GetStatus for the state of the probes",
                signal.name()
            )));
        };
        let mut info = convert::to_flame_graph_info(clock, &profile);
        let title = if request.title.is_empty() {
            format!("{} on {}", signal.name(), self.config.node)
        } else {
            request.title
        };
        let options = export::Options {
            title,
            subtitle: subtitle(&info),
            root: Root::WorkloadThenComm,
            start_unix_ns: clock.to_unix_ns(profile.start),
        };
        let data = self.render(profile, format, options).await?;
        info.size_bytes = data.len() as u64;
        Ok(Response::new(Box::pin(tokio_stream::iter(chunks(info, data)))))
    }

    async fn list_workloads(
        &self,
        request: Request<v1::ListWorkloadsRequest>,
    ) -> Result<Response<v1::ListWorkloadsResponse>, Refusal> {
        let r = request.into_inner();
        let selector = convert::from_selector(&[], r.workloads, Vec::new())?;
        let usages = self.ask(|reply| Command::Usages(Box::new(selector), reply)).await?;
        Ok(Response::new(convert::to_workloads(Clock::now(), usages, r.limit)))
    }

    async fn get_status(
        &self,
        _: Request<v1::GetStatusRequest>,
    ) -> Result<Response<v1::GetStatusResponse>, Refusal> {
        let state: State = self.ask(Command::State).await?;
        let status = self.status.borrow().clone();
        let clock = Clock::now();
        let answer = convert::to_status(clock, &self.config, &status, &state, resident_bytes());
        Ok(Response::new(answer))
    }
}

/// What a flame graph shows, in one line.
fn subtitle(info: &v1::FlameGraphInfo) -> String {
    let time = |t: Option<Timestamp>| t.map_or_else(String::new, |t| t.to_string());
    format!(
        "{} to {}: {} events, {} {}, {} events lost",
        time(info.start_time),
        time(info.end_time),
        info.count,
        info.weight,
        info.unit,
        info.lost
    )
}

/// A flame graph in messages, of which the first has the information.
fn chunks(
    info: v1::FlameGraphInfo,
    mut data: Bytes,
) -> VecDeque<Result<v1::GetFlameGraphResponse, Refusal>> {
    let mut messages = VecDeque::new();
    let mut info = Some(info);
    while info.is_some() || !data.is_empty() {
        let part = data.split_to(CHUNK_BYTES.min(data.len()));
        messages.push_back(Ok(v1::GetFlameGraphResponse { info: info.take(), data: part }));
    }
    messages
}

/// The resident set of this process in bytes, 0 if it cannot be read.
fn resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

type Messages<M> = Box<dyn Iterator<Item = M> + Send>;

/// The messages of a subscription, each made when the connection takes it.
struct Streaming<M> {
    messages: Messages<M>,
    subscription: Subscription,
    ended: bool,
}

impl<M: Message> Stream for Streaming<M> {
    type Item = Result<M, Refusal>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(message) = this.messages.next() {
                return Poll::Ready(Some(Ok(message)));
            }
            if this.ended {
                return Poll::Ready(None);
            }
            if let Some(delivery) = ready!(this.subscription.deliveries.poll_recv(cx)) {
                this.messages = Box::new(convert::stream::messages(Clock::now(), &delivery));
            } else {
                // The hub tells the end before it goes, unless it dies.
                let end = ready!(Pin::new(&mut this.subscription.end).poll(cx));
                this.ended = true;
                match end {
                    Ok(end) => {
                        this.messages = Box::new(std::iter::once(convert::stream::end(&end)))
                    }
                    Err(_) => return Poll::Ready(Some(Err(shutting_down()))),
                }
            }
        }
    }
}
