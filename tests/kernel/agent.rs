//! The agent as it is deployed, seen by its own commands and by clients that are not ours.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use podflame_tests::{Cgroup, PerfStat, Workload, podflame, tool, wait_for, workload};
use serde_json::{Value, json};

use crate::{
    Test, bpf,
    retransmit::well_formed,
    running::{Agent, Running, account_adds_up, count, lines},
};

pub(crate) const TESTS: &[Test] = &[
    ("tells_its_clients_every_sample_and_the_end", tells_its_clients_every_sample_and_the_end),
    ("draws_what_it_remembers", draws_what_it_remembers),
    ("tells_each_major_fault", tells_each_major_fault),
    ("leaves_nothing_behind_when_killed", leaves_nothing_behind_when_killed),
    ("shares_its_socket_with_no_other", shares_its_socket_with_no_other),
    ("serves_on_after_garbage", serves_on_after_garbage),
    ("says_where_it_cannot_serve", says_where_it_cannot_serve),
];

/// The Python client, with these arguments behind the socket's.
fn python(agent: &Agent, arguments: &[&str]) -> Result<Command> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new(tool("PODFLAME_PYTHON")?);
    command.arg(root.join("python/client.py")).arg(agent.socket());
    command.args(arguments);
    Ok(command)
}

/// Two busy threads, in a cgroup if one is given.
fn split(cgroup: Option<&Cgroup>) -> Result<Workload> {
    let mut command = workload("split")?;
    command.args(["--threads", "2"]);
    if let Some(cgroup) = cgroup {
        cgroup.enter(&mut command)?;
    }
    Workload::start(command)
}

/// The innermost function with code of its own in a line of `podflame watch`.
fn innermost(line: &Value) -> Option<&str> {
    let mut frames = line["stack"].as_array()?.iter();
    frames.find(|frame| frame["inlined"] != true)?["function"].as_str()
}

/// The samples of `split`'s two functions, among what the Python client counted for each stack.
fn hot(stacks: &Value) -> Result<[u64; 2]> {
    let stacks = stacks.as_object().context("no stacks")?;
    Ok(["split::hot_a", "split::hot_b"].map(|name| {
        let ours = stacks.iter().filter(|(stack, _)| stack.split(';').any(|frame| frame == name));
        ours.filter_map(|(_, count)| count.as_u64()).sum()
    }))
}

/// The agent looks at a cgroup that is empty until both clients are there, so that they have to be
/// told all that it ever aggregates.
fn tells_its_clients_every_sample_and_the_end() -> Result<()> {
    let _counting = bpf::count_runs()?;
    let cgroup = Cgroup::new("podflame-split")?;
    let path = cgroup.path();
    let path = path.to_str().context("a path in UTF-8")?;
    let mut agent = Agent::start(&["--frequency", "499", "--cgroup", path])?;
    let mut watch = agent.watch(&["profiles", "--signal", "cpu"])?;
    let mut foreign = Running::start(&mut python(&agent, &["profiles", "0"])?)?;
    foreign.until("the foreign client to subscribe", |_| {
        let status = agent.answer(&["status", "--format", "json"])?;
        let status: Value = serde_json::from_slice(&status)?;
        Ok((status["clients"].as_array().map(Vec::len) == Some(2)).then_some(()))
    })?;
    let load = split(Some(&cgroup))?;
    watch.until("samples of some seconds", |watch| {
        let samples = lines_so_far(watch)?;
        Ok((samples.iter().filter(|line| line["type"] == "sample").count() > 100).then_some(()))
    })?;
    // In mid stream: the load goes on.
    agent.terminate()?;
    watch.succeed()?;
    foreign.succeed()?;
    load.stop()?;

    let lines = lines(&watch.stdout()?)?;
    let end = lines.last().filter(|line| line["type"] == "end").context("a stream without end")?;
    assert_eq!(end["reason"], "shutdown");
    let mut functions = json!({});
    for line in lines.iter().filter(|line| line["type"] == "sample") {
        let name = innermost(line).unwrap_or_default();
        let sum = functions[name].as_u64().unwrap_or(0) + count(line, "/count")?;
        functions[name] = sum.into();
        assert_eq!(line["workload"]["cgroup_path"], path, "{line}");
    }
    let probes = end["probes"].as_array().context("no probes")?;
    for probe in probes.iter().filter(|probe| probe["hits"] != 0) {
        account_adds_up(probe)?;
    }
    let on_cpu = probes.iter().find(|probe| probe["probe"] == "on_cpu").context("no on_cpu")?;
    assert!(count(on_cpu, "/filtered")? > 0, "nobody else had a CPU: {on_cpu}");
    let aggregated = count(on_cpu, "/aggregated")?;
    let told: u64 = functions.as_object().into_iter().flatten().filter_map(|f| f.1.as_u64()).sum();
    is_all(&end["deliveries"][0], aggregated, told)?;
    let of = |name: &str| functions[name].as_u64().unwrap_or(0);
    let (a, b) = (of("split::hot_a"), of("split::hot_b"));
    assert!(a > b && b > 0 && 10 * (a + b) > 9 * told, "{functions}");

    let foreign: Value = serde_json::from_str(&foreign.stdout()?)?;
    // By the numbers of profile.proto: 1 is SIGNAL_CPU. Aggregated, delivered, lost.
    let counts = &foreign["end"]["deliveries"]["1"];
    let delivery = json!({
        "aggregated": counts[0], "delivered": counts[1], "lost": counts[2], "queued": 0,
    });
    is_all(&delivery, aggregated, count(&foreign, "/counts/1")?)?;
    assert_eq!(foreign["end"]["reason"], "shutdown");
    let [a, b] = hot(&foreign["stacks"])?;
    assert!(a > b && b > 0, "{a} and {b}: {foreign}");
    Ok(())
}

