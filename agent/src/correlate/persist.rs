//! Baselines as bytes, so that an agent that restarts knows at once what is usual.
//!
//! JSON, which people can read. Not for the file: see [`crate::baselines`]. What is read is not
//! trusted: each bound that holds in memory is checked.
//!
//! One baseline a series for now. A week has seasons, and a later version may keep one for each hour of
//! it: a field of [`Entry`], absent today, would say which.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    baseline::Baseline,
    observe::{Metric, Name},
    series::QUANTILES,
    workload::Per,
};

/// The version that is written, and the only one that is read.
const VERSION: u32 = 1;

/// Most bytes that are read: what [`super::MAX_WORKLOADS`] with 80 series each need.
pub const MAX_BYTES: usize = 8 << 20;

/// Most series of a workload that are remembered. Each costs about 150 bytes.
pub(super) const MAX_ENTRIES: usize = 192;

/// Why bytes are not baselines.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There are more than anyone writes.
    #[error("baselines have {0} bytes, more than {MAX_BYTES}")]
    TooLong(usize),
    /// They are not JSON, or of another shape.
    #[error("baselines cannot be read: {0}")]
    Shape(#[from] serde_json::Error),
    /// Another version wrote them.
    #[error("baselines are of version {0}, this agent reads {VERSION}")]
    Version(u32),
    /// A number or an amount that cannot be.
    #[error("baselines of {workload:?} are out of bounds: {what}")]
    Bounds {
        /// The workload.
        workload: String,
        /// What is wrong.
        what: &'static str,
    },
}

/// What is usual for every workload.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Baselines {
    /// When they were taken, in seconds since 1970. Whoever reads them decides what is too old.
    pub taken_unix_s: u64,
    pub(super) workloads: BTreeMap<Name, Remembered>,
}

/// What is usual for one workload.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Remembered {
    pub(super) entries: BTreeMap<(Metric, Option<Name>), Entry>,
    pub(super) quantiles: [Option<Baseline>; QUANTILES.len()],
}

/// What is usual in one series.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) second: Option<Baseline>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) request: Option<Baseline>,
}

impl Remembered {
    pub(super) const ENTRY_BYTES: usize = size_of::<((Metric, Option<Name>), Entry)>() + 64;

    pub(super) fn get(&self, metric: Metric, subject: Option<&str>, per: Per) -> Option<Baseline> {
        if self.entries.is_empty() {
            return None;
        }
        let entry = self.entries.get(&(metric, subject.map(Name::from)))?;
        match per {
            Per::Second => entry.second,
            Per::Request => entry.request,
        }
    }

    pub(super) fn quantile(&self, index: usize) -> Option<Baseline> {
        self.quantiles.get(index).copied().flatten()
    }

    fn check(&self) -> Result<(), &'static str> {
        let entries = self.entries.values().flat_map(|e| [e.second, e.request]);
        if self.entries.len() > MAX_ENTRIES {
            Err("more series than a workload has")
        } else if !entries.chain(self.quantiles).flatten().all(|b| b.is_sane()) {
            Err("a baseline is no number")
        } else {
            Ok(())
        }
    }
}

#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    taken_unix_s: u64,
    workloads: BTreeMap<String, Vec<Line>>,
}

#[derive(Serialize, Deserialize)]
struct Line {
    metric: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subject: Option<String>,
    #[serde(flatten)]
    entry: Entry,
}

/// Names of the lines that hold quantiles of the response time.
const QUANTILE_NAMES: [&str; QUANTILES.len()] = ["response_time_p50", "response_time_p99"];

/// To bytes.
///
/// # Errors
/// Never for baselines that this module made.
pub fn encode(baselines: &Baselines) -> Result<Vec<u8>, Error> {
    let lines = |r: &Remembered| {
        let quantiles = QUANTILE_NAMES.iter().zip(r.quantiles).filter_map(|(name, baseline)| {
            let entry = Entry { second: Some(baseline?), request: None };
            Some(Line { metric: (*name).to_owned(), subject: None, entry })
        });
        let entries = r.entries.iter().map(|((metric, subject), entry)| Line {
            metric: metric.name().to_owned(),
            subject: subject.as_deref().map(str::to_owned),
            entry: *entry,
        });
        quantiles.chain(entries).collect()
    };
    let workloads = baselines.workloads.iter().map(|(n, r)| (n.to_string(), lines(r))).collect();
    let file = File { version: VERSION, taken_unix_s: baselines.taken_unix_s, workloads };
    Ok(serde_json::to_vec(&file)?)
}

