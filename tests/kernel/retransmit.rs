//! TCP retransmits: as many as the kernel made, charged to who owns the socket, with the code that sent.

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use podflame_tests::{
    Cgroup, Lossy, NetPair, PerfStat, Workload, own_counter, tool, wait_for, workload,
};
use serde_json::Value;

use crate::{
    Test, bpf,
    running::{Agent, Recording, account_adds_up, count, lines},
};

pub(crate) const TESTS: &[Test] = &[
    ("of_ipv4_are_those_of_perf_and_snmp", of_ipv4_are_those_of_perf_and_snmp),
    ("of_ipv6_are_those_of_perf_and_snmp", of_ipv6_are_those_of_perf_and_snmp),
    ("carry_the_stack_of_the_sender", carry_the_stack_of_the_sender),
    ("of_one_cgroup_are_kept", of_one_cgroup_are_kept),
    ("of_syns_are_told_apart", of_syns_are_told_apart),
];

/// Longer than a connection that lost everything for some seconds waits before it sends again.
const QUIET: Duration = Duration::from_secs(60);

const SKB: &str = "tcp:tcp_retransmit_skb";

/// What perf counts of both tracepoints.
struct Counting {
    skb: PerfStat,
    beside_init: PerfStat,
    synack: PerfStat,
    /// What this network namespace had sent again by then.
    host: u64,
}

impl Counting {
    /// To be started before podflame, and stopped after it.
    fn start() -> Result<Self> {
        let mut beside_init = String::from("common_pid != 1");
        for thread in fs::read_dir("/proc/1/task")? {
            let thread = thread?.file_name();
            write!(beside_init, " && common_pid != {}", thread.display())?;
        }
        Ok(Self {
            host: host_segments()?,
            skb: PerfStat::all_cpus(SKB)?,
            beside_init: PerfStat::tracepoint_if(SKB, &beside_init)?,
            synack: PerfStat::all_cpus("tcp:tcp_retransmit_synack")?,
        })
    }

    fn stop(self) -> Result<Counted> {
        let [skb, beside_init, synack] =
            [self.skb.stop()?, self.beside_init.stop()?, self.synack.stop()?];
        Ok(Counted { skb, beside_init, synack, strays: host_segments()? - self.host })
    }
}

/// What perf counted.
struct Counted {
    skb: u64,
    beside_init: u64,
    synack: u64,
    /// Retransmits of the machine's own connections meanwhile, which are no part of the test.
    strays: u64,
}

/// Segments that this network namespace sent again since it was made.
fn host_segments() -> Result<u64> {
    own_counter("Tcp", "RetransSegs")
}

impl Counted {
    /// Checks that these are all retransmits.
    ///
    /// Those of the machine itself that came between the starts or between the ends of perf and
    /// podflame were seen by perf alone.
    ///
    /// Where init supervises a virtual machine, the kernel may run no BPF program in the interrupts
    /// of its threads, whosever packet it is: neither podflame nor `run_cnt` sees those.
    fn are(&self, hits: u64) -> Result<()> {
        let Self { skb, beside_init, strays, .. } = self;
        let are = |counted: u64| hits <= counted && counted - hits <= *strays;
        ensure!(
            are(*skb) || are(*beside_init),
            "{hits} retransmits; perf has {skb}, and {beside_init} beside those in init, \
             of which {strays} can be the machine's own"
        );
        Ok(())
    }
}

/// Starts a sink in the receiver.
fn sink(pair: &NetPair, address: &str) -> Result<Workload> {
    let mut command = workload("pump")?;
    command.args(["listen", address]);
    pair.receiver.enter(&mut command)?;
    Workload::start(command)
}

/// A sender in its cgroup and network namespace.
fn sender(pair: &NetPair, cgroup: &Cgroup, address: &str) -> Result<Command> {
    let mut command = workload("pump")?;
    command.args(["send", address]);
    cgroup.enter(&mut command)?;
    pair.sender.enter(&mut command)?;
    Ok(command)
}

/// Ends the loss, and waits until all that was sent has arrived.
fn quiet(pair: &NetPair, lossy: Lossy<'_>) -> Result<()> {
    ensure!(lossy.packets()? > 0, "nothing was lost");
    drop(lossy);
    over(pair)
}

/// Waits until nothing is on its way in either direction: a lost last acknowledgement makes the
/// receiver send its FIN again.
fn over(pair: &NetPair) -> Result<()> {
    wait_for("the connections to be over", QUIET, || {
        Ok((pair.sender.tcp_is_quiet()? && pair.receiver.tcp_is_quiet()?).then_some(()))
    })
}

