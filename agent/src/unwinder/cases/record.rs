//! Raw recordings of gdb → cases: builds the tables of the files as the agent does, walks, and keeps
//! what the walk met.
//!
//! `PODFLAME_STACKS=DIRECTORY cargo test -p podflame --lib record_cases` does it, on the machine that
//! has the files; `cargo xtask record-stacks` does that and what comes before.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    path::Path,
    sync::Arc,
};

use podflame_wire::{
    BY_FRAME_POINTER, StackEnd,
    unwind::{Cfa, Mapping, MappingKind, Page, Rule},
    walk::{AArch64, REGISTERS, Start, Target, WINDOW, X86_64},
};

use super::{
    super::space::{Part, add, add_without},
    OUTERMOST,
    case::{Case, none, walk},
    directory, judge,
};
use crate::{
    symbols,
    unwind::{self, FileTable, NoTable, Rules},
};

/// Words from the stack pointer on that are kept whether the walk reads them or not.
const KEPT: u64 = 48;

/// Why the walk may end before gdb does: program, its end, and the reason.
const EXPLAINED: &[(&str, StackEnd, &str)] = &[
    ("throws ", StackEnd::UnsupportedRule, "the resolver of glibc finds its caller by rbx"),
    ("node ", StackEnd::NoTable, "gdb knows no way out of code made at run time"),
    ("node ", StackEnd::Complete, "gdb knows no way out of code made at run time"),
    ("zoo-musl ", StackEnd::NoTable, "gdb guesses how musl's functions keep their stack"),
    ("zoo bare ", StackEnd::NoMapping, "assembler without information and without frame pointer"),
    (
        "zoo-fp bare ",
        StackEnd::Complete,
        "in assembler without information the frame pointer is the caller's",
    ),
    (
        "zoo-arm bare",
        StackEnd::Complete,
        "in assembler without information the frame pointer is the caller's",
    ),
    (
        "zoo-arm bare",
        StackEnd::NoTable,
        "in assembler without information the frame pointer is the caller's",
    ),
];

/// What gdb wrote of a stop.
#[derive(Default)]
struct Raw {
    name: String,
    machine: String,
    pc: u64,
    registers: Vec<u64>,
    maps: Vec<(u64, u64, u64, String)>,
    memory: Vec<(u64, Vec<u8>)>,
    gdb: Vec<u64>,
    stop: String,
}

fn parse(text: &str) -> Vec<Raw> {
    let mut raws: Vec<Raw> = Vec::new();
    let hex = |word: &str| u64::from_str_radix(word, 16).unwrap();
    for line in text.lines() {
        let (key, rest) = line.split_once(' ').unwrap();
        if key == "case" {
            raws.push(Raw { name: rest.into(), ..Raw::default() });
            continue;
        }
        let raw = raws.last_mut().unwrap();
        let mut words = rest.split(' ');
        let mut next = || words.next().unwrap();
        match key {
            "machine" => raw.machine = rest.into(),
            "pc" => raw.pc = hex(rest),
            "registers" => raw.registers = rest.split(' ').map(hex).collect(),
            "map" => {
                let (start, end, offset) = (hex(next()), hex(next()), hex(next()));
                let path = rest.splitn(4, ' ').nth(3).unwrap_or_default();
                raw.maps.push((start, end, offset, path.into()));
            }
            "mem" => {
                let (start, digits) = (hex(next()), next().as_bytes());
                let byte = |pair: &[u8]| hex(std::str::from_utf8(pair).unwrap()) as u8;
                raw.memory.push((start, digits.chunks(2).map(byte).collect()));
            }
            "gdb" => raw.gdb = rest.split(' ').map(hex).collect(),
            "stop" => raw.stop = rest.into(),
            _ => panic!("unknown line: {line}"),
        }
    }
    raws
}

/// Tables of files, each built once.
#[derive(Default)]
struct Tables {
    rules: Rules,
    numbers: HashMap<String, usize>,
    tables: Vec<Result<FileTable, NoTable>>,
    /// File and segment of each slot.
    slots: Vec<(usize, usize)>,
    parts: HashMap<usize, Vec<Part>>,
}

