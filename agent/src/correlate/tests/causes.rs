//! Every cause, from the numbers that show it.

use std::{collections::BTreeMap, sync::Arc};

use crate::correlate::{
    Baselines, CauseKind, Correlator, End, Event, Incident, Metric, Name, Observation, Slot,
    Source, Subject, Times, Value, Verdict,
};

const BEFORE: u64 = 100;
const ALL: u64 = 130;

const MS: f64 = 1e6;

/// Requests a second of every pod.
const REQUESTS: u64 = 50;

/// A number of a pod, `None` for the node: metric, subject, and how much there is a second.
type Line<'a> = (Option<&'a str>, Metric, Option<&'a str>, f64);

/// A node whose numbers never deviate.
#[derive(Clone)]
struct Node<'a> {
    lines: BTreeMap<(Option<&'a str>, Metric, Option<&'a str>), f64>,
    /// What a request of each pod takes, in nanoseconds.
    response: BTreeMap<&'a str, f64>,
    unknown: Vec<Source>,
}

impl<'a> Node<'a> {
    fn new() -> Self {
        let usual: [Line<'a>; 14] = [
            (Some("a"), Metric::Cpu, None, 100.0 * MS),
            (Some("a"), Metric::RunQueue, None, 5.0 * MS),
            (Some("a"), Metric::LockWait, Some("l"), 5.0 * MS),
            (Some("a"), Metric::FileWait, Some("/f"), 10.0 * MS),
            (Some("a"), Metric::CacheMisses, Some("/f"), 5.0),
            (Some("a"), Metric::Downstream, Some("b:80"), 200.0 * MS),
            (Some("a"), Metric::Downstream, Some("far:80"), 200.0 * MS),
            (Some("a"), Metric::Retransmits, Some("b:80"), 0.0),
            (Some("a"), Metric::Retransmits, Some("far:80"), 0.0),
            (Some("b"), Metric::Cpu, None, 50.0 * MS),
            (Some("b"), Metric::RunQueue, None, 5.0 * MS),
            (None, Metric::NodeIdle, None, 0.6),
            (None, Metric::NodeFree, None, 0.5),
            (None, Metric::NodeRunnable, None, 1.0),
        ];
        let lines = usual.into_iter().map(|(pod, metric, subject, n)| ((pod, metric, subject), n));
        let response = BTreeMap::from([("a", 10.0 * MS), ("b", 3.0 * MS)]);
        Self { lines: lines.collect(), response, unknown: Vec::new() }
    }

