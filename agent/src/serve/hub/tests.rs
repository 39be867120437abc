//! The hub, driven by made-up batches and clients.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::{fixture::Source, select::WorkloadFilter};

fn hub() -> Hub {
    let store = Store::new(Duration::from_secs(10), Duration::from_mins(1), usize::MAX);
    Hub::new(store, usize::MAX)
}

fn everything() -> Arc<Selector> {
    Arc::default()
}

/// A client that keeps what it was sent.
struct Reader {
    subscription: Subscription,
    dictionary: Dictionary,
    delivered: [u64; SIGNALS],
    told_lost: [u64; SIGNALS],
    batches: Vec<u64>,
    told_batches: u64,
}

impl Reader {
    fn new(hub: &mut Hub, selector: Selector) -> Self {
        Self {
            subscription: hub.subscribe(Kind::Profiles, Arc::new(selector)).unwrap(),
            dictionary: Dictionary::default(),
            delivered: [0; SIGNALS],
            told_lost: [0; SIGNALS],
            batches: Vec::new(),
            told_batches: 0,
        }
    }

    /// Takes one batch, and checks that every ID in it can be resolved.
    fn read(&mut self) -> bool {
        let Ok(delivery) = self.subscription.deliveries.try_recv() else { return false };
        for additions in &delivery.additions {
            self.dictionary.apply(delivery.batch.generation, additions);
        }
        for s in delivery.samples() {
            assert!(self.dictionary.workload(s.workload).is_some());
            assert_eq!(self.dictionary.string(s.comm), "main");
            for frame in self.dictionary.stack(s.stack) {
                let function = self.dictionary.frame(*frame).unwrap().1;
                assert!(!self.dictionary.string(function.name).is_empty());
            }
            self.delivered[s.signal as usize] += s.count;
        }
        for loss in delivery.losses.iter().filter(|l| l.stage == Stage::Client) {
            self.told_lost[loss.signal.unwrap() as usize] += loss.events;
        }
        self.told_batches += delivery.batches_lost;
        self.batches.push(delivery.batch.sequence);
        true
    }
}

#[test]
fn a_late_client_gets_a_snapshot_and_then_what_is_new() {
    let mut source = Source::new();
    let mut hub = hub();
    for i in 0..3 {
        let sample = source.sample(Signal::Cpu, "cart", &format!("f{i} main"), 1);
        hub.apply(&source.flush(vec![sample], vec![]));
    }
    let mut client = Reader::new(&mut hub, Selector::default());
    for i in 2..5 {
        let sample = source.sample(Signal::Cpu, "cart", &format!("f{i} main"), 1);
        hub.apply(&source.flush(vec![sample], vec![]));
    }
    let first = client.subscription.deliveries.try_recv().unwrap();
    // The fourth flush had nothing new.
    assert_eq!((first.batch.sequence, first.additions.len()), (4, 3));
    let second = client.subscription.deliveries.try_recv().unwrap();
    assert_eq!(second.additions, [Arc::clone(&second.batch.additions)]);
}

#[test]
fn a_slow_client_loses_its_own_data_only_and_is_told() {
    let mut source = Source::new();
    let mut hub = hub();
    let mut slow = Reader::new(&mut hub, Selector::default());
    let mut fast = Reader::new(&mut hub, Selector::default());
    let flushes = QUEUE_BATCHES as u64 + 5;
    for i in 0..flushes {
        let sample = source.sample(Signal::Cpu, "cart", &format!("f{i}"), 3);
        hub.apply(&source.flush(vec![sample], vec![]));
        assert!(fast.read());
    }
    while slow.read() {}
    assert_eq!(slow.batches.len(), QUEUE_BATCHES);
    // The next batch tells, and brings the entries of the batches that were lost.
    let sample = source.sample(Signal::Cpu, "cart", &format!("f{}", flushes - 1), 3);
    hub.apply(&source.flush(vec![sample], vec![]));
    assert!(slow.read() && fast.read());
    assert_eq!((slow.told_lost[0], slow.told_batches), (15, 5));
    assert_eq!((fast.told_lost[0], fast.delivered[0]), (0, 3 * (flushes + 1)));
    assert_eq!(slow.dictionary.all, fast.dictionary.all);

    let counts: Vec<Count> = hub.state().clients.iter().map(|c| c.counts[0].1).collect();
    let aggregated = 3 * (flushes + 1);
    let expected = [
        Count { aggregated, delivered: aggregated - 15, lost: 15 },
        Count { aggregated, delivered: aggregated, lost: 0 },
    ];
    assert_eq!(counts, expected);
}

