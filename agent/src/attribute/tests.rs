//! Who is charged, on the running kernel and from paths alone.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use super::{
    testing::{TestCgroup, Waiting, mount, v1_mount},
    *,
};

const UID: &str = "8f6b2f0a-5a43-4c0b-9a3e-0d2f6c1b7e55";
const CID: &str = "c0c1c2c3c4c5c6c7c8c9cacbcccdcecfc0c1c2c3c4c5c6c7c8c9cacbcccdcecf";
const ROOT: CgroupId = CgroupId(1);

fn comm(name: &str) -> Comm {
    let mut comm = Comm::default();
    comm.0[..name.len()].copy_from_slice(name.as_bytes());
    comm
}

/// The workload of a path as one line.
fn line(path: &str) -> String {
    by_path(path).map_or("-".to_owned(), |w| {
        let fields = [&w.pod_uid, &w.container_id, &w.unit];
        format!(
            "{:?} {} [{}] {}",
            w.kind,
            w.name,
            fields.map(String::as_str).join(","),
            w.cgroup_path
        )
    })
}

#[test]
fn workloads_of_paths() {
    let pod = format!("/kubepods/pod{UID}/{CID}");
    assert_eq!(line(&pod), format!("Pod pod/{UID}/c0c1c2c3c4c5 [{UID},{CID},] {pod}"));
    let container = format!("/docker/{CID}");
    assert_eq!(line(&container), format!("Container container/c0c1c2c3c4c5 [,{CID},] {container}"));
    let user = "/user.slice/user-1000.slice/user@1000.service/app.slice/x.service";
    assert_eq!(line(user), format!("Unit user@1000.service/x.service [,,x.service] {user}"));
    let unit = "/system.slice/x.service";
    assert_eq!(line(unit), format!("Unit x.service [,,x.service] {unit}"));
    assert_eq!(line("/"), "-");
}

#[test]
fn a_pod_stays_charged_after_it_is_gone() {
    let Some(mount) = mount() else { return };
    let mut attributor = Attributor::new();
    let cgroup = TestCgroup::new(&mount.point);
    let (path, id) = cgroup.make(&format!("kubepods/burstable/pod{UID}/{CID}"));
    let child = Waiting::start();
    child.enter(&path);
    let process = child.key();
    let facts = facts(process).unwrap();
    attributor.sight(process, id, facts);
    child.end();
    drop(cgroup);

    let charged = attributor.workload(id, process, comm("cat"), Some("/usr/bin/cat"));
    assert_eq!((charged.kind, &*charged.pod_uid), (WorkloadKind::Pod, UID));
    assert_eq!(charged.container_id, CID);
    // The socket's owner is charged, whoever sends, and known or not.
    let other = attributor.workload(id, ProcessKey::default(), Comm::default(), None);
    assert!(Arc::ptr_eq(&charged, &other));
    assert_eq!(attributor.stats().unattributed, 0);
}

#[test]
fn a_cgroup_that_is_gone_charges_nobody() {
    let Some(mount) = mount() else { return };
    let mut attributor = Attributor::new();
    let cgroup = TestCgroup::new(&mount.point);
    let (_, id) = cgroup.make(&format!("kubepods/pod{UID}"));
    drop(cgroup);
    let child = Waiting::start();
    let charged = attributor.workload(id, child.key(), comm("cat"), Some("/usr/bin/cat"));
    assert_eq!(charged.kind, WorkloadKind::Unattributed);
    assert_eq!(
        charged.unattributed,
        format!("cgroup {} was removed before its path could be read", id.0)
    );
    assert_eq!(attributor.stats().unattributed, 1);
}

