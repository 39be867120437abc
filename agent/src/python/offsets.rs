//! The offsets that an interpreter publishes: `_Py_DebugOffsets` at the beginning of `_PyRuntime`
//! (`Include/internal/pycore_runtime.h` of 3.13). Pure; the bytes may be anything.

use podflame_wire::python::{DIRECT, Layout, MAX_BYTES};

use super::version::Version;

/// The first minor version that does.
pub(super) const SINCE: u8 = 13;

/// Bytes of the table up to the last field that is used.
pub(super) const BYTES: u64 = (WORDS * 8) as u64;

/// What it begins with (`_Py_Debug_Cookie`).
const COOKIE: u64 = u64::from_le_bytes(*b"xdebugpy");

/// The words of the table of 3.13, by what they say.
mod word {
    pub(super) const COOKIE: usize = 0;
    pub(super) const VERSION: usize = 1;
    pub(super) const FREE_THREADED: usize = 2;
    pub(super) const INTERPRETERS_HEAD: usize = 5;
    pub(super) const INTERPRETER_NEXT: usize = 8;
    pub(super) const THREADS_HEAD: usize = 9;
    pub(super) const THREAD_NEXT: usize = 21;
    pub(super) const CURRENT_FRAME: usize = 23;
    pub(super) const THREAD_ID: usize = 24;
    pub(super) const FRAME_PREVIOUS: usize = 29;
    pub(super) const FRAME_EXECUTABLE: usize = 30;
    pub(super) const FRAME_INSTRUCTION: usize = 31;
    pub(super) const FRAME_OWNER: usize = 33;
    pub(super) const CODE_FILENAME: usize = 35;
    pub(super) const CODE_QUALNAME: usize = 37;
    pub(super) const CODE_LINETABLE: usize = 38;
    pub(super) const CODE_FIRST_LINE: usize = 39;
    pub(super) const CODE_START: usize = 43;
}

const WORDS: usize = word::CODE_START + 1;

/// A version with the offsets of the table in it.
pub(super) fn read(table: &[u8], version: Version) -> Result<Version, &'static str> {
    let words = table.as_chunks::<8>().0;
    let word = |at: usize| words.get(at).map_or(0, |bytes| u64::from_le_bytes(*bytes));
    if word(word::COOKIE) != COOKIE {
        return Err("it does not publish its offsets where it should");
    }
    if word(word::VERSION) >> 16 != u64::from(version.minor) | 3 << 8 {
        return Err("the offsets that it publishes are of another version");
    }
    if word(word::FREE_THREADED) != 0 {
        return Err("without its global lock, it keeps its data in other places");
    }
    let offset = |at: usize| u16::try_from(word(at)).map_err(|_| BEYOND);
    let layout = Layout {
        interpreters: offset(word::INTERPRETERS_HEAD)?,
        interpreter_next: offset(word::INTERPRETER_NEXT)?,
        interpreter_threads: offset(word::THREADS_HEAD)?,
        thread_bytes: 0,
        thread_next: offset(word::THREAD_NEXT)?,
        thread_id: offset(word::THREAD_ID)?,
        thread_frame: offset(word::CURRENT_FRAME)?,
        current: DIRECT,
        frame_bytes: 0,
        frame_previous: offset(word::FRAME_PREVIOUS)?,
        frame_code: offset(word::FRAME_EXECUTABLE)?,
        frame_place: offset(word::FRAME_INSTRUCTION)?,
        frame_owner: offset(word::FRAME_OWNER)?,
        code_start: offset(word::CODE_START)?,
        ..version.layout
    };
    Ok(Version {
        layout: measured(layout)?,
        first_line: offset(word::CODE_FIRST_LINE)?,
        filename: offset(word::CODE_FILENAME)?,
        name: offset(word::CODE_QUALNAME)?,
        lines: offset(word::CODE_LINETABLE)?,
        ..version
    })
}

const BEYOND: &str = "the offsets that it publishes are beyond what can be";

/// Fills in how much has to be read, and checks that this is possible.
fn measured(layout: Layout) -> Result<Layout, &'static str> {
    let thread = [layout.thread_next, layout.thread_id, layout.thread_frame];
    let frame = [layout.frame_previous, layout.frame_code, layout.frame_place];
    let aligned = thread.iter().chain(&frame).all(|offset| offset.is_multiple_of(8));
    let end = |offsets: &[u16]| offsets.iter().max().map_or(0, |last| (last | 7).saturating_add(1));
    let (thread_bytes, owner) = (end(&thread), layout.frame_owner);
    let frame_bytes = end(&frame).max(end(&[owner]));
    if !aligned || thread_bytes > MAX_BYTES || frame_bytes > MAX_BYTES {
        return Err(BEYOND);
    }
    Ok(Layout { thread_bytes, frame_bytes, ..layout })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::python::version::version;

    /// The table of 3.13.0 as far as it is used.
    fn table() -> Vec<u64> {
        let mut table = vec![0; WORDS];
        for (at, value) in [
            (word::COOKIE, COOKIE),
            (word::VERSION, 0x030d_00f0),
            (word::INTERPRETERS_HEAD, 632),
            (word::INTERPRETER_NEXT, 7264),
            (word::THREADS_HEAD, 7344),
            (word::THREAD_NEXT, 8),
            (word::CURRENT_FRAME, 72),
            (word::THREAD_ID, 152),
            (word::FRAME_PREVIOUS, 8),
            (word::FRAME_INSTRUCTION, 56),
            (word::FRAME_OWNER, 70),
            (word::CODE_FILENAME, 112),
            (word::CODE_QUALNAME, 128),
            (word::CODE_LINETABLE, 136),
            (word::CODE_FIRST_LINE, 68),
            (word::CODE_START, 200),
        ] {
            table[at] = value;
        }
        table
    }

    fn read_words(table: &[u64]) -> Result<Version, &'static str> {
        let bytes: Vec<u8> = table.iter().flat_map(|word| word.to_le_bytes()).collect();
        read(&bytes, version(13).unwrap())
    }

    #[test]
    fn they_are_those_of_the_headers() {
        assert_eq!(read_words(&table()), Ok(version(13).unwrap()));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (at, value) in [
            (word::COOKIE, 1),
            (word::VERSION, 0x030e_00f0),
            (word::FREE_THREADED, 1),
            (word::THREAD_ID, 153),
            (word::THREAD_ID, 4096),
            (word::FRAME_OWNER, 256),
            (word::INTERPRETERS_HEAD, u64::MAX),
        ] {
            let mut table = table();
            table[at] = value;
            assert!(read_words(&table).is_err(), "word {at}: {value}");
        }
        assert!(read(&[], version(13).unwrap()).is_err());
    }

    proptest! {
        #[test]
        fn any_words(mut words in proptest::collection::vec(0_u64..70_000, WORDS)) {
            words[word::COOKIE] = COOKIE;
            words[word::VERSION] = 0x030d_00f0;
            words[word::FREE_THREADED] = 0;
            if let Ok(version) = read_words(&words) {
                prop_assert!(version.layout.thread_bytes <= MAX_BYTES);
                prop_assert!(version.layout.frame_bytes <= MAX_BYTES);
            }
        }
    }
}
