//! An incident in words: one sentence, then the evidence.

use std::fmt::Write as _;

use super::{
    incident::{
        Cause, CauseKind, End, Evidence, Incident, Layer, MoreWork, Symptom, SymptomKind, Verdict,
    },
    observe::{Kind, Metric, SECOND, Subject, Unit},
};

impl Layer {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Application => "application",
            Self::Platform => "platform",
            Self::Infrastructure => "infrastructure",
            Self::Network => "network",
            Self::Configuration => "configuration",
            Self::Downstream => "downstream",
        }
    }
}

impl MoreWork {
    /// What there is to say. `since` is how its start is to be written.
    #[must_use]
    pub fn sentence(&self, since: &str) -> String {
        let Self { workload, usual, now, .. } = self;
        format!(
            "{workload} has more work since {since}: {} requests/s instead of {}, each at the usual cost.",
            round(*now),
            round(*usual)
        )
    }
}

impl Incident {
    /// What happened and why. `since` is how its start is to be written, as 14:03:10.
    #[must_use]
    pub fn sentence(&self, since: &str) -> String {
        let mut text = self.symptom.phrase(&self.workload, self.end.is_some());
        let ended = self.end.map(|(_, end)| end);
        let _ = match ended {
            None => write!(text, " since {since}"),
            Some(_) => write!(text, " from {since} on"),
        };
        let cause = self.causes.first();
        match (self.verdict, cause) {
            (Verdict::Cause, Some(cause)) => {
                text.push_str(", because ");
                text.push_str(&cause.phrase(self.symptom.kind));
            }
            (Verdict::NotEnoughData, _) => text.push_str("; there is not enough data to say why"),
            _ => text.push_str("; nothing that is measured explains it"),
        }
        if self.lost >= 0.05 {
            let _ = write!(text, " ({} of the data is missing)", share(self.lost));
        }
        text.push_str(match ended {
            None => ".",
            Some(End::Over) => ". It is over.",
            Some(End::NewUsual) => ". It lasts for so long that it is the usual now.",
            Some(End::Unknown) => ". How it went on is unknown.",
        });
        text
    }

    /// The sentence, then each cause with its evidence, a line each.
    #[must_use]
    pub fn report(&self, since: &str) -> String {
        let mut text = self.sentence(since);
        for (rank, cause) in self.causes.iter().enumerate() {
            let _ = write!(
                text,
                "\n{}. {} ({}, confidence {:.2}, pays {})",
                rank + 1,
                short(cause.kind, cause.subject.as_ref(), &cause.evidence),
                cause.kind.layer().name(),
                cause.confidence,
                share(cause.share),
            );
            for evidence in &cause.evidence {
                let _ = write!(text, "\n   {}", evidence.line());
            }
        }
        text
    }
}

impl SymptomKind {
    /// It is a number of things, and no time that something pays for.
    pub(super) fn is_count(self) -> bool {
        matches!(
            self,
            Self::MajorFaults
                | Self::MinorFaults
                | Self::Retransmits
                | Self::Accepts
                | Self::Connections
        )
    }
}

impl Symptom {
    fn phrase(&self, workload: &str, over: bool) -> String {
        let (now, usual) = (if over { self.worst } else { self.now }, self.usual);
        let verb = |now: &'static str, then: &'static str| if over { then } else { now };
        let answers = |what| {
            let answers = verb("answers", "answered");
            format!("{workload} {answers} in {} instead of {} ({what})", time(now), time(usual))
        };
        let has = verb("has", "had");
        match self.kind {
            SymptomKind::ResponseP50 => answers("p50"),
            SymptomKind::ResponseP99 => answers("p99"),
            SymptomKind::ResponseMean => answers("mean"),
            SymptomKind::Throughput => {
                let answers = verb("answers", "answered");
                format!(
                    "{workload} {answers} {} requests/s instead of {}",
                    round(now),
                    round(usual)
                )
            }
            SymptomKind::CpuPerRequest => {
                let uses = verb("uses", "used");
                let (now, usual) = (time(now), time(usual));
                format!("{workload} {uses} {now} of CPU time for each request instead of {usual}")
            }
            SymptomKind::MajorFaults => {
                format!(
                    "{workload} {has} {} major faults/s instead of {}",
                    round(now),
                    round(usual)
                )
            }
            SymptomKind::Accepts | SymptomKind::Connections => {
                let accepts = self.kind == SymptomKind::Accepts;
                let verb =
                    if accepts { verb("accepts", "accepted") } else { verb("opens", "opened") };
                format!(
                    "{workload} {verb} {} connections/s instead of {}",
                    round(now),
                    round(usual)
                )
            }
            SymptomKind::MinorFaults => {
                let (now, usual) = (round(now), round(usual));
                format!("{workload} {has} {now} page faults for each request instead of {usual}")
            }
            SymptomKind::Retransmits => {
                let verb = verb("retransmits", "retransmitted");
                format!("{workload} {verb} {} segments/s instead of {}", round(now), round(usual))
            }
        }
    }
}

