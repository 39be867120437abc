//! Mutated files, and walks by the tables that come of them.
//!
//! What is tried is bounded, so that it fits in every run of the tests. For a long run:
//!
//! ```sh
//! PODFLAME_FUZZ_SECONDS=600 cargo test --release -p podflame --lib fuzz -- --nocapture
//! ```
//!
//! It prints its seed, which `PODFLAME_FUZZ_SEED` sets. A file that does what none did before is kept and
//! mutated again; with `PODFLAME_BLESS=1` those are written to `testdata/fuzz`, from where every run
//! begins. A file that fails is left in the directory for temporary files, and its name is told.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::FileExt,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    time::{Duration, Instant},
};

use podflame_wire::{
    BY_FRAME_POINTER, MAX_FRAMES,
    unwind::{MAX_RULES, Mapping, MappingKind},
    walk::{AArch64, Machine as Processor, Start, Target, WINDOW, Walk, X86_64},
};

use super::{
    super::rules::bare,
    hostile::{cie, fde, with_code_and_frames},
    *,
};

/// Files that are tried in an ordinary run: some three seconds without optimization.
const TRIES: u64 = 2000;
/// Bytes of a file; what makes it larger is not done.
const BYTES: usize = 16 << 10;
/// Files that are kept, of 16 KiB at most.
const KEPT: usize = 2000;
/// Committed files, and bytes of one, at most.
const COMMITTED: (usize, usize) = (64, 4096);

/// xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators").
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Less than `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 16) as usize % end
    }

    fn word(&mut self) -> u64 {
        let interesting = [0, 1, 8, 0x7f, 0x80, 0xff, 0x7fff_ffff, 0xffff_ffff, 1 << 47, u64::MAX];
        match self.below(4) {
            0 => interesting[self.below(interesting.len())],
            1 => 0x40_0000 + self.next() % 0x800,
            2 => self.next() % 0x1000,
            _ => self.next(),
        }
    }
}

/// One change, or a few.
fn mutate(random: &mut Random, mut bytes: Vec<u8>, others: &[Vec<u8>]) -> Vec<u8> {
    if random.below(6) == 0 {
        bytes = with_code_and_frames(&entries(random));
    }
    for _ in 0..1 + random.below(6) {
        if bytes.is_empty() {
            break;
        }
        // Sections of call frames are at the end of the small files; half of all is done there.
        let from = if random.below(2) == 0 { bytes.len() / 2 } else { 0 };
        let at = from + random.below(bytes.len() - from);
        let rest = bytes.len() - at;
        let len = (1 + random.below(32)).min(rest);
        match random.below(9) {
            0..3 => bytes[at] = random.next() as u8,
            3 => bytes[at] ^= 1 << random.below(8),
            4 => {
                let width = [2, 4, 8][random.below(3)].min(rest);
                bytes[at..at + width].copy_from_slice(&random.word().to_le_bytes()[..width]);
            }
            5 => {
                let to = random.below(bytes.len() - len + 1);
                bytes.copy_within(at..at + len, to);
            }
            6 => {
                let other = &others[random.below(others.len())];
                let end = bytes.len().min(other.len());
                if at < end {
                    bytes[at..end].copy_from_slice(&other[at..end]);
                }
            }
            7 => {
                let block = bytes[at..at + len].to_vec();
                bytes.splice(at..at, block);
            }
            _ => {
                if random.below(8) == 0 {
                    bytes.truncate(at);
                }
            }
        }
    }
    bytes.truncate(BYTES);
    bytes
}

/// Call frame information of functions at random places, with instructions that are mostly well-formed.
fn entries(random: &mut Random) -> Vec<u8> {
    // What many functions share may be too long as well.
    let most = if random.below(8) == 0 { 400 } else { 4 };
    let mut bytes = cie(&instructions(random, most));
    for _ in 0..random.below(12) {
        let start = 0x40_0000 + random.next() % 0x500;
        let code = instructions(random, 12);
        bytes.extend(fde(bytes.len(), start, random.next() % 0x100, &code));
    }
    bytes
}

fn instructions(random: &mut Random, most: usize) -> Vec<u8> {
    let mut code = Vec::new();
    for _ in 0..random.below(most + 1) {
        // Advances, offsets and restores of registers, and all numbers of DWARF 5, table 7.29.
        let opcode = match random.below(4) {
            0 => 0x40 | random.below(8) as u8,
            1 => [0x86, 0x90, 0xc6, 0x87][random.below(4)],
            2 => [0x0c, 0x0d, 0x0e, 0x12][random.below(4)],
            _ => random.below(0x30) as u8,
        };
        code.push(opcode);
        for _ in 0..random.below(3) {
            code.push(random.below(0x80) as u8);
        }
    }
    code
}

/// A process that has mapped one table, and whose stack is random.
struct Mapped<'a, M> {
    table: &'a FileTable,
    mappings: Vec<Mapping>,
    rules: &'a Rules,
    words: Vec<u64>,
    processor: std::marker::PhantomData<M>,
}

impl<M: Processor> Target for Mapped<'_, M> {
    type Machine = M;

    fn read(&self, address: u64, window: &mut [u64; WINDOW]) -> bool {
        for (n, word) in window.iter_mut().enumerate() {
            *word = self.words[(address / 8) as usize % 251 + n];
        }
        !address.is_multiple_of(0x4000)
    }
    fn mapping(&self, index: u32) -> Option<&Mapping> {
        self.mappings.get(index as usize)
    }
    fn page(&self, table: u32, page: u32) -> Option<&Page> {
        self.table.segments[table as usize].pages.get(page as usize)
    }
    fn rule(&self, index: u16) -> Option<&Rule> {
        self.rules.get(index)
    }
}

/// Walks from anywhere in the table's code; how many frames there were.
fn walk<M: Processor>(random: &mut Random, table: &FileTable, rules: &Rules) -> usize {
    let segment = |(n, segment): (usize, &Segment)| Mapping {
        start: segment.base,
        end: segment.end,
        bias: segment.base,
        table: n as u32,
        kind: MappingKind::Table as u32 | (segment.pages.len() as u32) << 8,
    };
    let mappings: Vec<_> = table.segments.iter().enumerate().map(segment).collect();
    let place = |random: &mut Random| {
        let mapping = &mappings[random.below(mappings.len())];
        mapping.start + random.next() % (mapping.end - mapping.start)
    };
    let words = (0..251 + WINDOW).map(|_| match random.below(3) {
        0 => place(random),
        1 => (1 << 40) + 8 * (random.next() % 0x1000),
        _ => random.word(),
    });
    let words = words.collect();
    let sp = (1 << 40) + random.next() % 0x4000;
    let start = Start {
        ip: place(random),
        sp: if random.below(8) == 0 { sp } else { sp & !7 },
        fp: sp + 8 * (random.next() % 64),
        link: place(random),
        first: 0,
        mappings: mappings.len() as u32,
        generation: 0,
    };
    let target = Mapped::<M> { table, mappings, rules, words, processor: std::marker::PhantomData };
    let mut walk = Walk::new();
    walk.registers = std::array::from_fn(|_| sp);
    let mut out = [0; 128];
    walk.begin(&start);
    let (count, _) = walk.run::<Mapped<'_, M>, _>(|w| w.step(&target), &mut out, 0);
    assert!(count <= MAX_FRAMES);
    for frame in out.iter().take(count).skip(1).map(|frame| frame & !BY_FRAME_POINTER) {
        assert!(target.mappings.iter().any(|m| (m.start..=m.end).contains(&frame)), "{frame:x}");
    }
    count
}

/// Limits that small files reach.
fn tight() -> Limits {
    Limits {
        section_bytes: 2000,
        functions: 8,
        instruction_bytes: 900,
        table_bytes: 2 * size_of::<Page>() as u64,
    }
}

/// What a file did, as a word that is equal for files that did the same.
fn signature(built: &Result<FileTable, NoTable>, rules: &Rules) -> String {
    let table = match built {
        Ok(table) => table,
        Err(reason) => return reason.name().into(),
    };
    let s = &table.stats;
    let counts = [s.functions, s.idle, s.malformed, s.too_long, s.unsupported, s.rules_full];
    // None, one, or more.
    let met = counts.map(|count| count.min(2));
    let numbers = table.segments.iter().flat_map(Segment::rows).map(|(_, rule)| rule);
    let kinds: BTreeSet<[u8; 3]> =
        numbers.filter_map(|n| rules.get(n)).map(|r| [r.cfa, r.ra, r.fp]).collect();
    format!("{met:?} {} {} {kinds:?}", s.signal_returns.min(1), s.stubs.min(1))
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

/// The committed files, in the order of their names.
fn corpus() -> Vec<Vec<u8>> {
    let mut paths: Vec<_> = ["x86_64.elf", "aarch64.elf", "debug.elf"].map(fixture).into();
    let kept = fs::read_dir(fixture("fuzz")).map(|entries| entries.map(|e| e.unwrap().path()));
    let mut kept: Vec<_> = kept.into_iter().flatten().collect();
    kept.sort_unstable();
    paths.extend(kept);
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

#[test]
fn fuzz() {
    let seconds = setting("PODFLAME_FUZZ_SECONDS");
    let clock = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let seed = setting("PODFLAME_FUZZ_SEED").unwrap_or(clock).max(1);
    println!("PODFLAME_FUZZ_SEED={seed}");
    let mut random = Random(seed);
    let until = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));

    // Nearly full from the start, and soon full.
    let mut full = Rules::default();
    while full.count() < MAX_RULES - 4 {
        full.number(Rule { cfa_offset: 1 << 20 | full.count() as i32, ..bare(Cfa::Register) });
    }
    let mut few = Rules::default();
    let mut kept = corpus();
    let committed = kept.len();
    let mut seen: BTreeMap<String, u64> = BTreeMap::new();
    let mut met: BTreeMap<&str, u64> = BTreeMap::new();
    let file = tempfile::NamedTempFile::new().unwrap();
    let (mut tries, mut frames) = (0_u64, 0);
    loop {
        // First the committed ones, as they are.
        let bytes = match kept.get(tries as usize).filter(|_| tries < committed as u64) {
            Some(bytes) => bytes.clone(),
            None => {
                let from = kept[random.below(kept.len())].clone();
                mutate(&mut random, from, &kept)
            }
        };
        let one = || {
            file.as_file().set_len(0).unwrap();
            file.as_file().write_all_at(&bytes, 0).unwrap();
            let open = Arc::new(file.reopen().unwrap());
            let (rules, limits) = match random.below(4) {
                0 => (&mut few, tight()),
                1 => (&mut full, Limits::default()),
                _ => (&mut few, Limits::default()),
            };
            let built = build(&open, rules, &limits, &mut || ());
            if let Ok(table) = &built {
                check(table, rules, &limits);
                frames += walk::<X86_64>(&mut random, table, rules);
                frames += walk::<AArch64>(&mut random, table, rules);
            }
            (signature(&built, rules), built)
        };
        let (signature, built) = catch_unwind(AssertUnwindSafe(one)).unwrap_or_else(|panic| {
            let path = std::env::temp_dir().join(format!("podflame-fuzz-{seed}.elf"));
            fs::write(&path, &bytes).unwrap();
            println!("try {tries}: {}", path.display());
            resume_unwind(panic)
        });
        let mut count = |name, many: u64| *met.entry(name).or_default() += many;
        match &built {
            Err(reason) => count(reason.name(), 1),
            Ok(table) => {
                let s = &table.stats;
                count("table", 1);
                count("rows", table.rows);
                count("malformed entries", s.malformed);
                count("entries too long", s.too_long);
                count("unsupported rows", s.unsupported);
                count("rules full", s.rules_full);
                count("signal returns", s.signal_returns);
            }
        }
        let times = seen.entry(signature).or_default();
        *times += 1;
        if *times == 1 && kept.len() < KEPT {
            kept.push(bytes);
        }
        tries += 1;
        let done = until.map_or(tries >= TRIES, |until| Instant::now() >= until);
        if done {
            break;
        }
        if few.count() > MAX_RULES / 2 {
            few = Rules::default();
        }
    }
    println!("{tries} files, {} kinds, {frames} frames; {met:?}", seen.len());
    // Whatever the seed is, every limit was reached and counted.
    for name in ["too large", "entries too long", "rules full", "malformed entries", "malformed"] {
        assert!(met.get(name).is_some_and(|count| *count > 0), "no {name}: {met:?}");
    }
    if std::env::var_os("PODFLAME_BLESS").is_some() {
        keep(&kept[3..]);
    }
}

/// Commits the small ones.
fn keep(files: &[Vec<u8>]) {
    let directory = fixture("fuzz");
    fs::create_dir_all(&directory).unwrap();
    let small = files.iter().filter(|bytes| bytes.len() <= COMMITTED.1).take(COMMITTED.0);
    for (n, bytes) in small.enumerate() {
        fs::write(directory.join(format!("{n:02}.elf")), bytes).unwrap();
    }
}
