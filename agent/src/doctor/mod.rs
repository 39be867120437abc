//! What this kernel and these privileges allow, signal by signal, with the remedy for what is
//! missing.
//!
//! Not for acting on it: the agent probes what it attaches by itself. [`Facts::gather`] looks and
//! changes nothing; [`report`] judges and touches nothing.

mod checks;
mod facts;
mod text;

use serde::Serialize;

pub use self::{
    facts::{Facts, Lockdown, Version},
    text::render,
};
use crate::profile::Signal;

/// How well something works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should.
    Ok,
    /// With less, as the finding says.
    Degraded,
    /// Not at all.
    Missing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What: a feature, a capability, a setting.
    pub subject: String,
    /// How well it works.
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What degrades, empty if nothing does.
    pub effect: String,
    /// What to do about it, empty if there is nothing to do.
    pub remedy: String,
    /// Names of the signals that suffer, as users type them.
    pub signals: Vec<&'static str>,
}

/// What becomes of one signal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SignalStatus {
    /// Its name, as users type it.
    pub signal: &'static str,
    /// As bad as the worst finding that concerns it.
    pub status: Status,
    /// Subjects of the findings that make it so, the worst ones only.
    pub because: Vec<String>,
}

/// The whole answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Release of the kernel.
    pub kernel: String,
    /// Every signal.
    pub signals: Vec<SignalStatus>,
    /// Everything that was looked at, in the order in which it matters.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Names of the signals that cannot be had at all.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        let missing = self.signals.iter().filter(|signal| signal.status == Status::Missing);
        missing.map(|signal| signal.signal).collect()
    }
}

/// Judges.
#[must_use]
pub fn report(facts: &Facts) -> Report {
    let findings = checks::all(facts);
    let signals = Signal::ALL.map(|signal| judge(signal.name(), &findings)).into();
    Report { kernel: facts.release.clone(), signals, findings }
}

fn judge(signal: &'static str, findings: &[Finding]) -> SignalStatus {
    let concerns = |finding: &&Finding| finding.signals.contains(&signal);
    let status = findings.iter().filter(concerns).map(|f| f.status).max().unwrap_or(Status::Ok);
    let worst = |f: &&Finding| f.status == status && status != Status::Ok;
    let because = findings.iter().filter(concerns).filter(worst).map(|f| f.subject.clone());
    SignalStatus { signal, status, because: because.collect() }
}

#[cfg(test)]
mod tests;
