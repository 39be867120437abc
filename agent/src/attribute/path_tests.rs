//! The golden table of cgroup paths. `{P}` and the like stand for IDs, so that a row can be read.

use proptest::prelude::*;

use super::*;

const P: &str = "8f6b2f0a-5a43-4c0b-9a3e-0d2f6c1b7e55";
const P_: &str = "8f6b2f0a_5a43_4c0b_9a3e_0d2f6c1b7e55";
const Q: &str = "11111111-2222-4333-8444-555555555555";
const Q_: &str = "11111111_2222_4333_8444_555555555555";
const S: &str = "0123456789abcdef0123456789abcdef";
const C: &str = "c0c1c2c3c4c5c6c7c8c9cacbcccdcecfc0c1c2c3c4c5c6c7c8c9cacbcccdcecf";
const D: &str = "d0d1d2d3d4d5d6d7d8d9dadbdcdddedfd0d1d2d3d4d5d6d7d8d9dadbdcdddedf";

/// Puts the IDs into `{P}`, `{P_}`, `{Q}`, `{Q_}`, `{S}`, `{C}`, `{D}`.
fn fill(text: &str) -> String {
    [("{P}", P), ("{P_}", P_), ("{Q}", Q), ("{Q_}", Q_), ("{S}", S), ("{C}", C), ("{D}", D)]
        .iter()
        .fold(text.to_owned(), |text, (letter, id)| text.replace(letter, id))
}

/// A name as one line: `pod=… container=… unit=… of=…`, `-` if it says nothing.
fn line(name: &CgroupName<'_>) -> String {
    let parts = [
        ("pod", name.pod_uid.as_deref()),
        ("container", name.container_id),
        ("unit", name.unit),
        ("of", name.user_manager),
    ];
    let said: Vec<_> = parts.iter().filter_map(|(k, v)| v.map(|v| format!("{k}={v}"))).collect();
    if said.is_empty() { "-".to_owned() } else { said.join(" ") }
}

fn check(rows: &[(&str, &str)]) {
    for (path, expected) in rows {
        let path = fill(path);
        assert_eq!(line(&parse(&path)), fill(expected), "{path:?}");
    }
}

#[test]
fn pods_of_the_systemd_driver() {
    check(&[
        (
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{P_}.slice/cri-containerd-{C}.scope",
            "pod={P} container={C}",
        ),
        (
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{P_}.slice/crio-{C}.scope",
            "pod={P} container={C}",
        ),
        (
            "/kubepods.slice/kubepods-pod{P_}.slice/crio-{C}.scope/container",
            "pod={P} container={C}",
        ),
        ("/kubepods.slice/kubepods-pod{P_}.slice/docker-{C}.scope", "pod={P} container={C}"),
        (
            "/kubepods.slice/kubepods-pod{P_}.slice/cri-containerd-{C}.scope/init.scope",
            "pod={P} container={C}",
        ),
        ("/kubepods.slice/kubepods-pod{S}.slice/cri-containerd-{C}.scope", "pod={S} container={C}"),
        ("/kubepods.slice/kubepods-pod{P_}.slice", "pod={P}"),
        ("/kubepods.slice/kubepods-pod{P_}.slice/crio-conmon-{C}.scope", "pod={P}"),
        (
            "/podflame.slice/podflame-kubepods.slice/podflame-kubepods-pod{P_}.slice/{C}",
            "pod={P} container={C}",
        ),
        // runc given a systemd path without its systemd driver.
        (
            "/system.slice/containerd.service/kubepods-burstable-pod{P_}.slice:cri-containerd:{C}",
            "pod={P} container={C}",
        ),
        ("/kubepods-besteffort-pod{P_}.slice:docker:{C}", "pod={P} container={C}"),
        // From inside a cgroup namespace.
        (
            "/../../kubepods-burstable-pod{P_}.slice/cri-containerd-{C}.scope",
            "pod={P} container={C}",
        ),
    ]);
}

#[test]
fn pods_of_the_cgroupfs_driver() {
    check(&[
        ("/kubepods/burstable/pod{P}/{C}", "pod={P} container={C}"),
        ("/kubepods/besteffort/pod{P}/{C}", "pod={P} container={C}"),
        ("/kubepods/pod{P}/{C}", "pod={P} container={C}"),
        ("/kubepods/burstable/pod{S}/{C}", "pod={S} container={C}"),
        ("/kubepods/burstable/pod{P}/crio-{C}", "pod={P} container={C}"),
        ("/kubepods/burstable/pod{P}/crio-{C}/container", "pod={P} container={C}"),
        ("/kubepods/burstable/pod{P}/crio-conmon-{C}", "pod={P}"),
        ("/kubepods/burstable/pod{P}", "pod={P}"),
        ("/podflame/kubepods/pod{P}/{C}", "pod={P} container={C}"),
        ("/podflame/kubepods/besteffort/pod{P}/{C}/nested/deeper", "pod={P} container={C}"),
        ("kubepods/pod{P}/{C}", "pod={P} container={C}"),
        ("/kubepods//pod{P}/{C}", "-"),
        ("/kubepods", "-"),
        ("/kubepods/burstable", "-"),
    ]);
}