/// The sum of a column of the table, of the rows of a cause or of all.
fn column(summary: &Value, name: &str, cause: Option<&str>) -> u64 {
    let rows = summary["retransmits"].as_array().into_iter().flatten();
    let rows = rows.filter(|row| cause.is_none_or(|cause| row["cause"] == cause));
    rows.filter_map(|row| row[name].as_u64()).sum()
}

/// The sum of the counts of the samples that fit.
fn samples(profile: &Value, fits: impl Fn(&Value) -> bool) -> u64 {
    let samples = profile["samples"].as_array().into_iter().flatten();
    samples.filter(|sample| fits(sample)).filter_map(|sample| sample["count"].as_u64()).sum()
}

/// Whether a frame of the stack has one of these names, under its key in that format.
fn has_frame(stack: &Value, key: &str, names: &[&str]) -> bool {
    let mut frames = stack.as_array().into_iter().flatten();
    frames.any(|frame| frame[key].as_str().is_some_and(|its| names.contains(&its)))
}

/// The functions of the sender that send. The C library's `send`, which the inner one calls, has no
/// frame pointer, so that the frame of its caller is not seen (only the caller's caller).
const SENDING: [&str; 2] = ["pump::send_payload", "pump::pump_loop"];

/// Checks E1 to E4 of a recording of retransmits.
fn adds_up(summary: &Value) -> Result<()> {
    ensure!(summary["violations"] == Value::Array(vec![]), "{}", summary["violations"]);
    ensure!(count(summary, "/lost")? == 0, "lost: {}", summary["account"]);
    for probe in ["retransmit", "synack", "sender"] {
        let mut account = summary["account"][probe].clone();
        account["probe"] = probe.into();
        account_adds_up(&account)?;
    }
    ensure!(column(summary, "hits", None) == count(summary, "/samples")?, "{summary}");
    ensure!(column(summary, "segments", None) == count(summary, "/weight")?, "{summary}");
    Ok(())
}

fn of_ipv4_are_those_of_perf_and_snmp() -> Result<()> {
    are_those_of_perf_and_snmp(&format!("{}:7001", NetPair::RECEIVER_V4), 7001)
}

fn of_ipv6_are_those_of_perf_and_snmp() -> Result<()> {
    are_those_of_perf_and_snmp(&format!("[{}]:7002", NetPair::RECEIVER_V6), 7002)
}

fn are_those_of_perf_and_snmp(address: &str, port: u16) -> Result<()> {
    let _counting = bpf::count_runs()?;
    let pair = NetPair::new()?;
    let cgroup = Cgroup::new("podflame-sender/inner")?;
    let sink = sink(&pair, address)?;
    let perf = Counting::start()?;
    let recording = Recording::retransmits(&["--format", "json"])?;
    let lossy = pair.lose(10, port)?;
    let start = |arguments: &[&str]| {
        let mut command = sender(&pair, &cgroup, address)?;
        command.args(["--seconds", "6"]).args(arguments);
        Workload::start(command)
    };
    // After the last segment of a burst nothing follows that could show its loss.
    let loads = [start(&[])?, start(&["--pause-ms", "20"])?];
    for load in loads {
        load.finish(QUIET)?;
    }
    // Each burst's end is lost by chance, and a busy machine sends few.
    wait_for("some tail loss probes", QUIET, || {
        if pair.sender.counter("TcpExt", "TCPLossProbes")? >= 5 {
            return Ok(Some(()));
        }
        start(&["--pause-ms", "20"])?.finish(QUIET)?;
        Ok(None)
    })?;
    quiet(&pair, lossy)?;
    let (summary, profile) = recording.stop()?;
    let counted = perf.stop()?;
    sink.stop()?;
    adds_up(&summary)?;

    let hits = count(&summary, "/account/retransmit/hits")?;
    counted.are(hits)?;
    assert_eq!(count(&summary, "/account/retransmit/aggregated")?, hits);
    assert_eq!(count(&summary, "/account/synack/hits")?, counted.synack);
    assert_eq!(column(&summary, "hits", None), hits + counted.synack);
    // What was handed to the network again. The namespaces are new, so that their counters start at 0.
    let segments = column(&summary, "segments", None) as f64;
    // Either end may have lost something: the last acknowledgement of a connection, for one.
    let both = |table: &str, name: &str| -> Result<u64> {
        Ok(pair.sender.counter(table, name)? + pair.receiver.counter(table, name)?)
    };
    let snmp = both("Tcp", "RetransSegs")? as f64;
    // A buffer is at most 64 KiB, 46 segments of a full frame.
    let unseen = 46.0 * (counted.skb - hits) as f64;
    assert!(
        segments <= 1.01 * snmp && segments + unseen >= 0.99 * snmp,
        "{segments} segments, SNMP has {snmp}"
    );

    let [fast, timeout, probe] =
        ["fast", "timeout", "tail_loss_probe"].map(|cause| column(&summary, "hits", Some(cause)));
    let rows = &summary["retransmits"];
    assert!(fast > 0 && timeout > 0 && probe > 0, "{rows}");
    // A probe may also be new data, which is no retransmit.
    let probes = both("TcpExt", "TCPLossProbes")?;
    assert!(probe <= probes, "{probe} tail loss probes, SNMP has {probes}: {rows}");

    let profile: Value = serde_json::from_str(&profile)?;
    let path = cgroup.path();
    let peer = format!("peer {address}");
    let ours = samples(&profile, |s| has_frame(&s["stack"], "name", &[&peer]));
    let owned = samples(&profile, |s| s["workload"]["cgroup_path"].as_str() == path.to_str());
    let charged: Vec<_> =
        profile["samples"].as_array().into_iter().flatten().map(|s| &s["workload"]).collect();
    assert!(ours > 0 && owned == ours, "{owned} of {ours} in {}: {charged:?}", path.display());
    Ok(())
}