#[test]
fn a_queue_is_bounded_in_bytes_too() {
    let mut source = Source::new();
    let mut hub = hub();
    let mut client = Reader::new(&mut hub, Selector::default());
    let sample = source.sample(Signal::Cpu, "cart", "main", 1);
    let many = vec![sample; QUEUE_BYTES / size_of::<Sample>() + 1];
    for _ in 0..3 {
        hub.apply(&source.flush(many.clone(), vec![]));
    }
    // A batch that is too large for any queue still passes alone.
    assert_eq!(hub.state().clients[0].batches_queued, 1);
    assert!(client.read() && !client.read());
    assert_eq!(hub.state().clients[0].counts[0].1.queued(), 0);
}

#[test]
fn losses_before_the_client_are_told_from_its_first_batch_on() {
    let mut source = Source::new();
    let mut hub = hub();
    source.account.probe_mut(Probe::OnCpu).dropped_in_kernel[0] = 100;
    hub.apply(&source.flush(vec![], vec![]));
    let mut client = hub.subscribe(Kind::Events, everything()).unwrap();
    source.account.probe_mut(Probe::OnCpu).dropped_in_kernel[0] = 107;
    source.account.probe_mut(Probe::Retransmit).dropped_in_agent[0] = 2;
    let mut batch = (*source.flush(vec![], vec![])).clone();
    batch.occurrences_lost = 4;
    hub.apply(&Arc::new(batch));
    let losses = client.deliveries.try_recv().unwrap().losses;
    let found: Vec<_> = losses.iter().map(|l| (l.stage, l.probe, l.reason, l.events)).collect();
    assert_eq!(
        found,
        [
            (Stage::Kernel, Some(Probe::OnCpu), "ring_full", 7),
            (Stage::Agent, Some(Probe::Retransmit), "malformed", 2),
            (Stage::Agent, None, "flush_full", 4),
        ]
    );
}

#[test]
fn an_event_stream_counts_occurrences() {
    let mut source = Source::new();
    let mut hub = hub();
    let pods = vec![WorkloadFilter { pod: "cart".into(), ..Default::default() }];
    let selector = Selector { workloads: pods, ..Default::default() };
    let mut client = hub.subscribe(Kind::Events, Arc::new(selector)).unwrap();
    let events = vec![
        source.fault("cart", "read"),
        source.retransmit("user", "send"),
        source.retransmit("cart", "send"),
    ];
    let sample = source.sample(Signal::Retransmit, "cart", "send", 50);
    hub.apply(&source.flush(vec![sample], events.clone()));
    let delivery = client.deliveries.try_recv().unwrap();
    let got: Vec<&Occurrence> = delivery.occurrences().collect();
    assert_eq!(got, [&events[0], &events[2]]);
    let counts = hub.state().clients[0].counts.clone();
    let of = |signal| counts.iter().find(|(s, _)| *s == signal).unwrap().1;
    assert_eq!(of(Signal::PageFault), Count { aggregated: 1, delivered: 1, lost: 0 });
    assert_eq!(of(Signal::Retransmit), Count { aggregated: 1, delivered: 1, lost: 0 });
}

