//! `podflame watch`: an agent's stream as JSON, one object a line, each understood by itself.

use anyhow::Context as _;
use podflame_proto::{Timestamp, v1};
use serde::Serialize;
use serde_json::{Value, json};

use super::client::{Connect, Filters, block_on, json_line, print, signal_numbers, signal_parser};
use crate::{
    export::workload::WorkloadDetails,
    profile::{Dictionary, FrameKind, MappingId, Signal, StackId, StringId, Workload, WorkloadId},
    serve::{
        convert::{self, stream::from_dictionary},
        hub::Stage,
    },
};

/// Stream from an agent, one JSON object a line.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Lines have a `type`: `header` once, then `sample` or `event`, a `batch` after those of each flush with
what was lost before it, and `end` with the final counts when the agent ends. Stacks start with the
innermost frame. Ctrl-C ends the command.

Examples:
  Everything that uses a CPU, as it is flushed:
      podflame watch profiles --signal cpu
  The retransmits of one pod, with their peers:
      podflame watch events --signal retransmit --pod shop/cart-7f | jq .retransmit.remote")]
pub struct Args {
    /// profiles: samples, merged by flush. events: retransmits and major faults, one by one.
    #[arg(value_enum)]
    what: What,
    #[command(flatten)]
    connect: Connect,
    /// Only this signal. May be repeated.
    #[arg(long, value_name = "SIGNAL", value_parser = signal_parser())]
    signal: Vec<Signal>,
    #[command(flatten)]
    filters: Filters,
}

/// What to stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum What {
    Profiles,
    Events,
}

/// Streams until the agent ends, Ctrl-C, or nobody reads any more.
///
/// # Errors
/// When no agent answers, or it goes away without an end.
pub fn run(args: Args) -> anyhow::Result<()> {
    block_on(async {
        tokio::select! {
            done = watch(&args) => done,
            pressed = tokio::signal::ctrl_c() => pressed.context("wait for Ctrl-C"),
        }
    })
}

async fn watch(args: &Args) -> anyhow::Result<()> {
    let failed = |status| args.connect.failed(&status);
    let mut client = args.connect.profiler().await?;
    let (signals, workloads) = (signal_numbers(&args.signal), args.filters.workloads());
    let pids = args.filters.pid.clone();
    let mut lines = Lines::default();
    match args.what {
        What::Profiles => {
            let request = v1::StreamProfilesRequest { signals, workloads, pids };
            let mut stream = client.stream_profiles(request).await.map_err(failed)?.into_inner();
            while let Some(message) = stream.message().await.map_err(failed)? {
                if !print(lines.profiles(message)?.as_bytes())? {
                    break;
                }
            }
        }
        What::Events => {
            let request = v1::StreamEventsRequest { signals, workloads, pids };
            let mut stream = client.stream_events(request).await.map_err(failed)?.into_inner();
            while let Some(message) = stream.message().await.map_err(failed)? {
                if !print(lines.events(message)?.as_bytes())? {
                    break;
                }
            }
        }
    }
    Ok(())
}

/// Turns messages into lines.
#[derive(Default)]
struct Lines {
    dictionary: Dictionary,
    /// Samples or events of the flush so far.
    items: usize,
    /// What was lost before the flush.
    losses: Vec<Value>,
    batches_lost: u64,
}

/// The common part of both kinds of batches.
struct Flush<'a> {
    sequence: u64,
    start: Option<Timestamp>,
    end: Option<Timestamp>,
    losses: &'a [v1::Loss],
    batches_lost: u64,
    items: usize,
    continues: bool,
}