fn carry_the_stack_of_the_sender() -> Result<()> {
    let pair = NetPair::new()?;
    let cgroup = Cgroup::new("podflame-sender")?;
    let address = format!("{}:7003", NetPair::RECEIVER_V4);
    let sink = sink(&pair, &address)?;
    let perf = Counting::start()?;
    let mut agent = Agent::start(&["--signal", "retransmit"])?;
    let mut watch = agent.watch(&["events", "--signal", "retransmit"])?;
    let lossy = pair.lose(10, 7003)?;
    let mut command = sender(&pair, &cgroup, &address)?;
    command.args(["--seconds", "6"]);
    Workload::start(command)?.finish(QUIET)?;
    quiet(&pair, lossy)?;
    agent.terminate()?;
    watch.succeed()?;
    let counted = perf.stop()?;
    sink.stop()?;

    let lines = lines(&watch.stdout()?)?;
    let told = lines.iter().filter(|line| line["type"] == "event").count() as u64;
    counted.are(told - counted.synack)?;
    let end = lines.last().filter(|line| line["type"] == "end").context("a stream without end")?;
    let deliveries = end["deliveries"].as_array().context("no deliveries")?;
    let delivery = deliveries.iter().find(|delivery| delivery["signal"] == "retransmit");
    let delivery = delivery.context("no count of retransmits")?;
    assert_eq!(count(delivery, "/delivered")?, told, "{delivery}");
    assert_eq!((count(delivery, "/aggregated")?, count(delivery, "/lost")?), (told, 0));
    let events: Vec<_> =
        lines.iter().filter(|line| line["retransmit"]["remote"] == *address).collect();
    let first = events.first().context("no event of the sender")?;
    let path = cgroup.path();
    let inode = pair.sender.inode()?;
    for event in &events {
        assert_eq!(event["workload"]["cgroup_path"].as_str(), path.to_str(), "{event}");
        assert_eq!(count(event, "/retransmit/netns_inode")?, inode);
    }
    // The first retransmit of a socket makes podflame look who sends.
    let second = count(first, "/monotonic_ns")? + 1_000_000_000;
    let later = |event: &&&Value| event["monotonic_ns"].as_u64() > Some(second);
    let later: Vec<_> = events.iter().filter(later).collect();
    let known = later.iter().filter(|event| has_frame(&event["stack"], "function", &SENDING));
    let (known, all) = (known.count(), later.len());
    assert!(all > 0 && known as f64 >= 0.9 * all as f64, "{known} of {all} have the stack");
    Ok(())
}