#[test]
fn nodes_in_containers_and_nested_containers() {
    check(&[
        // kind: the node is a Docker container, which is no pod.
        (
            "/docker/{D}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{P_}.slice/cri-containerd-{C}.scope",
            "pod={P} container={C}",
        ),
        (
            "/system.slice/docker-{D}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{P_}.slice/cri-containerd-{C}.scope",
            "pod={P} container={C}",
        ),
        ("/docker/{D}/kubelet/kubepods/besteffort/pod{P}/{C}", "pod={P} container={C}"),
        ("/docker/{D}/kubelet.slice/kubelet.service", "container={D}"),
        ("/docker/{D}/docker/{C}", "container={D}"),
        // A cluster inside a pod, and Docker inside a pod.
        ("/kubepods/pod{P}/{C}/kubepods/burstable/pod{Q}/{D}", "pod={P} container={C}"),
        ("/kubepods/pod{P}/kubepods/pod{Q}/{D}", "pod={P} container={D}"),
        (
            "/kubepods.slice/kubepods-pod{P_}.slice/cri-containerd-{C}.scope/docker/{D}",
            "pod={P} container={C}",
        ),
        (
            "/kubepods.slice/kubepods-pod{P_}.slice/cri-containerd-{C}.scope/kubepods.slice/kubepods-pod{Q_}.slice/cri-containerd-{D}.scope",
            "pod={P} container={C}",
        ),
    ]);
}

#[test]
fn containers_outside_kubernetes() {
    check(&[
        ("/docker/{C}", "container={C}"),
        ("/system.slice/docker-{C}.scope", "container={C}"),
        ("/machine.slice/libpod-{C}.scope", "container={C}"),
        ("/machine.slice/libpod-{C}.scope/container", "container={C}"),
        ("/libpod_parent/libpod-{C}", "container={C}"),
        ("/machine.slice/machine-libpod_pod_{D}.slice/libpod-{C}.scope", "container={C}"),
        ("/machine.slice/libpod-conmon-{C}.scope", "unit=libpod-conmon-{C}.scope"),
        ("/system.slice/web.service/libpod-payload-{C}", "container={C} unit=web.service"),
        ("/system.slice/nerdctl-{C}.scope", "container={C}"),
        ("/system.slice:docker:{C}", "container={C}"),
        ("/default/{C}", "container={C}"),
        ("/{C}", "container={C}"),
        (
            "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{C}.scope/container",
            "container={C} unit=user@1000.service of=user@1000.service",
        ),
        // Neither 64 digits, nor digits, nor lower case.
        ("/docker/{S}", "-"),
        ("/docker/{C}0", "-"),
        ("/docker/C0C1C2C3C4C5C6C7C8C9CACBCCCDCECFC0C1C2C3C4C5C6C7C8C9CACBCCCDCECF", "-"),
        ("/machine.slice/machine-libpod_pod_{D}.slice", "-"),
    ]);
}

#[test]
fn units() {
    check(&[
        ("/system.slice/nginx.service", "unit=nginx.service"),
        ("/system.slice/system-getty.slice/getty@tty1.service", "unit=getty@tty1.service"),
        ("/system.slice/nginx.service/worker/a.service", "unit=nginx.service"),
        ("/init.scope", "unit=init.scope"),
        ("/user.slice/user-1000.slice/session-3.scope", "unit=session-3.scope"),
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/x.service",
            "unit=x.service of=user@1000.service",
        ),
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/x.service/y.service",
            "unit=x.service of=user@1000.service",
        ),
        (
            "/user.slice/user-1000.slice/user@1000.service/init.scope",
            "unit=init.scope of=user@1000.service",
        ),
        (
            "/user.slice/user-1000.slice/user@1000.service",
            "unit=user@1000.service of=user@1000.service",
        ),
        ("/machine.slice/systemd-nspawn@web.service/payload", "unit=systemd-nspawn@web.service"),
        ("/system.slice", "-"),
        ("/", "-"),
        ("", "-"),
    ]);
}

