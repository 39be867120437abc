//! Every event is charged to the pod, container or unit that caused it, on the running kernel and
//! without Kubernetes: what the cgroup's path says, and what engines say of their containers.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use podflame_tests::{Cgroup, Workload, wait_for, workload};
use serde_json::Value;

use crate::{
    Test,
    record::{Recorded, Recording},
    running::{Agent, Running, lines},
};

pub(crate) const TESTS: &[Test] = &[
    ("systemd_names_are_pods_and_units", systemd_names_are_pods_and_units),
    ("a_storm_of_short_processes_stays_in_its_pod", a_storm_of_short_processes_stays_in_its_pod),
    ("pods_that_come_and_go_keep_what_is_theirs", pods_that_come_and_go_keep_what_is_theirs),
    ("a_container_of_podman_has_its_name", a_container_of_podman_has_its_name),
];

/// Longer than anything here takes on a machine that is busy with others.
const LIMIT: Duration = Duration::from_secs(60);

const UID: &str = "8f6b2f0a-5a43-4c0b-9a3e-0d2f6c1b7e55";

/// A workload of the tests, started in a cgroup.
fn start_in(cgroup: &Cgroup, name: &str, words: &[&str]) -> Result<Workload> {
    let mut command = workload(name)?;
    command.args(words);
    cgroup.enter(&mut command)?;
    Workload::start(command)
}

/// The workloads of a profile, with the count of their samples.
fn workloads(recorded: &Recorded) -> Vec<(Value, u64)> {
    let mut all: Vec<(Value, u64)> = Vec::new();
    for sample in recorded.profile["samples"].as_array().into_iter().flatten() {
        let workload = sample["workload"].clone();
        let count = sample["count"].as_u64().unwrap_or(0);
        match all.iter_mut().find(|(known, _)| *known == workload) {
            Some((_, sum)) => *sum += count,
            None => all.push((workload, count)),
        }
    }
    all
}

fn systemd_names_are_pods_and_units() -> Result<()> {
    let (dashed, id) = (UID.replace('-', "_"), "5e".repeat(32));
    let pod = Cgroup::new(&format!(
        "podflame-systemd/kubepods.slice/kubepods-burstable.slice/\
         kubepods-burstable-pod{dashed}.slice/cri-containerd-{id}.scope"
    ))?;
    let unit = Cgroup::new("podflame-systemd/system.slice/podflame-test.service")?;
    let path = pod.path();
    let top = path.ancestors().nth(4).context("no cgroup above")?;
    let recording = Recording::start(&[Path::new("--cgroup"), top])?;
    let loads = [start_in(&pod, "split", &[])?, start_in(&unit, "split", &[])?];
    // As long as it takes for each to have run.
    wait_for("both to have run", LIMIT, || {
        let ran = |cgroup: &Cgroup| cgroup.cpu_time().map(|used| used > Duration::from_secs(1));
        Ok((ran(&pod)? && ran(&unit)?).then_some(()))
    })?;
    let recorded = recording.stop()?;
    loads.into_iter().try_for_each(|load| load.stop().map(drop))?;
    let all = workloads(&recorded);
    let of = |kind: &str| all.iter().filter(|(w, _)| w["kind"] == kind).collect::<Vec<_>>();
    let (pods, units) = (of("pod"), of("unit"));
    ensure!(pods.len() == 1 && units.len() == 1 && all.len() == 2, "{all:?}");
    assert_eq!((&pods[0].0["pod_uid"], &pods[0].0["container_id"]), (&UID.into(), &id.into()));
    assert_eq!(units[0].0["unit"], "podflame-test.service");
    for (workload, count) in all {
        assert_eq!(
            (&workload["source"], &workload["confidence"]),
            (&"cgroup".into(), &"certain".into())
        );
        ensure!(count >= 30, "{count} samples of {workload}");
    }
    Ok(())
}

/// Processes that are gone before anything can be read of them.
fn a_storm_of_short_processes_stays_in_its_pod() -> Result<()> {
    let id = "2b".repeat(32);
    let pod = Cgroup::new(&format!("podflame-storm/kubepods/besteffort/pod{UID}/{id}"))?;
    let recording = Recording::start(&["--frequency", "997"])?;
    let load = start_in(&pod, "forks", &["--per-second", "2000", "--ms", "2", "--seconds", "5"])?;
    let said: Value = serde_json::from_str(&load.finish(LIMIT)?)?;
    let used = pod.cpu_time()?;
    let recorded = recording.stop()?;
    let all = workloads(&recorded);
    // What the cgroup says needs no process, so that nothing of the pod is missing or another's.
    let [(_, inside)] = all.iter().filter(|(w, _)| w["pod_uid"] == UID).collect::<Vec<_>>()[..]
    else {
        anyhow::bail!("not one pod in {all:?}");
    };
    let expected = used.as_secs_f64() * 997.0;
    let part = *inside as f64 / expected;
    ensure!((0.9..=1.1).contains(&part), "{inside} samples, {expected:.0} expected ({said})");
    for (workload, count) in &all {
        let unknown = workload["kind"] == "unattributed";
        let reason = workload["unattributed"].as_str().unwrap_or_default();
        ensure!(unknown != reason.is_empty(), "{count} samples of {workload}");
    }
    // E4 was checked by the recording: the sums are those of the kernel.
    Ok(())
}

