//! Why something takes more time than usual: from a payer to a cause.
//!
//! Each function answers for one kind of payer. It asks the most direct witness first, and gives the
//! answer a strength: 1 where the cause itself was seen, less where it is what remains.

use super::{
    baseline::Change,
    detect::{Load, explains, more_work},
    incident::{CauseKind, Evidence},
    observe::{Metric, Name, SECOND, Subject},
    payers::Payer,
    scene::{Scene, evidence},
    workload::{Per, View},
};

/// A retransmission timeout is at least 200 ms (`TCP_RTO_MIN`, `include/net/tcp.h`): what a lost packet
/// costs at most, unless it is lost again.
const TIMEOUT_NS: f64 = 200e6;

/// A minor fault costs about a microsecond, most of it to clear the page.
const MINOR_FAULT_NS: f64 = 1000.0;

/// A connection costs both ends some 100 µs: handshake, socket, accept, and often a thread.
const CONNECTION_NS: f64 = 100e3;

/// A node that is idle for less has no CPU time to give.
const IDLE: f64 = 0.15;

/// A part of the extra that a witness must pay for, as both are estimates.
const PART: f64 = 0.25;

/// An answer.
#[derive(Clone, Debug)]
pub(super) struct Guess {
    pub(super) kind: CauseKind,
    pub(super) subject: Option<Subject>,
    /// How directly it was seen, 0 to 1.
    pub(super) strength: f64,
    pub(super) evidence: Vec<Evidence>,
}

impl Guess {
    fn new(kind: CauseKind, subject: Option<Subject>, strength: f64) -> Self {
        Self { kind, subject, strength, evidence: Vec::new() }
    }

    fn with(mut self, evidence: Evidence) -> Self {
        self.evidence.push(evidence);
        self
    }
}

/// Why this payer pays. `None` if it is only because there is more to do.
pub(super) fn why(scene: &Scene<'_>, payer: &Payer) -> Option<Guess> {
    match (payer.metric, &payer.subject) {
        (Metric::Downstream, Some(peer)) => {
            let guess = peer_is_slow(scene, peer, payer.change);
            (guess.kind != CauseKind::SlowPeer || !is_crowded(scene, peer)).then_some(guess)
        }
        (Metric::RunQueue | Metric::Throttled, _) => no_cpu(scene, payer.change),
        (Metric::LockWait, _) => lock(scene, payer.change),
        (Metric::FileWait, _) => Some(files(scene)),
        (Metric::Sleep, _) => Some(Guess::new(CauseKind::Sleep, None, 0.8)),
        _ => Some(cpu(scene, payer.change)),
    }
}

/// The pod uses more CPU time.
pub(super) fn cpu(scene: &Scene<'_>, extra: Change) -> Guess {
    if let Some(storm) = connections(scene, extra.extra()) {
        return storm;
    }
    if let Some(faults) = scene.lifted(Metric::MinorFaults, 1.8)
        && faults.extra() * MINOR_FAULT_NS >= PART * extra.extra()
    {
        return allocation(scene, faults);
    }
    match function(scene) {
        Some((subject, change)) => {
            let strength = (change.extra() / extra.extra()).clamp(0.3, 1.0);
            let evidence = scene.evidence(Metric::Function, Some(&subject.name), change);
            Guess::new(CauseKind::Code, Some(subject), strength).with(evidence)
        }
        None => Guess::new(CauseKind::Code, None, 0.6),
    }
}

/// Memory is allocated again and again.
pub(super) fn allocation(scene: &Scene<'_>, faults: Change) -> Guess {
    let subject = scene.grown(Metric::MinorFaults).map(|(s, _)| s);
    let evidence = scene.evidence(Metric::MinorFaults, subject.as_ref().map(|s| &s.name), faults);
    Guess::new(CauseKind::Allocation, subject, 1.0).with(evidence)
}

