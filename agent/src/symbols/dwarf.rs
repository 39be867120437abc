//! Inlined functions and source lines from DWARF sections.
//!
//! The sections of one file are read into memory and indexed when the first address of it is asked
//! for, and dropped when they are not needed for a while: answers are cached elsewhere, so that in
//! a steady state no DWARF is held. What parsing may cost is bounded by a [`Meter`].
//!
//! Not for split DWARF (`.dwo`) and supplementary files (`.gnu_debugaltlink`): where a name is
//! there, the symbol table answers.

use std::{
    panic::{self, AssertUnwindSafe},
    sync::Arc,
    time::Instant,
};

use addr2line::Context;
use gimli::{Reader as _, SectionId};

use super::{
    Unknown,
    elf::{Elf, Section},
    meter::{Meter, Metered},
    names,
};

/// Bytes that may be read to index the units of a file. Units state their ranges in some hundred
/// bytes, so that this is enough for the largest file that is taken at all.
const INDEX: u64 = 16 << 20;
/// Bytes that may be read to find one address: its unit's functions and lines are parsed at once.
/// Units of some megabytes occur (amalgamated sources, whole Rust crates). A hostile file can make
/// 24 bytes of memory of one byte, until the context is dropped.
const LOOKUP: u64 = 4 << 20;
/// Bytes read after which a context is dropped, and with it the parsed units it has gathered.
const GATHERED: u64 = INDEX + (16 << 20);

/// Most functions at one address. Compilers nest inlined functions some ten deep.
const INLINED: usize = 128;

/// What is read for functions and lines. `.debug_loc`, `.debug_types` and macros are as large and
/// not needed.
const SECTIONS: [SectionId; 10] = [
    SectionId::DebugAbbrev,
    SectionId::DebugAddr,
    SectionId::DebugAranges,
    SectionId::DebugInfo,
    SectionId::DebugLine,
    SectionId::DebugLineStr,
    SectionId::DebugRanges,
    SectionId::DebugRngLists,
    SectionId::DebugStr,
    SectionId::DebugStrOffsets,
];

/// A function at an address, as DWARF has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Frame {
    /// Its name, demangled; empty if DWARF does not say.
    pub(super) name: String,
    /// Source file, empty if unknown.
    pub(super) file: String,
    /// Source line, 0 if unknown.
    pub(super) line: u32,
}

/// The DWARF of one file in memory.
pub(super) struct Dwarf {
    context: Context<Metered>,
    meter: Arc<Meter>,
    /// Bytes of its sections.
    pub(super) bytes: u64,
    /// When it was last asked.
    pub(super) used: Instant,
}

/// Whether a file has DWARF.
pub(super) fn present(sections: &[Section]) -> bool {
    find(sections, SectionId::DebugInfo).is_some_and(|s| s.kind != object::elf::SHT_NOBITS.0)
}

fn find(sections: &[Section], id: SectionId) -> Option<&Section> {
    sections.iter().find(|s| s.name == id.name())
}

impl Dwarf {
    /// Reads the DWARF sections of a file, of `most` bytes together at most when decompressed.
    pub(super) fn load(elf: &Elf, sections: &[Section], most: u64) -> Result<Self, Unknown> {
        let mut left = most;
        for section in SECTIONS.iter().filter_map(|id| find(sections, *id)) {
            let size = elf.contents_size(section)?;
            left = left.checked_sub(size).ok_or(Unknown::TooLarge)?;
        }
        let meter = Arc::new(Meter::default());
        let dwarf = guarded(|| {
            gimli::Dwarf::load(|id| {
                let section = find(sections, id).filter(|_| SECTIONS.contains(&id));
                let bytes = match section {
                    Some(section) => elf.contents(section, most)?,
                    None => Vec::new(),
                };
                Ok(Metered::new(bytes.into(), Arc::clone(&meter)))
            })
        })
        .unwrap_or(Err(Unknown::Malformed))?;
        meter.allow(INDEX);
        let context = guarded(|| Context::from_dwarf(dwarf).ok()).flatten();
        let context = context.ok_or_else(|| meter.reason())?;
        Ok(Self { context, meter, bytes: most - left, used: Instant::now() })
    }

    /// The functions at an address, innermost first; empty if none is known.
    pub(super) fn frames(&mut self, address: u64) -> Result<Vec<Frame>, Unknown> {
        self.used = Instant::now();
        self.meter.allow(LOOKUP);
        let found = guarded(|| self.walk(address).ok()).flatten();
        found.ok_or_else(|| self.meter.reason())
    }

    fn walk(&self, address: u64) -> gimli::Result<Vec<Frame>> {
        let mut frames = Vec::new();
        let mut found = self.context.find_frames(address).skip_all_loads()?;
        while let Some(frame) = found.next()?.filter(|_| frames.len() < INLINED) {
            let name = match &frame.function {
                Some(function) => {
                    let mut name = function.name.clone();
                    name.truncate(name.len().min(names::RAW_NAME))?;
                    names::demangle(&name.to_slice()?)
                }
                None => String::new(),
            };
            let location = frame.location.as_ref();
            frames.push(Frame {
                name,
                file: location.and_then(|l| l.file).map(names::shown).unwrap_or_default(),
                line: location.and_then(|l| l.line).unwrap_or(0),
            });
        }
        Ok(frames)
    }

    /// Whether it has gathered as much as it may.
    pub(super) fn full(&self) -> bool {
        self.meter.spent() > GATHERED
    }
}

impl Meter {
    fn reason(&self) -> Unknown {
        if self.exhausted() { Unknown::TooLarge } else { Unknown::Malformed }
    }
}

/// Runs a parser over hostile input: a panic in it is one failure and not the end of the agent.
fn guarded<T>(parse: impl FnOnce() -> T) -> Option<T> {
    panic::catch_unwind(AssertUnwindSafe(parse)).ok()
}
