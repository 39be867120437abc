//! From a scene to ranked causes: each payer's cause, and how sure one can be of it.

use std::sync::Arc;

use super::{
    baseline::Change,
    detect::{self, Load},
    incident::{Cause, CauseKind, Root, SymptomKind, Verdict},
    lead::Lead,
    observe::{Metric, SECOND, Source, Subject},
    payers::{Payer, payers},
    scene::Scene,
    track::Pod,
    why::{self, Guess},
    workload::Per,
};

/// Most causes that an incident tells.
pub const MAX_CAUSES: usize = 5;

/// What pays less of the symptom is no cause of it.
const MIN_SHARE: f64 = 0.1;

/// The first cause is to blame from this share and confidence on.
const BLAME_SHARE: f64 = 0.2;
const BLAME_CONFIDENCE: f64 = 0.2;

/// Peers that are passed on the way to the root.
const MAX_HOPS: usize = 4;

/// What a scene says.
#[derive(Clone, Debug)]
pub(super) struct Ranking {
    pub(super) causes: Vec<Cause>,
    pub(super) verdict: Verdict,
    /// Share of the data that is not there, of the source that lacks most.
    pub(super) lost: f64,
}

/// Ranks what may have caused this symptom, which is `extra` more than usual in its unit.
pub(super) fn rank(scene: &Scene<'_>, kind: SymptomKind, extra: f64) -> Ranking {
    let mut causes: Vec<Cause> = Vec::new();
    for (payer, guess) in candidates(scene, kind) {
        let cause = cause(scene, kind, &payer, guess, extra);
        match causes.iter_mut().find(|c| c.kind == cause.kind && c.subject == cause.subject) {
            Some(same) => merge(same, cause, extra),
            None => causes.push(cause),
        }
    }
    causes.retain(|c| c.share >= MIN_SHARE);
    causes.sort_by(|a, b| {
        let sure = b.confidence.total_cmp(&a.confidence);
        sure.then(a.kind.cmp(&b.kind)).then_with(|| a.subject.cmp(&b.subject))
    });
    causes.truncate(MAX_CAUSES);
    let found =
        causes.first().is_some_and(|c| c.share >= BLAME_SHARE && c.confidence >= BLAME_CONFIDENCE);
    let needed = [Source::Sockets, Source::Cpu, Source::Sched, Source::Tcp];
    let whole = |source| scene.coverage.whole(source, scene.view.inside);
    let verdict = if found {
        Verdict::Cause
    } else if needed.into_iter().any(|s| whole(s) < 0.5) {
        Verdict::NotEnoughData
    } else {
        Verdict::NoCorrelation
    };
    let used = Source::ALL.into_iter().filter(|s| scene.view.workload.uses(*s));
    let lost = used.map(|s| 1.0 - whole(s)).fold(0.0, f64::max);
    Ranking { causes, verdict, lost }
}

/// What may have caused the symptom, and what it pays.
fn candidates(scene: &Scene<'_>, kind: SymptomKind) -> Vec<(Payer, Guess)> {
    let whole = |metric| {
        let change = scene.change(metric, None)?;
        Some(Payer { metric, subject: None, change })
    };
    let pair = |payer: Payer| {
        let guess = why::why(scene, &payer)?;
        Some((payer, guess))
    };
    match kind {
        SymptomKind::CpuPerRequest => whole(Metric::Cpu).and_then(pair).into_iter().collect(),
        SymptomKind::MajorFaults => {
            whole(Metric::MajorFaults).map(|p| (p, why::files(scene))).into_iter().collect()
        }
        SymptomKind::MinorFaults => whole(Metric::MinorFaults)
            .map(|p| (p.clone(), why::allocation(scene, p.change)))
            .into_iter()
            .collect(),
        SymptomKind::Accepts | SymptomKind::Connections => {
            let accepts = kind == SymptomKind::Accepts;
            let payer = whole(if accepts { Metric::Accepts } else { Metric::Connections });
            payer.zip(why::connections(scene, 0.0)).into_iter().collect()
        }
        SymptomKind::Retransmits => {
            let peers = scene.view.workload.subjects(Metric::Retransmits);
            let lossy = peers.filter_map(|peer| {
                let change = scene.change(Metric::Retransmits, Some(&peer.name))?;
                let guess = why::loss(scene, peer, None)?;
                let subject = Some(peer.clone());
                Some((Payer { metric: Metric::Retransmits, subject, change }, guess))
            });
            lossy.collect()
        }
        _ => payers(scene).into_iter().filter_map(pair).collect(),
    }
}

