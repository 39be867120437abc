//! Pods of a cluster that the tests share, and what an agent tells of them.
//!
//! The first test that needs the node starts it, and [`end`] stops it. What pods run is mounted from
//! this machine, so that their image need not have it.

use std::{
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use podflame_tests::{Node, tool, wait_for};
use serde_json::{Value, json};

use crate::running::{Agent, Running, lines};

/// Longer than a pod takes to start, or a name to come, on a machine that is busy with others.
pub(crate) const LIMIT: Duration = Duration::from_secs(90);

static NODE: Mutex<Option<Node>> = Mutex::new(None);

/// The node, started if need be.
pub(crate) fn node() -> Result<MutexGuard<'static, Option<Node>>> {
    let mut node = NODE.lock().unwrap_or_else(PoisonError::into_inner);
    if node.is_none() {
        *node = Some(Node::start()?);
    }
    Ok(node)
}

/// Stops the node, if a test started it.
pub(crate) fn end() {
    drop(NODE.lock().unwrap_or_else(PoisonError::into_inner).take());
}

/// A pod's specification: one container that runs a workload of the tests.
pub(crate) fn spec(container: &str, command: &[&str]) -> Result<Value> {
    let workloads = tool("PODFLAME_WORKLOADS")?.canonicalize()?;
    let host = ["/lib", "/lib64", "/usr"].map(PathBuf::from);
    let mounts: Vec<_> = host.iter().filter(|path| path.exists()).cloned().collect();
    let mounts = mounts.into_iter().chain([workloads.clone()]).enumerate();
    let (mounts, volumes): (Vec<_>, Vec<_>) = mounts
        .map(|(n, path)| {
            let name = format!("v{n}");
            (
                json!({"name": name, "mountPath": path, "readOnly": true}),
                json!({"name": name, "hostPath": {"path": path}}),
            )
        })
        .unzip();
    let (program, arguments) = command.split_first().context("no command")?;
    Ok(json!({
        "terminationGracePeriodSeconds": 0,
        "containers": [{
            "name": container, "image": Node::image(), "imagePullPolicy": "Never",
            "command": [workloads.join(program)], "args": arguments, "volumeMounts": mounts,
        }],
        "volumes": volumes,
    }))
}

/// A pod of that name alone, which runs once.
pub(crate) fn pod(name: &str, spec: Value) -> Value {
    let mut spec = spec;
    spec["restartPolicy"] = "Never".into();
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})
}

/// An owner of pods, such as a Deployment.
pub(crate) fn owner(api: &str, kind: &str, name: &str, spec: &Value) -> Value {
    let labels = json!({"app": name, "podflame-test/hidden": "x"});
    json!({
        "apiVersion": api, "kind": kind, "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    })
}

/// Objects of the cluster that are deleted when dropped.
pub(crate) struct Objects<'a> {
    node: &'a Node,
    text: String,
}

impl<'a> Objects<'a> {
    pub(crate) fn new(node: &'a Node, objects: &[Value]) -> Result<Self> {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        let made = Self { node, text: list.to_string() };
        node.apply(&made.text)?;
        Ok(made)
    }
}

impl Drop for Objects<'_> {
    fn drop(&mut self) {
        let list: Value = serde_json::from_str(&self.text).unwrap_or_default();
        for item in list["items"].as_array().into_iter().flatten() {
            let (kind, name) = (&item["kind"], &item["metadata"]["name"]);
            let (Some(kind), Some(name)) = (kind.as_str(), name.as_str()) else { continue };
            let force = ["delete", kind, name, "--ignore-not-found", "--wait=false", "--now"];
            if let Err(error) = self.node.kubectl(&force) {
                eprintln!("left behind: {error:#}");
            }
        }
    }
}

/// An agent that names pods by the API server.
pub(crate) fn agent(node: &Node, arguments: &[&str]) -> Result<Agent> {
    let kubeconfig = node.kubeconfig();
    let kubeconfig = kubeconfig.to_str().context("a path in UTF-8")?;
    let mut all = vec!["--signal", "cpu", "--kubernetes", "api", "--node-name", node.name()];
    all.extend(["--kubeconfig", kubeconfig]);
    all.extend(arguments);
    Agent::start(&all)
}

/// The workloads that a stream told of, as last told, with the CPU time that it told in ns.
pub(crate) fn workloads(watch: &Running) -> Result<Vec<(Value, u64)>> {
    let text = watch.stdout()?;
    // Its last line may be half written.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let mut all: Vec<(Value, u64)> = Vec::new();
    for line in lines(whole)? {
        let (workload, weight) = (&line["workload"], line["weight"].as_u64().unwrap_or(0));
        let key = |w: &Value| [w["pod_uid"].clone(), w["container_id"].clone(), w["kind"].clone()];
        match all.iter_mut().find(|(known, _)| key(known) == key(workload)) {
            Some((known, sum)) => {
                *known = workload.clone();
                *sum += weight;
            }
            None if workload.is_object() => all.push((workload.clone(), weight)),
            None => {}
        }
    }
    Ok(all)
}

/// Waits until a stream told of a workload of which all of these hold.
pub(crate) fn until_told(watch: &mut Running, what: &[(&str, &str)]) -> Result<(Value, u64)> {
    let found = wait_for(&format!("a workload with {what:?}"), LIMIT, || {
        let all = workloads(watch)?;
        let fits = |w: &Value| what.iter().all(|(key, value)| w[*key] == *value);
        Ok(all.into_iter().find(|(workload, _)| fits(workload)))
    });
    found.with_context(|| format!("told of {:?}", workloads(watch).unwrap_or_default()))
}