fn pods_that_come_and_go_keep_what_is_theirs() -> Result<()> {
    const PODS: usize = 150;
    let recording = Recording::start(&["--frequency", "997"])?;
    let mut used = Duration::ZERO;
    let uid = |n: usize| format!("00000000-0000-4000-8000-{n:012x}");
    for n in 0..PODS {
        let id = format!("{n:064x}");
        let pod = Cgroup::new(&format!("podflame-brief/kubepods/pod{}/{id}", uid(n)))?;
        let mut command = workload("forks")?;
        command.args(["short-lived", "--ms", "15"]);
        pod.enter(&mut command)?;
        ensure!(command.status()?.success(), "{command:?}");
        used += pod.cpu_time()?;
        // Removed at once, long before its samples are looked at.
    }
    let recorded = recording.stop()?;
    let all = workloads(&recorded);
    let mut inside = 0;
    for n in 0..PODS {
        let of: Vec<_> = all.iter().filter(|(w, _)| w["pod_uid"] == uid(n)).collect();
        ensure!(of.len() == 1, "pod {n}: {of:?}");
        ensure!(of[0].0["container_id"] == format!("{n:064x}"), "{of:?}");
        ensure!((5..=60).contains(&of[0].1), "{of:?}: some 15 samples were expected");
        inside += of[0].1;
    }
    let part = inside as f64 / (used.as_secs_f64() * 997.0);
    ensure!((0.85..=1.15).contains(&part), "{inside} samples of {used:?}");
    Ok(())
}

/// A container by Podman, which is removed when dropped.
struct Podman {
    dir: tempfile::TempDir,
    name: String,
}

impl Podman {
    /// Starts a static program in an image of its own.
    fn start() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let name = format!("podflame-test-{}", std::process::id());
        let made = Self { dir, name };
        let source = made.dir.path().join("busy.c");
        let program = made.dir.path().join("busy");
        fs::write(&source, "int main(void) { for (volatile unsigned n = 0;; n++); }\n")?;
        let mut gcc = Command::new("gcc");
        gcc.args(["-O1", "-static", "-o"]).arg(&program).arg(&source);
        ensure!(gcc.status()?.success(), "gcc failed");
        let archive = made.dir.path().join("image.tar");
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(made.dir.path()).arg("-cf").arg(&archive).arg("busy");
        ensure!(tar.status()?.success(), "tar failed");
        let archive = archive.to_str().context("a path in UTF-8")?;
        made.podman(&["import", "--quiet", archive, &made.image()])?;
        made.podman(&[
            "run",
            "--detach",
            "--network=none",
            "--ulimit=nofile=1024:1024",
            "--ulimit=nproc=1024:1024",
            "--name",
            &made.name,
            &made.image(),
            "/busy",
        ])?;
        Ok(made)
    }

    fn image(&self) -> String {
        format!("localhost/{}:1", self.name)
    }

    /// With what works on every kernel and file system, and in a hybrid of cgroup v1 and v2.
    fn podman(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new("podman")
            .args(["--storage-driver=vfs", "--cgroup-manager=cgroupfs", "--runtime=runc"])
            .args(arguments)
            .output()
            .context("start podman")?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "podman {arguments:?}: {stderr}");
        Ok(String::from_utf8(output.stdout)?)
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        for arguments in [
            &["rm", "--force", "--time=0", "--ignore", &self.name][..],
            &["rmi", "--force", &self.image()],
        ] {
            if let Err(error) = self.podman(arguments) {
                eprintln!("left behind: {error:#}");
            }
        }
    }
}

fn a_container_of_podman_has_its_name() -> Result<()> {
    let agent = Agent::start(&["--signal", "cpu", "--kubernetes", "off"])?;
    let mut watch: Running = agent.watch(&["profiles"])?;
    let container = Podman::start()?;
    let id = container.podman(&["inspect", "--format", "{{.Id}}", &container.name])?;
    let told = watch.until("a sample of the container", |watch| {
        let text = watch.stdout()?;
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut told = lines(whole)?.into_iter().map(|mut line| line["workload"].take());
        Ok(told.find(|workload| workload["container_id"] == id.trim()))
    })?;
    for (key, value) in [
        ("kind", "container".to_owned()),
        ("name", format!("podman/{}", container.name)),
        ("container", container.name.clone()),
        ("image", container.image()),
        ("source", "engine".to_owned()),
    ] {
        assert_eq!(told[key], value, "{key} of {told}");
    }
    Ok(())
}
