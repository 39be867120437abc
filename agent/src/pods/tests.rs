//! The index that readers see.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use super::*;

#[test]
fn texts_are_cut_between_characters() {
    assert_eq!(text("web"), "web");
    let long = "ü".repeat(MAX_TEXT);
    assert_eq!(text(&long).len(), MAX_TEXT);
    assert_eq!(text(&format!("a{long}")).len(), MAX_TEXT - 1);
}

#[test]
fn an_index_answers_by_uid_and_by_address() {
    let (publish, latest) = watch::channel(Arc::default());
    let mut publisher = Publisher::new(publish, Source::Api);
    let ip: IpAddr = "10.0.0.1".parse().unwrap();
    let pod = Pod { uid: "u".into(), ips: Box::new([ip]), ..Pod::default() };
    publisher.table.apply(pod, std::time::Instant::now());
    publisher.publish();
    let pods = latest.borrow().clone();
    assert!(pods.by_uid("u").is_some() && pods.by_uid("v").is_none());
    assert!(pods.by_ip("::ffff:10.0.0.1".parse().unwrap()).is_some());
    assert_eq!((pods.state.phase, pods.state.pods), (Phase::Connecting, 1));
}