impl Cause {
    /// What comes after "because".
    fn phrase(&self, symptom: SymptomKind) -> String {
        let mut text = String::new();
        let payer = self.evidence.first();
        if let Some(payer) = payer.filter(|_| !symptom.is_count()) {
            let of = if symptom == SymptomKind::Throughput { "second" } else { "request" };
            let spent = spent(payer);
            let _ = write!(text, "{} more of each {of} are {spent}: ", time(self.dose));
        }
        text.push_str(&short(self.kind, self.subject.as_ref(), &self.evidence));
        if let Some(root) = &self.root {
            let why = short(root.kind, root.subject.as_ref(), &[]);
            let _ = write!(text, ", as at {} {why}", root.workload);
        }
        text
    }
}

/// Where the time goes.
fn spent(payer: &Evidence) -> String {
    match (payer.metric, &payer.subject) {
        (Metric::Downstream, Some(peer)) => format!("spent waiting for {peer}"),
        (Metric::Cpu, _) => "CPU time".to_owned(),
        (Metric::LockWait, _) => "spent waiting for locks".to_owned(),
        (Metric::FileWait, _) => "spent waiting for files".to_owned(),
        (Metric::Sleep, _) => "spent asleep".to_owned(),
        _ => "spent waiting for a CPU".to_owned(),
    }
}

/// The cause in a few words, with the number that shows it.
fn short(kind: CauseKind, subject: Option<&Subject>, evidence: &[Evidence]) -> String {
    let name = |none: &'static str| subject.map_or(none, |s| &s.name).to_owned();
    let figure = |metric: Metric| {
        let evidence = evidence.iter().find(|e| e.metric == metric);
        evidence.map_or_else(String::new, |e| format!(" ({})", e.figure()))
    };
    match kind {
        CauseKind::PathLoss => {
            format!(
                "packets on the path to {} are lost{}",
                name("a peer"),
                figure(Metric::Retransmits)
            )
        }
        CauseKind::PodLoss => {
            let of = subject.map_or_else(|| "its".to_owned(), |s| format!("{}'s", s.name));
            format!("packets on all of {of} paths are lost{}", figure(Metric::Retransmits))
        }
        CauseKind::PathDelay => {
            format!("{} itself answers as before, so the time passes on the path", name("the peer"))
        }
        CauseKind::CpuLimit => {
            let idle = evidence.iter().find(|e| e.metric == Metric::NodeIdle);
            let idle = idle.map_or_else(String::new, |e| {
                format!(" while {} of the node is idle", share(e.now))
            });
            format!("its CPU limit throttles it{idle}{}", figure(Metric::Throttled))
        }
        CauseKind::Throttled => {
            format!("its CPU limit throttles it on a busy node{}", figure(Metric::Throttled))
        }
        CauseKind::MemoryLimit => {
            format!("{} no longer fits into the memory limit{}", name("its data"), misses(evidence))
        }
        CauseKind::MemoryPressure => {
            format!(
                "the node is short of memory, and {} is read again{}",
                name("data"),
                misses(evidence)
            )
        }
        CauseKind::PageCache => {
            format!("{} is not in the page cache any more{}", name("data"), misses(evidence))
        }
        CauseKind::Storage => format!("storage takes longer to read or write {}", name("files")),
        CauseKind::Connections => {
            let (metric, who) = match subject {
                Some(peer) => (Metric::Accepts, format!("{} opens", peer.name)),
                None if evidence.iter().any(|e| e.metric == Metric::Accepts) => {
                    (Metric::Accepts, "others open".to_owned())
                }
                None => (Metric::Connections, "it opens".to_owned()),
            };
            format!("{who} connection after connection{}", figure(metric))
        }
        CauseKind::Allocation => {
            let who = name("it");
            format!("{who} gets new memory all the time{}", figure(Metric::MinorFaults))
        }
        CauseKind::Lock => {
            format!("threads wait for each other at {}{}", name("a lock"), figure(Metric::LockWait))
        }
        CauseKind::Code => {
            format!("{} costs more{}", name("its code"), figure(Metric::Function))
        }
        CauseKind::FanOut => {
            format!("it asks {} more often{}", name("a peer"), figure(Metric::Calls))
        }
        CauseKind::Sleep => "its threads sleep".to_owned(),
        CauseKind::Neighbour => {
            let cpu = evidence.iter().find(|e| e.metric == Metric::Cpu && e.workload.is_some());
            let cpu = cpu.map_or_else(String::new, |e| {
                format!(" ({:.2} CPUs, before {:.2})", e.now / 1e9, e.usual / 1e9)
            });
            format!("{} uses the CPU{cpu}", name("another pod"))
        }
        CauseKind::BusyNode => "the node has more to run than it has CPUs".to_owned(),
        CauseKind::SlowPeer => {
            format!("{} answers late{}", name("a peer"), figure(Metric::Response))
        }
    }
}

