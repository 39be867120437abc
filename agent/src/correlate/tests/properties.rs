//! What holds for every node.

use std::sync::Arc;

use proptest::prelude::*;

use super::sim::{Fault, NAMES, Sim};
use crate::correlate::{
    Baselines, Correlator, Event, Incident, MAX_SERIES, MAX_WORKLOADS, Metric, Name, Observation,
    Slot, Source, Subject, Times, Value, decode, encode,
};

const BEFORE: u64 = 100;
const ALL: u64 = 140;

const FAULTS: [Fault; 4] = [Fault::PathLoss, Fault::Code, Fault::CpuLimit, Fault::Neighbour];

fn events(sim: &mut Sim) -> Vec<Event> {
    sim.run(&mut Correlator::new(Baselines::default()), ALL)
}

/// The events, as if the node had been watched from slot 0.
fn relative(events: Vec<Event>, start: u64) -> Vec<Event> {
    let shift = |slot: &mut Slot| slot.0 -= start;
    let incident = |mut i: Incident| {
        i.id = 0;
        [&mut i.start, &mut i.detected, &mut i.last_seen].into_iter().for_each(shift);
        i.end.iter_mut().for_each(|(slot, _)| shift(slot));
        i
    };
    let event = |event| match event {
        Event::Opened(i) => Event::Opened(incident(i)),
        Event::Updated(i) => Event::Updated(incident(i)),
        Event::Closed(i) => Event::Closed(incident(i)),
        Event::MoreWork(mut work) => {
            shift(&mut work.start);
            Event::MoreWork(work)
        }
    };
    events.into_iter().map(event).collect()
}

#[test]
fn shifting_time_changes_nothing() {
    for (seed, fault) in FAULTS.into_iter().enumerate() {
        let sim = || Sim::new(seed as u64, fault, 1, BEFORE, ALL);
        let here = relative(events(&mut sim().starting(1000)), 1000);
        assert!(!here.is_empty(), "{fault:?}");
        for start in [0, 1007, 1 << 40] {
            assert_eq!(here, relative(events(&mut sim().starting(start)), start), "{fault:?}");
        }
    }
}

#[test]
fn the_order_of_pods_changes_nothing() {
    for (seed, fault) in FAULTS.into_iter().enumerate() {
        let mut sim = Sim::new(seed as u64, fault, 1, BEFORE, ALL);
        let here = events(&mut sim);
        let mut sim = Sim::new(seed as u64, fault, 1, BEFORE, ALL);
        sim.order.reverse();
        assert_eq!(here, events(&mut sim), "{fault:?}");
    }
}

#[test]
fn a_quiet_pod_changes_nothing() {
    for (seed, fault) in FAULTS.into_iter().enumerate() {
        let here = events(&mut Sim::new(seed as u64, fault, 1, BEFORE, ALL));
        let mut sim = Sim::new(seed as u64, fault, 1, BEFORE, ALL);
        let mut correlator = Correlator::new(Baselines::default());
        let mut all = Vec::new();
        let name = Name::from("a-quiet-pod");
        for second in 0..ALL {
            let mut times = Times::default();
            (0..20).for_each(|i| times.add(5_000_000 + i * 10_000));
            for (metric, value) in [
                (Metric::Response, Value::Times(times)),
                (Metric::Cpu, Value::Amount(4e6)),
                (Metric::RunQueue, Value::Amount(1e5)),
            ] {
                let slot = Slot(sim.slot(second).0 + 3);
                let workload = Some(Arc::clone(&name));
                let quiet = Observation { slot, slots: 1, workload, metric, subject: None, value };
                // The very first slot is the one that the others come with.
                if second > 0 {
                    correlator.observe(&quiet);
                }
            }
            all.extend(sim.run(&mut correlator, 1));
        }
        assert_eq!(here, all, "{fault:?}");
    }
}

