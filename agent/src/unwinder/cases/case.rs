//! A recorded stop of a program: what a walk reads of it, what gdb says of it, and its text form.
//!
//! A file holds the cases of one program. Numbers are hexadecimal, but for those of tables and rules.
//!
//! ```text
//! case NAME
//! machine x86_64
//! start IP SP FP LINK
//! register NUMBER VALUE              only those that a rule names
//! map START END BIAS TABLE KIND      those that were met; each table has one page here
//! row TABLE START RULE               the rows met, each with the one before and the one behind it
//! mem ADDRESS WORD...                stack; what is not listed cannot be read, or reads as `HOLE`
//! gdb ADDRESS...                     gdb's frames, innermost first
//! stop REASON                        why gdb stopped
//! end REASON                         why the walk stopped
//! differs WHY                        only where the walk has fewer frames than gdb
//! ```

use std::{cell::RefCell, collections::BTreeMap, fmt::Write as _};

use podflame_wire::{
    MAX_FRAMES, StackEnd,
    hop::RuleCache,
    unwind::{Cfa, Mapping, MappingKind, NO_ROW, NO_RULE, PAGE_ROWS, Page, Rule, Saved},
    walk::{REGISTERS, Start, Target, WINDOW, Walk},
};

/// What a word reads as that was not recorded, though one near it was: no address.
pub(super) const HOLE: u64 = 0xaaaa_aaaa_aaaa_aaaa;

/// A stop.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Case {
    pub(super) name: String,
    pub(super) machine: String,
    pub(super) start: Start,
    pub(super) registers: [u64; REGISTERS],
    pub(super) mappings: Vec<Mapping>,
    pub(super) rows: BTreeMap<(u32, u32), Rule>,
    pub(super) memory: BTreeMap<u64, u64>,
    pub(super) gdb: Vec<u64>,
    pub(super) stop: String,
    pub(super) end: String,
    pub(super) differs: Option<String>,
}

/// What a walk finds: frames as it marks them, and why it ended. It finds the same the short way, be the
/// rules remembered or not.
pub(super) fn walk<T: Target>(
    target: &T,
    mut start: Start,
    registers: [u64; REGISTERS],
) -> (Vec<u64>, StackEnd) {
    let walk = |start: &Start, next: &dyn Fn(&mut Walk) -> u64| {
        let mut walk = Walk::new();
        walk.registers = registers;
        walk.begin(start);
        let mut out = [0; (MAX_FRAMES + 1).next_power_of_two()];
        let (count, end) = walk.run::<T, _>(next, &mut out, 0);
        (out[..count].to_vec(), end)
    };
    let found = walk(&start, &|walk| walk.step(target));
    let remembering = Remembering(target, RefCell::new(RuleCache::new()));
    start.generation = 7;
    for _ in 0..2 {
        let short = walk(&start, &|walk| match walk.hop(&remembering) {
            0 => walk.step(&remembering),
            frame => frame,
        });
        assert_eq!(short, found);
    }
    found
}

/// What is behind it, and the rules that were used.
struct Remembering<'a, T>(&'a T, RefCell<RuleCache>);

impl<T: Target> Target for Remembering<'_, T> {
    type Machine = T::Machine;

    fn read(&self, address: u64, window: &mut [u64; WINDOW]) -> bool {
        self.0.read(address, window)
    }
    fn mapping(&self, index: u32) -> Option<&Mapping> {
        self.0.mapping(index)
    }
    fn page(&self, table: u32, page: u32) -> Option<&Page> {
        self.0.page(table, page)
    }
    fn rule(&self, index: u16) -> Option<&Rule> {
        self.0.rule(index)
    }
    fn recall(&self, at: u64, generation: u32) -> u32 {
        self.1.borrow().get(at, generation)
    }
    fn remember(&self, at: u64, generation: u32, rule: u32) {
        self.1.borrow_mut().put(at, generation, rule);
    }
}

/// A case as the walk reads it.
pub(super) struct Replay<'a> {
    case: &'a Case,
    pages: BTreeMap<u32, Page>,
    rules: Vec<Rule>,
}

impl<'a> Replay<'a> {
    pub(super) fn new(case: &'a Case) -> Self {
        let empty = Page { start: [NO_ROW; PAGE_ROWS], rule: [NO_RULE; PAGE_ROWS] };
        let mut replay = Self { case, pages: BTreeMap::new(), rules: vec![none()] };
        for (&(table, start), &rule) in &case.rows {
            let page = replay.pages.entry(table).or_insert(empty);
            let row = page.start.iter().position(|start| *start == NO_ROW).unwrap();
            let known = replay.rules.iter().position(|known| *known == rule);
            let index = known.unwrap_or_else(|| {
                replay.rules.push(rule);
                replay.rules.len() - 1
            });
            (page.start[row], page.rule[row]) = (start, u16::try_from(index).unwrap());
        }
        replay
    }

    fn read(&self, address: u64, window: &mut [u64; WINDOW]) -> bool {
        let words = self.case.memory.range(address..address + size_of_val(window) as u64);
        let mut any = false;
        window.fill(HOLE);
        for (at, word) in words {
            window[(at - address) as usize / 8] = *word;
            any = true;
        }
        any
    }

    /// Walks as the case's machine does.
    pub(super) fn walk(&self) -> (Vec<u64>, StackEnd) {
        let mut start = self.case.start;
        (start.first, start.mappings) = (0, self.case.mappings.len() as u32);
        match self.case.machine.as_str() {
            "aarch64" => walk(&AArch64(self), start, self.case.registers),
            _ => walk(&X86_64(self), start, self.case.registers),
        }
    }
}

