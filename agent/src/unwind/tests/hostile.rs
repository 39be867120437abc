//! Files that contradict themselves, are made to be slow, or change while they are read.

use std::{fs, os::unix::fs::FileExt};

use proptest::prelude::*;

use super::{super::pages::Writer, *};

/// First address of the code in `x86_64.elf`, and its bytes.
const CODE: (u64, u64) = (0x40_0000, 0x40c);

/// `x86_64.elf` with another `.eh_frame`, and without the code that handlers return to.
fn with_frames(frames: &[u8]) -> Vec<u8> {
    let mut bytes = with_code_and_frames(frames);
    let code = bytes.windows(RETURN.len()).position(|window| window == RETURN).unwrap();
    bytes[code..code + RETURN.len()].fill(0x90);
    bytes
}

/// `mov $15, %rax; syscall`: `rt_sigreturn`.
const RETURN: &[u8] = b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05";

/// `x86_64.elf` with another `.eh_frame`.
pub(super) fn with_code_and_frames(frames: &[u8]) -> Vec<u8> {
    let mut bytes = fs::read(fixture("x86_64.elf")).unwrap();
    let field = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap()) as usize;
    // The third section header: its offset, its address and its size.
    let header = field(40) + 3 * 64;
    assert_eq!(field(header + 32), 0x1e4);
    let at = bytes.len() as u64;
    bytes[header + 24..][..8].copy_from_slice(&at.to_le_bytes());
    bytes[header + 32..][..8].copy_from_slice(&(frames.len() as u64).to_le_bytes());
    bytes.extend_from_slice(frames);
    bytes
}

fn entry(id: u32, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let len = u32::try_from(body.len() + 4).unwrap();
    [&len.to_le_bytes(), &id.to_le_bytes(), &body[..]].concat()
}

/// A CIE whose functions have 8-byte addresses: version 1, no augmentation, factors 1 and -8, return
/// address in column 16, CFA rsp+8, return address at CFA-8; and more instructions.
pub(super) fn cie(more: &[u8]) -> Vec<u8> {
    entry(0, &[&[1, 0, 1, 0x78, 16, 0x0c, 7, 8, 0x90, 1], more])
}

/// An FDE at some offset of the section, of the CIE at its start.
pub(super) fn fde(at: usize, start: u64, len: u64, instructions: &[u8]) -> Vec<u8> {
    let id = u32::try_from(at + 4).unwrap();
    entry(id, &[&start.to_le_bytes(), &len.to_le_bytes(), instructions])
}

/// One CIE, and functions of start, length and instructions.
pub(super) fn frames<'a>(functions: impl IntoIterator<Item = (u64, u64, &'a [u8])>) -> Vec<u8> {
    let mut bytes = cie(&[]);
    for (start, len, instructions) in functions {
        bytes.extend(fde(bytes.len(), start, len, instructions));
    }
    bytes
}

fn rows(frames: &[u8]) -> (Vec<String>, Stats) {
    let mut rules = Rules::default();
    let table = of_bytes(&with_frames(frames), &mut rules, &Limits::default()).unwrap();
    let lines = listing(&table, &rules).replace(", ra cfa-8, fp same", "");
    (lines.lines().skip(1).map(Into::into).collect(), table.stats)
}

fn refused(bytes: &[u8], limits: &Limits) -> NoTable {
    of_bytes(bytes, &mut Rules::default(), limits).unwrap_err()
}

/// `DW_CFA_def_cfa_offset`.
const OFFSET: u8 = 0x0e;
/// `DW_CFA_advance_loc` by some bytes.
const fn advance(by: u8) -> u8 {
    0x40 | by
}

#[test]
fn functions_are_put_in_order_and_kept_apart() {
    let inner: &[u8] = &[advance(4), OFFSET, 16, advance(100), OFFSET, 24];
    let (rows, stats) = rows(&frames([
        // Behind the next ones, and longer than the code.
        (0x40_0300, 0x1000, &[][..]),
        // Its end is within the one after it, and the third row behind its own end.
        (0x40_0100, 0x40, inner),
        (0x40_0120, 0x10, &[][..]),
        // A second one for the same function, one without length, one without address, one behind
        // the end of addresses, and some that are not of this file's code.
        (0x40_0120, 0x20, &[OFFSET, 64][..]),
        (0x40_0200, 0, &[][..]),
        (0, 0x10, &[][..]),
        (u64::MAX, 2, &[][..]),
        (0x3f_ffff, 2, &[][..]),
        (CODE.0 + CODE.1, 2, &[][..]),
    ]));
    let expected =
        ["400000 none", "400100 sp+8", "400104 sp+16", "400120 sp+8", "400130 none", "400300 sp+8"];
    assert_eq!(rows, expected);
    assert_eq!(stats, Stats { functions: 3, idle: 6, ..Stats::default() });
}

