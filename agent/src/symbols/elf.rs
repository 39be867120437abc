//! The parts of an ELF file that symbols and unwind tables need, read piece by piece from an open
//! file.
//!
//! Files are read and never mapped: a process may truncate its own file, and a mapping of it would
//! then kill the agent (SIGBUS). Every size that the file states is held against the length of the
//! file and against a bound before memory is taken. Little-endian files of 32 and 64 bits; not for
//! relocatable objects, whose symbols have no addresses.

use std::{
    borrow::Cow,
    fs::{File, Metadata},
    os::unix::fs::{FileExt, MetadataExt},
    sync::Arc,
};

use object::{CompressedData, CompressionFormat, elf};

use super::Unknown;

/// Most program headers. Linkers write about a dozen.
const SEGMENTS: u64 = 256;
/// Most sections. Linkers write about forty, Go's up to a hundred.
const SECTIONS: u64 = 4096;
/// Most bytes of notes that are searched for a build ID.
const NOTES: u64 = 64 << 10;
/// Most bytes of section names.
const SECTION_NAMES: u64 = 256 << 10;
/// Most bytes of a build ID; SHA-1 has 20.
const BUILD_ID: usize = 64;

/// An open ELF file.
#[derive(Debug)]
pub(crate) struct Elf {
    file: Arc<File>,
    len: u64,
    modified: (i64, i64),
    wide: bool,
    /// `EM_*`.
    pub(crate) machine: u16,
    /// `PT_GNU_EH_FRAME`.
    pub(crate) eh_frame_hdr: Option<Segment>,
    sections_at: (u64, u64, u64),
    section_names: usize,
    segments: Vec<Segment>,
    /// GNU build ID in hexadecimal, empty if there is none.
    pub(super) build_id: String,
}

/// A program header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    /// Offset in the file.
    pub(crate) offset: u64,
    /// Address in memory.
    pub(crate) address: u64,
    /// Bytes in the file.
    pub(crate) len: u64,
    /// Whether code in it may run.
    pub(crate) executable: bool,
}

/// A section header.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    /// Its name, lossy.
    pub(crate) name: String,
    /// `SHT_*`.
    pub(crate) kind: u32,
    /// Address in memory.
    pub(crate) address: u64,
    /// Bytes it holds, compressed or not.
    pub(crate) size: u64,
    /// Index of the section it refers to.
    pub(crate) link: usize,
    flags: u64,
    /// Offset in the file.
    pub(crate) offset: u64,
}

impl Section {
    /// Whether code of the section may run.
    pub(super) fn executable(&self) -> bool {
        self.flags & elf::SHF_EXECINSTR.0 != 0
    }
}

/// Little-endian fields of a header, all zero behind its end.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..).and_then(|b| b.first_chunk()).copied().unwrap_or([0; N])
    }

    /// The byte at an offset.
    pub(crate) fn u8(&self, at: usize) -> u8 {
        u8::from_le_bytes(self.bytes(at))
    }

    /// The 16 bits at an offset.
    pub(crate) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    /// The 32 bits at an offset.
    pub(crate) fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    /// The 64 bits at an offset.
    pub(crate) fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
}

impl Elf {
    /// Reads the headers and the build ID.
    pub(crate) fn open(file: Arc<File>, metadata: &Metadata) -> Result<Self, Unknown> {
        let mut elf = Self {
            file,
            len: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            wide: true,
            machine: 0,
            eh_frame_hdr: None,
            sections_at: (0, 0, 0),
            section_names: 0,
            segments: Vec::new(),
            build_id: String::new(),
        };
        let header = elf.read(0, elf.len.min(64), 64)?;
        let f = Fields(&header);
        let known = header.starts_with(&elf::ELFMAG)
            && f.u8(5) == elf::ELFDATA2LSB.0
            && [elf::ET_EXEC.0, elf::ET_DYN.0].contains(&f.u16(16));
        elf.wide = f.u8(4) == elf::ELFCLASS64.0;
        elf.machine = f.u16(18);
        if !known || !(elf.wide || f.u8(4) == elf::ELFCLASS32.0) {
            return Err(Unknown::NotElf);
        }
        let (programs, entry, count) = if elf.wide {
            elf.sections_at = (f.u64(40), f.u16(58).into(), f.u16(60).into());
            elf.section_names = f.u16(62).into();
            (f.u64(32), u64::from(f.u16(54)), u64::from(f.u16(56)))
        } else {
            elf.sections_at = (f.u32(32).into(), f.u16(46).into(), f.u16(48).into());
            elf.section_names = f.u16(50).into();
            (f.u32(28).into(), u64::from(f.u16(42)), u64::from(f.u16(44)))
        };
        elf.read_programs(programs, entry, count.min(SEGMENTS))?;
        Ok(elf)
    }