/// The whole lines that a command wrote so far.
fn lines_so_far(running: &Running) -> Result<Vec<Value>> {
    let text = running.stdout()?;
    lines(text.rsplit_once('\n').map_or("", |(whole, _)| whole))
}

/// Checks E4 for a client that was there from the start: it was told, or told of the loss of, all.
fn is_all(delivery: &Value, aggregated: u64, told: u64) -> Result<()> {
    let of = |name: &str| count(delivery, &format!("/{name}"));
    ensure!(of("aggregated")? == aggregated, "the agent has {aggregated}: {delivery}");
    ensure!(of("delivered")? == told, "{told} were in the stream: {delivery}");
    ensure!(of("delivered")? + of("lost")? == aggregated && of("queued")? == 0, "{delivery}");
    Ok(())
}

fn draws_what_it_remembers() -> Result<()> {
    let agent = Agent::start(&["--signal", "cpu", "--frequency", "499"])?;
    let load = split(None)?;
    let mut stream = Running::start(&mut python(&agent, &["profiles", "20"])?)?;
    stream.succeed()?;
    let stream: Value = serde_json::from_str(&stream.stdout()?)?;
    let [a, b] = hot(&stream["stacks"])?;
    assert!(a > b && b > 0, "{a} and {b}: {stream}");
    let flushes = 1 + count(&stream, "/last")? - count(&stream, "/first")?;
    assert_eq!((flushes, &stream["batches"]), (20, &json!(20)), "{stream}");
    assert_eq!((&stream["losses"], &stream["batches_lost"]), (&json!({}), &json!(0)), "{stream}");

    let pid = load.pid().to_string();
    let graph = |format: &str| -> Result<Vec<u8>> {
        agent.answer(&["flamegraph", "--pid", &pid, "--format", format, "--output", "-"])
    };
    let folded = String::from_utf8(graph("folded")?)?;
    let weight = |name: &str| -> u64 {
        let stacks = folded.lines().filter_map(|line| line.rsplit_once(' '));
        let ours = stacks.filter(|(stack, _)| stack.split(';').any(|frame| frame == name));
        ours.filter_map(|(_, weight)| weight.parse::<u64>().ok()).sum()
    };
    let (a, b, all) = (weight("split::hot_a"), weight("split::hot_b"), weight("split::split_loop"));
    assert!(a > b && b > 0 && a + b <= all, "{a} and {b} of {all} in\n{folded}");

    let svg = String::from_utf8(graph("svg")?)?;
    well_formed(&svg)?;
    assert!(svg.contains("split::hot_a"));
    let dir = tempfile::tempdir()?;
    let foreign = dir.path().join("foreign.svg");
    let path = foreign.to_str().context("a path in UTF-8")?;
    let out = python(&agent, &["flamegraph", "cpu", "svg", path])?.output()?;
    let info: Value = serde_json::from_slice(&out.stdout)
        .with_context(|| String::from_utf8_lossy(&out.stderr).into_owned())?;
    let foreign = fs::read_to_string(&foreign)?;
    assert!(count(&info, "/count")? > 0 && info["bytes"] == foreign.len(), "{info}");
    assert_eq!(widest(&foreign), Some("split::hot_a".to_owned()));

    let pprof = dir.path().join("pprof.pb.gz");
    fs::write(&pprof, graph("pprof")?)?;
    let mut go = Command::new(tool("PODFLAME_GO")?);
    let top = go.args(["tool", "pprof", "-top", "-nodecount=3"]).arg(&pprof).output()?;
    let top = String::from_utf8_lossy(&top.stdout).into_owned();
    assert!(top.contains("split::hot_a"), "{top}");
    load.stop()?;
    answers_the_usual_questions(&agent)
}

