//! Where a file keeps its call frame information, and what must be known to read it.
//!
//! `.eh_frame`, found by its section header, or in a file that was stripped of those by the program
//! header that the C++ runtime uses; else `.debug_frame`. Not for reading the entries.

use gimli::{
    BaseAddresses, DebugFrame, EhFrame, EhFrameHdr, EndianSlice, LittleEndian, Pointer, Vendor,
};

use super::{
    FileTable, Limits, Load, NoTable, Rules,
    run::{Effort, Run},
    translate::Machine,
};
use crate::symbols::elf::{Elf, Section, Segment};

/// Bytes of `.eh_frame_hdr` up to its table: four encodings and two pointers.
const HEADER: u64 = 20;
/// The note that Go's linker leaves in every program.
const GO: &str = ".note.go.buildid";

/// The section of a file.
pub(super) struct Frames {
    bytes: Vec<u8>,
    bases: BaseAddresses,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// `.eh_frame`, all of it.
    Whole,
    /// `.eh_frame` up to its terminator, and something behind it.
    Terminated,
    /// `.debug_frame`.
    Debug,
}

impl Frames {
    /// Reads the section.
    pub(super) fn read(elf: &Elf, limits: &Limits) -> Result<Self, NoTable> {
        let sections = elf.sections()?;
        let named = |name: &str| sections.iter().find(|s| s.name == name);
        let mut bases = BaseAddresses::default();
        if let Some(text) = named(".text") {
            bases = bases.set_text(text.address);
        }
        if let Some(got) = named(".got") {
            bases = bases.set_got(got.address);
        }
        let contents = |section: &Section| elf.contents(section, limits.section_bytes);
        if let Some(section) = named(".eh_frame") {
            let bytes = contents(section)?;
            if !bytes.is_empty() {
                let bases = bases.set_eh_frame(section.address);
                return Ok(Self { bytes, bases, kind: Kind::Whole });
            }
            // So it is in separate debug files, which have the header of a section only.
        } else if let Some((address, bytes)) = by_program_header(elf, limits)? {
            let bases = bases.set_eh_frame(address);
            return Ok(Self { bytes, bases, kind: Kind::Terminated });
        }
        match named(".debug_frame") {
            // Go's linker does not say where functions save the frame pointer (`writeframes` in
            // `cmd/link/internal/ld/dwarf.go`), so that it would be wrong in all outer frames. But
            // all of Go's code keeps one (`framepointer_enabled` in `runtime/runtime2.go`).
            _ if named(GO).is_some() => Err(NoTable::Go),
            Some(section) => {
                let bytes = contents(section)?;
                if bytes.is_empty() {
                    return Err(NoTable::NoFrames);
                }
                Ok(Self { bytes, bases, kind: Kind::Debug })
            }
            None => Err(NoTable::NoFrames),
        }
    }

    /// The table of what the section says of the code in `loads`.
    pub(super) fn table(
        &self,
        machine: Machine,
        loads: Vec<Load>,
        rules: &mut Rules,
        limits: &Limits,
        effort: &mut Effort<'_>,
    ) -> Result<FileTable, NoTable> {
        let vendor = if machine == Machine::AArch64 { Vendor::AArch64 } else { Vendor::Default };
        let (bytes, bases) = (self.bytes.as_slice(), &self.bases);
        if self.kind == Kind::Debug {
            let mut section = DebugFrame::new(bytes, LittleEndian);
            section.set_address_size(8);
            section.set_vendor(vendor);
            Run {
                section: &section,
                bytes,
                bases,
                skip_zeros: true,
                machine,
                rules,
                limits,
                effort,
            }
            .table(loads)
        } else {
            let mut section = EhFrame::new(bytes, LittleEndian);
            section.set_address_size(8);
            section.set_vendor(vendor);
            let skip_zeros = self.kind == Kind::Whole;
            Run { section: &section, bytes, bases, skip_zeros, machine, rules, limits, effort }
                .table(loads)
        }
    }
}

/// `.eh_frame`, and its address, by way of `PT_GNU_EH_FRAME`: from where that says it begins to the
/// end of its segment (LSB Core, "The .eh_frame_hdr section").
fn by_program_header(elf: &Elf, limits: &Limits) -> Result<Option<(u64, Vec<u8>)>, NoTable> {
    let Some(header) = elf.eh_frame_hdr else { return Ok(None) };
    let len = header.len.min(HEADER);
    let bytes = elf.read(header.offset, len, len)?;
    let bases = BaseAddresses::default().set_eh_frame_hdr(header.address);
    let parsed = EhFrameHdr::from(EndianSlice::new(&bytes, LittleEndian)).parse(&bases, 8);
    let Ok(Pointer::Direct(address)) = parsed.map(|header| header.eh_frame_ptr()) else {
        return Err(NoTable::Malformed);
    };
    let inside =
        |load: &&Segment| address.checked_sub(load.address).is_some_and(|inside| inside < load.len);
    let load = elf.loads().iter().find(inside).ok_or(NoTable::Malformed)?;
    let inside = address - load.address;
    let offset = load.offset.checked_add(inside).ok_or(NoTable::Malformed)?;
    // What is behind the limit is missed only if the section goes on there, which is then malformed.
    let len = (load.len - inside).min(limits.section_bytes);
    Ok(Some((address, elf.read(offset, len, limits.section_bytes)?)))
}