fn best(events: &[Event], pod: &str) -> Option<f64> {
    let last = events.iter().rev().find_map(|e| match e {
        Event::Opened(i) | Event::Updated(i) if &*i.workload == pod => Some(i),
        _ => None,
    })?;
    last.causes.first().map(|c| c.confidence)
}

#[test]
fn less_data_makes_less_sure() {
    for (fault, pod) in [(Fault::Lock, 5), (Fault::CpuLimit, 3), (Fault::SlowPeer, 1)] {
        let sure = |dropped| {
            let mut sim = Sim::new(3, fault, 1, BEFORE, ALL);
            sim.dropped = dropped;
            best(&events(&mut sim), NAMES[pod]).unwrap()
        };
        let (all, most) = (sure(0.0), sure(0.35));
        assert!(most < all, "{fault:?}: {most} of {all}");
    }
}

#[test]
fn missing_data_is_no_incident() {
    for (seed, dropped) in [(1, 0.1), (2, 0.4), (3, 0.6), (4, 1.0)] {
        let mut sim = Sim::new(seed, Fault::Quiet, 0, 0, 0);
        (sim.dropped, sim.pauses) = (dropped, 0.0);
        let told = sim.run(&mut Correlator::new(Baselines::default()), 240);
        assert_eq!(told, [], "seed {seed}, {dropped}");
    }
}

#[test]
fn an_incident_is_opened_followed_and_closed() {
    let mut sim = Sim::new(5, Fault::Lock, 1, BEFORE, ALL);
    let mut correlator = Correlator::new(Baselines::default());
    let events = sim.run(&mut correlator, ALL + 40);
    let of = events.iter().filter_map(|e| match e {
        Event::Opened(i) => Some(("opened", i)),
        Event::Updated(i) => Some(("updated", i)),
        Event::Closed(i) => Some(("closed", i)),
        Event::MoreWork(_) => None,
    });
    let of: Vec<_> = of.filter(|(_, i)| &*i.workload == "recommender").collect();
    let (first, last) = (of.first().unwrap(), of.last().unwrap());
    assert_eq!((first.0, last.0), ("opened", "closed"));
    assert!(of.len() >= 4 && of.iter().all(|(_, i)| i.id == first.1.id), "{of:#?}");
    let started = (first.1.start.0 as f64 - sim.slot(BEFORE).0 as f64) / 10.0;
    assert!(started.abs() <= 2.0, "began {started} s after the fault");
    assert_eq!(correlator.open().count(), 0);

    // The minute is no part of what is usual: the same again is found again.
    let mut again = Sim::new(6, Fault::Lock, 1, 30, 60).starting(sim.slot(ALL + 40).0);
    let events = again.run(&mut correlator, 60);
    let opened = |e: &Event| matches!(e, Event::Opened(i) if &*i.workload == "recommender");
    assert_eq!(events.iter().filter(|e| opened(e)).count(), 1, "{events:#?}");
}

#[test]
fn baselines_outlive_the_agent() {
    let mut first = Correlator::new(Baselines::default());
    let mut sim = Sim::new(7, Fault::Quiet, 0, 0, 0);
    sim.run(&mut first, 120);
    let bytes = encode(&first.baselines(99)).unwrap();
    let run = |baselines| {
        let mut sim = Sim::new(8, Fault::Lock, 1, 12, 40);
        sim.run(&mut Correlator::new(baselines), 40)
    };
    let opened = |events: &[Event]| events.iter().any(|e| matches!(e, Event::Opened(_)));
    assert!(opened(&run(decode(&bytes).unwrap())), "12 s after the start");
    assert!(!opened(&run(Baselines::default())), "nothing is usual after 12 s");
}

#[test]
fn a_long_silence_is_unknown() {
    let mut correlator = Correlator::new(Baselines::default());
    let mut sim = Sim::new(9, Fault::Quiet, 0, 0, 0);
    sim.run(&mut correlator, 100);
    let far = sim.slot(100).0 + (1 << 40);
    assert_eq!(correlator.tick(Slot(far)), []);
    let mut later = Sim::new(10, Fault::Quiet, 0, 0, 0).starting(far);
    assert_eq!(later.run(&mut correlator, 100), []);
}

