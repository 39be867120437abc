//! Pods of a real node get their names: from its API server, with real containers.
//!
//! The cluster is that of [`crate::cluster`].

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use podflame_tests::{Node, podflame, wait_for};
use serde_json::{Value, json};

use crate::{
    Test,
    cluster::{LIMIT, Objects, agent, node, owner, pod, spec, until_told, workloads},
    running::{Agent, Running, count, lines},
};

pub(crate) const TESTS: &[Test] = &[
    ("cpu_of_a_pod_goes_to_its_deployment", cpu_of_a_pod_goes_to_its_deployment),
    ("a_pod_that_lives_50_ms_is_named", a_pod_that_lives_50_ms_is_named),
    ("a_pod_deleted_while_it_burns_keeps_its_name", a_pod_deleted_while_it_burns_keeps_its_name),
    ("an_agent_that_restarts_names_all_at_once", an_agent_that_restarts_names_all_at_once),
    ("pods_of_one_name_are_told_apart", pods_of_one_name_are_told_apart),
    ("a_chosen_pod_is_all_that_is_recorded", a_chosen_pod_is_all_that_is_recorded),
    ("a_retransmit_names_both_pods", a_retransmit_names_both_pods),
    ("nothing_of_who_opted_out_is_stored", nothing_of_who_opted_out_is_stored),
];

/// Those that stop a part of the node, or give it a static pod: only for the tests' own.
pub(crate) const OWN_NODE: &[Test] = &[
    ("owners_are_what_a_person_made", owners_are_what_a_person_made),
    ("names_survive_a_restart_of_the_api_server", names_survive_a_restart_of_the_api_server),
    ("names_come_late_but_right", names_come_late_but_right),
    (
        "strictly_none_is_sampled_that_may_have_opted_out",
        strictly_none_is_sampled_that_may_have_opted_out,
    ),
    ("without_permission_uids_remain", without_permission_uids_remain),
    ("the_container_runtime_names_pods_too", the_container_runtime_names_pods_too),
];

fn cpu_of_a_pod_goes_to_its_deployment() -> Result<()> {
    let node = node()?;
    let node = node.as_ref().context("no node")?;
    let _web =
        Objects::new(node, &[owner("apps/v1", "Deployment", "web", &spec("hot", &["split"])?)])?;
    let agent = agent(node, &[])?;
    let mut watch = agent.watch(&["profiles"])?;
    let (workload, _) = until_told(&mut watch, &[("owner_name", "web"), ("container", "hot")])?;
    let expected = [
        ("kind", "pod"),
        ("namespace", "default"),
        ("owner_kind", "Deployment"),
        ("container_kind", "app"),
        ("image", &Node::image()),
        ("qos_class", "BestEffort"),
        ("node", node.name()),
        ("source", "api"),
        ("confidence", "certain"),
    ];
    for (key, value) in expected {
        assert_eq!(workload[key], value, "{key} of {workload}");
    }
    assert_eq!(workload["labels"], json!({"app": "web"}));
    // A thread that never sleeps: its time is a CPU's, but for the other load of the machine.
    let pod = workload["pod"].as_str().context("no pod")?.to_owned();
    let uid = node.kubectl(&["get", "pod", &pod, "-o", "jsonpath={.metadata.uid}"])?;
    assert_eq!(workload["pod_uid"], uid);
    let folded = agent.answer(&["flamegraph", "--pod", &pod, "--format", "folded", "-o", "-"])?;
    let folded = String::from_utf8(folded)?;
    assert!(folded.contains("split::hot_a"), "{folded}");
    assert!(folded.lines().all(|line| line.contains(&pod)), "{folded}");
    let status: Value = serde_json::from_slice(&agent.answer(&["status", "--format", "json"])?)?;
    assert_eq!(status["pod_names"]["phase"], "watching");
    assert_eq!(
        (&status["pod_names"]["lists"], &status["pod_names"]["source"]),
        (&json!(1), &json!("api"))
    );
    Ok(())
}