/// Connections are opened by or to the pod, many more than before, and can pay for this much.
pub(super) fn connections(scene: &Scene<'_>, extra: f64) -> Option<Guess> {
    let rate = |metric| {
        let change = scene.view.change(metric, None, Per::Second)?;
        (change.is_lifted(5.0, 3.0) && change.extra() >= 20.0).then_some((metric, change))
    };
    let storms = [rate(Metric::Accepts), rate(Metric::Connections)].into_iter().flatten();
    let (metric, change) = storms.max_by(|a, b| a.1.extra().total_cmp(&b.1.extra()))?;
    let paid = change.extra() * CONNECTION_NS;
    let needed = match scene.per {
        Per::Second => extra,
        Per::Request => extra * scene.view.now(Metric::Requests, None, Per::Second)?,
    };
    if paid < PART * needed {
        return None;
    }
    // Who opens them is to blame: the peer, or the pod itself.
    let subject = scene.grown(metric).map(|(s, _)| s).filter(|_| metric == Metric::Accepts);
    let evidence = evidence(metric, None, subject.as_ref().map(|s| &s.name), change, false);
    Some(Guess::new(CauseKind::Connections, subject, 1.0).with(evidence))
}

/// The function that costs more: the innermost of those that the extra time passes through.
fn function(scene: &Scene<'_>) -> Option<(Subject, Change)> {
    let (_, most) = scene.grown(Metric::Function)?;
    let subjects = scene.view.workload.subjects(Metric::Function);
    let changes =
        subjects.filter_map(|s| Some((s, scene.change(Metric::Function, Some(&s.name))?)));
    // Shares of samples are noisy: who has most of it has all of it.
    let through = changes.filter(|(_, c)| c.extra() >= 0.65 * most.extra());
    let inner = through.min_by(|a, b| a.1.now.total_cmp(&b.1.now))?;
    Some((inner.0.clone(), inner.1))
}

/// The pod's threads wait for a CPU.
fn no_cpu(scene: &Scene<'_>, wait: Change) -> Option<Guess> {
    let cost = scene.change(Metric::Cpu, None);
    let dearer = cost.filter(|c| {
        scene.per == Per::Request && c.is_lifted(4.0, 1.4) && c.extra() >= 0.1 * wait.extra()
    });
    let throttled = scene.change(Metric::Throttled, None);
    let throttled = throttled.filter(|t| t.z() >= 3.0 && t.extra() >= PART * wait.extra());
    let idle = scene.other(scene.node).now(Metric::NodeIdle, None, Per::Second);
    if let Some(dearer) = dearer {
        // It waits because it needs more than before: that is the code's fault, limit or not.
        let mut guess = cpu(scene, dearer);
        guess.strength *= 0.9;
        guess.evidence.push(scene.evidence(Metric::RunQueue, None, wait));
        return Some(guess);
    }
    if let Some(throttled) = throttled {
        let given = idle.is_none_or(|idle| idle >= IDLE);
        let kind = if given { CauseKind::CpuLimit } else { CauseKind::Throttled };
        let mut guess = Guess::new(kind, None, if idle.is_some() { 1.0 } else { 0.7 })
            .with(scene.evidence(Metric::Throttled, None, throttled));
        guess.evidence.extend(node(scene, Metric::NodeIdle));
        return Some(guess);
    }
    if let Some(storm) = connections(scene, wait.extra()) {
        return Some(storm);
    }
    let own = scene.view.change(Metric::Cpu, None, Per::Second);
    let own = own.filter(|c| c.z() >= 4.0).map_or(0.0, |c| c.extra());
    if let Some((name, change, view)) = neighbour(scene).filter(|(_, c, _)| c.extra() > own) {
        let lead = scene.neighbour_lead(&view);
        let strength = 0.6 + 0.4 * lead.map_or(0.0, |l| l.correlation.max(0.0));
        let mut evidence = evidence(Metric::Cpu, Some(name), None, change, false);
        evidence.lead = lead;
        let subject = Subject::local(name, name);
        return Some(Guess::new(CauseKind::Neighbour, Some(subject), strength).with(evidence));
    }
    if explains(more_work(&Scene::recent(scene.view), Load::Felt), wait) {
        return None;
    }
    let mut guess = Guess::new(CauseKind::BusyNode, None, 0.5);
    guess.evidence.extend(node(scene, Metric::NodeIdle));
    guess.evidence.extend(node(scene, Metric::NodeRunnable));
    Some(guess)
}

