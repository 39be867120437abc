//! Profiles for tests, built from names.

use std::sync::Arc;

use proptest::prelude::*;

use crate::{
    event::KTime,
    profile::{
        Dictionary, Frame, FrameId, FrameKind, Function, FunctionId, Mapping, MappingId, Profile,
        Sample, Signal, StackId, StringId, Workload, WorkloadId, WorkloadKind,
    },
};

/// A frame by its names.
#[derive(Clone, Debug, Default)]
pub(crate) struct Code {
    pub(crate) name: String,
    pub(crate) module: String,
    pub(crate) file: String,
    pub(crate) line: u32,
    pub(crate) offset: u64,
    pub(crate) kernel: bool,
    pub(crate) annotation: bool,
    pub(crate) inlined: bool,
}

/// User code with a source line.
pub(crate) fn user(name: &str, module: &str, line: u32) -> Code {
    let file = format!("src/{name}.c");
    Code { name: name.to_owned(), module: module.to_owned(), file, line, ..Default::default() }
}

/// The same, inlined into the next outer frame.
pub(crate) fn inlined(name: &str, module: &str, line: u32) -> Code {
    Code { inlined: true, ..user(name, module, line) }
}

/// Kernel code.
pub(crate) fn kernel(name: &str) -> Code {
    Code { name: name.to_owned(), kernel: true, ..Default::default() }
}

/// Code of no known function.
pub(crate) fn unknown(reason: &str, module: &str, offset: u64) -> Code {
    let (name, module) = (reason.to_owned(), module.to_owned());
    Code { name, module, offset, ..Default::default() }
}

/// What an event is about.
pub(crate) fn about(name: &str) -> Code {
    Code { name: name.to_owned(), annotation: true, ..Default::default() }
}

/// Fills a dictionary and samples.
pub(crate) struct Fixture {
    pub(crate) dictionary: Dictionary,
    signal: Signal,
    samples: Vec<Sample>,
}

fn intern<T: PartialEq>(table: &mut Vec<T>, value: T) -> u32 {
    let found = table.iter().position(|known| *known == value);
    let at = found.unwrap_or_else(|| {
        table.push(value);
        table.len() - 1
    });
    u32::try_from(at).unwrap_or(u32::MAX)
}

impl Fixture {
    pub(crate) fn new(signal: Signal) -> Self {
        let mut fixture = Self { dictionary: Dictionary::default(), signal, samples: Vec::new() };
        fixture.string("");
        fixture.mapping("");
        fixture
    }

    pub(crate) fn string(&mut self, text: &str) -> StringId {
        StringId(intern(&mut self.dictionary.all.strings, text.into()))
    }

    fn mapping(&mut self, path: &str) -> MappingId {
        let build_id = if path.starts_with('/') { "c0ffee" } else { "" };
        let mapping = Mapping { path: self.string(path), build_id: self.string(build_id) };
        MappingId(intern(&mut self.dictionary.all.mappings, mapping))
    }

    fn frame(&mut self, code: &Code) -> FrameId {
        let function = Function {
            name: self.string(&code.name),
            file: self.string(&code.file),
            mapping: self.mapping(&code.module),
        };
        let function = FunctionId(intern(&mut self.dictionary.all.functions, function));
        let kind = match (code.annotation, code.kernel) {
            (true, _) => FrameKind::Annotation,
            (_, true) => FrameKind::Kernel,
            _ => FrameKind::User,
        };
        let (line, offset, inlined) = (code.line, code.offset, code.inlined);
        let by_frame_pointer = false;
        let frame = Frame { function, line, offset, kind, inlined, by_frame_pointer };
        FrameId(intern(&mut self.dictionary.all.frames, frame))
    }

    /// A container by `pod:NAMESPACE/POD/CONTAINER`, or a process by any other name.
    pub(crate) fn workload(&mut self, name: &str) -> WorkloadId {
        let parts: Vec<&str> = name.split([':', '/']).collect();
        let workload = match *parts {
            ["pod", namespace, pod, container] => Workload {
                kind: WorkloadKind::Pod,
                name: format!("{pod}/{container}"),
                namespace: namespace.to_owned(),
                pod: pod.to_owned(),
                container_id: "f".repeat(64),
                ..Default::default()
            },
            _ => Workload {
                kind: WorkloadKind::Process,
                name: name.to_owned(),
                ..Default::default()
            },
        };
        WorkloadId(intern(&mut self.dictionary.all.workloads, Arc::new(workload)))
    }

