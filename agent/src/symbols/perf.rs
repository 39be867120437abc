//! Names that a just-in-time compiler gives to its code, in `/tmp/perf-PID.map` of the process's
//! root (`tools/perf/Documentation/jit-interface.txt`).
//!
//! The process writes that file, so it is read in steps, with bounds on bytes and entries. Only
//! places are kept; a name is read from the file when it is asked for, and checked against its
//! entry, since the file may have been written anew.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{File, Metadata},
    os::unix::fs::{FileExt, MetadataExt},
    time::{Duration, Instant},
};

use super::{Limits, Stats, maps::hex, names, sight::ProcDir, sys};

/// Shortest time between two looks at the file.
const AGAIN: Duration = Duration::from_millis(100);
/// Bytes read at one look: some 10 ms. The next look goes on.
const STEP: u64 = 8 << 20;
/// Bytes read at once.
const CHUNK: usize = 64 << 10;

/// The functions of one process.
#[derive(Default)]
pub(super) struct PerfMap {
    /// Unique, and another one after the contents change, for keys of results.
    pub(super) id: u32,
    file: Option<(File, (u64, u64))>,
    read: u64,
    functions: Functions,
    looked: Option<Instant>,
    cut: bool,
}

/// Start → end and place of the line, not overlapping.
#[derive(Default)]
struct Functions(BTreeMap<u64, (u64, u32)>);

impl Functions {
    /// Adds a function, over those that were there before.
    fn insert(&mut self, start: u64, end: u64, line: u32) {
        let before = self.0.range_mut(..start).next_back();
        if let Some((_, (its_end, its_line))) = before.filter(|(_, (its_end, _))| *its_end > start)
        {
            let rest = (*its_end, *its_line);
            *its_end = start;
            if rest.0 > end {
                self.0.insert(end, rest);
            }
        }
        while let Some((&its_start, &(its_end, its_line))) = self.0.range(start..end).next() {
            self.0.remove(&its_start);
            if its_end > end {
                self.0.insert(end, (its_end, its_line));
            }
        }
        self.0.insert(start, (end, line));
    }

    fn find(&self, address: u64) -> Option<u32> {
        let (_, (end, line)) = self.0.range(..=address).next_back()?;
        (address < *end).then_some(*line)
    }
}

impl PerfMap {
    /// Nothing yet.
    pub(super) fn new(id: u32) -> Self {
        Self { id, ..Self::default() }
    }

    /// How many functions are kept.
    pub(super) fn len(&self) -> usize {
        self.functions.0.len()
    }

    /// Whether it holds a descriptor.
    pub(super) fn is_open(&self) -> bool {
        self.file.is_some()
    }

    /// Whether it is time to look at the file.
    pub(super) fn due(&self) -> bool {
        self.looked.is_none_or(|at| at.elapsed() >= AGAIN)
    }

    /// The name of the function at an address.
    pub(super) fn find(&self, address: u64) -> Option<Vec<u8>> {
        let at = self.functions.find(address)?;
        let (file, _) = self.file.as_ref()?;
        let mut line = vec![0; names::RAW_NAME];
        let read = file.read_at(&mut line, at.into()).ok()?;
        line.truncate(read);
        let (start, end, name) = parse(line.split(|b| *b == b'\n').next()?)?;
        (start..end).contains(&address).then(|| name.to_vec())
    }

    /// Reads what was appended since, or everything if it is another file; says whether anything
    /// came to it.
    pub(super) fn refresh(&mut self, dir: &ProcDir, limits: &Limits, stats: &mut Stats) -> bool {
        self.looked = Some(Instant::now());
        let Some((file, metadata)) = open(dir) else { return false };
        let identity = (metadata.dev(), metadata.ino());
        let other = self.file.as_ref().is_none_or(|(_, known)| *known != identity);
        if other || metadata.len() < self.read {
            *self = Self { looked: self.looked, id: self.id, ..Self::default() };
        }
        self.file = Some((file, identity));
        let had = self.read;
        if !self.cut && !self.append(limits) {
            self.cut = true;
            stats.perf_maps_cut += 1;
        }
        self.read > had
    }