impl Tables {
    fn number(&mut self, path: &str, size: u64) -> usize {
        if let Some(number) = self.numbers.get(path) {
            return *number;
        }
        let file = match path {
            "[vdso]" => symbols::own_vdso(size),
            _ => File::open(path).ok(),
        };
        let table = file.map_or(Err(NoTable::Unreadable), |file| {
            unwind::build(&Arc::new(file), &mut self.rules, &unwind::Limits::default(), &mut || ())
        });
        let number = self.tables.len();
        if let Ok(table) = &table {
            let mut parts = Vec::new();
            for (index, segment) in table.segments.iter().enumerate() {
                let slot = self.slots.len() as u32;
                self.slots.push((number, index));
                let pages = segment.pages.len() as u32;
                parts.push(Part { base: segment.base, end: segment.end, slot, pages });
            }
            self.parts.insert(number, parts);
        }
        self.numbers.insert(path.into(), number);
        self.tables.push(table);
        number
    }

    /// The mappings as the agent makes them.
    fn space(&mut self, maps: &[(u64, u64, u64, String)]) -> Vec<Mapping> {
        let mut space = Vec::new();
        for (start, end, offset, path) in maps {
            if !path.starts_with(['/', '[']) {
                add_without(&mut space, *start, *end, MappingKind::NoTable);
                continue;
            }
            let number = self.number(path, end - start);
            match &self.tables[number] {
                Ok(table) => {
                    add(&mut space, (*start, *end, *offset), &table.loads, &self.parts[&number]);
                }
                Err(NoTable::Go) => {
                    add_without(&mut space, *start, *end, MappingKind::FramePointers);
                }
                Err(_) => add_without(&mut space, *start, *end, MappingKind::NoTable),
            }
        }
        space
    }

    fn pages(&self, slot: u32) -> &[Page] {
        let (file, segment) = self.slots[slot as usize];
        &self.tables[file].as_ref().unwrap().segments[segment].pages
    }

    /// The rows of a table around an address of it: the one before, the one that holds, the one behind.
    fn rows(&self, slot: u32, at: u32) -> Vec<(u32, Rule)> {
        let (file, segment) = self.slots[slot as usize];
        let segment = &self.tables[file].as_ref().unwrap().segments[segment];
        let rows: Vec<_> =
            segment.rows().map(|(a, rule)| ((a - segment.base) as u32, rule)).collect();
        let behind = rows.partition_point(|(start, _)| *start <= at);
        let near = &rows[behind.saturating_sub(2)..(behind + 1).min(rows.len())];
        let rule =
            |number: u16| if number == 0 { none() } else { *self.rules.get(number).unwrap() };
        near.iter().map(|(start, number)| (*start, rule(*number))).collect()
    }
}

/// A stop as the walk reads it, all of it.
struct Live<'a> {
    tables: &'a Tables,
    space: &'a [Mapping],
    memory: &'a BTreeMap<u64, u64>,
    read: RefCell<BTreeSet<u64>>,
}

impl Live<'_> {
    fn read(&self, address: u64, window: &mut [u64; WINDOW]) -> bool {
        let end = address + size_of_val(window) as u64;
        let mut any = false;
        window.fill(super::case::HOLE);
        for (at, word) in self.memory.range(address..end) {
            window[(at - address) as usize / 8] = *word;
            any = true;
        }
        self.read.borrow_mut().insert(address);
        any
    }
}

/// Implements `Target` for a machine by what is behind it.
macro_rules! machine {
    ($name:ident, $machine:ty) => {
        struct $name<'a>(&'a Live<'a>);

        impl Target for $name<'_> {
            type Machine = $machine;

            fn read(&self, address: u64, window: &mut [u64; WINDOW]) -> bool {
                self.0.read(address, window)
            }
            fn mapping(&self, index: u32) -> Option<&Mapping> {
                self.0.space.get(index as usize)
            }
            fn page(&self, table: u32, page: u32) -> Option<&Page> {
                self.0.tables.pages(table).get(page as usize)
            }
            fn rule(&self, index: u16) -> Option<&Rule> {
                self.0.tables.rules.get(index)
            }
        }
    };
}
machine!(LiveX86, X86_64);
machine!(LiveArm, AArch64);

/// Cuts off what gdb took for frames though it is no code, and what it guesses behind code that was made
/// at run time, from the bytes of that.
fn cut(raw: &mut Raw) {
    let path = |frame: &u64| {
        let holds = |(start, end, ..): &&(u64, u64, u64, String)| (start..end).contains(&frame);
        raw.maps.iter().find(holds).map(|(.., path)| path.as_str())
    };
    if let Some(wrong) = raw.gdb.iter().position(|frame| path(frame).is_none()) {
        raw.gdb.truncate(wrong);
        raw.stop = "no code".into();
    }
    if let Some(made) = raw.gdb.iter().position(|frame| path(frame) == Some("")) {
        raw.gdb.truncate(made + 1);
        raw.stop = "code made at run time".into();
    }
}

