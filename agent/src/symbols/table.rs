//! The functions of an ELF symbol table, or of Go's own, sorted, 16 bytes each.
//!
//! Names stay in the file and are read when one is asked for: a process has tens of thousands of
//! functions, of which a profile shows a few hundred, and those are cached as results.

use object::elf;

use super::{
    Unknown,
    elf::{Elf, Fields, Section},
    go,
    names::RAW_NAME,
};

/// Bytes of symbols that are read at once.
const CHUNK: u64 = 24 * 4096;
/// How many symbols that start before an address are asked whether they reach over it. Symbols
/// nest (an entry point within a function), but not deeply.
const NESTED: usize = 8;
/// Marks a name in the string table of `.dynsym`.
const DYNAMIC: u32 = 1 << 31;
/// Marks a name that a record of Go says.
const GO: u32 = 1 << 30;

/// Functions by address.
#[derive(Debug, Default)]
pub(super) struct Table {
    entries: Box<[Entry]>,
    /// Offset and size of the string tables of `.symtab` and of `.dynsym`.
    strings: [(u64, u64); 2],
    /// The names of Go's functions.
    go: Option<go::Names>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    start: u64,
    size: u32,
    name: u32,
}

/// A symbol while the table is built; a lower rank is the better name for the same address.
#[derive(Clone, Copy)]
struct Candidate {
    entry: Entry,
    section: u16,
    rank: u8,
}

impl Table {
    /// Bytes an entry takes.
    pub(super) const ENTRY: usize = size_of::<Entry>();

    /// Reads the symbol tables of a file, `most` symbols at most. Where there are more, `.dynsym`
    /// alone is tried. A Go program without `.symtab` names its functions itself.
    pub(super) fn read(elf: &Elf, sections: &[Section], most: u64) -> Result<Self, Unknown> {
        let mut table = Self::default();
        let mut candidates = Vec::new();
        let mut refused = None;
        for (which, kind) in [elf::SHT_SYMTAB.0, elf::SHT_DYNSYM.0].into_iter().enumerate() {
            let Some(section) = sections.iter().find(|s| s.kind == kind) else { continue };
            let Some(strings) = sections.get(section.link).and_then(|s| elf.plain(s)) else {
                continue;
            };
            if let Some(place) = table.strings.get_mut(which) {
                *place = strings;
            }
            let dynamic = if which == 1 { DYNAMIC } else { 0 };
            if let Err(unknown) = collect(elf, section, sections, dynamic, most, &mut candidates) {
                refused = Some(unknown);
            }
        }
        if !sections.iter().any(|section| section.kind == elf::SHT_SYMTAB.0) {
            match go::read(elf, sections, most) {
                Ok(Some((names, functions))) => {
                    table.go = Some(names);
                    candidates.extend(functions.into_iter().filter_map(of_go));
                }
                Ok(None) => {}
                Err(unknown) => refused = Some(unknown),
            }
        }
        if candidates.is_empty() {
            return refused.map_or(Ok(table), Err);
        }
        table.entries = table.settle(elf, candidates, sections);
        Ok(table)
    }

    /// How many functions there are.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The name, mangled, of the function at an address.
    pub(super) fn find(&self, elf: &Elf, address: u64) -> Option<Vec<u8>> {
        let after = self.entries.partition_point(|e| e.start <= address);
        let before = self.entries.get(..after)?;
        let entry =
            before.iter().rev().take(NESTED).find(|e| address - e.start < u64::from(e.size))?;
        let name = self.name(elf, entry.name, RAW_NAME);
        (!name.is_empty()).then_some(name)
    }

    /// Sorts, keeps the best name of each address, and ends symbols without a size.
    fn settle(
        &self,
        elf: &Elf,
        mut candidates: Vec<Candidate>,
        sections: &[Section],
    ) -> Box<[Entry]> {
        candidates.sort_unstable_by_key(|c| (c.entry.start, c.rank, c.entry.name));
        candidates.dedup_by(|next, kept| {
            let same = next.entry.start == kept.entry.start;
            if same && next.rank == kept.rank && next.entry.name != kept.entry.name {
                let plain = |c: &Candidate| {
                    let name = self.name(elf, c.entry.name, 256);
                    (name.starts_with(b"_"), name.len())
                };
                if plain(next) < plain(kept) {
                    std::mem::swap(next, kept);
                }
            }
            same
        });
        let mut following = None;
        for c in candidates.iter_mut().rev() {
            if c.entry.size == 0 {
                let section = sections.get(usize::from(c.section));
                let end = section.map_or(0, |s| s.address.saturating_add(s.size));
                let end = following.map_or(end, |next: u64| end.min(next));
                let size = end.saturating_sub(c.entry.start);
                c.entry.size = u32::try_from(size).unwrap_or(u32::MAX);
            }
            following = Some(c.entry.start);
        }
        candidates.iter().map(|c| c.entry).collect()
    }