impl Lines {
    fn profiles(&mut self, message: v1::StreamProfilesResponse) -> serde_json::Result<String> {
        use v1::stream_profiles_response::Message;
        match message.message {
            Some(Message::Header(h)) => header(&h),
            Some(Message::Dictionary(d)) => Ok(self.apply(d)),
            Some(Message::End(e)) => end(&e),
            Some(Message::Batch(b)) => {
                let mut out = String::new();
                for sample in &b.samples {
                    out += &json_line(&self.sample(&b, sample))?;
                }
                out += &self.flush(&Flush {
                    sequence: b.sequence,
                    start: b.start_time,
                    end: b.end_time,
                    losses: &b.losses,
                    batches_lost: b.batches_lost,
                    items: b.samples.len(),
                    continues: b.continues,
                })?;
                Ok(out)
            }
            // A kind of message that this version does not know.
            None => Ok(String::new()),
        }
    }

    fn events(&mut self, message: v1::StreamEventsResponse) -> serde_json::Result<String> {
        use v1::stream_events_response::Message;
        match message.message {
            Some(Message::Header(h)) => header(&h),
            Some(Message::Dictionary(d)) => Ok(self.apply(d)),
            Some(Message::End(e)) => end(&e),
            Some(Message::Batch(b)) => {
                let mut out = String::new();
                for event in &b.events {
                    out += &json_line(&self.event(event))?;
                }
                out += &self.flush(&Flush {
                    sequence: b.sequence,
                    start: b.start_time,
                    end: b.end_time,
                    losses: &b.losses,
                    batches_lost: b.batches_lost,
                    items: b.events.len(),
                    continues: b.continues,
                })?;
                Ok(out)
            }
            None => Ok(String::new()),
        }
    }

    fn apply(&mut self, d: v1::Dictionary) -> String {
        self.dictionary.apply(d.generation, &from_dictionary(d));
        String::new()
    }

    /// The line of a batch, once all its messages are there.
    fn flush(&mut self, f: &Flush<'_>) -> serde_json::Result<String> {
        self.items += f.items;
        self.batches_lost += f.batches_lost;
        self.losses.extend(f.losses.iter().map(loss));
        if f.continues {
            return Ok(String::new());
        }
        let (items, losses) = (self.items, std::mem::take(&mut self.losses));
        let batches_lost = self.batches_lost;
        (self.items, self.batches_lost) = (0, 0);
        json_line(&json!({
            "type": "batch", "sequence": f.sequence, "start": time(f.start), "end": time(f.end),
            "lines": items, "batches_lost": batches_lost, "losses": losses,
        }))
    }

    fn sample(&self, batch: &v1::ProfileBatch, s: &v1::Sample) -> Value {
        let signal = convert::from_signal(s.signal);
        json!({
            "type": "sample",
            "sequence": batch.sequence,
            "start": time(batch.start_time),
            "end": time(batch.end_time),
            "signal": signal.map(Signal::name),
            "workload": self.workload(s.workload_id),
            "pid": s.pid,
            "comm": self.dictionary.string(StringId(s.comm_id)),
            "count": s.count,
            "weight": s.weight,
            "unit": signal.map(Signal::unit),
            "stack": self.stack(s.stack_id),
        })
    }

    fn event(&self, e: &v1::Event) -> Value {
        let mut line = json!({
            "type": "event",
            "time": time(e.time),
            "monotonic_ns": e.monotonic_ns,
            "workload": self.workload(e.workload_id),
            "pid": e.pid,
            "tid": e.tid,
            "comm": self.dictionary.string(StringId(e.comm_id)),
            "stack_end": convert::from_stack_end(e.stack_end).map(crate::event::StackEnd::name),
            "stack": self.stack(e.stack_id),
        });
        match &e.detail {
            Some(v1::event::Detail::Retransmit(r)) => {
                line["signal"] = Signal::Retransmit.name().into();
                line["retransmit"] = json!({
                    "local": r.local.as_ref().map(address),
                    "remote": r.remote.as_ref().map(address),
                    "cause": convert::from_cause(r.cause).map(crate::event::Cause::name),
                    "tcp_state": r.tcp_state,
                    "srtt_us": r.srtt_us,
                    "cwnd_segments": r.cwnd_segments,
                    "netns_inode": r.netns_inode,
                    "segments": r.segments,
                    "sender_age_ns": r.sender_age_ns,
                });
            }
            Some(v1::event::Detail::MajorFault(f)) => {
                let mapping = self.mapping(MappingId(f.mapping_id));
                line["signal"] = Signal::PageFault.name().into();
                line["major_fault"] = json!({
                    "address": format!("{:#x}", f.address),
                    "mapping": mapping.0,
                    "build_id": mapping.1,
                    "offset": f.offset,
                });
            }
            None => {}
        }
        line
    }