fn owners_are_what_a_person_made() -> Result<()> {
    let node = node()?;
    let node = node.as_ref().context("no node")?;
    let once = |mut spec: Value| {
        spec["restartPolicy"] = "Never".into();
        spec
    };
    let job = once(spec("work", &["split"])?);
    let mut with_init = spec("late", &["split"])?;
    let mut init = with_init["containers"][0].clone();
    init["name"] = "early".into();
    init["args"] = json!(["--seconds", "3"]);
    with_init["initContainers"] = json!([init]);
    let mut state = owner("apps/v1", "StatefulSet", "state", &with_init);
    state["spec"]["serviceName"] = "state".into();
    let objects = [
        owner("apps/v1", "DaemonSet", "each", &spec("d", &["split"])?),
        json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "once"},
            "spec": {"template": {"spec": job}}}),
        json!({"apiVersion": "batch/v1beta1", "kind": "CronJob", "metadata": {"name": "often"},
            "spec": {"schedule": "* * * * *", "jobTemplate": {"spec": {"template": {"spec": job}}}}}),
        state,
    ];
    let _objects = Objects::new(node, &objects)?;
    let mut fixed = pod("fixed", spec("s", &["split"])?);
    fixed["metadata"]["namespace"] = "kube-system".into();
    let manifest = node.manifests()?.join("fixed.json");
    fs::write(&manifest, fixed.to_string())?;
    let agent = agent(node, &[])?;
    let mut watch = agent.watch(&["profiles"])?;
    for (kind, name, container, container_kind) in [
        ("DaemonSet", "each", "d", "app"),
        ("Job", "once", "work", "app"),
        ("StatefulSet", "state", "early", "init"),
        ("StatefulSet", "state", "late", "app"),
        ("StaticPod", "fixed", "s", "app"),
        // A minute may pass until it is due.
        ("CronJob", "often", "work", "app"),
    ] {
        let what = [("owner_kind", kind), ("owner_name", name), ("container", container)];
        let (workload, _) = until_told(&mut watch, &what)?;
        assert_eq!(workload["container_kind"], container_kind, "{workload}");
    }
    fs::remove_file(manifest)?;
    Ok(())
}

fn a_pod_that_lives_50_ms_is_named() -> Result<()> {
    let node = node()?;
    let node = node.as_ref().context("no node")?;
    // Often enough for some samples.
    let agent = agent(node, &["--frequency", "999"])?;
    let mut watch = agent.watch(&["profiles"])?;
    let spec = spec("brief", &["split", "--seconds", "0.05"])?;
    let _brief = Objects::new(node, &[pod("brief", spec)])?;
    let (workload, _) = until_told(&mut watch, &[("pod", "brief"), ("kind", "pod")])?;
    let uid = node.kubectl(&["get", "pod", "brief", "-o", "jsonpath={.metadata.uid}"])?;
    assert_eq!(workload["pod_uid"], uid);
    // The name of its container comes when it is over: what the agent remembers gets it then.
    wait_for("the container's name", LIMIT, || {
        let folded = agent.ask(&["flamegraph", "--format", "folded", "-o", "-"])?.output()?;
        let folded = String::from_utf8_lossy(&folded.stdout);
        Ok(folded.contains("default/brief/brief").then_some(()))
    })
}

fn a_pod_deleted_while_it_burns_keeps_its_name() -> Result<()> {
    let node = node()?;
    let node = node.as_ref().context("no node")?;
    let agent = agent(node, &[])?;
    let mut watch = agent.watch(&["profiles"])?;
    let burns = Objects::new(node, &[pod("burns", spec("b", &["split"])?)])?;
    let (_, before) = until_told(&mut watch, &[("pod", "burns"), ("container", "b")])?;
    let uid = node.kubectl(&["get", "pod", "burns", "-o", "jsonpath={.metadata.uid}"])?;
    drop(burns);
    node.kubectl(&["wait", "--for=delete", "pod/burns", "--timeout=60s"])?;
    // Longer than the agent remembers: what it kept goes by the name still.
    let gone = Instant::now();
    wait_for("the pod to be forgotten", LIMIT, || {
        let status: Value =
            serde_json::from_slice(&agent.answer(&["status", "--format", "json"])?)?;
        let known = count(&status, "/pod_names/pods")?;
        Ok((gone.elapsed() > Duration::from_secs(20) || known == 0).then_some(()))
    })?;
    let all = workloads(&watch)?;
    let of: Vec<_> = all.iter().filter(|(w, _)| w["pod_uid"] == *uid).collect();
    let whole: u64 = of.iter().map(|(_, weight)| weight).sum();
    assert!(whole >= before, "{of:?}");
    for (workload, _) in &of {
        assert_eq!(
            (&workload["pod"], &workload["namespace"]),
            (&json!("burns"), &json!("default"))
        );
    }
    // Nothing that it did after its deletion is charged to nobody.
    for (workload, weight) in &all {
        let cgroup = workload["cgroup_path"].as_str().unwrap_or_default();
        assert!(!cgroup.contains(&uid) || workload["pod"] == "burns", "{weight} ns of {workload}");
    }
    let folded =
        agent.answer(&["flamegraph", "--pod", "burns", "--format", "folded", "-o", "-"])?;
    let folded = String::from_utf8(folded)?;
    assert!(folded.contains("default/burns/b") && folded.contains("split::hot_a"), "{folded}");
    Ok(())
}

