//! Incidents to `podflame.v1`. One way: clients show what they get.

use podflame_proto::v1;

use super::to_time;
use crate::{
    clock::Clock,
    correlate::{
        Cause, CauseKind, End, Evidence, Incident, Layer, Lead, MoreWork, Name, Root, SLOT_NS,
        Slot, Subject, Symptom, SymptomKind, Verdict,
    },
};

fn to_layer(value: Layer) -> i32 {
    let value = match value {
        Layer::Application => v1::Layer::Application,
        Layer::Platform => v1::Layer::Platform,
        Layer::Infrastructure => v1::Layer::Infrastructure,
        Layer::Network => v1::Layer::Network,
        Layer::Configuration => v1::Layer::Configuration,
        Layer::Downstream => v1::Layer::Downstream,
    };
    value.into()
}

fn to_cause_kind(value: CauseKind) -> i32 {
    let value = match value {
        CauseKind::PathLoss => v1::CauseKind::PathLoss,
        CauseKind::PodLoss => v1::CauseKind::PodLoss,
        CauseKind::PathDelay => v1::CauseKind::PathDelay,
        CauseKind::CpuLimit => v1::CauseKind::CpuLimit,
        CauseKind::MemoryLimit => v1::CauseKind::MemoryLimit,
        CauseKind::MemoryPressure => v1::CauseKind::MemoryPressure,
        CauseKind::PageCache => v1::CauseKind::PageCache,
        CauseKind::Storage => v1::CauseKind::Storage,
        CauseKind::Connections => v1::CauseKind::Connections,
        CauseKind::Allocation => v1::CauseKind::Allocation,
        CauseKind::Lock => v1::CauseKind::Lock,
        CauseKind::Code => v1::CauseKind::Code,
        CauseKind::FanOut => v1::CauseKind::FanOut,
        CauseKind::Sleep => v1::CauseKind::Sleep,
        CauseKind::Neighbour => v1::CauseKind::Neighbour,
        CauseKind::Throttled => v1::CauseKind::Throttled,
        CauseKind::BusyNode => v1::CauseKind::BusyNode,
        CauseKind::SlowPeer => v1::CauseKind::SlowPeer,
    };
    value.into()
}

fn to_symptom_kind(value: SymptomKind) -> i32 {
    let value = match value {
        SymptomKind::ResponseP50 => v1::SymptomKind::ResponseP50,
        SymptomKind::ResponseP99 => v1::SymptomKind::ResponseP99,
        SymptomKind::ResponseMean => v1::SymptomKind::ResponseMean,
        SymptomKind::Throughput => v1::SymptomKind::Throughput,
        SymptomKind::CpuPerRequest => v1::SymptomKind::CpuPerRequest,
        SymptomKind::MajorFaults => v1::SymptomKind::MajorFaults,
        SymptomKind::MinorFaults => v1::SymptomKind::MinorFaults,
        SymptomKind::Retransmits => v1::SymptomKind::Retransmits,
        SymptomKind::Accepts => v1::SymptomKind::Accepts,
        SymptomKind::Connections => v1::SymptomKind::Connections,
    };
    value.into()
}

fn to_verdict(value: Verdict) -> i32 {
    let value = match value {
        Verdict::Cause => v1::Verdict::Cause,
        Verdict::NoCorrelation => v1::Verdict::NoCorrelation,
        Verdict::NotEnoughData => v1::Verdict::NotEnoughData,
    };
    value.into()
}

fn to_end(value: End) -> i32 {
    let value = match value {
        End::Over => v1::IncidentEnd::Over,
        End::NewUsual => v1::IncidentEnd::NewUsual,
        End::Unknown => v1::IncidentEnd::Unknown,
    };
    value.into()
}

/// An incident; `since` is how its start is written in the sentence.
#[must_use]
pub fn to_incident(incident: &Incident, clock: Clock, since: &str) -> v1::Incident {
    let time = |slot: Slot| to_time(clock, slot.start());
    v1::Incident {
        id: incident.id,
        workload: incident.workload.to_string(),
        start_time: time(incident.start),
        detected_time: time(incident.detected),
        last_seen_time: time(incident.last_seen),
        end_time: incident.end.and_then(|(slot, _)| time(slot)),
        end: incident.end.map(|(_, end)| to_end(end)).unwrap_or_default(),
        symptom: Some(to_symptom(incident.symptom)),
        also: incident.also.iter().map(|kind| to_symptom_kind(*kind)).collect(),
        verdict: to_verdict(incident.verdict),
        causes: incident.causes.iter().map(to_cause).collect(),
        lost: incident.lost,
        sentence: incident.sentence(since),
    }
}

/// More work.
#[must_use]
pub fn to_more_work(work: &MoreWork, clock: Clock) -> v1::MoreWork {
    v1::MoreWork {
        workload: work.workload.to_string(),
        start_time: to_time(clock, work.start.start()),
        usual: work.usual,
        now: work.now,
    }
}