/// The function of the widest box that is named so in an SVG, among those of the workload that work.
fn widest(svg: &str) -> Option<String> {
    // <title>split::hot_a (1,234 ms, 56.78%)</title>
    let titles = svg.split("<title>").filter_map(|part| part.split_once("</title>"));
    let shares = titles.filter_map(|(title, _)| {
        let (name, detail) = title.rsplit_once(" (")?;
        let share = detail.rsplit_once(", ")?.1.trim_end_matches("%)").parse::<f64>().ok()?;
        name.starts_with("split::hot_").then(|| (name.to_owned(), share))
    });
    shares.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(name, _)| name)
}

/// The state, the health, and what the API is.
fn answers_the_usual_questions(agent: &Agent) -> Result<()> {
    let status: Value = serde_json::from_slice(&agent.answer(&["status", "--format", "json"])?)?;
    let probes = status["probes"].as_array().context("no probes")?;
    let on_cpu = probes.iter().find(|probe| probe["account"]["probe"] == "on_cpu");
    let on_cpu = on_cpu.context("no on_cpu")?;
    assert_eq!((&on_cpu["active"], &on_cpu["frequency_hz"]), (&json!(true), &json!(499)));
    let of = |name: &str| count(&on_cpu["account"], &format!("/{name}"));
    assert!(of("hits")? >= of("stored")? && of("stored")? >= of("aggregated")?, "{on_cpu}");
    assert!(of("aggregated")? > 0 && count(&status, "/sequence")? > 0, "{status}");
    let text = String::from_utf8(agent.answer(&["status"])?)?;
    assert!(text.contains("on_cpu") && text.contains("499 Hz on each CPU"), "{text}");

    let curl = |arguments: &[&str]| -> Result<String> {
        let mut buf = Command::new(tool("PODFLAME_BUF")?);
        buf.args(["curl", "--protocol", "grpc", "--http2-prior-knowledge", "--unix-socket"]);
        let out = buf.arg(agent.socket()).args(arguments).output()?;
        let error = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(out.status.success(), "buf curl {arguments:?}: {error}");
        Ok(String::from_utf8(out.stdout)?)
    };
    let services = curl(&["--list-services", "http://localhost"])?;
    assert!(services.lines().any(|line| line == "podflame.v1.Profiler"), "{services}");
    for service in ["", "podflame.v1.Profiler"] {
        let question = json!({ "service": service }).to_string();
        let method = "http://localhost/grpc.health.v1.Health/Check";
        let answer: Value = serde_json::from_str(&curl(&["--data", &question, method])?)?;
        assert_eq!(answer["status"], "SERVING", "{service:?}");
    }
    Ok(())
}

fn tells_each_major_fault() -> Result<()> {
    // Beside the workloads: /tmp may be kept in memory, where there are no major faults.
    let dir = tempfile::tempdir_in(tool("PODFLAME_WORKLOADS")?)?;
    let mut agent = Agent::start(&["--signal", "page-fault"])?;
    let mut watch = agent.watch(&["events", "--signal", "page-fault"])?;
    let mut command = workload("faults")?;
    command.args(["--pages", "500", "--count", "1000", "--file"]).arg(dir.path().join("file"));
    let stat = PerfStat::all_cpus("major-faults")?;
    let load = Workload::start(command)?;
    let pid = load.pid();
    let faults: Value = serde_json::from_str(&load.finish(Duration::from_secs(60))?)?;
    let counted = stat.stop()?;
    agent.terminate()?;
    watch.succeed()?;

    let lines = lines(&watch.stdout()?)?;
    let events: Vec<_> =
        lines.iter().filter(|line| line["type"] == "event" && line["pid"] == pid).collect();
    // What the workload counts begins with its start, before it has a stack of its own to show.
    let major = count(&faults, "/major")?;
    let told = events.len() as u64;
    assert!(told == major && told <= counted, "{told} told, perf has {counted}: {faults}");
    let mut touches = 0;
    for event in &events {
        assert!(event["signal"] == "page-fault" && event["major_fault"]["address"] != "0x0");
        let mut frames = event["stack"].as_array().context("no stack")?.iter();
        touches += u64::from(frames.any(|frame| frame["function"] == "faults::touch_file_pages"));
    }
    // The rest, if any, came before: of the executable and its libraries.
    assert!((990..=1000).contains(&touches), "{touches} of {told} have the stack that touches");
    Ok(())
}