fn an_agent_that_restarts_names_all_at_once() -> Result<()> {
    let node = node()?;
    let node = node.as_ref().context("no node")?;
    let _pod = Objects::new(node, &[pod("steady", spec("s", &["split"])?)])?;
    let mut first = agent(node, &[])?;
    let mut watch = first.watch(&["profiles"])?;
    until_told(&mut watch, &[("pod", "steady"), ("container", "s")])?;
    first.terminate()?;
    watch.succeed()?;
    let second = agent(node, &[])?;
    let mut watch = second.watch(&["profiles"])?;
    until_told(&mut watch, &[("pod", "steady"), ("container", "s")])?;
    // From the first sample on: each line that tells of it has its names.
    let text = watch.stdout()?;
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let uid = node.kubectl(&["get", "pod", "steady", "-o", "jsonpath={.metadata.uid}"])?;
    for line in lines(whole)?.iter().filter(|line| line["workload"]["pod_uid"] == *uid) {
        assert_eq!(line["workload"]["pod"], "steady", "{line}");
    }
    let status: Value = serde_json::from_slice(&second.answer(&["status", "--format", "json"])?)?;
    assert_eq!(status["pod_names"]["lists"], 1, "{status}");
    Ok(())
}

fn pods_of_one_name_are_told_apart() -> Result<()> {
    let node = node()?;
    let node = node.as_ref().context("no node")?;
    let agent = agent(node, &[])?;
    let mut watch = agent.watch(&["profiles"])?;
    let mut uids = Vec::new();
    for container in ["first", "second"] {
        let same = Objects::new(node, &[pod("same", spec(container, &["split"])?)])?;
        let (workload, _) = until_told(&mut watch, &[("pod", "same"), ("container", container)])?;
        let uid = node.kubectl(&["get", "pod", "same", "-o", "jsonpath={.metadata.uid}"])?;
        assert_eq!(workload["pod_uid"], uid);
        uids.push(uid);
        drop(same);
        node.kubectl(&["wait", "--for=delete", "pod/same", "--timeout=60s"])?;
    }
    assert_ne!(uids[0], uids[1]);
    // Each kept its own container, whatever came later.
    for (workload, _) in workloads(&watch)?.iter().filter(|(w, _)| w["pod"] == "same") {
        let uid = workload["pod_uid"].as_str().context("no UID")?;
        let expected = if uid == uids[0] { "first" } else { "second" };
        let container = workload["container"].as_str();
        assert!(container.is_none_or(|name| name == expected), "{workload}");
    }
    Ok(())
}

fn names_survive_a_restart_of_the_api_server() -> Result<()> {
    let node = node()?;
    let node = node.as_ref().context("no node")?;
    let _before = Objects::new(node, &[pod("before", spec("b", &["split"])?)])?;
    let agent = agent(node, &[])?;
    let mut watch = agent.watch(&["profiles"])?;
    until_told(&mut watch, &[("pod", "before"), ("container", "b")])?;
    node.stop("apiserver")?;
    let phase = |agent: &Agent| -> Result<String> {
        let status: Value =
            serde_json::from_slice(&agent.answer(&["status", "--format", "json"])?)?;
        Ok(status["pod_names"]["phase"].as_str().context("no phase")?.to_owned())
    };
    wait_for("the agent to notice", LIMIT, || Ok((phase(&agent)? == "failing").then_some(())))?;
    // What was known stays.
    let mut second = agent.watch(&["profiles"])?;
    until_told(&mut second, &[("pod", "before"), ("container", "b")])?;
    node.restart("apiserver")?;
    wait_for("the API server", LIMIT, || Ok(node.kubectl(&["get", "--raw", "/readyz"]).ok()))?;
    let _after = wait_for("a pod to be made", LIMIT, || {
        Ok(Objects::new(node, &[pod("after", spec("a", &["split"])?)]).ok())
    })?;
    until_told(&mut second, &[("pod", "after"), ("container", "a")])?;
    assert_eq!(phase(&agent)?, "watching");
    Ok(())
}