/// The other pod whose use of the CPU grew most.
fn neighbour<'a>(scene: &Scene<'a>) -> Option<(&'a Name, Change, View<'a>)> {
    /// Nanoseconds a second: a twentieth of a CPU.
    const MIN_EXTRA: f64 = 50e6;
    // Who has more work at the same time as this pod, which is most of why it needs more, shares its fate.
    let more = more_work(&Scene::recent(scene.view), Load::Felt).is_some();
    let others = scene.pods.iter().filter(|(name, _)| *name != scene.name);
    let grown = others.filter_map(|(name, pod)| {
        let view = scene.other(&pod.workload);
        let change = view.change(Metric::Cpu, None, Per::Second)?;
        let requests = Scene::recent(view).change(Metric::Requests, None, Per::Second);
        let fate =
            requests.is_some_and(|r| r.is_lifted(2.5, 1.2) && r.ratio() >= 0.6 * change.ratio());
        if more && fate {
            return None;
        }
        (change.is_lifted(4.0, 1.3) && change.extra() >= MIN_EXTRA).then_some((name, change, view))
    });
    grown.max_by(|a, b| a.1.extra().total_cmp(&b.1.extra()))
}

/// How a level of the node is now.
fn node(scene: &Scene<'_>, metric: Metric) -> Option<Evidence> {
    let change = scene.other(scene.node).change(metric, None, Per::Second)?;
    Some(evidence(metric, None, None, change, false))
}

/// The pod's threads wait for locks.
fn lock(scene: &Scene<'_>, wait: Change) -> Option<Guess> {
    if explains(more_work(&Scene::recent(scene.view), Load::Felt), wait) {
        // More threads at once wait longer for each other.
        return None;
    }
    // Who holds a lock and does not get a CPU keeps the others waiting: then the lock is not the cause.
    let no_cpu = scene.change(Metric::RunQueue, None);
    let held_up = no_cpu.is_some_and(|c| c.z() >= 4.0 && c.extra() >= PART * wait.extra());
    let (subject, change) = match scene.grown(Metric::LockWait) {
        Some((subject, change)) => (Some(subject), change),
        None => (None, wait),
    };
    let evidence = scene.evidence(Metric::LockWait, subject.as_ref().map(|s| &s.name), change);
    let strength = if held_up { 0.5 } else { 1.0 };
    Some(Guess::new(CauseKind::Lock, subject, strength).with(evidence))
}

/// The pod's threads wait for files.
pub(super) fn files(scene: &Scene<'_>) -> Guess {
    const MISSES: [Metric; 3] = [Metric::CacheMisses, Metric::MajorFaults, Metric::Refaults];
    let file = [Metric::FileWait, Metric::CacheMisses, Metric::MajorFaults];
    let subject = file.into_iter().find_map(|m| scene.grown(m)).map(|(s, _)| s);
    let misses = MISSES.into_iter().find_map(|m| Some((m, scene.lifted(m, 1.8)?)));
    let level = |metric| scene.view.now(metric, None, Per::Second);
    let Some((metric, change)) = misses else {
        let guess = Guess::new(CauseKind::Storage, subject, 0.8);
        return match scene.lifted(Metric::IoPressure, 1.3) {
            Some(io) => guess.with(scene.evidence(Metric::IoPressure, None, io)),
            None => guess,
        };
    };
    let missed = scene.evidence(metric, None, change);
    let full = level(Metric::MemoryUsed).zip(level(Metric::MemoryLimit));
    let full = full.is_some_and(|(used, limit)| used >= 0.85 * limit);
    let events = scene.view.change(Metric::MemoryEvents, None, Per::Second);
    let events = events.is_some_and(|c| c.is_lifted(4.0, 2.0));
    if full || events {
        let mut guess = Guess::new(CauseKind::MemoryLimit, subject, 1.0).with(missed);
        for metric in [Metric::MemoryUsed, Metric::MemoryLimit, Metric::Refaults] {
            let change = scene.change(metric, None);
            guess.evidence.extend(change.map(|c| scene.evidence(metric, None, c)));
        }
        return guess;
    }
    let free = scene.other(scene.node).now(Metric::NodeFree, None, Per::Second);
    let pressed = scene.lifted(Metric::MemoryPressure, 1.3).filter(|p| p.now >= 0.05);
    if free.is_some_and(|free| free < 0.1) || pressed.is_some() {
        let mut guess = Guess::new(CauseKind::MemoryPressure, subject, 0.9).with(missed);
        guess.evidence.extend(node(scene, Metric::NodeFree));
        return guess;
    }
    Guess::new(CauseKind::PageCache, subject, 0.7).with(missed)
}

