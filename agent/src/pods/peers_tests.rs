//! Which addresses belong to whom, by what an API server tells.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use serde_json::{Value, json};

use super::*;

fn told<K: Addressed>(object: Value) -> Change {
    let object: Object<K> = serde_json::from_value(object).unwrap();
    (K::PEER, there(&object))
}

fn pod(name: &str, ip: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop"}, "status": {"podIP": ip}})
}

fn service() -> Value {
    json!({"metadata": {"name": "cart", "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd00::7"],
            "externalIPs": ["192.0.2.7"], "ports": [{"port": 80}]},
        "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.7"}, {"hostname": "a.example"}]}}})
}

fn node() -> Value {
    json!({"metadata": {"name": "worker-1"}, "spec": {"podCIDR": "10.0.1.0/24"},
        "status": {"addresses": [{"type": "InternalIP", "address": "172.16.0.1"},
            {"type": "Hostname", "address": "worker-1"}]}})
}

fn name(peers: &Peers, ip: &str) -> Option<String> {
    peers.by_ip(ip.parse().unwrap()).map(|peer| peer.to_string())
}

#[test]
fn addresses_of_pods_services_and_nodes_have_names() {
    let mut table = Table::default();
    for change in
        [told::<Pods>(pod("web-1", "10.0.0.1")), told::<Services>(service()), told::<Nodes>(node())]
    {
        assert!(table.take(change));
    }
    let peers = table.publication();
    for (ip, expected) in [
        ("10.0.0.1", Some("shop/web-1")),
        ("::ffff:10.0.0.1", Some("shop/web-1")),
        ("10.96.0.7", Some("service shop/cart")),
        ("fd00::7", Some("service shop/cart")),
        ("192.0.2.7", Some("service shop/cart")),
        ("198.51.100.7", Some("service shop/cart")),
        ("172.16.0.1", Some("node worker-1")),
        ("10.0.0.2", None),
    ] {
        assert_eq!(name(&peers, ip).as_deref(), expected, "{ip}");
    }
    assert_eq!(peers.state.objects, 3);
}

#[test]
fn who_has_no_address_of_its_own_claims_none() {
    let mut ended = pod("job-1", "10.0.0.1");
    ended["status"]["phase"] = "Succeeded".into();
    let mut hosted = pod("proxy-1", "172.16.0.1");
    hosted["spec"]["hostNetwork"] = true.into();
    let mut headless = service();
    headless["spec"] = json!({"clusterIP": "None", "clusterIPs": ["None"]});
    headless["status"] = json!({"loadBalancer": {}});
    let mut table = Table::default();
    assert!(!table.take(told::<Pods>(ended)));
    assert!(!table.take(told::<Pods>(hosted)));
    assert!(!table.take(told::<Services>(headless)));
    assert_eq!(table.publication().state.objects, 0);
}

#[test]
fn an_address_goes_to_its_next_owner_and_never_to_two() {
    let mut table = Table::default();
    table.take(told::<Pods>(pod("old", "10.0.0.1")));
    table.take(told::<Pods>(pod("new", "10.0.0.1")));
    assert_eq!(name(&table.publication(), "10.0.0.1"), None, "two claim it");
    table.take((PeerKind::Pod, What::Gone(("shop".into(), "old".into()))));
    assert_eq!(name(&table.publication(), "10.0.0.1").as_deref(), Some("shop/new"));
    let mut ended = pod("new", "10.0.0.1");
    ended["status"]["phase"] = "Failed".into();
    assert!(table.take(told::<Pods>(ended)));
    assert_eq!(name(&table.publication(), "10.0.0.1"), None);
}

#[test]
fn a_list_tells_what_is_gone_of_its_kind() {
    let mut table = Table::default();
    table.take((PeerKind::Pod, What::Begin));
    table.take(told::<Pods>(pod("a", "10.0.0.1")));
    table.take(told::<Nodes>(node()));
    table.take((PeerKind::Pod, What::Complete));
    // Another list, during which one of another kind begins.
    table.take((PeerKind::Pod, What::Begin));
    table.take((PeerKind::Node, What::Begin));
    table.take(told::<Pods>(pod("b", "10.0.0.2")));
    table.take((PeerKind::Pod, What::Complete));
    let peers = table.publication();
    assert_eq!(name(&peers, "10.0.0.1"), None);
    assert_eq!(name(&peers, "10.0.0.2").as_deref(), Some("shop/b"));
    assert_eq!(name(&peers, "172.16.0.1").as_deref(), Some("node worker-1"));
    table.take((PeerKind::Node, What::Complete));
    assert_eq!(name(&table.publication(), "172.16.0.1"), None);
}

#[test]
fn a_full_table_refuses_and_counts() {
    let mut table = Table::default();
    let ip = |n: usize| IpAddr::from((n as u32).to_be_bytes());
    for n in 0..MAX_OBJECTS {
        let key = ("shop".into(), n.to_string().into());
        table.take((PeerKind::Pod, What::There(key, Box::new([ip(n)]))));
    }
    table.take(told::<Nodes>(node()));
    let peers = table.publication();
    assert_eq!((peers.state.objects, peers.state.refused), (MAX_OBJECTS, 1));
    assert_eq!(name(&peers, "172.16.0.1"), None);
}