    /// Reads a name of at most `most` bytes; empty if there is none.
    fn name(&self, elf: &Elf, name: u32, most: usize) -> Vec<u8> {
        let ((offset, size), within) = match &self.go {
            Some(names) if name & GO != 0 => match names.name(elf, name & !GO) {
                Some(within) => (names.strings, within),
                None => return Vec::new(),
            },
            _ => (self.strings[usize::from(name & DYNAMIC != 0)], u64::from(name & !DYNAMIC)),
        };
        let left = usize::try_from(size.saturating_sub(within)).unwrap_or(usize::MAX).min(most);
        let mut bytes = Vec::new();
        // Most names are short: one small read does, and the next one is larger.
        let mut step = 128;
        while bytes.len() < left {
            let had = bytes.len();
            bytes.resize(left.min(had + step), 0);
            let buffer = bytes.get_mut(had..).unwrap_or_default();
            let read = elf.read_some(offset.saturating_add(within + had as u64), buffer);
            let fresh = buffer.get(..read).unwrap_or_default();
            if let Some(nul) = fresh.iter().position(|b| *b == 0) {
                bytes.truncate(had + nul);
                break;
            }
            bytes.truncate(had + read);
            if read == 0 {
                break;
            }
            step *= 8;
        }
        bytes
    }
}

fn collect(
    elf: &Elf,
    table: &Section,
    sections: &[Section],
    dynamic: u32,
    most: u64,
    into: &mut Vec<Candidate>,
) -> Result<(), Unknown> {
    let symbol = if elf.wide() { 24 } else { 16 };
    let (mut offset, size) = elf.plain(table).ok_or(Unknown::Malformed)?;
    if size / symbol > most {
        return Err(Unknown::TooLarge);
    }
    let end = offset + size / symbol * symbol;
    while offset < end {
        let bytes = elf.read(offset, CHUNK.min(end - offset) / symbol * symbol, CHUNK)?;
        let symbols = bytes.chunks_exact(symbol as usize);
        into.extend(symbols.filter_map(|b| candidate(elf, &Fields(b), sections, dynamic)));
        offset += bytes.len() as u64;
    }
    Ok(())
}

/// A function that Go names. Another name for its address is the better one.
fn of_go(function: go::Function) -> Option<Candidate> {
    let go::Function { start, size, record } = function;
    let entry = Entry { start, size, name: record | GO };
    (size > 0 && record & (DYNAMIC | GO) == 0).then_some(Candidate { entry, section: 0, rank: 16 })
}

/// The symbol, if it may be a function.
fn candidate(elf: &Elf, f: &Fields<'_>, sections: &[Section], dynamic: u32) -> Option<Candidate> {
    let (info, section, start, size) = if elf.wide() {
        (f.u8(4), f.u16(6), f.u64(8), f.u64(16))
    } else {
        (f.u8(12), f.u16(14), f.u32(4).into(), f.u32(8).into())
    };
    let name = f.u32(0);
    if section == elf::SHN_UNDEF.0 || start == 0 || name == 0 || name & (DYNAMIC | GO) != 0 {
        return None;
    }
    let function = match info & 0xf {
        kind if kind == elf::STT_FUNC.0 || kind == elf::STT_GNU_IFUNC.0 => true,
        // Assembly code that does not say what it is. Local ones are labels within functions, and
        // on Arm marks of where code and data begin.
        kind if kind == elf::STT_NOTYPE.0
            && info >> 4 != elf::STB_LOCAL.0
            && sections.get(usize::from(section)).is_some_and(Section::executable) =>
        {
            false
        }
        _ => return None,
    };
    let binding = match info >> 4 {
        b if b == elf::STB_GLOBAL.0 => 0,
        b if b == elf::STB_WEAK.0 => 1,
        _ => 2,
    };
    let rank = if function { 0 } else { 8 } + if size == 0 { 4 } else { 0 } + binding;
    let entry =
        Entry { start, size: u32::try_from(size).unwrap_or(u32::MAX), name: name | dynamic };
    Some(Candidate { entry, section, rank })
}