/// The pod waits for a peer.
fn peer_is_slow(scene: &Scene<'_>, peer: &Subject, wait: Change) -> Guess {
    let calls = scene.change(Metric::Calls, Some(&peer.name));
    if let Some(calls) = calls.filter(|c| c.is_lifted(4.0, 1.5) && c.extra() > 0.5) {
        // As many calls as before would have cost the usual: the others are what is too much.
        let each = wait.base.median / calls.base.median.max(calls.sigma);
        if each * calls.extra() >= 0.5 * wait.extra() {
            let evidence = scene.evidence(Metric::Calls, Some(&peer.name), calls);
            return Guess::new(CauseKind::FanOut, Some(peer.clone()), 1.0).with(evidence);
        }
    }
    let late = answers_late(scene, peer, calls.map_or(1.0, |c| c.now), wait);
    // The peer's own time cannot be the path's, so what it takes longer is looked at first.
    if let Some(guess) = late.clone().filter(|g| g.strength >= 0.9) {
        return guess;
    }
    if let Some(guess) = loss(scene, peer, Some(wait)) {
        return guess;
    }
    late.unwrap_or_else(|| match scene.peer(peer) {
        // It runs here, was watched, and is as usual.
        Some(_) => Guess::new(CauseKind::PathDelay, Some(peer.clone()), 0.5),
        None => Guess::new(CauseKind::SlowPeer, Some(peer.clone()), 0.7),
    })
}

/// The peer runs on this node, and takes longer to answer.
fn answers_late(scene: &Scene<'_>, peer: &Subject, calls: f64, wait: Change) -> Option<Guess> {
    let (name, pod, view) = scene.peer(peer)?;
    let change = view.change(Metric::Response, None, Per::Request);
    let found = change.filter(|c| c.z() >= 3.0);
    let paid = found.map_or(0.0, |c| c.extra() * calls);
    let strength = if paid >= 0.5 * wait.extra() {
        1.0
    } else if found.is_some() && pod.has_incident() && paid >= PART * wait.extra() {
        0.9
    } else if pod.has_incident() || is_starved(&view) {
        // What waits in its sockets to be read is not in its response time.
        0.6
    } else {
        return None;
    };
    let guess = Guess::new(CauseKind::SlowPeer, Some(peer.clone()), strength);
    Some(match change {
        Some(change) => guess.with(evidence(Metric::Response, Some(name), None, change, true)),
        None => guess,
    })
}

/// Both the pod and the peer only have more work than usual.
fn is_crowded(scene: &Scene<'_>, peer: &Subject) -> bool {
    let peer = scene.peer(peer).filter(|(_, pod, _)| !pod.has_incident());
    peer.is_some_and(|(_, _, view)| more_work(&Scene::recent(view), Load::Felt).is_some())
        && more_work(&Scene::recent(scene.view), Load::Felt).is_some()
}

/// It does not get the CPU time that it needs.
fn is_starved(view: &View<'_>) -> bool {
    let lifted = |metric| {
        view.change(metric, None, Per::Second)
            .is_some_and(|c| c.is_lifted(5.0, 2.0) && c.now >= 50e6)
    };
    lifted(Metric::RunQueue) || lifted(Metric::Throttled)
}