fn names_come_late_but_right() -> Result<()> {
    let node = node()?;
    let node = node.as_ref().context("no node")?;
    let _late = Objects::new(node, &[pod("late", spec("l", &["split"])?)])?;
    node.kubectl(&["wait", "--for=condition=Ready", "pod/late", "--timeout=60s"])?;
    let uid = node.kubectl(&["get", "pod", "late", "-o", "jsonpath={.metadata.uid}"])?;
    node.stop("apiserver")?;
    let agent = agent(node, &[])?;
    let mut watch = agent.watch(&["profiles"])?;
    let (workload, _) = until_told(&mut watch, &[("pod_uid", &uid)])?;
    assert_eq!((&workload["source"], &workload["pod"]), (&json!("cgroup"), &Value::Null));
    node.restart("apiserver")?;
    until_told(&mut watch, &[("pod_uid", &uid), ("pod", "late"), ("container", "l")])?;
    // Also what was charged before it had a name.
    let folded = agent.answer(&["flamegraph", "--format", "folded", "-o", "-"])?;
    let folded = String::from_utf8(folded)?;
    assert!(folded.contains("default/late/l"), "{folded}");
    assert!(!folded.contains(&uid), "{folded}");
    Ok(())
}

fn strictly_none_is_sampled_that_may_have_opted_out() -> Result<()> {
    let node = node()?;
    let node = node.as_ref().context("no node")?;
    let _early = Objects::new(node, &[pod("early", spec("e", &["split"])?)])?;
    node.kubectl(&["wait", "--for=condition=Ready", "pod/early", "--timeout=60s"])?;
    let uid = node.kubectl(&["get", "pod", "early", "-o", "jsonpath={.metadata.uid}"])?;
    node.stop("apiserver")?;
    let agent = agent(node, &["--opt-out", "strict"])?;
    let mut watch = agent.watch(&["profiles"])?;
    // A second of a pod that never sleeps.
    wait_for("99 events outside of the filter", LIMIT, || {
        let status: Value =
            serde_json::from_slice(&agent.answer(&["status", "--format", "json"])?)?;
        let mut probes = status["probes"].as_array().into_iter().flatten();
        let cpu =
            probes.find(|probe| probe["account"]["probe"] == "on_cpu").context("no on_cpu")?;
        Ok((count(&cpu["account"], "/filtered")? > 99).then_some(()))
    })?;
    node.restart("apiserver")?;
    wait_for("the API server", LIMIT, || Ok(node.kubectl(&["get", "--raw", "/readyz"]).ok()))?;
    // It had its name from its first sample on.
    until_told(&mut watch, &[("pod", "early"), ("container", "e")])?;
    for (workload, weight) in workloads(&watch)? {
        assert!(workload["pod_uid"] != *uid || workload["pod"] == "early", "{weight}: {workload}");
    }
    // One that is made meanwhile comes into a filtered cgroup, and is let out of it.
    let _next = Objects::new(node, &[pod("next", spec("n", &["split"])?)])?;
    until_told(&mut watch, &[("pod", "next"), ("container", "n")])?;
    Ok(())
}

fn without_permission_uids_remain() -> Result<()> {
    let node = node()?;
    let node = node.as_ref().context("no node")?;
    let _pod = Objects::new(node, &[pod("quiet", spec("q", &["split"])?)])?;
    let powerless = node.powerless()?;
    let powerless = powerless.to_str().context("a path in UTF-8")?;
    let started = Instant::now();
    let agent = Agent::start(&[
        "--signal",
        "cpu",
        "--kubernetes",
        "api",
        "--node-name",
        node.name(),
        "--kubeconfig",
        powerless,
    ])?;
    let uid = wait_for("the pod's UID", LIMIT, || {
        let uid = node.kubectl(&["get", "pod", "quiet", "-o", "jsonpath={.metadata.uid}"])?;
        Ok((!uid.is_empty()).then_some(uid))
    })?;
    let mut watch = agent.watch(&["profiles"])?;
    let (workload, _) = until_told(&mut watch, &[("pod_uid", &uid)])?;
    assert_eq!((&workload["pod"], &workload["confidence"]), (&Value::Null, &json!("certain")));
    let status: Value = serde_json::from_slice(&agent.answer(&["status", "--format", "json"])?)?;
    let names = &status["pod_names"];
    assert_eq!(names["phase"], "failing");
    assert!(names["last_failure"].as_str().is_some_and(|why| why.contains("forbidden")), "{names}");
    // Pauses double, from 0.8 s.
    let most = 2.0 + (1.0 + started.elapsed().as_secs_f64() / 0.8).log2();
    let failures = count(names, "/failures")? as f64;
    assert!(failures >= 1.0 && failures <= most, "{names}");
    Ok(())
}