/// From bytes.
///
/// # Errors
/// What is too long, of another version, no JSON of this shape, or has numbers that cannot be.
pub fn decode(bytes: &[u8]) -> Result<Baselines, Error> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    if bytes.len() > MAX_BYTES {
        return Err(Error::TooLong(bytes.len()));
    }
    let Version { version } = serde_json::from_slice(bytes)?;
    if version != VERSION {
        return Err(Error::Version(version));
    }
    let file: File = serde_json::from_slice(bytes)?;
    let mut baselines = Baselines { taken_unix_s: file.taken_unix_s, ..Baselines::default() };
    for (name, lines) in file.workloads.into_iter().take(super::MAX_WORKLOADS) {
        let mut of = Remembered::default();
        for Line { metric, subject, entry } in lines {
            if let Some(index) = QUANTILE_NAMES.iter().position(|n| *n == metric) {
                of.quantiles[index] = entry.second;
            } else if let Some(metric) = Metric::ALL.iter().find(|m| m.name() == metric) {
                of.entries.insert((*metric, subject.map(Name::from)), entry);
            }
            // A metric that this agent does not have is of no use to it.
        }
        if let Err(what) = of.check() {
            return Err(Error::Bounds { workload: name, what });
        }
        baselines.workloads.insert(name.into(), of);
    }
    Ok(baselines)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

    use proptest::prelude::*;

    use super::*;

    fn some() -> Baselines {
        let baseline = Baseline { median: 12.5, mad: 0.5, values: 99 };
        let mut of = Remembered { quantiles: [Some(baseline), None], ..Remembered::default() };
        let entry = Entry { second: Some(baseline), request: None };
        of.entries.insert((Metric::Cpu, None), entry);
        of.entries.insert((Metric::Downstream, Some("a:1 \"".into())), entry);
        Baselines { taken_unix_s: 7, workloads: [("shop/a".into(), of)].into() }
    }

    #[test]
    fn there_and_back() {
        assert_eq!(decode(&encode(&some()).unwrap()).unwrap(), some());
    }

    #[test]
    fn what_is_cut_off_is_an_error() {
        let bytes = encode(&some()).unwrap();
        for end in 0..bytes.len() {
            assert!(decode(&bytes[..end]).is_err(), "{end}");
        }
    }

    #[test]
    fn bad_baselines_are_refused_with_the_reason() {
        let error = |text: &str| decode(text.as_bytes()).unwrap_err().to_string();
        let line = |b: &str| {
            format!(
                r#"{{"version":1,"taken_unix_s":0,"workloads":{{"w":[{{"metric":"cpu","second":{b}}}]}}}}"#
            )
        };
        assert!(error(r#"{"version":2,"new":0}"#).contains("version 2"));
        assert!(error(&line(r#"{"median":1,"mad":-1,"values":3}"#)).contains("\"w\""));
        assert!(error(&line(r#"{"median":1,"mad":1,"values":0}"#)).contains("no number"));
        assert!(error(&line(r#"{"median":1e999,"mad":1,"values":1}"#)).contains("cannot be read"));
        assert!(error(&"[".repeat(100_000)).contains("cannot be read"));
        assert!(error(&" ".repeat(MAX_BYTES + 1)).contains("more than"));
    }

    #[test]
    fn series_without_end_are_refused() {
        let lines = (0..=MAX_ENTRIES).map(|i| format!(r#"{{"metric":"calls","subject":"{i}"}}"#));
        let lines = lines.collect::<Vec<_>>().join(",");
        let text = format!(r#"{{"version":1,"taken_unix_s":0,"workloads":{{"w":[{lines}]}}}}"#);
        assert!(decode(text.as_bytes()).unwrap_err().to_string().contains("more series"));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(at in 0usize..400, byte: u8, bytes: Vec<u8>) {
            let mut good = encode(&some()).unwrap();
            let at = at % good.len();
            good[at] = byte;
            let _ = (decode(&good), decode(&bytes));
        }
    }
}