#[test]
fn memory_is_bounded() {
    let mut correlator = Correlator::new(Baselines::default());
    let sum = Value::Amount(1.0);
    correlator.cover(Source::Tcp, Slot(0), Slot(10), 1.0);
    for pod in 0..MAX_WORKLOADS + 50 {
        let workload = Some(Name::from(format!("pod-{pod}")));
        for metric in [Metric::Function, Metric::Retransmits, Metric::Connections] {
            for subject in 0..40 {
                let subject = Some(Subject::new(&format!("{subject}{}", "\n".repeat(1000))));
                let (workload, value) = (workload.clone(), sum.clone());
                correlator.observe(&Observation {
                    slot: Slot(0),
                    slots: 1,
                    workload,
                    metric,
                    subject,
                    value,
                });
            }
        }
    }
    let refused = correlator.refused();
    assert_eq!(refused.workloads, 50 * 120);
    assert!(refused.folded > 0);
    assert!(correlator.bytes() < 40 << 20, "{} bytes, {MAX_SERIES} series", correlator.bytes());
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<f64>().prop_map(Value::Amount),
        (0.0..1e12).prop_map(Value::Amount),
        prop::collection::vec(any::<u64>(), 0..20).prop_map(|all| {
            let mut times = Times::default();
            all.into_iter().for_each(|ns| times.add(ns));
            Value::Times(times)
        }),
    ]
}

fn observation() -> impl Strategy<Value = Observation> {
    let metric = prop::sample::select(Metric::ALL);
    let subject = prop::option::of(("[a-c\u{1b}]", prop::option::of("[a-d]")));
    let slot = prop_oneof![4 => 0u64..2000, 1 => any::<u64>()];
    (slot, any::<u16>(), prop::option::of("[a-d]"), metric, subject, value()).prop_map(
        |(slot, slots, workload, metric, subject, value)| Observation {
            slot: Slot(slot),
            slots: if slots % 2 == 0 { 1 } else { slots },
            workload: workload.map(Name::from),
            metric,
            subject: subject.map(|(name, pod)| match pod {
                Some(pod) => Subject::local(&name, &Name::from(pod)),
                None => Subject::new(&name),
            }),
            value,
        },
    )
}

#[derive(Clone, Debug)]
enum Input {
    Observe(Observation),
    Cover(usize, u64, f64),
    Tick(u64),
}

fn input() -> impl Strategy<Value = Input> {
    prop_oneof![
        8 => observation().prop_map(Input::Observe),
        2 => (0..Source::ALL.len(), 0u64..2000, any::<f64>()).prop_map(|(s, t, f)| Input::Cover(s, t, f)),
        2 => (0u64..2000).prop_map(Input::Tick),
        1 => any::<u64>().prop_map(Input::Tick),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_input_panics(inputs in prop::collection::vec(input(), 0..200)) {
        let mut correlator = Correlator::new(Baselines::default());
        for input in inputs {
            match input {
                Input::Observe(observation) => correlator.observe(&observation),
                Input::Cover(source, slot, share) => {
                    correlator.cover(Source::ALL[source], Slot(slot), Slot(slot + 50), share);
                }
                Input::Tick(slot) => {
                    for event in correlator.tick(Slot(slot)) {
                        if let Event::Opened(i) | Event::Closed(i) = event {
                            prop_assert!(i.causes.iter().all(|c| (0.0..=1.0).contains(&c.confidence)));
                            let report = i.report("now");
                            prop_assert!(!report.contains(|c: char| c != '\n' && c.is_control()));
                        }
                    }
                }
            }
        }
        prop_assert!(decode(&encode(&correlator.baselines(0)).unwrap()).is_ok());
    }
}