fn the_container_runtime_names_pods_too() -> Result<()> {
    let node = node()?;
    let node = node.as_ref().context("no node")?;
    let once = |mut spec: Value| {
        spec["restartPolicy"] = "Never".into();
        spec
    };
    let mut set = owner("apps/v1", "StatefulSet", "cri-set", &spec("s", &["split"])?);
    set["spec"]["serviceName"] = "cri-set".into();
    let objects = [
        owner("apps/v1", "Deployment", "cri-web", &spec("w", &["split"])?),
        owner("apps/v1", "DaemonSet", "cri-each", &spec("d", &["split"])?),
        json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "cri-once"},
            "spec": {"template": {"spec": once(spec("o", &["split"])?)}}}),
        set,
    ];
    let _objects = Objects::new(node, &objects)?;
    let mut fixed = pod("cri-fixed", spec("f", &["split"])?);
    fixed["metadata"]["namespace"] = "kube-system".into();
    let manifest = node.manifests()?.join("cri-fixed.json");
    fs::write(&manifest, fixed.to_string())?;
    let socket = node.cri_socket();
    // Often enough for a container that lives 50 ms.
    let agent = Agent::start(&[
        "--signal",
        "cpu",
        "--frequency",
        "999",
        "--kubernetes",
        "cri",
        "--node-name",
        node.name(),
        "--cri-socket",
        socket.to_str().context("a path in UTF-8")?,
    ])?;
    let mut watch = agent.watch(&["profiles"])?;
    for (kind, name, container) in [
        ("Deployment", "cri-web", "w"),
        ("DaemonSet", "cri-each", "d"),
        ("Job", "cri-once", "o"),
        ("StatefulSet", "cri-set", "s"),
        ("StaticPod", "cri-fixed", "f"),
    ] {
        let what = [("owner_kind", kind), ("owner_name", name), ("container", container)];
        let (workload, _) = until_told(&mut watch, &what)?;
        assert_eq!(
            (&workload["source"], &workload["image"]),
            (&json!("cri"), &json!(Node::image()))
        );
    }
    // One that is over before the runtime is asked again, mostly.
    let brief = pod("cri-brief", spec("b", &["split", "--seconds", "0.05"])?);
    let _brief = Objects::new(node, &[brief])?;
    wait_for("the container's name", LIMIT, || {
        let folded = agent.ask(&["flamegraph", "--format", "folded", "-o", "-"])?.output()?;
        let folded = String::from_utf8_lossy(&folded.stdout);
        Ok(folded.contains("default/cri-brief/b").then_some(()))
    })?;
    fs::remove_file(manifest)?;
    Ok(())
}