#[test]
fn hostile_names() {
    let long = "x".repeat(MAX_NAME + 1);
    let rows = [
        // Another pod's name inside a pod, a container or a unit that may make cgroups.
        ("/kubepods/pod{P}/kubepods/pod{Q}", "pod={P}"),
        ("/kubepods/pod{P}/{C}/../../pod{Q}/{D}", "pod={P} container={C}"),
        ("/kubepods/pod{P}/../pod{Q}/{D}", "pod={P}"),
        ("/kubepods/pod{P}/x\n/{D}", "pod={P}"),
        ("/kubepods/../kubepods/pod{Q}/{D}", "-"),
        ("/kubepods/x\n/pod{Q}/{D}", "-"),
        ("/a\u{1b}[31m/kubepods/pod{Q}/{D}", "-"),
        ("/a\u{85}/kubepods/pod{Q}/{D}", "-"),
        ("/./kubepods/pod{Q}/{D}", "-"),
        // A user's manager is the user's: no pod is believed there.
        (
            "/user.slice/user-1000.slice/user@1000.service/kubepods/pod{Q}/{D}",
            "container={D} unit=user@1000.service of=user@1000.service",
        ),
        (
            "/user.slice/user-1000.slice/user@1000.service/kubepods.slice/kubepods-pod{Q_}.slice/cri-containerd-{D}.scope",
            "container={D} unit=user@1000.service of=user@1000.service",
        ),
        // A pod's name where kubelet puts none.
        ("/pod{P}/{C}", "container={C}"),
        ("/kubepods/x/pod{P}/{C}", "container={C}"),
        ("/kubepods/burstable/besteffort/pod{P}/{C}", "container={C}"),
        ("/burstable/pod{P}/{C}", "container={C}"),
        ("/xkubepods-pod{P_}.slice/cri-containerd-{C}.scope", "container={C}"),
        ("/kubepods-other-pod{P_}.slice/cri-containerd-{C}.scope", "container={C}"),
        // Not quite a UID.
        ("/kubepods/pod{P_}/{C}", "container={C}"),
        ("/kubepods-pod{P}.slice/{C}", "container={C}"),
        ("/kubepods/pod{P}x/{C}", "container={C}"),
        ("/kubepods/pod{S}0/{C}", "container={C}"),
        ("/kubepods/pod8F6B2F0A-5A43-4C0B-9A3E-0D2F6C1B7E55/{C}", "container={C}"),
        ("/kubepods/pod{P}\n/{C}", "-"),
        ("/kubepods/pod/{C}", "container={C}"),
        ("/kubepods/pod\u{202e}{P}/{C}", "container={C}"),
    ];
    check(&rows);
    check(&[(&format!("/{long}/kubepods/pod{{Q}}/{{D}}"), "-")]);
    check(&[(&format!("/kubepods/pod{{P}}/{long}/{{D}}"), "pod={P}")]);
    check(&[(&"/x".repeat(100_000), "-")]);
}

proptest! {
    #[test]
    fn only_what_is_in_the_text(parts in prop::collection::vec(part(), 0..12)) {
        let path = fill(&parts.join("/"));
        let name = parse(&path);
        if let Some(uid) = &name.pod_uid {
            let slice = uid.replace('-', "_");
            let forms = [format!("pod{uid}"), format!("pod{slice}")];
            let at = forms.iter().filter_map(|form| path.find(form)).min();
            prop_assert!(at.is_some() && matches!(uid.len(), 32 | 36) && name.unit.is_none());
            // The outermost: what is before it says no pod.
            prop_assert!(parse(&path[..at.unwrap_or(0)]).pod_uid.is_none());
        }
        for text in [name.container_id, name.unit, name.user_manager].into_iter().flatten() {
            prop_assert!(path.contains(text));
        }
        // What is made below cannot change whose pod it is.
        let below = fill(&format!("{path}/kubepods/pod{{Q}}/{{D}}"));
        if name.pod_uid.is_some() {
            prop_assert_eq!(parse(&below).pod_uid, name.pod_uid);
        }
    }

    #[test]
    fn any_text(path in any::<String>()) {
        let name = parse(&path);
        prop_assert!(name.container_id.is_none_or(|id| path.contains(id)));
    }
}

/// Names that parts of real paths are made of, and others.
fn part() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => prop::sample::select(vec![
            "kubepods", "burstable", "kubepods.slice", "pod{P}", "pod{Q}", "pod{S}", "{C}", "{D}",
            "kubepods-pod{P_}.slice", "kubepods-burstable-pod{Q_}.slice", "crio-{C}.scope",
            "kubepods-pod{P_}.slice:cri-containerd:{C}", "user@1000.service", "x.service", "..", "",
            "docker", "docker-{D}.scope", "a\nb",
        ]).prop_map(str::to_owned),
        1 => "[a-f0-9:_.-]{0,70}",
        1 => any::<String>(),
    ]
}

#[test]
fn where_pods_are_made() {
    for (path, expected) in [
        ("/kubepods", true),
        ("/kubepods/burstable", true),
        ("/node/kubepods/besteffort", true),
        ("/kubepods.slice/kubepods-burstable.slice", true),
        ("/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice", true),
        ("/kubepods/pod{P}", false),
        ("/kubepods.slice/kubepods-pod{P_}.slice/cri-containerd-{C}.scope", false),
        ("/system.slice/kubelet.service", false),
        ("/mykubepods", false),
        ("/", false),
    ] {
        assert_eq!(holds_pods(&fill(path)), expected, "{path}");
    }
}
