//! The functions that a Go program knows of itself (`.gopclntab`), for programs whose symbol table was
//! stripped: Go needs this one at run time, so that it is always there.
//!
//! A header, a table of functions by address, and for each function a record that says where its name is
//! (`pcHeader`, `functab` and `_func` in Go's `src/runtime/symtab.go` and `runtime2.go`; three layouts, of
//! Go 1.2, 1.16 and 1.18, are read). The table is read when the file is first seen, a name when one is
//! asked for.

use super::{
    Unknown,
    elf::{Elf, Fields, Section},
};

/// Where a Go program keeps it, and where older linkers put it in position-independent ones.
const SECTIONS: [&str; 2] = [".gopclntab", ".data.rel.ro.gopclntab"];
/// The section of Go's own code.
const TEXT: &str = ".text";
/// Bytes of the table that are read at once: a multiple of the size of every entry.
const CHUNK: u64 = 16 * 4096;
/// Most bytes of a header.
const HEADER: u64 = 72;

/// Where the names are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names {
    /// Offset in the file from which records of functions are counted.
    records: u64,
    /// Where in a record it says which name.
    field: u64,
    /// Offset and size in the file of the names.
    pub(super) strings: (u64, u64),
}

/// A function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Function {
    /// Address.
    pub(super) start: u64,
    /// Bytes of code.
    pub(super) size: u32,
    /// Its record, to be asked for its [`Names::name`].
    pub(super) record: u32,
}

/// What differs between the layouts.
struct Layout {
    /// Words of the header before the offsets of names and of functions.
    names_at: u64,
    functions_at: u64,
    /// Addresses in the table are counted from here; `None`: they are whole.
    text: Option<u64>,
}

/// Reads the table of a file, `most` functions at most; `None` if it has none.
///
/// # Errors
/// When the file does not follow the format, cannot be read, or holds more.
pub(super) fn read(
    elf: &Elf,
    sections: &[Section],
    most: u64,
) -> Result<Option<(Names, Vec<Function>)>, Unknown> {
    let named = |section: &&Section| SECTIONS.contains(&section.name.as_str());
    let Some(section) = sections.iter().find(named) else { return Ok(None) };
    let (start, len) = elf.plain(section).ok_or(Unknown::Malformed)?;
    let header = elf.read(start, HEADER.min(len), HEADER)?;
    let header = Fields(&header);
    let wide = match header.u8(7) {
        8 => true,
        4 => false,
        _ => return Err(Unknown::Malformed),
    };
    let size: u64 = if wide { 8 } else { 4 };
    let word = |at: u64| -> u64 {
        let at = (8 + at * size) as usize;
        if wide { header.u64(at) } else { header.u32(at).into() }
    };
    let text = sections.iter().find(|section| section.name == TEXT).map(|text| text.address);
    let layout = match header.u32(0) {
        0xffff_fffb => Layout { names_at: u64::MAX, functions_at: u64::MAX, text: None },
        0xffff_fffa => Layout { names_at: 2, functions_at: 6, text: None },
        0xffff_fff0 | 0xffff_fff1 => {
            // The linker leaves it 0 where it is to be relocated, and in the newest versions always.
            let start = Some(word(2)).filter(|start| *start != 0).or(text);
            Layout { names_at: 3, functions_at: 7, text: Some(start.ok_or(Unknown::Malformed)?) }
        }
        _ => return Err(Unknown::Malformed),
    };
    let count = word(0);
    if count > most {
        return Err(Unknown::TooLarge);
    }
    // Before Go 1.16 the table follows the header, and all else is counted from the header's start.
    let old = layout.names_at == u64::MAX;
    let (names, functions) = match old {
        true => (0, 8 + size),
        false => (word(layout.names_at), word(layout.functions_at)),
    };
    let records = if old { start } else { start.saturating_add(functions) };
    let entry = if layout.text.is_some() { 4 } else { size };
    let left = |offset: u64| len.checked_sub(offset).ok_or(Unknown::Malformed);
    // The table ends with the address behind the last function.
    if left(functions)? < count * 2 * entry + entry {
        return Err(Unknown::Malformed);
    }
    let names =
        Names { records, field: entry, strings: (start.saturating_add(names), left(names)?) };
    let table = (start + functions, count, entry);
    Ok(Some((names, functions_of(elf, table, layout.text.unwrap_or(0))?)))
}