fn a_retransmit_names_both_pods() -> Result<()> {
    const LOSE: &str = "add table inet loss; \
        add chain inet loss in { type filter hook input priority 0; }; \
        add rule inet loss in tcp dport 7100 numgen random mod 100 < 5 drop";
    let node = node()?;
    let node = node.as_ref().context("no node")?;
    let sink = pod("sink", spec("sink", &["pump", "listen", "0.0.0.0:7100"])?);
    let _sink = Objects::new(node, &[sink])?;
    node.kubectl(&["wait", "--for=condition=Ready", "pod/sink", "--timeout=60s"])?;
    let ip = node.kubectl(&["get", "pod", "sink", "-o", "jsonpath={.status.podIP}"])?;
    // The pod's network namespace goes with it, and so does what loses its packets.
    let ip_tool = |arguments: &[&str]| -> Result<String> {
        let output = Command::new("ip").args(arguments).output().context("start ip")?;
        Ok(String::from_utf8(output.stdout)?)
    };
    let all = ip_tool(&["netns", "list"])?;
    let names = all.lines().filter_map(|line| line.split(' ').next());
    let holds = |name: &&str| {
        ip_tool(&["-n", name, "-4", "-o", "addr"])
            .is_ok_and(|text| text.contains(&format!(" {ip}/")))
    };
    let netns = names.into_iter().find(holds).context("no network namespace with that address")?;
    let nft = ["netns", "exec", netns, "nft", LOSE];
    let lossy = Command::new("ip").args(nft).status().context("start ip")?;
    ensure!(lossy.success(), "nft: {lossy}");
    let agent = Agent::start(&[
        "--signal",
        "retransmit,page-fault",
        "--kubernetes",
        "api",
        "--node-name",
        node.name(),
        "--kubeconfig",
        node.kubeconfig().to_str().context("a path in UTF-8")?,
    ])?;
    let watch = agent.watch(&["profiles", "--signal", "retransmit"])?;
    // One of a node where no pod runs, which knows of the rest of the cluster.
    let afar = Agent::start(&[
        "--signal",
        "retransmit",
        "--kubernetes",
        "api",
        "--peers",
        "cluster",
        "--node-name",
        "elsewhere",
        "--kubeconfig",
        node.kubeconfig().to_str().context("a path in UTF-8")?,
    ])?;
    let watch_afar = afar.watch(&["profiles", "--signal", "retransmit"])?;
    let address = format!("{ip}:7100");
    let source = pod("source", spec("source", &["pump", "send", &address])?);
    let faults = owner("apps/v1", "Deployment", "touches", &spec("t", &["faults"])?);
    let _objects = Objects::new(node, &[source, faults])?;
    let peer = format!("peer default/sink ({address})");
    for (watch, pod) in [(&watch, json!("source")), (&watch_afar, Value::Null)] {
        wait_for("a retransmit of one pod to the other", LIMIT, || {
            let text = watch.stdout()?;
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let fits = |line: &Value| {
                line["workload"]["pod"] == pod
                    && line["stack"]
                        .as_array()
                        .into_iter()
                        .flatten()
                        .any(|f| f["function"] == *peer)
            };
            Ok(lines(whole)?.iter().any(fits).then_some(()))
        })?;
    }
    let status: Value = serde_json::from_slice(&afar.answer(&["status", "--format", "json"])?)?;
    // The sink at least, the Service of the API server and the node.
    assert!(count(&status, "/peer_names/objects")? >= 3, "{status}");
    assert_eq!(count(&status, "/peer_names/failures")?, 0, "{status}");
    let mut watch = agent.watch(&["profiles", "--signal", "page-fault"])?;
    until_told(&mut watch, &[("owner_name", "touches"), ("container", "t")])?;
    Ok(())
}

/// Runs `podflame record` to its end; returns its summary and folded stacks.
fn record(node: &Node, arguments: &[&str]) -> Result<(Value, String)> {
    let dir = tempfile::tempdir()?;
    let mut command = podflame()?;
    command.args(["record", "--kubernetes", "api", "--node-name", node.name(), "--kubeconfig"]);
    command.arg(node.kubeconfig()).args(arguments).current_dir(dir.path());
    command.args(["--output", "out.folded", "--summary", "summary"]);
    Running::start(&mut command)?.succeed()?;
    let summary = serde_json::from_slice(&fs::read(dir.path().join("summary"))?)?;
    Ok((summary, fs::read_to_string(dir.path().join("out.folded"))?))
}

