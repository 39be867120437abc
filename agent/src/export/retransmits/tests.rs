//! Rows from occurrences.

use super::*;
use crate::{
    event::{Cause, KTime, StackEnd},
    export::fixture::Fixture,
    profile::{MappingId, Signal, StackId, StringId, WorkloadId},
};

fn occurrence(workload: WorkloadId, what: What) -> Occurrence {
    Occurrence {
        time: KTime(1),
        workload,
        pid: 1,
        tid: 1,
        comm: StringId(0),
        stack: StackId(0),
        stack_end: StackEnd::None,
        what,
    }
}

fn retransmit(ends: [&str; 2], cause: Cause, segments: u64, age: Option<u64>) -> What {
    let [local, remote] =
        ends.map(|end| end.parse().unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0))));
    What::Retransmit {
        local,
        remote,
        cause,
        state: 1,
        srtt_us: 200,
        cwnd: 10,
        netns: 1,
        segments,
        sender_age_ns: age,
    }
}

#[test]
fn connections_to_one_service_are_one_row() {
    let mut fixture = Fixture::new(Signal::Retransmit);
    let web = fixture.workload("pod:shop/web-1/nginx");
    let bad = fixture.workload("\u{1b}[2J");
    let db = "10.0.0.9:5432";
    let fault = What::MajorFault { address: 1, mapping: MappingId(0), offset: 0 };
    let client = retransmit(["10.0.0.1:80", "192.0.2.5:60123"], Cause::Fast, 1, None);
    let six = retransmit(["[::ffff:10.0.0.1]:50000", "[::1]:443"], Cause::Syn, 1, None);
    let occurrences = [
        occurrence(web, retransmit(["10.0.0.1:40000", db], Cause::Timeout, 3, Some(5))),
        occurrence(bad, client),
        occurrence(web, retransmit(["10.0.0.1:40001", db], Cause::Timeout, 1, None)),
        occurrence(web, fault),
        occurrence(WorkloadId(99), six),
        occurrence(web, retransmit(["10.0.0.1:40001", db], Cause::Fast, 2, Some(5))),
    ];
    let rows = retransmits(&occurrences, &fixture.dictionary);
    assert_eq!(
        text(&rows),
        "\
OWNER           PEER                CAUSE    HITS  SEGMENTS  SENDER KNOWN
web-1/nginx     10.0.0.9:5432       timeout     2         4           50%
web-1/nginx     10.0.0.9:5432       fast        1         2          100%
\\x1b[2J         192.0.2.5 (to :80)  fast        1         1            0%
[unattributed]  [::1]:443           syn         1         1            0%
"
    );
    let json = serde_json::to_value(&rows[0]).ok();
    let expected = serde_json::json!({
        "owner": "web-1/nginx", "peer": db, "cause": "timeout",
        "hits": 2, "segments": 4, "sender_known": 1,
    });
    assert_eq!(json, Some(expected));
}

#[test]
fn no_retransmits_no_table() {
    assert_eq!(text(&retransmits(&[], &Fixture::new(Signal::Retransmit).dictionary)), "");
}
