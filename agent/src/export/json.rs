//! One JSON document for scripts, with all that a profile holds and no table to look up.
//!
//! Stable: fields may be added, none is removed or changes its meaning while `version` is 1.
//!
//! ```json
//! {"version":1, "signal":"cpu", "unit":"nanoseconds",
//!  "start_unix_ns":0, "start_monotonic_ns":0, "duration_ns":0,
//!  "total":{"count":0,"weight":0}, "lost":0,
//!  "samples":[{"workload":{"kind":"pod","name":"","namespace":"","pod":"","pod_uid":"",
//!              "container_id":"","unit":"","cgroup_path":"","unattributed":""},
//!              "pid":0, "comm":"", "count":0, "weight":0,
//!              "stack":[{"name":"","module":"","build_id":"","file":"","line":0,"offset":0,
//!                        "kind":"user","inlined":false}]}]}
//! ```
//!
//! A workload has these fields too, as far as they are known: `container`, `container_kind`, `image`,
//! `restarts`, `owner_kind`, `owner_name`, `labels`, `qos_class`, `node`, `source`, `confidence`.
//!
//! `stack` has the outermost frame first. `weight` is in `unit`, `count` in events, `lost` in events.
//! `kind` of a workload is `pod`, `container`, `unit`, `process`, `kernel` or `unattributed`; of a
//! frame `user`, `kernel` or `annotation`. Unknown text is empty, an unknown `line`, `pid` or
//! `start_unix_ns` 0. `offset` is in the file `module`, and not 0 only where no function is known.
//! An `inlined` frame has no code of its own, but is part of the frame before it.

use std::io;

use serde::{Serialize, Serializer};
use serde_json::ser::{CharEscape, CompactFormatter, Formatter};

use super::{Options, sorted, workload::WorkloadDetails};
use crate::{
    fold::is_unprintable,
    profile::{Dictionary, FrameId, FrameKind, Profile, Sample, Workload, WorkloadKind},
};

#[derive(Serialize)]
struct Document<'a> {
    version: u32,
    signal: &'static str,
    unit: &'static str,
    start_unix_ns: i64,
    start_monotonic_ns: u64,
    duration_ns: u64,
    total: Total,
    lost: u64,
    samples: Samples<'a>,
}

#[derive(Serialize)]
struct Total {
    count: u64,
    weight: u64,
}

/// Serialized one by one, so that the rows are never in memory all at once.
struct Samples<'a>(&'a Profile);

#[derive(Serialize)]
struct SampleRow<'a> {
    workload: WorkloadRow<'a>,
    pid: u32,
    comm: &'a str,
    count: u64,
    weight: u64,
    stack: Vec<FrameRow<'a>>,
}

#[derive(Serialize)]
struct WorkloadRow<'a> {
    kind: &'static str,
    name: &'a str,
    namespace: &'a str,
    pod: &'a str,
    pod_uid: &'a str,
    container_id: &'a str,
    unit: &'a str,
    cgroup_path: &'a str,
    unattributed: &'a str,
    #[serde(flatten)]
    details: Option<WorkloadDetails<'a>>,
}

#[derive(Serialize)]
struct FrameRow<'a> {
    name: &'a str,
    module: &'a str,
    build_id: &'a str,
    file: &'a str,
    line: u32,
    offset: u64,
    kind: &'static str,
    inlined: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    by_frame_pointer: bool,
}

/// The document of a profile, ended by a newline.
///
/// # Errors
/// When serde_json fails.
pub fn render(profile: &Profile, options: &Options) -> io::Result<Vec<u8>> {
    let sum =
        |part: fn(&Sample) -> u64| profile.samples.iter().map(part).fold(0, u64::saturating_add);
    let document = Document {
        version: 1,
        signal: profile.signal.name(),
        unit: profile.signal.unit(),
        start_unix_ns: options.start_unix_ns,
        start_monotonic_ns: profile.start.0,
        duration_ns: profile.end.0.saturating_sub(profile.start.0),
        total: Total { count: sum(|s| s.count), weight: sum(|s| s.weight) },
        lost: profile.lost,
        samples: Samples(profile),
    };
    let mut out = Vec::new();
    document.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Printable))?;
    out.push(b'\n');
    Ok(out)
}

impl Serialize for Samples<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let dictionary = &*self.0.dictionary;
        serializer.collect_seq(sorted(self.0).into_iter().map(|s| sample(dictionary, s)))
    }
}

fn sample<'a>(dictionary: &'a Dictionary, sample: &Sample) -> SampleRow<'a> {
    SampleRow {
        workload: workload(dictionary.workload(sample.workload).map(|w| &**w)),
        pid: sample.pid,
        comm: dictionary.string(sample.comm),
        count: sample.count,
        weight: sample.weight,
        stack: dictionary.stack(sample.stack).iter().rev().map(|f| frame(dictionary, *f)).collect(),
    }
}

fn workload(workload: Option<&Workload>) -> WorkloadRow<'_> {
    fn text(workload: Option<&Workload>, field: fn(&Workload) -> &String) -> &str {
        workload.map_or("", |w| field(w))
    }
    WorkloadRow {
        kind: workload.map_or(WorkloadKind::Unattributed, |w| w.kind).name(),
        name: text(workload, |w| &w.name),
        namespace: text(workload, |w| &w.namespace),
        pod: text(workload, |w| &w.pod),
        pod_uid: text(workload, |w| &w.pod_uid),
        container_id: text(workload, |w| &w.container_id),
        unit: text(workload, |w| &w.unit),
        cgroup_path: text(workload, |w| &w.cgroup_path),
        unattributed: text(workload, |w| &w.unattributed),
        details: workload.map(WorkloadDetails::new),
    }
}

fn frame(dictionary: &Dictionary, id: FrameId) -> FrameRow<'_> {
    let found = dictionary.frame(id);
    let mapping = found.and_then(|(_, f)| dictionary.all.mappings.get(f.mapping.0 as usize));
    FrameRow {
        name: found.map_or("", |(_, function)| dictionary.string(function.name)),
        module: mapping.map_or("", |m| dictionary.string(m.path)),
        build_id: mapping.map_or("", |m| dictionary.string(m.build_id)),
        file: found.map_or("", |(_, function)| dictionary.string(function.file)),
        line: found.map_or(0, |(frame, _)| frame.line),
        offset: found.map_or(0, |(frame, _)| frame.offset),
        kind: match found.map(|(frame, _)| frame.kind) {
            Some(FrameKind::Kernel) => "kernel",
            Some(FrameKind::Annotation) => "annotation",
            Some(FrameKind::Python) => "python",
            Some(FrameKind::User) | None => "user",
        },
        inlined: found.is_some_and(|(frame, _)| frame.inlined),
        by_frame_pointer: found.is_some_and(|(frame, _)| frame.by_frame_pointer),
    }
}

/// Writes unprintable characters as `\uNNNN`, which JSON reads as the same text: a document on a
/// terminal cannot act on it.
struct Printable;

impl Formatter for Printable {
    fn write_string_fragment<W: io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut rest = fragment;
        while let Some((at, c)) = rest.char_indices().find(|(_, c)| is_unprintable(*c)) {
            let (before, after) = rest.split_at(at);
            writer.write_all(before.as_bytes())?;
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            rest = after.get(c.len_utf8()..).unwrap_or_default();
        }
        writer.write_all(rest.as_bytes())
    }

    fn write_char_escape<W: io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        CompactFormatter.write_char_escape(writer, escape)
    }
}

#[cfg(test)]
mod tests;