#[test]
fn clients_are_bounded_and_those_that_left_make_room() {
    let mut hub = hub();
    let mut all: Vec<Subscription> =
        (0..MAX_CLIENTS).map(|_| hub.subscribe(Kind::Profiles, everything()).unwrap()).collect();
    assert_eq!(hub.subscribe(Kind::Profiles, everything()).unwrap_err(), TooMany);
    all.pop();
    assert!(hub.subscribe(Kind::Events, everything()).is_ok());
}

#[test]
fn the_end_has_the_final_counts_behind_what_waits() {
    let mut source = Source::new();
    let mut hub = hub();
    let mut client = Reader::new(&mut hub, Selector::default());
    for _ in 0..QUEUE_BATCHES + 2 {
        let sample = source.sample(Signal::PageFault, "cart", "main", 5);
        hub.apply(&source.flush(vec![sample], vec![]));
    }
    hub.finish();
    while client.read() {}
    let end = client.subscription.end.try_recv().unwrap();
    let count = end.counts[Signal::PageFault as usize];
    assert_eq!((count.delivered, count.lost, count.queued()), (client.delivered[1], 10, 0));
    assert_eq!(end.account.probe(Probe::MajorFault).aggregated, count.aggregated);
}

#[derive(Clone, Debug)]
enum Step {
    Flush(Vec<(usize, u8, u8, u64)>),
    Renew,
    Read(usize),
    Join(Option<u8>),
    Leave(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let sample = (0..SIGNALS, 0..3u8, 0..9u8, 1..50u64);
    let step = prop_oneof![
        6 => prop::collection::vec(sample, 0..5).prop_map(Step::Flush),
        1 => Just(Step::Renew),
        4 => (0..4usize).prop_map(Step::Read),
        1 => prop::option::of(0..3u8).prop_map(Step::Join),
        1 => (0..6usize).prop_map(Step::Leave),
    ];
    prop::collection::vec(step, 1..200)
}

fn check(hub: &mut Hub, readers: &[Reader]) {
    let state = hub.state();
    assert_eq!(state.clients.len(), readers.len());
    for (client, reader) in state.clients.iter().zip(readers) {
        for (signal, count) in &client.counts {
            assert!(count.delivered + count.lost <= count.aggregated, "{count:?}");
            assert_eq!(count.delivered, reader.delivered[*signal as usize]);
            assert!(reader.told_lost[*signal as usize] <= count.lost);
        }
    }
}

proptest! {
    /// E4 at any moment, whoever reads how much, joins or leaves; and every ID sent can be resolved.
    #[test]
    fn every_event_is_delivered_or_lost_or_queued(steps in steps()) {
        let mut source = Source::new();
        let mut hub = hub();
        let mut readers: Vec<Reader> = Vec::new();
        for step in steps {
            match step {
                Step::Flush(samples) => {
                    let samples = samples
                        .into_iter()
                        .map(|(signal, pod, stack, count)| source.sample(Signal::ALL[signal], &format!("p{pod}"), &format!("s{stack} main"), count))
                        .collect();
                    hub.apply(&source.flush(samples, vec![]));
                }
                Step::Renew => source.next_generation(),
                Step::Read(i) => {
                    if let Some(reader) = readers.get_mut(i) {
                        reader.read();
                    }
                }
                Step::Join(pod) => {
                    let workloads = pod.map(|p| WorkloadFilter { pod: format!("p{p}"), ..Default::default() });
                    let selector = Selector { workloads: workloads.into_iter().collect(), ..Default::default() };
                    readers.push(Reader::new(&mut hub, selector));
                }
                Step::Leave(i) => {
                    if i < readers.len() {
                        readers.remove(i);
                    }
                }
            }
            check(&mut hub, &readers);
        }
        hub.finish();
        for mut reader in readers {
            while reader.read() {}
            let end = reader.subscription.end.try_recv().unwrap();
            for (count, delivered) in end.counts.iter().zip(reader.delivered) {
                prop_assert_eq!(count.delivered, delivered);
                prop_assert_eq!(count.aggregated, count.delivered + count.lost);
            }
        }
    }
}
