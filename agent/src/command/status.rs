//! `podflame status`: the state of an agent, its probes, its account and its clients.

use std::fmt::Write as _;

use podflame_proto::{Timestamp, v1};
use serde_json::{Value, json};

use super::client::{Connect, block_on, json_line, print, printable};
use crate::{
    profile::{Signal, Source},
    serve::{convert, hub::Kind},
};

/// Say how an agent does: its probes, what it lost, and its clients.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  Whether the agent of this node works, and what it lost:
      podflame status
  The probes that are not attached, and why:
      podflame status --format json | jq '.probes[] | select(.active | not)'")]
pub struct Args {
    #[command(flatten)]
    connect: Connect,
    /// text is for people, json for programs.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// The form of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Text,
    Json,
}

/// Asks for the state and prints it.
///
/// # Errors
/// When no agent answers.
pub fn run(args: Args) -> anyhow::Result<()> {
    let status = block_on(async {
        let mut client = args.connect.profiler().await?;
        let answer = client.get_status(v1::GetStatusRequest {}).await;
        Ok(answer.map_err(|status| args.connect.failed(&status))?.into_inner())
    })?;
    let text = match args.format {
        Format::Text => text(&status)?,
        Format::Json => json_line(&json(&status))?,
    };
    print(text.as_bytes()).map(drop)
}

/// The counts of a stream and a signal, as JSON.
pub(super) fn delivery(d: &v1::DeliveryCount) -> Value {
    json!({
        "signal": convert::from_signal(d.signal).map(Signal::name),
        "aggregated": d.aggregated,
        "delivered": d.delivered,
        "lost": d.lost,
        "queued": d.queued,
    })
}

fn reasons(all: &[v1::ReasonCount]) -> Value {
    all.iter().map(|r| (r.reason.clone(), Value::from(r.events))).collect()
}

/// The counts of a probe, as JSON.
pub(super) fn account(a: &v1::ProbeAccount) -> Value {
    json!({
        "probe": a.probe,
        "run_count": a.run_count,
        "run_time_ns": a.run_time_ns,
        "hits": a.hits,
        "stored": a.stored,
        "filtered": a.filtered,
        "dropped_in_kernel": reasons(&a.dropped_in_kernel),
        "aggregated": a.aggregated,
        "dropped_in_agent": reasons(&a.dropped_in_agent),
        "in_flight": a.in_flight,
        "weight": a.weight,
        "stack_ends": reasons(&a.stack_ends),
        "python_ends": reasons(&a.python_ends),
    })
}

fn time(time: Option<Timestamp>) -> Option<String> {
    time.map(|t| t.to_string())
}

fn kind(client: &v1::ClientStatus) -> &'static str {
    match convert::from_kind(client.kind) {
        Some(Kind::Profiles) => "profiles",
        Some(Kind::Events) => "events",
        None => "unknown",
    }
}

fn json(s: &v1::GetStatusResponse) -> Value {
    let probe = |p: &v1::ProbeStatus| {
        json!({
            "active": p.active,
            "inactive_reason": p.inactive_reason,
            "frequency_hz": p.frequency_hz,
            "account": p.account.as_ref().map(account),
        })
    };
    let client = |c: &v1::ClientStatus| {
        json!({
            "id": c.id,
            "kind": kind(c),
            "start": time(c.start_time),
            "deliveries": c.deliveries.iter().map(delivery).collect::<Value>(),
            "batches_queued": c.batches_queued,
            "batches_lost": c.batches_lost,
        })
    };
    let (d, store) = (s.dictionary.unwrap_or_default(), s.store.unwrap_or_default());
    json!({
        "agent_epoch": s.agent_epoch,
        "agent_version": s.agent_version,
        "start": time(s.start_time),
        "now": time(s.answer_time),
        "node": s.node,
        "kernel_release": s.kernel_release,
        "filter": s.filter,
        "probes": s.probes.iter().map(probe).collect::<Value>(),
        "sequence": s.sequence,
        "resident_bytes": s.resident_bytes,
        "dictionary": {
            "generation": d.generation,
            "strings": d.strings,
            "mappings": d.mappings,
            "functions": d.functions,
            "frames": d.frames,
            "stacks": d.stacks,
            "workloads": d.workloads,
            "size_bytes": d.size_bytes,
        },
        "store": {
            "windows": store.windows,
            "oldest": time(store.oldest_time),
            "size_bytes": store.size_bytes,
            "max_bytes": store.max_bytes,
            "windows_evicted": store.windows_evicted,
        },
        "clients": s.clients.iter().map(client).collect::<Value>(),
        "pod_names": pod_names(&s.pod_names.clone().unwrap_or_default()),
        "peer_names": s.peer_names.as_ref().map(|p| json!({
            "objects": p.objects,
            "lists": p.lists,
            "failures": p.failures,
            "last_failure": p.last_failure,
            "refused": p.refused,
        })),
        "unwinding": s.unwinding.as_ref().map(unwinding),
    })
}

