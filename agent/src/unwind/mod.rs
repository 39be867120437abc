//! ELF file → tables by which its code is unwound, in the layout of `podflame_wire::unwind`.
//!
//! Compilers describe each function in `.eh_frame`: for each range of addresses, how to find the
//! caller's frame (call frame information: DWARF 5, section 6.4; for the section itself LSB Core,
//! chapter "Exception Frames"; for the numbers of registers the psABIs of x86-64 and AArch64). The
//! kernel cannot run that, so that it is run here once for each file. [`build`] finds the entries of
//! the section (`frames`), runs each in the order of addresses (`run`), says each row in one of a few
//! rules (`translate`, `expression`; [`Rules`] keeps equal ones once), and lays the rows out in pages
//! (`pages`).
//!
//! The file is hostile: it is read and never mapped, its work and its memory are bounded by
//! [`Limits`], and what it says wrongly is counted and leads to a row that says "unsupported", or to
//! none. The work is done in slices, between which the caller may let others run.
//!
//! Not for loading tables into the kernel, nor for deciding which file gets one, nor for walking.

mod expression;
mod frames;
mod pages;
mod rules;
mod run;
#[cfg(test)]
mod tests;
mod translate;
mod unsaid;

use std::{fs::File, sync::Arc};

use self::{frames::Frames, run::Effort, translate::Machine};
pub use self::{
    pages::Segment,
    rules::{Rules, UNSUPPORTED},
};
use crate::symbols::{Unknown, elf::Elf};

/// What one file may cost.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of the section, which are in memory while the table is built. Browsers and compilers
    /// have 15 MiB.
    pub section_bytes: u64,
    /// Functions, of which each takes 16 bytes while the table is built. Browsers have 600,000.
    pub functions: usize,
    /// Bytes of instructions that are run. Each function runs its own, and some 20 of those it shares
    /// with others, so that twice the bytes of the section are needed. A byte takes 10 ns, and 100 ns
    /// where a file was made to be slow.
    pub instruction_bytes: u64,
    /// Bytes of the table: 6 for each row. Browsers have 1.5 million rows.
    pub table_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            section_bytes: 32 << 20,
            functions: 1 << 20,
            instruction_bytes: 128 << 20,
            table_bytes: 24 << 20,
        }
    }
}

/// How code of a file is unwound.
#[derive(Clone, Debug)]
pub struct FileTable {
    /// In the order of their addresses, without overlaps. What is in none has no rules.
    pub segments: Vec<Segment>,
    /// The parts of the file that hold code.
    pub loads: Vec<Load>,
    /// Rows of all segments.
    pub rows: u64,
    /// Bytes of all pages.
    pub bytes: u64,
    /// What was met on the way.
    pub stats: Stats,
}

/// An executable `PT_LOAD`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Offset in the file.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// Address that the linker gave it.
    pub address: u64,
}

/// What was met in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Functions that have rows.
    pub functions: u64,
    /// Entries that say nothing: of no code, of code that is not in the file, or of a function that
    /// has another entry. Linkers leave some.
    pub idle: u64,
    /// Entries that contradict themselves or the section, and so leave their code without a rule,
    /// or from some address on with the rule [`UNSUPPORTED`].
    pub malformed: u64,
    /// Entries of too many instructions; their rule is [`UNSUPPORTED`].
    pub too_long: u64,
    /// Rows that no rule can say.
    pub unsupported: u64,
    /// Rows that had to be called unsupported because there are too many rules.
    pub rules_full: u64,
    /// Places to which signal handlers return and of which the file says nothing.
    pub signal_returns: u64,
    /// Parts of procedure linkage tables of which the file says nothing.
    pub stubs: u64,
}

/// Declares the reasons with their names.
macro_rules! reasons {
    ($($(#[$meta:meta])* $variant:ident = $text:literal;)*) => {
        /// Why a file has no table.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum NoTable { $($(#[$meta])* $variant,)* }

        impl NoTable {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The reason in a word or two.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

reasons! {
    /// It is not an ELF file, or one that is not run.
    NotElf = "not ELF";
    /// It is for a processor whose code is not unwound: neither x86-64 nor AArch64, or with addresses
    /// of 32 bits.
    Machine = "other processor";
    /// It says nothing of how its code is unwound.
    NoFrames = "no frame information";
    /// Go's own code, which keeps frame pointers.
    Go = "Go";
    /// It contradicts itself.
    Malformed = "malformed";
    /// It is beyond a limit.
    TooLarge = "too large";
    /// It could not be read.
    Unreadable = "unreadable";
    /// It was changed while it was read.
    Changed = "file changed";
}

impl From<Unknown> for NoTable {
    fn from(unknown: Unknown) -> Self {
        match unknown {
            Unknown::NotElf => Self::NotElf,
            Unknown::Malformed => Self::Malformed,
            Unknown::TooLarge => Self::TooLarge,
            _ => Self::Unreadable,
        }
    }
}

/// Builds the table of a file, which may be one in memory, as for the vDSO. New rules are added to
/// `rules`, also when it fails. `pause` is called about every millisecond of work; reading and sorting
/// go on for up to 5 ms in the largest files.
pub fn build(
    file: &Arc<File>,
    rules: &mut Rules,
    limits: &Limits,
    pause: &mut dyn FnMut(),
) -> Result<FileTable, NoTable> {
    let metadata = file.metadata().map_err(|_| NoTable::Unreadable)?;
    let elf = Elf::open(Arc::clone(file), &metadata)?;
    let machine = Machine::of(&elf).ok_or(NoTable::Machine)?;
    let frames = Frames::read(&elf, limits)?;
    let loads: Vec<Load> = (elf.loads().iter())
        .filter(|segment| segment.executable && segment.len > 0)
        .map(|s| Load { offset: s.offset, size: s.len, address: s.address })
        .collect();
    let mut effort = Effort::new(limits.instruction_bytes, pause);
    let table = frames.table(machine, loads, rules, limits, &mut effort)?;
    let table = unsaid::add(&elf, machine, table, rules, limits)?;
    if elf.unchanged() { Ok(table) } else { Err(NoTable::Changed) }
}

impl FileTable {
    /// The address that the linker gave to an offset of code in the file.
    #[must_use]
    pub fn address(&self, offset: u64) -> Option<u64> {
        self.loads.iter().find_map(|load| load.address_of(offset))
    }

    /// Where the code of such an address is in the file.
    fn offset(&self, address: u64) -> Option<u64> {
        let load = self.loads.iter().find(|load| load.holds(address))?;
        load.offset.checked_add(address - load.address)
    }

    /// The index of the rule at an address, as the walk finds it.
    #[must_use]
    pub fn rule(&self, address: u64) -> u16 {
        let after = self.segments.partition_point(|segment| segment.base <= address);
        let segment = after.checked_sub(1).and_then(|index| self.segments.get(index));
        segment.map_or(podflame_wire::unwind::NO_RULE, |segment| segment.rule(address))
    }
}

impl Load {
    fn address_of(&self, offset: u64) -> Option<u64> {
        let inside = offset.checked_sub(self.offset).filter(|inside| *inside < self.size)?;
        self.address.checked_add(inside)
    }

    fn holds(&self, address: u64) -> bool {
        address.checked_sub(self.address).is_some_and(|inside| inside < self.size)
    }

    fn end(&self) -> u64 {
        self.address.saturating_add(self.size)
    }
}
