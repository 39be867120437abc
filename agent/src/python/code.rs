//! A code object, read from the memory of its process: what the function is called, and its lines.
//!
//! Everything read is hostile: a process writes what it likes. Sizes are bounded, and what does not look
//! like a code object is refused with the reason.

use std::{fs::File, os::unix::fs::FileExt};

use super::{lines, version::Version};

/// Most bytes of a code object that are looked at: all that is named in [`Version`].
const HEAD: usize = 256;
/// Most characters of a function's name that are kept.
const NAME: u64 = 512;
/// Most characters of a file's name that are kept (`PATH_MAX`).
const FILE: u64 = 4096;
/// Most bytes of a line table. A function of 10,000 lines has some 100 KiB; of a larger one no line is
/// known.
const LINES: u64 = 256 << 10;
/// `PyObject.ob_type`: `Include/object.h`, the same in all versions.
const TYPE: usize = 8;
/// `PyVarObject.ob_size` and `PyASCIIObject.length`, likewise.
const SIZE: usize = 16;
/// `PyASCIIObject.state`.
const STATE: usize = 32;
/// `PyBytesObject.ob_sval`.
const BYTES: u64 = 32;

/// Memory of a process.
pub trait Memory {
    /// Fills `into` from an address; whether that could be done.
    fn read(&self, address: u64, into: &mut [u8]) -> bool;
}

/// `/proc/PID/mem`.
impl Memory for File {
    fn read(&self, address: u64, into: &mut [u8]) -> bool {
        self.read_exact_at(into, address).is_ok()
    }
}

/// Why nothing is known of a code object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NoCode {
    /// The process was gone, or its memory cannot be read.
    Gone,
    /// There is something else at that address now.
    NotCode,
}

impl NoCode {
    /// What a frame shows.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gone => "[python: process gone]",
            Self::NotCode => "[python: unknown code]",
        }
    }
}

/// A function, or another block of code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code {
    /// Its qualified name, or its name up to 3.10.
    pub name: Box<str>,
    /// The file that it was compiled from.
    pub file: Box<str>,
    /// It is no code of the program: the interpreter puts it between frames, and hides it from the program
    /// too (`_Py_InitCleanup` in `Objects/codeobject.c` of 3.13).
    pub hidden: bool,
    /// The line that it begins in.
    first_line: u32,
    /// Its line table.
    lines: Box<[u8]>,
    version: Version,
}

impl Code {
    /// Reads the code object at an address; `code_type` is that of `PyCode_Type`.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or is none.
    pub fn read(
        memory: &impl Memory,
        address: u64,
        version: &Version,
        code_type: u64,
    ) -> Result<Self, NoCode> {
        let mut head = [0; HEAD];
        let end = [version.lines, version.name, version.filename, version.traceable];
        let end = usize::from(end.into_iter().max().unwrap_or(0)) + 8;
        let head = head.get_mut(..end).ok_or(NoCode::NotCode)?;
        if !memory.read(address, head) {
            return Err(NoCode::Gone);
        }
        if word(head, TYPE) != code_type {
            return Err(NoCode::NotCode);
        }
        let text = |at: u16, most| string(memory, word(head, at.into()), version, most);
        let name = text(version.name, NAME)?;
        let file = text(version.filename, FILE)?;
        let lines = bytes(memory, word(head, version.lines.into()));
        let first_line = word(head, version.first_line.into()) as u32;
        // Whose first traceable instruction is behind its end is never seen by the program
        // (`_PyFrame_IsIncomplete`, `Include/internal/pycore_frame.h`). Both count instructions.
        let traceable = word(head, version.traceable.into()) as u32;
        let hidden = version.traceable != 0 && u64::from(traceable) >= word(head, SIZE);
        Ok(Self { name, file, hidden, first_line, lines, version: *version })
    }

    /// The line of a place in the code, as the walk in the kernel gives it; 0 if it has none.
    #[must_use]
    pub fn line(&self, place: u32) -> u32 {
        // A frame that has not begun is at -1.
        if place.cast_signed() < 0 {
            return self.first_line;
        }
        let place = place.saturating_mul(self.version.step);
        lines::line(self.version.format, &self.lines, self.first_line, place).unwrap_or(0)
    }

    /// Bytes of memory that it takes, nearly.
    #[must_use]
    pub fn bytes(&self) -> usize {
        256 + self.name.len() + self.file.len() + self.lines.len()
    }
}

/// A line table; an empty one if it cannot be read.
fn bytes(memory: &impl Memory, object: u64) -> Box<[u8]> {
    let mut head = [0; BYTES as usize];
    if object == 0 || !memory.read(object, &mut head) {
        return Box::default();
    }
    let size = word(&head, SIZE);
    if size > LINES {
        return Box::default();
    }
    let mut bytes = vec![0; size as usize];
    let read = memory.read(object.wrapping_add(BYTES), &mut bytes);
    if read { bytes.into() } else { Box::default() }
}

/// A string of at most `most` characters; a longer one is cut. The parts of the state: `kind` is bytes a
/// character, `compact` says that the characters are behind the head, `ascii` that it is the short head
/// (`Include/cpython/unicodeobject.h`; a compiled name is always compact).
fn string(
    memory: &impl Memory,
    object: u64,
    version: &Version,
    most: u64,
) -> Result<Box<str>, NoCode> {
    let mut head = [0; STATE + 8];
    if !memory.read(object, &mut head) {
        return Err(NoCode::NotCode);
    }
    let state = word(&head, STATE);
    let (kind, compact, ascii) = (state >> 2 & 7, state >> 5 & 1, state >> 6 & 1);
    if compact == 0 || !matches!(kind, 1 | 2 | 4) {
        return Err(NoCode::NotCode);
    }
    let at = if ascii == 1 { version.ascii } else { version.compact };
    let length = word(&head, SIZE);
    let kept = length.min(most);
    let mut raw = vec![0; (kept * kind) as usize];
    if !memory.read(object.wrapping_add(at.into()), &mut raw) {
        return Err(NoCode::NotCode);
    }
    let character = |bits: u32| char::from_u32(bits).unwrap_or(char::REPLACEMENT_CHARACTER);
    let mut text: String = match kind {
        1 => raw.iter().map(|b| char::from(*b)).collect(),
        2 => raw.as_chunks().0.iter().map(|b| character(u16::from_le_bytes(*b).into())).collect(),
        _ => raw.as_chunks().0.iter().map(|b| character(u32::from_le_bytes(*b))).collect(),
    };
    if kept < length {
        text.push('…');
    }
    Ok(text.into())
}

/// The word at an offset, 0 behind the end.
fn word(bytes: &[u8], at: usize) -> u64 {
    let bytes = bytes.get(at..).unwrap_or_default();
    let mut word = [0; 8];
    for (to, from) in word.iter_mut().zip(bytes) {
        *to = *from;
    }
    u64::from_le_bytes(word)
}