fn of_one_cgroup_are_kept() -> Result<()> {
    let _counting = bpf::count_runs()?;
    let pair = NetPair::new()?;
    let (kept, other) = (Cgroup::new("podflame-kept")?, Cgroup::new("podflame-other")?);
    let [first, second] = [7004, 7005].map(|port| format!("{}:{port}", NetPair::RECEIVER_V4));
    let sinks = [sink(&pair, &first)?, sink(&pair, &second)?];
    let path = kept.path();
    let path = path.to_str().context("a path in UTF-8")?;
    let perf = Counting::start()?;
    let recording = Recording::retransmits(&["--format", "svg", "--cgroup", path])?;
    let lossy = pair.lose(10, "7004-7005")?;
    let mut loads = Vec::new();
    for (cgroup, address) in [(&kept, &first), (&other, &second)] {
        let mut command = sender(&pair, cgroup, address)?;
        command.args(["--seconds", "4"]);
        loads.push(Workload::start(command)?);
    }
    for load in loads {
        load.finish(QUIET)?;
    }
    quiet(&pair, lossy)?;
    let (summary, svg) = recording.stop()?;
    let counted = perf.stop()?;
    for sink in sinks {
        sink.stop()?;
    }
    adds_up(&summary)?;
    let hits = count(&summary, "/account/retransmit/hits")?;
    counted.are(hits)?;
    let filtered = count(&summary, "/account/retransmit/filtered")?;
    assert!(filtered > 0 && filtered < hits, "{filtered} of {hits} are filtered out");
    let rows = summary["retransmits"].as_array().context("no rows")?;
    assert!(!rows.is_empty() && rows.iter().all(|row| row["peer"] == *first), "{rows:?}");

    well_formed(&svg)?;
    assert!(svg.contains(&format!("[peer {first}]")), "the picture has no peer");
    assert!(!svg.contains(&second), "the picture has another cgroup's peer");
    let sends = SENDING.iter().any(|name| svg.contains(name));
    assert!(sends, "the picture has no sending function");
    Ok(())
}

/// Checks with a parser that is not ours that it is XML.
pub(crate) fn well_formed(svg: &str) -> Result<()> {
    let script = "import sys, xml.dom.minidom as x; \
                  sys.exit(x.parseString(sys.stdin.buffer.read()).documentElement.tagName != 'svg')";
    let mut python = Command::new(tool("PODFLAME_PYTHON")?)
        .args(["-c", script])
        .stdin(Stdio::piped())
        .spawn()?;
    python.stdin.take().context("python without standard input")?.write_all(svg.as_bytes())?;
    ensure!(python.wait()?.success(), "not an SVG: {svg:.200}");
    Ok(())
}

fn of_syns_are_told_apart() -> Result<()> {
    let _counting = bpf::count_runs()?;
    let pair = NetPair::new()?;
    let (client, server) = (Cgroup::new("podflame-client")?, Cgroup::new("podflame-server")?);
    let perf = Counting::start()?;
    let recording = Recording::retransmits(&["--format", "json"])?;
    let mut from_clients = 0;
    for (port, lose) in [
        (7006, NetPair::lose_syns as fn(&NetPair, u16) -> Result<Lossy<'_>>),
        (7007, NetPair::lose_synacks),
    ] {
        let address = format!("[{}]:{port}", NetPair::RECEIVER_V6);
        let mut command = workload("pump")?;
        command.args(["listen", &address]);
        server.enter(&mut command)?;
        pair.receiver.enter(&mut command)?;
        let sink = Workload::start(command)?;
        let lossy = lose(&pair, port)?;
        // It never gets a connection, so that it never says that it is ready.
        let mut connecting = sender(&pair, &client, &address)?;
        let mut connecting = crate::running::Running::start(&mut connecting)?;
        let netns = &pair.sender;
        connecting.until("two SYNs to be sent again", |_| {
            Ok((netns.counter("TcpExt", "TCPSynRetrans")? >= from_clients + 2).then_some(()))
        })?;
        drop(connecting);
        // Without its listener, the kernel forgets who wanted to connect.
        sink.stop()?;
        over(&pair)?;
        from_clients = netns.counter("TcpExt", "TCPSynRetrans")?;
        drop(lossy);
    }
    let (summary, profile) = recording.stop()?;
    let counted = perf.stop()?;
    adds_up(&summary)?;
    let rows = &summary["retransmits"];
    let hits = count(&summary, "/account/retransmit/hits")?;
    let synack = counted.synack;
    counted.are(hits)?;
    assert_eq!(count(&summary, "/account/synack/hits")?, synack);
    assert!(synack > 0 && from_clients >= 4, "{synack} SYN-ACKs, {from_clients} SYNs: {rows}");
    // Tries that failed are hits without a segment: the first SYN may still wait for the address of
    // the neighbour.
    assert_eq!(column(&summary, "segments", Some("syn")), from_clients, "{rows}");
    assert_eq!(column(&summary, "hits", Some("synack")), synack, "{rows}");

    let profile: Value = serde_json::from_str(&profile)?;
    for (cgroup, hits) in [(client, hits), (server, synack)] {
        let path = cgroup.path();
        let owned = samples(&profile, |s| s["workload"]["cgroup_path"].as_str() == path.to_str());
        assert_eq!(owned, hits, "of {}", path.display());
    }
    Ok(())
}