#[test]
fn a_pod_of_cgroup_v1_by_its_process() {
    let (Some(_), Some(v1)) = (mount(), v1_mount()) else {
        eprintln!("not run: needs root, a cgroup2 mount and cgroup v1's pids");
        return;
    };
    let mut attributor = Attributor::new();
    let cgroup = TestCgroup::new(&v1);
    let (path, _) = cgroup.make(&format!("kubepods/besteffort/pod{UID}/{CID}"));
    let child = Waiting::start();
    let process = child.key();
    // In the root of both at first, as a container's first process is.
    let before = attributor.workload(ROOT, process, comm("cat"), Some("/runc"));
    assert_eq!((before.kind, &*before.name), (WorkloadKind::Process, "runc"));
    child.enter(&path);
    let pod = attributor.workload(ROOT, process, comm("cat"), Some("/usr/bin/cat"));
    assert_eq!((pod.kind, &*pod.pod_uid), (WorkloadKind::Pod, UID));
    assert!(pod.cgroup_path.ends_with(CID));

    // A socket of another cgroup is not charged to the pod of the process that acts for it.
    let (mount, name) = (mount().unwrap(), format!("kubepods/pod{UID}"));
    let elsewhere = TestCgroup::new(&mount.point);
    let (_, bare) = elsewhere.make("bare");
    let charged = attributor.workload(bare, process, comm("cat"), Some("/usr/bin/cat"));
    assert_eq!(charged.kind, WorkloadKind::Process);
    let (_, other) = elsewhere.make(&name);
    let charged = attributor.workload(other, process, comm("cat"), None);
    assert_eq!((charged.kind, &*charged.container_id), (WorkloadKind::Pod, ""));

    // A later process of the same PID is another.
    let later = ProcessKey { start_ns: process.start_ns + 1_000_000_000, ..process };
    let charged = attributor.workload(ROOT, later, comm("cat"), Some("/usr/bin/cat"));
    assert_eq!(charged.kind, WorkloadKind::Process);

    child.end();
    let after = attributor.workload(ROOT, process, comm("cat"), Some("/usr/bin/cat"));
    assert!(Arc::ptr_eq(&pod, &after));
}

#[test]
fn processes_the_kernel_and_nobody() {
    let mut attributor = Attributor::new();
    let child = Waiting::start();
    let gone = child.key();
    child.end();
    let mut charge = |process, name: &str, executable| {
        let workload = attributor.workload(ROOT, process, comm(name), executable);
        (workload.kind, workload.name.clone(), workload.unattributed.clone())
    };
    let none = String::new;
    let named = |kind, name: &str| (kind, name.to_owned(), none());
    let nobody =
        |why: &str| (WorkloadKind::Unattributed, "unattributed".to_owned(), why.to_owned());

    assert_eq!(charge(gone, "x", Some("/opt/a b")), named(WorkloadKind::Process, "a b"));
    // Known from before.
    assert_eq!(charge(gone, "x", None), named(WorkloadKind::Process, "a b"));
    assert_eq!(charge(gone, "x", Some("/b (deleted)")), named(WorkloadKind::Process, "b"));
    let idle = ProcessKey::default();
    assert_eq!(charge(idle, "swapper/1", None), named(WorkloadKind::Kernel, "kernel"));
    // PID 2 is kthreadd, where PIDs are those of the machine.
    if let Some(kthreadd) = process::key_of(2)
        && process::read(kthreadd).is_some_and(|facts| facts.kernel_thread)
    {
        assert_eq!(charge(kthreadd, "kthreadd", None), named(WorkloadKind::Kernel, "kernel"));
    }
    let gone = ProcessKey { start_ns: gone.start_ns + 1, ..gone };
    let why = "the process exited before its cgroup or executable could be read";
    assert_eq!(charge(gone, "x", None), nobody(why));
    let idle = ProcessKey { start_ns: 1, ..ProcessKey::default() };
    let why = "neither the cgroup names a workload nor is the process known";
    assert_eq!(charge(idle, "x", None), nobody(why));
}

#[test]
fn equal_workloads_are_one() {
    let mut attributor = Attributor::new();
    let mut charge = |pid| {
        let process = ProcessKey { pid, start_ns: 1, exec_id: 0 };
        attributor.workload(ROOT, process, comm("x"), Some("/bin/x"))
    };
    let (a, b) = (charge(u32::MAX), charge(u32::MAX - 1));
    assert!(Arc::ptr_eq(&a, &b));
    assert_eq!(attributor.stats().workloads, 1);
}

#[test]
fn bounded_whatever_comes() {
    let mut attributor = Attributor::new();
    for number in 0..40_000_u32 {
        let process = ProcessKey { pid: u32::MAX - number, start_ns: 1, exec_id: 0 };
        let executable = format!("/bin/{number}");
        let charged = attributor.workload(ROOT, process, Comm::default(), Some(&executable));
        assert_eq!(charged.name, number.to_string());
    }
    assert!(attributor.workloads.len() <= MAX_WORKLOADS);
    assert!(attributor.processes.len() <= CAPACITY && attributor.stats().evicted > 0);
}

