//! Between the agent's types and `podflame.v1`: the only place that knows both.

pub mod incident;
pub mod stream;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use podflame_proto::{Timestamp, v1};

use crate::{
    account::{Account, AgentDrop, ProbeAccount, kernel_drops},
    clock::Clock,
    event::{Cause, KTime, Probe, PythonEnd, StackEnd},
    export::Format,
    pods,
    profile::{
        Confidence, ContainerKind, Dictionary, FrameKind, Owner, Profile, Signal, Source, Workload,
        WorkloadKind,
    },
    select::{Selector, WorkloadFilter},
    serve::{
        Config, ProbeState, Status,
        hub::{ClientState, Count, Kind, Loss, Stage, State},
    },
    store::{Query, Size, Usage, Usages},
    unwind::NoTable,
    unwinder::{TABLE_BYTES, Unwinding},
};

/// Most entries in each list of a request's filter.
pub const MAX_FILTERS: usize = 64;

/// Most workloads in one answer: each may have a kilobyte of names.
pub const MAX_WORKLOADS: usize = 1000;

/// A request that cannot be answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// A signal that does not exist, or none where one is needed.
    #[error("signal {0} is unknown: see podflame.v1.Signal")]
    Signal(i32),
    /// A format that does not exist, or none.
    #[error("format {0} is unknown: see podflame.v1.FlameGraphFormat")]
    Format(i32),
    /// A list that is too long.
    #[error("{0} has more than {MAX_FILTERS} entries")]
    TooLong(&'static str),
    /// A time or duration outside the calendar.
    #[error("{0} is not a valid time")]
    Time(&'static str),
}

/// Declares the conversion of a field-less enum and its way back.
macro_rules! same {
    ($to:ident, $from:ident: $core:ident <=> $wire:ident { $($a:ident => $b:ident,)* }) => {
        pub(crate) fn $to(value: $core) -> i32 {
            match value { $($core::$a => v1::$wire::$b as i32,)* }
        }

        /// `None` for a value that this version does not know.
        pub(crate) fn $from(value: i32) -> Option<$core> {
            let value = v1::$wire::try_from(value).ok()?;
            $(if value == v1::$wire::$b { return Some($core::$a); })*
            None
        }
    };
}

same!(to_signal, from_signal: Signal <=> Signal {
    Cpu => Cpu,
    PageFault => PageFault,
    Retransmit => Retransmit,
});
same!(to_frame_kind, from_frame_kind: FrameKind <=> FrameKind {
    User => User,
    Kernel => Kernel,
    Annotation => Annotation,
    Python => Python,
});
same!(to_workload_kind, from_workload_kind: WorkloadKind <=> WorkloadKind {
    Unattributed => Unattributed,
    Pod => Pod,
    Container => Container,
    Unit => Unit,
    Process => Process,
    Kernel => Kernel,
});
same!(to_container_kind, from_container_kind: ContainerKind <=> ContainerKind {
    Unknown => Unspecified,
    App => App,
    Init => Init,
    Sidecar => Sidecar,
    Ephemeral => Ephemeral,
    Sandbox => Sandbox,
});
same!(to_source, from_source: Source <=> AttributionSource {
    None => Unspecified,
    Cgroup => Cgroup,
    Process => Process,
    Kernel => Kernel,
    Api => Api,
    Cri => Cri,
    Engine => Engine,
});
same!(to_confidence, from_confidence: Confidence <=> AttributionConfidence {
    None => Unspecified,
    Inferred => Inferred,
    Certain => Certain,
});
same!(to_stack_end, from_stack_end: StackEnd <=> StackEnd {
    None => None,
    Complete => Complete,
    Truncated => Truncated,
    Unreadable => Unreadable,
    NoFramePointer => NoFramePointer,
    Torn => Torn,
    NoMapping => NoMapping,
    NoTable => NoTable,
    UnsupportedRule => UnsupportedRule,
});
same!(to_cause, from_cause: Cause <=> RetransmitCause {
    Unknown => Unknown,
    Timeout => Timeout,
    Fast => Fast,
    Syn => Syn,
    SynAck => Synack,
    TailLossProbe => TailLossProbe,
});
same!(to_kind, from_kind: Kind <=> StreamKind {
    Profiles => Profiles,
    Events => Events,
});
same!(to_stage, from_stage: Stage <=> LossStage {
    Kernel => Kernel,
    Agent => Agent,
    Client => Client,
});

fn to_time(clock: Clock, time: KTime) -> Option<Timestamp> {
    Some(Timestamp::from(clock.to_wall(time)))
}

/// A size or number of things; what does not fit is the most that does.
fn number<T: TryFrom<usize> + Into<u64> + Copy>(value: usize, most: T) -> T {
    T::try_from(value).unwrap_or(most)
}

fn to_address(address: &SocketAddr) -> v1::SocketAddress {
    v1::SocketAddress { ip: address.ip().to_string(), port: address.port().into() }
}

fn to_workload(w: &Workload) -> v1::Workload {
    v1::Workload {
        kind: to_workload_kind(w.kind),
        name: w.name.clone(),
        namespace: w.namespace.clone(),
        pod: w.pod.clone(),
        pod_uid: w.pod_uid.clone(),
        container_id: w.container_id.clone(),
        unit: w.unit.clone(),
        cgroup_path: w.cgroup_path.clone(),
        unattributed: w.unattributed.clone(),
        container: w.container.clone(),
        container_kind: to_container_kind(w.container_kind),
        image: w.image.clone(),
        restarts: w.restarts,
        owner_kind: w.owner.kind.clone(),
        owner_name: w.owner.name.clone(),
        labels: w.labels.iter().cloned().collect(),
        qos_class: w.qos.clone(),
        node: w.node.clone(),
        source: to_source(w.source),
        confidence: to_confidence(w.confidence),
    }
}

fn from_workload(w: v1::Workload) -> Workload {
    let mut labels: Vec<_> = w.labels.into_iter().collect();
    labels.sort_unstable();
    Workload {
        kind: from_workload_kind(w.kind).unwrap_or_default(),
        name: w.name,
        namespace: w.namespace,
        pod: w.pod,
        pod_uid: w.pod_uid,
        container_id: w.container_id,
        unit: w.unit,
        cgroup_path: w.cgroup_path,
        unattributed: w.unattributed,
        container: w.container,
        container_kind: from_container_kind(w.container_kind).unwrap_or_default(),
        image: w.image,
        restarts: w.restarts,
        owner: Owner { kind: w.owner_kind, name: w.owner_name },
        labels,
        qos: w.qos_class,
        node: w.node,
        source: from_source(w.source).unwrap_or_default(),
        confidence: from_confidence(w.confidence).unwrap_or_default(),
    }
}

/// The selector of a request.
///
/// # Errors
/// When a list is too long or a signal unknown.
pub fn from_selector(
    signals: &[i32],
    workloads: Vec<v1::WorkloadFilter>,
    pids: Vec<u32>,
) -> Result<Selector, BadRequest> {
    for (list, len) in
        [("signals", signals.len()), ("workloads", workloads.len()), ("pids", pids.len())]
    {
        if len > MAX_FILTERS {
            return Err(BadRequest::TooLong(list));
        }
    }
    let signals = signals.iter().map(|s| from_signal(*s).ok_or(BadRequest::Signal(*s)));
    Ok(Selector {
        signals: signals.collect::<Result<_, _>>()?,
        workloads: workloads
            .into_iter()
            .map(|f| WorkloadFilter {
                name: f.name,
                namespace: f.namespace,
                pod: f.pod,
                pod_uid: f.pod_uid,
                container_id: f.container_id,
                unit: f.unit,
                cgroup_prefix: f.cgroup_prefix,
            })
            .collect(),
        pids,
    })
}

/// What a flame graph is made from.
///
/// # Errors
/// When the request has a bad signal, list or time.
pub fn from_flame_graph_request(
    clock: Clock,
    request: &v1::GetFlameGraphRequest,
) -> Result<Query, BadRequest> {
    use v1::get_flame_graph_request::Start;
    let wall = |name, time: Timestamp| {
        SystemTime::try_from(time).map(|t| clock.to_kernel(t)).map_err(|_| BadRequest::Time(name))
    };
    let since = match request.start {
        None => KTime(0),
        Some(Start::Since(time)) => wall("since", time)?,
        Some(Start::Last(last)) => {
            let last = Duration::try_from(last).map_err(|_| BadRequest::Time("last"))?;
            let nanos = u64::try_from(last.as_nanos()).unwrap_or(u64::MAX);
            KTime(clock.monotonic.0.saturating_sub(nanos))
        }
    };
    let until = request.until.map_or(Ok(KTime(u64::MAX)), |time| wall("until", time))?;
    let signal = from_signal(request.signal).ok_or(BadRequest::Signal(request.signal))?;
    let selector = from_selector(&[], request.workloads.clone(), request.pids.clone())?;
    Ok(Query { signal, since, until, selector })
}

/// The format of a flame graph.
///
/// # Errors
/// When there is no such format.
pub fn from_format(format: i32) -> Result<Format, BadRequest> {
    match v1::FlameGraphFormat::try_from(format) {
        Ok(v1::FlameGraphFormat::Svg) => Ok(Format::Svg),
        Ok(v1::FlameGraphFormat::Folded) => Ok(Format::Folded),
        Ok(v1::FlameGraphFormat::Pprof) => Ok(Format::Pprof),
        Ok(v1::FlameGraphFormat::Unspecified) | Err(_) => Err(BadRequest::Format(format)),
    }
}

/// What a flame graph shows; its size is not known yet.
#[must_use]
pub fn to_flame_graph_info(clock: Clock, profile: &Profile) -> v1::FlameGraphInfo {
    v1::FlameGraphInfo {
        start_time: to_time(clock, profile.start),
        end_time: to_time(clock, profile.end),
        count: profile.samples.iter().map(|s| s.count).sum(),
        weight: profile.samples.iter().map(|s| s.weight).sum(),
        unit: profile.signal.unit().into(),
        lost: profile.lost,
        size_bytes: 0,
    }
}

/// The answer to a request for at most `limit` workloads, 0 for as many as fit.
#[must_use]
pub fn to_workloads(clock: Clock, usages: Usages, limit: u32) -> v1::ListWorkloadsResponse {
    let mut all = usages.workloads;
    // Totals sort by signal, and each by weight.
    all.sort_unstable_by(|a, b| {
        b.totals.cmp(&a.totals).then_with(|| a.workload.name.cmp(&b.workload.name))
    });
    let total = number(all.len(), u32::MAX);
    let limit = if limit == 0 { MAX_WORKLOADS } else { MAX_WORKLOADS.min(limit as usize) };
    all.truncate(limit);
    v1::ListWorkloadsResponse {
        workloads: all.iter().map(to_usage).collect(),
        total,
        start_time: usages.span.and_then(|s| to_time(clock, s.0)),
        end_time: usages.span.and_then(|s| to_time(clock, s.1)),
    }
}

fn to_usage(usage: &Usage) -> v1::WorkloadUsage {
    let used = Signal::ALL.into_iter().zip(usage.totals).filter(|(_, total)| total.count > 0);
    v1::WorkloadUsage {
        workload: Some(to_workload(&usage.workload)),
        usages: used
            .map(|(signal, total)| v1::SignalUsage {
                signal: to_signal(signal),
                count: total.count,
                weight: total.weight,
            })
            .collect(),
    }
}

fn reasons(counts: impl Iterator<Item = (&'static str, u64)>) -> Vec<v1::ReasonCount> {
    counts.map(|(reason, events)| v1::ReasonCount { reason: reason.into(), events }).collect()
}

fn to_account(probe: Probe, a: &ProbeAccount) -> v1::ProbeAccount {
    let in_flight = a.in_flight(probe);
    v1::ProbeAccount {
        probe: probe.name().into(),
        run_count: a.run_count,
        run_time_ns: a.run_time_ns,
        hits: a.hits,
        stored: a.stored,
        filtered: a.filtered,
        dropped_in_kernel: reasons(
            kernel_drops().iter().map(|r| r.name()).zip(a.dropped_in_kernel),
        ),
        aggregated: a.aggregated,
        dropped_in_agent: reasons(AgentDrop::ALL.iter().map(|r| r.name()).zip(a.dropped_in_agent)),
        in_flight: i64::try_from(in_flight).unwrap_or(i64::MIN),
        weight: a.weight,
        stack_ends: reasons(StackEnd::ALL.iter().map(|e| e.name()).zip(a.stack_ends)),
        python_ends: reasons(PythonEnd::ALL.iter().map(|e| e.name()).zip(a.python_ends)),
    }
}

fn to_accounts(account: &Account) -> Vec<v1::ProbeAccount> {
    account.iter().map(|(probe, account)| to_account(probe, account)).collect()
}

fn to_delivery(signal: Signal, count: Count) -> v1::DeliveryCount {
    v1::DeliveryCount {
        signal: to_signal(signal),
        aggregated: count.aggregated,
        delivered: count.delivered,
        lost: count.lost,
        queued: count.queued(),
    }
}

fn to_loss(loss: &Loss) -> v1::Loss {
    v1::Loss {
        stage: to_stage(loss.stage),
        probe: loss.probe.map_or_else(String::new, |p| p.name().into()),
        signal: loss.signal.map_or(v1::Signal::Unspecified as i32, to_signal),
        reason: loss.reason.into(),
        events: loss.events,
    }
}

/// The state of the agent, from its parts.
#[must_use]
pub fn to_status(
    clock: Clock,
    config: &Config,
    status: &Status,
    state: &State,
    resident_bytes: u64,
) -> v1::GetStatusResponse {
    let probes = state.account.iter().zip(&status.probes).map(|((probe, account), state)| {
        let (active, inactive_reason, frequency_hz) = match state {
            ProbeState::Active { frequency_hz } => (true, String::new(), *frequency_hz),
            ProbeState::Inactive(reason) => (false, reason.clone(), 0),
        };
        let account = Some(to_account(probe, account));
        v1::ProbeStatus { account, active, inactive_reason, frequency_hz }
    });
    v1::GetStatusResponse {
        agent_epoch: config.epoch,
        agent_version: env!("CARGO_PKG_VERSION").into(),
        start_time: to_time(clock, config.started),
        answer_time: Some(Timestamp::from(clock.wall)),
        node: config.node.clone(),
        kernel_release: config.kernel_release.clone(),
        filter: status.filter.clone(),
        probes: probes.collect(),
        sequence: state.sequence,
        resident_bytes,
        dictionary: Some(to_dictionary_status(&state.dictionary, state.store)),
        store: Some(v1::StoreStatus {
            windows: number(state.store.windows, u32::MAX),
            oldest_time: state.store.oldest.and_then(|t| to_time(clock, t)),
            size_bytes: state.store.bytes as u64,
            max_bytes: state.max_bytes as u64,
            windows_evicted: state.store.evicted,
        }),
        clients: state.clients.iter().map(|c| to_client(clock, c)).collect(),
        pod_names: Some(to_pod_names(&status.pods)),
        peer_names: status.peers.as_ref().map(|peers| to_peer_names(&peers.borrow().state)),
        unwinding: status.unwinding.as_ref().map(|now| to_unwinding(&now.borrow())),
    }
}

fn to_pod_names(state: &pods::State) -> v1::PodNamesStatus {
    v1::PodNamesStatus {
        source: to_source(state.source),
        phase: state.phase.name().into(),
        pods: state.pods as u64,
        lists: state.lists,
        changes: state.changes,
        failures: state.failures,
        last_failure: state.last_failure.clone(),
        refused: state.refused,
    }
}

fn to_peer_names(state: &pods::PeerState) -> v1::PeerNamesStatus {
    v1::PeerNamesStatus {
        objects: state.objects as u64,
        lists: state.lists,
        failures: state.failures,
        last_failure: state.last_failure.to_string(),
        refused: state.refused,
    }
}

fn to_unwinding(now: &Unwinding) -> v1::UnwindStatus {
    let reasons = NoTable::ALL.iter().zip(now.without);
    v1::UnwindStatus {
        processes: now.processes,
        tables: now.tables,
        size_bytes: now.bytes,
        max_bytes: TABLE_BYTES,
        rows: now.rows,
        rules: now.rules,
        files_built: now.built,
        build_time_us: now.built_us,
        files_without: reasons
            .filter(|(_, events)| *events > 0)
            .map(|(reason, events)| v1::ReasonCount { reason: reason.name().into(), events })
            .collect(),
        tables_evicted: now.evicted,
        files_without_room: now.no_room,
        processes_without_room: now.too_many_mappings,
        processes_ready: now.ready,
        processes_ready_early: now.ready_early,
    }
}

fn to_dictionary_status(dictionary: &Arc<Dictionary>, size: Size) -> v1::DictionaryStatus {
    let all = &dictionary.all;
    v1::DictionaryStatus {
        generation: dictionary.generation,
        strings: all.strings.len() as u64,
        mappings: all.mappings.len() as u64,
        functions: all.functions.len() as u64,
        frames: all.frames.len() as u64,
        stacks: all.stacks.len() as u64,
        workloads: all.workloads.len() as u64,
        size_bytes: size.dictionary_bytes as u64,
    }
}

fn to_client(clock: Clock, client: &ClientState) -> v1::ClientStatus {
    v1::ClientStatus {
        id: client.id,
        kind: to_kind(client.kind),
        start_time: to_time(clock, client.started),
        deliveries: client.counts.iter().map(|(s, count)| to_delivery(*s, *count)).collect(),
        batches_queued: number(client.batches_queued, u32::MAX),
        batches_lost: client.batches_lost,
    }
}