    /// Reads on, up to the last complete line; `false` if a limit is met.
    fn append(&mut self, limits: &Limits) -> bool {
        let Some((file, _)) = &self.file else { return true };
        let stop = self.read + STEP;
        let mut chunk = vec![0; CHUNK];
        while self.read < stop {
            if self.read >= limits.perf_map_bytes || self.len() >= limits.perf_map_entries {
                return false;
            }
            let read = file.read_at(&mut chunk, self.read).unwrap_or(0);
            let bytes = chunk.get(..read).unwrap_or_default();
            let complete = match bytes.iter().rposition(|b| *b == b'\n') {
                Some(last) => last + 1,
                // A line that fills the chunk is none; its rest is skipped, as no line parses.
                None if read == CHUNK => CHUNK,
                None => return true,
            };
            let mut at = self.read;
            for line in bytes.get(..complete).unwrap_or_default().split_inclusive(|b| *b == b'\n') {
                if let (Some((start, end, _)), Ok(place)) = (parse(line), u32::try_from(at)) {
                    self.functions.insert(start, end, place);
                }
                at += line.len() as u64;
            }
            self.read += complete as u64;
        }
        true
    }
}

/// Opens the file if it is regular, reached without links, and of the process's user or of root.
fn open(dir: &ProcDir) -> Option<(File, Metadata)> {
    let (pid, user) = dir.inner_pid_and_user()?;
    let path = format!("/tmp/perf-{pid}.map");
    let root = dir.root().ok()?;
    let (file, metadata) = sys::open_at(&root, OsStr::new(&path), sys::IN_ROOT_NO_LINKS).ok()?;
    (metadata.uid() == user || metadata.uid() == 0).then_some((file, metadata))
}

/// A line: start and size in hexadecimal, and the rest is the name. Start, end and name.
fn parse(line: &[u8]) -> Option<(u64, u64, &[u8])> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut words = line.splitn(3, |b| *b == b' ');
    let mut number = || hex(words.next().map(|w| w.strip_prefix(b"0x").unwrap_or(w))?);
    let (start, size) = (number()?, number()?);
    let name = words.next().filter(|name| !name.is_empty())?;
    let end = start.checked_add(size).filter(|end| *end > start)?;
    Some((start, end, name))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines() {
        for (line, expected) in [
            (
                "7f00 10 LazyCompile:~f /a b.js:1\n",
                Some((0x7f00, 0x7f10, "LazyCompile:~f /a b.js:1")),
            ),
            ("0x7f00 0x10 f", Some((0x7f00, 0x7f10, "f"))),
            ("7f00 0 f", None),
            ("ffffffffffffffff 2 f", None),
            ("7f00 10 ", None),
            ("7f00 10", None),
            ("7f00", None),
            ("", None),
            ("7f00  10 f", None),
            ("zz 10 f", None),
        ] {
            let found = parse(line.as_bytes()).map(|(s, e, n)| (s, e, n.to_vec()));
            assert_eq!(found, expected.map(|(s, e, n)| (s, e, n.as_bytes().to_vec())), "{line}");
        }
    }

    #[test]
    fn later_functions_lie_over_earlier_ones() {
        let mut functions = Functions::default();
        for (line, (start, end)) in
            [(0, 100), (10, 20), (15, 30), (90, 120), (200, 300), (40, 50), (35, 60), (0, 5)]
                .into_iter()
                .enumerate()
        {
            functions.insert(start, end, line as u32);
        }
        let found: Vec<_> = [2, 5, 12, 17, 29, 30, 34, 35, 45, 59, 60, 95, 119, 120, 250, 300]
            .iter()
            .map(|a| functions.find(*a))
            .collect();
        let s = Some;
        let expected = [
            s(7),
            s(0),
            s(1),
            s(2),
            s(2),
            s(0),
            s(0),
            s(6),
            s(6),
            s(6),
            s(0),
            s(3),
            s(3),
            None,
            s(4),
            None,
        ];
        assert_eq!(found, expected);
    }

    proptest! {
        #[test]
        fn the_latest_function_wins(ranges in prop::collection::vec((0_u64..64, 1_u64..32), 0..40)) {
            let mut functions = Functions::default();
            for ((start, size), line) in ranges.iter().zip(0..) {
                functions.insert(*start, start + size, line);
            }
            for address in 0..100 {
                let covering = ranges.iter().zip(0_u32..);
                let covering = covering.filter(|((s, n), _)| (*s..s + n).contains(&address));
                let latest = covering.last();
                prop_assert_eq!(functions.find(address), latest.map(|(_, line)| line));
            }
        }

        #[test]
        fn any_line(line: Vec<u8>) {
            if let Some((start, end, name)) = parse(&line) {
                prop_assert!(start < end && name.len() < line.len());
            }
        }
    }
}