/// Implements `Target` for a machine by what is behind it.
macro_rules! machine {
    ($name:ident, $machine:ty) => {
        struct $name<'a>(&'a Replay<'a>);

        impl Target for $name<'_> {
            type Machine = $machine;

            fn read(&self, address: u64, window: &mut [u64; WINDOW]) -> bool {
                self.0.read(address, window)
            }
            fn mapping(&self, index: u32) -> Option<&Mapping> {
                self.0.case.mappings.get(index as usize)
            }
            fn page(&self, table: u32, page: u32) -> Option<&Page> {
                self.0.pages.get(&table).filter(|_| page == 0)
            }
            fn rule(&self, index: u16) -> Option<&Rule> {
                self.0.rules.get(usize::from(index))
            }
        }
    };
}
machine!(X86_64, podflame_wire::walk::X86_64);
machine!(AArch64, podflame_wire::walk::AArch64);

/// The rule of code for which the file says nothing.
pub(super) fn none() -> Rule {
    Rule {
        cfa: Cfa::None as u8,
        cfa_register: 0,
        ra: Saved::Same as u8,
        fp: Saved::Same as u8,
        cfa_offset: 0,
        cfa_add: 0,
        ra_offset: 0,
        fp_offset: 0,
    }
}

impl Case {
    /// The text of a case.
    pub(super) fn text(&self) -> String {
        let mut out = format!("case {}\nmachine {}\n", self.name, self.machine);
        let s = &self.start;
        writeln!(out, "start {:x} {:x} {:x} {:x}", s.ip, s.sp, s.fp, s.link).unwrap();
        for (number, value) in self.registers.iter().enumerate().filter(|(_, value)| **value != 0) {
            writeln!(out, "register {number} {value:x}").unwrap();
        }
        for m in &self.mappings {
            let kind = MappingKind::from_number(m.kind & 0xff).unwrap().name();
            writeln!(out, "map {:x} {:x} {:x} {} {kind}", m.start, m.end, m.bias, m.table).unwrap();
        }
        for ((table, start), r) in &self.rows {
            let cfa = Cfa::from_number(r.cfa).unwrap().name();
            let ra = Saved::from_number(r.ra).unwrap().name();
            let fp = Saved::from_number(r.fp).unwrap().name();
            writeln!(
                out,
                "row {table} {start:x} {cfa} {} {} {} {ra} {} {fp} {}",
                r.cfa_register, r.cfa_offset, r.cfa_add, r.ra_offset, r.fp_offset
            )
            .unwrap();
        }
        let mut next = None;
        for (at, word) in &self.memory {
            match next {
                Some(next) if next == *at => {}
                Some(_) => write!(out, "\nmem {at:x}").unwrap(),
                None => write!(out, "mem {at:x}").unwrap(),
            }
            write!(out, " {word:x}").unwrap();
            next = Some(at + 8);
        }
        let frames: Vec<_> = self.gdb.iter().map(|frame| format!("{frame:x}")).collect();
        writeln!(out, "\ngdb {}\nstop {}\nend {}", frames.join(" "), self.stop, self.end).unwrap();
        if let Some(why) = &self.differs {
            writeln!(out, "differs {why}").unwrap();
        }
        out
    }

    /// All cases of a file.
    pub(super) fn parse(text: &str) -> Vec<Self> {
        let mut cases = Vec::new();
        for line in text.lines() {
            let (key, rest) = line.split_once(' ').unwrap();
            let words: Vec<&str> = rest.split(' ').collect();
            let hex = |index: usize| u64::from_str_radix(words[index], 16).unwrap();
            if key == "case" {
                cases.push(Self { name: rest.into(), ..Self::default() });
                continue;
            }
            let case = cases.last_mut().unwrap();
            match key {
                "machine" => case.machine = rest.into(),
                "start" => {
                    let (ip, sp, fp, link) = (hex(0), hex(1), hex(2), hex(3));
                    case.start = Start { ip, sp, fp, link, ..Start::default() };
                }
                "register" => case.registers[words[0].parse::<usize>().unwrap()] = hex(1),
                "map" => case.mappings.push(mapping(&words)),
                "row" => {
                    let place = (words[0].parse().unwrap(), hex(1) as u32);
                    case.rows.insert(place, rule(&words[2..]));
                }
                "mem" => case.memory.extend(
                    words[1..].iter().enumerate().map(|(n, _)| (hex(0) + 8 * n as u64, hex(n + 1))),
                ),
                "gdb" => case.gdb = (0..words.len()).map(hex).collect(),
                "stop" => case.stop = rest.into(),
                "end" => case.end = rest.into(),
                "differs" => case.differs = Some(rest.into()),
                _ => panic!("unknown line: {line}"),
            }
        }
        cases
    }
}

fn mapping(words: &[&str]) -> Mapping {
    let hex = |index: usize| u64::from_str_radix(words[index], 16).unwrap();
    let kind = *MappingKind::ALL.iter().find(|kind| kind.name() == words[4]).unwrap() as u32;
    let pages = u32::from(kind == MappingKind::Table as u32);
    Mapping {
        start: hex(0),
        end: hex(1),
        bias: hex(2),
        table: words[3].parse().unwrap(),
        kind: kind | pages << 8,
    }
}

fn rule(words: &[&str]) -> Rule {
    let saved = |word: &str| *Saved::ALL.iter().find(|saved| saved.name() == word).unwrap() as u8;
    Rule {
        cfa: *Cfa::ALL.iter().find(|cfa| cfa.name() == words[0]).unwrap() as u8,
        cfa_register: words[1].parse().unwrap(),
        cfa_offset: words[2].parse().unwrap(),
        cfa_add: words[3].parse().unwrap(),
        ra: saved(words[4]),
        ra_offset: words[5].parse().unwrap(),
        fp: saved(words[6]),
        fp_offset: words[7].parse().unwrap(),
    }
}