    fn read_programs(&mut self, at: u64, entry: u64, count: u64) -> Result<(), Unknown> {
        let table = self.read(at, entry * count, SEGMENTS * u64::from(u16::MAX))?;
        let mut notes = Vec::new();
        for f in table.chunks_exact(entry.max(1) as usize).map(Fields) {
            let (flags, offset, address, len) = if self.wide {
                (f.u32(4), f.u64(8), f.u64(16), f.u64(32))
            } else {
                (f.u32(24), f.u32(4).into(), f.u32(8).into(), f.u32(16).into())
            };
            let segment = Segment { offset, address, len, executable: flags & elf::PF_X.0 != 0 };
            match f.u32(0) {
                kind if kind == elf::PT_LOAD.0 => self.segments.push(segment),
                kind if kind == elf::PT_GNU_EH_FRAME.0 => self.eh_frame_hdr = Some(segment),
                kind if kind == elf::PT_NOTE.0 => notes.push((offset, len)),
                _ => {}
            }
        }
        for (offset, len) in notes {
            // A separate debug file keeps the headers of segments whose contents it has not.
            if let Ok(bytes) = self.read(offset, len, NOTES)
                && let Some(id) = build_id(&bytes)
            {
                self.build_id = id;
                break;
            }
        }
        Ok(())
    }

    /// Whether the file is as it was when it was opened.
    pub(crate) fn unchanged(&self) -> bool {
        self.file
            .metadata()
            .is_ok_and(|m| m.len() == self.len && (m.mtime(), m.mtime_nsec()) == self.modified)
    }

    /// The address that the linker gave to an offset in the file. Segments share pages of the file,
    /// and code is what is asked for, so that executable ones come first.
    pub(crate) fn address(&self, offset: u64) -> Option<u64> {
        let holds = |s: &&Segment| offset.checked_sub(s.offset).is_some_and(|o| o < s.len);
        let segment = (self.segments.iter().find(|s| s.executable && holds(s)))
            .or_else(|| self.segments.iter().find(holds))?;
        segment.address.checked_add(offset - segment.offset)
    }

    /// The `PT_LOAD` segments.
    pub(crate) fn loads(&self) -> &[Segment] {
        &self.segments
    }

    /// Length of the file in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Whether addresses have 64 bits.
    pub(crate) fn wide(&self) -> bool {
        self.wide
    }

