//! Encodes a profile as pprof's `profile.proto`, compressed by gzip.
//!
//! The reference is `proto/profile.proto` of github.com/google/pprof. Each sample has two values,
//! count and weight; the weight is the default. Labels: `comm`, `pid`, `workload`, and where they
//! are known `namespace`, `pod`, `container_id`.
//!
//! - A location is one place in the code: a function with what the compiler put into it, innermost
//!   line first. Where no function is known it has no line, but a mapping and as its address the
//!   offset in the file, so that a backend can finish the work by build ID.
//! - A mapping therefore starts at address 0 and file offset 0: addresses are file offsets. Places
//!   of no known function are in a mapping of their own, as its flags ask viewers to look for symbols,
//!   which would replace those that are known elsewhere in the same file.
//! - Kernel code is in `[kernel.kallsyms]`, unless the profile names a module.
//! - Unprintable characters are escaped, as `go tool pprof` writes names to terminals as they are.

use std::io::{self, Write as _};

use flate2::{Compression, write::GzEncoder};
use hashbrown::HashMap;
use prost::Message as _;

use super::{Options, sorted};
use crate::{
    fold::{UNKNOWN, annotation, printable, workload_name},
    profile::{
        Dictionary, Frame, FrameId, FrameKind, Function, FunctionId, MappingId, Profile, Sample,
        Signal,
    },
};