fn functions_of(
    elf: &Elf,
    (mut offset, count, entry): (u64, u64, u64),
    text: u64,
) -> Result<Vec<Function>, Unknown> {
    let mut functions: Vec<Function> = Vec::new();
    let end = offset + count * 2 * entry + entry;
    while offset < end {
        let bytes = elf.read(offset, CHUNK.min(end - offset), CHUNK)?;
        offset += bytes.len() as u64;
        for pair in bytes.chunks(2 * entry as usize).map(Fields) {
            let (address, record) = match entry {
                4 => (pair.u32(0).into(), pair.u32(4).into()),
                _ => (pair.u64(0), pair.u64(8)),
            };
            let start = text.checked_add(address).ok_or(Unknown::Malformed)?;
            if let Some(last) = functions.last_mut() {
                let size = start.checked_sub(last.start).ok_or(Unknown::Malformed)?;
                last.size = u32::try_from(size).unwrap_or(u32::MAX);
            }
            let record = u32::try_from(record).map_err(|_| Unknown::Malformed)?;
            functions.push(Function { start, size: 0, record });
        }
    }
    // What is behind the last function is none.
    functions.pop();
    Ok(functions)
}

impl Names {
    /// Where the name of a function is, counted from where names are.
    pub(super) fn name(&self, elf: &Elf, record: u32) -> Option<u64> {
        let at = self.records.checked_add(record.into())?.checked_add(self.field)?;
        let bytes = elf.read(at, 4, 4).ok()?;
        Some(Fields(&bytes).u32(0).into())
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

    use std::{io::Write as _, sync::Arc};

    use proptest::prelude::*;

    use super::{super::sys, super::table::Table, *};

    const TEXT_AT: u64 = 0x40_1000;

    /// An ELF file with Go's code at [`TEXT_AT`] and that table, and no symbols.
    fn elf(pclntab: &[u8]) -> Elf {
        let names = b"\0.text\0.gopclntab\0.shstrtab\0";
        let mut bytes = vec![0_u8; 64];
        bytes[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
        bytes[16..20].copy_from_slice(&[2, 0, 62, 0]);
        let pclntab_at = bytes.len() as u64;
        bytes.extend_from_slice(pclntab);
        let names_at = bytes.len() as u64;
        bytes.extend_from_slice(names);
        let sections_at = bytes.len() as u64;
        let sections: [(u32, u32, u64, u64, u64); 4] = [
            (0, 0, 0, 0, 0),
            (1, 8, TEXT_AT, 64, 0x1000),
            (7, 1, 0, pclntab_at, pclntab.len() as u64),
            (18, 3, 0, names_at, names.len() as u64),
        ];
        for (name, kind, address, offset, size) in sections {
            let mut header = [0_u8; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[4..8].copy_from_slice(&kind.to_le_bytes());
            header[16..24].copy_from_slice(&address.to_le_bytes());
            header[24..32].copy_from_slice(&offset.to_le_bytes());
            header[32..40].copy_from_slice(&size.to_le_bytes());
            bytes.extend_from_slice(&header);
        }
        bytes[40..48].copy_from_slice(&sections_at.to_le_bytes());
        bytes[52..54].copy_from_slice(&64_u16.to_le_bytes());
        bytes[58..64].copy_from_slice(&[64, 0, 4, 0, 3, 0]);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        let (file, metadata) = sys::open(file.path()).unwrap();
        Elf::open(Arc::new(file), &metadata).unwrap()
    }

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn halves(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    const NAMES: &[u8] = b"main.main\0main.fib\0";

    /// `main.main` from 0x20 on and `main.fib` from 0x80 to 0x100, in the layout of a version of Go.
    fn pclntab(version: u32, text_start: u64) -> Vec<u8> {
        let magic: u32 = match version {
            2 => 0xffff_fffb,
            16 => 0xffff_fffa,
            18 => 0xffff_fff0,
            _ => 0xffff_fff1,
        };
        let mut bytes = [&magic.to_le_bytes()[..], &[0, 0, 1, 8]].concat();
        match version {
            2 => {
                bytes.extend(words(&[2]));
                // Five words of the table, two records of 16 bytes, and the names.
                let (records, names) = (16 + 40, 16 + 40 + 32);
                let [a, b, end] = [0x20, 0x80, 0x100].map(|at| TEXT_AT + at);
                bytes.extend(words(&[a, records, b, records + 16, end]));
                bytes.extend(words(&[a, names, b, names + 10]));
                bytes.extend(NAMES);
            }
            16 => {
                let names = 8 + 7 * 8;
                let functions = names + NAMES.len() as u64;
                bytes.extend(words(&[2, 0, names, 0, 0, 0, functions]));
                bytes.extend(NAMES);
                let [a, b, end] = [0x20, 0x80, 0x100].map(|at| TEXT_AT + at);
                bytes.extend(words(&[a, 40, b, 56, end]));
                bytes.extend(words(&[a, 0, b, 10]));
            }
            _ => {
                let names = 8 + 8 * 8;
                let functions = names + NAMES.len() as u64;
                bytes.extend(words(&[2, 0, text_start, names, 0, 0, 0, functions]));
                bytes.extend(NAMES);
                bytes.extend(halves(&[0x20, 20, 0x80, 28, 0x100]));
                bytes.extend(halves(&[0x20, 0, 0x80, 10]));
            }
        }
        bytes
    }

    #[test]
    fn functions_of_every_layout_have_their_names() {
        for (version, text_start) in [(2, 0), (16, 0), (18, TEXT_AT), (20, TEXT_AT), (26, 0)] {
            let elf = elf(&pclntab(version, text_start));
            let table = Table::read(&elf, &elf.sections().unwrap(), 100).unwrap();
            let name = |at: u64| table.find(&elf, TEXT_AT + at).map(String::from_utf8);
            let [main, fib] = ["main.main", "main.fib"].map(|name| Some(Ok(name.to_owned())));
            assert_eq!(
                [name(0x20), name(0x7f), name(0x80), name(0xff)],
                [main.clone(), main, fib.clone(), fib]
            );
            assert_eq!([name(0x1f), name(0x100)], [None, None], "Go 1.{version}");
        }
    }

    #[test]
    fn more_functions_than_there_is_room_for_are_refused() {
        let elf = elf(&pclntab(20, TEXT_AT));
        let found = read(&elf, &elf.sections().unwrap(), 1);
        assert_eq!(found.unwrap_err(), Unknown::TooLarge);
    }

    proptest! {
        #[test]
        fn whatever_is_in_the_table(
            version in prop::sample::select(vec![2_u32, 16, 18, 20]),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = pclntab(version, TEXT_AT);
            for (index, value) in changes {
                let at = index.index(bytes.len());
                bytes[at] = value;
            }
            bytes.truncate(1 + cut.index(bytes.len()));
            let (elf, most) = (elf(&bytes), bytes.len());
            if let Ok(table) = Table::read(&elf, &elf.sections().unwrap(), 100) {
                for at in [0x20, 0x7f, 0x80, 0xff, 0x100] {
                    prop_assert!(table.find(&elf, TEXT_AT + at).is_none_or(|name| name.len() < most));
                }
            }
        }
    }
}