fn cause(scene: &Scene<'_>, kind: SymptomKind, payer: &Payer, guess: Guess, extra: f64) -> Cause {
    let subject = payer.subject.as_ref().map(|s| &s.name);
    let lead = scene.lead(payer.metric, subject.map(|s| &**s));
    let mut first = scene.evidence(payer.metric, subject, payer.change);
    first.lead = lead;
    let share = (payer.extra() / extra.max(f64::MIN_POSITIVE)).clamp(0.0, 1.0);
    // A symptom that is the cause's own number needs no other witness of the time.
    let timing = match kind {
        kind if kind.is_count() => 1.0,
        _ => timing(lead),
    };
    let confidence = (share / 0.8).min(1.0)
        * lift(payer.change)
        * timing
        * guess.strength
        * data(scene, payer.metric, payer.change);
    let mut evidence = vec![first];
    evidence.extend(guess.evidence);
    evidence.dedup_by(|a, b| {
        a.metric == b.metric && a.subject == b.subject && a.workload == b.workload
    });
    let root = match guess.kind {
        CauseKind::SlowPeer => guess.subject.as_ref().and_then(|s| root(scene, s)),
        _ => None,
    };
    let dose = payer.extra().max(0.0);
    Cause { kind: guess.kind, subject: guess.subject, confidence, dose, share, root, evidence }
}

/// Two payers have one cause.
fn merge(same: &mut Cause, other: Cause, extra: f64) {
    // Sure of each on its own, surer of both: but never surer than if one paid for all.
    let share = ((same.dose + other.dose) / extra.max(f64::MIN_POSITIVE)).clamp(0.0, 1.0);
    let best = same.confidence.max(other.confidence);
    let scale = (share / 0.8).min(1.0) / (same.share.max(other.share) / 0.8).clamp(1e-9, 1.0);
    same.confidence = (best * scale).min(1.0);
    same.dose += other.dose;
    same.share = share;
    same.evidence.extend(other.evidence);
}

/// How far beyond the usual it is: 0.5 at 2 deviations, 0.9 at 18.
fn lift(change: Change) -> f64 {
    let z = change.z().max(0.0);
    z / (z + 2.0)
}

/// How well it goes together with the symptom. What comes more than a second later is rather an effect.
fn timing(lead: Option<Lead>) -> f64 {
    let Some(lead) = lead else { return 0.7 };
    let late = lead.slots < -(SECOND as i32);
    (0.6 + 0.4 * lead.correlation.max(0.0)) * if late { 0.7 } else { 1.0 }
}

/// How much data there is: what is there of that metric and of the requests, and how long the baseline
/// has been gathered for.
fn data(scene: &Scene<'_>, metric: Metric, change: Change) -> f64 {
    let whole = scene.whole(metric).min(scene.whole(Metric::Requests));
    let values = f64::from(change.base.values);
    let requests = match scene.per {
        Per::Request => scene.view.requests(),
        Per::Second => 100.0,
    };
    whole * (values / (values + 3.0)) * (requests / (requests + 10.0))
}

/// What is wrong at a peer, or at the peer that it waits for.
fn root(scene: &Scene<'_>, peer: &Subject) -> Option<Root> {
    let (mut name, mut pod, _) = scene.peer(peer)?;
    for _ in 0..MAX_HOPS {
        let (kind, subject) = blamed(pod)?;
        let next = subject.as_ref().and_then(|s| s.workload.as_ref());
        let next = next.filter(|n| kind == CauseKind::SlowPeer && *n != name && *n != scene.name);
        match next.and_then(|n| scene.pods.get_key_value(n)).filter(|(_, p)| blamed(p).is_some()) {
            Some(further) => (name, pod) = further,
            None => return Some(Root { workload: Arc::clone(name), kind, subject }),
        }
    }
    None
}

/// What a pod's open incident blames.
fn blamed(pod: &Pod) -> Option<(CauseKind, Option<Subject>)> {
    let incident = pod.incident()?;
    let cause = incident.causes.first().filter(|_| incident.verdict == Verdict::Cause)?;
    Some((cause.kind, cause.subject.clone()))
}

/// Whether a pod's symptom is only that it has more to do: what was found beside pays for little.
pub(super) fn is_only_load(scene: &Scene<'_>, ranking: &Ranking) -> Option<(f64, f64)> {
    let more = detect::more_work(&Scene::recent(scene.view), Load::Felt)?;
    let paid = ranking.causes.first().filter(|_| ranking.verdict == Verdict::Cause);
    let paid = paid.filter(|c| c.share >= 0.4 && c.confidence >= 0.3);
    paid.is_none().then_some((more.base.median, more.now))
}

/// Whether a fall of the throughput has a reason: who has nothing to do waits for nothing.
pub(super) fn is_blocked(scene: &Scene<'_>) -> bool {
    const BLOCKS: [Metric; 4] =
        [Metric::RunQueue, Metric::LockWait, Metric::FileWait, Metric::Throttled];
    let blocked = |c: Change| c.is_lifted(6.0, 3.0) && c.extra() >= 100e6;
    let peers = scene.view.workload.subjects(Metric::Downstream);
    let waits = peers.filter_map(|p| scene.change(Metric::Downstream, Some(&p.name)));
    BLOCKS.into_iter().filter_map(|m| scene.change(m, None)).chain(waits).any(blocked)
}
