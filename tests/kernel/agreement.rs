//! What `perf record --call-graph dwarf` says of the same run.
//!
//! Two samplers of one run agree only as far as their samples go, even where both are right: of `n`
//! samples of a function with the share `p`, each has about `sqrt(p / n)` by chance. So that there is no
//! doubt about what chance does, perf samples twice: at podflame's rate, and apart from that at twice
//! the rate. The former samples and podflame's are held to the latter.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap},
    fs,
    hash::Hash,
};

use anyhow::{Context as _, Result};
use object::{Object as _, ObjectSymbol as _};
use podflame_tests::PerfRecord;
use serde_json::Value;

use crate::record::Recorded;

/// Points of a hundred by which podflame may agree less than perf agrees with itself. In addition chance
/// may differ by a fourth.
const WORSE: f64 = 2.0;

/// Programs whose stacks perf does not walk: code that was compiled at run time, and Go's, say nothing of
/// their frames where perf looks.
const NOT_WALKED: &[&str] = &["node", "Go"];

/// Frames by which stacks are compared, the innermost: of deep stacks perf copies a part only.
const DEPTH: usize = 12;

/// Rates of perf that are not in step with podflame's 997 Hz: of the reference, and of the control.
const RATES: [u32; 2] = [1993, 1009];

/// perf beside podflame.
pub(crate) struct Beside(PerfRecord);

/// The parts of a run in which two profilers agree, in percent, for podflame and for the control.
pub(crate) struct Compared {
    samples: u64,
    functions: [f64; 2],
    stacks: [f64; 2],
    differences: String,
}

/// How often each was seen.
#[derive(Default)]
struct Counts<K>(HashMap<K, u64>);

/// The samples of a profiler.
#[derive(Default)]
struct Seen {
    functions: Counts<String>,
    stacks: Counts<Vec<String>>,
}

impl Beside {
    /// Samples from here on.
    pub(crate) fn start() -> Result<Self> {
        Ok(Self(PerfRecord::all_cpus(&RATES)?))
    }

    /// Takes what was in these processes in the time that podflame recorded.
    pub(crate) fn compare(self, pids: &[u32], recorded: &Recorded) -> Result<Compared> {
        let samples = self.0.stop()?;
        let number = |name: &str| recorded.profile[name].as_u64().context("no time in the profile");
        let start = number("start_monotonic_ns")?;
        let at = start..start + number("duration_ns")?;
        let names = Names::of(recorded)?;
        let (mut reference, mut control) = (Seen::default(), Seen::default());
        samples.stacks(pids, at, DEPTH, |rate, stack| {
            let seen = if rate == RATES[0] { &mut reference } else { &mut control };
            seen.add(stack.iter().map(|(name, file)| names.known(&demangle(name), file)), 1);
        })?;
        let mut podflame = Seen::default();
        for sample in recorded.samples() {
            podflame.add(sample.all().rev().filter_map(|f| names.frame(f)), sample.count());
        }
        Ok(Compared {
            samples: podflame.functions.total(),
            functions: [&podflame, &control].map(|seen| seen.functions.agree(&reference.functions)),
            stacks: [&podflame, &control].map(|seen| seen.stacks.agree(&reference.stacks)),
            differences: podflame.functions.differences(&reference.functions)
                + &podflame.stacks.differences(&reference.stacks),
        })
    }
}

impl Compared {
    /// Podflame and perf are as near as perf is to itself.
    pub(crate) fn check(&self, name: &str) {
        let ([podflame, control], [stacks, of_control]) = (self.functions, self.stacks);
        println!(
            "{name}: of {} samples agree by function {podflame:.1} % (perf with itself \
            {control:.1} %), by stack {stacks:.1} % ({of_control:.1} %)",
            self.samples
        );
        let differences = &self.differences;
        let near =
            |podflame: f64, control: f64| podflame >= control - WORSE - (100.0 - control) / 4.0;
        assert!(near(podflame, control), "{name}, by function:\n{differences}");
        let walked = !NOT_WALKED.contains(&name);
        assert!(!walked || near(stacks, of_control), "{name}, by stack:\n{differences}");
    }
}

impl Seen {
    fn add(&mut self, frames: impl Iterator<Item = String>, count: u64) {
        // What Python calls within its loop, and the loop, are one.
        let mut stack: Vec<String> = frames.collect();
        stack.dedup_by(|outer, inner| inner == outer && outer == LOOP);
        let Some(innermost) = stack.first() else { return };
        self.functions.add(innermost.clone(), count);
        stack.truncate(DEPTH);
        self.stacks.add(stack, count);
    }
}

impl<K: Eq + Hash + Ord + std::fmt::Debug> Counts<K> {
    fn add(&mut self, key: K, count: u64) {
        *self.0.entry(key).or_default() += count;
    }

    fn total(&self) -> u64 {
        self.0.values().sum()
    }

