//! Whether a process runs CPython, which version, and where: from its mappings and the symbols of the
//! files behind them, without its cooperation. An interpreter that cannot be walked is refused with the
//! reason, once for each file.

use std::{fs::File, sync::Arc};

use hashbrown::HashMap;
use podflame_wire::python::Process;
use tracing::info;

use super::{
    offsets,
    version::{Version, version},
};
use crate::{
    event::ProcessKey,
    symbols::{
        Sighting,
        elf::{Elf, Fields, Section},
        sight::FileKey,
    },
};

/// Most files that are remembered as interpreters or not; beyond it all are forgotten. Each costs some
/// 150 bytes, and a millisecond to look at again.
const FILES: usize = 1024;
/// Most bytes of a table of symbols or of their names. A static interpreter with debug symbols has some
/// 20,000 symbols.
const SYMBOLS: u64 = 32 << 20;
/// Most parts of the interpreter's loop: the compiler may put what is seldom run apart.
const PARTS: usize = 4;

/// The loop that runs Python code (`Python/ceval.c`).
const LOOP: &[u8] = b"_PyEval_EvalFrameDefault";

/// An interpreter in a file; addresses are the file's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Interpreter {
    version: Option<Version>,
    runtime: u64,
    code_type: u64,
    loops: Vec<(u64, u64)>,
}

/// A process that runs Python.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Its version.
    pub version: Version,
    /// What the walk in the kernel needs.
    pub process: Process,
    /// Address of `PyCode_Type`.
    pub code_type: u64,
    /// Where the interpreter's loop is: the first address of each part, and the first behind it.
    pub loops: Vec<(u64, u64)>,
}

impl Program {
    /// Whether an address is in the interpreter's loop.
    #[must_use]
    pub fn is_loop(&self, address: u64) -> bool {
        self.loops.iter().any(|(start, end)| (*start..*end).contains(&address))
    }
}

/// Looks for interpreters, and remembers the files.
#[derive(Debug, Default)]
pub struct Discovery {
    files: HashMap<FileKey, Option<Arc<Interpreter>>, foldhash::fast::RandomState>,
}

impl Discovery {
    /// The interpreter that a process runs, if it is one that can be walked.
    pub fn look(&mut self, process: ProcessKey, seen: &Sighting) -> Option<Program> {
        for (start, offset, name, key, file) in seen.code_files() {
            let Some(named) = named(&name) else { continue };
            if self.files.len() >= FILES {
                self.files.clear();
            }
            let known = self.files.entry(key).or_insert_with(|| {
                let path = String::from_utf8_lossy(&name);
                match interpreter(file, named) {
                    Ok(found) => found.map(Arc::new),
                    Err(reason) => {
                        info!(file = ?path, reason, "Python frames are left out");
                        None
                    }
                }
            });
            let Some(found) = known else { continue };
            let Some(version) = found.version else { continue };
            let Ok(elf) = elf(file) else { continue };
            let Some(address) = elf.address(offset) else { continue };
            let bias = start.wrapping_sub(address);
            return Some(Program {
                version,
                process: Process {
                    start_ns: process.start_ns,
                    exec_id: process.exec_id,
                    pad: 0,
                    runtime: found.runtime.wrapping_add(bias),
                    layout: version.layout,
                },
                code_type: found.code_type.wrapping_add(bias),
                loops: (found.loops.iter())
                    .map(|(start, end)| (start.wrapping_add(bias), end.wrapping_add(bias)))
                    .collect(),
            });
        }
        None
    }
}

/// What the name of a file says of an interpreter in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Named {
    /// The 11 of `python3.11`.
    minor: Option<u8>,
    /// `t`: without the global lock; `d`: with the checks of developers.
    flavour: Option<u8>,
}

/// Reads `python3.11`, `libpython3.11.so.1.0` and the like. Files of other names are not looked into: a
/// program that has an interpreter built in, such as some builds of uWSGI, shows native frames only.
fn named(path: &[u8]) -> Option<Named> {
    let name = path.rsplit(|b| *b == b'/').next()?;
    let name = name.strip_prefix(b"lib").unwrap_or(name);
    let rest = name.strip_prefix(b"python")?;
    let digits = rest.strip_prefix(b"3.").unwrap_or_default();
    let end = digits.iter().position(|b| !b.is_ascii_digit()).unwrap_or(digits.len());
    let (digits, rest) = digits.split_at(end);
    let minor = str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok());
    Some(Named { minor, flavour: rest.first().copied().filter(u8::is_ascii_alphabetic) })
}

fn elf(file: &Arc<File>) -> Result<Elf, &'static str> {
    let metadata = file.metadata().map_err(|_| "the file cannot be read")?;
    Elf::open(Arc::clone(file), &metadata).map_err(|_| "it is no ELF file")
}

