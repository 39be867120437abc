//! Objects as an API server sends them, and what is kept of them.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use serde_json::{Value, json};

use super::*;

fn pod(object: &Value) -> Pod {
    let object: PodObject = serde_json::from_value(object.clone()).unwrap();
    object.pod(&Policy::default())
}

fn cid(digit: char) -> String {
    String::from(digit).repeat(64)
}

/// A pod of a Deployment, as Kubernetes 1.20 with containerd tells of it, shortened.
fn deployed() -> Value {
    json!({
        "metadata": {
            "name": "web-7d4b9c6f5d-x2x4z", "generateName": "web-7d4b9c6f5d-", "namespace": "shop",
            "uid": "8f6b2f0a-5a43-4c0b-9a3e-0d2f6c1b7e55", "resourceVersion": "512",
            "creationTimestamp": "2026-11-21T07:10:00Z",
            "labels": {"app": "web", "pod-template-hash": "7d4b9c6f5d", "secret": "x"},
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{…}"},
            "ownerReferences": [
                {"apiVersion": "v1", "kind": "Other", "name": "o", "uid": "1"},
                {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-7d4b9c6f5d", "uid": "2",
                 "controller": true, "blockOwnerDeletion": true},
            ],
            "managedFields": [{"manager": "kubelet", "operation": "Update"}],
        },
        "spec": {
            "nodeName": "node1", "containers": [{"name": "app", "image": "web"}],
            "initContainers": [{"name": "setup"}, {"name": "proxy", "restartPolicy": "Always"}],
        },
        "status": {
            "phase": "Running", "qosClass": "Burstable", "hostIP": "127.0.0.1",
            "podIP": "10.89.0.7", "podIPs": [{"ip": "10.89.0.7"}, {"ip": "fd00::7"}],
            "initContainerStatuses": [
                {"name": "setup", "image": "s", "containerID": format!("containerd://{}", cid('1')),
                 "restartCount": 0},
                {"name": "proxy", "image": "p", "containerID": format!("containerd://{}", cid('2')),
                 "restartCount": 0},
            ],
            "containerStatuses": [
                {"name": "app", "image": "registry/web:1", "restartCount": 3, "ready": true,
                 "containerID": format!("containerd://{}", cid('a')),
                 "state": {"running": {"startedAt": "2026-11-21T07:10:01Z"}},
                 "lastState": {"terminated": {"containerID": format!("containerd://{}", cid('b'))}}},
            ],
            "ephemeralContainerStatuses": [
                {"name": "debug", "image": "d", "containerID": format!("containerd://{}", cid('d')),
                 "restartCount": 0},
            ],
        },
    })
}

#[test]
fn a_pod_of_a_deployment() {
    let pod = pod(&deployed());
    assert_eq!((&*pod.namespace, &*pod.name), ("shop", "web-7d4b9c6f5d-x2x4z"));
    assert_eq!(&*pod.uid, "8f6b2f0a-5a43-4c0b-9a3e-0d2f6c1b7e55");
    assert_eq!(format!("{}/{}", pod.owner.kind, pod.owner.name), "Deployment/web");
    assert_eq!((&*pod.qos, &*pod.node), ("Burstable", "node1"));
    assert_eq!(*pod.labels, [("app".into(), "web".into())]);
    let ips: Vec<IpAddr> = ["10.89.0.7", "fd00::7"].map(|ip| ip.parse().unwrap()).into();
    assert_eq!(*pod.ips, ips);
    let container = |digit| {
        let c = pod.container(&cid(digit)).unwrap();
        format!("{} {} {:?} {}", c.name, c.image, c.kind, c.restarts)
    };
    assert_eq!(container('a'), "app registry/web:1 App 3");
    assert_eq!(container('b'), "app registry/web:1 App 2");
    assert_eq!(container('1'), "setup s Init 0");
    assert_eq!(container('2'), "proxy p Sidecar 0");
    assert_eq!(container('d'), "debug d Ephemeral 0");
    assert!(pod.profiled && pod.selected);
}

#[test]
fn a_static_pod_is_found_by_the_hash_of_its_configuration() {
    let mut object = deployed();
    object["metadata"]["annotations"] = json!({
        "kubernetes.io/config.hash": "0123456789abcdef0123456789abcdef",
        "kubernetes.io/config.mirror": "0123456789abcdef0123456789abcdef",
    });
    object["metadata"]["name"] = "etcd-node1".into();
    let pod = pod(&object);
    assert_eq!(&*pod.uid, "0123456789abcdef0123456789abcdef");
    assert_eq!((&*pod.owner.kind, &*pod.owner.name), ("StaticPod", "etcd"));
}

#[test]
fn addresses_of_a_node_or_of_the_dead_are_no_pod_s() {
    let mut object = deployed();
    object["spec"]["hostNetwork"] = true.into();
    assert!(pod(&object).ips.is_empty());
    for phase in ["Succeeded", "Failed"] {
        let mut object = deployed();
        object["status"]["phase"] = phase.into();
        assert!(pod(&object).ips.is_empty());
    }
}

#[test]
fn a_pod_that_opted_out() {
    let mut object = deployed();
    object["metadata"]["annotations"] = json!({"podflame.dev/profile": "false"});
    assert!(!pod(&object).profiled);
}

#[test]
fn what_is_missing_or_null_is_empty() {
    let bare = json!({"metadata": {"name": "a", "labels": null}, "status": {"podIPs": null,
        "containerStatuses": null}});
    let bare = pod(&bare);
    assert_eq!((&*bare.name, &*bare.uid, bare.containers.len()), ("a", "", 0));
    assert_eq!(pod(&json!({"metadata": {}})).owner, Owner::default());
}

#[test]
fn hostile_texts_and_lists_are_bounded() {
    let long = "ü".repeat(1 << 16);
    let mut object = deployed();
    for key in ["name", "namespace", "uid"] {
        object["metadata"][key] = long.clone().into();
    }
    let status = json!({"name": long, "image": long, "containerID": long, "restartCount": 1});
    object["status"]["containerStatuses"] = vec![status; 10_000].into();
    object["status"]["podIPs"] =
        (0..10_000).map(|n| json!({"ip": format!("10.0.{}.{}", n / 256, n % 256)})).collect();
    let labels: BTreeMap<_, _> =
        (0..10_000).map(|n| (format!("app.kubernetes.io/{n}"), "x")).collect();
    object["metadata"]["labels"] = json!(labels);
    let pod = pod(&object);
    let longest = pod.containers.iter().map(|c| c.name.len() + c.image.len() + c.id.len()).max();
    assert!(longest.unwrap() <= 3 * super::super::MAX_TEXT);
    assert!(pod.name.len() <= super::super::MAX_TEXT && pod.containers.len() <= 4 * MAX_STATUSES);
    assert!(pod.ips.len() <= MAX_IPS && pod.labels.len() <= 32);
}
