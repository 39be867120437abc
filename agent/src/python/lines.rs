//! Line tables of code objects: from a place in the instructions to a line. Pure; the bytes may be
//! anything.

use super::version::Lines;

/// Marks a range of 3.10 that has no line.
const NO_LINE: i8 = -128;

/// The line of the instruction at a byte offset; `None` if it has none.
#[must_use]
pub fn line(format: Lines, table: &[u8], first: u32, place: u32) -> Option<u32> {
    let place = u64::from(place);
    let found = match format {
        Lines::Lnotab => Some(lnotab(table, first.into(), place)),
        Lines::Ranges => ranges(table, first.into(), place),
        Lines::Locations => locations(table, first.into(), place),
    };
    found.and_then(|line| u32::try_from(line).ok())
}

/// Pairs of an advance of the address and one of the line (`PyCode_Addr2Line` in `Objects/codeobject.c`
/// of 3.9).
fn lnotab(table: &[u8], mut line: i64, place: u64) -> i64 {
    let mut at = 0;
    for &[bytes, lines] in table.as_chunks::<2>().0 {
        at += u64::from(bytes);
        if at > place {
            break;
        }
        line += i64::from(lines.cast_signed());
    }
    line
}

/// Pairs of the length of a range and the advance of the line before it (`advance` in
/// `Objects/codeobject.c` of 3.10).
fn ranges(table: &[u8], mut line: i64, place: u64) -> Option<i64> {
    let mut end = 0;
    for &[bytes, lines] in table.as_chunks::<2>().0 {
        end += u64::from(bytes);
        let lines = lines.cast_signed();
        if lines != NO_LINE {
            line += i64::from(lines);
        }
        if end > place {
            return (lines != NO_LINE).then_some(line);
        }
    }
    None
}

/// Entries that begin with a byte of which the highest bit is set, which no other byte has; it holds the
/// kind and the length in instructions of 2 bytes (`get_line_delta` in `Objects/codeobject.c` of 3.11).
fn locations(table: &[u8], mut line: i64, place: u64) -> Option<i64> {
    let mut end = 0;
    let mut rest = table;
    while let Some((&head, tail)) = rest.split_first() {
        let next = tail.iter().position(|b| b & 0x80 != 0).unwrap_or(tail.len());
        let (body, after) = tail.split_at(next);
        rest = after;
        end += 2 * (u64::from(head & 7) + 1);
        let kind = head >> 3 & 15;
        line += match kind {
            // One line, and one to three lines on.
            0..=9 => 0,
            10..=12 => i64::from(kind) - 10,
            13 | 14 => signed(body),
            _ => 0,
        };
        if end > place {
            return (kind != 15).then_some(line);
        }
    }
    None
}

/// A number in pieces of six bits, the lowest first, of which the lowest bit is the sign
/// (`scan_signed_varint` of the same).
fn signed(bytes: &[u8]) -> i64 {
    let mut value = 0_u64;
    for (index, byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 63) << (6 * index);
        if byte & 64 == 0 {
            break;
        }
    }
    let half = (value >> 1).cast_signed();
    if value & 1 == 1 { -half } else { half }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::python::version::VERSIONS;

    /// Every instruction of every code object in `tests/golden/python/lines.VERSION`, which the
    /// interpreter of that version wrote (`tests/python/lines.py`).
    #[test]
    fn lines_are_those_that_python_says() {
        for version in VERSIONS {
            let name = format!("../tests/golden/python/lines.3.{}", version.minor);
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
            let text = std::fs::read_to_string(path).unwrap();
            let lines: Vec<&str> = text.lines().collect();
            assert!(lines.len() > 20, "{} lines for 3.{}", lines.len(), version.minor);
            for [head, runs] in lines.as_chunks::<2>().0 {
                let (first, table) = head.strip_prefix("code ").unwrap().split_once(' ').unwrap();
                let first = first.parse().unwrap();
                let table: Vec<u8> = (0..table.len() / 2)
                    .map(|i| u8::from_str_radix(&table[2 * i..2 * i + 2], 16).unwrap())
                    .collect();
                let runs: Vec<(u32, u32)> = runs
                    .split(',')
                    .map(|run| run.split_once(' ').unwrap())
                    .map(|(place, line)| (place.parse().unwrap(), line.parse().unwrap()))
                    .collect();
                for (index, (start, expected)) in runs.iter().enumerate() {
                    let end = runs.get(index + 1).map_or(start + 2, |next| next.0);
                    for place in (*start..end).step_by(2) {
                        let found = line(version.format, &table, first, place).unwrap_or(0);
                        assert_eq!(found, *expected, "3.{}, {place} of {head}", version.minor);
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes(table: Vec<u8>, first: u32, place: u32) {
            for format in [Lines::Lnotab, Lines::Ranges, Lines::Locations] {
                let _ = line(format, &table, first, place);
            }
        }
    }
}