    fn set(mut self, lines: &[Line<'a>]) -> Self {
        for (pod, metric, subject, amount) in lines {
            self.lines.insert((*pod, *metric, *subject), *amount);
        }
        self
    }

    /// A request of this pod takes longer.
    fn slow(mut self, pod: &'a str, more: f64) -> Self {
        *self.response.entry(pod).or_default() += more;
        self
    }

    fn without(mut self, source: Source) -> Self {
        self.unknown.push(source);
        self
    }

    fn second(&self, correlator: &mut Correlator, second: u64) -> Vec<Event> {
        let slot = Slot(second * 10 + 9);
        let put = |workload: Option<&str>, metric, subject: Option<&str>, value| Observation {
            slot,
            slots: 10,
            workload: workload.map(Name::from),
            metric,
            subject: subject.map(|s| match s.strip_suffix(":80") {
                Some(pod) if pod.len() == 1 => Subject::local(s, &Name::from(pod)),
                _ => Subject::new(s),
            }),
            value,
        };
        let times = |count: u64, total: f64| {
            let mut times = Times::default();
            (0..count).for_each(|_| times.add((total / count as f64) as u64));
            Value::Times(times)
        };
        for ((pod, metric, subject), amount) in &self.lines {
            let calls = (*pod, Metric::Calls, *subject);
            let value = match metric {
                Metric::Calls => continue,
                Metric::Downstream => {
                    let calls = self.lines.get(&calls).map_or(REQUESTS, |n| *n as u64);
                    times(calls, *amount)
                }
                _ => Value::Amount(*amount),
            };
            correlator.observe(&put(*pod, *metric, *subject, value));
        }
        for (pod, each) in &self.response {
            let value = times(REQUESTS, each * REQUESTS as f64);
            correlator.observe(&put(Some(pod), Metric::Response, None, value));
        }
        for source in Source::ALL.into_iter().filter(|s| !self.unknown.contains(s)) {
            correlator.cover(source, Slot(second * 10), Slot(second * 10 + 10), 1.0);
        }
        correlator.tick(Slot(second * 10 + 10))
    }
}

/// What is said of pod a in the end.
fn told(before: &Node<'_>, inside: &Node<'_>) -> Incident {
    let mut correlator = Correlator::new(Baselines::default());
    correlator.cover(Source::Node, Slot(0), Slot(1), 1.0);
    let mut last = None;
    for second in 0..ALL {
        let node = if second < BEFORE { before } else { inside };
        for event in node.second(&mut correlator, second) {
            match event {
                Event::Opened(i) | Event::Updated(i) | Event::Closed(i) if &*i.workload == "a" => {
                    last = Some(i);
                }
                _ => {}
            }
        }
    }
    last.unwrap()
}

fn check(inside: Node<'_>, kind: CauseKind, subject: Option<&str>) {
    let incident = told(&Node::new(), &inside);
    let report = incident.report("T");
    assert_eq!(incident.verdict, Verdict::Cause, "{report}");
    assert_eq!(incident.causes[0].kind, kind, "{report}");
    assert_eq!(incident.causes[0].subject.as_ref().map(|s| &*s.name), subject, "{report}");
    assert!(incident.causes[0].share > 0.7, "{report}");
}

const A: Option<&str> = Some("a");
const B: Option<&str> = Some("b");
const PEER: Option<&str> = Some("b:80");
const FAR: Option<&str> = Some("far:80");
const FILE: Option<&str> = Some("/f");

/// 10 ms more for each request.
const MORE: f64 = 10.0 * MS * REQUESTS as f64;

fn slow() -> Node<'static> {
    Node::new().slow("a", 10.0 * MS)
}

#[test]
fn waits_for_peers() {
    let waits = |peer| slow().set(&[(A, Metric::Downstream, peer, 200.0 * MS + MORE)]);
    check(waits(FAR), CauseKind::SlowPeer, FAR);
    check(waits(PEER), CauseKind::PathDelay, PEER);
    check(waits(PEER).slow("b", 10.0 * MS), CauseKind::SlowPeer, PEER);
    let starved = [(B, Metric::RunQueue, None, 500.0 * MS)];
    check(waits(PEER).set(&starved), CauseKind::SlowPeer, PEER);
    let often = [(A, Metric::Calls, FAR, 150.0), (A, Metric::Downstream, FAR, 600.0 * MS)];
    check(Node::new().slow("a", 8.0 * MS).set(&often), CauseKind::FanOut, FAR);
}

#[test]
fn losses() {
    let waits = |peer| slow().set(&[(A, Metric::Downstream, peer, 200.0 * MS + MORE)]);
    let lossy = [(A, Metric::Retransmits, FAR, 4.0)];
    check(waits(FAR).set(&lossy), CauseKind::PathLoss, FAR);
    let from_there = [(B, Metric::Retransmits, Some("a:80"), 4.0)];
    check(waits(PEER).set(&from_there), CauseKind::PathLoss, PEER);
    let all = [lossy[0], (A, Metric::Retransmits, PEER, 4.0)];
    check(waits(FAR).set(&all), CauseKind::PodLoss, None);
    // Too few to pay for half a second of waiting a second.
    let few = [(A, Metric::Retransmits, FAR, 0.5)];
    check(waits(FAR).set(&few), CauseKind::SlowPeer, FAR);
}