#[test]
fn an_instruction_that_advances_by_nothing_makes_no_row() {
    let instructions = [OFFSET, 16, advance(0), OFFSET, 32, advance(1), OFFSET, 32, advance(1)];
    let (rows, _) = rows(&frames([(0x40_0100, 8, &instructions[..])]));
    assert_eq!(rows, ["400000 none", "400100 sp+32", "400108 none"]);
}

#[test]
fn what_follows_an_empty_entry_counts() {
    let mut bytes = frames([(0x40_0100, 8, &[][..])]);
    bytes.extend([0; 4]);
    bytes.extend(fde(bytes.len(), 0x40_0200, 8, &[]));
    let (rows, stats) = rows(&bytes);
    assert_eq!(rows.len(), 5);
    assert_eq!(stats.functions, 2);
}

#[test]
fn broken_entries_leave_the_others() {
    let mut bytes = frames([(0x40_0100, 8, &[][..])]);
    // An entry of a CIE that is none, one that ends too soon, and one that does not end.
    bytes.extend(entry(3, &[&[0; 16]]));
    bytes.extend(entry(u32::try_from(bytes.len() + 4).unwrap(), &[&[0; 7]]));
    bytes.extend(fde(bytes.len(), 0x40_0200, 8, &[]));
    bytes.extend([200, 0, 0, 0, 1]);
    let (rows, stats) = rows(&bytes);
    assert_eq!(rows.len(), 5);
    assert_eq!(stats, Stats { functions: 2, malformed: 3, ..Stats::default() });
    let nothing_else = with_frames(&[200, 0, 0, 0, 1]);
    assert_eq!(refused(&nothing_else, &Limits::default()), NoTable::Malformed);
    assert_eq!(refused(&with_frames(&cie(&[])), &Limits::default()), NoTable::NoFrames);
}

#[test]
fn entries_of_too_many_instructions_are_not_run() {
    let nops = vec![0; 64 << 10];
    let (found, stats) = rows(&frames([(0x40_0100, 8, &nops[..]), (0x40_0108, 8, &[][..])]));
    let expected = ["400000 none", "400100 unsupported", "400108 sp+8", "400110 none"];
    assert_eq!(found, expected);
    assert_eq!(stats.too_long, 1);
    let mut bytes = cie(&[0; 256]);
    bytes.extend(fde(bytes.len(), 0x40_0100, 8, &[]));
    let (found, stats) = rows(&bytes);
    assert_eq!(found, ["400000 none", "400100 unsupported", "400108 none"]);
    assert_eq!(stats.too_long, 1);
}

/// Of the most that one file can ask for, each limit stops something.
#[test]
fn limits_are_kept() {
    let functions = (0..1000).map(|n| (CODE.0 + n, 1, &[OFFSET, 16][..]));
    let bytes = with_frames(&frames(functions));
    let table = |limits: Limits| of_bytes(&bytes, &mut Rules::default(), &limits).map(|t| t.rows);
    // One rule for all, and none before and behind them.
    assert_eq!(table(Limits::default()), Ok(2));
    let full = Limits { functions: 1000, section_bytes: 26_018, ..Limits::default() };
    assert_eq!(table(full.clone()), Ok(2));
    assert_eq!(table(Limits { functions: 999, ..full.clone() }), Err(NoTable::TooLarge));
    assert_eq!(table(Limits { section_bytes: 26_017, ..full }), Err(NoTable::TooLarge));
    // Each is found, and run with its CIE.
    let run = 1001 * 8 + 1000 * (22 + 14);
    let few = |instruction_bytes| Limits { instruction_bytes, ..Limits::default() };
    assert_eq!(table(few(run)), Ok(2));
    assert_eq!(table(few(run - 1)), Err(NoTable::TooLarge));

    let rows: Vec<u8> = (0..2 * 512_u32).flat_map(|n| [OFFSET, 8 * (n % 2) as u8, 0x41]).collect();
    let bytes = with_frames(&frames([(CODE.0, CODE.1, &rows[..])]));
    let pages = |most: u64| {
        let limits = Limits { table_bytes: most * size_of::<Page>() as u64, ..Limits::default() };
        of_bytes(&bytes, &mut Rules::default(), &limits)
            .map(|t| (t.rows, t.segments[0].pages.len()))
    };
    assert_eq!(pages(4), Ok((1024, 3)));
    assert_eq!(pages(3), Ok((1024, 3)));
    assert_eq!(pages(2), Err(NoTable::TooLarge));
}