fn case(raw: &Raw, tables: &mut Tables) -> Case {
    let space = tables.space(&raw.maps);
    let arm = raw.machine == "aarch64";
    let mut start = Start { ip: raw.pc, mappings: space.len() as u32, ..Start::default() };
    let r = &raw.registers;
    (start.sp, start.fp, start.link) = if arm { (r[31], r[29], r[30]) } else { (r[7], r[6], 0) };
    let mut registers = [0; REGISTERS];
    registers.copy_from_slice(&r[..REGISTERS]);
    let mut memory = BTreeMap::new();
    for (from, bytes) in &raw.memory {
        let words = bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
        memory.extend(words.enumerate().map(|(n, word)| (from + 8 * n as u64, word)));
    }
    let tables = &*tables;
    let go = |memory: &BTreeMap<u64, u64>| {
        let live = Live { tables, space: &space, memory, read: RefCell::default() };
        let found = match arm {
            true => walk(&LiveArm(&live), start, registers),
            false => walk(&LiveX86(&live), start, registers),
        };
        (found, live.read.into_inner())
    };
    let ((frames, end), windows) = go(&memory);

    // The words on which the walk depends, with their neighbours.
    let mut kept: BTreeSet<u64> = (0..KEPT).map(|n| (start.sp & !7) + 8 * n).collect();
    for window in windows {
        // That it could be read matters too.
        kept.extend(memory.range(window..).next().map(|(at, _)| *at));
        for at in (window..window + 8 * WINDOW as u64).step_by(8) {
            let Some(word) = memory.insert(at, super::case::HOLE) else {
                memory.remove(&at);
                continue;
            };
            if go(&memory).0 != (frames.clone(), end) {
                kept.extend([at - 8, at, at + 8]);
            }
            memory.insert(at, word);
        }
    }
    memory.retain(|at, _| kept.contains(at));

    // The rows and mappings of all frames that anyone found.
    let mut met = BTreeSet::new();
    let mut rows = BTreeMap::new();
    for frame in frames.iter().chain(&raw.gdb) {
        for at in [frame & !BY_FRAME_POINTER, (frame & !BY_FRAME_POINTER) - 1] {
            let Some(index) = space.iter().position(|m| (m.start..m.end).contains(&at)) else {
                continue;
            };
            met.insert(index);
            let mapping = &space[index];
            if mapping.kind & 0xff == MappingKind::Table as u32 {
                let near = tables.rows(mapping.table, (at - mapping.bias) as u32);
                rows.extend(near.into_iter().map(|(start, rule)| ((mapping.table, start), rule)));
            }
        }
    }
    let by_register = rows.values().filter(|rule: &&Rule| rule.cfa == Cfa::Register as u8);
    let named: BTreeSet<usize> = by_register.map(|rule| rule.cfa_register.into()).collect();
    for (number, value) in registers.iter_mut().enumerate() {
        *value *= u64::from(named.contains(&number));
    }
    let one_page = |index: usize| {
        let mut mapping = space[index];
        let table = mapping.kind & 0xff == MappingKind::Table as u32;
        mapping.kind = mapping.kind & 0xff | u32::from(table) << 8;
        mapping
    };
    let mut case = Case {
        name: raw.name.clone(),
        machine: raw.machine.clone(),
        start: Start { mappings: 0, ..start },
        registers,
        mappings: met.into_iter().map(one_page).collect(),
        rows,
        memory,
        gdb: raw.gdb.clone(),
        stop: raw.stop.clone(),
        end: end.name().into(),
        differs: None,
    };
    let plain = frames.iter().map(|frame| frame & !BY_FRAME_POINTER);
    if plain.eq(raw.gdb.iter().copied()) && raw.stop != OUTERMOST {
        case.differs = Some("gdb goes no further either".into());
    } else if judge(&case, &frames, end).is_err() {
        let why =
            |(name, of, _): &&(&str, StackEnd, &str)| raw.name.starts_with(name) && *of == end;
        case.differs = EXPLAINED.iter().find(why).map(|(_, _, why)| (*why).into());
    }
    case
}

#[test]
fn record_cases() {
    let Some(raw) = std::env::var_os("PODFLAME_STACKS") else { return };
    let mut tables = Tables::default();
    fs::create_dir_all(directory()).unwrap();
    for entry in fs::read_dir(Path::new(&raw)).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "raw") {
            continue;
        }
        let mut raws = parse(&fs::read_to_string(&path).unwrap());
        raws.iter_mut().for_each(cut);
        let text: String = raws.iter().map(|raw| case(raw, &mut tables).text()).collect();
        let name = path.with_extension("cases");
        fs::write(directory().join(name.file_name().unwrap()), text).unwrap();
    }
}