/// The messages of `profile.proto` with the fields that we write. A name is an index of
/// `string_table`, an ID starts at 1, and 0 stands for none.
mod proto {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Profile {
        #[prost(message, repeated, tag = "1")]
        pub(super) sample_type: Vec<ValueType>,
        #[prost(message, repeated, tag = "2")]
        pub(super) sample: Vec<Sample>,
        #[prost(message, repeated, tag = "3")]
        pub(super) mapping: Vec<Mapping>,
        #[prost(message, repeated, tag = "4")]
        pub(super) location: Vec<Location>,
        #[prost(message, repeated, tag = "5")]
        pub(super) function: Vec<Function>,
        #[prost(string, repeated, tag = "6")]
        pub(super) string_table: Vec<String>,
        #[prost(int64, tag = "9")]
        pub(super) time_nanos: i64,
        #[prost(int64, tag = "10")]
        pub(super) duration_nanos: i64,
        #[prost(message, optional, tag = "11")]
        pub(super) period_type: Option<ValueType>,
        #[prost(int64, tag = "12")]
        pub(super) period: i64,
        #[prost(int64, repeated, tag = "13")]
        pub(super) comment: Vec<i64>,
        #[prost(int64, tag = "14")]
        pub(super) default_sample_type: i64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct ValueType {
        #[prost(int64, tag = "1")]
        pub(super) r#type: i64,
        #[prost(int64, tag = "2")]
        pub(super) unit: i64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Sample {
        #[prost(uint64, repeated, tag = "1")]
        pub(super) location_id: Vec<u64>,
        #[prost(int64, repeated, tag = "2")]
        pub(super) value: Vec<i64>,
        #[prost(message, repeated, tag = "3")]
        pub(super) label: Vec<Label>,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct Label {
        #[prost(int64, tag = "1")]
        pub(super) key: i64,
        #[prost(int64, tag = "2")]
        pub(super) str: i64,
        #[prost(int64, tag = "3")]
        pub(super) num: i64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct Mapping {
        #[prost(uint64, tag = "1")]
        pub(super) id: u64,
        #[prost(uint64, tag = "2")]
        pub(super) memory_start: u64,
        #[prost(uint64, tag = "3")]
        pub(super) memory_limit: u64,
        #[prost(uint64, tag = "4")]
        pub(super) file_offset: u64,
        #[prost(int64, tag = "5")]
        pub(super) filename: i64,
        #[prost(int64, tag = "6")]
        pub(super) build_id: i64,
        #[prost(bool, tag = "7")]
        pub(super) has_functions: bool,
        #[prost(bool, tag = "8")]
        pub(super) has_filenames: bool,
        #[prost(bool, tag = "9")]
        pub(super) has_line_numbers: bool,
        #[prost(bool, tag = "10")]
        pub(super) has_inline_frames: bool,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Location {
        #[prost(uint64, tag = "1")]
        pub(super) id: u64,
        #[prost(uint64, tag = "2")]
        pub(super) mapping_id: u64,
        #[prost(uint64, tag = "3")]
        pub(super) address: u64,
        #[prost(message, repeated, tag = "4")]
        pub(super) line: Vec<Line>,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct Line {
        #[prost(uint64, tag = "1")]
        pub(super) function_id: u64,
        #[prost(int64, tag = "2")]
        pub(super) line: i64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct Function {
        #[prost(uint64, tag = "1")]
        pub(super) id: u64,
        #[prost(int64, tag = "2")]
        pub(super) name: i64,
        #[prost(int64, tag = "4")]
        pub(super) filename: i64,
    }
}

/// The name of the kernel's mapping, as `perf` and pprof know it.
const KERNEL: &str = "[kernel.kallsyms]";

/// The compressed profile.
///
/// # Errors
/// When the compressor fails.
pub fn render(profile: &Profile, options: &Options) -> io::Result<Vec<u8>> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(&encode(profile, options).encode_to_vec())?;
    gzip.finish()
}

/// Tables under construction, with what is in them already.
struct Builder<'a> {
    dictionary: &'a Dictionary,
    strings: HashMap<String, i64>,
    functions: HashMap<FunctionId, u64>,
    /// By file, whether it is the kernel, and whether the functions are known.
    mappings: HashMap<(MappingId, bool, bool), u64>,
    locations: HashMap<Vec<FrameId>, u64>,
    out: proto::Profile,
}

fn encode(profile: &Profile, options: &Options) -> proto::Profile {
    let mut builder = Builder {
        dictionary: &profile.dictionary,
        strings: HashMap::new(),
        functions: HashMap::new(),
        mappings: HashMap::new(),
        locations: HashMap::new(),
        out: proto::Profile::default(),
    };
    builder.string("");
    builder.header(profile, options);
    for sample in sorted(profile) {
        builder.sample(sample);
    }
    builder.out
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn next_id(len: usize) -> u64 {
    len as u64 + 1
}

impl Builder<'_> {
    fn string(&mut self, text: &str) -> i64 {
        let text = printable(text);
        let next = self.out.string_table.len() as i64;
        let id = *self.strings.entry_ref(&*text).or_insert(next);
        if id == next {
            self.out.string_table.push(text.into_owned());
        }
        id
    }

    fn value_type(&mut self, name: &str, unit: &str) -> proto::ValueType {
        proto::ValueType { r#type: self.string(name), unit: self.string(unit) }
    }

    fn header(&mut self, profile: &Profile, options: &Options) {
        let (count, weight) = match profile.signal {
            Signal::Cpu => ("samples", "cpu"),
            Signal::PageFault => ("samples", "faults"),
            Signal::Retransmit => ("hits", "segments"),
        };
        let unit = if profile.signal == Signal::Cpu { profile.signal.unit() } else { "count" };
        let count = self.value_type(count, "count");
        let weight = self.value_type(weight, unit);
        self.out.sample_type = vec![count, weight];
        self.out.default_sample_type = weight.r#type;
        self.out.period_type = Some(weight);
        // The rate may change while a profile is taken: this is the mean.
        let sum = |part: fn(&Sample) -> u64| {
            profile.samples.iter().map(part).fold(0, u64::saturating_add)
        };
        let period = sum(|s| s.weight).checked_div(sum(|s| s.count));
        self.out.period = signed(period.unwrap_or(0));
        self.out.time_nanos = options.start_unix_ns;
        self.out.duration_nanos = signed(profile.end.0.saturating_sub(profile.start.0));
        let lost = format!("{} events lost", profile.lost);
        for comment in [&options.title, &options.subtitle, &lost] {
            if !comment.is_empty() {
                let comment = self.string(comment);
                self.out.comment.push(comment);
            }
        }
    }

    fn sample(&mut self, sample: &Sample) {
        let mut labels = Vec::new();
        let mut add = |builder: &mut Self, key, text: &str| {
            if !text.is_empty() {
                let key = builder.string(key);
                labels.push(proto::Label { key, str: builder.string(text), num: 0 });
            }
        };
        add(self, "comm", self.dictionary.string(sample.comm));
        if let Some(workload) = self.dictionary.workload(sample.workload) {
            add(self, "workload", &workload_name(workload));
            add(self, "namespace", &workload.namespace);
            add(self, "pod", &workload.pod);
            add(self, "container_id", &workload.container_id);
        }
        if sample.pid != 0 {
            let key = self.string("pid");
            labels.push(proto::Label { key, str: 0, num: i64::from(sample.pid) });
        }
        let inlined = |id: &FrameId| self.dictionary.frame(*id).is_some_and(|(f, _)| f.inlined);
        let places = self.dictionary.stack(sample.stack).split_inclusive(|id| !inlined(id));
        let location_id = places.filter_map(|place| self.location(place)).collect();
        let value = vec![signed(sample.count), signed(sample.weight)];
        self.out.sample.push(proto::Sample { location_id, value, label: labels });
    }

    /// The location of a place: inlined frames and the one they are in, innermost first.
    fn location(&mut self, place: &[FrameId]) -> Option<u64> {
        if let Some(id) = self.locations.get(place) {
            return Some(*id);
        }
        let dictionary = self.dictionary;
        let (outer, outer_function) = dictionary.frame(*place.last()?)?;
        // Kept only where no function is known; a name then says why, and serves if there is no file.
        let unknown = outer.offset != 0 && place.len() == 1;
        let mapping_id = self.mapping(outer, outer_function, unknown);
        let unknown = unknown && mapping_id != 0;
        let line: Vec<proto::Line> = if unknown {
            Vec::new()
        } else {
            let frames = place.iter().filter_map(|id| dictionary.frame(*id));
            frames
                .map(|(frame, function)| proto::Line {
                    function_id: self.function(frame, function),
                    line: i64::from(frame.line),
                })
                .collect()
        };
        self.describe(mapping_id, outer, outer_function, &line);
        let id = next_id(self.out.location.len());
        self.out.location.push(proto::Location { id, mapping_id, address: outer.offset, line });
        self.locations.insert(place.to_vec(), id);
        Some(id)
    }

    /// Widens a mapping over a location, and takes back what it claims to have where that has not.
    fn describe(&mut self, id: u64, frame: &Frame, function: &Function, lines: &[proto::Line]) {
        let Some(index) = id.checked_sub(1) else { return };
        let Some(mapping) = self.out.mapping.get_mut(index as usize) else { return };
        mapping.memory_limit = mapping.memory_limit.max(frame.offset.saturating_add(1));
        let file = !lines.is_empty() && !self.dictionary.string(function.file).is_empty();
        mapping.has_filenames &= file;
        mapping.has_line_numbers &= file && lines.iter().all(|l| l.line != 0);
        mapping.has_inline_frames |= lines.len() > 1;
    }

    fn mapping(&mut self, frame: &Frame, function: &Function, unknown: bool) -> u64 {
        if frame.kind == FrameKind::Annotation {
            return 0;
        }
        let kernel = frame.kind == FrameKind::Kernel;
        let key = (function.mapping, kernel, unknown);
        if let Some(id) = self.mappings.get(&key) {
            return *id;
        }
        let found = self.dictionary.all.mappings.get(function.mapping.0 as usize);
        let path = found.map_or("", |m| self.dictionary.string(m.path));
        let build_id = found.map_or("", |m| self.dictionary.string(m.build_id));
        let path = if kernel && path.is_empty() { KERNEL } else { path };
        let id = if path.is_empty() && build_id.is_empty() {
            0
        } else {
            let id = next_id(self.out.mapping.len());
            let mapping = proto::Mapping {
                id,
                filename: self.string(path),
                build_id: self.string(build_id),
                has_functions: !unknown,
                has_filenames: true,
                has_line_numbers: true,
                ..Default::default()
            };
            self.out.mapping.push(mapping);
            id
        };
        self.mappings.insert(key, id);
        id
    }

    fn function(&mut self, frame: &Frame, function: &Function) -> u64 {
        if let Some(id) = self.functions.get(&frame.function) {
            return *id;
        }
        let name = self.dictionary.string(function.name);
        let name = match frame.kind {
            _ if name.is_empty() => self.string(UNKNOWN),
            FrameKind::Annotation => self.string(&annotation(name)),
            FrameKind::User | FrameKind::Kernel | FrameKind::Python => self.string(name),
        };
        let filename = self.string(self.dictionary.string(function.file));
        // No `system_name` (the mangled one): if it equals the name, pprof strips what is in `<>`.
        let id = next_id(self.out.function.len());
        self.out.function.push(proto::Function { id, name, filename });
        self.functions.insert(frame.function, id);
        id
    }
}

#[cfg(test)]
mod tests;