    /// Reads `len` bytes; `most` bounds what is read at once.
    pub(crate) fn read(&self, offset: u64, len: u64, most: u64) -> Result<Vec<u8>, Unknown> {
        if len > most {
            return Err(Unknown::TooLarge);
        }
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Unknown::Malformed);
        }
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| Unknown::TooLarge)?];
        self.file.read_exact_at(&mut bytes, offset).map_err(|_| Unknown::Unreadable)?;
        Ok(bytes)
    }

    /// Reads up to `buffer.len()` bytes, fewer at the end of the file.
    pub(super) fn read_some(&self, offset: u64, buffer: &mut [u8]) -> usize {
        self.file.read_at(buffer, offset).unwrap_or(0)
    }

    /// The section headers; none if the file has been stripped of them.
    pub(crate) fn sections(&self) -> Result<Vec<Section>, Unknown> {
        let (at, entry, count) = self.sections_at;
        if at == 0 || count == 0 {
            return Ok(Vec::new());
        }
        let size = if self.wide { 64 } else { 40 };
        if entry != size {
            return Err(Unknown::Malformed);
        }
        let table = self.read(at, entry * count, SECTIONS * size)?;
        let mut sections: Vec<(u32, Section)> =
            table.chunks_exact(size as usize).map(|b| self.section(&Fields(b))).collect();
        let names = match sections.get(self.section_names) {
            Some((_, s)) => self.read(s.offset, s.size, SECTION_NAMES)?,
            None => Vec::new(),
        };
        for (name, section) in &mut sections {
            let bytes = names.get(*name as usize..).unwrap_or_default();
            let len = bytes.iter().take(64).position(|b| *b == 0).unwrap_or(0);
            section.name = String::from_utf8_lossy(bytes.get(..len).unwrap_or_default()).into();
        }
        Ok(sections.into_iter().map(|(_, s)| s).collect())
    }

    fn section(&self, f: &Fields<'_>) -> (u32, Section) {
        let name = String::new();
        let kind = f.u32(4);
        let section = if self.wide {
            let (flags, address, offset, size) = (f.u64(8), f.u64(16), f.u64(24), f.u64(32));
            Section { name, kind, address, size, link: f.u32(40) as usize, flags, offset }
        } else {
            let flags = f.u32(8).into();
            let (address, offset, size) = (f.u32(12).into(), f.u32(16).into(), f.u32(20).into());
            Section { name, kind, address, size, link: f.u32(24) as usize, flags, offset }
        };
        (f.u32(0), section)
    }

    /// The place of a section's bytes in the file, if it has any and they are not compressed.
    pub(crate) fn plain(&self, section: &Section) -> Option<(u64, u64)> {
        let compressed = section.flags & elf::SHF_COMPRESSED.0 != 0;
        let inside = section.offset.checked_add(section.size).is_some_and(|end| end <= self.len);
        (section.kind != elf::SHT_NOBITS.0 && !compressed && inside)
            .then_some((section.offset, section.size))
    }

    /// The size of a section's contents, decompressed, as the file states it.
    pub(crate) fn contents_size(&self, section: &Section) -> Result<u64, Unknown> {
        Ok(match self.compression(section)? {
            Some((_, _, size)) => size,
            None if section.kind == elf::SHT_NOBITS.0 => 0,
            None => section.size,
        })
    }

    /// The contents of a section, decompressed, at most `most` bytes.
    pub(crate) fn contents(&self, section: &Section, most: u64) -> Result<Vec<u8>, Unknown> {
        if section.kind == elf::SHT_NOBITS.0 {
            return Ok(Vec::new());
        }
        let Some((format, header, uncompressed_size)) = self.compression(section)? else {
            return self.read(section.offset, section.size, most);
        };
        if uncompressed_size > most {
            return Err(Unknown::TooLarge);
        }
        let offset = section.offset.checked_add(header).ok_or(Unknown::Malformed)?;
        let size = section.size.checked_sub(header).ok_or(Unknown::Malformed)?;
        let data = self.read(offset, size, most)?;
        let compressed = CompressedData { format, data: &data, uncompressed_size };
        let contents = compressed.decompress().map_err(|_| Unknown::Malformed)?;
        Ok(match contents {
            Cow::Owned(bytes) => bytes,
            Cow::Borrowed(bytes) => bytes.to_vec(),
        })
    }

    /// Format, length of the header, and size of the contents of a compressed section.
    fn compression(
        &self,
        section: &Section,
    ) -> Result<Option<(CompressionFormat, u64, u64)>, Unknown> {
        if section.flags & elf::SHF_COMPRESSED.0 == 0 {
            return Ok(None);
        }
        let len: u64 = if self.wide { 24 } else { 12 };
        let header = self.read(section.offset, len, len)?;
        let f = Fields(&header);
        let size = if self.wide { f.u64(8) } else { f.u32(4).into() };
        let format = match f.u32(0) {
            kind if kind == elf::ELFCOMPRESS_ZLIB.0 => CompressionFormat::Zlib,
            kind if kind == elf::ELFCOMPRESS_ZSTD.0 => CompressionFormat::Zstandard,
            _ => return Err(Unknown::Malformed),
        };
        Ok(Some((format, len, size)))
    }
}

/// The GNU build ID among notes, in hexadecimal. Names and descriptors are padded to 4 bytes
/// (gABI, "Note Section"), except in notes of 8 bytes' alignment, which only hold properties.
fn build_id(mut notes: &[u8]) -> Option<String> {
    const NAME: &[u8] = b"GNU\0";
    while notes.len() >= 12 {
        let f = Fields(notes);
        let (name_len, id_len, kind) = (f.u32(0) as usize, f.u32(4) as usize, f.u32(8));
        let rest = notes.get(12..)?;
        let name = rest.get(..name_len)?;
        let rest = rest.get(name_len.checked_next_multiple_of(4)?..)?;
        let id = rest.get(..id_len)?;
        if kind == elf::NT_GNU_BUILD_ID.0 && name == NAME && (1..=BUILD_ID).contains(&id_len) {
            return Some(id.iter().map(|b| format!("{b:02x}")).collect());
        }
        notes = rest.get(id_len.checked_next_multiple_of(4)?..)?;
    }
    None
}