/// T1: a PID that is used again, in another cgroup, is another process.
#[test]
fn a_pid_that_is_used_again_is_another_process() {
    let (Some(_), Some(v1)) = (mount(), v1_mount()) else {
        eprintln!("not run: needs root, a cgroup2 mount and cgroup v1's pids");
        return;
    };
    let mut attributor = Attributor::new();
    let cgroup = TestCgroup::new(&v1);
    let (path, _) = cgroup.make(&format!("kubepods/pod{UID}/{CID}"));
    for _ in 0..200 {
        let first = Waiting::start();
        first.enter(&path);
        let key = first.key();
        let charged = attributor.workload(ROOT, key, comm("cat"), Some("/usr/bin/cat"));
        assert_eq!((charged.kind, &*charged.pod_uid), (WorkloadKind::Pod, UID));
        assert_eq!(charged.confidence, Confidence::Inferred);
        first.end();
        // Start times count in ticks of 10 ms: in the same tick, two could be taken for one.
        let last = "/proc/sys/kernel/ns_last_pid";
        let mut again = None;
        while again.as_ref().is_none_or(|again: &Waiting| again.key().start_ns == key.start_ns) {
            drop(again.take());
            std::fs::write(last, (key.pid - 1).to_string()).unwrap();
            again = Some(Waiting::start());
        }
        let Some(again) = again.filter(|again| again.key().pid == key.pid) else { continue };
        let other = attributor.workload(ROOT, again.key(), comm("cat"), Some("/usr/bin/cat"));
        assert_eq!((other.kind, &*other.name), (WorkloadKind::Process, "cat"));
        return;
    }
    panic!("no PID was used again");
}

/// T3: cgroups of pods that come and go faster than anyone asks.
#[test]
fn pods_that_come_and_go_keep_their_last_events() {
    let Some(mount) = mount() else { return };
    let (mut attributor, mut cgroups) = (Attributor::new(), Cgroups::new());
    let mut gone = Vec::new();
    for n in 0..250_u32 {
        let cgroup = TestCgroup::new(&mount.point);
        let uid = format!("00000000-0000-0000-0000-{n:012x}");
        let (_, id) = cgroup.make(&format!("kubepods/pod{uid}/{CID}"));
        attributor.made(id, cgroups.learn(id).unwrap());
        drop(cgroup);
        gone.push((id, uid));
    }
    for (id, uid) in gone {
        let charged = attributor.workload(id, ProcessKey::default(), Comm::default(), None);
        assert_eq!((charged.kind, charged.pod_uid.as_str()), (WorkloadKind::Pod, uid.as_str()));
    }
    let stats = attributor.stats();
    assert_eq!((stats.unattributed, stats.cgroups.gone), (0, 0));
    assert!(stats.cgroups.known <= 16_384, "{stats:?}");
}

/// What an event costs with 10,000 containers in the cache. An optimized build has to keep the limit.
#[test]
fn an_event_costs_less_than_a_microsecond() {
    const CONTAINERS: u64 = 10_000;
    const EVENTS: u32 = 200_000;
    let mut attributor = Attributor::new();
    let mut namer = Namer::new(None);
    let mut interner = crate::intern::Interner::default();
    for n in 0..CONTAINERS {
        let path = format!("/kubepods/burstable/pod{UID}/{n:064x}");
        let workload = attributor.intern(by_path(&path).unwrap());
        attributor.named.insert(CgroupId(n), workload);
    }
    let (process, comm) = (ProcessKey { pid: 7, start_ns: 8, exec_id: 0 }, comm("app"));
    let start = Instant::now();
    let mut random = 1_u64;
    for _ in 0..EVENTS {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let cgroup = CgroupId((random >> 33) % CONTAINERS);
        let workload = attributor.workload(cgroup, process, comm, Some("/bin/app"));
        interner.workload_named(workload, |workload| namer.name(workload));
    }
    let each = start.elapsed() / EVENTS;
    eprintln!("an event costs {each:?}");
    let limit = if cfg!(debug_assertions) { 50 } else { 1 };
    assert!(each < Duration::from_micros(limit), "{each:?}");
}