fn pod_names(p: &v1::PodNamesStatus) -> Value {
    json!({
        "source": convert::from_source(p.source).and_then(Source::name),
        "phase": p.phase,
        "pods": p.pods,
        "lists": p.lists,
        "changes": p.changes,
        "failures": p.failures,
        "last_failure": p.last_failure,
        "refused": p.refused,
    })
}

fn unwinding(u: &v1::UnwindStatus) -> Value {
    json!({
        "processes": u.processes,
        "tables": u.tables,
        "size_bytes": u.size_bytes,
        "max_bytes": u.max_bytes,
        "rows": u.rows,
        "rules": u.rules,
        "files_built": u.files_built,
        "build_time_us": u.build_time_us,
        "files_without": reasons(&u.files_without),
        "tables_evicted": u.tables_evicted,
        "files_without_room": u.files_without_room,
        "processes_without_room": u.processes_without_room,
        "processes_ready": u.processes_ready,
        "processes_ready_early": u.processes_ready_early,
    })
}

fn mib(bytes: u64) -> String {
    // Exact enough for a person: a mantissa has 53 bits.
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn text(s: &v1::GetStatusResponse) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    let (d, store) = (s.dictionary.unwrap_or_default(), s.store.unwrap_or_default());
    let filter = if s.filter.is_empty() { "the whole node" } else { &s.filter };
    let seconds = |t: Option<Timestamp>| t.map_or(0, |t| t.seconds);
    writeln!(
        out,
        "agent     {} on {}, kernel {}",
        printable(&s.agent_version),
        printable(&s.node),
        printable(&s.kernel_release)
    )?;
    writeln!(
        out,
        "running   since {} ({} s), epoch {}",
        time(s.start_time).unwrap_or_default(),
        seconds(s.answer_time).saturating_sub(seconds(s.start_time)),
        s.agent_epoch
    )?;
    writeln!(out, "observes  {}", printable(filter))?;
    writeln!(
        out,
        "memory    {} resident; {} of {} remembered samples, in {} windows ({} evicted)",
        mib(s.resident_bytes),
        mib(store.size_bytes),
        mib(store.max_bytes),
        store.windows,
        store.windows_evicted
    )?;
    writeln!(
        out,
        "names     {}: {} stacks, {} frames, {} functions, {} files, {} workloads",
        mib(d.size_bytes),
        d.stacks,
        d.frames,
        d.functions,
        d.mappings,
        d.workloads
    )?;
    if let Some(u) = &s.unwinding {
        writeln!(
            out,
            "unwinding {} processes, {} tables of {} rows in {} of {}",
            u.processes,
            u.tables,
            u.rows,
            mib(u.size_bytes),
            mib(u.max_bytes)
        )?;
    }
    pods(&mut out, &s.pod_names.clone().unwrap_or_default())?;
    if let Some(p) = &s.peer_names {
        peers(&mut out, p)?;
    }
    out.push('\n');
    writeln!(
        out,
        "{:<12} {:>14} {:>14} {:>14} {:>10} {:>10}  state",
        "probe", "hits", "aggregated", "filtered", "in flight", "lost"
    )?;
    s.probes.iter().try_for_each(|p| probe(&mut out, p))?;
    out.push('\n');
    if s.clients.is_empty() {
        writeln!(out, "no streams")?;
    }
    s.clients.iter().try_for_each(|c| client(&mut out, c))?;
    Ok(out)
}

fn pods(out: &mut String, p: &v1::PodNamesStatus) -> std::fmt::Result {
    let source = convert::from_source(p.source).and_then(Source::name).unwrap_or("nobody");
    write!(out, "pods      named by {source}")?;
    if source != "nobody" {
        write!(out, ", {}: {} pods, {} changes", printable(&p.phase), p.pods, p.changes)?;
    }
    if p.failures > 0 {
        write!(out, "; {} failures, the last: {}", p.failures, printable(&p.last_failure))?;
    }
    if p.refused > 0 {
        write!(out, "; {} pods left out, there were too many", p.refused)?;
    }
    out.push('\n');
    Ok(())
}