    /// Adds a sample; the stack has the innermost frame first.
    pub(crate) fn sample(
        &mut self,
        (workload, pid, comm): (&str, u32, &str),
        stack: &[Code],
        (count, weight): (u64, u64),
    ) -> &mut Self {
        let frames: Vec<FrameId> = stack.iter().map(|code| self.frame(code)).collect();
        let stack = StackId(intern(&mut self.dictionary.all.stacks, frames.into()));
        let (workload, comm) = (self.workload(workload), self.string(comm));
        let signal = self.signal;
        self.samples.push(Sample { signal, workload, pid, comm, stack, count, weight });
        self
    }

    pub(crate) fn profile(&self) -> Profile {
        Profile {
            signal: self.signal,
            start: KTime(5_000_000_000),
            end: KTime(15_000_000_000),
            dictionary: Arc::new(self.dictionary.clone()),
            samples: self.samples.clone(),
            lost: 3,
        }
    }
}

/// A small profile with every kind of frame.
pub(crate) fn sampled(signal: Signal) -> Fixture {
    let app = "/usr/bin/app";
    let web = ("pod:shop/web-1/nginx", 42, "nginx: worker 1");
    let main = user("main", app, 10);
    let handle = user("handle", app, 20);
    let mut fixture = Fixture::new(signal);
    fixture
        .sample(
            web,
            &[kernel("tcp_sendmsg"), kernel("entry_SYSCALL_64"), handle.clone(), main.clone()],
            (10, 101_010_100),
        )
        .sample(
            web,
            &[inlined("copy", app, 7), inlined("fill", app, 8), handle.clone(), main.clone()],
            (30, 303_030_300),
        )
        .sample(web, &[handle, main.clone()], (5, 50_505_050))
        .sample(
            ("batch", 7, "batch"),
            &[unknown("[no symbols]", "/opt/lib.so", 0x1234), main.clone()],
            (4, 40_404_040),
        )
        .sample(("batch", 7, "batch"), &[about("file /data/db"), main], (1, 10_101_010));
    fixture
}

/// Every string of H1: what hostile names are made of.
pub(crate) const HOSTILE: &[&str] = &[
    "a;b",
    "new\nline",
    "cr\rlf\r\n",
    "tab\t",
    "\u{1b}[31mred\u{1b}]0;title\u{7}",
    "nul\0",
    "quotes\"'`",
    "</script><script>alert(1)</script>",
    "</title></text></svg>",
    "]]>",
    "<![CDATA[",
    "&lt;&#x3c;&",
    "rtl\u{202e}gpj.exe",
    "c1\u{9b}31m",
    "\u{2028}\u{2029}\u{85}",
    "\u{feff}\u{fffe}\u{ffff}",
    "back\\slash\\x3b\\\\",
    "fake_[k]",
    "[fake]",
    " edges ",
    "number 12",
    "two 1 2.5",
    "# comment",
    "",
    " ",
    "\\",
    "-",
    "--",
];

/// A stack, innermost frame first, of hostile and of arbitrary names.
fn stack() -> impl Strategy<Value = Vec<Code>> {
    let code = (name(), name(), any::<(u32, bool, bool, bool)>(), any::<Option<u64>>()).prop_map(
        |(name, module, (line, kernel, annotation, inlined), offset)| Code {
            file: module.clone(),
            offset: offset.unwrap_or(0),
            name,
            module,
            line,
            kernel,
            annotation,
            inlined,
        },
    );
    prop::collection::vec(code, 0..8)
}

/// A name that a process may have chosen.
pub(crate) fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        prop::sample::select(HOSTILE).prop_map(str::to_owned),
        any::<String>(),
        "[a-c;\\\\x3b_k\\[\\] .0-9#u{}]{0,8}",
        "[a-c]",
    ]
}

/// Any profile.
pub(crate) fn profiles() -> impl Strategy<Value = Profile> {
    let value = prop_oneof![9 => (1..1000_u64, 0..1_000_000_u64), 1 => any::<(u64, u64)>()];
    let sample = (name(), any::<u32>(), name(), stack(), value);
    let signal = prop::sample::select(&Signal::ALL[..]);
    (signal, prop::collection::vec(sample, 0..12)).prop_map(|(signal, samples)| {
        let mut fixture = Fixture::new(signal);
        for (workload, pid, comm, stack, value) in samples {
            fixture.sample((&workload, pid, &comm), &stack, value);
        }
        fixture.profile()
    })
}