/// Which misses show that something is not in memory.
fn misses(evidence: &[Evidence]) -> String {
    let all = [Metric::CacheMisses, Metric::MajorFaults, Metric::Refaults];
    let found = all.into_iter().find_map(|m| evidence.iter().find(|e| e.metric == m));
    found.map_or_else(String::new, |e| format!(" ({})", e.figure()))
}

impl Evidence {
    /// What is counted, where the number alone does not say it.
    fn noun(&self) -> &'static str {
        match self.metric {
            Metric::Retransmits => " retransmits",
            Metric::Accepts | Metric::Connections => " connections",
            Metric::MinorFaults => " page faults",
            Metric::MajorFaults => " major faults",
            Metric::CacheMisses => " page-cache misses",
            Metric::Refaults => " refaults",
            Metric::Calls => " calls",
            _ => "",
        }
    }

    /// Now and before, for a sentence.
    fn figure(&self) -> String {
        let Self { now, usual, .. } = self;
        let of = match (self.metric.kind(), self.per_request) {
            (Kind::Level, _) => "",
            (Kind::Sum, true) => " a request",
            (Kind::Sum, false) => " a second",
        };
        format!("{}{}{of}, before {}", self.number(*now), self.noun(), self.number(*usual))
    }

    fn number(&self, value: f64) -> String {
        match self.metric.unit() {
            Unit::Time => time(value),
            Unit::Bytes => bytes(value),
            Unit::Share => share(value),
            Unit::Count => round(value),
        }
    }

    /// A number of it, with its unit.
    fn amount(&self, value: f64) -> String {
        let number = self.number(value);
        match (self.metric.kind(), self.per_request) {
            (Kind::Level, _) => number,
            (Kind::Sum, true) => format!("{number} a request"),
            (Kind::Sum, false) => format!("{number} a second"),
        }
    }

    /// All of it in a line.
    #[must_use]
    pub fn line(&self) -> String {
        let mut text = self.metric.name().to_owned();
        for (word, name) in [(" of ", &self.workload), (" by ", &self.subject)] {
            if let Some(name) = name {
                let _ = write!(text, "{word}{name}");
            }
        }
        let (now, usual) = (self.amount(self.now), self.amount(self.usual));
        let _ = write!(text, ": {now}, before {usual} (of {} values)", self.values);
        if let Some(lead) = self.lead {
            let seconds = f64::from(lead.slots.abs()) / SECOND as f64;
            let when = match lead.slots {
                0 => "at once".to_owned(),
                1.. => format!("{seconds} s before"),
                ..0 => format!("{seconds} s after"),
            };
            let _ = write!(text, "; goes with the symptom {when}, r = {:.2}", lead.correlation);
        }
        text
    }
}

/// Nanoseconds for people.
fn time(ns: f64) -> String {
    match ns {
        _ if ns.abs() < 0.5 => "0".to_owned(),
        _ if ns < 1e3 => format!("{} ns", round(ns)),
        _ if ns < 1e6 => format!("{} µs", round(ns / 1e3)),
        _ if ns < 1e9 => format!("{} ms", round(ns / 1e6)),
        _ => format!("{} s", round(ns / 1e9)),
    }
}

fn bytes(n: f64) -> String {
    match n {
        _ if n < 1024.0 => format!("{} B", round(n)),
        _ if n < 1_048_576.0 => format!("{} KiB", round(n / 1024.0)),
        _ if n < 1_073_741_824.0 => format!("{} MiB", round(n / 1_048_576.0)),
        _ => format!("{} GiB", round(n / 1_073_741_824.0)),
    }
}

fn share(part: f64) -> String {
    format!("{} %", round(part * 100.0))
}

/// Two digits that matter; whole numbers from 10 on.
fn round(value: f64) -> String {
    let value = if value.abs() < 0.05 { 0.0 } else { value };
    if value.abs() >= 10.0 || (value - value.round()).abs() < 0.05 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        let times = [0.0, 950.0, 1500.0, 12_340_000.0, 2e9, 61e9].map(time);
        assert_eq!(times, ["0", "950 ns", "1.5 µs", "12 ms", "2 s", "61 s"]);
        assert_eq!([0.01, 0.24, 9.97, 41.2].map(round), ["0", "0.2", "10", "41"]);
        assert_eq!([12.0, 3e6, 5e9].map(bytes), ["12 B", "2.9 MiB", "4.7 GiB"]);
    }
}