#[test]
fn rules_beyond_the_most_are_unsupported_and_counted() {
    // Offsets of two bytes in LEB128.
    let offsets =
        (0..1 << 14).map(|n: u16| [OFFSET, (n & 0x7f) as u8 | 0x80, (n >> 7) as u8, 0x41]);
    let instructions: Vec<u8> = offsets.flatten().collect();
    let mut rules = Rules::default();
    let mut unsupported = 0;
    for chunk in instructions.chunks(4 * 1000) {
        let bytes = with_frames(&frames([(CODE.0, CODE.1, chunk)]));
        let table = of_bytes(&bytes, &mut rules, &Limits::default()).unwrap();
        unsupported += table.stats.rules_full;
        let last = table.segments.last().unwrap().rows().last().unwrap().1;
        assert_eq!(last == UNSUPPORTED, table.stats.rules_full > 0);
    }
    assert_eq!(rules.count(), podflame_wire::unwind::MAX_RULES);
    // Two were there before, and the last row, behind the last advance, has the rule again.
    assert_eq!(unsupported, 3);
}

/// Work is done in slices, also where one function copies the state again and again.
#[test]
fn slow_files_are_done_in_slices() {
    let registers: Vec<u8> = (0..60).flat_map(|n| [0x05, 64 + n, 1]).collect();
    let mut bytes = cie(&registers);
    let copies = [0x0a, 0x0b].repeat(16 << 10);
    for n in 0..8 {
        bytes.extend(fde(bytes.len(), CODE.0 + n, 1, &copies));
    }
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&with_frames(&bytes)).unwrap();
    let file = Arc::new(file.reopen().unwrap());
    let mut pauses = 0;
    let mut pause = || pauses += 1;
    let table = build(&file, &mut Rules::default(), &Limits::default(), &mut pause).unwrap();
    assert_eq!(table.stats, Stats { functions: 8, ..Stats::default() });
    assert_eq!(pauses, 8);
}