fn a_chosen_pod_is_all_that_is_recorded() -> Result<()> {
    let node = node()?;
    let node = node.as_ref().context("no node")?;
    let mut two = spec("calls", &["syscalls"])?;
    let mut second = two["containers"][0].clone();
    second["name"] = "splits".into();
    let program = second["command"][0].as_str().context("no command")?;
    second["command"][0] = program.replace("syscalls", "split").into();
    two["containers"].as_array_mut().context("no containers")?.push(second);
    let objects = [
        owner("apps/v1", "Deployment", "chosen", &two),
        owner("apps/v1", "Deployment", "beside", &spec("faults", &["faults"])?),
    ];
    let _objects = Objects::new(node, &objects)?;
    for name in ["chosen", "beside"] {
        let name = format!("deployment/{name}");
        node.kubectl(&["rollout", "status", &name, "--timeout=60s"])?;
    }
    let (summary, folded) =
        record(node, &["--selector", "app=chosen", "--namespace", "default", "--seconds", "3"])?;
    let has = |what: &str| folded.lines().any(|line| line.contains(what));
    assert!(has("syscalls") && has("split::hot_a") && !has("faults::"), "{folded}");
    assert!(
        folded.lines().all(|line| line.contains("syscalls") || line.contains("split")),
        "{folded}"
    );
    assert_eq!(summary["violations"], json!([]));
    let pods = "jsonpath={.items[0].metadata.name}";
    let pod = node.kubectl(&["get", "pods", "-l", "app=chosen", "-o", pods])?;
    let pod = format!("default/{pod}");
    let (_, folded) = record(node, &["--pod", &pod, "--container", "splits", "--seconds", "3"])?;
    assert!(
        folded.lines().count() > 0 && folded.lines().all(|line| line.contains("split")),
        "{folded}"
    );
    // One that is not there yet is recorded once it is.
    let running = std::thread::scope(|scope| {
        let recording =
            scope.spawn(|| record(node, &["--pod", "default/later", "--seconds", "15"]));
        let later = Objects::new(node, &[pod_of("later")?]);
        let recorded = recording.join().map_err(|_| anyhow::anyhow!("the recording panicked"));
        drop(later);
        recorded?
    });
    let (summary, folded) = running?;
    assert!(folded.contains("split::hot_a"), "{summary}: {folded}");
    Ok(())
}

fn pod_of(name: &str) -> Result<Value> {
    Ok(pod(name, spec("only", &["split"])?))
}

fn nothing_of_who_opted_out_is_stored() -> Result<()> {
    let node = node()?;
    let node = node.as_ref().context("no node")?;
    let no = json!({"podflame.dev/profile": "false"});
    let secret = |name: &str| -> Result<Value> {
        let mut pod = pod_of(name)?;
        pod["metadata"]["annotations"] = no.clone();
        Ok(pod)
    };
    let mut inside = pod_of("inside")?;
    inside["metadata"]["namespace"] = "private".into();
    let private = json!({"apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "private", "annotations": no}});
    let _before = Objects::new(node, &[private, secret("secret")?, pod_of("open")?])?;
    node.apply(&inside.to_string())?;
    node.kubectl(&["wait", "--for=condition=Ready", "pod/secret", "pod/open", "--timeout=60s"])?;
    node.kubectl(&[
        "wait",
        "--for=condition=Ready",
        "pod/inside",
        "-n",
        "private",
        "--timeout=60s",
    ])?;
    // Two agents: one of which these pods are all that it looks at, and one for the node.
    let chosen =
        ["--pod", "default/secret", "--pod", "default/later-secret", "--pod", "private/inside"];
    let only = agent(node, &chosen)?;
    let whole = agent(node, &[])?;
    let mut watch = whole.watch(&["profiles"])?;
    // One more that opted out starts meanwhile, and ends again.
    let later = Objects::new(node, &[secret("later-secret")?])?;
    node.kubectl(&["wait", "--for=condition=Ready", "pod/later-secret", "--timeout=60s"])?;
    until_told(&mut watch, &[("pod", "open"), ("container", "only")])?;
    let cpu = |agent: &Agent| -> Result<Value> {
        let status: Value =
            serde_json::from_slice(&agent.answer(&["status", "--format", "json"])?)?;
        let probe = status["probes"].as_array().into_iter().flatten();
        let mut cpu = probe.filter(|probe| probe["account"]["probe"] == "on_cpu");
        Ok(cpu.next().context("no on_cpu")?["account"].clone())
    };
    wait_for("500 events outside of the filter", LIMIT, || {
        Ok((count(&cpu(&only)?, "/filtered")? > 500).then_some(()))
    })?;
    let uids: Vec<String> =
        [("secret", "default"), ("later-secret", "default"), ("inside", "private")]
            .iter()
            .map(|(name, namespace)| {
                node.kubectl(&[
                    "get",
                    "pod",
                    name,
                    "-n",
                    namespace,
                    "-o",
                    "jsonpath={.metadata.uid}",
                ])
            })
            .collect::<Result<_>>()?;
    drop(later);
    node.kubectl(&["wait", "--for=delete", "pod/later-secret", "--timeout=60s"])?;
    let account = cpu(&only)?;
    assert_eq!(count(&account, "/stored")?, 0, "{account}");
    for (workload, weight) in workloads(&watch)? {
        let uid = workload["pod_uid"].as_str().unwrap_or_default();
        assert!(!uids.iter().any(|secret| secret == uid), "{weight} ns of {workload}");
    }
    Ok(())
}