#[test]
fn waits_for_a_cpu() {
    let waits = || slow().set(&[(A, Metric::RunQueue, None, MORE)]);
    check(waits(), CauseKind::BusyNode, None);
    check(waits().set(&[(B, Metric::Cpu, None, 900.0 * MS)]), CauseKind::Neighbour, B);
    let node = |throttled, idle| {
        let lines = [(A, Metric::Throttled, None, throttled), (None, Metric::NodeIdle, None, idle)];
        let before = Node::new().set(&[(A, Metric::Throttled, None, 0.0)]);
        told(&before, &waits().set(&lines)).causes[0].kind
    };
    assert_eq!(node(300.0 * MS, 0.6), CauseKind::CpuLimit);
    assert_eq!(node(300.0 * MS, 0.02), CauseKind::Throttled);
    assert_eq!(node(0.0, 0.6), CauseKind::BusyNode);
    // It needs twice the CPU time: that it waits for it as well is no wonder.
    let dearer = [(A, Metric::Cpu, None, 300.0 * MS), (A, Metric::Throttled, None, 300.0 * MS)];
    check(waits().slow("a", 4.0 * MS).set(&dearer), CauseKind::Code, None);
}

#[test]
fn waits_for_files() {
    let waits = || slow().set(&[(A, Metric::FileWait, FILE, MORE)]);
    let misses = (A, Metric::CacheMisses, FILE, 200.0);
    check(waits(), CauseKind::Storage, FILE);
    check(waits().set(&[misses]), CauseKind::PageCache, FILE);
    let short = (None, Metric::NodeFree, None, 0.04);
    check(waits().set(&[misses, short]), CauseKind::MemoryPressure, FILE);
    let full =
        [misses, (A, Metric::MemoryUsed, None, 250e6), (A, Metric::MemoryLimit, None, 256e6)];
    check(waits().set(&full), CauseKind::MemoryLimit, FILE);
}

#[test]
fn time_of_its_own() {
    let burns = || slow().set(&[(A, Metric::Cpu, None, 100.0 * MS + MORE)]);
    check(burns(), CauseKind::Code, None);
    let opens = [(A, Metric::Connections, FAR, 3000.0)];
    let before = Node::new().set(&[(A, Metric::Connections, FAR, 1.0)]);
    let incident = told(&before, &burns().set(&opens));
    assert_eq!(incident.causes[0].kind, CauseKind::Connections, "{}", incident.report("T"));
    check(slow().set(&[(A, Metric::LockWait, Some("l"), MORE)]), CauseKind::Lock, Some("l"));
    let before = Node::new().set(&[(A, Metric::Sleep, None, 0.0)]);
    let incident = told(&before, &slow().set(&[(A, Metric::Sleep, None, MORE)]));
    assert_eq!(incident.causes[0].kind, CauseKind::Sleep, "{}", incident.report("T"));
}

#[test]
fn no_answer_and_no_data_are_two_things() {
    let verdict = |inside: Node<'_>| told(&Node::new(), &inside).verdict;
    assert_eq!(verdict(slow()), Verdict::NoCorrelation);
    assert_eq!(verdict(slow().without(Source::Sched)), Verdict::NotEnoughData);
    // It correlates, but cannot pay: 10 ms are missing, and 0.4 ms are found.
    let lock = [(A, Metric::LockWait, Some("l"), 25.0 * MS)];
    assert_eq!(verdict(slow().set(&lock)), Verdict::NoCorrelation);
}

#[test]
fn what_lasts_an_hour_is_usual() {
    let mut correlator = Correlator::new(Baselines::default());
    let (before, slow) = (Node::new(), slow().set(&[(A, Metric::LockWait, Some("l"), MORE)]));
    let mut events = Vec::new();
    for second in 0..BEFORE + 3900 {
        let node = if second < BEFORE { &before } else { &slow };
        events.extend(node.second(&mut correlator, second));
    }
    let opened = events.iter().filter(|e| matches!(e, Event::Opened(_))).count();
    let ends = events.iter().filter_map(|e| match e {
        Event::Closed(i) => i.end.map(|(_, end)| (Arc::clone(&i.workload), end)),
        _ => None,
    });
    assert_eq!(ends.collect::<Vec<_>>(), [("a".into(), End::NewUsual)]);
    assert_eq!(opened, 1, "and stays usual");
}