#[test]
fn a_file_that_is_changed_while_it_is_read() {
    let copy = || {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&fs::read(fixture("x86_64.elf")).unwrap()).unwrap();
        file
    };
    let long = || {
        let functions = (0..10_000).map(|n| (CODE.0 + n % 1000, 1, &[][..]));
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&with_frames(&frames(functions))).unwrap();
        file
    };
    // Between the headers and the section.
    let file = copy();
    let open = Arc::new(file.reopen().unwrap());
    let elf = Elf::open(Arc::clone(&open), &open.metadata().unwrap()).unwrap();
    file.as_file().set_len(0x300).unwrap();
    assert_eq!(Frames::read(&elf, &Limits::default()).err(), Some(NoTable::Unreadable));

    // While it is run: what was read makes a table, but not of the file that is there now.
    let changes: [fn(&File); 2] =
        [|file| file.set_len(0x300).unwrap(), |file| file.write_all_at(&[0; 4], 0x2000).unwrap()];
    for change in changes {
        let file = long();
        let open = Arc::new(file.reopen().unwrap());
        let past = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1);
        open.set_modified(past).unwrap();
        let mut pause = || change(file.as_file());
        let built = build(&open, &mut Rules::default(), &Limits::default(), &mut pause);
        assert_eq!(built.err(), Some(NoTable::Changed));
    }

    // Another in its place, as package managers do: the one that is open is what the process runs.
    let (file, other) = (long(), copy());
    let open = Arc::new(file.reopen().unwrap());
    let (to, from) = (file.path().to_owned(), other.path().to_owned());
    let mut pause = || drop(fs::rename(&from, &to));
    let built = build(&open, &mut Rules::default(), &Limits::default(), &mut pause).unwrap();
    assert!(!from.exists());
    let mut rules = Rules::default();
    let expected = build(&open, &mut rules, &Limits::default(), &mut || ()).unwrap();
    assert_eq!((built.rows, built.stats), (expected.rows, expected.stats));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever the bytes of the file are, there is an answer, and its table is well-formed.
    #[test]
    fn any_elf(
        name in prop::sample::select(&["x86_64.elf", "aarch64.elf", "debug.elf"][..]),
        changes in prop::collection::vec((0_usize..1400, any::<u8>()), 0..12),
        len in 0_usize..1600,
        garbage in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut bytes = fs::read(fixture(name)).unwrap();
        for (at, value) in changes {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        bytes.truncate(len.max(900));
        let limits = Limits { table_bytes: 64 << 10, ..Limits::default() };
        for bytes in [bytes, [&b"\x7fELF\x02\x01\x01\0"[..], &garbage].concat()] {
            let _ = of_bytes(&bytes, &mut Rules::default(), &limits);
        }
    }

    /// Whatever the instructions of a function are, its neighbours are as they were.
    #[test]
    fn any_instructions(instructions in prop::collection::vec(any::<u8>(), 0..200)) {
        let functions =
            [(0x40_0100, 8, &[][..]), (0x40_0108, 0x50, &instructions), (0x40_0158, 8, &[OFFSET, 24])];
        let mut rules = Rules::default();
        let bytes = with_frames(&frames(functions));
        let table = of_bytes(&bytes, &mut rules, &Limits::default()).unwrap();
        let rule = |address| rules.get(table.rule(address)).unwrap().cfa_offset;
        prop_assert_eq!([rule(0x40_0107), rule(0x40_0158), rule(0x40_0160)], [8, 24, 0]);
    }

    /// Whatever the section is, there is an answer.
    #[test]
    fn any_section(
        section in prop::collection::vec(any::<u8>(), 0..300),
        after_cie in any::<bool>(),
    ) {
        let bytes = if after_cie { [cie(&[]), section].concat() } else { section };
        let limits = Limits { table_bytes: 64 << 10, ..Limits::default() };
        let _ = of_bytes(&with_frames(&bytes), &mut Rules::default(), &limits);
    }

    /// The pages say what the rows say, wherever those are.
    #[test]
    fn pages_say_what_rows_say(
        steps in prop::collection::vec((prop_oneof![0_u64..20, 0_u64..1 << 31, Just(1 << 33)], 0_u16..4), 0..600),
        start in 0_u64..1 << 40,
    ) {
        let mut writer = Writer::new(start, u64::MAX);
        let mut rows = std::collections::BTreeMap::new();
        let mut at = start;
        for (step, rule) in steps {
            at += step;
            writer.push(at, rule).unwrap();
            rows.insert(at, rule);
        }
        let end = at + 5;
        let (segments, _, _) = writer.finish(end).unwrap();
        let table = FileTable {
            segments, loads: Vec::new(), rows: 0, bytes: 0, stats: Stats::default(),
        };
        // A rule that holds for more than 4 GiB, as none does, is not known behind that.
        let near = |address: u64, from: u64| address - from < 1 << 31;
        for row in rows.keys().step_by(7) {
            for address in [*row, row + 1, row + 4000] {
                let (from, rule) = rows.range(..=address).next_back().unwrap();
                let expected = if address < end { *rule } else { NO_RULE };
                if near(address, *from) {
                    prop_assert_eq!(table.rule(address), expected, "{:x}", address);
                }
            }
        }
        prop_assert_eq!(table.rule(start.wrapping_sub(1)), NO_RULE);
        prop_assert_eq!(table.rule(end), NO_RULE);
    }
}

/// More rows than one table has.
#[test]
fn large_files_have_several_tables() {
    let mut writer = Writer::new(0x1000, u64::MAX);
    let (count, per_table) = (600_000_u64, 512 * 512);
    for n in 0..count {
        writer.push(0x1000 + 2 * n, (n % 3) as u16 + 1).unwrap();
    }
    let (segments, rows, bytes) = writer.finish(0x1000 + 2 * count).unwrap();
    assert_eq!(rows, count);
    let table = FileTable { segments, loads: Vec::new(), rows, bytes, stats: Stats::default() };
    let found: Vec<_> = table.segments.iter().map(|s| (s.base, s.end, s.pages.len())).collect();
    let at = |row: u64| 0x1000 + 2 * row;
    assert_eq!(found[0], (at(0), at(per_table), 513));
    assert_eq!(found[1], (at(per_table), at(2 * per_table), 513));
    assert_eq!(found[2], (at(2 * per_table), at(count), 149));
    for n in 0..count {
        let expected = (n % 3) as u16 + 1;
        assert_eq!([table.rule(at(n)), table.rule(at(n) + 1)], [expected; 2], "{n}");
    }
}