/// The interpreter in a file: `None` if there is none, as in a program that is linked to its library.
fn interpreter(file: &Arc<File>, named: Named) -> Result<Option<Interpreter>, &'static str> {
    let elf = elf(file)?;
    let sections = elf.sections().map_err(|_| "its sections cannot be read")?;
    let mut found = Found::default();
    for kind in [object::elf::SHT_DYNSYM.0, object::elf::SHT_SYMTAB.0] {
        if let Some(section) = sections.iter().find(|section| section.kind == kind) {
            found.collect(&elf, section, &sections).ok_or("its symbols cannot be read")?;
        }
    }
    let Some(runtime) = found.runtime else { return Ok(None) };
    let (Some(code_type), false) = (found.code_type, found.loops.is_empty()) else {
        return Err("it lacks symbols of the interpreter's loop or types");
    };
    if !elf.wide() {
        return Err("it is for 32 bits");
    }
    let minor = match found.version {
        // `PY_VERSION_HEX`, since 3.11 (`Include/patchlevel.h`).
        Some(at) => {
            let hex = bytes(&elf, &sections, at, 4).map(|b| Fields(&b).u32(0));
            let hex = hex.ok_or("its version cannot be read")?;
            if hex >> 24 != 3 {
                return Err("it is not of version 3");
            }
            (hex >> 16) as u8
        }
        None => named.minor.ok_or("it does not say which version it is")?,
    };
    if named.minor.is_some_and(|named| named != minor) {
        return Err("its name says another version than it does");
    }
    match named.flavour {
        None => {}
        Some(b't') => return Err("without its global lock, it keeps its data in other places"),
        Some(b'd') => return Err("built for debugging, it keeps its data in other places"),
        Some(_) => return Err("it is of an unknown flavour"),
    }
    let mut version = version(minor).ok_or("only versions 3.8 to 3.13 are known")?;
    if minor >= offsets::SINCE {
        let table = bytes(&elf, &sections, runtime, offsets::BYTES);
        let table = table.ok_or("the offsets that it publishes cannot be read")?;
        version = offsets::read(&table, version)?;
    }
    let loops = found.loops;
    Ok(Some(Interpreter { version: Some(version), runtime, code_type, loops }))
}

/// Bytes of the file at one of its addresses.
fn bytes(elf: &Elf, sections: &[Section], address: u64, len: u64) -> Option<Vec<u8>> {
    let holds = |s: &&Section| {
        let inside = address.checked_sub(s.address).and_then(|at| at.checked_add(len));
        s.address != 0 && inside.is_some_and(|end| end <= s.size)
    };
    let section = sections.iter().find(holds)?;
    let (offset, _) = elf.plain(section)?;
    elf.read(offset + (address - section.address), len, len).ok()
}

/// Addresses of the symbols that matter.
#[derive(Debug, Default)]
struct Found {
    runtime: Option<u64>,
    version: Option<u64>,
    code_type: Option<u64>,
    loops: Vec<(u64, u64)>,
}

impl Found {
    /// Takes what a table of symbols has.
    fn collect(&mut self, elf: &Elf, section: &Section, sections: &[Section]) -> Option<()> {
        let read = |section: &Section| {
            let (offset, size) = elf.plain(section)?;
            elf.read(offset, size, SYMBOLS).ok()
        };
        let names = read(sections.get(section.link)?)?;
        for symbol in read(section)?.chunks_exact(24).map(Fields) {
            let (name, defined) = (symbol.u32(0) as usize, symbol.u16(6) != 0);
            let name = names.get(name..).unwrap_or_default();
            // Nearly all are sorted out by these.
            if !defined || !(name.starts_with(b"_Py") || name.starts_with(b"Py")) {
                continue;
            }
            let end = name.iter().take(64).position(|b| *b == 0).unwrap_or(0);
            let (address, size) = (symbol.u64(8), symbol.u64(16));
            match name.get(..end).unwrap_or_default() {
                b"_PyRuntime" => self.runtime = Some(address),
                b"Py_Version" => self.version = Some(address),
                b"PyCode_Type" => self.code_type = Some(address),
                name if name.strip_prefix(LOOP).is_some_and(part) => {
                    let range = (address, address.saturating_add(size));
                    if self.loops.len() < PARTS && !self.loops.contains(&range) {
                        self.loops.push(range);
                    }
                }
                _ => {}
            }
        }
        Some(())
    }
}

/// Whether what is behind the name of a function says that it is the function, or a part of it: `.cold`,
/// `.part.0`, `.constprop.0`, `.lto_priv.0`.
fn part(behind: &[u8]) -> bool {
    behind.is_empty() || behind.starts_with(b".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_the_version() {
        let check = |path: &str, minor, flavour| {
            assert_eq!(named(path.as_bytes()), Some(Named { minor, flavour }), "{path}");
        };
        check("/usr/bin/python3.11", Some(11), None);
        check("/usr/lib/libpython3.13.so.1.0", Some(13), None);
        check("/usr/bin/python3.13t", Some(13), Some(b't'));
        check("/usr/lib/libpython3.12d.so.1.0", Some(12), Some(b'd'));
        check("/usr/bin/python", None, None);
        check("/usr/bin/python3.999", None, None);
        for path in ["/usr/bin/perl", "/usr/lib/libpy.so", ""] {
            assert_eq!(named(path.as_bytes()), None, "{path}");
        }
    }
}
