//! `/proc/PID/maps`, from bytes to mappings (`show_map_vma` in `fs/proc/task_mmu.c`).
//!
//! Pure: not for reading the file, nor for opening what is mapped.

use std::borrow::Cow;

/// One line: a range of addresses and what is behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line<'a> {
    /// First address.
    pub(super) start: u64,
    /// First address behind it.
    pub(super) end: u64,
    /// Whether code in it may run.
    pub(super) executable: bool,
    /// Offset in the file, in bytes.
    pub(super) offset: u64,
    /// Device, as `makedev` packs it.
    pub(super) dev: u64,
    /// Inode, 0 where no file is behind it.
    pub(super) ino: u64,
    /// Path, or a name in brackets, or nothing. Newlines are decoded, and the mark that the file
    /// has been deleted is taken off.
    pub(super) name: Cow<'a, [u8]>,
}

/// The well-formed lines in order; a malformed one, or a last one that was cut off, is left out.
pub(super) fn parse(bytes: &[u8]) -> impl Iterator<Item = Line<'_>> {
    bytes.split_inclusive(|b| *b == b'\n').filter_map(|line| parse_line(line.strip_suffix(b"\n")?))
}

fn parse_line(line: &[u8]) -> Option<Line<'_>> {
    let mut rest = line;
    let (start, end) = split(field(&mut rest), b'-')?;
    let permissions = field(&mut rest);
    let offset = hex(field(&mut rest))?;
    let (major, minor) = split(field(&mut rest), b':')?;
    let ino = std::str::from_utf8(field(&mut rest)).ok()?.parse().ok()?;
    let (start, end) = (hex(start)?, hex(end)?);
    let (major, minor) = (u32::try_from(hex(major)?).ok()?, u32::try_from(hex(minor)?).ok()?);
    if start >= end || permissions.len() != 4 {
        return None;
    }
    Some(Line {
        start,
        end,
        executable: permissions.get(2) == Some(&b'x'),
        offset,
        dev: libc::makedev(major, minor),
        ino,
        name: name(rest.trim_ascii_start()),
    })
}

/// Takes the next word off the line.
fn field<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    let at = rest.iter().position(|b| *b == b' ').unwrap_or(rest.len());
    let (word, tail) = rest.split_at(at);
    *rest = tail.get(1..).unwrap_or_default();
    word
}

fn split(word: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = word.iter().position(|b| *b == separator)?;
    Some((word.get(..at)?, word.get(at + 1..)?))
}

/// A number of at most 16 hexadecimal digits.
pub(super) fn hex(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || digits.len() > 16 {
        return None;
    }
    digits.iter().try_fold(0, |sum: u64, b| Some(sum << 4 | u64::from((*b as char).to_digit(16)?)))
}

/// The kernel writes a newline in a path as `\012`, and nothing else changed (`seq_path`).
fn name(raw: &[u8]) -> Cow<'_, [u8]> {
    const NEWLINE: &[u8] = br"\012";
    let raw = match raw.strip_suffix(b" (deleted)") {
        Some(path) if path.starts_with(b"/") => path,
        _ => raw,
    };
    if !raw.windows(NEWLINE.len()).any(|w| w == NEWLINE) {
        return Cow::Borrowed(raw);
    }
    let mut decoded = Vec::with_capacity(raw.len());
    let mut rest = raw;
    while let Some((first, tail)) = rest.split_first() {
        if let Some(tail) = rest.strip_prefix(NEWLINE) {
            decoded.push(b'\n');
            rest = tail;
        } else {
            decoded.push(*first);
            rest = tail;
        }
    }
    Cow::Owned(decoded)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(text: &str, expected: &[(u64, u64, bool, u64, u64, &str)]) {
        let lines: Vec<_> = parse(text.as_bytes()).collect();
        let found: Vec<_> = lines
            .iter()
            .map(|l| (l.start, l.end, l.executable, l.offset, l.ino, str::from_utf8(&l.name)))
            .collect();
        let expected: Vec<_> =
            expected.iter().map(|&(s, e, x, o, i, n)| (s, e, x, o, i, Ok(n))).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn ordinary_lines() {
        check(
            "55d0c8a00000-55d0c8a22000 r-xp 00002000 fe:01 1835 /usr/bin/my app\n\
             7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n\
             7f0000001000-7f0000002000 rw-p 00000000 00:00 0\n\
             7ffc0000-7ffd0000 rw-p 00000000 00:00 0                          [stack]\n\
             7ffd0000-7ffe0000 rw-p 00000000 00:00 0    [anon:Java Heap]\n\
             ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0  [vsyscall]\n",
            &[
                (0x55d0_c8a0_0000, 0x55d0_c8a2_2000, true, 0x2000, 1835, "/usr/bin/my app"),
                (0x7f00_0000_0000, 0x7f00_0000_1000, false, 0, 0, ""),
                (0x7f00_0000_1000, 0x7f00_0000_2000, false, 0, 0, ""),
                (0x7ffc_0000, 0x7ffd_0000, false, 0, 0, "[stack]"),
                (0x7ffd_0000, 0x7ffe_0000, false, 0, 0, "[anon:Java Heap]"),
                (0xffff_ffff_ff60_0000, 0xffff_ffff_ff60_1000, true, 0, 0, "[vsyscall]"),
            ],
        );
    }

    #[test]
    fn names_are_decoded() {
        check(
            "1000-2000 r-xp 0 08:01 7 /tmp/a\\012b (deleted)\n\
             2000-3000 r-xp 0 08:01 8 /tmp/x (deleted) (deleted)\n\
             3000-4000 r-xp 0 08:01 9 /tmp/\\01\\012\n\
             4000-5000 r-xp 0 08:01 9 anon (deleted)\n",
            &[
                (0x1000, 0x2000, true, 0, 7, "/tmp/a\nb"),
                (0x2000, 0x3000, true, 0, 8, "/tmp/x (deleted)"),
                (0x3000, 0x4000, true, 0, 9, "/tmp/\\01\n"),
                (0x4000, 0x5000, true, 0, 9, "anon (deleted)"),
            ],
        );
    }

    #[test]
    fn malformed_lines_are_left_out() {
        check(
            "\n-\nx-y r-xp 0 0:0 0\n2000-1000 r-xp 0 08:01 7 /backwards\n\
             1000-2000 r-xp 0 08:01\n1000-2000 r-xp zz 08:01 7 /x\n\
             1000-2000 rx 0 08:01 7 /x\n11111111111111111-2 r-xp 0 0:0 0 \n\
             1000-2000 r-xp 0 08:01 7 /good\n\
             3000-4000 r-xp 0 08:01 7 /cut off",
            &[(0x1000, 0x2000, true, 0, 7, "/good")],
        );
    }

    #[test]
    fn many_lines() {
        let text: String = (1..=65_000_u64)
            .map(|i| format!("{:x}-{:x} r-xp 0 0:0 0 \n", i * 8192, i * 8192 + 4096))
            .collect();
        let lines: Vec<_> = parse(text.as_bytes()).collect();
        assert_eq!(lines.len(), 65_000);
        assert!(lines.iter().zip(1..).all(|(l, i)| l.start == i * 8192 && l.end > l.start));
    }

    proptest! {
        #[test]
        fn any_bytes(bytes: Vec<u8>) {
            prop_assert!(parse(&bytes).count() <= bytes.len());
        }
    }
}