    /// The path and the build ID of a mapping.
    fn mapping(&self, id: MappingId) -> (&str, &str) {
        let d = &self.dictionary;
        let mapping = d.all.mappings.get(id.0 as usize);
        mapping.map_or(("", ""), |m| (d.string(m.path), d.string(m.build_id)))
    }

    fn workload(&self, id: u32) -> Option<JsonWorkload<'_>> {
        self.dictionary.workload(WorkloadId(id)).map(|w| JsonWorkload::new(w))
    }

    fn stack(&self, id: u32) -> Vec<JsonFrame<'_>> {
        let d = &self.dictionary;
        let frame = |id| {
            let (frame, function) = d.frame(id)?;
            let (mapping, build_id) = self.mapping(function.mapping);
            Some(JsonFrame {
                function: d.string(function.name),
                kind: match frame.kind {
                    FrameKind::User => "user",
                    FrameKind::Kernel => "kernel",
                    FrameKind::Annotation => "annotation",
                    FrameKind::Python => "python",
                },
                file: d.string(function.file),
                line: frame.line,
                mapping,
                build_id,
                offset: frame.offset,
                inlined: frame.inlined,
                by_frame_pointer: frame.by_frame_pointer,
            })
        };
        d.stack(StackId(id)).iter().filter_map(|id| frame(*id)).collect()
    }
}

/// A frame, with the fields that say something.
#[derive(Serialize)]
struct JsonFrame<'a> {
    function: &'a str,
    kind: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    file: &'a str,
    #[serde(skip_serializing_if = "is_default")]
    line: u32,
    #[serde(skip_serializing_if = "str::is_empty")]
    mapping: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    build_id: &'a str,
    #[serde(skip_serializing_if = "is_default")]
    offset: u64,
    #[serde(skip_serializing_if = "is_default")]
    inlined: bool,
    #[serde(skip_serializing_if = "is_default")]
    by_frame_pointer: bool,
}

/// A workload, with the fields that say something.
#[derive(Serialize)]
struct JsonWorkload<'a> {
    kind: &'static str,
    name: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    namespace: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    pod: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    pod_uid: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    container_id: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    unit: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    cgroup_path: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    unattributed: &'a str,
    #[serde(flatten)]
    details: WorkloadDetails<'a>,
}

