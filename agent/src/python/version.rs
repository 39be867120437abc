//! Where each version of CPython keeps what is needed: as data, with the source it was taken from.
//!
//! The offsets are those of `offsetof` in a program compiled against each version's own headers
//! (`Include/internal`, `Py_BUILD_CORE`, x86-64, the release configuration), named below with the struct
//! they are in. They hold for every patch release of a minor version. From 3.13 on the interpreter
//! publishes its own, which are read instead ([`super::offsets`]).

use podflame_wire::python::{DIRECT, Layout};

/// How a code object says which line an instruction is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lines {
    /// `co_lnotab`, up to 3.9 (`Objects/lnotab_notes.txt` of 3.9).
    Lnotab,
    /// `co_linetable` of 3.10 (PEP 626; `Objects/lnotab_notes.txt` of 3.10).
    Ranges,
    /// `co_linetable` from 3.11 on (PEP 657; `Objects/locations.md` of 3.11).
    Locations,
}

/// A version, and what names of its functions need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// The 11 of 3.11.
    pub minor: u8,
    /// What the walk in the kernel needs.
    pub layout: Layout,
    /// `PyCodeObject.co_firstlineno`.
    pub first_line: u16,
    /// `PyCodeObject.co_filename`.
    pub filename: u16,
    /// `PyCodeObject.co_qualname`, or `co_name` where there is no such.
    pub name: u16,
    /// `PyCodeObject.co_linetable` or `.co_lnotab`.
    pub lines: u16,
    /// What that is.
    pub format: Lines,
    /// `PyCodeObject._co_firsttraceable`, 0 where there is no such.
    pub traceable: u16,
    /// Bytes of an instruction, as `f_lasti` counts.
    pub step: u32,
    /// `sizeof(PyASCIIObject)`: where the characters of an ASCII string are.
    pub ascii: u16,
    /// `sizeof(PyCompactUnicodeObject)`: where those of any other compact string are.
    pub compact: u16,
}

/// `PyFrameObject` of 3.8 and 3.9: `Include/frameobject.h`, `Include/cpython/frameobject.h`;
/// `PyThreadState`: `Include/cpython/pystate.h`; `PyInterpreterState`: `Include/internal/pycore_pystate.h`
/// (3.8), `pycore_interp.h` (3.9); `_PyRuntimeState`: `pycore_pystate.h` (3.8), `pycore_runtime.h` (3.9).
const OBJECTS: Layout = Layout {
    interpreters: 32,
    interpreter_next: 0,
    interpreter_threads: 8,
    thread_bytes: 184,
    thread_next: 8,
    thread_id: 176,
    thread_frame: 24,
    current: DIRECT,
    frame_bytes: 112,
    frame_previous: 24,
    frame_code: 32,
    frame_place: 104,
    // Each frame is a call of its own: whatever is there, none of it counts.
    frame_owner: 0,
    owner_mask: 0,
    owner_entry: 0,
    shims: 0,
    relative: 0,
    code_start: 0,
    pad: [0; 2],
};

/// `_PyInterpreterFrame` of 3.11, `Include/internal/pycore_frame.h`; `_PyCFrame`,
/// `Include/cpython/pystate.h`.
const ENTRIES: Layout = Layout {
    interpreters: 40,
    interpreter_next: 0,
    interpreter_threads: 16,
    thread_bytes: 160,
    thread_next: 8,
    thread_id: 152,
    thread_frame: 56,
    current: 8,
    frame_bytes: 72,
    frame_previous: 48,
    frame_code: 32,
    frame_place: 56,
    // `is_entry`, a `bool`.
    frame_owner: 68,
    owner_mask: 1,
    owner_entry: 1,
    shims: 0,
    relative: 1,
    code_start: 184,
    pad: [0; 2],
};

/// `_PyInterpreterFrame` of 3.12, `Include/internal/pycore_frame.h`.
const SHIMS: Layout = Layout {
    interpreter_threads: 72,
    thread_bytes: 144,
    thread_id: 136,
    current: 0,
    frame_previous: 8,
    frame_code: 0,
    // `owner`; `FRAME_OWNED_BY_CSTACK` of `enum _frameowner` is 3.
    frame_owner: 70,
    owner_mask: 0xff,
    owner_entry: 3,
    shims: 1,
    code_start: 192,
    ..ENTRIES
};

/// `PyCodeObject`: `Include/code.h` (3.8), `Include/cpython/code.h`; strings:
/// `Include/cpython/unicodeobject.h`.
const V3_8: Version = Version {
    minor: 8,
    layout: OBJECTS,
    first_line: 40,
    filename: 104,
    name: 112,
    lines: 120,
    format: Lines::Lnotab,
    traceable: 0,
    step: 1,
    ascii: 48,
    compact: 72,
};

const V3_9: Version = Version { minor: 9, ..V3_8 };

/// `f_lasti` counts instructions from here on (`Objects/frameobject.c`, `PyFrame_GetLineNumber`).
const V3_10: Version = Version {
    minor: 10,
    layout: Layout { frame_bytes: 104, frame_place: 96, ..OBJECTS },
    format: Lines::Ranges,
    step: 2,
    ..V3_8
};

const V3_11: Version = Version {
    minor: 11,
    layout: ENTRIES,
    first_line: 72,
    filename: 112,
    name: 128,
    lines: 136,
    format: Lines::Locations,
    traceable: 168,
    step: 1,
    ascii: 48,
    compact: 72,
};

const V3_12: Version = Version {
    minor: 12,
    layout: SHIMS,
    first_line: 68,
    traceable: 176,
    ascii: 40,
    compact: 56,
    ..V3_11
};

/// The offsets that 3.13 publishes take the place of these, but for those that it does not.
const V3_13: Version = Version {
    minor: 13,
    layout: Layout {
        interpreters: 632,
        interpreter_next: 7264,
        interpreter_threads: 7344,
        thread_bytes: 160,
        thread_id: 152,
        thread_frame: 72,
        current: DIRECT,
        code_start: 200,
        ..SHIMS
    },
    traceable: 184,
    ..V3_12
};

/// Every version that is known, in order.
pub const VERSIONS: [Version; 6] = [V3_8, V3_9, V3_10, V3_11, V3_12, V3_13];

/// The version 3.`minor`.
#[must_use]
pub fn version(minor: u8) -> Option<Version> {
    VERSIONS.iter().copied().find(|version| version.minor == minor)
}