/// Packets between the pod and a peer are lost, enough to pay for the wait.
pub(super) fn loss(scene: &Scene<'_>, peer: &Subject, wait: Option<Change>) -> Option<Guess> {
    let (extra, seen) = lost(scene, scene.name, &scene.view, peer)?;
    let needed = match (wait, scene.per) {
        (None, _) => 0.0,
        (Some(wait), Per::Second) => wait.extra(),
        (Some(wait), Per::Request) => {
            wait.extra() * scene.view.now(Metric::Requests, None, Per::Second)?
        }
    };
    if extra * TIMEOUT_NS < PART * needed {
        return None;
    }
    let there = scene.peer(peer);
    let (kind, subject) = if all_paths(scene, scene.name, &scene.view) {
        (CauseKind::PodLoss, None)
    } else if let Some((name, _, _)) = there.filter(|(name, _, view)| all_paths(scene, name, view))
    {
        (CauseKind::PodLoss, Some(Subject::local(&peer.name, name)))
    } else {
        (CauseKind::PathLoss, Some(peer.clone()))
    };
    Some(Guess { kind, subject, strength: 1.0, evidence: seen })
}

/// By how many retransmits a second a pod and its peer, as far as that runs here, send more than before
/// to each other, if that is no chance.
fn lost(
    scene: &Scene<'_>,
    name: &Name,
    view: &View<'_>,
    peer: &Subject,
) -> Option<(f64, Vec<Evidence>)> {
    /// So many are no chance, and so many times the mean before.
    const COUNT: f64 = 3.0;
    const TIMES: f64 = 3.0;
    let seconds = view.inside.len() as f64 / SECOND as f64;
    let (mut now, mut before, mut seen) = (0.0, 0.0, Vec::new());
    let mut add = |by: Option<&Name>, view: &View<'_>, to: &Name| {
        let rate = view.now(Metric::Retransmits, Some(to), Per::Second)?;
        let (mean, known) = view.workload.rarity(Metric::Retransmits, to, view.until)?;
        now += rate;
        // Where there was none, there may have been one just before.
        before += mean.max(1.0 / known);
        let change = view.change(Metric::Retransmits, Some(to), Per::Second)?;
        if rate * seconds >= 1.0 {
            seen.push(evidence(Metric::Retransmits, by, Some(to), change, false));
        }
        Some(())
    };
    add((name != scene.name).then_some(name), view, &peer.name);
    let there = peer.workload.as_ref().filter(|there| *there != name);
    if let Some((there, pod)) = there.and_then(|there| scene.pods.get_key_value(there)) {
        let view = scene.other(&pod.workload);
        let of_us = |s: &&Subject| s.workload.as_ref() == Some(name);
        for us in view.workload.subjects(Metric::Retransmits).filter(of_us) {
            add(Some(there), &view, &us.name);
        }
    }
    let extra = now - before;
    let more = now >= TIMES * before && extra * seconds >= COUNT;
    (more && !seen.is_empty()).then_some((extra, seen))
}

/// Packets are lost between a pod and most of its peers, of which there are several.
fn all_paths(scene: &Scene<'_>, name: &Name, view: &View<'_>) -> bool {
    let known = |metric| view.workload.subjects(metric);
    let mut peers: Vec<&Subject> = known(Metric::Retransmits).chain(known(Metric::Calls)).collect();
    // A peer that calls and is called is one.
    let of = |s: &&Subject| s.workload.clone().unwrap_or_else(|| s.name.clone());
    peers.sort_by_key(of);
    let peers: Vec<_> = peers.chunk_by(|a, b| of(a) == of(b)).collect();
    let is_lossy = |same: &&&[&Subject]| same.iter().any(|p| lost(scene, name, view, p).is_some());
    let lossy = peers.iter().filter(is_lossy).count();
    lossy >= 2 && lossy * 10 >= peers.len() * 6
}

const _: () = assert!(SECOND == 10, "rates are for a second");