impl<'a> JsonWorkload<'a> {
    fn new(w: &'a Workload) -> Self {
        Self {
            kind: w.kind.name(),
            name: &w.name,
            namespace: &w.namespace,
            pod: &w.pod,
            pod_uid: &w.pod_uid,
            container_id: &w.container_id,
            unit: &w.unit,
            cgroup_path: &w.cgroup_path,
            unattributed: &w.unattributed,
            details: WorkloadDetails::new(w),
        }
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn time(time: Option<Timestamp>) -> Option<String> {
    time.map(|t| t.to_string())
}

fn address(a: &v1::SocketAddress) -> String {
    if a.ip.contains(':') {
        format!("[{}]:{}", a.ip, a.port)
    } else {
        format!("{}:{}", a.ip, a.port)
    }
}

fn header(h: &v1::StreamHeader) -> serde_json::Result<String> {
    json_line(&json!({
        "type": "header",
        "agent_epoch": h.agent_epoch,
        "agent_version": h.agent_version,
        "node": h.node,
    }))
}

fn loss(l: &v1::Loss) -> Value {
    let stage = convert::from_stage(l.stage).map(|stage| match stage {
        Stage::Kernel => "kernel",
        Stage::Agent => "agent",
        Stage::Client => "client",
    });
    json!({
        "stage": stage,
        "probe": l.probe,
        "signal": convert::from_signal(l.signal).map(Signal::name),
        "reason": l.reason,
        "events": l.events,
    })
}

fn end(e: &v1::StreamEnd) -> serde_json::Result<String> {
    json_line(&json!({
        "type": "end",
        "reason": e.reason,
        "deliveries": e.deliveries.iter().map(super::status::delivery).collect::<Vec<_>>(),
        "probes": e.probes.iter().map(super::status::account).collect::<Vec<_>>(),
    }))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

    use std::{sync::Arc, time::Duration};

    use super::*;
    use crate::{
        clock::Clock,
        fixture::Source,
        profile::Batch,
        serve::hub::{Hub, Kind},
        store::Store,
    };

    /// The lines that a client prints of one batch.
    fn lines<M: convert::stream::Message>(
        kind: Kind,
        batch: &Arc<Batch>,
        mut print: impl FnMut(M) -> serde_json::Result<String>,
    ) -> Vec<Value> {
        let store = Store::new(Duration::from_secs(10), Duration::from_mins(1), usize::MAX);
        let mut hub = Hub::new(store, usize::MAX);
        let mut subscription = hub.subscribe(kind, Arc::default()).unwrap();
        hub.apply(batch);
        hub.finish();
        let delivery = subscription.deliveries.try_recv().unwrap();
        let end = subscription.end.try_recv().unwrap();
        let mut text = String::new();
        for message in convert::stream::messages(Clock::now(), &delivery) {
            text += &print(message).unwrap();
        }
        text += &print(convert::stream::end(&end)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_sample_is_understood_by_itself() {
        let mut source = Source::new();
        source.account.probe_mut(crate::event::Probe::OnCpu).dropped_in_kernel[0] = 2;
        let sample = source.sample(Signal::Cpu, "cart", "leaf\u{1b}[2J main", 3);
        let batch = source.flush(vec![sample], vec![]);
        let mut state = Lines::default();
        let lines = lines(Kind::Profiles, &batch, |m| state.profiles(m));
        let sample = &lines[0];
        assert_eq!(sample["type"], "sample");
        assert_eq!(sample["workload"]["pod"], "cart");
        assert_eq!(sample["workload"].get("unit"), None);
        assert_eq!(sample["stack"][0]["function"], "leaf\u{1b}[2J");
        assert_eq!(sample["stack"][1]["mapping"], "/bin/app");
        assert_eq!((&sample["count"], &sample["unit"]), (&json!(3), &json!("nanoseconds")));
        assert_eq!((&lines[1]["type"], &lines[1]["lines"]), (&json!("batch"), &json!(1)));
        let loss = &lines[1]["losses"][0];
        assert_eq!((&loss["reason"], &loss["events"]), (&json!("ring_full"), &json!(2)));
        assert_eq!(lines[2]["deliveries"][0]["delivered"], 3);
    }

    #[test]
    fn an_event_is_understood_by_itself() {
        let mut source = Source::new();
        let events = vec![source.retransmit("cart", "send main"), source.fault("cart", "read")];
        let batch = source.flush(vec![], events);
        let mut state = Lines::default();
        let lines = lines(Kind::Events, &batch, |m| state.events(m));
        assert_eq!(lines[0]["signal"], "retransmit");
        assert_eq!(lines[0]["retransmit"]["remote"], "[fd00::2]:40000");
        assert_eq!(lines[0]["retransmit"]["cause"], "fast");
        assert_eq!(lines[0]["stack"][0]["function"], "send");
        assert_eq!(lines[1]["major_fault"]["mapping"], "/bin/app");
        assert_eq!(lines[1]["major_fault"]["address"], "0x7f0000001000");
        assert_eq!(lines[2]["type"], "batch");
        assert_eq!(lines[3]["type"], "end");
    }
}