fn to_symptom(Symptom { kind, usual, now, worst }: Symptom) -> v1::Symptom {
    v1::Symptom { kind: to_symptom_kind(kind), usual, now, worst }
}

fn to_cause(cause: &Cause) -> v1::Cause {
    let workload = cause.subject.as_ref().and_then(|s| s.workload.as_ref());
    v1::Cause {
        kind: to_cause_kind(cause.kind),
        layer: to_layer(cause.kind.layer()),
        subject: subject(cause.subject.as_ref()),
        subject_workload: name(workload),
        confidence: cause.confidence,
        dose: cause.dose,
        share: cause.share,
        root: cause.root.as_ref().map(to_root),
        evidence: cause.evidence.iter().map(to_evidence).collect(),
    }
}

fn to_root(root: &Root) -> v1::Root {
    v1::Root {
        workload: root.workload.to_string(),
        kind: to_cause_kind(root.kind),
        subject: subject(root.subject.as_ref()),
    }
}

fn to_evidence(evidence: &Evidence) -> v1::Evidence {
    v1::Evidence {
        metric: evidence.metric.name().to_owned(),
        workload: name(evidence.workload.as_ref()),
        subject: name(evidence.subject.as_ref()),
        per_request: evidence.per_request,
        usual: evidence.usual,
        deviation: evidence.deviation,
        values: evidence.values,
        now: evidence.now,
        lead: evidence.lead.map(to_lead),
    }
}

fn to_lead(Lead { slots, correlation }: Lead) -> v1::Lead {
    let slot_ms = i32::try_from(SLOT_NS / 1_000_000).unwrap_or(i32::MAX);
    v1::Lead { lead_ms: slots.saturating_mul(slot_ms), correlation }
}

fn subject(subject: Option<&Subject>) -> String {
    name(subject.map(|s| &s.name))
}

fn name(name: Option<&Name>) -> String {
    name.map(ToString::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::{correlate::Metric, event::KTime};

    #[test]
    fn an_incident_keeps_what_it_says() {
        let peer = Subject::local("payments:8080", &Name::from("payments"));
        let evidence = Evidence {
            metric: Metric::Downstream,
            workload: None,
            subject: Some(Name::from("payments:8080")),
            per_request: true,
            usual: 3e6,
            deviation: 2e5,
            values: 99,
            now: 34e6,
            lead: Some(Lead { slots: -3, correlation: 0.9 }),
        };
        let root = Root { workload: Name::from("payments"), kind: CauseKind::Lock, subject: None };
        let incident = Incident {
            id: 7,
            workload: Name::from("checkout"),
            start: Slot(20),
            detected: Slot(30),
            last_seen: Slot(40),
            end: Some((Slot(50), End::Over)),
            symptom: Symptom {
                kind: SymptomKind::ResponseP50,
                usual: 1e7,
                now: 1.1e7,
                worst: 4.8e7,
            },
            also: vec![SymptomKind::ResponseP99],
            verdict: Verdict::Cause,
            causes: vec![Cause {
                kind: CauseKind::SlowPeer,
                subject: Some(peer),
                confidence: 0.8,
                dose: 31e6,
                share: 0.9,
                root: Some(root),
                evidence: vec![evidence],
            }],
            lost: 0.0,
        };
        let clock = Clock { monotonic: KTime(0), wall: UNIX_EPOCH };
        let wire = to_incident(&incident, clock, "14:03:10");
        let seconds = |time: &Option<podflame_proto::Timestamp>| time.as_ref().map(|t| t.seconds);
        assert_eq!((seconds(&wire.start_time), seconds(&wire.end_time)), (Some(2), Some(5)));
        assert_eq!(wire.end(), v1::IncidentEnd::Over);
        assert_eq!(wire.verdict(), v1::Verdict::Cause);
        assert_eq!(wire.also().collect::<Vec<_>>(), [v1::SymptomKind::ResponseP99]);
        assert!(wire.sentence.contains("14:03:10") && wire.sentence.contains("31 ms"), "{wire:?}");
        let cause = wire.causes.first().cloned().unwrap_or_default();
        assert_eq!((cause.kind(), cause.layer()), (v1::CauseKind::SlowPeer, v1::Layer::Downstream));
        assert_eq!((&*cause.subject, &*cause.subject_workload), ("payments:8080", "payments"));
        assert_eq!(cause.root.map(|r| r.kind()), Some(v1::CauseKind::Lock));
        let evidence = cause.evidence.first().cloned().unwrap_or_default();
        assert_eq!((&*evidence.metric, evidence.per_request), ("downstream_wait", true));
        assert_eq!(evidence.lead.map(|l| l.lead_ms), Some(-300));
    }
}