    /// Percent of all.
    fn share(&self, key: &K) -> f64 {
        100.0 * self.0.get(key).copied().unwrap_or(0) as f64 / self.total().max(1) as f64
    }

    /// What both say, in percent: for each key the lesser of the two shares.
    fn agree(&self, other: &Self) -> f64 {
        self.0.keys().map(|key| self.share(key).min(other.share(key))).sum()
    }

    /// Where the two differ most.
    fn differences(&self, other: &Self) -> String {
        let keys: BTreeSet<&K> = self.0.keys().chain(other.0.keys()).collect();
        let mut all: Vec<_> = keys.iter().map(|k| (self.share(k), other.share(k), k)).collect();
        all.sort_by_key(|(ours, theirs, _)| Reverse(((ours - theirs).abs() * 1e6) as u64));
        let lines = all.iter().take(12).map(|(ours, theirs, key)| {
            format!("  {key:?}: podflame {ours:.2} %, perf {theirs:.2} %\n")
        });
        lines.collect()
    }
}

/// The interpreter's loop, in whose place podflame has what it runs.
const LOOP: &str = "_PyEval_EvalFrameDefault";

/// Names that stand for the same function, for each file: compilers and libraries give one address
/// several, and profilers choose among them.
struct Names(HashMap<String, HashMap<String, String>>);

impl Names {
    /// Of the files in a recording.
    fn of(recorded: &Recorded) -> Result<Self> {
        let text = |frame: &Value, name: &str| frame[name].as_str().unwrap_or_default().to_owned();
        let frames = recorded.samples().flat_map(|sample| sample.all().collect::<Vec<_>>());
        let files = frames.map(|frame| (text(frame, "module"), text(frame, "build_id")));
        let mut names = HashMap::new();
        for (file, build_id) in files.collect::<BTreeSet<_>>() {
            let mut symbols: Vec<(u64, String)> = Vec::new();
            if file == "[kernel]" {
                for line in fs::read_to_string("/proc/kallsyms")?.lines() {
                    let mut words = line.split_whitespace();
                    let address = words.next().and_then(|a| u64::from_str_radix(a, 16).ok());
                    symbols.extend(address.zip(words.nth(1).map(str::to_owned)));
                }
            }
            let (first, rest) = build_id.split_at_checked(2).unwrap_or_default();
            let debug = format!("/usr/lib/debug/.build-id/{first}/{rest}.debug");
            for path in [file.as_str(), &debug].iter().filter(|path| path.starts_with('/')) {
                let Ok(bytes) = fs::read(path) else { continue };
                let elf = object::File::parse(&*bytes).with_context(|| format!("parse {path}"))?;
                for symbol in elf.symbols().chain(elf.dynamic_symbols()) {
                    let name = symbol.name().unwrap_or_default();
                    if symbol.is_definition() && !name.is_empty() {
                        symbols.push((symbol.address(), demangle(unversioned(name))));
                    }
                }
            }
            symbols.sort_unstable();
            let same = symbols.chunk_by(|a, b| a.0 == b.0).filter(|same| same.len() > 1);
            let pairs = same
                .flat_map(|same| same.iter().map(|(_, name)| (name.clone(), same[0].1.clone())));
            names.insert(last(&file).to_owned(), pairs.collect());
        }
        Ok(Self(names))
    }

    /// A function by one of its names, or the file it is in if it has none.
    fn known(&self, name: &str, file: &str) -> String {
        let file = match last(file) {
            "kallsyms" | "[kernel.kallsyms]" => "[kernel]",
            // perf looks for the names of code that was made at run time, and finds none.
            anon if anon.contains("anon") || file.starts_with("/tmp/perf-") => "[anon]",
            file => file,
        };
        let name = unversioned(name);
        // perf makes names for linkage tables.
        if name.starts_with('[') || name.is_empty() || name.ends_with("@plt") {
            return format!("[{}]", file.trim_matches(['[', ']']));
        }
        let same = self.0.get(file).and_then(|names| names.get(name));
        same.map_or(name, String::as_str).to_owned()
    }

    /// A frame of podflame's JSON; `None` if it is not one by itself.
    fn frame(&self, frame: &Value) -> Option<String> {
        let text = |name: &str| frame[name].as_str().unwrap_or_default();
        if frame["inlined"] == true || text("kind") == "annotation" {
            return None;
        }
        Some(match text("kind") {
            "python" => LOOP.into(),
            _ => self.known(text("name"), text("module")),
        })
    }
}

/// The name of a file without its directory.
fn last(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or_default()
}

/// A name without the version that a library gives it.
fn unversioned(name: &str) -> &str {
    match name.split_once('@') {
        Some((plain, version)) if version != "plt" && !plain.is_empty() => plain,
        _ => name,
    }
}

fn demangle(name: &str) -> String {
    podflame::symbols::demangle(name.as_bytes())
}