fn peers(out: &mut String, p: &v1::PeerNamesStatus) -> std::fmt::Result {
    write!(out, "peers     {} pods, Services and nodes of the cluster", p.objects)?;
    if p.failures > 0 {
        write!(out, "; {} failures, the last: {}", p.failures, printable(&p.last_failure))?;
    }
    if p.refused > 0 {
        write!(out, "; {} left out, there were too many", p.refused)?;
    }
    out.push('\n');
    Ok(())
}

fn probe(out: &mut String, p: &v1::ProbeStatus) -> std::fmt::Result {
    let a = p.account.clone().unwrap_or_default();
    let drops = [("kernel", &a.dropped_in_kernel), ("agent", &a.dropped_in_agent)];
    let lost: u64 = drops.iter().flat_map(|(_, all)| all.iter()).map(|r| r.events).sum();
    let state = match (p.active, p.frequency_hz) {
        (false, _) => format!("off: {}", printable(&p.inactive_reason)),
        (true, 0) => "every event".into(),
        (true, hz) => format!("{hz} Hz on each CPU"),
    };
    writeln!(
        out,
        "{:<12} {:>14} {:>14} {:>14} {:>10} {:>10}  {state}",
        printable(&a.probe),
        a.hits,
        a.aggregated,
        a.filtered,
        a.in_flight,
        lost
    )?;
    for (stage, all) in drops {
        for r in all.iter().filter(|r| r.events > 0) {
            writeln!(out, "    {} lost in the {stage}: {}", r.events, printable(&r.reason))?;
        }
    }
    Ok(())
}

fn client(out: &mut String, c: &v1::ClientStatus) -> std::fmt::Result {
    writeln!(
        out,
        "stream {} ({}), since {}: {} flushes queued, {} lost",
        c.id,
        kind(c),
        time(c.start_time).unwrap_or_default(),
        c.batches_queued,
        c.batches_lost
    )?;
    for d in &c.deliveries {
        let signal = convert::from_signal(d.signal).map_or("unknown", Signal::name);
        writeln!(
            out,
            "    {signal}: {} events = {} delivered + {} lost + {} queued",
            d.aggregated, d.delivered, d.lost, d.queued
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::*;

    fn status() -> v1::GetStatusResponse {
        let reason = |reason: &str, events| v1::ReasonCount { reason: reason.into(), events };
        let account = v1::ProbeAccount {
            probe: "on_cpu".into(),
            hits: 100,
            aggregated: 93,
            dropped_in_kernel: vec![reason("ring_full", 7), reason("no_memory", 0)],
            ..Default::default()
        };
        let off = v1::ProbeAccount { probe: "synack".into(), ..Default::default() };
        let count =
            v1::DeliveryCount { signal: 1, aggregated: 9, delivered: 6, lost: 2, queued: 1 };
        v1::GetStatusResponse {
            node: "node\u{1b}[2J".into(),
            probes: vec![
                v1::ProbeStatus {
                    account: Some(account),
                    active: true,
                    frequency_hz: 99,
                    ..Default::default()
                },
                v1::ProbeStatus {
                    account: Some(off),
                    inactive_reason: "no BTF".into(),
                    ..Default::default()
                },
            ],
            clients: vec![v1::ClientStatus {
                id: 4,
                kind: 1,
                deliveries: vec![count],
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn a_person_sees_what_is_off_and_what_was_lost() {
        let text = text(&status()).unwrap();
        for part in [
            "on_cpu                  100             93",
            "7  99 Hz on each CPU",
            "    7 lost in the kernel: ring_full\n",
            "off: no BTF",
            "stream 4 (profiles)",
            "cpu: 9 events = 6 delivered + 2 lost + 1 queued",
            "observes  the whole node",
            r"node\u{1b}[2J",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        assert!(!text.contains("no_memory"));
    }

    #[test]
    fn a_program_sees_every_count() {
        let json = json(&status());
        assert_eq!(json["probes"][0]["account"]["dropped_in_kernel"]["no_memory"], 0);
        assert_eq!(json["probes"][1]["inactive_reason"], "no BTF");
        assert_eq!(json["clients"][0]["deliveries"][0]["queued"], 1);
    }
}