fn leaves_nothing_behind_when_killed() -> Result<()> {
    let mut agent = Agent::start(&[])?;
    for round in 1..=20 {
        let held = bpf::held(agent.running.pid())?;
        assert!(held.programs.len() >= 6 && !held.maps.is_empty(), "{held:?}");
        assert!(!held.links.is_empty() && held.left() == held, "{held:?}");
        agent.running.signal(libc::SIGKILL);
        agent.running.end()?;
        // The kernel lets go of some only after a grace period.
        wait_for("the kernel to let go", Duration::from_secs(20), || {
            Ok((held.left() == bpf::Held::default()).then_some(()))
        })
        .with_context(|| format!("round {round}: {:?} are left", held.left()))?;
        assert!(agent.socket().exists(), "a killed agent cannot remove its socket");
        // The next one replaces the socket.
        agent.restart()?;
    }
    agent.terminate()?;
    assert!(!agent.socket().exists(), "an agent that ends removes its socket");
    Ok(())
}

/// Checks that it failed, as a user's mistake does, and that it says these words.
fn fails_with(running: &mut Running, words: &[&str]) -> Result<()> {
    let status = running.end()?;
    let text = running.stderr()?;
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} are not in {text:?}");
    assert!(!text.contains("panicked"), "{text}");
    Ok(())
}

fn shares_its_socket_with_no_other() -> Result<()> {
    let mut first = Agent::start(&["--signal", "cpu"])?;
    let mut watch = first.watch(&["profiles"])?;
    let before = bpf::held(first.running.pid())?;
    let mut second = Agent::run(&first.socket(), &["--signal", "cpu"])?;
    let socket = first.socket();
    let socket = socket.to_str().context("a path in UTF-8")?;
    fails_with(&mut second, &[socket, "another agent answers", "stop it, or choose another"])?;
    // The first one did not notice: the stream it had goes on, and new clients are served.
    let batches = lines_so_far(&watch)?.len();
    watch.until("the stream to go on", |watch| {
        Ok((lines_so_far(watch)?.len() > batches + 2).then_some(()))
    })?;
    first.answer(&["status"])?;
    // Not the maps: unwind tables come and go.
    let after = bpf::held(first.running.pid())?;
    assert_eq!((after.programs, after.links), (before.programs, before.links));
    first.terminate()?;
    watch.succeed()
}

fn serves_on_after_garbage() -> Result<()> {
    let mut agent = Agent::start(&["--signal", "cpu"])?;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice();
    let noise: Vec<u8> =
        (0..100_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let after_preface = [preface, noise.as_slice()].concat();
    // A frame that says it is 16 MiB long, and one of headers with nothing that makes sense.
    let frames =
        [preface, &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1], &[0, 0, 4, 1, 4, 0, 0, 0, 1]].concat();
    let http1 = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".as_slice();
    for garbage in [noise.as_slice(), &after_preface, &frames, http1, b"\0"] {
        let mut stream = UnixStream::connect(agent.socket())?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        // The agent may hang up before it read all.
        let sent = stream.write_all(garbage).and_then(|()| stream.shutdown(Shutdown::Write));
        drop(sent);
        let mut answer = Vec::new();
        // An end or a reset, but no waiting for ever.
        let end = stream.read_to_end(&mut answer).map_err(|error| error.kind());
        assert_ne!(end, Err(std::io::ErrorKind::WouldBlock), "{:.40?}", garbage);
        agent.answer(&["status"])?;
    }
    let mut good = Running::start(&mut python(&agent, &["profiles", "3"])?)?;
    good.succeed()?;
    assert_eq!(serde_json::from_str::<Value>(&good.stdout()?)?["batches"], 3);
    agent.terminate()?;
    assert!(!agent.running.stderr()?.contains("panicked"));
    Ok(())
}

fn says_where_it_cannot_serve() -> Result<()> {
    let mut nowhere = Agent::run(Path::new("/proc/podflame/podflame.sock"), &[])?;
    fails_with(&mut nowhere, &["/proc/podflame/podflame.sock", "make its directory", "choose"])?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("file");
    fs::write(&file, "mine")?;
    fails_with(&mut Agent::run(&file, &[])?, &["not a socket", "remove it, or choose another"])?;
    assert_eq!(fs::read_to_string(&file)?, "mine");
    // Nobody is there to ask.
    let url = format!("unix://{}/none.sock", dir.path().display());
    for arguments in [&["status"][..], &["flamegraph", "-o", "-"], &["watch", "events"]] {
        let mut client = Running::start(podflame()?.args(arguments).args(["--connect", &url]))?;
        fails_with(&mut client, &["no agent answers at", &url, "start one with `podflame agent`"])?;
    }
    Ok(())
}
